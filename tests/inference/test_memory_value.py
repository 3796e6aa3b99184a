"""A memory is a value, and rows of a batch are strangers to each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import beacon_jax
from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed, feed_jit
from beacon_jax.core.law import Law
from beacon_jax.core.memory import init_memory
from beacon_jax.core.move import keep_entries
from beacon_jax.core.plan import static_ratios
from beacon_jax.inference.decode import Loop, Rows, decode_block
from beacon_jax.inference.history import History, kept_window
from beacon_jax.inference.memory import Memory, _peak
from beacon_jax.inference.sampling import make_sampling, row_seeds
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net

TEXT = "In 1998 the harbour master counted 41 boats; the key is 52817. He wept. " * 2
ROOM = {"capacity": 192}
OPTIONS = {"max_new_tokens": 12, **ROOM}


def live(memory: Memory, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
    state = memory.state
    count = int(state.slots[row] + state.open_entries("interleave")[row])
    return np.asarray(state.k[:, row, :count]), np.asarray(state.v[:, row, :count])


def same(a: Memory, b: Memory, *, row: int = 0, other: int = 0) -> None:
    ours, theirs = a.rows[row], b.rows[other]
    assert ours.fed == theirs.fed
    np.testing.assert_array_equal(ours.spans, theirs.spans)
    np.testing.assert_array_equal(ours.ratios, theirs.ratios)
    for x, y in zip(live(a, row), live(b, other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def agrees(memory: Memory) -> None:
    """The account on the host says what the device holds."""
    state = memory.state
    assert state.slots.tolist() == memory.slots.tolist()
    assert state.raw.tolist() == [row.raw for row in memory.rows]
    assert state.windows.tolist() == [row.windows for row in memory.rows]


@pytest.mark.slow
def test_counts_of_the_history_are_those_of_the_state(model):
    """They are lengths of its arrays: nothing but these may say what a row holds."""
    memory = model.compress([TEXT[:70], TEXT[:64], TEXT[:5]], ratio=[4, 2], **ROOM)
    made = model.complete(["x", "The key", "A"], memory=memory, **OPTIONS)
    for each in (memory, memory.truncate(5), memory[1:], made[0].batch):
        agrees(each)
        for i, row in enumerate(each.rows):
            assert len(row.spans) == len(row.ratios) == each.state.slots[i]
            assert len(row.marks) - 1 == each.state.windows[i]
            assert row.fed - row.marks[-1, 0] == each.state.raw[i]
            if row.raw:
                assert row.ratio == each.state.ratio[i]
        opened = each.state.slots + each.state.open_entries("interleave")
        assert each.entries.tolist() == opened.tolist()


def test_rows_of_one_call_get_what_each_gets_alone(model):
    contexts = [TEXT[:90], TEXT[:7], TEXT[20:61]]
    prompts = ["The key is ", "x", "Boats: "]
    options = {"ratio": 2, **OPTIONS}
    together = model.complete(prompts, context=contexts, **options)
    for prompt, context, ours in zip(prompts, contexts, together, strict=True):
        alone = model.complete(prompt, context=context, **options)
        assert ours.tokens.tolist() == alone.tokens.tolist()
        assert (ours.text, ours.finish) == (alone.text, alone.finish)
        same(ours.memory, alone.memory)
    agrees(together[0].batch)


@pytest.mark.slow
def test_rows_with_plans_of_their_own_come_back_in_order(model):
    contexts = [TEXT[:64], TEXT[5:75], TEXT[:64], TEXT[9:50]]
    lists = [[2, 4, 0], [4], [2, 4, 0], [0, 2]]
    by_row = iter([*lists, *lists])
    # A function of the window sees no row: one list per row through several calls.
    memories = [model.compress(c, ratio=next(by_row), **ROOM) for c in contexts]
    ratio = lambda window, start, stop: [2, 4, 0, 4][window % 4]
    batch = model.compress(contexts, ratio=ratio, **ROOM)
    for i, context in enumerate(contexts):
        same(batch, model.compress(context, ratio=ratio, **ROOM), row=i)
    budget = model.compress(contexts, max_slots=30, **ROOM)
    agrees(budget)
    assert len({tuple(row.ratios.tolist()) for row in budget.rows}) > 1
    for i, context in enumerate(contexts):
        same(budget, model.compress(context, max_slots=30, **ROOM), row=i)
    assert [m.rows[0].length for m in memories] == [64, 70, 64, 41]


@pytest.mark.slow
def test_several_questions_are_asked_of_one_memory_in_one_batch(model):
    memory = model.compress(TEXT, ratio=4, **ROOM)
    before = jax.tree.map(np.array, memory.state)
    questions = ["The key is ", "He ", "41 boats? "]
    answers = model.complete(questions, memory=memory, **OPTIONS)
    for question, answer in zip(questions, answers, strict=True):
        alone = model.complete(question, memory=memory, **OPTIONS)
        assert answer.tokens.tolist() == alone.tokens.tolist()
    jax.tree.map(np.testing.assert_array_equal, before, memory.state)


def test_a_batch_takes_as_many_device_calls_as_one_row(model, monkeypatch):
    calls = []

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("beacon_jax.core.feed.feed_jit", counted("feed", feed_jit))
    monkeypatch.setattr(
        "beacon_jax.inference.decode.decode_block", counted("decode", decode_block)
    )
    options = {"ratio": 2, "max_new_tokens": 20, **ROOM}
    longest = model.complete(TEXT[:90], **options)
    alone, calls[:] = list(calls), []
    rows = [TEXT[:90], TEXT[:7], TEXT[20:61], TEXT[:33], TEXT[3:80]]
    made = model.complete(rows, **options)
    assert made[0].tokens.tolist() == longest.tokens.tolist()
    # The first token, the 16 of a block, and the last three.
    assert calls == alone == ["feed", "decode", "decode", "decode"]


def test_forks_go_their_own_ways(model):
    memory = model.compress(TEXT[:50], ratio=2, **ROOM)
    left = model.compress("to the left", memory=memory.fork())
    right = model.compress("RIGHT", memory=memory.fork())
    same(left, model.compress(TEXT[:50] + "to the left", ratio=2, **ROOM))
    same(right, model.compress(TEXT[:50] + "RIGHT", ratio=2, **ROOM))
    same(memory, model.compress(TEXT[:50], ratio=2, **ROOM))


@pytest.mark.parametrize("length", [0, 3, 40, 45, 48, 64, 70])
def test_a_truncated_memory_goes_on_as_if_the_rest_had_never_been(model, length):
    whole = model.compress(TEXT[:70], ratio=2, **ROOM)
    short = whole.truncate(length)
    assert short.lengths.tolist() == [length]
    assert len(short.rows[0].pending) == (length % 8 if length < 64 else 0)
    for added in ("!", " and so on, to the end"):
        after = model.compress(added, 2, memory=short)
        agrees(after)
        same(after, model.compress(TEXT[:length] + added, ratio=2, **ROOM))


def test_truncating_needs_the_tokens_only_inside_a_compressed_window(model):
    memory = model.compress(TEXT[:70], ratio=2, **ROOM)
    rows = tuple(row.forget_tokens() for row in memory.rows)
    memory = dataclasses.replace(memory, rows=rows)
    assert memory.truncate(48).lengths.tolist() == [48]
    assert memory.truncate(66).lengths.tolist() == [66]
    same(
        model.compress("!", memory=memory.truncate(66)),
        model.compress(TEXT[:66] + "!", ratio=2, **ROOM),
    )
    with pytest.raises(ValueError, match="tokens=45 .*not kept: truncate to 40"):
        memory.truncate(45)
    with pytest.raises(ValueError, match="tokens=71 must be between 0 and the 70"):
        memory.truncate(71)
    with pytest.raises(ValueError, match="repetition_penalty needs the tokens"):
        model.complete("x", memory=memory, repetition_penalty=1.2, **OPTIONS)


@pytest.mark.parametrize("sizes", [(70, 30), (64, 1, 9), (5, 3, 40)])
def test_turns_give_what_everything_at_once_gives(model, sizes):
    memory, start = None, 0
    for size in sizes:
        part = TEXT[start : start + size]
        memory = model.compress(part, ratio=[4, 2], memory=memory, **ROOM)
        start += size
    same(memory, model.compress(TEXT[:start], ratio=[4, 2], **ROOM))


def test_spans_say_what_each_slot_stands_for(model):
    memory = model.compress(TEXT[:30], ratio=[4, 0, 2], **ROOM)
    (spans,) = memory.spans
    expected = [(0, 4), (4, 8), *((i, i + 1) for i in range(8, 16))]
    expected += [(16, 18), (18, 20), (20, 22), (22, 24)]
    assert spans.tolist() == [list(span) for span in expected]
    assert memory.rows[0].ratios.tolist() == [4] * 2 + [0] * 8 + [2] * 4
    assert memory.lengths.tolist() == [30] and memory.rows[0].raw == 6


def test_describe_and_bytes_are_those_of_the_arrays(model):
    memory = model.compress([TEXT[:30], TEXT[:9]], ratio=2, capacity=64)
    held = sum(x.nbytes for x in (memory.state.k, memory.state.v))
    assert memory.nbytes == held == 2 * 64 * memory.slot_nbytes
    assert memory.slot_nbytes == 2 * 2 * 1 * 8 * 4  # k and v, L, K, H, bytes
    text = memory.describe()
    held0 = (12 + 6 + 3) * 128 / 2**20
    assert (
        "row 0: 30 tokens -> 12 memory slots + 6 in the open window with 3 beacons "
        f"({held0:.3f} MiB), x2 planned; x1.4 with the open window"
    ) in text
    assert "row 1: 9 tokens -> 4 memory slots" in text
    assert (
        f"buffer: 64 slots per row of 128 bytes (float32), {held / 2**20:.3f} MiB"
        in text
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_describe_counts_is_what_a_prompt_takes(model, dtype):
    """XLA writes the buffer in place: no second one, whatever its capacity."""
    capacity = 2**15
    state = init_memory(model.config, 1, capacity, dtype)
    memory = Memory(model.config, state, (History.empty(),))
    compiled = feed_jit.lower(
        Net(model.config, jnp.float32),
        model.variables,
        state,
        jnp.zeros((1, 16), jnp.int32),
        jnp.array([16]),
        jnp.full((1, 1), 4),
        None,
        static=(4,),
        outputs="last",
    ).compile()
    used = compiled.memory_analysis()
    counts = used.alias_size_in_bytes - memory.nbytes
    assert 0 < counts < 256  # slots, windows, tokens of the open window
    assert f"{memory.nbytes / 2**20:.3f} MiB" in memory.describe()
    one_layer = 2 * capacity * model.config.head_dim * 4
    allowed = one_layer if dtype == "float32" else 3 * one_layer
    assert used.temp_size_in_bytes < allowed


@pytest.mark.slow
def test_lossless_windows_are_kept_whole_and_the_cost_is_said(model):
    result = model.complete(
        "The key is ", context=TEXT[:72], ratio=4, spans=r"\d{5}", **OPTIONS
    )
    assert "lossless: 1 of 11 windows uncompressed" in result.note
    row = result.memory.rows[0]
    at = TEXT.index("52817")
    for token in range(at, at + 5):
        (slot,) = np.flatnonzero((row.spans == (token, token + 1)).all(axis=1))
        assert row.ratios[slot] == 0


def test_lossless_slots_are_the_entries_that_the_window_had(model):
    """Against the open window itself, which has every entry before it closes."""
    at = TEXT.index("52817")  # 56 ... 61, in window 7
    memory = model.compress(
        TEXT[:72], ratio=4, spans=[(at, at + 5)], lossless="slots", **ROOM
    )
    agrees(memory)
    row = memory.rows[0]
    window = at // 8
    assert row.slots == 9 * 2 + 5
    kept = np.flatnonzero(row.ratios == 0)
    assert row.spans[kept].tolist() == [[t, t + 1] for t in range(at, at + 5)]
    # The entries of the mixed window r r r r b r r r r b, from feeding up to its end.
    before = model.compress(TEXT[: window * 8], ratio=4, **ROOM)
    _, opened = feed(
        model.net,
        model.variables,
        before.state,
        jnp.asarray(model.encode(TEXT[window * 8 : window * 8 + 8], "x", first=False))[
            None
        ],
        jnp.array([8]),
        np.array([4]),
        close=False,
    )
    assert opened.raw.tolist() == [8]
    law = Law.of(model.config)
    place = kept_window(law, 4, np.arange(at % 8, at % 8 + 5), slots=1)
    spans, _ = law.source(4, place)
    assert (np.diff(place) > 0).all() and len(place) == 7
    closed = keep_entries(
        model.config, opened, jnp.asarray(place)[None], jnp.array([7])
    )
    slots = int(closed.slots[0])
    np.testing.assert_allclose(
        memory.state.k[:, :, :slots], closed.k[:, :, :slots], atol=1e-5
    )
    np.testing.assert_array_equal(
        np.asarray(opened.v[:, 0, before.slots[0] + place]),
        np.asarray(closed.v[:, 0, before.slots[0] : slots]),
    )
    assert (spans + window * 8).tolist() == row.spans[before.slots[0] : slots].tolist()
    # And the text goes on: in pieces as at once.
    after = model.compress(" On.", memory=memory)
    agrees(after)


def test_a_window_left_open_when_full_closes_with_the_next_token(model):
    config, variables = model.config, model.variables
    tokens = jnp.asarray(model.encode(TEXT[:24], "x", first=True))[None]
    plan = np.array([2])
    count = lambda n: jnp.array([n])
    empty = init_memory(config, 1, 64)
    _, opened = feed(
        Net(config), variables, empty, tokens[:, :16], count(16), plan, close=False
    )
    assert (int(opened.slots[0]), int(opened.raw[0])) == (4, 8)
    out, after = feed(Net(config), variables, opened, tokens[:, 16:], count(8), plan)
    whole, expected = feed(Net(config), variables, empty, tokens, count(24), plan)
    np.testing.assert_allclose(out.last_logits, whole.last_logits, atol=1e-5)
    assert after.slots.tolist() == expected.slots.tolist() == [12]
    np.testing.assert_allclose(after.k[:, :, :12], expected.k[:, :, :12], atol=1e-5)


def test_every_row_decodes_by_a_plan_of_its_own(model):
    config, variables = model.config, model.variables
    plans = np.array([[2, 4], [4, 2], [0, 0]])
    tokens = np.random.default_rng(0).integers(0, 256, (3, 20))
    memory = init_memory(config, 3, 96)
    static = static_ratios(memory, plans)
    assert static == (0, 2, 4)
    for t in range(20):
        token = jnp.asarray(tokens[:, t])
        _, memory = decode_step(
            Net(config), variables, memory, token, jnp.asarray(plans), static=static
        )
    assert memory.slots.tolist() == [4 + 2, 2 + 4, 16]
    for row, plan in enumerate(plans):
        _, alone = feed(
            Net(config),
            variables,
            init_memory(config, 1, 96),
            jnp.asarray(tokens[row : row + 1]),
            jnp.array([20]),
            plan,
        )
        n = int(alone.slots[0] + alone.open_entries("interleave")[0])
        np.testing.assert_allclose(memory.k[:, row, :n], alone.k[:, 0, :n], atol=1e-5)


def test_a_stop_string_ends_the_text_and_the_memory(model):
    free = model.complete(TEXT, ratio=2, **OPTIONS, temperature=0.8, seed=1)
    stop = free.text[5:7]
    end = free.text.index(stop)
    options = {"ratio": 2, **OPTIONS, "temperature": 0.8, "seed": 1}
    pieces = []
    result = model.complete(TEXT, **options, stop=stop, on_text=pieces.append)
    assert result.text == free.text[:end] == "".join(pieces)
    assert result.finish == "stop" and free.finish == "length"
    assert result.memory.lengths.tolist() == [len(TEXT) + len(result.tokens)]
    again = model.compress("go on", memory=result.memory)
    agrees(again)
    same(
        again,
        model.compress(
            np.concatenate(
                [
                    model.encode(TEXT, "x", first=True),
                    result.tokens,
                    model.encode("go on", "x", first=False),
                ]
            ),
            ratio=2,
            **ROOM,
        ),
    )


def test_rows_stream_with_their_numbers(model):
    shown: dict[int, str] = {0: "", 1: ""}

    def show(row, text):
        shown[row] += text

    made = model.complete(["The", "A boat"], ratio=2, **OPTIONS, on_text=show)
    assert [made[0].text, made[1].text] == [shown[0], shown[1]]


def test_limits_and_seeds_are_one_or_one_per_row(model):
    prompts = ["The harbour", "A"]
    options = {"ratio": 2, "temperature": 1.0, **ROOM}
    model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_ids=())
    )
    both = model.complete(prompts, max_new_tokens=[3, 7], seed=[5, 6], **options)
    assert [len(x.tokens) for x in both] == [3, 7]
    alone = model.complete("A", max_new_tokens=7, seed=6, **options)
    assert both[1].tokens.tolist() == alone.tokens.tolist()


def test_a_memory_of_another_model_or_batch_is_refused(model, make_folder):
    memory = model.compress([TEXT[:9], TEXT[:20]], ratio=2)
    with pytest.raises(ValueError, match="memory has 2 rows for 3 texts"):
        model.compress(["a", "b", "c"], memory=memory)
    other = beacon_jax.load(make_folder(head_dim=8, rope_theta=500.0))
    with pytest.raises(ValueError, match=r"another model:\n  config.rope.theta: 1"):
        other.compress("x", memory=memory[0])
    with pytest.raises(ValueError, match="context has 2 texts for 3 prompts"):
        model.complete(["a", "b", "c"], context=["x", "y"])
    with pytest.raises(ValueError, match="spans mark parts of the context"):
        model.complete("a", spans="b")


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("tensor:8", marks=pytest.mark.slow),
        pytest.param("data:2,tensor:4", marks=pytest.mark.slow),
    ],
)
def test_a_model_split_over_devices_gives_what_one_gives(make_folder, mesh):
    shape = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 264}
    folder, heads = make_folder(**shape), int(mesh[-1])
    one = beacon_jax.load(folder)
    split = beacon_jax.load(folder, mesh=mesh)
    kernel = split.variables["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // heads
    contexts, prompts = [TEXT[:60], TEXT[:35]], ["The key is ", "x"]
    options = {"ratio": 2, **OPTIONS}
    ours = split.complete(prompts, context=contexts, **options)
    theirs = one.complete(prompts, context=contexts, **options)
    state = ours[0].batch.state
    shard = state.k.sharding.shard_shape(state.k.shape)
    assert shard[3] == 8 // heads and shard[1] == (1 if "data" in mesh else 2)
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        same(a.memory, b.memory)
    memory = split.compress(TEXT[:60], ratio=2, **ROOM) if "data" not in mesh else None
    if memory is not None:
        answer = split.complete("The key is ", memory=memory, **OPTIONS)
        assert answer.tokens.tolist() == ours[0].tokens.tolist()


def test_a_mesh_that_does_not_fit_says_why(folder):
    with pytest.raises(ValueError, match="mesh='tensor:64' needs 64 devices"):
        beacon_jax.load(folder, mesh="tensor:64")
    with pytest.raises(ValueError, match="axis 'heads', .*: use data, fsdp"):
        beacon_jax.load(folder, mesh="heads:2")
    with pytest.raises(ValueError, match="two axes of -1"):
        beacon_jax.load(folder, mesh="data:-1,tensor:-1")


def test_an_account_cuts_where_windows_end(model):
    row = History.empty().feed(Law.of(model.config), np.array([4, 2]), np.arange(27))
    assert row.marks.tolist() == [[0, 0], [8, 2], [16, 6], [24, 10]]
    assert (row.raw, row.slots, row.length) == (3, 10, 27)
    cut = row.cut(18)
    assert (cut.fed, cut.slots, cut.pending.tolist()) == (16, 6, [16, 17])
    assert cut.cut(17).pending.tolist() == [16]
    again = cut.feed(Law.of(model.config), np.array([4, 2]), np.arange(16, 27))
    assert again.spans.tolist() == row.spans.tolist()


def test_sinks_and_beacons_of_a_first_window_have_their_spans(model):
    beacon = dataclasses.replace(model.config.beacon, sink=4)
    config = dataclasses.replace(model.config, beacon=beacon)
    row = History.empty().feed(Law.of(config), np.array([2]), np.arange(8))
    # r r b r r b ...: the third entry of the sinks is the first beacon.
    assert row.spans[:4].tolist() == [[0, 1], [1, 2], [0, 2], [2, 3]]
    assert row.ratios[:4].tolist() == [0, 0, 2, 0]
    assert row.spans[4:].tolist() == [[0, 2], [2, 4], [4, 6], [6, 8]]
    assert Layout.of_window(8, 2, "interleave").beacon_index.tolist() == [2, 5, 8, 11]


def test_a_decoded_token_copies_no_buffer(model):
    """In place with compression too: `lax.cond` had XLA copy both buffers twice."""
    state = init_memory(model.config, 1, 2**15, "float32")
    start = jnp.zeros((1, model.config.vocab_size)), jnp.ones(1, bool), None
    compiled = decode_block.lower(
        model.net,
        model.variables,
        state,
        Loop(*start),
        jnp.full((1, 1), 4),
        Rows(make_sampling().for_rows(1), row_seeds(0, 1), jnp.full(1, 16)),
        eos_ids=(),
        static=(4,),
    ).compile()
    used = compiled.memory_analysis()
    assert 0 < used.alias_size_in_bytes - state.nbytes < 256
    assert used.temp_size_in_bytes < state.nbytes / 4


def test_describe_has_the_peak_that_jax_measured_where_it_measures(model):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    counts = Device({"peak_bytes_in_use": 3 * 2**20}), Device({"peak_bytes_in_use": 9})
    assert _peak(counts) == ["device: 3.0 MiB at the peak, measured by JAX"]
    assert _peak([Device(None), Device({})]) == []
    text = model.compress(TEXT[:30], ratio=2, **ROOM).describe()
    stats = jax.devices()[0].memory_stats() or {}
    assert ("measured by JAX" in text) == ("peak_bytes_in_use" in stats)
