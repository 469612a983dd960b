"""
Density-peaks clustering of the tokens of a frame (Rodriguez & Laio, Science 2014), on cosine distances d:

    rho_i   = sum over j != i of exp(-d_ij / d_c)          "exp", the kernel of the ClusterSTM notes
              sum over j != i of exp(-(d_ij / d_c)^2)      "gauss", the kernel of Rodriguez and Laio's own program
    delta_i = min over j denser than i of d_ij;  for the densest token its own largest distance
    centres = the K tokens of largest gamma_i = rho_i delta_i

"Denser" is a total order, larger rho, then lower index; every other tie goes to the lower index as well. The other
tokens join the `nearest` centre, or that of their `parent`, the nearest denser token. A centre belongs to its own
cluster, whatever its distance to another centre: no cluster is ever empty.

rho and gamma are compared as logarithms. A token far from all others has rho = e^-100 and less, zero in fp32, and
tokens like it are the small objects that the order must not lose.

The densest token has the largest gamma as well: its delta, its largest distance, is at least its distance to any other
token i, which is at least delta_i. In exact arithmetic it is therefore always a centre. Rounding can make another gamma
equal to it, and a NaN has no gamma, so a chain of parents may end at a peak that is no centre: the peak then takes the
centre nearest to it.

Cost. One N x N x C product per frame, 2FN^2C flop, six passes over N^2 distances, four for the bandwidth and two for
density and separation, and one over K rows for the labels. In the kernel one program does a frame from features to
labels. Its distances, 4 bytes each, lie in scratch memory that the program reuses for its next frame: 176 KB at N =
196, 23 MB for the 132 programs of an H100; memory does not grow with F. Each phase of the kernel is a function of a
whole frame; a barrier follows where the next phase reads what it wrote. Passes go down the columns of the symmetric
matrix: a thread keeps its own sums, and threads exchange them once, at the end of a pass. At F, N, C = 1024, 196, 768
an H100 takes 0.59 ms, of which the products and the writing of distances are 0.30, the bandwidth 0.11 and the rest 0.18
(docs/log.md).
"""

import torch
from torch import Tensor

from . import check_bandwidth, check_tokens, frames_per_chunk, num_programs, tl, triton
from .bandwidth import MIN_BANDWIDTH, alloc_scratch, bandwidth_ref, pad_scratch, quantile_rank, select_kth
from .cosine_distance import cosine_distance_ref, pairwise_distances


def log_density(d: Tensor, d_c: Tensor, density: str) -> Tensor:
    """d (F, N, N), d_c (F,) -> log rho (F, N); -inf for the only token of a frame."""
    a = d / d_c[:, None, None]
    if density == "gauss":
        a = a.square()
    a.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return a.neg_().logsumexp(-1)


def argsort_desc(score: Tensor) -> Tensor:
    """score (F, N) -> (F, N), the tokens from the largest score to the smallest, ties to the lower index."""
    return score.sort(dim=1, descending=True, stable=True).indices


def assign_to_nearest(centres: Tensor, d: Tensor) -> Tensor:
    """centres (F, K) ascending, d (F, N, N) -> labels (F, N) of the nearest centre; centre k has label k."""
    F, K = centres.shape
    to_centre = d.gather(2, centres[:, None, :].expand(F, d.shape[1], K))       # (F, N, K)
    k = torch.arange(K, device=d.device).expand(F, K)
    return to_centre.argmin(-1).scatter(1, centres, k)


def assign_by_parent(parent: Tensor, centres: Tensor, d: Tensor) -> Tensor:
    """
    Assign each token to the first centre on its chain of parents: parent (F, N), centres (F, K), d (F, N, N) -> (F, N).

    The densest token is its own parent. If it is no centre, it takes the centre nearest to it, and so do the tokens
    whose chains end there. Pointer jumping: after s steps a pointer is 2^s parents up.
    """
    N = parent.shape[1]
    chain_end = parent.scatter(1, centres, centres)                 # a centre points at itself
    for _ in range(N.bit_length()):
        chain_end = chain_end.gather(1, chain_end)
    return assign_to_nearest(centres, d).gather(1, chain_end)


def density_peaks_ref(x: Tensor, K: int, d_c: Tensor, density: str, assign: str) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: x (F, N, C), d_c (F,) -> labels (F, N), centres (F, K), log rho (F, N)."""
    F, N, _ = x.shape
    d = cosine_distance_ref(x)                                                  # (F, N, N)
    log_rho = log_density(d, d_c, density)                                      # (F, N)

    by_density = argsort_desc(log_rho)                                          # (F, N), densest first
    density_rank = by_density.argsort(1)
    not_denser = density_rank[:, None, :] >= density_rank[:, :, None]           # (F, i, j): j is not denser than i
    delta, parent = d.masked_fill(not_denser, torch.inf).min(-1)                # (F, N), (F, N)
    peak = by_density[:, :1]
    delta = delta.scatter(1, peak, d.amax(-1).gather(1, peak))
    parent = parent.scatter(1, peak, peak)

    log_gamma = log_rho + delta.log()                                           # -inf for delta = 0
    centres = argsort_desc(log_gamma)[:, :K].sort(1).values
    labels = assign_to_nearest(centres, d) if assign == "nearest" else assign_by_parent(parent, centres, d)
    return labels, centres, log_rho


@triton.jit
def exponent_difference(d, least, scale, GAUSS: tl.constexpr):
    """
    Return |a(d) - a(least)| for two distances, with a(d) = d log2(e) / d_c or, for GAUSS, (d / d_c)^2 log2(e).

    The distances are subtracted, not the exponents, so that equal ones give 0. A compiler fuses the product of an
    exponent with a subtraction, and the difference of two equal exponents would be the rounding error of one.
    """
    a = tl.abs(least - d) * scale
    if GAUSS:
        a = a * ((least + d) * scale) * 1.4426950408889634
    return a


@triton.jit
def compute_log_density(
    d_ptr, log_rho_ptr, d_c, N, stride, GAUSS: tl.constexpr, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
    PASS_STAGES: tl.constexpr,
):
    """
    Distances (stride, stride) and d_c -> log rho (N,), written and returned as (N_PAD,): the log-sum-exp of a column.

    As d_ij = d_ji, a column has what a row has, and is summed without any exchange between threads until its end. Each
    element keeps a sum of 2^(least exponent - exponent) and the least distance so far, so that equal distances give
    equal sums, and a token far from all others keeps its place in the order. Columns from N on are arbitrary; log rho
    is -inf there.
    """
    i, j = tl.arange(0, BLOCK_ROWS), tl.arange(0, N_PAD)
    log2_e: tl.constexpr = 1.4426950408889634
    scale = tl.maximum((1.0 if GAUSS else log2_e) / d_c, 1e-30)                 # an infinite distance stays infinite
    least = tl.full((BLOCK_ROWS, N_PAD), 3.0, tl.float32)                       # more than any distance of two tokens
    total = tl.zeros((BLOCK_ROWS, N_PAD), tl.float32)
    for i0 in tl.range(0, stride, BLOCK_ROWS, num_stages=PASS_STAGES):
        d = tl.load(d_ptr + (i0 + i[:, None]) * stride + j[None, :])
        ratio = tl.exp2(-exponent_difference(d, least, scale, GAUSS))           # exp(-d/d_c) = 2^(-d scale)
        total = tl.where(d < least, total * ratio + 1, total + ratio)
        least = tl.minimum(least, d)
    nearest = tl.min(least, 0)
    total = tl.sum(total * tl.exp2(-exponent_difference(least, nearest[None, :], scale, GAUSS)), 0)
    log2_rho = tl.log2(total) - exponent_difference(nearest, 0.0, scale, GAUSS)
    log_rho = tl.where(j < N, log2_rho / log2_e, -float("inf"))                 # in base e
    tl.store(log_rho_ptr + j, log_rho, mask=j < N)
    tl.debug_barrier()
    return log_rho


@triton.jit
def find_denser_tokens(
    d_ptr, log_rho_ptr, log_rho, N, stride, WITH_PARENTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
    PASS_STAGES: tl.constexpr,
):
    """
    Distances (stride, stride), log rho (N,) and (N_PAD,) -> delta (N_PAD,), the distance to the nearest denser token,
    infinite for the densest; WITH_PARENTS also that token (N_PAD,), N_PAD for the densest.
    """
    r, j = tl.arange(0, BLOCK_ROWS), tl.arange(0, N_PAD)
    delta = tl.full((BLOCK_ROWS, N_PAD), float("inf"), tl.float32)
    parent = tl.full((BLOCK_ROWS, N_PAD), N_PAD, tl.int32)
    for i0 in tl.range(0, stride, BLOCK_ROWS, num_stages=PASS_STAGES):
        i = i0 + r
        rho_i = tl.load(log_rho_ptr + i, mask=i < N, other=-float("inf"))
        d = tl.load(d_ptr + i[:, None] * stride + j[None, :])
        tied_earlier = (rho_i[:, None] == log_rho[None, :]) & (i[:, None] < j[None, :])
        d = tl.where((rho_i[:, None] > log_rho[None, :]) | tied_earlier, d, float("inf"))
        if WITH_PARENTS:
            parent = tl.where(d < delta, i[:, None], parent)
        delta = tl.minimum(delta, d)
    nearest = tl.min(delta, 0)
    if WITH_PARENTS:
        parent = tl.where(delta == nearest[None, :], parent, N_PAD)
    return nearest, tl.min(parent, 0)


@triton.jit
def choose_centres(d_ptr, centres_ptr, log_rho, delta, N, K, stride, N_PAD: tl.constexpr):
    """
    Distances (stride, stride), log rho and delta (N_PAD,) -> the K centres, ascending, written; the cluster index of
    each token, returned as (N_PAD,): -1 if it is no centre.

    Tokens are sorted by 64-bit numbers: log gamma, as an integer of the same order, then the lower index.
    """
    j = tl.arange(0, N_PAD)
    densest = tl.minimum(tl.min(tl.where(delta == float("inf"), j, N_PAD), 0), N - 1)
    d = tl.load(d_ptr + densest * stride + j, mask=j < N, other=0.0)
    farthest = tl.max(tl.where(j == densest, 0.0, d), 0)
    delta = tl.where(delta == float("inf"), farthest, delta)
    bits = (log_rho + tl.log(delta) + 0.0).to(tl.int32, bitcast=True)           # + 0.0: -0 and 0 are one number
    bits = bits ^ (bits >> 31 & 0x7FFFFFFF)                                     # negative floats in ascending order
    key = bits.to(tl.int64) << 32 | (N_PAD - j).to(tl.int64)
    key = tl.where(j < N, key, -(1 << 63))
    kth_key = tl.sum(tl.where(j == K - 1, tl.sort(key, descending=True), 0), 0)
    is_centre = key >= kth_key
    cluster_index = tl.cumsum(is_centre.to(tl.int32), 0) - 1
    tl.store(centres_ptr + cluster_index, j.to(tl.int64), mask=is_centre)
    tl.debug_barrier()
    return tl.where(is_centre, cluster_index, -1)


@triton.jit
def label_by_nearest_centre(
    d_ptr, centres_ptr, cluster_index, K, stride, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """
    Distances (stride, stride), centres (K,), cluster index (N_PAD,) -> label (N_PAD,) of the nearest centre; a centre
    keeps its own index. Only the rows of the centres are read, as d_ij = d_ji.
    """
    j = tl.arange(0, N_PAD)
    least = tl.full((N_PAD,), float("inf"), tl.float32)
    label = tl.zeros((N_PAD,), tl.int32)
    for k0 in range(0, K, BLOCK_ROWS):
        k = k0 + tl.arange(0, BLOCK_ROWS)
        centre = tl.load(centres_ptr + k, mask=k < K, other=0).to(tl.int32)
        d = tl.load(d_ptr + centre[:, None] * stride + j[None, :], mask=(k < K)[:, None] & (j < stride)[None, :],
                    other=float("inf"))
        nearest = tl.min(d, 0)
        first = tl.min(tl.where(d == nearest[None, :], k[:, None], N_PAD), 0)
        label = tl.where(nearest < least, first, label)
        least = tl.minimum(nearest, least)
    return tl.where(cluster_index >= 0, cluster_index, label)


@triton.jit
def follow_parents(
    parent_ptr, label_ptr, parent, cluster_index, label, N, JUMPS: tl.constexpr, N_PAD: tl.constexpr,
):
    """
    Parents, cluster index and label of the nearest centre, each (N_PAD,) -> label (N_PAD,) of the first centre on each
    token's chain of parents. After s jumps a pointer is 2^s parents up. A chain that ends at a peak which is no centre
    takes the label of the peak's nearest centre. Scratch: (N,) and (N,).
    """
    j = tl.arange(0, N_PAD)
    chain_end = tl.where((cluster_index >= 0) | (parent == N_PAD), j, parent)   # a chain ends at a centre or the peak
    tl.store(label_ptr + j, label, mask=j < N)
    tl.store(parent_ptr + j, chain_end, mask=j < N)
    tl.debug_barrier()
    for _ in range(JUMPS):
        chain_end = tl.load(parent_ptr + chain_end, mask=j < N, other=0)
        tl.debug_barrier()                                                      # all threads have read
        tl.store(parent_ptr + j, chain_end, mask=j < N)
        tl.debug_barrier()
    return tl.load(label_ptr + chain_end, mask=j < N, other=0)


@triton.jit(do_not_specialize=["F", "K", "rank"])
def density_peaks_kernel(
    x_ptr, d_c_ptr,                                         # (F, N, C) read; (F,) read unless FIND_BANDWIDTH
    inv_norm_ptr, log_rho_ptr, labels_ptr, centres_ptr,     # (F, N), (F, N), (F, N), (F, K) written
    d_ptr, parent_ptr, label_ptr,                           # scratch per program: (size,), (N,), (N,)
    F, N, C, K, stride, size, rank,
    FIND_BANDWIDTH: tl.constexpr, GAUSS: tl.constexpr, ASSIGN_PARENT: tl.constexpr, JUMPS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr, CHUNK: tl.constexpr,
    PASS_STAGES: tl.constexpr,
):
    """One program: frames p, p + P, ... of P programs, each from its features to its clusters."""
    p = tl.cast(tl.program_id(0), tl.int64)
    d_ptr += p * size
    parent_ptr += p * N
    label_ptr += p * N
    j = tl.arange(0, N_PAD)                                                     # all tokens of a frame
    pad_scratch(d_ptr, stride, size, CHUNK)
    for frame in range(tl.program_id(0), F, tl.num_programs(0)):
        f = tl.cast(frame, tl.int64)                                            # f * N * C can exceed 2^31
        pairwise_distances(x_ptr + f * N * C, inv_norm_ptr + f * N, d_ptr, N, N, N, C, stride,
                           False, True, BLOCK, BLOCK_C)
        if FIND_BANDWIDTH:
            d_c = select_kth(d_ptr, size, rank, CHUNK, PASS_STAGES)
        else:
            d_c = tl.maximum(tl.load(d_c_ptr + f), 1e-30)                       # replaces a NaN too
        log_rho = compute_log_density(d_ptr, log_rho_ptr + f * N, d_c, N, stride, GAUSS, BLOCK_ROWS, N_PAD, PASS_STAGES)
        delta, parent = find_denser_tokens(d_ptr, log_rho_ptr + f * N, log_rho, N, stride, ASSIGN_PARENT,
                                           BLOCK_ROWS, N_PAD, PASS_STAGES)
        centres = centres_ptr + f * K
        cluster_index = choose_centres(d_ptr, centres, log_rho, delta, N, K, stride, N_PAD)
        label = label_by_nearest_centre(d_ptr, centres, cluster_index, K, stride, BLOCK_ROWS, N_PAD)
        if ASSIGN_PARENT:
            label = follow_parents(parent_ptr, label_ptr, parent, cluster_index, label, N, JUMPS, N_PAD)
        tl.store(labels_ptr + f * N + j, label.to(tl.int64), mask=j < N)
        tl.debug_barrier()                          # all threads have read the scratch before the next frame is written


def density_peaks_triton(
    x: Tensor, K: int, d_c: Tensor | None, density: str, assign: str, quantile: float = 0.95, **launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Launch the kernel: x (F, N, C) in fp32, fp16 or bf16, d_c (F,) fp32, or None for the quantile of each frame
    -> labels (F, N), centres (F, K), log rho (F, N), and the inverse lengths of the tokens (F, N).
    """
    F, N, C = x.shape
    x, P = x.contiguous(), min(F, num_programs(x))
    d, config = alloc_scratch(P, N, x, **launch)
    N_PAD = max(16, triton.next_power_of_2(N))
    find_bandwidth = d_c is None
    if find_bandwidth:
        d_c = torch.empty(F, device=x.device) if N > 1 else torch.full((F,), MIN_BANDWIDTH, device=x.device)
    # Apart, so that all are aligned to 16 bytes whatever F is: else a ragged last batch would be compiled anew.
    log_rho, inv_norm = (torch.empty(F, N, device=x.device) for _ in range(2))
    parent, label = (torch.empty(P, N, dtype=torch.int32, device=x.device) for _ in range(2))
    labels = torch.empty(F, N, dtype=torch.int64, device=x.device)
    centres = torch.empty(F, K, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        density_peaks_kernel[(P,)](
            x, d_c, inv_norm, log_rho, labels, centres, d, parent, label, F, N, C, K,
            rank=2 * quantile_rank(quantile, N * (N - 1) // 2),                 # the matrix has each pair twice
            FIND_BANDWIDTH=find_bandwidth and N > 1, GAUSS=density == "gauss", ASSIGN_PARENT=assign == "parent",
            JUMPS=N.bit_length(), N_PAD=N_PAD, BLOCK_ROWS=min(16, 4096 // N_PAD), **config,
        )
    return labels, centres, log_rho, inv_norm


def check_clusters(K: int, N: int, density: str, assign: str):
    """Raise ValueError unless N tokens can be clustered into K in the named ways."""
    if not 1 <= K <= N:
        raise ValueError(f"density_peaks: K must be from 1 to N = {N}, got {K}")
    if density not in ("exp", "gauss"):
        raise ValueError(f"density_peaks: density must be 'exp' or 'gauss', got {density!r}")
    if assign not in ("nearest", "parent"):
        raise ValueError(f"density_peaks: assign must be 'nearest' or 'parent', got {assign!r}")


def density_peaks_chunked(
    x: Tensor, K: int, d_c: Tensor | None, density: str, assign: str, quantile: float = 0.95,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the reference on as many frames at a time as a CPU's cache holds: 2.6 times as fast as on all at once."""
    results, size = [], frames_per_chunk(x)
    for chunk, scale in zip(x.split(size), [None] * len(x) if d_c is None else d_c.split(size), strict=False):
        scale = bandwidth_ref(chunk, quantile) if scale is None else scale
        results.append(density_peaks_ref(chunk, K, scale, density, assign))
    return tuple(torch.cat(tensors) for tensors in zip(*results, strict=True))


def density_peaks(
    x: Tensor, K: int, d_c, density: str = "exp", assign: str = "nearest", check: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    x (F, N, C), d_c a number or (F,) -> labels (F, N) int64 in [0, K), centres (F, K) int64 ascending, rho (F, N) fp32.

    labels[f, centres[f, k]] == k. K from 1 to N. No gradient.
    """
    x = check_tokens("density_peaks", x, 3, check)
    F, N, _ = x.shape
    check_clusters(K, N, density, assign)
    run = density_peaks_triton if x.is_cuda else density_peaks_chunked
    labels, centres, log_rho, *_ = run(x, K, check_bandwidth(d_c, F, x, check), density, assign)
    return labels, centres, log_rho.exp().float()
