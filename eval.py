"""
Score a trained model.

    python eval.py --task sprites --checkpoint out/sprites
    python eval.py --task sprites --checkpoint out/sprites --mask cluster_stm --mask-ratio 0.9
    python eval.py --checkpoint out/captions --data captions.json --data-root FOLDER

Text-to-video (T2V) and video-to-text (V2T) retrieval, R@1/5/10 in per cent and the median rank: by similarity, the mean
over frames of the cosines, and re-ranked by the matching head, which looks again at each query's top k. With a mask
both are given the kept tokens alone. Prints a block, writes the same as JSON.
"""

import json
import os
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import data
from data import Clips, DataConfig
from masking import MASKS, MaskConfig
from model import ClusterSTM
from tasks import files, find_task
from teacher import SigLIP, choose


@dataclass
class Config:
    """Score a checkpoint."""
    task: str = "sprites"             # a row of tasks.TASKS
    checkpoint: str = "out/sprites"   # folder that train.py wrote
    data_root: str = ""               # folder of the task's files; with --data, the one its videos are relative to
    data: str = ""                    # retrieval annotations of your own, in place of a task's
    mask: str = ""                    # a row of masking.MASKS: score with the tokens it keeps; empty: with all
    mask_ratio: float | None = None   # share of tokens hidden; empty: as the model was trained
    teacher: str = ""                 # SigLIP folder for the mask; empty: the one the model was trained with
    rerank: int = -1                  # top k that the matching head re-ranks, 0 for none; -1: as the task says
    frames: int = 0                   # frames a clip; 0: as the model was trained
    batch: int = 32                   # clips at once
    seed: int = 0                     # of masks that are drawn
    device: str = "auto"              # cpu, cuda, or auto: cuda where there is one
    out: str = ""                     # JSON to write; empty: eval-TASK-MASK.json in the checkpoint


# Metrics

def ranks(score: Tensor, right: Tensor) -> Tensor:
    """
    score (Q, M), right (Q, M) bool -> (Q,), the rank from 1 of each query's best right answer.

    A wrong answer of the same score ranks before it: a model that says the same of everything is last, not first.
    """
    best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((score >= best) & ~right).sum(1)


def recalls(rank: Tensor) -> dict[str, float]:
    """rank (Q,) -> R@1, R@5, R@10 in per cent, median rank."""
    found = {f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)}
    return {**found, "median": float(np.median(rank.cpu().numpy()))}


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


# Retrieval

@torch.no_grad()
def retrieval(model: ClusterSTM, clips: Clips, tokenizer, length: int, k: int, batch: int, keep=None) -> dict:
    """
    T2V and V2T of all clips against all their captions. keep(batch) -> ids (B, TK), the tokens scored with, or None.

    A video that stands in several rows is one video, with all their captions.
    """
    device = model.temp.device
    rows = {row.media: i for i, row in reversed(list(enumerate(clips.rows)))}               # media -> its first row
    captions = [(c, row.media) for row in clips.rows for c in row.captions]
    video_media = torch.tensor(list(rows))
    text_media = torch.tensor([media for _, media in captions])
    right = (text_media[:, None] == video_media[None]).to(device)                           # (M, V)

    tokens, video = [], []
    order = list(rows.values())
    for start in tqdm(range(0, len(order), batch), "videos", mininterval=1, leave=False):
        b = data.collate([clips[i] for i in order[start:start + batch]], tokenizer, length, seed=start).to(device)
        x, v = model.encode_video(b.video, keep and keep(b))
        tokens.append(x)
        video.append(v)
    tokens, video = torch.cat(tokens), torch.cat(video)                                     # (V, S, C), (V, E)
    ids = data.encode(tokenizer, [c for c, _ in captions], length, model.cfg.sep).to(device)
    states, text = zip(*(model.encode_text(x) for x in ids.split(256)), strict=True)
    states, text = torch.cat(states), torch.cat(text)                                       # (M, L, D), (M, E)
    similarity = text @ video.T                                                             # (M, V)

    def match(m: Tensor, v: Tensor) -> Tensor:
        """Texts m (P,) with videos v (P,) -> (P,), the logit of a match."""
        pairs = zip(tqdm(m.split(1024), "matching", mininterval=1, leave=False), v.split(1024), strict=True)
        scored = []
        for i, j in pairs:
            some, row = j.unique(return_inverse=True)       # each video's keys and values are computed once
            scored.append(model.match(states[i], ids[i], tokens[some], row)[:, 1].float())
        return torch.cat(scored)

    result = {"similarity": {"T2V": recalls(ranks(similarity, right)), "V2T": recalls(ranks(similarity.T, right.T))}}
    if k:
        result[f"match, top {k}"] = {
            "T2V": recalls(ranks(reranked(similarity, k, match), right)),
            "V2T": recalls(ranks(reranked(similarity.T, k, lambda v, m: match(m, v)), right.T)),
        }
    M, V = right.shape
    chance = lambda n: {f"R@{k}": 100 * min(1, k / n) for k in (1, 5, 10)} | {"median": (n + 1) / 2}
    result["chance"] = {"T2V": chance(V), "V2T": chance(M)}
    return {"videos": V, "captions": M, "scores": result}


def main(cfg: Config) -> dict:
    """Score what `cfg` says; returns what is written."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, and this machine or this build of torch has no CUDA GPU")
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    task = find_task(cfg.task)
    if cfg.data and not cfg.data_root:
        raise ValueError(f"--data {cfg.data} wants --data-root, the folder that its videos are relative to")
    annotations, media = (cfg.data, cfg.data_root) if cfg.data else files(task, cfg.data_root)
    if cfg.mask and cfg.mask not in MASKS:
        raise ValueError(f"there is no mask {cfg.mask!r}; there are {', '.join(MASKS)}")

    model = ClusterSTM.from_pretrained(cfg.checkpoint).to(device)
    with open(os.path.join(cfg.checkpoint, "config.json")) as f:
        trained = json.load(f)
    tokenizer = data.load_tokenizer(os.path.join(cfg.checkpoint, "tokenizer.json"))
    # Frames are chosen from the whole video, as published; the training's cache holds only some of them.
    view = DataConfig(**{**trained["data"], "frames": cfg.frames or trained["data"]["frames"], "cache": False})
    clips = Clips(data.read_annotations(annotations, media), view, train=False)

    keep = mask = None
    if cfg.mask:
        ratio = trained["mask"]["ratio"] if cfg.mask_ratio is None else cfg.mask_ratio
        mask = MaskConfig(**{**trained["mask"], "name": cfg.mask, "ratio": ratio})
        teacher = SigLIP.from_pretrained(cfg.teacher or trained["teacher"]).to(device)
        def keep(b):
            grid = model.vit.grid(b.video)[1:]                  # the student's
            tokens, _ = teacher.encode_image(teacher.pixels(b.video.flatten(0, 1), grid))
            return choose(teacher, tokens.unflatten(0, b.video.shape[:2]), mask, mask.ratio, cfg.seed + b.seed, grid)

    k = task.rerank if cfg.rerank < 0 else cfg.rerank
    found = retrieval(model, clips, tokenizer, trained["model"]["text_length"], k, cfg.batch, keep)
    name = os.path.splitext(os.path.basename(cfg.data))[0] if cfg.data else cfg.task
    result = {
        "task": name, "annotations": annotations, "checkpoint": cfg.checkpoint, "frames": view.frames,
        "tokens": f"{mask.name}, {100 * mask.ratio:g} % hidden" if mask else "all", **found,
    }

    print(f"{name}: retrieval, {result['videos']} videos, {result['captions']} captions, {view.frames} frames, "
          f"tokens: {result['tokens']}; {cfg.checkpoint}")
    columns = ("R@1", "R@5", "R@10", "median")
    print(f"{'':14}" + "".join(f"{f'{way} {c}':>11}" for way in ("T2V", "V2T") for c in columns))
    for how, both in result["scores"].items():
        print(f"{how:14}" + "".join(f"{both[way][c]:11.1f}" for way in ("T2V", "V2T") for c in columns))
    path = cfg.out or os.path.join(cfg.checkpoint, f"eval-{name}-{cfg.mask or 'all'}.json")
    with open(path + ".tmp", "w") as f:
        json.dump(result, f, indent=1)
    os.replace(path + ".tmp", path)
    print(f"written to {path}")
    return result


if __name__ == "__main__":
    data.command("eval.py", lambda: main(tyro.cli(Config)))
