"""Three needles asked for in three turns (paper, table 2): accuracy and time per turn.

A method compresses the text once; later questions and answers continue its memory, each
turn after the answer that was really given. One that looks at the question has to
compress again for every turn, with the conversation so far in front of the question,
and its time shows that.

Needles are "The special magic Paris number is: 1234567.", of cities that the haystack
does not name if there are enough. Lengths without room for three turns (below ~350
tokens of a vocabulary of 512) have fewer.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from beacon_jax.compiling import Stopwatch
from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Method, remember_prompts
from beacon_jax.evaluation.reading import answer, answer_losses, read
from beacon_jax.evaluation.statistics import Triple, share
from beacon_jax.evaluation.tasks.base import Instance, Prediction
from beacon_jax.evaluation.tasks.haystack import Haystack
from beacon_jax.evaluation.tasks.synthetic import Draw, Drawn, Synthetic
from beacon_jax.inference.model import Model
from beacon_jax.inference.template import written
from beacon_jax.tokenise import encode

TURNS = 3
NAMES = """
Paris London Rome Tokyo Berlin Madrid Cairo Oslo Lima Delhi Vienna Dublin Prague Athens
Boston Chicago Denver Seattle Toronto Sydney Lisbon Warsaw Geneva Nairobi
"""
CITIES = tuple(NAMES.split())
ANNOUNCEMENT = "Memorize the special magic numbers hidden in the following text.\n\n"
LEAST = 16  # tokens of haystack


class MultiNeedle(Synthetic):
    name = "multi_needle"
    title = "Three needles in three turns"
    about = (
        "Share of the three right numbers [95 % bootstrap interval over texts] and of "
        "each turn's, all from one compressed memory; seconds per turn: see Time."
    )
    new_tokens = 16
    binary = False
    columns = MappingProxyType(
        {f"accuracy_turn{n}": f"turn {n}" for n in range(1, TURNS + 1)}
    )

    def source(self, model: Model, settings: RunSettings, inputs: TaskData) -> Haystack:
        return Haystack(inputs.haystack, model.tokenizer, max(settings.lengths))

    def example(self, draw: Draw) -> Drawn:
        """One needle in each third of the text, asked for in a random order."""
        rng, source, chat = draw.rng, draw.source, draw.settings.chat
        turns = self.turns(draw.model, chat, draw.length)
        cities, numbers = _draw(rng, source, turns)
        # `depth`, the grid's, has no meaning here.
        depths = [(i + float(rng.random())) / turns for i in range(turns)]
        order = rng.permutation(turns).tolist()
        start = int(rng.choice(source.starts))
        questions = [_question(cities[i]) for i in order]
        later = [self._turn(draw.model, chat, *q) for q in questions[1:]]

        def build(n: int) -> prompts.Tokens:
            hay = source.take(start, n)
            for i in reversed(range(turns)):
                at, _ = source.place(start, n, depths[i], aligned=True)
                hay = hay[:at] + _needle(cities[i], numbers[i]) + hay[at:]
            first, prefix = questions[0]
            text = f"{ANNOUNCEMENT}{hay}\n\n{first}"
            return draw.ask(text, prefix)

        rest = sum(map(len, later)) + turns * self.new_tokens
        room = draw.length - rest
        near = room - len(build(LEAST)) + LEAST
        count = prompts.fit(build, room, least=LEAST, near=near, name=self.name)
        return build(count), {
            "depths": [round(depths[i], 4) for i in order],
            "answers": [numbers[i] for i in order],
            "turns": [turn.tolist() for turn in later],
        }

    def turns(self, model: Model, chat: str, length: int) -> int:
        """Counts the turns: three, or as many as fit into `length`."""
        size = lambda city: len(encode(model.tokenizer, city, "bare"))
        city = max(CITIES, key=size)
        question, prefix = _question(city)
        needle = _needle(city, "1234567")
        for turns in range(TURNS, 1, -1):
            text = f"{ANNOUNCEMENT}{needle * turns}\n\n{question}"
            first = len(prompts.ask(model, text, prefix, chat)) + 2 * LEAST
            later = len(self._turn(model, chat, question, prefix))
            if first + (turns - 1) * later + turns * self.new_tokens <= length:
                return turns
        return 1

    @staticmethod
    def _turn(model: Model, chat: str, question: str, prefix: str) -> prompts.Tokens:
        """What stands between an answer and the next one."""
        if not prompts.templated(model, chat):
            text = f"\n\n{question}\n{prefix}"
            return encode(model.tokenizer, text, "behind")
        mark = "\u2020answer\u2020"
        roles = zip(("user", "assistant", "user"), ("?", mark, question), strict=True)
        turns = [{"role": role, "content": content} for role, content in roles]
        text = written(model.tokenizer, turns, thinks=False)
        if mark not in text:
            raise ValueError(
                "the tokenizer's chat template leaves answers out, which multi_needle "
                "needs: mend it, or use --chat=none."
            )
        return encode(model.tokenizer, text.split(mark)[1] + prefix, "behind")

    def further(self, model: Model, example: Instance) -> list[np.ndarray]:
        """The turns behind the first one, and the answer of each."""
        turns = [np.asarray(turn, np.int32) for turn in example.info["turns"]]
        return turns + self._answers(model, example)

    def _answers(self, model: Model, example: Instance) -> list[np.ndarray]:
        asked = [example.tokens, *example.info["turns"]]
        return [
            encode(model.tokenizer, f" {answer}", "behind", int(tokens[-1]))
            for tokens, answer in zip(asked, example.info["answers"], strict=True)
        ]

    def run(
        self, model: Model, method: Method, batch: Sequence[Instance]
    ) -> list[dict[str, Any]]:
        right = [self._answers(model, e) for e in batch]
        watch, compiled = Stopwatch(), 0.0
        asked = [e.tokens for e in batch]  # the conversation, as far as it is asked
        memory, following, kept = remember_prompts(model, method, asked)
        texts, losses, seconds = [], [], []
        turns, ratio = len(batch[0].info["answers"]), method.live_ratio
        for turn in range(turns):
            logits, memory = read(model, following, ratio, memory)
            found = answer(model, memory, logits, self.new_tokens, ratio)
            took, made = watch.read()
            seconds.append(took)
            compiled += made
            wanted = [answers[turn] for answers in right]
            losses.append(answer_losses(model, memory, logits, wanted, ratio))
            texts.append(found.texts)
            if turn + 1 == turns:
                break
            watch = Stopwatch()  # without the losses
            memory = found.memory
            following = [np.asarray(e.info["turns"][turn], np.int32) for e in batch]
            asked = [
                np.concatenate(parts)
                for parts in zip(asked, found.tokens, following, strict=True)
            ]
            if method.question_aware:
                memory, following, _ = remember_prompts(model, method, asked)
        return [
            {
                "predicted": [turn[row] for turn in texts],
                "answer_loss": float(np.mean([turn[row] for turn in losses])),
                "kv_bytes": kept[row],
                "seconds": seconds,
                "compile_seconds": compiled,
            }
            for row in range(len(batch))
        ]

    def hits(self, prediction: Prediction) -> list[bool]:
        """Whether each turn's answer has its number."""
        pairs = zip(prediction["answers"], prediction["predicted"], strict=True)
        return [answer in text for answer, text in pairs]

    def value(self, prediction: Prediction) -> float:
        return float(np.mean(self.hits(prediction)))

    def details(self, found: Sequence[Prediction]) -> dict[str, Triple]:
        """The accuracy of each turn."""
        hits = np.asarray([self.hits(p) for p in found], np.float64)
        return dict(zip(self.columns, map(share, hits.T), strict=False))


def _draw(
    rng: np.random.Generator, source: Haystack, count: int
) -> tuple[list[str], list[str]]:
    """Cities and numbers, all different and not in the haystack if that can be."""
    free = [city for city in CITIES if city not in source.text]
    pool = free if len(free) >= count else list(CITIES)
    cities = rng.permutation(pool)[:count].tolist()
    numbers: list[str] = []
    while len(numbers) < count:
        number = str(rng.integers(10**6, 10**7))
        if number not in numbers and number not in source.text:
            numbers.append(number)
    return cities, numbers


def _needle(city: str, number: str) -> str:
    return f"\nThe special magic {city} number is: {number}.\n"


def _question(city: str) -> tuple[str, str]:
    """A turn's question and the beginning of its answer."""
    return (
        f"What is the special magic {city} number?",
        f"The special magic {city} number is:",
    )
