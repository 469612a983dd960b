"""
The embedded demo, end to end: draw clips, train a teacher, pretrain with two masks, evaluate -> a page with pictures.

    python -m tools.demo                # what `make demo` runs; --seed 1 draws other clips, teacher and students

Each step is a command that can also be typed; it is printed before it runs. A demo that was stopped goes on where it
stopped. It writes out/demo/seedN, the page out/demo/report.html and the short report out/demo/report.md (of seeds above
0: both in out/demo/seedN). The page is written after each step: pictures of the masks come as soon as the teacher is
trained.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro
from torch import Tensor

from annotations import read_annotations
from config import PRESETS
from data import ClipDataset, DataConfig
from files import atomic_write_text, read_json, write_json
from runtime import num_cpus, run_cli
from targets import select_visible
from teacher import SigLIP
from tools import demo_page, show
from tools.demo_page import DemoResults, read_results, write_page
from tools.sprites import read_boxes

DEMO_MASKS = {"cluster_stm": "ClusterSTM", "random_frame": "random"}        # name in masking.MASKS -> title
NUM_ANALYSED = 256          # held-out clips on which the objects that keep a token are counted
# glibc returns freed memory to the system and faults it in again at each step, a tenth of the time. Here it keeps it.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 33)}


@dataclass
class Config:
    """Draw a data set, train a teacher, pretrain with two masks and evaluate: out/demo/report.html has the results."""
    seed: int = 0             # seed of the clips, the teacher and the students


def run_commands(commands: list[str], threads: int):
    """Run commands side by side, each with so many threads. If one fails, the demo ends with it and its log."""
    environment, running = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads)}, []
    for i, command in enumerate(commands):
        print(f"$ python {command}", flush=True)
        # The first command shows its progress; the others write to a log.
        log = None if i == 0 else open(os.path.join("out", "demo", f"log{i}.txt"), "w")
        running.append((command, log, subprocess.Popen([sys.executable, *command.split()], stdout=log, stderr=log,
                                                       env=environment)))
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


def share_on_objects(visible_ids: Tensor, boxes: np.ndarray, size: int, patch: int) -> float:
    """visible_ids (B, TK), boxes as in objects_at -> the share of the visible tokens that lie on an object."""
    return objects_at(boxes, size, patch).any(2).flatten(1).gather(1, visible_ids).float().mean().item()


@torch.no_grad()
def analyse(folder: str, clips_folder: str, seed: int) -> dict:
    """
    Draw what masks keep of one held-out clip, masks.png -> the fields `shares`, `on_object` and `clip_caption` of
    read_results: by mask, the share of held-out objects that keep a token and the share of kept tokens on objects.
    """
    teacher, preset = SigLIP.from_pretrained(f"{folder}/teacher"), PRESETS["sprites"]
    masks = {title: replace(preset.mask, name=name) for title, name in show.SHOWN_MASKS.items()}
    annotations = read_annotations(f"{clips_folder}/sprites_test.json", f"{clips_folder}/videos")
    dataset = ClipDataset(annotations, DataConfig(frame_cache=False), train=False)
    video = torch.stack([dataset[i].video for i in range(NUM_ANALYSED)])
    moving = next(i for i, a in enumerate(annotations) if a.captions[0].count("moves") == 2)    # two objects move in it
    show.plot_masks(video[moving], teacher, masks, f"{folder}/masks.png")
    tokens = torch.stack([teacher.encode_image(teacher.normalize(v))[0] for v in video])        # (B, T, N, C)
    boxes, size, patch = read_boxes(clips_folder, "test")[:NUM_ANALYSED], video.shape[-1], preset.vit.patch_size
    shares, on_object = {}, {}
    for title in DEMO_MASKS.values():
        ids = select_visible(teacher, tokens, masks[title], masks[title].ratio, seed)
        shares[title] = objects_kept(ids, boxes, size, patch)
        on_object[title] = share_on_objects(ids, boxes, size, patch)
    print("objects in view on which a mask keeps a token: " + ", ".join(
        f"{title} {100 * share:.0f} %" for title, share in shares.items()))
    return {"shares": shares, "on_object": on_object, "clip_caption": annotations[moving].captions[0]}


# ---------------------------------------------------------------------------------------------------------------------
# The steps, and the report

def list_steps(folder: str, clips: str, seed: int, threads: int) -> dict[str, Callable[[], dict | None]]:
    """Return the steps of the demo, title -> function; what it returns are fields of read_results."""
    def run(*commands):
        return lambda: run_commands(list(commands), max(1, threads // len(commands)))

    data = f"--seed {seed} --data.train-file {clips}/sprites_train.json --data.video-root {clips}/videos --resume"
    train, evaluate = "train.py sprites --name demo/seed", f"eval.py --task sprites --data-root {clips} --rerank 0"
    students = f"--teacher {folder}/teacher --text-encoder {folder}/text {data}"
    losses = {title: f"{folder}/{name}" for name, title in DEMO_MASKS.items()}
    return {
        "draw the clips and write them as videos": run(f"-m tools.sprites --out {clips} --seed {seed}"),
        "train a small SigLIP, the teacher, on single frames": run(f"{train}{seed} --stage teacher {data}"),
        "draw what masks keep, count the objects": lambda: analyse(folder, clips, seed),
        "train the text encoder on the captions": run(f"{train}{seed} --stage text {data}"),
        "pretrain on the tokens that each mask keeps, then a little on all": run(
            *(f"{train}{seed}/{mask} --mask.name {mask} {students}" for mask in DEMO_MASKS)),
        "draw the losses": lambda: show.plot_losses(losses, f"{folder}/losses.png"),
        "evaluate on held-out clips, each student with the tokens that its own mask keeps": run(
            *(f"{evaluate} --checkpoint {folder}/{mask}/before_unmasked --mask {mask} --out {folder}/{mask}/kept.json"
              for mask in DEMO_MASKS)),
        "evaluate with all tokens, before the unmasked stage": run(
            *(f"{evaluate} --checkpoint {folder}/{mask}/before_unmasked --out {folder}/{mask}/before.json"
              for mask in DEMO_MASKS)),
        "evaluate with all tokens, after the unmasked stage": run(
            *(f"{evaluate} --checkpoint {folder}/{mask} --save-scores --out {folder}/{mask}/after.json"
              for mask in DEMO_MASKS)),
    }


def main(cfg: Config):
    folder = f"out/demo/seed{cfg.seed}"
    clips = "data/sprites" if cfg.seed == 0 else f"data/sprites-seed{cfg.seed}"
    report = "out/demo/report" if cfg.seed == 0 else f"{folder}/report"
    os.makedirs(folder, exist_ok=True)
    machine = f"{'A' if torch.cuda.is_available() else 'No'} GPU, {num_cpus()} CPU cores, torch {torch.__version__}"
    print(f"demo, seed {cfg.seed}: {machine}; it writes {folder} and, as it goes, {report}.html")
    steps, path = list_steps(folder, clips, cfg.seed, num_cpus()), f"{folder}/state.json"
    state = read_json(path) if os.path.isfile(path) else {}
    # Of a demo that was stopped: title -> seconds of the steps that it has ended; what it had found by then.
    timings, known = state.get("timings", {}), state.get("known", {"shares": {}, "on_object": {}, "clip_caption": ""})
    resumed = state.get("resumed", False) or 0 < len(timings) < len(steps)

    def update_page(step: int) -> DemoResults:
        running, *remaining = [*steps, "", ""][step:len(steps) + 1]
        results = read_results(folder, clips, PRESETS["sprites"], DEMO_MASKS, **known, seed=cfg.seed, timings=timings,
                               resumed=resumed, machine=machine, running=running,
                               remaining=[title for title in remaining if title])
        write_page(f"{report}.html", results)
        return results

    for i, (title, run) in enumerate(steps.items()):
        print(f"\n== {title}", flush=True)
        if i:                                       # before, there are no clips to tell of
            update_page(i)
        begin = time.perf_counter()
        known |= run() or {}
        timings.setdefault(title, time.perf_counter() - begin)
        write_json(path, {"timings": timings, "known": known, "resumed": resumed})
    text = format_report(update_page(len(steps)))
    atomic_write_text(f"{report}.md", text)
    print(f"\n{text}\nwritten to {report}.md; {report}.html has more: three searches, what the table shows and why")


def format_report(results: DemoResults) -> str:
    """Return the short report as Markdown."""
    rows = [f"| {mask.title} | {100 * mask.objects:.0f} % | " + " | ".join(
        f"{r.value:.1f} ({r.low:.1f} to {r.high:.1f})" for r in (mask.kept, mask.before, mask.after)) + " |"
        for mask in results.masks]
    times = "\n".join(f"| {title} | {seconds:.0f} s |" for title, seconds in results.timings.items())
    pictures = "" if results.seed else "seed0/"         # the report of seed 0 is one folder above its pictures
    table = "\n".join(rows)
    return f"""# The embedded demo, seed {results.seed}

| mask | objects kept | R@1, kept tokens | R@1, all tokens, before | R@1, all tokens, after |
|---|---|---|---|---|
{table}

- Objects kept: the share of the objects in a held-out frame on which the mask keeps a token.
- R@1: text-to-video, in per cent, among {results.test_clips} held-out clips (chance {100 / results.test_clips:.1f}),
  with 95 % intervals. No held-out clip shares its meaning with a training clip.
- Kept tokens: the student before the unmasked stage, with the {results.K} of {results.N} tokens a frame that its own
  mask keeps. ClusterSTM needs the teacher for that, random tokens do not.
- All tokens: with all tokens, before and after the unmasked stage.

Both students had the same clips, steps, teacher and text encoder. **What this does not show.** With all tokens the
comparison is one of learning speed: a longer run may close the gap, or reverse it.

![losses]({pictures}losses.png)

The clip "{results.clip_caption}": its clusters, and the tokens that masks keep.

![masks]({pictures}masks.png)

| step | time |
|---|---|
{times}
| all | {results.seconds:.0f} s |

{results.machine}.{demo_page.RESUMED * results.resumed}
"""


def cli():
    main(tyro.cli(Config, prog="python -m tools.demo"))


if __name__ == "__main__":
    run_cli("tools.demo", cli)
