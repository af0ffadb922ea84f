"""What the choice of the next token of one request follows from, beside its logits.

Logits that are not finite raise `NotFinite`, and a grammar that admits nothing `Unfit`, which end
that request alone. `lorafold.engine.choosing` has the choice itself, for many rows at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafold.engine.request import Sampling
from lorafold.errors import LorafoldError, cut

# the tokens so far -> the tokens that may follow, boolean (V,), or None for any
Allowed = Callable[[Sequence[int]], Tensor | None]
NOT_FINITE = "the model's logits hold NaN or infinity"


class NotFinite(LorafoldError):
    """A request's logits hold NaN or infinity."""


class Unfit(LorafoldError):
    """The grammar that a request asks for admits no further token, or grew beyond its limits.

    Args:
        setting: the setting that asks for it.
        why: what became of it, which may have texts of the request.
    """

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"{setting}: a completion can't go on under it ({cut(why, 300)})")
        self.setting = setting


class Choice(NamedTuple):
    """A token, its log probability, those of the most likely tokens, and its own in the
    distribution that it was drawn from, if asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    drawn_logprob: float | None = None


class Sampler:
    """The settings of one request and the tokens that it has.

    Args:
        prompt: the prompt's tokens, for the repetition penalty.
        allowed: which tokens may follow, for structured output; None: any.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], allowed: Allowed | None = None
    ) -> None:
        self.sampling, self.allowed = sampling, allowed
        self.plain = sampling.plain and allowed is None
        self.tokens: list[int] = []
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else set()

    def change_(self, logits_V: Tensor) -> None:
        """Apply penalties, biases and the grammar in place. Raises Unfit.

        Args:
            logits_V: finite ones, in fp32, on the CPU.
        """
        changed_V = self._penalized(logits_V)
        if self.allowed is not None and (mask_V := self.allowed(self.tokens)) is not None:
            # a grammar knows nothing of an adapter's new tokens, so that none of them may follow
            mask_V = pad(mask_V, (0, len(changed_V) - len(mask_V)))
            if not mask_V.any():
                raise Unfit((self.sampling.grammar or ("grammar", ""))[0], "no token may follow")
            changed_V = changed_V.masked_fill(~mask_V, float("-inf"))
        if changed_V is not logits_V:
            logits_V.copy_(changed_V)

    def record(self, token: int) -> None:
        """Count a token of the completion."""
        self.tokens.append(token)

    def _penalized(self, logits_V: Tensor) -> Tensor:
        own = self.sampling
        if own.repetition_penalty != 1:
            ids = torch.tensor(sorted(self.seen | set(self.tokens)))
            found = logits_V[ids]
            rate = own.repetition_penalty
            logits_V = logits_V.index_copy(
                0, ids, finite(torch.where(found > 0, found / rate, found * rate))
            )
        if (own.presence_penalty or own.frequency_penalty) and self.tokens:
            counts = Counter(self.tokens)
            ids, n = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
            down = own.presence_penalty + own.frequency_penalty * n
            logits_V = finite(logits_V.index_add(0, ids, -finite(down.float())))
        if own.logit_bias:
            ids = torch.tensor(list(own.logit_bias))
            biases = torch.tensor([*map(float, own.logit_bias.values())])
            logits_V = finite(logits_V.index_add(0, ids, biases))
        return logits_V


def finite(logits_V: Tensor) -> Tensor:
    """Logits in which what overflowed is the largest number of float32."""
    return logits_V.nan_to_num()
