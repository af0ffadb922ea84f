"""What computes, as the server knows it: nine calls, and the words that pass through them.

    async with backend.events(take):            it computes, and tells what is new after every step
        backend.load(found, "known")
        backend.submit(Request("1", prompt, 64, found.key))
        backend.cancel("1")

`lorafold.serving.engine_backend` is the one implementation, over `lorafold.engine`; nothing else
here knows more of an engine than this file says. Any thread may call; `length`, `ready` and
`states` answer at once.
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
    "LOST",
    "NOT_FINITE",
    "NUMBERS",
    "AdapterFiles",
    "Backend",
    "Ended",
    "News",
    "Request",
    "Sampling",
    "States",
    "Text",
    "Token",
    "Until",
    "guidance",
    "may_begin",
    "while_open",
]  # fmt: skip

LOST = "the engine stopped"  # the message of an end, as NOT_FINITE is one
Until = Literal["checked", "known", "begun", "resident"]


class AdapterFiles(Strict):
    """An adapter's files: where they are, what they are by digest, and what they say it is.

    `digest` is its identity together with those of the adapters below, and `old` the digest of its
    own files without its tokenizer, by which versions were known before; `manifest` says whether
    there is one among these. `over` is where the
    adapters below are, the lowest first, and `stack` the identities of what is read of these and of
    it, of `sizes` in bytes. `base` is the base that it names where it has no fingerprint to tell
    by, `other_base` and `other_storage` how its base differs from the one that is served, `form`
    the digest of what adapters have in common that differ in nothing but their values, `tokenizer`
    the digest of its tokenizer, or "" for the base's, and `words` where that is. `note` is for the
    administrator.
    """

    name: str
    path: Path
    digest: str
    old: str
    manifest: bool
    stack: tuple[str, ...]
    sizes: tuple[int, ...] = ()  # what an older version kept has none, and is verified again
    over: tuple[Path, ...] = ()
    method: str
    rank: int | None = None
    base: str = ""
    other_base: str = ""
    other_storage: str = ""
    form: str = ""
    tokenizer: str = ""
    words: Path | None = None
    note: str = ""

    @property
    def key(self) -> str:
        """The name of this version."""
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True)
class News:
    """What is new of one request: its events since the last news, when it got a slot, by
    time.monotonic, None while it waits, and once there are events, its prompt with the log
    probabilities that were asked for.
    """

    id: str
    events: Sequence[Token | Ended]
    began: float | None
    prompt: Sequence[Token] = ()


@dataclass(frozen=True)
class States:
    """Where the adapters are, and what was done with them.

    adapters: By name, of those that are not only files: `loading`, `resident` or `quarantined`, and
        the bytes in memory.
    seconds: How long it took to read them the last time, by name.
    nbytes, reads, evictions, damaged: The bytes of all, and how many adapters were read, made room,
        and changed in memory.
    alone: Why requests run one at a time, empty where they share what is computed.
    """

    adapters: Mapping[str, tuple[str, int]]
    seconds: Mapping[str, float]
    nbytes: int
    reads: int
    evictions: int
    damaged: int
    alone: str

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
            take: called in the event loop, with the news of all requests since the last call. Every
                request that was submitted has one `Ended`; those that a failure of the backend
                ended have LOST as its message.
        """

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request. It may take its time. Raises LorafoldError if it is refused."""

    @abstractmethod
    def cancel(self, id: str) -> None:
        """End a request within a step, if there is one of that name."""

    @abstractmethod
    def load(self, found: AdapterFiles, until: Until) -> None:
        """Make an adapter known under its key, so that requests may name it, whatever becomes of
        the process that computes. Requests that run go on with what they have.

        Args:
            found: the adapter's files, which have to be these whenever they are read.
            until: `known`: they are read once a request needs them, and what was counted of the
                adapter begins anew; `begun`: reading has begun; `resident`: it is in memory;
                `checked`: they are read and fit, and the adapter is not known by that. Raises
                LorafoldError for files that are wrong, of the last two.
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
    """Do something beside the block, for as long as that runs."""
    task = asyncio.create_task(doing)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
