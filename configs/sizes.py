"""Amounts of memory as people write them."""

from __future__ import annotations

import math
import re

UNITS = {"g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}
AMOUNT = r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M)"


def bytes_of(text: str) -> int | None:
    """Of ``12GiB``, ``1.5 G`` (GiB too) or ``800MB``; None where the text is no such amount, or none of all."""
    found = re.fullmatch(rf"\s*{AMOUNT}\s*", text, re.IGNORECASE)
    amount = float(found[1]) * UNITS[found[2].lower()] if found else 0.0
    return int(amount) or None if math.isfinite(amount) else None
