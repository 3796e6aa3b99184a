"""Compressors that need no beacons, a file for each, and the interface of one's own.

    streaming           the first 4 tokens and the last ones
    snapkv              what the last 64 tokens of a piece attend to
    expected-attention  what queries to come may attend to
    kvzip               what repeating the text attends to
    attention-matching  slots whose attention is that of all tokens, in closed form
    mean-pool           means of neighbouring keys and values
    retention:FOLDER    facts, found by a score that `beacon-jax retain` fitted to the
                        model in minutes, and attention matching besides

The others need no training. They make the same `Memory` that beacons make, on any
model: at the same ratios and budgets, of as many slots. `Compressor` is the interface
of one's own: three functions, of which most methods need `score` alone. This one keeps
the smallest keys:

    import jax.numpy as jnp
    import beacon_jax

    def small(k, v):  # of a layer, [B, S, K, H] -> [B, K, S]
        return -jnp.swapaxes(jnp.linalg.norm(k, axis=-1), 1, 2)

    class SmallKeys(beacon_jax.Compressor):
        name = "small-keys"

        def score(self, piece, seen, count):
            return piece.per_layer(small)

    model = beacon_jax.load("org/model")
    memory = model.compress(text, ratio=4, method=SmallKeys())

On a command line its class is --method=module:SmallKeys.
"""

from beacon_jax.inference.compressors.attention_matching import AttentionMatching
from beacon_jax.inference.compressors.base import Compressor
from beacon_jax.inference.compressors.expected_attention import ExpectedAttention
from beacon_jax.inference.compressors.kvzip import KVzip
from beacon_jax.inference.compressors.mean_pool import MeanPool
from beacon_jax.inference.compressors.piece import Piece
from beacon_jax.inference.compressors.retention import Retention
from beacon_jax.inference.compressors.snapkv import SnapKV
from beacon_jax.inference.compressors.streaming import Streaming
from beacon_jax.names import imported, meant

METHODS: dict[str, type[Compressor]] = {
    kind.name: kind
    for kind in (
        Streaming,
        SnapKV,
        ExpectedAttention,
        KVzip,
        AttentionMatching,
        MeanPool,
    )
}
KNOWN = (*METHODS, "retention:FOLDER")

__all__ = ["KNOWN", "METHODS", "Compressor", "Piece", "Retention", "find"]


def find(name: str) -> Compressor:
    """Makes the compressor of a name, "retention:FOLDER" or "module:Class".

    Raises:
      ValueError, FileNotFoundError: there is none of this name, no such folder or
        class.
    """
    if name in METHODS:
        return METHODS[name]()
    module, colon, attribute = name.partition(":")
    if module == Retention.name:
        if not attribute:
            raise ValueError(
                f"method={name!r} has weights of the model, which it does not name: "
                "give retention:FOLDER, a folder that `beacon-jax retain` wrote."
            )
        return Retention.load(attribute)
    if not colon:
        raise ValueError(
            f"method={name!r} is unknown: {meant(name, METHODS)}use beacon, "
            f"{', '.join(KNOWN)}, or module:Class of one's own."
        )
    found = imported(f"method={name!r}", module, attribute, "module:Class")
    if not (isinstance(found, type) and issubclass(found, Compressor)):
        raise ValueError(
            f"method={name!r} is no compressor: its class has to be one of "
            "beacon_jax.Compressor."
        )
    return found()
