"""End tokens: all that a model's files name.

config.json often names the end of a text only, and generation_config.json or the
tokenizer the end of a turn: Qwen2 and Llama-3 have two or three.
"""

from pathlib import Path
from typing import Any

from beacon_jax.model.config import ModelConfig
from beacon_jax.paths import read_object

GENERATION = "generation_config.json"


def end_ids(config: ModelConfig, path: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the end tokens of config.json, generation_config.json and the tokenizer.

    Args:
      path: the model's folder; a GGUF file has no generation_config.json.
      tokenizer: None: there is none.

    Raises:
      ValueError: generation_config.json is no JSON object, or its end tokens no ids.
    """
    found = [*config.eos_ids, *_of_generation(path / GENERATION)]
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))


def named(ids: tuple[int, ...], tokenizer: Any) -> str:
    """Writes ids with their tokens, as "<|im_end|> (2)"; "none" for none."""
    if tokenizer is None:
        return ", ".join(map(str, ids)) or "none"
    tokens = [(tokenizer.convert_ids_to_tokens(i), i) for i in ids]
    return ", ".join(f"{token} ({i})" for token, i in tokens) or "none"


def _of_generation(path: Path) -> list[int]:
    if not path.is_file():
        return []
    ids = read_object(path).get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(i) is not int for i in listed):
        raise ValueError(
            f"{path} has eos_token_id={ids!r}: it must be an id, or a list of ids. "
            "Mend it, or delete the file."
        )
    return listed
