"""RULER (Hsieh et al. 2024): 13 tasks at any length, for any tokenizer.

As in the benchmark a prompt has as many lines, words or documents as fit beside the
answer, the start of the answer is given, and the score is the share of right strings
that the answer contains. Under 4,096 tokens, where the benchmark stops working, tasks
ask for less (`levels`), and predictions note what (hops, common, shots).
"""

import functools
import logging
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.metrics import string_match_all, string_match_part
from beacon_jax.evaluation.prompts import Tokens
from beacon_jax.evaluation.tasks import ruler_qa as qa
from beacon_jax.evaluation.tasks import ruler_text as text
from beacon_jax.evaluation.tasks.base import Instance, Prediction
from beacon_jax.evaluation.tasks.generation import GenerationTask
from beacon_jax.inference.model import Model
from beacon_jax.tokenise import encode

log = logging.getLogger(__name__)

Make = Callable[[np.random.Generator, int], text.Problem | None]
OFFLINE = (*text.NEEDLES, "vt", "cwe", "fwe")
QA = ("qa_1", "qa_2")
ABOUT = {
    **dict.fromkeys(text.NEEDLES, "The magic value of a key, or all of several"),
    "vt": "All names that a chain of assignments gives one value",
    "cwe": "The most common words of a numbered list",
    "fwe": "The three most frequent coded words after '...'",
    "qa_1": "The answer to a SQuAD question, other paragraphs as haystack",
    "qa_2": "The answer to a HotpotQA question, other paragraphs as haystack",
}
# What a worked example of variable tracking may take, and hops, from the standard on.
CHAIN_LEVELS = ((4, 500), (4, 250), (4, 0), (2, 0))
COUNT_LEVELS = (
    text.Counts(10, 30, 3, (40, 10, 3)),  # from 4,096 tokens on
    text.Counts(10, 6, 1, (20, 3, 1)),
    text.Counts(10, 6, 1),
    text.Counts(5, 6, 1),
    text.Counts(3, 4, 1),
)


class Level(NamedTuple):
    """One way to ask. make: the problem of example i; None: it cannot be asked so.

    most: examples there are; None: any number.
    """

    make: Make
    most: int | None = None


class Ruler(GenerationTask):
    """One of the tasks; `task` is RULER's name of it."""

    metric = "match"

    def __init__(self, task: str):
        self.task = task
        self.name = f"ruler_{task}"
        self.title = f"RULER {task}"
        spec = text.NEEDLES.get(task)
        several = task in ("vt", "cwe", "fwe") or (
            spec is not None and spec.queries * spec.values > 1
        )
        self.binary, self.lead = not several, "" if task == "vt" else " "
        score = (
            "the share of them that the answer contains"
            if several
            else "whether the answer contains it"
        )
        self.about = f"{ABOUT[task]}. Score: {score}."

    def examples(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[Instance]:
        """`samples` per length, each with as much haystack as fits.

        Raises:
          ValueError: a length without room; names one with room.
          FileNotFoundError: qa_1, qa_2: no data set.
        """
        levels = self._levels(model, settings, inputs)
        tokens = functools.partial(_tokens, model, settings.chat)
        examples = []
        for length in settings.lengths:
            problems = self._choose(model, settings, length, levels(length))
            new, near = problems[0].new_tokens, 0
            for i, problem in enumerate(problems):
                near = prompts.fit(
                    functools.partial(tokens, problem),
                    length - new,
                    least=problem.least,
                    near=near,
                    name=self.name,
                )
                asked, made = problem.build(near), tokens(problem, near)
                info = {"answers": asked.answers, "new_tokens": new, **asked.info}
                examples.append(Instance(f"{length}/{i}", length, made, info))
        return examples

    def value(self, prediction: Prediction) -> float:
        score = string_match_part if self.task in QA else string_match_all
        return score(prediction["predicted"], prediction["answers"])

    def _choose(
        self,
        model: Model,
        settings: RunSettings,
        length: int,
        levels: Sequence[Level],
    ) -> list[text.Problem]:
        """The problems of the first level that fits.

        Below 4,096 tokens it should leave half of the prompt to more haystack than it
        has to have, unless it is the last one.
        """
        need = 0
        for number, level in enumerate(levels, 1):
            problems = self._problems(settings, level)
            if problems is None:
                continue
            new = problems[0].new_tokens
            size = max(len(_tokens(model, settings.chat, p, p.least)) for p in problems)
            need = size + new
            tight = length >= text.STANDARD or number == len(levels)
            if size <= (length - new) // (1 if tight else 2):
                if number > 1:
                    log.warning(
                        "%s at %d tokens asks for less than RULER: level %d of %d",
                        self.name,
                        length,
                        number,
                        len(levels),
                    )
                return problems
        w = model.window
        raise ValueError(
            f"--lengths has {length}: {self.name} needs {need} tokens with this "
            f"tokenizer; use {-(-need // w) * w} or more."
        )

    def _problems(
        self, settings: RunSettings, level: Level
    ) -> list[text.Problem] | None:
        """Makes a level's problems: the same at all lengths, to compare in pairs."""
        found = []
        bounds = (settings.samples, settings.limit, level.most)
        for i in range(min(b for b in bounds if b is not None)):
            seed = [settings.seed, zlib.crc32(self.name.encode()), i]
            problem = level.make(np.random.default_rng(seed), i)
            if problem is None:
                return None
            found.append(problem)
        return found

    def _levels(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> Callable[[int], list[Level]]:
        """What to ask at a length, from RULER's settings on to what asks for less."""
        if self.task in text.NEEDLES:
            return self._needle_levels(inputs)
        if self.task == "vt":
            chains = [
                Level(lambda rng, i, h=hops, t=tokens: _chain(model, rng, h, t))
                for hops, tokens in CHAIN_LEVELS
            ]
            return lambda length: chains
        if self.task == "cwe":
            return lambda length: [
                Level(lambda rng, i, c=counts: text.common_words_problem(rng, c))
                for counts in COUNT_LEVELS[length < text.STANDARD :]
            ]
        if self.task == "fwe":
            return lambda length: [
                Level(lambda rng, i: text.frequent_words_problem(rng, length))
            ]
        return self._document_levels(model, settings, inputs)

    def _needle_levels(self, inputs: TaskData) -> Callable[[int], list[Level]]:
        spec = text.NEEDLES[self.task]
        essays = text.Essays(inputs.haystack) if spec.haystack == "essay" else None
        fewer = spec._replace(
            keys=min(spec.keys, 2),
            values=min(spec.values, 2),
            queries=min(spec.queries, 2),
        )
        kinds = ((spec, 128), (spec, 64), (fewer, 48))
        made = [
            Level(lambda rng, i, s=s, n=n: text.needle_problem(s, rng, essays, n))
            for s, n in kinds
        ]
        return lambda length: made

    def _document_levels(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> Callable[[int], list[Level]]:
        bank = qa.read_squad(inputs) if self.task == "qa_1" else qa.read_hotpot(inputs)

        def levels(length: int) -> list[Level]:
            none = np.random.default_rng(0)
            fitting: list[qa.Question] = []
            for question in bank.questions:
                if len(fitting) == settings.samples:
                    break
                least = qa.document_problem(none, bank.documents, question)
                size = len(_tokens(model, settings.chat, least, least.least))
                if size + least.new_tokens <= length:
                    fitting.append(question)
            if not fitting:
                raise ValueError(
                    f"--lengths has {length}: no question of {self.name} fits with "
                    "its documents; use longer ones."
                )
            make = lambda rng, i: qa.document_problem(rng, bank.documents, fitting[i])
            return [Level(make, len(fitting))]

        return levels


def _tokens(model: Model, chat: str, problem: text.Problem, size: int) -> Tokens:
    asked = problem.build(size)
    return prompts.encode(model, asked.text, asked.prefix, chat)


def _chain(
    model: Model, rng: np.random.Generator, hops: int, tokens: int
) -> text.Problem | None:
    """Variable tracking with an example of up to `tokens` tokens (0: without one)."""
    if not tokens:
        return text.chain_problem(rng, hops, "")
    example = text.chain_example(rng, hops)
    size = lambda n: encode(model.tokenizer, example(n), "bare")
    if len(size(1)) > tokens:
        return None
    return text.chain_problem(rng, hops, example(prompts.fit(size, tokens, least=1)))


TASKS = {f"ruler_{task}": functools.partial(Ruler, task) for task in (*OFFLINE, *QA)}
# For models of 0.1 to 0.5 B parameters: what they can do at 4,096 tokens at all. How
# much of it was measured stands in docs/board.md.
BOARD = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "fwe",
)
GROUPS = {
    "board": tuple(f"ruler_{task}" for task in BOARD),
    "ruler": tuple(f"ruler_{task}" for task in OFFLINE),
    "ruler_qa": tuple(f"ruler_{task}" for task in QA),
    "ruler_all": tuple(TASKS),
}
