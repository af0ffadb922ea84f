"""Work that several processes share through one directory, on one machine or on many.

    shared({out / "a.json": make_a, out / "b.json": make_b}, done, say)

Whoever is given the same paths makes them together: each is made by one process, which holds
`<path>.claim` meanwhile, and all return when every path is there. A claim is made by exclusive
creation and shows that its holder lives by being touched. It falls to another process when its
holder is dead, as processes of one machine see, or has not touched it for LEASE seconds; these are
counted by the clock of the one who waits, since clocks of several machines differ (filelock's
`SoftFileLease`). Claims lie beside what they are for: on NFS, whoever has made one sees what was in
that directory when the claim before was given up.

`measured` stores the result of each cell of a study in a file of its own, whose name has the digest
of everything that it depends on: the same call continues where it stopped, and processes share the
work.
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

CLAIM = ".claim"
LEASE = 60.0  # seconds; a claim is touched three times in it
PAUSE = 1.0  # seconds between two looks at what others make
TOKEN = "token"  # a file in a directory that workers share, and what is in it, in the environment
VARIABLE = "LORAFOLD_TOKEN"
DIGITS = 12
Result = TypeVar("Result")  # of a cell


def silent(text: str) -> None:
    """Print nothing."""


def shared(
    work: Mapping[Path, Callable[[], object]],
    done: Callable[[Path], object] = lambda path: None,
    say: Callable[[str], object] = silent,
) -> None:
    """Return when every path exists, each made whole by `work` here or in another process. `done`
    is called with each; `say` receives the names of the processes that this one waits for.
    """
    claims = {
        path: SoftFileLease(f"{path}{CLAIM}", lease_duration=LEASE, on_compromise=_lost)
        for path in work
    }
    waited = False
    while claims:
        before = len(claims)
        for path, claim in [*claims.items()]:
            if path.exists() or _make(path, claim, work[path]):
                del claims[path]
                done(path)
        if claims and len(claims) == before:
            if not waited:
                say(f"waiting for {', '.join(map(_held, claims.values()))}")
            waited = True
            time.sleep(PAUSE)


def report_other_claims(work: Iterable[Path], say: Callable[[str], object]) -> None:
    """Report claims on other work beside `work`, all paths that this process is asked for."""
    own = set(work)
    claims = {claim for folder in {p.parent for p in own} for claim in folder.glob(f"*{CLAIM}")}
    found = {claim.name.removesuffix(CLAIM) for claim in claims} - {path.name for path in own}
    if found:
        say(
            f"found claims on {listed(sorted(found))}, which is other work: workers that differ in"
            " their arguments, data, versions or kind of device share nothing"
        )


def check_token(folder: Path) -> None:
    """Raise LorafoldError unless a directory contains the token that started this worker: otherwise
    each worker has a directory of its own under the same name, and nothing is shared.
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
            f"{folder / TOKEN}: found {there}, expected the token in {VARIABLE}, written when"
            " the workers were started: the directory is not the same on all machines"
        )


def _make(path: Path, claim: SoftFileLease, make: Callable[[], object]) -> bool:
    """Make a path under its claim; False if another process holds that."""
    try:
        claim.acquire(blocking=False)
    except Timeout:
        return False
    except OSError as error:
        raise LorafoldError(f"{path}{CLAIM}: can't be written: {error.strerror}") from error
    try:
        if not path.exists():  # it may have been finished before its claim was free
            make()
    finally:
        claim.release()
    return True


def _lost(found: LeaseCompromise) -> None:
    """End this process as SIGTERM does, so that no two continue the same work: it was suspended, or
    its file system did not answer.
    """
    reason = f"lost to another worker ({found.reason}); this one ends"
    print(f"{found.lock_file}: {reason}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _held(claim: SoftFileLease) -> str:
    owner, name = claim.owner, Path(claim.lock_file).name.removesuffix(CLAIM)
    return name if owner is None else f"{name} (process {owner.pid} on {owner.hostname})"


def measured(
    kind: type[Result],
    cells: Mapping[Path, Callable[[], Result]],
    done: Callable[[Path, Result], object] = lambda file, result: None,
    say: Callable[[str], object] = silent,
) -> dict[Path, Result]:
    """The result of each cell, a dataclass of this kind, in this order. Those whose file is not
    there are measured first, by this process or by another that is asked for the same; `done` is
    called with each as it is there.
    """
    stored, results = TypeAdapter(kind), {}

    def there(file: Path) -> None:
        results[file] = stored.validate_python(read_object(file))
        done(file, results[file])

    def write(file: Path, cell: Callable[[], Any]) -> None:
        write_json(file, asdict(cell()))

    shared({file: partial(write, file, cell) for file, cell in cells.items()}, there, say)
    return {file: results[file] for file in cells}


def digest_of(value: Any) -> str:
    """The first digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
