"""Keep freed memory in the process: on a CPU a training step frees and asks for the same large blocks again and again.

glibc returns each block over its mmap threshold to the system, and faults its pages in anew. Both thresholds must be set:
setting only the trim threshold switches the dynamic mmap threshold off. Elsewhere (musl, macOS, Windows) nothing is done.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the most glibc accepts


def keep_freed_blocks() -> bool:
    """Raise both thresholds for this process; True where that is possible."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 1 << 30))
