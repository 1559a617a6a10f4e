"""Dense peaks of cards as their makers publish them, for the model FLOP/s utilisation.

Collected from memory of the datasheets named, not from the sheets themselves: compare before you quote a figure.

"Dense": makers like to print the figure with 2:4 sparsity, which is twice as much. fp32 is that of the plain units,
since crosstune multiplies fp32 as fp32. A card that is not listed has no utilisation, unless ``device.peak_tflops``
says its peak.
"""

from __future__ import annotations

import re

import torch

PEAKS: tuple[tuple[str, float | None, float], ...] = (
    # Pattern of the name that the driver gives, TFLOP/s in bf16, in fp32. The first that fits counts.
    # NVIDIA Blackwell: HGX B200 datasheet (2025), per GPU: 4.5 PFLOPS with sparsity, 75 TFLOPS fp32.
    (r"\bB200\b", 2250, 75),
    # NVIDIA H200 datasheet (2024): SXM 1979 with sparsity, 67; NVL 1671 with sparsity, 60.
    (r"\bH200 NVL\b", 835.5, 60),
    (r"\bH200\b(?! NVL)", 989.4, 67),
    # NVIDIA H100 datasheet (2024) and Hopper white paper v1.04: SXM5 989.4 and 66.9; PCIe 756 and 51.2; NVL 835.5, 60.
    (r"\bH100 PCIe\b", 756, 51.2),
    (r"\bH100 NVL\b", 835.5, 60),
    (r"\bH100 (80GB HBM3|SXM)", 989.4, 66.9),
    # NVIDIA GH200 datasheet (2024): the GPU is an H100 SXM with other memory.
    (r"\bGH200\b", 989.4, 66.9),
    # NVIDIA H800: an H100 with slower links (H800 product brief).
    (r"\bH800 PCIe\b", 756, 51.2),
    (r"\bH800\b(?! PCIe)", 989.4, 66.9),
    # NVIDIA A100 datasheet (2021), and A800, an A100 with slower links.
    (r"\bA100\b", 312, 19.5),
    (r"\bA800\b", 312, 19.5),
    # NVIDIA A10 datasheet (2021), A30 datasheet (2022), A40 datasheet (2021).
    (r"\bA10\b", 125, 31.2),
    (r"\bA30\b", 165, 10.3),
    (r"\bA40\b", 149.7, 37.4),
    # NVIDIA L4 and L40S datasheets (2023): 242 and 733 with sparsity.
    (r"\bL4\b", 121, 30.3),
    (r"\bL40S\b", 362, 91.6),
    # NVIDIA Ada white paper v2.1, appendix A, and GA102 white paper v2.1, appendix A: bf16 with fp32 accumulation.
    (r"\bRTX 4090\b(?! (D|Laptop))", 165.2, 82.6),
    (r"\bRTX 3090\b(?! Ti)", 71, 35.6),
    # NVIDIA V100 datasheet (2020): SXM2 15.7, PCIe 14, V100S 16.4; no bf16.
    (r"\bV100-SXM", None, 15.7),
    (r"\bV100-PCIE", None, 14),
    (r"\bV100S-PCIE", None, 16.4),
    # NVIDIA T4 datasheet (2019); no bf16.
    (r"\bT4\b", None, 8.1),
    # AMD Instinct product pages. One MI250X (383 and 47.9) shows as two devices, each a half.
    (r"\bMI210\b", 181, 22.6),
    (r"\bMI250X\b(?! ?/)", 191.5, 23.95),
    (r"\bMI300X\b", 1307.4, 163.4),
    (r"\bMI325X\b", 1307.4, 163.4),
    # Intel Data Center GPU Max product briefs (2023): a whole card. See xpu.py for the parts it may show as.
    (r"\bMax 1550\b", 832, 52.4),
    (r"\bMax 1100\b", 352, 22.2),
)
# Huawei publishes no figure per Ascend 910B variant (910B1 to B4) with its precision, and those that circulate (280 to
# 414) differ between pages: none is listed.


def published_peak_flops(card: str, dtype: torch.dtype) -> float | None:
    """Dense peak of a card in FLOP/s.

    Args:
        card: name as the driver gives it, such as ``NVIDIA H100 80GB HBM3``.
        dtype: bf16 or fp32.

    Returns:
        None where the card is not listed, or does not multiply `dtype`.
    """
    for pattern, bf16, fp32 in PEAKS:
        if re.search(pattern, card):
            peak = {torch.bfloat16: bf16, torch.float32: fp32}.get(dtype)
            return None if peak is None else peak * 1e12
    return None
