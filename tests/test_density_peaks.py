"""density_peaks against rho and gamma themselves in 40 decimal digits: no logarithms and no underflow."""

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

import numpy as np
import pytest
import torch
from test_cosine_distance import (
    DEVICE,
    DTYPES,
    LOW,
    captured,
    distances,
    low,
    needs_cuda,
    quick_distances,
    strided,
    unkind,
)

from kernels.bandwidth import bandwidth_triton
from kernels.cosine_distance import cosine_distance
from kernels.density_peaks import density_peaks, density_peaks_ref, density_peaks_triton, follow, nearest

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DIGITS = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
WAYS = [(density, assign) for density in ("exp", "gauss") for assign in ("nearest", "parent")]
ways = pytest.mark.parametrize("density, assign", WAYS)


class Peaks:
    """One frame (N, C): which tokens are denser, and how much a rounding of the distances would have to change that."""

    def __init__(self, frame, d_c, density):
        self.d = distances(frame)
        self.N, d_c = len(self.d), float(d_c)
        with localcontext(DIGITS):
            kernel = {"exp": lambda a: (-a).exp(), "gauss": lambda a: (-a * a).exp()}[density]
            cell = {d: kernel(Decimal(d) / Decimal(d_c)) for d in set(self.d.ravel().tolist())}
            tokens = range(self.N)
            # Sorted, so that equal sums are equal whatever the order of their terms.
            self.rho = [sum(sorted(cell[self.d[i, j]] for j in tokens if j != i)) for i in tokens]
            self.delta, self.parent, second = [], [], []
            for i in tokens:
                denser = [j for j in tokens if self.rho[j] > self.rho[i] or (self.rho[j] == self.rho[i] and j < i)]
                by_distance = sorted(denser, key=lambda j: (self.d[i, j], j))
                self.parent.append(by_distance[0] if denser else i)
                self.delta.append(self.d[i, by_distance[0]] if denser else max(self.d[i]))
                second += [self.d[i, by_distance[1]] - self.delta[i]] if len(denser) > 1 else []
            self.gamma = [rho * Decimal(delta) for rho, delta in zip(self.rho, self.delta, strict=True)]
            by_rho = sorted(self.rho)
            gaps = [float(b / a - 1) * d_c for a, b in zip(by_rho, by_rho[1:], strict=False) if a > 0]
        self.order = sorted(tokens, key=self.gamma.__getitem__, reverse=True)   # a stable sort: ties stay ascending
        self.margin = min(gaps + second, default=1)
        self.d_c = d_c

    def cluster(self, K, assign):
        """-> labels, centres, margin: what a distance may be off by without changing them, roughly."""
        centres = sorted(self.order[:K])
        margin, labels = self.margin, []
        if K < self.N:
            last, next_best = self.gamma[self.order[K - 1]], self.gamma[self.order[K]]
            margin = min(margin, (float(DIGITS.divide(last, next_best)) - 1) * self.d_c if next_best else 0)
        for i in range(self.N):
            while assign == "parent" and i not in centres and self.parent[i] != i:
                i = self.parent[i]
            by_distance = sorted(centres, key=lambda c: (self.d[i, c], c))
            if i not in centres and K > 1:
                margin = min(margin, self.d[i, by_distance[1]] - self.d[i, by_distance[0]])
            labels.append(centres.index(i if i in centres else by_distance[0]))
        return labels, centres, margin


def one_hot(F, N, seed, kinds=7):
    """Axis-aligned tokens of several lengths, most of them with equals: distances are exactly 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    return torch.eye(16)[torch.randint(0, kinds, (F, N), generator=g)] * torch.randint(1, 4, (F, N, 1), generator=g)


def stars(seed):
    """
    Hubs of ever fewer leaves, in subspaces of their own, and two tokens far from all: x (1, N, 96) with the distances
    1/8 (hub to leaf, a leaf being its hub with one of 16 signs turned), 1/4 (leaf to leaf) and 1.

    Two densities tie exactly, or differ in how many tokens are at the nearest distance, or (leaves of two hubs) differ
    further out only, beyond any precision, and then the denser has the lower index.
    """
    g, blocks = torch.Generator().manual_seed(seed), []
    for block, leaves in enumerate([6, 5, 3, 2, 0, 0]):
        star = (torch.randint(0, 2, (16,), generator=g) * 2.0 - 1).repeat(leaves + 1, 1)
        for leaf, c in enumerate(torch.randperm(16, generator=g)[:leaves].tolist()):
            star[leaf + 1, c] *= -1
        blocks.append(torch.zeros(leaves + 1, 96))
        blocks[-1][:, 16 * block:16 * block + 16] = star[torch.randperm(leaves + 1, generator=g)]
    return torch.cat(blocks)[None]


def counts(N):
    return sorted({1, 2, max(1, N // 7), N // 2, N - 1, N} & set(range(1, N + 1)))


def check_contract(labels, centres, rho, F, N, K):
    assert labels.shape == rho.shape == (F, N) and centres.shape == (F, K)
    assert labels.dtype == centres.dtype == torch.int64 and rho.dtype == torch.float32
    assert centres.min() >= 0 and centres.max() < N and (centres.diff(dim=1) > 0).all()
    assert labels.gather(1, centres).equal(torch.arange(K).expand(F, K))
    assert labels.min() == 0 and labels.max() == K - 1


@pytest.mark.parametrize("shape", [(2, 32, 64), (1, 1, 8), (1, 2, 3), (3, 25, 40), (1, 196, 96)], ids=str)
@ways
def test_in_fp64_it_is_the_definition_on_random_tokens(shape, density, assign):
    F, N, C = shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(N)).double() + 0.3
    d_c = 0.25
    frames = [Peaks(f, d_c, density) for f in x]
    for K in counts(N) if N < 100 else [1, 29, 196]:
        labels, centres, rho = density_peaks(x, K, d_c, density, assign)
        check_contract(labels, centres, rho, F, N, K)
        np.testing.assert_allclose(rho.double().numpy(), [[float(r) for r in p.rho] for p in frames], rtol=2e-7)
        for f, p in enumerate(frames):
            want_labels, want_centres, _ = p.cluster(K, assign)
            assert centres[f].tolist() == want_centres
            assert labels[f].tolist() == want_labels


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@ways
def test_on_rounded_tokens_it_is_the_definition_wherever_rounding_cannot_decide(dtype, density, assign):
    x = torch.randn(10, 24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    d_c, compared = np.float32(0.3), 0
    for f, p in enumerate(Peaks(f, d_c, density) for f in x):
        rho = density_peaks(x, 1, d_c.item(), density, assign)[2][f]
        np.testing.assert_allclose(rho.double().numpy(), [float(r) for r in p.rho], rtol=2e-5)
        for K in (1, 3, 8, 24):
            want_labels, want_centres, margin = p.cluster(K, assign)
            if margin > 2e-6:
                labels, centres, _ = density_peaks(x[f:f + 1], K, d_c.item(), density, assign)
                assert centres[0].tolist() == want_centres
                assert labels[0].tolist() == want_labels
                compared += 1
    assert compared >= 36                                                       # of 40


@pytest.mark.parametrize("N, kinds", [(49, 7), (64, 3), (16, 16), (33, 1), (8, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ways
def test_ties_of_density_of_distance_and_of_gamma_go_to_the_lower_index(N, kinds, dtype, density, assign):
    x = one_hot(3, N, seed=N, kinds=kinds).to(dtype)
    if N == 64:
        x[:, ::5] *= -1                                                         # and at distance 2
        x[:, 7::20] = 0                                                         # and without direction
    d_c = np.float32(0.02)                                                      # even in fp64, 1 + e^-50 = 1
    frames = [Peaks(f, d_c, density) for f in x]
    for K in counts(N):
        labels, centres, rho = density_peaks(x, K, d_c.item(), density, assign)
        check_contract(labels, centres, rho, 3, N, K)
        for f, p in enumerate(frames):
            want_labels, want_centres, _ = p.cluster(K, assign)
            assert centres[f].tolist() == want_centres
            assert labels[f].tolist() == want_labels


@pytest.mark.parametrize("density, d_c, dtype", [
    ("exp", 1e-6, torch.float32), ("exp", 1e-6, torch.bfloat16), ("exp", 1e-3, torch.float16),
    ("exp", 1e-6, torch.float64), ("gauss", 0.01, torch.float32), ("gauss", 1e-6, torch.float64),
], ids=str)
@pytest.mark.parametrize("assign", ["nearest", "parent"])
@pytest.mark.parametrize("seed", range(3))
def test_where_every_density_underflows_the_order_is_still_that_of_the_exact_ones(density, d_c, dtype, assign, seed):
    x = stars(seed).to(dtype)
    p = Peaks(x[0], d_c if dtype == torch.float64 else np.float32(d_c), density)
    assert np.float32(max(p.rho)) == 0
    for K in range(1, p.N + 1):
        labels, centres, rho = density_peaks(x, K, d_c, density, assign)
        want_labels, want_centres, _ = p.cluster(K, assign)
        assert centres[0].tolist() == want_centres
        assert labels[0].tolist() == want_labels
        assert (rho == 0).all()


@ways
def test_a_bandwidth_of_1e_6_is_taken_as_it_is(density, assign):
    angle = 1e-3 * torch.randn(2, 25, generator=torch.Generator().manual_seed(7)).double()      # distances of 1e-6
    x = torch.stack([angle.cos(), angle.sin()], -1)
    for f, p in enumerate(Peaks(f, 1e-6, density) for f in x):
        for K in (1, 4, 24):
            labels, centres, rho = density_peaks(x[f:f + 1], K, 1e-6, density, assign)
            np.testing.assert_allclose(rho[0].double().numpy(), [float(r) for r in p.rho], rtol=2e-7)
            assert (labels[0].tolist(), centres[0].tolist()) == p.cluster(K, assign)[:2]


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
    g = torch.Generator().manual_seed(0)
    for token in (torch.zeros(24), torch.randn(24, generator=g), torch.full((24,), 1e-3)):
        for K in (1, 4, 33):
            check_contract(*density_peaks(token.expand(2, 33, 24), K, d_c, density, assign), 2, 33, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ways
def test_whatever_the_tokens_there_are_K_clusters_and_each_has_its_centre(dtype, density, assign):
    x = unkind(4, 50, 24, seed=1)
    x[1] = x[1, :5].repeat(10, 1)                                               # each token ten times
    x[2, 10:] = x[2, 0] + 1e-3 * x[2, 10:]
    x[3] = x[3, 0] + 1e-4 * x[3]                                                # rounding decides nearly everything
    x = x.to(dtype)
    for d_c in (1e-6, 0.02, 0.3, 100.0, torch.tensor([1e-6, 0.1, 2.0, 1e-5])):
        for K in (1, 2, 11, 49, 50):
            check_contract(*density_peaks(x, K, d_c, density, assign), 4, 50, K)


def test_a_chain_of_parents_that_ends_at_a_peak_which_is_no_centre_takes_the_centre_nearest_to_the_peak():
    # Exact arithmetic makes the peak a centre, so only the step behind `parent` can be shown such chains.
    g = torch.Generator().manual_seed(2)
    for N, K in [(2, 1), (9, 2), (40, 1), (40, 7), (63, 30), (64, 5)]:
        d = torch.randint(1, 6, (3, N, N), generator=g).float()                 # small whole numbers: many ties
        d = d.tril(-1) + d.tril(-1).mT
        parent, centres = torch.empty(3, N, dtype=torch.int64), torch.empty(3, K, dtype=torch.int64)
        for f in range(3):
            by_density = torch.randperm(N, generator=g).tolist()
            for place, i in enumerate(by_density):
                # Frame 0 is one chain through all tokens, the longest there can be.
                first = place - 1 if f == 0 else 0
                parent[f, i] = by_density[torch.randint(first, place, (), generator=g)] if place else i
            below = torch.tensor(by_density[1:])
            centres[f] = (below[-K:] if f == 0 else below[torch.randperm(N - 1, generator=g)[:K]]).sort().values
        labels = follow(parent, centres, d)
        for f in range(3):
            mine = centres[f].tolist()
            for i in range(N):
                j = i
                while j not in mine and parent[f, j] != j:
                    j = parent[f, j].item()
                c = j if j in mine else min(mine, key=lambda c: (d[f, j, c].item(), c))
                assert labels[f, i] == mine.index(c)


def test_a_centre_is_its_own_even_at_distance_0_from_another():
    d = torch.zeros(1, 4, 4)
    assert nearest(torch.tensor([[1, 3]]), d).tolist() == [[0, 0, 0, 1]]
    x = torch.eye(4)[torch.tensor([[0, 0, 0, 1]])]
    for assign in ("nearest", "parent"):
        labels, centres, _ = density_peaks(x, 3, 0.02, "exp", assign)
        assert centres.tolist() == [[0, 1, 3]] and labels.tolist() == [[0, 1, 0, 2]]


def test_the_two_assignments_differ_where_the_nearest_centre_is_not_the_one_uphill():
    # Degrees on a circle: a ridge leads from 44 up to the peak near 0, but the centre on the hill of 61 is nearer.
    angle = torch.deg2rad(torch.tensor([[0.0, 1, 2, 8, 15, 23, 32, 60, 61, 62, 44]]))
    x = torch.stack([angle.cos(), angle.sin()], -1).double()
    p = Peaks(x[0], 0.01, "exp")
    got = {assign: density_peaks(x, 2, 0.01, "exp", assign)[0][0].tolist() for assign in ("nearest", "parent")}
    assert got["nearest"] == p.cluster(2, "nearest")[0] != p.cluster(2, "parent")[0] == got["parent"]


@ways
def test_permuted_tokens_give_permuted_answers(density, assign):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 49, 32, generator=g).double()
    moves = torch.stack([torch.randperm(49, generator=g) for _ in range(4)])
    for K in (1, 7, 48, 49):
        labels, centres, rho = density_peaks(x, K, 0.3, density, assign)
        moved = density_peaks(x.gather(1, moves[..., None].expand_as(x)), K, 0.3, density, assign)
        assert moves.gather(1, moved[1]).sort(1).values.equal(centres)
        own = centres.gather(1, labels).gather(1, moves)                        # the centre that each moved token had
        assert moves.gather(1, moved[1].gather(1, moved[0])).equal(own)
        torch.testing.assert_close(moved[2], rho.gather(1, moves), rtol=1e-6, atol=0)


@ways
def test_frames_do_not_know_of_each_other_and_the_same_input_gives_the_same_answer(density, assign):
    x = torch.cat([torch.randn(3, 25, 32, generator=torch.Generator().manual_seed(4)), torch.ones(1, 25, 32)])
    d_c = torch.tensor([0.1, 0.5, 2.0, 1e-6])
    labels, centres, rho = density_peaks(x, 5, d_c, density, assign)
    again = density_peaks(x, 5, d_c, density, assign)
    assert labels.equal(again[0]) and centres.equal(again[1]) and rho.equal(again[2])
    for f in range(4):
        alone = density_peaks(x[f:f + 1], 5, d_c[f].item(), density, assign)
        assert alone[0][0].equal(labels[f]) and alone[1][0].equal(centres[f])
        torch.testing.assert_close(alone[2][0], rho[f], rtol=1e-5, atol=0)
    turned = density_peaks(x.flip(0), 5, d_c.flip(0).double(), density, assign)
    assert turned[0].flip(0).equal(labels) and turned[1].flip(0).equal(centres)


def test_exp_and_nearest_are_the_defaults():
    x = torch.randn(2, 49, 16, generator=torch.Generator().manual_seed(5))
    ways = {way: density_peaks(x, 6, 0.3, *way)[0] for way in WAYS}
    assert density_peaks(x, 6, 0.3)[0].equal(ways["exp", "nearest"])
    assert not any(ways["exp", "nearest"].equal(labels) for way, labels in ways.items() if way != ("exp", "nearest"))


def test_a_single_token_is_its_own_cluster_of_density_0():
    for density, assign in WAYS:
        labels, centres, rho = density_peaks(torch.ones(2, 1, 4), 1, 0.1, density, assign)
        assert labels.tolist() == centres.tolist() == [[0], [0]] and rho.tolist() == [[0.0], [0.0]]


@ways
def test_strides_do_not_matter_and_there_is_no_gradient(density, assign):
    x = torch.randn(32, 25, 3, generator=torch.Generator().manual_seed(6), requires_grad=True).permute(2, 1, 0)
    labels, centres, rho = density_peaks(x, 5, 0.3, density, assign)
    same = density_peaks(x.contiguous(), 5, 0.3, density, assign)
    assert labels.equal(same[0]) and centres.equal(same[1]) and not rho.requires_grad
    torch.testing.assert_close(rho, same[2], rtol=1e-5, atol=0)


def test_rho_counts_the_tokens_at_distance_0_and_not_the_token_itself():
    x = torch.eye(4)[torch.tensor([[0, 1, 0, 0, 2]])]
    far = {"exp": math.exp(-2), "gauss": math.exp(-4)}
    for density in far:
        want = [2 + 2 * far[density], 4 * far[density], 2 + 2 * far[density], 2 + 2 * far[density], 4 * far[density]]
        torch.testing.assert_close(density_peaks(x, 2, 0.5, density)[2][0], torch.tensor(want), rtol=1e-6, atol=0)
    assert cosine_distance(x)[0, 0].tolist() == [0, 1, 0, 0, 1]


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize("x, K, d_c, words, message", [
    (torch.ones(3, 4), 1, 0.1, (), r"density_peaks wants \(F, N, C\), got \(3, 4\)"),
    (torch.ones(0, 3, 4), 1, 0.1, (), r"no empty axis in \(F, N, C\), got \(0, 3, 4\)"),
    (X.long(), 1, 0.1, (), r"floating-point values, got torch.int64"),
    (X * math.nan, 1, 0.1, (), r"finite values, got 24 NaN or infinite of 24"),
    (X, 0, 0.1, (), r"K from 1 to N = 3, got 0"),
    (X, 4, 0.1, (), r"K from 1 to N = 3, got 4"),
    (X, 2, 0, (), r"d_c wants positive numbers, got 0"),
    (X, 2, -1.5, (), r"d_c wants positive numbers, got -1.5"),
    (X, 2, math.nan, (), r"d_c wants positive numbers, got nan"),
    (X, 2, torch.tensor([0.1, 0.0]), (), r"d_c wants positive numbers, got 0"),
    (X, 2, torch.ones(3), (), r"d_c wants one number or \(2,\), got \(3,\)"),
    (X, 2, torch.ones(2, 3), (), r"d_c wants one number or \(2,\), got \(2, 3\)"),
    (X, 2, 0.1, ("gaussian",), r"'exp' and 'gauss', got 'gaussian'"),
    (X, 2, 0.1, ("exp", "peak"), r"'nearest' centre or the 'parent's, got 'peak'"),
], ids=range(14))
def test_impossible_arguments_are_refused_by_name(x, K, d_c, words, message):
    with pytest.raises(ValueError, match=message):
        density_peaks(x, K, d_c, *words)


def test_unchecked_on_a_cpu_the_reference_clusters_the_frames_without_a_NaN_as_ever():
    x = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    want = density_peaks(x, 3, 0.3)
    x[1, 4, 2] = math.nan
    got = density_peaks(x, 3, 0.3, check=False)
    assert all(a[::2].equal(b[::2]) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

def run(x, K, d_c, density, assign, **kwargs):
    """The kernel's labels, centres, log rho and inverse lengths, on the CPU. d_c: a number, one a frame, or None."""
    if d_c is not None:
        d_c = torch.as_tensor(d_c, dtype=torch.float32).expand(len(x)).contiguous().to(DEVICE)
    out = [t.cpu() for t in density_peaks_triton(x.to(DEVICE), K, d_c, density, assign, **kwargs)]
    check_contract(*out[:3], *x.shape[:2], K)
    return out


def log_rho(d, d_c, density):
    """d (N, N) fp64 -> (N,)."""
    a = (d / d_c) ** (2 if density == "gauss" else 1)
    np.fill_diagonal(a, np.inf)
    least = a.min(1)
    least[np.isinf(least)] = 0
    with np.errstate(divide="ignore"):
        return np.log(np.exp(least[:, None] - a).sum(1)) - least


def check_densities(got, d, d_c, density):
    """Distances are good to 1e-6, and what that makes of log rho is what it may be off by."""
    want, off = log_rho(d, d_c, density), 1e-6 / d_c
    if density == "gauss":
        off *= 2 * d.max() / d_c + off
    np.testing.assert_allclose(got.double().numpy(), want, rtol=1e-6, atol=2e-6 + off)


def check_steps(frame, labels, centres, rho, assign, off=1e-6):
    """
    Each step follows from the ones before, on any tokens: what each does is known but for distances nearly equal.

    frame (N, C); labels (N,), centres (K,), rho (N,), the logarithms, as the kernel has them.
    """
    d, N = quick_distances(frame), len(frame)
    labels, centres, rho = labels.tolist(), centres.tolist(), rho.double().numpy()
    if N == 1:
        return
    by_density = np.lexsort((np.arange(N), -rho))
    place = np.empty(N, int)
    place[by_density] = np.arange(N)
    near = np.where(place[None] < place[:, None], d, np.inf)                    # to the denser tokens
    delta = near.min(1)
    peak = by_density[0]
    delta[peak] = d[peak].max()

    with np.errstate(divide="ignore"):
        low, high = np.log(np.maximum(delta - off, 0)), np.log(delta + off)
    slack = 1e-6 + 2e-7 * (abs(rho) + abs(np.log(delta + off)))
    others = np.setdiff1d(np.arange(N), centres)
    if len(others):
        assert (rho + high + slack)[centres].min() >= (rho + low - slack)[others].max()
    for i in others:
        if assign == "nearest" or i == peak:
            assert d[i, centres[labels[i]]] <= d[i, centres].min() + 2 * off
        else:
            assert labels[i] in {labels[j] for j in np.flatnonzero(near[i] <= delta[i] + 2 * off)}


# Whole blocks, ragged ones, two and three; several turns of a program (the interpreter has two); the model's C once.
@pytest.mark.parametrize("shape", [
    (1, 1, 8), (5, 2, 3), (3, 3, 8), (1, 16, 100), (3, 17, 8), (2, 49, 40), (1, 64, 64), (1, 129, 96), (1, 196, 768),
    (1, 256, 8),
], ids=str)
@low
def test_each_step_of_the_kernel_is_right_given_those_before(shape, dtype):
    F, N, C = shape
    x, d_c = unkind(*shape, seed=N).to(dtype), np.float32(0.2)
    square = x.double().square().sum(-1).numpy()
    want_inv = np.where(square > 0, 1 / np.sqrt(np.where(square > 0, square, 1)), 0)
    for way, (density, assign) in enumerate(WAYS):
        if N > 3 and way % 2 != (N + (dtype == torch.float32)) % 2 or N > 100 and way > 1:
            continue
        K = counts(N)[(way + N) % len(counts(N))] if N < 100 else N // 7
        labels, centres, rho, inv = run(x, K, d_c, density, assign)
        np.testing.assert_allclose(inv.double().numpy(), want_inv, rtol=1e-6, atol=0)
        for f in range(F):
            check_densities(rho[f], quick_distances(x[f]), float(d_c), density)
            check_steps(x[f], labels[f], centres[f], rho[f], assign)


@pytest.mark.parametrize("K", [1, 2, 5, 34, 35])
@ways
def test_each_step_of_the_kernel_is_right_for_any_number_of_clusters(K, density, assign):
    x = torch.randn(2, 35, 12, generator=torch.Generator().manual_seed(K))
    x[1] = x[1, 0] + 1e-3 * x[1]                                                # rounding decides nearly everything
    d_c = [0.3, 1e-6]
    labels, centres, rho, _ = run(x, K, d_c, density, assign)
    for f in range(2):
        check_densities(rho[f], quick_distances(x[f]), float(np.float32(d_c[f])), density)
        check_steps(x[f], labels[f], centres[f], rho[f], assign)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@ways
def test_the_kernel_is_the_definition_wherever_rounding_cannot_decide(dtype, density, assign):
    x = torch.randn(4, 20, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    d_c, compared = np.float32(0.3), 0
    frames = [Peaks(f, d_c, density) for f in x]
    for K in (1, 3, 8):
        labels, centres, rho, _ = run(x, K, d_c.item(), density, assign)
        for f, p in enumerate(frames):
            np.testing.assert_allclose(rho[f].double().numpy(), [float(r.ln()) for r in p.rho], rtol=0, atol=2e-5)
            want_labels, want_centres, margin = p.cluster(K, assign)
            if margin > 2e-6:
                assert (labels[f].tolist(), centres[f].tolist()) == (want_labels, want_centres)
                compared += 1
    assert compared >= 9                                                        # of 12


@pytest.mark.parametrize("N, kinds", [(49, 7), (64, 3), (16, 16), (33, 1), (130, 9)])
@low
@ways
def test_in_the_kernel_ties_of_density_of_distance_and_of_gamma_go_to_the_lower_index(N, kinds, dtype, density, assign):
    if N > 40 and (density, assign) not in (WAYS[1:3] if dtype == torch.float32 else WAYS[::3]):
        return
    x = one_hot(2, N, seed=N, kinds=kinds)
    if N == 64:
        x[:, ::5] *= -1                                                         # and at distance 2
        x[:, 7::20] = 0                                                         # and without direction
    x, d_c = x.to(dtype), np.float32(0.02)
    frames = [Peaks(f, d_c, density) for f in x]
    for K in counts(N)[1::3] if dtype == torch.float32 else [N // 7]:
        labels, centres, _, _ = run(x, K, d_c.item(), density, assign)
        for f, p in enumerate(frames):
            assert (labels[f].tolist(), centres[f].tolist()) == p.cluster(K, assign)[:2]


@pytest.mark.parametrize("N, K, assign", [(300, 30, "nearest"), (1024, 102, "parent")])
def test_the_kernel_takes_as_many_tokens_as_there_may_be(N, K, assign):
    x = one_hot(1, N, seed=N, kinds=16).to(LOW[-1])
    want = density_peaks_ref(x.double(), K, torch.tensor([0.02], dtype=torch.float64), "exp", assign)
    labels, centres, rho, _ = run(x, K, 0.02, "exp", assign)
    assert labels.equal(want[0]) and centres.equal(want[1])
    torch.testing.assert_close(rho.double(), want[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density, d_c, dtype", [
    ("exp", 1e-6, torch.float32), ("exp", 1e-3, LOW[-1]), ("gauss", 0.01, torch.float32),
], ids=str)
@pytest.mark.parametrize("assign", ["nearest", "parent"])
def test_in_the_kernel_where_every_density_underflows_the_order_is_still_that_of_the_exact_ones(
        density, d_c, dtype, assign):
    for seed in range(2):
        x = stars(seed).to(dtype)
        p = Peaks(x[0], np.float32(d_c), density)
        for K in range(1 + seed, p.N + 1, 6):
            labels, centres, rho, _ = run(x, K, d_c, density, assign)
            assert (labels[0].tolist(), centres[0].tolist()) == p.cluster(K, assign)[:2]
            assert (rho < -100).all() and (rho > -math.inf).all()


@pytest.mark.parametrize("half", [8, 96])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_the_kernel_follows_a_chain_of_parents_to_its_end(half, dtype):
    # A circle of vectors of signs, each with one more sign turned than the one before: all are equally dense, so each
    # is the child of the one before it, and the last one is the nearer to 0.
    N = 2 * half
    turn = torch.arange(N)[:, None] - torch.arange(half)[None]
    x = torch.where((turn > 0) & (turn <= half), -1.0, 1.0)                     # (N, half)
    C = 16 if half == 8 else 256
    x = torch.nn.functional.pad(x, (0, C - half), value=1.0)[None]
    for K in (1, 2, 3, half) if half == 8 else (3,):
        labels, centres, rho, _ = run(x.to(dtype), K, 2 / C / 40, "exp", "parent")
        assert centres.tolist() == [list(range(K))]
        assert labels.tolist() == [[min(i, K - 1) for i in range(N - 1)] + [0]]
        assert (rho == rho[0, 0]).all()


@pytest.mark.parametrize("density", ["exp", "gauss"])
def test_in_the_kernel_a_spiral_is_one_chain_uphill(density):
    # Degrees on a circle, ever further apart, in any order.
    g = torch.Generator().manual_seed(1)
    gap = 1.2 + 0.03 * torch.arange(69)
    angle = torch.deg2rad(torch.cat([torch.zeros(1), gap.cumsum(0)])).double()
    p = torch.randperm(70, generator=g)
    x = torch.stack([angle.cos(), angle.sin()], -1)[p][None].float()
    for K in (1, 2):
        labels, centres, rho, _ = run(x, K, 1e-4, density, "parent")
        check_steps(x[0], labels[0], centres[0], rho[0], "parent")
        assert p[rho[0].argmax()] < 3 and p[centres[0]].min() < 3


@pytest.mark.parametrize("d_c", [1e-6, 0.02, 10.0])
@ways
def test_in_the_kernel_a_constant_frame_has_the_first_tokens_as_centres(d_c, density, assign):
    for token in (torch.zeros(8), torch.eye(8)[3] * 0.5, torch.tensor([1.0, -1, 1, 1, 0, 0, 0, 0])):
        rho = math.log(18) if token.any() else math.log(18) - (1 / d_c) ** (2 if density == "gauss" else 1)
        for K in (1, 4, 19) if (d_c, density) == (0.02, "exp") else (4,):
            out = run(token.expand(1, 19, 8), K, d_c, density, assign)
            assert out[1].tolist() == [list(range(K))]
            assert out[0].tolist() == [list(range(K)) + [0] * (19 - K)]
            np.testing.assert_allclose(out[2].double().numpy(), rho, rtol=1e-6)
    x = torch.randn(24, generator=torch.Generator().manual_seed(0)).expand(3, 33, 24)       # rounding decides
    run(x, 5, d_c, density, assign)


def test_a_single_token_has_density_0_in_the_kernel_too():
    for density, assign in WAYS:
        for d_c in (0.1, None):
            labels, centres, rho, _ = run(torch.ones(3, 1, 4), 1, d_c, density, assign)
            assert labels.tolist() == centres.tolist() == [[0]] * 3 and rho.tolist() == [[-math.inf]] * 3


# float32: its blocks are as large as bandwidth's.
@pytest.mark.parametrize("shape, q", [((3, 20, 8), 0.02), ((1, 70, 9), 1.0), ((5, 2, 3), 0.5)], ids=str)
def test_a_bandwidth_the_kernel_finds_is_the_one_it_could_be_given(shape, q):
    x = unkind(*shape, seed=shape[1])
    if shape[1] > 9:
        x[0, 1:] = x[0, 1:] + x[0, :1]                                          # each frame has its own
    d_c = bandwidth_triton(x.to(DEVICE), q).cpu()
    K = max(1, shape[1] // 5)
    labels, centres, rho, _ = run(x, K, None, "exp", "nearest", quantile=q)
    torch.testing.assert_close(rho, run(x, K, d_c, "exp", "nearest")[2], rtol=1e-5, atol=1e-5)
    for f in range(shape[0]):
        check_steps(x[f], labels[f], centres[f], rho[f], "nearest")


@pytest.mark.parametrize("shape, q", [((3, 20, 8), "0.02"), ((1, 49, 40), "0.1"), ((1, 129, 16), "0.5")], ids=str)
def test_a_bandwidth_the_kernel_finds_is_that_quantile(shape, q):
    x = unkind(*shape).to(LOW[-1])
    N, top, bottom = shape[1], *map(int, (q.replace(".", ""), 10 ** len(q.partition(".")[2])))
    _, _, rho, _ = run(x, 1, None, "exp", "parent", quantile=float(q))
    for f in range(shape[0]):
        d = quick_distances(x[f])
        d_c = np.sort(d[np.triu_indices(N, 1)])[-(-top * (N * (N - 1) // 2) // bottom) - 1]
        if d_c > 1e-4:                                                          # rho grows with d_c
            ends = [log_rho(d, d_c * (1 + s / 250) + s * 2e-6, "exp") + s * (1e-5 + 2e-6 / d_c) for s in (-1, 1)]
            assert (ends[0] <= rho[f].numpy()).all() and (rho[f].numpy() <= ends[1]).all()


@pytest.mark.parametrize("density, assign, dtype", [
    (*WAYS[0], torch.float32), (*WAYS[3], torch.float32), (*WAYS[1], LOW[-1]), (*WAYS[2], LOW[-1]),
], ids=str)
def test_frames_of_the_kernel_do_not_know_of_each_other_and_have_the_same_bits_every_run(density, assign, dtype):
    x = torch.cat([unkind(4, 19, 12, seed=4), torch.ones(1, 19, 12)]).to(dtype)
    d_c = torch.tensor([0.1, 0.5, 2.0, 0.01, 1e-6])
    out = run(x, 5, d_c, density, assign)
    turned = [t.flip(0) for t in run(x.flip(0), 5, d_c.flip(0), density, assign)]
    for again in (run(x, 5, d_c, density, assign), turned):
        assert all(a.equal(b) for a, b in zip(again, out, strict=True))
    alone = run(x[3:4], 5, d_c[3], density, assign)
    assert all(a[0].equal(b[3]) for a, b in zip(alone, out, strict=True))


def test_the_kernel_takes_any_strides():
    for x in strided(2, 9, 12):
        out, same = run(x, 4, 0.3, "exp", "parent"), run(x.contiguous(), 4, 0.3, "exp", "parent")
        assert all(a.equal(b) for a, b in zip(out, same, strict=True))


@ways
def test_in_the_kernel_permuted_tokens_give_permuted_answers(density, assign):
    g = torch.Generator().manual_seed(3)
    x, moves = torch.randn(4, 21, 32, generator=g), torch.stack([torch.randperm(21, generator=g) for _ in range(4)])
    compared = 0
    for K in (1, 5):
        labels, centres, rho, _ = run(x, K, 0.3, density, assign)
        moved = run(x.gather(1, moves[..., None].expand_as(x)), K, 0.3, density, assign)
        torch.testing.assert_close(moved[2], rho.gather(1, moves), rtol=0, atol=2e-5)
        for f in range(4):
            if Peaks(x[f], np.float32(0.3), density).cluster(K, assign)[2] > 4e-6:
                assert moves[f, moved[1][f]].sort().values.equal(centres[f])
                assert moves[f, moved[1][f, moved[0][f]]].equal(centres[f, labels[f, moves[f]]])
                compared += 1
    assert compared >= 6                                                        # of 8


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("density, assign", WAYS[:3])
def test_in_the_kernel_a_NaN_or_an_infinity_spoils_its_own_frame_only_and_that_still_has_K_clusters(
        bad, density, assign):
    x = torch.randn(5, 10, 8, generator=torch.Generator().manual_seed(5))
    spoilt = x.clone()
    spoilt[1, [0, 7, 9], 3] = bad
    spoilt[3] = bad
    for K, d_c in [(1, 0.3)] if density == "gauss" else [(4, None)] if assign == "parent" else [(10, 0.3)]:
        out, want = run(spoilt, K, d_c, density, assign), run(x, K, d_c, density, assign)       # check_contract
        assert all(a[::2].equal(b[::2]) for a, b in zip(out, want, strict=True))
        assert not out[2].isnan().any() and not out[3].isnan().any()


def test_in_the_kernel_a_chain_that_ends_at_a_peak_which_is_no_centre_takes_the_centre_nearest_to_the_peak():
    # A NaN is at distance 0 from every token: token 6 is the densest, everyone's parent, and nothing has a gamma.
    x = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(6))
    x[0, 6, 0] = math.nan
    labels, centres, rho, _ = run(x, 3, 0.1, "exp", "parent")
    assert rho.argmax() == 6 and centres.tolist() == [[0, 1, 2]]
    assert labels.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf])
@pytest.mark.parametrize("density, assign", WAYS[1:3])
def test_in_the_kernel_a_bandwidth_that_is_none_spoils_its_own_frame_only(bad, density, assign):
    x = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(7))
    out = run(x, 4, torch.tensor([0.3, bad, 0.1]), density, assign)             # check_contract
    want = run(x, 4, torch.tensor([0.3, 0.2, 0.1]), density, assign)
    assert all(a[::2].equal(b[::2]) for a, b in zip(out, want, strict=True))
    assert not out[2].isnan().any()


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@ways
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype, density, assign):
    x = unkind(3, 70, 40).to("cuda", dtype)
    labels, centres, rho = density_peaks(x, 9, 0.3, density, assign)
    want = run(x, 9, 0.3, density, assign)
    assert labels.cpu().equal(want[0]) and centres.cpu().equal(want[1])
    torch.testing.assert_close(rho.cpu(), want[2].exp(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="d_c wants to be on cuda"):
        density_peaks(x, 9, torch.ones(3), density, assign)


@needs_cuda
def test_on_a_gpu_the_features_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (N * C) + 3, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    for d_c in (torch.full((len(x),), 0.3, device="cuda"), None):
        out = density_peaks_triton(x, 9, d_c, "exp", "parent")
        alone = density_peaks_triton(x[-3:], 9, None if d_c is None else d_c[-3:], "exp", "parent")
        assert all(a[-3:].equal(b) for a, b in zip(out, alone, strict=True))


@needs_cuda
@ways
def test_the_kernel_can_be_captured_in_a_cuda_graph(density, assign):
    x = unkind(3, 70, 40).cuda()
    out = captured(lambda: density_peaks(x, 9, 0.3, density, assign, check=False))
    assert all(a.equal(b) for a, b in zip(out, density_peaks(x, 9, 0.3, density, assign), strict=True))
    out = captured(lambda: density_peaks_triton(x, 9, None, density, assign))
    assert all(a.equal(b) for a, b in zip(out, density_peaks_triton(x, 9, None, density, assign), strict=True))
