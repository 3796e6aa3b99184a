"""Every implementation of `prefix_attention` against one set of claims.

Kernels run interpreted, at blocks far smaller than a chip's, so that a few keys are
many blocks.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from beacon_jax.attention.blockwise import blockwise
from beacon_jax.attention.blockwise_cpu import blockwise_cpu
from beacon_jax.attention.decode_gpu import decode_gpu
from beacon_jax.attention.decode_mosaic_gpu import decode_mosaic_gpu
from beacon_jax.attention.decode_tpu import decode_tpu
from beacon_jax.attention.gpu_blocks import Block, GpuBlocks
from beacon_jax.attention.library import cudnn, tokamax
from beacon_jax.attention.mosaic_chip import Plain
from beacon_jax.attention.mosaic_gpu import mosaic_gpu
from beacon_jax.attention.pallas_gpu import pallas_gpu
from beacon_jax.attention.pallas_tpu import pallas_tpu
from beacon_jax.attention.reference import reference
from beacon_jax.attention.tpu_blocks import TpuBlocks

SMALL = GpuBlocks(Block(32, 16, 4, 1), Block(16, 32, 4, 1), Block(16, 16, 4, 1))
# Mosaic wants at least a block of slots, and the smallest case has 19.
FEW_KEYS = SMALL._replace(d_q=Block(16, 16, 4, 2))
IMPLEMENTATIONS = {
    "reference": reference,
    "blockwise": functools.partial(blockwise, block=16),
    # In tiles of 16 queries, and as one matrix where queries are few.
    "blockwise_cpu": functools.partial(blockwise_cpu, rows=16, block=16, few=16),
    # What cuDNN is given, computed by XLA: it needs a GPU.
    "cudnn": functools.partial(cudnn, backend="xla"),
    "pallas_gpu": functools.partial(pallas_gpu, blocks=SMALL, interpret=True),
    "mosaic_gpu": functools.partial(
        mosaic_gpu, blocks=FEW_KEYS, chip=Plain, interpret=True
    ),
    "pallas_tpu": functools.partial(
        pallas_tpu, blocks=TpuBlocks(64, 256, 2**24), interpret=True
    ),
}
if importlib.util.find_spec("tokamax"):
    # Its masks and gradients, computed by XLA: the kernel needs a Hopper GPU.
    IMPLEMENTATIONS["tokamax"] = functools.partial(tokamax, backend="xla")
# For a few queries; their gradients are those of the kernels above.
DECODERS = {
    "decode_gpu": functools.partial(decode_gpu, splits=3, keys=16, interpret=True),
    "decode_mosaic_gpu": functools.partial(
        decode_mosaic_gpu, splits=3, blocks=FEW_KEYS, chip=Plain, interpret=True
    ),
    "decode_tpu": functools.partial(
        decode_tpu, blocks=TpuBlocks(64, 256, 2**24), interpret=True
    ),
}
WITHOUT_BIAS = ("cudnn", "tokamax")
IN_XLA = ("reference", "blockwise", "blockwise_cpu")
# Every implementation without a bias and, where it takes one, with it (`slow`).
each = pytest.mark.parametrize(
    ("name", "bias"),
    [(name, "") for name in IMPLEMENTATIONS]
    + [
        pytest.param(name, "-bias", marks=pytest.mark.slow)
        for name in IMPLEMENTATIONS
        if name not in WITHOUT_BIAS
    ],
)


class Case(NamedTuple):
    """T, S, N, K, H as in the docstring of `prefix_attention`; prefix per row.

    bias: slots have one.
    """

    t: int
    s: int
    n: int
    k: int
    h: int
    prefix: tuple[int, ...]
    queries: tuple[int, ...] | None = None
    bias: bool = False


# Rows end anywhere between an empty memory and a full buffer, S - T.
CASES = {
    "mha": Case(20, 61, 2, 2, 64, (0, 41)),
    "gqa": Case(20, 61, 4, 2, 80, (13, 41, 0)),
    "mqa": Case(33, 77, 3, 1, 96, (44, 3)),
    "whole-blocks": Case(32, 64, 4, 2, 128, (16, 32)),
    "wide": Case(5, 19, 2, 1, 256, (7, 14)),
    "one-query": Case(1, 50, 4, 2, 16, (0, 49)),
    "ragged": Case(20, 61, 4, 2, 16, (41, 13, 20), (3, 20, 17)),
}
CASES |= {f"{name}-bias": case._replace(bias=True) for name, case in CASES.items()}
FEW = ("one-query", "wide", "ragged")
# The other cases are `slow`.
CORE = ("gqa", "ragged", "one-query", "ragged-bias", "one-query-bias")
# Of those that jax interprets step by step, 3 s a case, still fewer are fast.
STEPWISE, FEWER = ("mosaic_gpu", "decode_mosaic_gpu"), ("gqa", "ragged-bias")


def each_on(*cases):
    """Every implementation on these cases, decoders where queries are few."""
    few = [case for case in cases if case.removesuffix("-bias") in FEW]
    pairs = [(name, case) for name in IMPLEMENTATIONS for case in cases]
    pairs += [(name, case) for name in DECODERS for case in few]
    takes = lambda name, case: not (CASES[case].bias and name in WITHOUT_BIAS)
    pairs = [pair for pair in pairs if takes(*pair)]
    core = lambda name, case: case in (FEWER if name in STEPWISE else CORE)
    mark = lambda *pair: [] if core(*pair) else pytest.mark.slow
    params = [pytest.param(*pair, marks=mark(*pair)) for pair in pairs]
    return pytest.mark.parametrize(("name", "case"), params)


def arrays(case: Case, dtype: Any = jnp.float32):
    """q, k, v, the cotangent of the result, and [B, S, 1, 1] which slots are dead."""
    rows = len(case.prefix)
    shapes = [(rows, case.t, case.n, case.h)] + [(rows, case.s, case.k, case.h)] * 2
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = zip(keys, [*shapes, shapes[0]], strict=True)
    q, k, v, d_out = (jax.random.normal(key, shape, dtype) for key, shape in pairs)
    end = np.asarray(case.prefix)[:, None] + case.t
    return q, k, v, d_out, (np.arange(case.s) >= end)[..., None, None]


def bias_of(case: Case, dead: Any = None):
    """None, or [B, K, S], where every fifth slot counts for nothing, NaN where dead."""
    if not case.bias:
        return None
    shape = (len(case.prefix), case.k, case.s)
    bias = 3 * jax.random.normal(jax.random.key(7), shape)
    bias = jnp.where(jnp.arange(case.s) % 5 == 4, -100, bias)
    return bias if dead is None else jnp.where(dead[:, None, :, 0, 0], jnp.nan, bias)


def options(case: Case) -> dict[str, Any]:
    queries = None if case.queries is None else jnp.asarray(case.queries)
    return {"scale": case.h**-0.5, "queries": queries}


def both(name, q, k, v, prefix, d_out, bias=None, **options):
    """The result and (d_q, d_k, d_v)."""
    attend = functools.partial((IMPLEMENTATIONS | DECODERS)[name], **options)
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(lambda *x: attend(*x, prefix, bias=bias), q, k, v)
        return out, pull(d_out)


@functools.cache
def compiled(name: str, case: Case):
    return jax.jit(functools.partial(both, name, **options(case)))


@functools.cache
def run(name: str, case: Case, dtype: Any = "float32", times=1):
    """`both`, with NaN in every dead slot."""
    del times
    q, k, v, d_out, dead = arrays(case, dtype)
    k, v = (jnp.where(dead, jnp.nan, x) for x in (k, v))
    given = q, k, v, jnp.asarray(case.prefix), d_out, bias_of(case, dead)
    return compiled(name, case)(*given)


@functools.cache
def spelled_out(case: Case, dtype: Any = "float32"):
    """The definition and its derivative, one query at a time, in float64."""
    q, k, v, d_out, _ = (np.asarray(x, np.float64) for x in arrays(case, dtype))
    group, scale = case.n // case.k, case.h**-0.5
    bias = np.zeros((len(case.prefix), case.k, case.s))
    if case.bias:
        bias = np.asarray(bias_of(case), np.float64)
    out, d_q, d_k, d_v = (np.zeros(x.shape) for x in (q, q, k, v))
    for row, prefix in enumerate(case.prefix):
        for i in range(case.queries[row] if case.queries else case.t):
            for head in range(case.n):
                at, seen = (row, i, head), (row, slice(prefix + i + 1), head // group)
                score = scale * k[seen] @ q[at]
                score += bias[row, head // group, : prefix + i + 1]
                p = np.exp(score - score.max())
                p /= p.sum()
                out[at] = p @ v[seen]
                d_score = p * (v[seen] @ d_out[at] - d_out[at] @ out[at]) * scale
                d_q[at] = d_score @ k[seen]
                d_k[seen] += d_score[:, None] * q[at]
                d_v[seen] += p[:, None] * d_out[at]
    return out, (d_q, d_k, d_v)


def errors(ours, theirs) -> list[float]:
    """Of the result and its gradients, as shares of the largest value.

    inf where something is NaN, which `max` would pass over.
    """
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    gap = lambda a, b: np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
    gaps = [gap(a, np.asarray(b, np.float64)) for a, b in pairs]
    return [np.inf if np.isnan(gap) else float(gap) for gap in gaps]


class TestPrefixAttention:
    @each_on(*CASES)
    def test_values_and_gradients_are_those_of_a_float64_loop(self, name, case):
        ours = errors(run(name, CASES[case]), spelled_out(CASES[case]))
        assert max(ours) <= 5e-6, ours

    @each_on("gqa", "whole-blocks", "ragged", "ragged-bias")
    def test_bfloat16_errs_at_most_twice_as_much_as_naive_bfloat16(self, name, case):
        exact = spelled_out(CASES[case], "bfloat16")
        ours = errors(run(name, CASES[case], "bfloat16"), exact)
        for error, allowed in zip(ours, errors(naive(CASES[case]), exact), strict=True):
            assert error <= 2 * allowed, (ours, allowed)

    @each_on(*CASES)
    def test_gradients_of_dead_slots_are_exactly_0(self, name, case):
        *_, dead = arrays(CASES[case])
        for gradient in run(name, CASES[case])[1][1:]:
            assert not np.where(dead, gradient, 0).any()

    @each
    def test_invalid_queries_give_0_and_are_not_used(self, name, bias):
        """NaN stands in their rows; in XLA 7, for their gradient is 0 times them."""
        anything = 7.0 if name in IN_XLA else jnp.nan
        case = CASES["ragged" + bias]
        q, k, v, d_out, dead = arrays(case)
        valid = jnp.arange(case.t) < jnp.asarray(case.queries)[:, None]
        valid = valid[..., None, None]
        poisoned = jnp.where(valid, q, anything), k, v, jnp.asarray(case.prefix)
        d_out = jnp.where(valid, d_out, 7.0)
        ours = compiled(name, case)(*poisoned, d_out, bias_of(case, dead))
        assert not np.where(valid, 0, ours[0]).any()
        assert max(errors(ours, spelled_out(case))) <= 5e-6

    @pytest.mark.slow
    @pytest.mark.parametrize("name", sorted({*IMPLEMENTATIONS} - {*WITHOUT_BIAS}))
    def test_a_bias_that_all_slots_share_changes_nothing(self, name):
        """Not even where e ** 96 overflows; scores near 96 are rounded to 2 ** -18."""
        case = CASES["ragged"]
        q, k, v, d_out, dead = arrays(case)
        bias = jnp.full((len(case.prefix), case.k, case.s), 96.0)
        bias = jnp.where(dead[:, None, :, 0, 0], jnp.nan, bias)
        given = q, k, v, jnp.asarray(case.prefix), d_out, bias
        assert max(errors(compiled(name, case)(*given), spelled_out(case))) <= 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", sorted({*IMPLEMENTATIONS, *DECODERS} - {*WITHOUT_BIAS})
    )
    def test_a_bias_has_no_gradient(self, name):
        case = CASES["one-query-bias"]
        q, k, v, d_out, _ = arrays(case)
        attend = (IMPLEMENTATIONS | DECODERS)[name]
        given = q, k, v, jnp.asarray(case.prefix)
        out = lambda bias: attend(*given, bias=bias, **options(case))
        derived = jax.grad(lambda bias: (out(bias) * d_out).sum())
        assert not derived(bias_of(case)).any()

    @each
    def test_two_runs_are_bit_equal(self, name, bias):
        case = CASES["gqa" + bias]
        again = run(name, case, times=2)
        jax.tree.map(np.testing.assert_array_equal, run(name, case), again)

    @each
    def test_a_stacked_buffer_with_a_layer_is_that_layers_buffer(self, name, bias):
        case = CASES["gqa" + bias]
        q, k, v, d_out, dead = arrays(case)
        stack = lambda x: jnp.stack([jnp.full_like(x, jnp.nan), jnp.where(dead, 0, x)])
        one = functools.partial(both, name, **options(case))
        layered = jax.jit(lambda *x, layer: one(*x, layer=layer))
        prefix = jnp.asarray(case.prefix)
        given = [q, stack(k), stack(v), prefix, d_out]
        if case.bias:
            some = bias_of(case, dead)
            given.append(jnp.stack([some * jnp.nan, some]))
        out, (d_q, d_k, d_v) = layered(*given, layer=1)
        assert not d_k[0].any() and not d_v[0].any()
        ours = out, (d_q, d_k[1], d_v[1])
        assert max(errors(ours, run(name, case))) <= 1e-6

    @each
    def test_vmap_is_a_loop_over_calls(self, name, bias):
        case = CASES["gqa" + bias]
        q, k, v, d_out, _ = arrays(case)
        prefixes = case.prefix, case.prefix[::-1]
        one = functools.partial(both, name, bias=bias_of(case), **options(case))
        mapped = jax.jit(jax.vmap(one, (0, None, None, 0, None)))
        ours = mapped(jnp.stack([q, q]), k, v, jnp.asarray(prefixes), d_out)
        for i, prefix in enumerate(prefixes):
            expected = spelled_out(case._replace(prefix=prefix))
            row = jax.tree.map(lambda x: x[i], ours)  # noqa: B023
            assert max(errors(row, expected)) <= 5e-6

    @each
    def test_eight_devices_share_rows_and_heads(self, name, bias):
        case = Case(20, 40, 8, 4, 16, (0, 20), bias=bool(bias))
        q, k, v, d_out, dead = arrays(case)
        kinds = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((2, 4), ("rows", "heads"), axis_types=kinds)
        split, row = P("rows", None, "heads"), P("rows")
        shared = jax.shard_map(
            functools.partial(both, name, **options(case)),
            mesh=mesh,
            in_specs=(split, split, split, row, split, P("rows", "heads")),
            out_specs=(split, (split, split, split)),
            check_vma=False,
        )
        given = q, k, v, jnp.asarray(case.prefix), d_out, bias_of(case, dead)
        ours = jax.jit(shared)(*given)
        assert max(errors(ours, spelled_out(case))) <= 5e-6


@functools.cache
def naive(case: Case):
    """Textbook attention and its gradient where every number is bfloat16."""
    q, k, v, d_out, _ = arrays(case, jnp.bfloat16)
    visible = np.asarray(case.prefix)[:, None] + np.arange(case.t)
    visible = np.arange(case.s) <= visible[..., None]
    valid = np.arange(case.t) < np.asarray(case.queries or (case.t,))[..., None]
    bias = 0.0
    if case.bias:
        bias = jnp.repeat(bias_of(case), case.n // case.k, axis=1)[:, :, None]

    def attend(q, k, v):
        k, v = (jnp.repeat(x, case.n // case.k, axis=2) for x in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * jnp.bfloat16(case.h**-0.5)
        scores = (scores + bias).astype(scores.dtype)
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), -1)
        out = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
        return jnp.where(valid[..., None, None], out, 0)

    @jax.jit
    def derived(*x):
        out, pull = jax.vjp(attend, *x)
        return out, pull(d_out)

    return derived(q, k, v)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_cpu_decodes_narrow_and_wide_slots_in_its_own_blocks(heads, bias):
    # 128 and 256 numbers per slot are one matrix, 512 are not; blocks of 512 of 700
    # slots.
    case = Case(2, 700, 4, heads, 128, (0, 698, 300), bias=bias)
    q, k, v, _, dead = arrays(case)
    k, v = (jnp.where(dead, jnp.nan, x) for x in (k, v))
    given = {"scale": 128**-0.5, "bias": bias_of(case, dead)}
    found = blockwise_cpu(q, k, v, jnp.asarray(case.prefix), **given)
    np.testing.assert_allclose(found, spelled_out(case)[0], atol=5e-6)
