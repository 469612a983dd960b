"""
What the tests of kernels/ and masking.py share: device and dtypes, hard inputs, oracles written from the definitions.

The oracles take one token or one pair at a time, in fp64 or in 40 decimal digits, and use nothing of kernels/.
"""

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from itertools import combinations

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"              # of the kernels: on a CPU they run in Triton's interpreter
LOW = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]              # the interpreter misreads bf16
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
low = pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")
DIGITS = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unkind(*shape, seed=0):
    """Random tokens (..., N, C); if N > 6 also a duplicate, an opposite, a longer, a nearly parallel and a zero one."""
    x = torch.randn(shape, generator=seeded(seed)) + 0.3
    if shape[-2] > 6:
        x[..., 1, :] = x[..., 0, :]
        x[..., 2, :] = -x[..., 0, :]
        x[..., 3, :] = 64 * x[..., 0, :]
        x[..., 4, :] = x[..., 0, :] + 0.01 * x[..., 5, :]
        x[..., 6, :] = 0
    return x


def strided(*shape):
    """Yield random tokens with other strides: all axes reversed, sliced, expanded, and C as the slowest axis."""
    g = seeded()
    axes = tuple(range(len(shape)))
    yield torch.randn(shape[::-1], generator=g).to(DEVICE).permute(axes[::-1])
    wide = torch.randn(*shape[:-2], 2 * shape[-2], 3 * shape[-1], generator=g).to(DEVICE)
    yield wide[..., 1::2, 2::3]
    yield torch.randn(1, *shape[1:], generator=g).to(DEVICE).expand(shape)
    yield torch.randn(shape[-1], *shape[:-1], generator=g).to(DEVICE).movedim(0, -1)


def captured(function):
    """Call a function once, capture it in a CUDA graph, replay the graph and return the result."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    graph.replay()
    torch.cuda.synchronize()
    return out.clone() if isinstance(out, torch.Tensor) else [t.clone() for t in out]


# ---------------------------------------------------------------------------------------------------------------------
# Oracles

def distance(a, b):
    """The cosine distance of two vectors by its definition; 1 if one of them is zero."""
    norms = math.sqrt(np.dot(a, a)) * math.sqrt(np.dot(b, b))
    return 1.0 if norms == 0 else min(max(1 - np.dot(a, b) / norms, 0.0), 2.0)


def distances(frame):
    """frame (N, C) -> (N, N) fp64, 0 from a token to itself."""
    tokens = frame.double().numpy()
    d = np.zeros((len(tokens), len(tokens)))
    for i, a in enumerate(tokens):
        for j in range(i):
            d[i, j] = d[j, i] = distance(a, tokens[j])
    return d


def quick_distances(tokens):
    """`distances` for many tokens: (N, C) -> (N, N) fp64."""
    tokens = tokens.detach().double().cpu().numpy()
    norms = np.sqrt((tokens * tokens).sum(1, keepdims=True))
    tokens = tokens / np.where(norms > 0, norms, 1)
    d = np.clip(1 - tokens @ tokens.T, 0, 2)
    np.fill_diagonal(d, 0)
    return d


def decimal_rank(quantile, n):
    """ceil(quantile * n) in integers, at least 1, for a quantile written as a decimal string."""
    digits = quantile.partition(".")[2]
    return max(1, -(-int(quantile.replace(".", "")) * n // 10 ** len(digits)))


def kth(d, quantile):
    """The element of rank ceil(quantile * n) of n distances, at least 1e-6; 1e-6 if there are none."""
    return max(sorted(d)[decimal_rank(quantile, len(d)) - 1], 1e-6) if len(d) else 1e-6


def within(frame, quantile):
    """frame (N, C) -> the quantile of the distances of its pairs."""
    return kth([distance(a, b) for a, b in combinations(frame.double().numpy(), 2)], quantile)


def across(clip, quantile):
    """clip (T, N, C) -> the quantile of the distances of pairs from different frames."""
    frames = combinations(clip.double().numpy(), 2)
    return kth([distance(a, b) for frame, later in frames for a in frame for b in later], quantile)


def recurrence(clip, d_c):
    """clip (T, N, C) -> tau (T, N) fp64, by sums of exponentials in 40 digits, which cannot underflow."""
    tokens, d_c = clip.double().numpy(), Decimal(float(d_c))
    tau = np.full(tokens.shape[:2], -np.inf)
    with localcontext(DIGITS):
        for t, i in np.ndindex(*tau.shape):
            rest = [token for s, frame in enumerate(tokens) if s != t for token in frame]
            if rest:
                tau[t, i] = sum(sorted((-Decimal(distance(tokens[t, i], token)) / d_c).exp() for token in rest)).ln()
    return tau


class Peaks:
    """
    Density peaks of one frame (N, C) from rho and gamma themselves in 40 digits: no logarithms and no underflow.

    margin: roughly how far off a distance may be before it changes which token is denser, or a token's parent.
    """

    def __init__(self, frame, d_c, density):
        self.d = distances(frame)
        self.N, self.d_c = len(self.d), float(d_c)
        tokens = range(self.N)
        with localcontext(DIGITS):
            kernel = {"exp": lambda a: (-a).exp(), "gauss": lambda a: (-a * a).exp()}[density]
            term = {d: kernel(Decimal(d) / Decimal(self.d_c)) for d in set(self.d.ravel().tolist())}
            # Sorted, so that equal sums are equal whatever the order of their terms.
            self.rho = [sum(sorted(term[self.d[i, j]] for j in tokens if j != i)) for i in tokens]
            self.delta, self.parent, parent_gaps = [], [], []
            for i in tokens:
                denser = [j for j in tokens if self.rho[j] > self.rho[i] or (self.rho[j] == self.rho[i] and j < i)]
                by_distance = sorted(denser, key=lambda j: (self.d[i, j], j))
                self.parent.append(by_distance[0] if denser else i)
                self.delta.append(self.d[i, by_distance[0]] if denser else max(self.d[i]))
                parent_gaps += [self.d[i, by_distance[1]] - self.delta[i]] if len(denser) > 1 else []
            self.gamma = [rho * Decimal(delta) for rho, delta in zip(self.rho, self.delta, strict=True)]
            by_rho = sorted(self.rho)
            rho_gaps = [float(b / a - 1) * self.d_c for a, b in zip(by_rho, by_rho[1:], strict=False) if a > 0]
        self.order = sorted(tokens, key=self.gamma.__getitem__, reverse=True)   # a stable sort: ties stay ascending
        self.margin = min(rho_gaps + parent_gaps, default=1)

    def cluster(self, K, assign):
        """-> labels, centres, and the margin: roughly how far off a distance may be before it changes them."""
        centres = sorted(self.order[:K])
        margin, labels = self.margin, []
        if K < self.N:
            last, next_best = self.gamma[self.order[K - 1]], self.gamma[self.order[K]]
            margin = min(margin, (float(DIGITS.divide(last, next_best)) - 1) * self.d_c if next_best else 0)
        for i in range(self.N):
            while assign == "parent" and i not in centres and self.parent[i] != i:
                i = self.parent[i]
            by_distance = sorted(centres, key=lambda c: (self.d[i, c], c))
            if i not in centres and K > 1:
                margin = min(margin, self.d[i, by_distance[1]] - self.d[i, by_distance[0]])
            labels.append(centres.index(i if i in centres else by_distance[0]))
        return labels, centres, margin
