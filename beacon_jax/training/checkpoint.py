"""Checkpoints of a run: state, resolved config and a hash that proves them whole."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from beacon_jax.hf.hashing import tree_hash

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


class Checkpoints:
    """The checkpoints under `folder`, newest last; each is a step of one run."""

    def __init__(self, folder: Path, keep: int):
        logging.getLogger("absl").setLevel(logging.WARNING)  # a dozen lines per save
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True
            ),
        )

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes a checkpoint as a whole or not at all; a second one of a step is
        skipped."""
        if step in self._manager.all_steps():
            return
        leaves = _leaves(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                record=ocp.args.JsonSave({**record, "hash": _hash(leaves)}),
            ),
        )

    def restore(self, state: Any, record: dict[str, Any], allow: bool) -> Any | None:
        """The newest whole checkpoint in the structure of `state`, or None.

        A checkpoint that cannot be read, or whose bytes are not those that were
        written, is reported and deleted, and the one before it is taken.

        Args:
          state: the fresh state; gives structure, shapes and dtypes.
          record: {"config": resolved, ...} of this run.
          allow: go on although the record is another one.

        Raises:
          ValueError: the run of these checkpoints had another config.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                saved = self._manager.restore(
                    step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
                )["record"]
                expected = saved.pop("hash")
            except Exception as error:
                self._discard(step, error)
                continue
            if not allow:
                check_unchanged(saved, json.loads(json.dumps(record)))
            try:
                target = _leaves(state)
                leaves = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(
                            jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
                        )
                    ),
                )["state"]
                if (found := _hash(leaves)) != expected:
                    raise ValueError(f"hash {found[:12]} instead of {expected[:12]}")
            except Exception as error:
                self._discard(step, error)
                continue
            values = [leaves[name] for name in target]
            return jax.tree.unflatten(jax.tree.structure(state), values)
        return None

    def _discard(self, step: int, error: Exception) -> None:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        print(
            f"checkpoint of step {step} is damaged ({reason}): it is deleted, falling "
            "back to the one before",
            flush=True,
        )
        self._manager.delete(step)

    def close(self) -> None:
        self._manager.close()


def check_unchanged(old: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError naming every setting in which two records differ."""
    before, after = _flat(old), _flat(new)
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key.split(".")[-1] not in FREE_KEYS
    ]
    if changed:
        raise ValueError(
            "the checkpoints in --workdir come from a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nUse another --workdir, or --config.allow_config_change to go on."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _leaves(state: Any) -> dict[str, Any]:
    """Arrays by their path: independent of the container types of optax."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _hash(leaves: dict[str, Any]) -> str:
    return tree_hash({name: jnp.atleast_1d(x) for name, x in leaves.items()})
