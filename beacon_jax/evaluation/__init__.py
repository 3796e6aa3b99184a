"""Measuring what compression costs: tasks, methods, one resumable runner, a report.

A task (tasks/, one file each) makes examples and scores predictions; a method says how
the past of an example becomes a `MemoryState`. Neither knows the other: every task runs
with every method, and both grow by adding files.
"""

from beacon_jax.evaluation.methods import Method, Model, make_methods
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks.base import Settings

__all__ = ["Method", "Model", "Settings", "evaluate", "make_methods"]
