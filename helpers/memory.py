"""Memory of the process: what the C library does with blocks that are freed.

glibc hands every large block back to the system at once and asks for it again a moment later, and
the system clears each of its pages at first touch. On a CPU the networks here then spend up to half
of their time on page faults: one pass of SAM's ViT-B encoder took 16.4 s, and 8.9 s with freed
blocks kept (two cores, same run).
"""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h, and the largest value that mallopt takes.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _INT_MAX = -1, -4, 2**31 - 1


def keep_freed_blocks() -> bool:
    """Let glibc keep freed blocks for the next array instead of handing them back.

    Called once, when :mod:`helpers` is imported. Whoever sets a variable of glibc's allocator
    (``MALLOC_MMAP_MAX_``, ``MALLOC_TRIM_THRESHOLD_`` and so on), or preloads another allocator,
    keeps that setting.

    Returns
    -------
    bool
        Whether anything was set; False on systems without glibc.
    """
    taken = any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ
    if not sys.platform.startswith("linux") or taken:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _INT_MAX))
