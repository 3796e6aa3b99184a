"""Makes questions and answers about long texts with any OpenAI-compatible endpoint.

python -m beacon_jax.data.synthesize --sources='books/*.jsonl' --out=FILE.jsonl \\
    --endpoint=http://localhost:8000/v1 --model=NAME [--tokenizer=DIR] \\
    [--api_key_env=OPENAI_API_KEY] [--segment_tokens=4096] [--pairs=4] \\
    [--max_tokens=20480] [--concurrency=8] [--requests_per_minute=0] [--limit=0]

As the paper's appendix A: each text is split into segments of at most segment_tokens,
the model writes `pairs` questions and answers about each, and neighbouring segments
become one conversation of at most max_tokens, the first turn of which is the text with
the first question. One {"conversations": [...]} a line, as `data.sources` reads it.

Every answer is kept in FILE.jsonl.answers as soon as it comes. Interrupted, or with an
endpoint that fails, the command writes what it has; the same command goes on and asks
only what has no answer. Without --tokenizer a token is guessed as 3 bytes.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from beacon_jax.data.endpoint import Endpoint, Pace
from beacon_jax.data.synthesize import Report, Settings, synthesize


def define_flags() -> None:
    flags.DEFINE_multi_string(
        "sources", None, "URI of texts, repeatable.", required=True
    )
    flags.DEFINE_string("out", None, "JSON lines file to write.", required=True)
    flags.DEFINE_string("endpoint", None, "Address up to /v1.", required=True)
    flags.DEFINE_string("model", None, "Its name at the endpoint.", required=True)
    flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", "Variable with the key.")
    flags.DEFINE_string("tokenizer", "", "HF folder; else a token is 3 bytes.")
    flags.DEFINE_string("root", "", "What long-llm: sources are relative to.")
    flags.DEFINE_integer("segment_tokens", 4096, "Of a segment, at most.")
    flags.DEFINE_integer("pairs", 4, "Questions about each segment.")
    flags.DEFINE_integer("max_tokens", 20480, "Of a conversation, at most.")
    flags.DEFINE_integer("concurrency", 8, "Requests under way at a time.")
    flags.DEFINE_float("requests_per_minute", 0.0, "0: as fast as it answers.")
    flags.DEFINE_integer("limit", 0, "Documents at most; 0: all.")


def from_flags(values: Any) -> Settings:
    """Settings of a command line; the key comes from the environment."""
    endpoint = Endpoint(
        values.endpoint,
        values.model,
        key=os.environ.get(values.api_key_env, "").strip(),
        pace=Pace(values.requests_per_minute),
    )
    names = ("tokenizer", "root", "segment_tokens", "pairs", "max_tokens")
    return Settings(
        tuple(values.sources),
        Path(values.out).expanduser(),
        endpoint,
        concurrency=values.concurrency,
        limit=values.limit,
        **{name: getattr(values, name) for name in names},
    )


def describe(report: Report) -> str:
    """What a run did, in a few lines."""
    unanswered = report.segments - report.known - report.asked
    lines = [
        f"{report.conversations:,} conversations with {report.pairs:,} pairs about "
        f"{report.documents:,} documents; {unanswered:,} of {report.segments:,} "
        f"segments without an answer, {report.useless:,} with a useless one now",
    ]
    if report.skipped or report.unfit:
        lines.append(
            f"left out: {report.skipped:,} rows that are not text, {report.unfit:,} "
            "pairs that do not fit into --max_tokens"
        )
    lines += [f"{n:,} x {reason}" for reason, n in report.failures.items()]
    if unanswered or report.stopped:
        lines.append(
            f"not finished{f' ({report.stopped})' if report.stopped else ''}: the same "
            "command asks the rest"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option has --.")
    try:
        settings = from_flags(flags.FLAGS)
        if not settings.endpoint.key:
            print(f"no key in {flags.FLAGS.api_key_env}: asking without one")
        report = synthesize(settings, show=lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(describe(report), flush=True)
    if report.stopped or report.failed:
        sys.exit(1)
