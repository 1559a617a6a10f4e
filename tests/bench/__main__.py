"""`make bench`: ratios measured side by side in one run on this machine. They are printed and gate nothing.

python -m tests.bench [checkpoint] [checkpoint_memory] [export] [packing] [plan] [plan_memory] [preparation] [speed]

Options of a bench come after its name. Bare, all run, `speed` last: it takes over an hour and installs TRL (2 GB).
"""

from __future__ import annotations

import sys
from itertools import takewhile

from tests.bench import checkpoint, checkpoint_memory, export, packing, plan, plan_memory, preparation, speed

BENCHES = {
    "checkpoint": checkpoint.main,
    "checkpoint_memory": checkpoint_memory.main,
    "export": export.main,
    "packing": packing.main,
    "plan": plan.main,
    "plan_memory": plan_memory.main,
    "preparation": preparation.main,
    "speed": speed.main,
}

if __name__ == "__main__":
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    chosen = names or list(BENCHES)
    unknown = sorted(set(chosen) - set(BENCHES))
    if unknown:
        sys.exit(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    for name in chosen:
        BENCHES[name]()
