"""The comparison as a table of the figures that decide for a terminal, whole as Markdown, and as an
HTML page with plots that needs no other file.

Each method has one line. Figures of several seeds are shown as the mean (lowest to highest), on a
terminal as the mean, and what no line has a figure for has no column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from lorafold.comparing.measure import Measurement
from lorafold.comparing.paired import (
    SEEDS,
    Difference,
    by_method,
    held_out,
    lower_is_better,
    over_base,
    verdict,
    within,
)
from lorafold.comparing.plots import plots_of
from lorafold.files.page import document, grid, html_table, markdown_table, notes, section
from lorafold.files.plots import number
from lorafold.files.terminal import paragraph, text_table

Value = Callable[[Measurement], float | None]
LOSS, EXACT, REWARD, OVER_BASE, NOTHING = "loss", "exact", "reward", "over base", "–"
WITHIN = " 95%"  # after a figure's heading: its interval
COLUMNS: dict[str, tuple[Value, str]] = {  # heading: value, format
    "trainable": (lambda r: r.trainable_parameters, ",.0f"),
    "share": (lambda r: r.trainable_share, ".3%"),
    "adapter MB": (lambda r: r.adapter_bytes and r.adapter_bytes / 1e6, ".2f"),
    "seconds": (lambda r: r.train_seconds, ",.0f"),
    "tokens/s": (lambda r: r.tokens_per_second, ",.0f"),
    "peak GB": (lambda r: r.peak_bytes and r.peak_bytes / 1e9, ".2f"),
    LOSS: (lambda r: r.loss, ".4f"),
    EXACT: (lambda r: r.exact_match, ".1%"),
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
    found["method"] = [seeds[0].name for seeds in methods]
    for heading, (value, form) in COLUMNS.items():
        found[heading] = [cell([value(r) for r in seeds], form) for seeds in methods]
        if heading in (LOSS, REWARD) and any(value(r) is not None for r in measurements):
            found |= _beside(heading, form, measurements)
        if heading == EXACT:
            found[EXACT + WITHIN] = [_of_one(seeds) for seeds in methods]
    for heading, flag in FLAGS.items():
        found[heading] = [answer([flag(r) for r in seeds]) for seeds in methods]
    return {heading: cells for heading, cells in found.items() if {*cells} != {NOTHING}}


def _beside(heading: str, form: str, measurements: Sequence[Measurement]) -> dict[str, list[str]]:
    """What stands beside what methods are compared by: its interval, how far it is from the base's,
    and each reward by its name where there are several.
    """
    methods, gains = by_method(measurements), over_base(measurements)
    intervals = [one.interval for one in held_out(measurements).values()]
    names = list(measurements[0].rewards)
    return {
        heading + WITHIN: [within(one, form) if one else NOTHING for one in intervals],
        "validation": [cell([r.validation for r in seeds], form) for seeds in methods],
        OVER_BASE: [str(gains.get(seeds[0].name, NOTHING)) for seeds in methods],
        **{
            f"reward {name}": [cell([r.rewards[name] for r in seeds], ".4g") for seeds in methods]
            for name in names
            if len(names) > 1
        },
    }


def _of_one(seeds: Sequence[Measurement]) -> str:
    """The interval of the exact match of a single seed; several have their range."""
    interval = seeds[0].exact_match_interval
    return NOTHING if interval is None or len(seeds) > 1 else within(interval, ".1%")


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


SHORT: dict[str, tuple[Value, str]] = {  # heading: value, format; beside what is compared
    EXACT: (lambda r: r.exact_match, ".0%"),
    "KL to base": (lambda r: r.forgetting_kl, ".3f"),
    "peak GB": (lambda r: r.peak_bytes and r.peak_bytes / 1e9, ".2f"),
    "time s": (lambda r: r.train_seconds, ",.0f"),
}


def deciding(measurements: Sequence[Measurement]) -> str:
    """The figures by which one chooses a method, in a table of at most 80 columns, what they mean,
    and the verdict.
    """
    methods, lower = by_method(measurements), lower_is_better(measurements)
    gains, figures = over_base(measurements), held_out(measurements).values()
    form = ".4f" if lower else ".4g"
    found = {
        "method": [seeds[0].name for seeds in methods],
        LOSS if lower else REWARD: [plus_minus(one, form) for one in figures],
        OVER_BASE: [
            plus_minus(gains[name], f"+{form}") if (name := seeds[0].name) in gains else NOTHING
            for seeds in methods
        ],
        **{
            heading: [average([value(r) for r in seeds], form) for seeds in methods]
            for heading, (value, form) in SHORT.items()
        },
        "trained": [
            NOTHING if (n := seeds[0].trainable_parameters) is None else number(n, digits=3)
            for seeds in methods
        ],
    }
    shown = {heading: cells for heading, cells in found.items() if {*cells} != {NOTHING}}
    several = max(map(len, methods))
    means = f" Means over {several} seeds." if several > 1 else ""
    over = "and seeds" if several >= SEEDS else "alone, not seeds"
    about = f"{LOW if lower else HIGH} {over}.{means} {LEGEND}"
    told = verdict(measurements)
    below = [*paragraph(about), *(["", *paragraph(f"{told}.")] if told else [])]
    return text_table([*shown], lines(shown)) + "\n" + "\n".join(below)


LOW = "loss: in nats a token, with its 95% interval; less is better. Intervals are over rows"
HIGH = "reward: with its 95% interval; more is better. Intervals are over prompts"
LEGEND = (
    "over base: how far it is from the base's, in pairs. KL to base: forgetting, on text outside"
    " the task, in nats a token; less is better. time: of training. trained: parameters. --wide has"
    " all figures."
)


def plus_minus(found: Difference, form: str) -> str:
    """A figure with half of its interval, which is symmetric."""
    if found.interval is None:
        return f"{found.mean:{form}}"
    half = (found.interval[1] - found.interval[0]) / 2
    return f"{found.mean:{form}} ±{half:{form.lstrip('+')}}"


def average(values: Sequence[float | None], form: str) -> str:
    """The formatted mean of values; a dash without values."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):{form}}" if known else NOTHING


def markdown(measurements: Sequence[Measurement]) -> str:
    """The whole table in Markdown, with the verdict below it."""
    found, told = columns(measurements), verdict(measurements)
    below = f"\n{told}\n" if told else ""
    return markdown_table([*found], lines(found)) + below


ABOUT = """Every method was trained on the same rows, with the same model and recipe but for the
settings beside its name, and where the recipe sets no learning rate with its own. The first line is
the base, before anything is trained."""
LOSSES = """Loss and exact match are measured on held-out rows. Intervals say how far the result
would differ on other rows and, from three seeds on, with other seeds; those of what is over the
base are of rows in pairs."""
REWARDS = """Each step drew as many completions. The reward is what completions of held-out prompts
are worth, as many of each prompt as a step draws. Intervals say how far the result would differ on
other prompts and, from three seeds on, with other seeds; those of what is over the base are of
prompts in pairs."""
BESIDES = """Of methods, with three seeds or more, those are told apart whose difference is not 0 at
5% by Holm's correction over all pairs. Where settings vary and there are enough rows, a random half
of the rows, the validation rows, chooses the best setting, and the other half, the test rows, gives
the loss or the reward; all other figures are of all rows. Forgetting is measured on text outside
the task, in nats a token: the KL divergence from the base, and the increase of the loss. Latencies
at batch 1 are ratios to those of the base, with all models timed in turn. A method is mergeable if
the folded model had the same logits. New modules remain in the forward pass."""


def page(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Write the plots and the table as one HTML file.

    Args:
        measurements: In the order of the methods.
        title: The title of the page.
        path: The file to write.
    """
    found, told = columns(measurements), verdict(measurements)
    about = (ABOUT, LOSSES if measurements[0].reward is None else REWARDS, BESIDES)
    parts = (
        notes([f"{told}."] if told else []),
        grid(plots_of(measurements), "flow"),
        section("All figures"),
        html_table([*found], lines(found)),
        section("How it was measured", " ".join(about)),
    )
    document(title, "\n".join(parts), path)
