"""The requests to the engine, their events, and the engine's settings.

The tokens of a completion follow from the model, the adapter, the prompt and the request's
`Sampling`, and never from the requests that share the batch. Every request has exactly one `Ended`,
which is its last event.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self

from lorafold.errors import LorafoldError
from lorafold.ops.arithmetic import FEW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 2048  # tokens of a request, unless more are asked for
LARGEST = 3.4028234663852886e38  # of float32
NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
Reason = Literal["end", "length", "stop", "cancelled", "failed"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises LorafoldError for values out of range."""

    temperature: float = 0.0  # 0 takes the most likely token; above 0 tokens are sampled
    top_k: int = 0  # sample among the k most likely tokens (0: among all)
    top_p: float = 1.0  # sample among the fewest tokens whose probabilities sum to this at least
    min_p: float = 0.0  # sample among tokens at least this times as probable as the most likely one
    # divides the positive and multiplies the negative logits of tokens in the prompt or the
    # completion (Keskar et al. 2019, arXiv 1909.05858, sec. 4.1)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted from the logit of each token of the completion
    frequency_penalty: float = 0.0  # the same, for each time that the token occurs
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by token
    stop: tuple[str, ...] = ()  # texts before which the completion ends
    schema: str | None = None  # a JSON schema, as text, that the completion has to fit
    regex: str | None = None  # a regular expression that the whole completion has to match
    lark: str | None = None  # a grammar in llguidance's dialect of Lark for the completion
    # how many of the most likely tokens are reported with each (None: no logprobs; 0: the token's)
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        values = [(name, getattr(self, name)) for name in NUMBERS]
        values += [("logit_bias", x) for x in self.logit_bias.values()]
        require(
            {
                f"{name}: found {x!r:.40}, expected a finite number of float32": (
                    isinstance(x, int | float) and abs(x) <= LARGEST
                )
                for name, x in values
            }
        )
        checks = {
            f"temperature: found {self.temperature}, expected 0 or more": self.temperature >= 0,
            f"top_k: found {self.top_k}, expected 0 or more": self.top_k >= 0,
            f"top_p: found {self.top_p}, expected above 0, at most 1": 0 < self.top_p <= 1,
            f"min_p: found {self.min_p}, expected 0 to 1": 0 <= self.min_p <= 1,
            f"repetition_penalty: found {self.repetition_penalty}, expected above 0": (
                self.repetition_penalty > 0
            ),
            f"logprobs: found {self.logprobs}, expected 0 to 20, or None": (
                self.logprobs is None or 0 <= self.logprobs <= 20
            ),
            "schema, regex, lark: found several, expected one": (
                (self.schema, self.regex, self.lark).count(None) > 1
            ),
            "stop: found an empty text, expected at least one character": all(self.stop),
        }
        require(checks)

    @property
    def grammar(self) -> tuple[str, str] | None:
        """The setting with a grammar, and its text; None if there is none."""
        settings = {"schema": self.schema, "regex": self.regex, "lark": self.lark}
        return next(((name, text) for name, text in settings.items() if text is not None), None)

    @property
    def plain(self) -> bool:
        """Whether the next token is the most likely one, and nothing else is needed."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)
            and self.logprobs is None
        )


def require(checks: Mapping[str, bool]) -> None:
    """Raise LorafoldError with the messages of the checks that failed, if any."""
    if wrong := [message for message, passed in checks.items() if not passed]:
        raise LorafoldError("; ".join(wrong))


@dataclass(frozen=True)
class Request:
    """One completion to compute."""

    id: str  # that no other running request has
    prompt: tuple[int, ...]
    max_new_tokens: int
    adapter: str | None = None  # None for the base
    sampling: Sampling = Sampling()
    # the tokens that end the completion; they are no part of it, unless `keep_end`, with which the
    # last token has a log probability and no text
    ends: frozenset[int] = frozenset()
    tenant: str = ""  # prefixes of one tenant's prompts are not cached for others
    tokenizer: PreTrainedTokenizerBase | None = None  # for its texts, if not the engine's own
    keep_end: bool = False
    # how many of the most likely tokens are reported with each token of the prompt, in
    # `EventStream.prompt` (None: no logprobs; 0: the token's); max_new_tokens may then be 0
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One more token of a completion."""

    id: str
    token: int
    text: str = ""  # that it adds: empty while a character or a stop text may be incomplete
    logprob: float | None = None  # the model's own, before penalties, temperature and filters
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens with theirs
    drawn_logprob: float | None = None  # in the distribution that it was sampled from


@dataclass(frozen=True)
class Ended:
    """The end of a request."""

    id: str
    reason: Reason
    tokens: tuple[int, ...] = ()
    text: str = ""
    message: str = ""  # of one that failed; it may have texts of the request
    cached: int = field(default=0, compare=False)  # tokens of the prompt that were in the cache
    fault: str = field(default="", compare=False)  # the message without texts of the request
    setting: str = field(default="", compare=False)  # the setting of its sampling that caused it


class EventStream:
    """The events of one request in their order, which end with its `Ended`. Any threads may read,
    each from the first event on. `prompt` has the tokens of the prompt with their log
    probabilities, if those are asked for, from before the first event on; the first one has none.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.began: float | None = None  # when it got a slot, by time.monotonic
        self.prompt: tuple[Token, ...] = ()
        self._events: list[Token | Ended] = []
        self.ended: Ended | None = None  # the last event, once the request does not run
        self._more = threading.Condition()

    def put(self, event: Token | Ended) -> None:
        """Add an event; the engine alone does so."""
        with self._more:
            assert self.ended is None, f"{self.request.id}: an event after the last"
            if isinstance(event, Ended):
                self.ended = event
            self._events.append(event)
            self._more.notify_all()

    def so_far(self, start: int = 0) -> list[Token | Ended]:
        """The events that are there, from the one of that number on."""
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
        """Wait for the last event and return it."""
        with self._more:
            while self.ended is None:
                self._more.wait()
            return self.ended


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine."""

    slots: int = 16  # requests that run at a time
    length: int | None = None  # the most tokens of a request (None: the model's, at most LONGEST)
    chunk: int = 256  # the most tokens of a prompt that are read in one pass
    budget: int = 512  # the most tokens of prompts that are read in a step
    adapter_bytes: int | None = None  # the most bytes of adapters in memory, or None
    fast: bool = True  # `engine.fast_path`; the matrices then take their memory twice
    # accept a length beyond the positions that the model was made for, but not beyond a table
    beyond: bool = False
    # keep the shapes of all passes the same, so that logits are batch invariant without the fast
    # path (experts: one row at a time)
    invariant: bool = False
    as_trained: bool = False  # bit-identical to training, with its fused modules (no fast path)
    # reuse the KV cache of a request of the same tenant and adapter with the same prefix; requests
    # with one prompt that wait at the same time share its reading in any case
    prefix_reuse: bool = True
    strikes: int = 3  # requests with logits that are not finite before an adapter is refused
    # requests of a tenant that run at a time, or None; at most half of the slots while other
    # tenants are there
    tenant_slots: int | None = None
    weights: Mapping[str, float] | None = None  # the shares of tenants, 1 if not named
    allow_other_base: bool = False  # accept adapters that were trained on another base

    def fitted(self, positions: int | None, table: int | None) -> tuple[Self, int]:
        """The settings for a model with so many positions, and the length. Raises LorafoldError for
        sizes that are too small, or a length beyond the positions.
        """
        positions = min(positions or LONGEST, table or sys.maxsize)
        most = sys.maxsize if self.beyond and table is None else positions
        length = min(positions, LONGEST) if self.length is None else self.length
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
        # a pass that is bit-identical to training has FEW tokens or more
        chunk = max(min(self.chunk, length), FEW if self.as_trained else 0)
        return replace(self, length=length, chunk=chunk, prefix_reuse=reuse, fast=fast), length
