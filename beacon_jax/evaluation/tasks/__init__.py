"""The tasks by name. A new one is a file with a `Task` and a line here."""

from collections.abc import Callable

from beacon_jax.evaluation.tasks.base import Task
from beacon_jax.evaluation.tasks.passkey import Passkey
from beacon_jax.evaluation.tasks.perplexity import Perplexity

TASKS: dict[str, Callable[[], Task]] = {t.name: t for t in (Passkey, Perplexity)}


def make_tasks(names: list[str]) -> list[Task]:
    """Raises ValueError on an unknown name."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"--tasks names {unknown}; known are {', '.join(TASKS)}.")
    return [TASKS[name]() for name in names]
