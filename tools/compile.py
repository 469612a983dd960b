"""
What the compilers make of the kernels, for four chips; needs no GPU.

    python -m tools.compile                         # shared memory, registers, spills, matrix instructions, wide loads
    python -m tools.compile --targets sm_90 --json

The launchers run on tensors without memory, and each launch stops once it has its binary, so what is compiled is what
would run: Triton itself settles signature, specialisation and options.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
import triton

from masking import keep_count
from tools.bench import banner, heading, line, operations

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
SMALL, LARGE = (8, 196, 768), (8, 1024, 1536)


def report_jobs(targets: list[str]) -> list[dict]:
    """The model's shape for every chip; on sm_90 fp32, the largest shape and each way a kernel branches as well."""
    main = ["density_peaks", "temporal_density", "bandwidth across", "bandwidth within", "cosine_distance",
            "cluster_argmax", "window_attention"]
    job = lambda target, operation, shape=SMALL, T=4, dtype="bfloat16": dict(
        target=TARGETS[target], operation=operation, shape=shape, T=T, dtype=dtype, launch={})
    jobs = [job(target, operation) for operation in main for target in targets]
    if "sm_90" in targets:
        jobs += [job("sm_90", operation, dtype="float32") for operation in main]
        jobs += [job("sm_90", operation, LARGE) for operation in main]
        jobs += [job("sm_90", "density_peaks, gauss, parent"), job("sm_90", "density_peaks, d_c given"),
                 job("sm_90", "temporal_density", (32, 196, 768), 32)]              # T = 32: GROUP > 1
    return jobs


class Chip:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)                     # compiled kernels are kept by device

    def get_current_stream(self, device=None):
        return 0


def compile_job(job: dict) -> list[dict]:
    """
    Every kernel that one call launches, compiled as that launch would have it compiled: the launcher runs on tensors
    without memory, and a launch stops once it has its binary.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction
    target, rows, original = GPUTarget(*job["target"]), [], JITFunction.run
    chip = f"sm_{target.arch}" if target.backend == "cuda" else target.arch

    def run(self, *args, grid, warmup, **kwargs):
        row = dict(job, chip=chip, kernel=self.fn.__name__, warps=kwargs.get("num_warps", 4), error=None)
        rows.append(row)
        start = time.perf_counter()
        try:
            built = original(self, *args, grid=grid, warmup=True, **kwargs)
            row |= dict(shared=built.metadata.shared, threads=row["warps"] * target.warp_size, **inspect(built, target))
        except Exception as e:      # noqa: BLE001
            row["error"] = f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
        row["seconds"] = round(time.perf_counter() - start, 1)

    (F, N, C), T = job["shape"], job["T"]
    op = operations(F, N, C, T, keep_count(N, 0.85))[job["operation"]]
    triton.runtime.driver.set_active(Chip(target))
    with mock.patch("kernels.chip", lambda x: chip), mock.patch.object(JITFunction, "run", run):
        op.kernel(*op.inputs("meta", getattr(torch, job["dtype"]), 0), **job["launch"])
    return rows


def inspect(built, target) -> dict:
    """Registers, spills, matrix instructions and 16-byte loads of a compiled kernel; what cannot be read is missing."""
    if target.backend == "hip":
        text = built.asm["amdgcn"]
        said = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        return dict(registers=said("vgpr_count"), stack=said("private_segment_fixed_size"),
                    spills=said("vgpr_spill_count") + said("sgpr_spill_count"),
                    **instructions(text, {"MFMA": r"v_mfma"}, r"(?:global|buffer)_load_(?:dwordx4|b128)"))
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    found = {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        read = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout
        try:
            used, sass = read("--dump-resource-usage"), read("--dump-sass")
        except OSError:
            return found
    if said := re.search(r"REG:(\d+) STACK:(\d+)", used):
        found |= dict(registers=int(said[1]), stack=int(said[2]))
    if re.search(r"\bEXIT\b", sass):
        kinds = {"HMMA": r"\bHMMA\b", "HGMMA": r"\bHGMMA\b", "tcgen05": r"\bUTC\w*MMA\b"}
        found |= dict(spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
                      **instructions(sass, kinds, r"\bLDG(?:STS)?\.[\w.]*(?:128|256)"))
    return found


def instructions(text: str, kinds: dict[str, str], wide: str) -> dict:
    matrix = {name: len(re.findall(pattern, text)) for name, pattern in kinds.items()}
    return dict(matrix={name: n for name, n in matrix.items() if n}, wide_loads=len(re.findall(wide, text)))


def compile_all(jobs: list[dict], processes: int) -> list[dict]:
    """The rows of all jobs, in their order."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_job, jobs) for row in rows]


def show(rows: list[dict]):
    """The report as a Markdown table."""
    heading("What the compiler made of the kernels", "chip", "kernel", "from", "(F, N, C), T", "type", "warps",
            "shared KiB", "registers", "stack bytes", "local loads + stores", "matrix instructions", "16-byte loads")
    read = lambda row, key: row.get(key, "not read")
    for row in rows:
        shape = f"({', '.join(map(str, row['shape']))}), {row['T']}"
        first = (row["chip"], row["kernel"], row["operation"], shape, row["dtype"], row["warps"])
        if row["error"]:
            line(*first, row["error"])
            continue
        matrix = ", ".join(f"{n} {k}" for k, n in row["matrix"].items()) or "none" if "matrix" in row else "not read"
        line(*first, row["shared"] / 1024, *(read(row, key) for key in ("registers", "stack", "spills")), matrix,
             read(row, "wide_loads"))


def parse(argv: list[str]) -> argparse.Namespace:
    about, whole = __doc__.strip().split("\n\n", 1)
    top = argparse.ArgumentParser("python -m tools.compile", description=about, epilog=whole,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--json", action="store_true", help="a list of rows instead of a table")
    top.add_argument("--fresh", action="store_true", help="a cache of its own, so that everything is compiled")
    top.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="chips")
    top.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="side by side")
    top.add_argument("--commit", default="", help="commit to name in the heading where there is no git")
    return top.parse_args(argv)


def main(argv: list[str]):
    args = parse(argv)
    if os.environ.pop("TRITON_INTERPRET", None):        # what is interpreted cannot be compiled; settled at import
        return subprocess.run([sys.executable, "-m", "tools.compile", *argv], check=True)
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder) if args.fresh else mock.patch.dict(os.environ):
            rows = compile_all(report_jobs(args.targets), args.processes)
    if args.json:
        return print(json.dumps(rows))
    banner("cpu", args.commit, "compile")
    show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
