"""
Pictures for people: what masks keep of a clip, and how runs went.

    python -m tools.show mask VIDEO --teacher out/demo/seed0/teacher --mask cluster_stm random_frame --out masks.png
    python -m tools.show run out/demo/seed0/cluster_stm out/demo/seed0/random_frame --out run.png
"""

import json
import os
from dataclasses import dataclass
from itertools import accumulate

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

import data
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from masking import MaskConfig, keep_count
from teacher import SigLIP, choose


@dataclass
class Mask:
    """A clip's frames, its clusters in colour, and what each mask keeps."""
    video: tyro.conf.Positional[str]                                # video file
    teacher: str = "out/demo/seed0/teacher"                         # folder of a SigLIP checkpoint
    mask: tuple[str, ...] = ("cluster_stm", "random_frame")         # rows of masking.MASKS
    ratio: float = 0.9                                              # share of tokens hidden
    quantile: float = 0.95                                          # d_c of the clusters, as a quantile
    frames: int = 8                                                 # frames shown
    out: str = "masks.png"                                          # picture to write


@dataclass
class Run:
    """Losses, rate and learning rate of one or more runs of train.py."""
    folders: tyro.conf.Positional[tuple[str, ...]]                  # out/NAME, one or more
    out: str = "run.png"                                            # picture to write


def dimmed(frames: np.ndarray, keep: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """frames (T, H, W, 3) in [0, 1], keep (T, N) bool -> the same, all tokens but the kept ones darkened."""
    (T, H, W, _), (h, w) = frames.shape, grid
    bright = keep.reshape(T, h, w).repeat(H // h, 1).repeat(W // w, 2)[..., None]
    return np.where(bright, frames, 0.22 * frames)


def coloured(frames: np.ndarray, labels: np.ndarray, centres: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """frames (T, H, W, 3) in [0, 1], labels (T, N), centres (T, K) -> each cluster in a colour of its own."""
    (T, H, W, _), (h, w) = frames.shape, grid
    palette = plt.get_cmap("tab20" if centres.shape[1] > 10 else "tab10").colors
    colour = np.array([palette[k % len(palette)] for k in range(centres.shape[1])])[labels]     # (T, N, 3)
    colour = colour.reshape(T, h, w, 3).repeat(H // h, 1).repeat(W // w, 2)
    return 0.35 * frames + 0.65 * colour


@torch.no_grad()
def masks(video: Tensor, teacher: SigLIP, configs: dict[str, MaskConfig], out: str):
    """video (T, 3, S, S) uint8 -> a picture: frames, clusters, a row for each mask."""
    tokens, _ = teacher.encode_image(teacher.pixels(video))                                     # (T, N, C)
    T, N, _ = tokens.shape
    frames = video.permute(0, 2, 3, 1).numpy() / 255
    rows = {"frames": frames}
    for name, cfg in configs.items():
        K = keep_count(N, cfg.ratio)
        if cfg.name == "cluster_stm":
            found = density_peaks(tokens, K, bandwidth(tokens, cfg.quantile), cfg.density, cfg.assign)
            rows[f"{K} clusters a frame"] = coloured(frames, found[0].numpy(), found[1].numpy(), teacher.grid)
        keep = choose(teacher, tokens[None], cfg, cfg.ratio, seed=0)[0]
        kept = torch.zeros(T * N, dtype=torch.bool).scatter(0, keep, True).view(T, N).numpy()
        rows[f"{name} keeps"] = dimmed(frames, kept, teacher.grid)
    figure, axes = plt.subplots(len(rows), T, figsize=(1.25 * T + 1.5, 1.3 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name.replace("_frame", ""), rotation=0, ha="right", va="center")
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    save(figure, out)


def read_log(folder: str) -> list[dict]:
    """The rows of a run's log.jsonl."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not there: {folder} is no run of train.py")
    with open(path) as f:
        return [json.loads(line) for line in f]


LOSSES = ("sigmoid", "mrm", "vtc", "vtm", "mlm", "lm")
TITLES = {"mrm": "MRM (1 = the clip's mean)", "clips/s": "clips a second", "wait": "share of time waiting for data",
          "lr": "learning rate", "grad_norm": "norm of the gradient"}


def losses(folders: dict[str, str], out: str, more: tuple[str, ...] = ()):
    """{name: run's folder} -> a picture: a panel a loss, and a value of `more`; a line a run, stage after stage."""
    logs = {name: read_log(folder) for name, folder in folders.items()}
    rows = [row for log in logs.values() for row in log]
    names = [name for name in (*LOSSES, *more) if any(row.get(name) is not None for row in rows)]
    if not names:
        raise ValueError(f"{', '.join(folders.values())}: log.jsonl has no losses yet")
    wide = min(4, len(names))
    figure, axes = plt.subplots(-(-len(names) // wide), wide, figsize=(3.2 * wide, 2.8 * -(-len(names) // wide)),
                                squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for run, log in logs.items():
            ends = {stage: max(row["step"] for row in log if row["stage"] == stage) for stage in dict.fromkeys(
                row["stage"] for row in log)}                           # in their order
            before = dict(zip(ends, accumulate(ends.values(), initial=0), strict=False))
            shown = [row for row in log if name in row]
            values = [float("nan") if row[name] is None else row[name] for row in shown]     # None: a step left out
            axis.plot([row["step"] + before[row["stage"]] for row in shown], values, label=run, linewidth=1)
            for step in list(before.values())[1:]:
                axis.axvline(step, color="grey", linewidth=0.6, linestyle=":")
        axis.set(title=TITLES.get(name, name.upper()), xlabel="step")
        if name in ("mrm", "grad_norm"):
            axis.set(yscale="log")
        if name in ("clips/s", "wait"):
            axis.set(ylim=(0, None))
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=8)
    save(figure, out)


def save(figure, path: str):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(cfg: Mask | Run):
    if isinstance(cfg, Run):
        name = lambda folder: os.path.basename(os.path.normpath(folder))
        names = name if len(set(map(name, cfg.folders))) == len(cfg.folders) else os.path.normpath
        losses({names(folder): folder for folder in cfg.folders}, cfg.out, ("clips/s", "wait", "lr", "grad_norm"))
    else:
        teacher = SigLIP.from_pretrained(cfg.teacher)
        size = teacher.cfg.vision_config.image_size
        video = data.test_view(data.read_frames(cfg.video, cfg.frames), size)
        masks(video, teacher, {m: MaskConfig(m, cfg.ratio, cfg.quantile) for m in cfg.mask}, cfg.out)
    print(f"written to {cfg.out}")


if __name__ == "__main__":
    data.command("tools.show", lambda: main(tyro.extras.subcommand_cli_from_dict({"mask": Mask, "run": Run})))
