"""bandwidth against a sorted list of distances."""

import math

import numpy as np
import pytest
import torch
from helpers.kernels import (
    DEVICE,
    DTYPES,
    LOW,
    across,
    captured,
    kth,
    low,
    needs_cuda,
    quick_distances,
    seeded,
    strided,
    unkind,
    within,
)

from kernels import tl, triton
from kernels.bandwidth import bandwidth, bandwidth_ref, bandwidth_triton, num_sampled_tokens, select_kth

pytestmark = pytest.mark.usefixtures("poison_empty")

QUANTILES = ["0.02", "0.1", "0.5", "0.987", "1", "0.00001"]
MIN_BANDWIDTH = np.float32(1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The reference

@pytest.mark.parametrize("shape", [
    (2, 32, 16), (3, 25, 40), (1, 2, 8), (2, 1, 8),
    (2, 3, 8, 16), (1, 4, 11, 40), (3, 2, 1, 8), (2, 1, 9, 8), (1, 8, 3, 8),
], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_element_of_rank_qn(shape, dtype):
    x, oracle = unkind(*shape).to(dtype), within if len(shape) == 3 else across
    for q in QUANTILES if dtype == torch.float32 else QUANTILES[::2]:
        d_c = bandwidth(x, float(q))
        assert d_c.shape == (shape[0],) and d_c.dtype == torch.float32
        np.testing.assert_allclose(d_c.numpy(), [oracle(item, q) for item in x], rtol=0, atol=1e-6)


# Of 45, 300 and 435 pairs. In doubles, 0.07 * 300 is more than 21.
@pytest.mark.parametrize("N, quantile", [
    (10, "0.2"), (25, "0.02"), (25, "0.07"), (25, "0.28"), (25, "0.29"), (25, "0.57"), (30, "0.2"), (30, "0.02"),
])
def test_the_quantile_is_the_decimal_that_was_written(N, quantile):
    x = torch.randn(1, N, 16, generator=seeded(N)).double()
    d = np.sort(quick_distances(x[0])[np.triu_indices(N, 1)])
    expected = kth(d, quantile)
    rank = int(np.abs(d - expected).argmin())
    assert np.diff(d[max(0, rank - 1):rank + 2]).min() > 2e-6                   # the next ranks differ measurably
    assert bandwidth(x, float(quantile)).item() == pytest.approx(expected, rel=0, abs=5e-7)


def test_among_ties_the_rank_decides_exactly():
    # Groups of 3 and 2 of 5 axis-aligned tokens: 3 + 1 of the 10 pairs at distance 0, the others at 1.
    x = torch.eye(4)[torch.tensor([[0, 1, 0, 1, 0]])]
    assert bandwidth(x, 0.4).tolist() == [MIN_BANDWIDTH]
    assert bandwidth(x, 0.41).tolist() == [1.0]
    # Of two frames {0, 0, 1} and {0, 1, 1}, 2 * 1 + 1 * 2 of the 9 pairs are at distance 0.
    clip = torch.eye(4)[torch.tensor([[[0, 0, 1], [0, 1, 1]]])]
    assert bandwidth(clip, 0.44).tolist() == [MIN_BANDWIDTH]
    assert bandwidth(clip, 0.45).tolist() == [1.0]


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 1, 24), (2, 3, 16, 24), (2, 1, 16, 24), (2, 1, 1, 24)], ids=str)
def test_constant_frames_single_tokens_and_single_frames_have_the_minimum(shape):
    token = torch.randn(24, generator=seeded(0))
    for q in (0.02, 1.0):
        assert bandwidth(token.expand(shape), q).tolist() == [MIN_BANDWIDTH] * shape[0]


def test_reference_gives_a_frame_or_clip_what_it_has_alone():
    x = torch.randn(3, 4, 9, 16, generator=seeded(6))
    torch.testing.assert_close(bandwidth(x[1:2], 0.1), bandwidth(x, 0.1)[1:2], rtol=0, atol=5e-7)
    torch.testing.assert_close(bandwidth(x[1, 2:3], 0.1), bandwidth(x.flatten(0, 1), 0.1)[6:7], rtol=0, atol=5e-7)
    assert bandwidth(x, 0.1).equal(bandwidth(x, 0.1))


def test_reference_takes_any_strides():
    x = torch.randn(16, 9, 4, 3, generator=seeded(7)).permute(3, 2, 1, 0)
    torch.testing.assert_close(bandwidth(x, 0.1), bandwidth(x.contiguous(), 0.1), rtol=0, atol=5e-7)
    torch.testing.assert_close(bandwidth(x[0], 0.1), bandwidth(x[0].contiguous(), 0.1), rtol=0, atol=5e-7)


def test_a_larger_quantile_gives_no_smaller_bandwidth():
    x = unkind(2, 25, 16)
    d_c = torch.stack([bandwidth(x, q / 40) for q in range(1, 41)])
    assert (d_c.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("quantile", [0, 0.0, -0.1, 1.0001, math.nan])
def test_a_quantile_outside_0_to_1_is_refused(quantile):
    with pytest.raises(ValueError, match=rf"bandwidth.*quantile.*\(0, 1\].* {quantile}$"):
        bandwidth(torch.ones(1, 4, 8), quantile)


@pytest.mark.parametrize("bad, message", [
    (torch.ones(3, 4), r"bandwidth.*\(F, N, C\).*\(3, 4\)"),
    (torch.ones(1, 1, 2, 3, 4), r"bandwidth.*\(1, 1, 2, 3, 4\)"),
    (torch.full((1, 2, 2, 3), math.nan), r"bandwidth.*12 NaN or infinite of 12"),
], ids=range(3))
def test_invalid_tokens_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bandwidth(bad, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

def exact(tokens, frame, quantile, same_frame):
    """tokens (n, C), the frame of each -> the quantile of the pairs of one frame, or else of different frames."""
    i, j = np.triu_indices(len(tokens), 1)
    frame = np.asarray(frame)
    return kth(quick_distances(tokens)[i, j][(frame[i] == frame[j]) == same_frame], quantile)


def assert_near(d_c, expected):
    """As near as the kernel promises: its last interval is 1/256 of the value wide, or 1e-7; distances have 1e-6."""
    assert d_c.dtype == torch.float32 and d_c.shape == (len(expected),) and (d_c >= MIN_BANDWIDTH).all()
    np.testing.assert_allclose(d_c.double().cpu().numpy(), expected, rtol=1 / 255, atol=1.2e-6)


@pytest.mark.parametrize("shape, quantiles", [
    ((5, 3, 8), ["0.5", "0.001"]), ((1, 2, 1), ["0.02"]), ((3, 16, 64), ["1.0", "0.02"]),
    ((1, 17, 40), ["0.1"]), ((1, 64, 3), ["1", "0.001"]), ((1, 129, 100), ["0.95"]),
    pytest.param((1, 196, 768), ["0.02"], marks=pytest.mark.gpu),
], ids=str)
@low
def test_within_frames_kernel_is_near_the_element_of_rank_qn(shape, quantiles, dtype):
    x = unkind(*shape, seed=shape[1]).to(DEVICE, dtype)
    for q in quantiles if dtype == torch.float32 else quantiles[:1]:
        assert_near(bandwidth_triton(x, float(q)), [exact(f, [0] * len(f), q, same_frame=True) for f in x])


@pytest.mark.gpu
def test_kernel_counts_of_a_frame_of_1024_tokens_do_not_overflow():
    # All 128 pairs that one element of the sums counts fall into the same interval.
    x = torch.eye(8)[torch.arange(1024) % 2][None].to(DEVICE, LOW[-1])
    assert_near(bandwidth_triton(x, 0.6), [1.0])


# The distances have all sizes, and no two of them are close in rank and value.
@pytest.mark.parametrize("q", ["0.001", "0.02", "0.5", "0.95", "1.0"])
def test_kernel_finds_distances_of_all_sizes(q):
    angle = 3.1 * 2.0 ** -torch.linspace(0, 11, 40)[None]
    x = torch.stack([angle.cos(), angle.sin()], -1).to(DEVICE)
    assert_near(bandwidth_triton(x, float(q)), [exact(x[0], [0] * 40, q, same_frame=True)])


@pytest.mark.parametrize("N", [5, 20, 65])
def test_in_the_kernel_the_rank_decides_among_ties(N):
    # `equal` of N axis-aligned tokens are equal, and all others at distance 1.
    for equal in (2, N - 1) if N < 64 else (N // 2,):
        axis = torch.arange(N).clamp(min=equal - 1) - (equal - 1)
        x = torch.eye(N)[axis][None].to(DEVICE)
        zeros, pairs = equal * (equal - 1) // 2, N * (N - 1) // 2
        assert_near(bandwidth_triton(x, (zeros - 0.5) / pairs), [1e-6])
        assert_near(bandwidth_triton(x, (zeros + 0.5) / pairs), [1.0])


def test_kernel_interpolates_by_rank_within_its_last_interval():
    x = torch.eye(5)[None].to(DEVICE)                                           # ten pairs, all at distance 1
    d_c = torch.cat([bandwidth_triton(x, r / 10) for r in range(1, 11)]).double()
    steps = d_c.diff()
    assert (steps > 0).all() and d_c[-1] - d_c[0] < 1 / 256
    torch.testing.assert_close(steps, steps.mean().expand(9), rtol=0.01, atol=2e-7)


def test_among_many_pairs_kernel_errs_by_a_quarter_of_its_last_interval():
    x = torch.randn(1, 196, 40, generator=seeded(2)).to(DEVICE)
    for q in ("0.3", "0.8"):
        expected = exact(x[0], [0] * 196, q, same_frame=True)
        assert bandwidth_triton(x, float(q)).item() == pytest.approx(expected, rel=5e-4)


@triton.jit
def select_kth_kernel(d_ptr, ranks_ptr, out_ptr, size, CHUNK: tl.constexpr):
    """One program: a rank -> about the distance of that rank of d (size,)."""
    rank = tl.load(ranks_ptr + tl.program_id(0))
    tl.store(out_ptr + tl.program_id(0), select_kth(d_ptr, size, rank, CHUNK, 3))


def select(d, ranks, chunk):
    """d (size,), ranks (n,) -> the kernel's distances (n,), on the CPU."""
    out = torch.empty(len(ranks), device=DEVICE)
    ranks = torch.as_tensor(ranks, dtype=torch.int32, device=DEVICE)
    select_kth_kernel[(len(ranks),)](d.float().to(DEVICE), ranks, out, len(d), chunk)
    return out.cpu().double()


def test_the_selected_distance_has_the_rank_among_distances_of_any_size():
    # From 1e-6 to 2, a third of them equal to another; 32 infinite ones do not count.
    d = 2e-6 * 1e6 ** torch.rand(480, generator=seeded(3)).double()
    d[:160] = d[160:320]
    d = torch.cat([d, torch.full((32,), math.inf)])[torch.randperm(512, generator=seeded(4))].float()
    ranks, expected = torch.arange(1, 481, 13), d.double().sort().values
    selected = select(d, ranks, chunk=64)
    torch.testing.assert_close(selected, expected[ranks - 1], rtol=1 / 255, atol=1.1e-7)
    assert (selected.diff() > -1e-9).all() and selected.max() <= 2


def test_any_of_the_cells_may_hold_all_distances():
    # 32 chunks of 16: an element of the kernel's sums counts 15 distances, the most that it can.
    for cell in range(8):
        d = torch.full((512,), 2 * (4 * cell + 1.5) / 31)
        torch.testing.assert_close(select(d, [1, 256, 512], 16), d[:3].double(), rtol=1 / 255, atol=0)
    assert select(torch.full((512,), 2.0), [512], 16).item() == 2               # the largest distance there can be


def test_among_evenly_spaced_distances_the_kernel_errs_by_less_than_their_spacing():
    d = (torch.arange(1024) + 0.5) / 512
    ranks = torch.arange(150, 1025, 19)                                         # of intervals with several distances
    torch.testing.assert_close(select(d, ranks, 128), d[ranks - 1].double(), rtol=0, atol=1 / 512)


CLIPS = [               # shape, quantile, number of sampled tokens
    ((3, 2, 1, 8), "0.5", 2), ((3, 3, 1, 40), "1.0", 3), ((2, 3, 16, 16), "0.1", 48), ((1, 5, 7, 3), "0.02", 35),
    ((5, 2, 4, 8), "0.95", 8), ((1, 2, 128, 40), "1.0", 256),
    pytest.param((2, 8, 49, 40), "0.1", 256, marks=pytest.mark.gpu),
    ((1, 32, 9, 24), "0.1", 256), ((1, 3, 181, 3), "0.008", 354),
]


@pytest.mark.parametrize("shape, q, n", CLIPS, ids=str)
def test_across_frames_kernel_is_near_the_quantile_of_its_sample(shape, q, n):
    total = shape[1] * shape[2]
    sample = [s * total // n for s in range(n)]                                 # evenly spaced, from the first
    for dtype in [torch.float32, *LOW] if n < 48 else LOW[-1:]:
        shift = torch.arange(shape[0]).view(-1, 1, 1, 1) / 2                    # later clips have smaller distances
        x = (unkind(*shape, seed=n) + shift).to(DEVICE, dtype)
        frame = [i // shape[2] for i in sample]
        expected = [exact(clip.flatten(0, 1)[sample], frame, q, same_frame=False) for clip in x]
        assert_near(bandwidth_triton(x, float(q)), expected)
        if n == total:                                                          # the sample is the whole clip
            reference = bandwidth_ref(x.cpu().double(), float(q))
            np.testing.assert_allclose(expected, reference.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("quantile, tokens, n", [
    (0.1, 1568, 256), (0.02, 1568, 256), (0.002, 1568, 708), (0.1, 256, 256), (0.1, 257, 256), (0.1, 3, 3),
    (0.015, 1568, 259), (1.0, 10 ** 6, 256), (0.0001, 10 ** 6, 1024), (0.0001, 900, 900), (1e-9, 10 ** 6, 1024),
])
def test_a_sample_has_500_pairs_below_the_quantile_or_all_tokens_or_1024(quantile, tokens, n):
    assert num_sampled_tokens(quantile, tokens) == n
    assert n in (tokens, 1024) or quantile * n * n / 2 >= 500


@pytest.mark.parametrize("run", [
    bandwidth, pytest.param(lambda x, q: bandwidth_triton(x.to(DEVICE), q), id="bandwidth_triton"),
])
def test_only_pairs_of_one_frame_or_of_different_frames_are_counted(run):
    x = torch.eye(3)[:, None].expand(3, 4, 3)                                   # each frame is constant
    assert_near(run(x, 1.0), [1e-6] * 3)
    assert_near(run(x[None], 0.001), [1.0])
    same = torch.eye(4).expand(1, 3, 4, 4)                                      # 1/4 of the cross pairs are equal
    assert_near(run(same[0], 0.001), [1.0] * 3)
    assert_near(run(same, 0.25), [1e-6])
    assert_near(run(same, 0.26), [1.0])


@pytest.mark.parametrize("shape", [(1, 16, 24), (5, 1, 24), (1, 3, 16, 24), (2, 1, 16, 24), (2, 1, 1, 24),
                                   (3, 2, 1, 24)], ids=str)
def test_kernel_gives_constant_frames_and_single_tokens_the_minimum(shape):
    token = 2.0 ** torch.randint(-3, 3, (24,), generator=seeded(0))
    for dtype, q in [(torch.float32, 0.02), (LOW[-1], 1.0)]:
        assert_near(bandwidth_triton(token.to(DEVICE, dtype).expand(shape), q), [1e-6] * shape[0])


@pytest.mark.parametrize("shape, q", [((5, 20, 24), 0.9), ((2, 70, 8), 0.9), ((5, 3, 9, 16), 0.5)], ids=str)
def test_kernel_gives_the_same_bits_every_run_and_to_a_frame_or_clip_alone(shape, q):
    x = unkind(*shape).to(DEVICE, LOW[-1])
    d_c = bandwidth_triton(x, q)
    assert d_c.unique().numel() > 1
    assert d_c.equal(bandwidth_triton(x, q))
    assert d_c[1:2].equal(bandwidth_triton(x[1:2], q))


@pytest.mark.parametrize("shape", [(5, 9, 8), (5, 3, 4, 8)], ids=str)
def test_kernel_gives_each_frame_or_clip_its_own_bandwidth(shape):
    x = torch.randn(shape, generator=seeded(0))
    x = (x + torch.arange(len(x)).view(-1, *[1] * (len(shape) - 1))).to(DEVICE)     # later ones have smaller distances
    d_c = bandwidth_triton(x, 0.5)
    frame = torch.arange(x[0, ..., 0].numel()) // shape[-2]
    assert_near(d_c, [exact(item.flatten(0, -2), frame, "0.5", same_frame=len(shape) == 3) for item in x])
    assert (d_c.diff() < 0).all()


@pytest.mark.parametrize("shape", [(2, 10, 8), (2, 3, 4, 8)], ids=str)
def test_kernel_takes_any_strides(shape):
    for x in strided(*shape):
        assert bandwidth_triton(x, 0.9).equal(bandwidth_triton(x.contiguous(), 0.9))


def test_kernel_gives_permuted_tokens_the_same_bandwidth():
    g = seeded(1)
    x, n = torch.randn(2, 4, 15, 16, generator=g).to(DEVICE), torch.randperm(15, generator=g)
    permuted = x[:, :, n].flip(1)                                               # 60 tokens: the sample has them all
    tolerance = dict(rtol=1 / 128, atol=1e-6)
    torch.testing.assert_close(bandwidth_triton(permuted[0], 0.5), bandwidth_triton(x[0], 0.5).flip(0), **tolerance)
    torch.testing.assert_close(bandwidth_triton(permuted, 0.5), bandwidth_triton(x, 0.5), **tolerance)


@pytest.mark.parametrize("bad, shape", [(math.inf, (3, 20, 8)), (math.nan, (3, 2, 10, 8))])
@pytest.mark.gpu
def test_kernel_lets_a_nan_affect_its_own_frame_or_clip_only(bad, shape):
    x = unkind(*shape).to(DEVICE)
    spoilt, expected = x.clone(), bandwidth_triton(x, 0.5)
    for tokens in ([0, 7, 19], slice(20)):
        spoilt[1].view(20, 8)[tokens, 3] = bad
        d_c = bandwidth_triton(spoilt, 0.5)
        assert d_c[::2].equal(expected[::2]) and MIN_BANDWIDTH <= d_c[1].item() <= 2


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.gpu
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    x = unkind(2, 3, 70, 40).to("cuda", dtype)
    assert bandwidth(x, 0.1).equal(bandwidth_triton(x, 0.1))
    assert bandwidth(x[0], 0.1).equal(bandwidth_triton(x[0], 0.1))


@needs_cuda
def test_features_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (4 * N * C) + 3, 4, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    assert bandwidth_triton(x, 0.1)[-3:].equal(bandwidth_triton(x[-3:], 0.1))
    x = x.flatten(0, 1)
    assert bandwidth_triton(x, 0.1)[-3:].equal(bandwidth_triton(x[-3:], 0.1))


@needs_cuda
def test_kernel_can_be_captured_in_a_cuda_graph():
    x = unkind(2, 3, 70, 40).cuda()
    assert captured(lambda: bandwidth(x, 0.1, check=False)).equal(bandwidth_triton(x, 0.1))
    assert captured(lambda: bandwidth(x[0], 0.1, check=False)).equal(bandwidth_triton(x[0], 0.1))
