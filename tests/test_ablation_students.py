"""Students of tools.ablations: cached outputs against the teacher's, and the inputs and scores of each stage."""

import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.ablations import BASE, TINY, SerialPool, as_json, job, run, shrink
from helpers.benchmarks import load_json
from helpers.runs import assert_same
from helpers.tables import markdown_tables

import train
from data import ClipDataset, collate, iterate_micro_batches
from masking import CLIP_BUDGET, MASKS, MaskConfig, keep_count, log_attention, token_sizes
from targets import compute_targets
from teacher import SigLIP
from tools import ablations
from tools.ablations import COLUMNS, SHUFFLED_CAPTIONS, StudentRun, TeacherCache
from tools.mask_stats import cluster_coverage, cluster_labels
from tools.tables import read_csv

COUNT = {"train": 16, "val": 8, "test": 8}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder in which one seed has been prepared."""
    folder = tmp_path_factory.mktemp("ablations")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(folder)
        ablations.prepare_seed(BASE, 1)
    return folder


@pytest.fixture
def copy(prepared, tmp_path, monkeypatch):
    """The current folder is a copy of `prepared`."""
    shrink(monkeypatch)
    shutil.copytree(prepared / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def student(one=BASE):
    """The student of a job before its first step."""
    return StudentRun(one, train.setup(replace(one.settings(), device="cpu", name=f"a{len(os.listdir('out'))}")))


def eval_batches(dataset, tokenizer):
    """The clips as they are scored, batch by batch."""
    for start in range(0, len(dataset), 4):
        yield collate([dataset[i] for i in range(start, min(start + 4, len(dataset)))], tokenizer, 24, seed=0)


def train_steps(one, steps):
    """The micro-batches of the first training steps of a StudentRun."""
    return iterate_micro_batches(one.run, one.datasets["train"], one.tokenizer, "pretrain", 8, 4, 0, steps)


def videos_of(dataset):
    return [row.video for row in dataset.annotations]


# ---------------------------------------------------------------------------------------------------------------------
# Teacher outputs

def cache_of(split, seed=0, teacher=True):
    """The TeacherCache of a split. teacher=False: it can read files but compute nothing."""
    siglip = SigLIP.from_pretrained(f"{BASE.shared_folder}/teacher") if teacher else None
    return TeacherCache(f"{BASE.shared_folder}/teacher_outputs/{split}", seed, siglip)


def stored(cache):
    """Stored tokens, attention and text embeddings."""
    x, a, text = (torch.from_numpy(np.array(cache.array(name))) for name in ("tokens", "attention", "text"))
    return x.float(), a, text


def remove_files(cache, *prefixes):
    for name in os.listdir(cache.folder):
        if name.startswith(prefixes):
            os.remove(f"{cache.folder}/{name}")


@pytest.mark.parametrize("split", COUNT)
def test_stored_outputs_are_those_of_the_teacher(copy, split):
    cache = cache_of(split)
    dataset, (x, a, text) = ablations.split_clips(BASE.settings(), split), stored(cache)
    assert len(dataset) == len(x) == COUNT[split] and x.shape[1:] == (4, 16, 16)
    assert cache.array("tokens").dtype == "float16"
    for i in range(len(dataset)):
        sample, teacher = dataset.training_sample(i, 0) if split == "train" else dataset[i], cache.teacher
        tokens = teacher.forward_features(teacher.normalize(sample.video))
        torch.testing.assert_close(x[i], tokens, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a[i], teacher.pool_attention(tokens), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(text[i:i + 1], teacher.encode_text(teacher.tokenize([sample.caption])))
    assert (x[1:] - x[:-1]).abs().amax((1, 2, 3)).min() > 0.1 and (text[1:] != text[:-1]).any(1).all()


def test_validation_clips_are_the_last_of_the_training_file(copy):
    cfg = BASE.settings()
    videos = [f"{cfg.data.video_root}/{row['video']}" for row in load_json(cfg.data.train_file)]
    datasets = {split: ablations.split_clips(cfg, split) for split in COUNT}
    assert videos_of(datasets["train"]) + videos_of(datasets["val"]) == videos and len(datasets["val"]) == 8
    assert not set(videos_of(datasets["test"])) & set(videos)
    assert [dataset.train for dataset in datasets.values()] == [True, False, False]


@pytest.mark.parametrize("name", [name for name in MASKS if not MaskConfig(name).stochastic])
def test_a_deterministic_mask_treats_each_clip_alone(copy, name, monkeypatch):
    cache, mask = cache_of("train"), MaskConfig(name, 0.6, quantile=0.9)
    for key in ("tokens", "attention"):                                     # so small a teacher's hardly differ
        noise = torch.randn(cache.array(key).shape, generator=torch.Generator().manual_seed(0)).numpy()
        np.save(f"{cache.folder}/{key}.npy", noise.astype(np.float16) if key == "tokens" else np.exp(noise))
    x, a, text = stored(cache)
    expected = [mask(x[i:i + 1], 6, attention=a[i:i + 1], logits=log_attention(a[i:i + 1]), text=text[i:i + 1],
                     grid=(4, 4), aligned=cache.teacher.token_embeddings(x[i], (4, 4), "mean")[None].half().float())
                for i in range(16)]
    ids = cache.visible_ids(mask, "mean")
    assert ids.dtype == np.int64 and np.array_equal(ids, torch.cat(expected)) and len({*map(tuple, ids)}) > 1
    files = sorted(os.listdir(cache.folder))
    assert np.array_equal(cache_of("train", teacher=False).visible_ids(mask, "mean", epoch=3), ids)     # from the file
    assert sorted(os.listdir(cache.folder)) == files                        # no file for another epoch
    remove_files(cache, "visible_ids", "token_targets")
    monkeypatch.setattr(ablations, "CHUNK", 64)
    assert np.array_equal(cache.visible_ids(mask, "mean"), ids)


@pytest.mark.parametrize("name, settings", [("random_frame", {}), ("umt", {}), ("tube", {}), ("adamae", {}),
                                            ("random", {}), ("cluster_stm", {"pick": "random"})])
def test_a_random_mask_is_a_function_of_seed_and_epoch(copy, name, settings):
    cache, mask = cache_of("train"), MaskConfig(name, 0.75, **settings)
    first, second = (np.array(cache.visible_ids(mask, "map", epoch)) for epoch in (0, 1))
    assert (first != second).any(1).all()
    assert len({*map(tuple, first)}) > 12                                   # each clip has a draw of its own
    for ids in (first, second):
        assert ids.shape == (16, 16) and (np.diff(ids) > 0).all() and 0 <= ids.min() and ids.max() < 64
        if name not in CLIP_BUDGET:
            assert all(np.bincount(row // 16, minlength=4).tolist() == [4] * 4 for row in ids)
    if name == "cluster_stm":                                               # it used the tokens: each cluster is kept
        visible = torch.zeros(16, 64, dtype=torch.bool).scatter(1, torch.from_numpy(first), True).view(16, 4, 16)
        assert cluster_coverage(visible, cluster_labels(stored(cache)[0], 4, mask), 4) == 1
    assert np.array_equal(cache_of("train", teacher=False).visible_ids(mask, "map", 1), second)
    for seed in (0, 1):                                                     # and not of earlier draws
        remove_files(cache, "visible_ids")
        assert np.array_equal(cache_of("train", seed).visible_ids(mask, "map", 1), second) == (seed == 0)


def test_sizes_are_those_of_the_visible_tokens_of_the_epoch(copy):
    cache, results = cache_of("train"), []
    for mask in (TINY.mask, MaskConfig("dynamic", 0.75), MaskConfig("random_frame", 0.75)):
        for epoch in (0, 1):
            ids = torch.from_numpy(np.array(cache.visible_ids(mask, "map", epoch)))
            expected = token_sizes(stored(cache)[0], ids)
            results.append(np.array(cache.token_sizes(mask, "map", epoch)))
            assert np.array_equal(results[-1], expected) and results[-1].max() > 1
            assert np.array_equal(cache_of("train", teacher=False).token_sizes(mask, "map", epoch), expected)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[2], results[3])
    assert (results[4] != results[5]).any()
    assert len([name for name in os.listdir(cache.folder) if name.startswith("token_sizes")]) == 4


def test_masks_of_other_settings_are_other_files(copy):
    cache = cache_of("test")
    masks = [MaskConfig(ratio=0.75, quantile=0.95), MaskConfig(ratio=0.5), MaskConfig("kmeans", 0.75),
             MaskConfig(ratio=0.75, pick="lowest"), MaskConfig(ratio=0.0, name="random_frame")]
    ids = [np.array(cache.visible_ids(mask, "map")) for mask in masks]
    assert [x.shape for x in ids] == [(8, 4 * keep_count(16, m.ratio)) for m in masks]
    assert not np.array_equal(ids[0], ids[2]) and not np.array_equal(ids[0], ids[3])
    assert np.array_equal(ids[-1], np.tile(np.arange(64), (8, 1)))


@pytest.mark.parametrize("pooling", ["map", "mean", "token"])
def test_token_targets_come_from_the_stored_tokens_and_are_computed_once(copy, pooling):
    cache = cache_of("train")
    x, targets = stored(cache)[0], cache.token_targets(pooling)
    assert targets.dtype == np.float16 and targets.shape == (16, 4, 16, 16)
    for i in range(16):
        expected = cache.teacher.token_embeddings(x[i], (4, 4), pooling)
        torch.testing.assert_close(torch.from_numpy(np.array(targets[i])).float(), expected, rtol=0, atol=6e-4)
    assert np.array_equal(cache_of("train", teacher=False).token_targets(pooling), targets)
    if pooling != "map":
        assert not np.allclose(targets, cache.token_targets("map"), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and scores of a student

def assert_same_ids(ids, expected):
    """The same visible ids, except for ties that fp16 breaks. No two clips have as many in common."""
    def share(a, b):
        return np.mean([len({*p} & {*q}) / len(p) for p, q in zip(a.tolist(), b.tolist(), strict=True)])
    assert ids.shape == expected.shape and share(ids, expected) > 0.98 > share(ids.roll(1, 0), expected) + 0.05


@pytest.mark.parametrize("changes", [{}, {"mask_name": "attention_high", "target_pooling": "mean"},
                                     {"model_mrm_weight": 0.0}, {SHUFFLED_CAPTIONS: 0.5}], ids=str)
def test_targets_are_those_that_the_teacher_computes_for_the_clips(copy, changes):
    s = student(job(**changes))
    rows = ablations.split_clips(s.cfg, "train").annotations
    same = [row == other for row, other in zip(rows, s.datasets["train"].annotations, strict=True)]
    assert sum(same) == (8 if SHUFFLED_CAPTIONS in changes else 16)
    assert sorted(r.captions for r in rows) == sorted(r.captions for r in s.datasets["train"].annotations)
    cfg, teacher = s.cfg, SigLIP.from_pretrained(s.cfg.teacher)
    clips = []
    for batches in train_steps(s, 5):
        targets = s.targets(batches)
        assert len(targets) == len(batches) == 2
        for b, t in zip(batches, targets, strict=True):
            expected = compute_targets(teacher, b, cfg.mask, cfg.mask.ratio, cfg.target_pooling)
            assert_same_ids(t.visible_ids, expected.visible_ids)
            if cfg.model.mrm_weight:
                torch.testing.assert_close(t.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
                assert (t.text_embeds - expected.text_embeds.roll(1, 0)).abs().amax(1).min() > 1e-3
                torch.testing.assert_close(t.token_targets.float(), expected.token_targets, rtol=0, atol=3e-3)
                assert (t.token_targets - expected.token_targets.roll(1, 0)).abs().amax((1, 2, 3)).min() > 0.03
            else:
                assert t.token_targets is t.text_embeds is None
            clips += b.clip_ids.tolist()
    assert sorted(clips[:16]) == sorted(clips[16:32]) == list(range(16)) and clips[:16] != clips[16:32]


@pytest.mark.parametrize("changes", [{}, {"model_proportional": True},
                                     {"model_proportional": True, "mask_name": "random_frame"}], ids=str)
def test_targets_have_sizes_if_the_student_uses_them(copy, changes):
    s = student(job(**changes))
    tokens = {split: stored(cache)[0] for split, cache in s.caches.items()}

    def check(split, batch, targets):
        assert (targets.token_size is not None) == bool(changes)
        if changes:
            assert targets.token_size.dtype == torch.float32
            assert torch.equal(targets.token_size, token_sizes(tokens[split][batch.clip_ids], targets.visible_ids))

    for batches in train_steps(s, 4):
        for b, t in zip(batches, s.targets(batches), strict=True):
            check("train", b, t)
    for split in ("val", "test"):
        for b in eval_batches(s.datasets[split], s.tokenizer):
            check(split, b, s.visible_fn(split, s.cfg.mask)(b))
    files = os.listdir(s.caches["test"].folder)
    assert any(name.startswith("token_sizes") for name in files) == bool(changes)


@pytest.mark.parametrize("n, share, count", [(16, 0, 0), (16, 0.5, 8), (7, 0.5, 4), (7, 1, 7), (1000, 0.25, 250)])
def test_that_share_of_the_clips_has_the_caption_of_another(n, share, count):
    orders = [ablations.shuffled_captions(n, share, seed) for seed in (0, 1, 0)]
    assert all(sorted(order) == list(range(n)) and (order != np.arange(n)).sum() == count for order in orders)
    assert np.array_equal(orders[0], orders[2]) and np.array_equal(orders[0], orders[1]) == (count == 0)


def test_a_random_mask_is_that_of_the_training_epoch(copy):
    s = student(job(mask_name="umt"))
    for step, batches in enumerate(train_steps(s, 5)):
        for b, t in zip(batches, s.targets(batches), strict=True):
            for epoch in range(3):
                ids = s.caches["train"].visible_ids(s.cfg.mask, "map", epoch)[b.clip_ids.numpy()]
                assert np.array_equal(t.visible_ids, ids) == (epoch == step // 2)           # 16 clips, 8 a step


@pytest.mark.parametrize("split", ["val", "test"])
def test_retrieval_is_scored_with_the_tokens_that_the_mask_keeps(copy, split, monkeypatch):
    s, real, protocols = student(), ablations.evaluation.retrieval, []
    s.fit("unmasked", 2, 8, 1e-2, lambda batches: train.attach_batch_stats(s.model, batches, [None] * len(batches)))

    def retrieval(model, dataset, tokenizer, protocol):
        protocols.append(protocol)
        assert not model.training and videos_of(dataset) == videos_of(ablations.split_clips(s.cfg, split))
        return real(model, dataset, tokenizer, protocol)

    monkeypatch.setattr(ablations.evaluation, "retrieval", retrieval)
    mask, teacher = MaskConfig("attention_high", 0.75), SigLIP.from_pretrained(s.cfg.teacher)
    masked, unmasked = s.retrieval(split, mask), s.retrieval(split, None)
    assert s.model.training and protocols[1].visible_fn is None
    s.model.eval()
    batches = list(eval_batches(s.datasets[split], s.tokenizer))
    ids = [compute_targets(teacher, b, mask, 0.75).visible_ids for b in batches]
    for b, expected in zip(batches, ids, strict=True):
        assert_same_ids(protocols[0].visible_fn(b).visible_ids, expected)
    for scores, visible in ((masked, ids), (unmasked, [None] * len(batches))):
        with torch.no_grad():
            video = torch.cat([s.model.encode_video(b.video, x)[1] for b, x in zip(batches, visible, strict=True)])
            text = torch.cat([s.model.encode_text(b.text_ids)[1] for b in batches])
        m = text @ video.T
        assert scores == {"T2V": 100 * (m.argmax(1) == torch.arange(8)).float().mean().item(),
                          "V2T": 100 * (m.argmax(0) == torch.arange(8)).float().mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# Students

@pytest.fixture
def stages(monkeypatch):
    """(stage, the weights at its end) of each stage that is trained."""
    real, results = ablations.train_stage, []

    def train_stage(run, stage):
        model = real(run, stage)
        results.append((stage.name, {k: v.clone() for k, v in model.state_dict().items()}))
        return model

    monkeypatch.setattr(ablations, "train_stage", train_stage)
    return results


@pytest.fixture
def videos(monkeypatch):
    """The videos that are trained on, in order."""
    real, results = ClipDataset.training_sample, []

    def training_sample(self, index, view_id):
        results.append(self.annotations[index].video)
        return real(self, index, view_id)

    monkeypatch.setattr(ClipDataset, "training_sample", training_sample)
    return results


def val_videos():
    return set(videos_of(ablations.split_clips(BASE.settings(), "val")))


QA_COLUMNS = {"qa", "qa by kind", "qa seen", "qa seen by kind"}
RECALL_COLUMNS = [f"{name} {way}" for name in ablations.SCORES for way in ("T2V", "V2T")]
TIMES = {"seconds", "masked seconds"}


def untimed(row):
    return {k: v for k, v in row.items() if k not in TIMES}


def test_the_row_of_a_student_is_reproducible_and_its_folder_is_removed(copy, stages, videos):
    row = ablations.run_job(BASE, "cpu", "c0")
    assert row.keys() == {*COLUMNS} - QA_COLUMNS
    assert untimed(row).items() >= {"form": "reduced", "task": "retrieval", "variant": "{}", "seed": 0, "commit": "c0",
                                    "settings": BASE.digest(), "device": "cpu", "torch": torch.__version__}.items()
    assert all(0 <= row[name] <= 100 and (row[name] / 12.5) % 1 == 0 for name in RECALL_COLUMNS)
    assert re.fullmatch(r"1:\S+ 2:\S+ 3:\S+ 4:\S+", row["curve"]) and 0 < row["masked seconds"] < row["seconds"]
    assert math.isfinite(row["loss"]) and os.listdir(f"{BASE.shared_folder}/students") == []
    assert len(videos) == 8 * (4 + 2) and not val_videos() & set(videos)
    again = ablations.run_job(BASE, "cpu", "c0")                            # its masked stage is stored
    assert untimed(again) == untimed(row) and [stage for stage, _ in stages] == ["pretrain", "unmasked", "unmasked"]
    assert again["masked seconds"] == row["masked seconds"]
    assert_same(stages[1][1], stages[2][1])
    shutil.rmtree(f"{BASE.shared_folder}/before_unmasked")
    assert untimed(ablations.run_job(BASE, "cpu", "c0")) == untimed(row)
    assert_same(stages[0][1], stages[3][1])


def test_variants_that_differ_only_after_the_masked_stage_share_it(copy, stages):
    def names():
        return [stage for stage, _ in stages]

    other = job(unmasked_steps=1, unmasked_lr_scale=0.7)
    ablations.run_job(BASE, "cpu", "")
    row = ablations.run_job(other, "cpu", "")
    assert names() == ["pretrain", "unmasked", "unmasked"]
    shutil.rmtree(f"{BASE.shared_folder}/before_unmasked")
    assert untimed(ablations.run_job(other, "cpu", "")) == untimed(row)
    assert names()[3:] == ["pretrain", "unmasked"]
    assert_same(stages[2][1], stages[4][1])                                 # the weights read are those trained
    assert any(not torch.equal(a, b) for a, b in zip(stages[1][1].values(), stages[2][1].values(), strict=True))
    row = ablations.run_job(job(unmasked_steps=0), "cpu", "")
    assert names()[5:] == [] and [row[f"after {w}"] for w in ("T2V", "V2T")] == [
        row[f"before {w}"] for w in ("T2V", "V2T")]
    for changes in ({"mask_pick": "lowest"}, {"target_pooling": "mean"}, {"steps": 3}):
        del stages[:]
        ablations.run_job(job(**changes), "cpu", "")
        assert names() == ["pretrain", "unmasked"], changes


@pytest.mark.parametrize("changes, loss", [
    ({"model_objective": "visible"}, "align"), ({"model_objective": "pixels"}, "pixels"),
    ({"model_mrm_weight": 0.0}, None), ({"mask_ratio": 0.0, "mask_name": "random_frame"}, None),
    ({"model_decoder": "joint", "mask_name": "umt"}, "mrm"),
], ids=str)
def test_the_loss_of_each_objective_is_the_mean_of_the_last_log_rows(copy, changes, loss, monkeypatch):
    real, logged = ablations.read_log, []
    monkeypatch.setattr(ablations, "read_log", lambda folder: logged.extend(real(folder)) or logged)
    row = ablations.run_job(job(**changes), "cpu", "")
    assert row.keys() == {*COLUMNS} - QA_COLUMNS - ({"loss"} if loss is None else set())
    assert not loss or row["loss"] == pytest.approx(np.mean([r[loss] for r in logged[1:]])) and len(logged) == 4


def test_each_score_is_taken_at_its_step_with_its_mask(copy, monkeypatch):
    calls = []

    def retrieval(self, split, mask):
        last = ablations.read_log(self.run.folder)[-1]
        calls.append((split, mask, last["stage"], last["step"]))
        return {"T2V": len(calls), "V2T": len(calls)}

    monkeypatch.setattr(StudentRun, "retrieval", retrieval)
    row = ablations.run_job(BASE, "cpu", "")
    mask = TINY.mask
    assert calls == [*(("val", mask, "pretrain", k) for k in (1, 2, 3, 4)), ("test", mask, "pretrain", 4),
                     ("test", replace(mask, name="random_frame"), "pretrain", 4), ("test", None, "pretrain", 4),
                     ("test", None, "unmasked", 2)]
    assert row["curve"] == "1:1.0 2:2.0 3:3.0 4:4.0"
    assert [row[name] for name in RECALL_COLUMNS] == [5, 5, 6, 6, 7, 7, 8, 8]


def test_the_warm_start_is_reproducible_and_has_seen_no_validation_clip(copy, stages, videos):
    shutil.move(f"{BASE.shared_folder}/warm_start", "before")
    ablations.warm_start(BASE)
    assert [stage for stage, _ in stages] == ["pretrain"] and len(videos) == 8 * 3
    assert not val_videos() & set(videos)
    assert_same(*(ablations.load_file(f"{folder}/model.safetensors")
                  for folder in ("before", f"{BASE.shared_folder}/warm_start")))


@pytest.mark.parametrize("changes", [{}, {"mask_name": "tube"}, {"model_decoder": "joint"}, {"model_decoder_depth": 2},
                                     {"model_objective": "pixels"}, {"model_objective": "visible"}], ids=str)
def test_a_student_starts_from_the_warm_start_with_a_new_decoder(copy, changes):
    start = ablations.load_file(f"{BASE.shared_folder}/warm_start/model.safetensors")
    s = student(job(**changes))
    weights, new = s.model.state_dict(), StudentRun(s.job, s.run, load_start=False).model.state_dict()
    assert weights.keys() == new.keys()
    for name, value in weights.items():
        assert torch.equal(value, (new if name.startswith("decoder.") else start)[name]), name
    for part in ("vit.", "bert."):
        assert any(not torch.equal(v, start[k]) for k, v in new.items() if k.startswith(part)), part


@pytest.mark.parametrize("changes", [{}, {"steps": 0}, {"model_proportional": True}],
                         ids=["masked", "not pretrained", "proportional"])
def test_a_student_answers_questions_with_its_own_tokens(copy, stages, videos, changes, monkeypatch):
    teacher, real = SigLIP.from_pretrained(BASE.settings().teacher), ablations.evaluation.question_answering
    fit, trained_on, scored = StudentRun.fit, [], []

    def check(batch, targets):
        batch = replace(batch, captions=["a"] * len(batch.video))
        assert_same_ids(targets.visible_ids, compute_targets(teacher, batch, TINY.mask, 0.75).visible_ids)
        assert (targets.token_size is not None) == ("model_proportional" in changes)

    def checked_fit(self, stage, *args, make_inputs=None, **kwargs):
        def checked_inputs(batches):
            inputs = make_inputs(batches)
            for batch, targets in inputs:
                check(batch, targets)
                trained_on.append(len(batch.video))
            return inputs
        return fit(self, stage, *args, **kwargs | ({"make_inputs": checked_inputs} if make_inputs else {}))

    def question_answering(model, dataset, tokenizer, protocol):
        assert not model.training and protocol.answers and not dataset.train
        assert all(row.questions for row in dataset.annotations)
        scored.append(videos_of(dataset))
        for batch in eval_batches(dataset, tokenizer):
            check(batch, protocol.visible_fn(batch))
        return real(model, dataset, tokenizer, protocol)

    monkeypatch.setattr(StudentRun, "fit", checked_fit)
    monkeypatch.setattr(ablations.evaluation, "question_answering", question_answering)
    row = ablations.run_job(job("qa", **changes), "cpu", "")
    assert scored == [videos_of(ablations.split_clips(BASE.settings(), split)) for split in ("test", "val")]
    pretrained = {"curve", "loss", "masked seconds"}
    assert row.keys() - pretrained == {*COLUMNS} - {*RECALL_COLUMNS} - pretrained
    assert ("curve" in row) == ("steps" not in changes) and sum(trained_on) == 3 * 8
    for name in ("qa", "qa seen"):
        by_type = dict(part.split(":") for part in row[f"{name} by kind"].split())
        assert 0 <= row[name] <= 100 and len(by_type) > 2 and all(0 <= float(x) <= 100 for x in by_type.values())
    assert [stage for stage, _ in stages] == ["pretrain"] * ("steps" not in changes) + ["finetune"]
    assert not val_videos() & set(videos)


def test_the_command_prepares_trains_and_prints(copy, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", SerialPool)
    code, out, err = run(capsys, "train --out rows.csv --seeds 0 --jobs 1 --tables first --commit c")
    assert code == 0, err
    rows = read_csv("rows.csv", COLUMNS)
    assert {row["variant"] for row in rows} == {"{}", as_json({"mask.name": "random_frame"})} and len(rows) == 2
    assert all(row[name] for row in rows for name in COLUMNS if "qa" not in name)
    table, = markdown_tables(out)
    assert table[0][:6] == ["", "seeds", "own", "random", "before", "after"] and table[0][-1] == "after − first"
    assert [cells[:2] for cells in table[1:]] == [["base", "1"], ["other", "1"]]
