"""
The operations of the masking path, to be timed and compiled: a shape (F, N, C), T and K -> inputs, kernel, baseline,
flops and bytes of each.

Flops: 2FN^2C within frames and 2BT(T-1)N^2C across frames, without credit for symmetry or padding; 2BS^2C for a
bandwidth across frames, from its sample of S tokens. Bytes: each input is read once, each output written once.

The eager baselines take the steps of the references, in place, on features that are scaled to unit length and rounded
to bf16; that is cheaper than scaling each product. They multiply with torch.bmm(out_dtype=float32): matrix units, fp32
sums, and no rounding after them. If the distances across frames exceed MAX_DISTANCE_BYTES, a baseline takes a few clips
at a time. DPC-KNN is TCFormer's formulation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kernels.bandwidth import MIN_BANDWIDTH, bandwidth_triton, num_sampled_tokens, quantile_rank
from kernels.cluster_argmax import cluster_argmax_ref, cluster_argmax_triton
from kernels.cosine_distance import cosine_distance_triton
from kernels.density_peaks import argsort_desc, assign_to_nearest, density_peaks_triton, log_density
from kernels.temporal_density import temporal_density_triton
from kernels.window_attention import window_attention_ref, window_attention_triton
from masking import cluster_stm, flat_ids
from tools.tables import try_or_message

QUANTILE, QUANTILE_TIME = 0.02, 0.1         # those of docs/bench.md; the default of cluster_stm is now 0.95, 0.1
MAX_DISTANCE_BYTES = 2 << 30                # of distances across frames that a baseline holds at a time
VARIES_WITH_T = ("whole path", "temporal_density", "bandwidth across")


# ---------------------------------------------------------------------------------------------------------------------
# Eager baselines

fp32_out = True         # whether torch.bmm(out_dtype=) works here, eager and compiled; set by probe_fp32_out


def probe_fp32_out() -> str:
    """Find out whether this version of torch has products of bf16 with fp32 output -> what the baselines' sums are."""
    global fp32_out
    a = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16)
    function = lambda a: torch.bmm(a, a.mT, out_dtype=torch.float32).tanh()
    result = try_or_message(lambda: torch.allclose(torch.compile(function)(a), function(a), atol=1e-3))
    fp32_out = result is True
    return "fp32 sums, not rounded" if fp32_out else f"fp32 sums rounded to bf16 (bmm with out_dtype {result})"


def matmul_fp32_out(a: Tensor, b: Tensor) -> Tensor:
    """a (F, n, C) times b (F, C, m) -> (F, n, m) fp32, summed in fp32. A CPU multiplies the same numbers as fp32."""
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32) if fp32_out and a.dtype != torch.float32 else (a @ b).float()


def eager_unit(x: Tensor) -> Tensor:
    """Scale x (..., C) to unit length and round it to the dtype of x."""
    return nnf.normalize(x.float(), dim=-1).to(x.dtype)


def eager_distance(x: Tensor) -> Tensor:
    """x (F, N, C) -> (F, N, N) fp32."""
    u = eager_unit(x)
    d = (1 - matmul_fp32_out(u, u.mT)).clamp_(0, 2)
    d.diagonal(dim1=1, dim2=2).zero_()
    return d


def distance_of_rank(d: Tensor, rank: int) -> Tensor:
    """d (..., n) -> (...), the rank-th smallest distance. A rank, because torch.compile cannot compute a quantile's."""
    return d.kthvalue(rank, dim=-1).values.clamp_min(MIN_BANDWIDTH)


def within_frame_bandwidth(d: Tensor, rank: int) -> Tensor:
    """d (F, N, N) -> (F,), the rank-th smallest distance between different tokens."""
    i, j = torch.triu_indices(d.shape[1], d.shape[1], 1, device=d.device)
    return distance_of_rank(d[:, i, j], rank)


def eager_bandwidth(x: Tensor, rank: int) -> Tensor:
    """x (F, N, C) or (B, T, N, C) -> the rank-th smallest distance within each frame, or across frames of each clip."""
    if x.ndim == 3:
        return within_frame_bandwidth(eager_distance(x), rank)
    t, s = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    u = eager_unit(x)
    d = (1 - matmul_fp32_out(u[:, t].flatten(0, 1), u[:, s].flatten(0, 1).mT)).clamp_(0, 2)
    return distance_of_rank(d.view(len(x), -1), rank)


def eager_density_peaks(x: Tensor, K: int, d_c: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of density_peaks_ref for "exp" and "nearest". If d_c is None, it is the distance of this rank."""
    d = eager_distance(x)
    log_rho = log_density(d, within_frame_bandwidth(d, rank) if d_c is None else d_c, "exp")
    by_density = argsort_desc(log_rho)
    density_rank = by_density.argsort(1)
    delta = d.masked_fill(density_rank[:, None, :] >= density_rank[:, :, None], torch.inf).amin(-1)
    peak = by_density[:, :1]
    delta = delta.scatter(1, peak, d.amax(-1).gather(1, peak))
    centres = argsort_desc(log_rho + delta.log())[:, :K].sort(1).values
    return assign_to_nearest(centres, d), centres, log_rho


def eager_temporal_density(x: Tensor, d_c: Tensor) -> Tensor:
    """The steps of temporal_density_ref, in place: x (B, T, N, C), d_c (B,) -> (B, T, N)."""
    B, T, N, _ = x.shape
    u = eager_unit(x)
    keys, tau = u.flatten(1, 2).mT, []
    for t in range(T):
        logits = matmul_fp32_out(u[:, t], keys).sub_(1).clamp_(-2, 0).div_(d_c[:, None, None])      # (B, N, TN)
        logits[:, :, t * N:(t + 1) * N] = -torch.inf
        tau.append(logits.logsumexp(-1))
    return torch.stack(tau, 1)


def eager_keep(x: Tensor, K: int, rank: int, rank_time: int) -> Tensor:
    """cluster_stm by the baselines: x (B, T, N, C) -> visible ids (B, TK)."""
    B, T, N, _ = x.shape
    labels, _, _ = eager_density_peaks(x.flatten(0, 1), K, None, rank)
    tau = eager_temporal_density(x, eager_bandwidth(x, rank_time))
    return flat_ids(cluster_argmax_ref(tau.view(B * T, N), labels, K).view(B, T, K), N)


def clips_per_chunk(B: int, T: int, N: int) -> int:
    """How many of B clips a baseline takes at a time: a divisor of B, within MAX_DISTANCE_BYTES unless it is 1."""
    limit = max(1, MAX_DISTANCE_BYTES // (2 * N * N * T * max(1, T - 1)))
    return max(n for n in range(1, B + 1) if B % n == 0 and n <= limit)


def chunked(function: Callable, size: int) -> Callable:
    """A function that calls function(x, *more tensors) on `size` clips at a time and joins the results."""
    return lambda *args: torch.cat([function(*chunk) for chunk in zip(*(a.split(size) for a in args), strict=True)])


def dpc_knn(x: Tensor, K: int, k: int = 5, noise: float = 1e-6) -> tuple[Tensor, Tensor]:
    """
    Density peaks over the k nearest neighbours, as TCFormer (Zeng et al., CVPR 2022) states it: x (F, N, C) -> labels
    (F, N), centres (F, K) by falling score. A token is its own first neighbour. Noise separates equal densities.
    """
    F, N, C = x.shape
    d = torch.cdist(x, x) / C ** 0.5                                                        # (F, N, N)
    rho = (-d.topk(k, dim=-1, largest=False).values.square().mean(-1)).exp()                # (F, N)
    rho = rho + noise * torch.rand_like(rho)
    denser = rho[:, None, :] > rho[:, :, None]
    delta = torch.where(denser, d, d.flatten(1).amax(1)[:, None, None]).amin(-1)
    centres = (rho * delta).topk(K, dim=-1).indices
    labels = d.gather(1, centres[:, :, None].expand(F, K, N)).argmin(1)
    return labels.scatter(1, centres, torch.arange(K, device=x.device).expand(F, K)), centres


# ---------------------------------------------------------------------------------------------------------------------
# Operations

@dataclass
class Operation:
    """What is timed and compiled. inputs(device, dtype, seed) draws the arguments of `kernel` and `eager`."""
    name: str
    flops: float
    bytes: float
    inputs: Callable
    kernel: Callable                    # keyword arguments override its launch sizes
    eager: Callable | None = None       # None: the operation is compiled, but not timed
    chunk: int = 0                      # clips that `eager` takes at a time; 0: all


def features(B: int, T: int, N: int, C: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random tokens (B, T, N, C): the sum of noise that all frames of a clip share and noise of each frame."""
    torch.manual_seed(seed)
    draw = lambda frames: torch.randn(B, frames, N, C, device=device, dtype=dtype)
    return draw(1) + draw(T)


def cost_model(F: int, N: int, C: int, T: int, K: int, heads: int = 12, size: int = 2) -> dict[str, tuple[int, int]]:
    """Flops and bytes of each operation on F frames, B = F / T clips; `size` is the bytes of a feature's component."""
    B, x = F // T, size * F * N * C
    S = num_sampled_tokens(QUANTILE_TIME, T * N)
    frames, across = 2 * F * N * N * C, 2 * B * T * (T - 1) * N * N * C
    clusters = 8 * F * N + 8 * F * K + 4 * F * N + 4 * F            # labels, centres, log rho; d_c, read or written
    return {
        "whole path": (across + frames, x + 8 * F * K),
        "temporal_density": (across, x + 4 * F * N + 4 * B),
        "bandwidth across": (2 * B * S * S * C, size * B * S * C + 4 * B),
        "density_peaks": (frames, x + clusters),
        "density_peaks, d_c given": (frames, x + clusters),
        "bandwidth within": (frames, x + 4 * F),
        "cosine_distance": (frames, x + 4 * F * N * N),
        "cluster_argmax": (0, 12 * F * N + 8 * F * K),
        "window_attention": (18 * F * N * C, size * F * N * (heads + 2 * C)),
    }


def operations(F: int, N: int, C: int, T: int, K: int) -> dict[str, Operation]:
    """All operations at one shape, by name; those that depend on T come first."""
    B, heads = F // T, next(C // width for width in (72, 64, C) if C % width == 0)          # as in SigLIP
    h = max(n for n in range(1, isqrt(N) + 1) if N % n == 0)
    grid, chunk = (h, N // h), clips_per_chunk(B, T, N)
    rank = quantile_rank(QUANTILE, max(1, N * (N - 1) // 2))
    rank_time = quantile_rank(QUANTILE_TIME, max(1, N * N * T * (T - 1) // 2))

    def clips(device, dtype, seed):
        return (features(B, T, N, C, device, dtype, seed),)

    def frames(device, dtype, seed):
        return (features(B, T, N, C, device, dtype, seed).flatten(0, 1),)

    def with_bandwidth(draw, count):
        return lambda device, dtype, seed: (*draw(device, dtype, seed), torch.full((count,), 0.9, device=device))

    def random_scores(device, dtype, seed):
        torch.manual_seed(seed)
        score, order = torch.randn(F, N, device=device), torch.rand(F, N, device=device).argsort(1)
        return score, order % K                                             # no cluster is empty

    def windows(device, dtype, seed):
        x, = frames(device, dtype, seed)
        return torch.randn(F, N, heads, device=device, dtype=dtype), x

    functions = {           # name -> inputs, kernel, eager baseline, and the chunk of the baseline
        "whole path": (clips, lambda x: cluster_stm(x, K, quantile=QUANTILE, quantile_time=QUANTILE_TIME, check=False),
                       lambda x: eager_keep(x, K, rank, rank_time), chunk),
        "temporal_density": (with_bandwidth(clips, B), temporal_density_triton, eager_temporal_density),
        "bandwidth across": (clips, lambda x, **launch: bandwidth_triton(x, QUANTILE_TIME, **launch),
                             lambda x: eager_bandwidth(x, rank_time), chunk),
        "density_peaks": (
            frames, lambda x, **launch: density_peaks_triton(x, K, None, "exp", "nearest", QUANTILE, **launch),
            lambda x: eager_density_peaks(x, K, None, rank)),
        "density_peaks, d_c given": (
            with_bandwidth(frames, F), lambda x, d_c: density_peaks_triton(x, K, d_c, "exp", "nearest"),
            lambda x, d_c: eager_density_peaks(x, K, d_c, 1)),
        "bandwidth within": (frames, lambda x: bandwidth_triton(x, QUANTILE), lambda x: eager_bandwidth(x, rank)),
        "cosine_distance": (frames, cosine_distance_triton, eager_distance),
        "cluster_argmax": (random_scores, lambda score, labels: cluster_argmax_triton(score, labels, K, frames=T),
                           lambda score, labels: cluster_argmax_ref(score, labels, K)),
        "window_attention": (windows, lambda scores, values: window_attention_triton(scores, values, grid),
                             lambda scores, values: window_attention_ref(scores, values, grid)),
    }
    cost = cost_model(F, N, C, T, K, heads)
    ops = {name: Operation(name, *cost[name], *rest) for name, rest in functions.items()}
    name = "density_peaks, gauss, parent"
    ops[name] = Operation(name, 0, 0, frames, lambda x: density_peaks_triton(x, K, None, "gauss", "parent"))
    return ops
