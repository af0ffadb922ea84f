"""What is refused before any work is done, in one line that says everything that is wrong."""

from __future__ import annotations

from collections.abc import Container

from lorafold.engine.request import Request
from lorafold.errors import LorafoldError


def check(
    request: Request,
    *,
    length: int,
    vocabulary: int,
    running: Container[str],
    texts: bool,
    solo: str,
) -> None:
    """Raise LorafoldError for a request that can't be computed.

    Args:
        length: the most tokens of prompt and completion.
        vocabulary: the number of tokens that the model knows.
        running: the ids of the requests that wait or run.
        texts: whether the engine has a tokenizer.
        solo: why requests run one at a time, empty if they share passes.
    """
    prompt, n, sampling = request.prompt, request.max_new_tokens, request.sampling
    wrong = []
    if request.id in running:
        wrong.append(f"id: found {request.id!r}, which is running, expected another")
    if not prompt:
        wrong.append("prompt: found no tokens, expected at least one")
    k = request.prompt_logprobs
    if n < (1 if k is None else 0):
        wrong.append(f"max_new_tokens: found {n}, expected 1 or more, or 0 with prompt_logprobs")
    elif len(prompt) + n > length:
        wrong.append(
            f"prompt and max_new_tokens: found {len(prompt)} + {n} tokens, expected at most"
            f" {length}"
        )
    for name, ids in {"prompt": prompt, "logit_bias": tuple(sampling.logit_bias)}.items():
        outside = [i for i in ids if not (isinstance(i, int) and 0 <= i < vocabulary)]
        if outside:
            wrong.append(f"{name}: found token {outside[0]!r}, expected 0 to {vocabulary - 1}")
    if k is not None and not 0 <= k <= 20:
        wrong.append(f"prompt_logprobs: found {k}, expected 0 to 20, or None")
    if k is not None and solo:
        wrong.append(f"prompt_logprobs: found {k}, expected None for this model, since {solo}")
    if sampling.stop and not texts:
        wrong.append("stop: found a text, expected none, since the engine has no tokenizer")
    if wrong:
        raise LorafoldError("; ".join(wrong))
