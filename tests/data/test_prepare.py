"""Preparing: the same bytes for any number of workers and after a kill; what is bad is
counted; other settings are refused."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from beacon_jax.cli import options
from beacon_jax.cli import prepare as command
from beacon_jax.data import contents
from beacon_jax.data import prepare as module
from beacon_jax.data.examples import Rules, make_examples
from beacon_jax.data.prepare import Preparation, prepare, tokenizer_hash
from beacon_jax.data.prepared import Prepared
from beacon_jax.data.sources import Record
from beacon_jax.resources import load_tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "assets/tiny-base")
WORDS = ["the", "river", "carries", "stones", "from", "hills", "down", "to", "plain"]


def sentence(number, words):
    rng = np.random.default_rng(number)
    return f"Row {number}: " + " ".join(rng.choice(WORDS, words))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six files of 50 rows, one of which has two bad ones."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(6):
        rows = [
            json.dumps({"text": sentence(50 * i + j, 1 + j % 40)}) for j in range(50)
        ]
        if i == 2:
            rows[10], rows[20] = "{not json", json.dumps({"unknown": 1})
        (folder / f"{i}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def settings(source):
    return Preparation((str(source),), TOKENIZER, Rules(20, 100, long="cut"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 10_000)


def content(folder):
    """Every file of a folder that depends on the text and the settings alone."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.name not in (".lock", ".stamps.json")
    }


def texts(source):
    lines = [x for f in sorted(source.iterdir()) for x in f.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines if '"text"' in line]


def test_examples_are_those_of_the_rules_in_the_order_of_the_rows(
    settings, source, tmp_path
):
    data = prepare(settings, tmp_path, workers=1)
    tokenizer = load_tokenizer(TOKENIZER)
    expected = []
    for file in sorted(source.iterdir()):
        for line in file.read_text().splitlines():
            if '"text"' in line:
                record = Record("", json.loads(line)["text"])
                expected += make_examples(record, tokenizer, settings.rules).examples
    assert len(data) == len(expected) > 200
    for i, example in enumerate(expected):
        assert data.read(i).tokens.tolist() == example.tokens.tolist()
        assert data.read(i).labelled.tolist() == example.labelled.tolist()
        assert data.lengths[i] == len(example.tokens)
    assert len(data.manifest["shards"]) > 3
    assert set(data.sources) == {0} and len(set(data.hashes)) == len(data)


def test_the_manifest_counts_everything_and_names_the_first_places(
    settings, source, tmp_path
):
    manifest = prepare(settings, tmp_path, workers=1).manifest
    total, (counts,) = manifest["total"], manifest["sources"]
    assert total["rows"] == 300 and total["bad"] == 2
    drops = counts["drops"]
    assert total["examples"] + sum(d["rows"] for d in drops.values()) == 300
    seen = [len(load_tokenizer(TOKENIZER)(text)["input_ids"]) for text in texts(source)]
    assert total["cut"] == sum(max(n - 100, 0) for n in seen) > 0
    assert drops["shorter than min_length"]["tokens"] == sum(n for n in seen if n < 20)
    assert [d["first"] for d in drops.values() if d["bad"]] == [
        ["2.jsonl:11"],
        ["2.jsonl:21"],
    ]
    short = drops["shorter than min_length"]
    assert not short["bad"] and short["rows"] > 5 and len(short["first"]) == 5
    rows = (tmp_path / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(row)["where"] for row in rows] == ["2.jsonl:11", "2.jsonl:21"]
    assert manifest["settings"]["rules"]["max_length"] == 100
    assert manifest["settings"]["tokenizer"] == tokenizer_hash(TOKENIZER)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_workers(settings, tmp_path):
    prepare(settings, tmp_path / "one", workers=1)
    shown = []
    prepare(settings, tmp_path / "three", workers=3, show=shown.append)
    assert content(tmp_path / "three") == content(tmp_path / "one")
    assert "prepared" in shown[-1]


def test_a_finished_folder_is_not_touched_and_needs_no_sources(
    settings, tmp_path, monkeypatch
):
    prepare(settings, tmp_path, workers=1)
    (tmp_path / ".lock").unlink()
    before = {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    monkeypatch.setattr(module, "_run", lambda *_: pytest.fail("prepared again"))
    assert len(prepare(settings, tmp_path)) > 200

    def gone(*_):
        raise FileNotFoundError("moved away")

    monkeypatch.setattr(module, "source_files", gone)
    assert len(prepare(settings, tmp_path)) > 200
    after = {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    assert before == after


def test_a_run_that_was_killed_while_it_cleaned_up_is_finished(settings, tmp_path):
    prepare(settings, tmp_path, workers=1)
    whole = content(tmp_path)
    for name in ("unfinished.json", "shard-00001-of-00004.json"):
        (tmp_path / name).write_text("{}")
    prepare(settings, tmp_path, workers=1)
    assert content(tmp_path) == whole


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    settings, tmp_path, monkeypatch
):
    prepare(settings, tmp_path / "whole", workers=1)
    write, written = module.Worker.write, []

    def fail_in_the_third(worker, job):
        if len(written) == 2:
            (tmp_path / "parts" / f".{job.path.name}.1.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(job.index)
        return write(worker, job)

    monkeypatch.setattr(module.Worker, "write", fail_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, tmp_path / "parts", workers=1)
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        Prepared(tmp_path / "parts")
    again = []
    monkeypatch.setattr(
        module.Worker, "write", lambda w, job: again.append(job.index) or write(w, job)
    )
    prepare(settings, tmp_path / "parts", workers=1)
    assert written == [0, 1] and again[0] == 2
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


SCRIPT = """
import sys
from beacon_jax.data import prepare, shards
from beacon_jax.data.examples import Rules
if __name__ == "__main__":
    prepare.SHARD_BYTES = 10_000
    rules = Rules(20, 100, long="cut")
    settings = prepare.Preparation((sys.argv[1],), sys.argv[2], rules)
    prepare.prepare(settings, sys.argv[3], workers=2)
"""


def test_a_killed_run_leaves_no_process_and_goes_on(settings, source, tmp_path):
    """SIGKILL of the main process while two workers write."""
    psutil = pytest.importorskip("psutil")
    big = tmp_path / "big"
    big.mkdir()
    for i in range(12):
        rows = [json.dumps({"text": sentence(j, 60)}) for j in range(60)]
        (big / f"{i}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, script, big, TOKENIZER, tmp_path / "killed"]
    process = subprocess.Popen(arguments, env=environment)
    reports = lambda: [*(tmp_path / "killed").glob("shard-*.json")]
    deadline = time.monotonic() + 120
    while not reports():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert not (tmp_path / "killed" / "manifest.json").exists()
    other = dataclasses.replace(settings, sources=(str(big),))
    prepare(other, tmp_path / "killed", workers=1)
    prepare(other, tmp_path / "whole", workers=1)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_script_without_a_main_guard_is_an_error_not_a_deadlock(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace('__name__ == "__main__"', "True"))
    done = subprocess.run(
        [sys.executable, script, source, TOKENIZER, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert 'put the call under `if __name__ == "__main__":`' in done.stderr
    assert "a worker process died (see above)" in done.stderr


def test_other_settings_are_refused_and_all_named(settings, source, tmp_path):
    data = prepare(settings, tmp_path, workers=1)
    other = dataclasses.replace(settings, rules=Rules(20, 90, "qwen", "cut"))
    with pytest.raises(ValueError, match="was made with other settings") as error:
        prepare(other, tmp_path, workers=1)
    text = str(error.value)
    assert "rules.max_length: 100 -> 90" in text
    assert "rules.chat_template: '' -> 'qwen'" in text
    assert "tokenizer" not in text and "--overwrite" in text
    more = dataclasses.replace(settings, sources=(*settings.sources, "stdlib[2]"))
    with pytest.raises(ValueError, match="sources"):
        prepare(more, tmp_path, workers=1)
    assert len(Prepared(tmp_path)) == len(data)
    again = prepare(other, tmp_path, workers=1, overwrite=True)
    assert again.lengths.max() == 90 and "unfinished.json" not in content(tmp_path)


def test_a_source_that_changed_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(sentence(1, 30))
    settings = Preparation((str(file),), TOKENIZER)
    prepare(settings, tmp_path / "out", workers=1)
    file.write_text(sentence(1, 40))
    with pytest.raises(ValueError, match=r"sources\[0\]\.bytes: \d+ -> \d+"):
        prepare(settings, tmp_path / "out", workers=1)


@pytest.mark.parametrize("trained_by", [None, "an earlier version"])
def test_other_text_of_the_same_size_and_time_is_refused(tmp_path, trained_by):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.txt", "b.txt"):
        (source / name).write_text(sentence(1, 30))
        os.utime(source / name, ns=(10**18, 10**18))
    settings = Preparation((str(source),), TOKENIZER)
    prepare(settings, out, workers=1)
    if trained_by:  # which knew sizes only
        manifest = json.loads((out / "manifest.json").read_text())
        del manifest["settings"]["sources"][0]["sha256"]
        (out / "manifest.json").write_text(json.dumps(manifest))
    assert len(prepare(settings, out, workers=1)) == 2
    (source / "b.txt").write_text(sentence(1, 30).replace("Row", "Box"))
    os.utime(source / "b.txt", ns=(10**18, 10**18))
    if trained_by:
        assert len(prepare(settings, out, workers=1)) == 2
        return
    said = r"was made with other text:\n  sources\[0\]\.sha256: \w{12}\.\.\. -> \w{12}"
    with pytest.raises(ValueError, match=said):
        prepare(settings, out, workers=1)
    (source / "b.txt").write_text(sentence(1, 30))
    assert len(prepare(settings, out, workers=1)) == 2
    (source / "a.txt").rename(source / "c.txt")  # the order of the rows
    with pytest.raises(ValueError, match=said):
        prepare(settings, out, workers=1)


def test_text_that_nobody_wrote_since_is_not_read_again(tmp_path, monkeypatch):
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text(sentence(1, 30))
    settings = Preparation((str(source),), TOKENIZER)
    monkeypatch.setattr(contents, "SETTLED", 0)
    prepare(settings, out, workers=1)
    hashed, digest = [], contents.hashlib.file_digest
    monkeypatch.setattr(
        contents.hashlib, "file_digest", lambda *x: hashed.append(1) or digest(*x)
    )
    assert len(prepare(settings, out)) == 1 and not hashed
    source.touch()
    assert len(prepare(settings, out)) == 1 and hashed
    source.write_text(sentence(1, 31))
    with pytest.raises(ValueError, match=r"bytes: .*\n.*sha256: .* \(a.txt\)\nUse"):
        prepare(settings, out)
    for damage in ("nonsense", "[]", '{"a": 1}'):
        source.write_text(sentence(1, 30))
        (out / ".stamps.json").write_text(damage)
        assert len(prepare(settings, out)) == 1


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text(sentence(1, 30))
    write = module.Worker.write
    monkeypatch.setattr(
        module.Worker,
        "write",
        lambda worker, job: (write(worker, job), source.write_text(sentence(2, 30))),
    )
    settings = Preparation((str(source),), TOKENIZER)
    with pytest.raises(ValueError, match="a.txt'] changed while they were prepared"):
        prepare(settings, out, workers=1)
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was made with other text"):
        prepare(settings, out, workers=1)
    assert len(prepare(settings, out, workers=1, overwrite=True)) == 1


def test_an_unfinished_folder_of_other_settings_is_refused(
    settings, tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Worker, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, tmp_path, workers=1)
    other = dataclasses.replace(settings, rules=Rules(30, 100, long="cut"))
    with pytest.raises(ValueError, match="rules.min_length: 20 -> 30"):
        prepare(other, tmp_path, workers=1)
    assert len(prepare(other, tmp_path, workers=1, overwrite=True)) > 200


def test_a_run_that_drops_too_many_bad_rows_stops_with_the_table(settings, tmp_path):
    with pytest.raises(ValueError) as error:
        prepare(settings, tmp_path, workers=1, max_drop_fraction=0.005)
    text = str(error.value)
    assert "2 of 300 rows are bad, more than data.max_drop_fraction=0.005" in text
    assert "2.jsonl:11" in text and "2.jsonl:21" in text
    assert "shorter than min_length" in text
    # What is tokenised stays: with a higher limit nothing is done again.
    data = prepare(settings, tmp_path, workers=1, max_drop_fraction=0.007)
    assert data.manifest["total"]["bad"] == 2


def test_it_stops_early_if_the_first_rows_are_bad(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.jsonl").write_text("nothing\n" * 1500, encoding="utf-8")
    written, write = [], module.Worker.write
    monkeypatch.setattr(
        module.Worker, "write", lambda w, job: written.append(job) or write(w, job)
    )
    settings = Preparation((str(source),), TOKENIZER)
    with pytest.raises(ValueError, match="1,500 of the first 1,500 rows are bad"):
        prepare(settings, tmp_path / "out", workers=1)
    assert len(written) == 1


def test_nothing_left_is_an_error(settings, tmp_path):
    other = dataclasses.replace(settings, rules=Rules(5000, 9000))
    with pytest.raises(ValueError, match="no example is left of 300 rows"):
        prepare(other, tmp_path, workers=1, max_drop_fraction=1.0)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sources": ()}, {}, "data.sources=() is empty"),
        ({}, {"max_drop_fraction": 5}, "data.max_drop_fraction=5 is a share"),
        ({}, {"workers": -1}, "data.workers=-1 must be at least 0"),
    ],
)
def test_a_wrong_setting_is_named(settings, tmp_path, change, arguments, message):
    with pytest.raises(ValueError) as error:
        prepare(dataclasses.replace(settings, **change), tmp_path, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("uri", "out", "refused"),
    [
        ("books", "books", True),
        ("books", "books/sub/out", True),
        ("books", "link/out", True),
        ("books/a.jsonl", "books", True),
        ("books/*.jsonl", "books", True),
        ("books/a.jsonl", ".", True),
        ("b*", "books/out", True),
        ("books/**/*.json", "books/out", True),
        ("books/*/*.json*", "books/out", True),
        ("books", "books/.out", False),
        ("books/*.jsonl", "books/out", False),
        ("books/**/*.txt", "books/out", False),
        ("books", "books2", False),
    ],
)
def test_a_folder_and_its_sources_lie_apart(
    settings, tmp_path, monkeypatch, uri, out, refused
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books/sub").mkdir(parents=True)
    for name in ("a.jsonl", "sub/a.txt", "sub/a.json"):
        row = {"text": sentence(0, 30)}
        (tmp_path / "books" / name).write_text(json.dumps(row))
    (tmp_path / "link").symlink_to("books")
    before = sorted(tmp_path.rglob("*"))
    made = dataclasses.replace(settings, sources=(uri,))
    if refused:
        with pytest.raises(ValueError, match="lie one in the other"):
            prepare(made, out)
        assert sorted(tmp_path.rglob("*")) == before
    else:
        assert prepare(made, out).manifest["total"]["examples"] > 0


@pytest.mark.parametrize("place", ["shard", "index"])
def test_a_full_disk_is_named_and_leaves_no_half(
    settings, tmp_path, monkeypatch, place
):
    from array_record.python import array_record_module as records

    class Full(records.ArrayRecordWriter):
        def write(self, data):
            raise RuntimeError("write() failed: No space left on device writing at 0")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if place == "shard":
            patch.setattr(records, "ArrayRecordWriter", Full)
        else:
            patch.setattr(np, "save", full)
        with pytest.raises(
            OSError, match=r"^prepared=.* \(No space left .*: make room"
        ):
            prepare(settings, tmp_path, workers=1)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))
    assert prepare(settings, tmp_path, workers=1).manifest["total"]["examples"] > 0


def test_a_folder_without_tokenizer_is_an_error(settings, tmp_path):
    other = dataclasses.replace(settings, tokenizer=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no tokenizer files"):
        prepare(other, tmp_path / "out")


def run_command(monkeypatch, *words):
    argv = ["prepare", *words]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    command.define_flags(values)
    options.parse(argv, values)
    monkeypatch.setattr(flags, "FLAGS", values)
    command.main(["prepare"])


def test_the_command_prepares_what_a_config_names(
    source, tmp_path, monkeypatch, capsys
):
    words = [
        f"--config={ROOT}/configs/llama2_7b_pretrain.py",
        f"--config.init_from={TOKENIZER}",
        f"--config.data.sources=('{source}',)",
        "--config.data.min_length=20",
        "--config.data.max_length=100",
        "--workers=1",
        f"--out={tmp_path}/data",
    ]
    run_command(monkeypatch, *words)
    out = capsys.readouterr().out
    assert f"of 300 rows in {source}" in out
    assert "bad   not JSON  (first: 2.jsonl:11)" in out
    assert len(Prepared(tmp_path / "data")) > 200
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, *words, "--config.data.max_length=50")
    assert "rules.max_length: 100 -> 50" in str(stopped.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_token_that_the_model_has_no_row_for_stops_with_its_name(
    settings, tmp_path, workers
):
    small = dataclasses.replace(settings, vocab_size=300)
    said = r"\d\.jsonl:\d+ has token ids from \d+ to \d+, the model has 0 to 299: "
    with pytest.raises(ValueError, match=said + r"\d+ \('.+'\) has no row"):
        prepare(small, tmp_path / "a", workers=workers)
    assert not (tmp_path / "a/manifest.json").exists()
    if workers > 1:
        return
    # A folder is known by its text and rules, not by the model it is meant for.
    data = prepare(settings, tmp_path / "b", workers=1)
    ids = [int(data.read(i).tokens.max()) for i in range(len(data))]
    assert data.largest_id == max(ids) >= 300
    enough = dataclasses.replace(settings, vocab_size=max(ids) + 1)
    assert len(prepare(enough, tmp_path / "b")) == len(data)
    manifest = tmp_path / "b/manifest.json"
    bare = json.loads(manifest.read_text())
    for made in (bare, {k: v for k, v in bare.items() if k != "largest_id"}):
        manifest.write_text(json.dumps(made))
        with pytest.raises(ValueError, match=rf"prepared=.*b has .*: {max(ids)} \("):
            prepare(dataclasses.replace(settings, vocab_size=max(ids)), tmp_path / "b")
