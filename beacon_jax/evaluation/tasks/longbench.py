"""LongBench v1 (Bai et al. 2023) and LongBench-E, as the paper runs them.

The 14 English tasks of the paper's table in five groups, the official prompts and
scores, the middle of long prompts cut out, no chat template for few-shot and code
tasks. --newline_stop chooses where answers end: "paper" is the release's protocol (all
question answering, and samsum, end with their first line), "official" is LongBench's
(samsum only); the release says that scores are far lower without.

One difference: both forbid an end or a line's end as the very first token of such an
answer; here a model that begins with one has answered nothing.
"""

import functools
from typing import Any

from beacon_jax.evaluation import metrics as scores
from beacon_jax.evaluation.inputs import RunSettings
from beacon_jax.evaluation.tasks.base import Prediction
from beacon_jax.evaluation.tasks.files import OnFiles, best, templates

WHERE = "data.zip of huggingface.co/datasets/THUDM/LongBench (its data/*.jsonl)"
# The paper's groups; the mean of a group is that of its tasks, the overall one that of
# all 14 tasks.
PAPER_GROUPS = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique"),
    "summarization": ("gov_report", "qmsum", "multi_news"),
    "few-shot": ("trec", "triviaqa", "samsum"),
    "code": ("lcc", "repobench-p"),
}
# LongBench-E has these, not all of the paper's, by the number of words.
E_TASKS = (
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
PARTS = ("0-4k", "4-8k", "8k+")
FEW_SHOT = PAPER_GROUPS["few-shot"]
UNWRAPPED = (*FEW_SHOT, *PAPER_GROUPS["code"])
STOPS = {
    "paper": (
        *PAPER_GROUPS["single-document QA"],
        *PAPER_GROUPS["multi-document QA"],
        "samsum",
    ),
    "official": ("samsum",),
}
SUMMARIES = (*PAPER_GROUPS["summarization"], "samsum")


class LongBench(OnFiles):
    """One task of it; even: of LongBench-E."""

    where = WHERE

    def __init__(self, task: str, *, even: bool = False):
        self.task, self.even = task, even
        self.name = f"longbench_e_{task}" if even else f"longbench_{task}"
        self.title = f"LongBench{'-E' if even else ''} {task}"
        self.file = f"longbench/{task}{'_e' if even else ''}"
        texts, counts = templates("longbench")
        self.template, self.new_tokens = texts[task], counts[task]
        self.lead = "" if self.template[-1].isspace() else " "
        self.wrapped = task not in UNWRAPPED
        self.metric = _metric(task)
        self.fields = {"input": str, "context": str, "answers": list, "length": int}
        if task == "trec":
            self.fields["all_classes"] = list
        self.about = (
            f"Score: {self.metric}, the best over the right answers. Prompts beyond "
            "--max_length lose their middle."
        )

    def prompt(self, row: dict[str, Any]) -> str:
        return self.template.format(context=row["context"], input=row["input"])

    def check(self, row: dict[str, Any]) -> str | None:
        texts = [*row["answers"], *(row.get("all_classes") or [])]
        if not row["answers"] or not all(isinstance(text, str) for text in texts):
            return "answers or all_classes are not texts"
        if self.task == "passage_retrieval_en" and not all(
            scores.PARAGRAPH.search(answer) for answer in row["answers"]
        ):
            return "an answer that is no 'Paragraph N'"
        return None

    def info(self, row: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
        ends = self.task in STOPS[settings.newline_stop]
        found = {"answers": row["answers"], "words": row["length"]}
        found["stop"] = ["\n"] if ends else []
        if self.task == "trec":
            found["all_classes"] = row["all_classes"]
        return found

    def value(self, prediction: Prediction) -> float:
        text, answers = prediction["predicted"], prediction["answers"]
        if self.task in FEW_SHOT:
            text = scores.first_line(text)
        if self.task == "trec":
            classes = prediction["all_classes"]
            score = functools.partial(scores.classification, classes=classes)
        elif self.task in SUMMARIES:
            score = scores.rouge_l_f
        else:
            score = {
                "passage_count": scores.count,
                "passage_retrieval_en": scores.retrieval,
                "lcc": scores.code_sim,
                "repobench-p": scores.code_sim,
            }.get(self.task, scores.qa_f1)
        return best(score, text, answers)

    def part(self, prediction: Prediction) -> str | None:
        if not self.even:
            return None
        words = prediction["words"]
        return PARTS[(words >= 4000) + (words >= 8000)]


def _metric(task: str) -> str:
    if task == "trec":
        return "accuracy"
    if task in SUMMARIES:
        return "ROUGE-L"
    if task in PAPER_GROUPS["code"]:
        return "similarity"
    return "accuracy" if task.startswith("passage_") else "F1"


PAPER_TASKS = tuple(task for group in PAPER_GROUPS.values() for task in group)
TASKS = {
    **{f"longbench_{t}": functools.partial(LongBench, t) for t in PAPER_TASKS},
    **{f"longbench_e_{t}": functools.partial(LongBench, t, even=True) for t in E_TASKS},
}
GROUPS = {
    "longbench": tuple(f"longbench_{t}" for t in PAPER_TASKS),
    "longbench_e": tuple(f"longbench_e_{t}" for t in E_TASKS),
}
