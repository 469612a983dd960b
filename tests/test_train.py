"""Train whole runs: on one and several ranks, killed and resumed, stage by stage, with settings that must fail."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.processes import assert_same_run, num_logged, wait_until
from helpers.runs import (
    FIRST_RUN_FLAGS,
    LOSSES,
    ROOT,
    Killed,
    argv,
    assert_close_runs,
    assert_close_weights,
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
    write_rows,
)

import logs
import loop
import train
from annotations import read_annotations
from data import ClipDataset, DataConfig
from encoders import Bert
from files import config_from_dict, read_json
from model import ClusterSTM, ModelConfig
from runtime import MAY_CHANGE_ON_RESUME, RunContext, list_checkpoints
from teacher import SigLIP
from tokenizer import load_tokenizer

RUN_FILES = {"config.json", "command.txt", "lock", "log.jsonl", "before_unmasked", "model.safetensors",
             "run_state.json", "checkpoints", "tokenizer.json"}


# ---------------------------------------------------------------------------------------------------------------------
# One process or several

def test_torchrun_with_two_ranks_trains_the_model_of_one_process(run_config, start_process):
    train.main(run_config("--name one"))                                    # two micro-batches a step
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    process = start_process("--name two", (*torchrun, f"{ROOT}/train.py"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert_close_runs("out/one", "out/two")
    assert out.count("out/two: trained") == 1                               # only rank 0 prints


def test_one_two_and_four_processes_train_the_same_model(run_config):
    flags = "--micro-batch 2 --unmasked-batch 8 --data.num-views 0 --mask.name umt --name"
    train.main(run_config(f"{flags} one"))
    for world, name in ((2, "two"), (4, "four")):
        on_ranks(world, run_config(f"{flags} {name}"))
        assert_close_runs("out/one", f"out/{name}")


def test_mrm_and_vtc_do_not_depend_on_the_micro_batch_size(run_config):
    flags = """--steps 8 --unmasked-steps 0 --model.vtm-weight 0 --model.mlm-weight 0 --text.dropout 0 --vit.drop-path 0
               --model.decoder-query-ratio 1 --name"""
    train.main(run_config(f"{flags} one --micro-batch 8"))
    train.main(run_config(f"{flags} two --micro-batch 2"))
    on_ranks(2, run_config(f"{flags} three --micro-batch 4"))
    for folder in ("out/two", "out/three"):
        rows = log(folder)
        for key, row in log("out/one").items():         # the samples of vtm and mlm do depend on the micro-batch
            expected, actual = ({k: x[k] for k in ("mrm", "vtc", "grad_norm", "lr")} for x in (row, rows[key]))
            assert expected == pytest.approx(actual, rel=1e-3), (folder, key)


@pytest.mark.parametrize("loss", ["mrm", "vtm", "mlm"])
def test_two_processes_train_with_one_loss_as_one_does(run_config, loss):
    """The parameters that it does not reach are frozen, or DDP would wait for their gradients."""
    flags = " ".join(f"--model.{name}-weight 0" for name in ("mrm", "vtc", "vtm", "mlm") if name != loss)
    flags += f" --steps 2 --unmasked-steps {2 * (loss != 'mrm')} --micro-batch 4 --name"
    train.main(run_config(f"{flags} one"))
    on_ranks(2, run_config(f"{flags} two"))
    one, two = log("out/one"), log("out/two")
    assert one.keys() == two.keys() and {*two["pretrain", 2]} == {loss, "grad_norm", "lr"}
    for key, row in one.items():
        assert two[key] == pytest.approx(row, rel=1e-5), key


def test_two_processes_train_the_same_toy_models_as_one(sprites, first_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_ranks(2, config(sprites, "--name two --steps 2 --unmasked-steps 0"))
    one, two = log(f"{first_run}/out/first/teacher"), log("out/two/teacher")
    assert Counter(stage for stage, _ in two) == {"teacher": 6} and one.keys() == two.keys()
    for step in one:
        assert one[step] == pytest.approx(two[step], rel=1e-4)
    one, two = weights(f"{first_run}/out/first/teacher"), weights("out/two/teacher")
    compared = [name for name in one if not re.search("k_proj.bias|in_proj_bias", name)]
    assert_close_weights(*({name: w[name] for name in compared} for w in (one, two)), atol=1e-4)
    assert Counter(stage for stage, _ in log("out/two/text")) == {"text": 6}
    assert weights("out/two").keys() == weights("out/two/before_unmasked").keys()


def test_two_processes_train_without_masked_tokens(run_config):
    on_ranks(2, run_config("--name two --steps 2 --unmasked-steps 1 --mask.ratio 0"))      # so without MRM and decoder
    assert all("mrm" not in row for row in log("out/two").values())


def read_micro_batches(cfg, rank, world, step=0):
    """Read the micro-batches of a rank -> (step, clip ids, view ids, seed) of each."""
    run = RunContext(cfg, "", torch.device("cpu"), rank, world)
    clips = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
    tokenizer = load_tokenizer(os.path.join(os.path.dirname(cfg.data.train_file), "tokenizer.json"))
    groups = loop.iterate_micro_batches(run, clips, tokenizer, "pretrain", 8, 2, step, 5)
    return [(step + i, b.clip_ids.tolist(), b.view_ids.tolist(), b.seed)
            for i, group in enumerate(groups) for b in group]


@pytest.mark.parametrize("flags", ["--data.num-views 0", "--data.num-views 2",
                                   "--data.num-views 2 --data.num-workers 1"])
def test_sample_n_is_the_same_on_any_number_of_ranks_and_after_any_step(run_config, flags):
    cfg = run_config(flags)
    one_rank = read_micro_batches(cfg, 0, 1)
    clips = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
    samples = [clips[n] for n in range(40)]
    assert [c for _, ids, _, _ in one_rank for c in ids] == [s.clip_id for s in samples]
    assert [v for _, _, views, _ in one_rank for v in views] == [s.view_id for s in samples]
    assert len({seed for *_, seed in one_rank}) == len(one_rank)            # each micro-batch has its own seed
    for world in (2, 4):
        by_rank = [read_micro_batches(cfg, rank, world) for rank in range(world)]
        assert sum(by_rank, []) != one_rank and sorted(sum(by_rank, [])) == sorted(one_rank)
        by_step = [row for step in range(5) for rows in by_rank for row in rows if row[0] == step]
        assert by_step == one_rank                                          # in a step, rank 0 has the first samples
    assert read_micro_batches(cfg, 0, 1, step=3) == [row for row in one_rank if row[0] >= 3]
    other_seed = read_micro_batches(replace(cfg, seed=cfg.seed + 1), 0, 1)
    assert not {seed for *_, seed in other_seed} & {seed for *_, seed in one_rank}


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed

# Teacher targets are cached, or computed at each step.
CACHED, COMPUTED = "--name run --data.num-views 1", "--name run --data.num-views 0"
RANDOM, PROPORTIONAL = f"{CACHED} --mask.name random_frame", f"{CACHED} --model.proportional"


@pytest.mark.parametrize("stage, step, flags", [
    ("pretrain", 10, CACHED),                   # two steps after a checkpoint
    ("pretrain", 8, COMPUTED),                  # just after a checkpoint
    ("pretrain", 2, CACHED),                    # before any checkpoint
    ("pretrain", 13, RANDOM),
    ("pretrain", 10, PROPORTIONAL),
    ("before_unmasked", None, CACHED),          # between the stages
    ("unmasked", 1, COMPUTED),                  # before the first checkpoint of the stage
    ("unmasked", 5, CACHED),
    ("unmasked", 4, COMPUTED),
    ("unmasked", None, CACHED),                 # after the last step, before the model is written
])
def test_a_killed_and_resumed_run_equals_an_unbroken_one_bit_for_bit(run_config, undisturbed_run, stage, step, flags):
    expected = undisturbed_run(flags)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, step)
        with pytest.raises(Killed):
            train.main(run_config(f"{flags} --name killed"))
    assert not os.path.exists("out/killed/model.safetensors")
    if (stage, step) != ("pretrain", 2):                # a new run must not overwrite checkpoints
        with pytest.raises(ValueError, match="out/killed/.*pt .*--resume"):
            train.main(run_config(f"{flags} --name killed"))
    train.main(run_config(f"{flags} --name killed --resume --save-every 5"))
    assert_same(weights("out/killed"), weights(expected))
    assert_same(weights("out/killed/before_unmasked"), weights(f"{expected}/before_unmasked"))
    assert log("out/killed") == log(expected)
    assert set(os.listdir("out/killed")) == RUN_FILES == set(os.listdir(expected))
    assert sorted(os.listdir(f"{expected}/checkpoints")) == ["unmasked-0000004.pt", "unmasked-0000006.pt"]


def test_a_run_ended_by_sigkill_resumes_bit_for_bit(run_config, undisturbed_run, start_process):
    process = start_process(CACHED)
    wait_until(lambda: list_checkpoints("out/run") and num_logged() > 5 or process.poll() is not None)
    process.kill()
    _, err = process.communicate(timeout=90)
    assert not os.path.exists("out/run/model.safetensors") and 4 < num_logged() < 26, err
    with open("out/run/log.jsonl", "a") as f:
        f.write('{"stage": "pretr')                     # a power failure can leave half a line
    train.main(run_config(f"{CACHED} --resume"))
    assert_same_run(undisturbed_run(CACHED))


def test_a_half_written_checkpoint_leaves_the_one_before(run_config, undisturbed_run, monkeypatch):
    torch_save, learning_rate, saves, steps = torch.save, loop.learning_rate, [], []

    def save(state, f):
        saves.append(f)
        if len(saves) == 3:                             # the checkpoint of step 12
            f.write(b"half of it")
            raise Killed
        torch_save(state, f)

    def record_step(step, *args):
        steps.append(step)
        return learning_rate(step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(Killed):
            train.main(run_config(f"{COMPUTED} --name killed"))
    assert sorted(os.listdir("out/killed/checkpoints")) == ["pretrain-0000004.pt", "pretrain-0000008.pt"]
    monkeypatch.setattr(loop, "learning_rate", record_step)
    train.main(run_config(f"{COMPUTED} --name killed --resume"))
    assert steps[::2] == [*range(8, 20), *range(6)]     # a step sets the rate of two groups of parameters
    assert_same(weights("out/killed"), weights(undisturbed_run(COMPUTED)))


@pytest.mark.parametrize("stage", ["teacher", "text"])
def test_a_killed_toy_stage_resumes_in_a_run_of_all_stages(sprites, first_run, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    flags = "--name killed --steps 4 --unmasked-steps 2"
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, 5)
        with pytest.raises(Killed):
            train.main(config(sprites, f"{flags} --stage {stage}"))
    train.main(config(sprites, f"{flags} --resume"))
    for part in ("teacher", "text", "."):
        assert_same(weights(f"out/killed/{part}"), weights(f"{first_run}/out/first/{part}"))
        assert log(f"out/killed/{part}") == log(f"{first_run}/out/first/{part}")


def test_a_finished_run_is_neither_trained_again_nor_overwritten(run_config):
    cfg = run_config("--name finished --steps 2 --unmasked-steps 1")
    train.main(cfg)
    before, log_text = weights("out/finished"), open("out/finished/log.jsonl").read()
    with pytest.raises(ValueError, match="out/finished/checkpoints/unmasked-0000001.pt"):
        train.main(cfg)
    train.main(replace(cfg, resume=True))
    assert_same(weights("out/finished"), before)
    assert open("out/finished/log.jsonl").read() == log_text
    shutil.rmtree("out/finished/checkpoints")           # a model without checkpoints is not overwritten either
    with pytest.raises(ValueError, match="out/finished/+model.safetensors"):
        train.main(run_config("--name finished"))


CHANGES = [("lr", "--lr 1e-2", "0.002", "0.01"), ("seed", "--seed 4", "3", "4"), ("steps", "--steps 21", "20", "21"),
           ("data.num_frames", "--data.num-frames 3", "4", "3"), ("text.dropout", "--text.dropout 0.1", "0.2", "0.1"),
           ("mask.name", "--mask.name tube", "'cluster_stm'", "'tube'"), ("batch", "--batch 4", "8", "4")]


@pytest.mark.parametrize("stage", ["pretrain", "unmasked"])
def test_resume_names_a_setting_that_must_not_change(run_config, sprites, monkeypatch, stage):
    monkeypatch.setattr(train, "import_library", Mock())
    monkeypatch.setitem(logs.WRITERS, "wandb", Mock())
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, 4)
        with pytest.raises(Killed):
            train.main(run_config("--name killed"))
    for setting, flag, before, now in CHANGES:
        with pytest.raises(ValueError) as error:
            train.main(run_config(f"--name killed --resume {flag}"))
        message = str(error.value)
        assert message.startswith("out/killed/") and f" {setting} " in message
        assert before in message and message.endswith(now)
    allowed = f"""--log wandb --val-every 5 --data.val-file {sprites}/sprites_val.json --data.val-root {sprites}/videos
                 --device cpu --log-every 3 --save-every 7 --save-minutes 9 --keep-checkpoints 3 --max-skipped-steps 1
                 --no-compile --activation-checkpointing --data.num-workers 1 --data.no-frame-cache
                 --data.no-resize-on-device --data.max-unreadable 0.2"""
    for name in {*MAY_CHANGE_ON_RESUME} - {"resume", "stage"}:
        assert f"--{name}".replace("_", "-") in allowed.replace("no-", "")
    train.main(run_config(f"--name killed --resume {allowed}"))
    assert os.path.exists("out/killed/model.safetensors")


@pytest.mark.parametrize("stage", ["teacher", "text"])
def test_resume_names_a_setting_of_a_toy_stage_that_changed(sprites, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    flags = f"--name toy --toy.steps 2 --toy.text-steps 2 --save-every 1 --stage {stage}"
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, 1)
        with pytest.raises(Killed):
            train.main(config(sprites, flags))
    for step in (1, 2):                                                     # killed, then finished
        assert list_checkpoints(f"out/toy/{stage}")[0].endswith(f"-{step:07d}.pt")
        with pytest.raises(ValueError, match=f"^out/toy/{stage}/run_state.json: weight_decay must be 0.02 .* got 0.1$"):
            train.main(config(sprites, f"{flags} --resume --weight-decay 0.1"))
        train.main(config(sprites, f"{flags} --resume"))


# ---------------------------------------------------------------------------------------------------------------------
# Stages

def test_twenty_steps_lower_every_loss(undisturbed_run):
    rows = [row for (stage, _), row in sorted(log(undisturbed_run(CACHED)).items()) if stage == "pretrain"]
    for name in ("mrm", "mlm", "vtc"):
        values = [row[name] for row in rows]
        assert np.mean(values[-5:]) < np.mean(values[:5]), name
    assert all(0 < row["grad_norm"] < np.inf and set(row) == {*LOSSES[1:5], "grad_norm", "lr"} for row in rows)
    unmasked = [row for (stage, _), row in log(undisturbed_run(CACHED)).items() if stage == "unmasked"]
    assert len(unmasked) == 6 and all(set(row) == {"vtc", "vtm", "mlm", "grad_norm", "lr"} for row in unmasked)
    assert max(row["lr"] for row in unmasked) == pytest.approx(0.2 * max(row["lr"] for row in rows))


def test_a_run_writes_all_files_that_later_runs_need(sprites, first_run):
    out = f"{first_run}/out/first"
    assert set(os.listdir(out)) == RUN_FILES | {"teacher", "text"}
    expected = config(sprites, FIRST_RUN_FLAGS)
    tokenizer = load_tokenizer(f"{out}/tokenizer.json")
    text = replace(expected.text, vocab_size=tokenizer.get_vocab_size(), mask_token_id=tokenizer.token_to_id("[MASK]"))
    expected = replace(expected, text=text, model=replace(expected.model, target_dim=16),
                       teacher="out/first/teacher")                         # eval.py needs it for masks
    for folder in (out, f"{out}/before_unmasked"):
        assert read_json(f"{folder}/config.json") == json.loads(json.dumps(asdict(expected)))
        assert_same(dict(ClusterSTM.from_pretrained(folder).state_dict()), weights(folder))
    after, before = weights(out), weights(f"{out}/before_unmasked")
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    assert unchanged == {name for name in after if name.startswith("decoder.")}     # it is not trained then
    teacher = SigLIP.from_pretrained(f"{out}/teacher")
    assert teacher.tokenize(["a red square"]).shape == (1, 24) and teacher.cfg.vision_config.hidden_size == 16
    assert load_tokenizer(f"{out}/text/tokenizer.json").get_vocab_size() == expected.text.vocab_size
    assert Bert.from_pretrained(f"{out}/text").cfg.fusion_layers == 1


def test_stages_run_one_by_one_equal_a_run_of_all_stages(sprites, first_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--name parts --steps 4 --unmasked-steps 2"
    assert isinstance(train.main(config(sprites, f"{flags} --stage teacher")), SigLIP)
    assert not os.path.exists("out/parts/text") and not os.path.exists("out/parts/model.safetensors")
    with pytest.raises(ValueError, match="out/parts/teacher/checkpoints/teacher-0000006.pt"):
        train.main(config(sprites, f"{flags} --stage teacher"))
    assert isinstance(train.main(config(sprites, f"{flags} --stage text")), Bert)
    assert isinstance(train.main(config(sprites, f"{flags} --resume")), ClusterSTM)
    for part in ("teacher", "text", "before_unmasked", "."):
        assert_same(weights(f"out/parts/{part}"), weights(f"{first_run}/out/first/{part}"))
    with open("out/parts/log.jsonl") as f, open(f"{first_run}/out/first/log.jsonl") as g:
        assert len(f.readlines()) == len(g.readlines()) == 6


def test_the_text_encoder_can_be_trained_before_the_teacher_is_chosen(sprites, first_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--name parts --steps 4 --unmasked-steps 2"
    train.main(config(sprites, f"{flags} --stage text"))
    train.main(config(sprites, f"{flags} --resume --teacher {first_run}/out/first/teacher"))
    assert_same(weights("out/parts"), weights(f"{first_run}/out/first"))


def test_a_run_starts_from_the_given_teacher_and_text_encoder(run_config, first_run):
    before = weights(f"{first_run}/out/first/teacher")
    model = train.main(run_config("--steps 1 --unmasked-steps 0"))          # the run is named after sprites_train.json
    assert not os.path.exists("out/sprites/teacher") and not os.path.exists("out/sprites/text")
    assert_same(weights(f"{first_run}/out/first/teacher"), before)
    text = weights(f"{first_run}/out/first/text")                           # a step of lr 2e-3 moves a weight by 2e-3
    moved = [(model.state_dict()[f"bert.{k}"] - v).abs().max() for k, v in text.items() if "crossattention" not in k]
    assert 0 < max(moved) <= 2.1e-3
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert_same(weights("out/sprites"), weights("out/sprites/before_unmasked"))      # no unmasked stage


def test_each_stage_has_its_own_batch_size(sprites, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    iterate_micro_batches, sizes = loop.iterate_micro_batches, {}

    def record_sizes(run, clips, tokenizer, stage, batch, micro_batch, step, steps):
        sizes[stage] = batch, micro_batch, steps
        for group in iterate_micro_batches(run, clips, tokenizer, stage, batch, micro_batch, step, steps):
            assert len(group) == batch // micro_batch and all(len(b.clip_ids) == micro_batch for b in group)
            yield group

    monkeypatch.setattr(loop, "iterate_micro_batches", record_sizes)
    train.main(config(sprites, "--name a --steps 1 --unmasked-steps 2 --unmasked-batch 16 --toy.batch 6 "
                               "--toy.steps 3 --toy.text-batch 5 --toy.text-steps 4"))
    assert sizes == {"teacher": (6, 6, 3), "text": (5, 5, 4), "pretrain": (8, 4, 1), "unmasked": (16, 4, 2)}


def test_unmasked_batch_0_is_the_batch_of_pretraining(run_config):
    for batch in (0, 8):
        train.main(run_config(f"--name {batch} --steps 1 --unmasked-steps 1 --unmasked-batch {batch}"))
    assert_same(weights("out/0"), weights("out/8"))


def test_without_a_tokenizer_one_is_trained_on_the_captions(run_config, sprites, tmp_path):
    train.main(run_config("--name a --steps 1 --unmasked-steps 0"))
    vocab = load_tokenizer(f"{sprites}/tokenizer.json").get_vocab()
    assert load_tokenizer("out/a/tokenizer.json").get_vocab() == vocab
    os.rename(f"{sprites}/tokenizer.json", f"{sprites}/hidden.json")
    try:
        train.main(config(sprites, "--stage text --toy.text-steps 1 --name captions"))
    finally:
        os.rename(f"{sprites}/hidden.json", f"{sprites}/tokenizer.json")
    caption_vocab = load_tokenizer("out/captions/tokenizer.json").get_vocab()
    assert caption_vocab.items() < vocab.items()                            # the data's has words of questions too


def test_each_loss_has_a_weight_of_its_own():
    cfg = ModelConfig(mrm_weight=2, vtc_weight=3, vtm_weight=4, mlm_weight=5)
    assert train.loss_weights(cfg) == {"mrm": 2, "align": 2, "pixels": 2, "vtc": 3, "vtm": 4, "mlm": 5,
                                       "distill": 1}


def test_clips_per_second_are_of_the_steps_of_a_row_without_pauses(run_config, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: seconds[0])

    def load():
        while True:
            seconds[0] += 1
            yield []

    run, loader = RunContext(run_config(), ".", torch.device("cpu"), 0, 1), load()
    train_log = loop.TrainLog(run, loop.Stage("pretrain", None, range(16), None, 8, 9, 1.0, None), 4)
    for step, step_time in ((6, 3), (7, 1)):
        train_log.wait_for(loader)
        seconds[0] += step_time
        with train_log.paused():
            seconds[0] += 100
        train_log.write(step, {"vtc": torch.ones(())}, torch.ones(()), 1.0, {})
    # 16 clips in 4 s, then 8 in 2 s; a second of each was spent on waiting.
    rows = read_rows("log.jsonl")
    assert [(row["clips/s"], row["data_wait"]) for row in rows] == [(4, 0.25), (4, 0.5)]
    assert [(row["seconds"], row["epoch"]) for row in rows] == [(104, 3), (206, 3.5)]


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_are_written_last_and_all_ranks_wait_for_them(run_config, tmp_path, monkeypatch, rank):
    events, tokenizer = [], load_tokenizer(f"{os.path.dirname(run_config().data.train_file)}/tokenizer.json")
    for name in ("atomic_write_text", "write_json"):
        monkeypatch.setattr(train, name, lambda path, _: events.append(os.path.basename(path)))
    monkeypatch.setattr(train, "save_weights", lambda *_: events.append("weights"))
    monkeypatch.setattr(RunContext, "barrier", lambda _: events.append("barrier"))
    train.save_model(RunContext(run_config(), "", torch.device("cpu"), rank, 2), None, tokenizer, str(tmp_path))
    assert events == ["config.json", "tokenizer.json", "weights"] * (rank == 0) + ["barrier"]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    rate = [loop.learning_rate(s, 200, 0.1, 3.0) for s in range(200)]
    assert rate[0] == pytest.approx(3 * (0.01 + 0.99 / 20)) and rate[19] == rate[20] == 3.0 == max(rate)
    assert rate[:20] == sorted(rate[:20]) and rate[20:] == sorted(rate[20:], reverse=True)
    assert rate[110] == pytest.approx(3 * (0.01 + 0.99 / 2)) and 0.03 < rate[-1] < 0.031
    assert loop.learning_rate(0, 5, 0.0, 1.0) == 1.0 and loop.learning_rate(0, 1, 0.1, 1.0) == 1.0
    assert all(0 < loop.learning_rate(s, 3, 1.0, 1.0) <= 1 for s in range(3))


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e9, 0.0])
def test_clipping_in_the_optimizers_kernel_equals_clipping_before_it(max_norm):
    """
    Weights after each of six steps, beside clip_grad_norm_ in fp64 and in fp32. The third and sixth are skipped, the
    gradients of the fourth are 0. Before the second, ours loads its state as a resumed run does.
    """
    shapes, runs = [(40, 30), (7,), ()], []
    for kind in ("ours", "fp32", "fp64"):
        g, weights = torch.Generator().manual_seed(0), []
        params = [torch.nn.Parameter(torch.randn(shape, generator=g).to(torch.float64 if kind == "fp64" else
                                                                        torch.float32)) for shape in shapes]
        optimizer = torch.optim.AdamW(params, 1e-2, fused=True, weight_decay=0.1)
        for step in range(6):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=g) * 10.0 ** (step - 2) * (step != 3)).to(p.dtype)
            if step in (2, 5):
                params[1].grad[3] = torch.inf if step == 2 else torch.nan
            if step == 1 and kind == "ours":
                state = optimizer.state_dict()
                assert set(state) == {"state", "param_groups"} and not {"grad_scale", "found_inf"} & {
                    *state["param_groups"][0]}
                optimizer = torch.optim.AdamW(params, 1e-2, fused=True, weight_decay=0.1)
                optimizer.load_state_dict(state)
            if kind == "ours":
                norm = torch.nn.utils.get_total_norm([p.grad for p in params])
                loop.update_weights(optimizer, norm, max_norm, (~norm.isfinite()).float())
                assert all(p.grad is None for p in params)
            elif torch.nn.utils.clip_grad_norm_(params, max_norm or torch.inf).isfinite():
                optimizer.step()
            weights.append([p.detach().double().clone() for p in params])
        assert all(optimizer.state[p]["step"] == 4 for p in params)
        runs.append(weights)
    for ours, fp32, fp64 in zip(*runs, strict=True):
        for x, y, exact in zip(ours, fp32, fp64, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-7, atol=2e-8)          # a step moves a weight by up to 1e-2
            torch.testing.assert_close(x, exact, rtol=1e-6, atol=1e-7)
    for before, skipped in ((1, 2), (4, 5)):
        assert all(torch.equal(a, b) for a, b in zip(runs[0][before], runs[0][skipped], strict=True))


def test_a_step_clips_by_the_norm_of_all_gradients(run_config, monkeypatch):
    norms, update_weights = [], loop.update_weights

    def record_norms(optimizer, norm, max_norm, found_inf):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append((norm.item(), sum(g.double().square().sum() for g in grads).sqrt().item(), max_norm))
        update_weights(optimizer, norm, max_norm, found_inf)

    monkeypatch.setattr(loop, "update_weights", record_norms)
    train.main(run_config("--name a --steps 2 --unmasked-steps 1 --max-grad-norm 0.7 --log-every 1"))
    assert len(norms) == 3 and all(norm == pytest.approx(expected, rel=1e-5) for norm, expected, _ in norms)
    assert {max_norm for *_, max_norm in norms} == {0.7}
    assert [row["grad_norm"] for row in log("out/a").values()] == [norm for norm, *_ in norms]


def test_a_run_with_teacher_fp8_loads_its_teacher_in_fp8(run_config, monkeypatch):
    monkeypatch.setattr(train, "require_fp8", lambda device: None)
    load_teacher = Mock(side_effect=ValueError("loaded"))
    monkeypatch.setattr(train, "load_teacher", load_teacher)
    for flags, fp8 in (("--teacher-fp8", True), ("", False)):
        with pytest.raises(ValueError, match="^loaded$"):
            train.main(run_config(f"--name {fp8} {flags}"))
        assert load_teacher.call_args.args[2] is fp8


def test_weight_decay_is_for_matrices_other_than_embeddings(first_run):
    out = f"{first_run}/out/first"
    for model in (ClusterSTM.from_pretrained(out), SigLIP.from_pretrained(f"{out}/teacher")):
        groups = loop.parameter_groups(model, 0.3)
        names = {id(p): name for name, p in model.named_parameters()}
        decay = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}
        assert len(groups) == 2 and set(decay) == {0.3, 0.0} and decay[0.3] | decay[0.0] == set(names.values())
        assert sum(len(g["params"]) for g in groups) == len(names)
        for name in decay[0.3]:
            assert re.search(r"(weight|probe)$", name) and not re.search("embedd|norm|bias", name.lower()), name
        for name in decay[0.0]:
            assert re.search("embedding|norm|bias$|temp$|query$|logit_scale$", name.lower()), name
        assert {"temp", "bert.bert.embeddings.word_embeddings.weight"} <= decay[0.0] or "logit_bias" in decay[0.0]


# ---------------------------------------------------------------------------------------------------------------------
# What stops a run

@pytest.mark.parametrize("every", [1, 1000], ids=["read at once", "read a step later"])
@pytest.mark.parametrize("stage, call, factor", [("pretrain", 13, float("inf")), ("unmasked", 51, float("nan"))])
def test_a_nonfinite_gradient_stops_the_run_before_the_weights_change(
        run_config, monkeypatch, stage, call, factor, every):
    compute_losses, calls = ClusterSTM.forward, []      # of each call: model, clips, weights; two micro-batches a step

    def forward(self, batch, *args):
        calls.append((self, batch.clip_ids.tolist(), deepcopy(self.state_dict()) if len(calls) % 2 == 0 else None))
        losses = compute_losses(self, batch, *args)
        if len(calls) == call:
            losses["vtc"] = losses["vtc"] * factor
        return losses

    monkeypatch.setattr(ClusterSTM, "forward", forward)
    with pytest.raises(ValueError) as error:
        train.main(run_config(f"--name a --log-every {every} --save-every 7"))
    step = (call - 1) // 2 - (20 if stage == "unmasked" else 0)
    message, first_call = str(error.value), (call - 1) // 2 * 2
    clips = [clip_ids for _, clip_ids, _ in calls[first_call:first_call + 2]]
    assert message.startswith(f"{stage} step {step} ") and "\n" not in message
    assert re.search(f"vtc ({factor:g}|nan)", message) and message.endswith(f"clips {clips}")
    expected = calls[first_call][2]
    assert_same(dict(calls[-1][0].state_dict()), expected)
    assert not os.path.exists("out/a/model.safetensors")
    state = torch.load(list_checkpoints("out/a")[0], weights_only=True)     # --resume begins with the nonfinite step
    assert (state["stage"], state["step"]) == (stage, step)
    assert_same(state["model"], expected)


def test_the_student_may_have_larger_patches_than_the_teacher(run_config, sprites, capsys):
    # A frame of 16 x 16 pixels has 16 patches of the teacher and 4 of the student.
    train.main(run_config("--name wide --steps 1 --unmasked-steps 1 --vit.patch-size 8"))
    code, _, err = command("eval.py", ["--task", "sprites", "--data-root", sprites, "--mask", "cluster_stm",
                                       "--checkpoint", "out/wide/before_unmasked"], capsys)
    assert code == 0, err
    assert all(0 < row["vtc"] < 100 for row in log("out/wide").values())


@pytest.mark.parametrize("flags, message", [
    ("--micro-batch 3", "batch .*8 and 3"),
    ("--steps -1", "steps .*-1"),
    ("--mask.ratio 1.0", r"ratio.* 1\.0"),
    ("--mask.ratio -0.1", r"ratio.* -0\.1"),
    ("--mask.name clusters", "clusters.*|cluster_stm"),
    ("--device tpu", "tpu"),
    ("--teacher-fp8", "teacher_fp8 needs a GPU.*got cpu"),
    ("--text.fusion-layers 2", "fusion_layers.* 2"),
    ("--vit.heads 3", "vit.heads.*3.*16"),
    ("--data.num-frames 9", "data.cache_frames.*(8|9)"),
    ("--data.train-file nowhere/rows.json", "nowhere/rows.json"),
    ("--data.video-root nowhere", "nowhere"),
    ("--teacher nowhere", "nowhere is not a folder of a SigLIP.*hub's cache"),
    ("--text-encoder nowhere", "nowhere is not a folder of a BERT"),
    ("--init-from nowhere", "nowhere is not a folder of a student"),
    ("--tokenizer nowhere.json", "nowhere.json"),
    ("--vit.patch-size 5", "patch_size 5, got 16"),
    ("--task sprites", "task.*finetune.*'all'"),
])
def test_invalid_settings_end_with_one_line_and_write_no_model(run_config, sprites, first_run, capsys, flags, message):
    write_rows(sprites, 1)
    code, _, err = command("train.py", argv(sprites, with_weights(first_run, flags)), capsys)
    assert_one_line("train.py", code, err, message)
    assert not any(name.endswith((".safetensors", ".tmp")) for _, _, names in os.walk("out") for name in names)


@pytest.mark.parametrize("changes, message", [
    ({"video": "broken.mp4"}, r"row 2: .*broken.mp4: .*\(1 of 3 "),
    ({"video": "absent.mp4"}, r"rows.json, row 2: .*absent.mp4: .*\(1 of 3 "),
    ({"caption": 3}, r"rows.json, row 2: .*caption.*3"),
    ({"start": 1.5, "end": 1}, r'rows.json, row 2: .*"end".*"start", got 1 and 1.5'),
])
def test_bad_data_is_reported_before_training(run_config, sprites, first_run, capsys, changes, message):
    os.symlink(f"{sprites}/videos", "videos")
    write_rows(sprites, 3, **changes)
    broken = f"{sprites}/videos/broken.mp4"
    with open(f"{sprites}/videos/train_00000.mp4", "rb") as good, open(broken, "wb") as bad:
        bad.write(good.read()[:1500])
    try:
        code, _, err = command("train.py", argv(sprites, "--data.train-file rows.json"), capsys)
    finally:
        os.remove(broken)
    assert_one_line("train.py", code, err, message)
    assert not any(name.endswith((".pt", ".safetensors")) for _, _, names in os.walk("out") for name in names)


def test_errors_of_resume_device_and_ranks_are_one_line(run_config, sprites, first_run, capsys, monkeypatch):
    train.main(run_config("--name finished --steps 1 --unmasked-steps 0"))
    flags = with_weights(first_run, "--unmasked-steps 0 --steps")
    code, _, err = command("train.py", argv(sprites, f"{flags} 1 --name finished"), capsys)
    assert_one_line("train.py", code, err, "out/finished/checkpoints/pretrain-0000001.pt .*--resume")
    code, _, err = command("train.py", argv(sprites, f"{flags} 3 --name finished --resume"), capsys)
    assert_one_line("train.py", code, err, "out/finished/run_state.json: steps .* 1 .* 3")
    if not torch.cuda.is_available():
        code, _, err = command("train.py", argv(sprites, "--device cuda"), capsys)
        assert_one_line("train.py", code, err, "no CUDA GPU")
    monkeypatch.setenv("WORLD_SIZE", "3")                                   # the error names a stage of this run
    code, _, err = command("train.py", argv(sprites, f"{flags} 1"), capsys)
    assert_one_line("train.py", code, err, "pretrain: batch .* 8, 4 and 3")


def test_train_py_in_a_new_process_fails_with_one_line(sprites, tmp_path):
    result = subprocess.run([sys.executable, f"{ROOT}/train.py", "--data.train-file", "nowhere.json"], cwd=tmp_path,
                            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode and re.fullmatch("train.py: nowhere.json.*\n", result.stderr)


def test_an_unknown_field_in_a_part_of_a_config_is_refused():
    values = {"batch": 4, "data": {"num_frame": 4}}
    with pytest.raises(ValueError, match="a.json: DataConfig has no field 'num_frame'"):
        config_from_dict(train.Config, values, "a.json")
    assert config_from_dict(train.Config, values, "a.json", strict=False) == train.Config(batch=4)


# ---------------------------------------------------------------------------------------------------------------------
# Command line and presets

def settings(cfg, prefix=""):
    """Yield (flag, comment) of each field of a config, including nested configs."""
    source = open(sys.modules[type(cfg).__module__].__file__).read()
    body = re.search(rf"class {type(cfg).__name__}:\n(.*?)(\n\S|\Z)", source, re.S)[1]
    for f in fields(cfg):
        if is_dataclass(getattr(cfg, f.name)):
            yield from settings(getattr(cfg, f.name), f"{prefix}{f.name}.")
        else:
            comment = (re.search(rf"^    {f.name}: .*?# (.*)$", body, re.M)
                       or re.search(rf"((?:^    # .*\n)+)    {f.name}: ", body, re.M)
                       or re.search(rf"^    {f.name}: .*help=f?\"(.*?)[\"{{]", body, re.M))
            assert comment, f"{prefix}{f.name} has no comment"
            yield f"--{prefix}{f.name}".replace("_", "-"), " ".join(comment[1].replace("# ", "").split())


@pytest.mark.parametrize("preset", ["", *train.PRESETS])
def test_help_explains_every_setting(preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "800")
    code, out, _ = command("train.py", [*preset.split(), "--help"], capsys)
    out = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    assert code == 0
    for flag, comment in settings(train.PRESETS[preset or "sprites"]):
        assert flag in out or flag.replace("--data.", "--data.no-") in out, flag
        assert " ".join(comment.split()[:4]).rstrip(".,;") in out, flag
    defaults = train.PRESETS[preset or "sprites"]
    assert f"(default: {defaults.batch})" in out and f"(default: {defaults.steps})" in out


@pytest.mark.parametrize("preset, vit_size, bert_size", [("base", 85.6e6, 109e6), ("large", 303.1e6, 334e6)])
def test_presets_build_the_models_of_the_paper(preset, vit_size, bert_size):
    cfg = train.PRESETS[preset]
    text, student = replace(cfg.text, vocab_size=30522, mask_token_id=103), replace(cfg.model, target_dim=768)
    with torch.device("meta"):
        model = ClusterSTM(cfg.vit, text, student)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(model.vit) == pytest.approx(vit_size, rel=2e-3)
    cross = [count(x.crossattention) for x in model.bert.bert.encoder.layer if hasattr(x, "crossattention")]
    assert count(model.bert) - sum(cross) == pytest.approx(bert_size, rel=0.02) and len(cross) == cfg.text.fusion_layers
    # The teacher has one token for each of the student's patches.
    assert cfg.teacher.endswith(f"-patch{cfg.vit.patch_size}-{cfg.data.image_size}")


def test_the_default_is_the_embedded_run():
    cfg = train.PRESETS["sprites"]
    assert cfg.data == DataConfig() and not (cfg.teacher or cfg.text_encoder or cfg.tokenizer or cfg.resume)
