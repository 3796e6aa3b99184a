"""Commands that are interrupted or lose their reader, as processes without jax."""

import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from beacon_jax.cli import ending
from beacon_jax.inference.validate import ArgumentError

START = "from beacon_jax.cli.ending import ended, fail\nimport sys, time\n"


def start(body: str, **options) -> subprocess.Popen:
    code = START + "\n".join(
        f"    {line}" if i else line for i, line in enumerate(body)
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, **options
    )


def interrupted(body: list[str]) -> tuple[int, str]:
    """The exit code and stderr of code that says "ready" and then gets Ctrl-C."""
    process = start(body, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    return process.returncode, err


def test_ctrl_c_is_one_line_that_says_what_goes_on():
    body = [
        'with ended("evaluate", "the same command goes on"):',
        'print("ready", flush=True)',
        "time.sleep(60)",
    ]
    code, err = interrupted(body)
    assert code == 130
    assert err == "\nevaluate: stopped by Ctrl-C; the same command goes on\n"


def test_ctrl_c_ends_a_command_that_python_cannot_answer_for():
    """As while XLA compiles: one call of C that no signal ends."""
    body = [
        'with ended("generate", patience=0.2):',
        "import ctypes",
        "libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)",
        "libc.pthread_mutex_lock(mutex)",
        'print("ready", flush=True)',
        "libc.pthread_mutex_lock(mutex)",
    ]
    begun = time.monotonic()
    code, err = interrupted(body)
    assert (code, err) == (130, "\ngenerate: stopped by Ctrl-C\n")
    assert time.monotonic() - begun < 15


CALLBACKS = {
    "gc": ["gc.callbacks.append(slow)", "gc.collect()", "gc.callbacks.clear()"],
    "del": ["class A:", "    def __del__(self): slow()", "a = A()", "del a"],
    "weakref": ["class A: pass", "a = A()", "r = weakref.ref(a, slow)", "del a"],
}


@pytest.mark.parametrize("where", CALLBACKS)
def test_ctrl_c_inside_a_callback_that_ignores_exceptions_is_not_lost(where):
    """As in that of jax, which the garbage collector calls."""
    body = [
        'with ended("train"):',
        "import gc, weakref",
        "def slow(*_):",
        '    print("ready", flush=True)',
        "    time.sleep(1)",
        *CALLBACKS[where],
        "while True: time.sleep(0.01)",
    ]
    begun = time.monotonic()
    assert interrupted(body) == (130, "\ntrain: stopped by Ctrl-C\n")
    assert time.monotonic() - begun < 10


def test_ctrl_c_that_somebody_else_catches_still_ends_the_command():
    body = [
        'with ended("bench", patience=0.2):',
        "from beacon_jax.cli import ending",
        "ending.CLEANING = 0.2",
        "while True:",
        "    try:",
        '        print("ready", flush=True)',
        "        time.sleep(60)",
        "    except BaseException: pass",
    ]
    assert interrupted(body) == (130, "\nbench: stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    "body",
    [
        # numpy, while it is imported, makes another error of it.
        ["try: say()", "except KeyboardInterrupt: raise ImportError('numpy')"],
        ["try: say()", "except KeyboardInterrupt: fail(ImportError('numpy'))"],
        # The user is impatient, and the command tidies up.
        ["try: say()", "finally: say()"],
    ],
)
def test_ctrl_c_ends_a_command_whatever_is_made_of_it(body):
    say = ["def say():", "    print('ready', flush=True)", "    time.sleep(60)"]
    body = ['with ended("train", patience=20):', *say, *body]
    process = start(body, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while process.stdout.readline():
        process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.read() == "\ntrain: stopped by Ctrl-C\n"
    assert process.wait(timeout=20) == 130


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_closed_stdout_ends_a_command_without_a_word(wrapped):
    body = [
        'with ended("inspect"):',
        "try:",
        "    for i in range(100_000): print(i, flush=True)",
        "except OSError as error: fail(error)",
    ]
    if not wrapped:
        body = [body[0], "for i in range(100_000): print(i, flush=True)"]
    process = start(body, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == 141


def test_what_the_user_can_mend_is_one_line():
    with pytest.raises(SystemExit) as ended:
        ending.fail(ValueError("--ratio=x: use 8."))
    assert ended.value.code == "error: --ratio=x: use 8."


def test_an_error_about_an_argument_names_the_flag_of_that_name():
    values = flags.FlagValues()
    flags.DEFINE_string("here", None, "", flag_values=values)
    assert ending.in_flags(ValueError("here=3 is no"), values) == "--here=3 is no"
    assert ending.in_flags(ValueError("nowhere=3 is no"), values) == "nowhere=3 is no"
    assert ending.in_flags(ValueError("here is no"), values) == "here is no"
    flags.DEFINE_string("model", "a/b", "", flag_values=values)
    values.mark_as_parsed()
    found = FileNotFoundError("path=a/b is no folder")
    assert ending.in_flags(found, values) == "--model=a/b is no folder"
    other = FileNotFoundError("path=c is no folder")
    assert ending.in_flags(other, values) == "c is no folder"
    for name, said in (
        ("here", "--here=x is"),
        ("there", "there='x' is"),
        ("text", "the text x is"),
    ):
        assert ending.in_flags(ArgumentError(name, "x", "is"), values) == f"{said}."


FULL = "error: stdout cannot be written (No space left on device): "


@pytest.mark.parametrize(
    "body", ["print(1)", "print(1, flush=True)", "print('x' * 10**5)"]
)
def test_a_full_stdout_is_one_line(body):
    with open("/dev/full", "w") as full:
        process = start(['with ended("generate"):', body], stdout=full)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err[: len(FULL)], err.count("\n")) == (1, FULL, 1)


@pytest.mark.parametrize(
    ("closed", "said"), [("1", "error: stdout is closed, and generate"), ("2", "")]
)
def test_a_closed_stream_is_no_traceback(closed, said):
    code = START + 'with ended("generate"):\n    print("no answer", file=sys.stderr)'
    words = ["sh", "-c", f'exec "$0" -c "$1" {closed}>&-', sys.executable, code]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("", int(closed == "1"))
    assert ran.stderr.startswith(said) and ran.stderr.count("\n") <= 1


@pytest.mark.parametrize("words", ["convert --help", "--help", "--version"])
def test_help_that_nobody_can_write_is_one_line(words):
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "beacon_jax", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(FULL)
