"""Memories that keep the last full window raw: what is done with them.

tests/core/test_recent_windows.py compares them with the definition. Here the ways to
the same tokens are compared with each other.
"""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from beacon_jax import flops
from beacon_jax.core.law import Law
from beacon_jax.inference import packs
from beacon_jax.inference.budget import Budget
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.history import History
from beacon_jax.inference.loading import load
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.plan import make_plan
from beacon_jax.inference.row import Row
from beacon_jax.inference.validate import ArgumentError
from tests.inference.memories import assert_same_live
from tests.inference.test_conversation import MESSAGES, TEMPLATE

TEXT = "In 1998 the harbour master counted 41 boats; the key is 52817. He wept."
W = 8
ROOM = {"capacity": 160}  # one buffer: the tests share compiled programs
OPTIONS = {"ratio": 4, "recent": True, **ROOM}


@pytest.fixture(scope="module")
def ids(model):
    return model.encode(TEXT, "text", first=True)


@pytest.fixture(scope="module")
def sunk(make_folder):
    """Beacons behind their window, and two sinks."""
    return load(make_folder(beacon_pos="append", beacon_sink_size=2))


def assert_same(ours: Memory, theirs: Memory, row: int = 0, *, atol: float = 1e-5):
    """One row of both: equal accounts, counts and entries."""
    a, b = ours.rows[row], theirs.rows[0]
    for name in ("spans", "ratios", "marks", "fed", "own", "recent", "tokens"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    for name in ("slots", "sinks", "raw", "windows"):
        x, y = (getattr(m.state, name) for m in (ours, theirs))
        assert int(x[row]) == int(y[0]), name
    for memory, at, history in ((ours, row, a), (theirs, 0, b)):
        assert int(memory.state.slots[at]) == history.slots
        assert int(memory.state.raw[at]) == history.raw
        lies = history.own is not None
        assert int(memory.state.recent.length[at]) == (W if lies else 0)
        if lies:
            assert int(memory.state.recent.ratio[at]) == history.own
            start = history.start - W
            np.testing.assert_array_equal(
                memory.state.recent.tokens[at], history.tokens[start : start + W]
            )
    count = int(theirs.entries[0])
    for name in ("k", "v"):
        x, y = (_floats(getattr(m.state, name)) for m in (ours, theirs))
        np.testing.assert_allclose(x[:, row, :count], y[:, 0, :count], atol=atol)


def _floats(buffer) -> np.ndarray:
    if not hasattr(buffer, "scale"):
        return np.asarray(buffer)
    return buffer.values * np.swapaxes(np.asarray(buffer.scale), 2, 3)[..., None]


@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        ("model", None),
        pytest.param("sunk", "int8", marks=pytest.mark.slow),
        pytest.param("sunk", None, marks=pytest.mark.slow),
        pytest.param("model", "int8", marks=pytest.mark.slow),
    ],
)
def test_all_ways_to_the_same_tokens_give_the_same_memory(
    request, ids, tmp_path, which, dtype
):
    """Whole, in pieces, ragged, behind truncate, and from a pack."""
    model = request.getfixturevalue(which)
    given = OPTIONS | {"memory_dtype": dtype}
    whole = model.compress(ids, **given)
    assert whole.recent and whole.rows[0].own == 4
    # W raw slots, one beacon per 4 tokens in front of them, and the sinks.
    full, sinks = len(ids) // W, int(whole.state.sinks[0])
    assert whole.slots[0] == sinks + 2 * (full - 1) + W
    memory = None
    for lo, hi in ((0, 5), (5, 8), (8, 24), (24, 25), (25, len(ids))):
        memory = model.compress(ids[lo:hi], memory=memory, **given)
    assert_same(memory, whole)
    lengths = (len(ids), 2 * W, W - 1, 5 * W + 3)
    batch = model.compress([ids[:n] for n in lengths], **given)
    for row, n in enumerate(lengths):
        assert_same(batch, model.compress(ids[:n], **given), row)
    for keep in (len(ids) - 1, 8 * W, 8 * W - 1, 7 * W, 3, 0):
        cut = whole.truncate(keep)
        assert len(cut.rows[0].pending) < 2 * W and cut.lengths[0] == keep
        again = model.compress(ids[keep:], memory=cut, **given)
        assert_same(again, whole)
    # Cut twice without feeding in between.
    again = whole.truncate(6 * W + 3).truncate(5 * W + 1)
    assert_same(model.compress(ids[5 * W + 1 :], memory=again), whole)
    part = model.compress(ids[: 4 * W + 2], **given)
    part.save(tmp_path / "part.beacon", tokens=False)
    loaded = Memory.load(tmp_path / "part.beacon", model)
    assert loaded.rows[0].tokens is None and loaded.recent
    after = model.compress(ids[4 * W + 2 :], memory=loaded)
    assert_same(_with_tokens(after, whole), whole)


def _with_tokens(memory: Memory, other: Memory) -> Memory:
    rows = zip(memory.rows, other.rows, strict=True)
    made = tuple(dataclasses.replace(a, tokens=b.tokens) for a, b in rows)
    return dataclasses.replace(memory, rows=made)


def test_answers_end_in_the_memory_of_all_their_tokens(plain_text, ids):
    """Of a batch, each row after its own number of tokens, stop strings included."""
    model, prompts, new = plain_text, [ids[:30], ids[:7], ids[:16]], [20, 3, 17]
    made = model.complete(prompts, max_new_tokens=new, **OPTIONS)
    for prompt, one, count in zip(prompts, made, new, strict=True):
        assert len(one.tokens) == count
        tokens = np.concatenate([prompt, one.tokens])
        assert_same(one.memory, model.compress(tokens, **OPTIONS))
    # It stops inside a block, behind which a window closes.
    stop = made[0].text[8:12]
    stopped = model.complete(prompts[0], max_new_tokens=20, stop=stop, **OPTIONS)
    assert stopped.finish == "stop" and len(stopped.tokens) <= 8
    assert len(stopped.memory.rows[0].pending) < 2 * W
    after = model.compress("more", memory=stopped.memory)
    more = model.encode("more", "text", first=False)
    tokens = np.concatenate([prompts[0], stopped.tokens, more])
    assert_same(after, model.compress(tokens, **OPTIONS))


@pytest.mark.slow
def test_a_conversation_is_the_memory_of_its_tokens_after_undo_too(model):
    options = OPTIONS | {"max_new_tokens": 9, "capacity": 320}
    chat = Chat(model, chat_template=TEMPLATE, **options)
    made = [chat.say(message) for message in MESSAGES]
    assert chat.memory is not None and chat.memory.recent
    chat.undo()
    assert len(chat.memory.rows[0].pending) < 2 * W
    assert chat.say(MESSAGES[-1]).text == made[-1].text
    tokens = chat.memory.rows[0].tokens
    assert_same(chat.memory, model.compress(tokens, **options_of(options)))


def options_of(options: dict) -> dict:
    return {k: v for k, v in options.items() if k != "max_new_tokens"}


def test_before_a_window_closes_nothing_changes(model, ids):
    plain = model.compress(ids[: W - 1], ratio=4, **ROOM)
    ours = model.compress(ids[: W - 1], **OPTIONS)
    assert_same_live(ours, plain)
    assert ours.used_nbytes == plain.used_nbytes and not plain.recent


def test_bytes_count_the_raw_window_and_its_ids(model, ids):
    ours, plain = model.compress(ids, **OPTIONS), model.compress(ids, ratio=4, **ROOM)
    more = (W - W // 4) * plain.slot_nbytes + 4 * W
    assert ours.used_nbytes == plain.used_nbytes + more
    assert ours.account().nbytes == ours.used_nbytes
    assert ours.nbytes == plain.nbytes + 4 * W
    assert "(the last 8 raw)" in ours.describe() and "x4 planned" in ours.describe()
    assert repr(ours).endswith("float32, recent)")


def test_budgets_hold_what_is_kept_raw(model, ids):
    slot = model.compress(ids, **OPTIONS).slot_nbytes
    options = {"reserve": 12, "recent": True, **ROOM}
    nbytes = 40 * slot + 4 * W
    memory = model.compress(ids, max_bytes=nbytes, **options)
    assert 30 * slot < memory.used_nbytes <= nbytes
    assert model.compress(ids[:12], memory=memory).used_nbytes <= nbytes
    with pytest.raises(ValueError, match="last full window is kept raw, 8 slots") as e:
        model.compress(ids, max_bytes=9 * slot, **options)
    least = int(re.findall(r"max_bytes=(\d+) ", str(e.value))[-1])
    before, given = History.empty(recent=True), {"length": len(ids), "new_tokens": 12}
    with pytest.warns(UserWarning, match="x8 is used"):
        budget = Budget.read(None, least, slot, 4 * W)
        make_plan(model.config, budget=budget, before=before, **given)
    with pytest.raises(ValueError, match="too small"):
        budget = Budget.read(None, least - 1, slot, 4 * W)
        make_plan(model.config, budget=budget, before=before, **given)


@pytest.mark.parametrize("text", [5 * W + 3, 5 * W, W, 3])
@pytest.mark.parametrize("read", [0, 3, 2 * W + 1])
def test_plans_count_the_entries_that_there_will_be(model, text, read):
    """Token by token, just before a window closes, too."""
    law, plan, new = Law.of(model.config), np.asarray([4], np.int32), 2 * W + 1
    before = History.empty(recent=True).feed(law, plan, np.zeros(read, np.int32))
    row = Row(model.config, text, new, before)
    most = 0
    for count in range(text, text + new + 1):
        after = before.feed(law, plan, np.zeros(count, np.int32))
        most = max(most, after.slots + int(law.entries(4, after.raw)))
        if count > text:  # a token earlier, and this one behind it in the open window
            after = before.feed(law, plan, np.zeros(count - 1, np.int32))
            most = max(most, after.slots + int(law.entries(4, after.raw + 1)))
    assert row.held(row.applied(row.uniform(4))) == most


def test_positions_and_flops_are_those_of_the_windows_that_are_run(model):
    before = History.empty(recent=True)
    row = Row(model.config, 5 * W + 3, 0, before)
    ratios = row.uniform(4)
    assert row.positions(ratios) == 4 * 2 + W + 3
    window = lambda ratio, slots, raw: (
        flops.window(model.config, ratio, slots, raw=raw).total
    )
    spent = sum(window(4, 2 * i, W) for i in range(4)) + window(0, 8, W)
    spent += window(4, 8 + W, 3) + flops.full_attention(model.config, 0).lm_head
    assert row.flops(ratios) == spent


def test_mounted_windows_stay_as_they_are(model, ids):
    first, second = (model.compress(part, **OPTIONS) for part in (ids[:19], ids[19:43]))
    both = Memory.concatenate([first, second])
    assert both.recent and both.rows[0].own is None and both.rows[0].fixed == 6
    slots = 2 + W + 3 + 2 + 2 + W
    assert both.slots[0] == slots
    after = model.compress(ids[43:62], memory=both)
    n = np.asarray(both.state.slots)[0]
    for name in ("k", "v"):
        x, y = (np.asarray(getattr(m.state, name)) for m in (both, after))
        np.testing.assert_array_equal(x[:, :, :n], y[:, :, :n])
    assert after.slots[0] == slots + 2 + W and after.rows[0].own == 4
    # Back to where they end, and into them.
    assert after.truncate(43).slots[0] == slots
    assert after.truncate(52).slots[0] == slots
    assert len(after.truncate(58).rows[0].pending) == 58 - 43
    assert after.truncate(16).slots[0] == 2 + W
    other = model.compress(ids[:19], ratio=4)
    with pytest.raises(ValueError, match="recent False, not True"):
        Memory.concatenate([first, other])


def test_a_memory_goes_on_as_it_was_made(model, ids):
    ours, plain = model.compress(ids, **OPTIONS), model.compress(ids, ratio=4)
    assert model.compress("x", memory=ours).recent
    assert not model.compress("x", memory=plain).recent
    assert model.complete("x", memory=ours, max_new_tokens=1).memory.recent
    for memory, asked, made in ((ours, False, "with"), (plain, True, "without")):
        with pytest.raises(ArgumentError, match=f"made {made} it .* leave recent out"):
            model.compress("x", memory=memory, recent=asked)
        with pytest.raises(ArgumentError, match="recent"):
            Chat(model, memory, chat_template=TEMPLATE, recent=asked)


def test_what_cannot_be_combined_is_refused(model, plain, ids):
    with pytest.raises(ArgumentError, match="lossless='slots' cannot.*'windows'"):
        model.compress(TEXT, ratio=4, recent=True, lossless="slots", spans="[0-9]+")
    with pytest.raises(ArgumentError, match="recent=True needs beacons"):
        plain.compress(ids, recent=True)
    with pytest.raises(TypeError, match="recent='yes'"):
        model.compress(ids, recent="yes")
    kept = model.compress(TEXT, spans="1998", **OPTIONS)  # a whole window is
    assert kept.rows[0].ratios[: W + 1].tolist() == [0] * W + [4]


def test_without_token_ids_no_window_is_cut_that_would_be_run_again(
    model, ids, tmp_path
):
    model.compress(ids, **OPTIONS).save(tmp_path / "x.beacon", tokens=False)
    memory = Memory.load(tmp_path / "x.beacon", model)
    start = memory.rows[0].start
    assert memory.truncate(start).lengths[0] == start
    for tokens in (start - 1, start - W):
        with pytest.raises(ValueError, match="truncate to 0,"):
            memory.truncate(tokens)
    assert memory.truncate(0).lengths[0] == 0


def test_packs_are_bit_identical_and_old_ones_are_as_before(model, ids, tmp_path):
    ours = model.compress([ids, ids[:9], ids[:3]], **OPTIONS)
    ours.save(tmp_path / "ours.beacon")
    loaded = Memory.load(tmp_path / "ours.beacon", model)
    assert_same_live(loaded, ours)
    for name in ("tokens", "ratio", "length"):
        x, y = (getattr(m.state.recent, name) for m in (loaded, ours))
        np.testing.assert_array_equal(x, y)
    for a, b in zip(loaded.rows, ours.rows, strict=True):
        assert (a.recent, a.own, a.fixed) == (b.recent, b.own, b.fixed)
    model.compress(ids, ratio=4).save(tmp_path / "plain.beacon")
    manifest = packs.read_manifest(tmp_path / "plain.beacon")
    assert "recent" not in json.dumps(manifest)
    for name, version in (("plain", "1"), ("ours", "2")):
        data = (tmp_path / f"{name}.beacon").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header["__metadata__"]["beacon_pack"] == version
    assert not Memory.load(tmp_path / "plain.beacon", model).recent


def test_rows_are_taken_and_repeated(model, ids):
    batch = model.compress([ids, ids[:20]], **OPTIONS)
    assert_same(batch[1], model.compress(ids[:20], **OPTIONS))
    copies = batch[[1]].repeat(3)
    after = model.compress([ids[20:], ids[20:22], ids[20:50]], memory=copies)
    for row, n in enumerate((len(ids), 22, 50)):
        assert_same(after, model.compress(ids[:n], **OPTIONS), row)


def test_progress_ends_with_all_tokens(model, ids):
    """Of a text longer than a piece; it never goes back."""
    text, told = np.tile(ids, 5)[: 17 * W + 3], []
    memory = model.compress(
        [text, text[:50]],
        on_progress=lambda done, total: told.append((done, total)),
        **OPTIONS,
    )
    total = len(text) + 50
    assert told == sorted(told) and told[-1] == (total, total) and len(told) > 1
    assert_same(memory, model.compress(text, **OPTIONS))


@pytest.mark.slow
def test_a_mesh_leaves_the_same_memory(folder, model, ids):
    split = load(folder, mesh="data:2,tensor:1")
    rows = [ids[:30], ids[:14]]
    ours = split.complete(rows, max_new_tokens=[5, 21], **OPTIONS)
    theirs = model.complete(rows, max_new_tokens=[5, 21], **OPTIONS)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert_same(a.memory, b.memory)


def test_off_has_the_arrays_that_it_had(model, ids):
    """So its programs are those of before, too."""
    state = model.compress(ids, ratio=4).state
    names = [f.name for f in dataclasses.fields(state) if f.name != "recent"]
    leaves = jax.tree.leaves([getattr(state, name) for name in names])
    assert state.recent is None and len(jax.tree.leaves(state)) == len(leaves)
