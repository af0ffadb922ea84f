"""Running requests, and incremental detokenization.

`Detokenizer` withholds text while a character is incomplete or while the text may end with the
start of a stop string, so that output is never retracted. It decodes only the tokens since the last
complete character again, together with enough earlier tokens that the decoder doesn't treat them as
the start of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafold.engine.adapters import KnownAdapter, LoadedAdapter
from lorafold.engine.kv_cache import PrefixKey, common_length
from lorafold.engine.request import Ended, EventStream, Reason, Request, Token
from lorafold.engine.sampler import NOT_FINITE, AllowedTokens, NotFinite, SampledToken, Sampler
from lorafold.errors import EXITS, error_location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
POSITIONS_AT_ONCE = 32  # positions whose log-softmax over the vocabulary is computed at once
# a token's logprob, and the most likely tokens at its position with their logprobs
Score = tuple[float, tuple[tuple[int, float], ...]]


class Row:
    """A waiting or running request with its tokens, adapter, slot and blocks. `ends` is added to
    the request's end tokens.
    """

    def __init__(
        self,
        request: Request,
        entry: KnownAdapter | None,
        tokenizer: PreTrainedTokenizerBase | None,
        allowed: AllowedTokens | None,
        ends: frozenset[int],
    ) -> None:
        self.request, self.entry, self.stream = request, entry, EventStream(request)
        self.sampler = Sampler(request.sampling, request.prompt, allowed)
        self.ends = request.ends | ends
        known = tokenizer if request.tokenizer is None else request.tokenizer
        self.text = None if known is None else Detokenizer(known, request.sampling.stop)
        self.tokens = list(request.prompt)
        self.computed = 0  # tokens in the KV cache
        self.scores: list[Score] = []  # of the prompt's tokens, without the first
        self.blocks: list[int] = []  # of the KV cache, in the order of their positions
        self.prefiller: Row | None = None  # another row that prefills a common prefix
        self.awaited = 0  # length of that prefix
        self.cached = 0  # prompt tokens from the prefix cache
        self.adapter: LoadedAdapter | None = None
        self.slot = -1
        self.state: Any = None  # transformers' cache, if the model can't be batched
        self.cancelled = False

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def prefix(self) -> PrefixKey:
        """The key under which other requests may reuse this request's KV cache."""
        return self.entry.generation if self.entry else 0, self.request.tenant

    def common_prefix(self, other: Row, partial: bool) -> int:
        """The length of the prefix that this request prefills and the other can use: the whole
        prompt, with its logits, or with `partial` also a part of it.
        """
        if self.prefiller is not None or self.prefix != other.prefix or not self.num_pending:
            return 0
        same = self.tokens == other.tokens and len(self.tokens) == len(self.request.prompt)
        if same and other.request.prompt_logprobs in (None, self.request.prompt_logprobs):
            return len(self.tokens)
        partial = partial and other.request.prompt_logprobs is None
        return common_length(self.tokens, other.tokens[:-1]) if partial else 0

    def to_score(self, n: int) -> int:
        """Returns how many of the next n tokens predict a prompt token that needs a logprob."""
        wanted = self.request.prompt_logprobs is not None
        return max(0, min(n, len(self.request.prompt) - 1 - self.computed)) if wanted else 0

    def score(self, logits_TV: Tensor) -> None:
        """Stores the logprobs of prompt tokens. logits_TV are the logits at the T tokens that
        follow the first `computed` tokens, which are in the KV cache.
        """
        del self.scores[self.computed :]
        for logits_nV in logits_TV.split(POSITIONS_AT_ONCE):
            first = len(self.scores) + 1
            ids = self.tokens[first : first + len(logits_nV)]
            logp_nV = torch.log_softmax(logits_nV.float(), -1)
            ids_n1 = torch.tensor(ids, device=logp_nV.device)[:, None]
            best = logp_nV.topk(self.request.prompt_logprobs or 0)
            tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            pairs = [tuple(zip(*top, strict=True)) for top in tops]
            self.scores += zip(logp_nV.gather(1, ids_n1)[:, 0].tolist(), pairs, strict=True)

    def publish_prompt(self) -> None:
        request = self.request
        if request.prompt_logprobs is None or self.stream.prompt:
            return
        if not all(isfinite(logprob) for logprob, _ in self.scores):
            raise NotFinite(NOT_FINITE)
        first, *others = request.prompt
        scored = zip(others, self.scores, strict=True)
        self.stream.prompt = (
            Token(request.id, first),
            *(Token(request.id, token, "", logprob, top) for token, (logprob, top) in scored),
        )

    def append(self, choice: SampledToken) -> Reason | None:
        request = self.request
        ends = choice.token in self.ends
        if ends and not request.keep_end:
            return "end"
        self.tokens.append(choice.token)
        piece = self.text.add(choice.token) if self.text and not ends else ""
        self.stream.put(Token(request.id, choice.token, piece, *choice[1:]))
        if ends:
            return "end"
        if self.text and self.text.stopped:
            return "stop"
        full = len(self.tokens) - len(request.prompt) == request.max_new_tokens
        return "length" if full else None

    def end(self, reason: Reason, message: str = "", fault: str = "", setting: str = "") -> None:
        request = self.request
        if self.text and reason != "failed":
            try:
                self.text.finish()
            except EXITS:
                raise
            except BaseException as error:  # a Rust panic of a tokenizer is not an Exception
                reason, fault = "failed", error_location(error)
                message = f"{type(error).__name__}: {error}"
        text, completion = self.text.text if self.text else "", self.tokens[len(request.prompt) :]
        self.stream.put(
            Ended(
                request.id, reason, tuple(completion), text, message, self.cached, fault, setting
            )
        )


class Detokenizer:
    """Detokenizes a completion token by token. With `special`, the text contains special tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), special: bool = False
    ) -> None:
        self._tokenizer, self._stop, self._special = tokenizer, tuple(stop), special
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # start of decoding, end of the output
        self._buffer = ""
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """Returns the text that a token adds. Sets `stopped` if a stop string is complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._read])
        after = self._decode(self._ids[self._from :])
        if after.endswith(INCOMPLETE) or len(after) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :], last=False)

    def finish(self) -> str:
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._from : self._read])
        self._read = len(self._ids)
        return self._release(self._decode(self._ids[self._from :])[len(before) :], last=True)

    def _release(self, new: str, last: bool) -> str:
        text = self._buffer + new
        stops = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if stops:
            self.stopped, text, self._buffer = True, text[: min(stops)], ""
        else:
            n = 0 if last else overlap(text, self._stop)
            text, self._buffer = text[: len(text) - n], text[len(text) - n :]
        self.text += text
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
            )
        )


def overlap(text: str, marks: Sequence[str]) -> int:
    """Returns the number of characters at the text's end that may begin one of the marks."""
    ends = range(min(max(map(len, marks), default=1) - 1, len(text)), 0, -1)
    return next((n for n in ends if any(mark.startswith(text[-n:]) for mark in marks)), 0)
