"""Feeds one token to every row: what decoding does over and over."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core import plan
from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState
from beacon_jax.core.move import keep_places
from beacon_jax.model.buffers import Buffer
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net


@functools.partial(jax.jit, static_argnames=("net", "static", "steady"))
def decode_step(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[Array, " B"],
    ratios: Int[Array, "*B P"],
    active: Array | None = None,
    *,
    static: tuple[int, ...],
    steady: bool = False,
) -> tuple[Float[Array, "B V"], MemoryState]:
    """Feeds one token to every active row; inserts beacons and compresses as it goes.

    The ratio is data here (`count % r`), never a switch, so rows may be anywhere in
    their windows. Call `plan.check_capacity` for all tokens to come beforehand. Rows
    that keep their last full window raw leave a full one open: `recent.settle` closes
    it before the next step.

    Args:
      tokens: next raw token of each row.
      ratios: as in `feed`.
      active: rows that take their token; the others stay as they are.
      static: the ratios that may occur (`plan.static_ratios`); they bound the beacons.
      steady: every step runs a beacon behind the token of every row, due or not. A
        matrix product of two places rounds otherwise than one of one place, so that in
        bfloat16 a row would else depend on whether another row's beacon is due. Costs
        about 30 % of a step (SmolLM2-135M, 4 rows, two busy cores). Appended beacons,
        which are many at once, run when they are due all the same.

    Returns:
      (float32 logits of each row's token, memory).
    """
    config, w, b = net.config, memory.window, tokens.shape[0]
    law = Law.of(config, w)
    active = jnp.ones((b,), bool) if active is None else active
    plans = jnp.broadcast_to(ratios, (b, ratios.shape[-1]))
    planned = plan.at(plans, memory.windows[:, None])[:, 0]
    ratio = jnp.where(memory.raw == 0, planned, memory.ratio)
    memory = memory.replace(ratio=jnp.where(active, ratio, memory.ratio))
    raw = memory.raw + 1
    entries = law.entries(memory.ratio, memory.raw)
    prefix = memory.slots + entries
    compressing = [r for r in static if r > 0]

    def run(beacons):
        model = Decoder(net, Layout(1, 1, beacons))

        def forward(k, v):
            hidden, _, k, v = apply(model, variables, tokens[:, None], k, v, prefix)
            return apply(model, variables, hidden[:, 0], method="logits"), k, v

        return forward

    append = law.placement == "append"
    if compressing and steady and not append:
        logits, k, v = run(1)(memory.k, memory.v)
    elif compressing:
        due = (law.entries(memory.ratio, raw) > entries + 1) & active
        most = int(law.beacons(min(compressing), w)) if append else 1
        logits, k, v = _either(
            net,
            jnp.any(due),
            lambda x: run(most)(*x[1:]),
            lambda x: run(0)(*x[1:]),
            (jnp.zeros((b, config.vocab_size)), memory.k, memory.v),
        )
    else:
        logits, k, v = run(0)(memory.k, memory.v)

    row = jnp.arange(b)
    column = jnp.minimum(memory.raw, w - 1)
    token = jnp.where(active, tokens, memory.tokens[row, column])
    full = active & (raw == w)
    if settled := memory.recent is not None:
        full = jnp.zeros_like(full)
    grown = law.kept(memory.ratio, memory.slots)
    if compressing and not settled:
        moved = functools.partial(
            _compress_open, config, memory.slots, memory.ratio, full, compressing, law
        )
        k, v = _either(net, jnp.any(full), lambda x: moved(*x), lambda x: x, (k, v))
    return logits, memory.replace(
        k=k,
        v=v,
        slots=memory.slots + jnp.where(full, grown, 0),
        sinks=jnp.where(full & (memory.slots == 0), law.sink, memory.sinks),
        raw=jnp.where(active, jnp.where(full, 0, raw), memory.raw),
        windows=memory.windows + full,
        tokens=memory.tokens.at[row, column].set(token),
    )


def _either(
    net: Net,
    wanted: Bool[Array, ""],
    body: Callable[[Any], Any],
    other: Callable[[Any], Any],
    state: Any,
) -> Any:
    """Runs body(state) if `wanted`, else other(state), and writes the state in place.

    XLA for CPUs copies the buffers that a branch of `lax.cond` writes: at x8 behind 16K
    tokens of Qwen2-0.5B, 8 rows, twice 0.48 GiB for each token. It does not copy for
    loops that run once or not at all. For H200 and TPU v5e it copies neither way, and
    every loop costs a GPU one more question to the host.
    """
    if net.target.platform != "cpu":
        return lax.cond(wanted, body, other, state)
    for needed, run in ((wanted, body), (~wanted, other)):
        _, state = lax.while_loop(
            lambda x: x[0],
            lambda x, run=run: (jnp.zeros_like(x[0]), run(x[1])),
            (needed, state),
        )
    return state


def _compress_open(
    config: ModelConfig,
    slots: Int[Array, " B"],
    ratio: Int[Array, " B"],
    full: Bool[Array, " B"],
    ratios: list[int],
    law: Law,
    k: Buffer,
    v: Buffer,
) -> tuple[Buffer, Buffer]:
    """Moves the kept entries of full open windows to the front of them."""
    slots, ratio = slots[:, None], ratio[:, None]
    most = max(int(law.kept(r, 0)) for r in ratios)
    place = law.place(ratio, slots, jnp.arange(most))  # [B, n]
    count = jnp.where(full[:, None] & (ratio > 0), law.kept(ratio, slots), 0)
    return keep_places(config, k, v, slots[:, 0], place, count[:, 0])
