"""temporal_density against the logarithm of a sum of exponentials in 40 decimal digits, which cannot underflow."""

import math
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPES,
    captured,
    low,
    needs_cuda,
    quick_distances,
    recurrence,
    seeded,
    strided,
    unkind,
)

from kernels import tl, triton
from kernels.temporal_density import (
    group_pair,
    inverse_norm_triton,
    temporal_density,
    temporal_density_ref,
    temporal_density_triton,
)

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(2, 3, 16, 64), (1, 2, 1, 8), (1, 5, 7, 40), (2, 1, 9, 8)]


def changed_signs():
    """
    A clip (4, 8, 64) of vectors of signs; each frame holds the same 8 with some signs changed.

    Every distance is a multiple of 1/32, exact in fp32, and none is zero.
    """
    g = seeded(8)
    x = (torch.randint(0, 2, (1, 8, 64), generator=g) * 2.0 - 1).repeat(4, 1, 1)
    for s in range(4):
        for n in range(8):
            x[s, n, torch.randperm(64, generator=g)[:s + 2 + n % 3]] *= -1
    return x


def check_order(tau, expected, gap):
    """tau has the order of the expected values wherever two neighbours differ by more than the gap."""
    order = np.argsort(expected.ravel())
    distinct = np.diff(expected.ravel()[order]) > gap
    assert distinct.sum() >= 8
    assert (np.diff(tau.ravel()[order])[distinct] > 0).all()


def repeated_tokens(d_c):
    """
    A clip (1, 4, 4, 4) of axis-aligned tokens, and its tau (4, 4) for a small d_c.

    A token's tau is the logarithm of the number of equal tokens in the other frames; the last frame has none.
    """
    axes = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 1], [0, 2, 2, 1], [3, 3, 3, 3]])
    count = [[3, 3, 3, 2], [4, 4, 2, 2], [5, 1, 1, 2], [0, 0, 0, 0]]
    tau = [[math.log(n) if n else math.log(12) - 1 / d_c for n in row] for row in count]
    return torch.eye(4)[axes][None], torch.tensor(tau)


# ---------------------------------------------------------------------------------------------------------------------
# The reference

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_definition_on_the_rounded_input(shape, dtype):
    x, d_c = unkind(*shape).to(dtype), np.float32(0.1)
    tau = temporal_density(x, 0.1)
    assert tau.shape == shape[:3] and tau.dtype == torch.float32
    expected = np.stack([recurrence(clip, d_c) for clip in x])
    np.testing.assert_allclose(tau.double().numpy() * 0.1, expected * 0.1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("d_c", [1e-6, 1e-3, 0.02, 1.0, 50.0])
def test_reference_in_fp64_is_the_definition_to_fp64_at_any_bandwidth(d_c):
    x = unkind(1, 3, 9, 16).double()
    tau = temporal_density_ref(x, torch.tensor([d_c], dtype=torch.float64))
    np.testing.assert_allclose(tau[0].numpy(), recurrence(x[0], d_c), rtol=1e-14, atol=1e-14 / d_c)


@pytest.mark.parametrize("d_c", [1e-6, 2e-4, 0.1])
def test_exponentials_that_all_underflow_keep_values_and_order(d_c):
    x = changed_signs()
    tau, expected = temporal_density(x[None], d_c)[0].double().numpy(), recurrence(x, np.float32(d_c))
    if d_c < 0.1:
        assert np.exp(np.float32(expected.max())) == 0
    np.testing.assert_allclose(tau, expected, rtol=2e-7, atol=1e-6)
    check_order(tau, expected, 4e-7 * abs(expected).max())


def test_a_tokens_own_frame_is_left_out_and_all_tokens_of_the_others_count():
    x, expected = repeated_tokens(0.01)
    torch.testing.assert_close(temporal_density(x, 0.01)[0], expected, rtol=1e-6, atol=1e-6)


def test_zero_vectors_are_at_distance_1_from_everything():
    x = torch.zeros(1, 2, 3, 8)
    x[0, 0, 0, 0] = 1
    torch.testing.assert_close(temporal_density(x, 0.5), torch.full((1, 2, 3), math.log(3) - 2))


def test_a_single_frame_has_an_empty_sum():
    assert temporal_density(torch.randn(2, 1, 5, 8), 0.1).equal(torch.full((2, 1, 5), -math.inf))


def test_a_constant_clip_counts_the_tokens_of_the_other_frames():
    x = torch.randn(24, generator=seeded(9)).expand(2, 3, 5, 24)
    torch.testing.assert_close(temporal_density(x, 0.1), torch.full((2, 3, 5), math.log(10)), rtol=0, atol=1e-5)


def test_reference_clips_are_independent_and_have_their_own_bandwidths():
    x = torch.randn(3, 3, 7, 16, generator=seeded(10))
    d_c = [0.05, 0.2, 1.0]
    for dtype in (torch.float32, torch.float64):
        tau = temporal_density(x, torch.tensor(d_c, dtype=dtype))
        for b in range(3):
            torch.testing.assert_close(tau[b], temporal_density(x[b:b + 1], d_c[b])[0], rtol=0, atol=5e-5)
    assert temporal_density(x, 0.1).equal(temporal_density(x, 0.1))


@pytest.mark.parametrize("d_c", [0.1, 0.005])
@pytest.mark.parametrize("density", [temporal_density, lambda x, d_c: run(x, d_c, BLOCK=16)], ids=["public", "kernel"])
def test_permuted_frames_and_tokens_give_permuted_densities(density, d_c):
    g = seeded(11)
    x = torch.randn(1, 4, 19, 16, generator=g)
    t, n = torch.randperm(4, generator=g), torch.randperm(19, generator=g)
    permuted = density(x[:, t][:, :, n], d_c)
    torch.testing.assert_close(permuted, density(x, d_c)[:, t][:, :, n], rtol=3e-7, atol=1e-5 + 1e-6 / d_c)


def test_reference_takes_any_strides_and_has_no_gradient():
    x = torch.randn(16, 9, 4, 2, generator=seeded(12), requires_grad=True).permute(3, 2, 1, 0)
    tau = temporal_density(x, 0.1)
    torch.testing.assert_close(tau, temporal_density(x.contiguous(), 0.1), rtol=0, atol=2e-5)
    assert not tau.requires_grad


@pytest.mark.parametrize("x, d_c, message", [
    (torch.ones(2, 3, 4), 0.1, r"temporal_density.*\(B, T, N, C\).*\(2, 3, 4\)"),
    (torch.ones(2, 3, 4, 5), torch.ones(3), r"d_c.*\(2,\).*\(3,\)"),
    (torch.ones(2, 3, 4, 5), torch.tensor([0.1, -0.5]), r"d_c.*-0\.5"),
], ids=range(3))
def test_invalid_arguments_are_refused(x, d_c, message):
    with pytest.raises(ValueError, match=message):
        temporal_density(x, d_c)


def test_unchecked_a_nan_leaves_the_other_clips_of_the_reference_alone():
    x = torch.randn(3, 2, 5, 8, generator=seeded(0))
    expected = temporal_density(x, 0.1)
    x[1, 0, 0, 0] = math.nan
    assert temporal_density(x, 0.1, check=False)[::2].equal(expected[::2])


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

SWITCH = math.log2(math.e) / 104                # from this bandwidth on the kernel adds terms without a maximum


def run(x, d_c, inv_norm=None, **launch):
    """The kernel's tau, on the CPU. d_c: a number or one per clip."""
    d_c = torch.as_tensor(d_c, dtype=torch.float32).expand(len(x)).contiguous().to(DEVICE)
    tau = temporal_density_triton(x.to(DEVICE), d_c, inv_norm, **launch).cpu()
    assert tau.shape == x.shape[:3] and tau.dtype == torch.float32
    return tau


def quick_recurrence(clip, d_c):
    """`recurrence` for many tokens, by log-sum-exp in fp64."""
    T, N, _ = clip.shape
    if T == 1:
        return np.full((T, N), -np.inf)
    a = -quick_distances(clip.flatten(0, 1)).reshape(T, N, T, N) / float(d_c)
    a[np.arange(T), :, np.arange(T)] = -np.inf
    a = a.reshape(T, N, T * N)
    largest = a.max(-1)
    return largest + np.log(np.exp(a - largest[..., None]).sum(-1))


def check(tau, x, d_c):
    """Distances have an error of 1e-6, and the logarithm of a sum one of 1e-5."""
    for b, clip in enumerate(x):
        c = np.float32(d_c if isinstance(d_c, float) else d_c[b])
        expected = quick_recurrence(clip, c)
        np.testing.assert_allclose(tau[b].double().numpy(), expected, rtol=2e-7, atol=1e-5 + 1e-6 / float(c))


def test_the_quick_oracle_is_the_definition():
    for shape in [(3, 9, 16), (2, 1, 3), (1, 4, 3)]:
        for d_c in (1e-3, 0.3):
            x = unkind(*shape).double()
            np.testing.assert_allclose(quick_recurrence(x, d_c), recurrence(x, d_c), rtol=1e-13, atol=1e-14 / d_c)


# Whole tiles and ragged ones, of one frame, of parts of two, of many; one token per frame; the model's N and C.
@pytest.mark.parametrize("shape", [
    (3, 2, 1, 8), (2, 3, 16, 64), (3, 5, 7, 40), (1, 2, 50, 96), (1, 32, 3, 100), (1, 2, 64, 8), (1, 3, 129, 3),
    pytest.param((1, 2, 196, 768), marks=pytest.mark.gpu), (2, 2, 17, 1), (1, 3, 3, 1536),
], ids=str)
@low
def test_kernel_is_the_definition_on_the_rounded_input(shape, dtype):
    x = unkind(*shape, seed=shape[2]).to(dtype)
    if shape[1] * shape[2] > 200 and not CUDA:                                  # slow in the interpreter
        bandwidths = [0.3] if dtype == torch.float32 else [1e-3]
    else:
        bandwidths = [0.3, 1e-3, 1e-6]
    for d_c in bandwidths:
        check(run(x, d_c), x, d_c)


# With 32 groups each is one tile here; with fewer it is several, and the last group may be smaller than the others.
@pytest.mark.parametrize("groups, d_c", [(1, 1e-3), (2, 0.3), (2, 1e-3), (3, 0.3), (32, 1e-3)])
@pytest.mark.parametrize("shape", [(1, 5, 24, 8), (1, 13, 8, 8), (1, 2, 16, 8)], ids=str)
def test_any_number_of_groups_of_tiles_gives_the_sum(groups, d_c, shape, monkeypatch):
    monkeypatch.setattr("kernels.temporal_density.MAX_GROUPS", groups)
    x = unkind(*shape, seed=groups)
    check(run(x, d_c, BLOCK=16), x, d_c)


# 38 and 300 tokens per clip: one program and two of the kernel that adds partial sums.
@pytest.mark.parametrize("groups", [2, 3, 32])
@pytest.mark.parametrize("shape, block", [((4, 2, 19, 8), 16), ((4, 2, 150, 4), 64)], ids=str)
def test_clips_of_one_batch_may_be_on_both_sides_of_the_switch(shape, block, groups, monkeypatch):
    monkeypatch.setattr("kernels.temporal_density.MAX_GROUPS", groups)
    x, d_c = unkind(*shape, seed=groups), torch.tensor([SWITCH * (1 + 1e-6), 1e-3, 0.5, SWITCH * (1 - 1e-6)])
    tau = run(x, d_c, BLOCK=block)
    check(tau, x, d_c)
    for b in range(4):
        assert run(x[b:b + 1], d_c[b], BLOCK=block)[0].equal(tau[b])


@triton.jit
def group_pairs_kernel(pairs_ptr, G):
    """One program: a pair of groups -> pairs (programs, 2)."""
    gi, gj = group_pair(tl.program_id(0), G)
    tl.store(pairs_ptr + 2 * tl.program_id(0), gi)
    tl.store(pairs_ptr + 2 * tl.program_id(0) + 1, gj)


@pytest.mark.parametrize("G", [*range(1, 10), 13, 31, 32])
def test_every_pair_of_groups_has_one_program(G):
    pairs = torch.full((G * (G + 1) // 2, 2), -1, dtype=torch.int32, device=DEVICE)
    group_pairs_kernel[(len(pairs),)](pairs, G)
    assert sorted(map(tuple, pairs.tolist())) == list(combinations_with_replacement(range(G), 2))


def test_the_grids_hold_any_number_of_clips(monkeypatch):
    grids = {}

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids[self.name] = grid
            return lambda *args, **kwargs: None

    for name in ("temporal_density_kernel", "reduce_partials_kernel"):
        monkeypatch.setattr(f"kernels.temporal_density.{name}", Kernel(name))
    B = 70_000                                                  # the second and third axis end at 65535
    x, d_c, inv_norm = (torch.empty(*shape, device="meta") for shape in ((B, 3, 100, 8), (B,), (B, 3, 100)))
    temporal_density_triton(x, d_c, inv_norm, BLOCK=64)         # 300 tokens: 5 groups, and 2 times 256
    assert grids == {"temporal_density_kernel": (15 * B,), "reduce_partials_kernel": (2 * B,)}


@pytest.mark.parametrize("groups", [2, 32])
def test_tiles_within_one_frame_add_nothing(groups, monkeypatch):
    monkeypatch.setattr("kernels.temporal_density.MAX_GROUPS", groups)
    x = torch.eye(8)[torch.tensor([[0] * 60, [1] * 60])][None]                  # equal within a frame, otherwise 1
    for d_c in (0.1, 0.01):
        expected = torch.full((1, 2, 60), math.log(60) - 1 / d_c)
        torch.testing.assert_close(run(x, d_c, BLOCK=16), expected, rtol=1e-6, atol=0)


def test_kernel_sums_are_the_same_with_and_without_a_running_maximum():
    x = torch.randn(2, 3, 23, 4, generator=seeded(0))
    x[:, 1, 1] = -x[:, 0, 0]
    x[0, 2, 2] = x[0, 0, 0]
    x[1, :, :, 0] += 4
    x[1, 0, :4] = -4 * torch.eye(4)[0]                                          # nearly 2 from all others
    tau = []
    for d_c in (SWITCH * (1 - 1e-6), SWITCH * (1 + 1e-6), 0.0137, 0.0141, 0.0112, 0.0101):
        tau.append(run(x, d_c))
        check(tau[-1], x, d_c)
    torch.testing.assert_close(tau[0], tau[1], rtol=5e-6, atol=1e-5)
    assert tau[0].min() < -120


@pytest.mark.parametrize("d_c", [0.01203, SWITCH * (1 - 1e-6), SWITCH * (1 + 1e-6)])     # 0.01203: 300 2^s is 2^128
@pytest.mark.gpu
def test_kernel_sums_of_many_equal_tokens_do_not_overflow(d_c):
    tau = run(torch.ones(1, 2, 300, 1), d_c)
    torch.testing.assert_close(tau, torch.full_like(tau, math.log(300)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("d_c", [1e-6, 2e-4, 0.013, 0.1])
def test_kernel_exponentials_that_all_underflow_keep_values_and_order(d_c):
    x = changed_signs()
    expected = recurrence(x, np.float32(d_c))
    for tau in (run(x[None], d_c), run(x[None], d_c, BLOCK=16)):
        tau = tau[0].double().numpy()
        np.testing.assert_allclose(tau, expected, rtol=3e-7, atol=1e-5)
        check_order(tau, expected, 8e-7 * abs(expected).max() + 2e-5)


@pytest.mark.parametrize("d_c", [0.02, 0.0228, SWITCH * (1 + 1e-6), 0.01])
@pytest.mark.gpu
def test_kernel_leaves_a_tokens_own_frame_out_and_counts_all_other_tokens(d_c):
    x, expected = repeated_tokens(d_c)
    torch.testing.assert_close(run(x, d_c)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d_c", [0.5, 0.01])
def test_in_the_kernel_zero_vectors_constant_clips_and_single_frames(d_c):
    x = torch.zeros(1, 2, 3, 8)
    x[0, 0, 0, 0] = 1
    torch.testing.assert_close(run(x, d_c), torch.full((1, 2, 3), math.log(3) - 1 / d_c))
    torch.testing.assert_close(run(torch.ones(2, 3, 5, 4), d_c), torch.full((2, 3, 5), math.log(10)))
    assert run(torch.ones(2, 1, 5, 4), d_c).equal(torch.full((2, 1, 5), -math.inf))


@low
def test_kernel_takes_known_inverse_norms(dtype):
    for shape in [(2, 3, 20, 24), (1, 2, 50, 3)]:
        x = unkind(*shape).to(dtype)
        inv_norm = inverse_norm_triton(x.to(DEVICE))
        for d_c in (0.3, 1e-3):
            assert run(x, d_c, inv_norm).equal(run(x, d_c))
    tau = run(x, 1.0, 0 * inv_norm)                                            # as if all vectors were zero
    torch.testing.assert_close(tau, torch.full_like(tau, math.log(50) - 1))


@pytest.mark.parametrize("shape", [(1, 1536), (83, 3), (300, 1), (300, 100), (2, 3, 20, 24)], ids=str)
@low
def test_inverse_norms_of_any_number_of_tokens(shape, dtype):
    x = unkind(*shape, seed=shape[0]).to(dtype)
    expected = torch.where(x.any(-1), 1 / x.double().norm(dim=-1), 0)
    torch.testing.assert_close(inverse_norm_triton(x.to(DEVICE)).cpu().double(), expected, rtol=1e-6, atol=0)


@low
def test_kernel_clips_are_independent_and_have_their_own_bandwidths(dtype):
    x = unkind(4, 3, 11, 16, seed=10).to(dtype)
    d_c = torch.tensor([1e-3, 0.2, 1.0, 0.012])
    tau = run(x, d_c, BLOCK=16)
    check(tau, x, d_c)
    assert tau.equal(run(x, d_c, BLOCK=16)) and tau.flip(0).equal(run(x.flip(0), d_c.flip(0), BLOCK=16))
    for b in range(4):
        assert run(x[b:b + 1], d_c[b], BLOCK=16)[0].equal(tau[b])


def test_kernel_takes_any_strides():
    for x in strided(2, 3, 10, 8):
        assert run(x, 0.1).equal(run(x.contiguous(), 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.gpu
def test_kernel_lets_a_nan_affect_its_own_clip_only(bad):
    x = unkind(3, 3, 9, 8, seed=12)
    for d_c in (0.1, 1e-3):
        expected = run(x, d_c, BLOCK=16)
        spoilt = x.clone()
        spoilt[1, 1, 3, 2] = bad
        tau = run(spoilt, d_c, BLOCK=16)
        assert tau[::2].equal(expected[::2]) and not tau.isnan().any()
        assert tau.max() <= math.log(18) + 1e-5                 # as if a NaN were at distance 0 from 18 tokens
        spoilt[1] = bad
        tau = run(spoilt, torch.tensor([d_c, math.nan, d_c]), BLOCK=16)
        assert tau[::2].equal(expected[::2]) and not tau.isnan().any()


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.gpu
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    x = unkind(2, 3, 70, 40).to("cuda", dtype)
    assert temporal_density(x, 0.1).cpu().equal(run(x, 0.1))
    with pytest.raises(ValueError, match="d_c.*cuda.*cpu"):
        temporal_density(x, torch.ones(2))


@needs_cuda
@pytest.mark.parametrize("d_c", [0.3, 1e-3])
@pytest.mark.gpu
def test_on_a_gpu_a_clip_may_have_more_tiles_than_groups(d_c):
    x = unkind(3, 24, 196, 16).cuda()           # 74 tiles of 64: groups of 3, the last one of 2
    check(run(x, d_c), x, d_c)
    check(run(x.half(), d_c), x.half(), d_c)


@needs_cuda
def test_features_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (4 * N * C) + 3, 4, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    d_c = torch.full((len(x),), 0.3, device="cuda")
    assert temporal_density_triton(x, d_c)[-3:].equal(temporal_density_triton(x[-3:], d_c[-3:]))


@needs_cuda
def test_kernel_can_be_captured_in_a_cuda_graph():
    x = unkind(2, 3, 70, 40).cuda()
    assert captured(lambda: temporal_density(x, 0.1, check=False)).equal(temporal_density(x, 0.1))
