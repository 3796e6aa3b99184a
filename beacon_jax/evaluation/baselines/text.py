"""Compressors of text, such as LLMLingua: the past is put into fewer words.

The past is decoded, compressed and encoded again; what comes back is read as if it were
the past. So any package that shortens text can be compared, at no more bytes than
beacons keep:

    # shorten.py, where the command is run
    from llmlingua import PromptCompressor
    lingua = PromptCompressor()
    def compress(text, budget):
        return lingua.compress_prompt([text], target_token=budget)["compressed_prompt"]

    python -m beacon_jax.evaluate --methods=beacon,text:shorten.compress ...
"""

from collections.abc import Callable
from typing import cast

import numpy as np

from beacon_jax.evaluation.baselines.shortened import Shortened, Tokens
from beacon_jax.evaluation.reading import Rows
from beacon_jax.inference.model import Model
from beacon_jax.names import imported
from beacon_jax.tokenise import check_ids, encode

Compress = Callable[[str, int], str]


class TextCompressor(Shortened):
    """Reads `compress(text of the past, budget)`, cut at the budget.

    Args:
      compress: (text, tokens of the budget) -> shorter text. It must be a function of
        these alone, or a run that is continued differs from one that was not stopped.
      name: of the method, without its ratio.

    A bos token in front of the past is not given to it and stays in front. The bytes
    are the beacons' or, if the text has fewer tokens, less.
    """

    exact = False

    def __init__(self, compress: Compress, name: str, ratio: int | str | None = None):
        self.compress = compress
        self.family = name
        super().__init__(ratio)

    def shortened(self, model: Model, past: Rows, sizes: list[int]) -> list[Tokens]:
        pairs = zip(past, sizes, strict=True)
        return [self.shorten(model, row, k) for row, k in pairs]

    def shorten(self, model: Model, row: Tokens, k: int) -> Tokens:
        """Shortens the n tokens of a row to at most k.

        Raises:
          TypeError: `compress` gave something else than text.
          ValueError: text with a token that the model has no embedding of.
        """
        bos = row[:1] if np.isin(row[:1], model.config.bos_ids).any() else row[:0]
        room = k - len(bos)
        if room <= 0:
            return row[:k]
        text = model.tokenizer.decode(row[len(bos) :].tolist())
        found = self.compress(text, room)
        if not isinstance(found, str):
            raise TypeError(
                f"--methods: {self.family} returned {type(found).__name__} for a text "
                f"of {len(text)} characters: it must return the shorter text."
            )
        tokens = encode(model.tokenizer, found, "bare")
        name = f"--methods: the text of {self.family}"
        check_ids(tokens, model.config.vocab_size, name, model.tokenizer)
        return np.concatenate([bos, tokens[:room]])


def text_compressor(spelling: str) -> tuple[Compress, str]:
    """Returns (function, name) of "text:package.module.function".

    Raises:
      ValueError: it cannot be imported; says what was tried.
    """
    path = spelling.removeprefix("text:")
    module, _, name = path.rpartition(".")
    found = imported(f"--methods={spelling}", module, name, "text:module.function")
    if not callable(found):
        raise ValueError(
            f"--methods={spelling}: {path} is no function: it must take (text, tokens) "
            "and return the shorter text."
        )
    return cast(Compress, found), f"text_{name}"
