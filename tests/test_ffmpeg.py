"""Whole files beside ffmpeg's command line: number, order, size and pixels of the frames."""

import glob
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers.runs import ROOT
from helpers.videos import write

from video import read_frames

SHARED = os.path.join(ROOT, "..", "shared")
KINDS = (".mp4", ".mkv", ".ts", ".avi", ".webm")
FILES = [path for path in sorted(glob.glob(f"{SHARED}/odd_media/*.*")) if path.endswith(KINDS)]


def find_ffmpeg():
    """The path of ffmpeg: the machine's, or that of the package imageio-ffmpeg. None without either."""
    try:
        import imageio_ffmpeg
        return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()
    except ImportError:
        return shutil.which("ffmpeg")


pytestmark = pytest.mark.skipif(not find_ffmpeg(), reason="there is no ffmpeg")


def decode_with_ffmpeg(path, H, W):
    """All frames (n, H, W, 3) that ffmpeg shows of its best stream, turned as it is displayed."""
    command = [find_ffmpeg(), "-v", "error", "-nostdin", "-i", path, "-fps_mode", "passthrough",
               "-sws_flags", "bilinear", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60).stdout
    assert output and len(output) % (H * W * 3) == 0
    return torch.from_numpy(np.frombuffer(output, np.uint8).reshape(-1, H, W, 3).copy())


def assert_as_ffmpeg(path):
    ours = read_frames(path, 0).permute(0, 2, 3, 1)
    theirs = decode_with_ffmpeg(path, *ours.shape[1:3])
    if path.endswith("not_coded.avi") and torch.equal(theirs[-1], theirs[-2]):
        theirs = theirs[:-1]                    # the last packet shows no picture, and ffmpeg 9 the one before again
    assert len(ours) == len(theirs)
    difference = (ours.int() - theirs.int()).abs()
    assert difference.float().mean() < 1 and difference.amax() <= 8     # conversions to RGB may differ by rounding


@pytest.mark.parametrize("path", FILES, ids=os.path.basename)
def test_odd_files_are_read_as_by_ffmpeg(path):
    assert_as_ffmpeg(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_files_of_many_containers_are_read_as_by_ffmpeg(tmp_path, name):
    write(tmp_path / name, 30)
    assert_as_ffmpeg(str(tmp_path / name))
