"""References to images and the marks in the text where they stand. Images themselves are never opened here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_prep.records import IMAGE_MARK, Message, RowFault, kind_of, text_of

_LATER = ""
"""Stands in `Message.images` for an image whose reference is in the row's column."""


def content_of(content: Any, what: str) -> tuple[str, tuple[str, ...]]:
    """Text and references of a turn's content: text, or a list of parts that are texts and images.

    Raises:
        RowFault: it is something else.
    """
    if not isinstance(content, list):
        return text_of(content, f"content of {what}"), ()
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if kind == "text":
            texts.append(text_of(part.get("text"), f"content of {what}"))
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_MARK)
            images.append(_reference_of_part(part, what))
        else:
            raise RowFault("a part of the content is neither text nor image", f"{what}: {str(kind)[:40]!r}")
    return "".join(texts), tuple(images)


def references_of(value: Any, what: str) -> list[str] | None:
    """The references in a column or field: one, or a list; None where there is none.

    Raises:
        RowFault: it is something else.
    """
    if value is None or value == "":
        return None
    return [_reference(each, what) for each in (value if isinstance(value, list) else [value])]


def with_images(messages: list[Message], references: list[str] | None) -> list[Message]:
    """The turns with the images of the row's column, which the marks in them take in order.

    Without a column, and where a turn has no images of its own, the mark's letters are text like any other.

    Raises:
        RowFault: there are more or fewer references than marks.
    """
    if references is None and not any([m.images for m in messages]):  # a list: this is asked of every row
        return messages
    waiting = list(references or ())
    filled = []
    for message in messages:
        marks = message.content.count(IMAGE_MARK)
        images = message.images or (_LATER,) * (marks if references is not None else 0)
        if images and marks != len(images):
            raise _mismatch(marks, len(images))
        if images.count(_LATER) > len(waiting):
            raise _mismatch(_marks(messages), len(references or ()))
        images = tuple(image or waiting.pop(0) for image in images)
        filled.append(replace(message, images=images) if images else message)
    if waiting:
        raise _mismatch(_marks(messages), len(references or ()))
    return filled


def _marks(messages: Sequence[Message]) -> int:
    return sum(m.content.count(IMAGE_MARK) for m in messages)


def _mismatch(marks: int, images: int) -> RowFault:
    return RowFault("marks and images differ in number", f"{marks} {IMAGE_MARK} marks, {images} images")


def _reference_of_part(part: dict[str, Any], what: str) -> str:
    given = [part[key] for key in ("image_url", "image", "url", "path") if part.get(key) is not None]
    return _reference(given[0], what) if given else _LATER


def _reference(value: Any, what: str) -> str:
    """A path or an address; exports also wrap it in an object, in which `datasets` may put the bytes instead."""
    if isinstance(value, dict):
        value = value.get("url") or value.get("path")
    if not isinstance(value, str) or not value.strip():
        raise RowFault("an image is not a reference", f"{what}: {kind_of(value)}; give its path or address")
    return text_of(value, f"image of {what}")
