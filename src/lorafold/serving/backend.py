"""The interface between the server and an engine, implemented by `engine_backend`. All methods are
thread-safe; `length`, `ready` and `states` don't block.
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

CRASHED = "the engine stopped"  # a message of `Ended`, like NOT_FINITE
Stage = Literal["checked", "known", "begun", "resident"]


class AdapterFiles(Strict):
    """A verified version of an adapter; `key` is its name in the engine."""

    name: str
    path: Path
    digest: str  # the identity of the adapter and its base adapters
    old: str  # the digest in the old format, without tokenizer and base adapters
    manifest: bool  # whether it has a manifest
    stack: tuple[str, ...]  # digests of the loaded files, of its base adapters first
    sizes: tuple[int, ...] = ()  # in bytes; without them, it is verified again
    over: tuple[Path, ...] = ()  # base adapters, the lowest first
    method: str
    rank: int | None = None
    base: str = ""  # the base model's name, if there is no fingerprint
    other_base: str = ""  # difference between its base and the served one
    other_storage: str = ""
    form: str = ""  # a digest of everything except the values of tensors
    tokenizer: str = ""  # digest, or "" for the base's tokenizer
    words: Path | None = None  # the directory of its tokenizer
    note: str = ""  # for the administrator

    @property
    def key(self) -> str:
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True)
class Output:
    id: str
    events: Sequence[Token | Ended]
    began: float | None  # time.monotonic() when it got a slot; None while it waits
    prompt: Sequence[Token] = ()  # with log probabilities, if requested


@dataclass(frozen=True)
class States:
    # by key: (loading, resident or quarantined; bytes in memory); others are cold
    adapters: Mapping[str, tuple[str, int]]
    seconds: Mapping[str, float]  # duration of the last load, by key
    nbytes: int
    reads: int
    evictions: int
    damaged: int  # adapters whose memory was corrupted
    alone: str  # the reason for running one request at a time; empty if they are batched

    def is_quarantined(self, name: str) -> bool:
        return self.adapters.get(name, ("", 0))[0] == "quarantined"


class Backend(ABC):
    """Computes completions of one base under its adapters."""

    @property
    @abstractmethod
    def length(self) -> int:
        """The maximum number of tokens of a prompt and its completion."""

    @property
    @abstractmethod
    def ready(self) -> str:
        """The reason for which nothing is computed, or an empty text."""

    @abstractmethod
    def events(
        self, notify: Callable[[Sequence[Output]], None]
    ) -> AbstractAsyncContextManager[None]:
        """Computes while the context is open; at its end, all requests end. `notify` is called on
        the event loop with the updates since its last call. Every request gets one `Ended`, with
        the message CRASHED if the backend failed.
        """

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queues a request; may block. Raises if it is refused."""

    @abstractmethod
    def cancel(self, id: str) -> None:
        """Ends a request within a step, if it exists."""

    @abstractmethod
    def load(self, adapter: AdapterFiles, until: Stage) -> None:
        """Registers an adapter under its key, also after a restart of the engine. Running requests
        keep their version. The files must have these digests whenever they are read.

        `until` `known`: loads on demand, and resets strikes; `begun`: starts loading; `resident`:
        waits until loaded; `checked`: only checks that the files fit the model. The last two raise
        for wrong files.
        """

    @abstractmethod
    def unload(self, key: str) -> None:
        """Raises for an unknown adapter."""

    @abstractmethod
    def pin(self, key: str, pinned: bool) -> None:
        """Keeps an adapter in memory once loaded, or no longer. Raises for an unknown one."""

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
