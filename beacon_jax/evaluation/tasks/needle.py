"""Needle in a haystack: one sentence hidden in a long text, length × depth.

`needle` is the published test (Kamradt 2023): its needle, question and instruction, the
needle moved back to the end of a sentence. `needle_release` is the one of the paper's
release: another needle, an announcement, any token. Both with our haystack, the
documents in sorted order and again from the first; each sample begins at a random
sentence, where the originals always begin at the first.

The originals cut the text to its length and then decode, wrap and encode it again, so
that prompts miss the length by some tokens. Here the wrapped prompt is measured, and
one more token of haystack would not fit.

Scores: `needle` by the share of its three facts (the original asks a GPT for a mark
from 1 to 10, as the paper does), and ROUGE-L recall against the needle as in the
release, which 1.0 only for an answer that repeats the whole sentence. The release's
training data has needles of this kind, so for its models the test is in-domain.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from beacon_jax.evaluation import metrics as scores
from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.report import interval, pivot
from beacon_jax.evaluation.statistics import Triple, mean_interval
from beacon_jax.evaluation.tasks.base import Metric, Prediction
from beacon_jax.evaluation.tasks.haystack import Haystack
from beacon_jax.evaluation.tasks.synthetic import Draw, Drawn, Synthetic
from beacon_jax.inference.model import Model

LEAST = 16  # tokens of haystack, below which a depth means nothing


class Needle(Synthetic):
    name = "needle"
    title = "Needle in a haystack"
    about = (
        "Share of the needle's three facts in the answer [95 % bootstrap interval]; "
        "depth 0 is the beginning of the text, 1 its end, next to the question."
    )
    new_tokens = 50
    metric = "keyword_recall"
    binary = False

    announcement = ""
    needle = (
        "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores "
        "Park on a sunny day.\n"
    )
    # The release's "Answer:" is there for models without a chat template.
    question = (
        "\n\nWhat is the best thing to do in San Francisco? Don't give information "
        "outside the document or repeat your findings\nAnswer:"
    )
    keywords = ("sandwich", "Dolores Park", "sunny day")
    answer = "eat a sandwich and sit in Dolores Park on a sunny day."
    aligned = True
    second = "rouge_l_recall"  # metric of `second_value`

    def source(self, model: Model, settings: RunSettings, inputs: TaskData) -> Haystack:
        longest = max(settings.lengths)
        return Haystack(inputs.haystack, model.tokenizer, longest, "Dolores Park")

    def example(self, draw: Draw) -> Drawn:
        source, depth = draw.source, draw.depth
        start = int(draw.rng.choice(source.starts))

        def build(n: int) -> prompts.Tokens:
            at, _ = source.place(start, n, depth, aligned=self.aligned)
            hay = source.take(start, n)
            text = self.announcement + hay[:at] + self.needle + hay[at:] + self.question
            return prompts.encode(draw.model, text, chat=draw.settings.chat)

        room = draw.length - self.new_tokens
        near = room - len(build(LEAST)) + LEAST
        count = prompts.fit(build, room, least=LEAST, near=near, name=self.name)
        _, before = source.place(start, count, depth, aligned=self.aligned)
        return build(count), {
            "depth": depth,
            "placed": round(before / count, 4),
            "answers": [self.answer],
        }

    def value(self, prediction: Prediction) -> float:
        return scores.keyword_recall(prediction["predicted"], self.keywords)

    def second_value(self, prediction: Prediction) -> float:
        """ROUGE-L recall of the answer's first line against the whole needle."""
        line = prediction["predicted"].lstrip("\n").split("\n")[0]
        return scores.rouge_l_recall(line, self.needle.strip())

    def details(self, found: Sequence[Prediction]) -> dict[str, Triple]:
        values = np.asarray([self.second_value(p) for p in found])
        return {self.second: mean_interval(values)}

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        found = [m for m in metrics if m["metric"] == self.second]
        found.sort(key=lambda m: m["length"])
        cell = functools.partial(interval, digits=2)
        more = pivot(found, ["length", "method"], ["metric"], cell)
        return f"{super().report(metrics, folder)}\n{more}\n"


class NeedleRelease(Needle):
    name = "needle_release"
    title = "Needle in a haystack, as in the release"
    about = (
        "ROUGE-L recall of the answer's first line against the whole needle [95 % "
        "bootstrap interval]: 1 only for an answer that repeats the sentence."
    )
    metric = "rouge_l_recall"

    announcement = (
        "There is an important infomation hidden in the following context. Find the "
        "information and memorize it. I will quiz you about the important information "
        "there.\n"
    )
    needle = (
        "\n\nThe best thing to do in San Francisco is sitting in Dolores Park and "
        "eating a hamburg on a sunny day.\n\n"
    )
    question = "\n\nWhat is the best thing to do in San Francisco?\nAnswer:"
    keywords = ("hamburg", "Dolores Park", "sunny day")
    answer = "sitting in Dolores Park and eating a hamburg on a sunny day."
    aligned = False
    second = "keyword_recall"

    def value(self, prediction: Prediction) -> float:
        return super().second_value(prediction)

    def second_value(self, prediction: Prediction) -> float:
        return super().value(prediction)
