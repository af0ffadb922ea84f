"""The comparison as a table for the terminal, as Markdown, and as an HTML page with plots that
needs no other file.

Each method has one line. Figures of several seeds are shown as the mean (lowest to highest), and
what no line has a figure for has no column.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from rich.table import Table

from lorafold.comparing.measure import Measurement
from lorafold.comparing.plots import plots_of
from lorafold.comparing.rewards import by_method, of_prompts, over_base, verdict, within
from lorafold.evaluation.intervals import mean_interval
from lorafold.files.page import document, html_table, markdown_table

Value = Callable[[Measurement], float | None]
REWARD, OVER_BASE, NOTHING = "reward", "over base", "–"
COLUMNS: dict[str, tuple[Value, str]] = {  # heading: value, format
    "trainable": (lambda r: r.trainable_parameters, ",.0f"),
    "share": (lambda r: r.trainable_share, ".3%"),
    "adapter MB": (lambda r: r.adapter_bytes and r.adapter_bytes / 1e6, ".2f"),
    "seconds": (lambda r: r.train_seconds, ",.0f"),
    "tokens/s": (lambda r: r.tokens_per_second, ",.0f"),
    "peak GB": (lambda r: r.peak_bytes and r.peak_bytes / 1e9, ".2f"),
    "loss": (lambda r: r.loss, ".4f"),
    "exact": (lambda r: r.exact_match, ".1%"),
    REWARD: (lambda r: r.reward, ".4g"),
    "tokens a completion": (lambda r: r.tokens_a_completion, ".1f"),
    "cut off": (lambda r: r.cut_off, ".1%"),
    "forgetting KL": (lambda r: r.forgetting_kl, ".3f"),
    "outside loss": (lambda r: r.forgetting_loss, "+.3f"),
    "decode ×": (lambda r: r.latency_attached, ".2f"),
    "prefill ×": (lambda r: r.prefill_attached, ".2f"),
    "merged decode ×": (lambda r: r.latency_merged, ".2f"),
    "merged prefill ×": (lambda r: r.prefill_merged, ".2f"),
}
FLAGS: dict[str, Callable[[Measurement], bool | None]] = {
    "mergeable": lambda r: r.mergeable,
    "new modules": lambda r: r.modifies_architecture,
}


def columns(measurements: Sequence[Measurement]) -> dict[str, list[str]]:
    """The cells of all methods by the heading of their column."""
    methods, found = by_method(measurements), dict[str, list[str]]()
    found["method"] = [seeds[0].method for seeds in methods]
    for heading, (value, form) in COLUMNS.items():
        found[heading] = [cell([value(r) for r in seeds], form) for seeds in methods]
        if heading == REWARD:
            found |= _of_rewards(measurements)
    for heading, flag in FLAGS.items():
        found[heading] = [answer([flag(r) for r in seeds]) for seeds in methods]
    return {heading: cells for heading, cells in found.items() if {*cells} != {NOTHING}}


def _of_rewards(measurements: Sequence[Measurement]) -> dict[str, list[str]]:
    """What stands beside the reward: its interval, how far it is above the base's, and each reward
    by its name where there are several.
    """
    methods, gains = by_method(measurements), over_base(measurements)
    intervals = [mean_interval(of_prompts(seeds)) for seeds in methods]
    names = list(measurements[0].rewards)
    return {
        "95%": [within(one, ".4g") if one else NOTHING for one in intervals],
        OVER_BASE: [str(gains.get(seeds[0].method, NOTHING)) for seeds in methods],
        **{
            f"reward {name}": [cell([r.rewards[name] for r in seeds], ".4g") for seeds in methods]
            for name in names
            if len(names) > 1
        },
    }


def lines(found: dict[str, list[str]]) -> list[list[str]]:
    """The lines of columns, one for each method."""
    return [list(line) for line in zip(*found.values(), strict=True)]


def cell(values: Sequence[float | None], form: str) -> str:
    """The mean of formatted values, with their range if they differ; a dash without values."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    lowest, mean, highest = (f"{value:{form}}" for value in (min(known), fmean(known), max(known)))
    return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def answer(values: Sequence[bool | None]) -> str:
    """Whether all are true; a dash without values."""
    return NOTHING if None in values else "yes" if all(values) else "no"


def table(measurements: Sequence[Measurement]) -> Table:
    """The table for the terminal."""
    found = columns(measurements)
    shown = Table(*found)
    for line in lines(found):
        shown.add_row(*line)
    return shown


def markdown(measurements: Sequence[Measurement]) -> str:
    """The table in Markdown, with the verdict below it where rewards are compared."""
    found, told = columns(measurements), verdict(measurements)
    below = f"\n{told}\n" if told else ""
    return markdown_table([*found], lines(found)) + below


ABOUT = """Every method was trained on the same rows, with the same model and number of steps, and
with its own learning rates."""
LOSSES = "Loss and exact match are measured on held-out rows, where a lower loss is better."
REWARDS = """Each step drew as many completions. The reward is what completions of held-out prompts
are worth, as many of each prompt as a step draws: higher is better. The first line is the base,
before anything is trained. Intervals are over prompts, and those of what is over the base are of
prompts in pairs: they say how far the result would differ on other prompts, not with other
seeds."""
BESIDES = """Forgetting is measured on text outside the task, in nats a token: the KL divergence
from the base, and the increase of the loss. Latencies at batch 1 are ratios to those of the base,
with all models timed in turn. A method is mergeable if the folded model had the same logits. New
modules remain in the forward pass."""


def page(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Write the table and its plots as one HTML file.

    Args:
        measurements: In the order of the methods.
        title: The title of the page.
        path: The file to write.
    """
    found, told = columns(measurements), verdict(measurements)
    about = f"<p>{ABOUT} {LOSSES if measurements[0].reward is None else REWARDS} {BESIDES}</p>\n"
    shown = html_table([*found], lines(found))
    below = f"<p>{html.escape(told)}.</p>\n" if told else ""
    document(title, f"{about}{shown}\n{below}{''.join(plots_of(measurements))}", path)
