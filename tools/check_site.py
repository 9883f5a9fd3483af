"""The built documentation site in headless Chromium: `make docs-check`.

    python -m tools.check_site --chromium /usr/bin/chromium

Every page is opened. It fails where the browser says anything on its console, asks anybody but the
site for anything, gets no answer, shows no picture or an empty formula, or where a link or its anchor
leads nowhere; and where the search finds nothing. Pictures of some pages, light and dark, are left for
a person to look at.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from playwright.sync_api import Page, sync_playwright

# What a person should look at.
SHOWN = ("index", "start", "math", "losses", "reference/functions", "reference/cli",
         "howto/from-trl", "benchmarks/results/index")  # fmt: skip
WORDS = ("shared prompts", "filter_eps", "ValueError")
ABORTED = "net::ERR_ABORTED"
# In the page: what is wrong with its pictures, formulas and text, its links and what they may name.
LOOK = """() => {
  const wrong = [];
  for (const i of document.images)
    if (!i.complete || !i.naturalWidth) wrong.push("no picture: " + i.src);
  const math = [...document.querySelectorAll("math")];
  for (const m of math)
    if (m.getBoundingClientRect().width < 2 || m.querySelector("merror"))
      wrong.push("an empty formula: " + m.outerHTML.slice(0, 80));
  const text = document.querySelector("article").cloneNode(true);
  for (const e of text.querySelectorAll("code, pre, math")) e.remove();
  for (const raw of text.textContent.match(/\\$\\$|\\\\\\(|\\\\[a-z]+\\{|^\\s*[-|] .*\\|/gm) || [])
    wrong.push("raw text: " + raw);
  if (text.querySelector("blockquote blockquote")) wrong.push("a doctest that is none");
  for (const p of text.querySelectorAll("p"))
    if (/\\n *[-*] /.test(p.textContent)) wrong.push("a list in a paragraph: " + p.textContent);
  return {wrong, formulas: math.length, pictures: document.images.length,
          ids: [...document.querySelectorAll("[id]")].map(e => e.id),
          links: [...document.querySelectorAll("a[href]")].map(e => e.href)};
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def check(folder: Path, chromium: str, pictures: Path) -> list[str]:
    """Open every page of a site; return what is wrong."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_address[1]}/"
    wrong: list[str] = []
    asked: set[str] = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()

        def at() -> str:
            return tab.url.removeprefix(home)

        tab.on("console", lambda message: wrong.append(f"{at()}: console: {message.text}"))
        tab.on("pageerror", lambda error: wrong.append(f"{at()}: {error}"))
        tab.on(
            "requestfailed",  # leaving a page ends what it has still under way
            lambda r: (
                wrong.append(f"{at()}: {r.failure}: {r.url}") if r.failure != ABORTED else None
            ),
        )
        tab.on("request", lambda request: asked.add(request.url))
        tab.on(
            "response",
            lambda r: wrong.append(f"{at()}: {r.status} {r.url}") if r.status >= 400 else None,
        )
        pages = sorted(folder.rglob("*.html"))
        seen: dict[str, Any] = {}
        for path in pages:
            url = home + path.relative_to(folder).as_posix()
            tab.goto(url)
            seen[url] = tab.evaluate(LOOK)
            wrong += [f"{at()}: {text}" for text in seen[url]["wrong"]]
        wrong += _broken(seen, home, folder)
        wrong += [f"asked elsewhere: {url}" for url in sorted(asked) if not _inside(url, home)]
        found = {words: _search(tab, home, words, pictures) for words in WORDS}
        wrong += [f"the search finds nothing for {words!r}" for words, n in found.items() if not n]
        _look(browser, home, pictures)
        browser.close()
    server.shutdown()
    links = {link for page in seen.values() for link in page["links"]}
    outside = sorted(link for link in links if not link.startswith(home))
    print(
        f"{len(pages)} pages, {sum(p['formulas'] for p in seen.values())} formulas,"
        f" {sum(p['pictures'] for p in seen.values())} pictures, {len(links)} links,"
        f" {len(asked)} requests, {sum(not _inside(url, home) for url in asked)} of them elsewhere"
    )
    print("found: " + ", ".join(f"{words!r} {n}" for words, n in found.items()))
    print("links that leave the site (not followed):", *outside, sep="\n  ")
    return wrong


def _inside(url: str, home: str) -> bool:
    return url.startswith((home, "data:", "blob:"))


def _broken(seen: dict[str, Any], home: str, folder: Path) -> list[str]:
    """Return links within the site whose page or anchor is not there."""
    broken = []
    for url, page in seen.items():
        for link in page["links"]:
            target, _, anchor = urljoin(url, link).partition("#")
            if not target.startswith(home):
                continue
            if target.endswith("/"):
                target += "index.html"
            path = folder / unquote(urlsplit(target).path).lstrip("/")
            lost = not path.is_file()
            if anchor and not lost and target in seen:
                lost = unquote(anchor) not in seen[target]["ids"]
            if lost:
                broken.append(f"{url.removeprefix(home)}: broken link: {link.removeprefix(home)}")
    return sorted(set(broken))


def _search(tab: Page, home: str, words: str, pictures: Path) -> int:
    """Type words into the search and open the first page found; return how many were found."""
    tab.goto(home + "index.html")
    tab.click(".md-search__input")
    tab.type(".md-search__input", words)
    tab.wait_for_selector(".md-search-result__link", timeout=20_000)
    tab.wait_for_timeout(500)
    meta = re.search(r"\d+", tab.inner_text(".md-search-result__meta"))
    tab.screenshot(path=pictures / f"search-{words.replace(' ', '-')}.png")
    tab.click(".md-search-result__link >> nth=0")
    tab.wait_for_load_state()
    return int(meta[0]) if meta else 0


def _look(browser: Any, home: str, pictures: Path) -> None:
    """Take pictures of some pages, light and dark, and of one on a telephone."""
    for scheme, width in (("light", 1400), ("dark", 1400), ("light", 400)):
        size = {"width": width, "height": 1000}
        tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
        for name in SHOWN if width > 400 else SHOWN[:3]:
            tab.goto(f"{home}{name}.html")
            tab.wait_for_timeout(200)
            tab.screenshot(path=pictures / f"{name.replace('/', '-')}-{scheme}-{width}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=Path("out/site"))
    parser.add_argument("--pictures", type=Path, default=Path("out/site-pictures"))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    options = parser.parse_args()
    if options.chromium is None:
        sys.exit("Chromium is not installed: apt-get install chromium, or --chromium PATH.")
    options.pictures.mkdir(parents=True, exist_ok=True)
    faults = check(options.site, options.chromium, options.pictures)
    print(*faults, sep="\n")
    print(f"{len(faults)} faults; look at {options.pictures}")
    sys.exit(bool(faults))
