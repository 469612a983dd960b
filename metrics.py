"""
Metrics: scores of retrieval, of answers and of captions, from score matrices and texts. No model is needed.

    scores (Q, M) of Q queries and M items, positives (Q, M) -> best_ranks -> recall_metrics
    generated and reference captions -> caption_scores

Per cent throughout, except ranks. A score that is NaN never helps: see best_ranks. A score that is a mean over queries
has an interval: what it would be, 95 times in 100, with other queries of the same kind (bootstrap_interval).
"""

import contextlib
import io
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from annotations import Annotation

# ---------------------------------------------------------------------------------------------------------------------
# Retrieval

def readable_captions(annotations: list[Annotation], columns: dict[int, int]) -> tuple[list[str], list[list[int]]]:
    """List the M captions that have a readable video, and the columns of each caption's readable videos."""
    groups = {}                         # Annotations that share their `source` share its captions: one query each.
    for i, annotation in enumerate(annotations):
        for c, caption in enumerate(annotation.captions):
            _, caption_columns = groups.setdefault((annotation.source or i, c), (caption, []))
            if annotation.media_id in columns:
                caption_columns.append(columns[annotation.media_id])
    readable = [group for group in groups.values() if group[1]]
    return [caption for caption, _ in readable], [caption_columns for _, caption_columns in readable]


def positive_pairs(captions: list[str], columns: list[list[int]], V: int) -> tuple[Tensor, Tensor]:
    """
    M captions and the columns, of V, of each caption's videos -> the positives of T2V and of V2T, (M, V) bool both.

    For V2T, an equal caption of another video is as correct as the video's own, with which it ties.
    """
    positives = torch.zeros(len(captions), V, dtype=torch.bool)
    for m, caption_columns in enumerate(columns):
        positives[m, caption_columns] = True
    groups = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([groups[caption] for caption in captions])                                 # (M,)
    counts = torch.zeros(len(groups), V).index_add_(0, group, positives.float())
    return positives, counts[group] > 0


def best_ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """
    scores (Q, M), positives (Q, M) bool -> (Q,), the rank from 1 of each query's best positive.

    A negative of equal score ranks before it, so a model that gives every item the same score is last, not first; so
    is one whose scores are NaN, because no score is below NaN or NaN below it.
    """
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
    return 1 + (~(scores < best) & ~positives).sum(1)


def recall_metrics(rank: Tensor) -> dict[str, float]:
    """rank (Q,) -> R@1, R@5, R@10 in per cent, median and mean rank."""
    recalls = {f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)}
    return {**recalls, "median": float(np.median(rank.cpu().numpy())), "mean": rank.double().mean().item()}


def rerank(scores: Tensor, k: int, match: Callable) -> Tensor:
    """
    scores (Q, M) -> (Q, M): the top k of each row come first, ordered by `match`; the others follow in their old order.

    match(query (P,), item (P,)) -> (P,) is called with the P = Q min(k, M) pairs.
    """
    Q, M = scores.shape
    top = scores.topk(min(k, M), 1).indices                                     # (Q, k)
    query = torch.arange(Q, device=scores.device)[:, None].expand_as(top)
    matched = match(query.flatten(), top.flatten()).view_as(top)
    below = matched.amin() - 1 - scores.amax()
    return (scores + below).scatter(1, top, matched)


def dual_softmax(similarity: Tensor, temp: float) -> Tensor:
    """
    similarity (Q, M) -> (Q, M): s softmax(s) with s = similarity / temp and the softmax over the queries (Cheng et al.,
    arXiv 2109.04290, equation 5). It down-weights items that match every query, and needs the whole set of queries.
    """
    s = similarity / temp
    return s * s.softmax(0)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals

DRAWS = 1000                # bootstrap samples
CHUNK = 2 ** 22             # numbers of the samples that are in memory at once


def bootstrap_interval(values, statistic: Callable) -> dict[str, list[float]]:
    """
    The values of Q queries, such as ranks -> the 95 % interval [low, high] of each number that `statistic` returns.

    Percentile bootstrap: draw Q of the queries with replacement, DRAWS times, and take the 2.5 and 97.5 % quantiles of
    the statistic. The seed is fixed. Only how often each of the U distinct values is drawn matters, and that is
    multinomial: statistic(values (U,) ascending, counts (draws, U)) returns its numbers as {name: (draws,)}.
    """
    distinct, count = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    rng, size = np.random.default_rng(0), max(1, CHUNK // len(distinct))
    chunks = [statistic(distinct, rng.multinomial(count.sum(), count / count.sum(), min(size, DRAWS - start)))
              for start in range(0, DRAWS, size)]
    return {name: np.percentile(np.concatenate([chunk[name] for chunk in chunks]), (2.5, 97.5)).tolist()
            for name in chunks[0]}


def mean_interval(values) -> list[float]:
    """The values of Q queries -> the 95 % interval [low, high] of their mean."""
    return bootstrap_interval(values, lambda distinct, counts: {"mean": counts @ distinct / counts[0].sum()})["mean"]


def recall_intervals(rank: Tensor) -> dict[str, list[float]]:
    """rank (Q,) -> the 95 % intervals of recall_metrics."""
    def resampled(ranks, counts):
        Q, total = len(rank), counts.cumsum(1)
        median = sum(ranks[(total > k).argmax(1)] for k in ((Q - 1) // 2, Q // 2)) / 2
        recalls = {f"R@{k}": 100 * counts @ (ranks <= k) / Q for k in (1, 5, 10)}
        return {**recalls, "median": median, "mean": counts @ ranks / Q}

    return bootstrap_interval(rank.cpu().numpy(), resampled)


def map_ranks(function: Callable, ranks: dict[str, dict[str, Tensor]]) -> dict:
    """Apply a function, such as recall_metrics, to the ranks (Q,) of each way of scoring and each direction."""
    return {name: {way: function(rank) for way, rank in ways.items()} for name, ways in ranks.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Answers and captions

def group_by_type(correct: list[bool], types: list[str]) -> dict[str, list[int]]:
    """As accuracy_by_type, but return for each question 100 if it was answered correctly, else 0, instead of a mean."""
    names = ["all", *sorted(set(types) - {""})]
    return {name: [100 * c for c, t in zip(correct, types, strict=True) if name in ("all", t)] for name in names}


def accuracy_by_type(correct: list[bool], types: list[str]) -> dict[str, float]:
    """Whether each question was answered correctly, and its type -> accuracy of all, and of each type by its name."""
    return {name: float(np.mean(values)) for name, values in group_by_type(correct, types).items()}


def accuracy_intervals(correct: list[bool], types: list[str]) -> dict[str, list[float]]:
    """Whether each question was answered correctly, and its type -> the 95 % intervals of accuracy_by_type."""
    return {name: mean_interval(values) for name, values in group_by_type(correct, types).items()}


def majority_answers(train: list[Annotation], test: list[Annotation]) -> dict[str, float]:
    """Score, on `test`, the most frequent training answer to each type of question: accuracy in per cent."""
    counts = defaultdict(Counter)
    for annotation in train:
        for q in annotation.questions:
            counts[q.question_type].update(q.answers)
    overall = sum(counts.values(), Counter())
    asked = [q for annotation in test for q in annotation.questions]
    given = [(counts[q.question_type] or overall).most_common(1)[0][0] for q in asked]
    correct = [answer in q.answers for answer, q in zip(given, asked, strict=True)]
    return accuracy_by_type(correct, [q.question_type for q in asked])


def caption_scores(references: dict[str, list[str]], predictions: dict[str, str],
                   cider_only: bool = False) -> dict[str, float]:
    """References and predictions by id -> CIDEr, BLEU-4, ROUGE-L, METEOR: see caption_scores_by_video."""
    return caption_scores_by_video(references, predictions, cider_only)[0]


def caption_scores_by_video(references: dict[str, list[str]], predictions: dict[str, str],
                            cider_only: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """
    References and predictions by id -> CIDEr, BLEU-4, ROUGE-L, METEOR, times 100, by pycocoevalcap; and of those that
    are means over videos, CIDEr and ROUGE-L, the scores of the videos. (CIDEr weights words by all references.)

    Its tokenizer and METEOR need Java. Without Java, METEOR is left out, words are split by a regular expression, and
    the names of the scores say so. White space of every kind becomes one space first: the tokenizer takes a caption to
    be a line, and any line end of Unicode within it would shift all captions behind it.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    has_java = shutil.which("java") is not None
    texts = ({("reference", i): captions for i, captions in references.items()}
             | {("prediction", i): [caption] for i, caption in predictions.items()})
    texts = {i: [" ".join(caption.split()) for caption in captions] for i, captions in texts.items()}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):      # the scorers print
        if has_java:
            texts = PTBTokenizer().tokenize({i: [{"caption": c} for c in captions] for i, captions in texts.items()})
        else:
            texts = {i: [" ".join(re.findall(r"\w+", c.lower())) for c in captions] for i, captions in texts.items()}
        gts, res = ({i: texts[part, i] for i in predictions} for part in ("reference", "prediction"))
        scores, by_video = {}, {}
        scores["CIDEr"], by_video["CIDEr"] = Cider().compute_score(gts, res)
        if not cider_only:
            scores["BLEU-4"] = Bleu(4).compute_score(gts, res, verbose=0)[0][3]
            scores["ROUGE-L"], by_video["ROUGE-L"] = Rouge().compute_score(gts, res)
        if has_java and not cider_only:
            scores["METEOR"] = Meteor().compute_score(gts, res)[0]
    suffix = "" if has_java else " (simple tokenizer)"
    return ({name + suffix: 100 * float(x) for name, x in scores.items()},
            {name + suffix: 100 * np.asarray(xs) for name, xs in by_video.items()})


def majority_caption(train: list[Annotation], test: list[Annotation]) -> dict[str, float]:
    """Score, on `test`, the most frequent training caption of all: caption metrics."""
    (caption, _), = Counter(caption for annotation in train for caption in annotation.captions).most_common(1)
    references = {str(i): annotation.captions for i, annotation in enumerate(test)}
    return caption_scores(references, dict.fromkeys(references, caption))


# ---------------------------------------------------------------------------------------------------------------------
# Selection of checkpoints, and a table of scores

def selection_metric(kind: str, scores: dict) -> tuple[str, float]:
    """Return the name and value of the one number by which checkpoints of a kind of task are selected."""
    if kind == "retrieval":
        row = next((name for name in scores if name.startswith("match")), "similarity")
        mean = np.mean([scores[row][way][f"R@{k}"] for way in ("T2V", "V2T") for k in (1, 5, 10)])
        return f"mean R@1/5/10 by {row}", float(mean)
    row = list(scores)[-1 if kind == "caption" else 0]      # the widest beam; the combined scores; the ranking
    metric = next(iter(scores[row]))
    return f"{metric} by {row}", scores[row][metric]


def format_table(kind: str, scores: dict, intervals: dict) -> list[str]:
    """Return the lines of a table: a row for each way of scoring, and below it its 95 % intervals, if it has any."""
    if kind == "retrieval":             # both directions in one row
        scores, intervals = ({name: {f"{way} {metric}": value for way in ("T2V", "V2T")
                                     for metric, value in ways[way].items()} for name, ways in rows.items()}
                             for rows in (scores, intervals))
    head = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    rows = [("", head)]
    for name, values in scores.items():
        rows.append((name, [f"{values.get(metric, float('nan')):.1f}" for metric in head]))
        if found := intervals.get(name):
            rows.append(("  95 % interval", ["{:.1f}-{:.1f}".format(*found[m]) if m in found else "" for m in head]))
    widths = [max(8, 2 + max(map(len, column))) for column in zip(*(cells for _, cells in rows), strict=True)]
    left = max(len(name) for name, _ in rows) + 1
    return [f"{name:{left}}" + "".join(f"{x:>{w}}" for x, w in zip(cells, widths, strict=True)) for name, cells in rows]
