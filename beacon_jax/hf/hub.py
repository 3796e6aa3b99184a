"""Finds a model: a folder or GGUF file here, one of the package, or one on the hub."""

import errno
import os
import re
from pathlib import Path

from beacon_jax import resources
from beacon_jax.gguf.file import is_gguf
from beacon_jax.hf import relatives
from beacon_jax.names import nearest

TIMEOUT = 5.0  # seconds until the hub counts as not reachable
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SMALL = re.compile(r"[\w.-]+\.(json|jinja)|tokenizer\.model")
_SAFE = re.compile(r"model[\w.-]*\.safetensors")
# Faults of this machine, not of the network.
_OWN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
ADAPTER = "beacons.safetensors"  # of beacons alone
_TORCH = re.compile(r"pytorch_model[\w.-]*\.bin")


def find(path: str | Path, name: str = "path") -> Path:
    """Returns the folder or GGUF file of a model, downloaded if it is on the hub only.

    Args:
      path: a folder or a GGUF file; the name of a model of the package
        (`resources.asset`); or the id of one on the hub, "org/name": what is needed of
        it is downloaded into the cache of huggingface_hub, once.
      name: name of the argument, for messages.

    Raises:
      FileNotFoundError: there is no such folder, or the hub cannot be reached. The
        message says which, and the command that downloads the model.
    """
    text = str(path)
    if not text.strip():
        raise FileNotFoundError(
            f"{name}={text if name.startswith('--') else repr(text)} is empty: give a "
            "folder with config.json and weights, tiny-beacon, or the id of a model on "
            "the hub, org/name."
        )
    found = Path(resources.asset(path))
    if os.path.isdir(found) or is_gguf(found):
        return found
    if os.path.exists(found):
        if relatives.is_unfinished(found.name):
            raise FileNotFoundError(
                f"{name}={path} is a download that is not finished: finish it, or "
                "download the file again."
            )
        raise FileNotFoundError(
            f"{name}={path} is a file, and no GGUF file: give the folder that has "
            "config.json and the weights."
        )
    # out/model, where a folder `out` is here, is a misspelt path and no id.
    kind = "file" if text.endswith(".gguf") else "folder"
    ours = text.startswith("assets/") or kind == "file"
    if ours or not _ID.fullmatch(text) or os.path.isdir(found.parent):
        near = nearest(text.removeprefix("assets/"), resources.models())
        near = os.path.expanduser(text) if text.startswith("~/") else near
        hint = f"Did you mean {near}? " if near else ""
        shown = text if text.isprintable() else repr(text)
        shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
        raise FileNotFoundError(
            f"{name}={shown}: there is no such {kind}. {hint}Give a folder with "
            "config.json and weights, a GGUF file, or the id of a model on the hub, "
            "org/name."
        )
    return download(text, name)


def download(id: str, name: str = "path", cache: Path | None = None) -> Path:
    """Downloads a model's config, tokenizer and weights; files that are there are kept.

    Args:
      id: "org/name". The hub is the one of HF_ENDPOINT.
      cache: a folder in place of the cache of huggingface_hub.

    Raises:
      FileNotFoundError: for the same reasons as in `find`.
      ValueError: no model can have this id.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(id)
    except HFValidationError:
        shown = id if len(id) <= 120 else f"{id[:117]}..."
        raise ValueError(
            f"{name}={shown} is no folder here, and no id of a model on the hub: one "
            "is org/name, each with at most 96 characters, no -- or .., no - or . at "
            "an end, and no .git behind."
        ) from None
    endpoint = os.environ.get("HF_ENDPOINT")
    by_hand = (
        f"Download it where there is a network, `hf download {id} --local-dir "
        f"{id.split('/')[1]}`, and give that folder."
    )
    why = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi(endpoint=endpoint).model_info(id, timeout=TIMEOUT)
            names = [file.rfilename for file in info.siblings or []]
            return Path(
                snapshot_download(
                    id,
                    allow_patterns=needed_files(names),
                    etag_timeout=TIMEOUT,
                    cache_dir=cache,
                    endpoint=endpoint,
                )
            )
        except RepositoryNotFoundError:
            raise FileNotFoundError(
                f"{name}={id} is no folder here, and the hub has no such model, or "
                "only for users with access: check the name, or log in with `hf auth "
                "login`."
            ) from None
        except HfHubHTTPError as error:
            why = f"the hub refuses it ({error.response.status_code})"
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OWN:
                raise OSError(
                    f"{name}={id} cannot be downloaded ({error.strerror}): make room "
                    "in the cache of huggingface_hub, or name another (HF_HOME)."
                ) from error
            # The HTTP library below, and so its errors, change from release to release.
            why = f"the hub cannot be reached ({type(error).__name__})"
    for weights in ("*.safetensors", "*.bin"):
        try:
            return Path(
                snapshot_download(
                    id,
                    allow_patterns=["*.json", "*.jinja", "tokenizer.model", weights],
                    local_files_only=True,
                    cache_dir=cache,
                )
            )
        except LocalEntryNotFoundError:  # not in the cache, or only a part of it
            continue
    raise FileNotFoundError(
        f"{name}={id} is no folder here, and {why}. {by_hand}"
    ) from None


def needed_files(names: list[str]) -> list[str]:
    """Returns those of a repository's files that `checkpoint.load` reads.

    No weights are among them twice, and nothing of other libraries.
    """
    safe = [n for n in names if _SAFE.fullmatch(n)]
    safe = ["model.safetensors"] if "model.safetensors" in safe else safe
    weights = safe or [n for n in names if _TORCH.fullmatch(n)]
    weights += [n for n in names if n == ADAPTER]
    return [n for n in names if _SMALL.fullmatch(n)] + weights
