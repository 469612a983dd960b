"""tools.mask_stats: each statistic against loops in fp64 and cases made by hand, the two commands on a small set."""

import math

import numpy as np
import pytest
import torch
from helpers.benchmarks import load_json
from helpers.runs import assert_one_line, command
from helpers.tables import markdown_tables

from annotations import normalize_caption
from masking import MASKS, MaskConfig, keep_count
from siglip_files import SigLIPConfig, TextConfig, VisionConfig
from targets import select_visible
from teacher import SigLIP
from tokenizer import load_tokenizer
from tools import mask_stats
from tools.demo import objects_at, objects_kept
from tools.mask_stats import (
    PICKS,
    PRESET,
    Bandwidth,
    ClipSet,
    Masks,
    Quantiles,
    choose_quantile,
    cluster_coverage,
    cluster_labels,
    leakage,
    load_clips,
    main,
    mask_metrics,
    mask_row,
    measure_bandwidth,
    recurrence_rate,
    run_mask,
)
from video import eval_transform, read_frames

SIZE, PATCH, GRID = 32, 8, (4, 4)
KEYS = {"objects", "per token", "clusters", "recurrence", "leakage", "same frame", "lost", "ms"}


@pytest.fixture(scope="module")
def teacher(sprites, tmp_path_factory):
    """Folder of an untrained teacher: frames of 16 x 16 pixels, 16 tokens."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(sprites)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = TextConfig(**small, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=12, pad_token_id=0)
    folder = str(tmp_path_factory.mktemp("teacher"))
    SigLIP(SigLIPConfig(VisionConfig(**small, image_size=16, patch_size=4), text), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def options(sprites, teacher, tmp_path):
    return dict(teacher=teacher, clips=sprites, count=5, ratio=(0.75,), out=str(tmp_path / "found.json"))


def random_clips(B=4, T=4, K=3, seed=0, C=5):
    """A ClipSet of random tokens and boxes that move, come and leave; visible ids (B, TK), K in each frame."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 20, (B, 1, 3, 2)) + rng.uniform(-6, 6, (B, T, 3, 2)).cumsum(1)
    boxes = np.concatenate([low, low + rng.uniform(3, 14, (B, 1, 3, 2))], -1).astype(np.float32)
    boxes[rng.random((B, T, 3)) < 0.2] = np.nan
    boxes[(boxes[..., 2:].min(-1) < 0.5) | (boxes[..., :2].max(-1) > SIZE - 0.5)] = np.nan      # out of view
    visible = torch.from_numpy(rng.random((B, T, 16)).argsort(-1)[..., :K])
    tokens = torch.from_numpy(rng.normal(size=(B, T, 16, C)) + rng.normal(size=(B, 1, 16, C))).float()
    return ClipSet(tokens, {}, boxes, SIZE, PATCH), flat_ids(visible)


def flat_ids(visible):
    """Visible tokens of each frame (B, T, K) -> flat ids (B, TK), ascending."""
    return (visible.sort(-1).values + 16 * torch.arange(visible.shape[1])[:, None]).flatten(1)


def visible_tokens(ids, b):
    """The visible tokens of clip b, {(t, n)}."""
    return {divmod(i, 16) for i in ids[b].tolist()}


def on_object(box, n):
    """Whether token n is on the box: they share a quarter of the smaller of both."""
    x0, y0, x1, y1 = (min(max(float(v), 0), SIZE) for v in box)
    left, top = n % 4 * PATCH, n // 4 * PATCH
    w, h = min(x1, left + PATCH) - max(x0, left), min(y1, top + PATCH) - max(y0, top)
    return max(w, 0) * max(h, 0) / min((x1 - x0) * (y1 - y0), PATCH * PATCH) >= 0.25


def objects_on(boxes, b, t, n):
    """The objects that token n of frame t is on."""
    return {o for o in range(boxes.shape[2]) if boxes[b, t, o, 0] == boxes[b, t, o, 0]
            and on_object(boxes[b, t, o], n)}


def as_bool(ids, T):
    """Flat ids (B, S) -> (B, T, N) bool."""
    return torch.zeros(len(ids), T * 16, dtype=torch.bool).scatter(1, ids, True).view(len(ids), T, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

@pytest.mark.parametrize("K", [1, 3, 16])
def test_objects_and_objects_per_token_are_what_loops_count(K):
    clips, ids = random_clips(K=K)
    B, T, _, _ = clips.tokens.shape
    kept, in_view = 0, 0
    for b in range(B):
        for t in range(T):
            tokens = [n for s, n in visible_tokens(ids, b) if s == t]
            in_view += sum(box[0] == box[0] for box in clips.boxes[b, t])
            kept += len(set().union(*(objects_on(clips.boxes, b, t, n) for n in tokens)))
    metrics = mask_metrics(clips, ids, torch.zeros(B, T, 16, dtype=torch.int64), 1)
    assert 0 < kept <= in_view and (kept == in_view) == (K == 16)
    assert metrics["objects"] == pytest.approx(kept / in_view)
    assert metrics["per token"] == pytest.approx(kept / (B * T * K))


def test_a_token_is_on_an_object_if_objects_kept_counts_it():
    clips, _ = random_clips()
    on = objects_at(clips.boxes, SIZE, PATCH)
    assert on.shape == (4, 4, 3, 16) and on.any() and not on[torch.from_numpy(np.isnan(clips.boxes[..., 0]))].any()
    for b in range(4):
        for t in range(4):
            for n in range(16):
                assert set(on[b, t, :, n].nonzero().flatten().tolist()) == objects_on(clips.boxes, b, t, n)
                one = objects_kept(torch.tensor([[n]]), clips.boxes[b:b + 1, t:t + 1], SIZE, PATCH) \
                    if (~np.isnan(clips.boxes[b, t, :, 0])).any() else 0
                assert (one > 0) == on[b, t, :, n].any()


@pytest.mark.parametrize("K", [1, 5])
def test_cluster_coverage_is_what_a_loop_counts(K):
    clips, ids = random_clips(K=K)
    labels = cluster_labels(clips.tokens, 6, MaskConfig(quantile=0.5))
    assert labels.shape == (4, 4, 16) and all(len(set(f.tolist())) == 6 for f in labels.flatten(0, 1))
    covered = sum(any(labels[b, t, n] == k for s, n in visible_tokens(ids, b) if s == t)
                  for b in range(4) for t in range(4) for k in range(6))
    assert cluster_coverage(as_bool(ids, 4), labels, 6) == pytest.approx(covered / (4 * 4 * 6))


def test_cluster_stm_covers_its_own_clusters_but_not_those_of_another_d_c():
    clips, _ = random_clips(K=3)
    for quantile in (0.1, 0.9):
        mask = MaskConfig(quantile=quantile)
        ids = mask(clips.tokens, 6)
        assert cluster_coverage(as_bool(ids, 4), cluster_labels(clips.tokens, 6, mask), 6) == 1
    assert cluster_coverage(as_bool(ids, 4), cluster_labels(clips.tokens, 6, MaskConfig(quantile=0.1)), 6) < 1


def recurrence_by_hand(boxes, ids):
    B, T = boxes.shape[:2]
    recurring, count = 0, 0
    for b in range(B):
        visible = visible_tokens(ids, b)
        for t, n in visible:
            if t == T - 1:
                continue
            count += 1
            objects = objects_on(boxes, b, t, n)
            near = [(n // 4 + dy, n % 4 + dx) for dy, dx in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
            near = {4 * y + x for y, x in near if 0 <= y < 4 and 0 <= x < 4}
            recurring += any(objects & objects_on(boxes, b, t + 1, m) if objects else
                             m in near and not objects_on(boxes, b, t + 1, m) for s, m in visible if s == t + 1)
    return recurring / count


@pytest.mark.parametrize("K, seed", [(2, 0), (2, 1), (2, 2), (6, 3), (6, 4), (6, 5)])
def test_recurrence_is_what_a_loop_counts(K, seed):
    clips, ids = random_clips(K=K, seed=seed)
    rate = recurrence_rate(as_bool(ids, 4), objects_at(clips.boxes, SIZE, PATCH), GRID)
    assert rate == pytest.approx(recurrence_by_hand(clips.boxes, ids)) and 0 < rate < 1


def box(n, m=None):
    """The pixels of token n, or of the rectangle from token n to token m."""
    m = n if m is None else m
    return [n % 4 * PATCH, n // 4 * PATCH, m % 4 * PATCH + PATCH, m // 4 * PATCH + PATCH]


ABSENT = [np.nan] * 4
CASES = {       # boxes of two objects in two frames, visible tokens of each frame, share that recurs
    "an object moves, its token with it": ([[box(0), ABSENT], [box(15), ABSENT]], [[0], [15]], 1),
    "an object moves, its token stays": ([[box(0), ABSENT], [box(15), ABSENT]], [[0], [0]], 0),
    "an object leaves, its token stays": ([[box(0), ABSENT], [ABSENT, ABSENT]], [[0], [0]], 0),
    "another object takes its place": ([[box(0), ABSENT], [ABSENT, box(0)]], [[0], [0]], 0),
    "one of the objects that it is on": ([[box(5), box(5)], [box(0), box(15)]], [[5], [15]], 1),
    "another token of the object": ([[box(0, 5), ABSENT], [box(0, 5), ABSENT]], [[0], [5]], 1),
    "an object comes to where the ground was": ([[ABSENT, ABSENT], [box(6), ABSENT]], [[6], [6]], 0),
    "ground, the same place": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[6], [6]], 1),
    "ground, beside": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[6], [5]], 1),
    "ground, below": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[6], [10]], 1),
    "ground, across a corner": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[6], [11]], 0),
    "ground, two places on": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[6], [4]], 0),
    "ground, the next row's start is not beside": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[7], [8]], 0),
    "ground, the top is not beside the bottom": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[1], [13]], 0),
    "one of two": ([[box(0), ABSENT], [box(15), ABSENT]], [[0, 6], [7, 8]], 0.5),
    "nothing kept in the next": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[6, 7], []], 0),
    "nothing kept in the first": ([[ABSENT, ABSENT], [ABSENT, ABSENT]], [[], [6]], None),
}


@pytest.mark.parametrize("case", CASES)
def test_recurrence_of_objects_that_move_come_and_leave(case):
    boxes, visible, expected = CASES[case]
    ids = torch.tensor([[16 * t + n for t, frame in enumerate(visible) for n in frame]])
    on_object = objects_at(np.array([boxes], np.float32), SIZE, PATCH)
    assert recurrence_rate(as_bool(ids, 2), on_object, GRID) == expected


def leakage_by_hand(tokens, ids):
    """Leakage, the same within the frame, lost information, and the number of frames whose neighbours show no token."""
    errors, isolated = dict.fromkeys(("over", "within", "masked", "lost", "all"), 0.0), 0
    B, T, N, _ = tokens.shape
    for b in range(B):
        x = tokens[b].double().numpy()                                      # (T, N, C)
        mean, visible = x.reshape(T * N, -1).mean(0), visible_tokens(ids, b)
        isolated += sum(not any(abs(s - t) == 1 for s, _ in visible) for t in range(T))

        def smallest_error(token, frames, x=x, mean=mean, visible=visible):
            return min([((token - x[s, m]) ** 2).sum() for s, m in visible if s in frames],
                       default=((token - mean) ** 2).sum())

        for t in range(T):
            for n in range(N):
                errors["all"] += ((x[t, n] - mean) ** 2).sum()
                errors["lost"] += smallest_error(x[t, n], range(T))
                if (t, n) not in visible:
                    errors["masked"] += ((x[t, n] - mean) ** 2).sum()
                    errors["over"] += smallest_error(x[t, n], (t - 1, t + 1))
                    errors["within"] += smallest_error(x[t, n], (t,))
    return (1 - errors["over"] / errors["masked"], 1 - errors["within"] / errors["masked"],
            errors["lost"] / errors["all"], isolated)


@pytest.mark.parametrize("K", [1, 4, 15])
def test_leakage_and_lost_information_are_what_loops_sum(K):
    clips, ids = random_clips(K=K, T=5, B=2)
    *expected, isolated = leakage_by_hand(clips.tokens, ids)
    assert leakage(clips.tokens, as_bool(ids, 5)) == pytest.approx(expected) and isolated == 0


def test_leakage_is_zero_for_tokens_without_a_visible_neighbour_frame():
    clips, _ = random_clips(T=5, B=3)
    ids = torch.tensor([[3, 33, 34, 47], [17, 18, 19, 20], [0, 65, 66, 79]])
    *expected, isolated = leakage_by_hand(clips.tokens, ids)
    assert leakage(clips.tokens, as_bool(ids, 5)) == pytest.approx(expected) and isolated == 9
    ids = torch.tensor([[0, 1, 64, 65]])                                    # visible to frames 1 and 3,
    one = clips.tokens[:1, :, :, :1].clone()
    one[:, 1], one[:, 3] = one[:, 0, :1], one[:, 4, 1:2]                    # which are copies of them
    masked = (one - one.mean()).square()[~as_bool(ids, 5)]
    over_time = leakage(one, as_bool(ids, 5))[0]
    assert over_time == pytest.approx((masked[14:30].sum() + masked[46:62].sum()).item() / masked.sum().item())


def scalar_tokens(*rows):
    """Rows of numbers -> tokens (1, T, N, 1)."""
    return torch.tensor([rows], dtype=torch.float32)[..., None]


def visible_at(T, N, *places):
    """Places (t, n) -> (1, T, N) bool."""
    visible = torch.zeros(1, T, N, dtype=torch.bool)
    for t, n in places:
        visible[0, t, n] = True
    return visible


def test_leakage_of_tokens_made_by_hand():
    static = scalar_tokens([-1, 1, 3, -3], [-1, 1, 3, -3])
    # Each frame shows what the other one hides: everything leaks.
    assert leakage(static, visible_at(2, 4, (0, 0), (0, 1), (1, 2), (1, 3)))[0] == 1
    # The same place is visible in both frames, so looking over time adds nothing. Masked are 1, 3 and -3: the sum of
    # their squares is 19, of their errors to -1 4 + 16 + 4.
    over_time, same_frame, lost = leakage(static, visible_at(2, 4, (0, 0), (1, 0)))
    assert over_time == same_frame == pytest.approx(1 - 24 / 19) and over_time < 0
    assert lost == pytest.approx(24 / 20)
    # The visible token is as far from the masked ones as the mean: nothing is explained.
    assert leakage(scalar_tokens([0, 2, -2], [0, 2, -2]), visible_at(2, 3, (0, 0), (1, 0)))[0] == 0
    # 1.5 is copied from 2, and -1.5 from -2.
    over_time, same_frame, _ = leakage(scalar_tokens([2, -2, 0], [1.5, -1.5, 0]),
                                       visible_at(2, 3, (0, 0), (0, 1), (1, 2)))
    assert over_time == pytest.approx(1 - 2 * 0.25 / (2 * 2.25)) and same_frame == pytest.approx(1 - 8.5 / 4.5)
    # Neither the own frame is a neighbour nor one that is two frames away.
    visible = visible_at(3, 2, (0, 0), (0, 1))
    assert leakage(scalar_tokens([2, -2], [1, -1], [2, -2]), visible)[0] == pytest.approx(1 - (2 + 8) / (2 + 8))


def test_a_mask_that_keeps_everything_has_perfect_statistics():
    clips, ids = random_clips(K=16)
    clips.boxes[:] = clips.boxes[:, :1]                                     # static objects recur
    metrics = mask_metrics(clips, ids, cluster_labels(clips.tokens, 6, MaskConfig()), 6)
    pairs = (~np.isnan(clips.boxes[..., 0])).sum()
    assert metrics == {"objects": 1, "per token": pairs / (4 * 4 * 16), "clusters": 1, "recurrence": 1, "leakage": None,
                       "same frame": None, "lost": pytest.approx(0, abs=1e-12)}


def test_single_frames_have_no_recurrence_and_no_leakage_over_time():
    clips, ids = random_clips(T=1, K=4)
    metrics = mask_metrics(clips, ids, cluster_labels(clips.tokens, 6, MaskConfig()), 6)
    assert metrics["recurrence"] is None and metrics["leakage"] is None
    assert metrics["same frame"] == pytest.approx(leakage_by_hand(clips.tokens, ids)[1])


def test_tokens_without_variance_have_no_leakage():
    assert leakage(torch.ones(4, 4, 16, 5), as_bool(random_clips(K=4)[1], 4)) == (None, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Masks on clips

def test_clips_are_read_as_for_evaluation(options, sprites, teacher):
    model = SigLIP.from_pretrained(teacher)
    for split, count in (("test", 12), ("train", 3)):
        clips = load_clips(Masks(**{**options, "split": split, "count": count}))
        assert clips.tokens.shape == (count, 8, 16, 16) and clips.grid == (4, 4)
        video = eval_transform(read_frames(f"{sprites}/videos/{split}_00002.mp4", 8), 16)
        tokens = model.forward_features(model.normalize(video))
        torch.testing.assert_close(clips.tokens[2], tokens)
        torch.testing.assert_close(clips.aux["attention"][2], model.pool_attention(tokens))
        torch.testing.assert_close(clips.aux["logits"].exp(), clips.aux["attention"])
        torch.testing.assert_close(clips.aux["aligned"][2], model.token_embeddings(tokens, (4, 4)))
        caption = normalize_caption(load_json(f"{sprites}/sprites_{split}.json")[2]["caption"])
        torch.testing.assert_close(clips.aux["text"][2:3], model.encode_text(model.tokenize([caption])))
        boxes = np.load(f"{sprites}/sprites_boxes.npz")[split][:count]
        np.testing.assert_allclose(clips.boxes, boxes / 4)                   # 64 pixels are resized to 16


@pytest.mark.parametrize("name", ["cluster_stm", "umt", "tube"])
def test_a_mask_gets_the_inputs_of_training_and_each_clip_its_own_draw(options, teacher, name):
    clips, model, mask = load_clips(Masks(**options)), SigLIP.from_pretrained(teacher), MaskConfig(name)
    ids, ms, is_random = run_mask(mask, clips, 4, 7)
    assert ids.shape == (5, 32) and ms > 0 and is_random == (name != "cluster_stm")
    assert torch.equal(ids[:1], select_visible(model, clips.tokens[:1], mask, 0.75, 7))
    assert torch.equal(ids, run_mask(mask, clips, 4, 7)[0])
    assert len({tuple(row) for row in ids[:, :4 if name == "tube" else 32].tolist()}) > 1
    if is_random:
        assert not torch.equal(ids[0], run_mask(mask, clips, 4, 8)[0][0])


def test_a_mask_is_called_with_one_clip_and_all_inputs(options, monkeypatch):
    clips, calls = load_clips(Masks(**options)), []
    monkeypatch.setitem(MASKS, "tube", lambda x, keep, **aux: calls.append((x, aux)) or torch.arange(32)[None])
    run_mask(MaskConfig("tube"), clips, 4, 0)
    assert len(calls) == 5
    for i, (x, aux) in enumerate(calls):
        assert torch.equal(x, clips.tokens[i:i + 1]) and aux.pop("grid") == (4, 4) and aux.pop("generator")
        assert aux.keys() == {"attention", "logits", "text", "aligned"}
        assert all(torch.equal(value, clips.aux[key][i:i + 1]) for key, value in aux.items())


def test_random_masks_are_averaged_over_three_seeds_and_others_run_once(options):
    clips, K = load_clips(Masks(**options)), 4
    labels = cluster_labels(clips.tokens, K, PRESET)
    row = mask_row(MaskConfig(), clips, labels, K, 3)
    assert row["seeds"] == 1 and row["objects std"] is None and not row["whole clip"]
    assert {k: row[k] for k in KEYS - {"ms"}} == mask_metrics(clips, MaskConfig()(clips.tokens, K), labels, K)
    row = mask_row(MaskConfig("random"), clips, labels, K, 3)
    assert row["seeds"] == 3 and row["whole clip"]
    runs = [mask_metrics(clips, run_mask(MaskConfig("random"), clips, K, s)[0], labels, K) for s in (3, 4, 5)]
    for key in KEYS - {"ms"}:
        assert row[key] == pytest.approx(np.mean([run[key] for run in runs])), key
    assert 0 < row["objects std"] == pytest.approx(np.std([run["objects"] for run in runs], ddof=1))
    assert {**mask_row(MaskConfig("random"), clips, labels, K, 3), "ms": row["ms"]} == row
    assert mask_row(MaskConfig("random"), clips, labels, K, 4)["objects"] != row["objects"]
    assert not mask_row(MaskConfig("random_frame"), clips, labels, K, 3)["whole clip"]


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def test_masks_prints_and_writes_a_row_for_every_mask(options, sprites, teacher, capsys):
    flags = f"masks --teacher {teacher} --clips {sprites} --count 3 --ratio 0.75 0.9 --out {options['out']} --commit c0"
    code, out, err = command("tools.mask_stats", flags.split(), capsys)
    assert code == 0 and "commit c0" in out and "failed" not in out, err
    tables, result = markdown_tables(out), load_json(options["out"])
    assert [result[k] for k in ("count", "split", "quantile", "frames", "tokens")] == [3, "test", 0.95, 8, 16]
    assert len(tables) == 2 and "4 of 16 tokens a frame (0.75 hidden)" in out and "2 of 16" in out
    rows = result["rows"]
    assert [(r["ratio"], r["mask"]) for r in rows] == [(ratio, name) for ratio in (0.75, 0.9) for name in MASKS]
    assert [r["keep"] for r in rows] == [keep_count(16, r["ratio"]) for r in rows]
    for row, cells in zip(rows, (cells for table in tables for cells in table[1:]), strict=True):
        assert cells[0].split()[0] == row["mask"] and ("\\*" in cells[0]) == row["whole clip"], cells
        assert len(cells) == len(tables[0][0]) and cells[1].split()[0] == f"{100 * row['objects']:.1f}"
        assert ("(" in cells[1]) == (row["seeds"] == 3) == (row["objects std"] is not None)
        assert all(math.isfinite(row[key]) for key in KEYS)
        assert float(cells[-1]) == pytest.approx(row["ms"], rel=0.5)
    assert {r["mask"]: r["seeds"] for r in rows}["umt"] == 3 and rows[0]["clusters"] == 1


def test_quantiles_compares_settings_on_training_clips(options, capsys, monkeypatch):
    monkeypatch.setattr(mask_stats, "QUANTILES", (0.5, 0.95))
    main(Quantiles(**options))
    out, result = capsys.readouterr().out, load_json(options["out"])
    assert result["split"] == "train" and "5 train clips" in out
    rows = {(r["quantile"], r["pick"]): r for r in result["rows"]}
    assert list(rows) == [(q, p) for q in (0.5, 0.95) for p in ("density", "random", "centre", "lowest")]
    table, = markdown_tables(out)
    assert table[0] == ["quantile", "pick", "objects %", "clusters %", "recurrence %", "leakage %"]
    assert [cells[:2] for cells in table[1:]] == [[f"{q:g}", p] for q, p in rows]
    assert {k: r["seeds"] for k, r in rows.items()} == {k: 3 if k[1] == "random" else 1 for k in rows}
    assert all(rows[0.95, pick]["clusters"] == 1 for pick in PICKS) and rows[0.5, "centre"]["clusters"] < 1
    assert len({rows[0.95, pick]["objects"] for pick in PICKS}) > 1
    main(Masks(**{**options, "split": "train", "mask": ("cluster_stm",)}))
    row, = load_json(options["out"])["rows"]
    assert {k: rows[0.95, "density"][k] for k in KEYS - {"ms"}} == {k: row[k] for k in KEYS - {"ms"}}


def test_the_quantile_is_that_of_the_mask_and_of_the_clusters(options, monkeypatch):
    threads, rows = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for quantile in (0.2, 0.95):
        main(Masks(**{**options, "mask": ("cluster_stm",), "quantile": quantile}))
        rows += load_json(options["out"])["rows"]
    assert rows[0]["clusters"] == rows[1]["clusters"] == 1 and rows[0]["lost"] != rows[1]["lost"]
    assert threads == [1, 1]                                                # times are those of one thread


def test_a_mask_that_fails_has_a_row_and_an_error_at_the_end(options, capsys, monkeypatch):
    def broken(tokens, keep, **aux):
        raise RuntimeError("out of | luck\nand more")

    monkeypatch.setitem(MASKS, "tube", broken)
    with pytest.raises(ValueError, match="^tube failed"):
        main(Masks(**{**options, "mask": ("tube", "random_frame"), "ratio": (0.5, 0.75)}))
    rows, out = load_json(options["out"])["rows"], capsys.readouterr().out
    assert ["failed" in row for row in rows] == [True, False] * 2
    for table in markdown_tables(out):
        assert table[1][1] == "failed: RuntimeError: out of / luck" and len(table[1]) == len(table[0]) == len(table[2])


@pytest.mark.parametrize("flags, message", [
    ("--mask clusters", "mask.*clusters"), ("--ratio 0.5 1", r"ratio.*1\.0"), ("--ratio", "--ratio"),
    ("--quantile 0", r"quantile.*0\.0"), ("--seed -1", "--seed .*-1"), ("--out no/where.json", "--out .* no$"),
    ("--split val", "invalid choice.*val"), ("--count 13", "--count .*1 to 12.*13"),
    ("--count 0", "--count .*1 to 12.*0"), ("--clips nowhere", "nowhere/sprites_test.json"),
    ("--teacher nowhere", "nowhere"),
])
def test_wrong_flags_are_one_line(sprites, teacher, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    defaults = f"--teacher {teacher} --clips {sprites} --count 2"
    code, out, err = command("tools.mask_stats", ["masks", *defaults.split(), *flags.split()], capsys)
    assert_one_line("tools.mask_stats", code, err, message)
    assert "|" not in out


def test_quantiles_has_the_training_clips_alone(sprites, teacher, capsys):
    flags = f"quantiles --teacher {teacher} --clips {sprites} --count 25"
    code, _, err = command("tools.mask_stats", flags.split(), capsys)
    assert_one_line("tools.mask_stats", code, err, "--count .*1 to 24.*25")


# ---------------------------------------------------------------------------------------------------------------------
# The bandwidth for a teacher

def clip_files(sprites, count):
    return [f"{sprites}/videos/test_{i:05d}.mp4" for i in range(count)]


@pytest.mark.parametrize("shares, chosen, alike", [
    ({0.02: [80, 80], 0.9: [30, 30], 0.95: [28, 28], 1.0: [27.5, 27.5]}, 0.95, [0.95, 1.0]),    # the margin of 1 %
    ({0.02: [80, 80], 0.95: [40, 40], 1.0: [27, 27]}, 1.0, [1.0]),          # the default is not alike
    ({0.02: [10, 10], 0.5: [20, 20], 0.95: [30, 30]}, 0.02, [0.02]),        # the classical rule, if it is the best
    ({0.02: [10, 10], 0.5: [10.5, 10.5], 0.95: [30, 30]}, 0.5, [0.02, 0.5]),    # the larger of two
    ({0.02: [10, 30], 0.95: [30, 16]}, 0.95, [0.02, 0.95]),                 # 20 more and 14 less: noise
    ({0.02: [10, 30], 0.95: [13, 33.1]}, 0.02, [0.02]),                     # as far apart as the videos are, but always
    ({0.02: [10], 0.95: [10.9]}, 0.95, [0.02, 0.95]), ({0.02: [10], 0.95: [11.1]}, 0.02, [0.02]),   # one video
])
def test_the_quantile_of_least_unexplained_share_is_taken_within_noise(shares, chosen, alike):
    quantile, differences, found = choose_quantile(shares)
    assert (quantile, found) == (chosen, alike)
    best = min(shares, key=lambda q: sum(shares[q]))
    assert differences == {q: [x - y for x, y in zip(xs, shares[best], strict=True)] for q, xs in shares.items()}


def test_bandwidth_prints_the_unexplained_share_by_quantile(options, sprites, teacher, capsys):
    files = clip_files(sprites, 4)
    flags = f"bandwidth --teacher {teacher} --ratio 0.75 --frames 8 --out {options['out']} --commit c0 --seed 3"
    code, out, err = command("tools.mask_stats", [*flags.split(), *files], capsys)
    assert not code and "commit c0" in out, err
    table, = markdown_tables(out)
    assert [row[0] for row in table] == [
        "quantile", "0.02", "0.1", "0.25", "0.5", "0.75", "0.9", "0.95", "1", "random tokens"]
    result, clips = load_json(options["out"]), load_clips(Masks(**{**options, "count": 4}))
    assert list(result["unexplained"]) == files
    for row in table[1:]:
        shares = []
        for i in range(4):
            x = clips.tokens[i:i + 1]
            if row[0] == "random tokens":
                masks, seeds = MaskConfig("random_frame"), (3, 4, 5)
            else:
                masks, seeds = MaskConfig(quantile=float(row[0])), (None,)
            found = [leakage(x, as_bool(masks(x, 4, generator=s and torch.Generator().manual_seed(s)), 8))[2]
                     for s in seeds]
            shares.append(sum(found) / len(found))
            key = "random" if row[0] == "random tokens" else f"{float(row[0])}"
            assert result["unexplained"][files[i]][key] == pytest.approx(shares[-1], rel=1e-6)
        assert float(row[1].split()[0]) == pytest.approx(100 * sum(shares) / 4, abs=0.051)
    assert 0.02 < result["quantile"] <= 1 and f"\nTake --mask.quantile {result['quantile']:g}: " in out


def test_a_video_of_equal_tokens_is_left_out(options, sprites, teacher, capsys, monkeypatch):
    files = clip_files(sprites, 2)
    lost = iter([0.5] * 11 + [None] * 8)                            # 8 quantiles and 3 random masks a video
    monkeypatch.setattr(mask_stats, "leakage", lambda *_: (None, None, next(lost)))
    measure_bandwidth(Bandwidth(tuple(files), teacher=teacher, ratio=0.75))
    out = capsys.readouterr().out
    assert f"tokens are equal: {files[1]}\n" in out and "**1 videos" in out and "One video" in out
    assert "Take --mask.quantile 0.95: 50.0 % unexplained." in out
    lost = iter([None] * 16)
    with pytest.raises(ValueError, match="must differ, got 2 videos"):
        measure_bandwidth(Bandwidth(tuple(files), teacher=teacher, ratio=0.75))


@pytest.mark.parametrize("flags, message", [
    ("", "videos .*got 0 and 8"), ("nowhere.mp4", "nowhere.mp4"), ("--ratio 1 {video}", r"ratio.*1\.0"),
    ("--frames 0 {video}", "--frames .*got 1 and 0"), ("--out no/where.json {video}", "--out .* no$"),
    ("--teacher nowhere {video}", "nowhere"), ("--seed -1 {video}", "--seed .*-1"),
])
def test_wrong_flags_of_bandwidth_are_one_line(sprites, teacher, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = flags.format(video=clip_files(sprites, 1)[0])
    code, out, err = command("tools.mask_stats", ["bandwidth", "--teacher", teacher, *flags.split()], capsys)
    assert_one_line("tools.mask_stats", code, err, message)
    assert "|" not in out
