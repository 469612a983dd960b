"""
The masks that ClusterSTM is compared with, written from their definitions; the contract is masking.py's.

A budget is a frame's, keep tokens of each, or the clip's (*), keep * T tokens wherever they are. g: it is drawn.

    of shapes alone     random *g   random_frame g   tube g   block3d g
    of attention        umt g   umt_global *g   attention_high   attention_low   smaug_style g
    of other guides     adamae *g (logits)   text_guided (text, aligned)
    of change in time   dynamic *   flux_group_dynamic *   everest *g   evs *   mgm_style   mgmae_style g
    of similarity       dpcknn_centres   fastvid_style (attention)   scissor_style   tome_style   divprune *
    controls            density_topk   kmeans   farthest_points

The tokens are the teacher's; papers that look at pixels, flow or layers of the student are given those instead. A name
that ends in _style is an approximation, and its docstring says what is left out. Scores are fp32, equal ones go to the
lower index. A method that needs more than N^2 numbers a frame takes a clip at a time. Rows of similarity and controls
are plain PyTorch on a GPU too, and wait for it.

A row is a function of tokens x (B, T, N, C), K, and by keyword what it needs. It gives what it keeps in any order:
(B, T, K) places in [0, N), or of a budget of the clip's (B, TK) flat ids. `row` checks, sorts and lists it.
"""

import math
from functools import wraps

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from kernels import check_features
from kernels.bandwidth import bandwidth_ref
from kernels.cluster_argmax import cluster_argmax_ref
from kernels.cosine_distance import cosine_distance_ref, unit
from kernels.density_peaks import log_density
from kernels.temporal_density import temporal_density_ref

MASKS = {}          # name -> mask(tokens, keep, **aux), as masking.py has it
NEEDS = {}          # name -> what it asks for: tokens (their values, not the shape alone), and aux by name
GLOBAL = set()      # those whose budget is not a frame's
AUX = {"attention": "(B, T, N)", "logits": "(B, T, N)", "text": "(B, E)", "aligned": "(B, T, N, E)", "grid": "(h, w)"}


def row(*needs: str, clip: bool = False):
    """Makes of a function as described above a row of MASKS. clip: the budget is the clip's."""
    def enter(choose):
        name = choose.__name__

        @wraps(choose)
        def mask(tokens: Tensor, keep: int, *, check: bool = True, **aux) -> Tensor:
            N = shape(tokens, keep, check)[2]
            given = {need: needed(name, need, aux, tokens, check) for need in needs if need != "tokens"}
            kept = choose(single(tokens) if "tokens" in needs else tokens.detach(), keep, **given)
            return kept.sort(1).values if clip else flat(kept, N)

        MASKS[name], NEEDS[name] = mask, frozenset(needs)
        if clip:
            GLOBAL.add(name)
        return mask
    return enter


def needed(mask: str, name: str, aux: dict, tokens: Tensor, check: bool):
    """What a mask needs beside the tokens, numbers in fp32, or a one-line ValueError."""
    value, (B, T, N, _) = aux.get(name), tokens.shape
    if name == "generator":
        return drawing(value)
    if value is None:
        raise ValueError(f"the mask {mask} needs {name} {AUX[name]}, got none")
    if name == "grid":
        if len(value) != 2 or min(value) < 1 or math.prod(value) != N:
            raise ValueError(f"tokens {tuple(tokens.shape)} want a grid (h, w) of h * w = {N}, got {tuple(value)}")
        return value
    want = (B, T, N)
    if name in ("aligned", "text"):                                             # aligned is looked at before text
        want = (*want[:3 if name == "aligned" else 1], aux["aligned"].shape[-1] if aux["aligned"].ndim else 0)
    if value.shape != want:
        raise ValueError(f"tokens {tuple(tokens.shape)} want {name} {want}, got {tuple(value.shape)}")
    least = 0 if name == "attention" else -math.inf
    if check and not (value.isfinite() & (value >= least)).all():
        low, high = value.aminmax()
        finite = "finite values >= 0" if name == "attention" else "finite values"
        raise ValueError(f"{name} wants {finite}, got {low.item():g} to {high.item():g}")
    return single(value)


def shape(tokens: Tensor, keep: int, check: bool) -> tuple[int, int, int]:
    """B, T, N of tokens (B, T, N, C), which must be finite, and keep between 1 and N."""
    check_features("a mask", tokens, 4, check)
    B, T, N, _ = tokens.shape
    if not 1 <= keep <= N:
        raise ValueError(f"a mask keeps 1 to N = {N} tokens a frame, got {keep}")
    return B, T, N


def flat(index: Tensor, N: int) -> Tensor:
    """Tokens kept in each frame, (B, T, K) in [0, N) in any order -> (B, TK), the flat ids t * N + n, ascending."""
    start = torch.arange(index.shape[1], device=index.device)[:, None] * N
    return (index.sort(-1).values + start).flatten(1)


def drawing(generator: Generator | None) -> Generator:
    if generator is None:
        raise ValueError("a mask that is drawn at random needs generator, got none")
    return generator


def uniform(size: tuple, generator: Generator | None, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), drawn on the generator's device: one seed, one mask, wherever `like` is."""
    return sent(torch.rand(size, generator=drawing(generator), device=generator.device), like.device)


def gumbel(generator: Generator, like: Tensor) -> Tensor:
    """Gumbel noise: the K largest of log w + noise are K draws without replacement in proportion to w."""
    return -uniform(like.shape, generator, like).clamp_(1e-7, 1 - 1e-7).log().neg().log()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. Memory that is pinned is copied to a GPU while the host goes on; of other memory it waits."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def single(x: Tensor) -> Tensor:
    """x detached, in fp32; fp64 stays fp64."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def highest(score: Tensor, K: int) -> Tensor:
    """score (..., n) -> (..., K), where the largest are, from the largest on; of equals the first."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :K]


def lowest(score: Tensor, K: int) -> Tensor:
    return score.argsort(dim=-1, stable=True)[..., :K]


# Of shapes alone.

@row("generator", clip=True)
def random(x, K, *, generator):
    """TK tokens anywhere in the clip (Feichtenhofer et al., NeurIPS 2022). Budget: the clip's."""
    return lowest(uniform((len(x), x.shape[1] * x.shape[2]), generator, x), x.shape[1] * K)


@row("generator")
def random_frame(x, K, *, generator):
    """K random tokens of each frame."""
    return lowest(uniform(x.shape[:3], generator, x), K)


@row("generator")
def tube(x, K, *, generator):
    """K random places, the same in all frames (VideoMAE, Tong et al., NeurIPS 2022)."""
    B, T, N, _ = x.shape
    return lowest(uniform((B, 1, N), generator, x), K).expand(B, T, K)


@row("grid", "generator")
def block3d(x, K, *, grid, generator):
    """
    Blocks of 15 % of the frame, sides 3:4 to 3:2, over the full duration, are hidden one after another, of the last as
    many places as are missing, at random (VIOLET, Fu et al., 2021; InternVideo-Next, 2025). After 32 blocks: anywhere.
    """
    (B, T), (h, w), M = x.shape[:2], grid, 32
    draw, noise = uniform((B, 3 * M + h * w), generator, x).split((3 * M, h * w), 1)
    shape, top, left = draw.view(B, 3, M, 1).unbind(1)                          # (B, M, 1)
    aspect = 0.75 * 2 ** shape
    inside = []
    for size, start, area in ((h, top, aspect), (w, left, 1 / aspect)):
        long = (0.15 * h * w * area).sqrt().round().clamp(1, size)
        start, at = (start * (size - long + 1)).floor(), torch.arange(size, device=x.device)
        inside.append((at >= start) & (at < start + long))                      # (B, M, h) and (B, M, w)
    hidden = (inside[0][..., None] & inside[1][..., None, :]).flatten(2)        # (B, M, N)
    first = torch.where(hidden.any(1), hidden.byte().argmax(1), M)              # the block that hides a place
    return highest(first + noise, K)[:, None].expand(B, T, K)


# Of attention, and of other guides.

@row("attention", "generator")
def umt(x, K, *, attention, generator):
    """K tokens of each frame, drawn without replacement in proportion to attention (UMT, Li et al., ICCV 2023)."""
    # Gumbel top-k in fp32 is that draw in one sort; tokens of no attention at all come last, in random order.
    return highest(log(attention) + gumbel(generator, attention), K)


@row("attention", "generator", clip=True)
def umt_global(x, K, *, attention, generator):
    """TK tokens of the clip, drawn likewise (InternVideo2, Wang et al., ECCV 2024). Budget: the clip's."""
    return highest((log(attention) + gumbel(generator, attention)).flatten(1), x.shape[1] * K)


def log(attention: Tensor) -> Tensor:
    return attention.clamp_min(torch.finfo(torch.float32).tiny).log()


@row("attention")
def attention_high(x, K, *, attention):
    """The K tokens of each frame with most attention (MASCOT's high-informed view, Fang et al., 2023)."""
    return highest(attention, K)


@row("attention")
def attention_low(x, K, *, attention):
    """The K tokens of each frame with least attention (MASCOT's low-informed view, Fang et al., 2023)."""
    return lowest(attention, K)


@row("attention", "generator")
def smaug_style(x, K, *, attention, generator):
    """
    Of a random half of each frame, at least K, those with most attention (SMAUG, Lin et al., ICCV 2023). Left out: that
    the attention is the student's, layer by layer, and that whole frames are dropped.
    """
    half = lowest(uniform(attention.shape, generator, x), max(K, x.shape[2] // 2)).sort(-1).values
    return half.gather(2, highest(attention.gather(2, half), K))


@row("logits", "generator", clip=True)
def adamae(x, K, *, logits, generator):
    """TK draws without replacement from softmax(logits) (AdaMAE, Bandara et al., CVPR 2023). Budget: the clip's."""
    return highest((logits + gumbel(generator, logits)).flatten(1), x.shape[1] * K)


@row("aligned", "text")
def text_guided(x, K, *, aligned, text):
    """The K tokens of each frame least like the caption (Text-Guided Video MAE, Fan et al., ECCV 2024)."""
    return lowest((unit(aligned) * unit(text)[:, None, None]).sum(-1), K)


# Of change in time.

def change(x: Tensor) -> Tensor:
    """
    How far each token is from the one before it, in L2: x (B, T, N, C) -> (B, T, N).

    The first frame has the numbers of the second (as in FluxViT and EVEREST); a single frame, distances to its mean.
    """
    if x.shape[1] == 1:
        return torch.linalg.vector_norm(x - x.mean(2, keepdim=True), dim=-1)
    d = torch.linalg.vector_norm(x[:, 1:] - x[:, :-1], dim=-1)
    return torch.cat([d[:, :1], d], 1)


@row("tokens", clip=True)
def dynamic(x, K):
    """The TK tokens that change most (FluxViT's "dynamic", Wang et al., ICCV 2025). Budget: the clip's."""
    return highest(change(x).flatten(1), x.shape[1] * K)


@row("tokens", clip=True)
def flux_group_dynamic(x, K):
    """
    The same in each of G groups of consecutive frames, which do not see each other (FluxViT, Wang et al., ICCV 2025): 4
    where that divides T, else 2. Budget: the group's. Its code fails at T = 4, for us 2 groups, and at odd T, for us 1.
    """
    B, T, N, _ = x.shape
    G = next(G for G in (4, 2, 1) if T % G == 0 and T > G or G == 1)
    score = change(x.reshape(B * G, T // G, N, -1)).view(B, G, -1)
    return (highest(score, T // G * K) + torch.arange(G, device=x.device)[:, None] * (T // G * N)).flatten(1)


@row("tokens", "generator", clip=True)
def everest(x, K, *, generator):
    """
    TK random ones of the 30 % of tokens that change most, or of the TK that do (EVEREST, Hwang et al., ICML 2024; not
    its choice of frames). Budget: the clip's.
    """
    B, T, N, _ = x.shape
    pool = highest(change(x).flatten(1), max(T * K, 3 * T * N // 10))
    return pool.gather(1, lowest(uniform(pool.shape, generator, x), T * K))


@row("tokens", clip=True)
def evs(x, K):
    """
    The first frame, then tokens least like the one before them (Efficient Video Sampling, Bagrov et al., 2025). Budget:
    the clip's. With TK <= N it degenerates to the first tokens of the first frame, where EVS itself would keep N.
    """
    u = unit(x)
    d = (u[:, 1:] - u[:, :-1]).square().sum(-1) / 2                             # 1 - cosine, and 0 for equal tokens
    return highest(torch.cat([torch.full_like(u[:, :1, :, 0], torch.inf), d], 1).flatten(1), x.shape[1] * K)


@row("tokens", "grid")
def mgm_style(x, K, *, grid):
    """
    The K tokens of each frame farthest from where it changes most, what is hidden being a square around that (MGM, Fan
    et al., ICCV 2023). Left out: motion vectors of the codec, for which `change` stands in, and boxes of other shapes.
    """
    n = torch.arange(x.shape[2], device=x.device)
    peak = change(x).argmax(-1, keepdim=True)                                   # (B, T, 1)
    down, right = (n // grid[1] - peak // grid[1]).abs(), (n % grid[1] - peak % grid[1]).abs()
    return highest(torch.maximum(down, right), K)


@row("tokens", "grid", "generator")
def mgmae_style(x, K, *, grid, generator):
    """
    Random numbers of the middle frame are handed on, frame by frame, each token taking that of the token most like it
    in a 3 x 3 window; the K lowest of each frame are kept (MGMAE, Huang et al., ICCV 2023). Left out: optical flow, for
    which the likeness stands in, and the Gaussian mixture that the numbers are drawn from.
    """
    (B, T, N, _), (h, w) = x.shape, grid
    noise, base = [uniform((B, N), generator, x)] * T, T // 2
    steps = [(t, t - 1) for t in range(base + 1, T)] + [(t, t + 1) for t in reversed(range(base))]
    n, u = torch.arange(N, device=x.device), unit(x)
    # The place itself comes first, and once more where the window leaves the frame: of equals it is the one taken.
    around = [(0, 0)] + [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    places = [((n // w + i), (n % w + j)) for i, j in around]
    window = torch.stack([torch.where((i >= 0) & (i < h) & (j >= 0) & (j < w), i * w + j, n) for i, j in places], 1)
    for t, s in steps:
        like = torch.stack([(clip[t] @ clip[s].mT).gather(1, window) for clip in u])        # (B, N, 10)
        noise[t] = noise[s].gather(1, window.expand(B, N, 10).gather(2, like.argmax(2, keepdim=True))[..., 0])
    return lowest(torch.stack(noise, 1), K)


# Of similarity.

def apart(x: Tensor) -> Tensor:
    """Cosine distances x (F, N, C) -> (F, N, N). A NaN is at distance 1 from all, so that nothing is kept twice."""
    return cosine_distance_ref(x).nan_to_num_(1)


def peaks(x: Tensor, k: int) -> Tensor:
    """DPC-KNN: log(rho delta) of frames' tokens, rho of the k nearest, itself among them: x (F, N, C) -> (F, N)."""
    _, N, C = x.shape
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(C)
    log_rho = -d.topk(min(k, N), largest=False).values.square().mean(-1)
    rank = highest(log_rho, N).argsort(-1)
    denser = rank[:, None] < rank[:, :, None]                                   # [f, i, j]: j is denser than i
    return log_rho + d.where(denser, d.amax((1, 2), keepdim=True)).amin(-1).log()


@row("tokens")
def dpcknn_centres(x, K):
    """
    DPC-KNN's K centres of each frame, k = 5 (TCFormer, Zeng et al., CVPR 2022). Of equal densities the lower index is
    the denser, where TCFormer adds noise of 1e-6, and densities are compared as logarithms.
    """
    return torch.stack([highest(peaks(clip, 5), K) for clip in x])


@row("tokens", "attention")
def fastvid_style(x, K, *, attention):
    """
    60 % of a frame's K by attention, and 40 %, rounded down, DPC-KNN centres (k = 4) of the others (FastVID, Shen et
    al., NeurIPS 2025). Left out: segments of like frames with centres in every fourth alone, and merging.
    """
    N, salient, kept = x.shape[2], K - 2 * K // 5, []
    if salient == N:
        return highest(attention, K)
    for clip, order in zip(x, highest(attention, N), strict=True):
        rest = order[:, salient:].sort(1).values
        others = torch.stack([frame[n] for frame, n in zip(clip, rest, strict=True)])
        kept.append(torch.cat([order[:, :salient], rest.gather(1, highest(peaks(others, 4), K - salient))], 1))
    return torch.stack(kept)


@row("tokens")
def scissor_style(x, K):
    """
    Connected components of a frame's tokens of cosine > 0.8: of each the one with most neighbours, then of each the
    second, until there are K; larger components first, then tokens of larger mean distance (LLaVA-Scissor, Sun et al.,
    2025). Left out: components across frames, and means over them.
    """
    kept = []
    for d in map(apart, x):
        order = highest(d.mean(-1), x.shape[2])
        kept.append(order.gather(1, lowest(turns(d < 0.2).gather(1, order), K)))
    return torch.stack(kept)


def turns(linked: Tensor) -> Tensor:
    """When each token is taken, the larger of two components before the other: linked (F, N, N) bool -> (F, N)."""
    N, reach, degree = linked.shape[1], linked.float(), linked.sum(-1)
    for _ in range(N.bit_length()):                                             # paths of 1, 2, 4, ... links
        reach = (reach @ reach > 0).float()
    same = reach > 0
    i, j = degree[:, :, None], degree[:, None]
    earlier = torch.ones(N, N, dtype=torch.bool, device=linked.device).tril(-1)
    turn = (same & ((j > i) | (j == i) & earlier)).sum(-1)                      # how many of its component go before it
    return turn * (N + 1) - same.sum(-1)


@row("tokens")
def tome_style(x, K):
    """
    Tokens of each frame, alternately sources and destinations: the sources most like a destination go, up to half in a
    round, until K are left (ToMe, Bolya et al., ICLR 2023). Left out: attention keys, and averages of what is merged.
    """
    B, T, N, C = x.shape
    left = torch.arange(N, device=x.device).expand(B, T, N)
    while (n := left.shape[2]) > K:
        u = unit(x).gather(2, left[..., None].expand(B, T, n, C))
        best = torch.stack([(clip[:, ::2] @ clip[:, 1::2].mT).amax(-1) for clip in u])
        stay = lowest(best, (n + 1) // 2 - min(n - K, n // 2))
        left = torch.cat([left[..., ::2].gather(2, stay), left[..., 1::2]], 2).sort(2).values
    return left


def farthest(d: Tensor, first: Tensor, K: int) -> Tensor:
    """d (F, N, N), first (F,) -> (F, K): the first, then each time the token farthest from those that are taken."""
    f, taken, near = torch.arange(len(d), device=d.device), [first], torch.full_like(d[:, 0], torch.inf)
    while len(taken) < K:
        near = torch.minimum(near, d[f, taken[-1]])
        near[f, taken[-1]] = -torch.inf                                         # none twice
        taken.append(near.argmax(-1))
    return torch.stack(taken, -1)


@row("tokens", clip=True)
def divprune(x, K):
    """
    Each time the token whose nearest one taken is farthest, from the one whose nearest neighbour is (DivPrune, Alvar et
    al., CVPR 2025). Budget: the clip's. The (TN)^2 distances of one clip are held at a time.
    """
    kept = []
    for clip in x:
        d = apart(clip.flatten(0, 1)[None])
        first = d.diagonal_scatter(torch.full_like(d[..., 0], torch.inf), dim1=1, dim2=2).amin(-1).argmax(-1)
        kept.append(farthest(d, first, x.shape[1] * K)[0])
    return torch.stack(kept)


# Controls: cluster_stm without one of its parts.

def recurrence(clip: Tensor) -> Tensor:
    """cluster_stm's score: clip (T, N, C) -> (T, N), temporal density; of a single frame, the density within it."""
    if len(clip) == 1:
        return log_density(cosine_distance_ref(clip), bandwidth_ref(clip, 0.02), "exp")
    return temporal_density_ref(clip[None], bandwidth_ref(clip[None], 0.1))[0]


@row("tokens")
def density_topk(x, K):
    """The K tokens of each frame of largest temporal density: cluster_stm without clusters."""
    return torch.stack([highest(recurrence(clip), K) for clip in x])


@row("tokens")
def kmeans(x, K):
    """cluster_stm with spherical k-means for its clusters: seeds are farthest points, 10 rounds, none is left empty."""
    return torch.stack([cluster_argmax_ref(recurrence(clip), lloyd(clip, K), K) for clip in x])


def lloyd(x: Tensor, K: int, rounds: int = 10) -> Tensor:
    """Spherical k-means in each frame, x (F, N, C) -> labels (F, N) in [0, K), each of them used."""
    u, d = unit(x).nan_to_num(), apart(x)
    seeds = farthest(d, d.mean(-1).argmin(-1), K)
    centres = torch.stack([frame[n] for frame, n in zip(u, seeds, strict=True)])            # (F, K, C)
    for _ in range(rounds):
        like, labels = (u @ centres.mT).max(-1)
        member = filled(one_hot(labels, K), like)                                           # (F, N, K)
        centres = unit(member.to(u.dtype).mT @ u)
    return member.argmax(-1)


def filled(member: Tensor, like: Tensor) -> Tensor:
    """Empty clusters get, in turn, the token least like its centre of those that are not alone in their cluster."""
    for _ in range(member.shape[2]):
        empty = member.sum(1) == 0                                              # (F, K)
        if not empty.any():
            break
        f, alone = empty.any(1), (member.sum(1, keepdim=True) * member).sum(-1) == 1        # (F,), (F, N)
        n, k = like.masked_fill(alone, torch.inf).argmin(1), empty.byte().argmax(1)
        member[f, n[f]] = one_hot(k[f], member.shape[2])
    return member


@row("tokens")
def farthest_points(x, K):
    """From the token of least mean distance on, each time the one of the frame farthest (cosine) from those taken."""
    return torch.stack([farthest(d, d.mean(-1).argmin(-1), K) for d in map(apart, x)])
