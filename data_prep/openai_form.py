"""A record as a chat template is given it: OpenAI's form, or plain text for what the template does not know."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from data_prep.formats.tools import tools_text
from data_prep.records import IMAGE_MARK, Message, Record
from data_prep.template import Template, Turn

Tools = list[dict[str, Any]] | None


def openai_form(record: Record, template: Template, notes: Counter[str]) -> tuple[list[Turn], Tools]:
    """The turns and the tools of a conversation, for `Template.text`.

    Args:
        record: the conversation.
        template: decides what is written as text.
        notes: counts what was.
    """
    turns = [openai_turn(message, template, notes) for message in record.messages]
    if not record.tools:
        return turns, None
    if template.knows_tools:
        return turns, list(record.tools)
    notes["conversations whose tools are written into the system turn: the chat template knows none"] += 1
    text = tools_text(record.tools)
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]], None
    return [{"role": "system", "content": text}, *turns], None


def spoken(message: Message, template: Template) -> str:
    """What an assistant says without its reasoning: its content, with its calls if they are written as text."""
    if not message.calls or template.knows_calls:
        return message.content
    return "\n".join([*([message.content] if message.content.strip() else []), *map(_call_text, message.calls)])


def _call_text(call: Any) -> str:
    return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


def openai_turn(message: Message, template: Template, notes: Counter[str]) -> Turn:
    """One turn; see `openai_form`."""
    turn: Turn = {"role": message.role, "content": _parts(message) if message.images else message.content}
    if message.calls:
        _add_calls(turn, message, template, notes)
    if message.reasoning:
        if template.knows_reasoning:
            turn["reasoning_content"] = turn["thinking"] = message.reasoning  # both, as apply_chat_template does
        else:
            turn["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{turn['content']}"
    if message.name is not None:
        turn["name"] = message.name
    if message.call_id is not None:
        turn["tool_call_id"] = message.call_id
    return turn


def _parts(message: Message) -> list[dict[str, str]]:
    """Texts and images in order, as templates of models that see want them."""
    texts = message.content.split(IMAGE_MARK)
    parts: list[dict[str, str]] = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def _add_calls(turn: Turn, message: Message, template: Template, notes: Counter[str]) -> None:
    if not template.knows_calls:
        notes["turns whose calls are written as JSON text: the chat template knows none"] += 1
        turn["content"] = spoken(message, template)
        return
    as_text = template.takes_arguments_as_text
    if as_text:
        notes["turns whose call arguments are given to the chat template as text, as it asks"] += 1
    turn["tool_calls"] = []
    for call in message.calls:
        arguments = json.dumps(call.arguments, ensure_ascii=False) if as_text else call.arguments
        identity = {"id": call.id} if call.id is not None else {}
        function = {"name": call.name, "arguments": arguments}
        turn["tool_calls"].append({**identity, "type": "function", "function": function})
