"""Makes questions and answers about long texts with any OpenAI-compatible endpoint.

As the paper's appendix A: each text is split into segments of at most segment_tokens,
the model writes `pairs` questions and answers about each, and neighbouring segments
become one conversation of at most max_tokens, the first turn of which is the text with
the first question. One {"conversations": [...]} a line, as `data.sources` reads it.

Every answer is kept in FILE.jsonl.answers as soon as it comes. Interrupted, or with an
endpoint that fails, the command writes what it has; the same command goes on and asks
only what has no answer. Without --tokenizer a token is guessed as 3 bytes.

Example:
  beacon-jax synthesize --sources='books/*.jsonl' --out=questions.jsonl \\
    --endpoint=http://localhost:8000/v1 --model=NAME
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from beacon_jax.cli.ending import command, wait_for_python
from beacon_jax.cli.options import Group
from beacon_jax.paths import check_file

if TYPE_CHECKING:  # they load numpy and pyarrow
    from beacon_jax.data.synthesize import Inquiry, Report


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    f = Group(values, "Texts")
    f.texts("sources", None, "URI of texts, repeatable.", required=True)
    f.text("root", "", "What long-llm: sources are relative to.")
    f.number("limit", 0, "Documents at most; 0: all.")
    f = Group(values, "Endpoint")
    f.text("endpoint", None, "Address up to /v1.", required=True)
    f.text("model", None, "Its name at the endpoint.", required=True)
    f.text("api_key_env", "OPENAI_API_KEY", "Variable with the key.")
    f.number("concurrency", 8, "Requests under way at a time.")
    f.real("requests_per_minute", 0.0, "0: as fast as it answers.")
    f = Group(values, "Questions")
    f.number("pairs", 4, "Questions about each segment.")
    f.number("segment_tokens", 4096, "Of a segment, at most.")
    f.number("max_tokens", 20480, "Of a conversation, at most.")
    f.text("tokenizer", "", "HF folder or GGUF file; else a token is 3 bytes.")
    f = Group(values, "Output")
    f.text("out", None, "JSON lines file to write.", required=True)


def from_flags(values: Any) -> "Inquiry":
    """Makes the settings of a command line; the key comes from the environment."""
    from beacon_jax.data.endpoint import Endpoint, Pace
    from beacon_jax.data.synthesize import Inquiry

    endpoint = Endpoint(
        values.endpoint,
        values.model,
        key=os.environ.get(values.api_key_env, "").strip(),
        pace=Pace(values.requests_per_minute),
    )
    names = ("tokenizer", "root", "segment_tokens", "pairs", "max_tokens")
    return Inquiry(
        tuple(values.sources),
        Path(values.out).expanduser(),
        endpoint,
        concurrency=values.concurrency,
        limit=values.limit,
        **{name: getattr(values, name) for name in names},
    )


def describe(report: "Report") -> str:
    """Says what a run did, in a few lines."""
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


@command
def main(values: flags.FlagValues) -> None:
    from beacon_jax.data.synthesize import synthesize

    settings = from_flags(values)
    check_file("--out", settings.out)
    if not settings.endpoint.key:
        print(f"no key in {values.api_key_env}: asking without one")
    wait_for_python()  # the first Ctrl-C lets the questions on their way end
    report = synthesize(settings, show=lambda line: print(line, flush=True))
    print(describe(report), flush=True)
    if report.stopped or report.failed:
        sys.exit(1)
