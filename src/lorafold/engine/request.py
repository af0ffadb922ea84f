"""Requests to the engine, their events, and the engine's settings. A completion never depends on
other requests in the batch. Each request has exactly one `Ended`, which is its last event.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, Self

from lorafold.errors import LorafoldError
from lorafold.ops.arithmetic import FEW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 2048  # default for the maximum tokens of a request, if the model has none
LARGEST = 3.4028234663852886e38  # the largest float32
NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
Reason = Literal["end", "length", "stop", "cancelled", "failed"]


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # keep the fewest most likely tokens with at least this total probability
    min_p: float = 0.0  # minimum probability relative to the most likely token
    # divides positive logits and multiplies negative logits of tokens in the prompt or the
    # completion (Keskar et al. 2019, arXiv 1909.05858, sec. 4.1)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the completion
    frequency_penalty: float = 0.0  # the same, times the token's number of occurrences
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by token
    stop: tuple[str, ...] = ()  # strings that end the completion and are excluded from it
    schema: str | None = None  # a JSON schema for the completion, as a JSON string
    regex: str | None = None  # a regular expression for the whole completion
    lark: str | None = None  # a grammar for the completion in llguidance's Lark dialect
    # number of most likely tokens to return with logprobs; 0: only the sampled token; None: nothing
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        values = [(name, getattr(self, name)) for name in NUMBERS]
        values += [("logit_bias", x) for x in self.logit_bias.values()]
        integers = [("top_k", self.top_k), ("seed", self.seed), ("logprobs", self.logprobs or 0)]
        integers += [("logit_bias", token) for token in self.logit_bias]
        require(
            {
                f"{name}: found {x!r:.40}, expected a finite float32 number": (
                    isinstance(x, Real) and abs(x) <= LARGEST  # type: ignore[operator]
                )
                for name, x in values
            }
            | {
                f"{name}: found {x!r:.40}, expected an integer": (
                    isinstance(x, Integral) and x is not True and x is not False
                )
                for name, x in integers
            }
            | {f"stop: found {self.stop!r:.40}, expected a list": not isinstance(self.stop, str)}
        )
        checks = {
            f"temperature: found {self.temperature}, expected 0 or more": self.temperature >= 0,
            f"top_k: found {self.top_k}, expected 0 or more": self.top_k >= 0,
            f"top_p: found {self.top_p}, expected above 0 and at most 1": 0 < self.top_p <= 1,
            f"min_p: found {self.min_p}, expected 0 to 1": 0 <= self.min_p <= 1,
            f"repetition_penalty: found {self.repetition_penalty}, expected above 0": (
                self.repetition_penalty > 0
            ),
            f"logprobs: found {self.logprobs}, expected 0 to 20, or None": (
                self.logprobs is None or 0 <= self.logprobs <= 20
            ),
            "schema, regex, lark: found several, expected at most one": (
                (self.schema, self.regex, self.lark).count(None) > 1
            ),
            "stop: found an empty string, expected at least one character": all(self.stop),
        }
        require(checks)

    @property
    def grammar(self) -> tuple[str, str] | None:
        settings = {"schema": self.schema, "regex": self.regex, "lark": self.lark}
        return next(((name, text) for name, text in settings.items() if text is not None), None)

    @property
    def plain(self) -> bool:
        """Whether sampling is greedy, without penalties, biases or logprobs."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
            and self.logprobs is None
        )


def require(checks: Mapping[str, bool]) -> None:
    if wrong := [message for message, passed in checks.items() if not passed]:
        raise LorafoldError("; ".join(wrong))


@dataclass(frozen=True)
class Request:
    id: str  # unique among running requests
    prompt: tuple[int, ...]
    max_new_tokens: int
    adapter: str | None = None  # None for the base
    sampling: Sampling = Sampling()
    # end tokens; the completion contains them only with `keep_end`, and its text never does
    ends: frozenset[int] = frozenset()
    tenant: str = ""  # cached prefixes are not shared between tenants
    tokenizer: PreTrainedTokenizerBase | None = None  # None: the engine's
    keep_end: bool = False
    # like `Sampling.logprobs`, for the prompt's tokens (`EventStream.prompt`); if it is set,
    # max_new_tokens may be 0
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    id: str
    token: int
    text: str = ""  # new text; empty while a character or a stop string may be incomplete
    logprob: float | None = None  # before penalties, temperature and filters
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens with their logprobs
    drawn_logprob: float | None = None  # after penalties, temperature and filters


@dataclass(frozen=True)
class Ended:
    id: str
    reason: Reason
    tokens: tuple[int, ...] = ()
    text: str = ""
    message: str = ""  # the error; may contain text of the request
    cached: int = field(default=0, compare=False)  # prompt tokens in the prefix cache
    fault: str = field(default="", compare=False)  # the error without text of the request
    setting: str = field(default="", compare=False)  # the field of `Sampling` that caused the error


class EventStream:
    """The events of a request up to its `Ended`. Several threads may iterate; each gets all events.
    `prompt` contains the prompt's tokens with logprobs if requested, and is set before the first
    event. Its first token has no logprob.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.began: float | None = None  # time.monotonic() when the request got a slot
        self.prompt: tuple[Token, ...] = ()
        self._events: list[Token | Ended] = []
        self.ended: Ended | None = None
        self._more = threading.Condition()

    def put(self, event: Token | Ended) -> None:
        with self._more:
            assert self.ended is None, f"{self.request.id}: an event after the last"
            if isinstance(event, Ended):
                self.ended = event
            self._events.append(event)
            self._more.notify_all()

    def so_far(self, start: int = 0) -> list[Token | Ended]:
        with self._more:
            return self._events[start:]

    def __iter__(self) -> Iterator[Token | Ended]:
        read = 0
        while True:
            with self._more:
                while read == len(self._events):
                    self._more.wait()
                event = self._events[read]
            read += 1
            yield event
            if isinstance(event, Ended):
                return

    def result(self) -> Ended:
        with self._more:
            while self.ended is None:
                self._more.wait()
            return self.ended


@dataclass(frozen=True)
class EngineSettings:
    slots: int = 16  # max_num_seqs
    # max_model_len (None: the model's, at most LONGEST with `invariant`, whose passes read all of
    # it); at most as many tokens as the KV cache holds
    length: int | None = None
    kv_bytes: int | None = None  # maximum bytes of the KV cache (None: half of the free memory)
    chunk: int = 256  # prefill tokens per prompt and pass
    budget: int = 512  # prefill tokens per step
    adapter_bytes: int | None = None  # maximum bytes of adapters in memory
    fast: bool = True  # use `engine.plan`, which copies the matrices
    # allow lengths beyond max_position_embeddings, unless position embeddings are learned
    beyond: bool = False
    # batch invariance from equal shapes in all passes instead of the fast path; mixture-of-experts
    # models then run one row at a time
    invariant: bool = False
    as_trained: bool = False  # make results bit-identical to training, without the fast path
    # prefix caching within a tenant and an adapter; even without it, simultaneous requests with the
    # same prompt share its prefill
    prefix_reuse: bool = True
    strikes: int = 3  # requests with NaN or infinite logits before an adapter is quarantined
    # maximum running requests per tenant; at most half of the slots if there are other tenants
    tenant_slots: int | None = None
    weights: Mapping[str, float] | None = None  # weights of tenants in fair scheduling; default 1
    allow_other_base: bool = False  # accept adapters that were trained on another base

    def fitted(self, positions: int | None, table: int | None) -> tuple[Self, int]:
        """Returns the settings and the maximum length for a model with this max_position_embeddings
        (`positions`) and size of a position-embedding table (`table`). Raises for invalid sizes.
        """
        positions = min(positions or LONGEST, table or sys.maxsize)
        most = sys.maxsize if self.beyond and table is None else positions
        length = min(positions, LONGEST) if self.invariant else positions
        length = length if self.length is None else self.length
        sizes = {"slots": (self.slots, 1), "length": (length, 2), "chunk": (self.chunk, 2)}
        sizes["tenant_slots"] = (self.tenant_slots or 1, 1)
        wrong = [
            f"{name}: found {n}, expected {m} or more" for name, (n, m) in sizes.items() if n < m
        ]
        if not wrong and length > most:
            wrong = [f"length: found {length}, expected at most {most} positions"]
        if wrong:
            raise LorafoldError(f"engine: {'; '.join(wrong)}")
        reuse, fast = (on and not self.invariant for on in (self.prefix_reuse, self.fast))
        # bit-identical passes need at least FEW tokens
        chunk = max(min(self.chunk, length), FEW if self.as_trained else 0)
        return replace(self, length=length, chunk=chunk, prefix_reuse=reuse, fast=fast), length
