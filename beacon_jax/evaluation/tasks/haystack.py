"""Text to hide things in, cut by tokens."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from beacon_jax.tokenise import encode_spans

SENTENCE = re.compile(r"[.!?][\"')\]]*(?=\s)")
LINE = re.compile(r"\n+")
WALK = 20  # a needle moves back by up to 1/20 of the text to a sentence's end


class Haystack:
    """The documents as one text, in their order and again from the first one.

    Attributes:
      text: all of it.
      starts: characters where sentences begin, in the first round.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Any, tokens: int, without: str = ""
    ):
        """Joins the documents.

        Args:
          tokens: how many can be taken from any start.
          without: documents that contain it are left out.

        Raises:
          ValueError: no document is left.
        """
        kept = [t.strip() for t in texts if not without or without not in t]
        # Of very much text the first part: 128K tokens need 0.5 MB, code up to 2 MB.
        once = "\n\n".join(t for t in kept if t)[: 16 * tokens + 200_000] + "\n\n"
        if not once.strip():
            raise ValueError(
                f"--haystack has {len(texts)} documents, none of them with text and "
                f"without {without!r}: name a folder with others."
            )
        size = len(_ends(tokenizer, once))
        self.text = once * math.ceil((size + tokens) / size)
        self._token_ends = _ends(tokenizer, self.text)
        self._sentences = np.asarray([m.end() for m in SENTENCE.finditer(self.text)])
        self._lines = np.asarray([m.end() for m in LINE.finditer(self.text)])
        begins = [m.end() for m in re.finditer(SENTENCE.pattern + r"\s+", once)]
        self.starts = np.asarray([0, *(b for b in begins if b < len(once))], np.int64)

    def take(self, start: int, count: int) -> str:
        """`count` tokens from character `start` on."""
        if count < 1:
            return ""
        return self.text[start : self._token_ends[self._token(start) + count - 1]]

    def place(
        self, start: int, count: int, depth: float, *, aligned: bool
    ) -> tuple[int, int]:
        """Where `depth` (0 ... 1) is in what `take` gives: (characters, tokens) before.

        aligned: not inside a sentence but at the end of the one before, as the official
        test has it. Where that is further than 1/20 of the text away (code), at a
        line's end, else exactly there. 0 and 1 are exactly the ends.
        """
        wanted = min(int(depth * count), count)
        if not wanted or wanted == count:
            return (len(self.take(start, count)) if wanted else 0), wanted
        first = self._token(start)
        at = int(self._token_ends[first + wanted - 1])
        back = max(wanted - 1 - count // WALK, 0)
        low = int(self._token_ends[first + back])
        for ends in (self._sentences, self._lines) if aligned else ():
            i = int(np.searchsorted(ends, at, "right")) - 1
            if i >= 0 and ends[i] >= low:
                at = int(ends[i])
                break
        before = int(np.searchsorted(self._token_ends, at, "right")) - first
        return at - start, before

    def _token(self, start: int) -> int:
        """The first token that ends behind this character."""
        return int(np.searchsorted(self._token_ends, start, "right"))


def _ends(tokenizer: Any, text: str) -> np.ndarray:
    """The character behind each token."""
    return np.maximum.accumulate(encode_spans(tokenizer, text, "bare").spans[:, 1])
