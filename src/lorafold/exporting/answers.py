"""What a model answers to the proof's prompts: the distribution of the next token, and a greedy
text.

Prompts are rendered with the chat template and tokenized once, so that an engine is compared on the
same tokens; whether its own tokenizer makes the same of the texts is a question of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.core.attach import only
from lorafold.data.render import ensure_chat_template, prompt_of
from lorafold.data.rows import read_rows
from lorafold.data.shapes import PROMPTS
from lorafold.errors import LorafoldError
from lorafold.exporting.target import Progress
from lorafold.generation import complete_tokens, end_tokens, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN = Path(__file__).with_name("prompts.jsonl")
GREEDY = 16  # tokens of a greedy text


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
