"""BABILong-like: facts of a small world spread over a long text (Kuratov et al. 2024).

qa1 needs one fact, qa2 two, qa3 three, all in their order: what changed last counts.
Our own stories (`world`) and wording; the benchmark's scoring. The sentences between
name nobody and nothing of the stories.
"""

import re

import numpy as np

from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.tasks import world
from beacon_jax.evaluation.tasks.base import Prediction
from beacon_jax.evaluation.tasks.synthetic import Draw, Drawn, Synthetic
from beacon_jax.inference.model import Model

FACT_TOKENS = 48  # of the prompt per fact: a vocabulary of 512 takes 13 for one
NAMED = re.compile("|".join([*world.PEOPLE, *world.PLACES, *world.THINGS]), re.I)
LONGEST = 200  # characters of a sentence; code has few full stops


class Babilong(Synthetic):
    kind = 1
    about = (
        "The right place and no other in the answer's first sentence [95 % Wilson "
        "interval]; guessing: 0.17."
    )
    new_tokens = 16

    def source(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[str]:
        """Sentences, in order. Raises ValueError if there are none."""
        room = 16 * max(settings.lengths) + 200_000  # characters, as in `Haystack`
        text = "\n\n".join(inputs.haystack)[:room]
        found = [s for s in sentences(text) if not NAMED.search(s)]
        if not found:
            raise ValueError(
                "--haystack has no sentence without a name of the stories "
                f"({NAMED.pattern}): name a folder with other text."
            )
        return found

    def example(self, draw: Draw) -> Drawn:
        least, most = world.FACTS[self.kind]
        facts = min(max(draw.length // FACT_TOKENS, least), most)
        story = world.tell(self.kind, draw.rng, facts)
        places = np.sort(draw.rng.random(facts))
        source, start = draw.source, int(draw.rng.integers(len(draw.source)))

        def build(n: int) -> prompts.Tokens:
            hay = [source[(start + i) % len(source)] for i in range(n)]
            for place, fact in zip(places[::-1], story.facts[::-1], strict=True):
                hay.insert(int(place * (n + 1)), fact)
            text = (
                "Facts about people are hidden in the text. Answer the question from "
                f"them; later facts replace earlier ones.\n\n{' '.join(hay)}\n\n"
                f"Question: {story.question}"
            )
            return draw.ask(text, story.begun)

        room = draw.length - self.new_tokens
        count = prompts.fit(build, room, name=self.name)
        return build(count), {
            "question": story.question,
            "facts": facts,
            "answers": [story.answer],
        }

    def value(self, prediction: Prediction) -> float:
        answer, question = prediction["answers"][0], prediction["question"]
        return float(only_label(prediction["predicted"], question, answer))


class Qa1(Babilong):
    name, title, kind = "babilong_qa1", "BABILong-like qa1: where a person is", 1


class Qa2(Babilong):
    name, title, kind = "babilong_qa2", "BABILong-like qa2: where a thing is", 2


class Qa3(Babilong):
    name, title, kind = "babilong_qa3", "BABILong-like qa3: where a thing was", 3


def only_label(predicted: str, question: str, answer: str) -> bool:
    """Whether the answer's first sentence has the right place and no other one.

    Places that the question has do not count (BABILong's `compare_answers`).
    """
    sentence = predicted.lower().split(".")[0].split("question")[0]
    named = {p for p in world.PLACES if p in sentence and p not in question.lower()}
    return named == {answer}


def sentences(text: str) -> list[str]:
    """Pieces that end with . ! or ?, else with a line, else after 200 characters."""
    found = []
    for piece in re.split(r"(?<=[.!?])\s+", text):
        lines = [piece] if len(piece) <= LONGEST else piece.split("\n")
        for line in lines:
            words = " ".join(line.split())
            found += [words[i : i + LONGEST] for i in range(0, len(words), LONGEST)]
    return found
