"""The decode kernels against a float64 loop over the definition, interpreted."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.attention import prefix_attention
from beacon_jax.attention.decode import combine, cpu_block, decode_xla
from beacon_jax.attention.decode_gpu import decode_gpu, make_schedule, visited_blocks
from beacon_jax.attention.decode_mosaic_gpu import decode_mosaic_gpu
from beacon_jax.attention.decode_tpu import decode_tpu
from beacon_jax.attention.gpu_blocks import Block, GpuBlocks
from beacon_jax.attention.mean import mean_term
from beacon_jax.attention.mosaic_chip import Plain
from beacon_jax.attention.pallas_tpu import pallas_tpu
from beacon_jax.attention.reference import reference
from beacon_jax.attention.tpu_blocks import TpuBlocks

SMALL = TpuBlocks(256, 128, 2**24)  # slots in blocks of 128: three of them here
KERNELS = {
    "decode_gpu": functools.partial(decode_gpu, splits=3, keys=32, interpret=True),
    "decode_mosaic_gpu": functools.partial(
        decode_mosaic_gpu,
        splits=3,
        blocks=GpuBlocks(*[Block(16, 32, 4, 2)] * 3),
        chip=Plain,
        interpret=True,
    ),
    "decode_tpu": functools.partial(decode_tpu, blocks=SMALL, interpret=True),
}
INT8 = {
    "decode_gpu": KERNELS["decode_gpu"],
    "pallas_tpu": functools.partial(pallas_tpu, blocks=SMALL, interpret=True),
    "decode_xla": functools.partial(decode_xla, block=128),
}
each = pytest.mark.parametrize("name", KERNELS)
SLOTS = 300


class Case(NamedTuple):
    """T, N, K, H as in the docstring of `prefix_attention`; prefix per row.

    bias: slots have one.
    """

    t: int
    n: int
    k: int
    h: int
    prefix: tuple[int, ...]
    queries: tuple[int, ...] | None = None
    bias: bool = False


CASES = {
    "mha-1": Case(1, 2, 2, 128, (0, 299)),
    "gqa-5": Case(5, 14, 2, 64, (0, 295, 130), (5, 3, 0)),
    "mqa-2": Case(2, 4, 1, 80, (127, 200)),
    "mha-64": Case(64, 2, 2, 16, (236, 3)),
}
CASES |= {f"{name}-bias": case._replace(bias=True) for name, case in CASES.items()}


def arrays(case: Case, dtype: Any = jnp.float32):
    """q, k, v, and [B, S, 1, 1] which slots are dead."""
    rows = len(case.prefix)
    shapes = [(rows, case.t, case.n, case.h)] + [(rows, SLOTS, case.k, case.h)] * 2
    keys = jax.random.split(jax.random.key(0), 3)
    pairs = zip(keys, shapes, strict=True)
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in pairs)
    end = np.asarray(case.prefix)[:, None] + case.t
    return q, k, v, (np.arange(SLOTS) >= end)[..., None, None]


def bias_of(case: Case, dead: Any = None):
    """None, or [B, K, S], where every fifth slot counts for nothing, NaN where dead."""
    if not case.bias:
        return None
    bias = 3 * jax.random.normal(jax.random.key(7), (len(case.prefix), case.k, SLOTS))
    bias = jnp.where(jnp.arange(SLOTS) % 5 == 4, -100, bias)
    return bias if dead is None else jnp.where(dead[:, None, :, 0, 0], jnp.nan, bias)


def quantised(x):
    """int8 [.., S, K, H] and its scales [.., K, S]."""
    scale = jnp.abs(x).max(-1) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), jnp.swapaxes(scale, -1, -2)


def dequantised(x, scale):
    return np.asarray(x, np.float64) * np.swapaxes(scale, -1, -2)[..., None]


def spelled_out(case: Case, q, k, v):
    """The definition, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    bias = bias_of(case) if case.bias else np.zeros((len(q), case.k, SLOTS))
    bias = np.asarray(bias, np.float64)
    for row, prefix in enumerate(case.prefix):
        for i in range(case.queries[row] if case.queries else case.t):
            for head in range(case.n):
                at = (row, slice(prefix + i + 1), head * case.k // case.n)
                score = case.h**-0.5 * k[at] @ q[row, i, head]
                score += bias[row, head * case.k // case.n, at[1]]
                p = np.exp(score - score.max())
                out[row, i, head] = p @ v[at] / p.sum()
    return out


def options(case: Case) -> dict[str, Any]:
    queries = None if case.queries is None else jnp.asarray(case.queries)
    return {"scale": case.h**-0.5, "queries": queries}


@functools.cache
def compiled(attend, case: Case):
    run = functools.partial(attend, **options(case))
    prefix = jnp.asarray(case.prefix)
    return jax.jit(lambda q, k, v, **more: run(q, k, v, prefix, **more))


def gap(ours, theirs):
    """Largest error as a share of the largest value."""
    ours = np.asarray(ours, np.float64)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@each
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_a_float64_loop(name, case):
    """With NaN in every dead slot."""
    case = CASES[case]
    q, k, v, dead = arrays(case)
    poisoned = (jnp.where(dead, jnp.nan, x) for x in (k, v))
    ours = compiled(KERNELS[name], case)(q, *poisoned, bias=bias_of(case, dead))
    assert gap(ours, spelled_out(case, q, k, v)) <= 5e-6


@each
@pytest.mark.parametrize("case", ["gqa-5", "gqa-5-bias"])
def test_bfloat16_errs_at_most_twice_as_much_as_naive_bfloat16(name, case):
    case = CASES[case]._replace(queries=None)
    q, k, v, _ = arrays(case, jnp.bfloat16)
    seen = np.asarray(case.prefix)[:, None] + np.arange(case.t)
    seen = np.arange(SLOTS) <= seen[..., None]
    keys, values = (jnp.repeat(x, case.n // case.k, axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, keys) * jnp.bfloat16(case.h**-0.5)
    if case.bias:
        bias = jnp.repeat(bias_of(case), case.n // case.k, axis=1)[:, :, None]
        scores = (scores + bias).astype(scores.dtype)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), -1)
    naive = jnp.einsum("BNTS,BSNH->BTNH", weights, values)
    exact = spelled_out(case, q, k, v)
    ours = compiled(KERNELS[name], case)(q, k, v, bias=bias_of(case))
    assert gap(ours, exact) <= 2 * gap(naive, exact)


@pytest.mark.parametrize("case", ["gqa-5", "gqa-5-bias"])
@pytest.mark.parametrize("name", INT8)
def test_an_int8_memory_is_its_dequantised_numbers(name, case):
    """With NaN for the scales of dead slots."""
    case = CASES[case]
    q, k, v, dead = arrays(case)
    (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
    exact = spelled_out(case, q, dequantised(k, k_scale), dequantised(v, v_scale))
    gone = np.swapaxes(dead[..., 0], 1, 2)
    k_scale, v_scale = (jnp.where(gone, jnp.nan, x) for x in (k_scale, v_scale))
    more = {"k_scale": k_scale, "v_scale": v_scale, "bias": bias_of(case, dead)}
    ours = compiled(INT8[name], case)(q, k, v, **more)
    assert gap(ours, exact) <= 5e-6


def frequencies(h):
    return (10000.0 ** -(np.arange(h // 2) / (h // 2))).astype(np.float32)


def rotated(mean, h):
    """[B, S, K, H] float64: the mean [B, K, H] rotated by each slot's position."""
    angle = np.arange(SLOTS)[:, None, None] * np.float64(frequencies(h))
    x1, x2 = np.split(np.asarray(mean, np.float64)[:, None], 2, -1)
    turned = (
        (x1 * np.cos(angle) - x2 * np.sin(angle)),
        (x2 * np.cos(angle) + x1 * np.sin(angle)),
    )
    return np.concatenate(turned, -1)


class TestKeysWithoutTheirMean:
    """`k_mean` of the api, `mean` of the implementations."""

    def run(self, name, case, size, dtype: Any = jnp.float32):
        """(result, float64 result): with NaN for the scales of dead slots."""
        q, k, v, dead = arrays(case)
        q = q.astype(dtype)
        shape = (len(case.prefix), case.k, case.h)
        k_mean = size * jax.random.normal(jax.random.key(5), shape)
        (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
        keys = dequantised(k, k_scale) + rotated(k_mean, case.h)
        exact = spelled_out(case, q, keys, dequantised(v, v_scale))
        gone = np.swapaxes(dead[..., 0], 1, 2)
        scales = (jnp.where(gone, jnp.nan, x) for x in (k_scale, v_scale))
        scales = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        scales["bias"] = bias_of(case, dead)

        def attend(q, k, v, k_mean, scales):
            mean = mean_term(q, k_mean, frequencies(case.h))
            call = functools.partial(INT8[name], **options(case), **scales)
            return call(q, k, v, jnp.asarray(case.prefix), mean=mean)

        return jax.jit(attend)(q, k, v, k_mean, scales), exact

    @pytest.mark.parametrize("case", ["mha-1", "gqa-5", "mqa-2", "gqa-5-bias"])
    @pytest.mark.parametrize("name", INT8)
    def test_the_scores_have_it_back(self, name, case):
        assert gap(*self.run(name, CASES[case], size=1)) <= 5e-6

    @pytest.mark.parametrize("name", INT8)
    def test_a_hundredfold_mean_costs_bfloat16_queries_nothing(self, name):
        """Errors with the mean stay those of bfloat16 weights and results, 2**-8; a
        bfloat16 table would err by 0.1 and more in scores that are 1000 here."""
        ours, exact = self.run(name, CASES["gqa-5"], 100, jnp.bfloat16)
        assert gap(ours, exact) <= 2**-8

    @pytest.mark.parametrize("case", ["mqa-2", "mqa-2-bias"])
    def test_one_layer_of_a_stack_is_that_layers_mean(self, case):
        case = CASES[case]
        q, k, v, dead = arrays(case)
        (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
        k_mean = jax.random.normal(jax.random.key(5), (2, case.k, case.h))
        exact = spelled_out(
            case,
            q,
            dequantised(k, k_scale) + rotated(k_mean, case.h),
            dequantised(v, v_scale),
        )
        stacked = {"k_scale": k_scale, "v_scale": v_scale, "k_mean": k_mean}
        if case.bias:
            stacked["bias"] = bias_of(case, dead)
        stacked = {name: jnp.stack([x * jnp.nan, x]) for name, x in stacked.items()}
        ours = prefix_attention(
            q,
            jnp.stack([k, k]),
            jnp.stack([v, v]),
            jnp.asarray(case.prefix),
            layer=1,
            frequencies=frequencies(case.h),
            **stacked,
        )
        assert gap(ours, exact) <= 5e-6

    def test_it_needs_scales_frequencies_and_fitting_shapes(self):
        case = CASES["mqa-2"]
        q, keys, values, _ = arrays(case)
        (k, k_scale), (v, v_scale) = quantised(keys), quantised(values)
        k_mean, prefix = jnp.zeros((2, case.k, case.h)), jnp.asarray(case.prefix)
        int8 = {"k_scale": k_scale, "v_scale": v_scale}
        with pytest.raises(ValueError, match="frequencies=None"):
            prefix_attention(q, k, v, prefix, k_mean=k_mean, **int8)
        some = {"k_mean": k_mean, "frequencies": frequencies(case.h)}
        with pytest.raises(ValueError, match="k_scale=None"):
            prefix_attention(q, keys, values, prefix, **some)
        some["frequencies"] = frequencies(case.h)[1:]
        with pytest.raises(ValueError, match=r"frequencies \(39,\)"):
            prefix_attention(q, k, v, prefix, **int8, **some)


@each
def test_two_runs_are_bit_equal_and_invalid_queries_give_0(name):
    case = CASES["gqa-5"]
    q, k, v, _ = arrays(case)
    run = compiled(KERNELS[name], case)
    ours = run(q, k, v)
    np.testing.assert_array_equal(ours, run(q, k, v))
    assert not ours[1, 3:].any() and not ours[2].any() and ours[1, 2].all()


@each
@pytest.mark.parametrize("case", ["mqa-2", "mqa-2-bias"])
def test_a_stacked_buffer_with_a_layer_is_that_layers_buffer(name, case):
    case = CASES[case]
    q, k, v, dead = arrays(case)
    stack = lambda x: jnp.stack([jnp.full_like(x, jnp.nan), jnp.where(dead, 0, x)])
    more = {"layer": jnp.int32(1)}
    if case.bias:
        bias = bias_of(case, dead)
        more["bias"] = jnp.stack([bias * jnp.nan, bias])
    ours = compiled(KERNELS[name], case)(q, stack(k), stack(v), **more)
    assert gap(ours, spelled_out(case, q, k, v)) <= 5e-6


@pytest.mark.parametrize("case", ["gqa-5", "gqa-5-bias"])
@pytest.mark.parametrize("attend", [decode_gpu, decode_tpu])
def test_elsewhere_it_runs_in_xla_and_has_a_gradient(attend, case):
    case = CASES[case]
    q, k, v, _ = arrays(case)
    prefix, weight = (
        jnp.asarray(case.prefix),
        jax.random.normal(jax.random.key(9), q.shape),
    )

    def loss(attend, *x):
        out = attend(*x, prefix, bias=bias_of(case), **options(case))
        return (out * weight).sum()

    with jax.default_matmul_precision("highest"):
        derived = lambda f: jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))
        ours, theirs = derived(attend)(q, k, v), derived(reference)(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a, np.asarray(b, np.float64)) <= 5e-6


WIDE = Case(1, 32, 32, 128, (0, 299))  # two blocks by `cpu_block`


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", [CASES["mqa-2"], WIDE], ids=["mqa-2", "wide"])
def test_int8_without_a_kernel_is_chosen_on_cpu_and_refuses_a_gradient(case, bias):
    case = case._replace(bias=bias)
    q, k, v, _ = arrays(case)
    prefix = jnp.asarray(case.prefix)
    (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
    more = {"k_scale": k_scale, "v_scale": v_scale, "bias": bias_of(case)}
    attend = lambda q: prefix_attention(q, k, v, prefix, **more)
    exact = spelled_out(case, q, dequantised(k, k_scale), dequantised(v, v_scale))
    assert gap(attend(q), exact) <= 5e-6
    with pytest.raises(NotImplementedError, match="k_scale"):
        jax.grad(lambda q: attend(q).sum())(q)


@pytest.mark.parametrize(
    ("rows", "heads", "width", "slots"),
    [(2, 32, 128, 256), (8, 32, 128, 64), (64, 32, 128, 64), (8, 2, 64, 512)],
)
def test_a_block_on_a_cpu_is_8_mib_of_floats_from_64_to_512_slots(
    rows, heads, width, slots
):
    k = jax.ShapeDtypeStruct((3, rows, 16384, heads, width), jnp.int8)
    assert cpu_block(k, jnp.float32) == slots


def test_what_is_not_taken_names_itself():
    q, k, v, _ = arrays(CASES["mha-64"])
    prefix, wide = jnp.zeros(2, jnp.int32), jnp.zeros((2, 129, 2, 16))
    run = lambda attend, *x, **more: attend(*x, prefix, scale=0.25, **more)
    with pytest.raises(NotImplementedError, match="129 queries"):
        run(decode_gpu, wide, k, v)
    with pytest.raises(NotImplementedError, match="512 rows"):
        run(decode_tpu, wide, k, v)
    with pytest.raises(NotImplementedError, match="3 heads"):
        run(
            decode_tpu,
            q[:, :1, :1].repeat(3, 2),
            *(x[:, :, :1].repeat(3, 2) for x in (k, v)),
        )
    odd = jnp.zeros((2, 1, 8, 384), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bias: 85 slots of 8 heads"):
        run(decode_tpu, odd, odd, odd, bias=jnp.zeros((2, 8, 1)))
    for attend in (decode_gpu, decode_tpu):
        with pytest.raises(NotImplementedError, match="bfloat16"):
            run(attend, q, k, v.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="scale=0"):
        decode_gpu(q, k, v, prefix, scale=0.0)
    (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
    with pytest.raises(ValueError, match="k_scale=None"):
        run(decode_gpu, q, k, v)
    with pytest.raises(ValueError, match="v_scale has shape"):
        run(decode_xla, q, k, v, k_scale=k_scale, v_scale=v_scale[:, :1])


def test_parts_combine_to_the_whole_and_empty_ones_do_not_count():
    s = np.random.default_rng(0).normal(size=(2, 30))
    v = np.random.default_rng(1).normal(size=(30, 4))
    whole = np.exp(s) @ v / np.exp(s).sum(-1, keepdims=True)
    cuts = [slice(0, 7), slice(7, 30)]
    parts = [np.exp(s[:, c]) @ v[c] / np.exp(s[:, c]).sum(-1)[:, None] for c in cuts]
    lse = [np.log(np.exp(s[:, c]).sum(-1)) for c in cuts]
    parts, lse = [*parts, np.full((2, 4), np.nan)], [*lse, np.full(2, -np.inf)]
    ours = combine(jnp.asarray(np.stack(parts)), jnp.asarray(np.stack(lse)))
    np.testing.assert_allclose(ours, whole, rtol=1e-6)
    assert not combine(jnp.full((3, 2, 4), jnp.nan), jnp.full((3, 2), -jnp.inf)).any()


@pytest.mark.parametrize("t, group", [(1, 1), (1, 7), (20, 7)])
def test_a_row_costs_its_own_live_blocks_whatever_the_capacity(t, group):
    """Every block with a visible slot once per block of queries, and no other."""
    prefix = np.asarray([0, 5, 1000, 16384 - t])
    counts = []
    for slots in (16384, 2**20):
        q = jax.ShapeDtypeStruct((4, t, 4 * group, 128), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((4, slots, 4, 128), jnp.bfloat16)
        schedule = make_schedule(q, k, 1.0)
        counts.append(visited_blocks(schedule, prefix, np.full(4, t), t))
        last = [min((i + 1) * schedule.rows, t * group) - 1 for i in range(100)]
        last = [r // group for i, r in enumerate(last) if i * schedule.rows < t * group]
        expected = sum((prefix + i) // schedule.keys + 1 for i in last)
        np.testing.assert_array_equal(counts[-1], expected)
    np.testing.assert_array_equal(*counts)
    assert counts[0][0] * 100 < counts[0][-1]
    assert not visited_blocks(schedule, prefix, np.zeros(4, int), t).any()
