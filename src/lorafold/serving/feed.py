"""What changed of the models, told to all who listen: looked for once a second, for all of them.

    async for data in feed.events(caller, admin):     the whole list, then what changed since

Callers that may see the same models share a view, for which an event is written once. A listener
that does not take events as fast as they come gets the whole list again instead of those between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from lorafold.errors import STOPS
from lorafold.serving.keys import Caller
from lorafold.serving.listing import Look, changed, described, listed, look, sees
from lorafold.serving.server import Server
from lorafold.serving.wire.answers import event

log = logging.getLogger(__name__)
EACH = 1.0  # seconds between two looks
OURS = ""  # the name of no tenant, as which the feed thinks


class View:
    """What the listeners share that see the same models: the last event and its number."""

    def __init__(self, caller: Caller, admin: bool) -> None:
        self.caller, self.admin = caller, admin
        self.listeners, self.n, self.last, self.ended = 0, 0, b"", False
        self.next = asyncio.Event()

    def tell(self, data: bytes) -> None:
        """Tell an event."""
        self.n, self.last = self.n + 1, data
        self._wake()

    def end(self) -> None:
        """Let all listeners end."""
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self.next.set()
        self.next = asyncio.Event()


class Feed:
    """The changes of one server's models."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._views: dict[object, View] = {}
        self._now: Look | None = None
        self._status = ""
        self._begun = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def events(self, caller: Caller, admin: bool) -> AsyncGenerator[bytes, None]:
        """The whole list, then what changes, until the server ends.

        Args:
            admin: tell what is not served too, and why.
        """
        key = (caller.adapters, caller.base, admin)
        view = self._views.setdefault(key, View(caller, admin))
        view.listeners += 1
        if self._task is None:
            self._begun = asyncio.Event()
            self._task = asyncio.create_task(self._run())
        try:
            await self._begun.wait()  # what changes after the list is an event
            while not view.ended:
                n = view.n
                yield await self._server.host.think(lambda: self._whole(view), caller.tenant)
                while not view.ended:
                    if view.n == n:
                        await view.next.wait()
                    if view.n > n + 1:
                        break
                    if view.n > n:
                        n += 1
                        yield view.last
        finally:
            view.listeners -= 1
            if not view.listeners and self._views.get(key) is view:
                del self._views[key]

    def _whole(self, view: View) -> bytes:
        now = look(self._server)
        models = listed(self._server, view.caller, now, view.admin)
        told = {"status": self._server.host.ready, "administrator": view.admin}
        return event({"object": "list", "data": models} | told)

    async def _run(self) -> None:
        think = self._server.host.think
        try:
            self._now, self._status = await think(self._look, OURS)
            self._begun.set()
            while self._views:
                await asyncio.sleep(EACH)
                doing = partial(self._changes, list(self._views.values()))
                for view, data in await think(doing, OURS):
                    view.tell(data)
                if self._server.host.draining:
                    break
        except STOPS:
            raise
        except BaseException:
            log.exception("changes of the models can't be told")
            raise
        finally:
            self._task = None
            self._begun.set()
            for view in self._views.values():
                view.end()
            self._views.clear()

    def _look(self) -> tuple[Look, str]:
        return look(self._server), self._server.host.ready

    def _changes(self, views: list[View]) -> list[tuple[View, bytes]]:
        """The events of views that something changed for."""
        assert self._now is not None
        server, before, status = self._server, self._now, self._status
        self._now, self._status = now, ready = self._look()
        names, found = sorted(changed(before, now)), []
        for view in views:
            seen = [name for name in names if sees(server, view.caller, name)]
            models = {name: described(server, name, now, view.admin) for name in seen}
            gone = [
                name for name, model in models.items()
                if model is None and described(server, name, before, view.admin)
            ]  # fmt: skip
            new = [model for model in models.values() if model is not None]
            told: dict[str, Any] = {"object": "changes", "data": new, "removed": gone}
            if ready != status:
                told["status"] = ready
            if new or gone or ready != status:
                found.append((view, event(told)))
        return found
