"""Students whose losses read no texts: no text encoder is trained or built, and a later run adds one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.benchmarks import load_json
from helpers.runs import assert_close_weights, log, on_ranks, weights, weights_without_key_bias
from helpers.siglip import edit_json

import eval as evaluation
import train
from config import Config
from data import DataConfig
from files import save_weights
from model import ClusterSTM, ModelConfig, VideoToText, load_model

VISION = "--model.vtc-weight 0 --model.vtm-weight 0 --model.mlm-weight 0 --unmasked-steps 0 --steps 4 "


@pytest.fixture
def without_text_encoder(run_config):
    """run_config(flags) makes the config of a run with the first run's teacher and no text encoder."""
    return lambda flags: replace(run_config(flags), text_encoder="")


def test_no_text_encoder_is_trained_or_built_and_a_later_run_adds_one(without_text_encoder, run_config, capsys):
    train.main(without_text_encoder(f"{VISION}--name a"))
    assert {stage for stage, _ in log("out/a")} == {"pretrain"} and "mrm" in log("out/a")["pretrain", 4]
    assert not [name for name in weights("out/a") if name.startswith("bert.")]
    assert "train.py --name WITH_TEXTS --init-from out/a" in capsys.readouterr().out
    on_ranks(2, without_text_encoder(f"{VISION}--name b --micro-batch 4"))
    assert_close_weights(weights_without_key_bias("out/b"), weights_without_key_bias("out/a"), atol=1e-5)

    train.main(run_config("--name c --steps 1 --unmasked-steps 0 --lr 1e-9 --init-from out/a"))
    vision, texts = weights("out/a"), weights("out/c")
    trained = [name for name in vision if name.startswith(("vit.", "decoder."))]
    assert len(trained) > 20 and not load_json("out/c/config.json").get("new")
    for name in trained:                                        # AdamW's first step moves a weight by lr
        torch.testing.assert_close(texts[name], vision[name], rtol=0, atol=2e-9 + 1e-7)
    assert [name for name in texts if name.startswith("bert.")]


def test_it_cannot_be_used_with_texts(without_text_encoder, sprites, capsys):
    train.main(without_text_encoder(f"{VISION}--name a"))
    model, clips = ClusterSTM.from_pretrained("out/a"), torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8)
    assert model.bert is None
    for use in (lambda: model.embed_videos(clips), lambda: model.embed_texts(["a red square"]),
                lambda: VideoToText.from_student(model, True)):
        with pytest.raises(ValueError, match="out/a must have a text encoder.*--init-from"):
            use()
    with pytest.raises(ValueError, match="out/a must have a text encoder"):
        evaluation.main(evaluation.Config(task="sprites", checkpoint="out/a", data_root=sprites))


def test_settings_that_need_texts_are_refused():
    with pytest.raises(ValueError, match="data.val_file must be empty.*no loss.*texts.*rows.json"):
        Config(unmasked_steps=0, data=DataConfig(val_file="rows.json"),
               model=ModelConfig(vtc_weight=0, vtm_weight=0, mlm_weight=0))


def test_a_text_encoder_is_missed_before_anything_is_trained(without_text_encoder, sprites):
    train.main(without_text_encoder(f"{VISION}--name a"))
    new = tuple(load_json("out/a/config.json")["new"])
    assert {name.split(".")[0] for name in weights("out/a") if not name.startswith(new)} == {"vit", "decoder"}
    for task in ("sprites", "sprites-qa", "sprites-caption"):
        args = "--stage", "finetune", "--task", task, "--init-from", "out/a", "--data-root", sprites
        with pytest.raises(ValueError, match="out/a must have a text encoder.*--init-from out/a adds one"):
            train.split_defaults([*args])


def test_the_vision_of_a_student_with_texts_can_be_trained_on(without_text_encoder, first_run):
    train.main(without_text_encoder(f"{VISION}--name a --lr 1e-9 --init-from {first_run}/out/first"))
    before, after = weights(f"{first_run}/out/first"), weights("out/a")
    assert before.keys() - after.keys() == {name for name in before if name.startswith("bert.")}
    for name in after:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)


def test_a_student_whose_text_encoder_is_lost_is_refused(first_run, tmp_path):
    shutil.copytree(f"{first_run}/out/first", tmp_path / "a", ignore=shutil.ignore_patterns("checkpoints", "t*"))
    model = ClusterSTM.from_pretrained(str(tmp_path / "a"))
    model.bert = None
    os.remove(tmp_path / "a" / "model.safetensors")
    save_weights(model, str(tmp_path / "a"))
    with pytest.raises(ValueError, match="bert"):
        load_model(str(tmp_path / "a"))


def test_older_files_are_of_the_pooling_that_there_was(run_config, first_run):
    shutil.copytree(f"{first_run}/out/first", "older")
    edit_json(Path("older/config.json"), model__pooling=...)
    with pytest.raises(ValueError, match="model.pooling must be 'tokens'.*'frames'"):
        train.main(run_config("--name a --steps 1 --model.pooling tokens --init-from older"))
