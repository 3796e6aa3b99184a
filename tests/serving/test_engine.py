"""The running batch: whoever joins and leaves, each answer is the one it is alone."""

import random

import numpy as np
import pytest

import beacon_jax
from beacon_jax.core.loss import LIKELY
from beacon_jax.inference.history import History
from beacon_jax.inference.plan import make_plan
from beacon_jax.serving import programs
from beacon_jax.serving.engine import Busy, Engine, Shape, TooLong
from beacon_jax.serving.rows import Ask, Ended, Failed, Piece, Read
from tests.serving.conftest import eventually

ROWS, SLOTS = 3, 1024
NEW = 40  # tokens of the longest answer


@pytest.fixture(scope="module")
def memories(model, text):
    """Memories of every kind that a prompt may come behind."""
    compress = model.compress
    whole = compress(text[:1500], ratio=8)
    return {
        "nothing": None,
        "x8": whole,
        "x4": compress(text[:700], ratio=4),
        "mixed": compress(text[:900], ratio=[2, 8, 0, 4]),
        "snapkv": compress(text[:1200], ratio=8, method="snapkv"),
        "attention-matching": compress(
            text[:800], ratio=4, method="attention-matching"
        ),
        "truncated": whole.truncate(200),
    }


@pytest.fixture(scope="module")
def pool(model, memories, text):
    """Requests, and what the model answers to each alone."""
    rng, found = random.Random(5), []
    settings = [
        {},
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.2},
    ]
    for i in range(21):
        name = list(memories)[i % len(memories)]
        memory = memories[name]
        start = rng.randrange(1000)
        prompt = text[start : start + rng.choice([3, 40, 120])]
        new = rng.choice([1, 9, NEW])
        sampling, seed = settings[i % len(settings)], rng.randrange(1000)
        stop = ("0.",) if i % 3 == 0 else ()
        ratio = rng.choice([2, 8, 0]) if memory is None else None
        want = model.complete(
            prompt,
            memory=memory,
            max_new_tokens=new,
            ratio=ratio,
            seed=seed,
            stop=stop,
            **sampling,
        )
        ask = asked(model, memory, prompt, new, ratio, sampling, seed, stop)
        found.append((ask, want))
    return found


def asked(
    model, memory, prompt, new, ratio=None, sampling=None, seed=0, stop=(), **more
):
    row = memory.rows[0] if memory is not None else History.empty()
    tokens = model.encode(prompt, "prompt", first=not row.length, after=row.last)
    plan = make_plan(
        model.config, ratio, length=len(tokens), new_tokens=new, before=row
    )
    host = None if memory is None else programs.on_host(memory)
    last = int(plan.ratios[-1])
    return Ask(
        np.asarray(tokens), host, last, sampling or {}, (seed,), new, stop, **more
    )


@pytest.fixture(scope="module")
def shape(model):
    return Shape(ROWS, SLOTS, 100, model.net.dtype.name)


class Told:
    """What a request has been told."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def text(self):
        return "".join(piece.text for piece in self.of(Piece))

    @property
    def tokens(self):
        parts = [piece.tokens for piece in self.of(Piece)]
        return np.concatenate([np.zeros(0, np.int32), *parts])


def check(told, want):
    assert not told.of(Failed), told.of(Failed)
    assert told.text == want.text
    assert told.tokens.tolist() == want.tokens.tolist()
    (end,) = told.of(Ended)
    assert end.finish == want.finish


def turns(engine, count):
    """Makes turns, as the engine's thread does."""
    for _ in range(count):
        if engine._busy():
            engine._turn()


def play(engine, pool, rng):
    """Lets requests join and leave in an order drawn by `rng`; checks each."""
    waiting = [rng.choice(pool) for _ in range(rng.randrange(2, 9))]
    running, gone = [], []
    while waiting or engine._busy():
        if waiting and rng.random() < 0.5:
            ask, want = waiting.pop()
            told = Told()
            running.append((engine.submit(ask, told), told, want))
        if running and rng.random() < 0.06:
            ticket, told, _ = running.pop(rng.randrange(len(running)))
            engine.cancel(ticket)
            gone.append((told, len(told.events)))
        turns(engine, rng.randrange(3))
    for _, told, want in running:
        check(told, want)
    for told, count in gone:
        assert len(told.events) == count, "told after it was cancelled"


@pytest.mark.parametrize(
    "schedules",
    [
        pytest.param(range(25), id="25"),
        pytest.param(range(25, 225), id="200", marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_the_model_alone_whoever_joins_and_leaves(
    model, shape, pool, schedules
):
    engine = Engine(model, shape)
    for seed in schedules:
        play(engine, pool, random.Random(seed))
    assert engine.state() == {"waiting": 0, "reading": 0, "answering": 0}


@pytest.mark.slow
def test_in_bfloat16_too_an_answer_does_not_depend_on_the_others(text):
    model = beacon_jax.load("tiny-beacon", dtype="bfloat16")
    engine = Engine(model, Shape(ROWS, SLOTS, 100, "bfloat16"))
    memory = model.compress(text[:900], ratio=8)
    asks = [
        asked(
            model,
            memory if i % 2 else None,
            text[9 * i :][: 20 + i],
            NEW,
            r,
            likely=True,
        )
        for i, r in enumerate([8, None, 4, None, 0, None, 2])
    ]
    alone = []
    for ask in asks:
        engine.submit(ask, told := Told())
        turns(engine, 50)
        alone.append(told)
    for seed in range(6):
        rng, running = random.Random(seed), []
        order = [*range(len(asks))] * 2
        rng.shuffle(order)
        while order or engine._busy():
            if order and rng.random() < 0.5:
                number = order.pop()
                running.append((number, Told()))
                engine.submit(asks[number], running[-1][1])
            turns(engine, rng.randrange(3))
        for number, told in running:
            assert told.tokens.tolist() == alone[number].tokens.tolist()
            # Not the tokens alone: the last bit of how likely they were.
            logs = [
                np.concatenate(
                    [piece.likely.chosen for piece in x.of(Piece) if len(piece.tokens)]
                )
                for x in (told, alone[number])
            ]
            assert np.array_equal(*logs)


def test_choices_of_one_prompt_are_read_once_and_drawn_each_by_its_seed(
    model, shape, memories, text
):
    engine, told, counts = Engine(model, shape), Told(), []
    engine._observer.read = counts.append
    sampling = {"temperature": 1.0}
    ask = asked(model, memories["x8"], text[:50], 12, None, sampling)
    seeds = (3, 4, 5, 6, 7)
    ask = Ask(ask.tokens, ask.memory, ask.ratio, sampling, seeds, 12)
    engine.submit(ask, told)
    turns(engine, 100)
    assert sum(counts) == len(ask.fed)
    for choice, seed in enumerate(seeds):
        want = model.complete(
            text[:50],
            memory=memories["x8"],
            max_new_tokens=12,
            seed=seed,
            temperature=1.0,
        )
        pieces = [p for p in told.of(Piece) if p.choice == choice]
        assert "".join(p.text for p in pieces) == want.text


def test_the_memory_of_an_answer_is_that_of_the_model(model, shape, memories, text):
    for name in ("nothing", "x8", "attention-matching"):
        memory, told = memories[name], Told()
        engine = Engine(model, shape)
        ratio = 8 if memory is None else None
        stop = ("1",)
        ask = asked(model, memory, text[:90], 40, ratio, stop=stop, keep=True)
        engine.submit(ask, told)
        turns(engine, 100)
        want = model.complete(
            text[:90], memory=memory, max_new_tokens=40, ratio=ratio, stop=stop
        )
        check(told, want)
        (end,) = told.of(Ended)
        # Tokens behind the stop may have closed a window: then what is in front of the
        # stop is held as text, to be read again. Their number depends on the clock.
        for mine, whole in zip(end.memory.rows, want.memory.rows, strict=True):
            assert mine.length == whole.length and mine.slots == whole.slots
            assert np.array_equal(mine.tokens, whole.tokens)
        follow = dict(max_new_tokens=8)
        after = model.complete("and", memory=want.memory, **follow)
        again = asked(model, end.memory, "and", 8)
        told = Told()
        engine.submit(again, told)
        turns(engine, 100)
        assert told.text == after.text


def test_how_likely_tokens_are_is_what_the_logits_say(model, shape, memories, text):
    engine, told = Engine(model, shape), Told()
    ask = asked(
        model, None, text[:150], 6, 0, {"temperature": 1.0}, likely=True, echo=True
    )
    engine.submit(ask, told)
    engine.submit(asked(model, memories["x8"], "x", 30), Told())  # nobody else's
    turns(engine, 100)
    made = told.tokens
    tokens = np.concatenate([ask.tokens, made])
    from beacon_jax.core.feed import feed
    from beacon_jax.inference.feeding import fresh_state

    out, _ = feed(
        model.net,
        model.variables,
        fresh_state(model, 1, 1024),
        tokens[None],
        None,
        np.zeros(1, np.int32),
        outputs="logits",
    )
    scores = np.asarray(out.logits[0], np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    want = scores[np.arange(len(tokens) - 1), tokens[1:]]
    (read,) = told.of(Read)
    likely = [read.likely, *(piece.likely for piece in told.of(Piece))]
    chosen = np.concatenate([x.chosen for x in likely if x is not None])
    np.testing.assert_allclose(chosen, want, atol=2e-4)
    best = np.concatenate([x.best for x in likely if x is not None])
    np.testing.assert_allclose(best, -np.sort(-scores[:-1])[:, :LIKELY], atol=2e-4)


def test_a_short_prompt_overtakes_a_long_one(model, shape, text):
    engine, long, short = Engine(model, shape), Told(), Told()
    engine.submit(asked(model, None, text, 5, 8), long)
    turns(engine, 2)
    engine.submit(asked(model, None, "a", 5, 8), short)
    while not short.of(Ended):
        engine._turn()
    assert not long.of(Read)


def test_answers_go_on_while_a_prompt_is_read(model, shape, text):
    engine, first, second = Engine(model, shape), Told(), Told()
    engine.submit(asked(model, None, "a", 60, 8), first)
    turns(engine, 1)
    engine.submit(asked(model, None, text, 5, 8), second)
    before = len(first.tokens)
    turns(engine, 3)
    assert not second.of(Read)
    assert len(first.tokens) >= before + 3


def test_more_requests_than_the_queue_has_room_for_are_told_when_to_ask(model):
    engine = Engine(model, Shape(1, SLOTS, 2, model.net.dtype.name))
    ask = asked(model, None, "a", 5, 8)
    for _ in range(2):
        engine.submit(ask, Told())
    with pytest.raises(Busy, match="2 requests are waiting"):
        engine.submit(ask, Told())
    turns(engine, 30)
    engine.submit(ask, Told())


def test_a_request_that_needs_more_slots_than_a_row_has_is_refused(model, shape):
    engine = Engine(model, shape)
    with pytest.raises(TooLong, match="a row has 1,024: shorten them"):
        engine.submit(asked(model, None, "a", 5000, 0), Told())


def test_an_error_of_the_device_ends_what_was_in_it_and_no_more(
    model, shape, pool, monkeypatch
):
    engine = Engine(model, shape)
    ask, want = pool[1]

    def broken(*_):
        raise RuntimeError("out of memory")

    engine.start()
    for name in ("insert", "window", "block", "placed"):
        with monkeypatch.context() as patch:
            patch.setattr(programs, name, broken)
            engine.submit(ask, told := Told())
            eventually(lambda told=told: bool(told.of(Failed)))
    engine.submit(ask, again := Told())
    engine.close(60)
    check(again, want)


def test_closing_finishes_the_answers_that_have_begun(model, shape, pool):
    engine = Engine(model, shape)
    engine.start()
    found = [(Told(), ask, want) for ask, want in pool[:5]]
    for told, ask, _ in found:
        engine.submit(ask, told)
    engine.close(120)
    for told, _, want in found:
        check(told, want)
    with pytest.raises(Busy):
        engine.submit(pool[0][0], Told())


def test_nothing_is_compiled_after_the_start(model, shape, pool):
    engine = Engine(model, shape)
    engine.warm(lambda done, of: None)
    sizes = lambda: [
        f._cache_size()
        for f in (programs.feed_jit, programs.decode_block, programs.insert)
    ]
    before = sizes()
    for ask, _ in pool:
        if ask.memory is None or not ask.memory.state.biased:
            engine.submit(ask, Told())
            turns(engine, 200)
    assert sizes() == before


def test_who_comes_during_a_block_waits_no_longer_than_a_window_takes(
    model, shape, text
):
    engine = Engine(model, shape)
    engine.submit(asked(model, None, "a", 900, 8), told := Told())
    turns(engine, 2)
    for window, step, most in ((0.4, 0.1, 4), (0.4, 1.0, 1), (0.001, 0.001, 16)):
        engine._window_seconds, engine._step_seconds = window, step
        before = len(told.tokens)
        turns(engine, 1)
        assert 1 <= len(told.tokens) - before <= most
    assert len(told.tokens) - before == 16
