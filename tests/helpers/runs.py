"""Runs of train.py for tests: the tiny configuration, commands in this process, several processes, kills."""

import json
import multiprocessing
import os
import re
import runpy
import socket
import sys
from unittest import mock

import pytest
import torch
import tyro
from safetensors.torch import load_file

import loop
import runtime
import train

ROOT = os.path.dirname(os.path.abspath(train.__file__))
TINY = """--batch 8 --micro-batch 4 --steps 20 --unmasked-steps 6 --unmasked-batch 8 --lr 2e-3 --log-every 1
    --save-every 4 --seed 3 --data.image-size 16 --data.num-frames 4 --data.cache-frames 8 --mask.ratio 0.75
    --vit.patch-size 4 --vit.width 16 --vit.depth 2 --vit.heads 2 --vit.drop-path 0.3 --text.width 16 --text.depth 2
    --text.heads 2 --text.fusion-layers 1 --text.dropout 0.2 --text.max-length 24 --model.embed-dim 8
    --model.decoder-width 16 --model.decoder-depth 1 --model.decoder-heads 2 --toy.width 16 --toy.depth 1
    --toy.heads 2 --toy.text-depth 1 --toy.batch 8 --toy.steps 6 --toy.text-batch 8 --toy.text-steps 6""".split()
FIRST = "--name first --steps 4 --unmasked-steps 2"         # the run of the fixture `first`
LOSSES = ("sigmoid", "mrm", "vtc", "vtm", "mlm", "lm")


def argv(sprites, flags=""):
    """The command line of a tiny run on the sprites in a folder."""
    return [*TINY, "--data.train-file", f"{sprites}/sprites_train.json", "--data.video-root", f"{sprites}/videos",
            *flags.split()]


def config(sprites, flags=""):
    """The config of a tiny run on the sprites in a folder."""
    return tyro.cli(train.Config, args=argv(sprites, flags), default=train.PRESETS["sprites"])


def finetune_arguments(sprites, first, task, flags=""):
    """The command line of a tiny fine-tuning run of the model in `first`."""
    return ["--stage", "finetune", "--task", task, "--init-from", f"{first}/out/first", "--data-root", sprites,
            *"--batch 8 --epochs 2 --data.num-frames 4 --data.cache-frames 8 --log-every 1".split(), *flags.split()]


def finetune_config(*args):
    """The config of that run: finetune_config(sprites, first, task, flags)."""
    default, rest, _ = train.split_defaults(finetune_arguments(*args))
    return tyro.cli(train.Config, args=rest, default=default)


def with_weights(first, flags=""):
    """Flags of a run that is given the teacher and the text encoder of the run in `first`."""
    return f"--teacher {first}/out/first/teacher --text-encoder {first}/out/first/text {flags}"


def write_rows(sprites, count, **changes):
    """Write rows.json, an annotation file of `count` good rows of which the last one is changed."""
    with open(f"{sprites}/sprites_train.json") as f:
        rows = json.load(f)[:count]
    rows[-1].update(changes)
    with open("rows.json", "w") as f:
        json.dump(rows, f)


# ---------------------------------------------------------------------------------------------------------------------
# Results

def read_rows(path):
    """The objects of a JSON-lines file."""
    with open(path) as f:
        return [json.loads(line) for line in f]


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def log(folder):
    """(stage, step) -> its losses, learning rate and gradient norm. Each step stands there once, in order."""
    rows = read_rows(os.path.join(folder, "log.jsonl"))
    steps = [(runtime.STAGES.index(row["stage"]), row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    return {(row["stage"], row["step"]): {k: row[k] for k in (*LOSSES, "grad_norm", "lr") if k in row} for row in rows}


def trained(folder):
    """The weights, less the biases of keys: softmax cancels them, so their gradient is rounding; Adam enlarges it."""
    model = {name: w for name, w in weights(folder).items() if not name.endswith("key.bias")}
    for name in [name for name in model if name.endswith("kv.bias")]:
        parts = 3 if "qkv" in name else 2
        model[name] = torch.cat([w for i, w in enumerate(model[name].chunk(parts)) if i != parts - 2])
    return model


def assert_same(a, b):
    """Two dicts of tensors are equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def command(script, args, capsys):
    """Run `python SCRIPT ARGS`, or `python -m MODULE ARGS`, in this process -> exit code, stdout, stderr."""
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *args])
        try:
            if script.endswith(".py"):
                runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
            else:
                with mock.patch.dict(sys.modules):
                    sys.modules.pop(script, None)
                    runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code or 0
    out, err = capsys.readouterr()
    return (1, out, err + code) if isinstance(code, str) else (code, out, err)


def assert_one_line(script, code, err, message):
    """A command failed with one line that matches `message`; a progress bar may stand before it. tyro prints a box."""
    assert code and "Traceback" not in err
    if code == 2:
        assert re.search(message, " ".join(re.sub("[^!-~]+", " ", err).split())), err
        return
    last = re.split("[\r\n]", err.strip())[-1]
    assert last.startswith(f"{script}: ") and re.search(message, last), err
    assert err.count("\n", 0, -1) == 0 or "it/s" in err, err


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(world, function):
    """Call function() in `world` processes forked from this one, as torchrun would start them."""
    def main(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        function()
        os._exit(0)

    port = free_port()
    processes = [multiprocessing.get_context("fork").Process(target=main, args=(rank,)) for rank in range(world)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
        p.kill()
    assert [p.exitcode for p in processes] == [0] * world


def on_ranks(world, cfg):
    """train.main(cfg) in `world` processes."""
    in_processes(world, lambda: train.main(cfg))


class Killed(Exception):
    """Stands for the end of a process."""


def kill(patch, stage, step):
    """
    End the run before this step of the stage. step None: while the weights before ("before_unmasked") or after
    ("unmasked") the unmasked stage are written.
    """
    if step is not None:
        iterate = loop.iterate_micro_batches

        def stop_before(run, dataset, tokenizer, name, batch, micro_batch, first, steps):
            for i, group in enumerate(iterate(run, dataset, tokenizer, name, batch, micro_batch, first, steps), first):
                if (name, i) == (stage, step):
                    raise Killed
                yield group

        patch.setattr(loop, "iterate_micro_batches", stop_before)
    else:
        name = "save_model" if stage == "before_unmasked" else "save_weights"
        save = getattr(train, name)

        def stop_saving(*args, **kwargs):
            if stage == "before_unmasked" or args[-1] == "out/killed":
                raise Killed
            save(*args, **kwargs)

        patch.setattr(train, name, stop_saving)
