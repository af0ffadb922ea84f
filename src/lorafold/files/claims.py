"""Work shared by several processes or machines through one directory.

Each path is created by one process, which holds the lock file `<path>.claim` until it is done. It
creates the claim exclusively and touches it regularly. A waiting process takes over the claim if
its holder is a dead process on the same machine, or has not touched it for LEASE seconds. The
waiting process measures this time with its own clock, because machines' clocks differ (filelock's
`SoftFileLease`). A claim is in the same directory as its path, so that on NFS the process that
creates it sees all files of the previous holder.
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
LEASE = 60.0  # seconds; its holder touches a claim three times in each lease
POLL_SECONDS = 1.0  # seconds between checks for others' results
TOKEN = "token"  # a file in the shared directory; VARIABLE contains its expected content
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
    """Creates every path with its function in `work`, here or in another process that shares the
    work, and calls `done` with each path. If this process has to wait, `say` receives a message
    that names the other processes.
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
    """Reports claims next to the paths in `work` for paths that are not in it."""
    own = set(work)
    claims = {claim for folder in {p.parent for p in own} for claim in folder.glob(f"*{SUFFIX}")}
    found = {claim.name.removesuffix(SUFFIX) for claim in claims} - {path.name for path in own}
    if found:
        say(
            f"found claims on other work ({listed(sorted(found))}); workers share work only if they"
            " have the same arguments, data, versions and kind of device"
        )


def check_token(folder: Path) -> None:
    """Raises if the environment has a token that the directory doesn't contain. In that case, the
    workers have different directories of the same name, and can't share work.
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
            f"{folder / TOKEN}: found {there}, expected the token in {VARIABLE}; use a directory"
            " that all machines share"
        )


def _make_claimed(path: Path, claim: SoftFileLease, make: Callable[[], object]) -> bool:
    try:
        claim.acquire(blocking=False)
    except Timeout:
        return False
    except OSError as error:
        raise LorafoldError(f"{path}{SUFFIX}: can't be written: {error.strerror}") from error
    try:
        if not path.exists():  # the previous holder may have made it
            make()
    finally:
        claim.release()
    return True


def _stop(found: LeaseCompromise) -> None:
    """Ends this process with SIGTERM. Another process took over its claim while this one was
    suspended or its file system hung, and two processes must not do the same work.
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
    """Returns the results of a study's cells, dataclasses of type `kind`, in order. Missing results
    are computed, here or by another process, and stored as JSON. `done` is called with each file
    and its result.
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
