"""The benchmark runs every part at tiny shapes, and nothing twice."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from beacon_jax.attention import IMPLEMENTATIONS
from beacon_jax.attention.api import INT8
from beacon_jax.bench import device as devices
from beacon_jax.bench import (
    kernels,
    parity,
    plots,
    records,
    report,
    runner,
    serving,
    timing,
)
from beacon_jax.bench.case import Case, Latest
from beacon_jax.cli import bench
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.inference.plan import plan_ratios
from beacon_jax.model.net import Net
from tests.bench.nano import NANO, options, settings

TIMES = {"median_s", "min_s", "max_s", "repeats", "calls"}
FIELDS = {
    "peaks": {"tflops", "bandwidth_gbs"},
    "parity": {"errors", "allowed"},
    "kernels": {"useful_flops", "tflops", "read_bytes", "gbs"},
    "prefill": {"tokens_per_second", "model_flops", "formula_bytes", "kv_bytes"},
    "decode": {"tokens_per_second", "read_bytes", "gbs", "kv_bytes"},
    "train": {"tokens_per_second", "model_flops", "mfu", "remat", "plan"},
}

measuring = pytest.mark.slow  # all parts: half a minute


@measuring
def test_every_part_has_rows_and_none_failed(measured):
    assert {row["key"]["part"] for row in measured.rows} == set(FIELDS)
    assert [row for row in measured.rows if row["status"] == "failed"] == []
    models = [
        r for r in measured.rows if r["key"]["part"] in ("prefill", "decode", "train")
    ]
    assert all(row["status"] == "ok" for row in models)


@measuring
def test_bench_json_has_its_schema(measured):
    content = records.read(measured.folder / "bench.json")
    assert set(content) == {"schema", "run", "rows"}
    assert content["rows"] == measured.rows
    assert {"device", "jax", "commit", "source", "platform"} <= set(content["run"])
    for row in content["rows"]:
        assert {"key", "versions", "status", "reason"} <= set(row)
        assert row["status"] in records.STATUSES
        part = row["key"]["part"]
        if row["status"] == "ok":
            assert FIELDS[part] <= set(row)
        if row["status"] == "ok" and part not in ("peaks", "parity"):
            assert {"seconds", "compile_s", "program_bytes"} <= set(row)
            assert set(row["seconds"]) == TIMES
            t = row["seconds"]
            assert 0 < t["min_s"] <= t["median_s"] <= t["max_s"]


@measuring
def test_every_implementation_is_measured_at_every_fill_or_refuses(measured):
    found = {}
    for row in measured.rows:
        key = row["key"]
        if key["part"] == "kernels":
            name = key["way"], key["implementation"]
            found.setdefault(name, []).append((key["live"], row["status"]))
    for way in ("forward", "backward", "decode"):
        for name in (*IMPLEMENTATIONS, kernels.DEFAULT):
            lives, statuses = zip(*found[way, name], strict=True)
            assert lives == (0, 4, 8, 16)
            assert set(statuses) <= {"ok", "refused"}
        assert {s for _, s in found[way, "reference"]} == {"ok"}
    assert ("forward", kernels.LIBRARY) in found
    int8 = found["decode", "decode_xla" + kernels.INT8_MEMORY]
    assert {status for _, status in int8} == {"ok"}


def test_a_kernel_of_another_platform_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "some_tpu", IMPLEMENTATIONS["reference"])
    case = next(
        c for c in kernels.cases(settings()) if c.key["implementation"] == "some_tpu"
    )
    row = records.guarded(case.run)
    assert row["status"] == "refused" and "is for tpu, this is cpu" in row["reason"]


@measuring
def test_parity_holds_and_covers_gradients(measured):
    rows = [row for row in measured.rows if row["key"]["part"] == "parity"]
    good = [row for row in rows if row["status"] == "ok"]
    found = {(row["key"]["implementation"], row["key"]["dtype"]) for row in good}
    assert {("blockwise", "float32"), ("blockwise", "bfloat16")} <= found
    ways = {row["key"]["way"] for row in good}
    assert {"window with bias", "decode with bias"} <= ways
    for row in good:
        window = row["key"]["way"].startswith("window")
        names = {"out", "d_q", "d_k", "d_v"} if window else {"out"}
        assert set(row["errors"]) == names
        assert all(row["errors"][n] <= row["allowed"][n] for n in names)


def test_a_wrong_kernel_fails_its_parity(monkeypatch):
    def off(q, k, v, prefix, **options):
        return 1.001 * IMPLEMENTATIONS["reference"](q, k, v, prefix, **options)

    monkeypatch.setitem(IMPLEMENTATIONS, "off", off)
    (row, *_) = (
        records.guarded(case.run)
        for case in parity.cases(settings())
        if case.key["implementation"] == "off" and case.key["dtype"] == "float32"
    )
    assert row["status"] == "failed" and "ArithmeticError: errors" in row["reason"]


@measuring
def test_refused_implementations_are_listed_with_their_reason(measured):
    (text,) = [x for x in report.sections(measured.rows) if "**Attention**" in x]
    (line,) = [x for x in text.splitlines() if "decode_tpu: " in x]
    assert line.startswith("- forward, backward, decode: ")
    assert "is for tpu, this is cpu" in line
    assert not any(x.startswith("|") and "decode_tpu " in x for x in text.splitlines())


@measuring
def test_useful_flops_count_what_each_query_sees(measured):
    for row in measured.rows:
        key = row["key"]
        if key["part"] != "kernels" or row["status"] != "ok":
            continue
        if key["implementation"] == kernels.LIBRARY and key["live"]:
            continue
        seen = sum(key["live"] + i + 1 for i in range(key["queries"]))
        forward = seen * 2 * 2 * NANO.num_heads * NANO.head_dim
        assert row["useful_flops"] == forward * (2 if key["way"] == "backward" else 1)


@measuring
def test_the_same_command_measures_nothing_twice(measured, monkeypatch):
    def fail(*_):
        raise AssertionError("measured again")

    for part in runner.PARTS:
        cases = list(runner.PARTS[part](settings()))
        again = [Case(case.key, fail) for case in cases]
        monkeypatch.setitem(runner.PARTS, part, lambda _, again=again: iter(again))
    monkeypatch.setattr(devices, "measure_peaks", fail)
    given = options(f"--out={measured.folder}")
    before = (measured.folder / "rows.jsonl").read_bytes()
    assert runner.run_all(given, list(runner.PARTS)) == measured.rows
    assert (measured.folder / "rows.jsonl").read_bytes() == before


def test_rows_of_other_versions_are_measured_again(tmp_path, device):
    versions = records.versions(device)
    key, run = {"part": "x"}, lambda: {"value": 1}
    assert records.RowFile(tmp_path, versions).measure(key, run)[1]
    assert not records.RowFile(tmp_path, versions).measure(key, run)[1]
    other = records.RowFile(tmp_path, versions | {"jax": "0"})
    assert other.rows == [] and other.measure(key, run)[1]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_the_source_hash_is_that_of_the_code_that_is_measured(monkeypatch):
    whole = records.source_hash()
    records.source_hash.cache_clear()
    monkeypatch.setattr(records, "SOURCES", ("attention",))
    part = records.source_hash()
    records.source_hash.cache_clear()
    monkeypatch.undo()
    assert len(whole) == len(part) == 12 and whole != part


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, device):
    versions = records.versions(device)
    rows = records.RowFile(tmp_path, versions)
    rows.measure({"part": "x"}, lambda: {"value": 1})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": {"part": "y"}, "val')
    again = records.RowFile(tmp_path, versions)
    assert [row["key"]["part"] for row in again.rows] == ["x"]
    again.measure({"part": "y"}, lambda: {"value": 2})
    assert len(records.RowFile(tmp_path, versions).rows) == 2


def test_an_error_is_a_row_and_is_tried_again(tmp_path, device):
    rows = records.RowFile(tmp_path, records.versions(device))

    def broken():
        raise RuntimeError("no\nsecond line")

    row, _ = rows.measure({"part": "x"}, broken)
    assert row["status"] == "failed" and row["reason"] == "RuntimeError: no"
    row, new = rows.measure({"part": "x"}, lambda: {"value": 1})
    assert new and row["status"] == "ok" and len(rows.rows) == 1


def test_what_does_not_fit_is_a_row_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "memory_limit", lambda _: 10)
    given = options(f"--out={tmp_path}", "--parts=prefill,decode,train")
    rows = runner.run_all(given, given.parts)
    assert {row["status"] for row in rows[1:]} == {"does not fit"}
    assert all("GiB by formula" in row["reason"] for row in rows[1:])
    assert report.line(rows[1]).startswith("prefill nano")
    assert "does not fit" in "\n".join(report.sections(rows))


def test_memory_that_runs_out_for_real_does_not_fit():
    def run():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    row = records.guarded(run)
    assert row["status"] == "does not fit"
    assert row["reason"] == "RESOURCE_EXHAUSTED: Out of memory"


@pytest.mark.parametrize("method", ["x2", serving.FULL, serving.FULL_LIBRARY])
def test_the_measured_prefill_is_the_one_that_inference_runs(method):
    s = settings("--dtype=float32")
    variables = devices.random_variables(NANO, "float32")
    make = serving._compressed if method == "x2" else serving._full
    _, fresh, run = make(s, variables, 21, method)
    token, *_ = run(fresh())
    ratio = 2 if method == "x2" else 0
    plan = plan_ratios(NANO, ratio, length=21)
    memory = init_memory(NANO, 1, 64)
    given = (memory, serving._tokens(s, 21), None, plan)
    expected, _ = feed(Net(NANO), variables, *given)
    assert int(token[0]) == int(jnp.argmax(expected.last_logits[0]))


def test_full_attention_in_chunks_is_the_same_text(monkeypatch):
    s = settings("--dtype=float32")
    variables = devices.random_variables(NANO, "float32")
    tokens = []
    for chunk in (7, 21):
        monkeypatch.setitem(serving.CHUNK, "cpu", chunk)
        _, fresh, run = serving._full(s, variables, 21, serving.FULL)
        tokens.append(int(run(fresh())[0][0]))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("ratio", [0, 2])
def test_decoding_starts_from_a_memory_as_prefill_leaves_it(ratio):
    variables = devices.random_variables(NANO, "float32")
    plan = plan_ratios(NANO, ratio, length=21)
    tokens = np.ones((1, 21), np.int32)
    given = (init_memory(NANO, 1, 64), tokens, None, plan)
    _, real = feed(Net(NANO), variables, *given)
    made = serving._filled(settings(), 21, ratio, 1, 64)
    for name in ("slots", "raw", "ratio", "windows"):
        np.testing.assert_array_equal(getattr(made, name), getattr(real, name), name)
    assert made.k.shape == real.k.shape


def test_making_an_empty_memory_is_not_in_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def lasts(seconds):
        clock[0] += seconds
        return jnp.ones(1)

    made = serving._EAGER, lambda: lasts(5.0), lambda empty: lasts(1.0)
    monkeypatch.setattr(serving, "_compressed", lambda *_: made)
    s = settings()
    assert serving._prefiller(s, serving._Shared(s), 21, "x2").sample() == 1.0


def test_a_call_is_warmed_up_before_it_is_measured():
    calls = []
    found = timing.measure(lambda: calls.append(1), repeats=3)
    assert len(calls) == 4 and found.repeats == 3


def test_a_short_call_is_repeated_until_it_can_be_timed():
    calls = []
    found = timing.measure_queued(lambda: calls.append(1), repeats=2, least=1e9)
    assert found.calls == timing.MOST_CALLS
    assert len(calls) == 1 + 1 + 2 * timing.MOST_CALLS


def test_the_first_of_long_calls_counts(monkeypatch):
    monkeypatch.setattr(timing, "LONG_SECONDS", 0.0)
    calls = []
    found = timing.measure_queued(lambda: calls.append(1), repeats=3, least=1e9)
    assert (found.repeats, found.calls, len(calls)) == (3, 1, 3)


def test_only_the_latest_thing_is_kept():
    made = []
    latest = Latest()
    for key in ("a", "a", "b", "a"):
        latest.get(key, lambda: made.append(1) or len(made))
    assert len(made) == 3


@measuring
def test_figures_are_drawn_for_every_part(measured):
    for part in ("kernels", "prefill", "decode", "train"):
        png = (measured.folder / f"{part}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5000


def test_every_line_of_a_figure_has_a_look_of_its_own():
    int8 = [name + kernels.INT8_MEMORY for name in (*INT8, kernels.DEFAULT)]
    attention = [*IMPLEMENTATIONS, kernels.DEFAULT, kernels.LIBRARY, *int8]
    methods = [serving.FULL, serving.FULL_LIBRARY, *(f"x{2**i}" for i in range(1, 6))]
    for names in (attention, methods):
        looks = [tuple(sorted(plots._style(name).items())) for name in names]
        assert len(set(looks)) == len(names)


def test_rates_are_told_in_the_unit_that_fits():
    assert report._flops(0.0222) == "22.2 GFLOP/s"
    assert report._flops(431.2) == "431 TFLOP/s"
    assert plots._flops([2e10, 9.9e11]) == (1e9, "GFLOP/s")
    assert plots._flops([2e10, 4e14]) == (1e12, "TFLOP/s")


@measuring
def test_the_readme_table_is_made_from_the_json(measured, tmp_path, monkeypatch):
    readme = tmp_path / "docs/benchmarks.md"
    readme.parent.mkdir()
    readme.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nz\n")
    monkeypatch.chdir(tmp_path)
    shutil.copy(measured.folder / "bench.json", tmp_path)
    given = options("--readme=bench.json")
    for _ in range(2):  # and again, from what it made
        bench._readme(given)
        text = readme.read_text()
        assert text.startswith(f"a\n{report.BEGIN}\n") and text.endswith("\nz\n")
        assert "old" not in text and "**Prefill**" in text and "nano" in text
        assert "(../bench.json)" in text
        # The long table of the kernels is folded, and says its reasons once.
        folded = text.split("<details>")[1].split("</details>")[0]
        assert " blockwise |" in folded and "**Attention**" not in text
        assert "decode: cudnn: platform cpu: cuDNN needs a GPU." in folded
        assert "decode_tpu, int8 memory: is for tpu, this is cpu." in folded
    full = [line for line in text.splitlines() if "1.00×" in line]
    assert len(full) >= 2  # prefill, decoding: the fastest way of full attention
    shutil.copy("bench.json", "other.json")
    bench._readme(options("--readme=bench.json,other.json"))
    both = readme.read_text()
    assert both.count("**Prefill**") == 2 and "(../other.json)" in both


def test_the_page_of_this_repository_has_room_for_the_table(tmp_path):
    original = Path(__file__).parents[2] / bench.PAGE
    page = Path(shutil.copy(original, tmp_path))
    report.update_readme(page, "the table")
    before, after = original.read_text("utf-8").split(report.BEGIN)
    after = after.split(report.END)[1]
    table = f"{report.BEGIN}\nthe table\n{report.END}"
    assert page.read_text("utf-8") == before + table + after


@measuring
def test_a_page_without_markers_and_a_wrong_file_say_so(measured, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no such page here"):
        report.update_readme(tmp_path / "docs.md", "x")
    with pytest.raises(ValueError, match="bench:begin"):
        report.update_readme(readme, "x")
    (tmp_path / "x.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="not a bench.json of schema 1"):
        records.read(tmp_path / "x.json")
    with pytest.raises(ValueError, match="no such file"):
        records.read(tmp_path / "y.json")


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--parts=prefil", "--parts has .*did you mean prefill"),
        ("--preset=llama2-8b", "preset='llama2-8b' is unknown: did you mean llama"),
        ("--against=toch", "--against has .*did you mean torch"),
        ("--ratios=3", "ratio=3 does not divide window=8"),
        ("--lengths=4K", "--lengths has"),
        ("--repeats=0", "--repeats has"),
    ],
)
def test_a_wrong_option_ends_with_its_name(argument, message, tmp_path):
    given = options(argument, f"--out={tmp_path}")
    with pytest.raises(ValueError, match=message):
        runner.run_all(given, given.parts)


def test_kernels_is_short_for_that_part(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(runner, "run", lambda s, parts, out: asked.append(parts) or [])
    monkeypatch.setattr(flags, "FLAGS", options("--kernels", f"--out={tmp_path}"))
    bench.main(["bench"])
    assert asked == [["kernels"]]
    capsys.readouterr()


def test_the_plan_needs_no_measuring(monkeypatch, tmp_path, capsys):
    given = options("--plan", f"--out={tmp_path}", "--lengths=64")
    monkeypatch.setattr(flags, "FLAGS", given)
    bench.main(["bench"])
    assert "break-even" in capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert [row["preset"] for row in rows] == ["nano", "nano"]
