"""What is changed in records before they are rendered, and which are left out for what they say.

First characters and white space are put in order, then records are judged, then personal data is masked: expressions
see the text that people wrote, and no mask is counted in a record that is left out. Schemas of tools, names of
functions, roles and references to images are not touched.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from configs.schema.clean import CleanConfig, UnicodeForm
from data_prep.languages import LanguageJudge
from data_prep.pii import PiiMasker
from data_prep.records import AnyRecord, Reject, RowFault, texts_of, with_texts
from data_prep.repetition import repeated_share

_BREAKS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
"""What ends a line, or a page, other than a line feed."""

_BEFORE_JOINER = (
    "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u1900-\u1cff\ua840-\ua87f\ua8e0-\uaaff\ufb50-\ufdff\ufe70-\ufefc"
    "\U00010a00-\U00010fff\U00011000-\U00011fff"
)
"""Scripts that write with joiners: Arabic, Indic, Tibetan, Burmese, Khmer, Mongolian and their relatives."""
_EMOJI = "\u2190-\u2bff\U0001f000-\U0001faff"
_JOINERS = (
    rf"(?<![{_BEFORE_JOINER}])\u200c"
    # After an emoji, which a variation selector or a skin colour may follow, and before another one.
    rf"|(?<![{_BEFORE_JOINER}{_EMOJI}\ufe0f])\u200d|(?<=[{_EMOJI}\ufe0f])\u200d(?![{_EMOJI}])"
)
_FLAG = "\U0001f3f4[\U000e0030-\U000e007a]+\U000e007f"
"""The flags of Scotland and others are spelled with characters that mean nothing elsewhere, and then hide text."""
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")
"""Texts with such letters need marks of direction; in others these only mislead the reader."""
_CONTROLS = re.compile(f"({_FLAG})|[{_INVISIBLE}{_DIRECTIONS}]|{_JOINERS}")
_CONTROLS_BUT_DIRECTIONS = re.compile(f"({_FLAG})|[{_INVISIBLE}]|{_JOINERS}")
_SUSPECT = re.compile(f"[{_INVISIBLE}{_DIRECTIONS}\u200c\u200d]")
"""What most texts have none of; found faster than by the expressions above."""
_MANY_BREAKS = re.compile("\n{3,}")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
"""What the detail of a fault shows of a row (`records.shown`)."""


class Cleaner:
    """Applies a `CleanConfig`.

    Args:
        cfg: what is done.

    Raises:
        ConfigError: ``clean.languages`` needs a package that is not installed, or knows no such language.
    """

    def __init__(self, cfg: CleanConfig) -> None:
        self.cfg = cfg
        self.idle = cfg == CleanConfig()
        """Whether every record comes back as it went in."""
        self.masked: Counter[str] = Counter()
        """What was changed so far in records that stay, in words for the manifest."""
        self._text_steps = _text_steps(cfg)
        self._argument_steps = _text_steps(cfg, prose=False)
        self._drop = [re.compile(pattern) for pattern in cfg.drop_matching]
        self._keep = [re.compile(pattern) for pattern in cfg.keep_matching]
        self._masker = PiiMasker(cfg.mask_pii) if cfg.mask_pii else None
        self._languages = LanguageJudge(cfg.languages) if cfg.languages else None

    def __call__(self, record: AnyRecord | Reject) -> AnyRecord | Reject:
        """The record as it shall be; or why it is left out, which is no fault of the row.

        What was left out before tells nothing of the row's text, if personal data is masked: it shows 40 characters,
        and may have cut an address where no rule knows it any more.
        """
        if isinstance(record, Reject):
            return record if self._masker is None else self._silenced(record, self._masker)
        if self.idle:
            return record
        try:
            made = self._normalised(record)
            reason, detail = self._objection(made)
            if reason:
                return Reject(record.origin, reason, detail, counts=False)
            masked, found = self._masked(made)
        except RowFault as fault:
            return Reject(record.origin, f"{fault.reason} after cleaning", fault.detail, counts=False)
        self.masked.update(found)
        self.masked["rows normalised"] += made != record
        return masked

    def _normalised(self, record: AnyRecord) -> AnyRecord:
        if not self._text_steps:
            return record
        return with_texts(
            record, lambda text: _through(self._text_steps, text), lambda text: _through(self._argument_steps, text)
        )

    def _silenced(self, reject: Reject, masker: PiiMasker) -> Reject:
        return replace(reject, detail=masker(_QUOTED.sub("'...'", reject.detail), Counter()))

    def _objection(self, record: AnyRecord) -> tuple[str, str]:
        """Why the record is left out, and what was met; empty if it stays."""
        cfg, texts = self.cfg, texts_of(record)
        chars = sum(map(len, texts))
        if chars < cfg.min_chars:
            return "too few characters", str(chars)
        if 0 < cfg.max_chars < chars:
            return "too many characters", str(chars)
        for pattern in self._drop:
            if any(map(pattern.search, texts)):
                return "matches clean.drop_matching", pattern.pattern
        for pattern in self._keep:
            if not any(map(pattern.search, texts)):
                return "does not match clean.keep_matching", pattern.pattern
        if cfg.max_repetition:
            share = max(map(repeated_share, texts))
            if share > cfg.max_repetition:
                return "repetitive", f"{share:.2f} of a turn is repetition"
        if self._languages is not None:
            language = self._languages(texts)
            if language is not None and language not in cfg.languages:
                return "in another language", language
            self.masked["rows whose language cannot be told, kept"] += language is None
        return "", ""

    def _masked(self, record: AnyRecord) -> tuple[AnyRecord, dict[str, int]]:
        """The record without personal data, and what was masked."""
        masker, found = self._masker, Counter[str]()
        if masker is None:
            return record, {}
        made = with_texts(record, lambda text: masker(text, found))
        return made, {f"{kind} masked": count for kind, count in found.items()}


_Step = Callable[[str], str]


def _text_steps(cfg: CleanConfig, *, prose: bool = True) -> list[_Step]:
    """What is done to each text. White space in arguments of calls is data (code, a path) and stays."""
    steps: list[_Step] = []
    if cfg.unicode is not UnicodeForm.none:
        form = cfg.unicode.value
        steps.append(lambda text: text if text.isascii() else unicodedata.normalize(form, text))
    if cfg.control_characters:
        steps.append(without_controls)
    if cfg.whitespace and prose:
        steps.append(tidy)
    return steps


def _through(steps: list[_Step], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def without_controls(text: str) -> str:
    """The text without control and zero-width characters, each line ending in a line feed.

    Stays: tabs; joiners within emoji and after letters of scripts that write with them; marks of direction in texts
    with right-to-left letters.
    """
    text = _BREAKS.sub("\n", text)
    if not _SUSPECT.search(text):
        return text
    pattern = _CONTROLS_BUT_DIRECTIONS if not text.isascii() and _RIGHT_TO_LEFT.search(text) else _CONTROLS
    return pattern.sub(r"\1", text)


def tidy(text: str) -> str:
    """The text without white space at its ends and those of its lines, and without a second empty line in a row."""
    return _MANY_BREAKS.sub("\n\n", "\n".join(map(str.rstrip, text.split("\n")))).strip()
