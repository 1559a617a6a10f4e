"""Tables as spreadsheets save them in other countries, and what is said of files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import DataError
from data_prep.raw import RawRow
from data_prep.readers import read_chunks


@pytest.mark.parametrize(
    ("name", "begins", "separator", "line"),
    [
        ("a.csv", "", ",", 2),
        ("a.csv", "", ";", 2),
        ("a.csv", "", "\t", 2),
        ("a.tsv", "", ",", 2),
        ("a.csv", "sep=;\r\n", ";", 3),
        ("a.csv", '"sep=|"\n', "|", 3),
    ],
)
def test_the_separator_is_told_by_the_first_line(
    name: str, begins: str, separator: str, line: int, tmp_path: Path
) -> None:
    fields = [("instruction", "output"), ('"a, b; c\td|e"', "long\u00e9")]
    text = begins + "".join(separator.join(row) + "\r\n" for row in fields)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (chunk,) = read_chunks(tmp_path / name, name)
    assert list(chunk.payload.rows()) == [RawRow(line, {"instruction": "a, b; c\td|e", "output": "long\u00e9"})]


def test_a_quote_that_is_not_closed_is_told_where_it_opens(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\nq,a\n"open,a\nq,a\nq,a\n')
    with pytest.raises(DataError, match=r"a\.csv:5: the table is broken[\s\S]*row that begins in line 3"):
        list(read_chunks(tmp_path / "a.csv", "a.csv"))


def test_remedies_can_be_copied_and_reasons_read(tmp_path: Path) -> None:
    (tmp_path / "old export.csv").write_bytes("a,b\n".encode("utf-16"))
    with pytest.raises(DataError, match="iconv -f UTF-16 -t UTF-8 'old export.csv' > NEW"):
        list(read_chunks(tmp_path / "old export.csv", "old export.csv"))
    (tmp_path / "a.jsonl").write_text('{"text": "cut\n')
    (chunk,) = read_chunks(tmp_path / "a.jsonl", "a.jsonl")
    (row,) = chunk.payload.rows()
    assert row.value.detail == "Unterminated string starting at column 10"
