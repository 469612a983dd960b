"""
Attention over each token's 3 x 3 neighbourhood: scores (F, N, H), values (F, N, C), grid (h, w) -> (F, N, C), N = hw.

    out[f, i, c] = sum over j of a_j values[f, j, c],   a = softmax over j of scores[f, j, k]

with j over the neighbours of token i in the h x w grid, itself among them, nine or at the border fewer, and k the head
that channel c is of: head k has those from kC/H to (k + 1)C/H. One query serves all tokens, so a token is scored once,
not once a neighbour.

Cost. Scores and values are read once and the output written once, F * N * (H + 2C) elements, for 18FNC flop: memory
decides. F, N, C, H = 1024, 196, 768, 12 in bf16: 621 MB, 2.8 Gflop. Of the nine times a value is used, eight find it in
the L1 or L2 cache. The reference reads and writes an fp32 sum for each of the nine, about 20 GB.
"""

import torch
import torch.nn.functional as nn
import triton
import triton.language as tl
from torch import Tensor


def window_attention_ref(scores: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """The definition, one of the nine shifts of the grid at a time; in fp32 or, where the input is, in fp64."""
    F, N, H = scores.shape
    C, (h, w) = values.shape[-1], grid
    wide = torch.promote_types(torch.promote_types(scores.dtype, values.dtype), torch.float32)
    s = nn.pad(scores.to(wide).reshape(F, h, w, H), (0, 0, 1, 1, 1, 1), value=-torch.inf)
    v = nn.pad(values.to(wide).reshape(F, h, w, H, C // H), (0, 0, 0, 0, 1, 1, 1, 1))
    shifts = [(slice(None), slice(i, i + h), slice(j, j + w)) for i in range(3) for j in range(3)]
    a = torch.stack([s[shift] for shift in shifts]).softmax(0)                  # (9, F, h, w, H)
    out = v.new_zeros(F, h, w, H, C // H)
    for weight, shift in zip(a, shifts, strict=True):
        out.addcmul_(weight[..., None], v[shift])
    return out.view(F, N, C).to(values.dtype)


@triton.jit
def window_attention_kernel(
    scores_ptr, values_ptr, out_ptr,            # (F, N, H), (F, N, C), (F, N, C) written, contiguous
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """
    One program: BLOCK tokens of a frame, BLOCK_D of a head's D = C / H channels. The next program has the next tokens,
    so that what two of them read is still in the cache.

    Compiled for the model's shape: the nine shifts are then constants in the loads' addresses.
    """
    C: tl.constexpr = H * D
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    PARTS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D          # of a head
    p = tl.program_id(0)
    f = tl.cast(p // (BLOCKS * H * PARTS), tl.int64)            # f * N * C can pass 2^31
    k = p // (BLOCKS * PARTS) % H
    i = p % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    i = tl.minimum(i, N - 1)                                    # past the end the last token again, the same bits
    d = p // BLOCKS % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    row, col = i // w, i % w
    elements = f * N * C + i[:, None] * C + (k * D + d)[None, :]
    scores_ptr += f * N * H + i * H + k
    values_ptr += elements

    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    for y in tl.static_range(-1, 2):
        for x in tl.static_range(-1, 2):
            inside = (row + y >= 0) & (row + y < h) & (col + x >= 0) & (col + x < w)
            s = tl.load(scores_ptr + (y * w + x) * H, mask=inside, other=-float("inf"))
            top = tl.maximum(top, s.to(tl.float32))

    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for y in tl.static_range(-1, 2):
        for x in tl.static_range(-1, 2):
            inside = (row + y >= 0) & (row + y < h) & (col + x >= 0) & (col + x < w)
            s = tl.load(scores_ptr + (y * w + x) * H, mask=inside, other=-float("inf"))
            a = tl.exp2((s.to(tl.float32) - top) * 1.4426950408889634)              # e^(s - top), 0 outside
            v = tl.load(values_ptr + (y * w + x) * C, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            total += a
            acc += a[:, None] * v.to(tl.float32)
    acc *= (1 / total)[:, None]
    tl.store(out_ptr + elements, acc.to(out_ptr.dtype.element_ty), mask=(d < D)[None, :])


def window_attention_triton(scores: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """
    The kernel's launch. scores (F, N, H), values (F, N, C), both of fp32, fp16 or bf16 -> (F, N, C) as the values.

    Not measured: 2048 elements to 128 threads, chosen on sm_90 by the compiler's report (no spills, no shared memory,
    loads of 16 bytes, nine programs to a multiprocessor in bf16).
    """
    F, N, H = scores.shape
    C, (h, w) = values.shape[-1], grid
    D = C // H
    BLOCK_D = min(128, triton.next_power_of_2(D))
    BLOCK = min(2048 // BLOCK_D, triton.next_power_of_2(N))
    out = torch.empty(F, N, C, dtype=values.dtype, device=values.device)
    with torch.cuda.device_of(values):
        # One axis: the others end at 65535, and there may be more frames.
        window_attention_kernel[(triton.cdiv(N, BLOCK) * triton.cdiv(D, BLOCK_D) * H * F,)](
            scores.contiguous(), values.contiguous(), out, N, H, D, h, w, BLOCK=BLOCK, BLOCK_D=BLOCK_D, num_warps=4,
        )
    return out


def window_attention(scores: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """
    scores (F, N, H), values (F, N, C), grid (h, w) with N = hw and C a multiple of H -> (F, N, C), dtype of the values.

    CUDA tensors go to the kernel, CPU tensors to the reference. The kernel has no backward: where a gradient is wanted
    the reference computes, on a GPU too. Values are not looked at: a score that is NaN or infinite spoils its windows.
    """
    for name, x, letters in (("scores", scores, "(F, N, H)"), ("values", values, "(F, N, C)")):
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"window_attention wants {name} {letters}, no axis empty, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"window_attention wants floating-point {name}, got {x.dtype}")
        if x.is_cuda and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"window_attention wants float32, float16 or bfloat16 {name} on a GPU, got {x.dtype}")
    (F, N, H), C, (h, w) = scores.shape, values.shape[-1], grid
    if values.shape[:2] != (F, N):
        raise ValueError(f"window_attention wants values ({F}, {N}, C), as the scores are, got {tuple(values.shape)}")
    if min(h, w) < 1 or h * w != N:
        raise ValueError(f"window_attention wants a grid of N = {N} tokens, got {h} x {w}")
    if C % H:
        raise ValueError(f"window_attention wants C to be a multiple of H, got C = {C} and H = {H}")
    if scores.device != values.device:
        raise ValueError(f"window_attention wants one device, got scores on {scores.device}, values on {values.device}")
    wanted = torch.is_grad_enabled() and (scores.requires_grad or values.requires_grad)
    run = window_attention_triton if values.is_cuda and not wanted else window_attention_ref
    return run(scores, values, grid)
