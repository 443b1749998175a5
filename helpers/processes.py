"""Work that is spread over processes or threads: the same results, in the same order, sooner."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import cv2

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Items that a CPU works on at once, at most: more would wait for Python's lock, and fill memory.
_MOST = 8


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


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], device: str | torch.device = "cpu"
) -> Iterator[Result]:
    """Results of `work` for each of the items, in their order, from threads that share the cores.

    Most operations of a small network are too short to be worth spreading over cores; several
    images, or batches of prompts, at once are not. So torch's threads are dealt out to threads of
    Python, each with an item of its own. A GPU gets one item at a time.

    Parameters
    ----------
    work : callable
        Networks, and other work that does not hold Python's lock.
    items : iterable
    device : str or torch.device
        Where `work` runs its network.

    Yields
    ------
    object
        As soon as it and those before it are there. After an error, or when the caller stops, no
        further item is begun.
    """
    import torch

    items, threads = list(items), torch.get_num_threads()
    workers = at_once(device)
    if min(workers, len(items)) < 2:
        yield from map(work, items)
        return
    each, failed = max(1, threads // workers), threading.Event()

    def unless_failed(item: Item) -> Result | None:
        if failed.is_set():  # an earlier item will raise its error before this one is asked for
            return None
        try:
            return work(item)
        except BaseException:
            failed.set()
            raise

    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,)) as p:
            yield from p.map(unless_failed, items)
    finally:
        torch.set_num_threads(threads)


def at_once(device: str | torch.device) -> int:
    """Items that :func:`in_threads` works on at once."""
    import torch

    return min(_MOST, torch.get_num_threads()) if torch.device(device).type == "cpu" else 1


def one_thread(_: int = 0) -> None:
    """Keep OpenCV to one thread, in a process that is one of many."""
    cv2.setNumThreads(1)
