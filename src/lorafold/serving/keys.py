"""Who calls: keys, of which only hashes are kept, their tenants, and the adapters they may use.

    {"keys": [{"tenant": "acme", "adapters": ["acme-*"], "sha256": "...",
               "expires": "2026-12-31", "base": false, "limits": {"tokens_per_day": 100000}}]}

A key has 32 random bytes, so that one SHA-256 is enough: no list of likely keys can be tried. All
hashes are compared, each in constant time, whether or not one fitted before. The file is read again
with every request, since a file's times and size don't show every change, so that a key is revoked
by deleting its entry. While the file can't be read, the keys are those of the last time. All but
the first three entries may be left out: a key then holds for good, may use the base, and has no
limit.

`Spent` counts the tokens that tenants were given in this minute and on this day, by UTC. A tenant's
prompts and completions count, whichever of its keys asked. A key's limit is looked at before a
request begins, and what has begun may end: so a tenant may get more than its limit, by what it had
running. The counts are kept in a file, so that a restart gives nobody new tokens.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import AwareDatetime, BeforeValidator, Field, NonNegativeInt, PositiveInt

from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_text
from lorafold.serving.errors import Refusal
from lorafold.serving.settings import Strict, content_of, kept, parsed, read, read_text

log = logging.getLogger(__name__)
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DATE, UNITS = re.compile(r"\d{4}-\d{2}-\d{2}"), {"d": "days", "h": "hours"}
LOCAL = "local"  # the tenant of all requests where there is no key file
ADMIN = "admin"
HINT = "new-key writes it"
EVERY = 1.0  # seconds between two times that the file is written
MINUTE, DAY = 60, 86400
PERIODS: dict[Literal["day", "minute"], int] = {"day": DAY, "minute": MINUTE}


class TokenLimits(Strict):
    """The most tokens of prompts and completions that a tenant is given, None for no limit."""

    tokens_per_minute: PositiveInt | None = None
    tokens_per_day: PositiveInt | None = None


UNLIMITED = TokenLimits()


def _end_of_day(value: object) -> object:
    day = isinstance(value, str) and DATE.fullmatch(value)
    try:
        return datetime.fromisoformat(f"{value}T00:00:00Z") + timedelta(days=1) if day else value
    except ValueError:
        return value


class Key(Strict):
    """One entry of the file. A date in `expires` is the last day, by UTC."""

    tenant: str = Field(pattern=f"^{TENANT.pattern}$")
    adapters: tuple[str, ...] = ("*",)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    expires: Annotated[AwareDatetime | None, BeforeValidator(_end_of_day)] = None
    base: bool = True
    limits: TokenLimits = UNLIMITED


class KeyFile(Strict):
    """The whole file."""

    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: its tenant, the names of adapters that it may use, as globs, whether
    it may use the base, and how many tokens it may be given.
    """

    tenant: str
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    limits: TokenLimits = UNLIMITED

    def may(self, name: str) -> bool:
        """Whether it may use the adapter or alias of that name."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


class Keys:
    """The keys of a server."""

    def __init__(self, file: Path | None, admin: Path | None, metrics: Path | None = None) -> None:
        self.file, self._keys, self._content = file, tuple[Key, ...](), b""
        if file is not None:
            self._read(file)
        self._admin, self._metrics = _own(admin), _own(metrics)
        if metrics is not None and self._metrics == self._admin:
            raise LorafoldError(
                f"{metrics}: found the key for administration, expected one of its own"
            )

    @property
    def tenants(self) -> tuple[str, ...]:
        """Everybody who may call."""
        named = dict.fromkeys(key.tenant for key in self._keys)
        return tuple(named) if self.file else (LOCAL,)

    @property
    def limited(self) -> bool:
        """Whether any key has a limit of tokens."""
        return any(key.limits != UNLIMITED for key in self._keys)

    def caller(self, authorization: str | None) -> Caller:
        """Who sent a request with this header."""
        hashed = _sent(authorization)
        if self._is_admin(hashed):
            return Caller(ADMIN)
        if self.file is None:
            return Caller(LOCAL)
        self.refresh()
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, hashed)]
        if not found:
            raise Refusal(401, "invalid_api_key", "found no valid key, expected one as Bearer")
        now = datetime.now(UTC)
        for key in found:
            if key.expires is None or now < key.expires:
                return Caller(key.tenant, key.adapters, key.base, key.limits)
        raise Refusal(401, "expired_api_key", "the key has expired, expected another one")

    def admin(self, authorization: str | None) -> Caller:
        """As `caller`, but for the administrator alone."""
        if not self._admin:
            told = "administration is closed: the server has no --admin-key-file"
            raise Refusal(403, "admin_closed", told)
        if not self._is_admin(_sent(authorization)):
            raise Refusal(401, "invalid_api_key", "found no key for administration, expected it")
        return Caller(ADMIN)

    def check_metrics(self, authorization: str | None) -> None:
        """Raise Refusal for whoever may not read the metrics. They name tenants: where there are
        keys, or one for them, that one or the administrator's is needed.
        """
        if self.file is None and not self._metrics:
            return
        hashed = _sent(authorization)
        if not hmac.compare_digest(self._metrics or "-" * 64, hashed):
            if not (self._admin or self._metrics):
                told = "the metrics are closed: the server has no --metrics-key-file"
                raise Refusal(403, "admin_closed", told)
            if not self._is_admin(hashed):
                told = "found no key for the metrics, expected it"
                raise Refusal(401, "invalid_api_key", told)

    def _is_admin(self, hashed: str) -> bool:
        return hmac.compare_digest(self._admin or "-" * 64, hashed)

    def refresh(self) -> bool:
        """Read the file again, and return whether that fails, so that the keys are those of before.
        """
        try:
            if self.file is not None:
                self._read(self.file)
            return False
        except LorafoldError as error:
            log.error("the keys stay as they were: %s", error)
            return True

    def _read(self, file: Path) -> None:
        if (content := content_of(file)) != self._content:
            self._keys = parsed(file, content, KeyFile, HINT).keys
            self._content = content


def new_key(file: Path, tenant: str, adapters: Sequence[str], **more: object) -> str:
    """Add a key to the file, which is made if there is none, and return it: it is kept nowhere."""
    if not TENANT.fullmatch(tenant) or tenant == ADMIN:
        raise LorafoldError(
            f"tenant: found {tenant!r}, expected up to 64 letters, digits and . _ -, not {ADMIN}"
        )
    key = f"lf-{secrets.token_urlsafe(32)}"
    try:
        with FileLock(f"{file}.lock"):
            known = read(file, KeyFile, HINT).keys if file.exists() else ()
            entry = {"tenant": tenant, "adapters": tuple(adapters), "sha256": _hash(key)}
            added = Key.model_validate(entry | more)
            content = KeyFile(keys=(*known, added)).model_dump(mode="json", exclude_unset=True)
            write_text(file, json.dumps(content, indent=2) + "\n")
            file.chmod(0o600)
    except OSError as error:
        raise LorafoldError(f"{file}: can't be written ({error.strerror})") from None
    return key


def until(text: str) -> datetime:
    """When a key expires that holds for so long (`30d`, `12h`), or to the end of a day by UTC
    (`2026-12-31`).
    """
    now = datetime.now(UTC).replace(microsecond=0)
    if found := re.fullmatch(r"([0-9]{1,5})([dh])", text):
        end: object = now + int(found[1]) * timedelta(**{UNITS[found[2]]: 1})
    else:
        end = _end_of_day(text)
    if not isinstance(end, datetime) or end <= now:
        raise LorafoldError(
            f"--expires: found {text!r}, expected a time to come: days as 30d, hours as 12h, or"
            " the last day as 2026-12-31"
        )
    return end


def _hash(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def _own(file: Path | None) -> str:
    """The hash of the one key in a file, empty without a file."""
    if file is None:
        return ""
    key = read_text(file).strip()
    if len(key) < 16:
        raise LorafoldError(f"{file}: found a key of {len(key)} characters, expected 16")
    return _hash(key)


def _sent(authorization: str | None) -> str:
    """The hash of the key in a header."""
    scheme, _, key = (authorization or "").partition(" ")
    return _hash(key.strip() if scheme.lower() == "bearer" else "")


class Tally(Strict, frozen=False):
    """Tokens in one minute or on one day, which is numbered from 1970 on."""

    at: NonNegativeInt = 0
    tokens: NonNegativeInt = 0

    def add(self, tokens: int, at: int) -> None:
        """Tally tokens of the time with that number."""
        self.at, self.tokens = at, tokens + (self.tokens if at == self.at else 0)


class SpentFile(Strict):
    """What each tenant was given, in the last minute and on the last day in which it was any."""

    tenants: dict[str, dict[Literal["day", "minute"], Tally]] = Field({})


class Spent:
    """The counts of one server; the event loop alone calls it."""

    def __init__(
        self, file: Path, needed: Callable[[], bool], now: Callable[[], float] = time.time
    ) -> None:
        self._file, self._needed, self._now = file, needed, now
        self._found = kept(file, SpentFile)
        self._changed = self._told = False

    def add(self, tenant: str, tokens: int) -> None:
        """Tally tokens that a tenant was given now."""
        if tokens:
            found, now = self._found.tenants.setdefault(tenant, {}), int(self._now())
            for what, seconds in PERIODS.items():
                found.setdefault(what, Tally()).add(tokens, now // seconds)
            self._changed = True

    def check(self, caller: Caller) -> None:
        """Raise Refusal if the caller's tenant was given all that the key allows."""
        found, now = self._found.tenants.get(caller.tenant, {}), self._now()
        for what, seconds in PERIODS.items():
            most, count = getattr(caller.limits, f"tokens_per_{what}"), found.get(what, Tally())
            if most is not None and count.at == now // seconds and count.tokens >= most:
                told = f"{count.tokens:,} tokens were used this {what}, the key allows {most:,}"
                left = max(1, math.ceil((count.at + 1) * seconds - now))
                code = "token_limit_day" if what == "day" else "token_limit_minute"
                raise Refusal(429, code, told, retry_after=left)

    async def keep(self) -> None:
        """Write the file again and again."""
        while True:
            await asyncio.sleep(EVERY)
            await self.save()

    async def save(self) -> None:
        """Write the file, beside the event loop, if it is needed and anything changed."""
        if not (self._changed and self._needed()):
            return
        today, found = int(self._now()) // DAY, self._found.tenants.items()
        tenants = {name: one for name, one in found if one.get("day", Tally()).at == today}
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
