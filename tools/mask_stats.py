"""
Statistics of masks that need no training: clips whose objects are known, a teacher and masks -> tables and JSON.

    python -m tools.mask_stats masks --out masks.json           # every mask of masking.MASKS, on held-out clips
    python -m tools.mask_stats quantiles --out quantiles.json   # ClusterSTM by d_c and pick, on training clips

A token is on an object if tools.demo.objects_at says so, and on the background if it is on no object.

objects       share of (frame, object) pairs, of the objects in view, with a visible token on the object
per token     number of these pairs / number of visible tokens
clusters      share of the frames' K density-peaks clusters (ClusterSTM's, at the same K and --quantile) that have a
              visible token
recurrence    share of the visible tokens, except the last frame's, that recur in the next frame. A token on objects
              recurs if a visible token of the next frame is on one of the same objects. A token on the background
              recurs if a visible background token of the next frame has the same place, or one of the four beside it
leakage       1 - sum |x - y|^2 / sum |x - m|^2 over all masked tokens x of all clips. y is the visible token nearest to
              x in the frames before and after (m if these have none), m the mean of the clip's tokens. "Nearest" is by
              |x - y|, the error itself, so this is the most that copying one token explains. Below 0, m is better
same frame    leakage from the visible tokens of x's own frame: what a model can copy without looking over time. One
              frame has half as many tokens to choose from; and x are the masked tokens, which differ from mask to mask
lost          sum |x - y|^2 / sum |x - m|^2 over all tokens, y the nearest visible token of the whole clip
ms            time of the mask for a clip, one thread, the median; teacher tokens, attention and texts are given. An
              upper bound: the references on a CPU, beside whatever else the machine does

Masks that draw at random are averaged over three seeds; brackets hold the standard deviation of "objects" over these.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from config import PRESETS
from data import ClipDataset, DataConfig
from files import atomic_write_text, escape_control
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from masking import MASKS, MaskConfig, keep_count, log_attention
from runtime import run_cli
from tasks import read_annotations
from teacher import SigLIP
from tools.demo import objects_at, objects_kept
from tools.sprites import SIZE, read_boxes
from tools.tables import banner, print_header, print_row, try_or_message

PRESET = PRESETS["sprites"].mask
QUANTILES = (0.02, 0.1, 0.5, 0.8, 0.9, 0.95, 0.98)
PICKS = ("density", "random", "centre", "lowest")
SEEDS = 3
PERCENT_COLUMNS = ("objects", "clusters", "recurrence", "leakage", "same frame", "lost")
COLUMNS = ("objects", "per token", "clusters", "recurrence", "leakage", "same frame", "lost", "ms")


@dataclass
class Masks:
    """Compare masks on held-out clips, without training."""
    teacher: str = "out/demo/seed0/teacher"           # folder or hub id of a SigLIP checkpoint
    clips: str = "data/sprites"                       # folder that tools.sprites wrote
    split: Literal["train", "test"] = "test"          # split of these clips
    count: int = 256                                  # number of clips, from the first
    ratio: tuple[float, ...] = (0.75, 0.85, 0.9)      # shares of masked tokens; a table each
    quantile: float = PRESET.quantile                 # d_c of ClusterSTM's clusters, as a quantile
    seed: int = 0                                     # first of the three seeds of random masks
    commit: str = ""                                  # commit to print above the tables; empty: ask git
    out: str = ""                                     # JSON file to write; empty: none
    mask: Annotated[tuple[str, ...], tyro.conf.arg(help=f"masks; empty: all of {', '.join(MASKS)}")] = ()

    def rows(self) -> dict[tuple, MaskConfig]:
        """Return the masks to compare, by the first cells of their rows."""
        return {(name,): replace(PRESET, name=name, quantile=self.quantile) for name in self.mask or MASKS}


@dataclass
class Quantiles(Masks):
    """Compare settings of ClusterSTM on training clips: defaults must not be chosen on held-out clips."""
    split: Literal["train", "test"] = "train"         # split of these clips
    mask: tyro.conf.Suppress[tuple[str, ...]] = ()

    def rows(self) -> dict[tuple, MaskConfig]:
        return {(quantile, pick): replace(PRESET, name="cluster_stm", quantile=quantile, pick=pick)
                for quantile in QUANTILES for pick in PICKS}


COMMANDS = {"masks": Masks, "quantiles": Quantiles}


@dataclass
class ClipSet:
    """Clips as the teacher sees them, and where their objects are."""
    tokens: Tensor                  # (B, T, N, C)
    aux: dict[str, Tensor]          # other inputs of masks, one row per clip: attention, logits, text, aligned
    boxes: np.ndarray               # (B, T, objects, 4) in pixels, NaN for an absent object
    size: int                       # pixels a side
    patch: int                      # pixels a side of a patch

    @property
    def grid(self) -> tuple[int, int]:
        return (self.size // self.patch,) * 2


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def fraction(condition: Tensor, subset: Tensor) -> float | None:
    """bool tensors of one shape -> the share of `subset` for which `condition` holds; None if `subset` is empty."""
    return (condition & subset).sum().item() / count if (count := subset.sum().item()) else None


def cluster_labels(tokens: Tensor, K: int, cfg: MaskConfig) -> Tensor:
    """tokens (B, T, N, C) -> ClusterSTM's cluster of each token, (B, T, N) in [0, K)."""
    clips = (density_peaks(x, K, bandwidth(x, cfg.quantile), cfg.density, cfg.assign)[0] for x in tokens)
    return torch.stack(list(clips))


def cluster_coverage(visible: Tensor, labels: Tensor, K: int) -> float:
    """visible (B, T, N) bool, labels (B, T, N) in [0, K) -> share of the frames' K clusters with a visible token."""
    count = torch.zeros(*labels.shape[:2], K, dtype=torch.int64).scatter_add(2, labels, visible.long())     # (B, T, K)
    return (count > 0).double().mean().item()


def recurrence_rate(visible: Tensor, on_object: Tensor, grid: tuple[int, int]) -> float | None:
    """visible (B, T, N), on_object (B, T, objects, N) bool -> the share of visible tokens that recur (see the top)."""
    object_visible = (on_object & visible[:, :, None]).any(-1)[:, 1:]                   # (B, T - 1, objects)
    background = ~on_object.any(2)                                                      # (B, T, N)
    next_frame = (visible & background)[:, 1:].unflatten(2, grid)                       # (B, T - 1, h, w)
    near = next_frame.clone()                                                           # or visible beside it
    near[..., 1:, :] |= next_frame[..., :-1, :]
    near[..., :-1, :] |= next_frame[..., 1:, :]
    near[..., 1:] |= next_frame[..., :-1]
    near[..., :-1] |= next_frame[..., 1:]
    recurs = (on_object[:, :-1] & object_visible[..., None]).any(2) | (background[:, :-1] & near.flatten(2))
    return fraction(recurs, visible[:, :-1])


def leakage(tokens: Tensor, visible: Tensor) -> tuple[float | None, float | None, float | None]:
    """
    tokens (B, T, N, C), visible (B, T, N) bool -> leakage, the same within the frame, lost information (see the top).

    A value is None if there is nothing to explain: no other frame, no masked token, or no variance.
    """
    T, N = visible.shape[1:]
    frame = torch.arange(T).repeat_interleave(N)
    sums = torch.zeros(5, dtype=torch.float64)
    for x, seen in zip(tokens.flatten(1, 2).double(), visible.flatten(1), strict=True):
        x = x - x.mean(0)                                                               # (TN, C)
        variance = x.square().sum(-1)                                                   # (TN,), |x - m|^2
        d = (variance[:, None] + variance[seen] - 2 * x @ x[seen].T).clamp_min_(0)      # (TN, visible)
        gap = (frame[:, None] - frame[seen]).abs()
        errors = [torch.where(gap == g, d, torch.inf).amin(-1) for g in (1, 0)]         # inf if the frame has none
        errors = [torch.where(e.isinf(), variance, e) for e in errors]
        sums += torch.stack([*(e[~seen].sum() for e in (*errors, variance)), d.amin(-1).sum(), variance.sum()])
    over_time, within_frame, masked, nearest, total = sums.tolist()
    return (1 - over_time / masked if masked and T > 1 else None, 1 - within_frame / masked if masked else None,
            nearest / total if total else None)


def mask_metrics(clips: ClipSet, visible_ids: Tensor, labels: Tensor, K: int) -> dict[str, float | None]:
    """visible_ids (B, TK), labels (B, T, N) of the K clusters a frame -> all columns except the time (see the top)."""
    B, T, N, _ = clips.tokens.shape
    visible = torch.zeros(B, T * N, dtype=torch.bool).scatter(1, visible_ids, True).view(B, T, N)
    objects = objects_kept(visible_ids, clips.boxes, clips.size, clips.patch)
    pairs = np.count_nonzero(~np.isnan(clips.boxes[..., 0]))                            # objects in view
    recurrence = recurrence_rate(visible, objects_at(clips.boxes, clips.size, clips.patch), clips.grid)
    over_time, same_frame, lost = leakage(clips.tokens, visible)
    return {"objects": objects, "per token": objects * pairs / visible_ids.numel(),
            "clusters": cluster_coverage(visible, labels, K), "recurrence": recurrence, "leakage": over_time,
            "same frame": same_frame, "lost": lost}


# ---------------------------------------------------------------------------------------------------------------------
# Masks on clips

@torch.no_grad()
def load_clips(cfg: Masks) -> ClipSet:
    """Read the clips and apply the teacher, in fp32."""
    teacher = SigLIP.from_pretrained(cfg.teacher)
    annotations = read_annotations(f"{cfg.clips}/sprites_{cfg.split}.json", f"{cfg.clips}/videos", check=False)
    if not 1 <= cfg.count <= len(annotations):
        raise ValueError(f"--count must be 1 to {len(annotations)}, the {cfg.split} clips of {cfg.clips}, "
                         f"got {cfg.count}")
    boxes = read_boxes(cfg.clips, cfg.split)[:cfg.count]                                # (B, T, objects, 4)
    vision = teacher.cfg.vision_config
    dataset = ClipDataset(annotations, DataConfig(num_frames=boxes.shape[1], image_size=vision.image_size,
                                                  frame_cache=False), train=False)
    samples = [dataset[i] for i in range(cfg.count)]
    tokens = torch.stack([teacher.forward_features(teacher.normalize(s.video)) for s in samples])   # (B, T, N, C)
    attention = torch.stack([teacher.pool_attention(x) for x in tokens])                            # (B, T, N)
    aux = {"attention": attention, "logits": log_attention(attention),
           "text": teacher.encode_text(teacher.tokenize([s.caption for s in samples])),             # (B, E)
           "aligned": torch.stack([teacher.token_embeddings(x, teacher.patch_grid) for x in tokens])}   # (B, T, N, E)
    return ClipSet(tokens, aux, boxes * (vision.image_size / SIZE), vision.image_size, vision.patch_size)


@torch.no_grad()
def run_mask(mask: MaskConfig, clips: ClipSet, K: int, seed: int) -> tuple[Tensor, float, bool]:
    """Apply a mask to each clip -> visible ids (B, TK), the median ms per clip, and whether it drew random numbers."""
    generator, visible_ids, ms = torch.Generator().manual_seed(seed), [], []
    before = generator.get_state()
    for i in range(len(clips.tokens)):
        x, aux = clips.tokens[i:i + 1], {name: value[i:i + 1] for name, value in clips.aux.items()}
        start = time.perf_counter()
        visible_ids.append(mask(x, K, grid=clips.grid, generator=generator, **aux))
        ms.append(1e3 * (time.perf_counter() - start))
    return torch.cat(visible_ids), statistics.median(ms), not torch.equal(before, generator.get_state())


def mask_row(mask: MaskConfig, clips: ClipSet, labels: Tensor, K: int, seed: int) -> dict:
    """Return a mask's columns, the mean over SEEDS seeds if it draws at random, and some facts about the mask."""
    results, N = [], clips.tokens.shape[2]
    for s in range(seed, seed + SEEDS):
        visible_ids, ms, is_random = run_mask(mask, clips, K, s)
        results.append({**mask_metrics(clips, visible_ids, labels, K), "ms": ms})
        if not is_random:
            break
    count = torch.zeros(*clips.tokens.shape[:2]).scatter_add(1, visible_ids // N, torch.ones(visible_ids.shape))
    mean = {key: None if results[0][key] is None else statistics.fmean(r[key] for r in results) for key in results[0]}
    return {"seeds": len(results), "whole clip": bool((count != K).any()), **mean,
            "objects std": statistics.stdev(r["objects"] for r in results) if len(results) > 1 else None}


def format_cells(row: dict, columns: tuple[str, ...]) -> list:
    """Return the cells of a table row after its name."""
    if "failed" in row:
        return [row["failed"], *[None] * (len(columns) - 1)]
    cells = {name: f"{100 * row[name]:.1f}" if name in PERCENT_COLUMNS and row[name] is not None else row[name]
             for name in columns}
    if row["objects std"] is not None:
        cells["objects"] += f" ({100 * row['objects std']:.1f})"
    return list(cells.values())


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def check(cfg: Masks):
    """Raise ValueError for settings that are wrong whatever the clips are."""
    if not cfg.ratio:
        raise ValueError("--ratio must be at least one number, got none")
    for ratio in cfg.ratio:
        keep_count(1, ratio)
    folder = os.path.dirname(cfg.out) or "."
    if cfg.out and not os.path.isdir(folder):
        raise ValueError(f"--out {cfg.out}: no such folder {folder}")
    if cfg.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {cfg.seed}")


def main(cfg: Masks):
    torch.set_num_threads(1)
    check(cfg)
    masks, reference = cfg.rows(), replace(PRESET, name="cluster_stm", quantile=cfg.quantile)
    sweep = isinstance(cfg, Quantiles)
    names = ("quantile", "pick") if sweep else ("mask",)
    columns = ("objects", "clusters", "recurrence", "leakage") if sweep else COLUMNS
    clips, rows = load_clips(cfg), []
    B, T, N, _ = clips.tokens.shape
    banner("cpu", cfg.commit, "tools.mask_stats")
    for ratio in cfg.ratio:
        K = keep_count(N, ratio)
        print_header(f"{B} {cfg.split} clips of {T} frames, {K} of {N} tokens a frame ({ratio:g} hidden); clusters at "
                     f"quantile {cfg.quantile:g}", *names, *(c + " %" if c in PERCENT_COLUMNS else c for c in columns))
        labels = cluster_labels(clips.tokens, K, reference)
        for title, mask in masks.items():
            row = try_or_message(mask_row, mask, clips, labels, K, cfg.seed)
            row = {"failed": row} if isinstance(row, str) else row
            *title, last = title
            print_row(*title, f"{last} \\*" if row.get("whole clip") else last, *format_cells(row, columns))
            rows.append({"ratio": ratio, "keep": K, **dict(zip(names, (*title, last), strict=True)), **row})
    print(f"\nIn brackets: the standard deviation over {SEEDS} seeds.", end="")
    if not sweep:
        print(" \\*: the budget is the clip's, a frame's share varies. ms: upper bounds."
              + " adamae: its logits are the teacher's log attention, not learned." * (("adamae",) in masks), end="")
    print()
    if cfg.out:
        settings = {k: v for k, v in vars(cfg).items() if k not in ("out", "mask", "ratio")}
        atomic_write_text(cfg.out, json.dumps({**settings, "frames": T, "tokens": N, "rows": rows}, indent=1) + "\n")
        print(escape_control(f"written to {cfg.out}"))
    if failed := [row[names[0]] for row in rows if "failed" in row]:
        raise ValueError(f"{', '.join(map(str, dict.fromkeys(failed)))} failed: see the tables")


def cli():
    main(tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m tools.mask_stats"))


if __name__ == "__main__":
    run_cli("tools.mask_stats", cli)
