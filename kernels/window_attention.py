"""
Attention over each token's 3 x 3 neighbourhood: scores (F, N, H), values (F, N, C), grid (h, w) -> (F, N, C), N = hw.

    out[f, i, c] = sum over j of a_j values[f, j, c],   a = softmax over j of scores[f, j, k]

with j over the neighbours of token i in the h x w grid, itself among them, nine or at the border fewer, and k the head
of channel c: head k has the channels from kC/H to (k + 1)C/H. All tokens share one query, so each token is scored once,
not once per neighbour.

Cost. Scores and values are read once and the output written once, F * N * (H + 2C) elements, for 18FNC flop: memory
decides. F, N, C, H = 1024, 196, 768, 12 in bf16: 621 MB, 2.8 Gflop. Each value is used nine times, of which the L1 or
L2 cache serves eight. The reference reads and writes an fp32 sum for each of the nine, about 20 GB.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from . import tl, triton


def window_attention_ref(scores: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """The definition, one of the nine shifts of the grid at a time, in fp32, or in fp64 if an input is fp64."""
    F, N, H = scores.shape
    C, (h, w) = values.shape[-1], grid
    compute_dtype = torch.promote_types(torch.promote_types(scores.dtype, values.dtype), torch.float32)
    s = nnf.pad(scores.to(compute_dtype).reshape(F, h, w, H), (0, 0, 1, 1, 1, 1), value=-torch.inf)
    v = nnf.pad(values.to(compute_dtype).reshape(F, h, w, H, C // H), (0, 0, 0, 0, 1, 1, 1, 1))
    shifts = [(slice(None), slice(i, i + h), slice(j, j + w)) for i in range(3) for j in range(3)]
    a = torch.stack([s[shift] for shift in shifts]).softmax(0)                  # (9, F, h, w, H)
    out = v.new_zeros(F, h, w, H, C // H)
    for weight, shift in zip(a, shifts, strict=True):
        out.addcmul_(weight[..., None], v[shift])
    return out.view(F, N, C).to(values.dtype)


@triton.jit
def window_attention_kernel(
    scores_ptr, values_ptr, out_ptr,            # (F, N, H), (F, N, C) read; (F, N, C) written; all contiguous
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """
    One program: BLOCK tokens of a frame and BLOCK_D of the D = C / H channels of a head. The next program takes the
    next tokens, so the values that both read are still in the cache.

    It is compiled for the model's shape: the nine shifts are then constants in the addresses of the loads.
    """
    C: tl.constexpr = H * D
    TOKEN_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    CHANNEL_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D         # per head
    p = tl.program_id(0)
    f = tl.cast(p // (TOKEN_BLOCKS * H * CHANNEL_BLOCKS), tl.int64)     # f * N * C can exceed 2^31
    k = p // (TOKEN_BLOCKS * CHANNEL_BLOCKS) % H
    i = p % TOKEN_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    i = tl.minimum(i, N - 1)                                    # past the end: compute the last token again, same bits
    d = p // TOKEN_BLOCKS % CHANNEL_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    row, col = i // w, i % w
    elements = f * N * C + i[:, None] * C + (k * D + d)[None, :]
    scores_ptr += f * N * H + i * H + k
    values_ptr += elements

    maximum = tl.full((BLOCK,), -float("inf"), tl.float32)
    for y in tl.static_range(-1, 2):
        for x in tl.static_range(-1, 2):
            inside = (row + y >= 0) & (row + y < h) & (col + x >= 0) & (col + x < w)
            s = tl.load(scores_ptr + (y * w + x) * H, mask=inside, other=-float("inf"))
            maximum = tl.maximum(maximum, s.to(tl.float32))

    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for y in tl.static_range(-1, 2):
        for x in tl.static_range(-1, 2):
            inside = (row + y >= 0) & (row + y < h) & (col + x >= 0) & (col + x < w)
            s = tl.load(scores_ptr + (y * w + x) * H, mask=inside, other=-float("inf"))
            a = tl.exp2((s.to(tl.float32) - maximum) * 1.4426950408889634)          # e^(s - maximum), 0 outside
            v = tl.load(values_ptr + (y * w + x) * C, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            total += a
            acc += a[:, None] * v.to(tl.float32)
    acc *= (1 / total)[:, None]
    tl.store(out_ptr + elements, acc.to(out_ptr.dtype.element_ty), mask=(d < D)[None, :])


def window_attention_triton(scores: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """
    Launch the kernel: scores (F, N, H), values (F, N, C), each in fp32, fp16 or bf16 -> (F, N, C) in the values' dtype.

    The launch sizes are not timed: 2048 elements per 128 threads, chosen on sm_90 by the compiler's report (no spills,
    no shared memory, loads of 16 bytes, nine programs per multiprocessor in bf16).
    """
    F, N, H = scores.shape
    C, (h, w) = values.shape[-1], grid
    D = C // H
    BLOCK_D = min(128, triton.next_power_of_2(D))
    BLOCK = min(2048 // BLOCK_D, triton.next_power_of_2(N))
    out = torch.empty(F, N, C, dtype=values.dtype, device=values.device)
    with torch.cuda.device_of(values):
        # One grid axis: the other two are limited to 65535, and there may be more frames.
        window_attention_kernel[(triton.cdiv(N, BLOCK) * triton.cdiv(D, BLOCK_D) * H * F,)](
            scores.contiguous(), values.contiguous(), out, N, H, D, h, w, BLOCK=BLOCK, BLOCK_D=BLOCK_D, num_warps=4,
        )
    return out


def window_attention(scores: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """
    scores (F, N, H), values (F, N, C), grid (h, w) with N = hw and C a multiple of H -> (F, N, C), dtype of the values.

    CUDA tensors go to the kernel, CPU tensors to the reference. The kernel has no backward: if a gradient is required,
    the reference computes on a GPU too. Values are not checked: a NaN or infinite score affects only its windows.
    """
    name, low = "window_attention", (torch.float32, torch.float16, torch.bfloat16)
    for field, x, axes in (("scores", scores, "(F, N, H)"), ("values", values, "(F, N, C)")):
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"{name}: {field} must be {axes} without an empty axis, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: {field} must be floating-point, got {x.dtype}")
        if x.is_cuda and x.dtype not in low:
            raise ValueError(f"{name}: {field} on a GPU must be float32, float16 or bfloat16, got {x.dtype}")
    (F, N, H), C, (h, w) = scores.shape, values.shape[-1], grid
    if values.shape[:2] != (F, N):
        raise ValueError(f"{name}: values must be ({F}, {N}, C) like the scores, got {tuple(values.shape)}")
    if min(h, w) < 1 or h * w != N:
        raise ValueError(f"{name}: grid must have h * w = N = {N} tokens, got {h} x {w}")
    if C % H:
        raise ValueError(f"{name}: C must be a multiple of H, got C = {C} and H = {H}")
    if scores.device != values.device:
        raise ValueError(f"{name}: values must be on {scores.device} like the scores, got {values.device}")
    needs_grad = torch.is_grad_enabled() and (scores.requires_grad or values.requires_grad)
    run = window_attention_triton if values.is_cuda and not needs_grad else window_attention_ref
    return run(scores, values, grid)
