"""Converts an HF folder to a converted folder and back, as streams.

A converted folder holds `params.safetensors` (and `beacon.safetensors`) with our names
and stacked shapes, config.json and the tokenizer files as they were, and the manifest
`beacon_jax.json`: hashes, and which HF tensor was in which file. Host memory never
holds more than one HF tensor and a few blocks of 16 MB, whatever the model's size.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from beacon_jax.forms import Count, unlike
from beacon_jax.gguf.file import is_gguf
from beacon_jax.hf import gguf, relatives
from beacon_jax.hf.hashing import TreeHash
from beacon_jax.hf.keys import (
    EMBEDDING,
    LM_HEAD,
    Entry,
    beacon_part,
    foreign_beacon,
    resolve,
    table,
)
from beacon_jax.hf.placement import put_blocks, read_parts
from beacon_jax.hf.reader import (
    BLOCK_BYTES,
    DTYPES,
    Reader,
    RenamedReader,
    SafetensorsReader,
    Tensor,
    TorchReader,
    aligned_empty,
    open_hf,
    row_blocks,
)
from beacon_jax.hf.shards import is_below
from beacon_jax.hf.values import Values
from beacon_jax.hf.writer import (
    MANIFEST,
    copy_small_files,
    new_folder,
    write_config,
    write_safetensors,
)
from beacon_jax.model import config_keys
from beacon_jax.model.beacon import beacon_token
from beacon_jax.model.config import ModelConfig
from beacon_jax.names import check_choice
from beacon_jax.paths import is_there, read_object
from beacon_jax.progress import Progress

type HfReader = SafetensorsReader | TorchReader | gguf.GgufReader | RenamedReader

VERSION = 1
# Of the manifest, beside its version.
_FORM = {
    "base_hash": str,
    "beacon_hash": (str, None),
    "dtype": (frozenset(d.name for d in DTYPES.values()), None),
    "ignore_sliding_window": bool,
    "beacon_from_base": [frozenset(("embed", "q", "k", "v", "o"))],
    "files": {str: {"metadata": ({str: str}, None), "tensors": [str]}},
    "index": (str, None),
}


def from_hf(
    src: Path,
    dst: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    ignore_sliding_window: bool = False,
    strip_prefix: str | None = None,
) -> None:
    """Converts the HF folder `src` into a new folder `dst`, cast to `dtype` if given.

    Args:
      strip_prefix: what tensors' names have in front, as "module." (`open_weights`).

    Raises:
      ValueError: config or tensors do not fit; the message lists them.
      FileExistsError: `dst` is not empty.
      FileNotFoundError: no config.json or weights.
    """
    src, dst = Path(src), Path(dst)
    _check_different(src, dst)
    hf = read_config(src)
    config = model_config(src, ignore_sliding_window=ignore_sliding_window)
    config_keys.warn_unknown(hf)
    with Progress().stage("looking at the tensors"):
        reader = open_weights(src, strip_prefix)
        source = HfSource(config, reader, check_dtype(dtype), where=src)
    if absent := [e.keys[0] for e in table(config) if e.name not in source.tensors]:
        raise ValueError(
            f"config.json has beacon_rank={hf.get('beacon_rank')}, but the checkpoint "
            f"has no {absent[0]}: remove beacon_rank, or add the tensors."
        )
    hashes = {"params": TreeHash(), "beacon": TreeHash()}

    def blocks(name: str) -> Iterable[np.ndarray]:
        part, path = name.split("/", 1)
        tensor, pieces = source.tensors[name], source.blocks(name)
        return hashes[part].add(path, tensor.shape, tensor.dtype, pieces)

    with (
        new_folder(dst, overwrite=overwrite) as folder,
        Progress().stage("converting", "MB") as stage,
    ):
        stage.begin(0, sum(t.nbytes for t in source.tensors.values()) / 1e6)
        copy_small_files(src, folder)
        for part in hashes:
            tensors = {k: t for k, t in source.tensors.items() if k.startswith(part)}
            if tensors:
                path = folder / f"{part}.safetensors"
                write_safetensors(path, tensors, blocks, stage=stage)
        has_beacon = config.beacon is not None
        manifest = {
            "format": "beacon_jax",
            "version": VERSION,
            "base_hash": hashes["params"].hexdigest(),
            "beacon_hash": hashes["beacon"].hexdigest() if has_beacon else None,
            "dtype": dtype,
            "ignore_sliding_window": ignore_sliding_window,
            "beacon_from_base": source.from_base,
            **_original_files(src, reader, config, dtype),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    source.say()


def to_hf(src: Path, dst: Path, *, overwrite: bool = False) -> None:
    """Writes the HF folder that the converted folder `src` was made of.

    The same tensors are in the same files, bit-identical unless --dtype was given. A
    pytorch_model.bin comes back as model.safetensors.
    """
    src, dst = Path(src), Path(dst)
    _check_different(src, dst)
    manifest = read_manifest(src)
    config = model_config(src, ignore_sliding_window=True)
    ConvertedSource(config, src)  # all tensors are there, in their shapes
    reader = open_converted(src)
    files = {
        name: (spec["tensors"], spec["metadata"])
        for name, spec in manifest["files"].items()
    }
    _check_files(src / MANIFEST, config, manifest, reader)
    with new_folder(dst, overwrite=overwrite) as folder:
        copy_small_files(src, folder)
        write_hf_weights(folder, config, reader, files)
        index = folder / "model.safetensors.index.json"
        if manifest["index"] is not None:
            index.write_text(manifest["index"])
        elif list(files) != ["model.safetensors"]:
            write_index(index, files)
        if manifest["dtype"] is not None:
            hf = read_config(folder)
            key = "dtype" if "dtype" in hf else "torch_dtype"
            write_config(folder, hf | {key: manifest["dtype"]})


class Source:
    """Our tensors, as read from the files of a folder and cast.

    Attributes:
      tensors: shape and dtype of each by our name.
      values: looks at what is read.
      from_base: the parts of the beacons that are copies of the base (`keys.resolve`).
    """

    tensors: dict[str, Tensor]
    from_base: list[str]
    values: Values

    def blocks(self, name: str) -> Iterator[Any]:
        """Yields the bytes of one of our tensors in order, in pieces, already cast."""
        raise NotImplementedError

    def array(self, name: str) -> np.ndarray:
        """Returns one of our tensors as a whole."""
        result = aligned_empty(self.tensors[name].shape, self.tensors[name].dtype)
        flat, at = result.reshape(-1), 0
        for piece in self.blocks(name):
            flat[at : at + piece.size] = piece.reshape(-1)
            at += piece.size
        return result

    def put(self, name: str, dtype: Any, sharding: Any) -> jax.Array:
        """Returns one of our tensors in the shards of a mesh."""
        tensor, blocks = self.tensors[name], self.blocks(name)
        if dtype != tensor.dtype:
            blocks = self.values.cast(name, blocks, dtype)
        return put_blocks(tensor.shape, dtype, sharding, blocks)

    def say(self) -> None:
        """Says in lines of warning what was wrong with the values that were read."""
        self.values.say()

    def hashes(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        """Returns those hashes of what was loaded, "base" and "beacon", that are known.

        Args:
          leaves: the loaded tensors by our names.
        """
        return {}


class ConvertedSource(Source):
    """The tensors of a converted folder, but those that are copies of the base.

    They are made again, since the settings of the beacons may have changed.
    """

    def __init__(
        self, config: ModelConfig, folder: Path, dtype: np.dtype | None = None
    ):
        self._manifest, self._reader = read_manifest(folder), open_converted(folder)
        self.values = Values(folder)
        self.from_base = self._manifest["beacon_from_base"]
        stored = {
            name: tensor
            for name, tensor in self._reader.tensors.items()
            if beacon_part(name) not in self.from_base
        }
        expected = {e.name: e.shape for e in table(config)}
        absent = [n for n in expected if n not in stored]
        self._complete = not absent
        problems = [f"missing: {n}" for n in absent if n.startswith("params/")]
        problems += [foreign_beacon(config, n) for n in stored if n not in expected]
        problems += [
            f"wrong shape: {n} is {list(stored[n].shape)}, config.json says "
            f"{list(shape)}"
            for n, shape in expected.items()
            if n in stored and stored[n].shape != shape
        ]
        if problems:
            raise ValueError(
                f"{folder} does not fit its config:\n  " + "\n  ".join(problems)
            )
        self.tensors = {
            n: Tensor(stored[n].shape, dtype or stored[n].dtype)
            for n in expected
            if n in stored
        }

    def blocks(self, name: str) -> Iterator[Any]:
        return self._cast(name, row_blocks(self._reader, name))

    def array(self, name: str) -> np.ndarray:
        if self.tensors[name].dtype != self._reader.tensors[name].dtype:
            return super().array(name)
        stored = self._reader.read(name)  # which a CPU device uses without a copy
        for _ in self._cast(name, [stored]):
            pass
        return stored

    def _cast(self, name: str, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Casts a tensor; where it is one of all layers, each by itself."""
        dtype = self.tensors[name].dtype
        if "/layers/" not in name:
            yield from self.values.cast(name, blocks, dtype)
            return
        for number, layer in enumerate(itertools.chain.from_iterable(blocks)):
            yield from self.values.cast(f"{name}[{number}]", [layer], dtype)

    def put(self, name: str, dtype: Any, sharding: Any) -> jax.Array:
        return read_parts(self._reader, name, dtype, sharding)

    def hashes(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        stored = self._reader.tensors
        if any(x.dtype != stored[name].dtype for name, x in leaves.items()):
            return {}
        hashes = {"base": self._manifest["base_hash"]}
        if self._complete and self._manifest["beacon_hash"]:
            hashes["beacon"] = self._manifest["beacon_hash"]
        return hashes


class HfSource(Source):
    """Our tensors, as made of those of an HF checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        reader: Reader,
        dtype: np.dtype | None = None,
        *,
        quiet: bool = False,
        only: str = "",
        where: Path,
    ):
        self.values = Values(where)
        found = {name: tensor.shape for name, tensor in reader.tensors.items()}
        entries, self.from_base = resolve(config, found, quiet=quiet, only=only)
        self._reader, self._config = reader, config
        self._by_name = {e.name: e for e in entries}
        self.tensors = {
            e.name: Tensor(e.shape, dtype or self._dtype(e)) for e in entries
        }
        if config.tie_embeddings and {LM_HEAD, EMBEDDING} <= found.keys():
            self._check_tied()

    def blocks(self, name: str) -> Iterator[Any]:
        entry, dtype = self._by_name[name], self.tensors[name].dtype
        for key in entry.keys:
            if name == "beacon/embed/embedding" and "embed" in self.from_base:
                token = beacon_token(self._config)
                pieces = iter([self._reader.read(key, token, token + 1)])
                key = f"{key}[{token}]"
            elif entry.linear:
                pieces = transposed_blocks(self._reader.read(key))
            else:
                pieces = row_blocks(self._reader, key)
            yield from self.values.cast(key, pieces, dtype)

    def _dtype(self, entry: Entry) -> np.dtype:
        tensors = self._reader.tensors
        dtypes = {tensors[k].dtype for k in entry.keys}
        if len(dtypes) > 1:
            raise ValueError(
                f"{entry.keys[0]} and the same tensor of other layers have different "
                f"dtypes {sorted(d.name for d in dtypes)}: pass --dtype to cast all."
            )
        return dtypes.pop()

    def _check_tied(self) -> None:
        pairs = zip(
            row_blocks(self._reader, EMBEDDING),
            row_blocks(self._reader, LM_HEAD),
            strict=True,
        )
        if not all(np.array_equal(a, b) for a, b in pairs):
            raise ValueError(
                f"{LM_HEAD} differs from {EMBEDDING} although config.json has "
                "tie_word_embeddings=true: set it to false, or remove the tensor."
            )


def open_source(
    config: ModelConfig,
    folder: Path,
    dtype: np.dtype | None = None,
    *,
    quiet: bool = False,
    strip_prefix: str | None = None,
) -> Source:
    """Opens the weights of a folder or a GGUF file, to be cast to `dtype`.

    Args:
      quiet: no warning about beacons that start from the base.
      strip_prefix: as in `open_weights`; a converted folder has none.
    """
    if is_converted(folder):
        return ConvertedSource(config, folder, dtype)
    reader = open_weights(folder, strip_prefix)
    try:
        return HfSource(config, reader, dtype, quiet=quiet, where=folder)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def open_weights(path: Path, strip_prefix: str | None = None) -> HfReader:
    """Opens the weights of an HF folder or of a GGUF file, under their HF names.

    Args:
      strip_prefix: what is left out in front of tensors' names and of their parts,
        "module." or "module.,_orig_mod."; names that lack `model.` get it, also with
        "". None: names are as they are.

    Raises:
      ValueError: no tensor's name has it.
    """
    reader = gguf.GgufReader(path) if is_gguf(path) else open_hf(path)
    return reader if strip_prefix is None else RenamedReader(reader, strip_prefix)


def write_hf_weights(
    folder: Path,
    config: ModelConfig,
    reader: Reader,
    files: Mapping[str, tuple[list[str], Mapping[str, str] | None]],
) -> None:
    """Writes the files of an HF folder from our tensors.

    Args:
      reader: our tensors.
      files: file name -> (HF keys in order, metadata of the file).
    """
    where = {k: (e, i) for e in table(config) for i, k in enumerate(e.keys)}
    if config.tie_embeddings:
        where[LM_HEAD] = where[EMBEDDING]
    tensors = {
        key: Tensor(where[key][0].hf_shape, reader.tensors[where[key][0].name].dtype)
        for keys, _ in files.values()
        for key in keys
    }

    def blocks(key: str) -> Iterator[np.ndarray]:
        entry, layer = where[key]
        if entry.linear:
            rows = (layer, layer + 1) if entry.stacked else (0, None)
            ours = reader.read(entry.name, *rows)
            yield from transposed_blocks(ours.reshape(entry.hf_shape[::-1]))
        elif entry.stacked:
            yield reader.read(entry.name, layer, layer + 1)
        else:
            yield from row_blocks(reader, entry.name)

    with Progress().stage("writing", "MB") as stage:
        stage.begin(0, sum(t.nbytes for t in tensors.values()) / 1e6)
        for name, (keys, metadata) in files.items():
            chosen = {key: tensors[key] for key in keys}
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(folder / name, chosen, blocks, metadata, stage)


def write_index(path: Path, files: Iterable[str]) -> None:
    """Writes model.safetensors.index.json for files beside it, or below its folder."""
    folder = path.parent
    reader = SafetensorsReader([folder / name for name in files], folder)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in reader.tensors.values())},
        "weight_map": {key: t.file for key, t in sorted(reader.tensors.items())},
    }
    path.write_text(json.dumps(index, indent=2) + "\n")


def transposed_blocks(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the rows of `matrix.T` in contiguous pieces of about BLOCK_BYTES."""
    # Integers of the same width: numpy copies bfloat16 one element at a time. 64 rows
    # at a time stay in the cache: 1180 MB/s on one core, 300 when copied at once.
    bits = matrix.view(f"u{matrix.itemsize}")
    rows, columns = matrix.shape
    step = max(1, BLOCK_BYTES * columns // max(matrix.nbytes, 1))
    for start in range(0, columns, step):
        source = bits[:, start : start + step].T
        block = np.empty(source.shape, source.dtype)
        for row in range(0, rows, 64):
            block[:, row : row + 64] = source[:, row : row + 64]
        yield block.view(matrix.dtype)


def open_converted(folder: Path) -> SafetensorsReader:
    """Opens our tensors in a converted folder, named "params/..." and "beacon/..."."""
    parts = {"base_hash": "params", "beacon_hash": "beacon"}
    manifest = read_manifest(folder)
    files = [folder / f"{parts[x]}.safetensors" for x in parts if manifest[x]]
    for path in files:
        if not is_there(path):
            raise FileNotFoundError(f"{path} is not there: convert the model again.")
    return SafetensorsReader(files, folder)


def is_converted(folder: Path) -> bool:
    """Tells whether a folder holds a converted checkpoint."""
    return is_there(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the content of beacon_jax.json.

    Raises:
      FileNotFoundError: the folder is not a converted checkpoint.
      ValueError: it has another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(
            f"--src={folder} is not a converted checkpoint (no {MANIFEST}): make one "
            "with `python -m beacon_jax.convert from-hf`."
        )
    manifest = read_object(path, {"version": Count})
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{path} has version {manifest['version']}, this program reads {VERSION}: "
            "convert the HF checkpoint again."
        )
    if wrong := unlike(manifest, _FORM, str(path)):
        raise ValueError(f"{wrong}: convert the model again.")
    if bad := [name for name in manifest["files"] if not is_below(name)]:
        raise ValueError(
            f"{path} has files={bad}, no names of files in a folder: convert the model "
            "again."
        )
    return manifest


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json, or what it would be for a GGUF file.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is no JSON object, or the GGUF file is not supported.
    """
    if is_gguf(folder):
        return gguf.config(folder)
    path = folder / "config.json"
    if not is_there(path):
        said = relatives.of_folder(folder)
        raise FileNotFoundError(
            f"{path} is not there: give a folder on this machine with config.json and "
            f"weights (download a checkpoint first). {said}".rstrip()
        )
    hf = read_object(path)
    if "architectures" not in hf and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} is the --workdir of a training run, no model: give "
            f"{folder / 'export'}, or what `convert to-hf --src={folder}` writes."
        )
    return hf


def model_config(folder: Path, *, ignore_sliding_window: bool = False) -> ModelConfig:
    """Returns the config of a folder's or a GGUF file's model.

    Raises:
      FileNotFoundError, ValueError: as `read_config`, or it is not supported; the
        message names the folder.
    """
    hf = read_config(folder)
    try:
        return ModelConfig.from_hf(hf, ignore_sliding_window=ignore_sliding_window)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def check_dtype(dtype: str | None) -> np.dtype | None:
    """Returns the dtype of that name; None: none is asked for."""
    if dtype is None:
        return None
    check_choice("dtype", dtype, [d.name for d in DTYPES.values() if d.itemsize < 8])
    return np.dtype(dtype)


def _check_different(src: Path, dst: Path) -> None:
    if src.resolve() == dst.resolve():
        raise ValueError(f"--src and --dst are the same folder {src}: use another.")
    if dst.resolve() in src.resolve().parents:
        raise ValueError(f"--src={src} lies in --dst={dst}: use another --dst.")


def _check_files(
    path: Path, config: ModelConfig, manifest: Mapping[str, Any], reader: Reader
) -> None:
    """Raises ValueError unless a manifest's files have each tensor once."""
    listed = [k for file in manifest["files"].values() for k in file["tensors"]]
    needed = {
        key
        for e in table(config)
        if e.name in reader.tensors
        and beacon_part(e.name) not in manifest["beacon_from_base"]
        for key in e.keys
    }
    # Of tied embeddings there may be both names, or one of them.
    free = {LM_HEAD} if config.tie_embeddings else set()
    free |= {EMBEDDING} if free & {*listed} else set()
    wrong = sorted((set(listed) ^ needed) - free)
    if wrong or len(set(listed)) < len(listed):
        raise ValueError(
            f"{path}: its files do not have each tensor of the model once"
            f"{f' ({wrong[0]})' if wrong else ''}: convert the model again."
        )


def _original_files(
    src: Path, reader: Any, config: ModelConfig, dtype: str | None
) -> dict[str, Any]:
    """Returns what `to_hf` needs to write the same files again."""
    known = {key for e in table(config) for key in e.keys} | {LM_HEAD}
    files: dict[str, Any] = {}
    for name, metadata in reader.metadata.items():
        keys = [k for k, t in reader.tensors.items() if t.file == name and k in known]
        new = name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        files[new] = {"metadata": metadata, "tensors": keys}
    index = src / "model.safetensors.index.json"
    # With other sizes or keys (inv_freq is dropped) the index must be made anew.
    same = dtype is None and set(reader.tensors) <= known and index.exists()
    # Nor is it that of a single file, or of names with a prefix.
    same = same and read_object(index)["weight_map"] == {
        key: tensor.file for key, tensor in reader.tensors.items()
    }
    return {"files": files, "index": index.read_text() if same else None}
