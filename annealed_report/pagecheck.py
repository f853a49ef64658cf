"""Is a built report sound? The laws that pages must obey so that they stand alone, read well, and hide no failure."""

import re
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup, Tag

LOADING = ("src", "srcset", "poster", "data", "background", "action")  # attributes that make a browser fetch
TEX = re.compile(r"\$\$|\$[^$]*\\[A-Za-z]+|\\begin\{|\\(?:frac|mathbb|mathrm|alpha|beta|log|sum|int)\b")


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
    for name, soup in soups.items():
        found = [*loads(soup), *_accessibility(soup), *_failures(soup), *_text(soup), *_links(soup, name, anchors)]
        problems += [f"{name}: {problem}" for problem in dict.fromkeys(found)]
    return problems


def loads(soup: BeautifulSoup) -> list[str]:
    """What a browser would fetch to show the page."""
    found = []
    for tag in soup.find_all(True):
        names = [name for name in LOADING if tag.has_attr(name)]
        if tag.name in ("link", "image", "use", "base"):
            names += [name for name in ("href", "xlink:href") if tag.has_attr(name)]
        for name in names:
            if not str(tag[name]).startswith(("data:", "#")):
                found.append(f"<{tag.name}> loads {_short(tag[name])}")
        styles = str(tag.get("style", "")) + (tag.get_text() if tag.name == "style" else "")
        for address in re.findall(r"url\(\s*['\"]?(?!data:|#)([^)'\"]+)|@import\s+['\"]?([^'\";]+)", styles):
            found.append(f"style loads {_short(address[0] or address[1])}")
    return found


def _accessibility(soup: BeautifulSoup) -> list[str]:
    return [
        f"image {number} has no alternative text"
        for number, image in enumerate(soup.find_all("img"), 1)
        if image.get("alt") in (None, "", "No description has been provided for this image")  # as nbconvert says
    ]


def _failures(soup: BeautifulSoup) -> list[str]:
    found = [f"stderr in {_short(tag.get_text())}" for tag in soup.select(".stderr")]
    found += [f"error in a cell: {_short(tag.get_text())}" for tag in soup.select(".error, .banner")]
    found += [f"KaTeX cannot draw {_short(tag.get_text())}" for tag in soup.select(".katex-error")]
    return found + [f"unresolved citation {tag['data-cite']}" for tag in soup.select("cite[data-cite]")]


def _text(soup: BeautifulSoup) -> list[str]:
    found = []
    for text in soup.find_all(string=TEX):
        around = [parent.name for parent in text.parents if isinstance(parent, Tag)]
        marked = any("math" in parent.get_attribute_list("class") for parent in text.parents if isinstance(parent, Tag))
        if not marked and not {"pre", "code", "script", "style", "title", "annotation"} & set(around):
            found.append(f"mathematics left as text: {_short(text)}")
    if soup.select_one(".math") and not any("katex" in script.get_text() for script in soup.find_all("script")):
        found.append("formulas, but no KaTeX to draw them")
    return found


def _links(soup: BeautifulSoup, name: str, anchors: dict[str, set[str]]) -> list[str]:
    found = []
    for link in soup.find_all("a", href=True):
        target, _, anchor = str(link["href"]).partition("#")
        if re.match(r"https?:|mailto:", target):
            continue
        page = unquote(target) or name
        if page.endswith(".ipynb"):
            found.append(f"link to a notebook: {link['href']}")
        elif page not in anchors:
            found.append(f"link to a page that is not there: {link['href']}")
        elif anchor and unquote(anchor) not in anchors[page] and anchor not in anchors[page]:
            found.append(f"link to a section that is not there: {link['href']}")
    return found


def _short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 80 else line[:77] + "…"
