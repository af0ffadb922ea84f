"""The interface between the server and an engine: nine calls, and the types that pass through them.

    async with backend.events(take):            it computes, and calls `take` after every step
        backend.load(adapter, "known")
        backend.submit(Request("1", prompt, 64, adapter.key))
        backend.cancel("1")

`engine_backend` implements it with `lorafold.engine`; no other file of the server depends on an
engine. Any thread may call; `length`, `ready` and `states` return at once.
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
from lorafold.engine.sequence import Text, may_begin
from lorafold.serving.settings import Strict

__all__ = [
    "LOST", "NOT_FINITE", "NUMBERS", "AdapterFiles", "Backend", "Ended", "News", "Request",
    "Sampling", "States", "Text", "Token", "Until", "guidance", "may_begin", "while_open",
]  # fmt: skip

LOST = "the engine stopped"  # the message of an end, as NOT_FINITE is one
Until = Literal["checked", "known", "begun", "resident"]


class AdapterFiles(Strict):
    """A version of an adapter: its files by digest, and what its record says of it."""

    name: str
    path: Path
    digest: str  # its identity together with those of the adapters below
    old: str  # the digest in the old form, of its own files without its tokenizer
    manifest: bool  # whether there is one among its files
    stack: tuple[str, ...]  # the identities of what is read of the adapters below and of it
    sizes: tuple[int, ...] = ()  # in bytes; older caches have none, and are verified again
    over: tuple[Path, ...] = ()  # the adapters below, the lowest first
    method: str
    rank: int | None = None
    base: str = ""  # the base that it names, if it has no fingerprint of that
    other_base: str = ""  # how its base differs from the one that is served
    other_storage: str = ""
    form: str = ""  # the digest of all but the values of its tensors
    tokenizer: str = ""  # the digest of its tokenizer, "" for the base's
    words: Path | None = None  # where its tokenizer is
    note: str = ""  # for the administrator

    @property
    def key(self) -> str:
        """The name of this version."""
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True)
class News:
    """One request's events since the last news."""

    id: str
    events: Sequence[Token | Ended]
    began: float | None  # when it got a slot, by time.monotonic; None while it waits
    prompt: Sequence[Token] = ()  # with log probabilities, if the request wants them


@dataclass(frozen=True)
class States:
    """Where the adapters are, and what was done with them."""

    # by name, of those that are not cold: loading, resident or quarantined, and the bytes in memory
    adapters: Mapping[str, tuple[str, int]]
    seconds: Mapping[str, float]  # that it took to read them the last time, by name
    nbytes: int
    reads: int
    evictions: int
    damaged: int  # adapters that changed in memory
    alone: str  # why requests run one at a time, empty if they share passes

    def refuses(self, name: str) -> bool:
        """Whether an adapter is in quarantine."""
        return self.adapters.get(name, ("", 0))[0] == "quarantined"


class Backend(ABC):
    """Abstract: computes completions of one base under its adapters."""

    @property
    @abstractmethod
    def length(self) -> int:
        """The most tokens of a request, with its completion."""

    @property
    @abstractmethod
    def ready(self) -> str:
        """Why nothing is computed now, empty if it is."""

    @abstractmethod
    def events(self, take: Callable[[Sequence[News]], None]) -> AbstractAsyncContextManager[None]:
        """Compute for as long as the context is open, and end all requests with it.

        Args:
            take: called in the event loop with the news of all requests since the last call. Every
                submitted request has one `Ended`; if the backend itself failed, its message is
                LOST.
        """

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request. It may take its time. Raises LorafoldError if it is refused."""

    @abstractmethod
    def cancel(self, id: str) -> None:
        """End a request within a step, if there is one of that name."""

    @abstractmethod
    def load(self, adapter: AdapterFiles, until: Until) -> None:
        """Make an adapter known under its key, so that requests may name it, also after a restart
        of the engine. Running requests keep the version that they have.

        Args:
            adapter: its files, which must have these digests whenever they are read.
            until: `known`: they are read when a request needs them, and strikes are reset; `begun`:
                reading has begun; `resident`: it is in memory; `checked`: the files were read and
                fit, and the adapter does not become known. The last two raise LorafoldError for
                wrong files.
        """

    @abstractmethod
    def unload(self, key: str) -> None:
        """Forget an adapter. Raises LorafoldError for an unknown one."""

    @abstractmethod
    def pin(self, key: str, pinned: bool) -> None:
        """Keep an adapter in memory once it is there, or no longer. Raises as `unload`."""

    @abstractmethod
    def states(self) -> States:
        """Where the adapters are now."""


@asynccontextmanager
async def while_open(doing: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine beside the block, and cancel it at the end of that."""
    task = asyncio.create_task(doing)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
