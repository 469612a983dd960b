"""
Temporal density: how often a token recurs in the other frames of its clip. x (B, T, N, C) -> (B, T, N).

    tau[t, i] = log of the sum, over all tokens j of all frames s != t, of exp(-d(x_ti, x_sj) / d_c)

with d the cosine distance. As a logarithm it does not overflow, and a small d_c does not make it zero for all tokens.
It is the log-sum-exp of an attention with unit features as queries and keys and temperature d_c; a token's own frame is
masked out. For T = 1 the sum is empty and its logarithm -inf.

Cost. 2BT(T-1)N^2C flop. The reference holds the logits of one frame of each clip at a time, (B, N, TN), not (TN)^2.

The kernel multiplies each pair of tokens once, as d_ij = d_ji: half the flop. A tile of 128 x 128 cosines stays in
registers; only the sums along its rows and columns are written, each group of tiles to its own memory. A second kernel
adds these partial sums in a fixed order: no atomics, the same bits every run. A token has 2 partial sums per group of
tiles, and groups are so large that a clip has at most 32: at most 256 bytes per token, whatever T and N.

With s = log2(e) / d_c, the term exp(-d / d_c) is 2^-s 2^(s cos), so a token's sum is 2^-s times a sum of numbers from
2^-s to 2^s. For s <= 104, a d_c of at least 0.0139, fp32 holds any sum of fewer than 2^24 of them: the sums are added
as they are, and the second kernel takes one logarithm per token. An entry of a tile then costs two multiplications, a
minimum, an exponential and two additions, and, only where its rows and columns have a frame in common or the clip ends,
a mask. For a smaller d_c each row and each column of a tile has its own maximum, and partial sums are logarithms.

F, N, C = 1024, 196, 768, T = 8, bf16: a clip has 91 tiles, of which 84 are multiplied and 32 masked. All clips: 271
Gflop, of which 211 are needed, and 4.2 GB read from the L2 cache. In the machine code for sm_90 (Triton 3.6), with 8
warps a program, a thread executes 816 instructions for the product of a tile and 1,300 for the rest, with a mask 1,450.
"""

import torch
from torch import Tensor

from . import check_bandwidth, check_tokens, frames_per_chunk, launch_config, tl, triton
from .cosine_distance import dot_tile, inverse_norm, l2_normalize

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


@triton.jit(do_not_specialize=["tokens"])
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
def logsumexp2(a, axis: tl.constexpr):
    """log2 of the sums of 2^a along an axis of a (I, J); -inf is an empty sum."""
    maximum = finite_or_zero(tl.max(a, axis))
    return maximum + tl.log2(tl.sum(tl.exp2(a - tl.expand_dims(maximum, axis)), axis))


@triton.jit
def decay_rate(d_c):
    """Return s = log2(e) / d_c, so that exp(-d / d_c) = 2^(-s d). A NaN counts as the smallest d_c, 1e-30."""
    return 1.4426950408889634 / tl.where(d_c > 1e-30, d_c, 1e-30)


@triton.jit
def sums_are_linear(s):
    """Return whether the partial sums of a clip are sums of 2^(s cos), not logarithms of sums of 2^(-s d)."""
    return s <= 104


@triton.jit
def add_sums(a, b, linear):
    """Add two partial sums."""
    if linear:
        a += b
    else:
        a = logaddexp2(a, b)
    return a


@triton.jit
def group_pair(p, G):
    """
    Return the p-th of the G(G + 1) / 2 pairs of groups gi <= gj.

    They are numbered (g, g), (g, g + 1), (g, g + 2), ... modulo G, each time for g from 0 to G - 1. If G is even, the
    last are g and g + G/2, for g < G/2.
    """
    first = p % G
    second = (first + p // G) % G
    return tl.minimum(first, second), tl.maximum(first, second)


@triton.jit
def in_different_frames(i, j, n, N: tl.constexpr):
    """Tokens i (I,) and j (J,) of a clip of n -> whether they are in different frames (I, J); False for j >= n."""
    return ((i // N)[:, None] != (j // N)[None, :]) & (j < n)[None, :]


@triton.jit(do_not_specialize=["G"])
def temporal_density_kernel(
    x_ptr, inv_norm_ptr, d_c_ptr, partial_ptr,      # (B, n, C), (B, n), (B,) read; (B, 2, G, n) written; n = TN
    n, C, G, N: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """
    One program: the tiles whose rows are group gi of a clip's tokens and whose columns are group gj >= gi.

    partial[b, 0, gj] holds the sums along rows, partial[b, 1, gi] those along columns. A group is GROUP tiles wide. All
    state between two tiles is in this memory, so that the registers suffice for two programs on a multiprocessor.
    """
    pairs = G * (G + 1) // 2
    b = tl.program_id(0).to(tl.int64) // pairs          # b * n * C can exceed 2^31
    gi, gj = group_pair(tl.program_id(0) % pairs, G)
    x_ptr += b * n * C
    inv_norm_ptr += b * n
    row_ptr = partial_ptr + ((2 * b) * G + gj) * n
    column_ptr = partial_ptr + ((2 * b + 1) * G + gi) * n
    s = decay_rate(tl.load(d_c_ptr + b))
    linear = sums_are_linear(s)
    empty = tl.where(linear, 0.0, -float("inf"))
    for tile in range(GROUP * GROUP):
        tile_row, tile_column = tile // GROUP, tile % GROUP
        i0 = (gi * GROUP + tile_row) * BLOCK
        j0 = (gj * GROUP + tile_column) * BLOCK
        i = i0 + tl.arange(0, BLOCK)
        j = j0 + tl.arange(0, BLOCK)
        row_sum = tl.zeros((BLOCK,), tl.float32) + empty
        column_sum = tl.zeros((BLOCK,), tl.float32) + empty
        if GROUP > 1:
            tl.debug_barrier()                                  # the sums of the previous tile are written
        # The tile has a token, is not below the diagonal, and not within one frame.
        if (j0 < n) & (i0 // N < (tl.minimum(j0 + BLOCK, n) - 1) // N):
            dot = dot_tile(x_ptr, tl.minimum(i, n - 1), tl.minimum(j, n - 1), C, False, BLOCK, BLOCK_C)
            inv_norm_i = tl.load(inv_norm_ptr + i, mask=i < n, other=0.0)
            inv_norm_j = tl.load(inv_norm_ptr + j, mask=j < n, other=0.0)
            if linear:
                # s cos, at most s: d >= 0, even if a product is NaN. That d may exceed 2 by rounding does no harm.
                a = tl.minimum(dot * inv_norm_j[None, :] * (s * inv_norm_i)[:, None], s)
                if ((i0 + BLOCK - 1) // N >= j0 // N) | (j0 + BLOCK > n):
                    a = tl.where(in_different_frames(i, j, n, N), a, -float("inf"))
                e = tl.exp2(a)
                row_sum = tl.sum(e, 1)
                column_sum = tl.sum(e, 0)
            else:
                a = (tl.minimum(dot * inv_norm_j[None, :] * inv_norm_i[:, None], 1.0) - 1.0) * s        # -s d
                a = tl.where(in_different_frames(i, j, n, N), a, -float("inf"))
                row_sum = logsumexp2(a, 1)
                column_sum = logsumexp2(a, 0)
        if j0 == i0:                                # a diagonal tile is symmetric: its row sums already have every pair
            column_sum = tl.zeros((BLOCK,), tl.float32) + empty
        if tile_column > 0:
            row_sum = add_sums(row_sum, tl.load(row_ptr + i, mask=i < n, other=0.0), linear)
        if tile_row > 0:
            column_sum = add_sums(column_sum, tl.load(column_ptr + j, mask=j < n, other=0.0), linear)
        tl.store(row_ptr + i, row_sum, mask=i < n)
        tl.store(column_ptr + j, column_sum, mask=j < n)


@triton.jit(do_not_specialize=["G"])
def reduce_partials_kernel(
    partial_ptr, d_c_ptr, tau_ptr,                  # (B, 2, G, n), (B,) read; (B, n) written
    n, G, GROUP_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program: BLOCK tokens of a clip. A group has GROUP_TOKENS tokens."""
    blocks = (n + BLOCK - 1) // BLOCK
    b = tl.program_id(0).to(tl.int64) // blocks
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    group = i // GROUP_TOKENS
    partial_ptr += 2 * b * G * n + i
    s = decay_rate(tl.load(d_c_ptr + b))
    total = tl.zeros((BLOCK,), tl.float32)
    if sums_are_linear(s):
        for g in range(G):                          # row sums with later groups, column sums with earlier ones
            total += tl.load(partial_ptr + g * n, mask=(i < n) & (g >= group), other=0.0)
            total += tl.load(partial_ptr + (G + g) * n, mask=(i < n) & (g <= group), other=0.0)
        # Scaled before the logarithm: to subtract s from it afterwards would lose digits where the two are alike.
        log2_sum = tl.where(total > 1, tl.log2(total * tl.exp2(-s)), tl.log2(total) - s)
    else:
        maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
        for g in range(G):
            row = tl.load(partial_ptr + g * n, mask=(i < n) & (g >= group), other=-float("inf"))
            column = tl.load(partial_ptr + (G + g) * n, mask=(i < n) & (g <= group), other=-float("inf"))
            maximum = tl.maximum(maximum, tl.maximum(row, column))
        maximum = finite_or_zero(maximum)
        for g in range(G):
            row = tl.load(partial_ptr + g * n, mask=(i < n) & (g >= group), other=-float("inf"))
            column = tl.load(partial_ptr + (G + g) * n, mask=(i < n) & (g <= group), other=-float("inf"))
            total += tl.exp2(row - maximum) + tl.exp2(column - maximum)
        log2_sum = maximum + tl.log2(total)
    tl.store(tau_ptr + b * n + i, log2_sum / 1.4426950408889634, mask=i < n)


def inverse_norm_triton(x: Tensor) -> Tensor:
    """x (..., C) -> (...) fp32, 1/|x|; 0 for a zero vector."""
    x, inv_norm = x.contiguous(), torch.empty(x.shape[:-1], device=x.device)
    C_PAD = triton.next_power_of_2(x.shape[-1])
    BLOCK, tokens = max(1, 8192 // C_PAD), inv_norm.numel()
    with torch.cuda.device_of(x):
        inverse_norm_kernel[(triton.cdiv(tokens, BLOCK),)](x, inv_norm, tokens, x.shape[-1], BLOCK, C_PAD)
    return inv_norm


def fit_two_programs(config: dict, C: int) -> dict:
    """
    Change the launch sizes so that two programs fit on a multiprocessor of Hopper, each with 4 warps of up to 255
    registers and 96 KiB of shared memory.

    One program then adds up its tile while the other multiplies, and as many loads are in flight as in one program with
    five stages. On an H100 that took 0.70 ms for 0.85, at F, N, C = 1024, 196, 768 and T = 8 (docs/log.md). Only if C
    is a multiple of 8, so that rows are loaded 16 bytes at a time; otherwise it spills many registers.
    """
    if config["BLOCK"] == 128 and config["num_stages"] > 3 and C % 8 == 0:          # only Hopper has both
        config = config | dict(num_warps=4, num_stages=3)
    return config


def temporal_density_triton(x: Tensor, d_c: Tensor, inv_norm: Tensor | None = None, **launch) -> Tensor:
    """
    Launch the kernels: x (B, T, N, C) in fp32, fp16 or bf16, d_c (B,) fp32 -> (B, T, N).

    inv_norm (B, T, N): the inverse lengths of the tokens, if known. `launch` overrides the choices of `launch_config`,
    and takes the place of those of `fit_two_programs`.
    """
    B, T, N, C = x.shape
    if T == 1:
        return torch.full((B, T, N), -torch.inf, device=x.device)
    x, n = x.contiguous(), T * N
    inv_norm = inverse_norm_triton(x) if inv_norm is None else inv_norm
    config = launch_config(x, n)
    config = config | launch if launch else fit_two_programs(config, C)
    tiles = triton.cdiv(n, config["BLOCK"])
    GROUP = triton.cdiv(tiles, MAX_GROUPS)
    G = triton.cdiv(tiles, GROUP)
    partial, tau = torch.empty(B, 2, G, n, device=x.device), torch.empty(B, T, N, device=x.device)
    with torch.cuda.device_of(x):
        # One grid axis each: the other two are limited to 65535, and there may be more clips.
        temporal_density_kernel[(B * (G * (G + 1) // 2),)](
            x, inv_norm, d_c, partial, n, C, G, N, GROUP=GROUP, **config,
        )
        reduce_partials_kernel[(B * triton.cdiv(n, 256),)](
            partial, d_c, tau, n, G, GROUP_TOKENS=GROUP * config["BLOCK"], BLOCK=256,
        )
    return tau


def temporal_density(x: Tensor, d_c, check: bool = True) -> Tensor:
    """x (B, T, N, C), d_c a number or (B,) -> (B, T, N) fp32, the logarithm of the sum; -inf at T = 1. No gradient."""
    x = check_tokens("temporal_density", x, 4, check)
    d_c = check_bandwidth(d_c, x.shape[0], x, check)
    if x.is_cuda:
        return temporal_density_triton(x, d_c)
    chunks = zip(x.split(frames_per_chunk(x)), d_c.split(frames_per_chunk(x)), strict=True)
    return torch.cat([temporal_density_ref(*chunk) for chunk in chunks]).float()
