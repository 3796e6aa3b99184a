"""`compress` and `generate` from the outside; in this process, as jax loads slowly."""

import codecs
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from absl import flags

from beacon_jax.cli import compress, generate
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.options import PIECE_WINDOWS

ROOT = Path(__file__).parents[2]
TEXT = "Boats left the harbour at dawn. " * 6
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs a command on the tiny model, in an empty folder with context.txt."""
    monkeypatch.chdir(tmp_path)
    Path("context.txt").write_text(TEXT)

    def call(module: ModuleType, *arguments: object, stdin: str | bytes = "") -> Ran:
        values = flags.FlagValues()
        module.define_flags(values)
        values(["command", f"--model={folder}", *map(str, arguments)])
        data = stdin.encode() if isinstance(stdin, str) else stdin
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", text)
        code: object = 0
        try:
            module.main(["command"], values)
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what Python does with it at the end of a process
            code, err = 1, f"{err}{code}\n"
        return Ran(int(str(code)), out, err)

    return call


def fails(ran: Ran, message: str) -> None:
    assert (ran.code, ran.out) == (1, "")
    assert f"error: {message}" in ran.err


def test_a_file_or_stdin_becomes_memory_and_text(run, model):
    options = ("--prompt=At dawn", "--ratio=4", "--max_new_tokens=9")
    first = run(generate, *options, "--context=context.txt")
    assert first.code == 0, first.err
    expected = model.generate("At dawn", context=TEXT, ratio=4, max_new_tokens=9)
    assert first.out == expected + "\n"
    tokens = len(TEXT) + len("At dawn") + 9
    slots = tokens // 8 * 2
    assert f"memory: {tokens} tokens in {slots} memory slots + 0 in the" in first.err
    assert "192 context tokens, 7 prompt tokens, 9 answer tokens\n" in first.err
    assert re.search(
        r"compiled in [\d.]+ s; context [\d.]+ s \([\d,]+ tokens/s\); "
        r"first token [\d.]+ s; then [\d,.]+ tokens/s\n",
        first.err,
    )
    again = run(generate, *options, "--context=-", stdin=TEXT)
    assert again.out == first.out, again.err
    half = len(TEXT) // 2
    Path("half.txt").write_text(TEXT[:half])
    parts = ("--context=half.txt", "--context=-")
    again = run(generate, *options, *parts, stdin=TEXT[half:])
    assert again.out == first.out, again.err


def test_recent_keeps_the_last_window_raw_in_packs_and_answers(run, model):
    given = ("--context=context.txt", "--ratio=4", "--recent")
    ran = run(compress, *given, "--out=x.beacon")
    assert ran.code == 0 and "(the last 8 raw)" in ran.out, ran.err
    options = {"ratio": 4, "recent": True, "max_new_tokens": 9}
    expected = model.generate("At dawn", context=TEXT, **options)
    ask = ("--prompt=At dawn", "--max_new_tokens=9")
    assert run(generate, *ask, *given).out == expected + "\n"
    # A pack goes on as it was made, with or without the flag.
    assert run(generate, *ask, "--load_memory=x.beacon").out == expected + "\n"
    plain = run(compress, "--context=context.txt", "--ratio=4", "--out=y.beacon")
    assert plain.code == 0 and "raw" not in plain.out
    fails(
        run(generate, *ask, "--load_memory=y.beacon", "--recent"),
        "--recent=True but the memory was made without it and stays so: leave --recent",
    )


def test_as_a_process_only_the_text_is_on_stdout(folder, model):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "beacon_jax.generate", f"--model={folder}"),
            *("--prompt_file=-", "--ratio=2", "--max_new_tokens=4"),
        ],
        cwd=ROOT,
        input="At dawn\n",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    expected = model.generate("At dawn", ratio=2, max_new_tokens=4)
    assert result.stdout == expected + "\n"
    assert "memory: 11 tokens in 4 memory slots + 3 in the open" in result.stderr


def test_several_prompts_are_asked_against_one_context_as_one_batch(run, model):
    prompts = ("At dawn", "The harbour was ")
    ran = run(
        generate,
        *("--context=context.txt", "--ratio=4", "--json", "--max_new_tokens=5"),
        *(f"--prompt={prompt}" for prompt in prompts),
        *("--temperature=0.9", "--top_k=20", "--top_p=0.9", "--min_p=0.01"),
        *("--repetition_penalty=1.1", "--seed=3"),
    )
    assert ran.code == 0, ran.err
    memory = model.compress(TEXT, ratio=4)
    expected = model.complete(
        list(prompts),
        memory=memory,
        ratio=4,
        max_new_tokens=5,
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=3,
    )
    lines = [json.loads(line) for line in ran.out.splitlines()]
    for line, prompt, made in zip(lines, prompts, expected, strict=True):
        assert line["prompt"] == prompt and line["text"] == made.text
        assert line["tokens"] == made.tokens.tolist()
        assert line["finish"] == made.finish and line["note"] == ""
        assert line["prompt_tokens"] == len(prompt)
        assert line["context_tokens"] == len(TEXT)
        assert line["answer_tokens"] == len(made.tokens)
        parts = {"compile", "context", "first_token", "later_tokens"}
        assert set(line["seconds"]) == parts and line["tokens_per_second"] > 0
        tokens = len(TEXT) + len(prompt) + len(made.tokens)
        slots, raw = tokens // 8 * 2, tokens % 8
        entries = slots + raw + raw // 4  # the open window's beacons too
        assert line["memory"] == {
            "tokens": tokens,
            "slots": slots,
            "open_window": raw,
            "entries": entries,
            "bytes": entries * memory.slot_nbytes,
            "full_attention_bytes": tokens * memory.slot_nbytes,
            "ratio": round(tokens / entries, 2),
            "planned_ratios": [4],
        }
    plain = run(
        generate,
        *("--context=context.txt", "--ratio=4", "--max_new_tokens=5"),
        *(f"--prompt={prompt}" for prompt in prompts),
    )
    made = model.generate(list(prompts), memory=memory, ratio=4, max_new_tokens=5)
    assert plain.out == "".join(f"{text}\n" for text in made)


def test_a_stop_string_ends_the_text(run, model):
    free = model.generate("At dawn", ratio=2, max_new_tokens=12)
    stop = free[4]
    ran = run(
        generate,
        *("--prompt=At dawn", "--ratio=2", "--max_new_tokens=12", "--json"),
        *(f"--stop={stop}", "--stop=never said"),
    )
    (line,) = map(json.loads, ran.out.splitlines())
    assert line["text"] == free[: free.index(stop)] and line["finish"] == "stop"


def test_a_compressed_file_is_continued_and_answers_as_the_whole_text(run, model):
    ran = run(
        compress, "--context=context.txt", "--ratio=4", "--out=first.beacon", "--seed=1"
    )
    assert ran.code == 0, ran.err
    assert "memory: 192 tokens in 48 memory slots + 0 in the open window" in ran.out
    slot = model.compress("x", ratio=4).slot_nbytes
    assert f"full attention: {192 * slot / 2**20:.3f} MiB" in ran.out
    assert ", x4; " in ran.out and "wrote first.beacon" in ran.out
    assert "tokens/s" in ran.err
    Path("more.txt").write_text("Then they came back.")
    parts = ("--memory=first.beacon", "--context=more.txt", "--out=both.beacon")
    assert run(compress, *parts).code == 0
    both = Memory.load("both.beacon", model)
    assert both.rows[0].tokens is not None
    assert both.lengths.tolist() == [192 + 20] and both.slots.tolist() == [26 * 2]
    options = ("--prompt=At dawn", "--max_new_tokens=9")
    ran = run(generate, *options, "--load_memory=both.beacon")
    whole = TEXT + "Then they came back."
    expected = model.generate("At dawn", context=whole, ratio=4, max_new_tokens=9)
    assert ran.out == expected + "\n", ran.err
    # The context is saved as it was before the prompt.
    parts = ("--load_memory=first.beacon", "--context=more.txt")
    ran = run(generate, *options, *parts, "--save_memory=again.beacon")
    assert ran.out == expected + "\n", ran.err
    again = Memory.load("again.beacon", model)
    for name in ("spans", "ratios", "marks", "tokens"):
        ours, theirs = (getattr(m.rows[0], name) for m in (again, both))
        np.testing.assert_array_equal(ours, theirs)


def test_a_file_without_tokens_says_so_when_they_are_needed(run):
    options = ("--context=context.txt", "--ratio=4")
    assert run(compress, *options, "--out=a.beacon", "--no_tokens").code == 0
    fails(
        run(
            generate,
            *("--load_memory=a.beacon", "--prompt=x", "--repetition_penalty=1.2"),
        ),
        "repetition_penalty needs the tokens",
    )


@pytest.mark.slow
def test_a_budget_and_lossless_spans_are_kept_and_accounted_for(run, model):
    prompt, new = "At dawn", 9
    ran = run(
        generate,
        *("--context=context.txt", "--max_slots=70", "--json", f"--prompt={prompt}"),
        f"--max_new_tokens={new}",
    )
    (line,) = map(json.loads, ran.out.splitlines())
    assert line["note"].startswith("budget of 70 slots: x4")
    assert line["note"].split("; ")[0] in ran.err
    assert line["memory"]["tokens"] == len(TEXT) + len(prompt) + new
    assert line["memory"]["slots"] + line["memory"]["open_window"] <= 70
    Path("id.txt").write_text(TEXT + "The id is 52817. " + TEXT)
    options = ("--context=id.txt", "--ratio=4", r"--spans=\d+")
    ran = run(compress, *options, "--out=a.beacon")
    assert "lossless: 1 of 51 windows uncompressed, 6 slots more" in ran.err
    ran = run(compress, *options, "--out=b.beacon", "--lossless=slots")
    assert "lossless: 5 tokens in 1 of 51 windows kept, 5 slots more" in ran.err
    kept = Memory.load("b.beacon", model).rows[0]
    raw = kept.spans[kept.ratios == 0, 0]
    assert raw.tolist() == list(range(len(TEXT) + 10, len(TEXT) + 15))


def test_auto_takes_the_cheaper_path_and_says_why(run):
    ran = run(compress, "--context=context.txt", "--ratio=auto-4", "--out=a.beacon")
    assert ran.code == 0 and re.search(r"auto-4: (x4|uncompressed), .*FLOP", ran.err)


def test_a_long_text_shows_its_progress_and_gives_the_same_memory(run, model):
    long = TEXT * 3  # 72 windows: 5 pieces
    Path("long.txt").write_text(long)
    seen = []
    pieces = model.compress(long, ratio=4, on_progress=lambda *x: seen.append(x))
    piece = PIECE_WINDOWS * 8
    edges = [min(end, len(long)) for end in range(piece, len(long) + piece, piece)]
    assert seen == [(end, len(long)) for end in edges] and len(seen) == 5
    whole = model.compress(long, ratio=4)
    count = int(whole.slots[0])
    for ours, theirs in (
        (pieces.state.k, whole.state.k),
        (pieces.state.v, whole.state.v),
    ):
        np.testing.assert_allclose(ours[:, :, :count], theirs[:, :, :count], atol=1e-5)
    ran = run(compress, "--context=long.txt", "--ratio=4", "--out=long.beacon")
    assert re.search(r"; read 576 tokens in [\d.]+ s, [\d,.]+ tokens/s\n", ran.err)


def test_progress_counts_all_rows_of_a_batch_and_every_kept_window(model):
    seen = []
    rows = [TEXT, TEXT[:50], TEXT[:9] + "41" + TEXT]
    model.compress(
        rows,
        ratio=4,
        spans=r"\d+",
        lossless="slots",
        on_progress=lambda *x: seen.append(x),
    )
    fed, totals = zip(*seen, strict=True)
    assert set(totals) == {sum(map(len, rows))}
    assert list(fed) == sorted(fed) and fed[-1] == totals[0] and len(fed) > 2


def test_text_is_utf8_or_what_encoding_says(run):
    options = ("--prompt=At dawn", "--ratio=4", "--max_new_tokens=5")
    expected = run(generate, *options, "--context=context.txt").out
    text = TEXT.replace("dawn", "d\xe4wn")
    files = {"mark.txt": TEXT.encode("utf-8-sig"), "wide.txt": TEXT.encode("utf-16")}
    files |= {"old.txt": text.encode("cp1252"), "new.txt": text.encode()}
    for name, data in files.items():
        Path(name).write_bytes(data)
    assert run(generate, *options, "--context=mark.txt").out == expected
    wide = run(generate, *options, "--context=wide.txt")
    fails(wide, "--context=wide.txt is UTF-16, not UTF-8: read it with")
    wide = run(generate, *options, "--context=wide.txt", "--encoding=utf-16")
    assert wide.out == expected, wide.err
    old = run(compress, "--context=old.txt", "--ratio=4", "--out=a.beacon")
    fails(old, "--context=old.txt is no text in UTF-8: byte 0xe4 at")
    assert "--encoding=cp1252" in old.err and not Path("a.beacon").exists()
    expected = run(generate, *options, "--context=new.txt").out
    old = run(generate, *options, "--context=old.txt", "--encoding=cp1252")
    assert old.out == expected, old.err


@pytest.mark.parametrize("flag", ["context", "prompt_file"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
        (codecs.BOM_UTF8 + b"\r\n", "is empty"),
        ("\u3000\n".encode(), "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        (rb"{\rtf1\ansi Hello}", "is RTF, no plain text: save it as plain text"),
    ],
)
def test_a_file_without_a_text_is_named(run, flag, data, message):
    Path("a.txt").write_bytes(data)
    options = () if flag == "prompt_file" else ("--prompt=x",)
    fails(run(generate, *options, f"--{flag}=a.txt"), f"--{flag}=a.txt {message}")


@pytest.mark.parametrize("words", [["--prompt=x", "--context=-"], ["--chat"]])
def test_a_closed_stdin_is_named(run, words, monkeypatch):
    monkeypatch.setattr(io, "TextIOWrapper", lambda *_, **__: None)
    fails(run(generate, *words), words[-1])


def test_a_conversation_survives_a_line_that_is_no_text(run):
    Path("chat.jinja").write_text(TEMPLATE)
    options = ("--chat", "--chat_template=chat.jinja", "--max_new_tokens=5")
    ran = run(generate, *options, stdin=b"Wh\xff left?\nWho left?\n/memory\n")
    expected = run(generate, *options, stdin="Who left?\n/memory\n")
    assert ran.code == 0 and ran.out == expected.out != "", ran.err
    assert "error: the text Wh\\udcff left? has byte 0xff at character 2" in ran.err
    assert "at character 2" not in expected.err


def test_a_conversation_on_stdin(run, folder, model):
    Path("chat.jinja").write_text(TEMPLATE)
    said = "Who left?\n\n/memory\n/undo\n/undo\n/nothing\n/save\nWho left?\n"
    ran = run(
        generate,
        *("--chat", "--context=context.txt", "--ratio=4", "--max_new_tokens=5"),
        *("--chat_template=chat.jinja", "--system=Short."),
        stdin=said + "/save talk.beacon\n/save talk.beacon\n/exit\nnever read\n",
    )
    assert ran.code == 0, ran.err
    prompt = "<system>Short.<end><user>Who left?<end><assistant>"
    expected = model.complete(
        model.encode(TEXT + prompt, "all", first=True), ratio=4, max_new_tokens=5
    )
    assert ran.out == f"{expected.text}\n" * 2
    loaded = Memory.load("talk.beacon", model)
    (tokens,) = loaded.lengths.tolist()
    slots = int(loaded.slots[0])
    line = rf"memory: {tokens} tokens in {slots} memory slots .*; full attention: .*\n"
    assert len(re.findall(line, ran.err)) == 2
    assert f"row 0: {tokens} tokens -> {slots} memory slots" in ran.err
    assert "1 messages are left" in ran.err
    assert "error: nothing to undo" in ran.err
    exists = "/undo, /save FILE, /memory and /exit"
    assert f"error: unknown command /nothing: there are {exists}." in ran.err
    assert "error: /save needs the name of a file" in ran.err
    assert "error: /save talk.beacon: the file exists" in ran.err


def test_a_question_is_asked_in_the_template_behind_the_context(
    run, make_folder, model
):
    template = {"chat_template": TEMPLATE}
    asked = make_folder()
    settings = asked / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | template))
    options = ("--prompt=Who left?", "--ratio=4", "--max_new_tokens=5")
    where = (f"--model={asked}", "--context=context.txt", "--instruct")
    ran = run(generate, *options, *where)
    written = TEXT + "<user>Who left?<end><assistant>"
    expected = model.generate(written, ratio=4, max_new_tokens=5)
    assert ran.out == expected + "\n", ran.err


def test_a_question_needs_a_template_and_a_ratio_beacons(run, make_folder):
    fails(
        run(generate, "--prompt=x", "--instruct"),
        "the tokenizer of",
    )
    ran = run(generate, "--prompt=x", "--instruct")
    assert "has no chat template, base models have none: give the prompt as" in ran.err
    plain = f"--model={make_folder(beacons=False)}"
    for ratio in ("8", "2,4", "auto-8"):
        ran = run(generate, plain, "--prompt=x", f"--ratio={ratio}")
        fails(ran, "--ratio=")
        assert "this model has none" in ran.err and "use --ratio=full" in ran.err
        assert "BeaconConfig" not in ran.err


def test_an_interrupt_stops_the_answer_and_not_the_conversation(run, monkeypatch):
    def say(self, text, on_text=None):
        if text == "stop me":
            raise KeyboardInterrupt
        raise ValueError(f"heard {text}")

    monkeypatch.setattr("beacon_jax.inference.chat.Chat.say", say)
    Path("chat.jinja").write_text(TEMPLATE)
    options = ("--chat", "--chat_template=chat.jinja")
    ran = run(generate, *options, stdin="stop me\ngo on")
    assert ran.code == 0
    assert ran.err.index("stopped: that turn") < ran.err.index("error: heard go on")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=x", "--context=gone.txt"], "--context=gone.txt: no such file"),
        (["--prompt=x", "--context=-"], "--context=- is empty"),
        (["--prompt=x", "--context=-", "--context=-"], "--context=- is given twice"),
        (["--context=-", "--prompt_file=-"], "--context=- and --prompt_file=- both"),
        (["--prompt=x", "--prompt_file=y"], "--prompt_file=y together with --prompt"),
        (["--prompt_file=gone.txt"], "--prompt_file=gone.txt: no such file"),
        ([], "--prompt is missing: give it, --prompt_file or --chat"),
        (["--chat", "--prompt=x"], "--prompt=['x'] together with --chat"),
        (["--chat", "--json"], "--json=True together with --chat"),
        (["--chat", "--context=-"], "--context=- reads stdin, which --chat"),
        (["--chat"], "the tokenizer of .* has no chat template.*--chat_template=FILE"),
        (["--chat", "--chat_template=no"], "--chat_template=no: no such file"),
        (["--chat", "--chat_template=-"], "--chat_template=- reads stdin"),
        (["--prompt=x", "--system=y"], "--system=y is of --chat"),
        (["--prompt=x", "--ratio=many"], "--ratio=many: use 8"),
        (
            ["--prompt=x", "--ratio=3"],
            "--ratio=.*3.* does not divide window=8: use one",
        ),
        (["--prompt=x", "--ratio=automatic"], "--ratio=automatic: use 8"),
        (["--prompt=x", "--ratio=-4"], "--ratio=-4: use 8"),
        (["--prompt=x", "--max_bytes=2 cups"], "--max_bytes='2 cups' must be"),
        (["--prompt=x", "--max_slots=0"], "--max_slots=0 must be"),
        (["--prompt=x", "--ratio=2", "--max_slots=9"], "--ratio=2 together with max"),
        (["--prompt=x", "--spans=a"], "--spans=a marks parts of --context"),
        (["--prompt=x", "--context=context.txt", "--spans=("], "--spans='(' is not a"),
        (["--prompt="], "--prompt= is empty"),
        *(
            ([*more, f"--{name}=a\udcff"], f"--{name}=a\\udcff has byte 0xff at char")
            for name, more in (
                ("prompt", []),
                ("stop", ["--prompt=x"]),
                ("spans", ["--prompt=x", "--context=context.txt"]),
                ("system", ["--chat"]),
            )
        ),
        (
            ["--prompt=x", "--context=context.txt", "--encoding=a\udcff"],
            "--encoding=a\udcff is unknown",
        ),
        (["--prompt=x", "--context=."], "--context=. is a folder"),
        (["--prompt=x", "--context="], "--context= is empty: name a file"),
        (["--prompt=x", "--load_memory=."], "--load_memory=. is a folder"),
        (["--prompt=x", "--temperature=-1"], "--temperature=-1.0 must be"),
        (["--prompt=x", "--max_new_tokens=0"], "--max_new_tokens=0 must be"),
        (["--prompt=x", "--top_p=2"], "--top_p=2.0 must be"),
        (["--prompt=x", "--stop="], "--stop= has an empty string"),
        (["--prompt=x", "--model=nowhere"], "--model=nowhere: there is no such folder"),
        (["--prompt=x", "--mesh=tensor:99"], "--mesh='tensor:99' needs 99 devices"),
        (["--prompt=x", "--load_memory=no"], "--load_memory=no: no such file"),
        (["--prompt=x", "--load_memory=context.txt"], "context.txt .*"),
        (["--prompt=x", "--save_memory=a"], "--save_memory=a writes the memory of a"),
        (
            ["--prompt=x", "--context=context.txt", "--save_memory=context.txt"],
            "--save_memory=context.txt is a text that this command reads",
        ),
    ],
)
def test_bad_input_ends_with_one_line_that_names_it(run, arguments, message):
    ran = run(generate, *arguments)
    assert (ran.code, ran.out) == (1, "")
    assert re.search(
        f"error: {message}" if ".*" in message else re.escape(f"error: {message}"),
        ran.err,
    ), ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "--prompt=",
            "--ratio=-4",
            "--ratio=x",
            "--max_slots=0",
            "--max_bytes=2 cups",
        ),
        *("--max_new_tokens=0", "--temperature=-1", "--top_p=2", "--stop="),
        *("--load_memory=gone", "--context=gone", "--spans=(", "--save_memory=."),
        *("--prompt=a\udcff", "--stop=a\udcff", "--spans=a\udcff"),
    ],
)
def test_what_needs_no_model_is_checked_before_it_is_loaded(run, argument, monkeypatch):
    monkeypatch.setattr("beacon_jax.cli.context.load_model", lambda *_: 1 / 0)
    fails(run(generate, "--prompt=x", "--context=context.txt", argument), argument[:6])


def test_compress_refuses_what_it_cannot_write_before_it_loads_the_model(run):
    Path("a.beacon").write_text("kept")
    fails(run(compress, "--out=b.beacon"), "--context is missing")
    options = ("--context=context.txt", "--ratio=4")
    fails(run(compress, *options, "--out=a.beacon"), "--out=a.beacon exists")
    fails(run(compress, *options, "--out=."), "--out=. is a folder")
    fails(run(compress, *options, "--out="), "--out= is empty")
    fails(run(compress, *options, "--out=a.beacon/b"), "--out=a.beacon/b: ")
    text = Path("context.txt").read_bytes()
    replaced = ("--out=./context.txt", "--overwrite")
    fails(run(compress, *options, *replaced), "--out=./context.txt is a text")
    assert Path("context.txt").read_bytes() == text
    fails(run(compress, *options, "--out=a.beacon", "--model=no"), "--out=a.beacon")
    fails(run(compress, *options, "--out=a.beacon", "--overwrite"), "--out=a.beacon is")
    assert Path("a.beacon").read_text() == "kept"
    Path("a.beacon").unlink()
    for again in ((), ("--overwrite",)):
        assert run(compress, *options, "--out=a.beacon", *again).code == 0


def test_a_file_of_several_contexts_is_refused(run, model):
    model.compress(["one", "two"], ratio=4).save("two.beacon")
    options = ("--prompt=x", "--load_memory=two.beacon")
    fails(run(generate, *options), "--load_memory=two.beacon holds 2 contexts")
