"""Memory of the CPU: what is freed stays for the next step, and a key/value cache has its bounds."""

from __future__ import annotations

import ctypes
import gc
import os
from os.path import commonprefix
from typing import Any, Callable, Sequence

import torch

CACHED_AT_ONCE = 2**29  # numbers in a cache, 2 GiB: without memory the system ends a program on the CPU
THRESHOLDS = {-1: 2**30, -3: 2**30}  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes
THRESHOLDS_SET = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # by the user


def keep_memory() -> None:
    """Raise glibc's thresholds: else up to a third of a run's CPU time goes into clearing pages again.

    Environment variables that can set the same take precedence.
    """
    if any(name in os.environ for name in THRESHOLDS_SET):
        return
    for parameter, size in THRESHOLDS.items():
        glibc("mallopt", parameter, size)


def return_memory() -> None:
    """Between two stages: what the last one held goes back to the system, and to other processes."""
    gc.collect()
    glibc("malloc_trim", 0)
    torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)


def glibc(name: str, *arguments: int) -> None:
    """Call one of its functions, where it is."""
    try:
        function = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return
    function(*arguments)


def room(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Callable[[int], int]:
    """Number of a prompt → how many no longer than it have room for their keys and values together.

    A decoder keeps what all prompts begin with once.
    """
    shared = 0 if hasattr(config, "num_decoder_layers") else len(commonprefix([list(p) for p in prompts]))
    return lambda i: rows_cached(config, len(prompts[i]) - shared + max_new_tokens)


def rows_cached(config: Any, tokens: int) -> int:
    """How many rows of so many tokens."""
    return max(1, CACHED_AT_ONCE // (tokens * cached_numbers(config)))


def cached_numbers(config: Any) -> int:
    """In the keys and values of a token."""
    kv_heads = getattr(config, "num_kv_heads", config.num_heads)
    return 2 * getattr(config, "num_decoder_layers", config.num_layers) * kv_heads * config.d_kv
