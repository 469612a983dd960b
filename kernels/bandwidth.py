"""
Bandwidth d_c: a quantile of cosine distances, one number per frame or per clip.

    x (F, N, C)     -> (F,)  over the N(N-1)/2 pairs of different tokens of a frame
    x (B, T, N, C)  -> (B,)  over the N^2 T(T-1)/2 pairs of tokens of different frames of a clip

The quantile q of n sorted distances is the element of rank ceil(qn), at least the first, without interpolation
(Rodriguez & Laio, Science 2014, choose d_c so that 1-2 % of the pairs are nearer). It is at least 1e-6, so that
constant frames are valid; if there is no pair (N = 1 or T = 1), it is 1e-6.

The reference is exact. The kernel does not sort: it counts the distances in eight cells of an interval, goes on with
the cell that holds the rank until this is 1/256 as wide as its value, and interpolates by rank within it. Across frames
it takes the pairs of a fixed sample of tokens, evenly spaced over the clip (`num_sampled_tokens`): at least 256, and
all tokens of a clip that has no more. docs/log.md reports how often the selected tokens equal those of the exact
quantile.

Cost. Reference: the distances, N^2 (T-1)/2T per token, then a selection, linear in their number. Kernel: within frames
2FN^2C flop and about four passes over N^2 distances in the L2 cache; if density_peaks computes it on the way, features
are not read again; across frames 2Bn^2C flop for a sample of n tokens, 13 Gflop for B, n, C = 128, 256, 768.
"""

import math
from collections import Counter
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from . import check_tokens, frames_per_chunk, launch_config, num_programs, tl, triton
from .cosine_distance import cosine_distance_ref, l2_normalize, pairwise_distances

MIN_BANDWIDTH = 1e-6


@lru_cache
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


@lru_cache
def sample_of_clip(quantile: float, T: int, N: int) -> tuple[int, int]:
    """Return how many of the T * N tokens of a clip the kernel samples, and the rank among their cross-frame pairs."""
    n = num_sampled_tokens(quantile, T * N)
    per_frame = Counter(i * T * N // n // N for i in range(n))
    pairs = (n * n - sum(count ** 2 for count in per_frame.values())) // 2
    return n, quantile_rank(quantile, pairs)


@triton.jit
def count_by_cell(d_ptr, size, lo, width, CHUNK: tl.constexpr, PASS_STAGES: tl.constexpr):
    """
    Count the distances d (size,) in the eight cells of an interval from lo -> (8,) int32. CHUNK divides size.

    Cell 0 also has those below lo, cell 7 those above the interval, infinities included. A distance, scaled to 0..31
    and added to 2^23, leaves a whole number r in the low bits of the float. Its cell is r // 4, so the inner edges are
    at (4k + 3.5)/31 of the width, k = 0..6. Each element of a chunk counts in eight fields of 4 bits of one integer: r
    & 28 is the shift of the cell's field. That is five instructions and no comparison. After 15 distances, before a
    field can overflow, the fields of all elements are summed, four sums in 64 bits: 15 * 4096 < 2^16.
    """
    cell = tl.arange(0, 8)
    shift = (cell % 2 * 2 + cell // 4) * 16                     # the place of a cell in its sum of four
    scale = 1 / width
    counts = tl.zeros((8,), tl.int32)
    for first in range(0, size, 15 * CHUNK):
        fields = tl.zeros((CHUNK,), tl.int32)
        for i in tl.range(first, tl.minimum(first + 15 * CHUNK, size), CHUNK, num_stages=PASS_STAGES):
            d = tl.load(d_ptr + i + tl.arange(0, CHUNK))
            place = tl.minimum(tl.maximum(d * scale - lo * scale, 0.0), 1.0) * 31 + 8388608.0
            fields += 1 << (place.to(tl.int32, bitcast=True) & 28)
        wide = fields.to(tl.int64)
        sum_0145 = tl.sum((wide & 0x000F000F) | (wide << 28 & 0x000F000F00000000), 0)
        sum_2367 = tl.sum((wide >> 8 & 0x000F000F) | (wide << 20 & 0x000F000F00000000), 0)
        counts += (tl.where(cell % 4 < 2, sum_0145, sum_2367) >> shift & 0xFFFF).to(tl.int32)
    return counts


@triton.jit
def select_kth(d_ptr, size, rank, CHUNK: tl.constexpr, PASS_STAGES: tl.constexpr):
    """
    Return approximately the rank-th smallest of the distances d (size,); at least 1e-6. CHUNK divides size.

    Entries that do not count are infinite.
    """
    cell = tl.arange(0, 8)
    lo = tl.cast(0.0, tl.float32)
    hi = tl.cast(2.0, tl.float32)
    count_lo = tl.cast(0, tl.int32)         # number of distances <= lo; at lo = 0 none
    count_hi = size                         # number of distances <= hi
    while hi - lo > tl.maximum(hi / 256, 1e-7):
        width = hi - lo
        counts = count_by_cell(d_ptr, size, lo, width, CHUNK, PASS_STAGES)
        below_edge = tl.where(cell < 7, tl.cumsum(counts, 0), count_hi)         # distances below its upper edge
        too_few = below_edge < rank
        k = tl.sum(too_few.to(tl.int32), 0)                                     # the cell that holds the rank
        hi = tl.where(k < 7, lo + width * ((4 * k + 3.5) / 31), hi)
        lo = tl.where(k > 0, lo + width * ((4 * k - 0.5) / 31), lo)
        count_lo = tl.max(tl.where(too_few, below_edge, count_lo), 0)
        count_hi = tl.min(tl.where(too_few, count_hi, below_edge), 0)
    share = (rank - count_lo).to(tl.float32) / tl.maximum(count_hi - count_lo, 1).to(tl.float32)
    return tl.maximum(lo + (hi - lo) * share, 1e-6)


@triton.jit
def pad_scratch(d_ptr, stride, size, CHUNK: tl.constexpr):
    """Write infinity behind the (stride, stride) distances of a program's scratch, up to its size."""
    i = stride * stride + tl.arange(0, CHUNK)
    tl.store(d_ptr + i, float("inf"), mask=i < size)


@triton.jit(do_not_specialize=["items", "rank"])
def bandwidth_kernel(
    x_ptr, d_c_ptr,                     # (items, total, C) read; (items,) written
    inv_norm_ptr, d_ptr,                # scratch per program: (n,), (size,)
    items, n, total, N, C, stride, size, rank, CROSS_FRAME: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, PASS_STAGES: tl.constexpr,
):
    """One program: items p, p + P, ... of P programs. An item is a frame or, if CROSS_FRAME, n tokens of a clip."""
    p = tl.cast(tl.program_id(0), tl.int64)
    inv_norm_ptr += p * n
    d_ptr += p * size
    pad_scratch(d_ptr, stride, size, CHUNK)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        x = x_ptr + tl.cast(item, tl.int64) * total * C
        pairwise_distances(x, inv_norm_ptr, d_ptr, n, total, N, C, stride, CROSS_FRAME, True, BLOCK, BLOCK_C)
        tl.store(d_c_ptr + item, select_kth(d_ptr, size, rank, CHUNK, PASS_STAGES))
        tl.debug_barrier()                      # all threads have read the scratch before the next item overwrites it


def alloc_scratch(P: int, n: int, x: Tensor, **launch) -> tuple[Tensor, dict]:
    """
    Allocate scratch for the padded n x n distances of P programs; return it, and sizes for the kernel.

    The row stride is n rounded up to 16. A program's `size` is the (stride, stride) matrix rounded up to whole chunks
    (16 elements a thread); a pass loads PASS_STAGES - 1 chunks ahead. A pass reads rows of N_PAD elements, so beyond
    the last row: N_PAD more elements follow the last program's scratch. `launch` overrides the choices of
    `launch_config`.
    """
    stride, N_PAD = triton.cdiv(n, 16) * 16, max(16, triton.next_power_of_2(n))
    chunk = min(4096, triton.next_power_of_2(stride * stride))
    size = triton.cdiv(stride * stride, chunk) * chunk
    config = launch_config(x, n, large_on=("sm_90",)) | launch
    config = dict(stride=stride, size=size, CHUNK=chunk, PASS_STAGES=3) | config
    return torch.empty(P * size + N_PAD, device=x.device), config


def bandwidth_triton(x: Tensor, quantile: float, **launch) -> Tensor:
    """Launch the kernel: x (F, N, C) or (B, T, N, C) in fp32, fp16 or bf16 -> (F,) or (B,) fp32."""
    N, C = x.shape[-2:]
    items, total = len(x), x[0].numel() // C
    n, rank = (N, quantile_rank(quantile, N * (N - 1) // 2)) if x.ndim == 3 else sample_of_clip(
        quantile, x.shape[1], N)
    if N == total == 1 or x.ndim == 4 and x.shape[1] == 1:
        return torch.full((items,), MIN_BANDWIDTH, device=x.device)
    x, P = x.contiguous(), min(items, num_programs(x))
    d, config = alloc_scratch(P, n, x, **launch)
    inv_norm, d_c = torch.empty(P, n, device=x.device), torch.empty(items, device=x.device)
    with torch.cuda.device_of(x):
        bandwidth_kernel[(P,)](
            x, d_c, inv_norm, d, items, n, total, N, C, rank=2 * rank,      # the matrix has each pair twice
            CROSS_FRAME=x.ndim == 4, **config,
        )
    return d_c


def bandwidth(x: Tensor, quantile: float, check: bool = True) -> Tensor:
    """x (F, N, C) -> (F,) within frames, or (B, T, N, C) -> (B,) across frames; fp32, >= 1e-6. No gradient."""
    if not 0 < quantile <= 1:
        raise ValueError(f"bandwidth: quantile must be in (0, 1], got {quantile}")
    x = check_tokens("bandwidth", x, 4 if x.ndim == 4 else 3, check)
    return bandwidth_triton(x, quantile) if x.is_cuda else bandwidth_ref(x, quantile).float()
