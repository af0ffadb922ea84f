"""What tests in a browser share: the browser, and how well what is on a page can be read."""

from __future__ import annotations

import os
import shutil
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
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    found[`${e.tagName} ${e.className} ${e.textContent.trim()}`] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


def open_browser(play: Any) -> Any:
    """The browser of this machine, or else playwright's own; without either the test is skipped.

    Args:
        play: what `sync_playwright` gives.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), play.chromium.executable_path)
    if not os.path.exists(found):
        pytest.skip("no browser: install chromium to test the page")
    return play.chromium.launch(executable_path=found, args=["--no-sandbox"])
