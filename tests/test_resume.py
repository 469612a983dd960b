"""Runs that are stopped, killed and resumed, on the same and on another number of ranks, and under torchrun."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from helpers.processes import (
    LOADER,
    LONG,
    PAUSE,
    SHORT,
    assert_ends_as,
    assert_said,
    end_me,
    ended,
    hold,
    in_step,
    lines,
    ranks,
    until,
)
from helpers.runs import (
    ROOT,
    Killed,
    assert_same,
    free_port,
    kill,
    log,
    trained,
    weights,
)

import data
import eval as evaluation
import loop
import train
from runtime import list_checkpoints
from targets import TargetProvider

# ---------------------------------------------------------------------------------------------------------------------
# SIGTERM

def test_sigterm_ends_a_process_after_its_step_and_the_run_goes_on_bit_for_bit(given, whole, begun):
    process = begun(LONG)
    until(lambda: lines("out/run/log.jsonl") > 2 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    step = int(re.fullmatch(r"out/run: stopped after step (\d+) of pretrain; --resume continues it\n", out)[1])
    assert max(log("out/run")) == ("pretrain", step)                        # taken and logged, but no other
    assert list_checkpoints("out/run")[0] == f"out/run/checkpoints/pretrain-{step:07d}.pt"
    train.main(given(f"{LONG} --resume"))
    assert_ends_as(whole(LONG))


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_sigterm_to_one_rank_ends_all_after_the_same_step(given, whole, world, rank, every):
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 4, end_me(signal.SIGTERM), rank)
        with ranks(world, given(SHORT + every)) as processes:
            (code, out, err), *others = ended(processes)
    assert code == 0 and out == "out/run: stopped after step 5 of pretrain; --resume continues it\n", err
    assert all((code, out) == (0, "") for code, out, _ in others), others   # one rank speaks for both
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000005.pt"
    with ranks(world, given(f"{SHORT} --resume --save-every 4")) as processes:
        assert all(code == 0 for code, *_ in ended(processes)), open("0.err").read()
    expected = whole(SHORT, world)
    assert_same(weights("out/run"), weights(expected))
    rows = log("out/run")
    assert rows == {key: row for key, row in log(expected).items() if key in rows}
    assert len(rows) == (5 if every else 10)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage, step", [("pretrain", 8), ("unmasked", 2)])
def test_sigterm_in_the_last_save_of_a_stage_ends_all_before_what_follows(given, whole, world, stage, step):
    real = loop.save_checkpoint

    def save(run, at, taken, *rest):
        if (at, taken) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)                            # rank 0 alone: it saves
        real(run, at, taken, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        with ranks(world, given(SHORT)) as processes:
            (code, out, err), *others = ended(processes)
    assert code == 0 and out == f"out/run: stopped after step {step} of {stage}; --resume continues it\n", err
    assert all((code, out) == (0, "") for code, out, _ in others), others
    assert os.path.exists("out/run/before_unmasked") == (stage == "unmasked")
    assert not os.path.exists("out/run/model.safetensors")
    if world == 1:
        train.main(given(f"{SHORT} --resume"))
        assert_ends_as(whole(SHORT))


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_to_all_processes_leaves_the_loaders_to_the_training(given, whole, world):
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world):                                           # each has a group, loaders and all
            in_step(patch, 4, lambda: os.killpg(0, signal.SIGTERM), rank)
        with ranks(world, given(SHORT + LOADER)) as processes:
            assert [code for code, *_ in ended(processes)] == [0] * world, open("0.err").read()
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000005.pt"
    if world == 1:
        train.main(given(f"{SHORT} {LOADER} --resume"))
        assert_ends_as(whole(SHORT + LOADER))


@pytest.mark.parametrize("world, place, name, flags", [
    (1, data, "build_frame_cache", ""),
    (2, data, "build_frame_cache", ""),             # the other rank waits
    (1, TargetProvider, "lookup", "--data.num-views 1"),
    (1, TargetProvider, "compute_and_store", "--data.num-views 1"),
    (1, train, "save_model", ""),
], ids=["decoding", "decoding on two ranks", "reading targets", "computing targets", "writing a model"])
def test_sigterm_outside_of_a_step_ends_the_run_at_once(given, whole, world, place, name, flags):
    inside, real, calls = name in ("lookup", "compute_and_store"), getattr(place, name), []

    def slow(*args):
        calls.append(args)
        if len(calls) == (2 if inside else 1):
            open("held", "w").close()
            time.sleep(2 if inside else PAUSE)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, slow)
        with ranks(world, given(SHORT + flags)) as processes:
            until(lambda: os.path.exists("held"))
            for p in reversed(processes):
                os.kill(p.pid, signal.SIGTERM)
            for code, out, err in ended(processes):
                assert code == 0 and "Traceback" not in err, err
                assert ("stopped after step" in out) == inside
    if not list_checkpoints("out/run"):
        assert name == "build_frame_cache"
        train.main(given(SHORT + flags))                                    # nothing there that would be in the way
    else:
        train.main(given(f"{SHORT} {flags} --resume"))
    assert_ends_as(whole(SHORT + flags))


def test_sigterm_while_an_epoch_is_scored_ends_the_run_at_once_and_it_is_scored_when_that_goes_on(tune, monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(tune("sprites", "--name whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", hold)
        with ranks(1, tune("sprites", "--name run")) as processes:
            until(lambda: os.path.exists("held"))
            os.kill(processes[0].pid, signal.SIGTERM)
            (code, _, err), = ended(processes)
    assert code == 0, err
    assert list_checkpoints("out/run") == ["out/run/checkpoints/finetune-0000003.pt"]
    assert not os.path.exists("out/run/epochs.json")
    train.main(tune("sprites", "--name run --resume"))
    assert_same(weights("out/run"), weights("out/whole"))
    assert json.load(open("out/run/epochs.json")) == json.load(open("out/whole/epochs.json"))


# ---------------------------------------------------------------------------------------------------------------------
# SIGKILL, and other numbers of ranks

@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_that_is_killed_at_any_step_goes_on_bit_for_bit(given, whole, begun, seed):
    taken = np.random.default_rng(seed).integers(1, 18)
    process = begun(LONG)
    until(lambda: lines("out/run/log.jsonl") >= taken or process.poll() is not None)
    process.kill()
    _, err = process.communicate(timeout=90)
    assert process.returncode == -signal.SIGKILL, err
    train.main(given(f"{LONG} --resume"))
    assert_ends_as(whole(LONG))


def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_that_is_not(given, whole):
    drawn, kills = np.random.default_rng(0), 0
    while not os.path.exists("out/run/model.safetensors"):
        with ranks(1, given(f"{LONG} --save-every 2" + " --resume" * (kills > 0))) as (process,):
            more = lines("out/run/log.jsonl") + drawn.integers(3, 7)
            until(lambda more=more, p=process: lines("out/run/log.jsonl") >= more or p.exitcode is not None)
            time.sleep(drawn.uniform(0, 0.1))
            process.kill()
            process.join()
        kills += 1
    assert kills >= 3
    assert_ends_as(whole(LONG))


def largest_difference(a, b):
    a, b = trained(a), trained(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("before, after", [(1, 2), (1, 4), (2, 1)])
def test_a_run_goes_on_to_rounding_on_another_number_of_ranks(given, whole, before, after):
    flags = f"{SHORT} --micro-batch 2"
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 5, end_me(signal.SIGKILL), before - 1)
        with ranks(before, given(flags)) as processes:
            assert ended(processes)[-1][0] == -signal.SIGKILL
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000004.pt"
    with ranks(after, given(f"{flags} --resume")) as processes:
        assert all(code == 0 for code, *_ in ended(processes)), open("0.err").read()
    difference = largest_difference("out/run", whole(flags, before))
    assert difference < 1e-5
    one, other = log("out/run"), log(whole(flags, before))
    assert one.keys() == other.keys()
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=1e-3), key


def test_a_run_keeps_the_micro_batches_that_it_began_with(given, whole):
    flags = f"{SHORT} --micro-batch 0"                                      # each rank's share: of 8 clips 4 and 4
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 5, end_me(signal.SIGTERM))
        with ranks(2, given(flags)) as processes:
            assert [code for code, *_ in ended(processes)] == [0, 0]
    assert json.load(open("out/run/run_state.json"))["micro_batch of pretrain"] == 4
    train.main(given(f"{flags} --resume"))
    difference = largest_difference("out/run", whole(flags, 2))
    assert difference < 1e-5


def test_micro_batches_that_do_not_divide_over_the_new_ranks_are_refused(given):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 5)
        with pytest.raises(Killed):
            train.main(given(f"{SHORT} --micro-batch 0"))
    before = {path: os.stat(path).st_mtime_ns for path in list_checkpoints("out/run")}
    with ranks(2, given(f"{SHORT} --micro-batch 0 --resume")) as processes:
        for code, _, err in ended(processes):
            assert_said(code, err, "pretrain: batch .* 8, 8 .* 2$")
    assert {path: os.stat(path).st_mtime_ns for path in list_checkpoints("out/run")} == before


# ---------------------------------------------------------------------------------------------------------------------
# torchrun

TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node=1"


def test_two_nodes_train_what_one_process_trains(whole, begun):
    port = free_port()
    nodes = [begun(SHORT, (*TORCHRUN, "--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1",
                           f"--master_port={port}", f"{ROOT}/train.py")) for node in range(2)]
    (out, err), (silent, _) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], err[-3000:]
    assert out.count("out/run: trained") == 1 and "trained" not in silent
    difference = largest_difference("out/run", whole(SHORT))
    assert difference < 1e-5


DYING = f"""
import os, signal, sys
sys.path.insert(0, {ROOT!r})
import loop, train
from runtime import run_cli
real = loop.learning_rate
def rate(step, *rest):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (5, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, *rest)
loop.learning_rate = rate
run_cli("train.py", train.cli)
"""


def test_torchrun_starts_a_lost_rank_anew_and_the_run_goes_on_by_itself(whole, begun, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    agent = begun(SHORT, (*TORCHRUN[:2], "--standalone", "--nproc_per_node=2", "--max-restarts=1", "dying.py"))
    _, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err[-3000:]
    assert "pretrain step 5: rank 0 has lost another rank" in err
    assert_ends_as(whole(SHORT, 2))


def test_torchrun_that_starts_anew_does_not_go_on_with_a_run_that_was_there_before(given, begun):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 5)
        with pytest.raises(Killed):
            train.main(given(SHORT))
    before, rows = list_checkpoints("out/run"), open("out/run/log.jsonl").read()
    agent = begun(SHORT, (*TORCHRUN, "--standalone", "--max-restarts=1", f"{ROOT}/train.py"))
    _, err = agent.communicate(timeout=120)
    refused = "train.py: out/run/checkpoints/pretrain-0000004.pt belongs to an earlier run: --resume"
    assert agent.returncode and err.count(refused) == 2, err[-3000:]
    assert list_checkpoints("out/run") == before and open("out/run/log.jsonl").read() == rows
