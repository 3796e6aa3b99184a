"""The tasks by name. A new one is a file with a `Task` and a line here."""

from collections.abc import Callable, Sequence

from beacon_jax.evaluation.tasks.base import Task
from beacon_jax.evaluation.tasks.passkey import Passkey
from beacon_jax.evaluation.tasks.perplexity import Perplexity

TASKS: dict[str, Callable[[], Task]] = {t.name: t for t in (Passkey, Perplexity)}


# Names for several tasks at once.
GROUPS: dict[str, tuple[str, ...]] = {}


def make_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of names and of groups of them.

    Raises:
      ValueError: an unknown name.
    """
    every = [one for name in names for one in GROUPS.get(name, (name,))]
    unknown = [name for name in every if name not in TASKS]
    if unknown:
        known = ", ".join([*TASKS, *GROUPS])
        raise ValueError(f"--tasks names {unknown}; known are {known}.")
    return [TASKS[name]() for name in dict.fromkeys(every)]
