"""Asks an OpenAI-compatible endpoint for questions and answers about long texts.

`beacon_jax.cli.synthesize` tells users what becomes of a text, and how a run goes on
(paper, appendix A).
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from beacon_jax.data.answers import Answers, Pair, parse_pairs
from beacon_jax.data.endpoint import Endpoint, Failed, Hopeless
from beacon_jax.data.segments import Count, split, token_counter
from beacon_jax.data.sources import Record, open_parts, read_part
from beacon_jax.paths import whole_file
from beacon_jax.progress import Progress

INSTRUCTIONS = (
    "You write questions and answers for readers of long documents. You are given one "
    "passage of a document. Write {pairs} questions about details of this passage, "
    "each with its answer. A question must make sense to someone who has read the "
    "whole document and does not know which passage you saw: name people, places and "
    "things, and never write 'the passage' or 'the text'. An answer must follow from "
    "the passage alone and be complete sentences. Ask about different things. Use the "
    "language of the passage. Reply with JSON only: a list of {pairs} objects, each "
    'with the keys "question" and "answer".'
)
ASK_AGAIN = (
    "That was not a JSON list of {pairs} objects with the keys "
    '"question" and "answer", both texts. Reply with that list and nothing else.'
)
SHORTEST_SEGMENT = 32  # tokens; a chapter's last line is not worth four questions
# Room for the tokens of a chat template around a turn, and of its system prompt: at
# most 6 and 11 for the templates of data.chat.
TURN_TOKENS = 8
TALK_TOKENS = 16
FAILURES = 8  # questions that fail one after the other before the endpoint is dead
SHOW_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Inquiry:
    """The settings of `synthesize`: what is asked about which texts.

    Attributes:
      limit: documents at most; 0: all.
      concurrency: requests under way at a time.
    """

    sources: tuple[str, ...]
    out: Path
    endpoint: Endpoint
    tokenizer: str = ""
    root: str = ""
    segment_tokens: int = 4096
    pairs: int = 4
    max_tokens: int = 20480
    concurrency: int = 8
    limit: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty: name files with long texts")
        for name in ("pairs", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} must be >= 0 (0: no limit)")
        if self.max_tokens <= self.segment_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be above segment_tokens="
                f"{self.segment_tokens}, so that a segment and its questions fit"
            )


class Segment(NamedTuple):
    """A piece of a document.

    Attributes:
      start, stop: the characters [start, stop) of the document.
      tokens: number of its tokens.
      key: what its answer is filed under; "": too short to be asked about.
    """

    start: int
    stop: int
    tokens: int
    key: str


@dataclass
class Report:
    """The counts of a run.

    Attributes:
      stopped: why the run did not finish, or "".
    """

    documents: int = 0
    skipped: int = 0  # rows that are not text
    segments: int = 0  # to be asked about
    known: int = 0  # of them, answered by earlier runs
    asked: int = 0  # answered by this run
    useless: int = 0  # answered, twice, without a single pair
    failed: int = 0  # without an answer: the next run asks them again
    conversations: int = 0
    pairs: int = 0
    unfit: int = 0  # pairs left out because not even alone they fit into max_tokens
    stopped: str = ""
    failures: dict[str, int] = field(default_factory=dict)


def synthesize(
    settings: Inquiry,
    *,
    stop: threading.Event | None = None,
    show: Callable[[str], None] | None = None,
) -> Report:
    """Asks what has no answer yet and writes all conversations to settings.out.

    The output depends on the sources and the answers only: not on the order in which
    the answers came, nor on how often the run was interrupted.

    Args:
      stop: set it to end early; requests under way are waited for.
      show: receives progress lines.

    Raises:
      ValueError: impossible settings, or sources without text.
      FileNotFoundError: a source does not exist.
      FileExistsError: settings.out is a file of something else.
      BlockingIOError: another run is writing the same file.
    """
    stop = stop or threading.Event()
    show = show or (lambda line: None)
    count = token_counter(settings.tokenizer)
    report = Report()
    kept = settings.out.with_name(f"{settings.out.name}.answers")
    if settings.out.exists() and not kept.exists():
        raise FileExistsError(
            f"out={str(settings.out)!r} exists and {kept.name} does not: it is not of "
            "this command; name another file"
        )
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with Answers(kept) as answers:
        with Progress().stage("reading the texts"):
            cut = _cut(settings, count, report)
        keys = {s.key for segments in cut for s in segments if s.key}
        report.segments, report.known = len(keys), len(keys & answers.known())
        show(
            f"{report.documents:,} documents, {report.segments:,} segments to ask "
            f"about, {report.known:,} of them answered before"
        )
        try:
            _ask_all(settings, cut, answers, report, stop, show)
        finally:
            with Progress().stage("writing"):
                rows = _conversations(settings, cut, answers, count, report)
                _write(settings.out, rows)
    return report


def documents(settings: Inquiry, report: Report | None = None) -> Iterator[str]:
    """Yields the texts of the sources in their order, at most settings.limit."""
    parts = open_parts(list(settings.sources), root=settings.root)
    rows = itertools.chain.from_iterable(read_part(part) for part in parts)
    taken = 0
    for row in rows:
        if settings.limit and taken >= settings.limit:
            return
        if isinstance(row, Record) and row.text is not None:
            taken += 1
            yield row.text
        elif report is not None:
            report.skipped += 1


def _cut(settings: Inquiry, count: Count, report: Report) -> list[list[Segment]]:
    """Returns the segments of every document: places only, texts are read again."""
    cut = []
    for text in documents(settings, report):
        pieces = split(text, settings.segment_tokens, count)
        segments, start = [], 0
        for piece, tokens in zip(pieces, count(pieces), strict=True):
            key = _key(settings, piece) if tokens >= SHORTEST_SEGMENT else ""
            segments.append(Segment(start, start + len(piece), tokens, key))
            start += len(piece)
        cut.append(segments)
    report.documents = len(cut)
    if not any(s.key for segments in cut for s in segments):
        raise ValueError(
            f"sources={list(settings.sources)}: no text of at least {SHORTEST_SEGMENT} "
            f"tokens among {report.documents:,} texts and {report.skipped:,} other rows"
        )
    return cut


def _key(settings: Inquiry, piece: str) -> str:
    """Returns a hash of what decides an answer: who is asked, and about what."""
    asked = [settings.endpoint.model, settings.pairs, INSTRUCTIONS, piece]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _ask_all(
    settings: Inquiry,
    cut: list[list[Segment]],
    answers: Answers,
    report: Report,
    stop: threading.Event,
    show: Callable[[str], None],
) -> None:
    """Asks about every segment without an answer, `concurrency` at a time."""
    questions = _open_questions(settings, cut, answers.known())
    total, began = report.segments - report.known, time.monotonic()
    shown, in_a_row = began, 0
    running: set[concurrent.futures.Future[list[Pair]]] = set()
    pool = concurrent.futures.ThreadPoolExecutor(settings.concurrency)
    try:
        with _stopping(stop):
            while True:
                free = 0 if stop.is_set() else settings.concurrency - len(running)
                for key, piece in itertools.islice(questions, free):
                    running.add(pool.submit(_ask, settings, key, piece, answers, stop))
                if not running:
                    break
                done, running = concurrent.futures.wait(
                    running, timeout=SHOW_EVERY, return_when="FIRST_COMPLETED"
                )
                for job in done:
                    failed = _count(job, report)
                    in_a_row = in_a_row + 1 if failed else 0
                    if in_a_row >= FAILURES or failed == "hopeless":
                        last = list(report.failures)[-1]
                        report.stopped = report.stopped or f"the endpoint fails: {last}"
                        stop.set()
                if time.monotonic() - shown > SHOW_EVERY:
                    shown = time.monotonic()
                    show(_progress(report, total, shown - began))
    finally:  # nothing runs any more, unless a second Ctrl-C gives up what does
        pool.shutdown(wait=False, cancel_futures=True)
    if stop.is_set() and not report.stopped:
        report.stopped = "interrupted"
    show(_progress(report, total, time.monotonic() - began))


def _open_questions(
    settings: Inquiry, cut: list[list[Segment]], known: set[str]
) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of each segment without an answer; equal texts once."""
    seen = set(known)
    for text, segments in zip(documents(settings), cut, strict=True):
        for segment in segments:
            if segment.key and segment.key not in seen:
                seen.add(segment.key)
                yield segment.key, text[segment.start : segment.stop].strip()


def _ask(
    settings: Inquiry,
    key: str,
    piece: str,
    answers: Answers,
    stop: threading.Event,
) -> list[Pair]:
    """Asks for pairs about a segment and keeps them.

    The model is asked a second time if not all pairs are there.
    """
    wanted = settings.pairs
    messages = [
        {"role": "system", "content": INSTRUCTIONS.format(pairs=wanted)},
        {"role": "user", "content": piece},
    ]
    first = settings.endpoint.ask(messages, stop)
    pairs = parse_pairs(first)[:wanted]
    if len(pairs) < wanted:
        messages += [
            {"role": "assistant", "content": first},
            {"role": "user", "content": ASK_AGAIN.format(pairs=wanted)},
        ]
        try:
            second = parse_pairs(settings.endpoint.ask(messages, stop))[:wanted]
        except Failed:
            if not pairs:
                raise
            second = []
        pairs = max(pairs, second, key=len)
    answers.add(key, pairs)
    return pairs


def _count(job: "concurrent.futures.Future[list[Pair]]", report: Report) -> str:
    """Enters a finished job into the report; returns how it failed, or ""."""
    try:
        pairs = job.result()
    except concurrent.futures.CancelledError:
        return ""
    except (Failed, Hopeless) as error:
        report.failed += 1
        reason = str(error)
        report.failures[reason] = report.failures.pop(reason, 0) + 1  # the last is last
        return "hopeless" if isinstance(error, Hopeless) else "failed"
    report.asked += 1
    report.useless += not pairs
    return ""


def _progress(report: Report, total: int, seconds: float) -> str:
    done = report.asked + report.failed
    rate = done / seconds if seconds > 0 else 0.0
    left = f"{(total - done) / rate / 60:,.0f} min left" if rate else "? left"
    return (
        f"asked {done:,}/{total:,} ({report.failed:,} failed, {report.useless:,} "
        f"useless)  {60 * rate:,.1f} segments/min  {left}"
    )


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Makes the first Ctrl-C or SIGTERM set `stop`; a second one acts as always."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conversations(
    settings: Inquiry,
    cut: list[list[Segment]],
    answers: Answers,
    count: Count,
    report: Report,
) -> Iterator[list[dict[str, str]]]:
    for text, segments in zip(documents(settings), cut, strict=True):
        parts = [
            (segment, pairs, _tokens(pairs, count))
            for segment in segments
            if (pairs := answers.get(segment.key))
        ]
        room = settings.max_tokens - TALK_TOKENS
        for segment, pairs, tokens in parts:
            # So many answers that not even this segment's alone fit: the last go.
            while pairs and segment.tokens + sum(tokens) > room:
                pairs.pop()
                tokens.pop()
                report.unfit += 1
        for group in _groups([part for part in parts if part[1]], room):
            context = text[group[0][0].start : group[-1][0].stop].strip()
            pairs = [pair for _, pairs, _ in group for pair in pairs]
            report.conversations += 1
            report.pairs += len(pairs)
            yield _turns(context, pairs)


Answered = tuple[Segment, list[Pair], list[int]]


def _groups(parts: Iterable[Answered], room: int) -> Iterator[list[Answered]]:
    """Yields runs of neighbours that fit into `room` tokens with their pairs."""
    group: list[Answered] = []
    left = 0
    for part in parts:
        needs = part[0].tokens + sum(part[2])
        if group and (needs > left or group[-1][0].stop != part[0].start):
            yield group
            group = []
        if not group:
            left = room
        group.append(part)
        left -= needs
    if group:
        yield group


def _tokens(pairs: Sequence[Pair], count: Count) -> list[int]:
    """Returns the tokens of each pair as two turns of a conversation."""
    counts = count([text for pair in pairs for text in pair])
    return [
        counts[i] + counts[i + 1] + 2 * TURN_TOKENS for i in range(0, len(counts), 2)
    ]


def _turns(context: str, pairs: Sequence[Pair]) -> list[dict[str, str]]:
    turns = []
    for i, (question, answer) in enumerate(pairs):
        question = f"{context}\n\n{question}" if i == 0 else question
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return turns


def _write(path: Path, conversations: Iterable[list[dict[str, str]]]) -> None:
    """Writes all conversations or nothing.

    What was there before stays until the new file is complete.
    """
    with whole_file(path) as file:
        for turns in conversations:
            row = {"conversations": turns}
            try:
                line = json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # a lone surrogate, as models can write in JSON
                line = json.dumps(row).encode()
            file.write(line + b"\n")


if __name__ == "__main__":
    from beacon_jax.cli import start

    start("synthesize")
