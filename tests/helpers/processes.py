"""Runs of train.py in processes of their own, and what befalls them: signals, kills, waits."""

import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress

import pytest

import loop
import train
from helpers.runs import Killed, assert_same, free_port, kill, log, weights
from runtime import run_cli

STEPS = 8
SHORT = f"--name run --data.num-views 0 --steps {STEPS} --unmasked-steps 2 --save-every 2 "
LONG = "--name run --data.num-views 0 "                 # 20 + 6 steps
LOADER = "--data.num-workers 1 --data.no-frame-cache "
PAUSE = 300                                         # seconds; a test that has to wait for its end has failed


def assert_ends_as(whole, folder="out/run"):
    """Bit for bit, and with the same losses."""
    for part in ("", "before_unmasked"):
        assert_same(weights(os.path.join(folder, part)), weights(os.path.join(whole, part)))
    assert log(folder) == log(whole)
    assert not [name for _, _, names in os.walk("out") for name in names if name.endswith(".tmp")]


@contextmanager
def ranks(world, cfg):
    """`python train.py` with this config in `world` processes, forked from this one with all that is patched in it."""
    def main(rank):
        os.setsid()
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        code = 0
        try:
            run_cli("train.py", lambda: train.main(cfg))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stderr.flush()
        os._exit(code)

    port = free_port()
    processes = [multiprocessing.get_context("fork").Process(target=main, args=(rank,)) for rank in range(world)]
    for p in processes:
        p.start()
    try:
        yield processes
    finally:
        for p in processes:
            p.kill()
            with suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)                            # its loader processes
            p.join()


def ended(processes):
    """-> (exit code, stdout, stderr) of each."""
    end = time.time() + 90
    for p in processes:
        p.join(max(0, end - time.time()))
    assert all(p.exitcode is not None for p in processes), "still running"
    return [(p.exitcode, *(open(f"{rank}.{name}").read() for name in ("out", "err")))
            for rank, p in enumerate(processes)]


def assert_said(code, err, message):
    """It failed and said why in one line, beside a progress bar."""
    said = re.findall("train.py: .*", err)
    assert code == 1 and len(said) == 1 and "Traceback" not in err, err
    assert re.match("train.py: " + message, said[0]), err


def until(there, seconds=90):
    end = time.time() + seconds
    while not there():
        assert time.time() < end, "it never came"
        time.sleep(0.005)


def in_step(patch, step, do, rank=0):
    """do() in the middle of a step of pretraining, by one of the ranks."""
    real = loop.learning_rate

    def rate(at, steps, *rest):
        if (at, steps, int(os.environ.get("RANK", 0))) == (step, STEPS, rank):
            do()
        return real(at, steps, *rest)

    patch.setattr(loop, "learning_rate", rate)


def end_me(with_signal):
    return lambda: os.kill(os.getpid(), with_signal)


def hold(*_, **__):
    """Something that takes long."""
    open("held", "w").close()
    time.sleep(PAUSE)


def lines(path):
    return open(path).read().count("\n") if os.path.exists(path) else 0


def interrupt(cfg, step=5):
    """In this process."""
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", step)
        with pytest.raises(Killed):
            train.main(cfg)
