"""Help texts of the commands, written from the schemas and the YAML groups, so that they cannot fall behind."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from configs.docs import field_docs
from configs.groups import ROOTS, SCHEMAS, groups_of, options_of, spoken
from configs.schema.prove import SHORT_KEYS

TYPED_MOST = (
    "model.path",
    "dataset.path",
    "dataset.format",
    "max_length",
    "batch_tokens",
    "max_steps",
    "epochs",
    "optim.lr",
    "tuning.rank",
    "seed",
    "nproc",
    "run_dir",
    "out",
    "checkpoint",
    "data",
    *("from", "to", "steps", "kills", "shrink", "fit"),
    *("nodes", "restarts", "time_limit_minutes", "launcher.hosts", "launcher.partition", "launcher.image"),
)
WIDTH = 118


def command_help(command: str, about: str, config_dir: Path | None, *, launched: str = "") -> str:
    """The help text of a command with a config; of `crosstune launch`, for the step that is launched."""
    typed = f"launch {launched}" if launched else spoken(command)
    lines = [f"crosstune {typed}: {about}", "", f"usage: crosstune {typed} [group=option ...] [key=value ...]"]
    if command == "doctor_ascend-standin":
        lines[-1] += " [-- COMMAND ...]"
    if groups := groups_of(command):
        lines += ["", "groups and their options:"]
        lines += [f"  {group:<11}{', '.join(options_of(group, config_dir))}" for group in groups]
    keys = list(_keys(command))
    lines += ["", "keys that are typed most:"]
    lines += [line for key in keys if key[0] in TYPED_MOST for line in _key_lines(*key)]
    lines += ["", "all other keys:"]
    lines += [line for key in keys if key[0] not in TYPED_MOST for line in _key_lines(*key)]
    if command == "prep":
        lines += [
            "",
            "crosstune prep --dry-run ... reads 100 rows of each source, writes nothing and says what would happen.",
        ]
        lines += ["crosstune prep inspect PATH shows samples of prepared data with what is learned."]
    if launched:
        lines += ["", f"It also takes all groups and keys of the step itself: crosstune {launched} --help"]
        lines += [f"crosstune {typed} --dry-run ... writes nothing and prints what would be submitted."]
        lines += [f"crosstune {typed} --multirun key=1,2,3 ... starts a run for each combination of values."]
    lines += ["", f"crosstune {typed} ... --cfg job prints the values that would be used."]
    return "\n".join(lines)


def path_command_help(command: str, about: str) -> str:
    """The help text of a command that works on a folder."""
    text = f"crosstune {command}: {about}"
    if command == "resume":
        from launchers.steps import ALSO_WITH_LORA, MAY_CHANGE_ON_RESUME

        text += "\n\nmay be changed on the way, as key=value or group=option:\n  " + ", ".join(MAY_CHANGE_ON_RESUME)
        text += f"\nand for adapters only (tuning=lora): {ALSO_WITH_LORA}"
        text += "\nof a launched run also how it is launched (crosstune launch train --help), such as nodes=4"
    if command == "prep inspect":
        text += "\n\nkeys:\n" + "\n".join(_inspect_lines())
    return text


def _inspect_lines() -> Iterator[str]:
    from data_prep.inspect import Wanted
    from launchers.prep import INSPECT_KEYS

    docs, schema = field_docs(Wanted), {f.name: f for f in fields(Wanted)}
    for key, name in INSPECT_KEYS.items():
        yield from _key_lines(key, _value(schema[name], schema[name].type), docs[name])


def _keys(command: str) -> Iterator[tuple[str, str, str]]:
    """Key, values it takes with its default, and doc; a group's keys are those of all its options."""
    root = ROOTS[command]
    hints, docs = get_type_hints(root), field_docs(root)
    typed = {key: short for short, key in SHORT_KEYS.items()}
    for f in fields(root):
        if not is_dataclass(hints[f.name]):
            yield typed.get(f.name, f.name), _value(f, hints[f.name]), docs.get(f.name, "")
    for f in fields(root):
        if is_dataclass(hints[f.name]):
            yield from _group_keys(f.name, [*SCHEMAS.get(f.name, {}).values()] or [hints[f.name]])


def _group_keys(group: str, schemas: list[Any]) -> Iterator[tuple[str, str, str]]:
    seen: set[str] = set()
    for schema in schemas:
        hints, docs = get_type_hints(schema), field_docs(schema)
        for f in fields(schema):
            if f.name not in seen and f.name != "_target_":
                seen.add(f.name)
                yield f"{group}.{f.name}", _value(f, hints[f.name]), docs.get(f.name, "")


def _value(f: Field[Any], hint: Any) -> str:
    kinds = [part for part in (get_args(hint) or (hint,)) if isinstance(part, type) and issubclass(part, Enum)]
    default = (
        f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else None
    )
    if default == "???":
        return "required"
    shown = "null" if default is None else default.value if isinstance(default, Enum) else str(default)
    shown = shown.lower() if isinstance(default, bool) else shown
    return f"{'|'.join(kinds[0].__members__)}, default {shown}" if kinds else f"default {shown or 'empty'}"


def _key_lines(key: str, value: str, doc: str) -> list[str]:
    text = f"{doc} ({value})" if doc else f"({value})"
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {key:<31} ", subsequent_indent=" " * 34)
