"""
Time the operations of the masking path: shapes -> tables of milliseconds, memory and agreement with fp64.

On a GPU: the Triton kernels beside their roofline (bench/timing.py), the same steps in eager PyTorch and those under
torch.compile in its default mode (bench/operations.py); two sets of inputs take turns. Further tables: the whole path
as a CUDA graph and within torch.compile; visible ids beside the references in fp64; other clusterings (DPC-KNN in fp32,
flash-kmeans with 10 iterations); the mask beside the teacher's forward; launch sizes.

On a CPU: the PyTorch references beside DPC-KNN, and what the compilers make of the kernels (bench/compile.py).

With --teacher, one table alone: visible ids beside the references in fp64, on a teacher's features of embedded clips.
Without a GPU it runs in Triton's interpreter, which needs TRITON_INTERPRET=1.
"""

import itertools
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor

from bench import compile as compile_report
from bench.operations import (
    QUANTILE,
    VARIES_WITH_T,
    Operation,
    chunked,
    clips_per_chunk,
    dpc_knn,
    features,
    operations,
    probe_fp32_out,
)
from bench.timing import is_deterministic, measure_roofline, peak_memory, ratio, roofline_ms, time_interleaved, time_ms
from budgets import group_dynamic
from config import PRESETS
from kernels.bandwidth import bandwidth_ref
from kernels.density_peaks import density_peaks
from masking import MaskConfig, cluster_stm, keep_count, select_tokens_ref, select_tokens_triton
from runtime import num_cpus, select_device
from siglip_files import SigLIPConfig
from teacher import SigLIP
from tools.sprites import render
from tools.tables import banner, print_header, print_row, try_or_message

SHAPES = ((1024, 196, 768), (512, 256, 1152), (256, 729, 1152))     # B/16 at 224, L/16 at 256, So400m/14 at 384
CPU_SHAPE = (64, 196, 768)
LAUNCHES = [                    # of --sweep; two programs fit on a multiprocessor with 4 warps, or 8 of 128 registers
    dict(BLOCK=block, BLOCK_C=block_c, num_warps=warps, num_stages=stages) | (dict(maxnreg=limit) if limit else {})
    for block, block_c, warps, stages, limit in [
        *itertools.product((128,), (64,), (4, 8), (2, 3, 4, 5, 6), (None,)),
        *itertools.product((128,), (32, 64), (8,), (3, 5, 6), (128, 168)),
        *itertools.product((64,), (64, 128), (4, 8), (3, 5), (None,)),
        (128, 128, 8, 3, None), (128, 32, 4, 6, None), (128, 64, 16, 4, None),
    ]
]
NO_GPU = "no GPU here: GPU rows not measured"


@dataclass
class Config:
    """Time the operations of the masking path: Triton kernels on a GPU, PyTorch references on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda if there is a GPU
    # shapes as F N C, three numbers each: frames, tokens of a frame, channels; empty: those of three SigLIP models, on
    # a CPU 64 196 768
    shapes: tuple[tuple[int, int, int], ...] = ()
    frames: tuple[int, ...] = (8, 4, 16)    # frames of a clip (T); F must be a multiple of each; a CPU takes 8
    ratio: float = 0.85         # share of the tokens that the mask hides
    quick: bool = False         # GPU: only the first shape at T = 8, and torch.compile of three operations
    sweep: bool = False         # GPU: also time the two large kernels with many launch sizes
    # folder of a SigLIP, such as the demo's out/demo/seed0/teacher: print only how the ids agree on its features
    teacher: str = ""
    clips: int = 0              # --teacher: number of embedded test clips; 0: 256, on a CPU 4
    rounds: int = 20            # CPU: number of runs, of which the median is printed
    # parts to leave out: the eager or compiled baselines, the tables of agreement, other clusterings (peers) or the
    # teacher, or, on a CPU, the compile report
    skip: tuple[Literal["eager", "compiled", "agreement", "peers", "teacher", "report"], ...] = ()
    commit: str = ""            # commit to print above the tables; empty: ask git


def fill_defaults(cfg: Config) -> Config:
    """Resolve the device, and what depends on it. ValueError if F frames are no clips of T frames on a GPU."""
    device = select_device(cfg.device).type
    shapes = cfg.shapes or (SHAPES if device == "cuda" else (CPU_SHAPE,))
    frames = cfg.frames
    if cfg.quick:
        shapes, frames = shapes[:1], (8,)
    for (F, _, _), T in itertools.product(shapes, frames):
        if device == "cuda" and (T < 2 or F % T):
            raise ValueError(f"--frames must be at least 2 and divide F of each shape, got {T} for F = {F}")
    return replace(cfg, device=device, shapes=shapes, frames=frames)


# ---------------------------------------------------------------------------------------------------------------------
# Tables of a GPU. Tests run them on a CPU, in Triton's interpreter.

def gpu_tables(cfg: Config, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> bool:
    """Print every table of a GPU -> whether every kernel ran and gave the same ids in every way of calling it."""
    sums = ""
    if device == "cuda" and not {"eager", "compiled"} <= set(cfg.skip):
        sums = f"; baselines have {probe_fp32_out()}"
    rate, bandwidth = measure_roofline(device)
    print(f"\nCeilings: {rate / 1e12:.4g} Tflop/s (bf16 product), {bandwidth / 1e12:.4g} TB/s (copy, bytes read plus "
          f"written){sums}", flush=True)
    good = True
    for i, shape in enumerate(cfg.shapes):
        for T in cfg.frames:
            B = shape[0] // T
            chunk = clips_per_chunk(B, T, shape[1])
            if chunk < B:
                print(f"\nF, N = {shape[0]}, {shape[1]}, T = {T}: across frames the baselines take {chunk} of {B} "
                      "clips at a time", flush=True)
        good &= operation_rows(cfg, shape, (rate, bandwidth), device, dtype)
        if i == 0:
            good &= graph_rows(cfg, shape, device, dtype)
        if "agreement" not in cfg.skip:
            agreement_rows(cfg, shape, device, dtype)
        if "peers" not in cfg.skip:
            peer_rows(cfg, shape, device, dtype)
    if "teacher" not in cfg.skip:
        teacher_rows(cfg, device, dtype)
    if cfg.sweep:
        sweep_rows(cfg, cfg.shapes[0], device, dtype)
    return good


def effort(device: str) -> int:
    """The effort of time_ms: 100 ms on a GPU, one run on a CPU."""
    return 100 if device == "cuda" else 1


def operation_rows(cfg: Config, shape: tuple, roofline: tuple[float, float], device: str, dtype: torch.dtype) -> bool:
    """Print the table of one shape, the whole path first -> whether every kernel ran and repeated itself."""
    F, N, C = shape
    K, good = keep_count(N, cfg.ratio), True
    print_header(
        f"F, N, C = {F}, {N}, {C}; K = {K}; {str(dtype)[6:]}", "operation", "T", "kernel ms", "roofline ms",
        "kernel / roofline", "eager ms", "eager / kernel", "compiled ms", "compiled / kernel", "extra MiB: kernel",
        "eager", "compiled", "5 runs, same bits")
    for t, T in enumerate(cfg.frames):
        for op in operations(F, N, C, T, K).values():
            if op.eager and (t == 0 or op.name in VARIES_WITH_T):
                good &= operation_row(cfg, op, T if op.name in VARIES_WITH_T else "", roofline, device, dtype)
    return good


def operation_row(cfg: Config, op: Operation, T: int | str, roofline: tuple[float, float], device: str,
                  dtype: torch.dtype) -> bool:
    """Time an operation and its baselines, print the row -> whether the kernel ran and repeated itself."""
    inputs = [op.inputs(device, dtype, seed) for seed in (0, 1)]
    limit = roofline_ms(op.flops, op.bytes, *roofline)

    def measure(function):
        """-> ms and extra MiB; the ms are a message if the function fails."""
        ms = try_or_message(time_ms, function, inputs, effort(device))
        if isinstance(ms, str) or device != "cuda":
            return ms, None
        return ms, try_or_message(lambda: peak_memory(lambda: function(*inputs[0])) / 2 ** 20)

    ms, extra = measure(op.kernel)
    same = try_or_message(is_deterministic, op.kernel, inputs[0]) if isinstance(ms, float) else None
    baselines = {"eager": (None, None), "compiled": (None, None)}
    for kind in baselines:
        # Compilation takes long: --quick has it only for the path and its two large kernels.
        if kind in cfg.skip or cfg.quick and kind == "compiled" and op.name not in (
                "whole path", "temporal_density", "density_peaks"):
            continue
        torch._dynamo.reset()
        function = op.eager if kind == "eager" else torch.compile(op.eager, dynamic=False)
        baselines[kind] = measure(chunked(function, op.chunk) if op.chunk else function)
    (eager, eager_extra), (compiled, compiled_extra) = baselines.values()
    print_row(op.name, T, ms, limit, ratio(ms, limit), eager, ratio(eager, ms), compiled, ratio(compiled, ms), extra,
              eager_extra, compiled_extra, {True: "yes", False: "NO"}.get(same, same))
    return isinstance(ms, float) and same is True


def graph_rows(cfg: Config, shape: tuple, device: str, dtype: torch.dtype) -> bool:
    """
    Print cluster_stm(check=False) as a CUDA graph and within torch.compile -> whether ids equal those of a plain call.

    Both are called on other inputs than those that they were captured or compiled with.
    """
    (F, N, C), T = shape, cfg.frames[0]
    K, good = keep_count(N, cfg.ratio), True
    first, second = (features(F // T, T, N, C, device, dtype, seed) for seed in (2, 3))
    mask = lambda x: cluster_stm(x, K, check=False)
    expected = mask(second)

    def as_graph():
        x = first.clone()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):                            # kernels must be loaded before a capture
            mask(x)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mask(x)

        def replay(_):
            graph.replay()
            return out
        x.copy_(second)
        return torch.equal(replay(x), expected), time_ms(replay, [(x,)])

    def as_compiled():
        torch._dynamo.reset()
        compiled = torch.compile(mask, fullgraph=True)
        return torch.equal(compiled(second), expected), time_ms(compiled, [(first,), (second,)], effort(device))

    calls = {"CUDA graph, replayed": as_graph} if device == "cuda" else {}
    calls |= {"torch.compile(fullgraph=True)": as_compiled} if "compiled" not in cfg.skip else {}
    print_header(f"cluster_stm(check=False), T = {T}, called otherwise", "call", "ids as in a plain call", "ms")
    for name, call in calls.items():
        result = try_or_message(call)
        same, ms = (result, None) if isinstance(result, str) else result
        print_row(name, {True: "yes", False: "NO"}.get(same, same), ms)
        good &= same is True
    return good


def agreement_rows(cfg: Config, shape: tuple, device: str, dtype: torch.dtype):
    """Print how the kernels' visible ids agree with those of the references in fp64 on the same rounded features."""
    F, N, C = shape
    print_header("Visible ids beside the references in fp64, random features", "clips", "T, N, C", "d_c",
                 "tokens alike, visible or not", "visible ids alike")
    for T in cfg.frames:
        x = features(min(8, max(1, F // T)), T, N, C, device, dtype, 4)
        for d_c, cells in compare_with_fp64(x, MaskConfig(ratio=cfg.ratio)):
            print_row(len(x), f"{T}, {N}, {C}", d_c, *cells)


def compare_with_fp64(x: Tensor, mask: MaskConfig) -> list[tuple[str, list]]:
    """
    Compare cluster_stm on x (B, T, N, C) in the kernels with the references in fp64 -> for each way of choosing d_c its
    name, and the two shares of `agreement` as cells.
    """
    K, options = keep_count(x.shape[2], mask.ratio), (mask.quantile, mask.quantile_time, "exp", "nearest", "density")

    def compare(share_bandwidth):
        ids, ids_ref = [], []
        for clips in x.split(max(1, (1 << 26) // x[0].numel())):
            wide, d_c, d_c_ref = clips.double(), [None, None], [None, None]
            if share_bandwidth:
                d_c = bandwidth_ref(wide.flatten(0, 1), mask.quantile), bandwidth_ref(wide, mask.quantile_time)
                d_c = [bandwidth.float() for bandwidth in d_c]
                d_c_ref = [bandwidth.double() for bandwidth in d_c]
            ids.append(select_tokens_triton(clips, K, *d_c, *options, None))
            ids_ref.append(select_tokens_ref(wide, K, *d_c_ref, *options, None))
        return agreement(torch.cat(ids), torch.cat(ids_ref), x.shape[1] * x.shape[2])

    rows = []
    for share_bandwidth, d_c in ((False, "kernel: its own; reference: the exact quantile"),
                                 (True, "both: the exact quantile")):
        result = try_or_message(compare, share_bandwidth)
        rows.append((d_c, [result, None] if isinstance(result, str) else [f"{100 * s:.3f} %" for s in result]))
    return rows


def agreement(ids: torch.Tensor, ids_ref: torch.Tensor, tokens: int) -> tuple[float, float]:
    """
    Compare visible ids (B, TK) of clips of `tokens` tokens -> the share of the tokens that are visible in both or in
    neither, and the share of ids_ref that are in ids.
    """
    as_mask = lambda ids: torch.zeros(len(ids), tokens, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    a, b = as_mask(ids), as_mask(ids_ref.to(ids.device))
    return (a == b).float().mean().item(), ((a & b).sum() / b.sum()).item()


@torch.no_grad()
def teacher_features(folder: str, clips: int, device: str, dtype: torch.dtype) -> Tensor:
    """Features (B, T, N, C) that the SigLIP in a folder gives of held-out embedded clips, computed in `dtype`."""
    teacher = SigLIP.from_pretrained(folder, dtype, with_tokenizer=False).to(device)
    frames = torch.stack([torch.from_numpy(render(0, "test", i).frames) for i in range(clips)])     # (B, T, H, W, 3)
    video = frames.permute(0, 1, 4, 2, 3).to(device)
    return torch.stack([teacher.encode_image(teacher.normalize(clip, teacher.patch_grid))[0] for clip in video])


def teacher_agreement_rows(cfg: Config):
    """Print how visible ids agree on a trained teacher's features: with the quantile of QUANTILE, and of `sprites`."""
    on_gpu = cfg.device == "cuda"
    require_kernels(cfg.device)
    dtype = torch.bfloat16 if on_gpu else torch.float16         # the interpreter misreads bf16
    x = teacher_features(cfg.teacher, cfg.clips or (256 if on_gpu else 4), cfg.device, dtype)
    print_header(f"Visible ids beside the references in fp64, features of a trained teacher in {str(dtype)[6:]}",
                 "clips", "T, N, C", "hidden, quantile of d_c", "d_c", "tokens alike, visible or not",
                 "visible ids alike")
    for mask in (MaskConfig(ratio=cfg.ratio, quantile=QUANTILE), PRESETS["sprites"].mask):
        for d_c, cells in compare_with_fp64(x, mask):
            shape = ", ".join(map(str, x.shape[1:]))
            print_row(len(x), shape, f"{100 * mask.ratio:g} %, {mask.quantile:g}", d_c, *cells)


def require_kernels(device: str):
    """ValueError if the kernels can run neither on a GPU nor in Triton's interpreter."""
    if device != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError("without a GPU the kernels run in Triton's interpreter: TRITON_INTERPRET must be 1, got "
                         f"{os.environ.get('TRITON_INTERPRET', '')!r}")


def peer_rows(cfg: Config, shape: tuple, device: str, dtype: torch.dtype):
    """Print the times of other methods that cluster the tokens of a frame."""
    F, N, C = shape
    K = keep_count(N, cfg.ratio)
    inputs = [(features(F, 1, N, C, device, dtype, seed).flatten(0, 1),) for seed in (0, 1)]
    ours = try_or_message(time_ms, operations(F, N, C, 1, K)["density_peaks"].kernel, inputs, effort(device))
    print_header(f"Clusterings of F, N, C = {F}, {N}, {C} into K = {K}", "method", "ms", "of density_peaks")
    print_row("density_peaks, with its own d_c", ours, ratio(ours, ours))
    wide = [(x.float(),) for x, in inputs]
    ms = try_or_message(time_ms, lambda x: dpc_knn(x, K, k=min(5, N)), wide, effort(device))
    print_row("DPC-KNN, fp32, eager", ms, ratio(ms, ours))
    del wide
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except ImportError as error:
        print_row("flash-kmeans", f"not installed ({error})", None)
        return
    ms = try_or_message(time_ms, lambda x: batch_kmeans_Euclid(x, K, max_iters=10, tol=-1.0), inputs, effort(device))
    print_row("flash-kmeans, 10 iterations", ms, ratio(ms, ours))


def teacher_rows(cfg: Config, device: str, dtype: torch.dtype, frames: int = 256):
    """Print the times of mask and token targets beside the forward that they wait for: SigLIP-B/16, random weights."""
    torch.manual_seed(0)
    teacher = SigLIP(SigLIPConfig()).to(device, dtype).requires_grad_(False)
    size = teacher.cfg.vision_config.image_size
    pixels = torch.randn(frames, 3, size, size, device=device, dtype=dtype)
    tokens, _ = teacher.encode_image(pixels)                                                # (F, N, C)
    clips = tokens.unflatten(0, (-1, cfg.frames[0]))
    K = keep_count(tokens.shape[1], cfg.ratio)
    forward = try_or_message(time_ms, lambda x: teacher.encode_image(x)[0], [(pixels,)], effort(device))
    print_header(f"Beside the teacher: SigLIP-B/16 at {size}, {frames} frames, {str(dtype)[6:]}", "function", "ms",
                 "of the forward")
    print_row("forward, eager", forward, ratio(forward, forward))
    for name, function, x in (
            ("cluster_stm(check=False)", lambda x: cluster_stm(x, K, check=False), clips),
            ("group_dynamic(check=False)", lambda x: group_dynamic(x, K * x.shape[1], check=False), clips),
            ("SigLIP.token_embeddings", lambda x: teacher.token_embeddings(x, teacher.patch_grid), tokens)):
        ms = try_or_message(time_ms, function, [(x,)], effort(device))
        print_row(name, ms, ratio(ms, forward))


def compile_first(jobs: list[dict]) -> list[dict]:
    """
    Compile jobs of bench/compile.py, which need no target, for this GPU in parallel into Triton's cache -> their rows.

    If this fails, it says so: the kernels are then compiled when they are called.
    """
    target = triton.runtime.driver.active.get_current_target()
    target = (target.backend, target.arch, target.warp_size)
    jobs = [dict(job, target=target) for job in jobs]
    reports = try_or_message(compile_report.compile_all, jobs, min(16, num_cpus()))
    if isinstance(reports, str):
        print(f"not compiled in parallel: {reports}", flush=True)
        return []
    return reports


def sweep_rows(cfg: Config, shape: tuple, device: str, dtype: torch.dtype):
    """Print the times of the two large kernels by launch size. All are compiled first, in parallel."""
    (F, N, C), T = shape, 8
    names, K = ("density_peaks", "temporal_density"), keep_count(N, cfg.ratio)
    reports = compile_first([dict(operation=name, shape=shape, T=T, dtype=str(dtype)[6:], launch=launch)
                             for name in names for launch in LAUNCHES])
    ops = operations(F, N, C, T, K)
    for name in names:
        inputs, rows = [ops[name].inputs(device, dtype, seed) for seed in (0, 1)], []
        for launch in LAUNCHES:
            function = lambda *args, name=name, launch=launch: ops[name].kernel(*args, **launch)
            ms = try_or_message(time_ms, function, inputs)
            rows.append((ms, launch))
            print(f"{name} {launch}: {ms}", flush=True)
        print_header(f"{name}, F, N, C = {F}, {N}, {C}, T = {T}: launches, fastest first", "ms", "launch",
                     "shared KiB", "registers", "stack bytes")
        for ms, launch in sorted(rows, key=lambda row: row[0] if isinstance(row[0], float) else float("inf")):
            report = next((r for r in reports if (r["launch"], r["kernel"]) == (launch, f"{name}_kernel")), {})
            shared = report["shared"] / 1024 if "shared" in report else None
            print_row(ms, ", ".join(f"{k} {v}" for k, v in launch.items()), shared, report.get("registers"),
                      report.get("stack"))


# ---------------------------------------------------------------------------------------------------------------------
# The table of a CPU

def cpu_tables(cfg: Config):
    """Print the times of the references, and of DPC-KNN in turn with density_peaks."""
    (F, N, C), B, T = cfg.shapes[0], 8, 8
    K = keep_count(N, cfg.ratio)
    print_header("On this CPU, fp32", "operation", "shape", "ms", "DPC-KNN ms", "DPC-KNN / ours")
    x = features(F, 1, N, C, "cpu", torch.float32, 0).flatten(0, 1)
    ours, theirs = time_interleaved([lambda: density_peaks(x, K, 0.9), lambda: dpc_knn(x, K, k=min(5, N))], cfg.rounds)
    print_row("density_peaks, d_c given", f"({F}, {N}, {C}), K = {K}", ours, theirs, theirs / ours)
    clips = features(B, T, N, C, "cpu", torch.float32, 1)
    ms, = time_interleaved([lambda: cluster_stm(clips, K)], max(1, cfg.rounds // 4))
    print_row("cluster_stm", f"({B}, {T}, {N}, {C}), K = {K}", ms, None, None)
    ms, = time_interleaved([lambda: group_dynamic(clips, T * K)], cfg.rounds)
    print_row("group_dynamic, plain PyTorch", f"({B}, {T}, {N}, {C}), S = {T * K}", ms, None, None)


def main(cfg: Config):
    """Print the tables of the device. ValueError if a kernel failed or did not repeat itself."""
    cfg = fill_defaults(cfg)
    banner(cfg.device, cfg.commit, "bench")
    if cfg.teacher:
        teacher_agreement_rows(cfg)
        return
    if cfg.device == "cuda":
        if not gpu_tables(cfg):
            raise ValueError("a kernel failed, or did not give the same result again: see the tables")
        return
    cpu_tables(cfg)
    if "report" not in cfg.skip:
        compile_report.main(compile_report.Config(commit=cfg.commit))
    print(f"\n{NO_GPU}")
