"""Teacher targets of a batch, and their caches: what is read equals what was computed, even if the file is damaged."""

import math
import os
import shutil
from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.runs import Killed, assert_close_runs, assert_same, kill, log, on_ranks, weights
from helpers.siglip import random_clips, tiny_siglip

import train
from annotations import read_annotations
from config import Config
from data import ClipDataset, DataConfig, UnreadableError, iterate_micro_batches
from encoders import ViT, ViTConfig
from masking import MASK_INPUTS, MASKS, MaskConfig, cluster_stm, keep_count, token_sizes
from model import ModelConfig
from runtime import RunContext
from targets import (
    TargetProvider,
    TargetStore,
    TeacherTargets,
    VisibleIdCache,
    compute_targets,
    compute_visible_ids,
    select_visible,
)
from teacher import SigLIP
from tokenizer import load_tokenizer
from video import resize_like_pillow

B, E, TN, CLIPS = 8, 16, 4 * 16, 24         # of the tiny run: batch, joint space, tokens of a clip, clips
FILE = "out/a/target_cache/targets.bin"
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


# ---------------------------------------------------------------------------------------------------------------------
# Targets of a batch

def test_targets_are_the_teachers_outputs_for_each_frame_and_caption():
    model, batch = tiny_siglip(), random_clips()
    result = compute_targets(model, batch, cluster_stm, 0.6)
    assert result.visible_ids.shape == (3, 2 * 4) and result.token_targets.shape == (3, 2, 9, 16)
    assert result.text_embeds.shape == (3, 16)
    with torch.no_grad():
        for b in range(3):
            for t in range(2):
                tokens, _ = model.encode_image(model.normalize(batch.video[b, t][None]))
                expected = model.token_embeddings(tokens, (3, 3))[0]
                torch.testing.assert_close(result.token_targets[b, t], expected, **TIGHT)
            expected = model.encode_text(model.tokenize([batch.captions[b]]))[0]
            torch.testing.assert_close(result.text_embeds[b], expected, **TIGHT)
        tokens = torch.stack([model.encode_image(model.normalize(clip))[0] for clip in batch.video])
        by_mean = model.token_embeddings(tokens.flatten(0, 1), (3, 3), "mean").view(3, 2, 9, 16)
    assert torch.equal(result.visible_ids, cluster_stm(tokens, 4))
    torch.testing.assert_close(compute_targets(model, batch, cluster_stm, 0.6, "mean").token_targets, by_mean, **TIGHT)
    assert not (result.visible_ids.is_floating_point() or result.token_targets.requires_grad
                or result.text_embeds.requires_grad)


@pytest.mark.parametrize("tokens, texts", [(False, False), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("name", ["cluster_stm", "text_guided"])
def test_targets_that_nothing_needs_are_not_computed(tokens, texts, name):
    model, batch, mask = tiny_siglip(), random_clips(), MaskConfig(name)
    every = compute_targets(model, batch, mask, 0.6)
    with mock.patch.object(model, "token_embeddings", wraps=model.token_embeddings) as token_embeddings, \
            mock.patch.object(model, "encode_text", wraps=model.encode_text) as encode_text:
        targets = compute_targets(model, batch, mask, 0.6, with_tokens=tokens, with_texts=texts)
    assert torch.equal(targets.visible_ids, every.visible_ids)
    for wanted, found, expected, spy in ((tokens, targets.token_targets, every.token_targets, token_embeddings),
                                         (texts, targets.text_embeds, every.text_embeds, encode_text)):
        assert spy.called is (wanted or name == "text_guided")
        assert torch.equal(found, expected) if wanted else found is None


@pytest.mark.parametrize("tokens, texts, sizes", [*product((False, True), repeat=3)], ids=str)
def test_a_store_has_the_parts_that_are_used(tmp_path, tokens, texts, sizes):
    path, (T, N, K, E) = tmp_path / "targets.bin", (2, 9, 4, 6)
    path.touch()
    store = TargetStore(str(path), T, N, T * K, E, sizes, tokens, texts)
    ids = torch.stack([torch.randperm(T * N)[:T * K].sort().values for _ in range(3)])
    targets = TeacherTargets(ids, torch.randn(3, T, N, E) if tokens else None, torch.randn(3, E) if texts else None,
                             torch.randint(1, 9, (3, T * K)).float() if sizes else None)
    with store.file:
        store.write([5, 0, 2], store.to_host(store.quantize(targets)))
        found = store.read([5, 0, 2], torch.device("cpu"))
        assert store.read([1], torch.device("cpu")) is None
    assert os.path.getsize(path) == 6 * (2 * T * N * E * tokens + 3 + 4 * E * texts + 2 * T * K * sizes + 4)
    assert torch.equal(found.visible_ids, ids)
    for name in ("token_targets", "text_embeds", "token_size"):
        wanted, value = getattr(targets, name), getattr(found, name)
        assert value is None if wanted is None else torch.equal(value, wanted.to(value.dtype))


@pytest.mark.parametrize("grid", [(2, 5), (4, 4), (1, 1)], ids=str)
def test_targets_are_of_the_students_patches(grid):
    model, batch, N = tiny_siglip(), random_clips(), grid[0] * grid[1]
    mask = mock.Mock(side_effect=lambda tokens, keep, **aux: cluster_stm(tokens, keep))
    result = compute_targets(model, batch, mask, 0.6, grid=grid)
    assert result.token_targets.shape == (3, 2, N, 16)
    assert result.visible_ids.shape == (3, 2 * keep_count(N, 0.6))
    tokens, aux = mask.call_args.args[0], mask.call_args.kwargs
    assert aux["grid"] == grid and aux["attention"].shape == (3, 2, N)
    with torch.no_grad():
        frames = resize_like_pillow(batch.video, (4 * grid[0], 4 * grid[1]), "bicubic").flatten(0, 1)
        expected = model.encode_image(frames.double() / 127.5 - 1)[0]
        embeddings = model.token_embeddings(expected, grid)
    torch.testing.assert_close(result.token_targets.flatten(0, 1), embeddings, **TIGHT)
    torch.testing.assert_close(tokens.flatten(0, 1), expected, **TIGHT)
    assert torch.equal(select_visible(model, expected.unflatten(0, (3, 2)), mask, 0.6, 11, grid), result.visible_ids)


def test_the_default_grid_is_the_one_of_the_frames():
    model, batch = tiny_siglip(), random_clips()
    a, b = (compute_targets(model, batch, cluster_stm, 0.6, grid=grid) for grid in (None, (3, 3)))
    assert torch.equal(a.visible_ids, b.visible_ids) and torch.equal(a.token_targets, b.token_targets)
    batch.video = batch.video[..., :8, :]
    assert compute_targets(model, batch, cluster_stm, 0.6).token_targets.shape == (3, 2, 6, 16)


def test_a_mask_gets_every_input_it_may_use():
    model, batch, mask = tiny_siglip(), random_clips(), mock.Mock(return_value="ids")
    result = compute_targets(model, batch, mask, 0.6, check=False)
    (tokens, keep), aux = mask.call_args
    assert result.visible_ids == "ids" and keep == keep_count(9, 0.6) and aux["grid"] == (3, 3)
    assert aux["text"] is result.text_embeds and aux["aligned"] is result.token_targets and aux["check"] is False
    assert aux["generator"].initial_seed() == 11
    expected = model.pool_attention(tokens.flatten(0, 1)).view(3, 2, 9).detach()
    assert torch.equal(aux["attention"], expected)


@pytest.mark.parametrize("name", sorted(MASKS))
def test_attention_is_computed_for_the_masks_that_use_it(monkeypatch, name):
    model, tokens = tiny_siglip(), torch.randn(2, 2, 9, 16, dtype=torch.float64)
    aux = {"text": torch.randn(2, 16), "aligned": torch.randn(2, 2, 9, 16), "logits": torch.randn(2, 2, 9)}
    cfg, expected = MaskConfig(name=name), None
    with mock.patch.object(model, "pool_attention", wraps=model.pool_attention) as pool_attention:
        ids = select_visible(model, tokens, cfg, 0.6, 3, **aux)
        assert pool_attention.call_count == ("attention" in MASK_INPUTS[name])
        expected = select_visible(model, tokens, lambda *args, **kwargs: cfg(*args, **kwargs), 0.6, 3, **aux)
        assert pool_attention.call_count == 1 + ("attention" in MASK_INPUTS[name])
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("mask", [cluster_stm, MASKS["evs"]])
def test_token_sizes_are_computed_in_fp32_on_request(mask):
    model, batch = tiny_siglip(size=64), random_clips(size=64)
    tokens = model.forward_features(model.normalize(batch.video.flatten(0, 1))).unflatten(0, (3, 2)).detach()
    sized, plain = (compute_targets(model, batch, mask, 0.8, with_sizes=with_sizes) for with_sizes in (True, False))
    assert plain.token_size is None and torch.equal(sized.visible_ids, plain.visible_ids)
    assert torch.equal(sized.token_targets, plain.token_targets)
    assert torch.equal(sized.token_size, token_sizes(tokens, sized.visible_ids)) and sized.token_size.max() > 4
    for bf16 in (False, True):                                              # a training step on a GPU is in bf16
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for result in (compute_targets(model, batch, mask, 0.8, with_sizes=True),
                           compute_visible_ids(model, batch.video, mask, 0.8, 11, (16, 16), True)):
                assert torch.equal(result.visible_ids, sized.visible_ids)
                assert torch.equal(result.token_size, sized.token_size)
    result = compute_visible_ids(model, batch.video, mask, 0.8, 11, (16, 16))
    assert torch.equal(result.visible_ids, sized.visible_ids)
    assert result.token_size is result.token_targets is result.text_embeds is None


@pytest.mark.parametrize("name", ["cluster_stm", "umt", "text_guided", "tube", "random", "mgmae_style"])
def test_visible_ids_are_a_function_of_the_batchs_seed(name):
    model, batch = tiny_siglip(), random_clips()
    a, b = (compute_targets(model, batch, MASKS[name], 0.6).visible_ids for _ in range(2))
    assert torch.equal(a, b)
    batch.seed += 1
    other = compute_targets(model, batch, MASKS[name], 0.6).visible_ids
    assert torch.equal(other, a) != ("generator" in MASK_INPUTS[name])


def test_a_clips_targets_do_not_depend_on_the_rest_of_the_batch():
    model, batch = tiny_siglip(), random_clips(B=3)
    together = compute_targets(model, batch, cluster_stm, 0.6)
    for b in range(3):
        one = SimpleNamespace(video=batch.video[b:b + 1], captions=batch.captions[b:b + 1], seed=b)
        alone = compute_targets(model, one, cluster_stm, 0.6)
        assert torch.equal(alone.visible_ids[0], together.visible_ids[b])
        torch.testing.assert_close(alone.token_targets[0], together.token_targets[b], **TIGHT)
        torch.testing.assert_close(alone.text_embeds[0], together.text_embeds[b], **TIGHT)


def test_select_visible_on_stored_tokens_equals_compute_targets():
    model, batch = tiny_siglip(), random_clips()
    with torch.no_grad():
        tokens = model.encode_image(model.normalize(batch.video.flatten(0, 1)))[0].view(3, 2, 9, 16)
    for name, mask in MASKS.items():
        if not MASK_INPUTS[name] & {"logits", "text"}:
            expected = compute_targets(model, batch, mask, 0.6).visible_ids
            assert torch.equal(select_visible(model, tokens, mask, 0.6, batch.seed), expected), name


def test_gather_returns_the_targets_of_flat_ids_in_fp32():
    token_targets = torch.randn(3, 2, 5, 12).half()
    ids = torch.tensor([[9, 0, 0], [3, 4, 5], [1, 8, 2]])
    result = TeacherTargets(None, token_targets).gather(ids)
    expected = torch.stack([torch.stack([token_targets[b, i // 5, i % 5] for i in ids[b]]) for b in range(3)])
    assert result.dtype == torch.float32 and torch.equal(result, expected.float())


# ---------------------------------------------------------------------------------------------------------------------
# The cache returns what was computed

class Harness:
    """A TargetProvider as a run has it, the micro-batches of its steps, and a count of the frames the teacher saw."""

    def __init__(self, cfg, step=0):
        self.dataset = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
        self.run = RunContext(cfg, f"out/{cfg.name}", torch.device("cpu"), 0, 1)
        self.teacher, self.num_frames = SigLIP.from_pretrained(cfg.teacher), 0
        forward_features = self.teacher.forward_features

        def counted(pixel_values):
            self.num_frames += len(pixel_values)
            return forward_features(pixel_values)

        self.teacher.forward_features = counted
        self.provider = TargetProvider(self.run, self.teacher, self.dataset)
        self.groups = iterate_micro_batches(self.run, self.dataset, load_tokenizer(cfg.text_encoder), "pretrain",
                                            cfg.batch, cfg.micro_batch or cfg.batch, step, cfg.steps)

    def step(self, group=None):
        """-> [(micro-batch, its targets)], the number of clips that the teacher ran on."""
        group, before = group or next(self.groups), self.num_frames
        results = self.provider(group)
        return list(zip(group, results, strict=True)), (self.num_frames - before) // self.run.cfg.data.num_frames

    def num_computed(self):
        """The number of clips that the teacher runs on in the next step."""
        return self.step()[1]

    def expected(self, batch):
        """The targets of a batch, computed without the provider and not counted."""
        cfg, before = self.run.cfg, self.num_frames
        result = compute_targets(self.teacher, batch, cfg.mask, cfg.mask.ratio, cfg.target_pooling,
                                 grid=(16 // cfg.vit.patch_size,) * 2, with_sizes=cfg.model.proportional)
        self.num_frames = before
        return result

    def assert_equal(self, results):
        """The targets of a step are the expected ones, to fp16."""
        for batch, actual in results:
            expected = self.expected(batch)
            assert torch.equal(actual.visible_ids, expected.visible_ids) and actual.visible_ids.dtype == torch.int64
            if self.run.cfg.model.proportional:
                assert torch.equal(actual.token_size, expected.token_size) and actual.token_size.max() > 1
            else:
                assert actual.token_size is expected.token_size is None
            torch.testing.assert_close(actual.text_embeds, expected.text_embeds, rtol=0, atol=1e-6)
            every_id = torch.arange(expected.token_targets[0, ..., 0].numel()).expand(len(expected.visible_ids), -1)
            torch.testing.assert_close(actual.gather(every_id), expected.token_targets.flatten(1, 2), rtol=1e-3,
                                       atol=1e-7)

    def close(self):
        self.run.exit_stack.close()


@pytest.mark.parametrize("flags, enabled", [
    ("--data.num-views 1", True),
    ("--data.num-views 2", True),
    ("--data.num-views 2 --mask.name tube", True),
    ("--data.num-views 2 --mask.name random_frame", True),
    ("--data.num-views 1 --mask.name random", True),
    ("--data.num-views 1 --mask.name block3d", True),
    ("--data.num-views 1 --mask.name divprune", True),
    ("--data.num-views 1 --mask.pick centre --target-pooling mean", True),
    ("--data.num-views 1 --vit.patch-size 8", True),        # the teacher's patches have 4 pixels: frames are resized
    ("--data.num-views 1 --data.num-frames 3 --vit.patch-size 8 --mask.ratio 0.5", True),   # 12 bits: no whole bytes
    ("--data.num-views 1 --mask.ratio 0", True),
    ("--data.num-views 1 --model.proportional", True),
    ("--data.num-views 2 --model.proportional --mask.name dynamic", True),
    ("--data.num-views 1 --model.proportional --data.num-frames 3 --vit.patch-size 8 --mask.ratio 0.5 --micro-batch 1",
     True),
    ("--data.num-views 1 --batch 10 --micro-batch 5", True),                # the first pass ends within a step
    ("--data.num-views 2 --model.proportional --mask.name random_frame", False),
    ("--data.num-views 1 --model.proportional --mask.name tube", False),
    ("--data.num-views 1 --mask.pick random", False),
    ("--data.num-views 1 --mask.name umt", False),
    ("--data.num-views 0", False),
    ("--data.num-views 4", False),                          # a view is seen less than twice
])
def test_targets_of_a_view_are_computed_once_and_read_as_computed(run_config, flags, enabled):
    a = Harness(run_config(f"--name a {flags}"))
    cfg, masks = a.run.cfg, {}
    assert a.provider.enabled == enabled == os.path.exists("out/a/target_cache")
    first_pass = math.ceil(CLIPS * cfg.data.num_views / cfg.batch) if enabled else math.inf     # in steps
    for step in range(2 * first_pass + 2 if enabled else 6):
        results, computed = a.step()
        assert computed == cfg.batch * (step < first_pass)
        a.assert_equal(results)
        for batch, result in results:
            for clip, view, ids in zip(batch.clip_ids, batch.view_ids, result.visible_ids.tolist(), strict=True):
                masks.setdefault((int(clip), int(view)), []).append(tuple(ids))
    if enabled:
        assert min(map(len, masks.values())) > 1 and len(masks) == CLIPS * cfg.data.num_views
    changed = sum(len(set(ids)) > 1 for ids in masks.values())
    if not cfg.mask.stochastic:
        assert changed == 0
    elif enabled:
        assert changed > 10                                 # a random mask is drawn at each step, cached or not
    a.provider.delete()
    assert not os.path.exists("out/a/target_cache")
    a.close()


def test_targets_of_data_with_images_are_not_cached(run_config):
    a = Harness(run_config("--name a --data.image-corpora images.json=images"))
    assert not a.provider.enabled and not os.path.exists("out/a/target_cache")


@pytest.mark.parametrize("flags, reasons", [
    ("--data.num-views 4", ["view"]), ("--mask.name umt", ["mask umt"]),
    ("--mask.pick random --data.num-views 4", ["view", "mask cluster_stm"]),
    ("--mask.name tube --model.proportional", ["sizes of mask tube"]),
    ("--data.image-corpora images.json=images", ["images"])])
def test_reasons_for_not_caching_are_printed_if_views_are_fixed(run_config, capsys, flags, reasons):
    a = Harness(run_config(f"--name a {flags}"))
    out = capsys.readouterr().out
    assert len(a.provider.disabled_because) == len(reasons) and all(reason in out for reason in reasons)
    Harness(run_config(f"--name b {flags} --data.num-views 0"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("frames, patch, sized", [(4, 4, False), (3, 8, False), (1, 8, False), (4, 4, True)])
def test_a_record_has_the_length_of_its_parts(run_config, frames, patch, sized):
    a = Harness(run_config(f"--name a --data.num-frames {frames} --vit.patch-size {patch} --data.num-views 2 "
                           f"--mask.ratio 0.5 {'--model.proportional' * sized}"))
    for _ in range(7):                              # one step past the first pass writes its last records
        a.step()
    tokens = frames * (16 // patch) ** 2
    size = tokens * 2 * E + math.ceil(tokens / 8) + 4 * E + 2 * (tokens // 2) * sized + 4
    assert os.path.getsize(FILE) == size * 2 * CLIPS


def test_records_are_written_at_the_next_step(run_config):
    a = Harness(run_config("--name a"))
    a.step()
    assert os.path.getsize(FILE) == 0
    a.step()
    size = a.provider.store.record_bytes
    assert sum(any(record) for record in records(size)) == B


def test_all_ranks_have_written_their_records_before_a_checkpoint(run_config):
    a, sizes = Harness(run_config("--name a")), []
    a.step()
    with mock.patch.object(a.run, "barrier", lambda: sizes.append(os.path.getsize(FILE))):
        a.provider.flush_all_ranks()
    assert len(sizes) == 1 and sizes[0] > 0


def test_ranks_wait_once_for_each_other_before_they_read(run_config):
    a = Harness(run_config("--name a"))
    with mock.patch.object(a.run, "barrier") as barrier:
        for step in range(6):
            a.step()
            assert barrier.call_count == (step >= 3)        # the first pass has 3 steps


def test_targets_that_are_not_finite_stay_so_in_the_cache(run_config):
    a = Harness(run_config("--name a --batch 8 --micro-batch 8"))
    batch, = next(a.groups)
    expected = a.expected(batch)
    expected.token_targets[2, 1, 3, 4], expected.token_targets[5, 0, 0, 0] = math.nan, math.inf
    a.provider.compute = mock.Mock(return_value=expected)
    computed, = a.provider([batch])
    a.provider.flush()
    for result in (computed, a.provider.lookup(batch)):
        assert result.token_targets.isfinite().flatten(1).all(1).tolist() == [i not in (2, 5) for i in range(8)]
        assert result.token_targets[2, 1, 3, 4].isnan() and result.token_targets[5, 0, 0, 0].isinf()
        assert torch.equal(result.text_embeds, expected.text_embeds)
    a.close()


# ---------------------------------------------------------------------------------------------------------------------
# Damage, and resuming

def records(size):
    """The records in the file."""
    with open(FILE, "rb") as f:
        content = f.read()
    return [content[i:i + size] for i in range(0, len(content), size)]


def overwrite(position, content):
    with open(FILE, "r+b") as f:
        f.seek(position)
        f.write(content)


def flip_bit(part):
    """Damage that flips a bit of one part of the record."""
    def damage(row, store):
        offset = {"targets": 7, "bits": store.part_bytes[0] + 1, "text": sum(store.part_bytes) - 5,
                  "checksum": store.record_bytes - 2}[part]
        byte = records(store.record_bytes)[row][offset]
        overwrite(row * store.record_bytes + offset, bytes([byte ^ 16]))
    return damage


def truncate(row, store):
    os.truncate(FILE, row * store.record_bytes + store.record_bytes // 3)


def zero_page(row, store):
    overwrite(max(0, row * store.record_bytes - 100), bytes(4096))


def copy_other(row, store):
    """The record is an intact record of another view."""
    overwrite(row * store.record_bytes, records(store.record_bytes)[(row + 1) % CLIPS])


@pytest.mark.parametrize("damage", [*map(flip_bit, ("targets", "bits", "text", "checksum")), truncate, zero_page,
                                    copy_other],
                         ids=["targets", "bits", "text", "checksum", "truncated", "zeros", "other view"])
def test_damaged_records_are_computed_and_written_again(run_config, damage):
    a = Harness(run_config("--name a"))
    for _ in range(4):
        a.step()
    store, group = a.provider.store, next(a.groups)
    before, row = records(store.record_bytes), group[1].clip_ids[2].item()
    damage(row, store)
    after = records(store.record_bytes)
    damaged = {i for i in range(CLIPS) if after[i:i + 1] != before[i:i + 1]}
    assert row in damaged
    results, computed = a.step(group)
    assert computed == 4 * sum(bool(damaged & {*b.clip_ids.tolist()}) for b in group) > 0
    a.assert_equal(results)
    results, computed = a.step(group)
    assert computed == 0
    a.assert_equal(results)


@pytest.mark.parametrize("flags", ["--data.num-views 2", "--data.num-views 2 --mask.name tube",
                                   "--data.num-views 2 --model.proportional"])
def test_a_resumed_run_reads_the_cache_and_computes_what_is_missing(run_config, flags):
    a = Harness(run_config(f"--name a {flags}"))
    results = [a.step()[0] for _ in range(9)]       # the first pass has 6 steps
    a.close()
    cfg = run_config(f"--name a --resume {flags}")
    b = Harness(cfg, step=7)
    for step in (7, 8):
        again, computed = b.step()
        assert computed == 0
        for (_, one), (_, other) in zip(results[step], again, strict=True):
            for name, value in vars(one).items():
                assert value is getattr(other, name) is None or torch.equal(value, getattr(other, name)), name
    b.close()
    c = Harness(cfg, step=4)                        # a checkpoint of the first pass: its steps compute again
    assert [c.num_computed() for _ in range(4)] == [B, B, 0, 0]
    c.close()
    os.truncate(FILE, 0)
    d = Harness(cfg, step=7)
    assert [d.num_computed() for _ in range(2)] == [B, B]
    d.close()
    e = Harness(run_config(f"--name a {flags}"))         # a new run does not read an old file
    assert os.path.getsize(FILE) == 0 and e.num_computed() == B
    e.close()


def test_a_full_disk_is_reported_before_the_first_step_and_later(run_config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("targets.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match=r"^out/a/target_cache: .* 24 views.* 1e-06 GB"):
            Harness(run_config("--name a"))
    for written_before in ([], [100]):                      # bytes of the record that still fit
        pwrite = mock.Mock(side_effect=[*written_before, OSError(28, "No space left on device")])
        a = Harness(run_config("--name a"))
        a.step()
        with monkeypatch.context() as patch:
            patch.setattr("files.os.pwrite", pwrite)
            with pytest.raises(OSError, match=rf"^{FILE} .*No space left on device"):
                a.step()
        a.close()


def test_the_file_is_closed_before_its_folder_is_removed(run_config, monkeypatch):
    a, rmtree = Harness(run_config("--name a")), shutil.rmtree

    def remove(folder):
        assert a.provider.store.file.closed         # NFS keeps a removed file that is open
        rmtree(folder)

    monkeypatch.setattr("targets.shutil.rmtree", remove)
    a.provider.delete()
    assert not os.path.exists("out/a/target_cache")
    a.close()


@pytest.mark.parametrize("flag", ["--mask.quantile 0.3", "--mask.ratio 0.5", "--target-pooling mean",
                                  "--data.num-views 2"])
def test_a_new_run_does_not_read_the_cache_of_other_settings(run_config, flag):
    a = Harness(run_config("--name a"))
    for _ in range(2):
        a.step()
    a.close()
    size = os.path.getsize(FILE)
    b = Harness(run_config(f"--name a {flag}"))          # a new run
    assert size > 0 and os.path.getsize(FILE) == 0
    for _ in range(2 * CLIPS // B):
        b.assert_equal(b.step()[0])
    b.close()


def test_videos_unreadable_in_the_first_pass_are_computed_later_once(run_config):
    a = Harness(run_config("--name a"))
    training_sample = ClipDataset.training_sample

    def fail(self, index, view_id):
        if index in (3, 17):
            raise UnreadableError(self.annotations[index], OSError("the disk is away"))
        return training_sample(self, index, view_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipDataset, "training_sample", fail)
        assert [a.num_computed() for _ in range(3)] == [B] * 3
    counts = []
    for step in range(3, 9):
        results, computed = a.step()
        counts.append(computed)
        a.assert_equal(results)
        missing = sum(bool({3, 17} & {*b.clip_ids.tolist()}) for b, _ in results)       # micro-batches
        assert computed == 4 * missing * (step < 6)
    assert sum(counts) in (4, 8)
    a.close()


# ---------------------------------------------------------------------------------------------------------------------
# Runs with the cache

SHORT = "--steps 9 --unmasked-steps 0"              # the first pass has 3 steps


@pytest.fixture
def undeleted(monkeypatch):
    """Runs do not delete their target cache."""
    monkeypatch.setattr(TargetProvider, "delete", lambda self: self.run.barrier())


def test_two_ranks_write_one_file_and_train_as_one(run_config, undeleted, monkeypatch):
    train.main(run_config("--name one"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")     # as torchrun sets it if both ranks are on one host
    on_ranks(2, run_config("--name two"))
    assert_close_runs("out/one", "out/two")
    one, two = (open(f"out/{name}/target_cache/targets.bin", "rb").read() for name in ("one", "two"))
    assert one == two and len(one) == CLIPS * (TN * 2 * E + TN // 8 + 4 * E + 4)


def test_ranks_on_several_hosts_cache_nothing(run_config, undeleted):
    on_ranks(2, run_config(f"{SHORT} --name two"))       # LOCAL_WORLD_SIZE is 1
    assert not os.path.exists("out/two/target_cache") and len(log("out/two")) == 9


@pytest.mark.parametrize("step, save_every", [(2, 1), (3, 1), (4, 1), (2, 2), (6, 4), (7, 1)])
def test_a_killed_run_ends_bit_for_bit_as_an_unbroken_one(run_config, undisturbed_run, step, save_every):
    flags, unbroken = f"{SHORT} --save-every {save_every} --name killed", undisturbed_run(f"{SHORT} --name run")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", step)               # before the targets of this step are computed
        with pytest.raises(Killed):
            train.main(run_config(flags))
    train.main(run_config(f"{flags} --resume"))
    assert log("out/killed") == log(unbroken)
    assert_same(weights("out/killed"), weights(unbroken))
    assert not os.path.exists("out/killed/target_cache") and not os.path.exists(f"{unbroken}/target_cache")


# ---------------------------------------------------------------------------------------------------------------------
# Visible ids in fine-tuning

def visible_id_cache(folder, mask="cluster_stm", num_views=2, proportional=False, wrap=None, fp8=False, ranges=(),
                     **options):
    """A VisibleIdCache whose teacher is in the folder, for patches of 4 pixels. options: of MaskConfig."""
    cfg = Config(teacher=str(folder), teacher_fp8=fp8, mask=MaskConfig(mask, ratio=0.6, **options),
                 model=ModelConfig(proportional=proportional, mrm_weight=0.0),
                 data=DataConfig(num_frames=3, image_size=12, num_views=num_views, frames_range=ranges),
                 vit=ViTConfig(patch_size=4, width=6, depth=1, heads=1))
    torch.manual_seed(0)
    return VisibleIdCache(RunContext(cfg, "", torch.device("cpu"), 0, 1), ViT(cfg.vit), wrap)


def finetuning_batch(clip_ids, view_ids, seed=11, budget=0):
    """Clips whose frames are a function of clip and view."""
    video = torch.cat([random_clips(seed=100 * c + v, B=1).video for c, v in zip(clip_ids, view_ids, strict=True)])
    return SimpleNamespace(video=video, clip_ids=torch.tensor(clip_ids), view_ids=torch.tensor(view_ids), seed=seed,
                           budget=budget)


@pytest.mark.parametrize("mask, num_views, proportional, cached", [
    ("cluster_stm", 2, False, True), ("cluster_stm", 2, True, True), ("evs", 1, True, True),
    ("umt", 2, False, False), ("cluster_stm", 0, False, False)])
def test_visible_ids_of_a_fixed_view_are_computed_once(tmp_path, mask, num_views, proportional, cached):
    tiny_siglip().float().save_pretrained(tmp_path)
    cache, teacher = visible_id_cache(tmp_path, mask, num_views, proportional), SigLIP.from_pretrained(tmp_path)
    with mock.patch("targets.compute_visible_ids", wraps=compute_visible_ids) as compute:
        for clip_ids, view_ids, new in (([3, 0, 5], [0, 0, 0], 3), ([5, 3, 1], [0, 0, 0], 1), ([1, 3, 5], [0, 0, 0], 0),
                                        ([0, 5, -6], [0, 1, 0], 2)):        # negative ids: clips of another split
            batch = finetuning_batch(clip_ids, view_ids, seed=len(compute.mock_calls))
            before, result = compute.call_count, cache(batch)
            sizes = [len(call.args[1]) for call in compute.call_args_list[before:]]
            assert sizes == ([new] * (new > 0) if cached else [3])
            expected = compute_visible_ids(teacher, batch.video, cache.mask, 0.6, batch.seed, (3, 3), proportional)
            assert torch.equal(result.visible_ids, expected.visible_ids)
            assert result.token_targets is result.text_embeds is None
            if proportional:
                assert torch.equal(result.token_size, expected.token_size)
            else:
                assert result.token_size is None


@pytest.mark.parametrize("options", [
    dict(tokens=(17,)), dict(tokens=(17, 7)), dict(mask="flux_group_dynamic", features="student_embedding"),
    dict(mask="flux_group_dynamic", features="teacher_embedding", ranges=(2, 3, 1)), dict(mask="tube", tokens=(7,))],
    ids=str)
def test_visible_ids_of_varying_grids_and_budgets_are_computed_each_time(tmp_path, options):
    tiny_siglip().float().save_pretrained(tmp_path)
    cache = visible_id_cache(tmp_path, **options)
    with mock.patch("targets.compute_visible_ids", wraps=compute_visible_ids) as compute:
        for budget in (0, 17, 17):
            batch = finetuning_batch([3, 0, 5], [0, 0, 0], budget=budget)
            targets = cache(batch)
            expected = budget or cache.mask.total(2, 9)
            assert targets.visible_ids.shape == (3, expected) and targets.patch_embeds is None
    assert compute.call_count == (1 if options == dict(tokens=(17,)) else 3)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_the_teacher_of_fine_tuning_is_in_fp8_if_asked(fp8):
    with mock.patch("targets.load_teacher") as load_teacher:
        cache = visible_id_cache("folder", fp8=fp8)
    load_teacher.assert_called_once_with("folder", torch.device("cpu"), fp8, with_tokenizer=False)
    assert cache.teacher is load_teacher.return_value


def test_the_visible_id_cache_uses_the_wrapped_teacher(tmp_path):
    tiny_siglip().float().save_pretrained(tmp_path)
    wrap = mock.Mock(side_effect=lambda model: model)
    cache = visible_id_cache(tmp_path, wrap=wrap)
    assert wrap.call_args.args == (cache.teacher,)
    with pytest.raises(ValueError, match="--teacher.*--finetune-masked.*''"):
        visible_id_cache("")
