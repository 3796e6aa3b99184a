"""The tokenizer in a GGUF file, as one of transformers.

transformers makes one too, without torch by functions that move with its releases. It
knows no `smollm`, merges tokens that Llama-3's own tokenizer takes whole, and puts no
space in front of text that begins with one, which sentencepiece does.
"""

import collections
import dataclasses
import logging
from pathlib import Path
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
)

from beacon_jax.gguf.file import Header
from beacon_jax.names import meant

logger = logging.getLogger(__name__)

SPACE = "▁"  # what stands for a space in sentencepiece's tokens
# Types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before pairs are merged.

    Attributes:
      splits: patterns, each applied to the pieces of the one before; none: GPT-2's.
      digits: whether each digit is a piece, first of all.
      whole: whether a piece that is a token is not merged from its parts.
      bos: whether bos is put in front if the file does not say.
      nfc: whether text is composed (Unicode NFC) first.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = PreTokenizer((_WORDS % "{1,3}",), whole=True, bos=True)
# By tokenizer.ggml.pre; "default" is what llama.cpp does for it, and without a name.
PRE_TOKENIZERS = {
    "default": PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "gpt-2": PreTokenizer(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smollm": PreTokenizer(digits=True),
    "qwen2": PreTokenizer((_WORDS % "",), nfc=True),  # as Qwen's own tokenizer.json
    "deepseek-r1-qwen": PreTokenizer((_WORDS % "",)),
    "tekken": PreTokenizer((_TEKKEN,), whole=True, bos=True),
}


def has_tokenizer(path: Path) -> bool:
    """Tells whether a GGUF file has a tokenizer of any kind."""
    return "tokenizer.ggml.tokens" in Header(path).counts


def make_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a GGUF file as a PreTrainedTokenizerFast.

    Raises:
      FileNotFoundError: the file has none.
      ValueError: it is of a kind that is not read, or something of it is missing; the
        message names the file and the remedy.
    """
    from transformers import PreTrainedTokenizerFast

    header = Header(path, strings=True)
    kind = header.values.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in header.counts:
        raise FileNotFoundError(
            f"path={path} has no tokenizer: load the tokenizer of the base model."
        )
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{path}: tokenizer.ggml.model={kind!r} is not supported: only gpt2 "
            "(byte-level BPE) and llama (sentencepiece) are. Convert the model from "
            "its HF folder."
        )
    tokens = _list(header, "tokens")
    types = _list(header, "token_type", len(tokens))
    if len(set(tokens)) < len(tokens):
        twice = collections.Counter(tokens).most_common(1)[0][0]
        raise ValueError(
            f"{path}: the tokenizer has the token {twice!r} twice: use another file of "
            "the model."
        )
    special = {}
    for name, key in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("pad", "padding"),
    ):
        if f"tokenizer.ggml.{key}_token_id" in header.values:
            index = header.get(f"tokenizer.ggml.{key}_token_id", int)
            if not 0 <= index < len(tokens):
                raise ValueError(
                    f"{path}: tokenizer.ggml.{key}_token_id={index} is none of its "
                    f"{len(tokens)} tokens: use another file of the model."
                )
            special[f"{name}_token"] = tokens[index]
    try:
        make = _byte_level if kind == "gpt2" else _sentencepiece
        tokenizer, bos = make(header, tokens, types, special.get("unk_token"))
    except ValueError:
        raise
    except Exception as error:  # of the library: it has no class of its own
        raise ValueError(
            f"{path}: the tokenizer is damaged ({error}): download the file again."
        ) from error
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type_ != USER_DEFINED, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    _add_ends(header, tokenizer, special, bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=header.values.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _list(header: Header, key: str, length: int | None = None) -> list[Any]:
    """Returns an array of the tokenizer's metadata."""
    full = f"tokenizer.ggml.{key}"
    count = header.counts.get(full)
    if count is None or (length is not None and count != length):
        raise ValueError(
            f"{header.path}: {full} "
            + ("is missing" if count is None else f"has {count} entries, not {length}")
            + ", without which the tokenizer is not known: use a file that has it."
        )
    return list(header.values[full])


def _byte_level(
    header: Header, tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """Makes a tokenizer as GPT-2's, and says whether it puts bos in front."""
    del types, unknown  # every byte is a token
    name = header.values.get("tokenizer.ggml.pre")
    if name is None:
        name = "default"
        logger.warning(
            "%s does not say how its tokenizer cuts text (tokenizer.ggml.pre, older "
            "than May 2024): its tokens may not be those of the model's training. Use "
            "a newer file.",
            header.path,
        )
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{header.path}: tokenizer.ggml.pre={name!r} is not known: "
            f"{meant(name, PRE_TOKENIZERS)}only {', '.join(PRE_TOKENIZERS)} are. "
            "Convert the model from its HF folder."
        )
    pre = PRE_TOKENIZERS[name]
    # A token may begin with a space, so the pair is cut after the first character.
    pairs = [(m, m.find(" ", 1)) for m in _list(header, "merges")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(m[:at], m[at + 1 :]) for m, at in pairs],
            ignore_merges=pre.whole,
        )
    )
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
    steps = steps if pre.digits else []
    steps += [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    regex = not pre.splits
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.bos


def _sentencepiece(
    header: Header, tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """Makes a tokenizer as Llama-2's, and says whether it puts bos in front."""
    scores = _list(header, "scores", len(tokens))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    # sentencepiece, and so Llama-2's tokenizer.json, puts it before every text, even
    # one that begins with a space.
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([normalizers.Prepend(SPACE)] if prefix else []),
            normalizers.Replace(" ", SPACE),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer, True


def _merges(
    tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Lists the pairs that make a token, the token of the highest score first."""
    normal = {
        token: score
        for token, type_, score in zip(tokens, types, scores, strict=True)
        if type_ == NORMAL
    }
    found = [
        (-score, i, len(token) - i, token)
        for token, score in normal.items()
        for i in range(1, len(token))
        if token[:i] in normal and token[i:] in normal
    ]
    return [(token[:i], token[i:]) for _, i, _, token in sorted(found)]


def _add_ends(
    header: Header, tokenizer: Tokenizer, special: dict[str, str], bos: bool
) -> None:
    """Puts bos before and eos after each text, as the file says."""
    ends = []
    for name, default in (("bos", bos), ("eos", False)):
        used = header.get(f"tokenizer.ggml.add_{name}_token", bool, default)
        if used and f"{name}_token" not in special:
            raise ValueError(
                f"{header.path}: texts get {name}, but "
                f"tokenizer.ggml.{name}_token_id is missing: use another file of the "
                "model."
            )
        ends.append([special[f"{name}_token"]] if used else [])
    if any(ends):
        first, last = ends
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[
                *first,
                "$A",
                *last,
                *(f"{t}:1" for t in first),
                "$B:1",
                *(f"{t}:1" for t in last),
            ],
            special_tokens=[
                (token, tokenizer.token_to_id(token)) for token in {*first, *last}
            ],
        )
