"""Measures how long `--help` of each command takes; fails above a second.

python -m beacon_jax.bench.help_time

Processor time, the least of five runs: other programs do not change it, and on a free
machine the clock shows the same.
"""

import resource
import subprocess
import sys

from beacon_jax import cli

LIMIT = 1.0  # seconds
RUNS = 5


def seconds(*words: str) -> float:
    """Measures the least processor time of RUNS processes."""
    command = [sys.executable, "-m", "beacon_jax", *words, "--help"]
    taken = []
    for _ in range(RUNS):
        start = _children()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(_children() - start)
    return min(taken)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    slow = []
    for words in ([], *([name] for name in cli.COMMANDS)):
        found = seconds(*words)
        print(f"{' '.join(['beacon-jax', *words]):<24}{found:.2f} s", flush=True)
        slow += [" ".join(words)] if found > LIMIT else []
    if slow:
        sys.exit(f"error: more than {LIMIT} s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
