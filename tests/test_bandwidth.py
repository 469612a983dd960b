"""bandwidth against a sorted list of distances."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from test_cosine_distance import (
    DEVICE,
    DTYPES,
    LOW,
    captured,
    distance,
    low,
    needs_cuda,
    quick_distances,
    strided,
    unkind,
)

from kernels.bandwidth import bandwidth, bandwidth_ref, bandwidth_triton, sample

pytestmark = pytest.mark.usefixtures("poisoned_empty")

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


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

FLOOR = np.float32(1e-6)


def exact(tokens, frame, quantile, own):
    """tokens (n, C), the frame of each -> the quantile of the pairs of one frame (`own`) or of different frames."""
    i, j = np.triu_indices(len(tokens), 1)
    frame = np.asarray(frame)
    d = quick_distances(tokens)[i, j][(frame[i] == frame[j]) == own]
    return max(np.sort(d)[rank(quantile, len(d)) - 1], 1e-6) if len(d) else 1e-6


def close(d_c, want):
    """As near as the kernel promises: the last cell is 1/256 of the value wide, or 1e-7; distances are good to 1e-6."""
    assert d_c.dtype == torch.float32 and d_c.shape == (len(want),) and (d_c >= FLOOR).all()
    np.testing.assert_allclose(d_c.double().cpu().numpy(), want, rtol=1 / 255, atol=1.2e-6)


@pytest.mark.parametrize("shape, quantiles", [
    ((5, 3, 8), ["0.5", "0.001"]), ((1, 2, 1), ["0.02"]), ((3, 16, 64), ["1.0", "0.02"]),
    ((1, 17, 40), ["0.1"]), ((1, 64, 3), ["1", "0.001"]),
    ((1, 129, 100), ["0.95"]), ((1, 196, 768), ["0.02"]), ((1, 256, 8), ["0.1"]),
], ids=str)
@low
def test_within_frames_the_kernel_is_near_the_element_of_rank_qn(shape, quantiles, dtype):
    x = unkind(*shape, seed=shape[1]).to(DEVICE, dtype)
    for q in quantiles if dtype == torch.float32 else quantiles[:1]:
        close(bandwidth_triton(x, float(q)), [exact(f, [0] * len(f), q, own=True) for f in x])


def test_in_the_kernel_no_count_of_a_frame_of_1024_tokens_overflows():
    # An element of the sums meets all its 128 pairs in the same cell.
    x = torch.eye(8)[torch.arange(1024) % 2][None].to(DEVICE, LOW[-1])
    close(bandwidth_triton(x, 0.6), [1.0])


# What is measured is how the kernel counts, so the distances come in all sizes, and none between the two of a rank.
@pytest.mark.parametrize("q", ["0.001", "0.02", "0.1", "0.5", "0.95", "1.0"])
def test_the_kernel_finds_distances_of_all_sizes(q):
    angle = 3.1 * 2.0 ** -torch.linspace(0, 11, 40)[None]
    x = torch.stack([angle.cos(), angle.sin()], -1).to(DEVICE)
    close(bandwidth_triton(x, float(q)), [exact(x[0], [0] * 40, q, own=True)])


@pytest.mark.parametrize("N", [5, 20, 65])
def test_in_the_kernel_the_rank_decides_among_ties(N):
    # a of N axis-aligned tokens are equal, and all others at distance 1.
    for a in (2, N - 1) if N < 64 else (N // 2,):
        kinds = torch.arange(N).clamp(min=a - 1) - (a - 1)
        x = torch.eye(N)[kinds][None].to(DEVICE)
        equal, pairs = a * (a - 1) // 2, N * (N - 1) // 2
        close(bandwidth_triton(x, (equal - 0.5) / pairs), [1e-6])
        close(bandwidth_triton(x, (equal + 0.5) / pairs), [1.0])


def test_within_its_last_cell_the_kernel_interpolates_by_rank():
    x = torch.eye(5)[None].to(DEVICE)                                           # ten pairs, all of them in (255/256, 1]
    for r in (1, 10):
        assert bandwidth_triton(x, r / 10).item() == pytest.approx(1 - (1 - r / 10) / 256, rel=0, abs=2e-7)


def test_between_many_pairs_the_kernel_interpolates_to_a_quarter_of_its_last_cell():
    x = torch.randn(1, 196, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for q in ("0.3", "0.8"):
        want = exact(x[0], [0] * 196, q, own=True)
        assert bandwidth_triton(x, float(q)).item() == pytest.approx(want, rel=5e-4)


CLIPS = [
    ((3, 2, 1, 8), "0.5", 2), ((3, 3, 1, 40), "1.0", 3), ((2, 3, 16, 16), "0.1", 48), ((1, 5, 7, 3), "0.02", 35),
    ((5, 2, 4, 8), "0.95", 8), ((1, 32, 8, 8), "0.1", 256), ((1, 2, 128, 40), "1.0", 256),
    ((2, 8, 49, 40), "0.1", 256), ((1, 32, 9, 24), "0.1", 256),
    ((1, 2, 196, 8), "0.01", 317), ((1, 3, 181, 3), "0.008", 354),
]


@pytest.mark.parametrize("shape, q, n", CLIPS, ids=str)
def test_across_frames_the_kernel_is_near_the_quantile_of_its_sample(shape, q, n):
    total = shape[1] * shape[2]
    taken = [s * total // n for s in range(n)]                                  # evenly spaced, from the first
    for dtype in [torch.float32, *LOW] if n < 48 else LOW[-1:]:
        clips = torch.arange(shape[0]).view(-1, 1, 1, 1) / 2                    # ever smaller distances
        x = (unkind(*shape, seed=n) + clips).to(DEVICE, dtype)
        want = [exact(clip.flatten(0, 1)[taken], [i // shape[2] for i in taken], q, own=False) for clip in x]
        close(bandwidth_triton(x, float(q)), want)
        if n == total:                                                          # and that is the reference
            np.testing.assert_allclose(want, bandwidth_ref(x.cpu().double(), float(q)).numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("quantile, tokens, n", [
    (0.1, 1568, 256), (0.02, 1568, 256), (0.002, 1568, 708), (0.1, 256, 256), (0.1, 257, 256), (0.1, 3, 3),
    (0.015, 1568, 259), (1.0, 10 ** 6, 256), (0.0001, 10 ** 6, 1024), (0.0001, 900, 900), (1e-9, 10 ** 6, 1024),
])
def test_a_sample_has_500_pairs_below_the_quantile_or_all_tokens_or_1024(quantile, tokens, n):
    assert sample(quantile, tokens) == n
    assert n in (tokens, 1024) or quantile * n * n / 2 >= 500


def test_in_the_kernel_only_pairs_of_different_frames_are_counted_across_frames():
    t = torch.eye(3)[:, None].expand(3, 4, 3)                                   # frame t is constant, and e_t
    close(bandwidth_triton(t[None].to(DEVICE), 0.001), [1.0])
    close(bandwidth_triton(t.to(DEVICE), 1.0), [1e-6] * 3)
    same = torch.eye(4).expand(1, 3, 4, 4).to(DEVICE)                           # 1/4 of the cross pairs are equal
    close(bandwidth_triton(same, 0.25), [1e-6])
    close(bandwidth_triton(same, 0.26), [1.0])
    close(bandwidth_triton(same[0], 0.001), [1.0] * 3)


SHAPES = [(1, 16, 24), (5, 1, 24), (1, 70, 24), (1, 3, 16, 24), (2, 1, 16, 24), (2, 1, 1, 24), (3, 2, 1, 24)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_the_kernel_constant_frames_single_tokens_and_single_frames_have_the_floor(shape):
    token = 2.0 ** torch.randint(-3, 3, (24,), generator=torch.Generator().manual_seed(0))
    for dtype, q in [(torch.float32, 0.02), (LOW[-1], 1.0)]:
        close(bandwidth_triton(token.to(DEVICE, dtype).expand(shape), q), [1e-6] * shape[0])


@pytest.mark.parametrize("shape, q", [((5, 20, 24), 0.9), ((2, 70, 8), 0.9), ((5, 3, 9, 16), 0.5)], ids=str)
def test_the_kernel_gives_the_same_bits_every_run_and_to_a_frame_or_clip_alone(shape, q):
    x = unkind(*shape).to(DEVICE, LOW[-1])
    d_c = bandwidth_triton(x, q)
    assert d_c.unique().numel() > 1
    assert d_c.equal(bandwidth_triton(x, q))
    assert d_c[1:2].equal(bandwidth_triton(x[1:2], q))


def unalike(*shape):
    """Random tokens, the frames or clips of ever smaller distances."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x + torch.arange(len(x)).view(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("shape", [(5, 9, 8), (5, 3, 4, 8)], ids=str)
def test_in_the_kernel_each_frame_or_clip_has_its_own_bandwidth(shape):
    x = unalike(*shape).to(DEVICE)
    d_c = bandwidth_triton(x, 0.5)
    frame = torch.arange(x[0, ..., 0].numel()) // shape[-2]
    close(d_c, [exact(f.flatten(0, -2), frame, "0.5", own=len(shape) == 3) for f in x])
    assert (d_c.diff() < 0).all()


@pytest.mark.parametrize("shape", [(2, 10, 8), (2, 3, 4, 8)], ids=str)
def test_the_kernel_takes_any_strides(shape):
    for x in strided(*shape):
        assert bandwidth_triton(x, 0.9).equal(bandwidth_triton(x.contiguous(), 0.9))


def test_in_the_kernel_permuted_tokens_have_the_same_bandwidth():
    g = torch.Generator().manual_seed(1)
    x, n = torch.randn(2, 4, 15, 16, generator=g).to(DEVICE), torch.randperm(15, generator=g)
    for q in (0.5,):
        torch.testing.assert_close(bandwidth_triton(x[0][:, n], q), bandwidth_triton(x[0], q), rtol=1 / 128, atol=1e-6)
        moved = x[:, :, n].flip(1)                                              # 60 tokens: all are taken
        torch.testing.assert_close(bandwidth_triton(moved, q), bandwidth_triton(x, q), rtol=1 / 128, atol=1e-6)


@pytest.mark.parametrize("bad, shape", [(math.inf, (3, 20, 8)), (math.nan, (3, 2, 10, 8))])
def test_in_the_kernel_a_NaN_or_an_infinity_spoils_its_own_frame_or_clip_only(bad, shape):
    x = unkind(*shape).to(DEVICE)
    spoilt, want = x.clone(), bandwidth_triton(x, 0.5)
    for tokens in ([0, 7, 19], slice(20)):
        spoilt[1].view(20, 8)[tokens, 3] = bad
        d_c = bandwidth_triton(spoilt, 0.5)
        assert d_c[::2].equal(want[::2]) and FLOOR <= d_c[1].item() <= 2


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    x = unkind(2, 3, 70, 40).to("cuda", dtype)
    assert bandwidth(x, 0.1).equal(bandwidth_triton(x, 0.1))
    assert bandwidth(x[0], 0.1).equal(bandwidth_triton(x[0], 0.1))


@needs_cuda
def test_on_a_gpu_the_features_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (4 * N * C) + 3, 4, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    assert bandwidth_triton(x, 0.1)[-3:].equal(bandwidth_triton(x[-3:], 0.1))
    x = x.flatten(0, 1)
    assert bandwidth_triton(x, 0.1)[-3:].equal(bandwidth_triton(x[-3:], 0.1))


@needs_cuda
def test_the_kernel_can_be_captured_in_a_cuda_graph():
    x = unkind(2, 3, 70, 40).cuda()
    assert captured(lambda: bandwidth(x, 0.1, check=False)).equal(bandwidth_triton(x, 0.1))
    assert captured(lambda: bandwidth(x[0], 0.1, check=False)).equal(bandwidth_triton(x[0], 0.1))
