"""Completions of a causal language model: `complete` for many prompts (greedy, in batches),
`stream` for one prompt (token by token).

Prompts are texts that the chat template rendered, so no special tokens are added. `complete` starts
with the longest prompts, in batches of similar length, padded on the left. It calls transformers'
own `generate` for a few tokens at a time and passes the cache on; completions that have ended leave
the batch in between, so that a long one does not keep the others computing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.core.evaluating import evaluating
from lorafold.data.render import render
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache
    from transformers.generation.utils import GenerateDecoderOnlyOutput

BATCH = 32  # prompts
ROUND = 8  # tokens of each call, after which completions that have ended leave the batch


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The greedy completion of each prompt, in their order, without special tokens. A completion
    ends before the first of the `end_tokens`.

    Args:
        model, tokenizer: A causal language model, with any adapters.
        prompts: Texts as the chat template rendered them.
        max_new_tokens: The most tokens of a completion.
        batch_size: Prompts computed at a time; None takes BATCH.
        progress: Called as progress(done, total) after each batch.

    Raises LorafoldError for a prompt without tokens.
    """
    ids = [_tokenize(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    completions = [""] * len(ids)
    with _greedy(model, tokenizer, end_tokens(model, tokenizer)):
        for at in range(0, len(order), batch_size or BATCH):
            batch = order[at : at + (batch_size or BATCH)]
            for i, tokens in zip(
                batch, _complete_batch(model, [ids[i] for i in batch], max_new_tokens), strict=True
            ):
                completions[i] = _text(tokenizer, tokens)
            if progress:
                progress(at + len(batch), len(ids))
    return completions


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """The pieces of one completion, one for each token; a piece is empty while a character is
    incomplete.

    Args:
        model, tokenizer: A causal language model, with any adapters.
        prompt: A text as the chat template rendered it.
        max_new_tokens: The most tokens of the completion.
        temperature: 0 takes the most likely token; above 0 tokens are sampled.
        seed: The samples follow from it; torch's global state is left as it was.

    Raises LorafoldError for a negative temperature and for a prompt without tokens.
    """
    if temperature < 0:
        raise LorafoldError(f"temperature: found {temperature}, expected 0 or more")
    generator = torch.Generator(model.device).manual_seed(seed)
    ids_1T, cache = torch.tensor([_tokenize(tokenizer, prompt)], device=model.device), None
    completion: list[int] = []
    shown, stops = "", end_tokens(model, tokenizer)
    for _ in range(max_new_tokens):
        with _greedy(model, tokenizer, stops):
            step = _decode(model, ids_1T, torch.ones_like(ids_1T), cache, 1)
        assert step.logits is not None
        cache, logits_1V = step.cache, step.logits[0].float()
        if temperature:
            token_11 = torch.multinomial(
                torch.softmax(logits_1V / temperature, -1), 1, generator=generator
            )
        else:
            token_11 = logits_1V.argmax(-1, keepdim=True)
        completion.append(int(token_11))
        if completion[-1] in stops:
            completion.pop()
            break
        ids_1T = torch.cat([ids_1T, token_11], 1)
        text = _text(tokenizer, completion)
        piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(shown) :]
        shown += piece
        yield piece
    if rest := _text(tokenizer, completion)[len(shown) :]:  # it ended within a character
        yield rest


def _tokenize(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise LorafoldError(f"prompt {prompt!r}: found no tokens, expected at least one")
    return ids


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokens that end a completion: those of the generation config and the tokenizer, and the
    special token with which the chat template ends a turn.
    """
    named = model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [named]
    return {end for end in (*ends, tokenizer.eos_token_id, _turn_end(tokenizer)) if end is not None}


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token with which the chat template ends a turn, or None."""
    if tokenizer.chat_template is None:
        return None
    word = "answer"
    try:
        text = render(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": word}],
            tokenizer,
        )
    except LorafoldError:  # the template does not accept such a conversation
        return None
    after = tokenizer(text.rpartition(word)[2], add_special_tokens=False).input_ids[:1]
    added = tokenizer.added_tokens_decoder
    return next((int(i) for i in after if i in added and added[i].special), None)


@contextmanager
def _greedy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stops: set[int]
) -> Iterator[None]:
    """A context with the model in evaluation mode, decoding greedily up to the end tokens instead
    of by its own generation config.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    padding = next(
        (token for token in (tokenizer.pad_token_id, *sorted(stops)) if token is not None), 0
    )
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=padding
    )
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own


def _decode(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, cache: "Cache | None", n: int
) -> "GenerateDecoderOnlyOutput":
    """At most n more tokens for each sequence; `cache` has all of `ids_BT` but the last token."""
    return model.generate(
        ids_BT,
        attention_mask=mask_BT,
        cache=cache,
        max_new_tokens=n,
        return_dict_in_generate=True,
        output_logits=n == 1,
    )


def _complete_batch(
    model: "PreTrainedModel", prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The new tokens of each prompt, before its end token."""
    config = model.generation_config
    stops = torch.tensor(config.eos_token_id or [], dtype=torch.long, device=model.device)
    width = max(map(len, prompts))
    ids_BT = torch.tensor(
        [[config.pad_token_id] * (width - len(ids)) + ids for ids in prompts], device=model.device
    )
    mask_BT = torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device
    )
    # sequences can't be removed from a recurrent state: such models decode in one call
    per_round = max_new_tokens if model._is_stateful else ROUND
    completions: list[list[int]] = [[] for _ in prompts]
    left, cache = torch.arange(len(prompts), device=model.device), None
    for start in range(0, max_new_tokens, per_round):
        step = _decode(model, ids_BT, mask_BT, cache, min(per_round, max_new_tokens - start))
        new_BN = step.sequences[:, ids_BT.shape[1] :]
        ended_BN = torch.isin(new_BN, stops).cumsum(1) > 0
        for i, tokens, ended in zip(left.tolist(), new_BN, ended_BN, strict=True):
            completions[i] += tokens[~ended].tolist()
        keep = (~ended_BN[:, -1]).nonzero()[:, 0]
        if not len(keep):
            break
        left, cache = left[keep], step.cache
        ids_BT, mask_BT = (
            step.sequences[keep],
            torch.cat([mask_BT, torch.ones_like(new_BN)], 1)[keep],
        )
        if cache is not None and len(keep) < len(new_BN):
            cache.batch_select_indices(keep)
    return completions
