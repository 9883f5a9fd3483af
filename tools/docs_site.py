"""What mkdocs cannot do by itself for the site (`hooks` in mkdocs.yml); every page has one source.

- Files outside docs/ are pages too: README, CONTRIBUTING, the changelog, every benchmark result. A
  file of the repository that a page links to is shown as a page of its own, a picture is copied; links
  are written as GitHub wants them, relative to the file that they stand in.
- `docs/NAME.md` in running text, as docstrings and the README have it, becomes a link; with a number
  after docs/math.md to that equation.
- `NAME` in the reference becomes a link where NAME stands there.
- Formulas become MathML, which browsers show without a script or a font from elsewhere.

A link or a mention that leads nowhere is a warning, which `make docs` takes for an error.
"""

from __future__ import annotations

import html as entities
import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
# Pages of the site, by the file of the repository that they come from.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "dev/contributing.md",
    "CHANGELOG.md": "dev/changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
_WIDE = "---\nhide: [navigation, toc]\n---"  # for tables of nine columns
log = logging.getLogger("mkdocs.plugins.docs_site")

# Code, which is left alone, or a link or picture: the text up to the target, the target.
_LINK = re.compile(
    r"^ *(?P<fence>```+).*?^ *(?P=fence)|`+[^`]+`+|(\[[^][]*\]\()([^)\s]+)", re.M | re.S
)
_TAG = re.compile(r"(<[^>]+>)")
_MENTION = re.compile(r"(?:docs/[\w/-]+|CONTRIBUTING|CHANGELOG)\.md(?:,? \(?(\d+))?")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
# What latex2mathml leaves: spaces around log, none within |x|, a bar over all that is under it.
_SPACE = '<mspace width="0.167em"/>'
_BAR = r'<mover><mrow>((?:(?!<mover>).)*)</mrow><mo accent="true">&#x02015;</mo></mover>'
_MENDED = (
    (r"(?<=</mi>)(?=<mi>(?:log|exp|tanh)</mi>)", _SPACE),
    (r"(<mi>(?:log|exp|tanh)</mi>)(?!<mo[^>]*>&#x00028;)", rf"\1{_SPACE}"),
    (r"<mo( [^>]*)?>&#x0007C;</mo>", '<mo stretchy="false" lspace="0" rspace="0">|</mo>'),
    (_BAR, r'<mrow class="overline">\1</mrow>'),
)


def _source(page: str) -> str:
    """Return the file of the repository that a page of the site comes from."""
    if page.startswith("source/"):
        return page.removeprefix("source/").removesuffix(".md")
    return SOURCES.get(page) or (page if page.startswith(RESULTS) else f"docs/{page}")


def _page(source: str) -> str:
    """Return the page of the site, or the file in it, that shows a file of the repository."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith(RESULTS):
        return source
    return source.removeprefix("docs/") if source.startswith("docs/") else f"source/{source}.md"


def _links(markdown: str, page: str, change: Callable[[str], str]) -> str:
    """Return the text with its links to files of the repository changed."""

    def new(found: re.Match[str]) -> str:
        target = found[3]
        if target is None or re.match(r"[a-z]+:|#|/", target):
            return found[0]
        path, mark, anchor = target.partition("#")
        source = posixpath.normpath(posixpath.join(posixpath.dirname(_source(page)), path))
        return f"{found[2]}{change(source)}{mark}{anchor}"

    return _LINK.sub(new, markdown)


def _code(source: str) -> str:
    """Return the page of a file of code."""
    code, kind = (ROOT / source).read_text(encoding="utf-8"), Path(source).suffix[1:]
    return f"---\nsearch: {{exclude: true}}\n---\n# {source}\n\n````{kind}\n{code}\n````\n"


def _shown(notebook: Path) -> str:
    """Return the page of a notebook: its text, and its code between."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = (("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells)
    return "\n\n".join(f"```python\n{text}\n```" if code else text for text, code in texts) + "\n"


def _results() -> Iterator[tuple[str, Path | None, list[Path]]]:
    """Yield each run: its name, its tables, and what else it left."""
    files = [path for path in sorted((ROOT / RESULTS).rglob("*")) if path.is_file()]
    runs: dict[str, list[Path]] = {
        str(path.with_suffix("").relative_to(ROOT / RESULTS)): []
        for path in files
        if path.suffix == ".md"
    }
    tables = {name: ROOT / RESULTS / f"{name}.md" for name in runs}
    for path in files:
        if path.suffix != ".md":
            name = str(path.with_suffix("").relative_to(ROOT / RESULTS))
            owners = [run for run in tables if re.match(rf"{re.escape(run)}([-@]|$)", name)]
            runs.setdefault(max(owners, key=len, default=name), []).append(path)
    for name in sorted(runs, reverse=True):
        yield name, tables.get(name), runs[name]


def _result_pages() -> Iterator[tuple[str, str]]:
    """Yield pages with every result: an overview, and the tables of each run with its pictures."""
    lines = ["# Every result", "", "Lost rows stay in. On a GPU: not yet measured.", ""]
    lines += ["| run | raw files | pictures |", "|---|---|---|"]
    for name, tables, files in _results():
        raw = [path for path in files if path.suffix != ".png"]
        pictures = [path for path in files if path.suffix == ".png"]
        title = name.replace("/", ": ", 1)
        shown = f"[{title}]({name}.md)" if tables or pictures else title
        links = ", ".join(
            f"[{path.name.removeprefix(Path(name).name).strip('-.')}]"
            f"({path.relative_to(ROOT / RESULTS)})"
            for path in raw
        )
        lines.append(f"| {shown} | {links} | {len(pictures) or ''} |")
        if shown != title:
            text = tables.read_text(encoding="utf-8") if tables else ""
            drawn = [f"![{path.stem}]({path.name})" for path in pictures]
            yield f"{RESULTS}/{name}.md", "\n\n".join([_WIDE, f"# {title}", text, *drawn])
    yield f"{RESULTS}/index.md", "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that come from outside docs/."""
    texts = dict(_result_pages())
    for source, page in PAGES.items():
        texts[page] = (ROOT / source).read_text(encoding="utf-8")
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    for path in (ROOT / RESULTS).rglob("*.*"):
        if path.suffix != ".md":
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))

    def add(source: str) -> str:
        uri = _page(source)
        if files.get_file_from_path(uri) is None and (ROOT / source).is_file():
            text = _shown(ROOT / source) if source.endswith(".ipynb") else _code(source)
            files.append(File.generated(config, uri, content=text))
        return uri

    for file in list(files.documentation_pages()):
        _links(file.content_string, file.src_uri, add)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to where the site shows what they name; and no escapes within code of tables."""
    here = posixpath.dirname(page.file.src_uri)
    text = _links(markdown, page.file.src_uri, lambda s: posixpath.relpath(_page(s), here or "."))
    # GitHub wants | escaped also within code, Python-Markdown shows the backslash.
    rows = (
        re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), line)
        if line.startswith("|")
        else line
        for line in text.split("\n")
    )
    return "\n".join(rows)


def _formula(found: re.Match[str]) -> str:
    tex = entities.unescape(found[2])
    tag = re.search(r"\\tag\{(\w+)\}", tex)
    block = found[1] == "div"
    math = convert(tex.replace(tag[0], "") if tag else tex, display="block" if block else "inline")
    for wrong, right in _MENDED:
        math = re.sub(wrong, right, math)
    if not block:
        return math
    number = f' id="eq-{tag[1]}">{math}<span>({tag[1]})</span>' if tag else f">{math}"
    return f'<div class="equation"{number}</div>'


def _documented() -> list[str]:
    """Return what the reference documents."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    return re.findall(r"^::: ([\w.]+)", "\n".join(page.read_text() for page in pages), re.M)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Turn formulas into MathML, and mentions of pages into links."""
    html = _FORMULA.sub(_formula, html)

    def link(found: re.Match[str]) -> str:
        name = found[0].partition(".md")[0] + ".md"
        file = files.get_file_from_path(_page(name))
        if file is None:
            log.warning("%s mentions %s, which is no page", page.file.src_uri, name)
            return found[0]
        url = get_relative_url(file.url, page.url)
        equation = f"#eq-{found[1]}" if name == "docs/math.md" and found[1] else ""
        shown = found[0] if equation else name
        return f'<a href="{url}{equation}">{shown}</a>{found[0].removeprefix(shown)}'

    if page.file.src_uri.startswith("reference/"):
        named = {name.rpartition(".")[2]: name for name in _documented()}

        def refer(code: re.Match[str]) -> str:
            name = named.get(code[1])
            return f'<autoref identifier="{name}" optional>{code[0]}</autoref>' if name else code[0]

        html = re.sub(r"<code>(\w+)</code>(?!</a)", refer, html)
    parts, closed = _TAG.split(html), 0
    for i, part in enumerate(parts):
        if i % 2 == 0 and not closed:
            parts[i] = _MENTION.sub(link, part)
        elif re.match(r"<(a|code|pre)\b", part):
            closed += 1
        elif re.match(r"</(a|code|pre)>", part):
            closed -= 1
    return "".join(parts)
