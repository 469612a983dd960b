"""
Pictures of masks and of runs: a video and a teacher, or the logs of train.py -> a picture or a video file.

    python -m tools.show mask VIDEO --mask cluster_stm tube umt --out picture.png     # a column a mask, a row a frame
    python -m tools.show mask VIDEO --mask cluster_stm tube umt --out picture.mp4     # the same columns as a video
    python -m tools.show run out/demo/seed0/cluster_stm out/demo/seed0/random_frame --out run.png
"""

import json
import os
import textwrap
import time
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as nnf
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from files import escape_control
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from masking import MASK_INPUTS, MASKS, MaskConfig, keep_count, log_attention
from runtime import run_cli
from targets import select_visible
from teacher import SigLIP
from video import decode_frames, resize, sample_frame_indices, write_video

DEMO_TEACHER = "out/demo/seed0/teacher"


@dataclass
class MaskCommand:
    """Draw a clip's frames, its clusters, and what each mask keeps, side by side: a picture, or a video (.mp4)."""
    video: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VIDEO")]     # video file
    teacher: str = DEMO_TEACHER                                     # folder or hub id of a SigLIP checkpoint
    mask: Annotated[tuple[str, ...], tyro.conf.arg(help=f"a column for each mask, of {', '.join(MASKS)}")] = (
        "cluster_stm", "random_frame")
    ratio: float = 0.9                                              # share of each frame's tokens that is masked
    quantile: float = 0.95                                          # d_c of the clusters as a quantile of distances
    frames: int = 8                                                 # frames to show (fewer if the video is shorter)
    size: int = 0       # pixels a side of the teacher's input; 0: its own size; larger: a finer grid of tokens
    caption: str = ""                                               # caption, which the mask text_guided needs
    seed: int = 0                                                   # seed of random masks
    out: str = "masks.png"                                          # picture or .mp4 file to write


@dataclass
class RunCommand:
    """Compare runs of train.py in one picture: losses, held-out scores, speed, learning rate, memory."""
    folders: tyro.conf.Positional[tuple[str, ...]]                  # out/NAME, one or more
    out: str = "run.png"                                            # picture to write


COMMANDS = {"mask": MaskCommand, "run": RunCommand}


# ---------------------------------------------------------------------------------------------------------------------
# What masks keep

@dataclass
class ClipMasks:
    """The clusters of a clip, and the tokens of it that each mask keeps."""
    grid: tuple[int, int]               # (h, w), N = h * w
    labels: np.ndarray                  # (T, N), the cluster of each token
    centres: np.ndarray                 # (T, K), the centre of each cluster
    masks: dict[str, np.ndarray]        # name -> (T, N) bool, True: visible
    ms: dict[str, float]                # name -> time of the mask alone, in milliseconds

    def figures(self, name: str) -> tuple[str, ...]:
        """Return the lines of text above a mask's column."""
        visible, rows = self.masks[name], np.arange(len(self.labels))[:, None]
        (T, N), counts = visible.shape, visible.sum(1)
        count = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}-{counts.max()}"
        covered = np.zeros(self.centres.shape, bool)
        covered[rows.repeat(N, 1)[visible], self.labels[visible]] = True
        both = (visible[:-1] & visible[1:]).sum()
        stay = f"{100 * both / max(1, visible[:-1].sum()):.0f} %" if T > 1 else "-"
        return f"{count} of {N} tokens", f"{100 * covered.mean():.0f} % of clusters", f"{stay} stay", \
            f"{self.ms[name]:.{0 if self.ms[name] >= 10 else 1}f} ms"


@torch.no_grad()
def compute_masks(video: Tensor, teacher: SigLIP, configs: dict[str, MaskConfig], clusters: MaskConfig,
                  grid: tuple[int, int] | None = None, caption: str = "", seed: int = 0) -> ClipMasks:
    """
    video (T, 3, H, W) uint8 -> its clusters, by the settings `clusters`, and what each mask of `configs` keeps.

    The frames are resized to `grid` patches of the teacher; without a grid they must have the teacher's image size.
    """
    pixels = teacher.normalize(video, grid)
    grid = teacher.patch_grid_of(pixels)
    tokens = teacher.forward_features(pixels)                                                   # (T, N, C)
    T, N, _ = tokens.shape
    labels, centres, _ = density_peaks(tokens, keep_count(N, clusters.ratio), bandwidth(tokens, clusters.quantile),
                                       clusters.density, clusters.assign)
    aux = {"aligned": teacher.token_embeddings(tokens, grid)[None],
           "logits": log_attention(teacher.pool_attention(tokens))[None],
           "text": teacher.encode_text(teacher.tokenize([caption])) if caption else None}
    masks, ms = {}, {}
    for name, cfg in configs.items():
        def timed_mask(*args, mask=cfg, name=name, **kwargs):
            start = time.perf_counter()
            ids = mask(*args, **kwargs)
            ms[name] = min(ms.get(name, torch.inf), 1000 * (time.perf_counter() - start))
            return ids
        try:
            for _ in range(2):                                          # the first call includes one-time set-up
                ids = select_visible(teacher, tokens[None], timed_mask, cfg.ratio, seed, grid, **aux)[0]
        except ValueError as error:
            if caption or "text" not in MASK_INPUTS.get(cfg.name, ()):
                raise
            raise ValueError(f"{error}; --caption gives the text") from None
        masks[name] = torch.zeros(T * N, dtype=torch.bool).scatter(0, ids, True).view(T, N).numpy()
    return ClipMasks(grid, *(x.numpy() for x in match_clusters(tokens, labels, centres)), masks, ms)


def match_clusters(tokens: Tensor, labels: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """
    Renumber the clusters of each frame so that a number stands for similar tokens in all frames.

    tokens (T, N, C), labels (T, N), centres (T, K) -> labels, centres. A token's similarity to a number is its mean
    cosine with all tokens of that number in the frames before; its frame's numbers are chosen for the largest sum.
    """
    T, K = centres.shape
    members = nnf.one_hot(labels, K).float()                                                    # (T, N, K)
    sums, sizes = members.transpose(1, 2) @ nnf.normalize(tokens.float(), dim=-1), members.sum(1)[..., None]
    number, (total, count) = torch.arange(K).repeat(T, 1), (sums[0].clone(), sizes[0].clone())  # (K, C), (K, 1)
    for t in range(1, T):
        number[t] = assign_pairs(sums[t] @ (total / count).T)
        total[number[t]] += sums[t]
        count[number[t]] += sizes[t]
    return number.gather(1, labels), torch.empty_like(centres).scatter(1, number, centres)


def assign_pairs(score: Tensor) -> Tensor:
    """score (K, K) -> a column for each row, (K,), so that no exchange of two columns raises the sum of the scores."""
    score, column = score.double(), torch.arange(len(score))
    least = 1e-9 * score.abs().max()                            # rounding alone must not exchange them for ever
    while True:
        chosen = score[:, column]
        gain = chosen + chosen.T - chosen.diagonal() - chosen.diagonal()[:, None]               # of each exchange
        i, j = divmod(gain.argmax().item(), len(score))
        if gain[i, j] <= least:
            return column
        column[[i, j]] = column[[j, i]]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of frames

def upsample(x: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """x (T, N, ...), one value per token -> (T, H, W, ...), the grid stretched over frames of any shape."""
    (h, w), (H, W) = grid, shape
    i, j = np.arange(H) * h // H, np.arange(W) * w // W
    return x.reshape(len(x), h, w, *x.shape[2:])[:, i[:, None], j]


def dim(frames: np.ndarray, visible: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """frames (T, H, W, 3) in [0, 1], visible (T, N) bool -> the frames with all masked tokens darkened."""
    return np.where(upsample(visible, grid, frames.shape[1:3])[..., None], frames, 0.22 * frames)


def outline(frames: np.ndarray, visible: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Draw a grey line round the visible tokens of dimmed frames (T, H, W, 3): a dark frame hides its bright tokens."""
    bright = np.pad(upsample(visible, grid, frames.shape[1:3]), ((0, 0), (1, 1), (1, 1)))
    beside = bright[:, :-2, 1:-1] | bright[:, 2:, 1:-1] | bright[:, 1:-1, :-2] | bright[:, 1:-1, 2:]
    return np.where((beside & ~bright[:, 1:-1, 1:-1])[..., None], 0.5, frames)


def colours(K: int) -> np.ndarray:
    """Return K different colours (K, 3) in [0, 1]; successive ones differ strongly."""
    k = np.arange(K)
    saturation, value = np.array([1, 0.5, 0.9])[k % 3], np.array([0.95, 1, 0.6])[k % 3]
    return matplotlib.colors.hsv_to_rgb(np.stack([(0.58 + k * 0.381966) % 1, saturation, value], -1))


def colour_clusters(frames: np.ndarray, labels: np.ndarray, centres: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """frames (T, H, W, 3) in [0, 1], labels (T, N), centres (T, K) -> the frames, each cluster tinted in its colour."""
    return 0.35 * frames + 0.65 * upsample(colours(centres.shape[1])[labels], grid, frames.shape[1:3])


def mark_centres(frames: np.ndarray, labels: np.ndarray, centres: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Draw black lines between the clusters and a white dot on each centre."""
    frames, (h, w), (T, H, W, _) = frames.copy(), grid, frames.shape
    label = upsample(labels, grid, (H, W))
    frames[:, 1:][label[:, 1:] != label[:, :-1]] = 0
    frames[:, :, 1:][label[:, :, 1:] != label[:, :, :-1]] = 0
    y, x = (((n + 0.5) * size / cells).astype(int) for n, size, cells in
            ((centres // w, H, h), (centres % w, W, w)))                                # (T, K), the dots' middles
    radius = min(H // h, W // w) // 6
    for t in range(T):
        for cy, cx in zip(y[t], x[t], strict=True):
            for r, grey in ((radius + 1, 0), (radius, 1)):
                frames[t, max(0, cy - r):cy + r + 1, max(0, cx - r):cx + r + 1] = grey
    return frames


SHOWN_MASKS = {"ClusterSTM": "cluster_stm", "UMT": "umt", "tube": "tube", "random": "random_frame"}     # title -> mask


def plot_masks(video: Tensor, teacher: SigLIP, configs: dict[str, MaskConfig], out: str):
    """Draw video (T, 3, H, W) uint8 as a picture: one row for the frames, the clusters, and each mask."""
    cluster_cfg = next((cfg for cfg in configs.values() if cfg.name == "cluster_stm"), None)
    result = compute_masks(video, teacher, configs, cluster_cfg or MaskConfig())
    frames = video.permute(0, 2, 3, 1).numpy() / 255
    T, rows = len(frames), {"frames": frames}
    for name, visible in result.masks.items():
        if configs[name] is cluster_cfg:
            rows[f"{result.centres.shape[1]} clusters a frame"] = colour_clusters(
                frames, result.labels, result.centres, result.grid)
        rows[f"{name} keeps"] = dim(frames, visible, result.grid)
    width, height = 1.25 * np.sqrt(np.divide(video.shape[-2:][::-1], video.shape[-2:]))         # inches a frame
    figure, axes = plt.subplots(len(rows), T, figsize=(width * T + 1.5, (height + 0.05) * len(rows)), squeeze=False)
    for row_axes, (name, images) in zip(axes, rows.items(), strict=True):
        row_axes[0].set_ylabel(name.replace("_frame", ""), rotation=0, ha="right", va="center")
        for axis, image in zip(row_axes, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    save(figure, out)


# ---------------------------------------------------------------------------------------------------------------------
# Masks side by side

WIDE, GAP, LINE, EDGE = 1600, 8, 17, 64                 # pixels: picture width, gap of frames, line of text, margin
NOTE = ("clusters: share of a frame's clusters in which a token is kept. stay: share of kept tokens whose place is "
        "kept in the next frame shown too. ms: the mask alone, for all frames shown.")


@dataclass
class Column:
    """A column of the picture: frames (T, h, w, 3) uint8 and the text above them."""
    title: str
    figures: tuple[str, ...]
    frames: np.ndarray


def font(size: int = 13, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib ships."""
    name = f"DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


@dataclass
class Sheet:
    """The layout of a picture of columns. Columns that do not fit its width go into bands below each other."""
    columns: list[Column]
    rows: int                           # frames below each other

    def __post_init__(self):
        self.shape = self.columns[0].frames.shape[1:3]
        texts = [(font(bold=True), c.title) for c in self.columns]
        texts += [(font(), line) for c in self.columns for line in c.figures]
        self.column_width = max(self.shape[1], *(round(f.getlength(text)) for f, text in texts)) + GAP
        count, fitting = len(self.columns), max(1, (WIDE - EDGE) // self.column_width)
        self.bands = -(-count // fitting)
        self.columns_per_band = -(-count // self.bands)
        self.lines = 1 + max(len(c.figures) for c in self.columns)
        self.band_height = self.lines * LINE + GAP + self.rows * (self.shape[0] + GAP) + GAP
        width = EDGE + self.columns_per_band * self.column_width
        self.note = textwrap.wrap(NOTE, width // 7)
        height = GAP + self.bands * self.band_height + LINE * len(self.note) + GAP
        self.size = tuple(-(-side // 2) * 2 for side in (width, height))        # (W, H), even for yuv420p

    def head(self, column: int) -> tuple[int, int]:
        """Return left and top of a column's title."""
        band, index = divmod(column, self.columns_per_band)
        return EDGE + index * self.column_width, GAP + band * self.band_height

    def place(self, column: int, row: int) -> tuple[int, int]:
        """Return left and top of a frame."""
        x, y = self.head(column)
        return x, y + self.lines * LINE + GAP + row * (self.shape[0] + GAP)

    def draw(self, indices: list[int], seconds: list[float]) -> np.ndarray:
        """Draw the frames `indices` of all columns, one row each -> (H, W, 3) uint8."""
        picture = Image.new("RGB", self.size, "white")
        pen = ImageDraw.Draw(picture)
        for c, column in enumerate(self.columns):
            x, y = self.head(c)
            pen.text((x, y), column.title, "black", font(bold=True))
            for i, line in enumerate(column.figures, 1):
                pen.text((x, y + i * LINE), line, (70, 70, 70), font())
            for row, t in enumerate(indices):
                picture.paste(Image.fromarray(column.frames[t]), self.place(c, row))
                if c % self.columns_per_band == 0:
                    middle = self.place(c, row)[1] + self.shape[0] // 2
                    pen.text((EDGE - GAP, middle), f"{seconds[t]:.1f} s", "black", font(), anchor="rm")
        for i, line in enumerate(self.note):
            pen.text((GAP, self.size[1] - GAP - (len(self.note) - i) * LINE), line, (70, 70, 70), font(12))
        return np.asarray(picture)


def resize_for_display(video: Tensor, columns: int, max_side: int) -> np.ndarray:
    """
    video (T, 3, H, W) uint8 -> (T, h, w, 3) uint8 of the same aspect ratio, so large that the columns fill a picture.

    No side exceeds max_side. Small frames are enlarged by a whole factor.
    """
    H, W = video.shape[2:]
    bands = -(-columns // 10)
    width = (WIDE - EDGE) // -(-columns // bands) - GAP
    scale = min(width / W, max_side / max(H, W))
    if scale >= 1:
        video = video.repeat_interleave(int(scale), 2).repeat_interleave(int(scale), 3)
    else:
        video = resize(video, (max(1, round(H * scale)), max(1, round(W * scale))))
    return video.permute(0, 2, 3, 1).numpy()


def side_by_side(video: Tensor, seconds: list[float], result: ClipMasks, configs: dict[str, MaskConfig], out: str):
    """Write video (T, 3, H, W) uint8, with its frames' times, as a picture (a row per frame) or an .mp4."""
    is_video = out.lower().endswith(".mp4")
    frames = resize_for_display(video, 2 + len(configs), 480 if is_video else 240)
    unit = frames / 255                                                                 # (T, h, w, 3) in [0, 1]

    def to_uint8(x):
        return (255 * x).round().astype(np.uint8)

    clusters = result.labels, result.centres, result.grid
    tinted = mark_centres(colour_clusters(unit, *clusters), *clusters)
    columns = [Column("frame", (f"{result.grid[0]} x {result.grid[1]} tokens",), frames),
               Column("clusters", (f"{result.centres.shape[1]} a frame", "dot: centre"), to_uint8(tinted))]
    for name, cfg in configs.items():
        note = ("by log attention",) if "logits" in MASK_INPUTS.get(cfg.name, ()) else ()
        visible = result.masks[name]
        picture = outline(dim(unit, visible, result.grid), visible, result.grid)
        columns.append(Column(name, (*result.figures(name), *note), to_uint8(picture)))
    T = len(frames)
    if is_video:
        sheet = Sheet(columns, 1)
        write_video(out, np.stack([sheet.draw([t], seconds) for t in range(T)]), fps=2, crf="16")
    else:
        Image.fromarray(Sheet(columns, T).draw(list(range(T)), seconds)).save(out, optimize=True)


def sample_moments(path: str, count: int, size: int) -> tuple[Tensor, list[float]]:
    """Decode the middle frame of each of `count` equal parts, short side at most `size` -> frames, their seconds."""
    seconds = []

    def choose(times: np.ndarray) -> np.ndarray:
        indices = np.unique(sample_frame_indices(count, len(times)))       # a short video has fewer than `count`
        seconds[:] = times[indices].tolist()
        return indices

    return decode_frames(path, choose, size), seconds


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def is_log_row(row) -> bool:
    """Say whether a value can be a row of log.jsonl: a stage, a step, and numbers, or null for NaN and infinity."""
    return (isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
            and all(x is None or isinstance(x, (int, float)) for key, x in row.items() if key != "stage"))


def read_log(folder: str) -> list[dict]:
    """Read the rows of a run's log.jsonl. A damaged row is left out, and printed."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; {folder} is not a run of train.py")
    rows = []
    with open(path, errors="replace") as f:
        for i, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if is_log_row(row):
                rows.append(row)
            else:
                print(escape_control(f"{path}, line {i} is damaged and left out"))
    return rows


LOSSES = ("sigmoid", "mrm", "align", "pixels", "vtc", "vtm", "mlm", "lm", "distill")       # or with a budget: vtc_96
TITLES = {"mrm": "MRM (1 = the clip's mean)", "align": "visible tokens", "pixels": "pixels",
          "val_T2V_R@1": "held-out T2V R@1, %", "val_V2T_R@1": "held-out V2T R@1, %",
          "clips/s": "clips a second", "data_wait": "share of time waiting for data", "lr": "learning rate",
          "grad_norm": "norm of the gradient", "memory": "peak memory, GiB"}
UNITS = {name: "nats" for name in ("sigmoid", "vtc", "vtm", "mlm", "lm")} | {"mrm": "normalised squared error"}
FROM_ZERO = ("val_T2V_R@1", "val_V2T_R@1", "clips/s", "data_wait", "memory")


def first_steps(log: list[dict]) -> dict[str, int]:
    """Return, for each stage of a log in order, the number of steps of the stages before it."""
    last = {}                                                           # stage -> its last step
    for row in log:
        last[row["stage"]] = max(row["step"], last.get(row["stage"], 0))
    return dict(zip(last, accumulate(last.values(), initial=0), strict=False))


def mark_stages(axis, first: dict[str, int], colour, named: set):
    """
    Draw a dotted line where a stage of a run begins after another, with the names of both beside it, once at a place
    (`named`).
    """
    for (before, _), (stage, step) in pairwise(first.items()):
        axis.axvline(step, color=colour, linewidth=0.8, linestyle=":")
        if (stage, step) not in named:
            named.add((stage, step))
            for name, side in ((before, "right"), (stage, "left")):
                axis.text(step, 0.99, as_label(name), fontsize=7, color="grey", rotation=90, ha=side, va="top",
                          transform=axis.get_xaxis_transform())


def loss_names(keys: set[str]) -> list[str]:
    """Return the keys that name losses, in the order of LOSSES and, of one loss, the largest budget first."""
    parts = {key: (LOSSES.index(loss), -int(budget or 0)) for key in keys
             for loss, _, budget in [key.partition("_")] if loss in LOSSES}
    return sorted(parts, key=parts.get)


def plot_losses(folders: dict[str, str], out: str, extra: tuple[str, ...] = ()):
    """
    Plot the logs of runs, {title: folder}: a panel for each loss and for each `extra` key, a line for each run, which
    has one colour in all panels. All panels have the same x axis.

    The stages of a run follow each other along it, with a dotted line where a stage begins.
    """
    logs = {title: read_log(folder) for title, folder in folders.items()}
    rows = [row for log in logs.values() for row in log]
    keys = {key for row in rows for key, value in row.items() if value is not None}
    names = [*loss_names(keys), *(name for name in extra if name in keys)]
    if not names:
        raise ValueError(f"{', '.join(folders.values())}: log.jsonl has no losses yet")
    width = min(4, len(names))
    height = -(-len(names) // width)
    figure, axes = plt.subplots(height, width, figsize=(3.2 * width, 2.8 * height), squeeze=False,
                                layout="constrained")
    palette = plt.get_cmap("tab10").colors if len(logs) <= 10 else colours(len(logs))
    for axis, name in zip(axes.flat, names, strict=False):
        end, named = 0, set()
        for (title, log), colour in zip(logs.items(), palette, strict=False):
            first = first_steps(log)
            logged = [row for row in log if name in row]
            values = [float("nan") if row[name] is None else row[name] for row in logged]       # None: not finite
            steps = [row["step"] + first[row["stage"]] for row in logged]
            axis.plot(steps, values, label=as_label(title), linewidth=1, color=colour,
                      marker="." if len(steps) < 20 else None, markersize=4)
            mark_stages(axis, first, colour, named)
            end = max([end, *(row["step"] + first[row["stage"]] for row in log)])
        loss, _, budget = name.partition("_") if loss_names({name}) else (name, "", "")
        title = TITLES.get(loss, loss.upper()) + f", {budget} tokens" * bool(budget)
        axis.set(title=title, xlabel="step", ylabel=UNITS.get(loss, ""), xlim=(0, 1.02 * end))
        if loss in ("mrm", "grad_norm"):
            axis.set(yscale="log")
            axis.yaxis.set_major_formatter("{x:g}")                     # 0.5, not 5 x 10^-1
            axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        if name in FROM_ZERO:
            axis.set(ylim=(0, None))
    for axis in axes.flat[len(names):]:
        axis.set_visible(False)
    labels = [as_label(title) for title in logs]
    lines = [plt.Line2D([], [], color=colour, label=label) for label, colour in zip(labels, palette, strict=False)]
    figure.legend(handles=lines, loc="outside upper left", fontsize=8,
                  ncols=max(1, min(len(labels), 40 * width // (6 + max(map(len, labels))))))
    save(figure, out)


def as_label(name: str) -> str:
    """Escape what matplotlib would not draw as it is: formulas between $, a leading _, control characters."""
    return " " * name.startswith("_") + escape_control(name).replace("$", r"\$")


def save(figure, path: str):
    """Write a matplotlib figure and close it."""
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def run_mask_command(cfg: MaskCommand):
    """Check the settings, decode the video, and write the picture."""
    configs = {name: MaskConfig(name, cfg.ratio, quantile=cfg.quantile) for name in cfg.mask}
    if cfg.teacher == DEMO_TEACHER and not os.path.isdir(DEMO_TEACHER):
        raise FileNotFoundError(f"{DEMO_TEACHER}: no such folder; run `make demo`, or give --teacher")
    folder = os.path.dirname(cfg.out) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--out {cfg.out}: no such folder {folder}")
    teacher = SigLIP.from_pretrained(cfg.teacher, with_tokenizer=bool(cfg.caption))
    image_size, patch_size = teacher.cfg.vision_config.image_size, teacher.cfg.vision_config.patch_size
    if cfg.size and (cfg.size < patch_size or cfg.size % patch_size):
        raise ValueError(f"--size must be a multiple of the teacher's patch size {patch_size}, got {cfg.size}")
    side = (cfg.size or image_size) // patch_size
    video, seconds = sample_moments(cfg.video, cfg.frames, max(480, side * patch_size))
    if len(video) < cfg.frames:
        print(escape_control(f"{cfg.video} has only {len(video)} frames; --frames is {cfg.frames}"))
    clusters = MaskConfig("cluster_stm", cfg.ratio, quantile=cfg.quantile)
    result = compute_masks(video, teacher, configs, clusters, (side, side), cfg.caption, cfg.seed)
    side_by_side(video, seconds, result, configs, cfg.out)


def run_plot_command(cfg: RunCommand):
    """Plot the runs under their folders' names, or under their paths if two names are equal."""
    names = [os.path.basename(os.path.normpath(folder)) for folder in cfg.folders]
    if len(set(names)) < len(names):
        names = [os.path.normpath(folder) for folder in cfg.folders]
    folders = dict(zip(names, cfg.folders, strict=True))
    plot_losses(folders, cfg.out, ("val_T2V_R@1", "val_V2T_R@1", "clips/s", "data_wait", "lr", "grad_norm", "memory"))


def main(cfg: MaskCommand | RunCommand):
    (run_plot_command if isinstance(cfg, RunCommand) else run_mask_command)(cfg)
    print(escape_control(f"written to {cfg.out}"))


def cli():
    main(tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m tools.show"))


if __name__ == "__main__":
    run_cli("tools.show", cli)
