"""
How many clips a second a core reads, beside torchcodec and decord, and how many cores feed a GPU.

    python -m tools.bench data --folder FOLDER --rate 900       # clips/s of a training step; the videos stay in FOLDER
    python -m tools.bench data --sizes 240 --seconds 10 --frames 4 --rounds 3         # a short one

Files. H.264 of 16:9 and 25 frames a second, one shot, as libx264 writes it by default: crf 23, keyframes 250 apart,
B-frames. In the picture a texture pans by parts of a pixel, things move before it and there is grain, which together
make the bit rates of web video.

Time. One process on one core with one thread. A clip is opened anew each time, as in training, and its frames are
drawn anew, one of each segment, the same for all readers. Readers run in turn; the median of --rounds, from the page
cache. A reader whose frames are not ours is not timed. With data.on_device train_view resizes large crops alone.

Peers are read with where they are installed. torchcodec wants FFmpeg's shared libraries, version 4 to 8, on
LD_LIBRARY_PATH; those of PyAV's wheel do, with links to them under the usual names (libavcodec.so.62) beside.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor

from tools.bench import alternate, attempt, heading, line, ratio

FPS, SIDE, BATCH, WORDS = 25, 224, 64, 32
APART = 2.0             # mean grey levels: what is farther from our frame is another one

# ---------------------------------------------------------------------------------------------------------------------
# Files

def texture(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """(h, w, 3) fp32, smooth noise of three scales about grey 128."""
    scales = [torch.from_numpy(rng.uniform(-75, 75, (1, 3, 2 + n * h // w, 2 + n))) for n in (4, 16, 64)]
    layers = [nn.interpolate(s.float(), (h, w), mode="bicubic") / 2 ** i for i, s in enumerate(scales)]
    return (128 + sum(layers))[0].permute(1, 2, 0).contiguous().numpy()


class Film:
    """The frames of a video, drawn as they are asked for: what decoding.write_video takes; a minute is 4 GB."""

    def __init__(self, height: int, seconds: int, seed: int = 0):
        self.shape, self.seed = (FPS * seconds, height, 2 * round(height * 8 / 9), 3), seed

    def __iter__(self):
        T, H, W, _ = self.shape
        rng = np.random.default_rng(self.seed)
        world = texture(rng, H + H // 2 + 1, W + H // 2 + 1)
        grain = rng.normal(0, 4, (H + 32, W + 32, 1)).astype(np.float32)
        things = [(texture(rng, h, w), *rng.uniform(-1.5, 1.5, 4)) for h, w in rng.integers(H // 8, H // 3, (6, 2))]
        for t in np.arange(T) / FPS:
            (i, y), (j, x) = (divmod(H / 4 * (1 + np.sin(speed * t + speed)), 1) for speed in (0.31, 0.23))
            part = world[int(i):int(i) + H + 1, int(j):int(j) + W + 1]                      # (H + 1, W + 1, 3)
            part = part[:-1] + np.float32(y) * (part[1:] - part[:-1])
            frame = part[:, :-1] + np.float32(x) * (part[:, 1:] - part[:, :-1])             # (H, W, 3)
            for thing, a, b, c, d in things:
                h, w = thing.shape[:2]
                i, j = ((n * (1 + np.sin(at)) / 2).astype(int) for n, at in ((H - h, a * t + b), (W - w, c * t + d)))
                frame[i:i + h, j:j + w] = thing
            i, j = rng.integers(32, size=2)
            yield (frame + grain[i:i + H, j:j + W]).clip(0, 255).astype(np.uint8)


def write_films(folder: str, sizes: list[int], seconds: list[int]) -> dict[str, str]:
    """Name -> path of each file kind. A file that is there is taken as it is."""
    import decoding  # here and below: it wants av, which timing kernels does not

    os.makedirs(folder, exist_ok=True)
    films = {}
    for height, length in itertools.product(sizes, seconds):
        path = f"{folder}/{height}p_{length}s.mp4"
        if not os.path.isfile(path):
            print(f"writing {path}", flush=True)
            decoding.write_video(f"{path}.part.mp4", Film(height, length), fps=FPS)
            os.replace(f"{path}.part.mp4", path)
        films[f"{height}p, {length} s, {os.path.getsize(path) * 8e-6 / length:.2f} Mbit/s"] = path
    return films


# ---------------------------------------------------------------------------------------------------------------------
# Readers: read(path, T, seed) -> (T, 3, H, W) uint8

def ours(path: str, T: int, seed: int) -> Tensor:
    import decoding
    return decoding.read_frames(path, T, "random", np.random.default_rng(seed))


def indices(T: int, total: int, seed: int) -> list[int]:
    """The frames that ours takes."""
    import decoding
    return decoding.pick(T, total, "random", np.random.default_rng(seed)).tolist()


def torchcodec(mode: str) -> Callable:
    from torchcodec.decoders import VideoDecoder
    def read(path: str, T: int, seed: int) -> Tensor:
        decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=mode)
        return decoder.get_frames_at(indices(T, len(decoder), seed)).data
    return read


def decord() -> Callable:
    from decord import VideoReader
    def read(path: str, T: int, seed: int) -> Tensor:
        reader = VideoReader(path, num_threads=1)
        frames = reader.get_batch(indices(T, len(reader), seed)).asnumpy()                  # (T, H, W, 3)
        return torch.from_numpy(frames).permute(0, 3, 1, 2)
    return read


PEERS = {"torchcodec, exact": lambda: torchcodec("exact"),
         "torchcodec, approximate": lambda: torchcodec("approximate"), "decord": decord}


def apart(read: Callable, wanted: Tensor, *args) -> float:
    """Grey levels between what is read and the frames wanted, the mean of the frame where it is largest."""
    return (read(*args).float() - wanted.float()).abs().mean((1, 2, 3)).max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Tables

@contextmanager
def one_core():
    """This process on one core, where the system can do that, and one thread."""
    threads, pin = torch.get_num_threads(), getattr(os, "sched_setaffinity", lambda *_: None)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    torch.set_num_threads(1)
    pin(0, {max(allowed)})
    try:
        yield "pinned to one core" if hasattr(os, "sched_setaffinity") else "which this system cannot pin to a core"
    finally:
        torch.set_num_threads(threads)
        pin(0, allowed)


def rates(runs: list[Callable], rounds: int) -> list[float | str]:
    """Clips a second of each run(n), in turn, or why it failed. n counts the rounds."""
    numbers, failed = [itertools.count() for _ in runs], {}

    def turn(i: int):
        found = None if i in failed else attempt(runs[i], next(numbers[i]))
        if isinstance(found, str):
            failed[i] = found

    took = alternate([lambda i=i: turn(i) for i in range(len(runs))], (), rounds)
    return [failed.get(i, 1e3 / ms) for i, ms in enumerate(took)]


def read_table(args, films: dict[str, str]):
    """Reading alone, ours and theirs."""
    peers = {name: attempt(load) for name, load in PEERS.items()}
    there = {name: sys.modules[name] for name in ("av", "torchcodec", "decord") if sys.modules.get(name)}
    print("\nReaders:", ", ".join(f"{name} {getattr(m, '__version__', '')}" for name, m in there.items()), flush=True)
    print(*(f"{name} is not here, {read}" for name, read in peers.items() if isinstance(read, str)), sep="\n")
    heading("T frames of a file, one drawn from each segment, in full size: clips/s on one core (off: grey levels from "
            "ours, of the frame that is farthest)", "file", "T", "ours",
            *itertools.chain(*((name, "ours / it", "off") for name in peers)))
    for (film, path), T in itertools.product(films.items(), args.frames):
        wanted = ours(path, T, 0)
        off = {name: attempt(apart, read, wanted, path, T, 0) if callable(read) else "not here"
               for name, read in peers.items()}
        same = {"ours": ours} | {name: peers[name] for name, d in off.items() if isinstance(d, float) and d <= APART}
        runs = [lambda n, read=read: read(path, T, n) for read in same.values()]            # noqa: B023
        took, cells = dict(zip(same, rates(runs, args.rounds), strict=True)), []
        for name, d in off.items():
            rate = took.get(name, "OTHER FRAMES" if isinstance(d, float) else d)
            cells += [rate, ratio(took["ours"], rate), d if isinstance(d, float) else None]
        line(film, T, took["ours"], *cells)


def sample_table(args, films: dict[str, str], folder: str) -> dict[tuple[str, int, str], float | str]:
    """Whole samples and their parts -> clips/s of whole samples, of (way of reading, T, file kind)."""
    import data
    import decoding
    found = {}
    heading(f"A training sample, a crop at {SIDE}: clips/s on one core", "file", "T", "crop + resize alone",
            "sample: read + crop + resize", "sample from the decode cache", "sample with data.on_device",
            "sample from a cache of JPEGs, quality 90")
    for (film, path), T in itertools.product(films.items(), args.frames):
        cfg = data.DataConfig(frames=T, size=SIDE, scale=0.5, views=0, cache=False, cache_frames=max(32, T))
        kinds = [cfg, replace(cfg, cache=True), replace(cfg, on_device=True),
                 replace(cfg, cache=True, cache_quality=90)]
        rows, frames = [data.Row(path, ["a caption"], None, 0)], ours(path, T, 0)
        crop = lambda n: decoding.train_view(frames, SIDE, 0.5, False, np.random.default_rng(n))    # noqa: B023
        clips = [data.Clips(rows, kind, cache_folder=folder).__getitem__ for kind in kinds]
        cells = rates([crop, *clips], args.rounds)
        line(film, T, *cells)
        ways = "no cache, resized by the loader", "no cache, resized by the device", "from a cache of JPEGs"
        found |= {(way, T, film): cells[i] for way, i in zip(ways, (1, 3, 4), strict=True)}
    return found


def batch_table(args, folder: str):
    """What joins samples to a batch."""
    import data
    heading(f"A batch of {BATCH} samples at {SIDE}, texts of {WORDS} tokens: clips/s on one core", "T", "tokenise",
            "tokenise + collate")
    words = np.random.default_rng(0).integers(1000, size=(BATCH, 12))
    captions = [" ".join(map("word{}".format, row)) for row in words]
    data.train_tokenizer(captions, f"{folder}/tokenizer.json")
    tokenizer = data.load_tokenizer(f"{folder}/tokenizer.json")
    for T in args.frames:
        videos = torch.randint(0, 256, (BATCH, T, 3, SIDE, SIDE), dtype=torch.uint8)
        samples = [data.Sample(videos[i], caption, caption, 0, i, 0) for i, caption in enumerate(captions)]
        took = rates([lambda n: data.encode(tokenizer, captions, WORDS),
                      lambda n: data.collate(samples, tokenizer, WORDS, n)], args.rounds)      # noqa: B023
        line(T, *(rate if isinstance(rate, str) else BATCH * rate for rate in took))


def cores_lines(rate: float | None, found: dict[tuple[str, int, str], float | str]) -> list[str]:
    """Cores that read as many clips as a training step takes: its rate over that of a core, for each file kind."""
    if not rate:
        return ["Cores that feed a GPU: not known, no --rate (clips/s of a training step) was given"]
    lines = {}
    for (way, T, film), clips in found.items():
        need = clips if isinstance(clips, str) else f"{rate / clips:.3g}"
        lines.setdefault((way, T), []).append(f"{film.rpartition(',')[0]}: {need}")
    return [f"Cores that feed a GPU of {rate:g} clips/s, {way}, T = {T}: {'; '.join(each)}"
            for (way, T), each in lines.items()]


def data_tables(args):
    """Every table and line of `python -m tools.bench data`."""
    with tempfile.TemporaryDirectory() as scratch:
        films = write_films(args.folder or scratch, args.sizes, args.seconds)
        with one_core() as pinned:
            print(f"\n1 thread, {pinned}; median of {args.rounds}", flush=True)
            read_table(args, films)
            found = sample_table(args, films, scratch)
            batch_table(args, scratch)
    print("", *cores_lines(args.rate, found), sep="\n", flush=True)


def above(low: float, kind: type = int, step: int = 0) -> Callable:
    """A number of the command line: above `low`, and a multiple of `step`."""
    def number(text: str):
        if not low < kind(text) < 1e9 or step and kind(text) % step:
            raise argparse.ArgumentTypeError(f"wants a number above {low}{', even' * bool(step)}, got {text}")
        return kind(text)
    return number


def parser(commands):
    """The subcommand `data`."""
    run = commands.add_parser("data", help="clips a second a core", description=__doc__.strip(),
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda name, default, more, **how: run.add_argument(name, nargs="+", default=default, help=more, **how)
    several("--sizes", [240, 360, 720], "heights of the files in pixels, 16:9", type=above(31, step=2), metavar="H")
    several("--seconds", [10, 60], "lengths of the files", type=above(0), metavar="S")
    several("--frames", [4, 8, 12], "frames a clip", type=above(0), metavar="T")
    run.add_argument("--rounds", type=above(0), default=7, help="runs of each, after one that is not counted")
    run.add_argument("--folder", help="where the videos are kept, and taken from if they are there")
    run.add_argument("--rate", type=above(0, float), help="clips a second that a training step takes on one GPU")
    run.add_argument("--commit", default="", help="commit to name in the heading where there is no git")
