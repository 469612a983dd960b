"""Fine-tuning: the recipe, the epoch that is chosen, what is trained and what is left, kills, several processes."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.runs import (
    assert_one_line,
    assert_same,
    command,
    finetune_config,
    log,
    on_ranks,
    trained,
    weights,
)

import eval as evaluation
import loop
import targets
import train
from encoders import ViT
from model import ClusterSTM, VideoToText, load_model
from runtime import atomic_write_text
from tasks import TASKS, get_task, read_rows, split_files

KINDS = ("sprites", "sprites-mc", "sprites-qa", "sprites-caption")


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
    words = f"epoch {best['epoch']} of 2, chosen on the val split: {best['metric']} {best['score']:.1f}"
    assert config["chosen"] == words and said.count(words) == 2             # when it ends, and in the block
    result = read(f"out/tuned/eval-{task}-cluster_stm.json")
    assert result["chosen"] == words and result["split"] == "test split"
    assert not result["notes"] and not result["unreadable"]
    kind = VideoToText if TASKS[task].kind in ("qa", "caption") else ClusterSTM
    assert type(load_model("out/tuned")) is kind
    code, out, err = command("eval.py", ["--task", task, "--checkpoint", "out/tuned", "--data-root", sprites,
                                       "--mask", "cluster_stm"], capsys)
    assert code == 0, err
    assert read(f"out/tuned/eval-{task}-cluster_stm.json")["scores"] == result["scores"]


def test_the_block_says_that_the_test_split_chose(tune, capsys):
    train.main(tune("sprites-mc", "--name tuned --select-split test"))
    assert "CHOSEN ON THE TEST SPLIT" in read("out/tuned/config.json")["chosen"]
    assert re.search("checkpoint: out/tuned; epoch . of 2, CHOSEN ON THE TEST SPLIT: accuracy", capsys.readouterr().out)


@pytest.mark.parametrize("scores, best", [((1.0, 3.0, 2.0), 2), ((2.0, 2.0, 1.0), 1), ((1.0, 2.0, 3.0), 3)])
def test_the_best_epoch_is_kept_the_first_of_equals(tune, monkeypatch, scores, best):
    after = []
    def score(model, *_):
        after.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return {"scores": {"0.7 match + 0.3 similarity": {"accuracy": scores[len(after) - 1]}}}
    monkeypatch.setattr(evaluation, "evaluate", score)
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(tune("sprites-mc", "--name tuned --epochs 3"))
    assert len(after) == 3
    assert_same(weights("out/tuned"), after[best - 1])
    assert any(not torch.equal(after[0][k], after[1][k]) for k in after[0])
    assert read("out/tuned/config.json")["chosen"].startswith(f"epoch {best} of 3")


def test_without_a_choice_the_last_epoch_is_kept(tune, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", None)                             # nothing is scored on the way
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    model = train.main(tune("sprites", "--name tuned --select-split last"))
    assert_same(weights("out/tuned"), dict(model.state_dict()))
    assert read("out/tuned/config.json")["chosen"] == "the last epoch was taken, without selection"


@pytest.mark.parametrize("task", ["sprites", "sprites-qa", "sprites-caption"])
def test_what_is_not_in_the_loss_stays_as_it_was(tune, first, task, monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(tune(task, "--name tuned --select-split last --epochs 1"))
    before, after = weights(f"{first}/out/first"), weights("out/tuned")
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
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(tune(task, "--name tuned --select-split last --epochs 30 --lr 1e-2 --text.dropout 0"))
    rows = list(log("out/tuned").values())
    name = "vtc" if task == "sprites" else "lm"
    assert sum(row[name] for row in rows[-3:]) < 0.8 * sum(row[name] for row in rows[:3])


@pytest.mark.parametrize("task, flags", [
    ("sprites", ""), ("sprites-qa", ""), ("sprites", "--model.proportional"), ("sprites-qa", "--model.proportional")])
def test_masked_tuning_sees_the_kept_tokens_and_asks_the_teacher_once(tune, sprites, task, flags, monkeypatch, capsys):
    """And where it counts, what each token of each clip stands for."""
    sizes, visible_shares, arguments = [], [], []
    compute_visible_ids, vit_forward = targets.compute_visible_ids, ViT.forward

    def compute(teacher, video, *rest):
        sizes.append(len(video))
        arguments[:] = teacher, *rest
        return compute_visible_ids(teacher, video, *rest)

    def forward(self, video, visible_ids=None, token_size=None):
        x = vit_forward(self, video, visible_ids, token_size)
        visible_shares.append(x.shape[1] / (video.shape[1] * 16))           # of 16 patches a frame
        if flags and visible_ids is not None:
            expected = compute_visible_ids(arguments[0], video, *arguments[1:-1], True)
            assert torch.equal(visible_ids, expected.visible_ids)
            assert torch.equal(token_size, expected.token_size) and token_size.max() > 1
        assert (token_size is None) == (not flags or visible_ids is None)
        return x

    monkeypatch.setattr(targets, "compute_visible_ids", compute)
    monkeypatch.setattr(ViT, "forward", forward)
    train.main(tune(task, f"--name tuned --epochs 4 {flags}"))
    clips = len(read_rows(TASKS[task], *split_files(TASKS[task], "train", sprites), train=True))
    assert sum(sizes) == clips + 6                                          # 6 of the validation split; r = 0.75
    assert set(visible_shares) == {0.25}
    result = read(f"out/tuned/eval-{task}-cluster_stm.json")
    assert result["tokens"] == "cluster_stm, 4 of 16 a frame" and "cluster_stm, 4 of 16" in capsys.readouterr().out
    sizes.clear(), visible_shares.clear()
    train.main(tune(task, f"--name open --epochs 1 --no-finetune-masked {flags}"))
    assert not sizes and set(visible_shares) == {1.0} and os.path.isfile(f"out/open/eval-{task}-all.json")


# ---------------------------------------------------------------------------------------------------------------------
# Kills and ranks

@pytest.mark.parametrize("task, dies", [("sprites-qa", 2), ("sprites-qa", 1), ("sprites", 2)])
def test_a_run_killed_while_it_is_scored_goes_on_bit_for_bit(tune, task, dies, monkeypatch):
    train.main(tune(task, "--name whole"))
    plain, calls = evaluation.evaluate, []
    def score(*args):
        calls.append(None)
        if len(calls) == dies:
            raise KeyboardInterrupt
        return plain(*args)
    monkeypatch.setattr(evaluation, "evaluate", score)
    with pytest.raises(KeyboardInterrupt):
        train.main(tune(task, "--name cut"))
    monkeypatch.setattr(evaluation, "evaluate", plain)
    train.main(tune(task, "--name cut --resume"))
    assert_same(weights("out/cut"), weights("out/whole"))
    assert read("out/cut/epochs.json") == read("out/whole/epochs.json")
    assert read("out/cut/config.json")["chosen"] == read("out/whole/config.json")["chosen"]


def test_a_run_killed_between_epochs_goes_on_bit_for_bit(tune, monkeypatch):
    train.main(tune("sprites-caption", "--name whole"))
    plain, saved = loop.save_checkpoint, []
    def save(*args):
        plain(*args)
        saved.append(None)
        if len(saved) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(loop, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt):
        train.main(tune("sprites-caption", "--name cut --save-every 1"))
    monkeypatch.setattr(loop, "save_checkpoint", plain)
    train.main(tune("sprites-caption", "--name cut --save-every 1 --resume"))
    assert_same(weights("out/cut"), weights("out/whole"))


@pytest.mark.parametrize("task", ["sprites", "sprites-qa"])
def test_two_processes_tune_and_score_as_one(tune, task):
    flags = "--select-split last --micro-batch 4 --epochs 1 --save-every 100"
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
        config["vit"].update(width=width, heads=width // 64)
        atomic_write_text(str(tmp_path / f"s{width}" / "config.json"), json.dumps(config))
        return str(tmp_path / f"s{width}")
    return make


@pytest.mark.parametrize("width, task, recipe", [
    (768, "msrvtt", dict(lr=1e-5, epochs=10, warmup_frac=0.1, batch=256)),
    (1024, "msrvtt", dict(lr=2e-5, epochs=7, warmup_frac=1 / 7, batch=256)),
    (768, "msvd-qa", dict(lr=6e-5, epochs=6, warmup_frac=1 / 6, batch=256)),
    (1024, "ssv2-template", dict(lr=1e-4, epochs=5, warmup_frac=0.2, batch=256)),
])
def test_the_recipe_is_the_published_one(student, width, task, recipe):
    cfg = train.finetune_defaults(task, student(width))
    assert {k: getattr(cfg, k) for k in recipe} == pytest.approx(recipe)
    row = get_task(task)
    assert (cfg.data.num_frames, cfg.data.hflip, cfg.max_grad_norm, cfg.weight_decay) == (12, row.flip, 0, 0.02)
    assert cfg.text.max_length == row.max_text_length and cfg.data.image_size == 16      # pixels: as it was pretrained
    assert cfg.vit.drop_path == (row.recipe_large if width == 1024 else row.recipe_base).drop_path


def test_loss_weights_of_the_pretraining_are_not_those_of_fine_tuning(student):
    folder = student(768)
    config = read(f"{folder}/config.json")
    config["model"].update(mrm_weight=0.5, vtc_weight=0.5, vtm_weight=0.0, mlm_weight=2.0)
    atomic_write_text(f"{folder}/config.json", json.dumps(config))
    assert train.loss_weights(train.finetune_defaults("msrvtt", folder).model) == {
        "mrm": 0, "align": 0, "pixels": 0, "vtc": 1, "vtm": 1, "mlm": 0}


@pytest.mark.parametrize("flag", ["--init-from", "--init_from"])
def test_the_run_is_named_after_the_folder_as_typed(student, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(os.path.dirname(student(768)))
    cfg, _, _ = train.split_defaults(["--stage", "finetune", "--task", "msrvtt", flag, "s768/"])
    assert (cfg.name, cfg.init_from) == ("s768-msrvtt", "s768/")


def test_a_student_of_the_hub_is_named_by_its_id(tune, first, monkeypatch):
    resolve = train.resolve_checkpoint
    monkeypatch.setattr(train, "resolve_checkpoint", lambda name, what: f"{first}/out/first" if name == "owner/student"
                        else resolve(name, what))
    cfg = train.finetune_defaults("sprites", "owner/student")
    assert (cfg.name, cfg.init_from) == ("student-sprites", "owner/student")
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(replace(tune("sprites", "--name tuned --epochs 1"), init_from="owner/student"))
    assert read("out/tuned/config.json")["init_from"] == "owner/student"


def test_flags_change_the_recipe_and_help_shows_it(sprites, first, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert finetune_config(sprites, first, "sprites-qa", "--lr 3e-5").lr == 3e-5
    where = ["--stage", "finetune", "--task=sprites-mc", f"--init-from={first}/out/first"]
    code, out, _ = command("train.py", [*where, "--help"], capsys)
    out, row = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split()), get_task("sprites-mc")
    assert code == 0 and "(default: sprites-mc)" in out
    assert f"(default: {row.recipe_base.lr})" in out and f"(default: {row.recipe_base.epochs})" in out


@pytest.mark.parametrize("flags, message", [
    ("--task sprites-q", "'sprites-q'.*'sprites-qa'"),
    ("--task msrvtt --data-root nowhere", "nowhere"),
    ("--task msrvtt", "--data-root"),
    ("--task msrvtt --data-root .", "anno_downstream/msrvtt_ret_train9k.json"),
    ("--task sprites --data-root {sprites} --select-split val --batch 7 --micro-batch 2", "batch.* 7 and 2"),
    ("--init-from nowhere", "nowhere is not a folder of a student"),
    ("--init-from {first}/out/first/teacher", "teacher/config.json.*'vit'"),
    ("base --task sprites", "preset.*'base'"),
    ("--init-from {first}/out/first --data-root {sprites} --vit.heads 4", "vit.heads.* 4.* 2|vit.heads.* 2.* 4"),
])
def test_what_cannot_be_tuned_says_so_in_one_line(sprites, first, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    args = flags.format(sprites=sprites, first=first).split()
    preset = [args.pop(0)] if args[0] in train.PRESETS else []
    student = [] if "--init-from" in args else ["--init-from", f"{first}/out/first"]
    code, _, err = command("train.py", [*preset, "--stage", "finetune", *args, *student], capsys)
    assert_one_line("train.py", code, err, message)
    files = {name for _, _, names in os.walk("out") for name in names}
    assert files <= {"lock", "run_state.json", "command.txt", "config.json"}


def test_a_split_that_nobody_published_cannot_choose(tune, sprites, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "sprites", replace(TASKS["sprites"], val_file=""))
    assert tune("sprites").select_split == ""
    with pytest.raises(ValueError, match="val split"):
        train.main(tune("sprites", "--select-split val --name a"))
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(tune("sprites", "--name b --epochs 1"))
    assert read("out/b/config.json")["chosen"] == "the last epoch was taken, without selection"


def test_a_missing_test_split_is_said_and_the_model_is_kept(tune, sprites, tmp_path, capsys):
    root = tmp_path / "own"
    root.mkdir()
    for name in os.listdir(sprites):
        if "qa_test" not in name:
            os.symlink(f"{sprites}/{name}", root / name)
    cfg = tune("sprites-qa", "--name tuned --epochs 1")
    train.main(replace(cfg, data_root=str(root)))
    assert "sprites_qa_test" in capsys.readouterr().out and os.path.isfile("out/tuned/model.safetensors")
