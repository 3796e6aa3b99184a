"""Segments: lossless, short enough, and cut at the best boundary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.data.segments import split, token_counter
from tests.data import chat_tokenizers as tiny

guess = token_counter()


def count(texts):
    if not texts:
        return []
    made = tiny.qwen()(list(texts), add_special_tokens=False)["input_ids"]
    return [len(ids) for ids in made]


PARAGRAPHS = "\n\n".join(
    " ".join(f"The sentence {i} {j} of this text ends here." for j in range(1 + i % 5))
    for i in range(30)
)


@pytest.mark.parametrize("counter", [guess, count])
@pytest.mark.parametrize("size", [8, 40, 200, 10_000])
def test_segments_join_to_the_text_and_none_is_too_long(counter, size):
    pieces = split(PARAGRAPHS, size, counter)
    assert "".join(pieces) == PARAGRAPHS
    assert max(counter(pieces)) <= size
    # Two neighbours do not fit into one, so there are at most twice as many as needed.
    if size >= 40:
        assert len(pieces) <= 2 * counter([PARAGRAPHS])[0] / size + 1


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(st.sampled_from("ab。é .\n!漢😀\t"), max_size=300),
    size=st.integers(8, 60),
)
def test_any_text_is_split_without_loss(text, size):
    for counter in (guess, count):
        pieces = split(text, size, counter)
        assert "".join(pieces) == text
        assert all(n <= size for n in counter(pieces)) and all(pieces)


def test_cuts_are_at_paragraphs_if_they_fit():
    pieces = split(PARAGRAPHS, 120, guess)
    assert len(pieces) > 5
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])


def test_cuts_are_at_sentences_where_a_paragraph_is_too_long():
    text = PARAGRAPHS.replace("\n\n", " ")
    pieces = split(text, 60, guess)
    assert all(piece.endswith("here. ") for piece in pieces[:-1])
    chinese = "这是一句话。" * 40
    assert all(piece.endswith("。") for piece in split(chinese, 20, guess))


def test_no_word_is_cut_unless_it_alone_is_too_long():
    text = "word " * 200
    assert all(piece.endswith(" ") for piece in split(text, 30, guess))
    blob = "x" * 500
    pieces = split(f"some words {blob} and more", 20, guess)
    assert "".join(pieces) == f"some words {blob} and more"
    assert max(guess(pieces)) <= 20 and len(pieces) <= 20


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="segment_tokens=7"):
        split("a", 7, guess)
    with pytest.raises(ValueError, match="nowhere.*no tokenizer could be loaded"):
        token_counter(tmp_path / "nowhere")


def test_counter_counts_with_the_tokenizer_of_a_folder(tmp_path):
    tiny.llama_3().save_pretrained(tmp_path)
    counter = token_counter(tmp_path)
    text = "Wrap a single paragraph."
    tokens = tiny.llama_3()(text, add_special_tokens=False)["input_ids"]
    assert counter([text, ""]) == [len(tokens), 0]
    assert guess([text, "漢字"]) == [8, 2]
