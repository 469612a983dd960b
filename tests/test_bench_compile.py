"""
Every kernel compiled for four GPUs, as its launcher launches it; needs no GPU.

Triton's interpreter runs Python that the compiler refuses, and never runs out of shared memory. These tests catch both,
and what makes kernels slow without an error: spills, missing matrix instructions, narrow loads.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers.runs import ROOT
from helpers.tables import markdown_tables

from bench import compile as bench_compile

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}          # KiB that a block may have
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "MFMA"}
MULTIPLYING = ["cosine_distance_kernel", "bandwidth_kernel", "density_peaks_kernel", "temporal_density_kernel"]
STACK = {"density_peaks_kernel": 48}        # bytes, where above 32: on sm_90 at N, C = 196, 768


def kernel_names():
    """The name of every kernel in kernels/, from the sources."""
    folder = os.path.join(ROOT, "kernels")
    sources = [open(os.path.join(folder, name)).read() for name in sorted(os.listdir(folder)) if name.endswith(".py")]
    return re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", "\n".join(sources), re.M)


@pytest.fixture(scope="module")
def report():
    """The rows of `python -m bench compile`, in a process of its own, as tests set TRITON_INTERPRET."""
    run = subprocess.run([sys.executable, "-m", "bench", "compile", "--json", "--processes", "2"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture
def rows(report, kernel, chip):
    """The rows of one kernel on one GPU."""
    rows = [row for row in report if (row["kernel"], row["chip"]) == (kernel, chip)]
    assert rows, f"the report has no row of {kernel} on {chip}"
    return rows


def describe(row):
    return f"{row['kernel']} of {row['operation']} {row['shape']} T={row['T']} {row['dtype']} on {row['chip']}"


def rows_with(rows, key):
    """The rows for which the disassembler gave `key`."""
    rows = [row for row in rows if key in row]
    if not rows:
        pytest.skip(f"{key} could not be read here")
    return rows


all_kernels = pytest.mark.parametrize("kernel", kernel_names())
all_chips = pytest.mark.parametrize("chip", bench_compile.TARGETS)


@all_kernels
@all_chips
def test_compiles_and_fits_into_shared_memory(rows, chip):
    for row in rows:
        assert row["error"] is None, f"{describe(row)}: {row['error']}"
        assert row["shared"] <= SHARED[chip] * 1024, describe(row)


@all_kernels
@all_chips
def test_a_block_gets_its_registers(rows, chip):
    for row in rows_with(rows, "registers"):
        limit = 512 if chip == "gfx942" else min(255, 65536 // row["threads"])
        assert 0 < row["registers"] <= limit, describe(row)


@all_kernels
@all_chips
def test_hardly_spills(rows, kernel):
    for row in rows_with(rows, "stack"):
        assert row["stack"] <= STACK.get(kernel, 32), describe(row)


@pytest.mark.parametrize("kernel", MULTIPLYING)
@all_chips
def test_multiplies_in_matrix_units_and_loads_16_bytes(rows, chip):
    for row in rows_with(rows, "matrix"):
        # fp32 is multiplied in fp32, not in tf32.
        assert set(row["matrix"]) == ({MATRIX[chip]} if row["dtype"] == "bfloat16" else set()), describe(row)
        assert row["wide_loads"] > 0, describe(row)


def test_a_batch_of_another_size_compiles_nothing_new():
    # The last batch of an epoch has any number of clips, and Triton makes variants for 1 and for multiples of 16.
    names = ["density_peaks", "temporal_density", "bandwidth across", "bandwidth within", "cosine_distance",
             "cluster_argmax", "window_attention"]
    jobs = [dict(target=bench_compile.TARGETS["sm_90"], operation=name, shape=(2 * B, 196, 768), T=2, dtype="bfloat16",
                 launch={}) for B in (1, 3, 8, 64) for name in names]
    code = f"import json; from bench.compile import compile_all; print(json.dumps(compile_all({jobs}, 2)))"
    run = subprocess.run([sys.executable, "-c", f"if __name__ == '__main__': {code}"], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    hashes = {}
    for row in json.loads(run.stdout):
        assert row["error"] is None, describe(row)
        hashes.setdefault((row["operation"], row["kernel"]), set()).add(row["hash"])
    assert len(hashes) >= 9
    assert {key: len(found) for key, found in hashes.items() if len(found) > 1} == {}


def test_the_report_has_every_kernel_and_every_branch(report):
    assert len(kernel_names()) >= 8 and {row["kernel"] for row in report} == set(kernel_names())
    cases = {(row["operation"], row["dtype"], *row["shape"], row["T"]) for row in report if row["chip"] == "sm_90"}
    for case in (("density_peaks, gauss, parent", "bfloat16", 8, 196, 768, 4),
                 ("density_peaks, d_c given", "bfloat16", 8, 196, 768, 4),
                 ("density_peaks", "float32", 8, 196, 768, 4), ("density_peaks", "bfloat16", 8, 1024, 1536, 4),
                 ("temporal_density", "bfloat16", 32, 196, 768, 32)):
        assert case in cases


def test_the_table_has_what_was_read_and_errors(capsys):
    row = dict(chip="sm_90", kernel="k", operation="density_peaks", shape=(8, 196, 768), T=4, dtype="bfloat16", warps=8)
    measured = dict(error=None, shared=2048, registers=200, stack=0, spills=3, matrix={"HGMMA": 8}, wide_loads=5)
    bench_compile.print_report([row | measured, row | dict(error=None, shared=0), row | dict(error="TypeError: no")])
    (header, complete, unread, failed), = markdown_tables(capsys.readouterr().out)
    assert complete[:3] == ["sm_90", "k", "density_peaks"] and complete[6:] == ["2", "200", "0", "3", "8 HGMMA", "5"]
    assert len(header) == len(complete) and unread[7:] == ["not read"] * 5 and failed[6:] == ["TypeError: no"]
