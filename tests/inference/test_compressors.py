"""Compressors without training, through `compress`: what they keep, for whom and where.

Which slots each keeps of a text is compared with a float64 model in
tests/evaluation/test_baselines.py.
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import beacon_jax
from beacon_jax.cli import compress as compress_command
from beacon_jax.cli import generate as generate_command
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.compressors import METHODS, Compressor, Retention, find
from beacon_jax.inference.compressors.retention import sample_of
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.validate import ArgumentError
from beacon_jax.model.buffers import entries_of
from beacon_jax.model.partition import make_partition
from tests.inference.conftest import W
from tests.inference.test_command_lines import TEMPLATE, run  # noqa: F401

OWN_FACTS = f"{__name__}:Facts"
NAMES = [*sorted(METHODS), OWN_FACTS]
# The same, without the one that solves least squares in `make test`.
QUICK = [
    pytest.param(name, marks=pytest.mark.slow) if name == "attention-matching" else name
    for name in NAMES
]
CHOOSING = sorted(set(NAMES) - {"mean-pool", "streaming"})
TEXT = "In 1998 the harbour master counted 41 boats; the key is 52817. He wept."
OTHER = "At dawn the first of them left."  # three windows and 7 tokens
QUESTION = "Who?"


def small(k, v):
    return -jnp.swapaxes(jnp.linalg.norm(k, axis=-1), 1, 2)


class SmallKeys(Compressor):
    name = "small-keys"

    def score(self, piece, seen, count):
        return piece.per_layer(small)


class Facts(Retention):
    """Retention with random weights, and a correction, of whatever model is asked."""

    def __init__(self):
        self.bias = self.threshold = 0.0

    def observe(self, piece):
        c, draw = piece.net.config, np.random.default_rng(0).normal
        self.weights = draw(size=(c.num_layers, c.num_kv_heads, c.head_dim))
        self.correction = draw(size=self.weights.shape).astype(np.float32)
        self.sample = sample_of(piece.variables)
        return super().observe(piece)


class TooMany(SmallKeys):
    name = "too-many"

    def make(self, piece, seen, scores, count):
        return super().make(piece, seen, scores, count + 1)


def slots_of(memory, row=0):
    """Keys and values of the slots of a row, [L, n, K, H], and biases [L, n, K, 1]."""
    count, (k, v) = int(memory.slots[row]), (memory.state.k, memory.state.v)
    found = [np.asarray(x)[:, row, :count] for x in (entries_of(k), v)]
    if memory.state.biased:
        bias = np.asarray(k.bias)[:, row, :, :count, None]
        found.append(np.swapaxes(bias, 1, 2))
    return found


def same(a, b, row=0, other=0, atol=1e-5):
    # Biased slots hold solutions of linear systems in float32, which conditions of up
    # to 1,000 leave four digits of.
    rtol = 1e-4 if a.state.biased and atol else 1e-7
    for x, y in zip(slots_of(a, row), slots_of(b, other), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=rtol)


def test_the_default_is_beacons(model):
    made = [model.compress(TEXT, ratio=4, method=m) for m in (None, "beacon")]
    assert made[0].slots[0] == len(TEXT) // W * 2
    same(*made, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_leaves_as_many_slots_as_beacons_on_any_model(name, model, plain):
    beacons = model.compress([TEXT, OTHER], ratio=4)
    for each, times in ((model, 1), (plain, 8)):
        texts = [TEXT * times, OTHER * times]
        memory = each.compress(texts, ratio=4, method=name)
        windows = np.asarray(list(map(len, texts))) // each.window
        assert memory.slots.tolist() == (windows * each.window // 4).tolist()
        if each is model:
            assert memory.slots.tolist() == beacons.slots.tolist()
        rows = zip(memory.rows, texts, strict=True)
        for row, text in rows:
            assert row.length == len(text) and row.raw == row.length - row.start
            assert row.start == row.spans[-1:, 1].sum() and row.spans[:1, 0].sum() == 0
            assert (row.spans[1:, 0] == row.spans[:-1, 1]).all()
        assert np.array_equal(memory.state.slots, memory.slots)
        assert np.array_equal(memory.state.raw, [row.raw for row in memory.rows])
        counted = [row.windows for row in memory.rows]
        assert np.array_equal(memory.state.windows, counted)


@pytest.mark.parametrize("name", QUICK)
def test_a_row_of_a_batch_is_what_it_is_alone(name, model):
    both = model.compress([TEXT, OTHER, "No."], ratio=4, method=name)
    for row, text in enumerate((TEXT, OTHER)):
        same(both, model.compress(text, ratio=4, method=name), row)
    assert both.slots[2] == 0
    alone = [model.compress(t, ratio=4, method=name) for t in (TEXT, OTHER)]
    want = [model.complete(QUESTION, memory=m, max_new_tokens=12) for m in alone]
    found = model.complete([QUESTION] * 2, memory=both[:2], max_new_tokens=12)
    for a, b in zip(want, found, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize("name", QUICK)
def test_a_long_text_is_read_in_pieces_of_bounded_room(name, model):
    method = find(name)
    method.piece_tokens = 2 * W
    text = TEXT * 4
    seen = []
    make = method.make

    def watched(piece, seen_by_it, scores, count):
        seen.append((int(piece.stop[0] - piece.start[0]), piece.state.capacity))
        return make(piece, seen_by_it, scores, count)

    method.make = watched
    steps = []
    progress = lambda done, total: steps.append((done, total))
    memory = model.compress(text, ratio=4, method=method, on_progress=progress)
    whole = model.compress(text, ratio=4, method=name)
    assert memory.slots[0] == whole.slots[0] == len(text) // W * 2
    windows = len(text) // W
    if not method.evicts:
        assert len(seen) == -(-windows // 2)
        assert all(size <= 2 * W for size, _ in seen)
        # What is left, a piece, and room for two windows; a buffer is 25 % larger.
        room = 1.25 * (memory.slots[0] + 4 * W) + W
        assert max(capacity for _, capacity in seen) <= room
        assert room < whole.lengths[0]
    assert steps[-1] == (len(text), len(text))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    answer = model.complete(QUESTION, memory=memory, max_new_tokens=4)
    assert len(answer.tokens) == 4


def test_pieces_stay_within_trained_positions(model):
    read = []

    class Watched(SmallKeys):
        def make(self, piece, seen, scores, count):
            read.append(int(piece.stop[0]))
            return super().make(piece, seen, scores, count)

    assert model.config.trained_positions == 256
    model.compress(TEXT * 8, ratio=4, method=Watched())  # 568 tokens, 142 slots
    assert max(read) <= 256 - W and len(read) > 4
    kvzip, rows = find("kvzip"), []
    queries = kvzip.observe
    kvzip.observe = lambda piece: rows.append(piece) or queries(piece)
    model.compress(TEXT * 8, ratio=4, method=kvzip)
    for piece in rows:
        assert int(piece.stop[0] + piece.lengths[0]) <= 256


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"streaming"}))
def test_reading_on_is_reading_the_next_piece(name, model):
    method = find(name)
    method.piece_tokens = 2 * W
    first, rest = TEXT[: 2 * W], TEXT[2 * W :]
    at_once = model.compress(TEXT, ratio=4, method=method)
    memory = model.compress(first, ratio=4, method=method)
    before = slots_of(memory)
    on = model.compress(rest, ratio=4, method=method, memory=memory)
    same(on, at_once)
    assert np.array_equal(on.spans[0], at_once.spans[0])
    for x, y in zip(before, slots_of(memory), strict=True):  # is not taken over
        assert np.array_equal(x, y)


def test_an_open_window_is_compressed_when_it_is_full(model):
    cut = 2 * W + 3
    memory = model.compress(TEXT[:cut], ratio=4, method="kvzip")
    assert memory.rows[0].raw == 3
    on = model.compress(TEXT[cut:], ratio=4, method="kvzip", memory=memory)
    assert on.slots[0] == len(TEXT) // W * 2
    assert on.rows[0].tokens.tolist() == model.encode(TEXT, "x", first=True).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_an_open_window_waits_while_other_rows_are_compressed(name, model):
    begun = model.compress([TEXT[:5], OTHER[:5]], ratio=0)
    rest = [TEXT[5:], OTHER[5:7]]  # the second row's window stays open
    both = model.compress(rest, ratio=4, method=name, memory=begun)
    alone = model.compress(rest[1], ratio=4, method=name, memory=begun[1])
    assert both.slots[1] == 0 and both.rows[1].raw == 7
    for part in (lambda s: entries_of(s.k), lambda s: s.v):  # of the open window
        x, y = (np.asarray(part(m.state)) for m in (both, alone))
        np.testing.assert_allclose(x[:, 1, :7], y[:, 0, :7], atol=1e-5)
    a = model.complete([QUESTION] * 2, memory=both, max_new_tokens=6)[1]
    b = model.complete(QUESTION, memory=alone, max_new_tokens=6)
    assert a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize("name", QUICK)
def test_a_row_far_behind_reads_a_little_while_another_reads_much(name, model):
    long = TEXT * 2  # 35 slots of it, then a window more; the other reads 17
    begun = model.compress([long, "Oh"], ratio=0)
    rest = [OTHER[: 2 * W], long[: 17 * W]]
    both = model.compress(rest, ratio=4, method=name, memory=begun)
    for row in range(2):
        alone = model.compress(rest[row], ratio=4, method=name, memory=begun[row])
        same(both, alone, row)


def test_scores_that_are_no_numbers_displace_nothing(model):
    class Broken(Compressor):
        name = "broken"

        def score(self, piece, seen, count):
            bad = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1.0])
            size = piece.state.capacity
            return piece.per_layer(small) * 0 + jnp.resize(bad, (size,))

    first = model.compress(TEXT[: 2 * W], ratio=0)
    memory = model.compress(TEXT[2 * W :], ratio=4, method=Broken(), memory=first)
    for x, y in zip(slots_of(first), slots_of(memory), strict=True):
        np.testing.assert_allclose(x, y[:, : 2 * W], atol=1e-6)


def test_streaming_evicts_what_is_old(model):
    memory = model.compress(TEXT, ratio=4, method="streaming")
    v = slots_of(memory)[1][0]  # of layer 0: made of each token alone
    whole = slots_of(model.compress(TEXT, ratio=0))[1][0]
    count = len(v)
    np.testing.assert_allclose(v[:4], whole[:4], atol=1e-6)
    end = len(TEXT) // W * W
    np.testing.assert_allclose(v[4:], whole[end - count + 4 : end], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_generated_stays_as_it_is(name, model):
    memory = model.compress(TEXT, ratio=4, method=name)
    made = model.complete(QUESTION, memory=memory, max_new_tokens=3 * W)
    after, row = made.memory, made.memory.rows[0]
    read = len(TEXT) + len(QUESTION) + len(made.tokens)
    assert row.length == read
    # One slot for each token that was not compressed.
    assert after.entries[0] == memory.slots[0] + read - len(TEXT) // W * W
    again = model.complete(
        QUESTION, context=TEXT, ratio=4, method=name, max_new_tokens=3 * W
    )
    assert made.tokens.tolist() == again.tokens.tolist()


def test_contexts_of_prompts(model):
    options = {"ratio": 4, "method": "snapkv", "max_new_tokens": 6}
    one = model.complete([QUESTION, "When?"], context=TEXT, **options)
    each = model.complete([QUESTION, "When?"], context=[TEXT, OTHER], **options)
    assert one[0].tokens.tolist() == each[0].tokens.tolist()
    alone = model.complete("When?", context=OTHER, **options)
    assert alone.tokens.tolist() == each[1].tokens.tolist()
    memory = model.compress(OTHER, ratio=2)
    behind = model.complete(
        [QUESTION] * 2, context=[TEXT, OTHER], memory=memory.truncate(3 * W), **options
    )
    assert [g.memory.rows[0].length for g in behind] == [
        3 * W + len(t) + len(QUESTION) + 6 for t in (TEXT, OTHER)
    ]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("which", ["model", "plain"])
def test_a_budget_holds_to_the_end_of_the_answer(name, which, request):
    model = request.getfixturevalue(which)
    notes = []
    memory = model.compress(
        TEXT * 3 if which == "model" else TEXT * 20,
        method=name,
        max_slots=200 if which == "plain" else 60,
        reserve=20,
        on_note=notes.append,
    )
    made = model.complete(QUESTION, memory=memory, max_new_tokens=20 - len(QUESTION))
    assert made.memory.entries[0] <= (200 if which == "plain" else 60)
    assert re.match(r"budget of \d+ slots: x\d+", notes[0])


def test_a_text_that_fills_no_window_is_kept_and_that_is_said(plain):
    notes = []
    memory = plain.compress(TEXT, ratio=4, method="kvzip", on_note=notes.append)
    assert memory.slots[0] == 0 and memory.rows[0].raw == len(TEXT)
    assert notes == ["the text fills no window of 256 tokens: nothing is compressed"]


def test_auto_takes_the_ratio_whose_positions_fit(model):
    notes = []
    model.compress(TEXT * 6, ratio="auto", method="streaming", on_note=notes.append)
    assert re.search("auto: x2", notes[0])


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("lossless", ["windows", "slots"])
def test_spans_stay(name, lossless, model):
    span = r"52817"
    at = TEXT.index("52817")
    memory = model.compress(TEXT, ratio=4, method=name, spans=span, lossless=lossless)
    beacons = model.compress(TEXT, ratio=4, spans=span, lossless=lossless)
    assert memory.slots[0] == beacons.slots[0]
    tokens = range(at, at + 5)
    if lossless == "windows":
        tokens = range(at // W * W, (at + 4) // W * W + W)
    v = slots_of(memory)[1]
    whole = slots_of(model.compress(TEXT, ratio=0))[1]
    for layer in range(v.shape[0]):
        for token in tokens:
            off = np.abs(v[layer] - whole[layer, token]).max(-1).min(0)
            assert (off < 1e-5).all()


def test_mean_pool_leaves_whole_windows_as_they_are(model):
    memory = model.compress(TEXT, ratio=4, method="mean-pool", spans="52817")
    whole = slots_of(model.compress(TEXT, ratio=0))[1]
    at = TEXT.index("52817") // W
    v = slots_of(memory)[1][:, at * 2 : at * 2 + W]
    np.testing.assert_allclose(v, whole[:, at * W : at * W + W], atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_an_int8_memory_is_the_memory_rounded(name, model):
    made = [
        model.compress(TEXT, ratio=4, method=name, memory_dtype=dtype)
        for dtype in (None, "int8")
    ]
    assert made[1].dtype == "int8" and made[1].slots[0] == made[0].slots[0]
    if name in ("streaming", "mean-pool"):  # others may choose other slots
        v = made[1].state.v
        count = int(made[1].slots[0])
        rounded = (
            np.asarray(v.values)[:, 0, :count]
            * np.swapaxes(np.asarray(v.scale)[:, 0, :, :count], -1, -2)[..., None]
        )
        want = slots_of(made[0])[1]
        np.testing.assert_allclose(rounded[0], want[0], atol=0.02 * np.abs(want).max())
    answer = model.complete(QUESTION, memory=made[1], max_new_tokens=4)
    assert answer.memory.dtype == "int8"


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_is_the_same_memory(name, model, tmp_path):
    memory = model.compress([TEXT, OTHER], ratio=4, method=name)
    memory.save(tmp_path / "m.beacon")
    back = Memory.load(tmp_path / "m.beacon", model)
    for row in range(2):
        same(memory, back, row, row, atol=0)
    a, b = (
        model.complete([QUESTION] * 2, memory=m, max_new_tokens=12)
        for m in (memory, back)
    )
    assert [g.tokens.tolist() for g in a] == [g.tokens.tolist() for g in b]
    texts = [m.describe().splitlines()[:2] for m in (memory, back)]
    assert texts[0] == texts[1] and all("x4 planned" in line for line in texts[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_leaves_the_same_memory(name, model):
    split = dataclasses.replace(model, partition=make_partition("data:2"))
    rows = [TEXT, OTHER]
    a, b = (m.compress(rows, ratio=4, method=name) for m in (model, split))
    assert entries_of(b.state.k).sharding.spec == P(None, "data")
    for row in range(2):
        same(a, b, row, row)


def test_a_conversation_goes_on_behind_it(model):
    memory = model.compress(TEXT, ratio=4, method="kvzip")
    chat = Chat(model, memory, chat_template=TEMPLATE, max_new_tokens=4)
    first = chat.say("Who wept?")
    chat.say("And when?")
    assert len(first.tokens) == 4
    assert chat.memory.slots[0] >= memory.slots[0]
    for x, y in zip(slots_of(memory), slots_of(chat.memory), strict=True):
        np.testing.assert_allclose(x, y[:, : x.shape[1]], atol=1e-6)


def test_a_memory_is_cut_where_a_piece_ends_or_read_again(model):
    memory = model.compress(TEXT, ratio=4, method="snapkv")
    end = len(TEXT) // W * W
    assert memory.truncate(end).slots[0] == memory.slots[0]
    cut = memory.truncate(2 * W + 1)
    assert cut.slots[0] == 0 and len(cut.rows[0].pending) == 2 * W + 1
    want = model.complete(
        QUESTION, context=TEXT[: 2 * W + 1], ratio=0, max_new_tokens=5
    )
    made = model.complete(QUESTION, memory=cut, max_new_tokens=5)
    assert made.tokens.tolist() == want.tokens.tolist()


def test_memories_are_mounted_whoever_made_them(model):
    made = [model.compress(TEXT, ratio=4, method=m) for m in ("kvzip", "streaming")]
    both = Memory.concatenate([*made, model.compress(OTHER, ratio=4)])
    assert both.slots[0] == sum(m.slots[0] + m.rows[0].raw for m in made) + 6 + 7
    answer = model.complete(QUESTION, memory=both, max_new_tokens=4)
    assert len(answer.tokens) == 4


def test_a_method_of_ones_own(model):
    memory = model.compress(TEXT, ratio=4, method=SmallKeys())
    k = slots_of(memory)[0]
    whole = slots_of(model.compress(TEXT, ratio=0))[0]
    norm = lambda x: np.sort(np.linalg.norm(x, axis=-1), axis=1)
    want = norm(whole)[:, : k.shape[1]]  # rotations leave norms as they are
    np.testing.assert_allclose(norm(k), want, rtol=1e-5)
    with pytest.raises(ValueError, match="method=too-many left .* `make` has to keep"):
        model.compress(TEXT, ratio=4, method=TooMany())


def test_a_method_that_says_nothing_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match="Empty has neither `score` nor `make`"):

        class Empty(Compressor):
            name = "empty"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "kvzp", "ratio": 4}, "did you mean kvzip"),
        ({"method": "kvzip"}, "needs to know by how much: give ratio=4, max_slots"),
        ({"method": "kvzip", "ratio": 3}, "ratio=3 does not divide window=8"),
        ({"method": "no.such:Class", "ratio": 4}, "cannot be imported"),
        ({"method": "json:JSONDecoder", "ratio": 4}, "is no compressor"),
        ({"method": "snapkv", "ratio": 4, "recent": True}, "cannot go with recent"),
        ({"method": "streaming", "ratio": 4, "spans": "key"}, "cannot keep spans"),
        (
            {"method": "mean-pool", "ratio": 4, "spans": "key", "lossless": "slots"},
            "cannot keep single tokens .* or lossless='windows'",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, said, model):
    with pytest.raises(ValueError, match=said):
        model.compress(TEXT, **options)


def test_other_refusals(model, plain):
    with pytest.raises(TypeError, match="method=3 is .*give 'beacon', 'streaming'"):
        model.compress(TEXT, ratio=4, method=3)
    with pytest.raises(TypeError, match="an object of a class"):
        model.compress(TEXT, ratio=4, method=SmallKeys)
    with pytest.raises(ArgumentError, match="ratio=4 needs beacons.*streaming, snapkv"):
        plain.compress(TEXT, ratio=4)
    with pytest.raises(ArgumentError, match="method='beacon' needs beacons"):
        plain.compress(TEXT, ratio=4, method="beacon")
    with pytest.raises(ArgumentError, match="compresses a context"):
        model.complete(QUESTION, ratio=4, method="kvzip")
    opened = model.compress(OTHER, ratio=4)
    with pytest.raises(ArgumentError, match="has beacons"):
        model.compress(TEXT, ratio=4, method="kvzip", memory=opened)
    with pytest.raises(TypeError, match="give memory=compress"):
        Chat(model, method="kvzip", ratio=4)
    with pytest.raises(beacon_jax.CapacityError):
        model.compress(TEXT, ratio=4, method="kvzip", capacity=40)


def test_the_commands_take_it(run, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend("")
    made = run(
        compress_command,
        "--context=context.txt",
        "--ratio=4",
        "--method=kvzip",
        "--out=m.beacon",
    )
    assert made.code == 0 and "MiB), x4;" in made.out
    asked = run(
        generate_command,
        "--load_memory=m.beacon",
        "--prompt=Who?",
        "--max_new_tokens=4",
    )
    assert asked.code == 0
    same_text = run(
        generate_command,
        "--context=context.txt",
        "--ratio=4",
        "--method=kvzip",
        "--prompt=Who?",
        "--max_new_tokens=4",
    )
    assert same_text.out == asked.out
    wrong = run(generate_command, "--prompt=Who?", "--ratio=4", "--method=kvzip")
    assert wrong.code == 1 and "--method=kvzip compresses a context" in wrong.err
    near = run(
        generate_command,
        "--context=context.txt",
        "--prompt=a",
        "--ratio=4",
        "--method=snap",
    )
    assert near.code == 1 and "did you mean snapkv" in near.err
    own = run(
        generate_command,
        "--context=context.txt",
        "--ratio=4",
        f"--method={__name__}:SmallKeys",
        "--prompt=Who?",
        "--max_new_tokens=4",
    )
    assert own.code == 0
