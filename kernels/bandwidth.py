"""
Bandwidth d_c: a quantile of cosine distances, one number a frame or one a clip.

    x (F, N, C)     -> (F,)  over the N(N-1)/2 pairs of different tokens of a frame
    x (B, T, N, C)  -> (B,)  over the N^2 T(T-1)/2 pairs of tokens of different frames of a clip

The quantile q of n sorted distances is the one of rank ceil(qn), at least the first: an element, nothing interpolated
(Rodriguez & Laio, Science 2014, choose d_c so that 1-2 % of the pairs are nearer). Never below 1e-6, so that constant
frames are legal; with no pair at all (N = 1, or T = 1) it is 1e-6.

The reference is exact. The kernel does not sort: it counts the distances below seven thresholds at a time, narrows in
on the cell that holds the rank until that is 1/256 as wide as the value, and interpolates by rank within it. Across
frames it takes the pairs of a fixed sample of tokens, evenly spaced over the clip (`sample`): at least 256 of them, and
all of a clip that has no more. docs/log.md says how often the kept tokens are those of the exact quantile.

Cost. Reference: the distances, N^2 (T-1)/2T of them a token, then a selection, linear in their number. Kernel: within
frames 2FN^2C flop and about four passes over N^2 distances in the L2 cache, none when density_peaks does it on the way;
across frames 2BS^2C flop for a sample of S, 13 Gflop at B, S, C = 128, 256, 768.
"""

import math
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cached, check_tokens, programs, tiles
from kernels.cosine_distance import cosine_distance_ref, distances, unit

FLOOR = 1e-6


def rank(quantile: float, pairs: int) -> int:
    """ceil(q n), at least 1. The quantile as written, 0.02 and not its nearest double, or 0.02 * 50 would be rank 2."""
    return max(1, math.ceil(Fraction(str(quantile)) * pairs))


def select(d: Tensor, quantile: float) -> Tensor:
    """d (..., n) -> (...), the element of rank ceil(quantile * n)."""
    n = d.shape[-1]
    if n == 0:
        return d.new_full(d.shape[:-1], FLOOR)
    return d.kthvalue(rank(quantile, n), dim=-1).values.clamp_min(FLOOR)


def bandwidth_ref(x: Tensor, quantile: float) -> Tensor:
    """The definition, exact. One clip's distances at a time across frames, so that memory does not grow with B."""
    N = x.shape[-2]
    if x.ndim == 3:
        i, j = torch.triu_indices(N, N, 1, device=x.device)
        return torch.cat([select(cosine_distance_ref(part)[:, i, j], quantile) for part in x.split(cached(x))])
    T = x.shape[1]
    t, s = torch.triu_indices(T, T, 1, device=x.device)
    units = (unit(clip) for clip in x)
    return torch.stack([select((1 - u[t] @ u[s].mT).clamp_(0, 2).flatten(), quantile) for u in units])


def sample(quantile: float, tokens: int) -> int:
    """
    How many of a clip's tokens stand for all: 256, or more for a small quantile, so that 500 pairs lie below it.

    >>> [sample(q, 1568) for q in (0.1, 0.02, 0.002)]
    [256, 256, 708]
    """
    return min(tokens, 1024, max(256, math.isqrt(math.ceil(1000 / quantile)) + 1))


@triton.jit
def select_rank(d_ptr, n, stride, want, ROWS: tl.constexpr, N_PAD: tl.constexpr):
    """
    Of distances d (n, n), rows `stride` apart, about the smallest t that `want` of them do not exceed; >= 1e-6.

    Counts below seven thresholds at once, in bytes of two integers an element: ROWS * 255 >= n. What lies past n in a
    row, up to N_PAD, is read and ignored.
    """
    j = tl.arange(0, N_PAD)
    lo = tl.cast(0.0, tl.float32)
    hi = tl.cast(2.0, tl.float32)
    below = tl.cast(0, tl.int32)            # how many are <= lo, taken as none at 0
    until = n * n                           # how many are <= hi
    while hi - lo > tl.maximum(hi / 256, 1e-7):
        step = (hi - lo) / 8
        first = tl.zeros((ROWS, N_PAD), tl.int32)
        second = tl.zeros((ROWS, N_PAD), tl.int32)
        for i0 in range(0, n, ROWS):
            i = i0 + tl.arange(0, ROWS)
            d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < n)[:, None], other=float("inf"))
            d = tl.where(j[None, :] < n, d, float("inf"))       # not in the mask: loads are then 16 bytes wide
            for k in tl.static_range(4):
                first += tl.where(d <= lo + (k + 1) * step, 1 << 8 * k, 0)
            for k in tl.static_range(3):
                second += tl.where(d <= lo + (k + 5) * step, 1 << 8 * k, 0)
        start = lo
        above = until
        for k in tl.static_range(7):
            if k < 4:
                byte = (first >> 8 * k) & 255
            else:
                byte = (second >> 8 * (k - 4)) & 255
            count = tl.sum(tl.sum(byte, 1), 0)
            short = count < want
            lo = tl.where(short, start + (k + 1) * step, lo)
            below = tl.where(short, count, below)
            above = tl.where(short, above, tl.minimum(above, count))
        hi = lo + step
        until = above
    t = lo + (hi - lo) * (want - below).to(tl.float32) / tl.maximum(until - below, 1).to(tl.float32)
    return tl.maximum(t, 1e-6)


@triton.jit
def bandwidth_kernel(
    x_ptr, inv_ptr, d_ptr, d_c_ptr,     # (items, total, C), (programs, n) and (programs, n, stride) scratch, (items,)
    items, n, total, N, C, stride, want,
    APART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """One program: every so-many-th frame, or clip (APART), n of its `total` tokens."""
    p = tl.cast(tl.program_id(0), tl.int64)
    inv_ptr += p * n
    d_ptr += p * n * stride
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        x = x_ptr + tl.cast(item, tl.int64) * total * C
        distances(x, inv_ptr, d_ptr, n, total, N, C, stride, APART, True, BLOCK, BLOCK_C)
        tl.store(d_c_ptr + item, select_rank(d_ptr, n, stride, want, ROWS, N_PAD))
        tl.debug_barrier()                                  # all have read before the next item is written


def scratch(P: int, n: int, x: Tensor, block: int = 128, **launch) -> tuple[Tensor, int, dict]:
    """
    Room for P matrices of n x n distances, their stride, and the launch of what reads them.

    A stride is whole blocks (SPARE of `distances`), and a row is read N_PAD wide. ROWS are looked at together: 32
    elements a thread, and at most 255 turns. `launch` overrides what `tiles` chose.
    """
    shape = tiles(x, n, block) | launch
    N_PAD, stride = max(16, triton.next_power_of_2(n)), triton.cdiv(n, shape["BLOCK"]) * shape["BLOCK"]
    shape |= dict(N_PAD=N_PAD, ROWS=min(N_PAD, 8192 // N_PAD))
    return torch.empty(P * n * stride + N_PAD, device=x.device), stride, shape


def bandwidth_triton(x: Tensor, quantile: float) -> Tensor:
    """The kernels' launch. x (F, N, C) or (B, T, N, C) in fp32, fp16 or bf16 -> (F,) or (B,) fp32."""
    N, C = x.shape[-2:]
    if x.ndim == 3:
        items, total, n = len(x), N, N
        want = n + 2 * rank(quantile, n * (n - 1) // 2)     # the diagonal is there, every pair twice
    else:
        items, total = len(x), x.shape[1] * N
        n = sample(quantile, total)
        frame = [s * total // n // N for s in range(n)]
        pairs = (n * n - sum(frame.count(t) ** 2 for t in range(x.shape[1]))) // 2
        want = 2 * rank(quantile, pairs)
    if N == total == 1 or x.ndim == 4 and x.shape[1] == 1:
        return torch.full((items,), FLOOR, device=x.device)
    x, P = x.contiguous(), min(items, programs(x))
    d, stride, shape = scratch(P, n, x, block=64)           # 128 spill
    inv, d_c = torch.empty(P, n, device=x.device), torch.empty(items, device=x.device)
    with torch.cuda.device_of(x):
        bandwidth_kernel[(P,)](x, inv, d, d_c, items, n, total, N, C, stride, want, APART=x.ndim == 4, **shape)
    return d_c


def bandwidth(x: Tensor, quantile: float, check: bool = True) -> Tensor:
    """x (F, N, C) -> (F,) within frames, or (B, T, N, C) -> (B,) across frames; fp32, >= 1e-6. No gradient."""
    if not 0 < quantile <= 1:
        raise ValueError(f"bandwidth wants a quantile in (0, 1], got {quantile}")
    x = check_tokens("bandwidth", x, 4 if x.ndim == 4 else 3, check)
    return bandwidth_triton(x, quantile) if x.is_cuda else bandwidth_ref(x, quantile).float()
