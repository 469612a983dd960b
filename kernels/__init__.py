"""
The operations of the masking path, one a file: mathematics and cost, PyTorch reference, Triton kernel, public function.

The public functions take CUDA tensors to the kernel and CPU tensors to the reference. `check` says whether they look at
values: a NaN, an infinity, a d_c that is not positive. On a GPU that look is a host synchronisation, so a training loop
says check=False; wrong shapes, types and devices are refused either way. Unchecked, a NaN spoils what it touches and
nothing else: tokens and clusters stay in range, none is kept twice.

A kernel squares its features in fp32, so on a GPU a token's largest component is 0 or within 1e-12 to 1e12.
"""

import torch
import triton
from torch import Tensor

CACHED = 5 << 20     # bytes of features that the references work on at a time on a CPU: what then stays in its cache


def check_features(name: str, x: Tensor, ndim: int, check: bool = True) -> Tensor:
    """x detached, or a one-line ValueError: `ndim` axes, none of them empty, floating, finite."""
    letters = {3: "(F, N, C)", 4: "(B, T, N, C)", 2: "(F, N)"}[ndim]
    if x.ndim != ndim:
        raise ValueError(f"{name} wants {letters}, got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} wants no empty axis in {letters}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} wants floating-point values, got {x.dtype}")
    x = x.detach()
    if check and not torch.stack(x.aminmax()).isfinite().all():         # one pass, nothing allocated
        raise ValueError(f"{name} wants finite values, got {int((~x.isfinite()).sum())} NaN or infinite of {x.numel()}")
    return x


def check_tokens(name: str, x: Tensor, ndim: int, check: bool = True) -> Tensor:
    """
    x as the operations on it want it, or a one-line ValueError: check_features, and on a GPU what a kernel can read.

    In fp32 on a CPU (fp64 stays fp64: the tests' oracle is the reference in fp64), as it is on a GPU.
    """
    x = check_features(name, x, ndim, check)
    if not x.is_cuda:
        return x if x.dtype == torch.float64 else x.float()
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} wants float32, float16 or bfloat16 on a GPU, got {x.dtype}")
    if x.shape[-2] > 1024:
        raise ValueError(f"{name} wants 1 to 1024 tokens a frame on a GPU, got {x.shape[-2]}")
    if check:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, dtype=torch.float32)
        if not ((largest == 0) | (largest >= 1e-12) & (largest <= 1e12)).all():
            low, high = largest[largest > 0].aminmax()
            raise ValueError(f"{name} wants tokens whose largest component is 0 or within 1e-12 to 1e12 on a GPU, "
                             f"got {low.item():g} to {high.item():g}")
    return x


def check_bandwidth(d_c, count: int, like: Tensor, check: bool = True) -> Tensor:
    """d_c, a positive number or one for each of `count` frames or clips -> (count,), fp64 if `like` is, else fp32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(d_c, Tensor):
        if d_c.ndim and d_c.device != like.device:
            raise ValueError(f"d_c wants to be on {like.device}, as the features are, got {d_c.device}")
        least = d_c.min() if check and d_c.numel() else 1
        d_c = d_c.detach().to(like.device, dtype)
    elif isinstance(d_c, (int, float)):
        # Filled in on the device, not copied to it: a copy is no part of a CUDA graph.
        least, d_c = d_c, torch.full((), d_c, dtype=dtype, device=like.device)
    else:
        d_c = torch.as_tensor(d_c, dtype=dtype)
        least, d_c = d_c.min() if d_c.numel() else 1, d_c.to(like.device)
    if d_c.ndim == 0:
        d_c = d_c.expand(count)
    if d_c.shape != (count,):
        raise ValueError(f"d_c wants one number or ({count},), got {tuple(d_c.shape)}")
    if not least > 0:
        raise ValueError(f"d_c wants positive numbers, got {float(least):g}")
    return d_c.contiguous()


def cached(x: Tensor) -> int:
    """How many of the frames or clips in x (F, ...) a reference takes at a time."""
    return max(1, CACHED // (x[0].numel() * x.element_size())) if not x.is_cuda else len(x)


def chip(x: Tensor) -> str:
    """The chip that x is on, as compilers name it. A CPU stands for sm_90, which the tests compile for."""
    if not x.is_cuda:
        return "sm_90"
    device = torch.cuda.get_device_properties(x.device)
    return device.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{device.major}{device.minor}"


def tiles(x: Tensor, n: int, block: int = 128) -> dict:
    """
    The launch of a kernel that multiplies n tokens of x with n others: blocks of tokens and channels, warps, stages.

    Not measured: the largest blocks whose registers do not spill, by the compilers' reports (docs/bench.md).
    """
    wide, name = x.element_size() == 4, chip(x)         # fp32 is multiplied in fp32, on the plain units
    if wide or name not in ("sm_80", "sm_86", "sm_89", "sm_90"):
        block = min(block, 64)
    return dict(
        BLOCK=min(block, max(16, triton.next_power_of_2(n))),
        BLOCK_C=min(32 if wide else 64, max(16, triton.next_power_of_2(x.shape[-1]))),
        num_warps=8, num_stages=2 if wide or name.startswith("gfx") else 3,
    )


def programs(x: Tensor) -> int:
    """How many programs fill the device that x is on: their registers leave room for one on a multiprocessor."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
