"""
Files of kinds that people have and encoders do not write by default: what is shown of each, against a plain decode of
the whole file, against how the file was made, and against shared/odd_media, where that folder is there.
"""

import io
import json
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from helpers.runs import ROOT
from helpers.videos import TURNS, numbers, save_image, turn, write, write_frames, write_noise
from PIL import Image, ImageOps

import video
from video import read_frames, sample_frame_indices

FOLDER = os.path.join(ROOT, "..", "shared", "odd_media")


def read(path, indices):
    frames = video.iter_frames(path, lambda _: list(indices))
    return torch.stack([video.frame_to_tensor(frame, None) for frame in frames])


def check_reads(path, frames):
    """Any frames of a file that are read are those of `frames`, all of it in the order shown."""
    n = len(frames)
    assert torch.equal(read_frames(path, 0), frames)
    for seed in range(5):
        draw = np.random.default_rng(seed)
        indices = np.sort(draw.integers(n, size=draw.integers(1, 5)))
        assert torch.equal(read(path, indices), frames[indices]), indices
        expected = frames[sample_frame_indices(4, n, "random", np.random.default_rng(seed))]
        assert torch.equal(read_frames(path, 4, "random", np.random.default_rng(seed)), expected)


def full_decode(path):
    """All frames (n, 3, H, W) that libav shows of the best video stream, in the order in which it gives them."""
    with av.open(path) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        frames = []
        for packet in container.demux(stream):
            try:
                frames += [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
            except av.FFmpegError:
                pass
    return torch.stack(frames).permute(0, 3, 1, 2)


def seconds(path):
    return video.frame_timestamps(*video.open_video(path))[1]


def copy_packets(path, source, change=lambda i, packet: packet, **options):
    """
    Write the packets of a video to another file without decoding them; change(i, packet) -> the packet, or None to
    leave it out.
    """
    with av.open(source) as container, av.open(str(path), "w", **options) as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for i, packet in enumerate(container.demux(stream)):
            if packet.size and (packet := change(i, packet)):
                packet.stream = copy
                out.mux(packet)
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# shared/odd_media

@pytest.mark.skipif(not os.path.isdir(FOLDER), reason="shared/odd_media is not here")
def test_shared_files_are_read_as_expected():
    with open(os.path.join(FOLDER, "expected.json")) as f:
        expected = json.load(f)
    for name, facts in expected.items():
        path = os.path.join(FOLDER, name)
        if facts == "refused":
            with pytest.raises(ValueError, match="1 of 1 frames"):
                read_frames(path, 1)
            continue
        frames = read_frames(path, 0)
        assert list(frames.shape) == [facts["frames"], 3, *facts["size"]], name
        for mean, frame in zip(facts.get("means", []), frames, strict="means" in facts):
            assert abs(frame.float().mean().item() - mean) < 0.1, name
        corners = frames[0].float().mean(0)[[4, 4, -5, -5], [4, -5, 4, -5]]                 # four pixels inside
        assert np.abs(corners.numpy() - facts["corners"]).max() < 5, name
        check_reads(path, frames)


# ---------------------------------------------------------------------------------------------------------------------
# Only media

PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\na.ts\n#EXT-X-ENDLIST\n",
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\na.ts\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile a.ts\n",
    "list.avi": "ffconcat version 1.0\nfile a.ts\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet '
                'mimeType="video/mp4"><Representation id="1"><BaseURL>a.ts</BaseURL></Representation></AdaptationSet>'
                '</Period></MPD>',
    "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
                "a=rtpmap:96 H264/90000\n",
    "words.txt": "these are words\n" * 100,
    "words.mp4": "these are words\n" * 100,
    "drawing.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"><rect width="9" height="9"/></svg>',
    "drawing.png": '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"><rect width="9" height="9"/></svg>',
    "titles.srt": "1\n00:00:00,000 --> 00:00:01,000\nwords\n\n" * 9,
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_files_that_are_no_media_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write("a.ts", n=8)
    (tmp_path / name).write_text(PLAYLISTS[name])
    for path in (name, str(tmp_path / name)):
        with pytest.raises(ValueError, match=f"^{path}: .") as error:
            read_frames(path, 1)
        assert "\n" not in str(error.value)


def test_formats_that_name_other_files_are_not_read():
    refused = {"hls", "dash", "concat", "concatf", "sdp", "rtsp", "rtp", "lavfi", "svg_pipe", "tty", "tedcaptions"}
    assert not refused & {*video.FORMATS}
    assert video.OPTIONS["protocol_whitelist"] == "file"


@pytest.mark.parametrize("name", ["z:1.mp4", "http:a.mp4", "concat:a.ts|b.ts.mp4", "data:x.mp4", "a%d.mp4"])
def test_any_file_name_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.rename(write("plain.mp4", n=8), name)
    for path in (name, str(tmp_path / name)):
        assert numbers(read_frames(path, 0)) == numbers(read_frames(path, 8)) == list(range(8))


@pytest.mark.parametrize("name", ["z:1.png", "a%d.png", "a%03d.jpg", "a*.png", "a?.png", "a[1-9].jpg", "-i.png"])
def test_any_image_name_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = save_image(name)
    expected = np.asarray(Image.open(path)).transpose(2, 0, 1)
    assert np.abs(read_frames(path, 1)[0].numpy().astype(int) - expected).mean() < 6


def gif_bomb(size):
    """A GIF of a few bytes that claims size x size pixels."""
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "gif")
    content = bytearray(file.getvalue())
    image = content.index(b"\x2c")
    content[6:10] = content[image + 5:image + 9] = struct.pack("<HH", size, size)
    return bytes(content)


def png_bomb(size):
    file = io.BytesIO()
    Image.new("1", (size, size)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("name, content", [("a.gif", gif_bomb(16000)), ("a.png", png_bomb(12000))], ids=["gif", "png"])
def test_a_frame_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(video, "iter_decoded", lambda *_: pytest.fail("it is decoded"))
    with pytest.raises(ValueError, match=rf"{name}: .*{video.MAX_PIXELS}"):
        read_frames(str(tmp_path / name), 1)


def test_frames_and_bytes_have_bounds(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")                                        # 50 frames of 9216 bytes
    monkeypatch.setattr(video, "MAX_BYTES", 20 * 9216)
    assert len(read_frames(path, 20)) == 20
    with pytest.raises(ValueError, match=r"a.mp4: .*21 frames"):
        read_frames(path, 21)
    monkeypatch.setattr(video, "MAX_FRAMES", 40)
    with pytest.raises(ValueError, match=r"a.mp4: .*40 frames"):
        read_frames(path, 4)
    monkeypatch.setattr(video, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(ValueError, match=r"a.mp4: .*3071 pixels.*64 x 48"):
        read_frames(path, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Upright, and not mirrored; the best stream

ONE = 1 << 16
QUARTERS = np.kron(np.array([[20, 90], [160, 230]], np.uint8), np.ones((24, 32), np.uint8))        # (48, 64)
# EXIF orientation: (display matrix of a 48 x 64 video, how Pillow shows it)
MIRRORS = {2: ([-ONE, 0, 0, 0, ONE, 0, 64 * ONE, 0, 1 << 30], lambda x: np.fliplr(x)),
           4: ([ONE, 0, 0, 0, -ONE, 0, 0, 48 * ONE, 1 << 30], lambda x: np.flipud(x)),
           5: ([0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30], lambda x: x.T),
           7: ([0, -ONE, 0, -ONE, 0, 0, 48 * ONE, 64 * ONE, 1 << 30], lambda x: np.flipud(np.fliplr(x.T))),
           **{8 if turns == 1 else 6 if turns == -1 else 3 if turns == 2 else 1:
              (matrix, lambda x, turns=turns: np.rot90(x, turns)) for turns, matrix in TURNS.values()}}


@pytest.mark.parametrize("orientation", MIRRORS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_mirrored_videos_are_shown_as_players_do(tmp_path, orientation, name):
    matrix, show = MIRRORS[orientation]
    path = turn(write_frames(tmp_path / "source.mp4", [np.repeat(QUARTERS[..., None], 3, 2)] * 9, qp="1"), matrix)
    path = copy_packets(tmp_path / name, path)
    for frames in (read_frames(path, 0), read_frames(path, 4)):
        expected = torch.tensor(show(QUARTERS).copy(), dtype=torch.float32)
        assert frames.shape[2:] == expected.shape and (frames.float() - expected).abs().mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_images_are_shown_as_pillow_does(tmp_path, orientation, name):
    path = save_image(tmp_path / name, orientation=orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    frames = read_frames(path, 1)
    assert frames.shape == (1, 3, *expected.shape[:2])
    assert np.abs(frames[0].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 6


def test_a_damaged_exif_block_does_not_stop_the_image(tmp_path):
    path = save_image(tmp_path / "a.jpg", orientation=6)
    with open(path, "rb") as f:
        content = f.read()
    start = content.index(b"Exif\0\0") + 6
    for seed in range(20):
        damaged = bytearray(content)
        for place in np.random.default_rng(seed).integers(start, start + 26, size=3):
            damaged[place] ^= 85
        with open(path, "wb") as f:
            f.write(damaged)
        assert sorted(read_frames(path, 1).shape[2:]) == [48, 64]


def write_with_cover(path, frames, cover_first, size):
    """A video of `frames` grey frames beside a cover picture of size x size, either of them the first stream."""
    with av.open(str(path), "w") as out:
        for kind in ("cover", "video") if cover_first else ("video", "cover"):
            if kind == "cover":
                cover = out.add_stream("mjpeg", rate=1)
                cover.height, cover.width, cover.pix_fmt = size, size, "yuvj420p"
                cover.disposition = av.stream.Disposition.attached_pic
            elif frames:
                stream = out.add_stream("libx264", rate=10)
                stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        image = av.VideoFrame.from_ndarray(np.full((size, size, 3), 250, np.uint8), format="rgb24")
        out.mux([*cover.encode(image), *cover.encode()])
        for i in range(frames):
            image = np.full((48, 64, 3), 4 * i + 20, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if frames:
            out.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("cover_first", [True, False])
@pytest.mark.parametrize("size", [32, 256])
def test_cover_art_is_not_the_video(tmp_path, cover_first, size):
    path = write_with_cover(tmp_path / "a.mp4", 20, cover_first, size)
    assert numbers(read_frames(path, 0)) == list(range(20)) and numbers(read_frames(path, 2)) == [4, 14]


def test_a_file_of_cover_art_alone_has_no_video(tmp_path):
    with pytest.raises(ValueError, match="a.mp4: has no video stream"):
        read_frames(write_with_cover(tmp_path / "a.mp4", 0, True, 32), 1)


@pytest.mark.parametrize("extension", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("small_first", [True, False])
def test_the_best_of_several_video_streams_is_read(tmp_path, extension, small_first):
    path = str(tmp_path / f"a.{extension}")
    shapes = sorted([(48, 64), (96, 128)], reverse=not small_first)
    with av.open(path, "w") as out:
        streams = [out.add_stream("libx264", rate=10, options={"bf": "0", "qp": "20"}) for _ in shapes]
        for stream, shape in zip(streams, shapes, strict=True):
            (stream.height, stream.width), stream.pix_fmt = shape, "yuv420p"
        for i in range(20):
            for stream, shape in zip(streams, shapes, strict=True):
                image = np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            out.mux(stream.encode())
    frames = full_decode(path)
    assert len(frames) == 20
    check_reads(path, frames)


# ---------------------------------------------------------------------------------------------------------------------
# Frames are what is shown

X264 = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=2:b-adapt=0"}


@pytest.mark.parametrize("extension", ["webm", "mp4"])
def test_hidden_frames_are_decoded_and_not_counted(tmp_path, extension):
    """The bit that says whether a frame is shown is taken from some; others refer to them all the same."""
    codec = "libvpx" if extension == "webm" else "libvpx-vp9"
    source = write_noise(tmp_path / f"source.{extension}", 80, codec, deadline="realtime", g="20", **{"cpu-used": "8"})
    hidden = (5, 33, 34, 60, 79) if codec == "libvpx" else (20, 60)         # VP9's other frames would lose a bit more

    def hide(i, packet):
        if i not in hidden:
            return packet
        content = bytearray(bytes(packet))
        content[0] &= ~(0x10 if codec == "libvpx" else 2)
        other = av.Packet(bytes(content))
        other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
        other.is_keyframe = packet.is_keyframe
        return other

    path = copy_packets(tmp_path / f"a.{extension}", source, hide)
    intact, frames = full_decode(source), full_decode(path)
    assert torch.equal(frames, intact[[i for i in range(80) if i not in hidden]])
    check_reads(path, frames)


def not_coded(packet):
    """Make an MPEG-4 picture "not coded": its header, then the bit that says so."""
    content = bytes(packet)
    start = content.index(b"\0\0\1\xb6")
    other = av.Packet(content[:start] + b"\0\0\1\xb6" + b"\x50\x10")
    other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
    return other


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mkv"])
@pytest.mark.parametrize("left_out", [range(2, 50, 3), range(1, 50, 2), [1], [48, 49], range(10, 40)], ids=str)
def test_pictures_that_are_not_coded_are_not_counted(tmp_path, name, left_out):
    source = write(tmp_path / "source.mp4", codec="mpeg4", g="1")
    path = copy_packets(tmp_path / name, source, lambda i, packet: not_coded(packet) if i in left_out else packet)
    expected = [i for i in range(50) if i not in left_out]
    assert numbers(full_decode(path))[:len(expected)] == expected           # at its end libav may give the last again
    assert numbers(read_frames(path, 0)) == expected
    assert np.allclose(seconds(path), np.array(expected) / 10)
    for seed in range(5):
        indices = sample_frame_indices(4, len(expected), "random", np.random.default_rng(seed))
        assert numbers(read_frames(path, 4, "random", np.random.default_rng(seed))) == [expected[i] for i in indices]


@pytest.mark.parametrize("codec, options", [
    ("mpeg4", {"qmin": "1", "qmax": "1", "g": "1"}), ("mpeg4", {"qmin": "1", "qmax": "1", "g": "12"}),
    ("mjpeg", {"pix_fmt": "yuvj420p", "qmin": "1", "qmax": "1"}), ("libx264", {"qp": "1", "bf": "0"}),
    ("ffv1", {"pix_fmt": "bgr0"}), ("rawvideo", {"pix_fmt": "bgr24"}),
], ids=str)
def test_empty_chunks_of_avi_keep_their_times(tmp_path, codec, options):
    shown = [0, 1, 6, 7, 12, 13, 25, 26, 27, 40]
    path = write_frames(tmp_path / "a.avi", (np.full((48, 64, 3), 4 * i + 20, np.uint8) for i in range(10)), codec,
                        pts=lambda i: shown[i], **options)
    assert numbers(read_frames(path, 0)) == list(range(10)) and np.allclose(seconds(path), np.array(shown) / 10)
    assert numbers(read_frames(path, 0, seconds=1)) == list(range(3))       # the fourth is shown from 0.7 to 1.2
    check_reads(path, full_decode(path))


@pytest.mark.skipif(not os.path.isdir(FOLDER), reason="shared/odd_media is not here")
@pytest.mark.parametrize("name", ["a.ts", "a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize("left_out", [[], [0], range(5), [60, 61], [-1]], ids=str)
def test_fields_of_h264_are_shown_as_whole_frames(tmp_path, name, left_out):
    source = os.path.join(FOLDER, "field_coded.ts")
    last = len([packet for packet in av.open(source).demux(video=0) if packet.size])
    path = copy_packets(tmp_path / name, source, lambda i, packet: None if {i, i - last} & {*left_out} else packet)
    frames = full_decode(path)
    assert len(frames) <= last // 2
    check_reads(path, frames)


def test_fields_that_are_coded_as_pictures_are_shown_as_the_decoder_does(tmp_path):
    options = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:keyint=12:interlace=tff"}
    for extension in ("mp4", "mkv", "ts"):
        path = write_noise(tmp_path / f"a.{extension}", 60, "libx265", **options)
        check_reads(path, full_decode(path))


# ---------------------------------------------------------------------------------------------------------------------
# Times that begin again

def join(path, *parts):
    with open(path, "wb") as out:
        for part in parts:
            with open(part, "rb") as f:
                out.write(f.read())
    return str(path)


X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:keyint=12:min-keyint=12:open-gop=1"}
VPX = {"g": "12", "deadline": "realtime", "cpu-used": "8"}
MPEG4 = {"g": "12", "bf": "2", "qmin": "2", "qmax": "2"}
AV1 = {"preset": "12", "g": "16", "svtav1-params": "lp=1"}
CODECS = [("libx264", X264), ("libx264", {"x264-params": "keyint=250:bframes=0"}), ("libx265", X265), ("mpeg4", MPEG4),
          ("mpeg2video", {"g": "12", "bf": "2"}), ("mpeg1video", {"g": "12"})]
CODEC_IDS = ["h264", "h264 one GOP", "hevc", "mpeg4", "mpeg2", "mpeg1"]


@pytest.mark.parametrize("codec, options", CODECS, ids=CODEC_IDS)
@pytest.mark.parametrize("parts", [[(60, 25), (60, 25)], [(60, 25), (25, 25)], [(25, 25), (60, 25)],
                                   [(60, 25), (45, 30)], [(45, 30), (60, 24)], [(30, 25), (25, 30), (20, 24)]], ids=str)
def test_joined_files_are_shown_one_after_the_other(tmp_path, codec, options, parts):
    """parts: (frames, rate) of each. At other rates the times of the parts interleave."""
    paths = [write_noise(tmp_path / f"{i}.ts", n, codec, rate=rate, **options) for i, (n, rate) in enumerate(parts)]
    path = join(tmp_path / "a.ts", *paths)
    frames = torch.cat([full_decode(part) for part in paths])
    assert len(frames) == sum(n for n, _ in parts) and (np.diff(seconds(path)) > 0).all()
    assert torch.equal(full_decode(path), frames)
    check_reads(path, frames)


@pytest.mark.parametrize("codec, options", CODECS[:3], ids=CODEC_IDS[:3])
@pytest.mark.parametrize("start", [3, 20, 57, 61])
def test_times_of_a_joined_file_lie_between_those_of_the_first(tmp_path, codec, options, start):
    """The second begins half a frame after frame `start` of the first, of 60 frames."""
    first = write_noise(tmp_path / "first.ts", 60, codec, **options)
    second = write_noise(tmp_path / "second.ts", 45, codec, pts=lambda i: 3600 * (i + start) + 1800,
                         time_base=Fraction(1, 90000), **options)
    path = join(tmp_path / "a.ts", first, second)
    pts = [[packet.pts for packet in av.open(part).demux(video=0) if packet.size] for part in (first, second)]
    assert not {*pts[0]} & {*pts[1]} and (start > 57 or min(pts[1]) < max(pts[0]))
    frames = torch.cat([full_decode(first), full_decode(second)])
    assert torch.equal(full_decode(path), frames)
    check_reads(path, frames)


@pytest.mark.parametrize("codec, options", CODECS, ids=CODEC_IDS)
@pytest.mark.parametrize("start", [0.1, 0.3, 0.5])
def test_a_second_part_may_start_between_keyframes(tmp_path, codec, options, start):
    first = write_noise(tmp_path / "first.ts", 60, codec, **options)
    content = np.fromfile(write_noise(tmp_path / "second.ts", 60, codec, rate=30, **options), np.uint8)
    content[int(start * len(content)):].tofile(tmp_path / "second.ts")
    path = join(tmp_path / "a.ts", first, tmp_path / "second.ts")
    try:
        check_reads(path, full_decode(path))
    except ValueError as error:
        assert "frames do not decode" in str(error)


JOINED = [("webm", "libvpx", VPX), ("webm", "libvpx-vp9", VPX), ("mkv", "libx264", X264), ("mkv", "libx265", X265),
          ("mkv", "libsvtav1", AV1), ("obu", "libsvtav1", AV1), ("mpg", "mpeg2video", {"g": "12", "bf": "2"}),
          ("mpg", "mpeg1video", {"g": "12"}), ("mjpeg", "mjpeg", {"pix_fmt": "yuvj420p"}), ("h264", "libx264", X264),
          ("hevc", "libx265", X265)]


@pytest.mark.parametrize("extension, codec, options", JOINED, ids=lambda x: x if isinstance(x, str) else "")
def test_joined_files_of_other_formats(tmp_path, extension, codec, options):
    paths = [write_noise(tmp_path / f"{n}.{extension}", n, codec, rate=rate, **options)
             for n, rate in ((60, 25), (45, 30))]
    path = join(tmp_path / f"a.{extension}", *paths)
    frames = full_decode(path)
    assert len(frames) == 105 and torch.equal(frames, torch.cat([full_decode(part) for part in paths]))
    check_reads(path, frames)


@pytest.mark.parametrize("extension, codec, options", [
    ("flv", "libx264", X264), ("mp4", "libx264", X264), ("ivf", "libvpx", VPX),
    ("mp4", "libx264", {"container": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}, **X264}),
], ids=lambda x: x if isinstance(x, str) else "fragments" if "container" in x else "")
def test_joined_files_of_which_libav_shows_a_part(tmp_path, extension, codec, options):
    paths = [write_noise(tmp_path / f"{n}.{extension}", n, codec, **options) for n in (60, 45)]
    path = join(tmp_path / f"a.{extension}", *paths)
    frames = full_decode(path)
    assert 60 <= len(frames) < 105 and torch.equal(frames[:60], full_decode(paths[0]))
    check_reads(path, frames)


# ---------------------------------------------------------------------------------------------------------------------
# Keyframes

CUTS = [("libx264", X264, "mkv"), ("libx264", X264, "ts"), ("libx264", X264, "mp4"), ("libvpx", {"g": "12"}, "mkv"),
        ("libvpx-vp9", {"g": "12", "deadline": "realtime"}, "webm"), ("mpeg2video", {"g": "12", "bf": "2"}, "ts"),
        ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:keyint=12:min-keyint=12:open-gop=1"},
         "mkv"), ("libx265", X265, "mp4"), ("libx265", X265, "ts"), ("libx264", X264, "flv"), ("libx264", X264, "mov"),
        ("mpeg4", MPEG4, "mp4"), ("mpeg4", {"g": "12", "bf": "0"}, "avi"), ("mpeg1video", {"g": "12"}, "mpg"),
        ("mpeg2video", {"g": "12", "bf": "2"}, "mkv"), ("flv", {"g": "12"}, "flv"), ("wmv2", {"g": "12"}, "asf")]


NOISE = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8)


@pytest.mark.parametrize("codec, options, extension", CUTS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("start", [3, 12, 14, 23])
def test_a_start_between_keyframes_is_left_out_and_not_lost(tmp_path, codec, options, extension, start):
    source = write_noise(tmp_path / f"source.{extension}", 60, codec, **options)
    path = copy_packets(tmp_path / f"a.{extension}", source, lambda i, packet: packet if i >= start else None)
    frames = full_decode(path)
    assert len(frames) >= 24
    check_reads(path, frames)


@pytest.mark.parametrize("options", [X264, {"codec": "mpeg2video", "g": "12", "bf": "2"}], ids=["h264", "mpeg2"])
@pytest.mark.parametrize("start", [0.1, 0.3, 0.5])
def test_a_stream_that_is_tuned_into_is_read_from_its_first_keyframe(tmp_path, options, start):
    source = write_noise(tmp_path / "source.ts", 60, **options)
    content = np.fromfile(source, np.uint8)
    path = str(tmp_path / "a.ts")
    content[int(start * len(content)):].tofile(path)
    frames = full_decode(path)
    assert 20 < len(frames) < 60
    check_reads(path, frames)


@pytest.mark.parametrize("codec, options", [
    ("libx264", {"x264-params": "keyint=250:min-keyint=250:scenecut=0"}),
    ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:keyint=250:min-keyint=250:scenecut=0"}),
], ids=["h264", "hevc"])
def test_a_first_keyframe_that_comes_late_is_found(tmp_path, codec, options):
    source = write_frames(tmp_path / "source.ts", (image for image in NOISE for _ in range(10)), codec, rate=25,
                          **options)
    path = copy_packets(tmp_path / "a.ts", source, lambda i, packet: packet if i >= 1 else None)
    container, stream = video.open_video(path)
    assert not stream.codec_context.extradata                               # libav did not read as far
    frames = full_decode(path)
    assert len(frames) == 50
    check_reads(path, frames)


@pytest.mark.parametrize("codec, options", [
    ("libx264", X264), ("libx264", {"x264-params": "keyint=250:min-keyint=250:bframes=0"}), ("mpeg4", {"g": "30"}),
    ("libx264", {"x264-params": "keyint=60:bframes=0:intra-refresh=1"}), ("libvpx", {"g": "30"}),
    ("libx264", {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0"}),
    ("libvpx-vp9", {"g": "30", "deadline": "realtime"}), ("mpeg2video", {"g": "12", "bf": "2"}), ("libx265", X265),
    ("libvpx", {"g": "30", "deadline": "good", "lag-in-frames": "16", "auto-alt-ref": "1"}),
], ids=str)
@pytest.mark.parametrize("marked", [1, 7], ids=["all", "some"])
@pytest.mark.parametrize("extension", ["mkv", "mp4", "mov"])
def test_false_keyframes_are_not_trusted(tmp_path, codec, options, marked, extension):
    if codec == "libvpx" and extension != "mkv":
        pytest.skip("MP4 has no VP8")
    if (codec, extension) == ("libvpx-vp9", "mov"):
        pytest.skip("MOV has no VP9")
    source = write_noise(tmp_path / "source.mkv", 80, codec, **options)

    def mark(i, packet):
        packet.is_keyframe = packet.is_keyframe or i % marked == 0
        return packet

    path = copy_packets(tmp_path / f"a.{extension}", source, mark)
    frames = full_decode(path)
    assert len(frames) == 80
    check_reads(path, frames)
    for i in range(0, 80, 3):
        assert torch.equal(read(path, [i])[0], frames[i])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that end early

@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, -100, -12, -2, -1])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}], ids=str)
def test_jpegs_that_end_early_are_refused_as_by_pillow(tmp_path, keep, options):
    path = str(tmp_path / "a.jpg")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).save(path, **options)
    with open(path, "rb") as f:
        content = f.read()
    assert read_frames(path, 1).shape == (1, 3, 240, 320)
    with open(path, "wb") as f:
        f.write(content[:int(keep * len(content)) if keep > 0 else keep])
    with pytest.raises(OSError, match="truncated"):
        Image.open(path).load()
    with pytest.raises(ValueError, match="a.jpg: ."):
        read_frames(path, 1)


@pytest.mark.parametrize("end", [b"", b"\0" * 99, b"\xff" * 99, b"words" * 99], ids=["", "zeros", "ones", "words"])
def test_whole_jpegs_are_read_with_anything_behind_them(tmp_path, end):
    path = save_image(tmp_path / "a.jpg")
    with open(path, "ab") as f:
        f.write(end)
    expected = np.asarray(Image.open(path)).transpose(2, 0, 1)
    assert np.abs(read_frames(path, 1)[0].numpy().astype(int) - expected).mean() < 6


@pytest.mark.parametrize("extension", ["avi", "mov", "mkv"])
def test_mjpeg_frames_that_end_early_are_lost(tmp_path, extension):
    source = write_noise(tmp_path / "source.mov", 50, "mjpeg", pix_fmt="yuvj420p")
    frames = full_decode(source)

    def cut(i, packet):
        if i not in lost:
            return packet
        other = av.Packet(bytes(packet)[:packet.size // 2])
        other.pts, other.dts, other.time_base, other.is_keyframe = packet.pts, packet.dts, packet.time_base, True
        return other

    lost = [7, 30]
    path = copy_packets(tmp_path / f"a.{extension}", source, cut)
    check_reads(path, frames[[i - (i in lost) for i in range(50)]])         # the one before it is shown
    lost = range(20, 26)
    with pytest.raises(ValueError, match="6 of 50 frames"):
        read_frames(copy_packets(tmp_path / f"b.{extension}", source, cut), 4)


def save_gif(path, num_frames, noise):
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 256, (60, 80, 3), np.uint8) if noise else np.full((60, 80, 3), 9 * i + 20, np.uint8)
              for i in range(num_frames)]
    first, *others = map(Image.fromarray, pixels)
    first.save(path, save_all=True, append_images=others, duration=100)
    return str(path)


@pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
def test_gifs_that_end_early_are_refused_as_by_pillow(tmp_path, noise):
    path = save_gif(tmp_path / "a.gif", 1, noise)
    with open(path, "rb") as f:
        content = f.read()
    assert len(read_frames(path, 1)) == 1
    for keep in np.linspace(14, len(content) - 4, 60).astype(int):
        with open(path, "wb") as f:
            f.write(content[:keep])
        with pytest.raises((OSError, SyntaxError)):
            Image.open(path).load()
        with pytest.raises(ValueError, match="a.gif: ."):
            read_frames(path, 1)


def test_lost_frames_at_the_end_of_a_joined_file_keep_their_places(tmp_path):
    source = write_noise(tmp_path / "source.mov", 30, "mjpeg", pix_fmt="yuvj420p")
    frames = full_decode(source)

    def cut(i, packet):
        if i < 28:
            return packet
        other = av.Packet(bytes(packet)[:packet.size // 2])
        other.pts, other.dts, other.time_base, other.is_keyframe = packet.pts, packet.dts, packet.time_base, True
        return other

    first, second = copy_packets(tmp_path / "first.mkv", source, cut), copy_packets(tmp_path / "second.mkv", source)
    path = join(tmp_path / "a.mkv", first, second)
    check_reads(path, torch.cat([frames[:28], frames[[27, 27]], frames]))


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("end", [b"", b";", b"\0\0;", b"; words", b"!\xfe\5words\0;", b"!\xfe\5words\0",
                                 b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0;"], ids=str)
def test_whole_gifs_are_read_with_anything_behind_their_images(tmp_path, num_frames, end):
    path = save_gif(tmp_path / "a.gif", num_frames, True)
    frames = full_decode(path)
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:-1] + end)
    assert len(frames) == num_frames
    check_reads(path, frames)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tiff", "a.ppm"])
def test_other_pictures_that_end_early_are_refused_as_by_pillow(tmp_path, name, keep):
    path = save_image(tmp_path / name, convert=lambda image: Image.effect_noise(image.size, 80).convert("RGB"))
    assert len(read_frames(path, 1)) == 1
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:int(keep * len(content))])
    with pytest.raises(OSError):
        Image.open(path).load()
    with pytest.raises(ValueError, match=f"{name}: ."):
        read_frames(path, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Packets that cannot be told apart

def test_h264_in_asf_is_decoded_from_its_start(tmp_path):
    path = write_noise(tmp_path / "a.asf", 80, **X264)
    frames = full_decode(path)
    check_reads(path, frames)
    content = np.fromfile(path, np.uint8)
    for seed in range(8):
        damaged = content.copy()
        places = np.random.default_rng(seed).integers(len(content) // 3, len(content), size=6)
        damaged[places] ^= 85
        damaged.tofile(path)
        try:
            frames = read_frames(path, 0)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        for i in range(0, len(frames), 7):
            assert torch.equal(read(path, [i])[0], frames[i])


def test_packets_of_the_same_time_and_size_are_shown_in_order(tmp_path):
    source = write(tmp_path / "source.mkv", n=40, shape=(48, 64), **{"x264-params": "keyint=1:bframes=0"})

    def pair(i, packet):
        packet.pts = packet.dts = packet.pts // 200 * 200                   # two frames have the same time
        return packet

    path = copy_packets(tmp_path / "a.mkv", source, pair)
    assert numbers(read_frames(path, 0)) == list(range(40))
    for i in range(40):
        assert numbers(read(path, [i])) == [i]
