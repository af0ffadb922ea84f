"""A browser, and scripts that measure how well a page can be read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

# the contrast of every text that is seen, by element and text
CONTRASTS = """() => {
  const channel = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixel = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (color) => {
    const [r, g, b] = Array.from(pixel(color).slice(0, 3), (c) => channel(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (pixel(color)[3] === 255) return color;
    }
    throw new Error("the page has no background");
  };
  const found = {};
  for (const e of document.body.querySelectorAll("*")) {
    const written = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!written || !e.checkVisibility() || e.disabled || e.closest("noscript")) continue;
    const style = getComputedStyle(e);
    const ink = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    found[`${e.tagName} ${e.className} ${e.textContent.trim()}`] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""

# what of a page can't be seen whole: texts of pictures that leave them or cover one another, and
# what is wider than the box that it stands in, unless that box scrolls
CUT = """() => {
  const found = [], inside = (a, b) =>
    Math.min(a.left - b.left, b.right - a.right, a.top - b.top, b.bottom - a.bottom) >= -1;
  for (const svg of document.querySelectorAll("svg")) {
    const whole = svg.getBoundingClientRect(), seen = [];
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (!inside(box, whole)) found.push(`${text.textContent} leaves its picture`);
      const by = Math.min(2, box.height / 4);
      for (const [other, at] of seen)
        if (box.left + by < at.right && at.left + by < box.right &&
            box.top + by < at.bottom && at.top + by < box.bottom)
          found.push(`${text.textContent} covers ${other}`);
      seen.push([text.textContent, box]);
    }
  }
  for (const e of document.body.querySelectorAll(":not(svg *)")) {
    const scrolls = getComputedStyle(e).overflowX !== "visible";
    const inline = getComputedStyle(e).display === "inline";
    if (!scrolls && !inline && e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
      found.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 40)} is wider than its box`);
  }
  return found;
}"""


API = re.compile(r"/(v1/|admin/|readyz$)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser of this machine, or else playwright's own; without either the test is skipped."""
    sync = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync.sync_playwright() as play:
        found = next(filter(None, map(shutil.which, names)), play.chromium.executable_path)
        if not os.path.exists(found):
            pytest.skip("no browser: install chromium to test the page")
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def listen(page: Any, url: str, told: list[str]) -> None:
    """Append what a page writes to its console, and the addresses of other hosts and of missing
    files that it asks for, but not what the API refuses.
    """
    page.set_default_timeout(10_000)
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda one: one.url.startswith((url, "data:")) or told.append(one.url))
    page.on("response", lambda one: one.ok or API.search(one.url) or told.append(one.url))


def faults(told: list[str]) -> list[str]:
    """Of that, what the browser itself does not write of a refusal."""
    return [text for text in told if not text.startswith("Failed to load resource")]
