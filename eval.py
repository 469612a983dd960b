"""
Score a trained model.

    python eval.py --task sprites --checkpoint out/sprites
    python eval.py --task msrvtt --checkpoint out/base --data-root DATA         # the rows of tasks.TASKS
    python eval.py --task sprites --checkpoint out/sprites --mask cluster_stm --mask-ratio 0.9
    python eval.py --checkpoint out/captions --data captions.json --data-root FOLDER
    torchrun --nproc_per_node=8 eval.py --task msrvtt --checkpoint out/base --data-root DATA

Retrieval, T2V and V2T: R@1/5/10 in per cent, median and mean rank: by similarity, the mean over frames of the cosines;
by the same with a dual softmax, which looks at all queries at once; and re-ranked by the matching head, which looks
again at each query's top k. Multiple choice by both. Question answering by ranking a list of answers, and in free
words. Captioning, greedy and by beam search. With a mask all of it is given the kept tokens alone. Prints a block,
writes the same as JSON.
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from data import Clips, DataConfig, Row
from masking import GLOBAL, MASKS, MaskConfig, keep_count
from model import ClusterSTM, VideoToText, load_model
from tasks import (
    KINDS,
    TASKS,
    Task,
    data_root,
    find_file,
    find_task,
    read_answers,
    read_captions,
    read_questions,
    read_rows,
    split_files,
)
from teacher import SigLIP, kept


@dataclass
class Config:
    """Score a checkpoint."""
    task: str = "sprites"             # a row of tasks.TASKS
    checkpoint: str = "out/sprites"   # folder that train.py wrote
    data_root: str = ""               # folder of the task's files; with --data, the one its videos are relative to
    data: str = ""                    # annotations of your own, in place of the task's and of its kind
    answers: str = ""                 # JSON list of answers to rank, in place of the task's
    split: Literal["test", "val"] = "test"          # which of the task's splits
    mask: str = ""                    # a row of masking.MASKS: score with the tokens it keeps; empty: with all
    mask_ratio: float | None = None   # share of tokens hidden; empty: as the model was trained
    teacher: str = ""                 # SigLIP folder for the mask; empty: the one the model was trained with
    rerank: int = -1                  # top k that are looked at again, 0 for none (QA: all); -1: as the task says
    first_twice: bool = True          # QA: the first piece of an answer counts twice, as in UMT's published numbers
    beams: int = 3                    # captioning: beams of the beam search; 1: greedy alone
    frames: int = 0                   # frames a clip; 0: as fine-tuned, or for a pretrained model as the task says
    missing: Literal["error", "skip"] = "error"     # a video that is not there or does not decode: stop, or count it
    batch: int = 32                   # clips at once
    workers: int = -1                 # loader processes; -1: as the model was trained
    seed: int = 0                     # of masks that are drawn
    device: str = "auto"              # cpu, cuda, or auto: cuda where there is one
    out: str = ""                     # JSON to write; empty: eval-TASK-MASK.json in the checkpoint


@dataclass
class Protocol:
    """How a model is asked."""
    length: int                       # word pieces of a caption or question
    answer_length: int = 0            # of what it says
    rerank: int = 0                   # top k that are looked at again
    first_twice: bool = True
    beams: int = 1
    batch: int = 32
    workers: int = 0
    quick: bool = False               # captioning: CIDEr alone
    skip: bool = False                # go on without videos that do not decode, which `failed` then names
    keep: object = None               # keep(batch) -> Guide, whose tokens are looked at; None: all
    answers: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)     # video, what is wrong with it


# Metrics

def ranks(score: Tensor, right: Tensor) -> Tensor:
    """
    score (Q, M), right (Q, M) bool -> (Q,), the rank from 1 of each query's best right answer.

    A wrong answer of the same score ranks before it: a model that says the same of everything is last, not first.
    """
    best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((score >= best) & ~right).sum(1)


def recalls(rank: Tensor) -> dict[str, float]:
    """rank (Q,) -> R@1, R@5, R@10 in per cent, median and mean rank."""
    found = {f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)}
    return {**found, "median": float(np.median(rank.cpu().numpy())), "mean": rank.double().mean().item()}


def reranked(score: Tensor, k: int, match) -> Tensor:
    """
    score (Q, M), whose top k of each row are scored again -> (Q, M): those first, by match, the rest after, as before.

    match(query (P,), item (P,)) -> (P,) is asked about P = Q min(k, M) pairs.
    """
    Q, M = score.shape
    top = score.topk(min(k, M), 1).indices                                      # (Q, k)
    query = torch.arange(Q, device=score.device)[:, None].expand_as(top)
    again = match(query.flatten(), top.flatten()).view_as(top)
    below = again.amin() - 1 - score.amax()
    return (score + below).scatter(1, top, again)


def dual_softmax(similarity: Tensor, temp: float) -> Tensor:
    """
    similarity (Q, M) -> (Q, M), s softmax(s) with s = similarity / temp and the softmax over the queries (Cheng et al.,
    arXiv 2109.04290, equation 5). An item that all queries like counts less; it knows the whole set of queries, which
    a search does not.
    """
    s = similarity / temp
    return s * s.softmax(0)


def caption_scores(references: dict[str, list[str]], said: dict[str, str], quick: bool = False) -> dict[str, float]:
    """
    id -> reference captions, id -> what was said -> CIDEr, BLEU-4, ROUGE-L, METEOR, times 100, by pycocoevalcap; quick:
    CIDEr alone.

    Its tokenizer and METEOR want Java. Without, words are split by us, the scores say so and METEOR is left out.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    java = shutil.which("java") is not None
    every = {("gts", i): some for i, some in references.items()} | {("res", i): [c] for i, c in said.items()}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):      # they talk
        if java:
            every = PTBTokenizer().tokenize({i: [{"caption": c} for c in some] for i, some in every.items()})
        else:
            every = {i: [" ".join(re.findall(r"\w+", c.lower())) for c in some] for i, some in every.items()}
        gts, res = ({i: every[part, i] for i in said} for part in ("gts", "res"))
        found = {"CIDEr": Cider().compute_score(gts, res)[0]}
        if not quick:
            found["BLEU-4"] = Bleu(4).compute_score(gts, res, verbose=0)[0][3]
            found["ROUGE-L"] = Rouge().compute_score(gts, res)[0]
        if java and not quick:
            found["METEOR"] = Meteor().compute_score(gts, res)[0]
    return {name if java else f"{name} (simple tokenizer)": 100 * float(x) for name, x in found.items()}


# Ranks of torchrun

def place() -> tuple[int, int]:
    """rank, world."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(mine: list) -> list:
    """The lists of all ranks, one after the other."""
    if not dist.is_initialized():
        return mine
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, mine)
    return [x for part in lists for x in part]


# What is scored: the videos, once each

class Attempts(Dataset):
    """Rows of clips as samples, and where one cannot be read, why."""

    def __init__(self, clips: Clips, which: list[int]):
        self.clips, self.which = clips, which

    def __len__(self):
        return len(self.which)

    def __getitem__(self, i: int):
        try:
            return self.which[i], self.clips[self.which[i]]
        except (ValueError, OSError) as error:
            row = self.clips.rows[self.which[i]]
            return self.which[i], (row.video, f"{row.where}: {error}")


def pack(tokenizer, length: int, attempts: list):
    """-> the rows that were read, their batch or None, and what is wrong with the others."""
    good = [(i, s) for i, s in attempts if not isinstance(s, tuple)]
    batch = data.collate([s for _, s in good], tokenizer, length, seed=good[0][0]) if good else None
    return [i for i, _ in good], batch, [s for _, s in attempts if isinstance(s, tuple)]


def encoded(model, clips: Clips, which: list[int], tokenizer, how: Protocol):
    """Rows `which`, this rank's share of them: batches of (row numbers, tokens (B, S, C), features (B, E) or None)."""
    rank, world = place()
    device = next(model.parameters()).device
    loader = DataLoader(Attempts(clips, which[rank::world]), how.batch, num_workers=how.workers,
                        collate_fn=partial(pack, tokenizer, how.length))
    for rows, batch, failed in tqdm(loader, "videos", mininterval=1, leave=False, disable=rank > 0):
        if failed and not how.skip:
            raise ValueError(failed[0][1])
        how.failed += failed
        if rows:
            b = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                told = how.keep and how.keep(b)
                yield rows, *model.encode_video(b.video, told and told.keep, told and told.size)


def encode_texts(model: ClusterSTM, tokenizer, captions: list[str], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """M captions -> ids (M, L), states (M, L, D), features (M, E)."""
    ids = data.encode(tokenizer, captions, length, model.cfg.sep).to(model.temp.device)
    states, features = zip(*(model.encode_text(some) for some in ids.split(256)), strict=True)
    return ids, torch.cat(states), torch.cat(features)


def match_all(model: ClusterSTM, ids: Tensor, states: Tensor, tokens: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Texts m (P,) with videos v (P,) of tokens (V, S, C) -> (P, 2) logits of no match and match."""
    some = max(1, min(1024, 2 ** 28 // max(1, tokens[0].numel())))              # pairs at once: their keys and values
    order = v.argsort(stable=True)                                              # pairs of one video stay together
    scored = torch.empty(len(v), 2, device=v.device)
    for at in tqdm(order.split(some), "matching", mininterval=1, leave=False, disable=place()[0] > 0):
        videos, row = v[at].unique(return_inverse=True)     # each video's keys and values are computed once
        with torch.autocast(v.device.type, torch.bfloat16, enabled=v.is_cuda):
            scored[at] = model.match(states[m[at]], ids[m[at]], tokens[videos], row).float()
    return scored


# The kinds of tasks

@torch.no_grad()
def retrieval(model: ClusterSTM, clips: Clips, tokenizer, how: Protocol) -> dict:
    """
    T2V and V2T of all clips against all their captions.

    A video that stands in several rows is one video, with all their captions. Rows that share their `where` are several
    videos of the same captions.
    """
    device = model.temp.device
    first = {row.media: i for i, row in reversed(list(enumerate(clips.rows)))}  # media -> its first row
    column = {media: v for v, media in enumerate(first)}
    said = {}                                                                   # (row's place, caption's) -> media
    for i, row in enumerate(clips.rows):
        for c, caption in enumerate(row.captions):
            said.setdefault((row.where or i, c), (caption, []))[1].append(row.media)

    mine, tokens = [], []
    video = torch.zeros(len(first), model.cfg.embed + 1, device=device)         # the last column: 1 if it was read
    for rows, x, feature in encoded(model, clips, list(first.values()), tokenizer, how):
        at = [column[clips.rows[i].media] for i in rows]
        mine += at
        tokens.append(x.to(torch.bfloat16) if x.is_cuda else x)
        video[at] = torch.cat([feature.float(), torch.ones(len(at), 1, device=device)], 1)
    if dist.is_initialized():
        dist.all_reduce(video)
    read = video[:, -1] > 0                                                     # (V,)
    place_of = torch.full((len(first),), -1, device=device)
    place_of[read] = torch.arange(int(read.sum()), device=device)
    video, known = video[read, :-1], set(read.nonzero().flatten().tolist())
    said = [(caption, [m for m in media if column[m] in known]) for caption, media in said.values()]
    said = [(caption, media) for caption, media in said if media]
    if not said:
        raise ValueError(f"none of {len(first)} videos could be read")
    right = torch.zeros(len(said), len(video), dtype=torch.bool)
    for m, (_, media) in enumerate(said):
        right[m, place_of[[column[x] for x in media]].cpu()] = True
    right = right.to(device)                                                    # (M, V)

    ids, states, text = encode_texts(model, tokenizer, [caption for caption, _ in said], how.length)
    similarity = text @ video.T                                                 # (M, V)
    M, V = similarity.shape
    # The same words in another row are as true of a video: they tie with its own caption, and are no wrong answer.
    words = {caption: i for i, caption in enumerate(dict.fromkeys(caption for caption, _ in said))}
    group = torch.tensor([words[caption] for caption, _ in said], device=device)            # (M,)
    true = torch.zeros(len(words), V, device=device).index_add_(0, group, right.float())[group] > 0
    both = lambda t2v, v2t: {"T2V": recalls(ranks(t2v, right)), "V2T": recalls(ranks(v2t, true.T))}
    result = {"similarity": both(similarity, similarity.T)}
    temp = model.temp.item()
    result["similarity, dual softmax"] = both(dual_softmax(similarity, temp), dual_softmax(similarity.T, temp))
    if k := how.rerank:
        # A pair is looked at once, whichever way it came up, by the rank that holds the video.
        wanted = torch.zeros(M, V, dtype=torch.bool, device=device)
        wanted.scatter_(1, similarity.topk(min(k, V), 1).indices, True)
        wanted.T.scatter_(1, similarity.T.topk(min(k, M), 1).indices, True)
        logits = torch.zeros(M, V, device=device)
        if mine:
            own = place_of[torch.tensor(mine, device=device)]                   # columns of the videos held here
            m, v = wanted[:, own].nonzero().unbind(1)
            logits[m, own[v]] = match_all(model, ids, states, torch.cat(tokens), m, v)[:, 1]
        if dist.is_initialized():
            dist.all_reduce(logits)
        result[f"match, top {k}"] = both(reranked(similarity, k, lambda m, v: logits[m, v]),
                                         reranked(similarity.T, k, lambda v, m: logits[m, v]))
    chance = lambda n: ({f"R@{k}": 100 * min(1, k / n) for k in (1, 5, 10)}
                        | {"median": (n + 1) / 2, "mean": (n + 1) / 2})
    result["chance"] = {"T2V": chance(V), "V2T": chance(M)}
    return {"videos": V, "captions": M, "scores": result}


@torch.no_grad()
def multiple_choice(model: ClusterSTM, clips: Clips, tokenizer, how: Protocol) -> dict:
    """
    Which of a row's captions is true: 0.7 p(match) + 0.3 p(caption), the latter a softmax of the similarities over the
    row's captions (UMT, multi_modality/tasks/retrieval_mc.py), and by each alone. Accuracy in per cent.
    """
    mine = []
    for rows, tokens, video in encoded(model, clips, list(range(len(clips))), tokenizer, how):
        captions = [(b, c) for b, i in enumerate(rows) for c in clips.rows[i].captions]
        ids, states, text = encode_texts(model, tokenizer, [c for _, c in captions], how.length)
        v = torch.tensor([b for b, _ in captions], device=ids.device)
        match = match_all(model, ids, states, tokens, torch.arange(len(v), device=v.device), v).softmax(1)[:, 1]
        near = (text * video[v]).sum(1) / model.temp
        for b, i in enumerate(rows):
            m, s = match[v == b], near[v == b].softmax(0)
            mine.append((i, {"0.7 match + 0.3 similarity": (0.7 * m + 0.3 * s).argmax().item(),
                             "match": m.argmax().item(), "similarity": s.argmax().item()}))
    chosen = sorted(together(mine), key=lambda x: x[0])
    if not chosen:
        raise ValueError(f"none of {len(clips)} videos could be read")
    rows = [clips.rows[i] for i, _ in chosen]
    right = {how: [c[how] == row.right for (_, c), row in zip(chosen, rows, strict=True)] for how in chosen[0][1]}
    chance = np.mean([1 / len(row.captions) for row in rows])
    return {"videos": len({row.media for row in rows}), "questions": len(rows),
            "scores": {name: {"accuracy": 100 * float(np.mean(x))} for name, x in right.items()}
            | {"chance": {"accuracy": 100 * float(chance)}}}


def rank_answers(model: VideoToText, answers: Tensor, memory: Tensor, there: Tensor, k: int, twice: bool) -> Tensor:
    """
    answers (A, L') ids, questions memory (Q, L, D), there (Q, L) -> (Q,), the place of the best answer.

    The k answers whose first piece is the likeliest are scored whole. As published the first piece then counts twice:
    log p(first) + sum over the pieces of log p (UMT, multi_modality/models/umt_qa.py).
    """
    Q, k = len(memory), min(k, len(answers))
    decoder = model.text_decoder
    start = answers[:1, :1].expand(Q, 1)                                        # [CLS]
    states = decoder.fuse(decoder.text(start), start, memory, None, there[:, None, None])
    first = decoder.words(states[:, 0]).float().log_softmax(1)[:, answers[:, 1]]            # (Q, A)
    p, top = first.topk(k, 1)                                                   # (Q, k)
    asked = torch.arange(Q, device=top.device).repeat_interleave(k)
    whole = model.log_likelihood(answers[top.flatten()], asked, memory, there).sum(1).view(Q, k)
    return top.gather(1, (whole + p * twice).argmax(1, keepdim=True))[:, 0]


@torch.no_grad()
def question_answering(model: VideoToText, clips: Clips, tokenizer, how: Protocol) -> dict:
    """Accuracy in per cent, all and by kind of question, of the best of the list and of what is said freely."""
    device = next(model.parameters()).device
    listed = data.encode_answers(tokenizer, how.answers, how.answer_length).to(device)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    def spoken(answer: str) -> str:         # as the model would have to say it
        return data.decode_answers(tokenizer, data.encode_answers(tokenizer, [answer], how.answer_length))[0]
    mine, k = [], how.rerank or len(how.answers)
    for rows, tokens, _ in encoded(model, clips, list(range(len(clips))), tokenizer, how):
        asked = [(b, q) for b, i in enumerate(rows) for q in clips.rows[i].questions]
        size = max(1, 1024 // min(k, len(listed)))
        for some in (asked[at:at + size] for at in range(0, len(asked), size)):
            ids = data.encode(tokenizer, [q.text for _, q in some], how.length, model.cfg.sep).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                memory, there = model.ask(tokens, ids, torch.tensor([b for b, _ in some], device=device))
                best = rank_answers(model, listed, memory, there, k, how.first_twice).tolist()
                said = model.generate(memory, there, how.answer_length, 1, cls, sep)
            for (b, q), a, words in zip(some, best, data.decode_answers(tokenizer, said), strict=True):
                mine.append({"row": rows[b], "where": q.where, "question_id": q.id, "question": q.text, "kind": q.kind,
                             "wanted": list(q.answers), "ranked": how.answers[a], "said": words,
                             "right": [how.answers[a] in q.answers, words in map(spoken, q.answers)]})
    found = sorted(together(mine), key=lambda f: f["row"])
    if not found:
        raise ValueError(f"none of {len(clips)} videos could be read")
    kinds = sorted({f["kind"] for f in found} - {""}) if any(f["kind"] for f in found) else []
    def accuracy(right) -> dict[str, float]:
        share = lambda some: 100 * float(np.mean([right(f) for f in some]))
        return {"all": share(found)} | {kind: share([f for f in found if f["kind"] == kind]) for kind in kinds}
    listed = set(how.answers)
    where = [f.pop("where") for f in found]
    return {"videos": len({f["row"] for f in found}), "questions": len(found), "answers": len(how.answers),
            "answers not in the list": [f"{w}: {f['wanted'][0]!r}" for w, f in zip(where, found, strict=True)
                                        if not listed & set(f["wanted"])],
            "kinds": dict(Counter(f["kind"] for f in found)) if kinds else {},
            "scores": {f"ranking, top {min(k, len(listed))}": accuracy(lambda f: f["right"][0]),
                       "generation": accuracy(lambda f: f["right"][1])}, "said": found}


def frequent_answers(rows: list[Row], asked: list[Row]) -> dict[str, float]:
    """Accuracy on `asked` of the training rows' most frequent answer to each kind of question, in per cent."""
    seen = defaultdict(Counter)
    for row in rows:
        for q in row.questions:
            seen[q.kind].update(q.answers)
    every = sum(seen.values(), Counter())
    right = defaultdict(list)
    for row in asked:
        for q in row.questions:
            (answer, _), = (seen[q.kind] or every).most_common(1)
            for kind in {"all", q.kind} - {""}:
                right[kind].append(answer in q.answers)
    return {kind: 100 * float(np.mean(right[kind])) for kind in sorted(right, key=lambda kind: (kind != "all", kind))}


@torch.no_grad()
def captioning(model: VideoToText, clips: Clips, tokenizer, how: Protocol) -> dict:
    """CIDEr and its like of what is said of each video, against all its captions."""
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    mine, ways = [], {"greedy": 1} | ({f"beam {how.beams}": how.beams} if how.beams > 1 else {})
    for rows, tokens, _ in encoded(model, clips, list(range(len(clips))), tokenizer, how):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            said = [data.decode_answers(tokenizer, model.generate(tokens, None, how.answer_length, beams, cls, sep))
                    for beams in ways.values()]
        mine += [{"row": i, "video": os.path.basename(clips.rows[i].video), **dict(zip(ways, some, strict=True))}
                 for i, *some in zip(rows, *said, strict=True)]
    found = sorted(together(mine), key=lambda f: f["row"])
    if not found:
        raise ValueError(f"none of {len(clips)} videos could be read")
    references = {str(f["row"]): clips.rows[f["row"]].captions for f in found}
    scores = {way: caption_scores(references, {str(f["row"]): f[way] for f in found}, how.quick) for way in ways}
    return {"videos": len(found), "captions": sum(map(len, references.values())), "scores": scores, "said": found}


def frequent_caption(rows: list[Row], clips: list[Row]) -> dict[str, float]:
    """Scores of saying the training rows' most frequent caption of every video."""
    seen = Counter(caption for row in rows for caption in row.captions)
    (caption, _), = seen.most_common(1)
    references = {str(i): row.captions for i, row in enumerate(clips)}
    return caption_scores(references, dict.fromkeys(references, caption))


SCORES = {"retrieval": retrieval, "choice": multiple_choice, "qa": question_answering, "caption": captioning}


def headline(kind: str, scores: dict) -> tuple[str, float]:
    """The number that a model is chosen by, and its name."""
    if kind == "retrieval":
        how = next((name for name in scores if name.startswith("match")), "similarity")
        mean = np.mean([scores[how][way][f"R@{k}"] for way in ("T2V", "V2T") for k in (1, 5, 10)])
        return f"mean R@1/5/10 by {how}", float(mean)
    how, name = {"choice": ("0.7 match + 0.3 similarity", "accuracy"), "qa": (next(iter(scores)), "all"),
                 "caption": ([*scores][-1], next(iter([*scores.values()][-1])))}[kind]
    return f"{name} by {how}", scores[how][name]


def score(model, task: Task, rows: list[Row], view: DataConfig, tokenizer, how: Protocol) -> dict:
    """A model of the task's kind on rows -> counts and scores."""
    how.failed.clear()
    # Frames are chosen from the whole video, as published; the training's cache holds only some of them.
    clips = Clips(rows, replace(view, cache=False), train=False)
    found = SCORES[task.kind](model, clips, tokenizer, how)
    how.failed[:] = sorted(together(how.failed))
    return found


# The report

def table(kind: str, scores: dict) -> list[str]:
    if kind == "retrieval":
        columns = ("R@1", "R@5", "R@10", "median", "mean")
        head = [f"{way} {c}" for way in ("T2V", "V2T") for c in columns]
        lines = {how: [both[way][c] for way in ("T2V", "V2T") for c in columns] for how, both in scores.items()}
    else:
        head = list(dict.fromkeys(name for found in scores.values() for name in found))
        lines = {how: [found.get(name, float("nan")) for name in head] for how, found in scores.items()}
    wide, left = [max(8, len(h) + 2) for h in head], max(map(len, lines)) + 1
    return [" " * left + "".join(f"{h:>{w}}" for h, w in zip(head, wide, strict=True)),
            *(f"{how:{left}}" + "".join(f"{x:{w}.1f}" for x, w in zip(xs, wide, strict=True))
              for how, xs in lines.items())]


def report(result: dict) -> str:
    """The block that is printed."""
    counts = ", ".join(f"{result[key]} {key}" for key in ("videos", "captions", "questions") if key in result)
    lines = [f"{result['task']}: {KINDS[result['kind']]}, {result['split']}: {counts}",
             f"  checkpoint: {result['checkpoint']}" + (f"; {result['chosen']}" if result["chosen"] else ""),
             f"  {result['frames']} frames of {result['size']} x {result['size']}, tokens: {result['tokens']}",
             f"  protocol: {', '.join(result['protocol'])}", *(f"  note: {note}" for note in result["notes"])]
    return "\n".join([*lines, *table(result["kind"], result["scores"])])


def protocol(task: Task, how: Protocol, seconds: float) -> list[str]:
    """The switches that move a number, in words."""
    words = [f"texts of {how.length} pieces"] if task.kind != "caption" else []
    words += ["the captions of a row joined to a paragraph"] * task.paragraph
    words += [f"the first {seconds:g} seconds"] * bool(seconds)
    if task.kind == "retrieval":
        words.append(f"top {how.rerank} re-ranked" if how.rerank else "not re-ranked")
    if task.kind == "qa":
        n = len(how.answers)
        words += [f"the likeliest {min(how.rerank or n, n)} of {n} answers scored whole",
                  f"their first piece counted {'twice' if how.first_twice else 'once'}"]
    if task.kind in ("qa", "caption"):
        words.append(f"up to {how.answer_length} pieces said")
    return words


def main(cfg: Config) -> dict:
    """Score what `cfg` says; returns what is written."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, and this machine or this build of torch has no CUDA GPU")
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    task = find_task(cfg.task)
    if cfg.data and not cfg.data_root:
        raise ValueError(f"--data {cfg.data} wants --data-root, the folder that its videos are relative to")
    if cfg.mask and cfg.mask not in MASKS:
        raise ValueError(f"there is no mask {cfg.mask!r}; there are {', '.join(MASKS)}")
    if min(cfg.beams, cfg.batch) < 1 or cfg.workers < -1:
        raise ValueError(f"beams {cfg.beams}, batch {cfg.batch} want to be positive, workers {cfg.workers} at least -1")
    split = "own" if cfg.data else cfg.split
    annotations, media = (cfg.data, cfg.data_root) if cfg.data else split_files(task, cfg.split, cfg.data_root)
    absent = [] if cfg.missing == "skip" else None
    rows = read_rows(task, annotations, media, train=False, absent=absent)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(device)
    model = load_model(cfg.checkpoint).to(device)
    does = "compares" if isinstance(model, ClusterSTM) else "answers questions" if model.bert else "captions"
    wanted = {"qa": "answers questions", "caption": "captions"}.get(task.kind, "compares")
    if does != wanted:
        raise ValueError(f"{cfg.checkpoint} holds a model that {does}; {KINDS[task.kind]} wants a model that {wanted}"
                         + ", fine-tuned by train.py --stage finetune" * (wanted != "compares"))
    with open(os.path.join(cfg.checkpoint, "config.json")) as f:
        trained = json.load(f)
    tokenizer = data.load_tokenizer(os.path.join(cfg.checkpoint, "tokenizer.json"))
    tuned = TASKS.get(trained.get("task", ""))
    frames = cfg.frames or (trained["data"]["frames"] if tuned or cfg.data else task.zero_shot)
    known = {name: value for name, value in trained["data"].items() if name in DataConfig.__dataclass_fields__}
    seconds = known.get("seconds", 0) if tuned or cfg.data else task.seconds
    view = DataConfig(**{**known, "frames": frames, "seconds": seconds, "cache": False})

    keep = None
    tokens = "all"
    if cfg.mask:
        ratio = trained["mask"]["ratio"] if cfg.mask_ratio is None else cfg.mask_ratio
        mask = MaskConfig(**{**trained["mask"], "name": cfg.mask, "ratio": ratio})
        if not (cfg.teacher or trained["teacher"]):
            raise ValueError(f"--mask {cfg.mask} wants --teacher, a SigLIP: {cfg.checkpoint} had none")
        teacher = SigLIP.from_pretrained(cfg.teacher or trained["teacher"]).to(device)
        N = (view.size // model.cfg.patch) ** 2
        tokens = f"{cfg.mask}, {keep_count(N, ratio)} of {N} a frame{' on average' * (cfg.mask in GLOBAL)}"
        def keep(b):
            return kept(teacher, b.video, mask, mask.ratio, cfg.seed + b.seed, model.vit.grid(b.video)[1:],
                        model.cfg.proportional)

    usual = 128 if cfg.data else task.rerank
    how = Protocol(
        length=trained["model"]["text_length"] if cfg.data else task.length, answer_length=task.answer_length,
        rerank=usual if cfg.rerank < 0 else cfg.rerank, first_twice=cfg.first_twice, beams=cfg.beams,
        batch=cfg.batch, workers=view.workers if cfg.workers < 0 else cfg.workers, skip=cfg.missing == "skip",
        keep=keep)
    if task.kind == "qa":
        if cfg.data and not cfg.answers:
            raise ValueError(f"--data {cfg.data} wants --answers, the JSON list of answers that are ranked")
        how.answers = read_answers(cfg.answers or find_file(task.answers, data_root(task, cfg.data_root)))
    found = score(model, task, rows, view, tokenizer, how)

    notes = []
    if trained.get("masked") and not cfg.mask:
        notes.append(f"fine-tuned on masked tokens alone: --mask {trained['mask']['name']} scores it with those")
    lost = {row.video: f"{row.where}: no file {row.video}" for row in reversed(absent or [])} | dict(how.failed[::-1])
    if lost:
        every = len({row.video for row in (*rows, *(absent or []))})
        notes.append(f"SCORED WITHOUT {len(lost)} OF {every} VIDEOS, which could not be read, the first: "
                     f"{next(iter(lost.values()))}")
    number, what = sum(1 for _ in data.list_entries(annotations)), "rows"
    if task.kind == "caption":
        number, what = len(rows) + len(absent or ()), "videos"
    if split == "test" and task.tested and number != task.tested:
        notes.append(f"{annotations} has {number} {what}, the published split has {task.tested}: not comparable")
    if outside := found.get("answers not in the list"):
        notes.append(f"{len(outside)} of {found['questions']} questions have an answer that is not in the list: by "
                     f"ranking they count as wrong; the first: {outside[0]}")
    if task.kind in ("qa", "caption"):
        name = "most frequent answer to that kind" if task.kind == "qa" else "most frequent caption"
        try:
            path, _ = (None, None) if cfg.data else split_files(task, "train", cfg.data_root)
            read = read_questions if task.kind == "qa" else read_captions       # no matter if the videos are there
            seen = read(path, media, task.per_clip) if path else None
        except FileNotFoundError as error:
            seen = None
            notes.append(f"no baseline: {error}")
        if seen:
            simple = frequent_answers if task.kind == "qa" else frequent_caption
            found["scores"][name] = simple(seen, [row for row in rows if row.video not in lost])

    chosen = trained.get("chosen")
    name = os.path.splitext(os.path.basename(cfg.data))[0] if cfg.data else cfg.task
    result = {
        "task": name, "kind": task.kind, "split": "own annotations" if cfg.data else f"{split} split",
        "annotations": annotations, "checkpoint": cfg.checkpoint, "chosen": chosen or "", "frames": view.frames,
        "size": view.size, "tokens": tokens, "protocol": protocol(task, how, seconds), "notes": notes,
        "lost": [*lost.values()], "config": asdict(cfg), **found,
    }
    if place()[0] == 0:
        print(report(result))
        path = cfg.out or os.path.join(cfg.checkpoint, f"eval-{name}-{cfg.mask or 'all'}.json")
        data.write_atomically(path, json.dumps(result, indent=1))
        print(f"written to {path}")
    return result


if __name__ == "__main__":
    data.command("eval.py", lambda: main(tyro.cli(Config)))
