"""Runs on corpora as they are: broken and odd files, videos and images mixed, more rows than a process should hold."""

import gc
import json
import multiprocessing
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_decoding import TURNS, cut, numbers, turn, write
from test_train import (  # noqa: F401  (two are fixtures)
    Killed,
    argv,
    assert_close_runs,
    assert_one_line,
    assert_same,
    command,
    config,
    first_run,
    kill,
    log,
    on_ranks,
    small_sprites,
    weights,
)

import data
import train
from data import Clips, read_annotations
from decoding import read_frames
from masking import keep_count
from model import ClusterSTM
from runs import states
from teacher import SigLIP, guide

# ---------------------------------------------------------------------------------------------------------------------
# Odd files. Frame i is grey level 4 i + 20.

def timed(path, times):
    """A video whose frames are shown at these milliseconds."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 4 * i + 20, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return str(path)


def odd(**how):
    return lambda path: write(path, **{"n": 8, "shape": (32, 48), **how})


ODD = {
    "one frame.mp4": odd(n=1),
    "odd.mp4": odd(shape=(51, 35), pix_fmt="yuv444p"),
    "odd.avi": odd(codec="mpeg4", shape=(51, 35)),
    "wide.mp4": odd(shape=(16, 160)),
    "small.mp4": odd(shape=(2, 2)),
    "10 bits.mp4": odd(pix_fmt="yuv420p10le"),
    "10 bits.mkv": odd(codec="ffv1", pix_fmt="yuv420p10le"),
    "clockwise.mp4": lambda path: turn(odd(shape=(48, 64))(path), TURNS["clockwise"][1]),
    "upside down.mp4": lambda path: turn(odd(shape=(48, 64))(path), TURNS["upside down"][1]),
    "counter-clockwise.MP4": lambda path: turn(odd(shape=(48, 64))(path), TURNS["counter-clockwise"][1]),
    "variable rate.mp4": lambda path: timed(path, [0, 40, 45, 300, 301, 900, 2000, 9000]),
    "variable rate.mkv": lambda path: timed(path, [0, 40, 45, 300, 301, 900, 2000, 9000]),
    "late.mp4": lambda path: timed(path, range(5000, 5800, 100)),
    "late.ts": lambda path: timed(path, range(5000, 5800, 100)),
    "vp8.webm": odd(codec="libvpx"),
    "vp9.webm": odd(codec="libvpx-vp9"),
    "日本 #1 100%.mkv": odd(bf="2"),
    "jpegs.mov": odd(codec="mjpeg", pix_fmt="yuvj420p"),
    "a.flv": odd(),
    "a.mpg": odd(codec="mpeg2video"),
    "pieces.mp4": odd(container={"movflags": "frag_keyframe+empty_moov"}),
    "sound.mp4": odd(audio=True),
    "a.gif": odd(codec="gif", pix_fmt="gray"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_a_video_like_any_other(tmp_path, name):
    frames = read_frames(ODD[name](tmp_path / name), 0)
    want = [0] if name == "one frame.mp4" else list(range(8))
    assert np.abs(np.subtract(numbers(frames), want)).max() <= ("10 bits" in name or "vp8" in name)
    H, W = frames.shape[2:]
    shapes = {"odd": (51, 35), "wide": (16, 160), "small": (2, 2), "clockwise": (64, 48), "counter-clockwise": (64, 48),
              "upside down": (48, 64)}
    assert (H, W) == shapes.get(name.rpartition(".")[0], (32, 48))


# ---------------------------------------------------------------------------------------------------------------------
# A corpus of a hundred clips, 5 of them bad

BAD = {"cut.mp4": "Invalid data", "empty.mp4": "Invalid data", "text.mp4": "Invalid data",
       "sound alone.mp4": "has no video stream", "absent.mp4": "no such file"}


@pytest.fixture(scope="module")
def crowd(sprites, tmp_path_factory):
    """Folder with rows.json, videos/ and whole/, where the bad files of videos/ are good ones."""
    folder = tmp_path_factory.mktemp("crowd")
    whole, videos = folder / "whole", folder / "videos"
    whole.mkdir()
    plain = [f"plain {i}.mp4" for i in range(100 - len(ODD) - len(BAD))]
    for name, make in ODD.items():
        make(whole / name)
    for i, name in enumerate([*plain, *BAD]):
        shutil.copyfile(f"{sprites}/videos/train_{i % 24:05}.mp4", whole / name)
    shutil.copytree(whole, videos)
    cut(videos / "cut.mp4", 0.6)
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("these are words\n" * 100)
    write(videos / "sound alone.mp4", audio=True, video=False)
    os.remove(videos / "absent.mp4")
    names = [*plain, *BAD, *ODD]
    random.Random(0).shuffle(names)
    listed = [{"video": name, "caption": [f"a red ring number {i}", f"{i} blue squares"]}
              for i, name in enumerate(names)]
    (folder / "rows.json").write_text(json.dumps(listed))
    return str(folder)


@pytest.fixture
def ready(sprites, first, crowd, tmp_path, monkeypatch):
    """In a folder of its own: ready(flags) of runs that are given teacher and text encoder, 13 steps on the crowd."""
    monkeypatch.chdir(tmp_path)
    flags = (f"--teacher {first}/out/first/teacher --text {first}/out/first/text --steps 13 --unmasked-steps 0 "
             f"--data.train {crowd}/rows.json --data.root {crowd}/videos ")
    return lambda more="": config(sprites, flags + more)


UNCACHED = "--data.no-cache --data.views 0 "


def bad_rows(crowd):
    """Row -> file of those that are bad."""
    rows = read_annotations(f"{crowd}/rows.json", f"{crowd}/videos", check=False)
    return {i: row.video for i, row in enumerate(rows) if os.path.basename(row.video) in BAD}


def assert_each_is_listed_once(folder, crowd):
    with open(os.path.join(folder, "bad_media.jsonl"), encoding="utf-8") as f:
        listed = [json.loads(line) for line in f]
    bad = bad_rows(crowd)
    assert Counter(about["video"] for about in listed) == Counter(bad.values())
    where = {video: f"{crowd}/rows.json, row {row}" for row, video in bad.items()}
    for about in listed:
        assert about.keys() == {"where", "video", "reason"} and about["where"] == where[about["video"]]
        name = os.path.basename(about["video"])
        assert about["reason"].startswith(f"{about['video']}: ") and BAD[name] in about["reason"]


@pytest.fixture
def collected(monkeypatch):
    """Filled with (stage, step, batch) of each micro-batch that this process trains on."""
    real, seen = train.micro_batches, []

    def batches(run, clips, tokenizer, stage, batch, micro, step, steps):
        for s, group in enumerate(real(run, clips, tokenizer, stage, batch, micro, step, steps), step):
            seen.extend((stage, s, b) for b in group)
            yield group

    monkeypatch.setattr(train, "micro_batches", batches)
    return seen


@pytest.mark.parametrize("flags", ["--steps 26 ", UNCACHED, UNCACHED + "--data.workers 1 "],
                         ids=["cached, the teacher's word kept", "decoded in turn", "by a loader process"])
def test_a_run_on_a_corpus_with_bad_files_lists_them_and_changes_nothing_else(ready, crowd, collected, flags):
    cfg = ready(flags + "--name a")
    train.main(cfg)
    assert os.path.exists("out/a/model.safetensors") and not os.path.exists("out/a/guide")
    assert_each_is_listed_once("out/a", crowd)
    assert all(np.isfinite(row["grad_norm"]) for row in log("out/a").values())

    whole = Clips(read_annotations(cfg.data.train, f"{crowd}/whole"), replace(cfg.data, cache=False), cfg.seed)
    bad, n, replaced = bad_rows(crowd), 0, 0
    for _, _, b in collected:
        for i, clip in enumerate(b.clip.tolist()):
            asked = whole[n]
            if asked.clip in bad:
                replaced += 1
                assert clip not in bad and bad[asked.clip] in {about["video"] for about in b.lost}
                asked = whole.view(clip, asked.view)
            assert (clip, b.view[i].item(), b.captions[i], b.stills[i]) == (asked.clip, asked.view, asked.caption,
                                                                           asked.still)
            if cfg.data.cache:                                              # it keeps 8 frames, and those in small
                n += 1
                continue
            assert torch.equal(b.video[i], asked.video)
            n += 1
    assert n == cfg.steps * cfg.batch and replaced >= len(bad)
    assert sum(len(b.lost) for _, _, b in collected) >= replaced


def test_the_list_is_one_on_two_ranks_and_after_a_kill(ready, crowd):
    on_ranks(2, ready(f"{UNCACHED} --name two"))
    assert_each_is_listed_once("out/two", crowd)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 9)
        with pytest.raises(Killed):
            train.main(ready(f"{UNCACHED} --name killed"))
    with open("out/killed/bad_media.jsonl", "a") as f:
        assert 0 < os.path.getsize(f.name)
        f.write('{"where": "half a l')                                      # as when the machine loses its power
    on_ranks(2, ready(f"{UNCACHED} --name killed --resume"))
    assert_each_is_listed_once("out/killed", crowd)
    one, other = log("out/two"), log("out/killed")
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=1e-3), key


def test_what_is_kept_of_the_teachers_word_passes_over_what_cannot_be_read(ready, crowd, first):
    cfg = ready("--name a --steps 26 --data.views 1")
    clips = Clips(read_annotations(cfg.data.train, cfg.data.root, check=False), cfg.data, cfg.seed)
    tokenizer = data.load_tokenizer(f"{first}/out/first/text")
    teacher, run = SigLIP.from_pretrained(cfg.teacher), train.Run(cfg, "out/a", torch.device("cpu"), 0, 1)
    real, asked = teacher.tokens, []
    teacher.tokens = lambda pixels: (asked.append(len(pixels)), real(pixels))[1]
    guides = train.Guides(run, teacher, clips, tokenizer)
    assert guides.kept
    for step, group in enumerate(train.micro_batches(run, clips, tokenizer, "pretrain", 8, 4, 0, 26)):
        asked.clear()
        found = guides(group)
        assert len(asked) == 2 * (step < 13)        # 100 clips, 8 a step: those that stand in for others are known
        for batch, told in zip(group, found, strict=True):
            expected = guide(teacher, batch, cfg.mask, cfg.mask.ratio, cfg.pool)
            assert torch.equal(told.keep, expected.keep)
            torch.testing.assert_close(told.aligned.float(), expected.aligned, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(told.text, expected.text, rtol=0, atol=1e-6)
    run.closing.close()


def lost_by(crowd, cfg, folder="videos"):
    """How many videos that were asked for could not be read, after each step."""
    clips = Clips(read_annotations(cfg.data.train, f"{crowd}/{folder}", check=False), replace(cfg.data, cache=False),
                  cfg.seed)
    return np.cumsum([len(clips[n].lost) for n in range(cfg.steps * cfg.batch)])[cfg.batch - 1::cfg.batch].tolist()


def test_a_run_ends_past_the_share_that_may_be_bad_and_can_go_on(ready, crowd, monkeypatch):
    monkeypatch.setattr(train, "ENOUGH", 24)
    cfg = ready(UNCACHED)
    lost = lost_by(crowd, cfg)
    step = next(s for s in range(3, 14) if lost[s - 1] > 0.02 * (8 * s + lost[s - 1]))      # after it
    assert 3 <= step < 13
    said = (f"{lost[step - 1]} of {8 * step + lost[step - 1]} videos asked for could not be read, more than "
            "data.max_bad, 0.02: out/a/bad_media.jsonl names them")
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        train.main(ready(f"{UNCACHED} --name a --data.max-bad 0.02 --log-every 1000"))       # each read a step later
    assert states("out/a")[0] == f"out/a/state/pretrain-{step:07d}.pt"
    with open("out/a/bad_media.jsonl") as f:
        assert {json.loads(line)["video"] for line in f} <= set(bad_rows(crowd).values())
    with pytest.raises(ValueError, match="could not be read, more than data.max_bad, 0.02"):
        train.main(ready(f"{UNCACHED} --name a --data.max-bad 0.02 --resume"))
    train.main(ready(f"{UNCACHED} --name a --data.max-bad 0.9 --resume"))
    assert_each_is_listed_once("out/a", crowd)
    train.main(ready(f"{UNCACHED} --name b --data.max-bad 0.9 --log-every 1"))
    assert_same(weights("out/a"), weights("out/b"))


def test_a_stage_that_was_too_short_to_tell_tells_at_its_end(ready, crowd, sprites, first, capsys):
    flags = f"{UNCACHED} --name a --data.max-bad 0.02 "
    lost = lost_by(crowd, ready(UNCACHED))[-1]
    given = f"--teacher {first}/out/first/teacher --text {first}/out/first/text --steps 13 --unmasked-steps 0 "
    given += f"--data.train {crowd}/rows.json --data.root {crowd}/videos "
    said = f"^train.py: {lost} of {104 + lost} videos asked for could not be read, .*out/a/bad_media.jsonl names them$"
    code, _, err = command("train.py", argv(sprites, given + flags), capsys)
    assert_one_line("train.py", code, err, said)
    assert states("out/a")[0] == "out/a/state/pretrain-0000013.pt" and not os.path.exists("out/a/masked")
    assert_each_is_listed_once("out/a", crowd)
    code, _, err = command("train.py", argv(sprites, given + flags + "--resume"), capsys)   # nothing has changed
    assert_one_line("train.py", code, err, said)
    assert not os.path.exists("out/a/masked")
    code, _, err = command("train.py", argv(sprites, given + flags + "--resume --data.max-bad 0.9"), capsys)
    assert code == 0 and os.path.exists("out/a/model.safetensors"), err


def test_of_cached_videos_too_many_are_counted_before_anything_is_trained(ready, crowd, sprites):
    row, video = min(bad_rows(crowd).items())
    with pytest.raises(ValueError) as error:
        train.main(ready("--name a --data.max-bad 0.04"))
    said = str(error.value)
    assert said.startswith(f"{crowd}/rows.json, row {row}: {video}: ") and "\n" not in said
    assert said.endswith("(5 of 100 videos cannot be read, more than data.max_bad, 0.04)")
    assert not states("out/a") and not os.path.exists("out/a/log.jsonl")
    train.main(ready("--name a --data.max-bad 0.05 --steps 1"))


# ---------------------------------------------------------------------------------------------------------------------
# Videos and images

PICTURES = {
    "a.png": lambda image: (image, {}),
    "b.jpg": lambda image: (image, {"quality": 90}),
    "grey.jpg": lambda image: (image.convert("L"), {}),
    "palette.png": lambda image: (image.convert("P"), {}),
    "alpha.png": lambda image: (image.convert("RGBA"), {}),
    "bits.png": lambda image: (image.convert("1"), {}),
    "cmyk.jpg": lambda image: (image.convert("CMYK"), {}),
    "scans.jpg": lambda image: (image, {"progressive": True}),
    "a.webp": lambda image: (image, {}),
    "a.gif": lambda image: (image, {}),
    "odd.jpg": lambda image: (image.resize((35, 51)), {}),
    "one pixel.png": lambda image: (image.resize((1, 1)), {}),
    **{f"turned {how}.jpg": lambda image, how=how: (image, {"exif": exif(how), "quality": 95}) for how in (3, 6, 8)},
}


def exif(orientation):
    written = Image.Exif()
    written[0x0112] = orientation
    return written


@pytest.fixture(scope="module")
def mixture(sprites, tmp_path_factory):
    """Folder with pictures.json, pictures/, and more.jsonl: six clips of the sprites' folder, one of them twice."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    listed = []
    for i, (name, how) in enumerate(PICTURES.items()):
        quarters = rng.integers(40, 216, (2, 2, 3), dtype=np.uint8)
        image, options = how(Image.fromarray(np.kron(quarters, np.ones((24, 32, 1), np.uint8))))
        image.save(folder / "pictures" / name, **options)
        listed.append({"image": name, "caption": f"picture {i} of squares"})
    (folder / "pictures" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    listed.insert(3, {"image": "bad.jpg", "caption": "nothing"})
    (folder / "pictures.json").write_text(json.dumps(listed))
    more = [{"video": f"train_{i:05}.mp4", "caption": f"clip {i} again"} for i in (2, 3, 5, 7, 11, 11)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    return str(folder)


@pytest.fixture
def mixed(sprites, first, mixture, tmp_path, monkeypatch):
    """In a folder of its own: mixed(flags) of runs on 30 videos and 16 images, of which one is bad."""
    monkeypatch.chdir(tmp_path)
    flags = (f"--teacher {first}/out/first/teacher --text {first}/out/first/text "
             f"--data.more {mixture}/more.jsonl={sprites}/videos "
             f"--data.images {mixture}/pictures.json={mixture}/pictures ")
    return lambda more="": config(sprites, flags + more)


@pytest.mark.parametrize("name", ["a.png", *[name for name in PICTURES if name.startswith("turned")]])
def test_a_picture_is_a_video_of_one_frame_and_upright(mixture, name):
    path = f"{mixture}/pictures/{name}"
    frames = read_frames(path, 1)
    want = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert frames.shape == (1, 3, *want.shape[:2])
    assert np.abs(frames[0].permute(1, 2, 0).numpy().astype(int) - want).mean() < 2


def test_videos_and_images_take_turns(mixed, mixture, sprites, collected, monkeypatch):
    real, kept = ClusterSTM.forward, []

    def forward(self, batch, guide, *rest):
        kept.append((batch.video.shape[1], guide.keep.shape[1] if guide else None))
        return real(self, batch, guide, *rest)

    monkeypatch.setattr(ClusterSTM, "forward", forward)
    cfg = mixed("--name a --mask.image-ratio 0.5")
    train.main(cfg)
    assert all(np.isfinite(row["grad_norm"]) for row in log("out/a").values()) and len(log("out/a")) == 26
    want = {4: 4 * keep_count(16, 0.75), 1: keep_count(16, 0.5)}            # T frames of 4 x 4 patches
    assert want == {4: 16, 1: 8}
    assert kept == [(b.video.shape[1], want[b.video.shape[1]] if stage == "pretrain" else None)
                    for stage, _, b in collected]
    kinds = {}
    for stage, step, b in collected:
        kinds.setdefault((stage, step), set()).add(b.video.shape[1])
        assert ((b.clip < 30) == (b.video.shape[1] == 4)).all()             # image i is clip 30 + i
    assert all(len(kind) == 1 for kind in kinds.values()) and len(kinds) == 26
    assert Counter(min(kinds["pretrain", s]) for s in range(20)) == {4: 12, 1: 8}           # 3 and 2 an epoch
    assert len({tuple(min(kinds["pretrain", 5 * e + s]) for s in range(5)) for e in range(4)}) > 1

    # Of one file in two corpora, and twice in one, each clip is of the same medium.
    with open(f"{sprites}/sprites_train.json") as f:
        names = [row["video"] for row in json.load(f)] + [f"train_{i:05}.mp4" for i in (2, 3, 5, 7, 11, 11)]
    media = {}
    for _, _, b in collected:
        for clip, medium in zip(b.clip.tolist(), b.media.tolist(), strict=True):
            media.setdefault(names[clip] if clip < 30 else clip, set()).add(medium)
    assert all(len(ids) == 1 for ids in media.values()) and len(set.union(*media.values())) == len(media)
    assert {clip for _, _, b in collected for clip in b.clip.tolist()} == {*range(46)} - {33}
    with open("out/a/bad_media.jsonl") as f:
        assert [json.loads(line)["where"] for line in f] == [f"{mixture}/pictures.json, row 3"]


def test_clips_of_one_file_in_two_corpora_are_no_wrong_answers_to_each_other(ready, sprites):
    with open(f"{sprites}/sprites_train.json") as f:
        listed = json.load(f)[:4]
    for name in ("one.json", "two.json"):                                   # eight clips: one step sees all of them
        with open(name, "w") as f:
            json.dump(listed, f)
    shutil.copytree(f"{sprites}/videos", "copies")
    losses = []
    for i, root in enumerate((f"{sprites}/videos", f"{sprites}/videos/../videos/.", "copies")):
        train.main(ready(f"--data.train one.json --data.root {sprites}/videos --data.more two.json={root} --name {i} "
                         "--steps 1"))
        losses.append(log(f"out/{i}")["pretrain", 1])
    assert losses[0] == losses[1] and losses[0]["mrm"] == losses[2]["mrm"] and losses[0]["mlm"] == losses[2]["mlm"]
    assert losses[0]["vtc"] != pytest.approx(losses[2]["vtc"], rel=1e-3)


def test_a_mixture_is_trained_alike_on_one_rank_and_on_two(mixed):
    train.main(mixed("--name one"))
    on_ranks(2, mixed("--name two"))
    assert_close_runs("out/one", "out/two")


def test_a_run_on_a_mixture_that_was_killed_ends_bit_for_bit_as_an_unbroken_one(mixed):
    flags = f"{UNCACHED} --mask.name random_frame --steps 10"
    train.main(mixed(f"{flags} --name whole"))
    for stage, step in (("pretrain", 6), ("unmasked", 5)):
        name = f"killed-in-{stage}"
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, stage, step)
            with pytest.raises(Killed):
                train.main(mixed(f"{flags} --name {name}"))
        train.main(mixed(f"{flags} --name {name} --resume"))
        assert_same(weights(f"out/{name}"), weights("out/whole"))
        assert log(f"out/{name}") == log("out/whole")
        with open(f"out/{name}/bad_media.jsonl") as f, open("out/whole/bad_media.jsonl") as g:
            assert f.read() == g.read()


def test_a_small_teacher_and_a_text_encoder_are_trained_on_the_mixture_too(sprites, mixture, collected, tmp_path,
                                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(config(sprites, f"--data.images {mixture}/pictures.json={mixture}/pictures --name all --small.steps 9 "
                               "--steps 4 --unmasked-steps 2"))
    frames = {stage: Counter() for stage in ("teacher", "text", "pretrain", "unmasked")}
    for stage, _, b in collected:
        frames[stage][b.video.shape[1]] += 1
    assert frames["teacher"].keys() == frames["text"].keys() == {1, 4} and sum(frames["teacher"].values()) == 9
    assert {stage for stage, _ in log("out/all/teacher")} == {"teacher"} and len(log("out/all")) == 6
    with open("out/all/teacher/bad_media.jsonl") as f:
        assert [json.loads(line)["where"] for line in f] == [f"{mixture}/pictures.json, row 3"]


def test_a_mask_hides_of_both_kinds_or_of_neither(sprites, first, mixed, mixture, capsys):
    given = f"--teacher {first}/out/first/teacher --text {first}/out/first/text --steps 3 --unmasked-steps 0 "
    images = f"--data.images {mixture}/pictures.json={mixture}/pictures "
    for ratio, image in ((0.75, 0.0), (0.0, 0.5), (0.75, 0.03), (0.01, 0.5)):       # 0.03 of 16 tokens is none
        flags = f"--name a --mask.ratio {ratio} --mask.image-ratio {image}"
        code, _, err = command("train.py", argv(sprites, given + images + flags), capsys)
        assert_one_line("train.py", code, err, f"mask.ratio {ratio} and mask.image_ratio {image}: of 16 tokens both")
    assert not states("out/a")
    train.main(mixed("--name a --steps 3 --unmasked-steps 0 --mask.ratio 0 --mask.image-ratio 0.0"))
    assert all("mrm" not in row for row in log("out/a").values())
    code, _, err = command("train.py", argv(sprites, given + "--name b --mask.image-ratio 0"), capsys)
    assert code == 0, err                                                   # without images nobody asks


@pytest.mark.parametrize("corpora, message", [
    ("--data.images nowhere.json=.", "nowhere.json: no such annotation file"),
    ("--data.more MIX/more.jsonl=nowhere", "nowhere: no such folder, wanted as the root of the videos in .*more.jsonl"),
    ("--data.images MIX/pictures.json", "a corpus wants to be FILE=FOLDER, is '.*pictures.json'"),
    ("--data.images MIX/pictures.json=MIX/pictures --data.max-bad 0.06",
     r"pictures.json, row 3: .*bad.jpg: .*\(1 of 16 videos cannot be read"),
])
def test_what_a_corpus_lacks_is_said_in_one_line(mixed, mixture, sprites, first, capsys, corpora, message):
    given = f"--teacher {first}/out/first/teacher --text {first}/out/first/text "
    code, _, err = command("train.py", argv(sprites, given + corpora.replace("MIX", mixture)), capsys)
    assert_one_line("train.py", code, err, message)
    assert not any(name.endswith((".safetensors", ".tmp", ".pt")) for _, _, names in os.walk("out") for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def private():
    """MB that this process has written, and so holds alone. Pages of files are the system's, which may drop them."""
    with open("/proc/self/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Private_Dirty:")) / 1024


def growth(rows):
    """
    What two processes forked from this one come to hold alone, each reading 5000 of the rows. They collect no garbage,
    which would touch all that pytest has.
    """
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()

    def main(seed):
        gc.disable()
        before, letters = private(), 0
        for i in np.random.default_rng(seed).integers(len(rows), size=5000):
            letters += len(rows[i].captions[0])
        found.put((private() - before, letters))

    processes = [fork.Process(target=main, args=(seed,)) for seed in range(2)]
    for p in processes:
        p.start()
    grown, letters = zip(*[found.get(timeout=60) for _ in processes], strict=True)
    for p in processes:
        p.join()
    return max(grown), sorted(letters)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux")
def test_a_loader_process_does_not_come_to_hold_the_rows(tmp_path):
    with open(tmp_path / "rows.jsonl", "w") as f:
        for i in range(200_000):
            f.write(f'{{"video": "{i:07}.mp4", "caption": "a caption of some {i} words, as they are"}}\n')
    rows = data.write_rows([(str(tmp_path / "rows.jsonl"), str(tmp_path))], str(tmp_path / "out"))
    mapped, read = growth(rows)
    listed, same = growth(list(rows))
    assert read == same and mapped < 5 and listed > 10 and listed > 3 * mapped
