"""
Search a folder of videos by text.

    python search.py FOLDER "a dog in the snow" "two people hug"
    python search.py FOLDER "a red square" --checkpoint out/sprites --export features.safetensors

The first run decodes every video under FOLDER, once, and writes FOLDER.index.safetensors beside it; later ones decode
what is new or has changed. A long video is cut into equal segments, and is found by its best one. A segment's feature
is the mean over its frames of unit vectors; it is not made one again, so a score, text . feature, is the mean of the
frames' cosines, as in eval.py. The checkpoint is a folder that train.py wrote, or a SigLIP.

What --export writes (n segments; the feature of segment i is that of file names[file[i]] from start[i] to end[i]):

    with safetensors.safe_open("features.safetensors", "pt") as f:
        features, start, end, file = map(f.get_tensor, ("features", "start", "end", "file"))    # (n, E), (n,) seconds
        names = json.loads(f.metadata()["files"])                                               # relative to FOLDER
"""

import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as nnf
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

import data
import decoding
from model import ClusterSTM
from teacher import (
    FILTERS,
    SigLIP,
    SigLIPConfig,
    VisionConfig,
    demand,
    find_folder,
    one_line,
    read_json,
    read_pixels,
    read_tower,
    resized,
)

VERSION = 1             # of the index: counts up when its form changes, or what becomes of a frame
SAVE_EVERY = 60         # seconds of indexing that a crash can cost
EXTENSIONS = tuple("." + name for name in """
    mp4 m4v mov qt mkv webm avi divx wmv asf flv f4v mpg mpeg mpe m1v m2v vob ts mts m2ts m2t mod tod mxf gif apng
    ogv ogm 3gp 3gpp 3g2 y4m rm rmvb dv nut h264 264 h265 265 hevc ivf mjpg mjpeg wtv amv
    """.split())


@dataclass
class Config:
    """Search a folder of videos by text; without a query only its index is brought up to date."""
    folder: tyro.conf.Positional[str]                       # folder of videos, looked through with its subfolders
    queries: tyro.conf.Positional[tuple[str, ...]] = ()     # what to look for; each text in quotes
    checkpoint: str = "google/siglip-base-patch16-224"      # folder that train.py wrote; or a SigLIP's, or its hub id
    top: int = 5                # videos shown for a query
    segment: float = 10.0       # longer videos are cut into equal parts of at most about so many seconds; 0: never
    frames: int = 0             # frames a segment; 0: as the model was trained, of a SigLIP 8
    index: str = ""             # file with the features; empty: FOLDER.index.safetensors, beside the folder
    export: str = ""            # .safetensors to write the features to, for use elsewhere
    batch: int = 16             # segments that the model is given at once
    workers: int = -1           # decoding processes; 0: this one; -1: one a core, at most 8
    device: str = "auto"        # cpu, cuda, or auto: cuda where there is one

    def __post_init__(self):
        for name, least in (("top", 1), ("segment", 0), ("frames", 0), ("batch", 1), ("workers", -1)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: wants at least {least}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device wants to be auto, cpu or cuda, is {self.device!r}")
        for query in self.queries:
            if not data.clean(query):
                raise ValueError(f"the query {query!r} has no words")


# ---------------------------------------------------------------------------------------------------------------------
# Two kinds of checkpoint

def square(frame: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, S, S) uint8, as eval.py shows it to the student."""
    return decoding.test_view(frame[None], size)[0]


class Student:
    """A folder that train.py wrote. What indexing needs is known from its config.json; `load` comes before the rest."""

    def __init__(self, folder: str, config: dict):
        view = config.get("data") or {}
        demand({"frames", "size"} <= view.keys(), os.path.join(folder, "config.json"), "data",
               "the frames and size that it was trained with", view)
        self.folder, self.frames, self.size = folder, view["frames"], [view["size"]] * 2
        self.view = partial(square, size=view["size"])

    def load(self, device: torch.device):
        self.model = ClusterSTM.from_pretrained(self.folder).to(device).requires_grad_(False)
        self.tokenizer = data.load_tokenizer(os.path.join(self.folder, "tokenizer.json"))

    def encode_video(self, video: Tensor) -> Tensor:
        """(B, T, 3, S, S) uint8 -> (B, E), means over the frames of unit vectors."""
        return self.model.encode_video(video)[1]

    def encode_text(self, text: str) -> tuple[Tensor, int, int]:
        """-> (E,) of unit length; the pieces that the text has, and how many of them count."""
        cfg = self.model.cfg
        ids = data.encode(self.tokenizer, [text], cfg.text_length, cfg.sep).to(self.model.temp.device)
        pieces = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return self.model.encode_text(ids)[1][0], pieces, cfg.text_length - 1 - cfg.sep


class Teacher:
    """A SigLIP, which sees each frame by itself; otherwise as a Student."""

    def __init__(self, folder: str, config: dict):
        vision = read_tower(VisionConfig, config, "vision_config", os.path.join(folder, "config.json"))
        pixels = SigLIPConfig(vision, pixels=read_pixels(folder)).pixels
        self.folder, self.frames, self.size = folder, 8, list(pixels.size)
        self.view = partial(resized, size=pixels.size, mode=FILTERS[pixels.resample])

    def load(self, device: torch.device):
        self.model = SigLIP.from_pretrained(self.folder).to(device)

    def encode_video(self, video: Tensor) -> Tensor:
        _, pooled = self.model.encode_image(self.model.pixels(video.flatten(0, 1)))         # (BT, E)
        return nnf.normalize(pooled.float(), dim=-1).unflatten(0, video.shape[:2]).mean(1)

    def encode_text(self, text: str) -> tuple[Tensor, int, int]:
        feature, tokenizer = self.model.encode_text(self.model.tokenize([text]))[0], self.model.tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return feature, len(tokenizer.encode(text).ids), self.model.cfg.text_config.max_position_embeddings


def open_checkpoint(name: str) -> Student | Teacher:
    """A folder, or a hub id of a SigLIP; its config.json says which of the two it is. No weights are read yet."""
    try:
        folder = find_folder(name, "a model to search with")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or give --checkpoint a folder that train.py wrote, or a SigLIP's") from None
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} is no folder of a trained model or a SigLIP: it has no config.json")
    config = read_json(path)
    if "model" in config:
        return Student(folder, config)
    kind = config.get("model_type")
    demand(kind == "siglip", path, "model_type", "'siglip', where there is no 'model' part of a run of train.py", kind)
    return Teacher(folder, config)


def fingerprint(folder: str) -> str:
    """Another one for other weights, without reading them; the same wherever the folder is moved to."""
    seen, weights = hashlib.blake2b(digest_size=16), 0
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name in ("config.json", "preprocessor_config.json"):
            with open(path, "rb") as f:
                seen.update(f.read())
        elif name.startswith("model") and name.endswith(".safetensors"):
            seen.update(f"{name} {stamp(path)}".encode())
            weights += 1
    if not weights:
        raise FileNotFoundError(f"{folder} has no model.safetensors: is its run still under way?")
    return seen.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Videos -> segments

def scan(folder: str) -> dict[str, list[int]]:
    """Files with a video's ending, in subfolders too, but none hidden: path relative to the folder -> its stamp."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names
                  if not name.startswith(".") and name.lower().endswith(EXTENSIONS)]
    if not found:
        raise FileNotFoundError(f"{folder}: no video in it, of the endings {' '.join(EXTENSIONS)}")
    return {name: stamp(os.path.join(folder, name)) for name in sorted(found)}


def stamp(path: str) -> list[int]:
    """[bytes, time of the last change in ns]; where there is no file, as at the end of a broken link, [0, 0]."""
    try:
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def cut(times: np.ndarray, length: float, T: int) -> tuple[list[tuple[float, float]], np.ndarray]:
    """
    times (n,) of the frames, ascending seconds from 0 -> (start, end) of s equal segments, picks (s T,) ascending.

    A segment's frames are picked as eval.py picks a video's. One without frames shows the frame before it.
    """
    n = len(times)
    if not n:
        raise ValueError("has no frames")
    end = float(times[-1]) * n / max(1, n - 1)                              # the last frame lasts as long as the others
    # A video that is a tenth of a segment too long is not cut for that.
    count = min(n, max(1, math.ceil(end / length - 0.1))) if length else 1
    edges = np.linspace(0, end, count + 1)
    at = [*np.searchsorted(times, edges[:-1] - 1e-6), n]                    # a frame on an edge opens its segment
    picks = [a + decoding.pick(T, b - a) if a < b else np.full(T, a - 1) for a, b in pairwise(at)]
    return list(pairwise(edges.tolist())), np.concatenate(picks)


class Segments(IterableDataset):
    """
    Decodes each file once -> (name, (start, end), frames (T, 3, S, S)) of its segments, in order, and when it is over
    (name, None, what is wrong with it, if anything is).
    """

    def __init__(self, folder: str, names: list[str], length: float, T: int, view, workers: int):
        self.folder, self.names, self.length, self.T, self.view = folder, names, length, T, view
        self.at = torch.full((max(1, workers),), -1).share_memory_()       # the file that each process is at

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, len(self.names), step):
            self.at[first] = i
            wrong, path = "", os.path.join(self.folder, self.names[i])
            try:
                for span, frames in self.read(path):
                    yield self.names[i], span, frames
            except (ValueError, OSError) as error:
                wrong = str(error).removeprefix(f"{path}: ") or type(error).__name__
            except Exception as error:                                      # no file may stop the others
                wrong = one_line(error)
            yield self.names[i], None, wrong

    def read(self, path: str):
        spans, frames = [], []

        def choose(times):
            some, picks = cut(times, self.length, self.T)
            spans.extend(some)
            return picks

        # As soon as one is decoded it is shrunk, and handed on: an hour of frames would be gigabytes.
        for frame in decoding.chosen_frames(path, choose):
            frames.append(self.view(decoding.to_tensor(frame, None)))
            if len(frames) == self.T:
                yield spans.pop(0), torch.stack(frames)
                frames.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Index

@dataclass
class Video:
    """What the index knows of a file."""
    stamp: list[int]                        # of the file when it was read
    error: str                              # why it has no segments
    spans: list[tuple[float, float]]        # start and end of its s segments, seconds
    features: Tensor                        # (s, E) fp32


def write_tensors(path: str, videos: dict[str, Video], **metadata):
    """features (n, E), start, end (n,) seconds, file (n,) int64: the place of its name in `videos`. Whole or not."""
    file = [i for i, video in enumerate(videos.values()) for _ in video.spans]
    spans = torch.tensor([span for video in videos.values() for span in video.spans], dtype=torch.float64).view(-1, 2)
    features = [video.features for video in videos.values() if video.spans]
    tensors = {"features": torch.cat(features) if features else torch.zeros(0, 0), "file": torch.tensor(file).long(),
               "start": spans[:, 0].contiguous(), "end": spans[:, 1].contiguous()}
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        save_file(tensors, beside, {name: json.dumps(value) for name, value in metadata.items()})
        os.chmod(beside, 0o644)             # safetensors writes private files
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def write_index(path: str, videos: dict[str, Video], about: dict):
    videos = dict(sorted(videos.items()))
    write_tensors(path, videos, about=about, files=[[n, v.stamp, v.error] for n, v in videos.items()])


def read_index(path: str, about: dict) -> tuple[dict[str, Video], str]:
    """-> its videos and no words; or, where the index does not serve, none and why."""
    if not os.path.isfile(path):
        return {}, ""
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            if not {"about", "files"} <= metadata.keys():
                raise FileExistsError(f"{path} is there and is no index of search.py: give another --index")
            was = json.loads(metadata["about"])
            changed = [key for key in about if key != "checkpoint" and was.get(key) != about[key]]
            if changed:
                name, now = was["checkpoint"], about["checkpoint"]
                said = [f"{key} {was.get(key)}, now {about[key]}" for key in changed if key != "weights"]
                if "weights" in changed:
                    said.insert(0, f"checkpoint {name}, " + (f"now {now}" if now != name else "which has changed"))
                return {}, f"it was made with {', '.join(said)}"
            features, start, end, file = map(f.get_tensor, ("features", "start", "end", "file"))
            files, rows = json.loads(metadata["files"]), defaultdict(list)
            for row, i in enumerate(file.tolist()):
                rows[i].append(row)
            if len(features) != len(file) or set(rows) != {i for i, (*_, error) in enumerate(files) if not error}:
                raise ValueError("its files and features do not go together")
            spans = list(zip(start.tolist(), end.tolist(), strict=True))
            return {name: Video(seen, error, [spans[row] for row in rows[i]], features[rows[i]])
                    for i, (name, seen, error) in enumerate(files)}, ""
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"it is damaged ({one_line(error)})"


@torch.inference_mode()
def encoded(segments, encode, batch: int, device: torch.device, bar):
    """The items of Segments -> (name, error, spans, features (s, E)) of each file, when all of it is encoded."""
    waiting, found, over = [], defaultdict(list), []

    def flush():
        if waiting:
            video = torch.stack([frames for *_, frames in waiting]).to(device)
            with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
                features = encode(video).float().cpu()                      # (b, E)
            for (name, span, _), feature in zip(waiting, features, strict=True):
                found[name].append((span, feature))
            bar.set_postfix_str(f"{waiting[-1][0]} to {clock(waiting[-1][1][1])}")
            waiting.clear()
        for name, error in over:
            own = [] if error else found[name]
            found.pop(name, None)
            yield name, error, [span for span, _ in own], torch.stack([x for _, x in own]) if own else torch.zeros(0, 0)
        over.clear()

    for name, span, what in segments:
        if span is None:
            over.append((name, what))
        else:
            waiting.append((name, span, what))
        if len(waiting) in (0, batch):
            yield from flush()
    yield from flush()


def add(videos: dict[str, Video], names: list[str], stamps: dict, cfg: Config, checkpoint, T: int, device, save):
    """Indexes these files into `videos`, and saves now and then, at the end, and when it is interrupted."""
    workers = min(len(names), min(data.cores(), 8) if cfg.workers < 0 else cfg.workers)
    segments = Segments(cfg.folder, names, cfg.segment, T, checkpoint.view, workers)
    loader = DataLoader(segments, batch_size=None, num_workers=workers, in_order=not workers)
    saved, new = time.monotonic(), 0
    try:
        with tqdm(total=len(names), desc="indexing", unit="file", disable=None) as bar:
            for name, *found in encoded(loader, checkpoint.encode_video, cfg.batch, device, bar):
                videos[name] = Video(stamps[name], *found)
                new += 1
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY:
                    save()
                    saved = time.monotonic()
    except KeyboardInterrupt:
        sys.exit(f"search.py: interrupted; {new} of {len(names)} new or changed videos are in the index, and the same "
                 f"command goes on from there")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a decoding process died ({one_line(error)}), at one of "
                         f"{', '.join(names[i] for i in segments.at.tolist() if i >= 0)}") from None
    finally:
        if new:
            save()


# ---------------------------------------------------------------------------------------------------------------------
# Search

@dataclass
class Hit:
    score: float
    name: str
    start: float        # seconds
    end: float
    parts: int          # segments that the video has


def best(scores: Tensor, rows: list[tuple], top: int) -> list[Hit]:
    """scores (n,) of segments, rows: name, start, end, parts of each -> the top videos, each with its best segment."""
    hits = {}
    for i in scores.argsort(descending=True, stable=True).tolist():
        if rows[i][0] not in hits:
            hits[rows[i][0]] = Hit(scores[i].item(), *rows[i])
            if len(hits) == top:
                break
    return list(hits.values())


def clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def main(cfg: Config) -> dict[str, list[Hit]]:
    """Brings the index up to date, then answers: query -> its hits, best first."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, and this machine or this build of torch has no CUDA GPU")
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    index = cfg.index or os.path.abspath(cfg.folder) + ".index.safetensors"
    for path in filter(None, (index, cfg.export)):
        if not path.endswith(".safetensors") or not os.path.isdir(os.path.dirname(path) or ".") or os.path.isdir(path):
            raise ValueError(f"{path}: wanted a name that ends in .safetensors, in a folder that is there")
    if cfg.export and os.path.realpath(cfg.export) == os.path.realpath(index):
        raise ValueError(f"{index} is the index: export to another file")

    stamps = scan(cfg.folder)
    checkpoint = open_checkpoint(cfg.checkpoint)
    T = cfg.frames or checkpoint.frames
    about = {"version": VERSION, "checkpoint": cfg.checkpoint, "weights": fingerprint(checkpoint.folder), "frames": T,
             "segment": cfg.segment, "size": checkpoint.size}
    old, wrong = read_index(index, about)
    if wrong:
        print(f"{index}: {wrong}; all is indexed anew")
    if old and not old.keys() & stamps.keys():
        raise ValueError(f"{index} is of another folder, none of its {len(old)} files is in {cfg.folder}: give another "
                         f"--index, or remove it")
    videos = {name: video for name, video in old.items() if stamps.get(name) == video.stamp}
    new = [name for name in stamps if name not in videos]
    gone = len(old.keys() - stamps.keys())
    save = lambda: write_index(index, videos, about)
    if new:
        try:
            tempfile.TemporaryFile(dir=os.path.dirname(index) or ".").close()
        except OSError as error:
            raise ValueError(f"{index}: cannot be written ({error.strerror}); give --index another place") from None
    if new or cfg.queries:
        checkpoint.load(device)
    if cfg.queries:                         # what is wrong with the tokenizer is known before hours of decoding
        checkpoint.encode_text(data.clean(cfg.queries[0]))
    started = time.monotonic()
    if new:
        add(videos, new, stamps, cfg, checkpoint, T, device, save)
    elif gone:
        save()
    videos = dict(sorted(videos.items()))
    tell(cfg, videos, new, gone, time.monotonic() - started)

    good = {name: video for name, video in videos.items() if video.spans}
    if not good:
        raise ValueError(f"{cfg.folder}: none of its {len(videos)} files could be indexed")
    if cfg.export:
        write_tensors(cfg.export, good, files=list(good), **about)
        print(f"features written to {cfg.export}")
    if not cfg.queries and not cfg.export:
        print(f'to search: python search.py {cfg.folder} "what to look for"')
    features = torch.cat([video.features for video in good.values()]).to(device)            # (n, E)
    rows = [(name, *span, len(video.spans)) for name, video in good.items() for span in video.spans]
    return {query: answer(query, checkpoint, features, rows, cfg) for query in cfg.queries}


def tell(cfg: Config, videos: dict[str, Video], new: list[str], gone: int, seconds: float):
    """What the index holds, and what it could not take."""
    bad = [name for name, video in videos.items() if video.error]
    now = [f"{len(new)} new or changed, read in {seconds:.1f} s"] * bool(new) + [f"{gone} gone"] * bool(gone)
    print(f"{cfg.folder}: {len(videos) - len(bad)} of {len(videos)} videos indexed, "
          f"{sum(len(video.spans) for video in videos.values())} segments" + "".join(f"; {text}" for text in now))
    fresh = set(bad) & set(new)
    for name in bad if len(bad) <= 5 else sorted(fresh):
        print(f"  not indexed: {name}: {videos[name].error}")
    if len(bad) > max(5, len(fresh)):
        print(f"  not indexed: {len(bad) - len(fresh)} that failed before and have not changed")


@torch.inference_mode()
def answer(query: str, checkpoint, features: Tensor, rows: list[tuple], cfg: Config) -> list[Hit]:
    """Prints and returns the best videos for a query."""
    started = time.monotonic()
    text, pieces, room = checkpoint.encode_text(data.clean(query))
    hits = best((features @ text.float()).cpu(), rows, cfg.top)
    print(f"\n{query}  ({len(rows)} segments, {1000 * (time.monotonic() - started):.0f} ms)")
    if pieces > room:
        print(f"  cut: the query has {pieces} word pieces, the model reads {room}")
    for rank, hit in enumerate(hits, 1):
        part = f"  {clock(hit.start)}-{clock(hit.end)}" if hit.parts > 1 else ""
        print(f"{rank:3}  {hit.score:6.3f}  {os.path.join(cfg.folder, hit.name)}{part}")
    return hits


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # a file's name may be no text
    try:
        data.command("search.py", lambda: main(tyro.cli(Config)))
    except KeyboardInterrupt:
        sys.exit("search.py: interrupted")
