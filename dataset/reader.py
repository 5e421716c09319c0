"""Data files → rows, recognised by their content, not by their name.

    a file begins with                 its rows are
    1f 8b (gzip)                       those of the file packed in it
    PAR1 (parquet)                     the rows of the table (pip install pyarrow)
    [                                  the elements of the array, read a little at a time
    {, alone on its line               JSON objects that span several lines each
    a line with a field of CSV_FIELDS  those of a csv file, separated by commas, tabs or semicolons
    anything else                      lines of JSON

A UTF-8 byte order mark, CRLF and blank lines are skipped. A file of another kind is refused,
with what it is and how to convert it.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from dataset.formats import normalise
from model.chat import read_json
from model.cli import UserError

T = TypeVar("T")
CSV_FIELDS = {"text", "conversations", "messages", "prompt", "instruction", "chosen", "query", "question"}
CHUNK = 1 << 20  # characters of a JSON array read at a time
LARGEST_VALUE = 256 << 20  # characters of one element of an array, or of one field of a csv file
BETWEEN_VALUES, SCAN = re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode
SEPARATORS = {"csv": ",", "csv with tabs": "\t", "csv with semicolons": ";"}
IMAGE = "an image: this model reads text only"
PAGE = 'an HTML or XML page, as failed downloads leave: download the file itself (the "raw" link)'
NOT_ROWS = {  # how a file begins: what it is, and what to do about it
    b"version https://git-lfs": "a Git LFS pointer, not the file itself, which `git lfs pull` fetches",
    b"\xff\xfe": "UTF-16 text, which `iconv -f UTF-16 -t UTF-8` converts",
    b"\xfe\xff": "UTF-16 text, which `iconv -f UTF-16 -t UTF-8` converts",
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml"), PAGE),
    b"PK\x03\x04": "a zip archive: unpack it and name the file in it",
    b"BZh": "compressed by bzip2: unpack it with `bunzip2`",
    b"\xfd7zXZ": "compressed by xz: unpack it with `unxz`",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it with `zstd -d`",
    b"ARROW1": "an Arrow file: save it as .parquet or .jsonl",
    b"%PDF": "a PDF: extract its text first",
    b"\x89PNG": IMAGE, b"\xff\xd8\xff": IMAGE, b"GIF8": IMAGE,
    b"RIFF": "an image or a sound: this model reads text only",
}  # fmt: skip


@dataclass
class RowReport:
    """Statistics of the rows of a file: how many cannot be used, the first five as "line: reason", and the keys that
    are not used, with the number of rows that have them. A row that cannot be used is an error, unless `skip`.
    `num_bytes`: of the rows that were read so far."""

    path: Path
    skip: bool = False
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0

    def add_bad(self, number: int, error: ValueError) -> None:
        self.bad, self.first_bad = self.bad + 1, [*self.first_bad, f"{number}: {error}"][:5]
        self.check()

    def check(self) -> None:
        if self.bad and not self.skip:
            raise UserError(f"{self.path}:{self.first_bad[0]} (--skip_bad_rows 1 leaves such rows out)")

    @property
    def first_reason(self) -> str:
        return f"; line {self.first_bad[0]}" if self.bad else ""

    def warnings(self) -> list[str]:
        first = "; ".join(f"line {reason}" for reason in self.first_bad)
        keys = ", ".join(f"{key!r:.40} ({count:,})" for key, count in self.unused.most_common(20))
        return ([f"skipped {self.bad:,} bad rows of {self.path}, the first: {first}"] * bool(self.bad)
                + [f"keys that are not used, with the number of rows that have them: {keys}"] * bool(self.unused))


def read_rows(path: Path, parse: Callable[[dict], T] = lambda row: row, report: RowReport | None = None,
              kind: str | None = None) -> Iterator[tuple[int, T]]:
    """(line number, parse(row)) of each row; `parse` raises ValueError for a row that it cannot use.

    With `kind` it gets the canonical row (see formats.py). A bad row is added to `report`; without one it is an error.
    """
    for number, line in read_lines(path):
        if report:
            report.num_bytes += len(line)
        try:
            row = parse_row(line)
            if kind:
                row, unused = normalise(row, kind)
                if report:
                    report.unused.update(unused)
            parsed = parse(row)
        except ValueError as error:
            if report is None:
                raise UserError(f"{path}:{number}: {error}") from None
            report.add_bad(number, error)
        else:
            yield number, parsed


def unpacked_size(path: Path) -> int | None:
    """Bytes of the rows of a file; None where that is unknown before reading."""
    with open(path, "rb") as file:
        return None if file.read(4).startswith((b"\x1f\x8b", b"PAR1")) else path.stat().st_size


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, JSON text) of each row of a data file; without lines of its own, a row is numbered itself.

    Raises UserError naming the file and where reading stopped. `parse_row` checks whether a row is valid.
    """
    number = 0
    try:
        with open_unpacked(path) as file:
            for number, line in READERS[file_format(file, path)](file):
                yield number, line
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        raise unreadable(path, number + 1, error) from None


def read_text(path: Path) -> str | None:
    """All of a file of plain text; None when it holds rows. Raises UserError when it cannot be read."""
    try:
        with open_unpacked(path) as file:
            return file.read().decode("utf-8-sig") if file_format(file, path) == "plain text" else None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise unreadable(path, 1, error) from None


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as file:
        yield gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file


def unreadable(path: Path, number: int, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file")
    reason = not_utf8(error) if isinstance(error, UnicodeDecodeError) else error
    return UserError(f"{path}:{number}: cannot be read: {reason}")


def parse_row(line: bytes) -> dict:
    """The JSON text of a row → the row; of a key that it repeats the last counts. Raises ValueError."""
    try:
        row = read_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from None
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {type(row).__name__}")
    return row


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: {error.reason} (`iconv -f GB18030 -t UTF-8` converts a file in GBK)"


def file_format(file: BinaryIO, path: Path) -> str:
    """What the file holds, a key of READERS, by how it begins. Raises UserError when that is no data."""
    head = file.peek(4096)[:4096].removeprefix(codecs.BOM_UTF8)
    start = head.lstrip()
    name = next((name for magic, name in NOT_ROWS.items() if start.startswith(magic)), None)
    if head.startswith(b"PAR1"):
        return "parquet"
    if b"\0" in head and not name:
        name = NOT_ROWS[b"\xff\xfe"] if 0 in head[:2] and any(head[:2]) else "a binary file, not text"
    if name or not head:
        raise UserError(f"{path}: {name or 'the file is empty'}")
    if re.match(rb"\[\s*[{\]]|\{\s*\n", start):
        return "JSON"
    if start.startswith(b"{"):
        return "lines of JSON"
    header = [*start.decode("utf-8", "replace").splitlines(), ""][:1]
    return next((name for name, separator in SEPARATORS.items() if CSV_FIELDS & {
        field.strip().lower() for field in next(csv.reader(header, delimiter=separator))}), "plain text")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, line


def _json_rows(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The elements of an array, or objects one after the other, however they are laid out."""
    text = io.TextIOWrapper(file, "utf-8-sig")
    buffer, number, ended = text.read(CHUNK).lstrip(), 0, False
    is_array = buffer.startswith("[")
    at = int(is_array)
    while True:
        at = BETWEEN_VALUES.match(buffer, at).end()
        if is_array and buffer[at:at + 1] == "]":
            if (buffer[at + 1:] + text.read(CHUNK)).strip():
                raise ValueError("text after the end of the array")
            return
        if ended and at == len(buffer) and not is_array:
            return
        try:
            value, end = SCAN(buffer, at)
            whole = ended or end < len(buffer)  # else what follows may belong to it
        except ValueError as error:
            if ended or len(buffer) - at > LARGEST_VALUE:
                raise ValueError(f"not JSON, or cut off: {error}") from None
            whole = False
        if whole:
            number, at = number + 1, end
            yield number, _dump(value)
        else:
            more = text.read(max(CHUNK, len(buffer) - at))
            buffer, at, ended = buffer[at:] + more, 0, not more


def _csv_rows(file: BinaryIO, separator: str) -> Iterator[tuple[int, bytes]]:
    csv.field_size_limit(LARGEST_VALUE)
    # strict: else a quote that is never closed would swallow the rest of the file
    rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=separator, strict=True)
    if repeated := [name for name, count in Counter(rows.fieldnames).items() if count > 1]:
        raise ValueError(f"two columns are called {repeated[0]!r}")
    for row in rows:
        if None in row:
            raise ValueError(f"more cells than the header names; a text with {separator!r} in it is quoted")
        yield rows.line_num, _dump(row)


def _parquet_rows(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("a parquet file needs pyarrow: pip install pyarrow") from None
    rows = (row for batch in ParquetFile(file).iter_batches(1024) for row in batch.to_pylist())
    return ((number, _dump(row)) for number, row in enumerate(rows, 1))


def _dump(value: object) -> bytes:
    # half a surrogate pair stays an escape; all else is UTF-8, so that its bytes are counted as those of the file are
    return json.dumps(value, default=_to_text, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _to_text(value: object) -> str:
    """Dates and such as Python writes them. Parquet files of some programs have text as bytes."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


READERS = {"lines of JSON": _lines, "plain text": _lines, "JSON": _json_rows, "parquet": _parquet_rows,
           **{name: partial(_csv_rows, separator=separator) for name, separator in SEPARATORS.items()}}
