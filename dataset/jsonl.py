"""Read the rows of a data file (.jsonl or .jsonl.gz). Every error names the file and the line.

Training, prompts for RL, tokenizer training and evaluation read their files here.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from model.chat import read_json
from model.cli import UserError

T = TypeVar("T")


@dataclass
class BadRows:
    """The rows that cannot be used: how many, and the first five as "line: reason". Without `skip` one is an error."""

    path: Path
    skip: bool
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, number: int, error: ValueError) -> None:
        self.count, self.first = self.count + 1, [*self.first, f"{number}: {error}"][:5]
        self.check()

    def check(self) -> None:
        if self.count and not self.skip:
            raise UserError(f"{self.path}:{self.first[0]} (--skip_bad_rows 1 leaves such rows out)")

    def warnings(self) -> list[str]:
        first = "; ".join(f"line {reason}" for reason in self.first)
        return [f"skipped {self.count:,} bad rows of {self.path}, the first: {first}"] if self.count else []


def read_rows(path: Path, parse: Callable[[dict], T] = lambda row: row,
              bad_rows: BadRows | None = None) -> Iterator[tuple[int, T]]:
    """(line number, parse(row)) of each row; `parse` raises ValueError for a row that it cannot use.

    A bad row goes to `bad_rows`; without one it raises UserError.
    """
    for number, line in read_lines(path):
        try:
            parsed = parse(parse_row(line))
        except ValueError as error:
            if bad_rows is None:
                raise UserError(f"{path}:{number}: {error}") from None
            bad_rows.add(number, error)
        else:
            yield number, parsed


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a file, unpacked if it is .gz. Raises UserError when it cannot be read."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except FileNotFoundError:
        raise UserError(f"--data_path {path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read: {error}") from None


def parse_row(line: bytes) -> dict:
    """One line → the row. Raises ValueError with the reason."""
    if not line.strip():
        raise ValueError("empty line")
    try:
        row = read_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, not {type(row).__name__}")
    return row
