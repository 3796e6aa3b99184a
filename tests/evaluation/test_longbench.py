"""Tasks on files in the published formats, made up here: LongBench, -E and the like."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from beacon_jax.data.tokenizer import train_tokenizer
from beacon_jax.evaluation import groups, prompts
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.reading import Continuations, load_model
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import generation, longbench, longdata, make_tasks
from beacon_jax.evaluation.tasks.files import templates
from beacon_jax.evaluation.tasks.longbench import LongBench

MOST = 160
CONTEXT = "A river runs through the old town and out to sea. " * 12
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
# Task: what the file's row has, an answer with the full score, one without any.
EXAMPLES = {
    "narrativeqa": (["The old town"], "old town", "no idea"),
    "qasper": (["unanswerable"], "Unanswerable.", "yes"),
    "multifieldqa_en": (["a", "the river Ouse"], "River Ouse", "town"),
    "hotpotqa": (["yes"], "Yes", "no"),
    "2wikimqa": (["Ada Byron"], "ada byron", "Bob"),
    "musique": (["1843"], "1843.", "1844"),
    "gov_report": (
        ["The town was built. It stands."],
        "The town was built. It stands.",
        "Nothing",
    ),
    "qmsum": (["They agreed."], "They agreed.", "Nothing"),
    "multi_news": (["Floods came."], "Floods came.", "Nothing"),
    "trec": (["Date"], "\nDate\nType: City", "\nCity\nDate"),
    "triviaqa": (
        ["Paris", "City of Paris"],
        "\nParis\nPassage: London",
        "\nRome\nParis",
    ),
    "samsum": (
        ["Ann will call Bo"],
        "Ann will call Bo\nmore",
        "Nothing\nAnn will call",
    ),
    "passage_count": (["7"], "7 paragraphs", "seven"),
    "passage_retrieval_en": (["Paragraph 12"], "Paragraph 12", "Paragraph 1"),
    "lcc": (["    return x"], "# note\n    return x\nmore", "`"),
    "repobench-p": (["import os"], "import os", "#"),
}


def row(task, i=0, **changes):
    found = {
        "input": f"question {i}?",
        "context": f"{i}. {CONTEXT[: 40 * (i % 4 + 1)]}",
        "answers": EXAMPLES[task][0],
        "length": 3000 + 2000 * i,
        "dataset": task,
        "language": "en",
        "all_classes": ["Date", "City", "Other"] if task == "trec" else None,
        "_id": f"{i}",
    }
    return found | changes


def write(folder, name, rows):
    file = folder / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five rows of each task of LongBench and of -E."""
    folder = tmp_path_factory.mktemp("data")
    for task in EXAMPLES:
        rows = [row(task, i) for i in range(5)]
        for end in ("", "_e"):
            write(folder, f"longbench/{task}{end}", rows)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What tasks use of a model to make examples: a tokenizer and a window."""
    text = [CONTEXT, *(t for t in templates("longbench")[0].values())]
    folder = tmp_path_factory.mktemp("tok")
    return SimpleNamespace(tokenizer=train_tokenizer(text, folder, 700), window=32)


@pytest.fixture
def chatting(plain, monkeypatch):
    monkeypatch.setattr(plain.tokenizer, "chat_template", CHAT)
    return plain


def settings_of(data, **changes):
    return RunSettings(data=str(data), max_length=MOST, **changes)


def made(model, task, settings):
    return task.examples(model, settings, TaskData(settings, model.tokenizer))


def text_of(model, example):
    return model.tokenizer.decode(example.tokens.tolist())


@pytest.mark.parametrize("task", EXAMPLES)
def test_right_answers_score_1_and_wrong_ones_0(data, plain, task):
    scored = LongBench(task)
    (example, *_) = made(plain, scored, settings_of(data))
    _, right, wrong = EXAMPLES[task]
    found = {"predicted": right} | example.info
    assert scored.value(found) == pytest.approx(1.0, abs=1e-8)
    assert scored.value(found | {"predicted": wrong}) < 0.5
    assert scored.value(found | {"predicted": ""}) == 0.0


@pytest.mark.parametrize("task", EXAMPLES)
def test_the_prompt_is_the_official_one(data, plain, task):
    template, new = (found[task] for found in templates("longbench"))
    longer = RunSettings(data=str(data), max_length=2000)
    examples = made(plain, LongBench(task), longer)
    assert LongBench(task).new_tokens == new
    assert {text_of(plain, e) for e in examples} == {
        template.replace("{context}", r["context"]).replace("{input}", r["input"])
        for r in (row(task, i) for i in range(5))
    }
    assert all("{" not in text_of(plain, e) for e in examples)


def test_the_official_table_of_tasks_is_whole():
    assert len(longbench.PAPER_TASKS) == 14 and len(longbench.E_TASKS) == 13
    assert set(EXAMPLES) == {*longbench.PAPER_TASKS, *longbench.E_TASKS}
    prompts, new = templates("longbench")
    assert set(prompts) == set(new) == set(EXAMPLES)
    assert prompts["narrativeqa"].count("asconcisely") == 2  # the benchmark's misprint


def test_long_prompts_lose_their_middle_before_they_are_wrapped(data, chatting):
    task = LongBench("gov_report")
    for example in made(chatting, task, settings_of(data)):
        text = text_of(chatting, example)
        assert text.startswith("<user>You are given a report")
        assert text.endswith("Summary:<assistant>")
        assert len(example.tokens) + 512 <= task.longest(settings_of(data))
    ids = lambda s: chatting.tokenizer(s)["input_ids"]
    text = CONTEXT * 3
    cut = prompts.cut_middle(chatting.tokenizer, text, MOST)
    assert len(ids(cut)) == pytest.approx(MOST, abs=2)
    half = MOST // 2
    decode = chatting.tokenizer.decode
    assert cut == decode(ids(text)[:half]) + decode(ids(text)[-half:])
    assert prompts.cut_middle(chatting.tokenizer, "short", MOST) == "short"


def test_few_shot_and_code_tasks_are_not_wrapped(data, chatting):
    for task in EXAMPLES:
        (example, *_) = made(chatting, LongBench(task), settings_of(data))
        wrapped = text_of(chatting, example).startswith("<user>")
        assert wrapped == (
            task not in ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
        )
    bare = settings_of(data, chat="none")
    assert not text_of(
        chatting, made(chatting, LongBench("qasper"), bare)[0]
    ).startswith("<user>")


def test_answers_end_with_their_line_as_the_protocol_says(data, plain):
    ends = {
        variant: {
            task
            for task in EXAMPLES
            if made(plain, LongBench(task), settings_of(data, newline_stop=variant))[
                0
            ].info["stop"]
            == ["\n"]
        }
        for variant in ("paper", "official")
    }
    assert ends["official"] == {"samsum"}
    assert ends["paper"] == {
        "samsum",
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "hotpotqa",
        "2wikimqa",
        "musique",
    }


def test_rows_come_by_length_and_a_limit_keeps_the_first_of_the_file(data, plain):
    found = made(plain, LongBench("qasper"), settings_of(data))
    sizes = [len(e.tokens) for e in found]
    assert sizes == sorted(sizes) and {e.length for e in found} == {MOST}
    assert sorted(e.id for e in found) == ["0", "1", "2", "3", "4"]
    few = made(plain, LongBench("qasper"), settings_of(data, limit=2))
    assert sorted(e.id for e in few) == ["0", "1"]


def test_malformed_rows_are_left_out_and_listed(tmp_path, plain):
    write(
        tmp_path,
        "longbench/trec",
        [
            row("trec", 0),
            "{not json",
            row("trec", 2, answers=[3]),
            row("trec", 3, context=None),
            '{"input": "x"}',
            row("trec", 5, all_classes=[1]),
            row("trec", 6, answers=[]),
            row("trec", 7),
        ],
    )
    settings = settings_of(tmp_path)
    inputs = TaskData(settings, plain.tokenizer)
    found = LongBench("trec").examples(plain, settings, inputs)
    assert len(found) == 2
    reason = "answers or all_classes are not texts"
    assert inputs.skipped == [
        ("trec.jsonl", 2, "not JSON"),
        ("trec.jsonl", 3, reason),
        ("trec.jsonl", 4, "context of a wrong type"),
        ("trec.jsonl", 5, "no context, answers, length, all_classes"),
        ("trec.jsonl", 6, reason),
        ("trec.jsonl", 7, reason),
    ]
    write(tmp_path, "longbench/passage_retrieval_en", [row("passage_retrieval_en")])
    write(
        tmp_path,
        "longbench/passage_retrieval_en_e",
        [row("passage_retrieval_en", answers=["12"])],
    )
    with pytest.raises(ValueError, match="has 1 rows and none with the fields"):
        LongBench("passage_retrieval_en", even=True).examples(plain, settings, inputs)


@pytest.mark.parametrize(
    "name, file, where",
    [
        ("longbench_qasper", "longbench/qasper", "datasets/THUDM/LongBench"),
        ("longbench_e_lcc", "longbench/lcc_e", "datasets/THUDM/LongBench"),
        ("topic_retrieval", "longeval/topic_retrieval", "namespace-Pt/projects"),
        ("infinitebench_en_qa", "infinitebench/longbook_qa_eng", "InfiniteBench"),
    ],
)
def test_a_missing_file_is_named_with_its_folder_and_its_source(
    tmp_path, plain, name, file, where
):
    (task,) = make_tasks([name])
    with pytest.raises(FileNotFoundError) as error:
        made(plain, task, RunSettings(data=str(tmp_path)))
    assert f"--data={tmp_path} has no {file}.jsonl" in str(error.value)
    assert where in str(error.value)
    with pytest.raises(FileNotFoundError, match="--data is not given: put .*jsonl"):
        made(plain, task, RunSettings())


def test_a_max_length_without_room_for_the_chat_template_is_an_error(data, plain):
    plain.tokenizer.chat_template = CHAT + "x" * 2000
    try:
        with pytest.raises(ValueError, match="--max_length=8 leaves longbench_qasper"):
            made(plain, LongBench("qasper"), RunSettings(data=str(data), max_length=8))
    finally:
        plain.tokenizer.chat_template = None


def prediction(task, i, text, method="full"):
    base = {"method": method, "ratio": None, "length": MOST, "kv_bytes": 8}
    info = task.info(row(task.task, i), RunSettings())
    return base | {"id": str(i), "predicted": text, "answer_loss": 1.0} | info


def test_longbench_e_is_scored_by_the_number_of_words(tmp_path):
    task = LongBench("hotpotqa", even=True)
    # 3,000, 5,000, 7,000, 9,000 and 11,000 words
    texts = ["yes", "no", "yes", "yes", "no"]
    metrics = task.score([prediction(task, i, t) for i, t in enumerate(texts)])
    found = {m["metric"]: (m["value"], m["count"]) for m in metrics}
    assert found == {
        "F1": (0.6, 5),
        "answer_loss": (1.0, 5),
        "F1, 0-4k": (1.0, 1),
        "F1, 4-8k": (0.5, 2),
        "F1, 8k+": (0.5, 2),
    }
    text = task.report(metrics, tmp_path)
    head = text.split("\n")[-4]
    assert head.index("0-4k") < head.index("4-8k") < head.index("8k+")


def metric(task, value, method="full", name="F1", **more):
    return {
        "task": task,
        "metric": name,
        "method": method,
        "ratio": None,
        "length": MOST,
        "depth": None,
        "count": 10,
        "kv_bytes": 100.0,
        "value": value,
        "low": value - 0.03,
        "high": value + 0.03,
    } | more


def test_groups_are_means_of_tasks_and_the_whole_is_that_of_all_tasks():
    values = {t: (i + 1) / 20 for i, t in enumerate(longbench.PAPER_TASKS)}
    metrics = [metric(f"longbench_{t}", v) for t, v in values.items()]
    found = {m["task"]: m for m in groups.means(metrics)}
    assert set(found) == {"LongBench"} | {
        f"LongBench {name}" for name in longbench.PAPER_GROUPS
    }
    for name, tasks in longbench.PAPER_GROUPS.items():
        want = np.mean([values[t] for t in tasks])
        assert found[f"LongBench {name}"]["value"] == pytest.approx(want)
        assert found[f"LongBench {name}"]["metric"] == f"mean of {len(tasks)}"
    whole = found["LongBench"]
    assert whole["value"] == pytest.approx(np.mean(list(values.values())))
    # Not the mean of the groups: code has two tasks, the others three.
    assert whole["value"] != pytest.approx(
        np.mean([found[f"LongBench {g}"]["value"] for g in longbench.PAPER_GROUPS])
    )
    assert whole["high"] - whole["value"] == pytest.approx(0.03 / np.sqrt(14))
    assert whole["count"] == 140
    section = groups.section(list(found.values()))
    assert "## Means over tasks" in section and "LongBench code, mean of 2" in section


def test_a_mean_says_how_many_tasks_it_lacks_and_one_task_has_none():
    some = [metric("longbench_lcc", 0.2), metric("longbench_qasper", 0.4)]
    (found,) = groups.means(some)
    assert (found["task"], found["metric"]) == ("LongBench", "mean of 2/14")
    assert found["value"] == pytest.approx(0.3)
    assert groups.means(some[:1]) == [] and groups.section([]) == ""
    parts = [
        metric(f"longbench_e_{t}", v, name=f"{n}, 8k+", detail=True)
        for t, v, n in (("lcc", 0.2, "similarity"), ("qasper", 0.6, "F1"))
    ]
    (found,) = groups.means(parts)
    assert (found["task"], found["value"]) == ("LongBench-E 8k+", pytest.approx(0.4))


def test_topics_are_found_in_any_case_and_counted_by_their_number(tmp_path, plain):
    rows = [
        {
            "context": f"USER: I would like to discuss the topic of X{i}.",
            "question": "What was the first topic?",
            "topics": [f"The River {i}", "b"],
            "num_topics": n,
        }
        for i, n in enumerate((5, 5, 10, 70))
    ]
    write(tmp_path, "longeval/topic_retrieval", [*rows, rows[0] | {"topics": [1]}])
    task = longdata.TopicRetrieval()
    settings = settings_of(tmp_path)
    inputs = TaskData(settings, plain.tokenizer)
    found = task.examples(plain, settings, inputs)
    assert inputs.skipped == [("topic_retrieval.jsonl", 5, "topics has no text")]
    assert text_of(plain, found[0]).endswith("topic of X0. What was the first topic?")
    base = {"method": "full", "ratio": None, "length": MOST, "kv_bytes": 8}
    predictions = [
        base | e.info | {"predicted": "it was the river 0", "answer_loss": 1.0}
        for e in found
    ]
    metrics = {m["metric"]: m["value"] for m in task.score(predictions)}
    assert list(metrics) == [
        "accuracy",
        "answer_loss",
        "accuracy, 5 topics",
        "accuracy, 10 topics",
        "accuracy, 70 topics",
        "F1",
    ]
    # "it was river 0" has both words of "river 0", one of "river 1": F1 2/3 and 1/3.
    f1 = (2 / 3 + 3 * 1 / 3) / 4
    assert list(metrics.values()) == [0.25, 1.0, 0.5, 0.0, 0.0, pytest.approx(f1)]


@pytest.mark.parametrize(
    "name, answer, right, wrong",
    [
        ("en_qa", ["the Ouse", "Ouse"], "Ouse.", "town"),
        ("en_sum", ["A town. A river."], "A town. A river.", "x"),
        ("passkey", "71432", " 71432. 5", " 5 71432"),
        ("number_string", ["2200012222"], "2200012222", "220001222"),
        ("kv_retrieval", "6ab6ea3e-f288", '"6ab6ea3e-f288".', "6ab6ea3e f288"),
    ],
)
def test_infinitebench_is_asked_and_scored_as_in_the_release(
    tmp_path, plain, name, answer, right, wrong
):
    (task,) = make_tasks([f"infinitebench_{name}"])
    given = {"id": 0, "context": CONTEXT, "input": "What is it?", "answer": answer}
    write(tmp_path, task.file, [given, given | {"answer": []}, given | {"answer": 3}])
    settings = RunSettings(data=str(tmp_path), max_length=2000)
    inputs = TaskData(settings, plain.tokenizer)
    (example,) = task.examples(plain, settings, inputs)
    assert [row[1:] for row in inputs.skipped] == [
        (2, "answer is not a text"),
        (3, "answer of a wrong type"),
    ]
    text = text_of(plain, example)
    assert CONTEXT in text and ("What is it?" in text) == (name != "en_sum")
    found = {"predicted": right} | example.info
    assert task.value(found) == pytest.approx(1.0, abs=1e-8)
    assert task.value(found | {"predicted": wrong}) == 0.0
    assert task.value(found | {"predicted": ""}) == 0.0


def test_the_runner_reads_scores_and_reports_a_users_files(
    model_folder, data, tmp_path, monkeypatch
):
    names = ["longbench_hotpotqa", "longbench_2wikimqa"]
    tasks = make_tasks(names)
    folder = tmp_path / "data"
    for task in ("hotpotqa", "2wikimqa"):
        rows = [row(task, i) for i in range(3)]
        write(folder, f"longbench/{task}", [*rows, "{"])
    settings = RunSettings(data=str(folder), max_length=128, batch_size=2)
    model = load_model(model_folder, ())
    asked = []

    def scripted(model, memory, logits, new_tokens, ratio, stop=()):
        asked.append((new_tokens, tuple(stop)))
        return Continuations(
            ["yes"] * len(logits), [np.zeros(1, int)] * len(logits), memory
        )

    monkeypatch.setattr(generation, "answer", scripted)
    methods = make_methods(["full"], [])
    metrics, text = evaluate(model, tasks, methods, settings, tmp_path / "out")
    found = {
        (m["task"], m["method"]): m["value"] for m in metrics if m["metric"] == "F1"
    }
    assert found == {(names[0], "full"): 1.0, (names[1], "full"): 0.0}
    assert set(asked) == {(32, ("\n",))}
    mean = [m for m in metrics if m["task"] == "LongBench multi-document QA"]
    assert [m["value"] for m in mean] == [0.5]
    assert "## LongBench hotpotqa" in text and "mean of 2/3" in text
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Rows left out" in report and "hotpotqa.jsonl" in report
