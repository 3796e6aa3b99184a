"""Fits the score of `compressors.Retention` to a model: least squares, no gradient.

Statements are put into real text, the model reads it with full attention, and a linear
function of the values that it has for a token in all layers is fitted to whether the
token belongs to a statement.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg
from jaxtyping import Bool, Float, Int

from beacon_jax.data.statements import put_statements
from beacon_jax.inference.compressors.retention import Retention, sample_of

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model

HELD = 0.25  # of the rows: the threshold comes from them
ORDINARY = 0.02  # of the tokens of text, which may be above the threshold
DAMPING = 0.1  # of a standardised weight's square, per token
BYTES = 4 << 30  # of features, float32, at most; twice that while they are joined
OTHERS = 128  # tokens per row beside those of statements, at most
STEPS = 100


@dataclasses.dataclass(frozen=True)
class Fitting:
    """Settings of a fit.

    Attributes:
      rows: texts that are read; a quarter of them is held back for the threshold.
      length: tokens of each.
      batch_size: rows at a time.
      seed: of texts and statements.
    """

    rows: int = 160
    length: int = 1024
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"rows": 8, "length": 128, "batch_size": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {low}.")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a fit found.

    Attributes:
      retention: the compressor.
      found: share of the tokens of statements that are above the threshold, in rows
        that were not fitted.
      tokens: that were read.
    """

    retention: Retention
    found: float
    tokens: int


def fit_retention(
    model: "Model",
    text: Int[np.ndarray, " n"],
    settings: Fitting = Fitting(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fits a `Retention` to a model.

    Args:
      text: tokens of documents, from which rows are cut at random.
      on_progress: called with (rows read, of how many).

    Raises:
      ValueError: a model without a tokenizer, too little text for a row, or positions
        that the model was not trained for.
    """
    _check(model, text, settings)
    rng = np.random.default_rng(settings.seed)
    c = model.config
    width = c.num_layers * c.num_kv_heads * c.head_dim
    room = BYTES // (4 * width * settings.rows)
    values, stated, row = [], [], []
    for begin in range(0, settings.rows, settings.batch_size):
        size = min(settings.batch_size, settings.rows - begin)
        some = [_row(rng, model, text, settings.length) for _ in range(size)]
        read = model.compress([x.tokens for x in some], ratio=0).state.v
        assert isinstance(read, jax.Array)  # float memories are asked for
        for number, one in enumerate(some):
            pick = _picked(rng, one.stated, max(room, 16))
            taken = read[:, number, jnp.asarray(pick)].astype(jnp.float32)
            values.append(np.asarray(jnp.swapaxes(taken, 0, 1)).reshape(-1, width))
            stated.append(one.stated[pick])
            row.append(np.full(len(pick), begin + number))
        if on_progress:
            on_progress(begin + size, settings.rows)
    held = np.concatenate(row) >= settings.rows - max(int(settings.rows * HELD), 1)
    x, y = np.concatenate(values), np.concatenate(stated)
    values.clear()
    kept, told = x[held], y[held]
    weights, bias = _solved(x[~held], y[~held])
    scores = kept @ weights + bias
    threshold = float(np.quantile(scores[~told], 1 - ORDINARY))
    retention = Retention(
        weights.reshape(c.num_layers, c.num_kv_heads, c.head_dim),
        bias,
        threshold,
        sample_of(model.variables),
    )
    found = float((scores[told] > threshold).mean())
    return Fitted(retention, found, settings.rows * settings.length)


def _check(model: "Model", text: Int[np.ndarray, " n"], settings: Fitting) -> None:
    if model.tokenizer is None:
        raise ValueError(
            "model.tokenizer=None: statements are words, so fitting needs a tokenizer."
        )
    check_rows(model, text, settings.length)


def check_rows(
    model: "Model", text: Int[np.ndarray, " n"], length: int, rows: int = 1
) -> None:
    """Raises ValueError if a text is too short, or rows are too long for a model.

    Args:
      length: tokens of a row.
      rows: that have to fit into the text.
    """
    if len(text) < rows * length:
        raise ValueError(
            f"text has {len(text):,} tokens, but {rows * length:,} are needed: give "
            "more, or shorter rows (length)."
        )
    if length > model.config.trained_positions:
        raise ValueError(
            f"length={length:,} is above the positions that the model was trained for, "
            f"{model.config.trained_positions:,}: give shorter rows."
        )


def _row(rng: np.random.Generator, model: "Model", text: Any, length: int) -> Any:
    """Cuts a row from the text and puts statements into it."""
    start = int(rng.integers(0, len(text) - length + 1))
    return put_statements(rng, text[start : start + length], length, model.tokenizer)


def _picked(
    rng: np.random.Generator, stated: Bool[np.ndarray, " n"], room: int
) -> Int[np.ndarray, " m"]:
    """Picks tokens of a row: those of statements, and some others."""
    facts, others = np.flatnonzero(stated), np.flatnonzero(~stated)
    facts = rng.permutation(facts)[: room // 2]
    others = rng.permutation(others)[: min(OTHERS, room - len(facts))]
    return np.sort(np.concatenate([facts, others]))


def _solved(
    x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " d"], float]:
    """Solves damped least squares; statements weigh as much as all the rest.

    x is taken over: it may be a few GiB.
    """
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x -= mean
    x /= deviation
    weight = np.where(y, 0.5 / max(y.mean(), 1e-6), 0.5 / max(1 - y.mean(), 1e-6))
    root = np.sqrt(weight).astype(np.float32)
    x *= root[:, None]
    target = root * np.where(y, 1.0, -1.0).astype(np.float32)
    damp, rows = DAMPING * len(x), jnp.asarray(x)
    normal = lambda w: (rows @ w) @ rows + damp * w
    found = np.asarray(cg(normal, jnp.asarray(target @ x), maxiter=STEPS)[0])
    weights = (found / deviation).astype(np.float32)
    return weights, float(-(mean * weights).sum())
