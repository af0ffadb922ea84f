"""The next token of one request, from its logits and its settings alone.

    l -> penalties -> + bias -> / temperature -> top-k -> top-p -> min-p -> softmax -> draw

The order is that of transformers. Every request has its own generator, so that its tokens do not
depend on the requests that share the batch. Logits that are not finite raise `NotFinite`, which
ends that request alone.
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
    """The settings of one request and the state of its draws.

    Args:
        prompt: the prompt's tokens, for the repetition penalty.
        allowed: which tokens may follow, for structured output; None: any.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], allowed: Allowed | None = None
    ) -> None:
        self.sampling, self.allowed = sampling, allowed
        self.plain = sampling.plain and allowed is None
        self.generator = (
            torch.Generator().manual_seed(sampling.seed) if sampling.temperature else None
        )
        self.tokens: list[int] = []
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else set()

    def choose(self, logits_V: Tensor) -> Choice:
        """Choose the token that follows, and record it. Raises NotFinite."""
        logits_V = logits_V.detach().to("cpu", torch.float32)
        if not torch.isfinite(logits_V.sum()):
            raise NotFinite(NOT_FINITE)
        changed_V = self._penalized(logits_V)
        if self.allowed is not None and (mask_V := self.allowed(self.tokens)) is not None:
            # a grammar knows nothing of an adapter's new tokens, so that none of them may follow
            mask_V = pad(mask_V, (0, len(changed_V) - len(mask_V)))
            if not mask_V.any():
                raise Unfit((self.sampling.grammar or ("grammar", ""))[0], "no token may follow")
            changed_V = changed_V.masked_fill(~mask_V, float("-inf"))
        kept_V: Tensor | None = None
        if self.generator is None:
            token = int(changed_V.argmax())
        else:
            # below it all but the likeliest would overflow, above it no two differ
            temperature = min(max(self.sampling.temperature, 1e-30), 1e30)
            scaled_V = (changed_V - changed_V.max()) / temperature
            kept_V = filtered(scaled_V, self.sampling)
            p_1V = torch.softmax(kept_V, -1)[None]
            token = int(torch.multinomial(p_1V, 1, generator=self.generator))
        self.record(token)
        return self._report(logits_V, kept_V, token)

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

    def _report(self, logits_V: Tensor, drawn_V: Tensor | None, token: int) -> Choice:
        n = self.sampling.logprobs
        if n is None:
            return Choice(token)
        logp_V = torch.log_softmax(logits_V, -1)
        best = logp_V.topk(n) if n else None
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
        drawn = 0.0 if drawn_V is None else float(torch.log_softmax(drawn_V, -1)[token])
        return Choice(token, float(logp_V[token]), tuple(pairs), drawn)


def finite(logits_V: Tensor) -> Tensor:
    """Logits in which what overflowed is the largest number of float32."""
    return logits_V.nan_to_num()


def filtered(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The logits (V,) with those that top-k, top-p and min-p leave out at minus infinity."""
    low = float("-inf")
    if 0 < sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], low)
    if sampling.top_p < 1:
        ordered, ids = logits_V.sort()  # ascending: what is left out has at most 1 - p in sum
        out = torch.softmax(ordered, -1).cumsum(-1) <= 1 - sampling.top_p
        out[-1] = False
        logits_V = logits_V.masked_fill(torch.zeros_like(out).scatter(0, ids, out), low)
    if sampling.min_p > 0:
        p_V = torch.softmax(logits_V, -1)
        logits_V = logits_V.masked_fill(p_V < sampling.min_p * p_V.max(), low)
    return logits_V
