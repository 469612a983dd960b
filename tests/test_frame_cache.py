"""The frame cache: what it holds, when it is made again, videos that cannot be read, damaged files, a full disk."""

import os
import pickle
import resource
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers.videos import cut, noise_frames, numbers, write, write_frames
from torch.utils.data import DataLoader

import frame_cache
from annotations import Annotation
from data import ClipDataset, DataConfig
from files import WriteError
from frame_cache import DamagedCacheError, FrameCache, build_frame_cache
from media import Media

CFG = DataConfig(num_frames=4, image_size=24, cache_frames=10)


@dataclass
class Row:
    video: str
    source: str = ""

    @property
    def media(self):
        return Media(self.video)


@pytest.fixture
def rows(tmp_path):
    """Two videos of 50 and 6 frames, the first one twice."""
    paths = [write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4", n=6, shape=(51, 35), pix_fmt="yuv444p")]
    return [Row(path, f"rows.json, row {i}") for i, path in enumerate([*paths, paths[0]])]


def read(cache, video):
    """All frames of a video."""
    frames = cache[video]
    return frames[range(len(frames))]


def read_all(path):
    cache = FrameCache(path)
    return {video: read(cache, video) for video, offset, _ in cache.index if offset is not None}


# ---------------------------------------------------------------------------------------------------------------------
# What it holds

def test_cache_keeps_evenly_spaced_reduced_frames(rows, tmp_path):
    cache = build_frame_cache(rows, CFG, str(tmp_path))
    a, b = rows[0].video, rows[1].video
    assert read(cache, a).shape == (10, 3, 24, 32) and read(cache, b).shape == (6, 3, 35, 24)
    assert numbers(torch.from_numpy(read(cache, a))) == list(range(2, 50, 5))
    assert np.array_equal(cache[a][np.array([7, 3, 3])], read(cache, a)[[7, 3, 3]])
    name = os.path.basename(cache.path)
    assert name.startswith("frames_") and sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4", f"{name}.bin",
                                                                          f"{name}.json"]


def test_cache_is_rebuilt_if_settings_or_files_change(rows, tmp_path, monkeypatch):
    cache = build_frame_cache(rows, CFG, str(tmp_path))
    assert build_frame_cache(rows, CFG, str(tmp_path)).path == cache.path
    other = build_frame_cache(rows, replace(CFG, cache_image_size=20), str(tmp_path))
    assert read(other, rows[0].video).shape == (10, 3, 20, 27)
    short = build_frame_cache(rows, replace(CFG, max_seconds=1), str(tmp_path))
    assert numbers(torch.from_numpy(read(short, rows[0].video))) == list(range(10))
    paths = {cache.path, other.path, short.path}
    for changes in (dict(cache_frames=8), dict(cache_jpeg_quality=50), dict(cache_jpeg_quality=60)):
        paths.add(build_frame_cache(rows, replace(CFG, **changes), str(tmp_path)).path)
    write(rows[0].video, n=20)                                              # another video of that name
    paths.add(build_frame_cache(rows, CFG, str(tmp_path)).path)
    monkeypatch.setattr(frame_cache, "CACHE_VERSION", 0)
    paths.add(build_frame_cache(rows, CFG, str(tmp_path)).path)
    assert len(paths) == 8


def test_cached_jpegs_are_close_to_the_frames_in_any_order(tmp_path):
    path = write_frames(tmp_path / "a.mkv", noise_frames(8, 60, 80).permute(0, 2, 3, 1).numpy(), "ffv1", "bgr0")
    cfg = replace(CFG, image_size=60, cache_jpeg_quality=95)
    raw = build_frame_cache([Row(path)], replace(cfg, cache_jpeg_quality=0), str(tmp_path))
    cache = build_frame_cache([Row(path)], cfg, str(tmp_path))
    jpegs, plain = cache[path], read(raw, path)
    frames = jpegs[range(8)]
    assert len(jpegs) == 8 and frames.dtype == np.uint8 and frames.shape == plain.shape == (8, 3, 60, 80)
    assert 0 < np.abs(frames.astype(int) - plain).mean() < 30 and len(cache.data) < len(raw.data)
    assert np.array_equal(jpegs[[5, 2, 2]], frames[[5, 2, 2]])
    assert np.array_equal(read(pickle.loads(pickle.dumps(cache)), path), frames)


# ---------------------------------------------------------------------------------------------------------------------
# Videos that cannot be read

def test_unreadable_videos_are_counted_and_leave_no_files(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"")
    (tmp_path / "worse.mp4").write_bytes(b"x" * 1000)
    rows = [Row(write(tmp_path / "good.mp4", n=8)), *(Row(str(tmp_path / f"{name}.mp4")) for name in ("bad", "worse"))]
    with pytest.raises(ValueError, match="bad.mp4: Invalid.*2 of 3.*max_unreadable.*0.1"):
        build_frame_cache(rows, DataConfig(), str(tmp_path))
    with pytest.raises(ValueError, match="1 of 1"):                         # all of them is too many at any setting
        build_frame_cache(rows[1:2], DataConfig(max_unreadable=1), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["bad.mp4", "good.mp4", "worse.mp4"]


def test_cache_remembers_why_a_video_is_missing(rows, tmp_path):
    rows.append(Row(str(tmp_path / "none.mp4"), "rows.json, row 3"))
    rows.append(Row(cut(write(tmp_path / "cut.mp4"), 0.2), "rows.json, row 4"))
    cache = build_frame_cache(rows, replace(CFG, max_unreadable=0.5), str(tmp_path))    # 2 of 4 files: just allowed
    for each in (cache, FrameCache(cache.path), pickle.loads(pickle.dumps(cache))):
        assert len(each[rows[0].video]) == 10 and len(each[rows[1].video]) == 6
        for row, reason in ((rows[3], "no such file"), (rows[4], "Invalid data")):
            with pytest.raises(ValueError, match=f"{row.video}: .*{reason}") as error:
                each[row.video]
            assert not isinstance(error.value, DamagedCacheError)
    before = set(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="rows.json, row 3: .*none.mp4.*2 of 4.*0.4") as error:
        build_frame_cache(rows, replace(CFG, max_unreadable=0.4), str(tmp_path))        # checked for an old cache too
    assert "\n" not in str(error.value) and set(os.listdir(tmp_path)) == before
    (tmp_path / "fresh").mkdir()
    with pytest.raises(ValueError, match="rows.json, row 4: .*cut.mp4.*2 of 4"):        # the first in the order of rows
        build_frame_cache(rows[::-1], replace(CFG, max_unreadable=0.4), str(tmp_path / "fresh"))
    assert os.listdir(tmp_path / "fresh") == []


def test_a_repaired_video_is_decoded_again(rows, tmp_path):
    path = str(tmp_path / "c.mp4")
    cfg = replace(CFG, max_unreadable=0.5)
    rows.append(Row(path))
    with pytest.raises(ValueError, match="no such file"):
        build_frame_cache(rows, cfg, str(tmp_path))[path]
    write(path, n=7)
    assert len(build_frame_cache(rows, cfg, str(tmp_path))[path]) == 7


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files

def contents(path):
    with open(path, "rb") as f:
        return f.read()


def overwrite(path, content):
    with open(path, "wb") as f:
        f.write(content)


def flip(content, rng):
    damaged = bytearray(content)
    damaged[rng.integers(len(content))] ^= rng.integers(1, 256)
    return damaged


def truncate(content, rng):
    return content[:rng.integers(len(content))]


def assert_damage_is_named(error, path):
    assert "\n" not in str(error) and "is damaged" in str(error)
    assert str(error).endswith(f"Delete {path}.bin and {path}.json; they are made again")


@pytest.fixture(params=[0, 90], ids=["raw", "JPEG"])
def build(request, rows, tmp_path):
    """Build, or open, a cache of the rows and of a video that cannot be read."""
    cfg = replace(CFG, cache_jpeg_quality=request.param, max_unreadable=0.5)
    return lambda: build_frame_cache([*rows, Row(str(tmp_path / "none.mp4"))], cfg, str(tmp_path))


@pytest.fixture
def cache(build):
    return build()


@pytest.mark.parametrize("extension", [".bin", ".json"])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_random_damage_is_detected_or_harmless(cache, extension, damage):
    intact, num_detected = read_all(cache.path), 0
    content, reasons = contents(cache.path + extension), [entry for entry in cache.index if entry[1] is None]
    for seed in range(40):
        overwrite(cache.path + extension, damage(content, np.random.default_rng(seed)))
        try:
            frames, again = read_all(cache.path), FrameCache(cache.path)
        except DamagedCacheError as error:
            assert_damage_is_named(error, cache.path)
            num_detected += 1
            continue
        assert frames.keys() == intact.keys() and all(np.array_equal(frames[video], intact[video]) for video in intact)
        assert [entry for entry in again.index if entry[1] is None] == reasons
    assert num_detected == 40 if extension == ".bin" else num_detected > 30     # white space of the index is harmless


def test_every_byte_of_a_frame_and_of_its_table_is_verified(cache, rows):
    content = contents(cache.path + ".bin")
    video, offset, shape = cache.index[1]
    for place in (*range(offset, offset + 8 * shape[0]), *range(offset + 8 * shape[0], len(content), 997)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        overwrite(cache.path + ".bin", damaged)
        with pytest.raises(DamagedCacheError, match=f"frame \\d of {video}"):
            read(FrameCache(cache.path), video)
        assert len(read(FrameCache(cache.path), rows[0].video)) == 10       # only what is read is verified


def test_only_frames_that_are_read_are_verified(cache, rows):
    frames, opened = read(cache, rows[0].video), cache[rows[0].video]
    place = int(opened.ends[7])
    content = bytearray(contents(cache.path + ".bin"))
    content[place + 5] ^= 255
    overwrite(cache.path + ".bin", content)
    others = [i for i in range(10) if i != 7]
    for each in (cache, FrameCache(cache.path)):
        assert np.array_equal(each[rows[0].video][others], frames[others])
        with pytest.raises(DamagedCacheError, match=f"frame 7 of {rows[0].video}"):
            each[rows[0].video][[0, 7]]


def test_a_frame_at_another_place_is_detected(rows, tmp_path):
    cache = build_frame_cache(rows, CFG, str(tmp_path))
    content, opened = bytearray(contents(cache.path + ".bin")), cache[rows[0].video]
    table, (a, b, c) = opened.ends[0] - 80, opened.ends[[2, 3, 4]]
    content[a:b], content[b:c] = content[b:c], content[a:b]                 # frames 2 and 3 and their checksums
    x, y = slice(table + 16, table + 24), slice(table + 24, table + 32)
    content[x], content[y] = content[y], content[x]
    overwrite(cache.path + ".bin", content)
    for i in (2, 3):
        with pytest.raises(DamagedCacheError, match=f"frame {i} "):
            FrameCache(cache.path)[rows[0].video][[i]]


def test_the_frames_of_another_cache_are_detected(rows, tmp_path):
    cache = build_frame_cache(rows, CFG, str(tmp_path))
    write(rows[0].video, n=50, qp="30")
    other = build_frame_cache(rows, CFG, str(tmp_path))
    assert other.path != cache.path and len(other.data) == len(cache.data)
    shutil.copy(cache.path + ".bin", other.path + ".bin")
    with pytest.raises(DamagedCacheError, match="frame 0"):
        FrameCache(other.path)[rows[0].video][[0]]


@pytest.mark.parametrize("change, reason", [
    (lambda path: os.remove(path + ".bin"), "bin is damaged: it must have .* bytes, got 0"),
    (lambda path: overwrite(path + ".bin", b""), "got 0"),
    (lambda path: overwrite(path + ".bin", contents(path + ".bin") + b"\0"), "bin is damaged"),
    (lambda path: overwrite(path + ".json", b""), "json is damaged"),
    (lambda path: overwrite(path + ".json", b"[]"), "json is damaged"),
    (lambda path: overwrite(path + ".json", b"{}"), "json is damaged"),
    (lambda path: overwrite(path + ".json", contents(path + ".json").replace(b"checksum", b"chocksum")),
     "json is damaged"),
], ids=["no bin", "empty bin", "long bin", "empty json", "list", "empty object", "no checksum"])
def test_incomplete_files_are_detected_when_they_are_opened(cache, change, reason):
    change(cache.path)
    with pytest.raises(DamagedCacheError, match=reason) as error:
        FrameCache(cache.path)
    assert_damage_is_named(error.value, cache.path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_cache_stops_a_run_instead_of_skipping_the_video(rows, tmp_path, num_workers):
    annotations = [Annotation(row.video, ["a caption"], None, i, source=row.source) for i, row in enumerate(rows)]
    path = ClipDataset(annotations, CFG, cache_folder=str(tmp_path)).cache.path
    content = bytearray(contents(path + ".bin"))
    content[-1 - 3 * 35 * 24 * 6:] = bytes(3 * 35 * 24 * 6 + 1)             # all frames of the second video
    overwrite(path + ".bin", content)
    for train in (True, False):
        dataset = ClipDataset(annotations, CFG, train=train, cache_folder=str(tmp_path))
        loader = iter(DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=list))
        with pytest.raises(DamagedCacheError, match=f"frame . of {rows[1].video}") as error:
            list(loader)
        if num_workers:
            loader._shutdown_workers()
        assert_damage_is_named(str(error.value).strip().split("\n")[-1], path)


def test_a_damaged_cache_is_made_again_once_it_is_deleted(build):
    path = build().path
    intact, content = read_all(path), contents(path + ".bin")
    overwrite(path + ".bin", content[:-1])
    with pytest.raises(DamagedCacheError, match=f"{path}.bin is damaged"):
        build()
    for extension in (".bin", ".json"):
        os.remove(path + extension)
    assert build().path == path and contents(path + ".bin") == content
    assert all(np.array_equal(frames, intact[video]) for video, frames in read_all(path).items())


# ---------------------------------------------------------------------------------------------------------------------
# Writing

@pytest.mark.parametrize("size", [0, 1000, 20000])
def test_a_full_disk_is_named_with_the_way_out(rows, tmp_path, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = set(os.listdir(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))            # what is written beyond it fails
    try:
        with pytest.raises(ValueError, match=f"{tmp_path}/frames_.*bin could not be written.*--data.no-frame-cache"):
            build_frame_cache(rows, CFG, str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(os.listdir(tmp_path)) == before
    assert len(build_frame_cache(rows, CFG, str(tmp_path))[rows[0].video]) == 10


def test_a_disk_that_is_full_before_the_index_leaves_no_cache(rows, tmp_path, monkeypatch):
    def fail(path, *args, **kwargs):
        raise WriteError(path, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(frame_cache, "write_json", fail)
        with pytest.raises(ValueError, match="json could not be written.*No space.*--data.no-frame-cache"):
            build_frame_cache(rows, CFG, str(tmp_path))
    cache = build_frame_cache(rows, CFG, str(tmp_path))
    assert numbers(torch.from_numpy(read(cache, rows[0].video))) == list(range(2, 50, 5))


def test_a_folder_that_is_missing_is_named(rows, tmp_path):
    with pytest.raises(ValueError, match="nowhere/frames_.* could not be written.*--data.no-frame-cache"):
        build_frame_cache(rows, CFG, str(tmp_path / "nowhere"))
