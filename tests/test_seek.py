"""
Seeking against a full decode from the start of the file, written independently; what a frame costs; damaged files.
"""

from unittest import mock

import av
import numpy as np
import pytest
import torch
from helpers.videos import break_packets, cut, write_noise

import video
from video import read_frames


def parameters(**params):
    return ":".join(f"{name.replace('_', '-')}={value}" for name, value in {"scenecut": 0, **params}.items())


def x264(**params):
    return {"x264-params": parameters(**params)}


def x265(**params):
    return {"codec": "libx265", "preset": "ultrafast",
            "x265-params": parameters(log_level="none", pools=1, frame_threads=1, **params)}


OPEN = dict(keyint=12, min_keyint=12, bframes=4, b_pyramid="normal", open_gop=1, b_adapt=0)
HEVC_OPEN = {"g": "12", **x265(bframes=4, open_gop=1, b_adapt=0)}
SHORT_GOP = {"bf": "2", "g": "12"}
FINE = {"qmin": "2", "qmax": "2"}               # no picture has a few bytes alone, as one that is not coded has
LATE = {"pts": lambda i: i + 500}
UNEVEN = {"pts": lambda i: i * i // 7 + i}
EDITED = {"pts": lambda i: i - 17}              # the file begins with an edit list, in the middle of a GOP

COUNTED = "counted"             # its frames are decoded once to count them, and once more
# title: (file name, write options, whether its keyframes are used)
FILES = {
    "h264 defaults": ("a.mp4", {}, True),
    "h264 keyint 10": ("a.mp4", x264(keyint=10), True),
    "h264 pyramid": ("a.mp4", x264(keyint=24, bframes=7, b_pyramid="normal", b_adapt=0), True),
    "h264 strict pyramid": ("a.mp4", x264(keyint=24, bframes=5, b_pyramid="strict", b_adapt=0), True),
    "h264 open": ("a.mp4", x264(**OPEN), True),
    "h264 open mkv": ("a.mkv", x264(**OPEN), True),
    "h264 open ts": ("a.ts", x264(**OPEN), True),
    "h264 intra refresh": ("a.mp4", x264(keyint=20, intra_refresh=1, bframes=0), False),
    "h264 intra refresh mkv": ("a.mkv", x264(keyint=20, intra_refresh=1, bframes=0), False),
    "h264 intra refresh ts": ("a.ts", x264(keyint=20, intra_refresh=1, bframes=0), False),
    "h264 all intra": ("a.mp4", x264(keyint=1), True),
    "h264 no B-frames": ("a.mov", x264(keyint=15, bframes=0, ref=1), True),
    "h264 interlaced": ("a.mp4", x264(keyint=15, tff=1, bframes=3), COUNTED),
    "h264 slices": ("a.mp4", x264(keyint=15, slices=4), True),
    "h264 mkv": ("a.mkv", x264(keyint=16), True),
    "h264 ts": ("a.ts", x264(keyint=16), True),
    "h264 flv": ("a.flv", x264(keyint=16), True),
    "h264 avi": ("a.avi", x264(keyint=16, bframes=0), False),
    "h264 raw": ("a.h264", x264(keyint=16), COUNTED),
    "h264 fragments": ("a.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}, **x264(keyint=16)}, True),
    "h264 index first": ("a.mp4", {"container": {"movflags": "faststart"}, **x264(keyint=16)}, True),
    "h264 late start": ("a.mp4", {**LATE, **x264(keyint=16)}, True),
    "h264 late start mkv": ("a.mkv", {**LATE, **x264(keyint=16)}, True),
    "h264 late start ts": ("a.ts", {**LATE, **x264(keyint=16)}, True),
    "h264 uneven times": ("a.mp4", {**UNEVEN, **x264(keyint=16)}, True),
    "h264 uneven times mkv": ("a.mkv", {**UNEVEN, **x264(keyint=16)}, True),
    "h264 edited": ("a.mp4", {**EDITED, **x264(keyint=12)}, True),
    "h264 edited open": ("a.mov", {**EDITED, **x264(**OPEN)}, True),
    "hevc": ("a.mp4", {"g": "16", **x265(open_gop=0)}, True),
    "hevc open": ("a.mp4", HEVC_OPEN, True),
    "hevc open mkv": ("a.mkv", HEVC_OPEN, True),
    "hevc open ts": ("a.ts", HEVC_OPEN, True),
    "hevc open edited": ("a.mp4", {**EDITED, **HEVC_OPEN}, True),
    "mpeg4": ("a.mp4", {"codec": "mpeg4", **SHORT_GOP, **FINE}, True),
    "mpeg4 mkv": ("a.mkv", {"codec": "mpeg4", **SHORT_GOP, **FINE}, True),
    "mpeg4 tiny": ("a.mp4", {"codec": "mpeg4", **SHORT_GOP}, COUNTED),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4", "bf": "0", "g": "12", **FINE}, False),
    "mpeg4 avi with B-frames": ("a.avi", {"codec": "mpeg4", **SHORT_GOP}, COUNTED),
    "mpeg2 ts": ("a.ts", {"codec": "mpeg2video", **SHORT_GOP}, True),
    "mpeg2 mkv": ("a.mkv", {"codec": "mpeg2video", **SHORT_GOP}, True),
    "mpeg2 mpg": ("a.mpg", {"codec": "mpeg2video", **SHORT_GOP}, False),
    "mpeg1 mkv": ("a.mkv", {"codec": "mpeg1video", **SHORT_GOP}, True),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "g": "15"}, True),
    "vp9 alt-ref": ("a.webm", {"codec": "libvpx-vp9", "deadline": "good", "cpu-used": "8", "g": "30",
                               "lag-in-frames": "16", "auto-alt-ref": "1"}, True),
    "vp8": ("a.webm", {"codec": "libvpx", "deadline": "realtime", "cpu-used": "8", "g": "15"}, True),
    "vp8 alt-ref": ("a.mkv", {"codec": "libvpx", "deadline": "good", "cpu-used": "8", "g": "30",
                              "lag-in-frames": "16", "auto-alt-ref": "1"}, True),
    "av1": ("a.mp4", {"codec": "libsvtav1", "preset": "12", "g": "16", "svtav1-params": "lp=1"}, True),
    "av1 mkv": ("a.mkv", {"codec": "libsvtav1", "preset": "12", "g": "16", "svtav1-params": "lp=1"}, True),
    "flv": ("a.flv", {"codec": "flv", "g": "12"}, False),
    "wmv": ("a.wmv", {"codec": "wmv2", "g": "12"}, COUNTED),
    "mjpeg": ("a.mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, False),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}, False),
}


def full_decode(path):
    """All frames (n, 3, H, W) that libav makes of a file, from its start, in presentation order."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    if all(frame.pts is not None for frame in frames) and not path.endswith("avi"):
        frames.sort(key=lambda frame: frame.pts)
    return torch.stack([to_tensor(frame) for frame in frames])


def to_tensor(frame):
    return torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


@pytest.fixture(scope="module", params=FILES, ids=FILES)
def film(request, tmp_path_factory):
    """(path, all its frames, whether its keyframes are used)"""
    name, options, seekable = FILES[request.param]
    path = write_noise(tmp_path_factory.mktemp("film") / name, **options)
    return path, full_decode(path), seekable


def read(path, indices):
    frames = video.iter_frames(path, lambda _: list(indices))
    return torch.stack([video.frame_to_tensor(frame, None) for frame in frames])


class Proxy:
    def __init__(self, wrapped, counts):
        self.__dict__.update(wrapped=wrapped, counts=counts)

    def __getattr__(self, name):
        return getattr(self.wrapped, name)


class CountedPacket(Proxy):
    def __bytes__(self):
        return bytes(self.wrapped)

    def decode(self):
        self.counts["packets"] += self.wrapped.size > 0
        frames = self.wrapped.decode()
        self.counts["frames"] += len(frames)
        return frames


class CountedContainer(Proxy):
    def demux(self, stream):
        return (CountedPacket(packet, self.counts) for packet in self.wrapped.demux(stream))

    def seek(self, *args, **kwargs):
        self.counts["seeks"] += 1
        return self.wrapped.seek(*args, **kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wrapped.close()


class Counts(dict):
    """Seeks, packets decoded, frames that came of them, and full decodes since the last reset."""

    def reset(self):
        self.update(seeks=0, packets=0, frames=0, full=0)


@pytest.fixture
def counts(monkeypatch):
    counts = Counts()
    counts.reset()
    open_video, iter_frames_sequential = video.open_video, video.iter_frames_sequential

    def counted_open(path):
        container, stream = open_video(path)
        return CountedContainer(container, counts), stream

    def counted_full(*args):
        counts["full"] += 1
        return iter_frames_sequential(*args)

    monkeypatch.setattr(video, "open_video", counted_open)
    monkeypatch.setattr(video, "iter_frames_sequential", counted_full)
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Intact files

def test_any_frames_equal_those_of_a_full_decode(film):
    path, frames, _ = film
    n = len(frames)
    assert torch.equal(read_frames(path, 0), frames)
    choices = [[0], [n - 1], [0, n - 1], [n // 2] * 3, range(n // 2, n // 2 + 9), range(0, n, 7)]
    for seed in range(12):
        draw = np.random.default_rng(seed)
        choices.append(np.sort(draw.integers(n, size=draw.integers(1, 6))))
    for indices in choices:
        assert torch.equal(read(path, indices), frames[list(indices)]), list(indices)
    for seed in range(3):
        indices = video.sample_frame_indices(4, n, "random", np.random.default_rng(seed))
        assert torch.equal(read_frames(path, 4, "random", np.random.default_rng(seed)), frames[indices])


def test_one_frame_costs_no_more_than_its_group_of_pictures(film, counts):
    path, frames, seekable = film
    n = len(frames)
    for i in (*range(n - 13, n), n // 2, 0):                                # a whole GOP, and frames shown before it
        counts.reset()
        assert torch.equal(read(path, [i]), frames[[i]])
        if seekable is True:
            assert counts["full"] == 0 and counts["seeks"] == 1
            assert counts["packets"] <= 50                                  # of 120; the longest GOP has 40
        else:
            assert counts["full"] == (i > 0 or not counts["seeks"])
            num_counted = 120 if seekable == COUNTED else 0
            assert counts["packets"] <= num_counted + i + 6 + 20 * counts["seeks"]      # no more than up to the frame


def list_packets(path):
    """(pts, whether a keyframe) of the packets, in file order."""
    with av.open(path) as container:
        return [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]


# frame indices: seeks, and packets at most
GOP_20 = [(range(120), 1, 120), (range(40, 60), 1, 30), ([41, 44, 59], 1, 30), ([0, 119], 2, 45), ([41, 45, 99], 2, 55),
          (range(1, 120, 2), 1, 120)]
GOP_1 = [(range(120), 1, 120), (range(40, 60), 1, 20), ([41, 44, 59], 3, 3), (range(1, 120, 2), 60, 60)]


@pytest.mark.parametrize("options, reads", [(x264(keyint=20, b_adapt=0), GOP_20), (x264(keyint=20, bframes=0), GOP_20),
                                            (x264(keyint=1), GOP_1)], ids=["B-frames", "no B-frames", "all intra"])
def test_frames_of_one_gop_are_read_without_a_second_seek(tmp_path, counts, options, reads):
    path = write_noise(tmp_path / "a.mp4", **options)
    expected = full_decode(path)
    for indices, seeks, most in reads:
        counts.reset()
        assert torch.equal(read(path, indices), expected[list(indices)])
        assert counts["full"] == 0 and counts["seeks"] == seeks and counts["packets"] <= most, (indices, counts)


def test_non_reference_frames_are_skipped(tmp_path, counts):
    path = write_noise(tmp_path / "a.mp4", **x264(keyint=200, bframes=3, b_pyramid="none", b_adapt=0))
    read(path, [119])
    assert counts["packets"] == 120 and 30 <= counts["frames"] <= 34        # every fourth
    counts.reset()
    read(path, range(120))
    assert counts["packets"] == counts["frames"] == 120
    counts.reset()
    read(write_noise(tmp_path / "b.mp4", **{"g": "200", **x265(bframes=3, b_adapt=0)}), [119])
    assert counts["packets"] == counts["frames"] == 120                     # HEVC's are not known


def test_the_file_is_opened_once(tmp_path):
    path = write_noise(tmp_path / "a.mp4", n=60, **x264(keyint=10))
    with mock.patch.object(av, "open", wraps=av.open) as opened:
        read_frames(path, 4)
    assert opened.call_count == 1


def seek_fails(seek, offset, stream):
    raise av.error.PermissionError(1, "no seeking")


WRONG_SEEKS = {
    "late": lambda seek, offset, stream: seek(offset + 15 * 512 * 3, stream=stream, backward=False),
    "early": lambda seek, offset, stream: seek(0, stream=stream),
    "between keyframes": lambda seek, offset, stream: seek(offset + 512 * 4, stream=stream, any_frame=True),
    "no move": lambda seek, offset, stream: None,
    "an error": seek_fails,
}


@pytest.mark.parametrize("kind", WRONG_SEEKS)
def test_frames_are_the_same_if_a_seek_lands_elsewhere(tmp_path, counts, monkeypatch, kind):
    path = write_noise(tmp_path / "a.mp4", **x264(keyint=15))
    expected, open_video = full_decode(path), video.open_video

    def open_with_wrong_seek(path):
        container, stream = open_video(path)
        container.seek = lambda offset, stream: WRONG_SEEKS[kind](container.wrapped.seek, offset, stream)
        return container, stream

    monkeypatch.setattr(video, "open_video", open_with_wrong_seek)
    for indices in ([70], [3, 50, 51, 110], [119], range(120)):
        counts.reset()
        assert torch.equal(read(path, indices), expected[list(indices)])
        assert counts["full"] == (kind != "early")


def change_packets(monkeypatch, change):
    """Read every list of packets as if packet i were change(i, packet)."""
    frame_timestamps = video.frame_timestamps

    def changed(container, stream):
        pts, seconds, packets = frame_timestamps(container, stream)
        return pts, seconds, [change(i, packet) for i, packet in enumerate(packets)]

    monkeypatch.setattr(video, "frame_timestamps", changed)


def test_packets_falsely_marked_as_keyframes_are_detected(tmp_path, monkeypatch):
    path = write_noise(tmp_path / "a.mp4", **x264(keyint=30, b_adapt=0))
    expected = full_decode(path)
    change_packets(monkeypatch, lambda i, packet: packet._replace(is_keyframe=packet.is_keyframe or i % 7 == 0))
    monkeypatch.setattr(video, "NONREF_SKIPPABLE", ())
    for seed in range(10):
        indices = np.sort(np.random.default_rng(seed).integers(120, size=4))
        assert torch.equal(read(path, indices), expected[indices])


def test_packets_that_differ_after_a_seek_are_detected(tmp_path, monkeypatch, counts):
    path = write_noise(tmp_path / "a.mp4", **x264(keyint=30))
    expected = full_decode(path)
    change_packets(monkeypatch, lambda i, packet: packet._replace(size=packet.size + (i % 30 == 20)))
    for i, full in ((5, 0), (28, 1), (65, 0), (119, 1)):
        counts.reset()
        assert torch.equal(read(path, [i]), expected[[i]]) and counts["full"] == full


def test_a_missing_frame_is_not_replaced_by_the_next(tmp_path, monkeypatch, counts):
    path = write_noise(tmp_path / "a.mp4", **x264(keyint=30))
    expected, decode_from_keyframe = full_decode(path), video.decode_from_keyframe

    def incomplete(container, stream, packets, key, packet_of_pts, chosen):
        pts = sorted(packet_of_pts)
        for i, frame in decode_from_keyframe(container, stream, packets, key, packet_of_pts, chosen):
            if pts.index(frame.pts) not in (50, 119):
                yield i, frame

    monkeypatch.setattr(video, "decode_from_keyframe", incomplete)
    for indices, full in (([50], 1), ([12, 50, 70], 1), ([119], 1), ([49, 51, 118], 0)):
        counts.reset()
        assert torch.equal(read(path, indices), expected[indices]) and counts["full"] == full


def test_a_frame_with_a_pts_that_no_packet_has_is_not_used(tmp_path, monkeypatch, counts):
    path = write_noise(tmp_path / "a.mp4", **x264(keyint=30, bframes=0))
    expected, decode_from_keyframe = full_decode(path), video.decode_from_keyframe
    unknown = sorted(pts for pts, _ in list_packets(path))[45]

    def without_one(container, stream, packets, key, packet_of_pts, chosen):
        packet_of_pts = {pts: i for pts, i in packet_of_pts.items() if pts != unknown}
        return decode_from_keyframe(container, stream, packets, key, packet_of_pts, chosen)

    monkeypatch.setattr(video, "decode_from_keyframe", without_one)
    assert torch.equal(read(path, [40, 48, 50]), expected[[40, 48, 50]]) and counts["full"] == 1
    assert torch.equal(read(path, [80]), expected[[80]]) and counts["full"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files

def full_decode_damaged(path):
    """
    (what is shown at each index, the number of frames that decode): each frame of a full decode; for a lost one the
    frame before it, or the first.
    """
    pts = sorted(pts for pts, _ in list_packets(path))
    decoded = {}
    with av.open(path) as container:
        for packet in container.demux(video=0):
            try:
                for frame in packet.decode():
                    decoded[frame.pts] = to_tensor(frame)
            except av.FFmpegError:
                pass
    previous = lambda time: max((t for t in decoded if t <= time), default=min(decoded))
    return [decoded[previous(time)] for time in pts], len(decoded)


@pytest.mark.parametrize("keyint, broken, reads", [
    (1, [0, 25, 26, 60, 119], [[0], [25], [26, 26], [1, 60], [119]]),
    (10, [25, 26, 60, 118], [[25], [26], [60, 60], [65], [118], [28, 61]]),
])
def test_a_lost_frame_is_replaced_by_the_one_before(tmp_path, counts, keyint, broken, reads):
    path = write_noise(tmp_path / "a.mp4", **x264(keyint=keyint, bframes=0, repeat_headers=0))
    intact = full_decode(path)
    expected, num_decoded = full_decode_damaged(break_packets(path, broken))
    assert 108 <= num_decoded < 120 and not torch.equal(expected[25], intact[25])
    random = [np.sort(np.random.default_rng(seed).integers(120, size=5)) for seed in range(12)]
    for indices in (*random, *reads, range(120)):
        assert torch.equal(read(path, indices), torch.stack([expected[i] for i in indices]))
    for indices in ([12], [40, 55, 59], [85, 105]):                         # away from the damage it costs nothing
        counts.reset()
        assert torch.equal(read(path, indices), intact[indices]) and counts["full"] == 0


B_FRAMES = dict(bframes=3, b_adapt=0, b_pyramid="none", repeat_headers=0)
MIXED = dict(bframes=2, b_adapt=0, b_pyramid="none", tff=1)                 # COUNTED


@pytest.mark.parametrize("name, options, broken", [
    ("a.mp4", x264(keyint=10, bframes=0, repeat_headers=0), [0]),
    ("a.mov", x264(keyint=10, bframes=0, repeat_headers=0), [0, 31]),
    ("a.mp4", x264(keyint=12, min_keyint=12, **B_FRAMES), [0, 1, 2]),
    ("a.mp4", x264(keyint=3, min_keyint=3, bframes=2, b_adapt=0, repeat_headers=0), [0, 25, 61]),
    ("a.mp4", {"g": "10", **x265(bframes=0, repeat_headers=0, keyint=10, min_keyint=10)}, [0]),
    ("a.mp4", {"g": "5", **x265(bframes=2, repeat_headers=0, keyint=5, min_keyint=5)}, [0, 61]),
    ("a.mp4", x264(keyint=120, **MIXED), [31]), ("a.mp4", x264(keyint=20, **MIXED), [31, 64, 92]),
    ("a.mov", {"codec": "mpeg4", "g": "1"}, [0, 30, 31]), ("a.mov", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}, [0, 30]),
], ids=lambda x: x if isinstance(x, str) else "")
def test_frames_behind_a_lost_one_keep_their_places(tmp_path, name, options, broken):
    path = break_packets(write_noise(tmp_path / name, **options), broken)
    expected, num_decoded = full_decode_damaged(path)
    assert 108 <= num_decoded < len(expected) == 120
    for indices in (range(120), [0], [11, 12, 40], [31, 32, 33], [60, 61, 119]):
        assert torch.equal(read(path, indices), torch.stack([expected[i] for i in indices])), list(indices)


@pytest.mark.parametrize("name, options", [
    ("a.mp4", x264(keyint=12, b_adapt=0)), ("a.mkv", x264(**OPEN)), ("a.ts", {"codec": "mpeg2video", **SHORT_GOP}),
    ("b.mp4", HEVC_OPEN), ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "g": "12"}),
], ids=["h264", "h264 open", "mpeg2", "hevc open", "vp9"])
def test_damage_in_one_gop_does_not_change_others(tmp_path, name, options):
    path = write_noise(tmp_path / name, **options)
    with av.open(path) as container:
        packets = [(p.pos, p.size, p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]
    intact, pts = full_decode(path), sorted(pts for _, _, pts, _ in packets)
    keyframes = [i for i, (*_, is_keyframe) in enumerate(packets) if is_keyframe]
    a, b = keyframes[4], keyframes[5]
    lost = [pts.index(time) for _, _, time, _ in packets[a:b]]
    far = [i for i in range(120) if i < min(lost) - 12 or i > max(lost) + 12]
    rng = np.random.default_rng(0)
    content = np.fromfile(path, np.uint8)
    for seed in range(6):
        damaged = content.copy()
        for pos, size, *_ in packets[a + seed % 3:b]:
            damaged[pos + rng.integers(min(24, size - 1), size, size=3)] ^= 85
        damaged.tofile(path)
        indices = np.sort(rng.choice(far, 4))
        assert torch.equal(read(path, indices), intact[indices])
        try:
            assert len(read_frames(path, 0)) == 120
        except ValueError as error:
            assert "frames do not decode" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("indices", [[60], [79], [0, 70], [65, 119], range(120)], ids=str)
def test_a_read_that_meets_damage_judges_the_whole_file(tmp_path, indices):
    path = break_packets(write_noise(tmp_path / "a.mp4", **x264(keyint=1)), range(60, 80))
    with pytest.raises(ValueError, match="a.mp4: 20 of 120 frames"):
        read(path, indices)
    for others in ([0], [59, 80], [119]):
        assert len(read(path, others)) == len(others)


def test_a_format_without_seeking_meets_all_damage_before_the_frame(tmp_path):
    path = break_packets(write_noise(tmp_path / "a.avi", codec="mpeg4", g="0"), range(60, 80))
    with pytest.raises(ValueError, match="a.avi: 20 of 120 frames"):
        read(path, [90])


def test_packets_missing_from_the_file_are_counted_before_decoding(tmp_path, counts):
    index_first = {"container": {"movflags": "+faststart"}, **x264(keyint=10)}
    path = cut(write_noise(tmp_path / "a.mp4", **index_first), 0.7)
    for indices in ([0], [100], range(120)):
        with pytest.raises(ValueError, match=r"a.mp4: \d+ of 120 frames"):
            read(path, indices)
    assert counts["packets"] == 0
    path = write_noise(tmp_path / "b.mp4", **index_first)
    intact = full_decode(path)
    cut(path, 0.97)
    assert torch.equal(read(path, [0, 30, 75]), intact[[0, 30, 75]]) and counts["full"] == 0
    last = read(path, [119])
    assert counts["full"] == 1 and torch.equal(last, read_frames(path, 0)[-1:])


@pytest.mark.parametrize("seconds", [0, 1.5])
def test_a_video_stream_without_frames_is_refused(tmp_path, monkeypatch, seconds):
    path = write_noise(tmp_path / "a.mp4", n=2)
    monkeypatch.setattr(video, "frame_timestamps", lambda *_: ([], np.zeros(0), []))
    with pytest.raises(ValueError, match="a.mp4: .*4 of 0 frames"):
        read_frames(path, 4, seconds=seconds)
