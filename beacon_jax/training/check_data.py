"""Checks config.data before anything is read: one function for all commands."""

from typing import Any

from beacon_jax.data.batches import STAGE_KEYS, BatchConfig
from beacon_jax.data.grouped import GroupConfig
from beacon_jax.data.prepare import Preparation
from beacon_jax.data.sources import parse_uri
from beacon_jax.training.config import Config, default_config

# Keys that only whole rows have; all others serve both or stages.
ROW_KEYS = (
    "prepared",
    "weights",
    "min_length",
    "max_length",
    "long",
    "chat_template",
    "group",
    "batch_size",
    "epochs",
    "steps",
    "tokens",
    "max_drop_fraction",
    "workers",
)


def check_numbers(key: str, values: Any, *, whole: bool = True) -> None:
    """Raises ValueError unless all values of a key are numbers.

    The command line takes `--config.KEY=a,b` for any key that holds several values.
    """
    kinds = int if whole else (int, float)
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kinds)]
    if wrong:
        raise ValueError(
            f"{key}={tuple(values)} has {wrong[0]!r}: use {'whole ' if whole else ''}"
            f"numbers, as in --config.{key}=2,4."
        )


def check_data(config: Config) -> None:
    """Raises ValueError for a setting of config.data that cannot work.

    The error names the key, its value and the remedy. Nothing is read: that a file
    exists is found when the sources are opened.
    """
    data = config.data
    _check_sources(data)
    check_numbers("data.weights", data.weights, whole=False)
    check_numbers("data.dummy_every", data.dummy_every)
    Preparation.of(data, "")  # checks lengths, long, heldout and chat_template
    unused = ROW_KEYS if data.stages else STAGE_KEYS
    defaults = default_config().data
    # A config that was read from JSON has lists where the defaults have tuples.
    plain = lambda value: tuple(value) if isinstance(value, list) else value
    changed = [key for key in unused if plain(data[key]) != defaults[key]]
    if changed:
        given = ", ".join(f"data.{key}={data[key]!r}" for key in changed)
        raise ValueError(
            f"{given}: without effect, because data.stages "
            + (
                f"has {', '.join(data.stages)}, whose rows are cut from the text: set "
                "steps, length and batch_size of the stages, or leave data.stages "
                "empty for whole rows."
                if data.stages
                else "is empty: these keys are for rows that stages cut from text."
            )
        )
    if data.stages:
        BatchConfig.of(config)
        return
    GroupConfig.of(config)
    if not 0.0 <= data.max_drop_fraction <= 1.0:
        raise ValueError(
            f"data.max_drop_fraction={data.max_drop_fraction} is a share of the rows: "
            "use a number from 0 to 1."
        )
    if data.workers < 0:
        raise ValueError(
            f"data.workers={data.workers} must be at least 0 (one per core)."
        )
    if data.weights and len(data.weights) != len(data.sources):
        raise ValueError(
            f"data.weights={tuple(data.weights)} must be one number for each of the "
            f"{len(data.sources)} data.sources."
        )
    if data.weights and (min(data.weights) < 0 or not sum(data.weights) > 0):
        raise ValueError(
            f"data.weights={tuple(data.weights)} must not be negative, nor all 0."
        )


def _check_sources(data: Config) -> None:
    if not data.sources:
        raise ValueError(
            "data.sources=() is empty: name files, folders or data sets, as in "
            "--config.data.sources=FOLDER."
        )
    for uri in data.sources:
        if not isinstance(uri, str):
            raise ValueError(
                f"data.sources={tuple(data.sources)}: {uri!r} is a "
                f"{type(uri).__name__}; quote it, as in "
                f"--config.data.sources=\"('{uri}',)\"."
            )
        if parse_uri(uri).scheme == "long-llm" and not data.root:
            raise ValueError(
                f"data.sources names {uri!r}, which is relative to data.root='': set "
                "data.root to the folder that long-llm.tar.gz was unpacked to."
            )
