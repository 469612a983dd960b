"""Folders with models: written and read again, initialising a student, and bad ones refused."""

import json

import pytest
import torch
from helpers.models import OBJECTIVES, config_json, random_batch, save_model, student, video_to_text
from safetensors.torch import save_file

from files import save_weights
from model import ClusterSTM, VideoToText, load_model

pytestmark = pytest.mark.usefixtures("seed_0")
MODELS = {"question answering": lambda: video_to_text(True), "captioning": lambda: video_to_text(False),
          "student": student}


# ---------------------------------------------------------------------------------------------------------------------
# load_model

@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_loads_as_what_it_is(tmp_path, kind):
    model = MODELS[kind]().float()
    folder = save_model(model, tmp_path, lr=1)
    for loaded in (load_model(folder), type(model).from_pretrained(folder)):
        assert type(loaded) is type(model) and config_json(loaded) == config_json(model) and not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, model.state_dict()[key]) for key, x in loaded.state_dict().items())
        assert kind == "student" or (loaded.bert is None) == (kind == "captioning")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_the_other_class_is_refused(tmp_path, kind):
    folder = save_model(MODELS[kind](), tmp_path)
    classes = (VideoToText, ClusterSTM) if kind == "student" else (ClusterSTM, VideoToText)
    with pytest.raises(ValueError, match=f"^{folder} .*{classes[0].__name__}.*{classes[1].__name__}$"):
        classes[0].from_pretrained(folder)


def test_a_missing_weight_is_named(tmp_path):
    model = video_to_text()
    del model.text_decoder.cls
    folder = save_model(model, tmp_path)
    for load in (load_model, VideoToText.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{folder}.*text_decoder\.cls\.predictions\.bias .*\(40,\)"):
            load(folder)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_saved_student_loads_with_the_same_losses(tmp_path, objective):
    model, part = student(model={"objective": objective}).float(), random_batch(4)
    loaded = ClusterSTM.from_pretrained(save_model(model, tmp_path, lr=1))
    assert config_json(loaded) == config_json(model) and not loaded.training
    other = student(model={"objective": objective})
    other.init_from(str(tmp_path))
    for copy in (loaded, other.float()):
        a, b = model(*part), copy(*part)
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(VideoToText.from_student(loaded, True).vit.norm.weight, model.vit.norm.weight)


# ---------------------------------------------------------------------------------------------------------------------
# init_from

def test_weights_called_new_keep_their_values(tmp_path):
    model, other = student(), student()
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    weights = {key: value for key, value in other.state_dict().items() if key.startswith("vit.")}
    config = {"vit": {"heads": 2}, "new": sorted({key.split(".")[0] for key in initial} - {"vit"})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    model.init_from(str(tmp_path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, (weights if key in weights else initial)[key]), key
    missing = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != missing}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=missing):
        model.init_from(str(tmp_path))


@pytest.mark.parametrize("part, name, expected, value", [
    ("vit", "heads", 2, 4), ("vit", "pos_embed", "1d", "3d"), ("text", "heads", 2, 3),
    ("model", "objective", "relevance", "pixels"), ("model", "pooling", "frames", "tokens")])
def test_settings_that_no_weight_shows_must_agree(tmp_path, part, name, expected, value):
    model = student(model={"target_dim": 48})                                   # as many as the pixels of a patch
    config = config_json(model)
    config[part][name] = value
    save_model(model, tmp_path, **config)
    with pytest.raises(ValueError, match=rf"config\.json: {part}\.{name} .*\b{expected}\b.*\b{value}\b"):
        model.init_from(str(tmp_path))
    del config[part][name]                                                      # absent: taken to agree
    save_model(model, tmp_path, **config)
    model.init_from(str(tmp_path))


@pytest.mark.parametrize("pos_embed", ["relative", "learned"])
def test_the_grid_of_positions_must_agree(tmp_path, pos_embed):
    model = student(vit={"pos_embed": pos_embed, "grid": (4, 2, 3)})
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    save_model(student(vit={"pos_embed": pos_embed, "grid": (4, 3, 3)}), tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: vit\.grid .*\(4, 2, 3\).*\(4, 3, 3\)"):
        model.init_from(str(tmp_path))
    save_model(model, tmp_path)
    other = student(vit={"pos_embed": pos_embed, "grid": (4, 2, 3)})
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.init_from(str(tmp_path))
    loaded = ClusterSTM.from_pretrained(str(tmp_path))
    assert loaded.vit_cfg.grid == (4, 2, 3)
    for key, value in expected.items():
        assert torch.equal(other.state_dict()[key], value) and torch.equal(loaded.state_dict()[key], value.float()), key


def test_without_relative_positions_grids_need_not_agree(tmp_path):
    trained, model = student(vit={"grid": (4, 3, 3)}), student()
    save_model(trained, tmp_path)
    with torch.no_grad():
        model.vit.norm.weight.fill_(7)
    model.init_from(str(tmp_path))
    assert torch.equal(model.vit.norm.weight, trained.vit.norm.weight)


def test_a_new_projection_of_videos_may_have_another_pooling(tmp_path):
    save_model(student(), tmp_path, new=["vision_proj.", "pool_norm."])
    model = student(model={"pooling": "tokens"})
    with torch.no_grad():
        model.vision_proj.weight.fill_(7), model.vit.norm.weight.fill_(7)
    model.init_from(str(tmp_path))
    assert (model.vision_proj.weight == 7).all() and not (model.vit.norm.weight == 7).any()


def test_a_new_decoder_may_have_another_objective(tmp_path):
    model = student(model={"objective": "pixels", "target_dim": 48})
    decoder = {key: value.clone() for key, value in model.decoder.state_dict().items()}
    save_model(student(model={"target_dim": 48}), tmp_path, new=["decoder."])
    model.init_from(str(tmp_path))
    assert all(torch.equal(value, decoder[key]) for key, value in model.decoder.state_dict().items())


def test_a_config_with_an_unknown_field_is_refused(tmp_path):
    model = student()
    save_model(model, tmp_path, vit={**config_json(model)["vit"], "patch": 4})
    for load in (ClusterSTM.from_pretrained, model.init_from):
        with pytest.raises(ValueError, match=r"config\.json: vit.*'patch'"):
            load(str(tmp_path))


def test_folders_without_a_student_are_refused(tmp_path):
    folder, model = str(tmp_path), student()
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"^{folder}.*{name}"):
            ClusterSTM.from_pretrained(folder)
        (tmp_path / "config.json").write_text("{}")
    save_weights(model, folder)
    for part in ("vit", "text", "model"):
        config = {key: value for key, value in config_json(model).items() if key != part}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"config\.json: {part} "):
            ClusterSTM.from_pretrained(folder)
    save_model(model, folder, model={**config_json(model)["model"], "embed_dim": 9})
    with pytest.raises(ValueError, match=r"vision_proj\.weight.*\(9, 16\).*\(8, 16\)"):
        ClusterSTM.from_pretrained(folder)
