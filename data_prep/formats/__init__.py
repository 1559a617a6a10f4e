"""One file per shape of raw rows; `FORMATS` is the register, `detect` picks one for a file.

`turns`, `tools`, `reasoning` and `images` read what several shapes have in common.
"""

from data_prep.formats.alpaca import AlpacaFormat
from data_prep.formats.base import Format
from data_prep.formats.messages import MessagesFormat
from data_prep.formats.preference import PreferenceFormat
from data_prep.formats.prompt_completion import PromptCompletionFormat
from data_prep.formats.sharegpt import ShareGptFormat
from data_prep.formats.text import TextFormat
from data_prep.formats.vote import VoteFormat

FORMATS: dict[str, type[Format]] = {
    f.name: f
    for f in (
        MessagesFormat,
        ShareGptFormat,
        AlpacaFormat,
        PromptCompletionFormat,
        PreferenceFormat,
        VoteFormat,
        TextFormat,
    )
}

__all__ = ["FORMATS", "Format"]
