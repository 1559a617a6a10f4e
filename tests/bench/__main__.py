"""`make bench`: ratios measured side by side in one run on this machine. They are printed and gate nothing.

python -m tests.bench [checkpoint] [checkpoint_memory] [export] [packing] [plan] [plan_memory] [preparation]
"""

from __future__ import annotations

import sys

from tests.bench import checkpoint, checkpoint_memory, export, packing, plan, plan_memory, preparation

BENCHES = {
    "checkpoint": checkpoint.main,
    "checkpoint_memory": checkpoint_memory.main,
    "export": export.main,
    "packing": packing.main,
    "plan": plan.main,
    "plan_memory": plan_memory.main,
    "preparation": preparation.main,
}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(BENCHES)
    unknown = sorted(set(chosen) - set(BENCHES))
    if unknown:
        sys.exit(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    for name in chosen:
        BENCHES[name]()
