"""What mkdocs does to the pages: code from the source by name, equations as MathML, a check of the translations."""

import ast
import html
import json
import logging
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = re.compile(r'^( *)--8<-- "([^":]+\.py):([\w.]+)"$', re.M)  # indentation, path, symbol
TITLED = re.compile(r'^( *```python)\n( *--8<-- "([^":]+):)', re.M)
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
CHINESE = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
CHINESE_BREAK = re.compile(rf"(?<={CHINESE})\n(?={CHINESE})")  # a browser would show it as a space
LANGUAGE_LINK = re.compile(r"^\[(?:中文|English)\]\(\S+\)\n", re.M)  # for readers on GitHub; the site has a menu
log = logging.getLogger("mkdocs.hooks.book")  # a warning ends a strict build


def source_of(path: str, symbol: str) -> str:
    """The source of a function, class, `Class.method` or constant in a file of this repository, without indentation.

    Raises LookupError when the file or the symbol is not there.
    """
    if not (ROOT / path).is_file():
        raise LookupError(f"{path}: no such file")
    text = (ROOT / path).read_text("utf-8")
    node = ast.parse(text)
    for name in symbol.split("."):
        node = next((child for child in node.body if name in _names(child)), None)
        if node is None:
            raise LookupError(f"{path}: no {symbol}")
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1:node.end_lineno]))


def _names(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {getattr(node, "name", "")}


def mathml(latex: str, display: bool) -> str:
    """An equation as MathML, which browsers draw without scripts or fonts."""
    from latex2mathml.converter import convert

    return convert(latex, display="block" if display else "inline")


def on_config(config):
    """A page of the site without its translation is a warning."""
    for page in _pages(config.nav):
        if page not in config.extra["english_only"] and not (ROOT / "docs" / page).with_suffix(".zh.md").exists():
            log.warning("%s has no Chinese translation", page)
    return config


def _pages(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(part)]


def on_page_markdown(markdown: str, page, **_) -> str:
    """Replace `--8<-- "path:Symbol"` by the source, under a title that names the file."""
    def included(match: re.Match) -> str:
        try:
            return textwrap.indent(source_of(match[2], match[3]), match[1])
        except LookupError as error:
            log.warning("%s: %s", page.file.src_uri, error)
            return match[0]

    if page.url.startswith("zh/") and not page.file.src_uri.endswith(".zh.md"):
        page.meta["search"] = {"exclude": True}  # an English page that fills in: found once
    return REFERENCE.sub(included, TITLED.sub(r'\1 title="\3"\n\2', LANGUAGE_LINK.sub("", markdown)))


def on_page_content(content: str, page, **_) -> str:
    """Replace the equations that pymdownx.arithmatex marked by MathML; join lines of Chinese without a space."""
    def rendered(match: re.Match) -> str:
        try:
            return mathml(html.unescape(match[3]), match[2] == "[")
        except Exception as error:  # whatever latex2mathml stumbles over
            log.warning("%s: equation %s: %r", page.file.src_uri, match[3], error)
            return match[0]

    parts = re.split(r"(<pre.*?</pre>)", EQUATION.sub(rendered, content), flags=re.S)
    return "".join(part if part.startswith("<pre") else CHINESE_BREAK.sub("", part) for part in parts)


def on_post_page(output: str, page, **_) -> str:
    """A Chinese page searches the index of its own language, beside it under zh/."""
    return re.sub(r'("base": ")\.\.(/?)', lambda match: match[1] + ("" if match[2] else "."), output, count=1) \
        if page.url.startswith("zh/") else output


def on_post_build(config) -> None:
    """Split the search index by language: as text for a server, as a script for pages that are opened as files."""
    site = Path(config.site_dir)
    index = json.loads((site / "search/search_index.json").read_text("utf-8"))
    chinese = [entry | {"location": entry["location"].removeprefix("zh/")} for entry in index["docs"]
               if entry["location"].startswith("zh/")]
    english = [entry for entry in index["docs"] if not entry["location"].startswith("zh/")]
    for folder, entries in ((site / "search", english), (site / "zh/search", chinese)):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(index | {"docs": entries}, ensure_ascii=False)
        (folder / "search_index.json").write_text(text, "utf-8")
        (folder / "search_index.js").write_text(f"var __index = {text}", "utf-8")


on_post_build.mkdocs_priority = -200  # after the plugins, which write the index of both languages
