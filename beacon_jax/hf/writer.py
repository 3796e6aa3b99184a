"""Writes safetensors files as streams and folders as a whole or not at all."""

import contextlib
import fcntl
import fnmatch
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.gguf.file import is_gguf
from beacon_jax.hf import gguf, shards
from beacon_jax.hf.reader import ALL_DTYPES, Tensor
from beacon_jax.paths import (
    check_fetched,
    check_name,
    named_when_full,
    partial_prefix,
)
from beacon_jax.progress import Stage
from beacon_jax.resources import (
    TOKENIZER_FILES,
    has_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

logger = logging.getLogger(__name__)

MANIFEST = "beacon_jax.json"
_MARK = "beacon_jax.lock"  # in a folder that is being written
DTYPE_NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}
# As "tokenizer.", so that tokenizer.model.v3 is one, too.
# What a converted folder has of the other files of a model: these names, code that
# config.json may name (auto_map), and further chat templates.
_SMALL = (
    "config.json",
    "generation_config.json",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "tokenizer.model.v*",
    "additional_chat_templates/*.jinja",
)
SMALL_BYTES = 16 << 20  # of each, but for the tokenizer's: that of Gemma has 33 MB
# What readers take as weights of a folder, beside numbered files.
_WEIGHTS_READ = (
    *shards.STEMS.values(),
    *("beacons.safetensors", "beacon.safetensors", "params.safetensors", MANIFEST),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def safetensors_header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Returns everything in front of the tensors' bytes.

    It is what the safetensors library writes (compact JSON, padded to 8), so that a
    file read and written again is the same file.
    """
    header: dict[str, object] = {}
    if metadata is not None:  # an empty one is kept, too
        header["__metadata__"] = metadata
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    blocks: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    stage: Stage | None = None,
) -> None:
    """Writes tensors one after the other, each as the blocks of its bytes.

    The library writes only what is in memory as a whole: of Llama-2-7B, 13 GB.

    Args:
      stage: is told the megabytes that were written.
    """
    with path.open("wb") as file:
        file.write(safetensors_header(tensors, metadata))
        for name, tensor in tensors.items():
            start = file.tell()
            for block in blocks(name):
                file.write(np.ascontiguousarray(block).view(np.uint8).data)
                if stage is not None:
                    stage.add(block.nbytes / 1e6)
            assert file.tell() - start == tensor.nbytes, name
        file.flush()
        os.fsync(file.fileno())


def copy_small_files(src: Path, dst: Path, *, card: bool = True) -> None:
    """Copies config.json, the tokenizer's files, the model's card, licence and code.

    Nothing else is copied, and what is left behind is named in one line, but for
    weights, indices, the manifest and hidden files. Of a GGUF file, config.json and the
    files of the tokenizer are written.

    Args:
      card: whether README.md is copied, and a word said of what is left behind; not if
        dst is another model.
    """
    if is_gguf(src):
        write_config(dst, gguf.config(src))
        if has_tokenizer(src):
            copy_tokenizer(src, dst)
    behind = []
    for path in sorted(src.rglob("*")):
        relative = path.relative_to(src)
        hidden = any(part.startswith(".") for part in relative.parts)
        left = path.name == "README.md" and not card
        if path.is_dir() or hidden or left or _holds_weights(path):
            continue
        if _is_copied(path, str(relative)):
            (dst / relative).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, dst / relative)
        else:
            behind.append(str(relative))
    if behind and card:
        more = f" and {len(behind) - 8} more" if len(behind) > 8 else ""
        logger.warning(
            "not copied from %s, since a model does not need them: %s%s",
            *(src, ", ".join(behind[:8]), more),
        )


def _is_copied(path: Path, relative: str) -> bool:
    """Tells whether a file is a small one that belongs to a model, or a tokenizer's."""
    if relative in TOKENIZER_FILES:
        return True
    known = any(fnmatch.fnmatchcase(relative, pattern) for pattern in _SMALL)
    return known and (not path.exists() or path.stat().st_size <= SMALL_BYTES)


def _copy(path: Path, to: Path) -> None:
    """Copies a file; ValueError if a pointer of git-lfs or a link stands for it."""
    check_fetched(path)
    shutil.copyfile(path, to)


def write_config(folder: Path, hf: Mapping[str, Any]) -> None:
    """Writes config.json with sorted keys."""
    (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Copies the tokenizer's files and nothing else, even if src is a whole model."""
    if is_gguf(src):
        return save_tokenizer(load_tokenizer(src), dst)
    for path in sorted(src.iterdir()):
        if path.name in TOKENIZER_FILES:
            _copy(path, dst / path.name)


def check_new(dst: Path, *, overwrite: bool, keep: bool = False) -> bool:
    """Returns whether something is at `dst` that a new checkpoint may replace.

    Args:
      keep: as in `new_folder`.

    Raises:
      FileExistsError: something is there that it may not replace.
      ValueError: no folder can have this name.
    """
    check_name(dst, "--dst")
    used = dst.exists() and (not dst.is_dir() or any(dst.iterdir()))
    if used and not overwrite:
        raise FileExistsError(
            f"--dst={dst} exists and is not empty: pass --overwrite to replace it, or "
            "choose another folder."
        )
    if used and not (dst / "config.json").exists():
        raise FileExistsError(
            f"--dst={dst} is not a checkpoint (no config.json) and is not overwritten: "
            "choose another folder."
        )
    if used and not keep and (others := _others(dst)):
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise FileExistsError(
            f"--dst={dst} holds more than a checkpoint, which is not overwritten "
            f"({', '.join(others[:4])}{more}): move that away, or choose another "
            "folder."
        )
    return used


def _others(folder: Path) -> list[str]:
    """Lists the files of a folder that are of no checkpoint."""
    found, weights = [], _of_checkpoint(folder)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        own = name in weights or _is_copied(path, name)
        if not (path.is_dir() or own):
            found.append(name)
    return found


def _of_checkpoint(folder: Path) -> set[str]:
    """Returns the names of a checkpoint's weights, indices and manifest in a folder.

    They are those that a reader takes, and those that an index names. Other weights, as
    of an optimiser or in another format, are somebody's own.
    """
    found: set[str] = set()
    for path in folder.iterdir():
        if path.name in _WEIGHTS_READ or shards.numbered([path.name]):
            found.add(path.name)
        if path.name.endswith(".index.json"):
            found.add(path.name)
            with contextlib.suppress(ValueError):
                found.update(shards.weight_map(path).values())
    return found


@contextlib.contextmanager
def new_folder(dst: Path, *, overwrite: bool, keep: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `dst` when the block ends without an error.

    It is made in a folder `.NAME.*.partial` beside `dst`, whose name nobody else has.
    What a killed process leaves of it is never half a checkpoint, and goes with the
    next run. With `overwrite` the old folder stays until the new is whole.

    Args:
      keep: the old folder is of the same model, so that its files which are no weights
        and have no new version, such as notes of the user, move to the new folder.
    """
    used = check_new(dst, overwrite=overwrite, keep=keep)
    given = f"--dst={dst}"
    dst = dst.resolve()  # a link stays one, and what it names is replaced
    with _workplace(dst) as place:
        new, old = place / "new", place / "old"
        with named_when_full(given):
            new.mkdir()
            yield new
        if used:
            dst.rename(old)
        try:
            new.rename(dst)
        except OSError:
            if used:
                old.rename(dst)
            raise
        if used and keep:
            _keep_others(old, dst)
        shutil.rmtree(place)


@contextlib.contextmanager
def _workplace(dst: Path) -> Iterator[Path]:
    """Makes a folder beside `dst`; an error removes it, but for an old checkpoint."""
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(".partial", partial_prefix(dst), dst.parent))
    except OSError as error:
        raise OSError(
            f"--dst={dst} cannot be written ({error.strerror}): use another folder."
        ) from error
    with (place / "mark").open("w") as mark:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (place / "mark").rename(place / _MARK)  # it never has this name without a lock
        _remove_left(dst)
        try:
            yield place
        finally:
            if not (place / "old").exists():
                shutil.rmtree(place, ignore_errors=True)


def _remove_left(dst: Path) -> None:
    """Removes what killed processes left beside `dst`, if they had not moved `dst`.

    It is known by a file that a process locks as long as it lives.
    """
    for place in dst.parent.glob(f"{glob.escape(partial_prefix(dst))}*.partial"):
        try:
            mark = (place / _MARK).open("r+")
        except OSError:  # not ours
            continue
        with mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if (place / "old").exists():
                logger.warning(
                    "%s has what was at %s before a run was killed: move it back, or "
                    "delete it.",
                    *(place / "old", dst),
                )
            else:
                shutil.rmtree(place, ignore_errors=True)


def _keep_others(old: Path, new: Path) -> None:
    """Moves files to `new` that are no weights of `old` and have no new version."""
    weights = _of_checkpoint(old)
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        target = new / name
        if path.is_file() and not (str(name) in weights or target.exists()):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def _holds_weights(path: Path) -> bool:
    """Tells whether a file is one of weights, their index, or the manifest."""
    return path.name == MANIFEST or path.name.endswith((*_WEIGHTS, ".index.json"))
