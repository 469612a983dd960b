"""temporal_density against the logarithm of a sum of exponentials in 40 decimal digits, which cannot underflow."""

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

import numpy as np
import pytest
import torch
from test_cosine_distance import (
    CUDA,
    DEVICE,
    DTYPES,
    captured,
    distance,
    low,
    needs_cuda,
    quick_distances,
    strided,
    unkind,
)

from kernels.temporal_density import (
    inverse_length_triton,
    temporal_density,
    temporal_density_ref,
    temporal_density_triton,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

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


def test_unchecked_on_a_cpu_the_reference_leaves_other_clips_as_they_are():
    x = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    want = temporal_density(x, 0.1)
    x[1, 0, 0, 0] = math.nan
    assert temporal_density(x, 0.1, check=False)[::2].equal(want[::2])


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

SWITCH = math.log2(math.e) / 117                # above this bandwidth the kernel sums without a running maximum


def run(x, d_c, inv=None, **launch):
    """The kernel's tau, on the CPU. d_c: a number or one a clip."""
    d_c = torch.as_tensor(d_c, dtype=torch.float32).expand(len(x)).contiguous().to(DEVICE)
    tau = temporal_density_triton(x.to(DEVICE), d_c, inv, **launch).cpu()
    assert tau.shape == x.shape[:3] and tau.dtype == torch.float32
    return tau


def quick_recurrence(clip, d_c):
    """`recurrence` for many tokens, by log-sum-exp in fp64."""
    T, N, _ = clip.shape
    a = -quick_distances(clip.flatten(0, 1)).reshape(T, N, T, N) / float(d_c)
    a[np.arange(T), :, np.arange(T)] = -np.inf
    a = a.reshape(T, N, T * N)
    if T == 1:
        return np.full((T, N), -np.inf)
    top = a.max(-1)
    return top + np.log(np.exp(a - top[..., None]).sum(-1))


def close(tau, x, d_c):
    """Distances are good to 1e-6, and the logarithm of a sum to 1e-5."""
    for b, clip in enumerate(x):
        c = np.float32(d_c if isinstance(d_c, float) else d_c[b])
        want = quick_recurrence(clip, c)
        np.testing.assert_allclose(tau[b].double().numpy(), want, rtol=2e-7, atol=1e-5 + 1e-6 / float(c))


def test_the_quick_recurrence_is_the_definition():
    for shape in [(3, 9, 16), (2, 1, 3), (1, 4, 3)]:
        for d_c in (1e-3, 0.3):
            x = unkind(*shape).double()
            np.testing.assert_allclose(quick_recurrence(x, d_c), recurrence(x, d_c), rtol=1e-13, atol=1e-14 / d_c)


# Whole blocks and ragged ones, of one frame, of parts of two, of many; one token a frame; the model's N and C.
@pytest.mark.parametrize("shape", [
    (3, 2, 1, 8), (2, 3, 16, 64), (3, 5, 7, 40), (1, 2, 50, 96), (1, 32, 3, 100), (1, 2, 64, 8), (1, 3, 129, 3),
    (1, 8, 25, 40), (1, 2, 196, 768), (2, 2, 17, 1), (1, 3, 3, 1536),
], ids=str)
@low
def test_the_kernel_is_the_definition_on_the_rounded_input(shape, dtype):
    x = unkind(*shape, seed=shape[2]).to(dtype)
    few = shape[1] * shape[2] > 200 and not CUDA
    for d_c in ([0.3] if dtype == torch.float32 else [1e-3]) if few else [0.3, 1e-3, 1e-6]:
        close(run(x, d_c), x, d_c)


# At 32 slots a group is one tile here; at fewer it is several, and the last group may be smaller than the others.
@pytest.mark.parametrize("slots", [1, 2, 3, 32])
@pytest.mark.parametrize("shape", [(1, 5, 24, 8), (1, 13, 8, 8), (1, 2, 16, 8)], ids=str)
def test_groups_of_tiles_are_added_up_whatever_their_number(slots, shape, monkeypatch):
    monkeypatch.setattr("kernels.temporal_density.SLOTS", slots)
    x = unkind(*shape, seed=slots)
    for d_c in (0.3, 1e-3) if slots == 2 else (0.3,) if slots == 3 else (1e-3,):
        close(run(x, d_c, BLOCK=16), x, d_c)


@pytest.mark.parametrize("slots", [2, 32])
def test_tiles_of_a_group_that_lie_within_a_frame_add_nothing(slots, monkeypatch):
    monkeypatch.setattr("kernels.temporal_density.SLOTS", slots)
    x = torch.eye(8)[torch.tensor([[0] * 60, [1] * 60])][None]                # equal within a frame, and 1 apart
    torch.testing.assert_close(run(x, 0.1, BLOCK=16), torch.full((1, 2, 60), math.log(60) - 10), rtol=1e-6, atol=0)
    torch.testing.assert_close(run(x, 0.01, BLOCK=16), torch.full((1, 2, 60), math.log(60) - 100), rtol=1e-6, atol=0)


def test_the_kernel_sums_alike_on_both_sides_of_the_switch():
    x = torch.randn(2, 3, 23, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1, 1] = -x[:, 0, 0]
    x[0, 2, 2] = x[0, 0, 0]
    x[1, :, :, 0] += 4
    x[1, 0, :4] = -4 * torch.eye(4)[0]                                          # nearly 2 from all others
    tau = []
    for d_c in (SWITCH * (1 - 1e-6), SWITCH * (1 + 1e-6), 0.0122, 0.0125, 0.0101):
        tau.append(run(x, d_c))
        close(tau[-1], x, d_c)
    torch.testing.assert_close(tau[0], tau[1], rtol=5e-6, atol=1e-5)
    assert tau[0].min() < -120


@pytest.mark.parametrize("d_c", [1e-6, 2e-4, 0.013, 0.1])
def test_in_the_kernel_a_bandwidth_whose_exponentials_all_underflow_keeps_the_values_and_their_order(d_c):
    g = torch.Generator().manual_seed(8)
    x = (torch.randint(0, 2, (1, 8, 64), generator=g) * 2.0 - 1).repeat(4, 1, 1)
    for s in range(4):
        for n in range(8):
            x[s, n, torch.randperm(64, generator=g)[:s + 2 + n % 3]] *= -1
    want = recurrence(x, np.float32(d_c))
    for tau in (run(x[None], d_c), run(x[None], d_c, BLOCK=16)):
        np.testing.assert_allclose(tau[0].double().numpy(), want, rtol=3e-7, atol=1e-5)
        by = np.argsort(want.ravel())
        told_apart = np.diff(want.ravel()[by]) > 8e-7 * abs(want).max() + 2e-5
        assert told_apart.sum() >= 8
        assert (np.diff(tau.double().numpy().ravel()[by])[told_apart] > 0).all()


def test_the_kernel_leaves_the_own_frame_out_and_counts_every_token_of_the_others():
    a, b, c, z = 0, 1, 2, 3
    place = torch.tensor([[a, a, a, b], [a, a, c, b], [a, c, c, b], [z, z, z, z]])
    count = [[3, 3, 3, 2], [4, 4, 2, 2], [5, 1, 1, 2], [0, 0, 0, 0]]
    for d_c in (0.02, 0.01):
        far = math.log(12) - 1 / d_c                                            # z's neighbours are its own frame's
        want = torch.tensor([[math.log(n) if n else far for n in row] for row in count])
        torch.testing.assert_close(run(torch.eye(4)[place][None], d_c)[0], want, rtol=1e-6, atol=1e-6)


def test_in_the_kernel_zero_vectors_constant_clips_and_single_frames():
    x = torch.zeros(1, 2, 3, 8)
    x[0, 0, 0, 0] = 1
    for d_c in (0.5, 0.01):
        torch.testing.assert_close(run(x, d_c), torch.full((1, 2, 3), math.log(3) - 1 / d_c))
        torch.testing.assert_close(run(torch.ones(2, 3, 5, 4), d_c), torch.full((2, 3, 5), math.log(10)))
        assert run(torch.ones(2, 1, 5, 4), d_c).equal(torch.full((2, 1, 5), -math.inf))


@low
def test_inverse_lengths_may_be_given(dtype):
    for shape in [(2, 3, 20, 24), (1, 2, 50, 3)]:
        x = unkind(*shape).to(dtype)
        inv = inverse_length_triton(x.to(DEVICE))
        square = x.double().square().sum(-1)
        torch.testing.assert_close(inv.cpu().double(), torch.where(square > 0, square.rsqrt(), 0), rtol=1e-6, atol=0)
        for d_c in (0.3, 1e-3):
            assert run(x, d_c, inv).equal(run(x, d_c))
    told = run(x, 1.0, 0 * inv)                                                # nothing has a direction, if so told
    torch.testing.assert_close(told, torch.full_like(told, math.log(50) - 1))


@pytest.mark.parametrize("C", [1, 3, 100, 1536])
@pytest.mark.parametrize("rows", [1, 83, 300])
def test_inverse_lengths_of_any_number_of_tokens(C, rows):
    x = unkind(rows, C, seed=rows)
    want = torch.where(x.any(-1), 1 / x.double().norm(dim=-1), 0)
    torch.testing.assert_close(inverse_length_triton(x.to(DEVICE)).cpu().double(), want, rtol=1e-6, atol=0)


@low
def test_each_clip_of_the_kernel_takes_its_own_bandwidth_and_nothing_from_the_others(dtype):
    x = unkind(4, 3, 11, 16, seed=10).to(dtype)
    d_c = torch.tensor([1e-3, 0.2, 1.0, 0.012])
    tau = run(x, d_c, BLOCK=16)
    close(tau, x, d_c)
    assert tau.equal(run(x, d_c, BLOCK=16)) and tau.flip(0).equal(run(x.flip(0), d_c.flip(0), BLOCK=16))
    for b in range(4):
        assert run(x[b:b + 1], d_c[b], BLOCK=16)[0].equal(tau[b])


def test_in_the_kernel_permuted_frames_and_tokens_give_permuted_densities():
    g = torch.Generator().manual_seed(11)
    x = torch.randn(1, 4, 19, 16, generator=g)
    t, n = torch.randperm(4, generator=g), torch.randperm(19, generator=g)
    for d_c in (0.1, 0.005):
        moved = run(x[:, t][:, :, n], d_c, BLOCK=16)
        torch.testing.assert_close(moved, run(x, d_c, BLOCK=16)[:, t][:, :, n], rtol=3e-7, atol=1e-5 + 1e-6 / d_c)


def test_the_kernel_takes_any_strides():
    for x in strided(2, 3, 10, 8):
        assert run(x, 0.1).equal(run(x.contiguous(), 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_in_the_kernel_a_NaN_spoils_its_own_clip_only(bad):
    x = unkind(3, 3, 9, 8, seed=12)
    for d_c in (0.1, 1e-3):
        want = run(x, d_c, BLOCK=16)
        spoilt = x.clone()
        spoilt[1, 1, 3, 2] = bad
        tau = run(spoilt, d_c, BLOCK=16)
        assert tau[::2].equal(want[::2]) and not tau.isnan().any()
        spoilt[1] = bad
        tau = run(spoilt, torch.tensor([d_c, math.nan, d_c]), BLOCK=16)
        assert tau[::2].equal(want[::2]) and not tau.isnan().any()


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    x = unkind(2, 3, 70, 40).to("cuda", dtype)
    assert temporal_density(x, 0.1).cpu().equal(run(x, 0.1))
    with pytest.raises(ValueError, match="d_c wants to be on cuda"):
        temporal_density(x, torch.ones(2))


@needs_cuda
@pytest.mark.parametrize("d_c", [0.3, 1e-3])
def test_on_a_gpu_a_clip_may_have_more_tiles_than_slots(d_c):
    x = unkind(1, 24, 196, 16).cuda()           # 74 tiles of 64: groups of 3, the last one of 2
    close(run(x, d_c), x, d_c)
    close(run(x.half(), d_c), x.half(), d_c)


@needs_cuda
def test_on_a_gpu_the_features_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (4 * N * C) + 3, 4, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    d_c = torch.full((len(x),), 0.3, device="cuda")
    assert temporal_density_triton(x, d_c)[-3:].equal(temporal_density_triton(x[-3:], d_c[-3:]))


@needs_cuda
def test_the_kernel_can_be_captured_in_a_cuda_graph():
    x = unkind(2, 3, 70, 40).cuda()
    assert captured(lambda: temporal_density(x, 0.1, check=False)).equal(temporal_density(x, 0.1))
