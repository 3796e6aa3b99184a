"""What the tasks measure, against an independent forward pass in numpy."""

import numpy as np
import pytest

from beacon_jax.data.passkey import contains, last_window_start
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.reading import load_model
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.evaluation.tasks.passkey import PasskeyRetrieval
from beacon_jax.evaluation.tasks.perplexity import Perplexity
from beacon_jax.hf.reader import open_hf
from beacon_jax.inference.verify import numpy_logits

FULL, WINDOW = make_methods(["full", "window"], [])


def plain_loss(model, tokens, count):
    """Mean loss of the last `count` labels of tokens [T + 1]."""
    logits = numpy_logits(model.config, open_hf(model.path), tokens[:-1])
    logits = logits.astype(np.float64)
    largest = logits.max(-1)
    norm = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
    loss = norm - np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
    return loss[-count:].mean()


def test_full_is_the_plain_model_and_window_is_the_plain_model_on_the_last_window(
    model, settings, inputs
):
    task, w = Perplexity(), model.window
    found = task.examples(model, settings, inputs)
    for examples in (found[:4], found[-4:]):  # both lengths
        full = task.run(model, FULL, examples)
        window = task.run(model, WINDOW, examples)
        for example, f, o in zip(examples, full, window, strict=True):
            want = plain_loss(model, example.tokens, w)
            assert f["loss"] == pytest.approx(want, abs=1e-4)
            want = plain_loss(model, example.tokens[-w - 1 :], w)
            assert o["loss"] == pytest.approx(want, abs=1e-4)


def test_kv_bytes_are_the_slots_that_the_past_takes(model, settings, inputs):
    task = Perplexity()
    examples = task.examples(model, settings, inputs)[-4:]
    past = examples[0].length - model.window
    slot = 2 * 2 * 2 * 8 * 4  # k and v, layers, kv heads, head dim, float32
    for method, slots in zip(
        [*make_methods(["beacon"], [2, 4]), FULL, WINDOW],
        [past // 2, past // 4, past, 0],
        strict=True,
    ):
        memory = method.remember(model, [e.tokens[:past] for e in examples], [])
        assert method.kv_bytes(memory) == [slots * slot] * 4


def test_all_lengths_predict_the_same_held_out_tokens_without_overlap(
    model, settings, inputs
):
    found = Perplexity().examples(model, settings, inputs)
    short, long = found[:6], found[6:]
    w = model.window
    for a, b in zip(short, long, strict=True):
        assert (len(a.tokens), len(b.tokens)) == (97, 129)
        assert np.array_equal(a.tokens, b.tokens[-97:])
        assert contains(inputs.stream, b.tokens)
    ends = [bytes(e.tokens[-w:]) for e in long]
    assert len(set(ends)) == len(ends)


def test_a_passkey_is_answered_greedily_and_lies_outside_the_last_window(
    model, settings, inputs
):
    task = PasskeyRetrieval()
    found = task.examples(model, settings, inputs)
    assert [e.info["depth"] for e in found[:4]] == [0.0, 0.5, 1.0, 0.0]
    for e in found:
        text = model.tokenizer.decode(e.tokens.tolist())
        key = e.info["answers"][0]
        assert len(e.tokens) == e.length - 5 and key in text
        last = e.tokens[last_window_start(e.length, model.window) :]
        assert key not in model.tokenizer.decode(last.tolist())
    example = found[0]
    answer = task.run(model, FULL, found[:4])[0]
    tokens, reader = example.tokens, open_hf(model.path)
    for _ in range(5):
        logits = numpy_logits(model.config, reader, tokens)
        tokens = np.append(tokens, logits[-1].argmax().astype(np.int32))
    assert answer["predicted"] == model.tokenizer.decode(tokens[-5:].tolist())
    key = np.asarray(model.tokenizer(example.info["answers"][0])["input_ids"])
    reference = np.concatenate([example.tokens, key])
    want = plain_loss(model, reference, 5)
    assert answer["answer_loss"] == pytest.approx(want, abs=1e-4)


def test_exactly_the_five_digits_are_correct():
    answers = ["12345", "12344", "1234", " 12345"]
    given = [{"predicted": a, "answers": ["12345"]} for a in answers]
    assert [PasskeyRetrieval().value(g) for g in given] == [1, 0, 0, 0]


def test_a_seed_gives_the_same_examples_and_another_gives_others(
    model, settings, inputs
):
    other = type(settings)(**(vars(settings) | {"seed": 1}))
    for task in make_tasks(["perplexity", "passkey"]):
        a, b, c = (task.examples(model, s, inputs) for s in (settings, settings, other))
        assert [e.tokens.tobytes() for e in a] == [e.tokens.tobytes() for e in b]
        assert [e.tokens.tobytes() for e in a] != [e.tokens.tobytes() for e in c]


def test_differences_are_paired_and_the_gap_is_a_fraction():
    rows = [
        {"method": m, "ratio": None, "length": 64, "kv_bytes": 0, "row": i, "loss": x}
        for m, losses in {
            "full": [1.0, 3.0, 2.0],
            "beacon_x2": [1.5, 3.5, 2.5],
            "window": [2.0, 4.0, 3.0],
        }.items()
        for i, x in enumerate(losses)
    ]
    found = {(m["method"], m["metric"]): m for m in Perplexity().score(rows)}
    half = found["beacon_x2", "below_window"]
    assert (half["value"], half["low"], half["high"]) == (0.5, 0.5, 0.5)
    assert found["beacon_x2", "gap_closed"]["value"] == pytest.approx(0.5)
    assert found["full", "gap_closed"]["value"] == pytest.approx(1.0)
    assert ("window", "below_window") not in found
    assert found["full", "loss"]["low"] < 2.0 < found["full", "loss"]["high"]
    alone = Perplexity().score([r for r in rows if r["method"] == "full"])
    assert [m["metric"] for m in alone] == ["loss"]


def test_names_and_ratios_that_do_not_exist_are_errors(model_folder):
    with pytest.raises(ValueError, match="--tasks names \\['needel'\\]"):
        make_tasks(["needel"])
    with pytest.raises(ValueError, match="--methods names 'beacons'"):
        make_methods(["beacons"], [2])
    with pytest.raises(ValueError, match="--methods=beacon needs --ratios"):
        make_methods(["beacon"], [])
    with pytest.raises(ValueError, match="--window=64 differs from the 32"):
        load_model(model_folder, [2], window=64)
    with pytest.raises(ValueError, match="3"):
        load_model(model_folder, [3])


def test_digits_are_counted_by_their_place_in_the_unit(model, settings, inputs):
    example = PasskeyRetrieval().examples(model, settings, inputs)[0]
    at = example.info["positions"]
    assert (
        model.tokenizer.decode(example.tokens[at].tolist())
        == example.info["answers"][0]
    )
    row = {"id": "0", "method": "beacon_x4", "ratio": 4, "length": 96, "kv_bytes": 0}
    row |= {"depth": 0.5, "answers": ["12345"], "answer_loss": 1.0}
    told = [("12345", [6, 7, 8, 9, 10]), ("1x34", [3, 4, 5, 6, 7])]
    rows = [row | {"predicted": p, "positions": n} for p, n in told]
    found = [m for m in PasskeyRetrieval().score(rows) if m["metric"] == "accuracy_at"]
    # places 2 3 0 1 2 all right; 3 0 1 2 3: right, wrong, right, right, missing
    want = {0: (1, 2), 1: (2, 2), 2: (3, 3), 3: (2, 3)}
    got = {m["place"]: (round(m["value"] * m["count"]), m["count"]) for m in found}
    assert got == want
