"""Beacon packs: a memory as one file.

A pack is a safetensors file, so its manifest can be read without its tensors:

    8 bytes      length of the header, little endian
    header       JSON: {"__metadata__": {...}, name: {dtype, shape, data_offsets}, ...}
    tensors      one behind the other, row-major, little endian

The metadata has `beacon_pack` (format version), `manifest` (JSON) and its checksum
`manifest_sha256`. The manifest:

    library      version of beacon_jax that wrote it
    model        base and beacon: hashes of the weights (null: not known)
                 config: every field of `ModelConfig`
    dtype        of keys and values
    rows         per row: tokens, slots, entries (slots and open window), raw and ratio
                 of the open window, windows, text_sha256 (of the token ids as int32;
                 null: they were not kept), tokens_stored; recent, if rows keep their
                 last full windows raw: own (ratio of the one that lies so, or null) and
                 fixed (windows in front that are never run again)
    biased       true, if slots have a bias
    tensors      name -> dtype, shape, sha256

Tensors, for B rows of L layers, K kv heads of H channels:

    state.k/b, state.v/b  [L, entries, K, H]  row b, its live entries only; if slots
                                              have a bias, state.k.entries/b
    state.k.bias/b        [L, K, entries]     the bias of each slot
    state.slots ...       [B]                 the counts of `core.memory.MemoryState`
    state.tokens          [B, W]              ids of the open window's tokens, 0 beyond
    state.recent ...      [B], [B, W]         `core.memory.Recent`, if there is one
    row.spans/b           [M, 2]              source tokens of each slot
    row.ratios/b          [M]                 ratio of each slot, 0: a raw entry
    row.marks/b           [P, 2]              (tokens, slots) behind each window
    row.tokens/b          [n]                 token ids, unless saved without

The header is exactly what `write_safetensors` makes of the manifest. The manifest has a
checksum of its own and those of the tensors, and leaves nothing out. So a change of any
bit of the file is found.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jax.sharding import Mesh

import beacon_jax
from beacon_jax import paths
from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState
from beacon_jax.forms import Count, unlike
from beacon_jax.hf.identify import Identity
from beacon_jax.hf.reader import ALL_DTYPES, BLOCK_BYTES, Tensor
from beacon_jax.hf.values import finite
from beacon_jax.hf.writer import DTYPE_NAMES, safetensors_header, write_safetensors
from beacon_jax.inference import leaves, validate
from beacon_jax.inference.compatible import (
    config_differences,
    identity_differences,
    other_model,
)
from beacon_jax.inference.finite import check_finite
from beacon_jax.inference.history import History
from beacon_jax.model.config import BeaconConfig, ModelConfig, RopeConfig
from beacon_jax.model.partition import Partition
from beacon_jax.names import short

if TYPE_CHECKING:
    from beacon_jax.inference.memory import Memory

VERSIONS = ("1", "2", "3")  # 2: rows keep their last full windows raw, 3: biases
_STATE = ("slots", "raw", "ratio", "windows")  # what a row is counted by on the device
DTYPES = frozenset({"float32", "bfloat16", "float16", "int8"})
_RECENT = {"own": (Count, None), "fixed": Count}
_ROW = {
    **dict.fromkeys(("tokens", "slots", "entries", "raw", "ratio", "windows"), Count),
    "text_sha256": (str, None),
    "tokens_stored": bool,
    "recent?": _RECENT,
}
_FORM = {
    "library": str,
    "model": {"base": (str, None), "beacon": (str, None), "config": {}},
    "dtype": DTYPES,
    "rows": [_ROW],
    "biased?": bool,
    "tensors": {str: {"dtype": str, "shape": [Count], "sha256": str}},
}
_MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it
_AGAIN = "Copy it again from where it was made, or compress the text again."


class PackError(ValueError):
    """A pack that cannot be used; names the file, what is wrong and what to do."""


class ModelLike(Protocol):
    """The part of a model that a pack is checked against."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def identity(self) -> Identity: ...


def save(
    memory: "Memory", path: str | Path, *, tokens: bool = True, overwrite: bool = False
) -> None:
    """Writes a memory as a pack, as a whole or not at all.

    Args:
      path: of the file, `.beacon` by custom.
      tokens: whether token ids are written, which `truncate` inside a window needs.
        Those of open windows (fewer than W per row) are always written, and those of
        last full windows that lie raw (W per row).
      overwrite: a file of that name is replaced when the new one is complete.

    Raises:
      TypeError: a path that is no text, or a switch that is not True or False.
      ValueError: tokens=False, and tokens are still to be fed; a path that is no file;
        or keys and values that are not finite.
      FileExistsError: the file exists, without `overwrite`.
    """
    validate.switch("tokens", tokens)
    validate.switch("overwrite", overwrite)
    target = paths.check_new(path, overwrite=overwrite, remedy="pass overwrite=True")
    rows = memory.rows
    stored = rows if tokens else tuple(row.forget_tokens() for row in rows)
    entries = memory.entries.tolist()
    parts = _parts(memory, entries, stored)
    tensors = {name: Tensor(part.shape, part.dtype) for name, part in parts.items()}
    blocks = lambda name: parts[name].blocks()
    manifest = {
        "library": beacon_jax.__version__,
        "model": {
            "base": memory.identity.base,
            "beacon": memory.identity.beacon,
            "config": _config_fields(memory.config),
        },
        "dtype": memory.dtype,
        "rows": [
            {
                "tokens": row.length,
                "slots": row.slots,
                "entries": entries[i],
                "raw": row.raw,
                "ratio": row.ratio,
                "windows": row.windows,
                "text_sha256": _text_hash(row),
                "tokens_stored": stored[i].tokens is not None,
                **_recent_fields(row),
            }
            for i, row in enumerate(rows)
        ],
        **({"biased": True} if memory.state.biased else {}),
        "tensors": {
            name: {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "sha256": _sha256(_numbers(blocks(name), memory.dtype)),
            }
            for name, tensor in tensors.items()
        },
    }
    has = {"recent": memory.recent, "biased": memory.state.biased}
    with paths.new_file(target) as partial:
        text = json.dumps(manifest, separators=(",", ":"))
        write_safetensors(partial, tensors, blocks, _metadata(text, has))


def read(
    path: str | Path,
    model: ModelLike | None = None,
    *,
    mesh: str | Mesh | Partition | None = None,
    allow_other_model: bool = False,
) -> tuple[ModelConfig, MemoryState, tuple[History, ...], Identity]:
    """Reads a pack, into the parts that `Memory.load` makes a memory of.

    Args:
      path: of the file.
      model: the model that is to continue the memory; None: nothing is checked.
      mesh: devices to spread the memory over by `partition.RULES`, as text
        ("tensor:8") or as a mesh, or a partition with other rules: rows over the data
        axes, kv heads over "tensor". An axis that they do not divide is whole on each
        device. None: those of the model, without one the first device.
      allow_other_model: use a pack that other weights wrote, as if the model had. The
        config has to fit.

    Returns:
      Config, state, rows and identity. All live entries are bit-identical, in a buffer
      of as many slots as `core.memory.buffer_size` says.

    Raises:
      TypeError: an argument of another type, or arguments in another order.
      PackError: a file that is no pack, is damaged, has another version or belongs to
        another model. Says which, and what to do.
      FileNotFoundError: no such file.
    """
    _check_arguments(path, model)
    validate.switch("allow_other_model", allow_other_model)
    partition = leaves.partition(mesh)
    pack = _Pack(Path(path))
    config = pack.config()
    known = pack.manifest["model"]
    identity = Identity(known["base"], known["beacon"])
    if model is not None:
        _check_model(pack.path, config, identity, model, allow_other_model)
        config, identity = model.config, model.identity
        partition = partition or getattr(model, "partition", None)
    rows = pack.manifest["rows"]
    pack.check_tensors(config)
    pack.verify()
    histories = tuple(_history(pack, i, row) for i, row in enumerate(rows))
    pack.check_rows(config, histories)
    state = leaves.build(
        config,
        [row["entries"] for row in rows],
        pack.manifest["dtype"],
        lambda name: pack.part(f"state.{name}"),
        partition,
        pack.has,
    )
    return config, state, histories, identity


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Returns the manifest of a pack, checked; its tensors are not read.

    Raises:
      PackError, FileNotFoundError: as `read`.
    """
    return _Pack(Path(paths.check_name(path))).manifest


def _check_arguments(path: Any, model: Any) -> None:
    """Raises TypeError unless this is the name of a file, and a model or None."""
    if hasattr(path, "config"):
        remedy = "give the file first, Memory.load(path, model)"
        if hasattr(path, "rows"):
            remedy = "it is a memory already, use it as it is"
        validate.is_a("path", path, str, remedy)
    paths.check_name(path)
    if model is None or (hasattr(model, "config") and hasattr(model, "identity")):
        return
    remedy = 'give what load("...") returned, or leave it out'
    if isinstance(model, str | os.PathLike):
        remedy = f"load it first, load({str(model)!r})"
    raise TypeError(
        f"model={validate.shown(model)} is of type {type(model).__name__}: {remedy}."
    )


def _parts(
    memory: "Memory", entries: list[int], rows: tuple[History, ...]
) -> dict[str, leaves.Part]:
    """Returns the tensors of a memory by name, in the order of the file.

    They are fetched from the devices one layer of a row at a time.
    """
    state = leaves.parts(memory.state, entries)
    found = {f"state.{name}": part for name, part in state.items()}
    for i, row in enumerate(rows):
        for name in ("spans", "ratios", "marks", "tokens"):
            if (values := getattr(row, name)) is not None:
                found[f"row.{name}/{i}"] = leaves.whole(np.asarray(values, np.int32))
    # Wide elements first, so that every tensor lies at a multiple of its own.
    return dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))


class _Pack:
    """A pack whose header has been checked; `verify` checks its tensors."""

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            raise PackError(f"{path} is a folder: give the pack's file.")
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: give the pack's file.")
        if not path.is_file():
            raise PackError(f"{path} is a device or pipe: give the pack's file.")
        header = self._header()
        text = self._manifest_text(header)
        self.manifest, self.has = self._parsed(text)
        self.tensors: dict[str, Tensor] = {}
        end = len(header)
        for name, info in self.manifest["tensors"].items():
            dtype = ALL_DTYPES.get(info["dtype"])
            if dtype is None or not name.isascii():
                raise self._damaged(f"it has no tensors such as {name!a}")
            self.tensors[name] = Tensor(tuple(info["shape"]), dtype, path.name, end)
            end += self.tensors[name].nbytes
        metadata = _metadata(text, self.has)
        if header != safetensors_header(self.tensors, metadata):
            raise self._damaged("its header is not the one that was written")
        size = path.stat().st_size
        if size != end:
            what = "truncated" if size < end else "too long"
            raise PackError(f"{path} is {what}: {size} bytes of {end}. {_AGAIN}")

    def _header(self) -> bytes:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(9)
            length = 8 + int.from_bytes(start[:8], "little")
            if len(start) < 9 or start[8:] != b"{" or length > _MOST_HEADER:
                raise self._no_pack("it does not begin like one")
            if length > size:
                raise PackError(
                    f"{self.path} is truncated, or no beacon pack: its header alone "
                    f"needs {length} bytes, the file has {size}. {_AGAIN}"
                )
            return start + file.read(length - len(start))

    def _parsed(self, text: str) -> tuple[dict[str, Any], dict[str, bool]]:
        """Returns the manifest, and whether its rows are "recent" and "biased"."""
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its manifest is no JSON ({error})") from error
        if wrong := unlike(manifest, _FORM, "manifest"):
            raise self._damaged(wrong)
        recent = {"recent" in row for row in manifest["rows"]}
        if len(recent) != 1:
            raise self._damaged("manifest.rows is empty, or of two kinds")
        biased = manifest.get("biased", False)
        return manifest, {"recent": recent.pop(), "biased": biased}

    def _manifest_text(self, header: bytes) -> str:
        """Returns the manifest, unchanged since this format version wrote it."""
        try:
            metadata = json.loads(header[8:])["__metadata__"]
            version, text = metadata["beacon_pack"], metadata["manifest"]
            checksum, found = metadata["manifest_sha256"], _text_sha256(text)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            said = short(repr(error))
            raise self._no_pack(f"its header has no manifest ({said})") from error
        if version not in VERSIONS:
            newer = re.fullmatch("[4-9]|[1-9][0-9]+", str(version))
            raise PackError(
                f"{self.path} has format version {short(str(version))}, this program "
                "reads "
                f"{' and '.join(VERSIONS)}: "
                + (
                    "install a newer beacon_jax, or compress the text again."
                    if newer
                    else "compress the text again."
                )
            )
        if checksum != found:
            raise self._damaged("its manifest does not have the checksum it was given")
        return text

    def config(self) -> ModelConfig:
        """Returns the config of the model that wrote the pack."""
        fields = dict(self.manifest["model"]["config"])
        try:
            rope, beacon = fields.pop("rope"), fields.pop("beacon")
            return ModelConfig(
                **fields,
                rope=RopeConfig(**rope),
                beacon=BeaconConfig(**beacon) if beacon else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PackError(
                f"{self.path} was written by beacon_jax {self.manifest['library']}, "
                f"whose model config is another one ({error}): install that version, "
                "or compress the text again."
            ) from error

    def check_tensors(self, config: ModelConfig) -> None:
        """Raises PackError unless the tensors are those of the config and the rows."""
        about, int32 = self.manifest["rows"], np.dtype(np.int32)
        live, dtype = [row["entries"] for row in about], self.manifest["dtype"]
        wanted = leaves.shapes(config, live, dtype, self.has)
        wanted = {f"state.{name}": what for name, what in wanted.items()}
        for i, row in enumerate(about):
            wanted[f"row.spans/{i}"] = (row["slots"], 2), int32
            wanted[f"row.ratios/{i}"] = (row["slots"],), int32
            wanted[f"row.marks/{i}"] = (row["windows"] + 1, 2), int32
            if row["tokens_stored"]:
                wanted[f"row.tokens/{i}"] = (row["tokens"],), int32
        found = {name: (x.shape, x.dtype) for name, x in self.tensors.items()}
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise self._damaged(f"tensor {name} does not fit the rest of it")

    def check_rows(self, config: ModelConfig, rows: tuple[History, ...]) -> None:
        """Raises PackError unless the manifest says of the rows what the tensors do."""
        state = {name: self.part(f"state.{name}").read(None) for name in _STATE}
        law, lies = Law.of(config), self.array("state.recent.length")
        for i, (row, about) in enumerate(zip(rows, self.manifest["rows"], strict=True)):
            slots, raw, ratio, windows = (int(state[name][i]) for name in _STATE)
            same = (
                about["slots"] == slots == row.marks[-1, 1],
                about["raw"] == raw < law.window,
                about["ratio"] == ratio or not raw,
                about["windows"] == windows,
                about["entries"] == slots + int(law.entries(ratio, raw)),
                about["tokens"] == row.length,
                not row.ratio or law.window % row.ratio == 0,
                lies is None or bool(lies[i]) == (row.own is not None),
                row.fixed <= row.windows,
            )
            if not all(same):
                raise self._damaged(f"its manifest counts row {i} otherwise than it is")

    def verify(self) -> None:
        """Compares all checksums, reading each byte once, BLOCK_BYTES at a time."""
        with self.path.open("rb") as file:
            for name, tensor in self.tensors.items():
                file.seek(tensor.offset)
                blocks = _file_blocks(file, tensor.nbytes)
                if _sha256(blocks) != self.manifest["tensors"][name]["sha256"]:
                    raise self._damaged(f"tensor {name} does not have its checksum")

    def part(self, name: str) -> leaves.Part:
        """Returns a tensor, mapped from the file while it is read."""
        tensor = self.tensors[name]
        read = functools.partial(_map, self.path, tensor)
        return leaves.Part(tensor.shape, tensor.dtype, read)

    def array(self, name: str) -> np.ndarray | None:
        """Reads a tensor into memory; None if the pack does not have it."""
        return np.array(self.part(name).read(None)) if name in self.tensors else None

    def _damaged(self, what: str) -> PackError:
        return PackError(f"{self.path} is damaged: {what}. {_AGAIN}")

    def _no_pack(self, what: str) -> PackError:
        return PackError(
            f"{self.path} is not a beacon pack, or damaged: {what}. Give a file that "
            "memory.save wrote, or compress the text again."
        )


def _history(pack: _Pack, row: int, about: Mapping[str, Any]) -> History:
    """Reads the history of a row; `about` is what the manifest says of it."""
    get = lambda name: pack.array(f"row.{name}/{row}")
    spans, ratios, marks = get("spans"), get("ratios"), get("marks")
    assert spans is not None and ratios is not None and marks is not None
    fed = int(marks[-1, 0]) + about["raw"]
    kept = pack.has["recent"]
    recent = {name: about["recent"][name] for name in _RECENT} if kept else {}
    return History(
        spans,
        ratios,
        marks,
        fed,
        get("tokens"),
        about["ratio"],
        recent=kept,
        **recent,
    )


def _check_model(
    path: Path,
    config: ModelConfig,
    identity: Identity,
    model: ModelLike,
    allow_other: bool,
) -> None:
    """Raises PackError, with the differences, if a model cannot continue a pack."""
    found = config_differences(config, model.config)
    remedy = "Load the model that wrote it, or compress the text again."
    if not found and not allow_other:
        found = identity_differences(identity, model.identity)
        remedy = (
            "Load the model that wrote it, compress the text again, or pass "
            "allow_other_model=True if you know that they are the same."
        )
    if found:
        raise PackError(f"{path} {other_model(found, 'pack')}\n{remedy}")


def _recent_fields(row: History) -> dict[str, Any]:
    """Returns what the manifest says of a row that keeps its last full window raw."""
    if not row.recent:
        return {}
    return {"recent": {"own": row.own, "fixed": row.fixed}}


def _metadata(manifest: str, has: Mapping[str, bool]) -> dict[str, str]:
    version = 2 if has["biased"] else int(has["recent"])
    return {
        "beacon_pack": VERSIONS[version],
        "manifest": manifest,
        "manifest_sha256": _text_sha256(manifest),
    }


def _config_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns a config as JSON; what earlier versions do not know is left out."""
    fields = dataclasses.asdict(config)
    for name in config.beacon.unset() if config.beacon else ():
        del fields["beacon"][name]
    return fields


def _text_hash(row: History) -> str | None:
    """Hashes a row's token ids, int32 little endian; None: they were not kept."""
    if row.tokens is None:
        return None
    return _sha256([np.asarray(row.tokens, "<i4")])


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(blocks: Iterable[np.ndarray], dtype: str) -> Iterator[np.ndarray]:
    """Passes blocks through; ValueError for floating-point ones that are not finite."""
    for block in blocks:
        if block.dtype.kind not in "iub" and not finite(block):
            check_finite(np.zeros((1, 1), bool), "keys and values", dtype)
        yield block


def _sha256(blocks: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _file_blocks(file: Any, nbytes: int) -> Iterator[np.ndarray]:
    block = np.empty(min(nbytes, BLOCK_BYTES), np.uint8)
    while nbytes > 0:
        count = file.readinto(block[: min(nbytes, len(block))].data)
        yield block[:count]
        nbytes -= count or nbytes  # a file that shrinks meanwhile fails its checksum


def _map(path: Path, tensor: Tensor, layer: int | None = None) -> np.ndarray:
    """Maps a tensor, or one layer of it, until the array is dropped."""
    shape, offset = tensor.shape, tensor.offset
    if layer is not None:
        shape = shape[1:]
        offset += layer * (tensor.nbytes // tensor.shape[0])
    if 0 in shape:  # nothing can be mapped at no length
        return np.zeros(shape, tensor.dtype)
    return np.memmap(path, tensor.dtype, "r", offset, shape)
