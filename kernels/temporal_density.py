"""
Temporal density: how often a token recurs in the other frames of its clip. x (B, T, N, C) -> (B, T, N).

    tau[t, i] = log of the sum, over all tokens j of all frames s != t, of exp(-d(x_ti, x_sj) / d_c)

with d the cosine distance. As a logarithm it neither overflows nor, at small d_c, becomes zero for all tokens at once.
It is the log-sum-exp of an attention: queries and keys the unit features, temperature d_c, the own frame masked out.
At T = 1 the sum is empty and its logarithm -inf.

Cost. 2BT(T-1)N^2C flop. Held at a time: the logits of one frame of each clip, (B, N, TN), not (TN)^2.
"""

import torch
from torch import Tensor

from kernels import check_bandwidth, check_features
from kernels.cosine_distance import unit


def temporal_density_ref(x: Tensor, d_c: Tensor) -> Tensor:
    """The definition, a frame at a time. x (B, T, N, C), d_c (B,) -> (B, T, N)."""
    B, T, N, C = x.shape
    u = unit(x)
    keys = u.flatten(1, 2).mT                                                   # (B, C, TN)
    tau = []
    for t in range(T):
        d = (1 - u[:, t] @ keys).clamp_(0, 2)                                   # (B, N, TN)
        logits = -d / d_c[:, None, None]
        logits[:, :, t * N:(t + 1) * N] = -torch.inf
        tau.append(logits.logsumexp(-1))
    return torch.stack(tau, 1)


def temporal_density(x: Tensor, d_c) -> Tensor:
    """x (B, T, N, C), d_c a number or (B,) -> (B, T, N) fp32, the logarithm of the sum; -inf at T = 1. No gradient."""
    x = check_features("temporal_density", x, 4)
    return temporal_density_ref(x, check_bandwidth(d_c, x.shape[0], x)).float()
