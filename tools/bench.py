"""
Times of the masking path, of a training step and of reading videos, and the memory that annotations take.

    python -m tools.bench kernels                         # every operation, shape and clip length; needs a GPU
    python -m tools.bench kernels --quick --sweep         # the first shape at T = 8, then launch sizes against time
    python -m tools.bench kernels --device cpu            # the references on a CPU, and tools/compile.py's report
    python -m tools.bench step                            # a pretraining step and its parts (tools/bench_step.py)
    python -m tools.bench data --folder FOLDER            # clips/s a core beside torchcodec and decord (bench_data.py)
    python -m tools.bench rows --rows 2000000 --workers 8  # what loader processes hold of a large annotation file

Time. On a GPU triton.testing.do_bench: CUDA events, the L2 cache overwritten before each run, two sets of inputs in
turn, the median. On a CPU the median of a host clock, what is compared running in turn.

Floor. The larger of flops / the rate of an 8192^3 bf16 product and bytes / the bandwidth of a 2 GiB copy, both measured
in the same run. Flops: 2FN^2C within frames, 2BT(T-1)N^2C across, no credit for symmetry or padding; 2BS^2C for a
bandwidth across frames, from its sample of S tokens. Bytes: each input read once, each output written once.

Baselines, written here. "Eager" has the references' steps on features scaled to unit length and rounded to bf16, which
is cheaper than to scale each product, multiplied with torch.bmm(out_dtype=float32): matrix units, fp32 sums, nothing
rounded after them. "Compiled" is torch.compile of the same, in its default mode. Where distances across frames pass
2 GiB both take some clips at a time. DPC-KNN is TCFormer's formulation in fp32; flash-kmeans has 10 iterations.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
import torch.nn.functional as nn
import triton
from torch import Tensor

from kernels.bandwidth import bandwidth_ref, bandwidth_triton, rank, sample
from kernels.cluster_argmax import cluster_argmax_ref, cluster_argmax_triton
from kernels.cosine_distance import cosine_distance_triton
from kernels.density_peaks import density_peaks, density_peaks_triton, log_density, nearest, order
from kernels.temporal_density import temporal_density_triton
from kernels.window_attention import window_attention_ref, window_attention_triton
from masking import cluster_stm, flat, keep_count, keep_ref

SHAPES = ["1024,196,768", "512,256,1152", "256,729,1152"]       # F, N, C: B/16 at 224, L/16 at 256, So400m/14 at 384
QUANTILE, QUANTILE_TIME = 0.02, 0.1                             # cluster_stm's own
CHUNK = 2 << 30                                                 # bytes of distances a baseline holds at a time
LAUNCHES = [                                                    # of --sweep; registers limit large tiles on 8 warps
    dict(BLOCK=b, BLOCK_C=c, num_warps=w, num_stages=s) | (dict(maxnreg=r) if r else {})
    for b, c, w, s, r in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (None, 128, 168))
    if r is None or (b, w) == (128, 8)
]
NO_GPU = "no GPU here: GPU rows not measured"

# ---------------------------------------------------------------------------------------------------------------------
# Tables


def line(*cells):
    """One row of a Markdown table, at once."""
    text = (f"{c:.3g}" if isinstance(c, float) and c < 100 else f"{c:.0f}" if isinstance(c, float) else
            "" if c is None else str(c) for c in cells)
    print("| " + " | ".join(text) + " |", flush=True)


def heading(title: str, *columns: str):
    print(f"\n**{title}**\n", flush=True)
    line(*columns)
    line(*["---"] * len(columns))


def ratio(a, b):
    """a / b where both were measured."""
    return a / b if isinstance(a, float) and isinstance(b, float) else None


def attempt(run: Callable, *args):
    """What run gives, or the first line of why it failed: one configuration's end is not the table's."""
    try:
        return run(*args)
    except Exception as e:      # noqa: BLE001
        return f"failed: {type(e).__name__}: {next(iter(str(e).splitlines()), '')[:90]}".replace("|", "/")


def current_commit() -> str:
    """Of the code; the documents may be in the middle of being written."""
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)docs")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def banner(device: str, commit: str, tool: str = "bench"):
    commit = commit or current_commit()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}, commit {commit}, "
          f"`python -m tools.{tool} {' '.join(sys.argv[1:])}`", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines and peers

fp32_out = True         # whether torch.bmm(out_dtype=) and its compilation work here; see `probe`


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (F, n, C) times b (F, C, m) -> fp32, summed in fp32. On a CPU the same numbers, multiplied as fp32."""
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32) if fp32_out and a.dtype != torch.float32 else (a @ b).float()


def eager_unit(x: Tensor) -> Tensor:
    return nn.normalize(x.float(), dim=-1).to(x.dtype)


def eager_distance(x: Tensor) -> Tensor:
    """x (F, N, C) -> (F, N, N) fp32."""
    u = eager_unit(x)
    d = (1 - product(u, u.mT)).clamp_(0, 2)
    d.diagonal(dim1=1, dim2=2).zero_()
    return d


def pick_rank(d: Tensor, k: int) -> Tensor:
    return d.kthvalue(k, dim=-1).values.clamp_min(1e-6)


def within(d: Tensor, k: int) -> Tensor:
    """d (F, N, N) -> (F,), the k-th smallest distance of different tokens."""
    i, j = torch.triu_indices(d.shape[1], d.shape[1], 1, device=d.device)
    return pick_rank(d[:, i, j], k)


def eager_bandwidth(x: Tensor, k: int) -> Tensor:
    """x (F, N, C) or (B, T, N, C) -> the k-th smallest distance within a frame, or across the frames of a clip."""
    if x.ndim == 3:
        return within(eager_distance(x), k)
    t, s = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    u = eager_unit(x)
    d = (1 - product(u[:, t].flatten(0, 1), u[:, s].flatten(0, 1).mT)).clamp_(0, 2)
    return pick_rank(d.view(len(x), -1), k)


def eager_density_peaks(x: Tensor, K: int, d_c: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of density_peaks_ref, "exp" and "nearest"; d_c None is the k-th smallest distance."""
    d = eager_distance(x)
    log_rho = log_density(d, within(d, k) if d_c is None else d_c, "exp")
    by_density = order(log_rho)
    place = by_density.argsort(1)
    delta = d.masked_fill(place[:, None, :] >= place[:, :, None], torch.inf).amin(-1)
    peak = by_density[:, :1]
    delta = delta.scatter(1, peak, d.amax(-1).gather(1, peak))
    centres = order(log_rho + delta.log())[:, :K].sort(1).values
    return nearest(centres, d), centres, log_rho


def eager_temporal_density(x: Tensor, d_c: Tensor) -> Tensor:
    """The steps of temporal_density_ref, in place."""
    B, T, N, _ = x.shape
    u = eager_unit(x)
    keys, tau = u.flatten(1, 2).mT, []
    for t in range(T):
        logits = product(u[:, t], keys).sub_(1).clamp_(-2, 0).div_(d_c[:, None, None])      # (B, N, TN)
        logits[:, :, t * N:(t + 1) * N] = -torch.inf
        tau.append(logits.logsumexp(-1))
    return torch.stack(tau, 1)


def eager_keep(x: Tensor, K: int, k: int, k_time: int) -> Tensor:
    """The whole path: x (B, T, N, C) -> kept ids (B, TK)."""
    B, T, N, _ = x.shape
    labels, _, _ = eager_density_peaks(x.flatten(0, 1), K, None, k)
    tau = eager_temporal_density(x, eager_bandwidth(x, k_time))
    return flat(cluster_argmax_ref(tau.view(B * T, N), labels, K).view(B, T, K), N)


def chunk(B: int, T: int, N: int) -> int:
    """How many of B clips a baseline takes at a time: a divisor of B, their distances across frames within CHUNK."""
    most = max(1, CHUNK // (2 * N * N * T * max(1, T - 1)))
    return max(n for n in range(1, B + 1) if B % n == 0 and n <= most)


def in_parts(run: Callable, size: int) -> Callable:
    """run(x, *more tensors) on `size` clips at a time."""
    return lambda *args: torch.cat([run(*part) for part in zip(*(a.split(size) for a in args), strict=True)])


def dpc_knn(x: Tensor, K: int, k: int = 5, noise: float = 1e-6) -> tuple[Tensor, Tensor]:
    """
    Density peaks over the k nearest neighbours, as TCFormer (Zeng et al., CVPR 2022) states it: x (F, N, C) -> labels
    (F, N), centres (F, K) by falling score. A token is its own first neighbour; noise parts equal densities.
    """
    F, N, C = x.shape
    d = torch.cdist(x, x) / C ** 0.5                                                        # (F, N, N)
    rho = (-d.topk(k, dim=-1, largest=False).values.square().mean(-1)).exp()                # (F, N)
    rho = rho + noise * torch.rand_like(rho)
    denser = rho[:, None, :] > rho[:, :, None]
    delta = torch.where(denser, d, d.flatten(1).amax(1)[:, None, None]).amin(-1)
    centres = (rho * delta).topk(K, dim=-1).indices
    labels = d.gather(1, centres[:, :, None].expand(F, K, N)).argmin(1)
    return labels.scatter(1, centres, torch.arange(K, device=x.device).expand(F, K)), centres


def probe() -> str:
    """Whether the baselines' product can be had with fp32 output, eager and compiled, in this version of torch."""
    global fp32_out
    a = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16)
    run = lambda a: torch.bmm(a, a.mT, out_dtype=torch.float32).tanh()
    found = attempt(lambda: torch.allclose(torch.compile(run)(a), run(a), atol=1e-3))
    fp32_out = found is True
    return "fp32 sums, not rounded" if fp32_out else f"fp32 sums rounded to bf16 (bmm with out_dtype {found})"


# ---------------------------------------------------------------------------------------------------------------------
# Operations and floors

@dataclass
class Operation:
    """What is timed and compiled. `inputs` draws what `kernel` and `eager` take, from (device, dtype, seed)."""
    name: str
    flops: float
    bytes: float
    inputs: Callable
    kernel: Callable
    eager: Callable | None = None
    part: int = 0           # clips that `eager` takes at a time, 0 for all


def features(B: int, T: int, N: int, C: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random tokens (B, T, N, C), half of each the same in all frames of a clip."""
    torch.manual_seed(seed)
    draw = lambda frames: torch.randn(B, frames, N, C, device=device, dtype=dtype)
    return draw(1) + draw(T)


def work(F: int, N: int, C: int, T: int, K: int, heads: int = 12, size: int = 2) -> dict[str, tuple[int, int]]:
    """Flops and bytes of each operation on F frames, B = F / T clips, of tokens of `size` bytes a component."""
    B, x = F // T, size * F * N * C
    S = sample(QUANTILE_TIME, T * N)
    frames, across = 2 * F * N * N * C, 2 * B * T * (T - 1) * N * N * C
    found = 8 * F * N + 8 * F * K + 4 * F * N + 4 * F                       # labels, centres, log rho; d_c in or out
    return {
        "whole path": (across + frames, x + 8 * F * K),
        "temporal_density": (across, x + 4 * F * N + 4 * B),
        "bandwidth across": (2 * B * S * S * C, size * B * S * C + 4 * B),
        "density_peaks": (frames, x + found),
        "density_peaks, d_c given": (frames, x + found),
        "bandwidth within": (frames, x + 4 * F),
        "cosine_distance": (frames, x + 4 * F * N * N),
        "cluster_argmax": (0, 12 * F * N + 8 * F * K),
        "window_attention": (18 * F * N * C, size * F * N * (heads + 2 * C)),
    }


def floor_ms(flops: float, nbytes: float, rate: float, bandwidth: float) -> float:
    """Milliseconds at `rate` flops and `bandwidth` bytes a second, the slower of the two."""
    return 1e3 * max(flops / rate, nbytes / bandwidth)


def operations(F: int, N: int, C: int, T: int, K: int) -> dict[str, Operation]:
    """All of them at one shape, those that depend on T first. `how` overrides a launch."""
    B, heads = F // T, next(C // width for width in (72, 64, C) if C % width == 0)          # SigLIP's
    h = max(n for n in range(1, isqrt(N) + 1) if N % n == 0)
    grid = (h, N // h)
    k, k_time = rank(QUANTILE, max(1, N * (N - 1) // 2)), rank(QUANTILE_TIME, max(1, N * N * T * (T - 1) // 2))
    part = chunk(B, T, N)
    clips = lambda device, dtype, seed: (features(B, T, N, C, device, dtype, seed),)
    frames = lambda device, dtype, seed: (clips(device, dtype, seed)[0].flatten(0, 1),)
    given = lambda draw, n: lambda device, *how: (*draw(device, *how), torch.full((n,), 0.9, device=device))

    def scored(device, dtype, seed):
        torch.manual_seed(seed)
        score, place = torch.randn(F, N, device=device), torch.rand(F, N, device=device)
        return score, place.argsort(1) % K                                  # no cluster is empty

    def windows(device, dtype, seed):
        x, = frames(device, dtype, seed)
        return torch.randn(F, N, heads, device=device, dtype=dtype), x

    cost = work(F, N, C, T, K, heads)
    rows = {
        "whole path": (clips, lambda x: cluster_stm(x, K, check=False),
                       lambda x: eager_keep(x, K, k, k_time), part),
        "temporal_density": (given(clips, B), lambda x, d_c, **how: temporal_density_triton(x, d_c, **how),
                             eager_temporal_density),
        "bandwidth across": (clips, lambda x: bandwidth_triton(x, QUANTILE_TIME),
                             lambda x: eager_bandwidth(x, k_time), part),
        "density_peaks": (frames, lambda x, **how: density_peaks_triton(x, K, None, "exp", "nearest", QUANTILE, **how),
                          lambda x: eager_density_peaks(x, K, None, k)),
        "density_peaks, d_c given": (given(frames, F), lambda x, d: density_peaks_triton(x, K, d, "exp", "nearest"),
                                     lambda x, d: eager_density_peaks(x, K, d, 1)),
        "bandwidth within": (frames, lambda x: bandwidth_triton(x, QUANTILE), lambda x: eager_bandwidth(x, k)),
        "cosine_distance": (frames, cosine_distance_triton, eager_distance),
        "cluster_argmax": (scored, lambda score, labels: cluster_argmax_triton(score, labels, K, frames=T),
                           lambda score, labels: cluster_argmax_ref(score, labels, K)),
        "window_attention": (windows, lambda s, v: window_attention_triton(s, v, grid),
                             lambda s, v: window_attention_ref(s, v, grid)),
    }
    listed = {name: Operation(name, *cost[name], *rest) for name, rest in rows.items()}
    listed["density_peaks, gauss, parent"] = Operation(                     # compiled, not timed
        "density_peaks, gauss, parent", 0, 0, frames, lambda x: density_peaks_triton(x, K, None, "gauss", "parent"))
    return listed


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def measure(run: Callable, sets: list[tuple], ms: int = 100) -> float:
    """Milliseconds a run, the median; see the top of the file. On a CPU `ms` is how often it runs."""
    turn = itertools.cycle(sets)
    if any(a.is_cuda for a in sets[0]):
        return triton.testing.do_bench(lambda: run(*next(turn)), warmup=25, rep=ms, return_mode="median")
    return alternate([run], sets[0], ms)[0]


def alternate(runs: list[Callable], args: tuple, rounds: int) -> list[float]:
    """Median milliseconds of each on the host's clock; A B A B ..., so that what disturbs one disturbs all."""
    times = [[] for _ in runs]
    for turn in range(rounds + 1):                                          # the first is a warm-up
        for run, took in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(*args)
            took.extend([1e3 * (time.perf_counter() - start)] * (turn > 0))
    return [statistics.median(took) for took in times]


def extra_memory(run: Callable, args: tuple) -> float | None:
    """MiB that a run takes beside its inputs, at most."""
    if not args[0].is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(*args)
    torch.cuda.synchronize()
    del out
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def same_bits(run: Callable, args: tuple, times: int = 5) -> str:
    """Whether runs on the same input differ in no bit."""
    tensors = lambda out: [out] if isinstance(out, Tensor) else list(out)
    first = [t.clone() for t in tensors(run(*args))]
    again = all(torch.equal(a, b) for _ in range(times - 1) for a, b in zip(first, tensors(run(*args)), strict=True))
    return "yes" if again else "NO"


def agreement(found: Tensor, wanted: Tensor, tokens: int) -> tuple[float, float]:
    """
    Kept ids (B, TK) beside those wanted, of `tokens` a clip -> share of tokens on which the two agree, kept or not
    kept, and share of the wanted ids that were found.
    """
    mask = lambda ids: torch.zeros(len(ids), tokens, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    a, b = mask(found), mask(wanted.to(found.device))
    return (a == b).float().mean().item(), ((a & b).sum() / b.sum()).item()


def ceilings(device: str) -> tuple[float, float]:
    """Flops and bytes a second that a large product and a large copy reach."""
    n, size = (8192, 1 << 30) if device == "cuda" else (256, 1 << 20)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n ** 3 / measure(torch.matmul, [(a, b)], 500 if device == "cuda" else 3) * 1e3
    source = torch.randn(size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    bandwidth = 4 * size / measure(target.copy_, [(source,)], 500 if device == "cuda" else 3) * 1e3
    return rate, bandwidth


# ---------------------------------------------------------------------------------------------------------------------
# Tables of a GPU. On a CPU, in the interpreter, they are tests of this file.

def operation_rows(args, shape: tuple, ceiling: tuple[float, float], device: str, dtype: torch.dtype) -> bool:
    """The table of one shape, whole path first. Returns whether every kernel ran."""
    F, N, C = shape
    K, good, reps = keep_count(N, args.ratio), True, 100 if device == "cuda" else 1
    heading(f"F, N, C = {F}, {N}, {C}; K = {K}; bf16", "operation", "T", "kernel ms", "floor ms", "kernel / floor",
            "eager ms", "eager / kernel", "compiled ms", "compiled / kernel", "extra MiB: kernel", "eager", "compiled",
            "5 runs, same bits")
    for t, T in enumerate(args.frames):
        for op in operations(F, N, C, T, K).values():
            timeless = op.name not in ("whole path", "temporal_density", "bandwidth across")
            if op.eager is None or timeless and t:
                continue
            sets = [op.inputs(device, dtype, seed) for seed in (0, 1)]
            limit = floor_ms(op.flops, op.bytes, *ceiling)
            took = attempt(measure, op.kernel, sets, reps)
            good &= isinstance(took, float)
            ran = isinstance(took, float)
            bits = attempt(same_bits, op.kernel, sets[0]) if ran else None
            good &= bits in ("yes", None)
            extra, other = [attempt(extra_memory, op.kernel, sets[0]) if ran else None], []
            for kind in ("eager", "compiled"):
                few = args.quick and kind == "compiled" and op.name not in (
                    "whole path", "temporal_density", "density_peaks")
                if kind in args.skip or few:
                    other.append(None)
                    extra.append(None)
                    continue
                torch._dynamo.reset()
                run = op.eager if kind == "eager" else torch.compile(op.eager, dynamic=False)
                run = in_parts(run, op.part) if op.part else run
                other.append(attempt(measure, run, sets, reps))
                extra.append(attempt(extra_memory, run, sets[0]) if isinstance(other[-1], float) else None)
            line(op.name, "" if timeless else T, took, limit, ratio(took, limit), other[0], ratio(other[0], took),
                 other[1], ratio(other[1], took), *extra, bits)
            del sets
    return good


def graph_rows(args, shape: tuple, device: str, dtype: torch.dtype) -> bool:
    """cluster_stm(check=False) as a CUDA graph and in torch.compile, beside the plain call, on inputs new to it."""
    F, N, C = shape
    T, K, good = args.frames[0], keep_count(N, args.ratio), True
    first, second = (features(F // T, T, N, C, device, dtype, seed) for seed in (2, 3))
    run = lambda x: cluster_stm(x, K, check=False)
    wanted = run(second)

    def graphed():
        x = first.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                       # kernels are loaded before a capture
            run(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x)

        def replay(new):
            graph.replay()
            return out
        x.copy_(second)
        same = torch.equal(replay(x), wanted)
        return same, measure(replay, [(x,)])

    def compiled():
        torch._dynamo.reset()
        whole = torch.compile(run, fullgraph=True)
        return torch.equal(whole(second), wanted), measure(whole, [(first,), (second,)], 100 if second.is_cuda else 1)

    heading(f"cluster_stm(check=False), T = {T}, called otherwise", "how", "ids as in the plain call", "ms")
    for name, call in (("CUDA graph, replayed", graphed), ("torch.compile(fullgraph=True)", compiled)):
        if call is graphed and device != "cuda" or call is compiled and "compiled" in args.skip:
            continue
        found = attempt(call)
        line(name, *((("no", "yes")[found[0]], found[1]) if isinstance(found, tuple) else (found, None)))
        good &= isinstance(found, tuple) and found[0]
    return good


def load_features(path: str) -> Tensor:
    x = torch.load(path, weights_only=True) if path.endswith(".pt") else torch.from_numpy(np.load(path))
    if x.ndim != 4:
        raise ValueError(f"--features wants tokens (B, T, N, C), got {tuple(x.shape)}")
    return x


def agreement_rows(args, shape: tuple, device: str, dtype: torch.dtype):
    """Kept ids of the kernels beside those of the references in fp64 on the same rounded features."""
    F, N, C = shape
    drawn = [("random", features(min(8, max(1, F // T)), T, N, C, device, dtype, 4)) for T in args.frames]
    if args.features:
        drawn.append((os.path.basename(args.features), load_features(args.features).to(device, dtype)))
    heading("Kept ids beside the references in fp64", "features", "clips", "T, N, C", "d_c",
            "tokens alike, kept or not", "kept ids alike")
    for name, x in drawn:
        B, T, N, C = x.shape
        K, how = keep_count(N, args.ratio), (QUANTILE, QUANTILE_TIME, "exp", "nearest", "density", None)

        def compare(exact, x=x, K=K, how=how):
            found, wanted, each = [], [], max(1, (1 << 26) // x[0].numel())         # clips at a time
            for part in x.split(each):
                wide = part.double()
                d_c = [bandwidth_ref(wide.flatten(0, 1), QUANTILE).float(), bandwidth_ref(wide, QUANTILE_TIME).float()]
                given = {} if exact else dict(d_c=d_c[0], d_c_time=d_c[1])
                found.append(cluster_stm(part, K, check=False, **given))
                wanted.append(keep_ref(wide, K, *([None] * 2 if exact else [d.double() for d in d_c]), *how))
            return agreement(torch.cat(found), torch.cat(wanted), x.shape[1] * x.shape[2])

        for exact, d_c in ((True, "kernel: its own; reference: the exact quantile"), (False, "the same, given")):
            found = attempt(compare, exact)
            line(name, B, f"{T}, {N}, {C}", d_c, *([f"{100 * f:.3f} %" for f in found] if isinstance(found, tuple)
                                                   else (found, None)))


def peer_rows(args, shape: tuple, device: str, dtype: torch.dtype):
    """What else clusters the tokens of a frame."""
    F, N, C = shape
    K, reps = keep_count(N, args.ratio), 100 if device == "cuda" else 1
    sets = [(features(F, 1, N, C, device, dtype, seed).flatten(0, 1),) for seed in (0, 1)]
    ours = attempt(measure, operations(F, N, C, 1, K)["density_peaks"].kernel, sets, reps)
    heading(f"Clusterings of F, N, C = {F}, {N}, {C} into K = {K}", "what", "ms", "of density_peaks")
    line("density_peaks, with its own d_c", ours, ratio(ours, ours))
    wide = [(x.float(),) for x, in sets]
    took = attempt(measure, lambda x: dpc_knn(x, K, k=min(5, N)), wide, reps)
    line("DPC-KNN, fp32, eager", took, ratio(took, ours))
    del wide
    try:
        from flash_kmeans import batch_kmeans_Euclid
    except ImportError as e:
        line("flash-kmeans", f"not installed ({e})", None)
        return
    took = attempt(measure, lambda x: batch_kmeans_Euclid(x, K, max_iters=10, tol=-1.0), sets, reps)
    line("flash-kmeans, 10 iterations", took, ratio(took, ours))


def teacher_rows(args, device: str, dtype: torch.dtype, frames: int = 256):
    """What the mask and the relevance target cost beside the forward they wait for: SigLIP-B/16, random weights."""
    from teacher import SigLIP, SigLIPConfig
    torch.manual_seed(0)
    teacher = SigLIP(SigLIPConfig()).to(device, dtype).requires_grad_(False)
    size, T, reps = teacher.cfg.vision_config.image_size, args.frames[0], 100 if device == "cuda" else 1
    pixels = torch.randn(frames, 3, size, size, device=device, dtype=dtype)
    tokens, _ = teacher.encode_image(pixels)
    clips = tokens.unflatten(0, (-1, T))
    forward = attempt(measure, lambda x: teacher.encode_image(x)[0], [(pixels,)], reps)
    heading(f"Beside the teacher: SigLIP-B/16 at {size}, {frames} frames, {str(dtype)[6:]}", "what", "ms",
            "of the forward")
    line("forward, eager", forward, ratio(forward, forward))
    for name, run, x in (("cluster_stm(check=False)", lambda x: cluster_stm(x, keep_count(x.shape[2], args.ratio),
                                                                            check=False), clips),
                         ("SigLIP.align", lambda x: teacher.align(x, teacher.grid), tokens)):
        took = attempt(measure, run, [(x,)], reps)
        line(name, took, ratio(took, forward))


def sweep_rows(args, shape: tuple, device: str, dtype: torch.dtype):
    """Launches of the two large kernels against time. All compile first, side by side, into Triton's cache."""
    from tools.compile import compile_all
    (F, N, C), T = shape, 8
    K = keep_count(N, args.ratio)
    target = triton.runtime.driver.active.get_current_target()
    jobs = [dict(operation=name, shape=shape, T=T, dtype=str(dtype)[6:], target=(target.backend, target.arch,
                 target.warp_size), launch=how) for name in ("density_peaks", "temporal_density") for how in LAUNCHES]
    built = attempt(compile_all, jobs, min(12, os.cpu_count() or 1))
    if isinstance(built, str):
        print(f"not compiled side by side: {built}", flush=True)
        built = []
    ops = operations(F, N, C, T, K)
    for name in ("density_peaks", "temporal_density"):
        sets, rows = [ops[name].inputs(device, dtype, seed) for seed in (0, 1)], []
        for how in LAUNCHES:
            took = attempt(measure, lambda *a, name=name, how=how: ops[name].kernel(*a, **how), sets)
            report = next((r for r in built if r["launch"] == how and r.get("kernel") == f"{name}_kernel"), {})
            rows.append((took if isinstance(took, float) else float("inf"), took, how, report))
            print(f"{name} {how}: {took}", flush=True)
        heading(f"{name}, F, N, C = {F}, {N}, {C}, T = {T}: launches, fastest first", "ms", "launch", "shared KiB",
                "registers", "stack bytes")
        for _, took, how, report in sorted(rows, key=lambda row: row[0]):
            shared = report["shared"] / 1024 if "shared" in report else None
            line(took, ", ".join(f"{k} {v}" for k, v in how.items()), shared, report.get("registers"),
                 report.get("stack"))


def gpu_tables(args, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> bool:
    """Every table of a GPU. Returns whether every kernel ran and gave the same ids in every way of calling it."""
    sums = "" if device == "cpu" or {"eager", "compiled"} <= set(args.skip) else f"; baselines have {probe()}"
    ceiling = ceilings(device)
    print(f"\nCeilings: {ceiling[0] / 1e12:.4g} Tflop/s (bf16 product), {ceiling[1] / 1e12:.4g} TB/s (copy, bytes read "
          f"plus written){sums}", flush=True)
    good = True
    for i, shape in enumerate(args.shapes):
        for T in args.frames:
            B = shape[0] // T
            part = chunk(B, T, shape[1])
            if part < B:
                print(f"\nF, N = {shape[0]}, {shape[1]}, T = {T}: baselines take {part} of {B} clips at a time across "
                      "frames", flush=True)
        good &= operation_rows(args, shape, ceiling, device, dtype)
        if i == 0:
            good &= graph_rows(args, shape, device, dtype)
        if "agreement" not in args.skip:
            agreement_rows(args, shape, device, dtype)
        if "peers" not in args.skip:
            peer_rows(args, shape, device, dtype)
    if "teacher" not in args.skip:
        teacher_rows(args, device, dtype)
    if args.sweep:
        sweep_rows(args, args.shapes[0], device, dtype)
    return good


def cpu_tables(args):
    """The references, in turn with DPC-KNN."""
    F, N, C = args.shapes[0] if args.shapes_given else (64, 196, 768)
    K, T, B = keep_count(N, args.ratio), 8, 8
    heading("On this CPU, fp32", "operation", "shape", "ms", "DPC-KNN ms", "DPC-KNN / ours")
    x = features(F, 1, N, C, "cpu", torch.float32, 0).flatten(0, 1)
    ours, theirs = alternate([lambda x: density_peaks(x, K, 0.9), lambda x: dpc_knn(x, K, k=min(5, N))], (x,),
                             args.rounds)
    line("density_peaks, d_c given", f"({F}, {N}, {C}), K = {K}", ours, theirs, theirs / ours)
    x = features(B, T, N, C, "cpu", torch.float32, 1)
    took, = alternate([lambda x: cluster_stm(x, K)], (x,), max(1, args.rounds // 4))
    line("cluster_stm", f"({B}, {T}, {N}, {C}), K = {K}", took, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations

def held(kind: str) -> float:
    """Memory of this process in MB: Rss with what it shares, Pss with its part of that, Private_Dirty what it wrote."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(words[1]) for words in map(str.split, f) if words[0].startswith(kind)) / 1024


def readers(rows, workers: int, each: int) -> list[tuple[float, float]]:
    """`workers` processes forked from this one read `each` rows at random, as loaders do -> Private_Dirty, Pss."""
    context = multiprocessing.get_context("fork")
    here, met = context.SimpleQueue(), context.Barrier(workers)

    def read(seed: int):
        for i in np.random.default_rng(seed).integers(len(rows), size=each):
            _ = rows[int(i)].video
        met.wait()                                  # all are there while each is measured
        here.put((held("Private_Dirty:"), held("Pss:")))
        met.wait()

    processes = [context.Process(target=read, args=(seed,)) for seed in range(workers)]
    for process in processes:
        process.start()
    found = [here.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def rows_table(args):
    """The mapped file beside a list of the same rows."""
    import data  # wants av, which timing kernels does not

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.json"
        with open(path, "w") as f:
            f.write("[")
            for i in range(args.rows):
                f.write(",\n" * (i > 0) + json.dumps({"video": f"{i % 1000:03d}/{i:09d}.mp4",
                                                      "caption": f"clip {i}: someone does a thing with another thing"}))
            f.write("]")
        size = os.path.getsize(path) / 2 ** 20
        heading(f"{args.rows} rows, {size:.0f} MB of JSON; {args.workers} processes that read {args.each} each", "rows",
                "s to read", "MB here", "MB of a process", "MB of all together")
        for name, make in (("mapped", lambda: data.write_rows([(path, folder)], folder)),
                           ("list", lambda: data.read_annotations(path, folder, check=False))):
            before, start = held("Rss:"), time.perf_counter()
            rows = make()
            took, here = time.perf_counter() - start, held("Rss:") - before
            found = readers(rows, args.workers, args.each)
            line(name, took, here, max(private for private, _ in found), sum(pss for _, pss in found))
            del rows


# ---------------------------------------------------------------------------------------------------------------------

def parse(argv: list[str]) -> argparse.Namespace:
    from tools import bench_data  # it imports this file

    about, whole = __doc__.strip().split("\n\n", 1)
    top = argparse.ArgumentParser("python -m tools.bench", description=about, epilog=whole,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("kernels", help="time every operation", description="Time every operation.")
    run.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    run.add_argument("--shapes", nargs="+", metavar="F,N,C", help=f"frames, tokens, channels; default {SHAPES}")
    run.add_argument("--frames", nargs="+", type=int, default=[8, 4, 16], metavar="T", help="frames a clip")
    run.add_argument("--ratio", type=float, default=0.85, help="share of tokens hidden")
    run.add_argument("--quick", action="store_true", help="the first shape at T = 8, fewer compiled baselines")
    run.add_argument("--sweep", action="store_true", help="also time the two large kernels under many launches")
    run.add_argument("--features", help="teacher tokens (B, T, N, C), .npy or .pt, to compare kept ids on")
    run.add_argument("--rounds", type=int, default=20, help="on a CPU: runs of each")
    parts = ("eager", "compiled", "agreement", "peers", "teacher", "report")
    run.add_argument("--skip", nargs="+", default=[], choices=parts,
                     help="leave out baselines, tables, or the compile report (which only a CPU prints)")
    run.add_argument("--commit", default="", help="commit to name in the heading where there is no git")
    step = commands.add_parser("step", help="time a pretraining step", description="Time a pretraining step.")
    step.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    step.add_argument("--batch", nargs="+", type=int, metavar="B", help="clips; default 64 and 128, on a CPU 64")
    step.add_argument("--frames", type=int, metavar="T", help="a clip; default the preset's")
    step.add_argument("--size", type=int, help="pixels a side; default the preset's")
    step.add_argument("--ratio", type=float, help="share of tokens hidden; default the preset's")
    step.add_argument("--small", action=argparse.BooleanOptionalAction,
                      help="the embedded run's shapes; default on a CPU")
    step.add_argument("--variants", nargs="+", metavar="NAME", help="of tools/bench_step.py; default the device's")
    step.add_argument("--steps", type=int, help="in turn between two looks at the clock; default 20, on a CPU 2")
    step.add_argument("--rounds", type=int, default=5, help="of these, of which the median counts")
    step.add_argument("--peer", metavar="FOLDER", help="a checkout of OpenGVLab/unmasked_teacher")
    step.add_argument("--profile", type=int, default=0, metavar="ROWS", help="print the dearest operators of a step")
    step.add_argument("--commit", default="", help="commit to name in the heading where there is no git")
    rows = commands.add_parser("rows", help="memory of annotations", description="Memory of annotations.")
    rows.add_argument("--rows", type=int, default=2_000_000, help="of the file that is made up")
    rows.add_argument("--workers", type=int, default=8, help="processes that read them")
    rows.add_argument("--each", type=int, default=100_000, help="rows that a process reads")
    rows.add_argument("--commit", default="", help="commit to name in the heading where there is no git")
    bench_data.parser(commands)
    args = top.parse_args(argv)
    if args.command == "step":
        from tools.bench_step import complete  # wants av, which timing kernels does not
        complete(args, step.error)
    if args.command != "kernels":
        return args
    args.shapes_given = args.shapes is not None
    try:
        args.shapes = [tuple(int(n) for n in s.split(",")) for s in args.shapes or SHAPES]
        args.shapes = [(F, N, C) for F, N, C in args.shapes]
    except ValueError:
        top.error(f"--shapes wants F,N,C, three integers each, got {args.shapes}")
    if args.quick:
        args.shapes, args.frames = args.shapes[:1], [8]
    wrong = [(F, T) for F, _, _ in args.shapes for T in args.frames if T < 2 or F % T]
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wrong and args.device == "cuda":
        top.error(f"F = {wrong[0][0]} frames are no clips of T = {wrong[0][1]}, T at least 2")
    return args


def main(argv: list[str]):
    args = parse(argv)
    if args.command == "rows":
        banner("cpu", args.commit)
        rows_table(args)
        return
    if args.command == "data":
        from tools import bench_data
        banner("cpu", args.commit)
        bench_data.data_tables(args)
        return
    if args.command == "step":
        from tools.bench_step import step_tables
        banner(args.device, args.commit)
        try:
            step_tables(args)
        except ValueError as error:             # of the peer's folder
            raise SystemExit(f"tools.bench: {error}") from None
        return
    banner(args.device, args.commit)
    if args.device == "cuda":
        if not gpu_tables(args):
            raise SystemExit("a kernel failed, or did not repeat itself: see the tables")
        return
    cpu_tables(args)
    if "report" not in args.skip:
        subprocess.run([sys.executable, "-m", "tools.compile", "--commit", args.commit], check=True)
    print(f"\n{NO_GPU}")


if __name__ == "__main__":
    main(sys.argv[1:])
