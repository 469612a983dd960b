"""tools.convert on files made to do harm: one line, no code that runs, no file written, little memory."""

import glob
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile

import pytest
import torch
from helpers.runs import assert_one_line, command

from tools import convert

KEY = "encoder.blocks.0.norm1.weight"           # of a stage-1 file
FLAGS = [[], ["--trust"]]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_refused(message, capsys, file="umt.pth", flags=FLAGS):
    """With each of the flags the file is refused in one line that matches `message`, and nothing is written."""
    before = sorted(os.listdir())
    for flag in flags:
        code, _, err = command("tools.convert", [file, "out", *flag], capsys)
        assert_one_line("tools.convert", code, err, message)
        assert err.rstrip("\n").isprintable()
    assert sorted(os.listdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Archives

class Writer(torch.nn.Module):
    """A module whose TorchScript code makes a file when it is loaded."""

    def __init__(self):
        super().__init__()
        self.x = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.training = state[1]
        self.x = torch.from_file("made", True, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["umt.pth", "model.safetensors", "weights.pt"])
def test_torchscript_is_refused_before_its_code_runs(name, capsys):
    torch.jit.save(torch.jit.script(Writer()), "module.pt")
    assert not os.path.exists("made")
    os.rename("module.pt", name)
    assert_refused(f"{name} is a TorchScript archive", capsys, name)
    torch.jit.load(name)                                            # it would have left a trace
    assert os.path.exists("made")


@pytest.mark.parametrize("record", ["constants.pkl", "code/__torch__.py"])
def test_an_archive_with_one_record_of_torchscript_is_refused(record, capsys):
    torch.save({KEY: torch.ones(64)}, "umt.pth")
    with zipfile.ZipFile("umt.pth", "a") as archive:
        archive.writestr(f"umt/{record}", b"\x80\x02).")
    assert_refused("umt.pth is a TorchScript archive", capsys)


def test_a_tar_archive_is_refused(capsys):
    os.makedirs("files")
    for name in ("storages", "tensors", "pickle"):
        with open(f"files/{name}", "wb") as f:
            pickle.dump(0, f)
    for first in ("storages", "\udc80storages"):                    # the second begins as a pickle does
        with tarfile.open("umt.pth", "w", errors="surrogateescape") as archive:
            archive.add("files/storages", first)
            archive.add("files", ".")
        assert_refused("umt.pth is a tar archive", capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes

def rewrite(storage=None, compression=zipfile.ZIP_STORED, edit=None):
    """Write a file that torch.save wrote anew, with another storage, compression or pickle."""
    torch.save({KEY: torch.ones(64)}, "umt.pth")
    with zipfile.ZipFile("umt.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile("umt.pth", "w", compression) as archive:
        for name, content in records.items():
            content = edit(content) if edit and name.endswith("/data.pkl") else content
            archive.writestr(name, storage if storage and name.endswith("/data/0") else content)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused_unopened(capsys):
    rewrite(bytes(2 ** 28), zipfile.ZIP_DEFLATED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert os.path.getsize("umt.pth") < 2 ** 20
    assert_refused(f"umt.pth: its records .*uncompressed.* 26843[0-9]* bytes, the file {os.path.getsize('umt.pth')}$",
                   capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 17        # KiB


@pytest.mark.parametrize("program", [
    b"\x80\x02}r" + struct.pack("<I", 2 ** 27) + b".",              # an index of the memo for which C fills 2 GiB
    b"\x80\x05\x96" + struct.pack("<Q", 2 ** 31) + b"abc.",         # a bytearray of 2 GiB
    b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 62) + b"abc.",         # bytes
    b"\x80\x04\x8d" + struct.pack("<Q", 2 ** 40) + b"abc.",         # a text
    b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b".",               # lists in lists
    b"\x80\x02(" + b"t" * 3 + b".",                                 # tuples without a mark
    b"\x80\x02}" + b")" + b"\x85" * 20000 + b"Nsh\x00.",            # a deep key, then a memo that is not there
    b"\x80\x02}" + b")" + b"\x85" * 20000 + b"Ns.",
    b"\x80\x02c\x00\n\x1b[31m\n.",                                  # a name that is none
    b"\x80\x02cos\nsystem\n\x8c\x04trueR.",
    b"", b".", b"\x80\x02", b"\xff" * 50,
], ids=lambda program: repr(program[:8]))
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_hostile_pickle_is_refused_in_little_memory(form, program, capsys):
    if form == "zip":
        rewrite(edit=lambda _: program)
    else:
        with open("umt.pth", "wb") as f:
            f.write(program)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused("umt.pth", capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 18        # KiB


def test_a_storage_smaller_than_its_pickle_says_is_refused(capsys):
    rewrite(edit=lambda content: content.replace(b"K@t", b"J" + struct.pack("<i", 2 ** 30) + b"t"))
    assert_refused("umt.pth is not a checkpoint.*", capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and names

@pytest.mark.parametrize("value, message", [
    (torch.ones(1).expand(2 ** 20, 2 ** 20), "elements are all in the file.*1048576"),
    (torch.ones(64).to_sparse(), "dense.*sparse"),
    (torch.ones(64, dtype=torch.complex64), "real numbers.*complex64"),
    (torch.ones(64, device="meta"), "dense|not a checkpoint|a Tensor|needs"),
    ([1, 2], "a tensor, got a list"),
], ids=["expanded", "sparse", "complex", "meta", "list"])
def test_a_value_that_is_no_plain_tensor_is_refused(value, message, capsys):
    torch.save({KEY: value}, "umt.pth")
    assert_refused(f"umt.pth.*({message})", capsys, flags=[[]])
    assert_refused("umt.pth", capsys, flags=[["--trust"]])


@pytest.mark.parametrize("content, message", [
    ({KEY: torch.ones(64), 5: torch.ones(1)}, "each key must be a text, got a int"),
    ({"model": {KEY: torch.ones(64), (1, 2): 3}}, "each key must be a text, got a tuple"),
    ({KEY: torch.ones(64), "encoder.\x1b]0;title\x07": torch.ones(1)}, r"encoder\.\\x1b\]0;title\\x07 must be absent"),
    ({"\x1b[2J\n": 1}, r"keys \\x1b\[2J\\n"),
    ({KEY.replace("0", "2999"): torch.ones(64), "encoder.patch_embed.proj.weight": torch.ones(64, 3, 1, 16, 16)},
     "number of a layer .*less than the number of keys, 2, got 2999"),
], ids=["number", "tuple", "escape", "line end", "many blocks"])
def test_hostile_keys_are_refused_in_one_printable_line(content, message, capsys):
    torch.save(content, "umt.pth")
    assert_refused(f"umt.pth: .*{message}", capsys)


def test_hostile_names_are_printed_escaped(capsys, monkeypatch):
    text = "\x1b[2J\ud800\n"
    monkeypatch.setattr(convert, "convert", lambda *args: (torch.nn.Linear(1, 1), {}))
    family = convert.Family((), {}, (), vit_only=True)
    monkeypatch.setattr(convert, "read",
                        lambda file, trust, report: report.append(f"replaced {text}") or ({}, "title", family))
    convert.main(convert.Config("umt.pth", "out"))
    assert r"replaced \x1b[2J\ud800\n" in capsys.readouterr().out.splitlines()
    with open("out/report.txt", encoding="utf-8") as f:
        assert r"replaced \x1b[2J\ud800\n" in f.read().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Not a file

def test_what_is_not_a_file_is_refused_at_once(capsys):
    os.makedirs("folder")
    os.mkfifo("pipe")                           # opening it would wait for ever
    for file in ("folder", "pipe", "/dev/zero"):
        assert_refused(f"{file} must be a file", capsys, file)
    assert_refused("No such file.*gone.pth", capsys, "gone.pth")
    shutil.rmtree("folder")
    os.remove("pipe")
    assert not glob.glob("*")
