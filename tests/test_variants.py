"""tools.variants: students of four steps. What they are told against the teacher asked anew, the tables by hand."""

import csv
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_ablate import tables
from test_train import assert_one_line, assert_same, command

import data
import train
from data import Clips, DataConfig
from masking import GLOBAL, MASKS, MaskConfig, keep_count, sizes
from masks import log
from model import ModelConfig
from sprites import write_sprites
from teacher import SigLIP, guide
from tools import variants
from tools.ablate import clusters_of, covered
from tools.variants import COLUMNS, MISPAIRED, Job, Show, Student, Table, Told, canonical
from train import Config, SmallConfig

TINY = Config(          # frames of 4 x 4 tokens; 16 clips to train on, 8 to choose settings on, 8 to test
    batch=8, micro_batch=4, steps=4, unmasked_steps=2, unmasked_batch=8, lr=2e-3, log_every=1, save_every=10 ** 9,
    keep=1, data=DataConfig(frames=4, size=16), mask=MaskConfig(ratio=0.75, quantile=0.95),
    model=ModelConfig(patch=4, width=16, depth=2, heads=2, drop_path=0.1, positions="3d", text_width=16, text_depth=2,
                      text_heads=2, fusion=1, dropout=0.1, text_length=24, embed=8, decoder_width=16, decoder_depth=1,
                      decoder_heads=2, decoder_share=0.5),
    small=SmallConfig(width=16, text_depth=1, heads=2, batch=8, steps=2, text_steps=2, text_batch=8),
)
COUNT = {"train": 16, "seen": 8, "test": 8}
BASE = Job("retrieval", "{}", 0, False)
SETS = {
    "BEGIN": {"batch": 8, "steps": 3, "lr": 2e-3}, "REDUCED": TINY,
    "FULL": replace(TINY, steps=5), "CLIPS": {False: 24, True: 24}, "TEST": 8, "SEEN": 8, "CHUNK": 5,
    "ANSWERS": {"steps": 3, "batch": 8, "lr": 1e-3},
    "TABLES": {"first": Table("which mask", {"base": {}, "other": {"mask.name": "random_frame"}}),
               "second": Table("a table that has the base too", {"the same": {}, "short": {"unmasked_steps": 1}})},
    "write_sprites": lambda folder, seed, many, test, *more: write_sprites(folder, seed, many, test, 2, "crowd"),
}


def job(task="retrieval", seed=0, full=False, **changes):
    """mask_name="tube" changes mask.name."""
    return Job(task, canonical({re.sub("^(mask|model|data)_", r"\1.", k): v for k, v in changes.items()}), seed, full)


def shrink(patch):
    for name, value in SETS.items():
        patch.setattr(variants, name, deepcopy(value))
    patch.setattr(torch.cuda, "is_available", lambda: False)                # what is the same is so bit for bit
    patch.setattr(data, "cores", lambda: 1)


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder in which one seed has been prepared."""
    folder = tmp_path_factory.mktemp("variants")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(folder)
        variants.prepare(BASE, 1)
    return folder


@pytest.fixture
def here(small, prepared, tmp_path, monkeypatch):
    """In a copy of that folder."""
    shutil.copytree(prepared / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(job=BASE, **changes):
    """A student before its first step; changes of its settings that no variant makes."""
    cfg = replace(job.settings(), device="cpu", name=f"a{len(os.listdir('out'))}", **changes)
    return Student(job, train.start(cfg))


def batches_of(clips, tokenizer, size=4):
    """The clips as they are scored, batch by batch."""
    for at in range(0, len(clips), size):
        yield data.collate([clips[i] for i in range(at, min(at + size, len(clips)))], tokenizer, 24, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Variants

def flat(said, prefix=""):
    found = {}
    for name, value in said.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("full", [False, True], ids=["reduced", "full"])
@pytest.mark.parametrize("name", variants.TABLES)
def test_each_row_changes_what_it_says_and_nothing_else(name, full):
    table = variants.TABLES[name]
    base = flat(asdict(Job(table.task, "{}", 2, full).settings()))
    digests = {}
    for title, changes in table.rows.items():
        one = Job(table.task, canonical(changes), 2, full)
        assert one.mispaired == changes.get(MISPAIRED, 0) == (0.5 if "mispaired" in name else 0)
        changes = {k.removesuffix(" *"): round(base[k[:-2]] * v) if k.endswith(" *") else v
                   for k, v in changes.items() if k != MISPAIRED}
        cfg = flat(asdict(one.settings()))
        assert {k for k in cfg if cfg[k] != base[k]} == {k for k, v in changes.items() if v != base[k]}, title
        assert all(cfg[k] == v for k, v in changes.items()), title
        if cfg["steps"]:
            Config(**vars(one.settings()))                                  # which refuses nothing
        assert one.digest() not in digests, f"{title} is {digests[one.digest()]} by another name"
        digests[one.digest()] = title
    shared = set.intersection(*(set(of.items()) for of in table.rows.values() if of.get("steps") != 0))
    first = dict(set(next(iter(table.rows.values())).items()) - shared)
    assert Job(table.task, canonical(first), 2, full).settings() == Job(table.task, "{}", 2, full).settings()


def test_settings_are_those_of_the_form_and_seed_and_leave_the_defaults_alone(small):
    before = deepcopy((variants.REDUCED, variants.FULL))
    cfg = job(seed=3, full=True, mask_ratio=0.5, model_decoder="joint", unmasked_steps=1).settings()
    home = job(seed=3, full=True).home
    assert (cfg.steps, cfg.seed, cfg.mask.ratio, cfg.model.decoder, cfg.unmasked_steps) == (5, 3, 0.5, "joint", 1)
    assert cfg.teacher == f"{home}/teacher" and cfg.data.root == f"{home}/clips/videos"
    assert job(seed=3).settings().text == f"{job(seed=3).home}/text" and job(steps=0).settings().steps == 0
    assert (variants.REDUCED, variants.FULL) == before


@pytest.mark.parametrize("variant, message", [
    ({"mask.names": "tube"}, "a variant changes mask.names, which the config does not have"),
    ({"masc.name": "tube"}, "a variant changes masc.name, which the config does not have"),
    ({"stepps": 3}, "a variant changes stepps, which"), ({"mask.name": "tub"}, "there is no mask 'tub'"),
    ({"model.decoder_share": 0}, "decoder_share is in"), ({"batch": 6}, "batch 6 is no multiple of micro_batch 4"),
])
def test_a_variant_that_cannot_be_raises_in_one_line(small, variant, message):
    with pytest.raises(ValueError, match=message) as error:
        Job("retrieval", canonical(variant), 0, False).settings()
    assert "\n" not in str(error.value)


def test_the_digest_is_of_all_that_the_result_is_of(small, monkeypatch):
    same = job().digest()
    assert same == job().digest() == job(mask_name="cluster_stm").digest() == job(unmasked_steps=2).digest()
    for where, what, value in ((variants, "VERSION", -1), (variants, "TEST", 7), (variants, "SEEN", 7),
                               (variants, "CLIPS", {False: 25, True: 24}), (variants, "BEGIN", {"steps": 4}),
                               (variants.REDUCED, "lr", 1.0),
                               (variants.REDUCED.small, "lr", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, value)
            assert job().digest() != same, what
    others = [job(**c) for c in ({"seed": 1}, {"task": "qa"}, {"full": True}, {"pool": "mean"}, {"mask_ratio": 0.5},
                                 {"mask_pick": "lowest"}, {"steps": 0}, {"unmasked_steps": 1}, {"mrm": 0.0})]
    assert len({same, *(o.digest() for o in others)}) == 1 + len(others)
    qa = job("qa").digest()
    monkeypatch.setitem(variants.ANSWERS, "steps", 4)
    assert job().digest() == same and job("qa").digest() != qa
    assert job(unmasked_steps=1).digest(unmasked_steps=0) == job().digest(unmasked_steps=0) != job().digest()


# ---------------------------------------------------------------------------------------------------------------------
# What the teacher said

def told(split, teacher=True):
    """teacher=False: one that cannot be asked."""
    return Told(f"{BASE.home}/told/{split}", 0, SigLIP.from_pretrained(f"{BASE.home}/teacher") if teacher else None)


def stored(of):
    x, a, text = (torch.from_numpy(np.array(of.array(name))) for name in ("tokens", "attention", "text"))
    return x.float(), a, text


@pytest.mark.parametrize("split", COUNT)
def test_what_is_stored_is_what_the_teacher_says_of_the_clips(here, split):
    cfg, of = BASE.settings(), told(split)
    clips, (x, a, text) = variants.clips_of(cfg, split), stored(of)
    assert len(clips) == len(x) == COUNT[split] and x.shape[1:] == (4, 16, 16) and of.array("tokens").dtype == "float16"
    for i in range(len(clips)):
        sample = clips.view(i, 0) if split == "train" else clips[i]
        tokens = of.teacher.tokens(of.teacher.pixels(sample.video))
        torch.testing.assert_close(x[i], tokens, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a[i], of.teacher.attend(tokens), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(text[i:i + 1], of.teacher.encode_text(of.teacher.tokenize([sample.caption])))
    assert (x[1:] - x[:-1]).abs().amax((1, 2, 3)).min() > 0.1 and (text[1:] != text[:-1]).any(1).all()


def test_seen_clips_are_the_last_of_the_training_file_and_no_others_are_left_out(here):
    cfg = BASE.settings()
    with open(cfg.data.train) as f:
        videos = [f"{cfg.data.root}/{row['video']}" for row in json.load(f)]
    train_, seen, test = ([row.video for row in variants.rows_of(cfg, split)] for split in COUNT)
    assert train_ + seen == videos and len(seen) == 8 and not set(test) & set(videos)
    assert [variants.clips_of(cfg, split).train for split in COUNT] == [True, False, False]


DETERMINISTIC = [name for name in MASKS if not MaskConfig(name).drawn]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_mask_that_does_not_draw_keeps_of_each_clip_what_it_keeps_of_it_alone(here, name, monkeypatch):
    of, mask = told("train"), MaskConfig(name, 0.6, quantile=0.9)
    for key in ("tokens", "attention"):                                     # so small a teacher says little
        said = torch.randn(of.array(key).shape, generator=torch.Generator().manual_seed(0)).numpy()
        np.save(f"{of.folder}/{key}.npy", said.astype(np.float16) if key == "tokens" else np.exp(said))
    x, a, text = stored(of)
    wanted = [mask(x[i:i + 1], 6, attention=a[i:i + 1], logits=log(a[i:i + 1]), text=text[i:i + 1], grid=(4, 4),
                   aligned=of.teacher.align(x[i], (4, 4), "mean")[None].half().float()) for i in range(16)]
    keep = of.keep(mask, "mean")
    assert keep.dtype == np.int64 and np.array_equal(keep, torch.cat(wanted)) and len({*map(tuple, keep)}) > 1
    files = sorted(os.listdir(of.folder))
    assert np.array_equal(told("train", teacher=False).keep(mask, "mean", epoch=3), keep)      # read, not asked
    assert sorted(os.listdir(of.folder)) == files                           # not once more for another epoch
    for path in files:
        if path.startswith(("keep", "aligned")):
            os.remove(f"{of.folder}/{path}")
    monkeypatch.setattr(variants, "CHUNK", 64)
    assert np.array_equal(of.keep(mask, "mean"), keep)


@pytest.mark.parametrize("name, more", [("random_frame", {}), ("umt", {}), ("tube", {}), ("adamae", {}), ("random", {}),
                                        ("cluster_stm", {"pick": "random"})])
def test_a_mask_that_draws_is_drawn_anew_each_epoch_and_is_what_it_was_when_asked_again(here, name, more):
    of, mask = told("train"), MaskConfig(name, 0.75, **more)
    first, second = (np.array(of.keep(mask, "map", epoch)) for epoch in (0, 1))
    assert (first != second).any(1).all()
    assert len({*map(tuple, first)}) > 12                                   # each clip its own, whatever its chunk
    for keep in (first, second):
        assert keep.shape == (16, 16) and (np.diff(keep) > 0).all() and 0 <= keep.min() and keep.max() < 64
        if name not in GLOBAL:
            assert all(np.bincount(k // 16, minlength=4).tolist() == [4] * 4 for k in keep)
    if name == "cluster_stm":                                               # it has seen the tokens: all clusters
        kept = torch.zeros(16, 64, dtype=torch.bool).scatter(1, torch.from_numpy(first), True).view(16, 4, 16)
        assert covered(kept, clusters_of(stored(of)[0], 4, mask), 4) == 1
    assert np.array_equal(told("train", teacher=False).keep(mask, "map", 1), second)
    for seed in (0, 1):                                                     # of (seed, epoch), not of what came before
        for path in os.listdir(of.folder):
            if path.startswith("keep"):
                os.remove(f"{of.folder}/{path}")
        assert np.array_equal(Told(of.folder, seed, of.teacher).keep(mask, "map", 1), second) == (seed == 0)


def test_sizes_are_those_of_the_stored_tokens_and_of_what_is_kept_in_that_epoch(here):
    of, found = told("train"), []
    for mask in (TINY.mask, MaskConfig("dynamic", 0.75), MaskConfig("random_frame", 0.75)):
        for epoch in (0, 1):
            wanted = sizes(stored(of)[0], torch.from_numpy(np.array(of.keep(mask, "map", epoch))))
            found.append(np.array(of.size(mask, "map", epoch)))
            assert np.array_equal(found[-1], wanted) and found[-1].max() > 1
            assert np.array_equal(told("train", teacher=False).size(mask, "map", epoch), wanted)        # read
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[2], found[3])
    assert (found[4] != found[5]).any() and len([f for f in os.listdir(of.folder) if f.startswith("size")]) == 4


@pytest.mark.parametrize("changes", [{}, {"model_proportional": True},
                                     {"model_proportional": True, "mask_name": "random_frame"}], ids=str)
def test_a_student_is_told_what_the_tokens_of_its_own_clips_stand_for(here, changes):
    s = begin(job(**changes))
    wanted = {split: stored(of)[0] for split, of in s.told.items()}

    def check(split, b, g):
        assert (g.size is not None) == bool(changes)
        if changes:
            assert g.size.dtype == torch.float32 and torch.equal(g.size, sizes(wanted[split][b.clip], g.keep))

    for group in train.micro_batches(s.run, s.clips["train"], s.tokenizer, "pretrain", 8, 4, 0, 4):
        for b, g in zip(group, s.guides(group), strict=True):
            check("train", b, g)
    for split in ("seen", "test"):
        for b in batches_of(s.clips[split], s.tokenizer):
            check(split, b, s.seeing(split, s.cfg.mask)(b))
    assert any(f.startswith("size") for f in os.listdir(s.told["test"].folder)) == bool(changes)


def test_masks_of_other_settings_are_other_files(here):
    of = told("test")
    masks = [MaskConfig(ratio=0.75, quantile=0.95), MaskConfig(ratio=0.5), MaskConfig("kmeans", 0.75),
             MaskConfig(ratio=0.75, pick="lowest"), MaskConfig(ratio=0.0, name="random_frame")]
    kept = [np.array(of.keep(mask, "map")) for mask in masks]
    assert [k.shape for k in kept] == [(8, 4 * keep_count(16, m.ratio)) for m in masks]
    assert not np.array_equal(kept[0], kept[2]) and not np.array_equal(kept[0], kept[3])
    assert np.array_equal(kept[-1], np.tile(np.arange(64), (8, 1)))


@pytest.mark.parametrize("pool", ["map", "mean", "token"])
def test_targets_are_the_stored_tokens_aligned_and_are_made_once(here, pool):
    of = told("train")
    x, found = stored(of)[0], of.aligned(pool)
    assert found.dtype == np.float16 and found.shape == (16, 4, 16, 16)
    for i in range(16):
        wanted = of.teacher.align(x[i], (4, 4), pool)
        torch.testing.assert_close(torch.from_numpy(np.array(found[i])).float(), wanted, rtol=0, atol=6e-4)
    assert np.array_equal(told("train", teacher=False).aligned(pool), found)
    if pool != "map":
        assert not np.allclose(found, of.aligned("map"), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# What a student is told in training, and scored with

def assert_kept(keep, wanted):
    """The same ids, but for a tie that fp16 breaks; no two clips have so many in common."""
    share = lambda a, b: np.mean([len({*p} & {*q}) / len(p) for p, q in zip(a.tolist(), b.tolist(), strict=True)])
    assert keep.shape == wanted.shape and share(keep, wanted) > 0.98 > share(keep.roll(1, 0), wanted) + 0.05


@pytest.mark.parametrize("changes", [{}, {"mask_name": "attention_high", "pool": "mean"}, {"mrm": 0.0},
                                     {MISPAIRED: 0.5}], ids=str)
def test_a_student_is_told_what_the_teacher_says_of_its_own_clips(here, changes):
    s = begin(job(**changes))
    own = variants.rows_of(s.cfg, "train")
    same = [row == other for row, other in zip(own, s.clips["train"].rows, strict=True)]
    assert sum(same) == (8 if MISPAIRED in changes else 16)
    assert sorted(row.captions for row in own) == sorted(row.captions for row in s.clips["train"].rows)
    cfg, teacher = s.cfg, SigLIP.from_pretrained(s.cfg.teacher)
    clips = []
    for group in train.micro_batches(s.run, s.clips["train"], s.tokenizer, "pretrain", 8, 4, 0, 5):
        guides = s.guides(group)
        assert len(guides) == len(group) == 2
        for b, g in zip(group, guides, strict=True):
            asked = guide(teacher, b, cfg.mask, cfg.mask.ratio, cfg.pool)
            assert_kept(g.keep, asked.keep)
            if cfg.mrm:
                torch.testing.assert_close(g.text, asked.text, rtol=0, atol=1e-5)
                assert (g.text - asked.text.roll(1, 0)).abs().amax(1).min() > 1e-3
                torch.testing.assert_close(g.aligned.float(), asked.aligned, rtol=0, atol=3e-3)
                assert (g.aligned - asked.aligned.roll(1, 0)).abs().amax((1, 2, 3)).min() > 0.03
            else:
                assert g.aligned is g.text is None
            clips += b.clip.tolist()
    assert sorted(clips[:16]) == sorted(clips[16:32]) == list(range(16)) and clips[:16] != clips[16:32]


@pytest.mark.parametrize("n, share, count", [(16, 0, 0), (16, 0.5, 8), (7, 0.5, 4), (7, 1, 7), (1000, 0.25, 250)])
def test_that_share_of_the_clips_has_the_caption_of_another(n, share, count):
    orders = [variants.other_captions(n, share, seed) for seed in (0, 1, 0)]
    assert all(sorted(order) == list(range(n)) and (order != np.arange(n)).sum() == count for order in orders)
    assert np.array_equal(orders[0], orders[2]) and np.array_equal(orders[0], orders[1]) == (count == 0)


def test_other_captions_are_other_students(small):
    digests = {job(**{MISPAIRED: share}).digest() for share in (0, 0.25, 0.5)} | {job().digest()}
    assert len(digests) == 3


def test_what_is_drawn_for_a_clip_is_that_of_the_epoch(here):
    s = begin(job(mask_name="umt"))
    for step, group in enumerate(train.micro_batches(s.run, s.clips["train"], s.tokenizer, "pretrain", 8, 4, 0, 5)):
        for b, g in zip(group, s.guides(group), strict=True):
            for epoch in range(3):
                same = np.array_equal(g.keep, s.told["train"].keep(s.cfg.mask, "map", epoch)[b.clip.numpy()])
                assert same == (epoch == step // 2)                         # 16 clips, 8 a step


@pytest.mark.parametrize("split", ["seen", "test"])
def test_retrieval_is_scored_with_the_tokens_that_the_mask_keeps_of_each_clip(here, split, monkeypatch):
    s, real, how = begin(), variants.scoring.retrieval, []
    s.fit("unmasked", 2, 8, 1e-2, lambda batches: train.with_whole(s.model, batches, [None] * len(batches)))

    def retrieval(model, clips, tokenizer, protocol):
        how.append(protocol)
        assert not model.training and [row.video for row in clips.rows] == [
            row.video for row in variants.rows_of(s.cfg, split)]
        return real(model, clips, tokenizer, protocol)

    monkeypatch.setattr(variants.scoring, "retrieval", retrieval)
    mask, teacher = MaskConfig("attention_high", 0.75), SigLIP.from_pretrained(s.cfg.teacher)
    asked = lambda b, mask=mask: guide(teacher, b, mask, 0.75).keep
    found, every = s.retrieval(split, mask), s.retrieval(split, None)
    assert s.model.training and how[1].keep is None
    s.model.eval()
    for b in batches_of(s.clips[split], s.tokenizer):
        assert_kept(how[0].keep(b).keep, asked(b))
    for keep, scores in ((asked, found), (None, every)):
        with torch.no_grad():
            video = torch.cat([s.model.encode_video(b.video, keep and keep(b))[1]
                               for b in batches_of(s.clips[split], s.tokenizer)])
            text = torch.cat([s.model.encode_text(b.ids)[1] for b in batches_of(s.clips[split], s.tokenizer)])
        m = text @ video.T
        assert scores == {"T2V": 100 * (m.argmax(1) == torch.arange(8)).float().mean().item(),
                          "V2T": 100 * (m.argmax(0) == torch.arange(8)).float().mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Students

@pytest.fixture
def stages(monkeypatch):
    """(stage, the weights at its end) of each that is trained."""
    real, found = train.fit, []

    def fit(run, stage, model, *args, **kwargs):
        model = real(run, stage, model, *args, **kwargs)
        found.append((stage, {k: v.clone() for k, v in model.state_dict().items()}))
        return model

    monkeypatch.setattr(train, "fit", fit)
    return found


@pytest.fixture
def videos(monkeypatch):
    """The names of the clips that are trained on."""
    real, found = Clips.view, []
    monkeypatch.setattr(Clips, "view", lambda self, clip, view: found.append(self.rows[clip].video)
                        or real(self, clip, view))
    return found


ASKED = {"qa", "qa by kind", "qa seen", "qa seen by kind"}
SCORED = [f"{name} {way}" for name in variants.SCORES for way in ("T2V", "V2T")]
TIMES = {"seconds", "masked seconds"}


def untimed(row):
    return {k: v for k, v in row.items() if k not in TIMES}


def test_the_row_of_a_student_is_whole_and_the_same_again_and_nothing_else_is_left(here, stages, videos):
    row = variants.work(BASE, "cpu", "c0")
    assert row.keys() == {*COLUMNS} - ASKED
    assert untimed(row).items() >= {"form": "reduced", "task": "retrieval", "variant": "{}", "seed": 0, "commit": "c0",
                                    "settings": BASE.digest(), "device": "cpu", "torch": torch.__version__}.items()
    assert all(0 <= row[name] <= 100 and (row[name] / 12.5) % 1 == 0 for name in SCORED)
    assert re.fullmatch(r"1:\S+ 2:\S+ 3:\S+ 4:\S+", row["curve"]) and 0 < row["masked seconds"] < row["seconds"]
    assert math.isfinite(row["loss"]) and os.listdir(f"{BASE.home}/students") == []
    seen = {r.video for r in variants.rows_of(BASE.settings(), "seen")}
    assert len(videos) == 8 * (4 + 2) and not seen & set(videos)
    again = variants.work(BASE, "cpu", "c0")                                # whose masked stage is kept
    assert untimed(again) == untimed(row) and [stage for stage, _ in stages] == ["pretrain", "unmasked", "unmasked"]
    assert again["masked seconds"] == row["masked seconds"]
    assert_same(stages[1][1], stages[2][1])
    shutil.rmtree(f"{BASE.home}/masked")
    assert untimed(variants.work(BASE, "cpu", "c0")) == untimed(row)
    assert_same(stages[0][1], stages[3][1])


def test_the_masked_stage_is_shared_by_those_that_differ_after_it_and_by_no_others(here, stages):
    names = lambda: [stage for stage, _ in stages]
    variants.work(BASE, "cpu", "")
    later = variants.work(job(unmasked_steps=1, unmasked_lr=0.7), "cpu", "")
    assert names() == ["pretrain", "unmasked", "unmasked"]
    shutil.rmtree(f"{BASE.home}/masked")
    assert untimed(variants.work(job(unmasked_steps=1, unmasked_lr=0.7), "cpu", "")) == untimed(later)
    assert names()[3:] == ["pretrain", "unmasked"]
    assert_same(stages[2][1], stages[4][1])                                 # what is read is what was trained
    assert any(not torch.equal(a, b) for a, b in zip(stages[1][1].values(), stages[2][1].values(), strict=True))
    row = variants.work(job(unmasked_steps=0), "cpu", "")
    assert names()[5:] == [] and [row[f"after {w}"] for w in ("T2V", "V2T")] == [
        row[f"before {w}"] for w in ("T2V", "V2T")]
    for changes in ({"mask_pick": "lowest"}, {"pool": "mean"}, {"steps": 3}):
        del stages[:]
        variants.work(job(**changes), "cpu", "")
        assert names() == ["pretrain", "unmasked"], changes


@pytest.mark.parametrize("changes, loss", [
    ({"model_objective": "visible"}, "align"), ({"model_objective": "pixels"}, "pixels"), ({"mrm": 0.0}, None),
    ({"mask_ratio": 0.0, "mask_name": "random_frame"}, None), ({"model_decoder": "joint", "mask_name": "umt"}, "mrm"),
], ids=str)
def test_students_of_all_objectives_train_and_their_loss_is_the_mean_of_the_last_rows(here, changes, loss, monkeypatch):
    real, logged = variants.read_log, []
    monkeypatch.setattr(variants, "read_log", lambda folder: logged.extend(real(folder)) or logged)
    row = variants.work(job(**changes), "cpu", "")
    assert ("loss" in row) == (loss is not None) and row.keys() - {"loss"} == {*COLUMNS} - ASKED - {"loss"}
    assert not loss or row["loss"] == pytest.approx(np.mean([r[loss] for r in logged[1:]])) and len(logged) == 4


def test_own_and_random_are_scored_before_the_unmasked_stage_and_the_curve_within_the_masked_one(here, monkeypatch):
    asked = []

    def retrieval(self, split, mask):
        rows = variants.read_log(self.run.folder)
        asked.append((split, mask, rows[-1]["stage"], rows[-1]["step"]))
        return {"T2V": len(asked), "V2T": len(asked)}

    monkeypatch.setattr(Student, "retrieval", retrieval)
    row = variants.work(BASE, "cpu", "")
    mask = TINY.mask
    assert asked == [*(("seen", mask, "pretrain", k) for k in (1, 2, 3, 4)), ("test", mask, "pretrain", 4),
                     ("test", replace(mask, name="random_frame"), "pretrain", 4), ("test", None, "pretrain", 4),
                     ("test", None, "unmasked", 2)]
    assert row["curve"] == "1:1.0 2:2.0 3:3.0 4:4.0" and [row[name] for name in SCORED] == [5, 5, 6, 6, 7, 7, 8, 8]


def test_all_students_of_a_seed_begin_with_one_that_saw_no_clip_settings_are_chosen_on(here, stages, videos,
                                                                                            monkeypatch):
    shutil.move(f"{BASE.home}/start", "before")
    seen, real = [], Clips.sample
    monkeypatch.setattr(Clips, "sample", lambda self, clip, view, video, caption: seen.append((len(video), view))
                        or real(self, clip, view, video, caption))
    variants.begin(BASE)
    assert [stage for stage, _ in stages] == ["pretrain"] and len(videos) == len(seen) == 8 * 3
    assert not {r.video for r in variants.rows_of(BASE.settings(), "seen")} & set(videos)
    before, start = (variants.load_file(f"{folder}/model.safetensors") for folder in ("before", f"{BASE.home}/start"))
    assert_same(before, start)
    shared = lambda model: {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")}
    for changes in ({}, {"mask_name": "tube"}, {"model_decoder": "joint"}, {"model_decoder_depth": 2},
                    {"model_objective": "pixels"}, {"model_objective": "visible"}):
        s = begin(job(**changes))
        new = Student(s.job, s.run, new=True).model
        assert_same(shared(s.model), {k: start[k] for k in shared(s.model)})
        assert_same({k: v for k, v in new.state_dict().items() if k.startswith("decoder.")},
                    {k: v for k, v in s.model.state_dict().items() if k.startswith("decoder.")})
        for part in ("vit.", "bert."):
            assert any(not torch.equal(v, start[k]) for k, v in new.state_dict().items() if k.startswith(part)), part


@pytest.mark.parametrize("changes", [{}, {"steps": 0}, {"model_proportional": True}],
                         ids=["masked", "not pretrained", "proportional"])
def test_a_student_answers_questions_with_the_tokens_of_its_own_clips(here, stages, videos, changes, monkeypatch):
    teacher, real = SigLIP.from_pretrained(BASE.settings().teacher), variants.scoring.question_answering
    asked, answered = [], []
    own = lambda b: guide(teacher, replace(b, captions=["a"] * len(b.video)), TINY.mask, 0.75).keep

    def fit(run, stage, model, clips, *args, calls, real=train.fit, **kwargs):
        def checked(batches):
            told = calls(batches)
            for b, g in told:
                assert_kept(g.keep, own(b))
                assert (g.size is not None) == ("model_proportional" in changes)
                asked.append(len(b.video))
            return told
        return real(run, stage, model, clips, *args, calls=checked if stage == "finetune" else calls, **kwargs)

    def score(model, clips, tokenizer, how):
        assert not model.training and how.answers and not clips.train and all(row.questions for row in clips.rows)
        answered.append(clips.rows)
        for b in batches_of(clips, tokenizer):
            assert_kept(how.keep(b).keep, own(b))
            assert (how.keep(b).size is not None) == ("model_proportional" in changes)
        return real(model, clips, tokenizer, how)

    monkeypatch.setattr(Student, "fit", lambda self, stage, steps, batch, lr, calls, after=None: fit(
        self.run, stage, self.model, self.clips["train"], self.tokenizer, batch, steps, lr, calls=calls, after=after))
    monkeypatch.setattr(variants.scoring, "question_answering", score)
    row = variants.work(job("qa", **changes), "cpu", "")
    assert [[r.video for r in rows] for rows in answered] == [
        [r.video for r in variants.rows_of(BASE.settings(), split)] for split in ("test", "seen")]
    assert row.keys() - {"curve", "loss", "masked seconds"} == {*COLUMNS} - {*SCORED, "curve", "loss", "masked seconds"}
    assert ("curve" in row) == ("steps" not in changes) and sum(asked) == 3 * 8
    for name in ("qa", "qa seen"):
        kinds = dict(part.split(":") for part in row[f"{name} by kind"].split())
        assert 0 <= row[name] <= 100 and len(kinds) > 2 and all(0 <= float(x) <= 100 for x in kinds.values())
    assert [stage for stage, _ in stages] == ["pretrain"] * ("steps" not in changes) + ["finetune"]
    assert not {r.video for r in variants.rows_of(BASE.settings(), "seen")} & set(videos)


# ---------------------------------------------------------------------------------------------------------------------
# Tables, from a file written by hand

def entry(one, **values):
    return {**dict.fromkeys(COLUMNS, ""), "form": one.form, "task": one.task, "variant": one.variant,
            "seed": one.seed, "settings": one.digest()} | values


def both(name, t2v, v2t):
    return {f"{name} T2V": t2v, f"{name} V2T": v2t}


def write(path, rows, columns=COLUMNS):
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, columns)
        out.writeheader()
        out.writerows(rows)


@pytest.fixture
def by_hand(small, tmp_path, monkeypatch):
    """Four seeds of the base, three of the other; one of either has no partner."""
    monkeypatch.chdir(tmp_path)
    rows = [entry(job(seed=s), **both("own", t, v), **both("after", 50, 50), loss=x, curve=c)
            for s, t, v, x, c in ((0, 10, 12, 0.5, "1:1 2:2 3:4 4:8"), (1, 20, 24, 0.7, "1:3 2:4 3:6 4:16"),
                                  (2, 30, 36, 0.9, "1:5 2:6 3:8 4:0"), (3, 40, 40, 1.1, "1:7 2:8 3:10 4:0"))]
    rows += [entry(job(seed=s, mask_name="random_frame"), **both("own", t, v), **both("after", 51, 55))
             for s, t, v in ((0, 13, 15), (1, 21, 23), (7, 90, 90))]
    write("rows.csv", rows)
    return rows


def shown(capsys, name="first", **more):
    variants.show(Show((name,), out="rows.csv", **more))
    return {cells[0]: dict(zip(table[0], cells, strict=True)) for table in tables(capsys.readouterr().out)
            for cells in table[1:]}


def test_tables_have_means_standard_errors_and_differences_seed_by_seed(by_hand, capsys):
    found = shown(capsys)
    base, other = found["base"], found["other"]
    # own: 11, 22, 33, 40: mean 26.5, deviations -15.5 -4.5 6.5 13.5, sqrt(485 / 3) / 2 = 6.36
    assert (base["seeds"], base["own"], base["after"], base["loss"]) == ("4", "26.5 ± 6.4", "50.0 ± 0.0", "0.80 ± 0.13")
    assert (base["seen at 25 %"], base["seen at 100 %"]) == ("4.0 ± 1.3", "6.0 ± 3.8")
    # own: 14, 22, 90: mean 42, sqrt((784 + 400 + 2304) / 2 / 3) = 24.1; of seeds 0 and 1: 3 and 0, 1.5 either side
    assert (other["seeds"], other["own"], other["after"], other["loss"]) == ("3", "42.0 ± 24.1", "53.0 ± 0.0", "")
    assert (other["own − first"], other["after − first"]) == ("1.5 ± 1.5", "3.0 ± 0.0")
    assert base["own − first"] == base["after − first"] == "" and "qa" not in base
    assert list(found) == ["base", "other"]
    one = shown(capsys, "second")                                           # the base is shared, the other was not run
    assert one["the same"]["own"] == "26.5 ± 6.4" and one["short"]["seeds"] == "0" and one["short"]["own"] == ""


def test_one_seed_has_no_standard_error_and_rows_of_other_settings_are_left_out(by_hand, capsys, monkeypatch):
    rows = by_hand[:1] + by_hand[4:5]
    others = [rows[0] | both("own", 99, 99) | more for more in (
        {"settings": "0" * 12, "seed": 5}, {"task": "qa"}, {"form": "full"}, {"seed": 5})]
    write("rows.csv", others + rows)
    found = shown(capsys)
    assert (found["base"]["own"], found["other"]["own"], found["other"]["own − first"]) == ("11.0", "14.0", "3.0")
    monkeypatch.setattr(variants.REDUCED, "lr", 3e-3)
    variants.show(Show(out="rows.csv"))
    out = capsys.readouterr().out
    assert re.findall(r"\*\*(\w+): .*\*\*: not run", out) == ["first", "second"]


def test_full_rows_and_answers_have_tables_of_their_own(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    variants.TABLES["asked"] = Table("answers", {"base": {}, "short": {"steps": 0}}, "qa")
    write("rows.csv", [entry(job(full=True), **both("own", 1, 2)), entry(job(), **both("own", 3, 4)),
                       entry(job("qa"), qa=60, **{"qa by kind": "count:20.0 colour:70.0", "qa seen": 80,
                                                  "qa seen by kind": "count:30.0 colour:75.0"}),
                       entry(job("qa", steps=0), qa=50, **{"qa by kind": "count:10.0 colour:80.0"})])
    assert shown(capsys)["base"]["own"] == "3.5" and shown(capsys, full=True)["base"]["own"] == "1.5"
    found = shown(capsys, "asked")
    assert found["base"] == {"": "base", "seeds": "1", "qa": "60.0", "count": "20.0", "colour": "70.0",
                             "qa seen": "80.0", "count seen": "30.0", "colour seen": "75.0",
                             "qa − first": "", "qa seen − first": ""}
    assert found["short"]["qa − first"] == "-10.0" and found["short"]["qa seen − first"] == ""


def test_without_the_first_row_there_is_no_difference(by_hand, capsys):
    write("rows.csv", by_hand[4:])
    found = shown(capsys)
    assert found["other"]["own"] == "42.0 ± 24.1" and found["other"]["own − first"] == "" == found["base"]["own"]


def appended(path, first):
    for seed in range(first, first + 40):
        variants.add(path, {"seed": seed, "curve": "1:2.0, 3", "seconds": 1 / 3, "unknown": 1})


def test_rows_that_two_processes_append_are_all_there(tmp_path):
    path = str(tmp_path / "rows.csv")
    variants.add(path, {"seed": -1})
    workers = [multiprocessing.get_context("fork").Process(target=appended, args=(path, at)) for at in (0, 40)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    rows = variants.read_file(path)
    assert sorted(int(row["seed"]) for row in rows) == list(range(-1, 80)) and {*rows[0]} == {*COLUMNS}
    assert {(row["curve"], row["seconds"]) for row in rows[1:]} == {("1:2.0, 3", "0.3333")}


def test_a_heading_that_two_wrote_at_once_is_no_row(by_hand, capsys):
    with open("rows.csv") as f:
        head, *rest = f.readlines()
    with open("rows.csv", "w") as f:
        f.writelines([head, head, *rest])
    assert shown(capsys)["base"]["own"] == "26.5 ± 6.4"


@pytest.mark.parametrize("content", [
    "form,task,seed\nreduced,retrieval,0\n", ",".join((*COLUMNS, "more")) + "\n" + "1," * len(COLUMNS) + "1\n",
    "form,task,seed\n", ",".join(COLUMNS[::-1]) + "\n" + "1," * (len(COLUMNS) - 1) + "1\n",
], ids=["fewer", "more", "no rows yet", "another order"])
def test_a_file_with_other_columns_is_refused_and_is_left_as_it_is(small, tmp_path, monkeypatch, capsys, content, pool):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    monkeypatch.chdir(tmp_path)
    for flags in ("table", "train --seeds 0 --tables first"):
        code, _, err = command("tools/ablate.py", [*flags.split(), "--out", "rows.csv"], capsys)
        assert_one_line("tools.ablate", code, err, "rows.csv has columns .*; wanted form, task")
    assert path.read_text() == content


def test_numbers_are_read_as_they_were_written(tmp_path):
    path = str(tmp_path / "rows.csv")
    variants.add(path, {**both("own", 100.0, 12.890625), **both("after", 0.0, 0.0), "loss": 0.123456, "seed": 123456})
    row, = variants.read_file(path)
    assert variants.values(row) == {"own": pytest.approx(56.445, abs=1e-3), "after": 0.0, "loss": 0.1235}
    assert row["seed"] == "123456" and row["qa"] == ""


# ---------------------------------------------------------------------------------------------------------------------
# Commands

class InTurn:
    """A pool of this process."""
    sizes = []

    def __init__(self, count, *how):
        self.sizes.append(count)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def pool(monkeypatch):
    """Jobs run here, in turn, and take no time; returns what was prepared and worked on."""
    done = {"prepared": [], "jobs": [], "bad": None, "sizes": []}

    def work(job, device, commit):
        done["jobs"].append((job.task, job.variant, job.seed))
        if done["bad"] and done["bad"] in job.variant:
            raise RuntimeError("out of luck")
        return entry(job, **both("own", 10.0 + job.seed, 10.0 + job.seed), commit=commit, device=device)

    monkeypatch.setattr(InTurn, "sizes", done["sizes"])
    monkeypatch.setattr(variants, "ProcessPoolExecutor", InTurn)
    monkeypatch.setattr(variants, "prepare", lambda job, threads: done["prepared"].append(job))
    monkeypatch.setattr(variants, "work", work)
    return done


def ablate(capsys, flags):
    code, out, err = command("tools/ablate.py", ["train", *flags.split()], capsys)
    return code, out, err


def test_what_the_file_has_is_not_trained_again(small, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--out rows.csv --commit c1 --jobs 3 --seeds"
    code, out, err = ablate(capsys, f"{flags} 0 2 --tables first")
    assert code == 0 and "4 students to train, 3 at once" in out and pool["sizes"] == [3], err
    other, short = canonical({"mask.name": "random_frame"}), canonical({"unmasked_steps": 1})
    assert pool["jobs"] == [("retrieval", v, s) for s in (0, 2) for v in ("{}", other)]
    assert [(j.seed, j.variant, j.full) for j in pool["prepared"]] == [(0, "{}", False), (2, "{}", False)]
    rows = variants.read_file("rows.csv")
    assert sorted((r["seed"], r["variant"], r["commit"], r["own T2V"]) for r in rows) == sorted(
        (s, v, "c1", t) for s, t in (("0", "10"), ("2", "12")) for v in ("{}", other))
    found = {cells[0]: cells for table in tables(out) for cells in table}
    assert found["base"][1:3] == found["other"][1:3] == ["2", "11.0 ± 1.0"] and "second" not in out
    del pool["jobs"][:], pool["prepared"][:]
    code, out, _ = ablate(capsys, f"{flags} 2 1")                           # all tables, one seed of which is there
    assert code == 0 and pool["jobs"] == [("retrieval", short, 2), *(("retrieval", v, 1) for v in ("{}", other, short))]
    assert [j.seed for j in pool["prepared"]] == [2, 1] and variants.read_file("rows.csv")[:4] == rows
    del pool["jobs"][:], pool["prepared"][:]
    before = open("rows.csv").read()
    code, out, _ = ablate(capsys, f"{flags} 1 2")
    assert code == 0 and not pool["jobs"] and not pool["prepared"] and "0 students to train" in out
    assert open("rows.csv").read() == before and "which mask" in out
    assert ablate(capsys, f"{flags} 1 --full")[0] == 0 and len(pool["jobs"]) == 3      # others' rows are not theirs
    monkeypatch.setattr(variants.REDUCED, "lr", 3e-3)
    assert ablate(capsys, f"{flags} 1")[0] == 0 and len(pool["jobs"]) == 6


def test_two_names_of_one_variant_are_one_student(small, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    variants.TABLES["third"] = Table("the same once more", {
        "base": {}, "two": {"unmasked_steps": 2, "mask.name": "random_frame"}})
    code, out, err = ablate(capsys, "--out rows.csv --seeds 0")
    assert code == 0, err
    assert len(pool["jobs"]) == len({row["settings"] for row in variants.read_file("rows.csv")}) == 3
    assert [cells[1:3] for table in tables(out) for cells in table[1:]] == [["1", "10.0"]] * 6


def test_one_that_fails_does_not_stop_the_others_and_is_named(small, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pool["bad"] = "random_frame"
    code, out, err = ablate(capsys, "--out rows.csv --seeds 0 1")
    assert_one_line("tools.ablate", code, err, r"2 of 6 students failed: retrieval \{.mask.name.: .random_frame.\} "
                                               "seed [01]: out of luck")
    assert len(variants.read_file("rows.csv")) == 4 and "10.5 ± 0.5" in out
    pool["bad"] = None
    del pool["jobs"][:]
    assert ablate(capsys, "--out rows.csv --seeds 0 1")[0] == 0 and len(pool["jobs"]) == 2
    pool["bad"] = "{"
    code, _, err = ablate(capsys, "--out none.csv --seeds 0")               # none is left for a table
    assert_one_line("tools.ablate", code, err, "3 of 3 students failed: .* out of luck")


@pytest.mark.parametrize("flags, message", [
    ("train --tables nope", "there is no table 'nope'; there are first, second"),
    ("train --seeds 0 0", "--seeds .*none twice"), ("train --seeds -1", "--seeds .*not negative"),
    ("train --seeds", "--seeds .*wants numbers"), ("train --jobs -1", "--jobs -1: wants"),
    ("train --out no/where.csv", "--out no/where.csv: there is no folder no"),
    ("table --tables nope", "there is no table 'nope'; there are first, second"),
    ("table --out nothing.csv", "nothing.csv has no rows: python -m tools.ablate train writes them"),
])
def test_what_cannot_be_is_one_line_before_anything_is_prepared(small, pool, tmp_path, monkeypatch, capsys, flags,
                                                                message):
    monkeypatch.chdir(tmp_path)
    flags = flags if "--out" in flags else f"{flags} --out rows.csv"
    code, _, err = command("tools/ablate.py", flags.split(), capsys)
    assert_one_line("tools.ablate", code, err, message)
    assert not pool["jobs"] and not pool["prepared"] and not os.listdir()


def test_students_run_in_processes_of_their_own(small, tmp_path, monkeypatch, capsys):
    """Which know nothing of what is patched here: one that finds no clips says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "prepare", lambda job, threads: None)
    variants.add("rows.csv", entry(job(seed=1), **both("own", 1, 1)))
    del variants.TABLES["first"].rows["other"]
    with pytest.raises(ValueError, match="^1 of 1 students failed: retrieval {} seed 0: out/ablate/r") as error:
        variants.run(variants.Train(("first",), (0,), jobs=1, out="rows.csv", commit="c"))
    assert "\n" not in str(error.value) and len(variants.read_file("rows.csv")) == 1


def test_the_command_prepares_trains_and_shows(here, monkeypatch, capsys):
    monkeypatch.setattr(variants, "ProcessPoolExecutor", InTurn)
    code, out, err = ablate(capsys, "--out rows.csv --seeds 0 --jobs 1 --tables first --commit c")
    assert code == 0, err
    rows = variants.read_file("rows.csv")
    assert {row["variant"] for row in rows} == {"{}", canonical({"mask.name": "random_frame"})} and len(rows) == 2
    assert all(row[name] for row in rows for name in COLUMNS if "qa" not in name)
    table, = tables(out)
    assert table[0][:6] == ["", "seeds", "own", "random", "before", "after"] and table[0][-1] == "after − first"
    assert [cells[:2] for cells in table[1:]] == [["base", "1"], ["other", "1"]]


WORKER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

if __name__ == "__main__":
    from tools import variants
    context = get_context("spawn")
    numbers = context.Queue()
    numbers.put((0, "3"))
    with ProcessPoolExecutor(1, context, variants.worker, (numbers,)) as pool:
        print(pool.submit(os.getpid).result(), pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    os.makedirs(tmp_path / "out" / "ablate")
    (tmp_path / "run.py").write_text(WORKER)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": root}) as process:
        worker, gpu = map(int, process.stdout.readline().split())
        process.kill()
    assert gpu == 3
    end = time.time() + 20
    with suppress(ProcessLookupError):
        while time.time() < end:
            os.kill(worker, 0)
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        raise AssertionError("a worker outlived its run")
