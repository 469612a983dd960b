"""
Decoded frames of many videos in one memory-mapped file, so that each video is decoded once.

    frames_HASH.bin     of each video: a table (n, 2) with size and CRC-32 of each of its n frames, then the frames
    frames_HASH.json    of each video: the place of its table, or the reason why it cannot be read; with a checksum

A frame is a raw (3, h, w) uint8 array or a JPEG. It is verified whenever it is read, and only then, so that a large
cache opens at once. Its CRC-32 starts from the name of the cache and the frame's place: bytes that are intact but
belong elsewhere are detected too.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import BinaryIO

import numpy as np
from PIL import Image

from files import WriteError, atomic_write, read_json, write_json
from media import Media
from runtime import parallel_map
from video import decode_frames, num_frames_within, sample_frame_indices

CACHE_VERSION = 5           # raise it if the decoded frames or the file format change


class DamagedCacheError(ValueError):
    """The files of a cache are damaged. The videos may well be readable, so none is to be skipped."""


class FrameCache:
    """
    cache[Media.name] -> CachedFrames. ValueError, with the reason, if the video could not be read; DamagedCacheError
    if the files are not as they were written.
    """

    def __init__(self, path: str):
        self.path = path                            # without .bin and .json
        try:
            # (video, offset, (n, 3, h, w), or (n,) of JPEGs), or (video, None, why it is unreadable)
            index = read_json(path + ".json")
        except ValueError:
            raise self.damaged(f"{path}.json is damaged: it is no JSON with the right checksum") from None
        size = os.path.getsize(path + ".bin") if os.path.isfile(path + ".bin") else 0
        if index.keys() != {"size", "videos"}:      # the name of the checksum is damaged
            raise self.damaged(f"{path}.json is damaged: it must have size, videos and a checksum, got {[*index]}")
        if index["size"] != size:
            raise self.damaged(f"{path}.bin is damaged: it must have {index['size']} bytes, got {size}")
        self.index = index["videos"]
        self.entries = {video: (offset, shape) for video, offset, shape in self.index}
        self.data = np.asarray(np.memmap(path + ".bin", np.uint8, mode="r"))     # slices of a memmap are slow to make

    def __getitem__(self, video: str) -> "CachedFrames":
        offset, shape = self.entries[video]
        if offset is None:
            raise ValueError(shape)
        return CachedFrames(self, video, offset, shape)

    def __reduce__(self):                           # another process opens the file instead of receiving the pixels
        return FrameCache, (self.path,)

    def damaged(self, reason: str) -> DamagedCacheError:
        return DamagedCacheError(f"{reason}. Delete {self.path}.bin and {self.path}.json; they are made again")


class CachedFrames:
    """The n frames of a video in a cache: frames[indices (T,)] -> (T, 3, h, w) uint8, a copy."""

    def __init__(self, cache: FrameCache, video: str, offset: int, shape: Sequence[int]):
        n, *self.shape = shape                      # (3, h, w), or () of JPEGs
        self.cache, self.video = cache, video
        table = np.frombuffer(cache.data, "<u4", 2 * n, offset).reshape(n, 2)
        self.checksums = table[:, 1]
        self.ends = np.cumsum([offset + table.nbytes, *table[:, 0]], dtype=np.int64)        # (n + 1,)

    def __len__(self) -> int:
        return len(self.checksums)

    def __getitem__(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self.read(i) for i in indices])

    def read(self, i: int) -> np.ndarray:
        """Read frame i (3, h, w). DamagedCacheError if its checksum is wrong."""
        start, end = self.ends[i], self.ends[i + 1]
        frame = self.cache.data[start:end]
        if hash_frame(frame, self.cache.path, start, end) != self.checksums[i]:
            raise self.cache.damaged(f"{self.cache.path}.bin is damaged: the checksum of frame {i} of {self.video} is "
                                     "wrong")
        if self.shape:
            return frame.reshape(self.shape)
        return np.asarray(Image.open(BytesIO(frame))).transpose(2, 0, 1)


def hash_frame(frame: bytes | np.ndarray, path: str, start: int, end: int) -> int:
    """Compute the CRC-32 of the frame in bytes `start` ... `end` - 1 of a cache."""
    return zlib.crc32(frame, zlib.crc32(f"{os.path.basename(path)} {start} {end}".encode()))


def write_frames(file: BinaryIO, path: str, frames: Sequence[bytes] | np.ndarray):
    """Append the table of a video, and its frames: n JPEGs, or (n, 3, h, w) uint8."""
    table = np.array([[memoryview(frame).nbytes, 0] for frame in frames], "<u4")            # (n, 2)
    ends = np.cumsum([file.tell() + table.nbytes, *table[:, 0]], dtype=np.int64)            # (n + 1,)
    table[:, 1] = [hash_frame(frame, path, *place) for frame, place in zip(frames, pairwise(ends), strict=True)]
    file.writelines([table, *frames])


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """(3, h, w) uint8 -> the bytes of a JPEG file."""
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "JPEG", quality=quality)
    return file.getvalue()


def build_frame_cache(rows: Sequence, cfg, folder: str) -> FrameCache:
    """
    Return the cache of the videos of all rows, in folder/frames_HASH.{bin,json}. If it is not there, decode the videos
    into it on all cores. The hash covers the settings, the clips, and the size and time of each file, so changed videos
    or shards get a new cache. If several processes share the folder, one of them should call this first.

    rows have .media and .source; cfg is a data.DataConfig. ValueError, naming the first unreadable video, if their
    share is above cfg.max_unreadable.
    """
    sources = {}                                    # Media -> source of its first row
    for row in rows:
        sources.setdefault(row.media, row.source)
    size = cfg.cache_image_size or cfg.max_size
    stats = {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) if os.path.isfile(path) else ()
             for path in {media.path for media in sources}}
    settings = [CACHE_VERSION, cfg.cache_frames, size, float(cfg.max_seconds), cfg.cache_jpeg_quality]
    key = [*settings, [(media.name, *stats[media.path]) for media in sources]]
    path = os.path.join(folder, "frames_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest())

    def check(index):
        unreadable = [(source, reason) for source, (_, offset, reason) in zip(sources.values(), index, strict=True)
                      if offset is None]
        if len(unreadable) > min(cfg.max_unreadable * len(index), len(index) - 1):
            source, reason = unreadable[0]
            raise ValueError(f"{source}: {reason} ({len(unreadable)} of {len(index)} videos cannot be read, "
                             f"data.max_unreadable is {cfg.max_unreadable:g})")

    if os.path.exists(path + ".json"):
        cache = FrameCache(path)
        check(cache.index)
        return cache
    index = []
    read = partial(_read_for_cache, cfg.cache_frames, size, cfg.max_seconds, cfg.cache_jpeg_quality)
    try:
        with atomic_write(path + ".bin") as f:
            for media, frames in zip(sources, parallel_map(read, list(sources), "decoding"), strict=True):
                if isinstance(frames, str):
                    index.append((media.name, None, frames))
                    continue
                index.append((media.name, f.tell(), (len(frames),) if isinstance(frames, list) else frames.shape))
                write_frames(f, path, frames)
            check(index)
            num_bytes = f.tell()
        # Last: it marks the .bin file as complete.
        write_json(path + ".json", {"size": num_bytes, "videos": index}, indent=None)
    except WriteError as error:
        raise ValueError(f"{error}; pass --data.no-frame-cache to decode videos in each epoch") from None
    return FrameCache(path)


def _read_for_cache(count: int, size: int, seconds: float, quality: int,
                    video: Media) -> np.ndarray | list[bytes] | str:
    """
    Return `count` evenly spaced frames (n, 3, h, w), or n JPEGs if quality > 0. If the video is unreadable, return the
    reason: all unreadable videos are counted before the run stops.
    """
    def select(times):
        total = num_frames_within(times, seconds)
        return sample_frame_indices(min(count, total), total)

    try:
        frames = decode_frames(video, select, size).numpy()
        return [encode_jpeg(frame, quality) for frame in frames] if quality else frames
    except (ValueError, OSError) as error:
        return str(error)
