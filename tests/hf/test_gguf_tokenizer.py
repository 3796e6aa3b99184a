"""The tokenizer of a GGUF file: which tokens a text gets, written out by hand."""

import logging

import numpy as np
import pytest

from beacon_jax.resources import load_tokenizer, save_tokenizer
from tests.hf.gguf_files import byte_level, write_gguf

TEXT = "It's 12345 HÉLLOw x_1;\n\n  漢字🎉!!\t ok "
# How each pattern cuts it, read from the pattern; the runs of spaces tell them apart.
PIECES = {
    "gpt-2": ["It", "'s", " 12345", " HÉLLOw", " x", "_", "1", ";", "\n\n ", " 漢字",
              "🎉!!", "\t", " ok", " "],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", " HÉLLOw", " x", "_", "1", ";",
               "\n\n ", " 漢字", "🎉!!", "\t", " ok", " "],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " HÉLLOw", " x", "_", "1",
              ";\n\n", " ", " 漢字", "🎉!!", "\t", " ok", " "],
    "llama-bpe": ["It", "'s", " ", "123", "45", " HÉLLOw", " x", "_", "1", ";\n\n",
                  " ", " 漢字", "🎉!!", "\t", " ok", " "],
    "tekken": ["It", "'s", " ", "1", "2", "3", "4", "5", " HÉLLOw", " x", "_", "1",
               ";\n\n", " ", " 漢字", "🎉!!", "\t", " ok", " "],
    # Punctuation first, then GPT-2's, then numbers, then each three digits.
    "default": ["It", "'", "s", " ", "123", "45", " HÉLLOw", " x", "_", "1", ";",
                "\n\n ", " 漢字", "🎉", "!!", "\t", " ok", " "],
}  # fmt: skip


def make(tmp_path, values, **changes):
    values = {**values, **changes}
    return load_tokenizer(write_gguf(tmp_path / "t.gguf", "llama", values, {}))


@pytest.mark.parametrize("pre", list(PIECES))
def test_each_pre_tokenizer_cuts_as_its_pattern(tmp_path, pre):
    pieces = PIECES[pre]
    assert "".join(pieces) == TEXT
    tokenizer = make(tmp_path, byte_level(pieces, pre))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == pieces
    assert tokenizer.decode(ids) == TEXT
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in (TEXT, "<s>ab<think>c</s>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tekken_cuts_before_a_capital_and_others_do_not(tmp_path):
    for pre, pieces in (
        ("tekken", ["get", "Name", "HTTPServer", " don", "'t"]),
        ("qwen2", ["getNameHTTPServer", " don", "'t"]),
    ):
        tokenizer = make(tmp_path, byte_level(pieces, pre))
        ids = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode([i]) for i in ids] == pieces


def test_a_file_without_a_pre_tokenizer_is_read_as_default_and_says_so(
    tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        tokenizer = make(tmp_path, byte_level(PIECES["default"], None))
    assert "t.gguf does not say how its tokenizer cuts text" in caplog.text
    assert len(tokenizer.tokenize(TEXT)) == len(PIECES["default"])


def test_whole_pieces_are_tokens_without_merges_where_the_model_has_it_so(tmp_path):
    values = byte_level(["ab"], "llama-bpe")
    values["tokenizer.ggml.tokens"] = [*values["tokenizer.ggml.tokens"], "xyz"]
    values["tokenizer.ggml.token_type"] = [*values["tokenizer.ggml.token_type"], 1]
    assert make(tmp_path, values).tokenize("xyz") == ["xyz"]
    values["tokenizer.ggml.pre"] = "qwen2"
    assert make(tmp_path, values).tokenize("xyz") == ["x", "y", "z"]


def test_qwen2_composes_characters_as_its_own_tokenizer_does(tmp_path):
    tokenizer = make(tmp_path, byte_level(["é"], "qwen2"))
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]
    gpt2 = make(tmp_path, byte_level(["é"], "gpt-2"))
    assert gpt2("e\u0301")["input_ids"] != gpt2("é")["input_ids"]


def test_control_and_user_defined_tokens_are_never_cut(tmp_path):
    tokenizer = make(tmp_path, byte_level(["ab"], "gpt-2"))
    ids = tokenizer("ab<s>ab<think></s>", add_special_tokens=False)["input_ids"]
    assert ids[1] == 0 and ids[3:] == [2, 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abab<think>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, "x"),
        ("llama-bpe", {}, "<s>x"),
        ("tekken", {}, "<s>x"),
        ("llama-bpe", {"bos": False}, "x"),
        ("gpt-2", {"bos": True, "eos": True}, "<s>x</s>"),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, pre, flags, expected):
    given = {f"tokenizer.ggml.add_{k}_token": v for k, v in flags.items()}
    tokenizer = make(tmp_path, byte_level(["ab"], pre) | given)
    assert tokenizer.decode(tokenizer("x")["input_ids"]) == expected
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.decode(again("x")["input_ids"]) == expected


def test_the_chat_template_comes_with_it(tmp_path):
    template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    values = byte_level(["ab"], "gpt-2") | {"tokenizer.chat_template": template}
    save_tokenizer(make(tmp_path, values), tmp_path / "saved")
    messages = [{"role": "user", "content": "ab"}]
    again = load_tokenizer(tmp_path / "saved")
    assert again.apply_chat_template(messages, tokenize=False) == "<s>ab"


# Sentencepiece: <unk>, <s>, </s>, bytes, then pieces; a higher score merges earlier.
SCORES = {
    "▁": -9.0, "a": -9.1, "b": -9.2, "c": -9.3, "d": -9.4,
    "ab": -3.0, "bc": -2.0, "▁a": -4.0, "▁ab": -5.0, "abc": -6.0, "bcd": -7.0,
    "▁▁": -1.0,
}  # fmt: skip
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        *("<unk>", "<s>", "</s>"),
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *SCORES,
        "<tool>",
    ],
    "tokenizer.ggml.scores": [0.0] * 259 + [*SCORES.values(), 0.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(SCORES) + [4],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # bc (-2) before ab (-3); then nothing but ▁a (-4) is left to merge.
        ("abc", ["▁a", "bc"]),
        ("abab", ["▁ab", "ab"]),
        ("bcd", ["▁", "bcd"]),
        # A space in front of the one that is there: sentencepiece's dummy prefix.
        (" ab", ["▁▁", "ab"]),
        ("a b", ["▁a", "▁", "b"]),
        ("aé", ["▁a", "<0xC3>", "<0xA9>"]),
        ("漢", ["▁", "<0xE6>", "<0xBC>", "<0xA2>"]),
        ("a\n", ["▁a", "<0x0A>"]),
        # After a token that is never cut, the text begins anew.
        ("a<tool>ab</s>b", ["▁a", "<tool>", "▁ab", "</s>", "▁", "b"]),
    ],
)
def test_sentencepiece_merges_the_best_score_and_falls_back_to_bytes(
    tmp_path, text, pieces
):
    tokenizer = make(tmp_path, SPM)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *pieces]
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(text)["input_ids"] == ids


def test_sentencepiece_gives_the_text_back(tmp_path):
    for prefix in (True, False):
        values = {"tokenizer.ggml.add_space_prefix": prefix}
        tokenizer = make(tmp_path, SPM, **values)
        for text in ("ab  cd\n\t", " ab", "漢字 🎉 é", "  a"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
            first = tokenizer.convert_ids_to_tokens(ids)[0]
            assert first.startswith("▁") == (prefix or text[0] == " ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.pre": "qwen3"}, "pre='qwen3' is not known: did you mean"),
        ({"tokenizer.ggml.model": "bert"}, "model='bert' is not supported: only gpt2"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "the tokenizer is damaged"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type has 2 entries, not"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id=9999 is none of its"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1],
          "tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None},
         "has the token 'a' twice"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
         "texts get bos, but"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_not_known_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=rf"t\.gguf.*{said}"):
        make(tmp_path, byte_level(["ab"], "gpt-2"), **changes)


def test_a_file_without_a_tokenizer_is_told_apart(tmp_path):
    tensors = {"token_embd.weight": np.ones((4, 8), np.float32)}
    file = write_gguf(tmp_path / "t.gguf", "llama", {}, tensors)
    with pytest.raises(FileNotFoundError, match=r"t\.gguf has no tokenizer"):
        load_tokenizer(file)
