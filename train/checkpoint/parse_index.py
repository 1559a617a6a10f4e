"""Reading index.json when nothing in it is trusted.

It decides which bytes become which weights. So every value is checked, also behind a hash that fits, and a file that
was made up ends in a message, not in wrong weights, a traceback or a full memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from train.checkpoint.index import FORMAT_VERSION, Entry, Index, Piece, StoredFile, TrainerState, rank_file
from train.engine.base import MASTER, Scalar

MAX_INDEX_BYTES = 2**28
"""Of index.json: five million pieces, as of 1,000 parameters over 5,000 ranks."""
MOST_RANKS = 10**7
MOST_ELEMENTS = 2**48
"""Of one parameter."""
MOST_COUNTED = 2**62
"""Of steps, samples, tokens, bytes; also the bound of `seed`."""
DEEPEST = 16
"""Nesting of the loop's further values."""
LARGEST_FP32 = (2 - 2**-23) * 2.0**127
SHA256 = re.compile(r"[0-9a-f]{64}")


class UnknownFormatError(ValueError):
    """The index is of another version of the format."""


def parse_index(content: bytes) -> Index:
    """The index, every value checked.

    Raises:
        UnknownFormatError: of another version.
        ValueError: malformed; says which value.
    """
    try:
        top = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_doubles,
            parse_int=_whole_number,
            parse_constant=_no_such_number,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error}") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(top, dict):
        raise ValueError(f"a {type(top).__name__} where an object is expected")
    version = top.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnknownFormatError(f"format_version {str(version)[:20]}")
    _exactly(top, "", "run_id", "world_size", "optimizer", "state", "metrics", "files", "params")
    world_size = _integer(top["world_size"], "world_size", low=1, high=MOST_RANKS)
    files = _files(top["files"], world_size)
    return Index(
        run_id=_text(top["run_id"], "run_id", empty=True),
        world_size=world_size,
        optimizer=_text(top["optimizer"], "optimizer"),
        state=_state(top["state"]),
        metrics=_metrics(top["metrics"]),
        files=files,
        params={_text(k, "params"): _entry(k, v, files) for k, v in _object(top["params"], "params").items()},
    )


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice, readers differ in which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        last = {name: at for at, (name, _) in enumerate(pairs)}
        double = next(name for at, (name, _) in enumerate(pairs) if last[name] != at)
        raise ValueError(f"the key {double[:80]!a} twice in one object")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > 30:  # Python refuses beyond some thousands only
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_such_number(word: str) -> float:
    raise ValueError(f"{word}, which is no number of JSON")


def _files(value: Any, world_size: int) -> dict[str, StoredFile]:
    """One of each rank, under the name that it always has: no other path can be read through the index."""
    found = _object(value, "files")
    if len(found) != world_size:
        raise ValueError(f"files: {len(found)} for {world_size} ranks")
    files = {}
    for name in map(rank_file, range(world_size)):
        if name not in found:
            raise ValueError(f"files: no {name}")
        facts = _exactly(found[name], f"files.{name}", "sha256", "bytes", "node", "host")
        sha256 = _text(facts["sha256"], f"files.{name}.sha256")
        if not SHA256.fullmatch(sha256):
            raise ValueError(f"files.{name}.sha256: not 64 hexadecimal digits")
        files[name] = StoredFile(
            sha256,
            bytes=_integer(facts["bytes"], f"files.{name}.bytes", low=8),
            node=_integer(facts["node"], f"files.{name}.node", high=world_size - 1),
            host=_text(facts["host"], f"files.{name}.host", empty=True),
        )
    return files


def _state(value: Any) -> TrainerState:
    counts = ("step", "epoch", "samples_seen", "tokens_seen", "seed")
    found = _exactly(value, "state", *counts, "extra")
    extra = _object(found["extra"], "state.extra")
    _not_too_deep(extra, DEEPEST)
    return TrainerState(**{name: _integer(found[name], f"state.{name}") for name in counts}, extra=extra)


def _not_too_deep(value: Any, left: int) -> None:
    if left == 0:
        raise ValueError(f"state.extra: nested more than {DEEPEST} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _not_too_deep(inner, left - 1)


def _metrics(value: Any) -> dict[str, float]:
    found = _object(value, "metrics")
    return {_text(name, "metrics"): _number(figure, f"metrics.{name}") for name, figure in found.items()}


def _entry(name: str, value: Any, files: Mapping[str, StoredFile]) -> Entry:
    where = f"params.{name}"
    found = _exactly(value, where, "shape", "kinds", "scalars", "fragments")
    shape = tuple(
        _integer(size, f"{where}.shape", low=1, high=MOST_ELEMENTS) for size in _list(found["shape"], f"{where}.shape")
    )
    if (len(shape) > 64) or math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"{where}.shape: more than {MOST_ELEMENTS} elements")
    kinds = tuple(_kind(kind, f"{where}.kinds") for kind in _list(found["kinds"], f"{where}.kinds"))
    scalars = {
        _text(key, f"{where}.scalars"): _scalar(key, scalar, where)
        for key, scalar in _object(found["scalars"], f"{where}.scalars").items()
    }
    if MASTER not in kinds or len({*kinds, *scalars}) < len(kinds) + len(scalars):
        raise ValueError(f"{where}: kinds and scalars lack '{MASTER}' or name something twice")
    return Entry(shape, kinds, scalars, _pieces(found["fragments"], f"{where}.fragments", math.prod(shape), files))


def _kind(value: Any, where: str) -> str:
    kind = _text(value, where)
    if ":" in kind or "@" in kind:  # they part name, kind and offset in the key of a tensor
        raise ValueError(f"{where}: {kind!a}")
    return kind


def _scalar(key: str, value: Any, where: str) -> Scalar:
    place = f"{where}.scalars.{key}"
    found = _exactly(value, place, "value", "tensor")
    if not isinstance(found["tensor"], bool):
        raise ValueError(f"{place}.tensor: neither true nor false")
    number = _number(found["value"], place)
    if abs(number) > LARGEST_FP32 or (key == "step" and (number < 0 or number % 1)):
        raise ValueError(f"{place}: {number}")
    return Scalar(value=number, tensor=found["tensor"])


def _pieces(value: Any, where: str, numel: int, files: Mapping[str, StoredFile]) -> tuple[Piece, ...]:
    """They cover the parameter exactly once, in order."""
    pieces, at = [], 0
    for item in _list(value, where):
        if type(item) is not list or len(item) != 3:
            raise ValueError(f"{where}: a piece that is not [file, offset, elements]")
        file, offset, size = item
        if type(file) is not str or file not in files:
            raise ValueError(f"{where}: a piece in {str(file)[:80]!a}, which is none of the files")
        if type(offset) is not int or type(size) is not int or offset != at or not 1 <= size <= numel - at:
            raise ValueError(f"{where}: a piece of {_short(size)} at {_short(offset)}, expected at {at} of {numel}")
        pieces.append(Piece(file, offset, size))
        at += size
    if at != numel:
        raise ValueError(f"{where}: {at} of {numel} elements")
    return tuple(pieces)


def _exactly(value: Any, where: str, *names: str) -> dict[str, Any]:
    found = _object(value, where or "the index")
    for name in names:
        if name not in found:
            raise ValueError(f"{where}: no {name}".removeprefix(": "))
    if len(found) > len(names):
        raise ValueError(f"{where}: unknown {next(key for key in found if key not in names)[:80]!a}".removeprefix(": "))
    return found


def _object(value: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{where}: no object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{where}: no list")
    return value


def _integer(value: Any, where: str, *, low: int = 0, high: int = MOST_COUNTED) -> int:
    if type(value) is not int or not low <= value <= high:  # a bool is an int, too
        raise ValueError(f"{where}: {_short(value)}, expected a whole number from {low} to {high}")
    return value


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e300:  # a larger int has no float; 1e999 is read as inf
        raise ValueError(f"{where}: {_short(value)}, expected a number")
    return float(value)


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    """Printable: it may be shown on a terminal."""
    if type(value) is not str or not value.isprintable() or len(value) > 1000 or not (value or empty):
        raise ValueError(f"{where[:100]!a}: {_short(value)}, expected printable text")
    return value


def _short(value: Any) -> str:
    return ascii(value)[:80] if type(value) in (int, float, str, bool, type(None)) else f"a {type(value).__name__}"
