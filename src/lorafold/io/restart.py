"""A process begun again in the environment that suits training: libraries read such wishes when a process starts, and never again.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1   huge pages behind the heap, where the kernel gives them to those who ask
    GOMP_SPINCOUNT=SPINS                    OpenMP's threads wait for each other some microseconds before they sleep, not milliseconds

A variable that is set stays as it is, and LORAFOLD_TUNE=off leaves everything alone. SmolLM2-135M, a step of 4 x 256 tokens on two cores:
0.88 of the time with huge pages; beside two busy processes 8 s instead of 28, since a thread that spins keeps the one it waits for from
running.
"""

import os
import platform
import sys
from pathlib import Path

SWITCH = "LORAFOLD_TUNE"
SPINS = "10000"


def wishes() -> dict[str, str]:
    """The variables that are missing here."""
    if os.environ.get(SWITCH) == "off" or platform.libc_ver()[0] != "glibc":
        return {}
    found = {}
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" not in os.environ and pages.exists() and "[madvise]" in pages.read_text():
        found["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        found["GOMP_SPINCOUNT"] = SPINS
    return found


def restart_tuned() -> None:
    """Begin this process again, with its arguments, if something is missing. Call it before anything is done."""
    if missing := wishes():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)
