"""Grids and budgets that vary: which are allowed, how they are drawn, runs on them, on any ranks, after any kill."""

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers.benchmarks import load_json
from helpers.runs import Killed, assert_close_runs, assert_one_line, assert_same, command, kill, log, on_ranks, weights

import loop
import train
from annotations import read_annotations
from config import Config, query_count
from data import ClipDataset, DataConfig, draw_grid, grids, iterate_micro_batches
from decoders import ModelConfig
from encoders import ViT, ViTConfig
from masking import MaskConfig
from model import ClusterSTM
from runtime import RunContext
from tokenizer import load_tokenizer

# 1 to 6 frames of 12, 16 or 20 pixels with patches of 4: 9, 16 or 25 tokens a frame; the standard grid has 4 x 16.
RANGES = "--data.frames-range 1 6 1 --data.size-range 12 20 4 --data.pool 30 100 "
FLEXIBLE = f"{RANGES}--mask.tokens 24 12 --mask.name flux_group_dynamic --micro-batch 2 --vit.pos-embed relative "
ALLOWED = {(T, size) for T, size in product(range(1, 7), (12, 16, 20)) if 30 <= T * (size // 4) ** 2 <= 100}


def config_of(frames=(), sizes=(), pool=(), patch=8, mask=None, model=None, **data):
    data = {"cache_frames": 64, "num_frames": 8, "image_size": 48, **data}
    return Config(data=DataConfig(frames_range=frames, size_range=sizes, pool=pool, **data),
                  vit=ViTConfig(patch_size=patch), mask=mask or MaskConfig(), model=model or ModelConfig())


# ---------------------------------------------------------------------------------------------------------------------
# Which grids are allowed

def test_the_grids_of_a_run_are_the_pairs_within_the_pool():
    paper = grids(config_of((4, 24, 2), (168, 252, 28), (2048, 4096), 14, image_size=224))          # FluxViT, §4.1
    assert len(paper) == len({*paper}) == 18 and sum(T * (size // 14) ** 2 for T, size in paper) // 18 == 3064
    assert Counter(T for T, _ in paper) == {8: 2, 10: 2, 12: 3, 14: 2, 16: 3, 18: 2, 20: 2, 22: 1, 24: 1}
    assert len(grids(config_of((6, 16, 2), (40, 64, 8), (288, 576)))) == 13
    assert grids(config_of((3, 8, 3))) == [(3, 48), (6, 48)]
    assert grids(config_of(sizes=(24, 64, 32))) == [(8, 24), (8, 56)]
    assert grids(config_of()) == [(8, 48)] and grids(config_of((1, 1, 5), pool=(36, 36))) == [(1, 48)]


@pytest.mark.parametrize("options, message", [
    (dict(frames=(4, 8)), r"frames_range.*FIRST LAST STEP.*\(4, 8\)"),
    (dict(sizes=(64, 40, 8)), r"size_range.*\(64, 40"),
    (dict(frames=(0, 4, 1)), r"frames_range.*\(0, 4, 1\)"), (dict(frames=(1, 4, 0)), r"frames_range.*\(1, 4, 0\)"),
    (dict(frames=(1, 4, 1), pool=(9, 4)), r"pool.*LEAST MOST.*\(9, 4\)"), (dict(pool=(1, 9)), "frames_range or .*pool"),
    (dict(frames=(4, 8, 1), pool=(300, 500)), "144 to 288.*got 300 to 500"),
    (dict(sizes=(40, 64, 4)), "multiple of patch_size 8, got 44"),
    (dict(image_size=50), "multiple of patch_size 8, got 50"),
    (dict(frames=(4, 70, 1)), "cache_frames.*frames_range.*64 and 70"),
    (dict(frames=(1, 4, 1), image_corpora=("a.json=b",)), "frames_range.*at least 2.*got 1"),
    (dict(frames=(4, 8, 1), mask=MaskConfig(tokens=(150, 20))), "at most 144, the tokens of 4 frames of 48.*got 150"),
    (dict(frames=(9, 12, 1), mask=MaskConfig(tokens=(300,))), "at most 288, the tokens of 8 frames of 48.*got 300"),
    (dict(frames=(4, 8, 1), mask=MaskConfig(tokens=(144,))), "at least 2 tokens.*got 0 of 4 frames.*with 144 visible")])
def test_ranges_that_make_no_run_are_refused_with_both_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        grids(config_of(**options))


def test_a_pool_of_the_budget_is_allowed_where_no_hidden_token_is_predicted():
    for model in (ModelConfig(objective="visible"), ModelConfig(mrm_weight=0)):
        assert config_of((4, 8, 1), mask=MaskConfig(tokens=(144,)), model=model).hides_tokens
    assert not config_of(mask=MaskConfig(tokens=(288,))).hides_tokens


def test_bad_grids_on_the_command_line_are_one_line(sprites, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from helpers.runs import argv
    for flags, message in (("--data.size-range 12 20 3", "patch_size 4, got 15"),
                           (f"{RANGES} --mask.tokens 40", "at most 32.*got 40")):
        code, _, err = command("train.py", argv(sprites, flags), capsys)
        assert_one_line("train.py", code, err, message)


# ---------------------------------------------------------------------------------------------------------------------
# How they are drawn

def test_grids_are_drawn_uniformly_and_from_seed_stage_step_and_part_alone():
    allowed = grids(config_of((4, 24, 2), (168, 252, 28), (2048, 4096), 14, image_size=224))
    draws = [draw_grid(allowed, 7, "pretrain", step, part) for step in range(2500) for part in range(8)]
    counts, expected = Counter(draws), 20_000 / len(allowed)
    assert counts.keys() == {*allowed}
    chi2 = sum((count - expected) ** 2 for count in counts.values()) / expected
    assert torch.special.gammaincc(torch.tensor((len(allowed) - 1) / 2), torch.tensor(chi2 / 2)) > 1e-3
    # Neighbouring micro-batches, steps, stages and seeds are independent: equal pairs are as frequent as by chance.
    for a, b in ((draws[:-1], draws[1:]), (draws[:-8], draws[8:]),
                 (draws, [draw_grid(allowed, 7, "unmasked", i // 8, i % 8) for i in range(20_000)]),
                 (draws, [draw_grid(allowed, 8, "pretrain", i // 8, i % 8) for i in range(20_000)])):
        equal = np.mean([x == y for x, y in zip(a, b, strict=True)])
        assert abs(equal - 1 / 18) < 5 * math.sqrt(17 / 18 / 18 / len(a))


@pytest.fixture(scope="module")
def clips(sprites, first_run):
    annotations = read_annotations(f"{sprites}/sprites_train.json", f"{sprites}/videos")
    return annotations, load_tokenizer(f"{first_run}/out/first/tokenizer.json")


def micro_batches(clips, cfg, rank=0, world=1, stage="pretrain", steps=range(6)):
    """The micro-batches of 2 of 8 clips a step, on one rank."""
    run = RunContext(cfg, "", torch.device("cpu"), rank, world)
    return [b for group in iterate_micro_batches(run, ClipDataset(clips[0], cfg.data, cfg.seed), clips[1], stage, 8, 2,
                                                 steps.start, steps.stop) for b in group]


@pytest.mark.parametrize("stage, workers", [("teacher", 0), ("text", 0), ("pretrain", 1), ("unmasked", 0)])
def test_clips_have_the_grid_and_budget_that_their_micro_batch_draws(clips, stage, workers, tmp_path):
    cfg = config_of((1, 6, 1), (12, 20, 4), (30, 100), 4, MaskConfig(tokens=(24, 12)), num_frames=4, image_size=16,
                    cache_frames=8, frame_cache=False, num_workers=workers)
    assert {*grids(cfg)} == ALLOWED
    all_batches = micro_batches(clips, cfg, stage=stage)
    shapes = [(b.video.shape[1], b.video.shape[3]) for b in all_batches]
    assert all(b.video.shape[2:] == (3, size, size) for b, (_, size) in zip(all_batches, shapes, strict=True))
    if stage == "text":
        assert {*shapes} == {(4, 16)}
    else:           # the stage of the teacher may have another number of micro-batches on other ranks
        parts = [(step, 0 if stage == "teacher" else part) for step in range(6) for part in range(4)]
        assert shapes == [draw_grid(grids(cfg), cfg.seed, stage, *part) for part in parts] and len({*shapes}) > 3
    assert {b.budget for b in all_batches} == {24, 12}
    no_ranges = replace(cfg.data, frames_range=(), size_range=(), pool=())
    fixed = micro_batches(clips, replace(cfg, data=no_ranges), stage=stage)
    for world in (2, 4):
        ranks = [micro_batches(clips, cfg, rank, world, stage, range(2, 6)) for rank in range(world)]
        n = 4 // world
        joined = [b for step in range(4) for rank in ranks for b in rank[step * n:step * n + n]]
        for a, b, c in zip(all_batches[8:], joined, fixed[8:], strict=True):
            assert torch.equal(a.video, b.video) and a.budget == b.budget and a.seed == b.seed == c.seed
            assert torch.equal(a.clip_ids, c.clip_ids) and a.captions == c.captions      # the clips of a fixed grid


def test_without_ranges_nothing_is_drawn(clips, monkeypatch):
    monkeypatch.setattr("data.draw", None)
    cfg = config_of(num_frames=4, image_size=16, patch=4, frame_cache=False)
    assert {(b.video.shape[1], b.budget) for b in micro_batches(clips, cfg, steps=range(1))} == {(4, 0)}


# ---------------------------------------------------------------------------------------------------------------------
# Runs

@pytest.fixture(scope="module")
def flexible_run(sprites, first_run, tmp_path_factory):
    """A flexible run of 20 + 6 steps on one rank -> its folder."""
    from helpers.runs import config, with_weights
    folder = tmp_path_factory.mktemp("flexible")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(config(sprites, with_weights(first_run, f"{FLEXIBLE}--name one")))
    return str(folder / "out" / "one")


def test_a_flexible_run_trains_on_all_grids_and_is_the_same_on_any_ranks(run_config, flexible_run):
    assert len(log(flexible_run)) == 26 and all("mrm" in row for (stage, _), row in log(flexible_run).items()
                                                if stage == "pretrain")
    for world in (2, 4):
        on_ranks(world, run_config(f"{FLEXIBLE}--name on{world}"))
        assert_close_runs(f"out/on{world}", flexible_run)


@pytest.mark.parametrize("stage, step", [("pretrain", 1), ("pretrain", 6), ("pretrain", 19), ("before_unmasked", None),
                                         ("unmasked", 3)])
def test_a_flexible_run_that_is_killed_goes_on_bit_for_bit(run_config, flexible_run, stage, step):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch, stage, step)
        train.main(run_config(f"{FLEXIBLE}--name one"))
    train.main(run_config(f"{FLEXIBLE}--name one --resume"))
    assert_same(weights("out/one"), weights(flexible_run))
    assert log("out/one") == log(flexible_run)


@pytest.mark.parametrize("flags", [
    "--mask.features student_embedding", "--mask.features teacher_embedding",
    "--mask.name cluster_stm --model.proportional", "--model.decoder joint --mask.name umt",
    "--activation-checkpointing --model.pooling tokens --vit.pos-embed learned",
    "--model.objective visible --mask.tokens 30"])
def test_flexible_runs_of_other_kinds_train(run_config, flags):
    shapes, forward = set(), loop.forward_backward

    def spy(net, batches, make_inputs, loss_weights):
        def inputs(batches):
            arguments = make_inputs(batches)
            shapes.update((b.video.shape[1:], t and t.visible_ids.shape[1] == b.budget) for b, t, _ in arguments)
            return arguments
        return forward(net, batches, inputs, loss_weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "forward_backward", spy)
        train.main(run_config(f"{FLEXIBLE}--name a --steps 4 --unmasked-steps 1 {flags}"))
    assert {seen for _, seen in shapes} == {True, None} and len({shape for shape, _ in shapes}) > 4


def test_a_toy_teacher_is_trained_at_the_sizes_of_the_run(sprites, tmp_path, monkeypatch):
    from helpers.runs import config
    monkeypatch.chdir(tmp_path)
    sizes, forward = [], loop.forward_backward

    def spy(net, batches, make_inputs, loss_weights):
        sizes.extend(b.video.shape[-1] for b in batches)
        return forward(net, batches, make_inputs, loss_weights)

    monkeypatch.setattr(loop, "forward_backward", spy)
    train.main(config(sprites, f"{RANGES}--stage teacher --name a --toy.steps 12"))
    assert {*sizes} == {12, 16, 20} and len(sizes) == 12


def test_one_budget_of_a_fixed_grid_is_cached_and_varying_ones_are_not(run_config, capsys):
    visible, forward = set(), ClusterSTM.forward

    def spy(self, batch, targets, stats):
        visible.add(targets.visible_ids.shape[1])
        return forward(self, batch, targets, stats)

    for name in ("flux_group_dynamic", "random_frame"):         # the second is drawn again in the second epoch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClusterSTM, "forward", spy)
            train.main(run_config(f"--name {name} --mask.tokens 18 --mask.name {name} --unmasked-steps 0 --steps 8"))
        assert "not cached" not in capsys.readouterr().out and visible == {18}
    for name, flags, reason in (("b", RANGES, "grids of clips vary"), ("c", "--mask.tokens 18 9", "several budgets"),
                                ("d", "--mask.features student_embedding", "student's embedding")):
        train.main(run_config(f"--name {name} --unmasked-steps 0 --steps 2 {flags} --data.num-views 1 --batch 24"))
        assert reason in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What is resolved from the ranges

def test_budgets_are_drawn_independently_of_grids_and_stages(clips, sprites):
    cfg = config_of((3, 4, 1), (12, 16, 4), (), 4, MaskConfig(tokens=(24, 12)), num_frames=4, image_size=16,
                    cache_frames=8, train_file=f"{sprites}/sprites_train.json")
    drawn = [[((b.video.shape[1], b.video.shape[3]), b.budget) for b in micro_batches(clips, cfg, stage=stage,
                                                                                      steps=range(20))]
             for stage in ("pretrain", "unmasked")]
    for pairs in drawn:
        assert {*pairs} == {*product(grids(cfg), (24, 12))}
        assert 25 < sum(budget == 24 for _, budget in pairs) < 55
    assert 15 < sum(a[1] == b[1] for a, b in zip(*drawn, strict=True)) < 65


def test_the_frame_cache_holds_the_largest_clips(clips, tmp_path):
    cfg = config_of((1, 6, 1), (12, 24, 12), (), 4, num_frames=4, image_size=16, cache_frames=6).data
    dataset = ClipDataset(clips[0], cfg, 0, cache_folder=str(tmp_path))
    assert dataset.cache[clips[0][0].video].shape == [3, 24, 24] and (cfg.max_frames, cfg.max_size) == (6, 24)
    smaller = replace(cfg, num_frames=6, image_size=32, frames_range=(1, 2, 1))
    assert (smaller.max_frames, smaller.max_size) == (6, 32)
    with pytest.raises(ValueError, match="cache_frames.*6 and 7"):
        replace(smaller, num_frames=7)


def test_settings_are_resolved_from_grids_and_budgets(flexible_run, run_config):
    hidden = sorted(T * (size // 4) ** 2 - S for T, size in ALLOWED for S in (24, 12))
    median = (hidden[(len(hidden) - 1) // 2] + hidden[len(hidden) // 2]) / 2
    resolved = load_json(f"{flexible_run}/config.json")
    assert resolved["vit"]["grid"] == [4, 4, 4] and resolved["model"]["decoder_queries"] == round(0.1 * median) > 1
    assert log(flexible_run)["pretrain", 1]["mrm"] < 1e5                # 1e7 if one token of a clip is predicted
    budgets = run_config("--mask.tokens 40 8 --mask.name evs")
    assert query_count(budgets) == round(0.1 * ((64 - 40) + (64 - 8)) / 2) and query_count(run_config("")) == 0
    assert query_count(run_config("--mask.tokens 40 30")) == 3 and query_count(run_config("--mask.tokens 61 60")) == 2
    # A later run keeps the positions of the student it begins with.
    flags = f"--init-from {flexible_run} --vit.pos-embed relative --data.num-frames 3 --steps 1 --unmasked-steps 0"
    train.main(run_config(f"--name later {flags}"))
    assert load_json("out/later/config.json")["vit"]["grid"] == [4, 4, 4]
    with pytest.raises(ValueError, match="vit.pos_embed must be '3d'.*'relative'"):
        train.main(run_config(f"--name other --init-from {flexible_run} --steps 1"))


def test_a_learned_table_holds_the_largest_clips(run_config):
    flags = f"{RANGES}--vit.pos-embed learned --data.num-frames 7 --steps 1 --unmasked-steps 0"
    train.main(run_config(f"--name a {flags}"))
    assert load_json("out/a/config.json")["vit"]["grid"] == [7, 5, 5]
    for grid in ("6 5 5", "7 4 5"):
        with pytest.raises(ValueError, match=r"vit.grid must be at least \(7, 5, 5\)"):
            train.main(run_config(f"--name b {flags} --vit.grid {grid}"))


def test_budgets_that_hide_all_or_some_are_told_apart():
    with pytest.raises(ValueError, match="got 0 of 8 frames of 48 x 48 pixels with 288 visible"):
        config_of(mask=MaskConfig(tokens=(288, 144)))
    with pytest.raises(ValueError, match="at least 2 tokens.*got 1 of 8 frames"):
        config_of(mask=MaskConfig(tokens=(287,)))
    assert MaskConfig(tokens=(17, 7)).total(2, 9) == 17 and MaskConfig(ratio=0.5).total(3, 9) == 15


@pytest.mark.parametrize("flags, dynamic", [("", False), (RANGES, None), ("--mask.tokens 20 10", None),
                                            ("--mask.tokens 20", False)])
def test_layers_are_compiled_for_all_shapes_where_shapes_vary(run_config, flags, dynamic):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: calls.append(options["dynamic"]) or f)
        train.wrap_layers(ViT(ViTConfig(patch_size=4, width=8, depth=2, heads=1)), run_config(f"{flags} --compile"))
    assert {*calls} == {dynamic} and len(calls) == 2
