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
    """How the next token is chosen. Raises LorafoldError for values out of range.

    Args:
        temperature: 0 takes the most likely token; above 0 tokens are drawn.
        top_k: draw among the k most likely tokens (0: among all).
        top_p: draw among the fewest tokens whose probabilities sum to at least this.
        min_p: draw among tokens at least this times as probable as the most likely one.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens in the
            prompt or the completion (Keskar et al. 2019, arXiv 1909.05858, sec. 4.1).
        presence_penalty: what is subtracted from the logit of each token of the completion.
        frequency_penalty: the same, for each time that the token occurs.
        logit_bias: what is added to logits, by token.
        stop: texts before which the completion ends.
        schema: a JSON schema, as text, that the completion has to fit.
        regex: a regular expression that the whole completion has to match.
        lark: a grammar in llguidance's dialect of Lark that the completion has to fit.
        logprobs: how many of the most likely tokens are reported with each (None: no logprobs; 0:
            those of the token itself alone).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    schema: str | None = None
    regex: str | None = None
    lark: str | None = None
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = [(name, getattr(self, name)) for name in NUMBERS]
        numbers += [("logit_bias", x) for x in self.logit_bias.values()]
        require(
            {
                f"{name}: found {x!r:.40}, expected a finite number of float32": (
                    isinstance(x, int | float) and abs(x) <= LARGEST
                )
                for name, x in numbers
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
    """One completion to compute.

    Args:
        id: a name that no other running request has.
        prompt: the token ids of the prompt.
        max_new_tokens: the most tokens of the completion.
        adapter: the name of an adapter, or None for the base.
        ends: the tokens that end the completion; they are no part of it, unless `keep_end`.
        tenant: on whose behalf; what is kept of one tenant's prompts serves no other's.
        tokenizer: for its texts, if not the engine's own.
        keep_end: the token of `ends` that ends the completion is its last one, with its log
            probability, and adds no text.
        prompt_logprobs: how many of the most likely tokens are reported with each token of the
            prompt, in `EventStream.prompt`, where a prompt that is there already is read again
            (None: no logprobs; 0: those of the token itself alone). With it max_new_tokens may be
            0.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    adapter: str | None = None
    sampling: Sampling = Sampling()
    ends: frozenset[int] = frozenset()
    tenant: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None
    keep_end: bool = False
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One more token. `text` is what it adds to the text: empty while a character is incomplete, or
    a stop text may have begun, or if the engine has no tokenizer. `logprob` is the model's own, and
    `top` has the most likely tokens with theirs: before penalties, biases, temperature, filters and
    grammar. `drawn_logprob` is that of the distribution that the token was drawn from, after all of
    these; with temperature 0 nothing is drawn, one token has all of it, and it is 0.
    """

    id: str
    token: int
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    drawn_logprob: float | None = None


@dataclass(frozen=True)
class Ended:
    """The end of a request: why, all its tokens and its text, a message if it failed, and how many
    tokens of the prompt were there already. Of one that failed `fault` says what did, in words that
    have nothing of the request's texts, as the message may; `setting` names the setting of its
    sampling that it follows from, if it follows from one. Ends that differ in these are equal.
    """

    id: str
    reason: Reason
    tokens: tuple[int, ...] = ()
    text: str = ""
    message: str = ""
    cached: int = field(default=0, compare=False)
    fault: str = field(default="", compare=False)
    setting: str = field(default="", compare=False)


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
    """The settings of an engine.

    Args:
        slots: how many requests run at a time.
        length: the most tokens of a request (None: what the model has positions for, at most
            LONGEST).
        chunk: the most tokens of a prompt that are read in one pass.
        budget: the most tokens of prompts that are read in a step.
        adapter_bytes: the most bytes of adapters in memory, or None.
        fast: replace parts of the model by faster ones that compute the same, as
            `engine.fast_path` does; the matrices then take their memory twice.
        beyond: accept a length beyond the positions that the model was made for, but not beyond a
            table of them.
        invariant: keep the shapes of all passes the same, so that a request's logits are the same
            bits whatever shares the batch, without the faster parts (experts: one at a time).
        as_trained: compute training's numbers, bit by bit (`engine.operations`), with its own fused
            parts in place of those of `fast`.
        prefix_reuse: start from what a request of the same tenant and adapter has or left in a
            slot, where the prompt begins the same; never where `invariant`. What is being read is
            read once for all requests with that prompt, whatever is set here.
        strikes: requests that fail by logits that are not finite before an adapter is refused.
        tenant_slots: how many requests of a tenant run at a time; half of the slots, if that is
            less, while other tenants are there. Rows that run beside it make each of a tenant's
            steps longer, and slots that are free let the next one begin at once. None: there is no
            such limit.
        weights: the shares of tenants in what is computed; 1 for one that is not named.
        allow_other_base: accept adapters that were trained on another base.
    """

    slots: int = 16
    length: int | None = None
    chunk: int = 256
    budget: int = 512
    adapter_bytes: int | None = None
    fast: bool = True
    beyond: bool = False
    invariant: bool = False
    as_trained: bool = False
    prefix_reuse: bool = True
    strikes: int = 3
    tenant_slots: int | None = None
    weights: Mapping[str, float] | None = None
    allow_other_base: bool = False

    def fitted(self, positions: int | None, table: int | None) -> tuple[Self, int]:
        """The settings for a model, and the length. Raises LorafoldError for sizes that are too
        small, and for a length that the model has no positions for.

        Args:
            positions: those that the model was made for (None: as many as LONGEST).
            table: those of its table of positions, if it has one.
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
