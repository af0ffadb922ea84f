"""A process that restarts in another environment keeps its arguments, its input, its exit code."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lorafold.runtime.process_tuning import HUGE_PAGES, SWITCH, VARIABLES

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="there is nothing to set without glibc"
)

PROGRAM = """
import os, sys
from lorafold.runtime.process_tuning import restart_tuned
print("begun", flush=True)
restart_tuned()
kernels = os.environ.get("LRU_CACHE_CAPACITY")
print(os.getpid(), kernels, sys.argv[1:], sys.flags.dev_mode, sys.stdin.readline().strip())
print(os.environ.get("GLIBC_TUNABLES"))
sys.exit(7)
"""
ARGUMENTS = ["train", "--set", "a b", "", "*", "ü"]
TUNED = {*VARIABLES, *HUGE_PAGES, SWITCH}


def begin(tmp_path: Path, how: str, **variables: str) -> tuple[int, int, list[str]]:
    """Exit code, process id, and the lines of the program, run as a file, a command or a module."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    file = [str(tmp_path / "program.py")]
    form = {"file": file, "command": ["-c", PROGRAM], "module": ["-m", "program"]}[how]
    environment = {k: v for k, v in os.environ.items() if k not in TUNED} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", *form, *ARGUMENTS], env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = process.communicate("given on stdin\n", timeout=60)
    return process.returncode, process.pid, out.splitlines()


@pytest.mark.parametrize("how", ["file", "command", "module"])
def test_it_begins_again_once_and_keeps_what_it_was_given(how: str, tmp_path: Path) -> None:
    code, pid, lines = begin(tmp_path, how)
    assert code == 7
    kernels = VARIABLES["LRU_CACHE_CAPACITY"]
    assert lines[:-1] == ["begun"] * 2 + [f"{pid} {kernels} {ARGUMENTS!r} True given on stdin"]


def test_variables_that_are_set_stay_as_they_are(tmp_path: Path) -> None:
    own = {"LRU_CACHE_CAPACITY": "7", "GLIBC_TUNABLES": "glibc.malloc.check=0"}
    code, pid, lines = begin(tmp_path, "file", **own)
    assert code == 7
    last = [f"{pid} 7 {ARGUMENTS!r} True given on stdin", "glibc.malloc.check=0"]
    assert lines == ["begun", "begun", *last]


def test_the_switch_turns_it_off(tmp_path: Path) -> None:
    code, pid, lines = begin(tmp_path, "file", **{SWITCH: "off"})
    assert code == 7
    assert lines == ["begun", f"{pid} None {ARGUMENTS!r} True given on stdin", "None"]
