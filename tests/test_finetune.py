"""Fine-tuning: the recipe, the epoch that is chosen, what is trained and what is left, kills, several processes."""

import json
import os
import re
import shutil

import pytest
import torch
import tyro
from safetensors.torch import load_file
from test_train import (  # noqa: F401  (the last two are fixtures)
    ROOT,
    assert_one_line,
    assert_same,
    command,
    first_run,
    log,
    on_ranks,
    small_sprites,
    trained,
    weights,
)

import data
import eval as scoring
import train
from model import ClusterSTM, VideoToText, ViT, load_model
from tasks import TASKS, find_task, read_rows, split_files

KINDS = ("sprites", "sprites-mc", "sprites-qa", "sprites-caption")
QUICK = "--batch 8 --epochs 2 --data.frames 4 --data.cache-frames 8 --log-every 1"


def arguments(sprites, first, task, flags=""):
    return ["--stage", "finetune", "--task", task, "--student", f"{first}/out/first", "--data-root", sprites,
            *QUICK.split(), *flags.split()]


def config(*args):
    settings, left = train.default(arguments(*args))
    return tyro.cli(train.Config, args=left, default=settings)


@pytest.fixture
def tune(sprites, first, tmp_path, monkeypatch):
    """In a folder of its own: config(task, flags). Java, which is slow to start, is left to the tests of eval.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    return lambda task, flags="": config(sprites, first, task, flags)


def read(path):
    with open(path) as f:
        return json.load(f)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

@pytest.mark.parametrize("task", KINDS)
def test_a_task_is_trained_chosen_and_scored(tune, sprites, task, capsys):
    train.main(tune(task, "--name tuned"))
    said = capsys.readouterr().out
    epochs, config = read("out/tuned/epochs.json"), read("out/tuned/config.json")
    assert [row["epoch"] for row in epochs] == [1, 2]
    best = max(epochs, key=lambda row: row["score"])
    words = f"epoch {best['epoch']} of 2, chosen on the val split: {best['by']} {best['score']:.1f}"
    assert config["chosen"] == words and said.count(words) == 2             # when it ends, and in the block
    result = read(f"out/tuned/eval-{task}-cluster_stm.json")
    assert result["chosen"] == words and result["split"] == "test split" and not result["notes"] and not result["lost"]
    kind = VideoToText if TASKS[task].kind in ("qa", "caption") else ClusterSTM
    assert type(load_model("out/tuned")) is kind
    code, out, err = command("eval.py", ["--task", task, "--checkpoint", "out/tuned", "--data-root", sprites,
                                       "--mask", "cluster_stm"], capsys)
    assert code == 0, err
    assert read(f"out/tuned/eval-{task}-cluster_stm.json")["scores"] == result["scores"]


def test_the_block_says_that_the_test_split_chose(tune, capsys):
    train.main(tune("sprites-mc", "--name tuned --select test"))
    assert "CHOSEN ON THE TEST SPLIT" in read("out/tuned/config.json")["chosen"]
    assert re.search("checkpoint: out/tuned; epoch . of 2, CHOSEN ON THE TEST SPLIT: accuracy", capsys.readouterr().out)


@pytest.mark.parametrize("scores, best", [((1.0, 3.0, 2.0), 2), ((2.0, 2.0, 1.0), 1), ((1.0, 2.0, 3.0), 3)])
def test_the_best_epoch_is_kept_the_first_of_equals(tune, monkeypatch, scores, best):
    after = []
    def score(model, *_):
        after.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return {"scores": {"0.7 match + 0.3 similarity": {"accuracy": scores[len(after) - 1]}}}
    monkeypatch.setattr(scoring, "score", score)
    monkeypatch.setattr(scoring, "main", lambda cfg: None)
    train.main(tune("sprites-mc", "--name tuned --epochs 3"))
    assert len(after) == 3
    assert_same(load_file("out/tuned/model.safetensors"), after[best - 1])
    assert any(not torch.equal(after[0][k], after[1][k]) for k in after[0])
    assert read("out/tuned/config.json")["chosen"].startswith(f"epoch {best} of 3")


def test_without_a_choice_the_last_epoch_is_kept(tune, monkeypatch):
    monkeypatch.setattr(scoring, "score", None)                             # nothing is scored on the way
    monkeypatch.setattr(scoring, "main", lambda cfg: None)
    model = train.main(tune("sprites", "--name tuned --select last"))
    assert_same(load_file("out/tuned/model.safetensors"), dict(model.state_dict()))
    assert read("out/tuned/config.json")["chosen"] == "the last epoch, none was chosen"


@pytest.mark.parametrize("task", ["sprites", "sprites-qa", "sprites-caption"])
def test_what_is_not_in_the_loss_stays_as_it_was(tune, first, task, monkeypatch):
    monkeypatch.setattr(scoring, "main", lambda cfg: None)
    train.main(tune(task, "--name tuned --select last --epochs 1"))
    before, after = load_file(f"{first}/out/first/model.safetensors"), load_file("out/tuned/model.safetensors")
    shared = before.keys() & after.keys()
    still = {k for k in shared if torch.equal(before[k], after[k])}
    idle = {k for k in shared if k.startswith(("decoder.", "bert.cls."))}
    # A word that no caption has, and the key's bias, which moves all scores of a query alike, can stay.
    assert idle <= still and all("key.bias" in k for k in still - idle), sorted(still - idle)
    assert any(k.startswith("vit.") for k in shared - still)
    losses = {"sprites": {"vtc", "vtm"}}.get(task, {"lm"})
    assert losses == {"mrm", "vtc", "vtm", "mlm", "lm"} & {k for row in log("out/tuned").values() for k in row}


@pytest.mark.parametrize("task", ["sprites", "sprites-qa", "sprites-caption"])
def test_the_loss_falls(tune, task, monkeypatch):
    monkeypatch.setattr(scoring, "main", lambda cfg: None)
    train.main(tune(task, "--name tuned --select last --epochs 30 --lr 1e-2 --model.dropout 0"))
    rows = list(log("out/tuned").values())
    name = "vtc" if task == "sprites" else "lm"
    assert sum(row[name] for row in rows[-3:]) < 0.8 * sum(row[name] for row in rows[:3])


@pytest.mark.parametrize("task, flags", [
    ("sprites", ""), ("sprites-qa", ""), ("sprites", "--model.proportional"), ("sprites-qa", "--model.proportional")])
def test_masked_tuning_sees_the_kept_tokens_and_asks_the_teacher_once(tune, sprites, task, flags, monkeypatch, capsys):
    """And where it counts, what each token of each clip stands for."""
    asked, seen, given = [], [], []
    plain, look = train.kept, ViT.forward
    def kept(teacher, video, *more):
        asked.append(len(video))
        given[:] = teacher, *more
        return plain(teacher, video, *more)
    def forward(self, video, keep=None, size=None):
        x = look(self, video, keep, size)
        seen.append(x.shape[1] / (video.shape[1] * 16))                     # of 16 patches a frame
        if flags and keep is not None:
            told = plain(given[0], video, *given[1:-1], True)
            assert torch.equal(keep, told.keep) and torch.equal(size, told.size) and size.max() > 1
        assert (size is None) == (not flags or keep is None)
        return x
    monkeypatch.setattr(train, "kept", kept)
    monkeypatch.setattr(ViT, "forward", forward)
    train.main(tune(task, f"--name tuned --epochs 4 {flags}"))
    clips = len(read_rows(TASKS[task], *split_files(TASKS[task], "train", sprites), train=True))
    assert sum(asked) == clips + 6 and set(seen) == {0.25}                  # 6 of the validation split; r = 0.75
    result = read(f"out/tuned/eval-{task}-cluster_stm.json")
    assert result["tokens"] == "cluster_stm, 4 of 16 a frame" and "cluster_stm, 4 of 16" in capsys.readouterr().out
    asked.clear(), seen.clear()
    train.main(tune(task, f"--name open --epochs 1 --no-masked {flags}"))
    assert not asked and set(seen) == {1.0} and os.path.isfile(f"out/open/eval-{task}-all.json")


# ---------------------------------------------------------------------------------------------------------------------
# Kills and ranks

@pytest.mark.parametrize("task, dies", [("sprites-qa", 2), ("sprites-qa", 1), ("sprites", 2)])
def test_a_run_killed_while_it_is_scored_goes_on_bit_for_bit(tune, task, dies, monkeypatch):
    train.main(tune(task, "--name whole"))
    plain, calls = scoring.score, []
    def score(*args):
        calls.append(None)
        if len(calls) == dies:
            raise KeyboardInterrupt
        return plain(*args)
    monkeypatch.setattr(scoring, "score", score)
    with pytest.raises(KeyboardInterrupt):
        train.main(tune(task, "--name cut"))
    monkeypatch.setattr(scoring, "score", plain)
    train.main(tune(task, "--name cut --resume"))
    assert_same(weights("out/cut"), weights("out/whole"))
    assert read("out/cut/epochs.json") == read("out/whole/epochs.json")
    assert read("out/cut/config.json")["chosen"] == read("out/whole/config.json")["chosen"]


def test_a_run_killed_between_epochs_goes_on_bit_for_bit(tune, monkeypatch):
    train.main(tune("sprites-caption", "--name whole"))
    plain, saved = train.save_state, []
    def save(*args):
        plain(*args)
        saved.append(None)
        if len(saved) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_state", save)
    with pytest.raises(KeyboardInterrupt):
        train.main(tune("sprites-caption", "--name cut --save-every 1"))
    monkeypatch.setattr(train, "save_state", plain)
    train.main(tune("sprites-caption", "--name cut --save-every 1 --resume"))
    assert_same(weights("out/cut"), weights("out/whole"))


@pytest.mark.parametrize("task", ["sprites", "sprites-qa"])
def test_two_processes_tune_and_score_as_one(tune, task):
    flags = "--select last --micro-batch 4 --epochs 1 --save-every 100"
    one, two = tune(task, f"{flags} --name one"), tune(task, f"{flags} --name two")
    train.main(one)
    on_ranks(2, two)
    for key, row in log("out/one").items():
        assert row["grad_norm"] == pytest.approx(log("out/two")[key]["grad_norm"], rel=1e-3)
    one, other = trained("out/one"), trained("out/two")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")
    a, b = (read(f"out/{name}/eval-{task}-cluster_stm.json") for name in ("one", "two"))
    assert a["scores"].keys() == b["scores"].keys() and a["videos"] == b["videos"]


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@pytest.fixture
def student(first, tmp_path):
    """A folder whose config.json is of the given widths."""
    def make(width):
        shutil.copytree(f"{first}/out/first", tmp_path / f"s{width}")
        config = read(f"{first}/out/first/config.json")
        config["model"].update(width=width, heads=width // 64)
        data.write_atomically(str(tmp_path / f"s{width}" / "config.json"), json.dumps(config))
        return str(tmp_path / f"s{width}")
    return make


@pytest.mark.parametrize("width, task, recipe", [
    (768, "msrvtt", dict(lr=1e-5, epochs=10, warmup=0.1, batch=256)),
    (1024, "msrvtt", dict(lr=2e-5, epochs=7, warmup=1 / 7, batch=256)),
    (768, "msvd-qa", dict(lr=6e-5, epochs=6, warmup=1 / 6, batch=256)),
    (1024, "ssv2-template", dict(lr=1e-4, epochs=5, warmup=0.2, batch=256)),
])
def test_the_recipe_is_the_published_one(student, width, task, recipe):
    cfg = train.tuning(task, student(width))
    assert {k: getattr(cfg, k) for k in recipe} == pytest.approx(recipe)
    row = find_task(task)
    assert (cfg.data.frames, cfg.data.flip, cfg.clip_grad, cfg.weight_decay) == (12, row.flip, 0, 0.02)
    assert cfg.model.text_length == row.length and cfg.data.size == 16      # pixels: as it was pretrained
    assert cfg.model.drop_path == (row.large if width == 1024 else row.base).drop_path


def test_flags_change_the_recipe_and_help_shows_it(sprites, first, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert config(sprites, first, "sprites-qa", "--lr 3e-5").lr == 3e-5
    where = ["--stage", "finetune", "--task=sprites-mc", f"--student={first}/out/first"]
    code, out, _ = command("train.py", [*where, "--help"], capsys)
    out, row = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split()), find_task("sprites-mc")
    assert code == 0 and "(default: sprites-mc)" in out
    assert f"(default: {row.base.lr})" in out and f"(default: {row.base.epochs})" in out


@pytest.mark.parametrize("flags, message", [
    ("--task sprites-q", "there is no task 'sprites-q'; did you mean 'sprites-qa'"),
    ("--task msrvtt --data-root nowhere", "nowhere: no such folder, wanted as --data-root"),
    ("--task msrvtt", "--data-root is wanted"),
    ("--task msrvtt --data-root .", "has no anno_downstream/msrvtt_ret_train9k.json"),
    ("--task sprites --data-root {sprites} --select val --batch 7 --micro-batch 2", "batch 7 is no multiple"),
    ("--student nowhere", "nowhere is no folder of a student"),
    ("--student {first}/out/first/teacher", "has no 'model' part with a text encoder"),
    ("base --task sprites", "base: fine-tuning takes its settings from task and student"),
    ("--student {first}/out/first --data-root {sprites} --model.heads 4", "model.heads is 2, wanted 4"),
])
def test_what_cannot_be_tuned_says_so_in_one_line(sprites, first, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    args = flags.format(sprites=sprites, first=first).split()
    preset = [args.pop(0)] if args[0] in train.PRESETS else []
    student = [] if "--student" in args else ["--student", f"{first}/out/first"]
    code, _, err = command("train.py", [*preset, "--stage", "finetune", *args, *student], capsys)
    assert_one_line("train.py", code, err, message)
    assert {name for _, _, files in os.walk("out") for name in files} <= {"lock", "run.json"}


def test_a_split_that_nobody_published_cannot_choose(tune, sprites, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "sprites", train.replace(TASKS["sprites"], val=""))
    assert train.replace(tune("sprites")).select == ""
    with pytest.raises(ValueError, match="the task has no val split: none is published"):
        train.main(tune("sprites", "--select val --name a"))
    monkeypatch.setattr(scoring, "main", lambda cfg: None)
    train.main(tune("sprites", "--name b --epochs 1"))
    assert read("out/b/config.json")["chosen"] == "the last epoch, none was chosen"


def test_a_missing_test_split_is_said_and_the_model_is_kept(tune, sprites, tmp_path, capsys):
    root = tmp_path / "own"
    root.mkdir()
    for name in os.listdir(sprites):
        if "qa_test" not in name:
            os.symlink(f"{sprites}/{name}", root / name)
    cfg = tune("sprites-qa", "--name tuned --epochs 1")
    cfg.data_root = str(root)
    train.main(cfg)
    assert "not scored on the test split: " in capsys.readouterr().out and os.path.isfile("out/tuned/model.safetensors")
