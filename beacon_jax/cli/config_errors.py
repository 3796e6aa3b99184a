"""Says what is wrong with --config and --config.KEY=VALUE, in one line.

ml_collections answers with Python's own messages, of which some name neither the key
nor what it takes.
"""

import contextlib
import re
import runpy
from collections.abc import Iterator, Sequence
from typing import Any

from beacon_jax.names import meant, nearest

# Ends of ml_collections' messages about a value, and what the key takes.
WANTED = (
    ("could not convert string to float", "a number"),
    ("invalid literal for int()", "a whole number"),
    ("Non-boolean argument", "True or False"),
    ("as a ConfigDict", "a group of keys"),
)


def of_value(text: str) -> str:
    """Rewrites ml_collections' message about a value; others are returned as they are.

    Args:
      text: "flag --config.KEY=VALUE: Python's message".
    """
    found = re.match(r"flag --(config\.[\w.]+)=", text)
    for end, wanted in WANTED:
        at = text.find(end)
        if not found or at < 0:
            continue
        # The message begins after the last ": " in front of what is known of it.
        value = text[found.end() : text.rfind(": ", 0, at)]
        given = f"--{found[1]}={value}"
        if wanted == "a group of keys":
            return f"{given}: it is a group of keys; set one: --{found[1]}.KEY=VALUE."
        return f"{given}: the value must be {wanted}."
    return text


def of_argument(text: str) -> str:
    """Names --config in the message of a config file about its argument."""
    found = re.match(r"(\w+):(\S+) is unknown: (.*)", text)
    if not found:
        return text if text.startswith("--config") else f"--config: {text}"
    near = meant(found[2], re.findall(r":(\w+)", found[3]))
    return f"--config={found[1]}:{found[2]} is unknown: {near}{found[3]}"


def of_key(missing: str, words: Sequence[str]) -> str:
    """Says which key does not exist, and which one may be meant.

    Args:
      missing: the part of it that was not found.
      words: of the command line, the path of --config in place of its name.
    """
    keys, given = [], missing
    for word in words:
        if word.startswith("--config="):
            keys = list(_keys(word.partition("=")[2]))
        found = re.match(r"--?config\.([\w.]+)", word)
        if found and missing in found[1].split(".") and found[1] not in keys:
            given = found[1]
    last = given.split(".")[-1]
    same = [key for key in keys if key.split(".")[-1] == last]
    if len(same) > 1:  # the nearest of them, as stages.stage3 for stages.stage9
        same = [nearest(given, same) or same[0]]
    near = same[0] if same else nearest(given, keys)
    if not near:
        ends = {key.split(".")[-1]: key for key in keys}
        near = ends.get(nearest(last, ends), "")
    hint = f"did you mean --config.{near}? " if near else ""
    return f"--config.{given}: no such key; {hint}--config=NAME --help lists them."


def _keys(name: str) -> Iterator[str]:
    """Yields the keys of a config as it is without the flags' changes."""
    path, _, argument = name.partition(":")
    with contextlib.suppress(Exception):  # it was read before, so it is no error here
        made = runpy.run_path(path)["get_config"](argument)
        yield from (key for key, _ in flat(made))


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted names of all keys, and their values."""
    for key in config:
        value = config[key]
        if hasattr(value, "keys") and len(value):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
