"""Work side by side in helper processes, each on its share of the cores. What they make, they leave on disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
from tqdm import tqdm

from . import progress
from .memory import keep_memory

BUSY = False  # in a helper: whether it works on something


def usual_jobs(device: torch.device) -> int:
    """The cores on a CPU, where small models leave a second thread little to do; 1 on CUDA."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device.type == "cpu" else 1


@contextmanager
def helpers(jobs: int) -> Iterator[Callable[..., Future]]:
    """A function submit(function, *arguments) → its future. Leaving the block ends the helpers, whatever they do.

    A future raises what its function raised, and ValueError where the helper was killed.
    """
    context = multiprocessing.get_context("spawn")
    threads, line, lock = max(1, torch.get_num_threads() // jobs), context.Value("i", 0), context.RLock()
    tqdm.set_lock(lock)
    pool = ProcessPoolExecutor(jobs, context, begin, (threads, line, lock))
    try:
        yield lambda function, *arguments: pool.submit(work, function, *arguments)
    except BrokenProcessPool:
        raise ValueError("a helper process was killed, or memory ran out; the same command goes on from the last checkpoint; "
                         "with --jobs 1 it needs less memory") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for helper in multiprocessing.active_children():
            helper.join(0.2)  # after Ctrl-C they note the time that they have worked
            helper.terminate()


def begin(threads: int, line: Any, lock: Any) -> None:
    """What a helper does first."""
    torch.set_num_threads(threads)
    keep_memory()
    with line.get_lock():
        progress.LINE, line.value = line.value, line.value + 1
    tqdm.set_lock(lock)
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=end_with_parent, daemon=True).start()


def work(function: Callable, *arguments: Any) -> Any:
    global BUSY
    BUSY = True
    try:
        return function(*arguments)
    finally:
        BUSY = False


def interrupt(number: int, frame: Any) -> None:
    """Ctrl-C reaches every process of the terminal: one that waits for work just ends."""
    if not BUSY:
        os._exit(0)
    raise KeyboardInterrupt


def end_with_parent() -> None:
    """Else a helper would go on for hours after its parent was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
