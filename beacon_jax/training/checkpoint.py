"""Checkpoints of a run: state, resolved config and a hash that proves them whole.

What can be wrong with one, and what happens:
  not finished       orbax gives a save its name when it is whole: ignored
  other bytes        it can be read, with another hash: moved aside, never deleted, and
                     the one before is used
  cannot be read     a missing file, no permission, an unknown format: the run stops
  other parameters   its tree is not that of this run: the run stops
A run that stops changes no file. If there are several processes, all do the same.
"""

import json
import logging
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from beacon_jax.forms import unlike
from beacon_jax.hf.hashing import tree_hash
from beacon_jax.paths import read_object
from beacon_jax.training.console import say
from beacon_jax.training.processes import is_lead, wait, worst

# May differ between the run that wrote a checkpoint and the one that goes on from it:
# they change what is reported and kept, not a single number of the training.
FREE_KEYS = (
    "allow_config_change",
    "log_every",
    "save_every",
    "keep",
    "profile_steps",
    "peak_tflops",
    "compilation_cache",
    "root",
    "prepared",
    "workers",
    "max_drop_fraction",
)
# What runs had before there was a key.
BEFORE = {
    "config.beacon.anchor": "none",
    "config.beacon.rank": 0,
    "config.beacons_from": "",
    "config.data.first_step": 0,
    "config.loss.attention_queries": 64,
    "config.loss.attention_weight": 0.0,
    "config.mesh.stage": 1,
    "config.rules.layers": ["stage"],
}

_DAMAGED = "checkpoint of step {} is damaged (it reads back with another hash)"
_RECORD = {"hash": str}  # form of what is saved beside the state


class CheckpointError(OSError):
    """A checkpoint that cannot be written, read or used; files are as they were."""


class Restored(NamedTuple):
    """A state that was saved.

    Attributes:
      state: what was saved, in the structure of the fresh state.
      optimizer: False if the saved optimiser was another one, and the fresh one is
        used.
    """

    state: Any
    optimizer: bool


class Checkpoints:
    """The checkpoints under `folder`; each is a step of one run.

    Args:
      folder: of the checkpoints and nothing else.
      keep: how many; the oldest is deleted when a newer one is whole.

    Raises:
      CheckpointError: the folder cannot be read or made.
    """

    def __init__(self, folder: Path, keep: int):
        # orbax logs a dozen lines per save, and a traceback where we have one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder = folder.absolute()
        self._saving: int | None = None
        self._half: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True
        )
        try:
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=options,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "record": ocp.JsonCheckpointHandler(),
                },
            )
        except Exception as error:  # of a disk, or of orbax about its metadata
            raise CheckpointError(
                f"{folder} cannot be used: {_cause(error)}. Repair what is in it, move "
                "a damaged checkpoint away, or use another --workdir."
            ) from error

    def newest(self) -> int:
        """Returns the step of the newest checkpoint on the disk, 0 without one."""
        try:
            names = [path.name for path in self._folder.iterdir()]
        except OSError:
            return 0
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Begins to write a checkpoint, as a whole or not at all.

        If there is one of this step already, nothing is written.

        Raises:
          CheckpointError: it cannot be written, or the one before could not.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        leaves = _leaves(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            record=ocp.args.JsonSave({**record, "hash": _hash(leaves)}),
        )
        self._saving = step
        try:
            self._manager.save(step, args=args)
        except Exception as error:
            self._failed(error)

    def check(self) -> None:
        """Raises what went wrong with a save in the background, without waiting."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
        self._saving = None

    def close(self) -> None:
        """Waits for the last save, and removes what is there of one that failed.

        Raises:
          CheckpointError: it cannot be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._half is not None and is_lead():  # a full disk needs the room
                for path in self._folder.glob(f"{self._half}.orbax-checkpoint-tmp*"):
                    _remove(path)

    def _failed(self, error: Exception) -> None:
        """Raises CheckpointError for a save that failed, whatever the reason was.

        Older checkpoints are deleted only after a newer one is whole, so they are all
        there.
        """
        step, self._saving = self._saving, None
        self._half = step
        last = self.newest()
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._folder}: "
            f"{_cause(error)}. "
            + (f"That of step {last} is whole: " if last else "There is none before: ")
            + f"make room, and the same command goes on from step {last}."
        ) from error

    def record(self) -> dict[str, Any] | None:
        """Returns what the newest checkpoint says of its run, None without one.

        Raises:
          CheckpointError: it cannot be read.
        """
        steps = sorted(self._manager.all_steps())
        return self._record(steps[-1])[0] if steps else None

    def restore(
        self, state: Any, record: dict[str, Any], allow: bool, aside: bool = True
    ) -> Restored | None:
        """Restores the newest whole checkpoint; None without one.

        Args:
          state: the fresh state; gives structure, shapes, dtypes and places.
          record: {"config": resolved, ...} of this run.
          allow: whether the record may be another one. If only the optimiser's part of
            the state differs then, the rest of it is restored.
          aside: whether a damaged one is moved aside; else it stays, and is not used.

        Raises:
          ValueError: the run of these checkpoints had another config.
          CheckpointError: one cannot be read, or what it trains is something else.
        """
        damaged = False
        for step in sorted(self._manager.all_steps(), reverse=True):
            # All processes agree on one answer: each reads files of its own.
            bad, failure = 0, None
            leaves, other = {}, []
            try:
                saved, expected = self._record(step)
                if not allow:
                    check_unchanged(saved, record)
                leaves, other = self._read(step, state, allow, saved, record)
                bad = int(_hash(leaves) != expected)
            except (CheckpointError, ValueError) as error:
                bad, failure = 2, error
            bad = worst(bad)
            if failure is not None:
                raise failure
            if bad == 2:
                raise CheckpointError(
                    f"another process cannot use the checkpoint of step {step}: see "
                    "its message."
                )
            if not bad:
                return Restored(_merged(state, leaves, other), not other)
            damaged = True
            if aside:
                self._move_aside(step)
            elif is_lead():
                say(f"{_DAMAGED.format(step)}: left where it is, using the one before")
        if damaged and aside and is_lead():
            say("no whole checkpoint is left: the run starts at step 0")
        return None

    def _record(self, step: int) -> tuple[dict[str, Any], str]:
        """Reads what a checkpoint says of its run, and its hash."""
        try:
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            saved = self._manager.restore(step, args=args)["record"]
            if wrong := unlike(saved, _RECORD, "its record"):
                raise ValueError(wrong)
            saved = dict(saved)
            return saved, saved.pop("hash")
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _read(
        self,
        step: int,
        state: Any,
        allow: bool,
        saved: dict[str, Any],
        record: dict[str, Any],
    ) -> tuple[dict[str, Any], list[str]]:
        """Reads all arrays of a checkpoint to the places of `state`.

        Returns:
          (arrays, names of those that are others than in `state`).
        """
        target = _leaves(state)
        _drop_late_answers()
        try:
            _check_whole(self._folder / str(step) / "state")
            stored = self._manager.item_metadata(step)["state"]
            if stored is None:
                raise ValueError("what it has of the state is not described")
            stored = stored.tree
            stored = {name: (tuple(x.shape), x.dtype) for name, x in stored.items()}
        except Exception as error:
            raise self._unreadable(step, error) from error
        wanted = {name: (x.shape, x.dtype) for name, x in target.items()}
        names = sorted({*stored, *wanted})
        other = [name for name in names if stored.get(name) != wanted.get(name)]
        own = all(name.startswith(OPTIMIZER) for name in other)
        if other and not (own and allow):
            lines = _differences(other, stored, wanted, changes(saved, record))
            remedy = (
                "Use another --workdir, or the settings and the base it was made with."
            )
            if own:
                remedy = (
                    "Pass --config.allow_config_change to keep what was trained and to "
                    "start the optimiser anew, or use another --workdir."
                )
            raise CheckpointError(
                f"the checkpoint of step {step} has other "
                f"{'optimiser state' if own else 'parameters'} than this run:\n"
                f"{lines}\nNo file was changed. {remedy}"
            )

        def place(name: str) -> Any:
            if name not in other:
                return target[name].sharding
            # Moments of another optimiser lie where their parameters do.
            owners = (
                x.sharding
                for path, x in target.items()
                if path.startswith(TRAINED)
                and name.endswith(path.removeprefix(TRAINED))
                and x.shape == stored[name][0]
            )
            return next(owners, target[STEP].sharding)

        asked = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=place(name))
            for name, (shape, dtype) in stored.items()
        }
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(asked))
            return self._manager.restore(step, args=args)["state"], other
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        older = [s for s in self._manager.all_steps() if s < step]
        return CheckpointError(
            f"the checkpoint of step {step} cannot be read: {_cause(error)}. No file "
            f"was changed. Repair {self._folder / str(step)}, or move it away to go on "
            f"from step {max(older, default=0)}; if a newer orbax-checkpoint than "
            f"{ocp.__version__} wrote it, install that."
        )

    def _move_aside(self, step: int) -> None:
        """Moves a damaged checkpoint aside.

        All processes call this; the first one moves.
        """
        aside = self._folder.with_name(f"{self._folder.name}-damaged")
        target, count = aside / str(step), 1
        while target.exists():
            target, count = aside / f"{step}.{count}", count + 1
        wait("found a damaged checkpoint")
        try:
            if is_lead():
                aside.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(target)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} is damaged and cannot be moved to "
                f"{target}: {_cause(error)}. No file was changed."
            ) from error
        wait("moved a damaged checkpoint")
        self._manager.reload()
        if is_lead():
            say(f"{_DAMAGED.format(step)}: moved to {target}, using the one before")


def _remove(folder: Path) -> None:
    """Removes a folder that threads of TensorStore may still write to, for 5 s."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


# How the names of `_leaves` begin.
TRAINED, OPTIMIZER, STEP = "['trained']", "['optimizer']", "['step']"
# Every optimiser has this counter: it is kept when another one goes on.
SKIPPED = f"{OPTIMIZER}.total_notfinite"


def _merged(state: Any, leaves: dict[str, Any], other: list[str]) -> Any:
    """Returns the fresh state with what was read, but for another optimiser's part.

    Args:
      leaves: what was read, by path.
      other: paths of arrays that differ; none: the optimiser is the same.
    """
    target = _leaves(state)
    kept = (TRAINED, STEP) if other else ("",)
    for name in target:
        if name.startswith(kept) or name == SKIPPED:
            target[name] = leaves[name]
    return jax.tree.unflatten(jax.tree.structure(state), [*target.values()])


def _differences(
    names: list[str], stored: dict[str, Any], wanted: dict[str, Any], cause: list[str]
) -> str:
    """Lists arrays that differ, (shape, dtype) by name, and the settings that do."""
    show = lambda at: f"{list(at[0])} {jnp.dtype(at[1]).name}" if at else "nothing"
    rows = [
        f"  {name}: {show(stored.get(name))} in the checkpoint, "
        f"{show(wanted.get(name))} in this run"
        for name in names
    ]
    if len(rows) > 8:
        rows = [*rows[:8], f"  and {len(rows) - 8} more"]
    if cause:
        rows += ["Settings that changed:", *(f"  {line}" for line in cause)]
    return "\n".join(rows)


def _drop_late_answers() -> None:
    """Keeps Python from printing tracebacks of answers that nobody waits for.

    If one array cannot be read, orbax closes its event loop, and TensorStore's threads
    still report the others there.
    """
    before = sys.unraisablehook

    def report(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            before(found)

    sys.unraisablehook = report


def _check_whole(folder: Path) -> None:
    """Checks the files that all of a state hangs on.

    orbax would find that out array by array, with a traceback for some of them, and its
    reader of JSON ends the process where objects lie too deep in each other.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no JSON object.
    """
    for name in ("_METADATA", "manifest.ocdbt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is not there")
    for name in ("_METADATA", "_sharding"):
        if (folder / name).is_file():
            read_object(folder / name)


def check_unchanged(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises ValueError, naming every setting in which two records differ."""
    if changed := changes(old, new):
        raise ValueError(
            "the checkpoints in --workdir come from a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nUse another --workdir, or --config.allow_config_change to go on."
        )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lists "key: old -> new" of every setting that changes numbers of the training.

    Args:
      old: as read from a checkpoint.
      new: of this run.
    """
    plain = json.loads(json.dumps(new))
    flat = lambda tree: {**BEFORE, **flatten_dict(tree, sep=".")}
    before, after = flat(old), flat(plain)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key.split(".")[-1] not in FREE_KEYS
    ]


def _leaves(state: Any) -> dict[str, Any]:
    """Returns arrays by their path: independent of the container types of optax."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _hash(leaves: dict[str, Any]) -> str:
    """Hashes all arrays; those of shape () as [1], which `tree_hash` can read."""
    return tree_hash({name: jnp.atleast_1d(x) for name, x in leaves.items()})


def _cause(error: BaseException) -> str:
    """Returns the reason at the bottom of an error, in one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join((str(error) or repr(error)).split())
    # TensorStore says the file first, then the reason, then its whole specification.
    text = re.split(r" \[(?:tensorstore_spec|os_error_code)", text)[0]
    return text if len(text) <= 240 else f"... {text[-240:]}"
