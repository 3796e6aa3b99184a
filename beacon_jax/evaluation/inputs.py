"""What tasks are made of: settings, held-out text, haystacks, the user's data sets."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.data.fields import decoded
from beacon_jax.data.readers import UNREAD, Bad, Value, read
from beacon_jax.data.sources import open_parts
from beacon_jax.data.text import load_documents
from beacon_jax.data.tokenizer import encode_stream
from beacon_jax.names import meant

ENDINGS = (".jsonl", ".json", ".parquet")
CHATS = ("auto", "none")
STOPS = ("paper", "official")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Settings that decide every example and prediction, besides model and method.

    Attributes:
      lengths: tokens of an example, answer included.
      depths: places of the needle, evenly over [0, 1].
      samples: examples per task and length.
      text: source of held-out text (`data.text`), which is also the haystack unless
      haystack: names a source whose files are all used.
      data: folder of the user's data sets; "" if there is none.
      max_length: tokens that a text of a data set is cut to, from its middle.
      newline_stop: where LongBench's answers end at a line's end: "paper" (as in the
        release: all QA tasks and samsum) or "official" (samsum only).
      chat: "auto" wraps questions in the tokenizer's chat template if it has one.
      limit: only so many examples per task and length.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: int = 5
    samples: int = 128
    text: str = "stdlib"
    haystack: str = ""
    data: str = ""
    max_length: int = 31_500
    newline_stop: str = "paper"
    chat: str = "auto"
    seed: int = 0
    limit: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be >= 1.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit={self.limit} must be >= 1; leave it out.")
        if not self.lengths:
            raise ValueError("--lengths is empty: give for example 256,512,1024.")
        for name, known in (("chat", CHATS), ("newline_stop", STOPS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"--{name}={getattr(self, name)} is unknown: "
                    f"{meant(getattr(self, name), known)}use one of "
                    f"{', '.join(known)}."
                )


class TaskData:
    """Texts and rows of one run, read when they are first asked for.

    Attributes:
      skipped: rows that could not be used, as (file, row from 1, reason).
    """

    def __init__(self, settings: RunSettings, tokenizer: Any):
        self.settings, self.tokenizer = settings, tokenizer
        self.skipped: list[tuple[str, int, str]] = []

    @functools.cached_property
    def documents(self) -> list[str]:
        """The held-out documents of --text."""
        return load_documents(self.settings.text, "heldout")

    @functools.cached_property
    def stream(self) -> np.ndarray:
        """The tokens of the documents, int32 [n], with end tokens between them."""
        return encode_stream(self.documents, self.tokenizer)

    @functools.cached_property
    def haystack(self) -> list[str]:
        """Documents to hide things in: all of --haystack, else the held-out ones."""
        source = self.settings.haystack
        return load_documents(source, "all") if source else self.documents

    def rows(
        self,
        name: str,
        fields: dict[str, type | tuple[type, ...]],
        where: str,
        check: Callable[[dict[str, Any]], str | None] | None = None,
    ) -> list[dict[str, Any]]:
        """The rows of a file of the user, in its order.

        Args:
          name: file in --data without its ending, such as "longbench/qasper".
          fields: that a row must have, and their types.
          where: where it is published, for the message if it is not there.
          check: what else is wrong with a row that has the fields, None if nothing is.

        Raises:
          FileNotFoundError: no --data, or no such file in it.
          ValueError: not one usable row.
        """
        file = self._file(name, where)
        rows, number = [], 0
        for part in open_parts([str(file)]):
            for number, value in read(part):
                row = _parsed(value)
                reason = row if isinstance(row, str) else _wrong(row, fields)
                if check and not reason and isinstance(row, dict):
                    reason = check(row)
                if reason:
                    self.skip(file.name, number, reason)
                elif isinstance(row, dict):
                    rows.append(row)
        if not rows:
            raise ValueError(
                f"{file} has {number} rows and none with the fields "
                f"{', '.join(fields)}: it should be the file that {where} publishes."
            )
        return rows

    def skip(self, file: str, row: int, reason: str) -> None:
        """Notes a row that a task cannot use."""
        if (file, row, reason) not in self.skipped:
            self.skipped.append((file, row, reason))

    def _file(self, name: str, where: str) -> Path:
        folder = self.settings.data
        wanted = f"{name}{ENDINGS[0]} (or {', '.join(ENDINGS[1:])}), from {where}"
        if not folder:
            raise FileNotFoundError(
                f"--data is not given: put {wanted}, into a folder and name it."
            )
        for end in ENDINGS:
            file = Path(folder).expanduser() / f"{name}{end}"
            if file.is_file():
                return file
        raise FileNotFoundError(f"--data={folder} has no {wanted}: put it there.")


def _parsed(value: Value) -> dict[str, Any] | str:
    """A row, or what is wrong with it."""
    if isinstance(value, Bad):
        return value.reason
    if isinstance(value, bytes):
        return decoded(value)
    if isinstance(value, dict):
        return {name: cell for name, cell in value.items() if cell is not UNREAD}
    return "not an object"


def _wrong(
    row: dict[str, Any], fields: dict[str, type | tuple[type, ...]]
) -> str | None:
    missing: Collection[str] = [name for name in fields if name not in row]
    if missing:
        return f"no {', '.join(missing)}"
    wrong = [n for n, kind in fields.items() if not isinstance(row[n], kind)]
    return f"{', '.join(wrong)} of a wrong type" if wrong else None
