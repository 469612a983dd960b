"""
The best token of each cluster: score (F, N), labels (F, N) -> (F, K).

    best[f, k] = argmax of score[f, i] over the tokens i with labels[f, i] = k,  ties to the lower index

Cost. One pass over N scores a frame: 12FN bytes read, 8FK written. The kernel compares the key (score, -index), a block
of clusters with all tokens at a time; nothing is added up across programs, so runs do not differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def cluster_argmax_ref(score: Tensor, labels: Tensor, K: int) -> Tensor:
    """The definition: the clusters' maxima, then the first token that reaches its cluster's. N marks an empty one."""
    F, N = score.shape
    top = score.new_full((F, K), -torch.inf).scatter_reduce(1, labels, score, "amax")       # (F, K)
    i = torch.arange(N, device=score.device).expand(F, N)
    i = i.masked_fill(score < top.gather(1, labels), N)
    return i.new_full((F, K), N).scatter_reduce(1, labels, i, "amin")


@triton.jit
def cluster_argmax_kernel(
    score_ptr, labels_ptr, best_ptr, flat_ptr,          # (F, N), (F, N), (F, K) written, (F, K) written where FLAT
    N, K, T, FLAT: tl.constexpr, BLOCK_K: tl.constexpr, N_PAD: tl.constexpr,
):
    """One program: a frame. N marks an empty cluster. FLAT: the best tokens as t * N + n, ascending; t = f mod T."""
    f = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, N_PAD)
    score = tl.load(score_ptr + f * N + j, mask=j < N, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, -float("inf"))          # unchecked, a NaN is the lowest score
    label = tl.load(labels_ptr + f * N + j, mask=j < N, other=-1).to(tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        member = k[:, None] == label[None, :]
        own = tl.where(member, score[None, :], -float("inf"))
        first = tl.min(tl.where(member & (own == tl.max(own, 1)[:, None]), j[None, :], N), 1)
        tl.store(best_ptr + f * K + k, first.to(tl.int64), mask=k < K)
    if FLAT:
        tl.debug_barrier()                                          # best is there
        best = tl.load(best_ptr + f * K + tl.maximum(label, 0), mask=j < N, other=N)
        kept = (best == j) & (j < N)
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(flat_ptr + f * K + place, (f % T) * N + j, mask=kept)


def cluster_argmax_triton(score: Tensor, labels: Tensor, K: int, frames: int = 0) -> Tensor:
    """
    The kernel's launch. score (F, N) in fp32, fp16 or bf16, labels (F, N) -> (F, K).

    With `frames`, T, the tokens are flat ids t * N + n of clips of T frames, ascending in each frame.
    """
    F, N = score.shape
    score, labels = score.contiguous(), labels.contiguous()
    best = torch.empty(F, K, dtype=torch.int64, device=score.device)
    flat = torch.empty_like(best) if frames else best
    N_PAD = max(16, triton.next_power_of_2(N))
    BLOCK_K = min(8192 // N_PAD, triton.next_power_of_2(K))
    with torch.cuda.device_of(score):
        cluster_argmax_kernel[(F,)](score, labels, best, flat, N, K, frames, FLAT=frames > 0, BLOCK_K=BLOCK_K,
                                    N_PAD=N_PAD, num_warps=8)
    return flat


def cluster_argmax(score: Tensor, labels: Tensor, K: int, check: bool = True) -> Tensor:
    """score (F, N) of any float dtype (-inf is legal, NaN is not), labels (F, N) int64 in [0, K) -> (F, K) int64."""
    if score.ndim != 2 or 0 in score.shape or not score.is_floating_point():
        raise ValueError(f"cluster_argmax wants a floating score (F, N), got {tuple(score.shape)} {score.dtype}")
    if labels.shape != score.shape or labels.dtype != torch.int64:
        want = f"labels {tuple(score.shape)} int64"
        raise ValueError(f"cluster_argmax wants {want}, got {tuple(labels.shape)} {labels.dtype}")
    if labels.device != score.device:
        raise ValueError(f"cluster_argmax wants labels on {score.device}, as the score is, got {labels.device}")
    if not 1 <= K <= score.shape[1]:
        raise ValueError(f"cluster_argmax wants K from 1 to N = {score.shape[1]}, got {K}")
    if score.is_cuda and (score.shape[1] > 1024 or score.dtype == torch.float64):
        raise ValueError("cluster_argmax wants up to 1024 tokens a frame in float32, float16 or bfloat16 on a GPU, got "
                         f"{score.shape[1]} in {score.dtype}")
    if check and score.isnan().any():
        raise ValueError(f"cluster_argmax wants scores, got {int(score.isnan().sum())} NaN of {score.numel()}")
    if check and (labels.min() < 0 or labels.max() >= K):
        raise ValueError(f"labels want to be in [0, K = {K}), got {labels.min().item()} to {labels.max().item()}")
    best = (cluster_argmax_triton if score.is_cuda else cluster_argmax_ref)(score.detach(), labels, K)
    if check and (best == score.shape[1]).any():
        empty = int((best == score.shape[1]).sum())
        raise ValueError(f"every cluster wants a token, {empty} of {best.numel()} are empty")
    return best
