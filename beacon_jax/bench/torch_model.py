"""The same model by `transformers` on torch, with the same weights: the yardstick.

Full causal attention by torch's own kernel (`sdpa`), logits of the last row only, as
many threads as there are cores, nothing compiled: what a user has who does nothing.
Needs the extra `bench`.
"""

import dataclasses
import importlib
import os
from typing import Any

import numpy as np

from beacon_jax.hf.keys import LM_HEAD, table
from beacon_jax.hf.reader import TreeReader
from beacon_jax.model.config import ModelConfig


def library() -> str:
    """Returns names and versions; NotImplementedError if torch is not installed."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise NotImplementedError(
            "--against=torch: torch is not installed: pip install beacon_jax[bench]."
        ) from None
    version = importlib.import_module("transformers").__version__
    return f"torch {torch.__version__}, transformers {version}"


class TorchModel:
    """A model of `transformers` on torch, on the CPU.

    Args:
      variables: of this package; {"params"} is copied, beacons have no part in it.
      dtype: name of a floating type.
    """

    def __init__(self, config: ModelConfig, variables: dict[str, Any], dtype: str):
        library()
        self._torch = torch = importlib.import_module("torch")
        # The affinity's cores, as XLA counts them.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._config = plain = dataclasses.replace(config, beacon=None)
        self._dtype = getattr(torch, dtype)
        self._model = _empty(plain, self._dtype)
        self._fill(plain, variables)

    def _fill(self, config: ModelConfig, variables: dict[str, Any]) -> None:
        reader = TreeReader({"params": variables["params"]})
        found = dict(self._model.named_parameters(remove_duplicate=False))
        with self._torch.inference_mode():
            for entry in table(config):
                for i, key in enumerate(entry.keys):
                    rows = (i, i + 1) if entry.stacked else (0, None)
                    # bfloat16 has no numpy type that torch knows.
                    ours = reader.read(entry.name, *rows).astype(np.float32)
                    shape = entry.hf_shape[::-1] if entry.linear else entry.hf_shape
                    ours = ours.reshape(shape)
                    ours = ours.T if entry.linear else ours
                    theirs = self._torch.from_numpy(np.ascontiguousarray(ours))
                    found.pop(key).copy_(theirs)
        if config.tie_embeddings:
            found.pop(LM_HEAD)
        assert not found, f"{sorted(found)} got no weights"

    def first_token(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the most likely token [B] behind tokens [B, T], with a cache."""
        with self._torch.inference_mode():
            ids = self._torch.from_numpy(tokens.astype(np.int64))
            out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1).numpy()

    def cache(self, batch: int, length: int) -> Any:
        """Makes a cache that holds `length` random entries per row."""
        c, torch = self._config, self._torch
        made = importlib.import_module("transformers").DynamicCache()
        shape = (batch, c.num_kv_heads, length, c.head_dim)
        for layer in range(c.num_layers):
            k, v = (torch.randn(shape, dtype=self._dtype) for _ in "kv")
            made.update(k, v, layer)
        return made

    def decode(self, cache: Any, batch: int, steps: int) -> None:
        """Feeds `steps` greedy tokens to every row, and takes them away again."""
        torch, length = self._torch, cache.get_seq_length()
        with torch.inference_mode():
            token = torch.zeros((batch, 1), dtype=torch.int64)
            for _ in range(steps):
                out = self._model(
                    input_ids=token, past_key_values=cache, logits_to_keep=1
                )
                token = out.logits.argmax(-1)
        cache.crop(length - cache.get_seq_length())


def _empty(config: ModelConfig, dtype: Any) -> Any:
    hf = config.to_hf()
    auto = importlib.import_module("transformers")
    made = auto.AutoConfig.for_model(hf.pop("model_type"), **hf)
    model = auto.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")
    return model.to(dtype).eval()
