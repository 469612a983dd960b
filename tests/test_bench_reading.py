"""bench/reading.py: its files, its tables with other readers, without them and with wrong ones, its flags."""

import os
import re
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from helpers.runs import assert_one_line, command
from helpers.tables import markdown_tables

from bench import reading
from video import read_frames

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("videos"))


class Reader:
    """Reads as ours does, `shift` frames after those asked for, with the interface of torchcodec and decord."""
    shift = 0

    def __init__(self, path, **options):
        self.frames = read_frames(path, 0)
        assert options.get("num_threads", options.get("num_ffmpeg_threads")) == 1

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        return SimpleNamespace(data=self.frames[[(i + self.shift) % len(self) for i in indices]])

    def get_batch(self, indices):
        return SimpleNamespace(asnumpy=lambda: self.get_frames_at(indices).data.permute(0, 2, 3, 1).numpy())


@pytest.fixture
def install(monkeypatch):
    """install(torchcodec's reader, decord's reader); None for one that is not installed."""
    def install(torchcodec=None, decord=None):
        modules = {"torchcodec": torchcodec and SimpleNamespace(__version__="1.2"),
                   "torchcodec.decoders": torchcodec and SimpleNamespace(VideoDecoder=torchcodec),
                   "decord": decord and SimpleNamespace(VideoReader=decord)}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    return install


def run(capsys, folder, rate=0.0):
    """Run the benchmark on a file of 64 x 114 pixels -> its output."""
    capsys.readouterr()
    reading.main(reading.Config(sizes=(64,), seconds=(2,), frames=(3,), rounds=1, folder=folder, rate=rate))
    return capsys.readouterr().out


def rates(out, table):
    """The cells of a table's only row after T: of reading (0), samples (1) or batches (2)."""
    row = markdown_tables(out)[table][1]
    return row[row.index("3") + 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_a_file_is_what_its_name_says(folder):
    (name, path), = reading.write_videos(folder, (64,), (21,)).items()
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate) == (64, 114, 25)
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        is_key = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
        container.seek(0)
        kinds = [int(frame.pict_type) for frame in container.decode(stream)]    # 2: P, 3: B
    keys = np.flatnonzero(is_key)
    assert len(is_key) == 525 and keys[0] == 0 and np.diff([*keys, 525]).max() <= 250 and len(keys) == 3
    assert kinds.count(3) > kinds.count(2) > 50
    assert name == f"64p, 21 s, {os.path.getsize(path) * 8 / 21e6:.2f} Mbit/s"
    frames = read_frames(path, 0).float()
    steps = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
    assert steps.min() > reading.MAX_FRAME_DISTANCE         # the next frame counts as another one


def test_pictures_are_a_function_of_the_seed():
    draw = lambda *args: np.stack(list(reading.SyntheticVideo(*args)))
    frames = draw(64, 1)
    assert frames.shape == reading.SyntheticVideo(64, 1).shape == (25, 64, 114, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, draw(64, 1, 0)) and not np.array_equal(frames, draw(64, 1, 1))
    assert np.array_equal(frames, draw(64, 2)[:25])         # a longer video begins with the same frames
    assert 90 < frames.mean() < 165 and frames.std() > 25


def test_a_file_that_is_there_stays(folder):
    first, = reading.write_videos(folder, (64,), (2,)).values()
    before = os.stat(first).st_mtime_ns
    assert list(reading.write_videos(folder, (64,), (2,)).values()) == [first]
    assert os.stat(first).st_mtime_ns == before and not [name for name in os.listdir(folder) if "part" in name]


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def test_without_other_readers_the_rows_say_why(folder, install, capsys):
    install()
    out = run(capsys, folder)
    assert re.search(r"^decord .*failed: ModuleNotFoundError: .*decord", out, re.M)
    assert re.search(r"^torchcodec, approximate .*failed: ", out, re.M)
    ours, *others = rates(out, 0)
    assert float(ours) > 0 and others == ["not here", "", ""] * 3
    assert "--rate" in out.splitlines()[-1]


def test_readers_of_the_same_frames_are_timed_beside_ours(folder, install, capsys):
    install(Reader, Reader)
    out = run(capsys, folder)
    assert re.search(r"av \S+, torchcodec 1.2, decord", out) and "not here" not in out
    ours, *others = map(float, rates(out, 0))
    for rate, ratio, off in zip(others[::3], others[1::3], others[2::3], strict=True):
        assert ratio == pytest.approx(ours / rate, rel=0.02) and off == 0


def test_readers_that_fail_or_read_other_frames_are_not_timed(folder, install, capsys):
    shifted = type("Shifted", (Reader,), {"shift": 1})

    class Broken(Reader):
        def get_batch(self, indices):
            raise RuntimeError("no luck")

    install(shifted, Broken)
    cells = rates(run(capsys, folder), 0)
    assert float(cells[0]) > 0
    assert [cells[1], cells[4]] == ["OTHER FRAMES"] * 2 and not cells[2]
    assert float(cells[3]) > reading.MAX_FRAME_DISTANCE
    assert cells[7:] == ["failed: RuntimeError: no luck", "", ""]


def test_cores_are_the_rate_of_a_step_over_that_of_a_core(folder, install, capsys):
    install()
    out = run(capsys, folder, rate=1234.0)
    crop, sample, cached, on_device, jpegs = map(float, rates(out, 1))
    assert min(crop, cached, *map(float, rates(out, 2))) > 0
    lines = [line for line in out.splitlines() if line.startswith("Cores")]
    for line, way, clips in zip(lines, ("loader", "device", "JPEGs"), (sample, on_device, jpegs), strict=True):
        assert "1234 clips/s" in line and way in line and "T = 3: 64p, 2 s: " in line
        assert float(line.split()[-1]) == pytest.approx(1234 / clips, rel=0.02)


def test_cores_by_hand():
    results = {("no cache", 4, "240p, 10 s, 0.3 Mbit/s"): 25.0, ("no cache", 4, "720p, 60 s, 2 Mbit/s"): 0.5,
               ("cached", 8, "240p, 10 s, 0.3 Mbit/s"): "failed: no luck"}
    first, second = reading.cores_lines(100.0, results)
    assert "no cache, T = 4" in first and first.endswith("240p, 10 s: 4; 720p, 60 s: 200")
    assert "cached, T = 8" in second and second.endswith("240p, 10 s: failed: no luck")
    assert len(reading.cores_lines(0.0, results)) == 1


def test_functions_take_turns_on_one_core_and_failures_end_alone():
    calls, threads = [], torch.get_num_threads()

    def fail(n):
        if n == 2:
            raise ValueError("out of luck")

    with reading.one_core():
        if CORES:
            assert len(os.sched_getaffinity(0)) == 1
        clips = reading.clips_per_second([lambda n: calls.append(("a", n)), fail, lambda n: calls.append(("b", n))], 3)
    assert calls == [(name, n) for n in range(4) for name in "ab"]
    assert clips[1] == "failed: ValueError: out of luck" and min(clips[0], clips[2]) > 0
    assert torch.get_num_threads() == threads and (CORES is None or os.sched_getaffinity(0) == CORES)


@pytest.mark.parametrize("flags, message", [
    ("--sizes 241", "--sizes.*241"), ("--sizes 16", "--sizes.*16"), ("--seconds 0", "--seconds.* 0"),
    ("--frames 4 x", "--frames"), ("--rounds -1", "--rounds.*-1"), ("--rate nan", "--rate.*nan"),
    ("--rate -1", "--rate.*-1"),
])
def test_wrong_flags_end_with_one_message(flags, message, capsys):
    code, _, err = command("bench", ["reading", *flags.split()], capsys)
    assert_one_line("bench", code, err, message)
