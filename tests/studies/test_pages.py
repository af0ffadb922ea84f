"""The pages that the program writes, in a browser: nothing is cut, covered or wider than the
screen, and all of it can be read, on a desktop and a phone, in light and in dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from browser_cases import CONTRASTS, CUT, open_browser
from page_cases import PAGES

WIDTHS, SCHEMES = (1280, 390), ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as play:
        found = open_browser(play)
        yield found
        found.close()


def see(browser: Any, file: Path) -> None:
    """All that has to be so of a page, however it is looked at."""
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.goto(file.as_uri())
    for details in page.locator("details").all():
        details.evaluate("one => { one.open = true }")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT) == []
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 3
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.locator("figure").count() == page.locator("figure figcaption b + svg").count()
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_everywhere(name: str, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    PAGES[name](file)
    see(browser, file)
