"""
Whether the kernels are right on this machine: four shapes -> each kernel beside its reference in fp64, and whether the
masking path gives the same bits again, 300 times, while another stream works. One row a check; it takes a minute.

The references get the rounded features that the kernels get. Without a GPU the kernels run in Triton's interpreter at
small shapes, which needs TRITON_INTERPRET=1; there is then no other stream.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.kernels import agreement, compile_first, require_kernels
from bench.operations import QUANTILE, QUANTILE_TIME
from kernels.bandwidth import bandwidth_ref, bandwidth_triton
from kernels.cluster_argmax import cluster_argmax_ref, cluster_argmax_triton
from kernels.cosine_distance import cosine_distance_ref, cosine_distance_triton
from kernels.density_peaks import density_peaks_triton, log_density
from kernels.temporal_density import temporal_density_ref, temporal_density_triton
from kernels.window_attention import window_attention_ref, window_attention_triton
from masking import cluster_stm, keep_count, select_tokens_ref, select_tokens_triton
from runtime import select_device
from tools.tables import banner, print_header, print_row

GPU_SHAPES = (          # B, T, N, C: three SigLIP models, and the embedded run's teacher
    (16, 8, 196, 768, torch.bfloat16), (4, 4, 256, 1152, torch.bfloat16), (2, 4, 729, 1152, torch.bfloat16),
    (8, 8, 64, 96, torch.float16))
CPU_SHAPES = (          # whole tiles, ragged ones, one token, fp32; the interpreter misreads bf16
    (2, 3, 32, 64, torch.float16), (1, 2, 49, 40, torch.float16), (2, 2, 1, 16, torch.float16),
    (1, 3, 20, 24, torch.float32))
RATIO, WIDE_QUANTILE = 0.85, 0.1        # the quantile of both bandwidths that are compared
REFERENCE_FRAMES = 8                    # frames whose distances are compared: fp64 products are slow


@dataclass
class Config:
    """
    Compare each kernel with its reference in fp64 and repeat the masking path: a minute on a GPU. Without a GPU set
    TRITON_INTERPRET=1.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda if there is a GPU
    repetitions: int = 0        # runs of the masking path that must give the same bits; 0: 300, on a CPU 3
    commit: str = ""            # commit to print above the table; empty: ask git

    def __post_init__(self):
        if self.repetitions < 0:
            raise ValueError(f"--repetitions must be at least 0, got {self.repetitions}")


class Checks:
    """The rows of the table, and the names of the checks that failed."""

    def __init__(self):
        self.count, self.failed = 0, []

    def start(self, title: str):
        print_header(title, "check", "found", "wanted", "right")

    def add(self, name: str, found: str, wanted: str, right: bool):
        self.count += 1
        self.failed += [] if right else [name]
        print_row(name, found, wanted, "yes" if right else "NO")

    def add_error(self, name: str, error: float, limit: float):
        self.add(name, f"off by {error:.1e}", f"at most {limit:.1e}", error <= limit)


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; NaN if one of them has a NaN."""
    return (found.double() - wanted).abs().max().item()


def draw_clips(B: int, T: int, N: int, C: int, dtype: torch.dtype, device: str) -> Tensor:
    """Tokens (B, T, N, C): noise of the clip, of the token, and of the frame."""
    g = torch.Generator(device=device).manual_seed(N)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=g)
    return (draw(B, 1, N, C) + draw(B, T, N, C) + 0.5 * draw(B, T, 1, C)).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The checks of one shape: x (B, T, N, C)

def check_distances(checks: Checks, x: Tensor):
    """cosine_distance, and both bandwidths."""
    frames = x.flatten(0, 1)
    d, few = cosine_distance_triton(frames), frames[:REFERENCE_FRAMES].double()
    # Sums of C products in fp32: errors of 5e-7 have been seen, and the kernels' own tests allow 1e-6 of a length.
    checks.add_error("cosine_distance", largest_error(d[:REFERENCE_FRAMES], cosine_distance_ref(few)), 2e-6)
    symmetric = torch.equal(d, d.mT)
    checks.add("cosine_distance, d_ij = d_ji to the bit", "equal" if symmetric else "different", "equal", symmetric)
    # Within frames the last interval of the search is small. Across frames the kernel takes a sample, of which 500
    # pairs are below the quantile: the quantile's own error is then some per cent. A wrong rank is further off.
    for name, y, limit in (("within frames", frames, 0.005), ("across frames", x, 0.25)):
        found = bandwidth_triton(y, WIDE_QUANTILE).double()
        wanted = torch.cat([bandwidth_ref(part, WIDE_QUANTILE) for part in y.double().split(4)])
        checks.add_error(f"bandwidth {name}, relative", ((found - wanted).abs() / wanted).max().item(), limit)


def check_clusters(checks: Checks, x: Tensor, K: int):
    """density_peaks with a given d_c, and cluster_argmax."""
    frames = x.flatten(0, 1)
    d_c = bandwidth_triton(frames, WIDE_QUANTILE)
    labels, centres, log_rho, *_ = density_peaks_triton(frames, K, d_c, "exp", "nearest")
    few = slice(REFERENCE_FRAMES)
    wanted = log_density(cosine_distance_ref(frames[few].double()), d_c[few].double(), "exp")
    if x.shape[2] > 1:                          # the logarithm of a single token's empty sum is -inf in both
        # d / d_c is up to 2 / d_c, so an error of 1e-6 in d is one of about 1e-5 in the logarithm.
        checks.add_error("density_peaks, log rho", largest_error(log_rho[few], wanted), 1e-4)
    own = torch.equal(labels.gather(1, centres), torch.arange(K, device=x.device).expand(len(frames), K))
    checks.add("density_peaks, centres are in their own clusters", str(own), "True", own)
    best, wanted = cluster_argmax_triton(log_rho, labels, K), cluster_argmax_ref(log_rho, labels, K)
    alike = torch.equal(best, wanted)           # it compares and does not compute: there is no rounding
    checks.add("cluster_argmax", "equal" if alike else "different", "equal", alike)


def check_temporal_density(checks: Checks, x: Tensor):
    """temporal_density with a d_c for each of its two ways to sum: without and with a running maximum."""
    for d_c in (0.3, 1e-3):
        given = torch.full((len(x),), d_c, device=x.device)
        wanted = temporal_density_ref(x[:2].double(), given[:2].double())
        # An error of 3e-6 in a distance, divided by d_c, is added to the error of the sum.
        error = largest_error(temporal_density_triton(x, given)[:2], wanted)
        checks.add_error(f"temporal_density, d_c {d_c:g}", error, 1e-4 + 3e-6 / d_c)


def run_path(x: Tensor, K: int) -> Tensor:
    """Visible ids (B, TK) of the masking path in the kernels: cluster_stm, which calls the references on a CPU."""
    if x.is_cuda:
        return cluster_stm(x, K, quantile=QUANTILE, quantile_time=QUANTILE_TIME, check=False)
    return select_tokens_triton(x, K, None, None, QUANTILE, QUANTILE_TIME, "exp", "nearest", "density", None)


def check_path(checks: Checks, x: Tensor, K: int, repetitions: int):
    """The visible ids beside the references in fp64, then the same path again and again."""
    found = run_path(x, K)
    wanted = select_tokens_ref(x.double(), K, None, None, QUANTILE, QUANTILE_TIME, "exp", "nearest", "density", None)
    share, _ = agreement(found, wanted, x.shape[1] * x.shape[2])
    # Both choose their own d_c, the kernel from a sample. Random tokens have near ties; at worst 99.83 % were alike.
    checks.add("kept ids, of all tokens alike", f"{100 * share:.3f} %", "at least 98 %", share >= 0.98)
    same = count_repeated(x, K, found, repetitions)
    name = "kept ids, the same bits" + " beside another stream" * x.is_cuda
    checks.add(name, f"{same} of {repetitions} times", f"{repetitions} times", same == repetitions)


def count_repeated(x: Tensor, K: int, expected: Tensor, repetitions: int) -> int:
    """How often the path gives the expected ids. On a GPU another stream multiplies meanwhile, two times of three."""
    if not x.is_cuda:
        return sum(torch.equal(run_path(x, K), expected) for _ in range(repetitions))
    other, noise, same = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda"), 0
    for turn in range(repetitions):         # a race gives another answer only now and then
        with torch.cuda.stream(other):
            noise = torch.mm(noise, noise).clamp_(-1, 1) if turn % 3 else noise
        same += torch.equal(run_path(x, K), expected)
    return same


def check_window_attention(checks: Checks, device: str, dtype: torch.dtype):
    """window_attention at the size of SigLIP-B/16, or with small heads on a CPU."""
    F, grid, H, D = (64, (14, 14), 12, 64) if device == "cuda" else (2, (4, 5), 3, 8)
    checks.start(f"F, N, C = {F}, {grid[0] * grid[1]}, {H * D}; {H} heads; {str(dtype)[6:]}")
    torch.manual_seed(0)
    scores, values = (torch.randn(F, grid[0] * grid[1], n, device=device).to(dtype) for n in (H, H * D))
    found = window_attention_triton(scores, values, grid)
    # The result is rounded to the features' dtype: half an ulp of numbers below 4 is 0.008 in bf16.
    checks.add_error("window_attention", largest_error(found, window_attention_ref(
        scores.double(), values.double(), grid)), 0.02)


# ---------------------------------------------------------------------------------------------------------------------

def compile_kernels():
    """Compile what the shapes of a GPU need, in parallel: one after the other takes most of a minute."""
    names = ("cosine_distance", "bandwidth within", "bandwidth across", "density_peaks", "density_peaks, d_c given",
             "temporal_density", "cluster_argmax")
    compile_first([dict(operation=name, shape=(B * T, N, C), T=T, dtype=str(dtype)[6:], launch={})
                   for B, T, N, C, dtype in GPU_SHAPES for name in names])


def main(cfg: Config):
    """Print the checks. ValueError, with their names, if some are not right."""
    device = select_device(cfg.device).type
    on_gpu = device == "cuda"
    require_kernels(device)
    banner(device, cfg.commit, "bench")
    if on_gpu:
        compile_kernels()
    repetitions, checks = cfg.repetitions or (300 if on_gpu else 3), Checks()
    for B, T, N, C, dtype in GPU_SHAPES if on_gpu else CPU_SHAPES:
        x, K = draw_clips(B, T, N, C, dtype, device), keep_count(N, RATIO)
        checks.start(f"B, T, N, C = {B}, {T}, {N}, {C}; K = {K}; {str(dtype)[6:]}")
        check_distances(checks, x)
        check_clusters(checks, x, K)
        check_temporal_density(checks, x)
        check_path(checks, x, K, repetitions)
    check_window_attention(checks, device, torch.bfloat16 if on_gpu else torch.float16)
    if checks.failed:
        raise ValueError(f"{len(checks.failed)} of {checks.count} checks are not right: {', '.join(checks.failed)}")
    print(f"\nall {checks.count} checks right{'' if on_gpu else ', in the interpreter: no GPU here'}")
