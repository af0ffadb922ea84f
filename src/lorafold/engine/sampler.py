"""Samples the next tokens of all rows from logits (B, V). llguidance constrains structured output.

    l -> penalties -> + bias -> grammar -> / temperature -> top-k -> top-p -> min-p -> softmax
    token = the first i with p_0 + ... + p_i > u,   u uniform, from philox(key = seed and position)

The order is the same as in transformers. Rows don't affect each other. The generator is
Philox4x64-10 (Salmon et al. 2011) from numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lorafold.engine.request import Sampling
from lorafold.errors import EXITS, LorafoldError, truncate
from lorafold.ops.host_tensors import select_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# maps a completion's tokens to a mask (V,) of allowed next tokens, or None if all are allowed
AllowedTokens = Callable[[Sequence[int]], Tensor | None]
ROWS_AT_ONCE = 4  # 16 rows exceed the CPU's cache and run at half the speed
BLOCK = 64  # tokens whose probabilities are added first, because a cumulative sum is slow
TOP_P_CANDIDATES = 1024  # tried first, because sorting all tokens takes five times as long
NEG_INF = float("-inf")
NOT_FINITE = "the model's logits are NaN or infinite"


class NotFinite(LorafoldError):
    """The logits of a request contain NaN or infinity."""


class GrammarError(LorafoldError):
    def __init__(self, setting: str, reason: str) -> None:
        reason = truncate(reason, 300)
        super().__init__(f"{setting}: the completion can't be continued ({reason})")
        self.setting = setting


class SampledToken(NamedTuple):
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    drawn_logprob: float | None = None


class Sampler:
    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], allowed: AllowedTokens | None = None
    ) -> None:
        self.sampling, self.allowed = sampling, allowed
        self.plain = sampling.plain and allowed is None
        self.tokens: list[int] = []  # the completion
        self.prompt = set(prompt) if sampling.repetition_penalty != 1 else set()

    def process(self, logits_V: Tensor) -> Tensor:  # (V,)
        """Returns the logits after penalties, biases and the grammar; logits_V if it has none."""
        changed_V = self._penalize(logits_V)
        if self.allowed is not None and (mask_V := self.allowed(self.tokens)) is not None:
            # grammars don't contain tokens that an adapter adds
            mask_V = pad(mask_V, (0, len(changed_V) - len(mask_V)))
            if not mask_V.any():
                setting = (self.sampling.grammar or ("grammar", ""))[0]
                raise GrammarError(setting, "no token may follow")
            changed_V = changed_V.masked_fill(~mask_V, NEG_INF)
        return changed_V

    def _penalize(self, logits_V: Tensor) -> Tensor:
        sampling = self.sampling
        if (rate := sampling.repetition_penalty) != 1:
            ids = torch.tensor(sorted(self.prompt | set(self.tokens)))
            old = logits_V[ids]
            new = torch.where(old > 0, old / rate, old * rate).nan_to_num()
            logits_V = logits_V.index_copy(0, ids, new)
        if (sampling.presence_penalty or sampling.frequency_penalty) and self.tokens:
            counts = Counter(self.tokens)
            ids, n = torch.tensor(list(counts)), torch.tensor(list(counts.values()))
            penalty = sampling.presence_penalty + sampling.frequency_penalty * n
            logits_V = logits_V.index_add(0, ids, -penalty.float().nan_to_num()).nan_to_num()
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias))
            biases = torch.tensor([*map(float, sampling.logit_bias.values())])
            logits_V = logits_V.index_add(0, ids, biases).nan_to_num()
        return logits_V


def sample_tokens(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[SampledToken | Exception]:
    """Returns for each row of logits (B, V) a token, or the error that ends the request."""
    choices: dict[int, SampledToken | Exception] = {}
    plain = [b for b, sampler in enumerate(samplers) if sampler.plain]
    others = [b for b, sampler in enumerate(samplers) if not sampler.plain]
    if plain:
        logits_nV = select_rows(logits_BV, plain).float()
        pairs = torch.stack([logits_nV.argmax(-1), torch.isfinite(logits_nV.sum(-1)).long()])
        for b, token, is_finite in zip(plain, *pairs.tolist(), strict=True):
            choices[b] = SampledToken(token) if is_finite else NotFinite(NOT_FINITE)
    for start in range(0, len(others), ROWS_AT_ONCE):
        chunk = others[start : start + ROWS_AT_ONCE]
        logits_nV = select_rows(logits_BV, chunk).to("cpu", torch.float32)
        choices |= zip(chunk, _sample_rows([samplers[b] for b in chunk], logits_nV), strict=True)
    for b, choice in choices.items():
        if isinstance(choice, SampledToken):
            samplers[b].tokens.append(choice.token)
    return [choices[b] for b in range(len(samplers))]


def _sample_rows(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[SampledToken | Exception]:
    choices: list[SampledToken | Exception | None] = [None] * len(samplers)
    before, is_finite = [*logits_BV], torch.isfinite(logits_BV.sum(-1)).tolist()
    rows = [*before]
    for b, sampler in enumerate(samplers):
        try:
            if not is_finite[b]:
                raise NotFinite(NOT_FINITE)
            rows[b] = sampler.process(rows[b])
        except Exception as error:
            choices[b], rows[b] = error, torch.zeros_like(rows[b])
    changed_BV = logits_BV if all(map(is_, rows, before)) else torch.stack(rows)
    sampled = [b for b, sampler in enumerate(samplers) if sampler.sampling.temperature]
    drawn_B, tokens_B = torch.zeros(len(samplers)), torch.zeros(len(samplers), dtype=torch.long)
    if len(sampled) < len(samplers):
        tokens_B = changed_BV.argmax(-1)
    if sampled:
        samplers_n = [samplers[b] for b in sampled]
        # below 1e-30 all but the largest logit overflow; above 1e30 all are equal
        rates = [min(max(item.sampling.temperature, 1e-30), 1e30) for item in samplers_n]
        scaled_nV = select_rows(changed_BV, sampled)
        if rates != [1.0] * len(rates):
            below_nV, by_n1 = scaled_nV - scaled_nV.amax(-1, True), torch.tensor(rates)[:, None]
            scaled_nV = scaled_nV.where(by_n1 == 1, below_nV / by_n1)
        filtered_nV = filter_logits(scaled_nV, [item.sampling for item in samplers_n])
        u_n = [uniform(item.sampling.seed, len(item.tokens)) for item in samplers_n]
        tokens_n = tokens_B[sampled] = draw(torch.softmax(filtered_nV, -1), u_n)
    # these logarithms have the bits of training's
    logp_BV = logits_BV
    if any(sampler.sampling.logprobs is not None for sampler in samplers):
        logp_BV = torch.log_softmax(logits_BV, -1)
        if sampled:
            drawn_nV = logp_BV if filtered_nV is logits_BV else torch.log_softmax(filtered_nV, -1)
            drawn_B[sampled] = drawn_nV.gather(1, tokens_n[:, None])[:, 0]
    columns = tokens_B, logp_BV.gather(1, tokens_B[:, None])[:, 0], drawn_B
    for b, (token, logp, drawn) in enumerate(zip(*(t.tolist() for t in columns), strict=True)):
        if choices[b] is None and (n := samplers[b].sampling.logprobs) is not None:
            best = logp_BV[b].topk(n)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            choices[b] = SampledToken(token, logp, tuple(pairs), drawn)
        elif choices[b] is None:
            choices[b] = SampledToken(token)
    return [item for item in choices if item is not None]


def uniform(seed: int, position: int) -> float:
    """Returns the random number in [0, 1) for one position of a completion."""
    key = np.array([int(seed) % (1 << 64), position], dtype=np.uint64)
    return (int(np.random.Philox(key=key).random_raw()) >> 11) * 2.0**-53


def draw(p_BV: Tensor, u_B: Sequence[float]) -> Tensor:  # (B,)
    """Draws one token from each row of probabilities (B, V) by inverting its cumulative sum."""
    p_BKN = pad(p_BV, (0, -p_BV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    p_BK = p_BKN.sum(-1)
    block_B, rest_B = _invert(p_BK, torch.tensor(u_B, dtype=torch.float64) * p_BK.double().sum(-1))
    token_B, _ = _invert(p_BKN[torch.arange(len(p_BV)), block_B], rest_B)
    return block_B * BLOCK + token_B


def _invert(p_BN: Tensor, at_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row the first n with p_0 + ... + p_n > at, and at - (p_0 + ... + p_n-1)."""
    sums_BN = p_BN.double().cumsum(-1)
    below_B = sums_BN[:, -1].nextafter(torch.tensor(0.0, dtype=torch.float64))
    at_B = torch.minimum(at_B.clamp(min=0), below_B)
    n_B1 = torch.searchsorted(sums_BN, at_B[:, None], right=True)
    return n_B1[:, 0], at_B - (sums_BN - p_BN).gather(1, n_B1)[:, 0]


def filter_logits(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Sets the logits (B, V) that top-k, top-p or min-p exclude to -inf."""
    vocabulary = logits_BV.shape[1]
    ks = {b: s.top_k for b, s in enumerate(samplings) if 0 < s.top_k < vocabulary}
    ps = {b: s.top_p for b, s in enumerate(samplings) if s.top_p < 1}
    ms = {b: s.min_p for b, s in enumerate(samplings) if s.min_p > 0}
    out_BV = logits_BV.clone() if ks or ps or ms else logits_BV
    if ks:
        rows_nV, at = out_BV[[*ks]], torch.tensor([*ks.values()])[:, None] - 1
        least = rows_nV.topk(max(ks.values())).values.gather(1, at)
        out_BV[[*ks]] = rows_nV.masked_fill(rows_nV < least, NEG_INF)
    if ps:
        _top_p_(out_BV, ps, min(TOP_P_CANDIDATES, vocabulary))
    if ms:
        p_nV = torch.softmax(out_BV[[*ms]], -1)
        least = torch.tensor([*ms.values()])[:, None] * p_nV.amax(-1, keepdim=True)
        out_BV[[*ms]] = out_BV[[*ms]].masked_fill(p_nV < least, NEG_INF)
    return out_BV


def _top_p_(out_BV: Tensor, ps: dict[int, float], few: int) -> None:
    """Applies each row's top-p in place. Sorts only the `few` largest logits if they suffice."""
    p_nV, sums = torch.softmax(out_BV[[*ps]], -1), torch.tensor([*ps.values()])[:, None]
    values, ids = p_nV.topk(few)
    before = values.cumsum(-1) - values  # total probability of more likely tokens
    within = (before < sums).index_fill(1, torch.tensor([0]), True)
    enough = (~within[:, -1] | torch.tensor(few == out_BV.shape[1])).tolist()
    in_nV = torch.zeros_like(p_nV, dtype=torch.bool).scatter(1, ids, within)
    for i, b in enumerate(ps):
        if enough[i]:
            out_BV[b].masked_fill_(~in_nV[i], NEG_INF)
    if left := {b: p for (b, p), done in zip(ps.items(), enough, strict=True) if not done}:
        _top_p_(out_BV, left, out_BV.shape[1])


class Grammars:
    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._read: Any = None

    def start(self, sampling: Sampling) -> AllowedTokens | None:
        if sampling.grammar is None:
            return None
        name = sampling.grammar[0]
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise LorafoldError(
                f"{name}: the package llguidance is not installed; install lorafold[serve]"
            ) from None
        tokens = self._tokens(name)
        try:
            matcher = LLMatcher(tokens, guidance(sampling.grammar), log_level=0)
        except EXITS:
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            reason = truncate(str(error), 300)
            raise LorafoldError(f"{name}: can't be compiled ({reason})") from None
        if matcher.is_error():
            raise LorafoldError(f"{name}: can't be compiled ({_error_of(matcher)})")
        return _GrammarState(matcher, name)

    def ends(self, sampling: Sampling) -> frozenset[int]:
        end = None if self._tokenizer is None else self._tokenizer.eos_token_id
        return frozenset([end] if sampling.grammar and isinstance(end, int) else [])

    def _tokens(self, name: str) -> Any:
        if self._read is None:
            from llguidance.hf import from_tokenizer

            if self._tokenizer is None or self._tokenizer.eos_token_id is None:
                raise LorafoldError(f"{name}: found no tokenizer with an EOS token, expected one")
            try:
                known: Any = self._tokenizer
                self._read = from_tokenizer(known, n_vocab=self._vocabulary)
            except ValueError as error:
                raise LorafoldError(f"{name}: {error}") from None
        return self._read


def guidance(grammar: tuple[str, str]) -> str:
    """Converts a setting of `Sampling` and its text to an uncompiled llguidance grammar."""
    from llguidance import LLMatcher

    name, text = grammar
    if name == "schema":
        return str(LLMatcher.grammar_from_json_schema(text))
    return str(LLMatcher.grammar_from_regex(text) if name == "regex" else text)


class _GrammarState:
    def __init__(self, matcher: Any, setting: str) -> None:
        self._matcher, self._setting, self._consumed = matcher, setting, 0

    def __call__(self, tokens: Sequence[int]) -> Tensor:  # (V,)
        try:
            for token in tokens[self._consumed :]:
                self._matcher.consume_token(token)
            self._consumed = len(tokens)
            mask = bytearray(self._matcher.compute_logit_bias())
        except EXITS:
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            raise GrammarError(self._setting, str(error)) from None
        if self._matcher.is_error():
            raise GrammarError(self._setting, _error_of(self._matcher))
        return torch.frombuffer(mask, dtype=torch.uint8) != 0


def _error_of(matcher: Any) -> str:
    return truncate(" ".join(str(matcher.get_error()).partition("<state>")[0].split()), 300)
