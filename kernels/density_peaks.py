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

Cost. One N x N x C product per frame, 2FN^2C flop, and a few passes over N^2 distances. In the kernel one program does
a frame from features to labels. Its distances, about 4N^2 bytes, lie in scratch memory that the program reuses for its
next frame: with padding 200 kB at N = 196, 26 MB for the 132 programs of an H200, which its L2 cache holds; memory does
not grow with F. Each phase of the kernel is a function of a whole frame, and ends with a barrier of the program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import check_bandwidth, check_tokens, frames_per_chunk, num_programs
from .bandwidth import MIN_BANDWIDTH, alloc_scratch, bandwidth_ref, quantile_rank, select_kth
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
def compute_log_density(
    d_ptr, log_rho_ptr, d_c, N, stride, GAUSS: tl.constexpr, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """Distances (N, stride) and d_c -> log rho (N,): the log-sum-exp of each row without its diagonal."""
    j = tl.arange(0, N_PAD)                                                     # all tokens of the frame
    for i0 in range(0, N, BLOCK_ROWS):
        i = i0 + tl.arange(0, BLOCK_ROWS)
        other = (j[None, :] < N) & (i[:, None] != j[None, :])
        d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < N)[:, None], other=0.0)
        a = tl.where(other, d / d_c, float("inf"))
        if GAUSS:
            a = a * a
        least = tl.min(a, 1)
        least = tl.where(least < float("inf"), least, 0.0)                      # a frame of one token: log 0
        tl.store(log_rho_ptr + i, tl.log(tl.sum(tl.exp(least[:, None] - a), 1)) - least, mask=i < N)
    tl.debug_barrier()


@triton.jit
def find_parents(
    d_ptr, log_rho_ptr, log_gamma_ptr, parent_ptr, N, stride, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """Distances (N, stride), log rho (N,) -> nearest denser token (N,), the peak being its own, and log gamma (N,)."""
    j = tl.arange(0, N_PAD)
    rho_j = tl.load(log_rho_ptr + j, mask=j < N, other=-float("inf"))
    for i0 in range(0, N, BLOCK_ROWS):
        i = i0 + tl.arange(0, BLOCK_ROWS)
        rho_i = tl.load(log_rho_ptr + i, mask=i < N, other=-float("inf"))
        d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < N)[:, None], other=0.0)
        d = tl.where(j[None, :] < N, d, 0.0)
        tied_earlier = (rho_j[None, :] == rho_i[:, None]) & (j[None, :] < i[:, None])
        denser = ((rho_j[None, :] > rho_i[:, None]) | tied_earlier) & (j[None, :] < N)
        d_denser = tl.where(denser, d, float("inf"))
        delta = tl.min(d_denser, 1)
        parent = tl.min(tl.where(denser & (d_denser == delta[:, None]), j[None, :], N_PAD), 1)
        peak = parent == N_PAD                                                  # no token is denser
        delta = tl.where(peak, tl.max(d, 1), delta)
        tl.store(log_gamma_ptr + i, rho_i + tl.log(delta), mask=i < N)
        tl.store(parent_ptr + i, tl.where(peak, i, parent), mask=i < N)
    tl.debug_barrier()


@triton.jit
def choose_centres(
    log_gamma_ptr, cluster_index_ptr, centres_ptr, N, K, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """log gamma (N,) -> the K centres, ascending, and the cluster index of each token (N,): -1 if it is no centre."""
    j = tl.arange(0, N_PAD)
    gamma_j = tl.load(log_gamma_ptr + j, mask=j < N, other=-float("inf"))
    for i0 in range(0, N, BLOCK_ROWS):                      # a centre has fewer than K tokens of larger gamma before it
        i = i0 + tl.arange(0, BLOCK_ROWS)
        gamma_i = tl.load(log_gamma_ptr + i, mask=i < N, other=-float("inf"))
        tied_earlier = (gamma_j[None, :] == gamma_i[:, None]) & (j[None, :] < i[:, None])
        before = ((gamma_j[None, :] > gamma_i[:, None]) | tied_earlier) & (j < N)[None, :]
        tl.store(cluster_index_ptr + i, (tl.sum(before.to(tl.int32), 1) < K).to(tl.int32), mask=i < N)
    tl.debug_barrier()
    is_centre = tl.load(cluster_index_ptr + j, mask=j < N, other=0) > 0
    cluster_index = tl.cumsum(is_centre.to(tl.int32), 0) - 1
    tl.debug_barrier()                                                          # all threads have read
    tl.store(cluster_index_ptr + j, tl.where(is_centre, cluster_index, -1), mask=j < N)
    tl.store(centres_ptr + cluster_index, j.to(tl.int64), mask=is_centre)
    tl.debug_barrier()


@triton.jit
def label_by_nearest_centre(
    d_ptr, cluster_index_ptr, labels_ptr, N, stride, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """Distances (N, stride), cluster index (N,) -> label (N,) of the nearest centre; a centre keeps its own index."""
    j = tl.arange(0, N_PAD)
    index_j = tl.load(cluster_index_ptr + j, mask=j < N, other=-1)
    for i0 in range(0, N, BLOCK_ROWS):
        i = i0 + tl.arange(0, BLOCK_ROWS)
        index_i = tl.load(cluster_index_ptr + i, mask=i < N, other=-1)
        d = tl.load(d_ptr + i[:, None] * stride + j[None, :], mask=(i < N)[:, None], other=0.0)
        d = tl.where(index_j[None, :] >= 0, d, float("inf"))
        nearest = tl.min(tl.where(d == tl.min(d, 1)[:, None], index_j[None, :], N_PAD), 1)
        label = tl.where(index_i >= 0, index_i, nearest)
        tl.store(labels_ptr + i, label.to(labels_ptr.dtype.element_ty), mask=i < N)
    tl.debug_barrier()


@triton.jit
def label_by_parent(
    parent_ptr, cluster_index_ptr, nearest_label_ptr, labels_ptr, N, JUMPS: tl.constexpr, N_PAD: tl.constexpr,
):
    """
    Parents (N,), overwritten, and labels of the nearest centre (N,) -> labels (N,) of the end of each chain of parents.

    A chain ends at the first centre, or else at the peak. Pointer jumping: after s jumps a pointer is 2^s parents up.
    """
    j = tl.arange(0, N_PAD)
    tl.store(parent_ptr + j, j, mask=tl.load(cluster_index_ptr + j, mask=j < N, other=-1) >= 0)
    tl.debug_barrier()
    chain_end = tl.load(parent_ptr + j, mask=j < N, other=0)
    for _ in range(JUMPS):
        further = tl.load(parent_ptr + chain_end, mask=j < N, other=0)
        tl.debug_barrier()                                                      # all threads have read
        tl.store(parent_ptr + j, further, mask=j < N)
        tl.debug_barrier()
        chain_end = further
    tl.store(labels_ptr + j, tl.load(nearest_label_ptr + chain_end, mask=j < N, other=0).to(tl.int64), mask=j < N)
    tl.debug_barrier()


@triton.jit
def density_peaks_kernel(
    x_ptr, d_c_ptr,                     # (F, N, C); (F,) read, or written if FIND_BANDWIDTH
    inv_norm_ptr, log_rho_ptr, labels_ptr, centres_ptr,     # (F, N), (F, N), (F, N), (F, K) written
    d_ptr, log_gamma_ptr, parent_ptr, cluster_index_ptr, nearest_label_ptr,     # scratch per program: (N, stride), (N,)
    F, N, C, K, stride, rank,
    FIND_BANDWIDTH: tl.constexpr, GAUSS: tl.constexpr, ASSIGN_PARENT: tl.constexpr, JUMPS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, N_PAD: tl.constexpr,
):
    """One program: frames p, p + P, ... of P programs, each from its features to its clusters."""
    p = tl.cast(tl.program_id(0), tl.int64)
    d_ptr += p * N * stride
    log_gamma_ptr += p * N
    parent_ptr += p * N
    cluster_index_ptr += p * N
    nearest_label_ptr += p * N
    for frame in range(tl.program_id(0), F, tl.num_programs(0)):
        f = tl.cast(frame, tl.int64)                                            # f * N * C can exceed 2^31
        log_rho = log_rho_ptr + f * N
        labels = labels_ptr + f * N
        pairwise_distances(x_ptr + f * N * C, inv_norm_ptr + f * N, d_ptr, N, N, N, C, stride,
                           False, True, BLOCK, BLOCK_C)
        if FIND_BANDWIDTH:
            d_c = select_kth(d_ptr, N, stride, rank, BLOCK_ROWS, N_PAD)
            tl.store(d_c_ptr + f, d_c)
        else:
            d_c = tl.maximum(tl.load(d_c_ptr + f), 1e-30)                       # replaces a NaN too
        compute_log_density(d_ptr, log_rho, d_c, N, stride, GAUSS, BLOCK_ROWS, N_PAD)
        find_parents(d_ptr, log_rho, log_gamma_ptr, parent_ptr, N, stride, BLOCK_ROWS, N_PAD)
        choose_centres(log_gamma_ptr, cluster_index_ptr, centres_ptr + f * K, N, K, BLOCK_ROWS, N_PAD)
        if ASSIGN_PARENT:
            label_by_nearest_centre(d_ptr, cluster_index_ptr, nearest_label_ptr, N, stride, BLOCK_ROWS, N_PAD)
            label_by_parent(parent_ptr, cluster_index_ptr, nearest_label_ptr, labels, N, JUMPS, N_PAD)
        else:
            label_by_nearest_centre(d_ptr, cluster_index_ptr, labels, N, stride, BLOCK_ROWS, N_PAD)


def density_peaks_triton(
    x: Tensor, K: int, d_c: Tensor | None, density: str, assign: str, quantile: float = 0.02, **launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Launch the kernel: x (F, N, C) in fp32, fp16 or bf16, d_c (F,) fp32, or None for the quantile of each frame
    -> labels (F, N), centres (F, K), log rho (F, N), and the inverse lengths of the tokens (F, N).
    """
    F, N, C = x.shape
    x, P = x.contiguous(), min(F, num_programs(x))
    d, stride, config = alloc_scratch(P, N, x, **launch)
    find_bandwidth = d_c is None
    if find_bandwidth:
        d_c = torch.empty(F, device=x.device) if N > 1 else torch.full((F,), MIN_BANDWIDTH, device=x.device)
    log_rho, inv_norm = torch.empty(2, F, N, device=x.device)
    labels = torch.empty(F, N, dtype=torch.int64, device=x.device)
    centres = torch.empty(F, K, dtype=torch.int64, device=x.device)
    log_gamma = torch.empty(P, N, device=x.device)
    parent, cluster_index, nearest_label = torch.empty(3, P, N, dtype=torch.int32, device=x.device)
    rank = N + 2 * quantile_rank(quantile, N * (N - 1) // 2)        # the matrix has the diagonal, and each pair twice
    with torch.cuda.device_of(x):
        density_peaks_kernel[(P,)](
            x, d_c, inv_norm, log_rho, labels, centres, d, log_gamma, parent, cluster_index, nearest_label,
            F, N, C, K, stride, rank,
            FIND_BANDWIDTH=find_bandwidth and N > 1, GAUSS=density == "gauss", ASSIGN_PARENT=assign == "parent",
            JUMPS=N.bit_length(), **config,
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
    x: Tensor, K: int, d_c: Tensor | None, density: str, assign: str, quantile: float = 0.02,
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
