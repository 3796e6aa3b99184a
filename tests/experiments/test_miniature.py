"""The paper's claims in miniature: its texts, its trainings and its criteria."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.loss import IGNORE
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.evaluation.baselines import FAMILIES
from beacon_jax.evaluation.methods import remember
from beacon_jax.experiments.miniature import __main__ as command
from beacon_jax.experiments.miniature import cells, data, report, soft, training
from beacon_jax.experiments.miniature.data import EVALUATION, KEY, TRAINING, VALUE
from beacon_jax.experiments.miniature.training import Part, Settings, Stage
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.net import Net

KIND = data.Recall(128, 8, 24, questions=16)


# --- texts -----------------------------------------------------------------------


def is_key(tokens):
    return (tokens >= KEY) & (tokens < VALUE)


def test_every_question_has_its_answer_in_the_context_once():
    texts = KIND.draw(data.generator(0, TRAINING), 50)
    for row, labels, answers in zip(
        texts.tokens, texts.labels, texts.answers, strict=True
    ):
        context = row[: KIND.context]
        at = np.flatnonzero(is_key(context))
        assert 8 <= len(at) <= 24
        assert len(set(context[at])) == len(at)
        value = dict(zip(context[at], context[at + 1], strict=True))
        assert all(VALUE <= x < data.VOCAB for x in value.values())
        asked = np.flatnonzero(answers)
        assert len(asked) == min(len(at), 16)
        assert len(set(row[asked])) == len(asked)
        assert all(labels[i] == value[row[i]] == row[i + 1] for i in asked)


def test_no_beacon_and_no_window_cuts_a_pair():
    texts = KIND.draw(data.generator(0, TRAINING), 50)
    keys = np.flatnonzero(is_key(texts.tokens)) % KIND.length
    for ratio in training.RATIOS:
        assert (keys % ratio < ratio - 1).all()
    assert keys.min() < 4
    assert keys.max() == KIND.length - 2


def test_what_is_behind_the_questions_counts_nowhere():
    texts = data.Recall(128, 4, 4, questions=16).draw(data.generator(0, TRAINING), 3)
    assert (texts.labels[:, 128 + 8 :] == IGNORE).all()
    assert (texts.weights[:, 128 + 8 :] == 0).all()
    assert (texts.answers.sum(axis=1) == 4).all()


def test_a_text_has_symbols_that_follow_few_others():
    texts = KIND.draw(data.generator(0, TRAINING), 200)
    follows = {}
    for row in texts.tokens[:, 1:128]:
        for a, b in itertools.pairwise(row[row < KEY]):
            follows.setdefault(a, set()).add(b)
    # A chain goes on behind a pair that covers two of its symbols.
    assert {len(x) for x in follows.values()} != {data.KIND}
    plain = data.Recall(128, 1, 1, 1).draw(data.generator(0, TRAINING), 1)
    assert plain.tokens[0, 0] == data.EOS


def test_texts_are_those_of_their_seed_and_stream():
    draw = lambda *of: KIND.draw(data.generator(*of), 20).tokens
    assert (draw(0, TRAINING) == draw(0, TRAINING)).all()
    rows = [
        {tuple(row) for row in draw(*of).tolist()}
        for of in ((0, TRAINING), (1, TRAINING), (0, EVALUATION), (1, EVALUATION))
    ]
    assert len(set.union(*rows)) == sum(map(len, rows))


def test_repeated_segments_are_asked_for_behind_their_first_time():
    texts = data.repeats(np.random.default_rng(0), 30, 48)
    for row, labels, answers in zip(
        texts.tokens, texts.labels, texts.answers, strict=True
    ):
        period = int(np.argmax(answers)) + 1
        assert 6 <= period <= 24
        assert (row[period:] == row[:-period]).all()
        assert (labels[: period - 1] == IGNORE).all()


def test_a_kind_of_text_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="room for one pair"):
        data.Recall(16, 8, 8, 4)
    with pytest.raises(ValueError, match="least <= most"):
        data.Recall(128, 9, 8, 4)


# --- trainings -------------------------------------------------------------------

SMALL = data.Recall(16, 2, 4, 2)


def small_batch(rng):
    return training.curriculum(SMALL, 4, 0.3, rng)


def small_part(steps):
    stages = Stage(small_batch, 4, decays=False), Stage(small_batch, steps)
    return Part("base", 0, training.plain_loss, 2e-3, stages)


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_a_killed_training_goes_on_and_a_finished_one_is_read_back(
    tmp_path, monkeypatch
):
    settings = Settings(chunk=2)
    start = training.init_base(0)
    train = lambda folder: training.train(
        small_part(6), 0, settings, start, {}, tmp_path / folder
    )
    (tmp_path / "whole").mkdir()
    whole = train("whole")
    assert not same(whole, start)

    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    (tmp_path / "killed").mkdir()
    advance, calls = training._advance, []

    def until_killed(*arguments):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return advance(*arguments)

    monkeypatch.setattr(training, "_advance", until_killed)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    calls.clear()
    resumed = train("killed")
    assert 0 < len(calls) < 5
    assert same(resumed, whole)
    calls[:] = [1] * 4  # a step more would raise
    assert same(train("killed"), whole)
    assert training.seconds(tmp_path / "killed")["base"]["step"] == 10


def test_a_step_of_the_base_is_without_heads_or_a_layer():
    rng = np.random.default_rng(0)
    drawn = np.stack(
        [training.heads_left(0.3, {1: 0.2, 2: 0.3}, rng) for _ in range(2000)]
    )
    whole = drawn.sum(axis=2)
    off = (whole == 0).mean(axis=0)
    np.testing.assert_allclose(off, [0, 0.2, 0.3], atol=0.04)
    np.testing.assert_allclose(whole[whole > 0], 4, rtol=1e-6)  # what is left is larger
    assert ((whole == 0).sum(axis=1) <= 1).all()
    assert 0.2 < (drawn[:, 0] == 0).mean() < 0.3  # one head of a layer stays
    assert (training.heads_left(0.0, {}, rng) == 1).all()


def test_a_base_without_a_layer_is_one_whose_attention_writes_nothing():
    params = training.init_base(0)
    batch = training.repeated({2: 1.0}, 2, np.random.default_rng(0))
    assert (batch["heads"] == [[1] * 4, [1] * 4, [0] * 4]).all()
    loss, _ = training.plain_loss(params, {}, batch)
    other = jax.tree.map(np.array, params)
    other["layers"]["attention"]["v_proj"]["kernel"][2] = 7.0
    assert training.plain_loss(other, {}, batch)[0] == loss
    batch["heads"] = np.ones((3, 4), np.float32)
    assert training.plain_loss(other, {}, batch)[0] != loss


def test_a_stage_ends_at_its_gate(tmp_path):
    part = small_part(2)
    first = dataclasses.replace(part.stages[0], steps=100, gate=0.0)
    part = dataclasses.replace(part, stages=(first, *part.stages[1:]))
    start = training.init_base(0)
    training.train(part, 0, Settings(chunk=2), start, {}, tmp_path)
    assert training.seconds(tmp_path)["base"]["step"] == 4


def test_learning_rates_rise_once_and_fall_at_the_end():
    stage = Stage(small_batch, 1000)
    found = training.rates(2e-3, stage, np.arange(1000), before=0)
    assert found[0] == pytest.approx(2e-5)
    assert found[100] == found[500] == pytest.approx(2e-3)
    assert found[-1] == pytest.approx(1e-4)
    assert training.rates(2e-3, stage, np.arange(1), before=500)[0] > 1.9e-3


def test_all_ways_to_compress_see_the_same_texts_and_steps():
    parts = command.compressing_parts(Settings())
    assert {part.stages[0].steps for part in parts.values()} == {3000}
    batches = [
        part.stages[0].draw(data.generator(0, TRAINING, part.number))
        for part in parts.values()
    ]
    tokens = [batch["tokens"] for batch in batches]
    assert all(np.array_equal(tokens[0], x) for x in tokens)
    assert [len(set(batch["plan"])) > 1 for batch in batches].count(False) == 1


# --- soft tokens and equal budgets -----------------------------------------------


@pytest.fixture(scope="module")
def params():
    return training.init_base(0)


def test_all_methods_keep_as_many_slots_as_beacons(params):
    config = training.beacon_config()
    model = cells.model_of(params, init_beacon(params, config), "interleave")
    texts = data.Recall(128, 8, 8, 8).draw(data.generator(0, EVALUATION), 2)
    past, following = list(texts.tokens[:, :128]), list(texts.tokens[:, 128:])
    own = soft.init_soft(params, config)
    for ratio in (4, 16):
        for name in ("random", "mean-pool", "beacon"):
            memory, kept = remember(model, FAMILIES[name](ratio), past, following)
            assert memory.slots.tolist() == [128 // ratio] * 2
            assert len(set(kept)) == 1
        memory = soft.remember(
            Net(config), own, params, texts.tokens[:, :128], ratio, 128 // ratio
        )
        assert memory.slots.tolist() == [128 // ratio] * 2
        assert memory.k.shape[0] * memory.k.shape[3] * memory.k.shape[4] == 3 * 96


@pytest.mark.slow
def test_without_a_past_soft_tokens_are_the_plain_model(params):
    config = training.beacon_config()
    texts = training.TRAINED.draw(data.generator(0, TRAINING), 2)
    batch = training.in_windows(texts, 32, 4)
    own = soft.init_soft(params, config)
    last = {name: jnp.asarray(x[-1:]) for name, x in batch.items()}
    loss, _ = soft.soft_loss(config, own, params, last)
    kind = LossConfig(remat="none")
    net = Net(config, attention="reference")
    plan = last.pop("plan")
    last.pop("answers")
    plain, _ = train_loss(net, own["beacon"], params, last, plan, kind)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.slow
def test_soft_tokens_are_read_as_they_were_trained(params):
    config = training.beacon_config()
    texts = training.TRAINED.draw(data.generator(0, TRAINING), 2)
    own = soft.init_soft(params, config)
    net = Net(config)
    memory = soft.remember(net, own, params, texts.tokens[:, :128], 8, 16)
    following = jnp.asarray(texts.tokens[:, 128:])
    hidden, _ = soft.compress(net, own, params, 0, following, memory)
    # Text that no window in front of the questions has seen changes nothing.
    again = soft.remember(net, own, params, texts.tokens[:, :96], 8, 16)
    assert np.array_equal(memory.k[:, :, :12], again.k[:, :, :12])
    other, _ = soft.compress(net, own, params, 0, following, again)
    assert not np.allclose(hidden, other)
    gradient = jax.grad(
        lambda own, batch: soft.soft_loss(config, own, params, batch)[0]
    )(own, jax.tree.map(jnp.asarray, training.in_windows(texts, 32, [2, 4, 8, 2, 0])))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


# --- criteria --------------------------------------------------------------------

GOOD = {
    "full": 0.99,
    "window": 0.01,
    "random": 0.2,
    "mean-pool": 0.05,
    "snapkv": 0.3,
    "snapkv_aware": 0.98,
    "beacons": 0.985,
    "appended": 0.9,
    "per sequence": 0.95,
    "soft tokens": 0.5,
}


def made_up(**changes):
    """Makes the record of a seed; changes: accuracies of methods."""
    found = []
    for context, pairs in cells.CONTEXTS:
        for method, share in (GOOD | changes).items():
            if method == "full" and context == 512:
                share = 0.4
            ratios = (None,) if method in ("full", "window") else cells.ASKED
            if method in cells.BEACONS and context == 128:
                ratios = (*ratios, cells.MIXED)
            found += [
                cells.Cell(context, pairs, method, r, round(1000 * share), 1000, 0, 1)
                for r in ratios
            ]
    made = [cell._asdict() for cell in found]
    trained = {"base": {"step": 1000, "seconds": 60.0}}
    return {"seed": 0, "cells": made, "frozen": True, "trained": trained}


def failed(*records):
    return [c.claim for c in report.criteria(records) if not c.met]


def test_criteria_hold_where_beacons_are_close_to_full_attention():
    assert failed(made_up()) == []


@pytest.mark.parametrize(
    ("changes", "claims"),
    [
        ({"appended": 0.99}, ["interleaved better than appended"]),
        ({"soft tokens": 0.99}, ["better than soft tokens"]),
        ({"random": 0.8}, ["better than dropping"] * 4),
        ({"per sequence": 0.99}, ["a ratio drawn per window"] * 2),
        ({"beacons": 0.96}, ["close to full attention: x2"]),
    ],
)
def test_criteria_say_what_a_run_does_not_show(changes, claims):
    found = failed(made_up(**{"per sequence": 0.9} | changes))
    assert len(found) == len(claims)
    assert all(map(str.startswith, found, claims))


def test_criteria_are_of_the_mean_over_seeds():
    assert failed(made_up(), made_up(appended=0.99)) == []
    assert failed(made_up(), *[made_up(appended=1.0)] * 6) != []
    other = made_up() | {"frozen": False}
    (claim,) = failed(made_up(), other)
    assert "frozen" in claim


def test_a_report_has_a_table_a_figure_and_findings(tmp_path):
    records = [made_up(appended=0.99), made_up(appended=1.0)]
    checks = [c._asdict() for c in report.criteria(records)]
    result = {"seeds": records, "criteria": checks}
    text = report.markdown(result)
    assert "| beacons, appended | 99.5 ± 0.7 |" in text
    assert "**no**" in text
    report.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    said = report.summary(result)
    assert "finding: this run does not show it: interleaved" in said
    assert "holds: the base stays frozen" in said


# --- the command -----------------------------------------------------------------


def test_a_folder_of_other_settings_is_refused(tmp_path):
    command.check_settings(Settings(), tmp_path)
    command.check_settings(Settings(), tmp_path)
    with pytest.raises(ValueError, match="scale: 1.0 there, 0.5 now"):
        command.check_settings(Settings(scale=0.5), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_command_trains_measures_and_goes_on_where_it_was(tmp_path, monkeypatch):
    settings = Settings(scale=1e-4, sequences=2)
    run = functools.partial(command.run, 1, settings, tmp_path)
    result = run()
    (record,) = result["seeds"]
    assert record["frozen"]
    assert {x["step"] for x in record["trained"].values()} == {1, 4}
    cell = {tuple(c.values())[:4]: c for c in record["cells"]}
    assert cell[512, 16, "beacons", 16]["questions"] == 16
    for ending in ("json", "md", "png"):
        assert (tmp_path / f"miniature.{ending}").exists()
    (tmp_path / "seed0" / "cells.json").unlink()
    (tmp_path / "seed0" / "soft_tokens.msgpack").unlink()
    trained = []
    advance = training._advance

    def counted(part, *rest):
        trained.append(part.name)
        return advance(part, *rest)

    monkeypatch.setattr(training, "_advance", counted)
    again = run()
    assert trained == ["soft_tokens"]
    assert again["seeds"][0]["cells"] == record["cells"]
