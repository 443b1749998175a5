"""What the benchmarks measure with: time and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch


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


def peak_memory(device: str | torch.device) -> float:
    """Largest memory so far, GB: of the process, on a GPU what its tensors took there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
