"""The roofline against numbers worked out by hand."""

import json

import pytest

from beacon_jax.bench import roofline
from beacon_jax.bench.sizes import GIB
from beacon_jax.training.hardware import find_chip

LENGTH = 131072
# Llama-2-7B: published parameters, embedding table, q, k, v of all layers and the row.
BASE, TABLE, OWN = 6_738_415_616, 32000 * 4096, 32 * 3 * 4096**2 + 4096


def test_llama2_at_128k_costs_what_the_design_says():
    x8, full = (
        roofline.load("llama2-7b", LENGTH, 8),
        roofline.load("llama2-7b", LENGTH, 0),
    )
    assert x8.flops == pytest.approx(2.6e15, rel=0.01)
    assert full.flops == pytest.approx(6.2e15, rel=0.01)
    assert full.kv_bytes == 64 * GIB and x8.kv_bytes == 8 * GIB
    assert full.weight_bytes == 2 * BASE and x8.weight_bytes == 2 * (BASE + OWN)


def test_a_decoding_step_reads_weights_and_live_entries():
    per_token = 2 * 32 * 32 * 128 * 2  # keys and values, bfloat16: 512 KiB
    full = roofline.load("llama2-7b", LENGTH, 0)
    assert full.decode_bytes == 2 * (BASE - TABLE) + LENGTH * per_token
    x8 = roofline.load("llama2-7b", LENGTH + 16, 8)
    entries = LENGTH // 8 + 16 + 2  # 16 raw tokens and 2 beacons in the open window
    assert x8.decode_bytes == 2 * (BASE - TABLE + OWN / 8) + entries * per_token


def test_a_prefill_moves_the_weights_and_the_memory_once_per_window():
    """Two windows of 1024 at x8: the second sees the 128 slots of the first."""
    load = roofline.load("llama2-7b", 2048, 8)
    written = 2048 + 256
    assert load.moved_bytes == 2 * 2 * (BASE + OWN) + (128 + written) * 512 * 1024


def test_a_roof_is_the_slower_of_computing_and_moving():
    chip = find_chip("H200")
    assert chip is not None
    x8 = roofline.load("llama2-7b", LENGTH, 8)
    found = roofline.roof(x8, chip)
    assert found.chips == 1
    assert found.prefill_s == pytest.approx(x8.flops / 989.5e12)  # bound by computing
    assert found.token_s == pytest.approx(x8.decode_bytes / 4.8e12)  # and by memory


def test_what_does_not_fit_takes_more_chips():
    """Full attention of Llama-2-7B at 128K holds 64 + 12.6 GiB and a chunk's entries:
    two of 80 GB, or one H200."""
    h100, h200 = find_chip("H100"), find_chip("H200")
    assert h100 is not None and h200 is not None
    full = roofline.load("llama2-7b", LENGTH, 0)
    two = roofline.roof(full, h100)
    assert two.chips == 2 and roofline.roof(full, h200).chips == 1
    assert two.prefill_s == pytest.approx(full.flops / (2 * 989.5e12))


def test_break_even_is_where_the_design_says():
    """docs/design.md section 4: Llama-2 x8 ~8K, x4 ~20K; Qwen2-7B x8 ~12K, x4 ~28K, x2
    not within 128K. With whole windows: 9 of 1024 and 20; 6 of 2048 and 14."""
    made = roofline.make(["llama2-7b", "qwen2-7b"], ["4096"], ["2", "4", "8"])
    llama, qwen = made["break_even"].values()
    assert llama[4] == 20480 and llama[8] == 9216
    assert qwen[4] == 28672 and qwen[8] == 12288
    assert qwen[2] is not None and qwen[2] > LENGTH


def test_llama2_70b_at_1m_tokens_worked_out_by_hand():
    """80 layers of 855,638,016 weights in matrices; 8 kv heads: 320 KiB per token."""
    length, token, chunk = 2**20, 320 * 2**10, 8192
    weights = 2 * 68_976_648_192
    full = roofline.load("llama2-70b", length, 0)
    linear, lm_head = 2 * 80 * 855_638_016 * length, 2 * 8192 * 32000
    attention = 4 * 80 * 64 * 128 * (length * (length + 1) // 2)
    assert full.flops == linear + attention + lm_head  # 1,585 PFLOP
    assert full.kv_bytes == 320 * GIB
    # 128 chunks: the weights each time, the 0 + 1 + ... + 127 chunks before, the text.
    seen = chunk * (128 * 127 // 2) + length
    assert full.moved_bytes == 128 * weights + seen * token  # 37,085 GiB
    layer = chunk * (4 * 8192 + 2 * 28672 + 80 * 128) * 2
    assert full.held_bytes == weights + (length + chunk) * token + layer  # 452.5 GiB
    a100 = find_chip("A100 80GB")
    assert a100 is not None
    found = roofline.roof(full, a100)
    assert found.chips == 8  # 486 GB at 76 per chip: 6.4, so 8
    assert found.prefill_s == pytest.approx(full.flops / (8 * 312e12))  # 635 s
    read = weights - 2 * 32000 * 8192 + length * token
    assert found.token_s == pytest.approx(read / (8 * 2039e9))  # 29.5 ms
    made = roofline.make(["llama2-70b"], [str(length)], ["8"])
    (row, *_) = [x for x in roofline.text(made).splitlines() if "1,048,576 |" in x]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:8] == [
        "full",
        "1,585",
        "1.00",
        "320",
        "37,085",
        "452.5",
        "8×: 635 s, 29.5 ms",
    ]


def test_the_roofline_covers_all_chips_1m_tokens_and_models_of_70b():
    assert {"llama2-7b", "qwen2-7b", "llama2-70b", "qwen2-72b"} < set(roofline.PRESETS)
    assert max(roofline.LENGTHS) == 1048576
    made = roofline.make(["llama2-70b", "qwen2-72b"], ["1048576"], ["8"])
    assert {"A100 80GB", "H100", "H200"} < set(made["chips"])
    assert {f"TPU {v}" for v in ("v4", "v5e", "v5p", "v6e")} < set(made["chips"])
    assert [row["ratio"] for row in made["rows"]] == [0, 8, 0, 8]
    assert all(set(row["roofs"]) == set(made["chips"]) for row in made["rows"])
    text = roofline.text(
        json.loads(json.dumps(made)) | {"break_even": made["break_even"]}
    )
    assert all(name in text for name in ("llama2-70b", "qwen2-72b", "1,048,576"))


def test_a_name_or_number_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="preset='llama2-8b' is unknown"):
        roofline.make(["llama2-8b"])
    with pytest.raises(ValueError, match=r"--lengths has \['4K'\]"):
        roofline.make(None, ["4K"])
    with pytest.raises(ValueError, match="ratio=3 does not divide window=32"):
        roofline.make(["tiny"], ["64"], ["3"])
