"""Train in processes of their own and disturb them: signals, kills, blocked steps."""

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
from helpers.runs import Killed, assert_same, fork_ranks, kill, log, weights
from runtime import run_cli

STEPS = 8
SHORT = f"--name run --data.num-views 0 --steps {STEPS} --unmasked-steps 2 --save-every 2 "
LONG = "--name run --data.num-views 0 "                 # 20 + 6 steps
LOADER = "--data.num-workers 1 --data.no-frame-cache "
PAUSE = 300                                         # seconds; a test that waits for its end has failed


def assert_same_run(expected):
    """Assert that out/run has the same weights as another run, bit for bit, the same log, and no temporary file."""
    for part in ("", "before_unmasked"):
        assert_same(weights(f"out/run/{part}"), weights(f"{expected}/{part}"))
    assert log("out/run") == log(expected)
    assert not [name for _, _, names in os.walk("out") for name in names if name.endswith(".tmp")]


@contextmanager
def launch_ranks(world, cfg):
    """Run `python train.py` with this config in `world` processes, which are forked with all patches of this one."""
    def main(rank):
        os.setsid()
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        code = 0
        try:
            run_cli("train.py", lambda: train.main(cfg))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stderr.flush()
        os._exit(code)

    processes = fork_ranks(world, main)
    try:
        yield processes
    finally:
        for p in processes:
            p.kill()
            with suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)                            # with its loader processes
            p.join()


def wait_for_exit(processes):
    """Wait until all ranks have exited -> (exit code, stdout, stderr) of each."""
    end = time.time() + 90
    for p in processes:
        p.join(max(0, end - time.time()))
    assert all(p.exitcode is not None for p in processes), "a process did not exit within 90 s"
    return [(p.exitcode, *(open(f"{rank}.{name}").read() for name in ("out", "err")))
            for rank, p in enumerate(processes)]


def assert_train_error(code, err, message):
    """Assert that train.py failed with one line that matches `message`; a progress bar may stand beside it."""
    errors = re.findall("train.py: .*", err)
    assert code == 1 and len(errors) == 1 and "Traceback" not in err, err
    assert re.match("train.py: " + message, errors[0]), err


def wait_until(condition, seconds=90):
    """Poll condition() until it is true."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"the condition was not met within {seconds} s"
        time.sleep(0.005)


def call_in_step(patch, step, function, rank=0):
    """Patch training so that one rank calls function() during this step of pretraining."""
    compute_rate = loop.learning_rate

    def learning_rate(current_step, steps, *args):
        if (current_step, steps, int(os.environ.get("RANK", 0))) == (step, STEPS, rank):
            function()
        return compute_rate(current_step, steps, *args)

    patch.setattr(loop, "learning_rate", learning_rate)


def send_to_self(signal_number):
    """Return a function that sends the signal to the process that calls it."""
    return lambda: os.kill(os.getpid(), signal_number)


def block_forever(*_, **__):
    """Create the file `blocked`, then sleep longer than any test waits."""
    open("blocked", "w").close()
    time.sleep(PAUSE)


def num_logged():
    """Count the rows of out/run/log.jsonl, which may not exist yet."""
    return open("out/run/log.jsonl").read().count("\n") if os.path.exists("out/run/log.jsonl") else 0


def interrupt(cfg, step=5):
    """Train in this process until the run is killed before this step of pretraining."""
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", step)
        with pytest.raises(Killed):
            train.main(cfg)
