"""
The best token of each cluster: score (F, N), labels (F, N) -> (F, K).

    best[f, k] = argmax of score[f, i] over the tokens i with labels[f, i] = k,  ties to the lower index

Cost. One pass over N scores per frame: 12FN bytes read, 8FK written. The kernel compares the key (score, -index), a
block of clusters with all tokens at a time; nothing is summed across programs, so every run gives the same result.
"""

import torch
from torch import Tensor

from . import tl, triton


def cluster_argmax_ref(score: Tensor, labels: Tensor, K: int) -> Tensor:
    """The definition: each cluster's maximum, then the first token that reaches it. An empty cluster gives N."""
    F, N = score.shape
    best_score = score.new_full((F, K), -torch.inf).scatter_reduce(1, labels, score, "amax")        # (F, K)
    i = torch.arange(N, device=score.device).expand(F, N)
    i = i.masked_fill(score < best_score.gather(1, labels), N)
    return i.new_full((F, K), N).scatter_reduce(1, labels, i, "amin")


@triton.jit
def cluster_argmax_kernel(
    score_ptr, labels_ptr, best_ptr, flat_ids_ptr,      # (F, N), (F, N) read; (F, K), if FLAT_IDS (F, K), written
    N, K, T, FLAT_IDS: tl.constexpr, BLOCK_K: tl.constexpr, N_PAD: tl.constexpr,
):
    """One program: a frame. An empty cluster gives N. FLAT_IDS: also write t * N + n, ascending, with t = f mod T."""
    f = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, N_PAD)
    score = tl.load(score_ptr + f * N + j, mask=j < N, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, -float("inf"))          # if unchecked, a NaN is the lowest score
    label = tl.load(labels_ptr + f * N + j, mask=j < N, other=-1).to(tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        member = k[:, None] == label[None, :]
        member_score = tl.where(member, score[None, :], -float("inf"))
        is_best = member & (member_score == tl.max(member_score, 1)[:, None])
        first = tl.min(tl.where(is_best, j[None, :], N), 1)
        tl.store(best_ptr + f * K + k, first.to(tl.int64), mask=k < K)
    if FLAT_IDS:
        tl.debug_barrier()                                          # best is written
        best = tl.load(best_ptr + f * K + tl.maximum(label, 0), mask=j < N, other=N)
        selected = (best == j) & (j < N)
        position = tl.cumsum(selected.to(tl.int32), 0) - 1
        tl.store(flat_ids_ptr + f * K + position, (f % T) * N + j, mask=selected)


def cluster_argmax_triton(score: Tensor, labels: Tensor, K: int, frames: int = 0) -> Tensor:
    """
    Launch the kernel: score (F, N) in fp32, fp16 or bf16, labels (F, N) -> (F, K).

    frames: if not 0, the number T of frames per clip; the result then has flat ids t * N + n, ascending in each frame.
    """
    F, N = score.shape
    score, labels = score.contiguous(), labels.contiguous()
    best = torch.empty(F, K, dtype=torch.int64, device=score.device)
    flat_ids = torch.empty_like(best) if frames else best
    N_PAD = max(16, triton.next_power_of_2(N))
    BLOCK_K = min(8192 // N_PAD, triton.next_power_of_2(K))
    with torch.cuda.device_of(score):
        cluster_argmax_kernel[(F,)](score, labels, best, flat_ids, N, K, frames, FLAT_IDS=frames > 0, BLOCK_K=BLOCK_K,
                                    N_PAD=N_PAD, num_warps=8)
    return flat_ids


def cluster_argmax(score: Tensor, labels: Tensor, K: int, check: bool = True) -> Tensor:
    """score (F, N) of any float dtype (-inf is allowed, NaN is not), labels (F, N) int64 in [0, K) -> (F, K) int64."""
    name = "cluster_argmax"
    if score.ndim != 2 or 0 in score.shape or not score.is_floating_point():
        raise ValueError(f"{name}: score must be floating-point (F, N), got {tuple(score.shape)} {score.dtype}")
    if labels.shape != score.shape or labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels must be {tuple(score.shape)} int64, got {tuple(labels.shape)} {labels.dtype}")
    if labels.device != score.device:
        raise ValueError(f"{name}: labels must be on {score.device} like the score, got {labels.device}")
    if not 1 <= K <= score.shape[1]:
        raise ValueError(f"{name}: K must be from 1 to N = {score.shape[1]}, got {K}")
    if score.is_cuda and (score.shape[1] > 1024 or score.dtype == torch.float64):
        raise ValueError(f"{name}: score on a GPU must be float32, float16 or bfloat16 of at most 1024 tokens a frame, "
                         f"got {score.dtype} of {score.shape[1]}")
    if check and score.isnan().any():
        raise ValueError(f"{name}: score must have no NaN, got {int(score.isnan().sum())} NaN of {score.numel()}")
    if check and (labels.min() < 0 or labels.max() >= K):
        raise ValueError(f"{name}: labels must be in [0, K = {K}), got {labels.min().item()} to {labels.max().item()}")
    best = (cluster_argmax_triton if score.is_cuda else cluster_argmax_ref)(score.detach(), labels, K)
    if check and (best == score.shape[1]).any():
        empty = int((best == score.shape[1]).sum())
        raise ValueError(f"{name}: every cluster must have a token, got {empty} empty clusters of {best.numel()}")
    return best
