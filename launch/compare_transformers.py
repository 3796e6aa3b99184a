"""Compares a GGUF file in beacon_jax with transformers: logits and token ids.

  pip install -e '.[bench]' accelerate && python launch/compare_transformers.py x.gguf

transformers reads the file by its own reader, in float32. Ends with 1 if the logits of
LENGTH tokens differ by more than TOLERANCE standard deviations. Ids of LINES lines of
prose and code (this repository's files) are compared as well. Lines that differ are
shown, but are no failure: for SmolLM2 transformers 5.24 splits two spaces in front of a
digit, this package does not (95 of 10,000 lines).
"""

import importlib
import sys
from pathlib import Path

import numpy as np

LINES, LENGTH, TOLERANCE = 10_000, 512, 1e-3


def lines() -> list[str]:
    """Returns lines of the documents and sources of this repository."""
    root = Path(__file__).resolve().parents[1]
    found = []
    for pattern in ("*.md", "docs/*.md", "assets/**/*.txt", "beacon_jax/**/*.py"):
        for path in sorted(root.glob(pattern)):
            found += path.read_text("utf-8").splitlines()
    return (found * (LINES // len(found) + 1))[:LINES]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Normalises logits [T, V]."""
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def main(gguf: Path) -> int:
    """Prints the differences; returns the exit status."""
    torch = importlib.import_module("torch")  # no dependency of the package
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import beacon_jax
    from beacon_jax.core.train_loss import train_loss

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    theirs = AutoTokenizer.from_pretrained(**where)
    ours = beacon_jax.load(gguf, dtype="float32")
    ids = lambda tokenizer, line: list(tokenizer(line)["input_ids"])
    wrong = [x for x in lines() if ids(theirs, x) != ids(ours.tokenizer, x)]
    print(f"token ids: {len(wrong)} of {LINES:,} lines differ", *wrong[:3], sep="\n  ")

    tokens = np.asarray(ids(theirs, "\n".join(lines()))[:LENGTH], np.int32)
    reference = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor(tokens[None].tolist())).logits[0].numpy()
    window = {"tokens": tokens[None, None], "labels": tokens[None, None]}
    window["valid"] = np.full((1, 1), LENGTH, np.int32)
    params, plan = ours.variables["params"], np.zeros(1, int)
    _, aux = train_loss(ours.net, {}, params, window, plan, outputs="logits")
    found = np.asarray(aux["logits"])[0, 0]
    apart = np.abs(found - expected).max() / expected.std()
    p, q = log_softmax(expected), log_softmax(found)
    kl = (np.exp(p) * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).mean()
    print(
        f"logits of {LENGTH} tokens: at most {apart:.1e} standard deviations apart, KL "
        f"mean {kl.mean():.1e}, max {kl.max():.1e} nats, same first choice {same:.4f}"
    )
    return int(apart > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
