"""Work in several processes, which end with this one however it ends; and in a thread, ahead.

sources/pictures.py decodes pictures, posters/words.py reads the words on them; dataset.py fetches
batches `ahead`.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import Any

from support.command import UserError
from support.stopping import SIGNALS, undone


def in_processes(
    work: Callable[[Any], Any], items: Iterable[Any], workers: int, chunksize: int
) -> Iterator[Any]:
    """Yields `work(item)` of each item, in order, from `workers` processes.

    They are only a few chunks ahead of what is taken, so that results do not heap up. Raises
    UserError when a process is killed.
    """
    # Forked workers start at once and do nothing but `work`; elsewhere forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = min(workers, 61) if sys.platform == "win32" else workers  # Windows waits for no more
    with held_back():  # this may start a process that keeps count of semaphores
        pool = ProcessPoolExecutor(workers, context, begin_worker)
    waiting, items = deque(), iter(items)
    with undone(partial(end, pool)):
        try:
            while chunk := list(islice(items, chunksize)):
                with held_back():  # this may start processes
                    waiting.append(pool.submit(of_each, work, chunk))
                if len(waiting) > workers + 2:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
            pool.shutdown()
        except BrokenProcessPool as error:
            problem = f"one of {workers} processes was killed, most often for want of memory"
            raise UserError(f"{problem}; give fewer: --workers {max(1, workers // 4)}") from error


def end(pool: ProcessPoolExecutor) -> None:
    """Ends the processes that are left, and does not wait for what they are at."""
    pool.shutdown(wait=False)
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(0.5)  # else its number stays in use


def of_each(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    return [work(item) for item in items]


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Processes that are started inside the block have signals held back until `begin_worker`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def begin_worker() -> None:
    """A terminal sends Ctrl-C to every process: the parent alone acts on it, and workers follow."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the parent's
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=follow, daemon=True).start()


def follow() -> None:
    """Waits for the parent's end, and ends."""
    multiprocessing.parent_process().join()
    os._exit(1)


def ahead(function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
    """`function` of each argument; a thread prepares the next result while one is used.

    It works in NumPy alone: torch in a second thread would wake a second set of its own threads.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for argument in arguments:
            coming = thread.submit(function, argument)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
