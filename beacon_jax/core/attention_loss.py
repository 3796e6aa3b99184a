"""Attention to the memory, held to the attention that the tokens themselves would get.

A beacon recalls something if the right queries find its key, and if its value then
says what they want. A loss of labels teaches either only once the other is there. So
training may stand still for long, and may find the token next to the beacon and no
other. What full attention pays to the tokens that a beacon stands for is known, and
says at once which queries its key has to be found by.

The loss is the cross entropy between the two, per layer, averaged over heads: so heads
may share out the tokens of a beacon among themselves. (The idea of attention transfer,
Zagoruyko and Komodakis 2017, arXiv 1612.03928, for memory slots; docs/training.md.)

Shapes: N windows, B rows, W tokens of a window, Q of them whose attention is compared,
L layers, U slots of the memory, S entries of a buffer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.core.law import Law
from beacon_jax.core.step import Seen
from beacon_jax.model.net import Net

# Added to a share before its logarithm: a slot that gets less has a gradient that ends.
LEAST = 1e-3


class Compared(NamedTuple):
    """What of a window's attention is compared; with N in front, of all windows.

    Attributes:
      at: the places of the queries among the window's raw tokens.
      weights: of the queries in the loss.
      ends: tokens of the row up to the end of each slot, for the teacher.
      shares: attention that the teacher pays to each slot's tokens; None: not known.
    """

    at: Int[Array, "B Q"]
    weights: Float[Array, "B Q"]
    ends: Int[Array, "B U"]
    shares: Float[Array, "L B Q U"] | None = None


def choose(
    weights: Float[Array, "N B W"], count: int
) -> tuple[Int[Array, "N B Q"], Float[Array, "N B Q"]]:
    """Chooses the tokens of each window whose attention is compared.

    Those of the largest weights; of equal ones some that are far from each other.

    Args:
      weights: of all tokens; 0 or more.
      count: Q, at most; never more than W.

    Returns:
      Their places in the window, and their weights.
    """
    w = weights.shape[-1]
    spread = jnp.asarray(_far_apart(w), jnp.int32)
    first = jnp.argsort(-weights[..., spread], axis=-1, stable=True)
    at = spread[first[..., : min(count, w)]]
    return at, jnp.take_along_axis(weights, at, axis=-1)


def _far_apart(count: int) -> Int[np.ndarray, " count"]:
    """Orders 0 ... count - 1 by their binary digits backwards: 0, 4, 2, 6, 1, ..."""
    digits = max(count - 1, 1).bit_length()
    backwards = [int(f"{i:0{digits}b}"[::-1], 2) for i in range(count)]
    return np.argsort(backwards)


def slot_ends(
    law: Law,
    plan: Int[Array, " N"],
    slots: Int[Array, "N B"],
    added: Int[Array, "N B"],
    capacity: int,
) -> Int[Array, "B U"]:
    """Counts the tokens of each row up to the end of each slot.

    Args:
      plan: ratios of the windows.
      slots, added: as `count_slots` gives them.
      capacity: U. Slots that are not there end where the last one does.
    """
    n, b = slots.shape
    token = jnp.arange(law.window)
    of_token = law.slot_of(plan[:, None, None], slots[..., None], token)
    # Windows follow each other in a row from its first one on; none is left out.
    full = added > 0
    before = (jnp.cumsum(full, axis=0) - full) * law.window
    place = jnp.where(full[..., None], before[..., None] + token, n * law.window)
    none = jnp.iinfo(jnp.int32).max
    rows = jnp.broadcast_to(jnp.arange(b)[:, None], place.shape)
    owner = jnp.full((b, n * law.window), none, jnp.int32)
    owner = owner.at[rows, place].set(of_token.astype(jnp.int32), mode="drop")
    count = lambda row: jnp.searchsorted(row, jnp.arange(capacity), side="right")
    ends = jax.vmap(count)(owner).astype(jnp.int32)
    return jnp.minimum(ends, (owner < none).sum(axis=1, dtype=jnp.int32)[:, None])


def shares_of_tokens(
    net: Net, seen: Seen, x: dict[str, Any], own: None
) -> Float[Array, "B Q U"]:
    """Returns what queries pay to the tokens of each slot: of a window of the teacher.

    Args:
      seen: what the attention of a layer has seen.
      x: of the window: tokens [B, W], ratio, slots [B], compared.
      own: of the layer: nothing.
    """
    del own
    compared: Compared = x["compared"]
    paid = _paid(net, seen, x, seen.k.shape[1])
    upto = jnp.pad(jnp.cumsum(paid, axis=-1), ((0, 0), (0, 0), (1, 0)))
    upto = jnp.take_along_axis(upto, compared.ends[:, None], axis=-1)
    return jnp.diff(upto, axis=-1, prepend=0).astype(net.dtype)


def attention_loss(
    net: Net, seen: Seen, x: dict[str, Any], shares: Float[Array, "B Q U"]
) -> Float[Array, ""]:
    """Computes the part of a layer of a window, of a mean over layers.

    Args:
      seen, x: as in `shares_of_tokens`.
      shares: of the layer, what `shares_of_tokens` found.
    """
    compared: Compared = x["compared"]
    own = _paid(net, seen, x, shares.shape[-1])
    each = -(shares.astype(jnp.float32) * jnp.log(own + LEAST)).sum(-1)
    return (compared.weights * each).sum() / net.config.num_layers


def _paid(
    net: Net, seen: Seen, x: dict[str, Any], slots: int
) -> Float[Array, "B Q slots"]:
    """Returns the attention of the chosen queries to slots, a mean over heads."""
    law = Law.of(net.config, x["tokens"].shape[1])
    prefix = x["slots"][:, None]
    entry = law.entries(x["ratio"], x["compared"].at)
    q = jnp.take_along_axis(seen.q, entry[..., None, None], axis=1)
    (b, count, n, h), heads = q.shape, seen.k.shape[-2]
    q = q.reshape(b, count, heads, n // heads, h)
    scores = h**-0.5 * jnp.einsum(
        "BQKGH,BSKH->BKGQS", q, seen.k, preferred_element_type=jnp.float32
    )
    visible = jnp.arange(seen.k.shape[1]) <= (prefix + entry)[..., None]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    paid = jax.nn.softmax(scores, axis=-1).mean((1, 2))[..., :slots]
    return jnp.where(jnp.arange(slots) < prefix[..., None], paid, 0.0)
