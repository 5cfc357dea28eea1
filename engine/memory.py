"""Memory of the processor's that a training frees it will want again, at the next step."""
from __future__ import annotations

import ctypes
import mmap
import platform
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4          # glibc's malloc.h
LARGE = 64 << 20                              # bytes
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def keep_freed() -> None:
    """Have malloc keep what is freed instead of giving it back to the system. Where it is not glibc's, do nothing.

    Blocks above 32 MB are otherwise mapped for each request, and each of their pages is cleared by the kernel when it
    is first touched: a quarter of a step (docs/log.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    malloc = ctypes.CDLL(None)
    malloc.mallopt(M_MMAP_MAX, 0)
    malloc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
    malloc.mallopt(M_TOP_PAD, 64 << 20)


def empty_like(x: Tensor) -> Tensor:
    """torch's, dense. What is large and the processor's has memory apart, which the next of its size is given when all
    that share it are gone.

    In malloc's heap other tensors settle where one step's gradient of a table was; then the next step's does not fit
    there any more, and the heap grows by all of it.
    """
    if not x.is_cpu or x.nbytes < LARGE:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    spare = _spare[x.nbytes]
    memory = spare.pop() if spare else mmap.mmap(-1, x.nbytes, flags=PRIVATE)
    view = np.frombuffer(memory, np.uint8)        # lives as long as a tensor that shares it
    weakref.finalize(view, spare.append, memory).atexit = False
    return torch.from_numpy(view).view(x.dtype).view(x.shape)


_spare: defaultdict[int, list[mmap.mmap]] = defaultdict(list)          # by their bytes, as malloc has its own
