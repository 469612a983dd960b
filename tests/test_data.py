"""Samples as functions of (seed, n), unreadable videos, batches, crops resized by the device, the loader of a run."""

import os
import pickle
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.videos import cut, noise_frames, numbers, write, write_frames

import data
import video
from annotations import Annotation, Question
from data import ClipDataset, DataConfig, MixedDataset, collate
from encoders import TextEncoderConfig
from masking import MaskConfig
from runtime import RunContext
from tokenizer import build_wordpiece, encode_answers, encode_texts, load_tokenizer

CFG = DataConfig(num_frames=4, image_size=32, min_crop_scale=0.5, hflip=True, num_views=0, frame_cache=False,
                 cache_image_size=64, max_unreadable=0.5)           # everything that can be random is


def annotation(path, index=0, captions=("x",), **fields):
    return Annotation(str(path), list(captions), fields.pop("frame_caption", None), fields.pop("media_id", index),
                      source=fields.pop("source", f"rows.json, row {index}"), **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of 24 videos of 8 frames and a tokenizer.json."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    for i in range(24):
        write_frames(folder / "videos" / f"{i}.mp4", noise_frames(8, 48, 64, i).permute(0, 2, 3, 1).numpy())
    build_wordpiece([f"caption {i} one two of" for i in range(24)], str(folder / "tokenizer.json"))
    return folder


def annotations_of(folder):
    return [annotation(folder / "videos" / f"{i}.mp4", i, [f"caption {i}", f"caption {i} again"],
                       frame_caption=f"frame {i}" if i % 2 else None, media_id=100 + i) for i in range(24)]


@pytest.fixture
def annotations(folder):
    return annotations_of(folder)


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(str(folder))


def same(a, b):
    return torch.equal(a.video, b.video) and replace(a, video=None) == replace(b, video=None)


# ---------------------------------------------------------------------------------------------------------------------
# Samples

def test_a_sample_is_a_function_of_seed_and_n(annotations):
    dataset = ClipDataset(annotations, CFG, seed=3)
    order = [5, 24, 100, 23, 0, 47, 5]                                      # as a resumed or a parallel run asks
    samples = [dataset[n] for n in order]
    again = pickle.loads(pickle.dumps(ClipDataset(annotations, CFG, seed=3)))
    for n, sample in sorted(zip(order, samples, strict=True), key=lambda pair: pair[0]):
        assert same(again[n], sample)
    other = ClipDataset(annotations, CFG, seed=4)
    assert [other[n].clip_id for n in range(24)] != [dataset[n].clip_id for n in range(24)]
    loaded = torch.utils.data.DataLoader(dataset, sampler=order, batch_size=None, num_workers=2,
                                         collate_fn=lambda x: x)
    assert all(same(a, b) for a, b in zip(samples, loaded, strict=True))
    with pytest.raises(IndexError):
        dataset[-1]


def test_a_sample_draws_from_the_documented_seeds(annotations):
    """Restated from the definition: what a finished run trained on must not change with the code."""
    dataset = ClipDataset(annotations, CFG, seed=3, index_offset=7)
    for n in (0, 30, 55):
        epoch, i = divmod(n, 24)
        index = int(np.random.default_rng((3, epoch)).permutation(24)[i])
        rng = np.random.default_rng((3, 7 + index, epoch, 1))
        caption = annotations[index].captions[rng.integers(2)]
        frames = video.read_frames(annotations[index].video, 4, "random", rng)
        sample = dataset[n]
        assert (sample.clip_id, sample.view_id, sample.caption) == (7 + index, epoch, caption)
        assert torch.equal(sample.video, video.train_transform(frames, 32, 0.5, True, rng))


def test_every_epoch_is_another_permutation_of_the_annotations(annotations):
    dataset = ClipDataset(annotations, CFG)
    epochs = [[dataset[24 * epoch + i] for i in range(24)] for epoch in range(3)]
    orders = [[s.clip_id for s in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [s.view_id for s in epochs[2]] == [2] * 24
    for s in epochs[1]:
        row = dataset.annotation(s.clip_id)
        assert s.caption in row.captions and s.frame_caption == (row.frame_caption or s.caption)
        assert s.media_id == row.media_id == 100 + s.clip_id
    assert len({s.caption for s in epochs[0] if s.caption.endswith("again")}) not in (0, 24)    # one is drawn


@pytest.mark.parametrize("num_views", [0, 1, 2])
def test_a_clip_has_num_views_different_views(annotations, num_views):
    dataset = ClipDataset(annotations[:6], replace(CFG, num_views=num_views))
    seen = [{} for _ in range(6)]
    for n in range(24):
        sample = dataset[n]
        pixels = sample.video.numpy().tobytes()
        assert seen[sample.clip_id].setdefault(sample.view_id, pixels) == pixels
    assert all(len(views) == len(set(views.values())) == (num_views or 4) for views in seen)


@pytest.mark.parametrize("frame_cache", [False, True])
def test_training_draws_frames_and_evaluation_takes_the_middles(tmp_path, frame_cache):
    rows = [annotation(write(tmp_path / "a.mp4"))]
    cfg = DataConfig(num_frames=4, image_size=48, num_views=0, cache_frames=50, frame_cache=frame_cache)
    dataset = ClipDataset(rows, cfg, cache_folder=str(tmp_path))
    assert len({tuple(numbers(dataset[epoch].video)) for epoch in range(6)}) == 6
    assert numbers(ClipDataset(rows, cfg, train=False, cache_folder=str(tmp_path))[0].video) == [5, 18, 30, 43]
    few = replace(cfg, max_seconds=1)                                       # of ten frames
    assert numbers(ClipDataset(rows, few, train=False, cache_folder=str(tmp_path))[0].video) == [0, 3, 5, 8]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("frame_cache", [False, True])
def test_the_last_frame_of_a_short_video_is_repeated(tmp_path, frame_cache, train):
    cfg = DataConfig(num_frames=8, image_size=24, frame_cache=frame_cache)
    rows = [annotation(write(tmp_path / "short.mp4", n=5))]
    dataset = ClipDataset(rows, cfg, train=train, cache_folder=str(tmp_path))
    assert numbers(dataset[0].video) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_evaluation_takes_each_annotation_and_its_first_caption(annotations):
    dataset = ClipDataset(annotations, CFG, train=False)
    for n in (0, 7, 23):
        sample = dataset[n]
        expected = video.eval_transform(video.read_frames(annotations[n].video, 4), 32)
        assert torch.equal(sample.video, expected)
        assert (sample.clip_id, sample.view_id, sample.caption) == (n, 0, f"caption {n}")
        assert sample.frame_caption == (f"frame {n}" if n % 2 else sample.caption)
    with pytest.raises(IndexError):
        dataset[24]


@pytest.mark.parametrize("train", [True, False])
def test_samples_from_the_cache_equal_decoded_ones(annotations, folder, train):
    cached = ClipDataset(annotations, replace(CFG, frame_cache=True), train=train, cache_folder=str(folder))
    decoded = ClipDataset(annotations, CFG, train=train)
    assert cached.cache is not None and decoded.cache is None
    assert all(same(cached[n], decoded[n]) for n in range(30 if train else 24))


def test_the_cache_lies_next_to_the_annotations(annotations, folder):
    cfg = replace(CFG, frame_cache=True, train_file=f"{folder}/rows.json")
    assert os.path.dirname(ClipDataset(annotations[:2], cfg).cache.path) == str(folder)


def test_samples_from_a_jpeg_cache_are_close(annotations, tmp_path):
    cfg = replace(CFG, frame_cache=True, cache_jpeg_quality=95)
    jpegs = ClipDataset(annotations[:3], cfg, cache_folder=str(tmp_path))
    decoded, again = ClipDataset(annotations[:3], CFG), pickle.loads(pickle.dumps(jpegs))
    for n in range(6):
        a, b = decoded[n], jpegs[n]
        assert replace(a, video=None) == replace(b, video=None) and a.video.shape == b.video.shape
        assert 0 < (a.video.float() - b.video.float()).abs().mean() < 12 and same(again[n], b)


# ---------------------------------------------------------------------------------------------------------------------
# Videos that cannot be read

BROKEN = {3: "Invalid data", 8: "Invalid data", 9: "no such file", 20: "has no video stream"}


@pytest.fixture
def copies(folder, tmp_path):
    """The annotations with copies of the videos that a test may break."""
    shutil.copytree(folder / "videos", tmp_path / "videos")
    return annotations_of(tmp_path)


def break_videos(rows):
    cut(rows[3].video, 0.5)
    with open(rows[8].video, "wb"):
        pass
    os.remove(rows[9].video)
    write(rows[20].video, audio=True, video=False)


@pytest.mark.parametrize("frame_cache", [False, True])
def test_an_unreadable_clip_is_replaced_and_others_are_unchanged(copies, tmp_path, frame_cache):
    intact = [ClipDataset(copies, CFG, seed=3)[n] for n in range(72)]
    dataset = ClipDataset(copies, CFG, seed=3)
    views = {(clip, view): dataset.training_sample(clip, view) for clip in range(24) for view in range(3)}
    break_videos(copies)
    broken = ClipDataset(copies, replace(CFG, frame_cache=frame_cache), seed=3, cache_folder=str(tmp_path))
    replaced = {}
    for n in np.random.default_rng(0).permutation(72).tolist():
        sample, clip_id = broken[n], intact[n].clip_id
        if clip_id not in BROKEN:
            assert same(sample, intact[n]) and sample.skipped == []
            continue
        assert sample.clip_id not in BROKEN and sample.view_id == n // 24
        assert same(replace(sample, skipped=[]), views[sample.clip_id, sample.view_id])     # caption and ids too
        assert sample.skipped[0]["video"] == copies[clip_id].video
        for record in sample.skipped:
            row = next(i for i in BROKEN if copies[i].video == record["video"])
            assert record.keys() == {"where", "video", "reason"} and record["where"] == copies[row].source
            assert record["reason"].startswith(f"{record['video']}: ") and BROKEN[row] in record["reason"]
        replaced[n] = sample
    assert len(replaced) == 3 * len(BROKEN) and len({sample.clip_id for sample in replaced.values()}) > 4
    again = pickle.loads(pickle.dumps(broken))
    assert all(same(again[n], sample) for n, sample in replaced.items())
    for n, sample in replaced.items():                                      # the documented seed, as it must stay
        draws = np.random.default_rng((3, n, 0, 2)).integers(24, size=len(sample.skipped))
        assert sample.clip_id == draws[-1]
    other = ClipDataset(copies, CFG, seed=3, index_offset=100)
    assert any(other[n].clip_id - 100 != sample.clip_id for n, sample in replaced.items())


def test_all_videos_skipped_before_a_sample_are_listed_in_order(tmp_path):
    rows = [annotation(tmp_path / f"{i}.mp4", i, [str(i)]) for i in range(8)]
    readable = [0, 2, 5, 7]
    for i in readable:
        write(rows[i].video, n=8)
    dataset = ClipDataset(rows, DataConfig(num_frames=4, image_size=24, frame_cache=False, num_views=0))
    num_several = 0
    for n in range(64):
        epoch, i = divmod(n, 8)
        sample = dataset[n]
        assert sample.view_id == epoch and sample.clip_id in readable
        assert (sample.caption, sample.media_id) == (str(sample.clip_id), sample.clip_id)
        skipped = [int(record["where"].removeprefix("rows.json, row ")) for record in sample.skipped]
        assert sample.skipped == [{"where": rows[i].source, "video": rows[i].video,
                                   "reason": f"{rows[i].video}: no such file"} for i in skipped]
        first = int(dataset.permutation[i])
        assert not {*skipped} & {*readable} and skipped[:1] == [first] * (first not in readable)
        num_several += len(set(skipped)) > 1
    assert num_several > 10


def test_ten_unreadable_videos_in_a_row_are_an_error(tmp_path):
    rows = [annotation(tmp_path / f"{i}.mp4", i) for i in range(3)]
    dataset = ClipDataset(rows, DataConfig(frame_cache=False))
    with mock.patch.object(data, "read_frames", wraps=data.read_frames) as read:
        with pytest.raises(ValueError, match=r"rows.json, row \d: .*\d.mp4: no such file.* 9 ") as error:
            dataset[0]
    assert read.call_count == 10 and "\n" not in str(error.value)


@pytest.mark.parametrize("frame_cache", [False, True])
def test_evaluation_replaces_nothing(copies, tmp_path, frame_cache):
    cfg = replace(CFG, frame_cache=frame_cache)
    dataset = ClipDataset(copies, cfg, train=False, cache_folder=str(tmp_path))
    intact = [dataset[n] for n in range(24)]
    break_videos(copies)
    dataset = ClipDataset(copies, cfg, train=False, cache_folder=str(tmp_path))
    for n in range(24):
        if n in BROKEN:
            with pytest.raises((ValueError, FileNotFoundError), match=f"{copies[n].video}: .*{BROKEN[n]}"):
                dataset[n]
        else:
            assert same(dataset[n], intact[n])


def test_videos_of_an_unknown_codec_are_skipped(tmp_path):
    path = write(tmp_path / "a.mp4", n=8)
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content.replace(b"avc1", b"zzzz"))
    rows = [annotation(path), annotation(write(tmp_path / "good.mp4", n=8), 1)]
    dataset = ClipDataset(rows, replace(CFG, frame_cache=True), cache_folder=str(tmp_path))
    samples = [dataset[n] for n in (0, 1)]
    assert [s.clip_id for s in samples] == [1, 1]
    assert {record["video"] for s in samples for record in s.skipped} == {path}


@pytest.mark.parametrize("count_read, count_all", [(1, 3), (3, 3)])
def test_one_readable_video_is_enough(count_read, count_all):
    data.require_readable(count_read, count_all)
    with pytest.raises(ValueError, match=f"none of {count_all}"):
        data.require_readable(0, count_all)


# ---------------------------------------------------------------------------------------------------------------------
# Videos and images mixed

MIXES = [(10, 7, 3), (5, 2, 4), (3, 9, 1), (8, 8, 8), (1, 1, 2), (23, 60, 5)]       # videos, images, batch


@pytest.fixture
def mixed(monkeypatch):
    """mixed(videos, images, batch, seed) -> MixedDataset of so many clips; the frames show the file and a draw."""
    def read(path, count, strategy, rng, seconds):
        frames = torch.empty(count, 3, 4, 4, dtype=torch.uint8)
        frames[:], frames[:, 1] = int(path.path.split("/")[1]), int(rng.integers(256))
        return frames

    def clips(kind, count, offset, num_frames, seed):
        rows = [annotation(f"{kind}/{i}", i, [f"{kind} {i}", "x"], media_id=1000 * offset + i) for i in range(count)]
        cfg = DataConfig(num_frames=num_frames, image_size=4, num_views=0, frame_cache=False)
        return ClipDataset(rows, cfg, seed, index_offset=offset)

    monkeypatch.setattr(data, "read_frames", read)
    return lambda videos, images, batch, seed=5: MixedDataset(clips("videos", videos, 0, 4, seed),
                                                              clips("images", images, videos, 1, seed), batch)


@pytest.mark.parametrize("videos, images, batch", MIXES)
def test_batches_are_of_one_kind_and_as_many_as_the_clips_fill(mixed, videos, images, batch):
    dataset = mixed(videos, images, batch)
    share = {4: max(1, videos // batch), 1: max(1, images // batch)}        # by number of frames
    seen, orders = {4: [], 1: []}, set()
    for epoch in range(4):
        kinds = []
        for b in range(epoch * sum(share.values()), (epoch + 1) * sum(share.values())):
            samples = [dataset[n] for n in range(b * batch, (b + 1) * batch)]
            kind, = {len(s.video) for s in samples}
            kinds.append(kind)
            seen[kind] += samples
        assert sorted(kinds) == sorted([4] * share[4] + [1] * share[1])
        orders.add(tuple(kinds))
    assert len(orders) > 1 or share == {4: 1, 1: 1}
    for (frames, samples), clips in zip(seen.items(), mixed(videos, images, batch).datasets, strict=True):
        assert len(samples) == 4 * share[frames] * batch
        assert all(same(sample, clips[n]) for n, sample in enumerate(samples))


@pytest.mark.parametrize("videos, images, batch", MIXES)
def test_a_mixed_sample_is_a_function_of_seed_and_n(mixed, videos, images, batch):
    count = 6 * (videos + images + batch)
    dataset, other = mixed(videos, images, batch), mixed(videos, images, batch, seed=6)
    expected = [dataset[n] for n in range(count)]
    again = pickle.loads(pickle.dumps(mixed(videos, images, batch)))
    for n in np.random.default_rng(1).permutation(count).tolist():
        assert same(again[n], expected[n])
    assert [len(other[n].video) for n in range(count)] != [len(s.video) for s in expected]
    assert not all(same(other[n], s) for n, s in enumerate(expected))
    with pytest.raises((IndexError, ValueError)):
        dataset[-1]


def test_clip_ids_of_images_follow_those_of_videos(mixed):
    dataset = mixed(5, 7, 3)
    samples = [dataset[n] for n in range(100)]
    assert len(dataset) == 12 and {s.clip_id for s in samples} == set(range(12))
    for s in samples:
        kind, i = ("videos", s.clip_id) if s.clip_id < 5 else ("images", s.clip_id - 5)
        row = dataset.annotation(s.clip_id)
        assert row.video == f"{kind}/{i}" and len(s.video) == (4 if kind == "videos" else 1)
        assert s.video[0, 0, 0, 0] == i and s.caption in (f"{kind} {i}", "x") and s.media_id == row.media_id


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def test_a_batch_holds_its_samples(annotations, tokenizer):
    dataset = ClipDataset(annotations, CFG)
    samples = [dataset[n] for n in range(5)]
    batch = collate(samples, tokenizer, 10, seed=9)
    assert batch.video.shape == (5, 4, 3, 32, 32) and batch.video.dtype == torch.uint8
    assert torch.equal(batch.text_ids, encode_texts(tokenizer, batch.captions, 10)) and batch.seed == 9
    for i, s in enumerate(samples):
        assert torch.equal(batch.video[i], s.video)
        assert (batch.captions[i], batch.frame_captions[i]) == (s.caption, s.frame_caption)
        assert (batch.media_ids[i], batch.clip_ids[i], batch.view_ids[i]) == (s.media_id, s.clip_id, s.view_id)
    moved = batch.to("meta")
    assert moved.video.is_meta and moved.text_ids.is_meta and moved.media_ids.is_meta
    assert moved.captions == batch.captions and not batch.video.is_meta
    assert moved.clip_ids is batch.clip_ids and moved.view_ids is batch.view_ids        # stay on the host


def test_a_batch_of_questions_holds_their_texts_and_answers(annotations, tokenizer):
    questions = [[Question("one", {"two": 1.0, "of": 0.5})], [], [Question("two", {"one": 0.25}), Question("of", {})]]
    rows = [replace(row, questions=q) for row, q in zip(annotations, questions, strict=False)]
    dataset = ClipDataset(rows, CFG, train=False)
    batch = collate([dataset[n] for n in range(3)], tokenizer, 4, seed=0, max_answer_length=3)
    assert torch.equal(batch.text_ids, encode_texts(tokenizer, ["one", "two", "of"], 4))
    assert torch.equal(batch.answer_ids, encode_answers(tokenizer, ["two", "of", "one"], 3))
    assert batch.clip_index.tolist() == [0, 2, 2] and batch.question_index.tolist() == [0, 0, 1]
    assert batch.answer_weight.tolist() == [1, 0.5, 0.25] and batch.answer_weight.dtype == torch.float32
    assert len(batch.video) == 3


def test_a_batch_lists_what_its_samples_skipped(copies, tokenizer):
    break_videos(copies)
    dataset = ClipDataset(copies, CFG)
    samples = [dataset[n] for n in range(24)]
    batch = collate(samples, tokenizer, 10, seed=9)
    assert batch.skipped == [record for sample in samples for record in sample.skipped] and len(batch.skipped) >= 4
    assert batch.to("meta").skipped == batch.skipped


# ---------------------------------------------------------------------------------------------------------------------
# Crops that the device resizes

SHAPES = {"of": (40, 70), "small": (9, 13), "wide": (30, 200), "exact": (32, 32), "large": (100, 120), "odd": (61, 33)}


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory):
    """A lossless video of each of SHAPES, of eight frames of noise."""
    folder = tmp_path_factory.mktemp("shapes")
    for i, (name, (H, W)) in enumerate(SHAPES.items()):
        frames = noise_frames(8, H, W, i).permute(0, 2, 3, 1).numpy()
        write_frames(folder / f"{name}.mkv", frames, "ffv1", "bgr0", rate=8)
    return folder


def annotations_of_shapes(folder, names=SHAPES, offset=0):
    return [annotation(folder / f"{name}.mkv", offset + i, [f"{name} one", "two"]) for i, name in enumerate(names)]


VIEWS = {
    "whole frames": {}, "flips": dict(hflip=True, num_views=0),
    "crops": dict(min_crop_scale=0.3, hflip=True, num_views=0), "fixed views": dict(min_crop_scale=0.5, num_views=2),
    "a cache": dict(min_crop_scale=0.3, hflip=True, num_views=0, frame_cache=True, cache_image_size=70),
}


@pytest.mark.parametrize("options, size", [*[(v, 32) for v in VIEWS.values()], (VIEWS["crops"], 20),
                                           (VIEWS["crops"], 64)], ids=[*VIEWS, "small crops", "large crops"])
def test_crops_resized_on_the_device_equal_those_of_the_loader(shapes_folder, tokenizer, options, size):
    cfg, is_resized = DataConfig(**{"num_frames": 3, "image_size": size, "frame_cache": False, **options}), set()
    rows = annotations_of_shapes(shapes_folder)
    for seed in range(4):
        samples = []
        for resize_on_device in (False, True):
            dataset = ClipDataset(rows, replace(cfg, resize_on_device=resize_on_device), seed,
                                  cache_folder=str(shapes_folder))
            samples.append([dataset[n] for n in range(24)])
        for x, y in zip(*samples, strict=True):
            assert replace(x, video=None) == replace(y, video=None)
            h, w = y.video.shape[2:]
            assert h * w <= 4 * size ** 2 and y.video.dtype == torch.uint8
            is_resized.add((h, w) == (size, size))
        for i in range(0, 24, 4):
            x, y = (collate(half[i:i + 4], tokenizer, 8, seed=3) for half in samples)
            assert x.crops is None and x.to("cpu").video is x.video
            if y.crops is not None:
                assert y.video is None and y.crops.shape == (sum(np.prod(s) for s in y.crop_shapes),)
            moved = y.to("cpu")
            assert moved.video.shape == (4, 3, 3, size, size) and torch.equal(moved.video, x.video)
            assert moved.crops is None and moved.crop_shapes == []
            for name in ("text_ids", "media_ids", "clip_ids", "view_ids"):
                assert torch.equal(getattr(moved, name), getattr(x, name))
            for name in ("captions", "frame_captions", "seed", "skipped"):
                assert getattr(moved, name) == getattr(x, name)
    assert is_resized == ({False} if size == 64 else {True, False})         # much larger crops are resized before


@pytest.mark.parametrize("name", ["of", "exact"])
def test_crops_of_one_shape_are_resized_too(shapes_folder, tokenizer, name):
    cfg, rows = DataConfig(num_frames=3, image_size=32, frame_cache=False), annotations_of_shapes(shapes_folder, [name])
    by_loader, by_device = (ClipDataset(rows, replace(cfg, resize_on_device=on)) for on in (False, True))
    batch = collate([by_device[n] for n in range(4)], tokenizer, 8, seed=0)
    assert (batch.crops is None) == (name == "exact")
    assert torch.equal(batch.to("cpu").video, torch.stack([by_loader[n].video for n in range(4)]))


def test_evaluation_resizes_in_the_loader(shapes_folder, tokenizer):
    cfg, rows = DataConfig(num_frames=3, image_size=32, frame_cache=False), annotations_of_shapes(shapes_folder)
    a, b = (ClipDataset(rows, replace(cfg, resize_on_device=on), train=False) for on in (False, True))
    assert all(same(a[n], b[n]) and b[n].video.shape[2:] == (32, 32) for n in range(len(SHAPES)))
    assert collate([b[n] for n in range(4)], tokenizer, 8, seed=0).crops is None


def test_crops_go_to_the_device_in_one_asynchronous_copy(shapes_folder, tokenizer, monkeypatch):
    cfg = DataConfig(num_frames=3, image_size=32, frame_cache=False, resize_on_device=True)
    dataset = ClipDataset(annotations_of_shapes(shapes_folder), cfg)
    batch = collate([dataset[n] for n in range(6)], tokenizer, 8, seed=0)
    copies, to = [], torch.Tensor.to

    def recorded(self, *args, **kwargs):
        if args and args[0] == "meta":
            copies.append((self.data_ptr(), kwargs))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    moved = batch.to("meta", non_blocking=True)
    assert [pointer for pointer, _ in copies].count(batch.crops.data_ptr()) == 1
    assert all(kwargs == {"non_blocking": True} for _, kwargs in copies)
    assert not {batch.clip_ids.data_ptr(), batch.view_ids.data_ptr()} & {pointer for pointer, _ in copies}
    assert moved.video.is_meta and moved.video.shape == (6, 3, 3, 32, 32)
    assert moved.text_ids.is_meta and moved.media_ids.is_meta
    assert moved.clip_ids.tolist() == batch.clip_ids.tolist() and moved.view_ids.tolist() == batch.view_ids.tolist()
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.data_ptr()) or x)
    again = batch.pin_memory()
    assert batch.crops.data_ptr() in pinned and again.crop_shapes == batch.crop_shapes
    assert again.image_size == batch.image_size == 32


@pytest.mark.parametrize("num_workers", [0, 2])
def test_device_crops_agree_for_mixtures_skips_and_workers(shapes_folder, tokenizer, num_workers):
    names = [*[name for name in SHAPES if name != "odd"], "absent"]
    cfg = DataConfig(num_frames=3, image_size=32, frame_cache=False, min_crop_scale=0.5, hflip=True, num_views=0)
    results = []
    for on in (False, True):
        on_device = replace(cfg, resize_on_device=on)
        videos = ClipDataset(annotations_of_shapes(shapes_folder, names), on_device, 5)
        images = ClipDataset(annotations_of_shapes(shapes_folder, names, 9), replace(on_device, num_frames=1), 5,
                             index_offset=6)
        loader = torch.utils.data.DataLoader(
            MixedDataset(videos, images, 4), batch_sampler=[range(i, i + 4) for i in range(0, 32, 4)],
            num_workers=num_workers, collate_fn=partial(collate, tokenizer=tokenizer, max_length=8, seed=0))
        results.append([batch.to("cpu") for batch in loader])
    assert {b.video.shape[1] for b in results[0]} == {1, 3} and any(b.skipped for b in results[0])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.clip_ids, b.clip_ids)
        assert (a.captions, a.skipped) == (b.captions, b.skipped)


# ---------------------------------------------------------------------------------------------------------------------
# The loader of a run

def context(rank=0, world=1, seed=3, task="", **options):
    cfg = SimpleNamespace(seed=seed, task=task, text=TextEncoderConfig(max_length=10), data=replace(CFG, **options),
                          mask=MaskConfig())
    return RunContext(cfg, "", torch.device("cpu"), rank, world)


def micro_batches(run, annotations, tokenizer, step=0, steps=5, stage="pretrain"):
    dataset = ClipDataset(annotations, run.cfg.data, run.cfg.seed)
    return list(data.iterate_micro_batches(run, dataset, tokenizer, stage, 8, 2, step, steps))


def drawn(run, *args, **kwargs):
    """[(clips, views, seed, first sample) of each micro-batch] of each step."""
    return [[(b.clip_ids.tolist(), b.view_ids.tolist(), b.seed, b.first_sample) for b in group]
            for group in micro_batches(run, *args, **kwargs)]


@pytest.mark.parametrize("options", [{}, dict(num_views=2), dict(num_workers=1)], ids=str)
def test_micro_batches_do_not_depend_on_ranks_or_resumption(annotations, tokenizer, options):
    alone = drawn(context(**options), annotations, tokenizer)
    dataset = ClipDataset(annotations, replace(CFG, **options), 3)
    samples = [dataset[n] for n in range(40)]
    assert [c for group in alone for clips, *_ in group for c in clips] == [s.clip_id for s in samples]
    assert [v for group in alone for _, views, *_ in group for v in views] == [s.view_id for s in samples]
    assert [first for group in alone for *_, first in group] == list(range(0, 40, 2))
    for world in (2, 4):
        ranks = [drawn(context(rank, world, **options), annotations, tokenizer) for rank in range(world)]
        assert [sum(groups, []) for groups in zip(*ranks, strict=True)] == alone        # dealt in order
    assert drawn(context(**options), annotations, tokenizer, step=3) == alone[3:]


def test_micro_batch_seeds_differ_by_seed_stage_step_and_index(annotations, tokenizer):
    seeds = [seed for run, stage in ((context(), "pretrain"), (context(seed=4), "pretrain"), (context(), "unmasked"))
             for group in drawn(run, annotations, tokenizer, stage=stage) for *_, seed, _ in group]
    assert len(set(seeds)) == len(seeds) == 60
    expected = [int(np.random.SeedSequence((3, 2, step, i)).generate_state(1, np.uint64)[0])    # pretrain is stage 2
                for step in range(5) for i in range(4)]
    assert seeds[:20] == expected


def test_micro_batches_hold_answers_if_the_task_has_them(annotations, tokenizer):
    rows = [replace(row, questions=[Question("one", {"two": 1.0})]) for row in annotations]
    group, = micro_batches(context(task="msrvtt-qa"), rows, tokenizer, steps=1)
    assert torch.equal(group[0].text_ids, encode_texts(tokenizer, ["one"] * 2, 10))
    assert torch.equal(group[0].answer_ids, encode_answers(tokenizer, ["two"] * 2, 5))
    group, = micro_batches(context(), rows, tokenizer, steps=1)
    assert group[0].answer_ids is None
    assert torch.equal(group[0].text_ids, encode_texts(tokenizer, group[0].captions, 10))


def test_loader_workers_ignore_sigterm_and_end_with_the_loader(annotations, tokenizer):
    run = context(num_workers=1)
    dataset = ClipDataset(annotations, run.cfg.data, 3)
    iterator = data.iterate_micro_batches(run, dataset, tokenizer, "pretrain", 8, 2, 0, 20)
    next(iterator)
    worker, = torch.multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert len([next(iterator) for _ in range(10)]) == 10 and worker.is_alive()
    iterator.close()
    worker.join(10)
    assert not worker.is_alive()


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@pytest.mark.parametrize("field, value", [
    ("num_frames", 0), ("image_size", 0), ("max_seconds", -1), ("min_crop_scale", 0.0), ("min_crop_scale", 1.5),
    ("num_views", -1), ("num_workers", -1), ("cache_image_size", -1), ("cache_jpeg_quality", 101), ("cache_frames", 4),
    ("max_unreadable", -0.1), ("max_unreadable", 1.1), ("max_unreadable", float("nan"))])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^data.{field} .*{value}"):
        DataConfig(**{field: value})


def test_one_frame_videos_beside_images_are_refused():
    with pytest.raises(ValueError, match="data.num_frames.*data.image_corpora.*1"):
        DataConfig(num_frames=1, image_corpora=("a.json=images",))


@pytest.mark.parametrize("field", ["extra_videos", "image_corpora"])
@pytest.mark.parametrize("corpus", ["x", "=y", "x=", "=", ""])
def test_a_corpus_is_a_file_and_a_folder(field, corpus):
    with pytest.raises(ValueError, match=f"data.{field}.*FILE=FOLDER.*{re.escape(repr(corpus))}"):
        DataConfig(**{field: ("a.json=videos", corpus)})
    cfg = DataConfig(train_file="t.json", video_root="r", **{field: ("a.json=videos", "b.json=odd=folder")})
    listed = [("a.json", "videos"), ("b.json", "odd=folder")]
    assert cfg.corpora(images=True) == (listed if field == "image_corpora" else [])
    assert cfg.corpora() == [("t.json", "r"), *(listed if field == "extra_videos" else [])]
