"""The table of families: which test shows which cell, and why some cells cannot be.

A test that shows something about a family is marked ``@pytest.mark.cell("column")`` and takes the family as its
argument ``name``. `make families` runs all of them and writes `docs/families.md` (`tests/families_table.py`).
"""

from __future__ import annotations

from tests.tiny_families import CONFIGS

FULL, ATTENTION, EXPERTS, PACKING = "full", "LoRA attention", "LoRA experts", "packing"
ZERO2, ZERO3, UNEVEN, BF16 = "ZeRO-2 x2", "ZeRO-3 x2", "uneven experts", "bf16"
RESUME, MERGED, ADAPTER, IMAGE, ASCEND = "resume", "merged export", "adapter reload", "image", "Ascend stand-in"
COLUMNS = (
    FULL, ATTENTION, EXPERTS, PACKING, ZERO2, ZERO3, UNEVEN, BF16, RESUME, MERGED, ADAPTER, IMAGE, ASCEND,
)  # fmt: skip

FAMILIES = tuple(CONFIGS)
DENSE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_5", "qwen3_5_text")
ROUTED = tuple(name for name in FAMILIES if name not in DENSE)
IMAGES = ("qwen3_5", "qwen3_5_moe", "kimi_k25")
TOWERS = (*IMAGES, "minimax_m3_vl", "step3p7", "glm5_next", "bailingmm_moe_v2_lite")


def why_not(name: str, column: str) -> str | None:
    """The reason why a cell cannot be; None: it must have a test."""
    if column in (EXPERTS, UNEVEN) and name in DENSE:
        return "no experts"
    if column == IMAGE and name not in TOWERS:
        return "text only"
    if column == IMAGE and name not in IMAGES:
        return "images are not built for it; text trains"
    return None
