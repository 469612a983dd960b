"""Test checkpoints, damaged files, full disks, two runs in a folder, lost processes, steps that are not finite."""

import json
import math
import os
import re
import resource
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from helpers.processes import (
    LOADER,
    PAUSE,
    SHORT,
    STEPS,
    assert_same_run,
    assert_train_error,
    block_forever,
    call_in_step,
    interrupt,
    launch_ranks,
    send_to_self,
    wait_for_exit,
    wait_until,
)
from helpers.runs import ROOT, assert_same, config, log, on_ranks, weights, with_weights, write_rows

import data
import loop
import train
from annotations import read_annotations
from data import ClipDataset
from files import atomic_write_text, save_weights
from model import ClusterSTM
from runtime import RunContext, describe_error, list_checkpoints, verify_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def flip_bit(path):
    """Flip one bit in the middle of the largest tensor of a checkpoint."""
    with zipfile.ZipFile(path) as f:
        part = max((part for part in f.infolist() if "/data/" in part.filename), key=lambda part: part.file_size)
    with open(path, "r+b") as f:
        f.seek(part.header_offset + 26)
        position = part.header_offset + 30 + sum(np.frombuffer(f.read(4), "<u2").tolist()) + part.file_size // 2
        f.seek(position)
        byte = f.read(1)[0]
        f.seek(position)
        f.write(bytes([byte ^ 16]))


def fill_with_zeros(path):
    size = os.path.getsize(path)
    with open(path, "wb") as f:
        f.write(bytes(size))


DAMAGE = {"a flipped bit": flip_bit, "cut short": lambda path: os.truncate(path, os.path.getsize(path) // 2),
          "cut by a byte": lambda path: os.truncate(path, os.path.getsize(path) - 1),
          "empty": lambda path: os.truncate(path, 0), "zeros": fill_with_zeros}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_resume_renames_a_damaged_checkpoint_and_uses_the_older(run_config, undisturbed_run, capsys, damage):
    interrupt(run_config(SHORT))
    newest, older = list_checkpoints("out/run")
    damage(newest)
    capsys.readouterr()
    train.main(run_config(f"{SHORT} --resume"))
    messages = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(messages) == 1
    assert messages[0].startswith(f"{newest} is damaged (") and f"{newest}.corrupt" in messages[0]
    assert older.endswith("pretrain-0000002.pt") and os.path.exists(f"{newest}.corrupt")
    assert_same_run(undisturbed_run())


def test_all_ranks_resume_from_the_checkpoint_before_a_damaged_one(run_config, undisturbed_run):
    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, 5, send_to_self(signal.SIGKILL))
        with launch_ranks(2, run_config(SHORT)) as processes:
            wait_for_exit(processes)
    flip_bit(list_checkpoints("out/run")[0])
    with launch_ranks(2, run_config(f"{SHORT} --resume")) as processes:
        (code, out, err), (other_code, other_out, _) = wait_for_exit(processes)
    assert (code, other_code) == (0, 0) and out.count("is damaged") == 1 and other_out == "", err
    assert_same_run(undisturbed_run(SHORT, 2))


def test_without_an_intact_checkpoint_the_stage_starts_again(run_config, undisturbed_run, capsys):
    interrupt(run_config(SHORT))
    for path in list_checkpoints("out/run"):
        flip_bit(path)
    capsys.readouterr()
    train.main(run_config(f"{SHORT} --resume"))
    messages = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line or "begins" in line]
    assert sum("is damaged" in line for line in messages) == 2
    assert "begins" in messages[-1], messages
    assert_same_run(undisturbed_run())


def test_a_flipped_bit_is_detected_or_changes_no_value(run_config):
    interrupt(run_config(SHORT))
    path = list_checkpoints("out/run")[0]
    expected, content = list(flatten(torch.load(path, weights_only=True))), open(path, "rb").read()
    rng, detected, directory = np.random.default_rng(0), 0, content.index(b"PK\1\2")
    flips = [(position, bit) for low, count in ((0, 20), (directory, 50))
             for position, bit in zip(rng.integers(low, len(content), count), rng.integers(8, size=count), strict=True)]
    # With this bit set, a zip entry is a folder, of which torch reads nothing: the tensor is uninitialized memory.
    flips += [(content.rindex(b"PK\1\2", 0, len(content) - 400) + 38, 4)]
    for position, bit in flips:
        with open("other.pt", "wb") as f:
            f.write(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1:])
        if verify_checkpoint("other.pt"):
            detected += 1
        else:
            assert list(flatten(torch.load("other.pt", weights_only=True))) == expected, (position, bit)
    assert detected > 25


def flatten(x, name=""):
    """Yield (name, value) of everything in nested dicts and lists, tensors as lists of numbers."""
    if isinstance(x, dict | list | tuple):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from flatten(value, f"{name}/{key}")
    else:
        yield name, x.tolist() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("name", ["checkpoints/pretrain-0000006.pt.x1y2z3.tmp", "config.json.x1y2z3.tmp",
                                  "before_unmasked/config.json.x1y2z3.tmp", "target_cache/config.json.x1y2z3.tmp"])
def test_temporary_files_of_a_killed_process_are_removed(run_config, undisturbed_run, name):
    interrupt(run_config(SHORT))
    eval_file = "out/run/eval-sprites-all.json.x1y2z3.tmp"          # eval.py may be writing it at the same time
    temporary_file = os.path.join("out/run", name)
    os.makedirs(os.path.dirname(temporary_file), exist_ok=True)
    for path in (temporary_file, eval_file):
        shutil.copy(list_checkpoints("out/run")[0], path)
    train.main(run_config(f"{SHORT} --resume"))
    assert not os.path.exists(temporary_file)
    os.remove(eval_file)
    assert_same_run(undisturbed_run())


def test_the_newest_checkpoints_of_all_stages_are_kept(run_config):
    train.main(run_config(f"{SHORT} --keep-checkpoints 3"))
    names = ["unmasked-0000002.pt", "pretrain-0000008.pt", "pretrain-0000006.pt"]
    assert list_checkpoints("out/run") == [f"out/run/checkpoints/{name}" for name in names]


@pytest.mark.parametrize("step, hint", [(5, "--resume .* out/run/checkpoints/pretrain-0000004.pt"),
                                        (1, "no checkpoint yet")])
def test_a_full_disk_is_a_one_line_error_and_keeps_older_checkpoints(run_config, undisturbed_run, step, hint):
    limit = 30_000                                  # bytes a file: less than a checkpoint, more than the log
    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        with launch_ranks(1, run_config(SHORT)) as processes:
            (code, _, err), = wait_for_exit(processes)
    path = f"out/run/checkpoints/pretrain-{step + 1:07d}.pt"
    assert_train_error(code, err, rf"{path} could not be written \(File too large\); .*{hint}$")
    assert list_checkpoints("out/run") == [f"out/run/checkpoints/pretrain-{s:07d}.pt" for s in range(step - 1, 0, -2)]
    assert not [name for name in os.listdir("out/run/checkpoints") if not name.endswith(".pt")]
    train.main(run_config(f"{SHORT} --resume"))
    assert_same_run(undisturbed_run())


def test_weights_are_synced_to_disk_before_the_file_is_renamed(tmp_path, monkeypatch):
    inodes, fsync = [], os.fsync

    def record_fsync(fd):
        inodes.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record_fsync)
    model = torch.nn.Linear(2, 3)
    save_weights(model, str(tmp_path))
    status = os.stat(tmp_path / "model.safetensors")
    assert status.st_ino in inodes and status.st_mode & 0o777 == 0o644
    assert_same(weights(tmp_path), dict(model.state_dict()))
    assert os.listdir(tmp_path) == ["model.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# Two runs in one folder, other data

def test_resume_with_another_config_is_refused_on_every_rank(run_config):
    interrupt(run_config(f"{SHORT} --micro-batch 4"))
    with launch_ranks(2, run_config(f"{SHORT} --micro-batch 4 --resume --lr 1e-2")) as processes:
        for code, _, err in wait_for_exit(processes):
            assert_train_error(code, err, "out/run/run_state.json: lr .*0.002.*0.01$")


@pytest.mark.parametrize("flags, changed", [("", "--lr 1e-2"), ("--data.num-views 1", "--mask.ratio 0.5")])
def test_a_run_without_a_checkpoint_may_resume_with_another_config(run_config, undisturbed_run, flags, changed):
    """Cached targets of the other config are not read."""
    interrupt(run_config(f"{SHORT} {flags} {changed}"), step=1)
    assert os.path.isfile("out/run/config.json") and not list_checkpoints("out/run")
    assert os.path.isdir("out/run/target_cache") == bool(flags)
    train.main(run_config(f"{SHORT} {flags} --resume"))
    assert_same_run(undisturbed_run(f"{SHORT} {flags}"))


def test_a_second_run_in_a_folder_is_refused_and_the_first_continues(run_config, undisturbed_run, start_process):
    def block_until_released():
        open("blocked", "w").close()
        wait_until(lambda: os.path.exists("released"), PAUSE)

    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, 5, block_until_released)
        with launch_ranks(1, run_config(SHORT)) as processes:
            wait_until(lambda: os.path.exists("blocked"))
            for flags in (SHORT, f"{SHORT} --resume"):
                process = start_process(flags)
                _, err = process.communicate(timeout=90)
                message = rf"out/run is in use by another run \(.*process {os.getpid()}\b"
                assert_train_error(process.returncode, err, message)
            open("released", "w").close()
            assert wait_for_exit(processes)[0][0] == 0
    assert_same_run(undisturbed_run())


def test_live_loaders_of_a_killed_run_do_not_keep_its_folder_locked(run_config, undisturbed_run):
    getitem = ClipDataset.__getitem__

    def record_loader(self, n):
        if torch.utils.data.get_worker_info():
            atomic_write_text("loader", str(os.getpid()))
        return getitem(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", record_loader)
        call_in_step(patch, 5, block_forever)
        with launch_ranks(1, run_config(SHORT + LOADER)) as (process,):
            wait_until(lambda: os.path.exists("blocked"))
            patch.undo()
            loader = int(open("loader").read())
            os.kill(loader, signal.SIGSTOP)                                 # it cannot notice that its parent dies
            process.kill()
            process.join()
            train.main(run_config(f"{SHORT} {LOADER} --resume"))
            os.kill(loader, 0)                                              # raises unless it is still alive
    assert_same_run(undisturbed_run(SHORT + LOADER))


def test_resume_refuses_changed_annotations(run_config, sprites):
    flags = f"{SHORT} --data.train-file rows.json"
    write_rows(sprites, 24)
    train.main(run_config(flags))
    expected = weights("out/run")
    shutil.rmtree("out/run")
    interrupt(run_config(flags))
    write_rows(sprites, 24, caption="a red square rests")
    with pytest.raises(ValueError, match="^out/run/run_state.json: .*annotations"):
        train.main(run_config(f"{flags} --resume"))
    write_rows(sprites, 24)                                                 # the same rows, with another file time
    os.utime("rows.json", (0, 0))
    train.main(run_config(f"{flags} --resume"))
    assert_same(weights("out/run"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Lost processes

def test_a_killed_loader_is_reported_with_the_step_and_the_checkpoint(run_config):
    getitem = ClipDataset.__getitem__

    def die_in_loader(self, n):
        if n == 5 * 8 + 3 and torch.utils.data.get_worker_info():           # loaded during step 4
            os.kill(os.getpid(), signal.SIGKILL)
        return getitem(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", die_in_loader)
        with launch_ranks(1, run_config(f"{SHORT} {LOADER} --save-every 3")) as processes:
            (code, _, err), = wait_for_exit(processes)
    assert_train_error(code, err, r"pretrain step [45]: a loader process was killed.* \(.*\); "
                                  ".*out/run/checkpoints/pretrain-0000003.pt$")
    assert verify_checkpoint("out/run/checkpoints/pretrain-0000003.pt") == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line(run_config, rank):
    with pytest.MonkeyPatch.context() as patch:
        call_in_step(patch, 5, send_to_self(signal.SIGKILL), rank)
        with launch_ranks(2, run_config(SHORT)) as processes:
            results = wait_for_exit(processes)
    assert results[rank][0] == -signal.SIGKILL
    code, _, err = results[1 - rank]
    assert_train_error(code, err, rf"pretrain step 5: rank {1 - rank} has lost another rank \(.*\); "
                                  ".*out/run/checkpoints/pretrain-0000004.pt$")
    assert verify_checkpoint("out/run/checkpoints/pretrain-0000004.pt") == ""


def test_a_rank_killed_while_the_other_waits_for_it_ends_the_other(run_config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "build_frame_cache", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with launch_ranks(2, run_config(SHORT)) as processes:
            (code, _, _), (other_code, _, other_err) = wait_for_exit(processes)
    assert code == -signal.SIGKILL
    assert_train_error(other_code, other_err, r"out/run: rank 1 has lost another rank \(.*\); .*no checkpoint")


FAIL_IN_STEP = f"""
import sys
sys.path.insert(0, {ROOT!r})
import loop, train
from runtime import run_cli
def learning_rate(*_):
    raise KeyError("an unexpected error")
loop.learning_rate = learning_rate
run_cli("train.py", train.cli)
"""


def test_an_unexpected_error_ends_the_loaders(start_process, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL_IN_STEP)
    process = start_process(SHORT + LOADER, ("fail.py",))
    _, err = process.communicate(timeout=60)                                # loaders would keep stderr open
    assert process.returncode == 1 and "\nKeyError: 'an unexpected error'\n" in err, err


def test_errors_of_unknown_cause_are_raised_unchanged(run_config, monkeypatch):
    one_rank, two_ranks = (RunContext(None, "out/run", torch.device("cpu"), 0, world) for world in (1, 2))
    wrong_shape = RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x16 and 8x32)")
    assert describe_error(wrong_shape, one_rank) is describe_error(wrong_shape, two_ranks) is wrong_shape
    lost_peer = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    assert describe_error(lost_peer, one_rank) is lost_peer                 # one rank has no other to lose
    assert re.fullmatch(r"out/run: rank 0 has lost another rank \(.*peer.*\); there is no checkpoint yet",
                        str(describe_error(lost_peer, two_ranks)))
    assert re.fullmatch(r"out/run: .*--micro-batch \(.*CUDA out of memory\); there is no checkpoint yet",
                        str(describe_error(torch.OutOfMemoryError("CUDA out of memory"), one_rank)))

    def forward(*_):
        raise wrong_shape

    monkeypatch.setattr(ClusterSTM, "forward", forward)
    with pytest.raises(RuntimeError) as error:
        train.main(run_config(SHORT))
    assert error.value is wrong_shape


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are not finite

def make_nonfinite(patch, bad_steps, rank=0):
    """Patch vtc to be NaN on a rank in these steps of pretraining -> a list whose last entry is the current step."""
    steps, compute_rate, compute_losses = [], loop.learning_rate, ClusterSTM.forward

    def learning_rate(step, stage_steps, *args):
        steps.append(step if stage_steps == STEPS else None)
        return compute_rate(step, stage_steps, *args)

    def forward(self, *args):
        losses = compute_losses(self, *args)
        if steps[-1] in bad_steps and rank == int(os.environ.get("RANK", 0)):
            losses["vtc"] = losses["vtc"] * math.nan
        return losses

    patch.setattr(loop, "learning_rate", learning_rate)
    patch.setattr(ClusterSTM, "forward", forward)
    return steps


def skip_updates(patch, skipped_steps):
    """Patch the optimizer to change nothing in these steps of pretraining, whose losses are finite."""
    steps, update = make_nonfinite(patch, ()), torch.optim.AdamW.step

    def step(self):
        if steps[-1] not in skipped_steps:
            update(self)

    patch.setattr(torch.optim.AdamW, "step", step)


@pytest.fixture(scope="module")
def run_without_steps(sprites, first_run, tmp_path_factory):
    """run_without_steps(*steps) trains a run without the updates of these steps of pretraining, once -> its folder."""
    folders = {}

    def run(*steps):
        if steps not in folders:
            folder = tmp_path_factory.mktemp("without_steps")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                skip_updates(patch, steps)
                train.main(config(sprites, with_weights(first_run, SHORT)))
            folders[steps] = str(folder / "out" / "run")
        return folders[steps]
    return run


def load_optimizer_state(folder, name):
    """Load the optimizer's state from the newest checkpoint whose path contains `name`."""
    path = next(path for path in list_checkpoints(folder) if name in path)
    return torch.load(path, weights_only=True)["optimizer"]["state"]


@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_a_nonfinite_step_is_skipped_and_nothing_else_changes(
        run_config, run_without_steps, capsys, monkeypatch, every):
    expected = run_without_steps(3, 6)
    make_nonfinite(monkeypatch, (3, 6))
    train.main(run_config(f"{SHORT} {every} --max-skipped-steps 2 --keep-checkpoints 9"))
    assert_same(weights("out/run"), weights(expected))
    state, expected_state = (load_optimizer_state(folder, "pretrain-0000008") for folder in ("out/run", expected))
    assert list(flatten(state)) == list(flatten(expected_state))
    assert {float(s["step"]) for s in state.values()} == {6.0}
    messages = re.findall(r"pretrain step \d was skipped: gradient norm nan, .*vtc nan", capsys.readouterr().out)
    assert [line.split()[2] for line in messages] == ["3", "6"]
    with open("out/run/log.jsonl") as f:
        rows = {(row["stage"], row["step"]): row for row in map(json.loads, f)}
    if every:
        assert rows["pretrain", 8]["skipped"] == 2
        return
    assert [rows["pretrain", s].get("skipped", 0) for s in range(1, 9)] == [0, 0, 0, 1, 1, 1, 2, 2]
    finite_rows = log(expected)
    for key, row in log("out/run").items():
        nonfinite = {"vtc", "grad_norm"} if key in (("pretrain", 4), ("pretrain", 7)) else set()
        assert {name for name in row if row[name] is None} == nonfinite
        assert {**row, **dict.fromkeys(nonfinite)} == {**finite_rows[key], **dict.fromkeys(nonfinite)}


@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_one_nonfinite_step_too_many_stops_the_run_and_each_resume(run_config, run_without_steps, every, monkeypatch):
    expected = run_without_steps(3, 5)
    make_nonfinite(monkeypatch, (3, 5))
    flags = f"{SHORT} {every} --keep-checkpoints 9"
    messages = []
    for more_flags in ("--max-skipped-steps 1", "--max-skipped-steps 1 --resume", "--resume"):
        with pytest.raises(ValueError) as error:
            train.main(run_config(f"{flags} {more_flags}"))
        messages.append(str(error.value))
        assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000005.pt"
    assert messages[0].startswith("pretrain step 5 was skipped: gradient norm nan") and len(set(messages)) == 1

    clips = json.loads(messages[0].rpartition("; clips ")[2])               # step 5 has samples 40 to 47
    cfg = run_config(SHORT).data
    dataset = ClipDataset(read_annotations(cfg.train_file, cfg.video_root), cfg, 3)
    samples = [dataset[n] for n in range(40, 48)]
    assert sum(clips, []) == [s.clip_id for s in samples] and [len(ids) for ids in clips] == [4, 4]

    report = json.load(open("out/run/nonfinite.json"))
    assert report["step"] == "pretrain step 5" and math.isnan(report["grad_norm"])
    (rank_report,) = report["ranks"]
    assert rank_report["clips"] == clips and sum(rank_report["captions"], []) == [s.caption for s in samples]
    assert sum(rank_report["videos"], []) == [dataset.annotations[s.clip_id].video for s in samples]
    assert math.isnan(rank_report["losses"]["vtc"]) and math.isfinite(rank_report["losses"]["mrm"])

    train.main(run_config(f"{flags} --resume --max-skipped-steps 2"))
    assert_same(weights("out/run"), weights(expected))


@pytest.mark.parametrize("allowed", [0, 1])
def test_all_ranks_skip_or_stop_at_a_step_that_is_nonfinite_on_one(run_config, monkeypatch, allowed):
    with pytest.MonkeyPatch.context() as patch:
        skip_updates(patch, (3,))
        on_ranks(2, run_config(f"{SHORT} --name finite"))
    make_nonfinite(monkeypatch, (3,), rank=1)
    with launch_ranks(2, run_config(f"{SHORT} --max-skipped-steps {allowed}")) as processes:
        results = wait_for_exit(processes)
    clips = [[s.clip_id for s in samples] for samples in samples_by_rank(run_config(SHORT), 24)]
    report = json.load(open("out/run/nonfinite.json"))
    assert [rank["clips"] for rank in report["ranks"]] == [[ids] for ids in clips]
    assert [math.isnan(rank["losses"]["vtc"]) for rank in report["ranks"]] == [False, True]
    message = rf"pretrain step 3 was skipped: gradient norm nan, .*vtc nan.*; clips {re.escape(str(clips))}$"
    if allowed:
        assert [code for code, *_ in results] == [0, 0] and re.search(message, results[0][1], re.M), results
        assert_same(weights("out/run"), weights("out/finite"))
        return
    for code, _, err in results:
        assert_train_error(code, err, message)
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000003.pt"


def samples_by_rank(cfg, start):
    """Return the samples of two ranks, four each, from number `start` on."""
    dataset = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
    return [[dataset[start + 4 * rank + i] for i in range(4)] for rank in range(2)]


def test_the_host_reads_the_flags_of_a_step_during_the_next_step(run_config, monkeypatch):
    calls = {"backward": 0, "step": 0}
    reads, copies = [], []

    def count_calls(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)
        return call

    class RecordedCopy(loop.AsyncHostCopy):
        def __init__(self, x):
            super().__init__(x)
            copies.append(self)

        def tolist(self):
            reads.append((copies.index(self), calls["backward"], calls["step"]))
            return super().tolist()

    monkeypatch.setattr(loop, "AsyncHostCopy", RecordedCopy)
    monkeypatch.setattr(torch.Tensor, "backward", count_calls("backward", torch.Tensor.backward))
    monkeypatch.setattr(torch.optim.AdamW, "step", count_calls("step", torch.optim.AdamW.step))
    train.main(run_config(f"{SHORT} --unmasked-steps 0 --log-every 1000 --save-every 1000"))
    # After both micro-batches of the next step, before it changes the weights; the flags of the last step at once.
    assert reads == [(s, 2 * (s + 2), s + 1) for s in range(STEPS - 1)] + [(STEPS - 1, 2 * STEPS, STEPS)]
