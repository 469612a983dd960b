"""metrics.py: ranks and recalls against loops, positives, answers. Caption metrics are in test_eval_text.py."""

import math

import numpy as np
import pytest
import torch
from helpers.evaluation import rank_by_hand
from helpers.models import seeded

import metrics
from annotations import Annotation, Question

# ---------------------------------------------------------------------------------------------------------------------
# Retrieval

@pytest.mark.parametrize("levels", [3, 10 ** 6], ids=["many ties", "few ties"])
@pytest.mark.parametrize("Q, M", [(7, 5), (40, 60), (1, 1), (5, 1)])
def test_ranks_are_those_of_a_loop(levels, Q, M):
    g = seeded()
    scores = torch.randint(-levels, levels, (Q, M), generator=g) / levels
    positives = torch.rand(Q, M, generator=g) < 0.2
    positives[torch.arange(Q), torch.randint(M, (Q,), generator=g)] = True      # every query has a positive
    expected = [rank_by_hand(s, p) for s, p in zip(scores.tolist(), positives.tolist(), strict=True)]
    assert metrics.best_ranks(scores, positives).tolist() == expected


def test_equal_scores_rank_the_positive_last():
    assert metrics.best_ranks(torch.zeros(6, 6), torch.eye(6, dtype=torch.bool)).tolist() == [6] * 6
    positives = torch.tensor([[True, True, False, False]] * 2)
    assert metrics.best_ranks(torch.full((2, 4), -3.0), positives).tolist() == [3, 3]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_model_that_says_nan_is_last_and_not_perfect(wrong):
    scores, positives = torch.full((5, 5), wrong), torch.eye(5, dtype=torch.bool)
    assert metrics.best_ranks(scores, positives).tolist() == [5] * 5
    scores = torch.eye(5)                   # a perfect model, of which one negative or one positive is wrong
    scores[1, 3] = scores[2, 2] = math.nan
    assert metrics.best_ranks(scores, positives).tolist() == [1, 2, 5, 1, 1]


def test_recall_metrics():
    rank = torch.tensor([1, 1, 2, 5, 6, 10, 11, 400])
    assert metrics.recall_metrics(rank) == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "median": 5.5, "mean": 54.5}
    assert metrics.recall_metrics(torch.tensor([3])) == {
        "R@1": 0.0, "R@5": 100.0, "R@10": 100.0, "median": 3.0, "mean": 3.0}


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_rerank_orders_the_top_k_and_keeps_the_rest(k):
    scores, logits = torch.randn(5, 8, generator=seeded(k)), 100 * torch.randn(5, 8, generator=seeded(k + 100))
    pairs = []

    def match(query, item):
        pairs.extend(zip(query.tolist(), item.tolist(), strict=True))
        return logits[query, item]

    reranked = metrics.rerank(scores, k, match)
    assert len(set(pairs)) == len(pairs) == 5 * min(k, 8)                   # each pair is scored once
    for q in range(5):
        order = scores[q].argsort(descending=True).tolist()
        expected = sorted(order[:k], key=lambda m: -logits[q, m]) + order[k:]
        assert reranked[q].argsort(descending=True).tolist() == expected


def test_ties_stay_ties_when_reranked():
    scores = torch.tensor([[5.0, 4.0, 3.0, 1.0, 1.0, 0.0]])
    reranked = metrics.rerank(scores, 3, lambda query, item: torch.zeros(len(query)))[0]
    assert reranked[0] == reranked[1] == reranked[2] > reranked[3] == reranked[4] > reranked[5]
    positives = torch.tensor([[True, False, False, False, False, False]])
    assert metrics.best_ranks(reranked[None], positives).item() == 3


@pytest.mark.parametrize("Q, M, temp", [(5, 3, 0.07), (3, 8, 0.01), (1, 4, 1.0), (4, 1, 0.5)])
def test_dual_softmax_is_its_formula(Q, M, temp):
    similarity = torch.rand(Q, M, generator=seeded(Q), dtype=torch.float64) * 2 - 1
    result = metrics.dual_softmax(similarity, temp)
    assert result.shape == (Q, M)
    for q in range(Q):
        for m in range(M):
            s = [math.exp(similarity[i, m] / temp) for i in range(Q)]
            assert result[q, m].item() == pytest.approx(similarity[q, m].item() / temp * s[q] / sum(s), rel=1e-9)


def test_dual_softmax_down_weights_an_item_that_all_queries_match():
    similarity = torch.tensor([[0.6, 0.5], [0.9, 0.1]])                     # both prefer the first
    positives = torch.eye(2, dtype=torch.bool).flip(0)                      # it belongs to the second
    assert metrics.best_ranks(similarity, positives).tolist() == [2, 1]
    assert metrics.best_ranks(metrics.dual_softmax(similarity, 0.1), positives).tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(4))
def test_positives_are_those_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    V = int(rng.integers(1, 9))
    captions = [f"caption {n}" for n in rng.integers(0, 5, 12)]             # some are equal
    columns = [rng.choice(V, rng.integers(1, V + 1), replace=False).tolist() for _ in captions]
    t2v, v2t = metrics.positive_pairs(captions, columns, V)
    for m, caption in enumerate(captions):
        for v in range(V):
            assert t2v[m, v].item() == (v in columns[m])
            assert v2t[m, v].item() == any(v in columns[i] for i, other in enumerate(captions) if other == caption)


def test_captions_of_unreadable_videos_are_no_queries():
    """Annotations of one source share their captions, each of which is one query; those without a source share none."""
    rows = [("a", ["x", "y"], 1), ("a", ["x", "y"], 2), ("b", ["x"], 3), ("", ["z"], 4), ("", ["z"], 1),
            ("c", ["w"], 9)]
    annotations = [Annotation("", captions, None, media_id, source=source) for source, captions, media_id in rows]
    captions, columns = metrics.readable_captions(annotations, {1: 0, 2: 1, 4: 2})
    assert captions == ["x", "y", "z", "z"] and columns == [[0, 1], [0, 1], [2], [0]]


def test_selection_metric():
    def both_ways(t2v, v2t):
        return {way: dict(zip(("R@1", "R@5", "R@10", "median"), values, strict=True))
                for way, values in (("T2V", t2v), ("V2T", v2t))}

    scores = {"similarity": both_ways((1, 2, 3, 90), (4, 5, 6, 90)),
              "match, top 5": both_ways((10, 20, 30, 90), (40, 50, 60, 90)), "chance": both_ways([0] * 4, [0] * 4)}
    assert metrics.selection_metric("retrieval", scores) == ("mean R@1/5/10 by match, top 5", 35)
    scores.pop("match, top 5")
    assert metrics.selection_metric("retrieval", scores) == ("mean R@1/5/10 by similarity", 3.5)
    scores = {"0.7 match + 0.3 similarity": {"accuracy": 3}, "match": {"accuracy": 4}}
    assert metrics.selection_metric("choice", scores) == ("accuracy by 0.7 match + 0.3 similarity", 3)
    scores = {"ranking, top 8": {"all": 3, "colour": 4}, "generation": {"all": 5}}
    assert metrics.selection_metric("qa", scores) == ("all by ranking, top 8", 3)
    scores = {"greedy": {"CIDEr": 3, "METEOR": 4}, "beam 3": {"CIDEr": 5, "METEOR": 6}}
    assert metrics.selection_metric("caption", scores) == ("CIDEr by beam 3", 5)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals

def resampled(values, statistic, draws=4000):
    """The 2.5 and 97.5 % quantiles of a statistic of values that are drawn with replacement, one sample at a time."""
    rng = np.random.default_rng(5)
    found = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(draws)]
    return np.percentile(found, (2.5, 97.5))


@pytest.mark.parametrize("Q", [40, 41, 300])
def test_intervals_are_those_of_queries_drawn_one_by_one(Q):
    rank = np.random.default_rng(Q).geometric(0.15, Q)
    intervals = metrics.recall_intervals(torch.from_numpy(rank))
    scores = metrics.recall_metrics(torch.from_numpy(rank))
    assert intervals.keys() == scores.keys()
    loops = {f"R@{k}": lambda r, k=k: 100 * np.mean(r <= k) for k in (1, 5, 10)}
    loops |= {"median": np.median, "mean": np.mean}
    for name, statistic in loops.items():
        low, high = resampled(rank, statistic)
        assert low <= scores[name] <= high
        # A quantile of 1000 draws is off by up to a tenth of the interval; the median moves in steps of a half.
        assert intervals[name] == pytest.approx([low, high], abs=max(0.12 * (high - low), 0.51 * (name == "median")))
    values = np.random.default_rng(Q).normal(3, 2, Q)
    low, high = resampled(values, np.mean)
    assert metrics.mean_interval(values) == pytest.approx([low, high], abs=0.12 * (high - low))


def test_intervals_are_exact_where_they_can_be():
    """Of Q queries with one right, the number of right ones drawn is binomial: 0 to 3 of 10 in 95 of 100 samples."""
    assert metrics.mean_interval([100] + [0] * 9) == [0, 30]
    assert metrics.mean_interval([7.25] * 5) == [7.25, 7.25] and metrics.mean_interval([4]) == [4, 4]
    assert metrics.recall_intervals(torch.tensor([3])) == {
        "R@1": [0, 0], "R@5": [100, 100], "R@10": [100, 100], "median": [3, 3], "mean": [3, 3]}


def test_intervals_are_the_same_each_time_in_any_order_and_by_any_chunk(monkeypatch):
    rank = torch.from_numpy(np.random.default_rng(0).geometric(0.05, 500))
    expected = metrics.recall_intervals(rank)
    torch.manual_seed(1), np.random.seed(1)
    assert metrics.recall_intervals(rank.flip(0)) == expected == metrics.recall_intervals(rank)
    monkeypatch.setattr(metrics, "CHUNK", 7 * len(rank.unique()))
    assert metrics.recall_intervals(rank) == expected


def test_an_interval_narrows_as_the_root_of_the_number_of_queries():
    widths = [np.ptp(metrics.mean_interval(np.arange(n) % 2)) for n in (100, 400, 6400)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15) and widths[0] / widths[2] == pytest.approx(8, rel=0.15)
    assert widths[0] == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)


def test_a_table_has_each_interval_below_its_score():
    ways = {"T2V": {"R@1": 12.34, "mean": 1234.5}, "V2T": {"R@1": 5.0, "mean": 2.0}}
    bounds = {"T2V": {"R@1": [10.0, 14.0], "mean": [1000.0, 1500.25]}, "V2T": {"R@1": [0.0, 9.99], "mean": [1.0, 3.0]}}
    table = metrics.format_table("retrieval", {"similarity": ways, "chance": ways}, {"similarity": bounds})
    assert [line.split() for line in table] == [
        "T2V R@1 T2V mean V2T R@1 V2T mean".split(), "similarity 12.3 1234.5 5.0 2.0".split(),
        "95 % interval 10.0-14.0 1000.0-1500.2 0.0-10.0 1.0-3.0".split(), "chance 12.3 1234.5 5.0 2.0".split()]
    ends = [[i for i in range(len(line)) if line[i] != " " and line[i + 1:i + 2] in ("", " ")] for line in table]
    assert ends[1][-4:] == ends[2][-4:] == ends[3][-4:] == ends[0][1::2]                # right-aligned columns
    table = metrics.format_table("caption", {"greedy": {"CIDEr": 1.0, "BLEU-4": 2.0}}, {"greedy": {"CIDEr": [0.5, 2]}})
    assert [line.split() for line in table[1:]] == ["greedy 1.0 2.0".split(), "95 % interval 0.5-2.0".split()]


# ---------------------------------------------------------------------------------------------------------------------
# Answers

def test_accuracy_is_of_all_and_of_each_type():
    correct, types = [True, False, True, True, False], ["b", "b", "", "a", ""]
    assert metrics.accuracy_by_type(correct, types) == {"all": 60.0, "a": 100.0, "b": 50.0}
    assert list(metrics.accuracy_by_type(correct, types)) == ["all", "a", "b"]
    assert metrics.accuracy_by_type(correct, [""] * 5) == {"all": 60.0}
    intervals = metrics.accuracy_intervals(correct, types)
    assert intervals == {"all": [20.0, 100.0], "a": [100.0, 100.0], "b": [0.0, 100.0]}


def test_majority_answers_are_those_of_the_type_in_training():
    def annotation(*questions):
        asked = [Question("", answers, question_type=kind) for kind, answers in questions]
        return Annotation("", ["x"], None, 0, asked)

    train = [annotation(("colour", {"red": 0.5, "blue": 0.5}), ("colour", {"red": 1.0}), ("count", {"two": 1.0})),
             annotation(("count", {"two": 1.0}), ("count", {"red": 1.0}), ("colour", {"blue": 0.2}))]
    test = [annotation(("colour", {"red": 1.0}), ("count", {"red": 1.0}), ("new", {"two": 1.0, "red": 0.1})),
            annotation(("count", {"two": 0.5, "three": 0.5}))]
    assert metrics.majority_answers(train, test) == {"all": 75.0, "colour": 100.0, "count": 50.0, "new": 100.0}
