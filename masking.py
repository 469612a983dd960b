"""
Which tokens of a clip the student sees: teacher tokens in, the ids of the kept tokens out.

`cluster_stm` is the method (docs/method.md); the others, in masks.py, are what it is compared with. All are rows of
MASKS and share one contract: tokens (B, T, N, C) and keep, the number of tokens kept a frame -> (B, T * keep) int64,
the flat ids t * N + n, ascending, none twice. In the rows of GLOBAL keep is the mean over the frames of a clip, in all
others what each frame keeps. What a mask needs (NEEDS) comes by keyword, is refused if missing and ignored if not
wanted:

    attention (B, T, N)   the teacher's attention over each frame      logits (B, T, N)   of a learned sampler
    text (B, E)           the caption's embedding                       grid (h, w)        N = h * w
    aligned (B, T, N, E)  tokens in the joint space of the text         generator          source of random numbers

    check                 whether values are looked at (a NaN, a d_c <= 0): on a GPU that waits for the device

This file, masks.py and kernels/ import nothing else of the project.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Generator, Tensor

import masks
from kernels import check_bandwidth, check_tokens
from kernels.bandwidth import bandwidth_ref, bandwidth_triton
from kernels.cluster_argmax import cluster_argmax_ref, cluster_argmax_triton
from kernels.density_peaks import check_clusters, density_peaks_cpu, density_peaks_triton
from kernels.temporal_density import temporal_density_ref, temporal_density_triton
from masks import flat, random, random_frame, sent, shape, tube, umt, uniform  # noqa: F401  others take them from here


@dataclass
class MaskConfig:
    """Which tokens the student sees."""
    name: str = "cluster_stm"     # a row of masking.MASKS
    ratio: float = 0.9            # share of each frame's tokens that is hidden (r)
    image_ratio: float = 0.5      # the same of images, where the data has corpora of them (UMT's share)
    quantile: float = 0.02        # cluster_stm: d_c of the clusters, as a quantile of the frame's distances
    quantile_time: float = 0.1    # cluster_stm: d_c of the temporal density, as a quantile across frames
    density: str = "exp"          # cluster_stm: kernel of the clusters' density, exp or gauss
    assign: str = "nearest"       # cluster_stm: a token joins the nearest centre, or its parent's
    pick: str = "density"         # cluster_stm: token kept of a cluster: density, random, centre or lowest

    def __post_init__(self):
        if self.name not in MASKS:
            raise ValueError(f"there is no mask {self.name!r}; there are {', '.join(MASKS)}")
        keep_count(1, self.ratio)
        keep_count(1, self.image_ratio)
        for name, value in (("quantile", self.quantile), ("quantile_time", self.quantile_time)):
            if not 0 < value <= 1:
                raise ValueError(f"mask.{name} is in (0, 1], got {value}")
        for name, value, known in (("density", self.density, ("exp", "gauss")),
                                   ("assign", self.assign, ("nearest", "parent")),
                                   ("pick", self.pick, ("density", "random", "centre", "lowest"))):
            if value not in known:
                raise ValueError(f"mask.{name} is one of {', '.join(known)}, got {value!r}")

    def __call__(self, tokens: Tensor, keep: int, **aux) -> Tensor:
        """The mask so named, as a row of MASKS: tokens (B, T, N, C) -> (B, T * keep)."""
        if self.name != "cluster_stm":
            return MASKS[self.name](tokens, keep, **aux)
        return cluster_stm(tokens, keep, quantile=self.quantile, quantile_time=self.quantile_time,
                           density=self.density, assign=self.assign, pick=self.pick, **aux)

    @property
    def blind(self) -> bool:
        """Whether the mask asks for nothing but the shape of the tokens, the grid among it."""
        return self.needs <= {"generator", "grid"}

    @property
    def drawn(self) -> bool:
        """Whether the mask is drawn anew at each step, so that it cannot be stored with the clip."""
        return "generator" in self.needs or self.name == "cluster_stm" and self.pick == "random"

    @property
    def needs(self) -> frozenset:
        """Its row of NEEDS; of a function that was put into MASKS as it is all may be true."""
        return NEEDS.get(self.name, frozenset({"tokens", "generator"}))


def keep_count(N: int, ratio: float) -> int:
    """K = max(1, floor(N (1 - r) + 1/2)), with r read as the decimal it was written as."""
    if not 0 <= ratio < 1:
        raise ValueError(f"a mask ratio is in [0, 1), got {ratio}")
    return max(1, math.floor(N * (1 - Fraction(str(ratio))) + Fraction(1, 2)))


def sizes(tokens: Tensor, keep: Tensor) -> Tensor:
    """
    How many tokens a kept one stands for: tokens (B, T, N, C), keep (B, S) flat ids -> (B, S) fp32, itself among them.

    Each hidden token is stood for by the kept token of its frame that is nearest (cosine; of those as near, the first).
    Where a frame keeps any, its sizes sum to N.
    """
    B, T, N, C = tokens.shape
    x = torch.nn.functional.normalize(tokens.float().flatten(1, 2), dim=-1)                 # (B, TN, C)
    y = x.gather(1, keep[..., None].expand(-1, -1, C))                                      # (B, S, C)
    own = torch.arange(T * N, device=keep.device)[:, None] // N == keep[:, None] // N       # (B, TN, S)
    near = (x @ y.mT).masked_fill(~own, -torch.inf).argmax(-1)                              # (B, TN)
    near.scatter_(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
    return torch.zeros(keep.shape, device=keep.device).scatter_add(1, near, own.any(-1).float())


def cluster_stm(
    tokens: Tensor, keep: int, *, d_c=None, d_c_time=None, quantile: float = 0.02, quantile_time: float = 0.1,
    density: str = "exp", assign: str = "nearest", pick: str = "density", generator: Generator | None = None,
    check: bool = True, **aux,
) -> Tensor:
    """
    The method: `keep` clusters a frame, and of each cluster the token that recurs most in the other frames.

    tokens (B, T, N, C), d_c a number or (BT,), d_c_time a number or (B,); where not given, quantiles of the distances.
    pick: "density" (the method), or instead a "random" token of the cluster (needs generator), its "centre", or the
    "lowest" temporal density. For single frames the density within the frame stands in for that over time.

    CUDA tensors take the Triton kernels. With check=False the host then waits for nothing, so that the call can be part
    of a CUDA graph; within torch.compile it is one operation, clusterstm::keep.
    """
    if pick not in ("density", "random", "centre", "lowest"):
        raise ValueError(f"cluster_stm picks by density, random, centre or lowest, got {pick!r}")
    for name, value in (("quantile", quantile), ("quantile_time", quantile_time)):
        if not 0 < value <= 1:
            raise ValueError(f"cluster_stm wants a {name} in (0, 1], got {value}")
    x = check_tokens("a mask", tokens, 4, check)
    B, T, N = shape(x, keep, check=False)                                       # its values have been looked at
    check_clusters(keep, N, density, assign)
    d_c = None if d_c is None else check_bandwidth(d_c, B * T, x, check)
    d_c_time = None if d_c_time is None else check_bandwidth(d_c_time, B, x, check)
    noise = uniform((B, T, N), generator, tokens) if pick == "random" else None
    return keep_op(x, keep, d_c, d_c_time, quantile, quantile_time, density, assign, pick, noise)


def keep_triton(x, keep, d_c, d_c_time, quantile, quantile_time, density, assign, pick, noise) -> Tensor:
    """Steps 1 to 3 of docs/method.md in the kernels: x (B, T, N, C) -> (B, T * keep). Five launches."""
    B, T, N, _ = x.shape
    labels, centres, log_rho, inv = density_peaks_triton(x.flatten(0, 1), keep, d_c, density, assign, quantile)
    if pick == "centre":
        return flat(centres.view(B, T, keep), N)
    score = noise if pick == "random" else log_rho
    if pick != "random" and T > 1:
        d_c_time = bandwidth_triton(x, quantile_time) if d_c_time is None else d_c_time
        score = temporal_density_triton(x, d_c_time, inv.view(B, T, N))
    score = (-score if pick == "lowest" else score).view(B * T, N)
    return cluster_argmax_triton(score, labels, keep, frames=T).view(B, T * keep)


def keep_ref(x, keep, d_c, d_c_time, quantile, quantile_time, density, assign, pick, noise) -> Tensor:
    """The same from the references."""
    B, T, N, _ = x.shape
    labels, centres, log_rho = density_peaks_cpu(x.flatten(0, 1), keep, d_c, density, assign, quantile)
    if pick == "centre":
        return flat(centres.view(B, T, keep), N)
    score = noise if pick == "random" else log_rho
    if pick != "random" and T > 1:
        d_c_time = bandwidth_ref(x, quantile_time) if d_c_time is None else d_c_time
        clips = zip(x.split(1), d_c_time.split(1), strict=True)                 # one at a time: it fits the cache
        score = torch.cat([temporal_density_ref(*clip) for clip in clips])
    score = (-score if pick == "lowest" else score).view(B * T, N)
    return flat(cluster_argmax_ref(score, labels, keep).view(B, T, keep), N)


@torch.library.custom_op(
    "clusterstm::keep", mutates_args=(),
    schema="(Tensor x, int keep, Tensor? d_c, Tensor? d_c_time, float quantile, float quantile_time, str density, "
           "str assign, str pick, Tensor? noise) -> Tensor",
)
def keep_op(x, *how):
    return keep_triton(x, *how) if x.is_cuda else keep_ref(x, *how)


@keep_op.register_fake
def _(x, keep, *how):
    return x.new_empty(x.shape[0], x.shape[1] * keep, dtype=torch.int64)


MASKS = {"cluster_stm": cluster_stm, **masks.MASKS}
NEEDS = {"cluster_stm": frozenset({"tokens"}), **masks.NEEDS}
GLOBAL = frozenset(masks.GLOBAL)        # names whose budget is the clip's: a frame's share varies
