"""The result of `lf.estimate`, as bars in a terminal and as an HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from lorafold.files.html_page import ShownInNotebooks, render_page, write_page
from lorafold.files.plots import FAINT, INK, SERIES, SIZE, draw_level, figure_html, set_scales
from lorafold.files.templates import render_text
from lorafold.files.terminal import format_bytes
from lorafold.memory.estimate import SPEED, TERMS, Advice, Estimate
from lorafold.memory.trace import MemorySetting

WIDTH = 40  # characters of the longest bar


def verdict(advice: Advice, setting: MemorySetting) -> list[str]:
    """Lines about a setting: whether it fits, the largest batch and length that fit, and changes
    that would help.
    """
    return render_text("memory/verdict.jinja", advice=advice, setting=setting).splitlines()


def page(
    estimate: Estimate, title: str, path: Path, lines: list[str], memory: int | None = None
) -> None:
    terms = {name.replace("_", " "): text for name, text in TERMS.items()}
    cells = [
        [name, format_bytes(n), f"{n / estimate.total:.1%}", terms[name]]
        for name, n in estimate.shown.items()
    ]
    counted = "tensors, without kernel workspaces and fragmentation"
    if estimate.terms["process"]:
        counted = "the resident memory of the process, without imported libraries"
    plot = terms_plot(estimate, memory, counted)
    values = {"lines": lines, "plot": plot, "cells": cells, "counted": counted}
    write_page(title, render_page("memory/estimate.html", **values), path)


def terms_plot(estimate: Estimate, memory: int | None, counted: str) -> str:
    terms, total = estimate.shown, estimate.total
    names, sizes = [*terms, "total"], [*terms.values(), total]
    starts = [*accumulate([*terms.values()][:-1], initial=0), 0]

    def draw(axes: Any) -> None:
        axes.barh(names, sizes, 0.6, starts, color=[*[SERIES[0]] * len(terms), FAINT])
        for y, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            offset = {"textcoords": "offset points", "va": "center"}
            axes.annotate(format_bytes(size), (start + size, y), (4, 0), **offset)
        if memory is not None:
            draw_level(axes, "the device", x=memory)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.25 * max(total, memory or 0))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params("y", labelcolor=INK, length=0)
        set_scales(axes, x="linear")
        axes.xaxis.set_major_formatter(lambda n, _: format_bytes(int(n)) if n else "0")

    largest = max(terms, key=lambda name: terms[name])
    of = "" if memory is None else f" of the device's {format_bytes(memory)}"
    text = (
        f"{format_bytes(total)}{of} at the peak, {counted}; the largest term is {largest},"
        f" {terms[largest] / total:.0%}."
    )
    return figure_html(draw, "Memory by term", text, (SIZE[0], 0.7 + 0.22 * len(names)))


@dataclass(frozen=True)
class Forecast(ShownInNotebooks):
    """The memory of a setting at its peak, in bytes by term.

    If a device's memory was given, `advice` contains whether the setting fits, and other settings
    that would fit. `measured` is the peak of a real step, if one was run. `of_this_cpu` is set if
    the estimate is for this machine's CPU instead of a GPU. With several processes, the bytes are
    per process; `speed` is a device's operations per second.
    """

    estimate: Estimate
    setting: MemorySetting
    advice: Advice | None = None
    measured: int | None = None
    of_this_cpu: bool = False
    speed: float = SPEED

    @property
    def total(self) -> int:
        """The bytes at the peak."""
        return self.estimate.total

    @property
    def terms(self) -> dict[str, int]:
        """The bytes by term, whose sum is `total`."""
        return self.estimate.terms

    def remarks(self) -> list[str]:
        """The lines below the terms: the device, whether the setting fits, and the measured bytes.
        """
        return render_text("memory/remarks.jinja", forecast=self).splitlines()

    def as_json(self) -> dict[str, Any]:
        """All values under the keys of `lorafold estimate --json`."""
        figures: dict[str, Any] = {"total": self.total, **self.terms}
        sent = self.estimate.sent
        if sent is not None:
            figures |= {"sent": sent.bytes, "bandwidth": sent.bandwidth(self.speed)}
        advice = {} if self.advice is None else asdict(self.advice)
        largest = {f"largest_{k}" if k in ("batch", "length") else k: v for k, v in advice.items()}
        measured = {} if self.measured is None else {"measured": self.measured}
        return {**figures, "fits": None, **largest, **measured}

    def __str__(self) -> str:
        most = max(self.terms.values())
        bars = [
            f"{name:<12} {format_bytes(n):>9}  {'█' * max(1, round(WIDTH * n / most))}"
            for name, n in self.estimate.shown.items()
        ]
        return "\n".join([*bars, f"{'total':<12} {format_bytes(self.total):>9}", *self.remarks()])
