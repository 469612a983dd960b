"""keep_count, cluster_stm against the definition of its three steps, token_sizes, MaskConfig, register_mask."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers.kernels import DEVICE, DTYPES, Peaks, across, needs_cuda, recurrence, seeded, unkind, within
from helpers.masks import DRAWS, STOCHASTIC, assert_contract, assert_odds, mask_inputs

import masking
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from kernels.temporal_density import temporal_density
from masking import (
    CLIP_BUDGET,
    MASK_INPUTS,
    MASKS,
    MaskConfig,
    cluster_stm,
    gumbel_noise,
    keep_count,
    register_mask,
    select_tokens_ref,
    select_tokens_triton,
    token_sizes,
    topk_stable,
)

PICKS = ["density", "centre", "lowest"]                                         # without the random one


# keep_count.

def test_keep_count_rounds_half_up_and_is_at_least_1():
    for N in (1, 2, 7, 10, 49, 50, 100, 196, 300):
        for thousandths in range(0, 1000, 1 if N in (50, 196) else 10):
            expected = max(1, (2 * N * (1000 - thousandths) + 1000) // 2000)
            assert keep_count(N, thousandths / 1000) == expected, (N, thousandths)


@pytest.mark.parametrize("N, ratio, expected", [
    (196, 0.85, 29), (196, 0.9, 20), (196, 0.8, 39), (196, 0.75, 49), (10, 0.85, 2), (10, 0.95, 1), (50, 0.99, 1),
    (30, 0.15, 26), (5, 0.9, 1), (1, 0.999, 1), (7, 0, 7), (7, 0.0, 7), (1000000, 0.999999, 1), (3000, 1e-3, 2997),
    (2000000, 2.5e-7, 2000000), (2000000, 7.5e-7, 1999999),
])
def test_keep_count_reads_the_ratio_as_a_decimal(N, ratio, expected):
    assert keep_count(N, ratio) == expected
    assert type(keep_count(N, ratio)) is int


@pytest.mark.parametrize("ratio", [1, 1.0, 1.5, -0.1, math.nan, math.inf])
def test_keep_count_refuses_a_ratio_outside_0_to_1(ratio):
    with pytest.raises(ValueError, match=rf"mask ratio .*\[0, 1\), got {ratio}"):
        keep_count(196, ratio)


@pytest.mark.parametrize("ratio", [0, 0.15, 0.5, 0.85, 0.999])
def test_each_frame_keeps_exactly_keep_count_tokens(ratio):
    for N in (*range(1, 14), 30, 49, 100):
        K, tokens = keep_count(N, ratio), torch.randn(1, 2, N, 6, generator=seeded(N))
        assert_contract(cluster_stm(tokens, K), 1, 2, N, K)
        assert_contract(MASKS["umt"](tokens, K, generator=seeded(0), **mask_inputs(1, 2, N)), 1, 2, N, K)


# cluster_stm.

def clip_oracle(clip, d_c, density):
    """clip (T, N, C) -> a function of K, assign and pick that returns the kept ids, from the oracles of the kernels."""
    T, N, _ = clip.shape
    frames = [Peaks(frame, d_c, density) for frame in clip]
    tau = recurrence(clip, d_c) if T > 1 else np.array([[float(r) for r in frames[0].rho]])

    def select(K, assign, pick):
        for t, peaks in enumerate(frames):
            labels, centres, _ = peaks.cluster(K, assign)
            for k in range(K):
                members = [i for i in range(N) if labels[i] == k]
                best = min if pick == "lowest" else max                         # the first of equals
                yield t * N + (centres[k] if pick == "centre" else best(members, key=lambda i, t=t: tau[t, i]))

    return lambda *options: sorted(select(*options))


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("density", ["exp", "gauss"])
def test_cluster_stm_is_its_three_steps(T, density):
    x = torch.randn(2, T, 21, 24, generator=seeded(T)).double()
    oracles = [clip_oracle(clip, 0.25, density) for clip in x]
    for K, assign, pick in product((1, 4, 20, 21), ("nearest", "parent"), PICKS):
        expected = [oracle(K, assign, pick) for oracle in oracles]
        options = {"d_c": 0.25, "d_c_time": 0.25, "density": density, "assign": assign, "pick": pick}
        assert cluster_stm(x, K, **options).tolist() == expected
        # In fp32 as well: no decision in these clips is closer than its rounding errors.
        assert cluster_stm(x.float(), K, **options).tolist() == expected


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_cluster_stm_breaks_every_tie_toward_the_lower_index(T, seed):
    # Axis-aligned tokens. At this bandwidth densities are exact counts of equal tokens.
    x = torch.eye(8)[torch.randint(0, 6, (2, T, 17), generator=seeded(seed))]
    oracles = [clip_oracle(clip, np.float32(0.02), "exp") for clip in x]
    for K, assign, pick in product((1, 3, 6, 9, 17), ("nearest", "parent"), PICKS):
        expected = [oracle(K, assign, pick) for oracle in oracles]
        assert cluster_stm(x, K, d_c=0.02, d_c_time=0.02, assign=assign, pick=pick).tolist() == expected


def test_default_bandwidths_are_the_95_and_10_percent_quantiles():
    g = seeded(5)
    x = torch.randn(2, 3, 25, 24, generator=g) + torch.randn(2, 3, 1, 24, generator=g)      # frames differ in a clip
    d_c = torch.tensor([within(frame, "0.95") for frame in x.flatten(0, 1)])
    d_c_time = torch.tensor([across(clip, "0.1") for clip in x])
    expected = cluster_stm(x, 6)
    assert expected.equal(cluster_stm(x, 6, d_c=d_c, d_c_time=d_c_time))
    assert expected.equal(cluster_stm(x, 6, d_c=d_c)) and expected.equal(cluster_stm(x, 6, d_c_time=d_c_time))
    assert cluster_stm(x, 6, quantile=0.5, quantile_time=0.9).equal(cluster_stm(
        x, 6, d_c=[within(frame, "0.5") for frame in x.flatten(0, 1)], d_c_time=[across(clip, "0.9") for clip in x]))
    # Other bandwidths give other ids in these clips, also the quantile over all pairs of a clip.
    assert not cluster_stm(x, 6, quantile=0.9).equal(expected)
    assert not cluster_stm(x, 6, quantile_time=0.02).equal(expected)
    assert not cluster_stm(x, 6, d_c_time=[within(clip, "0.1") for clip in x.flatten(1, 2)]).equal(expected)
    image = x[:, :1]
    assert cluster_stm(image, 6).equal(cluster_stm(image, 6, d_c=d_c[[0, 3]], d_c_time=math.pi))


def test_the_method_is_the_default():
    x = torch.randn(2, 3, 25, 24, generator=seeded(4))
    expected = cluster_stm(x, 6, density="exp", assign="nearest", pick="density")
    assert cluster_stm(x, 6).equal(expected) and MASKS["cluster_stm"](x, 6).equal(expected)
    for change in ({"density": "gauss"}, {"assign": "parent"}, {"pick": "centre"}, {"pick": "lowest"}):
        assert not cluster_stm(x, 6, d_c=0.3, **change).equal(cluster_stm(x, 6, d_c=0.3))


@pytest.mark.parametrize("shape", [(2, 4, 49, 40), (2, 1, 49, 40), (1, 2, 196, 64), (3, 3, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_cluster_keeps_its_token_of_largest_temporal_density(shape, dtype):
    B, T, N, _ = shape
    x = unkind(*shape).to(dtype)
    frames = x.flatten(0, 1)
    # The same bandwidths for both: a different rounding could change the order of nearly equal scores.
    d_c, d_c_time = bandwidth(frames, 0.02), bandwidth(x, 0.1)
    for K, assign in product(sorted({1, max(1, N // 7), N}), ("nearest", "parent")):
        labels, centres, rho = density_peaks(frames, K, d_c, assign=assign)
        score = temporal_density(x, d_c_time).view(B * T, N) if T > 1 else rho.log()
        for pick in PICKS + ["random"]:
            ids = cluster_stm(x, K, d_c=d_c, d_c_time=d_c_time, assign=assign, pick=pick, generator=seeded(0))
            index = (ids % N).view(B * T, K)
            assert labels.gather(1, index).sort(1).values.equal(torch.arange(K).expand(B * T, K))
            if pick in ("density", "lowest"):
                best = score.new_zeros(B * T, K).scatter_reduce(
                    1, labels, score, "amin" if pick == "lowest" else "amax", include_self=False)
                assert score.gather(1, index).equal(best.gather(1, labels.gather(1, index)))
            elif pick == "centre":
                assert index.equal(centres)


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("assign", ["nearest", "parent"])
def test_a_static_clip_keeps_the_same_positions_in_all_frames(pick, assign):
    static = torch.randn(2, 1, 49, 40, generator=seeded(5)).expand(2, 4, 49, 40)
    duplicates = torch.eye(8)[torch.randint(0, 8, (2, 1, 49), generator=seeded(6))].expand(2, 4, 49, 8)
    for clip in (static, duplicates, torch.ones(2, 4, 49, 8)):
        for K in (1, 7, 30, 49):
            index = (cluster_stm(clip, K, pick=pick, assign=assign) % 49).view(2, 4, K)
            assert index.equal(index[:, :1].expand(2, 4, K))


def test_a_constant_clip_keeps_its_first_tokens():
    for pick, T in product(PICKS, (1, 3)):
        ids = cluster_stm(torch.ones(2, T, 9, 4), 4, pick=pick)
        assert ids.tolist() == [[t * 9 + n for t in range(T) for n in range(4)]] * 2


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("pick", PICKS)
def test_cluster_stm_of_a_clip_does_not_depend_on_its_batch(T, pick):
    base = torch.randn(12, 48, generator=seeded(7))
    clips = [torch.randn(T, 49, 48, generator=seeded(8)), 1e-6 + torch.ones(T, 49, 48), unkind(T, 49, 48, seed=9),
             base[torch.randint(0, 12, (49,), generator=seeded(10))].expand(T, 49, 48),     # static, with duplicates
             torch.eye(48)[torch.randint(0, 9, (T, 49), generator=seeded(11))]]
    for density, assign in (("exp", "nearest"), ("exp", "parent"), ("gauss", "nearest")):
        options = {"density": density, "assign": assign, "pick": pick}
        alone = [cluster_stm(clip[None], 7, **options)[0] for clip in clips]
        for order in ((2, 3, 0), (4, 4, 1), (0, 0, 0), (4, 3, 2, 1, 0)):
            together = cluster_stm(torch.stack([clips[i] for i in order]), 7, **options)
            for ids, i in zip(together, order, strict=True):
                assert ids.equal(alone[i]), (order, i)


def test_each_clip_of_a_batch_uses_its_own_bandwidths():
    x, d_c = torch.randn(2, 3, 25, 24, generator=seeded(12)), torch.tensor([0.05, 0.2, 0.4, 0.1, 0.3, 0.6])
    d_c_time = torch.tensor([0.05, 0.7])
    together = cluster_stm(x, 5, d_c=d_c, d_c_time=d_c_time)
    for b in range(2):
        alone = cluster_stm(x[b:b + 1], 5, d_c=d_c[3 * b:3 * b + 3], d_c_time=d_c_time[b].item())
        assert alone[0].equal(together[b])


def test_permuted_positions_and_frames_give_permuted_masks():
    x, g = torch.randn(2, 4, 49, 32, generator=seeded(13)).double(), seeded(14)
    n, t = torch.randperm(49, generator=g), torch.randperm(4, generator=g)
    for pick in PICKS:
        visible, permuted = torch.zeros(2, 4 * 49), torch.zeros(2, 4 * 49)
        visible.scatter_(1, cluster_stm(x, 7, d_c=0.3, d_c_time=0.3, pick=pick), 1)
        permuted.scatter_(1, cluster_stm(x[:, t][:, :, n], 7, d_c=0.3, d_c_time=0.3, pick=pick), 1)
        assert permuted.view(2, 4, 49).equal(visible.view(2, 4, 49)[:, t][:, :, n])


def test_a_token_that_recurs_is_kept_before_one_that_does_not():
    # In both frames tokens 0 to 3 are one cluster; token 2 of the first is exactly token 3 of the second.
    g, region = seeded(15), torch.randn(2, 64, generator=seeded(16))
    x = region[[0, 0, 0, 0, 1, 1, 1, 1]] + 0.3 * torch.randn(2, 8, 64, generator=g)
    x[1, 3] = x[0, 2]
    ids = cluster_stm(x[None], 2, d_c=0.3, d_c_time=0.01)[0].tolist()
    assert 2 in ids and 8 + 3 in ids


def test_pick_random_gives_every_token_of_a_cluster_the_same_odds():
    x = torch.eye(4)[torch.tensor([0, 1, 0, 1, 0, 1, 1])].expand(DRAWS, 1, 7, 4)
    ids = cluster_stm(x, 2, d_c=0.1, pick="random", generator=seeded(25))
    assert_odds(ids, [1 / 3, 1 / 4, 1 / 3, 1 / 4, 1 / 3, 1 / 4, 1 / 4], 7)
    same = cluster_stm(x, 2, d_c=0.1, pick="random", generator=seeded(25))
    assert ids.equal(same) and not ids.equal(cluster_stm(x, 2, d_c=0.1, pick="random", generator=seeded(26)))


@pytest.mark.parametrize("options, message", [
    ({"pick": "best"}, "pick must be one of density, random, centre, lowest, got 'best'"),
    ({"pick": "random"}, "generator .*got None"),
    ({"density": "cutoff"}, "density .*'cutoff'"),
    ({"assign": "none"}, "assign .*'none'"),
    ({"quantile": 0.0}, r"quantile .*\(0, 1\], got 0.0"),
    ({"quantile_time": 1.5}, r"quantile_time .*\(0, 1\], got 1.5"),
    ({"d_c": 0.0}, "d_c .*got 0"),
    ({"d_c": torch.ones(2)}, r"d_c .*\(6,\), got \(2,\)"),
    ({"d_c_time": torch.ones(6)}, r"\(2,\), got \(6,\)"),
    ({"d_c_time": -1.0}, "d_c.* got -1"),
], ids=str)
def test_cluster_stm_refuses_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        cluster_stm(torch.ones(2, 3, 9, 4), 3, **options)


def test_unchecked_calls_still_refuse_wrong_shapes():
    for x, keep, message in [(torch.ones(2, 9, 4), 3, r"\(B, T, N, C\), got \(2, 9, 4\)"),
                             (torch.ones(1, 2, 9, 4), 10, "keep .*1 to 9.* got 10"),
                             (torch.ones(1, 2, 9, 4).long(), 3, "int64")]:
        with pytest.raises(ValueError, match=message):
            cluster_stm(x, keep, check=False)


# cluster_stm in the Triton kernels: in the interpreter, or on a GPU if there is one.

def run_kernels(x, K, d_c=None, d_c_time=None, density="exp", assign="nearest", pick="density", noise=None):
    B, T = x.shape[:2]
    d_c = None if d_c is None else torch.full((B * T,), d_c, device=DEVICE)
    d_c_time = None if d_c_time is None else torch.full((B,), d_c_time, device=DEVICE)
    noise = None if noise is None else noise.to(DEVICE)
    return select_tokens_triton(x.to(DEVICE), K, d_c, d_c_time, 0.02, 0.1, density, assign, pick, noise).cpu()


@pytest.mark.parametrize("T, density, low", [(1, "exp", False), (2, "gauss", False), (4, "exp", True)])
def test_kernels_are_the_three_steps(T, density, low):
    x = torch.randn(2, T, 21, 24, generator=seeded(T)).to(torch.float16 if low else torch.float32)
    oracles = [clip_oracle(clip.double(), 0.25, density) for clip in x]
    for assign, pick in product(("nearest", "parent"), PICKS):
        expected = [oracle(4, assign, pick) for oracle in oracles]
        ids = run_kernels(x, 4, 0.25, 0.25, density=density, assign=assign, pick=pick)
        assert ids.tolist() == expected


@pytest.mark.parametrize("T", [1, 3])
def test_kernels_break_every_tie_toward_the_lower_index(T):
    x = torch.eye(8)[torch.randint(0, 6, (2, T, 17), generator=seeded(T))]
    oracles = [clip_oracle(clip, np.float32(0.02), "exp") for clip in x]
    for K, assign, pick in product((3, 6, 17), ("nearest", "parent"), PICKS[:2]):
        expected = [oracle(K, assign, pick) for oracle in oracles]
        assert run_kernels(x, K, 0.02, 0.02, assign=assign, pick=pick).tolist() == expected


@pytest.mark.parametrize("shape", [(1, 8, 49, 64), (2, 3, 64, 40), (1, 2, 196, 768), (3, 1, 50, 32), (1, 5, 129, 24)],
                         ids=str)
def test_kernels_nearly_keep_what_exact_quantiles_keep(shape):
    B, T, N, C = shape
    K = keep_count(N, 0.85)
    x = (torch.randn(B, T, 8, C, generator=seeded(1)).repeat_interleave(N // 8 + 1, 2)[:, :, :N]
         + 0.7 * torch.randn(shape, generator=seeded(2))).half()
    ids = run_kernels(x, K)
    assert_contract(ids, B, T, N, K)
    expected = select_tokens_ref(x.double(), K, None, None, 0.02, 0.1, "exp", "nearest", "density", None)
    visible, expected = (torch.zeros(B, T * N).scatter(1, i, 1) for i in (ids, expected))
    assert (visible == expected).double().mean() > 0.98


def test_kernels_keep_the_same_tokens_in_every_run():
    x = torch.randn(2, 3, 40, 16, generator=seeded(3))
    assert run_kernels(x, 6).equal(run_kernels(x, 6))


def test_kernels_pick_at_random_by_the_noise():
    x, noise = torch.randn(2, 3, 20, 16, generator=seeded(5)), torch.rand(2, 3, 20, generator=seeded(6))
    expected = cluster_stm(x, 6, d_c=0.3, pick="random", generator=seeded(6))
    assert run_kernels(x, 6, d_c=0.3, pick="random", noise=noise).equal(expected)


def test_kernels_confine_an_unchecked_nan_to_its_clip():
    x = torch.randn(5, 2, 20, 16, generator=seeded(7))
    expected = run_kernels(x, 6)
    for b, value in ((1, math.nan), (2, math.inf), (3, -math.inf)):
        x[b, 0, 3, 5] = x[b, 1, 7] = value
    ids = run_kernels(x, 6)
    assert_contract(ids, 5, 2, 20, 6)
    assert ids[[0, 4]].equal(expected[[0, 4]])


@pytest.mark.gpu
def test_torch_compile_sees_one_operation():
    x = torch.randn(2, 3, 16, 8, generator=seeded(8)).to(DEVICE)
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"                    # without a C++ compiler on a CPU
    for bandwidths in ({}, {"d_c": 0.3, "d_c_time": 0.2}):
        step = lambda x, bandwidths=bandwidths: cluster_stm(x * 2, 5, check=False, **bandwidths) + 1
        assert torch.compile(step, fullgraph=True, backend=backend)(x).equal(step(x))
    options = (5, None, None, 0.02, 0.1, "exp", "nearest", "density", None)
    torch.library.opcheck(torch.ops.clusterstm.keep.default, (x, *options))


@needs_cuda
@pytest.mark.gpu
def test_a_cuda_graph_captures_cluster_stm_without_host_synchronisation():
    x = torch.randn(4, 8, 196, 768, device="cuda", dtype=torch.bfloat16)
    expected = cluster_stm(x, 29)                           # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = cluster_stm(x, 29, check=False)
        cluster_stm(x, 29, d_c=0.3, d_c_time=0.3, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids.equal(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = cluster_stm(x, 29, check=False)
    other = torch.randn_like(x)
    expected = cluster_stm(other, 29)
    x.copy_(other)
    graph.replay()
    assert ids.equal(expected)


@needs_cuda
@pytest.mark.gpu
def test_gpu_memory_does_not_grow_with_the_square_of_the_tokens():
    cluster_stm(torch.randn(4, 8, 196, 768, device="cuda").bfloat16(), 29)
    peak = []
    for B in (128, 256):
        x = torch.randn(B, 8, 196, 768, device="cuda", dtype=torch.bfloat16)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cluster_stm(x, 29, check=False)
        peak.append(torch.cuda.max_memory_allocated() - before)
        del x
    assert peak[1] - peak[0] < 128 * 8 * 196 * 400          # bytes per token: 13 x 2 slots of 4, and some more


@needs_cuda
@pytest.mark.gpu
def test_values_that_a_gpu_cannot_use_are_refused():
    x = torch.randn(1, 2, 20, 16, device="cuda")
    x[0, 0, 3, 5] = math.nan
    with pytest.raises(ValueError, match="1 NaN or infinite of 640"):
        cluster_stm(x, 6)
    for value, message in ((x.double(), "float32, float16 or bfloat16"), (x.nan_to_num() * 1e20, "1e-12 to 1e12"),
                           (torch.zeros(1, 2, 1025, 8, device="cuda"), "1 to 1024 tokens")):
        with pytest.raises(ValueError, match=message):
            cluster_stm(value.nan_to_num(), 6)
    with pytest.raises(ValueError, match="d_c .*cuda"):
        cluster_stm(x.nan_to_num(), 6, d_c=torch.ones(2))


# Random numbers.

def test_gumbel_noise_is_a_function_of_uniform_numbers():
    u = torch.rand(3, 50, generator=seeded(9)).double()
    expected = -(-u.clamp(1e-7, 1 - 1e-7).log()).log()
    torch.testing.assert_close(gumbel_noise((3, 50), seeded(9)).double(), expected, rtol=1e-5, atol=1e-5)
    assert gumbel_noise((3, 50), seeded(9)).equal(gumbel_noise((3, 50), seeded(9), torch.device("cpu")))


# token_sizes.

def count_by_hand(tokens, visible_ids):
    """token_sizes, one token at a time."""
    (T, N), sizes = tokens.shape[1:3], torch.zeros(visible_ids.shape)
    for b, ids in enumerate(visible_ids.tolist()):
        x = [v / (v.norm() or 1) for v in tokens[b].double().flatten(0, 1)]
        for i in range(T * N):
            slots = [s for s, k in enumerate(ids) if k // N == i // N]
            if slots:
                sizes[b, ids.index(i) if i in ids else max(slots, key=lambda s: x[i] @ x[ids[s]])] += 1
    return sizes


def signs(*shape, seed=0):
    """Each token one of six or zero, of a length that is a power of two: cosines are exact, and most are ties."""
    kinds = torch.randint(2, (6, 16), generator=seeded(seed)) * 2.0 - 1
    kinds = torch.cat([kinds * 2.0 ** torch.arange(-3, 3)[:, None], torch.zeros(1, 16)])
    return kinds[torch.randint(7, shape[:3], generator=seeded(seed + 1))]


@pytest.mark.parametrize("make", [unkind, signs])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (3, 4, 1, 16), (2, 1, 20, 16), (2, 5, 33, 16)], ids=str)
def test_a_masked_token_counts_for_the_most_similar_visible_one(make, shape):
    """Random ids of the clip are visible, so many, few or none of a frame; in the first clip, the first ids."""
    (B, T, N, _), x = shape, make(*shape, seed=5)
    for share in (0.0, 0.1, 0.4, 1.0):
        ids = torch.rand(B, T * N, generator=seeded(6)).argsort(1)[:, :max(1, round(share * T * N))].sort(1).values
        ids[0] = torch.arange(ids.shape[1])
        sizes = token_sizes(x, ids)
        assert sizes.dtype == torch.float32 and sizes.equal(count_by_hand(x, ids))
        assert sizes.min() >= 1 and (share < 1 or (sizes == 1).all())
        per_frame = torch.zeros(B, T).scatter_add(1, ids // N, sizes)
        assert per_frame.equal(N * (torch.zeros(B, T).scatter_add(1, ids // N, torch.ones_like(sizes)) > 0))
        low = x.bfloat16()
        assert token_sizes(low, ids).equal(token_sizes(low.float(), ids))


def test_token_sizes_of_equal_frames_are_counted_per_frame():
    x, ids = torch.randn(1, 1, 6, 4, generator=seeded(7)).expand(1, 3, 6, 4), torch.tensor([[0, 5, 7, 8, 9]])
    assert token_sizes(x, ids)[0, :2].sum() == token_sizes(x, ids)[0, 2:].sum() == 6


# MaskConfig and register_mask.

def test_the_config_calls_its_mask_with_its_options():
    x, inputs = torch.randn(2, 3, 20, 16, generator=seeded(27)), mask_inputs(2, 3, 20)
    options = {"quantile": 0.3, "quantile_time": 0.5, "density": "gauss", "assign": "parent", "pick": "lowest"}
    assert MaskConfig()(x, 5, **inputs).equal(cluster_stm(x, 5))
    for field, value in options.items():
        assert MaskConfig(**{field: value})(x, 5).equal(cluster_stm(x, 5, **{field: value})), field
    assert MaskConfig(**options)(x, 5).equal(cluster_stm(x, 5, **options))
    for name in STOCHASTIC:
        ids = MaskConfig(name=name, pick="lowest")(x, 5, generator=seeded(0), **inputs)
        assert ids.equal(MASKS[name](x, 5, generator=seeded(0), **inputs))


def test_the_config_knows_stochastic_masks_and_those_of_shapes_only():
    x, inputs = torch.randn(2, 6, 20, 16, generator=seeded(28)), mask_inputs(2, 6, 20)
    flipped = {k: v.flip(2) if k in ("attention", "logits", "aligned") else v for k, v in inputs.items()}
    configs = [MaskConfig(name=name) for name in MASKS] + [MaskConfig(pick=pick) for pick in PICKS + ["random"]]
    for config in configs:
        first, second = (config(x, 4, generator=seeded(s), **inputs) for s in (0, 1))
        assert config.stochastic == (not first.equal(second)), config
        assert config.shape_only == config(x.flip(2), 4, generator=seeded(0), **flipped).equal(first), config


@pytest.mark.parametrize("field, value, message", [
    ("name", "block", "one of cluster_stm, random, .*, got 'block'"), ("ratio", 1.0, r"\[0, 1\), got 1.0"),
    ("image_ratio", -0.5, r"\[0, 1\), got -0.5"), ("quantile", 0.0, r"\(0, 1\], got 0.0"),
    ("quantile_time", 1.5, r"\(0, 1\], got 1.5"), ("density", "box", "exp, gauss, got 'box'"),
    ("assign", "all", "nearest, parent, got 'all'"), ("pick", "best", "random, .*got 'best'"),
])
def test_the_config_refuses_impossible_values(field, value, message):
    with pytest.raises(ValueError, match=rf"mask\.{field} .*{message}"):
        MaskConfig(**{field: value})


def test_register_mask_adds_a_function_to_the_registry(monkeypatch):
    for name, registry in (("MASKS", MASKS), ("MASK_INPUTS", MASK_INPUTS), ("CLIP_BUDGET", CLIP_BUDGET)):
        monkeypatch.setattr(masking, name, registry.copy())

    @register_mask("tokens")                                                    # README.md's example
    def far_from_the_mean(x, K):
        """The K tokens of each frame farthest from the frame's mean."""
        return topk_stable((x - x.mean(2, keepdim=True)).norm(dim=-1), K)

    @register_mask("logits", clip_budget=True)
    def logits_high(x, S, *, logits):
        return topk_stable(logits.flatten(1), S)

    x, inputs = torch.randn(2, 3, 9, 4, generator=seeded(29)), mask_inputs(2, 3, 9)
    ids = masking.MASKS["far_from_the_mean"](x, 2)
    assert_contract(ids, 2, 3, 9, 2)
    distance = (x - x.mean(2, keepdim=True)).norm(dim=-1).flatten(1)
    assert distance.gather(1, ids).view(2, 3, 2).amin(-1).gt(distance.view(2, 3, 9).sort(2).values[..., 6]).all()
    config = MaskConfig("far_from_the_mean")
    assert config(x, 2, **inputs).equal(ids) and not config.stochastic and not config.shape_only
    assert masking.MASKS["logits_high"](x, 2, **inputs).equal(inputs["logits"].flatten(1).topk(6).indices.sort(1)[0])
    assert masking.CLIP_BUDGET - CLIP_BUDGET == {"logits_high"}


def test_a_mask_without_register_mask_is_assumed_to_be_stochastic(monkeypatch):
    monkeypatch.setitem(MASKS, "mine", lambda tokens, keep, **aux: MASKS["evs"](tokens, keep))
    config = MaskConfig("mine")
    assert config.stochastic and not config.shape_only and config(torch.randn(1, 2, 4, 3), 2).shape == (1, 4)
