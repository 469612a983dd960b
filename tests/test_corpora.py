"""Runs on corpora as they are: unusual and unreadable files, videos mixed with images, many annotations."""

import gc
import json
import multiprocessing
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.benchmarks import load_json, write_json
from helpers.runs import (
    Killed,
    argv,
    assert_close_runs,
    assert_one_line,
    assert_same,
    command,
    config,
    kill,
    log,
    on_ranks,
    read_rows,
    weights,
    with_weights,
)
from helpers.videos import ODD_IMAGES, ODD_VIDEOS, cut, write

import data
import loop
import train
from annotations import build_mapped_annotations, read_annotations
from data import ClipDataset
from masking import keep_count
from model import ClusterSTM
from runtime import RunContext, list_checkpoints
from targets import TargetProvider, compute_targets
from teacher import SigLIP
from tokenizer import load_tokenizer

UNCACHED = "--data.no-frame-cache --data.num-views 0 "


@pytest.fixture
def micro_batches(monkeypatch):
    """A list that fills with (stage, step, batch) of each micro-batch that this process trains on."""
    seen, iterate = [], data.iterate_micro_batches

    def iterate_and_record(run, dataset, tokenizer, stage, batch, micro_batch, step, steps):
        for s, group in enumerate(iterate(run, dataset, tokenizer, stage, batch, micro_batch, step, steps), step):
            seen.extend((stage, s, b) for b in group)
            yield group

    monkeypatch.setattr(loop, "iterate_micro_batches", iterate_and_record)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# A corpus of a hundred videos, of which 5 are unreadable

UNREADABLE = {"cut.mp4": "Invalid data", "empty.mp4": "Invalid data", "text.mp4": "Invalid data",
              "sound alone.mp4": "no video stream", "absent.mp4": "no such file"}


@pytest.fixture(scope="module")
def corpus(sprites, tmp_path_factory):
    """Folder with rows.json, videos/, and intact/, in which the unreadable videos are readable."""
    folder = tmp_path_factory.mktemp("corpus")
    intact, videos = folder / "intact", folder / "videos"
    intact.mkdir()
    names = [*(f"plain {i}.mp4" for i in range(100 - len(ODD_VIDEOS) - len(UNREADABLE))), *UNREADABLE]
    for i, name in enumerate(names):
        shutil.copyfile(f"{sprites}/videos/train_{i % 24:05}.mp4", intact / name)
    for name, write_odd in ODD_VIDEOS.items():
        write_odd(intact / name)
    shutil.copytree(intact, videos)
    cut(videos / "cut.mp4", 0.6)
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("these are words\n" * 100)
    write(videos / "sound alone.mp4", audio=True, video=False)
    os.remove(videos / "absent.mp4")
    names += ODD_VIDEOS
    random.Random(0).shuffle(names)
    rows = [{"video": name, "caption": [f"a red ring number {i}", f"{i} blue squares"]} for i, name in enumerate(names)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder)


@pytest.fixture
def flags(first_run, corpus):
    """Flags of a run of 13 steps of 8 clips on the corpus: each clip is seen once, and four twice."""
    return with_weights(first_run, f"--steps 13 --unmasked-steps 0 --data.train-file {corpus}/rows.json "
                               f"--data.video-root {corpus}/videos ")


@pytest.fixture
def corpus_config(sprites, flags, tmp_path, monkeypatch):
    """In a folder of its own: corpus_config(more flags) is the config of such a run."""
    monkeypatch.chdir(tmp_path)
    return lambda more="": config(sprites, flags + more)


def unreadable_rows(corpus):
    """Row -> path of the unreadable videos."""
    annotations = read_annotations(f"{corpus}/rows.json", f"{corpus}/videos", check=False)
    return {i: a.video for i, a in enumerate(annotations) if os.path.basename(a.video) in UNREADABLE}


def assert_each_is_listed_once(folder, corpus):
    records = read_rows(f"{folder}/bad_media.jsonl")
    row_of = {video: row for row, video in unreadable_rows(corpus).items()}
    assert sorted(record["video"] for record in records) == sorted(row_of)
    for record in records:
        video = record["video"]
        assert record.keys() == {"where", "video", "reason"}
        assert record["where"] == f"{corpus}/rows.json, row {row_of[video]}"
        assert record["reason"].startswith(f"{video}: ") and UNREADABLE[os.path.basename(video)] in record["reason"]


@pytest.mark.parametrize("more", ["--steps 26 ", UNCACHED, UNCACHED + "--data.num-workers 1 "],
                         ids=["cached frames and targets", "decoded", "decoded by a worker"])
def test_unreadable_files_are_listed_and_change_nothing_else(corpus_config, corpus, micro_batches, more):
    cfg = corpus_config(more + "--name a")
    train.main(cfg)
    assert os.path.exists("out/a/model.safetensors") and not os.path.exists("out/a/target_cache")
    assert_each_is_listed_once("out/a", corpus)
    assert all(np.isfinite(row["grad_norm"]) for row in log("out/a").values())

    annotations = read_annotations(cfg.data.train_file, f"{corpus}/intact")
    intact = ClipDataset(annotations, replace(cfg.data, frame_cache=False), cfg.seed)
    unreadable, n, replaced = unreadable_rows(corpus), 0, 0
    for _, _, b in micro_batches:
        for i, clip_id in enumerate(b.clip_ids.tolist()):
            expected = intact[n]
            if expected.clip_id in unreadable:
                replaced += 1
                assert clip_id not in unreadable
                assert unreadable[expected.clip_id] in {record["video"] for record in b.skipped}
                expected = intact.training_sample(clip_id, expected.view_id)
            assert (clip_id, b.view_ids[i], b.captions[i], b.frame_captions[i]) == (
                expected.clip_id, expected.view_id, expected.caption, expected.frame_caption)
            # The frame cache keeps 8 frames of each video, and reduces them.
            assert cfg.data.frame_cache or torch.equal(b.video[i], expected.video)
            n += 1
    assert n == cfg.steps * cfg.batch and replaced >= len(unreadable)
    assert sum(len(b.skipped) for _, _, b in micro_batches) >= replaced


def test_each_file_is_listed_once_on_two_ranks_and_after_a_kill(corpus_config, corpus):
    on_ranks(2, corpus_config(f"{UNCACHED} --name two"))
    assert_each_is_listed_once("out/two", corpus)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 9)
        with pytest.raises(Killed):
            train.main(corpus_config(f"{UNCACHED} --name killed"))
    with open("out/killed/bad_media.jsonl", "a") as f:
        assert 0 < os.path.getsize(f.name)
        f.write('{"where": "half a l')                                      # as after a loss of power
    on_ranks(2, corpus_config(f"{UNCACHED} --name killed --resume"))
    assert_each_is_listed_once("out/killed", corpus)
    one, other = log("out/two"), log("out/killed")
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=1e-3), key


def test_cached_targets_skip_what_cannot_be_read(corpus_config, corpus, first_run):
    cfg = corpus_config("--name a --steps 26 --data.num-views 1")
    annotations = read_annotations(cfg.data.train_file, cfg.data.video_root, check=False)
    dataset = ClipDataset(annotations, cfg.data, cfg.seed)
    tokenizer = load_tokenizer(f"{first_run}/out/first/text")
    teacher, run = SigLIP.from_pretrained(cfg.teacher), RunContext(cfg, "out/a", torch.device("cpu"), 0, 1)
    provider = TargetProvider(run, teacher, dataset)
    assert provider.enabled
    for step, group in enumerate(data.iterate_micro_batches(run, dataset, tokenizer, "pretrain", 8, 4, 0, 26)):
        with mock.patch.object(provider, "compute", wraps=provider.compute) as compute:
            targets = provider(group)
        # 100 clips, 8 per step: from step 13 on all are cached, also those drawn in place of unreadable ones.
        assert compute.call_count == 2 * (step < 13)
        for batch, found in zip(group, targets, strict=True):
            expected = compute_targets(teacher, batch, cfg.mask, cfg.mask.ratio, cfg.target_pooling)
            assert torch.equal(found.visible_ids, expected.visible_ids)
            torch.testing.assert_close(found.token_targets.float(), expected.token_targets, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found.text_embeds, expected.text_embeds, rtol=0, atol=1e-6)
    run.close()


def count_skipped(corpus, cfg):
    """How many draws of a video have failed after each step."""
    annotations = read_annotations(cfg.data.train_file, f"{corpus}/videos", check=False)
    dataset = ClipDataset(annotations, replace(cfg.data, frame_cache=False), cfg.seed)
    counts = np.cumsum([len(dataset[n].skipped) for n in range(cfg.steps * cfg.batch)])
    return counts[cfg.batch - 1::cfg.batch].tolist()


def test_a_run_stops_past_max_unreadable_and_can_be_resumed(corpus_config, corpus, monkeypatch):
    monkeypatch.setattr(loop.Health, "MIN_SAMPLES", 24)
    skipped = count_skipped(corpus, corpus_config(UNCACHED))
    step = next(s for s in range(3, 14) if skipped[s - 1] > 0.02 * (8 * s + skipped[s - 1]))
    assert 3 <= step < 13
    count = skipped[step - 1]
    match = rf"{count} of {8 * step + count} videos.*max_unreadable.*0\.02.*out/a/bad_media.jsonl"
    with pytest.raises(ValueError, match=match) as error:                   # flags are read one step later
        train.main(corpus_config(f"{UNCACHED} --name a --data.max-unreadable 0.02 --log-every 1000"))
    assert "\n" not in str(error.value)
    assert list_checkpoints("out/a")[0] == f"out/a/checkpoints/pretrain-{step:07d}.pt"
    assert {record["video"] for record in read_rows("out/a/bad_media.jsonl")} <= set(unreadable_rows(corpus).values())
    with pytest.raises(ValueError, match=r"max_unreadable.*0\.02"):
        train.main(corpus_config(f"{UNCACHED} --name a --data.max-unreadable 0.02 --resume"))
    train.main(corpus_config(f"{UNCACHED} --name a --data.max-unreadable 0.9 --resume"))
    assert_each_is_listed_once("out/a", corpus)
    train.main(corpus_config(f"{UNCACHED} --name b --data.max-unreadable 0.9 --log-every 1"))
    assert_same(weights("out/a"), weights("out/b"))


def test_a_short_stage_judges_unreadable_videos_at_its_end(corpus_config, corpus, sprites, flags, capsys):
    skipped = count_skipped(corpus, corpus_config(UNCACHED))[-1]
    flags += f"{UNCACHED} --name a --data.max-unreadable 0.02 "
    match = f"{skipped} of {104 + skipped} videos.*out/a/bad_media.jsonl"
    code, _, err = command("train.py", argv(sprites, flags), capsys)
    assert_one_line("train.py", code, err, match)
    assert list_checkpoints("out/a")[0] == "out/a/checkpoints/pretrain-0000013.pt"
    assert not os.path.exists("out/a/before_unmasked")
    assert_each_is_listed_once("out/a", corpus)
    code, _, err = command("train.py", argv(sprites, flags + "--resume"), capsys)          # nothing has changed
    assert_one_line("train.py", code, err, match)
    assert not os.path.exists("out/a/before_unmasked")
    code, _, err = command("train.py", argv(sprites, flags + "--resume --data.max-unreadable 0.9"), capsys)
    assert code == 0 and os.path.exists("out/a/model.safetensors"), err


def test_a_frame_cache_judges_unreadable_videos_before_training(corpus_config, corpus):
    row, video = min(unreadable_rows(corpus).items())
    match = re.escape(f"{corpus}/rows.json, row {row}: {video}: ") + r".*5 of 100 videos.*max_unreadable.*0\.04"
    with pytest.raises(ValueError, match=match) as error:
        train.main(corpus_config("--name a --data.max-unreadable 0.04"))
    assert "\n" not in str(error.value)
    assert not list_checkpoints("out/a") and not os.path.exists("out/a/log.jsonl")
    train.main(corpus_config("--name a --data.max-unreadable 0.05 --steps 1"))


# ---------------------------------------------------------------------------------------------------------------------
# Videos and images

REPEATED = (2, 3, 5, 7, 11, 11)                                             # sprites that a second corpus lists again


@pytest.fixture(scope="module")
def images(tmp_path_factory, sprites):
    """Folder with images.json, images/ (one of 16 is unreadable), and videos.jsonl, which lists sprites."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "images").mkdir()
    rows = []
    for i, (name, save) in enumerate(ODD_IMAGES.items()):
        save(folder / "images" / name, i)
        rows.append({"image": name, "caption": f"picture {i} of squares"})
    (folder / "images" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    rows.insert(3, {"image": "bad.jpg", "caption": "nothing"})
    (folder / "images.json").write_text(json.dumps(rows))
    lines = [json.dumps({"video": f"train_{i:05}.mp4", "caption": f"clip {i} again"}) for i in REPEATED]
    (folder / "videos.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def mixed_config(run_config, sprites, images):
    """mixed_config(flags) is the config of a run on 30 videos and 16 images."""
    return lambda flags="": run_config(f"--data.extra-videos {images}/videos.jsonl={sprites}/videos "
                                       f"--data.image-corpora {images}/images.json={images}/images {flags}")


def test_videos_and_images_take_turns(mixed_config, images, sprites, micro_batches):
    shapes = []                                                             # (frames, visible tokens) in each forward

    def forward(self, batch, targets, *rest):
        shapes.append((batch.video.shape[1], targets.visible_ids.shape[1] if targets else None))
        return original(self, batch, targets, *rest)

    cfg, original = mixed_config("--name a --mask.image-ratio 0.5"), ClusterSTM.forward
    with mock.patch.object(ClusterSTM, "forward", forward):
        train.main(cfg)
    assert all(np.isfinite(row["grad_norm"]) for row in log("out/a").values()) and len(log("out/a")) == 26
    visible = {4: 4 * keep_count(16, 0.75), 1: keep_count(16, 0.5)}         # of T frames of 4 x 4 patches
    assert visible == {4: 16, 1: 8}
    assert shapes == [(b.video.shape[1], visible[b.video.shape[1]] if stage == "pretrain" else None)
                      for stage, _, b in micro_batches]
    frames_of_step = {}
    for stage, step, b in micro_batches:
        frames_of_step.setdefault((stage, step), set()).add(b.video.shape[1])
        assert ((b.clip_ids < 30) == (b.video.shape[1] == 4)).all()         # image i is clip 30 + i
    assert all(len(frames) == 1 for frames in frames_of_step.values()) and len(frames_of_step) == 26
    frames = [min(frames_of_step["pretrain", step]) for step in range(20)]
    assert Counter(frames) == {4: 12, 1: 8}                                 # an epoch has 3 and 2
    assert len({tuple(frames[i:i + 5]) for i in range(0, 20, 5)}) > 1

    # A file has one media id, in two corpora and in two rows of one.
    rows = load_json(f"{sprites}/sprites_train.json")
    names = [row["video"] for row in rows] + [f"train_{i:05}.mp4" for i in REPEATED]
    media_ids = {}
    for _, _, b in micro_batches:
        for clip_id, media_id in zip(b.clip_ids.tolist(), b.media_ids.tolist(), strict=True):
            media_ids.setdefault(names[clip_id] if clip_id < 30 else clip_id, set()).add(media_id)
    assert all(len(ids) == 1 for ids in media_ids.values()) and len(set.union(*media_ids.values())) == len(media_ids)
    assert {clip_id for _, _, b in micro_batches for clip_id in b.clip_ids.tolist()} == {*range(46)} - {33}
    assert [record["where"] for record in read_rows("out/a/bad_media.jsonl")] == [f"{images}/images.json, row 3"]


def test_one_file_in_two_corpora_is_not_a_negative_of_itself(corpus_config, sprites):
    rows = load_json(f"{sprites}/sprites_train.json")[:4]
    for name in ("one.json", "two.json"):                                   # eight clips, all of them in one step
        write_json(name, rows)
    shutil.copytree(f"{sprites}/videos", "copies")
    losses = []
    for i, root in enumerate((f"{sprites}/videos", f"{sprites}/videos/../videos/.", "copies")):
        train.main(corpus_config(f"--data.train-file one.json --data.video-root {sprites}/videos "
                                 f"--data.extra-videos two.json={root} --name {i} --steps 1"))
        losses.append(log(f"out/{i}")["pretrain", 1])
    same, other_path, copies = losses
    assert same == other_path and same["mrm"] == copies["mrm"] and same["mlm"] == copies["mlm"]
    assert same["vtc"] != pytest.approx(copies["vtc"], rel=1e-3)


def test_a_mixture_is_trained_alike_on_one_rank_and_on_two(mixed_config):
    train.main(mixed_config("--name one"))
    on_ranks(2, mixed_config("--name two"))
    assert_close_runs("out/one", "out/two")


def test_a_killed_run_on_a_mixture_resumes_bit_for_bit(mixed_config):
    flags = f"{UNCACHED} --mask.name random_frame --steps 10"
    train.main(mixed_config(f"{flags} --name whole"))
    for stage, step in (("pretrain", 6), ("unmasked", 5)):
        name = f"killed-in-{stage}"
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, stage, step)
            with pytest.raises(Killed):
                train.main(mixed_config(f"{flags} --name {name}"))
        train.main(mixed_config(f"{flags} --name {name} --resume"))
        assert_same(weights(f"out/{name}"), weights("out/whole"))
        assert log(f"out/{name}") == log("out/whole")
        assert read_rows(f"out/{name}/bad_media.jsonl") == read_rows("out/whole/bad_media.jsonl")


def test_toy_models_are_trained_on_the_mixture_too(sprites, images, micro_batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(config(sprites, f"--data.image-corpora {images}/images.json={images}/images --name all --toy.steps 9 "
                               "--steps 4 --unmasked-steps 2"))
    frames = {stage: Counter() for stage in ("teacher", "text", "pretrain", "unmasked")}
    for stage, _, b in micro_batches:
        frames[stage][b.video.shape[1]] += 1
    assert frames["teacher"].keys() == frames["text"].keys() == {1, 4} and sum(frames["teacher"].values()) == 9
    assert {stage for stage, _ in log("out/all/teacher")} == {"teacher"} and len(log("out/all")) == 6
    assert [record["where"] for record in read_rows("out/all/teacher/bad_media.jsonl")] == [
        f"{images}/images.json, row 3"]


def test_a_mask_hides_tokens_of_both_videos_and_images_or_of_neither(sprites, first_run, mixed_config, images, capsys):
    flags = with_weights(first_run, "--steps 3 --unmasked-steps 0 ")
    corpus = f"--data.image-corpora {images}/images.json={images}/images "
    for ratio, image_ratio in ((0.75, 0.0), (0.0, 0.5), (0.75, 0.03), (0.01, 0.5)):        # 3 % of 16 tokens is none
        masks = f"--name a --mask.ratio {ratio} --mask.image-ratio {image_ratio}"
        code, _, err = command("train.py", argv(sprites, flags + corpus + masks), capsys)
        assert_one_line("train.py", code, err, "mask must hide at least 2 tokens.*got 0 of")
    assert not list_checkpoints("out/a")
    train.main(mixed_config("--name a --steps 3 --unmasked-steps 0 --mask.ratio 0 --mask.image-ratio 0.0"))
    assert all("mrm" not in row for row in log("out/a").values())
    code, _, err = command("train.py", argv(sprites, flags + "--name b --mask.image-ratio 0"), capsys)
    assert code == 0, err                                                   # without images it does not matter


@pytest.mark.parametrize("flags, match", [
    ("--data.image-corpora nowhere.json=.", "nowhere.json"),
    ("--data.extra-videos IMAGES/videos.jsonl=nowhere", "nowhere.*videos.jsonl"),
    ("--data.image-corpora IMAGES/images.json", "FILE=FOLDER.*'.*images.json'"),
    ("--data.image-corpora IMAGES/images.json=IMAGES/images --data.max-unreadable 0.06",
     "images.json, row 3: .*bad.jpg: .*1 of 16 videos"),
])
def test_a_bad_corpus_is_named_in_one_line(sprites, first_run, images, tmp_path, monkeypatch, capsys, flags, match):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("train.py", argv(sprites, with_weights(first_run, flags.replace("IMAGES", images))), capsys)
    assert_one_line("train.py", code, err, match)
    assert not any(name.endswith((".safetensors", ".tmp", ".pt")) for _, _, names in os.walk("out") for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def private_memory():
    """MB that this process has written, and so does not share. Pages of files belong to the system."""
    with open("/proc/self/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Private_Dirty:")) / 1024


def growth(annotations):
    """
    -> how much the private memory of two forked processes grows, at most, if each reads 5000 of the annotations; and
    how many letters they read. They collect no garbage, which would touch all that pytest has.
    """
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def main(seed):
        gc.disable()
        before, letters = private_memory(), 0
        for i in np.random.default_rng(seed).integers(len(annotations), size=5000):
            letters += len(annotations[i].captions[0])
        results.put((private_memory() - before, letters))

    processes = [fork.Process(target=main, args=(seed,)) for seed in range(2)]
    for p in processes:
        p.start()
    grown, letters = zip(*[results.get(timeout=60) for _ in processes], strict=True)
    for p in processes:
        p.join()
    return max(grown), sorted(letters)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux only")
def test_loader_processes_share_the_annotations(tmp_path):
    with open(tmp_path / "rows.jsonl", "w") as f:
        for i in range(100_000):
            f.write(f'{{"video": "{i:07}.mp4", "caption": "a caption of some {i} words, as they are"}}\n')
    mapped = build_mapped_annotations([(str(tmp_path / "rows.jsonl"), str(tmp_path))], str(tmp_path / "out"))
    mapped_growth, letters = growth(mapped)
    list_growth, same_letters = growth(list(mapped))
    assert letters == same_letters and mapped_growth < 5 and list_growth > 10 and list_growth > 3 * mapped_growth


def test_where_clips_vary_images_take_a_drawn_size_and_their_own_ratio(mixed_config, micro_batches, monkeypatch):
    visible, compute = [], TargetProvider.compute

    def compute_and_record(self, batch):
        targets = compute(self, batch)
        visible.append((batch.video.shape[1], batch.video.shape[3], targets.visible_ids.shape[1]))
        return targets

    monkeypatch.setattr(TargetProvider, "compute", compute_and_record)
    train.main(mixed_config("--name a --steps 12 --unmasked-steps 0 --micro-batch 2 --mask.name random_frame "
                            "--data.frames-range 2 4 1 --data.size-range 12 20 4 --mask.tokens 12"))
    shapes = [tuple(b.video.shape[1:]) for _, _, b in micro_batches]
    assert shapes == [(T, 3, size, size) for T, size, _ in visible] and {size for _, size, _ in visible} == {12, 16, 20}
    assert {T for T, *_ in visible} == {1, 2, 3, 4} and len({size for T, size, _ in visible if T == 1}) == 3
    for T, size, count in visible:
        assert count == (keep_count((size // 4) ** 2, 0.5) if T == 1 else 12)
