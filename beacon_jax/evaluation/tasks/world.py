"""Small worlds of people, places and things, and questions about them.

Stories like those of bAbI's first three tasks (Weston et al. 2015): who goes where, who
takes and drops what. Written from their description; names and places are theirs, which
BABILong's scoring knows.
"""

import itertools
from typing import NamedTuple

import numpy as np

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GO = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TAKE = ("got", "picked up", "took", "grabbed")
DROP = ("dropped", "put down", "left", "discarded")
# Fewest facts that a question needs, and the most that are told.
FACTS = {1: (1, 8), 2: (2, 16), 3: (3, 24)}


class Story(NamedTuple):
    """facts: in order. begun: beginning of a sentence that the answer ends."""

    facts: list[str]
    question: str
    begun: str
    answer: str


def tell(kind: int, rng: np.random.Generator, count: int) -> Story:
    """A story of `count` facts with a question that it answers.

    Args:
      kind: 1: where a person is; 2: where a thing is, from who carries it; 3: where it
        was before.

    Raises:
      ValueError: too few facts for such a question.
    """
    if count < FACTS[kind][0]:
        raise ValueError(f"count={count} must be at least {FACTS[kind][0]}.")
    while True:  # half of all stories and more answer one; short ones of kind 3 1 in 10
        story = _World(kind, rng, count).story()
        if story is not None:
            return story


class _World:
    def __init__(self, kind: int, rng: np.random.Generator, count: int):
        self.kind, self.rng, self.count = kind, rng, count
        people = min(max(count // 3, 1), len(PEOPLE))
        things = min(max(count // 4, 1), len(THINGS)) if kind > 1 else 0
        self.people = rng.permutation(PEOPLE)[:people].tolist()
        self.things = rng.permutation(THINGS)[:things].tolist()
        self.where: dict[str, str] = {}  # people
        self.held: dict[str, str] = {}  # thing -> person
        self.trail: dict[str, list[str]] = {}  # thing -> its places, in order

    def story(self) -> Story | None:
        """None if nothing in it can be asked for."""
        facts = [self._happen() for _ in range(self.count)]
        asked = (self._person, self._thing, self._before)[self.kind - 1]()
        return None if asked is None else Story(facts, *asked)

    def _pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def _happen(self) -> str:
        """One fact, at random among those that can be."""
        takes = [
            (p, t)
            for p, place in self.where.items()
            for t in self.things
            if t not in self.held and self.trail.get(t, [place])[-1] == place
        ]
        drops = [(p, t) for t, p in self.held.items()]
        draw = self.rng.random()
        if takes and draw < 0.4:
            person, thing = self._pick(takes)
            self.held[thing] = person
            self.trail.setdefault(thing, [self.where[person]])
            return f"{person} {self._pick(TAKE)} the {thing}."
        if drops and draw > 0.85:
            person, thing = self._pick(drops)
            del self.held[thing]
            return f"{person} {self._pick(DROP)} the {thing}."
        person = self._pick(self.people)
        place = self._pick([p for p in PLACES if p != self.where.get(person)])
        self.where[person] = place
        for thing, holder in self.held.items():
            if holder == person:
                self.trail[thing].append(place)
        return f"{person} {self._pick(GO)} the {place}."

    def _person(self) -> tuple[str, str, str] | None:
        person = self._pick(list(self.where))
        return f"Where is {person}?", f"{person} is in the", self.where[person]

    def _thing(self) -> tuple[str, str, str] | None:
        if not self.trail:
            return None
        thing = self._pick(list(self.trail))
        return f"Where is the {thing}?", f"The {thing} is in the", self.trail[thing][-1]

    def _before(self) -> tuple[str, str, str] | None:
        """Asks for the place before one that the thing came to once only."""
        options = [
            (thing, a, b)
            for thing, trail in self.trail.items()
            for a, b in itertools.pairwise(trail)
            if trail.count(b) == 1
        ]
        if not options:
            return None
        thing, answer, place = self._pick(options)
        return (
            f"Where was the {thing} before the {place}?",
            f"Before the {place}, the {thing} was in the",
            answer,
        )
