"""
Token masks: teacher tokens of a clip -> ids of the tokens that the student sees.

`cluster_stm` is the method (docs/method.md §1). The other masks are baselines, written from the definitions in their
papers. All of them are in the dictionary MASKS and share one contract:

    MASKS[name](tokens (B, T, N, C), keep, **aux) -> (B, T * keep) int64

`keep` is the number of tokens kept per frame. The result holds flat ids t * N + n, ascending, without repeats. Masks in
CLIP_BUDGET keep T * keep tokens anywhere in the clip; all others keep exactly `keep` tokens of each frame. Further
inputs (MASK_INPUTS lists them by mask) are keyword arguments. A missing input raises a ValueError; an input that the
mask does not use is ignored.

    attention (B, T, N)     the teacher's attention over each frame
    logits (B, T, N)        the output of a learned sampler
    text (B, E)             caption embeddings
    aligned (B, T, N, E)    tokens in the embedding space of the captions
    grid (h, w)             rows and columns of a frame's tokens, h * w = N
    generator               torch.Generator of the random draws
    check                   False skips the checks of values (finite, d_c > 0). On a GPU they synchronise with the host.

The masks (*: clip budget, r: random), by what they use:

    token grid          random *r   random_frame r   tube r   block3d r
    attention           umt r   umt_global *r   attention_high   attention_low   smaug_style r
    other inputs        adamae *r (logits)   text_guided (text, aligned)
    change over time    dynamic *   flux_group_dynamic *   everest *r   evs *   mgm_style   mgmae_style r
    similarity          dpcknn_centres   fastvid_style (and attention)   scissor_style   tome_style   divprune *
    ablations           density_topk   kmeans   farthest_points     (cluster_stm without one of its parts)

The tokens are those of the teacher, also for papers that use pixels, optical flow or layers of the student instead. A
name ending in _style marks an approximation; its docstring says what is left out. Scores are fp32, and of equal scores
the lower index wins. The masks under "similarity" and "ablations" are plain PyTorch, which synchronises with the GPU.

`select` applies any of them at any budget of a clip. This file, budgets.py and kernels/ import no other file of the
project.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Literal, get_args

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize, one_hot

from budgets import (
    bottomk_stable,
    check_choice,
    check_quantile,
    check_ratio,
    check_total,
    frame_difference,
    group_dynamic,
    gumbel_noise,
    keep_count,
    mask_frames,
    require_generator,
    seeded_uniform,
    to_float32,
    topk_stable,
)
from kernels import check_bandwidth, check_features, check_tokens
from kernels.bandwidth import bandwidth_ref, bandwidth_triton
from kernels.cluster_argmax import cluster_argmax_ref, cluster_argmax_triton
from kernels.cosine_distance import cosine_distance_ref, l2_normalize
from kernels.density_peaks import check_clusters, density_peaks_chunked, density_peaks_triton, log_density
from kernels.temporal_density import temporal_density_ref, temporal_density_triton

Density = Literal["exp", "gauss"]
Assign = Literal["nearest", "parent"]
Pick = Literal["density", "random", "centre", "lowest"]
Features = Literal["teacher", "teacher_embedding", "student_embedding"]


@dataclass(frozen=True)
class MaskConfig:
    """The mask: which tokens the student sees."""
    name: str = "cluster_stm"       # mask, such as cluster_stm, random_frame or umt; an unknown name lists all
    ratio: float = 0.9              # share of a video frame's tokens that is hidden, unless tokens is given
    # tokens kept of a clip, the largest number first: each micro-batch draws one; empty: ratio decides
    tokens: tuple[int, ...] = ()
    # tokens of a clip that the teacher sees, those that change most (FluxViT's double mask); the student sees some of
    # them, as the mask chooses in each group of frames; ratio is then of these; 0: the teacher sees all
    teacher_tokens: int = 0
    # what the mask compares: the teacher's tokens, the teacher's patch embedding, or the student's patch embedding
    features: Features = "teacher"
    image_ratio: float = 0.5        # share of an image's tokens that is hidden; 0.5 is UMT's value
    # cluster_stm: clustering bandwidth d_c, as a quantile of the frame's distances; 0.02: the classical rule of density
    # peaks (Rodriguez & Laio, Science 2014); docs/method.md says why ours differs
    quantile: float = 0.95
    quantile_time: float = 0.1      # cluster_stm: temporal bandwidth, as a quantile of the distances between frames
    density: Density = "exp"        # cluster_stm: kernel of the clustering density
    assign: Assign = "nearest"      # cluster_stm: a token joins its nearest centre, or that of its nearest denser token
    # cluster_stm: token kept per cluster: of highest (density) or lowest temporal density, a random one, or the centre
    pick: Pick = "density"

    def __post_init__(self):
        check_choice("mask.name", self.name, MASKS)
        for name in ("ratio", "image_ratio"):
            check_ratio(f"mask.{name}", getattr(self, name))
        for name in ("quantile", "quantile_time"):
            check_quantile(f"mask.{name}", getattr(self, name))
        for name, choices in (("density", Density), ("assign", Assign), ("pick", Pick), ("features", Features)):
            check_choice(f"mask.{name}", getattr(self, name), get_args(choices))
        if list(self.tokens) != sorted({*self.tokens}, reverse=True) or min(self.tokens, default=1) < 1:
            raise ValueError("mask.tokens must be different numbers of at least 1, the largest first, got "
                             f"{self.tokens}")
        if self.features != "teacher" and (of_teacher := self.inputs - {"tokens", "grid", "generator"}):
            raise ValueError(f"mask.features must be teacher for mask {self.name}, which uses the teacher's "
                             f"{', '.join(sorted(of_teacher))}, got {self.features!r}")
        S1, by_place = self.teacher_tokens, "grid" in self.inputs or self.name in BY_PLACE
        if S1 < 0:
            raise ValueError(f"mask.teacher_tokens must be at least 0, got {S1}")
        for name, rule, holds in (
                ("features", "teacher", self.features == "teacher"),
                ("name", "a mask that uses no places in a frame", not by_place),
                ("tokens", f"at most {S1}", max(self.tokens, default=0) <= S1)):
            if S1 and not holds:
                raise ValueError(f"mask.{name} must be {rule} with mask.teacher_tokens {S1}, got {getattr(self, name)}")

    def __call__(self, tokens: Tensor, keep: int, **aux) -> Tensor:
        """Apply the mask: tokens (B, T, N, C) -> (B, T * keep), as every function in MASKS."""
        if self.name != "cluster_stm":
            return MASKS[self.name](tokens, keep, **aux)
        return cluster_stm(tokens, keep, quantile=self.quantile, quantile_time=self.quantile_time,
                           density=self.density, assign=self.assign, pick=self.pick, **aux)

    def total(self, T: int, N: int) -> int:
        """Return S, the number of tokens that the student sees of a clip: the largest budget, or by the ratio."""
        T, N = (1, self.teacher_tokens) if self.teacher_tokens else (T, N)
        return self.tokens[0] if self.tokens else T * keep_count(N, self.ratio)

    @property
    def shape_only(self) -> bool:
        """True if the mask uses only the shape of the tokens, their grid and random numbers."""
        return self.inputs <= {"generator", "grid"}

    @property
    def stochastic(self) -> bool:
        """True if the mask is drawn again at each step, so that it cannot be cached per clip."""
        return "generator" in self.inputs or self.name == "cluster_stm" and self.pick == "random"

    @property
    def inputs(self) -> frozenset:
        """Inputs of the mask. One that is in MASKS without register_mask is assumed to need tokens and a generator."""
        return MASK_INPUTS.get(self.name, frozenset({"tokens", "generator"}))


# ClusterSTM.

def cluster_stm(
    tokens: Tensor, keep: int, *, d_c=None, d_c_time=None, quantile: float = 0.95, quantile_time: float = 0.1,
    density: Density = "exp", assign: Assign = "nearest", pick: Pick = "density", generator: Generator | None = None,
    check: bool = True, **aux,
) -> Tensor:
    """
    Cluster each frame into `keep` clusters and keep, of each, the token that recurs most in the other frames.

    tokens (B, T, N, C) -> (B, T * keep). Bandwidths: d_c is a number or (B * T,), d_c_time a number or (B,); if None,
    they are quantiles of the distances. `pick` is "density" (the method: the largest temporal density) or, for
    comparison, a "random" token of the cluster (needs generator), its "centre", or the "lowest" temporal density. For
    T = 1 the density within the frame takes the place of the temporal density.

    CUDA tensors use the Triton kernels. With check=False nothing synchronises with the host, so that a CUDA graph can
    capture the call. Under torch.compile it is one operation, clusterstm::keep.
    """
    check_choice("pick", pick, get_args(Pick))
    check_quantile("quantile", quantile)
    check_quantile("quantile_time", quantile_time)
    x = check_tokens("cluster_stm", tokens, 4, check)
    B, T, N = token_shape(x, keep, check=False)                                 # check_tokens has checked the values
    check_clusters(keep, N, density, assign)
    d_c = None if d_c is None else check_bandwidth(d_c, B * T, x, check)
    d_c_time = None if d_c_time is None else check_bandwidth(d_c_time, B, x, check)
    noise = seeded_uniform((B, T, N), generator, tokens.device) if pick == "random" else None
    return select_tokens_op(x, keep, d_c, d_c_time, quantile, quantile_time, density, assign, pick, noise)


def select_tokens_triton(x, keep, d_c, d_c_time, quantile, quantile_time, density, assign, pick, noise) -> Tensor:
    """Steps 1 to 3 of docs/method.md §1 in Triton: x (B, T, N, C) -> (B, T * keep). Five kernel launches."""
    B, T, N, _ = x.shape
    labels, centres, log_rho, inv_norm = density_peaks_triton(x.flatten(0, 1), keep, d_c, density, assign, quantile)
    if pick == "centre":
        return flat_ids(centres.view(B, T, keep), N)
    score = noise if pick == "random" else log_rho
    if pick != "random" and T > 1:
        d_c_time = bandwidth_triton(x, quantile_time) if d_c_time is None else d_c_time
        score = temporal_density_triton(x, d_c_time, inv_norm.view(B, T, N))
    score = (-score if pick == "lowest" else score).view(B * T, N)
    return cluster_argmax_triton(score, labels, keep, frames=T).view(B, T * keep)


def select_tokens_ref(x, keep, d_c, d_c_time, quantile, quantile_time, density, assign, pick, noise) -> Tensor:
    """Do the same steps with the PyTorch references of the kernels."""
    B, T, N, _ = x.shape
    labels, centres, log_rho = density_peaks_chunked(x.flatten(0, 1), keep, d_c, density, assign, quantile)
    if pick == "centre":
        return flat_ids(centres.view(B, T, keep), N)
    score = noise if pick == "random" else log_rho
    if pick != "random" and T > 1:
        d_c_time = bandwidth_ref(x, quantile_time) if d_c_time is None else d_c_time
        clips = zip(x.split(1), d_c_time.split(1), strict=True)                 # one clip at a time fits the CPU cache
        score = torch.cat([temporal_density_ref(*clip) for clip in clips])
    score = (-score if pick == "lowest" else score).view(B * T, N)
    return flat_ids(cluster_argmax_ref(score, labels, keep).view(B, T, keep), N)


@torch.library.custom_op(
    "clusterstm::keep", mutates_args=(),
    schema="(Tensor x, int keep, Tensor? d_c, Tensor? d_c_time, float quantile, float quantile_time, str density, "
           "str assign, str pick, Tensor? noise) -> Tensor",
)
def select_tokens_op(x, *args):
    return select_tokens_triton(x, *args) if x.is_cuda else select_tokens_ref(x, *args)


@select_tokens_op.register_fake
def _(x, keep, *args):
    return x.new_empty(x.shape[0], x.shape[1] * keep, dtype=torch.int64)


# The contract: registration, checks of the inputs, flat ids, random draws.

MASKS = {"cluster_stm": cluster_stm}                        # name -> mask(tokens, keep, **aux)
MASK_INPUTS = {"cluster_stm": frozenset({"tokens"})}        # name -> its inputs; "tokens" if it reads their values
BY_PLACE = "tube", "dynamic", "flux_group_dynamic", "everest", "evs"    # they compare a place in one frame and another
CLIP_BUDGET = set()                                         # names of masks that keep T * keep tokens of the clip
INPUT_SHAPES = {"attention": "(B, T, N)", "logits": "(B, T, N)", "text": "(B, E)", "aligned": "(B, T, N, E)",
                "grid": "(h, w)"}


def register_mask(*inputs: str, clip_budget: bool = False):
    """
    Decorate a function of tokens x (B, T, N, C) and K, tokens kept per frame, or, with clip_budget, of x and S, tokens
    kept of the clip, to register it in MASKS under its name.

    `inputs` names what it uses: "tokens" if it reads their values (in fp32) and not only their shape, and any of
    INPUT_SHAPES and "generator", which it gets as keyword arguments. It returns, in any order and without repeats, the
    kept positions (B, T, K) in [0, N) or, with clip_budget, (B, S) flat ids. Checks and sorting are added here.
    """
    def register(function):
        name = function.__name__

        def call(tokens: Tensor, count: int, check: bool, aux: dict) -> Tensor:
            values = {key: get_input(name, key, aux, tokens, check) for key in inputs if key != "tokens"}
            ids = function(to_float32(tokens) if "tokens" in inputs else tokens.detach(), count, **values)
            return ids.sort(1).values if clip_budget else flat_ids(ids, tokens.shape[2])

        @wraps(function)
        def mask(tokens: Tensor, keep: int, *, check: bool = True, **aux) -> Tensor:
            T = token_shape(tokens, keep, check)[1]
            return call(tokens, T * keep if clip_budget else keep, check, aux)

        MASKS[name], MASK_INPUTS[name] = mask, frozenset(inputs)
        if clip_budget:
            CLIP_BUDGET.add(name)
            mask.mask_clip = call                                               # the same for any total, for select
        return mask
    return register


def select(mask: MaskConfig | str | Callable, tokens: Tensor, total: int, *, check: bool = True, **aux) -> Tensor:
    """
    Apply a mask at any budget of the clip: tokens (B, T, N, C) -> (B, total) flat ids, ascending, without repeats.

    `mask` is a MaskConfig, a name in MASKS or a function like those in it. Masks with a clip budget get the total. All
    others keep K tokens of some frames and K + 1 of the rest (budgets.frame_budgets), with one call for each number.
    With total = T * K the result is that of the mask.

    With the same random numbers, the ids of a total are among those of every larger total. The exceptions are
    cluster_stm with assign="nearest" (unless pick="centre"), fastvid_style and kmeans, whose clusters change with K.
    """
    if isinstance(mask, str):
        check_choice("mask", mask, MASKS)
        mask = MASKS[mask]
    check_total(check_features("mask", tokens, 4, check=False), total)
    T = tokens.shape[1]
    if total % T == 0:
        return mask(tokens, total // T, check=check, **aux)
    check_features("mask", tokens, 4, check)
    function = MASKS[mask.name] if isinstance(mask, MaskConfig) else mask
    if hasattr(function, "mask_clip"):
        return function.mask_clip(tokens, total, check, aux)
    return mask_frames(mask, tokens, total, check, aux)


def get_input(mask: str, name: str, aux: dict, tokens: Tensor, check: bool):
    """Return the input `name` of a mask, tensors in fp32. Raise a ValueError if it is missing or has wrong values."""
    value, (B, T, N, _) = aux.get(name), tokens.shape
    if name == "generator":
        return require_generator(value)
    if value is None:
        raise ValueError(f"mask {mask} needs {name} {INPUT_SHAPES[name]}, got None")
    if name == "grid":
        if len(value) != 2 or min(value) < 1 or math.prod(value) != N:
            raise ValueError(f"grid must be (h, w) with h * w = {N} for tokens {tuple(tokens.shape)}, "
                             f"got {tuple(value)}")
        return value
    shape = (B, T, N)
    if name in ("aligned", "text"):                                             # both have E, the width of `aligned`
        E = aux["aligned"].shape[-1] if aux["aligned"].ndim else 0
        shape = (B, T, N, E) if name == "aligned" else (B, E)
    if value.shape != shape:
        raise ValueError(f"{name} must be {shape} for tokens {tuple(tokens.shape)}, got {tuple(value.shape)}")
    minimum = 0 if name == "attention" else -math.inf
    if check and not (value.isfinite() & (value >= minimum)).all():
        low, high = value.aminmax()
        expected = "finite and >= 0" if name == "attention" else "finite"
        raise ValueError(f"{name} must be {expected}, got values from {low.item():g} to {high.item():g}")
    return to_float32(value)


def token_shape(tokens: Tensor, keep: int, check: bool) -> tuple[int, int, int]:
    """Return B, T, N of tokens (B, T, N, C) after checking that they are finite and that `keep` is in 1 to N."""
    check_features("mask", tokens, 4, check)
    B, T, N, _ = tokens.shape
    if not 1 <= keep <= N:
        raise ValueError(f"keep must be in 1 to {N}, the tokens of a frame, got {keep}")
    return B, T, N


def flat_ids(index: Tensor, N: int) -> Tensor:
    """Positions in each frame, (B, T, K) in [0, N) in any order -> (B, T * K) flat ids t * N + n, ascending."""
    offset = torch.arange(index.shape[1], device=index.device)[:, None] * N
    return (index.sort(-1).values + offset).flatten(1)


def token_sizes(tokens: Tensor, visible_ids: Tensor) -> Tensor:
    """
    Number of tokens that each visible one stands for, itself included: (B, T, N, C), (B, S) flat ids -> (B, S) fp32.

    A masked token counts for the most similar (cosine) visible token of its frame; of equals, for the first. The sizes
    of a frame sum to N, unless none of its tokens is visible.
    """
    B, T, N, C = tokens.shape
    x = normalize(tokens.float().flatten(1, 2), dim=-1)                                     # (B, TN, C)
    visible = x.gather(1, visible_ids[..., None].expand(-1, -1, C))                         # (B, S, C)
    frame = torch.arange(T * N, device=visible_ids.device)[:, None] // N
    same_frame = frame == visible_ids[:, None] // N                                        # (B, TN, S)
    nearest = (x @ visible.mT).masked_fill(~same_frame, -torch.inf).argmax(-1)              # (B, TN)
    slots = torch.arange(visible_ids.shape[1], device=visible_ids.device)
    nearest.scatter_(1, visible_ids, slots.expand_as(visible_ids))
    sizes = torch.zeros(visible_ids.shape, device=visible_ids.device)
    return sizes.scatter_add(1, nearest, same_frame.any(-1).float())


# Masks that use only the token grid.

@register_mask("generator", clip_budget=True)
def random(x, S, *, generator):
    """Keep S random tokens of the clip (Feichtenhofer et al., NeurIPS 2022). Budget: per clip."""
    return bottomk_stable(seeded_uniform((len(x), x.shape[1] * x.shape[2]), generator, x.device), S)


@register_mask("generator")
def random_frame(x, K, *, generator):
    """Keep K random tokens of each frame."""
    return bottomk_stable(seeded_uniform(x.shape[:3], generator, x.device), K)


@register_mask("generator")
def tube(x, K, *, generator):
    """Keep K random positions, the same in all frames (VideoMAE, Tong et al., NeurIPS 2022)."""
    B, T, N, _ = x.shape
    return bottomk_stable(seeded_uniform((B, 1, N), generator, x.device), K).expand(B, T, K)


@register_mask("grid", "generator")
def block3d(x, K, *, grid, generator):
    """
    Keep the positions outside random blocks, the same in all frames (VIOLET, Fu et al., 2021; InternVideo-Next, 2025).

    A block covers 15 % of the frame; its height is 3/4 to 3/2 of its width. Blocks are hidden one after another, and of
    the last one as many random positions as are still needed. If 32 blocks are not enough, random positions follow.
    """
    (B, T), (h, w), num_blocks = x.shape[:2], grid, 32
    draws = seeded_uniform((B, 3 * num_blocks + h * w), generator, x.device)
    draws, noise = draws.split((3 * num_blocks, h * w), 1)
    shape, top, left = draws.view(B, 3, num_blocks, 1).unbind(1)                # (B, num_blocks, 1)
    aspect = 0.75 * 2 ** shape
    spans = []
    for side, start, stretch in ((h, top, aspect), (w, left, 1 / aspect)):
        length = (0.15 * h * w * stretch).sqrt().round().clamp(1, side)
        start, index = (start * (side - length + 1)).floor(), torch.arange(side, device=x.device)
        spans.append((index >= start) & (index < start + length))
    rows, columns = spans                                                       # (B, num_blocks, h), (.., w)
    hidden = (rows[..., None] & columns[..., None, :]).flatten(2)               # (B, num_blocks, N)
    first = torch.where(hidden.any(1), hidden.byte().argmax(1), num_blocks)     # first block that hides a position
    return topk_stable(first + noise, K)[:, None].expand(B, T, K)


# Masks that use attention, logits or captions.

@register_mask("attention", "generator")
def umt(x, K, *, attention, generator):
    """Keep K tokens of each frame, drawn without replacement in proportion to attention (UMT, Li et al., ICCV 2023)."""
    # One sort of Gumbel-perturbed fp32 scores does these draws. Tokens without attention come last, in random order.
    return topk_stable(log_attention(attention) + gumbel_noise(attention.shape, generator, attention.device), K)


@register_mask("attention", "generator", clip_budget=True)
def umt_global(x, S, *, attention, generator):
    """Keep S tokens of the clip, drawn as in umt (InternVideo2, Wang et al., ECCV 2024). Budget: per clip."""
    score = log_attention(attention) + gumbel_noise(attention.shape, generator, attention.device)
    return topk_stable(score.flatten(1), S)


def log_attention(attention: Tensor) -> Tensor:
    """Return the logarithm of attention, finite where attention is 0."""
    return attention.clamp_min(torch.finfo(torch.float32).tiny).log()


@register_mask("attention")
def attention_high(x, K, *, attention):
    """Keep the K tokens of each frame with most attention (MASCOT's high-informed view, Fang et al., 2023)."""
    return topk_stable(attention, K)


@register_mask("attention")
def attention_low(x, K, *, attention):
    """Keep the K tokens of each frame with least attention (MASCOT's low-informed view, Fang et al., 2023)."""
    return bottomk_stable(attention, K)


@register_mask("attention", "generator")
def smaug_style(x, K, *, attention, generator):
    """
    Keep the tokens with most attention in a random half (at least K) of each frame (SMAUG, Lin et al., ICCV 2023).

    Left out: SMAUG uses the attention of each layer of the student and drops whole frames.
    """
    half = bottomk_stable(seeded_uniform(attention.shape, generator, x.device), max(K, x.shape[2] // 2)).sort(-1).values
    return half.gather(2, topk_stable(attention.gather(2, half), K))


@register_mask("logits", "generator", clip_budget=True)
def adamae(x, S, *, logits, generator):
    """S draws from softmax(logits), without replacement (AdaMAE, Bandara et al., CVPR 2023). Budget: per clip."""
    return topk_stable((logits + gumbel_noise(logits.shape, generator, logits.device)).flatten(1), S)


@register_mask("aligned", "text")
def text_guided(x, K, *, aligned, text):
    """Keep the K tokens of each frame least similar to the caption (Text-Guided Video MAE, Fan et al., ECCV 2024)."""
    return bottomk_stable((l2_normalize(aligned) * l2_normalize(text)[:, None, None]).sum(-1), K)


# Masks that use the change over time.

@register_mask("tokens", clip_budget=True)
def dynamic(x, S):
    """Keep the S tokens that change most ("dynamic" in FluxViT, Wang et al., ICCV 2025). Budget: per clip."""
    return topk_stable(frame_difference(x).flatten(1), S)


@register_mask("tokens", clip_budget=True)
def flux_group_dynamic(x, S):
    """
    Keep the tokens that change most in each of four groups of consecutive frames (FluxViT, Wang et al., ICCV 2025).

    This is group_dynamic with its defaults. Budget: per clip, dealt to the groups in turn.
    """
    return group_dynamic(x, S, check=False)


@register_mask("tokens", "generator", clip_budget=True)
def everest(x, S, *, generator):
    """
    Keep S random tokens of the 30 % (at least S) that change most (EVEREST, Hwang et al., ICML 2024).

    EVEREST's choice of frames is not part of it. Budget: per clip.
    """
    pool = topk_stable(frame_difference(x).flatten(1), max(S, 3 * x.shape[1] * x.shape[2] // 10))
    return pool.gather(1, bottomk_stable(seeded_uniform(pool.shape, generator, x.device), S))


@register_mask("tokens", clip_budget=True)
def evs(x, S):
    """
    Keep the first frame, then the tokens least similar to those of the previous frame (EVS, Bagrov et al., 2025).

    Budget: per clip. If S <= N, this keeps the first S tokens of the first frame; EVS would keep all N.
    """
    u = l2_normalize(x)
    d = (u[:, 1:] - u[:, :-1]).square().sum(-1) / 2                             # 1 - cosine, and 0 for equal tokens
    return topk_stable(torch.cat([torch.full_like(u[:, :1, :, 0], torch.inf), d], 1).flatten(1), S)


@register_mask("tokens", "grid")
def mgm_style(x, K, *, grid):
    """
    Keep the K tokens of each frame farthest from where it changes most (MGM, Fan et al., ICCV 2023).

    The hidden tokens are a square around that position. Left out: the codec's motion vectors (frame_difference replaces
    them) and boxes of other shapes.
    """
    n = torch.arange(x.shape[2], device=x.device)
    peak = frame_difference(x).argmax(-1, keepdim=True)                         # (B, T, 1)
    rows, columns = (n // grid[1] - peak // grid[1]).abs(), (n % grid[1] - peak % grid[1]).abs()
    return topk_stable(torch.maximum(rows, columns), K)


@register_mask("tokens", "grid", "generator")
def mgmae_style(x, K, *, grid, generator):
    """
    Keep the tokens with the K lowest of random numbers that follow the motion (MGMAE, Huang et al., ICCV 2023).

    The numbers are drawn for the middle frame and passed on to its neighbours, frame by frame: each token takes that of
    the most similar token in the 3 x 3 window around its position. Left out: optical flow (similarity replaces it) and
    the Gaussian mixture that the numbers are drawn from.
    """
    (B, T, N, _), (h, w) = x.shape, grid
    noise, middle = [seeded_uniform((B, N), generator, x.device)] * T, T // 2
    steps = [(t, t - 1) for t in range(middle + 1, T)] + [(t, t + 1) for t in reversed(range(middle))]
    n, u = torch.arange(N, device=x.device), l2_normalize(x)
    # A window lists the token's own position first, so that it wins ties, and again for positions outside the frame.
    shifts = [(0, 0)] + [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    positions = [((n // w + i), (n % w + j)) for i, j in shifts]
    window = torch.stack([torch.where((i >= 0) & (i < h) & (j >= 0) & (j < w), i * w + j, n) for i, j in positions], 1)
    for t, s in steps:
        similarity = torch.stack([(clip[t] @ clip[s].mT).gather(1, window) for clip in u])  # (B, N, 10)
        source = window.expand(B, N, 10).gather(2, similarity.argmax(2, keepdim=True))[..., 0]
        noise[t] = noise[s].gather(1, source)
    return bottomk_stable(torch.stack(noise, 1), K)


# Masks that use the similarity of tokens. What needs more than N^2 numbers per frame processes one clip at a time.

def cosine_distance_safe(x: Tensor) -> Tensor:
    """Cosine distances x (F, N, C) -> (F, N, N). A NaN becomes distance 1, so that no token is kept twice."""
    return cosine_distance_ref(x).nan_to_num_(1)


def dpc_knn_score(x: Tensor, k: int) -> Tensor:
    """DPC-KNN score log(rho delta), rho from the k nearest tokens, itself included: x (F, N, C) -> (F, N)."""
    _, N, C = x.shape
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(C)
    log_rho = -d.topk(min(k, N), largest=False).values.square().mean(-1)
    rank = topk_stable(log_rho, N).argsort(-1)
    denser = rank[:, None] < rank[:, :, None]                                   # [f, i, j]: j is denser than i
    return log_rho + d.where(denser, d.amax((1, 2), keepdim=True)).amin(-1).log()


@register_mask("tokens")
def dpcknn_centres(x, K):
    """
    Keep the K cluster centres of DPC-KNN with k = 5 in each frame (TCFormer, Zeng et al., CVPR 2022).

    Of equal densities the lower index counts as denser (TCFormer adds noise of 1e-6), and densities are compared as
    logarithms.
    """
    return torch.stack([topk_stable(dpc_knn_score(clip, 5), K) for clip in x])


@register_mask("tokens", "attention")
def fastvid_style(x, K, *, attention):
    """
    60 % of K by attention, and as the other 40 % (rounded down) DPC-KNN centres (k = 4) of the remaining tokens of each
    frame (FastVID, Shen et al., NeurIPS 2025). Left out: segments of similar frames with centres in every fourth frame
    only, and merging.
    """
    N, num_salient, ids = x.shape[2], K - 2 * K // 5, []
    if num_salient == N:
        return topk_stable(attention, K)
    for clip, order in zip(x, topk_stable(attention, N), strict=True):
        rest = order[:, num_salient:].sort(1).values
        tokens = torch.stack([frame[n] for frame, n in zip(clip, rest, strict=True)])
        centres = rest.gather(1, topk_stable(dpc_knn_score(tokens, 4), K - num_salient))
        ids.append(torch.cat([order[:, :num_salient], centres], 1))
    return torch.stack(ids)


@register_mask("tokens")
def scissor_style(x, K):
    """
    The tokens with most neighbours of each connected component (cosine > 0.8) of a frame (LLaVA-Scissor, Sun et al.,
    2025): the first token of every component, then the second of every component, until there are K. Larger components
    come first, then tokens of larger mean distance. Left out: components across frames, and averages over components.
    """
    ids = []
    for d in map(cosine_distance_safe, x):
        order = topk_stable(d.mean(-1), x.shape[2])
        ids.append(order.gather(1, bottomk_stable(component_rank(d < 0.2).gather(1, order), K)))
    return torch.stack(ids)


def component_rank(linked: Tensor) -> Tensor:
    """Sort key of tokens: rank in their component, then the larger component. linked (F, N, N) bool -> (F, N)."""
    N, reach, degree = linked.shape[1], linked.float(), linked.sum(-1)
    for _ in range(N.bit_length()):                                             # paths of 1, 2, 4, ... links
        reach = (reach @ reach > 0).float()
    connected = reach > 0
    i, j = degree[:, :, None], degree[:, None]
    lower_index = torch.ones(N, N, dtype=torch.bool, device=linked.device).tril(-1)
    rank = (connected & ((j > i) | (j == i) & lower_index)).sum(-1)             # members of its component before it
    return rank * (N + 1) - connected.sum(-1)


@register_mask("tokens")
def tome_style(x, K):
    """
    Reduction by bipartite matching in each frame (ToMe, Bolya et al., ICLR 2023): tokens alternate between sources and
    destinations, and the sources most similar to a destination are dropped, up to half per round, until K are left.
    Left out: similarity of attention keys, and averaging of merged tokens.
    """
    B, T, N, C = x.shape
    ids = torch.arange(N, device=x.device).expand(B, T, N)
    while (n := ids.shape[2]) > K:
        u = l2_normalize(x).gather(2, ids[..., None].expand(B, T, n, C))
        best = torch.stack([(clip[:, ::2] @ clip[:, 1::2].mT).amax(-1) for clip in u])
        sources = bottomk_stable(best, (n + 1) // 2 - min(n - K, n // 2))
        ids = torch.cat([ids[..., ::2].gather(2, sources), ids[..., 1::2]], 2).sort(2).values
    return ids


def farthest_point_sampling(d: Tensor, first: Tensor, K: int) -> Tensor:
    """d (F, N, N), first (F,) -> (F, K): the first token, then repeatedly the one farthest from those selected."""
    f, ids, distance = torch.arange(len(d), device=d.device), [first], torch.full_like(d[:, 0], torch.inf)
    while len(ids) < K:
        distance = torch.minimum(distance, d[f, ids[-1]])
        distance[f, ids[-1]] = -torch.inf                                       # no token is selected twice
        ids.append(distance.argmax(-1))
    return torch.stack(ids, -1)


@register_mask("tokens", clip_budget=True)
def divprune(x, S):
    """
    Farthest point sampling of S tokens in the whole clip (DivPrune, Alvar et al., CVPR 2025).

    The first token is the one whose nearest neighbour is farthest. Budget: per clip. The (TN)^2 distances of one clip
    are in memory at a time.
    """
    ids = []
    for clip in x:
        d = cosine_distance_safe(clip.flatten(0, 1)[None])
        first = d.diagonal_scatter(torch.full_like(d[..., 0], torch.inf), dim1=1, dim2=2).amin(-1).argmax(-1)
        ids.append(farthest_point_sampling(d, first, S)[0])
    return torch.stack(ids)


# Ablations: cluster_stm without one of its parts.

def temporal_density_score(clip: Tensor) -> Tensor:
    """Score of cluster_stm, clip (T, N, C) -> (T, N): temporal density, or for T = 1 the density within the frame."""
    if len(clip) == 1:
        return log_density(cosine_distance_ref(clip), bandwidth_ref(clip, MaskConfig.quantile), "exp")
    return temporal_density_ref(clip[None], bandwidth_ref(clip[None], MaskConfig.quantile_time))[0]


@register_mask("tokens")
def density_topk(x, K):
    """Keep the K tokens of each frame with the largest temporal density: cluster_stm without clusters."""
    return torch.stack([topk_stable(temporal_density_score(clip), K) for clip in x])


@register_mask("tokens")
def kmeans(x, K):
    """cluster_stm with the clusters of spherical k-means."""
    return torch.stack([cluster_argmax_ref(temporal_density_score(clip), spherical_kmeans(clip, K), K) for clip in x])


def spherical_kmeans(x: Tensor, K: int) -> Tensor:
    """K-means by cosine in each frame from farthest points: x (F, N, C) -> labels (F, N). No cluster is empty."""
    u, d = l2_normalize(x).nan_to_num(), cosine_distance_safe(x)
    seeds = farthest_point_sampling(d, d.mean(-1).argmin(-1), K)
    centres = torch.stack([frame[n] for frame, n in zip(u, seeds, strict=True)])            # (F, K, C)
    for _ in range(10):
        similarity, labels = (u @ centres.mT).max(-1)
        member = refill_empty_clusters(one_hot(labels, K), similarity)                      # (F, N, K)
        centres = l2_normalize(member.to(u.dtype).mT @ u)
    return member.argmax(-1)


def refill_empty_clusters(member: Tensor, similarity: Tensor) -> Tensor:
    """
    Give each empty cluster in turn the token least similar to its centre, out of clusters with more than one token.

    member (F, N, K) is one-hot and changed in place; similarity (F, N) is that of a token to its centre.
    """
    for _ in range(member.shape[2]):
        empty = member.sum(1) == 0                                              # (F, K)
        if not empty.any():
            break
        f, single = empty.any(1), (member.sum(1, keepdim=True) * member).sum(-1) == 1       # (F,), (F, N)
        n, k = similarity.masked_fill(single, torch.inf).argmin(1), empty.byte().argmax(1)
        member[f, n[f]] = one_hot(k[f], member.shape[2])
    return member


@register_mask("tokens")
def farthest_points(x, K):
    """Farthest point sampling (cosine) in each frame, from the token of least mean distance."""
    return torch.stack([farthest_point_sampling(d, d.mean(-1).argmin(-1), K) for d in map(cosine_distance_safe, x)])
