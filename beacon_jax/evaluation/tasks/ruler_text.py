"""RULER's synthetic problems as pure functions (Hsieh et al. 2024, arXiv 2404.06654).

The wording of prompts, needles and answer prefixes is the benchmark's (NVIDIA/RULER,
Apache-2.0, `scripts/data/synthetic/constants.py`): it decides scores. The generators
are written from the paper and the public protocol. A problem draws everything it could
need when it is made; `build(n)` then says how it reads with n units of haystack, so
that a size can be searched for and the same problem comes out every time.

Where we differ from the public scripts, on purpose:
  * needles lie at depths out of 40 in every haystack; theirs do so in essays only and
    take a random line elsewhere;
  * texts begin at a random sentence; theirs all begin with the first essay;
  * keys, values and words of one prompt are all different, none occurs in the essays;
  * below 4,096 tokens ruler.py takes away the example, then some of what is asked for,
    where theirs stop with an error.
"""

import itertools
import math
import re
import string
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.evaluation import words

DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again."
)
STANDARD = 4096  # tokens from which RULER uses its full settings


class Prompt(NamedTuple):
    """A question with its answers.

    Attributes:
      prefix: the start of the answer, which is given to the model.
    """

    text: str
    prefix: str
    answers: list[str]
    info: dict[str, Any]


class Problem(NamedTuple):
    """One example before its size is known.

    build: the prompt with n >= least units of haystack; more units, more tokens.
    new_tokens: what the answer may take.
    """

    build: Callable[[int], Prompt]
    least: int
    new_tokens: int


class Essays:
    """Texts as one stream of words, with the places where sentences begin.

    A sentence ends with a word that ends in . ? or ! (RULER: nltk, which downloads its
    model). Texts with fewer than one such word in 60 count every word as a sentence.
    """

    END = re.compile(r"[.?!][\"')\]]*$")

    def __init__(self, texts: Sequence[str]):
        self.words = [word for text in texts for word in text.split()]
        if not self.words:
            raise ValueError("--haystack has no words: name a folder with text files.")
        self.text = " ".join(self.words)
        starts = [0]
        for i, word in enumerate(self.words[:-1]):
            if self.END.search(word):
                starts.append(i + 1)
        if len(starts) < len(self.words) / 60:
            starts = list(range(len(self.words)))
        self.starts = np.asarray(starts)

    def take(self, start: int, count: int) -> list[list[str]]:
        """`count` words from word `start` on as sentences, the texts in a circle."""
        size = len(self.words)
        turns = -(-(start + count) // size)
        flat = self.words[start : start + count]
        while len(flat) < count:
            flat += self.words[: count - len(flat)]
        cuts = (self.starts + size * np.arange(turns)[:, None]).ravel() - start
        cuts = cuts[(cuts > 0) & (cuts < count)].tolist()
        return [
            flat[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True) if b > a
        ]


class Needles(NamedTuple):
    """A task of the niah family: synthetic.yaml of RULER.

    haystack: noise, needle or essay. keys, values: numbers, words or uuids.
    """

    haystack: str
    key: str
    value: str
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", keys=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", values=4),
    "niah_multiquery": Needles("essay", "words", "numbers", keys=4, queries=4),
}


def needle_problem(
    spec: Needles,
    rng: np.random.Generator,
    essays: Essays | None,
    new_tokens: int = 128,
) -> Problem:
    """Needles in noise lines, in other needles or in essays; one unit: a line, a word.

    info: `depths` of the needles in percent of the sentences or lines, in order.
    """
    draw = _Unique(rng, essays.text if essays else "")
    keys = [draw(spec.key) for _ in range(spec.keys)]
    values = [[draw(spec.value) for _ in range(spec.values)] for _ in keys]
    pairs = [(k, v) for k, vs in zip(keys, values, strict=True) for v in vs]
    needles = [_needle(spec.value, *pairs[i]) for i in rng.permutation(len(pairs))]
    depths = np.sort(rng.choice(DEPTHS, len(needles), replace=False)).tolist()
    asked = rng.choice(spec.keys, spec.queries, replace=False).tolist()
    start = int(rng.choice(essays.starts)) if essays else 0
    lines: list[str] = []  # as many as the largest haystack needed so far

    def haystack(n: int) -> list[str]:
        if essays is not None:
            return [" ".join(sentence) for sentence in essays.take(start, n)]
        if spec.haystack == "noise":
            return [NOISE] * n
        while len(lines) < n:
            lines.append(_needle(spec.value, draw(spec.key), draw(spec.value)))
        return lines[:n]

    def build(n: int) -> Prompt:
        hay = haystack(n)
        places = [int(len(hay) * depth / 100) for depth in depths]
        for place, needle in zip(reversed(places), reversed(needles), strict=True):
            hay.insert(place, needle)
        text, prefix = _ask(
            spec, ("\n" if essays is None else " ").join(hay), [keys[i] for i in asked]
        )
        answers = [value for i in asked for value in values[i]]
        return Prompt(text, prefix, answers, {"depths": depths})

    return Problem(build, 1, new_tokens)


def chain_problem(rng: np.random.Generator, hops: int, example: str) -> Problem:
    """Variable tracking: `hops` + 1 names get one value, in order, among noise lines.

    example: a worked one to stand in front, "" for none.
    """
    names, value = _names(rng, hops + 1, 5, example), _value(rng)
    places = np.sort(rng.random(hops + 1))

    info = {"hops": hops, "shots": int(bool(example))}

    def build(n: int) -> Prompt:
        text, prefix = _chain(names, value, places, n)
        return Prompt(example + text, prefix, names, info)

    return Problem(build, 1, 30)


def chain_example(rng: np.random.Generator, hops: int) -> Callable[[int], str]:
    """A worked example of variable tracking with n noise lines, 3-letter names."""
    names, value = _names(rng, hops + 1, 3, ""), _value(rng)
    places = np.sort(rng.random(hops + 1))

    def build(n: int) -> str:
        text, prefix = _chain(names, value, places, n)
        return f"{text}{prefix} {' '.join(names)}\n\n"

    return build


class Counts(NamedTuple):
    """How often words occur: `common` words `often` times, all others `rarely`.

    example: (words, often, rarely) of the worked example; None: there is none.
    """

    common: int
    often: int
    rarely: int
    example: tuple[int, int, int] | None = None


def common_words_problem(rng: np.random.Generator, counts: Counts) -> Problem:
    """Common-word extraction over a numbered list; one unit: one more word."""
    order = rng.permutation(len(words.words()))
    draw = _Unique(rng, "")
    extra: list[str] = []

    def pick(count: int) -> list[str]:
        """The first words of this problem; compounds once the list is used up."""
        while len(order) + len(extra) < count:
            extra.append(draw("words"))
        return ([words.words()[i] for i in order[:count]] + extra)[:count]

    shown, skip = "", 0
    if counts.example is not None:
        skip, often, rarely = counts.example
        text, prefix = _list_words(rng, pick(skip), counts.common, often, rarely)
        shown = f"{text}{prefix} {_numbered(pick(counts.common))}\n"
    seed = int(rng.integers(2**63))
    info = {"common": counts.common, "often": counts.often, "shots": int(skip > 0)}

    def build(n: int) -> Prompt:
        chosen = pick(skip + n)[skip:]
        text, prefix = _list_words(
            np.random.default_rng(seed),
            chosen,
            counts.common,
            counts.often,
            counts.rarely,
        )
        return Prompt(shown + text, prefix, chosen[: counts.common], info)

    return Problem(build, 2 * counts.common, 12 * counts.common)


def frequent_words_problem(rng: np.random.Generator, length: int) -> Problem:
    """Frequent-word extraction: coded words, the k-th most frequent as often as 1/k².

    The most frequent one is written "..." and is noise; the next three are asked for.
    One unit: one more draw in the zeta distribution with exponent 2 (its sum is π²/6).
    """
    size = max(16, (length - 50) // 50)
    coded: dict[str, None] = {}
    while len(coded) < size:
        coded["".join(rng.choice(list(string.ascii_lowercase), 6))] = None
    vocabulary = ["...", *list(coded)[1:]]
    shares = np.arange(1, size + 1) ** -2.0 / (math.pi**2 / 6)
    seed = int(rng.integers(2**63))

    def build(n: int) -> Prompt:
        counts = (n * shares).astype(int)
        # In short texts the fourth and the fifth word can be equally frequent.
        counts[4:] = np.minimum(counts[4:], counts[3] - 1)
        text = np.repeat(vocabulary, counts)
        text = text[np.random.default_rng(seed).permutation(len(text))]
        return Prompt(
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(text)}\n"
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded "
            "text?",
            " Answer: According to the coded text above, the three most frequently "
            "appeared words are:",
            vocabulary[1:4],
            {},
        )

    return Problem(build, math.ceil(1 / shares[3]), 50)


class _Unique:
    """Draws numbers, words and uuids that are all different and not in a text."""

    def __init__(self, rng: np.random.Generator, text: str):
        self.rng, self.text, self.seen = rng, text, set()

    def __call__(self, kind: str) -> str:
        while True:
            value = self._any(kind)
            if value not in self.seen and value not in self.text:
                self.seen.add(value)
                return value

    def _any(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.integers(10**6, 10**7))
        if kind == "words":
            return words.compound(self.rng)
        return str(uuid.UUID(bytes=self.rng.bytes(16), version=4))


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _ask(spec: Needles, context: str, keys: Sequence[str]) -> tuple[str, str]:
    """Prompt and answer prefix, in the singular if there is one value to find."""
    single = spec.queries * spec.values == 1
    kind = spec.value[:-1] if single else spec.value
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    some, what, be = ("A", "is", "is") if single else ("Some", "are all", "are")
    text = (
        f"{some} special magic {kind} {be} hidden within the following text. Make sure "
        f"to memorize it. I will quiz you about the {kind} afterwards.\n{context}\n"
        f"What {what} the special magic {kind} for {query} mentioned in the provided "
        "text?"
    )
    prefix = (
        f" The special magic {kind} for {query} mentioned in the provided text {be}"
    )
    return text, prefix


def _names(rng: np.random.Generator, count: int, letters: int, text: str) -> list[str]:
    """Different names of capital letters, none of them in a text."""
    found: dict[str, None] = {}
    while len(found) < count:
        name = "".join(rng.choice(list(string.ascii_uppercase), letters))
        if name not in text:
            found[name] = None
    return list(found)


def _value(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _chain(
    names: Sequence[str], value: str, places: np.ndarray, lines: int
) -> tuple[str, str]:
    """Prompt and prefix; assignment i stands in front of noise line places[i] * n."""
    chain = [f"VAR {names[0]} = {value}"]
    # The blank at the end is the benchmark's.
    chain += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
    text = [NOISE] * lines
    for place, line in zip(places[::-1], chain[::-1], strict=True):
        text.insert(int(place * (lines + 1)), line)
    context = "\n".join(text)
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the "
        f"following text.\n\n{context}\nQuestion: Find all variables that are assigned "
        f"the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are: ",
    )


def _list_words(
    rng: np.random.Generator,
    chosen: Sequence[str],
    common: int,
    often: int,
    rarely: int,
) -> tuple[str, str]:
    """Prompt and prefix; the first `common` of the chosen words are the frequent ones.

    rng: shuffles the list.
    """
    entries = list(chosen[:common]) * often + list(chosen[common:]) * rarely
    entries = [entries[i] for i in rng.permutation(len(entries))]
    return (
        "Below is a numbered list of words. In these words, some appear more often "
        "than others. Memorize the ones that appear most often.\n"
        f"{_numbered(entries)}\nQuestion: What are the {common} most common words in "
        "the above list?",
        f" Answer: The top {common} words that appear most often in the list are:",
    )


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
