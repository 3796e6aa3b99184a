"""The most memory that a piece of work has in use at once.

Of a CPU it is the memory of the process, which Linux counts and lets be counted anew.
Other devices count theirs since the program began: a peak below an earlier one stays
unknown there. To know it of every method, give each a run of its own.
"""

import ctypes
from pathlib import Path

import jax

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK = "5"  # what is written to CLEAR: the highest number begins anew


class Meter:
    """Measures bytes above a base; 0 stands for what is not known."""

    def __init__(self) -> None:
        self._base = self._before = 0

    def begin(self, held: int) -> None:
        """Makes what is in use now the base, but for `held` bytes of it."""
        _give_back()
        self.restart()
        self._base = _in_use() - held

    def restart(self) -> None:
        """Forgets how much was in use until now."""
        try:
            CLEAR.write_text(PEAK)
            cleared = jax.default_backend() == "cpu"
        except OSError:
            cleared = False
        self._before = 0 if cleared else _highest()

    def highest(self) -> int:
        """Returns the most bytes above the base since `restart`."""
        found = _highest()
        return max(found - self._base, 0) if found > self._before else 0


def _give_back() -> None:
    """Gives the system what the process has freed, or the base would be too high.

    What was freed before is used again without a trace in the process's size.
    """
    if jax.default_backend() == "cpu" and CLEAR.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def _in_use() -> int:
    return _device("bytes_in_use") or _process("VmRSS")


def _highest() -> int:
    return _device("peak_bytes_in_use") or _process("VmHWM")


def _device(name: str) -> int:
    """Reads a number of the fullest device, 0 if devices do not count."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((x.get(name, 0) for x in stats), default=0)


def _process(name: str) -> int:
    """Reads a number of the process in bytes, 0 where Linux does not tell."""
    if jax.default_backend() != "cpu":
        return 0
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else 0
