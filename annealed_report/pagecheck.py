"""Is a built report sound? The laws that pages must obey so that they stand alone, read well, and hide no failure."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup, Tag

LOADING = ("src", "srcset", "poster", "data", "background")  # attributes that make a browser fetch
TEX = re.compile(r"\$\$|\$[^$]*\\[A-Za-z]+|\\begin\{|\\(?:frac|mathbb|mathrm|alpha|beta|log|sum|int)\b")
FAILURES = {
    ".stderr": "stderr in",
    ".error, .banner": "error in a cell:",
    ".katex-error": "KaTeX cannot draw",
    "cite[data-cite]": "unresolved citation",
}


def check_pages(folder: Path) -> list[str]:
    """List the problems of the pages in a folder that `annealed_report` has built.

    Returns one line for each: a page that is missing, or in a page what would be fetched from outside itself, an image
    without alternative text, a link that leads nowhere, a citation without entry, mathematics that was not recognised,
    a cell's error or stderr.
    """
    wanted = {"index", *(path.stem for path in (folder / "notebooks").glob("*.ipynb"))}
    paths = {path.name: path for path in sorted(folder.glob("*.html"))}
    problems = [f"{stem}.html: missing" for stem in sorted(wanted) if f"{stem}.html" not in paths]
    soups = {name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for name, path in paths.items()}
    anchors = {name: {str(tag["id"]) for tag in soup.find_all(id=True)} for name, soup in soups.items()}
    anchors |= {f"notebooks/{path.name}": set() for path in (folder / "notebooks").glob("*.ipynb")}
    for name, soup in soups.items():
        found = [*_loads(soup), *_failures(soup), *_text(soup), *_links(soup, name, anchors)]
        problems += [f"{name}: {problem}" for problem in dict.fromkeys(found)]
    return problems


def _loads(soup: BeautifulSoup) -> Iterator[str]:
    """What a browser would fetch to show the page."""
    for tag in soup.find_all(True):
        names = LOADING + (("href", "xlink:href") if tag.name in ("link", "image", "use", "base") else ())
        for name in names:
            if tag.has_attr(name) and not str(tag[name]).startswith(("data:", "#")):
                yield f"<{tag.name}> loads {_short(tag[name])}"
        styles = str(tag.get("style", "")) + (tag.get_text() if tag.name == "style" else "")
        for address in re.findall(r"url\(\s*['\"]?(?!data:|#)([^)'\"]+)|@import\s+['\"]?([^'\";]+)", styles):
            yield f"style loads {_short(address[0] or address[1])}"


def _failures(soup: BeautifulSoup) -> Iterator[str]:
    for number, image in enumerate(soup.find_all("img"), 1):
        if image.get("alt") in (None, "", "No description has been provided for this image"):  # as nbconvert says
            yield f"image {number} has no alternative text"
    for selector, words in FAILURES.items():
        for tag in soup.select(selector):
            yield f"{words} {_short(tag.get('data-cite') or tag.get_text())}"


def _text(soup: BeautifulSoup) -> Iterator[str]:
    for text in soup.find_all(string=TEX):
        around = [parent for parent in text.parents if isinstance(parent, Tag)]
        is_marked = any("math" in parent.get_attribute_list("class") for parent in around)
        is_code = {"pre", "code", "script", "style", "title", "annotation"} & {parent.name for parent in around}
        if not is_marked and not is_code:
            yield f"mathematics left as text: {_short(text)}"
    if soup.select_one(".math") and not any("katex" in script.get_text() for script in soup.find_all("script")):
        yield "formulas, but no KaTeX to draw them"


def _links(soup: BeautifulSoup, name: str, anchors: dict[str, set[str]]) -> Iterator[str]:
    for link in soup.select("a[href], form[action]"):
        address = str(link.get("href") or link["action"])
        target, _, anchor = address.partition("#")
        if re.match(r"https?:|mailto:", target):
            if link.name == "form":
                yield f"form sends to {address}"
            continue
        page = unquote(target) or name
        if page.endswith(".ipynb") and link.has_attr("download"):
            if page not in anchors:
                yield f"download that is not there: {page}"
        elif page.endswith(".ipynb"):
            yield f"link to a notebook: {address}"
        elif page not in anchors:
            yield f"link to a page that is not there: {address}"
        elif anchor and unquote(anchor) not in anchors[page] and anchor not in anchors[page]:
            yield f"link to a section that is not there: {address}"


def _short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 80 else line[:77] + "…"
