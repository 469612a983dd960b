"""cluster_argmax against a loop over the tokens."""

import math

import pytest
import torch
from helpers.kernels import DEVICE, DTYPES, captured, low, needs_cuda, seeded

from kernels.cluster_argmax import cluster_argmax, cluster_argmax_ref, cluster_argmax_triton

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(2, 64, 8), (3, 49, 7), (1, 1, 1), (4, 13, 13), (5, 30, 1), (2, 196, 29)]     # F, N, K


def best_tokens(score, labels, K):
    """The definition: go through the tokens in order; a token replaces its cluster's best only if it is larger."""
    out = [[None] * K for _ in score]
    for best, scores, clusters in zip(out, score.tolist(), labels.tolist(), strict=True):
        for i, k in enumerate(clusters):
            if best[k] is None or scores[i] > scores[best[k]]:
                best[k] = i
    return torch.tensor(out)


def random_labels(F, N, K, g):
    """labels (F, N) in which each of K clusters has a token."""
    labels = torch.randint(0, K, (F, N), generator=g)
    for row in labels:
        row[torch.randperm(N, generator=g)[:K]] = torch.arange(K)
    return labels


def all_kinds_of_scores(F, N, g):
    """Scores (F, N): random, with many ties, with -inf, negative, large, and constant."""
    normal = torch.randn(F, N, generator=g)
    ties = torch.randint(-2, 3, (F, N), generator=g).float()
    constant = [torch.full((F, N), value) for value in (-math.inf, -3.0, 0.0)]
    return [normal, ties, ties.masked_fill(ties < 1, -math.inf), -normal.abs(), normal * 1e4, *constant]


def run_kernel(score, labels, K, frames=0):
    """The kernel's result, on the CPU."""
    best = cluster_argmax_triton(score.to(DEVICE), labels.to(DEVICE), K, frames).cpu()
    assert best.shape == (len(score), K) and best.dtype == torch.int64
    return best


both = pytest.mark.parametrize("run", [cluster_argmax, pytest.param(run_kernel, id="kernel")])


# ---------------------------------------------------------------------------------------------------------------------
# The reference and the kernel

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_loop_with_and_without_ties(shape, dtype):
    F, N, K = shape
    g = seeded(N)
    labels = random_labels(F, N, K, g)
    for score in all_kinds_of_scores(F, N, g):
        score = score.to(dtype)
        best = cluster_argmax(score, labels, K)
        assert best.dtype == torch.int64 and best.equal(best_tokens(score, labels, K))


@pytest.mark.parametrize("shape", [
    *SHAPES[:-1], pytest.param(SHAPES[-1], marks=pytest.mark.gpu), (2, 17, 3), (2, 16, 15), (1, 300, 299),
    (2, 1024, 102), (1, 1024, 1024), (1, 1000, 1)], ids=str)
@low
def test_kernel_is_the_loop_with_and_without_ties(shape, dtype):
    F, N, K = shape
    g = seeded(N)
    labels = random_labels(F, N, K, g)
    for score in all_kinds_of_scores(F, N, g)[:8 if N < 60 else 3]:
        score = score.to(dtype)
        assert run_kernel(score, labels, K).equal(best_tokens(score, labels, K))


@both
def test_infinite_scores_and_minus_zero(run):
    score = torch.tensor([[1.0, math.inf, -math.inf, math.inf, -math.inf, -0.0, 0.0, -1.0]])
    assert run(score, torch.tensor([[0, 0, 1, 0, 1, 2, 2, 2]]), 3).tolist() == [[1, 2, 5]]


def test_reference_distinguishes_scores_that_differ_in_fp64_only():
    score = torch.tensor([[1.0, 1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert cluster_argmax(score, torch.zeros(1, 3, dtype=torch.int64), 1).tolist() == [[1]]


@both
def test_permuted_tokens_give_permuted_results(run):
    g = seeded(0)
    score, labels, p = torch.randn(3, 40, generator=g), random_labels(3, 40, 9, g), torch.randperm(40, generator=g)
    assert p[run(score[:, p], labels[:, p], 9)].equal(run(score, labels, 9))


@both
def test_any_strides_are_taken_inputs_kept_and_results_repeatable(run):
    g = seeded(1)
    score, labels = torch.randn(40, 3, generator=g).T, random_labels(40, 8, 3, g)[:, :1].expand(40, 3).T
    labels = torch.where(torch.arange(40) < 3, torch.arange(40), labels)
    sliced = torch.stack([labels, labels], -1)[..., 0]
    before = score.clone(), labels.clone()
    assert not score.is_contiguous() and not sliced.is_contiguous()
    best = run(score, sliced, 3)
    assert best.equal(best_tokens(score, labels, 3)) and best.equal(run(score, sliced, 3))
    assert best.equal(cluster_argmax_ref(score, labels, 3))
    assert run(score[:1].expand(3, 40), sliced[:1].expand(3, 40), 3).equal(best[:1].expand(3, 3))
    for f in range(3):
        assert run(score[f:f + 1], sliced[f:f + 1], 3)[0].equal(best[f])
    assert score.equal(before[0]) and labels.equal(before[1])


S, L = torch.zeros(2, 4), torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize("score, labels, K, message", [
    (S[0], L[0], 2, r"cluster_argmax.*score.*\(F, N\).*\(4,\) torch.float32"),
    (S[:0], L[:0], 2, r"score.*\(F, N\).*\(0, 4\)"),
    (S.long(), L, 2, r"score.*\(2, 4\) torch.int64"),
    (S, L[:, :3], 2, r"labels.*\(2, 4\) int64.*\(2, 3\) torch.int64"),
    (S, L.int(), 2, r"labels.*\(2, 4\) int64.*\(2, 4\) torch.int32"),
    (S, L.to("meta"), 2, "labels.*cpu.*meta"),
    (S, L, 0, "K.*N = 4.* 0$"), (S, L, -1, "K.*N = 4.* -1$"), (S, L, 5, "K.*N = 4.* 5$"),
    (torch.tensor([[0.0, math.nan], [math.nan, math.nan]]), L[:, ::2] * 0, 1, "score.*3 NaN of 4"),
    (S, L, 1, r"labels.*\[0, K = 1\).*0 to 1"),
    (S, L - 1, 2, r"labels.*\[0, K = 2\).*-1 to 0"),
    (S, L, 3, "2 empty clusters of 6"),
    (S, L.clamp(max=0) + 1, 2, "2 empty clusters of 4"),
], ids=range(14))
def test_invalid_arguments_are_refused(score, labels, K, message):
    with pytest.raises(ValueError, match=message):
        cluster_argmax(score, labels, K)


def test_unchecked_a_nan_leaves_the_other_frames_of_the_reference_alone():
    g = seeded(2)
    score, labels = torch.randn(3, 12, generator=g), random_labels(3, 12, 4, g)
    expected = cluster_argmax(score, labels, 4)
    score[1, 5] = math.nan
    assert cluster_argmax(score, labels, 4, check=False)[::2].equal(expected[::2])


# ---------------------------------------------------------------------------------------------------------------------
# The kernel alone

@pytest.mark.parametrize("B, T, N, K", [
    (2, 3, 20, 4), (3, 1, 9, 9), pytest.param(1, 8, 196, 19, marks=pytest.mark.gpu), (2, 2, 1, 1), (1, 5, 33, 1)])
@low
def test_given_the_number_of_frames_kernel_returns_ascending_flat_ids(B, T, N, K, dtype):
    g = seeded(N)
    labels = random_labels(B * T, N, K, g)
    for score in (torch.randn(B * T, N, generator=g), torch.zeros(B * T, N), torch.full((B * T, N), -math.inf)):
        score = score.to(dtype)
        expected = best_tokens(score, labels, K).sort(1).values + N * (torch.arange(B * T) % T)[:, None]
        assert run_kernel(score, labels, K, frames=T).equal(expected)
        ids = expected.view(B, T * K)
        assert (ids.diff(dim=1) > 0).all() and ids.max() < T * N


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [0, 2])
def test_in_the_kernel_a_nan_is_the_lowest_score(frames):
    g = seeded(3)
    score, labels = torch.randn(4, 40, generator=g), random_labels(4, 40, 9, g)
    expected = run_kernel(score, labels, 9, frames)
    score[1, ::3] = math.nan
    score[3] = math.nan
    best = run_kernel(score, labels, 9, frames)
    assert best[::2].equal(expected[::2])
    lowest = best_tokens(score.nan_to_num(-math.inf), labels, 9)
    assert best.equal(lowest.sort(1).values + torch.tensor([[0], [40], [0], [40]]) if frames else lowest)


def test_kernel_gives_N_for_an_empty_cluster():
    assert run_kernel(torch.zeros(1, 3), torch.tensor([[0, 2, 2]]), 3).tolist() == [[0, 3, 1]]


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    g = seeded(4)
    score, labels = torch.randn(3, 70, generator=g).to("cuda", dtype), random_labels(3, 70, 9, g).cuda()
    assert cluster_argmax(score, labels, 9).equal(cluster_argmax_triton(score, labels, 9))
    assert captured(lambda: cluster_argmax(score, labels, 9, check=False)).equal(cluster_argmax(score, labels, 9))
    with pytest.raises(ValueError, match="score.*1024.*torch.float64"):
        cluster_argmax(score.double(), labels, 9)
    with pytest.raises(ValueError, match="labels.*cuda.*cpu"):
        cluster_argmax(score, labels.cpu(), 9)


@needs_cuda
@pytest.mark.parametrize("frames", [0, 8])
def test_scores_may_have_more_than_2_to_the_31_elements(frames):
    F, N = 2 ** 21 + 8, 1024
    score = torch.rand(F, N, device="cuda", dtype=torch.float16)
    labels = (torch.arange(N, device="cuda") % 3).expand(F, N)
    best = cluster_argmax_triton(score, labels, 3, frames)
    assert best[-8:].equal(cluster_argmax_triton(score[-8:], labels[-8:], 3, frames))
    if not frames:
        assert best[-8:].cpu().equal(best_tokens(score[-8:].cpu(), labels[-8:].cpu(), 3))
