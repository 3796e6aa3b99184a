"""Prefill (time to the first token) and decoding (tokens/s), compressed and in full.

Weights are random and made on the device; the buffer is donated to each call, so that
it exists once. Full attention runs the same decoder without beacons and without what
compression needs, in chunks of `CHUNK` tokens; on GPU also in one piece with cuDNN's
causal attention, as inference engines do. The faster of both is what compression has
to beat. With `against`, the same weights run in another library too (`torch_model`),
and all methods of a text are timed in turn (`timing.alternately`): a row that is
missing measures them all again.

Decoding is averaged over the window behind the text's last whole one: the memory is set
to `STRATA` places evenly spread over the window and to its end, where it is compressed,
and BLOCK tokens are generated at each. What a token costs is linear in its place, so
that the mean of evenly spread places is that of the window; the last block counts as
one of W / BLOCK. A window of less than two blocks is measured by one block as a whole.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax import flops
from beacon_jax.attention import IMPLEMENTATIONS
from beacon_jax.bench.case import Bench, Case, Latest, timed
from beacon_jax.bench.device import (
    check_fits,
    peak_bytes,
    random_array,
    random_variables,
    risen,
)
from beacon_jax.bench.records import Row
from beacon_jax.bench.sizes import (
    activation_bytes,
    decode_bytes,
    entries_after,
    slots_after,
    weight_bytes,
)
from beacon_jax.bench.timing import (
    CallTime,
    Compiled,
    alternately,
    compile_program,
    seconds_of,
)
from beacon_jax.bench.torch_model import TorchModel, library
from beacon_jax.core.feed import feed_jit
from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState, init_memory, slot_nbytes
from beacon_jax.core.plan import capacity
from beacon_jax.inference.decode import BLOCK, Loop, Rows, decode_block
from beacon_jax.inference.sampling import make_sampling, row_seeds
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net

# Tokens at once, where that is faster than 8192: on a CPU they stay in the cache
# (0.5B, 8192 tokens behind 0: 1.5 s a layer, 1.1 s in chunks of 1024).
CHUNK = {"cpu": 1024}
FULL = "full"
FULL_LIBRARY = "full, library"
TORCH = "torch"
AGAINST = (TORCH,)
# XLA's own attention on a CPU has all scores at once.
LONGEST_ON_CPU = 2048
STRATA = 3


class Sampler(NamedTuple):
    """A compiled program, and a function that measures it.

    Attributes:
      sample: runs it once and returns seconds, to the first token or per decoded one.
    """

    program: Compiled
    sample: Callable[[], float]


class InTurn:
    """Times methods in turn, when the first of them is asked for."""

    def __init__(self, makers: dict[str, Callable[[], Sampler]], repeats: int):
        self._makers, self._repeats = makers, repeats
        self._found: dict[str, tuple[CallTime, Compiled] | Exception] = {}

    def measure(self, method: str) -> tuple[CallTime, Compiled]:
        """Returns a method's times and program; raises what it raised."""
        if not self._found:
            self._measure()
        found = self._found[method]
        if isinstance(found, Exception):
            raise found
        return found

    def _measure(self) -> None:
        made = {}
        for method, make in self._makers.items():
            try:
                made[method] = make()
            except Exception as error:  # a row of its own, not the end of the others
                self._found[method] = error
        times = alternately(
            {m: sampler.sample for m, sampler in made.items()}, repeats=self._repeats
        )
        for method, taken in times.items():
            self._found[method] = taken, made[method].program


class _Shared:
    """Keeps what the cases share: weights, the other library's model, the group."""

    def __init__(self, s: Bench):
        self._s, self._group = s, Latest()

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        return random_variables(self._s.config, self._s.dtype)

    @functools.cached_property
    def torch(self) -> TorchModel:
        return TorchModel(self._s.config, self.variables, self._s.dtype)

    def measure(
        self, method: str, make: Callable[[str], Sampler], methods: list[str], *key: Any
    ) -> tuple[CallTime, Compiled]:
        """Measures a method, in turn with the others if another library is compared."""
        if not self._s.against:
            key, methods = (method, *key), [method]
        makers = {m: functools.partial(make, m) for m in methods}
        group = self._group.get(key, lambda: InTurn(makers, self._s.repeats))
        return group.measure(method)


def _methods(s: Bench) -> list[str]:
    return [f"x{r}" for r in s.ratios] + [FULL, *s.against]


def _prefill_methods(s: Bench, length: int) -> list[str]:
    whole = {"gpu": True, "cpu": length <= LONGEST_ON_CPU}
    return _methods(s) + [FULL_LIBRARY] * whole.get(s.device.platform, False)


def prefill_cases(s: Bench) -> Iterator[Case]:
    """Yields every length with every ratio and in full.

    The smallest buffer is the first: the peak of a device's memory never goes down.
    """
    shared = _Shared(s)
    rows = [(n, m) for n in s.lengths for m in _prefill_methods(s, n)]
    # A group is held as long as it is asked for.
    order = lambda n, m: (n if s.against else 0, _slots(s, n, m))
    for length, method in sorted(rows, key=lambda row: order(*row)):
        key = s.key("prefill", method=method, length=length)
        yield Case(key, functools.partial(_prefill, s, shared, length, method))


def decode_cases(s: Bench) -> Iterator[Case]:
    """Yields, behind every length, every ratio and full, for every batch size."""
    shared = _Shared(s)
    rows = [(n, b, m) for n in s.lengths for m in _methods(s) for b in s.batches]
    order = lambda n, b, m: ((n, b) if s.against else (0, 0), b * _slots(s, n, m))
    for length, batch, method in sorted(rows, key=lambda row: order(*row)):
        key = s.key("decode", method=method, length=length, batch=batch)
        yield Case(key, functools.partial(_decode, s, shared, length, method, batch))


def _ratio(method: str) -> int:
    return int(method[1:]) if method.startswith("x") else 0


def _slots(s: Bench, length: int, method: str) -> int:
    return slots_after(s.config, length, _ratio(method))


def _room(s: Bench, length: int, method: str) -> int:
    """Returns the capacity of the buffer."""
    ratio, closed = _ratio(method), length // s.beacon.window + 1
    return capacity(s.config, [ratio] * closed) if ratio else length


def _prefill(s: Bench, shared: _Shared, length: int, method: str) -> Row:
    before = peak_bytes(s.device)
    make = functools.partial(_prefiller, s, shared, length)
    taken, program = shared.measure(method, make, _prefill_methods(s, length), length)
    spent = flops.prefill(s.config, length, _ratio(method)).total
    return timed(taken, program) | {
        "tokens_per_second": length / taken.median_s,
        "model_flops": spent,
        "tflops": spent / taken.median_s / 1e12,
        "formula_bytes": _prefill_bytes(s, length, method),
        "kv_bytes": _slots(s, length, method) * slot_nbytes(s.config, s.dtype),
        "peak_bytes": risen(s.device, before),
        **_named(method),
    }


def _named(method: str) -> Row:
    return {"library": library()} if method == TORCH else {}


def _prefill_bytes(s: Bench, length: int, method: str) -> int:
    step, law = _chunk(s, length, method), Law.of(s.config)
    if ratio := _ratio(method):
        step = int(law.entries(ratio, law.window))
    buffer = _room(s, length, method) * slot_nbytes(s.config, s.dtype)
    activations = activation_bytes(s.config, step, s.dtype)
    return weight_bytes(s.config, s.dtype) + buffer + activations


def _prefiller(s: Bench, shared: _Shared, length: int, method: str) -> Sampler:
    check_fits(s.device, _prefill_bytes(s, length, method))
    if method == TORCH:
        model, tokens = shared.torch, _tokens(s, length)
        return Sampler(_EAGER, lambda: seconds_of(lambda: model.first_token(tokens)))
    make = _compressed if _ratio(method) else _full
    program, fresh, run = make(s, shared.variables, length, method)

    def sample() -> float:
        empty = jax.block_until_ready(fresh())
        return seconds_of(lambda: run(empty))

    return Sampler(program, sample)


_EAGER = Compiled(None, 0.0, None)


def _tokens(s: Bench, length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, s.config.vocab_size, (1, length), dtype=np.int32)


Made = tuple[Compiled, Callable[[], Any], Callable[[Any], Any]]


def _compressed(s: Bench, variables, length: int, method: str) -> Made:
    """Makes what measures the prefill of a compressed text, in one scan over windows.

    Their number is a power of two, as in `feed`.

    Returns:
      The program, a function that makes an empty memory, and one that feeds it the text
      and returns the first token.
    """
    c, dtype = s.config, jnp.dtype(s.dtype).type
    windows = 1 << (-(-length // s.beacon.window) - 1).bit_length()
    size = s.beacon.window * windows
    ratio = _ratio(method)
    plan = jnp.full((1,), ratio, jnp.int32)
    fresh = functools.partial(init_memory, c, 1, _room(s, length, method), dtype)

    def feed(variables, memory, tokens, lengths):
        out, memory = feed_jit(
            Net(c, dtype),
            variables,
            memory,
            tokens,
            lengths,
            plan,
            None,
            static=(ratio,),
            outputs="last",
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


def _chunk(s: Bench, length: int, method: str) -> int:
    chunk = CHUNK.get(s.device.platform, 8192)
    return chunk if method == FULL and length % chunk == 0 else length


def _full(s: Bench, variables, length: int, method: str) -> Made:
    """Does as `_compressed`, with every entry kept."""
    c, dtype = dataclasses.replace(s.config, beacon=None), jnp.dtype(s.dtype)
    size = _chunk(s, length, method)
    name = FULL_LIBRARY if method == FULL_LIBRARY else None
    model = Decoder(Net(c, dtype, name), Layout(1, size, 0))
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
    """Makes the platform's causal attention an implementation of the op.

    It is for a text in one piece. Taking a layer out of the buffer is a copy of 2 N H
    bytes per token, nothing beside the 4 N H FLOPs per pair.
    """
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


def _decode(s: Bench, shared: _Shared, length: int, method: str, batch: int) -> Row:
    """Measures greedy tokens by the loop that `generate` runs, `BLOCK` per call."""
    before, ratio, window = peak_bytes(s.device), _ratio(method), s.beacon.window
    make = functools.partial(_decoder, s, shared, length, batch)
    taken, program = shared.measure(method, make, _methods(s), length, batch)
    entries = entries_after(s.config, length - length % window + window // 2, ratio)
    read = decode_bytes(s.config, batch, entries, ratio, s.dtype)
    return timed(taken, program) | {
        "tokens_per_second": batch / taken.median_s,
        "read_bytes": read,
        "gbs": read / taken.median_s / 1e9,
        "formula_bytes": _decode_needs(s, length, method, batch),
        "kv_bytes": batch * entries * slot_nbytes(s.config, s.dtype),
        "peak_bytes": risen(s.device, before),
        **_named(method),
    }


def _decode_room(s: Bench, length: int, method: str) -> int:
    """Counts slots for the text and a window more, or a block if that is longer."""
    window = s.beacon.window
    more = length + max(window, BLOCK)
    # In full also the open window's room, as `check_capacity` asks.
    return _room(s, more, method) if _ratio(method) else more + window


def _decode_needs(s: Bench, length: int, method: str, batch: int) -> int:
    memory = _decode_room(s, length, method) * slot_nbytes(s.config, s.dtype)
    return weight_bytes(s.config, s.dtype) + batch * memory


def places(window: int) -> dict[int, float]:
    """Chooses the blocks of a window that are measured.

    Returns:
      {raw tokens in front of a block: its share in the mean of the window}.
    """
    blocks = window // BLOCK
    if window % BLOCK or blocks < 2:
        return {0: 1.0}
    strata = min(STRATA, blocks - 1)
    share = (blocks - 1) / blocks / strata
    spread = [(2 * i + 1) * (blocks - 1) // (2 * strata) for i in range(strata)]
    return {BLOCK * i: share for i in spread} | {BLOCK * (blocks - 1): 1 / blocks}


def _decoder(
    s: Bench, shared: _Shared, length: int, batch: int, method: str
) -> Sampler:
    check_fits(s.device, _decode_needs(s, length, method, batch))
    if method == TORCH:
        return _torch_decoder(s, shared, length, batch)
    c, ratio, variables = s.config, _ratio(method), shared.variables
    window, closed = s.beacon.window, length // s.beacon.window
    memory = _filled(s, length, ratio, batch, _decode_room(s, length, method))
    program, run = _block(s, variables, memory, ratio, closed + BLOCK // window + 2)
    start = dataclasses.replace(memory, k=None, v=None)  # copied: they get donated
    start = jax.tree.map(np.asarray, start)
    state = [memory.k, memory.v, jnp.zeros((batch, c.vocab_size), jnp.float32)]
    del memory

    def sample() -> float:
        mean = 0.0
        for raw, share in places(window).items():
            k, v, logits = state
            raws = np.full_like(start.raw, raw)
            there = jax.tree.map(jnp.asarray, start.replace(raw=raws))
            there = jax.block_until_ready(there.replace(k=k, v=v))
            begun = time.perf_counter()
            loop, after = jax.block_until_ready(run(there, logits))
            mean += share * (time.perf_counter() - begun) / BLOCK
            state[:] = after.k, after.v, loop.logits
        return mean

    return Sampler(program, sample)


def _torch_decoder(s: Bench, shared: _Shared, length: int, batch: int) -> Sampler:
    """Makes the sampler of torch, in the middle of the window."""
    window, model = s.beacon.window, shared.torch
    middle = length - length % window + max((window - BLOCK) // 2, 0)
    cache = model.cache(batch, middle)
    decode = lambda: model.decode(cache, batch, BLOCK)
    return Sampler(_EAGER, lambda: seconds_of(decode) / BLOCK)


def _block(
    s: Bench, variables: Any, memory: MemoryState, ratio: int, windows: int
) -> tuple[Compiled, Callable[..., Any]]:
    """Makes the program of a block, and (memory, logits) -> (loop, memory)."""
    c, batch = s.config, memory.rows
    plan = jnp.full((windows,), ratio, jnp.int32)
    sampling, rows = make_sampling().for_rows(batch), jnp.ones((batch,), bool)
    limits = jnp.full((batch,), 2**30, jnp.int32)  # every row goes on

    def block(variables, memory, logits):
        _, loop, memory = decode_block(
            Net.of(c, variables),
            variables,
            memory,
            Loop(logits, rows, None),
            plan,
            Rows(sampling, row_seeds(0, batch), limits),
            eos_ids=(-1,),  # never drawn
            static=(ratio,),
        )
        return loop, memory

    logits = jax.ShapeDtypeStruct((batch, c.vocab_size), jnp.float32)
    program = compile_program(block, variables, memory, logits, donate=[1])
    return program, lambda memory, logits: program.run(variables, memory, logits)


def _filled(s: Bench, length: int, ratio: int, batch: int, room: int) -> MemoryState:
    """Makes a memory as `length` tokens would leave it, with random content."""
    c, dtype, window = s.config, jnp.dtype(s.dtype), s.beacon.window
    empty = init_memory(c, batch, 1, dtype)
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
