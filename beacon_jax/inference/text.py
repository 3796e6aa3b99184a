"""Decodes tokens while they come: what can be shown already, and where to stop."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

INCOMPLETE = "\ufffd"  # what tokenizers show for the first bytes of a character


class Streamer:
    """The text of one row while its tokens come in blocks.

    Text is passed on once nothing that follows can change it: characters whose bytes
    are not all there and text that may still become a stop string are held back.

    A stop string ends the text in front of it. It may begin and end inside tokens and
    span any number of them; the one whose end comes first counts, so that the text does
    not depend on how it was cut into tokens or blocks. The tokens to keep are those
    wholly in front of the one in which the stop string begins: the text may be longer
    than theirs by the beginning of that token ("." of the token ".\\n" for stop "\\n").

    Attributes:
      text: what has been decoded so far, in front of the stop string.
      keep: number of tokens to keep once a stop string was found, else None.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None = None,
        stop: str | Sequence[str] = (),
    ):
        """Starts without tokens.

        Args:
          tokenizer: a transformers tokenizer; None: the text stays "".
          on_text: called with each piece of text as it is ready.
          stop: strings that end the text.

        Raises:
          ValueError: an empty stop string, or stop strings without a tokenizer.
        """
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("stop has an empty string, which every text contains.")
        if self._stop and tokenizer is None:
            raise ValueError(
                f"stop={list(self._stop)} needs text, but tokenizer=None: put the "
                "tokenizer files into the model's folder, or stop at token ids."
            )
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] = []
        # (tokens, characters) where text and tokens end together. Decoding starts at
        # the last mark but one: linear in the text, and the token in front keeps a
        # tokenizer from stripping the space that a text begins with.
        self._marks = [(0, 0), (0, 0)]
        self._tail = ""  # undecided bytes behind `text`
        self._shown = self._searched = 0
        self.text = ""
        self.keep: int | None = None

    def __len__(self) -> int:
        """The number of tokens so far."""
        return len(self._tokens)

    def add(self, tokens: Sequence[int] | Int[np.ndarray, " n"]) -> int | None:
        """Adds the next tokens; returns `keep`. After a stop string none are taken."""
        new = [int(t) for t in tokens]
        if self.keep is not None or not new:
            return self.keep
        self._tokens += new
        if self._tokenizer is None:
            return None
        start = self._marks[-1][1]
        decoded = self._decode(len(self))
        known = decoded.rstrip(INCOMPLETE)
        self.text, self._tail = self.text[:start] + known, decoded[len(known) :]
        found = first_stop(self.text, self._stop, self._searched)
        if found is not None:
            self.keep = self._whole_tokens(found)
            self.text, self._tail = self.text[:found], ""
            self._show(found)
            return self.keep
        if not self._tail and known:
            self._marks.append((len(self), len(self.text)))
        # A stop string that ends later begins at most this far back.
        most = max((len(s) for s in self._stop), default=1)
        self._searched = max(len(self.text) - most + 1, 0)
        self._show(len(self.text) - held_back(self.text, self._stop))
        return None

    def finish(self) -> str:
        """Passes on what was held back; returns the whole text."""
        self.text, self._tail = self.text + self._tail, ""
        self._show(len(self.text))
        return self.text

    def _show(self, end: int) -> None:
        if end > self._shown:
            if self._on_text:
                self._on_text(self.text[self._shown : end])
            self._shown = end

    def _decode(self, end: int, mark: int = -1) -> str:
        """Decodes the tokens from a mark to `end`."""
        before, (at, _) = self._marks[mark - 1][0], self._marks[mark]
        decode = lambda ids: self._tokenizer.decode(
            ids, clean_up_tokenization_spaces=False
        )
        skip = len(decode(self._tokens[before:at])) if at > before else 0
        return decode(self._tokens[before:end])[skip:]

    def _whole_tokens(self, end: int) -> int:
        """Counts the most tokens whose text is wholly in front of character `end`."""
        last = len(self._marks) - 1
        mark = max(i for i in range(1, last + 1) if self._marks[i][1] <= end)
        most, start = self._marks[mark]
        stop = self._marks[mark + 1][0] if mark < last else len(self)
        left = self.text[start:end]
        for count in range(most + 1, stop + 1):
            # Not all prefixes: a character cut in two is no text of its own.
            if left.startswith(self._decode(count, mark - last - 1)):
                most = count
        return most


def first_stop(text: str, stop: Sequence[str], start: int = 0) -> int | None:
    """Finds where the stop string begins whose end comes first in text[start:].

    Of several that end there it is the longest; None: there is none.
    """
    found = [(at + len(s), at) for s in stop if (at := text.find(s, start)) >= 0]
    return min(found)[1] if found else None


def held_back(text: str, stop: Sequence[str]) -> int:
    """Counts the last characters of `text` that may begin a stop string."""
    most = min(max((len(s) - 1 for s in stop), default=0), len(text))
    for size in range(most, 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0


def finisher(
    streamers: Sequence[Streamer],
) -> Callable[[int, Int[np.ndarray, " n"]], int | None]:
    """Makes the callback `finished` of `decode`, from one streamer per row."""

    def finished(row: int, tokens: np.ndarray) -> int | None:
        return streamers[row].add(tokens[len(streamers[row]) :])

    return finished
