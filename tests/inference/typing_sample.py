"""What a type checker must know of the public API; `make lint` checks it (pyright)."""

from collections.abc import Sequence
from typing import assert_type

import numpy as np

import beacon_jax
from beacon_jax import Generation, Memory, Model


def one_text_gives_one_answer(model: Model, ids: np.ndarray) -> None:
    assert_type(model.complete("a"), Generation)
    assert_type(model.complete([1, 2]), Generation)
    assert_type(model.complete(ids, temperature=0.7, top_k=5), Generation)
    assert_type(model.generate("a", ratio=[2, 4], stop="."), str)
    assert_type(beacon_jax.generate(model, "a"), str)
    assert_type(model.complete("a").memory, Memory)


def a_list_gives_a_list(model: Model, texts: list[str], ids: list[np.ndarray]) -> None:
    assert_type(model.complete(["a", "b"], seed=[1, 2]), list[Generation])
    assert_type(model.complete(["a", [1, 2]]), list[Generation])
    assert_type(model.complete(ids), list[Generation])
    assert_type(model.generate(texts, max_new_tokens=[3, 4]), list[str])
    assert_type(beacon_jax.complete(model, texts), list[Generation])
    assert_type(beacon_jax.compress(model, texts, ratio=8), Memory)


def what_may_be_either_gives_either(
    model: Model, text: str | list[str], texts: Sequence[str]
) -> None:
    assert_type(model.generate(text), str | list[str])
    assert_type(model.generate(texts), str | list[str])


def a_wrong_name_or_type_is_an_error(model: Model) -> None:
    model.complete("a", max_tokens=5)  # pyright: ignore[reportCallIssue]
    model.complete("a", lossless="x")  # pyright: ignore
    model.complete(None)  # pyright: ignore
    model.compress("a", rate=2)  # pyright: ignore[reportCallIssue]
    beacon_jax.Chat(model, max_tokens=5)  # pyright: ignore[reportCallIssue]
