"""density_peaks against rho and gamma themselves in 40 decimal digits: no logarithms and no underflow."""

import math

import numpy as np
import pytest
import torch
from helpers.kernels import (
    DEVICE,
    DTYPES,
    LOW,
    Peaks,
    captured,
    decimal_rank,
    low,
    needs_cuda,
    quick_distances,
    seeded,
    strided,
    unkind,
)

from kernels.bandwidth import bandwidth_triton
from kernels.cosine_distance import cosine_distance
from kernels.density_peaks import (
    assign_by_parent,
    assign_to_nearest,
    density_peaks,
    density_peaks_ref,
    density_peaks_triton,
)

pytestmark = pytest.mark.usefixtures("poison_empty")

WAYS = [(density, assign) for density in ("exp", "gauss") for assign in ("nearest", "parent")]
ways = pytest.mark.parametrize("density, assign", WAYS)


def one_hot(F, N, seed, axes=7):
    """Axis-aligned tokens of several lengths, most of them with equals: distances are exactly 0 or 1."""
    g = seeded(seed)
    return torch.eye(16)[torch.randint(0, axes, (F, N), generator=g)] * torch.randint(1, 4, (F, N, 1), generator=g)


def tied(F, N, axes):
    """`one_hot`, with tokens at distance 2 and zero tokens if N = 64."""
    x = one_hot(F, N, seed=N, axes=axes)
    if N == 64:
        x[:, ::5] *= -1
        x[:, 7::20] = 0
    return x


def stars(seed):
    """
    Hubs of 6, 5, 3 and 2 leaves, in subspaces of their own, and two isolated tokens: x (1, N, 96) with the distances
    1/8 (hub to leaf: a leaf is its hub with one of 16 signs changed), 1/4 (leaf to leaf) and 1.

    Two densities tie exactly, or differ in how many tokens are at the nearest distance, or (leaves of two hubs) differ
    further out only, beyond any precision, and then the denser token has the lower index.
    """
    g, blocks = seeded(seed), []
    for block, leaves in enumerate([6, 5, 3, 2, 0, 0]):
        star = (torch.randint(0, 2, (16,), generator=g) * 2.0 - 1).repeat(leaves + 1, 1)
        for leaf, c in enumerate(torch.randperm(16, generator=g)[:leaves].tolist()):
            star[leaf + 1, c] *= -1
        blocks.append(torch.zeros(leaves + 1, 96))
        blocks[-1][:, 16 * block:16 * block + 16] = star[torch.randperm(leaves + 1, generator=g)]
    return torch.cat(blocks)[None]


def cluster_counts(N):
    return sorted({1, 2, max(1, N // 7), N // 2, N - 1, N} & set(range(1, N + 1)))


def check_contract(labels, centres, rho, F, N, K):
    assert labels.shape == rho.shape == (F, N) and centres.shape == (F, K)
    assert labels.dtype == centres.dtype == torch.int64 and rho.dtype == torch.float32
    assert centres.min() >= 0 and centres.max() < N and (centres.diff(dim=1) > 0).all()
    assert labels.gather(1, centres).equal(torch.arange(K).expand(F, K))
    assert labels.min() == 0 and labels.max() == K - 1


def assert_clusters(labels, centres, oracles, K, assign):
    for f, oracle in enumerate(oracles):
        assert (labels[f].tolist(), centres[f].tolist()) == oracle.cluster(K, assign)[:2]


# ---------------------------------------------------------------------------------------------------------------------
# The reference

@pytest.mark.parametrize("shape", [(2, 32, 64), (1, 1, 8), (1, 2, 3), (3, 25, 40)], ids=str)
@ways
def test_reference_in_fp64_is_the_definition_on_random_tokens(shape, density, assign):
    F, N, C = shape
    x = torch.randn(shape, generator=seeded(N)).double() + 0.3
    oracles = [Peaks(f, 0.25, density) for f in x]
    for K in cluster_counts(N):
        labels, centres, rho = density_peaks(x, K, 0.25, density, assign)
        check_contract(labels, centres, rho, F, N, K)
        np.testing.assert_allclose(rho.double().numpy(), [[float(r) for r in o.rho] for o in oracles], rtol=2e-7)
        assert_clusters(labels, centres, oracles, K, assign)


@pytest.mark.parametrize("density, assign", [WAYS[0], WAYS[3]])
def test_reference_in_fp64_is_the_definition_at_the_models_size(density, assign):
    x = torch.randn(1, 196, 96, generator=seeded(196)).double() + 0.3
    labels, centres, _ = density_peaks(x, 29, 0.25, density, assign)
    assert_clusters(labels, centres, [Peaks(x[0], 0.25, density)], 29, assign)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@ways
def test_reference_is_the_definition_unless_rounding_decides(dtype, density, assign):
    x = torch.randn(10, 24, 40, generator=seeded(0)).to(dtype)
    d_c, compared = np.float32(0.3), 0
    for f, oracle in enumerate(Peaks(f, d_c, density) for f in x):
        rho = density_peaks(x, 1, d_c.item(), density, assign)[2][f]
        np.testing.assert_allclose(rho.double().numpy(), [float(r) for r in oracle.rho], rtol=2e-5)
        for K in (1, 3, 8, 24):
            if oracle.cluster(K, assign)[2] > 2e-6:
                labels, centres, _ = density_peaks(x[f:f + 1], K, d_c.item(), density, assign)
                assert_clusters(labels, centres, [oracle], K, assign)
                compared += 1
    assert compared >= 36                                                       # of 40


@pytest.mark.parametrize("N, axes", [(49, 7), (64, 3), (16, 16), (33, 1), (8, 16)])
@ways
def test_ties_of_density_distance_and_gamma_go_to_the_lower_index(N, axes, density, assign):
    d_c = np.float32(0.02)                                                      # even in fp64, 1 + e^-50 = 1
    for dtype in DTYPES if N == 16 else DTYPES[::3]:
        x = tied(3, N, axes).to(dtype)
        oracles = [Peaks(f, d_c, density) for f in x]
        for K in cluster_counts(N):
            labels, centres, rho = density_peaks(x, K, d_c.item(), density, assign)
            check_contract(labels, centres, rho, 3, N, K)
            assert_clusters(labels, centres, oracles, K, assign)


@pytest.mark.parametrize("density, d_c, dtype", [
    ("exp", 1e-6, torch.float32), ("exp", 1e-6, torch.bfloat16), ("exp", 1e-3, torch.float16),
    ("exp", 1e-6, torch.float64), ("gauss", 0.01, torch.float32), ("gauss", 1e-6, torch.float64),
], ids=str)
@pytest.mark.parametrize("assign", ["nearest", "parent"])
def test_densities_that_all_underflow_keep_their_exact_order(density, d_c, dtype, assign):
    for seed in range(2):
        x = stars(seed).to(dtype)
        oracle = Peaks(x[0], d_c if dtype == torch.float64 else np.float32(d_c), density)
        assert np.float32(max(oracle.rho)) == 0
        for K in range(1, oracle.N + 1):
            labels, centres, rho = density_peaks(x, K, d_c, density, assign)
            assert_clusters(labels, centres, [oracle], K, assign)
            assert (rho == 0).all()


@ways
def test_a_bandwidth_of_1e_6_is_used_as_it_is(density, assign):
    angle = 1e-3 * torch.randn(2, 25, generator=seeded(7)).double()             # distances of 1e-6
    x = torch.stack([angle.cos(), angle.sin()], -1)
    for f, oracle in enumerate(Peaks(f, 1e-6, density) for f in x):
        for K in (1, 4, 24):
            labels, centres, rho = density_peaks(x[f:f + 1], K, 1e-6, density, assign)
            np.testing.assert_allclose(rho[0].double().numpy(), [float(r) for r in oracle.rho], rtol=2e-7)
            assert_clusters(labels, centres, [oracle], K, assign)


@pytest.mark.parametrize("d_c", [1e-6, 0.02, 10.0])
@ways
def test_a_constant_frame_has_the_first_tokens_as_centres(d_c, density, assign):
    x = torch.zeros(2, 9, 8)
    x[..., 3] = 0.7
    for K in (1, 4, 9):
        labels, centres, rho = density_peaks(x, K, d_c, density, assign)
        assert centres.tolist() == [list(range(K))] * 2
        assert labels.tolist() == [list(range(K)) + [0] * (9 - K)] * 2
        assert rho.equal(torch.full((2, 9), 8.0))
    for token in (torch.zeros(24), torch.randn(24, generator=seeded(0)), torch.full((24,), 1e-3)):
        for K in (1, 4, 33):
            check_contract(*density_peaks(token.expand(2, 33, 24), K, d_c, density, assign), 2, 33, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ways
def test_any_tokens_give_K_clusters_each_with_its_centre(dtype, density, assign):
    x = unkind(4, 50, 24, seed=1)
    x[1] = x[1, :5].repeat(10, 1)                                               # each token ten times
    x[2, 10:] = x[2, 0] + 1e-3 * x[2, 10:]
    x[3] = x[3, 0] + 1e-4 * x[3]                                                # rounding decides nearly everything
    x = x.to(dtype)
    for d_c in (1e-6, 0.3, 100.0, torch.tensor([1e-6, 0.1, 2.0, 1e-5])):
        for K in (1, 11, 49, 50):
            check_contract(*density_peaks(x, K, d_c, density, assign), 4, 50, K)


def test_a_parent_chain_ending_at_a_non_centre_takes_the_nearest_centre():
    # In exact arithmetic the peak is a centre, so only assign_by_parent alone can be given such chains.
    g = seeded(2)
    for N, K in [(2, 1), (9, 2), (40, 1), (40, 7), (63, 30), (64, 5)]:
        d = torch.randint(1, 6, (3, N, N), generator=g).float()                 # small whole numbers: many ties
        d = d.tril(-1) + d.tril(-1).mT
        parent, centres = torch.empty(3, N, dtype=torch.int64), torch.empty(3, K, dtype=torch.int64)
        for f in range(3):
            by_density = torch.randperm(N, generator=g).tolist()
            for rank, i in enumerate(by_density):
                # Frame 0 is one chain through all tokens, the longest there can be.
                first = rank - 1 if f == 0 else 0
                parent[f, i] = by_density[torch.randint(first, rank, (), generator=g)] if rank else i
            below = torch.tensor(by_density[1:])
            centres[f] = (below[-K:] if f == 0 else below[torch.randperm(N - 1, generator=g)[:K]]).sort().values
        labels = assign_by_parent(parent, centres, d)
        for f in range(3):
            frame_centres = centres[f].tolist()
            for i in range(N):
                j = i
                while j not in frame_centres and parent[f, j] != j:
                    j = parent[f, j].item()
                nearest = min(frame_centres, key=lambda c: (d[f, j, c].item(), c))
                assert labels[f, i] == frame_centres.index(j if j in frame_centres else nearest)


def test_a_centre_at_distance_0_from_another_keeps_its_own_cluster():
    d = torch.zeros(1, 4, 4)
    assert assign_to_nearest(torch.tensor([[1, 3]]), d).tolist() == [[0, 0, 0, 1]]
    x = torch.eye(4)[torch.tensor([[0, 0, 0, 1]])]
    for assign in ("nearest", "parent"):
        labels, centres, _ = density_peaks(x, 3, 0.02, "exp", assign)
        assert centres.tolist() == [[0, 1, 3]] and labels.tolist() == [[0, 1, 0, 2]]


def test_assignments_differ_if_the_nearest_centre_is_not_the_one_uphill():
    # Degrees on a circle: a ridge leads from 44 up to the peak near 0, but the centre on the hill of 61 is nearer.
    angle = torch.deg2rad(torch.tensor([[0.0, 1, 2, 8, 15, 23, 32, 60, 61, 62, 44]]))
    x = torch.stack([angle.cos(), angle.sin()], -1).double()
    oracle = Peaks(x[0], 0.01, "exp")
    by_nearest, by_parent = oracle.cluster(2, "nearest")[0], oracle.cluster(2, "parent")[0]
    assert by_nearest != by_parent
    assert density_peaks(x, 2, 0.01, "exp", "nearest")[0][0].tolist() == by_nearest
    assert density_peaks(x, 2, 0.01, "exp", "parent")[0][0].tolist() == by_parent


@ways
def test_permuted_tokens_give_permuted_clusters(density, assign):
    g = seeded(3)
    x = torch.randn(4, 49, 32, generator=g).double()
    p = torch.stack([torch.randperm(49, generator=g) for _ in range(4)])
    for K in (1, 7, 48, 49):
        labels, centres, rho = density_peaks(x, K, 0.3, density, assign)
        permuted = density_peaks(x.gather(1, p[..., None].expand_as(x)), K, 0.3, density, assign)
        assert p.gather(1, permuted[1]).sort(1).values.equal(centres)
        centre_of = centres.gather(1, labels).gather(1, p)                      # of each permuted token
        assert p.gather(1, permuted[1].gather(1, permuted[0])).equal(centre_of)
        torch.testing.assert_close(permuted[2], rho.gather(1, p), rtol=1e-6, atol=0)


@ways
def test_frames_are_independent_and_results_repeatable(density, assign):
    x = torch.cat([torch.randn(3, 25, 32, generator=seeded(4)), torch.ones(1, 25, 32)])
    d_c = torch.tensor([0.1, 0.5, 2.0, 1e-6])
    out = labels, centres, rho = density_peaks(x, 5, d_c, density, assign)
    assert all(a.equal(b) for a, b in zip(density_peaks(x, 5, d_c, density, assign), out, strict=True))
    for f in range(4):
        alone = density_peaks(x[f:f + 1], 5, d_c[f].item(), density, assign)
        assert alone[0][0].equal(labels[f]) and alone[1][0].equal(centres[f])
        torch.testing.assert_close(alone[2][0], rho[f], rtol=1e-5, atol=0)
    flipped = density_peaks(x.flip(0), 5, d_c.flip(0).double(), density, assign)
    assert flipped[0].flip(0).equal(labels) and flipped[1].flip(0).equal(centres)


def test_exp_and_nearest_are_the_defaults():
    x = torch.randn(2, 49, 16, generator=seeded(5))
    labels = {way: density_peaks(x, 6, 0.3, *way)[0] for way in WAYS}
    default = labels.pop(("exp", "nearest"))
    assert density_peaks(x, 6, 0.3)[0].equal(default)
    assert not any(default.equal(other) for other in labels.values())


@ways
def test_a_single_token_is_its_own_cluster_of_density_0(density, assign):
    labels, centres, rho = density_peaks(torch.ones(2, 1, 4), 1, 0.1, density, assign)
    assert labels.tolist() == centres.tolist() == [[0], [0]] and rho.tolist() == [[0.0], [0.0]]
    for d_c in (0.1, None):
        labels, centres, log_rho, _ = run(torch.ones(3, 1, 4), 1, d_c, density, assign)
        assert labels.tolist() == centres.tolist() == [[0]] * 3 and log_rho.tolist() == [[-math.inf]] * 3


@ways
def test_reference_takes_any_strides_and_has_no_gradient(density, assign):
    x = torch.randn(32, 25, 3, generator=seeded(6), requires_grad=True).permute(2, 1, 0)
    labels, centres, rho = density_peaks(x, 5, 0.3, density, assign)
    same = density_peaks(x.contiguous(), 5, 0.3, density, assign)
    assert labels.equal(same[0]) and centres.equal(same[1]) and not rho.requires_grad
    torch.testing.assert_close(rho, same[2], rtol=1e-5, atol=0)


def test_rho_counts_tokens_at_distance_0_but_not_the_token_itself():
    x = torch.eye(4)[torch.tensor([[0, 1, 0, 0, 2]])]
    assert cosine_distance(x)[0, 0].tolist() == [0, 1, 0, 0, 1]
    for density, e in (("exp", math.exp(-2)), ("gauss", math.exp(-4))):
        expected = torch.tensor([2 + 2 * e, 4 * e, 2 + 2 * e, 2 + 2 * e, 4 * e])
        torch.testing.assert_close(density_peaks(x, 2, 0.5, density)[2][0], expected, rtol=1e-6, atol=0)


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize("x, K, d_c, way, message", [
    (torch.ones(3, 4), 1, 0.1, (), r"density_peaks.*\(F, N, C\).*\(3, 4\)"),
    (X, 0, 0.1, (), "density_peaks.*K.*N = 3.*0"),
    (X, 4, 0.1, (), "density_peaks.*K.*N = 3.*4"),
    (X, 2, torch.tensor([0.1, 0.0]), (), "d_c.*0"),
    (X, 2, torch.ones(3), (), r"d_c.*\(2,\).*\(3,\)"),
    (X, 2, 0.1, ("gaussian",), "density.*'exp'.*'gauss'.*'gaussian'"),
    (X, 2, 0.1, ("exp", "peak"), "assign.*'nearest'.*'parent'.*'peak'"),
], ids=range(7))
def test_invalid_arguments_are_refused(x, K, d_c, way, message):
    with pytest.raises(ValueError, match=message):
        density_peaks(x, K, d_c, *way)


def test_unchecked_a_nan_leaves_the_other_frames_of_the_reference_alone():
    x = torch.randn(3, 9, 8, generator=seeded(0))
    expected = density_peaks(x, 3, 0.3)
    x[1, 4, 2] = math.nan
    out = density_peaks(x, 3, 0.3, check=False)
    assert all(a[::2].equal(b[::2]) for a, b in zip(out, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

def run(x, K, d_c, density, assign, **kwargs):
    """The kernel's labels, centres, log rho and inverse lengths, on the CPU. d_c: a number, one per frame, or None."""
    if d_c is not None:
        d_c = torch.as_tensor(d_c, dtype=torch.float32).expand(len(x)).contiguous().to(DEVICE)
    out = [t.cpu() for t in density_peaks_triton(x.to(DEVICE), K, d_c, density, assign, **kwargs)]
    check_contract(*out[:3], *x.shape[:2], K)
    return out


def expected_log_rho(d, d_c, density):
    """d (N, N) fp64 -> (N,)."""
    a = (d / d_c) ** (2 if density == "gauss" else 1)
    np.fill_diagonal(a, np.inf)
    least = a.min(1)
    least[np.isinf(least)] = 0
    with np.errstate(divide="ignore"):
        return np.log(np.exp(least[:, None] - a).sum(1)) - least


def check_densities(log_rho, d, d_c, density):
    """Distances have an error of 1e-6; log rho may be off by what follows from it."""
    tolerance = 1e-6 / d_c
    if density == "gauss":
        tolerance *= 2 * d.max() / d_c + tolerance
    np.testing.assert_allclose(log_rho.double().numpy(), expected_log_rho(d, d_c, density), rtol=1e-6,
                               atol=2e-6 + tolerance)


def check_phases(frame, labels, centres, log_rho, assign, error=1e-6):
    """
    Check that each phase follows from those before it, on any tokens, up to errors of the distances.

    frame (N, C); labels (N,), centres (K,) and log rho (N,) of the kernel.
    """
    d, N = quick_distances(frame), len(frame)
    labels, centres, log_rho = labels.tolist(), centres.tolist(), log_rho.double().numpy()
    if N == 1:
        return
    by_density = np.lexsort((np.arange(N), -log_rho))
    density_rank = np.empty(N, int)
    density_rank[by_density] = np.arange(N)
    to_denser = np.where(density_rank[None] < density_rank[:, None], d, np.inf)
    delta = to_denser.min(1)
    peak = by_density[0]
    delta[peak] = d[peak].max()

    with np.errstate(divide="ignore"):
        lower, upper = np.log(np.maximum(delta - error, 0)), np.log(delta + error)
    slack = 1e-6 + 2e-7 * (abs(log_rho) + abs(np.log(delta + error)))
    others = np.setdiff1d(np.arange(N), centres)
    if len(others):
        assert (log_rho + upper + slack)[centres].min() >= (log_rho + lower - slack)[others].max()
    for i in others:
        if assign == "nearest" or i == peak:
            assert d[i, centres[labels[i]]] <= d[i, centres].min() + 2 * error
        else:
            assert labels[i] in {labels[j] for j in np.flatnonzero(to_denser[i] <= delta[i] + 2 * error)}


# Whole tiles, ragged ones, two and three; several frames per program (the interpreter has two); the model's C once.
@pytest.mark.parametrize("shape", [
    (1, 1, 8), (5, 2, 3), (3, 3, 8), (1, 16, 100), (3, 17, 8), (2, 49, 40), (1, 64, 64), (1, 129, 96),
    pytest.param((1, 196, 768), marks=pytest.mark.gpu),
], ids=str)
@low
def test_each_phase_of_the_kernel_follows_from_those_before(shape, dtype):
    F, N, C = shape
    x, d_c = unkind(*shape, seed=N).to(dtype), np.float32(0.2)
    square = x.double().square().sum(-1).numpy()
    inv_norm = np.where(square > 0, 1 / np.sqrt(np.where(square > 0, square, 1)), 0)
    counts = cluster_counts(N)
    for n, (density, assign) in enumerate(WAYS):
        if N > 3 and n % 2 != (N + (dtype == torch.float32)) % 2 or N > 100 and n > 1:
            continue                                                            # each way with one of the dtypes
        K = counts[(n + N) % len(counts)] if N < 100 else N // 7
        labels, centres, log_rho, inv = run(x, K, d_c, density, assign)
        np.testing.assert_allclose(inv.double().numpy(), inv_norm, rtol=1e-6, atol=0)
        for f in range(F):
            check_densities(log_rho[f], quick_distances(x[f]), float(d_c), density)
            check_phases(x[f], labels[f], centres[f], log_rho[f], assign)


@pytest.mark.parametrize("K", [1, 2, 34, 35])
@ways
def test_each_phase_of_the_kernel_is_right_for_any_number_of_clusters(K, density, assign):
    x = torch.randn(2, 35, 12, generator=seeded(K))
    x[1] = x[1, 0] + 1e-3 * x[1]                                                # rounding decides nearly everything
    d_c = [0.3, 1e-6]
    labels, centres, log_rho, _ = run(x, K, d_c, density, assign)
    for f in range(2):
        check_densities(log_rho[f], quick_distances(x[f]), float(np.float32(d_c[f])), density)
        check_phases(x[f], labels[f], centres[f], log_rho[f], assign)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@ways
def test_kernel_is_the_definition_unless_rounding_decides(dtype, density, assign):
    x = torch.randn(4, 20, 40, generator=seeded(0)).to(dtype)
    d_c, compared = np.float32(0.3), 0
    oracles = [Peaks(f, d_c, density) for f in x]
    for K in (1, 3, 8):
        labels, centres, log_rho, _ = run(x, K, d_c.item(), density, assign)
        for f, oracle in enumerate(oracles):
            expected = [float(r.ln()) for r in oracle.rho]
            np.testing.assert_allclose(log_rho[f].double().numpy(), expected, rtol=0, atol=2e-5)
            if oracle.cluster(K, assign)[2] > 2e-6:
                assert_clusters(labels[f:f + 1], centres[f:f + 1], [oracle], K, assign)
                compared += 1
    assert compared >= 9                                                        # of 12


@pytest.mark.parametrize("N, axes, dtype, density, assign", [
    (49, 7, torch.float32, "exp", "parent"), (49, 7, torch.float32, "gauss", "nearest"),
    (64, 3, torch.float32, "exp", "parent"), (64, 3, LOW[-1], "exp", "nearest"),
    (16, 16, torch.float32, "exp", "nearest"), (16, 16, LOW[-1], "gauss", "parent"),
    (33, 1, torch.float32, "gauss", "parent"), (33, 1, LOW[-1], "exp", "nearest"),
    pytest.param(130, 9, torch.float32, "exp", "parent", marks=pytest.mark.gpu),
    pytest.param(130, 9, LOW[-1], "gauss", "parent", marks=pytest.mark.gpu),
], ids=str)
def test_kernel_ties_of_density_distance_and_gamma_go_to_the_lower_index(N, axes, dtype, density, assign):
    x, d_c = tied(2, N, axes).to(dtype), np.float32(0.02)
    oracles = [Peaks(f, d_c, density) for f in x]
    for K in cluster_counts(N)[1::3] if dtype == torch.float32 else [N // 7]:
        labels, centres, _, _ = run(x, K, d_c.item(), density, assign)
        assert_clusters(labels, centres, oracles, K, assign)


@pytest.mark.parametrize("N, K, assign", [(300, 30, "nearest"), (1024, 102, "parent")])
def test_kernel_takes_up_to_1024_tokens(N, K, assign):
    x = one_hot(1, N, seed=N, axes=16).to(LOW[-1])
    expected = density_peaks_ref(x.double(), K, torch.tensor([0.02], dtype=torch.float64), "exp", assign)
    labels, centres, log_rho, _ = run(x, K, 0.02, "exp", assign)
    assert labels.equal(expected[0]) and centres.equal(expected[1])
    torch.testing.assert_close(log_rho.double(), expected[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density, d_c, dtype", [
    ("exp", 1e-6, torch.float32), ("exp", 1e-3, LOW[-1]), ("gauss", 0.01, torch.float32),
], ids=str)
@pytest.mark.parametrize("assign", ["nearest", "parent"])
def test_kernel_densities_that_all_underflow_keep_their_exact_order(density, d_c, dtype, assign):
    for seed in range(2):
        x = stars(seed).to(dtype)
        oracle = Peaks(x[0], np.float32(d_c), density)
        for K in range(1 + seed, oracle.N + 1, 6):
            labels, centres, log_rho, _ = run(x, K, d_c, density, assign)
            assert_clusters(labels, centres, [oracle], K, assign)
            assert (log_rho < -100).all() and (log_rho > -math.inf).all()


@pytest.mark.parametrize("half", [8, 96])
@low
def test_kernel_follows_a_chain_of_parents_to_its_end(half, dtype):
    # A circle of vectors of signs, each with one more sign changed than the one before: all are equally dense, so the
    # parent of each is the one before it, and the last one is nearest to token 0.
    N = 2 * half
    changed = torch.arange(N)[:, None] - torch.arange(half)[None]
    x = torch.where((changed > 0) & (changed <= half), -1.0, 1.0)               # (N, half)
    C = 16 if half == 8 else 256
    x = torch.nn.functional.pad(x, (0, C - half), value=1.0)[None]
    for K in (1, 2, 3, half) if half == 8 else (3,):
        labels, centres, log_rho, _ = run(x.to(dtype), K, 2 / C / 40, "exp", "parent")
        assert centres.tolist() == [list(range(K))]
        assert labels.tolist() == [[min(i, K - 1) for i in range(N - 1)] + [0]]
        assert (log_rho == log_rho[0, 0]).all()


@pytest.mark.parametrize("density", ["exp", "gauss"])
def test_kernel_takes_a_spiral_as_one_chain_uphill(density):
    # Degrees on a circle with growing gaps, shuffled.
    gap = 1.2 + 0.03 * torch.arange(69)
    angle = torch.deg2rad(torch.cat([torch.zeros(1), gap.cumsum(0)])).double()
    p = torch.randperm(70, generator=seeded(1))
    x = torch.stack([angle.cos(), angle.sin()], -1)[p][None].float()
    for K in (1, 2):
        labels, centres, log_rho, _ = run(x, K, 1e-4, density, "parent")
        check_phases(x[0], labels[0], centres[0], log_rho[0], "parent")
        assert p[log_rho[0].argmax()] < 3 and p[centres[0]].min() < 3


@pytest.mark.parametrize("d_c", [1e-6, 0.02, 10.0])
@ways
def test_in_the_kernel_a_constant_frame_has_the_first_tokens_as_centres(d_c, density, assign):
    for token in (torch.zeros(8), torch.eye(8)[3] * 0.5, torch.tensor([1.0, -1, 1, 1, 0, 0, 0, 0])):
        expected = math.log(18) if token.any() else math.log(18) - (1 / d_c) ** (2 if density == "gauss" else 1)
        for K in (1, 4, 19) if (d_c, density) == (0.02, "exp") else (4,):
            labels, centres, log_rho, _ = run(token.expand(1, 19, 8), K, d_c, density, assign)
            assert centres.tolist() == [list(range(K))]
            assert labels.tolist() == [list(range(K)) + [0] * (19 - K)]
            np.testing.assert_allclose(log_rho.double().numpy(), expected, rtol=1e-6)
    x = torch.randn(24, generator=seeded(0)).expand(3, 33, 24)                  # rounding decides
    run(x, 5, d_c, density, assign)                                             # check_contract


@pytest.mark.parametrize("d_c", [1e-3, 0.3])
@pytest.mark.parametrize("density, power", [("exp", 1), ("gauss", 2)])
def test_kernel_densities_of_tokens_that_are_all_far_from_each_other(density, power, d_c):
    for x, distance in ((5 * torch.eye(5) - 1, 1.25), (torch.tensor([[1.0, 1], [-1, -1]]), 2.0)):
        log_rho = run(x[None], 1, d_c, density, "nearest")[2]
        expected = math.log(len(x) - 1) - (distance / np.float32(d_c)) ** power
        np.testing.assert_allclose(log_rho.double().numpy(), np.full((1, len(x)), expected), rtol=3e-7, atol=1e-6)


# A compiler fuses products and sums, the interpreter does not: rounding then differs from token to token.
@pytest.mark.parametrize("density, N", [("exp", 25), ("gauss", 20)])
@pytest.mark.gpu
def test_in_the_kernel_tokens_at_equal_distances_are_equally_dense_at_any_bandwidth(density, N):
    d_c = 0.5 * 0.7 ** torch.arange(6, 14)
    _, centres, log_rho, _ = run((torch.eye(N) + 0.5).expand(8, N, N), 3, d_c, density, "nearest")
    assert (log_rho == log_rho[:, :1]).all() and centres.tolist() == [[0, 1, 2]] * 8


@pytest.mark.parametrize("F", [1, 2, 3, 5])
def test_a_batch_of_any_size_takes_the_kernel_that_is_compiled(F, monkeypatch):
    # Triton compiles a kernel anew for a tensor that does not begin at a multiple of 16 bytes.
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.extend(a for a in args if isinstance(a, torch.Tensor))

    monkeypatch.setattr("kernels.density_peaks.density_peaks_kernel", Kernel())
    outputs = density_peaks_triton(torch.ones(F, 7, 3), 2, None, "exp", "parent")
    assert len(launched) == 9 and all(t.data_ptr() % 16 == 0 for t in (*launched, *outputs))


# float32: its tiles are as large as bandwidth's.
@pytest.mark.parametrize("shape, q", [((3, 20, 8), 0.02), ((1, 70, 9), 1.0), ((5, 2, 3), 0.5)], ids=str)
def test_the_kernels_own_bandwidth_gives_what_bandwidth_triton_does(shape, q):
    x = unkind(*shape, seed=shape[1])
    if shape[1] > 9:
        x[0, 1:] = x[0, 1:] + x[0, :1]                                          # frames with different bandwidths
    d_c = bandwidth_triton(x.to(DEVICE), q).cpu()
    K = max(1, shape[1] // 5)
    labels, centres, log_rho, _ = run(x, K, None, "exp", "nearest", quantile=q)
    torch.testing.assert_close(log_rho, run(x, K, d_c, "exp", "nearest")[2], rtol=1e-5, atol=1e-5)
    for f in range(shape[0]):
        check_phases(x[f], labels[f], centres[f], log_rho[f], "nearest")


@pytest.mark.parametrize("shape, q", [((3, 20, 8), "0.02"), ((1, 49, 40), "0.1"), ((1, 129, 16), "0.5")], ids=str)
def test_the_kernels_own_bandwidth_is_the_quantile(shape, q):
    x, N = unkind(*shape).to(LOW[-1]), shape[1]
    _, _, log_rho, _ = run(x, 1, None, "exp", "parent", quantile=float(q))
    for f in range(shape[0]):
        d = quick_distances(x[f])
        d_c = np.sort(d[np.triu_indices(N, 1)])[decimal_rank(q, N * (N - 1) // 2) - 1]
        if d_c > 1e-4:                                                          # rho grows with d_c
            lower, upper = (expected_log_rho(d, d_c * (1 + s / 250) + s * 2e-6, "exp") + s * (1e-5 + 2e-6 / d_c)
                            for s in (-1, 1))
            assert (lower <= log_rho[f].numpy()).all() and (log_rho[f].numpy() <= upper).all()


@pytest.mark.parametrize("density, assign, dtype", [
    (*WAYS[0], torch.float32), (*WAYS[3], torch.float32), (*WAYS[1], LOW[-1]), (*WAYS[2], LOW[-1]),
], ids=str)
def test_kernel_frames_are_independent_and_bits_the_same_every_run(density, assign, dtype):
    x = torch.cat([unkind(4, 19, 12, seed=4), torch.ones(1, 19, 12)]).to(dtype)
    d_c = torch.tensor([0.1, 0.5, 2.0, 0.01, 1e-6])
    out = run(x, 5, d_c, density, assign)
    flipped = [t.flip(0) for t in run(x.flip(0), 5, d_c.flip(0), density, assign)]
    for again in (run(x, 5, d_c, density, assign), flipped):
        assert all(a.equal(b) for a, b in zip(again, out, strict=True))
    alone = run(x[3:4], 5, d_c[3], density, assign)
    assert all(a[0].equal(b[3]) for a, b in zip(alone, out, strict=True))


def test_kernel_takes_any_strides():
    for x in strided(2, 9, 12):
        out, same = run(x, 4, 0.3, "exp", "parent"), run(x.contiguous(), 4, 0.3, "exp", "parent")
        assert all(a.equal(b) for a, b in zip(out, same, strict=True))


@ways
def test_in_the_kernel_permuted_tokens_give_permuted_clusters(density, assign):
    g = seeded(3)
    x, p = torch.randn(4, 21, 32, generator=g), torch.stack([torch.randperm(21, generator=g) for _ in range(4)])
    oracles, compared = [Peaks(f, np.float32(0.3), density) for f in x], 0
    for K in (1, 5):
        labels, centres, log_rho, _ = run(x, K, 0.3, density, assign)
        permuted = run(x.gather(1, p[..., None].expand_as(x)), K, 0.3, density, assign)
        torch.testing.assert_close(permuted[2], log_rho.gather(1, p), rtol=0, atol=2e-5)
        for f in range(4):
            if oracles[f].cluster(K, assign)[2] > 4e-6:
                assert p[f, permuted[1][f]].sort().values.equal(centres[f])
                assert p[f, permuted[1][f, permuted[0][f]]].equal(centres[f, labels[f, p[f]]])
                compared += 1
    assert compared >= 6                                                        # of 8


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("density, assign, K, d_c", [
    ("exp", "nearest", 10, 0.3), ("exp", "parent", 4, None), ("gauss", "nearest", 1, 0.3),
])
@pytest.mark.gpu
def test_kernel_lets_a_nan_affect_its_own_frame_which_keeps_K_clusters(bad, density, assign, K, d_c):
    x = torch.randn(5, 10, 8, generator=seeded(5))
    spoilt = x.clone()
    spoilt[1, [0, 7, 9], 3] = bad
    spoilt[3] = bad
    out, expected = run(spoilt, K, d_c, density, assign), run(x, K, d_c, density, assign)       # check_contract
    assert all(a[::2].equal(b[::2]) for a, b in zip(out, expected, strict=True))
    assert not out[2].isnan().any() and not out[3].isnan().any()


@pytest.mark.gpu
def test_kernel_chain_of_parents_ending_at_a_non_centre_takes_the_nearest():
    # A NaN is at distance 0 from every token: token 6 is the densest, everyone's parent, and no token has a gamma.
    x = torch.randn(1, 9, 8, generator=seeded(6))
    x[0, 6, 0] = math.nan
    labels, centres, log_rho, _ = run(x, 3, 0.1, "exp", "parent")
    assert log_rho.argmax() == 6 and centres.tolist() == [[0, 1, 2]]
    assert labels.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, math.inf])
@pytest.mark.parametrize("density, assign", WAYS[1:3])
def test_kernel_lets_an_invalid_bandwidth_affect_its_own_frame_only(bad, density, assign):
    x = torch.randn(3, 10, 8, generator=seeded(7))
    out = run(x, 4, torch.tensor([0.3, bad, 0.1]), density, assign)             # check_contract
    expected = run(x, 4, torch.tensor([0.3, 0.2, 0.1]), density, assign)
    assert all(a[::2].equal(b[::2]) for a, b in zip(out, expected, strict=True))
    assert not out[2].isnan().any()


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@ways
@pytest.mark.gpu
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype, density, assign):
    x = unkind(3, 70, 40).to("cuda", dtype)
    labels, centres, rho = density_peaks(x, 9, 0.3, density, assign)
    expected = run(x, 9, 0.3, density, assign)
    assert labels.cpu().equal(expected[0]) and centres.cpu().equal(expected[1])
    torch.testing.assert_close(rho.cpu(), expected[2].exp(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="d_c.*cuda.*cpu"):
        density_peaks(x, 9, torch.ones(3), density, assign)


@needs_cuda
def test_features_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (N * C) + 3, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    for d_c in (torch.full((len(x),), 0.3, device="cuda"), None):
        out = density_peaks_triton(x, 9, d_c, "exp", "parent")
        alone = density_peaks_triton(x[-3:], 9, None if d_c is None else d_c[-3:], "exp", "parent")
        assert all(a[-3:].equal(b) for a, b in zip(out, alone, strict=True))


@needs_cuda
@ways
def test_kernel_can_be_captured_in_a_cuda_graph(density, assign):
    x = unkind(3, 70, 40).cuda()
    out = captured(lambda: density_peaks(x, 9, 0.3, density, assign, check=False))
    assert all(a.equal(b) for a, b in zip(out, density_peaks(x, 9, 0.3, density, assign), strict=True))
    out = captured(lambda: density_peaks_triton(x, 9, None, density, assign))
    assert all(a.equal(b) for a, b in zip(out, density_peaks_triton(x, 9, None, density, assign), strict=True))
