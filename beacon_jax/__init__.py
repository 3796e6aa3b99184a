"""Activation Beacon in JAX: compresses the KV cache of long contexts.

    model = beacon_jax.load("tiny-beacon")  # comes with the package
    memory = model.compress(text, ratio=4)
    print(model.generate("What is the pass key?", memory=memory))

`compress`, `complete` and `generate` are also functions that take the model first;
`Chat` holds a conversation. The command lines (train, convert, compress, generate,
evaluate) are `beacon-jax COMMAND`, they are not imported.

Axes, the same letters everywhere:
    B batch             T query length      S key length, slots of the buffer
    M memory slots      N query heads       K key/value heads    G N / K
    H head dim          D model dim         F MLP dim            V vocabulary
    L layers            W window, raw tokens of one
"""

import importlib
from typing import TYPE_CHECKING, Any

from beacon_jax import runtime

if TYPE_CHECKING:
    from beacon_jax.core.memory import CapacityError
    from beacon_jax.inference.chat import Chat
    from beacon_jax.inference.compressors import Compressor
    from beacon_jax.inference.loading import load
    from beacon_jax.inference.memory import Memory
    from beacon_jax.inference.model import Generation, Model
    from beacon_jax.model.config import BeaconConfig, ModelConfig

    compress, complete, generate = Model.compress, Model.complete, Model.generate

__version__ = "0.1.0"
__all__ = [
    "BeaconConfig",
    "CapacityError",
    "Chat",
    "Compressor",
    "Generation",
    "Memory",
    "Model",
    "ModelConfig",
    "complete",
    "compress",
    "generate",
    "load",
]

runtime.prepare()  # before jax starts its backend, if nobody did yet

# Loaded when first used: jax and flax take seconds, a command line's --help none.
_WHERE = {
    "BeaconConfig": "model.config",
    "ModelConfig": "model.config",
    "CapacityError": "core.memory",
    "Chat": "inference.chat",
    "Compressor": "inference.compressors",
    "Memory": "inference.memory",
    "Generation": "inference.model",
    "Model": "inference.model",
    "load": "inference.loading",
    "complete": "inference.functions",
    "compress": "inference.functions",
    "generate": "inference.functions",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"beacon_jax has no {name!r}: it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"beacon_jax.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
