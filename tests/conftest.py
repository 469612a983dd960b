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


def pytest_configure(config):
    """Refuse a version of Triton whose interpreter is not like a GPU: tests would fail that a GPU passes."""
    from kernels import triton  # only now: it reads TRITON_INTERPRET

    if not torch.cuda.is_available() and triton.__version__.startswith("3.6."):
        raise pytest.UsageError("without a GPU the tests need Triton 3.7 or later (in the interpreter of 3.6 a minimum "
                                f"passes a NaN on, and NumPy 2.4 breaks it), got Triton {triton.__version__}")


def pytest_ignore_collect(collection_path):
    """Leave out the tests of bench/, which measures kernels, where there is no Triton."""
    from kernels import MissingTriton, triton
    if isinstance(triton, MissingTriton) and collection_path.name.startswith(("test_bench_", "test_umt_step")):
        return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test that calls a kernel where there is no Triton, as on macOS."""
    from kernels import TritonMissing
    try:
        return (yield)
    except TritonMissing as error:
        pytest.skip(str(error))


@pytest.hookimpl(tryfirst=True)                 # before -m chooses
def pytest_collection_modifyitems(items):
    """Mark as exhaustive_gpu the tests without the marker gpu, in files that have tests with it."""
    paths = {item.path for item in items if item.get_closest_marker("gpu")}
    for item in items:
        if item.path in paths and not item.get_closest_marker("gpu"):
            item.add_marker("exhaustive_gpu")


@pytest.fixture(scope="session")
def sprites(tmp_path_factory):
    """Write 24 training, 12 test and 6 validation clips once for all test files -> their folder."""
    from tools.sprites import write_sprites
    folder = str(tmp_path_factory.getbasetemp() / "sprites")
    write_sprites(folder, train=24, test=12, val=6)
    return folder


@pytest.fixture(scope="session")
def first_run(sprites, tmp_path_factory):
    """Train a run with its own teacher and text encoder -> the folder that holds it as out/first."""
    from helpers.runs import FIRST_RUN_FLAGS, config

    import train
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(config(sprites, FIRST_RUN_FLAGS))
    return str(folder)


@pytest.fixture
def run_config(sprites, first_run, tmp_path, monkeypatch):
    """Enter an empty folder. run_config(flags) makes the config of a run with the first run's teacher and BERT."""
    from helpers.runs import config, with_weights
    monkeypatch.chdir(tmp_path)
    return lambda flags="": config(sprites, with_weights(first_run, flags))


@pytest.fixture
def finetune_config(sprites, first_run, tmp_path, monkeypatch):
    """Enter an empty folder and hide Java, which starts slowly. finetune_config(task, flags) makes a config."""
    from helpers.runs import make_finetune_config
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    return lambda task, flags="": make_finetune_config(sprites, first_run, task, flags)


@pytest.fixture(scope="session")
def undisturbed_run(sprites, first_run, tmp_path_factory):
    """undisturbed_run(flags, world) trains a run without interruption on `world` ranks, once -> its folder."""
    from helpers.processes import SHORT
    from helpers.runs import config, on_ranks, with_weights

    import train
    folders = {}

    def run(flags=SHORT, world=1):
        if (flags, world) not in folders:
            folder = tmp_path_factory.mktemp("undisturbed")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                cfg = config(sprites, with_weights(first_run, flags))
                train.main(cfg) if world == 1 else on_ranks(world, cfg)
            folders[flags, world] = str(folder / "out" / "run")
        return folders[flags, world]
    return run


@pytest.fixture
def start_process(run_config, sprites, first_run, tmp_path):
    """start_process(flags, command) starts a Python command with the flags of a run in the folder of `run_config`."""
    from helpers.runs import ROOT, argv, with_weights
    processes = []

    def start(flags, command=(f"{ROOT}/train.py",)):
        flags = with_weights(first_run, flags)
        process = subprocess.Popen([sys.executable, *command, *argv(sprites, flags)], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()                                             # torchrun then ends its workers
            with suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
        process.communicate()


@pytest.fixture
def seed_0():
    """Seed torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch):
    """Fill torch.empty with NaN, or with -7, so that memory which no program wrote cannot look computed."""
    def fill_result(allocate):
        def empty(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(torch.nan if t.is_floating_point() else -7)
        return empty

    for allocate in (torch.empty, torch.empty_like):
        monkeypatch.setattr(torch, allocate.__name__, fill_result(allocate))


@pytest.fixture(autouse=True)
def check_bounds(monkeypatch):
    """Check in the interpreter that a kernel reads and writes only inside the tensors of its launch."""
    from kernels import MissingTriton, triton
    if torch.cuda.is_available() or isinstance(triton, MissingTriton):
        return
    from triton.runtime import interpreter
    spans = []                                  # (start, end) address of each tensor's memory
    init_args = interpreter.GridExecutor._init_args_hst

    def record_spans(self, *args):
        result = init_args(self, *args)
        storages = [a.untyped_storage() for a in result[0] if isinstance(a, torch.Tensor)]
        spans[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return result

    def check_access(access, mask_index, verb):
        def checked_access(self, ptrs, *args):
            active = ptrs.data[args[mask_index].data]
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            low, high = (int(active.min()), int(active.max()) + size) if active.size else spans[0]
            if not any(a <= low and high <= b for a, b in spans):
                raise IndexError(f"a kernel {verb} bytes {[(low - a, high - b) for a, b in spans]} from its tensors")
            return access(self, ptrs, *args)
        return checked_access

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", record_spans)
    monkeypatch.setattr(builder, "create_masked_load", check_access(builder.create_masked_load, 0, "reads"))
    monkeypatch.setattr(builder, "create_masked_store", check_access(builder.create_masked_store, 1, "writes"))
