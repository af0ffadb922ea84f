"""Links of a built site that lead nowhere: to a page, a file or an anchor that is not there.

mkdocs looks at the links that stand in Markdown; this looks at what is in the pages in the end, by
whatever way it came there. Links to other hosts are not followed.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src"}


class Page(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if (attribute := LINKS.get(tag)) in given:
            self.links.add(given[attribute])


def dead(site: Path) -> list[str]:
    """A line for every dead link: the page and what it links to."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site.resolve())}: {link}"
        for path, page in pages.items()
        if path.name != "404.html"  # whose links are those of the host that shows it
        for link in sorted(page.links)
        if not leads(path, link, pages)
    ]


def leads(path: Path, link: str, pages: dict[Path, Page]) -> bool:
    """Whether a link of a page leads somewhere; other hosts always do."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target in pages:
        return unquote(parts.fragment) in pages[target].anchors
    return target.is_file() or (target / "index.html") in pages
