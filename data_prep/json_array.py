"""A list of JSON objects read one element at a time, so that a file of any size takes the memory of its largest row."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from configs.errors import DataError
from data_prep import raw
from data_prep.records import RowFault, unique_keys

_CHUNK_BYTES = 2**18


class JsonArrayReader:
    """Elements of ``[...]`` with the line each begins on; an object with a key twice is a `RowFault`.

    Bytes that are not UTF-8 are carried along as lone surrogates; `records.text_of` rejects the row that has them.
    What is not JSON stops the reading with `DataError`: after a fault in a list, no later element can be trusted.
    """

    def __init__(self, stream: BinaryIO, shown: str) -> None:
        self._stream, self._shown = stream, shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._strict, self._lax = json.JSONDecoder(object_pairs_hook=unique_keys), json.JSONDecoder()
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def rows(self) -> Iterator[tuple[int, int, Any, int]]:
        """(line, ordinal among the elements that begin on this line, value, its characters)."""
        self._expect("[")
        previous, part = 0, 1
        if self._next_char() == "]":
            self._expect("]")
        else:
            while True:
                self._next_char()
                line = self._line
                part = part + 1 if line == previous else 1
                previous = line
                value, size = self._element()
                yield line, part, value, size
                if self._expect(",]") == "]":
                    break
        if self._next_char():
            raise self._fault("text after the end of the list")

    def _fill(self) -> bool:
        """Reads at least as much as is already waiting, so that a long element is parsed a bounded number of times."""
        if self._ended:
            return False
        rest = self._buffer[self._at :]
        if len(rest) > raw.MAX_SCANNED_BYTES:
            raise self._fault(f"an element above {raw.MAX_SCANNED_BYTES // 2**20} Mi characters, or an unclosed quote")
        data = self._stream.read(max(_CHUNK_BYTES, len(rest)))
        self._ended = not data
        self._buffer, self._at = rest + self._decoder.decode(data, final=self._ended), 0
        return True

    def _next_char(self) -> str:
        """The next character that is not white space, not consumed; empty at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                char = self._buffer[self._at]
                if char not in " \t\r\n":
                    return char
                self._line += char == "\n"
                self._at += 1
            if not self._fill():
                return ""

    def _expect(self, chars: str) -> str:
        found = self._next_char()
        if not found or found not in chars:
            wanted = " or ".join(f"'{c}'" for c in chars)
            raise self._fault(f"expected {wanted}, found " + (f"'{found}'" if found else "the end of the file"))
        self._at += 1
        return found

    def _element(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                if self._fill():
                    continue
                self._line += self._buffer.count("\n", self._at, error.pos)
                raise self._fault(f"malformed JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise self._fault(f"malformed JSON: {error}") from None
            # A number at the very end of the buffer may go on in the next chunk.
            if end == len(self._buffer) and not isinstance(value, dict | list | str) and self._fill():
                continue
            self._line += self._buffer.count("\n", self._at, end)
            size, self._at = end - self._at, end
            return value, size

    def _decode(self) -> tuple[Any, int]:
        try:
            return self._strict.raw_decode(self._buffer, self._at)
        except RowFault as fault:
            return fault, self._lax.raw_decode(self._buffer, self._at)[1]

    def _fault(self, what: str) -> DataError:
        return DataError(
            f"{self._shown}:{self._line}",
            what,
            remedy="mend the file; JSON lines (.jsonl) survive a bad row, a list does not",
        )
