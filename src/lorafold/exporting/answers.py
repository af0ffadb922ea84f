"""What a model answers to the proof's prompts: the distribution of the next token, and a greedy
text.

Prompts are rendered with the chat template and tokenized once, so that an engine is compared on the
same tokens; whether its own tokenizer makes the same of the texts is a question of its own.

`exchanged` finds tokens whose last selected expert and the next one score almost the same, so that
rounding decides between them. With router weights w and hidden state h,

    h + (1 + e) g (w_next - w_last) / |w_next - w_last|^2      selects the next expert, g the gap

The model runs again with one such state moved; if its answer is then the engine's, the engine
differs in that choice only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafold.core.attach import only
from lorafold.data.render import ensure_chat_template, prompt_of
from lorafold.data.rows import read_rows
from lorafold.data.shapes import PROMPTS
from lorafold.errors import LorafoldError
from lorafold.exporting.target import Progress, Subject
from lorafold.generation import complete_tokens, end_tokens, tokens_of
from lorafold.merging.run import adapted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN = Path(__file__).with_name("prompts.jsonl")
GREEDY = 16  # tokens of a greedy text
ROUTER = "TopKRouter"  # ends the names of transformers' routers, which give logits, scores, experts
CLOSE = 0.02  # of logits; a larger difference is no rounding
TRIED = 4
PAST = 1.5  # how far a state is moved, of what makes the two equal


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts, their tokens, and the chats that they are of, as a server takes them."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    chats: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Answers:
    """Of each prompt: `adapted` and `base` (prompts, vocabulary) are the log-probabilities of the
    next token in fp32, with and without adapters; `greedy` are the most likely tokens.
    """

    adapted: Tensor
    base: Tensor
    greedy: tuple[tuple[int, ...], ...]


def prompts_of(tokenizer: PreTrainedTokenizerBase, source: str | Path | None = None) -> Prompts:
    """The prompts, as the chat template renders them for a completion.

    Raises LorafoldError for rows that are no prompts.

    Args:
        tokenizer: gets a plain chat template if it has none.
        source: a file of rows with prompts; None takes the built-in ones.
    """
    ensure_chat_template(tokenizer)
    rows = read_rows(str(source or BUILT_IN), wanted=PROMPTS)
    if not rows.give(PROMPTS):
        raise LorafoldError(
            f"--prompts {source}: found rows of text, which ask nothing; expected rows with prompts"
            ' or conversations, such as {"prompt": ...}'
        )
    given = rows.given(PROMPTS)
    texts = tuple(prompt_of(one, tokenizer) for one in given)
    chats = tuple({"messages": one.messages, "tools": one.tools} for one in given)
    return Prompts(texts, tuple(tokens_of(tokenizer, text) for text in texts), chats)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, progress: Progress
) -> Answers:
    """What a model in fp32 with active adapters answers, with them and without.

    Args:
        progress: called as progress(done, total) after each prompt.
    """
    adapted, base, total = [], [], 2 * len(prompts.ids)
    for ids in prompts.ids:
        adapted.append(last(model, ids))
        with only(model):
            base.append(last(model, ids))
        progress(len(adapted), total)
    greedy = complete_tokens(
        model, prompts.ids, GREEDY, end_tokens(model, tokenizer),
        progress=lambda done, of: progress(len(adapted) + done, total),
    )  # fmt: skip
    return Answers(torch.stack(adapted), torch.stack(base), tuple(greedy))


@torch.inference_mode()
def last(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The log-probabilities (vocabulary,) of the token that follows these, in fp32 on the CPU."""
    given = torch.tensor([ids], device=model.device)
    logits = model(input_ids=given, use_cache=False).logits[0, -1]
    return logits.float().log_softmax(-1).cpu()


def exchanged(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[Tensor]:
    """Yield the answers of a model with active adapters (vocabulary,) where one token has the next
    expert in place of its last, that with the smallest difference of the two first. Between them
    the model is as it was, however many are taken.
    """
    found: list[tuple[float, nn.Module, int, Tensor]] = []
    routers = [m for m in model.modules() if type(m).__name__.endswith(ROUTER)]
    with ExitStack() as hooks:
        for router in routers:
            hooks.callback(router.register_forward_hook(partial(_note, found)).remove)
        if routers:
            last(model, ids)
    for _, router, at, step in sorted(found, key=lambda one: one[0])[:TRIED]:
        handle = router.register_forward_pre_hook(partial(_moved, at, step))
        try:
            moved = last(model, ids)
        finally:
            handle.remove()
        yield moved


def _note(
    found: list[tuple[float, nn.Module, int, Tensor]], router: nn.Module, _: Any, out: Any
) -> None:
    """Note the tokens with two experts that are close, and what exchanges them."""
    logits, experts = out[0].flatten(0, -2), out[-1].flatten(0, -2)
    taken = experts.shape[-1]
    if taken >= logits.shape[-1]:
        return
    values, order = logits.float().topk(taken + 1, -1)
    gaps = values[:, -2] - values[:, -1]
    weight: Any = router.weight
    for at in (gaps < CLOSE).nonzero().flatten().tolist():
        way = (weight[order[at, -1]] - weight[order[at, -2]]).float()
        found.append((float(gaps[at]), router, at, PAST * gaps[at] * way / (way @ way)))


def _moved(at: int, step: Tensor, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = given[0].clone()
    hidden.view(-1, hidden.shape[-1])[at] += step.to(hidden.dtype)
    return (hidden, *given[1:])


def answered(subject: Subject, storage: str, source: str | Path | None) -> Tensor:
    """The log-probabilities (prompts, vocabulary) after each prompt of what is exported, over
    another storage of its base, computed in fp32.
    """
    model = adapted(subject.base, subject.adapters, storage)
    return torch.stack([last(model, ids) for ids in prompts_of(subject.tokenizer, source).ids])


@dataclass(frozen=True)
class Ours:
    """A loaded model with active adapters, its prompts, and its answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    answers: Answers

    @classmethod
    def of(cls, subject: Subject, source: str | Path | None, progress: Progress) -> Ours:
        """Load what is exported, over the weights that its files are for, and ask it.

        Args:
            source: a file of rows with prompts; None takes the built-in ones.
        """
        tokenizer = subject.tokenizer
        prompts = prompts_of(tokenizer, source)
        model = adapted(subject.base, subject.adapters, subject.stored)
        return cls(model, tokenizer, prompts, answers(model, tokenizer, prompts, progress))

    def first(self, n: int) -> Ours:
        """The same of the first n prompts."""
        asked = self.prompts
        prompts = Prompts(asked.texts[:n], asked.ids[:n], asked.chats[:n])
        found = self.answers
        few = Answers(found.adapted[:n], found.base[:n], found.greedy[:n])
        return replace(self, prompts=prompts, answers=few)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a completion."""
        return end_tokens(self.model, self.tokenizer)

    def job(self, own: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """The job of an engine's program.

        Args:
            own: what the target's engine needs, {out} for the directory.
            directory: where the files are for now.
        """
        placed = {
            key: value.replace("{out}", str(directory)) if isinstance(value, str) else value
            for key, value in own.items()
        }
        asked = {"ids": self.prompts.ids, "texts": self.prompts.texts, "greedy": GREEDY,
                 "chats": self.prompts.chats}  # fmt: skip
        return {**asked, "ends": sorted(self.ends), **placed}

    def exchanged(self, prompt: int) -> Iterator[Tensor]:
        """Yield answers (vocabulary,) with two close experts exchanged (`ties.exchanged`)."""
        return exchanged(self.model, self.prompts.ids[prompt])

    def margin(self, prompt: int, at: int) -> float:
        """The difference of the two largest log-probabilities after so many greedy tokens."""
        ids = [*self.prompts.ids[prompt], *self.answers.greedy[prompt][:at]]
        first, second = last(self.model, ids).topk(2).values
        return float(first - second)
