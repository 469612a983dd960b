"""Decoding of good and broken files, the two resizes, crops and patches."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from helpers.videos import (
    ODD_IMAGES,
    ODD_VIDEOS,
    TURNS,
    break_packets,
    cut,
    noise_frames,
    numbers,
    timed,
    turn,
    write,
)
from PIL import Image, ImageOps

import video
from video import decode_frames, read_frames, sample_frame_indices, train_transform

# ---------------------------------------------------------------------------------------------------------------------
# Which frames

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
def test_frames_are_read_in_presentation_order(tmp_path, file):
    path = write(tmp_path / file["name"], **{k: v for k, v in file.items() if k != "name"})
    frames = read_frames(path, 0)
    assert frames.shape == (50, 3, *file.get("shape", (48, 64))) and frames.dtype == torch.uint8
    assert numbers(frames) == list(range(50))
    assert numbers(read_frames(path, 4)) == [5, 18, 30, 43]                 # the middles of 0-11, 12-24, 25-36, 37-49
    assert numbers(read_frames(path, 50)) == list(range(50))


def test_random_frames_are_one_of_each_segment(tmp_path):
    path = write(tmp_path / "a.mp4")
    draws = np.array([numbers(read_frames(path, 4, "random", np.random.default_rng(i))) for i in range(12)])
    assert (draws >= [0, 12, 25, 37]).all() and (draws <= [11, 24, 36, 49]).all() and (np.ptp(draws, 0) > 4).all()
    assert draws[3].tolist() == numbers(read_frames(path, 4, "random", np.random.default_rng(3)))


@pytest.mark.parametrize("count, total", [(3, 7), (8, 8), (1, 5), (1, 1), (8, 300)])
def test_random_segments_cover_all_frames_of_the_video(count, total):
    rng = np.random.default_rng(0)
    draws = np.array([video.sample_frame_indices(count, total, "random", rng) for _ in range(3000)])
    assert (np.diff(draws, axis=1) > 0).all() and set(draws.flat) == set(range(total))


@pytest.mark.parametrize("count, total, strategy, message", [(0, 5, "middle", "0 of 5"), (4, 0, "middle", "4 of 0"),
                                                             (1, 1, "first", "strategy.*'first'")])
def test_impossible_frame_samples_are_refused(count, total, strategy, message):
    with pytest.raises(ValueError, match=message):
        video.sample_frame_indices(count, total, strategy)


@pytest.mark.parametrize("strategy", ["middle", "random"])
def test_last_frame_of_a_short_video_is_repeated(tmp_path, strategy):
    path = write(tmp_path / "short.mp4", n=5)
    assert numbers(read_frames(path, 8, strategy, np.random.default_rng(0))) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_only_the_first_seconds_are_used(tmp_path):
    path = write(tmp_path / "a.mp4")                                        # 10 frames a second
    for seconds, total in ((0, 50), (0.05, 1), (1, 10), (1.01, 10), (1.1, 11), (4.9, 49), (5, 50), (99, 50)):
        assert numbers(read_frames(path, 0, seconds=seconds)) == list(range(total))
    assert numbers(read_frames(path, 2, seconds=1)) == [2, 7]


RATES = [*(Fraction(1000 * n, 1001) for n in (12, 15, 24, 30, 48, 60)),
         *map(Fraction, (8, 12, 15, 24, 25, 30, 48, 50, 60, 120))]


def umt_num_frames(n, rate, seconds):
    """read_frames_decord of UMT: `if duration > 30: vlen = int(30 * fps)`; decord's fps is the mean rate."""
    fps = float(rate)
    duration = n / fps
    return int(seconds * fps) if duration > seconds else n


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.6g}")
@pytest.mark.parametrize("time_base", [None, Fraction(1, 1000), Fraction(1, 90000)], ids=["exact", "mkv", "ts"])
def test_the_first_seconds_are_those_of_umt(rate, time_base):
    for seconds, first in itertools.product((10, 30), (0, 2)):              # first: B-frames delay the first frame
        border = int(seconds * rate)
        times = [Fraction(first + i) / rate for i in range(3 * border)]
        if time_base:
            times = [round(time / time_base) * time_base for time in times]
        times = np.array([float(time - times[0]) for time in times])
        for n in (1, 2, *range(border - 9, border + 20), 3 * border):
            assert video.num_frames_within(times[:n], seconds) == umt_num_frames(n, rate, seconds), n


def test_frames_of_a_variable_rate_that_end_in_time_are_used(tmp_path):
    path = timed(tmp_path / "a.mkv", [0, 40, 45, 300, 301, 900, 2000, 9000])
    for seconds, total in ((0.02, 1), (0.045, 2), (0.29, 2), (0.7, 4), (1, 5), (2, 6), (8.9, 6), (9, 7), (99, 8)):
        assert numbers(read_frames(path, 0, seconds=seconds)) == list(range(total))


def test_one_frame_videos_and_images_can_be_read(tmp_path):
    path = write(tmp_path / "one.mp4", n=1)
    assert numbers(read_frames(path, 1)) == numbers(read_frames(path, 0)) == [0]
    path = write(tmp_path / "one.png", n=1, codec="png", pix_fmt="rgb24", shape=(51, 35), format="image2", rate=1)
    assert numbers(read_frames(path, 1)) == [0]


@pytest.mark.parametrize("name", ODD_VIDEOS)
def test_unusual_videos_are_read_like_any_other(tmp_path, name):
    frames = read_frames(ODD_VIDEOS[name](tmp_path / name), 0)
    expected = [0] if name == "one frame.mp4" else list(range(8))
    assert np.abs(np.subtract(numbers(frames), expected)).max() <= ("10 bits" in name or "vp8" in name)
    shapes = {"odd": (51, 35), "wide": (16, 160), "tiny": (2, 2), "clockwise": (64, 48), "counter-clockwise": (64, 48),
              "upside down": (48, 64)}
    assert frames.shape[2:] == shapes.get(name.rpartition(".")[0], (32, 48))


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_images_are_videos_of_one_upright_frame(tmp_path, name):
    path = ODD_IMAGES[name](tmp_path / name)
    frames = read_frames(path, 1)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert frames.shape == (1, 3, *expected.shape[:2])
    # Decoders interpolate halved colours in different ways, which shows where quarters meet.
    assert np.abs(frames[0].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 6


def test_frames_before_the_start_of_an_edited_file_are_not_shown(tmp_path):
    path = write(tmp_path / "a.mp4", n=30, pts=lambda i: i - 5, bf="2")     # five frames have negative times
    assert numbers(read_frames(path, 0)) == list(range(5, 30))


@pytest.mark.parametrize("turns, matrix", TURNS.values(), ids=TURNS)
def test_turned_videos_are_read_upright(tmp_path, turns, matrix):
    quarters = np.kron(np.array([[20, 90], [160, 230]], np.uint8), np.ones((24, 32), np.uint8))    # (48, 64)
    quarters = np.repeat(quarters[..., None], 3, axis=2)
    path = str(tmp_path / "a.mp4")
    video.write_video(path, np.stack([quarters] * 9), qp="1")
    turn(path, matrix)
    expected = np.rot90(quarters, turns).transpose(2, 0, 1)                 # counter-clockwise
    for frames in (read_frames(path, 0), read_frames(path, 4)):
        assert frames.shape[1:] == expected.shape
        assert (frames.float() - torch.tensor(expected.copy(), dtype=torch.float32)).abs().mean() < 3
    frames = decode_frames(path, lambda times: [0, 5], 24)
    assert frames.shape == ((2, 3, 32, 24) if turns % 2 else (2, 3, 24, 32))
    corners = frames[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]].int()
    assert (corners - torch.tensor(np.rot90([[20, 90], [160, 230]], turns).ravel().copy())).abs().max() < 12


def test_frame_sizes_that_change_within_a_video_are_refused(monkeypatch):
    frames = [av.VideoFrame.from_ndarray(np.zeros((H, 8, 3), np.uint8), format="rgb24") for H in (8, 8, 9)]
    monkeypatch.setattr(video, "iter_frames", lambda path, select: iter(frames))
    with pytest.raises(ValueError, match="^a.mp4: .*size"):
        video.decode_frames("a.mp4", None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files

INTRA = {"x264-params": "keyint=1:repeat-headers=0"}


@pytest.mark.parametrize("name, options", [("a.mp4", INTRA), ("a.avi", dict(codec="mpeg4", g="0", bf="0"))])
def test_frames_that_do_not_decode_are_replaced_by_the_previous(tmp_path, name, options):
    path = break_packets(write(tmp_path / name, **options), [0, 10, 30, 31, 49])
    expected = list(range(50))
    expected[10], expected[30], expected[31], expected[49] = 9, 29, 29, 48
    expected[0] = 1                                                         # nothing comes before the first
    assert numbers(read_frames(path, 0)) == expected
    assert numbers(read_frames(path, 25)) == expected[::2]


@pytest.mark.parametrize("n, broken", [(50, 12), (5, 5), (1, 1)])
def test_videos_with_more_than_a_tenth_lost_are_refused(tmp_path, n, broken):
    first = 20 if n == 50 else 0
    path = break_packets(write(tmp_path / "a.mp4", n=n, **{"x264-params": "keyint=1"}), range(first, first + broken))
    for count in (1, 8, 0):                                                 # whichever frames are requested
        with pytest.raises(ValueError, match=f"a.mp4: {broken} of {n} frames"):
            read_frames(path, count)


def test_files_that_are_no_videos_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("these are words\n" * 100)
    write(tmp_path / "sound.mp4", audio=True, video=False)
    cut(write(tmp_path / "cut.mp4"), 0.2)                                   # its index was at the end
    cut(write(tmp_path / "half.mp4", container={"movflags": "+faststart"}, qp="1"), 0.8)    # its index lists all 50
    reasons = {"empty": "Invalid data", "text": "Invalid data", "sound": "no video stream", "cut": "Invalid data",
               "half": "of 50 frames"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{name}.mp4: .*{reason}") as error:
            read_frames(str(tmp_path / f"{name}.mp4"), 1)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.mp4: no such file"):
        read_frames(str(tmp_path / "none.mp4"), 1)


@pytest.mark.parametrize("name, codec", [("a.mp4", b"avc1"), ("a.mkv", b"V_MPEG4/ISO/AVC"), ("a.avi", b"FMP4")])
def test_videos_of_an_unknown_codec_are_refused(tmp_path, name, codec):
    path = write(tmp_path / name, codec="mpeg4" if name == "a.avi" else "libx264")
    with open(path, "rb") as f:
        content = f.read()
    assert codec in content
    with open(path, "wb") as f:
        f.write(content.replace(codec, b"zzzz".ljust(len(codec), b"z")))
    with pytest.raises(ValueError, match=f"^{path}: ") as error:
        read_frames(path, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, options", [
    ("a.mp4", {}), ("b.mp4", {"container": {"movflags": "+faststart"}}), ("a.mkv", {}), ("a.avi", {"codec": "mpeg4"}),
    ("a.webm", {"codec": "libvpx"}),
])
def test_random_damage_gives_frames_or_a_one_line_error(tmp_path, name, options):
    rng, refused = np.random.default_rng(0), 0
    intact = np.fromfile(write(tmp_path / name, n=8, shape=(32, 48), **options), np.uint8)
    for _ in range(200):
        damaged, places = intact.copy(), rng.integers(len(intact), size=rng.integers(1, 6))
        damaged[places] = rng.choice([0, 127, 255, *rng.integers(256, size=3)], len(places))
        damaged[:len(damaged) - rng.choice([0, 0, 0, rng.integers(len(intact))])].tofile(tmp_path / name)
        try:
            assert read_frames(str(tmp_path / name), 4).shape[:2] == (4, 3)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{tmp_path / name}: ") and "\n" not in str(error)
    assert 20 < refused < 200


# ---------------------------------------------------------------------------------------------------------------------
# Images

@pytest.mark.parametrize("shape", [(16, 16), (40, 13), (9, 50), (1, 1), (31, 47)], ids=str)
def test_resize_is_antialiased_bicubic_rounded_once(shape):
    x = noise_frames(2, 31, 47)
    for frames in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = nnf.interpolate(frames.double(), shape, mode="bicubic", antialias=True).round().clamp(0, 255)
        resized = video.resize(frames, shape)
        assert resized.dtype == torch.uint8 and resized.shape == (2, 3, *shape)
        off = (resized.double() - expected).abs()
        assert off.max() <= 1 and (off > 0).double().mean() < 1e-3          # fp32 may round another way
    assert torch.equal(video.eval_transform(x, 20), video.resize(x, (20, 20)))


@pytest.mark.parametrize("number, mode", video.RESAMPLE_MODES.items())
@pytest.mark.parametrize("size", [(20, 28), (31, 20), (20, 47), (60, 90), (31, 47)], ids=str)
def test_resize_like_pillow_matches_pillow(number, mode, size):
    images = noise_frames(2, 31, 47)
    expected = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize(size[::-1], number) for x in images]
    expected = torch.from_numpy(np.stack([np.asarray(x) for x in expected])).permute(0, 3, 1, 2)
    resized = video.resize_like_pillow(images.view(2, 1, 3, 31, 47), size, mode)
    assert resized.shape == (2, 1, 3, *size)
    off = (resized[:, 0] - expected).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.02
    assert torch.equal(resized, resized.round()) and resized.amin() >= 0 and resized.amax() <= 255


def test_patchify_flattens_patches_like_a_convolution_weight():
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    expected = nnf.conv2d(pixels, weight, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(video.patchify(pixels, 2) @ weight.flatten(1).T, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="patch_size.*6 x 8 and 4"):
        video.patchify(pixels, 4)


def test_frames_are_reduced_to_their_short_side(tmp_path):
    path = write(tmp_path / "a.mp4", shape=(48, 64))
    read = lambda size: decode_frames(path, lambda times: sample_frame_indices(4, len(times)), size)
    assert read(24).shape == (4, 3, 24, 32) and read(50).shape == read(100).shape == (4, 3, 48, 64)
    assert numbers(read(12)) == [5, 18, 30, 43]


@pytest.mark.parametrize("H, W", [(60, 80), (4, 300), (300, 4), (1, 1), (33, 33)])
def test_crops_lie_inside_are_large_enough_and_reach_every_edge(H, W, monkeypatch):
    crops = []
    monkeypatch.setattr(video, "resize", lambda frames, shape: crops.append(frames) or frames)
    position = torch.stack([torch.arange(H)[:, None].expand(H, W), torch.arange(W).expand(H, W), torch.zeros(H, W)])
    for i in range(200):
        train_transform(position.expand(3, 3, H, W), 8, 0.5, False, np.random.default_rng(i))
    for crop in crops:
        h, w = crop.shape[2:]
        assert h >= 1 and w >= 1 and (crop == crop[:1]).all()               # one crop for all frames
        if min(H, W) > 4:
            assert h * w >= 0.5 * H * W - max(H, W) and 0.7 < w / h < 1.42
        else:
            assert max(h, w) <= 2 * min(h, w)
    if min(H, W) > 4:
        first = torch.stack([c[0, :2, 0, 0] for c in crops])                # (crops, 2): y, x
        last = torch.stack([c[0, :2, -1, -1] for c in crops])
        assert (first.amin(0) == 0).all() and (first.amax(0) > 5).all()
        for axis, side in enumerate((H, W)):
            moved = first[:, axis] > 0                                      # leaves out crops of the whole side
            assert last[moved, axis].max() == side - 1


def test_training_crops_follow_their_generator_and_half_are_flipped():
    x = noise_frames(2, 40, 52)
    views = [train_transform(x, 24, 0.5, True, np.random.default_rng(i)) for i in range(8)]
    assert all(v.shape == (2, 3, 24, 24) and v.dtype == torch.uint8 for v in views)
    assert torch.equal(views[5], train_transform(x, 24, 0.5, True, np.random.default_rng(5)))
    assert not any(torch.equal(views[0], v) for v in views[1:])
    assert torch.equal(train_transform(x, 24, 1.0, False, np.random.default_rng(0)), video.eval_transform(x, 24))
    mirrored = video.eval_transform(x.flip(-1), 24)
    flipped = [torch.equal(train_transform(x, 24, 1.0, True, np.random.default_rng(i)), mirrored) for i in range(60)]
    assert 18 < sum(flipped) < 42


@pytest.mark.parametrize("H, W, is_left", [(64, 64, True), (64, 65, False), (16, 256, True), (1, 1, True)])
def test_crops_above_four_times_the_size_are_not_left_to_the_device(H, W, is_left):
    x = noise_frames(2, H, W)
    view = train_transform(x, 32, 1.0, False, np.random.default_rng(0), resize_on_device=True)
    assert torch.equal(view, x if is_left else video.resize(x, (32, 32)))
