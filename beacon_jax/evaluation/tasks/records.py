"""Retrieval from records: nothing in them can be left out, and nothing compresses.

`json_kv`: one of many uuid pairs in a JSON object (InfiniteBench Retrieve.KV, HELMET
json_kv). `lines`: one of many numbered lines (LongEval). Both are made of random values
only, so that a compressor has to store all of them: the strictest tests here.
"""

import itertools
import re
import uuid
from collections.abc import Callable, Iterator

import numpy as np

from beacon_jax.evaluation import prompts, words
from beacon_jax.evaluation.tasks.base import Prediction
from beacon_jax.evaluation.tasks.synthetic import Draw, Drawn, Synthetic

STANDARD = 2048  # tokens from which `lines` has LongEval's wording


class RecordRetrieval(Synthetic):
    """Draws records one by one; the asked one stands at its depth among them."""

    lead = ""

    def record(self, rng: np.random.Generator) -> tuple[str, str]:
        """Draws (key, value) of one more record."""
        raise NotImplementedError

    def prompt(
        self, records: list[tuple[str, str]], key: str, length: int
    ) -> tuple[str, str]:
        """Returns (text, beginning of the answer)."""
        raise NotImplementedError

    def example(self, draw: Draw) -> Drawn:
        drawn = _distinct(lambda: self.record(draw.rng))
        asked = next(drawn)
        others: list[tuple[str, str]] = []

        def build(n: int) -> prompts.Tokens:
            others.extend(itertools.islice(drawn, max(n - 1 - len(others), 0)))
            at = round(draw.depth * (n - 1))
            records = [*others[:at], asked, *others[at : n - 1]]
            text, prefix = self.prompt(records, asked[0], draw.length)
            return draw.ask(text, prefix)

        room = draw.length - self.new_tokens
        count = prompts.fit(build, room, least=1, name=self.name)
        info = {"depth": draw.depth, "records": count, "answers": [asked[1]]}
        return build(count), info


class JsonKV(RecordRetrieval):
    name = "json_kv"
    title = "Key-value pairs in JSON"
    about = (
        "The 36 characters of a uuid, exactly [95 % Wilson interval]; depth is the "
        "place of its pair."
    )
    new_tokens = 40  # a uuid has at most 36 and ends with a quote

    def record(self, rng: np.random.Generator) -> tuple[str, str]:
        key, value = (str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2))
        return key, value

    def prompt(
        self, records: list[tuple[str, str]], key: str, length: int
    ) -> tuple[str, str]:
        pairs = ", ".join(f'"{key}": "{value}"' for key, value in records)
        return (
            "Extract the value corresponding to the specified key in the JSON object "
            f'below.\n\n{{{pairs}}}\n\nKey: "{key}"',
            'The value associated with the specified key is: "',
        )

    def value(self, prediction: Prediction) -> float:
        return float(prediction["answers"][0] in prediction["predicted"])


class Lines(RecordRetrieval):
    name = "lines"
    title = "Numbers of lines"
    about = (
        "The number of a line of the record: the first one in the answer [95 % Wilson "
        "interval]; depth is the place of the line."
    )
    new_tokens = 12

    def record(self, rng: np.random.Generator) -> tuple[str, str]:
        """A name and five digits. (LongEval's are 1 ... 50000: of any length.)"""
        return words.compound(rng), str(rng.integers(10_000, 100_000))

    def prompt(
        self, records: list[tuple[str, str]], key: str, length: int
    ) -> tuple[str, str]:
        """LongEval's wording from 2,048 tokens on; below, it would fill the prompt."""
        lines = "\n".join(f"line {k}: REGISTER_CONTENT is <{v}>" for k, v in records)
        prefix = f"The <REGISTER_CONTENT> in line {key} is <"
        if length < STANDARD:
            head = "Memorize the number of each line.\n\n"
            return f"{head}{lines}\n\nWhat is the number in line {key}?", prefix
        return (
            "Below is a record of lines I want you to remember. Each line begins with "
            "'line <line index>' and contains a '<REGISTER_CONTENT>' at the end of the "
            "line as a numerical value. For each line index, memorize its "
            "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask "
            "you to retrieve the corresponding <REGISTER_CONTENT> of a certain line "
            f"index. Now the record start:\n\n{lines}\n\nNow the record is over. Tell "
            f"me what is the <REGISTER_CONTENT> in line {key}? I need the number.",
            prefix,
        )

    def value(self, prediction: Prediction) -> float:
        found = re.search(r"\d+", prediction["predicted"])
        return float(found is not None and found[0] == prediction["answers"][0])


def _distinct(draw: Callable[[], tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Records with different keys, without end; the first one's value is its own."""
    first = draw()
    yield first
    keys = {first[0]}
    while True:
        key, value = draw()
        if key not in keys and value != first[1]:
            keys.add(key)
            yield key, value
