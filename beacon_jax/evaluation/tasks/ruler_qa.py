"""RULER's question answering: the documents of one data set as each other's haystack.

The data sets are read as published: SQuAD 2.0's dev file and HotpotQA's distractor dev
file. As in RULER the questions come in the file's order, those that SQuAD calls
impossible left out, and a prompt holds the question's own documents, then its
neighbours (SQuAD: of the same article), then any others, shuffled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.evaluation.inputs import TaskData
from beacon_jax.evaluation.tasks.ruler_text import Problem, Prompt

SQUAD = "the SQuAD 2.0 dev set (dev-v2.0.json of rajpurkar.github.io/SQuAD-explorer)"
HOTPOT = (
    "HotpotQA's distractor dev set "
    "(hotpot_dev_distractor_v1.json of hotpotqa.github.io)"
)


MOST = 16_384  # documents around a question: 2M tokens


class Question(NamedTuple):
    """needed, near: indices of documents: those with the answer, those of its topic."""

    text: str
    answers: list[str]
    needed: list[int]
    near: list[int]


class Bank(NamedTuple):
    """documents: all different, sorted. questions: in the file's order."""

    documents: list[str]
    questions: list[Question]


def read_squad(inputs: TaskData) -> Bank:
    """--data/ruler/dev-v2.0.json: {data: [{paragraphs: [{context, qas: [...]}]}]}.

    Raises:
      FileNotFoundError, ValueError: no such file, or nothing usable in it.
    """
    name = "ruler/dev-v2.0"
    (whole, *_) = inputs.rows(name, {"data": list}, SQUAD)
    found = []
    for i, article in enumerate(whole["data"], 1):
        reason = _fault(_article, article)
        if reason:
            inputs.skip("dev-v2.0.json, articles", i, reason)
        else:
            found.append(_article(article))
    documents = sorted({text for article in found for text, _ in article})
    index = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in found:
        own = list(dict.fromkeys(index[text] for text, _ in article))
        for text, asked in article:
            near = [i for i in own if i != index[text]]
            questions += [Question(q, a, [index[text]], near) for q, a in asked]
    return _bank(documents, questions, SQUAD)


def read_hotpot(inputs: TaskData) -> Bank:
    """--data/ruler/hotpot_dev_distractor_v1.json: [{question, answer, context, ...}].

    Raises:
      FileNotFoundError, ValueError: no such file, or nothing usable in it.
    """
    name = "ruler/hotpot_dev_distractor_v1"
    fields = {"question": str, "answer": str, "supporting_facts": list, "context": list}
    check = lambda row: _fault(_paragraphs, row)
    rows = inputs.rows(name, fields, HOTPOT, check)
    pairs = [_paragraphs(row) for row in rows]
    documents = sorted({text for a, b in pairs for text in (*a, *b)})
    index = {text: i for i, text in enumerate(documents)}
    questions = [
        Question(
            row["question"],
            [row["answer"]],
            [index[text] for text in needed],
            [index[text] for text in near],
        )
        for row, (needed, near) in zip(rows, pairs, strict=True)
    ]
    return _bank(documents, questions, HOTPOT)


def document_problem(
    rng: np.random.Generator, documents: Sequence[str], question: Question
) -> Problem:
    """A question over n documents; one unit: a document. All of them, then again.

    RULER always shows all ten documents of a HotpotQA row and fails where they do not
    fit; here the two that are needed are enough in short prompts.
    """
    near = rng.permutation(question.near)
    rest = rng.choice(len(documents), min(MOST, len(documents)), replace=False)
    rest = rest[~np.isin(rest, [*question.needed, *question.near])]
    order = np.concatenate([question.needed, near, rest]).astype(np.int32)
    place = rng.random(len(order), np.float32)

    def build(n: int) -> Prompt:
        chosen = np.arange(n) % len(order)
        chosen = chosen[np.argsort(place[chosen], kind="stable")]
        shown = [documents[i] for i in order[chosen]]
        context = "\n\n".join(f"Document {i}:\n{d}" for i, d in enumerate(shown, 1))
        command = (
            "Answer the question based on the given documents. Only give me the answer "
            "and do not output any other words."
        )
        return Prompt(
            f"{command}\n\nThe following are given documents.\n\n{context}\n\n"
            f"{command}\n\nQuestion: {question.text}",
            " Answer:",
            question.answers,
            {"documents": len(shown)},
        )

    return Problem(build, max(1, len(question.needed)), 32)


def _fault(read: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> str | None:
    """Why read(row) fails on a row that is not of the published form."""
    try:
        read(row)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _article(row: dict[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(paragraph, its (question, answers)) of an article of SQuAD."""
    found = []
    for paragraph in row["paragraphs"]:
        asked = [
            (str(q["question"]), [str(a["text"]) for a in q["answers"]])
            for q in paragraph["qas"]
            if q["answers"] and not q.get("is_impossible", False)
        ]
        found.append((str(paragraph["context"]), asked))
    return found


def _paragraphs(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The paragraphs of a HotpotQA row: those with the answer, the others."""
    facts = {title for title, _ in row["supporting_facts"]}
    needed, near = [], []
    for title, sentences in row["context"]:
        text = f"{title}\n{''.join(sentences)}"
        (needed if title in facts else near).append(text)
    if not needed:
        raise ValueError("no supporting fact in its context")
    return needed, near


def _bank(documents: list[str], questions: list[Question], where: str) -> Bank:
    if not questions:
        raise ValueError(f"--data has no question: the file should be {where}.")
    return Bank(documents, questions)
