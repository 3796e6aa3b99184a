"""Reads, writes and checks HF checkpoints (docs/design.md section 2)."""

from beacon_jax.hf.checkpoint import Checkpoint, load, save_hf
from beacon_jax.hf.hashing import tree_hash
from beacon_jax.hf.identify import Identity, identity
from beacon_jax.hf.writer import copy_tokenizer
from beacon_jax.resources import has_tokenizer, load_tokenizer

__all__ = [
    "Checkpoint",
    "Identity",
    "copy_tokenizer",
    "has_tokenizer",
    "identity",
    "load",
    "load_tokenizer",
    "save_hf",
    "tree_hash",
]
