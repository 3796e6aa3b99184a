"""What tasks and methods ask of a model: to read, to predict and to answer.

The model is what `beacon_jax.load` returns, a memory is a `Memory`, and both go the way
of `Model.complete`. What a run adds are its sizes: a memory has room for the `longest`
text of the run from the start, and texts are padded to it, so that two compiled
programs per ratio serve all lengths and tasks.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from beacon_jax.core.feed import FeedOutput, padded, power_of_two
from beacon_jax.core.law import Law
from beacon_jax.core.loss import IGNORE
from beacon_jax.core.memory import MemoryState, buffer_size
from beacon_jax.core.plan import capacity, needed_slots
from beacon_jax.core.recent import feed
from beacon_jax.inference.decode import Decoding, decode
from beacon_jax.inference.feeding import Fit, decoded_memory, feed_rows, fresh_state
from beacon_jax.inference.finite import check_finite
from beacon_jax.inference.history import History
from beacon_jax.inference.loading import load
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.plan import Plan
from beacon_jax.inference.sampling import make_sampling
from beacon_jax.inference.text import Streamer, finisher
from beacon_jax.model.config import BeaconConfig, check_ratio
from beacon_jax.resources import load_tokenizer

Rows = Sequence[np.ndarray]  # one int32 [n] per row, lengths may differ

GREEDY = make_sampling()


class Continuations(NamedTuple):
    """Greedy continuations of a batch.

    Attributes:
      texts: in front of the stop string or the end token.
      tokens: of each row, int32 [n].
      memory: holds them too.
    """

    texts: list[str]
    tokens: list[np.ndarray]
    memory: Memory


def load_model(
    path: str,
    ratios: Sequence[int],
    *,
    window: int | None = None,
    dtype: str | None = None,
    mesh: str | None = None,
    beacons: str | None = None,
    allow_other_base: bool = False,
) -> Model:
    """Loads a model for evaluation.

    Args:
      ratios: ratios > 0 that beacons will be asked for (they need not be those of the
        config, which is how unseen ratios are measured).
      window: for a model without beacons only, which has no window of its own.
      mesh: devices to split over, as in "data:1,fsdp:1,tensor:8"; None: one device.
      beacons, allow_other_base: as in `beacon_jax.load`.

    Raises:
      ValueError: beacons asked of a model that has none, or a window of one that does.
    """
    model = load(
        path,
        dtype=dtype,
        mesh=mesh,
        beacons=beacons,
        allow_other_base=allow_other_base,
    )
    if model.tokenizer is None:
        load_tokenizer(path)  # says which files are missing
    if model.config.beacon is None:
        if ratios:
            raise ValueError(
                f"--model={path} has no beacons: train some, or leave beacons out of "
                "--methods and name a --window (kvzip, snapkv and others need no "
                "training)."
            )
        if not window:
            raise ValueError(
                f"--model={path} has no beacons and so no window: name one, for "
                "example --window=64."
            )
        beacon = BeaconConfig(window=window, ratios=(window,))
        with warnings.catch_warnings():  # no method uses these beacons
            warnings.simplefilter("ignore", UserWarning)
            model = load(path, dtype=dtype, mesh=mesh, beacon=beacon)
    elif window and window != model.window:
        raise ValueError(
            f"--window={window} differs from the {model.window} that the beacons of "
            f"--model={path} were trained with: leave it out."
        )
    for ratio in ratios:
        try:
            check_ratio(ratio, model.window)
        except ValueError as error:
            raise ValueError(f"--ratios has {ratio}: {error}") from None
    return model


def empty(
    model: Model,
    rows: int,
    ratio: int,
    longest: int = 0,
    dtype: str | None = None,
    recent: bool = False,
) -> Memory:
    """Makes an empty memory with room for `longest` tokens at a ratio.

    Args:
      dtype: of keys and values; None: that of the model.
      recent: rows keep their last full windows raw.
    """
    room = _room(model, ratio, longest, recent)
    state = fresh_state(model, rows, room, dtype, recent)
    histories = (History.empty(recent),) * rows
    return Memory(model.config, state, histories, model.identity)


def read(
    model: Model,
    rows: Rows,
    ratio: int,
    memory: Memory | None = None,
    *,
    longest: int = 0,
    dtype: str | None = None,
    recent: bool = False,
    wanted: bool = True,
) -> tuple[Any, Memory]:
    """Reads each row's next tokens; the windows that begin now have `ratio`.

    Args:
      rows: some of them may be empty; their logits mean nothing.
      memory: is continued, not changed; None: a new one.
      longest: tokens of the longest text of the run; 0: sizes as in `Model.compress`.
      dtype, recent: of a new memory, as in `empty`.
      wanted: False: the logits are not needed (`core.recent.feed`).

    Returns:
      The logits [B, V] after each row's last token (None if nothing was read), and the
      memory with the tokens.
    """
    sizes = [len(row) for row in rows]
    if not any(sizes):
        if memory is None:
            memory = empty(model, len(rows), ratio, longest, dtype, recent)
        return None, memory
    new = memory is None and longest
    logits, after = feed_rows(
        model,
        # A row of nothing reads one token, which is cut off again.
        [row if len(row) else np.zeros(1, np.int32) for row in rows],
        [_plan(ratio)] * len(rows),
        memory,
        Fit(
            capacity=_room(model, ratio, longest, recent) if new else None,
            dtype=dtype,
            recent=recent,
            logits=wanted,
            width=_padded(model, max(sizes), longest),
        ),
    )
    if not all(sizes):
        pairs = zip(after.rows, sizes, strict=True)
        after = after.with_rows(tuple(x.cut(x.length - (not n)) for x, n in pairs))
    return logits, after


def losses(
    model: Model,
    memory: Memory,
    rows: Rows,
    labels: Rows,
    ratio: int,
    longest: int = 0,
) -> tuple[Float[np.ndarray, "B T"], Memory]:
    """Reads each row's next tokens and measures the loss of each one's label in nats.

    Returns:
      The losses, undefined beyond a row's length, and the memory with the tokens.
    """
    out, state = feed_state(
        model, memory.state, rows, ratio, "loss", labels, longest=longest
    )
    plan = _plan(ratio).ratios
    pairs = zip(memory.rows, rows, strict=True)
    law = Law.of(model.config)
    after = tuple(history.feed(law, plan, row) for history, row in pairs)
    after = Memory(model.config, state, after, model.identity)
    return np.asarray(out.token_loss, np.float64), after


def answer_losses(
    model: Model,
    memory: Memory,
    logits: Float[jax.Array, "B V"],
    references: Rows,
    ratio: int,
) -> list[float]:
    """Measures the mean loss, nats per token, of what should follow each prompt.

    Teacher forced, in pieces of a window; `references` have 1 token or more each.
    """
    sums = np.asarray(nats(logits, np.asarray([r[0] for r in references])), np.float64)
    check_finite(np.isfinite(sums)[:, None], "losses", model.net.dtype.name)
    for start in range(0, max(map(len, references)) - 1, model.window):
        at = slice(start, start + model.window)
        given = [r[:-1][at] for r in references]
        wanted = [r[1:][at] for r in references]
        found, memory = losses(model, memory, given, wanted, ratio)
        real = np.arange(found.shape[1]) < np.asarray([[len(g)] for g in given])
        sums += np.where(real, found, 0.0).sum(axis=1)
    return [float(s / len(r)) for s, r in zip(sums, references, strict=True)]


def nats(logits: Float[jax.Array, "B V"], wanted: Int[Any, " B"]) -> jax.Array:
    """Computes the loss [B] of one token per row."""
    taken = jnp.take_along_axis(logits, jnp.asarray(wanted)[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - taken


def answer(
    model: Model,
    memory: Memory,
    logits: Float[jax.Array, "B V"],
    new_tokens: int,
    ratio: int,
    stop: Sequence[str] = (),
) -> Continuations:
    """Decodes greedy answers; `logits` are those of each prompt's end.

    A row ends at an end token, in front of a stop string or after `new_tokens`.
    `memory` stays usable.
    """
    streams = [Streamer(model.tokenizer, stop=stop) for _ in range(len(logits))]
    plan = _plan(ratio)
    found = decode(
        model.net,
        model.variables,
        _roomy(model, memory.state, new_tokens, ratio),
        logits,
        plan.ratios,
        Decoding(new_tokens, GREEDY, finished=finisher(streams)),
    )
    tokens = [t[:n] for t, n in zip(found.tokens, found.lengths, strict=True)]
    after = decoded_memory(memory, [plan] * len(memory), found)
    return Continuations([s.finish() for s in streams], tokens, after)


def feed_state(
    model: Model,
    state: MemoryState,
    rows: Rows,
    ratio: int,
    outputs: str,
    labels: Rows | None = None,
    *,
    longest: int = 0,
    donate: bool = False,
) -> tuple[FeedOutput, MemoryState]:
    """Feeds rows to a bare state and returns what `core.feed.feed` does.

    labels: of each token, `IGNORE` for none. donate: the state is not needed again.

    Raises:
      ValueError: the loss of a label is no number.
    """
    lengths = np.asarray([len(row) for row in rows], np.int32)
    most = int(lengths.max())
    size = power_of_two(_windows(model, most)) * model.window
    size = max(size, _padded(model, most, longest))
    wanted = None if labels is None else padded(labels, size, IGNORE)
    out, state = feed(
        model.net,
        model.variables,
        _roomy(model, state, lengths, ratio),
        padded(rows, size),
        lengths,
        _plan(ratio).ratios,
        outputs=outputs,
        labels=wanted,
        donate=donate,
    )
    if wanted is not None and out.token_loss is not None:
        finite = np.isfinite(np.asarray(out.token_loss)) | (wanted == IGNORE)
        check_finite(finite, "losses", model.net.dtype.name)
    return out, state


def _plan(ratio: int) -> Plan:
    """Makes the plan of a text whose windows all have one ratio."""
    return Plan(np.full(1, ratio, np.int32))


def _windows(model: Model, longest: int) -> int:
    return -(-longest // model.window)


def _room(model: Model, ratio: int, longest: int, recent: bool) -> int:
    """Counts the slots that texts of up to `longest` tokens need at a ratio."""
    plan = np.full(_windows(model, longest) + 1, ratio)
    return capacity(model.config, plan, recent=recent)


def _padded(model: Model, most: int, longest: int) -> int:
    """Counts the tokens that rows of up to `most` are padded to; 0: no more of them."""
    return _windows(model, longest) * model.window if most > model.window else 0


def _roomy(model: Model, state: MemoryState, new: Any, ratio: int) -> MemoryState:
    """Returns the state with room for `new` more tokens per row."""
    needed = needed_slots(model.config, state, new, _plan(ratio).ratios)
    if needed <= state.capacity:
        return state
    return state.resized(buffer_size(needed, state.window))
