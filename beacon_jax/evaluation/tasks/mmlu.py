"""MMLU (Hendrycks et al. 2021) by the release's protocol (its main/eval_mmlu.py).

Nothing is generated: the answer is the letter with the lowest loss after the question.
No examples in front by default, as there; `mmlu_5shot` has up to five of the subject
from the dev set. The number is the mean over subjects, as are those of the four
categories. Prompts are far shorter than a window of 2,048, so that nothing is
compressed there: this measures what training beacons did to short contexts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Method
from beacon_jax.evaluation.reading import answer_losses
from beacon_jax.evaluation.tasks.base import Instance, Prediction
from beacon_jax.evaluation.tasks.files import OnFiles
from beacon_jax.inference.model import Model
from beacon_jax.tokenise import encode

LETTERS = "ABCD"
LONGEST = 4096  # tokens of a question with five examples
CATEGORIES = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry "
    "college_computer_science college_mathematics college_physics computer_security "
    "conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics "
    "machine_learning",
    "social sciences": "econometrics high_school_geography "
    "high_school_government_and_politics high_school_macroeconomics "
    "high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology "
    "us_foreign_policy",
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies "
    "moral_disputes moral_scenarios philosophy prehistory professional_law "
    "world_religions",
}
CATEGORY = {
    subject: name for name, text in CATEGORIES.items() for subject in text.split()
}


class Mmlu(OnFiles):
    file = "mmlu/test"
    where = (
        "the data of the Activation Beacon release, or the rows of "
        "huggingface.co/datasets/cais/mmlu"
    )
    new_tokens = 1
    metric = "accuracy"

    def __init__(self, shots: int = 0):
        self.shots = shots
        self.name = f"mmlu_{shots}shot" if shots else "mmlu"
        self.title = f"MMLU, {shots} examples" if shots else "MMLU"
        self.about = (
            "The letter with the lowest loss; means over subjects (the set has 57)."
        )
        self.fields = {"subject": str, "choices": list, "answer": (int, str)}
        self._shown: dict[str, str] = {}

    def length(self, settings: RunSettings) -> int:
        return min(settings.max_length, LONGEST)

    def examples(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[Instance]:
        self._shown = self._examples_of_subjects(inputs) if self.shots else {}
        found = super().examples(model, settings, inputs)
        template = getattr(model.tokenizer, "chat_template", None)
        for example in found:
            example.info["space"] = settings.chat == "none" or not template
        return found

    def check(self, row: dict[str, Any]) -> str | None:
        if not isinstance(row.get("query", row.get("question")), str):
            return "no query"
        if len(row["choices"]) != len(LETTERS):
            return f"{len(row['choices'])} choices"
        known = (*range(len(LETTERS)), *LETTERS)
        return None if row["answer"] in known else f"answer {row['answer']!r}"

    def prompt(self, row: dict[str, Any]) -> str:
        subject = row["subject"].replace("_", " ")
        return (
            "The following are multiple choice questions (with answers) about "
            f"{subject}.\n\n{self._shown.get(row['subject'], '')}{_question(row)}"
        )

    def info(self, row: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
        return {"answers": [_letter(row["answer"])], "subject": row["subject"]}

    def further(self, model: Model, example: Instance) -> list[np.ndarray]:
        """The answers, as they stand behind the question."""
        space, last = " " * example.info["space"], int(example.tokens[-1])
        return [encode(model.tokenizer, space + x, "behind", last) for x in LETTERS]

    def run(
        self, model: Model, method: Method, batch: Sequence[Instance]
    ) -> list[dict[str, Any]]:
        memory, logits, kept = self.read(model, method, batch)
        losses = []
        for references in zip(*(self.further(model, e) for e in batch), strict=True):
            ratio = method.live_ratio
            losses.append(answer_losses(model, memory, logits, references, ratio))
        return [
            {
                "predicted": LETTERS[int(np.argmin(row))],
                "answer_loss": row[LETTERS.index(example.info["answers"][0])],
                "losses": list(row),
                "kv_bytes": held,
            }
            for example, row, held in zip(
                batch, zip(*losses, strict=True), kept, strict=True
            )
        ]

    def value(self, prediction: Prediction) -> float:
        return float(prediction["predicted"] == prediction["answers"][0])

    def part(self, prediction: Prediction) -> str | None:
        return CATEGORY.get(prediction["subject"], "others")

    def weights(self, found: Sequence[Prediction]) -> np.ndarray:
        """Weighs rows so that every subject counts the same."""
        rows = Counter(p["subject"] for p in found)
        share = len(found) / len(rows)
        return np.asarray([share / rows[p["subject"]] for p in found])

    def _examples_of_subjects(self, inputs: TaskData) -> dict[str, str]:
        shown: dict[str, list[str]] = {}
        for row in inputs.rows("mmlu/dev", self.fields, self.where, self.check):
            texts = shown.setdefault(row["subject"], [])
            if len(texts) < self.shots:
                texts.append(f"{_question(row)} {_letter(row['answer'])}\n\n")
        return {subject: "".join(texts) for subject, texts in shown.items()}


def _question(row: dict[str, Any]) -> str:
    query = str(row.get("query", row.get("question"))).strip()
    options = [f"{x}. {c}" for x, c in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([query, *options, "Answer:"])


def _letter(answer: int | str) -> str:
    return answer if isinstance(answer, str) else LETTERS[answer]


TASKS = {"mmlu": Mmlu, "mmlu_5shot": lambda: Mmlu(5)}
