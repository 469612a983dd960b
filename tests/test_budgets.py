"""budgets.py and masking.select: budgets dealt exactly, FluxViT's selector against a loop, any mask at any budget."""

import math
from itertools import pairwise, product
from random import Random

import numpy as np
import pytest
import torch
from helpers.kernels import captured, needs_cuda, seeded, unkind
from helpers.masks import STOCHASTIC, mask_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import masking
from budgets import deal, frame_budgets
from masking import CLIP_BUDGET, MASKS, MaskConfig, cluster_stm, group_dynamic, select

FIRST = ["copy", "across"]


def group_sizes(T, N, groups=4):
    """Tokens of each group of a clip."""
    G = max(1, min(groups, T // 2))
    return [N * ((g + 1) * T // G - g * T // G) for g in range(G)]


def assert_ids(ids, B, total, pool):
    assert ids.shape == (B, total) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < pool and (ids.diff(dim=1) > 0).all()


def is_subset(ids, larger):
    return all({*a} <= {*b} for a, b in zip(ids.tolist(), larger.tolist(), strict=True))


# deal and frame_budgets.

def turns(sizes):
    """The places that get 1, one after another: all pairs (round, place) that exist, in their order."""
    return [place for _, place in sorted((turn, place) for place, size in enumerate(sizes) for turn in range(size))]


def test_a_budget_is_dealt_in_turn():
    assert deal(0, [3, 5]) == [0, 0] and deal(0, []) == [] and deal(7, [0, 7, 0]) == [0, 7, 0]
    assert deal(10, [3, 1, 9]) == [3, 1, 6] and deal(10, [4, 4, 4]) == [4, 3, 3]
    for sizes in ([1], [5, 5, 5], [9, 2, 0, 7], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [0, 0, 40, 1, 40],
                  *(group_sizes(T, N) for T in range(1, 33) for N in (1, 2, 7)), group_sizes(31, 400), [400] * 32):
        order = turns(sizes)
        expected, counts = [0] * len(sizes), []
        for place in order:
            counts.append(expected.copy())
            expected[place] += 1
        assert [deal(total, sizes) for total in range(len(order))] == counts, sizes
        assert deal(len(order), sizes) == expected == sizes


def test_every_clip_of_up_to_32_frames_of_400_tokens_is_dealt_exactly():
    """
    For all T <= 32 and N <= 400, at every total around which a group fills up, and some others. Where the largest share
    is L, places of fewer than L tokens are full, and the first of the others, at least one, have L, the rest L - 1.
    """
    draw = Random(0)
    for T in range(1, 33):
        cases = []
        for N in range(1, 401):
            sizes = group_sizes(T, N)
            full = [sum(min(size, level) for size in sizes) for level in sizes]
            totals = {total + i for total in full for i in (-1, 0, 1)} | {draw.randint(1, T * N) for _ in range(3)}
            cases += [(deal(total, sizes), sizes, total) for total in totals if 1 <= total <= T * N]
        budgets, sizes, totals = (np.array(column) for column in zip(*cases, strict=True))
        assert (budgets.sum(1) == totals).all()
        level = budgets.max(1, keepdims=True)
        behind = level - budgets
        assert (budgets[sizes < level] == sizes[sizes < level]).all()
        for row, larger in zip(behind, sizes >= level, strict=True):
            assert sorted(row[larger]) == [*row[larger]] and {*row[larger]} <= {0, 1}


@pytest.mark.parametrize("total, sizes, message", [
    (13, [4, 8], "0 to 12, the sum of the sizes, got 13"), (-1, [4], "0 to 4, .* got -1"), (1, [], "0 to 0, .* got 1")])
def test_a_budget_outside_the_sizes_is_refused(total, sizes, message):
    with pytest.raises(ValueError, match=f"budget .*{message}"):
        deal(total, sizes)


def test_the_frames_of_a_clip_get_equal_budgets_up_to_one_spread_over_the_clip():
    assert [[t for t in range(8) if frame_budgets(r, 8, 5)[t]] for r in (1, 2, 3, 5)] == [
        [0], [0, 4], [0, 2, 4], [0, 1, 2, 4, 6]]
    for T in range(1, 33):
        before = [0] * T
        for rest in range(T + 1):
            budgets = frame_budgets(rest, T, 400)
            assert sum(budgets) == rest and {*budgets} <= {0, 1} and all(map(int.__ge__, budgets, before))
            for K in (1, 17, 399):
                assert frame_budgets(K * T + rest, T, 400) == [K + extra for extra in budgets]
            assert T < 2 or rest < T or frame_budgets(T, T, 1) == budgets
            # Any run of frames has its part of the rest, up to 2.25 of them.
            cumulative = np.cumsum([0, *budgets]) - rest / T * np.arange(T + 1)
            assert cumulative.max() - cumulative.min() < 2.25, (T, rest)
            before = budgets


# group_dynamic.

def l2(a, b):
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def selector(clip, total, groups, first):
    """group_dynamic, a token at a time: clip T x N tokens as lists of numbers -> ids."""
    T, N = len(clip), len(clip[0])
    G = max(1, min(groups, T // 2))
    queues = []
    for g in range(G):
        frames, keys = range(math.floor(g * T / G), math.floor((g + 1) * T / G)), []
        for t, n in product(frames, range(N)):
            mean = [sum(values) / N for values in zip(*clip[t], strict=True)]
            repeats = t == 0 or t == frames[0] and first == "copy"
            other = mean if T == 1 else clip[t + 1][n] if repeats else clip[t - 1][n]
            keys.append((-l2(clip[t][n], other), -l2(clip[t][n], mean), t * N + n))
        queues.append([i for *_, i in sorted(keys)])
    ids = []
    while len(ids) < total:
        for queue in queues:
            if queue and len(ids) < total:
                ids.append(queue.pop(0))
    return sorted(ids)


def test_the_selector_equals_a_plain_loop_on_2000_random_clips():
    """Values are multiples of N, so that means, squares and sums are exact, and many changes and distances tie."""
    draw, g = Random(1), seeded(1)
    for case in range(2000):
        B, T, N, C = draw.choice((1, 1, 2, 3)), draw.randint(1, 32), draw.randint(1, 5), draw.randint(1, 3)
        total, groups, first = draw.randint(1, T * N), draw.choice((1, 2, 3, 4, 4, 5, 9, 40)), draw.choice(FIRST)
        x = N * torch.randint(draw.choice((2, 3, 9)), (B, T, N, C), generator=g).float()
        if case % 5 == 0:
            x[:, T // 3:2 * T // 3 + 1] = x[:, T // 3:T // 3 + 1]                   # nothing moves in these frames
        expected = [selector(clip, total, groups, first) for clip in x.double().tolist()]
        ids = group_dynamic(x, total, groups=groups, first=first)
        assert ids.tolist() == expected, (case, B, T, N, total, groups, first)
        assert_ids(ids, B, total, T * N)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_changes_are_compared_in_fp32(dtype):
    x = torch.randn(3, 6, 20, 16, generator=seeded(2)).to(dtype)
    strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_()
    for total in (1, 37, 120):
        expected = group_dynamic(x.float(), total)
        assert group_dynamic(x, total).equal(expected) and group_dynamic(strided, total).equal(expected)
    # In half precision most changes are alike.
    close = 1 + torch.rand(1, 4, 50, 1, generator=seeded(3)).to(dtype) / 8
    assert group_dynamic(close, 41).tolist() == [selector(close[0].double().tolist(), 41, 4, "copy")]


def test_the_selector_does_not_depend_on_the_chunks_of_a_cpu(monkeypatch):
    x = torch.randn(5, 7, 9, 4, generator=seeded(4))
    expected = group_dynamic(x, 30)
    for size in (1, 2 * 7 * 9 * 4 * 4):
        monkeypatch.setattr("kernels.CPU_CHUNK_BYTES", size)
        assert group_dynamic(x, 30).equal(expected)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("T, N", [(1, 7), (2, 5), (3, 6), (5, 4), (8, 6), (13, 3)])
def test_the_ids_of_a_total_are_among_those_of_the_next(T, N, first):
    few_values = torch.eye(4)[torch.randint(4, (2, T, N), generator=seeded(5))]
    for x in (unkind(2, T, N, 6), torch.ones(1, T, N, 2), few_values):
        kept = [group_dynamic(x, total, first=first) for total in range(1, T * N + 1)]
        assert all(is_subset(ids, larger) for ids, larger in pairwise(kept))
        assert kept[-1].equal(torch.arange(T * N).expand(len(x), -1))               # the pool


@pytest.mark.parametrize("T", [4, 7, 8, 11, 16])
def test_a_change_in_one_group_moves_no_ids_of_another(T):
    N, G = 10, min(4, T // 2)
    x = torch.randn(2, T, N, 5, generator=seeded(T))
    for g in range(G):
        inside, moved = slice(g * T // G, (g + 1) * T // G), x.clone()
        moved[:, inside] = torch.randn(2, inside.stop - inside.start, N, 5, generator=seeded(100 + g)) * 9
        for total, first in product((T * 3, T * 4 + 1), FIRST):
            changed = set()
            for a, b in zip(group_dynamic(x, total, first=first).tolist(),
                            group_dynamic(moved, total, first=first).tolist(), strict=True):
                changed |= {i // N for i in {*a} ^ {*b}}
            groups = {next(h for h in range(G) if t < (h + 1) * T // G) for t in changed}
            # "across" compares the first frame of the next group with a frame that has moved.
            assert g in groups and groups <= ({g} if first == "copy" else {g, g + 1})


@pytest.mark.parametrize("first", FIRST)
def test_a_clip_that_rests_keeps_what_differs_from_its_frame_and_no_corner(first):
    T, N = 8, 36
    frame = torch.rand(N, 6, generator=seeded(6))
    x = frame.expand(1, T, N, 6)
    order = (frame - frame.mean(0)).norm(dim=-1).argsort(descending=True).tolist()
    for K in (1, 5, 20):
        expected = sorted(t * N + n for t in range(T) for n in order[:K])
        assert group_dynamic(x, K * T, first=first).tolist() == [expected]
        assert {*order[:K]} != {*range(K)}                                          # what raster order keeps
    # A moving token comes first, before those that differ more from their frame.
    moving = x.clone()
    moving[:, 1::2, 3] += 1e-3
    assert {i % N for i in group_dynamic(moving, T, first=first)[0].tolist()} == {3}


def test_the_first_frame_of_a_group_is_compared_with_the_group_before_only_across():
    x = torch.zeros(1, 4, 5, 1)
    x[:, 2:, 1] = 1                                                                 # changes between the groups alone
    x[:, 1, 4] = x[:, 3, 4] = 0.5
    assert group_dynamic(x, 2, groups=2, first="across").tolist() == [[9, 11]]
    assert group_dynamic(x, 4, groups=2, first="copy").tolist() == [[4, 9, 14, 19]]


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 10])
def test_the_mask_is_the_selector_at_T_times_keep(T):
    x = torch.randn(2, T, 9, 4, generator=seeded(T))
    for keep in (1, 4, 9):
        ids = MASKS["flux_group_dynamic"](x, keep)
        assert ids.equal(group_dynamic(x, T * keep))
        groups = torch.stack([((ids >= stop - size) & (ids < stop)).sum(1) for size, stop in
                              zip(group_sizes(T, 9), np.cumsum(group_sizes(T, 9)).tolist(), strict=True)], 1)
        assert groups.tolist() == [deal(T * keep, group_sizes(T, 9))] * 2
    # Equal to its definition before it had a budget: in each pair of eight frames, the K places that change most.
    if T == 8:
        change = (x[:, 1::2] - x[:, ::2]).norm(dim=-1)
        top = change.topk(4).indices.sort(-1).values
        expected = torch.stack([top + 9 * (2 * torch.arange(4)[:, None] + t) for t in (0, 1)], 2).flatten(1)
        assert MASKS["flux_group_dynamic"](x, 4).equal(expected)


def test_a_nan_is_refused_or_unchecked_confined_to_its_clip():
    x = torch.randn(3, 8, 9, 4, generator=seeded(7))
    bad = x.clone()
    bad[1, 2, 3, 1], bad[1, 5] = math.nan, math.inf
    for run in (group_dynamic, lambda *args, **options: select("flux_group_dynamic", *args, **options)):
        with pytest.raises(ValueError, match="finite, got 37 NaN or infinite of 864") as error:
            run(bad, 20)
        assert "\n" not in str(error.value)
        ids = run(bad, 20, check=False)
        assert_ids(ids, 3, 20, 72)
        assert ids[[0, 2]].equal(group_dynamic(x, 20)[[0, 2]])


@pytest.mark.parametrize("tokens, total, options, message", [
    (torch.ones(1, 3, 4, 2), 0, {}, "total must be in 1 to 12, .*got 0"),
    (torch.ones(1, 3, 4, 2), 13, {}, "total must be in 1 to 12, .*got 13"),
    (torch.ones(3, 4, 2), 2, {}, r"\(B, T, N, C\), got \(3, 4, 2\)"),
    (torch.ones(1, 3, 0, 2), 2, {}, r"no empty axis, got \(1, 3, 0, 2\)"),
    (torch.ones(1, 3, 4, 2).long(), 2, {}, "got torch.int64"),
    (torch.ones(1, 3, 4, 2), 2, {"groups": 0}, "groups must be at least 1, got 0"),
    (torch.ones(1, 3, 4, 2), 2, {"first": "mean"}, "first must be one of copy, across, got 'mean'"),
], ids=range(7))
def test_impossible_arguments_are_refused(tokens, total, options, message):
    with pytest.raises(ValueError, match=message) as error:
        group_dynamic(tokens, total, **options)
    assert "\n" not in str(error.value)
    for name in ("random_frame", "dynamic", "cluster_stm") if not options else ():
        with pytest.raises(ValueError, match=message):
            select(name, tokens, total, generator=seeded(0))


# select.

all_masks = pytest.mark.parametrize("name", MASKS)


@all_masks
def test_a_mask_keeps_exactly_any_total_of_a_clip(name):
    for B, T, N in ((2, 5, 9), (1, 1, 12), (2, 2, 1)):
        x, inputs = torch.randn(B, T, N, 6, generator=seeded(N)), mask_inputs(B, T, N)
        for total in {1, 2, T - 1, T, T + 1, 2 * T + 3, T * N // 2, T * N - 1, T * N}:
            if not 1 <= total <= T * N:
                continue
            ids = select(name, x, total, generator=seeded(0), **inputs)
            assert_ids(ids, B, total, T * N)
            if name not in CLIP_BUDGET:
                share = torch.stack([(clip // N).bincount(minlength=T) for clip in ids])
                assert share.tolist() == [frame_budgets(total, T, N)] * B
            for mask in (MASKS[name], MaskConfig(name)):
                assert select(mask, x, total, generator=seeded(0), check=False, **inputs).equal(ids)
            if total % T == 0:
                assert MASKS[name](x, total // T, generator=seeded(0), **inputs).equal(ids)


NOT_NESTED = ["cluster_stm", "fastvid_style", "kmeans"]
OPTIONS = [*((name, {}) for name in MASKS),
           *(("cluster_stm", options) for options in (
               {"assign": "parent"}, {"pick": "centre"}, {"assign": "parent", "pick": "lowest"},
               {"assign": "parent", "pick": "random"}, {"pick": "random"}, {"pick": "lowest"}))]


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_totals_of_most_masks_are_nested(name, options):
    """Of the masks that select's docstring excepts, some total must keep what a larger one does not."""
    is_nested = name not in NOT_NESTED or options.get("assign") == "parent" or options.get("pick") == "centre"
    violations = 0
    for seed in range(2):
        x, inputs = torch.randn(2, 3, 16, 8, generator=seeded(seed)), mask_inputs(2, 3, 16, seed=seed)
        kept = [select(MASKS[name], x, total, generator=seeded(seed), **inputs, **options) for total in range(1, 49)]
        violations += sum(not is_subset(ids, larger) for ids, larger in pairwise(kept))
    assert (violations == 0) == is_nested, violations


def test_select_passes_on_the_options_of_a_config():
    x = torch.randn(2, 3, 20, 16, generator=seeded(8))
    config = MaskConfig(quantile=0.3, assign="parent", pick="lowest")
    few, many = (cluster_stm(x, K, quantile=0.3, assign="parent", pick="lowest").tolist() for K in (5, 6))
    assert frame_budgets(16, 3, 20) == [6, 5, 5]
    expected = [sorted([i for i in b if i < 20] + [i for i in a if i >= 20]) for a, b in zip(few, many, strict=True)]
    assert select(config, x, 16).tolist() == expected
    assert select(cluster_stm, x, 16, quantile=0.3, assign="parent", pick="lowest").tolist() == expected
    assert not select("cluster_stm", x, 16).tolist() == expected


@pytest.mark.parametrize("name", STOCHASTIC)
def test_select_draws_once(name):
    """Frames with one token more have the same draws, and what is drawn next does not depend on the total."""
    x, inputs, after = torch.zeros(2, 4, 16, 1), mask_inputs(2, 4, 16), []
    for total in (12, 14):
        generator = seeded(9)
        ids = select(name, x, total, generator=generator, **inputs)
        after.append(torch.rand(3, generator=generator))
    generator = seeded(9)
    MASKS[name](x, 3, generator=generator, **inputs)
    assert after[0].equal(after[1]) and after[0].equal(torch.rand(3, generator=generator))
    if name in ("tube", "block3d"):
        frames = [{i % 16 for i in ids[0].tolist() if i // 16 == t} for t in range(4)]
        assert frames[1] == frames[3] < frames[0] == frames[2] and len(frames[0]) == 4


def test_a_mask_is_called_at_most_twice():
    calls = []

    def mask(tokens, keep, **aux):
        calls.append(keep)
        return MASKS["attention_high"](tokens, keep, **aux)

    for total, expected in ((3, [1]), (8, [1]), (20, [2, 3]), (24, [3]), (71, [8, 9]), (72, [9])):
        calls.clear()
        assert select(mask, torch.ones(2, 8, 9, 1), total, **mask_inputs(2, 8, 9)).shape == (2, total)
        assert calls == expected


def test_select_refuses_what_it_cannot_apply(monkeypatch):
    x, inputs = torch.randn(2, 4, 9, 3, generator=seeded(10)), mask_inputs(2, 4, 9)
    with pytest.raises(ValueError, match="mask must be one of cluster_stm, .*, got 'flux'"):
        select("flux", x, 5)
    wrapped = lambda tokens, keep, **aux: MASKS["evs"](tokens, keep)                # its budget is the clip's
    with pytest.raises(ValueError, match="keep 2 tokens of each of 4 frames or have a registered clip budget.*lambda"):
        select(wrapped, x, 10)
    with pytest.raises(ValueError, match=r"attention \(B, T, N\), got None"):
        select("umt", x, 10, generator=seeded(0))
    for name in ("umt", "umt_global"):
        with pytest.raises(ValueError, match="generator .*got None"):
            select(name, x, 10, **inputs)
        with pytest.raises(ValueError, match=r"attention must be \(2, 4, 9\)"):
            select(name, x, 10, generator=seeded(0), attention=torch.ones(2, 9))


def test_a_registered_mask_gets_the_total_of_the_clip(monkeypatch):
    for registry in ("MASKS", "MASK_INPUTS", "CLIP_BUDGET"):
        monkeypatch.setattr(masking, registry, getattr(masking, registry).copy())

    @masking.register_mask("tokens", clip_budget=True)
    def last_tokens(x, S):
        return torch.arange(x.shape[1] * x.shape[2] - S, x.shape[1] * x.shape[2]).flip(0).expand(len(x), S)

    x = torch.ones(2, 3, 4, 1)
    assert masking.MASKS["last_tokens"](x, 2).tolist() == [[6, 7, 8, 9, 10, 11]] * 2
    assert masking.select("last_tokens", x, 5).tolist() == [[7, 8, 9, 10, 11]] * 2


# A GPU: nothing waits for it.

class HostReads(TorchDispatchMode):
    """Record operations between the host and "meta", a device without values. Reading one of them raises by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({x.is_meta for x in tensors}) > 1:
            self.found.append(func.__name__)
        return result


@pytest.mark.parametrize("T", [1, 2, 7, 8])
def test_no_selection_reads_values_on_the_host(T):
    x = torch.empty(2, T, 9, 4, device="meta", dtype=torch.bfloat16)
    inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in mask_inputs(2, T, 9).items()}
    with HostReads() as reads:
        for total, groups, first in product((1, T, 5 * T - 1, 9 * T), (1, 4), FIRST):
            assert group_dynamic(x, total, groups=groups, first=first, check=False).shape == (2, total)
        for name in ("cluster_stm", "attention_high", "attention_low", "dynamic", "flux_group_dynamic"):
            assert select(name, x, 5 * T - 1, check=False, **inputs).shape == (2, 5 * T - 1)
        assert reads.found == []
        x[:, torch.tensor([0])]
        assert reads.found                                                          # indices of the host are copied


@needs_cuda
@pytest.mark.gpu
def test_a_cuda_graph_captures_the_selector():
    x = torch.randn(4, 10, 196, 64, generator=seeded(11)).cuda().bfloat16()
    for total, first in product((1, 333, 1960), FIRST):
        expected = group_dynamic(x, total, first=first)
        assert captured(lambda t=total, f=first: group_dynamic(x, t, first=f, check=False)).equal(expected)
        assert captured(lambda t=total: select("dynamic", x, t, check=False)).equal(select("dynamic", x, total))
    integers = (49 * torch.randint(5, (2, 7, 49, 8), generator=seeded(12))).float()
    assert group_dynamic(integers.cuda(), 100).cpu().equal(group_dynamic(integers, 100))
