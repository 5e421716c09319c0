"""The book: it builds strictly, both languages agree, its code and symbols are the source's, its commands run."""

import functools
import importlib.util
import multiprocessing
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urljoin

import book_block
import pytest
from browser import Page, browser, missing
from lab import DEADLINE, ENVIRONMENT, ROOT, TOKENIZER

from dataset import sample_world
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weight

DOCS = ROOT / "docs"
CHAPTERS = sorted(path for path in (DOCS / "book").glob("*.md") if not path.name.endswith(".zh.md"))
PAGES = sorted((DOCS / "book").glob("*.md"))
SECTIONS = ["The question", "The idea", "The equation", "The code", "Run it", "What it gives", "What goes wrong",
            "Exercises", "Further reading"]
BLOCK = re.compile(r"<!-- run(.*?)-->\n```bash\n(.*?)```\n", re.S)
CODE = re.compile(r"^ *(`{3,}).*?^ *\1$", re.S | re.M)
SYMBOLS = re.compile(r"<!-- symbols: (.*?) -->\n((?:\|.*\n)+)")
spec = importlib.util.spec_from_file_location("book_hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def text(page: Path) -> str:
    return page.read_text("utf-8")


def blocks() -> dict[tuple[str, str], str]:
    """{(flags, commands): the chapter where they stand first}"""
    found = {}
    for page in PAGES:
        for flags, commands in BLOCK.findall(text(page)):
            found.setdefault((flags.strip(), commands), page.name)
    return found


def shape(page: Path) -> dict[str, list]:
    """What the two languages of a page have in common."""
    source = text(page)
    return {"headings": [len(marks) for marks in re.findall(r"^(#+) ", CODE.sub("", source), re.M)],
            "runnable blocks": BLOCK.findall(source), "source": hooks.REFERENCE.findall(source),
            "symbols": [reference for reference, _ in SYMBOLS.findall(source)],
            "figures": re.findall(r"!\[[^\]]*\]\(([^)]+)\)", source)}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_both_languages_have_the_same_bones(chapter):
    english, chinese = shape(chapter), shape(chapter.with_suffix(".zh.md"))
    assert english == chinese
    titles = re.findall(r"^## (.*)", CODE.sub("", text(chapter)), re.M)
    assert not titles or titles == SECTIONS or chapter.name.startswith("00")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_a_page_cites_is_in_the_source(page):
    source = text(page)
    for _, path, symbol in hooks.REFERENCE.findall(source):
        assert hooks.source_of(path, symbol)
    assert len(hooks.REFERENCE.findall(source)) == source.count("--8<--")
    assert len(SYMBOLS.findall(source)) == source.count("<!-- symbols")
    for references, table in SYMBOLS.findall(source):
        cited = "\n".join(hooks.source_of(*reference.split(":")) for reference in references.split(", "))
        for row in table.splitlines()[2:]:
            names = re.findall(r"`([^`]+)`", row.rstrip("| ").rpartition("|")[2])
            assert names and all(name in cited for name in names), (references, row)
    for figure in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", source):
        assert (page.parent / figure).is_file(), figure


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository that holds what `make demo` leaves, in tiny: random weights, few rows, short logs."""
    root = tmp_path_factory.mktemp("book") / "repository"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        ".*", "site", "out", "sample", "cache", "*.pth", "*.jsonl*", "__pycache__", "tests", "images"))
    sample_world.write(root / "dataset/sample", scale=0.01)
    model = MiniMindForCausalLM(MiniMindConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    (root / "out/logs").mkdir(parents=True, exist_ok=True)
    for name in ("pretrain", "full_sft", "agent"):
        save_weight(model, name, root / "out", TOKENIZER)
        (root / f"out/logs/{name}_128.jsonl").write_text(
            "".join(f'{{"step": {step}, "loss": {8 / step}, "tokens": {512 * step}}}\n' for step in (1, 2, 3)))
    return root


@functools.cache
def processes():
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "numpy"])
    return context


def split_commands(text: str) -> list[list[str]]:
    """The words of each command; a quoted word may span lines."""
    commands, pending = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += f"{line}\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # inside quotes
            continue
        commands += [words] if words else []
        pending = ""
    assert not pending, f"quotes that are not closed: {pending}"
    return commands


@pytest.mark.parametrize("flags, commands", blocks(), ids=[f"{name}-{i}" for i, name in enumerate(blocks().values())])
def test_a_marked_block_runs(copy, tmp_path, flags, commands):
    """At tiny size; the blocks of a chapter run in their order, so that one may use what another wrote."""
    log = tmp_path / "log"
    for program, *arguments in split_commands(commands):
        assert program == "python", f"a runnable block holds python commands only, not {program}"
        process = processes().Process(target=book_block.run, args=([*arguments, *shlex.split(flags)], copy, log))
        process.start()
        process.join(DEADLINE)
        process.kill()
        assert process.exitcode == 0, log.read_text("utf-8")[-3000:]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    for name in ("mkdocs", "material", "mkdocs_static_i18n", "latex2mathml", "jieba"):
        pytest.importorskip(name, reason="the site needs requirements-docs.txt")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], cwd=ROOT,
                           env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE)
    assert built.returncode == 0, "\n".join(line for line in built.stderr.splitlines() if "WARNING" in line)
    return folder


def test_the_built_site_needs_no_network_and_no_server(site):
    for page in site.rglob("*.html"):
        source = text(page)
        assert "arithmatex" not in source and "--8&lt;--" not in source
        assert not re.findall(r'<(?:script|link|img|iframe|source)[^>]*?(?:src|href)="?(?:https?:)?//', source), page
        if page.name != "404.html":
            links = re.findall(r'(?:src|href)="([^"#?]+)', source)
            lost = {link for link in links if not re.match(r"\w+:", link)
                    and not Path(unquote(urljoin(str(page), link))).is_file()}
            assert not lost, (page, lost)
    assert not [path for path in site.rglob("*.css") if re.search(r"url\(\W?(https?:)?//", text(path))]


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_search_finds_both_languages_in_a_browser_that_opens_files(site):
    with browser() as driver:
        page = Page(driver)
        for folder, words in (("", "reward model"), ("zh", "奖励模型")):
            driver.get((site / folder / "index.html").as_uri())
            driver.execute_script("document.querySelector('#__search').click()")
            page.wait_for_css("input.md-search__input").send_keys(words)
            result = page.wait_for_css(".md-search-result__item a", seconds=30).get_attribute("href")
            assert ("/zh/" in result) == (folder == "zh")
