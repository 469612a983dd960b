"""A disk that is full from some write on: one line, nothing lost, and --resume goes on bit for bit."""

import os
import re
import resource
import signal
import sys
import traceback

import pytest
from helpers.runs import assert_same, config, log, weights

import train
from runtime import run_cli

FLAGS = """--name run --steps 4 --unmasked-steps 2 --toy.steps 2 --toy.text-steps 2 --save-every 2 --log-every 2
    --data.num-views 1"""
BYTES_LEFT = 8              # that still fit into a file
EVERY = 9


def fill_disk_at(write):
    """Let all files that are opened for writing below out/, from this one on, take few bytes. -> a list of them all."""
    opened = []

    def hook(event, args):
        if event != "open" or not isinstance(args[0], str) or "out" not in args[0].split(os.sep):
            return
        path, mode, flags = args
        if set(mode or "") & set("wax+") or flags and flags & (os.O_WRONLY | os.O_RDWR):
            opened.append(path)
            if len(opened) == write:
                resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES_LEFT, resource.RLIM_INFINITY))

    sys.addaudithook(hook)
    return opened


def train_in_fork(cfg, write=0):
    """Train in a process that is forked from this one -> exit code, output, number of files opened for writing."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            signal.alarm(90)
            os.dup2(write_end, 1)
            os.dup2(write_end, 2)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            opened = fill_disk_at(write)
            run_cli("train.py", lambda: train.main(cfg))
            print(f"opened {len(opened)}")
        except SystemExit as stop:
            code = 1
            print(stop.code)
        except BaseException:
            code = 2
            traceback.print_exc()
        os._exit(code)
    os.close(write_end)
    with open(read_end) as f:
        output = f.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


@pytest.fixture(scope="module")
def whole_run(sprites, tmp_path_factory):
    """A run on an empty disk -> its folder, and how many files it opened for writing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        code, output = train_in_fork(config(sprites, FLAGS))
        assert code == 0, output
        return os.path.abspath("out/run"), int(re.search(r"opened (\d+)", output)[1])


def test_a_disk_that_is_full_from_some_write_on_loses_nothing(sprites, whole_run, tmp_path, monkeypatch):
    """Every EVERYth write, to save time; it was seen to pass for all of them."""
    expected, count = whole_run
    assert count > 30
    for write in range(1, count + 1, EVERY):
        folder = tmp_path / str(write)
        folder.mkdir()
        monkeypatch.chdir(folder)
        code, output = train_in_fork(config(sprites, FLAGS), write)
        errors = re.findall("train.py: .*", output)
        assert code == 1 and len(errors) == 1 and "Traceback" not in output, (write, output)
        assert re.search(r"out/\S+ could not be written \(File too large\)", errors[0]), (write, output)
        assert not [name for _, _, names in os.walk("out") for name in names if name.endswith(".tmp")]
        code, output = train_in_fork(config(sprites, f"{FLAGS} --resume"))
        assert code == 0, (write, output)
        for part in ("", "before_unmasked", "teacher", "text"):
            assert_same(weights(f"out/run/{part}"), weights(f"{expected}/{part}"))
        assert log("out/run") == log(expected)
