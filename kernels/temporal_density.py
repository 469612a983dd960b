"""
Temporal density: how often a token recurs in the other frames of its clip. x (B, T, N, C) -> (B, T, N).

    tau[t, i] = log of the sum, over all tokens j of all frames s != t, of exp(-d(x_ti, x_sj) / d_c)

with d the cosine distance. As a logarithm it neither overflows nor, at small d_c, becomes zero for all tokens at once.
It is the log-sum-exp of an attention: queries and keys the unit features, temperature d_c, the own frame masked out.
At T = 1 the sum is empty and its logarithm -inf.

Cost. 2BT(T-1)N^2C flop. Held at a time by the reference: the logits of one frame of each clip, (B, N, TN), not (TN)^2.

The kernel multiplies each pair of tokens once, as d_ij = d_ji: half the flop. A tile of 128 x 128 distances stays in
registers; what leaves it is the logarithm of each row's sum and of each column's, into a slot of its own, and a second
kernel adds the slots, always in one order: no atomics, the same bits every run. A token has 2 slots for each group of
tiles, and groups are as large as keep them at most 32: at most 256 bytes a token, whatever T and N.

Where no exponential of the clip can underflow (d_c above 0.0123) the sums need no running maximum; where one could,
each row and each column of a tile has its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cached, check_bandwidth, check_tokens, tiles
from kernels.cosine_distance import cosine, dots, inverse, unit

SLOTS = 32          # groups of tiles a clip has at most


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


@triton.jit
def inverse_length_kernel(x_ptr, inv_ptr, rows, C, ROWS: tl.constexpr, C_PAD: tl.constexpr):
    """One program: ROWS tokens of x (rows, C) -> their inverse lengths (rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C_PAD)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(inv_ptr + row, inverse(tl.sum(x * x, 1)), mask=row < rows)


@triton.jit
def add_logs(a, b):
    """log2(2^a + 2^b), elementwise; -inf is a sum of nothing."""
    top = tl.maximum(a, b)
    top = tl.where(top > -float("inf"), top, 0.0)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


@triton.jit
def temporal_density_kernel(
    x_ptr, inv_ptr, d_c_ptr, slots_ptr,         # (B, n, C), (B, n), (B,), (B, 2, G, n) written; n = TN
    n, N, C, G, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """
    One program: the tiles of group gi of a clip's tokens, as rows, with group gj >= gi, as columns.

    slots[b, 0, gj] takes the sums along rows, slots[b, 1, gi] those along columns.
    """
    pair = tl.program_id(0) % (G * G)
    b = tl.program_id(0).to(tl.int64) // (G * G)        # b * n * C can pass 2^31
    gi = pair // G
    gj = pair % G
    if gi > gj:
        return
    x_ptr += b * n * C
    inv_ptr += b * n
    row_ptr = slots_ptr + ((2 * b) * G + gj) * n
    column_ptr = slots_ptr + ((2 * b + 1) * G + gi) * n
    per_d_c = 1.4426950408889634 / tl.maximum(tl.load(d_c_ptr + b), 1e-30)      # exp(-d/d_c) = 2^(-d per_d_c)
    for i0 in range(gi * GROUP * BLOCK, tl.minimum((gi + 1) * GROUP * BLOCK, n), BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        inv_i = tl.load(inv_ptr + i, mask=i < n, other=0.0)
        frame_i = tl.where(i < n, i // N, -1)
        row = tl.full((BLOCK,), -float("inf"), tl.float32)
        if GROUP > 1:
            tl.debug_barrier()                                                  # columns of the last turn are there
        for j0 in range(tl.maximum(i0, gj * GROUP * BLOCK), tl.minimum((gj + 1) * GROUP * BLOCK, n), BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            in_row = tl.full((BLOCK,), -float("inf"), tl.float32)
            in_column = tl.full((BLOCK,), -float("inf"), tl.float32)
            if i0 // N < (tl.minimum(j0 + BLOCK, n) - 1) // N:                  # not all of it is one frame
                inv_j = tl.load(inv_ptr + j, mask=j < n, other=0.0)
                frame_j = tl.where(j < n, j // N, -1)
                d = cosine(dots(x_ptr, tl.minimum(i, n - 1), tl.minimum(j, n - 1), C, False, BLOCK, BLOCK_C),
                           inv_i, inv_j)
                apart = (frame_i[:, None] != frame_j[None, :]) & (tl.minimum(frame_i[:, None], frame_j[None, :]) >= 0)
                if per_d_c < 117:                                               # 2^110 and 2^-124 at the extremes
                    e = tl.where(apart, tl.exp2(110 - d * per_d_c), 0.0)
                    in_row = tl.log2(tl.sum(e, 1)) - 110
                    in_column = tl.log2(tl.sum(e, 0)) - 110
                else:
                    a = tl.where(apart, -d * per_d_c, -float("inf"))
                    top = tl.max(a, 1)
                    top = tl.where(top > -float("inf"), top, 0.0)
                    in_row = top + tl.log2(tl.sum(tl.exp2(a - top[:, None]), 1))
                    top = tl.max(a, 0)
                    top = tl.where(top > -float("inf"), top, 0.0)
                    in_column = top + tl.log2(tl.sum(tl.exp2(a - top[None, :]), 0))
            row = add_logs(row, in_row)
            if j0 == i0:                            # the tile is its own mirror: its rows have it all
                in_column = tl.full((BLOCK,), -float("inf"), tl.float32)
            if i0 > gi * GROUP * BLOCK:
                in_column = add_logs(in_column, tl.load(column_ptr + j, mask=j < n, other=0.0))
            tl.store(column_ptr + j, in_column, mask=j < n)
        tl.store(row_ptr + i, row, mask=i < n)


@triton.jit
def add_slots_kernel(slots_ptr, tau_ptr, n, G, SPAN, BLOCK: tl.constexpr):
    """One program: BLOCK tokens of a clip, slots (B, 2, G, n) -> tau (B, n). SPAN tokens are a group of tiles."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = i // SPAN
    slots_ptr += 2 * b * G * n + i
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    for g in range(G):                              # the row slots of later groups, the column slots of earlier ones
        row = tl.load(slots_ptr + g * n, mask=(i < n) & (g >= group), other=-float("inf"))
        column = tl.load(slots_ptr + (G + g) * n, mask=(i < n) & (g <= group), other=-float("inf"))
        top = tl.maximum(top, tl.maximum(row, column))
    top = tl.where(top > -float("inf"), top, 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for g in range(G):
        row = tl.load(slots_ptr + g * n, mask=(i < n) & (g >= group), other=-float("inf"))
        column = tl.load(slots_ptr + (G + g) * n, mask=(i < n) & (g <= group), other=-float("inf"))
        total += tl.exp2(row - top) + tl.exp2(column - top)
    tl.store(tau_ptr + b * n + i, (top + tl.log2(total)) / 1.4426950408889634, mask=i < n)


def inverse_length_triton(x: Tensor) -> Tensor:
    """x (..., C) -> (...) fp32, 1/|x|; 0 for a zero vector."""
    x, inv = x.contiguous(), torch.empty(x.shape[:-1], device=x.device)
    C_PAD = triton.next_power_of_2(x.shape[-1])
    ROWS = max(1, 8192 // C_PAD)
    with torch.cuda.device_of(x):
        inverse_length_kernel[(triton.cdiv(inv.numel(), ROWS),)](x, inv, inv.numel(), x.shape[-1], ROWS, C_PAD)
    return inv


def temporal_density_triton(x: Tensor, d_c: Tensor, inv: Tensor | None = None, **launch) -> Tensor:
    """The kernels' launch. x (B, T, N, C) in fp32, fp16 or bf16, d_c (B,) fp32, inv (B, T, N) if known -> (B, T, N)."""
    B, T, N, C = x.shape
    if T == 1:
        return torch.full((B, T, N), -torch.inf, device=x.device)
    x, n = x.contiguous(), T * N
    inv = inverse_length_triton(x) if inv is None else inv
    shape = tiles(x, n) | launch
    blocks = triton.cdiv(n, shape["BLOCK"])
    GROUP = triton.cdiv(blocks, SLOTS)
    G = triton.cdiv(blocks, GROUP)
    slots, tau = torch.empty(B, 2, G, n, device=x.device), torch.empty(B, T, N, device=x.device)
    with torch.cuda.device_of(x):
        temporal_density_kernel[(B * G * G,)](x, inv, d_c, slots, n, N, C, G, GROUP=GROUP, **shape)
        add_slots_kernel[(triton.cdiv(n, 256), B)](slots, tau, n, G, GROUP * shape["BLOCK"], BLOCK=256)
    return tau


def temporal_density(x: Tensor, d_c, check: bool = True) -> Tensor:
    """x (B, T, N, C), d_c a number or (B,) -> (B, T, N) fp32, the logarithm of the sum; -inf at T = 1. No gradient."""
    x = check_tokens("temporal_density", x, 4, check)
    d_c = check_bandwidth(d_c, x.shape[0], x, check)
    if x.is_cuda:
        return temporal_density_triton(x, d_c)
    parts = zip(x.split(cached(x)), d_c.split(cached(x)), strict=True)
    return torch.cat([temporal_density_ref(*part) for part in parts]).float()
