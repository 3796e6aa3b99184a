"""Attention alone, at a preset's shapes: every implementation, at every fill.

A buffer of M slots and T queries is `live` slots full. Useful FLOPs are those of the
keys that a query sees: T live + T (T + 1) / 2 pairs, 4 N H each, twice that backward
(`model.flops`; others count 2.5 times, for the scores that are computed again). Where
they fall with `live` but the time does not, an implementation visits dead slots.

"library, exact shape" is the yardstick: the platform's attention (cuDNN on GPU, else
XLA) on arrays that hold the live keys only. It cannot mask as the op does, so it is
causal over T keys where live = 0, and sees all live + T keys elsewhere; its FLOPs are
counted accordingly.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from beacon_jax.attention import IMPLEMENTATIONS, prefix_attention
from beacon_jax.attention.api import INT8
from beacon_jax.attention.device import Target
from beacon_jax.benchmark.case import Case, Latest, Settings, timed
from beacon_jax.benchmark.device import check_platform, random_array
from beacon_jax.benchmark.records import Row
from beacon_jax.benchmark.timing import (
    Compiled,
    Timing,
    compile_program,
    measure_queued,
)

FILLS = (0.0, 0.25, 0.5, 1.0)
LIBRARY = "library, exact shape"
DEFAULT = "default"  # implementation=None
INT8_MEMORY = ", int8 memory"  # behind the name of an implementation
# Layers of the buffer, of which the last is read: enough to see a layer being copied.
LAYERS = 2
# Decoding steps in one program; a single one is shorter than its launch.
STEPS = 16


def cases(s: Settings) -> Iterator[Case]:
    """Forward and backward of a window, with its beacons at ratios 8 and 2 by default,
    and decoding."""
    assert s.config.beacon is not None
    window, latest = s.config.beacon.window, Latest()
    for memory in s.memory or (16 * window,):
        for way in ("forward", "backward"):
            for queries in s.queries or (window + window // 8, window + window // 2):
                for name in (*IMPLEMENTATIONS, DEFAULT, LIBRARY):
                    yield from _cases(s, latest, way, name, 1, queries, memory)
        for batch in s.batches:
            int8 = (name + INT8_MEMORY for name in (*INT8, DEFAULT))
            for name in (*IMPLEMENTATIONS, DEFAULT, *int8):
                yield from _cases(s, latest, "decode", name, batch, 1, memory)


def _cases(
    s: Settings,
    latest: Latest,
    way: str,
    name: str,
    batch: int,
    queries: int,
    memory: int,
) -> Iterator[Case]:
    shape = (way, name, batch, queries, memory)
    # One program serves every fill.
    attend = lambda: latest.get(shape, lambda: _Attend(s, *shape))
    for fill in FILLS:
        live = int(fill * memory)
        key = s.key(
            "kernels",
            way=way,
            implementation=name,
            batch=batch,
            queries=queries,
            memory=memory,
            live=live,
        )
        if name == LIBRARY:
            run = functools.partial(_library, s, way, queries, live)
        else:
            run = lambda live=live: attend().measure(live)
        yield Case(key, run)


def useful_flops(s: Settings, way: str, batch: int, pairs: int) -> int:
    """Counts the FLOPs of `pairs` of a query and a key that it sees, per row."""
    forward = 4 * s.config.num_heads * s.config.head_dim * pairs * batch
    return 2 * forward if way == "backward" else forward


def _inputs(s: Settings, batch: int, queries: int, keys: int, layers: int = 0):
    c, dtype = s.config, jnp.dtype(s.dtype)
    root = jax.random.key(0, impl="rbg")
    q = random_array(root, (batch, queries, c.num_heads, c.head_dim), dtype)
    shape = (batch, keys, c.num_kv_heads, c.head_dim)
    shape = (layers, *shape) if layers else shape
    k, v = (random_array(jax.random.fold_in(root, i), shape, dtype) for i in (1, 2))
    # Made before they are used: a long call is timed without a warm-up.
    return jax.block_until_ready((q, k, v))


def _quantised(s: Settings, k):
    """An int8 memory as large as k, and its scales [L, B, K, S]."""
    root = jax.random.key(3, impl="rbg")
    random = jax.jit(lambda key: jax.random.randint(key, k.shape, -127, 128, jnp.int8))
    *front, slots, heads, _ = k.shape
    scale = jnp.full((*front, heads, slots), 1 / 127, jnp.float32)
    values = [random(jax.random.fold_in(root, i)) for i in (0, 1)]
    return jax.block_until_ready((*values, {"k_scale": scale, "v_scale": scale}))


def _row(
    s: Settings,
    way: str,
    batch: int,
    pairs: int,
    keys: int,
    timing: Timing,
    program: Compiled,
    int8: bool = False,
) -> Row:
    """Rates of a call; `keys` that must be read per row, in bytes of K and V."""
    c, size = s.config, jnp.dtype(s.dtype).itemsize
    head = c.head_dim + 4 if int8 else c.head_dim * size  # a float32 scale
    read = 2 * batch * keys * c.num_kv_heads * head
    return timed(timing, program) | {
        "useful_flops": useful_flops(s, way, batch, pairs),
        "tflops": useful_flops(s, way, batch, pairs) / timing.median_s / 1e12,
        "read_bytes": read,
        "gbs": read / timing.median_s / 1e9,
    }


class _Attend:
    """`prefix_attention` by one implementation over one capacity."""

    def __init__(
        self, s: Settings, way: str, name: str, batch: int, queries: int, memory: int
    ):
        self._int8 = name.endswith(INT8_MEMORY)
        name = name.removesuffix(INT8_MEMORY)
        check_platform(name, s.device)
        self._s, self._way, self._batch, self._queries = s, way, batch, queries
        layers = 0 if way == "backward" else LAYERS  # as training and inference do
        q, k, v = _inputs(s, batch, queries, memory + queries, layers)
        chosen = None if name == DEFAULT else name
        attend = functools.partial(
            prefix_attention, implementation=chosen, target=Target.of(s.device)
        )
        if layers:
            attend = functools.partial(attend, layer=LAYERS - 1)
        prefix = jnp.zeros((batch,), jnp.int32)
        if way == "backward":

            def forward(q, k, v, prefix):
                return jax.vjp(lambda q, k, v: attend(q, k, v, prefix), q, k, v)

            forward = jax.jit(forward)
            self._pull = lambda prefix: forward(q, k, v, prefix)[1]
            self._given: tuple[Any, ...] = (q,)
            back = lambda pull, d_out: pull(d_out)
            self._program = compile_program(back, self._pull(prefix), q)
            return
        scales = {}
        if self._int8:
            k, v, scales = _quantised(s, k)
        self._given = (q, k, v, scales)
        call = lambda q, k, v, scales, prefix: attend(q, k, v, prefix, **scales)
        if way == "decode":
            call = functools.partial(_steps, call)
        self._program = compile_program(call, *self._given, prefix)

    def measure(self, live: int) -> Row:
        prefix = jnp.full((self._batch,), live, jnp.int32)
        run, given = self._program.run, self._given
        if self._way == "backward":
            pull = jax.block_until_ready(self._pull(prefix))
            call = lambda: run(pull, *given)
        else:
            call = lambda: run(*given, prefix)
        timing = measure_queued(call, repeats=self._s.repeats)
        if self._way == "decode":
            timing = timing.scaled(1 / STEPS)
        t = self._queries
        pairs = t * live + t * (t + 1) // 2
        row = (self._s, self._way, self._batch, pairs, live + t)
        return _row(*row, timing, self._program, self._int8)


def _steps(attend, q, *rest):
    """STEPS calls, each of which needs the one before."""
    body = lambda _, x: q + jnp.asarray(1e-3, q.dtype) * attend(x, *rest)
    return jax.lax.fori_loop(0, STEPS, body, q)


def _library(s: Settings, way: str, queries: int, live: int) -> Row:
    q, k, v = _inputs(s, 1, queries, live + queries)
    name = "cudnn" if s.device.platform == "gpu" else "xla"
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=live == 0, implementation=name
    )
    pairs = queries * (queries + live)
    if live == 0:
        pairs = queries * (queries + 1) // 2
    if way == "forward":
        program = compile_program(attend, q, k, v)
        call = lambda: program.run(q, k, v)
    else:
        _, pull = jax.block_until_ready(
            jax.jit(lambda *x: jax.vjp(attend, *x))(q, k, v)
        )
        program = compile_program(lambda pull, d_out: pull(d_out), pull, q)
        call = lambda: program.run(pull, q)
    timing = measure_queued(call, repeats=s.repeats)
    return _row(s, way, 1, pairs, live + queries, timing, program)
