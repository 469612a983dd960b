"""
Budgets of a clip: how many tokens each of its frames or groups of frames keeps, and FluxViT's selector.

A budget is the number of tokens that the student sees of a clip. `deal` splits it exactly: over the frames of a clip
for masks that choose in each frame (masking.select), and over groups of consecutive frames for `group_dynamic`, which
keeps the tokens that change most. A larger budget takes no token from any frame or group.

This file imports nothing of the project but kernels/, so that it can be copied with masking.py, which uses it.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from kernels import check_features, frames_per_chunk, to_device

First = Literal["copy", "across"]


# Splitting a budget.

def keep_count(N: int, ratio: float) -> int:
    """K = max(1, floor(N (1 - r) + 1/2)). The ratio r is read as a decimal, so 0.85 means 85/100."""
    check_ratio("mask ratio", ratio)
    return max(1, math.floor(N * (1 - Fraction(str(ratio))) + Fraction(1, 2)))


def check_ratio(name: str, value: float):
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_quantile(name: str, value: float):
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def check_choice(name: str, value: str, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def deal(total: int, sizes: list[int]) -> list[int]:
    """Deal `total` to places of these sizes, one to each in turn, full ones skipped, until all is dealt."""
    if not 0 <= total <= sum(sizes):
        raise ValueError(f"a budget must be in 0 to {sum(sizes)}, the sum of the sizes, got {total}")
    budgets, rest = [0] * len(sizes), total
    while rest:
        free = [i for i, size in enumerate(sizes) if budgets[i] < size]
        rounds = max(1, min(rest // len(free), *(sizes[i] - budgets[i] for i in free)))
        for i in free[:rest]:                                                   # the last round may not reach all
            budgets[i] += rounds
            rest -= rounds
    return budgets


def frame_budgets(total: int, T: int, N: int) -> list[int]:
    """
    Deal a clip's budget to its T frames of N tokens. The numbers differ by at most 1.

    Frames take their turns by the reversed binary digits of their index (van der Corput's order, 0 4 2 6 1 5 3 7 for
    T = 8), so that those with one token more are spread over the clip.
    """
    bits = (T - 1).bit_length()
    order = sorted(range(T), key=lambda t: f"{t:0{bits}b}"[::-1])
    budget = dict(zip(order, deal(total, [N] * T), strict=True))
    return [budget[t] for t in range(T)]


def mask_frames(mask: Callable, tokens: Tensor, total: int, check: bool, aux: dict) -> Tensor:
    """
    Apply a mask that keeps a number of tokens of each frame at any budget: tokens (B, T, N, C) -> (B, total) flat ids.

    It is called once for each number in frame_budgets, at most twice, and both calls draw the same random numbers.
    """
    _, T, N, _ = tokens.shape
    budgets, generator, ids = frame_budgets(total, T, N), aux.get("generator"), {}
    state = None if generator is None else generator.get_state()
    for K in sorted({*budgets} - {0}):
        if generator is not None:
            generator.set_state(state)
        ids[K] = mask(tokens, K, check=check, **aux).view(-1, T, K)
        if check and not (ids[K] // N == torch.arange(T, device=tokens.device)[:, None]).all():
            raise ValueError(f"a mask must keep {K} tokens of each of {T} frames or have a registered clip budget, "
                             f"{getattr(mask, '__name__', mask)} does neither")
    return torch.cat([ids[K][:, t] for t, K in enumerate(budgets) if K], 1)


def group_spans(T: int, groups: int = 4) -> list[slice]:
    """Cut T frames into G = max(1, min(groups, T // 2)) consecutive groups; group g begins at frame floor(g T / G)."""
    G = max(1, min(groups, T // 2))
    return [slice(g * T // G, (g + 1) * T // G) for g in range(G)]


def count_equal_groups(total: int, T: int, N: int) -> int:
    """
    Return the number G of groups of which group_dynamic keeps equally many of `total` tokens of a clip, T frames of N
    tokens. A ValueError says that it must.
    """
    spans = group_spans(T)
    G, smallest = len(spans), N * min(span.stop - span.start for span in spans)
    if total % G or not G <= total <= G * smallest:
        raise ValueError(f"mask.teacher_tokens must be a multiple of {G} and at most {G * smallest} for clips of {T} "
                         f"frames of {N} tokens, which have {G} groups of at least {smallest} tokens, got {total}")
    return G


def check_total(tokens: Tensor, total: int):
    """Raise a ValueError unless clips of tokens (B, T, N, C) have `total` tokens, and total is positive."""
    pool = tokens.shape[1] * tokens.shape[2]
    if not 1 <= total <= pool:
        raise ValueError(f"total must be in 1 to {pool}, the tokens of a clip, got {total}")


# FluxViT's selector.

def group_dynamic(tokens: Tensor, total: int, *, groups: int = 4, first: First = "copy", check: bool = True) -> Tensor:
    """
    Keep the tokens that change most in each group of consecutive frames (FluxViT, Wang et al., ICCV 2025).

    tokens (B, T, N, C) -> (B, total) int64 flat ids t * N + n, ascending. The budget is dealt in turn to the groups of
    frames (group_spans), which have two or more frames unless T = 1. In a group, tokens of larger change come first,
    then those farther from the mean token of their frame, then lower ids. So the ids of a total are among those of
    every larger total.

    The change of a token is its fp32 L2 distance to the token at its place in the frame before. With first="copy" the
    first frame of each group takes the changes of its second, so that no group depends on another. With "across" it is
    compared with the last frame of the group before; only the clip's first frame takes those of the second. For T = 1
    the distance to the mean token takes the place of the change.

    With check=False nothing waits for a GPU.
    """
    x = check_features("group_dynamic", tokens, 4, check)
    check_total(x, total)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if first not in get_args(First):
        raise ValueError(f"first must be one of {', '.join(get_args(First))}, got {first!r}")
    _, T, N, _ = x.shape
    spans = group_spans(T, groups)
    budgets = deal(total, [N * (span.stop - span.start) for span in spans])
    chunks = map(to_float32, x.split(frames_per_chunk(x)))                      # on a CPU they stay in its cache
    return torch.cat([keep_changing(clips, spans, budgets, first) for clips in chunks])


def keep_changing(x: Tensor, spans: list[slice], budgets: list[int], first: First) -> Tensor:
    """Keep each group's budget of the tokens that change most: x (B, T, N, C) -> (B, sum of budgets) flat ids."""
    change = frame_difference(x, [span.start for span in spans] if first == "copy" else [0])
    distance, kept = distance_to_mean(x), []
    for span, budget in zip(spans, budgets, strict=True):
        order = topk_stable(distance[:, span].flatten(1), None)                 # by the second key, then by the first
        order = order.gather(1, topk_stable(change[:, span].flatten(1).gather(1, order), budget))
        kept.append(order + span.start * x.shape[2])
    return torch.cat(kept, 1).sort(1).values


def frame_difference(x: Tensor, starts=(0,)) -> Tensor:
    """
    L2 distance of each token to the token at its position in the previous frame: x (B, T, N, C) -> (B, T, N).

    The first frame, and each other frame of `starts`, takes the values of the frame after it (as in FluxViT and
    EVEREST). For T = 1 it is the distance to the mean token of the frame.
    """
    if x.shape[1] == 1:
        return distance_to_mean(x)
    d = torch.linalg.vector_norm(x[:, 1:] - x[:, :-1], dim=-1)                  # of frames 1 to T - 1
    # Slices, because a list of indices would be copied to a GPU.
    return torch.cat([d[:, t:t + 1] if t in starts else d[:, t - 1:t] for t in range(x.shape[1])], 1)


def distance_to_mean(x: Tensor) -> Tensor:
    """L2 distance of each token to the mean token of its frame: x (B, T, N, C) -> (B, T, N)."""
    return torch.linalg.vector_norm(x - x.mean(2, keepdim=True), dim=-1)


# What masks share.

def to_float32(x: Tensor) -> Tensor:
    """Detach x and convert it to fp32. fp64 stays fp64."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def topk_stable(score: Tensor, K: int | None) -> Tensor:
    """Indices of the K largest scores, in descending order: (..., n) -> (..., K). The first of equals comes first."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :K]


def bottomk_stable(score: Tensor, K: int) -> Tensor:
    """Indices of the K smallest scores, in ascending order: (..., n) -> (..., K). The first of equals comes first."""
    return score.argsort(dim=-1, stable=True)[..., :K]


def require_generator(generator: Generator | None) -> Generator:
    if generator is None:
        raise ValueError("generator must be a torch.Generator for a random mask, got None")
    return generator


def seeded_uniform(shape: tuple, generator: Generator | None, device: torch.device | None = None) -> Tensor:
    """
    Draw uniform numbers in [0, 1) on the generator's device and move them to `device` if it is given.

    A seed therefore gives the same mask on every device.
    """
    x = torch.rand(shape, generator=require_generator(generator), device=generator.device)
    return x if device is None else to_device(x, device)


def gumbel_noise(shape: tuple, generator: Generator, device: torch.device | None = None) -> Tensor:
    """
    Draw standard Gumbel noise, from seeded_uniform's numbers.

    The K largest of log w + noise are K draws without replacement with probabilities proportional to w.
    """
    return -seeded_uniform(shape, generator, device).clamp_(1e-7, 1 - 1e-7).log().neg().log()
