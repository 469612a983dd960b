"""Runs that something befalls: signals, lost processes, other numbers of them, damaged files, full disks, NaN."""

import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import test_finetune
import test_train
import torch
from test_train import (  # noqa: F401  (two are fixtures)
    ROOT,
    Killed,
    argv,
    assert_same,
    config,
    first_run,
    kill,
    log,
    on_ranks,
    rows,
    small_sprites,
    trained,
    weights,
)

import data
import eval as scoring
import train
from data import Clips
from model import ClusterSTM
from runs import Run, damage, explain, states

given, tune = test_train.given, test_finetune.tune     # fixtures
STEPS = 8
SHORT = f"--name run --data.views 0 --steps {STEPS} --unmasked-steps 2 --save-every 2 "
LONG = "--name run --data.views 0 "                 # 20 + 6 steps
LOADER = "--data.workers 1 --data.no-cache "
PAUSE = 300                                         # seconds; a test that has to wait for its end has failed


# ---------------------------------------------------------------------------------------------------------------------
# Runs in other processes

@pytest.fixture(scope="module", name="whole")
def run_that_nothing_befell(sprites, first, tmp_path_factory):
    """whole(flags, ranks) -> its folder."""
    done = {}

    def run(flags=SHORT, ranks=1):
        if (flags, ranks) not in done:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                cfg = config(sprites, f"--teacher {first}/out/first/teacher --text {first}/out/first/text {flags}")
                train.main(cfg) if ranks == 1 else on_ranks(ranks, cfg)
            done[flags, ranks] = str(folder / "out" / "run")
        return done[flags, ranks]
    return run


def assert_ends_as(whole, folder="out/run"):
    """Bit for bit, and with the same losses."""
    for part in ("", "masked"):
        assert_same(weights(os.path.join(folder, part)), weights(os.path.join(whole, part)))
    assert log(folder) == log(whole)
    assert not [name for _, _, names in os.walk("out") for name in names if name.endswith(".tmp")]


@contextmanager
def ranks(world, cfg):
    """`python train.py` with this config in `world` processes, forked from this one with all that is patched in it."""
    def main(rank):
        os.setsid()
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        code = 0
        try:
            data.command("train.py", lambda: train.main(cfg))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stderr.flush()
        os._exit(code)

    port = free_port()
    processes = [multiprocessing.get_context("fork").Process(target=main, args=(rank,)) for rank in range(world)]
    for p in processes:
        p.start()
    try:
        yield processes
    finally:
        for p in processes:
            p.kill()
            with suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)                            # its loader processes
            p.join()


def ended(processes):
    """-> (exit code, stdout, stderr) of each."""
    end = time.time() + 90
    for p in processes:
        p.join(max(0, end - time.time()))
    assert all(p.exitcode is not None for p in processes), "still running"
    return [(p.exitcode, *(open(f"{rank}.{name}").read() for name in ("out", "err")))
            for rank, p in enumerate(processes)]


def assert_said(code, err, message):
    """It failed and said why in one line, beside a progress bar."""
    said = re.findall("train.py: .*", err)
    assert code == 1 and len(said) == 1 and "Traceback" not in err, err
    assert re.match("train.py: " + message, said[0]), err


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(there, seconds=90):
    end = time.time() + seconds
    while not there():
        assert time.time() < end, "it never came"
        time.sleep(0.005)


def in_step(patch, step, do, rank=0):
    """do() in the middle of a step of pretraining, by one of the ranks."""
    real = train.learning_rate

    def rate(at, steps, *rest):
        if (at, steps, int(os.environ.get("RANK", 0))) == (step, STEPS, rank):
            do()
        return real(at, steps, *rest)

    patch.setattr(train, "learning_rate", rate)


def end_me(with_signal):
    return lambda: os.kill(os.getpid(), with_signal)


def hold(*_, **__):
    """Something that takes long."""
    open("held", "w").close()
    time.sleep(PAUSE)


@pytest.fixture
def begun(given, sprites, first, tmp_path):
    """In the folder of `given`, begun(flags, command): a process of its own, the flags being of a run."""
    processes = []

    def begin(flags, command=(f"{ROOT}/train.py",)):
        flags = f"--teacher {first}/out/first/teacher --text {first}/out/first/text {flags}"
        process = subprocess.Popen([sys.executable, *command, *argv(sprites, flags)], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.terminate()                                             # torchrun ends its processes
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
        process.communicate()


def lines(path):
    return open(path).read().count("\n") if os.path.exists(path) else 0


# ---------------------------------------------------------------------------------------------------------------------
# SIGTERM

def test_sigterm_ends_a_process_after_its_step_and_the_run_goes_on_bit_for_bit(given, whole, begun):
    process = begun(LONG)
    until(lambda: lines("out/run/log.jsonl") > 2 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    step = int(re.fullmatch(r"out/run: stopped after step (\d+) of pretrain; --resume goes on\n", out)[1])
    assert max(log("out/run")) == ("pretrain", step)                        # taken and logged, but no other
    assert states("out/run")[0] == f"out/run/state/pretrain-{step:07d}.pt"
    train.main(given(f"{LONG} --resume"))
    assert_ends_as(whole(LONG))


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_sigterm_to_one_rank_ends_all_after_the_same_step(given, whole, world, rank, every):
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 4, end_me(signal.SIGTERM), rank)
        with ranks(world, given(SHORT + every)) as processes:
            (code, out, err), *others = ended(processes)
    assert code == 0 and out == "out/run: stopped after step 5 of pretrain; --resume goes on\n", err
    assert all((code, out) == (0, "") for code, out, _ in others), others   # one rank speaks for both
    assert states("out/run")[0] == "out/run/state/pretrain-0000005.pt"
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
    real = train.save_state

    def save(run, at, taken, *rest):
        if (at, taken) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)                            # rank 0 alone: it saves
        real(run, at, taken, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_state", save)
        with ranks(world, given(SHORT)) as processes:
            (code, out, err), *others = ended(processes)
    assert code == 0 and out == f"out/run: stopped after step {step} of {stage}; --resume goes on\n", err
    assert all((code, out) == (0, "") for code, out, _ in others), others
    assert os.path.exists("out/run/masked") == (stage == "unmasked") and not os.path.exists("out/run/model.safetensors")
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
    assert states("out/run")[0] == "out/run/state/pretrain-0000005.pt"
    if world == 1:
        train.main(given(f"{SHORT} {LOADER} --resume"))
        assert_ends_as(whole(SHORT + LOADER))


@pytest.mark.parametrize("world, place, name, flags", [
    (1, data, "decode_cache", ""),
    (2, data, "decode_cache", ""),                  # the other rank waits
    (1, train.Guides, "look_up", "--data.views 1"),
    (1, train.Guides, "ask_and_keep", "--data.views 1"),
    (1, train.Guides, "make_codes", "--data.views 1 --guide-codes 5"),
    (1, train, "save_model", ""),
], ids=["decoding", "decoding on two ranks", "in a step", "in a step that asks", "making codes", "writing a model"])
def test_sigterm_outside_of_a_step_ends_the_run_at_once(given, whole, world, place, name, flags):
    inside, real, calls = name in ("look_up", "ask_and_keep"), getattr(place, name), []

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
    if not states("out/run"):
        assert name in ("decode_cache", "make_codes")
        train.main(given(SHORT + flags))                                    # nothing there that would be in the way
    else:
        train.main(given(f"{SHORT} {flags} --resume"))
    assert_ends_as(whole(SHORT + flags))


def test_sigterm_while_an_epoch_is_scored_ends_the_run_at_once_and_it_is_scored_when_that_goes_on(tune, monkeypatch):
    monkeypatch.setattr(scoring, "main", lambda cfg: None)
    train.main(tune("sprites", "--name whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", hold)
        with ranks(1, tune("sprites", "--name run")) as processes:
            until(lambda: os.path.exists("held"))
            os.kill(processes[0].pid, signal.SIGTERM)
            (code, _, err), = ended(processes)
    assert code == 0, err
    assert states("out/run") == ["out/run/state/finetune-0000003.pt"] and not os.path.exists("out/run/epochs.json")
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
    assert states("out/run")[0] == "out/run/state/pretrain-0000004.pt"
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
    assert json.load(open("out/run/run.json"))["micro_batch of pretrain"] == 4
    train.main(given(f"{flags} --resume"))
    difference = largest_difference("out/run", whole(flags, 2))
    assert difference < 1e-5


def test_micro_batches_that_do_not_divide_over_the_new_ranks_are_refused(given):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 5)
        with pytest.raises(Killed):
            train.main(given(f"{SHORT} --micro-batch 0"))
    before = {path: os.stat(path).st_mtime_ns for path in states("out/run")}
    with ranks(2, given(f"{SHORT} --micro-batch 0 --resume")) as processes:
        for code, _, err in ended(processes):
            assert_said(code, err, "pretrain: the run began with micro-batches of 8, into which a "
                                   "batch of 8 does not divide on 2 ranks")
    assert {path: os.stat(path).st_mtime_ns for path in states("out/run")} == before


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
import data, train
real = train.learning_rate
def rate(step, *rest):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (5, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, *rest)
train.learning_rate = rate
data.command("train.py", train.run_command)
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
    before, rows = states("out/run"), open("out/run/log.jsonl").read()
    agent = begun(SHORT, (*TORCHRUN, "--standalone", "--max-restarts=1", f"{ROOT}/train.py"))
    _, err = agent.communicate(timeout=120)
    refused = "train.py: out/run/state/pretrain-0000004.pt is of an earlier run: --resume goes on with it, another"
    assert agent.returncode and err.count(refused) == 2, err[-3000:]
    assert states("out/run") == before and open("out/run/log.jsonl").read() == rows


# ---------------------------------------------------------------------------------------------------------------------
# States

def interrupt(cfg, step=5):
    """In this process."""
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", step)
        with pytest.raises(Killed):
            train.main(cfg)


def flip(path):
    """One byte in the middle of the largest tensor."""
    with zipfile.ZipFile(path) as f:
        part = max((part for part in f.infolist() if "/data/" in part.filename), key=lambda part: part.file_size)
    with open(path, "r+b") as f:
        f.seek(part.header_offset + 26)
        at = part.header_offset + 30 + sum(np.frombuffer(f.read(4), "<u2").tolist()) + part.file_size // 2
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 16]))


def zeros(path):
    size = os.path.getsize(path)
    with open(path, "wb") as f:
        f.write(bytes(size))


DAMAGE = {"a flipped bit": flip, "cut short": lambda path: os.truncate(path, os.path.getsize(path) // 2),
          "cut by a byte": lambda path: os.truncate(path, os.path.getsize(path) - 1),
          "empty": lambda path: os.truncate(path, 0), "zeros": zeros}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_put_aside_and_the_one_before_it_taken(given, whole, capsys, harm):
    interrupt(given(SHORT))
    newest, before = states("out/run")
    harm(newest)
    capsys.readouterr()
    train.main(given(f"{SHORT} --resume"))
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == 1 and said[0].startswith(f"{newest} is damaged (") and f"{newest}.damaged" in said[0]
    assert before.endswith("pretrain-0000002.pt") and os.path.exists(f"{newest}.damaged")
    assert_ends_as(whole())


def test_on_two_ranks_all_take_the_state_before_a_damaged_one(given, whole):
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 5, end_me(signal.SIGKILL))
        with ranks(2, given(SHORT)) as processes:
            ended(processes)
    flip(states("out/run")[0])
    with ranks(2, given(f"{SHORT} --resume")) as processes:
        (code, out, err), (other, silent, _) = ended(processes)
    assert (code, other) == (0, 0) and out.count("is damaged") == 1 and silent == "", err
    assert_ends_as(whole(SHORT, 2))


def test_without_a_whole_state_the_stage_begins_anew_and_says_so(given, whole, capsys):
    interrupt(given(SHORT))
    for path in states("out/run"):
        flip(path)
    capsys.readouterr()
    train.main(given(f"{SHORT} --resume"))
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line or "begins" in line]
    assert sum("is damaged" in line for line in said) == 2
    assert "begins" in said[-1] and "the one before it taken" not in said[-1], said     # there is none before it
    assert_ends_as(whole())


def test_a_file_with_a_flipped_bit_is_damaged_or_reads_as_before(given):
    interrupt(given(SHORT))
    path = states("out/run")[0]
    good, whole = list(parts(torch.load(path, weights_only=True))), open(path, "rb").read()
    drawn, found, directory = np.random.default_rng(0), 0, whole.index(b"PK\1\2")
    flips = [(at, bit) for low, size in ((0, 20), (directory, 50))
             for at, bit in zip(drawn.integers(low, len(whole), size), drawn.integers(8, size=size), strict=True)]
    # A part with this attribute is a folder, of which torch reads nothing: whatever was in memory is the tensor.
    flips += [(whole.rindex(b"PK\1\2", 0, len(whole) - 400) + 38, 4)]
    for at, bit in flips:
        with open("other.pt", "wb") as f:
            f.write(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
        if damage("other.pt"):
            found += 1
        else:
            assert list(parts(torch.load("other.pt", weights_only=True))) == good, (at, bit)
    assert found > 25


def parts(x, name=""):
    """(name, value) of all that is in dicts and lists."""
    if isinstance(x, dict | list | tuple):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from parts(value, f"{name}/{key}")
    else:
        yield name, x.tolist() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("left", ["state/pretrain-0000006.pt.x1y2z3.tmp", "config.json.x1y2z3.tmp",
                                  "masked/config.json.x1y2z3.tmp", "guide/config.json.x1y2z3.tmp"])
def test_what_a_killed_process_was_writing_is_removed(given, whole, left):
    interrupt(given(SHORT))
    beside = "out/run/eval-sprites-all.json.x1y2z3.tmp"             # another process may be writing it
    left = os.path.join("out/run", left)
    os.makedirs(os.path.dirname(left), exist_ok=True)
    for path in (left, beside):
        shutil.copy(states("out/run")[0], path)
    train.main(given(f"{SHORT} --resume"))
    assert not os.path.exists(left)
    os.remove(beside)
    assert_ends_as(whole())


def test_the_newest_states_are_kept_whatever_their_stage(given):
    train.main(given(f"{SHORT} --keep 3"))
    names = ["unmasked-0000002.pt", "pretrain-0000008.pt", "pretrain-0000006.pt"]
    assert states("out/run") == [f"out/run/state/{name}" for name in names]


@pytest.mark.parametrize("step, kept", [(5, "out/run/state/pretrain-0000004.pt is whole, --resume goes on from it"),
                                        (1, "no state was written yet")])
def test_a_full_disk_is_said_in_one_line_and_leaves_what_was_there(given, whole, step, kept):
    limit = 30_000                                  # bytes a file: less than a state, more than the log
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        with ranks(1, given(SHORT)) as processes:
            (code, _, err), = ended(processes)
    path = f"out/run/state/pretrain-{step + 1:07d}.pt"
    assert_said(code, err, rf"{path} could not be written \(.*File too large.*\); {kept}$")
    assert states("out/run") == [f"out/run/state/pretrain-{s:07d}.pt" for s in range(step - 1, 0, -2)]
    assert not [name for name in os.listdir("out/run/state") if not name.endswith(".pt")]
    train.main(given(f"{SHORT} --resume"))
    assert_ends_as(whole())


# ---------------------------------------------------------------------------------------------------------------------
# Two runs in one folder, other data

def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(given, whole, begun):
    def pause():
        open("held", "w").close()
        until(lambda: os.path.exists("go"), PAUSE)

    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 5, pause)
        with ranks(1, given(SHORT)) as processes:
            until(lambda: os.path.exists("held"))
            for flags in (SHORT, f"{SHORT} --resume"):
                second = begun(flags)
                _, err = second.communicate(timeout=90)
                assert_said(second.returncode, err, rf"out/run is in use by another run \(.*process {os.getpid()}\b")
            open("go", "w").close()
            assert ended(processes)[0][0] == 0
    assert_ends_as(whole())


def test_the_folder_of_a_killed_run_is_free_though_its_loaders_still_live(given, whole):
    real = Clips.__getitem__

    def note(self, n):
        if torch.utils.data.get_worker_info():
            data.write_atomically("loader", str(os.getpid()))
        return real(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clips, "__getitem__", note)
        in_step(patch, 5, hold)
        with ranks(1, given(SHORT + LOADER)) as (process,):
            until(lambda: os.path.exists("held"))
            patch.undo()
            loader = int(open("loader").read())
            os.kill(loader, signal.SIGSTOP)                                 # it does not even see that it is alone
            process.kill()
            process.join()
            train.main(given(f"{SHORT} {LOADER} --resume"))
            os.kill(loader, 0)                                              # it was there all the time
    assert_ends_as(whole(SHORT + LOADER))


def test_a_run_does_not_go_on_with_other_annotations(given, sprites):
    flags = f"{SHORT} --data.train rows.json"
    rows(sprites, 24)
    train.main(given(flags))
    whole = weights("out/run")
    shutil.rmtree("out/run")
    interrupt(given(flags))
    rows(sprites, 24, caption="a red square rests")
    with pytest.raises(ValueError, match="^out/run/run.json: the annotations are others than those that the run began"):
        train.main(given(f"{flags} --resume"))
    rows(sprites, 24)                                                       # as they were, but of another time
    os.utime("rows.json", (0, 0))
    train.main(given(f"{flags} --resume"))
    assert_same(weights("out/run"), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Lost processes

def test_a_killed_loader_is_named_with_the_step_and_the_state(given):
    real = Clips.__getitem__

    def dies(self, n):
        if n == 5 * 8 + 3 and torch.utils.data.get_worker_info():           # while step 4 is taken
            end_me(signal.SIGKILL)()
        return real(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clips, "__getitem__", dies)
        with ranks(1, given(f"{SHORT} {LOADER} --save-every 3")) as processes:
            (code, _, err), = ended(processes)
    assert_said(code, err, r"pretrain step [45]: a loader process was killed; out of memory\? \(.*\); "
                           "out/run/state/pretrain-0000003.pt is whole, --resume goes on from it$")
    assert damage("out/run/state/pretrain-0000003.pt") == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_with_one_line(given, rank):
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 5, end_me(signal.SIGKILL), rank)
        with ranks(2, given(SHORT)) as processes:
            found = ended(processes)
    assert found[rank][0] == -signal.SIGKILL
    code, _, err = found[1 - rank]
    assert_said(code, err, rf"pretrain step 5: rank {1 - rank} has lost another rank \(.*\); "
                           "out/run/state/pretrain-0000004.pt is whole, --resume goes on from it$")
    assert damage("out/run/state/pretrain-0000004.pt") == ""


def test_a_rank_that_is_killed_while_the_other_waits_ends_that_too(given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "decode_cache", lambda *_: end_me(signal.SIGKILL)())
        with ranks(2, given(SHORT)) as processes:
            (code, _, _), (other, _, err) = ended(processes)
    assert code == -signal.SIGKILL
    assert_said(other, err, r"out/run: rank 1 has lost another rank \(.*\); no state was ")


FAILING = f"""
import sys
sys.path.insert(0, {ROOT!r})
import data, train
def fails(*_):
    raise KeyError("an error that nobody expects")
train.learning_rate = fails
data.command("train.py", train.run_command)
"""


def test_an_error_ends_the_loaders_too(begun, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    process = begun(SHORT + LOADER, ("failing.py",))
    _, err = process.communicate(timeout=60)                                # no more than a few seconds
    assert process.returncode == 1 and "\nKeyError: 'an error that nobody expects'\n" in err, err


def test_other_errors_are_raised_as_they_are(given, monkeypatch):
    alone, together = (Run(None, "out/run", torch.device("cpu"), 0, world) for world in (1, 2))
    wrong = RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x16 and 8x32)")
    assert explain(wrong, alone) is explain(wrong, together) is wrong
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    assert explain(lost, alone) is lost                                     # there is no other rank to lose
    assert re.fullmatch(r"out/run: rank 0 has lost another rank \(.*peer.*\); no state was written yet",
                        str(explain(lost, together)))
    assert re.fullmatch(r"out/run: the GPU's memory does not suffice: .* \(.*CUDA out of memory\); no state .* yet",
                        str(explain(torch.OutOfMemoryError("CUDA out of memory"), alone)))

    def forward(*_):
        raise wrong

    monkeypatch.setattr(ClusterSTM, "forward", forward)
    with pytest.raises(RuntimeError) as error:
        train.main(given(SHORT))
    assert error.value is wrong


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are not finite

def spoil(patch, bad, rank=0):
    """The contrast of these steps of pretraining is NaN in a rank. -> a list, its last entry the step under way."""
    at, rate, real = [], train.learning_rate, ClusterSTM.forward

    def note(step, steps, *rest):
        at.append(step if steps == STEPS else None)
        return rate(step, steps, *rest)

    def forward(self, *args):
        losses = real(self, *args)
        if at[-1] in bad and rank == int(os.environ.get("RANK", 0)):
            losses["vtc"] = losses["vtc"] * math.nan
        return losses

    patch.setattr(train, "learning_rate", note)
    patch.setattr(ClusterSTM, "forward", forward)
    return at


def leave_out(patch, steps):
    """Finite steps that change nothing."""
    at, real = spoil(patch, ()), torch.optim.AdamW.step
    patch.setattr(torch.optim.AdamW, "step", lambda self: None if at[-1] in steps else real(self))


@pytest.fixture(scope="module", name="without")
def run_without_steps(sprites, first, tmp_path_factory):
    """without(steps) -> folder of a run that left these steps of pretraining out."""
    done = {}

    def run(*steps):
        if steps not in done:
            folder = tmp_path_factory.mktemp("without")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                leave_out(patch, steps)
                train.main(config(sprites, f"--teacher {first}/out/first/teacher --text {first}/out/first/text "
                                           f"{SHORT}"))
            done[steps] = str(folder / "out" / "run")
        return done[steps]
    return run


def optimizer_of(folder, stage):
    return torch.load(next(path for path in states(folder) if stage in path), weights_only=True)["optimizer"]["state"]


@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_a_step_that_is_not_finite_is_left_out_and_all_else_as_it_would_be(given, without, capsys, monkeypatch, every):
    expected = without(3, 6)
    spoil(monkeypatch, (3, 6))
    train.main(given(f"{SHORT} {every} --skip-nonfinite 2 --keep 9"))
    assert_same(weights("out/run"), weights(expected))
    mine, other = (optimizer_of(folder, "pretrain-0000008") for folder in ("out/run", expected))
    assert list(parts(mine)) == list(parts(other)) and {float(s["step"]) for s in mine.values()} == {6.0}
    said = re.findall(r"pretrain step \d not taken: gradient norm nan, .*vtc nan", capsys.readouterr().out)
    assert [line.split()[2] for line in said] == ["3", "6"]
    with open("out/run/log.jsonl") as f:
        found = {(row["stage"], row["step"]): row for row in map(json.loads, f)}
    if every:
        assert found["pretrain", 8]["skipped"] == 2
        return
    assert [found["pretrain", s].get("skipped", 0) for s in range(1, 9)] == [0, 0, 0, 1, 1, 1, 2, 2]
    finite = log(expected)
    for key, row in log("out/run").items():
        null = {"vtc", "grad_norm"} if key in (("pretrain", 4), ("pretrain", 7)) else set()
        assert {name for name in row if row[name] is None} == null
        assert {**row, **dict.fromkeys(null)} == {**finite[key], **dict.fromkeys(null)}


@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_one_step_more_than_is_allowed_stops_the_run_and_its_state_meets_it_again(given, without, every, monkeypatch):
    expected = without(3, 5)
    spoil(monkeypatch, (3, 5))
    flags = f"{SHORT} {every} --keep 9"
    said = []
    for more in ("--skip-nonfinite 1", "--skip-nonfinite 1 --resume", "--resume"):
        with pytest.raises(ValueError) as error:
            train.main(given(f"{flags} {more}"))
        said.append(str(error.value))
        assert states("out/run")[0] == "out/run/state/pretrain-0000005.pt"
    assert said[0].startswith("pretrain step 5 not taken: gradient norm nan") and said == said[:1] * 3
    told = json.load(open("out/run/nonfinite.json"))
    clips = json.loads(said[0].rpartition("; clips ")[2])                   # the first step's: those of sample 40 on
    samples = Clips(data.read_annotations(*(getattr(given(SHORT).data, k) for k in ("train", "root"))),
                    given(SHORT).data, 3)
    drawn = [samples[n] for n in range(40, 48)]
    assert sum(clips, []) == [s.clip for s in drawn] and [len(some) for some in clips] == [4, 4]
    assert told["step"] == "pretrain step 5" and math.isnan(told["grad_norm"])
    (mine,) = told["ranks"]
    assert mine["clips"] == clips and sum(mine["captions"], []) == [s.caption for s in drawn]
    assert sum(mine["videos"], []) == [samples.rows[s.clip].video for s in drawn]
    assert math.isnan(mine["losses"]["vtc"]) and math.isfinite(mine["losses"]["mrm"])
    train.main(given(f"{flags} --resume --skip-nonfinite 2"))
    assert_same(weights("out/run"), weights(expected))


@pytest.mark.parametrize("allowed", [0, 1])
def test_ranks_leave_out_or_stop_at_a_step_that_is_not_finite_on_one_of_them(given, monkeypatch, allowed):
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, (3,))
        on_ranks(2, given(f"{SHORT} --name finite"))
    spoil(monkeypatch, (3,), rank=1)
    with ranks(2, given(f"{SHORT} --skip-nonfinite {allowed}")) as processes:
        found = ended(processes)
    clips = [[s.clip for s in samples] for samples in by_rank(given(SHORT), 24)]
    told = json.load(open("out/run/nonfinite.json"))
    assert [rank["clips"] for rank in told["ranks"]] == [[some] for some in clips]
    assert [math.isnan(rank["losses"]["vtc"]) for rank in told["ranks"]] == [False, True]
    line = rf"pretrain step 3 not taken: gradient norm nan, .*vtc nan.*; clips {re.escape(str(clips))}$"
    if allowed:
        assert [code for code, *_ in found] == [0, 0] and re.search(line, found[0][1], re.M), found
        assert_same(weights("out/run"), weights("out/finite"))
        return
    for code, _, err in found:
        assert_said(code, err, line)
    assert states("out/run")[0] == "out/run/state/pretrain-0000003.pt"


def by_rank(cfg, first):
    """The samples from `first` on of two ranks."""
    clips = Clips(data.read_annotations(cfg.data.train, cfg.data.root), cfg.data, cfg.seed)
    return [[clips[first + 4 * rank + i] for i in range(4)] for rank in range(2)]


def test_the_host_reads_what_became_of_a_step_while_the_next_is_under_way(given, monkeypatch):
    seen = {"backward": 0, "step": 0}
    reads, words = [], []

    def counted(name, real):
        def call(*args, **kwargs):
            seen[name] += 1
            return real(*args, **kwargs)
        return call

    class Word(train.Word):
        def __init__(self, x):
            super().__init__(x)
            words.append(self)

        def read(self):
            reads.append((words.index(self), seen["backward"], seen["step"]))
            return super().read()

    monkeypatch.setattr(train, "Word", Word)
    monkeypatch.setattr(torch.Tensor, "backward", counted("backward", torch.Tensor.backward))
    monkeypatch.setattr(torch.optim.AdamW, "step", counted("step", torch.optim.AdamW.step))
    train.main(given(f"{SHORT} --unmasked-steps 0 --log-every 1000 --save-every 1000"))
    # After both micro-batches of the next step, before that changes the weights; the last at once.
    assert reads == [(s, 2 * (s + 2), s + 1) for s in range(STEPS - 1)] + [(STEPS - 1, 2 * STEPS, STEPS)]
