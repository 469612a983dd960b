"""
Bandwidth d_c: a quantile of cosine distances, one number a frame or one a clip.

    x (F, N, C)     -> (F,)  over the N(N-1)/2 pairs of different tokens of a frame
    x (B, T, N, C)  -> (B,)  over the N^2 T(T-1)/2 pairs of tokens of different frames of a clip

The quantile q of n sorted distances is the one of rank ceil(qn), at least the first: an element, nothing interpolated
(Rodriguez & Laio, Science 2014, choose d_c so that 1-2 % of the pairs are nearer). Never below 1e-6, so that constant
frames are legal; with no pair at all (N = 1, or T = 1) it is 1e-6.

Cost. The distances, N^2 (T-1)/2T of them a token, then a selection (not a sort): linear in their number.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from kernels import check_features
from kernels.cosine_distance import cosine_distance_ref, unit

FLOOR = 1e-6


def select(d: Tensor, quantile: float) -> Tensor:
    """d (..., n) -> (...), the element of rank ceil(quantile * n)."""
    n = d.shape[-1]
    if n == 0:
        return d.new_full(d.shape[:-1], FLOOR)
    # The quantile as written, 0.02 and not its nearest double, or 0.02 * 50 would have rank 2.
    rank = max(1, math.ceil(Fraction(str(quantile)) * n))
    return d.kthvalue(rank, dim=-1).values.clamp_min(FLOOR)


def bandwidth_ref(x: Tensor, quantile: float) -> Tensor:
    """The definition, exact. One clip's distances at a time across frames, so that memory does not grow with B."""
    N = x.shape[-2]
    if x.ndim == 3:
        i, j = torch.triu_indices(N, N, 1, device=x.device)
        return select(cosine_distance_ref(x)[:, i, j], quantile)
    T = x.shape[1]
    t, s = torch.triu_indices(T, T, 1, device=x.device)
    u = unit(x)
    return torch.stack([select((1 - clip[t] @ clip[s].mT).clamp_(0, 2).flatten(), quantile) for clip in u])


def bandwidth(x: Tensor, quantile: float) -> Tensor:
    """x (F, N, C) -> (F,) within frames, or (B, T, N, C) -> (B,) across frames; fp32, >= 1e-6. No gradient."""
    if not 0 < quantile <= 1:
        raise ValueError(f"bandwidth wants a quantile in (0, 1], got {quantile}")
    return bandwidth_ref(check_features("bandwidth", x, 4 if x.ndim == 4 else 3), quantile).float()
