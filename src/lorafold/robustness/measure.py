"""Measurement of refusals on prompts to be refused and on controls.

    log-odds      log sum_r p(r | x) - log sum_c p(c | x), over the beginnings r of a refusal and c
                  of compliance, averaged over the prompts x
    refusals      the share of greedy completions that begin with an r, ignoring case and the kind
                  of apostrophe; Wilson's interval
    KL            KL(before || after) of the next token, over the completions of the controls, in
                  nats per token
    loss          held-out loss on the benign rows, in nats per token

Log-odds change before the greedy completion does. Beginnings are fixed, so no completion has to be
judged, and none is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.adapter import Adapter, load
from lorafold.core.attach import only, selection_of
from lorafold.core.contexts import evaluating
from lorafold.data.examples import NO_LOSS, Example, encode
from lorafold.data.prompts import PromptRow, prompts_of
from lorafold.data.templates import on_day
from lorafold.errors import LorafoldError
from lorafold.evaluation.held_out import batches, held_out_loss
from lorafold.evaluation.intervals import Interval, mean_interval, wilson
from lorafold.generation import complete, prompt_ids
from lorafold.inspecting.updates import Svds, of_factors
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.robustness.defences import DEFENCES, Overlap, laid, overlap, updates_of
from lorafold.robustness.task import AdapterStack, FragilityTask
from lorafold.training.request import rendering_of
from lorafold.training_step.losses import CompletionLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = 8  # texts
LEADING = 2  # tokens of whitespace before a refusal


@dataclass(frozen=True)
class State:
    """Figures of one model, with 95% intervals: `log_odds` of refusal over compliance, averaged
    over the prompts; the shares of refused prompts (`refusals`) and controls (`control_refusals`);
    `kl` on the controls and held-out `loss`, in nats per token (`loss` is None without held-out
    rows).
    """

    log_odds: float
    log_odds_interval: Interval | None
    refusals: float
    refusals_interval: Interval
    control_refusals: float
    control_refusals_interval: Interval
    kl: float
    loss: float | None


@dataclass(frozen=True)
class Before:
    """The figures of a stack before tuning, and of the model without the alignment, if any."""

    before: State
    without: State | None

    @property
    def reference(self) -> float:
        """The log-odds without the alignment."""
        return 0.0 if self.without is None else self.without.log_odds

    def kept(self, log_odds: float) -> float | None:
        """The remaining share of the log-odds that the alignment added; None if it added none."""
        added = self.before.log_odds - self.reference
        return (log_odds - self.reference) / added if added > 0 else None


@dataclass(frozen=True)
class After:
    measured: State
    overlap: Overlap | None


@dataclass(frozen=True)
class Probe:
    """Prompts to be refused, controls, beginnings, and examples: `odds` are prompts with each
    beginning, `controls` are controls with completions, `benign` the held-out rows.
    """

    refuse: tuple[str, ...]
    answer: tuple[str, ...]
    refusal: tuple[str, ...]
    compliance: tuple[str, ...]
    odds: tuple[Example, ...]
    controls: tuple[Example, ...]
    benign: Sequence[Example] = ()


def completed(
    controls: Sequence[PromptRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> list[tuple[str, str]]:
    """Each control with its completion, generated greedily if the row has none."""
    open_ended = [prompt.text for prompt in controls if prompt.reference is None]
    generated = iter(complete(model, tokenizer, open_ended, max_new_tokens))
    return [(p.text, next(generated) if p.reference is None else p.reference) for p in controls]


def probe_of(
    refuse: Sequence[PromptRow],
    controls: Sequence[tuple[str, str]],
    refusal: Sequence[str],
    compliance: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    benign: Sequence[Example] = (),
) -> Probe:
    continued = [
        continuation(tokenizer, prompt, text)
        for prompt, text in controls
        if tokenizer(text, add_special_tokens=False).input_ids
    ]
    if not continued:
        raise LorafoldError(
            "controls: the completions of all controls are empty, so there are no tokens to measure"
            " the KL divergence on; use rows with completions"
        )
    return Probe(
        tuple(prompt.text for prompt in refuse),
        tuple(prompt for prompt, _ in controls),
        tuple(refusal),
        tuple(compliance),
        tuple(
            continuation(tokenizer, prompt.text, beginning)
            for prompt in refuse
            for beginning in (*refusal, *compliance)
        ),
        tuple(continued),
        benign,
    )


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Example:
    """A prompt and its continuation; only the continuation's tokens are labelled."""
    before, after = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, text)
    return Example((*before, *after), (*(NO_LOSS,) * len(before), *after))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    before: Iterable[Tensor],
) -> State:
    """Measure the model with its active adapters; `before`: log-probabilities (n, vocabulary)."""
    loss = CompletionLoss(model, packed=False, pad_id=0)
    scores = torch.zeros(len(probe.odds), dtype=torch.float64)  # log-probabilities
    with evaluating(loss):
        for group in batches(probe.odds):
            scores[group] = -loss.by_row([probe.odds[i] for i in group]).cpu().double()
    odds = log_odds(scores, probe)
    mean = odds.mean().item()
    if not math.isfinite(mean):
        raise LorafoldError(
            f"log-odds: found {mean}, expected a finite number; check the weights of the model and"
            " its adapters"
        )
    refused, n = refusals(model, tokenizer, probe), len(probe.refuse)
    shares: dict[str, Any] = {}
    for name, each in {"refusals": refused[:n], "control_refusals": refused[n:]}.items():
        shares[name] = sum(each) / len(each)
        shares[f"{name}_interval"] = wilson(sum(each), len(each))
    return State(
        log_odds=mean,
        log_odds_interval=mean_interval(odds.tolist()),
        **shares,
        kl=divergence(before, distributions(model, probe.controls)),
        loss=held_out_loss(loss, probe.benign) if len(probe.benign) else None,
    )


def log_odds(scores: Tensor, probe: Probe) -> Tensor:  # (prompts * beginnings,) -> (prompts,)
    """The log-odds of each prompt, from the log-probabilities of the beginnings after it."""
    n = len(probe.refusal)
    by_prompt = scores.view(len(probe.refuse), n + len(probe.compliance))
    return by_prompt[:, :n].logsumexp(1) - by_prompt[:, n:].logsumexp(1)


def refusals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe
) -> list[bool]:
    """Whether each greedy completion, of prompts to refuse and of controls, is a refusal."""
    longest = max(len(prompt_ids(tokenizer, text)) for text in probe.refusal)
    texts = complete(model, tokenizer, [*probe.refuse, *probe.answer], longest + LEADING)
    return [begins(text, probe.refusal) for text in texts]


def begins(text: str, beginnings: Sequence[str]) -> bool:
    """Whether a text begins with one of these, ignoring case and the kind of apostrophe."""
    return plain(text).startswith(tuple(map(plain, beginnings)))


def plain(text: str) -> str:
    return text.lstrip().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold()


def divergence(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:  # each (n, vocabulary)
    """KL(before || after) of log-probabilities, in nats per token."""
    kl = tokens = 0.0
    for p, q in zip(before, after, strict=True):
        kl += (p.exp() * (p - q)).sum().item()
        tokens += len(p)
    return max(kl / tokens, 0.0)


def distributions(model: PreTrainedModel, examples: Sequence[Example]) -> Iterator[Tensor]:
    """Yield log-probabilities (n, vocabulary) in fp32 at labelled positions, GROUP examples at a
    time.
    """
    loss = CompletionLoss(model, packed=False, pad_id=0)
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for i in range(0, len(ordered), GROUP):
        inputs = loss.collate(ordered[i : i + GROUP], loss.device)
        chosen = inputs.pop("labels") != NO_LOSS  # (B, T)
        with evaluating(model):
            logits = model(**inputs, use_cache=False).logits
        yield logits[chosen].float().log_softmax(-1)


TUNED = "tuned"
KEPT = 1e9  # bytes of distributions in memory, at most
Opened = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]
Opening = Callable[[Sequence[SavedAdapter]], Opened]  # loads the model with these adapters


class Bench:
    def __init__(self, task: FragilityTask, stack: AdapterStack, opening: Opening) -> None:
        self.task, self.stack = task, stack
        self.model, tokenizer = opening(stack.adapters)
        self.tokenizer = on_day(tokenizer, task.day)
        self.names = selection_of(self.model).names

    @cached_property
    def probe(self) -> Probe:
        """The probe; generated completions of the controls are the stack's."""
        task = self.task
        held_out = task.held_out if len(task.rows) else []
        rendering, length = rendering_of(task.recipe), task.recipe.max_length
        benign = (
            encode(held_out, self.tokenizer, length, None, rendering).examples
            if len(held_out)
            else ()
        )
        refuse, controls = (
            prompts_of(rows, self.tokenizer, name)
            for rows, name in ((task.refuse, "refuse"), (task.controls, "controls"))
        )
        with only(self.model, *self.names):  # not the adapters on top of the stack
            asked = completed(controls, self.model, self.tokenizer, task.max_new_tokens)
        return probe_of(refuse, asked, task.refusal, task.compliance, self.tokenizer, benign)

    @cached_property
    def alignment(self) -> Svds | None:
        """The update of the stack's last adapter; None without one, or if it has no subspace."""
        if not self.stack.adapters:
            return None
        with only(self.model, *self.names[:-1]):
            adapter = self._load(self.stack.adapters[-1], "alignment")
        found = updates_of(adapter)
        adapter.detach()
        return found

    def check(self) -> None:
        needing = [name for name in self.task.defences if DEFENCES[name].lay]
        if needing and self.alignment is None:
            raise LorafoldError(
                f"{self.stack.adapters[-1]}: not all changes are updates added to weights, which"
                f" --defence {', '.join(needing)} requires; choose other defences"
            )

    @cached_property
    def _weights(self) -> Any:
        return self.task.base.weights()

    def before(self) -> Before:
        before = self._measured()
        if not self.names:
            return Before(before, None)
        with only(self.model, *self.names[:-1]):
            return Before(before, self._measured())

    def _measured(self) -> State:
        return measure(self.model, self.tokenizer, self.probe, self._before or self._anew())

    @cached_property
    def _before(self) -> list[Tensor] | None:
        """The stack's distributions on the controls, (n, vocabulary) each; None if they are too
        large.
        """
        labels = sum(label != NO_LOSS for one in self.probe.controls for label in one.labels)
        small = 4 * labels * self.model.get_output_embeddings().weight.shape[0] <= KEPT
        return list(self._anew()) if small else None

    def _anew(self) -> Iterator[Tensor]:
        groups = distributions(self.model, self.probe.controls)
        while True:
            with only(self.model, *self.names):
                group = next(groups, None)
            if group is None:
                return
            yield group

    def _load(self, saved: Path | SavedAdapter, name: str) -> Adapter:
        allowed = self.task.base.allow_other_base
        return load(self.model, saved, name, base=self._weights, allow_other_base=allowed)

    def after(self, path: Path, defence: str) -> After:
        lay = DEFENCES[defence].lay
        if lay is None:
            return self.alone(path, False)
        adapter = self._load(path, TUNED)
        tuning = updates_of(adapter)
        adapter.detach()
        assert tuning is not None  # a run trains LoRA
        assert self.alignment is not None  # checked
        factors = lay(tuning, self.alignment)
        with laid(self.model, factors):
            return self._after({at: of_factors(*pair) for at, pair in factors.items()})

    def alone(self, path: Path, instead: bool) -> After:
        """The figures of a finished adapter on top of the stack, or `instead` of it without an
        overlap.
        """
        with only(self.model, *(() if instead else self.names)):
            adapter = self._load(path, TUNED)
            after = self._after(None if instead else updates_of(adapter))
            adapter.detach()
        return after

    def _after(self, tuning: Svds | None) -> After:
        lies = tuning and self.alignment and overlap(tuning, self.alignment)
        return After(self._measured(), lies or None)
