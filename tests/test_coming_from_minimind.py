"""docs/coming-from-minimind.md names flags and defaults that our programs really have."""

import argparse
import ast
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("coming-from-minimind.md", "coming-from-minimind.zh.md")
PROGRAM = r"((?:(?:trainer|scripts)/)?\w+\.py)"


class ParserFound(Exception):
    pass


def parser_of(program: Path) -> argparse.ArgumentParser:
    """The parser that a program gives its command line to."""
    def stop(parser: argparse.ArgumentParser, *_) -> None:
        raise ParserFound(parser)

    with (mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(ParserFound) as found,
          mock.patch.object(sys, "argv", [str(program)]), mock.patch.object(sys, "path", ["", *sys.path])):
        runpy.run_path(str(program), run_name="__main__")
    return found.value.args[0]


def find_program(name: str) -> Path:
    return next(path for path in (ROOT / name, ROOT / "trainer" / name, ROOT / "scripts" / name) if path.is_file())


def table_rows(page: str, columns: int) -> list[list[str]]:
    lines = (ROOT / "docs" / page).read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in rows if len(row) == columns]


def same(text: str, value: object) -> bool:
    try:
        return float(text) == float(value)
    except (TypeError, ValueError):
        return text in (value, *value) if isinstance(value, list) else text == value


@pytest.mark.parametrize("page", PAGES)
def test_defaults_are_those_of_an_empty_command_line(page):
    rows = [row for row in table_rows(page, 5) if row[0].startswith("`")]
    assert len(rows) > 6
    for script, flag, published, here, _ in rows:
        parser = parser_of(find_program(script.strip("`")))
        action, = (action for action in parser._actions if flag.strip("`") in action.option_strings)
        default = parser.get_default(action.dest)
        assert same(here, default), f"{page}: {script} {flag} is {default} now, not {here}; published: {published}"


@pytest.mark.parametrize("stage", sorted((ROOT / "trainer").glob("train_*.py")), ids=lambda path: path.stem)
def test_a_stage_gets_the_defaults_that_it_names(stage):
    call = next(node for node in ast.walk(ast.parse(stage.read_text("utf-8"))) if isinstance(node, ast.Call)
                and getattr(node.func, "id", "").endswith("_parser"))
    parser = parser_of(stage)
    named = {part.arg: ast.literal_eval(part.value) for part in call.keywords if part.arg != "data_path"}
    assert len(named) > 5 and {name: parser.get_default(name) for name in named} == named


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_ours_is_accepted(page):
    commands = [match for row in (*table_rows(page, 2), *table_rows(page, 3))
                for match in re.finditer(rf"`(?:python )?{PROGRAM}((?: [^`]+)?)`", row[-1])]
    assert len(commands) > 30
    for match in commands:
        known = {flag for action in parser_of(find_program(match[1]))._actions for flag in action.option_strings}
        assert set(re.findall(r"--\w+", match[2])) <= known, f"{page}: {match[0]}"


def test_both_languages_list_the_same():
    english, chinese = ([[re.findall(r"`[^`]+`", cell) for cell in row] for columns in (2, 3, 5)
                         for row in table_rows(page, columns)] for page in PAGES)
    assert english == chinese
