"""Measuring what compression costs: tasks, methods, one resumable runner, a report.

A task (tasks/, one file each) makes examples and scores predictions; a method
(methods.py, baselines/) says how the past of an example becomes a `Memory`.
Neither knows the other: every task runs with every method, and both grow by adding
files.
"""

from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import RunSettings
from beacon_jax.evaluation.methods import Method
from beacon_jax.evaluation.reading import load_model
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.inference.model import Model

__all__ = [
    "Method",
    "Model",
    "RunSettings",
    "evaluate",
    "load_model",
    "make_methods",
    "make_tasks",
]
