"""The masks: their contract, cluster_stm against the definition of its three steps, the draws against their odds."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from test_bandwidth import across, within
from test_cosine_distance import DTYPES, unkind
from test_density_peaks import Peaks
from test_temporal_density import recurrence

from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from kernels.temporal_density import temporal_density
from masking import GLOBAL, MASKS, NEEDS, MaskConfig, cluster_stm, keep_count, keep_ref, keep_triton, sizes

DRAWN = ["random", "random_frame", "tube", "block3d", "umt", "umt_global", "smaug_style", "adamae", "everest",
         "mgmae_style"]
WHOLE = ["random", "umt_global", "adamae", "dynamic", "flux_group_dynamic", "everest", "evs", "divprune"]    # budgets
PICKS = ["density", "centre", "lowest"]                                         # those that draw nothing
every = pytest.mark.parametrize("name", MASKS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def aux(B, T, N, seed=0, E=8):
    """All that any mask may ask for, beside the generator."""
    g, side = seeded(seed), math.isqrt(N)
    return {"attention": torch.rand(B, T, N, generator=g).softmax(-1), "text": torch.randn(B, E, generator=g),
            "aligned": torch.randn(B, T, N, E, generator=g), "logits": torch.randn(B, T, N, generator=g),
            "grid": (side, N // side) if N % side == 0 else (1, N)}


def check_contract(keep, B, T, N, K, name=""):
    assert keep.shape == (B, T * K) and keep.dtype == torch.int64
    assert keep.min() >= 0 and keep.max() < T * N
    assert (keep.diff(dim=1) > 0).all()                                         # ascending, none twice
    if name not in WHOLE:
        assert keep.view(B, T, K).div(N, rounding_mode="floor").equal(torch.arange(T)[:, None].expand(B, T, K))


def test_the_rows_say_what_they_are():
    assert set(DRAWN) == {name for name in MASKS if "generator" in NEEDS[name]} and set(WHOLE) == GLOBAL
    assert MASKS.keys() == NEEDS.keys() and len(MASKS) == 26 and all(mask.__name__ == k for k, mask in MASKS.items())


# How many are kept.

def test_keep_count_rounds_half_up_and_is_never_0():
    for N in range(1, 301):
        for thousandths in range(0, 1000, 10 if N % 50 else 1):
            want = max(1, (2 * N * (1000 - thousandths) + 1000) // 2000)
            assert keep_count(N, thousandths / 1000) == want, (N, thousandths)


@pytest.mark.parametrize("N, ratio, want", [
    (196, 0.85, 29), (196, 0.9, 20), (196, 0.8, 39), (196, 0.75, 49), (10, 0.85, 2), (10, 0.95, 1), (50, 0.99, 1),
    (30, 0.15, 26), (5, 0.9, 1), (1, 0.999, 1), (7, 0, 7), (7, 0.0, 7), (1000000, 0.999999, 1), (3000, 1e-3, 2997),
    (2000000, 2.5e-7, 2000000), (2000000, 7.5e-7, 1999999),
])
def test_keep_count_reads_the_ratio_as_the_decimal_it_was_written_as(N, ratio, want):
    assert keep_count(N, ratio) == want
    assert type(keep_count(N, ratio)) is int


@pytest.mark.parametrize("ratio", [1, 1.0, 1.5, -0.1, math.nan, math.inf])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"mask ratio is in \[0, 1\), got {ratio}"):
        keep_count(196, ratio)


@pytest.mark.parametrize("ratio", [0, 0.15, 0.5, 0.75, 0.85, 0.9, 0.95, 0.999])
def test_exactly_K_of_each_frame_are_kept_for_every_N_and_ratio(ratio):
    for N in [*range(1, 40), 49, 64, 100, 144, 196, 256]:
        K = keep_count(N, ratio)
        check_contract(cluster_stm(torch.randn(1, 2, N, 6, generator=seeded(N)), K), 1, 2, N, K)
        check_contract(MASKS["umt"](torch.zeros(1, 2, N, 1), K, generator=seeded(), **aux(1, 2, N)), 1, 2, N, K)


# The contract of every row.

@every
@pytest.mark.parametrize("N", [1, 16, 49, 64, 196])
def test_every_mask_gives_ascending_ids_none_twice_and_exactly_K_in_each_frame(name, N):
    for T in range(1, 17) if N < 64 else (1, 2, 3, 8, 16):
        B = 1 if N * T > 1600 else 2
        tokens, extra = torch.randn(B, T, N, 6, generator=seeded(T)), aux(B, T, N)
        for K in {1, N} | ({keep_count(N, 0.85)} if T % 2 else {keep_count(N, 0.9), max(1, N - 1)}):
            check_contract(MASKS[name](tokens, K, generator=seeded(), **extra), B, T, N, K, name)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mask_takes_every_dtype_any_stride_and_unkind_tokens(name, dtype):
    extra = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in aux(2, 3, 16).items()}
    kinds = [unkind(2, 3, 16, 12), torch.zeros(2, 3, 16, 12), torch.ones(2, 3, 16, 12),
             unkind(16, 12).expand(2, 3, 16, 12), unkind(1, 1, 12).expand(2, 3, 16, 12),
             unkind(12, 16, 3, 2).permute(3, 2, 1, 0)]
    for tokens in kinds:
        before = tokens.to(dtype)
        keep = MASKS[name](before, 5, generator=seeded(), **extra)
        check_contract(keep, 2, 3, 16, 5, name)
        assert before.equal(tokens.to(dtype))
        assert keep.equal(MASKS[name](before.contiguous(), 5, generator=seeded(), **extra))
    check_contract(MASKS[name](kinds[0].to(dtype).requires_grad_(), 5, generator=seeded(), **extra), 2, 3, 16, 5, name)


@every
def test_the_same_seed_gives_the_same_mask_and_another_seed_another(name):
    tokens, extra = torch.randn(2, 4, 49, 8, generator=seeded(1)), aux(2, 4, 49)
    masks = [MASKS[name](tokens, 7, generator=seeded(s), **extra) for s in (0, 0, 1)]
    assert masks[0].equal(masks[1])
    assert masks[0].equal(masks[2]) == (name not in DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_clips_and_where_it_should_frames_are_drawn_apart(name):
    tokens, extra = torch.zeros(2, 4, 49, 1), {"attention": torch.ones(2, 4, 49), "logits": torch.ones(2, 4, 49)}
    places = (MASKS[name](tokens, 7, generator=seeded(), grid=(7, 7), **extra) % 49).view(2, 4, 7)
    assert not places[0].equal(places[1])
    assert places[0, 0].equal(places[0, 1]) == (name in ("tube", "block3d", "mgmae_style"))     # it is a static clip


@pytest.mark.parametrize("name, needs, message", [
    *[(name, "generator", "drawn at random needs generator, got none") for name in DRAWN],
    *[(name, "attention", rf"the mask {name} needs attention \(B, T, N\), got none") for name in
      ("umt", "umt_global", "attention_high", "attention_low", "smaug_style", "fastvid_style")],
    *[(name, "grid", rf"the mask {name} needs grid \(h, w\), got none") for name in
      ("block3d", "mgm_style", "mgmae_style")],
    ("adamae", "logits", r"the mask adamae needs logits \(B, T, N\), got none"),
    ("text_guided", "text", r"the mask text_guided needs text \(B, E\), got none"),
    ("text_guided", "aligned", r"the mask text_guided needs aligned \(B, T, N, E\), got none"),
])
def test_a_mask_refuses_to_go_without_what_it_needs(name, needs, message):
    given = {"generator": seeded(), **aux(1, 2, 9)}
    for without in ({k: v for k, v in given.items() if k != needs}, {**given, needs: None}):
        with pytest.raises(ValueError, match=message) as told:
            MASKS[name](torch.ones(1, 2, 9, 4), 3, **without)
        assert "\n" not in str(told.value)


@every
def test_a_mask_ignores_what_it_does_not_need(name):
    needs = NEEDS[name] - {"tokens"}
    tokens = torch.randn(2, 3, 9, 4, generator=seeded(2))
    need = {k: v for k, v in aux(2, 3, 9).items() if k in needs}
    g = {"generator": seeded()} if "generator" in needs else {}
    alone = MASKS[name](tokens, 3, **need, **g)
    nonsense = {k: torch.full((1,), math.nan) for k in ("attention", "text", "aligned", "logits", "grid", "what")}
    assert MASKS[name](tokens, 3, **{**nonsense, **need}, generator=seeded()).equal(alone)


@every
@pytest.mark.parametrize("tokens, keep, message", [
    (torch.ones(2, 9, 4), 3, r"a mask wants \(B, T, N, C\), got \(2, 9, 4\)"),
    (torch.ones(1, 2, 0, 4), 1, r"no empty axis in \(B, T, N, C\), got \(1, 2, 0, 4\)"),
    (torch.ones(1, 2, 9, 4).long(), 3, r"floating-point values, got torch.int64"),
    (torch.ones(1, 2, 9, 4) * math.inf, 3, r"finite values, got 72 NaN or infinite of 72"),
    (torch.ones(1, 2, 9, 4), 0, r"1 to N = 9 tokens a frame, got 0"),
    (torch.ones(1, 2, 9, 4), 10, r"1 to N = 9 tokens a frame, got 10"),
], ids=range(6))
def test_every_mask_refuses_impossible_arguments_by_name(name, tokens, keep, message):
    with pytest.raises(ValueError, match=message):
        MASKS[name](tokens, keep, generator=seeded(), **aux(1, 2, 9))


@pytest.mark.parametrize("attention", [torch.ones(2, 9), torch.ones(1, 2, 8), torch.ones(1, 3, 9)], ids=str)
def test_umt_refuses_an_attention_of_another_shape(attention):
    with pytest.raises(ValueError, match=rf"\(1, 2, 9, 4\) want attention \(1, 2, 9\), got \({attention.shape[0]}, "):
        MASKS["umt"](torch.ones(1, 2, 9, 4), 3, attention=attention, generator=seeded())


# cluster_stm.

def oracle(clip, d_c, density):
    """clip (T, N, C) -> a function of K, assign and pick that gives the kept ids, from the oracles of the kernels."""
    T, N, _ = clip.shape
    frames = [Peaks(f, d_c, density) for f in clip]
    tau = recurrence(clip, d_c) if T > 1 else np.array([[float(r) for r in frames[0].rho]])

    def kept(K, assign, pick):
        for t, p in enumerate(frames):
            labels, centres, _ = p.cluster(K, assign)
            for k in range(K):
                members = [i for i in range(N) if labels[i] == k]
                best = min if pick == "lowest" else max                         # of equals, the first
                yield t * N + (centres[k] if pick == "centre" else best(members, key=lambda i, t=t: tau[t, i]))

    return lambda *way: sorted(kept(*way))


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("density", ["exp", "gauss"])
def test_cluster_stm_is_its_three_steps(T, density):
    x = torch.randn(2, T, 21, 24, generator=seeded(T)).double()
    clips = [oracle(clip, 0.25, density) for clip in x]
    for K, assign, pick in product((1, 4, 20, 21), ("nearest", "parent"), PICKS):
        want, way = [kept(K, assign, pick) for kept in clips], {"density": density, "assign": assign, "pick": pick}
        assert cluster_stm(x, K, d_c=0.25, d_c_time=0.25, **way).tolist() == want
        # In fp32 too: nothing in these clips is decided by less than its rounding.
        assert cluster_stm(x.float(), K, d_c=0.25, d_c_time=0.25, **way).tolist() == want


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_cluster_stm_breaks_every_tie_toward_the_lower_index(T, seed):
    # Axis-aligned tokens. At this bandwidth densities are counts of equal tokens, exact.
    x = torch.eye(8)[torch.randint(0, 6, (2, T, 17), generator=seeded(seed))]
    clips = [oracle(clip, np.float32(0.02), "exp") for clip in x]
    for K, assign, pick in product((1, 3, 6, 9, 17), ("nearest", "parent"), PICKS):
        want = [kept(K, assign, pick) for kept in clips]
        assert cluster_stm(x, K, d_c=0.02, d_c_time=0.02, assign=assign, pick=pick).tolist() == want


def test_the_bandwidths_it_is_not_given_are_the_2_and_10_percent_quantiles():
    g = seeded(3)
    x = torch.randn(2, 3, 25, 24, generator=g) + torch.randn(2, 3, 1, 24, generator=g)      # frames differ among them
    d_c = torch.tensor([within(f, "0.02") for f in x.flatten(0, 1)])
    d_c_time = torch.tensor([across(clip, "0.1") for clip in x])
    want = cluster_stm(x, 6)
    assert want.equal(cluster_stm(x, 6, d_c=d_c, d_c_time=d_c_time))
    assert want.equal(cluster_stm(x, 6, d_c=d_c)) and want.equal(cluster_stm(x, 6, d_c_time=d_c_time))
    given = {"quantile": 0.5, "quantile_time": 0.9}
    assert cluster_stm(x, 6, **given).equal(
        cluster_stm(x, 6, d_c=[within(f, "0.5") for f in x.flatten(0, 1)], d_c_time=[across(c, "0.9") for c in x]))
    # The clips do tell a bandwidth from others, that of all pairs of a clip among them.
    assert not cluster_stm(x, 6, quantile=0.5).equal(want) and not cluster_stm(x, 6, quantile_time=0.9).equal(want)
    assert not cluster_stm(x, 6, d_c_time=[within(clip, "0.1") for clip in x.flatten(1, 2)]).equal(want)
    image = x[:, :1]
    assert cluster_stm(image, 6).equal(cluster_stm(image, 6, d_c=d_c[[0, 3]], d_c_time=math.pi))


def test_the_method_is_the_default():
    x = torch.randn(2, 3, 25, 24, generator=seeded(4))
    want = cluster_stm(x, 6, density="exp", assign="nearest", pick="density")
    assert cluster_stm(x, 6).equal(want) and MASKS["cluster_stm"](x, 6).equal(want)
    for other in ({"density": "gauss"}, {"assign": "parent"}, {"pick": "centre"}, {"pick": "lowest"}):
        assert not cluster_stm(x, 6, d_c=0.3, **other).equal(cluster_stm(x, 6, d_c=0.3))


@pytest.mark.parametrize("shape", [(2, 4, 49, 40), (2, 1, 49, 40), (1, 2, 196, 64), (3, 3, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_of_each_cluster_is_kept_and_it_recurs_most(shape, dtype):
    B, T, N, _ = shape
    x = unkind(*shape).to(dtype)
    f = x.flatten(0, 1)
    d_c, d_c_time = bandwidth(f, 0.02), bandwidth(x, 0.1)       # given to both: one rounded otherwise may turn a tie
    for K in sorted({1, max(1, N // 7), N}):
        for assign in ("nearest", "parent"):
            labels, centres, rho = density_peaks(f, K, d_c, assign=assign)
            score = temporal_density(x, d_c_time).view(B * T, N) if T > 1 else rho.log()
            for pick in PICKS + ["random"]:
                keep = cluster_stm(x, K, d_c=d_c, d_c_time=d_c_time, assign=assign, pick=pick, generator=seeded())
                place = (keep % N).view(B * T, K)
                assert labels.gather(1, place).sort(1).values.equal(torch.arange(K).expand(B * T, K))
                if pick in ("density", "lowest"):
                    best = score.new_zeros(B * T, K).scatter_reduce(
                        1, labels, score, "amin" if pick == "lowest" else "amax", include_self=False)
                    assert score.gather(1, place).equal(best.gather(1, labels.gather(1, place)))
                elif pick == "centre":
                    assert place.equal(centres)


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("assign", ["nearest", "parent"])
def test_a_static_clip_is_masked_by_the_same_places_in_all_frames(pick, assign):
    still = torch.randn(2, 1, 49, 40, generator=seeded(5)).expand(2, 4, 49, 40)
    twice = torch.eye(8)[torch.randint(0, 8, (2, 1, 49), generator=seeded(6))].expand(2, 4, 49, 8)
    for clip in (still, twice, torch.ones(2, 4, 49, 8)):
        for K in (1, 7, 30, 49):
            places = (cluster_stm(clip, K, pick=pick, assign=assign) % 49).view(2, 4, K)
            assert places.equal(places[:, :1].expand(2, 4, K))


def test_a_constant_clip_keeps_its_first_tokens():
    for pick in PICKS:
        for T in (1, 3):
            keep = cluster_stm(torch.ones(2, T, 9, 4), 4, pick=pick)
            assert keep.tolist() == [[t * 9 + n for t in range(T) for n in range(4)]] * 2


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("pick", PICKS)
def test_what_else_is_in_the_batch_does_not_change_a_mask(T, pick):
    base = torch.randn(12, 48, generator=seeded(7))
    clips = [torch.randn(T, 49, 48, generator=seeded(8)), 1e-6 + torch.ones(T, 49, 48), unkind(T, 49, 48, seed=9),
             base[torch.randint(0, 12, (49,), generator=seeded(10))].expand(T, 49, 48),     # static, with duplicates
             torch.eye(48)[torch.randint(0, 9, (T, 49), generator=seeded(11))]]
    for density in ("exp", "gauss"):
        for assign in ("nearest", "parent"):
            way = {"density": density, "assign": assign, "pick": pick}
            alone = [cluster_stm(clip[None], 7, **way)[0] for clip in clips]
            for order in [(0, 1, 2), (2, 3, 0), (4, 4, 1), (3, 2, 4), (1, 0, 3), (0, 0, 0), (4, 3, 2, 1, 0)]:
                together = cluster_stm(torch.stack([clips[i] for i in order]), 7, **way)
                for mask, i in zip(together, order, strict=True):
                    assert mask.equal(alone[i]), (order, i)


def test_a_clip_of_a_batch_takes_the_bandwidths_given_for_it():
    x, d_c = torch.randn(2, 3, 25, 24, generator=seeded(12)), torch.tensor([0.05, 0.2, 0.4, 0.1, 0.3, 0.6])
    d_c_time = torch.tensor([0.05, 0.7])
    together = cluster_stm(x, 5, d_c=d_c, d_c_time=d_c_time)
    for b in range(2):
        alone = cluster_stm(x[b:b + 1], 5, d_c=d_c[3 * b:3 * b + 3], d_c_time=d_c_time[b].item())
        assert alone[0].equal(together[b])


def test_permuted_places_give_permuted_masks_and_permuted_frames_too():
    x, g = torch.randn(2, 4, 49, 32, generator=seeded(13)).double(), seeded(14)
    n, t = torch.randperm(49, generator=g), torch.randperm(4, generator=g)
    for pick in PICKS:
        seen, moved = torch.zeros(2, 4 * 49), torch.zeros(2, 4 * 49)
        seen.scatter_(1, cluster_stm(x, 7, d_c=0.3, d_c_time=0.3, pick=pick), 1)
        moved.scatter_(1, cluster_stm(x[:, t][:, :, n], 7, d_c=0.3, d_c_time=0.3, pick=pick), 1)
        assert moved.view(2, 4, 49).equal(seen.view(2, 4, 49)[:, t][:, :, n])


def test_a_token_that_recurs_is_kept_before_one_that_does_not():
    # In both frames tokens 0 to 3 are one cluster; token 2 of the first is exactly token 3 of the second.
    g, region = seeded(15), torch.randn(2, 64, generator=seeded(16))
    x = region[[0, 0, 0, 0, 1, 1, 1, 1]] + 0.3 * torch.randn(2, 8, 64, generator=g)
    x[1, 3] = x[0, 2]
    keep = cluster_stm(x[None], 2, d_c=0.3, d_c_time=0.01)[0].tolist()
    assert 2 in keep and 8 + 3 in keep

# cluster_stm in the kernels: in Triton's interpreter, or on a GPU where there is one.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def kernels(x, K, d_c=None, d_c_time=None, density="exp", assign="nearest", pick="density", noise=None):
    B, T = x.shape[:2]
    d_c = None if d_c is None else torch.full((B * T,), d_c, device=DEVICE)
    d_c_time = None if d_c_time is None else torch.full((B,), d_c_time, device=DEVICE)
    noise = None if noise is None else noise.to(DEVICE)
    return keep_triton(x.to(DEVICE), K, d_c, d_c_time, 0.02, 0.1, density, assign, pick, noise).cpu()


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("density", ["exp", "gauss"])
def test_the_kernels_are_its_three_steps(T, density):
    x = torch.randn(2, T, 21, 24, generator=seeded(T)).to(torch.float16 if T == 4 else torch.float32)
    clips = [oracle(clip.double(), 0.25, density) for clip in x]
    for assign, pick in product(("nearest", "parent"), PICKS):
        want, way = [kept(4, assign, pick) for kept in clips], {"density": density, "assign": assign, "pick": pick}
        assert kernels(x, 4, 0.25, 0.25, **way).tolist() == want


@pytest.mark.parametrize("T", [1, 3])
def test_the_kernels_break_every_tie_toward_the_lower_index(T):
    x = torch.eye(8)[torch.randint(0, 6, (2, T, 17), generator=seeded(T))]
    clips = [oracle(clip, np.float32(0.02), "exp") for clip in x]
    for K, assign, pick in product((3, 6, 17), ("nearest", "parent"), PICKS[:2]):
        want = [kept(K, assign, pick) for kept in clips]
        assert kernels(x, K, 0.02, 0.02, assign=assign, pick=pick).tolist() == want


@pytest.mark.parametrize("shape", [(1, 8, 49, 64), (2, 3, 64, 40), (1, 2, 196, 768), (3, 1, 50, 32), (1, 5, 129, 24)],
                         ids=str)
def test_with_their_own_bandwidths_the_kernels_keep_nearly_what_the_exact_quantiles_do(shape):
    B, T, N, C = shape
    K = keep_count(N, 0.85)
    x = (torch.randn(B, T, 8, C, generator=seeded(1)).repeat_interleave(N // 8 + 1, 2)[:, :, :N]
         + 0.7 * torch.randn(shape, generator=seeded(2))).half()
    keep = kernels(x, K)
    check_contract(keep, B, T, N, K)
    want = keep_ref(x.double(), K, None, None, 0.02, 0.1, "exp", "nearest", "density", None)
    here, there = (torch.zeros(B, T * N).scatter(1, ids, 1) for ids in (keep, want))
    assert (here == there).double().mean() > 0.98
    assert kernels(x, K).equal(keep)


def test_the_kernels_pick_at_random_by_the_noise_they_are_given():
    x, noise = torch.randn(2, 3, 20, 16, generator=seeded(5)), torch.rand(2, 3, 20, generator=seeded(6))
    want = cluster_stm(x, 6, d_c=0.3, pick="random", generator=seeded(6))
    assert kernels(x, 6, d_c=0.3, pick="random", noise=noise).equal(want)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unchecked_a_nan_leaves_ids_in_range_and_other_clips_alone(bad):
    x = torch.randn(3, 2, 20, 16, generator=seeded(7))
    want = kernels(x, 6)
    x[1, 0, 3, 5] = x[1, 1, 7] = bad
    keep = kernels(x, 6)
    check_contract(keep, 3, 2, 20, 6)
    assert keep[[0, 2]].equal(want[[0, 2]])


def test_in_compiled_code_it_is_one_operation():
    x = torch.randn(2, 3, 16, 8, generator=seeded(8)).to(DEVICE)
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"                    # no C++ compiler is asked for
    for given in ({}, {"d_c": 0.3, "d_c_time": 0.2}):
        step = lambda x, given=given: cluster_stm(x * 2, 5, check=False, **given) + 1
        assert torch.compile(step, fullgraph=True, backend=backend)(x).equal(step(x))
    how = (5, None, None, 0.02, 0.1, "exp", "nearest", "density", None)
    torch.library.opcheck(torch.ops.clusterstm.keep.default, (x, *how))


def test_what_is_not_checked_is_refused_all_the_same_by_shape():
    for x, keep, message in [(torch.ones(2, 9, 4), 3, "wants"), (torch.ones(1, 2, 9, 4), 10, "1 to N = 9"),
                             (torch.ones(1, 2, 9, 4).long(), 3, "floating-point")]:
        with pytest.raises(ValueError, match=message):
            cluster_stm(x, keep, check=False)


@gpu
def test_on_a_gpu_the_host_waits_for_nothing_and_a_graph_replays_it():
    x = torch.randn(4, 8, 196, 768, device="cuda", dtype=torch.bfloat16)
    want = cluster_stm(x, 29)                               # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert_later = [cluster_stm(x, 29, check=False), cluster_stm(x, 29, d_c=0.3, d_c_time=0.3, check=False)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert assert_later[0].equal(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = cluster_stm(x, 29, check=False)
    other = torch.randn_like(x)
    want = cluster_stm(other, 29)
    x.copy_(other)
    graph.replay()
    assert keep.equal(want)


@gpu
def test_on_a_gpu_memory_does_not_grow_with_the_square_of_the_tokens():
    cluster_stm(torch.randn(4, 8, 196, 768, device="cuda").bfloat16(), 29)
    took = []
    for B in (128, 256):
        x = torch.randn(B, 8, 196, 768, device="cuda", dtype=torch.bfloat16)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cluster_stm(x, 29, check=False)
        took.append(torch.cuda.max_memory_allocated() - before)
        del x
    assert took[1] - took[0] < 128 * 8 * 196 * 400          # bytes a token: 13 x 2 slots of 4, and a few of its own


@gpu
def test_on_a_gpu_bad_values_are_named():
    x = torch.randn(1, 2, 20, 16, device="cuda")
    x[0, 0, 3, 5] = math.nan
    with pytest.raises(ValueError, match="1 NaN or infinite of 640"):
        cluster_stm(x, 6)
    for value, message in ((x.double(), "float32, float16 or bfloat16"), (x.nan_to_num() * 1e20, "1e-12 to 1e12"),
                           (torch.zeros(1, 2, 1025, 8, device="cuda"), "1 to 1024 tokens")):
        with pytest.raises(ValueError, match=message):
            cluster_stm(value.nan_to_num(), 6)
    with pytest.raises(ValueError, match="d_c wants to be on cuda"):
        cluster_stm(x.nan_to_num(), 6, d_c=torch.ones(2))


@pytest.mark.parametrize("words, message", [
    ({"pick": "best"}, "picks by density, random, centre or lowest, got 'best'"),
    ({"pick": "random"}, "drawn at random needs generator, got none"),
    ({"density": "cutoff"}, "'exp' and 'gauss', got 'cutoff'"),
    ({"assign": "none"}, "'nearest' centre or the 'parent's, got 'none'"),
    ({"quantile": 0.0}, r"quantile in \(0, 1\], got 0.0"),
    ({"quantile_time": 1.5}, r"quantile_time in \(0, 1\], got 1.5"),
    ({"d_c": 0.0}, "d_c wants positive numbers, got 0"),
    ({"d_c": torch.ones(2)}, r"one number or \(6,\), got \(2,\)"),
    ({"d_c_time": torch.ones(6)}, r"one number or \(2,\), got \(6,\)"),
    ({"d_c_time": -1.0}, "d_c wants positive numbers, got -1"),
], ids=str)
def test_cluster_stm_refuses_impossible_settings_by_name(words, message):
    with pytest.raises(ValueError, match=message):
        cluster_stm(torch.ones(2, 3, 9, 4), 3, **words)


# The draws. A count of n draws of probability p is within 4.5 of its standard deviations, at fixed seeds.

DRAWS = 40000


def check_odds(mask, want, size, sigmas=4.5):
    """mask (DRAWS, K) of ids below `size`, want (size,) the probability that each is among them."""
    share = torch.zeros(DRAWS, size).scatter_(1, mask, 1).double().mean(0)
    want = torch.as_tensor(want, dtype=torch.float64)
    assert share.sum().item() == pytest.approx(mask.shape[1])
    assert ((share - want).abs() <= sigmas * (want * (1 - want) / DRAWS).sqrt() + 1e-12).all(), (share, want)


def inclusion(weight, K):
    """Of K draws without replacement, each in proportion to the weights that are left: the odds of being drawn."""
    odds = [0.0] * len(weight)
    for drawn in permutations(range(len(weight)), K):
        p, left = 1.0, sum(weight)
        for i in drawn:
            p, left = p * weight[i] / left, left - weight[i]
        for i in drawn:
            odds[i] += p
    return odds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_umt_draws_in_proportion_to_attention(K, dtype):
    weight = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01]).to(dtype)
    tokens = torch.zeros(DRAWS, 1, 6, 1)
    keep = MASKS["umt"](tokens, K, attention=weight.expand(DRAWS, 1, 6), generator=seeded(K))
    check_odds(keep, inclusion(weight.tolist(), K), 6)
    unscaled = MASKS["umt"](tokens, K, attention=(1000 * weight).expand(DRAWS, 1, 6), generator=seeded(K + 9))
    check_odds(unscaled, inclusion(weight.tolist(), K), 6)


def test_umt_draws_each_frame_by_its_own_attention():
    weight = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    keep = MASKS["umt"](torch.zeros(DRAWS, 2, 3, 1), 1, attention=weight.expand(DRAWS, 2, 3), generator=seeded(17))
    check_odds(keep, weight.flatten(), 6)


def test_umt_takes_tokens_of_no_attention_only_when_no_others_are_left_and_then_evenly():
    weight = torch.tensor([0.0, 0.5, 0.0, 1e-6, 0.0, 0.5])
    attention, tokens = weight.expand(DRAWS, 1, 6), torch.zeros(DRAWS, 1, 6, 1)
    assert not (weight[MASKS["umt"](tokens, 2, attention=attention, generator=seeded(18))] == 0).any()
    assert MASKS["umt"](tokens, 3, attention=attention, generator=seeded(19)).equal(torch.tensor([[1, 3, 5]] * DRAWS))
    keep = MASKS["umt"](tokens, 4, attention=attention, generator=seeded(20))
    check_odds(keep, [1 / 3, 1, 1 / 3, 1, 1 / 3, 1], 6)
    nothing = MASKS["umt"](tokens, 2, attention=torch.zeros(DRAWS, 1, 6), generator=seeded(21))
    check_odds(nothing, [1 / 3] * 6, 6)


def test_random_gives_every_token_of_the_clip_and_every_pair_the_same_odds():
    keep = MASKS["random"](torch.zeros(DRAWS, 2, 4, 1), 1, generator=seeded(22))
    check_odds(keep, [2 / 8] * 8, 8)
    a, b = keep.T                                                               # a < b: one of 28 pairs
    check_odds((8 * a + b)[:, None], [1 / 28 if i < j else 0.0 for i in range(8) for j in range(8)], 64)


def test_random_frame_gives_every_token_of_a_frame_the_same_odds_and_frames_do_not_depend_on_each_other():
    keep = MASKS["random_frame"](torch.zeros(DRAWS, 2, 5, 1), 2, generator=seeded(23))
    check_odds(keep, [2 / 5] * 10, 10)
    first, second = keep[:, :2], keep[:, 2:] - 5
    pair = (5 * first[:, 0] + first[:, 1]) * 25 + 5 * second[:, 0] + second[:, 1]
    odds = torch.zeros(25)
    odds[[5 * i + j for j in range(5) for i in range(j)]] = 1 / 10
    check_odds(pair[:, None], torch.outer(odds, odds).flatten(), 625)


def test_tube_gives_every_place_the_same_odds():
    keep = MASKS["tube"](torch.zeros(DRAWS, 3, 5, 1), 2, generator=seeded(24))
    check_odds(keep, [2 / 5] * 15, 15)
    assert (keep.view(DRAWS, 3, 2) - 5 * torch.arange(3)[:, None] == keep[:, None, :2]).all()


def test_pick_random_gives_every_token_of_a_cluster_the_same_odds():
    x = torch.eye(4)[torch.tensor([0, 1, 0, 1, 0, 1, 1])].expand(DRAWS, 1, 7, 4)
    keep = cluster_stm(x, 2, d_c=0.1, pick="random", generator=seeded(25))
    check_odds(keep, [1 / 3, 1 / 4, 1 / 3, 1 / 4, 1 / 3, 1 / 4, 1 / 4], 7)
    same = cluster_stm(x, 2, d_c=0.1, pick="random", generator=seeded(25))
    assert keep.equal(same) and not keep.equal(cluster_stm(x, 2, d_c=0.1, pick="random", generator=seeded(26)))


# What a kept token stands for.

def sizes_by_hand(tokens, keep):
    """One token at a time."""
    (T, N), found = tokens.shape[1:3], torch.zeros(keep.shape)
    for b, ids in enumerate(keep.tolist()):
        x = [v / (v.norm() or 1) for v in tokens[b].double().flatten(0, 1)]
        for i in range(T * N):
            own = [s for s, k in enumerate(ids) if k // N == i // N]
            if own:
                found[b, ids.index(i) if i in ids else max(own, key=lambda s: x[i] @ x[ids[s]])] += 1
    return found


def signs(*shape, seed=0):
    """Each token one of six or zero, of a length that is a power of two: cosines are exact, and most are ties."""
    words = torch.randint(2, (6, 16), generator=seeded(seed)) * 2.0 - 1
    words = torch.cat([words * 2.0 ** torch.arange(-3, 3)[:, None], torch.zeros(1, 16)])
    return words[torch.randint(7, shape[:3], generator=seeded(seed + 1))]


@pytest.mark.parametrize("make", [unkind, signs])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (3, 4, 1, 16), (2, 1, 20, 16), (2, 5, 33, 16)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_a_hidden_token_is_counted_with_the_nearest_kept_one_of_its_frame(make, shape, share):
    """Of the whole clip some are kept, so that frames keep many, few or none; of the first clip, the first of all."""
    (B, T, N, _), x = shape, make(*shape, seed=5)
    keep = torch.rand(B, T * N, generator=seeded(6)).argsort(1)[:, :max(1, round(share * T * N))].sort(1).values
    keep[0] = torch.arange(keep.shape[1])
    found = sizes(x, keep)
    assert found.dtype == torch.float32 and torch.equal(found, sizes_by_hand(x, keep))
    assert found.min() >= 1 and (share < 1 or (found == 1).all())
    frames = torch.zeros(B, T).scatter_add(1, keep // N, found)
    assert torch.equal(frames, N * (torch.zeros(B, T).scatter_add(1, keep // N, torch.ones_like(found)) > 0))
    low = x.bfloat16()
    assert torch.equal(sizes(low, keep), sizes(low.float(), keep))


def test_each_frame_counts_its_own_however_alike_the_others():
    x, keep = torch.randn(1, 1, 6, 4, generator=seeded(7)).expand(1, 3, 6, 4), torch.tensor([[0, 5, 7, 8, 9]])
    assert sizes(x, keep)[0, :2].sum() == sizes(x, keep)[0, 2:].sum() == 6


# MaskConfig.

def test_the_config_calls_its_mask_with_its_settings():
    x, extra = torch.randn(2, 3, 20, 16, generator=seeded(27)), aux(2, 3, 20)
    way = {"quantile": 0.3, "quantile_time": 0.5, "density": "gauss", "assign": "parent", "pick": "lowest"}
    assert MaskConfig()(x, 5, **extra).equal(cluster_stm(x, 5))
    for field, value in way.items():
        assert MaskConfig(**{field: value})(x, 5).equal(cluster_stm(x, 5, **{field: value})), field
    assert MaskConfig(**way)(x, 5).equal(cluster_stm(x, 5, **way))
    for name in DRAWN:
        keep = MaskConfig(name=name, pick="lowest")(x, 5, generator=seeded(), **extra)
        assert keep.equal(MASKS[name](x, 5, generator=seeded(), **extra))


def test_the_config_knows_which_masks_are_drawn_anew_and_which_do_not_look_at_the_tokens():
    x, extra = torch.randn(2, 6, 20, 16, generator=seeded(28)), aux(2, 6, 20)
    configs = [MaskConfig(name=name, pick=pick) for name in MASKS for pick in PICKS + ["random"]]
    for config in configs:
        first, again = (config(x, 4, generator=seeded(s), **extra) for s in (0, 1))
        assert config.drawn == (not first.equal(again)), config
        moved = {k: v.flip(2) if k in ("attention", "logits", "aligned") else v for k, v in extra.items()}
        other = config(x.flip(2), 4, generator=seeded(), **moved)
        assert config.blind == other.equal(first), config


def test_the_config_refuses_a_mask_there_is_not_and_a_ratio_that_cannot_be():
    with pytest.raises(ValueError, match="there is no mask 'block'; there are cluster_stm, random, "):
        MaskConfig(name="block")
    with pytest.raises(ValueError, match=r"mask ratio is in \[0, 1\), got 1.0"):
        MaskConfig(ratio=1.0)


def test_a_function_that_is_put_into_masks_as_it_is_can_be_named_and_is_taken_for_drawn(monkeypatch):
    monkeypatch.setitem(MASKS, "mine", lambda tokens, keep, **aux: MASKS["evs"](tokens, keep))
    cfg = MaskConfig("mine")
    assert cfg.drawn and not cfg.blind and cfg(torch.randn(1, 2, 4, 3), 2).shape == (1, 4)
