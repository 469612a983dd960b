"""
Video -> frames (T, 3, H, W) uint8 -> crops (T, 3, s, s); the two image resizes; patches.

If codec and container allow it, only the packets that the requested frames depend on are decoded. For an intact file
the result equals that of a full decode bit for bit. If the packets do not tell which frames the decoder shows, the
whole file is decoded. Of several video streams the best one is read, as ffmpeg does; an image is a video of one frame.
"""

import os
from bisect import bisect
from io import BytesIO
from itertools import accumulate, dropwhile, islice, pairwise
from operator import attrgetter
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor

from files import format_error
from media import Media, as_media

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
    """
    Count the frames that end within the first `seconds` of the video, at least one. If `seconds` is 0, count all.

    At a constant rate these are UMT's int(seconds * rate) frames.
    """
    if not seconds or not len(times):
        return len(times)
    mean_length = (times[-1] - times[0]) / max(1, len(times) - 1)
    ends = np.append(times[1:], times[-1] + mean_length)
    return max(1, int((ends <= seconds + 1.2e-3).sum()))                    # start and end can be rounded to 1 ms


def frames_of_clip(times: np.ndarray, start: float, end: float) -> tuple[int, int]:
    """
    Return (first, stop): the frames with start <= time < end, to a microsecond, libav's unit. If no frame begins there,
    it is the one that is shown at `start`. ValueError if the clip begins behind the end of the video, which of an image
    and of a video of one frame is not known.
    """
    first, stop = np.searchsorted(times.round(6), (round(start, 6), round(end, 6))).tolist()
    if first < stop:
        return first, stop
    duration = times[-1] + times[-1] / max(1, len(times) - 1)               # the last frame has the mean length
    if start >= duration and len(times) > 1:
        raise ValueError(f"the clip must begin before the end of the video, got a start of {start:g} s in a video of "
                         f"{duration:g} s")
    shown = max(0, first - 1)
    return shown, shown + 1


def read_frames(path: str | Media, num_frames: int, strategy: str = "middle", rng: np.random.Generator | None = None,
                seconds: float = 0) -> Tensor:
    """
    Read num_frames frames of a video, or all if num_frames is 0 -> (T, 3, H, W) uint8.

    seconds: use only this many from the start, or from the start of the clip; 0: all.

    For an intact file the frames equal those of a full decode bit for bit. A frame that fails to decode is replaced by
    the previous good one; more than 10 % such frames in the file are an error. Damage in parts that are not decoded
    goes unnoticed, so whether a damaged file is accepted can depend on the requested frames.
    """
    def select(times):
        total = num_frames_within(times, seconds)
        return sample_frame_indices(num_frames or total, total, strategy, rng)

    return decode_frames(path, select, None)


MAX_PIXELS = 89_478_485     # of a frame: where Pillow warns of a decompression bomb; 8K video has 33 million
MAX_FRAMES = 2 ** 24        # of a file: three days at 60 a second
MAX_BYTES = 2 ** 33         # of the frames that are decoded into memory at once


def decode_frames(path: str | Media, select, size: int | None) -> Tensor:
    """Decode the frames that `select` chooses (see iter_frames) -> (T, 3, H, W) uint8."""
    images, indices, turn = [], [], None

    def choose(times):
        indices.extend(select(times))
        return indices

    for frame in iter_frames(path, choose):
        turn = turn or display_turn(frame)
        images.append(frame_to_tensor(frame, size, turn))
        if len(indices) * images[0].nbytes > MAX_BYTES:
            raise ValueError(f"{as_media(path).name}: decoded frames may take {MAX_BYTES} bytes of memory (got "
                             f"{len(indices)} frames of {images[0].nbytes})")
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{as_media(path).name}: the frame size changes within the video")
    return torch.stack(images)                                              # (T, 3, H, W)


def iter_frames(path: str | Media, select):
    """
    Yield the frames of a video that `select` chooses, each as soon as it is decoded; none is kept.

    select(times (n,), seconds since the first frame) -> ascending frame indices, repeats allowed. In a clip of a video
    it is given the frames of the clip, with the seconds since the start of the clip.

    Each frame is decoded from the keyframe before it. If that fails for one of them, the file is decoded from its
    start; then a missing frame is replaced by the one before it, and too many missing frames raise at the end.
    """
    media = as_media(path)
    if not os.path.isfile(media.path):
        raise FileNotFoundError(f"{media.path}: no such file")
    try:
        container, stream = open_video(media)
        with container:
            pts, seconds, packets = frame_timestamps(container, stream)
            first, stop = frames_of_clip(seconds, media.start, media.end) if len(seconds) else (0, 0)
            indices = [first + i for i in select(seconds[first:stop] - media.start)]
            num_yielded = 0
            for index, frame in iter_frames_seeking(container, stream, pts, packets, sorted(set(indices))):
                while num_yielded < len(indices) and indices[num_yielded] == index:
                    yield frame
                    num_yielded += 1
        if num_yielded == len(indices):
            return
        num_missing, previous = len(pts), None
        for index, frame in iter_frames_sequential(media, pts):
            while num_yielded < len(indices) and indices[num_yielded] <= index:
                # If the requested frame is missing, the previous one replaces it.
                yield frame if indices[num_yielded] == index else previous or frame
                num_yielded += 1
            num_missing, previous = num_missing - 1, frame
            if num_yielded == len(indices) and index + 1 == len(pts) - num_missing:     # none missing so far: done
                return
        check_missing(num_missing, len(pts))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{media.name}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:                      # libraries raise other types too on corrupt bytes
        raise ValueError(f"{media.name}: {type(error).__name__}: {format_error(error)}") from error
    for _ in indices[num_yielded:]:
        yield previous


def check_missing(num_missing: int, count: int):
    """ValueError if more than a tenth of the frames are missing."""
    if 10 * num_missing > count:
        raise ValueError(f"{num_missing} of {count} frames do not decode")


# The formats that are read, by libav's names. Playlists and other formats that name further files, text and drawings
# are not among them. image2 is the format of a JPEG that ends early.
FORMATS = ("mov matroska avi mpegts mpeg mpegvideo flv asf ogg rm mxf dv nut ivf wtv yuv4mpegpipe h264 hevc m4v mjpeg "
           "av1 obu gif apng image2 jpeg_pipe png_pipe webp_pipe bmp_pipe tiff_pipe ppm_pipe pgm_pipe pbm_pipe "
           "jpegxl_pipe j2k_pipe").split()
OPTIONS = {
    "format_whitelist": ",".join(FORMATS),
    "protocol_whitelist": "file",
    "pattern_type": "none",                         # image2: % and * in a file name mean themselves
    "max_pixels": str(MAX_PIXELS),
}


def open_video(path: str | Media):
    """
    Open a file -> (container, its best video stream). ValueError if it has none, if its format is not one of FORMATS,
    if its codec is unknown, or if its frames are too large.
    """
    media = as_media(path)
    options = OPTIONS | {"protocol_whitelist": "file,subfile"} if media.member else OPTIONS
    try:
        container = av.open(media.url, options=options, metadata_errors="ignore")           # a title need not be UTF-8
    except av.error.ArgumentError:
        raise ValueError("is damaged, or in no format of videos or images that is read (video.FORMATS)") from None
    stream = container.streams.best("video")
    context, reason = stream and stream.codec_context, None
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        reason = "has no video stream"
    elif context is None:
        reason = "the codec of the video stream is unknown"
    # libav leaves the size of a picture open if it is above max_pixels.
    elif context.width * context.height > MAX_PIXELS or is_image(container) and not context.width:
        reason = f"frames must have at most {MAX_PIXELS} pixels (got {context.width} x {context.height}; 0: more)"
    if reason:
        container.close()
        raise ValueError(reason)
    context.options = {"max_pixels": OPTIONS["max_pixels"]}                 # the size can change later on
    context.thread_count = 1                                                # loader processes run in parallel
    return container, stream


def is_image(container) -> bool:
    return container.format.name.endswith("_pipe") or container.format.name in ("image2", "gif")


class Packet(NamedTuple):
    """The header of a compressed packet; the data is read again when it is decoded."""
    pts: int | None
    dts: int | None
    size: int
    pos: int | None         # byte in the file
    is_keyframe: bool       # the container says that decoding can start here
    num_shown: int | None   # frames: 1; 0, decoded but not shown; None, only the decoder can tell
    is_corrupt: bool


def frame_timestamps(container, stream) -> tuple[list[int | None], np.ndarray, list[Packet]]:
    """
    Read all packet headers -> (presentation timestamps of the n frames, ascending, None if unknown; (n,) seconds since
    the first frame; the packets in file order). The frames are counted here because the count in the file's header
    can be wrong. If the packets do not tell the frames (see are_frames), the whole file is decoded to count them.
    """
    media, codec = Media.from_url(container.name), stream.codec_context.name
    num_shown = NUM_SHOWN.get(codec, lambda packet: 1)
    packets = [Packet(p.pts, p.dts, p.size, p.pos, p.is_keyframe, 0 if p.is_discard else num_shown(p), p.is_corrupt)
               for p in islice(container.demux(stream), MAX_FRAMES) if p.size]
    if len(packets) >= MAX_FRAMES - 1:
        raise ValueError(f"must have less than {MAX_FRAMES} frames")
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    time_base = float(stream.time_base or 1 / rate)
    if not are_frames(container, stream, packets):
        times = decode_timestamps(media, len(packets))
        return [None] * len(times), seconds_since_first(times, time_base, rate), packets
    shown, avi = [packet for packet in packets if packet.num_shown], container.format.name == "avi"
    count = len(shown)
    if any(packet.is_corrupt for packet in shown):                          # the file ends inside a packet, and the
        count = max(count, stream.frames)                                   # rest of its index is missing
        if count > media.num_bytes():
            raise ValueError(f"the header claims {count} frames, more than the file has bytes")
        check_missing(count - len(shown), count)
    # AVI has no presentation times; libav fills them in from the times at which packets are decoded.
    times = sorted(packet.dts if avi else packet.pts for packet in shown) + [None] * (count - len(shown))
    return [None] * count if avi else times, seconds_since_first(times, time_base, rate), packets


def seconds_since_first(times: list[int | None], time_base: float, rate: float) -> np.ndarray:
    """(n,) seconds since the first frame. Where times are unknown, or begin again, frames are 1 / rate apart."""
    steps = np.diff(np.array(times, float))                                 # in units of time_base; None becomes NaN
    steps[~(steps > 0)] = 1 / rate / time_base
    return np.concatenate([np.zeros(len(times[:1])), np.cumsum(steps)]) * time_base


# ---------------------------------------------------------------------------------------------------------------------
# Do packets tell the frames?

def num_shown_vp8(packet) -> int:
    """0 for a frame that others refer to and that is not shown itself (RFC 6386, section 9.1)."""
    return bytes(packet)[0] >> 4 & 1


def num_shown_vp9(packet) -> int:
    """A superframe shows one of its frames; a frame alone may be hidden (the VP9 specification, 6.2 and annex B)."""
    first, last = bytes(packet)[0], bytes(packet)[-1]
    first <<= first & 0x30 == 0x30                                          # profile 3 has one bit more
    return int(last & 0xE0 == 0xC0 or first & 8 or first & 2 != 0)          # show_existing_frame, show_frame


def num_shown_mpeg4(packet) -> int | None:
    """A tiny picture may be "not coded", and a packet of two pictures, in AVI, goes with an empty one later on."""
    data = bytes(packet)
    start = data.find(b"\0\0\1\xb6")
    return None if start < 0 or len(data) - start < 11 or b"\0\0\1\xb6" in data[start + 4:] else 1


def has_whole_image(data: bytes) -> bool | None:
    """Whether the image of a GIF packet is complete. None if there is none: a comment may be a packet of its own."""
    color_table = lambda flags: 3 * 2 ** (1 + flags % 8) if flags & 128 else 0
    try:
        place = 13 + color_table(data[10]) if data[:3] == b"GIF" else 0
        while (block := data[place:place + 1]) in (b"!", b","):             # an extension, an image
            place += 2 if block == b"!" else 11 + color_table(data[place + 9])
            while size := data[place]:                                      # its parts, the last of which is empty
                place += 1 + size
            if block == b",":
                return True
            place += 1
    except IndexError:
        return False
    return None


NUM_SHOWN = {"vp8": num_shown_vp8, "vp9": num_shown_vp9, "mpeg4": num_shown_mpeg4,
             "gif": lambda packet: int(has_whole_image(bytes(packet)) is not None)}

# Decoders, by libav's names, that can start at a keyframe; and those for which non-reference frames can be skipped one
# by one without changing other frames. (HEVC is not among the latter: frames of a higher layer may refer to them.)
KEYFRAME_SEEKABLE = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg1video", "mpeg2video"}
NONREF_SKIPPABLE = {"h264", "mpeg4", "mpeg1video", "mpeg2video"}
SEEKABLE_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"}
ONE_FRAME_A_PACKET = KEYFRAME_SEEKABLE | {"flv", "gif"}                     # besides codecs of keyframes alone


def are_frames(container, stream, packets: list[Packet]) -> bool:
    """
    Whether the frames that the decoder shows are known to be the packets with num_shown = 1, in the order of their
    presentation times: no packet is half a frame, none stands before the first keyframe or refers to frames before it,
    and times do not begin again.
    """
    context = stream.codec_context
    if not (context.name in ONE_FRAME_A_PACKET or context.codec.intra_only) or not packets:
        return False
    if container.format.name == "asf" or context.name == "h264" and not has_only_frames(context.extradata):
        return False
    if any(packet.num_shown is None for packet in packets):
        return False
    if not packets[0].is_keyframe and not begins_with_damage(container, context):
        return False
    dts = [packet.dts for packet in packets if packet.dts is not None]
    if any(b < a for a, b in pairwise(dts)):
        return False
    if container.format.name == "avi":
        return len(dts) == len(packets) and not context.has_b_frames
    pts = [packet.pts for packet in packets if packet.num_shown]
    if None in pts or len(set(pts)) < len(pts) or packets[0].num_shown and pts[0] > min(pts):
        return False
    known = [packet for packet in packets if packet.pts is not None]
    latest = accumulate((packet.pts for packet in known), max)              # no keyframe before an earlier packet
    return all(packet.pts == last or not packet.is_keyframe for packet, last in zip(known, latest, strict=True))


def begins_with_damage(container, context) -> bool:
    """
    Whether the first packet is a damaged keyframe, which libav does not recognise as one: the decoders of H.264, if its
    headers are known, and HEVC raise no error for an intact packet before the first keyframe.
    """
    if context.name not in ("h264", "hevc"):
        return False
    container, stream = open_video(Media.from_url(container.name))
    with container:
        try:
            next(packet for packet in container.demux(stream) if packet.size).decode()
        except av.FFmpegError:
            return True
    return False


def has_only_frames(extradata: bytes | None) -> bool:
    """
    Whether an H.264 stream has no field pictures: frame_mbs_only_flag of its sequence parameter set (ITU-T H.264,
    7.3.2.1.1). False if that is not easy to read.
    """
    extradata = extradata or b""
    start = 8 if extradata[:1] == b"\1" else extradata.find(b"\0\0\1") + 3  # in MP4 and its like, or in a stream
    data = extradata[start:].replace(b"\0\0\3", b"\0\0")
    bits, place = "".join(f"{byte:08b}" for byte in data[:512]), 32         # after type, profile, constraints, level

    def read(length: int) -> int:
        nonlocal place
        place += length
        return int(bits[place - length:place], 2)

    def golomb() -> int:
        nonlocal place
        zeros = bits.index("1", place) - place
        place += zeros
        return read(zeros + 1) - 1

    try:
        if data[0] & 31 != 7:
            return False
        golomb()                                                            # seq_parameter_set_id
        if data[1] in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            if golomb() == 3:                                               # chroma_format_idc
                read(1)
            golomb(), golomb(), read(1)                                     # bit depths, transform bypass
            if read(1):                                                     # scaling lists, which are long
                return False
        golomb()                                                            # log2_max_frame_num_minus4
        order = golomb()                                                    # pic_order_cnt_type
        if order == 0:
            golomb()
        elif order == 1:
            read(1), golomb(), golomb()
            for _ in range(golomb()):
                golomb()
        golomb(), read(1), golomb(), golomb()                               # references, gaps, width, height
        return read(1) == 1
    except (IndexError, ValueError):                                        # it ends early
        return False


def decode_timestamps(path: str | Media, num_packets: int) -> list[int | None]:
    """Decode the whole file -> a timestamp for each frame, in the order in which they are shown, or None."""
    times, num_lost = [], 0
    for frame in iter_decoded(path):
        times.append(frame and (frame.dts if frame.pts is None else frame.pts))
        num_lost += frame is None
    if num_lost == len(times):
        num_lost, times = num_packets, [None] * num_packets
    check_missing(num_lost, len(times))
    return times


def iter_frames_seeking(container, stream, pts: list[int | None], packets: list[Packet], indices: list[int]):
    """
    Yield (index, frame) for ascending frame indices, each decoded from the keyframe before it. Stops before the first
    frame that might differ from a full decode.
    """
    if stream.codec_context.name not in KEYFRAME_SEEKABLE or container.format.name not in SEEKABLE_FORMATS:
        return
    if None in (chosen := {pts[i] for i in indices}):
        return
    packet_of_pts = {packet.pts: i for i, packet in enumerate(packets) if packet.num_shown}
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
    decoded only if their pts is in `chosen`. Stops if the stream or a frame differs from the packet list, or if the
    decoder finds no keyframe there. Frames shown before the keyframe may refer to frames before it, so they are left
    out.
    """
    context, first_pts, started = stream.codec_context, packets[key].pts, key == 0
    identity = attrgetter("pts", "size", "pos")
    matches = lambda packet, i: i < len(packets) and identity(packet) == identity(packets[i])
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
            started |= frame.pts == first_pts and frame.key_frame
            if started:
                yield i, frame
            elif frame.pts >= first_pts:                                    # the packet was not really a keyframe
                return


def iter_frames_sequential(path: str | Media, pts: list[int | None]):
    """Decode the whole file; yield (index in presentation order, frame) of each frame that decodes, in that order."""
    index_of_pts = {time: i for i, time in enumerate(pts) if time is not None}
    index = -1
    for frame in iter_decoded(path):
        if frame is None:
            index += not index_of_pts                                       # without times a lost frame is counted
        else:
            index = max(index + 1, index_of_pts.get(frame.pts, 0))
            yield index, frame


def iter_decoded(path: str | Media):
    """
    Decode the whole file; yield its frames in the order in which they are shown, and None for each one that is lost,
    where it would be shown. Packets before the first keyframe cannot be decoded, and are not lost: the decoders of
    H.264, if its headers are known, and HEVC pass over them, while others raise errors.
    """
    container, stream = open_video(path)
    context = stream.codec_context
    orientation = exif_orientation(path) if is_image(container) else None
    begun, previous = context.name == "hevc" or context.name == "h264" and bool(context.extradata), None
    lost = []                                       # times of the lost frames that are not yet due
    with container:
        for packet in container.demux(stream):
            begun |= packet.is_keyframe
            try:
                if is_truncated(context.name, packet):
                    raise av.InvalidDataError(0, "truncated")
                for frame in packet.decode():
                    # At its end, a file of "not coded" pictures gives the last one again: the same memory.
                    if packet.size or previous is None or frame.planes[0].buffer_ptr != previous.planes[0].buffer_ptr:
                        later = [time for time in lost if is_later(time, frame.pts, previous and previous.pts)]
                        yield from [None] * (len(lost) - len(later))
                        lost, frame.opaque = later, orientation
                        yield frame
                    begun, previous = True, frame
            except av.FFmpegError:
                if begun:
                    lost.append(None if container.format.name == "avi" else packet.pts)     # in AVI libav guesses them
    yield from [None] * len(lost)


def is_later(lost: int | None, time: int | None, previous: int | None) -> bool:
    """Whether a lost frame would be shown after the frame at `time`, where times may be unknown or begin again."""
    return None not in (lost, time) and lost > time and not (previous is not None and previous > time)


def is_truncated(codec: str, packet) -> bool:
    """Whether a JPEG ends before its end marker, or a GIF within an image: libav makes up the rest."""
    if codec not in ("mjpeg", "gif") or not packet.size:
        return False
    data = bytes(packet)
    if codec == "gif":
        return has_whole_image(data) is False
    return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")                # end of image, start of scan


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

def frame_to_tensor(frame: av.VideoFrame, size: int | None, turn: tuple | None = None) -> Tensor:
    """Convert a frame -> (3, H, W) uint8, upright, short side at most `size`. turn: its display_turn, if known."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1)).permute(2, 0, 1)
    transposed, *flipped = turn or display_turn(frame)
    image = image.mT if transposed else image
    image = (image.flip([axis for axis in (1, 2) if flipped[axis - 1]]) if any(flipped) else image).contiguous()
    H, W = image.shape[1:]
    if size and min(H, W) > size:
        image = resize(image[None], (round(H * size / min(H, W)), round(W * size / min(H, W))))[0]
    return image


# EXIF orientation: (are rows and columns exchanged, is the result then turned upside down, and left to right)
EXIF_TURNS = {1: (0, 0, 0), 2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1),
              8: (1, 1, 0)}


def display_turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """
    Read how a video is to be shown from the display matrix of a frame -> a value like those of EXIF_TURNS; the angle is
    rounded to quarter turns. The matrix takes a point (x, y) to (a x + c y, b x + d y).
    """
    if frame.opaque:                                # an image's EXIF orientation
        return EXIF_TURNS[frame.opaque]
    try:                                            # from a tiny copy, since PyAV's side data keeps its frame alive
        matrix = frame.reformat(width=16, height=16, threads=1).side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] if matrix else (1, 0, 0, 0, 1)
    except ValueError:                              # side data that PyAV has no name for: it gives the angle alone
        return EXIF_TURNS[(1, 8, 3, 6)[round(frame.rotation / 90) % 4]]
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def exif_orientation(path: str | Media) -> int:
    """Read the EXIF orientation of an image, 1 to 8, with Pillow: PyAV gives its angle, but not whether it mirrors."""
    media = as_media(path)
    try:
        with open(media.path, "rb") as f:
            f.seek(media.offset)
            content = BytesIO(f.read(media.size)) if media.member else f
            image = Image.open(content)
            return value if (value := image.getexif().get(0x0112)) in EXIF_TURNS else 1
    except (OSError, ValueError, SyntaxError):      # a format that libav reads and Pillow does not; or damaged EXIF
        return 1


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


def gather_tokens(x: Tensor, ids: Tensor | None) -> Tensor:
    """
    Take the tokens with flat ids (B, S), or all if ids is None, from those of B clips: x (B, TN, C), or (BT, N, C) of
    their frames -> (B, S, C).
    """
    if ids is None:
        return x
    x = x.reshape(len(ids), -1, x.shape[-1])
    return x.gather(1, ids[..., None].expand(*ids.shape, x.shape[-1]))


def count_tokens(T: int, size: int, patch_size: int) -> int:
    """Return how many tokens T frames of size x size pixels have. ValueError unless the patches divide the size."""
    if size % patch_size:
        raise ValueError(f"the size of a frame must be a multiple of patch_size {patch_size}, got {size}")
    return T * (size // patch_size) ** 2


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
