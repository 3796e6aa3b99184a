"""Says what a folder or a file of weights is that looks like a model and is none here.

It is asked when config.json, the weights or tensors are missing.
"""

from collections.abc import Iterable
from pathlib import Path

from beacon_jax.hf import shards
from beacon_jax.paths import read_object

PEFT = "adapter_config.json"
_UNFINISHED = ("*.incomplete", "*.crdownload", "*.part", "*.partial", "*.aria2")
_QUANTIZED = (".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB")
_QUANTIZED += (".weight_scale", ".weight_scale_inv", ".weight_packed")


def of_folder(folder: Path) -> str:
    """Says what a folder without config.json or weights holds, and what to do."""
    no_config = not (folder / "config.json").is_file()
    if (folder / PEFT).is_file():
        return peft(folder)
    there = lambda pattern: sorted(x.name for x in folder.glob(pattern) if x.is_file())
    if files := there("*.gguf"):
        return f"It has a GGUF file: give that, {folder / files[0]}."
    if files := there("consolidated*"):
        return (
            f"It has {files[0]}, weights as their authors keep them: give the folder "
            "in Hugging Face's layout (of Llama, the one whose name ends with -hf)."
        )
    for pattern in _UNFINISHED:
        if files := there(pattern):
            return (
                f"It has {files[0]}, a download that has not ended: wait for it, or "
                "fetch the file again."
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
    if kept := list(folder.glob("snapshots/*/config.json")):
        newest = max(kept, key=lambda x: x.lstat().st_mtime).parent
        return f"It is a folder of the hub's cache: give {newest}."
    below = sorted(
        x.parent.name for x in folder.glob("*/config.json") if (x.parent != folder)
    )
    if below:
        return f"Its folder {below[-1]} has one: give {folder / below[-1]}."
    return ""


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
        if ".experts." in name or ".block_sparse_moe." in name:
            return (
                f"{name}: this is a mixture of experts, which is not supported: give a "
                "Llama, Mistral or Qwen2 model."
            )
    return ""
