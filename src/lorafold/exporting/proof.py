"""Compares an engine's outputs with lorafold's fp32 outputs for the same prompts.

    p = softmax(reference), q = softmax(engine), of the token after each prompt, over the vocabulary
    kl          sum_v p log(p / q) in nats; its mean and its maximum over prompts
    distance    KL from the reference with adapters to the reference without; share = kl / distance
    alone       kl without adapters: the engine's rounding of the base
    changed     KL from the engine with adapters to the engine without; 0 if it ignores the adapter
    tied        prompts for which the engine selects the other of two experts with similar scores

Prompts are rendered and tokenized once, so that all engines get the same tokens. In mixtures of
experts, rounding may decide between the last selected expert and the next expert. With their router
weights w_last and w_next, a hidden state h and a difference g of their logits,

    h + (1 + e) g (w_next - w_last) / |w_next - w_last|^2      selects the next expert

The model runs again with one such hidden state changed. If its output then equals the engine's, the
engine differs only in the selected expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafold.core.attach import only
from lorafold.data.formats import PROMPTS
from lorafold.data.render import ensure_chat_template, prompt_of
from lorafold.data.rows import read_rows
from lorafold.engine.kv_cache import common_length
from lorafold.errors import LorafoldError
from lorafold.exporting.target import Job, Progress, Subject
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.templates import render_text
from lorafold.generation import complete_tokens, end_tokens, prompt_ids
from lorafold.merging.merge_target import Distance
from lorafold.merging.run import load_adapted

BUILT_IN_PROMPTS = Path(__file__).with_name("prompts.jsonl")
GREEDY_TOKENS = 16  # tokens of a greedy text
ROUTER = "TopKRouter"  # suffix of transformers' routers, which return logits, scores, experts
TokenIds = tuple[tuple[int, ...], ...]  # one text after another
NEAR_TIE = 0.02  # difference of logits; a larger one is not due to rounding


@dataclass(frozen=True)
class ProofPrompts:
    texts: tuple[str, ...]
    ids: TokenIds
    chats: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities (prompts, vocabulary) in fp32 with and without adapters, and the tokens of
    greedy completions.
    """

    adapted: Tensor
    base: Tensor
    greedy: TokenIds


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, source: str | Path | None = None
) -> ProofPrompts:
    ensure_chat_template(tokenizer)
    rows = read_rows(str(source or BUILT_IN_PROMPTS), content=PROMPTS)
    if not rows.provides(PROMPTS):
        raise LorafoldError(
            f"--prompts {source}: found rows of plain text, expected rows with prompts or"
            ' conversations, such as {"prompt": ...}'
        )
    conversations = rows.extract(PROMPTS)
    texts = tuple(prompt_of(chat, tokenizer) for chat in conversations)
    chats = tuple({"messages": chat.messages, "tools": chat.tools} for chat in conversations)
    return ProofPrompts(texts, tuple(prompt_ids(tokenizer, text) for text in texts), chats)


@torch.inference_mode()
def last_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The log-probabilities (vocabulary,) of the next token, in fp32 on the CPU."""
    outputs = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return outputs.logits[0, -1].float().log_softmax(-1).cpu()


def swap_close_experts(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[Tensor]:
    """Yields log-probabilities (vocabulary,) with the last selected expert of one token replaced by
    the next expert, for the four smallest score differences. The model's weights are not changed.
    """
    close: list[tuple[float, nn.Module, int, Tensor]] = []
    routers = [m for m in model.modules() if type(m).__name__.endswith(ROUTER)]
    with ExitStack() as hooks:
        for router in routers:
            hooks.enter_context(router.register_forward_hook(partial(_note_near_ties, close)))
        if routers:
            last_logprobs(model, ids)
    for _, router, at, step in sorted(close, key=itemgetter(0))[:4]:
        with router.register_forward_pre_hook(partial(_shift_hidden, at, step)):
            answer = last_logprobs(model, ids)
        yield answer


def _note_near_ties(
    close: list[tuple[float, nn.Module, int, Tensor]], router: nn.Module, _: Any, out: Any
) -> None:
    """A hook that notes tokens with two close experts, and the change of h that exchanges them."""
    logits, experts = out[0].flatten(0, -2), out[-1].flatten(0, -2)
    num_selected = experts.shape[-1]
    if num_selected >= logits.shape[-1]:
        return
    values, order = logits.float().topk(num_selected + 1, -1)
    gaps = values[:, -2] - values[:, -1]
    weight: Any = router.weight
    for at in (gaps < NEAR_TIE).nonzero().flatten().tolist():
        direction = (weight[order[at, -1]] - weight[order[at, -2]]).float()
        # a factor of 1.0 would make the two equal
        step = 1.5 * gaps[at] * direction / (direction @ direction)
        close.append((float(gaps[at]), router, at, step))


def _shift_hidden(at: int, step: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = inputs[0].clone()
    hidden.view(-1, hidden.shape[-1])[at] += step.to(hidden.dtype)
    return (hidden, *inputs[1:])


def answers_on(subject: Subject, storage: str, source: str | Path | None) -> Tensor:
    """Log-probabilities (prompts, vocabulary) with another quantization of the base, in fp32."""
    model = load_adapted(subject.base, subject.adapters, storage)
    prompts = prompts_of(subject.tokenizer, source).ids
    return torch.stack([last_logprobs(model, ids) for ids in prompts])


@dataclass(frozen=True)
class ReferenceAnswers:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: ProofPrompts
    answers: Answers

    @classmethod
    def of(
        cls, subject: Subject, source: str | Path | None, progress: Progress
    ) -> ReferenceAnswers:
        """Loads base and adapters in the quantization of the export, and computes answers."""
        tokenizer = subject.tokenizer
        prompts = prompts_of(tokenizer, source)
        model = load_adapted(subject.base, subject.adapters, subject.training_storage)
        with_, without, total = list[Tensor](), list[Tensor](), 2 * len(prompts.ids)
        for ids in prompts.ids:
            with_.append(last_logprobs(model, ids))
            with only(model):
                without.append(last_logprobs(model, ids))
            progress(len(with_), total)
        greedy = complete_tokens(
            model, prompts.ids, GREEDY_TOKENS, end_tokens(model, tokenizer),
            progress=lambda done, of: progress(len(with_) + done, total),
        )  # fmt: skip
        answers = Answers(torch.stack(with_), torch.stack(without), tuple(greedy))
        return cls(model, tokenizer, prompts, answers)

    def first(self, n: int) -> ReferenceAnswers:
        prompts = ProofPrompts(*(column[:n] for column in vars(self.prompts).values()))
        answers = Answers(*(column[:n] for column in vars(self.answers).values()))
        return replace(self, prompts=prompts, answers=answers)

    def job(self, needs: Job, directory: Path) -> dict[str, Any]:
        """The job for an engine's program; `{out}` is replaced by the directory."""
        placed = {
            key: value.replace("{out}", str(directory)) if isinstance(value, str) else value
            for key, value in needs.items()
        }
        ends = sorted(end_tokens(self.model, self.tokenizer))
        return {**asdict(self.prompts), "greedy": GREEDY_TOKENS, "ends": ends, **placed}

    def exchanged_experts(self, prompt: int) -> Iterator[Tensor]:
        """Yields log-probabilities (vocabulary,) for a prompt with two close experts exchanged."""
        return swap_close_experts(self.model, self.prompts.ids[prompt])

    def margin(self, prompt: int, at: int) -> float:
        """The difference of the two largest log-probabilities after `at` greedy tokens."""
        ids = [*self.prompts.ids[prompt], *self.answers.greedy[prompt][:at]]
        first, second = last_logprobs(self.model, ids).topk(2).values
        return float(first - second)


FAR, MIN_FAR = 10, 1e-6  # KL that suggests exchanged experts: times the median, in nats
NUM_LIKELY = 20  # tokens whose log-probabilities are compared


@dataclass(frozen=True)
class EngineAnswers:
    """An engine's outputs. `base` may cover only the first prompts and is None for a merged model;
    `unused` lists tensors that the engine did not load, if it reports them.
    """

    adapted: Tensor
    base: Tensor | None
    greedy: TokenIds
    engine: str
    version: str
    unused: tuple[str, ...] = ()
    other_tokens: tuple[int, ...] = ()  # prompts that it tokenizes differently
    other_texts: tuple[int, ...] = ()  # prompts that its own template renders differently


@dataclass(frozen=True)
class Proof(ShownInNotebooks):
    """The figures of a comparison, defined at the top of this module. `top` is the number of
    prompts with the same most likely token, `greedy` the number of equal greedy completions, `near`
    the number of completions that first differ at two tokens with similar scores, `gap` the largest
    difference in log-probability, and `measured` the mean KL without exchanged experts.
    """

    engine: str
    version: str
    prompts: int
    kl: float
    kl_largest: float
    distance: float
    changed: float | None
    alone: float | None
    tied: int
    measured: float
    top: int
    gap: float
    greedy: int
    near: int
    unused: tuple[str, ...]
    other_tokens: tuple[int, ...]
    other_texts: tuple[int, ...]

    @property
    def share(self) -> float | None:
        """The lost share of the adapters' effect; None if they have no effect."""
        return self.kl / self.distance if self.distance else None

    @property
    def rounding(self) -> bool:
        """Whether KL with adapters is at most twice KL without, so that rounding explains it."""
        return self.alone is not None and self.kl <= 2 * self.alone

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        return render_text("exporting/proof.jinja", proof=self)


def compare(
    reference: Answers,
    engine: EngineAnswers,
    margin: Callable[[int, int], float],
    exchanged_experts: Callable[[int], Iterable[Tensor]] = lambda prompt: (),
) -> Proof:
    """Compares an engine's outputs with the reference. `exchanged_experts` yields log-probabilities
    (vocabulary,) of a prompt for other experts.
    """
    if engine.adapted.isnan().any():
        raise LorafoldError(f"{engine.engine} {engine.version}: the logits of a prompt contain NaN")
    adapted, bare = engine.adapted.double().log_softmax(-1), engine.base
    size = min(adapted.shape[-1], reference.adapted.shape[-1])
    kls = kl_divergences(reference.adapted, adapted)
    measured, far, tied = float(kls.mean()), max(FAR * float(kls.median()), MIN_FAR), []
    for n in (kls > far).nonzero().flatten().tolist():
        others = (kl_divergences(row[None], adapted[n : n + 1])[0] for row in exchanged_experts(n))
        if (kl := next((kl for kl in others if kl <= far), None)) is not None:
            kls[n] = kl
            tied.append(n)
    likely = reference.adapted.topk(NUM_LIKELY).indices.clamp_max(size - 1)
    gaps = reference.adapted.gather(1, likely).double() - adapted.gather(1, likely)
    gaps[tied] = 0
    gap = float(gaps.abs().max())
    pairs = [*zip(reference.greedy, engine.greedy, strict=True)]
    differing = {n: common_length(a, b) for n, (a, b) in enumerate(pairs) if a != b}
    changed, alone = (
        None if bare is None else float(kl_divergences(rows[: len(bare)], bare).mean())
        for rows in (adapted, reference.base)
    )
    same = ("engine", "version", "unused", "other_tokens", "other_texts")
    return Proof(
        **{name: getattr(engine, name) for name in same},
        prompts=len(kls),
        kl=float(kls.mean()),
        kl_largest=float(kls.max()),
        distance=float(kl_divergences(reference.adapted, reference.base).mean()),
        changed=changed,
        alone=alone,
        tied=len(tied),
        measured=measured,
        top=int((reference.adapted.argmax(-1) == adapted.argmax(-1)).sum()),
        gap=gap,
        greedy=len(pairs) - len(differing),
        near=sum(margin(n, at) <= 2 * gap for n, at in differing.items()),
    )


def kl_divergences(p: Tensor, q: Tensor) -> Tensor:  # (prompts, vocabulary), both -> (prompts,)
    """KL(p, q) of each row, from log-probabilities, over the common vocabulary."""
    size = min(p.shape[-1], q.shape[-1])
    p, q = (side[:, :size].double().log_softmax(-1) for side in (p, q))
    return (p.exp() * (p - q)).where(p.isfinite() & q.isfinite(), 0).sum(-1).clamp_min(0)


def mean_distance(p: Tensor, q: Tensor) -> Distance:  # (prompts, vocabulary), both
    """The mean KL and the top-1 agreement of two distributions, from log-probabilities."""
    size = min(p.shape[-1], q.shape[-1])
    same = p[:, :size].argmax(-1) == q[:, :size].argmax(-1)
    return Distance(float(kl_divergences(p, q).mean()), float(same.double().mean()))
