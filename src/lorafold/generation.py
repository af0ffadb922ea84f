"""Completions of a causal language model: `complete` for many prompts, `stream` for one, token by
token.

    with engine_of(model, ...) as (engine, adapter):    an engine, and what is active on the model
        pieces(engine, Request(...))                    the text of one request as it comes

Prompts are texts that the chat template rendered, so no special tokens are added. Both run on the
engine (`lorafold.engine`), where completions that have ended make room for prompts that wait.
`complete` begins with the longest prompts, so that those that run together are of similar length.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafold.core.attach import only, selection_of
from lorafold.data.control_tokens import ids_of
from lorafold.data.templates import template_of
from lorafold.engine import Ended, Engine, EventStream, Request, Sampling
from lorafold.engine.adapters import attached, parts_of
from lorafold.errors import LorafoldError
from lorafold.methods.parts.virtual_tokens import Sender
from lorafold.models.positions import positions_of
from lorafold.runtime.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
BATCH = 32  # prompts that are computed at a time
GREEDY = Sampling()
ACTIVE = "active"  # what is active on the model, as the engine knows it
# passes after which the engine's faster parts have paid for the 0.15 s that SmolLM2's take to make
PAYS = 24


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The completion of each prompt, in their order, without special tokens. A completion ends
    before the first of the `end_tokens`.
    """
    ids = [tokens_of(tokenizer, prompt) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    made = complete_tokens(model, ids, max_new_tokens, ends, sampling, progress)
    return [text_of(tokenizer, one) for one in made]


def complete_tokens(
    model: "PreTrainedModel",
    ids: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    ends: frozenset[int],
    sampling: Sampling = GREEDY,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, ...]]:
    """The tokens of the completion of each prompt, in their order, as `complete` makes them."""
    most = room_of(model, ids, max_new_tokens)
    completions: list[tuple[int, ...]] = [()] * len(ids)
    if not ids or max_new_tokens < 1:
        return completions
    waiting = deque(sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True))
    running: dict[int, EventStream] = {}
    slots = min(len(ids), BATCH)
    length = max(len(prompt) + n for prompt, n in zip(ids, most, strict=True))
    passes = max_new_tokens * -(-len(ids) // slots)
    with engine_of(model, None, slots=slots, length=length, passes=passes) as (engine, adapter):
        while waiting or running:
            # prompts are read some at a time: on SmolLM2 in bf16, 8 of 30 tokens take 0.17 s, and
            # 0.37 s one by one
            free = slots - len(running)
            for _ in range(min(free, len(waiting)) if free >= max(1, slots // 4) else 0):
                i = waiting.popleft()
                request = Request(str(i), ids[i], most[i], adapter, sampling, ends)
                running[i] = engine.submit(request)
            engine.step()
            ended = {i: found for i, events in running.items() if (found := events.ended)}
            for i, found in ended.items():
                completions[i] = _sound(found).tokens
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
    """The pieces of one completion, one for each token, and the rest of one that ends within a
    character; a piece is empty while a character is incomplete. It returns the end, with the tokens
    that were generated. The model is the engine's until then, or until the iterator is closed.
    """
    ids, ends = tokens_of(tokenizer, prompt), end_tokens(model, tokenizer)
    if max_new_tokens < 1:
        return None
    [most] = room_of(model, [ids], max_new_tokens)
    length = len(ids) + most
    with engine_of(model, tokenizer, slots=1, length=length, passes=most) as opened:
        engine, adapter = opened
        request = Request("0", ids, most, adapter, sampling, ends)
        return (yield from pieces(engine, request))


@contextmanager
def engine_of(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    slots: int,
    length: int,
    passes: int,
) -> Iterator[tuple[Engine, str | None]]:
    """An engine, and the name under which it knows what is active on the model (None: nothing is).
    """
    active = selection_of(model).names
    nbytes = sum(p.nbytes for p in model.parameters())
    fast = passes >= PAYS and 2 * nbytes <= free_bytes(model.device)
    with (
        only(model),
        Engine(model, tokenizer, slots=slots, length=length, fast=fast, beyond=True) as engine,
    ):
        if active:
            engine.adopt(ACTIVE, active)
        yield engine, ACTIVE if active else None


def pieces(engine: Engine, request: Request) -> Generator[str, None, Ended]:
    """What each token adds to the text of a request, and the rest of it, if it ends within a
    character; then it returns the end. Closing the iterator cancels the request.
    """
    events, read, shown = engine.submit(request), 0, 0
    try:
        while True:
            for event in events.so_far(read):
                read += 1
                text = _sound(event).text[shown:] if isinstance(event, Ended) else event.text
                shown += len(text)
                if text or not isinstance(event, Ended):
                    yield text
            if events.ended:
                return events.ended
            engine.step()
    finally:
        if engine.cancel(request.id):
            engine.run()


def tokens_of(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> tuple[int, ...]:
    """The ids of a rendered prompt."""
    ids = ids_of(prompt, tokenizer)
    if not ids:
        raise LorafoldError(f"prompt {prompt!r}: found no tokens, expected at least one")
    return tuple(ids)


def table_left(model: "PreTrainedModel") -> int | None:
    """The positions that a table of the model has for a row, after the virtual tokens of what is
    active on it; None if it has no table.
    """
    active = parts_of(attached(model, selection_of(model).names))
    before = sum(part.positions for _, part in active if isinstance(part, Sender))
    return positions_of(model).after(before).table


def room_of(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """The most tokens of each prompt's completion: those that were asked for, or those that a table
    of positions leaves, which is told.
    """
    limit = table_left(model)
    if limit is None:
        return [max_new_tokens] * len(prompts)
    longest = max(map(len, prompts), default=0)
    if longest >= limit:
        raise LorafoldError(
            f"prompt: found {longest} tokens, expected fewer than the {limit} positions of"
            f" {type(model).__name__}"
        )
    if longest + max_new_tokens > limit:
        log.warning(
            "max_new_tokens %d: the longest prompt has %d tokens and %s %d positions, so"
            " completions end there at the latest",
            max_new_tokens, longest, type(model).__name__, limit,
        )  # fmt: skip
    return [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]


def _sound(ended: Ended) -> Ended:
    """The end of a request that did not fail."""
    if ended.reason == "failed":
        raise LorafoldError(f"a completion can't be computed: {ended.message}")
    return ended


def text_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of the tokens of a completion, without special ones."""
    text = tokenizer.decode([*ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that end a completion: those of the generation config and the tokenizer, and
    those with which the chat template ends a turn.
    """
    named = model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    turn = () if tokenizer.chat_template is None else template_of(tokenizer).ending.tokens
    return frozenset(end for end in (*ends, tokenizer.eos_token_id, *turn) if end is not None)
