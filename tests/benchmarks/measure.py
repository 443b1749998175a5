"""What the benchmarks measure with: time and memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from helpers import runs

#: Timers by name: of the machine, and of this process alone, which other work does not lengthen.
TIMERS = {"wall": time.perf_counter, "cpu": time.process_time}


def clock(
    work: Callable[[], Any], *, repeats: int = 1, timer: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Best time of `repeats` runs by a timer, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        start = timer()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, timer() - start)
    return best, result


def clock_in_turn(
    works: Mapping[Any, Callable[[], Any]],
    *,
    repeats: int = 1,
    timer: Callable[[], float] = time.perf_counter,
) -> tuple[dict[Any, float], dict[Any, Any]]:
    """Median time of each of several works, and its last result, from `repeats` rounds of all.

    What disturbs the machine for a while then disturbs all of them, and their ratios less.
    """
    times, results = {name: [] for name in works}, {}
    for _ in range(repeats):
        for name, work in works.items():
            seconds, results[name] = clock(work, timer=timer)
            times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}, results


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """Result of `work`, from a process of its own: its peak memory is that of nothing else."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(work, *args).result()


def peak_memory(device: str | torch.device) -> float:
    """Largest memory so far, GB: of the process, on a GPU what its tensors took there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return runs.peak_memory()


def resident_memory(device: str | torch.device) -> float:
    """Memory in use now, GB, as for :func:`peak_memory`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated() / 1e9
    now = runs.status_of_process("VmRSS")
    return peak_memory(device) if now is None else now


def hand_back() -> None:
    """Hand freed blocks back to the system, which glibc keeps otherwise."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
