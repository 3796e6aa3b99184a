"""The methods of a model as functions that take the model first."""

import functools
from collections.abc import Callable
from typing import Any

from beacon_jax.inference import validate
from beacon_jax.inference.model import Model


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    name = method.__name__

    @functools.wraps(method)
    def call(*given: Any, **options: Any) -> Any:
        if not given and "self" not in options:
            raise TypeError(
                f"beacon_jax.{name}: the first argument is the model: give what "
                f'load("...") returned, as in {name}(load("tiny-beacon"), "text").'
            )
        validate.model(given[0] if given else options["self"], Model, name)
        return method(*given, **options)

    return call


compress = _function(Model.compress)
complete = _function(Model.complete)
generate = _function(Model.generate)
