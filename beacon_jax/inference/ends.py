"""End tokens: all that a model's files name.

config.json often names the end of a text only, and generation_config.json or the
tokenizer the end of a turn: Qwen2 and Llama-3 have two or three.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beacon_jax.model.config import ModelConfig
from beacon_jax.names import short
from beacon_jax.paths import read_object

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"


def end_ids(
    config: ModelConfig, named: Sequence[int], tokenizer: Any
) -> tuple[int, ...]:
    """Returns the end tokens of config.json, generation_config.json and the tokenizer.

    Ids that the model does not have cannot come: they are left out, and a line of
    warning names them.

    Args:
      named: those of generation_config.json (`of_generation`).
      tokenizer: None: there is none.
    """
    of_tokenizer = [] if tokenizer is None else [tokenizer.eos_token_id]
    found = [*config.eos_ids]
    for source, ids in ((GENERATION, named), ("the tokenizer", of_tokenizer)):
        known = [i for i in ids if i is not None and i < config.vocab_size]
        found += known
        if beyond := [str(i) for i in ids if i is not None and i not in known]:
            logger.warning(
                "%s names end tokens that the model does not have, with ids below %d, "
                "and that are left out: %s.",
                *(source, config.vocab_size, ", ".join(beyond)),
            )
    return tuple(dict.fromkeys(found))


def named(ids: tuple[int, ...], tokenizer: Any) -> str:
    """Writes ids with their tokens, as "<|im_end|> (2)"; "none" for none."""
    if tokenizer is None:
        return ", ".join(map(str, ids)) or "none"
    tokens = [(tokenizer.convert_ids_to_tokens(i), i) for i in ids]
    return ", ".join(f"{token} ({i})" for token, i in tokens) or "none"


def of_generation(folder: Path) -> list[int]:
    """Returns the end tokens that generation_config.json names; a GGUF file has none.

    Raises:
      ValueError: it is no JSON object, or its end tokens are no ids.
    """
    path = folder / GENERATION
    if not path.exists() and not path.is_symlink():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is a folder or a broken link: mend or delete it.")
    ids = read_object(path).get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(i) is not int or not 0 <= i < 2**31 for i in listed):
        raise ValueError(
            f"{path} has eos_token_id={short(repr(ids))}: it must be an id, or a list "
            "of ids. Mend it, or delete the file."
        )
    return listed
