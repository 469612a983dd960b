"""
One trained model at many grids and token budgets: accuracy against tokens, and against multiply-adds of a clip.

    python -m tools.ablations tokens --checkpoint out/sprites --frames 4 8 16 --sizes 48 64 --tokens 144 72 \\
        --masks flux_group_dynamic --features teacher_embedding student_embedding

A row of the table is a grid (frames, size), a mask, the features that it compares, and a budget: how many tokens the
student sees of a clip. Each grid has a row with all tokens too. Scores are those of eval.py with the same flags: of
retrieval R@1 in per cent, the mean of T2V and V2T by similarity; of other tasks metrics.selection_metric. Videos are
decoded again for each row.

A multiply-add is one of a product of matrices. Only these are counted, as usual: no norms, activations or sorting, and
no decoding or resizing of frames. The columns, of one clip:

student      embedding of the patches that it sees, blocks, pooling and projection; of texts nothing
selection    what chooses the tokens: the teacher on the whole clip, or its patch embedding, or the student's (which
             the student then does not compute again); attention of the teacher's head if the mask reads it; the mask
total        both
"""

import itertools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Literal

import matplotlib.pyplot as plt
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import eval as evaluation
import metrics
from data import count_tokens
from files import atomic_write_text, escape_control, read_json
from kernels.bandwidth import num_sampled_tokens
from masking import MASK_INPUTS
from runtime import select_device
from tasks import get_task, name_data, read_rows, split_files
from teacher import SigLIP
from tokenizer import load_tokenizer
from tools.show import as_label, colours, save
from tools.tables import print_header, print_row


@dataclass
class TokensCommand:
    """Evaluate one checkpoint at all grids and token budgets: a table, as JSON too, and a plot."""
    checkpoint: str                     # folder that train.py wrote
    frames: tuple[int, ...] = (0,)      # frames per clip; 0: as in eval.py
    sizes: tuple[int, ...] = (0,)       # heights and widths of a frame, pixels; 0: as trained
    tokens: tuple[int, ...] = ()        # budgets, tokens of a clip; empty: those of training, or what its ratio keeps
    masks: tuple[str, ...] = ()         # masks that select them; empty: that of training
    # what the masks compare; empty: as in training
    features: tuple[Literal["teacher", "teacher_embedding", "student_embedding"], ...] = ()
    teacher: str = ""                   # SigLIP folder or hub id; empty: the teacher of the training
    task: str = "sprites"               # task of eval.py; so are the flags that follow
    data_root: str = ""                 # folder of annotations and videos, or of the videos of --data
    data: str = ""                      # your own annotation file or tar shards; empty: the task's
    answers: str = ""                   # questions: JSON file that lists the answers to rank; empty: the task's list
    split: Literal["test", "val"] = "test"      # split of the task
    seed: int = 0                       # seed of masks that are drawn at random
    batch: int = 32                     # clips per forward pass
    workers: int = -1                   # data loading processes; -1: as in training
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda if there is a GPU
    out: str = ""                       # prefix of the .json and .png file to write; empty: CHECKPOINT/tokens-TASK


SHARED = ("checkpoint", "task", "data_root", "data", "answers", "split", "seed", "batch", "workers", "device")
COSTS = ("student", "selection", "total")


# ---------------------------------------------------------------------------------------------------------------------
# Multiply-adds

def keep_flops(x: tuple, keep: int, d_c, d_c_time, quantile: float, quantile_time: float, density: str, assign: str,
               pick: str, *_, **__) -> int:
    """
    Return the flop of clusterstm::keep, whose products the counter does not see: x (B, T, N, C).

    As in the docstrings of kernels/, which compute half of it because distances are symmetric: of a clip 2 T N^2 C for
    distances within frames, which serve bandwidth and density peaks; if the pick is by temporal density,
    2 T (T - 1) N^2 C across frames and, for its bandwidth, 2 n^2 C of n sampled tokens.
    """
    B, T, N, C = x
    flops = 2 * B * T * N ** 2 * C
    if pick in ("density", "lowest") and T > 1:
        flops += 2 * B * T * (T - 1) * N ** 2 * C
        if d_c_time is None:
            flops += 2 * B * num_sampled_tokens(quantile_time, T * N) ** 2 * C
    return flops


def attention_flops(q: tuple, k: tuple, v: tuple, *_, **__) -> int:
    """Return the flop of attention on a CPU, for which the counter has no formula."""
    return sdpa_flop_count(q, k, v)


FORMULAS = {torch.ops.clusterstm.keep: keep_flops,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def multiply_adds(function: Callable, *args) -> tuple[int, object]:
    """Call function(*args) -> its multiply-adds, and what it returns."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        result = function(*args)
    return counter.get_total_flops() // 2, result


def clip_cost(model, visible_fn: Callable | None, T: int, size: int) -> dict[str, int]:
    """Return tokens that the model sees of a clip of T frames of size x size pixels, and the multiply-adds."""
    video = torch.randint(256, (1, T, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = SimpleNamespace(video=video.to(next(model.parameters()).device), seed=0)
    selection, targets = multiply_adds(visible_fn, batch) if visible_fn else (0, None)
    student, (tokens, _) = multiply_adds(model.encode_video, batch.video, *evaluation.clip_inputs(targets))
    costs = dict(zip(COSTS, (student, selection, student + selection), strict=True))
    return {"tokens": tokens.shape[1], **costs}


# ---------------------------------------------------------------------------------------------------------------------
# The rows

def compares(mask: str) -> bool:
    """Return whether a mask compares features of tokens, and not only their places and random numbers."""
    return bool(mask) and not MASK_INPUTS.get(mask, {"tokens"}) <= {"generator", "grid"}


def list_cells(cfg: TokensCommand, run_config: dict, kind: str) -> list[evaluation.Config]:
    """
    Return the settings of eval.py for each row: for each grid all tokens first, then masks, features and budgets. A
    mask that compares no features, such as random, is there once.
    """
    trained = run_config["mask"]
    shared = {name: getattr(cfg, name) for name in SHARED} | {"rerank": 0 if kind == "retrieval" else -1}
    names, features = cfg.masks or (trained["name"],), cfg.features or ("",)
    budgets = cfg.tokens or tuple(trained.get("tokens", ())) or (0,)
    choices = [{}] + [
        {"mask": name, "features": feature, "tokens": S, "teacher": cfg.teacher} for name in names
        for feature in (features if compares(name) else [""])
        for S in budgets]
    return [evaluation.Config(**shared, frames=T, size=size, **choice)
            for T, size, choice in itertools.product(cfg.frames, cfg.sizes, choices)]


def score(kind: str, scores: dict) -> tuple[str, float]:
    """Return the name and value of the one number of a row."""
    if kind != "retrieval":
        return metrics.selection_metric(kind, scores)
    return "R@1", statistics.fmean(scores["similarity"][way]["R@1"] for way in ("T2V", "V2T"))


def compare_budgets(cfg: TokensCommand) -> list[dict]:
    """Evaluate the checkpoint at all grids and budgets; print the rows, and write and return them."""
    task, device = get_task(cfg.task), select_device(cfg.device)
    name = name_data(cfg.data) if cfg.data else cfg.task
    out = cfg.out or os.path.join(cfg.checkpoint, f"tokens-{name}")
    if not os.path.isdir(folder := os.path.dirname(out) or "."):
        raise ValueError(f"--out {out}: no such folder {folder}")
    model = evaluation.load_model_for(task, cfg.checkpoint).to(device)
    run_config = read_json(os.path.join(cfg.checkpoint, "config.json"))
    tokenizer = load_tokenizer(os.path.join(cfg.checkpoint, "tokenizer.json"))
    load_teacher = lru_cache(maxsize=1)(SigLIP.from_pretrained)
    cells, left_out = [], {}
    for cell in list_cells(cfg, run_config, task.kind):     # whatever can be wrong with one, before a video is read
        data_cfg = evaluation.make_data_config(cell, task, run_config)
        protocol = evaluation.make_protocol(cell, task, run_config, data_cfg.num_workers)
        protocol.cider_only = True
        T, size = data_cfg.num_frames, data_cfg.image_size
        pool = count_tokens(T, size, model.vit_cfg.patch_size)
        if cell.tokens > pool:
            left_out[T, size, cell.tokens] = pool
            continue
        protocol.visible_fn, _ = evaluation.make_visible_fn(cell, run_config, model, data_cfg, load_teacher)
        features = (cell.features or run_config["mask"].get("features", "teacher")) if compares(cell.mask) else ""
        row = {"frames": T, "size": size, "pool": pool, "mask": cell.mask, "features": features}
        cells.append((data_cfg, protocol, row | clip_cost(model, protocol.visible_fn, T, size)))
    for (T, size, tokens), pool in left_out.items():
        print(f"left out: --tokens {tokens} of {T} frames of {size} x {size}, whose pool has only {pool}", flush=True)
    path, folder = (cfg.data, cfg.data_root) if cfg.data else split_files(task, cfg.split, cfg.data_root)
    annotations, rows = read_rows(task, path, folder, train=False), []
    for data_cfg, protocol, row in cells:
        scores = evaluation.evaluate(model, task, annotations, data_cfg, tokenizer, protocol)["scores"]
        metric, value = score(task.kind, scores)
        if not rows:
            print_header(escape_control(f"{name}: {cfg.checkpoint}; costs in 10^9 multiply-adds of a clip"), "frames",
                         "size", "mask", "features", "tokens", "pool", metric, *COSTS)
        rows.append(row | {"score": value, "scores": scores})
        print_row(row["frames"], row["size"], row["mask"] or "all tokens", row["features"], row["tokens"], row["pool"],
                  value, *(row[part] / 1e9 for part in COSTS))
    atomic_write_text(f"{out}.json", json.dumps({"config": asdict(cfg), "metric": metric, "rows": rows}, indent=1))
    plot_rows(rows, metric, f"{out}.png")
    print(escape_control(f"written to {out}.json and {out}.png"))
    return rows


def plot_rows(rows: list[dict], metric: str, out: str):
    """Draw two panels, the score against tokens and against multiply-adds: a colour a grid, a line a mask."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    grids = list(dict.fromkeys((row["frames"], row["size"]) for row in rows))
    selections = list(dict.fromkeys((row["mask"], row["features"]) for row in rows if row["mask"]))
    palette = plt.get_cmap("tab10").colors if len(grids) <= 10 else colours(len(grids))
    looks = zip(itertools.cycle(("-", "--", ":", "-.", (0, (1, 4)), (0, (8, 4)))), itertools.cycle("os^DvPX<"))
    look_of = {("", ""): ("", "*")} | dict(zip(selections, looks, strict=False))
    for axis, key, label in zip(axes, ("tokens", "total"), (
            "tokens that the student sees of a clip", "10⁹ multiply-adds of a clip, selection included"), strict=True):
        for (grid, colour), (selection, (line, marker)) in itertools.product(
                zip(grids, palette, strict=False), look_of.items()):
            points = sorted((row[key] / (1 if key == "tokens" else 1e9), row["score"]) for row in rows if grid == (
                row["frames"], row["size"]) and selection == (row["mask"], row["features"]))
            axis.plot(*zip(*points, strict=True) if points else ((), ()), linestyle=line, marker=marker, color=colour,
                      markersize=11 if marker == "*" else 4, linewidth=1)
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes[0].set(ylabel=f"{as_label(metric)}{', %' if '@' in metric else ''}")
    handles = [plt.Line2D([], [], color=colour, marker="o", linestyle="", label=f"{T} frames of {size}²")
               for (T, size), colour in zip(grids, palette, strict=False)]
    handles += [plt.Line2D([], [], color="grey", linestyle=line, marker=marker, label=as_label(
        " by ".join(filter(None, selection)) or "all tokens")) for selection, (line, marker) in look_of.items()]
    figure.legend(handles=handles, loc="outside upper left", fontsize=8, ncols=4)
    save(figure, out)
