"""temporal_density against the logarithm of a sum of exponentials in 40 decimal digits, which cannot underflow."""

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

import numpy as np
import pytest
import torch
from test_cosine_distance import DTYPES, distance, unkind

from kernels.temporal_density import temporal_density, temporal_density_ref

DIGITS = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX)
SHAPES = [(2, 3, 16, 64), (1, 2, 1, 8), (1, 5, 7, 40), (1, 2, 50, 96), (2, 1, 9, 8)]


def recurrence(clip, d_c):
    """clip (T, N, C) -> (T, N) fp64: how often each token recurs in the other frames, as a logarithm."""
    rows, d_c = clip.double().numpy(), Decimal(float(d_c))
    tau = np.full(rows.shape[:2], -np.inf)
    with localcontext(DIGITS):
        for t, i in np.ndindex(*tau.shape):
            others = [token for s, frame in enumerate(rows) if s != t for token in frame]
            if others:
                tau[t, i] = sum(sorted((-Decimal(distance(rows[t, i], token)) / d_c).exp() for token in others)).ln()
    return tau


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_definition_on_the_rounded_input(shape, dtype):
    x, d_c = unkind(*shape).to(dtype), np.float32(0.1)
    tau = temporal_density(x, 0.1)
    assert tau.shape == shape[:3] and tau.dtype == torch.float32
    want = np.stack([recurrence(clip, d_c) for clip in x])
    np.testing.assert_allclose(tau.double().numpy() * 0.1, want * 0.1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("d_c", [1e-6, 1e-3, 0.02, 1.0, 50.0])
def test_the_reference_in_fp64_is_the_definition_to_fp64_at_any_bandwidth(d_c):
    x = unkind(1, 3, 9, 16).double()
    tau = temporal_density_ref(x, torch.tensor([d_c], dtype=torch.float64))
    np.testing.assert_allclose(tau[0].numpy(), recurrence(x[0], d_c), rtol=1e-14, atol=1e-14 / d_c)


@pytest.mark.parametrize("d_c", [1e-6, 2e-4, 0.1])
def test_a_bandwidth_whose_exponentials_all_underflow_keeps_the_values_and_their_order(d_c):
    # Tokens are vectors of 64 signs, and each frame holds all of them with some signs turned: every distance is a
    # multiple of 1/32, exact in fp32, and none of them is zero.
    g = torch.Generator().manual_seed(8)
    x = (torch.randint(0, 2, (1, 8, 64), generator=g) * 2.0 - 1).repeat(4, 1, 1)
    for s in range(4):
        for n in range(8):
            x[s, n, torch.randperm(64, generator=g)[:s + 2 + n % 3]] *= -1
    tau = temporal_density(x[None], d_c)[0].double().numpy()
    want = recurrence(x, np.float32(d_c))
    if d_c < 0.1:
        assert np.exp(np.float32(want.max())) == 0
    np.testing.assert_allclose(tau, want, rtol=2e-7, atol=1e-6)
    by = np.argsort(want.ravel())
    told_apart = np.diff(want.ravel()[by]) > 4e-7 * abs(want).max()
    assert told_apart.sum() >= 8
    assert (np.diff(tau.ravel()[by])[told_apart] > 0).all()


def test_the_own_frame_is_left_out_and_every_token_of_the_others_counts():
    # Axis-aligned tokens: at this bandwidth tau is the logarithm of the number of equal tokens in the other frames.
    a, b, c, z = 0, 1, 2, 3
    place = torch.tensor([[a, a, a, b], [a, a, c, b], [a, c, c, b], [z, z, z, z]])
    tau = temporal_density(torch.eye(4)[place][None], 0.01)[0]
    count = [[3, 3, 3, 2], [4, 4, 2, 2], [5, 1, 1, 2], [0, 0, 0, 0]]
    want = [[math.log(n) if n else math.log(12) - 100 for n in row] for row in count]
    torch.testing.assert_close(tau, torch.tensor(want), rtol=1e-6, atol=1e-6)


def test_zero_vectors_are_at_distance_1_from_everything():
    x = torch.zeros(1, 2, 3, 8)
    x[0, 0, 0, 0] = 1
    torch.testing.assert_close(temporal_density(x, 0.5), torch.full((1, 2, 3), math.log(3) - 2))


def test_a_single_frame_has_an_empty_sum():
    assert temporal_density(torch.randn(2, 1, 5, 8), 0.1).equal(torch.full((2, 1, 5), -math.inf))


def test_a_constant_clip_counts_its_other_tokens():
    x = torch.randn(24, generator=torch.Generator().manual_seed(9)).expand(2, 3, 5, 24)
    torch.testing.assert_close(temporal_density(x, 0.1), torch.full((2, 3, 5), math.log(10)), rtol=0, atol=1e-5)


def test_each_clip_takes_its_own_bandwidth_and_nothing_from_the_others():
    x = torch.randn(3, 3, 7, 16, generator=torch.Generator().manual_seed(10))
    d_c = [0.05, 0.2, 1.0]
    for given in (torch.tensor(d_c), torch.tensor(d_c, dtype=torch.float64)):
        together = temporal_density(x, given)
        for b in range(3):
            torch.testing.assert_close(together[b], temporal_density(x[b:b + 1], d_c[b])[0], rtol=0, atol=5e-5)
    assert temporal_density(x, 0.1).equal(temporal_density(x, 0.1))


def test_permuted_frames_and_tokens_give_permuted_densities():
    g = torch.Generator().manual_seed(11)
    x = torch.randn(2, 4, 9, 16, generator=g)
    t, n = torch.randperm(4, generator=g), torch.randperm(9, generator=g)
    moved = temporal_density(x[:, t][:, :, n], 0.1)
    torch.testing.assert_close(moved, temporal_density(x, 0.1)[:, t][:, :, n], rtol=0, atol=2e-5)


def test_strides_do_not_matter_and_there_is_no_gradient():
    x = torch.randn(16, 9, 4, 2, generator=torch.Generator().manual_seed(12), requires_grad=True).permute(3, 2, 1, 0)
    tau = temporal_density(x, 0.1)
    torch.testing.assert_close(tau, temporal_density(x.contiguous(), 0.1), rtol=0, atol=2e-5)
    assert not tau.requires_grad


@pytest.mark.parametrize("x, d_c, message", [
    (torch.ones(2, 3, 4), 0.1, r"temporal_density wants \(B, T, N, C\), got \(2, 3, 4\)"),
    (torch.ones(2, 0, 3, 4), 0.1, r"no empty axis in \(B, T, N, C\), got \(2, 0, 3, 4\)"),
    (torch.ones(1, 1, 2, 2, dtype=torch.uint8), 0.1, r"floating-point values, got torch.uint8"),
    (torch.tensor([[[[math.nan, 1.0]]]]), 0.1, r"finite values, got 1 NaN or infinite of 2"),
    (torch.ones(2, 3, 4, 5), torch.ones(3), r"d_c wants one number or \(2,\), got \(3,\)"),
    (torch.ones(2, 3, 4, 5), torch.ones(2, 1), r"d_c wants one number or \(2,\), got \(2, 1\)"),
    (torch.ones(2, 3, 4, 5), 0.0, r"d_c wants positive numbers, got 0"),
    (torch.ones(2, 3, 4, 5), torch.tensor([0.1, -0.5]), r"d_c wants positive numbers, got -0.5"),
    (torch.ones(2, 3, 4, 5), math.nan, r"d_c wants positive numbers, got nan"),
], ids=range(9))
def test_impossible_arguments_are_refused_by_name(x, d_c, message):
    with pytest.raises(ValueError, match=message):
        temporal_density(x, d_c)
