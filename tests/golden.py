"""Replays golden cases: `python -m tests.golden DIR [DIR...]`.

Calls the jitted functions that training, generation and evaluation use (`train_loss`,
`feed`, `decode_step`), prints a table, exits with 1 on a miss (docs/specification.md
section 7).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.core.plan import capacity, draw_ratios, static_ratios
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.data.windows import split_windows
from beacon_jax.hf.checkpoint import load
from beacon_jax.hf.keys import flatten, table
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, rotate


@dataclass
class Check:
    """One compared array: largest absolute difference against its tolerance."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # NaN fails


class Replay:
    """One golden case."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.case = json.loads((folder / "case.json").read_text())
        self.data = dict(np.load(folder / "case.npz"))
        self.dtype = jnp.dtype(self.case.get("dtype", "float32"))
        checkpoint = load(folder, dtype="float32" if self.is_base else str(self.dtype))
        self.config = checkpoint.config
        self.variables = jax.tree.map(jnp.asarray, checkpoint.variables)
        self.net = Net(self.config, self.dtype)
        self.checks: list[Check] = []

    @property
    def is_base(self) -> bool:
        return self.case.get("kind") == "base"

    @property
    def logits_tolerance(self) -> float:
        if self.dtype == jnp.bfloat16:
            return 0.1
        return 5e-4 if self.config.tie_embeddings else 1e-4

    def compare(self, what, ours, golden, tolerance):
        ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
        if ours.shape != golden.shape:
            print(f"{what}: shape {ours.shape}, golden {golden.shape}", file=sys.stderr)
            error = float("inf")
        else:
            error = float(np.max(np.abs(ours - golden), initial=0.0))
        self.checks.append(Check(what, error, tolerance))

    def run(self) -> list[Check]:
        if self.is_base:
            self.base()
            return self.checks
        calls = self.case["calls"]
        starts = [i for i, c in enumerate(calls) if c["op"] == "reset"] or [0]
        for start, end in zip(starts, [*starts[1:], len(calls)], strict=True):
            self.sequence(
                [c for c in calls[start:end] if c["op"] in ("forward", "greedy")]
            )
        if "mem.sizes" in self.data and self.memory is not None:
            self.final_memory()
        return self.checks

    def base(self):
        ids = self.data["input_ids"]
        b, t = ids.shape
        ratios = np.zeros(1, np.int32)
        memory = init_memory(self.config, b, 4 * t + 1024)
        out, _ = feed(
            Net(self.config),
            self.variables,
            memory,
            ids,
            np.full(b, t),
            ratios,
            outputs="logits",
        )
        self.compare("logits", out.logits, self.data["logits"], self.logits_tolerance)
        loss, _ = self.loss(ids, np.full(b, t), shift(ids), np.zeros(1, np.int32), t)
        self.compare("loss", loss, self.data["loss"], 1e-5)

    def schedule(self, calls) -> np.ndarray:
        """The ratio of every window of a sequence from the steps' draws."""
        w = self.config.beacon.window
        drawn, end = {}, 0
        for call in calls:
            steps = call.get("steps") or call["prompt_steps"] + call["decode_steps"]
            for step in steps:
                before = end
                if "end_token" in step:
                    end = step["end_token"]
                elif step in call.get("decode_steps", ()):
                    end += 1
                else:
                    end = min(end + w, call["prompt_len"])
                if step["ratio_drawn"] is not None:
                    for window in range(before // w, (end - 1) // w + 1):
                        drawn.setdefault(window, step["ratio_drawn"])
        total = -(-end // w) + 1
        first = drawn[min(drawn)] if drawn else max(self.config.beacon.ratios)
        ratios = []
        for window in range(total):
            ratios.append(drawn.get(window, ratios[-1] if ratios else first))
        return np.asarray(ratios, np.int32)

    def sequence(self, calls):
        """The calls between two resets share one memory."""
        self.memory = None
        if not calls:
            return
        self.check_adaptive(calls)
        ratios = self.schedule(calls)
        for call in calls:
            if call["op"] == "greedy":
                self.greedy(call, ratios)
            elif call["training"]:
                self.training(call, ratios)
            else:
                self.inference(call, ratios)

    def check_adaptive(self, calls):
        """adapt-F chooses the ratio that the release chose."""
        mix = self.config.beacon.ratio_mix
        if not mix.startswith("adapt") or calls[0]["op"] != "forward":
            return
        length = self.data[f"call{calls[0]['index']}.input_ids"].shape[1]
        ours = draw_ratios(self.config, 1, length=length)[0]
        golden = calls[0]["steps"][0]["ratio_drawn"]
        self.compare(f"call{calls[0]['index']}.ratio", ours, golden, 0)

    def arrays(self, call):
        name = f"call{call['index']}"
        ids = self.data[f"{name}.input_ids"]
        mask = self.data.get(f"{name}.attention_mask", np.ones_like(ids))
        return name, ids, mask.astype(bool), self.data.get(f"{name}.labels")

    def loss(self, ids, lengths, labels, plan, window, **options):
        w_tokens, valid = split_windows(ids, lengths, window, align="right")
        w_labels, _ = split_windows(labels, lengths, window, align="right", fill=-100)
        batch = {"tokens": w_tokens, "labels": w_labels, "valid": valid}
        plan = np.resize(np.asarray(plan, np.int32), len(w_tokens))
        params, beacon = self.variables["params"], self.variables["beacon"]
        static = tuple(sorted({int(r) for r in plan[:-1]}))
        if self.config.beacon is None:
            static = ()
        outputs, grads = options.pop("outputs", "loss"), options.pop("grads", False)
        settings = LossConfig(ratios=static, **options)
        rest = (params, batch, plan, settings)
        if not grads:
            return train_loss(self.net, beacon, *rest, outputs=outputs)
        grad = jax.value_and_grad(
            lambda b: train_loss(self.net, b, *rest, outputs=outputs), has_aux=True
        )
        return grad(beacon)

    def training(self, call, ratios):
        """Rows with different plans, once aligned at their last windows, run apart."""
        name, ids, mask, labels = self.arrays(call)
        b, t = ids.shape
        w = self.config.beacon.window
        lengths = mask.sum(1)
        given = np.full_like(ids, -100) if labels is None else labels
        labels_shifted = shift(np.where(mask, given, -100))
        groups: dict[tuple, list[int]] = {}
        for row in range(b):
            n = -(-int(lengths[row]) // w)
            groups.setdefault(tuple(ratios[: n - 1].tolist()), []).append(row)
        total = count = 0.0
        sums, grads = np.zeros((b, 2)), None
        token_loss = np.zeros((b, t))
        logits = np.zeros((b, t, self.config.vocab_size))
        for plan, rows in groups.items():
            part = (ids[rows], lengths[rows], labels_shifted[rows], [*plan, 0], w)
            out = self.loss(*part, outputs="logits", grads=call["grads"])
            (_, aux), g = out if call["grads"] else (out, None)
            n = float(aux["row_count"].sum())
            if g is not None:
                scaled = jax.tree.map(lambda x, n=n: n * np.asarray(x, np.float64), g)
                grads = scaled if grads is None else jax.tree.map(np.add, grads, scaled)
            sums[rows] = np.stack([aux["row_loss"], aux["row_count"]], axis=1)
            total, count = total + float(aux["row_loss"].sum()), count + n
            for i, row in enumerate(rows):
                length = lengths[row]
                flat = lambda x, i=i: np.asarray(x)[:, i].reshape(-1, *x.shape[3:])
                token_loss[row, :length] = flat(aux["token_loss"])[:length]
                logits[row, :length] = flat(aux["logits"])[:length]
        self.compare_outputs(name, mask, logits, token_loss, sums, labels)
        if grads is not None:
            self.gradients(jax.tree.map(lambda x: x / max(count, 1.0), grads))

    def compare_outputs(self, name, mask, logits, token_loss, sums, labels):
        data, tolerance = self.data, self.logits_tolerance
        golden = data.get(f"{name}.logits_all")
        if golden is not None:
            self.compare(f"{name}.logits", logits[mask], golden[mask], tolerance)
        else:
            golden = data[f"{name}.logits_returned"]
            tail = golden.shape[1]
            real = mask[:, -tail:]
            self.compare(
                f"{name}.logits", logits[:, -tail:][real], golden[real], tolerance
            )
        if labels is None:
            return
        counts = np.maximum(sums[:, 1], 1)
        loss = sums[:, 0].sum() / max(sums[:, 1].sum(), 1)
        soft = 0.1 if self.dtype == jnp.bfloat16 else None
        self.compare(f"{name}.loss", loss, data[f"{name}.loss"], soft or 1e-5)
        self.compare(
            f"{name}.batch_loss",
            sums[:, 0] / counts,
            data[f"{name}.batch_loss"],
            soft or 1e-5,
        )
        counted = mask & (data[f"{name}.shifted_labels"] != -100)
        self.compare(
            f"{name}.token_loss",
            token_loss[counted],
            data[f"{name}.token_loss"][counted],
            soft or tolerance,
        )

    def gradients(self, grads):
        tolerance = 0.1 if self.dtype == jnp.bfloat16 else 1e-5
        flat = dict(flatten({"beacon": grads}))
        for entry in table(self.config):
            for layer, key in enumerate(entry.keys):
                golden = self.data.get(f"grad.{key}")
                if golden is None:
                    continue
                ours = flat[entry.name]
                ours = ours[layer] if entry.stacked else ours
                golden = (golden.T if entry.linear else golden).reshape(ours.shape)
                self.compare(f"grad.{key}", ours, golden, tolerance)

    def start(self, batch, ratios):
        if self.memory is None:
            room = capacity(self.config, [*ratios, int(ratios[-1])])
            self.memory = init_memory(self.config, batch, room, self.dtype)

    def inference(self, call, ratios):
        name, ids, mask, labels = self.arrays(call)
        b, t = ids.shape
        self.start(b, ratios)
        lengths = mask.sum(1)
        arguments = (self.net, self.variables, self.memory, ids, lengths, ratios)
        out, after = feed(*arguments, outputs="logits")
        token_loss, sums = np.zeros((b, t)), np.zeros((b, 2))
        if labels is not None:
            shifted = shift(np.where(mask, labels, -100))
            losses, _ = feed(*arguments, outputs="loss", labels=shifted)
            token_loss = np.asarray(losses.token_loss)
            counted = shifted != -100
            sums = np.stack([(token_loss * counted).sum(1), counted.sum(1)], axis=1)
        logits = np.asarray(out.logits)
        self.compare_outputs(name, mask, logits, token_loss, sums, labels)
        self.memory = after
        if mask.all():
            golden = call["steps"][-1]["mem_after_sink_beacon_raw"]
            self.compare(f"{name}.sizes", self.sizes()[0], golden, 0)

    def sizes(self) -> np.ndarray:
        """(sink, beacon, raw) entries per row."""
        m = self.memory
        opened = m.open_entries(self.config.beacon.placement)
        return np.stack([m.sinks, m.slots - m.sinks, opened], axis=1)

    def greedy(self, call, ratios):
        prompt, tokens = self.data["gen.prompt"], self.data["gen.tokens"]
        b, n = prompt.shape
        self.start(b, ratios)
        out, self.memory = feed(
            self.net,
            self.variables,
            self.memory,
            prompt,
            np.full(b, n),
            ratios,
            outputs="logits",
        )
        golden = self.data["gen.prompt_logits_all"]
        self.compare("gen.prompt_logits", out.logits, golden, self.logits_tolerance)
        logits, sizes, taken = [out.last_logits], [], []
        static = static_ratios(self.memory, ratios)
        for step in range(tokens.shape[1]):
            sizes.append(self.sizes()[0])
            token = jnp.argmax(logits[-1], axis=-1)
            taken.append(token)
            if step == tokens.shape[1] - 1:
                break
            new, self.memory = decode_step(
                self.net,
                self.variables,
                self.memory,
                token,
                jnp.asarray(ratios),
                static=static,
            )
            logits.append(new)
        self.compare("gen.tokens", np.stack(taken, 1), tokens, 0)
        ours = np.stack(logits, 1)
        self.compare("gen.logits", ours, self.data["gen.logits"], self.logits_tolerance)
        self.compare("gen.mem_sizes", np.stack(sizes), self.data["gen.mem_sizes"], 0)

    def final_memory(self):
        """Sinks, beacons and the raw cache, keys turned back to position 0."""
        m, (sink, beacon, raw) = self.memory, self.sizes()[0]
        at = jnp.arange(m.capacity)
        cos, sin = cos_sin(self.config, -at, scaled=False)
        keys = rotate(m.k, cos, sin) / self.config.rope.attention_scale
        spans = {
            "sink": (0, sink),
            "beacon": (sink, sink + beacon),
            "raw": (sink + beacon, sink + beacon + raw),
        }
        tolerance = 0.1 if self.dtype == jnp.bfloat16 else 1e-5
        for name, golden in self.data.items():
            if not name.startswith("mem.") or name == "mem.sizes":
                continue
            part, layer = name.removeprefix("mem.").split(".")
            kind, letter = part.rsplit("_", 1)
            lo, hi = spans[kind]
            ours = np.asarray((keys if letter == "k" else m.v)[int(layer)])
            ours = ours[:, lo:hi].transpose(0, 2, 1, 3)
            self.compare(name, ours, golden, tolerance)


def shift(labels: np.ndarray) -> np.ndarray:
    """labels[:, t + 1] at t; the last one predicts nothing."""
    return np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)


def main(folders: list[str]) -> int:
    if not folders:
        print("usage: python -m tests.golden DIR [DIR...]", file=sys.stderr)
        return 2
    failed = 0
    print(f"{'case':46s} {'checks':>6s}  worst error / tolerance")
    for folder in folders:
        name = Path(folder).name
        try:
            checks = Replay(Path(folder)).run()
        except (ValueError, NotImplementedError) as refusal:
            print(f"{name:46s} UNSUPPORTED: {refusal}")
            failed += 1
            continue
        misses = [c for c in checks if not c.passed]
        failed += bool(misses) or not checks
        worst = max(checks, key=lambda c: c.error / (c.tolerance or 1e-30))
        print(
            f"{name:46s} {len(checks):6d}  {worst.what}: {worst.error:.1e} / "
            f"{worst.tolerance:g}  {'MISS' if misses else 'ok'}"
        )
        for c in misses:
            print(f"    {c.what}: {c.error:.2e} > {c.tolerance:g}")
    print(f"{len(folders) - failed} of {len(folders)} cases pass")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
