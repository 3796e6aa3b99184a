"""Tiny tokenizers with the quirks of the real ones: bos, prefix space, offsets."""

import functools
import inspect
import json
import textwrap
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    inspect.getdoc(textwrap) or "",
    *(inspect.getsource(textwrap),) * 2,
    "user\nassistant\nsystem\nYou are a helpful assistant.\n\n\n\n" * 20,
    "[INST] What is it? [/INST] It is this. [INST] Why? [/INST] Because." * 20,
]
# How Qwen2 and Llama-3 cut text in front of their merges (letters, up to three digits,
# punctuation with its newlines, newlines with the spaces before them).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(specials: list[str], trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
    return tokenizer


def _sentencepiece(prepend_always: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    words = normalizers.Replace(" ", "▁")
    if prepend_always:  # Llama-2: in front of every piece between two specials
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), words])
    else:  # newer Mistral: only at the start of the text
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first", split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    # As in sentencepiece, merges keep to words, whose space leads.
    bare = Tokenizer(models.BPE(unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|▁+|\n"), "isolated")
    bare.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    trained = json.loads(bare.to_str())["model"]
    tokenizer.model = models.BPE(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in ("<s>", "</s>")]
    )
    _bos(tokenizer, "<s>")
    return tokenizer


def _bos(tokenizer: Tokenizer, bos: str) -> None:
    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = (
        processors.Sequence([before, template]) if before else template
    )


def _fast(tokenizer: Tokenizer, name: str, **tokens: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path=name,
        clean_up_tokenization_spaces=False,
        **tokens,
    )


@functools.cache
def qwen() -> Any:
    """Byte-level BPE, no bos, ChatML markers."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], False)
    tokenizer.normalizer = normalizers.NFC()
    return _fast(
        tokenizer, "tiny-qwen", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@functools.cache
def llama_3() -> Any:
    """Byte-level BPE that adds bos and leaves spaces out of its offsets."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
    tokenizer = _byte_level([*specials, "<|end_header_id|>", "<|eot_id|>"], True)
    _bos(tokenizer, "<|begin_of_text|>")
    return _fast(
        tokenizer,
        "tiny-llama-3",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )


@functools.cache
def llama_2() -> Any:
    """Byte-fallback BPE with bos and a space in front of every piece of text."""
    return _fast(
        _sentencepiece(True),
        "tiny-llama-2",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@functools.cache
def mistral() -> Any:
    """Byte-fallback BPE with bos and a space in front of the text only."""
    return _fast(
        _sentencepiece(False),
        "tiny-mistral",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
