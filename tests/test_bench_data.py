"""tools/bench_data.py: its files are what it says, its tables run with peers, without, and with one that is wrong."""

import argparse
import os
import re
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import decoding
from tools import bench_data

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
TINY = ["--sizes", "64", "--seconds", "2", "--frames", "3", "--rounds", "1"]


def parse(*args):
    top = argparse.ArgumentParser()
    bench_data.parser(top.add_subparsers(dest="command", required=True))
    return top.parse_args(["data", *args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("films"))


class Reader:
    """A peer that reads what ours reads, `late` frames after those asked for."""
    late = 0

    def __init__(self, path, **how):
        self.frames = decoding.read_frames(path, 0)
        assert how.get("num_threads", how.get("num_ffmpeg_threads")) == 1

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, where):
        return SimpleNamespace(data=self.frames[[(i + self.late) % len(self) for i in where]])

    def get_batch(self, where):
        return SimpleNamespace(asnumpy=lambda: self.get_frames_at(where).data.permute(0, 2, 3, 1).numpy())


@pytest.fixture
def peers(monkeypatch):
    """install(torchcodec's reader, decord's); None for one that is not installed."""
    def install(exact=None, other=None):
        modules = {"torchcodec": exact and SimpleNamespace(__version__="1.2"), "decord": None,
                   "torchcodec.decoders": exact and SimpleNamespace(VideoDecoder=exact)}
        modules |= {"decord": SimpleNamespace(VideoReader=other)} if other else {}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    return install


def tables(capsys, folder, *args):
    capsys.readouterr()
    bench_data.data_tables(parse(*TINY, "--folder", folder, *args))
    return capsys.readouterr().out


def cells(said, table):
    """What the first row for T = 3 says, in the table whose title starts so."""
    row = re.search(r"^\| (?:64p, 2 s, [\d.]+ Mbit/s \| )?3 \| (.*) \|$", said[said.index(f"**{table}"):], re.M)
    return [cell.strip() for cell in row[1].split("|")]


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_a_file_is_what_its_name_says(folder):
    (name, path), = bench_data.write_films(folder, [64], [21]).items()
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate) == (64, 114, 25)
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        keys = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
        container.seek(0)
        kinds = [int(frame.pict_type) for frame in container.decode(stream)]    # 2: P, 3: B
    at = np.flatnonzero(keys)
    assert len(keys) == 525 and at[0] == 0 and np.diff([*at, 525]).max() <= 250 and len(at) == 3
    assert kinds.count(3) > kinds.count(2) > 50
    assert name == f"64p, 21 s, {os.path.getsize(path) * 8 / 21e6:.2f} Mbit/s"
    frames = decoding.read_frames(path, 0).float()
    steps = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
    assert steps.min() > bench_data.APART                   # a frame's neighbour does not pass for it


def test_the_pictures_are_those_of_the_seed_and_a_file_that_is_there_stays(folder):
    draw = lambda *args: np.stack(list(bench_data.Film(*args)))
    film = draw(64, 1)
    assert film.shape == bench_data.Film(64, 1).shape == (25, 64, 114, 3) and film.dtype == np.uint8
    assert np.array_equal(film, draw(64, 1, 0)) and not np.array_equal(film, draw(64, 1, 1))
    assert np.array_equal(film, draw(64, 2)[:25])           # a longer one goes on
    assert 90 < film.mean() < 165 and film.std() > 25
    first, = bench_data.write_films(folder, [64], [2]).values()
    before = os.stat(first).st_mtime_ns
    assert list(bench_data.write_films(folder, [64], [2]).values()) == [first]
    assert os.stat(first).st_mtime_ns == before and not [name for name in os.listdir(folder) if "part" in name]


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def test_without_peers_the_rows_say_why(folder, peers, capsys):
    peers()
    said = tables(capsys, folder)
    assert re.search(r"^decord is not here, failed: ModuleNotFoundError: .*decord", said, re.M)
    assert re.search(r"^torchcodec, approximate is not here, failed: ", said, re.M)
    read = cells(said, "T frames")
    assert float(read[0]) > 0 and read[1:] == ["not here", "", ""] * 3
    assert "Cores that feed a GPU: not known, no --rate" in said.splitlines()[-1]


def test_peers_that_read_the_same_are_timed_beside_ours(folder, peers, capsys):
    peers(Reader, Reader)
    said = tables(capsys, folder)
    assert re.search(r"^Readers: av \S+, torchcodec 1.2, decord", said, re.M) and "is not here" not in said
    ours, *theirs = map(float, cells(said, "T frames"))
    for rate, ratio, off in zip(theirs[::3], theirs[1::3], theirs[2::3], strict=True):
        assert ratio == pytest.approx(ours / rate, rel=0.02) and off == 0


def test_peers_that_fail_or_read_other_frames_are_not_timed(folder, peers, capsys):
    late = type("Late", (Reader,), {"late": 1})

    class Broken(Reader):
        def get_batch(self, where):
            raise RuntimeError("no luck")

    peers(late, Broken)
    read = cells(tables(capsys, folder), "T frames")
    assert float(read[0]) > 0
    assert [read[1], read[4]] == ["OTHER FRAMES"] * 2 and not read[2] and float(read[3]) > bench_data.APART
    assert read[7:] == ["failed: RuntimeError: no luck", "", ""]


def test_a_sample_costs_what_its_parts_cost_and_cores_are_rates_over_rates(folder, peers, capsys):
    peers()
    said = tables(capsys, folder, "--rate", "1234")
    crop, sample, cached, device, jpegs = map(float, cells(said, "A training sample"))
    assert min(crop, cached, *map(float, cells(said, "A batch of 64"))) > 0
    lines = [line for line in said.splitlines() if line.startswith("Cores")]
    ways = "no cache, resized by the loader", "no cache, resized by the device", "from a cache of JPEGs"
    for said, way, clips in zip(lines, ways, (sample, device, jpegs), strict=True):
        assert f"1234 clips/s, {way}, T = 3: 64p, 2 s: " in said
        assert float(said.split()[-1]) == pytest.approx(1234 / clips, rel=0.02)


def test_cores_by_hand():
    found = {("no cache", 4, "240p, 10 s, 0.3 Mbit/s"): 25.0, ("no cache", 4, "720p, 60 s, 2 Mbit/s"): 0.5,
             ("cached", 8, "240p, 10 s, 0.3 Mbit/s"): "failed: no luck"}
    assert bench_data.cores_lines(100.0, found) == [
        "Cores that feed a GPU of 100 clips/s, no cache, T = 4: 240p, 10 s: 4; 720p, 60 s: 200",
        "Cores that feed a GPU of 100 clips/s, cached, T = 8: 240p, 10 s: failed: no luck"]
    assert len(bench_data.cores_lines(None, found)) == 1


def test_runs_take_turns_on_one_core_and_one_that_fails_ends_alone():
    turns, threads = [], torch.get_num_threads()

    def fail(n):
        if n == 2:
            raise ValueError("out of luck")

    with bench_data.one_core():
        if CORES:
            assert len(os.sched_getaffinity(0)) == 1
        rates = bench_data.rates([lambda n: turns.append(("a", n)), fail, lambda n: turns.append(("b", n))], 3)
    assert turns == [(run, n) for n in range(4) for run in "ab"]
    assert rates[1] == "failed: ValueError: out of luck" and min(rates[0], rates[2]) > 0
    assert torch.get_num_threads() == threads and (CORES is None or os.sched_getaffinity(0) == CORES)


@pytest.mark.parametrize("args, said", [
    (["--sizes", "241"], "argument --sizes: wants a number above 31, even, got 241"),
    (["--sizes", "16"], "argument --sizes: wants a number above 31, even, got 16"),
    (["--seconds", "0"], "argument --seconds: wants a number above 0, got 0"),
    (["--frames", "4", "x"], "argument --frames: invalid number value: 'x'"),
    (["--rounds", "-1"], "argument --rounds: wants a number above 0, got -1"),
    (["--rate", "nan"], "argument --rate: wants a number above 0, got nan"),
])
def test_what_cannot_be_is_refused(args, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*args)
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_its_own_commands_parse():
    lines = re.findall(r"^    python -m tools\.bench data (.*?)(?:  .*)?$", bench_data.__doc__, re.M)
    assert len(lines) == 2 and [parse(*line.split()).rate for line in lines] == [900.0, None]
    args = parse()
    assert (args.sizes, args.seconds, args.frames) == ([240, 360, 720], [10, 60], [4, 8, 12])
