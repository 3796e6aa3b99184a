"""Tokenizer, passkeys and batches."""

import dataclasses

import numpy as np
import pytest
from transformers import AutoTokenizer

from beacon_jax.data.batches import (
    KINDS,
    BatchConfig,
    Batches,
    BatchStage,
)
from beacon_jax.data.examples import IGNORED
from beacon_jax.data.passkey import contains, last_window_start, make_passkey
from beacon_jax.data.text import load_documents
from beacon_jax.data.tokenizer import encode_stream, train_tokenizer

MIX = tuple((kind, 1.0) for kind in KINDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(tokenizer loaded from its folder, stream of ~100k tokens)."""
    documents = load_documents("stdlib", "heldout", 0.02)[:20]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, folder, 400)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, encode_stream(documents, tokenizer)


@pytest.fixture(scope="module")
def batches(source):
    tokenizer, stream = source
    stages = (BatchStage(3, 64, 8, (("repeat", 1.0),)), BatchStage(5, 192, 16, MIX))
    config = BatchConfig(stages, seed=3, passkey_questions=3, passkey_window=32)
    return Batches(stream, tokenizer, config)


def test_the_tokenizer_splits_digits_and_gives_text_back(source):
    tokenizer, stream = source
    ids = tokenizer("The pass key is 90210.\n\tdef é", add_special_tokens=False)[
        "input_ids"
    ]
    assert [tokenizer.decode([i]) for i in ids].count("0") == 2
    assert tokenizer.decode(ids) == "The pass key is 90210.\n\tdef é"
    assert len(tokenizer) == 400 and stream[-1] == tokenizer.eos_token_id


def test_too_small_a_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 259"):
        train_tokenizer(["text"], tmp_path, 100)


@pytest.mark.parametrize("length", [96, 128, 131, 255])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_passkey_has_exact_length_depth_and_place(source, length, depth):
    tokenizer, stream = source
    sample = make_passkey(
        np.random.default_rng(0), stream, length, depth, tokenizer, 32
    )
    assert len(sample.tokens) == length and sample.answer == (length - 5, length)
    assert tokenizer.decode(sample.tokens[slice(*sample.answer)]) == str(sample.key)
    text = tokenizer.decode(sample.tokens)
    assert text.count(str(sample.key)) == 3
    for mention in sample.mentions:
        assert tokenizer.decode(sample.tokens[slice(*mention)]) == str(sample.key)
    size = sample.needle[1] - sample.needle[0]
    room = min(last_window_start(length, 32), length - 19) - size
    assert sample.needle[1] <= last_window_start(length, 32)
    if room + size == last_window_start(length, 32):
        assert sample.needle[0] == round(depth * room)


def test_a_key_that_the_text_already_holds_is_drawn_again(source):
    tokenizer, stream = source
    first = make_passkey(np.random.default_rng(7), stream, 128, 0.5, tokenizer)
    digits = first.tokens[slice(*first.answer)]
    text = np.concatenate([digits, stream])
    again = make_passkey(np.random.default_rng(7), text, 128, 0.5, tokenizer)
    assert contains(text[:128], digits) and again.key != first.key


def test_passkeys_without_room_or_text_are_errors(source):
    tokenizer, stream = source
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="length=40 .*use a longer one"):
        make_passkey(rng, stream, 40, 0.5, tokenizer)
    with pytest.raises(ValueError, match="text_tokens has 10 tokens"):
        make_passkey(rng, stream[:10], 128, 0.5, tokenizer)
    with pytest.raises(ValueError, match="depth=1.5"):
        make_passkey(rng, stream, 128, 1.5, tokenizer)


def test_a_tail_puts_answers_anywhere_in_the_last_half(source):
    tokenizer, stream = source
    config = BatchConfig((BatchStage(40, 96, 4, (("passkey", 1.0),)),), passkey_tail=40)
    ends = []
    for step in range(40):
        batch = Batches(stream, tokenizer, config).batch(step)
        for labels, weights in zip(batch["labels"], batch["weights"], strict=True):
            at = np.flatnonzero(weights == config.answer_weight)
            assert len(at) == 5 and (np.diff(at) == 1).all()
            assert tokenizer.decode(labels[at]).isdigit()
            ends.append(96 - (int(at[-1]) + 2))
    assert min(ends) == 0 and max(ends) == 40 and len(set(ends)) > 30
    with pytest.raises(ValueError, match="data.passkey_tail=-1 must not be negative"):
        dataclasses.replace(config, passkey_tail=-1)


def test_a_batch_is_a_function_of_seed_and_step_alone(source, batches):
    late = batches.batch(6)
    fresh = Batches(source[1], source[0], batches.config)
    for name, value in fresh.batch(6).items():
        np.testing.assert_array_equal(value, late[name])
    other = Batches(source[1], source[0], dataclasses.replace(batches.config, seed=4))
    assert not np.array_equal(other.batch(6)["tokens"], late["tokens"])


def test_stages_follow_each_other_and_the_last_one_stays(batches):
    shapes = [batches.batch(step)["tokens"].shape for step in (0, 2, 3, 7, 50)]
    assert shapes == [(8, 64), (8, 64), (16, 192), (16, 192), (16, 192)]


def test_labels_are_shifted_once_and_ignored_exactly_where_weights_are_zero(batches):
    for step in range(3, 7):
        batch = batches.batch(step)
        assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
        counted = batch["labels"] != IGNORED
        np.testing.assert_array_equal(counted, batch["weights"] > 0)
        shifted = np.roll(batch["tokens"], -1, 1)
        np.testing.assert_array_equal(batch["labels"][counted], shifted[counted])
        assert not counted[:, -1].any()


def test_answers_weigh_most_and_repeat_the_key(source, batches):
    digits = {source[0].convert_tokens_to_ids(d) for d in "0123456789"}
    batch = batches.batch(4)
    rows = np.flatnonzero(batch["kind"] == KINDS.index("passkey"))
    assert rows.size
    for row in rows:
        labels = batch["labels"][row][batch["weights"][row] == 10.0]
        assert set(labels.tolist()) <= digits and len(labels) % 5 == 0
        assert (labels.reshape(-1, 5) == labels[:5]).all()
        assert batch["weights"][row, -6:-1].tolist() == [10.0] * 5


def test_copies_and_repeats_are_predictable_where_they_count(batches):
    seen = set()
    for step in range(3, 20):
        batch = batches.batch(step)
        for row in np.flatnonzero(batch["kind"] == KINDS.index("repeat")):
            tokens, weights = batch["tokens"][row], batch["weights"][row]
            period = int(np.argmax(weights > 0)) + 1
            np.testing.assert_array_equal(tokens[period:], tokens[:-period])
            seen.add("repeat")
        for row in np.flatnonzero(batch["kind"] == KINDS.index("copy")):
            tokens, weights = batch["tokens"][row], batch["weights"][row]
            at = int(np.argmin(weights[:-1] > 0)) + 1
            assert contains(tokens[:at], tokens[at:])
            seen.add("copy")
    assert seen == {"repeat", "copy"}


def test_dummies_stand_after_every_rth_token_and_labels_skip_them(source):
    tokenizer, stream = source
    stages = (BatchStage(1, 192, 8, (("repeat", 1.0), ("passkey", 1.0)), dummies=1.0),)
    batches = Batches(stream, tokenizer, BatchConfig(stages, dummy_every=(4,)))
    batch = batches.batch(0)
    dummy = (np.arange(192) + 1) % 5 == 0
    assert (batch["tokens"][:, dummy] == tokenizer.eos_token_id).all()
    assert (batch["labels"][:, dummy] == IGNORED).all()
    tokens, labels = batch["tokens"][:, ~dummy], batch["labels"][:, ~dummy]
    counted = labels != IGNORED
    assert counted.any(1).all()
    np.testing.assert_array_equal(
        labels[:, :-1][counted[:, :-1]], tokens[:, 1:][counted[:, :-1]]
    )


def test_config_errors_name_the_field():
    with pytest.raises(ValueError, match="length=0"):
        BatchStage(1, 0, 1)
    with pytest.raises(ValueError, match=r"mix has \['nope'\]"):
        BatchStage(1, 8, 1, (("nope", 1.0),))
    with pytest.raises(ValueError, match="dummies=2"):
        BatchStage(1, 8, 1, dummies=2)
    with pytest.raises(ValueError, match="data.stages is empty"):
        BatchConfig(())


def test_a_text_shorter_than_two_rows_is_an_error(source):
    config = BatchConfig((BatchStage(1, 64, 1),))
    with pytest.raises(ValueError, match="the text has 100 tokens"):
        Batches(source[1][:100], source[0], config)


@pytest.mark.parametrize(
    ("length", "dummies", "tail"), [(20, 0.0, 0), (72, 0.1, 0), (100, 0.0, 64)]
)
def test_rows_in_which_a_passkey_may_not_fit_are_an_error_at_once(
    source, length, dummies, tail
):
    tokenizer, stream = source
    mix = (("text", 0.9), ("passkey", 0.1))
    stages = (BatchStage(1, 300, 1, mix), BatchStage(1, length, 1, mix, dummies))
    config = BatchConfig(stages, passkey_tail=tail)
    message = f"data.stages has passkeys in rows of length={length}, .* has no room"
    with pytest.raises(ValueError, match=message):
        Batches(stream, tokenizer, config)
    Batches(stream, tokenizer, BatchConfig(stages[:1], passkey_tail=tail))
