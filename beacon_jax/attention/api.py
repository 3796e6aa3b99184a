"""The attention op and the choice of its implementation."""

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from beacon_jax.attention.blockwise import LSE, OUT, blockwise
from beacon_jax.attention.reference import WEIGHTS, reference

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "blockwise": blockwise,
}
# Names of what a backward pass needs besides q, k and v, for checkpoint policies.
RESIDUALS = (OUT, LSE, WEIGHTS)
# Up to here all scores at once are cheaper than a loop over blocks.
SMALL = 1024


def prefix_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    *,
    scale: float | None = None,
    implementation: str | tuple[str, ...] | None = None,
    layer: Int[Array, ""] | int | None = None,
    queries: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Query i of a row sees the keys j <= prefix[row] + i and nothing beyond.

    With the open window directly behind the memory slots of one buffer, this is the
    attention of the paper's section 3.1 for prefill, pieces of a prompt and decoding.

    Args:
      q: queries, already rotated; N is a multiple of K (grouped-query attention).
      k, v: one buffer of S entries per row, the T queries' own entries included at
        prefix[row] ... prefix[row] + T - 1. With `layer`, stacked over L layers.
      prefix: entries in front of the first query, 0 <= prefix <= S - T.
      scale: of the scores; H ** -0.5 by default.
      implementation: a name, several to try in order, or None for the platform's best.
      layer: index into the leading axis of stacked k, v.
      queries: number of valid queries per row; later rows of the result are 0.

    Raises:
      NotImplementedError: no named implementation takes these arguments.
      ValueError: an unknown implementation.
    """
    if q.shape[2] % k.shape[-2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, k has {k.shape[-2]}: the first must be a "
            f"multiple of the second."
        )
    names = implementation
    if names is None:
        names = "reference" if k.shape[-3] <= SMALL else "blockwise"
    refusals = []
    for name in (names,) if isinstance(names, str) else names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={name!r} is unknown: use "
                f"{' or '.join(sorted(IMPLEMENTATIONS))}."
            )
        try:
            return IMPLEMENTATIONS[name](
                q,
                k,
                v,
                prefix,
                scale=q.shape[-1] ** -0.5 if scale is None else scale,
                layer=layer,
                queries=queries,
            )
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"implementation={names!r}: {'; '.join(refusals)}")
