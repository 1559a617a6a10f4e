"""Memory that this machine can still give: of a container, what its limit leaves."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
LIMIT_FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


def available_bytes() -> int:
    """The least of what the machine and each control group above this process have left, file caches not counted."""
    return min([psutil.virtual_memory().available, *_left_by_limits(_groups(Path("/proc/self/cgroup")))])


def _groups(listing: Path) -> list[Path]:
    """Folders of the control groups that bound this process's memory, innermost first; [] where there are none."""
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers in ("", "memory"):
            root = CGROUPS / controllers
            inner = root / path.lstrip("/")
            # A container often sees its own group as the root, while the path names it as the host does.
            found += [inner, *(parent for parent in inner.parents if root in (parent, *parent.parents))]
    return found


def _left_by_limits(groups: list[Path]) -> list[int]:
    left = []
    for group in groups:
        for limit, used, cache in LIMIT_FILES:
            try:
                bound = (group / limit).read_text().strip()
                if bound != "max":
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    left.append(max(0, int(bound) - int((group / used).read_text()) + int(stat.get(cache, 0))))
            except (OSError, ValueError):  # not this version, or not readable: the machine's own figure stands
                continue
    return left
