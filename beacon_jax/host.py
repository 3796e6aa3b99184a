"""Memory of this computer, and what is left of it or of the container it runs in."""

import os
from pathlib import Path


def total_bytes() -> int | None:
    """Returns the bytes of the machine's memory; None: not known."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes() -> int | None:
    """Returns the bytes that the machine or the container has left; None: not known.

    The number is that of the one that has less. Where neither tells, it is the whole
    memory of the machine.
    """
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=total_bytes())
