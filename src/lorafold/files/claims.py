"""Work shared by several processes or machines through one directory.

Each path is made by one process, which holds `<path>.claim` meanwhile. A claim is created
exclusively and touched regularly. Another process takes it if its holder is dead
(on the same machine), or has not touched it for LEASE seconds by the waiting process's clock, since
clocks differ (filelock's `SoftFileLease`). Claims are in the same directory as their paths, so that
on NFS whoever creates a claim sees what its previous holder wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import LeaseCompromise, SoftFileLease, Timeout
from pydantic import TypeAdapter

from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import read_object, write_json

SUFFIX = ".claim"
LEASE = 60.0  # seconds; a claim is touched three times in it
POLL_SECONDS = 1.0  # seconds between checks for others' results
TOKEN = "token"  # a file in the shared directory; its expected content is in VARIABLE
VARIABLE = "LORAFOLD_TOKEN"
DIGITS = 12
Result = TypeVar("Result")


def silent(text: str) -> None:
    """Prints nothing."""


def share_work(
    work: Mapping[Path, Callable[[], object]],
    done: Callable[[Path], object] = lambda path: None,
    say: Callable[[str], object] = silent,
) -> None:
    """Returns when every path exists, made by `work` here or in another process. `done` is called
    with each path; `say` receives the processes that this one waits for.
    """
    claims = {
        path: SoftFileLease(f"{path}{SUFFIX}", lease_duration=LEASE, on_compromise=_stop)
        for path in work
    }
    waited = False
    while claims:
        before = len(claims)
        for path, claim in [*claims.items()]:
            if path.exists() or _make_claimed(path, claim, work[path]):
                del claims[path]
                done(path)
        if claims and len(claims) == before:
            if not waited:
                say(f"waiting for {', '.join(map(_holder, claims.values()))}")
            waited = True
            time.sleep(POLL_SECONDS)


def report_other_claims(work: Iterable[Path], say: Callable[[str], object]) -> None:
    """Reports claims next to `work` on paths that this process doesn't share."""
    own = set(work)
    claims = {claim for folder in {p.parent for p in own} for claim in folder.glob(f"*{SUFFIX}")}
    found = {claim.name.removesuffix(SUFFIX) for claim in claims} - {path.name for path in own}
    if found:
        say(
            f"found claims on other work ({listed(sorted(found))}); workers share work only if they"
            " have the same arguments, data, versions and kind of device"
        )


def check_token(folder: Path) -> None:
    """Raises unless the directory contains the token in the environment: otherwise each worker has
    a separate directory of the same name.
    """
    expected = os.environ.get(VARIABLE)
    if expected is None:
        return
    found = None
    with suppress(OSError, UnicodeDecodeError):
        found = (folder / TOKEN).read_text(encoding="utf-8").strip()
    if found != expected.strip():
        there = "none" if found is None else "another"
        raise LorafoldError(
            f"{folder / TOKEN}: found {there}, expected the token in {VARIABLE} from the start of"
            " the workers; use a directory that all machines share"
        )


def _make_claimed(path: Path, claim: SoftFileLease, make: Callable[[], object]) -> bool:
    try:
        claim.acquire(blocking=False)
    except Timeout:
        return False
    except OSError as error:
        raise LorafoldError(f"{path}{SUFFIX}: can't be written: {error.strerror}") from error
    try:
        if not path.exists():  # the previous holder may have finished it
            make()
    finally:
        claim.release()
    return True


def _stop(found: LeaseCompromise) -> None:
    """Ends this process like SIGTERM, because another took its claim while it was suspended or its
    file system hung, and no two may do the same work.
    """
    reason = f"taken over by another worker ({found.reason}); this worker stops"
    print(f"{found.lock_file}: {reason}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _holder(claim: SoftFileLease) -> str:
    owner, name = claim.owner, Path(claim.lock_file).name.removesuffix(SUFFIX)
    return name if owner is None else f"{name} (process {owner.pid} on {owner.hostname})"


def measure_all(
    kind: type[Result],
    cells: Mapping[Path, Callable[[], Result]],
    done: Callable[[Path, Result], object] = lambda file, result: None,
    say: Callable[[str], object] = silent,
) -> dict[Path, Result]:
    """Returns the result of each cell, a dataclass of this kind, in order. Missing ones are
    computed here or by another process; `done` is called with each.
    """
    stored, results = TypeAdapter(kind), {}

    def there(file: Path) -> None:
        results[file] = stored.validate_python(read_object(file))
        done(file, results[file])

    def write(file: Path, cell: Callable[[], Any]) -> None:
        write_json(file, asdict(cell()))

    share_work({file: partial(write, file, cell) for file, cell in cells.items()}, there, say)
    return {file: results[file] for file in cells}


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
