"""A trained correction of what attention matching makes.

Attention matching fits slots to the queries of the text itself. Those of what comes
behind it are others, and what they miss is alike in each text. So each layer and kv
head has a vector that is added to the values of the slots that were made, times the log
of how many tokens a slot stands for: slots of a text that was not compressed stay as
they are. `inference.train_correction` trains it.

A vector does it: at x8 it takes as much off the loss of 24 held-out texts as a function
of rank 16 of a slot's key, value, bias and what matching made of it (0.021 and 0.023
nats of 0.143, intervals of 0.009 and 0.008).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from beacon_jax.inference.compressors.attention_matching import Kept
from beacon_jax.inference.compressors.piece import Made

# The first tokens of a text get attention that means nothing (Xiao et al. 2024), much
# of it: what is added to them outweighs all else. They stay.
SINKS = 4


def changeable(kept: Kept, size: int) -> Bool[Array, "L B K n"]:
    """Tells which of the slots that a piece leaves are corrected; size: n."""
    nth = jnp.arange(size)
    where = jnp.minimum(kept.start[:, None] + nth, kept.index.shape[2] - 1)
    index = jnp.take_along_axis(kept.index, where[None, :, :, None], axis=2)
    exact = jnp.take_along_axis(kept.exact, jnp.moveaxis(index, 2, 3), axis=3)
    return ~exact & (where >= SINKS)[None, :, None]


def change(
    free: Bool[Array, "L B K n"],
    crowd: Float[Any, " B"],
    correction: Float[Array, "L K H"],
) -> Float[Array, "L B n K H"]:
    """Computes what is added to the values of slots.

    Args:
      free: the slots that are corrected.
      crowd: log of the tokens per slot of each row.
    """
    each = jnp.asarray(crowd)[None, :, None, None] * correction[:, None]
    each = jnp.where(free[..., None], each[:, :, :, None], 0.0)
    return jnp.moveaxis(each, 3, 2)


@jax.jit
def corrected(
    made: Made,
    kept: Kept,
    crowd: Float[Any, " B"],
    correction: Float[Array, "L K H"],
) -> Made:
    """Corrects what was made of the tokens of a piece that stay.

    Args: those of `change`.
    """
    free = changeable(kept, made.v.shape[2])
    return made._replace(v=made.v + change(free, crowd, correction))
