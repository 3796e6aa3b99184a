"""Converts a synthetic sharded checkpoint there and back and reports the peak memory.

python tests/hf/synthetic_checkpoint.py --layers=15 --dir=FOLDER

Layers as Llama-2-7B's (hidden 4096, bfloat16) make 0.4 GB each and the rest 0.5 GB, so
15 layers are 6.6 GB on disk, three times over. Prints one JSON line. The folder is
emptied at the end.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from beacon_jax.hf.conversion import write_index
from beacon_jax.hf.keys import table
from beacon_jax.hf.reader import BLOCK_BYTES, DTYPES, Tensor
from beacon_jax.hf.writer import write_safetensors
from beacon_jax.model.config import ModelConfig

SHARDS = 3


def write_checkpoint(folder: Path, hidden: int, layers: int) -> dict[str, float]:
    """A Llama folder of random bits; returns its sizes in MB."""
    config = ModelConfig(
        family="llama",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 4096,
        num_layers=layers,
        num_heads=hidden // 128,
        num_kv_heads=hidden // 128,
        head_dim=128,
        max_position=4096,
    )
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    tensors = {
        key: Tensor(entry.hf_shape, DTYPES["BF16"])
        for entry in table(config)
        for key in entry.keys
    }
    noise = np.random.default_rng(0).integers(0, 2**16, BLOCK_BYTES // 2, np.uint16)

    def blocks(key: str) -> Iterator[np.ndarray]:
        left, count = tensors[key].nbytes // 2, zlib.crc32(key.encode()) & 0xFFFF
        while left:
            block = noise[:left] ^ np.uint16(count := (count + 1) & 0xFFFF)
            left -= block.size
            yield block

    names = [f"model-{i + 1:05}-of-{SHARDS:05}.safetensors" for i in range(SHARDS)]
    for i, name in enumerate(names):
        part = {key: tensors[key] for key in list(tensors)[i::SHARDS]}
        write_safetensors(folder / name, part, blocks, {"format": "pt"})
    write_index(folder / "model.safetensors.index.json", names)
    sizes = [tensor.nbytes / 1e6 for tensor in tensors.values()]
    return {"checkpoint_mb": sum(sizes), "largest_tensor_mb": max(sizes)}


def measured(*command: str) -> dict[str, float]:
    """Runs Python and returns the seconds and the process's peak resident MB."""
    report = (
        "import resource, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    start = time.perf_counter()
    command = (sys.executable, "-c", report, *command)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    kilobytes = int(result.stdout.split()[-1])
    return {"seconds": time.perf_counter() - start, "peak_mb": kilobytes * 1024 / 1e6}


def digest(folder: Path) -> str:
    """One hash over all files of a folder, read in blocks."""
    result = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        result.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                result.update(block)
    return result.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=15)
    options = parser.parse_args()
    hf, ours, back = (options.dir / name for name in ("hf", "ours", "back"))
    hf.mkdir(parents=True)
    try:
        report: dict[str, object] = dict(
            write_checkpoint(hf, options.hidden, options.layers)
        )
        convert = "beacon_jax.convert"
        report["imports"] = measured("beacon_jax.inference.verify")
        for name, src, dst in (("from-hf", hf, ours), ("to-hf", ours, back)):
            report[name] = measured(convert, name, f"--src={src}", f"--dst={dst}")
        report["identical"] = digest(hf) == digest(back)
        print(json.dumps(report))
    finally:
        for folder in (hf, ours, back):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
