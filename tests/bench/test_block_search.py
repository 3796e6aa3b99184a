"""What is chosen among block sizes; the compilers are not asked (`make aot`)."""

from beacon_jax.bench import block_search
from beacon_jax.bench.aot_kernels import CASES

BASE = {"queries": 64, "keys": 64, "stages": 2, "spilled": 0, "held": 8}


def row(**changes):
    return BASE | changes


def test_the_largest_blocks_win_that_fill_a_processor_without_spilling():
    chosen = block_search.chosen
    small, large = row(), row(keys=128)
    assert chosen([small, large]) == large
    assert chosen([small, large | {"spilled": 17}]) == small
    few = large | {"spilled": 16}
    assert chosen([small, few]) == few
    assert chosen([small, large | {"held": 4}]) == small
    assert chosen([small, row(stages=3)]) == row(stages=3)


def test_where_all_spill_or_none_fills_a_processor_the_least_bad_is_chosen():
    chosen = block_search.chosen
    few, many = row(spilled=60), row(spilled=200, keys=128)
    assert chosen([few, many]) == few
    assert chosen([row(held=4)]) == row(held=4)
    assert chosen([{"error": "exceeds available shared memory"}]) is None


def test_a_gpu_that_times_them_decides_by_time():
    slow, fast = {"seconds": 2.0}, {"seconds": 1.0}
    assert block_search.chosen([slow, fast, {"error": "refused"}]) == fast


def test_a_processor_holds_what_registers_and_shared_memory_allow():
    kernel = {"shared_memory": 80 * 1024, "registers": 255, "threads": 128}
    assert block_search.held(kernel, 164) == 8  # two of 81 KiB
    assert block_search.held(kernel | {"shared_memory": 82 * 1024}, 164) == 4
    assert block_search.held(kernel | {"shared_memory": 1024}, 164) == 8  # registers


def test_rows_of_products_are_keys_in_d_kv():
    for block in block_search.candidates("mosaic_gpu"):
        assert block.queries % 64 == 0
        other = block_search.turned("mosaic_gpu", block)
        assert (other.queries, other.keys) == (block.keys, block.queries)
        assert block_search.turned("pallas_gpu", block) == block


def test_each_generation_of_kernels_is_compiled_with_and_without_a_bias():
    found = {(c.implementation, c.target, c.backward, c.bias) for c in CASES.values()}
    for name in ("pallas_gpu", "mosaic_gpu"):
        for target in ("a100_80gb", "h200"):
            for backward in (False, True):
                assert {
                    (name, target, backward, bias) for bias in (False, True)
                } <= found
    for name in ("decode_gpu", "decode_mosaic_gpu"):
        assert {(name, "h200", False, bias) for bias in (False, True)} <= found
