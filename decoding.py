"""
Videos: files -> frames -> views. Only what the wanted frames need is decoded, and they are those of a whole decode.
"""

import os
from bisect import bisect
from collections.abc import Sequence
from io import BytesIO
from itertools import dropwhile
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor

from teacher import one_line

# ---------------------------------------------------------------------------------------------------------------------
# Which frames, and decoding them

def pick(count: int, total: int, sample: str = "middle", rng: np.random.Generator | None = None) -> np.ndarray:
    """
    `count` of `total` frames, one from each of `count` equal segments: its middle, or a random one of it. Of fewer
    frames than that all are taken and the last is repeated, as in UMT.
    """
    if count < 1 or total < 1:
        raise ValueError(f"has {total} frames, wanted {count}")
    edges = np.arange(count + 1) * total // count
    if total < count:
        return np.minimum(np.arange(count), total - 1)
    if sample == "middle":
        return (edges[:-1] + edges[1:] - 1) // 2                            # (count,)
    if sample == "random":
        return rng.integers(edges[:-1], edges[1:])                          # (count,)
    raise ValueError(f"wanted sample to be middle or random, got {sample!r}")


def first_frames(times: np.ndarray, seconds: float) -> int:
    """How many frames the first `seconds` have, at least one; 0: all."""
    return min(len(times), max(1, int((times < seconds).sum()))) if seconds else len(times)


def read_frames(path: str, num_frames: int, sample: str = "middle", rng: np.random.Generator | None = None,
                size: int | None = None, seconds: float = 0) -> Tensor:
    """
    -> (T, 3, H, W) uint8, T = num_frames, or all frames for num_frames = 0; short side at most `size`; of the first
    `seconds` alone, where that is not 0.

    Only what these frames need is decoded. Of an intact file they are those of a whole decode, bit for bit. One that
    does not decode shows the good one before it, as in a player, up to one in ten of the file. Damage that no wanted
    frame meets is not seen: whether a damaged file is accepted can depend on the frames asked for.
    """
    def choose(times):
        total = first_frames(times, seconds)
        return pick(num_frames or total, total, sample, rng)

    return decode(path, choose, size)


def decode(path: str, choose, size: int | None) -> Tensor:
    """As `chosen_frames` -> (T, 3, H, W) uint8."""
    pictures = [to_tensor(frame, size) for frame in chosen_frames(path, choose)]
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"{path}: changes its size on the way")
    return torch.stack(pictures)                                            # (T, 3, H, W)


def chosen_frames(path: str, choose):
    """
    choose(times (n,) of the frames, seconds from the first) -> ascending indices of those to hand on, as soon as they
    are decoded; none is kept.

    Each is decoded from the keyframe before it. Where that does not give one of them, the file is decoded from its
    start: a frame that is lost shows the one before it, and that too few of all decode is raised, at the end.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        container, stream = open_video(path)
        with container:
            times, seconds, packets = frame_times(container, stream)
            wanted, given = choose(seconds), 0
            for at, frame in frames_by_key(container, stream, times, packets, sorted(set(wanted))):
                while given < len(wanted) and wanted[given] == at:
                    yield frame
                    given += 1
        if given == len(wanted):
            return
        lost, last = len(times), None
        for at, frame in decoded_frames(path, times):
            while given < len(wanted) and wanted[given] <= at:              # lost: the one before stands in
                yield frame if wanted[given] == at else last or frame
                given += 1
            lost, last = lost - 1, frame
            if given == len(wanted) and at + 1 == len(times) - lost:        # up to here none was
                return
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:                      # whatever else a library makes of wrong bytes
        raise ValueError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    if 10 * lost > len(times):
        raise ValueError(f"{path}: {lost} of {len(times)} frames do not decode")
    for _ in wanted[given:]:
        yield last


def open_video(path: str):
    container = av.open(path, metadata_errors="ignore")                     # a title need not be UTF-8
    if not container.streams.video:
        container.close()
        raise ValueError("has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise ValueError("has video of no known codec")
    stream.codec_context.thread_count = 1                                   # loader processes are the parallelism
    return container, stream


class Packet(NamedTuple):
    pts: int | None
    dts: int | None
    size: int
    key: bool              # whether decoding can begin with it
    hidden: bool           # by an edit list: it is decoded, and not shown
    corrupt: bool


def frame_times(container, stream) -> tuple[list[int | None], np.ndarray, list[Packet]]:
    """
    Presentation times of the n frames, ascending, None for a frame whose time is not known; (n,) seconds from the
    first; the packets, in the order of the file. The times are read from these: what a header says about their number
    may be wrong.
    """
    packets = [Packet(p.pts, p.dts, p.size, p.is_keyframe, p.is_discard, p.is_corrupt)
               for p in container.demux(stream) if p.size]
    shown = [packet.pts for packet in packets if not packet.hidden]
    times, count = set(shown) - {None}, len(shown)
    # AVI has no presentation times, and libav's guesses are wrong where B-frames are packed into one packet.
    if container.format.name == "avi" or len(times) < count:
        times = set()
    if any(packet.corrupt for packet in packets if not packet.hidden):      # the file breaks off inside a packet:
        count = max(count, stream.frames)                                   # the rest of its index is lost
        if count > os.path.getsize(container.name):
            raise ValueError(f"says that it has {count} frames")
        if 10 * (count - len(shown)) > count:
            raise ValueError(f"{count - len(shown)} of {count} frames do not decode")
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    known = sorted(times)
    seconds = (np.array(known, float) - (known[0] if known else 0)) * float(stream.time_base or 1 / rate)
    rest = count - len(known)
    after = (seconds[-1] if known else -1 / rate) + np.arange(1, rest + 1) / rate
    return known + [None] * rest, np.concatenate([seconds, after]), packets


# Decoders, by libav's names, that begin anew with a keyframe; and those to which a frame that no other refers to can be
# left out, one by one, without a trace. (HEVC's may be referred to by frames of a higher layer.)
KEYED = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg1video", "mpeg2video"}
SKIMMED = {"h264", "mpeg4", "mpeg1video", "mpeg2video"}


def frames_by_key(container, stream, times: list[int | None], packets: list[Packet], wanted: list[int]):
    """
    (place, frame) of the wanted places, ascending, each decoded from the keyframe before it. Ends before the first that
    may not be the frame that a whole decode gives.
    """
    if stream.codec_context.name not in KEYED or None in (chosen := {times[i] for i in wanted}):
        return
    place = {packet.pts: i for i, packet in enumerate(packets) if not packet.hidden}
    keys = [i for i, packet in enumerate(packets) if packet.key and packet.pts is not None]
    at, frames = -1, None
    for i in wanted:
        k = bisect(keys, place[times[i]])
        while k and packets[keys[k - 1]].pts > times[i]:                    # stored after it, shown before it
            k -= 1
        key = keys[k - 1] if k else 0
        if frames is None or key > at + 1:
            frames = stretch(container, stream, packets, key, place, chosen)
        try:
            at, frame = next(found for found in frames if found[1].pts >= times[i])
        except (StopIteration, av.FFmpegError):
            return
        if frame.pts > times[i]:
            return
        yield i, frame


def stretch(container, stream, packets: list[Packet], key: int, place: dict[int, int], chosen: set[int]):
    """
    (packet that gave it, frame) from packet `key` on, in the order of presentation; of the frames that no other refers
    to only those with the chosen times. Ends where packets or frames are not those that were to come. What is shown
    before the keyframe may refer to what was before it, and is left out.
    """
    context, first, begun = stream.codec_context, packets[key].pts, key == 0
    same = lambda packet, i: i < len(packets) and (packet.pts, packet.size) == (packets[i].pts, packets[i].size)
    container.seek((first or 0) if packets[key].dts is None else packets[key].dts, stream=stream)
    for at, packet in enumerate(dropwhile(lambda packet: not same(packet, key), container.demux(stream)), key):
        if packet.size and not same(packet, at):
            return
        if context.name in SKIMMED:
            context.skip_frame = "DEFAULT" if at == key or packet.pts in chosen else "NONREF"
        for frame in packet.decode():
            if frame.pts not in place:
                return
            begun |= frame.pts == first
            if begun:
                yield at, frame
            elif frame.pts > first:                                         # it gave no frame: it was no keyframe
                return


def decoded_frames(path: str, times: list[int | None]):
    """(place in the presentation order, frame) of each frame that decodes, in that order."""
    place = {time: i for i, time in enumerate(times) if time is not None}
    at = -1
    container, stream = open_video(path)
    with container:
        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    at = max(at + 1, place.get(frame.pts, 0))
                    yield at, frame
            except av.FFmpegError:
                at += not place                                             # without times a lost frame is counted


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def to_tensor(frame: av.VideoFrame, size: int | None) -> Tensor:
    """-> (3, H, W) uint8, short side at most `size`."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    image = image.rot90(round(frame.rotation / 90), (1, 2)).contiguous()    # as it is to be shown
    H, W = image.shape[1:]
    if size and min(H, W) > size:
        image = resize(image[None], (round(H * size / min(H, W)), round(W * size / min(H, W))))[0]
    return image


def resize(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """(T, 3, H, W) uint8 -> (T, 3, h, w) uint8, bicubic, antialiased (torchvision's default since 0.17)."""
    if frames.shape[2:] == tuple(shape):
        return frames
    frames = frames.to(torch.float32, memory_format=torch.contiguous_format)
    # Not in uint8: torch would also round and clamp between the two axes (and fails on some one-pixel outputs).
    return nnf.interpolate(frames, shape, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


def test_view(frames: Tensor, size: int) -> Tensor:
    """(T, 3, H, W) -> (T, 3, S, S): the whole frame, whatever its shape, as in UMT."""
    return resize(frames, (size, size))


def train_view(frames: Tensor, size: int, scale: float, flip: bool, rng: np.random.Generator,
               on_device: bool = False) -> Tensor:
    """
    (T, 3, H, W) -> (T, 3, S, S): one crop a clip, of at least `scale` of the area and 3/4 to 4/3 in shape.

    on_device: it stays (T, 3, h, w), for the device to resize, but where that would be much more to send.
    """
    H, W = frames.shape[2:]
    if scale < 1:
        for _ in range(10):
            area, ratio = H * W * rng.uniform(scale, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 1 <= h <= H and 1 <= w <= W:
                break
        else:                                                               # a long frame: as much as the shape allows
            h, w = min(H, round(W * 4 / 3)), min(W, round(H * 4 / 3))
        y, x = rng.integers(H - h + 1), rng.integers(W - w + 1)
        frames = frames[:, :, y:y + h, x:x + w]
    if flip and rng.random() < 0.5:
        frames = frames.flip(-1)
    h, w = frames.shape[2:]
    return frames if on_device and h * w <= 4 * size ** 2 else resize(frames, (size, size))


class Jpegs:
    """n JPEGs one after the other: jpegs[places (T,)] -> (T, 3, h, w) uint8."""

    def __init__(self, data: np.ndarray, sizes: list[int]):
        self.data, self.ends = data, np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, places: Sequence[int]) -> np.ndarray:
        pictures = [self.data[self.ends[i]:self.ends[i + 1]].tobytes() for i in places]
        return np.stack([np.asarray(Image.open(BytesIO(one))).transpose(2, 0, 1) for one in pictures])


def to_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """(3, h, w) uint8 -> a file."""
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_video(path: str, frames: np.ndarray, codec: str = "libx264", fps: int = 8, **options: str):
    """frames (T, H, W, 3) uint8 -> a video file, one thread."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
