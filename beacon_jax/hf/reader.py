"""Reads tensors, or rows of them, from files without holding more than was asked for.

Files are not mapped. Mapped pages count as resident memory until they are dropped, so a
140 GB checkpoint would look like (and be limited as) 140 GB.
"""

import dataclasses
import functools
import importlib.util
import json
import logging
import math
import pickle
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from beacon_jax.forms import Count, unlike
from beacon_jax.hf import relatives, shards
from beacon_jax.hf.keys import flatten, is_buffer
from beacon_jax.hf.prefixes import stripped
from beacon_jax.names import short
from beacon_jax.paths import check_fetched, is_there, parse_object

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes
METADATA = "__metadata__"
MOST_HEADER = 100_000_000  # bytes, as the library has it
_HEADER = {str: {"dtype": str, "shape": [Count], "data_offsets": [Count]}}
BLOCK_BYTES = 16 << 20  # what is transposed, cast, hashed and written at a time
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What buffers may have, which are read by nobody (`keys.is_buffer`).
_BUFFERS = {
    "BOOL": np.dtype(np.bool_),
    **{
        f"{k}{n}": np.dtype(f"{k.lower()}{n // 8}")
        for k in "IU"
        for n in (8, 16, 32, 64)
    },
}
# What files that are no checkpoints may have, too.
ALL_DTYPES = DTYPES | {
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: where it is and what it is."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str = ""
    offset: int = 0  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an empty array that starts where XLA wants it.

    A CPU device uses such an array without a copy.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)


class Reader(Protocol):
    """Interface to tensors by name."""

    tensors: dict[str, Tensor]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns the rows start:stop of axis 0."""
        raise NotImplementedError


def row_blocks(reader: Reader, name: str) -> Iterator[np.ndarray]:
    """Yields the rows of a tensor in pieces of about BLOCK_BYTES."""
    tensor = reader.tensors[name]
    rows = max(1, BLOCK_BYTES * tensor.shape[0] // max(tensor.nbytes, 1))
    for start in range(0, tensor.shape[0], rows):
        yield reader.read(name, start, min(start + rows, tensor.shape[0]))


class SafetensorsReader:
    """The tensors of one or several safetensors files, all headers checked.

    The library reads the headers. The bytes are read at offsets, since the library maps
    a file: of 1 GiB in blocks of 16 MB, an open one keeps 1,056 MB resident, one that
    is opened anew for every block 50 MB in 0.20 s (two cores, page cache), and `read`
    takes 32 MB and 0.15 s, at addresses that a CPU device uses without a copy.

    Args:
      files: in the folder, or below it.
    """

    def __init__(self, files: list[Path], folder: Path):
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, dict[str, str] | None] = {}
        self._paths = {path.relative_to(folder).as_posix(): path for path in files}
        for file, path in self._paths.items():
            with _opened(path) as opened:
                slices = {k: opened.get_slice(k) for k in opened.offset_keys()}
            # Parsed once more: no name is there twice, and the metadata have their
            # order, which the library forgets.
            text = _header(path)
            header = parse_object(text, f"the header of {path}")
            self.metadata[file] = header.get(METADATA)
            _check_new(self.tensors, slices, path)
            for name, part in slices.items():
                shape = tuple(part.get_shape())
                dtype = _dtype(path, name, shape, part.get_dtype())
                offset = 8 + len(text) + header[name]["data_offsets"][0]
                self.tensors[name] = Tensor(shape, dtype, file, offset)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        tensor = self.tensors[name]
        rows = range(*slice(start, stop).indices(tensor.shape[0]))
        values = aligned_empty((len(rows), *tensor.shape[1:]), tensor.dtype)
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        path = self._paths[tensor.file]
        with path.open("rb") as file:
            file.seek(tensor.offset + start * row)
            if file.readinto(values.reshape(-1).view(np.uint8)) < values.nbytes:
                raise ValueError(f"{path} became shorter while it was read.")
        return values

    def read_columns(self, name: str, row: int, start: int, stop: int) -> np.ndarray:
        """Reads [start:stop] of axis 1 of one row, and no other bytes."""
        tensor = self.tensors[name]
        inner = math.prod(tensor.shape[2:])
        first = (row * tensor.shape[1] + start) * inner * tensor.dtype.itemsize
        return np.fromfile(
            self._paths[tensor.file],
            tensor.dtype,
            (stop - start) * inner,
            offset=tensor.offset + first,
        ).reshape(stop - start, *tensor.shape[2:])


def _check_new(
    tensors: Mapping[str, Tensor], names: Collection[str], path: Path
) -> None:
    """Raises ValueError for tensors of a file that another file has, too."""
    twice = next((name for name in names if name in tensors), None)
    if twice is None:
        return
    other = tensors[twice].file
    if {name for name, x in tensors.items() if x.file == other} == set(names):
        raise ValueError(
            f"{path} has the same tensors as {other}, so that one of them is a copy of "
            "the other under its name: download both again."
        )
    raise ValueError(
        f"tensor {twice} is in {other} and in {path.name} of {path.parent}, which are "
        "of two versions of a model or of two models: download both again, or remove "
        "the one that is not of this model."
    )


def _dtype(path: Path, name: str, shape: tuple[int, ...], kind: str) -> np.dtype:
    """Returns the dtype of that name, "F32" or "BOOL".

    Raises:
      ValueError: no weight has it, and the tensor is not known as a buffer.
    """
    if kind in DTYPES:
        return DTYPES[kind]
    if kind in _BUFFERS and is_buffer(name, shape):
        return _BUFFERS[kind]
    if said := relatives.of_tensors([name]):
        raise ValueError(f"{path}: {said}")
    said = f"{path}: tensor {name} has dtype {kind}, only {', '.join(DTYPES)} are "
    if kind in _BUFFERS and not name.endswith((".weight", "_proj.bias")):
        raise ValueError(
            f"{said}supported for weights, and it is no buffer that is known: if the "
            "model computes the same without it, remove it from the file."
        )
    raise ValueError(f"{said}supported: use an unquantized checkpoint.")


def _opened(path: Path) -> safe_open:
    """Opens a safetensors file with the library, which checks its header.

    Raises:
      ValueError: the header or the length of the file is wrong.
    """
    check_fetched(path)
    try:
        return safe_open(path, "numpy")
    except SafetensorError as error:
        raise ValueError(_fault(path, error)) from error


def _header(path: Path) -> bytes:
    """Reads the JSON in front of the tensors."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _fault(path: Path, error: Exception) -> str:
    """Says what is wrong with a file that the library refuses."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > MOST_HEADER:
            return f"{path} is not a safetensors file: {error}. Download it again."
        if actual < start:
            return (
                f"{path} is truncated: its header alone needs {start} bytes, the file "
                f"has {actual}. Download it again."
            )
        try:
            header = json.loads(file.read(start - 8))
        except (ValueError, RecursionError) as fault:
            return f"{path} is not a safetensors file: {fault}. Download it again."
    if isinstance(header, dict):
        header.pop(METADATA, None)
    said = unlike(header, _HEADER, "its header")
    if not said and any(len(x["data_offsets"]) != 2 for x in header.values()):
        said = "its header has a tensor without two data_offsets"
    if said:
        return f"{path} is not a safetensors file: {said}. Download it again."
    expected = start + max((x["data_offsets"][1] for x in header.values()), default=0)
    if actual == expected:
        return f"{path} is corrupt: {error}. Download it again."
    return (
        f"{path} is {'truncated' if actual < expected else 'too long'}: its header "
        f"announces {expected} bytes, the file has {actual}. Download it again."
    )


class TorchReader:
    """The tensors of pytorch_model*.bin files.

    A file is mapped only while it is read, so that the pages of earlier tensors do not
    stay resident.
    """

    def __init__(self, files: list[Path], folder: Path):
        if importlib.util.find_spec("torch") is None:
            raise ImportError(
                f"{files[0].parent} has only {files[0].name}, and reading it needs "
                "torch: install it (pip install torch), or use a checkpoint in the "
                "safetensors format."
            )
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, dict[str, str] | None] = {}
        self._paths = {path.relative_to(folder).as_posix(): path for path in files}
        kinds = {dtype.name: kind for kind, dtype in (DTYPES | _BUFFERS).items()}
        for file, path in self._paths.items():
            check_fetched(path)
            self.metadata[file] = {"format": "pt"}
            loaded = self._load(file)
            _check_new(self.tensors, loaded, path)
            for name, value in loaded.items():
                kind, shape = (
                    str(value.dtype).removeprefix("torch."),
                    tuple(value.shape),
                )
                dtype = _dtype(path, name, shape, kinds.get(kind, kind))
                self.tensors[name] = Tensor(shape, dtype, file)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        import torch  # pyright: ignore[reportMissingImports]

        tensor = self.tensors[name]
        value = self._load(tensor.file)[name][start:stop].contiguous()
        if value.dtype == torch.bfloat16:  # numpy itself has no such type
            return value.view(torch.int16).numpy().view(tensor.dtype).copy()
        return value.numpy().copy()

    def _load(self, file: str) -> dict[str, Any]:
        import torch  # pyright: ignore[reportMissingImports]

        path = self._paths[file]
        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} cannot be read by torch ({type(error).__name__}: "
                f"{short(str(error))}): download it again, or save the model in the "
                "safetensors format (save_pretrained)."
            ) from error
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor)
            for name, value in found.items()
        ):
            raise ValueError(
                f"{path} does not hold tensors by name alone: save the model's "
                "state_dict(), or its folder (save_pretrained)."
            )
        return found


class RenamedReader:
    """The tensors of a reader under their names without prefixes.

    Raises:
      ValueError: no name changes, or two tensors get one name.
    """

    def __init__(self, reader: Any, strip_prefix: str):
        self._reader: Reader = reader
        self._old: dict[str, str] = {}
        for old in reader.tensors:
            new = stripped(old, strip_prefix)
            if new in self._old:
                raise ValueError(
                    f"strip_prefix={strip_prefix!r} makes {new} of two tensors, "
                    f"{self._old[new]} and {old}: remove one of them."
                )
            self._old[new] = old
        if all(new == old for new, old in self._old.items()):
            first = next(iter(self._old), "none")
            raise ValueError(
                f"strip_prefix={strip_prefix!r} changes no tensor's name (the first "
                f"is {first}): leave it out."
            )
        self.tensors = {new: reader.tensors[old] for new, old in self._old.items()}
        self.metadata = reader.metadata

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._reader.read(self._old[name], start, stop)


class TreeReader:
    """Our tensors in memory (numpy or jax arrays), fetched slice by slice."""

    def __init__(self, tree: Mapping[str, Any]):
        self._leaves = dict(flatten(tree))
        self.tensors = {
            name: Tensor(tuple(x.shape), np.dtype(x.dtype))
            for name, x in self._leaves.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        part = self._leaves[name][start:stop]
        if not getattr(part, "is_fully_addressable", True):  # spread over processes
            from jax.experimental import multihost_utils

            part = multihost_utils.process_allgather(part, tiled=True)
        return np.asarray(part)


def open_hf(folder: Path) -> SafetensorsReader | TorchReader:
    """Opens the weights of an HF folder: safetensors, else pytorch_model.bin.

    A single file with all tensors of an index beside it is read in place of those that
    the index names, as transformers does. Numbered files that are all there need no
    index.
    """
    if (folder / relatives.PEFT).is_file():
        _warn_once(
            f"{folder} has an adapter of PEFT ({relatives.PEFT}) beside what is read, "
            "which is not applied: merge it (merge_and_unload), or delete it if the "
            "weights have it already."
        )
    makes = {"safetensors": SafetensorsReader, "bin": TorchReader}
    for kind, make in makes.items():
        single = folder / shards.STEMS[kind]
        index = single.with_name(f"{single.name}.index.json")
        if is_there(single) and is_there(index):
            reader = make([single], folder)
            if why := _stale(index, single.name, reader.tensors):
                _warn_once(f"{single} is read, not what {index} names: {why}")
                return reader
        if is_there(index):
            return _open_indexed(index, make)
        if is_there(single):
            return make([single], folder)
        if files := shards.complete(folder, kind):
            _warn_once(
                f"{folder} has no {index.name}: all {len(files)} files from "
                f"{files[0].name} to {files[-1].name} are read, which are complete."
            )
            return make(files, folder)
    raise FileNotFoundError(
        f"{folder} has no weights: expected model.safetensors, "
        "model.safetensors.index.json or pytorch_model.bin. "
        f"{relatives.of_folder(folder)}".rstrip()
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _stale(index: Path, single: str, tensors: Mapping[str, Tensor]) -> str:
    """Says why a single file is read and not those of an index; "" if it is not."""
    try:
        weight_map = shards.weight_map(index)
    except ValueError as error:
        return str(error)
    files = sorted(set(weight_map.values()))
    if absent := [name for name in files if not (index.parent / name).exists()]:
        return f"it is of another version, there is no {', '.join(absent)}."
    if files != [single] and weight_map.keys() <= tensors.keys():
        return "those files have no other tensors."
    return ""


def _open_indexed(
    index: Path, make: type[SafetensorsReader] | type[TorchReader]
) -> SafetensorsReader | TorchReader:
    """Opens the files that an index names."""
    weight_map = shards.weight_map(index)
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if not files:
        raise ValueError(f"{index} names no tensors: download it again.")
    if absent := [path.name for path in files if not path.exists()]:
        raise ValueError(
            f"{index} names files that are not there: {', '.join(absent)}. Download "
            "them again."
        )
    reader = make(files, index.parent)
    wrong = [
        f"{key} (in {file})"
        for key, file in weight_map.items()
        if key not in reader.tensors or reader.tensors[key].file != file
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"{index} names tensors that the files do not have: "
            f"{', '.join(wrong[:8])}{more}. Download the index and the files again."
        )
    return reader
