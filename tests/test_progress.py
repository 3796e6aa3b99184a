"""What a command says about work that takes long, and that it is silent otherwise."""

import threading
import time

from beacon_jax import progress as module
from beacon_jax.compiling import COMPILED, EVENTS, LOWERED, Watch
from beacon_jax.progress import Progress, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make():
    clock, lines = Clock(), []
    progress = Progress(lines.append, after=3, every=5, clock=clock)
    progress._thread = threading.current_thread()  # the test looks by itself

    def wait(seconds):
        clock.now += seconds
        progress.look()

    return progress, wait, lines


def test_work_of_less_than_three_seconds_is_not_mentioned():
    progress, wait, lines = make()
    with progress.stage("reading", "tokens") as stage:
        wait(2.9)
        stage(100, 100)
    wait(60)
    assert lines == []


def test_longer_work_is_shown_with_its_rate_what_is_left_and_how_long_it_took():
    progress, wait, lines = make()
    with progress.stage("reading", "tokens") as stage:
        wait(3)
        stage(1_000, 5_000)
        wait(4)
        stage(3_000, 5_000)
        wait(1)
        stage(5_000, 5_000)
    assert lines == [
        "reading: 3 s ...",
        "reading: 3,000 of 5,000 tokens, 400.0 tokens/s, 5 s left",
        "reading: 5,000 of 5,000 tokens, 800.0 tokens/s, 8 s",
    ]


def test_no_thread_is_left_behind_and_a_later_stage_has_one(monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.01)
    lines: list[str] = []
    progress = Progress(lines.append, after=0.02, every=60)
    for _ in range(2):
        with progress.stage("reading"):
            thread = progress._thread
            assert thread is not None and thread.is_alive()
            deadline = time.monotonic() + 20
            while not lines and time.monotonic() < deadline:
                time.sleep(0.01)
        assert lines[0] == "reading: 0 s ..." and len(lines) == 2
        lines.clear()
        thread.join(20)
        assert not thread.is_alive() and progress._thread is None


def test_text_that_comes_is_progress_enough():
    progress, wait, lines = make()
    with progress.stage("answering", "tokens", note="2 prompts") as stage:
        for _ in range(5):
            wait(2)
            stage.alive()
        assert lines == []
        stage.add(1)
        wait(3)
        stage.add(15)
        wait(5)
    assert lines[0] == "answering (2 prompts): 1 tokens"
    assert lines[1] == "answering (2 prompts): 16 tokens, 1.9 tokens/s"


def test_a_stage_inside_of_another_gives_it_back():
    progress, wait, lines = make()
    with progress.stage("evaluating"):
        with progress.stage("loading", note="a model"):
            wait(4)
        wait(9)
    assert lines == [
        "loading (a model): 4 s ...",
        "loading (a model): 4 s",
        "evaluating: 13 s ...",
        "evaluating: 13 s",
    ]


def test_durations_are_written_as_people_write_them():
    assert [duration(s) for s in (0.4, 59, 61, 3_599.6, 7_500)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]


def test_compilation_inside_of_compilation_is_counted_once():
    clock = Clock()
    watch = Watch(clock)
    trace = EVENTS[0]
    clock.now += 1
    watch(trace, 0.5)  # inside of the next
    clock.now += 1
    watch(trace, 2.0)
    assert watch.seconds() == 2.0
    clock.now += 1
    watch(LOWERED, 1.0)
    assert watch.seconds() == 3.0 and watch.running() == 0
    clock.now += 4
    assert watch.running() == 4
    watch(COMPILED, 4.0)
    assert watch.seconds() == 7.0 and watch.running() is None
    clock.now += 10
    watch("/jax/something/else", 9.0)
    assert watch.seconds() == 7.0


def test_many_programs_are_remembered_as_their_sum():
    clock = Clock()
    watch = Watch(clock)
    for _ in range(2_500):
        clock.now += 2
        watch(COMPILED, 1.0)
    assert watch.seconds() == 2_500
