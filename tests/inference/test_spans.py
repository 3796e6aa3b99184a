"""Lossless spans: from expressions to tokens."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from beacon_jax.inference import spans as module
from beacon_jax.inference.spans import check_spans, token_spans


@pytest.fixture(scope="module")
def words():
    """A token per word or run of digits, a <bos> in front of a text."""
    vocab = {"<bos>": 0, "?": 1, "the": 2, "code": 3, "is": 4, "4711": 5, "and": 6}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        (r"\d+", [[4, 5], [8, 9]]),
        (re.compile("THE CODE", re.IGNORECASE), [[1, 3]]),
        ("od", [[2, 3]]),  # a part of a word takes all of it
        (r"is 47", [[3, 5]]),
        ("x*", []),  # empty matches hold nothing
        (" ", []),  # between the tokens
        ("missing", []),
    ],
)
def test_every_token_is_taken_that_shares_a_character(words, spans, expected):
    text = "the code is 4711 and and and 815"
    assert token_spans(spans, text, words).tolist() == expected
    without = token_spans(spans, text, words, first=False)
    assert without.tolist() == [[a - 1, b - 1] for a, b in expected]


@settings(deadline=None)
@given(text=st.text(max_size=40), digits=st.lists(st.integers(0, 9999), max_size=3))
def test_bytes_of_every_match_are_inside_the_spans(model, text, digits):
    for number in digits:
        text += f" ä{number}é"
    found = token_spans(r"\d+é", text, model.tokenizer)
    ids = model.tokenizer(text, verbose=False)["input_ids"]
    inside = np.zeros(len(ids), bool)
    for start, stop in found:
        assert 0 <= start < stop <= len(ids)
        inside[start:stop] = True
    raw = text.encode()
    assert len(raw) == len(ids)  # a token per byte
    expected = np.zeros(len(raw), bool)
    for match in re.finditer(r"\d+é", text):
        before = len(text[: match.start()].encode())
        expected[before : before + len(match[0].encode())] = True
    assert inside.tolist() == expected.tolist()


def test_token_ranges_are_returned_as_they_are():
    assert token_spans([(3, 5), (1, 2)]).tolist() == [[3, 5], [1, 2]]
    assert token_spans(None).shape == token_spans([]).shape == (0, 2)


def test_expressions_that_cannot_be_used_say_why(words):
    with pytest.raises(ValueError, match=r"spans='x' is an expression, but token ids"):
        token_spans("x", None, words)
    with pytest.raises(ValueError, match=r"needs a fast tokenizer \(tokenizer.json\)"):
        token_spans(re.compile("x"), "text", None)
    with pytest.raises(ValueError, match=r"spans='\(' is not a regular expression: "):
        token_spans("(", "text", words)


@pytest.mark.parametrize("spans", ["(a+)+$", r"(\w+\s?)*$", re.compile("(a|aa)+$")])
def test_a_search_that_does_not_end_is_an_error(words, spans, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with pytest.raises(ValueError, match=r"spans=.* is neither found nor.*\(start, st"):
        token_spans(spans, "a" * 4000 + "!", words)


@pytest.mark.parametrize(
    ("spans", "times"),
    [
        ("(?:a{6000}){6000}", "36,000,000"),
        ("a{900000}", "900,000"),
        (r"((x{50}|[)]{400}){50}y){20}", "400,000"),
        ("a{" + "9" * 5000 + "}", "999,999,999,999"),
        (re.compile("(?:a{1000,}){1000}"), "1,000,000"),
    ],
)
def test_a_number_of_repeats_that_fills_the_memory_is_an_error(spans, times):
    with pytest.raises(ValueError, match=rf"repeats something {times} times, at most"):
        check_spans(spans)


@pytest.mark.parametrize("spans", [r"\d{4}-\d{2}", "[{900000}]", r"a\{900000}", "a{9"])
def test_other_numbers_in_an_expression_are_left_alone(spans):
    check_spans(spans)


def test_the_flags_of_a_compiled_expression_are_kept(words):
    text = "the code is 4711"
    flags = re.IGNORECASE | re.VERBOSE | re.ASCII
    found = token_spans(re.compile("THE   # a comment", flags), text, words)
    assert found.tolist() == [[1, 2]]
