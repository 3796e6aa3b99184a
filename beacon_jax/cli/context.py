"""The parts that `compress` and `generate` share: flags, texts, progress, figures.

stdout is for text and JSON; everything here that is shown goes to stderr.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from beacon_jax import paths, runtime
from beacon_jax.cli.ending import fail, in_flags
from beacon_jax.cli.options import Group
from beacon_jax.decoding import decode
from beacon_jax.progress import Progress, say

if TYPE_CHECKING:  # jax takes seconds to import: after the flags
    from beacon_jax.inference.memory import Memory
    from beacon_jax.inference.model import Model

MIB = 2**20
METHODS = (
    "beacon, or without beacons: streaming, snapkv, expected-attention, kvzip, "
    "attention-matching, mean-pool, retention:FOLDER, or module:Class."
)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of both commands: model, texts and how they are compressed."""
    define_model(values)
    f = Group(values, "Text")
    f.texts("context", None, "Text file, - is stdin; repeated: read as one text.")
    f.text("encoding", None, "Of text files that are not UTF-8: gb18030, utf-16.")
    f = Group(values, "Compression")
    f.text("ratio", None, "8; 2,4,8 (per window); full; auto; auto-8. Else the mix.")
    f.text("method", None, METHODS)
    f.number("max_slots", None, "Budget in place of --ratio: entries held, at most.")
    f.text("max_bytes", None, "The same in bytes of keys and values: 512MiB.")
    f.number(
        "slot_cap", None, "Entries at most, at one --ratio: the oldest are thinned."
    )
    f.text("spans", None, "Regular expression: what must not be compressed.")
    f.choice(
        "lossless", "windows", ["windows", "slots"], "What of --spans is kept raw."
    )
    f.choice("memory_dtype", None, ["int8"], "52 to 63 % of bfloat16's bytes.")
    f.switch("recent", False, "Keep the last full window raw, W entries more.")
    f = Group(values, "Sampling")
    f.number("seed", 0, "Of sampling and of a random ratio mix.", lower_bound=0)
    f = Group(values, "Output")
    f.switch("overwrite", False, "Replace the file that is written.")


def define_model(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of a model that is loaded."""
    f = Group(values, "Model")
    f.text(
        "model",
        None,
        "HF or converted folder, GGUF, tiny-beacon.",
        required=True,
    )
    define_beacons(f)
    f.choice("dtype", None, ["float32", "bfloat16", "float16"], "Else as stored.")
    f.text("mesh", None, "Devices to split over: tensor:8.")


def define_beacons(f: Group) -> None:
    """Defines the flags of beacons that are not in --model."""
    f.text("beacons", None, "Adapter folder: beacons trained on --model.")
    f.switch("allow_other_base", False, "Take --beacons of another base.")


def main(
    run: Callable[[flags.FlagValues], None],
    argv: Sequence[str],
    values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Runs a command; what the user can mend ends as one line and exit code 1."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected {argv[1:]}: quote texts with spaces.")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, *_: say(
                f"warning: {in_flags(text, values)}"
            )
            run(values)
    except (TypeError, ValueError, OSError, ImportError) as error:
        fail(error, values)


# --- what the flags say ----------------------------------------------------------


def read_text(flag: str, name: str, encoding: str | None = None) -> str:
    """Reads the text of a file or, for "-", of stdin.

    Args:
      encoding: of the file; None: UTF-8.

    Raises:
      ValueError: there is no such file, no text in it, or one in another encoding.
    """
    if name == "-":
        if sys.stdin is None:
            raise ValueError(f"--{flag}=- reads stdin, which is closed: name a file.")
        data = sys.stdin.buffer.read()
    else:
        check_file(flag, name, " (use - for stdin)")
        data = Path(name).read_bytes()
    if data.startswith(paths.POINTER):
        raise ValueError(
            f"--{flag}={name} is a pointer of git-lfs, not the file: fetch it (git lfs "
            "pull in its folder)."
        )
    text = decode(data, f"--{flag}={name}", encoding)
    if not text.strip():
        raise ValueError(f"--{flag}={name} is empty: name a file with text.")
    return text


def check_file(flag: str, name: str, hint: str = "") -> None:
    """Raises ValueError if there is no such file to read."""
    if not name:
        raise ValueError(f"--{flag}= is empty: name a file{hint}.")
    if Path(name).is_dir():
        raise ValueError(f"--{flag}={name} is a folder: name a file{hint}.")
    if not Path(name).exists():
        raise ValueError(f"--{flag}={name}: no such file{hint}.")


def check_options(o: flags.FlagValues, memory: str, rows: int, **more: Any) -> None:
    """Checks all that needs no model, before seconds are spent on loading one.

    Args:
      memory: the name of the flag of a pack to read.
      rows: how many prompts there are.
      more: options of `Model.complete`.

    Raises:
      ValueError, TypeError: a value that cannot be, by its flag.
    """
    from beacon_jax.inference import validate
    from beacon_jax.inference.options import Completion

    names = ("max_slots", "max_bytes", "slot_cap", "spans", "lossless", "memory_dtype")
    given = {name: getattr(o, name) for name in names}
    validate.options(Completion(ratio=parse_ratio(o.ratio), **given, **more), rows)
    for text in getattr(o, "prompt", None) or []:
        validate.readable("prompt", text)
    if getattr(o, "system", None):
        validate.readable("system", o.system)
    if getattr(o, memory) is not None:
        check_file(memory, getattr(o, memory))


def read_context(o: flags.FlagValues) -> str | None:
    """Reads the texts of all --context in order, as one; None: there are none."""
    names = o.context or []
    if names.count("-") > 1:
        raise ValueError("--context=- is given twice: stdin can be read once.")
    if not names and o.spans is not None:
        raise ValueError(f"--spans={o.spans} marks parts of --context: give one.")
    texts = (read_text("context", name, o.encoding) for name in names)
    return "".join(texts) if names else None


def parse_ratio(text: str | None) -> list[int] | str | None:
    """Reads --ratio; ValueError if it is none, a number below 0 for example."""
    if text is None or re.fullmatch(r"full|auto(-[1-9]\d*)?", text):
        return text
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise ValueError(
            f"--ratio={text}: use 8, or 2,4,8 (per window), full, auto or auto-8."
        )
    return [int(part) for part in text.split(",")]


def check_new(
    flag: str, name: str | None, *, overwrite: bool, texts: Sequence[str] = ()
) -> None:
    """Checks a file that is to be written (`paths.check_new`).

    It is called before an hour is spent on what goes into the file.

    Raises:
      ValueError: no name of a file, or that of a text that the command reads.
      FileExistsError: the file exists, without `overwrite`.
    """
    if name is None:
        return
    for text in texts:
        if text != "-" and os.path.realpath(text) == os.path.realpath(name):
            raise ValueError(
                f"--{flag}={name} is a text that this command reads, and would be "
                "replaced: name another file."
            )
    paths.check_new(name, f"--{flag}", overwrite=overwrite, remedy="add --overwrite")


def load_model(o: flags.FlagValues, progress: Progress) -> "Model":
    """Loads the model of --model, with compiled programs of earlier runs at hand."""
    with progress.stage("loading", note=o.model):
        runtime.for_command()
        from beacon_jax.hf import hub
        from beacon_jax.inference.loading import load

        return load(
            hub.find(o.model, "--model"),
            dtype=o.dtype,
            mesh=o.mesh,
            beacons=o.beacons,
            allow_other_base=o.allow_other_base,
        )


def load_memory(flag: str, path: str | None, model: "Model") -> "Memory | None":
    """Loads one context from a beacon pack; None if the flag was not given."""
    if path is None:
        return None
    from beacon_jax.inference.memory import Memory

    memory = Memory.load(path, model, mesh=model.partition)
    if len(memory) != 1:
        raise ValueError(
            f"--{flag}={path} holds {len(memory)} contexts: save one of them by itself "
            "(Memory.load(path)[i].save(...))."
        )
    return memory


# --- the context -----------------------------------------------------------------


class Context(NamedTuple):
    """The context: what was read before any prompt.

    Attributes:
      memory: None if there is neither a context nor a loaded memory.
      notes: what was decided about ratios.
      tokens, seconds: of the text that was compressed here, without compilation.
      compiled: seconds of compilation.
      ratio: options of `Model.complete` for what follows.
    """

    memory: "Memory | None"
    notes: list[str]
    tokens: int
    seconds: float
    compiled: float
    ratio: dict[str, Any]


def read(
    model: "Model",
    o: flags.FlagValues,
    text: str | None,
    memory: "Memory | None",
    progress: Progress,
    reserve: int = 0,
) -> Context:
    """Compresses the context behind the memory, as the flags say.

    A budget or "auto" is spent on the context, with `reserve` tokens to follow. Those
    go on at the ratio that the memory ends with. Given ratios go on by themselves.
    """
    ratio: dict[str, Any] = {
        "ratio": parse_ratio(o.ratio),
        "method": o.method,
        "max_slots": o.max_slots,
        "max_bytes": o.max_bytes,
        "slot_cap": o.slot_cap,
        "memory_dtype": o.memory_dtype,
        "recent": o.recent or None,
    }
    if text is None:
        return Context(memory, [], 0, 0.0, 0.0, ratio)
    if o.slot_cap is not None and len(ratio["ratio"] or ()) == 1:
        ratio["ratio"] = ratio["ratio"][0]
    import jax

    from beacon_jax.compiling import Stopwatch

    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    before = int(memory.lengths[0]) if memory else 0
    watch = Stopwatch()
    with progress.stage("reading", "tokens") as stage:
        memory = model.compress(
            text,
            memory=memory,
            spans=o.spans,
            lossless=o.lossless,
            reserve=reserve,
            seed=o.seed,
            on_note=note,
            on_progress=stage,
            **ratio,
        )
        jax.block_until_ready(memory.state)
    seconds, compiled = watch.read()
    given = None if o.method not in (None, "beacon") else parse_ratio(o.ratio)
    stated = given if given == "full" or isinstance(given, list) else None
    tokens = int(memory.lengths[0]) - before
    return Context(memory, notes, tokens, seconds, compiled, {"ratio": stated})


# --- figures ---------------------------------------------------------------------


def figures(model: "Model", memory: "Memory", row: int = 0) -> dict[str, Any]:
    """Returns the figures of one row: what it holds, in entries and bytes.

    The open window is included. The bytes of full attention stand beside them.
    """
    account = memory.account(row)
    return {
        "tokens": account.tokens,
        "slots": account.slots,
        "open_window": account.open_tokens,
        "entries": account.entries,
        "bytes": account.nbytes,
        "full_attention_bytes": account.tokens * _whole_nbytes(model),
        "ratio": round(account.ratio, 2),
        "planned_ratios": list(account.ratios),
    }


def summary(model: "Model", memory: "Memory") -> str:
    """Returns the figures of row 0 on one line."""
    account = memory.account(0)
    whole = account.tokens * _whole_nbytes(model) / MIB
    return (
        f"memory: {account.tokens:,} tokens in {account.holds()}, {account.worth()}; "
        f"full attention: {whole:,.3f} MiB"
    )


def _whole_nbytes(model: "Model") -> int:
    """Counts the bytes per token of full attention.

    It keeps the dtype of the activations, whatever the memory is kept in.
    """
    from beacon_jax.core.memory import slot_nbytes

    return slot_nbytes(model.config, model.net.dtype)
