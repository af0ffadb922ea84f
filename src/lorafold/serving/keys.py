"""Who calls: keys, of which only hashes are kept, their tenants, and the adapters they may use.

    {"keys": [{"tenant": "acme", "adapters": ["acme-*"], "sha256": "..."}]}

A key has 32 random bytes, so that one SHA-256 is enough: no list of likely keys can be tried. All
hashes are compared, each in constant time, whether or not one fitted before. The file is read again
when it changes, so that a key is revoked by deleting its entry.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_text
from lorafold.serving.json_file import read
from lorafold.serving.refusal import Refusal

log = logging.getLogger(__name__)
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOCAL = "local"  # the tenant of all requests where there is no key file
ADMIN = "admin"


class Key(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field(pattern=f"^{TENANT.pattern}$")
    adapters: tuple[str, ...] = ("*",)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: its tenant, and the names of adapters that it may use, as globs."""

    tenant: str
    adapters: tuple[str, ...] = ("*",)

    def may(self, name: str) -> bool:
        """Whether it may use the adapter or alias of that name."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


class Keys:
    """The keys of a server. Raises LorafoldError for a file that can't be read.

    Args:
        file: the tenants' keys; None lets everybody in as LOCAL.
        admin: a file with the key for administration; None closes it.
    """

    def __init__(self, file: Path | None, admin: Path | None) -> None:
        self.file, self._admin, self._seen = file, "", 0
        self._keys: tuple[Key, ...] = ()
        if file is not None:
            self._seen, self._keys = _changed(file), read_keys(file).keys
        if admin is not None:
            try:
                key = admin.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise LorafoldError(f"{admin}: can't be read ({error})") from None
            if len(key) < 16:
                raise LorafoldError(f"{admin}: found a key of {len(key)} characters, expected 16")
            self._admin = _hash(key)

    @property
    def tenants(self) -> tuple[str, ...]:
        """Everybody who may call."""
        named = dict.fromkeys(key.tenant for key in self._keys)
        return tuple(named) if self.file else (LOCAL,)

    def caller(self, authorization: str | None) -> Caller:
        """Who sent a request with this header. Raises Refusal for a key that is not known."""
        hashed = _hash(_bearer(authorization))
        if self._is_admin(hashed):
            return Caller(ADMIN)
        if self.file is None:
            return Caller(LOCAL)
        self._refresh(self.file)
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, hashed)]
        if not found:
            raise Refusal(401, "invalid_api_key", "found no valid key, expected one as Bearer")
        return Caller(found[0].tenant, found[0].adapters)

    def admin(self, authorization: str | None) -> Caller:
        """As `caller`, but for the administrator alone."""
        if not self._admin:
            told = "administration is closed: the server has no --admin-key-file"
            raise Refusal(403, "admin_closed", told)
        if not self._is_admin(_hash(_bearer(authorization))):
            raise Refusal(401, "invalid_api_key", "found no key for administration, expected it")
        return Caller(ADMIN)

    def _is_admin(self, hashed: str) -> bool:
        return hmac.compare_digest(self._admin or "-" * 64, hashed)

    def _refresh(self, file: Path) -> None:
        changed = _changed(file)
        if changed != self._seen:
            self._seen = changed
            try:
                self._keys = read_keys(file).keys
            except LorafoldError as error:
                log.error("the keys stay as they were: %s", error)


def new_key(file: Path, tenant: str, adapters: Sequence[str]) -> str:
    """Add a key to the file, which is made if there is none, and return it: it is kept nowhere.

    Args:
        file: the keys.
        tenant: whose it is.
        adapters: the names of adapters that it may use, as globs.
    """
    if not TENANT.fullmatch(tenant) or tenant == ADMIN:
        raise LorafoldError(
            f"tenant: found {tenant!r}, expected up to 64 letters, digits and . _ -, not {ADMIN}"
        )
    key = f"lf-{secrets.token_urlsafe(32)}"
    try:
        with FileLock(f"{file}.lock"):
            known = read_keys(file).keys if file.exists() else ()
            added = Key(tenant=tenant, adapters=tuple(adapters), sha256=_hash(key))
            content = KeyFile(keys=(*known, added)).model_dump(mode="json")
            write_text(file, json.dumps(content, indent=2) + "\n")
            file.chmod(0o600)
    except OSError as error:
        raise LorafoldError(f"{file}: can't be written ({error.strerror})") from None
    return key


def read_keys(file: Path) -> KeyFile:
    """The content of a key file. Raises LorafoldError if it is not one."""
    return read(file, KeyFile, "new-key writes it")


def _hash(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
