"""The tokens that tenants were given in this minute and on this day, by UTC.

A tenant's prompts and completions count, whichever of its keys asked. A key's limit is looked at
before a request begins, and what has begun may end: so a tenant may get more than its limit, by
what it had running. The counts are kept in a file, so that a restart gives nobody new tokens.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, NonNegativeInt

from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_text
from lorafold.serving.json_file import Strict, kept
from lorafold.serving.keys import Caller
from lorafold.serving.refusal import Refusal

log = logging.getLogger(__name__)
EVERY = 1.0  # seconds between two times that the file is written
MINUTE, DAY = 60, 86400


class Tally(Strict, frozen=False):
    """Tokens in one minute or on one day, which is numbered from 1970 on."""

    at: NonNegativeInt = 0
    tokens: NonNegativeInt = 0

    def add(self, tokens: int, at: int) -> None:
        """Tally tokens of the time with that number."""
        self.at, self.tokens = at, tokens + (self.tokens if at == self.at else 0)


class Tenant(Strict):
    """What one tenant was given."""

    minute: Tally = Field(default_factory=Tally)
    day: Tally = Field(default_factory=Tally)


class SpentFile(Strict):
    """The whole file."""

    tenants: dict[str, Tenant] = Field({})


class Spent:
    """The counts of one server; the event loop alone calls it. Raises LorafoldError for a file that
    can't be read.

    Args:
        needed: whether any key has a limit; else nothing is written.
        now: the time, in seconds since 1970.
    """

    def __init__(
        self, file: Path, needed: Callable[[], bool], now: Callable[[], float] = time.time
    ) -> None:
        self._file, self._needed, self._now = file, needed, now
        self._found = kept(file, SpentFile)
        self._changed = self._told = False

    def add(self, tenant: str, tokens: int) -> None:
        """Tally tokens that a tenant was given now."""
        if tokens:
            found, now = self._found.tenants.setdefault(tenant, Tenant()), int(self._now())
            found.minute.add(tokens, now // MINUTE)
            found.day.add(tokens, now // DAY)
            self._changed = True

    def check(self, caller: Caller) -> None:
        """Raise Refusal if the caller's tenant was given all that the key allows."""
        found, now = self._found.tenants.get(caller.tenant, Tenant()), self._now()
        for code, what, most, count, seconds in (
            ("token_limit_day", "day", caller.limits.tokens_per_day, found.day, DAY),
            ("token_limit_minute", "minute", caller.limits.tokens_per_minute, found.minute, MINUTE),
        ):
            if most is not None and count.at == now // seconds and count.tokens >= most:
                told = f"{count.tokens:,} tokens were used this {what}, the key allows {most:,}"
                left = math.ceil((count.at + 1) * seconds - now)
                raise Refusal(429, code, told, retry_after=max(1, left))

    async def keep(self) -> None:
        """Write the file again and again."""
        while True:
            await asyncio.sleep(EVERY)
            await self.save()

    async def save(self) -> None:
        """Write the file, beside the event loop, if it is needed and anything changed."""
        if not (self._changed and self._needed()):
            return
        today = int(self._now()) // DAY
        tenants = {name: one for name, one in self._found.tenants.items() if one.day.at == today}
        content, self._changed = SpentFile(tenants=tenants).model_dump_json() + "\n", False
        try:
            await asyncio.to_thread(write_text, self._file, content)
            self._told = False
        except LorafoldError as error:
            self._changed = True
            if not self._told:
                log.error("the tokens of tenants can't be kept: %s", error)
            self._told = True


def beside(state: Path) -> Path:
    """The file of the counts, which lies beside the state file."""
    return state.with_name(f"{state.stem}-tokens.json")
