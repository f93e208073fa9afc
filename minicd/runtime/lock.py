"""One process at a time writes into a folder."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, TextIO

try:
    import fcntl
except ImportError:  # Windows: nothing is held there
    fcntl = None

LOCK = ".lock"


@contextmanager
def one_writer(*folders: Path) -> Iterator[None]:
    """Hold the folders while the block runs. Raises ValueError where another process holds one.

    The system ends a hold with its process, even by kill -9; helpers do not inherit the open file.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(folders) if fcntl else ():
            held.callback(release, hold(folder), folder / LOCK)
            remove_unfinished(folder)
        yield


def remove_unfinished(folder: Path) -> None:
    """Temporary files of `atomic_bytes` whose process was killed, perhaps as large as a checkpoint."""
    for path in folder.rglob(".*.tmp"):
        name, _, number = path.stem.rpartition(".")
        if name and number.isdigit() and not is_alive(int(number)):
            path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def hold(folder: Path) -> TextIO:
    """The open file that holds the folder. It says who works there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise ValueError(f"{file.readline() or 'another process'} works in {folder}; wait until it is "
                             "done, or choose another folder with --out") from None
    except OSError:  # a file system without locks
        return file
    if not (folder / LOCK).exists() or os.fstat(file.fileno()).st_ino != (folder / LOCK).stat().st_ino:
        file.close()  # its holder has just removed it
        return hold(folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})")
    file.flush()
    return file


def release(file: TextIO, path: Path) -> None:
    path.unlink(missing_ok=True)
    file.close()
