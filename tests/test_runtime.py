"""Checkpoints, damaged files, full disks, two runs in a folder, lost processes, steps that are not finite."""

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
    assert_ends_as,
    assert_said,
    end_me,
    ended,
    hold,
    in_step,
    interrupt,
    ranks,
    until,
)
from helpers.runs import (
    ROOT,
    Killed,
    assert_same,
    config,
    kill,
    log,
    on_ranks,
    weights,
    with_weights,
    write_rows,
)

import data
import loop
import train
from data import ClipDataset
from model import ClusterSTM
from runtime import RunContext, atomic_write_text, describe_error, list_checkpoints, save_weights, verify_checkpoint
from tasks import read_annotations

# ---------------------------------------------------------------------------------------------------------------------
# States

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
    newest, before = list_checkpoints("out/run")
    harm(newest)
    capsys.readouterr()
    train.main(given(f"{SHORT} --resume"))
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == 1 and said[0].startswith(f"{newest} is damaged (") and f"{newest}.corrupt" in said[0]
    assert before.endswith("pretrain-0000002.pt") and os.path.exists(f"{newest}.corrupt")
    assert_ends_as(whole())


def test_on_two_ranks_all_take_the_state_before_a_damaged_one(given, whole):
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 5, end_me(signal.SIGKILL))
        with ranks(2, given(SHORT)) as processes:
            ended(processes)
    flip(list_checkpoints("out/run")[0])
    with ranks(2, given(f"{SHORT} --resume")) as processes:
        (code, out, err), (other, silent, _) = ended(processes)
    assert (code, other) == (0, 0) and out.count("is damaged") == 1 and silent == "", err
    assert_ends_as(whole(SHORT, 2))


def test_without_a_whole_state_the_stage_begins_anew_and_says_so(given, whole, capsys):
    interrupt(given(SHORT))
    for path in list_checkpoints("out/run"):
        flip(path)
    capsys.readouterr()
    train.main(given(f"{SHORT} --resume"))
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line or "begins" in line]
    assert sum("is damaged" in line for line in said) == 2
    assert "begins" in said[-1], said
    assert_ends_as(whole())


def test_a_file_with_a_flipped_bit_is_damaged_or_reads_as_before(given):
    interrupt(given(SHORT))
    path = list_checkpoints("out/run")[0]
    good, whole = list(parts(torch.load(path, weights_only=True))), open(path, "rb").read()
    drawn, found, directory = np.random.default_rng(0), 0, whole.index(b"PK\1\2")
    flips = [(at, bit) for low, size in ((0, 20), (directory, 50))
             for at, bit in zip(drawn.integers(low, len(whole), size), drawn.integers(8, size=size), strict=True)]
    # A part with this attribute is a folder, of which torch reads nothing: whatever was in memory is the tensor.
    flips += [(whole.rindex(b"PK\1\2", 0, len(whole) - 400) + 38, 4)]
    for at, bit in flips:
        with open("other.pt", "wb") as f:
            f.write(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:])
        if verify_checkpoint("other.pt"):
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


@pytest.mark.parametrize("left", ["checkpoints/pretrain-0000006.pt.x1y2z3.tmp", "config.json.x1y2z3.tmp",
                                  "before_unmasked/config.json.x1y2z3.tmp", "target_cache/config.json.x1y2z3.tmp"])
def test_what_a_killed_process_was_writing_is_removed(given, whole, left):
    interrupt(given(SHORT))
    beside = "out/run/eval-sprites-all.json.x1y2z3.tmp"             # another process may be writing it
    left = os.path.join("out/run", left)
    os.makedirs(os.path.dirname(left), exist_ok=True)
    for path in (left, beside):
        shutil.copy(list_checkpoints("out/run")[0], path)
    train.main(given(f"{SHORT} --resume"))
    assert not os.path.exists(left)
    os.remove(beside)
    assert_ends_as(whole())


def test_the_newest_states_are_kept_whatever_their_stage(given):
    train.main(given(f"{SHORT} --keep-checkpoints 3"))
    names = ["unmasked-0000002.pt", "pretrain-0000008.pt", "pretrain-0000006.pt"]
    assert list_checkpoints("out/run") == [f"out/run/checkpoints/{name}" for name in names]


@pytest.mark.parametrize("step, hint", [(5, "--resume .* out/run/checkpoints/pretrain-0000004.pt"),
                                        (1, "no checkpoint yet")])
def test_a_full_disk_is_said_in_one_line_and_leaves_what_was_there(given, whole, step, hint):
    limit = 30_000                                  # bytes a file: less than a state, more than the log
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        with ranks(1, given(SHORT)) as processes:
            (code, _, err), = ended(processes)
    path = f"out/run/checkpoints/pretrain-{step + 1:07d}.pt"
    assert_said(code, err, rf"{path} could not be written \(.*File too large.*\); .*{hint}$")
    assert list_checkpoints("out/run") == [f"out/run/checkpoints/pretrain-{s:07d}.pt" for s in range(step - 1, 0, -2)]
    assert not [name for name in os.listdir("out/run/checkpoints") if not name.endswith(".pt")]
    train.main(given(f"{SHORT} --resume"))
    assert_ends_as(whole())


def test_weights_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    model = torch.nn.Linear(2, 3)
    save_weights(model, str(tmp_path))
    status = os.stat(tmp_path / "model.safetensors")
    assert status.st_ino in synced and status.st_mode & 0o777 == 0o644
    assert_same(weights(tmp_path), dict(model.state_dict()))
    assert os.listdir(tmp_path) == ["model.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# Two runs in one folder, other data

def test_a_resumed_run_with_another_config_is_refused_on_every_rank(given):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 5)
        with pytest.raises(Killed):
            train.main(given(f"{SHORT} --micro-batch 4"))
    with ranks(2, given(f"{SHORT} --micro-batch 4 --resume --lr 1e-2")) as processes:
        for code, _, err in ended(processes):
            assert_said(code, err, "out/run/config.json: lr .*0.002.*0.01$")


def test_a_run_stopped_before_its_first_checkpoint_may_begin_with_another_config(given, whole):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 1)
        with pytest.raises(Killed):
            train.main(given(f"{SHORT} --lr 1e-2"))
    assert os.path.isfile("out/run/config.json") and not list_checkpoints("out/run")
    train.main(given(f"{SHORT} --resume"))
    assert_ends_as(whole())


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
    real = ClipDataset.__getitem__

    def note(self, n):
        if torch.utils.data.get_worker_info():
            atomic_write_text("loader", str(os.getpid()))
        return real(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", note)
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
    flags = f"{SHORT} --data.train-file rows.json"
    write_rows(sprites, 24)
    train.main(given(flags))
    whole = weights("out/run")
    shutil.rmtree("out/run")
    interrupt(given(flags))
    write_rows(sprites, 24, caption="a red square rests")
    with pytest.raises(ValueError, match="^out/run/run_state.json: .*annotations"):
        train.main(given(f"{flags} --resume"))
    write_rows(sprites, 24)                                                       # as they were, but of another time
    os.utime("rows.json", (0, 0))
    train.main(given(f"{flags} --resume"))
    assert_same(weights("out/run"), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Lost processes

def test_a_killed_loader_is_named_with_the_step_and_the_state(given):
    real = ClipDataset.__getitem__

    def dies(self, n):
        if n == 5 * 8 + 3 and torch.utils.data.get_worker_info():           # while step 4 is taken
            end_me(signal.SIGKILL)()
        return real(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", dies)
        with ranks(1, given(f"{SHORT} {LOADER} --save-every 3")) as processes:
            (code, _, err), = ended(processes)
    assert_said(code, err, r"pretrain step [45]: a loader process was killed.* \(.*\); "
                           ".*out/run/checkpoints/pretrain-0000003.pt$")
    assert verify_checkpoint("out/run/checkpoints/pretrain-0000003.pt") == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_with_one_line(given, rank):
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, 5, end_me(signal.SIGKILL), rank)
        with ranks(2, given(SHORT)) as processes:
            found = ended(processes)
    assert found[rank][0] == -signal.SIGKILL
    code, _, err = found[1 - rank]
    assert_said(code, err, rf"pretrain step 5: rank {1 - rank} has lost another rank \(.*\); "
                           ".*out/run/checkpoints/pretrain-0000004.pt$")
    assert verify_checkpoint("out/run/checkpoints/pretrain-0000004.pt") == ""


def test_a_rank_that_is_killed_while_the_other_waits_ends_that_too(given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "build_frame_cache", lambda *_: end_me(signal.SIGKILL)())
        with ranks(2, given(SHORT)) as processes:
            (code, _, _), (other, _, err) = ended(processes)
    assert code == -signal.SIGKILL
    assert_said(other, err, r"out/run: rank 1 has lost another rank \(.*\); .*no checkpoint")


FAILING = f"""
import sys
sys.path.insert(0, {ROOT!r})
import loop, train
from runtime import run_cli
def fails(*_):
    raise KeyError("an error that nobody expects")
loop.learning_rate = fails
run_cli("train.py", train.cli)
"""


def test_an_error_ends_the_loaders_too(begun, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    process = begun(SHORT + LOADER, ("failing.py",))
    _, err = process.communicate(timeout=60)                                # no more than a few seconds
    assert process.returncode == 1 and "\nKeyError: 'an error that nobody expects'\n" in err, err


def test_other_errors_are_raised_as_they_are(given, monkeypatch):
    alone, together = (RunContext(None, "out/run", torch.device("cpu"), 0, world) for world in (1, 2))
    wrong = RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x16 and 8x32)")
    assert describe_error(wrong, alone) is describe_error(wrong, together) is wrong
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    assert describe_error(lost, alone) is lost                                     # there is no other rank to lose
    assert re.fullmatch(r"out/run: rank 0 has lost another rank \(.*peer.*\); there is no checkpoint yet",
                        str(describe_error(lost, together)))
    assert re.fullmatch(r"out/run: .*--micro-batch \(.*CUDA out of memory\); there is no checkpoint yet",
                        str(describe_error(torch.OutOfMemoryError("CUDA out of memory"), alone)))

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
    at, rate, real = [], loop.learning_rate, ClusterSTM.forward

    def note(step, steps, *rest):
        at.append(step if steps == STEPS else None)
        return rate(step, steps, *rest)

    def forward(self, *args):
        losses = real(self, *args)
        if at[-1] in bad and rank == int(os.environ.get("RANK", 0)):
            losses["vtc"] = losses["vtc"] * math.nan
        return losses

    patch.setattr(loop, "learning_rate", note)
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
                train.main(config(sprites, with_weights(first, SHORT)))
            done[steps] = str(folder / "out" / "run")
        return done[steps]
    return run


def optimizer_of(folder, stage):
    path = next(path for path in list_checkpoints(folder) if stage in path)
    return torch.load(path, weights_only=True)["optimizer"]["state"]


@pytest.mark.parametrize("every", ["", "--log-every 1000 --save-every 1000"], ids=["read at once", "read a step later"])
def test_a_step_that_is_not_finite_is_left_out_and_all_else_as_it_would_be(given, without, capsys, monkeypatch, every):
    expected = without(3, 6)
    spoil(monkeypatch, (3, 6))
    train.main(given(f"{SHORT} {every} --max-skipped-steps 2 --keep-checkpoints 9"))
    assert_same(weights("out/run"), weights(expected))
    mine, other = (optimizer_of(folder, "pretrain-0000008") for folder in ("out/run", expected))
    assert list(parts(mine)) == list(parts(other)) and {float(s["step"]) for s in mine.values()} == {6.0}
    said = re.findall(r"pretrain step \d was skipped: gradient norm nan, .*vtc nan", capsys.readouterr().out)
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
    flags = f"{SHORT} {every} --keep-checkpoints 9"
    said = []
    for more in ("--max-skipped-steps 1", "--max-skipped-steps 1 --resume", "--resume"):
        with pytest.raises(ValueError) as error:
            train.main(given(f"{flags} {more}"))
        said.append(str(error.value))
        assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000005.pt"
    assert said[0].startswith("pretrain step 5 was skipped: gradient norm nan") and said == said[:1] * 3
    told = json.load(open("out/run/nonfinite.json"))
    clips = json.loads(said[0].rpartition("; clips ")[2])                   # the first step's: those of sample 40 on
    cfg = given(SHORT).data
    samples = ClipDataset(read_annotations(cfg.train_file, cfg.video_root), cfg, 3)
    drawn = [samples[n] for n in range(40, 48)]
    assert sum(clips, []) == [s.clip_id for s in drawn] and [len(some) for some in clips] == [4, 4]
    assert told["step"] == "pretrain step 5" and math.isnan(told["grad_norm"])
    (mine,) = told["ranks"]
    assert mine["clips"] == clips and sum(mine["captions"], []) == [s.caption for s in drawn]
    assert sum(mine["videos"], []) == [samples.annotations[s.clip_id].video for s in drawn]
    assert math.isnan(mine["losses"]["vtc"]) and math.isfinite(mine["losses"]["mrm"])
    train.main(given(f"{flags} --resume --max-skipped-steps 2"))
    assert_same(weights("out/run"), weights(expected))


@pytest.mark.parametrize("allowed", [0, 1])
def test_ranks_leave_out_or_stop_at_a_step_that_is_not_finite_on_one_of_them(given, monkeypatch, allowed):
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, (3,))
        on_ranks(2, given(f"{SHORT} --name finite"))
    spoil(monkeypatch, (3,), rank=1)
    with ranks(2, given(f"{SHORT} --max-skipped-steps {allowed}")) as processes:
        found = ended(processes)
    clips = [[s.clip_id for s in samples] for samples in by_rank(given(SHORT), 24)]
    told = json.load(open("out/run/nonfinite.json"))
    assert [rank["clips"] for rank in told["ranks"]] == [[some] for some in clips]
    assert [math.isnan(rank["losses"]["vtc"]) for rank in told["ranks"]] == [False, True]
    line = rf"pretrain step 3 was skipped: gradient norm nan, .*vtc nan.*; clips {re.escape(str(clips))}$"
    if allowed:
        assert [code for code, *_ in found] == [0, 0] and re.search(line, found[0][1], re.M), found
        assert_same(weights("out/run"), weights("out/finite"))
        return
    for code, _, err in found:
        assert_said(code, err, line)
    assert list_checkpoints("out/run")[0] == "out/run/checkpoints/pretrain-0000003.pt"


def by_rank(cfg, first):
    """The samples from `first` on of two ranks."""
    clips = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
    return [[clips[first + 4 * rank + i] for i in range(4)] for rank in range(2)]


def test_the_host_reads_what_became_of_a_step_while_the_next_is_under_way(given, monkeypatch):
    seen = {"backward": 0, "step": 0}
    reads, copies = [], []

    def counted(name, real):
        def call(*args, **kwargs):
            seen[name] += 1
            return real(*args, **kwargs)
        return call

    class RecordedCopy(loop.AsyncHostCopy):
        def __init__(self, x):
            super().__init__(x)
            copies.append(self)

        def tolist(self):
            reads.append((copies.index(self), seen["backward"], seen["step"]))
            return super().tolist()

    monkeypatch.setattr(loop, "AsyncHostCopy", RecordedCopy)
    monkeypatch.setattr(torch.Tensor, "backward", counted("backward", torch.Tensor.backward))
    monkeypatch.setattr(torch.optim.AdamW, "step", counted("step", torch.optim.AdamW.step))
    train.main(given(f"{SHORT} --unmasked-steps 0 --log-every 1000 --save-every 1000"))
    # After both micro-batches of the next step, before that changes the weights; the last at once.
    assert reads == [(s, 2 * (s + 2), s + 1) for s in range(STEPS - 1)] + [(STEPS - 1, 2 * STEPS, STEPS)]
