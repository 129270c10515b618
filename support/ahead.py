"""The next batch, prepared by a thread while one is used. dataset.py fetches with it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


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
