"""The operations of the masking path, one a file: mathematics and cost, PyTorch reference, public function."""

import torch
from torch import Tensor


def check_features(name: str, x: Tensor, ndim: int) -> Tensor:
    """
    x as every operation wants it, or a one-line ValueError: `ndim` axes, none of them empty, floating, finite.

    Returns x detached, in fp32 (fp64 stays fp64: the tests' oracle is the reference in fp64).
    """
    letters = {3: "(F, N, C)", 4: "(B, T, N, C)", 2: "(F, N)"}[ndim]
    if x.ndim != ndim:
        raise ValueError(f"{name} wants {letters}, got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} wants no empty axis in {letters}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} wants floating-point values, got {x.dtype}")
    if not x.isfinite().all():
        raise ValueError(f"{name} wants finite values, got {int((~x.isfinite()).sum())} NaN or infinite of {x.numel()}")
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def check_bandwidth(d_c, count: int, like: Tensor) -> Tensor:
    """d_c, a positive number or one for each of `count` frames or clips -> (count,) in the dtype of `like`."""
    d_c = torch.as_tensor(d_c, dtype=like.dtype, device=like.device)
    if d_c.ndim == 0:
        d_c = d_c.expand(count)
    if d_c.shape != (count,):
        raise ValueError(f"d_c wants one number or ({count},), got {tuple(d_c.shape)}")
    if not (d_c > 0).all():
        raise ValueError(f"d_c wants positive numbers, got {d_c.min().item():g}")
    return d_c
