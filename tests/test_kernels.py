"""
kernels/__init__.py: argument checks, chunks, copies to a device; that the folder works under any name, and all of the
project but the kernels without Triton.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.kernels import needs_cuda, seeded, unkind

import kernels
from kernels import check_bandwidth, check_features, check_tokens, frames_per_chunk, to_device
from kernels.bandwidth import bandwidth
from kernels.density_peaks import density_peaks
from kernels.temporal_density import temporal_density

SCRIPT = """
import importlib, pkgutil, sys
import torch
import any_name as package
modules = {m.name: importlib.import_module(f"any_name.{m.name}") for m in pkgutil.iter_modules(package.__path__)}
assert "kernels" not in sys.modules
x = torch.load("x.pt")
device = "cuda" if torch.cuda.is_available() else "cpu"
labels, centres, log_rho, _ = modules["density_peaks"].density_peaks_triton(x.to(device), 4, None, "exp", "nearest")
best = modules["cluster_argmax"].cluster_argmax_triton(log_rho, labels, 4)
torch.save([t.cpu() for t in (labels, centres, log_rho, best)] + [sorted(modules)], "out.pt")
"""


def test_the_folder_runs_when_copied_under_another_name(tmp_path):
    from kernels.cluster_argmax import cluster_argmax_triton
    from kernels.density_peaks import density_peaks_triton
    source, x = Path(kernels.__file__).parent, unkind(2, 20, 8)
    shutil.copytree(source, tmp_path / "any_name", ignore=shutil.ignore_patterns("__pycache__"))
    torch.save(x, tmp_path / "x.pt")
    process = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    *copied, modules = torch.load(tmp_path / "out.pt")
    assert modules == sorted(file.stem for file in source.glob("*.py") if file.stem != "__init__")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels, centres, log_rho, _ = density_peaks_triton(x.to(device), 4, None, "exp", "nearest")
    expected = labels, centres, log_rho, cluster_argmax_triton(log_rho, labels, 4)
    assert all(a.equal(b.cpu()) for a, b in zip(copied, expected, strict=True))


HIDE_TRITON = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
"""
WITHOUT_TRITON = HIDE_TRITON + """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import eval, search, train, tools.mask_stats
from kernels import TritonMissing, bandwidth, density_peaks, window_attention
from masking import MASKS, MaskConfig, cluster_stm
from runtime import run_cli
assert "triton" not in sys.modules
saved = torch.load("x.pt")
x, ids = saved["x"], {"cluster_stm": cluster_stm(saved["x"], 4)}
for name in saved["names"]:
    ids[name] = MaskConfig(name)(x, 4, grid=(4, 5), generator=torch.Generator().manual_seed(0))
torch.save(ids, "ids.pt")
frames, scores = x[0], torch.ones(3, 20, 2)
launches = [lambda: bandwidth.bandwidth_triton(frames, 0.5),
            lambda: density_peaks.density_peaks_triton(frames, 4, None, "exp", "nearest"),
            lambda: window_attention.window_attention_triton(scores, frames, (4, 5))]
with FakeTensorMode():
    on_gpu = torch.empty(1, 3, 20, 8, device="cuda")
for launch in (*launches, lambda: cluster_stm(on_gpu, 4)):
    try:
        launch()
    except TritonMissing as error:
        assert isinstance(error, RuntimeError)
        print(error)
    else:
        raise AssertionError("no error")
run_cli("eval.py", launches[0])
"""


def test_without_triton_everything_but_the_kernels_runs(tmp_path):
    from masking import MASK_INPUTS, MASKS, MaskConfig, cluster_stm
    names = [name for name in MASKS if MASK_INPUTS[name] <= {"tokens", "generator", "grid"}]
    x = unkind(1, 3, 20, 8)
    torch.save({"x": x, "names": names}, tmp_path / "x.pt")
    root = Path(kernels.__file__).parent.parent
    process = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""})
    assert process.returncode == 1, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 4 and len({*lines}) == 1 and re.search("GPU need Triton.*pip install triton.*CPU", lines[0])
    assert process.stderr.splitlines() == [f"eval.py: {lines[0]}"]                  # one line, no traceback
    ids = torch.load(tmp_path / "ids.pt")
    assert ids.keys() == {"cluster_stm", *names} and len(names) > 10
    for name in names:
        expected = MaskConfig(name)(x, 4, grid=(4, 5), generator=seeded(0))
        assert ids[name].equal(expected), name
    assert ids["cluster_stm"].equal(cluster_stm(x, 4))


def test_a_broken_triton_is_not_taken_for_a_missing_one(tmp_path):
    (tmp_path / "triton.py").write_text("import a_module_that_triton_needs")
    root = Path(kernels.__file__).parent.parent
    process = subprocess.run([sys.executable, "-c", "import kernels"], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"})
    assert process.returncode and "No module named 'a_module_that_triton_needs'" in process.stderr


def test_triton_is_asked_for_on_linux_alone():
    requirements = (Path(kernels.__file__).parent.parent / "requirements.txt").read_text().splitlines()
    line, = (line for line in requirements if line.startswith("triton"))
    assert line.partition(";")[2].strip() == 'sys_platform == "linux"'


@pytest.mark.parametrize("x, ndim, message", [
    (torch.ones(3, 4), 3, r"op.*\(F, N, C\).*\(3, 4\)"),
    (torch.ones(1, 2, 3, 4), 3, r"op.*\(F, N, C\).*\(1, 2, 3, 4\)"),
    (torch.ones(2, 3, 4), 4, r"op.*\(B, T, N, C\).*\(2, 3, 4\)"),
    (torch.ones(0, 3, 4), 3, r"op.*empty.*\(0, 3, 4\)"),
    (torch.ones(2, 0, 4), 3, r"op.*empty.*\(2, 0, 4\)"),
    (torch.ones(2, 3, 0), 3, r"op.*empty.*\(2, 3, 0\)"),
    (torch.ones(1, 2, 0, 4), 4, r"op.*empty.*\(1, 2, 0, 4\)"),
    (torch.ones(1, 2, 3, dtype=torch.int64), 3, "op.*torch.int64"),
    (torch.ones(1, 1, 2, 2, dtype=torch.uint8), 4, "op.*torch.uint8"),
    (torch.tensor([[[1.0, math.nan], [math.inf, 1.0]]]), 3, "op.*2 NaN or infinite of 4"),
    (torch.tensor([[[1.0, -math.inf]]], dtype=torch.float16), 3, "op.*1 NaN or infinite of 2"),
], ids=range(11))
def test_invalid_tokens_are_refused(x, ndim, message):
    for check in (check_features, check_tokens):
        with pytest.raises(ValueError, match=message) as error:
            check("op", x, ndim)
        assert "\n" not in str(error.value)


def test_values_are_read_only_if_checked():
    x = torch.full((1, 2, 3), math.nan)
    assert check_features("op", x, 3, check=False).isnan().all()


def test_checked_tokens_are_detached_and_at_least_fp32_on_a_cpu():
    x = torch.ones(1, 2, 3, requires_grad=True)
    assert not check_tokens("op", x, 3).requires_grad
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert check_tokens("op", x.to(dtype), 3).dtype == torch.float32
    assert check_tokens("op", x.double(), 3).dtype == torch.float64


@needs_cuda
def test_on_a_gpu_tokens_no_kernel_can_read_are_refused():
    x = unkind(3, 70, 40).cuda()
    for bad, message in [(x.double(), "op.*torch.float64"), (x[:, :1].expand(3, 1025, 40), "op.*1024.*1025"),
                         (x * 1e-20, "op.*1e-12 to 1e12")]:
        with pytest.raises(ValueError, match=message):
            check_tokens("op", bad, 3)
    assert check_tokens("op", x.half(), 3).dtype == torch.float16


@pytest.mark.parametrize("d_c, message", [
    (0, r"d_c.*positive.* 0$"), (0.0, r"d_c.*positive.* 0$"), (-1.5, r"d_c.*positive.*-1\.5"),
    (math.nan, "d_c.*positive.*nan"), (torch.tensor([0.1, -0.5]), r"d_c.*positive.*-0\.5"),
    (torch.ones(3), r"d_c.*\(2,\).*\(3,\)"), (torch.ones(2, 1), r"d_c.*\(2,\).*\(2, 1\)"),
    ([0.1, 0.2, 0.3], r"d_c.*\(2,\).*\(3,\)"), (torch.ones(2, device="meta"), "d_c.*cpu.*meta"),
], ids=range(9))
def test_invalid_bandwidths_are_refused(d_c, message):
    with pytest.raises(ValueError, match=message):
        check_bandwidth(d_c, 2, torch.ones(2, 3, 4))


@pytest.mark.parametrize("d_c", [0.25, torch.tensor(0.25), [0.25, 0.25], torch.full((2,), 0.25, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bandwidth_is_one_number_or_one_per_frame(d_c, dtype):
    result = check_bandwidth(d_c, 2, torch.ones(2, 3, 4, dtype=dtype))
    assert result.equal(torch.full((2,), 0.25, dtype=dtype)) and result.is_contiguous()


def test_results_do_not_depend_on_the_chunks_of_a_cpu(monkeypatch):
    x = torch.randn(4, 3, 10, 16, generator=seeded(0))

    def results():
        frames = x.flatten(0, 1)
        d_c = torch.linspace(0.1, 0.5, 12)
        return [bandwidth(frames, 0.1), *density_peaks(frames, 3, d_c), temporal_density(x, d_c[:4])]

    at_once = results()
    assert frames_per_chunk(x) >= 4
    monkeypatch.setattr("kernels.CPU_CHUNK_BYTES", 2000)        # 3 frames of 640 bytes; less than a clip
    assert frames_per_chunk(x.flatten(0, 1)) == 3 and frames_per_chunk(x) == 1
    for chunked, expected in zip(results(), at_once, strict=True):
        torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=1e-6)


def test_to_device_moves_a_tensor():
    x = torch.arange(6.0).view(2, 3).T
    assert to_device(x, torch.device("cpu")) is x
    assert to_device(x, torch.device("meta")).device.type == "meta"
    if torch.cuda.is_available():
        moved = to_device(x, torch.device("cuda"))
        assert moved.is_cuda and moved.cpu().equal(x) and to_device(moved, torch.device("cuda")) is moved
