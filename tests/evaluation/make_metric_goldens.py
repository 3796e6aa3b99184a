"""Records what the published metrics say about pairs of strings.

python tests/evaluation/make_metric_goldens.py METRICS.PY

METRICS.PY is LongBench/metrics.py of THUDM/LongBench. Needs rouge==1.0.1, fuzzywuzzy
and python-Levenshtein, in an environment of their own: nothing of the package is used,
and nothing of theirs is kept but the values in goldens/metrics.json.
"""

import importlib.util
import json
import random
import sys
import types
from importlib import metadata
from pathlib import Path

TEXT = """the a an river stone old memory holds seven boats and 17 lamps in Paris while
The council said no U.S. report was late it's re-opened by Smith's firm café
naïve 東京 x86 vote bridge water of to is was very quickly unanswerable yes"""
WORDS = TEXT.split()
LINE = """def add ( a , b ) : return a + b for i in range ( n ) if x is None else y
self . items . append ( item ) raise ValueError ( name ) import os"""
CODE = LINE.split()
CLASSES = [
    "Group of individuals",
    "Group",
    "individuals",
    "of",
    "Abbreviation expanded",
    "Abbreviation",
    "expanded",
    "City",
]
TEXTS = [
    "",
    " ",
    "\n",
    ".",
    "...",
    "?!",
    "a",
    "the",
    "The the THE",
    "A. B. C.",
    "one.two.three",
    " leading and trailing ",
    "tab\tand\nnewline.  two  spaces.",
    ". .",
    "Mr. Smith lives in the U.S.",
    "“curly quotes” — and dashes…",
    "ﬁne ligature, ＦＵＬＬ width",
    "日本語の文。もう一つ。",
    "naïve naïve café",
    "🙂 emoji. 🙂",
    "12 3.5 1,000",
    "Paragraph 12",
    "same words same words. same words",
    "same words. words same. same",
]


def sentence(rng, words, least, most):
    return " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))


def edit(rng, text, words):
    """A text like this one: some words dropped, replaced, doubled or swapped."""
    out = []
    for word in text.split(" "):
        p = rng.random()
        if p < 0.15:
            continue
        out.append(rng.choice(words) if p < 0.3 else word)
        if p > 0.95:
            out.append(word)
    if len(out) > 1 and rng.random() < 0.5:
        i = rng.randrange(len(out) - 1)
        out[i], out[i + 1] = out[i + 1], out[i]
    return " ".join(out)


def text_pairs(rng, count):
    pairs = [(a, b) for a in TEXTS for b in rng.sample(TEXTS, 6)]
    pairs += [(a, a) for a in TEXTS]
    while len(pairs) < count:
        size = rng.randint(1, 5)
        reference = ". ".join(sentence(rng, WORDS, 1, 10) for _ in range(size)) + "."
        prediction = edit(rng, reference, WORDS)
        if rng.random() < 0.3:
            parts = prediction.split(".")
            rng.shuffle(parts)
            prediction = ".".join(parts)
        pairs.append((prediction, reference))
    return pairs


def code_pairs(rng, count):
    edges = [
        "",
        "\n",
        "```",
        "# c",
        "// c\nx = 1",
        "\n\n  y = 2\nz",
        "`a`\n# b\nx",
        "x",
    ]
    pairs = [(a, b) for a in edges for b in ("", "x", "x = 1", "  y = 2")]
    while len(pairs) < count:
        line = sentence(rng, CODE, 1, 14)
        guess = edit(rng, line, CODE)
        front = rng.choice(["", "", "\n", "# note\n", "```python\n", "// see\n\n"])
        pairs.append((front + guess + rng.choice(["", "\nmore", " # end\nx"]), line))
    return pairs


def class_cases(rng, count):
    cases = []
    while len(cases) < count:
        classes = rng.sample(CLASSES, rng.randint(2, len(CLASSES)))
        named = rng.sample(CLASSES, rng.randint(0, 3))
        prediction = rng.choice([" ", ", ", "\n"]).join(named)
        cases.append((prediction, rng.choice(named or classes), classes))
    return cases


def number_pairs(rng, count):
    pairs = [
        ("", "3"),
        ("none", "3"),
        ("3", "3"),
        ("3.3", "3"),
        ("٣", "3"),
        ("03", "3"),
    ]
    while len(pairs) < count:
        numbers = [str(rng.randint(1, 6)) for _ in range(rng.randint(0, 4))]
        pairs.append((f"I count {' or '.join(numbers)}.", str(rng.randint(1, 6))))
    return pairs


def main(path):
    # Needed by its functions for Chinese only.
    sys.modules.setdefault("jieba", types.ModuleType("jieba"))
    spec = importlib.util.spec_from_file_location("longbench_metrics", path)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    from fuzzywuzzy import fuzz
    from fuzzywuzzy.StringMatcher import StringMatcher  # only with Levenshtein
    from rouge import Rouge

    assert fuzz.SequenceMatcher is StringMatcher
    rng = random.Random(7)

    def rouge(prediction, reference):
        try:
            found = Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]
        except ValueError:
            return [0.0, 0.0]
        assert found["f"] == official.rouge_score(prediction, reference)
        return [found["f"], found["r"]]

    texts, numbers = text_pairs(rng, 350), number_pairs(rng, 60)
    goldens = {
        "made_with": {
            name: metadata.version(name)
            for name in ("rouge", "fuzzywuzzy", "python-Levenshtein")
        },
        "normalize": [[p, official.normalize_answer(p)] for p in TEXTS],
        "texts": [[p, r, official.qa_f1_score(p, r), *rouge(p, r)] for p, r in texts],
        "classification": [
            [p, r, c, official.classification_score(p, r, all_classes=c)]
            for p, r, c in class_cases(rng, 200)
        ],
        "count": [[p, r, official.count_score(p, r)] for p, r in numbers],
        "retrieval": [
            [p, f"Paragraph {r}", official.retrieval_score(p, f"Paragraph {r}")]
            for p, r in numbers
        ],
        "code_sim": [
            [p, r, official.code_sim_score(p, r)] for p, r in code_pairs(rng, 300)
        ],
    }
    out = Path(__file__).with_name("goldens") / "metrics.json"
    rows = [
        f" {json.dumps(k)}: "
        + (
            json.dumps(v)
            if isinstance(v, dict)
            else "[\n"
            + ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in v)
            + "\n ]"
        )
        for k, v in goldens.items()
    ]
    out.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
