"""What a model does with prompts that it shall refuse, and with those that it shall not.

    log-odds      log sum_r p(r | x) - log sum_c p(c | x), over the beginnings r of a refusal and c
                  of compliance, as a mean over the prompts x; p(r | x) is the product of its
                  tokens' probabilities
    refusals      the share of greedy completions that begin with an r, case and the kind of
                  apostrophe aside; Wilson's interval
    KL            KL(before || after) of the next token, over the completions of the controls, in
                  nats a token
    loss          held-out loss on the benign rows, in nats a token

Log-odds say how far a model is from changing its mind where the greedy completion does not change
yet. Beginnings are fixed and few, so no completion has to be judged, and none is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.core.modes import evaluating
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.prompts import Prompt
from lorafold.errors import LorafoldError
from lorafold.evaluation.held_out import batches, held_out_loss
from lorafold.evaluation.intervals import Interval, mean_interval, wilson
from lorafold.generation import complete, tokens_of
from lorafold.step.losses import Completions

GROUP = 8  # texts
LEADING = 2  # tokens of whitespace before a refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class State:
    """The figures of one state of the model, each with its 95% interval. `loss` is None without
    held-out benign rows, `log_odds_interval` for a single prompt.
    """

    log_odds: float
    log_odds_interval: Interval | None
    refusals: float
    refusals_interval: Interval
    control_refusals: float
    control_refusals_interval: Interval
    kl: float
    loss: float | None

    @staticmethod
    def of_stored(stored: dict[str, Any]) -> State:
        """The figures that a file has."""
        pairs = {k: tuple(v) for k, v in stored.items() if k.endswith("_interval") and v}
        return State(**stored | pairs)


@dataclass(frozen=True)
class Probe:
    """What is asked: rendered prompts to be refused, rendered controls, the beginnings of a refusal
    and of compliance, and examples: `odds` are prompts with each beginning, `controls` those with
    completions, `benign` the held-out rows.
    """

    refuse: tuple[str, ...]
    answer: tuple[str, ...]
    refusal: tuple[str, ...]
    compliance: tuple[str, ...]
    odds: tuple[Example, ...]
    controls: tuple[Example, ...]
    benign: Sequence[Example] = ()


def completed(
    controls: Sequence[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> list[tuple[str, str]]:
    """Each control with its completion; those without one get the model's own, greedy.

    Args:
        model: In the state before the tuning.
        max_new_tokens: The most tokens of a completion.
    """
    open_ended = [prompt.text for prompt in controls if prompt.reference is None]
    own = iter(complete(model, tokenizer, open_ended, max_new_tokens))
    return [(p.text, next(own) if p.reference is None else p.reference) for p in controls]


def probe_of(
    refuse: Sequence[Prompt],
    controls: Sequence[tuple[str, str]],
    refusal: Sequence[str],
    compliance: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    benign: Sequence[Example] = (),
) -> Probe:
    """The probe.

    Args:
        controls: As `completed` gives them.
        refusal, compliance: The beginnings of either.
        tokenizer: The model's.
        benign: Held-out benign rows, as examples.
    """
    continued = [
        continuation(tokenizer, prompt, text)
        for prompt, text in controls
        if tokenizer(text, add_special_tokens=False).input_ids
    ]
    if not continued:
        raise LorafoldError(
            "controls: the model's completions of all of them are empty, so there is no token to"
            " measure the KL divergence on; give rows with completions"
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
    """A prompt and its continuation, whose tokens alone are labelled.

    Args:
        tokenizer: The model's.
        prompt: As the chat template rendered it.
        text: What follows; it is tokenized by itself, as a model generates it.
    """
    before, after = tokens_of(tokenizer, prompt), tokens_of(tokenizer, text)
    return Example((*before, *after), (*(NO_LOSS,) * len(before), *after))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    before: Iterable[Tensor],
) -> State:
    """Measure the model with the adapters that are active on it.

    Args:
        model: A causal language model.
        tokenizer: The model's.
        probe: What is asked.
        before: The `distributions` before the tuning, each (n, vocabulary).
    """
    loss = Completions(model, packed=False, pad_id=0)
    mean, interval = mean_of(log_odds(log_probabilities(loss, probe.odds), probe))
    begun = refusals(model, tokenizer, probe)
    refused, told = sum(begun[: len(probe.refuse)]), sum(begun[len(probe.refuse) :])
    return State(
        log_odds=mean,
        log_odds_interval=interval,
        refusals=refused / len(probe.refuse),
        refusals_interval=wilson(refused, len(probe.refuse)),
        control_refusals=told / len(probe.answer),
        control_refusals_interval=wilson(told, len(probe.answer)),
        kl=divergence(before, distributions(model, probe.controls)),
        loss=held_out_loss(loss, probe.benign) if len(probe.benign) else None,
    )


def log_probabilities(loss: Completions, examples: Sequence[Example]) -> Tensor:  # (n,)
    """The log-probability of the labelled tokens of each example, in fp64."""
    found = torch.zeros(len(examples), dtype=torch.float64)
    with evaluating(loss):
        for group in batches(examples):
            found[group] = -loss.by_row([examples[i] for i in group]).cpu().double()
    return found


def log_odds(scores: Tensor, probe: Probe) -> Tensor:  # (prompts * beginnings,) -> (prompts,)
    """The log-odds of each prompt, from the log-probabilities of the beginnings after it."""
    n = len(probe.refusal)
    by_prompt = scores.view(len(probe.refuse), n + len(probe.compliance))
    return by_prompt[:, :n].logsumexp(1) - by_prompt[:, n:].logsumexp(1)


def mean_of(values: Tensor) -> tuple[float, Interval | None]:  # (n,)
    """The mean, and its 95% interval, or None for a single value. Raises LorafoldError if it is not
    finite.
    """
    mean = values.mean().item()
    if not math.isfinite(mean):
        raise LorafoldError(
            f"log-odds: found {mean}, expected a finite number; check the weights of the model and"
            " its adapters"
        )
    return mean, mean_interval(values.tolist())


def refusals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe
) -> list[bool]:
    """Whether the greedy completion of each prompt begins with a refusal: first of those to be
    refused, then of the controls.

    Args:
        model: A causal language model.
        tokenizer: The model's.
        probe: Has the prompts and the beginnings of a refusal.
    """
    longest = max(len(tokens_of(tokenizer, text)) for text in probe.refusal)
    prompts = [*probe.refuse, *probe.answer]
    texts = complete(model, tokenizer, prompts, longest + LEADING)
    return [begins(text, probe.refusal) for text in texts]


def begins(text: str, beginnings: Sequence[str]) -> bool:
    """Whether a text begins with one of these, after whitespace; case and the kind of apostrophe
    do not matter.
    """
    return plain(text).startswith(tuple(map(plain, beginnings)))


def plain(text: str) -> str:
    """The text as beginnings are compared."""
    return text.lstrip().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold()


def divergence(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:  # each (n, vocabulary)
    """KL(before || after) in nats a token, of log-probabilities."""
    kl = tokens = 0.0
    for p, q in zip(before, after, strict=True):
        kl += (p.exp() * (p - q)).sum().item()
        tokens += len(p)
    return max(kl / tokens, 0.0)


def distributions(model: PreTrainedModel, examples: Sequence[Example]) -> Iterator[Tensor]:
    """The log-probabilities of the next token at the labelled positions, GROUP examples of similar
    length at a time: (n, vocabulary) in fp32 each.
    """
    loss = Completions(model, packed=False, pad_id=0)
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for i in range(0, len(ordered), GROUP):
        inputs = loss.collate(ordered[i : i + GROUP], loss.device)
        chosen = inputs.pop("labels") != NO_LOSS  # (B, T)
        with evaluating(model):
            logits: Tensor = model(**inputs, use_cache=False).logits
        yield logits[chosen].float().log_softmax(-1)
