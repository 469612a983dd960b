"""
The best token of each cluster: score (F, N), labels (F, N) -> (F, K).

    best[f, k] = argmax of score[f, i] over the tokens i with labels[f, i] = k,  ties to the lower index

Cost. One pass over N scores a frame: 12FN bytes read, 8FK written.
"""

import torch
from torch import Tensor


def cluster_argmax_ref(score: Tensor, labels: Tensor, K: int) -> Tensor:
    """The definition: the clusters' maxima, then the first token that reaches its cluster's. N marks an empty one."""
    F, N = score.shape
    top = score.new_full((F, K), -torch.inf).scatter_reduce(1, labels, score, "amax")       # (F, K)
    i = torch.arange(N, device=score.device).expand(F, N)
    i = i.masked_fill(score < top.gather(1, labels), N)
    return i.new_full((F, K), N).scatter_reduce(1, labels, i, "amin")


def cluster_argmax(score: Tensor, labels: Tensor, K: int) -> Tensor:
    """score (F, N) of any float dtype (-inf is legal, NaN is not), labels (F, N) int64 in [0, K) -> (F, K) int64."""
    if score.ndim != 2 or 0 in score.shape or not score.is_floating_point():
        raise ValueError(f"cluster_argmax wants a floating score (F, N), got {tuple(score.shape)} {score.dtype}")
    if labels.shape != score.shape or labels.dtype != torch.int64:
        want = f"labels {tuple(score.shape)} int64"
        raise ValueError(f"cluster_argmax wants {want}, got {tuple(labels.shape)} {labels.dtype}")
    if score.isnan().any():
        raise ValueError(f"cluster_argmax wants scores, got {int(score.isnan().sum())} NaN of {score.numel()}")
    if labels.min() < 0 or labels.max() >= K:
        raise ValueError(f"labels want to be in [0, K = {K}), got {labels.min().item()} to {labels.max().item()}")
    best = cluster_argmax_ref(score.detach(), labels, K)
    empty = best == score.shape[1]
    if empty.any():
        raise ValueError(f"every cluster wants a token, {int(empty.sum())} of {best.numel()} are empty")
    return best
