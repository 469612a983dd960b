"""
Pictures for people: what masks keep of a clip, and how runs went.

    python -m tools.show mask VIDEO --mask cluster_stm tube umt --out picture.png      # a column a mask, a row a frame
    python -m tools.show mask VIDEO --mask cluster_stm tube umt --out picture.mp4      # the columns as a video
    python -m tools.show run out/demo/seed0/cluster_stm out/demo/seed0/random_frame --out run.png
"""

import json
import os
import textwrap
import time
from dataclasses import dataclass
from itertools import accumulate

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as nnf
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import data
import decoding
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from masking import NEEDS, MaskConfig, keep_count
from masks import log as logarithm
from teacher import SigLIP, choose

DEMO = "out/demo/seed0/teacher"


@dataclass
class Mask:
    """A clip's frames, its clusters in colour, and what each mask keeps, side by side: a picture, or a video (.mp4)."""
    video: tyro.conf.Positional[str]                                # video file
    teacher: str = DEMO                                             # folder of a SigLIP checkpoint, or a hub id
    mask: tuple[str, ...] = ("cluster_stm", "random_frame")         # rows of masking.MASKS, a column each
    ratio: float = 0.9                                              # share of tokens hidden
    quantile: float = 0.95      # d_c of the clusters, as a quantile: 0.95 for the demo's teacher (a real SigLIP: 0.02)
    frames: int = 8                                                 # frames shown, of a video that has so many
    size: int = 0       # pixels a side of what the teacher sees (0: its own); more: a finer grid, places interpolated
    caption: str = ""                                               # what masks that are guided by text are told
    seed: int = 0                                                   # of masks that are drawn at random
    out: str = "masks.png"                                          # picture or .mp4 to write


@dataclass
class Run:
    """Losses, rate and learning rate of one or more runs of train.py."""
    folders: tyro.conf.Positional[tuple[str, ...]]                  # out/NAME, one or more
    out: str = "run.png"                                            # picture to write


# ---------------------------------------------------------------------------------------------------------------------
# What masks keep

@dataclass
class Kept:
    """A clip's clusters and what each mask keeps of it."""
    grid: tuple[int, int]               # (h, w), N = h * w
    labels: np.ndarray                  # (T, N), the cluster of each token
    centres: np.ndarray                 # (T, K), the centre of each cluster
    masks: dict[str, np.ndarray]        # (T, N) bool
    took: dict[str, float]              # milliseconds of the mask alone

    def figures(self, name: str) -> tuple[str, ...]:
        """What is written above a mask's column."""
        keep, rows = self.masks[name], np.arange(len(self.labels))[:, None]
        (T, N), counts = keep.shape, keep.sum(1)
        some = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}-{counts.max()}"
        met = np.zeros(self.centres.shape, bool)
        met[rows.repeat(N, 1)[keep], self.labels[keep]] = True
        again = f"{100 * (keep[:-1] & keep[1:]).sum() / max(1, keep[:-1].sum()):.0f} %" if T > 1 else "-"
        return f"{some} of {N} tokens", f"{100 * met.mean():.0f} % of clusters", f"{again} stay", \
            f"{self.took[name]:.{0 if self.took[name] >= 10 else 1}f} ms"


@torch.no_grad()
def kept(video: Tensor, teacher: SigLIP, configs: dict[str, MaskConfig], clusters: MaskConfig,
         grid: tuple[int, int] | None = None, caption: str = "", seed: int = 0) -> Kept:
    """video (T, 3, H, W) uint8 of any size with a grid, else of the teacher's -> what masks keep of its tokens."""
    pixels = teacher.pixels(video, grid)
    grid = teacher.grid_of(pixels)
    tokens = teacher.tokens(pixels)                                                             # (T, N, C)
    T, N, _ = tokens.shape
    labels, centres, _ = density_peaks(tokens, keep_count(N, clusters.ratio), bandwidth(tokens, clusters.quantile),
                                       clusters.density, clusters.assign)
    aux = {"aligned": teacher.align(tokens, grid)[None],
           "logits": logarithm(teacher.attend(tokens))[None],
           "text": teacher.encode_text(teacher.tokenize([caption])) if caption else None}
    masks, took = {}, {}
    for name, cfg in configs.items():
        def timed(*args, mask=cfg, name=name, **more):
            start = time.perf_counter()
            ids = mask(*args, **more)
            took[name] = min(took.get(name, torch.inf), 1000 * (time.perf_counter() - start))
            return ids
        try:
            for _ in range(2):                                          # the first time some of it is set up
                ids = choose(teacher, tokens[None], timed, cfg.ratio, seed, grid, **aux)[0]
        except ValueError as error:
            if caption or "text" not in NEEDS.get(cfg.name, ()):
                raise
            raise ValueError(f"{error}; --caption gives the text") from None
        masks[name] = torch.zeros(T * N, dtype=torch.bool).scatter(0, ids, True).view(T, N).numpy()
    return Kept(grid, *(x.numpy() for x in followed(tokens, labels, centres)), masks, took)


def followed(tokens: Tensor, labels: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """
    tokens (T, N, C), labels (T, N), centres (T, K) -> labels and centres with a frame's clusters numbered as those most
    like them in the frame before: the most similar two centres first, each given once.
    """
    T, K = centres.shape
    x = nnf.normalize(tokens.gather(1, centres[..., None].expand(-1, -1, tokens.shape[2])), dim=-1)     # (T, K, C)
    number = torch.arange(K).repeat(T, 1)
    for t in range(1, T):
        like = x[t] @ x[t - 1].T                                                                # (K, K)
        for _ in range(K):
            now, before = divmod(like.argmax().item(), K)
            number[t, now] = number[t - 1, before]
            like[now], like[:, before] = -torch.inf, -torch.inf
    return number.gather(1, labels), torch.empty_like(centres).scatter(1, number, centres)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of frames

def spread(x: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """x (T, N, ...), a value a token -> (T, H, W, ...), the grid stretched over frames of any shape."""
    (h, w), (H, W) = grid, shape
    down, across = np.arange(H) * h // H, np.arange(W) * w // W
    return x.reshape(len(x), h, w, *x.shape[2:])[:, down[:, None], across]


def dimmed(frames: np.ndarray, keep: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """frames (T, H, W, 3) in [0, 1], keep (T, N) bool -> the same, all tokens but the kept ones darkened."""
    return np.where(spread(keep, grid, frames.shape[1:3])[..., None], frames, 0.22 * frames)


def outlined(frames: np.ndarray, keep: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """frames (T, H, W, 3) in [0, 1], dimmed -> the same with a grey line round what is kept, for dark frames."""
    bright = np.pad(spread(keep, grid, frames.shape[1:3]), ((0, 0), (1, 1), (1, 1)))
    beside = bright[:, :-2, 1:-1] | bright[:, 2:, 1:-1] | bright[:, 1:-1, :-2] | bright[:, 1:-1, 2:]
    return np.where((beside & ~bright[:, 1:-1, 1:-1])[..., None], 0.5, frames)


def colours(K: int) -> np.ndarray:
    """(K, 3) in [0, 1]: what follows each other is far apart, and K are never the same."""
    k = np.arange(K)
    saturation, value = np.array([1, 0.5, 0.9])[k % 3], np.array([0.95, 1, 0.6])[k % 3]
    return matplotlib.colors.hsv_to_rgb(np.stack([(0.58 + k * 0.381966) % 1, saturation, value], -1))


def coloured(frames: np.ndarray, labels: np.ndarray, centres: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """frames (T, H, W, 3) in [0, 1], labels (T, N), centres (T, K) -> each cluster in a colour of its own."""
    return 0.35 * frames + 0.65 * spread(colours(centres.shape[1])[labels], grid, frames.shape[1:3])


def marked(frames: np.ndarray, labels: np.ndarray, centres: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The same frames with black lines between clusters and a white dot on each centre."""
    frames, (h, w), (T, H, W, _) = frames.copy(), grid, frames.shape
    label = spread(labels, grid, (H, W))
    frames[:, 1:][label[:, 1:] != label[:, :-1]] = 0
    frames[:, :, 1:][label[:, :, 1:] != label[:, :, :-1]] = 0
    y, x = (((n + 0.5) * size / cells).astype(int) for n, size, cells in
            ((centres // w, H, h), (centres % w, W, w)))                                        # (T, K), middles
    radius = min(H // h, W // w) // 6
    for t in range(T):
        for cy, cx in zip(y[t], x[t], strict=True):
            for r, grey in ((radius + 1, 0), (radius, 1)):
                frames[t, max(0, cy - r):cy + r + 1, max(0, cx - r):cx + r + 1] = grey
    return frames


def masks(video: Tensor, teacher: SigLIP, configs: dict[str, MaskConfig], out: str):
    """video (T, 3, S, S) uint8 -> a picture: frames, clusters, a row for each mask."""
    ours = next((cfg for cfg in configs.values() if cfg.name == "cluster_stm"), None)
    found = kept(video, teacher, configs, ours or MaskConfig())
    frames = video.permute(0, 2, 3, 1).numpy() / 255
    T, rows = len(frames), {"frames": frames}
    for name, keep in found.masks.items():
        if configs[name] is ours:
            rows[f"{found.centres.shape[1]} clusters a frame"] = coloured(
                frames, found.labels, found.centres, found.grid)
        rows[f"{name} keeps"] = dimmed(frames, keep, found.grid)
    figure, axes = plt.subplots(len(rows), T, figsize=(1.25 * T + 1.5, 1.3 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name.replace("_frame", ""), rotation=0, ha="right", va="center")
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    save(figure, out)


# ---------------------------------------------------------------------------------------------------------------------
# Masks side by side

WIDE, GAP, LINE, EDGE = 1600, 8, 17, 64                 # pixels: picture, between frames, text, margin
NOTE = ("clusters: share of a frame's clusters in which a token is kept. stay: share of kept tokens whose place is "
        "kept in the next frame shown too. ms: the mask alone, for all frames shown.")


@dataclass
class Column:
    """Frames of one kind, (T, h, w, 3) uint8, and what is written above them."""
    title: str
    figures: tuple[str, ...]
    frames: np.ndarray


def font(size: int = 13, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib."""
    name = f"DejaVuSans{'-Bold' * bold}.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


@dataclass
class Sheet:
    """Where things lie on a picture of columns: as many bands of them below each other as its width asks for."""
    columns: list[Column]
    rows: int                           # frames below each other

    def __post_init__(self):
        self.shape = self.columns[0].frames.shape[1:3]
        texts = [(font(bold=True), c.title) for c in self.columns]
        texts += [(font(), line) for c in self.columns for line in c.figures]
        self.wide = max(self.shape[1], *(round(f.getlength(text)) for f, text in texts)) + GAP
        many, most = len(self.columns), max(1, (WIDE - EDGE) // self.wide)
        self.bands = -(-many // most)
        self.across = -(-many // self.bands)
        self.lines = 1 + max(len(c.figures) for c in self.columns)
        self.tall = self.lines * LINE + GAP + self.rows * (self.shape[0] + GAP) + GAP
        self.note = textwrap.wrap(NOTE, (EDGE + self.across * self.wide) // 7)
        size = EDGE + self.across * self.wide, GAP + self.bands * self.tall + LINE * len(self.note) + GAP
        self.size = tuple(-(-side // 2) * 2 for side in size)           # (W, H), even for yuv420p

    def head(self, column: int) -> tuple[int, int]:
        """Left and top of a column's title."""
        return EDGE + column % self.across * self.wide, GAP + column // self.across * self.tall

    def place(self, column: int, row: int) -> tuple[int, int]:
        """Left and top of a frame."""
        x, y = self.head(column)
        return x, y + self.lines * LINE + GAP + row * (self.shape[0] + GAP)

    def draw(self, which: list[int], seconds: list[float]) -> np.ndarray:
        """The frames `which` of all columns, row after row -> (H, W, 3) uint8."""
        picture = Image.new("RGB", self.size, "white")
        pen = ImageDraw.Draw(picture)
        for c, column in enumerate(self.columns):
            x, y = self.head(c)
            pen.text((x, y), column.title, "black", font(bold=True))
            for i, line in enumerate(column.figures, 1):
                pen.text((x, y + i * LINE), line, (70, 70, 70), font())
            for row, t in enumerate(which):
                picture.paste(Image.fromarray(column.frames[t]), self.place(c, row))
                if c % self.across == 0:
                    pen.text((EDGE - GAP, self.place(c, row)[1] + self.shape[0] // 2), f"{seconds[t]:.1f} s", "black",
                             font(), anchor="rm")
        for i, line in enumerate(self.note):
            pen.text((GAP, self.size[1] - GAP - (len(self.note) - i) * LINE), line, (70, 70, 70), font(12))
        return np.asarray(picture)


def shown(video: Tensor, columns: int, most: int) -> np.ndarray:
    """
    video (T, 3, H, W) uint8 -> (T, h, w, 3) uint8 in its own shape, so large that the columns fill a picture, of at
    most `most` pixels a side; what is smaller is shown in whole multiples.
    """
    H, W = video.shape[2:]
    bands = -(-columns // 10)
    room = (WIDE - EDGE) // -(-columns // bands) - GAP
    scale = min(room / W, most / max(H, W))
    if scale >= 1:
        video = video.repeat_interleave(int(scale), 2).repeat_interleave(int(scale), 3)
    else:
        video = decoding.resize(video, (max(1, round(H * scale)), max(1, round(W * scale))))
    return video.permute(0, 2, 3, 1).numpy()


def side_by_side(video: Tensor, seconds: list[float], found: Kept, configs: dict[str, MaskConfig], out: str):
    """video (T, 3, H, W) uint8, its frames' times -> a picture, a column a mask and a row a frame; or an .mp4."""
    moving = out.lower().endswith(".mp4")
    frames = shown(video, 2 + len(configs), 480 if moving else 240)
    light, grey = frames / 255, lambda x: (255 * x).round().astype(np.uint8)
    tinted = marked(coloured(light, found.labels, found.centres, found.grid), found.labels, found.centres, found.grid)
    columns = [Column("frame", (f"{found.grid[0]} x {found.grid[1]} tokens",), frames),
               Column("clusters", (f"{found.centres.shape[1]} a frame", "dot: centre"), grey(tinted))]
    for name, cfg in configs.items():
        note = ("by log attention",) if "logits" in NEEDS.get(cfg.name, ()) else ()
        bright = outlined(dimmed(light, found.masks[name], found.grid), found.masks[name], found.grid)
        columns.append(Column(name, (*found.figures(name), *note), grey(bright)))
    T = len(frames)
    if moving:
        sheet = Sheet(columns, 1)
        decoding.write_video(out, np.stack([sheet.draw([t], seconds) for t in range(T)]), fps=2, crf="16")
    else:
        Image.fromarray(Sheet(columns, T).draw(list(range(T)), seconds)).save(out, optimize=True)


def moments(path: str, count: int, size: int) -> tuple[Tensor, list[float]]:
    """A video's frames in the middle of `count` equal parts, none twice, short side at most `size`; their seconds."""
    found = []

    def at(times: np.ndarray) -> np.ndarray:
        chosen = np.unique(decoding.pick(count, len(times)))
        found[:] = times[chosen].tolist()
        return chosen

    return decoding.decode(path, at, size), found


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def read_log(folder: str) -> list[dict]:
    """The rows of a run's log.jsonl."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not there: {folder} is no run of train.py")
    with open(path) as f:
        return [json.loads(line) for line in f]


LOSSES = ("sigmoid", "mrm", "align", "pixels", "vtc", "vtm", "mlm", "lm")
TITLES = {"mrm": "MRM (1 = the clip's mean)", "align": "visible tokens", "pixels": "pixels",
          "clips/s": "clips a second", "wait": "share of time waiting for data", "lr": "learning rate",
          "grad_norm": "norm of the gradient"}


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
        mask(cfg)
    print(f"written to {cfg.out}")


def mask(cfg: Mask):
    configs = {name: MaskConfig(name, cfg.ratio, quantile=cfg.quantile) for name in cfg.mask}
    if cfg.teacher == DEMO and not os.path.isdir(DEMO):
        raise FileNotFoundError(f"{DEMO} is not there: run `make demo`, or give --teacher")
    if not os.path.isdir(os.path.dirname(cfg.out) or "."):
        raise FileNotFoundError(f"{cfg.out}: there is no folder {os.path.dirname(cfg.out)}")
    teacher = SigLIP.from_pretrained(cfg.teacher)
    own, patch = teacher.cfg.vision_config.image_size, teacher.cfg.vision_config.patch_size
    if cfg.size and (cfg.size < patch or cfg.size % patch):
        raise ValueError(f"--size {cfg.size} is no multiple of the teacher's patch, {patch}")
    side = (cfg.size or own) // patch
    video, seconds = moments(cfg.video, cfg.frames, max(480, side * patch))
    if len(video) < cfg.frames:
        print(f"{cfg.video} has {len(video)} frames, not {cfg.frames}")
    clusters = MaskConfig("cluster_stm", cfg.ratio, quantile=cfg.quantile)
    found = kept(video, teacher, configs, clusters, (side, side), cfg.caption, cfg.seed)
    side_by_side(video, seconds, found, configs, cfg.out)


if __name__ == "__main__":
    data.command("tools.show", lambda: main(tyro.extras.subcommand_cli_from_dict({"mask": Mask, "run": Run})))
