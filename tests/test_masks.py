"""All masks: their contract, the baselines against slow oracles (loops over numbers in fp64), draws against odds."""

import math
from itertools import permutations

import pytest
import torch
from helpers.kernels import DTYPES, across, seeded, unkind, within
from helpers.masks import DRAWS, STOCHASTIC, assert_contract, assert_odds, mask_inputs

from masking import CLIP_BUDGET, MASK_INPUTS, MASKS, spherical_kmeans

all_masks = pytest.mark.parametrize("name", MASKS)
baselines = pytest.mark.parametrize("name", [name for name in MASKS if name != "cluster_stm"])


def clumps(B, T, N, C=12, seed=0, noise=0.5):
    """Tokens around 5 directions per clip that move over time: groups of one token and of many."""
    g = seeded(seed)
    x = torch.randn(B, 5, C, generator=g)
    x = x.gather(1, torch.randint(0, 5, (B, T * N), generator=g)[..., None].expand(B, T * N, C)).view(B, T, N, C)
    return (1 + torch.rand(B, T, N, 1, generator=g)) * (x + noise * torch.randn(B, T, N, C, generator=g))


def extreme_clips(T, N):
    """Six clips (T, N, 12): of clumps, constant, zero, static, unkind, and of duplicates."""
    static, index = clumps(1, 1, N, seed=1)[0], torch.randint(0, 7, (T, N), generator=seeded(2))
    return [clumps(1, T, N)[0], torch.ones(T, N, 12), torch.zeros(T, N, 12), static.expand(T, N, 12), unkind(T, N, 12),
            torch.eye(12)[index]]


# ---------------------------------------------------------------------------------------------------------------------
# The contract

def test_the_registry_is_complete():
    assert len(MASKS) == 26 and MASKS.keys() == MASK_INPUTS.keys()
    assert all(mask.__name__ == name for name, mask in MASKS.items())
    assert STOCHASTIC == ["random", "random_frame", "tube", "block3d", "umt", "umt_global", "smaug_style", "adamae",
                          "everest", "mgmae_style"]
    assert CLIP_BUDGET == {"random", "umt_global", "adamae", "dynamic", "flux_group_dynamic", "everest", "evs",
                           "divprune"}


@baselines
def test_docstrings_name_budgets_and_what_is_left_out(name):
    assert ("Budget:" in MASKS[name].__doc__) == (name in CLIP_BUDGET)
    assert ("Left out:" in MASKS[name].__doc__) == name.endswith("_style")


SHAPES = [          # B, T, grid, K: small, ragged and long clips, grids that are not square, sizes of a model
    *((1, T, (1, N), K) for T in (1, 2, 5, 8) for N in (1, 2, 7) for K in range(1, N + 1)),
    (2, 16, (4, 4), 3), (2, 3, (7, 7), 7), (1, 7, (7, 7), 48), (1, 3, (5, 10), 20), (1, 3, (10, 5), 49),
    (1, 3, (2, 25), 1), (1, 2, (1, 50), 5), (1, 2, (50, 1), 5), (1, 8, (14, 14), 29), (1, 3, (16, 16), 255),
    (1, 1, (16, 16), 26),
]


@all_masks
def test_every_mask_keeps_K_tokens_in_ascending_unique_ids(name):
    for B, T, grid, K in SHAPES:
        N = math.prod(grid)
        tokens, inputs = clumps(B, T, N, C=6, seed=N + T), {**mask_inputs(B, T, N), "grid": grid}
        assert_contract(MASKS[name](tokens, K, generator=seeded(0), **inputs), B, T, N, K, name)


@all_masks
def test_every_mask_takes_extreme_tokens_and_any_strides(name):
    inputs = mask_inputs(2, 3, 16)
    reversed_axes = unkind(12, 16, 3, 2).permute(3, 2, 1, 0)
    for tokens in (unkind(2, 3, 16, 12), torch.zeros(2, 3, 16, 12), torch.ones(2, 3, 16, 12), reversed_axes,
                   unkind(16, 12).expand(2, 3, 16, 12), unkind(1, 1, 12).expand(2, 3, 16, 12)):
        before = tokens.clone()
        ids = MASKS[name](tokens, 5, generator=seeded(0), **inputs)
        assert_contract(ids, 2, 3, 16, 5, name)
        assert tokens.equal(before)
        assert ids.equal(MASKS[name](tokens.contiguous(), 5, generator=seeded(0), **inputs))
    assert_contract(MASKS[name](before.requires_grad_(), 5, generator=seeded(0), **inputs), 2, 3, 16, 5, name)


@all_masks
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
def test_scores_are_fp32_for_every_dtype(name, dtype):
    convert = lambda f: {k: f(v) if torch.is_tensor(v) else v for k, v in inputs.items()}
    x, inputs = clumps(2, 4, 16).to(dtype), mask_inputs(2, 4, 16)
    inputs = convert(lambda v: v.to(dtype))
    ids = MASKS[name](x, 5, generator=seeded(0), **inputs)
    assert ids.equal(MASKS[name](x.float(), 5, generator=seeded(0), **convert(torch.Tensor.float)))
    transposed = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    strided = convert(lambda v: v.mT.contiguous().mT)
    assert ids.equal(MASKS[name](transposed, 5, generator=seeded(0), **strided))


@all_masks
def test_the_same_seed_gives_the_same_mask(name):
    tokens, inputs = torch.randn(2, 4, 49, 8, generator=seeded(1)), mask_inputs(2, 4, 49)
    first, same, other = (MASKS[name](tokens, 7, generator=seeded(seed), **inputs) for seed in (0, 0, 1))
    assert first.equal(same)
    assert first.equal(other) == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_clips_and_frames_are_drawn_independently(name):
    tokens, inputs = torch.zeros(2, 4, 49, 1), {"attention": torch.ones(2, 4, 49), "logits": torch.ones(2, 4, 49)}
    index = (MASKS[name](tokens, 7, generator=seeded(0), grid=(7, 7), **inputs) % 49).view(2, 4, 7)
    assert not index[0].equal(index[1])
    assert index[0, 0].equal(index[0, 1]) == (name in ("tube", "block3d", "mgmae_style"))       # the clip is static


@baselines
@pytest.mark.parametrize("T", [1, 4])
def test_a_mask_does_not_depend_on_the_rest_of_the_batch(name, T):
    clips, inputs = extreme_clips(T, 49), mask_inputs(6, T, 49)
    take = lambda order: {k: v[list(order)] if torch.is_tensor(v) else v for k, v in inputs.items()}
    run = lambda *order: MASKS[name](torch.stack([clips[i] for i in order]), 7, generator=seeded(0), **take(order))
    for i in range(6):
        alone = run(i)[0]
        assert_contract(alone[None], 1, T, 49, 7, name)
        assert run(i, 0, 1)[0].equal(alone) and run(i, i, 2, 3, 5)[0].equal(alone), i
        assert run(0, 4, i)[2].equal(run(i, 2, i)[2])       # random numbers depend on the position in the batch
        if name not in STOCHASTIC:
            assert run(0, 4, i)[2].equal(alone)


@all_masks
def test_frames_keep_equal_shares_unless_the_budget_is_the_clips(name):
    x, inputs = clumps(3, 7, 49, seed=3), mask_inputs(3, 7, 49)
    x[:, 2:] += 3 * torch.randn(3, 5, 1, 12, generator=seeded(4))
    share = torch.stack([ids.div(49, rounding_mode="floor").bincount(minlength=7)
                         for ids in MASKS[name](x, 15, generator=seeded(0), **inputs)])
    assert (share != 15).any(1).all() if name in CLIP_BUDGET else (share == 15).all(), share


# What masks refuse and ignore.

@pytest.mark.parametrize("name, key", [(name, key) for name in MASKS for key in sorted(MASK_INPUTS[name] - {"tokens"})])
def test_a_missing_input_is_refused(name, key):
    inputs = {"generator": seeded(0), **mask_inputs(1, 2, 9)}
    for incomplete in ({k: v for k, v in inputs.items() if k != key}, {**inputs, key: None}):
        with pytest.raises(ValueError, match=rf"{key} .*got None") as error:
            MASKS[name](torch.ones(1, 2, 9, 4), 3, **incomplete)
        assert "\n" not in str(error.value) and (key == "generator" or name in str(error.value))


@all_masks
def test_inputs_that_a_mask_does_not_use_are_ignored(name):
    tokens, generator = torch.randn(2, 3, 9, 4, generator=seeded(2)), "generator" in MASK_INPUTS[name]
    needed = {k: v for k, v in mask_inputs(2, 3, 9).items() if k in MASK_INPUTS[name]}
    alone = MASKS[name](tokens, 3, **needed, **({"generator": seeded(0)} if generator else {}))
    nonsense = {k: torch.full((1,), math.nan) for k in ("attention", "text", "aligned", "logits", "grid", "unknown")}
    assert MASKS[name](tokens, 3, **{**nonsense, **needed}, generator=seeded(0)).equal(alone)


@all_masks
def test_impossible_tokens_and_keep_are_refused(name):
    for tokens, keep, message in [(torch.ones(2, 9, 4), 3, r"\(B, T, N, C\), got \(2, 9, 4\)"),
                                  (torch.ones(1, 2, 0, 4), 1, r"empty axis.* got \(1, 2, 0, 4\)"),
                                  (torch.ones(1, 2, 9, 4).long(), 3, "got torch.int64"),
                                  (torch.ones(1, 2, 9, 4) * math.inf, 3, "finite, got 72 .*of 72"),
                                  (torch.ones(1, 2, 9, 4), 0, "keep .*1 to 9.* got 0"),
                                  (torch.ones(1, 2, 9, 4), 10, "keep .*1 to 9.* got 10")]:
        with pytest.raises(ValueError, match=message):
            MASKS[name](tokens, keep, generator=seeded(0), **mask_inputs(1, 2, 9))


@all_masks
def test_an_input_of_another_shape_is_refused(name):
    wrong = {"attention": [(2, 3, 9), (2, 24), (1, 3, 8)], "logits": [(2, 3, 9), (3, 8), (2, 3, 8, 1)],
             "aligned": [(2, 3, 8), (2, 3, 9, 8), (2, 2, 8, 8), ()], "text": [(2, 7), (1, 8), (2, 1, 8), ()]}
    tokens, inputs = torch.ones(2, 3, 8, 4), mask_inputs(2, 3, 8)
    for key in MASK_INPUTS[name] & wrong.keys():
        for shape in wrong[key]:
            with pytest.raises(ValueError, match=rf"{key} .*\(2, .*\(2, 3, 8, 4\), got \(") as error:
                MASKS[name](tokens, 3, generator=seeded(0), **{**inputs, key: torch.ones(shape)})
            assert "\n" not in str(error.value)
    for grid in ((2, 3), (8,), (2, 2, 2), (-2, -4)) if "grid" in MASK_INPUTS[name] else ():
        with pytest.raises(ValueError, match=r"grid .*\(h, w\).* 8 .*got \("):
            MASKS[name](tokens, 3, generator=seeded(0), **{**inputs, "grid": grid})


@baselines
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_is_refused_or_unchecked_confined_to_its_clip(name, value):
    x, inputs = clumps(3, 3, 16), mask_inputs(3, 3, 16)
    expected = MASKS[name](x, 5, generator=seeded(0), **inputs)
    bad = x.clone()
    bad[1, 1, 3, 2] = bad[1, 2, 5] = value
    cases = [(bad, inputs)]
    for key in MASK_INPUTS[name] - {"tokens", "grid", "generator"}:
        cases.append((x, {**inputs, key: inputs[key].clone()}))
        cases[-1][1][key][1, ..., 1] = value
    for tokens, bad_inputs in cases:
        with pytest.raises(ValueError, match="finite"):
            MASKS[name](tokens, 5, generator=seeded(0), **bad_inputs)
        ids = MASKS[name](tokens, 5, generator=seeded(0), check=False, **bad_inputs)
        assert_contract(ids, 3, 3, 16, 5, name)
        assert ids[[0, 2]].equal(expected[[0, 2]])


# ---------------------------------------------------------------------------------------------------------------------
# Oracles of the baselines. clip: T x N tokens as lists of numbers; draw(*shape): what torch.rand gives for this clip;
# inputs: those of the clip, as lists.

ORACLES = {}                                    # name -> oracle(clip, K, draw, inputs, grid) -> flat ids


def oracle(*names):
    return lambda function: ORACLES.update(dict.fromkeys(names, function)) or function


def top(score, K):
    """Indices of the K largest scores, the first of equals first."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:K]


def bottom(score, K):
    return top([-p for p in score], K)


def cosine(a, b):
    length = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    return sum(p * q for p, q in zip(a, b, strict=True)) / length if length else 0.0


def distance(a, b):
    return 0.0 if a == b else 1 - cosine(a, b)


def l2(a, b):
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def to_flat(clip, frames):
    return [t * len(clip[0]) + n for t, index in enumerate(frames) for n in index]


@oracle("random")
def _(clip, K, draw, inputs, grid):
    return bottom(draw(len(clip) * len(clip[0])), len(clip) * K)


@oracle("random_frame")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [bottom(frame, K) for frame in draw(len(clip), len(clip[0]))])


@oracle("tube")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [bottom(draw(1, len(clip[0]))[0], K)] * len(clip))


@oracle("block3d")
def _(clip, K, draw, inputs, grid):
    (h, w), N, hidden = grid, len(clip[0]), set()
    draws = draw(96 + N)
    noise = draws[96:]
    for shape, y, x in zip(draws[:32], draws[32:64], draws[64:96], strict=True):
        aspect = 0.75 * 2 ** shape
        height = min(h, max(1, round(math.sqrt(0.15 * N * aspect))))
        width = min(w, max(1, round(math.sqrt(0.15 * N / aspect))))
        y, x = math.floor(y * (h - height + 1)), math.floor(x * (w - width + 1))
        block = {i * w + j for i in range(y, y + height) for j in range(x, x + width)} - hidden
        hidden |= set(sorted(block, key=lambda n: (noise[n], -n))[:N - K - len(hidden)])
    hidden |= set(sorted(set(range(N)) - hidden, key=lambda n: (noise[n], -n))[:N - K - len(hidden)])
    return to_flat(clip, [[n for n in range(N) if n not in hidden]] * len(clip))


@oracle("attention_high")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [top(a, K) for a in inputs["attention"]])


@oracle("attention_low")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [bottom(a, K) for a in inputs["attention"]])


@oracle("text_guided")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [bottom([cosine(token, inputs["text"]) for token in frame], K) for frame in inputs["aligned"]])


def gumbel(logs, uniform):
    return [a - math.log(-math.log(min(max(u, 1e-7), 1 - 1e-7))) for a, u in zip(logs, uniform, strict=True)]


@oracle("umt")
def _(clip, K, draw, inputs, grid):
    frames = zip(inputs["attention"], draw(len(clip), len(clip[0])), strict=True)
    return to_flat(clip, [top(gumbel(map(math.log, a), u), K) for a, u in frames])


@oracle("umt_global")
def _(clip, K, draw, inputs, grid):
    logs = map(math.log, sum(inputs["attention"], []))
    return top(gumbel(logs, sum(draw(len(clip), len(clip[0])), [])), len(clip) * K)


@oracle("adamae")
def _(clip, K, draw, inputs, grid):
    return top(gumbel(sum(inputs["logits"], []), sum(draw(len(clip), len(clip[0])), [])), len(clip) * K)


@oracle("smaug_style")
def _(clip, K, draw, inputs, grid):
    N, frames = len(clip[0]), []
    for a, u in zip(inputs["attention"], draw(len(clip), N), strict=True):
        half = bottom(u, max(K, N // 2))
        frames.append(top([a[n] if n in half else -1.0 for n in range(N)], K))
    return to_flat(clip, frames)


def difference(clip):
    """frame_difference: for a single frame, the distance to its mean."""
    if len(clip) == 1:
        mean = [sum(c) / len(clip[0]) for c in zip(*clip[0], strict=True)]
        return [[l2(token, mean) for token in clip[0]]]
    return [[l2(clip[max(t, 1)][n], clip[max(t, 1) - 1][n]) for n in range(len(clip[0]))] for t in range(len(clip))]


@oracle("dynamic")
def _(clip, K, draw, inputs, grid):
    return top(sum(difference(clip), []), len(clip) * K)


@oracle("flux_group_dynamic")
def _(clip, K, draw, inputs, grid):
    T, N, queues, ids = len(clip), len(clip[0]), [], []
    starts = {1: [0], 2: [0], 3: [0], 4: [0, 2], 5: [0, 2], 6: [0, 2, 4], 8: [0, 2, 4, 6]}[T]
    for start, stop in zip(starts, [*starts[1:], T], strict=True):
        means = [[sum(c) / N for c in zip(*frame, strict=True)] for frame in clip]
        keys = zip(sum(difference(clip[start:stop]), []), range(start * N, stop * N), strict=True)
        queues.append([i for *_, i in sorted((-d, -l2(clip[i // N][i % N], means[i // N]), i) for d, i in keys)])
    while len(ids) < T * K:
        ids += [queue.pop(0) for queue in queues if queue][:T * K - len(ids)]
    return ids


@oracle("everest")
def _(clip, K, draw, inputs, grid):
    T, N = len(clip), len(clip[0])
    pool = top(sum(difference(clip), []), max(T * K, T * N * 3 // 10))
    return [pool[i] for i in bottom(draw(len(pool)), T * K)]


@oracle("evs")
def _(clip, K, draw, inputs, grid):
    score = [[math.inf] * len(clip[0])]
    score += [[distance(a, b) for a, b in zip(clip[t - 1], clip[t], strict=True)] for t in range(1, len(clip))]
    return top(sum(score, []), len(clip) * K)


@oracle("mgm_style")
def _(clip, K, draw, inputs, grid):
    frames = []
    for score in difference(clip):
        y, x = divmod(top(score, 1)[0], grid[1])
        frames.append(top([max(abs(n // grid[1] - y), abs(n % grid[1] - x)) for n in range(len(score))], K))
    return to_flat(clip, frames)


@oracle("mgmae_style")
def _(clip, K, draw, inputs, grid):
    (h, w), T = grid, len(clip)
    numbers = {T // 2: draw(h * w)}
    for t in [*range(T // 2 + 1, T), *range(T // 2 - 1, -1, -1)]:
        s, numbers[t] = t - 1 if t > T // 2 else t + 1, []
        for n in range(h * w):
            window = [i * w + j for i in range(h) for j in range(w) if max(abs(i - n // w), abs(j - n % w)) <= 1]
            window.sort(key=lambda m: (-round(cosine(clip[t][n], clip[s][m]), 9), m != n, m))
            numbers[t].append(numbers[s][window[0]])
    return to_flat(clip, [bottom(numbers[t], K) for t in range(T)])


def dpc_knn_gamma(frame, k):
    N = len(frame)
    d = [[l2(a, b) / math.sqrt(len(a)) for b in frame] for a in frame]
    rho = [math.exp(-sum(p * p for p in sorted(row)[:k]) / min(k, N)) for row in d]
    denser = lambda j, i: rho[j] > rho[i] or rho[j] == rho[i] and j < i
    largest = max(map(max, d))
    return [rho[i] * min([d[i][j] for j in range(N) if denser(j, i)], default=largest) for i in range(N)]


@oracle("dpcknn_centres")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [top(dpc_knn_gamma(frame, 5), K) for frame in clip])


@oracle("fastvid_style")
def _(clip, K, draw, inputs, grid):
    num_centres, frames = math.floor(round(0.4 * K, 9)), []
    for frame, a in zip(clip, inputs["attention"], strict=True):
        salient = top(a, K - num_centres)
        rest = [n for n in range(len(frame)) if n not in salient]
        centres = top(dpc_knn_gamma([frame[n] for n in rest], 4), num_centres) if num_centres else []
        frames.append(salient + [rest[i] for i in centres])
    return to_flat(clip, frames)


@oracle("scissor_style")
def _(clip, K, draw, inputs, grid):
    frames = []
    for frame in clip:
        N = len(frame)
        linked = [[m for m in range(N) if m == n or distance(frame[n], frame[m]) < 0.2] for n in range(N)]
        visited, components = set(), []
        for n in range(N):
            component = {n}
            while (more := {j for i in component for j in linked[i]} - component):
                component |= more
            if n not in visited:
                components.append(sorted(component, key=lambda i: (-len(linked[i]), i)))
                visited |= component
        spread = [sum(distance(a, b) for b in frame) for a in frame]
        order = sorted((part.index(n), -len(part), -spread[n], n) for part in components for n in part)
        frames.append([n for *_, n in order[:K]])
    return to_flat(clip, frames)


@oracle("tome_style")
def _(clip, K, draw, inputs, grid):
    frames = []
    for frame in clip:
        index = list(range(len(frame)))
        while len(index) > K:
            sources, destinations = index[::2], index[1::2]
            best = [max(cosine(frame[i], frame[j]) for j in destinations) for i in sources]
            num_dropped = min(len(index) - K, len(index) // 2)
            index = sorted([sources[i] for i in bottom(best, len(sources) - num_dropped)] + destinations)
        frames.append(index)
    return to_flat(clip, frames)


def farthest(tokens, first, K):
    """Farthest point sampling."""
    ids = [first]
    while len(ids) < K:
        rest = [i for i in range(len(tokens)) if i not in ids]
        ids.append(max(rest, key=lambda i: min(distance(tokens[i], tokens[j]) for j in ids)))
    return ids


def most_central(frame):
    return bottom([sum(distance(a, b) for b in frame) for a in frame], 1)[0]


@oracle("divprune")
def _(clip, K, draw, inputs, grid):
    tokens = sum(clip, [])
    nearest = [min([distance(a, b) for j, b in enumerate(tokens) if j != i], default=0) for i, a in enumerate(tokens)]
    return farthest(tokens, top(nearest, 1)[0], len(clip) * K)


@oracle("farthest_points")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [farthest(frame, most_central(frame), K) for frame in clip])


def temporal_density(clip):
    """For a single frame, the density within it."""
    T = len(clip)
    rest = lambda t, n: ([b for s in range(T) if s != t for b in clip[s]] if T > 1 else
                         [b for m, b in enumerate(clip[0]) if m != n])
    d_c = across(torch.tensor(clip).double(), "0.1") if T > 1 else within(torch.tensor(clip[0]).double(), "0.95")
    return [[sum(math.exp(-distance(a, b) / float(d_c)) for b in rest(t, n)) for n, a in enumerate(frame)]
            for t, frame in enumerate(clip)]


@oracle("density_topk")
def _(clip, K, draw, inputs, grid):
    return to_flat(clip, [top(score, K) for score in temporal_density(clip)])


@oracle("kmeans")
def _(clip, K, draw, inputs, grid):
    frames = []
    for frame, score in zip(clip, temporal_density(clip), strict=True):
        N, C = len(frame), len(frame[0])
        lengths = [math.sqrt(sum(p * p for p in token)) for token in frame]
        tokens = [[p / a for p in token] for token, a in zip(frame, lengths, strict=True)]
        centres = [tokens[n] for n in farthest(tokens, most_central(tokens), K)]
        for _ in range(10):
            similarity = [[cosine(token, c) for c in centres] for token in tokens]
            labels = [top(s, 1)[0] for s in similarity]
            for k in range(K):
                if k not in labels:
                    members = [n for n in range(N) if labels.count(labels[n]) > 1]
                    labels[min(members, key=lambda n: max(similarity[n]))] = k
            centres = [[sum(tokens[n][c] for n in range(N) if labels[n] == k) for c in range(C)] for k in range(K)]
        frames.append([max((n for n in range(N) if labels[n] == k), key=lambda n: score[n]) for k in range(K)])
    return to_flat(clip, frames)


def expected_ids(name, x, K, inputs, seed):
    """The oracle's ids of a batch."""
    masks = []
    for b in range(len(x)):
        draw = lambda *shape, b=b: torch.rand((len(x), *shape), generator=seeded(seed))[b].double().tolist()
        of_clip = {k: v[b].double().tolist() for k, v in inputs.items() if torch.is_tensor(v)}
        masks.append(sorted(ORACLES[name](x[b].double().tolist(), K, draw, of_clip, inputs["grid"])))
    return masks


@baselines
@pytest.mark.parametrize("T, grid, noise", [(1, (3, 5), 0.3), (2, (3, 4), 1.0), (3, (4, 5), 0.3), (4, (2, 5), 1.0),
                                            (6, (1, 7), 0.3), (8, (2, 3), 1.0)])
def test_baselines_match_their_oracles(name, T, grid, noise):
    N = math.prod(grid)
    x, inputs = clumps(2, T, N, seed=T, noise=noise), {**mask_inputs(2, T, N, seed=T), "grid": grid}
    for K in sorted({1, 2, N // 3, N // 2, N - 1, N}):
        expected = expected_ids(name, x, K, inputs, K)
        assert MASKS[name](x, K, generator=seeded(K), **inputs).tolist() == expected, K
        assert MASKS[name](x.double(), K, generator=seeded(K), **inputs).tolist() == expected, K


@pytest.mark.parametrize("name", sorted(ORACLES.keys() - {"kmeans", "text_guided", "flux_group_dynamic"}))
@pytest.mark.parametrize("T", [1, 3, 4])
def test_baselines_break_every_tie_toward_the_lower_index(name, T):
    # Axis-aligned tokens have two distances. Their distances to a mean differ by rounding, as do sums of exponentials
    # whose bandwidth is the larger distance, so one frame is constant. Ties of flux_group_dynamic: test_budgets.py.
    x = torch.eye(8)[torch.randint(0, 6, (2, T, 15), generator=seeded(T))]
    if T == 1 and name in ("density_topk", "dynamic", "everest", "mgm_style"):
        x[:] = x[:, :, :1]
    score = torch.randint(1, 3, (2, T, 15), generator=seeded(T)) / 2
    inputs = {**mask_inputs(2, T, 15, seed=T), "grid": (3, 5), "attention": score, "logits": score}
    for K in (1, 3, 6, 9, 14):
        expected = expected_ids(name, x, K, inputs, K)
        assert MASKS[name](x, K, generator=seeded(K), **inputs).tolist() == expected, K


# ---------------------------------------------------------------------------------------------------------------------
# Draws. A count of n draws of probability p is within 4.5 of its standard deviations, at fixed seeds.

def inclusion_odds(weight, K):
    """Probability of each item to be among K draws without replacement in proportion to the remaining weights."""
    odds = [0.0] * len(weight)
    for drawn in permutations(range(len(weight)), K):
        p, remaining = 1.0, sum(weight)
        for i in drawn:
            p, remaining = p * weight[i] / remaining, remaining - weight[i]
        for i in drawn:
            odds[i] += p
    return odds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_umt_draws_in_proportion_to_attention(K, dtype):
    weight = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01]).to(dtype)
    tokens = torch.zeros(DRAWS, 1, 6, 1)
    ids = MASKS["umt"](tokens, K, attention=weight.expand(DRAWS, 1, 6), generator=seeded(K))
    assert_odds(ids, inclusion_odds(weight.tolist(), K), 6)
    unscaled = MASKS["umt"](tokens, K, attention=(1000 * weight).expand(DRAWS, 1, 6), generator=seeded(K + 9))
    assert_odds(unscaled, inclusion_odds(weight.tolist(), K), 6)


def test_umt_draws_each_frame_by_its_own_attention():
    weight = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    ids = MASKS["umt"](torch.zeros(DRAWS, 2, 3, 1), 1, attention=weight.expand(DRAWS, 2, 3), generator=seeded(17))
    assert_odds(ids, weight.flatten(), 6)


def test_umt_draws_tokens_without_attention_last_and_evenly():
    weight = torch.tensor([0.0, 0.5, 0.0, 1e-6, 0.0, 0.5])
    attention, tokens = weight.expand(DRAWS, 1, 6), torch.zeros(DRAWS, 1, 6, 1)
    assert not (weight[MASKS["umt"](tokens, 2, attention=attention, generator=seeded(18))] == 0).any()
    assert MASKS["umt"](tokens, 3, attention=attention, generator=seeded(19)).equal(torch.tensor([[1, 3, 5]] * DRAWS))
    ids = MASKS["umt"](tokens, 4, attention=attention, generator=seeded(20))
    assert_odds(ids, [1 / 3, 1, 1 / 3, 1, 1 / 3, 1], 6)
    ids = MASKS["umt"](tokens, 2, attention=torch.zeros(DRAWS, 1, 6), generator=seeded(21))
    assert_odds(ids, [1 / 3] * 6, 6)


@pytest.mark.parametrize("name", ["umt_global", "adamae"])
def test_draws_from_the_whole_clip_follow_attention_or_logits(name):
    weight = torch.tensor([[0.05, 0.25, 0.1], [0.3, 0.2, 0.1]])
    inputs = {"attention": weight} if name == "umt_global" else {"logits": weight.log() + 7}
    draw = lambda shape, K: MASKS[name](torch.zeros(DRAWS, *shape, 1), K, generator=seeded(1), **{
        k: v.view(shape).expand(DRAWS, *shape) for k, v in inputs.items()})
    assert_odds(draw((1, 6), 1), weight.flatten(), 6, sigmas=3)
    assert_odds(draw((2, 3), 1), inclusion_odds(weight.flatten().tolist(), 2), 6, sigmas=3)


def test_random_draws_every_token_and_every_pair_with_the_same_odds():
    ids = MASKS["random"](torch.zeros(DRAWS, 2, 4, 1), 1, generator=seeded(22))
    assert_odds(ids, [2 / 8] * 8, 8)
    a, b = ids.T                                                                # a < b: one of 28 pairs
    assert_odds((8 * a + b)[:, None], [1 / 28 if i < j else 0.0 for i in range(8) for j in range(8)], 64)


def test_random_frame_draws_frames_evenly_and_independently():
    ids = MASKS["random_frame"](torch.zeros(DRAWS, 2, 5, 1), 2, generator=seeded(23))
    assert_odds(ids, [2 / 5] * 10, 10)
    first, second = ids[:, :2], ids[:, 2:] - 5
    pair = (5 * first[:, 0] + first[:, 1]) * 25 + 5 * second[:, 0] + second[:, 1]
    odds = torch.zeros(25)
    odds[[5 * i + j for j in range(5) for i in range(j)]] = 1 / 10
    assert_odds(pair[:, None], torch.outer(odds, odds).flatten(), 625)


def test_tube_draws_every_position_with_the_same_odds():
    ids = MASKS["tube"](torch.zeros(DRAWS, 3, 5, 1), 2, generator=seeded(24))
    assert_odds(ids, [2 / 5] * 15, 15)
    assert (ids.view(DRAWS, 3, 2) - 5 * torch.arange(3)[:, None] == ids[:, None, :2]).all()


def test_everest_draws_evenly_from_the_tokens_that_change_most():
    x = torch.zeros(DRAWS, 2, 10, 1)
    x[:, 1, [2, 5, 7]] = torch.tensor([3.0, 1.0, 2.0])[:, None]
    odds = [n % 10 in (2, 5, 7) and 1 / 3 for n in range(20)]                   # 30 % of 20: these, of both frames
    assert_odds(MASKS["everest"](x, 1, generator=seeded(2)), odds, 20, sigmas=3)


def test_smaug_never_draws_the_tokens_of_least_attention():
    ids = MASKS["smaug_style"](torch.zeros(DRAWS, 1, 6, 1), 1, generator=seeded(3),
                               attention=torch.tensor([3.0, 6.0, 1.0, 5.0, 2.0, 4.0]).expand(DRAWS, 1, 6))
    # The best of a random three of six: the best token in 1/2, the second, if the best is not drawn, in 3/10, ...
    assert_odds(ids, [1 / 20, 1 / 2, 0, 3 / 10, 0, 3 / 20], 6, sigmas=3)


# ---------------------------------------------------------------------------------------------------------------------
# Single baselines

def test_block3d_hides_one_compact_block_if_one_is_enough():
    B, h, w = 2000, 14, 14
    ids = MASKS["block3d"](torch.zeros(B, 1, h * w, 1), h * w - 20, grid=(h, w), generator=seeded(4))
    visible = torch.zeros(B, h * w).scatter(1, ids, 1).view(B, h, w)
    for axis in (1, 2):
        lines = (visible == 0).any(axis)                            # a block is at most sqrt(0.15 hw 1.5) long
        first, last = lines.int().argmax(1), lines.shape[1] - 1 - lines.flip(1).int().argmax(1)
        assert (last - first).max() < 7
    assert len(ids.unique(dim=0)) == B


def test_mgmae_follows_motion():
    # Distinct tokens move one position to the right per frame, and the visible positions must follow.
    g, panorama = seeded(5), torch.randn(6, 16, 32, generator=seeded(6))
    x = torch.stack([panorama[:, 5 - t:15 - t] for t in range(5)]).reshape(1, 5, 60, 32)
    ids = MASKS["mgmae_style"](x, 20, grid=(6, 10), generator=g)[0]
    visible = torch.zeros(300).scatter(0, ids, 1).view(5, 6, 10)
    for t in range(5):                                              # columns 4 and 5 of frame 2 are in all frames
        assert (visible[t, :, t + 2:t + 4] == visible[2, :, 4:6]).double().mean() > 0.8
    static = MASKS["mgmae_style"](x[:, :1].expand(1, 5, 60, 32), 20, grid=(6, 10), generator=g)
    assert (static % 60).view(5, 20).unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("N", [6, 17, 33, 60])
def test_a_component_of_scissor_can_be_one_long_chain(N):
    # Token i is 1 from i to i + 7: neighbours have cosine 7/8, all others at most 6/8. The last token is alone.
    chain = torch.ones(N, N + 8).triu().tril(7)[torch.randperm(N, generator=seeded(N))]
    x = torch.cat([chain, -torch.ones(1, N + 8)])[None, None]
    ids = MASKS["scissor_style"](x, 2)
    assert ids.tolist() == expected_ids("scissor_style", x, 2, {"grid": None}, 0) and ids[0, 1] == N


def test_no_cluster_of_kmeans_is_empty():
    for x in extreme_clips(3, 20):
        for K in (1, 7, 19, 20):
            labels = spherical_kmeans(x, K)
            assert all(frame.unique().tolist() == list(range(K)) for frame in labels)
