"""API keys, which are stored as hashes, with their tenants, adapters and limits.

Plain SHA-256 suffices, because new keys have 32 random bytes. The key file is read for every
request, because mtime and size don't reflect every change; deleting an entry revokes its key.
Limits are checked when a request begins, and may be exceeded while it runs.
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
from lorafold.recipe.parsing import read_text
from lorafold.serving.refusals import Refusal
from lorafold.serving.settings import Strict, content_of, parsed, read, read_if_exists

log = logging.getLogger(__name__)
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOCAL = "local"  # the tenant of all requests if there is no key file
ADMIN = "admin"
HINT = "create key files with lorafold serve new-key"
DAY_SECONDS = 86400
PERIODS: dict[Literal["day", "minute"], int] = {"day": DAY_SECONDS, "minute": 60}


class TokenLimits(Strict):
    tokens_per_minute: PositiveInt | None = None
    tokens_per_day: PositiveInt | None = None


UNLIMITED = TokenLimits()


def _end_of_day(value: object) -> object:
    day = isinstance(value, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value)
    try:
        return datetime.fromisoformat(f"{value}T00:00:00Z") + timedelta(days=1) if day else value
    except ValueError:
        return value


class Key(Strict):
    """An entry of a key file. A date in `expires` is the last valid day in UTC."""

    tenant: str = Field(pattern=f"^{TENANT.pattern}$")
    adapters: tuple[str, ...] = ("*",)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    expires: Annotated[AwareDatetime | None, BeforeValidator(_end_of_day)] = None
    base: bool = True
    limits: TokenLimits = UNLIMITED


class KeyFile(Strict):
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Caller:
    """The sender of a request. `adapters` are glob patterns of allowed names."""

    tenant: str
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    limits: TokenLimits = UNLIMITED

    def may_use(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


class Keys:
    """The keys of tenants (without a file, all callers but the administrator are LOCAL), the
    administrator's key (without a file, administration is off), and a key that can only read
    metrics.
    """

    def __init__(self, file: Path | None, admin: Path | None, metrics: Path | None = None) -> None:
        self.file, self._keys, self._content = file, tuple[Key, ...](), b""
        if file is not None:
            self._read(file)
        self._admin, self._metrics = _hash_in(admin), _hash_in(metrics)
        if metrics is not None and self._metrics == self._admin:
            raise LorafoldError(f"{metrics}: found the administrator's key, expected another key")

    @property
    def tenants(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.tenant for key in self._keys)) if self.file else (LOCAL,)

    @property
    def has_limits(self) -> bool:
        return any(key.limits != UNLIMITED for key in self._keys)

    def caller(self, authorization: str | None) -> Caller:
        sent = _sent_hash(authorization)
        if _hashes_equal(self._admin, sent):
            return Caller(ADMIN)
        if self.file is None:
            return Caller(LOCAL)
        self.refresh()
        keys = [key for key in self._keys if hmac.compare_digest(key.sha256, sent)]
        if not keys:
            raise _invalid("API key")
        now = datetime.now(UTC)
        for key in keys:
            if key.expires is None or now < key.expires:
                return Caller(key.tenant, key.adapters, key.base, key.limits)
        raise Refusal(401, "expired_api_key", "the API key has expired; use a new one")

    def admin(self, authorization: str | None) -> Caller:
        if not self._admin:
            message = "administration is off: the server was started without --admin-key-file"
            raise Refusal(403, "admin_closed", message)
        if not _hashes_equal(self._admin, _sent_hash(authorization)):
            raise _invalid("administrator key")
        return Caller(ADMIN)

    def check_metrics(self, authorization: str | None) -> None:
        """Raises unless the caller may read metrics, because they name tenants. If there are keys,
        only the metrics key and the administrator's key are allowed.
        """
        if self.file is None and not self._metrics:
            return
        sent = _sent_hash(authorization)
        if _hashes_equal(self._metrics, sent) or _hashes_equal(self._admin, sent):
            return
        if not (self._admin or self._metrics):
            message = "metrics are off: the server was started without --metrics-key-file"
            raise Refusal(403, "admin_closed", message)
        raise _invalid("key for metrics")

    def refresh(self) -> bool:
        """Reads the file again. If this fails, keeps the old keys and returns True."""
        try:
            if self.file is not None:
                self._read(self.file)
            return False
        except LorafoldError as error:
            log.error("the key file is not used, and the earlier keys still apply: %s", error)
            return True

    def _read(self, file: Path) -> None:
        if (content := content_of(file)) != self._content:
            self._keys = parsed(file, content, KeyFile, HINT).keys
            self._content = content


def new_key(file: Path, tenant: str, adapters: Sequence[str], **more: object) -> str:
    """Adds a new key to a new or existing file. Returns the key, which is not stored anywhere."""
    if not TENANT.fullmatch(tenant) or tenant == ADMIN:
        raise LorafoldError(
            f"tenant: found {tenant!r}, expected up to 64 letters, digits and . _ - (first a letter"
            f" or digit), except {ADMIN}"
        )
    key = f"lf-{secrets.token_urlsafe(32)}"
    try:
        with FileLock(f"{file}.lock"):
            known = read(file, KeyFile, HINT).keys if file.exists() else ()
            entry = {"tenant": tenant, "adapters": tuple(adapters), "sha256": _hash(key)}
            keys = KeyFile(keys=(*known, Key.model_validate(entry | more)))
            content = keys.model_dump(mode="json", exclude_unset=True)
            write_text(file, json.dumps(content, indent=2) + "\n")
            file.chmod(0o600)
    except OSError as error:
        raise LorafoldError(f"{file}: can't be written ({error.strerror})") from None
    return key


def parse_expiry(text: str) -> datetime:
    """Parses an expiry: a duration (`30d`, `12h`) or a last day (`2026-12-31`)."""
    now = datetime.now(UTC).replace(microsecond=0)
    end = _end_of_day(text)
    if match := re.fullmatch(r"([0-9]{1,5})([dh])", text):
        end = now + int(match[1]) * timedelta(hours=24 if match[2] == "d" else 1)
    if not isinstance(end, datetime) or end <= now:
        raise LorafoldError(
            f"--expires: found {text!r}, expected a time in the future: days (30d), hours (12h) or"
            " the last valid day (2026-12-31)"
        )
    return end


def _invalid(key: str) -> Refusal:
    return Refusal(
        401, "invalid_api_key", f"found no valid {key}; send it as Authorization: Bearer KEY"
        " or as x-api-key: KEY",
    )


def _hash(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def _hash_in(file: Path | None) -> str:
    if file is None:
        return ""
    key = read_text(file, "a key").strip()
    if len(key) < 16:
        raise LorafoldError(f"{file}: found a key of {len(key)} characters, expected at least 16")
    return _hash(key)


def _sent_hash(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return _hash(key.strip() if scheme.lower() == "bearer" else "")


def _hashes_equal(hashed: str, sent: str) -> bool:
    """Compares two hashes in constant time. An empty `hashed` never matches."""
    return hmac.compare_digest(hashed or "-" * 64, sent)


class Tally(Strict):
    at: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class UsageFile(Strict):
    tenants: dict[str, dict[Literal["day", "minute"], Tally]] = Field({})


class TokenUsage:
    """The tokens of each tenant in the current UTC minute and day. If a key has a limit
    (`must_save`), they are saved to a file, so that a restart doesn't reset limits.
    """

    def __init__(
        self, file: Path, must_save: Callable[[], bool], now: Callable[[], float] = time.time
    ) -> None:
        self._file, self._must_save, self._now = file, must_save, now
        self._tenants = read_if_exists(file, UsageFile).tenants
        self._changed = self._failed = False

    def add(self, tenant: str, tokens: int) -> None:
        if tokens:
            used, now = self._tenants.setdefault(tenant, {}), int(self._now())
            for period, seconds in PERIODS.items():
                at, before = now // seconds, used.get(period, Tally())
                total = tokens + (before.tokens if before.at == at else 0)
                used[period] = Tally(at=at, tokens=total)
            self._changed = True

    def check(self, caller: Caller) -> None:
        counts, now = self._tenants.get(caller.tenant, {}), self._now()
        for period, seconds in PERIODS.items():
            limit = getattr(caller.limits, f"tokens_per_{period}")
            count = counts.get(period, Tally())
            if limit is not None and count.at == now // seconds and count.tokens >= limit:
                used = f"{count.tokens:,} tokens were used in this UTC {period}"
                left = max(1, math.ceil((count.at + 1) * seconds - now))
                message = f"{used}, and the key's limit is {limit:,}"
                code = "token_limit_day" if period == "day" else "token_limit_minute"
                raise Refusal(429, code, message, retry_after=left)

    async def keep_saving(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self.save()

    async def save(self) -> None:
        if not (self._changed and self._must_save()):
            return
        today = int(self._now()) // DAY_SECONDS
        tenants = {n: u for n, u in self._tenants.items() if u.get("day", Tally()).at == today}
        content, self._changed = UsageFile(tenants=tenants).model_dump_json() + "\n", False
        try:
            await asyncio.to_thread(write_text, self._file, content)
            self._failed = False
        except LorafoldError as error:
            self._changed = True
            if not self._failed:
                log.error("the tenants' token counts can't be saved: %s", error)
            self._failed = True
