"""From text to ids: what is added, and parts of a text beside the text as a whole."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beacon_jax.tokenise import check_ids, encode, encode_all, encode_spans, front
from tests.data import chat_tokenizers
from tests.text_tokenizers import ADDED, BOS, BYTE_LEVEL, EOS, KINDS, SPACED, TEXT, make

every_kind = pytest.mark.parametrize("kind", KINDS)
every_addition = pytest.mark.parametrize("added", ADDED)
PLACES = ("start", "bare", "behind")


def borders(tokenizer, text=TEXT):
    """Where the text as a whole has a border, and the ids in front and behind."""
    whole = encode(tokenizer, text, "bare").tolist()
    for at in range(1, len(text)):
        left = encode(tokenizer, text[:at], "bare").tolist()
        if whole[: len(left)] == left:
            yield at, left, whole[len(left) :]


@every_kind
@every_addition
@pytest.mark.parametrize("text", [TEXT, "A", ""])
def test_a_text_has_what_comes_in_front_and_nothing_behind(kind, added, text):
    tokenizer = make(kind, added)
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = [tokenizer.convert_tokens_to_ids(t) for t in ADDED[added][:1] if t]
    assert encode(tokenizer, text, "start").tolist() == first + bare
    assert encode(tokenizer, text, "bare").tolist() == bare
    assert front(tokenizer).tolist() == first
    assert tokenizer.eos_token_id not in encode(tokenizer, text, "behind")
    assert encode_all(tokenizer, [text, TEXT])[0] == bare
    for place in PLACES:
        assert encode(tokenizer, text, place).dtype == np.int32


@every_kind
@every_addition
def test_a_text_that_brings_its_bos_keeps_that_one(kind, added):
    tokenizer = make(kind, added)
    ids = encode(tokenizer, BOS + TEXT, "start").tolist()
    assert ids == tokenizer(BOS + TEXT, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


@every_addition
@pytest.mark.parametrize("kind", SPACED)
def test_parts_have_the_ids_of_the_text_wherever_it_has_a_border(kind, added):
    tokenizer = make(kind, added)
    found = list(borders(tokenizer))
    assert len(found) > 20
    for at, left, right in found:
        assert encode(tokenizer, TEXT[at:], "behind", TEXT[:at]).tolist() == right
        # T5 drops the space at the end of a text: only the text tells of it.
        if kind != "t5" or TEXT[at - 1] not in " \n":
            assert encode(tokenizer, TEXT[at:], "behind", left[-1]).tolist() == right
            assert encode(tokenizer, TEXT[at:], "behind").tolist() == right


@pytest.mark.parametrize("kind", ["llama-2", "metaspace always", "roberta"])
def test_a_word_in_two_parts_has_no_space_between_them(kind):
    tokenizer = make(kind)
    for at in range(1, len(TEXT)):
        left = encode(tokenizer, TEXT[:at], "start")
        right = encode(tokenizer, TEXT[at:], "behind", int(left[-1]))
        text = tokenizer.decode([*left.tolist(), *right.tolist()])
        assert text.removeprefix(" ") == TEXT


@pytest.mark.parametrize("kind", SPACED)
def test_behind_a_special_token_a_text_begins_as_it_does_in_the_whole(kind):
    tokenizer = make(kind)
    whole = encode(tokenizer, f"river{EOS}stone", "bare").tolist()
    at = whole.index(tokenizer.eos_token_id) + 1
    assert encode(tokenizer, "stone", "behind", whole[at - 1]).tolist() == whole[at:]
    assert encode(tokenizer, "stone", "behind", f"river{EOS}").tolist() == whole[at:]


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "gemma"])
def test_tokenizers_that_add_no_space_encode_a_part_by_itself(kind):
    tokenizer = make(kind)
    for at in range(len(TEXT)):
        alone = tokenizer(TEXT[at:], add_special_tokens=False)["input_ids"]
        for after in (None, tokenizer.eos_token_id, TEXT[:at] or None):
            assert encode(tokenizer, TEXT[at:], "behind", after).tolist() == alone


@pytest.mark.parametrize("name", ["qwen", "llama_3", "llama_2", "mistral"])
def test_ids_of_a_text_are_those_of_the_tokenizer(name):
    tokenizer = getattr(chat_tokenizers, name)()
    for text in chat_tokenizers.CORPUS:
        assert encode(tokenizer, text, "start").tolist() == tokenizer(text)["input_ids"]


@every_kind
@pytest.mark.parametrize("place", PLACES)
def test_spans_are_the_characters_of_each_token(kind, place):
    tokenizer = make(kind, "both")
    ids, spans = encode_spans(tokenizer, TEXT, place)
    assert ids.tolist() == encode(tokenizer, TEXT, place).tolist()
    assert spans.shape == (len(ids), 2)
    if place == "start":
        assert spans[0].tolist() == [0, 0]
    at = TEXT.index("41")
    inside = [i for i, (a, b) in enumerate(spans) if a < at + 2 and b > at]
    assert "41" in tokenizer.decode(ids[inside])
    assert spans[-1, 1] == len(TEXT)


def test_unknown_characters_are_not_lost_behind_another_text():
    """A vocabulary of five letters: most marks are unknown to it."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "c": 5, "▁ab": 6}
    merges = [("▁", "a"), ("▁a", "b")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert encode(fast, "ab", "bare").tolist() == [6]
    assert encode(fast, "ab", "behind").tolist() == [2, 3]
    assert encode(fast, "xab", "behind").tolist() == [0, 2, 3]
    # Unknown ones next to each other are one token, even over a border.
    assert encode(fast, "xy", "behind", "ax").tolist() == [0]


def test_a_tokenizer_without_any_mark_encodes_a_part_by_itself():
    """Words as a whole: behind every mark it has other tokens."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "the": 1, "a": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    assert encode(fast, "the a", "behind").tolist() == [1, 2]


def words_of(kind):
    """A tokenizer whose tokens tell of words, and that drops the spaces."""
    letters = sorted({*"argumentsofhe"})
    if kind == "wordpiece":
        names = [*letters, *(f"##{x}" for x in letters), "arg", "##um", "!"]
        vocab = {x: i for i, x in enumerate(["?", *names])}
        model = models.WordPiece(vocab=vocab, unk_token="?")
    elif kind == "</w>":
        names = [*letters, *(f"{x}</w>" for x in letters), "ar", "arg", "um", "!"]
        merges = [("a", "r"), ("ar", "g"), ("u", "m")]
        model = models.BPE(
            {x: i for i, x in enumerate(["?", *names])},
            merges,
            unk_token="?",
            end_of_word_suffix="</w>",
        )
    else:
        names = ["arg", "ument", "argument", "of", "the", "!"]
        model = models.WordLevel({x: i for i, x in enumerate(["?", *names])}, "?")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.mark.parametrize("kind", ["wordpiece", "</w>", "word list"])
def test_a_border_of_parts_is_one_of_words_where_tokens_tell_of_words(kind):
    """Specification section 8; the ids of the whole at its borders of words only."""
    tokenizer = words_of(kind)
    ids = lambda text: encode(tokenizer, text, "bare").tolist()
    behind = lambda text, after: encode(tokenizer, text, "behind", after).tolist()
    text = "the argument of the ument"
    for at in range(1, len(text)):
        front, rest = text[:at], text[at:]
        for after in (None, front, ids(front)[-1]):
            assert behind(rest, after) == ids(rest)
        parts = ids(front) + behind(rest, front)
        assert parts == ids(f"{front} {rest}")
        assert (parts == ids(text)) == (" " in (text[at - 1], text[at]))


def test_a_token_without_a_row_is_named_with_its_text():
    tokenizer = make.__wrapped__("qwen2")
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("x" * 90)])
    good = encode(tokenizer, TEXT, "start")
    check_ids(good, size, "prompt", tokenizer)
    check_ids(np.zeros((0, 3)), size, "prompt", tokenizer)
    bad = encode(tokenizer, f"{TEXT} <tool>", "start")
    said = rf"prompt has token ids from \d+ to {size}, the model has 0 to {size - 1}: "
    with pytest.raises(ValueError, match=rf"{said}{size} \('<tool>'\) has no row"):
        check_ids(bad.reshape(1, -1), size, "prompt", tokenizer)
    with pytest.raises(ValueError, match=rf"{size + 1} \('x+\.\.\.\) has no row"):
        check_ids([size + 1], size, "prompt", tokenizer)
    for unknown in (-1, 10**30):
        with pytest.raises(ValueError, match=rf": {unknown} has no row"):
            check_ids([1, unknown], size, "prompt", tokenizer)
    with pytest.raises(ValueError, match=rf": {size} has no row"):
        check_ids(bad, size, "prompt")


def test_what_a_tokenizer_cannot_encode_is_named():
    model = models.BPE(vocab={"a": 0}, merges=[], unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(
        ValueError, match="cannot encode 'ab'.*leave out the characters"
    ):
        encode(tokenizer, "ab", "start")
    with pytest.raises(ValueError, match="cannot encode"):
        encode_all(tokenizer, ["ab"])
