"""Runs tested as runs: one process against two, killed against unbroken, what stops them and what they say of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from helpers.runs import (
    LOSSES,
    ROOT,
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
    weights,
    with_weights,
    write_rows,
)

import loop
import train
from data import ClipDataset, DataConfig, load_tokenizer
from encoders import Bert
from model import ClusterSTM
from runtime import MAY_CHANGE_ON_RESUME, RunContext, list_checkpoints
from tasks import read_annotations
from teacher import SigLIP

LEFT = {"config.json", "command.txt", "lock", "log.jsonl", "before_unmasked", "model.safetensors", "run_state.json",
        "checkpoints", "tokenizer.json"}


# ---------------------------------------------------------------------------------------------------------------------
# One process or several

def test_torchrun_with_two_processes_and_one_process_train_the_same_model(given, sprites, first, tmp_path):
    train.main(given("--name one"))                                         # two micro-batches after each other
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = with_weights(first, "--name two")
    ended = subprocess.run([*launch, f"{ROOT}/train.py", *argv(sprites, flags)], cwd=tmp_path, capture_output=True,
                           text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_close_runs("out/one", "out/two")
    assert ended.stdout.count("out/two: trained") == 1                      # one rank speaks for both


def test_one_two_and_four_processes_train_the_same_model(given):
    flags = "--micro-batch 2 --unmasked-batch 8 --data.num-views 0 --mask.name umt --name"
    train.main(given(f"{flags} one"))
    for world, name in ((2, "two"), (4, "four")):
        on_ranks(world, given(f"{flags} {name}"))
        assert_close_runs("out/one", f"out/{name}")


def test_contrast_and_relevance_run_over_the_batch_however_it_is_cut(given):
    flags = """--steps 8 --unmasked-steps 0 --model.vtm-weight 0 --model.mlm-weight 0 --text.dropout 0 --vit.drop-path 0
               --model.decoder-query-ratio 1 --name"""
    train.main(given(f"{flags} one --micro-batch 8"))
    train.main(given(f"{flags} two --micro-batch 2"))
    on_ranks(2, given(f"{flags} three --micro-batch 4"))
    for cut in ("out/two", "out/three"):
        for key, row in log("out/one").items():                             # vtm and mlm are drawn by micro-batch
            one, other = ({k: x[k] for k in ("mrm", "vtc", "grad_norm", "lr")} for x in (row, log(cut)[key]))
            assert one == pytest.approx(other, rel=1e-3), (cut, key)


def test_two_processes_train_a_text_encoder_and_the_teacher_that_one_trains(sprites, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_ranks(2, config(sprites, "--name two --steps 2 --unmasked-steps 0"))
    one, two = log(f"{first}/out/first/teacher"), log("out/two/teacher")    # of the whole batch, a half on each
    assert Counter(stage for stage, _ in two) == {"teacher": 6} and one.keys() == two.keys()
    for step in one:
        assert one[step] == pytest.approx(two[step], rel=1e-4)
    one, two = weights(f"{first}/out/first/teacher"), weights("out/two/teacher")
    for name in one.keys() - {name for name in one if re.search("k_proj.bias|in_proj_bias", name)}:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert Counter(stage for stage, _ in log("out/two/text")) == {"text": 6}
    assert weights("out/two").keys() == weights("out/two/before_unmasked").keys()


def test_two_processes_can_also_hide_nothing(given):
    on_ranks(2, given("--name two --steps 2 --unmasked-steps 1 --mask.ratio 0"))           # no MRM, no decoder
    assert all("mrm" not in row for row in log("out/two").values())


def drawn(cfg, rank, world, step=0, steps=5, batch=8, micro=2):
    """What a rank is given: (step, clips, views, seed) of each of its micro-batches."""
    run = RunContext(cfg, "", torch.device("cpu"), rank, world)
    clips = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
    tokenizer = load_tokenizer(os.path.join(os.path.dirname(cfg.data.train_file), "tokenizer.json"))
    groups = loop.iterate_micro_batches(run, clips, tokenizer, "pretrain", batch, micro, step, steps)
    return [(step + i, b.clip_ids.tolist(), b.view_ids.tolist(), b.seed)
            for i, group in enumerate(groups) for b in group]


@pytest.mark.parametrize("flags", ["--data.num-views 0", "--data.num-views 2",
                                   "--data.num-views 2 --data.num-workers 1"])
def test_sample_n_is_the_same_on_any_number_of_ranks_and_after_any_step(given, flags):
    cfg = given(flags)
    alone = drawn(cfg, 0, 1)
    clips = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
    samples = [clips[n] for n in range(40)]
    assert [c for _, ids, _, _ in alone for c in ids] == [s.clip_id for s in samples]
    assert [v for _, _, views, _ in alone for v in views] == [s.view_id for s in samples]
    assert len({seed for *_, seed in alone}) == len(alone)                  # each micro-batch draws its own numbers
    for world in (2, 4):
        together = [drawn(cfg, rank, world) for rank in range(world)]
        assert sum(together, []) != alone and sorted(sum(together, [])) == sorted(alone)
        parts = [[part for s, *part in mine if s == step] for step in range(5) for mine in together]
        assert [part for some in parts for part in some] == [part for _, *part in alone]        # ranks in order
    assert drawn(cfg, 0, 1, step=3) == [row for row in alone if row[0] >= 3]
    other = replace(cfg, seed=cfg.seed + 1)
    assert not {seed for *_, seed in drawn(other, 0, 1)} & {seed for *_, seed in alone}


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed

@pytest.fixture(scope="module")
def unbroken(sprites, first, tmp_path_factory):
    """unbroken(flags) -> the folder of a run that nobody killed."""
    done = {}

    def run(flags):
        if flags not in done:
            folder = tmp_path_factory.mktemp("unbroken")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                train.main(config(sprites, with_weights(first, f"{flags} --name whole")))
            done[flags] = str(folder / "out" / "whole")
        return done[flags]
    return run


STORED, ASKED, DRAWN = "--data.num-views 1", "--data.num-views 0", "--data.num-views 1 --mask.name random_frame"
SIZED = "--data.num-views 1 --model.proportional"


@pytest.mark.parametrize("stage, step, flags", [
    ("pretrain", 10, STORED),       # two steps after a save: they are taken again
    ("pretrain", 8, ASKED),         # just after one
    ("pretrain", 2, STORED),        # before any
    ("pretrain", 13, DRAWN),
    ("pretrain", 10, SIZED),
    ("before_unmasked", None, STORED),       # between the stages
    ("unmasked", 1, ASKED),         # the masked model is written, the state is still that of its last step
    ("unmasked", 5, STORED),
    ("unmasked", 4, ASKED),
    ("unmasked", None, STORED),     # all steps taken, the model not written
])
def test_a_run_killed_and_resumed_ends_bit_for_bit_as_an_unbroken_one(given, unbroken, stage, step, flags):
    whole = unbroken(flags)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, step)
        with pytest.raises(Killed):
            train.main(given(f"{flags} --name killed"))
    assert not os.path.exists("out/killed/model.safetensors")
    if (stage, step) != ("pretrain", 2):                                    # nobody starts on top of what is there
        with pytest.raises(ValueError, match="out/killed/.*pt .*--resume"):
            train.main(given(f"{flags} --name killed"))
    train.main(given(f"{flags} --name killed --resume --save-every 5"))
    assert_same(weights("out/killed"), weights(whole))
    assert_same(weights("out/killed/before_unmasked"), weights(f"{whole}/before_unmasked"))
    assert log("out/killed") == log(whole)
    assert set(os.listdir("out/killed")) == LEFT == set(os.listdir(whole))
    assert sorted(os.listdir(f"{whole}/checkpoints")) == ["unmasked-0000004.pt", "unmasked-0000006.pt"]


def test_a_process_killed_by_the_system_resumes_too(given, unbroken, sprites, first, tmp_path):
    whole = unbroken(STORED)
    flags = with_weights(first, f"{STORED} --name killed")
    with open("err.txt", "w") as err:
        process = subprocess.Popen([sys.executable, f"{ROOT}/train.py", *argv(sprites, flags)], cwd=tmp_path,
                                   stdout=err, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.time() + 60
    while process.poll() is None and time.time() < end:
        if list_checkpoints("out/killed") and open("out/killed/log.jsonl").read().count("\n") > 5:
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not os.path.exists("out/killed/model.safetensors"), open("err.txt").read()
    with open("out/killed/log.jsonl") as f:
        assert 4 < len(f.readlines()) < 26
    with open("out/killed/log.jsonl", "a") as f:
        f.write('{"stage": "pretr')                                         # as when the machine loses its power
    train.main(given(f"{STORED} --name killed --resume"))
    assert_same(weights("out/killed"), weights(whole))
    assert log("out/killed") == log(whole)


def test_a_state_that_is_cut_short_while_written_leaves_the_one_before(given, unbroken, monkeypatch):
    real, calls = torch.save, []

    def save(state, f):
        calls.append(f)
        if len(calls) == 3:                                                 # that of step 12
            f.write(b"half of it")
            raise Killed
        real(state, f)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(Killed):
            train.main(given(f"{ASKED} --name killed"))
    assert sorted(os.listdir("out/killed/checkpoints")) == ["pretrain-0000004.pt", "pretrain-0000008.pt"]
    steps = []
    real_rate = loop.learning_rate

    def learning_rate(step, *rest):
        steps.append(step)
        return real_rate(step, *rest)

    monkeypatch.setattr(loop, "learning_rate", learning_rate)
    train.main(given(f"{ASKED} --name killed --resume"))
    assert steps[::2] == [*range(8, 20), *range(6)]                         # two groups of parameters
    assert_same(weights("out/killed"), weights(unbroken(ASKED)))


@pytest.mark.parametrize("stage", ["teacher", "text"])
def test_a_small_stage_that_was_killed_goes_on_in_a_whole_run(sprites, first, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    rest = "--name killed --steps 4 --unmasked-steps 2"
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, 5)
        with pytest.raises(Killed):
            train.main(config(sprites, f"{rest} --stage {stage}"))
    train.main(config(sprites, f"{rest} --resume"))
    for part in ("teacher", "text", "."):
        assert_same(weights(f"out/killed/{part}"), weights(f"{first}/out/first/{part}"))
        assert log(f"out/killed/{part}") == log(f"{first}/out/first/{part}")


def test_a_finished_run_is_not_trained_again_and_not_trained_over(given, first, monkeypatch):
    cfg = given("--name whole --steps 2 --unmasked-steps 1")
    train.main(cfg)
    before, rows = weights("out/whole"), open("out/whole/log.jsonl").read()
    with pytest.raises(ValueError, match="out/whole/checkpoints/unmasked-0000001.pt"):
        train.main(cfg)
    train.main(replace(cfg, resume=True))
    assert_same(weights("out/whole"), before)
    assert open("out/whole/log.jsonl").read() == rows
    shutil.rmtree("out/whole/checkpoints")                                        # the model alone is a run too
    with pytest.raises(ValueError, match="out/whole/+model.safetensors"):
        train.main(given("--name whole"))


CHANGES = [("lr", "--lr 1e-2", "0.002", "0.01"), ("seed", "--seed 4", "3", "4"), ("steps", "--steps 21", "20", "21"),
           ("data.num_frames", "--data.num-frames 3", "4", "3"), ("text.dropout", "--text.dropout 0.1", "0.2", "0.1"),
           ("mask.name", "--mask.name tube", "'cluster_stm'", "'tube'"), ("batch", "--batch 4", "8", "4")]


@pytest.mark.parametrize("stage", ["pretrain", "unmasked"])
def test_a_run_goes_on_as_it_began_or_names_what_differs(given, stage):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, 4)
        with pytest.raises(Killed):
            train.main(given("--name killed"))
    for setting, flag, then, now in CHANGES:
        with pytest.raises(ValueError) as error:
            train.main(given(f"--name killed --resume {flag}"))
        message = str(error.value)
        assert message.startswith("out/killed/") and f" {setting} " in message
        assert then in message and message.endswith(now)
    free = """--device cpu --log-every 3 --save-every 7 --keep-checkpoints 3 --max-skipped-steps 1 --no-compile
              --activation-checkpointing --data.num-workers 1 --data.no-frame-cache --data.no-resize-on-device
              --data.max-unreadable 0.2"""
    for name in {*MAY_CHANGE_ON_RESUME} - {"resume", "stage"}:
        assert f"--{name}".replace("_", "-") in free.replace("no-", "")
    train.main(given(f"--name killed --resume {free}"))
    assert os.path.exists("out/killed/model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Stages

def test_twenty_steps_lower_every_loss(unbroken):
    rows = [row for (stage, _), row in sorted(log(unbroken(STORED)).items()) if stage == "pretrain"]
    for name in ("mrm", "mlm", "vtc"):
        values = [row[name] for row in rows]
        assert np.mean(values[-5:]) < np.mean(values[:5]), name
    assert all(0 < row["grad_norm"] < np.inf and set(row) == {*LOSSES[1:5], "grad_norm", "lr"} for row in rows)
    unmasked = [row for (stage, _), row in log(unbroken(STORED)).items() if stage == "unmasked"]
    assert len(unmasked) == 6 and all(set(row) == {"vtc", "vtm", "mlm", "grad_norm", "lr"} for row in unmasked)
    assert max(row["lr"] for row in unmasked) == pytest.approx(0.2 * max(row["lr"] for row in rows))


def test_a_run_leaves_all_that_is_needed_to_go_on_from_it(sprites, first):
    out = f"{first}/out/first"
    assert set(os.listdir(out)) == LEFT | {"teacher", "text"}
    wanted = config(sprites, "--name first --steps 4 --unmasked-steps 2")
    tokenizer = load_tokenizer(f"{out}/tokenizer.json")
    text = replace(wanted.text, vocab_size=tokenizer.get_vocab_size(), mask_token_id=tokenizer.token_to_id("[MASK]"))
    wanted = replace(wanted, text=text, model=replace(wanted.model, target_dim=16),
                     teacher="out/first/teacher")                           # eval.py needs it for masks
    for folder in (out, f"{out}/before_unmasked"):
        with open(f"{folder}/config.json") as f:
            written = json.load(f)
        assert written == json.loads(json.dumps(asdict(wanted)))
        assert_same(dict(ClusterSTM.from_pretrained(folder).state_dict()), weights(folder))
    one, other = weights(out), weights(f"{out}/before_unmasked")
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert same == {name for name in one if name.startswith("decoder.")}    # which the unmasked stage has no use for
    teacher = SigLIP.from_pretrained(f"{out}/teacher")
    assert teacher.tokenize(["a red square"]).shape == (1, 24) and teacher.cfg.vision_config.hidden_size == 16
    assert load_tokenizer(f"{out}/text/tokenizer.json").get_vocab_size() == wanted.text.vocab_size
    assert Bert.from_pretrained(f"{out}/text").cfg.fusion_layers == 1


def test_stages_one_by_one_are_the_run_at_once(sprites, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--name parts --steps 4 --unmasked-steps 2"
    assert isinstance(train.main(config(sprites, f"{flags} --stage teacher")), SigLIP)
    assert not os.path.exists("out/parts/text") and not os.path.exists("out/parts/model.safetensors")
    with pytest.raises(ValueError, match="out/parts/teacher/checkpoints/teacher-0000006.pt"):
        train.main(config(sprites, f"{flags} --stage teacher"))
    assert isinstance(train.main(config(sprites, f"{flags} --stage text")), Bert)
    assert isinstance(train.main(config(sprites, f"{flags} --resume")), ClusterSTM)
    for part in ("teacher", "text", "before_unmasked", "."):
        assert_same(weights(f"out/parts/{part}"), weights(f"{first}/out/first/{part}"))
    with open("out/parts/log.jsonl") as f, open(f"{first}/out/first/log.jsonl") as g:
        assert len(f.readlines()) == len(g.readlines()) == 6


def test_the_text_encoder_may_be_trained_before_the_teacher_is_chosen(sprites, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--name parts --steps 4 --unmasked-steps 2"
    train.main(config(sprites, f"{flags} --stage text"))
    train.main(config(sprites, f"{flags} --resume --teacher {first}/out/first/teacher"))
    assert_same(weights("out/parts"), weights(f"{first}/out/first"))


def test_given_weights_are_taken_and_not_trained(given, first):
    before = weights(f"{first}/out/first/teacher")
    model = train.main(given("--steps 1 --unmasked-steps 0"))               # the run is named after sprites_train.json
    assert not os.path.exists("out/sprites/teacher") and not os.path.exists("out/sprites/text")
    assert_same(weights(f"{first}/out/first/teacher"), before)
    text = weights(f"{first}/out/first/text")                               # one step of lr 2e-3 moves a weight by that
    moved = [(model.state_dict()[f"bert.{k}"] - v).abs().max() for k, v in text.items() if "crossattention" not in k]
    assert 0 < max(moved) <= 2.1e-3
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert_same(weights("out/sprites"), weights("out/sprites/before_unmasked"))      # no unmasked stage


def test_each_stage_has_its_batch(sprites, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, sizes = loop.iterate_micro_batches, {}

    def batches(run, clips, tokenizer, stage, batch, micro, step, steps):
        sizes[stage] = batch, micro, steps
        for group in real(run, clips, tokenizer, stage, batch, micro, step, steps):
            assert len(group) == batch // micro and all(len(b.clip_ids) == micro for b in group)
            yield group

    monkeypatch.setattr(loop, "iterate_micro_batches", batches)
    train.main(config(sprites, "--name a --steps 1 --unmasked-steps 2 --unmasked-batch 16 --toy.batch 6 "
                               "--toy.steps 3 --toy.text-batch 5 --toy.text-steps 4"))
    assert sizes == {"teacher": (6, 6, 3), "text": (5, 5, 4), "pretrain": (8, 4, 1), "unmasked": (16, 4, 2)}


def test_without_a_tokenizer_one_is_trained_on_the_captions(given, sprites, tmp_path):
    train.main(given("--name a --steps 1 --unmasked-steps 0"))
    assert load_tokenizer("out/a/tokenizer.json").get_vocab() == \
        load_tokenizer(f"{sprites}/tokenizer.json").get_vocab()
    os.rename(f"{sprites}/tokenizer.json", f"{sprites}/hidden.json")
    try:
        train.main(config(sprites, "--stage text --toy.text-steps 1 --name own"))
    finally:
        os.rename(f"{sprites}/hidden.json", f"{sprites}/tokenizer.json")
    own, whole = (load_tokenizer(f"{folder}/tokenizer.json").get_vocab() for folder in ("out/own", sprites))
    assert own.items() < whole.items()                                      # which has the questions' words besides


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    rate = [loop.learning_rate(s, 200, 0.1, 3.0) for s in range(200)]
    assert rate[0] == pytest.approx(3 * (0.01 + 0.99 / 20)) and rate[19] == rate[20] == 3.0 == max(rate)
    assert rate[:20] == sorted(rate[:20]) and rate[20:] == sorted(rate[20:], reverse=True)
    assert rate[110] == pytest.approx(3 * (0.01 + 0.99 / 2)) and 0.03 < rate[-1] < 0.031
    assert loop.learning_rate(0, 5, 0.0, 1.0) == 1.0 and loop.learning_rate(0, 1, 0.1, 1.0) == 1.0
    assert all(0 < loop.learning_rate(s, 3, 1.0, 1.0) <= 1 for s in range(3))


def test_matrices_decay_and_embeddings_norms_biases_and_scalars_do_not(first):
    out = f"{first}/out/first"
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
@pytest.mark.parametrize("stage, call, bad", [("pretrain", 13, float("inf")), ("unmasked", 51, float("nan"))])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(given, monkeypatch, stage, call, bad,
                                                                               every):
    real, seen = ClusterSTM.forward, []

    def forward(self, batch, *args):
        seen.append((self, batch.clip_ids.tolist(), deepcopy(self.state_dict()) if len(seen) % 2 == 0 else None))
        losses = real(self, batch, *args)
        if len(seen) == call:                                               # two micro-batches a step
            losses["vtc"] = losses["vtc"] * bad
        return losses

    monkeypatch.setattr(ClusterSTM, "forward", forward)
    with pytest.raises(ValueError) as error:
        train.main(given(f"--name a --log-every {every} --save-every 7"))
    step = (call - 1) // 2 - (20 if stage == "unmasked" else 0)
    said, first = str(error.value), (call - 1) // 2 * 2
    assert said.startswith(f"{stage} step {step} ") and "\n" not in said
    assert re.search(f"vtc ({bad:g}|nan)", said) and said.endswith(f"clips {[seen[first][1], seen[first + 1][1]]}")
    assert_same(dict(seen[-1][0].state_dict()), seen[first][2])
    assert not os.path.exists("out/a/model.safetensors")
    state = torch.load(list_checkpoints("out/a")[0], weights_only=True)     # --resume begins with the bad step
    assert (state["stage"], state["step"]) == (stage, step)
    assert_same(state["model"], seen[first][2])


def test_a_student_of_other_patches_has_a_teacher_token_for_each_in_training_and_in_scoring(given, sprites, capsys):
    # Frames of 16 pixels: 16 teacher patches of 4, but 4 of the student's.
    train.main(given("--name wide --steps 1 --unmasked-steps 1 --vit.patch-size 8"))
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
    ("--text.fusion-layers 2", "fusion_layers.* 2"),
    ("--vit.heads 3", "vit.heads.*3.*16"),
    ("--data.num-frames 9", "data.cache_frames.*(8|9)"),
    ("--data.train-file nowhere/rows.json", "nowhere/rows.json"),
    ("--data.video-root nowhere", "nowhere"),
    ("--teacher nowhere", "nowhere is not a folder of a SigLIP.*hub's cache"),
    ("--text-encoder nowhere", "nowhere is not a folder of a BERT"),
    ("--init-from nowhere", "nowhere is not a folder of a student"),
    ("--tokenizer nowhere.json", "nowhere.json"),
    ("--vit.patch-size 5", "16.* 5"),
    ("--task sprites", "task.*finetune.*'all'"),
])
def test_what_cannot_be_run_says_so_in_one_line_and_leaves_no_model(given, sprites, first, capsys, flags, message):
    write_rows(sprites, 1)
    code, _, err = command("train.py", argv(sprites, with_weights(first, flags)), capsys)
    assert_one_line("train.py", code, err, message)
    assert not any(name.endswith((".safetensors", ".tmp")) for _, _, names in os.walk("out") for name in names)


@pytest.mark.parametrize("changes, message", [
    ({"video": "broken.mp4"}, r"row 2: .*broken.mp4: .*\(1 of 3 "),
    ({"video": "absent.mp4"}, r"rows.json, row 2: .*absent.mp4: .*\(1 of 3 "),
    ({"caption": "?!"}, r"rows.json, row 2: .*caption.*\?!"),
])
def test_bad_data_is_named_before_anything_is_trained(given, sprites, first, capsys, changes, message):
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


def test_other_causes_are_one_line_as_well(given, sprites, first, capsys, monkeypatch):
    train.main(given("--name held --steps 1 --unmasked-steps 0"))
    weights = with_weights(first, "--unmasked-steps 0 --steps")
    code, _, err = command("train.py", argv(sprites, f"{weights} 1 --name held"), capsys)
    assert_one_line("train.py", code, err, "out/held/checkpoints/pretrain-0000001.pt .*--resume")
    code, _, err = command("train.py", argv(sprites, f"{weights} 3 --name held --resume"), capsys)
    assert_one_line("train.py", code, err, "out/held/config.json: steps .* 1 .* 3")
    if not torch.cuda.is_available():
        code, _, err = command("train.py", argv(sprites, "--device cuda"), capsys)
        assert_one_line("train.py", code, err, "no CUDA GPU")
    monkeypatch.setenv("WORLD_SIZE", "3")                                   # of the stages that this run has
    code, _, err = command("train.py", argv(sprites, f"{weights} 1"), capsys)
    assert_one_line("train.py", code, err, "pretrain: batch .* 8, 4 and 3")


def test_a_process_of_its_own_fails_the_same_way(sprites, tmp_path):
    ended = subprocess.run([sys.executable, f"{ROOT}/train.py", "--data.train-file", "nowhere.json"], cwd=tmp_path,
                           capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode and re.fullmatch("train.py: nowhere.json.*\n", ended.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Command line and presets

def settings(cfg, prefix=""):
    """(flag, comment) of each field, those of nested configs too."""
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
    monkeypatch.setenv("COLUMNS", "400")
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
