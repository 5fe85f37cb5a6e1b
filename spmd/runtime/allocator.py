"""The C library's allocator, set to keep freed memory: it holds the arrays of CPU devices."""

from __future__ import annotations

import ctypes
import os
import sys

# From malloc.h of glibc: parameter, value, the environment variable that says otherwise.
_OPTIONS = (
    (-4, 0, "MALLOC_MMAP_MAX_"),  # M_MMAP_MAX: no mapping of its own for a large array
    (-1, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_"),  # M_TRIM_THRESHOLD: the top of the heap stays
    (-2, 2**26, "MALLOC_TOP_PAD_"),  # M_TOP_PAD: and grows by 64 MiB at a time
)


def keep_freed_memory() -> bool:
    """Keep freed memory in this process (Linux with glibc); returns whether that is possible.

    XLA calls malloc for each array of each step. By default glibc maps those above 32 MiB, and often
    smaller ones, and unmaps them when freed, so that the kernel zeroes every page at every step: a quarter
    of the time of a small language model's step. Values set in the environment take precedence.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    settings = [(option, value) for option, value, name in _OPTIONS if name not in os.environ]
    return all(mallopt(option, value) for option, value in settings)
