"""Work side by side: what a helper raises arrives, a killed helper is a sentence; memory is kept where that helps."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from minicd.runtime import jobs
from minicd.runtime.jobs import cores, helpers, later_interrupts, usual_jobs
from minicd.runtime.lock import one_writer
from minicd.runtime.memory import THRESHOLDS_SET, glibc, keep_memory, return_memory


def shout(text: str) -> str:
    return text.upper()


def fail(text: str) -> None:
    raise ValueError(text)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def diverge() -> None:
    raise FloatingPointError("the loss at step 7 is nan")


def state() -> tuple[int, bool, str]:
    """Threads, whether Ctrl-C is held back, the name of what handles it."""
    handler = signal.getsignal(signal.SIGINT)
    return (torch.get_num_threads(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []),
            getattr(handler, "name", None) or handler.__name__)


@pytest.fixture
def on_interrupt():
    """A function that says what Ctrl-C does in this process during the test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_helpers_work_and_their_errors_arrive(on_interrupt, monkeypatch):
    on_interrupt(signal.default_int_handler)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)  # of this process; its helpers have their own
    monkeypatch.setattr("minicd.runtime.jobs.cores", lambda: 8)
    with helpers(2) as submit:
        first, second = submit(shout, "one"), submit(shout, "two")
        assert (first.result(), second.result()) == ("ONE", "TWO")
        with pytest.raises(ValueError, match="^the floor is 3$"):
            submit(fail, "the floor is 3").result()
        with pytest.raises(FloatingPointError, match="^the loss at step 7 is nan$"):
            submit(diverge).result()
        assert submit(shout, "still there").result() == "STILL THERE"
        assert submit(state).result() == (3, False, "interrupt")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not multiprocessing.active_children()


def test_a_killed_helper_is_a_sentence(on_interrupt):
    """Here in a program that does not mind Ctrl-C, so that its helpers do not either."""
    on_interrupt(signal.SIG_IGN)
    with pytest.raises(ValueError, match="a helper process was killed.*the same command goes on"):
        with helpers(1) as submit:
            assert submit(state).result()[2] == "SIG_IGN"
            submit(die).result()


def test_a_second_interrupt_leaves_no_helper_behind(on_interrupt, monkeypatch):
    on_interrupt(signal.default_int_handler)
    join = multiprocessing.process.BaseProcess.join

    def interrupted(process, *how):  # while the helper is waited for
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        join(process, *how)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with helpers(1) as submit:
            assert submit(shout, "one").result() == "ONE"
            submit(time.sleep, 60)
            raise KeyboardInterrupt
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_as_many_jobs_as_cores(monkeypatch):
    monkeypatch.setattr("minicd.runtime.jobs.cores", lambda: 3)
    assert usual_jobs(torch.device("cpu")) == 3 and usual_jobs(torch.device("cuda")) == 1


@pytest.mark.parametrize("quota, count", [(None, 3), ("max 100000\n", 3), ("150000 100000\n", 2), ("800000 100000\n", 3)])
def test_a_container_may_have_a_share_of_the_cores(quota, count, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    assert cores(tmp_path / "cpu.max") == count


def at_work(folder: Path) -> None:
    try:
        (folder / "began").touch()
        time.sleep(300)
    finally:
        time.sleep(1)  # a step goes on for a while
        (folder / "noted").touch()


def fail_beside(folder: Path) -> None:
    while not (folder / "began").exists():
        time.sleep(0.05)
    raise ValueError("another stage")


def test_after_an_error_the_other_helpers_note_their_time(tmp_path, on_interrupt):
    """Here one helper is at work when the block is left, and one is not."""
    on_interrupt(signal.default_int_handler)
    with pytest.raises(ValueError, match="another stage"), helpers(2) as submit:
        submit(at_work, tmp_path)
        submit(fail_beside, tmp_path).result()
    assert (tmp_path / "noted").exists()


def test_no_work_begins_after_ctrl_c(monkeypatch):
    """It may come while a helper loads, or between two pieces of work."""
    monkeypatch.setattr(jobs, "ENDING", False)
    assert jobs.work(shout, "one") == "ONE"
    jobs.interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        jobs.work(shout, "two")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    ended = multiprocessing.get_context("spawn").Process(target=shout, args=("",))
    ended.start()
    ended.join()
    gone, ours, other = (tmp_path / "seed-1" / name for name in (
        f".student.safetensors.{ended.pid}.tmp", f".student.safetensors.{os.getpid()}.tmp", ".teacher.tmp"))
    gone.parent.mkdir()
    for path in (gone, ours, other):
        path.touch()
    with one_writer(tmp_path):
        assert not gone.exists() and ours.exists() and other.exists()


def test_memory_is_kept_unless_the_environment_says_how(monkeypatch):
    called = []

    class Library:
        def __init__(self, name):
            self.mallopt = lambda *how: called.append(how)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    for name in THRESHOLDS_SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # which says nothing about them
    for name in THRESHOLDS_SET:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            keep_memory()
    assert called == []
    keep_memory()
    keep_memory()
    assert len(called) == 4 and len(set(called)) == 2


def test_memory_goes_back_between_stages(monkeypatch):
    asked = []
    monkeypatch.setattr("minicd.runtime.memory.glibc", lambda *words: asked.append(words))
    return_memory()
    assert asked == [("malloc_trim", 0)]
    monkeypatch.undo()
    return_memory()  # whatever the C library


def test_a_c_library_without_the_function_is_left_alone():
    glibc("no_such_function_of_glibc", 1)


def test_ctrl_c_waits_while_a_helper_is_started(on_interrupt):
    on_interrupt(signal.default_int_handler)  # in a background job Ctrl-C is ignored
    seen = []
    with pytest.raises(KeyboardInterrupt):
        with later_interrupts():
            signal.raise_signal(signal.SIGINT)
            seen.append("went on")
    assert seen == ["went on"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
