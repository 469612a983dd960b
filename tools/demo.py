"""
The embedded demo, end to end: draw clips, train a teacher, pretrain with two masks, evaluate -> a report with pictures.

    python -m tools.demo                # what `make demo` runs; --seed 1 draws other clips, teacher and students

Each step is a command that can also be typed; it is printed before it runs. A demo that was stopped goes on where it
stopped. It writes out/demo/seedN and the report out/demo/report.md (out/demo/seedN/report.md for seeds above 0).
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro
from torch import Tensor

from annotations import read_annotations
from config import PRESETS
from data import ClipDataset, DataConfig
from files import read_json
from masking import keep_count
from runtime import num_cpus, run_cli
from targets import select_visible
from teacher import SigLIP
from tools import show
from tools.sprites import read_boxes

DEMO_MASKS = {"cluster_stm": "ClusterSTM", "random_frame": "random"}        # name in masking.MASKS -> title
NUM_ANALYSED = 256          # held-out clips on which the share of objects kept is counted


@dataclass
class Config:
    """Draw a data set, train a teacher, pretrain with two masks and evaluate: out/demo/report.md has the results."""
    seed: int = 0             # seed of the clips, the teacher and the students


def run_commands(commands: list[str], environment: dict[str, str]):
    """Run commands side by side. If one fails, the demo ends with that command and its log."""
    running = []
    for i, command in enumerate(commands):
        print(f"$ python {command}", flush=True)
        # The first command shows its progress; the others write to a log.
        log = None if i == 0 else open(os.path.join("out", "demo", f"log{i}.txt"), "w")
        running.append((command, log, subprocess.Popen([sys.executable, *command.split()], stdout=log, stderr=log,
                                                       env={**os.environ, **environment})))
    for command, log, process in running:
        if process.wait():
            output = f"; its output ends with: {open(log.name).read()[-2000:]}" if log else ""
            raise ValueError(f"`python {command}` ended with exit code {process.returncode}{output}")


# ---------------------------------------------------------------------------------------------------------------------
# How many objects a mask keeps

def objects_at(boxes: np.ndarray, size: int, patch: int) -> Tensor:
    """
    boxes (B, T, objects, 4) in pixels, NaN for an absent object -> (B, T, objects, N) bool: the tokens on each object.

    A token is on an object if the box covers at least a quarter of its patch, or it contains a quarter of the box.
    """
    low = torch.arange(size // patch) * patch
    x0, y0, x1, y1 = torch.as_tensor(boxes).clamp(0, size).unbind(-1)                       # (B, T, objects) each

    def overlap_1d(start, end):
        return (torch.minimum(end[..., None], low + patch) - torch.maximum(start[..., None], low)).clamp_min(0)

    overlap = (overlap_1d(y0, y1)[..., :, None] * overlap_1d(x0, x1)[..., None, :]).flatten(-2)     # (B, T, objects, N)
    return overlap >= 0.25 * ((x1 - x0) * (y1 - y0)).clamp_max(patch * patch)[..., None]


def objects_kept(visible_ids: Tensor, boxes: np.ndarray, size: int, patch: int) -> float:
    """visible_ids (B, TK), boxes as in objects_at -> the share of the objects in view with a visible token on them."""
    B, T, _, _ = boxes.shape
    N = (size // patch) ** 2
    visible = torch.zeros(B, T * N, dtype=torch.bool).scatter(1, visible_ids, True).view(B, T, 1, N)
    in_view = ~torch.as_tensor(boxes)[..., 0].isnan()
    return ((objects_at(boxes, size, patch) & visible).any(-1) & in_view).sum().item() / in_view.sum().item()


@torch.no_grad()
def analyse(folder: str, clips_folder: str, seed: int) -> tuple[dict[str, float], str]:
    """
    Draw the pictures of the runs and of one held-out clip.

    Returns the share of held-out objects that each mask keeps, and the caption of the clip in the picture.
    """
    teacher = SigLIP.from_pretrained(f"{folder}/teacher")
    preset = PRESETS["sprites"]
    masks = {title: replace(preset.mask, name=name) for name, title in DEMO_MASKS.items()}
    annotations = read_annotations(f"{clips_folder}/sprites_test.json", f"{clips_folder}/videos")
    dataset = ClipDataset(annotations, DataConfig(frame_cache=False), train=False)
    video = torch.stack([dataset[i].video for i in range(NUM_ANALYSED)])
    tokens = torch.stack([teacher.encode_image(teacher.normalize(v))[0] for v in video])        # (B, T, N, C)
    boxes = read_boxes(clips_folder, "test")[:NUM_ANALYSED]
    moving = next(i for i, a in enumerate(annotations) if a.captions[0].count("moves") == 2)    # two objects move in it
    show.plot_masks(video[moving], teacher, masks, f"{folder}/masks.png")
    show.plot_losses({title: f"{folder}/{name}" for name, title in DEMO_MASKS.items()}, f"{folder}/losses.png")
    visible_ids = {title: select_visible(teacher, tokens, mask, mask.ratio, seed) for title, mask in masks.items()}
    size, patch = video.shape[-1], preset.vit.patch_size
    shares = {title: objects_kept(ids, boxes, size, patch) for title, ids in visible_ids.items()}
    return shares, annotations[moving].captions[0]


# ---------------------------------------------------------------------------------------------------------------------
# The steps, and the report

def main(cfg: Config):
    start = time.perf_counter()
    folder = f"out/demo/seed{cfg.seed}"
    clips = "data/sprites" if cfg.seed == 0 else f"data/sprites-seed{cfg.seed}"
    os.makedirs(folder, exist_ok=True)
    cuda = torch.cuda.is_available()
    threads = num_cpus()
    one_command = {"OMP_NUM_THREADS": str(threads)}
    side_by_side = {"OMP_NUM_THREADS": str(max(1, threads // len(DEMO_MASKS)))}
    print(f"demo, seed {cfg.seed}: {'a GPU' if cuda else 'no GPU'}, {threads} CPU cores; it writes {folder}")
    timings = {}                        # title of a step -> seconds

    def step(title: str, commands: list[str], environment: dict = side_by_side):
        print(f"\n== {title}", flush=True)
        t = time.perf_counter()
        run_commands(commands, environment)
        timings[title] = time.perf_counter() - t

    step("draw the clips and write them as videos", [f"-m tools.sprites --out {clips} --seed {cfg.seed}"])
    data = f"--seed {cfg.seed} --data.train-file {clips}/sprites_train.json --data.video-root {clips}/videos --resume"
    train = "train.py sprites --name demo/seed"
    step("train a small SigLIP on single frames", [f"{train}{cfg.seed} --stage teacher {data}"], one_command)
    step("train the text encoder on the captions", [f"{train}{cfg.seed} --stage text {data}"], one_command)
    flags = f"--teacher {folder}/teacher --text-encoder {folder}/text {data}"
    step("pretrain on the tokens that each mask keeps, then a little on all",
         [f"{train}{cfg.seed}/{mask} --mask.name {mask} {flags}" for mask in DEMO_MASKS])
    evaluate = f"eval.py --task sprites --data-root {clips}"
    step("evaluate on held-out clips, all tokens, before the unmasked stage",
         [f"{evaluate} --checkpoint {folder}/{mask}/before_unmasked" for mask in DEMO_MASKS])
    step("the same, each student with the tokens that its own mask keeps",
         [f"{evaluate} --checkpoint {folder}/{mask}/before_unmasked --mask {mask}" for mask in DEMO_MASKS])
    step("evaluate with all tokens, after the unmasked stage",
         [f"{evaluate} --checkpoint {folder}/{mask}" for mask in DEMO_MASKS])

    print("\n== report", flush=True)
    t = time.perf_counter()
    shares, caption = analyse(folder, clips, cfg.seed)
    timings["report"] = time.perf_counter() - t
    report = write_report(folder, shares, caption, timings, time.perf_counter() - start, cuda, cfg.seed)
    path = "out/demo/report.md" if cfg.seed == 0 else f"{folder}/report.md"
    with open(path, "w") as f:
        f.write(report)
    print(f"\n{report}\nwritten to {path}")


def write_report(folder: str, shares: dict[str, float], caption: str, timings: dict[str, float], seconds: float,
                 cuda: bool, seed: int) -> str:
    """Return the report as Markdown, from the results that the steps left in `folder`."""
    rows, preset = [], PRESETS["sprites"]
    for name, title in DEMO_MASKS.items():
        before, masked, after = (read_json(f"{folder}/{name}/{path}")["scores"] for path in (
            "before_unmasked/eval-sprites-all.json", f"before_unmasked/eval-sprites-{name}.json",
            "eval-sprites-all.json"))
        log = [row for row in show.read_log(f"{folder}/{name}") if row["stage"] == "pretrain"]
        mrm = np.mean([row["mrm"] for row in log[-5:]])
        cells = [scores["similarity"][way]["R@1"] for scores in (before, masked, after) for way in ("T2V", "V2T")]
        reranked = next(scores for key, scores in after.items() if key.startswith("match"))["T2V"]["R@1"]
        rows.append(f"| {title} | " + " | ".join(f"{c:.1f}" for c in (*cells, reranked))
                    + f" | {100 * shares[title]:.0f} % | {mrm:.2f} |")
    N = (preset.data.image_size // preset.vit.patch_size) ** 2
    K = keep_count(N, preset.mask.ratio)
    videos = read_json(f"{folder}/cluster_stm/eval-sprites-all.json")["videos"]
    columns = ("all tokens T2V", "V2T", "own masked tokens T2V", "V2T", "all, after the unmasked stage T2V", "V2T",
               "T2V re-ranked", "objects kept", "MRM")
    pictures = "" if seed else "seed0/"         # the report of seed 0 is one folder above its pictures
    table = "\n".join(rows)
    times = "\n".join(f"| {title} | {s:.0f} s |" for title, s in timings.items())
    return f"""# The embedded demo, seed {seed}

Retrieval among {videos} held-out clips, none of which shares its meaning with a training clip: R@1 in per cent
(chance {100 / videos:.1f}). Both students saw {K} of {N} tokens a frame ({100 * K / N:.0f} %) in the masked stage, for
the same number of steps, with the same teacher and text encoder.

| mask | {" | ".join(columns)} |
|---|---|---|---|---|---|---|---|---|---|
{table}

- "T2V": a caption is the query, its clip is searched; "V2T": a clip is the query, its caption is searched.
- "All tokens": the student before the unmasked stage sees every token of the test clips.
- "Own masked tokens": the same student sees the test clips masked as in training. ClusterSTM's mask needs the teacher
  at test time, a random one does not.
- "All, after the unmasked stage": the final student sees every token. "Re-ranked": the matching head then orders the
  best results again.
- "Objects kept": the share of the objects in a held-out frame on which the mask keeps a token.
- "MRM": the normalised relevance error at the end of the masked stage: 1 = predicting each clip's mean, 0 = perfect.

**What this does not show.** With all tokens the comparison is one of learning speed: the structured mask shows the
student the objects at once, and a longer run may close the gap, or reverse it. Claim from this table only that
ClusterSTM learns faster on few tokens and can be used with few.

![losses]({pictures}losses.png)

The clip "{caption}": its clusters, and the tokens that each mask keeps.

![masks]({pictures}masks.png)

| step | time |
|---|---|
{times}
| all | {seconds:.0f} s |

{'On a GPU' if cuda else 'No GPU'}, {num_cpus()} CPU cores, torch {torch.__version__}.
"""


def cli():
    main(tyro.cli(Config, prog="python -m tools.demo"))


if __name__ == "__main__":
    run_cli("tools.demo", cli)
