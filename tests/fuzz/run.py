"""Tries one damaged input, and judges what came of it."""

import contextlib
import dataclasses
import hashlib
import os
import random
import re
import resource
import shutil
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from beacon_jax.cli.ending import MENDED
from tests.fuzz.device import DEVICE
from tests.fuzz.kinds import KINDS

PACKAGE = str(Path(__file__).parents[2] / "beacon_jax")
SECONDS = 1.0  # that an error may take, of the clock or of the processor
ROOM = 6 << 30  # bytes that a worker may ask for on top of what its imports took
# How messages begin that Python or a library wrote.
BARE = re.compile(
    r"\[Errno|invalid literal|could not convert|[^:]{0,60}(object has no attribute|"
    r"object is not|unexpected keyword|takes \d+ positional|out of range$)"
)
# How messages name an argument and its value, or the text that was given.
NAMED = re.compile(r"\w=|^(prompt|context|the conversation) has ")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Attributes:
      name: "KIND:SEED", as --only takes it.
      what: was done to the input.
      how: "success", "error" or "failure".
      said: the message of an error, or what is wrong.
      seconds: of the clock.
    """

    name: str
    what: str
    how: str
    said: str = ""
    seconds: float = 0.0


class Fuzz:
    """Whole inputs in a folder, and tries with copies of them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._made: set[str] = set()

    def attempt(self, kind: str, seed: int) -> Outcome:
        """Tries the input of a seed; that of a negative seed is whole."""
        rng = random.Random(f"{kind}:{seed}")
        whole = self._whole(kind)
        shutil.rmtree(self._folder / "try", ignore_errors=True)
        source = self._folder / "try" / "in"
        wholes, uses = sorted(whole.iterdir()), KINDS[kind].uses
        at = rng.randrange(len(wholes)) if seed >= 0 else seed % len(wholes)
        shutil.copytree(wholes[at], source)
        out = self._folder / "try" / "out"
        out.mkdir()
        what, key = KINDS[kind].damage(rng, source) if seed >= 0 else ("nothing", "")
        use = rng.choice(uses) if seed >= 0 else uses[seed % len(uses)]
        (self._folder / "what").write_text(what, errors="replace")  # if it dies of it
        before = _content(source)
        DEVICE.reset()
        clock, processor = time.monotonic(), time.process_time()
        wrong, how = "", "success"
        try:
            wrong = use(source, out) or ""
        except Exception as error:
            how = "error"
            said = str(error)
            fault = _fault(error, [source, *_names(source, before), key])
        except BaseException as error:  # a panic of a library
            how, said, fault = "failure", repr(error), f"panic: {error!r}"
        seconds = time.monotonic() - clock
        took = min(seconds, time.process_time() - processor)
        if how == "success":
            said = wrong
        else:
            wrong = fault
            if took > SECONDS:
                wrong = wrong or f"took {took:.1f} s: {said}"
            if DEVICE.count:
                wrong = wrong or f"after work of the device: {said}"
        after = _content(source)
        if after != before and not KINDS[kind].writes:
            changed = sorted({n for n, _ in before.items() ^ after.items()})
            wrong = f"changed its input, {changed}; {wrong or said}"
        name = f"{kind}:{seed}"
        what = f"{use.__name__.strip('_')}, {what}"
        if wrong:
            return Outcome(name, what, "failure", wrong, seconds)
        return Outcome(name, what, how, said, seconds)

    def _whole(self, kind: str) -> Path:
        folder = self._folder / "whole" / kind
        if kind not in self._made:
            folder.mkdir(parents=True)
            KINDS[kind].make(folder)
            self._made.add(kind)
        return folder


def work(pipe: Connection, folder: Path) -> None:
    """Tries inputs that come in, until the other end is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    folder.mkdir(parents=True)
    fuzz = Fuzz(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
        "SC_PAGESIZE"
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    with contextlib.suppress(EOFError):
        while True:
            kind, seed = pipe.recv()
            try:
                pipe.send(fuzz.attempt(kind, seed))
            except Exception:  # of this program's own
                said = traceback.format_exc()
                pipe.send(Outcome(f"{kind}:{seed}", "nothing", "failure", said))


def _fault(error: Exception, names: list) -> str:
    """Says why an error is none of ours; "" if it is one."""
    said = f"{type(error).__name__}: {error}"
    if not isinstance(error, MENDED):
        frames = traceback.extract_tb(error.__traceback__)
        return f"{said}\n{''.join(traceback.format_list(frames[-3:]))}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, UnicodeError) or not frame.filename.startswith(PACKAGE):
        return f"of a library, {frame.filename}:{frame.lineno}: {said}"
    if BARE.match(str(error)):
        return f"of Python, {frame.filename}:{frame.lineno}: {said}"
    text = str(error)
    known = any(str(name) in text for name in names if name)
    if not known and not NAMED.search(text):
        return f"names no file, argument or key: {said}"
    return ""


def _names(folder: Path, content: dict[str, str]) -> list[str]:
    return [Path(name).name for name in content]


def _content(folder: Path) -> dict[str, str]:
    """Returns a hash of each file and link of a folder by its name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found
