"""A run that is resumed goes on with its settings, refuses others in every state, and never becomes another run."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import tyro
from helpers.benchmarks import load_json, write_json
from helpers.processes import SHORT, assert_same_run, assert_train_error, interrupt, launch_ranks, wait_for_exit
from helpers.runs import FIRST_RUN_FLAGS, Killed, argv, config, kill, on_ranks, weights, with_weights

import eval as evaluation
import train
from runtime import HashingWriter, list_checkpoints


def parse(*args):
    """Parse a command line of train.py -> its config, as train.cli does."""
    default, rest, _ = train.split_defaults([*args])
    return tyro.cli(train.Config, args=rest, default=default)


def read_files(folder):
    """Read all files below a folder, without the lock -> {path: bytes}."""
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if name != "lock"]
    return {path: open(path, "rb").read() for path in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Settings come from the folder

def test_resume_alone_goes_on_with_the_settings_of_the_run(run_config, undisturbed_run):
    cfg = run_config(SHORT)
    interrupt(cfg)
    resumed = parse("--resume", "--name", "run")
    assert resumed == replace(cfg, resume=True) != train.PRESETS["sprites"]
    assert parse("--name", "run", "--resume", "--log-every", "7") == replace(cfg, resume=True, log_every=7)
    assert parse("--name", "run") == replace(train.PRESETS["sprites"], name="run")          # a new run does not
    train.main(resumed)
    assert_same_run(undisturbed_run(SHORT))


def test_resume_finds_a_run_by_its_annotation_file(run_config):
    cfg = replace(run_config(SHORT), name="")
    interrupt(cfg)
    assert parse("--resume") == replace(cfg, name="sprites", resume=True)
    assert parse("--resume", "--data.train-file", "more/sprites_train.json").lr == cfg.lr
    assert parse("--resume", "--data.train_file", "more/other_train.json").lr == train.PRESETS["sprites"].lr


def test_resume_with_the_whole_command_line_is_the_same_run(run_config, sprites, first_run, undisturbed_run):
    interrupt(run_config(SHORT))
    args = argv(sprites, with_weights(first_run, f"{SHORT} --resume"))
    assert parse(*args) == parse("sprites", *args) == replace(run_config(SHORT), resume=True)
    with pytest.raises(ValueError, match="^out/run/run_state.json: .* must be .* as when the run began"):
        train.main(parse("base", "--name", "run", "--resume", "--no-compile"))
    train.main(parse("sprites", *args))
    assert_same_run(undisturbed_run(SHORT))


@pytest.mark.parametrize("stage", ["teacher", "text"])
def test_resume_of_a_toy_stage_goes_on_with_it(sprites, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    cfg = config(sprites, f"{FIRST_RUN_FLAGS} --name toy --stage {stage}")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, stage, 5)
        with pytest.raises(Killed):
            train.main(cfg)
    assert parse("--resume", "--name", "toy") == replace(cfg, resume=True)
    assert parse("--resume", "--name", "toy", "--stage", "all") == replace(cfg, resume=True, stage="all")


def test_resume_of_a_finetuning_needs_its_name_alone(finetune_config, monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    cfg = finetune_config("sprites-mc", "--name tuned --epochs 1")
    train.main(cfg)
    assert parse("--resume", "--name", "tuned") == replace(cfg, resume=True)
    named = ("--stage", "finetune", "--task", "sprites-mc", "--init-from", cfg.init_from, "--resume", "--name", "tuned")
    assert parse(*named) == replace(cfg, resume=True)


# ---------------------------------------------------------------------------------------------------------------------
# Other settings are refused in every state

OTHER_SETTINGS = ["--mask.name tube", "--lr 1e-2", "--seed 4", "--unmasked-steps 3"]


@pytest.mark.parametrize("state", ["finished", "without checkpoints", "no unmasked stage", "before the unmasked stage"])
def test_other_settings_are_refused_in_every_state(run_config, state):
    flags = "--name run --steps 2 --unmasked-steps " + ("0" if state == "no unmasked stage" else "1")
    if state == "before the unmasked stage":
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, "unmasked", 0)
            with pytest.raises(Killed):
                train.main(run_config(flags))
    else:
        train.main(run_config(flags))
    if state == "without checkpoints":
        shutil.rmtree("out/run/checkpoints")
    before = read_files("out/run")
    for other in OTHER_SETTINGS:
        with pytest.raises(ValueError, match="^out/run/run_state.json: .* as when the run began"):
            train.main(run_config(f"{flags} --resume {other}"))
        assert read_files("out/run") == before
    train.main(run_config(f"{flags} --resume"))
    assert os.path.isfile("out/run/model.safetensors")


def test_resume_never_starts_another_stage_or_task_in_a_folder(run_config, finetune_config, sprites, first_run,
                                                               monkeypatch):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    train.main(finetune_config("sprites-mc", "--name tuned --epochs 1"))
    train.main(run_config("--name run --steps 1 --unmasked-steps 0"))
    before = read_files("out")
    for key, name, config_of in (
            ("stage", "tuned", lambda: run_config("--name tuned --steps 1 --unmasked-steps 0 --resume")),
            ("stage", "run", lambda: finetune_config("sprites-mc", "--name run --epochs 1 --resume")),
            ("stage", "run", lambda: replace(finetune_config("sprites-mc", "--epochs 1"), name="run", resume=True)),
            ("task", "tuned", lambda: finetune_config("sprites", "--name tuned --epochs 1 --resume"))):
        with pytest.raises(ValueError, match=f"^out/{name}(/run_state.json)?: {key} must be"):
            train.main(config_of())
    assert read_files("out") == before


def test_a_finished_run_says_so_and_changes_nothing(run_config, capsys):
    train.main(run_config("--name run --steps 2 --unmasked-steps 1"))
    before = read_files("out/run")
    os.rename(run_config().text_encoder, "text_away")           # it needs nothing but its folder
    try:
        capsys.readouterr()
        model = train.main(parse("--name", "run", "--resume"))
    finally:
        os.rename("text_away", run_config().text_encoder)
    assert capsys.readouterr().out == "out/run: the run is finished, nothing is left to do\n"
    assert read_files("out/run") == before
    expected = weights("out/run")
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_models_without_their_settings_are_not_continued(run_config):
    """As of a run that another version began, or whose run_state.json was deleted."""
    train.main(run_config("--name run --steps 2 --unmasked-steps 1"))
    os.remove("out/run/run_state.json")
    before = read_files("out/run")
    for resume in (lambda: train.main(run_config("--name run --steps 2 --unmasked-steps 1 --resume")),
                   lambda: parse("--name", "run", "--resume"),
                   lambda: train.main(parse("sprites", "--name", "run", "--resume"))):
        with pytest.raises(ValueError, match="^out/run/run_state.json must have the settings of the run that wrote"):
            resume()
    assert read_files("out/run") == before


def test_resume_of_a_name_that_has_no_run_is_refused(run_config):
    for args in (("--name", "typo"), ("--seed", "3")):
        with pytest.raises(ValueError, match="^out/(typo|sprites) has no run to resume"):
            parse("--resume", *args)
    assert parse("sprites", "--resume", "--name", "new").name == "new"          # for scripts that always pass it
    assert parse("--resume", "--data.train-file", "own.json").data.train_file == "own.json"


def test_a_renamed_folder_is_named(run_config):
    interrupt(run_config(SHORT))
    os.rename("out/run", "out/moved")
    with pytest.raises(ValueError, match="name must be 'run' .* got 'moved'; rename the folder back to out/run"):
        train.main(run_config(f"{SHORT} --name moved --resume"))


@pytest.mark.parametrize("name", ["..", "../run", "a/../../b", "/tmp/run", "a\x1b[31m", "a\nb", "\udcff"])
def test_a_name_outside_of_out_or_with_control_characters_is_refused(run_config, name):
    with pytest.raises(ValueError, match="^name must be [^\n]*$"):
        train.main(replace(run_config(), name=name))
    assert not os.path.exists("out")


def test_the_unmasked_stage_needs_no_model_of_before(run_config, undisturbed_run, capsys):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "unmasked", 1)
        with pytest.raises(Killed):
            train.main(run_config(f"{SHORT} --save-every 1"))
    shutil.rmtree("out/run/before_unmasked")
    train.main(run_config(f"{SHORT} --save-every 1 --resume"))
    assert "out/run/before_unmasked was deleted" in capsys.readouterr().out
    expected = weights(undisturbed_run(SHORT))
    assert all(torch.equal(x, expected[name]) for name, x in weights("out/run").items())
    assert not os.path.exists("out/run/before_unmasked")


def test_a_copied_project_goes_on(run_config, undisturbed_run, sprites, monkeypatch):
    """The annotations are the same, though the folder of the videos is another one."""
    shutil.copytree(sprites, "here/data")
    monkeypatch.chdir("here")
    cfg = run_config(SHORT)
    cfg = replace(cfg, data=replace(cfg.data, train_file="data/sprites_train.json", video_root="data/videos"))
    interrupt(cfg)
    shutil.copytree("../here", "../there")
    shutil.rmtree("../here")
    monkeypatch.chdir("../there")
    train.main(replace(cfg, resume=True))
    expected = weights(undisturbed_run(SHORT))
    assert all(torch.equal(x, expected[name]) for name, x in weights("out/run").items())


@pytest.mark.parametrize("change, message", [
    ("train rows", "the annotations must be"), ("answers", "the answers must be"), ("val rows", "annotations of val")])
def test_other_data_of_a_finetuning_are_refused(finetune_config, sprites, monkeypatch, change, message):
    monkeypatch.setattr(evaluation, "main", lambda cfg: None)
    shutil.copytree(sprites, "data")
    flags = "--name tuned --epochs 1 --select-split val --save-every 1"
    cfg = replace(finetune_config("sprites-qa", flags), data_root="data")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "finetune", 1)
        with pytest.raises(Killed):
            train.main(cfg)
    path = {"train rows": "data/sprites_qa_train.json", "answers": "data/sprites_qa_answer_list.json",
            "val rows": "data/sprites_qa_val.json"}[change]
    content = load_json(path)
    write_json(path, content[::-1] if isinstance(content, list) else dict(reversed(content.items())))
    with pytest.raises(ValueError, match=f"^out/tuned/run_state.json: .*{message}"):
        train.main(replace(cfg, resume=True))


def test_a_trained_toy_stage_leaves_the_number_of_ranks_open(sprites, tmp_path, monkeypatch):
    """Its micro-batch of 8 clips, all on one rank, is over."""
    monkeypatch.chdir(tmp_path)
    cfg = config(sprites, f"{FIRST_RUN_FLAGS} --name toy --micro-batch 4")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 2)
        with pytest.raises(Killed):
            train.main(cfg)
    on_ranks(2, replace(cfg, resume=True))
    assert os.path.isfile("out/toy/model.safetensors")


def test_a_model_that_was_deleted_is_written_again(run_config):
    train.main(run_config("--name run --steps 2 --unmasked-steps 1"))
    before = weights("out/run")
    os.remove("out/run/model.safetensors")
    train.main(parse("--name", "run", "--resume"))
    after = weights("out/run")
    assert all(torch.equal(after[name], x) for name, x in before.items()) and after.keys() == before.keys()


# ---------------------------------------------------------------------------------------------------------------------
# What a run relies on has changed or is hostile

def test_a_vocabulary_that_changed_is_refused(run_config, sprites, tmp_path):
    shutil.copy(f"{sprites}/tokenizer.json", "tokenizer.json")
    interrupt(run_config(f"{SHORT} --tokenizer tokenizer.json"))
    tokenizer = load_json("tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(vocabulary)[-2:]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="^out/run/run_state.json: the tokenizer must be as when the run began"):
        train.main(run_config(f"{SHORT} --tokenizer tokenizer.json --resume"))


class Hostile:
    def __reduce__(self):
        return open, ("hostile", "w")


def other_shapes(state):
    return state | {"optimizer": state["optimizer"] | {"state": {
        i: values | {"exp_avg": torch.zeros(3)} for i, values in state["optimizer"]["state"].items()}}}


@pytest.mark.parametrize("change", [
    lambda state: Hostile(), lambda state: state | {"counts": Hostile()}, lambda state: [state],
    lambda state: state | {"step": "4"}, lambda state: state | {"step": -3}, lambda state: state | {"step": 3},
    lambda state: state | {"stage": "unmasked"}, lambda state: state | {"counts": {"skipped": "x"}},
    lambda state: state | {"model": {"w": torch.zeros(2)}}, lambda state: state | {"model": {}},
    lambda state: state | {"model": dict.fromkeys(state["model"], 5)},
    lambda state: state | {"model": {key: x.to_sparse() for key, x in state["model"].items()}},
    lambda state: {key: x for key, x in state.items() if key != "optimizer"},
    lambda state: state | {"optimizer": {}}, lambda state: state | {"optimizer": {"state": {}, "param_groups": []}},
    other_shapes, lambda state: state | {"config": {}}, lambda state: state | {"config": state["config"] | {"data": 3}},
], ids=["code", "code in a part", "a list", "a step that is no number", "step -3", "another step", "another stage",
        "counts", "other weights", "no weights", "numbers for weights", "sparse weights", "no optimizer",
        "an empty optimizer", "no groups", "shapes of the optimizer", "no config", "a part of the config"])
def test_a_hostile_checkpoint_is_refused_with_one_line(run_config, change):
    interrupt(run_config(SHORT))
    path = list_checkpoints("out/run")[0]
    state = torch.load(path, weights_only=True)
    with open(path, "wb") as f:                         # with the right checksum
        writer = HashingWriter(f)
        torch.save(change(state), writer)
        f.write(writer.hash.digest())
    with pytest.raises(ValueError, match=f"^{path}[^\n]*$"):
        train.main(run_config(f"{SHORT} --resume"))
    assert not os.path.exists("hostile")


def test_a_damaged_run_state_is_named_on_every_rank(run_config):
    interrupt(run_config(f"{SHORT} --micro-batch 4"))
    text = open("out/run/run_state.json").read()
    assert '"lr": 0.002' in text
    with open("out/run/run_state.json", "w") as f:
        f.write(text.replace('"lr": 0.002', '"lr": 0.003'))
    with launch_ranks(2, run_config(f"{SHORT} --micro-batch 4 --resume --lr 3e-3")) as processes:
        for code, _, err in wait_for_exit(processes):
            assert_train_error(code, err, "out/run/run_state.json is damaged or was edited")
