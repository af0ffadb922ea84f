"""What glibc does with freed memory, for as long as the work at hand lasts.

    with freed_blocks_returned(): ...       loading: to the system at once
    with freed_blocks_kept(): ...           training: ready for the next step, which asks again

glibc returns each block over its mmap threshold to the system, and faults its pages in anew when it
is asked for again; what lies under the threshold stays, in pieces. Both thresholds must be set:
setting one of them switches off the rule by which the other adapts, and nothing switches it on
again. So a scope ends with the thresholds at which that rule arrives in a process that frees large
blocks. Elsewhere (musl, macOS, Windows) nothing is done.
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
    """For steps that free and ask for the same large blocks again and again.

    True where it is possible.
    """
    try:
        yield _set_thresholds(_LARGEST_MMAP_THRESHOLD, 1 << 30)
    finally:
        _set_thresholds(*_ADAPTED)


@contextmanager
def freed_blocks_returned() -> Iterator[bool]:
    """For one pass over large tensors between which small ones stay: 1.4 GB at the peak of loading
    2.2 GB as NF4 become 0.9. True where it is possible.
    """
    try:
        yield _set_thresholds(1 << 20, 1 << 20)
    finally:
        _set_thresholds(*_ADAPTED)


def _set_thresholds(mmap: int, trim: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap) and mallopt(_M_TRIM_THRESHOLD, trim))
