"""
Video file -> frames (T, 3, H, W) uint8 -> crops (T, 3, s, s); the frame cache; the two image resizes; patches.

If codec and container allow it, only the packets that the requested frames depend on are decoded. For an intact file
the result equals that of a full decode bit for bit. Only the first video stream of a file is read; an image is a video
of one frame.
"""

import hashlib
import json
import os
from bisect import bisect
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from itertools import dropwhile
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor

from runtime import atomic_write, atomic_write_text, format_error, parallel_map

# ---------------------------------------------------------------------------------------------------------------------
# Which frames, and decoding them

def sample_frame_indices(count: int, total: int, strategy: str = "middle",
                         rng: np.random.Generator | None = None) -> np.ndarray:
    """
    Return (count,) ascending indices into `total` frames, one from each of `count` equal segments: the segment's
    middle frame (strategy "middle") or a random one (strategy "random"). If there are fewer frames than `count`, all
    are taken and the last is repeated, as in UMT.
    """
    if count < 1 or total < 1:
        raise ValueError(f"count and total must be at least 1, got {count} of {total} frames")
    edges = np.arange(count + 1) * total // count
    if total < count:
        return np.minimum(np.arange(count), total - 1)
    if strategy == "middle":
        return (edges[:-1] + edges[1:] - 1) // 2                            # (count,)
    if strategy == "random":
        return rng.integers(edges[:-1], edges[1:])                          # (count,)
    raise ValueError(f"strategy must be 'middle' or 'random', got {strategy!r}")


def num_frames_within(times: np.ndarray, seconds: float) -> int:
    """Count the frames in the first `seconds` of the video, at least one. If `seconds` is 0, count all frames."""
    return min(len(times), max(1, int((times < seconds).sum()))) if seconds else len(times)


def read_frames(path: str, num_frames: int, strategy: str = "middle", rng: np.random.Generator | None = None,
                seconds: float = 0) -> Tensor:
    """
    Read num_frames frames of a video, or all if num_frames is 0 -> (T, 3, H, W) uint8.

    seconds: use only this many from the start; 0: all.

    For an intact file the frames equal those of a full decode bit for bit. A frame that fails to decode is replaced by
    the previous good one; more than 10 % such frames in the file are an error. Damage in parts that are not decoded
    goes unnoticed, so whether a damaged file is accepted can depend on the requested frames.
    """
    def select(times):
        total = num_frames_within(times, seconds)
        return sample_frame_indices(num_frames or total, total, strategy, rng)

    return decode_frames(path, select, None)


def decode_frames(path: str, select, size: int | None) -> Tensor:
    """Decode the frames that `select` chooses (see iter_frames) -> (T, 3, H, W) uint8."""
    images = [frame_to_tensor(frame, size) for frame in iter_frames(path, select)]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{path}: the frame size changes within the video")
    return torch.stack(images)                                              # (T, 3, H, W)


def iter_frames(path: str, select):
    """
    Yield the frames of a video that `select` chooses, each as soon as it is decoded; none is kept.

    select(times (n,), seconds since the first frame) -> ascending frame indices, repeats allowed.

    Each frame is decoded from the keyframe before it. If that fails for one of them, the file is decoded from its
    start; then a missing frame is replaced by the one before it, and too many missing frames raise at the end.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        container, stream = open_video(path)
        with container:
            pts, seconds, packets = frame_timestamps(container, stream)
            indices, num_yielded = select(seconds), 0
            for index, frame in iter_frames_seeking(container, stream, pts, packets, sorted(set(indices))):
                while num_yielded < len(indices) and indices[num_yielded] == index:
                    yield frame
                    num_yielded += 1
        if num_yielded == len(indices):
            return
        num_missing, previous = len(pts), None
        for index, frame in iter_frames_sequential(path, pts):
            while num_yielded < len(indices) and indices[num_yielded] <= index:
                # If the requested frame is missing, the previous one replaces it.
                yield frame if indices[num_yielded] == index else previous or frame
                num_yielded += 1
            num_missing, previous = num_missing - 1, frame
            if num_yielded == len(indices) and index + 1 == len(pts) - num_missing:     # none missing so far: done
                return
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:                      # libraries raise other types too on corrupt bytes
        raise ValueError(f"{path}: {type(error).__name__}: {format_error(error)}") from error
    if 10 * num_missing > len(pts):
        raise ValueError(f"{path}: {num_missing} of {len(pts)} frames do not decode")
    for _ in indices[num_yielded:]:
        yield previous


def open_video(path: str):
    """Open a file -> (container, its first video stream). ValueError if it has none or its codec is unknown."""
    container = av.open(path, metadata_errors="ignore")                     # a title need not be UTF-8
    if not container.streams.video:
        container.close()
        raise ValueError("has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise ValueError("the codec of the video stream is unknown")
    stream.codec_context.thread_count = 1                                   # loader processes run in parallel
    return container, stream


class Packet(NamedTuple):
    """The header of a compressed packet; the data is read again when it is decoded."""
    pts: int | None
    dts: int | None
    size: int
    is_keyframe: bool      # decoding can start here
    discard: bool          # decoded but not shown, because of an edit list
    corrupt: bool


def frame_timestamps(container, stream) -> tuple[list[int | None], np.ndarray, list[Packet]]:
    """
    Read all packet headers -> (presentation timestamps of the n frames, ascending, None if unknown; (n,) seconds since
    the first frame; the packets in file order). The frames are counted here because the count in the file's header
    can be wrong.
    """
    packets = [Packet(p.pts, p.dts, p.size, p.is_keyframe, p.is_discard, p.is_corrupt)
               for p in container.demux(stream) if p.size]
    shown = [packet.pts for packet in packets if not packet.discard]
    pts, count = set(shown) - {None}, len(shown)
    # AVI has no presentation times, and libav's guesses are wrong if B-frames are packed into one packet.
    if container.format.name == "avi" or len(pts) < count:
        pts = set()
    if any(packet.corrupt for packet in packets if not packet.discard):     # the file ends inside a packet, and the
        count = max(count, stream.frames)                                   # rest of its index is missing
        if count > os.path.getsize(container.name):
            raise ValueError(f"the header claims {count} frames, more than the file has bytes")
        if 10 * (count - len(shown)) > count:
            raise ValueError(f"{count - len(shown)} of {count} frames do not decode")
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    known = sorted(pts)
    seconds = (np.array(known, float) - (known[0] if known else 0)) * float(stream.time_base or 1 / rate)
    num_unknown = count - len(known)
    rest = (seconds[-1] if known else -1 / rate) + np.arange(1, num_unknown + 1) / rate
    return known + [None] * num_unknown, np.concatenate([seconds, rest]), packets


# Decoders, by libav's names, that can start at a keyframe; and those for which non-reference frames can be skipped one
# by one without changing other frames. (HEVC is not among the latter: frames of a higher layer may refer to them.)
KEYFRAME_SEEKABLE = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg1video", "mpeg2video"}
NONREF_SKIPPABLE = {"h264", "mpeg4", "mpeg1video", "mpeg2video"}


def iter_frames_seeking(container, stream, pts: list[int | None], packets: list[Packet], indices: list[int]):
    """
    Yield (index, frame) for ascending frame indices, each decoded from the keyframe before it. Stops before the first
    frame that might differ from a full decode.
    """
    if stream.codec_context.name not in KEYFRAME_SEEKABLE or None in (chosen := {pts[i] for i in indices}):
        return
    packet_of_pts = {packet.pts: i for i, packet in enumerate(packets) if not packet.discard}
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts is not None]
    last_packet, frames = -1, None
    for index in indices:
        k = bisect(keyframes, packet_of_pts[pts[index]])
        while k and packets[keyframes[k - 1]].pts > pts[index]:             # shown before the keyframe, stored after it
            k -= 1
        key = keyframes[k - 1] if k else 0
        if frames is None or key > last_packet + 1:
            frames = decode_from_keyframe(container, stream, packets, key, packet_of_pts, chosen)
        try:
            last_packet, frame = next(item for item in frames if item[1].pts >= pts[index])
        except (StopIteration, av.FFmpegError):
            return
        if frame.pts > pts[index]:
            return
        yield index, frame


def decode_from_keyframe(container, stream, packets: list[Packet], key: int, packet_of_pts: dict[int, int],
                         chosen: set[int]):
    """
    Decode from keyframe packet `key`; yield (packet index, frame) in presentation order. Non-reference frames are
    decoded only if their pts is in `chosen`. Stops if the stream or a frame differs from the packet list. Frames shown
    before the keyframe may refer to frames before it, so they are left out.
    """
    context, first_pts, started = stream.codec_context, packets[key].pts, key == 0
    matches = lambda packet, i: i < len(packets) and (packet.pts, packet.size) == (packets[i].pts, packets[i].size)
    container.seek((first_pts or 0) if packets[key].dts is None else packets[key].dts, stream=stream)
    stored = dropwhile(lambda packet: not matches(packet, key), container.demux(stream))
    for i, packet in enumerate(stored, key):
        if packet.size and not matches(packet, i):
            return
        if context.name in NONREF_SKIPPABLE:
            context.skip_frame = "DEFAULT" if i == key or packet.pts in chosen else "NONREF"
        for frame in packet.decode():
            if frame.pts not in packet_of_pts:
                return
            started |= frame.pts == first_pts
            if started:
                yield i, frame
            elif frame.pts > first_pts:                                     # the packet was not really a keyframe
                return


def iter_frames_sequential(path: str, pts: list[int | None]):
    """Decode the whole file; yield (index in presentation order, frame) of each frame that decodes, in that order."""
    index_of_pts = {time: i for i, time in enumerate(pts) if time is not None}
    index = -1
    container, stream = open_video(path)
    with container:
        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    index = max(index + 1, index_of_pts.get(frame.pts, 0))
                    yield index, frame
            except av.FFmpegError:
                index += not index_of_pts                                   # without times a lost frame is counted


def write_video(path: str, frames: np.ndarray, fps: int = 8, **options: str):
    """Write frames (T, H, W, 3) uint8 to an H.264 file, on one thread. options: those of libx264."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Images

def frame_to_tensor(frame: av.VideoFrame, size: int | None) -> Tensor:
    """Convert a frame -> (3, H, W) uint8, rotated upright, short side at most `size`."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    image = image.rot90(round(frame.rotation / 90), (1, 2)).contiguous()
    H, W = image.shape[1:]
    if size and min(H, W) > size:
        image = resize(image[None], (round(H * size / min(H, W)), round(W * size / min(H, W))))[0]
    return image


def resize(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """
    frames (T, 3, H, W) uint8 -> (T, 3, h, w) uint8, antialiased bicubic.

    The student's resize, torchvision's default since 0.17. Unlike resize_like_pillow it rounds to whole grey levels
    only once, after both axes.
    """
    if frames.shape[2:] == tuple(shape):
        return frames
    frames = frames.to(torch.float32, memory_format=torch.contiguous_format)
    # In uint8, torch would also round and clamp between the two axes (and fail on some one-pixel outputs).
    return nnf.interpolate(frames, shape, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


RESAMPLE_MODES = {2: "bilinear", 3: "bicubic"}      # Pillow's numbers, as in preprocessor_config.json


def resize_like_pillow(frames: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """
    frames (..., 3, H, W) in grey levels -> (..., 3, *size) fp32 in grey levels, antialiased; mode: a RESAMPLE_MODES.

    The teacher's resize: SigLIP's image processor uses Pillow. Unlike resize it works in two passes, first along the
    width, then along the height, and each pass rounds to whole grey levels from 0 to 255. That is Pillow before 13;
    Pillow 13 starts with the height if a frame loses much of it.
    """
    *lead, H, W = frames.shape
    if (H, W) == tuple(size):
        return frames
    x = frames.reshape(-1, 3, H, W).float()
    for shape in ((H, size[1]), tuple(size)):
        x = nnf.interpolate(x, shape, mode=mode, align_corners=False, antialias=True).round_().clamp_(0, 255)
    return x.view(*lead, *size)


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """
    Cut pixels (F, 3, H, W) into patches (F, N, 3 * patch_size^2) in raster order, each flattened like the weight of a
    convolution (channel, row, column).
    """
    F, c, H, W = pixels.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"frame size must be a multiple of patch_size, got {H} x {W} and {p}")
    x = pixels.view(F, c, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(F, (H // p) * (W // p), c * p * p)


def eval_transform(frames: Tensor, size: int) -> Tensor:
    """(T, 3, H, W) uint8 -> (T, 3, size, size): the whole frame, whatever its aspect ratio, as in UMT."""
    return resize(frames, (size, size))


def train_transform(frames: Tensor, size: int, min_crop_scale: float, hflip: bool, rng: np.random.Generator,
                    resize_on_device: bool = False) -> Tensor:
    """
    (T, 3, H, W) uint8 -> (T, 3, size, size): the same random crop and flip for all frames. The crop has at least
    min_crop_scale of the area and an aspect ratio from 3/4 to 4/3.

    resize_on_device: return the crop (T, 3, h, w) for the device to resize, unless it has more than 4 size^2 pixels and
    would cost too much to copy.
    """
    H, W = frames.shape[2:]
    if min_crop_scale < 1:
        for _ in range(10):
            area, ratio = H * W * rng.uniform(min_crop_scale, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 1 <= h <= H and 1 <= w <= W:
                break
        else:                                       # the frame is too long: take the largest crop of an allowed ratio
            h, w = min(H, round(W * 4 / 3)), min(W, round(H * 4 / 3))
        y, x = rng.integers(H - h + 1), rng.integers(W - w + 1)
        frames = frames[:, :, y:y + h, x:x + w]
    if hflip and rng.random() < 0.5:
        frames = frames.flip(-1)
    h, w = frames.shape[2:]
    return frames if resize_on_device and h * w <= 4 * size ** 2 else resize(frames, (size, size))


# ---------------------------------------------------------------------------------------------------------------------
# The frame cache

class JpegFrames:
    """n JPEG files stored one after the other: frames[indices (T,)] -> (T, 3, h, w) uint8."""

    def __init__(self, data: np.ndarray, sizes: list[int]):
        self.data, self.ends = data, np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, indices: Sequence[int]) -> np.ndarray:
        files = [self.data[self.ends[i]:self.ends[i + 1]].tobytes() for i in indices]
        return np.stack([np.asarray(Image.open(BytesIO(file))).transpose(2, 0, 1) for file in files])


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """(3, h, w) uint8 -> the bytes of a JPEG file."""
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "JPEG", quality=quality)
    return file.getvalue()


class FrameCache:
    """
    Decoded frames of many videos in one memory-mapped file. cache[video path] -> (n, 3, h, w) uint8 array, a view and
    not a copy, or JpegFrames. ValueError, with the reason, if the video could not be read.
    """

    def __init__(self, path: str):
        self.path = path                            # without .bin and .json
        with open(path + ".json") as f:
            # (video, offset, shape), (video, offset, [sizes of the JPEGs]), or (video, None, why it is unreadable)
            self.index = json.load(f)
        self.entries = {video: (offset, shape) for video, offset, shape in self.index}
        self.data = np.memmap(path + ".bin", np.uint8, mode="r")

    def __getitem__(self, video: str) -> "np.ndarray | JpegFrames":
        offset, shape = self.entries[video]
        if offset is None:
            raise ValueError(shape)
        if isinstance(shape[0], list):
            return JpegFrames(self.data[offset:offset + sum(shape[0])], shape[0])
        return self.data[offset:offset + np.prod(shape)].reshape(shape)

    def __reduce__(self):                           # another process opens the file instead of receiving the pixels
        return FrameCache, (self.path,)


CACHE_VERSION = 3           # raise it if the decoded frames or the file format change


def build_frame_cache(rows: Sequence, cfg, folder: str) -> FrameCache:
    """
    Return the cache of the videos of all rows, in folder/frames_HASH.{bin,json}. If it is not there, decode the videos
    into it on all cores. The hash covers the settings and the size and time of each video file, so changed videos get
    a new cache. If several processes share the folder, one of them should call this first.

    rows have .video and .source; cfg is a data.DataConfig. ValueError, naming the first unreadable video, if their
    share is above cfg.max_unreadable.
    """
    sources = {}                                    # video path -> source of its first row
    for row in rows:
        sources.setdefault(row.video, row.source)
    size = cfg.cache_image_size or cfg.image_size
    stats = [os.stat(video) if os.path.isfile(video) else None for video in sources]
    settings = [CACHE_VERSION, cfg.cache_frames, size, float(cfg.max_seconds), cfg.cache_jpeg_quality]
    key = [*settings, [(v, *((s.st_size, s.st_mtime_ns) if s else ())) for v, s in zip(sources, stats, strict=True)]]
    path = os.path.join(folder, "frames_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest())

    def check(index):
        unreadable = [(video, reason) for video, offset, reason in index if offset is None]
        if len(unreadable) > min(cfg.max_unreadable * len(index), len(index) - 1):
            video, reason = unreadable[0]
            raise ValueError(f"{sources[video]}: {reason} ({len(unreadable)} of {len(index)} videos cannot be read, "
                             f"data.max_unreadable is {cfg.max_unreadable:g})")

    if os.path.exists(path + ".json"):
        cache = FrameCache(path)
        check(cache.index)
        return cache
    index, offset = [], 0
    try:
        with atomic_write(path + ".bin") as f:
            read = partial(_read_for_cache, cfg.cache_frames, size, cfg.max_seconds, cfg.cache_jpeg_quality)
            for video, frames in zip(sources, parallel_map(read, list(sources), "decoding"), strict=True):
                if isinstance(frames, str):
                    index.append((video, None, frames))
                    continue
                is_jpeg = isinstance(frames, list)
                index.append((video, offset, [[*map(len, frames)]] if is_jpeg else frames.shape))
                offset += f.write(b"".join(frames) if is_jpeg else frames.data)
            check(index)
    except OSError as error:
        raise ValueError(f"{folder}: the frame cache cannot be written ({error.strerror}); "
                         "pass --data.no-frame-cache") from None
    atomic_write_text(path + ".json", json.dumps(index))        # last: it marks the .bin file as complete
    return FrameCache(path)


def _read_for_cache(count: int, size: int, seconds: float, quality: int, video: str) -> np.ndarray | list[bytes] | str:
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
