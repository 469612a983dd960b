"""cluster_argmax against a loop over the tokens."""

import math

import pytest
import torch
from test_cosine_distance import DEVICE, captured, low, needs_cuda

from kernels.cluster_argmax import cluster_argmax, cluster_argmax_ref, cluster_argmax_triton

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def best(score, labels, K):
    """The first of the largest: tokens are looked at from low to high, and one must be better to displace another."""
    out = [[None] * K for _ in score]
    for found, s, l in zip(out, score.tolist(), labels.tolist(), strict=True):
        for i, k in enumerate(l):
            if found[k] is None or s[i] > s[found[k]]:
                found[k] = i
    return torch.tensor(out)


def clusters(F, N, K, g):
    """labels (F, N) in which each of K clusters has a token."""
    labels = torch.randint(0, K, (F, N), generator=g)
    for row in labels:
        row[torch.randperm(N, generator=g)[:K]] = torch.arange(K)
    return labels


@pytest.mark.parametrize("shape", [(2, 64, 8), (3, 49, 7), (1, 1, 1), (4, 13, 13), (5, 30, 1), (2, 196, 29)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_loop_with_and_without_ties(shape, dtype):
    F, N, K = shape
    g = torch.Generator().manual_seed(N)
    labels = clusters(F, N, K, g)
    normal = torch.randn(F, N, generator=g)
    few = torch.randint(-2, 3, (F, N), generator=g).float()
    empty_sums = few.masked_fill(few < 1, -math.inf)
    constant = [torch.full((F, N), value) for value in (-math.inf, -3.0, 0.0)]
    for score in (normal, few, empty_sums, -normal.abs(), normal * 1e4, *constant):
        score = score.to(dtype)
        kept = cluster_argmax(score, labels, K)
        assert kept.dtype == torch.int64
        assert kept.equal(best(score, labels, K))


def test_an_infinite_score_is_the_best_of_its_cluster():
    score = torch.tensor([[1.0, math.inf, -math.inf, math.inf, -math.inf]])
    assert cluster_argmax(score, torch.tensor([[0, 0, 1, 0, 1]]), 2).tolist() == [[1, 2]]


def test_minus_zero_ties_with_zero():
    assert cluster_argmax(torch.tensor([[-0.0, 0.0, -1.0]]), torch.tensor([[0, 0, 0]]), 1).tolist() == [[0]]


def test_scores_that_only_fp64_tells_apart_are_told_apart():
    score = torch.tensor([[1.0, 1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert cluster_argmax(score, torch.zeros(1, 3, dtype=torch.int64), 1).tolist() == [[1]]


def test_permuted_tokens_give_permuted_answers():
    g = torch.Generator().manual_seed(0)
    score, labels, p = torch.randn(3, 40, generator=g), clusters(3, 40, 9, g), torch.randperm(40, generator=g)
    assert p[cluster_argmax(score[:, p], labels[:, p], 9)].equal(cluster_argmax(score, labels, 9))


def test_strides_do_not_matter_and_the_input_is_left_as_it_was():
    g = torch.Generator().manual_seed(1)
    score, labels = torch.randn(40, 3, generator=g).T, clusters(40, 8, 3, g)[:, :1].expand(40, 3).T
    labels = torch.where(torch.arange(40) < 3, torch.arange(40), labels)
    wide = torch.stack([labels, labels], -1)[..., 0]
    before = score.clone(), labels.clone()
    kept = cluster_argmax(score, wide, 3)
    assert not score.is_contiguous() and not wide.is_contiguous()
    assert kept.equal(best(score, labels, 3)) and kept.equal(cluster_argmax(score, labels, 3))
    assert kept.equal(cluster_argmax_ref(score, labels, 3))
    assert score.equal(before[0]) and labels.equal(before[1])


S, L = torch.zeros(2, 4), torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize("score, labels, K, message", [
    (S[0], L[0], 2, r"floating score \(F, N\), got \(4,\) torch.float32"),
    (S.long(), L, 2, r"floating score \(F, N\), got \(2, 4\) torch.int64"),
    (S, L[:, :3], 2, r"labels \(2, 4\) int64, got \(2, 3\) torch.int64"),
    (S, L.int(), 2, r"labels \(2, 4\) int64, got \(2, 4\) torch.int32"),
    (torch.tensor([[0.0, math.nan], [math.nan, math.nan]]), torch.zeros(2, 2, dtype=torch.int64), 1, r"got 3 NaN of 4"),
    (S, L, 1, r"in \[0, K = 1\), got 0 to 1"),
    (S, L - 1, 2, r"in \[0, K = 2\), got -1 to 0"),
    (S, L, 3, r"every cluster wants a token, 2 of 6 are empty"),
    (S, L.clamp(max=0) + 1, 2, r"every cluster wants a token, 2 of 4 are empty"),
], ids=range(9))
def test_impossible_arguments_are_refused_by_name(score, labels, K, message):
    with pytest.raises(ValueError, match=message):
        cluster_argmax(score, labels, K)


def test_unchecked_on_a_cpu_the_reference_leaves_other_frames_as_they_are():
    g = torch.Generator().manual_seed(2)
    score, labels = torch.randn(3, 12, generator=g), clusters(3, 12, 4, g)
    want = cluster_argmax(score, labels, 4)
    score[1, 5] = math.nan
    assert cluster_argmax(score, labels, 4, check=False)[::2].equal(want[::2])


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

def run(score, labels, K, frames=0):
    """The kernel's answer, on the CPU."""
    kept = cluster_argmax_triton(score.to(DEVICE), labels.to(DEVICE), K, frames).cpu()
    assert kept.shape == (len(score), K) and kept.dtype == torch.int64
    return kept


@pytest.mark.parametrize("shape", [
    (2, 64, 8), (5, 49, 7), (3, 1, 1), (4, 13, 13), (5, 30, 1), (3, 196, 29), (2, 17, 3), (2, 16, 15), (1, 300, 299),
    (1, 729, 73), (2, 1024, 102), (1, 1024, 1024), (1, 1000, 1),
], ids=str)
@low
def test_the_kernel_is_the_loop_with_and_without_ties(shape, dtype):
    F, N, K = shape
    g = torch.Generator().manual_seed(N)
    labels = clusters(F, N, K, g)
    normal = torch.randn(F, N, generator=g)
    few = torch.randint(-2, 3, (F, N), generator=g).float()
    lowest = few.masked_fill(few < 1, -math.inf)
    constant = [torch.full((F, N), value) for value in (-math.inf, -3.0, 0.0)]
    for score in (normal, few, lowest, -normal.abs(), normal * 1e4, *constant)[:8 if N < 60 else 3]:
        score = score.to(dtype)
        assert run(score, labels, K).equal(best(score, labels, K))


@pytest.mark.parametrize("B, T, N, K", [(2, 3, 20, 4), (3, 1, 9, 9), (1, 8, 196, 19), (2, 2, 1, 1), (1, 5, 33, 1)])
@low
def test_the_kernel_gives_ascending_ids_of_a_clips_tokens_where_it_is_told_the_number_of_frames(B, T, N, K, dtype):
    g = torch.Generator().manual_seed(N)
    labels = clusters(B * T, N, K, g)
    for score in (torch.randn(B * T, N, generator=g), torch.zeros(B * T, N), torch.full((B * T, N), -math.inf)):
        score = score.to(dtype)
        want = best(score, labels, K).sort(1).values + N * (torch.arange(B * T) % T)[:, None]
        assert run(score, labels, K, frames=T).equal(want)
        ids = want.view(B, T * K)
        assert (ids.diff(dim=1) > 0).all() and ids.max() < T * N


def test_in_the_kernel_infinite_scores_and_minus_zero():
    score = torch.tensor([[1.0, math.inf, -math.inf, math.inf, -math.inf, -0.0, 0.0, -1.0]])
    assert run(score, torch.tensor([[0, 0, 1, 0, 1, 2, 2, 2]]), 3).tolist() == [[1, 2, 5]]


@pytest.mark.parametrize("frames", [0, 2])
def test_in_the_kernel_a_NaN_is_the_lowest_score_and_an_empty_cluster_is_marked(frames):
    g = torch.Generator().manual_seed(3)
    score, labels = torch.randn(4, 40, generator=g), clusters(4, 40, 9, g)
    want = run(score, labels, 9, frames)
    score[1, ::3] = math.nan
    score[3] = math.nan
    kept = run(score, labels, 9, frames)
    assert kept[::2].equal(want[::2])
    lowest = best(score.nan_to_num(-math.inf), labels, 9)
    assert kept.equal(lowest.sort(1).values + torch.tensor([[0], [40], [0], [40]]) if frames else lowest)
    if not frames:
        assert run(torch.zeros(1, 3), torch.tensor([[0, 2, 2]]), 3).tolist() == [[0, 3, 1]]


def test_the_kernel_takes_any_strides_leaves_its_input_and_gives_the_same_bits_every_run():
    g = torch.Generator().manual_seed(1)
    score, labels = torch.randn(40, 3, generator=g).T, clusters(40, 8, 3, g)[:, :1].expand(40, 3).T
    labels = torch.where(torch.arange(40) < 3, torch.arange(40), labels)
    wide = torch.stack([labels, labels], -1)[..., 0]
    before = score.clone(), labels.clone()
    assert not score.is_contiguous() and not wide.is_contiguous()
    kept = run(score, wide, 3)
    assert kept.equal(best(score, labels, 3)) and kept.equal(run(score, wide, 3))
    assert run(score[:1].expand(3, 40), wide[:1].expand(3, 40), 3).equal(kept[:1].expand(3, 3))
    assert score.equal(before[0]) and labels.equal(before[1])
    for f in range(3):
        assert run(score[f:f + 1], wide[f:f + 1], 3)[0].equal(kept[f])


def test_in_the_kernel_permuted_tokens_give_permuted_answers():
    g = torch.Generator().manual_seed(0)
    score, labels, p = torch.randn(3, 40, generator=g), clusters(3, 40, 9, g), torch.randperm(40, generator=g)
    assert p[run(score[:, p], labels[:, p], 9)].equal(run(score, labels, 9))


def test_labels_elsewhere_than_the_score_are_refused():
    with pytest.raises(ValueError, match="labels on cpu, as the score is, got meta"):
        cluster_argmax(S, L.to("meta"), 2)


@pytest.mark.parametrize("K", [0, -1, 5])
def test_a_number_of_clusters_that_cannot_be_is_refused(K):
    with pytest.raises(ValueError, match=f"K from 1 to N = 4, got {K}"):
        cluster_argmax(S, L, K)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    g = torch.Generator().manual_seed(4)
    score, labels = torch.randn(3, 70, generator=g).to("cuda", dtype), clusters(3, 70, 9, g).cuda()
    assert cluster_argmax(score, labels, 9).equal(cluster_argmax_triton(score, labels, 9))
    assert captured(lambda: cluster_argmax(score, labels, 9, check=False)).equal(cluster_argmax(score, labels, 9))
    with pytest.raises(ValueError, match="up to 1024 tokens a frame in float32, float16 or bfloat16"):
        cluster_argmax(score.double(), labels, 9)
    with pytest.raises(ValueError, match="labels on cuda"):
        cluster_argmax(score, labels.cpu(), 9)


@needs_cuda
@pytest.mark.parametrize("frames", [0, 8])
def test_on_a_gpu_the_scores_may_have_more_than_2_to_the_31_elements(frames):
    F, N = 2 ** 21 + 8, 1024
    score = torch.rand(F, N, device="cuda", dtype=torch.float16)
    labels = (torch.arange(N, device="cuda") % 3).expand(F, N)
    kept = cluster_argmax_triton(score, labels, 3, frames)
    assert kept[-8:].equal(cluster_argmax_triton(score[-8:], labels[-8:], 3, frames))
    if not frames:
        assert kept[-8:].cpu().equal(best(score[-8:].cpu(), labels[-8:].cpu(), 3))
