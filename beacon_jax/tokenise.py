"""Turns text into token ids: one way for reading, asking, measuring and training.

A text begins in one of three places:

  start    a text of its own. It has what the tokenizer puts in front (bos), but never
           twice: a text that brings its bos keeps that one.
  bare     a text that nothing is added to: a chat template has written its special
           tokens, and documents of a stream are joined by eos.
  behind   a text that goes on behind another one, of which the tokens are known.

What a tokenizer puts behind a text of its own accord (eos, [SEP]) is never added: a
prompt has to go on, and training adds its own eos (docs/specification.md section 8).

Some tokenizers begin every text with a space that is not there, Llama-2's "▁", or drop
the one that is. Two texts that are encoded one after the other would have it in
between, "arg" and "ument" would become "arg ument". So a text behind another one is
encoded behind a character that melts into nothing, and the tokens of that character are
left out. The ids are those of both texts in one, wherever that has a border of tokens
there. Other tokenizers encode it by itself. Those whose tokens say where a word begins
or ends (WordPiece's ##, </w>), and lists of words, then have a border of words between
the two: "arg" and "ument" are two words to them. No model that is supported has one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from beacon_jax.names import short

Place = Literal["start", "bare", "behind"]

# To encode a text behind. Letters come last: many more tokens begin with them.
_MARKS = "\n!.,:;?-()/\"'*#=&@[]{}<>|~^%$+\\_`0123456789"
_MARKS += "zqxjkvwybfghmpucldrnsotiaeZQXJKVWYBFGHMPUCLDRNSOTIAE"
_PROBES = ("a", "0", "e", "t", ".")
_HEAD = 64  # characters on which marks are tried


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
      ids: int32 [n].
      spans: characters [start, stop) of each token; (0, 0) of those that were added.
    """

    ids: Int[np.ndarray, " n"]
    spans: Int[np.ndarray, "n 2"]


def encode(
    tokenizer: Any, text: str, at: Place, after: int | str | None = None
) -> Int[np.ndarray, " n"]:
    """Returns the ids of a text.

    Args:
      tokenizer: one of transformers.
      at: where the text begins.
      after: "behind": the text in front of it, or its last token; None: neither is
        known.
    """
    return _encode(tokenizer, text, at, after, spans=False).ids


def encode_spans(
    tokenizer: Any, text: str, at: Place, after: int | str | None = None
) -> Encoded:
    """Returns the ids of a text, as `encode` does, and the characters of each.

    Args:
      tokenizer: a fast one, which knows them.
    """
    return _encode(tokenizer, text, at, after, spans=True)


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of bare texts, on all cores."""
    if not texts:
        return []
    return _call(tokenizer, list(texts), add_special_tokens=False)["input_ids"]


def front(tokenizer: Any) -> Int[np.ndarray, " n"]:
    """Returns what the tokenizer puts in front of a text: mostly bos, or nothing."""
    around = _ids(tokenizer, "", special=True)
    if around:
        for probe in _PROBES:
            bare = _ids(tokenizer, probe)
            whole = _ids(tokenizer, probe, special=True)
            for at in range(len(whole) - len(bare) + 1) if bare else ():
                if whole[at : at + len(bare)] == bare:
                    return np.asarray(whole[:at], np.int32)
    return np.zeros(0, np.int32)


def check_ids(ids: Any, vocab_size: int, name: str, tokenizer: Any = None) -> None:
    """Checks that the model has an embedding of every token.

    A tokenizer may have tokens that were added to it and not to the model.

    Args:
      ids: integers of any shape.
      vocab_size: rows of the embedding.
      name: what they are of, for the message.
      tokenizer: knows the text of a token; None: only its number is named.

    Raises:
      ValueError: one has none; names it, its text and the remedy.
    """
    ids = np.asarray(ids)
    if not ids.size or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    wrong = int(ids[(ids < 0) | (ids >= vocab_size)].flat[0])
    token = None
    if tokenizer is not None and 0 <= wrong < len(tokenizer):
        token = tokenizer.convert_ids_to_tokens(wrong)
    text = f" ({short(repr(token))})" if token is not None else ""
    raise ValueError(
        f"{name} has token ids from {ids.min()} to {ids.max()}, the model has 0 to "
        f"{vocab_size - 1}: {wrong}{text} has no row in its embedding. Is the "
        "tokenizer the model's own? Use that one, or leave that token out."
    )


def _encode(
    tokenizer: Any, text: str, at: Place, after: int | str | None, *, spans: bool
) -> Encoded:
    if at == "behind" and text and _begins_anew(tokenizer):
        for mark in _marks(tokenizer, text, after):
            found = _behind(tokenizer, text, mark, spans=spans)
            if found is not None:
                return found
    bare = _read(tokenizer, text, spans=spans)
    if at != "start":
        return bare
    added = front(tokenizer)
    if not len(added) or _brings_bos(tokenizer, bare.ids, added):
        return bare
    none = np.zeros((len(added), 2), np.int64)
    return Encoded(
        np.concatenate([added, bare.ids]), np.concatenate([none, bare.spans])
    )


def _brings_bos(tokenizer: Any, ids: np.ndarray, added: np.ndarray) -> bool:
    return len(ids) > 0 and ids[0] in (added[0], tokenizer.bos_token_id)


def _begins_anew(tokenizer: Any) -> bool:
    """Tells whether a text by itself begins with other tokens than behind another."""
    for probe in _PROBES:
        seen = False
        for text in (probe, f" {probe}"):
            for mark in _marks(tokenizer, text, None):
                found = _behind(tokenizer, text, mark, spans=False)
                if found is not None:
                    seen = True
                    if found.ids.tolist() != _ids(tokenizer, text):
                        return True
                    break
        if seen:
            return False
    return False


def _marks(tokenizer: Any, text: str, after: int | str | None) -> Iterator[str]:
    """Yields what the text may be encoded behind, the best first.

    That is what stands in front, or a special token at its end, behind which some
    tokenizers begin anew; then characters that the tokenizer does not lose.
    """
    if isinstance(after, str):
        yield after
    elif after is not None:
        special = getattr(tokenizer, "added_tokens_decoder", {}).get(after)
        # The unknown token stands for any text, so its own says nothing of that.
        if special is not None and after != getattr(tokenizer, "unk_token_id", None):
            yield str(special)
    head = text[:_HEAD]
    lost = {getattr(tokenizer, "unk_token_id", None), *_ids(tokenizer, " ")}
    for mark in _MARKS:
        if {*_ids(tokenizer, mark)[-1:]} <= lost:
            continue
        if len(head) == len(text) or _behind(tokenizer, head, mark, spans=False):
            yield mark


def _behind(tokenizer: Any, text: str, mark: str, *, spans: bool) -> Encoded | None:
    """Encodes a text behind a mark; None: they share a token."""
    before = _ids(tokenizer, mark)
    both = _read(tokenizer, mark + text, spans=spans)
    if not 0 < len(before) < len(both.ids):
        return None
    if both.ids[: len(before)].tolist() != before:
        return None
    moved = np.maximum(both.spans[len(before) :] - len(mark), 0)
    return Encoded(both.ids[len(before) :], moved)


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    return _call(tokenizer, text, add_special_tokens=special)["input_ids"]


def _read(tokenizer: Any, text: str, *, spans: bool) -> Encoded:
    found = _call(
        tokenizer, text, add_special_tokens=False, return_offsets_mapping=spans
    )
    ids = np.asarray(found["input_ids"], np.int32)
    where = found["offset_mapping"] if spans else np.zeros((len(ids), 2))
    return Encoded(ids, np.asarray(where, np.int64).reshape(-1, 2))


def _call(tokenizer: Any, text: str | list[str], **options: bool) -> Any:
    """Calls a tokenizer; ValueError if it has no token for what is in a text."""
    try:
        # `verbose` would warn of long texts, which are the point.
        return tokenizer(text, verbose=False, **options)
    except Exception as error:  # tokenizers raises it bare
        of = getattr(tokenizer, "name_or_path", "")
        raise ValueError(
            f"the tokenizer{f' of {of}' if of else ''} cannot encode "
            f"{short(repr(text))} ({error}): use the tokenizer.json of the base model, "
            "or leave out the characters that it does not have."
        ) from error
