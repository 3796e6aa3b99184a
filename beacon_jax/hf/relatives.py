"""Says what a folder or a file of weights is that looks like a model and is none here.

It is asked when config.json, the weights or tensors are missing.
"""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from beacon_jax.hf import shards
from beacon_jax.model.config import BASE, NAMED
from beacon_jax.paths import read_object

PEFT = "adapter_config.json"
# Files that a browser, the hub's library or another program still loads. The last
# endings are also those of other files.
_UNFINISHED = re.compile(
    r".+\.(incomplete|crdownload|part|download|opdownload|aria2|filepart|!ut|!qb)"
    r"|.*(safetensors|gguf|json|bin|pth?)\b.*\.(partial|tmp|temp)",
    re.IGNORECASE,
)
_LOADING = ".cache/huggingface/download"  # of `hf download --local-dir`
# Tensors of what stands in place of lm_head, or beside it.
_CLASSIFIER = re.compile(
    r"(^|\.)(score|classifier|cls|qa_outputs|classification_head|regression_head)\."
)
_VALUE = re.compile(
    r"(^|\.)(v_head|value_head|reward_head|rm_head|\w*regression_layer)\."
)
_QUANTIZED = (".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB")
_QUANTIZED += (".weight_scale", ".weight_scale_inv", ".weight_packed")


def of_folder(folder: Path) -> str:
    """Says what a folder without config.json or weights holds, and what to do."""
    no_config = not (folder / "config.json").is_file()
    if no_config and (said := _of_cache(folder)):
        return said
    if (folder / PEFT).is_file():
        return peft(folder)
    there = lambda pattern: sorted(
        x.relative_to(folder).as_posix() for x in folder.glob(pattern) if x.is_file()
    )
    unfinished = [name for name in there("*") if is_unfinished(name)]
    if unfinished or (unfinished := there(f"{_LOADING}/**/*.incomplete")):
        return (
            f"It has {unfinished[0]}, a download that is not finished: finish it, or "
            "download the file again."
        )
    if files := there("*.gguf"):
        return f"It has a GGUF file: give that, {folder / files[0]}."
    if files := there("consolidated*"):
        return (
            f"It has {files[0]}, weights as their authors keep them: give the folder "
            "in Hugging Face's layout (of Llama, the one whose name ends with -hf)."
        )
    for pattern in ("*.h5", "*.msgpack", "*.onnx", "*.npz", "*.ckpt", "*.pt", "*.pth"):
        if files := there(pattern):
            return (
                f"It has {files[0]}, which is not read: give a checkpoint in the "
                "safetensors format."
            )
    if (folder / "beacons.safetensors").is_file():
        return (
            "It has beacons alone (beacons.safetensors), whose config.json belongs "
            "beside them: copy the whole folder again."
        )
    if (folder / "params.safetensors").is_file():
        return (
            "It has params.safetensors, of a converted folder that is not whole: "
            "convert the model again."
        )
    files = [*there("*.safetensors"), *there("pytorch_model*.bin")]
    if files and no_config:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return f"It has {files[0]}{more}: fetch config.json of the same repository."
    if said := shards.incomplete(files):
        return (
            f"It has {said}: fetch those, and model.safetensors.index.json, of the "
            "same repository."
        )
    if len(files) > 1:
        return (
            f"It has {files[0]} and {len(files) - 1} more: fetch "
            "model.safetensors.index.json of the same repository, which names them."
        )
    if files:
        single = shards.STEMS[files[0].rpartition(".")[2]]
        return f"It has {files[0]}: weights are read from {single}; rename it."
    below = sorted(
        x.parent.name for x in folder.glob("*/config.json") if (x.parent != folder)
    )
    if below:
        return f"Its folder {below[-1]} has one: give {folder / below[-1]}."
    return ""


def is_unfinished(name: str) -> bool:
    """Tells whether a file has the name of a download that goes on or has failed."""
    return bool(_UNFINISHED.fullmatch(name))


def _of_cache(folder: Path) -> str:
    """Names the newest whole model in a folder of the hub's cache; "" for others.

    There a model is MODEL/snapshots/HASH, each a version of it.
    """
    kept = folder if folder.name == "snapshots" else folder / "snapshots"
    if not kept.is_dir():
        models = [x.name for x in folder.glob("models--*") if x.is_dir()]
        if not models:
            return ""
        ids = ", ".join(sorted(x[8:].replace("--", "/", 1) for x in models)[:4])
        more = f" and {len(models) - 4} more" if len(models) > 4 else ""
        return f"It is the cache of a hub: give the id of a model in it ({ids}{more})."
    found = [x for x in kept.iterdir() if x.is_dir()]
    whole = [x for x in found if _is_whole(x)]
    said = "It is a model's folder in the cache of a hub"
    if not whole:
        n = len(found)
        versions = "one version" if n == 1 else f"{n} versions"
        return (
            f"{said}, and none of its {versions} below {kept} is whole: download the "
            "model again."
        )
    newest = max(whole, key=lambda x: (x.stat().st_mtime, x.name))
    return f"{said}: give the version, {newest}."


def _is_whole(folder: Path) -> bool:
    """Tells whether a folder has config.json and all files of weights."""
    if not (folder / "config.json").is_file():
        return False
    for single in shards.STEMS.values():
        index = folder / f"{single}.index.json"
        if index.is_file():
            with contextlib.suppress(ValueError):
                files = shards.weight_map(index).values()
                return all((folder / name).is_file() for name in files)
        if (folder / single).is_file():
            return True
    return any(folder.glob("*.gguf"))


def peft(folder: Path) -> str:
    """Says that a folder has an adapter of PEFT, of which base, and what to do."""
    try:
        base = read_object(folder / PEFT).get("base_model_name_or_path")
    except ValueError:
        base = None
    of = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"It has an adapter of PEFT (LoRA, QLoRA){of}, no model: merge it into its "
        "base (peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
        ".save_pretrained(FOLDER)), and give the merged folder."
    )


def of_tensors(names: Iterable[str]) -> str:
    """Says what tensors that a model does not have belong to; "" if that is unknown."""
    for name in names:
        if _CLASSIFIER.search(name):
            return (
                f"{name}: this is a classifier (...ForSequenceClassification, "
                f"ForTokenClassification or a reward model), {BASE}."
            )
        if _VALUE.search(name):
            return (
                f"{name}: this is the head of a value or reward model (as of TRL), "
                f"{BASE}; or save it without the head (TRL: model.pretrained_model."
                "save_pretrained(FOLDER))."
            )
        if "ultragist_" in name:
            return (
                f"{name}: this is an UltraGist model, a predecessor of Activation "
                "Beacon that computes something else, and is not supported. Give a "
                "model of Activation Beacon, or the plain one it was trained from."
            )
        if ".lora_" in name or ".base_layer." in name or "modules_to_save" in name:
            return (
                f"{name}: these are weights of PEFT that are not merged into the "
                "model: merge them (merge_and_unload) and save the model."
            )
        if name.endswith(_QUANTIZED):
            return (
                f"{name}: these weights are quantized (GPTQ, AWQ, bitsandbytes, FP8): "
                "give the checkpoint that they were made of, or a GGUF file of it."
            )
        if re.match(r"(tok_embeddings|output|layers\.\d+\.attention\.w[qkvo])\.", name):
            return (
                f"{name}: these are weights as their authors name them, of Llama or "
                "Mistral: give the folder in Hugging Face's layout (of Llama, the one "
                "whose name ends with -hf), or convert them by transformers' "
                "convert_llama_weights_to_hf.py."
            )
        if ".experts." in name or ".block_sparse_moe." in name:
            return (
                f"{name}: this is a mixture of experts, which is not supported: give a "
                f"{NAMED} model without experts."
            )
    return ""
