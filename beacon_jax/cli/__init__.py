"""The commands: one file each, which turns flags into one call of the package.

`beacon-jax COMMAND`, `python -m beacon_jax COMMAND` and `python -m beacon_jax.COMMAND`
are the same. A command's file has a docstring (what --help begins with), and either
`define_flags(values)` and `main(arguments)`, or `main()` alone, which then reads the
arguments of the process. Nothing that takes long to import is imported at its top:
--help answers in less than a second.
"""

import importlib
import io
import logging
import sys
from collections.abc import Sequence

from beacon_jax import __version__, runtime
from beacon_jax.names import meant

COMMANDS = {
    "generate": "Generate text after a context, compressed by a ratio.",
    "compress": "Compress a text into a beacon pack, to ask questions later.",
    "serve": "Serve a model: contexts compressed once, asked by many.",
    "train": "Train beacons on a frozen model, or a small model from scratch.",
    "retain": "Fit what of a text has to be kept, in minutes, for any model.",
    "prepare": "Tokenise training text and conversations once.",
    "inspect": "Show what prepared data hold, before a run spends hours on them.",
    "synthesize": "Make questions and answers about long texts with an endpoint.",
    "evaluate": "Measure what compression costs, and compare finished runs.",
    "lm_eval": "Run lm-evaluation-harness against a compressed model.",
    "convert": "Convert checkpoints from and to Hugging Face folders.",
    "bench": "Measure speed and memory.",
}
# What the user of a command can do after Ctrl-C.
AFTERWARDS: dict[str, str] = dict.fromkeys(
    ["train", "prepare", "synthesize", "evaluate", "bench"],
    "the same command goes on where it stopped",
)


def overview() -> str:
    """Returns what `beacon-jax --help` prints: every command with one line."""
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Activation Beacon in JAX: compresses the KV cache of long contexts.",
            "",
            "usage: beacon-jax COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            "beacon-jax COMMAND --help: its flags; beacon-jax --version: the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names."""
    from beacon_jax.cli.ending import ended

    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("--help", "-h", "help", "--version", "version"):
        with ended("beacon-jax"):
            told = f"beacon-jax {__version__}" if "version" in name else overview()
            print(told)
    elif name in COMMANDS:
        start(name, words[1:])
    else:
        sys.exit(
            f"error: there is no command {name!r}: {meant(name, COMMANDS)}the commands "
            f"are {', '.join(COMMANDS)}."
        )


def start(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs the command `name`, with the arguments of this process if none are given."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Flags of configs (ml_collections) and lm_eval read them there.
    sys.argv = [f"beacon-jax {name}", *words]
    from beacon_jax.cli.ending import ended

    runtime.quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escapes for letters it cannot write
            stream.reconfigure(errors="backslashreplace")
    with ended(name, AFTERWARDS.get(name, "")):
        module = importlib.import_module(f"beacon_jax.cli.{name}")
        if not hasattr(module, "define_flags"):
            return module.main()
        from absl import app, flags
        from absl import logging as absl_logging

        from beacon_jax.cli import options

        # A line is for the user: without level, time, process and file.
        plain = logging.Formatter("%(message)s")
        absl_logging.get_absl_handler().setFormatter(plain)
        module.define_flags(flags.FLAGS)
        parse = lambda given: options.parse(given, flags.FLAGS, module.__doc__ or "")
        app.run(module.main, argv=sys.argv, flags_parser=parse)
