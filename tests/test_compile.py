"""
Every kernel compiled for four chips, as its launcher launches it; needs no GPU.

The interpreter runs Python that the compiler refuses and never runs out of shared memory. This catches both, and what
costs time in silence: spills, missing matrix instructions, narrow loads.
"""

import json
import os
import re
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}          # KiB a block may have
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "MFMA"}
MULTIPLY = ["cosine_distance_kernel", "bandwidth_kernel", "density_peaks_kernel", "temporal_density_kernel"]
STACK = {"density_peaks_kernel": 48}        # bytes, where above 32: Triton 3.6 on sm_90 at N, C = 1024, 1536


def kernels():
    """The name of every kernel in kernels/, from its source."""
    folder = os.path.join(ROOT, "kernels")
    sources = [open(os.path.join(folder, name)).read() for name in sorted(os.listdir(folder)) if name.endswith(".py")]
    return re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", "\n".join(sources), re.M)


@pytest.fixture(scope="module")
def report():
    """Rows of `python -m tools.compile`, in a process of its own: TRITON_INTERPRET is read at import."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "tools.compile", "--json", "--processes", "2"], cwd=ROOT,
                         env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture
def rows(report, kernel, chip):
    """What one kernel became on one chip, in every case of the report."""
    found = [row for row in report if (row["kernel"], row["chip"]) == (kernel, chip)]
    assert found, f"{kernel} is in no case of the report on {chip}"
    return found


def name(row):
    return f"{row['kernel']} of {row['operation']} {row['shape']} T={row['T']} {row['dtype']} on {row['chip']}"


def known(rows, key):
    """The rows in which the disassembler said `key`."""
    found = [row for row in rows if key in row]
    if not found:
        pytest.skip(f"{key} could not be read here")
    return found


each = pytest.mark.parametrize("kernel", kernels())
chips = pytest.mark.parametrize("chip", TARGETS)


@each
@chips
def test_compiles_and_fits_into_shared_memory(rows, chip):
    for row in rows:
        assert row["error"] is None, f"{name(row)}: {row['error']}"
        assert row["shared"] <= SHARED[chip] * 1024, name(row)


@each
@chips
def test_one_block_has_its_registers(rows, chip):
    for row in known(rows, "registers"):
        most = 512 if chip == "gfx942" else min(255, 65536 // row["threads"])
        assert 0 < row["registers"] <= most, name(row)


@each
@chips
def test_hardly_spills(rows, kernel):
    for row in known(rows, "stack"):
        assert row["stack"] <= STACK.get(kernel, 32), name(row)


@pytest.mark.parametrize("kernel", MULTIPLY)
@chips
def test_multiplies_in_the_matrix_units_and_loads_16_bytes(rows, chip):
    for row in known(rows, "matrix"):
        # fp32 is multiplied in fp32: no tf32 in disguise.
        assert set(row["matrix"]) == ({MATRIX[chip]} if row["dtype"] == "bfloat16" else set()), name(row)
        assert row["wide_loads"] > 0, name(row)


def test_the_report_has_every_kernel_and_every_branch(report):
    assert len(kernels()) >= 8 and {row["kernel"] for row in report} == set(kernels())
    cases = {(row["operation"], row["dtype"], *row["shape"], row["T"]) for row in report if row["chip"] == "sm_90"}
    for case in (("density_peaks, gauss, parent", "bfloat16", 8, 196, 768, 4),
                 ("density_peaks, d_c given", "bfloat16", 8, 196, 768, 4),
                 ("density_peaks", "float32", 8, 196, 768, 4), ("density_peaks", "bfloat16", 8, 1024, 1536, 4),
                 ("temporal_density", "bfloat16", 32, 196, 768, 32)):
        assert case in cases
