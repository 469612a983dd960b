"""Files that are written whole or not at all, and verified when they are read."""

import errno
import json
import os
from dataclasses import dataclass, field

import pytest
import torch
from helpers.damage import damaged_copies, write_bytes
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import files
from files import (
    WriteError,
    append_line,
    atomic_write,
    atomic_write_text,
    config_from_dict,
    escape_control,
    read_json,
    read_safetensors,
    save_weights,
    verify_tokenizer,
    write_all,
    write_json,
    write_safetensors,
)

VALUES = {"name": "run \u00e9", "lr": 1e-3, "sizes": (1, 2), "mask": {"ratio": 0.85, "none": None}, "long": 2 ** 60,
          "by number": {10: "ten", 9: "nine"}}
READ_BACK = {**VALUES, "sizes": [1, 2], "by number": {"10": "ten", "9": "nine"}}
TENSORS = {"w": torch.randn(5, 7).T, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)[:, 0],
           "ids": torch.arange(4), "half": torch.randn(6).half(), "bits": torch.tensor([True, False])}


# ---------------------------------------------------------------------------------------------------------------------
# Damage

@pytest.mark.parametrize("indent", [None, 1])
def test_damaged_json_is_an_error_or_has_the_same_content(tmp_path, indent):
    path = str(tmp_path / "a.json")
    write_json(path, VALUES, indent)
    assert read_json(path) == READ_BACK
    detected = 0
    for content in damaged_copies(open(path, "rb").read(), 40):
        write_bytes(path, content)
        try:
            values = read_json(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} ") or str(error).startswith(f"{path}:")
            assert "\n" not in str(error)
            detected += 1
        else:           # another form of the same content, or a changed name of the checksum, which is an unknown key
            assert {key: values.get(key) for key in READ_BACK} == READ_BACK
    assert detected >= 70


def test_json_of_others_and_edited_json_can_be_read(tmp_path):
    path = str(tmp_path / "a.json")
    atomic_write_text(path, json.dumps(READ_BACK))
    assert read_json(path) == READ_BACK
    write_json(path, VALUES)
    content = json.load(open(path))
    atomic_write_text(path, json.dumps(dict(reversed(content.items())), indent=4))          # only the form differs
    assert read_json(path) == READ_BACK
    content["lr"] = 2e-3
    atomic_write_text(path, json.dumps(content))
    with pytest.raises(ValueError, match="damaged or was edited"):
        read_json(path)
    del content["checksum"]
    atomic_write_text(path, json.dumps(content))
    assert read_json(path)["lr"] == 2e-3
    for text in ("[1, 2]", "3", "[" * 100_000, "", "\0\0"):
        atomic_write_text(path, text)
        with pytest.raises(ValueError, match=f"^{path}[^\\n]*$"):
            read_json(path)


def test_damaged_tensors_are_an_error_or_the_same(tmp_path):
    path = str(tmp_path / "a.safetensors")
    write_safetensors(path, TENSORS, {"about": "a test"})
    tensors, metadata = read_safetensors(path)
    assert metadata == {"about": "a test"} and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], x) and tensors[name].dtype == x.dtype for name, x in TENSORS.items())
    detected = 0
    for content in damaged_copies(open(path, "rb").read(), 200):
        write_bytes(path, content)
        try:
            tensors, metadata = read_safetensors(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} ") and "\n" not in str(error)
            detected += 1
        else:
            assert all(torch.equal(tensors[name], x) for name, x in TENSORS.items()) and metadata["about"] == "a test"
    assert detected >= 380


def test_equal_tensors_and_texts_give_equal_files(tmp_path):
    path, contents = tmp_path / "a.safetensors", set()
    for _ in range(20):
        write_safetensors(str(path), TENSORS, {name: "\u00e9 \"" for name in "dbca"})
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert load_file(path)["ids"].tolist() == [0, 1, 2, 3]                  # the library reads it too


def test_exchanged_and_retyped_tensors_are_an_error(tmp_path):
    """Another order, name, dtype or shape of the same bytes, with the checksum of the original."""
    path, checksum = str(tmp_path / "a.safetensors"), files.hash_tensors
    a, b = torch.arange(6.0), torch.arange(6.0) + 6
    for other in ({"x": b, "y": a}, {"x": a, "z": b}, {"x": a.view(2, 3), "y": b}, {"x": a.view(torch.int32), "y": b},
                  {"x": a}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "hash_tensors", lambda *_: checksum({"x": a, "y": b}, {}))
            write_safetensors(path, other, {})
        with pytest.raises(ValueError, match="checksum is wrong"):
            read_safetensors(path)


def test_a_tokenizer_belongs_to_the_weights_it_was_saved_with(tmp_path):
    tokenizer, path = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    verify_tokenizer(path)                                  # there are no weights
    save_weights(torch.nn.Linear(2, 2), str(tmp_path))
    verify_tokenizer(path)
    for content in damaged_copies(open(path, "rb").read(), 40):
        write_bytes(path, content)
        with pytest.raises(ValueError, match=f"^{path} is damaged or was replaced"):
            verify_tokenizer(path)


# ---------------------------------------------------------------------------------------------------------------------
# Writes that fail

@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_a_write_that_fails_leaves_the_older_file_alone(tmp_path, monkeypatch, number, call):
    path = str(tmp_path / "a.json")
    write_json(path, {"a": 1})
    before = open(path).read()

    def fail(*args):
        raise OSError(number, os.strerror(number), *(str(x) for x in args if call == "replace"))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError, match=f"^{path} could not be written .*{os.strerror(number)}.*unchanged$"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert open(path).read() == before and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["n" * 300, "absent/a", "folder", "file/a"])
def test_a_name_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    path = str(tmp_path / name)
    for write in (lambda: write_json(path, {}), lambda: append_line(path, {}),
                  lambda: write_safetensors(path, TENSORS, {})):
        with pytest.raises(WriteError, match=f"^{path} could not be written [^\\n]*$"):
            write()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")


def test_the_longest_name_that_a_disk_takes_can_be_written(tmp_path):
    path = str(tmp_path / ("\u4e2d" * 85))                  # 255 bytes
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1} and os.stat(path).st_mode & 0o777 == 0o644


@pytest.mark.parametrize("offset", [None, 0, 5])
def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(tmp_path, monkeypatch, offset):
    path, write, pwrite = tmp_path / "a", os.write, os.pwrite
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:3]))
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: pwrite(fd, content[:3], offset))
    with open(path, "a+b" if offset is None else "r+b", buffering=0) as f:
        write_all(f, b"abcdefgh", offset)
    expected = {None: b"0123456789abcdefgh", 0: b"abcdefgh89", 5: b"01234abcdefgh"}[offset]
    assert path.read_bytes() == expected


def test_an_error_of_the_caller_is_not_one_of_writing(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "rows.json"), ValueError("a row is wrong"),
                  KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            with atomic_write(str(tmp_path / "a")) as f:
                f.write(b"half")
                raise error
        assert caught.value is error and os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Messages and configs

def test_control_characters_are_escaped_and_letters_are_not():
    assert escape_control("a\x1b[31m b\r\n\u202e\udcff\u2028.mp4") == r"a\x1b[31m b\r\n\u202e\udcff\u2028.mp4"
    assert escape_control("caf\u00e9 \u4e2d\u6587 \U0001f600") == "caf\u00e9 \u4e2d\u6587 \U0001f600"


@dataclass
class Part:
    width: int = 4
    heads: int = 2

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError("width must be a multiple of heads")


@dataclass
class Whole:
    part: Part = field(default_factory=Part)


def test_a_config_value_of_a_wrong_type_is_one_line():
    with pytest.raises(ValueError, match="^a.json: .*Part"):
        config_from_dict(Whole, {"part": {"width": None}}, "a.json")
    assert config_from_dict(Whole, {"part": {"width": 6}}, "a.json").part.width == 6
