"""Bytes of a text file, unpacked, with the position in the file as stored; and its faults in words for its owner."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from configs.errors import DataError
from data_prep import raw
from data_prep.raw import too_long
from data_prep.records import RowFault

_BOM = b"\xef\xbb\xbf"
_UTF16_STARTS = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")


def _unpack_zstd(file: BinaryIO) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))


COMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _unpack_zstd,
}
"""Ending of a packed text file -> what unpacks it."""


class Stream:
    """A text file's bytes after its byte-order mark; a context manager.

    Args:
        path: the file.
        shown: how messages name it.

    Raises:
        DataError: it is UTF-16.
    """

    def __init__(self, path: Path, shown: str) -> None:
        self._file = path.open("rb", buffering=raw.CHUNK_BYTES)
        unpack = COMPRESSED.get(path.suffix.lower())
        self._stream: Any = unpack(self._file) if unpack else self._file
        try:
            start = self.peek()
            if start.startswith(_UTF16_STARTS):
                remedy = f"iconv -f UTF-16 -t UTF-8 {shlex.quote(shown)} > NEW"
                raise DataError(shown, "the file is UTF-16", allowed="UTF-8", remedy=remedy)
            if start.startswith(_BOM):
                self._stream.read(len(_BOM))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def file(self) -> BinaryIO:
        """For libraries that read by themselves."""
        return self._stream  # type: ignore[no-any-return]

    @property
    def stored(self) -> int:
        """Bytes taken from the file, as stored; somewhat ahead of what was read."""
        return self._file.tell()

    def peek(self) -> bytes:
        """The next few bytes, not consumed; empty at the end."""
        found: bytes = self._stream.peek(64)
        return found

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, but at the end."""
        found: bytes = self._stream.read(size)
        return found

    def readline(self, limit: int) -> bytes:
        """Up to the next line end, `limit` bytes at most."""
        found: bytes = self._stream.readline(limit)
        return found

    def skip(self, size: int) -> None:
        """Passes over `size` bytes."""
        if self._stream is self._file:
            self._file.seek(size, io.SEEK_CUR)
            return
        while size and (data := self.read(min(size, raw.CHUNK_BYTES))):
            size -= len(data)

    def pass_line(self) -> int:
        """Passes over what is left of a line, in pieces; its bytes."""
        passed = 0
        while piece := self.readline(raw.CHUNK_BYTES):
            passed += len(piece)
            if piece.endswith(b"\n"):
                break
        return passed

    def lines(self) -> Iterator[tuple[int, bytes | RowFault]]:
        """Numbered lines without their ends."""
        number = 0
        while line := self.readline(raw.MAX_ROW_BYTES):
            number += 1
            if len(line) == raw.MAX_ROW_BYTES and not line.endswith(b"\n"):
                self.pass_line()
                yield number, too_long()
            else:
                yield number, line.rstrip(b"\r\n")


@dataclass
class Place:
    """How far a file was read without a fault."""

    line: int = 0


@contextmanager
def file_faults(shown: str) -> Iterator[Place]:
    """What libraries raise on a damaged file, as a message for its owner that says where."""
    import pyarrow

    place = Place()
    try:
        yield place
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _damaged(shown, place, error) from error
    except pyarrow.ArrowException as error:
        raise DataError(shown, f"cannot be read: {str(error).splitlines()[0]}", remedy="write it again") from error
    except UnicodeDecodeError as error:
        raise DataError(shown, f"holds text that is not UTF-8: {error.reason}", remedy="write it again") from error
    except OSError as error:
        if error.errno is None:  # bz2 and zstd say so what others say with a type of their own
            raise _damaged(shown, place, error) from error
        raise DataError(shown, f"cannot be read: {error.strerror}") from error


def _damaged(shown: str, place: Place, error: Exception) -> DataError:
    where = f"{shown}:{place.line + 1}" if place.line else shown
    found = f"the {Path(shown).suffix[1:]} file is damaged"
    found += f" somewhere behind line {place.line}" if place.line else ""
    return DataError(where, f"{found}: {error}", remedy="copy or compress it again; nothing of it is used")
