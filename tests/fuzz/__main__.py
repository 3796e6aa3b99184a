"""Tries damaged inputs of all kinds, and prints what came of them.

Every input is of a kind and a seed. A worker process tries them one after the other;
one that dies, or takes longer than a minute, is a failure, and another one goes on.

python -m tests.fuzz --count=2000
python -m tests.fuzz --only=config:17
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

PATIENCE = 60.0  # seconds
WARM = range(-6, 0)  # seeds of whole inputs, which have to do


def main() -> int:
    """Returns the exit code: 1 if any input failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="inputs, of all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--only", default="", help="KIND:SEED, or KIND")
    parser.add_argument("--verbose", action="store_true", help="print every input")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    from tests.fuzz.kinds import KINDS
    from tests.fuzz.run import Outcome

    kind, _, seed = given.only.partition(":")
    if kind and kind not in KINDS:
        parser.error(f"--only={given.only}: the kinds are {', '.join(KINDS)}")
    kinds = [kind] if kind else [*KINDS]
    each = -(-given.count // len(kinds))
    seeds = [int(seed)] if seed else range(given.seed, given.seed + each)
    inputs = [(kind, seed) for kind in kinds for seed in WARM]
    inputs += [(kind, seed) for seed in seeds for kind in kinds]
    counts: dict[str, collections.Counter] = {k: collections.Counter() for k in kinds}
    failures: list[Outcome] = []
    began = time.monotonic()
    with contextlib.closing(Worker()) as worker:
        for kind, seed in inputs:
            found = worker.attempt(kind, seed)
            if seed in WARM and found.how != "success":
                failures.append(found)
            if seed in WARM:
                continue
            counts[kind][found.how] += 1
            if found.how == "failure":
                failures.append(found)
            if given.verbose or given.only:
                print(
                    f"{found.name} {found.how} ({found.what}) {found.said}", flush=True
                )
    print(f"{'kind':<12}{'inputs':>8}{'success':>9}{'error':>7}{'failure':>9}")
    for kind, count in [
        *counts.items(),
        ("all", sum(counts.values(), collections.Counter())),
    ]:
        numbers = [count.total(), count["success"], count["error"], count["failure"]]
        print("{:<12}{:>8}{:>9}{:>7}{:>9}".format(kind, *numbers))
    print(f"{time.monotonic() - began:.0f} s")
    for found in failures:
        print(f"\n--only={found.name}: {found.what}\n  {found.said[:1500]}")
    return 1 if failures else 0


class Worker:
    """A process that tries inputs, and the next one when it dies."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self._starts, self._process, self._pipe = 0, None, None

    def attempt(self, kind: str, seed: int):
        from tests.fuzz.run import Outcome

        if self._process is None:
            self._start()
        self._pipe.send((kind, seed))
        if self._pipe.poll(PATIENCE):
            with contextlib.suppress(EOFError, ConnectionError):
                return self._pipe.recv()
            said = "the process died"
        else:
            said = f"no answer in {PATIENCE:.0f} s"
        self._process.kill()
        self._process.join()
        said = f"{said} (exit code {self._process.exitcode})"
        self._process = None
        what = Path(self._folder.name, str(self._starts), "what")
        what = what.read_text() if what.exists() else "nothing"
        return Outcome(f"{kind}:{seed}", what, "failure", said)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._folder.cleanup()

    def _start(self) -> None:
        from tests.fuzz.run import work

        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._starts += 1
        folder = Path(self._folder.name) / str(self._starts)
        self._process = context.Process(target=work, args=(theirs, folder), daemon=True)
        self._process.start()
        theirs.close()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
