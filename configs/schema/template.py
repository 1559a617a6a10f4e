"""The template group: how a conversation becomes text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TemplateConfig:
    """The chat template; by default the tokenizer's own."""

    path: str | None = None
    """Jinja file that replaces the tokenizer's template; needed where the tokenizer has none."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the template is given, e.g. ``{enable_thinking: false}``; the same ones serve inference."""
