"""Evaluation of preferences on held-out rows, with 95% intervals.

    preference accuracy    the share of pairs with log p(chosen) > log p(rejected), summed over the
                           completion's tokens
    reward accuracy        the share of pairs with reward(chosen) > reward(rejected); the reward is
                           the objective's implicit reward, relative to the reference
    reward margin          the mean of reward(chosen) - reward(rejected)
    change                 the mean of log p - log p_ref of a completion, in nats
    KL                     from the reference, in nats per completion token

A rising margin may hide that chosen completions become less likely too, which their change shows
(Pal et al. 2024, arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lorafold.core.contexts import evaluating
from lorafold.data.formats import PAIRS
from lorafold.data.preference_examples import BranchedRow
from lorafold.evaluation.intervals import Interval, mean_interval, wilson
from lorafold.files.templates import render_text
from lorafold.files.terminal import Progress, no_progress
from lorafold.training_step.preference_algorithms import Scored, ratio_sums
from lorafold.training_step.preference_loss import Preferences


@dataclass(frozen=True)
class PreferenceFigures:
    """Preference metrics on n held-out rows; losses, log-probabilities and rewards are in nats.

    A metric is None if it needs pairs, a reference or a kind of completion that is missing. An
    interval is also None for a single row.
    """

    n: int
    preference_loss: float
    preference_accuracy: float | None
    preference_accuracy_interval: Interval | None
    reward_accuracy: float | None
    reward_accuracy_interval: Interval | None
    reward_margin: float | None
    reward_margin_interval: Interval | None
    chosen_logp: float | None
    rejected_logp: float | None
    chosen_change: float | None
    chosen_change_interval: Interval | None
    rejected_change: float | None
    kl: float | None

    def as_json(self) -> dict[str, Any]:
        """Returns all figures except n."""
        return {name: value for name, value in asdict(self).items() if name != "n"}

    @property
    def falling(self) -> bool:
        """Whether chosen completions are significantly less likely than under the reference."""
        interval = self.chosen_change_interval
        return interval is not None and interval[1] < 0

    def __str__(self) -> str:
        clauses = render_text("evaluation/preferences.jinja", figures=self).splitlines()
        warning = (
            "\nthe chosen completions are less likely than under the reference; to avoid this, add"
            " a supervised term (dpo, simpo: --objective-options sft_weight=1) or raise beta"
        )
        return ", ".join(clauses) + warning * self.falling


def preference_figures(
    loss: Preferences, examples: Sequence[BranchedRow], reference: bool,
    progress: Progress = no_progress,
) -> PreferenceFigures:
    """Evaluates a model with its active adapters. With `reference`, the model without its highest
    adapter is the reference, and its log-probabilities are computed if they are not known.
    """
    batches, order = list[Scored](), list[int]()
    kl = tokens = 0.0
    with evaluating(loss):
        for group in loss.groups(examples):
            batch = [examples[i] for i in group]
            if reference:
                scored, divergence = loss.against_reference(batch)
                kl, tokens = kl + divergence, tokens + float(scored.tokens.sum())
            else:
                scored = loss.scored(batch)
            batches.append(scored)
            order += group
            progress(len(order), len(examples))
    algorithm, rows = loss.algorithm, reordered(batches, order)
    has_reference = rows.reference is not None
    has_rewards = has_reference or not algorithm.has_reference
    # over all rows here; over the rows of a step in training
    mismatched = ratio_sums(rows.ratios[:, algorithm.trained :])
    losses = algorithm.loss(rows._replace(mismatched=mismatched))
    logps, ratios, rewards = map(Tensor.double, (rows.logps, rows.ratios, algorithm.rewards(rows)))
    desirable = torch.tensor([e.desirable for e in examples])
    paired = algorithm.kind == PAIRS

    def chosen_and_rejected(values: Tensor) -> tuple[list[float], list[float]]:  # (n, k)
        first, second = values.t()[:2] if paired else (values[desirable, 0], values[~desirable, 0])
        return first.tolist(), second.tolist()

    def accuracy(values: Tensor) -> tuple[float | None, Interval | None]:  # (n, k)
        hits, n = int((values[:, :1] > values[:, 1:]).sum()), len(values)
        return (hits / n, wilson(hits, n)) if paired else (None, None)

    def mean(values: Sequence[float], there: bool = True) -> float | None:
        return fmean(values) if there and values else None

    (chosen, rejected), (up, down), (won, lost) = map(chosen_and_rejected, (logps, ratios, rewards))
    margins = [a - b for a, b in zip(won, lost, strict=False)] if paired else []
    has_both = has_rewards and won and lost  # labels may all be equal
    return PreferenceFigures(
        len(examples),
        float(losses.double().mean()),
        *accuracy(logps),
        *(accuracy(rewards) if has_rewards else (None, None)),
        reward_margin=fmean(won) - fmean(lost) if has_both else None,
        reward_margin_interval=mean_interval(margins) if has_rewards else None,
        chosen_logp=mean(chosen),
        rejected_logp=mean(rejected),
        chosen_change=mean(up, has_reference),
        chosen_change_interval=mean_interval(up) if has_reference else None,
        rejected_change=mean(down, has_reference),
        kl=kl / tokens if tokens else None,
    )


def reordered(parts: Sequence[Scored], order: Sequence[int]) -> Scored:
    back = torch.tensor(order).argsort()
    columns: Iterable[Any] = zip(*parts, strict=True)
    whole: list[Any] = [
        None if any(x is None for x in column) else torch.cat(column).cpu()[back]
        for column in columns
    ]
    return Scored(*whole)
