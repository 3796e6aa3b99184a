"""Compares the compressors with kvpress 0.5.5: which tokens each layer and head keeps.

  python launch/compare_kvpress.py ours MODEL KEPT.npz TEXT [TEXT [TEXT]]
  python launch/compare_kvpress.py theirs FOLDER KEPT.npz

The first command runs in the environment of this package, the second in one of kvpress
(`pip install kvpress==0.5.5`), since their requirements exclude each other. FOLDER is
the same model for transformers: of a GGUF file

  beacon-jax convert from-gguf --src=MODEL --dst=DIR --dtype=float32
  beacon-jax convert to-hf --src=DIR --dst=FOLDER

MODEL has no beacons. Of the first text the first 1,024 tokens are compressed, of the
others 2,048 and 3,072 (`LENGTHS`), as one piece, in float32. `ours` writes their ids,
what is kept of them, and the scores. `theirs` gives the same ids to the presses, prints
a table (`compare`) and ends with 1 if a position differs whose score is further than
ROUNDING (relative) from the lowest score that is kept. On two cores each takes five to
eight minutes for three texts, of SmolLM2-135M.

Their model gets the rotary frequencies of ours: transformers computes them in float32,
ours are rounded from float64, and a last bit turns a key at 6,000 by up to 9e-5 more.
Their KVzip is made to ask for the repetition in the words of ours, and to keep as many
tokens of each head. Lines behind the table say what both differences amount to.
"""

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS, RATIOS, ROUNDING = (1024, 2048, 3072), (2, 4, 8), 1e-4
SINKS, FORCED = 4, 1e9  # above all scores
PRESSES = {
    "streaming": ("StreamingLLMPress", {"n_sink": SINKS}),
    "snapkv": ("SnapKVPress", {"window_size": 64, "kernel_size": 5}),
    "expected-attention": ("ExpectedAttentionPress", {}),
}


# --- this package ---------------------------------------------------------------------


def ours(source: str, out: Path, texts: list[Path]) -> int:
    """Writes the ids of the texts, and of each method the scores and what is kept."""
    import beacon_jax
    from beacon_jax.inference.compressors import kvzip
    from beacon_jax.model.rotary import inverse_frequencies
    from beacon_jax.tokenise import encode

    model = beacon_jax.load(source, dtype="float32")
    found: dict[str, Any] = {"frequencies": inverse_frequencies(model.config)}
    for length, text in zip(LENGTHS, texts, strict=False):
        ids = encode(model.tokenizer, text.read_text("utf-8"), "start")[:length]
        if len(ids) < length:
            sys.exit(
                f"error: {text} has {len(ids)} tokens, not {length}: use a longer one"
            )
        found[f"{length}/ids"] = ids
        for name, kept in _kept(model, ids).items():
            found[f"{length}/{name}"] = kept
        for begin in range(0, length, kvzip.CHUNK):
            words = kvzip.PART if begin else kvzip.WHOLE
            front = encode(model.tokenizer, words, "bare")
            last = ids[max(begin - kvzip.POSTFIX, 0) : begin]
            found[f"{length}/front/{begin}"] = np.concatenate([front, last])
    np.savez(out, **found)
    return 0


def _kept(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Compresses ids by each method and ratio.

    Returns:
      NAME/RATIO/kept, positions [L, K, n / ratio], rising, and NAME/RATIO/scores
      [L, K, n].
    """
    import jax
    import jax.numpy as jnp

    from beacon_jax.evaluation.baselines.select import read
    from beacon_jax.inference.compressors import METHODS
    from beacon_jax.inference.piecewise import close, make_piece

    found = {}
    memory = read(model, [ids])
    stop = np.asarray([len(ids)])
    for name in (*PRESSES, "kvzip"):
        seen: list[Any] = []
        for ratio in RATIOS:
            watched = _watched(METHODS[name], seen)
            if name == "streaming":  # windows one after the other
                model.compress(ids, ratio=ratio, method=watched)
            else:
                own = jax.tree.map(jnp.copy, memory.state)  # it is taken over
                wanted = [np.zeros(0, int)]  # of windows, which no score asks for
                piece = make_piece(model, own, 0 * stop, stop, [ids], wanted)
                close(watched, piece, stop // ratio)
            found[f"{name}/{ratio}/kept"] = watched.kept
            found[f"{name}/{ratio}/scores"] = watched.scores
            print(f"ours: {len(ids)} tokens, {name} x{ratio}", flush=True)
    return found


def _watched(kind: Any, cache: list[Any]) -> Any:
    """Makes a compressor that tells what it keeps, and observes a text once.

    Args:
      cache: what was observed; filled by the first compressor that it is given to.
    """
    from beacon_jax.inference.compressors.piece import highest

    class Watched(kind):
        kept = np.zeros((1, 1, 0), int)  # [L, K, slots] positions in the text
        scores = np.zeros(0)
        read = 0  # tokens

        def observe(self, piece):
            if not cache:
                cache.append(super().observe(piece))
            return cache[0]

        def make(self, piece, scores, count):
            total, stop = piece.start + count, int(piece.stop[0])
            index = np.asarray(highest(scores, total))[:, 0, : int(total[0])]
            index = np.swapaxes(index, 1, 2)  # [L, K, kept]
            new = self.read + np.arange(stop - self.kept.shape[-1])
            self.read += len(new)
            self.scores = np.asarray(scores)[:, 0, :, :stop]
            layers, heads = index.shape[:2]
            held = np.broadcast_to(self.kept, (layers, heads, self.kept.shape[-1]))
            new = np.broadcast_to(new, (layers, heads, len(new)))
            held = np.concatenate([held, new], axis=-1)
            self.kept = np.take_along_axis(held, index, axis=-1)
            return super().make(piece, scores, count)

    return Watched()


# --- kvpress --------------------------------------------------------------------------


def theirs(folder: str, path: Path) -> int:
    """Prints how far the presses keep the same; returns the exit status."""
    torch = importlib.import_module("torch")  # no dependencies of the package
    transformers = importlib.import_module("transformers")

    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # KVzip's, that it takes long
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    data = np.load(path)
    frequencies = torch.tensor(data["frequencies"].tolist())
    model.model.rotary_emb.inv_freq.copy_(frequencies)
    wrong, lines = 0, []
    print("| method | tokens | ratio | equal | heads | apart | scores |")
    print("|---|---|---|---|---|---|---|")
    for length in (x for x in LENGTHS if f"{x}/ids" in data):
        prefill = Prefill(torch, transformers, model, data[f"{length}/ids"])
        for name, (press, options) in PRESSES.items():
            watched = _watched_press(press, options)
            prefill(watched)
            for ratio in RATIOS:
                scores = np.stack(watched.scores[ratio])
                kept = np.stack(watched.kept[ratio])
                wrong += compare(data, f"{length}/{name}/{ratio}", scores, kept)
        fronts = [data[x] for x in data if x.startswith(f"{length}/front/")]
        same, own = (_watched_kvzip(torch, x) for x in (fronts, None))
        prefill(same)
        prefill(own)
        for ratio in RATIOS:
            label, number = f"{length}/kvzip/{ratio}", length // ratio
            kept = highest(same.found, number)
            wrong += compare(data, label, same.found, kept)
            lines += _kvzip_lines(data, label, same, own)
    print(*lines, sep="\n")
    print(f"{wrong} positions differ by more than rounding")
    return int(wrong > 0)


class Prefill:
    """Reads a text once per press."""

    def __init__(self, torch: Any, transformers: Any, model: Any, ids: np.ndarray):
        self.torch, self.model, self.cache = torch, model, transformers.DynamicCache
        self.ids = torch.tensor(ids[None].tolist())

    def __call__(self, press: Any) -> None:
        with self.torch.no_grad(), press(self.model):
            self.model.model(input_ids=self.ids, past_key_values=self.cache())


def _watched_press(name: str, options: dict[str, int]) -> Any:
    """Makes a press that compresses nothing, but tells what it would keep.

    Its `scores` and `kept` have a list of layers for each ratio, [K, n] and [K, kept].
    """
    kvpress, torch = map(importlib.import_module, ("kvpress", "torch"))

    class Watched(getattr(kvpress, name)):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            found = super().score(
                module, hidden_states, keys, self.values, attentions, kwargs
            )
            self.scores[self.number].append(found[0].numpy())
            return found

        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            self.values = values
            places = torch.arange(keys.shape[2])[None, None, :, None]
            places = places.expand(values.shape)  # compressed in place of the values
            for self.number in RATIOS:
                self.compression_ratio = 1 - 1 / self.number
                _, kept = super().compress(
                    module, hidden_states, keys, places, attentions, kwargs
                )
                kept = kept[0, :, :, 0].sort().values
                self.kept[self.number].append(kept.numpy())
            return keys, values

    watched = Watched(**options)
    watched.scores, watched.kept = ({ratio: [] for ratio in RATIOS} for _ in "sk")
    return watched


def _watched_kvzip(torch: Any, fronts: list[np.ndarray] | None) -> Any:
    """Makes a KVzip press that tells its scores and what it would keep.

    `found` is [L, K, n], `kept[ratio]` bool [L, K, n], of a budget that heads share.

    Args:
      fronts: what stands in front of each repetition; None: the press's own words.
    """
    kvpress = importlib.import_module("kvpress")

    class Watched(kvpress.KVzipPress):
        def prepare(self, model, tokenizer, prev_postfix_size=8):
            self.prefix_length = 0  # the ids are of a text alone, not of a chat
            pairs = super().prepare(model, tokenizer, prev_postfix_size)
            if fronts is None:
                return pairs
            before = [torch.tensor(front[None].tolist()) for front in fronts]
            return [
                (chunk, torch.cat([front, chunk], dim=1))
                for (chunk, _), front in zip(pairs, before, strict=True)
            ]

        def compress_post(self, model):
            self.found = self.score_val[:, 0].numpy().copy()
            for ratio in RATIOS:
                self.compression_ratio = 1 - 1 / ratio
                super().compress_post(model)
                self.kept[ratio] = np.ones(self.found.shape, bool)
                for kept, layer in zip(
                    self.kept[ratio], model.model.layers, strict=True
                ):
                    _, head, slot = layer.self_attn.masked_key_indices
                    kept[head.numpy(), slot.numpy()] = False
            self.found[..., :SINKS] = self.score_val[:, 0, :, :SINKS].numpy()

    watched = Watched(compression_ratio=0.5)
    watched.kept = {}
    return watched


# --- both -----------------------------------------------------------------------------


def highest(scores: np.ndarray, number: int) -> np.ndarray:
    """Lists the positions of the highest scores [..., n], rising: [..., number]."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.sort(order[..., :number], axis=-1)


def mask(kept: np.ndarray, size: int) -> np.ndarray:
    """Turns positions [L, K, kept] into bool [L, K, size]."""
    found = np.zeros((*kept.shape[:2], size), bool)
    np.put_along_axis(found, kept, True, axis=-1)
    return found


def compare(data: Any, label: str, scores: np.ndarray, kept: np.ndarray) -> int:
    """Prints a row of the table; returns how many positions differ beyond rounding.

    "equal" is the share of kept positions that are the same, "heads" of layers and
    heads that keep the same ones. "apart": how far at most the score of a position
    that differs is from the lowest kept. "scores": how far at most the two scores of
    a kept position are apart, each head's scaled to the same sum; those that are
    always kept are left out. Both are relative.

    Args:
      label: LENGTH/METHOD/RATIO.
      scores, kept: theirs, [L, K, n] and [L, K, n / ratio].
    """
    length, name, ratio = label.split("/")
    found, mine = data[f"{label}/kept"], data[f"{label}/scores"]
    if found.shape != kept.shape:
        raise ValueError(f"{label}: {found.shape} positions, but theirs {kept.shape}.")
    left, right = (mask(x, int(length)) for x in (found, kept))
    equal = (left & right).sum() / right.sum()
    heads = (left == right).all(-1).mean()
    lowest = np.where(right, scores, np.inf).min(-1, keepdims=True)
    apart = np.abs(scores - lowest) / np.abs(lowest)
    differs = left != right
    between = "-"
    if name != "streaming":
        free = (mine < FORCED) & (np.arange(int(length)) >= SINKS)
        both = (np.where(free, x, 0).astype(np.float64) for x in (mine, scores))
        mine, yours = (x / x.sum(-1, keepdims=True) for x in both)
        free &= right
        between = f"{(np.abs(mine - yours)[free] / yours[free]).max():.0e}"
    print(
        f"| {name} | {length} | {ratio} | {equal:.5f} | {heads:.3f} "
        f"| {apart[differs].max(initial=0):.0e} | {between} |",
        flush=True,
    )
    return int((differs & (apart > ROUNDING)).sum())


def _kvzip_lines(data: Any, label: str, same: Any, own: Any) -> list[str]:
    """Says how scores of KVzip are ordered, and what the words and the budget do."""
    length, _, ratio = label.split("/")
    mine, number = data[f"{label}/scores"], int(length) // int(ratio)
    kept = mask(data[f"{label}/kept"], int(length))
    ranks = [
        np.argsort(np.argsort(x[..., SINKS:], axis=-1), axis=-1).astype(float)
        for x in (mine, same.found)
    ]
    centred = [x - x.mean() for x in ranks]
    variance = (centred[0] ** 2).mean(-1)
    correlation = (centred[0] * centred[1]).mean(-1) / variance
    words = mask(highest(own.found, number), int(length))
    shared = same.kept[int(ratio)]
    per_head = shared.sum(-1) / int(length)
    return [
        f"kvzip, {length} tokens, x{ratio}: rank correlation of a head "
        f"{correlation.min():.6f} or more; of the positions kept are the same "
        f"{(kept & words).sum() / kept.sum():.3f} with kvpress's own words, and "
        f"{(kept & shared).sum() / kept.sum():.3f} with a budget that heads share, of "
        f"which one has {per_head.min():.3f} to {per_head.max():.3f} of its tokens"
    ]


def main(arguments: list[str]) -> int:
    """Runs one of the two commands; returns the exit status."""
    match arguments:
        case ["ours", source, out, *texts] if 0 < len(texts) <= len(LENGTHS):
            return ours(source, Path(out), [Path(text) for text in texts])
        case ["theirs", folder, found]:
            return theirs(folder, Path(found))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
