"""Completions from the engine: `complete` for many prompts, `stream` for one prompt, token by
token.

Prompts are already rendered with the chat template, so no special tokens are added.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafold.core.attach import only, selection_of
from lorafold.data.chat_template import template_of
from lorafold.data.control_tokens import rendered_ids
from lorafold.engine import Ended, Engine, EventStream, Request, Sampling
from lorafold.engine.adapters import delta_parts, deltas_of
from lorafold.errors import LorafoldError
from lorafold.methods.common.virtual_tokens import VirtualTokenDelta
from lorafold.models.positions import positions_of
from lorafold.runtime.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MAX_RUNNING = 32  # prompts computed at a time
GREEDY = Sampling()
ACTIVE = "active"  # the name of the model's active adapters in the engine
FAST_PATH_PASSES = 24  # with at least this many passes, the fast path saves more than its setup


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Returns the completion of each rendered prompt, without special tokens, up to the first of
    the `end_tokens`. `progress(done, total)` is called when completions end.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    completions = complete_tokens(model, ids, max_new_tokens, ends, sampling, progress)
    return [decode(tokenizer, completion) for completion in completions]


def complete_tokens(
    model: "PreTrainedModel",
    ids: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    ends: frozenset[int],
    sampling: Sampling = GREEDY,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, ...]]:
    most = new_token_limits(model, ids, max_new_tokens)
    completions: list[tuple[int, ...]] = [()] * len(ids)
    if not ids or max_new_tokens < 1:
        return completions
    waiting = deque(sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True))
    running: dict[int, EventStream] = {}
    slots = min(len(ids), MAX_RUNNING)
    length = max(len(prompt) + n for prompt, n in zip(ids, most, strict=True))
    passes = max_new_tokens * -(-len(ids) // slots)
    with open_engine(model, None, slots=slots, length=length, passes=passes) as (engine, adapter):
        while waiting or running:
            # several at a time, because prefilling prompts together takes half the time
            free = slots - len(running)
            for _ in range(min(free, len(waiting)) if free >= max(1, slots // 4) else 0):
                i = waiting.popleft()
                request = Request(str(i), ids[i], most[i], adapter, sampling, ends)
                running[i] = engine.submit(request)
            engine.step()
            ended = {i: end for i, events in running.items() if (end := events.ended)}
            for i, end in ended.items():
                completions[i] = _checked(end).tokens
                del running[i]
            if progress and ended:
                progress(len(ids) - len(waiting) - len(running), len(ids))
    return completions


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Generator[str, None, Ended | None]:
    """Yields the text of one completion, in one piece per token (empty while a character is
    incomplete), and the remaining text; returns the `Ended` event. The engine holds the model until
    the end or until the generator is closed.
    """
    ids, ends = prompt_ids(tokenizer, prompt), end_tokens(model, tokenizer)
    if max_new_tokens < 1:
        return None
    [most] = new_token_limits(model, [ids], max_new_tokens)
    length = len(ids) + most
    with open_engine(model, tokenizer, slots=1, length=length, passes=most) as (engine, adapter):
        return (yield from text_pieces(engine, Request("0", ids, most, adapter, sampling, ends)))


@contextmanager
def open_engine(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    slots: int,
    length: int,
    passes: int,
) -> Iterator[tuple[Engine, str | None]]:
    """Yields an engine, and the name under which it registered the model's active adapters, or None
    without adapters. Uses the fast path if about `passes` forward passes justify its setup, and if
    memory suffices to copy the weight matrices.
    """
    active = selection_of(model).names
    nbytes = sum(p.nbytes for p in model.parameters())
    fast = passes >= FAST_PATH_PASSES and 2 * nbytes <= free_bytes(model.device)
    with (
        only(model),
        Engine(model, tokenizer, slots=slots, length=length, fast=fast, beyond=True) as engine,
    ):
        if active:
            engine.adopt(ACTIVE, active)
        yield engine, ACTIVE if active else None


def text_pieces(engine: Engine, request: Request) -> Generator[str, None, Ended]:
    """Yields the text of each token; returns the `Ended` event. Closing the generator cancels the
    request.
    """
    events, read, shown = engine.submit(request), 0, 0
    try:
        while True:
            for event in events.so_far(read):
                read += 1
                text = _checked(event).text[shown:] if isinstance(event, Ended) else event.text
                shown += len(text)
                if text or not isinstance(event, Ended):
                    yield text
            if events.ended:
                return events.ended
            engine.step()
    finally:
        if engine.cancel(request.id):
            engine.run()


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> tuple[int, ...]:
    """Returns the token ids of a rendered prompt, of which there must be at least one."""
    ids = rendered_ids(prompt, tokenizer)
    if not ids:
        raise LorafoldError(f"prompt {prompt!r}: found no tokens, expected at least one")
    return tuple(ids)


def positions_left(model: "PreTrainedModel") -> int | None:
    """Returns the number of positions that virtual tokens leave in the model's position table; None
    without a table.
    """
    active = delta_parts(deltas_of(model, selection_of(model).names))
    before = sum(part.positions for _, part in active if isinstance(part, VirtualTokenDelta))
    return positions_of(model).after(before).table


def new_token_limits(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """Returns the maximum number of new tokens for each prompt; warns if the model's position table
    limits them.
    """
    limit = positions_left(model)
    if limit is None:
        return [max_new_tokens] * len(prompts)
    longest = max(map(len, prompts), default=0)
    if longest >= limit:
        raise LorafoldError(
            f"prompt: found {longest} tokens, expected fewer than the {limit} free positions of"
            f" {type(model).__name__}"
        )
    if longest + max_new_tokens > limit:
        log.warning(
            "max_new_tokens %d: the longest prompt has %d tokens and %s has only %d free positions,"
            " so completions may end earlier",
            max_new_tokens, longest, type(model).__name__, limit,
        )  # fmt: skip
    return [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]


def _checked(ended: Ended) -> Ended:
    if ended.reason == "failed":
        raise LorafoldError(f"a completion can't be computed: {ended.message}")
    return ended


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text = tokenizer.decode([*ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Returns the tokens that end a completion, from the generation config, the tokenizer, and the
    chat template's end of turn.
    """
    named = model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    turn = () if tokenizer.chat_template is None else template_of(tokenizer).ending.tokens
    return frozenset(end for end in (*ends, tokenizer.eos_token_id, *turn) if end is not None)
