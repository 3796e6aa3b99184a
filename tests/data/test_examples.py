"""Length rules, eos, tokenised rows and the shift of labels."""

import numpy as np
import pytest

from beacon_jax.data import chat, examples
from beacon_jax.data.examples import Made, Rules, make_examples, shift
from beacon_jax.data.sources import Record
from tests import text_tokenizers
from tests.data import chat_tokenizers as tiny

TEXT = "Wrap a single paragraph of text, returning a list of wrapped lines."
TALK = (("user", "What is this?"), ("assistant", "A text wrapper."))
TOKENIZERS = [tiny.qwen, tiny.llama_3, tiny.llama_2, tiny.mistral]
any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS)


def row(**kind) -> Record:
    return Record("a.jsonl:1", **kind)


def reason_of(record, tokenizer, rules) -> str:
    made = make_examples(record, tokenizer, rules)
    assert made.reason and not made.examples
    return made.reason


def made(record, tokenizer, **rules):
    found = make_examples(record, tokenizer, Rules(**rules))
    assert not found.reason
    (example,) = found.examples
    return example


@any_tokenizer
def test_text_that_fits_gets_one_eos_and_is_all_target(tokenizer):
    tokenizer = tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    n = len(ids)
    eos = tokenizer.eos_token_id
    for low, high in ((0, 20480), (n, n + 1), (1, n + 1)):
        example = made(row(text=TEXT), tokenizer, min_length=low, max_length=high)
        assert list(example.tokens) == [*ids, eos]
        assert example.labelled.all() and len(example.labelled) == n + 1
        assert example.tokens.dtype == np.int32
    # bos is the tokenizer's affair.
    assert (ids[0] == tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)


@any_tokenizer
def test_text_that_is_too_long_is_cut_and_gets_no_eos(tokenizer):
    tokenizer = tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    for high in (5, len(ids) - 1, len(ids)):
        example = made(row(text=TEXT), tokenizer, max_length=high, long="cut")
        assert list(example.tokens) == ids[:high]
        assert example.labelled.all() and len(example.labelled) == high


def test_text_that_is_too_long_can_be_left_out_as_in_the_paper():
    tokenizer = tiny.qwen()
    n = len(tokenizer(TEXT)["input_ids"])
    rules = Rules(max_length=n - 1, long="drop")
    found = make_examples(row(text=TEXT), tokenizer, rules)
    assert found == Made(reason=examples.LONGER, lost=n)
    assert len(made(row(text=TEXT), tokenizer, max_length=n, long="drop")[0]) == n


@any_tokenizer
@pytest.mark.parametrize("high", [5, 7, 1000])
def test_text_that_is_too_long_is_split_and_all_of_it_kept(tokenizer, high):
    tokenizer = tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    found = make_examples(row(text=TEXT), tokenizer, Rules(max_length=high))
    head = [ids[0]] if ids[0] == tokenizer.bos_token_id else []
    pieces = [list(example.tokens) for example in found.examples]
    assert all(piece[: len(head)] == head for piece in pieces)
    joined = head + [t for piece in pieces for t in piece[len(head) :]]
    assert joined in (ids, [*ids, tokenizer.eos_token_id])
    assert found.lost == 0 and all(len(piece) == high for piece in pieces[:-1])
    assert all(example.labelled.all() for example in found.examples)
    # An end below min_length is left out, and counted.
    least = len(pieces[-1]) + 1
    if least <= high < len(ids):
        short = make_examples(row(text=TEXT), tokenizer, Rules(least, high))
        assert (len(short.examples), short.lost) == (len(pieces) - 1, least - 1)


@any_tokenizer
def test_text_that_is_too_short_is_dropped_counting_no_eos(tokenizer):
    tokenizer = tokenizer()
    n = len(tokenizer(TEXT)["input_ids"])
    reason = reason_of(row(text=TEXT), tokenizer, Rules(min_length=n + 1))
    assert reason == examples.SHORTER


def test_text_that_brings_its_own_eos_gets_no_second_one():
    tokenizer = tiny.qwen()
    example = made(row(text=TEXT + "<|im_end|>"), tokenizer)
    assert list(example.tokens) == [*tokenizer(TEXT)["input_ids"], example.tokens[-1]]
    assert example.tokens[-1] == tokenizer.eos_token_id


def test_text_of_spaces_is_dropped_as_empty():
    assert reason_of(row(text=" \n"), tiny.llama_2(), Rules()) == examples.EMPTY


def test_text_with_a_tokenizer_without_eos_is_an_error_that_names_it():
    tokenizer = tiny.qwen.__wrapped__()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tiny-qwen.*eos_token"):
        make_examples(row(text=TEXT), tokenizer, Rules())


def test_conversations_are_never_cut_and_get_no_eos():
    tokenizer = tiny.qwen()
    tokens, labelled = chat.encode(TALK, tokenizer, "qwen")
    n = len(tokens)
    record, template = row(turns=TALK), "qwen"
    exact = {"min_length": n, "max_length": n}
    example = made(record, tokenizer, chat_template=template, **exact)
    np.testing.assert_array_equal(example.tokens, tokens)
    np.testing.assert_array_equal(example.labelled, labelled)
    longer = reason_of(record, tokenizer, Rules(0, n - 1, template))
    shorter = reason_of(record, tokenizer, Rules(n + 1, chat_template=template))
    assert (longer, shorter) == (examples.LONGER, examples.SHORTER)


def test_conversation_that_cannot_be_written_passes_its_reason_on():
    rules = Rules(chat_template="qwen")
    reason = reason_of(row(turns=TALK[:1]), tiny.qwen(), rules)
    assert reason == chat.NO_ASSISTANT and reason in examples.REASONS


def test_conversation_without_a_template_stops_instead_of_being_dropped():
    with pytest.raises(ValueError, match=r"data\.chat_template"):
        make_examples(row(turns=TALK), tiny.qwen(), Rules())


def test_tokenised_rows_are_taken_as_they_are_inside_the_lengths():
    tokenizer = tiny.qwen()
    ids = np.arange(10, 20)
    labels = np.where(np.arange(10) < 4, -100, ids)
    plain = made(row(tokens=(ids, None)), tokenizer, min_length=10, max_length=10)
    assert list(plain.tokens) == list(ids) and plain.labelled.all()
    assert plain.tokens.dtype == np.int32
    given = made(row(tokens=(ids, labels)), tokenizer)
    assert list(given.labelled) == [False] * 4 + [True] * 6
    record = row(tokens=(ids, None))
    assert reason_of(record, tokenizer, Rules(max_length=9)) == examples.LONGER
    assert reason_of(record, tokenizer, Rules(min_length=11)) == examples.SHORTER


@pytest.mark.parametrize(
    ("tokens", "labels", "reason"),
    [
        ([], None, examples.EMPTY),
        ([1, 2], [1], examples.LABELS_LENGTH),
        ([1, 2], [1, 3], examples.OTHER_LABELS),
        ([1, 2], [-100, -100], chat.NO_LABELS),
        ([1, 703], None, examples.OTHER_VOCABULARY),
        ([1, -100], None, examples.OTHER_VOCABULARY),
        ([1, 2**32 + 5], None, examples.OTHER_VOCABULARY),
    ],
)
def test_tokenised_row_that_cannot_be_right_has_a_reason(tokens, labels, reason):
    labels = None if labels is None else np.asarray(labels)
    record = row(tokens=(np.asarray(tokens, np.int64), labels))
    assert reason_of(record, tiny.qwen(), Rules()) == reason
    assert reason in examples.REASONS


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"min_length": -1}, "min_length=-1"),
        ({"min_length": 9, "max_length": 8}, "data.min_length=9, data.max_length=8"),
        ({"max_length": 0}, "max_length=0"),
        ({"long": "keep"}, "data.long='keep' is unknown: use split, cut, drop"),
        ({"heldout": 1.0}, r"data\.heldout=1.0 is a share"),
        ({"chat_template": "vicuna"}, r"data\.chat_template='vicuna'.*qwen"),
    ],
)
def test_impossible_rules_are_refused(rules, named):
    with pytest.raises(ValueError, match=named):
        Rules(**rules)


def test_shift_makes_each_token_predict_the_next_target():
    tokens = np.asarray([5, 6, 7, 8], np.int32)
    labels = shift(tokens, np.asarray([True, True, False, True]))
    assert labels.dtype == np.int32
    assert list(labels) == [6, -100, 8, -100]
    # The first token is nobody's target, the last predicts nothing.
    assert list(shift(tokens, np.ones(4, bool))) == [6, 7, 8, -100]
    assert list(shift(tokens[:1], np.ones(1, bool))) == [-100]
    assert len(shift(tokens[:0], np.ones(0, bool))) == 0


ENDING = pytest.mark.parametrize("added", text_tokenizers.ADDED)


@ENDING
@pytest.mark.parametrize("kind", ["gpt-2", "llama-2", "unigram first"])
def test_text_has_one_bos_and_one_eos_whoever_writes_them(kind, added):
    tokenizer = text_tokenizers.make(kind, added)
    front, eos = text_tokenizers.ADDED[added][0], tokenizer.eos_token_id
    for text in (f"{front}{TEXT}", TEXT, TEXT + text_tokenizers.EOS):
        tokens = made(row(text=text), tokenizer).tokens.tolist()
        assert tokens.count(eos) == 1 and tokens[-1] == eos
        assert tokens.count(tokenizer.bos_token_id) == bool(front)
    # What is cut has no eos in between, and the bos of the text in front of each piece.
    whole = make_examples(row(text=TEXT), tokenizer, Rules(max_length=20)).examples
    assert len(whole) > 1
    for example in whole[:-1]:
        assert eos not in example.tokens
        assert (example.tokens[0] == tokenizer.bos_token_id) == bool(front)


@ENDING
def test_a_conversation_ends_with_its_own_end_marker(added):
    tokenizer = text_tokenizers.make("llama-2", added)
    plain = made(row(turns=TALK), tokenizer, chat_template="no")
    assert plain.tokens[-1] == tokenizer.eos_token_id and plain.labelled[-1]
    assert list(plain.tokens).count(tokenizer.eos_token_id) == 1
    for template in ("mistral", "llama-2"):
        example = made(row(turns=TALK), tokenizer, chat_template=template)
        ids = tokenizer(
            chat.render(TALK, template)[0], add_special_tokens=False
        ).input_ids
        assert list(example.tokens[-len(ids) :]) == ids


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"text": f"{TEXT} <tool>"}, r" \('<tool>'\)"),
        ({"turns": (("user", "Q?"), ("assistant", "A <tool>"))}, r" \('<tool>'\)"),
        ({"tokens": (np.asarray([1, 703]), None)}, r" \('<tool>'\)"),
        ({"tokens": (np.asarray([1, 2**32 + 703]), None)}, ""),
    ],
)
def test_a_token_that_the_model_has_no_row_for_is_an_error(kind, said):
    tokenizer = tiny.qwen.__wrapped__()
    rules = Rules(chat_template="no")
    size = len(tokenizer)
    assert size == 703
    tokenizer.add_tokens(["<tool>"])
    beyond = rf"a.jsonl:1 has token ids .* the model has 0 to 702: \d+{said} has no row"
    with pytest.raises(ValueError, match=beyond):
        make_examples(row(**kind), tokenizer, rules, size)
    # An embedding may have more rows than its tokenizer has tokens.
    wide = make_examples(
        row(tokens=(np.asarray([1, 900]), None)), tokenizer, rules, 1000
    )
    assert list(wide.examples[0].tokens) == [1, 900]
    if "tokens" not in kind:
        assert make_examples(row(**kind), tokenizer, rules, size + 1).examples
