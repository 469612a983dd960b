"""
Temporal density: how often a token recurs in the other frames of its clip. x (B, T, N, C) -> (B, T, N).

    tau[t, i] = log of the sum, over all tokens j of all frames s != t, of exp(-d(x_ti, x_sj) / d_c)

with d the cosine distance. As a logarithm it does not overflow, and a small d_c does not make it zero for all tokens.
It is the log-sum-exp of an attention with unit features as queries and keys and temperature d_c; a token's own frame is
masked out. For T = 1 the sum is empty and its logarithm -inf.

Cost. 2BT(T-1)N^2C flop. The reference holds the logits of one frame of each clip at a time, (B, N, TN), not (TN)^2.

The kernel multiplies each pair of tokens once, as d_ij = d_ji: half the flop. A tile of 128 x 128 distances stays in
registers; only the logarithms of its row sums and column sums are written, each group of tiles to its own memory. A
second kernel adds these partial sums in a fixed order: no atomics, the same bits every run. A token has 2 partial sums
per group of tiles, and groups are so large that a clip has at most 32: at most 256 bytes per token, whatever T and N.

If no exponential of the clip can underflow (d_c above 0.0123), the sums need no running maximum; otherwise each row and
each column of a tile has its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import check_bandwidth, check_tokens, frames_per_chunk, launch_config
from .cosine_distance import cosine_distance_tile, dot_tile, inverse_norm, l2_normalize

MAX_GROUPS = 32     # groups of tiles per clip


def temporal_density_ref(x: Tensor, d_c: Tensor) -> Tensor:
    """The definition, one frame at a time: x (B, T, N, C), d_c (B,) -> (B, T, N)."""
    B, T, N, C = x.shape
    u = l2_normalize(x)
    keys = u.flatten(1, 2).mT                                                   # (B, C, TN)
    tau = []
    for t in range(T):
        d = (1 - u[:, t] @ keys).clamp_(0, 2)                                   # (B, N, TN)
        logits = -d / d_c[:, None, None]
        logits[:, :, t * N:(t + 1) * N] = -torch.inf
        tau.append(logits.logsumexp(-1))
    return torch.stack(tau, 1)


@triton.jit
def inverse_norm_kernel(x_ptr, inv_norm_ptr, tokens, C, BLOCK: tl.constexpr, C_PAD: tl.constexpr):
    """One program: BLOCK tokens of x (tokens, C) -> their inverse lengths (tokens,)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C_PAD)
    inside = (i < tokens)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + i[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(inv_norm_ptr + i, inverse_norm(tl.sum(x * x, 1)), mask=i < tokens)


@triton.jit
def finite_or_zero(maximum):
    """Return the maximum to subtract in a log-sum-exp: 0 instead of -inf, which stands for an empty sum."""
    return tl.where(maximum > -float("inf"), maximum, 0.0)


@triton.jit
def logaddexp2(a, b):
    """log2(2^a + 2^b), elementwise; -inf is an empty sum."""
    maximum = finite_or_zero(tl.maximum(a, b))
    return maximum + tl.log2(tl.exp2(a - maximum) + tl.exp2(b - maximum))


@triton.jit
def temporal_density_kernel(
    x_ptr, inv_norm_ptr, d_c_ptr, partial_ptr,      # (B, n, C), (B, n), (B,) read; (B, 2, G, n) written; n = TN
    n, N, C, G, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """
    One program: the tiles whose rows are group gi of a clip's tokens and whose columns are group gj >= gi.

    partial[b, 0, gj] holds the sums along rows, partial[b, 1, gi] those along columns, as base-2 logarithms.
    """
    pair = tl.program_id(0) % (G * G)
    b = tl.program_id(0).to(tl.int64) // (G * G)        # b * n * C can exceed 2^31
    gi = pair // G
    gj = pair % G
    if gi > gj:
        return
    x_ptr += b * n * C
    inv_norm_ptr += b * n
    row_ptr = partial_ptr + ((2 * b) * G + gj) * n
    column_ptr = partial_ptr + ((2 * b + 1) * G + gi) * n
    exp2_scale = 1.4426950408889634 / tl.maximum(tl.load(d_c_ptr + b), 1e-30)       # exp(-d/d_c) = 2^(-d exp2_scale)
    for i0 in range(gi * GROUP * BLOCK, tl.minimum((gi + 1) * GROUP * BLOCK, n), BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inv_norm_i = tl.load(inv_norm_ptr + i, mask=i < n, other=0.0)
        frame_i = tl.where(i < n, i // N, -1)
        row_sum = tl.full((BLOCK,), -float("inf"), tl.float32)
        if GROUP > 1:
            tl.debug_barrier()                                  # the column sums of the previous iteration are written
        for j0 in range(tl.maximum(i0, gj * GROUP * BLOCK), tl.minimum((gj + 1) * GROUP * BLOCK, n), BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            tile_row_sum = tl.full((BLOCK,), -float("inf"), tl.float32)
            column_sum = tl.full((BLOCK,), -float("inf"), tl.float32)
            if i0 // N < (tl.minimum(j0 + BLOCK, n) - 1) // N:                  # the tile is not within one frame
                inv_norm_j = tl.load(inv_norm_ptr + j, mask=j < n, other=0.0)
                frame_j = tl.where(j < n, j // N, -1)
                dot = dot_tile(x_ptr, tl.minimum(i, n - 1), tl.minimum(j, n - 1), C, False, BLOCK, BLOCK_C)
                d = cosine_distance_tile(dot, inv_norm_i, inv_norm_j)
                inside = tl.minimum(frame_i[:, None], frame_j[None, :]) >= 0
                counted = (frame_i[:, None] != frame_j[None, :]) & inside
                if exp2_scale < 117:                                            # terms from 2^-124 to 2^110
                    e = tl.where(counted, tl.exp2(110 - d * exp2_scale), 0.0)
                    tile_row_sum = tl.log2(tl.sum(e, 1)) - 110
                    column_sum = tl.log2(tl.sum(e, 0)) - 110
                else:
                    a = tl.where(counted, -d * exp2_scale, -float("inf"))
                    maximum = finite_or_zero(tl.max(a, 1))
                    tile_row_sum = maximum + tl.log2(tl.sum(tl.exp2(a - maximum[:, None]), 1))
                    maximum = finite_or_zero(tl.max(a, 0))
                    column_sum = maximum + tl.log2(tl.sum(tl.exp2(a - maximum[None, :]), 0))
            row_sum = logaddexp2(row_sum, tile_row_sum)
            if j0 == i0:                            # a diagonal tile is symmetric: its row sums already have every pair
                column_sum = tl.full((BLOCK,), -float("inf"), tl.float32)
            if i0 > gi * GROUP * BLOCK:
                column_sum = logaddexp2(column_sum, tl.load(column_ptr + j, mask=j < n, other=0.0))
            tl.store(column_ptr + j, column_sum, mask=j < n)
        tl.store(row_ptr + i, row_sum, mask=i < n)


@triton.jit
def reduce_partials_kernel(partial_ptr, tau_ptr, n, G, GROUP_TOKENS, BLOCK: tl.constexpr):
    """One program: BLOCK tokens of a clip, partial (B, 2, G, n) -> tau (B, n). A group has GROUP_TOKENS tokens."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = i // GROUP_TOKENS
    partial_ptr += 2 * b * G * n + i
    maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
    for g in range(G):                              # row sums with later groups, column sums with earlier ones
        row = tl.load(partial_ptr + g * n, mask=(i < n) & (g >= group), other=-float("inf"))
        column = tl.load(partial_ptr + (G + g) * n, mask=(i < n) & (g <= group), other=-float("inf"))
        maximum = tl.maximum(maximum, tl.maximum(row, column))
    maximum = finite_or_zero(maximum)
    total = tl.zeros((BLOCK,), tl.float32)
    for g in range(G):
        row = tl.load(partial_ptr + g * n, mask=(i < n) & (g >= group), other=-float("inf"))
        column = tl.load(partial_ptr + (G + g) * n, mask=(i < n) & (g <= group), other=-float("inf"))
        total += tl.exp2(row - maximum) + tl.exp2(column - maximum)
    tl.store(tau_ptr + b * n + i, (maximum + tl.log2(total)) / 1.4426950408889634, mask=i < n)


def inverse_norm_triton(x: Tensor) -> Tensor:
    """x (..., C) -> (...) fp32, 1/|x|; 0 for a zero vector."""
    x, inv_norm = x.contiguous(), torch.empty(x.shape[:-1], device=x.device)
    C_PAD = triton.next_power_of_2(x.shape[-1])
    BLOCK, tokens = max(1, 8192 // C_PAD), inv_norm.numel()
    with torch.cuda.device_of(x):
        inverse_norm_kernel[(triton.cdiv(tokens, BLOCK),)](x, inv_norm, tokens, x.shape[-1], BLOCK, C_PAD)
    return inv_norm


def temporal_density_triton(x: Tensor, d_c: Tensor, inv_norm: Tensor | None = None, **launch) -> Tensor:
    """
    Launch the kernels: x (B, T, N, C) in fp32, fp16 or bf16, d_c (B,) fp32 -> (B, T, N).

    inv_norm (B, T, N): the inverse lengths of the tokens, if known. `launch` overrides the choices of `launch_config`.
    """
    B, T, N, C = x.shape
    if T == 1:
        return torch.full((B, T, N), -torch.inf, device=x.device)
    x, n = x.contiguous(), T * N
    inv_norm = inverse_norm_triton(x) if inv_norm is None else inv_norm
    config = launch_config(x, n) | launch
    tiles = triton.cdiv(n, config["BLOCK"])
    GROUP = triton.cdiv(tiles, MAX_GROUPS)
    G = triton.cdiv(tiles, GROUP)
    partial, tau = torch.empty(B, 2, G, n, device=x.device), torch.empty(B, T, N, device=x.device)
    with torch.cuda.device_of(x):
        temporal_density_kernel[(B * G * G,)](x, inv_norm, d_c, partial, n, N, C, G, GROUP=GROUP, **config)
        reduce_partials_kernel[(triton.cdiv(n, 256), B)](partial, tau, n, G, GROUP * config["BLOCK"], BLOCK=256)
    return tau


def temporal_density(x: Tensor, d_c, check: bool = True) -> Tensor:
    """x (B, T, N, C), d_c a number or (B,) -> (B, T, N) fp32, the logarithm of the sum; -inf at T = 1. No gradient."""
    x = check_tokens("temporal_density", x, 4, check)
    d_c = check_bandwidth(d_c, x.shape[0], x, check)
    if x.is_cuda:
        return temporal_density_triton(x, d_c)
    chunks = zip(x.split(frames_per_chunk(x)), d_c.split(frames_per_chunk(x)), strict=True)
    return torch.cat([temporal_density_ref(*chunk) for chunk in chunks]).float()
