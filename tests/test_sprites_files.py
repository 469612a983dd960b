"""tools/sprites.py: full disks, and files of a set that are damaged."""

import os
import re
import resource
import shutil
from functools import partial

import numpy as np
import pytest
from helpers.damage import damaged_copies

import runtime
import tools.sprites as sprites_module
from files import WriteError
from tools.sprites import read_boxes, write_sprites


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    """At each file that is written, and in a video."""
    out, left, fsync = str(tmp_path / "sprites"), [10 ** 6], os.fsync

    def full_disk(descriptor):
        left[0] -= 1
        return fsync(descriptor) if left[0] >= 0 else os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    def assert_nothing_is_left():
        with pytest.raises(WriteError, match="sprites.* could not be written .(No space left|File too large)") as error:
            write_sprites(out, train=2, test=1, val=1)
        assert "\n" not in str(error.value) and str(error.value).count("(") == 1
        assert os.listdir(tmp_path) == ["whole"]

    write_sprites(str(tmp_path / "whole"), train=2, test=1, val=1)
    limits = [path.stat().st_size - 1 for path in (tmp_path / "whole" / "videos").iterdir()]
    for limit in (1000, min(limits) // 2, min(limits)):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "init_worker", partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
            assert_nothing_is_left()
    monkeypatch.setattr(sprites_module, "parallel_map", lambda function, items, label: map(function, items))
    monkeypatch.setattr(os, "fsync", full_disk)
    write_sprites(out, train=2, test=1, val=1)
    count = 10 ** 6 - left[0]
    shutil.rmtree(out)
    for left[0] in range(count):
        assert_nothing_is_left()
    assert count == 2 * 15                                                  # each file and its folder


def test_damaged_settings_are_refused_in_one_line(sprites, tmp_path):
    out, noticed = str(tmp_path / "set"), 0
    os.mkdir(out)
    with open(f"{sprites}/sprites.json", "rb") as f:
        content = f.read()
    for damaged in [content, *damaged_copies(content, 40)]:
        with open(f"{out}/sprites.json", "wb") as f:
            f.write(damaged)
        try:
            write_sprites(out, train=24, test=12, val=6)                # white space of JSON does not count
        except (ValueError, FileExistsError) as error:
            assert re.match(f"{out} is damaged: delete it|{out}: the settings of this set must be", str(error))
            assert "\n" not in str(error) and damaged != content
            noticed += 1
    assert noticed >= 70


def test_damaged_boxes_are_refused_in_one_line(sprites, tmp_path):
    splits = ("train", "test", "val")
    expected, noticed = [read_boxes(sprites, split) for split in splits], 0
    np.testing.assert_array_equal(expected[1], np.load(f"{sprites}/sprites_boxes.npz")["test"])
    with open(f"{sprites}/sprites_boxes.npz", "rb") as f:
        content = f.read()
    for damaged in damaged_copies(content, 40):
        with open(tmp_path / "sprites_boxes.npz", "wb") as f:
            f.write(damaged)
        try:                                                                # a date in the file does not matter
            for split, boxes in zip(splits, expected, strict=True):
                np.testing.assert_array_equal(read_boxes(str(tmp_path), split), boxes)
        except ValueError as error:
            assert re.match(f"{tmp_path}/sprites_boxes.npz is damaged", str(error)) and "\n" not in str(error)
            noticed += 1
    assert noticed >= 70
    with pytest.raises(FileNotFoundError, match="nowhere/sprites_boxes.npz"):
        read_boxes(str(tmp_path / "nowhere"), "test")
