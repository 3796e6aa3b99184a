"""Memory that is left of this computer, or of the container it runs in."""

import os
from pathlib import Path


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
    if not found and hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)
