"""Control whether glibc keeps freed memory or returns it to the system.

    with freed_blocks_returned(): ...       for loading: freed blocks go back to the system at once
    with freed_blocks_kept(): ...           for training: they are kept, since each step needs them
    give_back()                             now, after much was freed

Each context first returns what is free already, so that the memory of one phase of a run does not
come on top of the next one's.

glibc returns freed blocks above its mmap threshold to the system, and the next allocation faults
their pages in again; smaller blocks stay in the process, fragmented. Both thresholds must be set,
because setting one of them switches off for good the rule by which glibc adapts the other.
Therefore each context ends with the thresholds that this rule reaches in a process that frees large
blocks. With other C libraries (musl, macOS, Windows) nothing is done.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the most glibc accepts
_ADAPTED = (_LARGEST_MMAP_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)


@contextmanager
def freed_blocks_kept() -> Iterator[bool]:
    """Keep freed blocks: for steps that allocate and free the same large blocks again and again.
    They are returned at the end.

    Yields whether that is possible on this system.
    """
    try:
        yield _set_thresholds(_LARGEST_MMAP_THRESHOLD, 1 << 30)
    finally:
        _set_thresholds(*_ADAPTED)


@contextmanager
def freed_blocks_returned() -> Iterator[bool]:
    """Return freed blocks: for one pass over large tensors that leaves small ones between them.
    Loading 2.2 GB as NF4 peaks at 0.9 GB instead of 1.4.

    Yields whether that is possible on this system.
    """
    try:
        yield _set_thresholds(1 << 20, 1 << 20)
    finally:
        _set_thresholds(*_ADAPTED)


def give_back() -> None:
    """Return freed blocks to the system now: a flood of requests left 70 MB in fragments."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _set_thresholds(mmap: int, trim: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    ctypes.CDLL(None).malloc_trim(0)
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap) and mallopt(_M_TRIM_THRESHOLD, trim))
