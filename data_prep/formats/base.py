"""What a format is: the column names it reads, how it recognises itself, and how a row becomes a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from data_prep.records import AnyRecord, Origin, RowFault, kind_of


class Format(ABC):
    """One shape of raw rows. To add one: a file here with a subclass, and a line in `formats.FORMATS`.

    Args:
        columns: our column name -> the file's.
        system: system turn for rows that have none.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]]
    """Columns (our names) without which a row is nothing."""
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, columns: Mapping[str, str] | None = None, system: str | None = None) -> None:
        self.columns = dict(columns or {})
        self.system = system

    def theirs(self, ours: str) -> str:
        """The file's name of our column."""
        return self.columns.get(ours, ours)

    def read(self, row: Mapping[str, Any], origin: Origin) -> AnyRecord:
        """One raw row as a record.

        Raises:
            RowFault: the row lacks a column or its values cannot be used.
        """
        view = {ours: row.get(self.theirs(ours)) for ours in (*self.required, *self.optional)}
        for ours in self.required:
            if self.theirs(ours) not in row:
                raise RowFault("missing column", self.theirs(ours))
        return self.record(view, origin)

    @classmethod
    @abstractmethod
    def recognise(cls, sample: Mapping[str, Any]) -> str | None:
        """Why a row with these columns and values is of this format; None where it is not."""

    @abstractmethod
    def record(self, row: Mapping[str, Any], origin: Origin) -> AnyRecord:
        """One row, under our column names (absent optional ones are None), as a record.

        Raises:
            RowFault: a value cannot be used.
        """


def turns_of(value: Any, column: str, keys: tuple[str, str]) -> list[dict[str, Any]]:
    """The list of turns in a column, each an object with both `keys`.

    Raises:
        RowFault: it is something else.
    """
    if not isinstance(value, list):
        raise RowFault("turns are not a list", f"{column} is {kind_of(value)}")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowFault("a turn is not an object", f"{column}, turn {number} is {kind_of(turn)}")
        for key in keys:
            if key not in turn:
                raise RowFault(f"a turn lacks '{key}'", f"{column}, turn {number} has {', '.join(map(str, turn))}")
    return value


def has_turns(value: Any, keys: tuple[str, str]) -> bool:
    """Whether a value looks like a list of turns with these keys."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and all(k in value[0] for k in keys)
