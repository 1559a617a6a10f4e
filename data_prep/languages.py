"""Which language a record is in, told offline by py3langid, whose model is in its package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.errors import ConfigError

_SAMPLE_CHARS = 400
"""Characters looked at, taken evenly from all turns: more hardly tell more, and cost a microsecond each."""
_SURE = 0.5
"""Probability below which a language is not known: of `Yes.`, of numbers, of code."""
_CHINESE = {"yue": "zh", "wuu": "zh", "cdo": "zh", "gan": "zh", "hak": "zh", "nan": "zh", "lzh": "zh"}
"""Written alike, they are told apart only by chance in short texts."""


class LanguageJudge:
    """Tells the language of records, about 2,000 a second and core.

    Args:
        wanted: ISO 639-1 codes that it must know.

    Raises:
        ConfigError: py3langid is not installed, or does not know a language.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        self._identifier = _identifier()
        known = sorted({_CHINESE.get(label, label) for label in self._identifier.labels})
        for code in wanted:
            if code not in known:
                raise ConfigError("clean.languages", f"'{code}' is not known", allowed=", ".join(known))

    def __call__(self, texts: Sequence[str]) -> str | None:
        """The code of the language of a record's texts; None: it cannot be told."""
        each = max(20, _SAMPLE_CHARS // max(1, len(texts)))
        sample = "\n".join(text[:each] for text in texts)[:_SAMPLE_CHARS]
        label, probability = self._identifier.classify(sample)
        return _CHINESE.get(label, str(label)) if probability >= _SURE else None


def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError(
            "clean.languages", "the package py3langid is not installed", remedy="pip install 'crosstune[languages]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
