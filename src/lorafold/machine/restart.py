"""Restart the process with environment variables that make training faster; libraries read these
only when a process starts.

    GLIBC_TUNABLES                    huge pages for the heap, where the kernel gives them on
                                      request
    LRU_CACHE_CAPACITY,
    ONEDNN_PRIMITIVE_CACHE_CAPACITY   the number of product kernels, by shape, that torch and oneDNN
                                      keep: by default 1024, of 0.7 MB each

A variable that is set already stays as it is, and with LORAFOLD_TUNE=off nothing is changed.
SmolLM2-135M on two cores: huge pages take 0.88 of the time. After 18 steps on rows of mixed length
the process takes a constant 1.57 GB, instead of 1.96 GB and 30 MB more with every step.
"""

import os
import platform
import re
import sys
from pathlib import Path

SWITCH = "LORAFOLD_TUNE"
WISHES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def wishes() -> dict[str, str]:
    """The variables, with their values, that this process should have and does not."""
    if os.environ.get(SWITCH) == "off" or platform.libc_ver()[0] != "glibc":
        return {}
    asked = HUGE_PAGES if huge_pages() == "madvise" else {}
    return {name: value for name, value in (WISHES | asked).items() if name not in os.environ}


def huge_pages() -> str | None:
    """To whom the kernel gives huge pages: always, madvise (those who ask) or never; None where it
    does not say.
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return found and found[1]


def restart_tuned() -> None:
    """Restart this process with the same arguments if a variable is missing.

    Call it before the process has done anything.
    """
    if missing := wishes():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)
