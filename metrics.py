"""
Metrics: scores of retrieval, of answers and of captions, from score matrices and texts. No model is needed.

    scores (Q, M) of Q queries and M items, positives (Q, M) -> best_ranks -> recall_metrics
    generated and reference captions -> caption_scores

Per cent throughout, except ranks. A score that is NaN never helps: see best_ranks.
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

from tasks import Annotation

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
# Answers and captions

def accuracy_by_type(correct: list[bool], types: list[str]) -> dict[str, float]:
    """Whether each question was answered correctly, and its type -> accuracy of all, and of each type by its name."""
    names = ["all", *sorted(set(types) - {""})]
    return {name: 100 * float(np.mean([c for c, t in zip(correct, types, strict=True) if name in ("all", t)]))
            for name in names}


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
    """
    References and predictions by id -> CIDEr, BLEU-4, ROUGE-L, METEOR, times 100, by pycocoevalcap.

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
        scores = {"CIDEr": Cider().compute_score(gts, res)[0]}
        if not cider_only:
            scores["BLEU-4"] = Bleu(4).compute_score(gts, res, verbose=0)[0][3]
            scores["ROUGE-L"] = Rouge().compute_score(gts, res)[0]
        if has_java and not cider_only:
            scores["METEOR"] = Meteor().compute_score(gts, res)[0]
    return {name if has_java else f"{name} (simple tokenizer)": 100 * float(x) for name, x in scores.items()}


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


def format_table(kind: str, scores: dict) -> list[str]:
    """Return the lines of a table with a row for each way of scoring."""
    if kind == "retrieval":             # both directions in one row
        scores = {name: {f"{way} {metric}": value for way in ("T2V", "V2T") for metric, value in ways[way].items()}
                  for name, ways in scores.items()}
    head = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    rows = {name: [values.get(metric, float("nan")) for metric in head] for name, values in scores.items()}
    widths, left = [max(8, len(h) + 2) for h in head], max(map(len, rows)) + 1
    return [" " * left + "".join(f"{h:>{w}}" for h, w in zip(head, widths, strict=True)),
            *(f"{name:{left}}" + "".join(f"{x:{w}.1f}" for x, w in zip(values, widths, strict=True))
              for name, values in rows.items())]
