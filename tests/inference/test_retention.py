"""Retention: fitted to a model, it keeps facts whole, and is refused elsewhere."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import beacon_jax
from beacon_jax.cli import retain as retain_command
from beacon_jax.data.statements import draw_statement, put_statements
from beacon_jax.data.text import load_documents
from beacon_jax.data.tokenizer import encode_stream
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.inference.compressors.base import FORCED
from beacon_jax.inference.compressors.retention import (
    FILE,
    Retention,
    chosen,
    likely,
    sample_of,
)
from beacon_jax.inference.fit_retention import Fitting, fit_retention
from tests.inference.conftest import W
from tests.inference.test_compressors import TEXT, slots_of


@pytest.fixture(scope="module")
def tiny():
    return beacon_jax.load("tiny-beacon")


@pytest.fixture(scope="module")
def fitted(tiny):
    text = encode_stream(load_documents("stdlib")[:40], tiny.tokenizer)
    return fit_retention(tiny, text, Fitting(rows=48, length=256, batch_size=8))


def weights_of(model, seed=0):
    c = model.config
    shape = (c.num_layers, c.num_kv_heads, c.head_dim)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random(model, threshold=0.0):
    return Retention(weights_of(model), 0.25, threshold, sample_of(model.variables))


def test_a_fit_tells_statements_that_it_has_not_seen(tiny, fitted):
    assert fitted.tokens == 48 * 256
    assert fitted.found > 0.15  # by chance .02
    text = encode_stream(load_documents("stdlib", "heldout")[:9], tiny.tokenizer)
    rng = np.random.default_rng(9)
    rows = [put_statements(rng, text[n : n + 256], 256, tiny.tokenizer) for n in (0, 9)]
    state = tiny.compress([x.tokens for x in rows], ratio=0).state
    scores = likely(tiny.net, state.v, jnp.asarray(fitted.retention.weights))
    above = np.asarray(scores)[:, :256] + fitted.retention.bias
    above = above > fitted.retention.threshold
    stated = np.stack([x.stated for x in rows])
    assert above[stated].mean() > 5 * above[~stated].mean()


def test_the_same_seed_is_the_same_fit(tiny):
    text = encode_stream(load_documents("stdlib")[:5], tiny.tokenizer)
    made = [Fitting(rows=8, length=128, seed=seed) for seed in (1, 1, 2)]
    fits = [fit_retention(tiny, text, settings).retention for settings in made]
    a, b, c = (x.weights for x in fits)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_scores_are_the_sum_over_all_values_of_a_token(model):
    memory = model.compress(TEXT, ratio=0)
    weights = weights_of(model)
    found = likely(model.net, memory.state.v, jnp.asarray(weights))
    count = int(memory.slots[0])
    want = np.einsum("lskh,lkh->s", slots_of(memory)[1], weights)
    np.testing.assert_allclose(np.asarray(found)[0, :count], want, rtol=1e-4, atol=1e-5)


def test_the_most_likely_are_chosen_up_to_half_of_the_room():
    found = jnp.asarray([[0.9, 0.1, 0.8, 0.7, 0.95], [0.9, 0.1, 0.2, 0.3, 0.95]])
    inside = jnp.ones((2, 5), bool).at[1, 4].set(False)
    got = chosen(found, inside, 0.5, jnp.asarray([4, 4]))
    want = [[1, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert np.array_equal(got, np.asarray(want, bool))
    assert not np.asarray(chosen(found, inside, 0.5, jnp.asarray([1, 1]))).any()


def test_what_is_likely_stays_in_all_layers_and_heads(model):
    method = random(model)
    asked = []
    score = method.score
    method.score = lambda *args: asked.append(score(*args)) or asked[-1]
    memory = model.compress(TEXT, ratio=2, method=method)
    whole = slots_of(model.compress(TEXT, ratio=0))[1]
    end = len(TEXT) // W * W
    votes = np.asarray(asked[0])[:, 0, :, :end]
    facts = (votes == FORCED).all((0, 1))
    assert 0 < facts.sum() <= end // 2
    v = slots_of(memory)[1]
    for layer in range(len(v)):
        for token in np.flatnonzero(facts):
            off = np.abs(v[layer] - whole[layer, token]).max(-1).min(0)
            assert (off < 1e-5).all()


def test_without_anything_likely_it_matches_attention(model):
    method = random(model, threshold=1e9)
    found = model.compress(TEXT, ratio=4, method=method)
    want = model.compress(TEXT, ratio=4, method="attention-matching")
    for a, b in zip(slots_of(found), slots_of(want), strict=True):
        assert np.array_equal(a, b)


def test_it_is_read_as_it_was_written(model, tmp_path):
    made = random(model, threshold=0.125)
    file = made.save(tmp_path / "new" / "folder")
    assert file.name == FILE
    for path in (file, file.parent, str(file.parent)):
        back = Retention.load(path)
        assert (back.bias, back.threshold) == (0.25, 0.125)
        assert np.array_equal(back.weights, made.weights)
    a = model.compress(TEXT, ratio=4, method=made)
    b = model.compress(TEXT, ratio=4, method=f"retention:{file.parent}")
    for x, y in zip(slots_of(a), slots_of(b), strict=True):
        assert np.array_equal(x, y)


def test_what_is_no_retention_is_refused(model, tmp_path):
    compress = lambda method: model.compress(TEXT, ratio=4, method=method)
    with pytest.raises(ValueError, match="give retention:FOLDER"):
        compress("retention")
    with pytest.raises(FileNotFoundError, match="has no retention.safetensors"):
        compress(f"retention:{tmp_path}")
    file = random(model).save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="truncated"):
        compress(f"retention:{tmp_path}")
    wrong = random(model)
    wrong.sample = wrong.sample[:1]
    wrong.save(tmp_path)
    with pytest.raises(ValueError, match="sample .L, H. are needed"):
        compress(f"retention:{tmp_path}")
    wrong = random(model)
    wrong.weights = wrong.weights * np.nan
    wrong.save(tmp_path)
    with pytest.raises(ValueError, match="weights has values that are no numbers"):
        compress(f"retention:{tmp_path}")


def test_another_model_is_refused(model, tiny, fitted):
    with pytest.raises(ValueError, match="weights of shape .* but the model has"):
        model.compress(TEXT, ratio=4, method=fitted.retention)
    turned = jax.tree.map(lambda x: x[..., ::-1], model.variables)
    other = dataclasses.replace(model, variables=turned)
    with pytest.raises(ValueError, match="fitted to another model of the same shapes"):
        other.compress(TEXT, ratio=4, method=random(model))
    # The same model in another precision is the same.
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.variables)
    half = dataclasses.replace(model, variables=rounded)
    assert half.compress(TEXT, ratio=4, method=random(model)).slots[0] > 0


def test_settings_that_cannot_be_are_refused(tiny):
    with pytest.raises(ValueError, match="rows=3 must be >= 8"):
        Fitting(rows=3)
    few = np.arange(50, dtype=np.int32)
    with pytest.raises(ValueError, match="text has 50 tokens, but 128 are needed"):
        fit_retention(tiny, few, Fitting(length=128))
    long = np.zeros(10**6, np.int32)
    with pytest.raises(ValueError, match="is above the positions"):
        fit_retention(tiny, long, Fitting(length=500_000))
    mute = dataclasses.replace(tiny, tokenizer=None)
    with pytest.raises(ValueError, match="fitting needs a tokenizer"):
        fit_retention(mute, long, Fitting(length=128))


def test_statements_take_a_third_of_a_text_at_most(tiny):
    rng = np.random.default_rng(3)
    text = rng.integers(1, 200, 128).astype(np.int32)
    for _ in range(40):
        made = put_statements(rng, text, 128, tiny.tokenizer, most=9)
        assert len(made.tokens) == len(made.stated) == 128
        assert made.stated.sum() <= 128 // 3
        rest = made.tokens[~made.stated]
        assert np.array_equal(rest, text[: len(rest)])


def test_no_statement_has_the_wording_of_a_benchmark():
    rng = np.random.default_rng(0)
    drawn = [draw_statement(rng) for _ in range(2000)]
    assert len(set(drawn)) > 1900
    for words in ("pass key", "passkey", "special magic", "{", "}"):
        assert not any(words in x.lower() for x in drawn)


def retain(*arguments):
    values = flags.FlagValues()
    retain_command.define_flags(values)
    values(["retain", "--model=tiny-beacon", *arguments])
    retain_command.main.__wrapped__(values)


def test_the_command_writes_what_evaluate_reads(tmp_path, capsys):
    out = tmp_path / "kept"
    few = "--rows=8", "--length=128", "--steps=2"
    retain(*few, f"--out={out}")
    told = capsys.readouterr().out
    assert "use it with --method=retention:" in told
    assert re.search(r"not trained on: 0.\d+, corrected 0.\d+", told)
    helps = "is left out" not in told
    assert (Retention.load(out).correction is not None) == helps
    assert (out / FILE).is_file()
    names = [f"retention:{out}", f"retention_recent:{out}"]
    methods = make_methods(names, [4, 8])
    assert [m.name for m in methods] == [
        "retention_x4",
        "retention_x8",
        "retention_recent_x4",
        "retention_recent_x8",
    ]
    with pytest.raises(ValueError, match="give retention:FOLDER"):
        make_methods(["retention"], [4])
    with pytest.raises(FileNotFoundError, match="has no retention.safetensors"):
        make_methods([f"retention:{tmp_path}"], [4])
    before = (out / FILE).read_bytes()
    with pytest.raises(FileExistsError, match="has retention.* or add --overwrite"):
        retain(*few, f"--out={out}")
    assert (out / FILE).read_bytes() == before
    with pytest.raises(ValueError, match="ratios=.2, 99. must be numbers from 2 to 12"):
        retain(*few, "--ratios=2,99", f"--out={tmp_path / 'other'}")
    retain("--rows=8", "--length=128", "--steps=0", f"--out={tmp_path / 'none'}")
    assert "corrected" not in capsys.readouterr().out
    assert Retention.load(tmp_path / "none").correction is None
    with pytest.raises(ValueError, match="rows=2 must be >= 8"):
        retain("--rows=2", f"--out={out}", "--overwrite")
