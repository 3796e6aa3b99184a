"""Measuring what compression costs: tasks, methods, one resumable runner, a report.

A task (tasks/, one file each) makes examples and scores predictions; a method
(methods.py, baselines/) says how the past of an example becomes a `MemoryState`.
Neither knows the other: every task runs with every method, and both grow by adding
files.
"""

from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.methods import Method
from beacon_jax.evaluation.model import Model, load_model
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.tasks import make_tasks

__all__ = [
    "Method",
    "Model",
    "Settings",
    "evaluate",
    "load_model",
    "make_methods",
    "make_tasks",
]
