"""
Density-peaks clustering of the tokens of a frame (Rodriguez & Laio, Science 2014), on cosine distances d:

    rho_i   = sum over j != i of exp(-d_ij / d_c)          "exp", the kernel of the ClusterSTM notes
              sum over j != i of exp(-(d_ij / d_c)^2)      "gauss", that of Rodriguez and Laio's own program
    delta_i = min over j denser than i of d_ij;  for the densest token its own largest distance
    centres = the K tokens of largest gamma_i = rho_i delta_i

"Denser" is a total order, larger rho, then lower index; every other tie goes to the lower index as well. The other
tokens join the `nearest` centre, or that of their `parent`, the nearest denser token. A centre belongs to its own
cluster, whatever its distance to another centre: no cluster is ever empty.

rho and gamma are compared as logarithms. A token far from all others has rho = e^-100 and less, zero in fp32, and
tokens like it are the small objects that the order must not lose.

The densest token has the largest gamma as well: its delta, its largest distance, is at least its distance to any other
token i, which is at least delta_i. In exact arithmetic it is therefore always a centre. Rounding can break that (d_ij
and d_ji come out of different sums), so a chain of parents that ends at a peak which is no centre is provided for.

Cost. One N x N x C product a frame, 2FN^2C flop, and a few passes over N^2 distances. In the kernel one program does
a frame from features to labels. Its distances, about 4N^2 bytes, lie in scratch that the program uses again for its
next frame: with padding 200 kB at N = 196, 26 MB for the 132 programs of an H200, which its L2 cache holds; memory does
not grow with F. The steps between, each a function of a whole frame, are separated by barriers of the program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cached, check_bandwidth, check_tokens, programs
from kernels.bandwidth import FLOOR, bandwidth_ref, rank, scratch, select_rank
from kernels.cosine_distance import cosine_distance_ref, distances


def log_density(d: Tensor, d_c: Tensor, density: str) -> Tensor:
    """d (F, N, N), d_c (F,) -> log rho (F, N); -inf for the only token of a frame."""
    a = d / d_c[:, None, None]
    if density == "gauss":
        a = a.square()
    a.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return a.neg_().logsumexp(-1)


def order(score: Tensor) -> Tensor:
    """score (F, N) -> (F, N), the tokens from the largest score to the smallest, ties to the lower index."""
    return score.sort(dim=1, descending=True, stable=True).indices


def follow(parent: Tensor, centres: Tensor, d: Tensor) -> Tensor:
    """
    Each token to the centre its chain of parents meets first: parent (F, N), centres (F, K), d (F, N, N) -> (F, N).

    The densest token is its own parent. Where it is no centre, it takes the centre nearest to it, and the tokens whose
    chains end there follow. Pointer jumping: after s steps a pointer has gone 2^s parents up.
    """
    N = parent.shape[1]
    stop = parent.scatter(1, centres, centres)                      # a centre points at itself
    for _ in range(N.bit_length()):
        stop = stop.gather(1, stop)
    return nearest(centres, d).gather(1, stop)


def nearest(centres: Tensor, d: Tensor) -> Tensor:
    """centres (F, K) ascending, d (F, N, N) -> labels (F, N) of the nearest centre; centre k has label k."""
    F, K = centres.shape
    to_centre = d.gather(2, centres[:, None, :].expand(F, d.shape[1], K))       # (F, N, K)
    k = torch.arange(K, device=d.device).expand(F, K)
    return to_centre.argmin(-1).scatter(1, centres, k)


def density_peaks_ref(x: Tensor, K: int, d_c: Tensor, density: str, assign: str) -> tuple[Tensor, Tensor, Tensor]:
    """The definition. x (F, N, C), d_c (F,) -> labels (F, N), centres (F, K), log rho (F, N)."""
    F, N, _ = x.shape
    d = cosine_distance_ref(x)                                                  # (F, N, N)
    log_rho = log_density(d, d_c, density)                                      # (F, N)

    by_density = order(log_rho)                                                 # (F, N), densest first
    place = by_density.argsort(1)
    no_denser = place[:, None, :] >= place[:, :, None]                          # (F, i, j): j is no denser than i
    delta, parent = d.masked_fill(no_denser, torch.inf).min(-1)                 # (F, N), (F, N)
    peak = by_density[:, :1]
    delta = delta.scatter(1, peak, d.amax(-1).gather(1, peak))
    parent = parent.scatter(1, peak, peak)

    log_gamma = log_rho + delta.log()                                           # -inf where delta = 0
    centres = order(log_gamma)[:, :K].sort(1).values
    labels = nearest(centres, d) if assign == "nearest" else follow(parent, centres, d)
    return labels, centres, log_rho


@triton.jit
def density_peaks_kernel(
    x_ptr, d_c_ptr,                     # (F, N, C); (F,) read, or written where FIND
    inv_ptr, log_rho_ptr, labels_ptr, centres_ptr,          # (F, N), (F, N), (F, N), (F, K) written
    d_ptr, gamma_ptr, parent_ptr, slot_ptr, near_ptr,       # scratch of each program: (N, stride), then (N,) each
    F, N, C, K, stride, want,
    FIND: tl.constexpr, GAUSS: tl.constexpr, PARENT: tl.constexpr, JUMPS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """One program: every so-many-th frame, from its features to its clusters."""
    p = tl.cast(tl.program_id(0), tl.int64)
    d_ptr += p * N * stride
    gamma_ptr += p * N
    parent_ptr += p * N
    slot_ptr += p * N
    near_ptr += p * N
    j = tl.arange(0, N_PAD)                                                     # all tokens of the frame
    for frame in range(tl.program_id(0), F, tl.num_programs(0)):
        f = tl.cast(frame, tl.int64)                                            # f * N * C can pass 2^31
        log_rho = log_rho_ptr + f * N
        labels = labels_ptr + f * N
        distances(x_ptr + f * N * C, inv_ptr + f * N, d_ptr, N, N, N, C, stride, False, True, BLOCK, BLOCK_C)
        if FIND:
            d_c = select_rank(d_ptr, N, stride, want, ROWS, N_PAD)
            tl.store(d_c_ptr + f, d_c)
        else:
            d_c = tl.maximum(tl.load(d_c_ptr + f), 1e-30)                       # a NaN too

        for i0 in range(0, N, ROWS):                                            # densities
            i = i0 + tl.arange(0, ROWS)
            others = (j[None, :] < N) & (i[:, None] != j[None, :])
            d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < N)[:, None], other=0.0)
            a = tl.where(others, d / d_c, float("inf"))
            if GAUSS:
                a = a * a
            nearest = tl.min(a, 1)
            nearest = tl.where(nearest < float("inf"), nearest, 0.0)            # a frame of one token: log 0
            tl.store(log_rho + i, tl.log(tl.sum(tl.exp(nearest[:, None] - a), 1)) - nearest, mask=i < N)
        tl.debug_barrier()

        rho_j = tl.load(log_rho + j, mask=j < N, other=-float("inf"))
        for i0 in range(0, N, ROWS):                                            # the nearest denser token
            i = i0 + tl.arange(0, ROWS)
            rho_i = tl.load(log_rho + i, mask=i < N, other=-float("inf"))
            d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < N)[:, None], other=0.0)
            d = tl.where(j[None, :] < N, d, 0.0)
            earlier = (rho_j[None, :] == rho_i[:, None]) & (j[None, :] < i[:, None])
            denser = ((rho_j[None, :] > rho_i[:, None]) | earlier) & (j[None, :] < N)
            near = tl.where(denser, d, float("inf"))
            delta = tl.min(near, 1)
            parent = tl.min(tl.where(denser & (near == delta[:, None]), j[None, :], N_PAD), 1)
            peak = parent == N_PAD                                              # none is denser
            delta = tl.where(peak, tl.max(d, 1), delta)
            tl.store(gamma_ptr + i, rho_i + tl.log(delta), mask=i < N)
            tl.store(parent_ptr + i, tl.where(peak, i, parent), mask=i < N)
        tl.debug_barrier()

        gamma_j = tl.load(gamma_ptr + j, mask=j < N, other=-float("inf"))
        for i0 in range(0, N, ROWS):                                            # centres: those with < K before them
            i = i0 + tl.arange(0, ROWS)
            gamma_i = tl.load(gamma_ptr + i, mask=i < N, other=-float("inf"))
            earlier = (gamma_j[None, :] == gamma_i[:, None]) & (j[None, :] < i[:, None])
            before = ((gamma_j[None, :] > gamma_i[:, None]) | earlier) & (j < N)[None, :]
            tl.store(slot_ptr + i, (tl.sum(before.to(tl.int32), 1) < K).to(tl.int32), mask=i < N)
        tl.debug_barrier()
        centre = tl.load(slot_ptr + j, mask=j < N, other=0)
        slot = tl.cumsum(centre, 0) - 1
        tl.debug_barrier()                                                      # all have read
        tl.store(slot_ptr + j, tl.where(centre > 0, slot, -1), mask=j < N)
        tl.store(centres_ptr + f * K + slot, j.to(tl.int64), mask=centre > 0)
        if PARENT:
            tl.store(parent_ptr + j, j, mask=centre > 0)                        # a chain stops at a centre
        tl.debug_barrier()

        slot_j = tl.load(slot_ptr + j, mask=j < N, other=-1)
        for i0 in range(0, N, ROWS):                                            # the nearest centre
            i = i0 + tl.arange(0, ROWS)
            slot_i = tl.load(slot_ptr + i, mask=i < N, other=-1)
            d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < N)[:, None], other=0.0)
            d = tl.where(slot_j[None, :] >= 0, d, float("inf"))
            first = tl.min(tl.where(d == tl.min(d, 1)[:, None], slot_j[None, :], N_PAD), 1)
            label = tl.where(slot_i >= 0, slot_i, first)
            if PARENT:
                tl.store(near_ptr + i, label, mask=i < N)
            else:
                tl.store(labels + i, label.to(tl.int64), mask=i < N)
        tl.debug_barrier()

        if PARENT:
            stop = tl.load(parent_ptr + j, mask=j < N, other=0)
            for _ in range(JUMPS):                                              # 2^s parents up after s jumps
                further = tl.load(parent_ptr + stop, mask=j < N, other=0)
                tl.debug_barrier()                                              # all have read
                tl.store(parent_ptr + j, further, mask=j < N)
                tl.debug_barrier()
                stop = further
            tl.store(labels + j, tl.load(near_ptr + stop, mask=j < N, other=0).to(tl.int64), mask=j < N)
            tl.debug_barrier()


def density_peaks_triton(
    x: Tensor, K: int, d_c: Tensor | None, density: str, assign: str, quantile: float = 0.02, **launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    The kernel's launch. x (F, N, C) in fp32, fp16 or bf16, d_c (F,) fp32 or None: the quantile of each frame.

    -> labels (F, N), centres (F, K), log rho (F, N), and the inverse lengths of the tokens (F, N).
    """
    F, N, C = x.shape
    x, P = x.contiguous(), min(F, programs(x))
    d, stride, shape = scratch(P, N, x, **launch)
    find = d_c is None
    if find:
        d_c = torch.empty(F, device=x.device) if N > 1 else torch.full((F,), FLOOR, device=x.device)
    log_rho, inv = torch.empty(2, F, N, device=x.device)
    labels = torch.empty(F, N, dtype=torch.int64, device=x.device)
    centres = torch.empty(F, K, dtype=torch.int64, device=x.device)
    gamma = torch.empty(P, N, device=x.device)
    parent, slot, near = torch.empty(3, P, N, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        density_peaks_kernel[(P,)](
            x, d_c, inv, log_rho, labels, centres, d, gamma, parent, slot, near,
            F, N, C, K, stride, N + 2 * rank(quantile, N * (N - 1) // 2),       # the diagonal, and every pair twice
            FIND=find and N > 1, GAUSS=density == "gauss", PARENT=assign == "parent", JUMPS=N.bit_length(),
            **shape,
        )
    return labels, centres, log_rho, inv


def check_clusters(K: int, N: int, density: str, assign: str):
    """A ValueError for what no clustering of N tokens into K can be."""
    if not 1 <= K <= N:
        raise ValueError(f"density_peaks wants K from 1 to N = {N}, got {K}")
    if density not in ("exp", "gauss"):
        raise ValueError(f"density_peaks knows the densities 'exp' and 'gauss', got {density!r}")
    if assign not in ("nearest", "parent"):
        raise ValueError(f"density_peaks assigns to the 'nearest' centre or the 'parent's, got {assign!r}")


def density_peaks_cpu(
    x: Tensor, K: int, d_c: Tensor | None, density: str, assign: str, quantile: float = 0.02,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference on as many frames at a time as a CPU's cache holds, 2.6 times as fast as on all at once."""
    parts = []
    for part, scale in zip(x.split(cached(x)), [None] * len(x) if d_c is None else d_c.split(cached(x)), strict=False):
        scale = bandwidth_ref(part, quantile) if scale is None else scale
        parts.append(density_peaks_ref(part, K, scale, density, assign))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


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
    run = density_peaks_triton if x.is_cuda else density_peaks_cpu
    labels, centres, log_rho, *_ = run(x, K, check_bandwidth(d_c, F, x, check), density, assign)
    return labels, centres, log_rho.exp().float()
