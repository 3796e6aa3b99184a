"""The flags of a command: defined in groups, shown by --help, and parsed.

A wrong flag or value ends the program with one line that names it and what to do. The
flags are absl's, so a command can be called from a program with values of its own.
"""

import ast
import functools
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from beacon_jax import resources
from beacon_jax.cli import config_errors
from beacon_jax.names import meant

WIDTH = 88
HELP = ("--help", "-h", "-help", "--helpshort")


class Group:
    """Defines flags under one title of --help.

    Each method takes name, default, help; `required=True` marks a flag that must be
    given, `lower_bound=0` the least a number can be.
    """

    def __init__(self, values: flags.FlagValues, title: str):
        self.values, self.title = values, title
        self.text = self._definer("string")
        self.texts = self._definer("multi_string")  # repeated
        self.names = self._definer("list")  # separated by commas
        self.number = self._definer("integer")
        self.real = self._definer("float")
        self.switch = self._definer("bool")
        self.choice = self._definer("enum")  # the choices stand before the help

    def config(self) -> None:
        """Defines --config, a name or a file, and --config.key=value."""
        from ml_collections import config_flags

        config_flags.DEFINE_config_file(
            "config",
            None,
            f"Experiment, NAME[:ARGUMENT]: a file, or one of "
            f"{', '.join(resources.config_names())}.",
            self.values,
            lock_config=True,
        )
        flags.mark_flag_as_required("config", self.values)
        self._mark("config")

    def _definer(self, kind: str) -> Any:
        define = getattr(flags, f"DEFINE_{kind}")

        @functools.wraps(define)
        def defined(name: str, *arguments: Any, **options: Any) -> None:
            define(name, *arguments, flag_values=self.values, **options)
            self._mark(name, bool(options.get("required")))

        return defined

    def _mark(self, name: str, required: bool = True) -> None:
        flag: Any = self.values[name]
        flag.group, flag.must = self.title, required


# --- help ------------------------------------------------------------------------


def describe(values: flags.FlagValues, doc: str) -> str:
    """Returns what --help prints: the docstring, and the flags of every group."""
    parts, title = [textwrap.dedent(doc).strip()], None
    for flag in _own(values):
        if flag.group != title:
            title = flag.group
            parts.append(f"\n{title}")
        parts.append(_line(flag))
        if flag.name == "config":
            parts.append(
                _columns(
                    "--config.KEY=VALUE",
                    "Changes one key of it. --config=NAME --help lists all keys.",
                )
            )
    parts.append("\n--helpfull: the flags of the libraries, too.")
    return "\n".join(parts)


def _own(values: flags.FlagValues) -> Iterator[Any]:
    """Yields the command's flags, group by group, in the order of definition."""
    own: list[Any] = [values[name] for name in values if hasattr(values[name], "group")]
    titles = list(dict.fromkeys(flag.group for flag in own))
    yield from sorted(own, key=lambda flag: titles.index(flag.group))


def _line(flag: Any) -> str:
    kind, text = flag.flag_type(), flag.help
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        text = text.removeprefix(f"<{'|'.join(choices)}>: ")
    value = {
        "bool": "",
        "int": "=N",
        "float": "=X",
        "config object": "=NAME",
        "comma separated list of strings": "=A,B",
    }.get(kind, "=TEXT")
    if choices:
        value = f"={'|'.join(choices)}"
    # absl adds rules of its own ("a non-negative integer") and "repeat this option".
    text = re.sub(r"\s+", " ", text.split("\n")[0]).strip().removesuffix(";")
    default = flag.default
    if isinstance(default, (list, tuple)):
        default = ",".join(map(str, default))
    if flag.must:
        text += " Required."
    elif default not in (None, "", False) or (default == 0 and default is not False):
        text += f" Default: {default}."
    return _columns(f"--{flag.name}{value}", text)


def _columns(left: str, text: str) -> str:
    indent = 26
    lines = textwrap.wrap(text, WIDTH - indent) or [""]
    if len(left) + 4 > indent:
        lines.insert(0, "")
    first = f"  {left:<{indent - 2}}{lines[0]}".rstrip()
    return "\n".join([first, *(" " * indent + line for line in lines[1:])])


# --- parsing ---------------------------------------------------------------------


def parse(argv: Sequence[str], values: flags.FlagValues, doc: str = "") -> list[str]:
    """Parses the flags; returns what is no flag, the program's name first.

    --help prints `doc` and the flags, and ends. With --config=NAME before it, all keys
    of that config follow. A wrong flag or value ends the program with one line.
    """
    words = list(argv)
    before = words[: words.index("--")] if "--" in words else words
    asked = [word for word in before if word in HELP]
    if "--helpfull" in before:
        print(f"{describe(values, doc)}\n{values.get_help()}")
        sys.exit(0)
    if asked:
        print(describe(values, doc))
        named = [w for w in _with_config(words, values) if w.startswith("--config=")]
        if named and "config" in values:
            print(f"\nKeys of {named[-1]}\n\n{_keys(named[-1], values)}")
        sys.exit(0)
    try:
        return values(_with_config(words, values))
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
    ) as error:
        sys.exit(
            f"error: {_of_file(error, before) or _reason(error, values, words[0])}"
        )


def _with_config(words: list[str], values: flags.FlagValues) -> list[str]:
    """Returns the arguments with the path of --config in place of its name.

    Paths of --config.data.sources and letters of --config.beacon.param are quoted, as
    ml_collections wants them. Of two --config it takes the first with what is changed
    of the last, so they are an error.
    """
    if "config" not in values:
        return words
    ours = {
        "config": _config,
        "config.data.sources": _quoted,
        "config.beacon.param": _letters,
    }
    made: list[str] = []
    for word in words:
        name, found, value = word.partition("=")
        before = made[-1] if made else ""
        if found and name.startswith("-") and name.lstrip("-") in ours:
            made.append(f"{name}={ours[name.lstrip('-')](value)}")
        elif before.startswith("-") and before.lstrip("-") in ours:
            made[-1] = f"{before}={ours[before.lstrip('-')](word)}"
        else:
            made.append(word)
    named = [
        word
        for word in made[: made.index("--") if "--" in made else None]
        if re.match("--?config=", word)
    ]
    if len(named) > 1:
        sys.exit(
            f"error: {' '.join(named)}: name one config; --config.KEY=VALUE changes a "
            "key of it."
        )
    return made


def _quoted(value: str) -> str:
    """Returns a path as a tuple of one in Python, and a tuple of paths as it is.

    ml_collections reads Python: a blank in a name would be an error, 2024 a number.
    """
    try:
        made = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        made = None
    if isinstance(made, str):
        return repr((made,))
    paths = isinstance(made, tuple | list) and all(isinstance(x, str) for x in made)
    return value if paths else repr((value,))


def _letters(value: str) -> str:
    """Returns letters between commas as a tuple in Python, and all else as it is."""
    letters = value.split(",")
    return repr(tuple(letters)) if all(x.isalpha() for x in letters) else value


def _config(name: str) -> str:
    try:
        return resources.config(name)
    except FileNotFoundError as error:
        sys.exit(f"error: --{error}")


def _keys(word: str, values: flags.FlagValues) -> str:
    """Lists all keys of a config with their values, as --config.KEY=VALUE has them."""
    try:
        values[values["config"].name].parse(word.partition("=")[2])
        config: Any = values["config"].value
        return "\n".join(
            f"  {key}={value!r}" for key, value in config_errors.flat(config)
        )
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {config_errors.of_argument(_last_line(str(error)))}")


def _of_file(error: Exception, words: Sequence[str]) -> str:
    """Says why a --flagfile cannot be read; "" if the error is of something else."""
    remedy = "name a text file in UTF-8 that has one flag a line, as --ratio=8."
    if isinstance(error, flags.CantOpenFlagFileError):
        reason, _, name = str(error).rpartition(": ")
        return (
            f"--flagfile={name.strip('\'"')} cannot be read "
            f"({reason.rpartition('] ')[2]}): {remedy}"
        )
    if isinstance(error, UnicodeDecodeError):
        names = [word for word in words if re.match("--?flagfile=", word)]
        if names:
            return f"{' '.join(names)} is no text in UTF-8: {remedy}"
    return ""


def _reason(error: Exception, values: flags.FlagValues, command: str) -> str:
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        hint = meant(f"--{name}", [f"--{flag.name}" for flag in _own(values)])
        return f"--{name}: no such flag; {hint}{command} --help lists them."
    if isinstance(error, flags.Error):
        missing = [f for f in _own(values) if f.must and f.value is None]
        if missing and "must have a value other than None" in str(error):
            names = ", ".join(f"--{flag.name}" for flag in missing)
            first = missing[0].help.split(":")[0].rstrip(".")
            is_missing = f"is missing ({first})" if len(missing) == 1 else "are missing"
            return f"{names} {is_missing}."
        text = str(error)
        if "Traceback" in text:  # raised by the config's own code
            return config_errors.of_argument(" ".join(_last_line(text).split()))
        return _typed(config_errors.of_value(" ".join(text.split())), values)
    if "does not take an argument" in str(error):
        return _typed(str(error), values)
    # An error of a config: ml_collections quotes its message twice.
    text = str(error).replace("\\n", " ").replace("\\'", "'").strip("\"'")
    near = re.search(
        r'Did you mean "\w+" instead of "(\w+)"|to lookup: [\w.]+\.(\w+)$', text
    )
    if near or re.fullmatch(r"\w+", text):
        missing = (near[1] or near[2]) if near else text
        return config_errors.of_key(missing, _with_config(sys.argv, values))
    return f"--config: {' '.join(_last_line(text).split())}"


def _typed(text: str, values: flags.FlagValues) -> str:
    """Returns absl's message on a value of the wrong type in words of ours."""
    found = re.match(r"flag --(\w+)=(.*?): ", text)
    wanted = {
        "int": "give a whole number",
        "float": "give a number",
        "bool": "give nothing, true or false",
    }
    if found and found[1] in values:
        kind: Any = values[found[1]]
        least = getattr(kind.parser, "lower_bound", None)
        if kind.flag_type() in wanted:
            above = "" if least is None else f" from {least} on"
            return f"--{found[1]}={found[2]}: {wanted[kind.flag_type()]}{above}."
    if missing := re.fullmatch(r"Missing value for flag --?(\w+)", text):
        return f"--{missing[1]} has no value: give it as --{missing[1]}=..."
    if missing := re.fullmatch(r"--?(\w+)=.* does not take an argument", text):
        return f"--{missing[1]} takes no value: give --{missing[1]} alone."
    return text.removeprefix("flag ")


def _last_line(text: str) -> str:
    """Returns what was raised, of a traceback in a message.

    Other messages are returned as they are.
    """
    if "Traceback" not in text:
        return text
    return re.sub(r"^[\w.]*(Error|Exception): ", "", text.strip().splitlines()[-1])
