"""The masks that ClusterSTM is compared with: each against a slow statement of its own, loops over numbers in fp64."""

import math

import pytest
import torch
from test_bandwidth import across, within
from test_cosine_distance import DTYPES, unkind
from test_masking import DRAWN, DRAWS, WHOLE, aux, check_contract, check_odds, inclusion, seeded

from masking import MASKS, NEEDS

every = pytest.mark.parametrize("name", [name for name in MASKS if name != "cluster_stm"])
STATED = {}                                             # name -> oracle(clip, K, draw, aux of the clip, grid) -> ids


def states(*names):
    return lambda oracle: STATED.update(dict.fromkeys(names, oracle)) or oracle


# The statements. clip: T x N tokens, lists of numbers; draw(b): what torch.rand gives of a size, as the mask asks.

def top(score, K):
    """Of equal scores the first."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:K]


def cosine(a, b):
    length = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    return sum(p * q for p, q in zip(a, b, strict=True)) / length if length else 0.0


def gap(a, b):
    return 0.0 if a == b else 1 - cosine(a, b)


def far(a, b):
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def by_frame(clip, frames):
    return [t * len(clip[0]) + n for t, kept in enumerate(frames) for n in kept]


@states("attention_high")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [top(a, K) for a in aux["attention"]])


@states("attention_low")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [top([-p for p in a], K) for a in aux["attention"]])


@states("text_guided")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [top([-cosine(token, aux["text"]) for token in frame], K) for frame in aux["aligned"]])


@states("random")
def _(clip, K, draw, aux, grid):
    return top([-u for u in draw(len(clip) * len(clip[0]))], len(clip) * K)


@states("random_frame")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [top([-u for u in frame], K) for frame in draw(len(clip), len(clip[0]))])


@states("tube")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [top([-u for u in draw(1, len(clip[0]))[0]], K)] * len(clip))


def urn(logs, draws):
    return [a - math.log(-math.log(min(max(u, 1e-7), 1 - 1e-7))) for a, u in zip(logs, draws, strict=True)]


@states("umt")
def _(clip, K, draw, aux, grid):
    draws = draw(len(clip), len(clip[0]))
    return by_frame(clip, [top(urn(map(math.log, a), u), K) for a, u in zip(aux["attention"], draws, strict=True)])


@states("umt_global", "adamae")
def _(clip, K, draw, aux, grid, name):
    guide = [p for frame in aux["attention" if name == "umt_global" else "logits"] for p in frame]
    logs = map(math.log, guide) if name == "umt_global" else guide
    return top(urn(logs, sum(draw(len(clip), len(clip[0])), [])), len(clip) * K)


@states("smaug_style")
def _(clip, K, draw, aux, grid):
    N, kept = len(clip[0]), []
    for a, u in zip(aux["attention"], draw(len(clip), N), strict=True):
        seen = top([-p for p in u], max(K, N // 2))
        kept.append(top([a[n] if n in seen else -1.0 for n in range(N)], K))
    return by_frame(clip, kept)


@states("block3d")
def _(clip, K, draw, aux, grid):
    (h, w), N, hidden = grid, len(clip[0]), set()
    draws = draw(96 + N)
    noise = draws[96:]
    for shape, y, x in zip(draws[:32], draws[32:64], draws[64:96], strict=True):
        aspect = 0.75 * 2 ** shape
        tall = min(h, max(1, round(math.sqrt(0.15 * N * aspect))))
        wide = min(w, max(1, round(math.sqrt(0.15 * N / aspect))))
        top_row, left = math.floor(y * (h - tall + 1)), math.floor(x * (w - wide + 1))
        block = {i * w + j for i in range(top_row, top_row + tall) for j in range(left, left + wide)} - hidden
        hidden |= set(sorted(block, key=lambda n: (noise[n], -n))[:N - K - len(hidden)])
    hidden |= set(sorted(set(range(N)) - hidden, key=lambda n: (noise[n], -n))[:N - K - len(hidden)])
    return by_frame(clip, [[n for n in range(N) if n not in hidden]] * len(clip))


def change(clip):
    """In a single frame the distance to the mean."""
    if len(clip) == 1:
        mean = [sum(c) / len(clip[0]) for c in zip(*clip[0], strict=True)]
        return [[far(token, mean) for token in clip[0]]]
    return [[far(clip[max(t, 1)][n], clip[max(t, 1) - 1][n]) for n in range(len(clip[0]))] for t in range(len(clip))]


@states("dynamic")
def _(clip, K, draw, aux, grid):
    return top(sum(change(clip), []), len(clip) * K)


@states("flux_group_dynamic")
def _(clip, K, draw, aux, grid):
    T, N, kept = len(clip), len(clip[0]), []
    size = {1: 1, 2: 2, 3: 3, 4: 2, 5: 5, 6: 3, 8: 2}[T]
    for t in range(0, T, size):
        kept += [t * N + i for i in top(sum(change(clip[t:t + size]), []), size * K)]
    return kept


@states("everest")
def _(clip, K, draw, aux, grid):
    T, N = len(clip), len(clip[0])
    pool = top(sum(change(clip), []), max(T * K, T * N * 3 // 10))
    return [pool[i] for i in top([-u for u in draw(len(pool))], T * K)]


@states("evs")
def _(clip, K, draw, aux, grid):
    score = [[math.inf] * len(clip[0])]
    score += [[gap(a, b) for a, b in zip(clip[t - 1], clip[t], strict=True)] for t in range(1, len(clip))]
    return top(sum(score, []), len(clip) * K)


@states("mgm_style")
def _(clip, K, draw, aux, grid):
    kept = []
    for score in change(clip):
        y, x = divmod(top(score, 1)[0], grid[1])
        kept.append(top([max(abs(n // grid[1] - y), abs(n % grid[1] - x)) for n in range(len(score))], K))
    return by_frame(clip, kept)


@states("mgmae_style")
def _(clip, K, draw, aux, grid):
    (h, w), T = grid, len(clip)
    numbers = {T // 2: draw(h * w)}
    for t in [*range(T // 2 + 1, T), *range(T // 2 - 1, -1, -1)]:
        s, numbers[t] = t - 1 if t > T // 2 else t + 1, []
        for n in range(h * w):
            near = [i * w + j for i in range(h) for j in range(w) if max(abs(i - n // w), abs(j - n % w)) <= 1]
            near.sort(key=lambda m: (-round(cosine(clip[t][n], clip[s][m]), 9), m != n, m))
            numbers[t].append(numbers[s][near[0]])
    return by_frame(clip, [top([-u for u in numbers[t]], K) for t in range(T)])


def gammas(frame, k):
    N = len(frame)
    d = [[far(a, b) / math.sqrt(len(a)) for b in frame] for a in frame]
    rho = [math.exp(-sum(p * p for p in sorted(row)[:k]) / min(k, N)) for row in d]
    denser = lambda j, i: rho[j] > rho[i] or rho[j] == rho[i] and j < i
    widest = max(map(max, d))
    return [rho[i] * min([d[i][j] for j in range(N) if denser(j, i)], default=widest) for i in range(N)]


@states("dpcknn_centres")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [top(gammas(frame, 5), K) for frame in clip])


@states("fastvid_style")
def _(clip, K, draw, aux, grid):
    context, kept = math.floor(round(0.4 * K, 9)), []
    for frame, a in zip(clip, aux["attention"], strict=True):
        salient = top(a, K - context)
        rest = [n for n in range(len(frame)) if n not in salient]
        kept.append(salient + [rest[i] for i in top(gammas([frame[n] for n in rest], 4) if context else [], context)])
    return by_frame(clip, kept)


@states("scissor_style")
def _(clip, K, draw, aux, grid):
    kept = []
    for frame in clip:
        N = len(frame)
        linked = [[m for m in range(N) if m == n or gap(frame[n], frame[m]) < 0.2] for n in range(N)]
        found, parts = set(), []
        for n in range(N):
            part = {n}
            while (more := {j for i in part for j in linked[i]} - part):
                part |= more
            if n not in found:
                parts.append(sorted(part, key=lambda i: (-len(linked[i]), i)))
                found |= part
        distinct = [-sum(gap(a, b) for b in frame) for a in frame]
        queue = sorted((part.index(n), -len(part), distinct[n], n) for part in parts for n in part)
        kept.append([n for *_, n in queue[:K]])
    return by_frame(clip, kept)


@states("tome_style")
def _(clip, K, draw, aux, grid):
    kept = []
    for frame in clip:
        left = list(range(len(frame)))
        while len(left) > K:
            sources, others = left[::2], left[1::2]
            best = [max(cosine(frame[i], frame[j]) for j in others) for i in sources]
            gone = min(len(left) - K, len(left) // 2)
            left = sorted([sources[i] for i in top([-p for p in best], len(sources) - gone)] + others)
        kept.append(left)
    return by_frame(clip, kept)


def greedy(tokens, first, K):
    taken = [first]
    while len(taken) < K:
        rest = [i for i in range(len(tokens)) if i not in taken]
        taken.append(max(rest, key=lambda i: min(gap(tokens[i], tokens[j]) for j in taken)))
    return taken


def central(frame):
    return top([-sum(gap(a, b) for b in frame) for a in frame], 1)[0]


@states("divprune")
def _(clip, K, draw, aux, grid):
    tokens = sum(clip, [])
    alone = [min([gap(a, b) for j, b in enumerate(tokens) if j != i], default=0) for i, a in enumerate(tokens)]
    return greedy(tokens, top(alone, 1)[0], len(clip) * K)


@states("farthest_points")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [greedy(frame, central(frame), K) for frame in clip])


def recurrence(clip):
    T = len(clip)
    others = lambda t, n: ([b for s in range(T) if s != t for b in clip[s]] if T > 1 else
                           [b for m, b in enumerate(clip[0]) if m != n])
    d_c = across(torch.tensor(clip).double(), "0.1") if T > 1 else within(torch.tensor(clip[0]).double(), "0.02")
    return [[sum(math.exp(-gap(a, b) / float(d_c)) for b in others(t, n)) for n, a in enumerate(frame)]
            for t, frame in enumerate(clip)]


@states("density_topk")
def _(clip, K, draw, aux, grid):
    return by_frame(clip, [top(score, K) for score in recurrence(clip)])


@states("kmeans")
def _(clip, K, draw, aux, grid):
    kept = []
    for frame, score in zip(clip, recurrence(clip), strict=True):
        N, C = len(frame), len(frame[0])
        lengths = [math.sqrt(sum(p * p for p in token)) for token in frame]
        tokens = [[p / a for p in token] for token, a in zip(frame, lengths, strict=True)]
        centres = [tokens[n] for n in greedy(tokens, central(tokens), K)]
        for _ in range(10):
            like = [[cosine(token, c) for c in centres] for token in tokens]
            labels = [top(s, 1)[0] for s in like]
            for k in range(K):
                if k not in labels:
                    several = [n for n in range(N) if labels.count(labels[n]) > 1]
                    labels[min(several, key=lambda n: max(like[n]))] = k
            centres = [[sum(tokens[n][c] for n in range(N) if labels[n] == k) for c in range(C)] for k in range(K)]
        kept.append([max((n for n in range(N) if labels[n] == k), key=lambda n: score[n]) for k in range(K)])
    return by_frame(clip, kept)


def clumps(B, T, N, C=12, seed=0, noise=0.5):
    """Tokens around a few of a clip's own directions, which move about: groups of one token and of many."""
    g = seeded(seed)
    x = torch.randn(B, 5, C, generator=g)
    x = x.gather(1, torch.randint(0, 5, (B, T * N), generator=g)[..., None].expand(B, T * N, C)).view(B, T, N, C)
    return (1 + torch.rand(B, T, N, 1, generator=g)) * (x + noise * torch.randn(B, T, N, C, generator=g))


def stated(name, x, K, extra, seed):
    """What the statement says of a batch."""
    B, masks = len(x), []
    for b in range(B):
        draw = lambda *size, b=b: torch.rand((B, *size), generator=seeded(seed))[b].double().tolist()
        own = {k: v[b].double().tolist() for k, v in extra.items() if torch.is_tensor(v)}
        more = {"name": name} if name in ("umt_global", "adamae") else {}
        masks.append(sorted(STATED[name](x[b].double().tolist(), K, draw, own, extra["grid"], **more)))
    return masks


@every
@pytest.mark.parametrize("T, grid", [(1, (3, 5)), (2, (3, 4)), (3, (4, 5)), (4, (2, 5)), (6, (1, 7)), (8, (2, 3))])
def test_a_mask_is_what_its_slow_statement_says(name, T, grid):
    N = math.prod(grid)
    for noise in (0.3, 1.0):
        x, extra = clumps(2, T, N, seed=T, noise=noise), {**aux(2, T, N, seed=T), "grid": grid}
        for K in sorted({1, 2, N // 3, N // 2, N - 1, N}):
            want = stated(name, x, K, extra, K)
            assert MASKS[name](x, K, generator=seeded(K), **extra).tolist() == want, K
            assert MASKS[name](x.double(), K, generator=seeded(K), **extra).tolist() == want, K


@pytest.mark.parametrize("name", [name for name in STATED if name not in ("kmeans", "text_guided")])
@pytest.mark.parametrize("T", [1, 3, 4])
def test_every_tie_goes_to_the_lower_index(name, T):
    # Axis-aligned tokens: their distances take two values. Those to a mean do not, so a single frame does not change.
    x = torch.eye(8)[torch.randint(0, 6, (2, T, 15), generator=seeded(T))]
    if T == 1 and name in ("dynamic", "flux_group_dynamic", "everest", "mgm_style"):
        x[:] = x[:, :, :1]
    guide = torch.randint(1, 3, (2, T, 15), generator=seeded(T)) / 2
    extra = {**aux(2, T, 15, seed=T), "grid": (3, 5), "attention": guide, "logits": guide}
    for K in (1, 3, 6, 9, 14):
        assert MASKS[name](x, K, generator=seeded(K), **extra).tolist() == stated(name, x, K, extra, K), K


# The contract, where tests/test_masking.py does not look.

@every
def test_every_keep_of_every_small_clip(name):
    for T in (1, 2, 4, 5, 8):
        for N in (1, 2, 3, 4, 7):
            x, extra = clumps(1, T, N, seed=N), aux(1, T, N)
            for K in range(1, N + 1):
                check_contract(MASKS[name](x, K, generator=seeded(), **extra), 1, T, N, K, name)


@every
@pytest.mark.parametrize("grid", [(5, 10), (10, 5), (2, 25), (1, 50), (50, 1)], ids=str)
def test_every_mask_takes_grids_that_are_not_square(name, grid):
    x, extra = clumps(1, 3, 50), {**aux(1, 3, 50), "grid": grid}
    for K in (1, 2, 5, 20, 49, 50):
        check_contract(MASKS[name](x, K, generator=seeded(), **extra), 1, 3, 50, K, name)


@every
def test_every_mask_takes_many_tokens_and_frames(name):
    for T, N, keeps in ((16, 256, (26,)), (3, 256, (1, 255, 256)), (11, 196, (29,))):
        x, extra = clumps(1, T, N, C=8), aux(1, T, N)
        for K in keeps:
            check_contract(MASKS[name](x, K, generator=seeded(), **extra), 1, T, N, K, name)


@every
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
def test_scores_are_fp32_whatever_the_tokens_are(name, dtype):
    every = lambda f: {k: f(v) if torch.is_tensor(v) else v for k, v in extra.items()}
    x, extra = clumps(2, 4, 16).to(dtype), aux(2, 4, 16)
    extra = every(lambda v: v.to(dtype))
    keep = MASKS[name](x, 5, generator=seeded(), **extra)
    assert keep.equal(MASKS[name](x.float(), 5, generator=seeded(), **every(torch.Tensor.float)))
    strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert keep.equal(MASKS[name](strided, 5, generator=seeded(), **every(lambda v: v.mT.contiguous().mT)))


def kinds(T, N):
    """Clips that are easy, equal, empty, static, unkind, and full of duplicates."""
    still, few = clumps(1, 1, N, seed=1)[0], torch.randint(0, 7, (T, N), generator=seeded(2))
    return [clumps(1, T, N)[0], torch.ones(T, N, 12), torch.zeros(T, N, 12), still.expand(T, N, 12), unkind(T, N, 12),
            torch.eye(12)[few]]


@every
@pytest.mark.parametrize("T", [1, 4])
def test_what_else_is_in_the_batch_does_not_change_a_mask(name, T):
    clips, extra = kinds(T, 49), aux(6, T, 49)
    part = lambda order: {k: v[list(order)] if torch.is_tensor(v) else v for k, v in extra.items()}
    run = lambda *order: MASKS[name](torch.stack([clips[i] for i in order]), 7, generator=seeded(), **part(order))
    for i in range(6):
        alone = run(i)[0]
        check_contract(alone[None], 1, T, 49, 7, name)
        for order in ((i, 0, 1), (i, 4), (i, i, 2, 3, 5)):
            assert run(*order)[0].equal(alone), (i, order)
        assert run(0, 4, i)[2].equal(run(i, 2, i)[2])                           # drawn ones depend on their place
        if name not in DRAWN:
            assert run(0, 4, i)[2].equal(alone)


@every
def test_the_share_of_a_frame_is_fixed_but_where_the_budget_is_the_clips(name):
    x, extra = clumps(3, 6, 49, seed=3), aux(3, 6, 49)
    x[:, 2:] += 3 * torch.randn(3, 4, 1, 12, generator=seeded(4))
    share = torch.stack([ids.div(49, rounding_mode="floor").bincount(minlength=6)
                         for ids in MASKS[name](x, 15, generator=seeded(), **extra)])
    assert (share != 15).any(1).all() if name in WHOLE else (share == 15).all(), share


@every
def test_a_guide_of_another_shape_is_refused_in_a_line(name):
    wrong = {"attention": [(2, 3, 9), (2, 24), (1, 3, 8)], "logits": [(2, 3, 9), (3, 8), (2, 3, 8, 1)],
             "aligned": [(2, 3, 8), (2, 3, 9, 8), (2, 2, 8, 8), ()], "text": [(2, 7), (1, 8), (2, 1, 8), ()]}
    given = aux(2, 3, 8)
    for need in NEEDS[name] & wrong.keys():
        for shape in wrong[need]:
            with pytest.raises(ValueError, match=rf"tokens \(2, 3, 8, 4\) want {need} \(2, .*\), got \(") as told:
                MASKS[name](torch.ones(2, 3, 8, 4), 3, generator=seeded(), **{**given, need: torch.ones(shape)})
            assert "\n" not in str(told.value)
    for grid in ((2, 3), (8,), (2, 2, 2), (-2, -4)) if "grid" in NEEDS[name] else ():
        with pytest.raises(ValueError, match=r"want a grid \(h, w\) of h \* w = 8, got \("):
            MASKS[name](torch.ones(2, 3, 8, 4), 3, generator=seeded(), **{**given, "grid": grid})


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_is_refused_and_unchecked_it_spoils_its_own_clip_alone(name, bad):
    x, extra = clumps(3, 3, 16), aux(3, 3, 16)
    want = MASKS[name](x, 5, generator=seeded(), **extra)
    spoilt = [(x.clone(), extra)]
    spoilt[0][0][1, 1, 3, 2] = spoilt[0][0][1, 2, 5] = bad
    for need in NEEDS[name] - {"tokens", "grid", "generator"}:
        spoilt.append((x, {**extra, need: extra[need].clone()}))
        spoilt[-1][1][need][1, ..., 1] = bad
    for tokens, guide in spoilt:
        with pytest.raises(ValueError, match="finite values"):
            MASKS[name](tokens, 5, generator=seeded(), **guide)
        keep = MASKS[name](tokens, 5, generator=seeded(), check=False, **guide)
        check_contract(keep, 3, 3, 16, 5, name)
        assert keep[[0, 2]].equal(want[[0, 2]])


@every
def test_there_is_a_statement_of_every_row_and_a_line_of_words(name):
    assert name in STATED
    words = MASKS[name].__doc__
    assert ("Budget:" in words) == (name in WHOLE) and ("Left out:" in words) == name.endswith("_style")


# The draws.

@pytest.mark.parametrize("name", ["umt_global", "adamae"])
def test_a_draw_from_the_whole_clip_has_the_odds_of_its_guide(name):
    weight = torch.tensor([[0.05, 0.25, 0.1], [0.3, 0.2, 0.1]])
    guide = {"attention": weight} if name == "umt_global" else {"logits": weight.log() + 7}
    draw = lambda shape, K: MASKS[name](torch.zeros(DRAWS, *shape, 1), K, generator=seeded(1), **{
        k: v.view(shape).expand(DRAWS, *shape) for k, v in guide.items()})
    check_odds(draw((1, 6), 1), weight.flatten(), 6, sigmas=3)
    check_odds(draw((2, 3), 1), inclusion(weight.flatten().tolist(), 2), 6, sigmas=3)       # two of the clip


def test_everest_gives_the_tokens_that_change_most_the_same_odds_and_others_none():
    x = torch.zeros(DRAWS, 2, 10, 1)
    x[:, 1, [2, 5, 7]] = torch.tensor([3.0, 1.0, 2.0])[:, None]
    want = [n % 10 in (2, 5, 7) and 1 / 3 for n in range(20)]                   # 30 % of 20: these, of both frames
    check_odds(MASKS["everest"](x, 1, generator=seeded(2)), want, 20, sigmas=3)


def test_smaug_gives_the_tokens_of_least_attention_no_chance():
    keep = MASKS["smaug_style"](torch.zeros(DRAWS, 1, 6, 1), 1, generator=seeded(3),
                                attention=torch.tensor([3.0, 6.0, 1.0, 5.0, 2.0, 4.0]).expand(DRAWS, 1, 6))
    # The best of a random three of six: the best is among them in 1/2, the second, without it, in 3/10, and so on.
    check_odds(keep, [1 / 20, 1 / 2, 0, 3 / 10, 0, 3 / 20], 6, sigmas=3)


def test_block3d_hides_one_compact_block_where_one_is_enough():
    B, h, w = 2000, 14, 14
    keep = MASKS["block3d"](torch.zeros(B, 1, h * w, 1), h * w - 20, grid=(h, w), generator=seeded(4))
    seen = torch.zeros(B, h * w).scatter(1, keep, 1).view(B, h, w)
    for axis in (1, 2):
        lines = (seen == 0).any(axis)                               # of a block that is at most sqrt(0.15 hw 1.5) long
        first, last = lines.int().argmax(1), lines.shape[1] - 1 - lines.flip(1).int().argmax(1)
        assert (last - first).max() < 7
    assert len(keep.unique(dim=0)) == B


def test_mgmae_follows_what_moves():
    # Distinct tokens, each frame the last moved by one place to the right: so is what is kept.
    g, wide = seeded(5), torch.randn(6, 16, 32, generator=seeded(6))
    x = torch.stack([wide[:, 5 - t:15 - t] for t in range(5)]).reshape(1, 5, 60, 32)
    seen = torch.zeros(300).scatter(0, MASKS["mgmae_style"](x, 20, grid=(6, 10), generator=g)[0], 1).view(5, 6, 10)
    middle = slice(4, 6)                                                        # two to either side are still in view
    for t in range(5):
        assert (seen[t, :, middle.start + t - 2:middle.stop + t - 2] == seen[2, :, middle]).double().mean() > 0.8
    still = MASKS["mgmae_style"](x[:, :1].expand(1, 5, 60, 32), 20, grid=(6, 10), generator=g)
    assert (still % 60).view(5, 20).unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("N", [6, 17, 33, 60])
def test_a_component_of_scissor_can_be_one_long_chain(N):
    # Token i is 1 from i to i + 7: neighbours have cosine 7/8, those beyond 6/8. The last token is alone.
    chain = torch.ones(N, N + 8).triu().tril(7)[torch.randperm(N, generator=seeded(N))]
    x = torch.cat([chain, -torch.ones(1, N + 8)])[None, None]
    keep = MASKS["scissor_style"](x, 2)
    assert keep.tolist() == stated("scissor_style", x, 2, {"grid": None}, 0) and keep[0, 1] == N


def test_every_cluster_of_kmeans_has_tokens_however_many_are_equal():
    from masks import lloyd
    for x in kinds(3, 20):
        for K in (1, 7, 19, 20):
            labels = lloyd(x, K)
            assert all(frame.unique().tolist() == list(range(K)) for frame in labels)
