"""Logs: rows and keys, TensorBoard and wandb after kills, held-out scores that change no weight, missing packages."""

import os
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers.benchmarks import load_json, write_json
from helpers.processes import SHORT, assert_same_run, assert_train_error, launch_ranks, wait_for_exit
from helpers.runs import (
    Killed,
    argv,
    assert_one_line,
    command,
    kill,
    log,
    make_finetune_config,
    on_ranks,
    read_rows,
    with_weights,
)

import eval as evaluation
import logs
import train
from config import Config
from data import MixedDataset
from files import read_json
from loop import Stage
from runtime import RunContext, list_checkpoints, truncate_log

RECALLS = [f"{way}_R@{k}" for way in ("T2V", "V2T") for k in (1, 5, 10)]
SCORED = [("pretrain", step) for step in (3, 6, 8)] + [("unmasked", 2)]     # with SHORT and --val-every 3


@pytest.fixture
def val_flags(sprites):
    """The flags that score a run on the 6 validation clips."""
    return f"--data.val-file {sprites}/sprites_val.json --data.val-root {sprites}/videos"


def scores(folder="out/run"):
    """Read the rows of validations from log.jsonl, in order -> [(stage, step)], [recalls]."""
    rows = [row for row in read_rows(f"{folder}/log.jsonl") if "val_T2V_R@1" in row]
    return [(row["stage"], row["step"]) for row in rows], [[row[f"val_{name}"] for name in RECALLS] for row in rows]


def logged_values(folder, offset):
    """Read log.jsonl as TensorBoard and wandb should have it -> {(STAGE/KEY, step over all stages): value}."""
    values = {}
    for row in read_rows(f"{folder}/log.jsonl"):
        step = row["step"] + offset * (row["stage"] == "unmasked")
        for name in row.keys() - {"stage", "step"}:
            assert (f"{row['stage']}/{name}", step) not in values or name == "seconds"      # of losses, then of scores
            values[f"{row['stage']}/{name}", step] = row[name]
    return values


def train_killed_and_resumed(cfg, stage, step):
    """Train until a kill before this step, then resume."""
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, step)
        with pytest.raises(Killed):
            train.main(cfg)
    train.main(train.replace(cfg, resume=True))


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def make_log(folder, step=0, rank=0, stage="pretrain", **config):
    run = RunContext(Config(**config), folder, torch.device("cpu"), rank, 1)
    return logs.TrainLog(run, Stage(stage, None, range(32), None, 8, 9, 1.0, None), step)


def write_step(train_log, step):
    train_log.write(step, {"vtc": torch.ones(())}, torch.ones(()), 1.0, {})


def test_seconds_go_on_after_a_kill_without_the_pause_and_without_lost_steps(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: clock[0])
    path = str(tmp_path / "log.jsonl")
    for first, steps in ((0, (1, 2, 3, 4)), (2, (3, 4))):           # a kill after step 4, whose checkpoint is of step 2
        truncate_log(path, "pretrain", first)
        train_log = make_log(str(tmp_path), first)
        for step in steps:
            clock[0] += 10
            write_step(train_log, step)
        clock[0] += 5000
    clock[0] += 7
    train_log.write_scores(4, {"val_T2V_R@1": 1.0, "val_V2T_R@1": 2.0})
    rows = read_rows(path)
    assert [(row["step"], row["seconds"]) for row in rows] == [(1, 10), (2, 20), (3, 30), (4, 40), (4, 5047)]
    assert [row["epoch"] for row in rows[:4]] == [0.25, 0.5, 0.75, 1.0]


def test_an_epoch_is_as_many_clips_as_the_dataset_gives_before_it_begins_again():
    class Clips(list):
        seed, index_offset = 0, 100
    videos, images = Clips(range(10)), Clips(range(100, 125))
    mixed = MixedDataset(videos, images, batch=4)
    count = logs.epoch_clips(mixed)
    assert logs.epoch_clips(videos) == 10 and count % 4 == 0
    mixed[count - 1]
    assert mixed.epoch == 0
    mixed.datasets = ([*range(1000)], [*range(1000)])
    mixed[count]
    assert mixed.epoch == 1


def test_memory_is_the_peak_of_the_device(monkeypatch):
    used = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2 ** 20
    assert logs.peak_memory(torch.device("cpu")) == pytest.approx(used, rel=0.1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2 ** 29)
    assert logs.peak_memory(torch.device("cuda", 0)) == 1.5


def test_a_row_of_a_run_has_the_documented_keys(first_run):
    documented = {"stage", "step", "grad_norm", "lr", "epoch", "clips/s", "data_wait", "seconds", "memory"}
    for part in (".", "teacher", "text"):
        rows = read_rows(f"{first_run}/out/first/{part}/log.jsonl")
        assert all(row.keys() >= documented for row in rows)
        assert all(0 < a["seconds"] < b["seconds"] for a, b in zip(rows, rows[1:], strict=False))
        assert all(0.05 < row["memory"] < 50 for row in rows)
    rows = read_rows(f"{first_run}/out/first/log.jsonl")
    assert [row["epoch"] for row in rows] == pytest.approx([step * 8 / 24 for step in (1, 2, 3, 4, 1, 2)])


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard

@pytest.fixture
def read_events(monkeypatch):
    """read_events(folder) reads the scalars of TensorBoard, none of which is there twice -> {(tag, step): value}."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer
    # Names of files end with a count over the process, and sort by it if they are of the same second.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

    def read(folder):
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
        read = [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
        twice = {(tag, step) for tag, step, _ in read if [(t, s) for t, s, _ in read].count((tag, step)) > 1}
        assert all(tag.endswith("/seconds") for tag, _ in twice)            # of a row of losses and a row of scores
        return {(tag, step): value for tag, step, value in read}
    return read


@pytest.mark.parametrize("stage, step", [("pretrain", 5), ("unmasked", 1)])
def test_tensorboard_has_the_rows_of_the_log_once_after_a_kill(run_config, val_flags, read_events, stage, step):
    cfg = run_config(f"{SHORT} --log tensorboard --save-every 4 --val-every 3 {val_flags}")
    train_killed_and_resumed(cfg, stage, step)
    expected = logged_values("out/run", offset=8)
    assert read_events("out/run/tensorboard") == pytest.approx(expected, rel=1e-6)
    steps = {step for tag, step in expected if tag == "unmasked/vtc"}
    assert steps == {9, 10} and ("pretrain/val_V2T_R@10", 6) in expected and ("pretrain/lr", 8) in expected


def test_each_folder_has_its_own_tensorboard_and_only_rank_0_writes_it(sprites, tmp_path, monkeypatch, read_events):
    from helpers.runs import config
    monkeypatch.chdir(tmp_path)
    on_ranks(2, config(sprites, "--name run --log tensorboard --steps 2 --unmasked-steps 1 --log-every 2"))
    for part, files in (("", 2), ("teacher/", 1), ("text/", 1)):
        folder = f"out/run/{part}tensorboard"
        assert len(os.listdir(folder)) == files                             # one for each stage
        assert read_events(folder) == pytest.approx(logged_values(f"out/run/{part}", offset=2), rel=1e-6)


def test_a_run_that_begins_again_in_a_folder_leaves_no_old_events(run_config, read_events):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 1)                      # before the first checkpoint
        with pytest.raises(Killed):
            train.main(run_config(f"{SHORT} --log tensorboard --lr 1e-4"))
    train.main(run_config(f"{SHORT} --log tensorboard --log-every 3"))
    assert read_events("out/run/tensorboard") == pytest.approx(logged_values("out/run", offset=8), rel=1e-6)


def test_a_row_is_in_tensorboard_before_the_next_step(tmp_path, read_events):
    train_log = make_log(str(tmp_path), log=("tensorboard",))               # a kill may follow at once
    write_step(train_log, 1)
    assert read_events(f"{tmp_path}/tensorboard")["pretrain/vtc", 1] == 1
    train_log.close()


def test_a_full_disk_of_tensorboard_is_one_line(tmp_path, monkeypatch):
    def flush():
        raise OSError(28, "No space left on device")

    library = SimpleNamespace(SummaryWriter=lambda *_, **__: SimpleNamespace(
        add_scalar=lambda *_: None, flush=flush, close=flush))
    monkeypatch.setattr(logs, "import_library", lambda name: library)
    train_log = make_log(str(tmp_path), log=("tensorboard",))
    with pytest.raises(logs.WriteError, match=f"^[^\n]*{tmp_path}/tensorboard[^\n]*No space left[^\n]*$"):
        write_step(train_log, 1)
    train_log.close()


# ---------------------------------------------------------------------------------------------------------------------
# wandb

class FakeWandb(ModuleType):
    """Stand for the module wandb and its server: a resumed run begins with the step after its last."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.run, self.inits, self.history, self.finished = None, [], {}, 0

    def init(self, **settings):
        assert self.run is None
        self.inits.append(settings)
        history = self.history.setdefault(settings["id"], {})

        def write(values, step):
            assert step >= self.run.last_step, "wandb refuses a step before the last one"
            self.run.last_step = step
            for name, value in values.items():
                assert (name, step) not in history or name.endswith("/seconds")
                history[name, step] = value

        first = max((step for _, step in history), default=-1) + 1
        self.run = SimpleNamespace(id=settings["id"], starting_step=first, last_step=first, log=write)

    def finish(self):
        self.run, self.finished = None, self.finished + (self.run is not None)


@pytest.fixture
def wandb(monkeypatch):
    """A fake module wandb."""
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("stage, step", [("pretrain", 5), ("unmasked", 1)])
def test_wandb_goes_on_with_the_same_run_and_gets_each_row_once(run_config, val_flags, wandb, stage, step):
    cfg = run_config(f"{SHORT} --log wandb --save-every 4 --val-every 3 {val_flags}")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, step)
        with pytest.raises(Killed):
            train.main(cfg)
    first, = wandb.history
    before = dict(wandb.history[first])
    wandb.run = None                                    # another process
    train.main(train.replace(cfg, resume=True))
    assert [{**settings, "config": ...} for settings in wandb.inits] == 2 * [{
        "project": "clusterstm", "name": "run", "dir": "out/run", "id": first, "resume": "allow", "config": ...}]
    assert wandb.inits[0]["config"]["data"]["num_frames"] == 4              # "mode" is left to WANDB_MODE
    assert read_json("out/run/run_state.json")["wandb_id"] == first
    history, expected = wandb.history[first], logged_values("out/run", offset=8)
    assert history.keys() == expected.keys() and before.items() <= history.items()
    timed = ("clips/s", "data_wait", "seconds", "memory")                   # a step that is repeated takes another time
    for key in [key for key in expected if not key[0].endswith(timed)]:
        assert history[key] == expected[key]


def test_each_folder_has_its_own_wandb_run_in_the_users_project(sprites, tmp_path, monkeypatch, wandb):
    from helpers.runs import config
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    train.main(config(sprites, "--name run --log wandb --steps 2 --unmasked-steps 1"))
    assert [(s["name"], s["project"], s["dir"]) for s in wandb.inits] == \
        [(name, "mine", "elsewhere") for name in ("run/teacher", "run/text", "run")]
    assert wandb.finished == 2 and len(wandb.history) == 3                  # wandb finishes the last one at exit
    last = logged_values("out/run", offset=2)
    assert wandb.history[wandb.run.id] == last


def test_wandb_that_cannot_begin_is_one_line(run_config, wandb, monkeypatch):
    def init(**_):
        raise wandb.Error("No API key\nconfigured")
    monkeypatch.setattr(wandb, "init", init, raising=False)
    with pytest.raises(OSError, match="^wandb did not begin a run .*No API key[^\n]*WANDB_MODE=offline"):
        train.main(run_config(f"{SHORT} --log wandb"))


def test_only_rank_0_writes(tmp_path, wandb):
    train_log = make_log(str(tmp_path), rank=1, log=("wandb",))
    write_step(train_log, 1)
    train_log.write_scores(1, {"val_T2V_R@1": 1.0, "val_V2T_R@1": 2.0})
    assert not wandb.inits and not os.path.exists(tmp_path / "log.jsonl")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_done(sprites, first_run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for module in [m for m in sys.modules if m.startswith(("torch.utils.tensorboard", "tensorboard", "wandb"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    flags = with_weights(first_run, f"{SHORT} --log {name}")
    code, _, err = command("train.py", argv(sprites, flags), capsys)
    assert_one_line("train.py", code, err, f"--log {name} needs the package {name}, .*: pip install {name}$")
    assert not os.path.exists("out")


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb" / "offline-run").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        logs.import_library("wandb")
    sys.modules.pop("wandb", None)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out retrieval

VIEWS = {"cached": "--data.num-views 1", "computed": ""}


@pytest.mark.parametrize("world, views", [(1, "cached"), (1, "computed"), (2, "computed")], ids=str)
def test_a_validation_changes_no_weight_and_scores_as_eval_does(run_config, sprites, val_flags, undisturbed_run, world,
                                                                views):
    flags = f"{SHORT} --micro-batch 4 {VIEWS[views]} "
    val_flags = val_flags.replace("_val.json", "_train.json")               # 24 clips: recalls that differ
    cfg = run_config(f"{flags} --val-every 3 {val_flags}")
    train.main(cfg) if world == 1 else on_ranks(world, cfg)
    assert_same_run(undisturbed_run(flags, world))
    steps, values = scores()
    assert steps == SCORED
    for folder, recalls in (("out/run/before_unmasked", values[2]), ("out/run", values[3])):
        result = evaluation.main(evaluation.Config(
            checkpoint=folder, data=f"{sprites}/sprites_train.json", data_root=f"{sprites}/videos", device="cpu",
            rerank=0, out="eval.json"))["scores"]["similarity"]
        assert recalls == pytest.approx([result[way][name] for way, name in (r.split("_") for r in RECALLS)])
    assert len({tuple(v) for v in values}) > 2


def test_without_val_every_the_ends_of_the_stages_are_scored(run_config, val_flags, capsys):
    train.main(run_config(f"{SHORT} {val_flags}"))
    steps, values = scores()
    assert steps == [("pretrain", 8), ("unmasked", 2)]
    shown = re.findall(r"(\w+) step (\d+), validation: T2V R@1 ([\d.]+), V2T R@1 ([\d.]+)", capsys.readouterr().out)
    assert [(stage, int(step)) for stage, step, *_ in shown] == steps
    assert [[float(x) for x in shown[i][2:]] for i in (0, 1)] == \
        [pytest.approx([row[0], row[3]], abs=0.051) for row in values]


def test_a_validation_that_was_killed_is_repeated_and_one_that_was_not_is_kept(run_config, val_flags, undisturbed_run,
                                                                              monkeypatch):
    calls, evaluate = [], evaluation.evaluate

    def counted(*args):
        calls.append(len(calls))
        if len(calls) == 2:                             # in the validation after step 6
            raise Killed
        return evaluate(*args)

    monkeypatch.setattr(evaluation, "evaluate", counted)
    cfg = run_config(f"{SHORT} --val-every 3 --save-every 50 {val_flags}")
    with pytest.raises(Killed):
        train.main(cfg)
    assert scores()[0] == SCORED[:1]
    train.main(train.replace(cfg, resume=True))
    assert scores()[0] == SCORED and len(calls) == 5
    assert_same_run(undisturbed_run(SHORT))
    shutil.rmtree("out")
    train_killed_and_resumed(cfg, "pretrain", 6)        # just after the validation of step 6
    assert scores()[0] == SCORED and len(calls) == 9
    assert_same_run(undisturbed_run(SHORT))


@pytest.mark.parametrize("in_validation", [True, False])
def test_all_ranks_agree_whether_a_validation_is_to_be_repeated(run_config, val_flags, in_validation):
    cfg = run_config(f"{SHORT} --micro-batch 4 --val-every 3 {val_flags}")
    with pytest.MonkeyPatch.context() as patch:
        if in_validation:
            patch.setattr(train.Validation, "__call__", Mock(side_effect=Killed))
        else:
            kill(patch, "pretrain", 3)
        with pytest.raises(Killed):
            train.main(cfg)
    assert list_checkpoints("out/run")[0].endswith("pretrain-0000003.pt")
    assert os.path.isfile("out/run/log.jsonl") and scores()[0] == ([] if in_validation else SCORED[:1])
    on_ranks(2, train.replace(cfg, resume=True))
    assert scores()[0] == SCORED


def test_validation_may_begin_and_end_when_a_run_is_resumed(run_config, val_flags, undisturbed_run):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 5)
        with pytest.raises(Killed):
            train.main(run_config(f"{SHORT} --val-every 1 {val_flags}"))
    train.main(run_config(f"{SHORT} --resume"))
    assert scores()[0] == [("pretrain", step) for step in (1, 2, 3, 4, 5)]
    assert_same_run(undisturbed_run(SHORT))


def test_unreadable_validation_videos_are_listed_and_not_fatal(run_config, sprites, undisturbed_run):
    rows = load_json(f"{sprites}/sprites_val.json")
    os.makedirs("videos")
    for row in rows[:4]:
        shutil.copy(f"{sprites}/videos/{row['video']}", "videos")
    with open(f"videos/{rows[4]['video']}", "wb") as f:
        f.write(b"\0" * 300)                            # and the file of row 5 is missing
    write_json("val.json", rows)
    train.main(run_config(f"{SHORT} --data.val-file val.json --data.val-root videos"))
    assert_same_run(undisturbed_run(SHORT))
    listed = {row["video"]: (row["where"], row["reason"]) for row in read_rows("out/run/bad_media.jsonl")}
    assert listed.keys() == {f"videos/{row['video']}" for row in rows[4:]}
    assert all(where == "val.json" and reason.startswith(f"val.json, row {i}")
               for i, (where, reason) in zip((5, 4), listed.values(), strict=True))
    scored = [row for row in read_rows("out/run/log.jsonl") if "val_T2V_R@1" in row]
    assert [row["val_unreadable"] for row in scored] == [2, 2]


def test_a_validation_file_of_which_nothing_can_be_read_is_one_line(run_config, sprites):
    rows = load_json(f"{sprites}/sprites_val.json")[:2]
    write_json("val.json", rows)
    flags = f"{SHORT} --micro-batch 4 --data.val-file val.json --data.val-root videos"
    with pytest.raises(FileNotFoundError, match="^[^\n]*videos[^\n]*$"):    # before training
        train.main(run_config(flags))
    assert not os.path.exists("out/run/log.jsonl")
    os.makedirs("videos")
    for row in rows:
        open(f"videos/{row['video']}", "w").close()
    with launch_ranks(2, run_config(flags)) as processes:
        for code, _, err in wait_for_exit(processes):
            assert_train_error(code, err, "val.json could not be scored: none of 2 videos could be read$")
    assert os.path.isfile("out/run/checkpoints/pretrain-0000008.pt")


def test_only_the_first_videos_of_a_large_file_are_scored(run_config, val_flags, monkeypatch, capsys):
    monkeypatch.setattr(train.Validation, "MAX_VIDEOS", 4)
    annotations, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: annotations.append(args[2]) or evaluate(*args))
    train.main(run_config(f"--name run --steps 1 --unmasked-steps 0 {val_flags}"))
    assert [row.video[-13:] for row in annotations[0]] == [f"val_{i:05d}.mp4" for i in range(4)]
    assert "the first 4 of its 6 videos are scored" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ("--val-every 5", "data.val_file must be an annotation file .* '' and 5"),
    ("--val-every -1", "val_every must be at least 0, got -1"),
    ("--log tensorboard visdom", "visdom"), ("--data.val-file nowhere.json", "nowhere.json"),
])
def test_wrong_settings_are_one_line(sprites, first_run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("train.py", argv(sprites, with_weights(first_run, f"{SHORT} {flags}")), capsys)
    assert_one_line("train.py", code, err, message)
    assert not os.path.exists("out/run/log.jsonl")


def test_finetuning_refuses_a_validation_file(sprites, first_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data.val_file must be empty for stage finetune, .* got 'val.json'"):
        train.replace(cfg := make_finetune_config(sprites, first_run, "sprites"),
                      data=train.replace(cfg.data, val_file="val.json"))
    with pytest.raises(ValueError, match="log must name some of tensorboard, wandb, got visdom"):
        Config(log=("visdom",))


def test_a_log_with_scores_counts_each_step_once(run_config, val_flags):
    train.main(run_config(f"{SHORT} --val-every 2 {val_flags}"))
    rows = log("out/run")
    assert list(rows) == [("pretrain", s) for s in range(1, 9)] + [("unmasked", s) for s in (1, 2)]
    assert all({"vtc", "lr"} <= row.keys() for row in rows.values())
