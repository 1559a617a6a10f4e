"""One file per shape of raw rows; `FORMATS` is the register, `detect` picks one for a file."""

from data_prep.formats.alpaca import AlpacaFormat
from data_prep.formats.base import Format
from data_prep.formats.messages import MessagesFormat
from data_prep.formats.prompt_completion import PromptCompletionFormat
from data_prep.formats.sharegpt import ShareGptFormat
from data_prep.formats.text import TextFormat

FORMATS: dict[str, type[Format]] = {
    f.name: f for f in (MessagesFormat, ShareGptFormat, AlpacaFormat, PromptCompletionFormat, TextFormat)
}

__all__ = ["FORMATS", "Format"]
