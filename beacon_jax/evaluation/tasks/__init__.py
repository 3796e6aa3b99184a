"""The tasks by name. A new one is a file with a `Task` and a line here."""

from collections.abc import Callable, Sequence
from typing import Any

from beacon_jax.evaluation.tasks import longbench, longdata, mmlu, ruler
from beacon_jax.evaluation.tasks.babilong import Qa1, Qa2, Qa3
from beacon_jax.evaluation.tasks.base import Task
from beacon_jax.evaluation.tasks.mqar import Mqar
from beacon_jax.evaluation.tasks.multi_needle import MultiNeedle
from beacon_jax.evaluation.tasks.needle import Needle, NeedleRelease
from beacon_jax.evaluation.tasks.passkey import PasskeyRetrieval
from beacon_jax.evaluation.tasks.perplexity import Perplexity
from beacon_jax.evaluation.tasks.perplexity_release import PerplexityRelease
from beacon_jax.evaluation.tasks.records import JsonKV, Lines
from beacon_jax.names import meant

# Those that need no file of the user, besides `ruler.GROUPS["ruler"]`.
OFFLINE: tuple[type[Any], ...] = (
    PasskeyRetrieval,
    Perplexity,
    PerplexityRelease,
    Needle,
    NeedleRelease,
    MultiNeedle,
    JsonKV,
    Lines,
    Qa1,
    Qa2,
    Qa3,
    Mqar,
)

TASKS: dict[str, Callable[[], Task]] = {
    **{t.name: t for t in OFFLINE},
    **ruler.TASKS,
    **longbench.TASKS,
    **longdata.TASKS,
    **mmlu.TASKS,
}


# Names for several tasks at once.
GROUPS: dict[str, tuple[str, ...]] = {
    **ruler.GROUPS,
    **longbench.GROUPS,
    **longdata.GROUPS,
    "babilong": (Qa1.name, Qa2.name, Qa3.name),
    "offline": (*(t.name for t in OFFLINE), *ruler.GROUPS["ruler"]),
}


def make_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of names and of groups of them.

    Raises:
      ValueError: an unknown name.
    """
    every = [one for name in names for one in GROUPS.get(name, (name,))]
    unknown = [name for name in every if name not in TASKS]
    if unknown:
        known = ", ".join([*TASKS, *GROUPS])
        near = meant(unknown[0], [*TASKS, *GROUPS])
        raise ValueError(f"--tasks names {unknown}: {near}Known are {known}.")
    return [TASKS[name]() for name in dict.fromkeys(every)]
