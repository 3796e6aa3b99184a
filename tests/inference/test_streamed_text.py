"""Text while tokens come: whole characters, stop strings, tokens to keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beacon_jax.inference.text import Streamer, finisher, first_stop, held_back

# Bytes, then tokens of several characters, as real vocabularies have them.
WORDS = ["ab", "abc", ".\n", "\n\n", " the", "xy", "€", "a€"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = [byte.pre_tokenize_str(w) for w in WORDS]
    spelled = ["".join(part for part, _ in parts) for parts in spelled]
    vocab = {c: i for i, c in enumerate([*alphabet, *spelled])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = make_tokenizer()
PIECES = ["▁", "▁Hello", "▁the", "ab", "▁▁", "x", "é", "<0xE2>", "<0x82>", "<0xAC>"]


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama-2's: the space that a text begins with is stripped."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


SENTENCEPIECE = make_sentencepiece()


def ids(*parts: str) -> list[int]:
    """Token ids: a word of WORDS is one token, other text its bytes."""
    result = []
    for part in parts:
        if part in WORDS:
            result.append(256 + WORDS.index(part))
        else:
            result += split_bytes(part)
    return result


def split_bytes(text: str) -> list[int]:
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = "".join(part for part, _ in byte.pre_tokenize_str(text))
    return [TOKENIZER.backend_tokenizer.token_to_id(c) for c in spelled]


def stream(tokens, stop=(), block=3):
    """(pieces shown before the end, streamer, whole text) of tokens fed in blocks."""
    pieces = []
    streamer = Streamer(TOKENIZER, pieces.append, stop)
    for start in range(0, len(tokens), block):
        if streamer.add(tokens[start : start + block]) is not None:
            break
    before = list(pieces)
    text = streamer.finish()
    assert "".join(pieces) == text
    return before, streamer, text


@pytest.mark.parametrize("block", [1, 2, 16])
def test_without_stop_strings_the_pieces_join_to_the_text_of_all_tokens(block):
    tokens = ids("Grüße ", "abc", " für 5 €, ", " the", " 👍 end.")
    before, streamer, text = stream(tokens, block=block)
    assert text == "Grüße abc für 5 €,  the 👍 end." == TOKENIZER.decode(tokens)
    assert streamer.keep is None and len(streamer) == len(tokens)
    assert not any("\ufffd" in piece for piece in before)


def test_a_character_is_shown_once_its_last_byte_is_there():
    shown = []
    streamer = Streamer(TOKENIZER, shown.append)
    for token in split_bytes("5€!"):
        streamer.add([token])
    assert shown == ["5", "€", "!"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokens = ids("a") + split_bytes("€")[:2]
    before, _, text = stream(tokens)
    assert before == ["a"] and text == "a\ufffd" == TOKENIZER.decode(tokens)


@settings(deadline=None, max_examples=200)
@given(
    tokens=st.lists(st.integers(0, 255 + len(WORDS)), max_size=40),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=40),
)
def test_any_tokens_in_any_blocks_give_the_text_of_decoding_them_at_once(tokens, cuts):
    streamer, start = Streamer(TOKENIZER), 0
    for cut in cuts * 40:
        streamer.add(tokens[start : start + cut])
        start += cut
    assert streamer.finish() == TOKENIZER.decode(tokens)


@settings(deadline=None, max_examples=200)
@given(
    parts=st.lists(st.sampled_from([*PIECES[:7], "€"]), max_size=30),
    block=st.integers(1, 9),
)
def test_only_the_first_space_of_a_text_is_stripped(parts, block):
    spelled = [PIECES[7:] if part == "€" else [part] for part in parts]
    tokens = [PIECES.index(piece) for pieces in spelled for piece in pieces]
    streamer = Streamer(SENTENCEPIECE)
    for start in range(0, len(tokens), block):
        streamer.add(tokens[start : start + block])
    expected = "".join(parts).replace("▁", " ")
    assert streamer.finish() == expected.removeprefix(" ")


@pytest.mark.parametrize("block", [1, 2, 5, 16])
@pytest.mark.parametrize(
    ("parts", "stop", "text", "kept"),
    [
        (["one", "END", "two"], ["END"], "one", 3),  # spans tokens
        (["one", "abc", "two"], ["b"], "onea", 3),  # inside a token
        (["say", ".\n", "two"], ["\n"], "say.", 3),  # begins inside a token
        (["say", ".\n", "\n\n"], ["\n\n"], "say.", 3),  # begins inside, spans two
        (["q", "a€", "z"], ["€"], "qa", 1),
        (["q€", "z"], ["€"], "q", 1),  # a character of three tokens
        (["q€€", "z"], ["€z"], "q€", 4),
        (["END"], ["END"], "", 0),  # nothing is left
        (["one E", "ND"], ["END", "ONE"], "one ", 4),
        (["aab", "x"], ["aab"], "", 0),  # a longer beginning did not fit at first
        (["xabcd"], ["abcd", "bc"], "xa", 2),  # the end that comes first
        (["xabc"], ["bc", "abc"], "x", 1),  # ends together: the longest
    ],
)
def test_a_stop_string_ends_the_text_before_it(parts, stop, text, kept, block):
    tokens = ids(*parts, "more", "END", "END")
    _, streamer, found = stream(tokens, stop, block)
    assert (found, streamer.keep) == (text, kept)
    assert text.startswith(TOKENIZER.decode(tokens[:kept]))


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot():
    shown = []
    streamer = Streamer(TOKENIZER, shown.append, ["###"])
    for part in ("a#", "#", "b", "##"):
        streamer.add(ids(part))
    assert shown == ["a", "##b"]
    assert streamer.finish() == "a##b##" == "".join(shown)


def test_after_a_stop_string_no_tokens_are_taken():
    streamer = Streamer(TOKENIZER, None, "!")
    assert streamer.add(ids("a!b")) == 1
    assert streamer.add(ids("cd")) == 1
    assert streamer.finish() == "a" and len(streamer) == 3


@settings(deadline=None, max_examples=300)
@given(
    parts=st.lists(st.sampled_from([*WORDS, "a", "b", "\n", "é"]), max_size=24),
    stop=st.lists(
        st.text(st.sampled_from("abc\né€."), min_size=1, max_size=3), max_size=3
    ),
    block=st.integers(1, 9),
)
def test_text_and_tokens_to_keep_do_not_depend_on_the_blocks(parts, stop, block):
    tokens = ids(*parts)
    whole = TOKENIZER.decode(tokens)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    _, streamer, text = stream(tokens, stop, block)
    if not ends:
        assert text == whole and streamer.keep is None
        return
    assert text == whole[: min(ends)[1]]
    assert not any(s in text for s in stop)
    # The tokens before the one in which the match begins, counted in bytes.
    sizes = [len(w.encode()) for w in WORDS]
    spans = np.cumsum([1 if t < 256 else sizes[t - 256] for t in tokens])
    assert streamer.keep == int((spans <= len(text.encode())).sum())


def test_the_callback_of_decode_feeds_each_row_what_is_new():
    streamers = [Streamer(TOKENIZER, None, ["END"]) for _ in range(2)]
    finished = finisher(streamers)
    first, second = np.array(ids("one ENDx")), np.array(ids("two"))
    assert finished(0, first[:5]) is None
    assert finished(1, second) is None
    assert finished(0, first) == 4
    assert [s.finish() for s in streamers] == ["one ", "two"]


def test_first_stop_takes_the_end_that_comes_first():
    assert first_stop("xabcd", ["abcd", "bc"]) == 2
    assert first_stop("xabc", ["bc", "abc"]) == 1
    assert first_stop("xabc", []) is None
    assert first_stop("abab", ["ab"], 1) == 2


def test_held_back_is_the_longest_beginning_of_a_stop_string():
    assert held_back("xaab", ["abc"]) == 2
    assert held_back("xaaa", ["aab", "aaaa"]) == 3
    assert held_back("x", ["ab"]) == 0
    assert held_back("a", ["abcdef"]) == 1


def test_a_model_without_tokenizer_has_no_text_and_no_stop_strings():
    streamer = Streamer(None)
    assert streamer.add([1, 2]) is None and streamer.finish() == ""
    assert len(streamer) == 2
    with pytest.raises(ValueError, match=r"stop=\['x'\] needs text, but tokenizer=N"):
        Streamer(None, None, ["x"])
    with pytest.raises(ValueError, match="stop has an empty string"):
        Streamer(TOKENIZER, None, ["x", ""])
