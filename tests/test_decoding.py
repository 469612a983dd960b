"""Decoding of good and broken files, and the views of a clip. Frame i of a test video is grey level 4 i + 20."""


import av
import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

import data
import decoding
from data import Clips, DataConfig
from decoding import read_frames, train_view


def write(path, n=50, codec="libx264", shape=(48, 64), pix_fmt="yuv420p", audio=False, video=True, container=None,
          **options):
    path = str(path)
    options = {"qmin": "1", "qmax": "1", **options} if codec == "mpeg4" else options
    with av.open(path, "w", options=container or {}) as out:
        if video:
            stream = out.add_stream(codec, rate=10, options=options)
            (stream.height, stream.width), stream.pix_fmt = shape, pix_fmt
        if audio:
            sound = out.add_stream("aac", rate=16000, layout="mono")
        for i in range(n if video else 0):
            grey = np.full((*shape, 3), 4 * i + 20, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        if video:
            out.mux(stream.encode())
        for i in range(n if audio else 0):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 1024 * i
            out.mux(sound.encode(silence))
        if audio:
            out.mux(sound.encode())
    return path


def numbers(frames):
    """Which frames these are, by their grey level; every pixel must agree."""
    level = (frames.float() - 20) / 4                                       # (T, 3, H, W)
    assert (level - level.mean((1, 2, 3), keepdim=True)).abs().max() < 0.9
    return level.mean((1, 2, 3)).round().int().tolist()


FILES = {
    "h264 with B-frames": dict(name="a.mp4", bf="3", g="12"),
    "h264 in mkv": dict(name="a.mkv", bf="2"),
    "h264 with sound": dict(name="a.mp4", audio=True),
    "h264 of odd size": dict(name="a.mp4", shape=(51, 35), pix_fmt="yuv444p"),
    "mpeg4": dict(name="a.mp4", codec="mpeg4"),
    "mpeg4 with B-frames in avi": dict(name="a.avi", codec="mpeg4", bf="2"),
    "mpeg4 of odd size": dict(name="a.avi", codec="mpeg4", shape=(51, 35)),
}


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_the_right_frames_come_in_the_right_order(tmp_path, file):
    path = write(tmp_path / file["name"], **{k: v for k, v in file.items() if k != "name"})
    frames = read_frames(path, 0)
    assert frames.shape == (50, 3, *file.get("shape", (48, 64))) and frames.dtype == torch.uint8
    assert numbers(frames) == list(range(50))
    assert numbers(read_frames(path, 4)) == [5, 18, 30, 43]                 # the middles of 0-11, 12-24, 25-36, 37-49
    assert numbers(read_frames(path, 50)) == list(range(50))


def test_random_frames_come_one_from_each_segment(tmp_path):
    path = write(tmp_path / "a.mp4")
    draws = np.array([numbers(read_frames(path, 4, "random", np.random.default_rng(i))) for i in range(12)])
    assert (draws >= [0, 12, 25, 37]).all() and (draws <= [11, 24, 36, 49]).all() and (np.ptp(draws, 0) > 4).all()
    assert draws[3].tolist() == numbers(read_frames(path, 4, "random", np.random.default_rng(3)))


@pytest.mark.parametrize("total, count", [(7, 3), (8, 8), (5, 1), (1, 1), (300, 8)])
def test_segments_cover_the_video_and_are_reached_to_their_ends(total, count):
    rng = np.random.default_rng(0)
    draws = np.array([decoding.pick(count, total, "random", rng) for _ in range(3000 if total < 10 else 50)])
    assert (np.diff(draws, axis=1) > 0).all() and draws.min() >= 0 and draws.max() < total
    assert total > 10 or set(draws.flat) == set(range(total))
    with pytest.raises(ValueError, match="middle or random"):
        decoding.pick(1, 1, "first")


def test_a_video_of_one_frame_and_a_picture_can_be_read(tmp_path):
    path = write(tmp_path / "one.mp4", n=1)
    assert numbers(read_frames(path, 1)) == numbers(read_frames(path, 0)) == [0]
    with av.open(str(tmp_path / "one.png"), "w", format="image2") as out:
        stream = out.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 51, 35, "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((51, 35, 3), 24, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    assert numbers(read_frames(str(tmp_path / "one.png"), 1)) == [1]


def test_frames_before_the_start_of_an_edited_file_are_not_shown(tmp_path):
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as out:                                         # five frames have negative times
        stream = out.add_stream("libx264", rate=10, options={"bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * i + 20, np.uint8), format="rgb24")
            frame.pts = i - 5
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert numbers(read_frames(path, 0)) == list(range(5, 30))


def turn(path, matrix):
    """How the picture is to be shown, as a telephone writes it: the matrix of the track header."""
    with open(path, "r+b") as f:
        content = f.read()
        assert content.count(b"tkhd") == 1
        f.seek(content.index(b"tkhd") + 4 + 40)
        f.write(np.array(matrix, ">i4").tobytes())
    return path


ONE = 1 << 16
TURNS = {"clockwise": (-1, [0, ONE, 0, -ONE, 0, 0, 48 * ONE, 0, 1 << 30]),
         "upside down": (2, [-ONE, 0, 0, 0, -ONE, 0, 64 * ONE, 48 * ONE, 1 << 30]),
         "counter-clockwise": (1, [0, -ONE, 0, ONE, 0, 0, 0, 64 * ONE, 1 << 30]),
         "not": (0, [ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30])}


@pytest.mark.parametrize("turns, matrix", TURNS.values(), ids=TURNS)
def test_a_video_is_seen_upright(tmp_path, turns, matrix):
    quarters = np.kron(np.array([[20, 90], [160, 230]], np.uint8), np.ones((24, 32), np.uint8))    # (48, 64)
    quarters = np.repeat(quarters[..., None], 3, axis=2)
    path = str(tmp_path / "a.mp4")
    decoding.write_video(path, np.stack([quarters] * 9), qp="1")
    turn(path, matrix)
    want = np.rot90(quarters, turns).transpose(2, 0, 1)                     # counter-clockwise
    for frames in (read_frames(path, 0), read_frames(path, 4)):
        assert frames.shape[1:] == want.shape
        assert (frames.float() - torch.tensor(want.copy(), dtype=torch.float32)).abs().mean() < 3
    cfg = DataConfig(frames=4, size=24, cache_frames=4)
    cache = data.decode_cache([data.Row(path, ["x"], None, 0)], cfg, str(tmp_path))
    assert cache[path].shape == ((4, 3, 32, 24) if turns % 2 else (4, 3, 24, 32))
    corners = cache[path][0, 0, [0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    assert np.abs(corners - np.rot90([[20, 90], [160, 230]], turns).ravel()).max() < 12


def break_packets(path, broken):
    """Overwrites the payload of these packets, which must be independent of one another."""
    with av.open(path) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    with open(path, "r+b") as f:
        for i in broken:
            f.seek(packets[i][0])
            f.write(b"\xff" * packets[i][1])
    return path


@pytest.mark.parametrize("name, codec, options", [("a.mp4", "libx264", {"x264-params": "keyint=1:repeat-headers=0"}),
                                                  ("a.avi", "mpeg4", {"g": "0", "bf": "0"})])
def test_a_frame_that_does_not_decode_shows_the_good_one_before_it(tmp_path, name, codec, options):
    path = break_packets(write(tmp_path / name, codec=codec, **options), [0, 10, 30, 31, 49])
    want = list(range(50))
    want[10], want[30], want[31], want[49] = 9, 29, 29, 48
    want[0] = 1                                                             # nothing comes before the first
    assert numbers(read_frames(path, 0)) == want
    assert numbers(read_frames(path, 25)) == want[::2]


def test_a_video_that_lost_more_than_a_tenth_is_refused(tmp_path):
    intra = {"x264-params": "keyint=1"}
    path = break_packets(write(tmp_path / "a.mp4", **intra), range(20, 32))
    for count in (1, 8, 0):                                                 # whichever frames are wanted
        with pytest.raises(ValueError, match="a.mp4: 12 of 50 frames do not decode"):
            read_frames(path, count)
    path = break_packets(write(tmp_path / "b.mp4", n=5, **intra), range(5))
    with pytest.raises(ValueError, match="b.mp4: 5 of 5 frames do not decode"):
        read_frames(path, 1)
    path = break_packets(write(tmp_path / "c.mp4", n=1, **intra), [0])
    with pytest.raises(ValueError, match="c.mp4: 1 of 1 frames do not decode"):
        read_frames(path, 1)


def cut(path, share):
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:int(share * len(content))])
    return path


def test_files_that_are_no_videos_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("these are words\n" * 100)
    write(tmp_path / "sound.mp4", audio=True, video=False)
    cut(write(tmp_path / "cut.mp4"), 0.2)                                   # its index was at the end
    noisy = {"container": {"movflags": "+faststart"}, "qp": "1"}
    cut(write(tmp_path / "half.mp4", **noisy), 0.8)                         # its index promises all 50
    reasons = {"empty": "Invalid data", "text": "Invalid data", "sound": "no video stream", "cut": "Invalid data",
               "half": "of 50 frames do not decode"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{name}.mp4: .*{reason}") as error:
            read_frames(str(tmp_path / f"{name}.mp4"), 1)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.mp4: no such file"):
        read_frames(str(tmp_path / "none.mp4"), 1)


@pytest.mark.parametrize("name, codec", [("a.mp4", b"avc1"), ("a.mkv", b"V_MPEG4/ISO/AVC"), ("a.avi", b"FMP4")])
def test_a_video_of_an_unknown_codec_is_refused(tmp_path, name, codec):
    path = write(tmp_path / name, codec="mpeg4" if name == "a.avi" else "libx264")
    with open(path, "rb") as f:
        content = f.read()
    assert codec in content
    with open(path, "wb") as f:
        f.write(content.replace(codec, b"zzzz".ljust(len(codec), b"z")))
    with pytest.raises(ValueError, match=f"^{path}: ") as error:
        read_frames(path, 1)
    assert "\n" not in str(error.value)
    rows = [data.Row(path, ["x"], None, 0), data.Row(write(tmp_path / "good.mp4"), ["x"], None, 1)]
    clips = Clips(rows, DataConfig(max_bad=0.5), cache_folder=str(tmp_path))
    samples = [clips[n] for n in (0, 1)]
    assert [s.clip for s in samples] == [1, 1] and {about["video"] for s in samples for about in s.lost} == {path}


@pytest.mark.parametrize("name, how", [
    ("a.mp4", {}), ("b.mp4", {"container": {"movflags": "+faststart"}}), ("a.mkv", {}), ("a.avi", {"codec": "mpeg4"}),
    ("a.webm", {"codec": "libvpx"}),
])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path, name, how):
    rng, refused = np.random.default_rng(0), 0
    whole = np.fromfile(write(tmp_path / name, n=8, shape=(32, 48), **how), np.uint8)
    for _ in range(200):
        damaged, at = whole.copy(), rng.integers(len(whole), size=rng.integers(1, 6))
        damaged[at] = rng.choice([0, 127, 255, *rng.integers(256, size=3)], len(at))
        damaged[:len(damaged) - rng.choice([0, 0, 0, rng.integers(len(whole))])].tofile(tmp_path / name)
        try:
            assert read_frames(str(tmp_path / name), 4, size=16).shape[:2] == (4, 3)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)
    assert 20 < refused < 200


@pytest.mark.parametrize("sample", ["middle", "random"])
def test_of_a_short_video_the_last_frame_is_repeated(tmp_path, sample):
    short = write(tmp_path / "short.mp4", n=5)
    assert numbers(read_frames(short, 8, sample, np.random.default_rng(0))) == [0, 1, 2, 3, 4, 4, 4, 4]
    for cache in (False, True):
        cfg = DataConfig(frames=8, size=24, cache=cache)
        clips = Clips([data.Row(short, ["x"], None, 0)], cfg, train=sample == "random", cache_folder=str(tmp_path))
        assert numbers(clips[0].video) == [0, 1, 2, 3, 4, 4, 4, 4]


def picture(T, H, W, seed=0):
    """Noise beside black and white blocks, on which bicubic overshoots."""
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (T, 3, H, W), dtype=np.uint8))
    x[:, :, :H // 2] = torch.where(torch.arange(W) % 12 < 6, 0, 255).to(torch.uint8)
    return x


@pytest.mark.parametrize("shape", [(16, 16), (40, 13), (9, 50), (1, 1), (31, 47)], ids=str)
def test_resizing_is_antialiased_bicubic_rounded_and_clamped(shape):
    x = picture(2, 31, 47)
    for frames in (x, x.contiguous(memory_format=torch.channels_last)):
        want = nnf.interpolate(frames.double(), shape, mode="bicubic", antialias=True).round().clamp(0, 255)
        got = decoding.resize(frames, shape)
        assert got.dtype == torch.uint8 and got.shape == (2, 3, *shape)
        off = (got.double() - want).abs()
        assert off.max() <= 1 and (off > 0).double().mean() < 1e-3          # fp32 may round another way
    assert torch.equal(decoding.test_view(x, 20), decoding.resize(x, (20, 20)))


def test_frames_are_reduced_to_their_short_side(tmp_path):
    path = write(tmp_path / "a.mp4", shape=(48, 64))
    assert read_frames(path, 2, size=24).shape == (2, 3, 24, 32)
    assert read_frames(path, 2, size=50).shape == read_frames(path, 2, size=100).shape == (2, 3, 48, 64)
    assert numbers(read_frames(path, 4, size=12)) == [5, 18, 30, 43]


@pytest.mark.parametrize("H, W", [(60, 80), (4, 300), (300, 4), (1, 1), (33, 33)])
def test_a_crop_is_inside_large_enough_and_one_for_all_frames(H, W, monkeypatch):
    crops = []
    monkeypatch.setattr(decoding, "resize", lambda frames, shape: crops.append(frames) or frames)
    place = torch.stack([torch.arange(H)[:, None].expand(H, W), torch.arange(W).expand(H, W), torch.zeros(H, W)])
    for i in range(200):
        train_view(place.expand(3, 3, H, W), 8, 0.5, False, np.random.default_rng(i))
    for crop in crops:
        h, w = crop.shape[2:]
        assert h >= 1 and w >= 1 and (crop == crop[:1]).all()               # a slice cannot leave the frame
        if min(H, W) > 4:
            assert h * w >= 0.5 * H * W - max(H, W) and 0.7 < w / h < 1.42
        else:
            assert max(h, w) <= 2 * min(h, w)
    if min(H, W) > 4:
        first = torch.stack([c[0, :2, 0, 0] for c in crops])                # (crops, 2): y, x
        last = torch.stack([c[0, :2, -1, -1] for c in crops])
        assert (first.amin(0) == 0).all() and (first.amax(0) > 5).all()     # to every edge, and away from it
        for axis, side in enumerate((H, W)):
            moved = first[:, axis] > 0                                      # not those that take the whole side
            assert last[moved, axis].max() == side - 1


def test_a_view_follows_its_generator_and_flips_half_of_the_time():
    x = picture(2, 40, 52)
    views = [train_view(x, 24, 0.5, True, np.random.default_rng(i)) for i in range(8)]
    assert all(v.shape == (2, 3, 24, 24) and v.dtype == torch.uint8 for v in views)
    assert torch.equal(views[5], train_view(x, 24, 0.5, True, np.random.default_rng(5)))
    assert not any(torch.equal(views[0], v) for v in views[1:])
    assert torch.equal(train_view(x, 24, 1.0, False, np.random.default_rng(0)), decoding.test_view(x, 24))
    mirrored = decoding.test_view(x.flip(-1), 24)
    flipped = [torch.equal(train_view(x, 24, 1.0, True, np.random.default_rng(i)), mirrored) for i in range(60)]
    assert 18 < sum(flipped) < 42
