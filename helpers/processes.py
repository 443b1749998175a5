"""Work that is spread over processes: the same results, in the same order, sooner."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import cv2

__all__ = ["in_order", "one_thread"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int = 0
) -> Iterator[Result]:
    """Results of `work` for each of the items, in their order.

    Parameters
    ----------
    work : callable
        With `workers`, something that can be pickled, e.g. a function of a module.
    items : iterable
    workers : int
        Processes; 0 works in this one.

    Yields
    ------
    object
        As soon as it and those before it are there.
    """
    if not workers:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as pool:
        yield from pool.map(work, items)


def one_thread(_: int = 0) -> None:
    """Keep OpenCV to one thread, in a process that is one of many."""
    cv2.setNumThreads(1)
