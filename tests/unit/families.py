"""Chat templates of our own that behave like known families, and in Python what an assistant says in each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_prep.records import Message
from tests.unit.prep_kit import CHATML, CHINESE, MARKED

_LLAMA3 = (  # headers, strips; one call a turn, which replaces the content
    "{{ bos_token }}{% if tools %}{{ '<|start|>tools<|header|>\n\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}"
    "{{ '<|end|>' }}{% endif %}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|header|>\n\n' }}"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}"
    """{{ '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}' }}"""
    "{% else %}{{ m['content'] | trim }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|header|>\n\n' }}{% endif %}"
)
_CALLS_JSON = (
    "{% for c in m.tool_calls or [] %}{% if not loop.first or content %}{{ '\n' }}{% endif %}"
    """{{ '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson"""
    " + '}\n</tool_call>' }}{% endfor %}"
)
_TOOLS_AND_USERS = (  # tools' answers become user turns, those in a row one of them
    "{% if tools %}{{ '<|start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{{ '<|end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|start|>system\n' + messages[0].content + '<|end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>user\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|end|>\n' }}{% endif %}"
)
_QWEN3 = (  # reasoning of turns before the last question is dropped; the last turn has a block, if need be an empty one
    _TOOLS_AND_USERS + "{% elif m.role == 'assistant' %}{% set content = m.content.lstrip('\n') %}"
    "{{ '<|start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\n' + (m.reasoning_content or '').strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    + _CALLS_JSON
    + "{{ '<|end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
_QWEN35 = (  # prompts open the reasoning; arguments as XML
    _TOOLS_AND_USERS + "{% elif m.role == 'assistant' %}{% set content = m.content | trim %}"
    "{{ '<|start|>assistant\n' }}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') | trim + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n\n' if loop.first and content else '\n' if not loop.first }}"
    "{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<parameter=' + k + '>\n' + (v if v is string else v | tojson if v is mapping or v is sequence"
    " else v | string) + '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
_R1 = (  # prompts open the reasoning, turns without any have no block; no line ends; knows no tools
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' }}{% if m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content + eos_token }}"
    "{% else %}{{ '<|User|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
_GEMMA = (  # no system role, roles renamed, strips; earlier reasoning inside contents is cut out
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else 'user' %}{% set content = m.content %}"
    "{% if role == 'model' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>') | last %}{% endif %}"
    "{{ '<|start|>' + role + '\n' + content | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"
)
_MISTRAL = (  # BOS, INST, EOS; the system turn goes into the last question; calls are a JSON list
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{% if tools and loop.index0 < 2 %}{{ tools | tojson + '\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + ' [/TOOL_RESULTS]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ '[TOOL_CALLS] ' + c.function | tojson }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
_SMOLLM3 = (  # the marks take the header in
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|start|>assistant\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template and what is to be expected of it."""

    template: str
    says: Callable[[Message], str]
    """An assistant's turn after its header, end token included."""
    end: str = "<|end|>"
    exact: bool = False
    """White space at both ends of an answer is kept."""
    refuses: frozenset[str] = frozenset()
    """Reasons for which records may be rejected."""
    calls: bool = False
    """Knows calls; else they are written as text."""
    tools: bool = False
    reasoning: bool = False
    variables: dict[str, Any] = field(default_factory=dict)


def inline(m: Message) -> str:
    """Reasoning and calls as text inside the content."""
    thought = f"<think>\n{m.reasoning}\n</think>\n\n" if m.reasoning else ""
    return thought + content_with_calls(m)


def content_with_calls(m: Message) -> str:
    """The content, and calls behind it, a line each."""
    calls = [json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) for c in m.calls]
    return "\n".join([*([m.content] if m.content.strip() or not calls else []), *calls])


def _llama3(m: Message) -> str:
    thought = f"<think>\n{m.reasoning}\n</think>\n\n" if m.reasoning else ""
    if m.calls:
        return f'{{"name": "{m.calls[0].name}", "parameters": {_json(m.calls[0].arguments)}}}<|end|>'
    return (thought + m.content).strip() + "<|end|>"


def _qwen3(m: Message) -> str:
    text = m.content.lstrip("\n")
    for n, c in enumerate(m.calls):
        text += "\n" if n or text else ""
        text += f'<tool_call>\n{{"name": "{c.name}", "arguments": {_json(c.arguments)}}}\n</tool_call>'
    thought = m.reasoning.strip("\n")
    return (f"<think>\n{thought}\n</think>\n\n" if m.reasoning else "") + text + "<|end|>"


def _qwen35(m: Message) -> str:
    text = m.content.strip()
    for n, c in enumerate(m.calls):
        text += "\n" if n else "\n\n" if text else ""
        text += f"<tool_call>\n<function={c.name}>\n"
        for key, value in c.arguments.items():
            shown = value if isinstance(value, str) else _json(value) if isinstance(value, dict | list) else str(value)
            text += f"<parameter={key}>\n{shown}\n</parameter>\n"
        text += "</function>\n</tool_call>"
    return (f"{m.reasoning.strip()}\n</think>\n\n" if m.reasoning else "") + text + "<|end|>"


def _mistral(m: Message) -> str:
    calls = "".join("[TOOL_CALLS] " + _json({"name": c.name, "arguments": c.arguments}) for c in m.calls)
    thought = f"<think>\n{m.reasoning}\n</think>\n\n" if m.reasoning else ""
    return " " + (thought + m.content).strip() + calls + "</s>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_TAGGED = {"calls": True, "tools": True, "reasoning": True}

FAMILIES = {
    "chatml": Family(CHATML, lambda m: inline(m) + "<|end|>", exact=True),
    "llama3": Family(
        _LLAMA3,
        _llama3,
        calls=True,
        tools=True,
        refuses=frozenset(
            {
                "the chat template refuses the conversation",  # two calls
                "the chat template leaves out a part of the answer",  # content beside a call
            }
        ),
    ),
    "qwen3": Family(_QWEN3, _qwen3, **_TAGGED),
    "qwen3-direct": Family(_QWEN3, _qwen3, variables={"enable_thinking": False}, **_TAGGED),
    "qwen3.5": Family(_QWEN35, _qwen35, **_TAGGED),
    "r1": Family(
        _R1,
        lambda m: (f"{m.reasoning}\n</think>\n\n" if m.reasoning else "") + content_with_calls(m) + "</s>",
        end="</s>",
        reasoning=True,
        exact=True,
    ),
    "gemma": Family(
        _GEMMA,
        lambda m: inline(m).strip() + "<|end|>",
        refuses=frozenset({"the chat template refuses the conversation"}),
    ),
    "mistral": Family(_MISTRAL, _mistral, end="</s>", calls=True, tools=True),
    "smollm3": Family(
        _SMOLLM3,
        lambda m: (f"<think>\n{m.reasoning}\n</think>\n" if m.reasoning else "") + content_with_calls(m) + "<|end|>",
        reasoning=True,
        exact=True,
    ),
    "marked": Family(MARKED, lambda m: inline(m) + "<|end|>", exact=True),
    "chinese": Family(CHINESE, lambda m: inline(m) + "</s>", end="</s>", exact=True),
}
