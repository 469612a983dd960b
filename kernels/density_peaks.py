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

Cost. One N x N x C product a frame, 2FN^2C flop, and a few passes over N^2 distances.
"""

import torch
from torch import Tensor

from kernels import check_bandwidth, check_features
from kernels.cosine_distance import cosine_distance_ref


def log_density(d: Tensor, d_c: Tensor, density: str) -> Tensor:
    """d (F, N, N), d_c (F,) -> log rho (F, N); -inf for the only token of a frame."""
    a = d / d_c[:, None, None]
    if density == "gauss":
        a = a.square()
    itself = torch.eye(d.shape[1], dtype=torch.bool, device=d.device)
    return (-a).masked_fill(itself, -torch.inf).logsumexp(-1)


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
    """The definition. x (F, N, C), d_c (F,) -> labels (F, N), centres (F, K), rho (F, N)."""
    F, N, _ = x.shape
    d = cosine_distance_ref(x)                                                  # (F, N, N)
    log_rho = log_density(d, d_c, density)                                      # (F, N)

    by_density = order(log_rho)                                                 # (F, N), densest first
    rank = by_density.argsort(1)
    denser = rank[:, None, :] < rank[:, :, None]                                # (F, i, j): j is denser than i
    delta, parent = d.masked_fill(~denser, torch.inf).min(-1)                   # (F, N), (F, N)
    peak = by_density[:, :1]
    delta = delta.scatter(1, peak, d.amax(-1).gather(1, peak))
    parent = parent.scatter(1, peak, peak)

    log_gamma = log_rho + delta.log()                                           # -inf where delta = 0
    centres = order(log_gamma)[:, :K].sort(1).values
    labels = nearest(centres, d) if assign == "nearest" else follow(parent, centres, d)
    return labels, centres, log_rho.exp()


def density_peaks(
    x: Tensor, K: int, d_c, density: str = "exp", assign: str = "nearest",
) -> tuple[Tensor, Tensor, Tensor]:
    """
    x (F, N, C), d_c a number or (F,) -> labels (F, N) int64 in [0, K), centres (F, K) int64 ascending, rho (F, N) fp32.

    labels[f, centres[f, k]] == k. K from 1 to N. No gradient.
    """
    x = check_features("density_peaks", x, 3)
    F, N, _ = x.shape
    if not 1 <= K <= N:
        raise ValueError(f"density_peaks wants K from 1 to N = {N}, got {K}")
    if density not in ("exp", "gauss"):
        raise ValueError(f"density_peaks knows the densities 'exp' and 'gauss', got {density!r}")
    if assign not in ("nearest", "parent"):
        raise ValueError(f"density_peaks assigns to the 'nearest' centre or the 'parent's, got {assign!r}")
    labels, centres, rho = density_peaks_ref(x, K, check_bandwidth(d_c, F, x), density, assign)
    return labels, centres, rho.float()
