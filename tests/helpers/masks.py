"""Inputs of the masks, and the checks that tests of them share."""

import math

import torch

from helpers.kernels import seeded
from masking import CLIP_BUDGET, MASK_INPUTS

STOCHASTIC = [name for name in MASK_INPUTS if "generator" in MASK_INPUTS[name]]
DRAWS = 40000           # clips in a test of probabilities


def mask_inputs(B, T, N, seed=0, E=8):
    """Every input that a mask may need, except the generator."""
    g, side = seeded(seed), math.isqrt(N)
    return {"attention": torch.rand(B, T, N, generator=g).softmax(-1), "text": torch.randn(B, E, generator=g),
            "aligned": torch.randn(B, T, N, E, generator=g), "logits": torch.randn(B, T, N, generator=g),
            "grid": (side, N // side) if N % side == 0 else (1, N)}


def assert_contract(ids, B, T, N, K, name="cluster_stm"):
    """Flat ids are int64, ascending and unique, and each frame keeps K tokens unless the budget is the clip's."""
    assert ids.shape == (B, T * K) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < T * N
    assert (ids.diff(dim=1) > 0).all()
    if name not in CLIP_BUDGET:
        assert ids.view(B, T, K).div(N, rounding_mode="floor").equal(torch.arange(T)[:, None].expand(B, T, K))


def assert_odds(ids, odds, n, sigmas=4.5):
    """Of ids (DRAWS, K) in [0, n), each is drawn with its probability in odds (n,), within `sigmas` deviations."""
    share = torch.zeros(DRAWS, n).scatter_(1, ids, 1).double().mean(0)
    odds = torch.as_tensor(odds, dtype=torch.float64)
    assert abs(share.sum().item() - ids.shape[1]) < 1e-6 * ids.shape[1]
    assert ((share - odds).abs() <= sigmas * (odds * (1 - odds) / DRAWS).sqrt() + 1e-12).all(), (share, odds)
