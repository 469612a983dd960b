"""bandwidth against a sorted list of distances."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from test_cosine_distance import DTYPES, distance, unkind

from kernels.bandwidth import bandwidth

QUANTILES = ["0.02", "0.1", "0.5", "0.987", "1", "0.00001"]


def rank(quantile, n):
    """ceil(quantile * n) in whole numbers, for a quantile written with decimals; at least 1."""
    digits = quantile.partition(".")[2]
    return max(1, -(-int(quantile.replace(".", "")) * n // 10 ** len(digits)))


def within(frame, quantile):
    """frame (N, C) -> the quantile of the distances of its pairs."""
    d = sorted(distance(a, b) for a, b in combinations(frame.double().numpy(), 2))
    return max(d[rank(quantile, len(d)) - 1], 1e-6) if d else 1e-6


def across(clip, quantile):
    """clip (T, N, C) -> the quantile of the distances of pairs from different frames."""
    d = sorted(distance(a, b) for f, g in combinations(clip.double().numpy(), 2) for a in f for b in g)
    return max(d[rank(quantile, len(d)) - 1], 1e-6) if d else 1e-6


@pytest.mark.parametrize("shape", [(2, 32, 16), (3, 25, 40), (1, 2, 8), (2, 1, 8), (1, 49, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_frames_it_is_the_element_of_rank_qn(shape, dtype):
    x = unkind(*shape).to(dtype)
    for q in QUANTILES:
        d_c = bandwidth(x, float(q))
        assert d_c.shape == (shape[0],) and d_c.dtype == torch.float32
        np.testing.assert_allclose(d_c.numpy(), [within(f, q) for f in x], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8, 16), (1, 4, 11, 40), (3, 2, 1, 8), (2, 1, 9, 8), (1, 8, 3, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_across_frames_it_is_the_element_of_rank_qn(shape, dtype):
    x = unkind(*shape).to(dtype)
    for q in QUANTILES:
        d_c = bandwidth(x, float(q))
        assert d_c.shape == (shape[0],) and d_c.dtype == torch.float32
        np.testing.assert_allclose(d_c.numpy(), [across(clip, q) for clip in x], rtol=0, atol=1e-6)


# Of 45, 300 and 435 pairs. In doubles, 0.07 * 300 is more than 21.
@pytest.mark.parametrize("N, quantile", [
    (10, "0.2"), (25, "0.02"), (25, "0.07"), (25, "0.28"), (25, "0.29"), (25, "0.57"), (30, "0.2"), (30, "0.02"),
])
def test_the_quantile_is_the_decimal_that_was_written(N, quantile):
    x = torch.randn(1, N, 16, generator=torch.Generator().manual_seed(N)).double()
    d = sorted(distance(a, b) for a, b in combinations(x[0].numpy(), 2))
    r = rank(quantile, len(d))
    assert min(np.diff(d[max(0, r - 2):r + 1])) > 2e-6                          # neighbours in rank are told apart
    assert bandwidth(x, float(quantile)).item() == pytest.approx(d[r - 1], rel=0, abs=5e-7)


def test_among_ties_the_rank_decides_exactly():
    # Groups of 3 and 2 of 5 axis-aligned tokens: 3 + 1 of the 10 pairs at distance 0, the others at 1.
    x = torch.eye(4)[torch.tensor([[0, 1, 0, 1, 0]])]
    assert bandwidth(x, 0.4).tolist() == [np.float32(1e-6)]
    assert bandwidth(x, 0.41).tolist() == [1.0]
    # Of two frames {0, 0, 1} and {0, 1, 1}, 2 * 1 + 1 * 2 of the 9 pairs are at distance 0.
    clip = torch.eye(4)[torch.tensor([[[0, 0, 1], [0, 1, 1]]])]
    assert bandwidth(clip, 0.44).tolist() == [np.float32(1e-6)]
    assert bandwidth(clip, 0.45).tolist() == [1.0]


def test_only_the_pairs_it_is_about_are_counted():
    t = torch.eye(3)[:, None].expand(3, 4, 3)                                   # frame t is constant, and e_t
    assert bandwidth(t, 1.0).tolist() == [np.float32(1e-6)] * 3
    assert bandwidth(t[None], 0.001).tolist() == [1.0]
    same = torch.eye(4).expand(1, 3, 4, 4)                                      # 1/4 of the cross pairs are equal
    assert bandwidth(same[0], 0.001).tolist() == [1.0] * 3
    assert bandwidth(same, 0.25).tolist() == [np.float32(1e-6)]
    assert bandwidth(same, 0.26).tolist() == [1.0]


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 1, 24), (2, 3, 16, 24), (2, 1, 16, 24), (2, 1, 1, 24)], ids=str)
def test_constant_frames_single_tokens_and_single_frames_have_the_floor(shape):
    token = torch.randn(24, generator=torch.Generator().manual_seed(0))
    for q in (0.02, 1.0):
        assert bandwidth(token.expand(shape), q).tolist() == [np.float32(1e-6)] * shape[0]


def test_a_frame_and_a_clip_have_the_bandwidth_they_have_alone():
    x = torch.randn(3, 4, 9, 16, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(bandwidth(x[1:2], 0.1), bandwidth(x, 0.1)[1:2], rtol=0, atol=5e-7)
    torch.testing.assert_close(bandwidth(x[1, 2:3], 0.1), bandwidth(x.flatten(0, 1), 0.1)[6:7], rtol=0, atol=5e-7)
    assert bandwidth(x, 0.1).equal(bandwidth(x, 0.1))


def test_strides_do_not_matter():
    x = torch.randn(16, 9, 4, 3, generator=torch.Generator().manual_seed(7)).permute(3, 2, 1, 0)
    torch.testing.assert_close(bandwidth(x, 0.1), bandwidth(x.contiguous(), 0.1), rtol=0, atol=5e-7)
    torch.testing.assert_close(bandwidth(x[0], 0.1), bandwidth(x[0].contiguous(), 0.1), rtol=0, atol=5e-7)


def test_a_larger_quantile_is_no_smaller_bandwidth():
    x = unkind(2, 25, 16)
    d_c = torch.stack([bandwidth(x, q / 40) for q in range(1, 41)])
    assert (d_c.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("quantile", [0, 0.0, -0.1, 1.0001, math.nan])
def test_a_quantile_outside_0_to_1_is_refused(quantile):
    with pytest.raises(ValueError, match=rf"quantile in \(0, 1\], got {quantile}"):
        bandwidth(torch.ones(1, 4, 8), quantile)


@pytest.mark.parametrize("bad, message", [
    (torch.ones(3, 4), r"bandwidth wants \(F, N, C\), got \(3, 4\)"),
    (torch.ones(1, 1, 2, 3, 4), r"got \(1, 1, 2, 3, 4\)"),
    (torch.ones(1, 2, 0, 4), r"no empty axis in \(B, T, N, C\), got \(1, 2, 0, 4\)"),
    (torch.ones(1, 2, 3, dtype=torch.int32), r"floating-point values, got torch.int32"),
    (torch.full((1, 2, 2, 3), math.nan), r"finite values, got 12 NaN or infinite of 12"),
], ids=range(5))
def test_what_is_no_set_of_tokens_is_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        bandwidth(bad, 0.1)
