"""cluster_argmax against a loop over the tokens."""

import math

import pytest
import torch

from kernels.cluster_argmax import cluster_argmax, cluster_argmax_ref

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
