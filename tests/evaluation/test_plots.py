"""Figures a person can read: no text over another, units, times without compilation."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from beacon_jax.compiling import Stopwatch
from beacon_jax.evaluation import plots, report
from beacon_jax.evaluation.runner import summary

FAMILIES = ("beacon", "streaming", "snapkv", "mean-pool")


def metric(task, name, method, ratio, length, value):
    past = 0 if method == "window" else length
    kept = past // (ratio or 1) * 2688
    spread = {"low": value - 0.1, "high": value + 0.1, "count": 16, "depth": None}
    labels = {"task": task, "metric": name, "method": method, "ratio": ratio}
    return labels | spread | {"length": length, "value": value, "kv_bytes": kept}


def run(lengths):
    """The metrics of a run of two tasks at three ratios."""
    found = []
    methods = [(f"{f}_x{r}", r) for f in FAMILIES for r in (2, 4, 8)]
    for method, ratio in [*methods, ("full", None), ("window", None)]:
        for length in lengths:
            value = 2.0 + 0.1 * (ratio or 1) + len(method) / 50
            found.append(metric("perplexity", "loss", method, ratio, length, value))
            score = 1.0 if method == "full" else 0.0
            found.append(metric("passkey", "accuracy", method, ratio, length, score))
            found.append(metric("needle", "accuracy", method, ratio, length, 0.0))
    return found


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name."""
    figures = {}
    save = Figure.savefig

    def keep(figure, path, **options):
        figures[Path(path).name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(figure):
    """(text, box in pixels) of everything written."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [t for legend in figure.legends for t in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis, at in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = axis.get_view_interval()
            labels = axis.get_ticklabels()  # those out of view are not drawn
            found += [t for t in labels if low <= t.get_position()[at] <= high]
    boxes = [(t.get_text(), t.get_window_extent()) for t in found if t.get_text()]
    return [(text, box) for text, box in boxes if box.width > 0]


@pytest.mark.parametrize("lengths", [(512,), (256, 512, 1024)])
def test_no_text_lies_over_another_or_outside(lengths, drawn, tmp_path):
    found = run(lengths)
    times = [
        {"method": m["method"], "length": m["length"], "rows": 4, "seconds": [0.1]}
        for m in found
    ]
    plots.curves(found, tmp_path)
    plots.costs(found, times, tmp_path)
    losses = [m for m in found if m["task"] == "perplexity"]
    plots.loss_curves(losses, tmp_path / "perplexity.png")
    several = {"scores_by_length.png", "costs.png"} if len(lengths) > 1 else set()
    assert set(drawn) == {"scores_by_ratio.png", "perplexity.png", *several}
    for name, figure in drawn.items():
        written = texts(figure)
        assert len(written) > 10
        whole = figure.bbox
        for text, box in written:
            assert whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1, (name, text)
        for (a, box), (b, other) in itertools.combinations(written, 2):
            assert not (a != b and box.shrunk(0.9, 0.8).overlaps(other)), (name, a, b)


def test_one_length_is_drawn_as_a_row_per_method_the_best_on_top(drawn, tmp_path):
    losses = [m for m in run((512,)) if m["task"] == "perplexity"]
    plots.loss_curves(losses, tmp_path / "perplexity.png")
    (axes,) = drawn["perplexity.png"].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    value = {m["method"]: m["value"] for m in losses}
    assert len(names) == len(value)
    assert [value[name] for name in reversed(names)] == sorted(value.values())


def test_bytes_have_a_unit_and_equal_ones_are_one_line(drawn, tmp_path):
    assert plots.costs(run((256, 512)), [], tmp_path)
    memory = drawn["costs.png"].axes[0]
    assert memory.get_ylabel() == "KV of the past, MiB"
    names = [text.get_text() for text in memory.texts]
    ratios = [f"x{r}, 4 methods" for r in (2, 4, 8)]
    assert sorted(names) == ["full", "window", *ratios]
    assert max(line.get_ydata()[-1] for line in memory.lines) == 512 * 2688 / 2**20


def test_tasks_without_a_score_are_named_and_not_drawn(drawn, tmp_path):
    made = plots.curves(run((256, 512)), tmp_path)
    assert "needle" in made[-1] and "passkey" not in made[-1]
    titles = {axes.get_title() for axes in drawn["scores_by_length.png"].axes}
    assert titles == {"passkey", "perplexity"}


def test_the_report_says_that_beacons_worse_than_the_window_are_undertrained():
    found = run((256,))
    for m in found:
        if m["method"] == "window" and m["metric"] == "loss":
            m["value"] = 2.5
    text = report.verdicts(found)
    worse = [m for m in found if m["metric"] == "loss" and m["value"] > 2.5]
    assert any(m["method"] == "beacon_x8" for m in worse)
    assert "beacon_x8 is worse than the last window alone" in text
    assert "undertrained" in text and "beacon_x2 is" not in text
    assert "streaming" not in text
    assert "at needle: this model cannot do them" in text
    for m in found:
        m["value"] = 1.0
    assert report.verdicts(found) == ""


def test_times_are_medians_without_compilation():
    batch = {"task": "passkey", "method": "full", "length": 256, "rows": 4}
    lines = [
        batch | {"seconds": [seconds], "compile_seconds": compiled}
        for seconds, compiled in ((0.5, 8.0), (0.3, 0.0), (0.4, 0.0))
    ]
    (found,) = summary([*lines, lines[0] | {"length": 512}])[:1]
    assert found["seconds"] == [0.4] and found["batches"] == 3
    assert found["compile_seconds"] == 8.0
    text = report.times(summary(lines))
    assert "compile s" in text and "8.0" in text and "0.400" in text


def test_a_lap_is_split_into_work_and_compilation():

    @jax.jit
    def step(x):
        for _ in range(20):
            x = jnp.sin(x) @ x
        return x

    x = jnp.eye(8)
    began, watch = time.perf_counter(), Stopwatch()
    step(x).block_until_ready()
    work, compiled = watch.read()
    whole = time.perf_counter() - began
    assert compiled > 0 and work >= 0
    assert work + compiled == pytest.approx(whole, abs=0.05)
    watch = Stopwatch()
    step(x).block_until_ready()
    assert watch.read()[1] == 0.0


def test_every_method_has_a_look_of_its_own():
    from beacon_jax.evaluation import baselines

    assert set(plots.STYLES) == {*baselines.FAMILIES, baselines.Retention.family}
    assert len(set(plots.STYLES.values())) == len(plots.STYLES)


def test_matplotlib_is_not_needed_where_nothing_is_drawn():
    """It is an extra of its own; lm_eval's adapter is in this package, too."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import beacon_jax.evaluation, beacon_jax.evaluation.likelihood\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
