"""Fine-tune: the published recipes, selection of an epoch, trained parameters, kills, several processes."""

import os
import re
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers.benchmarks import load_json, write_json
from helpers.runs import (
    Killed,
    assert_close_weights,
    assert_one_line,
    assert_same,
    command,
    kill,
    log,
    make_finetune_config,
    on_ranks,
    weights,
    weights_without_key_bias,
)

import eval as evaluation
import loop
import targets
import train
from encoders import ViT
from model import ClusterSTM, VideoToText, load_model
from runtime import list_checkpoints
from tasks import TASKS, get_task, read_rows, split_files

TASK_NAMES = ("sprites", "sprites-mc", "sprites-qa", "sprites-caption")


# ---------------------------------------------------------------------------------------------------------------------
# Runs

@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_best_epoch_on_the_val_split_is_scored_on_the_test_split(finetune_config, sprites, task, capsys):
    train.main(finetune_config(task, "--name tuned"))
    out = capsys.readouterr().out
    epochs, config = load_json("out/tuned/epochs.json")["epochs"], load_json("out/tuned/config.json")
    assert [row["epoch"] for row in epochs] == [1, 2]
    best = max(epochs, key=lambda row: row["score"])
    chosen = f"epoch {best['epoch']} of 2, chosen on the val split: {best['metric']} {best['score']:.1f}"
    assert config["chosen"] == chosen and out.count(chosen) == 2            # after training, and above the scores
    result = load_json(f"out/tuned/eval-{task}-cluster_stm.json")
    assert result["chosen"] == chosen and result["split"] == "test split"
    assert not result["notes"] and not result["unreadable"]
    model_class = VideoToText if TASKS[task].kind in ("qa", "caption") else ClusterSTM
    assert type(load_model("out/tuned")) is model_class
    code, out, err = command("eval.py", ["--task", task, "--checkpoint", "out/tuned", "--data-root", sprites,
                                         "--mask", "cluster_stm"], capsys)
    assert code == 0, err
    assert load_json(f"out/tuned/eval-{task}-cluster_stm.json")["scores"] == result["scores"]


def test_selection_on_the_test_split_is_stated_in_config_and_output(finetune_config, capsys):
    train.main(finetune_config("sprites-mc", "--name tuned --select-split test"))
    assert "CHOSEN ON THE TEST SPLIT" in load_json("out/tuned/config.json")["chosen"]
    assert re.search("checkpoint: out/tuned; epoch . of 2, CHOSEN ON THE TEST SPLIT: accuracy", capsys.readouterr().out)


@pytest.mark.parametrize("split", ["val", "test"])
def test_epochs_are_scored_on_the_chosen_split(finetune_config, sprites, split, monkeypatch):
    videos = []

    def evaluate(model, task, annotations, *_):
        videos.append([row.video for row in annotations])
        return {"scores": {"0.7 match + 0.3 similarity": {"accuracy": 1.0}}}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config("sprites-mc", f"--name tuned --epochs 1 --select-split {split}"))
    task = TASKS["sprites-mc"]
    assert videos == [[row.video for row in read_rows(task, *split_files(task, split, sprites), train=False)]]


@pytest.mark.parametrize("scores, best", [((1.0, 3.0, 2.0), 2), ((2.0, 2.0, 1.0), 1), ((1.0, 2.0, 3.0), 3)])
def test_the_best_epoch_is_kept_and_the_first_one_of_equals(finetune_config, monkeypatch, scores, best):
    epoch_weights = []

    def evaluate(model, *_):
        epoch_weights.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return {"scores": {"0.7 match + 0.3 similarity": {"accuracy": scores[len(epoch_weights) - 1]}}}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config("sprites-mc", "--name tuned --epochs 3"))
    assert len(epoch_weights) == 3
    assert_same(weights("out/tuned"), epoch_weights[best - 1])
    assert any(not torch.equal(epoch_weights[0][k], epoch_weights[1][k]) for k in epoch_weights[0])
    assert load_json("out/tuned/config.json")["chosen"].startswith(f"epoch {best} of 3")


def test_without_selection_the_last_epoch_is_kept(finetune_config, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", None)                       # a call would raise
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    model = train.main(finetune_config("sprites", "--name tuned --select-split last"))
    assert_same(weights("out/tuned"), dict(model.state_dict()))
    assert load_json("out/tuned/config.json")["chosen"] == "the last epoch was taken, without selection"


@pytest.mark.parametrize("task", ["sprites", "sprites-qa", "sprites-caption"])
def test_parameters_that_no_loss_reaches_stay_unchanged(finetune_config, first_run, task, monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config(task, "--name tuned --select-split last --epochs 1"))
    before, after = weights(f"{first_run}/out/first"), weights("out/tuned")
    shared = before.keys() & after.keys()
    unchanged = {k for k in shared if torch.equal(before[k], after[k])}
    unused = {k for k in shared if k.startswith(("decoder.", "bert.cls."))}
    # A key's bias moves all scores of a query alike, so it may stay unchanged too.
    assert unused <= unchanged and all("key.bias" in k for k in unchanged - unused), sorted(unchanged - unused)
    assert any(k.startswith("vit.") for k in shared - unchanged)
    losses = {"sprites": {"vtc", "vtm"}}.get(task, {"lm"})
    assert losses == {"mrm", "vtc", "vtm", "mlm", "lm"} & {k for row in log("out/tuned").values() for k in row}


@pytest.mark.parametrize("task", ["sprites", "sprites-qa", "sprites-caption"])
def test_the_loss_falls(finetune_config, task, monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config(task, "--name tuned --select-split last --epochs 30 --lr 1e-2 --text.dropout 0"))
    rows = list(log("out/tuned").values())
    name = "vtc" if task == "sprites" else "lm"
    assert sum(row[name] for row in rows[-3:]) < 0.8 * sum(row[name] for row in rows[:3])


@pytest.mark.parametrize("task, flags", [
    ("sprites", ""), ("sprites-qa", ""), ("sprites", "--model.proportional"), ("sprites-qa", "--model.proportional")])
def test_masked_finetuning_runs_the_teacher_once_for_each_clip(
        finetune_config, sprites, task, flags, monkeypatch, capsys):
    """The student sees only visible tokens and, if it is proportional, how many tokens each of them stands for."""
    batch_sizes, visible_shares, teacher_args = [], [], []
    compute_visible_ids, vit_forward = targets.compute_visible_ids, ViT.forward

    def record_compute(teacher, video, *args):
        batch_sizes.append(len(video))
        teacher_args[:] = teacher, *args
        return compute_visible_ids(teacher, video, *args)

    def record_forward(self, video, visible_ids=None, token_size=None, *rest):
        x = vit_forward(self, video, visible_ids, token_size, *rest)
        visible_shares.append(x.shape[1] / (video.shape[1] * 16))           # of 16 patches a frame
        if flags and visible_ids is not None:
            expected = compute_visible_ids(teacher_args[0], video, *teacher_args[1:5], True)
            assert torch.equal(visible_ids, expected.visible_ids)
            assert torch.equal(token_size, expected.token_size) and token_size.max() > 1
        assert (token_size is None) == (not flags or visible_ids is None)
        return x

    monkeypatch.setattr(targets, "compute_visible_ids", record_compute)
    monkeypatch.setattr(ViT, "forward", record_forward)
    train.main(finetune_config(task, f"--name tuned --epochs 4 {flags}"))
    clips = len(read_rows(TASKS[task], *split_files(TASKS[task], "train", sprites), train=True))
    assert sum(batch_sizes) == clips + 6                                    # and 6 clips of the validation split
    assert set(visible_shares) == {0.25}                                    # mask ratio 0.75
    result = load_json(f"out/tuned/eval-{task}-cluster_stm.json")
    assert result["tokens"] == "cluster_stm, 4 of 16 a frame" and "cluster_stm, 4 of 16" in capsys.readouterr().out
    batch_sizes.clear(), visible_shares.clear()
    train.main(finetune_config(task, f"--name unmasked --epochs 1 --no-finetune-masked {flags}"))
    assert not batch_sizes and set(visible_shares) == {1.0}
    assert os.path.isfile(f"out/unmasked/eval-{task}-all.json")


# ---------------------------------------------------------------------------------------------------------------------
# Kills and ranks

@pytest.mark.parametrize("task, killed_call", [("sprites-qa", 2), ("sprites-qa", 1), ("sprites", 2)])
def test_a_run_killed_during_scoring_resumes_bit_for_bit(finetune_config, task, killed_call):
    train.main(finetune_config(task, "--name undisturbed"))
    with mock.patch.object(evaluation, "evaluate", wraps=evaluation.evaluate) as evaluate:
        evaluate.side_effect = [mock.DEFAULT] * (killed_call - 1) + [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            train.main(finetune_config(task, "--name killed"))
    train.main(finetune_config(task, "--name killed --resume"))
    assert_same(weights("out/killed"), weights("out/undisturbed"))
    assert load_json("out/killed/epochs.json") == load_json("out/undisturbed/epochs.json")
    assert load_json("out/killed/config.json")["chosen"] == load_json("out/undisturbed/config.json")["chosen"]


@pytest.mark.parametrize("step, lost, scored", [(4, 0, 2), (7, 0, 1), (7, 1, 2)],
                         ids=["after epoch 1", "after epoch 2", "after epoch 2, whose checkpoint is lost"])
def test_a_resumed_run_scores_each_epoch_once(finetune_config, step, lost, scored, monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config("sprites-mc", "--name undisturbed --epochs 3"))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "finetune", step)                                       # an epoch has three steps
        with pytest.raises(Killed):
            train.main(finetune_config("sprites-mc", "--name killed --epochs 3"))
    for path in list_checkpoints("out/killed")[:lost]:
        os.remove(path)
    with mock.patch.object(evaluation, "evaluate", wraps=evaluation.evaluate) as evaluate:
        train.main(finetune_config("sprites-mc", "--name killed --epochs 3 --resume"))
    assert evaluate.call_count == scored
    assert load_json("out/killed/epochs.json") == load_json("out/undisturbed/epochs.json")
    assert_same(weights("out/killed"), weights("out/undisturbed"))


def test_a_run_killed_between_epochs_resumes_bit_for_bit(finetune_config):
    train.main(finetune_config("sprites-caption", "--name undisturbed"))
    save_checkpoint, calls = loop.save_checkpoint, []

    def save_and_die(*args):
        save_checkpoint(*args)
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with mock.patch.object(loop, "save_checkpoint", save_and_die), pytest.raises(KeyboardInterrupt):
        train.main(finetune_config("sprites-caption", "--name killed --save-every 1"))
    train.main(finetune_config("sprites-caption", "--name killed --save-every 1 --resume"))
    assert_same(weights("out/killed"), weights("out/undisturbed"))


@pytest.mark.parametrize("task", ["sprites", "sprites-qa"])
def test_two_processes_finetune_and_score_like_one(finetune_config, task):
    flags = "--select-split last --micro-batch 4 --epochs 1 --save-every 100"
    train.main(finetune_config(task, f"{flags} --name one"))
    on_ranks(2, finetune_config(task, f"{flags} --name two"))
    for key, row in log("out/one").items():
        assert row["grad_norm"] == pytest.approx(log("out/two")[key]["grad_norm"], rel=1e-3)
    assert_close_weights(weights_without_key_bias("out/one"), weights_without_key_bias("out/two"), atol=5e-4)
    result, expected = (load_json(f"out/{name}/eval-{task}-cluster_stm.json") for name in ("two", "one"))
    assert result["scores"].keys() == expected["scores"].keys() and result["videos"] == expected["videos"]


# ---------------------------------------------------------------------------------------------------------------------
# Settings

@pytest.fixture
def make_student(first_run, tmp_path):
    """make_student(width) makes a folder with a config.json of that width -> its path."""
    def make(width):
        folder = tmp_path / f"s{width}"
        shutil.copytree(f"{first_run}/out/first", folder)
        config = load_json(f"{first_run}/out/first/config.json")
        config["vit"].update(width=width, heads=width // 64)
        write_json(str(folder / "config.json"), config)
        return str(folder)
    return make


@pytest.mark.parametrize("width, task, recipe", [
    (768, "msrvtt", dict(lr=1e-5, epochs=10, warmup_frac=0.1, batch=256)),
    (1024, "msrvtt", dict(lr=2e-5, epochs=7, warmup_frac=1 / 7, batch=256)),
    (768, "msvd-qa", dict(lr=6e-5, epochs=6, warmup_frac=1 / 6, batch=256)),
    (1024, "ssv2-template", dict(lr=1e-4, epochs=5, warmup_frac=0.2, batch=256)),
])
def test_the_recipe_is_the_published_one(make_student, width, task, recipe):
    cfg = train.finetune_defaults(task, make_student(width))
    assert {k: getattr(cfg, k) for k in recipe} == pytest.approx(recipe)
    spec = get_task(task)
    assert (cfg.data.num_frames, cfg.data.hflip, cfg.max_grad_norm, cfg.weight_decay) == (12, spec.flip, 0, 0.02)
    assert cfg.text.max_length == spec.max_text_length
    assert cfg.data.image_size == 16                                        # pixels, as in pretraining
    assert cfg.vit.drop_path == (spec.recipe_large if width == 1024 else spec.recipe_base).drop_path


def test_loss_weights_of_pretraining_are_not_used_in_finetuning(make_student):
    folder = make_student(768)
    config = load_json(f"{folder}/config.json")
    config["model"].update(mrm_weight=0.5, vtc_weight=0.5, vtm_weight=0.0, mlm_weight=2.0, distill="star")
    write_json(f"{folder}/config.json", config)
    assert train.loss_weights(train.finetune_defaults("msrvtt", folder).model) == {
        "mrm": 0, "align": 0, "pixels": 0, "vtc": 1, "vtm": 1, "mlm": 0, "distill": 1}


@pytest.mark.parametrize("flag", ["--init-from", "--init_from"])
def test_the_run_is_named_after_the_folder_as_typed(make_student, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(os.path.dirname(make_student(768)))
    cfg, _, _ = train.split_defaults(["--stage", "finetune", "--task", "msrvtt", flag, "s768/"])
    assert (cfg.name, cfg.init_from) == ("s768-msrvtt", "s768/")


def test_a_student_of_the_hub_is_named_by_its_id(finetune_config, first_run, monkeypatch):
    resolve_checkpoint = train.resolve_checkpoint

    def resolve(name, what):
        return f"{first_run}/out/first" if name == "owner/student" else resolve_checkpoint(name, what)

    monkeypatch.setattr(train, "resolve_checkpoint", resolve)
    cfg = train.finetune_defaults("sprites", "owner/student")
    assert (cfg.name, cfg.init_from) == ("student-sprites", "owner/student")
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(replace(finetune_config("sprites", "--name tuned --epochs 1"), init_from="owner/student"))
    assert load_json("out/tuned/config.json")["init_from"] == "owner/student"


def test_flags_change_the_recipe_and_help_shows_it(sprites, first_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert make_finetune_config(sprites, first_run, "sprites-qa", "--lr 3e-5").lr == 3e-5
    args = ["--stage", "finetune", "--task=sprites-mc", f"--init-from={first_run}/out/first", "--help"]
    code, out, _ = command("train.py", args, capsys)
    out, recipe = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split()), get_task("sprites-mc").recipe_base
    assert code == 0 and "(default: sprites-mc)" in out
    assert f"(default: {recipe.lr})" in out and f"(default: {recipe.epochs})" in out


@pytest.mark.parametrize("flags, message", [
    ("--task sprites-q", "'sprites-q'.*'sprites-qa'"),
    ("--task msrvtt --data-root nowhere", "nowhere"),
    ("--task msrvtt", "--data-root"),
    ("--task msrvtt --data-root .", "anno_downstream/msrvtt_ret_train9k.json"),
    ("--task sprites --data-root {sprites} --select-split val --batch 7 --micro-batch 2", "batch.* 7 and 2"),
    ("--init-from nowhere", "nowhere is not a folder of a student"),
    ("--init-from {first_run}/out/first/teacher", "teacher/config.json.*'vit'"),
    ("base --task sprites", "preset.*'base'"),
    ("--init-from {first_run}/out/first --data-root {sprites} --vit.heads 4", "vit.heads.* 4.* 2|vit.heads.* 2.* 4"),
])
def test_invalid_settings_of_finetuning_end_with_one_line(
        sprites, first_run, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    args = flags.format(sprites=sprites, first_run=first_run).split()
    preset = [args.pop(0)] if args[0] in train.PRESETS else []
    student = [] if "--init-from" in args else ["--init-from", f"{first_run}/out/first"]
    code, _, err = command("train.py", [*preset, "--stage", "finetune", *args, *student], capsys)
    assert_one_line("train.py", code, err, message)
    files = {name for _, _, names in os.walk("out") for name in names}
    assert files <= {"lock", "run_state.json", "command.txt", "config.json"}


def test_a_task_without_a_val_split_cannot_select_on_it(finetune_config, monkeypatch):
    monkeypatch.setitem(TASKS, "sprites", replace(TASKS["sprites"], val_file=""))
    assert finetune_config("sprites").select_split == ""
    with pytest.raises(ValueError, match="val split"):
        train.main(finetune_config("sprites", "--select-split val --name a"))
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config("sprites", "--name b --epochs 1"))
    assert load_json("out/b/config.json")["chosen"] == "the last epoch was taken, without selection"


def test_a_missing_test_split_is_reported_and_the_model_is_saved(finetune_config, sprites, tmp_path, capsys):
    root = tmp_path / "root"
    root.mkdir()
    for name in os.listdir(sprites):
        if "qa_test" not in name:
            os.symlink(f"{sprites}/{name}", root / name)
    cfg = finetune_config("sprites-qa", "--name tuned --epochs 1")
    train.main(replace(cfg, data_root=str(root)))
    assert "sprites_qa_test" in capsys.readouterr().out and os.path.isfile("out/tuned/model.safetensors")
