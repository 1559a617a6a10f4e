"""Samples on a terminal: what is learned in colour, or in brackets where there is no colour."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from data_prep.samples import ShownSample, ShownText, visible

_LEARNED, _SPECIAL, _LABEL = "black on bright_green", "bold", "bold cyan"
_LABELS = {"rejected": "bold red", "not liked": "bold red"}


def has_colour(console: Console) -> bool:
    """Whether colours are shown there: a terminal that has some, and no ``NO_COLOR``."""
    return console.color_system is not None and not console.no_color


def legend(console: Console) -> Text:
    """The line that says how what is learned is marked."""
    example = ShownText([("like this", True)], 0, 0)
    return Text("learned text is marked ").append_text(marked(example, console)).append("; all else is only read")


def marked(shown: ShownText, console: Console, specials: Sequence[str] = ()) -> Text:
    """A sequence with its learned pieces marked and its special tokens set off.

    Args:
        shown: the sequence.
        console: where it will be printed.
        specials: texts of the tokenizer's special tokens.
    """
    opening, closing = ("", "") if has_colour(console) else ("[[", "]]") if console.options.ascii_only else ("⟦", "⟧")
    text = Text()
    for piece, learned in shown.pieces:
        if learned:
            text.append(f"{opening}{visible(piece)}{closing}", style=_LEARNED)
        else:
            text.append(visible(piece))
    if specials:
        text.highlight_regex("|".join(map(re.escape, sorted(specials, key=len, reverse=True))), _SPECIAL)
    return text


def print_sample(console: Console, sample: ShownSample, specials: Sequence[str] = ()) -> None:
    """A sample with its id, split, label and token counts above it."""
    for label, part in sample.parts:
        head = Text(visible(sample.id), style="bold").append(f"  {sample.split}", style="not bold")
        if label:
            head.append("  ").append(label, style=_LABELS.get(label, "bold green"))
        share = part.supervised / part.tokens if part.tokens else 0
        head.append(f"  {part.tokens:,} tokens, {part.supervised:,} learned ({share:.0%})", style="not bold dim")
        print_line(console, "")
        print_line(console, head)
        text = marked(part, console, specials)
        print_line(console, text[:-1] if text.plain.endswith("\n") else text)


def print_line(console: Console, text: str | Text) -> None:
    """Text as it stands: nothing in it is markup, and long lines are the terminal's business."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
