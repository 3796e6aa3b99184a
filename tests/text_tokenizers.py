"""Small tokenizers of every kind that begins texts in its own way.

Each is trained on TEXT, without network, and can put tokens in front of a text and
behind it, as Llama (bos), T5 (eos) and BERT (both) do.
"""

import functools
from collections import Counter
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

TEXT = (
    "The argument of the old engine: a river runs past the stone mill, and 41 boats "
    "wait. Nobody knew why!\nIt rained; the miller (a quiet man) argued on.\n\n"
    "Question: who argued? Answer: A. The document begins here, and ends there."
)
BOS, EOS, END = "<s>", "</s>", "<|end|>"
SPECIALS = ["<unk>", BOS, EOS, END]
# In front, behind: what a post-processor may add.
ADDED = {"nothing": ("", ""), "bos": (BOS, ""), "eos": ("", EOS), "both": (BOS, EOS)}
BYTE_LEVEL = ("gpt-2", "qwen2")
# Those that begin a text otherwise than its parts: by a space in front of it.
SPACED = (
    "roberta",  # byte-level
    "stripped",  # byte-level; drops the space that is there instead
    "llama-2",  # in front of every piece between special tokens
    "metaspace always",
    "metaspace first",
    "unigram always",
    "unigram first",
    "unigram never split",
    "t5",  # drops spaces, each word gets one
)
KINDS = (*BYTE_LEVEL, *SPACED, "gemma")  # the last one has none
_QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


@functools.cache
def make(kind: str, added: str = "nothing") -> Any:
    """Makes a tokenizer of transformers; it has chat tokens, bos and eos."""
    tokenizer = _trained(kind)
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in (BOS, EOS, END)]
    )
    front, behind = ADDED[added]
    if added != "nothing":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{front} $A {behind}".strip(),
            special_tokens=[
                (s, tokenizer.token_to_id(s)) for s in (front, behind) if s
            ],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path=f"{kind}, {added}",
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _trained(kind: str) -> Tokenizer:
    if kind in (*BYTE_LEVEL, "roberta", "stripped"):
        return _byte_level(kind)
    unigram = kind.startswith("unigram") or kind == "t5"
    model = models.Unigram(*_pieces()) if unigram else models.BPE(unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    words = normalizers.Replace(" ", "▁")
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), words])
        tokenizer.decoder = _llama_decoder()
    elif kind == "gemma":
        tokenizer.normalizer = words
        tokenizer.decoder = decoders.Replace("▁", " ")
    elif kind == "t5":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
    else:
        scheme = "first" if "first" in kind else "always"
        split = "never split" not in kind
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split)
    if unigram:
        return tokenizer
    # As in sentencepiece, merges keep to words, whose space leads.
    bare = Tokenizer(models.BPE(unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|▁+|\n"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=180,
        special_tokens=SPECIALS,
        initial_alphabet=sorted({*TEXT.replace(" ", "▁")}),
        show_progress=False,
    )
    bare.train_from_iterator([f"▁{TEXT}".replace(" ", "▁")] * 8, trainer)
    tokenizer.model = bare.model
    return tokenizer


def _byte_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if kind == "stripped":
        tokenizer.normalizer = normalizers.Strip(left=True, right=False)
    cut = [pre_tokenizers.ByteLevel(add_prefix_space=kind == "roberta")]
    if kind == "qwen2":
        cut = [
            pre_tokenizers.Split(Regex(_QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 8, trainer)
    return tokenizer


def _pieces() -> tuple[list[tuple[str, float]], int]:
    """Pieces of TEXT and their scores: fewer pieces are better, then frequent ones."""
    text = f"▁{TEXT}".replace(" ", "▁")
    found = Counter(
        text[i : i + n]
        for n in range(2, 8)
        for i in range(len(text) - n + 1)
        if not {*"▁\n"} & {*text[i + 1 : i + n]} and text[i] != "\n"
    )
    pieces = sorted(piece for piece, n in found.items() if n > 1) + sorted({*text})
    # A number more for each, so that no two ways to cut a text are equally good.
    scores = [-8.0 - 1 / (1 + found[p]) - i * 0.00137 for i, p in enumerate(pieces)]
    return [("<unk>", 0.0), *zip(pieces, scores, strict=True)], 0


def _llama_decoder() -> Any:
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    return decoders.Sequence([replace, decoders.Fuse(), strip])
