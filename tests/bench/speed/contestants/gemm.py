"""The machine's peak of matrix products: `torch.mm` of large square matrices, the best of many, in GFLOP/s.

python gemm.py SPEC.json
"""

from __future__ import annotations

import time

import common
import torch

SIZES = (2048, 4096)


def main() -> None:
    """Best rate in fp32 and bf16."""
    common.spec()
    common.answer(**{name: max(rate(size, dtype) for size in SIZES) for name, dtype in FORMATS.items()})


FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rate(size: int, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Of the fastest single product; what else runs on the machine can only make one slower."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


if __name__ == "__main__":
    main()
