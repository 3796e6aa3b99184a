"""Scores of answers: pure functions of strings, all in [0, 1].

Each computes what the benchmark's own code computes, quirks included
(docs/evaluation-protocols.md section 1.4; tests/evaluation/goldens has the values of
the public packages), because a score under another definition cannot be compared with
published ones. No packages: `rouge` 1.0.1 and `fuzzywuzzy` are a page of code each
once their defaults are fixed, unmaintained, and the second is GPL.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as SQuAD's
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"\d+")
PARAGRAPH = re.compile(r"Paragraph (\d+)")
CODE_NOISE = ("`", "#", "//")  # lines of Markdown and of comments
EPSILON = 1e-8  # of `rouge`: a perfect answer scores 1 - 5e-9


def normalize_answer(text: str) -> str:
    """Normalises as SQuAD: lower case, no punctuation or articles, single spaces."""
    plain = ARTICLES.sub(" ", text.lower().translate(PUNCTUATION))
    return " ".join(plain.split())


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the bags of normalised words (LongBench qa_f1_score)."""
    got = normalize_answer(prediction).split()
    want = normalize_answer(reference).split()
    same = sum((Counter(got) & Counter(want)).values())
    if not same:
        return 0.0
    precision, recall = same / len(got), same / len(want)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, reference: str) -> tuple[float, float]:
    """Returns (F, recall) of ROUGE-L as `rouge` 1.0.1 has it; (0, 0) of an empty text.

    "Summary level": sentences end at every full stop, words are split at spaces and
    counted once, and the words of the longest common subsequences of all pairs of
    sentences are united. Not the numbers of `rouge-score`: those differ by 16 points
    on summaries of several sentences (docs/evaluation-protocols.md section 1.4).
    `rouge` recurses once per word and fails on sentences of about 500 words, which
    LongBench scores 0; here they have their score.
    """
    got, want = _sentences(prediction), _sentences(reference)
    if not got or not want:
        return 0.0, 0.0
    found: set[str] = set()
    for reference_words in want:
        for words in got:
            found |= _common(reference_words, words)
    recall = len(found) / len(set().union(*want))
    precision = len(found) / len(set().union(*got))
    return 2.0 * (precision * recall / (precision + recall + EPSILON)), recall


def rouge_l_f(prediction: str, reference: str) -> float:
    """LongBench's and InfiniteBench's score of summaries."""
    return rouge_l(prediction, reference)[0]


def rouge_l_recall(prediction: str, reference: str) -> float:
    """The release's score of needles: only an answer that repeats all words gets 1."""
    return rouge_l(prediction, reference)[1]


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (number of classes named) if the right one is among them, else 0.

    LongBench drops named classes that are part of the right one's name ("Other" of
    "Other location"), but from the list that it walks: the one after a dropped one is
    never looked at and may stay. Kept, since it decides scores.
    """
    named = [c for c in classes if c in prediction]
    at = 0
    while at < len(named):
        if named[at] in reference and named[at] != reference:
            named.remove(named[at])
        at += 1
    return 1.0 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Share of the numbers in the answer that are the right one (passage_count)."""
    numbers = NUMBER.findall(prediction)
    return numbers.count(str(reference)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """`count` against the number in "Paragraph 7" (passage_retrieval_en).

    Raises:
      ValueError: a reference without such a number.
    """
    found = PARAGRAPH.search(reference)
    if found is None:
        raise ValueError(f"reference={reference!r} names no 'Paragraph N'")
    return count(prediction, found[1])


def code_sim(prediction: str, reference: str) -> float:
    """Similarity of the first line that is code, in steps of 0.01 (lcc, repobench-p).

    `fuzz.ratio` of fuzzywuzzy over python-Levenshtein: twice the longest common
    subsequence over both lengths. (Over difflib, fuzzywuzzy's other backend, scores
    differ by 2 to 5 points: docs/evaluation-protocols.md section 1.4.)
    """
    lines = prediction.lstrip("\n").split("\n")
    code = [line for line in lines if not any(mark in line for mark in CODE_NOISE)]
    line = code[0] if code else ""
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    size = len(line) + len(reference)
    # 1 minus the distance, as python-Levenshtein rounds: 62.5 % may come out as 62 %.
    ratio = 1.0 - (size - 2 * _common_length(line, reference)) / size
    return round(100 * ratio) / 100


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER: the share of references that the answer contains, in any case."""
    text = prediction.lower()
    return sum(r.lower() in text for r in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER's qa tasks: 1 if the answer contains any of the references."""
    text = prediction.lower()
    return float(any(r.lower() in text for r in references))


def keyword_recall(prediction: str, keywords: Sequence[str]) -> float:
    """The share of keywords in the answer, in any case; "a|b" counts for either."""
    text = prediction.lower()
    hits = [any(k in text for k in word.lower().split("|")) for word in keywords]
    return sum(hits) / len(hits)


def first_line(prediction: str) -> str:
    """What LongBench scores of few-shot answers: the first line with anything in it."""
    return prediction.lstrip("\n").split("\n")[0]


def first_integer(prediction: str) -> str:
    """The first run of the digits 0-9, "" if there is none (InfiniteBench)."""
    found = re.search(r"[0-9]+", prediction)
    return found[0] if found else ""


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; a blank one is one empty word, as in `rouge`."""
    return [" ".join(s.split()).split(" ") for s in text.split(".") if s]


def _common(reference: Sequence[str], words: Sequence[str]) -> set[str]:
    """The words of one longest common subsequence.

    Of several `rouge` finds the one that going back from the ends leads to, leaving
    a word of `words` where both ways are equally long.
    """
    rows = [[0] * (len(words) + 1)]
    for r in reference:
        above, row = rows[-1], [0]
        for j, w in enumerate(words):
            row.append(above[j] + 1 if r == w else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, found = len(reference), len(words), set()
    while i and j:
        if reference[i - 1] == words[j - 1]:
            found.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _common_length(a: str, b: str) -> int:
    """Length of the longest common subsequence of characters.

    Bit-parallel (Hyyrö 2004): a bit per character of `a`, cleared once it is matched.
    """
    places: dict[str, int] = {}
    for i, c in enumerate(a):
        places[c] = places.get(c, 0) | 1 << i
    full = free = (1 << len(a)) - 1
    for c in b:
        hit = free & places.get(c, 0)
        free = (free + hit | free - hit) & full
    return len(a) - free.bit_count()
