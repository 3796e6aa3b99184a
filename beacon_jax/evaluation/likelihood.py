"""How likely continuations are behind (compressed) contexts, for many of them at once.

What lm-evaluation-harness asks of a model, in token ids and without that package:
`lm_eval` beside this file is the adapter. A context's whole windows are compressed once
for all requests that share them; logits exist for the continuation's tokens alone.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from beacon_jax.core.feed import power_of_two
from beacon_jax.core.law import default_window
from beacon_jax.core.loss import IGNORE
from beacon_jax.evaluation.methods import ADAPT, adapted
from beacon_jax.evaluation.reading import feed_state
from beacon_jax.inference.feeding import fresh_state
from beacon_jax.inference.history import History
from beacon_jax.inference.model import Model
from beacon_jax.inference.plan import make_plan
from beacon_jax.model.config import ModelConfig
from beacon_jax.names import meant, short
from beacon_jax.tokenise import check_ids, encode

LEAST_ANSWER = 16  # tokens that an answer keeps where a context does not fit


class Pair(NamedTuple):
    """Token ids that are given, at least one, and those to predict behind them."""

    context: Int[np.ndarray, " C"]
    continuation: Int[np.ndarray, " n"]


class Score(NamedTuple):
    """The log probability in nats, and whether greedy decoding gives these tokens."""

    loglikelihood: float
    greedy: bool


@functools.lru_cache(4096)
def ratio_of(
    config: ModelConfig,
    ratio: int | str,
    length: int,
    new_tokens: int = 0,
    recent: bool = False,
) -> int:
    """The one ratio of a text of `length` tokens, its continuation included.

    Args:
      ratio: a number, 0 or "full", "auto" or "auto-8" as in `Model.compress`, or
        "adapt": the release's rule, the smallest capacity of the config's ratios that
        holds 1,024 tokens more.
      recent: the last full window stays raw.

    Raises:
      ValueError: a ratio that the model cannot use.
    """
    if ratio == ADAPT:
        return adapted(config, length)
    before = History.empty(recent)
    plan = make_plan(config, ratio, length=length, new_tokens=new_tokens, before=before)
    return int(plan.ratios[0])


def longest(config: ModelConfig, ratio: int | str, recent: bool = False) -> int:
    """Counts the most tokens whose positions were trained at a ratio.

    Where the ratio is decided per text, it is the largest that there is.
    """
    numbers = [r for r in (config.beacon.ratios if config.beacon else ()) if r]
    fixed = {"full": 0, "auto": max(numbers, default=0)}
    if isinstance(ratio, str):
        tail = ratio.removeprefix("auto-")
        ratio = int(tail) if tail.isdecimal() else fixed.get(ratio, fixed["auto"])
    raw = default_window(config) * (1 + recent)
    return (config.trained_positions - raw) * max(ratio, 1) + raw


def score(
    model: Model,
    pairs: Sequence[Pair],
    *,
    ratio: int | str = "auto",
    batch_size: int = 8,
    recent: bool = False,
    on_score: Callable[[int, Score], None] | None = None,
) -> list[Score]:
    """The scores of pairs, in their order.

    Args:
      ratio: see `ratio_of`; decided for each pair.
      batch_size: rows computed together. Those of one batch have one ratio and about
        the same length; the longest come first, so that what does not fit fails soon.
      recent: rows keep their last full windows raw, as in `Model.compress`.
      on_score: called with (index, score) as soon as a batch is done.

    Raises:
      ValueError: an empty context or continuation, or a token that the model has no
        embedding of.
    """
    for i, pair in enumerate(pairs):
        check(model, pair.context, f"context of pair {i}")
        check(model, pair.continuation, f"continuation of pair {i}")
    read = functools.partial(_Row.of, model.config, ratio, recent)
    rows = [read(i, pair) for i, pair in enumerate(pairs)]
    scores: dict[int, Score] = {}
    for batch in _batches(rows, batch_size):
        for row, found in zip(batch, _score(model, batch, recent), strict=True):
            scores[row.index] = found
            if on_score:
                on_score(row.index, found)
    return [scores[i] for i in range(len(pairs))]


class _Row(NamedTuple):
    """One pair, cut where it is compressed.

    Attributes:
      index: number of the pair.
      ratio: of its windows.
      past: whole windows in front of the context's last token.
      rest: the other inputs [R].
      labels: of these [R], shifted; only those of the continuation count.
    """

    index: int
    ratio: int
    past: np.ndarray
    rest: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        ratio: int | str,
        recent: bool,
        index: int,
        pair: Pair,
    ) -> "_Row":
        context, continuation = (np.asarray(x, np.int32) for x in pair)
        for name, tokens in (("context", context), ("continuation", continuation)):
            if tokens.ndim != 1 or not tokens.size:
                raise ValueError(
                    f"{name} of pair {index} has shape {list(tokens.shape)}: give at "
                    "least one token."
                )
        window = default_window(config)
        cut = (len(context) - 1) // window * window
        inputs = np.concatenate([context, continuation[:-1]])
        labels = np.full(len(inputs), IGNORE, np.int32)
        labels[len(context) - 1 :] = continuation
        length = len(context) + len(continuation)
        number = ratio_of(config, ratio, length, recent=recent)
        return cls(index, number, inputs[:cut], inputs[cut:], labels[cut:])


def _batches(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    """Rows with a past apart from those without; equal pasts next to each other."""
    if size < 1:
        raise ValueError(f"batch_size={size} must be at least 1.")
    groups: dict[tuple[int, bool], list[_Row]] = {}
    for row in rows:
        groups.setdefault((row.ratio, row.past.size > 0), []).append(row)
    order = lambda row: (-len(row.past), row.past.tobytes(), -len(row.rest))
    for group in groups.values():
        group.sort(key=order)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _score(model: Model, batch: list[_Row], recent: bool) -> list[Score]:
    rows = fill_up(model, batch)
    rest, labels = [row.rest for row in rows], [row.labels for row in rows]
    state = _remember(model, rows, recent)
    out, _ = feed_state(model, state, rest, batch[0].ratio, "score", labels)
    assert out.token_loss is not None and out.greedy is not None
    losses, greedy = np.asarray(out.token_loss, np.float64), np.asarray(out.greedy)
    scores = []
    for i, row in enumerate(batch):
        at = np.flatnonzero(row.labels != IGNORE)
        scores.append(Score(-float(losses[i, at].sum()), bool(greedy[i, at].all())))
    return scores


def _remember(model: Model, rows: list[_Row], recent: bool) -> Any:
    """The state behind the rows' pasts, each different one compressed once."""
    if not rows[0].past.size:
        return fresh_state(model, len(rows), 1, recent=recent)
    different = {row.past.tobytes(): row.past for row in rows}
    place = {key: i for i, key in enumerate(different)}
    past = fill_up(model, list(different.values()))
    memory = model.compress(past, rows[0].ratio, recent=recent)
    return memory[[place[row.past.tobytes()] for row in rows]].state


def fill_up[Item](model: Model, rows: list[Item]) -> list[Item]:
    """Repeats the last row until there is a power of two of them.

    So few programs serve all batches. There are also as many as the devices can share.
    """
    shares = 1
    if model.partition is not None:
        sizes = model.partition.mesh.shape
        shares = sizes.get("data", 1) * sizes.get("fsdp", 1)
    count = -(-power_of_two(len(rows)) // shares) * shares
    return rows + rows[-1:] * (count - len(rows))


def check(model: Model, tokens: Int[np.ndarray, " n"], name: str) -> None:
    """Raises ValueError for a token that the model has no embedding of."""
    check_ids(tokens, model.config.vocab_size, name, model.tokenizer)


# --- from text to pairs, by the rules of lm-evaluation-harness --------------------


def prefix_token(tokenizer: Any) -> int:
    """What stands in front of a text without context: bos, else eos.

    Raises:
      ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no bos and no eos: an empty context needs one.")


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Encodes both together and cuts behind as many tokens as the context has alone.

    Spaces at its end belong to the continuation. An empty context is `prefix_token`.

    Raises:
      ValueError: an empty continuation, or one without a token.
    """
    if not continuation:
        raise ValueError("the continuation is empty: there is nothing to predict.")
    if not context:
        prefix = prefix_token(tokenizer)
        tokens = encode(tokenizer, continuation, "bare")
        if len(tokens) > 1 and tokens[0] == prefix:
            return Pair(tokens[:1], tokens[1:])
        return Pair(np.asarray([prefix], np.int32), _some(tokens, continuation))
    bare = context.rstrip()
    whole = _some(encode(tokenizer, context + continuation, "start"), continuation)
    cut = len(encode(tokenizer, bare, "start"))
    # The end of the context may melt into the continuation's first token.
    cut = min(cut, len(whole) - 1)
    if cut > 0:
        return Pair(whole[:cut], whole[cut:])
    return Pair(np.asarray([prefix_token(tokenizer)], np.int32), whole)


def _some(tokens: np.ndarray, text: str) -> np.ndarray:
    if not len(tokens):
        raise ValueError(
            f"the tokenizer makes no token of the continuation {short(repr(text))}: "
            "there is nothing to predict."
        )
    return tokens


def shorten(
    context: Int[np.ndarray, " C"], room: int, side: str = "left"
) -> Int[np.ndarray, " c"]:
    """Returns at most `room` tokens of a context, but never none.

    Args:
      side: what is left out: "left", as lm-evaluation-harness does, or "middle", as
        LongBench does.

    Raises:
      ValueError: another side.
    """
    room = max(room, 1)
    if side not in ("left", "middle"):
        raise ValueError(
            f"truncation={side!r} is unknown: {meant(side, ('left', 'middle'))}use "
            "'left' or 'middle'."
        )
    if len(context) <= room:
        return context
    if side == "left":
        return context[-room:]
    head = room // 2
    return np.concatenate([context[:head], context[len(context) - (room - head) :]])


class Cut(NamedTuple):
    """What a request has of its budget.

    Attributes:
      context: its tokens, perhaps less than there were.
      new: tokens of the answer.
      lost: tokens of the context that were left out.
      short: whether the answer may be shorter than it was asked for.
    """

    context: Int[np.ndarray, " c"]
    new: int
    lost: int
    short: bool


def divide(
    context: Int[np.ndarray, " C"], asked: int, most: int, side: str = "left"
) -> Cut:
    """Divides `most` tokens between a context and its answer.

    The answer gives way first, down to LEAST_ANSWER tokens (or half of `most`). Then
    the context is shortened: cut contexts make answers to other questions.

    Args:
      asked: tokens of the answer.
      side: as in `shorten`.

    Raises:
      ValueError: `most` has no room for both.
    """
    if most < 2:
        raise ValueError(
            f"max_length={most} has no room for a context and an answer: give at least "
            "2."
        )
    least = min(asked, LEAST_ANSWER, most // 2)
    new = min(asked, max(most - len(context), least))
    kept = shorten(context, most - new, side)
    return Cut(kept, new, len(context) - len(kept), new < asked)


def rolling_pairs(
    tokens: Int[np.ndarray, " n"], prefix: int, max_length: int
) -> list[Pair]:
    """Makes pairs that predict every token of a text once.

    Each has at most `max_length` inputs. The context of the first is `prefix`, of the
    others the token before, and of the last one as much as there is room for.
    """
    pairs = []
    for start in range(0, len(tokens), max_length):
        part = tokens[start : start + max_length]
        if not start:
            pairs.append(Pair(np.asarray([prefix], np.int32), part))
        else:
            first = max(start + len(part) - max_length - 1, 0)
            pairs.append(Pair(tokens[first:start], part))
    return pairs
