"""Runs tested as runs: one process against two, killed against unbroken, what stops them and what they say of it."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass

import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import load_file

import data
import train
from data import Clips
from model import Bert, ClusterSTM
from runs import FREE, STAGES, states
from sprites import write_sprites
from teacher import SigLIP

ROOT = os.path.dirname(os.path.abspath(train.__file__))
TINY = """--batch 8 --micro-batch 4 --steps 20 --unmasked-steps 6 --unmasked-batch 8 --lr 2e-3 --log-every 1
    --save-every 4 --seed 3 --data.size 16 --data.frames 4 --data.cache-frames 8 --mask.ratio 0.75 --model.patch 4
    --model.width 16 --model.depth 2 --model.heads 2 --model.drop-path 0.3 --model.text-width 16 --model.text-depth 2
    --model.text-heads 2 --model.fusion 1 --model.dropout 0.2 --model.text-length 24 --model.embed 8
    --model.decoder-width 16 --model.decoder-depth 1 --model.decoder-heads 2 --small.width 16 --small.depth 1
    --small.heads 2 --small.text-depth 1 --small.batch 8 --small.steps 6 --small.text-batch 8
    --small.text-steps 6""".split()
LEFT = {"config.json", "lock", "log.jsonl", "masked", "model.safetensors", "run.json", "state", "tokenizer.json"}
LOSSES = ("sigmoid", "mrm", "vtc", "vtm", "mlm", "lm")


# ---------------------------------------------------------------------------------------------------------------------
# A set of sprites and a first run, for all tests

@pytest.fixture(scope="session", name="sprites")
def small_sprites(tmp_path_factory):
    """Folder of 24 training, 12 test and 6 validation clips, the same for all test files."""
    folder = str(tmp_path_factory.getbasetemp() / "sprites")
    write_sprites(folder, train=24, test=12, val=6)
    return folder


@pytest.fixture(scope="session", name="first")
def first_run(sprites, tmp_path_factory):
    """Folder with out/first, a run that trained its own teacher and text encoder."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(config(sprites, "--name first --steps 4 --unmasked-steps 2"))
    return str(folder)


@pytest.fixture
def given(sprites, first, tmp_path, monkeypatch):
    """In a folder of its own: config(flags) of runs that are given teacher and text encoder."""
    monkeypatch.chdir(tmp_path)
    weights = f"--teacher {first}/out/first/teacher --text {first}/out/first/text "
    return lambda flags="": config(sprites, weights + flags)


def argv(sprites, flags=""):
    return [*TINY, "--data.train", f"{sprites}/sprites_train.json", "--data.root", f"{sprites}/videos", *flags.split()]


def config(sprites, flags=""):
    return tyro.cli(train.Config, args=argv(sprites, flags), default=deepcopy(train.PRESETS["sprites"]))


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def log(folder):
    """(stage, step) -> its losses, learning rate and gradient norm. Each step stands there once, in order."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    taken = [(STAGES.index(row["stage"]), row["step"]) for row in rows]
    assert taken == sorted(set(taken))
    return {(row["stage"], row["step"]): {k: row[k] for k in (*LOSSES, "grad_norm", "lr") if k in row} for row in rows}


def assert_same(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def command(script, args, capsys):
    """`python SCRIPT ARGS` in this process -> exit code, stdout, stderr."""
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *args])
        try:
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    out, err = capsys.readouterr()
    return (1, out, err + code) if isinstance(code, str) else (code, out, err)


def assert_one_line(script, code, err, message):
    """It failed, and said so in one line; a progress bar may stand before it. What tyro refuses it puts in a box."""
    assert code and "Traceback" not in err
    if code == 2:
        assert re.search(message, " ".join(re.sub("[^!-~]+", " ", err).split())), err
        return
    said = re.split("[\r\n]", err.strip())[-1]
    assert said.startswith(f"{script}: ") and re.search(message, said), err
    assert err.count("\n", 0, -1) == 0 or "it/s" in err, err


# ---------------------------------------------------------------------------------------------------------------------
# One process or several

def assert_close_runs(a, b):
    """The same losses and weights, to rounding: 1e-6 was found, after twenty-six steps of up to lr = 2e-3 a weight."""
    one, other = log(a), log(b)
    assert one.keys() == other.keys() and len(one) == 26
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=1e-5), key
    one, other = trained(a), trained(b)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def trained(folder):
    """The weights, less the biases of keys: softmax cancels them, so their gradient is rounding; Adam enlarges it."""
    model = {name: w for name, w in weights(folder).items() if not name.endswith("key.bias")}
    for name in [name for name in model if name.endswith("kv.bias")]:
        parts = 3 if "qkv" in name else 2
        model[name] = torch.cat([w for i, w in enumerate(model[name].chunk(parts)) if i != parts - 2])
    return model


def test_torchrun_with_two_processes_and_one_process_train_the_same_model(given, sprites, first, tmp_path):
    train.main(given("--name one"))                                         # two micro-batches after each other
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = f"--teacher {first}/out/first/teacher --text {first}/out/first/text --name two"
    ended = subprocess.run([*launch, f"{ROOT}/train.py", *argv(sprites, flags)], cwd=tmp_path, capture_output=True,
                           text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_close_runs("out/one", "out/two")
    assert ended.stdout.count("out/two: trained") == 1                      # one rank speaks for both


def test_one_two_and_four_processes_train_the_same_model(given):
    flags = "--micro-batch 2 --unmasked-batch 8 --data.views 0 --mask.name umt --name"
    train.main(given(f"{flags} one"))
    for world, name in ((2, "two"), (4, "four")):
        on_ranks(world, given(f"{flags} {name}"))
        assert_close_runs("out/one", f"out/{name}")


def test_vtc_has_umts_gradient_on_request_a_half_on_two_ranks(given):
    """The first step's gradients of VTC alone: of the encoders, and of the temperature, which is whole either way."""
    real = torch.nn.utils.clip_grad_norm_
    config = lambda flags: given(f"--steps 1 --unmasked-steps 0 --mrm 0 --vtm 0 --mlm 0 --model.drop-path 0 "
                                 f"--model.dropout 0 --micro-batch 4 --data.views 0 {flags}")

    def gradients(run, name):
        model = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda used, most: (
                model.update({str(i): p.grad.clone() for i, p in enumerate(used)}), torch.save(model, f"{name}.pt"),
                real(used, most))[2])
            run()
        return torch.load(f"{name}.pt", weights_only=True)

    whole = gradients(lambda: train.main(config("--name one")), "one")
    assert_same(whole, gradients(lambda: train.main(config("--name alone --model.umt-vtc")), "alone"))
    two = gradients(lambda: on_ranks(2, config("--name two")), "two")
    umt = gradients(lambda: on_ranks(2, config("--name umt --model.umt-vtc")), "umt")
    assert sum(g.abs().max() > 1e-6 for g in whole.values()) > 20
    for i, g in whole.items():
        torch.testing.assert_close(two[i], g, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(umt[i], g / (1 if g.ndim == 0 else 2), rtol=1e-4, atol=1e-7)


def test_contrast_and_relevance_run_over_the_batch_however_it_is_cut(given):
    flags = """--steps 8 --unmasked-steps 0 --vtm 0 --mlm 0 --model.dropout 0 --model.drop-path 0
               --model.decoder-share 1 --name"""
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
    assert weights("out/two").keys() == weights("out/two/masked").keys()


def test_two_processes_can_also_hide_nothing(given):
    on_ranks(2, given("--name two --steps 2 --unmasked-steps 1 --mask.ratio 0"))           # no MRM, no decoder
    assert all("mrm" not in row for row in log("out/two").values())


def on_ranks(world, cfg):
    """train.main(cfg) in `world` processes."""
    in_processes(world, lambda: train.main(cfg))


def in_processes(world, run):
    """run() in `world` processes, forked from this one."""
    def main(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        run()
        os._exit(0)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("fork").Process(target=main, args=(rank,)) for rank in range(world)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        p.kill()
    assert [p.exitcode for p in processes] == [0] * world


def drawn(cfg, rank, world, step=0, steps=5, batch=8, micro=2):
    """What a rank is given: (step, clips, views, seed) of each of its micro-batches."""
    run = train.Run(cfg, "", torch.device("cpu"), rank, world)
    clips = Clips(data.read_annotations(cfg.data.train, cfg.data.root), cfg.data, cfg.seed)
    tokenizer = data.load_tokenizer(os.path.join(os.path.dirname(cfg.data.train), "tokenizer.json"))
    groups = train.micro_batches(run, clips, tokenizer, "pretrain", batch, micro, step, steps)
    return [(step + i, b.clip.tolist(), b.view.tolist(), b.seed) for i, group in enumerate(groups) for b in group]


@pytest.mark.parametrize("flags", ["--data.views 0", "--data.views 2", "--data.views 2 --data.workers 1"])
def test_sample_n_of_a_run_is_the_same_for_any_number_of_ranks_and_after_any_step(given, flags):
    cfg = given(flags)
    alone = drawn(cfg, 0, 1)
    clips = Clips(data.read_annotations(cfg.data.train, cfg.data.root), cfg.data, cfg.seed)
    samples = [clips[n] for n in range(40)]
    assert [c for _, ids, _, _ in alone for c in ids] == [s.clip for s in samples]
    assert [v for _, _, views, _ in alone for v in views] == [s.view for s in samples]
    assert len({seed for *_, seed in alone}) == len(alone)                  # each micro-batch draws its own numbers
    for world in (2, 4):
        together = [drawn(cfg, rank, world) for rank in range(world)]
        assert sum(together, []) != alone and sorted(sum(together, [])) == sorted(alone)
        parts = [[part for s, *part in mine if s == step] for step in range(5) for mine in together]
        assert [part for some in parts for part in some] == [part for _, *part in alone]        # ranks in order
    assert drawn(cfg, 0, 1, step=3) == [row for row in alone if row[0] >= 3]
    other = deepcopy(cfg)
    other.seed += 1
    assert not {seed for *_, seed in drawn(other, 0, 1)} & {seed for *_, seed in alone}


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed

class Killed(Exception):
    pass


def kill(patch, stage, step):
    """The run ends before this step of the stage; "masked" and "unmasked" None: while that model is written."""
    if step is not None:
        real = train.micro_batches

        def batches(run, clips, tokenizer, at, *sizes):
            for i, group in enumerate(real(run, clips, tokenizer, at, *sizes), sizes[-2]):
                if (at, i) == (stage, step):
                    raise Killed
                yield group

        patch.setattr(train, "micro_batches", batches)
    else:
        name, real = ("save_model", train.save_model) if stage == "masked" else ("save_weights", train.save_weights)

        def save(*args):
            if stage == "masked" or args[-1] == "out/killed":
                raise Killed
            real(*args)

        patch.setattr(train, name, save)


@pytest.fixture(scope="module")
def unbroken(sprites, first, tmp_path_factory):
    """unbroken(flags) -> the folder of a run that nobody killed."""
    done = {}

    def run(flags):
        if flags not in done:
            folder = tmp_path_factory.mktemp("unbroken")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                train.main(config(sprites, f"--teacher {first}/out/first/teacher --text {first}/out/first/text {flags} "
                                           "--name whole"))
            done[flags] = str(folder / "out" / "whole")
        return done[flags]
    return run


STORED, ASKED, DRAWN = "--data.views 1", "--data.views 0", "--data.views 1 --mask.name random_frame"
SIZED = "--data.views 1 --model.proportional --guide-codes 5"


@pytest.mark.parametrize("stage, step, flags", [
    ("pretrain", 10, STORED),       # two steps after a save: they are taken again
    ("pretrain", 8, ASKED),         # just after one
    ("pretrain", 2, STORED),        # before any
    ("pretrain", 13, DRAWN),
    ("pretrain", 10, SIZED),
    ("masked", None, STORED),       # between the stages
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
        with pytest.raises(ValueError, match="out/killed/.*pt is of an earlier run: --resume goes on"):
            train.main(given(f"{flags} --name killed"))
    train.main(given(f"{flags} --name killed --resume --save-every 5"))
    assert_same(weights("out/killed"), weights(whole))
    assert_same(weights("out/killed/masked"), weights(f"{whole}/masked"))
    assert log("out/killed") == log(whole)
    assert set(os.listdir("out/killed")) == LEFT == set(os.listdir(whole))
    assert sorted(os.listdir(f"{whole}/state")) == ["unmasked-0000004.pt", "unmasked-0000006.pt"]      # the newest two


def test_a_process_killed_by_the_system_resumes_too(given, unbroken, sprites, first, tmp_path):
    whole = unbroken(STORED)
    flags = f"--teacher {first}/out/first/teacher --text {first}/out/first/text {STORED} --name killed"
    with open("err.txt", "w") as err:
        process = subprocess.Popen([sys.executable, f"{ROOT}/train.py", *argv(sprites, flags)], cwd=tmp_path,
                                   stdout=err, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.time() + 60
    while process.poll() is None and time.time() < end:
        if states("out/killed") and open("out/killed/log.jsonl").read().count("\n") > 5:
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
    assert sorted(os.listdir("out/killed/state")) == ["pretrain-0000004.pt", "pretrain-0000008.pt"]
    steps = []
    monkeypatch.setattr(train, "learning_rate", lambda step, *rest, real=train.learning_rate: (
        steps.append(step), real(step, *rest))[1])
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
    train.main(deepcopy(cfg))
    before, rows = weights("out/whole"), open("out/whole/log.jsonl").read()
    with pytest.raises(ValueError, match="out/whole/state/unmasked-0000001.pt is of an earlier run"):
        train.main(deepcopy(cfg))
    cfg.resume = True
    train.main(cfg)
    assert_same(weights("out/whole"), before)
    assert open("out/whole/log.jsonl").read() == rows
    shutil.rmtree("out/whole/state")                                        # the model alone is a run too
    with pytest.raises(ValueError, match="out/whole/+model.safetensors is of an earlier run"):
        train.main(given("--name whole"))


CHANGES = [("lr", "--lr 1e-2", "0.002", "0.01"), ("seed", "--seed 4", "3", "4"), ("steps", "--steps 21", "20", "21"),
           ("data.frames", "--data.frames 3", "4", "3"), ("mask.name", "--mask.name tube", "'cluster_stm'", "'tube'"),
           ("model.dropout", "--model.dropout 0.1", "0.2", "0.1"), ("batch", "--batch 4", "8", "4")]


@pytest.mark.parametrize("stage", ["pretrain", "unmasked"])
def test_a_run_goes_on_as_it_began_or_names_what_differs(given, stage):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, 4)
        with pytest.raises(Killed):
            train.main(given("--name killed"))
    for setting, flag, then, now in CHANGES:
        with pytest.raises(ValueError) as error:
            train.main(given(f"--name killed --resume {flag}"))
        where, said = str(error.value).split(" is of a run with ")
        assert where.startswith("out/killed/") and said == f"{setting} = {then}, asked for is {now}"
    free = """--device cpu --log-every 3 --save-every 7 --keep 3 --skip-nonfinite 1 --activation-checkpointing
              --no-compile --data.workers 1 --data.no-cache --data.no-on-device --data.max-bad 0.2"""
    assert all(f"--{name}".replace("_", "-") in free.replace("no-", "") for name in {*FREE} - {"resume", "stage"})
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
    tokenizer = data.load_tokenizer(f"{out}/tokenizer.json")
    wanted.model.vocab, wanted.model.mask_id = tokenizer.get_vocab_size(), tokenizer.token_to_id("[MASK]")
    wanted.model.target, wanted.teacher = 16, "out/first/teacher"           # eval.py wants it for masks
    for folder in (out, f"{out}/masked"):
        with open(f"{folder}/config.json") as f:
            written = json.load(f)
        assert written == json.loads(json.dumps(asdict(wanted)))
        assert_same(dict(ClusterSTM.from_pretrained(folder).state_dict()), weights(folder))
    one, other = weights(out), weights(f"{out}/masked")
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert same == {name for name in one if name.startswith("decoder.")}    # which the unmasked stage has no use for
    teacher = SigLIP.from_pretrained(f"{out}/teacher")
    assert teacher.tokenize(["a red square"]).shape == (1, 24) and teacher.cfg.vision_config.hidden_size == 16
    assert data.load_tokenizer(f"{out}/text/tokenizer.json").get_vocab_size() == wanted.model.vocab
    assert Bert.from_pretrained(f"{out}/text").cfg.fusion_layers == 1


def test_stages_one_by_one_are_the_run_at_once(sprites, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--name parts --steps 4 --unmasked-steps 2"
    assert isinstance(train.main(config(sprites, f"{flags} --stage teacher")), SigLIP)
    assert not os.path.exists("out/parts/text") and not os.path.exists("out/parts/model.safetensors")
    with pytest.raises(ValueError, match="out/parts/teacher/state/teacher-0000006.pt is of an earlier run"):
        train.main(config(sprites, f"{flags} --stage teacher"))
    assert isinstance(train.main(config(sprites, f"{flags} --stage text")), Bert)
    assert isinstance(train.main(config(sprites, f"{flags} --resume")), ClusterSTM)
    for part in ("teacher", "text", "masked", "."):
        assert_same(weights(f"out/parts/{part}"), weights(f"{first}/out/first/{part}"))
    with open("out/parts/log.jsonl") as f, open(f"{first}/out/first/log.jsonl") as g:
        assert len(f.readlines()) == len(g.readlines()) == 6


def test_given_weights_are_taken_and_not_trained(given, first):
    before = weights(f"{first}/out/first/teacher")
    model = train.main(given("--steps 1 --unmasked-steps 0"))               # the run is named after sprites_train.json
    assert not os.path.exists("out/sprites/teacher") and not os.path.exists("out/sprites/text")
    assert_same(weights(f"{first}/out/first/teacher"), before)
    text = weights(f"{first}/out/first/text")                               # one step of lr 2e-3 moves a weight by that
    moved = [(model.state_dict()[f"bert.{k}"] - v).abs().max() for k, v in text.items() if "crossattention" not in k]
    assert 0 < max(moved) <= 2.1e-3
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert_same(weights("out/sprites"), weights("out/sprites/masked"))      # no unmasked stage


def test_each_stage_has_its_batch(sprites, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, sizes = train.micro_batches, {}

    def batches(run, clips, tokenizer, stage, batch, micro, step, steps):
        sizes[stage] = batch, micro, steps
        for group in real(run, clips, tokenizer, stage, batch, micro, step, steps):
            assert len(group) == batch // micro and all(len(b.clip) == micro for b in group)
            yield group

    monkeypatch.setattr(train, "micro_batches", batches)
    train.main(config(sprites, "--name a --steps 1 --unmasked-steps 2 --unmasked-batch 16 --small.batch 6 "
                               "--small.steps 3 --small.text-batch 5 --small.text-steps 4"))
    assert sizes == {"teacher": (6, 6, 3), "text": (5, 5, 4), "pretrain": (8, 4, 1), "unmasked": (16, 4, 2)}


def test_without_a_tokenizer_one_is_trained_on_the_captions(given, sprites, tmp_path):
    train.main(given("--name a --steps 1 --unmasked-steps 0"))
    assert data.load_tokenizer("out/a/tokenizer.json").get_vocab() == \
        data.load_tokenizer(f"{sprites}/tokenizer.json").get_vocab()
    os.rename(f"{sprites}/tokenizer.json", f"{sprites}/hidden.json")
    try:
        train.main(config(sprites, "--stage text --small.text-steps 1 --name own"))
    finally:
        os.rename(f"{sprites}/hidden.json", f"{sprites}/tokenizer.json")
    own, whole = (data.load_tokenizer(f"{folder}/tokenizer.json").get_vocab() for folder in ("out/own", sprites))
    assert own.items() < whole.items()                                      # which has the questions' words besides


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    rate = [train.learning_rate(s, 200, 0.1, 3.0) for s in range(200)]
    assert rate[0] == pytest.approx(3 * (0.01 + 0.99 / 20)) and rate[19] == rate[20] == 3.0 == max(rate)
    assert rate[:20] == sorted(rate[:20]) and rate[20:] == sorted(rate[20:], reverse=True)
    assert rate[110] == pytest.approx(3 * (0.01 + 0.99 / 2)) and 0.03 < rate[-1] < 0.031
    assert train.learning_rate(0, 5, 0.0, 1.0) == 1.0 and train.learning_rate(0, 1, 0.1, 1.0) == 1.0
    assert all(0 < train.learning_rate(s, 3, 1.0, 1.0) <= 1 for s in range(3))


def test_matrices_decay_and_embeddings_norms_biases_and_scalars_do_not(first):
    out = f"{first}/out/first"
    for model in (ClusterSTM.from_pretrained(out), SigLIP.from_pretrained(f"{out}/teacher")):
        groups = train.parameter_groups(model, 0.3)
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
        seen.append((self, batch.clip.tolist(), deepcopy(self.state_dict()) if len(seen) % 2 == 0 else None))
        losses = real(self, batch, *args)
        if len(seen) == call:                                               # two micro-batches a step
            losses["vtc"] = losses["vtc"] * bad
        return losses

    monkeypatch.setattr(ClusterSTM, "forward", forward)
    with pytest.raises(ValueError) as error:
        train.main(given(f"--name a --log-every {every} --save-every 7"))
    step = (call - 1) // 2 - (20 if stage == "unmasked" else 0)
    said, first = str(error.value), (call - 1) // 2 * 2
    assert said.startswith(f"{stage} step {step} not taken: gradient norm ") and "\n" not in said
    assert re.search(f"vtc ({bad:g}|nan)", said) and said.endswith(f"clips {[seen[first][1], seen[first + 1][1]]}")
    assert_same(dict(seen[-1][0].state_dict()), seen[first][2])
    assert not os.path.exists("out/a/model.safetensors")
    state = torch.load(states("out/a")[0], weights_only=True)               # one can look at it again from there
    assert (state["stage"], state["step"]) == (stage, step)
    assert_same(state["model"], seen[first][2])


def rows(sprites, count, **changes):
    """An annotation file of `count` good rows, the last one changed."""
    with open(f"{sprites}/sprites_train.json") as f:
        listed = json.load(f)[:count]
    listed[-1].update(changes)
    with open("rows.json", "w") as f:
        json.dump(listed, f)


def test_a_student_of_other_patches_has_a_teacher_token_for_each_in_training_and_in_scoring(given, sprites, capsys):
    # Frames of 16 pixels: 16 teacher patches of 4, but 4 of the student's.
    train.main(given("--name wide --steps 1 --unmasked-steps 1 --model.patch 8"))
    code, _, err = command("eval.py", ["--task", "sprites", "--data-root", sprites, "--checkpoint", "out/wide/masked",
                                       "--mask", "cluster_stm"], capsys)
    assert code == 0, err
    assert all(0 < row["vtc"] < 100 for row in log("out/wide").values())


@pytest.mark.parametrize("flags, message", [
    ("--micro-batch 3", "batch 8 is no multiple of micro_batch 3"),
    ("--steps 0", "steps 0"),
    ("--mask.ratio 1.0", r"mask ratio is in \[0, 1\), got 1.0"),
    ("--mask.ratio -0.1", r"mask ratio is in \[0, 1\), got -0.1"),
    ("--mask.name clusters", "there is no mask 'clusters'; there are cluster_stm"),
    ("--device tpu", "device wants to be auto, cpu or cuda, is 'tpu'"),
    ("--model.fusion 2", "of 2 text layers 1 to 1 can fuse, got 2"),
    ("--model.heads 3", "16 channels do not divide into 3 heads"),
    ("--data.frames 9", "data.cache_frames 8: wants at least data.frames, 9"),
    ("--data.train nowhere/rows.json", "nowhere/rows.json: no such annotation file"),
    ("--data.root nowhere", "nowhere: no such folder"),
    ("--teacher nowhere", "nowhere is no folder of a SigLIP: none is at .*nowhere or in the hub's cache"),
    ("--text nowhere", "nowhere is no folder of a BERT: none is at "),
    ("--student nowhere", "nowhere is no folder of a student: none is at "),
    ("--tokenizer nowhere.json", "nowhere.json: no such tokenizer.json"),
    ("--model.patch 5", "frames of 16 x 16 pixels do not divide into patches of 5"),
    ("--task sprites", "task 'sprites' is of --stage finetune, the stage is 'all'"),
])
def test_what_cannot_be_run_says_so_in_one_line_and_leaves_no_model(given, sprites, first, capsys, flags, message):
    weights = f"--teacher {first}/out/first/teacher --text {first}/out/first/text "
    rows(sprites, 1)
    code, _, err = command("train.py", argv(sprites, weights + flags), capsys)
    assert_one_line("train.py", code, err, message)
    assert not any(name.endswith((".safetensors", ".tmp")) for _, _, names in os.walk("out") for name in names)


@pytest.mark.parametrize("changes, message", [
    ({"video": "broken.mp4"}, r"row 2: .*broken.mp4: .*\(1 of 3 videos cannot be read, more than"),
    ({"video": "absent.mp4"}, r"rows.json, row 2: .*absent.mp4: no such file \(1 of 3 videos cannot"),
    ({"caption": "?!"}, "rows.json, row 2: empty caption '[?]!'"),
])
def test_bad_data_is_named_before_anything_is_trained(given, sprites, first, capsys, changes, message):
    os.symlink(f"{sprites}/videos", "videos")
    rows(sprites, 3, **changes)
    broken = f"{sprites}/videos/broken.mp4"
    with open(f"{sprites}/videos/train_00000.mp4", "rb") as good, open(broken, "wb") as bad:
        bad.write(good.read()[:1500])
    try:
        code, _, err = command("train.py", argv(sprites, "--data.train rows.json"), capsys)
    finally:
        os.remove(broken)
    assert_one_line("train.py", code, err, message)
    assert not any(name.endswith((".pt", ".safetensors")) for _, _, names in os.walk("out") for name in names)


def test_other_causes_are_one_line_as_well(given, sprites, first, capsys, monkeypatch):
    train.main(given("--name held --steps 1 --unmasked-steps 0"))
    weights = f"--teacher {first}/out/first/teacher --text {first}/out/first/text --unmasked-steps 0 --steps"
    code, _, err = command("train.py", argv(sprites, f"{weights} 1 --name held"), capsys)
    state = "out/held/state/pretrain-0000001.pt"
    assert_one_line("train.py", code, err, f"{state} is of an earlier run: --resume goes on with it, another")
    os.remove("out/held/masked/model.safetensors")
    code, _, err = command("train.py", argv(sprites, f"{weights} 3 --name held --resume"), capsys)
    assert_one_line("train.py", code, err, f"{state} is of a run with steps = 1, asked for is 3")
    if not torch.cuda.is_available():
        code, _, err = command("train.py", argv(sprites, "--device cuda"), capsys)
        assert_one_line("train.py", code, err, "no CUDA GPU")
    monkeypatch.setenv("WORLD_SIZE", "3")                                   # of the stages that this run has
    code, _, err = command("train.py", argv(sprites, f"{weights} 1"), capsys)
    assert_one_line("train.py", code, err, "pretrain: a batch of 8 does not divide into micro-batches of 4 on 3 ranks")


def test_a_process_of_its_own_fails_the_same_way(sprites, tmp_path):
    ended = subprocess.run([sys.executable, f"{ROOT}/train.py", "--data.train", "nowhere.json"], cwd=tmp_path,
                           capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode and ended.stderr == "train.py: nowhere.json: no such annotation file\n"


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
            comment = re.search(rf"^    {f.name}: .*?# (.*)$", body, re.M)
            assert comment, f"{prefix}{f.name} has no comment"
            yield f"--{prefix}{f.name}".replace("_", "-"), comment[1]


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


@pytest.mark.parametrize("preset, vision, text", [("base", 85.6e6, 109e6), ("large", 303.1e6, 334e6)])
def test_presets_build_the_models_of_the_paper(preset, vision, text):
    cfg = deepcopy(train.PRESETS[preset])
    cfg.model.vocab, cfg.model.mask_id, cfg.model.target = 30522, 103, 768
    with torch.device("meta"):
        model = ClusterSTM(cfg.model)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(model.vit) == pytest.approx(vision, rel=2e-3)
    cross = [count(x.crossattention) for x in model.bert.bert.encoder.layer if hasattr(x, "crossattention")]
    assert count(model.bert) - sum(cross) == pytest.approx(text, rel=0.02) and len(cross) == cfg.model.fusion
    assert cfg.teacher.endswith(f"-patch{cfg.model.patch}-{cfg.data.size}")  # the teacher's tokens are the student's


def test_the_default_is_the_embedded_run():
    cfg = train.PRESETS["sprites"]
    assert cfg.data == data.DataConfig() and not (cfg.teacher or cfg.text or cfg.tokenizer or cfg.resume)
