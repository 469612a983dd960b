"""
Measuring: functions and their inputs -> milliseconds, bytes, and what the hardware reaches at most.

GPU times are medians of triton.testing.do_bench: CUDA events, the L2 cache overwritten before each run. CPU times are
medians of the host's clock.

The roofline of an operation is the larger of its flops / the rate of a large bf16 product and its bytes / the bandwidth
of a large copy. On a GPU the product is 8192^3 and the copy 2 GiB, both measured in the same run.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
import triton
from torch import Tensor


def ratio(a, b) -> float | None:
    """a / b if both are numbers; None if one of them was not measured."""
    return a / b if isinstance(a, float) and isinstance(b, float) else None


def synchronize():
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_calls(function: Callable, calls: int) -> float:
    """Milliseconds per call of `calls` calls, with one wait for the GPU at their end."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def time_interleaved(functions: list[Callable], rounds: int, calls: int = 1, warmup: int = 1) -> list[float]:
    """
    Median milliseconds per call of each function, over rounds of `calls` calls, on the host's clock.

    The functions take turns, so that other work on the machine slows all of them alike. `warmup` calls go before.
    """
    times = [[] for _ in functions]
    for function in functions:
        time_calls(function, warmup)
    for _ in range(rounds):
        for function, ms in zip(functions, times, strict=True):
            ms.append(time_calls(function, calls))
    return [statistics.median(ms) for ms in times]


def time_ms(function: Callable, inputs: list[tuple], effort: int = 100) -> float:
    """
    Median milliseconds of function(*input), with the inputs in turn. On a CPU it takes the first input alone.

    effort: on a GPU the milliseconds to measure for, on a CPU the number of runs.
    """
    if any(x.is_cuda for x in inputs[0]):
        cycle = itertools.cycle(inputs)
        return triton.testing.do_bench(lambda: function(*next(cycle)), warmup=25, rep=effort, return_mode="median")
    return time_interleaved([lambda: function(*inputs[0])], effort)[0]


def peak_memory(function: Callable, baseline: int | None = None) -> int:
    """Bytes of GPU memory at the peak of function() above `baseline`; None: above what is allocated before it."""
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated() if baseline is None else baseline
    out = function()
    synchronize()
    del out
    return torch.cuda.max_memory_allocated() - baseline


def is_deterministic(function: Callable, args: tuple, runs: int = 5) -> bool:
    """Whether several runs on the same input give the same bits."""
    as_list = lambda out: [out] if isinstance(out, Tensor) else list(out)
    first = [t.clone() for t in as_list(function(*args))]
    return all(torch.equal(a, b) for _ in range(runs - 1)
               for a, b in zip(first, as_list(function(*args)), strict=True))


def measure_roofline(device: str) -> tuple[float, float]:
    """Flops per second of a large bf16 product, and bytes per second of a large copy (read plus written)."""
    n, size, effort = (8192, 1 << 30, 500) if device == "cuda" else (256, 1 << 20, 3)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * n ** 3 / time_ms(torch.matmul, [(a, b)], effort) * 1e3
    source = torch.randn(size, device=device, dtype=torch.bfloat16)
    bandwidth = 4 * size / time_ms(torch.empty_like(source).copy_, [(source,)], effort) * 1e3
    return flops, bandwidth


def roofline_ms(flops: float, nbytes: float, rate: float, bandwidth: float) -> float:
    """Milliseconds of `flops` at `rate` per second, or of `nbytes` at `bandwidth` per second, whichever is longer."""
    return 1e3 * max(flops / rate, nbytes / bandwidth)
