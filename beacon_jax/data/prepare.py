"""Tokenises sources once: text and conversations become a prepared folder.

`beacon_jax.cli.prepare` tells users what is read and how a run goes on.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.data.contents import Contents
from beacon_jax.data.examples import Rules
from beacon_jax.data.prepared import (
    FORMAT,
    SETTINGS,
    Prepared,
    read_index,
    read_manifest,
    write_json,
)
from beacon_jax.data.shards import (
    STOP,
    Job,
    ShardProgress,
    Worker,
    run_job,
    start_worker,
)
from beacon_jax.data.sources import Piece, open_parts, reading, source_files
from beacon_jax.data.tally import Tally, clock
from beacon_jax.forms import unlike
from beacon_jax.gguf.file import Header, is_gguf
from beacon_jax.paths import FULL, read_object, whole_file
from beacon_jax.resources import TOKENIZER_FILES, load_tokenizer
from beacon_jax.tokenise import check_ids

SHARD_BYTES = 16 * 2**20  # of the sources: parts are put together until they have it
SUBSET_SEED = 42  # of `file[COUNT]`, as in the release
SHARDS = "shard-*-of-*.array_record"
# Files that a run makes again: what a killed one leaves of them, and all.
PARTIAL = (
    ".shard-*.partial",
    ".index.npy.*.partial",
    ".dropped.jsonl.*.partial",
    ".manifest.json.*.partial",
    ".unfinished.json.*.partial",
)
BYTES = ("utf-8", "backslashreplace")  # a file's name may be no text
_UNFINISHED = "unfinished.json"  # the settings of a run that has not finished
MADE = (SHARDS, "shard-*-of-*.index.npy", "shard-*-of-*.json", "index.npy")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The sources and rules that a prepared folder is made with.

    Attributes:
      sources: URIs (`data.sources`).
      tokenizer: folder of the tokenizer.
      rules: which rows become examples (`data.examples`).
      root: what `long-llm:` URIs are relative to.
      vocab_size: rows of the embedding of the model that is to be trained: a token
        beyond is an error. None: there is no such model. No part of what a folder is
        known by, because it changes no byte of it.
    """

    sources: tuple[str, ...]
    tokenizer: str
    rules: Rules = dataclasses.field(default_factory=Rules)
    root: str = ""
    vocab_size: int | None = None

    @classmethod
    def of(
        cls, data: Any, tokenizer: str | Path, vocab_size: int | None = None
    ) -> "Preparation":
        """Makes the settings from config.data."""
        rules = Rules(**{f.name: data[f.name] for f in dataclasses.fields(Rules)})
        return cls(tuple(data.sources), str(tokenizer), rules, data.root, vocab_size)


def prepare(
    settings: Preparation,
    folder: str | Path,
    *,
    workers: int = 0,
    max_drop_fraction: float = 0.05,
    overwrite: bool = False,
    show: Callable[[str], None] | None = None,
) -> Prepared:
    """Tokenises everything into `folder`, or finishes what an interrupted run left.

    Does nothing if the folder is finished and made with these settings. Processes
    tokenise parts of the sources and write one shard after another; the result does not
    depend on their number. The processes are spawned, so a script that calls this needs
    `if __name__ == "__main__":`.

    Args:
      workers: processes; 0: one per core; 1, or a single shard: this process.
      max_drop_fraction: the share of bad rows (unreadable or malformed; not those that
        are too short or too long) above which the run stops with a table of reasons. It
        stops early if the share is exceeded among the first rows.
      overwrite: whether a folder made with other settings is replaced.
      show: receives progress lines; nothing is shown if not given.

    Raises:
      ValueError: no sources, other settings (all of them named), too many bad rows,
        nothing left, or a token that the model has no embedding of.
      FileNotFoundError: a source or the tokenizer does not exist.
    """
    if not settings.sources:
        raise ValueError(
            "data.sources=() is empty: name files, folders or datasets, as in "
            "--config.data.sources='books/*.jsonl'."
        )
    if not 0.0 <= max_drop_fraction <= 1.0:
        raise ValueError(
            f"data.max_drop_fraction={max_drop_fraction} is a share of the rows: use a "
            "number from 0 to 1."
        )
    if workers < 0:
        raise ValueError(f"data.workers={workers} must be at least 0 (one per core).")
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker that imports the script would wait for the lock of its parent.
        raise RuntimeError(
            "prepare() or train() is called when the script is imported, as every "
            'worker process does: put the call under `if __name__ == "__main__":`.'
        )
    folder = Path(folder).expanduser()
    show = show or (lambda line: None)
    done = finished(settings, folder, overwrite=overwrite)
    if done is not None and not (folder / _UNFINISHED).exists():
        return _checked(done, settings)  # without writing: the folder may be read-only
    _check_apart(settings, folder)
    _check_others(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with _full_disk(folder), _lock(folder, show):
        done = finished(settings, folder, overwrite=overwrite)
        if done is not None:
            _clean(folder)
            return _checked(done, settings)
        contents = _contents(settings, folder)
        identity = _identity(settings, contents)
        _begin(folder, identity, overwrite)
        contents.save()
        parts = open_parts(
            settings.sources,
            settings.root,
            seed=SUBSET_SEED,
            heldout=settings.rules.heldout,
        )
        jobs = _jobs(parts, folder)
        tally = Tally(settings.sources, max_drop_fraction)
        began = time.monotonic()
        _run(settings, jobs, workers, tally, show)
        tally.check(final=True)
        now = _contents(settings, folder)
        if now.sources != contents.sources:
            raise ValueError(
                f"data.sources={list(settings.sources)} changed while they were "
                f"prepared{_named(now.changed)}: wait until they are written, and "
                "prepare them again with --overwrite."
            )
        now.save()
        _finish(folder, identity, jobs, tally)
        seconds = max(time.monotonic() - began, 1e-9)
        total = tally.total()
        show(
            f"prepared {total['examples']:,} examples, {total['tokens']:,} tokens in "
            f"{folder} ({clock(seconds)})"
        )
    return _checked(Prepared(folder), settings)


def finished(
    settings: Preparation, folder: Path, *, overwrite: bool = False
) -> Prepared | None:
    """Returns the folder's data if finished and made with these settings, else None.

    The sources themselves need not be there any more: their content is compared if they
    are (`data.contents`); with a folder of an earlier version, their sizes.

    Raises:
      ValueError, FileNotFoundError: the folder was made with other settings or is
        damaged, and `overwrite` is not given.
    """
    try:
        return _finished(settings, folder)
    except (ValueError, FileNotFoundError):
        if overwrite:
            return None
        raise


def _finished(settings: Preparation, folder: Path) -> Prepared | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    made = _of_now(manifest["settings"])
    wanted = _identity(settings, None)
    bare = {**made, "sources": [{"uri": s["uri"]} for s in made["sources"]]}
    changed, files = differences(bare, wanted), []
    if not changed:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            contents = _contents(settings, folder)
            changed = _changes(made, _identity(settings, contents))
            files = contents.changed
    if changed:
        raise ValueError(_refusal(folder, changed, files))
    return Prepared(folder)


def _checked(data: Prepared, settings: Preparation) -> Prepared:
    """Returns the data; ValueError if it has a token that the model has no row for.

    A folder may have been prepared before, for another model.
    """
    size = settings.vocab_size
    if size is not None and data.largest_id >= size:
        tokenizer = load_tokenizer(settings.tokenizer)
        check_ids(data.largest_id, size, f"prepared={data.folder}", tokenizer)
    return data


def tokenizer_hash(folder: str | Path) -> str:
    """Returns the sha256 of a tokenizer's files and their names, or of a GGUF file's.

    Raises:
      FileNotFoundError: the folder has none of them.
    """
    digest, found = hashlib.sha256(), False
    if is_gguf(Path(folder)):
        for data in Header(Path(folder)).raw("tokenizer."):
            found = True
            digest.update(f"{len(data)}:".encode() + data)
    for name in TOKENIZER_FILES:
        path = Path(folder) / name
        if path.exists():
            found = True
            data = path.read_bytes()
            digest.update(f"{name}:{len(data)}:".encode() + data)
    if not found:
        raise FileNotFoundError(
            f"tokenizer={folder} has no tokenizer files (tokenizer.json, ...): set "
            "tokenizer.path, or init_from to a folder that has them."
        )
    return digest.hexdigest()


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Returns every setting in which two identities differ, as "name: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            inner = f"{name}.{key}" if name else key
            found += differences(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = []
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            found += differences(a, b, f"{name}[{i}]")
        return found
    hashed = name == "tokenizer" or name.endswith("sha256")
    short = lambda x: f"{x[:12]}..." if hashed and x else repr(x)
    return [] if old == new else [f"{name}: {short(old)} -> {short(new)}"]


def _contents(settings: Preparation, folder: Path) -> Contents:
    return Contents(source_files(settings.sources, settings.root), folder)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the `differences` of identities; earlier versions hashed no text."""
    sources = [
        {key: b[key] for key in b if key in a or key != "sha256"}
        for a, b in zip(old["sources"], new["sources"], strict=False)
    ]
    rest = new["sources"][len(sources) :]
    return differences(old, {**new, "sources": [*sources, *rest]})


def _identity(settings: Preparation, contents: Contents | None) -> dict[str, Any]:
    """Returns everything that decides about the bytes of the folder.

    The content of each source is part of it if it is given.
    """
    known: Sequence[dict[str, Any]] = [{} for _ in settings.sources]
    known = known if contents is None else contents.sources
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_hash(settings.tokenizer),
        "rules": dataclasses.asdict(settings.rules),
        "subset_seed": SUBSET_SEED,
        "sources": [
            {"uri": uri, **content}
            for uri, content in zip(settings.sources, known, strict=True)
        ],
    }


def _of_now(identity: dict[str, Any]) -> dict[str, Any]:
    """Returns an identity, perhaps of an earlier version, in the form of this one."""
    rules = dict(identity["rules"])
    if "cut_long" in rules:
        rules["long"] = "cut" if rules.pop("cut_long") else "drop"
        rules["heldout"] = 0.0
    return {**identity, "rules": rules}


def _jobs(parts: Sequence[Piece], folder: Path) -> list[Job]:
    """Puts consecutive parts together until they have SHARD_BYTES: a job each time."""
    groups: list[list[Piece]] = []
    room = 0
    for part in parts:
        if room <= 0:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(part)
        room -= max(part.size, 65_536)  # many small files are slow, too
    count = len(groups)
    return [Job(i, count, tuple(g), str(folder)) for i, g in enumerate(groups)]


def _refusal(folder: Path, changed: list[str], files: Sequence[str] = ()) -> str:
    text = any(".sha256: " in line or ".bytes: " in line for line in changed)
    return (
        f"prepared={folder} was made with other {'text' if text else 'settings'}:\n  "
        + "\n  ".join(changed)
        + _named(files)
        + "\nUse another folder (--out, data.prepared), or prepare it again with "
        "--overwrite."
    )


def _named(files: Sequence[str]) -> str:
    """Names files that changed, as far as they are known."""
    more = len(files) - 5
    rest = f" and {more} more" if more > 0 else ""
    return f" ({', '.join(files[:5])}{rest})" if files else ""


def _check_apart(settings: Preparation, folder: Path) -> None:
    """Raises ValueError if a source lies in the folder, or the folder in a source."""
    names = ("shard-00000-of-00001.array_record", "dropped.jsonl", "manifest.json")
    within = reading(folder, names, settings.sources, settings.root)
    real = os.path.realpath(folder)
    for uri, files in zip(
        settings.sources, source_files(settings.sources, settings.root), strict=True
    ):
        paths = (os.path.realpath(file.path) for file in files if file.path)
        if uri == within or any(Path(path).is_relative_to(real) for path in paths):
            raise ValueError(
                f"prepared={folder} and data.sources={uri!r} lie one in the other, and "
                "what is prepared would be among what is read: use a folder apart "
                "(--out, data.prepared)."
            )


def _check_others(folder: Path, overwrite: bool) -> None:
    """Raises ValueError if a folder has shards that no run of ours says it made."""
    known = any((folder / name).exists() for name in ("manifest.json", _UNFINISHED))
    if overwrite or known or not folder.is_dir():
        return
    for pattern in MADE:
        for file in folder.glob(pattern):
            raise ValueError(
                f"prepared={folder} has {file.name} but no manifest.json: it was "
                "copied in part, or is another program's. Copy it again, use another "
                "folder, or prepare it again with --overwrite, which replaces the file."
            )


def _begin(folder: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Begins a run in the folder, or takes over what an interrupted one left.

    Shards are kept if the interrupted run had the same settings; else they are removed.
    """
    unfinished, manifest = folder / _UNFINISHED, folder / "manifest.json"
    keep = False
    if unfinished.exists() and not manifest.exists():
        changed = _changed_since(unfinished, identity, overwrite)
        if changed and not overwrite:
            raise ValueError(_refusal(folder, changed))
        keep = not changed
    manifest.unlink(missing_ok=True)
    for pattern in (*PARTIAL, *(() if keep else MADE)):
        for file in folder.glob(pattern):
            file.unlink()
    write_json(unfinished, identity)


def _changed_since(
    unfinished: Path, identity: dict[str, Any], overwrite: bool
) -> list[str]:
    """Lists the settings that changed since an interrupted run."""
    try:
        old = read_object(unfinished)
        if wrong := unlike(old, SETTINGS, "settings"):
            raise ValueError(f"{unfinished} is damaged, {wrong}.")
    except ValueError as error:
        if overwrite:
            return ["all"]
        raise ValueError(
            f"{error} It says how an interrupted run began: prepare the folder again "
            "with --overwrite, or use another one."
        ) from None
    return _changes(_of_now(old), identity)


def _run(
    settings: Preparation,
    jobs: Sequence[Job],
    workers: int,
    tally: Tally,
    show: Callable[[str], None],
) -> None:
    """Writes the shards that are not there yet."""
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 4)
    progress = ShardProgress(jobs, counters, show)
    todo = [job for job in jobs if not job.finished()]
    for job in jobs:
        if job.finished():
            tally.add(job.index, job.report_path)
    count = min(workers or len(os.sched_getaffinity(0)), len(todo))
    if count <= 1:
        tokenizer = load_tokenizer(settings.tokenizer)
        worker = Worker(tokenizer, settings.rules, counters, settings.vocab_size)
        with progress.running():
            for job in todo:
                worker.write(job)
                tally.add(job.index, job.report_path)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        count,
        mp_context=context,
        initializer=start_worker,
        initargs=(
            settings.tokenizer,
            settings.rules,
            counters,
            settings.vocab_size,
        ),
    )
    with progress.running():
        try:
            running = {pool.submit(run_job, job): job for job in todo}
            for future in concurrent.futures.as_completed(running):
                future.result()
                tally.add(running[future].index, running[future].report_path)
        except BrokenProcessPool:
            raise OSError(
                "a worker process died (see above), perhaps for want of memory: use "
                f"fewer of them (--workers, data.workers; there were {count}); the "
                "same command goes on where it stopped."
            ) from None
        finally:
            counters[STOP] = 1  # else the pool waits for shards nobody wants
            pool.shutdown(cancel_futures=True)


def _finish(
    folder: Path, identity: dict[str, Any], jobs: Sequence[Job], tally: Tally
) -> None:
    indices = [read_index(job.index_path) for job in jobs]
    with whole_file(folder / "index.npy") as file:
        np.save(file, np.concatenate(indices))
    with whole_file(folder / "dropped.jsonl") as file:
        for row in tally.bad_rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode(*BYTES))
    shards = [
        {"name": job.path.name, "examples": len(index)}
        for job, index in zip(jobs, indices, strict=True)
    ]
    manifest = {
        "format": FORMAT,
        "settings": identity,
        "total": tally.total(),
        "largest_id": tally.largest,
        "sources": tally.sources,
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    _clean(folder)


def _clean(folder: Path) -> None:
    """Removes what only an unfinished run needs."""
    for pattern in (*MADE[1:3], _UNFINISHED):
        for file in folder.glob(pattern):
            file.unlink()


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Names the folder, and what to do, in an error of a disk that has no room.

    It may be in words already (`paths.named_when_full`), for a single file.
    """
    try:
        yield
    except OSError as error:
        cause = error if error.errno else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in FULL:
            raise
        raise OSError(
            f"prepared={folder} cannot be written ({cause.strerror}): make room, and "
            "the same command goes on where it stopped; or use another folder (--out, "
            "data.prepared)."
        ) from error


@contextlib.contextmanager
def _lock(folder: Path, show: Callable[[str], None]) -> Iterator[None]:
    """Lets one process at a time work on a folder.

    If that process is killed, the kernel frees the folder.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            show(f"another process prepares {folder}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    from beacon_jax.cli import start

    start("prepare")
