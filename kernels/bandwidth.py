"""
Bandwidth d_c: a quantile of cosine distances, one number per frame or per clip.

    x (F, N, C)     -> (F,)  over the N(N-1)/2 pairs of different tokens of a frame
    x (B, T, N, C)  -> (B,)  over the N^2 T(T-1)/2 pairs of tokens of different frames of a clip

The quantile q of n sorted distances is the element of rank ceil(qn), at least the first, without interpolation
(Rodriguez & Laio, Science 2014, choose d_c so that 1-2 % of the pairs are nearer). It is at least 1e-6, so that
constant frames are valid; if there is no pair (N = 1 or T = 1), it is 1e-6.

The reference is exact. The kernel does not sort: it counts the distances below seven thresholds at a time, narrows down
to the interval that holds the rank until this is 1/256 as wide as its value, and interpolates by rank within it. Across
frames it takes the pairs of a fixed sample of tokens, evenly spaced over the clip (`num_sampled_tokens`): at least 256,
and all tokens of a clip that has no more. docs/log.md reports how often the selected tokens equal those of the exact
quantile.

Cost. Reference: the distances, N^2 (T-1)/2T per token, then a selection, linear in their number. Kernel: within frames
2FN^2C flop and about four passes over N^2 distances in the L2 cache, no extra pass over features when density_peaks
computes it on the way; across frames 2Bn^2C flop for a sample of n tokens, 13 Gflop for B, n, C = 128, 256, 768.
"""

import math
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import check_tokens, frames_per_chunk, launch_config, num_programs
from .cosine_distance import cosine_distance_ref, l2_normalize, pairwise_distances

MIN_BANDWIDTH = 1e-6


def quantile_rank(quantile: float, pairs: int) -> int:
    """
    Return ceil(quantile * pairs), at least 1.

    The quantile is the decimal that was written, such as 0.02. With its nearest double, 0.02 * 50 would have rank 2.
    """
    return max(1, math.ceil(Fraction(str(quantile)) * pairs))


def kth_smallest(d: Tensor, quantile: float) -> Tensor:
    """d (..., n) -> (...), the element of rank ceil(quantile * n), at least MIN_BANDWIDTH."""
    n = d.shape[-1]
    if n == 0:
        return d.new_full(d.shape[:-1], MIN_BANDWIDTH)
    return d.kthvalue(quantile_rank(quantile, n), dim=-1).values.clamp_min(MIN_BANDWIDTH)


def bandwidth_ref(x: Tensor, quantile: float) -> Tensor:
    """The definition, exact. Across frames it takes one clip at a time, so that memory does not grow with B."""
    N = x.shape[-2]
    if x.ndim == 3:
        i, j = torch.triu_indices(N, N, 1, device=x.device)
        chunks = x.split(frames_per_chunk(x))
        return torch.cat([kth_smallest(cosine_distance_ref(chunk)[:, i, j], quantile) for chunk in chunks])
    T = x.shape[1]
    t, s = torch.triu_indices(T, T, 1, device=x.device)
    units = (l2_normalize(clip) for clip in x)
    return torch.stack([kth_smallest((1 - u[t] @ u[s].mT).clamp_(0, 2).flatten(), quantile) for u in units])


def num_sampled_tokens(quantile: float, tokens: int) -> int:
    """
    Return how many tokens of a clip the kernel samples: 256, or, for a small quantile, enough for 500 pairs below it.

    >>> [num_sampled_tokens(q, 1568) for q in (0.1, 0.02, 0.002)]
    [256, 256, 708]
    """
    return min(tokens, 1024, max(256, math.isqrt(math.ceil(1000 / quantile)) + 1))


@triton.jit
def select_kth(d_ptr, n, stride, rank, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr):
    """
    Return approximately the rank-th smallest of the distances d (n, n), rows `stride` apart; at least 1e-6.

    Each pass counts the distances below seven thresholds. An element's counts are bytes of two integers, so
    BLOCK_ROWS * 255 >= n. Values past column n of a row, up to N_PAD, are read and ignored.
    """
    j = tl.arange(0, N_PAD)
    lo = tl.cast(0.0, tl.float32)
    hi = tl.cast(2.0, tl.float32)
    count_lo = tl.cast(0, tl.int32)         # number of distances <= lo, taken as 0 at lo = 0
    count_hi = n * n                        # number of distances <= hi
    while hi - lo > tl.maximum(hi / 256, 1e-7):
        step = (hi - lo) / 8
        counts_0to3 = tl.zeros((BLOCK_ROWS, N_PAD), tl.int32)
        counts_4to6 = tl.zeros((BLOCK_ROWS, N_PAD), tl.int32)
        for i0 in range(0, n, BLOCK_ROWS):
            i = i0 + tl.arange(0, BLOCK_ROWS)
            d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < n)[:, None], other=float("inf"))
            d = tl.where(j[None, :] < n, d, float("inf"))       # not part of the mask: loads are then 16 bytes wide
            for k in tl.static_range(4):
                counts_0to3 += tl.where(d <= lo + (k + 1) * step, 1 << 8 * k, 0)
            for k in tl.static_range(3):
                counts_4to6 += tl.where(d <= lo + (k + 5) * step, 1 << 8 * k, 0)
        start = lo
        count_above = count_hi
        for k in tl.static_range(7):
            if k < 4:
                byte = (counts_0to3 >> 8 * k) & 255
            else:
                byte = (counts_4to6 >> 8 * (k - 4)) & 255
            count = tl.sum(tl.sum(byte, 1), 0)
            too_few = count < rank
            lo = tl.where(too_few, start + (k + 1) * step, lo)
            count_lo = tl.where(too_few, count, count_lo)
            count_above = tl.where(too_few, count_above, tl.minimum(count_above, count))
        hi = lo + step
        count_hi = count_above
    d = lo + (hi - lo) * (rank - count_lo).to(tl.float32) / tl.maximum(count_hi - count_lo, 1).to(tl.float32)
    return tl.maximum(d, 1e-6)


@triton.jit
def bandwidth_kernel(
    x_ptr, d_c_ptr,                     # (items, total, C) read; (items,) written
    inv_norm_ptr, d_ptr,                # scratch per program: (n,), (n, stride)
    items, n, total, N, C, stride, rank, CROSS_FRAME: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """One program: items p, p + P, ... of P programs. An item is a frame or, if CROSS_FRAME, n tokens of a clip."""
    p = tl.cast(tl.program_id(0), tl.int64)
    inv_norm_ptr += p * n
    d_ptr += p * n * stride
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        x = x_ptr + tl.cast(item, tl.int64) * total * C
        pairwise_distances(x, inv_norm_ptr, d_ptr, n, total, N, C, stride, CROSS_FRAME, True, BLOCK, BLOCK_C)
        tl.store(d_c_ptr + item, select_kth(d_ptr, n, stride, rank, BLOCK_ROWS, N_PAD))
        tl.debug_barrier()                      # all threads have read the scratch before the next item overwrites it


def alloc_scratch(P: int, n: int, x: Tensor, block: int = 128, **launch) -> tuple[Tensor, int, dict]:
    """
    Allocate P matrices of n x n distances; return them, their row stride and the launch sizes of the kernel.

    The stride is whole tiles (PADDED_ROWS of `pairwise_distances`), and a row is read N_PAD wide. BLOCK_ROWS rows are
    read at a time: 32 elements per thread, in at most 255 steps. `launch` overrides the choices of `launch_config`.
    """
    config = launch_config(x, n, block) | launch
    N_PAD, stride = max(16, triton.next_power_of_2(n)), triton.cdiv(n, config["BLOCK"]) * config["BLOCK"]
    config |= dict(N_PAD=N_PAD, BLOCK_ROWS=min(N_PAD, 8192 // N_PAD))
    return torch.empty(P * n * stride + N_PAD, device=x.device), stride, config


def bandwidth_triton(x: Tensor, quantile: float) -> Tensor:
    """Launch the kernel: x (F, N, C) or (B, T, N, C) in fp32, fp16 or bf16 -> (F,) or (B,) fp32."""
    N, C = x.shape[-2:]
    if x.ndim == 3:
        items, total, n = len(x), N, N
        rank = n + 2 * quantile_rank(quantile, n * (n - 1) // 2)    # the matrix has the diagonal, and each pair twice
    else:
        items, total = len(x), x.shape[1] * N
        n = num_sampled_tokens(quantile, total)
        frame = [s * total // n // N for s in range(n)]
        pairs = (n * n - sum(frame.count(t) ** 2 for t in range(x.shape[1]))) // 2
        rank = 2 * quantile_rank(quantile, pairs)
    if N == total == 1 or x.ndim == 4 and x.shape[1] == 1:
        return torch.full((items,), MIN_BANDWIDTH, device=x.device)
    x, P = x.contiguous(), min(items, num_programs(x))
    d, stride, config = alloc_scratch(P, n, x, block=64)            # 128 spills registers
    inv_norm, d_c = torch.empty(P, n, device=x.device), torch.empty(items, device=x.device)
    with torch.cuda.device_of(x):
        bandwidth_kernel[(P,)](
            x, d_c, inv_norm, d, items, n, total, N, C, stride, rank, CROSS_FRAME=x.ndim == 4, **config,
        )
    return d_c


def bandwidth(x: Tensor, quantile: float, check: bool = True) -> Tensor:
    """x (F, N, C) -> (F,) within frames, or (B, T, N, C) -> (B,) across frames; fp32, >= 1e-6. No gradient."""
    if not 0 < quantile <= 1:
        raise ValueError(f"bandwidth: quantile must be in (0, 1], got {quantile}")
    x = check_tokens("bandwidth", x, 4 if x.ndim == 4 else 3, check)
    return bandwidth_triton(x, quantile) if x.is_cuda else bandwidth_ref(x, quantile).float()
