"""
Clips per second that one core reads: video files -> tables of reading, samples and batches, beside torchcodec and
decord, and how many cores feed a GPU.

Files. H.264, 16:9, 25 frames a second, one shot, as libx264 writes it by default: crf 23, keyframes at most 250 frames
apart, B-frames. In the picture a texture pans by fractions of a pixel, things move in front of it, and there is grain;
together they give the bit rates of web video.

Times. One process on one core, with one thread. A clip is opened again each time, as in training, and its frames are
drawn again, one from each segment, the same for all readers. Readers take turns; the median of --rounds counts; the
files are in the page cache. A reader whose frames differ from ours is not timed. With data.resize_on_device,
train_transform resizes only large crops.

torchcodec and decord are read with if they are installed. torchcodec needs FFmpeg's shared libraries, version 4 to 8,
on LD_LIBRARY_PATH; those of PyAV's wheel work, with links to them under the usual names (libavcodec.so.62) beside.
"""

import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

import data
from annotations import Annotation
from bench.timing import ratio, time_interleaved
from tokenizer import build_wordpiece, encode_texts, load_tokenizer
from tools.tables import banner, print_header, print_row, try_or_message
from video import read_frames, sample_frame_indices, train_transform, write_video

FPS, IMAGE_SIZE, BATCH, TEXT_LEN = 25, 224, 64, 32
MAX_FRAME_DISTANCE = 2.0        # mean grey levels; a frame that is farther from ours is another frame


@dataclass
class Config:
    """Measure how many clips a second one core reads, beside torchcodec and decord."""
    sizes: tuple[int, ...] = (240, 360, 720)    # heights of the video files in pixels, even, at least 32; 16:9
    seconds: tuple[int, ...] = (10, 60)         # lengths of the video files
    frames: tuple[int, ...] = (4, 8, 12)        # frames of a clip
    rounds: int = 7             # runs of each reader after a warm-up; the median counts
    folder: str = ""            # folder for the video files; those already there are used; empty: a temporary one
    rate: float = 0.0           # clips per second of a training step, to count the cores that a GPU needs; 0: unknown
    commit: str = ""            # commit to print above the tables; empty: ask git

    def __post_init__(self):
        for size in self.sizes:
            if size < 32 or size % 2:
                raise ValueError(f"--sizes must be even numbers from 32, got {size}")
        for name, values in (("seconds", self.seconds), ("frames", self.frames), ("rounds", (self.rounds,))):
            if any(value < 1 for value in values):
                raise ValueError(f"--{name} must be at least 1, got {min(values)}")
        if not 0 <= self.rate < math.inf:
            raise ValueError(f"--rate must be a number of clips per second, got {self.rate}")


# ---------------------------------------------------------------------------------------------------------------------
# Files

def texture(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """(h, w, 3) fp32: smooth noise of three scales around grey 128."""
    scales = [torch.from_numpy(rng.uniform(-75, 75, (1, 3, 2 + n * h // w, 2 + n))) for n in (4, 16, 64)]
    layers = [nnf.interpolate(s.float(), (h, w), mode="bicubic") / 2 ** i for i, s in enumerate(scales)]
    return (128 + sum(layers))[0].permute(1, 2, 0).contiguous().numpy()


class SyntheticVideo:
    """The frames of a video, for video.write_video. Each is drawn when it is asked for: a minute would take 4 GB."""

    def __init__(self, height: int, seconds: int, seed: int = 0):
        self.shape, self.seed = (FPS * seconds, height, 2 * round(height * 8 / 9), 3), seed

    def __iter__(self):
        T, H, W, _ = self.shape
        rng = np.random.default_rng(self.seed)
        background = texture(rng, H + H // 2 + 1, W + H // 2 + 1)
        grain = rng.normal(0, 4, (H + 32, W + 32, 1)).astype(np.float32)
        things = [(texture(rng, h, w), *rng.uniform(-1.5, 1.5, 4)) for h, w in rng.integers(H // 8, H // 3, (6, 2))]
        for t in np.arange(T) / FPS:
            # The background pans by whole pixels (i, j) and fractions (y, x) of one.
            (i, y), (j, x) = (divmod(H / 4 * (1 + np.sin(speed * t + speed)), 1) for speed in (0.31, 0.23))
            crop = background[int(i):int(i) + H + 1, int(j):int(j) + W + 1]                 # (H + 1, W + 1, 3)
            crop = crop[:-1] + np.float32(y) * (crop[1:] - crop[:-1])
            frame = crop[:, :-1] + np.float32(x) * (crop[:, 1:] - crop[:, :-1])             # (H, W, 3)
            for thing, a, b, c, d in things:
                h, w = thing.shape[:2]
                i, j = ((n * (1 + np.sin(angle)) / 2).astype(int)
                        for n, angle in ((H - h, a * t + b), (W - w, c * t + d)))
                frame[i:i + h, j:j + w] = thing
            i, j = rng.integers(32, size=2)
            yield (frame + grain[i:i + H, j:j + W]).clip(0, 255).astype(np.uint8)


def write_videos(folder: str, sizes: tuple[int, ...], seconds: tuple[int, ...]) -> dict[str, str]:
    """Write a file of each size and length, unless it is there -> name for the tables -> path."""
    os.makedirs(folder, exist_ok=True)
    videos = {}
    for height, length in itertools.product(sizes, seconds):
        path = f"{folder}/{height}p_{length}s.mp4"
        if not os.path.isfile(path):
            print(f"writing {path}", flush=True)
            write_video(f"{path}.part.mp4", SyntheticVideo(height, length), fps=FPS)
            os.replace(f"{path}.part.mp4", path)
        videos[f"{height}p, {length} s, {os.path.getsize(path) * 8e-6 / length:.2f} Mbit/s"] = path
    return videos


# ---------------------------------------------------------------------------------------------------------------------
# Readers: read(path, T, seed) -> (T, 3, H, W) uint8

def ours(path: str, T: int, seed: int) -> Tensor:
    return read_frames(path, T, "random", np.random.default_rng(seed))


def indices(T: int, total: int, seed: int) -> list[int]:
    """The frames that `ours` takes of a video with `total` frames."""
    return sample_frame_indices(T, total, "random", np.random.default_rng(seed)).tolist()


def torchcodec(mode: str) -> Callable:
    """A reader with torchcodec; mode: "exact" or "approximate" seeking. ImportError if it is not installed."""
    from torchcodec.decoders import VideoDecoder
    def read(path: str, T: int, seed: int) -> Tensor:
        decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=mode)
        return decoder.get_frames_at(indices(T, len(decoder), seed)).data
    return read


def decord() -> Callable:
    """A reader with decord. ImportError if it is not installed."""
    from decord import VideoReader
    def read(path: str, T: int, seed: int) -> Tensor:
        reader = VideoReader(path, num_threads=1)
        frames = reader.get_batch(indices(T, len(reader), seed)).asnumpy()                  # (T, H, W, 3)
        return torch.from_numpy(frames).permute(0, 3, 1, 2)
    return read


PEERS = {"torchcodec, exact": lambda: torchcodec("exact"),
         "torchcodec, approximate": lambda: torchcodec("approximate"), "decord": decord}


def frame_distance(read: Callable, expected: Tensor, *args) -> float:
    """Mean grey levels between the frames of read(*args) and those expected, of the frame that differs most."""
    return (read(*args).float() - expected.float()).abs().mean((1, 2, 3)).max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Tables

@contextmanager
def one_core():
    """Keep this process on one core, if the system can do that, and on one thread."""
    threads, pin = torch.get_num_threads(), getattr(os, "sched_setaffinity", lambda *_: None)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    torch.set_num_threads(1)
    pin(0, {max(allowed)})
    try:
        yield "pinned to one core" if hasattr(os, "sched_setaffinity") else "not pinned: this system cannot do that"
    finally:
        torch.set_num_threads(threads)
        pin(0, allowed)


def clips_per_second(functions: list[Callable], rounds: int) -> list[float | str]:
    """
    Clips per second of each function(n), which makes one clip, or its error; n counts the calls.

    The functions take turns. One that failed is not called again.
    """
    counters, errors = [itertools.count() for _ in functions], {}

    def call(i: int):
        result = None if i in errors else try_or_message(functions[i], next(counters[i]))
        if isinstance(result, str):
            errors[i] = result

    times = time_interleaved([lambda i=i: call(i) for i in range(len(functions))], rounds)
    return [errors.get(i, 1e3 / ms) for i, ms in enumerate(times)]


def read_table(cfg: Config, videos: dict[str, str]):
    """Print the rates of reading alone, ours and those of the other readers."""
    peers = {name: try_or_message(load) for name, load in PEERS.items()}
    modules = {name: sys.modules[name] for name in ("av", "torchcodec", "decord") if sys.modules.get(name)}
    print("\nReaders:", ", ".join(f"{name} {getattr(m, '__version__', '')}" for name, m in modules.items()), flush=True)
    print(*(f"{name} is not here, {read}" for name, read in peers.items() if isinstance(read, str)), sep="\n")
    print_header("T frames of a file, one drawn from each segment, in full size: clips/s on one core (off: grey levels "
                 "from ours, of the frame that is farthest)", "file", "T", "ours",
                 *itertools.chain(*((name, "ours / it", "off") for name in peers)))
    for (video, path), T in itertools.product(videos.items(), cfg.frames):
        expected = ours(path, T, 0)
        off = {name: try_or_message(frame_distance, read, expected, path, T, 0) if callable(read) else "not here"
               for name, read in peers.items()}
        readers = {"ours": ours} | {name: peers[name] for name, d in off.items()
                                    if isinstance(d, float) and d <= MAX_FRAME_DISTANCE}
        functions = [lambda n, read=read: read(path, T, n) for read in readers.values()]            # noqa: B023
        rates, cells = dict(zip(readers, clips_per_second(functions, cfg.rounds), strict=True)), []
        for name, d in off.items():
            rate = rates.get(name, "OTHER FRAMES" if isinstance(d, float) else d)
            cells += [rate, ratio(rates["ours"], rate), d if isinstance(d, float) else None]
        print_row(video, T, rates["ours"], *cells)


def sample_table(cfg: Config, videos: dict[str, str], folder: str) -> dict[tuple[str, int, str], float | str]:
    """Print the rates of whole samples -> clips/s by (way to read, T, video). `folder` is for frame caches."""
    results = {}
    print_header(f"A training sample, a crop at {IMAGE_SIZE}: clips/s on one core", "file", "T", "crop + resize alone",
                 "sample: read + crop + resize", "sample from the frame cache", "sample with data.resize_on_device",
                 "sample from a cache of JPEGs, quality 90")
    for (video, path), T in itertools.product(videos.items(), cfg.frames):
        plain = data.DataConfig(num_frames=T, image_size=IMAGE_SIZE, min_crop_scale=0.5, num_views=0, frame_cache=False,
                                cache_frames=max(32, T))
        configs = [plain, replace(plain, frame_cache=True), replace(plain, resize_on_device=True),
                   replace(plain, frame_cache=True, cache_jpeg_quality=90)]
        annotations, frames = [Annotation(path, ["a caption"], None, 0)], ours(path, T, 0)
        crop = lambda n: train_transform(frames, IMAGE_SIZE, 0.5, False, np.random.default_rng(n))  # noqa: B023
        samples = [data.ClipDataset(annotations, config, cache_folder=folder).__getitem__ for config in configs]
        rates = clips_per_second([crop, *samples], cfg.rounds)
        print_row(video, T, *rates)
        ways = "no cache, resized by the loader", "no cache, resized by the device", "from a cache of JPEGs"
        results |= {(way, T, video): rates[i] for way, i in zip(ways, (1, 3, 4), strict=True)}
    return results


def batch_table(cfg: Config, folder: str):
    """Print the rates of joining samples to a batch. `folder` is for the tokenizer."""
    print_header(f"A batch of {BATCH} samples at {IMAGE_SIZE}, texts of {TEXT_LEN} tokens: clips/s on one core", "T",
                 "tokenize", "tokenize + collate")
    words = np.random.default_rng(0).integers(1000, size=(BATCH, 12))
    captions = [" ".join(map("word{}".format, row)) for row in words]
    build_wordpiece(captions, f"{folder}/tokenizer.json")
    tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    for T in cfg.frames:
        videos = torch.randint(0, 256, (BATCH, T, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
        samples = [data.Sample(videos[i], caption, caption, 0, i, 0) for i, caption in enumerate(captions)]
        rates = clips_per_second([lambda n: encode_texts(tokenizer, captions, TEXT_LEN),
                                  lambda n: data.collate(samples, tokenizer, TEXT_LEN, n)],         # noqa: B023
                                 cfg.rounds)
        print_row(T, *(rate if isinstance(rate, str) else BATCH * rate for rate in rates))


def cores_lines(rate: float, results: dict[tuple[str, int, str], float | str]) -> list[str]:
    """How many cores read as many clips as a training step takes: its rate over that of a core, for each video."""
    if not rate:
        return ["Cores that feed a GPU: unknown, since --rate (clips/s of a training step) was not given"]
    lines = {}
    for (way, T, video), clips in results.items():
        cores = clips if isinstance(clips, str) else f"{rate / clips:.3g}"
        lines.setdefault((way, T), []).append(f"{video.rpartition(',')[0]}: {cores}")
    return [f"Cores that feed a GPU of {rate:g} clips/s, {way}, T = {T}: {'; '.join(parts)}"
            for (way, T), parts in lines.items()]


def main(cfg: Config):
    """Print every table."""
    banner("cpu", cfg.commit, "bench")
    with tempfile.TemporaryDirectory() as scratch:
        videos = write_videos(cfg.folder or scratch, cfg.sizes, cfg.seconds)
        with one_core() as pinned:
            print(f"\n1 thread, {pinned}; median of {cfg.rounds}", flush=True)
            read_table(cfg, videos)
            results = sample_table(cfg, videos, scratch)
            batch_table(cfg, scratch)
    print("", *cores_lines(cfg.rate, results), sep="\n", flush=True)
