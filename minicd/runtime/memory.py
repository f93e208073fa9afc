"""Keep freed memory for the next step instead of returning it to the system after each."""

from __future__ import annotations

import ctypes
import gc
import os

import torch

THRESHOLDS = {-1: 2**30, -3: 2**30}  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes


def keep_memory() -> None:
    """Raise glibc's thresholds: else up to a third of a run's CPU time goes into clearing pages again.

    Environment variables that set the same (MALLOC_TRIM_THRESHOLD_, …) take precedence.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    for parameter, size in THRESHOLDS.items():
        glibc("mallopt", parameter, size)


def return_memory() -> None:
    """Between two stages: what the last one held goes back to the system, and to other processes."""
    gc.collect()
    glibc("malloc_trim", 0)
    torch.cuda.empty_cache()


def glibc(name: str, *arguments: int) -> None:
    """Call one of its functions, where it is."""
    try:
        function = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return
    function(*arguments)
