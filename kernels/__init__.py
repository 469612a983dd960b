"""
The operations of the masking path, one per file: mathematics, cost, PyTorch reference, Triton kernel, public function.

A public function runs the Triton kernel on CUDA tensors and the PyTorch reference on CPU tensors. This file holds what
they share: argument checks and launch sizes. The folder imports nothing else of the project, so it can be copied under
any name.

With check=True the functions read the values and raise ValueError for NaN, infinities and a d_c that is not positive.
On a GPU this synchronises with the host, so training passes check=False; shapes, dtypes and devices are always checked.
Without the check, a NaN affects only its own frame (across frames: its own clip); token and cluster indices stay in
range and no token is selected twice.

The kernels square features in fp32, so on a GPU the largest component of a token must be 0 or between 1e-12 and 1e12.

Triton is there for Linux alone. Without it the references run as they do with it, and a kernel raises TritonMissing.
"""

import os

import torch
from torch import Tensor


class TritonMissing(RuntimeError, ValueError):
    """A kernel is needed where Triton is not installed. Also a ValueError, which commands print as one line."""

    def __init__(self):
        super().__init__("tokens on a GPU need Triton, which is not installed: on Linux `pip install triton` installs "
                         "it, elsewhere run on the CPU (--device cpu)")


class MissingTriton:
    """Take the place of the modules triton and triton.language: kernels can be defined with it, but not launched."""
    constexpr = None                # annotates the parameters of kernels
    __version__ = "not installed"

    def jit(self, function=None, **options):
        """Decorate a kernel, as triton.jit does with or without options."""
        return self if function else self.jit

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise TritonMissing

    def __getitem__(self, grid):
        raise TritonMissing


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":      # a Triton that is there, but broken
        raise
    triton = tl = MissingTriton()

# Products and sums are fused in every version of Triton: 3.10 no longer does that by default, and 3.9 warns of it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

CPU_CHUNK_BYTES = 5 << 20       # the references process this many bytes of features at a time: they then stay in cache
AXES = {3: "(F, N, C)", 4: "(B, T, N, C)"}


def check_features(name: str, x: Tensor, ndim: int, check: bool = True) -> Tensor:
    """Return x detached. Raise ValueError unless it has `ndim` axes, none empty, and floating-point, finite values."""
    if x.ndim != ndim:
        raise ValueError(f"{name}: tokens must be {AXES[ndim]}, got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name}: tokens {AXES[ndim]} must have no empty axis, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: tokens must be floating-point, got {x.dtype}")
    x = x.detach()
    if check and not torch.stack(x.aminmax()).isfinite().all():         # one pass, no allocation
        count = int((~x.isfinite()).sum())
        raise ValueError(f"{name}: tokens must be finite, got {count} NaN or infinite of {x.numel()}")
    return x


def check_tokens(name: str, x: Tensor, ndim: int, check: bool = True) -> Tensor:
    """
    Return x as the kernels or references take it. Raise ValueError as check_features does, or if no kernel can read x,
    and TritonMissing if x is on a GPU and there is no Triton.

    On a GPU x keeps its dtype. On a CPU it becomes fp32, but fp64 stays fp64: the tests use the references in fp64.
    """
    if x.is_cuda and isinstance(triton, MissingTriton):
        raise TritonMissing
    x = check_features(name, x, ndim, check)
    if not x.is_cuda:
        return x if x.dtype == torch.float64 else x.float()
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: tokens on a GPU must be float32, float16 or bfloat16, got {x.dtype}")
    if x.shape[-2] > 1024:
        raise ValueError(f"{name}: a frame on a GPU must have 1 to 1024 tokens, got {x.shape[-2]}")
    if check:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, dtype=torch.float32)
        if not ((largest == 0) | (largest >= 1e-12) & (largest <= 1e12)).all():
            low, high = largest[largest > 0].aminmax()
            raise ValueError(f"{name}: the largest component of a token on a GPU must be 0 or within 1e-12 to 1e12, "
                             f"got {low.item():g} to {high.item():g}")
    return x


def check_bandwidth(d_c, count: int, like: Tensor, check: bool = True) -> Tensor:
    """Return d_c, one number or one per frame or clip, as (count,) beside `like`; fp64 if `like` is fp64, else fp32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(d_c, Tensor):
        if d_c.ndim and d_c.device != like.device:
            raise ValueError(f"d_c must be on {like.device} like the tokens, got {d_c.device}")
        smallest = d_c.min() if check and d_c.numel() else 1
        d_c = d_c.detach().to(like.device, dtype)
    elif isinstance(d_c, (int, float)):
        # torch.full runs on the device. A copy from the host could not be part of a CUDA graph.
        smallest, d_c = d_c, torch.full((), d_c, dtype=dtype, device=like.device)
    else:
        d_c = torch.as_tensor(d_c, dtype=dtype)
        smallest, d_c = d_c.min() if d_c.numel() else 1, d_c.to(like.device)
    if d_c.ndim == 0:
        d_c = d_c.expand(count)
    if d_c.shape != (count,):
        raise ValueError(f"d_c must be one number or ({count},), got {tuple(d_c.shape)}")
    if not smallest > 0:
        raise ValueError(f"d_c must be positive, got {float(smallest):g}")
    return d_c.contiguous()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move x to a device. From CPU to GPU, pin its memory and copy without blocking: the host does not wait."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def frames_per_chunk(x: Tensor) -> int:
    """Return how many frames or clips of x (F, ...) a reference processes at a time: on a GPU all of them."""
    return max(1, CPU_CHUNK_BYTES // (x[0].numel() * x.element_size())) if not x.is_cuda else len(x)


def target_arch(x: Tensor) -> str:
    """Return the compiler's name of the device of x, such as "sm_90" or "gfx942". A CPU counts as "sm_90"."""
    if not x.is_cuda:
        return "sm_90"
    device = torch.cuda.get_device_properties(x.device)
    return device.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{device.major}{device.minor}"


def launch_config(x: Tensor, n: int, large_on: tuple[str, ...] = ("sm_80", "sm_86", "sm_89", "sm_90")) -> dict:
    """
    Choose tile sizes, warps and stages of a kernel that multiplies n tokens of x (..., C) with n others.

    By the reports in docs/bench.md these are the largest tiles that spill few or no registers: 128 x 128 in half
    precision on the devices of `large_on`, otherwise 64 x 64. One program fills the registers of a multiprocessor, so
    nothing else hides the time that a load takes. On Hopper and Blackwell, whose shared memory has room for them, five
    stages keep four loads of a product in flight. With three, an H100 took 1,100 cycles for a step of 64 channels of a
    tile, of which its matrix units need 512 (docs/log.md).
    """
    is_fp32, arch = x.element_size() == 4, target_arch(x)       # fp32 is multiplied in fp32, without matrix units
    block = 128 if arch in large_on and not is_fp32 else 64
    stages = 2 if is_fp32 or arch.startswith("gfx") else 5 if arch in ("sm_90", "sm_100") else 3
    return dict(
        BLOCK=min(block, max(16, triton.next_power_of_2(n))),
        BLOCK_C=min(32 if is_fp32 else 64, max(16, triton.next_power_of_2(x.shape[-1]))), num_warps=8,
        num_stages=stages)


def num_programs(x: Tensor) -> int:
    """Return how many programs fill the device of x: their registers leave room for one per multiprocessor."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
