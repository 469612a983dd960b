"""
Masks compared, as far as that needs no training: what each keeps of clips whose objects are known.

    python -m tools.ablate masks --out masks.json         # every row of masking.MASKS, on held-out clips
    python -m tools.ablate quantiles --out quantiles.json # ClusterSTM by d_c and pick, on training clips

A token is on an object if it is one that tools.demo.objects_kept counts for it, and on the background if on no object.

objects       share of (frame, object) pairs, of objects in view, of which a token is kept
per token     the number of these pairs / the number of tokens kept
clusters      share of the frames' K density-peaks clusters (ClusterSTM's, at the same K and --quantile) of which a
              token is kept
recurrence    share of the kept tokens, but for the last frame's, that recur in the next frame, moved as the truth says:
              one on objects, if a token on one of the same objects is kept there; one on the background, if of its own
              place and the four beside it one is kept there that is on the background too
leakage       1 - sum |x - y|^2 / sum |x - m|^2 over all masked tokens x of all clips; y the nearest token kept in the
              frames before and after (m where nothing is kept there), m the mean of the clip's tokens. Nearest by
              |x - y|, the error itself: it is the most that copying one token explains. Below 0 copying is worse than m
same frame    leakage from the kept tokens of x's own frame: what is there to be had without looking over time. Of one
              frame, so half as many to choose from; and x are the mask's own masked tokens, others for each mask
lost          sum |x - y|^2 / sum |x - m|^2 over all tokens, y the nearest token kept of the whole clip
ms            of the mask for a clip, one thread, the median; teacher tokens, attention and texts given. An upper bound:
              the references on a CPU, beside whatever else the machine does

What draws at random is the mean of three seeds; in brackets the standard deviation of "objects" over these.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import data
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from masking import MASKS, MaskConfig, keep_count
from masks import log
from sprites import SIZE
from teacher import SigLIP
from tools import variants
from tools.bench import attempt, banner, heading, line
from tools.demo import objects_at, objects_kept
from train import PRESETS

PRESET = PRESETS["sprites"].mask
QUANTILES = (0.02, 0.1, 0.5, 0.8, 0.9, 0.95, 0.98)
PICKS = ("density", "random", "centre", "lowest")
SEEDS = 3
SHARES = ("objects", "clusters", "recurrence", "leakage", "same frame", "lost")      # printed in per cent
COLUMNS = ("objects", "per token", "clusters", "recurrence", "leakage", "same frame", "lost", "ms")


@dataclass
class Masks:
    """Figures of masks that need no training, on held-out clips."""
    teacher: str = "out/demo/seed0/teacher"           # folder of a SigLIP checkpoint
    clips: str = "data/sprites"                       # folder that sprites.py wrote
    split: Literal["train", "test"] = "test"          # of these clips
    count: int = 256                                  # clips, from the first
    ratio: tuple[float, ...] = (0.75, 0.85, 0.9)      # shares of tokens hidden, a table each
    quantile: float = PRESET.quantile                 # d_c of ClusterSTM's clusters, as a quantile
    seed: int = 0                                     # of what is drawn; the others are the next two
    commit: str = ""                                  # commit to name in the heading where there is no git
    out: str = ""                                     # JSON file to write
    mask: tuple[str, ...] = ()                        # rows of masking.MASKS; default all

    def rows(self) -> dict[tuple, MaskConfig]:
        """What is compared, by the first cells of its row."""
        return {(name,): replace(PRESET, name=name, quantile=self.quantile) for name in self.mask or MASKS}


@dataclass
class Quantiles(Masks):
    """The same of ClusterSTM by d_c and pick, on training clips: a default may be chosen on no others."""
    split: Literal["train", "test"] = "train"         # of these clips
    mask: tyro.conf.Suppress[tuple[str, ...]] = ()

    def rows(self) -> dict[tuple, MaskConfig]:
        return {(quantile, pick): replace(PRESET, name="cluster_stm", quantile=quantile, pick=pick)
                for quantile in QUANTILES for pick in PICKS}


@dataclass
class Seen:
    """Clips as the teacher saw them, and the truth about them."""
    tokens: Tensor                  # (B, T, N, C)
    more: dict[str, Tensor]         # of each clip, what masks take beside: attention, logits, text, aligned
    boxes: np.ndarray               # (B, T, objects, 4) in pixels, NaN where there is none
    size: int                       # pixels a side
    patch: int

    @property
    def grid(self) -> tuple[int, int]:
        return (self.size // self.patch,) * 2


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def share(of: Tensor, among: Tensor) -> float | None:
    """bool tensors of one shape -> the share of `among` that are in `of`; None where there are none."""
    return (of & among).sum().item() / count if (count := among.sum().item()) else None


def clusters_of(tokens: Tensor, K: int, cfg: MaskConfig) -> Tensor:
    """tokens (B, T, N, C) -> labels (B, T, N) in [0, K), as ClusterSTM finds them."""
    clips = (density_peaks(x, K, bandwidth(x, cfg.quantile), cfg.density, cfg.assign)[0] for x in tokens)
    return torch.stack(list(clips))


def covered(kept: Tensor, labels: Tensor, K: int) -> float:
    """kept (B, T, N) bool, labels (B, T, N) in [0, K), none empty -> share of the frames' clusters that keep one."""
    of = torch.zeros(*labels.shape[:2], K, dtype=torch.int64).scatter_add(2, labels, kept.long())       # (B, T, K)
    return (of > 0).double().mean().item()


def recurrence(kept: Tensor, on: Tensor, grid: tuple[int, int]) -> float | None:
    """kept (B, T, N), on (B, T, objects, N) bool -> share of kept tokens that recur in the next frame; see the top."""
    here, on_here = kept[:, :-1], on[:, :-1]
    goes_on = (on & kept[:, :, None]).any(-1)[:, 1:]                                    # (B, T - 1, objects)
    ground = ~on.any(2)                                                                 # (B, T, N)
    then = (kept & ground)[:, 1:].unflatten(2, grid)                                    # (B, T - 1, h, w)
    near = then.clone()
    near[..., 1:, :] |= then[..., :-1, :]
    near[..., :-1, :] |= then[..., 1:, :]
    near[..., 1:] |= then[..., :-1]
    near[..., :-1] |= then[..., 1:]
    return share((on_here & goes_on[..., None]).any(2) | (ground[:, :-1] & near.flatten(2)), here)


def explained(tokens: Tensor, kept: Tensor) -> tuple[float | None, float | None, float | None]:
    """
    tokens (B, T, N, C), kept (B, T, N) bool -> leakage, the same of the own frame, lost information; see the top.

    None where there is nothing to explain: no other frame, no masked token, no variance.
    """
    T, N = kept.shape[1:]
    frame = torch.arange(T).repeat_interleave(N)
    errors = torch.zeros(5, dtype=torch.float64)        # of masked: over time, in the frame, from m; of all: nearest, m
    for x, k in zip(tokens.flatten(1, 2).double(), kept.flatten(1), strict=True):
        x = x - x.mean(0)                                                               # (TN, C)
        spread = x.square().sum(-1)                                                     # (TN,), |x - m|^2
        d = (spread[:, None] + spread[k] - 2 * x @ x[k].T).clamp_min_(0)                # (TN, kept)
        apart = (frame[:, None] - frame[k]).abs()
        found = [torch.where(apart == gap, d, torch.inf).amin(-1) for gap in (1, 0)]    # inf where nothing is kept
        found = [torch.where(e.isinf(), spread, e) for e in found]
        errors += torch.stack([*(e[~k].sum() for e in (*found, spread)), d.amin(-1).sum(), spread.sum()])
    over, within, masked, lost, every = errors.tolist()
    return (1 - over / masked if masked and T > 1 else None, 1 - within / masked if masked else None,
            lost / every if every else None)


def figures(seen: Seen, keep: Tensor, labels: Tensor, K: int) -> dict[str, float | None]:
    """keep (B, TK), labels (B, T, N) of the K clusters a frame -> all but the time; see the top."""
    B, T, N, _ = seen.tokens.shape
    kept = torch.zeros(B, T * N, dtype=torch.bool).scatter(1, keep, True).view(B, T, N)
    objects = objects_kept(keep, seen.boxes, seen.size, seen.patch)
    pairs = np.count_nonzero(~np.isnan(seen.boxes[..., 0]))                             # objects in view
    recurs = recurrence(kept, objects_at(seen.boxes, seen.size, seen.patch), seen.grid)
    leakage, same, lost = explained(seen.tokens, kept)
    return {"objects": objects, "per token": objects * pairs / keep.numel(), "clusters": covered(kept, labels, K),
            "recurrence": recurs, "leakage": leakage, "same frame": same, "lost": lost}


# ---------------------------------------------------------------------------------------------------------------------
# Masks on clips

@torch.no_grad()
def look(cfg: Masks) -> Seen:
    """The clips, and the teacher's word on them, in fp32."""
    teacher = SigLIP.from_pretrained(cfg.teacher)
    rows = data.read_annotations(f"{cfg.clips}/sprites_{cfg.split}.json", f"{cfg.clips}/videos", check=False)
    if not 1 <= cfg.count <= len(rows):
        raise ValueError(f"--count {cfg.count}: {cfg.clips} has 1 to {len(rows)} clips to {cfg.split} on")
    boxes = np.load(f"{cfg.clips}/sprites_boxes.npz")[cfg.split][:cfg.count]            # (B, T, objects, 4)
    vision = teacher.cfg.vision_config
    read = data.DataConfig(frames=boxes.shape[1], size=vision.image_size, cache=False)
    clips = data.Clips(rows, read, train=False)
    samples = [clips[i] for i in range(cfg.count)]
    tokens = torch.stack([teacher.tokens(teacher.pixels(s.video)) for s in samples])    # (B, T, N, C)
    attention = torch.stack([teacher.attend(x) for x in tokens])                        # (B, T, N)
    more = {"attention": attention, "logits": log(attention),
            "text": teacher.encode_text(teacher.tokenize([s.caption for s in samples])),            # (B, E)
            "aligned": torch.stack([teacher.align(x, teacher.grid) for x in tokens])}               # (B, T, N, E)
    return Seen(tokens, more, boxes * (vision.image_size / SIZE), vision.image_size, vision.patch_size)


@torch.no_grad()
def apply(mask: MaskConfig, seen: Seen, K: int, seed: int) -> tuple[Tensor, float, bool]:
    """The mask on clip after clip -> the ids it keeps (B, TK), ms a clip, the median, and whether it drew numbers."""
    generator, keep, took = torch.Generator().manual_seed(seed), [], []
    before = generator.get_state()
    for i in range(len(seen.tokens)):
        x, more = seen.tokens[i:i + 1], {name: value[i:i + 1] for name, value in seen.more.items()}
        start = time.perf_counter()
        keep.append(mask(x, K, grid=seen.grid, generator=generator, **more))
        took.append(1e3 * (time.perf_counter() - start))
    return torch.cat(keep), statistics.median(took), not torch.equal(before, generator.get_state())


def compare(mask: MaskConfig, seen: Seen, labels: Tensor, K: int, seed: int) -> dict:
    """The figures of one mask, the mean of SEEDS seeds where it draws, and of what they are."""
    found, N = [], seen.tokens.shape[2]
    for s in range(seed, seed + SEEDS):
        keep, ms, drawn = apply(mask, seen, K, s)
        found.append({**figures(seen, keep, labels, K), "ms": ms})
        if not drawn:
            break
    frames = torch.zeros(*seen.tokens.shape[:2]).scatter_add(1, keep // N, torch.ones(keep.shape))     # tokens kept
    mean = {key: None if found[0][key] is None else statistics.fmean(f[key] for f in found) for key in found[0]}
    return {"seeds": len(found), "whole clip": bool((frames != K).any()), **mean,
            "objects std": statistics.stdev(f["objects"] for f in found) if len(found) > 1 else None}


def cells(row: dict, columns: tuple[str, ...]) -> list:
    """What a table's row says after its name."""
    if "failed" in row:
        return [row["failed"], *[None] * (len(columns) - 1)]
    said = {name: f"{100 * row[name]:.1f}" if name in SHARES and row[name] is not None else row[name]
            for name in columns}
    if row["objects std"] is not None:
        said["objects"] += f" ({100 * row['objects std']:.1f})"
    return list(said.values())


def check(cfg: Masks):
    """What can be found wrong before the teacher has looked."""
    if not cfg.ratio:
        raise ValueError("--ratio wants at least one")
    for ratio in cfg.ratio:
        keep_count(1, ratio)
    folder = os.path.dirname(cfg.out) or "."
    if cfg.out and not os.path.isdir(folder):
        raise ValueError(f"--out {cfg.out}: there is no folder {folder}")
    if cfg.seed < 0:
        raise ValueError(f"--seed {cfg.seed}: wants a number that is not negative")


def main(cfg: Masks):
    torch.set_num_threads(1)
    check(cfg)
    masks, reference = cfg.rows(), replace(PRESET, name="cluster_stm", quantile=cfg.quantile)
    sweep = isinstance(cfg, Quantiles)
    names = ("quantile", "pick") if sweep else ("mask",)
    columns = ("objects", "clusters", "recurrence", "leakage") if sweep else COLUMNS
    seen, rows = look(cfg), []
    B, T, N, _ = seen.tokens.shape
    banner("cpu", cfg.commit, "ablate")
    for ratio in cfg.ratio:
        K = keep_count(N, ratio)
        heading(f"{B} {cfg.split} clips of {T} frames, {K} of {N} tokens a frame ({ratio:g} hidden); clusters at "
                f"quantile {cfg.quantile:g}", *names, *(c + " %" if c in SHARES else c for c in columns))
        labels = clusters_of(seen.tokens, K, reference)
        for title, mask in masks.items():
            row = attempt(compare, mask, seen, labels, K, cfg.seed)
            row = {"failed": row} if isinstance(row, str) else row
            *title, last = title
            line(*title, f"{last} \\*" if row.get("whole clip") else last, *cells(row, columns))
            rows.append({"ratio": ratio, "keep": K, **dict(zip(names, (*title, last), strict=True)), **row})
    print(f"\nIn brackets: the standard deviation over {SEEDS} seeds.", end="")
    if not sweep:
        print(" \\*: the budget is the clip's, a frame's share varies. ms: upper bounds."
              + " adamae: its logits are the teacher's log attention, not learned." * (("adamae",) in masks), end="")
    print()
    if cfg.out:
        setting = {k: v for k, v in vars(cfg).items() if k not in ("out", "mask", "ratio")}
        data.write_atomically(cfg.out, json.dumps({**setting, "frames": T, "tokens": N, "rows": rows}, indent=1) + "\n")
        print(f"written to {cfg.out}")
    if failed := [row[names[0]] for row in rows if "failed" in row]:
        raise ValueError(f"{', '.join(map(str, dict.fromkeys(failed)))} failed: see the tables")


KINDS = {"masks": Masks, "quantiles": Quantiles, "train": variants.Train, "table": variants.Show}


def run_command():
    cfg = tyro.extras.subcommand_cli_from_dict(KINDS)
    {variants.Train: variants.run, variants.Show: variants.show}.get(type(cfg), main)(cfg)


if __name__ == "__main__":
    data.command("tools.ablate", run_command)
