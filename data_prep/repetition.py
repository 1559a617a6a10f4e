"""How much of a text repeats itself.

After the quality filters of Rae et al., "Scaling Language Models" (2021), appendix A.1.1.
"""

from __future__ import annotations

import re

from data_prep.shingles import WITHOUT_SPACES

RUN = 10
"""Words of a run."""
_MAX_CHARS = 4 * 2**20
"""Of a longer text only the beginning is looked at, which bounds the memory: up to 55 bytes a character."""

_ALONE = "".join(f"{chr(first)}-{chr(last)}" for first, last in WITHOUT_SPACES)
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def repeated_share(text: str) -> float:
    """The greater of two shares: of characters in lines, and of words in runs of ten words, that came before.

    A line counts from its second occurrence on, and so do the words of a run. In scripts without spaces each character
    is a word. A text of ten words or fewer repeats no run.
    """
    text = text[:_MAX_CHARS]
    return max(_in_lines(text), _in_runs(text))


def _in_lines(text: str) -> float:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if len(lines) < 2:
        return 0.0
    return 1 - sum(map(len, set(lines))) / sum(map(len, lines))


def _in_runs(text: str) -> float:
    words = _WORD.findall(text)
    runs = list(zip(*(words[i:] for i in range(RUN)), strict=False))
    if len(set(runs)) == len(runs):  # most texts
        return 0.0
    seen, covered, end = set(), 0, 0
    for place, run in enumerate(runs):
        if run in seen:
            covered += place + RUN - max(end, place)
            end = place + RUN
        seen.add(run)
    return covered / len(words)
