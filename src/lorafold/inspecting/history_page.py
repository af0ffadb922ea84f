"""The page of `lorafold history`: curves over the steps of a run, and its first and last sample
completions side by side. Completions are untrusted, so they are only ever shown as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafold.files.html_page import render_page, write_page
from lorafold.files.plots import tick_label, without_common
from lorafold.files.templates import interval_text
from lorafold.inspecting.history import SHARED, History, ends
from lorafold.inspecting.plots import curves

TOGETHER = {"largest mismatch": "mismatch"}  # metrics that share another metric's plot
TOLD = 4  # rewards per plot
SCALES = {  # axis titles
    "tokens a completion": "tokens a completion",
    "cut off": "cut off, share of completions",
    "entropy": "entropy, nats per token",
    "groups without signal": "groups without signal, share",
    "mismatch": "mismatch, nats per token",
    "clipped": "clipped, share of tokens",
    "KL": "KL to the reference, nats per token",
}
SOUGHT = (
    "No problems found (checked for a collapse of the entropy, completions that are cut"
    " off, grow or shrink, groups without signal, one reward that falls while the sum rises, a"
    " held-out reward that falls). Read the completions anyway."
)


def page(history: History, path: str | Path) -> None:
    write_page(f"How {Path(history.adapter).resolve().name} was trained", sections(history), path)


def sections(history: History) -> str:
    samples = history.samples
    both = {"first", "last"} <= samples.keys()
    still = (f"{clean(name)} {plain(value)}" for name, value in constant(history).items())
    return render_page(
        "inspecting/history.html",
        found=history,
        clean=clean,
        plain=plain,
        configuration=[(name, clean(text)) for name, text in history.configuration.items()],
        observations=map(clean, [*history.observations] or [SOUGHT] * bool(history.judged_by)),
        figures=dict(figures(history)),
        judges=judges(history),
        held_out=any(map(history.measured, history.names)),
        plots=plotted(history),
        constant="; ".join(still),
        rows=[*zip_longest(*(samples[n]["samples"] for n in ("first", "last")))] if both else (),
    )


def figures(history: History) -> Iterator[tuple[str, str]]:
    key = "reward" if history.judged_by else "loss"
    measured = {step: (value, interval) for step, value, interval in history.measured(key)}
    for step in dict.fromkeys((min(measured), max(measured)) if measured else ()):
        value, interval = measured[step]
        when = "before the first step" if step == 0 else f"after step {step}"
        yield f"held-out {key} {when}{interval_text(interval)}", tick_label(value, digits=3)
    for name in (key, "entropy", "tokens a completion"):
        if both := ends(history.by_step.get(name, ())):
            first, last = map(fmean, both)
            yield (
                f"{name}, first and last {len(both[0])} steps",
                f"{tick_label(first, digits=3)} → {tick_label(last, digits=3)}",
            )


def judges(history: History) -> Iterator[list[str]]:
    for name, weight in history.judged_by.items():
        values = history.by_step.get(f"{SHARED}{name}")
        # a single reward is only recorded as the weighted total
        both = ends(history.by_step.get("reward", ()) if values is None else values)
        weighs = weight if values is None else 1
        means = [plain(fmean(part) / weighs) for part in both] if both and weighs else ["–", "–"]
        yield [clean(name), f"{weight:g}", *means]


def constant(history: History) -> dict[str, float]:
    values = {
        name: {v for v in history.by_step.get(name, ()) if v is not None}
        | {v for _, v, _ in history.measured(name)}
        for name in history.names
    }
    return {name: seen.pop() for name, seen in values.items() if len(seen) == 1 and name != "loss"}


def together(history: History) -> dict[str, list[str]]:
    """The metrics of each plot by its title: up to `TOLD` rewards, or one other metric."""
    names = [name for name in history.names if name not in constant(history)]
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


def plotted(history: History) -> Iterator[str]:
    """Yield the curves. A single reward that changes has none, because it equals the total's."""
    plots = together(history)
    rewards = [name for name in history.names if name.startswith(SHARED)]
    labels_of = dict(
        zip(rewards, without_common([clean(n.removeprefix(SHARED)) for n in rewards]), strict=True)
    )
    [alone, *more] = plots.get("each reward", ()) or ("",)
    alone = alone if not more and "reward" in plots else ""
    for title, names in plots.items():
        if names == [alone]:
            continue
        # a policy's held-out loss is minus its reward
        held_out = [name for name in names if not (name == "loss" and history.judged_by)]
        changes = {n: changed(history, n, n in held_out) for n in names}
        labels = {n: f"{labels_of.get(n, clean(n))} " * (len(names) > 1) for n in names}
        caption = "; ".join(labels[n] + change for n, change in changes.items())
        if alone and title == "reward":
            caption += (
                f". Of the rewards, only {labels_of[alone]} changes, {changed(history, alone)}"
            )
        yield curves(
            SCALES.get(title, title),
            f"{caption[:1].upper()}{caption[1:]}.",
            {labels_of.get(n, clean(n)): history.by_step[n] for n in names if n in history.by_step},
            {
                labels_of.get(n, clean(n)): points
                for n in held_out
                if (points := history.measured(n))
            },
        )


def changed(history: History, name: str, held_out: bool = True) -> str:
    known = [plain(v) for v in history.by_step.get(name, ()) if v is not None]
    steps = f"from {known[0]} to {known[-1]}" if len(known) > 1 else "".join(known)
    measured = history.in_words(name) if held_out else ""
    return ", ".join(filter(None, (steps, measured and f"held out {measured}")))


def plain(value: float) -> str:
    return tick_label(value, digits=4)


def clean(text: Any) -> str:
    """The text without surrogates and control characters, which HTML can't contain."""
    whole = str(text).encode("utf-8", "replace").decode()
    return "".join(c if c in "\n\t" or ord(c) >= 32 else "\N{REPLACEMENT CHARACTER}" for c in whole)
