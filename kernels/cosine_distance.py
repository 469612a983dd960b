"""
Cosine distances between the tokens of a frame: x (F, N, C) -> d (F, N, N).

    d[f, i, j] = 1 - <x_i, x_j> / (|x_i| |x_j|),  clamped to [0, 2],  exactly 0 where i = j

A zero vector has no direction: it is at distance 1 from every other token.

Cost. One N x N x C product a frame, 2FN^2C flop; 4FN^2 bytes written. F, N, C = 1024, 196, 768: 60 Gflop, 157 MB.
"""

import torch
import torch.nn.functional as nn
from torch import Tensor

from kernels import check_features


def unit(x: Tensor) -> Tensor:
    """x (..., C) scaled to unit length, whatever its length; a zero vector stays zero."""
    x = x / x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)     # else squares may overflow
    return nn.normalize(x, dim=-1)


def cosine_distance_ref(x: Tensor) -> Tensor:
    """The definition. x (F, N, C) -> (F, N, N) in the dtype of x."""
    u = unit(x)
    d = (1 - u @ u.mT).clamp_(0, 2)             # (F, N, N)
    d.diagonal(dim1=1, dim2=2).zero_()
    return d


def cosine_distance(x: Tensor) -> Tensor:
    """x (F, N, C) of any float dtype -> (F, N, N) fp32. No gradient."""
    return cosine_distance_ref(check_features("cosine_distance", x, 3)).float()
