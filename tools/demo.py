"""
The embedded demo, end to end: draw, train a teacher, mask, pretrain, score, report.

    python -m tools.demo                # what `make demo` runs; --seed 1 redraws clips, teacher and students

Each step is a command that can be typed; it is printed before it runs. A demo that was stopped goes on where it was.
Writes out/demo/seedN, and the report out/demo/report.md (out/demo/seedN/report.md for seeds above 0).
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor

import data
from data import Clips, DataConfig
from masking import MaskConfig, keep_count
from teacher import SigLIP, choose
from tools import show
from train import PRESETS

MASKS = {"cluster_stm": "ClusterSTM", "random_frame": "random"}


@dataclass
class Config:
    """Run the embedded demo."""
    seed: int = 0             # of clips, teacher and students


def run(commands: list[str], environment: dict) -> None:
    """Commands side by side; the first that fails ends the demo with its log."""
    running = []
    for i, command in enumerate(commands):
        print(f"$ python {command}", flush=True)
        # The first shows its progress, the others are logged beside it.
        log = None if i == 0 else open(os.path.join("out", "demo", f"log{i}.txt"), "w")
        running.append((command, log, subprocess.Popen([sys.executable, *command.split()], stdout=log, stderr=log,
                                                       env={**os.environ, **environment})))
    for command, log, process in running:
        if process.wait():
            where = f"; it said: {open(log.name).read()[-2000:]}" if log else ""
            raise ValueError(f"`python {command}` ended with {process.returncode}{where}")


def objects_at(boxes: np.ndarray, size: int, patch: int) -> Tensor:
    """
    boxes (B, T, objects, 4) in pixels, NaN where there is none -> (B, T, objects, N) bool: the tokens of each object,
    those whose patch its box covers by a quarter, or that hold a quarter of the box.
    """
    low = torch.arange(size // patch) * patch
    x0, y0, x1, y1 = torch.as_tensor(boxes).clamp(0, size).unbind(-1)                       # (B, T, objects) each
    along = lambda a, b: (torch.minimum(b[..., None], low + patch) - torch.maximum(a[..., None], low)).clamp_min(0)
    overlap = (along(y0, y1)[..., :, None] * along(x0, x1)[..., None, :]).flatten(-2)       # (B, T, objects, N)
    return overlap >= 0.25 * ((x1 - x0) * (y1 - y0)).clamp_max(patch * patch)[..., None]


def objects_kept(keep: Tensor, boxes: np.ndarray, size: int, patch: int) -> float:
    """keep (B, TK), boxes as above -> share of a frame's objects that keep a token, over all frames."""
    B, T, _, _ = boxes.shape
    N = (size // patch) ** 2
    kept = torch.zeros(B, T * N, dtype=torch.bool).scatter(1, keep, True).view(B, T, 1, N)
    there = ~torch.as_tensor(boxes)[..., 0].isnan()
    return ((objects_at(boxes, size, patch) & kept).any(-1) & there).sum().item() / there.sum().item()


@torch.no_grad()
def look(folder: str, clips_folder: str, seed: int) -> tuple[dict[str, float], str]:
    """Pictures of the runs and of one held-out clip -> share of held-out objects that each mask keeps, its caption."""
    teacher = SigLIP.from_pretrained(f"{folder}/teacher")
    preset = PRESETS["sprites"]
    masks = {title: MaskConfig(**{**vars(preset.mask), "name": name}) for name, title in MASKS.items()}
    rows = data.read_annotations(f"{clips_folder}/sprites_test.json", f"{clips_folder}/videos")
    clips = Clips(rows, DataConfig(cache=False), train=False)
    video = torch.stack([clips[i].video for i in range(256)])
    tokens = torch.stack([teacher.encode_image(teacher.pixels(v))[0] for v in video])       # (B, T, N, C)
    boxes = np.load(f"{clips_folder}/sprites_boxes.npz")["test"][:256]
    two = next(i for i, row in enumerate(rows) if row.captions[0].count("moves") == 2)      # a clip with some motion
    show.masks(video[two], teacher, masks, f"{folder}/masks.png")
    show.losses({title: f"{folder}/{name}" for name, title in MASKS.items()}, f"{folder}/losses.png")
    kept = {title: choose(teacher, tokens, mask, mask.ratio, seed) for title, mask in masks.items()}
    size, patch = video.shape[-1], preset.model.patch
    return {title: objects_kept(keep, boxes, size, patch) for title, keep in kept.items()}, rows[two].captions[0]


def main(cfg: Config):
    start = time.perf_counter()
    folder = f"out/demo/seed{cfg.seed}"
    clips = "data/sprites" if cfg.seed == 0 else f"data/sprites-seed{cfg.seed}"
    os.makedirs(folder, exist_ok=True)
    cuda = torch.cuda.is_available()
    threads = data.cores()
    together = {"OMP_NUM_THREADS": str(max(1, threads // len(MASKS)))}
    print(f"demo, seed {cfg.seed}: {'a GPU' if cuda else 'no GPU'}, {threads} CPU cores; all of it goes to {folder}")
    took = {}
    def step(title: str, commands: list[str], environment: dict = together):
        print(f"\n== {title}", flush=True)
        t = time.perf_counter()
        run(commands, environment)
        took[title] = time.perf_counter() - t

    paths = f"--seed {cfg.seed} --data.train {clips}/sprites_train.json --data.root {clips}/videos --resume"
    step("draw the clips and write them as videos", [f"sprites.py --out {clips} --seed {cfg.seed}"])
    step("train a small SigLIP on single frames", [f"train.py --stage teacher --name demo/seed{cfg.seed} {paths}"],
         {"OMP_NUM_THREADS": str(threads)})
    step("teach the text encoder its words", [f"train.py --stage text --name demo/seed{cfg.seed} {paths}"],
         {"OMP_NUM_THREADS": str(threads)})
    given = f"--teacher {folder}/teacher --text {folder}/text {paths}"
    step("pretrain on the tokens that each mask keeps, then a little on all",
         [f"train.py --name demo/seed{cfg.seed}/{mask} --mask.name {mask} {given}" for mask in MASKS])
    score = f"eval.py --task sprites --data-root {clips}"
    step("score on held-out clips, all tokens, before the unmasked stage",
         [f"{score} --checkpoint {folder}/{mask}/masked" for mask in MASKS])
    step("the same, each with the tokens that its own mask keeps",
         [f"{score} --checkpoint {folder}/{mask}/masked --mask {mask}" for mask in MASKS])
    step("all tokens, after the unmasked stage",
         [f"{score} --checkpoint {folder}/{mask}" for mask in MASKS])

    print("\n== report", flush=True)
    t = time.perf_counter()
    kept, caption = look(folder, clips, cfg.seed)
    took["report"] = time.perf_counter() - t
    report = write_report(folder, kept, caption, took, time.perf_counter() - start, cuda, cfg.seed)
    path = "out/demo/report.md" if cfg.seed == 0 else f"{folder}/report.md"
    with open(path, "w") as f:
        f.write(report)
    print(f"\n{report}\nwritten to {path}")


def read(path: str) -> dict:
    with open(path) as f:
        return json.load(f)


def write_report(folder: str, kept: dict, caption: str, took: dict, seconds: float, cuda: bool, seed: int) -> str:
    """The numbers that the steps left in `folder`, as Markdown."""
    lines, preset = [], PRESETS["sprites"]
    for name, title in MASKS.items():
        before, own, after = (read(f"{folder}/{name}/{path}")["scores"] for path in (
            "masked/eval-sprites-all.json", f"masked/eval-sprites-{name}.json", "eval-sprites-all.json"))
        log = [row for row in show.read_log(f"{folder}/{name}") if row["stage"] == "pretrain"]
        mrm = np.mean([row["mrm"] for row in log[-5:]])
        cells = [both["similarity"][way]["R@1"] for both in (before, own, after) for way in ("T2V", "V2T")]
        matched = next(v for k, v in after.items() if k.startswith("match"))["T2V"]["R@1"]
        lines.append(f"| {title} | " + " | ".join(f"{c:.1f}" for c in (*cells, matched))
                     + f" | {100 * kept[title]:.0f} % | {mrm:.2f} |")
    N = (preset.data.size // preset.model.patch) ** 2
    K = keep_count(N, preset.mask.ratio)
    videos = read(f"{folder}/cluster_stm/eval-sprites-all.json")["videos"]
    columns = ("all tokens T2V", "V2T", "own masked tokens T2V", "V2T", "all, after the unmasked stage T2V", "V2T",
               "T2V re-ranked", "objects kept", "MRM")
    up = "" if seed else "seed0/"          # seed 0 reports one folder up
    table = "\n".join(lines)
    times = "\n".join(f"| {title} | {s:.0f} s |" for title, s in took.items())
    return f"""# The embedded demo, seed {seed}

Retrieval among {videos} held-out clips, none of which means what a training clip
means: R@1 in per cent (chance {100 / videos:.1f}). Both students saw {K} of {N} tokens a frame
({100 * K / N:.0f} %) in the masked stage, for the same number of steps, with the same teacher and text encoder.

| mask | {" | ".join(columns)} |
|---|---|---|---|---|---|---|---|---|---|
{table}

"Own masked tokens": the test clips masked as in training, scored before the unmasked stage; ClusterSTM's mask asks the
teacher at test time, a random one does not. "Objects kept": share of the objects of a held-out frame that keep a token.
MRM: normalised relevance error at the end, 1 = predicting each clip's mean, 0 = perfect.

**What this does not show.** With all tokens the comparison is one of learning speed: the structured mask shows the
student the objects at once, and a longer run may close the gap, or turn it. Claim from this table only that ClusterSTM
learns faster on few tokens and can be used with few.

![losses]({up}losses.png)

The clip "{caption}": its clusters, and what is kept.

![masks]({up}masks.png)

| step | time |
|---|---|
{times}
| all | {seconds:.0f} s |

{'On a GPU' if cuda else 'No GPU'}, {data.cores()} CPU cores, torch {torch.__version__}.
"""


if __name__ == "__main__":
    data.command("tools.demo", lambda: main(tyro.cli(Config)))
