"""Generates text after a context of any length, compressed by a ratio.

python -m beacon_jax.generate --model=DIR --context=FILE|- --prompt="..." --ratio=8 \
    [--max_new_tokens=64] [--temperature=0.7 --top_k=40 --top_p=0.9 --seed=0]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags


def define_flags() -> None:
    flags.DEFINE_string("model", None, "HF or converted folder.", required=True)
    flags.DEFINE_string("context", None, "Text file to read first; - is stdin.")
    flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
    flags.DEFINE_string("ratio", None, "8, 2,4,8 (per window) or full; else model's.")
    flags.DEFINE_integer("max_new_tokens", 64, "New tokens, at most.")
    flags.DEFINE_float("temperature", 0.0, "0: greedy.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the top tokens that reach p; 1: all.")
    flags.DEFINE_integer("seed", 0, "Of sampling and of a random ratio mix.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Else as stored.")


def read_context(name: str) -> str:
    """The text of a file or, for "-", of stdin; ValueError if there is none."""
    if name != "-" and not Path(name).is_file():
        raise ValueError(f"--context={name}: no such file (use - for stdin).")
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    if not data.strip():
        raise ValueError(f"--context={name} is empty: name a file with text.")
    return data.decode("utf-8", errors="replace")


def parse_ratio(text: str | None) -> list[int] | str | None:
    if text is None or text == "full":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--ratio={text}: use 8, or 2,4,8, or full.") from None


def run(options: flags.FlagValues) -> None:
    from beacon_jax.inference.model import load  # after the flags: jax takes seconds

    context = read_context(options.context) if options.context else None
    model = load(options.model, dtype=options.dtype)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    result = model.complete(
        options.prompt,
        context=context,
        ratio=parse_ratio(options.ratio),
        on_text=lambda text: print(text, end="", flush=True),
        **{name: getattr(options, name) for name in names},
    )
    print(flush=True)  # and all else to stderr: stdout is the text alone
    read, new = result.prompt_tokens, len(result.tokens)
    print(
        f"{result.memory.describe()}\nwith compilation: "
        f"prefill {read} tokens, {read / result.prefill_seconds:.1f} tokens/s; "
        f"decode {new} tokens, {new / result.decode_seconds:.1f} tokens/s",
        file=sys.stderr,
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected {argv[1:]}: quote the text of --prompt.")
    try:
        run(flags.FLAGS)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
