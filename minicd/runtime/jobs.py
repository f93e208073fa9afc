"""Parallel work in helper processes, each on its share of the cores. Helpers leave their results on disk."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from tqdm import tqdm

from . import progress
from .memory import keep_memory

BUSY, ENDING = False, False  # in a helper: whether it has work, whether Ctrl-C came
PATIENCE = 10  # seconds for its last step


def usual_jobs(device: torch.device) -> int:
    """On a CPU one for each core, since small models gain little from a second thread; 1 on CUDA."""
    return cores() if device.type == "cpu" else 1


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Those that this process may use, also where its container has only a share of them."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share, _, period = (quota.read_text() if quota.exists() else "").strip().partition(" ")
    return min(found, math.ceil(int(share) / int(period))) if share.isdigit() else found


@contextmanager
def helpers(jobs: int) -> Iterator[Callable[..., Future]]:
    """A function submit(function, *arguments) → its future. Leaving the block ends the helpers.

    A future raises what its function raised, or ValueError where the helper was killed.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, min(torch.get_num_threads(), cores()) // jobs)
    line, lock = context.Value("i", 0), context.RLock()
    tqdm.set_lock(lock)
    pool = ProcessPoolExecutor(jobs, context, begin, (threads, line, lock))
    try:
        yield lambda function, *arguments: submit(pool, function, *arguments)
    except BrokenProcessPool:
        raise ValueError("a helper process was killed, or memory ran out; the same command goes on from the "
                         "last checkpoint; with --jobs 1 it needs less memory") from None
    finally:
        with interrupts_to(signal.SIG_IGN):  # a second Ctrl-C would leave helpers behind, and wait for them
            pool.shutdown(wait=False, cancel_futures=True)
            end_all(multiprocessing.active_children())


def end_all(helpers: list) -> None:
    """As by Ctrl-C, which at a terminal has told them already: first they note their time."""
    for helper in helpers if os.name == "posix" else ():  # elsewhere this would kill
        with suppress(OSError):
            os.kill(helper.pid, signal.SIGINT)
    end = time.monotonic() + PATIENCE
    for helper in helpers:
        helper.join(max(0.0, end - time.monotonic()))
        helper.terminate()


def submit(pool: ProcessPoolExecutor, function: Callable, *arguments: Any) -> Future:
    """This may start a helper, for which Ctrl-C has to wait until it has begun: else it shows a traceback."""
    with later_interrupts():
        hold_interrupts(True)
        try:
            return pool.submit(work, function, *arguments)
        finally:
            hold_interrupts(False)


@contextmanager
def later_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C waits, even where another thread receives it, in spite of the mask of this one."""
    came: list[int] = []
    try:
        with interrupts_to(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def interrupts_to(handler: Any) -> Iterator[None]:
    """Inside, Ctrl-C calls this, unless it is ignored as in a script's background job.

    The main thread alone sees it, and may change that.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def hold_interrupts(hold: bool) -> None:
    """Processes that are started meanwhile inherit it."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, {signal.SIGINT})


def begin(threads: int, line: Any, lock: Any) -> None:
    """Prepare a helper."""
    torch.set_num_threads(threads)
    keep_memory()
    with line.get_lock():
        progress.LINE, line.value = line.value, line.value + 1
    tqdm.set_lock(lock)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background job
        signal.signal(signal.SIGINT, interrupt)
    hold_interrupts(False)
    threading.Thread(target=end_with_parent, daemon=True).start()


def work(function: Callable, *arguments: Any) -> Any:
    global BUSY
    BUSY = True
    try:
        if ENDING:  # since Ctrl-C came between two pieces of work
            raise KeyboardInterrupt
        return function(*arguments)
    finally:
        BUSY = False


def interrupt(number: int, frame: Any) -> None:
    """Ctrl-C reaches every process of the terminal. Once is enough.

    A helper without work is ended by its pool: if it ended by itself, the pool would kill the others, which
    still note their time.
    """
    global ENDING
    ENDING = True
    if BUSY:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt


def end_with_parent() -> None:
    """Else a helper would outlive a killed parent by hours."""
    multiprocessing.parent_process().join()
    os._exit(1)
