"""Figures as people read them."""

from __future__ import annotations


def in_gib(size: int) -> str:
    """Bytes in GiB, or MiB below one of them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
