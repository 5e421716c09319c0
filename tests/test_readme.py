"""The READMEs' file tree and reading order name what is there, in both languages."""

import re

import pytest
from lab import ROOT

READMES = ("README.md", "README_zh.md")
MADE_BY_RUNS = {"out/", "checkpoints/"}


def tree(readme: str) -> list[str]:
    return re.search(r"```text\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.S)[1].splitlines()


def reading_order(readme: str) -> list[str]:
    return re.findall(r"^\| \d+ \| `([^`]+)` \|", (ROOT / readme).read_text("utf-8"), re.M)


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_names_files_that_are_there(readme):
    lines, folder = tree(readme), ROOT
    assert len(lines) <= 40
    for line in lines:
        names = re.match(r" *((?:[\w.*/]+ ?)+?)(?:  |$)", line)[1].split()
        folder = folder if line.startswith(" ") else ROOT / names[0]
        base = folder if line.startswith(" ") else ROOT
        assert all(name in MADE_BY_RUNS or list(base.glob(name.rstrip("/"))) for name in names), line


@pytest.mark.parametrize("readme", READMES)
def test_the_reading_order_is_as_long_as_it_says(readme):
    files = reading_order(readme)
    num_lines = sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in files)
    stated = re.search(r"(?:about|约) ([\d,]+) (?:lines|行)", (ROOT / readme).read_text("utf-8"))[1]
    assert len(files) == 12 and abs(num_lines - int(stated.replace(",", ""))) <= 100, num_lines


def test_both_languages_list_the_same_files():
    english, chinese = ([re.findall(r"[\w/*]+\.py|\w+/", "\n".join(tree(readme))) for readme in READMES])
    assert english == chinese and reading_order("README.md") == reading_order("README_zh.md")


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_is_short(readme):
    assert len((ROOT / readme).read_text("utf-8").splitlines()) <= 220


@pytest.mark.parametrize("page", [*READMES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", (ROOT / page).read_text("utf-8"))
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links), links
