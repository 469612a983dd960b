"""Train tiny runs in tests: their configuration, their results, commands, several processes, kills."""

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
from helpers.benchmarks import load_json, write_json

ROOT = os.path.dirname(os.path.abspath(train.__file__))
TINY = """--batch 8 --micro-batch 4 --steps 20 --unmasked-steps 6 --unmasked-batch 8 --lr 2e-3 --log-every 1
    --save-every 4 --seed 3 --data.image-size 16 --data.num-frames 4 --data.cache-frames 8 --mask.ratio 0.75
    --vit.patch-size 4 --vit.width 16 --vit.depth 2 --vit.heads 2 --vit.drop-path 0.3 --text.width 16 --text.depth 2
    --text.heads 2 --text.fusion-layers 1 --text.dropout 0.2 --text.max-length 24 --model.embed-dim 8
    --model.decoder-width 16 --model.decoder-depth 1 --model.decoder-heads 2 --toy.width 16 --toy.depth 1
    --toy.heads 2 --toy.text-depth 1 --toy.batch 8 --toy.steps 6 --toy.text-batch 8 --toy.text-steps 6""".split()
FIRST_RUN_FLAGS = "--name first --steps 4 --unmasked-steps 2"       # of the fixture `first_run`
LOSSES = ("sigmoid", "mrm", "vtc", "vtm", "mlm", "lm")


def argv(sprites, flags=""):
    """Return the command line of a tiny run on the sprites in a folder."""
    return [*TINY, "--data.train-file", f"{sprites}/sprites_train.json", "--data.video-root", f"{sprites}/videos",
            *flags.split()]


def config(sprites, flags=""):
    """Return the config of a tiny run on the sprites in a folder."""
    return tyro.cli(train.Config, args=argv(sprites, flags), default=train.PRESETS["sprites"])


def make_finetune_config(sprites, first_run, task, flags=""):
    """Return the config of a tiny run that fine-tunes the model of the first run."""
    default, rest, _ = train.split_defaults([
        "--stage", "finetune", "--task", task, "--init-from", f"{first_run}/out/first", "--data-root", sprites,
        *"--batch 8 --epochs 2 --data.num-frames 4 --data.cache-frames 8 --log-every 1".split(), *flags.split()])
    return tyro.cli(train.Config, args=rest, default=default)


def with_weights(first_run, flags=""):
    """Put the flags for the first run's teacher and text encoder before the given flags."""
    return f"--teacher {first_run}/out/first/teacher --text-encoder {first_run}/out/first/text {flags}"


def write_rows(sprites, count, **changes):
    """Write rows.json, an annotation file of `count` valid rows, with changes to the last one."""
    rows = load_json(f"{sprites}/sprites_train.json")[:count]
    rows[-1].update(changes)
    write_json("rows.json", rows)


# ---------------------------------------------------------------------------------------------------------------------
# Results

def read_rows(path):
    """Read the objects of a JSON-lines file."""
    with open(path) as f:
        return [json.loads(line) for line in f]


def weights(folder):
    """Read model.safetensors of a folder."""
    return load_file(os.path.join(folder, "model.safetensors"))


def log(folder):
    """
    Read log.jsonl, which has each step once, in order, and the scores of a validation after the losses of its step
    -> {(stage, step): losses, gradient norm, learning rate}, without the scores.
    """
    rows = read_rows(os.path.join(folder, "log.jsonl"))
    steps = [(runtime.STAGES.index(row["stage"]), row["step"], "val_T2V_R@1" in row) for row in rows]
    assert steps == sorted(set(steps))
    return {(row["stage"], row["step"]): {k: row[k] for k in (*LOSSES, "grad_norm", "lr") if k in row}
            for row in rows if "grad_norm" in row}


def weights_without_key_bias(folder):
    """Read weights except biases of keys: softmax cancels them, so Adam amplifies a gradient that is only rounding."""
    model = {name: w for name, w in weights(folder).items() if not name.endswith("key.bias")}
    for name in [name for name in model if name.endswith("kv.bias")]:
        parts = 3 if "qkv" in name else 2
        model[name] = torch.cat([w for i, w in enumerate(model[name].chunk(parts)) if i != parts - 2])
    return model


def assert_same(a, b):
    """Assert that two dicts of tensors are equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close_runs(a, b):
    """
    Assert that two runs have the same losses and weights to rounding. Weights differed by 1e-6 after 26 steps, each of
    which moves a weight by up to lr = 2e-3.
    """
    rows, expected_rows = log(a), log(b)
    assert rows.keys() == expected_rows.keys() and len(rows) == 26
    for key in rows:
        assert rows[key] == pytest.approx(expected_rows[key], rel=1e-5), key
    assert_close_weights(weights_without_key_bias(a), weights_without_key_bias(b), atol=1e-5)


def assert_close_weights(a, b, atol):
    """Assert that two dicts of tensors are equal within an absolute tolerance; an error names the tensor."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def run_main(function, argv, capsys):
    """Call function() as the main program with this command line -> exit code, stdout, stderr."""
    code = 0
    with mock.patch.object(sys, "argv", argv):
        try:
            function()
        except SystemExit as stop:
            code = stop.code or 0
    out, err = capsys.readouterr()
    return (1, out, err + code) if isinstance(code, str) else (code, out, err)


def command(script, args, capsys):
    """Run `python SCRIPT ARGS`, or `python -m MODULE ARGS`, in this process -> exit code, stdout, stderr."""
    def main():
        if script.endswith(".py"):
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
        else:
            with mock.patch.dict(sys.modules):
                sys.modules.pop(script, None)
                runpy.run_module(script, run_name="__main__", alter_sys=True)

    return run_main(main, [script, *args], capsys)


def assert_one_line(script, code, err, message):
    """
    Assert that a command failed with one line that matches `message`. A progress bar may precede the line. tyro, whose
    exit code is 2, prints a box instead.
    """
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
    """Find a TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork_ranks(world, function):
    """Call function(rank) in `world` processes, which are forked from this one with the environment of torchrun."""
    def main(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        function(rank)
        os._exit(0)

    port = free_port()
    processes = [multiprocessing.get_context("fork").Process(target=main, args=(rank,)) for rank in range(world)]
    for p in processes:
        p.start()
    return processes


def in_processes(world, function):
    """Call function() on `world` ranks and wait for their end."""
    processes = fork_ranks(world, lambda rank: function())
    for p in processes:
        p.join(60)
        p.kill()
    assert [p.exitcode for p in processes] == [0] * world


def on_ranks(world, cfg):
    """Call train.main(cfg) in `world` processes."""
    in_processes(world, lambda: train.main(cfg))


class Killed(Exception):
    """Stand for the death of the process."""


def kill(patch, stage, step):
    """
    Patch the run to raise Killed before this step of the stage. With step None it is raised when the model is written,
    before ("before_unmasked") or after ("unmasked") the unmasked stage.
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
