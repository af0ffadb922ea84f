"""The page of `lorafold history`: curves over the steps of a run, and the completions of its first
and its last measure side by side. Completions are untrusted, and only ever shown as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafold.files.html_page import document, rendered
from lorafold.files.model_card import within
from lorafold.files.plots import brief, number
from lorafold.inspecting.history import SHARED, History, ends
from lorafold.inspecting.plots import curves

TOGETHER = {"largest mismatch": "mismatch"}  # figures that share a plot with another one
TOLD = 4  # rewards in one plot, which its sentence has as well
SCALES = {  # what a figure is, under its name
    "tokens a completion": "tokens a completion",
    "cut off": "cut off, share of completions",
    "entropy": "entropy, nats a token",
    "groups without signal": "groups without signal, share",
    "mismatch": "mismatch, nats a token",
    "clipped": "clipped, share of tokens",
    "KL": "KL to the reference, nats a token",
}
SOUGHT = (
    "Nothing of what is looked for was found: a collapse of the entropy, completions that are cut"
    " off, grow or shrink, groups without signal, one reward that falls while the sum rises, a"
    " held-out reward that falls. Read the completions nevertheless."
)


def page(found: History, path: str | Path) -> None:
    """Write it all as one HTML file that needs no other."""
    title = f"How {Path(found.adapter).resolve().name} was trained"
    document(title, sections(found), path)


def sections(found: History) -> str:
    """The content of the page, as HTML."""
    samples = found.samples
    both = {"first", "last"} <= samples.keys()
    still = (f"{clean(name)} {plain(value)}" for name, value in constant(found).items())
    return rendered(
        "inspecting/history.html",
        found=found,
        clean=clean,
        plain=plain,
        method=found.recipe.get("method", ""),
        steps="1 step" if len(found.losses) == 1 else f"{len(found.losses)} steps",
        observations=map(clean, [*found.observations] or [SOUGHT] * bool(found.judged_by)),
        figures=dict(figures(found)),
        judges=judges(found),
        held_out=any(map(found.measured, found.names)),
        plots=plotted(found),
        constant="; ".join(still),
        rows=[*zip_longest(*(samples[n]["samples"] for n in ("first", "last")))] if both else (),
    )


def figures(found: History) -> Iterator[tuple[str, str]]:
    """What the run came to, by name."""
    key = "reward" if found.judged_by else "loss"
    measured = {step: (value, interval) for step, value, interval in found.measured(key)}
    for step in dict.fromkeys((min(measured), max(measured)) if measured else ()):
        value, interval = measured[step]
        when = "before the first step" if step == 0 else f"after step {step}"
        yield f"held-out {key} {when}{within(interval)}", number(value, digits=3)
    for name, values in found.by_step.items():
        if name in ("reward", "entropy", "tokens a completion", "loss") and (both := ends(values)):
            first, last = map(fmean, both)
            yield (
                f"{name}, first and last {len(both[0])} steps",
                f"{number(first, digits=3)} → {number(last, digits=3)}",
            )


def judges(found: History) -> Iterator[list[str]]:
    """The table of the rewards: how much each counts, and what it gave."""
    for name, weight in found.judged_by.items():
        own = found.by_step.get(f"{SHARED}{name}")
        # of a single reward there is only the sum, which has its weight in it
        both = ends(found.by_step.get("reward", ()) if own is None else own)
        weighs = weight if own is None else 1
        means = [plain(fmean(part) / weighs) for part in both] if both and weighs else ["–", "–"]
        yield [clean(name), f"{weight:g}", *means]


def constant(found: History) -> dict[str, float]:
    """The figures that never change, which need no plot."""
    values = {
        name: {v for v in found.by_step.get(name, ()) if v is not None}
        | {v for _, v, _ in found.measured(name)}
        for name in found.names
    }
    return {name: own.pop() for name, own in values.items() if len(own) == 1 and name != "loss"}


def together(found: History) -> dict[str, list[str]]:
    """The figures of each plot by its title: a few rewards of a sum, and each other figure that
    changes.
    """
    names = [name for name in found.names if name not in constant(found)]
    each = [name for name in names if name.startswith(SHARED)]
    size = -(-len(each) // -(-len(each) // TOLD)) if each else 1
    plots: dict[str, list[str]] = {}
    for name in names:
        title = TOGETHER.get(name, name)
        if name in each:
            first = each.index(name) // size * size
            last = min(first + size, len(each))
            title = "each reward" + f": {first + 1} to {last} of {len(each)}" * (size < len(each))
        plots.setdefault(title, []).append(name)
    return plots


def plotted(found: History) -> Iterator[str]:
    """The curves. Of a single reward that changes there is that of the sum, which is the same."""
    plots = together(found)
    own = [name for name in found.names if name.startswith(SHARED)]
    known = dict(zip(own, brief([clean(n.removeprefix(SHARED)) for n in own]), strict=True))
    [alone, *more] = plots.get("each reward", ()) or ("",)
    alone = alone if not more and "reward" in plots else ""
    for title, names in plots.items():
        if names == [alone]:
            continue
        # minus the reward is no figure of its own
        held_out = [name for name in names if not (name == "loss" and found.judged_by)]
        changes = {n: changed(found, n, n in held_out) for n in names}
        labels = {n: f"{known.get(n, clean(n))} " * (len(names) > 1) for n in names}
        said = "; ".join(labels[n] + change for n, change in changes.items())
        if alone and title == "reward":
            said += f". Of the rewards {known[alone]} alone changes, {changed(found, alone)}"
        yield curves(
            SCALES.get(title, title),
            f"{said[:1].upper()}{said[1:]}.",
            {known.get(n, clean(n)): found.by_step[n] for n in names if n in found.by_step},
            {known.get(n, clean(n)): points for n in held_out if (points := found.measured(n))},
        )


def changed(found: History, name: str, held_out: bool = True) -> str:
    """A figure at first and at last, and on held-out rows, in words."""
    known = [plain(v) for v in found.by_step.get(name, ()) if v is not None]
    steps = f"from {known[0]} to {known[-1]}" if len(known) > 1 else "".join(known)
    measured = found.in_words(name) if held_out else ""
    return ", ".join(filter(None, (steps, measured and f"held out {measured}")))


def plain(value: float) -> str:
    """A number in four digits, without powers of ten."""
    return number(value, digits=4)


def clean(text: Any) -> str:
    """A text without characters that no page can have: halves of surrogate pairs, and controls."""
    whole = str(text).encode("utf-8", "replace").decode()
    return "".join(c if c in "\n\t" or ord(c) >= 32 else "\N{REPLACEMENT CHARACTER}" for c in whole)
