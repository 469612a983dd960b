"""Oracles of eval.py: a loop over videos and texts, one at a time."""

import multiprocessing
import os
import signal
import sys

import pytest
import torch

import eval as evaluation
from annotations import normalize_caption
from data import Sample, collate
from helpers.benchmarks import NAMES, as_list, eval_config, load_json
from masking import MaskConfig
from model import load_model
from runtime import run_cli
from targets import compute_targets
from tasks import TASKS, split_files
from teacher import SigLIP
from tokenizer import encode_texts, load_tokenizer
from video import eval_transform, read_frames


def load_clip(path, num_frames, seconds=0, size=16):
    """(1, T, 3, size, size) uint8, the frames of a video that a model sees."""
    return eval_transform(read_frames(path, num_frames, seconds=seconds), size)[None]


def visible_ids_by_name(config, tokenizer, folder, num_frames, ratio):
    """A function: video name -> flat ids (1, TK) that the mask of config.json selects, from this video alone."""
    teacher, mask = SigLIP.from_pretrained(config["teacher"]), MaskConfig(**{**config["mask"], "ratio": ratio})
    grid = (16 // config["vit"]["patch_size"],) * 2

    def visible_ids(name):
        sample = Sample(load_clip(f"{folder}/{name}", num_frames)[0], "a", "a", 0, 0, 0)
        batch = collate([sample], tokenizer, 24, seed=0)
        return compute_targets(teacher, batch, mask, mask.ratio, grid=grid).visible_ids

    return visible_ids


def rank_by_hand(scores, positives):
    """1 + the number of negatives that score no less than the best positive."""
    best = max(s for s, positive in zip(scores, positives, strict=True) if positive)
    return 1 + sum(s >= best and not positive for s, positive in zip(scores, positives, strict=True))


def metrics_by_hand(ranks):
    ranks, n = sorted(ranks), len(ranks)
    return {**{f"R@{k}": 100 * sum(r <= k for r in ranks) / n for k in (1, 5, 10)},
            "median": (ranks[n // 2] + ranks[(n - 1) // 2]) / 2, "mean": sum(ranks) / n}


def retrieval_by_hand(model, rows, folder, tokenizer, length, k, num_frames=8, visible_ids=None, seconds=0, size=16):
    """The scores of retrieval over rows of (video name or list of them, captions); videos are in folder."""
    videos = list(dict.fromkeys(name for names, _ in rows for name in as_list(names)))
    texts = [(caption, as_list(names)) for names, captions in rows for caption in captions]
    with torch.no_grad():
        clips = [model.encode_video(load_clip(f"{folder}/{name}", num_frames, seconds, size),
                                    visible_ids and visible_ids(name)) for name in videos]
        ids = [encode_texts(tokenizer, [normalize_caption(caption)], length) for caption, _ in texts]
        states, features = zip(*map(model.encode_text, ids), strict=True)
        similarity = torch.stack([torch.stack([t[0] @ v[0] for _, v in clips]) for t in features])         # (M, V)
        match = torch.stack([model.match(torch.cat(states), torch.cat(ids), tokens.expand(len(texts), -1, -1))[:, 1]
                             for tokens, _ in clips], 1)                                                   # (M, V)
        s = similarity / model.temp.item()              # times its softmax over the queries: captions, or videos
        t2v = torch.tensor([[s[m, v] * s[m, v].exp() / s[:, v].exp().sum() for v in range(len(videos))]
                            for m in range(len(texts))])
        v2t = torch.tensor([[s[m, v] * s[m, v].exp() / s[m].exp().sum() for v in range(len(videos))]
                            for m in range(len(texts))])
    positives = torch.tensor([[name in names for name in videos] for _, names in texts])

    def rank_plainly(scores, _, positive):
        return rank_by_hand(scores, positive)

    def rank_reranked(scores, matches, positive):
        top = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        keys = [(1, matches[i]) if i in top else (0, scores[i]) for i in range(len(scores))]
        return rank_by_hand(keys, positive)

    def both_ways(t2v, v2t, rank):
        return {way: metrics_by_hand([rank(*row) for row in zip(*(x.tolist() for x in tensors), strict=True)])
                for way, tensors in (("T2V", (t2v, match, positives)), ("V2T", (v2t.T, match.T, positives.T)))}

    return {"similarity": both_ways(similarity, similarity, rank_plainly),
            "similarity, dual softmax": both_ways(t2v, v2t, rank_plainly),
            f"match, top {k}": both_ways(similarity, similarity, rank_reranked)}


def approx(scores):
    """Nested scores for a comparison up to rounding."""
    return {name: {way: pytest.approx(values) for way, values in ways.items()} for name, ways in scores.items()}


def evaluate_task(models, root, task, **changes):
    """eval.main on a task, and what a loop needs: results, model, tokenizer, test rows, video folder, visible_ids."""
    cfg = eval_config(models, root, task, **changes)
    results = evaluation.main(cfg)
    path, folder = split_files(TASKS[task], "test", root)
    model, tokenizer = load_model(cfg.checkpoint), load_tokenizer(f"{cfg.checkpoint}/tokenizer.json")
    visible_ids = None
    if cfg.mask:
        config = load_json(f"{cfg.checkpoint}/config.json")
        visible_ids = visible_ids_by_name(config, tokenizer, folder, results["frames"], 0.5)
        assert visible_ids(NAMES[0]).shape == (1, 2 * results["frames"])
        assert results["tokens"] == "cluster_stm, 2 of 4 a frame"
    return results, model, tokenizer, load_json(path), folder, visible_ids


def run_interrupted(name, function):
    """
    run_cli(name, function) in a process group of its own, as a terminal's, to which the function may send SIGINT.
    -> exit code, what is written to stdout and stderr by all of its processes.
    """
    def main():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)            # a shell's background command ignores it
        for descriptor, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"interrupted.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
        run_cli(name, function)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(60)
    texts = []
    for stream in ("out", "err"):
        with open(f"interrupted.{stream}") as f:
            texts.append(f.read())
    return process.exitcode, *texts
