"""The one form everything is read into.

A reader turns raw rows into `Record` (a conversation), `TextRecord` (plain text), `Pair` or `Vote` (preferences); a row
that cannot be used becomes a `Reject` that says where it stands and why. Nothing here knows files, tokenizers or
templates. `model` has the forms, `checks` what a row must hold, `content` their JSON and their texts.
"""

from data_prep.records.checks import (
    as_context,
    conversation,
    kind_of,
    optional_text,
    pair,
    plain_text,
    shown,
    text_of,
    unique_keys,
    with_system,
)
from data_prep.records.content import acts_of, content_json, from_json, texts_of, to_json, with_texts
from data_prep.records.model import (
    IMAGE_MARK,
    ROLES,
    AnyRecord,
    Message,
    Origin,
    Pair,
    Record,
    Reject,
    RowFault,
    TextRecord,
    ToolCall,
    Vote,
)

__all__ = [
    "IMAGE_MARK",
    "ROLES",
    "AnyRecord",
    "Message",
    "Origin",
    "Pair",
    "Record",
    "Reject",
    "RowFault",
    "TextRecord",
    "ToolCall",
    "Vote",
    "acts_of",
    "as_context",
    "content_json",
    "conversation",
    "from_json",
    "kind_of",
    "optional_text",
    "pair",
    "plain_text",
    "shown",
    "text_of",
    "texts_of",
    "to_json",
    "unique_keys",
    "with_system",
    "with_texts",
]
