"""
Statistics of masks that need no training: clips whose objects are known, a teacher and masks -> tables and JSON.

    python -m tools.mask_stats masks --out masks.json           # every mask of masking.MASKS, on held-out clips
    python -m tools.mask_stats quantiles --out quantiles.json   # ClusterSTM by d_c and pick, on training clips
    python -m tools.mask_stats bandwidth --teacher SIGLIP VIDEOS/*.mp4      # which d_c to take for your own teacher
    python -m tools.mask_stats selector --out selector.png      # FluxViT's selector by patch norm and budget

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

`bandwidth` needs no objects. It measures "lost" of each video, which it calls unexplained, for several quantiles, and
says which to take: choose_quantile has the rule.

`selector` draws training clips of the set crowd itself. It selects tokens by the change of their patches' embeddings,
normalised as NORMS says, and prints "objects" by budget, here the mean over clips of the share in each clip.
"""

import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as nnf
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from annotations import read_annotations
from budgets import First, group_dynamic
from config import PRESETS
from data import ClipDataset, DataConfig
from encoders import ViT
from files import atomic_write_text, escape_control
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from masking import MASKS, MaskConfig, keep_count, log_attention, select
from runtime import run_cli, select_device
from teacher import SigLIP
from tools.demo import objects_at, objects_kept
from tools.show import plt, save
from tools.sprites import SETS, SIZE, clip_spec, read_boxes, write_clip
from tools.tables import banner, format_mean, print_header, print_row, try_or_message
from video import eval_transform, patchify, read_frames, sample_frame_indices

PRESET = PRESETS["sprites"].mask
QUANTILES = (0.02, 0.1, 0.5, 0.8, 0.9, 0.95, 0.98)
CLASSICAL = 0.02                # Rodriguez & Laio, Science 2014
BANDWIDTHS = (CLASSICAL, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
MARGIN = 1.0                    # per cent: unexplained shares that differ by less are alike
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


@dataclass
class Bandwidth:
    """Measure how much of your own videos no kept token explains, by the bandwidth d_c, and say which one to take."""
    # video files; their number determines how small a difference can be told from noise
    videos: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="VIDEO [VIDEO ...]")]
    teacher: str = "out/demo/seed0/teacher"           # folder or hub id of a SigLIP checkpoint
    ratio: float = PRESET.ratio                       # share of masked tokens
    frames: int = 8                                   # frames of a clip; a video is one clip
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: cuda if there is a GPU
    seed: int = 0                                     # first of the three seeds of random tokens
    commit: str = ""                                  # commit to print above the table; empty: ask git
    out: str = ""                                     # JSON file to write; empty: none


@dataclass
class Selector:
    """Measure how many objects FluxViT's selector covers, by patch norm and budget: tables and a picture."""
    clips: int = 256                                  # training clips of the set crowd, other ones for each seed
    seeds: tuple[int, ...] = (0, 1)                   # seeds of the clips, the projection and the random tokens
    frames: tuple[int, ...] = (8, 16)                 # frames of a clip
    size: tuple[int, ...] = (48, 64)                  # height and width of a frame, pixels
    tokens: tuple[int, ...] = (36, 72, 144, 288)      # budgets, at most all tokens of the smallest clip
    teacher: tuple[str, ...] = ()                     # a SigLIP for each seed; empty: the student's new projection
    commit: str = ""                                  # commit to print above the tables; empty: ask git
    out: str = "selector.png"                         # picture to write; empty: none


COMMANDS = {"masks": Masks, "quantiles": Quantiles, "bandwidth": Bandwidth, "selector": Selector}


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
# The bandwidth for a teacher

@torch.no_grad()
def unexplained_shares(cfg: Bandwidth, teacher: SigLIP, path: str) -> dict[float | str, float] | None:
    """Return "lost" of one video by quantile, and for "random" tokens. None if all tokens of the video are equal."""
    video = eval_transform(read_frames(path, cfg.frames), teacher.cfg.vision_config.image_size)
    device = next(teacher.parameters()).device
    tokens = teacher.forward_features(teacher.normalize(video.to(device)))[None]                    # (1, T, N, C)
    T, N = tokens.shape[1:3]
    K = keep_count(N, cfg.ratio)

    def unexplained(mask: MaskConfig, generator=None) -> float | None:
        visible_ids = mask(tokens, K, generator=generator).cpu()
        visible = torch.zeros(1, T * N, dtype=torch.bool).scatter(1, visible_ids, True).view(1, T, N)
        return leakage(tokens.cpu(), visible)[2]

    shares = {q: unexplained(replace(PRESET, quantile=q)) for q in BANDWIDTHS}
    if None in shares.values():
        return None
    draws = [unexplained(MaskConfig("random_frame"), torch.Generator().manual_seed(cfg.seed + s)) for s in range(SEEDS)]
    return shares | {"random": statistics.fmean(draws)}


def choose_quantile(shares: dict[float, list[float]]) -> tuple[float, dict[float, list[float]], list[float]]:
    """
    Choose a bandwidth from unexplained shares in per cent: quantile -> one share a video. Return the quantile, the
    differences of each quantile to the one of least mean, a number a video, and the quantiles that are alike.

    Quantiles are alike if their mean is less than MARGIN, or at most two standard errors of the difference, above the
    least mean. Of these, take the default of MaskConfig if it is one of them, else the largest: too small a bandwidth
    lets clusters crowd in the densest background, and too large a one has not been seen to lose (docs/method.md §1).
    """
    best = min(shares, key=lambda q: statistics.fmean(shares[q]))
    differences = {q: [x - y for x, y in zip(shares[q], shares[best], strict=True)] for q in shares}

    def noise(xs: list[float]) -> float:
        return 2 * statistics.stdev(xs) / len(xs) ** 0.5 if len(xs) > 1 else 0.0

    alike = [q for q, xs in differences.items() if statistics.fmean(xs) <= noise(xs) or statistics.fmean(xs) < MARGIN]
    return MaskConfig.quantile if MaskConfig.quantile in alike else max(alike), differences, alike


def measure_bandwidth(cfg: Bandwidth):
    """Measure the unexplained shares of the videos, print them by quantile, and say which quantile to take."""
    keep_count(1, cfg.ratio)
    check_outputs(cfg.out, cfg.seed)
    if not cfg.videos or cfg.frames < 1:
        raise ValueError(f"videos and --frames must be at least one, got {len(cfg.videos)} and {cfg.frames}")
    device = select_device(cfg.device)
    teacher = SigLIP.from_pretrained(cfg.teacher, with_tokenizer=False).to(device)
    by_video = {path: unexplained_shares(cfg, teacher, path) for path in tqdm(cfg.videos, "videos", leave=False)}
    measured = [shares for shares in by_video.values() if shares]
    if not measured:
        raise ValueError(f"the tokens of a video must differ, got {len(by_video)} videos whose tokens are all equal")
    percent = {key: [100 * row[key] for row in measured] for key in (*BANDWIDTHS, "random")}
    N = math.prod(teacher.patch_grid)
    banner(device.type, cfg.commit, "tools.mask_stats")
    quantile = print_bandwidths(f"{len(measured)} videos, {cfg.frames} frames each, {keep_count(N, cfg.ratio)} of {N} "
                                f"tokens a frame ({cfg.ratio:g} hidden)", percent)
    if skipped := [path for path, shares in by_video.items() if not shares]:
        print(escape_control(f"Left out, because all their tokens are equal: {', '.join(skipped)}"))
    if cfg.out:
        result = {**vars(cfg), "quantile": quantile, "unexplained": by_video}
        atomic_write_text(cfg.out, json.dumps(result, indent=1) + "\n")
        print(escape_control(f"written to {cfg.out}"))


def print_bandwidths(title: str, percent: dict[float | str, list[float]]) -> float:
    """Print unexplained shares in per cent, by quantile and for "random" tokens -> the quantile to take."""
    random = percent["random"]
    percent = {q: percent[q] for q in BANDWIDTHS}
    quantile, differences, alike = choose_quantile(percent)
    print_header(title, "quantile", "unexplained %", "above the least", "alike")
    for q in percent:
        print_row(f"{q:g}", format_mean(percent[q]), format_mean(differences[q]), "yes" if q in alike else "")
    print_row("random tokens", format_mean(random), "", "")
    alone = " One video: differences cannot be told from noise; give more." if len(random) == 1 else ""
    print(f"\nMean over videos ± its standard error.{alone}")
    means = {q: statistics.fmean(percent[q]) for q in percent}
    print(f"Take --mask.quantile {quantile:g}: {means[quantile]:.1f} % unexplained. The least is "
          f"{min(means.values()):.1f} %, the classical {CLASSICAL:g} has {means[CLASSICAL]:.1f} %, random tokens have "
          f"{statistics.fmean(random):.1f} %.")
    return quantile


# ---------------------------------------------------------------------------------------------------------------------
# FluxViT's selector

SAME = nn.Identity()
RMS = lambda x: nnf.rms_norm(x, x.shape[-1:], eps=1e-6)             # of FluxViT's dual patch norm before training:
LAYER = lambda x: nnf.layer_norm(x, x.shape[-1:], eps=1e-6)         # its scales are 1 and its shifts 0
CENTRE = lambda x: x - x.mean(-1, keepdim=True)
# What is done to the pixels of a patch before the projection, and to its embedding after it. FluxViT's paper has
# LayerNorm, its release RMSNorm. The last two show which part of LayerNorm costs.
NORMS = {"none": (SAME, SAME), "RMSNorm": (RMS, RMS), "LayerNorm": (LAYER, LAYER), "LayerNorm after": (SAME, LAYER),
         "centred before": (CENTRE, SAME)}
RANDOM = "random tokens"
COLOURS = {"none": "#0072b2", "RMSNorm": "#009e73", "LayerNorm": "#d55e00", RANDOM: "#777777"}     # in the picture


def draw_clips(seed: int, count: int) -> tuple[Tensor, np.ndarray]:
    """Draw training clips of crowd, as read from their files -> (B, T, 3, H, W) uint8, boxes (B, T, objects, 4)."""
    crowd, videos = SETS["crowd"], []
    boxes = np.full((count, crowd.frames, len(crowd.counts), 4), np.nan, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            _, found = write_clip(folder, seed, crowd, ("clip.mp4", "train", i))
            boxes[i, :, :found.shape[1]] = found
            videos.append(read_frames(f"{folder}/clip.mp4", 0))
    return torch.stack(videos), boxes


def patch_projection(seed: int, teacher: str) -> tuple[Callable, Callable, int]:
    """
    Return the functions video (B, T, 3, H, W) -> normalised patches (B, TN, 3 P^2) -> embeddings, and the patch size P,
    of a teacher or, if it is "", of a new student.
    """
    if not teacher:
        torch.manual_seed(seed)
        vit = ViT(PRESETS["sprites"].vit)
        return lambda video: vit.patch_pixels(video, None), vit.patch_embed, vit.patch_size
    siglip = SigLIP.from_pretrained(teacher, with_tokenizer=False)
    conv, P = siglip.vision_model.embeddings.patch_embedding, siglip.cfg.vision_config.patch_size
    return (lambda video: patchify(siglip.normalize(video.flatten(0, 1)), P).view(len(video), -1, 3 * P * P),
            lambda x: nnf.linear(x, conv.weight.flatten(1), conv.bias), P)


@torch.no_grad()
def measure_selector(cfg: Selector) -> dict[tuple, np.ndarray]:
    """Measure "objects" of each clip in per cent: (frames, size, norm, first-frame rule) -> (seeds, budgets, clips)."""
    covered = defaultdict(list)
    for seed, teacher in zip(cfg.seeds, cfg.teacher or [""] * len(cfg.seeds), strict=True):
        (video, boxes), (pixels, project, P) = draw_clips(seed, cfg.clips), patch_projection(seed, teacher)
        for T, size in tqdm([*product(cfg.frames, cfg.size)], f"seed {seed}", leave=False):
            frames = sample_frame_indices(T, video.shape[1])
            x = pixels(torch.stack([eval_transform(clip[frames], size) for clip in video])).unflatten(1, (T, -1))
            there = boxes[:, frames] * (size / SIZE)
            rows = {(name, first): partial(group_dynamic, after(project(before(x))), first=first)
                    for (name, (before, after)), first in product(NORMS.items(), get_args(First))}
            rows[RANDOM, "copy"] = partial(select, MaskConfig("random"), x,
                                           generator=torch.Generator().manual_seed(seed))
            for row, keep in rows.items():
                covered[(T, size, *row)].append([[100 * objects_kept(ids[None], box[None], size, P) for ids, box in zip(
                    keep(S), there, strict=True)] for S in cfg.tokens])
    return {key: np.array(values) for key, values in covered.items()}


def print_covered(cfg: Selector, title: str, rows: dict[tuple, np.ndarray]):
    """Print means ± standard errors over seeds and clips of (seeds, budgets, clips), by (frames, size, norm)."""
    print_header(title, "frames", "pixels", "patch norm", *map(str, cfg.tokens))
    for row, values in rows.items():
        print_row(*row, *(format_mean(x.ravel().tolist()) for x in values.swapaxes(0, 1)))
    if spread := max(np.ptp(values.mean(2), 0).max() for values in rows.values()):
        print(f"\nOver {len(cfg.seeds)} x {cfg.clips} clips. Between seeds the means differ by {spread:.1f} at most.")


def plot_covered(cfg: Selector, covered: dict[tuple, np.ndarray]):
    """Draw objects covered against the budget: a panel for each grid, a colour for each norm, a dash for each rule."""
    figure, axes = plt.subplots(len(cfg.size), len(cfg.frames), squeeze=False, sharex=True, sharey=True,
                                figsize=(4.4 * len(cfg.frames), 1 + 3 * len(cfg.size)), layout="constrained")
    for axis, (size, T) in zip(axes.flat, product(cfg.size, cfg.frames), strict=True):
        for (*grid, name, first), values in covered.items():
            if grid == [T, size] and name in COLOURS:
                axis.plot(cfg.tokens, values.mean((0, 2)), "o-" if first == "copy" else "o--", color=COLOURS[name],
                          markerfacecolor=COLOURS[name] if first == "copy" else "white", markersize=5, linewidth=1.5)
        axis.set(title=f"{T} frames of {size} x {size} pixels", xscale="log", ylim=(0, 103))
        axis.set_xticks(cfg.tokens, map(str, cfg.tokens))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    lines = {**{"no patch norm" if name == "none" else name: dict(color=colour, linewidth=4)
                for name, colour in COLOURS.items()},
             "a group's first frame: copy": dict(color="black", marker="o"),
             "across": dict(color="black", marker="o", linestyle="--", markerfacecolor="white")}
    figure.legend(handles=[plt.Line2D([], [], label=name, **style) for name, style in lines.items()],
                  loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("tokens kept of the clip")
    figure.supylabel("objects covered, %")
    save(figure, cfg.out)


def compare_norms(cfg: Selector):
    """Print and draw the objects that the selector covers, by patch norm, first-frame rule and budget."""
    torch.set_num_threads(1)
    check_outputs(cfg.out)
    for name, least in {"clips": 1, "seeds": 0, "frames": 1, "size": 1, "tokens": 1}.items():
        if np.min(getattr(cfg, name), initial=2 ** 31) < least or not np.size(getattr(cfg, name)):
            raise ValueError(f"--{name} must be at least {least} and not empty, got {getattr(cfg, name)}")
    if len(cfg.teacher) not in (0, len(cfg.seeds)):
        raise ValueError(f"--teacher must be a folder for each of {len(cfg.seeds)} seeds, got {len(cfg.teacher)}")
    covered = measure_selector(cfg)
    copy, across = ({key[:3]: x for key, x in covered.items() if key[3] == first} for first in get_args(First))
    banner("cpu", cfg.commit, "tools.mask_stats")
    print_covered(cfg, "Objects covered, %; first=copy", copy)
    gains = {row: x - copy[(*row[:2], "none")] for row, x in copy.items() if row[2] != "none"}
    print_covered(cfg, "Points more than without a norm, clip by clip; first=copy", gains)
    tones = np.array([[clip_spec(seed, "train", i, SETS["crowd"]).tone for i in range(cfg.clips)]
                      for seed in cfg.seeds])
    print_covered(cfg, "The same, by the tone of the background", {
        (T, size, f"{name}, {tone}"): x.swapaxes(0, 1)[:, tones == tone][None] for (T, size, name), x in gains.items()
        if name in ("RMSNorm", "LayerNorm") for tone in np.unique(tones)})
    print_covered(cfg, "Points more with first=across than with copy, clip by clip", {
        row: x - copy[row] for row, x in across.items()})
    if cfg.out:
        plot_covered(cfg, covered)
        print(escape_control(f"written to {cfg.out}"))


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def check(cfg: Masks):
    """Raise ValueError for settings that are wrong whatever the clips are."""
    if not cfg.ratio:
        raise ValueError("--ratio must be at least one number, got none")
    for ratio in cfg.ratio:
        keep_count(1, ratio)
    check_outputs(cfg.out, cfg.seed)


def check_outputs(out: str, seed: int = 0):
    """Raise ValueError if the file --out cannot be written, or for a seed below 0."""
    folder = os.path.dirname(out) or "."
    if out and not os.path.isdir(folder):
        raise ValueError(f"--out {out}: no such folder {folder}")
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")


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
    cfg = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m tools.mask_stats")
    {Bandwidth: measure_bandwidth, Selector: compare_norms}.get(type(cfg), main)(cfg)


if __name__ == "__main__":
    run_cli("tools.mask_stats", cli)
