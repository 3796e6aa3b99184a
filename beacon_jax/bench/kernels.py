"""Attention alone, at a preset's shapes: every implementation, at every fill.

A buffer of M slots and T queries is `live` slots full. Useful FLOPs are those of the
keys that a query sees: T live + T (T + 1) / 2 pairs, 4 N H each, twice that backward
(`flops`; others count 2.5 times, for the scores that are computed again). Where they
fall with `live` but the time does not, an implementation visits dead slots.

"library, exact shape" is the yardstick: the platform's attention (cuDNN on GPU, else
XLA) on arrays that hold the live keys only. It cannot mask as the op does, so it is
causal over T keys where live = 0, and sees all live + T keys elsewhere; its FLOPs are
counted accordingly.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from beacon_jax.attention import IMPLEMENTATIONS, prefix_attention
from beacon_jax.attention.api import INT8
from beacon_jax.attention.device import Target
from beacon_jax.bench.case import Bench, Case, Latest, timed
from beacon_jax.bench.device import check_platform, random_array, whole_tiles
from beacon_jax.bench.records import Row
from beacon_jax.bench.timing import (
    CallTime,
    Compiled,
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


def cases(s: Bench) -> Iterator[Case]:
    """Yields the cases: forward and backward of a window, and decoding.

    The window has its beacons, by default at ratios 8 and 2.
    """
    window, latest = s.beacon.window, Latest()
    for memory in s.memory or (16 * window,):
        for way in ("forward", "backward"):
            for queries in s.queries or (window + window // 8, window + window // 2):
                for name in (*IMPLEMENTATIONS, DEFAULT, LIBRARY):
                    yield from _cases(s, latest, way, name, 1, queries, memory)
        for batch in s.batches:
            int8 = (name + INT8_MEMORY for name in (*INT8, DEFAULT))
            for name in (*IMPLEMENTATIONS, DEFAULT, *int8):
                yield from _cases(s, latest, "decode", name, batch, 1, memory)


def _cases(s: Bench, latest: Latest, *shape: Any) -> Iterator[Case]:
    """Yields a case per fill of (way, implementation, batch, queries, memory)."""
    way, name, _, queries, memory = shape
    # One program serves every fill.
    run = lambda live: latest.get(shape, lambda: _attend(s, *shape))(live)
    if name == LIBRARY:
        run = functools.partial(_library, s, way, queries)
    names = ("way", "implementation", "batch", "queries", "memory")
    for fill in FILLS:
        live = int(fill * memory)
        key = s.key("kernels", **dict(zip(names, shape, strict=True)), live=live)
        yield Case(key, functools.partial(run, live))


def _inputs(s: Bench, batch: int, queries: int, keys: int, layers: int = 0):
    c, dtype = s.config, jnp.dtype(s.dtype)
    root = jax.random.key(0, impl="rbg")
    q = random_array(root, (batch, queries, c.num_heads, c.head_dim), dtype)
    shape = (batch, keys, c.num_kv_heads, c.head_dim)
    shape = (layers, *shape) if layers else shape
    k, v = (random_array(jax.random.fold_in(root, i), shape, dtype) for i in (1, 2))
    # Made before they are used: a long call is timed without a warm-up.
    return jax.block_until_ready((q, k, v))


def _quantised(k):
    """Makes an int8 memory as large as k, and its scales [L, B, K, S]."""
    root = jax.random.key(3, impl="rbg")
    random = jax.jit(lambda key: jax.random.randint(key, k.shape, -127, 128, jnp.int8))
    *front, slots, heads, _ = k.shape
    scale = jnp.full((*front, heads, slots), 1 / 127, jnp.float32)
    values = [random(jax.random.fold_in(root, i)) for i in (0, 1)]
    return jax.block_until_ready((*values, {"k_scale": scale, "v_scale": scale}))


def _row(
    s: Bench,
    way: str,
    batch: int,
    pairs: int,
    keys: int,
    time: CallTime,
    program: Compiled,
    int8: bool = False,
) -> Row:
    """Makes the row of a call, whose rows have `pairs` and must read `keys`."""
    c = s.config
    spent = 4 * c.num_heads * c.head_dim * pairs * batch
    spent *= 2 if way == "backward" else 1
    head = c.head_dim + 4 if int8 else c.head_dim * s.itemsize  # a float32 scale
    read = 2 * batch * keys * c.num_kv_heads * head
    return timed(time, program) | {
        "useful_flops": spent,
        "tflops": spent / time.median_s / 1e12,
        "read_bytes": read,
        "gbs": read / time.median_s / 1e9,
    }


def _attend(
    s: Bench, way: str, name: str, batch: int, queries: int, memory: int
) -> Callable[[int], Row]:
    """Compiles `prefix_attention` over one capacity; returns what measures a fill."""
    int8, name = name.endswith(INT8_MEMORY), name.removesuffix(INT8_MEMORY)
    check_platform(name, s.device)
    layers = 0 if way == "backward" else LAYERS  # as training and inference do
    q, k, v = _inputs(s, batch, queries, whole_tiles(memory + queries), layers)
    chosen = None if name == DEFAULT else name
    attend = functools.partial(
        prefix_attention, implementation=chosen, target=Target.of(s.device)
    )
    given: Callable[[Any], tuple[Any, ...]]
    call: Callable[..., Any]
    if way == "backward":
        forward = jax.jit(
            lambda q, k, v, prefix: jax.vjp(
                lambda q, k, v: attend(q, k, v, prefix), q, k, v
            )
        )
        given = lambda prefix: (forward(q, k, v, prefix)[1], q)
        call = lambda pull, d_out: pull(d_out)
    else:
        k, v, scales = _quantised(k) if int8 else (k, v, {})
        given = lambda prefix: (q, k, v, scales, prefix)
        call = lambda q, k, v, scales, prefix: attend(
            q, k, v, prefix, layer=LAYERS - 1, **scales
        )
        if way == "decode":
            call = functools.partial(_steps, call)
    program = compile_program(call, *given(jnp.zeros((batch,), jnp.int32)))

    def measure(live: int) -> Row:
        prefix = jnp.full((batch,), live, jnp.int32)
        arguments = jax.block_until_ready(given(prefix))
        time = measure_queued(lambda: program.run(*arguments), repeats=s.repeats)
        if way == "decode":
            time = time.scaled(1 / STEPS)
        pairs = queries * live + queries * (queries + 1) // 2
        return _row(s, way, batch, pairs, live + queries, time, program, int8)

    return measure


def _steps(attend, q, *rest):
    """Calls STEPS times, each of which needs the one before."""
    body = lambda _, x: q + jnp.asarray(1e-3, q.dtype) * attend(x, *rest)
    return jax.lax.fori_loop(0, STEPS, body, q)


def _library(s: Bench, way: str, queries: int, live: int) -> Row:
    q, *kv = _inputs(s, 1, queries, live + queries)
    name = "cudnn" if s.device.platform == "gpu" else "xla"
    call: Callable[..., Any] = functools.partial(
        jax.nn.dot_product_attention, is_causal=live == 0, implementation=name
    )
    pairs = queries * (queries + live) if live else queries * (queries + 1) // 2
    given: tuple[Any, ...] = (q, *kv)
    if way == "backward":
        forward = jax.jit(lambda *x: jax.vjp(call, *x))
        given = jax.block_until_ready(forward(q, *kv))[1], q
        program = compile_program(lambda pull, d_out: pull(d_out), *given)
    else:
        program = compile_program(call, *given)
    time = measure_queued(lambda: program.run(*given), repeats=s.repeats)
    return _row(s, way, 1, pairs, live + queries, time, program)
