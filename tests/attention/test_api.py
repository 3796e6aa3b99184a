"""The choice of an implementation, what each refuses, and what the kernels visit."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from beacon_jax.attention import IMPLEMENTATIONS, library, prefix_attention
from beacon_jax.attention.api import best
from beacon_jax.attention.decode_gpu import decode_gpu
from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.gpu_blocks import SM_80, SM_90, SMALL, Block, chip_blocks
from beacon_jax.attention.gpu_ranges import key_range, query_range
from beacon_jax.attention.reference import reference


def inputs(dtype="float32", t=4, heads=2):
    q = jnp.ones((1, t, heads, 8), dtype)
    k = jnp.ones((1, 9, 2, 8), dtype)
    return q, k, k, jnp.asarray([3])


def test_the_target_decides():
    here = default_target()
    assert here == Target.of(jax.devices()[0]) and here.platform == "cpu"
    assert best(4, 64, here) == ("reference",)
    assert best(4, 4096, here) == ("blockwise_cpu",)
    a100 = Target("gpu", "NVIDIA A100-SXM4-80GB")
    assert best(1536, 17920, a100) == (
        *("decode_gpu", "decode_mosaic_gpu", "pallas_gpu", "mosaic_gpu", "blockwise"),
    )
    h200 = Target("gpu", "NVIDIA H200")
    assert best(1536, 17920, h200)[2:4] == ("tokamax", "pallas_gpu")
    assert "tokamax" not in best(64, 17920, h200)
    v5e = Target("tpu", "TPU v5 lite")
    assert best(1536, 17920, v5e) == ("decode_tpu", "pallas_tpu", "blockwise")


def test_a_default_device_is_the_target_and_a_mesh_is_not():
    last = jax.devices()[-1]
    for chosen in (last, "cpu"):
        with jax.default_device(chosen):
            assert default_target() == Target.of(last)
    device = AbstractDevice(device_kind="TPU v4", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("all",), (AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        assert default_target() == Target.of(last)


def test_two_targets_in_one_process_are_two_choices(monkeypatch):
    """Forward and backward, of implementations that say what they were given."""
    asked = []

    def named(name):
        def attend(q, k, v, prefix, **options):
            asked.append((name, options["target"]))
            return reference(q, k, v, prefix, **options)

        return attend

    for name in IMPLEMENTATIONS:
        monkeypatch.setitem(IMPLEMENTATIONS, name, named(name))
    a100, v4 = Target("gpu", "NVIDIA A100"), Target("tpu", "TPU v4")
    for target in (a100, v4, None):
        derived = jax.grad(lambda *x: prefix_attention(*x, target=target).sum())  # noqa: B023
        jax.jit(derived).lower(*inputs())
    assert asked == [
        ("decode_gpu", a100),
        ("decode_tpu", v4),
        ("reference", default_target()),
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("int8", [False, True, "mean"])
@pytest.mark.parametrize(
    "device", [("gpu", "NVIDIA A100"), ("gpu", "NVIDIA H200"), ("tpu", "TPU v4")]
)
@pytest.mark.parametrize("t", [1, 200])
def test_none_works_where_a_program_ends_up_elsewhere(device, int8, t, bias):
    """Traced for a chip, lowered for the CPU that is here."""
    kept, scales = inputs("bfloat16", t), {}
    kept = (kept[0], *(jnp.ones((1, t + 5, 2, 8), "bfloat16"),) * 2, kept[3])
    if int8:
        kept = (kept[0], *(x.astype("int8") for x in kept[1:3]), kept[3])
        ones = jnp.ones((1, 2, t + 5))
        scales = {"k_scale": ones, "v_scale": ones}
    if int8 == "mean":
        scales |= {"k_mean": jnp.ones((1, 2, 8)), "frequencies": np.ones(4)}
    if bias:
        scales["bias"] = jnp.full((1, 2, t + 5), 3.0)
    scales["target"] = Target(*device)
    attend = jax.jit(lambda *x: prefix_attention(*x, **scales))
    lowered = attend.trace(*kept).lower(lowering_platforms=("cpu",))
    np.testing.assert_allclose(lowered.compile()(*kept), 1, atol=1e-2)


def test_a_gpu_that_triton_does_not_know_computes_in_xla():
    attend = functools.partial(prefix_attention, target=Target("gpu", "Tesla T4"))
    for name in ("pallas_gpu", "decode_gpu"):
        with pytest.raises(NotImplementedError, match="Tesla T4: Triton needs"):
            attend(*inputs("float16"), implementation=name)
    program = str(jax.make_jaxpr(attend)(*inputs("float16")))
    assert "exp" in program and "pallas_call" not in program


def test_wrong_arguments_name_themselves():
    q, k, v, prefix = inputs()
    with pytest.raises(ValueError, match="implementation='flash'"):
        prefix_attention(q, k, v, prefix, implementation="flash")
    with pytest.raises(ValueError, match="3 heads"):
        prefix_attention(jnp.ones((1, 4, 3, 8)), k, v, prefix)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cudnn", {}, "platform cpu"),
        ("pallas_gpu", {"scale": -1.0}, "scale=-1.0"),
        ("pallas_gpu", {"k_scale": jnp.ones((1, 2, 9))}, "k_scale: for decode_gpu"),
        (("cudnn", "pallas_gpu"), {"scale": 0.0}, "cudnn: .*; pallas_gpu: scale=0.0"),
    ],
)
def test_a_refusal_names_the_argument(name, options, message):
    with pytest.raises(NotImplementedError, match=message):
        prefix_attention(*inputs(), implementation=name, **options)


@pytest.mark.parametrize("b, t", [(0, 4), (1, 0)])
def test_without_a_query_there_is_nothing_to_attend(b, t):
    q, k = jnp.ones((b, t, 4, 8)), jnp.ones((b, 9, 2, 8))
    for name in (None, *IMPLEMENTATIONS):
        out = prefix_attention(q, k, k, jnp.zeros(b, int), implementation=name)
        assert out.shape == q.shape


def test_a_dtype_that_a_kernel_does_not_take_is_named():
    q, k, v, prefix = inputs()
    with pytest.raises(NotImplementedError, match="bfloat16, float32, float32"):
        prefix_attention(
            q.astype("bfloat16"), k, v, prefix, implementation="pallas_gpu"
        )


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 9, 2), "float32", r"bias has shape \(1, 9, 2\): k .* needs \(1, 2, 9\)"),
        ((3, 1, 2, 9), "float32", r"bias has shape \(3, 1, 2, 9\)"),
        ((1, 2, 9), "bfloat16", "bias has dtype bfloat16: it must be float32"),
    ],
)
def test_a_bias_that_does_not_fit_the_keys_is_an_error(shape, dtype, message):
    for name in (None, *IMPLEMENTATIONS):
        with pytest.raises(ValueError, match=message):
            bias = jnp.zeros(shape, dtype)
            prefix_attention(*inputs(), implementation=name, bias=bias)


def test_what_takes_no_bias_says_so_and_the_next_is_asked():
    q, k, v, prefix = inputs("bfloat16", 2)
    bias = jnp.asarray([[[0.0, 1, 2, 3, 4, 0, 0, 0, 0]] * 2])
    for name in ("cudnn", "tokamax"):
        with pytest.raises(NotImplementedError, match=f"{name}: bias"):
            prefix_attention(q, k, v, prefix, implementation=name, bias=bias)
    h200 = Target("gpu", "NVIDIA H200")
    wide, keys = jnp.ones((1, 1024, 2, 8), "bfloat16"), jnp.ones((1, 1030, 2, 8))
    given = wide, *[keys.astype("bfloat16")] * 2, prefix
    attend = functools.partial(prefix_attention, target=h200)
    program = jax.make_jaxpr(attend)(*given, bias=jnp.zeros((1, 2, 1030)))
    assert "prefix_attention_forward" in str(program)


def test_cudnn_says_which_shapes_it_takes():
    options = {"implementation": "cudnn", "target": Target("gpu", "NVIDIA A100")}
    for dtype, t, message in (("float32", 4, "float32"), ("bfloat16", 4, "S=9")):
        with pytest.raises(NotImplementedError, match=message):
            prefix_attention(*inputs(dtype, t), **options)


def test_tokamax_is_asked_row_by_row_for_the_keys_up_to_each_query(monkeypatch):
    """A stand-in that knows what `local_window_size` means to tokamax 0.0.17: keys
    from `before` in front of a query's index to `after` behind it."""

    def dot_product_attention(q, k, v, *, scale, local_window_size, implementation):
        before, after = local_window_size
        assert implementation == "mosaic_gpu" and np.shape(after) == ()
        row, slot = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
        mask = (slot >= row - before) & (slot <= row + after)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)

    stand_in = types.SimpleNamespace(dot_product_attention=dot_product_attention)
    monkeypatch.setitem(sys.modules, "tokamax", stand_in)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 4, 4, 8), "bfloat16")
    k, v = (jax.random.normal(key, (2, 9, 2, 8), "bfloat16") for key in keys[1:])
    prefix, queries = jnp.asarray([0, 5]), jnp.asarray([4, 2])
    expected = reference(q, k, v, prefix, scale=0.3, queries=queries)
    dead = (jnp.arange(9) >= (prefix + 4)[:, None])[..., None, None]
    k, v = (jnp.where(dead, jnp.nan, x) for x in (k, v))
    with pytest.raises(NotImplementedError, match="device cpu"):
        library.tokamax(q, k, v, prefix, scale=0.3)
    options = {"queries": queries, "target": Target("gpu", "NVIDIA H200")}
    ours = library.tokamax(q, k, v, prefix, scale=0.3, **options)
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), np.asarray(expected, np.float32), atol=2e-2
    )


def test_tokamax_that_is_not_installed_is_a_refusal_that_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    install = r'tokamax: not installed here: pip install "beacon_jax\[tokamax\]"'
    with pytest.raises(NotImplementedError, match=install):
        prefix_attention(*inputs(), implementation="tokamax")


@pytest.mark.parametrize(("layers", "stacked"), [(8, 8), (32, 1), (64, 64)])
def test_an_int8_stack_whose_offsets_overflow_goes_to_the_kernel_by_layer(
    layers, stacked
):
    """0.3, 1.1 and 2.2 times 2**31 numbers: up to 4 GiB offsets have 32 signed bits."""
    s, shape = 17920, jax.ShapeDtypeStruct
    k = shape((layers, 1, s, 32, 128), jnp.int8)
    scales = shape((layers, 1, 32, s), jnp.float32)
    q, prefix = shape((1, 1, 32, 128), jnp.bfloat16), shape((1,), jnp.int32)

    def attend(q, k, v, prefix, k_scale, v_scale, bias):
        scales = {"k_scale": k_scale, "v_scale": v_scale, "layer": layers - 1}
        scales["bias"] = bias
        return decode_gpu(q, k, v, prefix, scale=0.1, interpret=True, **scales)

    program = str(jax.make_jaxpr(attend)(q, k, k, prefix, *[scales] * 3))
    assert f"{{i8[{stacked},{s},128]}}" in program  # what the kernel is given


def test_block_sizes_follow_chip_and_head_dimension():
    assert chip_blocks("NVIDIA A800-SXM4-80GB", 128, "bfloat16") == SM_80[128]
    assert chip_blocks("NVIDIA H200", 80, "bfloat16") == SM_90[128]
    assert chip_blocks("NVIDIA L4", 64, "float16") == SMALL[64]
    assert chip_blocks("NVIDIA RTX A1000", 64, "float16") == SMALL[64]
    assert chip_blocks("NVIDIA GH200 480GB", 64, "float16") == SM_90[64]
    assert chip_blocks("NVIDIA H200", 64, "float32").forward.queries == 32
    with pytest.raises(NotImplementedError, match="head_dim=512"):
        chip_blocks("NVIDIA H200", 512, "bfloat16")


@pytest.mark.parametrize(
    "block", [Block(4, 4, 1, 1), Block(8, 4, 1, 1), Block(2, 6, 1, 1)]
)
@pytest.mark.parametrize("prefix", [0, 1, 7, 12, 29])
@pytest.mark.parametrize("valid", [0, 1, 8, 11])
def test_exactly_the_blocks_with_something_to_see_are_visited(block, prefix, valid):
    """The loops' bounds of the GPU kernels against the definition, all pairs."""
    t, s = 11, 40
    visible = np.arange(s) <= prefix + np.arange(t)[:, None]
    visible[valid:] = False
    queries, keys = -(-t // block.queries), -(-s // block.keys)
    # Padded with what must not make a block visited, or whole, respectively.
    grid = np.zeros((queries * block.queries, keys * block.keys), bool)
    grid[:t, :s] = visible
    some = grid.reshape(queries, block.queries, keys, block.keys).any((1, 3))
    sizes = block.queries, block.keys
    seen = lambda i: key_range(prefix, valid, i * block.queries, *sizes)
    ends = [int(seen(i)[2]) for i in range(queries)]
    np.testing.assert_array_equal(some, np.arange(keys) < np.asarray(ends)[:, None])
    ranges = [
        query_range(prefix, valid, j * block.keys, *sizes[::-1]) for j in range(keys)
    ]
    row = np.arange(queries)[:, None]
    first, full, end = (np.asarray(x) for x in zip(*ranges, strict=True))
    np.testing.assert_array_equal(some, (row >= first) & (row < end))
    # What goes without a mask is visible to each query that is valid.
    for i, rows in enumerate(np.split(grid, queries)):
        rows = rows[: max(0, valid - i * block.queries)]
        whole = int(seen(i)[1])
        assert rows[:, : whole * block.keys].all()
        for j in range(keys):
            if full[j] <= i < end[j]:
                assert rows[:, j * block.keys : (j + 1) * block.keys].all()


def test_cost_follows_the_live_length_and_not_the_capacity():
    """Blocks that the kernels visit at 7B shapes, T = 1536 behind a memory of 16K."""
    block, t, capacity = SM_80[128].forward, 1536, 16384

    def visited(prefix):
        starts, sizes = range(0, t, block.queries), (block.queries, block.keys)
        return sum(int(key_range(prefix, t, start, *sizes)[2]) for start in starts)

    counts = [visited(capacity * fill // 4) for fill in (0, 1, 2, 4)]
    per_slot = t // block.queries / block.keys
    assert counts[0] == sum(2 * (i + 1) for i in range(12))
    for fill, count in zip((1, 2, 4), counts[1:], strict=True):
        assert count - counts[0] == capacity * fill / 4 * per_slot
