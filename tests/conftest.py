"""
Without a GPU the kernels run in Triton's interpreter, called by the tests: the public functions take CPU tensors to the
references. One thread: these are thousands of small operations, which a second makes no faster, and twenty times slower
on a machine that is busy with something else.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when a kernel is decorated, so before any import of kernels

os.environ["HF_HUB_OFFLINE"] = "1"              # a hub id is looked for in the cache alone

torch.set_num_threads(1)

sys.path.insert(0, os.path.dirname(__file__))   # for `from helpers.runs import ...`, in plugins too
pytest_plugins = ["helpers.benchmarks"]


@pytest.fixture(scope="session")
def sprites(tmp_path_factory):
    """Folder of 24 training, 12 test and 6 validation clips, the same for all test files."""
    from tools.sprites import write_sprites
    folder = str(tmp_path_factory.getbasetemp() / "sprites")
    write_sprites(folder, train=24, test=12, val=6)
    return folder


@pytest.fixture(scope="session")
def first(sprites, tmp_path_factory):
    """Folder with out/first, a run that trained its own teacher and text encoder."""
    from helpers.runs import FIRST, config

    import train
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(config(sprites, FIRST))
    return str(folder)


@pytest.fixture
def given(sprites, first, tmp_path, monkeypatch):
    """In a folder of its own: given(flags) is the config of a run that is given teacher and text encoder."""
    from helpers.runs import config, with_weights
    monkeypatch.chdir(tmp_path)
    return lambda flags="": config(sprites, with_weights(first, flags))


@pytest.fixture
def tune(sprites, first, tmp_path, monkeypatch):
    """In a folder of its own: tune(task, flags) is a fine-tuning config. Java, which is slow to start, is hidden."""
    from helpers.runs import finetune_config
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    return lambda task, flags="": finetune_config(sprites, first, task, flags)


@pytest.fixture(scope="session")
def whole(sprites, first, tmp_path_factory):
    """whole(flags, ranks) -> the folder of an undisturbed run."""
    from helpers.processes import SHORT
    from helpers.runs import config, on_ranks, with_weights

    import train
    done = {}

    def run(flags=SHORT, ranks=1):
        if (flags, ranks) not in done:
            folder = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                cfg = config(sprites, with_weights(first, flags))
                train.main(cfg) if ranks == 1 else on_ranks(ranks, cfg)
            done[flags, ranks] = str(folder / "out" / "run")
        return done[flags, ranks]
    return run


@pytest.fixture
def begun(given, sprites, first, tmp_path):
    """In the folder of `given`, begun(flags, command): a process of its own, the flags being of a run."""
    from helpers.runs import ROOT, argv, with_weights
    processes = []

    def begin(flags, command=(f"{ROOT}/train.py",)):
        flags = with_weights(first, flags)
        process = subprocess.Popen([sys.executable, *command, *argv(sprites, flags)], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.terminate()                                             # torchrun ends its processes
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
        process.communicate()


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty is full of NaN, or of -7: what no program wrote cannot pass for computed."""
    def poisoned(make):
        def empty(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(torch.nan if t.is_floating_point() else -7)
        return empty

    for make in (torch.empty, torch.empty_like):
        monkeypatch.setattr(torch, make.__name__, poisoned(make))


@pytest.fixture(autouse=True)
def in_bounds(monkeypatch):
    """In the interpreter: each address that a kernel reads or writes lies within one of the launch's tensors."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter
    spans = []

    def arguments(self, *args, plain=interpreter.GridExecutor._init_args_hst):
        result = plain(self, *args)
        storages = [a.untyped_storage() for a in result[0] if isinstance(a, torch.Tensor)]
        spans[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return result

    def guarded(plain, mask_at, verb):
        def access(self, ptrs, *args):
            active = ptrs.data[args[mask_at].data]
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            low, high = (int(active.min()), int(active.max()) + size) if active.size else spans[0]
            if not any(a <= low and high <= b for a, b in spans):
                raise IndexError(f"a kernel {verb} bytes {[(low - a, high - b) for a, b in spans]} from its tensors")
            return plain(self, ptrs, *args)
        return access

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)
    monkeypatch.setattr(builder, "create_masked_load", guarded(builder.create_masked_load, 0, "reads"))
    monkeypatch.setattr(builder, "create_masked_store", guarded(builder.create_masked_store, 1, "writes"))
