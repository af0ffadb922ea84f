"""Processes share work through a directory: each file is made once, also if a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import SoftFileLease

from lorafold.errors import LorafoldError
from lorafold.files import claims
from lorafold.files.claims import (
    SUFFIX,
    TOKEN,
    VARIABLE,
    check_token,
    report_other_claims,
    share_work,
)

# Makes the paths whose names it is given; of each it first writes a line "NAME PROCESS" to a log.
# A path waits while there is a file NAME.hold.
WORKER = """
import os, sys, time
from functools import partial
from pathlib import Path
from lorafold.files import claims

folder, claims.LEASE, claims.POLL_SECONDS = Path(sys.argv[1]), float(sys.argv[2]), 0.02

def make(name):
    with (folder / "log").open("a") as log:
        log.write(f"{name} {os.getpid()}\\n")
    while (folder / f"{name}.hold").exists():
        time.sleep(0.02)
    partial_ = folder / f".{name}.{os.getpid()}"
    partial_.write_text(name)
    partial_.rename(folder / name)

say = partial(print, file=sys.stderr, flush=True)
claims.share_work({folder / name: partial(make, name) for name in sys.argv[3:]}, say=say)
"""
LONG = 60.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def worker(*names: str, lease: float = LONG) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(lease), *names]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield worker
    for one in started:
        one.kill()
        one.wait()
        one.stderr.close()


def until(true: Callable[[], object]) -> None:
    while not true():
        time.sleep(0.02)


def made(folder: Path) -> list[tuple[str, int]]:
    """(name, process) of everything that was begun."""
    text = (folder / "log").read_text() if (folder / "log").exists() else ""
    return [(name, int(process)) for name, process in map(str.split, text.splitlines())]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("log", TOKEN))


def test_each_is_made_once_and_all_return_when_all_are_there(start, tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(40)]
    for one in [start(*names), start(*reversed(names)), start(*names)]:
        assert one.wait() == 0
        assert left(tmp_path) == sorted(names)  # no claim and nothing half-written is left
    assert Counter(name for name, _ in made(tmp_path)) == Counter(names)


def test_what_a_dead_process_held_is_taken_over_and_nothing_else_again(start, tmp_path) -> None:
    (tmp_path / "b.hold").touch()
    first = start("a", "b", "c")
    until(lambda: len(made(tmp_path)) == 2)
    first.kill()
    first.wait()
    (tmp_path / "b.hold").unlink()
    assert (tmp_path / f"b{SUFFIX}").exists()
    second = start("a", "b", "c")
    assert second.wait() == 0
    assert made(tmp_path) == [
        ("a", first.pid), ("b", first.pid), ("b", second.pid), ("c", second.pid)
    ]  # fmt: skip
    assert left(tmp_path) == ["a", "b", "c"]


def test_a_claim_that_nobody_touches_runs_out_and_its_holder_ends(start, tmp_path) -> None:
    """As where another machine is gone: its process can't be seen, and its claim stays as it is."""
    (tmp_path / "a.hold").touch()
    first = start("a", lease=1.0)
    until(lambda: made(tmp_path))
    first.send_signal(signal.SIGSTOP)
    second = start("a", lease=1.0)
    until(lambda: len(made(tmp_path)) == 2)
    first.send_signal(signal.SIGCONT)
    told = first.communicate()[1]
    assert first.returncode == -signal.SIGTERM
    assert f"a{SUFFIX}: taken over by another worker" in told
    (tmp_path / "a.hold").unlink()
    assert second.wait() == 0
    assert made(tmp_path) == [("a", first.pid), ("a", second.pid)]
    assert left(tmp_path) == ["a"]


def test_a_claim_that_is_touched_holds_whatever_its_machine_s_clock_says(start, tmp_path) -> None:
    (tmp_path / "a.hold").touch()
    first = start("a", lease=1.0)
    until(lambda: made(tmp_path))
    second = start("a", lease=1.0)
    for _ in range(30):  # three leases
        now = time.time() - 3600
        os.utime(tmp_path / f"a{SUFFIX}", (now, now))
        time.sleep(0.1)
    (tmp_path / "a.hold").unlink()
    assert (first.wait(), second.wait()) == (0, 0)
    assert made(tmp_path) == [("a", first.pid)]


def test_whoever_waits_says_for_whom(start, tmp_path: Path) -> None:
    (tmp_path / "a.hold").touch()
    first = start("a", "b")
    until(lambda: made(tmp_path))
    second = start("b", "a")
    until(lambda: (tmp_path / "b").exists())
    assert second.stderr is not None
    assert second.stderr.readline().startswith(f"waiting for a (process {first.pid} on ")
    (tmp_path / "a.hold").unlink()
    assert (first.wait(), second.wait()) == (0, 0)


def test_an_error_gives_the_claim_up(tmp_path: Path) -> None:
    def fail() -> None:
        raise LorafoldError("no")

    with pytest.raises(LorafoldError, match="no"):
        share_work({tmp_path / "a": fail})
    assert left(tmp_path) == []
    share_work({tmp_path / "a": (tmp_path / "a").touch}, done := [].append)
    assert left(tmp_path) == ["a"]
    assert done.__self__ == [tmp_path / "a"]


def test_claims_on_other_work_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    with SoftFileLease(f"{tmp_path / 'lora-0-aa.json'}{SUFFIX}", lease_duration=claims.LEASE):
        report_other_claims([tmp_path / "lora-0-aa.json"], said.append)
        assert said == []
        report_other_claims([tmp_path / "lora-0-bb.json"], said.append)
    assert len(said) == 1
    assert said[0].startswith("found claims on other work (lora-0-aa.json)")


@pytest.mark.parametrize(("written", "found"), [(None, "none"), ("b", "another"), ("a\n", None)])
def test_a_directory_that_is_not_shared_is_found_by_its_token(
    written: str | None, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_token(tmp_path / "absent")  # nobody gave one
    monkeypatch.setenv(VARIABLE, "a")
    if written is not None:
        (tmp_path / TOKEN).write_text(written)
    if found is None:
        return check_token(tmp_path)
    with pytest.raises(LorafoldError, match=f"token: found {found}, expected the token in"):
        check_token(tmp_path)
