"""Topic retrieval (LongEval) and InfiniteBench, as the Activation Beacon release runs
them."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from beacon_jax.evaluation import metrics as scores
from beacon_jax.evaluation.inputs import RunSettings
from beacon_jax.evaluation.statistics import Triple, mean_interval
from beacon_jax.evaluation.tasks.base import Prediction
from beacon_jax.evaluation.tasks.files import OnFiles, best, templates

# What InfiniteBench takes for the ends of words in answers to kv_retrieval.
ENDS = re.compile(r"[\n:\"'.,?!{}]")


class TopicRetrieval(OnFiles):
    """Conversations about one topic after another; the first topic is asked for.

    The prompt is the row's `context` and `question`, and the score whether the answer
    contains the topic, in any case; one part per number of topics.
    """

    name = "topic_retrieval"
    title = "LongEval topic retrieval"
    about = "Score: whether the answer contains the first topic of the conversation."
    file = "longeval/topic_retrieval"
    where = (
        "the data of the Activation Beacon release (long-llm.tar.gz of "
        "huggingface.co/datasets/namespace-Pt/projects)"
    )
    new_tokens = 50
    binary = True

    def __init__(self) -> None:
        self.fields = {
            "context": str,
            "question": str,
            "topics": list,
            "num_topics": int,
        }

    def prompt(self, row: dict[str, Any]) -> str:
        return f"{row['context']} {row['question']}"

    def check(self, row: dict[str, Any]) -> str | None:
        topics = row["topics"]
        return None if topics and isinstance(topics[0], str) else "topics has no text"

    def info(self, row: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
        return {"answers": row["topics"][:1], "topics": row["num_topics"]}

    def value(self, prediction: Prediction) -> float:
        return scores.string_match_part(prediction["predicted"], prediction["answers"])

    def part(self, prediction: Prediction) -> str | None:
        return f"{prediction['topics']} topics"

    def details(self, found: Sequence[Prediction]) -> dict[str, Triple]:
        """The release's other number."""
        values = [scores.qa_f1(p["predicted"], p["answers"][0]) for p in found]
        return {"F1": mean_interval(np.asarray(values))}


class InfiniteBench(OnFiles):
    """One task of InfiniteBench (Zhang et al. 2024); `task` is its name there.

    Prompts are those for base models (YaRN-Mistral), scores those of the release: a
    summary's is ROUGE-L of `rouge`, where the benchmark's own code has rougeLsum of
    Google's package.
    """

    where = "huggingface.co/datasets/xinrongzhang2022/InfiniteBench"

    def __init__(self, task: str, name: str):
        self.task, self.name = task, f"infinitebench_{name}"
        self.title = f"InfiniteBench {task}"
        self.file = f"infinitebench/{task}"
        texts, counts = templates("infinitebench")
        self.template, self.new_tokens = texts[task], counts[task]
        self.fields = {"context": str, "input": str, "answer": (list, str)}
        self.metric = {"longbook_qa_eng": "F1", "longbook_sum_eng": "ROUGE-L"}.get(
            task, "accuracy"
        )
        self.binary = self.metric == "accuracy"
        self.about = (
            f"Score: {self.metric}. Prompts beyond --max_length (128000 in the "
            "release) lose their middle."
        )

    def prompt(self, row: dict[str, Any]) -> str:
        return self.template.format(context=row["context"], input=row["input"])

    def check(self, row: dict[str, Any]) -> str | None:
        answers = _list(row["answer"])
        if not answers or not all(isinstance(a, (str, int)) for a in answers):
            return "answer is not a text"
        return None

    def info(self, row: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
        return {"answers": [str(a) for a in _list(row["answer"])]}

    def value(self, prediction: Prediction) -> float:
        text, answers = prediction["predicted"], prediction["answers"]
        if self.task == "longbook_qa_eng":
            return best(scores.qa_f1, text, answers)
        if self.task == "longbook_sum_eng":
            return scores.rouge_l_f(text, answers[0])
        if self.task == "kv_retrieval":
            return float(answers[0] in ENDS.sub(" ", text).split())
        return float(scores.first_integer(text) == answers[0])


def _list(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


INFINITEBENCH = {
    "en_qa": "longbook_qa_eng",
    "en_sum": "longbook_sum_eng",
    "passkey": "passkey",
    "number_string": "number_string",
    "kv_retrieval": "kv_retrieval",
}
TASKS = {
    "topic_retrieval": TopicRetrieval,
    **{
        f"infinitebench_{name}": functools.partial(InfiniteBench, task, name)
        for name, task in INFINITEBENCH.items()
    },
}
GROUPS = {"infinitebench": tuple(f"infinitebench_{name}" for name in INFINITEBENCH)}
