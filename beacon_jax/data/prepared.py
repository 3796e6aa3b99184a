"""A prepared folder: tokenised examples with random access, and what made them.

  shard-00000-of-00012.array_record ...  the examples (`encode`), in order
  index.npy      length, source and hash of every example (INDEX), in the same order
  manifest.json  format, settings (tokenizer hash, rules, sources), counts, drops, the
                 largest token id
  dropped.jsonl  where and why rows were left out, the first `DROPPED_LINES` bad ones
  .stamps.json   what is known of the files of the sources (`contents`); may be missing

manifest.json is written last: a folder without it is not finished. Lengths of all
examples are known from the index, without reading one of them.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from beacon_jax.data.examples import Example
from beacon_jax.forms import Count, unlike
from beacon_jax.paths import check_fetched, read_object, whole_file

FORMAT = 1
INDEX = np.dtype([("length", "<i4"), ("source", "<i2"), ("hash", "<u8")])
DROPPED_LINES = 10_000
COUNTS = ("rows", "examples", "tokens", "labelled", "cut")
# Forms of what is counted; earlier versions did not count all of it.
_SUMS = {**dict.fromkeys(COUNTS[:-1], Count), "cut?": Count}
_DROP = {"rows": Count, "tokens?": Count, "bad": bool, "first": [str]}
SETTINGS = {
    "tokenizer": str,
    "rules": {"min_length": Count, "max_length": Count},
    "sources": [{"uri": str, "bytes?": Count, "sha256?": str}],
}
_FORM = {
    "settings": SETTINGS,
    "total": _SUMS,
    "sources": [{"uri": str, **_SUMS, "drops": {str: _DROP}, "unread?": {str: Count}}],
    "shards": [{"name": str, "examples": Count}],
}
_AGAIN = "copy it again, or prepare it again with --overwrite"


def encode(example: Example) -> bytes:
    """Returns an example as bytes.

    They are n as int32, the tokens as int32 [n], and a bit per token: whether it is
    labelled. All of it is little endian.
    """
    tokens = np.ascontiguousarray(example.tokens, "<i4")
    head = np.asarray([len(tokens)], "<i4")
    bits = np.packbits(np.asarray(example.labelled, bool), bitorder="little")
    return head.tobytes() + tokens.tobytes() + bits.tobytes()


def decode(data: bytes) -> Example:
    """Returns the example of which `encode` made these bytes.

    Raises:
      ValueError: the bytes are not one example.
    """
    n = int(np.frombuffer(data, "<i4", 1)[0]) if len(data) >= 4 else -1
    if n < 0 or len(data) != 4 + 4 * n + (n + 7) // 8:
        raise ValueError(f"{len(data)} bytes are not an example of {n} tokens")
    tokens = np.frombuffer(data, "<i4", n, 4).astype(np.int32)
    bits = np.frombuffer(data, np.uint8, offset=4 + 4 * n)
    return Example(tokens, np.unpackbits(bits, count=n, bitorder="little").astype(bool))


def example_hash(data: bytes) -> int:
    """Returns the uint64 hash of an encoded example: equal examples have equal ones."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def shard_name(index: int, count: int) -> str:
    """Returns the file name of shard `index`, from 0, of `count`."""
    return f"shard-{index:05}-of-{count:05}.array_record"


class _Shard(NamedTuple):
    """The description of a file for array_record: its protocol `FileInstruction`."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Prepared:
    """The examples of a finished folder.

    Attributes:
      folder: where the examples are.
      manifest: the content of manifest.json.
      lengths: int32 [n], tokens of every example.
      sources: int16 [n], number of the source of every example.
      hashes: uint64 [n], hash of every example.
    """

    def __init__(self, folder: str | Path):
        """Opens the folder and reads its index.

        Raises:
          FileNotFoundError: the folder is not prepared, or misses a file.
          ValueError: it has another format, or files that do not belong together.
        """
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(
                f"prepared={self.folder} holds no manifest.json: prepare it with "
                "`python -m beacon_jax.data.prepare`, which also goes on with a folder "
                "that is not finished."
            )
        self.manifest: dict[str, Any] = manifest
        index = read_index(self._file("index.npy"))
        self._shards = [
            _Shard(str(self._file(shard["name"])), 0, n, n)
            for shard in manifest["shards"]
            if (n := shard["examples"])
        ]
        stored, total = sum(shard.take for shard in self._shards), manifest["total"]
        known = np.isin(index["source"], range(len(self.uris)))
        if (
            not len(index) == stored == total["examples"]
            or index["length"].sum() != total["tokens"]
            or not ((index["length"] > 0) & known).all()
        ):
            raise ValueError(
                f"prepared={self.folder}: index.npy does not fit the shards of "
                f"{stored} examples and the counts of manifest.json: {_AGAIN}."
            )
        self.lengths = index["length"].copy()
        self.sources = index["source"].copy()
        self.hashes = index["hash"].copy()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def uris(self) -> list[str]:
        """URIs of the sources, by their numbers."""
        return [source["uri"] for source in self.manifest["settings"]["sources"]]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all examples in their order: equal ones give equal batches."""
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self.sources.tobytes())
        digest.update(self.hashes.tobytes())
        return digest.hexdigest()

    @cached_property
    def largest_id(self) -> int:
        """The largest token id; read from all examples if the manifest lacks it."""
        known = self.manifest.get("largest_id")
        if known is None:  # of an earlier version
            known = max(int(self.read(i).tokens.max()) for i in range(len(self)))
        return known

    def read(self, index: int) -> Example:
        """Reads one example; safe to call from several threads.

        Raises:
          ValueError: its bytes are not those that were written.
        """
        try:
            data = self._records[index]
            if example_hash(data) != self.hashes[index]:
                raise ValueError("it is another one than index.npy has")
            example, size = decode(data), self.lengths[index]
            if len(example.tokens) != size:
                raise ValueError(
                    f"it has {len(example.tokens)} tokens, index.npy says {size}"
                )
            return example
        except (RuntimeError, ValueError, IndexError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"prepared={self.folder}: example {index} is damaged ({said[:200]}): "
                f"{_AGAIN}."
            ) from None

    def rows_of(self, source: int) -> Int[np.ndarray, " n"]:
        """Returns the numbers of the examples of one source."""
        return np.flatnonzero(self.sources == source)

    @cached_property
    def _records(self) -> Any:
        from array_record.python import array_record_data_source

        shards: Any = self._shards
        return array_record_data_source.ArrayRecordDataSource(shards)

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if Path(name).name != name or not path.is_file():
            raise FileNotFoundError(
                f"prepared={self.folder} has a manifest.json but no file {name}: it "
                f"was copied in part; {_AGAIN}."
            )
        return path


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the content of manifest.json, or None if the folder is not finished.

    Raises:
      ValueError: it is of another format, or not as it was written.
    """
    path = folder / "manifest.json"
    if not path.exists() and not path.is_symlink():
        return None
    if not path.is_file():
        raise ValueError(f"{path} is no file: {_AGAIN}.")
    manifest = read_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"prepared={folder} has format {manifest.get('format')!r:.60}, this "
            f"version reads {FORMAT}: prepare it again with --overwrite."
        )
    if wrong := unlike(manifest, _FORM, "manifest"):
        raise ValueError(f"{path} is damaged, {wrong}: {_AGAIN}.")
    return manifest


def read_index(path: Path) -> np.ndarray:
    """Returns the index INDEX [n] of a folder or a shard.

    Raises:
      ValueError: the file is none.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: {_AGAIN}.")
    check_fetched(path)
    try:
        with path.open("rb") as file:  # np.load would take a zip or a pickle, too
            index = np.lib.format.read_array(file, allow_pickle=False)
        if index.dtype != INDEX or index.ndim != 1:
            raise ValueError(f"it holds {index.dtype} {list(index.shape)}")
    except Exception as error:  # numpy parses its header as Python
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is no index of examples ({said}): {_AGAIN}."
        ) from None
    return index


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, all of the file or nothing."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())
