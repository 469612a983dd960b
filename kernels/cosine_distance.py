"""
Cosine distances between the tokens of a frame: x (F, N, C) -> d (F, N, N).

    d[f, i, j] = 1 - <x_i, x_j> / (|x_i| |x_j|),  clamped to [0, 2],  exactly 0 for i = j

A zero vector has no direction: its distance to every other token is 1.

Cost. One N x N x C product per frame, 2FN^2C flop, of which the kernel computes the half above the diagonal and mirrors
it; 4FN^2 bytes written. F, N, C = 1024, 196, 768: 60 Gflop, 157 MB. The other kernels call `pairwise_distances` and
keep its result on chip or in the L2 cache; this kernel is for callers who need the matrix.
"""

import torch
from torch import Tensor

from . import check_tokens, launch_config, num_programs, tl, triton


def l2_normalize(x: Tensor) -> Tensor:
    """Scale x (..., C) to unit length, whatever its length; a zero vector stays zero."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    safe = (length > 1e-15) & (length < 1e15)
    if not safe.all():                                  # squares overflow or underflow: scale these tokens first
        scaled = x / x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = torch.where(safe, x, scaled)
        length = torch.where(safe, length, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(1e-12))
    return x / length


def cosine_distance_ref(x: Tensor) -> Tensor:
    """The definition: x (F, N, C) -> (F, N, N) in the dtype of x."""
    u = l2_normalize(x)
    d = (1 - u @ u.mT).clamp_(0, 2)             # (F, N, N)
    d = torch.maximum(d, d.mT)                  # a BLAS may round the two products of a pair differently
    d.diagonal(dim1=1, dim2=2).zero_()
    return d


@triton.jit
def inverse_norm(square):
    """Squared lengths -> inverse lengths; 0 for a zero vector and for a vector with a NaN or an infinity."""
    valid = (square > 0) & (square < float("inf"))
    return tl.where(valid, tl.div_rn(1.0, tl.sqrt_rn(tl.where(valid, square, 1.0))), 0.0)


@triton.jit
def dot_tile(x_ptr, i, j, C, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Dot products of rows i (BLOCK,) and j (BLOCK,) of x (., C): (BLOCK, BLOCK), summed in fp32. DIAGONAL: i = j."""
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    c = tl.arange(0, BLOCK_C)
    a_ptr = x_ptr + (i[:, None] * C + c[None, :])
    b_ptr = x_ptr + (j[None, :] * C + c[:, None])
    for c0 in range(0, C, BLOCK_C):
        a = tl.load(a_ptr + c0, mask=(c < C - c0)[None, :], other=0.0)              # (I, C')
        if DIAGONAL:
            b = tl.trans(a)                                                         # (C', J), without a second read
        else:
            b = tl.load(b_ptr + c0, mask=(c < C - c0)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")         # fp32 stays fp32, not tf32
    return acc


@triton.jit
def cosine_distance_tile(dot, inv_norm_i, inv_norm_j):
    """Dot products (I, J) and inverse lengths (I,), (J,) -> distances (I, J) in [0, 2], even if a product is NaN."""
    return tl.minimum(tl.maximum(1.0 - dot * (inv_norm_i[:, None] * inv_norm_j[None, :]), 0.0), 2.0)


@triton.jit
def sampled_token(i, n, total, ALL_TOKENS: tl.constexpr):
    """Index of the i-th of n tokens evenly spaced over `total`; for i >= n, the last one."""
    i = tl.minimum(i, n - 1)
    return i if ALL_TOKENS else i * total // n


@triton.jit
def pairwise_distances(
    x_ptr, inv_norm_ptr, d_ptr,         # (total, C) read; (n,) and (n, n), rows `stride` apart, written
    n, total, N, C, stride,
    CROSS_FRAME: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """
    Write the distances between n tokens, and their inverse lengths.

    CROSS_FRAME: the n tokens are evenly spaced over the `total` tokens of a clip with N tokens per frame, and the
    distance of two tokens of one frame is infinity. Otherwise they are all tokens of a frame: n = total = N.
    PADDED: the matrix is (stride, stride), with stride a multiple of 16. Rows and columns from n on and the diagonal
    are infinite, so that later passes over the matrix need no masks. Otherwise stride = n and the diagonal is 0.

    Lengths come from the diagonal of the products, so features are read only for the products. Both entries of a pair
    are written from the product above the diagonal: d_ij = d_ji bit for bit, however a matrix unit or a BLAS sums.
    After the final barrier all threads of the program see the results.
    """
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        token = sampled_token(i, n, total, not CROSS_FRAME)
        dot = dot_tile(x_ptr, token, token, C, True, BLOCK, BLOCK_C)
        diagonal = i[:, None] == i[None, :]
        inv_norm = inverse_norm(tl.sum(tl.where(diagonal, dot, 0.0), 1))
        d = cosine_distance_tile(dot, inv_norm, inv_norm)
        d = tl.where(i[:, None] <= i[None, :], d, tl.trans(d))      # d_ij = d_ji; mirroring `dot` spills more registers
        if PADDED:
            d = tl.where(diagonal | (tl.maximum(i[:, None], i[None, :]) >= n), float("inf"), d)
        else:
            d = tl.where(diagonal, 0.0, d)
        if CROSS_FRAME:
            d = tl.where((token // N)[:, None] == (token // N)[None, :], float("inf"), d)
        tl.store(inv_norm_ptr + i, inv_norm, mask=i < n)
        tl.store(d_ptr + i[:, None] * stride + i[None, :], d, mask=(i < stride)[:, None] & (i < stride)[None, :])
    tl.debug_barrier()                                          # the inverse lengths are written
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        token_i = sampled_token(i, n, total, not CROSS_FRAME)
        inv_norm_i = tl.load(inv_norm_ptr + i, mask=i < n, other=0.0)
        for j0 in range(i0 + BLOCK, n, BLOCK):                  # so i < n throughout
            j = j0 + tl.arange(0, BLOCK)
            token_j = sampled_token(j, n, total, not CROSS_FRAME)
            inv_norm_j = tl.load(inv_norm_ptr + j, mask=j < n, other=0.0)
            dot = dot_tile(x_ptr, token_i, token_j, C, False, BLOCK, BLOCK_C)
            d = cosine_distance_tile(dot, inv_norm_i, inv_norm_j)
            if PADDED:
                d = tl.where((j >= n)[None, :], float("inf"), d)
            if CROSS_FRAME:
                d = tl.where((token_i // N)[:, None] == (token_j // N)[None, :], float("inf"), d)
            tl.store(d_ptr + i[:, None] * stride + j[None, :], d, mask=(j < stride)[None, :])
            tl.store(d_ptr + j[:, None] * stride + i[None, :], tl.trans(d), mask=(j < stride)[:, None])
    tl.debug_barrier()                                          # the distances are written


@triton.jit(do_not_specialize=["F"])
def cosine_distance_kernel(
    x_ptr, inv_norm_ptr, d_ptr,         # (F, N, C) read; (programs, N) scratch; (F, N, N) written
    F, N, C,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program: frames p, p + P, p + 2P, ... of P programs."""
    inv_norm_ptr += tl.program_id(0) * N
    for f in range(tl.program_id(0), F, tl.num_programs(0)):
        f = tl.cast(f, tl.int64)                                # f * N * C can exceed 2^31
        pairwise_distances(x_ptr + f * N * C, inv_norm_ptr, d_ptr + f * N * N, N, N, N, C, N,
                           False, False, BLOCK, BLOCK_C)


def cosine_distance_triton(x: Tensor) -> Tensor:
    """Launch the kernel: x (F, N, C) in fp32, fp16 or bf16 -> (F, N, N) fp32."""
    F, N, C = x.shape
    x, P = x.contiguous(), min(F, num_programs(x))
    d, inv_norm = torch.empty(F, N, N, device=x.device), torch.empty(P, N, device=x.device)
    with torch.cuda.device_of(x):
        cosine_distance_kernel[(P,)](x, inv_norm, d, F, N, C, **launch_config(x, N, large_on=()))
    return d


def cosine_distance(x: Tensor, check: bool = True) -> Tensor:
    """x (F, N, C) of any float dtype -> (F, N, N) fp32. No gradient."""
    x = check_tokens("cosine_distance", x, 3, check)
    return cosine_distance_triton(x) if x.is_cuda else cosine_distance_ref(x).float()
