"""A run's folder belongs to one process: reserved before any work, locked while it is in use.

support/runs.py does the work of train.py inside `owned`.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from support.command import UserError, remove, sweep
from support.stopping import undone

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

OF_A_RUN = ("last.pt", "best.pt", "history.csv", "recipe.txt")
WRITTEN = (*OF_A_RUN, "curves.png", "config.json")


@contextlib.contextmanager
def owned(out: Path, new: bool = False) -> Iterator[None]:
    """Inside the block the folder is there, can be written to, and belongs to this process alone.

    If it is new, and left empty, it is gone afterwards. Raises UserError.
    """
    missing = [out] if new else [place for place in (out, *out.parents) if not place.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out} is, or lies in, a file; give a folder") from error
    except OSError as error:
        raise UserError(f"cannot write --out {out}: {error.strerror}") from error
    with undone(lambda: remove_empty(missing)):
        lock = locked(out)
        with undone(lambda: unlock(out, lock)):
            for name in WRITTEN:  # what killed processes left half written
                sweep(out / name)
            yield


def locked(folder: Path) -> int:
    """The open lock file of a folder. Raises UserError when a process that lives holds it."""
    path = folder / ".lock"
    for _ in range(10):  # a process that was killed a moment ago may not be gone
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write --out {folder}: {error.strerror}") from error
        if take(lock) and is_still(path, lock):
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()}".encode())
            return lock
        os.close(lock)
        time.sleep(0.1)
    holder = "another process"
    with contextlib.suppress(OSError):  # Windows lets nobody read what is locked
        holder = path.read_text("utf-8") or holder
    raise UserError(f"{folder} is in use by {holder}; wait for its end, or give another --out")


def take(lock: int) -> bool:
    """Takes a lock that ends with the process; where the file system has none, all is free."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
    except BlockingIOError:
        return False
    except OSError:
        return fcntl is not None
    return True


def is_still(path: Path, lock: int) -> bool:
    """Whether an open file is the one at `path`, which its last holder may just have deleted."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(lock))
    return False


def unlock(folder: Path, lock: int) -> None:
    remove(folder / ".lock")  # while it is held: nobody else's can be meant
    os.close(lock)
    if not fcntl:  # Windows deletes no open file
        remove(folder / ".lock")


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def free_name(parent: Path, data: str) -> Path:
    """A new folder, named after the data and the time, and made: nobody else gets the same."""
    name = f"{data.lower() or 'data'}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        out = parent / (name if number == 1 else f"{name}-{number}")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            out.mkdir()
        except FileExistsError as error:
            if not parent.is_dir():
                raise UserError(f"cannot write {out}: {parent} is a file; give --out") from error
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; give --out DIR") from error
        else:
            return out


def refuse_used(out: Path) -> None:
    """Raises UserError for a folder that holds a run, or another program's config.json."""
    held = [name for name in OF_A_RUN if (out / name).exists()]
    if held:
        raise UserError(f"{out} already holds a run ({held[0]}); use --resume, or another --out")
    config = out / "config.json"
    if config.exists():  # of a run that was stopped before its first epoch's end, or a stranger's
        with contextlib.suppress(OSError, ValueError):
            if "image_tower" in json.loads(config.read_text("utf-8")):
                return
        raise UserError(f"{config} is not of a run of train.py; give another --out")
