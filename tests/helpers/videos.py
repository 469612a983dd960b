"""Writers of test videos, intact, timed, turned and damaged, and how to tell which frames were read."""

from fractions import Fraction

import av
import numpy as np
import torch
from PIL import Image


def write_frames(path, frames, codec="libx264", pix_fmt="yuv420p", rate=10, pts=None, time_base=None, silence=0,
                 container=None, format=None, **options):
    """
    Write frames, an iterable of (H, W, 3) uint8, on one thread. pts: frame index -> timestamp, in units of time_base;
    silence: packets of silent audio beside them; container, options: libav's, of the container and the codec.
    """
    with av.open(str(path), "w", format=format, options=container or {}) as out:
        frames = iter(frames)
        first = next(frames, None)
        if first is not None:
            stream = out.add_stream(codec, rate=rate, options=options)
            (stream.height, stream.width), stream.pix_fmt = first.shape[:2], pix_fmt
            stream.codec_context.thread_count = 1
            if time_base:
                stream.codec_context.time_base = time_base
        if silence:
            sound = out.add_stream("aac", rate=16000, layout="mono")
        for i, image in enumerate([] if first is None else (first, *frames)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if pts:
                frame.pts = pts(i)
            if time_base:
                frame.time_base = time_base
            out.mux(stream.encode(frame))
        if first is not None:
            out.mux(stream.encode())
        for i in range(silence):
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            quiet.sample_rate, quiet.pts = 16000, 1024 * i
            out.mux(sound.encode(quiet))
        if silence:
            out.mux(sound.encode())
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Frame i is grey level 4 i + 20

def grey(n, shape):
    return (np.full((*shape, 3), 4 * i + 20, np.uint8) for i in range(n))


def write(path, n=50, codec="libx264", shape=(48, 64), audio=False, video=True, **options):
    """A video of n grey frames, whose numbers can be read from the pixels."""
    options = {"qmin": "1", "qmax": "1", **options} if codec == "mpeg4" else options
    return write_frames(path, grey(n if video else 0, shape), codec, silence=n if audio else 0, **options)


def timed(path, times):
    """A video of grey frames shown at these milliseconds."""
    return write_frames(path, grey(len(times), (32, 48)), pts=lambda i: times[i], time_base=Fraction(1, 1000))


def numbers(frames):
    """Which frames of `write` these are, by their grey level; all pixels of a frame must agree."""
    level = (frames.float() - 20) / 4                                       # (T, 3, H, W)
    assert (level - level.mean((1, 2, 3), keepdim=True)).abs().max() < 0.9
    return level.mean((1, 2, 3)).round().int().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Other contents

def write_noise(path, n=120, codec="libx264", rate=25, **options):
    """n frames of noise that moves over blocks: no two are equal, and decoding one needs others."""
    H, W = (72, 64) if codec == "libsvtav1" else (48, 64)           # older versions of it make no frame below 64
    draw, noise = np.random.default_rng(7), np.random.default_rng(8).integers(0, 256, (3 * H, 3 * W, 3), np.uint8)

    def frames():
        for i in range(n):
            if i % 40 == 0:
                blocks = draw.integers(0, 256, (3, 4, 3)).repeat(H // 3, 0).repeat(W // 4, 1)
            image = blocks.astype(np.uint8)
            y, x = i * 3 % (2 * H), i * 5 % (2 * W)
            image[8:40, 8:56] = noise[y:y + 32, x:x + 48] // 2 + image[8:40, 8:56] // 2
            image[:6] = 2 * i                                       # its number
            yield image

    return write_frames(path, frames(), codec, rate=rate, **options)


def write_blocks(path, n, codec="libx264", shape=(48, 64), audio=False, **options):
    """n frames of coloured blocks, which change with n and every third frame."""
    draw = np.random.default_rng(n)

    def frames():
        for i in range(n):
            if i % 3 == 0:
                blocks = draw.integers(0, 256, (3, 4, 3)).repeat(shape[0] // 3 + 1, 0).repeat(shape[1] // 4 + 1, 1)
            yield blocks[:shape[0], :shape[1]].astype(np.uint8)

    options = {"bf": "2", **options} if codec == "libx264" else options
    return write_frames(path, frames(), codec, silence=n if audio else 0, **options)


def noise_frames(T, H, W, seed=0):
    """(T, 3, H, W) uint8: noise below black and white blocks, on which bicubic overshoots."""
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (T, 3, H, W), dtype=np.uint8))
    x[:, :, :H // 2] = torch.where(torch.arange(W) % 12 < 6, 0, 255).to(torch.uint8)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Changes to a file

ONE = 1 << 16
# name: (quarter turns counter-clockwise of the picture as shown, the matrix of the track header of a 48 x 64 video)
TURNS = {"clockwise": (-1, [0, ONE, 0, -ONE, 0, 0, 48 * ONE, 0, 1 << 30]),
         "upside down": (2, [-ONE, 0, 0, 0, -ONE, 0, 64 * ONE, 48 * ONE, 1 << 30]),
         "counter-clockwise": (1, [0, -ONE, 0, ONE, 0, 0, 0, 64 * ONE, 1 << 30]),
         "not turned": (0, [ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30])}


def turn(path, matrix):
    """Make players turn an mp4, as telephones do: set the matrix of its track header."""
    with open(path, "r+b") as f:
        content = f.read()
        assert content.count(b"tkhd") == 1
        f.seek(content.index(b"tkhd") + 4 + 40)
        f.write(np.array(matrix, ">i4").tobytes())
    return path


def break_packets(path, indices):
    """Overwrite the payload of these packets. Each should be a frame that no other needs."""
    with av.open(path) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    with open(path, "r+b") as f:
        for i in indices:
            f.seek(packets[i][0])
            f.write(b"\xff" * packets[i][1])
    return path


def cut(path, share):
    """Keep only the first `share` of a file's bytes."""
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:int(share * len(content))])
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Unusual files that can be read. name: writer(path) -> path

def small(**options):
    return lambda path: write(path, **{"n": 8, "shape": (32, 48), **options})


ODD_VIDEOS = {
    "one frame.mp4": small(n=1),
    "odd.mp4": small(shape=(51, 35), pix_fmt="yuv444p"),
    "odd.avi": small(codec="mpeg4", shape=(51, 35)),
    "wide.mp4": small(shape=(16, 160)),
    "tiny.mp4": small(shape=(2, 2)),
    "10 bits.mp4": small(pix_fmt="yuv420p10le"),
    "10 bits.mkv": small(codec="ffv1", pix_fmt="yuv420p10le"),
    "clockwise.mp4": lambda path: turn(small(shape=(48, 64))(path), TURNS["clockwise"][1]),
    "upside down.mp4": lambda path: turn(small(shape=(48, 64))(path), TURNS["upside down"][1]),
    "counter-clockwise.MP4": lambda path: turn(small(shape=(48, 64))(path), TURNS["counter-clockwise"][1]),
    "variable rate.mp4": lambda path: timed(path, [0, 40, 45, 300, 301, 900, 2000, 9000]),
    "variable rate.mkv": lambda path: timed(path, [0, 40, 45, 300, 301, 900, 2000, 9000]),
    "late.mp4": lambda path: timed(path, range(5000, 5800, 100)),
    "late.ts": lambda path: timed(path, range(5000, 5800, 100)),
    "vp8.webm": small(codec="libvpx"),
    "vp9.webm": small(codec="libvpx-vp9"),
    "日本 #1 100%.mkv": small(bf="2"),
    "jpegs.mov": small(codec="mjpeg", pix_fmt="yuvj420p"),
    "a.flv": small(),
    "a.mpg": small(codec="mpeg2video"),
    "fragments.mp4": small(container={"movflags": "frag_keyframe+empty_moov"}),
    "sound.mp4": small(audio=True),
    "a.gif": small(codec="gif", pix_fmt="gray"),
}


def save_image(path, seed=0, convert=lambda image: image, orientation=None, **options):
    """Save an image of four coloured quarters, 48 x 64, with an EXIF orientation if given."""
    quarters = np.random.default_rng(seed).integers(40, 216, (2, 2, 3), dtype=np.uint8)
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    convert(Image.fromarray(np.kron(quarters, np.ones((24, 32, 1), np.uint8)))).save(path, **options)
    return str(path)


def image(**options):
    return lambda path, seed=0: save_image(path, seed, **options)


ODD_IMAGES = {
    "a.png": image(),
    "b.jpg": image(quality=90),
    "grey.jpg": image(convert=lambda x: x.convert("L")),
    "palette.png": image(convert=lambda x: x.convert("P")),
    "alpha.png": image(convert=lambda x: x.convert("RGBA")),
    "bits.png": image(convert=lambda x: x.convert("1")),
    "cmyk.jpg": image(convert=lambda x: x.convert("CMYK")),
    "progressive.jpg": image(progressive=True),
    "a.webp": image(),
    "a.gif": image(),
    "odd.jpg": image(convert=lambda x: x.resize((35, 51))),
    "one pixel.png": image(convert=lambda x: x.resize((1, 1))),
    **{f"turned {i}.jpg": image(orientation=i, quality=95) for i in (3, 6, 8)},
}
