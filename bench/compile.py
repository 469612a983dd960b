"""
What the compilers make of the Triton kernels, for four GPUs: jobs -> shared memory, registers, spills, matrix
instructions and wide loads of each kernel. Needs no GPU.

The launchers run on tensors without memory (device "meta"), and each launch stops once it has its binary. So exactly
what would run is compiled: Triton itself determines signature, specialisation and options.
"""

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.operations import operations
from masking import keep_count
from runtime import num_cpus
from tools.tables import banner, print_header, print_row

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}         # name -> arguments of GPUTarget
SMALL, LARGE = (8, 196, 768), (8, 1024, 1536)       # F, N, C


@dataclass
class Config:
    """Compile the Triton kernels for several GPUs and report shared memory, registers and spills. Needs no GPU."""
    # GPUs to compile for: A100 (sm_80), H100 and H200 (sm_90), B200 (sm_100), MI300 (gfx942)
    targets: tuple[Literal["sm_80", "sm_90", "sm_100", "gfx942"], ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    processes: int = 0          # processes that compile in parallel; 0: one per core, at most 8
    fresh: bool = False         # compile everything again, without Triton's cache
    json: bool = False          # print a JSON list of rows instead of a table
    commit: str = ""            # commit to print above the table; empty: ask git


def report_jobs(targets: list[str]) -> list[dict]:
    """
    The jobs of the report: every operation at the model's shape for every GPU; for sm_90 also in fp32, at the largest
    shape, and in each way a kernel branches.
    """
    names = ["density_peaks", "temporal_density", "bandwidth across", "bandwidth within", "cosine_distance",
             "cluster_argmax", "window_attention"]

    def job(target, operation, shape=SMALL, T=4, dtype="bfloat16"):
        return dict(target=TARGETS[target], operation=operation, shape=shape, T=T, dtype=dtype, launch={})

    jobs = [job(target, name) for name in names for target in targets]
    if "sm_90" in targets:
        jobs += [job("sm_90", name, dtype="float32") for name in names]
        jobs += [job("sm_90", name, LARGE) for name in names]
        jobs += [job("sm_90", "density_peaks, gauss, parent"), job("sm_90", "density_peaks, d_c given"),
                 job("sm_90", "temporal_density", (32, 196, 768), 32)]              # T = 32: GROUP > 1
    return jobs


class FakeDriver:
    """What Triton asks of a GPU driver before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)                     # Triton keeps compiled kernels by device

    def get_current_stream(self, device=None):
        return 0


def compile_job(job: dict) -> list[dict]:
    """Compile every kernel that one call of an operation launches -> a row for each. Call it in a new process."""
    target, rows, launch = GPUTarget(*job["target"]), [], JITFunction.run
    chip = f"sm_{target.arch}" if target.backend == "cuda" else target.arch

    def compile_only(self, *args, grid, warmup, **kwargs):
        row = dict(job, chip=chip, kernel=self.fn.__name__, warps=kwargs.get("num_warps", 4), error=None)
        rows.append(row)
        start = time.perf_counter()
        try:
            compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
            row |= dict(hash=compiled.metadata.hash, shared=compiled.metadata.shared,
                        threads=row["warps"] * target.warp_size, **inspect(compiled, target))
        except Exception as e:      # noqa: BLE001
            row["error"] = f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
        row["seconds"] = round(time.perf_counter() - start, 1)

    (F, N, C), T = job["shape"], job["T"]
    op = operations(F, N, C, T, keep_count(N, 0.85))[job["operation"]]
    triton.runtime.driver.set_active(FakeDriver(target))
    with mock.patch("kernels.target_arch", lambda x: chip), mock.patch.object(JITFunction, "run", compile_only):
        op.kernel(*op.inputs("meta", getattr(torch, job["dtype"]), 0), **job["launch"])
    return rows


def inspect(compiled, target: GPUTarget) -> dict:
    """Registers, spills, matrix instructions and 16-byte loads of a compiled kernel. Unreadable ones are left out."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        read_count = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        return dict(registers=read_count("vgpr_count"), stack=read_count("private_segment_fixed_size"),
                    spills=read_count("vgpr_spill_count") + read_count("sgpr_spill_count"),
                    **count_instructions(text, {"MFMA": r"v_mfma"}, r"(?:global|buffer)_load_(?:dwordx4|b128)"))
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    result = {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout
        try:
            usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
        except OSError:
            return result
    if counts := re.search(r"REG:(\d+) STACK:(\d+)", usage):
        result |= dict(registers=int(counts[1]), stack=int(counts[2]))
    if re.search(r"\bEXIT\b", sass):
        kinds = {"HMMA": r"\bHMMA\b", "HGMMA": r"\bHGMMA\b", "tcgen05": r"\bUTC\w*MMA\b"}
        result |= dict(spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
                       **count_instructions(sass, kinds, r"\bLDG(?:STS)?\.[\w.]*(?:128|256)"))
    return result


def count_instructions(text: str, kinds: dict[str, str], wide_load: str) -> dict:
    """Count the matrix instructions by kind, kinds that do not occur left out, and the 16-byte loads."""
    matrix = {name: len(re.findall(pattern, text)) for name, pattern in kinds.items()}
    return dict(matrix={name: n for name, n in matrix.items() if n}, wide_loads=len(re.findall(wide_load, text)))


def compile_all(jobs: list[dict], processes: int) -> list[dict]:
    """
    Compile all jobs in parallel -> their rows, in order.

    The processes are spawned without TRITON_INTERPRET, which Triton reads at import: an interpreted kernel cannot be
    compiled.
    """
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            return [row for rows in pool.map(compile_job, jobs) for row in rows]


def print_report(rows: list[dict]):
    """Print the rows as a Markdown table."""
    print_header("What the compiler made of the kernels", "chip", "kernel", "from", "(F, N, C), T", "type", "warps",
                 "shared KiB", "registers", "stack bytes", "local loads + stores", "matrix instructions",
                 "16-byte loads")
    for row in rows:
        shape = f"({', '.join(map(str, row['shape']))}), {row['T']}"
        first = (row["chip"], row["kernel"], row["operation"], shape, row["dtype"], row["warps"])
        if row["error"]:
            print_row(*first, row["error"])
            continue
        matrix = "not read"
        if "matrix" in row:
            matrix = ", ".join(f"{n} {kind}" for kind, n in row["matrix"].items()) or "none"
        registers, stack, spills, wide_loads = (row.get(key, "not read")
                                                for key in ("registers", "stack", "spills", "wide_loads"))
        print_row(*first, row["shared"] / 1024, registers, stack, spills, matrix, wide_loads)


def main(cfg: Config):
    """Compile the kernels and print the report."""
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder} if cfg.fresh else {}):
            rows = compile_all(report_jobs(cfg.targets), cfg.processes or min(8, num_cpus()))
    if cfg.json:
        print(json.dumps(rows))
        return
    banner("cpu", cfg.commit, "bench")
    print_report(rows)
