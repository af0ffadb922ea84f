"""The interface between the server and an engine, which `engine_backend` implements. All methods
are thread-safe. `length`, `not_ready` and `states` don't block.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafold.engine import Ended, Request, Sampling, Token
from lorafold.engine.request import NUMBERS
from lorafold.engine.sampler import NOT_FINITE, guidance
from lorafold.engine.sequence import Detokenizer, overlap
from lorafold.serving.settings import Strict

__all__ = [
    "CRASHED", "NOT_FINITE", "NUMBERS", "AdapterFiles", "Backend", "Detokenizer", "Ended", "Output",
    "Request", "Sampling", "Stage", "States", "Token", "guidance", "overlap", "running",
]  # fmt: skip

CRASHED = "the engine stopped"  # a possible `Ended.message`, like NOT_FINITE
Stage = Literal["checked", "known", "begun", "resident"]


class AdapterFiles(Strict):
    """A verified version of an adapter. `key` is its name in the engine."""

    name: str
    path: Path
    digest: str  # of the adapter and its base adapters
    old: str  # the digest in the old format, without tokenizer and base adapters
    manifest: bool  # whether the directory has a manifest
    stack: tuple[str, ...]  # digests of the loaded files: base adapters first, then the adapter
    sizes: tuple[int, ...] = ()  # bytes for each of `stack`; if empty, it is verified again
    over: tuple[Path, ...] = ()  # base adapters, the lowest first
    method: str
    rank: int | None = None
    base: str = ""  # the base model's name, if the record has no fingerprint
    other_base: str = ""  # difference between its base and the served base
    other_storage: str = ""
    form: str = ""  # digest of everything except the values of tensors
    tokenizer: str = ""  # digest of its tokenizer, or "" for the base's
    words: Path | None = None  # the directory of its tokenizer
    single_turn: bool = False  # whether all rows that it was trained on had a single question
    note: str = ""  # a warning for the administrator

    @property
    def key(self) -> str:
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True)
class Output:
    id: str
    events: Sequence[Token | Ended]
    began: float | None  # time.monotonic() when the request got a slot; None while it waits
    prompt: Sequence[Token] = ()  # with logprobs, if requested


@dataclass(frozen=True)
class States:
    # (loading, resident or quarantined; bytes in memory) by key, without cold adapters
    adapters: Mapping[str, tuple[str, int]]
    seconds: Mapping[str, float]  # duration of the last load, by key
    nbytes: int
    reads: int
    evictions: int
    damaged: int  # adapters whose memory was corrupted
    alone: str  # why requests run one at a time; "" if they are batched
    kv_tokens: int  # tokens for which the KV cache has memory
    kv_bytes: int

    def is_quarantined(self, name: str) -> bool:
        return self.adapters.get(name, ("", 0))[0] == "quarantined"


class Backend(ABC):
    @property
    @abstractmethod
    def length(self) -> int:
        """The maximum number of tokens of a prompt and its completion."""

    @property
    @abstractmethod
    def not_ready(self) -> str:
        """Why requests are not computed, or ""."""

    @abstractmethod
    def events(
        self, notify: Callable[[Sequence[Output]], None]
    ) -> AbstractAsyncContextManager[None]:
        """Returns a context in which requests are computed; when it closes, all requests end.
        `notify` is called on the event loop with the updates since its last call. Each request gets
        exactly one `Ended`, with the message CRASHED if the backend failed.
        """

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queues a request. May block. Raises if the request is invalid."""

    @abstractmethod
    def cancel(self, id: str) -> None:
        """Ends a request within the next step. Unknown ids are ignored."""

    @abstractmethod
    def load(self, adapter: AdapterFiles, until: Stage) -> None:
        """Registers an adapter under its key; it remains registered if the engine restarts. Running
        requests keep their version. Whenever the files are read, they must have the digests in
        `adapter`.

        `until` is `known` (loads on demand and resets strikes), `begun` (starts loading),
        `resident` (waits until the adapter is in memory) or `checked` (only checks that the files
        fit the model). The last two raise if the files are wrong.
        """

    @abstractmethod
    def unload(self, key: str) -> None:
        """Removes an adapter. Raises for an unknown key."""

    @abstractmethod
    def pin(self, key: str, pinned: bool) -> None:
        """Pins an adapter in memory once it is loaded, or unpins it. Raises for an unknown key."""

    @abstractmethod
    def states(self) -> States:
        """Returns the state of the adapter cache."""


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs a coroutine during the block, and cancels it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
