"""The HTML page of `lorafold history`: metrics by step, and the sample completions of the first and
the last evaluation side by side. Completions are untrusted, so the page shows them only as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from lorafold.evaluation.observations import REWARD_PREFIX, first_and_last
from lorafold.files.html_page import render_page, write_page
from lorafold.files.plots import tick_label, without_common
from lorafold.files.templates import interval_text
from lorafold.inspecting.history import History
from lorafold.inspecting.page_plots import curves

SHARED_PLOTS = {"largest mismatch": "mismatch"}  # metrics in another metric's plot
MAX_REWARDS_PER_PLOT = 4
AXIS_TITLES = {
    "tokens a completion": "tokens a completion",
    "cut off": "cut off, share of completions",
    "entropy": "entropy, nats per token",
    "groups without signal": "groups without signal, share",
    "mismatch": "mismatch, nats per token",
    "clipped": "clipped, share of tokens",
    "KL": "KL to the reference, nats per token",
}
NO_PROBLEMS = (
    "No problems found (checked for a collapse of the entropy, completions that are cut"
    " off, grow or shrink, groups without signal, one reward that falls while the sum rises, a"
    " held-out reward that falls). Read the completions anyway."
)


def page(history: History, path: str | Path) -> None:
    write_page(f"How {Path(history.adapter).resolve().name} was trained", sections(history), path)


def sections(history: History) -> str:
    samples = history.samples
    paired = {"first", "last"} <= samples.keys()
    constants = (f"{clean(name)} {rounded(x)}" for name, x in constant_metrics(history).items())
    return render_page(
        "inspecting/history.html",
        history=history,
        clean=clean,
        rounded=rounded,
        configuration=[(name, clean(text)) for name, text in history.configuration.items()],
        observations=map(clean, history.observations or [NO_PROBLEMS] * bool(history.judged_by)),
        figures=dict(summary_figures(history)),
        reward_rows=reward_rows(history),
        held_out=any(map(history.measured, history.names)),
        plots=render_plots(history),
        constant="; ".join(constants),
        rows=[*zip_longest(*(samples[n]["samples"] for n in ("first", "last")))] if paired else (),
    )


def summary_figures(history: History) -> Iterator[tuple[str, str]]:
    key = "reward" if history.judged_by else "loss"
    measured = {step: (value, interval) for step, value, interval in history.measured(key)}
    for step in dict.fromkeys((min(measured), max(measured)) if measured else ()):
        value, interval = measured[step]
        when = "before the first step" if step == 0 else f"after step {step}"
        yield f"held-out {key} {when}{interval_text(interval)}", tick_label(value, digits=3)
    for name in (key, "entropy", "tokens a completion"):
        if ends := first_and_last(history.by_step.get(name, ())):
            first, last = map(fmean, ends)
            yield (
                f"{name}, first and last {len(ends[0])} steps",
                f"{tick_label(first, digits=3)} → {tick_label(last, digits=3)}",
            )


def reward_rows(history: History) -> Iterator[list[str]]:
    for name, weight in history.judged_by.items():
        values = history.by_step.get(f"{REWARD_PREFIX}{name}")
        # a single reward is only recorded as the weighted total
        ends = first_and_last(history.by_step.get("reward", ()) if values is None else values)
        scale = weight if values is None else 1
        means = [rounded(fmean(end) / scale) for end in ends] if ends and scale else ["–", "–"]
        yield [clean(name), f"{weight:g}", *means]


def constant_metrics(history: History) -> dict[str, float]:
    values = {
        name: {v for v in history.by_step.get(name, ()) if v is not None}
        | {v for _, v, _ in history.measured(name)}
        for name in history.names
    }
    return {name: seen.pop() for name, seen in values.items() if len(seen) == 1 and name != "loss"}


def metrics_by_plot(history: History) -> dict[str, list[str]]:
    """The metrics of each plot, by title; rewards share plots."""
    names = [name for name in history.names if name not in constant_metrics(history)]
    each = [name for name in names if name.startswith(REWARD_PREFIX)]
    size = -(-len(each) // -(-len(each) // MAX_REWARDS_PER_PLOT)) if each else 1
    plots: dict[str, list[str]] = {}
    for name in names:
        title = SHARED_PLOTS.get(name, name)
        if name in each:
            first = each.index(name) // size * size
            last = min(first + size, len(each))
            title = "each reward" + f": {first + 1} to {last} of {len(each)}" * (size < len(each))
        plots.setdefault(title, []).append(name)
    return plots


def render_plots(history: History) -> Iterator[str]:
    """Yields the plots. If only one reward changes, it has no plot, because its curve resembles the
    total's.
    """
    plots = metrics_by_plot(history)
    rewards = [name for name in history.names if name.startswith(REWARD_PREFIX)]
    titles = without_common([clean(name.removeprefix(REWARD_PREFIX)) for name in rewards])
    labels_of = dict(zip(rewards, titles, strict=True))
    [alone, *more] = plots.get("each reward", ()) or ("",)
    alone = alone if not more and "reward" in plots else ""
    for title, names in plots.items():
        if names == [alone]:
            continue
        # a policy's held-out loss is its negated reward
        held_out = [name for name in names if not (name == "loss" and history.judged_by)]
        changes = {n: change_text(history, n, n in held_out) for n in names}
        labels = {n: f"{labels_of.get(n, clean(n))} " * (len(names) > 1) for n in names}
        caption = "; ".join(labels[n] + change for n, change in changes.items())
        if alone and title == "reward":
            caption += (
                f". Of the rewards, only {labels_of[alone]} changes, {change_text(history, alone)}"
            )
        yield curves(
            AXIS_TITLES.get(title, title),
            f"{caption[:1].upper()}{caption[1:]}.",
            {labels_of.get(n, clean(n)): history.by_step[n] for n in names if n in history.by_step},
            {
                labels_of.get(n, clean(n)): points
                for n in held_out
                if (points := history.measured(n))
            },
        )


def change_text(history: History, name: str, held_out: bool = True) -> str:
    values = [rounded(v) for v in history.by_step.get(name, ()) if v is not None]
    steps = f"from {values[0]} to {values[-1]}" if len(values) > 1 else "".join(values)
    held_out_text = history.in_words(name) if held_out else ""
    return ", ".join(filter(None, (steps, held_out_text and f"held out {held_out_text}")))


def rounded(value: float) -> str:
    return tick_label(value, digits=4)


def clean(text: Any) -> str:
    """The text without surrogates and control characters, which HTML can't contain."""
    valid = str(text).encode("utf-8", "replace").decode()
    return "".join(c if c in "\n\t" or ord(c) >= 32 else "\N{REPLACEMENT CHARACTER}" for c in valid)
