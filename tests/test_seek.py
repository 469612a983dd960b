"""
What is decoded of a video against a whole decode from its start, written anew; what that costs; damage; crops that the
device resizes.
"""

import os
from dataclasses import replace
from functools import partial

import av
import numpy as np
import pytest
import torch
from test_data import same
from test_decoding import break_packets, cut, picture

import data
import decoding
from data import Clips, DataConfig, Mix, collate
from decoding import read_frames, train_view

SHAPE = (48, 64)


def film(path, n=120, codec="libx264", pix_fmt="yuv420p", rate=25, at=lambda i: i, container=None, skip=(), **options):
    """n frames of noise that moves over blocks: no two are alike, and each has need of others. `at`: their times."""
    H, W = (72, 64) if codec == "libsvtav1" else SHAPE              # older ones make no picture below 64
    draw, noise = np.random.default_rng(7), np.random.default_rng(8).integers(0, 256, (3 * H, 3 * W, 3), np.uint8)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options={k.replace("_", "-"): v for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = H, W, pix_fmt
        stream.codec_context.thread_count = 1
        for i in range(n):
            if i % 40 == 0:
                blocks = draw.integers(0, 256, (3, 4, 3)).repeat(H // 3, 0).repeat(W // 4, 1)
            image = blocks.astype(np.uint8)
            y, x = i * 3 % (2 * H), i * 5 % (2 * W)
            image[8:40, 8:56] = noise[y:y + 32, x:x + 48] // 2 + image[8:40, 8:56] // 2
            image[:6] = 2 * i                                               # which it is
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = at(i)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return str(path)


def parameters(**params):
    return ":".join(f"{name.replace('_', '-')}={value}" for name, value in {"scenecut": 0, **params}.items())


def x264(**params):
    return {"x264-params": parameters(**params)}


def x265(**params):
    return {"codec": "libx265", "preset": "ultrafast",
            "x265-params": parameters(log_level="none", pools=1, frame_threads=1, **params)}


OPEN = dict(keyint=12, min_keyint=12, bframes=4, b_pyramid="normal", open_gop=1, b_adapt=0)
HEVC_OPEN = {"g": "12", **x265(bframes=4, open_gop=1, b_adapt=0)}
HALF = {"bf": "2", "g": "12"}
LATE = {"at": lambda i: i + 500}
UNEVEN = {"at": lambda i: i * i // 7 + i}
START = {"at": lambda i: i - 17}                # the file begins with an edit list, in the middle of a GOP

# name, what it is written with, whether its keyframes serve
FILES = {
    "h264 as it is": ("a.mp4", {}, True),
    "h264 keyint 10": ("a.mp4", x264(keyint=10), True),
    "h264 pyramid": ("a.mp4", x264(keyint=24, bframes=7, b_pyramid="normal", b_adapt=0), True),
    "h264 strict pyramid": ("a.mp4", x264(keyint=24, bframes=5, b_pyramid="strict", b_adapt=0), True),
    "h264 open": ("a.mp4", x264(**OPEN), True),
    "h264 open mkv": ("a.mkv", x264(**OPEN), True),
    "h264 open ts": ("a.ts", x264(**OPEN), True),
    "h264 refresh": ("a.mp4", x264(keyint=20, intra_refresh=1, bframes=0), False),
    "h264 refresh mkv": ("a.mkv", x264(keyint=20, intra_refresh=1, bframes=0), False),
    "h264 refresh ts": ("a.ts", x264(keyint=20, intra_refresh=1, bframes=0), False),
    "h264 all intra": ("a.mp4", x264(keyint=1), True),
    "h264 no frames beside": ("a.mov", x264(keyint=15, bframes=0, ref=1), True),
    "h264 interlaced": ("a.mp4", x264(keyint=15, tff=1, bframes=3), True),
    "h264 slices": ("a.mp4", x264(keyint=15, slices=4), True),
    "h264 mkv": ("a.mkv", x264(keyint=16), True),
    "h264 ts": ("a.ts", x264(keyint=16), True),
    "h264 flv": ("a.flv", x264(keyint=16), True),
    "h264 avi": ("a.avi", x264(keyint=16, bframes=0), False),
    "h264 raw": ("a.h264", x264(keyint=16), False),
    "h264 fragments": ("a.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}, **x264(keyint=16)}, True),
    "h264 index first": ("a.mp4", {"container": {"movflags": "faststart"}, **x264(keyint=16)}, True),
    "h264 late": ("a.mp4", {**LATE, **x264(keyint=16)}, True),
    "h264 late mkv": ("a.mkv", {**LATE, **x264(keyint=16)}, True),
    "h264 late ts": ("a.ts", {**LATE, **x264(keyint=16)}, True),
    "h264 uneven": ("a.mp4", {**UNEVEN, **x264(keyint=16)}, True),
    "h264 uneven mkv": ("a.mkv", {**UNEVEN, **x264(keyint=16)}, True),
    "h264 edited": ("a.mp4", {**START, **x264(keyint=12)}, True),
    "h264 edited open": ("a.mov", {**START, **x264(**OPEN)}, True),
    "hevc": ("a.mp4", {"g": "16", **x265(open_gop=0)}, True),
    "hevc open": ("a.mp4", HEVC_OPEN, True),
    "hevc open mkv": ("a.mkv", HEVC_OPEN, True),
    "hevc open ts": ("a.ts", HEVC_OPEN, True),
    "hevc open edited": ("a.mp4", {**START, **HEVC_OPEN}, True),
    "mpeg4": ("a.mp4", {"codec": "mpeg4", **HALF}, True),
    "mpeg4 mkv": ("a.mkv", {"codec": "mpeg4", **HALF}, True),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4", **HALF}, False),
    "mpeg2 ts": ("a.ts", {"codec": "mpeg2video", **HALF}, True),
    "mpeg2 mkv": ("a.mkv", {"codec": "mpeg2video", **HALF}, True),
    "mpeg2 mpg": ("a.mpg", {"codec": "mpeg2video", **HALF}, False),
    "mpeg1 mkv": ("a.mkv", {"codec": "mpeg1video", **HALF}, True),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "g": "15"}, True),
    "vp9 alt-ref": ("a.webm", {"codec": "libvpx-vp9", "deadline": "good", "cpu-used": "8", "g": "30",
                               "lag-in-frames": "16", "auto-alt-ref": "1"}, True),
    "vp8": ("a.webm", {"codec": "libvpx", "deadline": "realtime", "cpu-used": "8", "g": "15"}, True),
    "vp8 alt-ref": ("a.mkv", {"codec": "libvpx", "deadline": "good", "cpu-used": "8", "g": "30",
                              "lag-in-frames": "16", "auto-alt-ref": "1"}, True),
    "av1": ("a.mp4", {"codec": "libsvtav1", "preset": "12", "g": "16", "svtav1-params": "lp=1"}, True),
    "av1 mkv": ("a.mkv", {"codec": "libsvtav1", "preset": "12", "g": "16", "svtav1-params": "lp=1"}, True),
    "flv": ("a.flv", {"codec": "flv", "g": "12"}, False),
    "wmv": ("a.wmv", {"codec": "wmv2", "g": "12"}, False),
    "mjpeg": ("a.mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, False),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}, False),
}


def whole(path):
    """All frames (n, 3, H, W) that libav makes of a file, from its start, by their times."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    if all(frame.pts is not None for frame in frames) and not path.endswith("avi"):
        frames.sort(key=lambda frame: frame.pts)
    return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) for frame in frames])


@pytest.fixture(scope="module", params=FILES, ids=FILES)
def filmed(request, tmp_path_factory):
    """(path, all its frames, whether its keyframes serve)"""
    name, how, keyed = FILES[request.param]
    path = film(tmp_path_factory.mktemp("film") / name, **how)
    return path, whole(path), keyed


def chosen(path, picks):
    frames = decoding.chosen_frames(path, lambda _: list(picks))
    return torch.stack([decoding.to_tensor(frame, None) for frame in frames])


@pytest.fixture
def counts(monkeypatch):
    """What was done: seeks, packets that were decoded, frames that came of them, whole decodes."""
    done = {"seeks": 0, "packets": 0, "frames": 0, "whole": 0}

    class Counted:
        def __init__(self, inner, **own):
            self.__dict__.update(own, inner=inner)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class Decoded(Counted):
        def decode(self):
            done["packets"] += self.inner.size > 0
            frames = self.inner.decode()
            done["frames"] += len(frames)
            return frames

    class Container(Counted):
        def demux(self, stream):
            return map(Decoded, self.inner.demux(stream))

        def seek(self, *args, **kwargs):
            done["seeks"] += 1
            return self.inner.seek(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.inner.close()

    real, decoded = decoding.open_video, decoding.decoded_frames

    def open_video(path):
        container, stream = real(path)
        return Container(container), stream

    def decoded_frames(*args):
        done["whole"] += 1
        return decoded(*args)

    monkeypatch.setattr(decoding, "open_video", open_video)
    monkeypatch.setattr(decoding, "decoded_frames", decoded_frames)
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Intact files

def test_whichever_frames_are_read_they_are_those_of_a_whole_decode(filmed):
    path, frames, _ = filmed
    n = len(frames)
    assert torch.equal(read_frames(path, 0), frames)
    picks = [[0], [n - 1], [0, n - 1], [n // 2] * 3, range(n // 2, n // 2 + 9), range(0, n, 7)]
    for seed in range(12):
        draw = np.random.default_rng(seed)
        picks.append(np.sort(draw.integers(n, size=draw.integers(1, 6))))
    for some in picks:
        assert torch.equal(chosen(path, some), frames[list(some)]), list(some)
    for seed in range(3):
        some = decoding.pick(4, n, "random", np.random.default_rng(seed))
        assert torch.equal(read_frames(path, 4, "random", np.random.default_rng(seed)), frames[some])


def test_a_frame_costs_its_stretch_where_keyframes_can_be_trusted(filmed, counts):
    path, frames, keyed = filmed
    n = len(frames)
    for i in (*range(n - 13, n), n // 2, 0):                                # a whole GOP, and frames shown before it
        counts.update(dict.fromkeys(counts, 0))
        assert torch.equal(chosen(path, [i]), frames[[i]])
        if keyed:
            assert counts["whole"] == 0 and counts["seeks"] == 1
            assert counts["packets"] <= 50                                  # of 120, the longest stretch being 40
        else:
            assert counts["whole"] == (i > 0 or not counts["seeks"])
            assert counts["packets"] <= i + 6 + 20 * counts["seeks"]        # and not more than it needs


def packets(path):
    """(pts, whether a keyframe) of the packets, in the order of the file."""
    with av.open(path) as container:
        return [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("how", [x264(keyint=20, b_adapt=0), x264(keyint=20, bframes=0), x264(keyint=1)], ids=str)
def test_frames_of_one_stretch_are_read_without_a_seek_and_no_packet_twice(tmp_path, counts, how):
    path = film(tmp_path / "a.mp4", **how)
    want = whole(path)
    key = [i for i, (_, key) in enumerate(packets(path)) if key]
    for picks, seeks, most in ((range(120), 1, 120), (range(40, 60), 1, 30), ([41, 44, 59], 1, 30), ([0, 119], 2, 45),
                               ([41, 45, 99], 2, 55), (range(1, 120, 2), 60 if len(key) == 120 else 1, 120)):
        counts.update(dict.fromkeys(counts, 0))
        assert torch.equal(chosen(path, picks), want[list(picks)])
        assert counts["whole"] == 0 and counts["packets"] <= most
        assert counts["seeks"] == (len(picks) if len(key) == 120 and picks != range(120) and picks != range(40, 60)
                                   else seeks), (picks, counts)


def test_frames_that_no_other_needs_are_left_out(tmp_path, counts):
    path = film(tmp_path / "a.mp4", **x264(keyint=200, bframes=3, b_pyramid="none", b_adapt=0))
    chosen(path, [119])
    assert counts["packets"] == 120 and 30 <= counts["frames"] <= 34        # every fourth
    counts.update(dict.fromkeys(counts, 0))
    chosen(path, range(120))
    assert counts["packets"] == counts["frames"] == 120
    counts.update(dict.fromkeys(counts, 0))
    chosen(film(tmp_path / "b.mp4", **{"g": "200", **x265(bframes=3, b_adapt=0)}), [119])
    assert counts["packets"] == counts["frames"] == 120                     # of HEVC's it is not known which those are


def test_the_file_is_opened_once(tmp_path, monkeypatch):
    path, opened, real = film(tmp_path / "a.mp4", n=60, **x264(keyint=10)), [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args) or real(*args, **kwargs))
    read_frames(path, 4)
    assert len(opened) == 1


LIES = {
    "it lands late": lambda seek, to, stream: seek(to + 15 * 512 * 3, stream=stream, backward=False),
    "it lands early": lambda seek, to, stream: seek(0, stream=stream),
    "it lands between keyframes": lambda seek, to, stream: seek(to + 512 * 4, stream=stream, any_frame=True),
    "it stays": lambda seek, to, stream: None,
    "it cannot": lambda seek, to, stream: (_ for _ in ()).throw(av.error.PermissionError(1, "no seeking")),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_where_a_seek_does_not_land_where_it_should_the_frames_are_the_same(tmp_path, counts, monkeypatch, lie):
    path = film(tmp_path / "a.mp4", **x264(keyint=15))
    want, real = whole(path), decoding.open_video

    def open_video(path):
        container, stream = real(path)
        container.seek = lambda to, stream: lie(container.inner.seek, to, stream)
        return container, stream

    monkeypatch.setattr(decoding, "open_video", open_video)
    for picks in ([70], [3, 50, 51, 110], [119], range(120)):
        counts["whole"] = 0
        assert torch.equal(chosen(path, picks), want[list(picks)])
        assert counts["whole"] == (lie is not LIES["it lands early"])


def test_keyframes_that_are_none_are_found_out(tmp_path, monkeypatch):
    """Packets that the file calls keyframes, and that need those before them."""
    path = film(tmp_path / "a.mp4", **x264(keyint=30, b_adapt=0))
    want, real = whole(path), decoding.frame_times

    def frame_times(container, stream):
        times, seconds, packets = real(container, stream)
        return times, seconds, [p._replace(key=p.key or i % 7 == 0) for i, p in enumerate(packets)]

    monkeypatch.setattr(decoding, "frame_times", frame_times)
    monkeypatch.setattr(decoding, "SKIMMED", ())
    for seed in range(10):
        picks = np.sort(np.random.default_rng(seed).integers(120, size=4))
        assert torch.equal(chosen(path, picks), want[picks])


def test_a_frame_that_does_not_come_is_not_taken_for_the_next(tmp_path, monkeypatch, counts):
    path = film(tmp_path / "a.mp4", **x264(keyint=30))
    want, real = whole(path), decoding.stretch

    def stretch(container, stream, packets, key, place, chosen):
        times = sorted(place)
        for at, frame in real(container, stream, packets, key, place, chosen):
            if times.index(frame.pts) not in (50, 119):
                yield at, frame

    monkeypatch.setattr(decoding, "stretch", stretch)
    for picks, times in (([50], 1), ([12, 50, 70], 1), ([119], 1), ([49, 51, 118], 0)):
        counts["whole"] = 0
        assert torch.equal(chosen(path, picks), want[picks]) and counts["whole"] == times


def test_a_frame_of_an_unknown_time_is_not_trusted(tmp_path, monkeypatch, counts):
    path = film(tmp_path / "a.mp4", **x264(keyint=30, bframes=0))
    want, real = whole(path), decoding.stretch
    times = [time for time, _ in packets(path)]

    def stretch(container, stream, packets, key, place, chosen):
        place = {time: i for time, i in place.items() if time != sorted(times)[45]}     # one that the packets lack
        return real(container, stream, packets, key, place, chosen)

    monkeypatch.setattr(decoding, "stretch", stretch)
    assert torch.equal(chosen(path, [40, 48, 50]), want[[40, 48, 50]]) and counts["whole"] == 1
    assert torch.equal(chosen(path, [80]), want[[80]]) and counts["whole"] == 1


def test_packets_that_are_others_after_a_seek_are_found_out(tmp_path, monkeypatch, counts):
    path = film(tmp_path / "a.mp4", **x264(keyint=30))
    want, real = whole(path), decoding.frame_times

    def frame_times(container, stream):
        times, seconds, packets = real(container, stream)
        return times, seconds, [p._replace(size=p.size + (i % 30 == 20)) for i, p in enumerate(packets)]

    monkeypatch.setattr(decoding, "frame_times", frame_times)
    for i, times in ((5, 0), (28, 1), (65, 0), (119, 1)):
        counts["whole"] = 0
        assert torch.equal(chosen(path, [i]), want[[i]]) and counts["whole"] == times


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files

def shown(path):
    """What a whole decode shows at each place, the frame, or the good one before it, or the first; how many decode."""
    with av.open(path) as container:
        times = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    found = {}
    with av.open(path) as container:
        for packet in container.demux(video=0):
            try:
                for frame in packet.decode():
                    found[frame.pts] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            except av.FFmpegError:
                pass
    first = found[min(found)]
    return [found[max(known)] if (known := [t for t in found if t <= time]) else first for time in times], len(found)


@pytest.mark.parametrize("keyint, broken, met", [
    (1, [0, 25, 26, 60, 119], [[0], [25], [26, 26], [1, 60], [119]]),
    (10, [25, 26, 60, 118], [[25], [26], [60, 60], [65], [118], [28, 61]]),
])
def test_a_wanted_frame_that_is_lost_shows_the_one_before_it(tmp_path, counts, keyint, broken, met):
    path = film(tmp_path / "a.mp4", **x264(keyint=keyint, bframes=0, repeat_headers=0))
    intact = whole(path)
    want, good = shown(break_packets(path, broken))
    assert 108 <= good < 120 and not torch.equal(want[25], intact[25])
    for seed in range(12):
        picks = np.sort(np.random.default_rng(seed).integers(120, size=5))
        assert torch.equal(chosen(path, picks), torch.stack([want[i] for i in picks]))
    for picks in (*met, range(120)):
        assert torch.equal(chosen(path, picks), torch.stack([want[i] for i in picks]))
    for picks in ([12], [40, 55, 59], [85, 105]):                           # where it is not met it costs nothing
        counts["whole"] = 0
        assert torch.equal(chosen(path, picks), intact[picks]) and counts["whole"] == 0


@pytest.mark.parametrize("name, how", [("a.mp4", x264(keyint=12, b_adapt=0)), ("a.mkv", x264(**OPEN)),
                                       ("a.ts", {"codec": "mpeg2video", **HALF}), ("b.mp4", HEVC_OPEN),
                                       ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "g": "12"})], ids=str)
def test_damage_in_one_stretch_is_none_of_the_others(tmp_path, name, how):
    path = film(tmp_path / name, **how)
    with av.open(path) as container:
        listed = [(p.pos, p.size, p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]
    intact, times = whole(path), sorted(pts for _, _, pts, _ in listed)
    keys = [i for i, (*_, key) in enumerate(listed) if key]
    a, b = keys[4], keys[5]
    lost = [times.index(pts) for _, _, pts, _ in listed[a:b]]
    far = [i for i in range(120) if i < min(lost) - 12 or i > max(lost) + 12]
    rng = np.random.default_rng(0)
    with open(path, "rb") as f:
        content = np.frombuffer(f.read(), np.uint8)
    for seed in range(6):
        bad = content.copy()
        for pos, size, *_ in listed[a + seed % 3:b]:
            at = pos + rng.integers(min(24, size - 1), size, size=3)
            bad[at] ^= 85
        bad.tofile(path)
        picks = np.sort(rng.choice(far, 4))
        assert torch.equal(chosen(path, picks), intact[picks])
        try:                                                                # and of itself it is what it was
            assert len(read_frames(path, 0)) == 120
        except ValueError as error:
            assert "frames do not decode" in str(error) and "\n" not in str(error)


def test_a_damaged_file_is_judged_as_a_whole_wherever_its_damage_is_met(tmp_path):
    path = break_packets(film(tmp_path / "a.mp4", **x264(keyint=1)), range(60, 80))
    for picks in ([60], [79], [0, 70], [65, 119], range(120)):
        with pytest.raises(ValueError, match="a.mp4: 20 of 120 frames do not decode"):
            chosen(path, picks)
    for picks in ([0], [59, 80], [119]):
        assert len(chosen(path, picks)) == len(picks)
    path = break_packets(film(tmp_path / "a.avi", codec="mpeg4", g="0"), range(60, 80))
    with pytest.raises(ValueError, match="a.avi: 20 of 120 frames do not decode"):
        chosen(path, [90])                                                  # decoded from the start


def test_what_the_index_promises_and_the_file_lacks_is_known_before_anything_is_decoded(tmp_path, counts):
    fast = {"container": {"movflags": "+faststart"}, **x264(keyint=10)}
    path = cut(film(tmp_path / "a.mp4", **fast), 0.7)
    for picks in ([0], [100], range(120)):
        with pytest.raises(ValueError, match=r"a.mp4: \d+ of 120 frames do not decode"):
            chosen(path, picks)
    assert counts["packets"] == 0
    path = film(tmp_path / "b.mp4", **fast)
    intact = whole(path)
    cut(path, 0.97)
    assert torch.equal(chosen(path, [0, 30, 75]), intact[[0, 30, 75]]) and counts["whole"] == 0
    last = chosen(path, [119])
    assert counts["whole"] == 1 and torch.equal(last, read_frames(path, 0)[-1:])


def test_a_video_stream_without_a_frame_is_refused(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", n=2)
    monkeypatch.setattr(decoding, "frame_times", lambda *_: ([], np.zeros(0), []))
    for seconds in (0, 1.5):
        with pytest.raises(ValueError, match="a.mp4: has 0 frames, wanted 4"):
            read_frames(path, 4, seconds=seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Crops that the device resizes

SIZES = {"of": (40, 70), "small": (9, 13), "wide": (30, 200), "exact": (32, 32), "large": (100, 120), "odd": (61, 33)}


@pytest.fixture
def folder(tmp_path):
    """A video of each of SIZES, of eight frames of noise."""
    for i, (name, (H, W)) in enumerate(SIZES.items()):
        with av.open(str(tmp_path / f"{name}.mkv"), "w") as out:
            stream = out.add_stream("ffv1", rate=8)
            (stream.height, stream.width), stream.pix_fmt = (H, W), "bgr0"
            for frame in picture(8, H, W, i).permute(0, 2, 3, 1).numpy():
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            out.mux(stream.encode())
    return tmp_path


def rows_of(folder, names=SIZES, first=0):
    return [data.Row(str(folder / f"{name}.mkv"), [f"{name} one", "two"], None, first + i, where=name)
            for i, name in enumerate(names)]


def tokenizer_of(folder):
    data.train_tokenizer(["one two", *SIZES], str(folder / "tokenizer.json"), vocab=60)
    return data.load_tokenizer(str(folder / "tokenizer.json"))


def batches(samples, tokenizer, size=4):
    return [collate(samples[i:i + size], tokenizer, 8, seed=3) for i in range(0, len(samples), size)]


VIEWS = {"whole frames": {}, "crops": dict(scale=0.3, flip=True, views=0), "fixed views": dict(scale=0.5, views=2),
         "a cache": dict(scale=0.3, flip=True, views=0, cache=True, cache_size=70), "flips": dict(flip=True, views=0)}


@pytest.mark.parametrize("how", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("size", [32, 20, 64])
def test_the_device_makes_of_crops_what_the_loader_makes(folder, how, size):
    cfg = DataConfig(**{"frames": 3, "size": size, "cache": False, **how})
    tokenizer, sent = tokenizer_of(folder), set()
    for seed in range(4):
        here, there = (Clips(rows_of(folder), replace(cfg, on_device=on), seed, cache_folder=str(folder))
                       for on in (False, True))
        a, b = [[clips[n] for n in range(24)] for clips in (here, there)]
        for x, y in zip(a, b, strict=True):
            assert replace(x, video=None) == replace(y, video=None)
            h, w = y.video.shape[2:]
            assert h * w <= 4 * size ** 2 and y.video.dtype == torch.uint8
            sent.add((h, w) == (size, size))
        for x, y in zip(batches(a, tokenizer), batches(b, tokenizer), strict=True):
            assert x.crops is None and x.to("cpu").video is x.video
            if y.crops is not None:
                assert y.video is None and y.crops.shape == (sum(np.prod(s) for s in y.shapes),)
            moved = y.to("cpu")
            assert moved.video.shape == (4, 3, 3, size, size) and torch.equal(moved.video, x.video)
            assert moved.crops is None and moved.shapes == []
            for name in ("ids", "media", "clip", "view"):
                assert torch.equal(getattr(moved, name), getattr(x, name))
            assert (moved.captions, moved.stills, moved.seed, moved.lost) == (x.captions, x.stills, x.seed, x.lost)
    assert sent == {True, False} if size < 64 else False in sent            # what is much larger is sent resized


def test_what_is_larger_than_four_times_the_view_is_resized_before_it_is_sent():
    for H, W, size, left in ((64, 64, 32, True), (64, 65, 32, False), (16, 256, 32, True), (1, 1, 32, True)):
        x = picture(2, H, W)
        view = train_view(x, size, 1.0, False, np.random.default_rng(0), on_device=True)
        assert torch.equal(view, x if left else decoding.resize(x, (size, size)))


def test_crops_that_are_all_of_one_shape_are_resized_too(folder):
    cfg, tokenizer = DataConfig(frames=3, size=32, cache=False), tokenizer_of(folder)
    for name in ("of", "exact"):
        here, there = ([Clips(rows_of(folder, [name] * 4), replace(cfg, on_device=on))[n] for n in range(4)]
                       for on in (False, True))
        batch = collate(there, tokenizer, 8, seed=0)
        assert (batch.crops is None) == (name == "exact")
        assert torch.equal(batch.to("cpu").video, torch.stack([s.video for s in here]))


def test_scored_clips_are_resized_where_they_are_read(folder):
    clips = [Clips(rows_of(folder), DataConfig(frames=3, size=32, cache=False, on_device=on), train=False)
             for on in (False, True)]
    assert all(same(clips[0][n], clips[1][n]) and clips[1][n].video.shape[2:] == (32, 32) for n in range(len(SIZES)))
    assert collate([clips[1][n] for n in range(4)], tokenizer_of(folder), 8, seed=0).crops is None


def test_crops_go_in_one_copy_and_what_the_host_asks_for_stays(folder, monkeypatch):
    clips = Clips(rows_of(folder), DataConfig(frames=3, size=32, cache=False, on_device=True))
    batch = collate([clips[n] for n in range(6)], tokenizer_of(folder), 8, seed=0)
    copied, real = [], torch.Tensor.to

    def to(self, *args, **kwargs):
        if args and args[0] == "meta":
            copied.append((self.data_ptr(), kwargs))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = batch.to("meta", non_blocking=True)
    assert sorted(p for p, _ in copied if p == batch.crops.data_ptr()) == [batch.crops.data_ptr()]
    assert all(kwargs == {"non_blocking": True} for _, kwargs in copied)
    assert not {batch.clip.data_ptr(), batch.view.data_ptr()} & {p for p, _ in copied}
    assert moved.video.is_meta and moved.video.shape == (6, 3, 3, 32, 32) and moved.ids.is_meta and moved.media.is_meta
    assert moved.clip.tolist() == batch.clip.tolist() and moved.view.tolist() == batch.view.tolist()
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.data_ptr()) or x)
    again = batch.pin_memory()
    assert batch.crops.data_ptr() in pinned and again.shapes == batch.shapes and again.size == batch.size == 32


@pytest.mark.parametrize("workers", [0, 2])
def test_mixtures_losses_and_loader_processes_change_nothing(folder, workers):
    os.remove(folder / "odd.mkv")                                           # and gives its place to others
    cfg = DataConfig(frames=3, size=32, cache=False, scale=0.5, flip=True, views=0)
    tokenizer, found = tokenizer_of(folder), []
    for on in (False, True):
        own = replace(cfg, on_device=on)
        images = Clips(rows_of(folder, first=9), replace(own, frames=1), 5, first=6)
        mix = Mix(Clips(rows_of(folder), own, 5), images, 4)
        order = [range(i, i + 4) for i in range(0, 32, 4)]
        loader = torch.utils.data.DataLoader(mix, batch_sampler=order, num_workers=workers,
                                             collate_fn=partial(collate, tokenizer=tokenizer, length=8, seed=0))
        found.append([batch.to("cpu") for batch in loader])
    assert {batch.video.shape[1] for batch in found[0]} == {1, 3} and any(batch.lost for batch in found[0])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.clip, b.clip)
        assert (a.captions, a.lost) == (b.captions, b.lost)
