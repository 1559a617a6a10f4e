"""No vendor's name outside the device folder, the launchers and what configures them.

`python tests/lint_vendor_names.py` prints ``file:line`` of each breach and exits with 1. Comments and docstrings
count: a comment about one vendor's behaviour belongs to that vendor's file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "data_prep", "train")
ALLOWED = (
    "train/devices/",
    "configs/device/",
    "configs/schema/device.py",
    "configs/schema/doctor.py",
    "configs/doctor",
    "configs/cluster/",
    "configs/launcher/",
    "configs/groups.py",
)
NAMES = re.compile(
    r"torch\.(cuda|npu|xpu|mps|hpu|musa|mlu|sdaa|supa)\b|\b(cuda|nccl|hccl|rccl|xccl|npu|nvidia|ascend|huawei|rocm|amd|intel|"
    r"habana|gaudi|cambricon|mthreads|musa|biren|sdaa|tecorigin|supa)\b|torch_npu",
    re.IGNORECASE,
)


def breaches(root: Path = ROOT) -> list[str]:
    """``file:line: text`` of every line that names a vendor where it must not."""
    found = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix not in (".py", ".yaml", ".jinja") or name.startswith(ALLOWED):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if NAMES.search(line):
                    found.append(f"{name}:{number}: {line.strip()}")
    return found


if __name__ == "__main__":
    faults = breaches()
    print("\n".join(faults) or "no vendor's name outside the device folder")
    sys.exit(bool(faults))
