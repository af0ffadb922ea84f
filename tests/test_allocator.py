"""A process that begins again with huge pages is the same process: its arguments, its input, its exit code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lorafold.io.allocator import TUNABLES

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
POSSIBLE = platform.libc_ver()[0] == "glibc" and MODE.exists() and "[madvise]" in MODE.read_text()
restarts = pytest.mark.skipif(not POSSIBLE, reason="glibc, and a kernel that gives huge pages to those who ask, are what it is for")

PROGRAM = """
import os, sys
from lorafold.io.allocator import restart_with_huge_pages
print("begun", flush=True)
restart_with_huge_pages()
print(os.getpid(), repr(os.environ.get("GLIBC_TUNABLES")), sys.argv[1:], sys.flags.dev_mode, sys.stdin.readline().strip())
sys.exit(7)
"""
ARGUMENTS = ["train", "--set", "a b", "", "*", "ü"]
TUNED = "glibc.malloc.hugetlb=1"


def begin(tmp_path: Path, how: str, tunables: str | None) -> tuple[int, int, list[str]]:
    """Exit code, process id, and the lines of the program, run as a file, a command or a module."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    form = {"file": [str(tmp_path / "program.py")], "command": ["-c", PROGRAM], "module": ["-m", "program"]}[how]
    environment = {k: v for k, v in os.environ.items() if k != TUNABLES} | ({} if tunables is None else {TUNABLES: tunables})
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", *form, *ARGUMENTS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate("given on stdin\n", timeout=60)
    return process.returncode, process.pid, out.splitlines()


@restarts
@pytest.mark.parametrize("how", ["file", "command", "module"])
def test_it_begins_again_once_and_keeps_what_it_was_given(how: str, tmp_path: Path) -> None:
    code, pid, lines = begin(tmp_path, how, None)
    assert code == 7
    assert lines == ["begun", "begun", f"{pid} {TUNED!r} {ARGUMENTS!r} True given on stdin"]


@pytest.mark.parametrize("tunables", ["", "glibc.malloc.check=0"])
def test_a_variable_that_is_set_stays_as_it_is(tunables: str, tmp_path: Path) -> None:
    code, pid, lines = begin(tmp_path, "file", tunables)
    assert code == 7
    assert lines == ["begun", f"{pid} {tunables!r} {ARGUMENTS!r} True given on stdin"]
