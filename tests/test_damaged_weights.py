"""
Folders with weights whose files are damaged: a SigLIP's, a BERT's and a student's. Each damage is refused in one line
that names the file, or it changes nothing of what is loaded.
"""

import os
import random
import shutil
from dataclasses import asdict

import pytest
import torch
from helpers.models import config_json, student
from helpers.siglip import tiny_siglip

from encoders import Bert, BertConfig
from files import save_weights, write_json
from model import load_model
from teacher import SigLIP
from tokenizer import build_wordpiece, load_tokenizer

TIMES = 40                      # bits are flipped, and files are truncated
FILES = {"siglip": ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
                    "tokenizer_config.json"],
         "bert": ["config.json", "model.safetensors", "tokenizer.json"],
         "student": ["config.json", "model.safetensors", "tokenizer.json"]}


def write_folder(kind, folder):
    """Write a folder as train.py and save_pretrained do: the weights come last."""
    os.makedirs(folder)
    if kind == "siglip":
        return tiny_siglip().float().save_pretrained(folder)
    build_wordpiece(["a red cat", "what is it"], f"{folder}/tokenizer.json")
    if kind == "bert":
        torch.manual_seed(0)
        return Bert(BertConfig(28, 12, 3, 3, 20, 16, fusion_layers=2, encoder_width=16)).save_pretrained(folder)
    model = student().float()
    write_json(f"{folder}/config.json", {**config_json(model), "lr": 1e-4})
    return save_weights(model, folder)


def load(kind, folder):
    """Load a folder -> its model's weights, config and tokenizer."""
    if kind == "siglip":
        model = SigLIP.from_pretrained(folder)
        return model.state_dict(), asdict(model.cfg), model.tokenizer.to_str()
    if kind == "bert":
        model = Bert.from_pretrained(folder, fusion_layers=2, encoder_width=16)
        return model.state_dict(), asdict(model.cfg), load_tokenizer(folder).to_str()
    model = load_model(folder)
    return model.state_dict(), config_json(model), load_tokenizer(f"{folder}/tokenizer.json").to_str()


def damage(content, rng):
    """Yield the content with one bit flipped, and cut off, TIMES each; an empty file is one of them."""
    for _ in range(TIMES):
        i = rng.randrange(len(content))
        yield content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1:]
    yield b""
    for _ in range(TIMES - 1):
        yield content[:rng.randrange(len(content))]


def equal(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(x, b[0][key]) for key, x in a[0].items())


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in FILES.items() for name in names])
def test_damage_is_refused_in_one_line_or_changes_nothing(tmp_path, kind, name):
    folder, rng, refused = str(tmp_path / "folder"), random.Random(f"{kind} {name}"), 0
    write_folder(kind, folder)
    assert sorted(os.listdir(folder)) == FILES[kind]
    path, intact = os.path.join(folder, name), load(kind, folder)
    with open(path, "rb") as f:
        content = f.read()
    for damaged in damage(content, rng):
        with open(path, "wb") as f:
            f.write(damaged)
        try:
            loaded = load(kind, folder)
        except (ValueError, OSError) as error:
            refused += 1
            line = str(error)
            assert path in line and line.isprintable(), repr(line)
        else:
            assert equal(loaded, intact), damaged
    assert refused > 1.8 * TIMES                # all but the ends of lines, and the names of checksums
    with open(path, "wb") as f:
        f.write(content)
    assert equal(load(kind, folder), intact)


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in FILES.items() for name in names
                                        if name != "tokenizer_config.json"])        # it is optional
def test_a_folder_in_place_of_a_file_is_refused_in_one_line(tmp_path, kind, name):
    folder = str(tmp_path / "folder")
    write_folder(kind, folder)
    os.remove(os.path.join(folder, name))
    os.makedirs(os.path.join(folder, name))
    with pytest.raises((ValueError, OSError), match=f"^{folder}.*{name}") as error:
        load(kind, folder)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", FILES)
def test_the_tokenizer_of_other_weights_is_refused(tmp_path, kind):
    write_folder(kind, tmp_path / "a")
    write_folder(kind, tmp_path / "b")
    with open(tmp_path / "b" / "tokenizer.json", encoding="utf-8") as f:
        text = f.read()
    (tmp_path / "b" / "tokenizer.json").write_text(text.replace('"red"', '"rad"'), encoding="utf-8")
    shutil.copy(tmp_path / "b" / "tokenizer.json", tmp_path / "a")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a/tokenizer.json is damaged or was replaced.*model.safetensors"):
        load(kind, str(tmp_path / "a"))
