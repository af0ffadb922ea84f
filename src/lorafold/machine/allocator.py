"""What glibc does with freed memory, set for the work at hand: loading gives it back at once,
training keeps it.

glibc returns each block over its mmap threshold to the system, and faults its pages in anew when it
is asked for again; what lies under the threshold stays, in pieces. Both thresholds must be set:
setting one of them switches off the rule by which the other adapts. Elsewhere (musl, macOS,
Windows) nothing is done.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the most glibc accepts


def keep_freed_blocks() -> bool:
    """For steps that free and ask for the same large blocks again and again.

    True where it is possible.
    """
    return _set_thresholds(_LARGEST_MMAP_THRESHOLD, 1 << 30)


def return_freed_blocks() -> bool:
    """For one pass over large tensors between which small ones stay: 1.4 GB at the peak of loading
    2.2 GB as NF4 become 0.9.
    """
    return _set_thresholds(1 << 20, 1 << 20)


def _set_thresholds(mmap: int, trim: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap) and mallopt(_M_TRIM_THRESHOLD, trim))
