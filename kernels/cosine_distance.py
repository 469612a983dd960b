"""
Cosine distances between the tokens of a frame: x (F, N, C) -> d (F, N, N).

    d[f, i, j] = 1 - <x_i, x_j> / (|x_i| |x_j|),  clamped to [0, 2],  exactly 0 where i = j

A zero vector has no direction: it is at distance 1 from every other token.

Cost. One N x N x C product a frame, 2FN^2C flop, of which the kernel does the half above the diagonal and mirrors it;
4FN^2 bytes written. F, N, C = 1024, 196, 768: 60 Gflop, 157 MB. The other kernels call `distances` and keep its result
on chip or in the L2 cache: this one is for those who want the matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import check_tokens, programs, tiles


def unit(x: Tensor) -> Tensor:
    """x (..., C) scaled to unit length, whatever its length; a zero vector stays zero."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    safe = (length > 1e-15) & (length < 1e15)
    if not safe.all():                                  # squares overflow or vanish: such tokens are scaled first
        scaled = x / x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = torch.where(safe, x, scaled)
        length = torch.where(safe, length, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(1e-12))
    return x / length


def cosine_distance_ref(x: Tensor) -> Tensor:
    """The definition. x (F, N, C) -> (F, N, N) in the dtype of x."""
    u = unit(x)
    d = (1 - u @ u.mT).clamp_(0, 2)             # (F, N, N)
    d = torch.maximum(d, d.mT)                  # a BLAS may round the two products of a pair differently
    d.diagonal(dim1=1, dim2=2).zero_()
    return d


@triton.jit
def inverse(square):
    """Squared lengths -> inverse lengths; 0 for a zero vector, and for one with a NaN or an infinity in it."""
    good = (square > 0) & (square < float("inf"))
    return tl.where(good, tl.div_rn(1.0, tl.sqrt_rn(tl.where(good, square, 1.0))), 0.0)


@triton.jit
def dots(x_ptr, i, j, C, SAME: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows i (BLOCK,) of x (., C) times its rows j (BLOCK,), SAME where i = j: (BLOCK, BLOCK), summed in fp32."""
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    c = tl.arange(0, BLOCK_C)
    a_ptr = x_ptr + (i[:, None] * C + c[None, :])
    b_ptr = x_ptr + (j[None, :] * C + c[:, None])
    for c0 in range(0, C, BLOCK_C):
        a = tl.load(a_ptr + c0, mask=(c < C - c0)[None, :], other=0.0)              # (I, C')
        if SAME:
            b = tl.trans(a)                                                         # (C', J), read once
        else:
            b = tl.load(b_ptr + c0, mask=(c < C - c0)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")         # fp32 stays fp32, not tf32
    return acc


@triton.jit
def cosine(dot, inv_i, inv_j):
    """Dot products (I, J) and inverse lengths (I,), (J,) -> distances in [0, 2], a NaN too."""
    return tl.minimum(tl.maximum(1.0 - dot * (inv_i[:, None] * inv_j[None, :]), 0.0), 2.0)


@triton.jit
def token(i, n, total, ALL: tl.constexpr):
    """The i-th of n tokens evenly spaced over `total`; past the end it is the last one again."""
    i = tl.minimum(i, n - 1)
    return i if ALL else i * total // n


@triton.jit
def distances(
    x_ptr, inv_ptr, d_ptr,              # (total, C), (n,) written, (n, n) written, rows `stride` apart
    n, total, N, C, stride,
    APART: tl.constexpr, SPARE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """
    The distances between n tokens, and their inverse lengths. APART: n evenly spaced of the `total` tokens of a clip,
    pairs of one frame of N tokens being at distance infinity; otherwise all tokens of a frame, n = total = N.

    Lengths are the diagonal of the products, so the features are read for the products alone. Each pair is written twice
    from the product above the diagonal: d_ij = d_ji to the bit, however a matrix unit or a BLAS sums.
    SPARE: a row has room for whole blocks, and what is written past n means nothing; stores are then 16 bytes wide.
    Other threads of the program see what this writes after the barrier it ends with.
    """
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        row = token(i, n, total, not APART)
        dot = dots(x_ptr, row, row, C, True, BLOCK, BLOCK_C)
        dot = tl.where(i[:, None] <= i[None, :], dot, tl.trans(dot))    # mirrored, as the blocks above the diagonal are
        itself = i[:, None] == i[None, :]
        square = tl.where(itself, dot, 0.0)
        inv = inverse(tl.sum(square, 1))
        d = tl.where(itself, 0.0, cosine(dot, inv, inverse(tl.sum(square, 0))))
        if APART:
            d = tl.where((row // N)[:, None] == (row // N)[None, :], float("inf"), d)
        tl.store(inv_ptr + i, inv, mask=i < n)
        tl.store(d_ptr + i[:, None] * stride + i[None, :], d, mask=(i < n)[:, None] & (SPARE | (i < n)[None, :]))
    tl.debug_barrier()                                          # the lengths are there
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        row_i = token(i, n, total, not APART)
        inv_i = tl.load(inv_ptr + i, mask=i < n, other=0.0)
        for j0 in range(i0 + BLOCK, n, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            row_j = token(j, n, total, not APART)
            inv_j = tl.load(inv_ptr + j, mask=j < n, other=0.0)
            d = cosine(dots(x_ptr, row_i, row_j, C, False, BLOCK, BLOCK_C), inv_i, inv_j)
            if APART:
                d = tl.where((row_i // N)[:, None] == (row_j // N)[None, :], float("inf"), d)
            tl.store(d_ptr + i[:, None] * stride + j[None, :], d, mask=SPARE | (j < n)[None, :])
            tl.store(d_ptr + j[:, None] * stride + i[None, :], tl.trans(d), mask=(j < n)[:, None])
    tl.debug_barrier()                                          # the distances are there


@triton.jit
def cosine_distance_kernel(
    x_ptr, inv_ptr, d_ptr,              # (F, N, C), (programs, N) scratch, (F, N, N) written
    F, N, C,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program: every so-many-th frame."""
    inv_ptr += tl.program_id(0) * N
    for f in range(tl.program_id(0), F, tl.num_programs(0)):
        f = tl.cast(f, tl.int64)                                # f * N * C can pass 2^31
        distances(x_ptr + f * N * C, inv_ptr, d_ptr + f * N * N, N, N, N, C, N, False, False, BLOCK, BLOCK_C)


def cosine_distance_triton(x: Tensor) -> Tensor:
    """The kernel's launch. x (F, N, C) in fp32, fp16 or bf16 -> (F, N, N) fp32."""
    F, N, C = x.shape
    x, P = x.contiguous(), min(F, programs(x))
    d, inv = torch.empty(F, N, N, device=x.device), torch.empty(P, N, device=x.device)
    with torch.cuda.device_of(x):
        cosine_distance_kernel[(P,)](x, inv, d, F, N, C, **tiles(x, N, block=64))     # 128 spill
    return d


def cosine_distance(x: Tensor, check: bool = True) -> Tensor:
    """x (F, N, C) of any float dtype -> (F, N, N) fp32. No gradient."""
    x = check_tokens("cosine_distance", x, 3, check)
    return cosine_distance_triton(x) if x.is_cuda else cosine_distance_ref(x).float()
