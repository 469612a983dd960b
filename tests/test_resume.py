"""Stop, kill and resume runs, on the same and on another number of ranks, and under torchrun."""

import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from helpers.benchmarks import load_json
from helpers.processes import (
    LOADER,
    LONG,
    PAUSE,
    SHORT,
    assert_same_run,
    assert_train_error,
    block_forever,
    call_in_step,
    interrupt,
    launch_ranks,
    num_logged,
    send_to_self,
    wait_for_exit,
    wait_until,
)
from helpers.runs import ROOT, assert_same, free_port, log, weights, weights_without_key_bias

import data
import eval as evaluation
import loop
import train
from runtime import list_checkpoints
from targets import TargetProvider

# ---------------------------------------------------------------------------------------------------------------------
# SIGTERM and SIGINT

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_stops_after_the_step_and_the_run_resumes_bit_for_bit(run_config, undisturbed_run, start_process,
                                                                       number):
    process = start_process(LONG)
    wait_until(lambda: num_logged() > 2 or process.poll() is not None)
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    step = int(re.fullmatch(r"out/run: stopped after step (\d+) of pretrain; --resume continues it\n", out)[1])
    assert max(log("out/run")) == ("pretrain", step)                        # the last step is logged, and none after it
    assert list_checkpoints("out/run")[0] == f"out/run/checkpoints/pretrain-{step:07d}.pt"
    train.main(run_config(f"{LONG} --resume"))
    assert_same_run(undisturbed_run(LONG))


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_sigterm_to_one_rank_stops_all_after_the_same_step(run_config, undisturbed_run, world, rank, every):
    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, 4, send_to_self(signal.SIGTERM), rank)
        with launch_ranks(world, run_config(SHORT + every)) as processes:
            (code, out, err), *others = wait_for_exit(processes)
    assert code == 0 and out == "out/run: stopped after step 5 of pretrain; --resume continues it\n", err
    assert all((code, out) == (0, "") for code, out, _ in others), others   # only rank 0 prints
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000005.pt"
    with launch_ranks(world, run_config(f"{SHORT} --resume --save-every 4")) as processes:
        assert all(code == 0 for code, *_ in wait_for_exit(processes)), open("0.err").read()
    expected = undisturbed_run(SHORT, world)
    assert_same(weights("out/run"), weights(expected))
    rows = log("out/run")
    assert rows == {key: row for key, row in log(expected).items() if key in rows}
    assert len(rows) == (5 if every else 10)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage, step", [("pretrain", 8), ("unmasked", 2)])
def test_sigterm_in_the_last_save_of_a_stage_prevents_the_next_stage(run_config, undisturbed_run, world, stage, step):
    save_checkpoint = loop.save_checkpoint

    def terminate_and_save(run, current_stage, current_step, *args):
        if (current_stage, current_step) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)                            # to rank 0 alone, which saves
        save_checkpoint(run, current_stage, current_step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", terminate_and_save)
        with launch_ranks(world, run_config(SHORT)) as processes:
            (code, out, err), *others = wait_for_exit(processes)
    assert code == 0 and out == f"out/run: stopped after step {step} of {stage}; --resume continues it\n", err
    assert all((code, out) == (0, "") for code, out, _ in others), others
    assert os.path.exists("out/run/before_unmasked") == (stage == "unmasked")
    assert not os.path.exists("out/run/model.safetensors")
    if world == 1:
        train.main(run_config(f"{SHORT} --resume"))
        assert_same_run(undisturbed_run(SHORT))


@pytest.mark.parametrize("world, number", [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGINT)])
def test_loader_workers_ignore_a_signal_to_all_processes(run_config, undisturbed_run, world, number):
    """A terminal sends SIGINT to all processes of a command."""
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world):                       # each rank and its loaders are a process group
            call_in_step(patch, 4, lambda: os.killpg(0, number), rank)
        with launch_ranks(world, run_config(SHORT + LOADER)) as processes:
            assert [code for code, *_ in wait_for_exit(processes)] == [0] * world, open("0.err").read()
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000005.pt"
    if world == 1:
        train.main(run_config(f"{SHORT} {LOADER} --resume"))
        assert_same_run(undisturbed_run(SHORT + LOADER))


@pytest.mark.parametrize("world, owner, name, flags", [
    (1, data, "build_frame_cache", ""),
    (2, data, "build_frame_cache", ""),             # the other rank waits
    (1, TargetProvider, "lookup", "--data.num-views 1"),
    (1, TargetProvider, "compute_and_store", "--data.num-views 1"),
    (1, train, "save_model", ""),
], ids=["decoding", "decoding on two ranks", "reading targets", "computing targets", "writing a model"])
def test_sigterm_outside_of_a_step_ends_the_run_at_once(run_config, undisturbed_run, world, owner, name, flags):
    in_step, function, calls = name in ("lookup", "compute_and_store"), getattr(owner, name), []

    def call_slowly(*args):
        calls.append(args)
        if len(calls) == (2 if in_step else 1):
            open("blocked", "w").close()
            time.sleep(2 if in_step else PAUSE)
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call_slowly)
        with launch_ranks(world, run_config(SHORT + flags)) as processes:
            wait_until(lambda: os.path.exists("blocked"))
            for p in reversed(processes):
                os.kill(p.pid, signal.SIGTERM)
            for code, out, err in wait_for_exit(processes):
                assert code == 0 and "Traceback" not in err, err
                assert ("stopped after step" in out) == in_step
    if not list_checkpoints("out/run"):
        assert name == "build_frame_cache"
        train.main(run_config(SHORT + flags))           # the folder of a run without checkpoints can be used again
    else:
        train.main(run_config(f"{SHORT} {flags} --resume"))
    assert_same_run(undisturbed_run(SHORT + flags))


def test_sigterm_during_scoring_stops_at_once_and_resume_scores_again(finetune_config, monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config("sprites", "--name undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", block_forever)
        with launch_ranks(1, finetune_config("sprites", "--name run")) as processes:
            wait_until(lambda: os.path.exists("blocked"))
            os.kill(processes[0].pid, signal.SIGTERM)
            (code, _, err), = wait_for_exit(processes)
    assert code == 0, err
    assert list_checkpoints("out/run") == ["out/run/checkpoints/finetune-0000003.pt"]
    assert not os.path.exists("out/run/epochs.json")
    train.main(finetune_config("sprites", "--name run --resume"))
    assert_same(weights("out/run"), weights("out/undisturbed"))
    assert load_json("out/run/epochs.json") == load_json("out/undisturbed/epochs.json")


def test_sigterm_in_a_step_after_a_scored_epoch_waits_for_the_step(finetune_config):
    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, 5, send_to_self(signal.SIGTERM))                # of two epochs of four steps
        with launch_ranks(1, finetune_config("sprites", "--name run --batch 6")) as processes:
            (code, out, err), = wait_for_exit(processes)
    assert code == 0 and "out/run: stopped after step 6 of finetune; --resume" in out, err
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/finetune-0000006.pt"


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoints_are_written_every_so_many_minutes_too(run_config, undisturbed_run, world, monkeypatch):
    """The clock of each rank jumps by an hour in step 4, that of rank 0 alone counts."""
    hours, save_checkpoint, monotonic = [0], loop.save_checkpoint, time.monotonic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: monotonic() + 3600 * hours[0])
        patch.setattr(loop, "save_checkpoint", lambda run, stage, step, *args: (
            open("saved", "a").write(f"{stage} {step}\n"), save_checkpoint(run, stage, step, *args)))
        for rank in range(world):
            call_in_step(patch, 3 + rank, lambda: hours.append(hours.pop() + 1), rank)
        with launch_ranks(world, run_config(f"{SHORT} --save-every 1000 --log-every 1000")) as processes:
            assert all(code == 0 for code, *_ in wait_for_exit(processes)), open("0.err").read()
    # The request goes with the flags of step 3, which are read in step 4, before its update.
    assert open("saved").read().split("\n")[:-1] == ["pretrain 4", "pretrain 8", "unmasked 2"]
    assert_same(weights("out/run"), weights(undisturbed_run(SHORT, world)))
    train.main(run_config(f"{SHORT} --resume --save-minutes 0"))


# ---------------------------------------------------------------------------------------------------------------------
# SIGKILL, and another number of ranks

@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_killed_at_any_step_resumes_bit_for_bit(run_config, undisturbed_run, start_process, seed):
    min_steps = np.random.default_rng(seed).integers(1, 18)
    process = start_process(LONG)
    wait_until(lambda: num_logged() >= min_steps or process.poll() is not None)
    process.kill()
    _, err = process.communicate(timeout=90)
    assert process.returncode == -signal.SIGKILL, err
    train.main(run_config(f"{LONG} --resume"))
    assert_same_run(undisturbed_run(LONG))


def test_a_run_killed_many_times_equals_an_undisturbed_one(run_config, undisturbed_run):
    rng, kills = np.random.default_rng(0), 0
    while not os.path.exists("out/run/model.safetensors"):
        with launch_ranks(1, run_config(f"{LONG} --save-every 2" + " --resume" * (kills > 0))) as (process,):
            min_lines = num_logged() + rng.integers(3, 7)
            wait_until(lambda n=min_lines, p=process: num_logged() >= n or p.exitcode is not None)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            process.join()
        kills += 1
    assert kills >= 3
    assert_same_run(undisturbed_run(LONG))


def assert_equal_to_rounding(expected):
    """
    Assert that the weights of out/run are those of another run to rounding. A step moves a weight by up to 2e-3. Adam
    amplifies a gradient that is only rounding: one weight of a key was off by 1.3e-5, all others by less than 1e-6.
    """
    a, b = weights_without_key_bias("out/run"), weights_without_key_bias(expected)
    assert a.keys() == b.keys()
    differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).sort().values
    assert differences[-3] < 1e-6 and differences[-1] < 1e-4


@pytest.mark.parametrize("before, after", [(1, 2), (1, 4), (2, 1)])
def test_resume_on_another_number_of_ranks_agrees_to_rounding(run_config, undisturbed_run, before, after):
    flags = f"{SHORT} --micro-batch 2"
    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, 5, send_to_self(signal.SIGKILL), before - 1)
        with launch_ranks(before, run_config(flags)) as processes:
            assert wait_for_exit(processes)[-1][0] == -signal.SIGKILL
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000004.pt"
    with launch_ranks(after, run_config(f"{flags} --resume")) as processes:
        assert all(code == 0 for code, *_ in wait_for_exit(processes)), open("0.err").read()
    assert_equal_to_rounding(undisturbed_run(flags, before))
    rows, expected = log("out/run"), log(undisturbed_run(flags, before))
    assert rows.keys() == expected.keys()
    for key in rows:
        assert rows[key] == pytest.approx(expected[key], rel=1e-3), key


def test_resume_keeps_the_micro_batch_size_of_the_start(run_config, undisturbed_run):
    flags = f"{SHORT} --micro-batch 0"                  # a rank's share of the batch: 4 of 8 clips on two ranks
    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, 5, send_to_self(signal.SIGTERM))
        with launch_ranks(2, run_config(flags)) as processes:
            assert [code for code, *_ in wait_for_exit(processes)] == [0, 0]
    assert load_json("out/run/run_state.json")["micro_batch of pretrain"] == 4
    train.main(run_config(f"{flags} --resume"))
    assert_equal_to_rounding(undisturbed_run(flags, 2))


def test_resume_refuses_a_micro_batch_size_that_does_not_fit_the_ranks(run_config):
    interrupt(run_config(f"{SHORT} --micro-batch 0"))
    before = {path: os.stat(path).st_mtime_ns for path in list_checkpoints("out/run")}
    with launch_ranks(2, run_config(f"{SHORT} --micro-batch 0 --resume")) as processes:
        for code, _, err in wait_for_exit(processes):
            assert_train_error(code, err, "pretrain: batch .* 8, 8 .* 2; the number of ranks must divide 1$")
    assert {path: os.stat(path).st_mtime_ns for path in list_checkpoints("out/run")} == before


# ---------------------------------------------------------------------------------------------------------------------
# torchrun

TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node=1"


def test_two_nodes_train_the_same_model_as_one_process(undisturbed_run, start_process):
    port = free_port()
    nodes = [start_process(SHORT, (*TORCHRUN, "--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1",
                                   f"--master_port={port}", f"{ROOT}/train.py")) for node in range(2)]
    (out, err), (other_out, _) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], err[-3000:]
    assert out.count("out/run: trained") == 1 and "trained" not in other_out
    assert_equal_to_rounding(undisturbed_run(SHORT))


KILL_RANK_1_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {ROOT!r})
import loop, train
from runtime import run_cli
compute_rate = loop.learning_rate
def learning_rate(step, *args):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (5, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
        open("steps", "a").write(f"{{step}} ")
    return compute_rate(step, *args)
loop.learning_rate = learning_rate
run_cli("train.py", train.cli)
"""


def test_torchrun_restarts_a_killed_rank_and_the_run_resumes_by_itself(undisturbed_run, start_process, tmp_path):
    (tmp_path / "kill_rank.py").write_text(KILL_RANK_1_ONCE)
    command = *TORCHRUN[:2], "--standalone", "--nproc_per_node=2", "--max-restarts=1", "kill_rank.py"
    agent = start_process(SHORT, command)
    _, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err[-3000:]
    assert open("steps").read().startswith("4 ")                            # a run from step 0 would end the same
    assert_same_run(undisturbed_run(SHORT, 2))


def test_a_restart_by_torchrun_does_not_resume_an_earlier_run(run_config, start_process):
    interrupt(run_config(SHORT))
    before, rows = list_checkpoints("out/run"), open("out/run/log.jsonl").read()
    agent = start_process(SHORT, (*TORCHRUN, "--standalone", "--max-restarts=1", f"{ROOT}/train.py"))
    _, err = agent.communicate(timeout=120)
    message = "train.py: out/run/checkpoints/pretrain-0000004.pt belongs to an earlier run: --resume"
    assert agent.returncode and err.count(message) == 2, err[-3000:]
    assert list_checkpoints("out/run") == before and open("out/run/log.jsonl").read() == rows
