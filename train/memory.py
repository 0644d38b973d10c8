"""Memory that a training on a CPU asks for again and again."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed; whether it does.

    By default large blocks go back to the kernel at once, and every activation of every step is zeroed anew, page by
    page: a tenth of a step, a quarter of a compiled one. Started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the
    environment, a process has its memory in huge pages besides, which saves as much again. False without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*option) for option in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, 2**26)))
