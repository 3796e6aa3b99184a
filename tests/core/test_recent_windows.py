"""Rows that keep their last full window raw: a memory is a function of its tokens.

docs/specification.md section 2.1. The reference runs one window after the other by
plain calls.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core import plan, recent
from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed as feed_plain
from beacon_jax.core.memory import CapacityError, init_memory
from beacon_jax.core.plan import capacity, needed_slots, static_ratios
from beacon_jax.inference.decode import Decoding, decode
from beacon_jax.inference.sampling import make_sampling
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.net import Net
from tests.core.test_properties import config_with, variables
from tests.tiny import W

pytestmark = pytest.mark.optimized  # tolerances of what users run
ROOM, T = 96, 5 * W + 5
RATIOS = np.asarray([4, 2, 4, 0, 2, 2, 4], np.int32)
TEXT = np.random.default_rng(0).integers(3, 31, (3, T)).astype(np.int32)
LENGTHS = np.asarray([T, 3 * W, W + 3])
KINDS = pytest.mark.parametrize(
    ("sink", "placement", "dtype"),
    [
        (0, "interleave", "float32"),
        (3, "append", "int8"),
        pytest.param(0, "interleave", "int8", marks=pytest.mark.slow),
        pytest.param(3, "append", "float32", marks=pytest.mark.slow),
        pytest.param(3, "interleave", "float32", marks=pytest.mark.slow),
        pytest.param(0, "append", "float32", marks=pytest.mark.slow),
    ],
)


def kind(sink, placement) -> ModelConfig:
    return config_with(sink=sink, placement=placement)


def empty(config, rows, dtype, room=ROOM):
    return init_memory(config, rows, room, dtype, recent=True)


def feed(config, memory, tokens, lengths=None, ratios=RATIOS, **more):
    given = (Net(config), variables(), memory, tokens, lengths, ratios)
    return recent.feed(*given, **more)


def defined(config, tokens, ratios, dtype, *, opened=False):
    """Logits after one row's tokens, and its memory: the definition, word for word.

    Args:
      opened: a last window that is full is still open, as its own logits have it.
    """
    tokens = np.asarray(tokens)
    full = (len(tokens) - opened) // W
    memory = init_memory(config, 1, ROOM, dtype)
    at = lambda i: [ratios[min(i, len(ratios) - 1)]]
    used = [at(i) if i < full - 1 else [0] for i in range(full)]
    for i, ratio in enumerate(used):
        window = tokens[None, i * W : (i + 1) * W]
        given = (Net(config), variables(), memory, window, None)
        out, memory = feed_plain(*given, np.asarray(ratio, np.int32))
    if len(rest := tokens[None, full * W :]) and rest.size:
        ratio = np.asarray(at(full), np.int32)
        given = (Net(config), variables(), memory, rest, None, ratio)
        out, memory = feed_plain(*given, close=False)
    return np.asarray(out.last_logits[0]), memory


def rows_of(config, memory, row):
    """Counts, and the entries that count, as floats; with int8 the mean of keys."""
    n = int(memory.slots[row] + memory.open_entries(config.beacon.placement)[row])
    counts = [int(getattr(memory, x)[row]) for x in ("slots", "sinks", "raw")]
    found = []
    for buffer in (memory.k, memory.v):
        if hasattr(buffer, "scale"):
            values = np.asarray(buffer.values[:, row, :n], np.float64)
            scale = np.asarray(buffer.scale[:, row, :, :n])
            found.append(values * np.swapaxes(scale, 1, 2)[..., None])
            if buffer.mean is not None:
                found.append(np.asarray(buffer.mean[:, row]))
        else:
            found.append(np.asarray(buffer[:, row, :n]))
    return counts, found


def assert_equal(config, ours, theirs, row=0, other=0, atol=2e-5):
    """Rows are equal; `atol` is of entries, in int8 of what they were rounded from."""
    (a, x), (b, y) = rows_of(config, ours, row), rows_of(config, theirs, other)
    assert a == b
    for one, two in zip(x, y, strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


@KINDS
def test_a_text_is_compressed_as_the_definition_says(sink, placement, dtype):
    config = kind(sink, placement)
    out, memory = feed(config, empty(config, 3, dtype), TEXT, LENGTHS)
    assert memory.recent is not None
    for row, length in enumerate(LENGTHS):
        tokens = TEXT[row, :length]
        logits, _ = defined(config, tokens, RATIOS, dtype, opened=True)
        np.testing.assert_allclose(out.last_logits[row], logits, atol=2e-5)
        _, expected = defined(config, tokens, RATIOS, dtype)
        assert_equal(config, memory, expected, row)
        full = length // W
        assert int(memory.windows[row]) == full
        np.testing.assert_array_equal(
            memory.recent.tokens[row], tokens[(full - 1) * W : full * W]
        )
        assert int(memory.recent.ratio[row]) == RATIOS[full - 1]


@KINDS
def test_pieces_give_what_the_whole_gives(sink, placement, dtype):
    """Rows of any lengths, some empty in a piece, others whole windows."""
    config = kind(sink, placement)
    whole, expected = feed(config, empty(config, 3, dtype), TEXT, LENGTHS)
    memory = empty(config, 3, dtype)
    cuts = np.asarray([[0, 3, W, W + 1, 3 * W + 2, T], [0, 0, W, 2 * W, 2 * W, 3 * W]])
    cuts = np.concatenate([cuts, [[0, W - 1, W, W, W + 2, W + 3]]])
    for lo, hi in itertools.pairwise(cuts.T):
        piece = np.zeros((3, int((hi - lo).max())), np.int32)
        for row, (a, b) in enumerate(zip(lo, hi, strict=True)):
            piece[row, : b - a] = TEXT[row, a:b]
        out, memory = feed(config, memory, piece, hi - lo)
    tolerance = 0.02 if dtype == "int8" else 2e-5  # a mean is that of the first piece
    np.testing.assert_allclose(out.last_logits, whole.last_logits, atol=tolerance)
    for row in range(3):
        assert_equal(config, memory, expected, row, row)


@pytest.mark.parametrize(
    ("sink", "placement", "dtype"),
    [
        (0, "interleave", "float32"),
        pytest.param(0, "interleave", "int8", marks=pytest.mark.slow),
        pytest.param(3, "append", "float32", marks=pytest.mark.slow),
        pytest.param(3, "append", "int8", marks=pytest.mark.slow),
    ],
)
def test_decoding_writes_what_feeding_writes(sink, placement, dtype):
    """Token by token, rows at different places; every token's logits, too."""
    config = kind(sink, placement)
    given = (Net(config), variables())
    each, expected = feed(
        config, empty(config, 3, dtype), TEXT, LENGTHS, outputs="logits"
    )
    _, memory = feed(config, empty(config, 3, dtype), TEXT[:, :3])
    logits = [None] * 3
    static = static_ratios(memory, RATIOS)
    for t in range(3, T):
        active, token = jnp.asarray(t < LENGTHS), jnp.asarray(TEXT[:, t])
        out, memory = decode_step(*given, memory, token, RATIOS, active, static=static)
        memory = recent.settle(*given, memory)
        logits.append(out)
    # A decoded token reads int8 entries of its own window, a fed one exact ones.
    tolerance = 0.03 if dtype == "int8" else 2e-5
    for row, length in enumerate(LENGTHS):
        for t in range(3, length):
            np.testing.assert_allclose(
                logits[t][row], each.logits[row, t], atol=tolerance
            )
        (_, x), (_, y) = rows_of(config, memory, row), rows_of(config, expected, row)
        slots = int(expected.slots[row])
        for one, two in zip(x, y, strict=True):
            # Closed windows were run from their ids: they are equal in int8, too.
            mean = one.shape[1] != two.shape[1] or one.ndim < 4
            one, two = (one, two) if mean else (one[:, :slots], two[:, :slots])
            np.testing.assert_allclose(one, two, atol=2e-5)


def test_every_tokens_logits_are_those_of_the_open_window():
    config = kind(0, "interleave")
    out, _ = feed(config, empty(config, 1, "float32"), TEXT[:1], outputs="logits")
    for t in (0, W - 1, W, 2 * W - 1, 2 * W + 3, T - 1):
        expected, _ = defined(config, TEXT[0, : t + 1], RATIOS, "float32", opened=True)
        np.testing.assert_allclose(out.logits[0, t], expected, atol=2e-5)


def test_losses_are_those_of_the_logits():
    config = kind(0, "interleave")
    labels = np.roll(TEXT, -1, axis=1)
    given = (config, empty(config, 3, "float32"), TEXT, LENGTHS)
    out, memory = feed(*given, outputs="logits")
    found, other = feed(*given, outputs="score", labels=labels)
    logits = np.asarray(out.logits, np.float64)
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    wanted = -np.take_along_axis(logits, labels[..., None], axis=2)[..., 0]
    for row, length in enumerate(LENGTHS):
        at = slice(0, length)
        np.testing.assert_allclose(
            found.token_loss[row, at], wanted[row, at], atol=2e-5
        )
        best = logits[row, at].argmax(-1) == labels[row, at]
        np.testing.assert_array_equal(found.greedy[row, at], best)
        assert_equal(config, other, memory, row, row)
    with pytest.raises(ValueError, match="labels=None"):
        feed(*given, outputs="loss")


def test_a_loop_of_decoding_goes_on_where_a_row_fills_its_window():
    """Greedy tokens of each row are those of a row alone by the definition."""
    config = kind(0, "interleave")
    net, steps, limits = Net(config), 21, np.asarray([21, 5, 20])
    out, memory = feed(config, empty(config, 3, "float32"), TEXT[:, :19], LENGTHS - 5)
    lengths = np.minimum(LENGTHS - 5, 19)
    found = decode(
        net,
        variables(),
        memory,
        out.last_logits,
        RATIOS,
        Decoding(limits, make_sampling(), eos_ids=()),
    )
    for row in range(3):
        tokens = TEXT[row, : lengths[row]]
        for step in range(int(limits[row])):
            logits, _ = defined(config, tokens, RATIOS, "float32", opened=True)
            assert found.tokens[row, step] == logits.argmax()
            tokens = np.append(tokens, found.tokens[row, step])
        _, expected = defined(config, tokens, RATIOS, "float32")
        assert_equal(config, found.memory, expected, row)
    assert (found.lengths == limits).all() and found.tokens.shape == (3, steps)


def test_the_buffer_that_is_asked_for_is_enough_and_no_less():
    config = kind(3, "append")
    small = empty(config, 1, "float32", 1)
    needed = needed_slots(config, small, T, RATIOS)
    assert needed == capacity(config, RATIOS[:5], recent=True)
    with pytest.raises(CapacityError, match=f"needs {needed}"):
        feed(config, empty(config, 1, "float32", needed - 1), TEXT[:1])
    _, memory = feed(config, empty(config, 1, "float32", needed), TEXT[:1])
    _, expected = defined(config, TEXT[0], RATIOS, "float32")
    assert_equal(config, memory, expected)
    # Of a memory that has a raw window: what it leaves behind counts, not what it has.
    first = feed(config, empty(config, 1, "float32"), TEXT[:1, : 3 * W])[1]
    assert needed_slots(config, first, T - 3 * W, RATIOS) == needed


@pytest.fixture
def windows_run(monkeypatch):
    """Windows that are run of each row, by their ratios."""
    found, run = [], recent._run

    def counted(model, memory, tokens, counts, ratios, **how):
        for row, count in enumerate(counts):
            n = -(-int(count) // W)
            found.extend((row, int(plan.at(ratios, i))) for i in range(n))
        return run(model, memory, tokens, counts, ratios, **how)

    monkeypatch.setattr(recent, "_run", counted)
    return found


def test_reading_costs_nothing_more_and_decoding_two_windows_per_window(windows_run):
    config, memory = kind(0, "interleave"), None
    given = (Net(config), variables())
    feed(config, empty(config, 3, "float32"), TEXT, LENGTHS + np.eye(3, dtype=int)[1])
    assert sorted(windows_run) == sorted(
        [(0, r) for r in (4, 2, 4, 0, 0, 2)]  # of 5 full windows the last is raw
        + [(1, r) for r in (4, 2, 0, 0)]
        + [(2, r) for r in (0, 2)]
    )
    windows_run.clear()
    whole = TEXT[:1, : 3 * W]
    _, memory = feed(config, empty(config, 1, "float32"), whole, outputs="none")
    assert windows_run == [(0, 4), (0, 2), (0, 0)]
    windows_run.clear()
    feed(config, empty(config, 1, "float32"), whole)  # with logits of the last token
    assert windows_run == [(0, 4), (0, 0), (0, 4), (0, 2), (0, 0)]
    windows_run.clear()
    static = static_ratios(memory, RATIOS)
    for t in range(3 * W, 5 * W):
        token = jnp.asarray(TEXT[:1, t])
        _, memory = decode_step(*given, memory, token, RATIOS, static=static)
        memory = recent.settle(*given, memory)
    assert windows_run == [(0, 4), (0, 0), (0, 0), (0, 0)]  # own ratio, then 0; twice


def test_a_plain_call_refuses_such_a_memory():
    config = kind(0, "interleave")
    with pytest.raises(ValueError, match=r"use core\.recent\.feed"):
        feed_plain(
            Net(config),
            variables(),
            empty(config, 1, "float32"),
            TEXT[:1],
            None,
            RATIOS,
        )
