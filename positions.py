"""
Position embeddings of the tokens of a clip.

    sincos_pos_embed(grid (T, h, w), C, kind, device, reference)  ->  (Thw, C)     fixed sinusoids
    convolve_pos_embed(table (T', h', w', C), kernel, bias)       ->  (T', h', w', C)
    interpolate_pos_embed(table (T', h', w', C), grid)            ->  (Thw, C)     a learned table, at the clip's grid

A grid is the number of frames of a clip and of patches down and across a frame. The kinds in NEEDS_GRID measure
positions on a reference grid, so that they mean the same time and place at every clip length and resolution.
"""

from functools import lru_cache
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from kernels import to_device

PosEmbed = Literal["1d", "3d", "relative", "learned"]
GlobalPos = Literal["none", "affine", "conv"]
NEEDS_GRID = "relative", "learned"


@lru_cache(maxsize=128)         # a run may have tens of grids, each with tables for encoder and decoder
def sincos_pos_embed(grid: tuple[int, int, int], C: int, kind: PosEmbed, device: torch.device,
                     reference: tuple[int, ...] = ()) -> Tensor:
    """
    Fixed position embeddings of the tokens of a clip: grid (T, h, w) -> (Thw, C).

    "1d" interleaves sin and cos of the flat index (get_sinusoid_encoding_table of VideoMAE and UMT). "3d" gives a
    quarter of the channels to the frame's index and shares the rest between row and column. Its slowest wave is 100
    times as long as the fastest, not 10000 times, as no axis is long. "relative" is "3d" at the coordinates
    (i + 1/2) n_ref / n - 1/2 of index i of n on each axis, with n_ref of the reference grid. "learned" has the same:
    it is what the table of learned positions begins with, and what the decoder uses beside them.
    """
    def encode(coordinate: Tensor, C: int) -> Tensor:
        rate = (10000 if kind == "1d" else 100) ** (-2 * torch.arange((C + 1) // 2, dtype=torch.float64) / C)
        angle = coordinate.double()[:, None] * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :C]

    T, h, w = grid
    if kind == "1d":
        table = encode(torch.arange(T * h * w), C)
    else:
        axes = [torch.arange(n, dtype=torch.float64) for n in grid]
        if kind in NEEDS_GRID:
            axes = [(i + 0.5) * n_ref / len(i) - 0.5 for i, n_ref in zip(axes, reference, strict=True)]
        t, i, j = (x.flatten() for x in torch.meshgrid(*axes, indexing="ij"))
        Ct, Ch = C // 4, (C - C // 4) // 2
        table = torch.cat([encode(t, Ct), encode(i, Ch), encode(j, C - Ct - Ch)], 1)
    return to_device(table.float(), device)


def convolve_pos_embed(table: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """
    Convolve each channel of a table (T', h', w', C) with its kernel, of (k, k, k, C), k odd, and add its bias, of (C,).
    Beyond the table are zeros.

    The sum is written out: so it is computed in fp32 under autocast, without TF32, and its backward pass is
    deterministic.
    """
    k, (T, h, w) = len(kernel), table.shape[:3]
    padded = nnf.pad(table, (0, 0, *[k // 2] * 6))
    terms = (kernel[t, i, j] * padded[t:t + T, i:i + h, j:j + w] for t, i, j in product(range(k), repeat=3))
    return sum(terms, bias)


def interpolate_pos_embed(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """
    Interpolate a table (T', h', w', C) to a grid (T, h, w) that is no larger: linear in t, bicubic in h and w.

    The values are those of torch.nn.functional.interpolate with align_corners=False. These are products with constant
    matrices, because the backward pass of its bicubic kernel is not deterministic on a GPU.
    """
    size = tuple(table.shape[:3])
    if any(n > n_table for n, n_table in zip(grid, size, strict=True)):
        raise ValueError(f"the grid (T, h, w) of a clip must be at most {size}, that of the learned positions "
                         f"(vit.grid), on each axis, got {tuple(grid)}")
    if grid != size:
        axes = zip(size, grid, ("bilinear", "bicubic", "bicubic"), strict=True)
        matrices = [interpolation_matrix(*axis, table.dtype, table.device) for axis in axes]
        with torch.autocast(table.device.type, enabled=False):
            table = torch.einsum("thwc,tT,hH,wW->THWc", table, *matrices)
    return table.flatten(0, 2)


@lru_cache(maxsize=256)
@torch.inference_mode(False)    # autograd could not save a tensor that is made in inference mode
def interpolation_matrix(n: int, n_out: int, mode: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (n, n_out) that interpolates n values to n_out; its row i is what the unit vector i becomes."""
    eye = torch.eye(n, dtype=torch.float64)[None, :, None]              # n images of 1 x n pixels
    matrix = nnf.interpolate(eye, size=(1, n_out), mode=mode, align_corners=False)[0, :, 0]
    return to_device(matrix.to(dtype), device)
