"""Prefill (time to the first token) and decoding (tokens/s), compressed and in full.

Weights are random and made on the device; the buffer is donated to each call, so that
it exists once. Full attention runs the same decoder without beacons and without what
compression needs, in chunks of `CHUNK` tokens; on GPU also in one piece with cuDNN's
causal attention, as inference engines do. The faster of both is what compression has
to beat.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.attention import IMPLEMENTATIONS
from beacon_jax.benchmark.case import Case, Latest, Settings, timed
from beacon_jax.benchmark.device import (
    check_fits,
    peak_bytes,
    random_array,
    random_variables,
)
from beacon_jax.benchmark.records import Row
from beacon_jax.benchmark.sizes import (
    activation_bytes,
    decode_bytes,
    entries_after,
    kv_token_bytes,
    slots_after,
    weight_bytes,
)
from beacon_jax.benchmark.timing import Compiled, compile_program, measure
from beacon_jax.core.loop import feed_jit
from beacon_jax.core.memory import MemoryState, init_memory
from beacon_jax.core.windows import capacity
from beacon_jax.inference.decode import BLOCK, Loop, decode_block
from beacon_jax.inference.sampling import make_sampling, row_seeds
from beacon_jax.model import flops
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout

CHUNK = 8192
FULL = "full"
FULL_LIBRARY = "full, library"
# XLA's own attention on a CPU has all scores at once.
LONGEST_ON_CPU = 2048


def prefill_cases(s: Settings) -> Iterator[Case]:
    """Every length with every ratio and in full, the smallest buffer first: the peak
    of a device's memory never goes down again."""
    latest, methods = Latest(), [f"x{r}" for r in s.ratios] + [FULL, FULL_LIBRARY]
    rows = [(n, m) for n in s.lengths for m in methods if _applies(s, n, m)]
    for length, method in sorted(rows, key=lambda x: _slots(s, *x)):
        key = s.key("prefill", method=method, length=length)
        yield Case(key, functools.partial(_prefill, s, latest, length, method))


def decode_cases(s: Settings) -> Iterator[Case]:
    """Behind every length, with every ratio and in full, for every batch size."""
    latest, methods = Latest(), [f"x{r}" for r in s.ratios] + [FULL]
    rows = [(n, m, b) for n in s.lengths for m in methods for b in s.batches]
    for length, method, batch in sorted(rows, key=lambda x: x[2] * _slots(s, *x[:2])):
        key = s.key("decode", method=method, length=length, batch=batch)
        yield Case(key, functools.partial(_decode, s, latest, length, method, batch))


def _applies(s: Settings, length: int, method: str) -> bool:
    platform = s.device.platform
    return method != FULL_LIBRARY or (
        platform == "gpu" or (platform == "cpu" and length <= LONGEST_ON_CPU)
    )


def _ratio(method: str) -> int:
    return int(method[1:]) if method.startswith("x") else 0


def _slots(s: Settings, length: int, method: str) -> int:
    return slots_after(s.config, length, _ratio(method))


def _room(s: Settings, length: int, method: str) -> int:
    """Capacity of the buffer."""
    ratio = _ratio(method)
    if not ratio:
        return length
    assert s.config.beacon is not None
    closed = length // s.config.beacon.window + 1
    return capacity(s.config, [ratio] * closed)


def _variables(s: Settings, latest: Latest) -> dict[str, Any]:
    return latest.get("weights", lambda: random_variables(s.config, s.dtype))


def _kv_bytes(s: Settings) -> int:
    return kv_token_bytes(s.config, jnp.dtype(s.dtype).itemsize)


def _weights(s: Settings) -> int:
    return weight_bytes(s.config, jnp.dtype(s.dtype).itemsize)


def _prefill(s: Settings, latest: Latest, length: int, method: str) -> Row:
    size = jnp.dtype(s.dtype).itemsize
    ratio, room = _ratio(method), _room(s, length, method)
    step = _chunk(length, method)
    if ratio:
        assert s.config.beacon is not None
        step = s.config.beacon.window + s.config.beacon.window // ratio
    buffer = room * _kv_bytes(s)
    need = _weights(s) + buffer + activation_bytes(s.config, step, size)
    check_fits(s.device, need)
    variables, before = _variables(s, latest), peak_bytes(s.device)
    make = _compressed if ratio else _full
    program, fresh, run = make(s, variables, length, method)
    timing = measure(run, prepare=fresh, repeats=s.repeats)
    if ratio:
        spent = flops.prefill(s.config, length, ratio).total
    else:
        spent = flops.full_attention(s.config, length).total
    return timed(timing, program) | {
        "tokens_per_second": length / timing.median_s,
        "model_flops": spent,
        "tflops": spent / timing.median_s / 1e12,
        "formula_bytes": need,
        "kv_bytes": _slots(s, length, method) * _kv_bytes(s),
        "peak_bytes": _risen(s, before),
    }


def _risen(s: Settings, before: int | None) -> int | None:
    """The process's peak, if this row set it."""
    after = peak_bytes(s.device)
    return after if before is not None and after != before else None


def _tokens(s: Settings, length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, s.config.vocab_size, (1, length), dtype=np.int32)


Made = tuple[Compiled, Callable[[], Any], Callable[[Any], Any]]


def _compressed(s: Settings, variables, length: int, method: str) -> Made:
    """The program that feeds the text, what makes an empty memory, and what turns that
    into the first token. One scan over a power of two of windows, as in `prefill`."""
    c, dtype = s.config, jnp.dtype(s.dtype).type
    assert c.beacon is not None
    windows = 1 << (-(-length // c.beacon.window) - 1).bit_length()
    size = c.beacon.window * windows
    ratio = _ratio(method)
    plan = jnp.full((1,), ratio, jnp.int32)
    fresh = functools.partial(init_memory, c, 1, _room(s, length, method), dtype)

    def feed(variables, memory, tokens, lengths):
        out, memory = feed_jit(
            c,
            variables,
            memory,
            tokens,
            lengths,
            plan,
            None,
            static=(ratio,),
            outputs="last",
            dtype=dtype,
        )
        return jnp.argmax(out.last_logits, axis=-1), memory

    text, counts = _tokens(s, length), []
    pieces = np.zeros((-(-length // size), 1, size), np.int32)
    for i, start in enumerate(range(0, length, size)):
        part = text[:, start : start + size]
        pieces[i, :, : part.shape[1]] = part
        counts.append(np.full((1,), part.shape[1], np.int32))
    shapes = jax.eval_shape(fresh)
    program = compile_program(feed, variables, shapes, pieces[0], counts[0], donate=[1])

    def run(memory):
        token = None
        for piece, count in zip(pieces, counts, strict=True):
            token, memory = program.run(variables, memory, piece, count)
        return token, memory

    return program, fresh, run


def _chunk(length: int, method: str) -> int:
    fits = method == FULL and length % CHUNK == 0
    return CHUNK if fits else length


def _full(s: Settings, variables, length: int, method: str) -> Made:
    """As `_compressed`, with every entry kept."""
    c, dtype = dataclasses.replace(s.config, beacon=None), jnp.dtype(s.dtype)
    size = _chunk(length, method)
    name = FULL_LIBRARY if method == FULL_LIBRARY else None
    model = Decoder(c, Layout(1, size, 0), (), dtype.type, name)
    shape = (c.num_layers, 1, length, c.num_kv_heads, c.head_dim)
    fresh = lambda: (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def feed(params, k, v, tokens, prefix):
        own = {"params": params}
        hidden, _, k, v = apply(model, own, tokens, k, v, prefix)
        logits = apply(model, own, hidden[:, -1], method="logits")
        return jnp.argmax(logits, axis=-1), k, v

    pieces = np.split(_tokens(s, length), length // size, axis=1)
    starts = [np.full((1,), i * size, np.int32) for i in range(len(pieces))]
    params = variables["params"]
    with _library(s.device.platform):
        shapes = jax.eval_shape(fresh)
        given = (params, *shapes, pieces[0], starts[0])
        program = compile_program(feed, *given, donate=[1, 2])

    def run(buffers):
        token, (k, v) = None, buffers
        for piece, start in zip(pieces, starts, strict=True):
            token, k, v = program.run(params, k, v, piece, start)
        return token, k, v

    return program, fresh, run


@contextlib.contextmanager
def _library(platform: str):
    """Makes the platform's causal attention an implementation of the op, for a text in
    one piece. Taking a layer out of the buffer is a copy of 2 N H bytes per token,
    nothing beside the 4 N H FLOPs per pair."""
    name = "cudnn" if platform == "gpu" else "xla"

    def causal(q, k, v, prefix, *, scale, layer=None, **_):
        del prefix  # 0
        k, v = (k, v) if layer is None else (k[layer], v[layer])
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=scale, implementation=name
        )

    IMPLEMENTATIONS[FULL_LIBRARY] = causal
    try:
        yield
    finally:
        del IMPLEMENTATIONS[FULL_LIBRARY]


def _decode(s: Settings, latest: Latest, length: int, method: str, batch: int) -> Row:
    """`BLOCK` greedy tokens per call, by the loop that `generate` runs."""
    c, dtype = s.config, jnp.dtype(s.dtype)
    ratio, new = _ratio(method), BLOCK * (s.repeats + 1)
    assert c.beacon is not None
    windows = (length + new) // c.beacon.window + 1
    room = length + new if not ratio else _room(s, length + new, method)
    if not ratio:  # and the open window's room, as `check_capacity` asks
        room += c.beacon.window
    need = _weights(s) + batch * room * _kv_bytes(s)
    check_fits(s.device, need)
    variables, before = _variables(s, latest), peak_bytes(s.device)
    memory = _filled(s, length, ratio, batch, room)
    plan = jnp.full((windows,), ratio, jnp.int32)
    logits = jnp.zeros((batch, c.vocab_size), jnp.float32)
    sampling, rows = make_sampling().for_rows(batch), jnp.ones((batch,), bool)
    limits = jnp.full((batch,), 2**30, jnp.int32)  # every row goes on

    def block(variables, memory, logits):
        return decode_block(
            c,
            variables,
            memory,
            Loop(logits, rows, None),
            plan,
            sampling,
            row_seeds(0, batch),
            jnp.int32(0),
            limits,
            eos_ids=(-1,),  # never drawn
            static=(ratio,),
        )

    program = compile_program(block, variables, memory, logits, donate=[1])
    state = [memory, logits]
    del memory

    def call():
        _, loop, state[0] = program.run(variables, *state)
        state[1] = loop.logits
        return state[1], state[0].raw

    timing = measure(call, repeats=s.repeats).scaled(1 / BLOCK)
    entries = entries_after(c, length + new // 2, ratio)
    read = decode_bytes(c, batch, entries, ratio, dtype.itemsize)
    return timed(timing, program) | {
        "tokens_per_second": batch / timing.median_s,
        "read_bytes": read,
        "gbs": read / timing.median_s / 1e9,
        "formula_bytes": need,
        "kv_bytes": batch * entries * _kv_bytes(s),
        "peak_bytes": _risen(s, before),
    }


def _filled(s: Settings, length: int, ratio: int, batch: int, room: int) -> MemoryState:
    """A memory as `length` tokens would leave it, with random content."""
    c, dtype = s.config, jnp.dtype(s.dtype)
    assert c.beacon is not None
    empty = init_memory(c, batch, 1, dtype)
    window = c.beacon.window
    rows = lambda n: jnp.full((batch,), n, jnp.int32)
    shape = (c.num_layers, batch, room, c.num_kv_heads, c.head_dim)
    root = jax.random.key(1, impl="rbg")
    raw = length % window
    # Without compression the full windows' entries are slots, the rest is open.
    return empty.replace(
        k=random_array(root, shape, dtype),
        v=random_array(jax.random.fold_in(root, 1), shape, dtype),
        slots=rows(slots_after(c, length, ratio) if ratio else length - raw),
        raw=rows(raw),
        ratio=rows(ratio),
        windows=rows(length // window),
    )
