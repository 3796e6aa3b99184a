"""Mosaic kernels as a Hopper GPU would run them, and which GPUs they are for.

`test_prefix_attention` has their mathematics. Here the interpreter copies tiles behind
barriers and multiplies them by wgmma, in blocks of the sizes that the chip wants.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.experimental.pallas import mosaic_gpu as plgpu

from beacon_jax.attention import prefix_attention
from beacon_jax.attention.decode_mosaic_gpu import decode_mosaic_gpu
from beacon_jax.attention.device import Target
from beacon_jax.attention.gpu_blocks import Block, GpuBlocks, mosaic_blocks
from beacon_jax.attention.mosaic_chip import Ampere, Hopper, Plain
from beacon_jax.attention.mosaic_gpu import mosaic_gpu, whole_blocks
from tests.attention import test_prefix_attention as claims

A100, H200 = (Target("gpu", name) for name in ("NVIDIA A100", "NVIDIA H200"))
EACH = Block(64, 64, 4, 2)
DEEPER = GpuBlocks(EACH, Block(64, 64, 4, 3), EACH)


class Interpreted(Hopper):
    """Hopper but for two things that jax's interpreter does not know.

    A left operand in registers, and the sum onto a product.
    """

    def product(self, a: Any, b: Any, add: Any = None, *, trans_b: bool = False) -> Any:
        if isinstance(a, jax.Array):
            return Plain.product(self, a, b, add, trans_b=trans_b)
        return super().product(a, b, add, trans_b=trans_b)

    # Its arrays have no layouts.
    _wide = lambda self, tile: plgpu.Layout.WGMMA


def on_hopper(attend, blocks=DEEPER, **options):
    given = {"chip": Interpreted, "blocks": blocks, "interpret": True}
    return functools.partial(attend, **given, **options)


CASES = {
    # T is not whole tiles, rows are ragged, blocks of keys end within the buffer.
    "window": (mosaic_gpu, claims.Case(100, 200, 4, 2, 64, (41, 100), (70, 100))),
    "bias": (mosaic_gpu, claims.Case(64, 136, 2, 1, 128, (0, 72), bias=True)),
}


@pytest.mark.parametrize(
    "name",
    [
        "window",
        *(pytest.param(x, marks=pytest.mark.slow) for x in CASES if x != "window"),
    ],
)
def test_copies_and_products_of_a_hopper_gpu_compute_attention(name, monkeypatch):
    """bfloat16, NaN in dead slots, no worse than naive bfloat16."""
    attend, case = CASES[name]
    monkeypatch.setitem(claims.IMPLEMENTATIONS, name, on_hopper(attend))
    exact = claims.spelled_out(case, "bfloat16")
    ours = claims.errors(claims.run(name, case, "bfloat16"), exact)
    allowed = claims.errors(claims.naive(case), exact)
    assert all(x <= 2 * y for x, y in zip(ours, allowed, strict=True)), (ours, allowed)


@pytest.mark.slow
def test_a_hopper_gpu_decodes_in_splits_that_never_share_rows():
    """Of 20 queries of 4 heads 16 rows are a block of their own: 64 and 16."""
    case = claims.Case(20, 1200, 8, 2, 64, (1134, 0, 700), (20, 0, 7), bias=True)
    q, k, v, _, dead = claims.arrays(case, "bfloat16")
    k, v = (jnp.where(dead, jnp.nan, x) for x in (k, v))
    given = {"bias": claims.bias_of(case, dead), **claims.options(case)}
    attend = on_hopper(decode_mosaic_gpu, splits=2)
    found = jax.jit(lambda *x: attend(*x, **given))(q, k, v, jnp.asarray(case.prefix))
    exact = claims.spelled_out(case, "bfloat16")[0]
    gap = np.abs(np.asarray(found, np.float64) - exact).max()
    assert gap <= 0.01 * np.abs(exact).max()


def test_rows_of_queries_are_whole_blocks_of_one_program_each():
    for t in (1, 63, 64, 65, 80, 200):
        padded = whole_blocks(jnp.ones((1, t, 1, 2)), 64)
        assert padded.shape[1] % 64 == 0 and padded.shape[1] - t < 64
        assert padded.sum() == 2 * t


def elements(layout: Any, shape: tuple[int, int]) -> np.ndarray:
    """Which elements of an array each thread has: [warps, lanes, registers, vector]."""
    found = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        front, back = found.shape[: -len(tile)], found.shape[-len(tile) :]
        split = [
            x for n, size in zip(back, tile, strict=True) for x in (n // size, size)
        ]
        found = found.reshape(*front, *split)
        first = len(front)
        order = [first + 2 * i for i in range(len(tile))]
        order += [first + 2 * i + 1 for i in range(len(tile))]
        found = found.transpose(*range(first), *order)
    whole = [d for d in layout.warp_dims if isinstance(d, int)]
    own = [d % found.ndim for d in (*whole, *layout.lane_dims, layout.vector_dim)]
    registers = [d for d in range(found.ndim) if d not in own]
    sizes = [found.shape[d] for d in own]
    found = found.transpose(*own[:-1], *registers, own[-1])
    return found.reshape(sizes[0], sizes[1] * sizes[2], -1, sizes[3])


@pytest.mark.parametrize("columns", [16, 32, 128])
def test_a_product_has_the_registers_of_a_left_operand(columns):
    """`Ampere` relabels them, where no GPU is at hand to say that it may."""
    names = plgpu.Layout.MMA_ACC, plgpu.Layout.MMA_LHS
    product, left = (name(jnp.bfloat16).to_mgpu() for name in names)
    shape = 128, columns
    np.testing.assert_array_equal(elements(product, shape), elements(left, shape))
    if columns == 128:  # which not every layout has
        other = plgpu.Layout.SMEM_GMEM_COPY(shape, jnp.bfloat16, 128).to_mgpu()
        assert not np.array_equal(
            elements(other, shape).ravel(), elements(left, shape).ravel()
        )


def inputs(t=64, s=136, h=64, dtype="bfloat16", b=1, bias=False):
    """Arguments of the op, by their shapes alone, and their names."""
    q, k = ((b, x, n, h) for x, n in ((t, 2), (s, 1)))
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, k)]
    shapes.append(jax.ShapeDtypeStruct((b,), "int32"))
    biases = jax.ShapeDtypeStruct((b, 1, s), "float32") if bias else None
    return shapes, {"bias": biases}


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        (H200, {"s": 137}, "S=137 of k: a multiple of 8 from 128"),
        (A100, {"s": 63}, "S=63 of k: a multiple of 1 from 64"),
        (H200, {"h": 80}, "head_dim=80 of q: 64 or 128"),
        (A100, {"dtype": "float32"}, "float32, float32: bfloat16 or float16 for all"),
        (A100, {"s": 137, "bias": True}, "S=137 of k: a multiple of 2 from 64"),
        (A100, {"t": 1, "b": 40000}, "40000 rows of 2 heads in q: at most 65535"),
        (Target("gpu", "NVIDIA L4"), {}, "device NVIDIA L4: one of A100"),
        (Target("gpu", "NVIDIA RTX A1000"), {}, "device NVIDIA RTX A1000: one of"),
        (Target("cpu", "cpu"), {}, "device cpu: one of A100"),
    ],
)
def test_what_it_does_not_take_is_named(target, given, message):
    for name in ("mosaic_gpu", "decode_mosaic_gpu"):
        with pytest.raises(NotImplementedError, match=f"{name}: .*{message}"):
            options = {"implementation": name, "target": target}
            shapes, more = inputs(**given)
            attend = functools.partial(prefix_attention, **options)
            jax.eval_shape(attend, *shapes, **more)


@pytest.mark.parametrize("t", [3, 64])
@pytest.mark.parametrize("target", [A100, H200])
def test_it_stands_in_where_jax_has_no_triton(target, t, monkeypatch):
    """Pallas-Triton is deprecated: one day it is not there."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(pallas, "triton", raising=False)
    for name in ("pallas_gpu", "decode_gpu"):
        monkeypatch.delitem(sys.modules, f"beacon_jax.attention.{name}", raising=False)
    attend = functools.partial(prefix_attention, target=target)
    given = [jnp.ones(x.shape, x.dtype) for x in inputs(t=t, s=2048)[0]]
    with pytest.raises(NotImplementedError, match="pallas_gpu: .*this jax lacks"):
        attend(*given, implementation="pallas_gpu")
    program = jax.jit(attend).trace(*given)
    assert "prefix_attention_forward" in str(program.jaxpr)
    lowered = program.lower(lowering_platforms=("cpu",))
    np.testing.assert_allclose(lowered.compile()(*given), 1, atol=1e-2)


def test_blocks_are_those_of_the_chip():
    for kind, generation in (
        ("NVIDIA A800-SXM4-80GB", "sm_80"),
        ("NVIDIA H20", "sm_90"),
    ):
        for h in (64, 128):
            found, blocks = mosaic_blocks(kind, h)
            assert found == generation
            for block in filter(None, blocks):
                assert block.queries % 32 == 0 and block.keys % 32 == 0
                # What owns rows multiplies 64 of them.
            assert blocks.forward.queries % 64 == blocks.d_q.queries % 64 == 0
            assert blocks.d_kv.keys % 64 == 0
    assert issubclass(Hopper, Ampere)
