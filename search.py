"""
Search a folder of videos by text.

    python search.py FOLDER "a dog in the snow" "two people hug"
    python search.py FOLDER "a red square" --checkpoint out/sprites --export features.safetensors
    python search.py FOLDER "a dog" "a cat" --html found.html       # a page with the clips, which needs no server
    python search.py FOLDER --app                                   # a page to search in, on this machine

Inputs: a folder of videos, and a checkpoint: a folder that train.py wrote, or a SigLIP. Outputs: the best videos of
each query, printed or as a page (search_page.py), and an index with the features of all videos,
FOLDER.index.safetensors beside the folder. The first run decodes every video once; later runs decode only videos that
are new or have changed.

A long video is cut into segments of equal length and is found by its best segment. The feature of a segment is the mean
over its frames of unit vectors. The mean is not normalised again, so that a score, text . feature, is the mean of the
frames' cosines, as in eval.py.

--export writes n segments. Segment i is part of the file names[file[i]], from start[i] to end[i]:

    with safetensors.safe_open("features.safetensors", "pt") as f:
        features, start, end, file = map(f.get_tensor, ("features", "start", "end", "file"))    # (n, E), (n,) seconds
        names = json.loads(f.metadata()["files"])                                               # relative to FOLDER
"""

import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from tyro.conf import arg

import search_page
import video
from annotations import normalize_caption
from data import init_loader_worker
from files import (
    escape_control,
    format_error,
    read_json,
    read_safetensors,
    require,
    resolve_checkpoint,
    write_safetensors,
)
from inputs import require_finite
from media import VIDEO_EXTENSIONS
from model import ClusterSTM
from runtime import bf16_autocast, num_cpus, run_cli, select_device
from search_page import Answer, Hit, format_time
from siglip_files import SigLIPConfig, VisionConfig, read_image_processor, read_tower_config
from teacher import SigLIP
from tokenizer import encode_texts
from video import RESAMPLE_MODES, eval_transform, resize_like_pillow, sample_frame_indices

VERSION = 1             # of the index: increase it if the format or the preprocessing of frames changes
SAVE_EVERY = 60         # seconds of indexing that a crash may lose


@dataclass
class Config:
    """Search a folder of videos by text. Without a query or --app, only update the index."""
    # folder of videos; its subfolders are searched too, and folders that are linked there
    folder: Annotated[tyro.conf.Positional[str], arg(metavar="FOLDER")]
    # texts to search for, each in quotes; without one or --app only the index is updated
    queries: Annotated[tyro.conf.Positional[tuple[str, ...]], arg(metavar="[QUERY ...]")] = ()
    checkpoint: str = "google/siglip-base-patch16-224"      # folder that train.py wrote, or a SigLIP's folder or hub id
    top: int = 5                # videos to show per query
    threshold: float = -1.0     # show only videos with at least this score; -1: all
    html: str = ""              # .html file to write the results to, a page with their clips; empty: none
    app: bool = False           # serve a page to search in, with the queries' results; needs gradio
    host: str = "127.0.0.1"     # address at which the app is served; 127.0.0.1: to this machine alone
    port: int = 7860            # port of the app; 0: any that is free
    segment: float = 10.0       # cut longer videos into equal segments of about this many seconds; 0: do not cut
    frames: int = 0             # frames per segment; 0: as the model was trained, or 8 for a SigLIP
    index: str = ""             # file of the index, .safetensors; empty: FOLDER.index.safetensors beside the folder
    export: str = ""            # .safetensors file to write all features to, for other programs; empty: none
    batch: int = 16             # segments per forward pass
    workers: int = -1           # decoding processes; 0: decode in the main process; -1: one per core, at most 8
    device: Literal["auto", "cpu", "cuda"] = "auto"         # auto: cuda if there is a GPU

    def __post_init__(self):
        for name, least in (("top", 1), ("segment", 0), ("frames", 0), ("batch", 1), ("workers", -1)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least} and finite, got {getattr(self, name)}")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from -1 to 1, got {self.threshold}")
        if not 0 <= self.port < 2 ** 16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.html and self.app:
            raise ValueError(f"pass --html or --app, not both, got --html {self.html} and --app")
        if self.html and not self.queries:
            raise ValueError(f"--html must come with at least one query, got --html {self.html} alone")
        for query in self.queries:
            if not normalize_caption(query):
                raise ValueError(f"a query must have at least one word, got {query!r}")
            if re.search("[\ud800-\udfff]", query):
                raise ValueError(f"a query must be valid Unicode, got {query!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Two kinds of checkpoints

class StudentEncoder:
    """A folder that train.py wrote. Its config.json is enough for decoding; `load` must come before encoding."""

    def __init__(self, folder: str, config: dict):
        data = config.get("data") or {}
        require({"num_frames", "image_size"} <= data.keys(), os.path.join(folder, "config.json"), "data",
                "an object with num_frames and image_size", data)
        self.folder, self.num_frames, self.image_size = folder, data["num_frames"], [data["image_size"]] * 2
        self.transform = partial(eval_transform, size=data["image_size"])

    def load(self, device: torch.device):
        self.model = ClusterSTM.from_pretrained(self.folder).to(device).requires_grad_(False)
        self.tokenizer = self.model.inputs.tokenizer

    def encode_video(self, video: Tensor) -> Tensor:
        """video (B, T, 3, S, S) uint8 -> (B, E), means over the frames of unit vectors."""
        return self.model.encode_video(video)[1]

    def encode_text(self, text: str) -> tuple[Tensor, int, int]:
        """-> feature (E,) of unit length, the number of tokens of the text, the number that the model reads."""
        cfg = self.model.text_cfg
        ids = encode_texts(self.tokenizer, [text], cfg.max_length).to(self.model.temp.device)
        num_tokens = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return self.model.encode_text(ids)[1][0], num_tokens, cfg.max_length - 1


class SiglipEncoder:
    """A SigLIP, which encodes each frame by itself; the same methods as a StudentEncoder."""

    def __init__(self, folder: str, config: dict):
        vision = read_tower_config(VisionConfig, config, "vision_config", os.path.join(folder, "config.json"))
        processor = SigLIPConfig(vision, image_processor=read_image_processor(folder)).image_processor
        self.folder, self.num_frames, self.image_size = folder, 8, list(processor.size)
        self.transform = partial(resize_like_pillow, size=processor.size, mode=RESAMPLE_MODES[processor.resample])

    def load(self, device: torch.device):
        self.model = SigLIP.from_pretrained(self.folder).to(device)

    def encode_video(self, video: Tensor) -> Tensor:
        return self.model.embed_frames(video)

    def encode_text(self, text: str) -> tuple[Tensor, int, int]:
        feature, tokenizer = self.model.encode_text(self.model.tokenize([text]))[0], self.model.tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return feature, len(tokenizer.encode(text).ids), self.model.cfg.text_config.max_position_embeddings


def open_checkpoint(name: str) -> StudentEncoder | SiglipEncoder:
    """Open a folder or a SigLIP's hub id. Its config.json says which of the two it is; no weights are read yet."""
    try:
        folder = resolve_checkpoint(name, "a model to search with")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or pass --checkpoint a folder of train.py or of a SigLIP") from None
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} must be a folder of a trained model or a SigLIP, but it has no config.json")
    config = read_json(path)
    if "model" in config:
        return StudentEncoder(folder, config)
    model_type = config.get("model_type")
    require(model_type == "siglip", path, "model_type", "'siglip' if there is no 'model' part of train.py", model_type)
    return SiglipEncoder(folder, config)


def fingerprint(folder: str) -> str:
    """Hash a checkpoint: other weights, which are not read, change it; moving the folder does not."""
    digest, num_files = hashlib.blake2b(digest_size=16), 0
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name in ("config.json", "preprocessor_config.json"):
            with open(path, "rb") as f:
                digest.update(f.read())
        elif name.startswith("model") and name.endswith(".safetensors"):
            digest.update(f"{name} {file_stamp(path)}".encode())
            num_files += 1
    if not num_files:
        raise FileNotFoundError(f"{folder} must have a model.safetensors, which training writes at its end")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Videos -> segments

def walk_folders(folder: str):
    """
    Yield (path, file names) of a folder and its subfolders, except hidden ones, each once: linked folders are followed
    after all others, so that a folder is found by its own path if it has one, and a loop of links ends.
    """
    roots, seen = [folder], set()
    for root in roots:                                                      # grows by the linked folders
        for parent, folders, names in os.walk(root):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            roots += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            yield parent, names


def list_videos(folder: str) -> dict[str, list[int]]:
    """All video files in a folder and its subfolders, except hidden ones: relative path -> file_stamp."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = []
    for parent, names in walk_folders(folder):
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in names
                  if not name.startswith(".") and name.lower().endswith(VIDEO_EXTENSIONS)]
    if not paths:
        raise FileNotFoundError(f"{folder} has no video; a video's name ends in one of {' '.join(VIDEO_EXTENSIONS)}")
    return {path: file_stamp(os.path.join(folder, path)) for path in sorted(paths)}


def file_stamp(path: str) -> list[int]:
    """[size in bytes, time of the last change in ns]; [0, 0] if there is no file, for instance at a broken link."""
    try:
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def segment_times(times: np.ndarray, length: float, T: int) -> tuple[list[tuple[float, float]], np.ndarray]:
    """
    Cut a video into s equal segments of about `length` seconds: times (n,) of its frames, ascending seconds from 0
    -> (start, end) of each segment, frame indices (s T,) ascending.

    The T frames of a segment are sampled as eval.py samples those of a video. A segment without frames gets the frame
    before it.
    """
    n = len(times)
    if not n:
        raise ValueError("has no frames")
    end = float(times[-1]) * n / max(1, n - 1)                              # the last frame lasts as long as the others
    # A video that is too long by a tenth of a segment gets no segment for that.
    count = min(n, max(1, math.ceil(end / length - 0.1))) if length else 1
    edges = np.linspace(0, end, count + 1)
    bounds = [*np.searchsorted(times, edges[:-1] - 1e-6), n]                # a frame on an edge opens its segment
    indices = [first + sample_frame_indices(T, last - first) if first < last else np.full(T, first - 1)
               for first, last in pairwise(bounds)]
    return list(pairwise(edges.tolist())), np.concatenate(indices)


class SegmentDataset(IterableDataset):
    """
    Decode each file once. Yields (name, (start, end), frames (T, 3, S, S)) for its segments in order and then, at the
    end of the file, (name, None, error), where error is empty if the file could be read.
    """

    def __init__(self, folder: str, names: list[str], length: float, T: int, transform, workers: int):
        self.folder, self.names, self.length, self.T, self.transform = folder, names, length, T, transform
        self.current = torch.full((max(1, workers),), -1).share_memory_()   # index of the file that each process reads

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(first, len(self.names), step):
            self.current[first] = i
            message, path = "", os.path.join(self.folder, self.names[i])
            try:
                for segment, frames in self.read(path):
                    yield self.names[i], segment, frames
            except (ValueError, OSError) as error:
                message = str(error).removeprefix(f"{path}: ") or type(error).__name__
            except Exception as error:                                      # no file may stop the others
                message = format_error(error)
            yield self.names[i], None, message

    def read(self, path: str):
        """Decode a file; yield (start, end) and frames (T, 3, S, S) of each segment."""
        segments, frames = [], []

        def select(times):
            file_segments, indices = segment_times(times, self.length, self.T)
            segments.extend(file_segments)
            return indices

        # Each frame is resized and each segment handed on at once: the frames of an hour would take gigabytes.
        for frame in video.iter_frames(path, select):
            frames.append(self.transform(video.frame_to_tensor(frame, None)[None]))
            if len(frames) == self.T:
                yield segments.pop(0), torch.cat(frames)
                frames.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Index

@dataclass
class IndexEntry:
    """The entry of a file in the index."""
    stamp: list[int]                        # file_stamp of the file when it was read
    error: str                              # why it has no segments; empty if it has
    segments: list[tuple[float, float]]     # start and end of its s segments, in seconds
    features: Tensor                        # (s, E) fp32


def write_tensors(path: str, entries: dict[str, IndexEntry], **metadata):
    """Write features (n, E), start and end (n,) in seconds, and file (n,) int64, the index of its name in `entries`."""
    file = [i for i, entry in enumerate(entries.values()) for _ in entry.segments]
    start, end = ([segment[edge] for entry in entries.values() for segment in entry.segments] for edge in (0, 1))
    features = [entry.features for entry in entries.values() if entry.segments]
    tensors = {"features": torch.cat(features) if features else torch.zeros(0, 0), "file": torch.tensor(file).long(),
               "start": torch.tensor(start, dtype=torch.float64), "end": torch.tensor(end, dtype=torch.float64)}
    write_safetensors(path, tensors, {name: json.dumps(value) for name, value in metadata.items()})


def write_index(path: str, entries: dict[str, IndexEntry], metadata: dict):
    entries = dict(sorted(entries.items()))
    files = [[name, entry.stamp, entry.error] for name, entry in entries.items()]
    write_tensors(path, entries, about=metadata, files=files)


def read_index(path: str, metadata: dict) -> tuple[dict[str, IndexEntry], str]:
    """Read an index -> its entries and "", or no entries and why it cannot be used. Without a file, {} and ""."""
    if not os.path.isfile(path):
        return {}, ""
    try:
        tensors, stored = read_safetensors(path)
        if not {"about", "files"} <= stored.keys():
            raise FileExistsError(f"{path} exists and is not an index of search.py: pass another --index")
        if difference := describe_difference(json.loads(stored["about"]), metadata):
            return {}, difference
        features, start, end, file = (tensors[name] for name in ("features", "start", "end", "file"))
        files, rows = json.loads(stored["files"]), defaultdict(list)
        for row, i in enumerate(file.tolist()):
            rows[i].append(row)
        if not features.isfinite().all():
            raise ValueError("its features must be finite")
        if len(features) != len(file) or set(rows) != {i for i, (*_, error) in enumerate(files) if not error}:
            raise ValueError("its files and features do not match")
        segments = list(zip(start.tolist(), end.tolist(), strict=True))
        return {name: IndexEntry(stamp, error, [segments[row] for row in rows[i]], features[rows[i]])
                for i, (name, stamp, error) in enumerate(files)}, ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, "it is damaged"


def describe_difference(before: dict, now: dict) -> str:
    """Say how the settings that an index was made with differ from those of now; "" if it can be used."""
    changed = [key for key in now if key != "checkpoint" and before.get(key) != now[key]]
    if not changed:
        return ""
    changes = [f"{key} {before.get(key)}, now {now[key]}" for key in changed if key != "weights"]
    if "weights" in changed:
        same_name = before["checkpoint"] == now["checkpoint"]
        change = "whose weights have changed" if same_name else f"now {now['checkpoint']}"
        changes.insert(0, f"checkpoint {before['checkpoint']}, {change}")
    return f"it was made with {', '.join(changes)}"


@torch.inference_mode()
def encode_segments(items, encode, batch: int, device: torch.device, bar):
    """Encode the items of a SegmentDataset; yield (name, error, segments, features (s, E)) when a file is complete."""
    waiting, encoded, finished = [], defaultdict(list), []

    def flush():
        if waiting:
            clips = torch.stack([frames for *_, frames in waiting]).to(device)
            with bf16_autocast(device):
                features = encode(clips).float().cpu()                      # (b, E)
            require_finite(features, [name for name, *_ in waiting], "the model's features of the video")
            for (name, segment, _), feature in zip(waiting, features, strict=True):
                encoded[name].append((segment, feature))
            bar.set_postfix_str(f"{escape_control(waiting[-1][0])} to {format_time(waiting[-1][1][1])}")
            waiting.clear()
        for name, error in finished:
            parts = encoded.pop(name, [])
            if error:
                parts = []
            features = torch.stack([feature for _, feature in parts]) if parts else torch.zeros(0, 0)
            yield name, error, [segment for segment, _ in parts], features
        finished.clear()

    for name, segment, payload in items:    # the payload is frames, or the error at the end of a file
        if segment is None:
            finished.append((name, payload))
        else:
            waiting.append((name, segment, payload))
        if len(waiting) in (0, batch):
            yield from flush()
    yield from flush()


def index_files(entries: dict[str, IndexEntry], names: list[str], stamps: dict, cfg: Config, encoder, num_frames: int,
                device: torch.device, save):
    """Index these files into `entries`. Call `save` from time to time, at the end, and when it is interrupted."""
    workers = min(len(names), min(num_cpus(), 8) if cfg.workers < 0 else cfg.workers)
    segments = SegmentDataset(cfg.folder, names, cfg.segment, num_frames, encoder.transform, workers)
    loader = DataLoader(segments, batch_size=None, num_workers=workers, in_order=not workers,
                        worker_init_fn=init_loader_worker)
    last_saved, count = time.monotonic(), 0
    try:
        with tqdm(total=len(names), desc="indexing", unit="file", disable=None) as bar:
            for name, *values in encode_segments(loader, encoder.encode_video, cfg.batch, device, bar):
                entries[name] = IndexEntry(stamps[name], *values)
                count += 1
                bar.update()
                if time.monotonic() - last_saved > SAVE_EVERY:
                    save()
                    last_saved = time.monotonic()
    except KeyboardInterrupt:
        sys.exit(f"search.py: interrupted; {count} of {len(names)} new or changed videos are in the index, and the "
                 f"same command continues from there")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a decoding process died ({format_error(error)}), at one of "
                         f"{', '.join(names[i] for i in segments.current.tolist() if i >= 0)}") from None
    finally:
        if count:
            save()


# ---------------------------------------------------------------------------------------------------------------------
# Search

def top_videos(scores: Tensor, rows: list[tuple], top: int) -> list[Hit]:
    """scores (n,) of segments, their (name, start, end, parts) -> the top videos, each with its best segment."""
    hits = {}
    for i in scores.argsort(descending=True, stable=True).tolist():
        if rows[i][0] not in hits:
            hits[rows[i][0]] = Hit(scores[i].item(), *rows[i])
            if len(hits) == top:
                break
    return list(hits.values())


def check_output_paths(index: str, export: str):
    """Raise a ValueError unless index and export are different .safetensors files in folders that exist."""
    for path in filter(None, (index, export)):
        if not path.endswith(".safetensors") or not os.path.isdir(os.path.dirname(path) or ".") or os.path.isdir(path):
            raise ValueError(f"--index and --export must end in .safetensors and be in an existing folder, got {path}")
    if export and os.path.realpath(export) == os.path.realpath(index):
        raise ValueError(f"--export must be another file than the index, got {export}")


def update_index(cfg: Config, index: str, stamps: dict[str, list[int]], encoder,
                 device: torch.device) -> tuple[dict[str, IndexEntry], dict]:
    """Index the files that are new or have changed -> entries of all files by name, the settings they belong to."""
    num_frames = cfg.frames or encoder.num_frames
    metadata = {"version": VERSION, "checkpoint": cfg.checkpoint, "weights": fingerprint(encoder.folder),
                "frames": num_frames, "segment": cfg.segment, "size": encoder.image_size}
    old, reason = read_index(index, metadata)
    if reason:
        print(escape_control(f"{index}: {reason}; all videos are indexed again"))
    if old and not old.keys() & stamps.keys():
        raise ValueError(f"{index} is the index of another folder: none of its {len(old)} files is in {cfg.folder}; "
                         f"pass another --index or remove it")
    entries = {name: entry for name, entry in old.items() if stamps.get(name) == entry.stamp}
    new = [name for name in stamps if name not in entries]
    num_gone = len(old.keys() - stamps.keys())
    if new:
        try:
            tempfile.TemporaryFile(dir=os.path.dirname(index) or ".").close()
        except OSError as error:
            raise ValueError(f"{index} cannot be written ({error.strerror}); pass another --index") from None
    if new or cfg.queries or cfg.app:
        encoder.load(device)
    if cfg.queries or cfg.app:              # a broken tokenizer must show before hours of decoding
        encoder.encode_text(normalize_caption(cfg.queries[0] if cfg.queries else "a video"))
    started = time.monotonic()
    if new:
        save = partial(write_index, index, entries, metadata)
        index_files(entries, new, stamps, cfg, encoder, num_frames, device, save)
    elif num_gone:
        write_index(index, entries, metadata)
    entries = dict(sorted(entries.items()))
    print_summary(cfg, entries, new, num_gone, time.monotonic() - started)
    return entries, metadata


def print_summary(cfg: Config, entries: dict[str, IndexEntry], new: list[str], num_gone: int, seconds: float):
    """Print what the index holds, and which files could not be indexed."""
    failed = [name for name, entry in entries.items() if entry.error]
    num_segments = sum(len(entry.segments) for entry in entries.values())
    line = f"{cfg.folder}: {len(entries) - len(failed)} of {len(entries)} videos indexed, {num_segments} segments"
    if new:
        line += f"; {len(new)} new or changed, read in {seconds:.1f} s"
    if num_gone:
        line += f"; {num_gone} gone"
    print(escape_control(line))
    newly_failed = set(failed) & set(new)
    for name in failed if len(failed) <= 5 else sorted(newly_failed):
        print(escape_control(f"  not indexed: {name}: {entries[name].error}"))
    if len(failed) > max(5, len(newly_failed)):
        print(f"  not indexed: {len(failed) - len(newly_failed)} that failed before and have not changed")


@torch.inference_mode()
def answer_query(query: str, encoder, features: Tensor, rows: list[tuple], cfg: Config) -> Answer:
    """Find the best videos for a query: at most cfg.top, with a score of at least cfg.threshold."""
    started = time.monotonic()
    text, num_tokens, max_tokens = encoder.encode_text(normalize_caption(query))
    require_finite(text[None], [query], "the model's feature of the query")
    scores = (features @ text.float()).cpu()
    require_finite(scores, rows, f"the score of the query {query!r} with the segment")
    best = top_videos(scores, rows, cfg.top)
    hits, notes = [hit for hit in best if hit.score >= cfg.threshold], []
    if num_tokens > max_tokens:
        notes.append(f"the query was cut: it has {num_tokens} tokens, the model reads {max_tokens}")
    if not hits:
        notes.append(f"no video has a score of at least {cfg.threshold:g}; the highest is {best[0].score:.3f}")
    return Answer(query, hits, "; ".join(notes), len(rows), time.monotonic() - started)


def main(cfg: Config) -> dict[str, list[Hit]]:
    """Update the index, then answer the queries and show the answers -> query: its hits, best first."""
    device = select_device(cfg.device)
    index = cfg.index or os.path.abspath(cfg.folder) + ".index.safetensors"
    check_output_paths(index, cfg.export)
    if cfg.html:
        search_page.check_page_path(cfg.html)
    if cfg.app:
        search_page.check_gradio()
    stamps = list_videos(cfg.folder)
    encoder = open_checkpoint(cfg.checkpoint)
    listener = search_page.listen(cfg.host, cfg.port) if cfg.app else None
    entries, metadata = update_index(cfg, index, stamps, encoder, device)

    indexed = {name: entry for name, entry in entries.items() if entry.segments}
    if not indexed:
        raise ValueError(f"{cfg.folder}: none of its {len(entries)} files could be indexed")
    if cfg.export:
        write_tensors(cfg.export, indexed, files=list(indexed), **metadata)
        print(escape_control(f"features written to {cfg.export}"))
    if not cfg.queries and not cfg.export and not cfg.app:
        print(escape_control(f'to search: python search.py {cfg.folder} "what to look for"'))
    features = torch.cat([entry.features for entry in indexed.values()]).to(device)         # (n, E)
    rows = [(name, *segment, len(entry.segments)) for name, entry in indexed.items() for segment in entry.segments]

    answers = []
    for query in cfg.queries:
        answers.append(answer_query(query, encoder, features, rows, cfg))
        search_page.print_answer(answers[-1], cfg.folder)
    if cfg.html:
        search_page.write_page(cfg.html, cfg.folder, answers)
        print(escape_control(f"page written to {cfg.html}"))
    if cfg.app:
        def answer(queries, top, threshold):
            changed = replace(cfg, queries=queries, top=top, threshold=threshold)           # which checks them
            return [answer_query(query, encoder, features, rows, changed) for query in queries]

        app = search_page.make_app(cfg.folder, list(indexed), answer, cfg.queries, cfg.top, cfg.threshold)
        search_page.serve_app(app, listener)
    return {answer.query: answer.hits for answer in answers}


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # what the terminal's encoding lacks
    run_cli("search.py", lambda: main(tyro.cli(Config, prog="python search.py")))
