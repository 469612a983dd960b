"""tools.ablate: each figure against loops in fp64 and cases made by hand, the two commands on a small set."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import assert_one_line, command, small_sprites  # noqa: F401  (the last: a fixture)

import data
import decoding
from masking import MASKS, MaskConfig, keep_count
from teacher import SigLIP, SigLIPConfig, TextConfig, VisionConfig, choose
from tools import ablate
from tools.ablate import Masks, Quantiles, Seen
from tools.demo import objects_kept

SIZE, PATCH, GRID = 32, 8, (4, 4)
KEYS = {"objects", "per token", "clusters", "recurrence", "leakage", "same frame", "lost", "ms"}


@pytest.fixture(scope="module")
def teacher(sprites, tmp_path_factory):
    """Folder of an untrained teacher: frames of 16 x 16 pixels, 16 tokens."""
    torch.manual_seed(0)
    tokenizer = data.load_tokenizer(sprites)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = TextConfig(**small, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=12, pad_token_id=0)
    folder = str(tmp_path_factory.mktemp("teacher"))
    SigLIP(SigLIPConfig(VisionConfig(**small, image_size=16, patch_size=4), text), tokenizer).save(folder)
    return folder


@pytest.fixture
def options(sprites, teacher, tmp_path):
    return dict(teacher=teacher, clips=sprites, count=5, ratio=(0.75,), out=str(tmp_path / "found.json"))


def made(B=4, T=4, K=3, seed=0, C=5):
    """Seen of random tokens, boxes that move, and ids kept (B, TK), K in each frame; objects come and leave."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 20, (B, 1, 3, 2)) + rng.uniform(-6, 6, (B, T, 3, 2)).cumsum(1)
    boxes = np.concatenate([low, low + rng.uniform(3, 14, (B, 1, 3, 2))], -1).astype(np.float32)
    boxes[rng.random((B, T, 3)) < 0.2] = np.nan
    boxes[(boxes[..., 2:].min(-1) < 0.5) | (boxes[..., :2].max(-1) > SIZE - 0.5)] = np.nan      # it is out of view
    keep = torch.from_numpy(rng.random((B, T, 16)).argsort(-1)[..., :K])
    tokens = torch.from_numpy(rng.normal(size=(B, T, 16, C)) + rng.normal(size=(B, 1, 16, C))).float()
    return Seen(tokens, {}, boxes, SIZE, PATCH), ids(keep)


def ids(keep):
    """Tokens kept of each frame (B, T, K) -> flat ids (B, TK), ascending."""
    return (keep.sort(-1).values + 16 * torch.arange(keep.shape[1])[:, None]).flatten(1)


def places(keep, b):
    """{(t, n)} of clip b."""
    return {divmod(i, 16) for i in keep[b].tolist()}


def on_object(box, n):
    """Whether token n counts for the box, as docs and tools.demo have it."""
    x0, y0, x1, y1 = (min(max(float(v), 0), SIZE) for v in box)
    left, top = n % 4 * PATCH, n // 4 * PATCH
    w, h = min(x1, left + PATCH) - max(x0, left), min(y1, top + PATCH) - max(y0, top)
    return max(w, 0) * max(h, 0) / min((x1 - x0) * (y1 - y0), PATCH * PATCH) >= 0.25


def objects_of(boxes, b, t, n):
    """The objects that token n of a frame is on."""
    return {o for o in range(boxes.shape[2]) if boxes[b, t, o, 0] == boxes[b, t, o, 0]
            and on_object(boxes[b, t, o], n)}


def bits(keep, T):
    return torch.zeros(len(keep), T * 16, dtype=torch.bool).scatter(1, keep, True).view(len(keep), T, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Each figure against loops

@pytest.mark.parametrize("K", [1, 3, 16])
def test_objects_and_objects_a_token_are_what_loops_count(K):
    seen, keep = made(K=K)
    B, T, _, _ = seen.tokens.shape
    touched, there = 0, 0
    for b in range(B):
        for t in range(T):
            there += sum(box[0] == box[0] for box in seen.boxes[b, t])
            touched += len(set().union(*(objects_of(seen.boxes, b, t, n) for s, n in places(keep, b) if s == t)))
    found = ablate.figures(seen, keep, torch.zeros(B, T, 16, dtype=torch.int64), 1)
    assert 0 < touched <= there and (touched == there) == (K == 16)
    assert found["objects"] == pytest.approx(touched / there)
    assert found["per token"] == pytest.approx(touched / (B * T * K))


def test_a_token_is_on_an_object_if_objects_kept_counts_it():
    seen, _ = made()
    on = ablate.objects_at(seen.boxes, SIZE, PATCH)
    assert on.shape == (4, 4, 3, 16) and on.any() and not on[torch.from_numpy(np.isnan(seen.boxes[..., 0]))].any()
    for b in range(4):
        for t in range(4):
            for n in range(16):
                assert set(on[b, t, :, n].nonzero().flatten().tolist()) == objects_of(seen.boxes, b, t, n)
                one = objects_kept(torch.tensor([[n]]), seen.boxes[b:b + 1, t:t + 1], SIZE, PATCH) \
                    if (~np.isnan(seen.boxes[b, t, :, 0])).any() else 0
                assert (one > 0) == on[b, t, :, n].any()


@pytest.mark.parametrize("K", [1, 5])
def test_clusters_covered_are_what_a_loop_counts(K):
    seen, keep = made(K=K)
    labels = ablate.clusters_of(seen.tokens, 6, MaskConfig(quantile=0.5))
    assert labels.shape == (4, 4, 16) and all(len(set(f.tolist())) == 6 for f in labels.flatten(0, 1))
    kept = sum(any(labels[b, t, n] == k for s, n in places(keep, b) if s == t)
               for b in range(4) for t in range(4) for k in range(6))
    assert ablate.covered(bits(keep, 4), labels, 6) == pytest.approx(kept / (4 * 4 * 6))


def test_clusters_are_those_of_cluster_stm_so_it_covers_all_of_them_and_no_others():
    seen, _ = made(K=3)
    for quantile in (0.1, 0.9):
        mask = MaskConfig(quantile=quantile)
        keep = mask(seen.tokens, 6)
        assert ablate.covered(bits(keep, 4), ablate.clusters_of(seen.tokens, 6, mask), 6) == 1
    assert ablate.covered(bits(keep, 4), ablate.clusters_of(seen.tokens, 6, MaskConfig(quantile=0.1)), 6) < 1


def recurrence_by_hand(boxes, keep):
    B, T = boxes.shape[:2]
    again, count = 0, 0
    for b in range(B):
        there = places(keep, b)
        for t, n in there:
            if t == T - 1:
                continue
            count += 1
            on = objects_of(boxes, b, t, n)
            near = [(n // 4 + dy, n % 4 + dx) for dy, dx in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
            near = {4 * y + x for y, x in near if 0 <= y < 4 and 0 <= x < 4}
            then = [m for s, m in there if s == t + 1]
            again += any(on & objects_of(boxes, b, t + 1, m) if on else
                         m in near and not objects_of(boxes, b, t + 1, m) for m in then)
    return again / count


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("K", [2, 6])
def test_recurrence_is_what_a_loop_counts(K, seed):
    seen, keep = made(K=K, seed=seed)
    found = ablate.recurrence(bits(keep, 4), ablate.objects_at(seen.boxes, SIZE, PATCH), GRID)
    assert found == pytest.approx(recurrence_by_hand(seen.boxes, keep)) and 0 < found < 1


def box(n, m=None):
    """The pixels of token n, or from n to m."""
    m = n if m is None else m
    return [n % 4 * PATCH, n // 4 * PATCH, m % 4 * PATCH + PATCH, m // 4 * PATCH + PATCH]


GONE = [np.nan] * 4
CASES = {       # boxes of two objects in two frames, tokens kept of each, share that recurs
    "an object moves, its token with it": ([[box(0), GONE], [box(15), GONE]], [[0], [15]], 1),
    "an object moves, its token stays": ([[box(0), GONE], [box(15), GONE]], [[0], [0]], 0),
    "an object leaves, its token stays": ([[box(0), GONE], [GONE, GONE]], [[0], [0]], 0),
    "another object takes its place": ([[box(0), GONE], [GONE, box(0)]], [[0], [0]], 0),
    "one of the objects that it is on": ([[box(5), box(5)], [box(0), box(15)]], [[5], [15]], 1),
    "another token of the object": ([[box(0, 5), GONE], [box(0, 5), GONE]], [[0], [5]], 1),
    "an object comes to where the ground was": ([[GONE, GONE], [box(6), GONE]], [[6], [6]], 0),
    "ground, the same place": ([[GONE, GONE], [GONE, GONE]], [[6], [6]], 1),
    "ground, beside": ([[GONE, GONE], [GONE, GONE]], [[6], [5]], 1),
    "ground, below": ([[GONE, GONE], [GONE, GONE]], [[6], [10]], 1),
    "ground, across a corner": ([[GONE, GONE], [GONE, GONE]], [[6], [11]], 0),
    "ground, two places on": ([[GONE, GONE], [GONE, GONE]], [[6], [4]], 0),
    "ground, the next row's start is not beside": ([[GONE, GONE], [GONE, GONE]], [[7], [8]], 0),
    "ground, the top is not beside the bottom": ([[GONE, GONE], [GONE, GONE]], [[1], [13]], 0),
    "one of two": ([[box(0), GONE], [box(15), GONE]], [[0, 6], [7, 8]], 0.5),
    "nothing kept in the next": ([[GONE, GONE], [GONE, GONE]], [[6, 7], []], 0),
    "nothing kept in the first": ([[GONE, GONE], [GONE, GONE]], [[], [6]], None),
}


@pytest.mark.parametrize("case", CASES)
def test_recurrence_of_what_moves_comes_and_leaves(case):
    boxes, kept, wanted = CASES[case]
    keep = torch.tensor([[16 * t + n for t, frame in enumerate(kept) for n in frame]])
    on = ablate.objects_at(np.array([boxes], np.float32), SIZE, PATCH)
    assert ablate.recurrence(bits(keep, 2), on, GRID) == wanted


def explained_by_hand(tokens, keep):
    """Leakage, the same of the own frame, lost information, and how many frames have nothing kept beside them."""
    errors, bare = dict.fromkeys(("over", "within", "masked", "lost", "all"), 0.0), 0
    B, T, N, _ = tokens.shape
    for b in range(B):
        x = tokens[b].double().numpy()                                      # (T, N, C)
        mean, there = x.reshape(T * N, -1).mean(0), places(keep, b)
        bare += sum(not any(abs(s - t) == 1 for s, _ in there) for t in range(T))
        for t in range(T):
            for n in range(N):
                best = lambda frames, t=t, n=n, x=x, mean=mean, there=there: min(
                    [((x[t, n] - x[s, m]) ** 2).sum() for s, m in there if s in frames],
                    default=((x[t, n] - mean) ** 2).sum())
                errors["all"] += ((x[t, n] - mean) ** 2).sum()
                errors["lost"] += best(range(T))
                if (t, n) not in there:
                    errors["masked"] += ((x[t, n] - mean) ** 2).sum()
                    errors["over"] += best((t - 1, t + 1))
                    errors["within"] += best((t,))
    return 1 - errors["over"] / errors["masked"], 1 - errors["within"] / errors["masked"], \
        errors["lost"] / errors["all"], bare


@pytest.mark.parametrize("K", [1, 4, 15])
def test_leakage_and_lost_information_are_what_loops_sum(K):
    seen, keep = made(K=K, T=5, B=2)
    *wanted, bare = explained_by_hand(seen.tokens, keep)
    assert ablate.explained(seen.tokens, bits(keep, 5)) == pytest.approx(wanted) and bare == 0


def test_leakage_of_a_budget_of_the_whole_clip_counts_nothing_where_neighbours_keep_nothing():
    seen, _ = made(T=5, B=3)
    keep = torch.tensor([[3, 33, 34, 47], [17, 18, 19, 20], [0, 65, 66, 79]])
    *wanted, bare = explained_by_hand(seen.tokens, keep)
    assert ablate.explained(seen.tokens, bits(keep, 5)) == pytest.approx(wanted) and bare == 9
    keep = torch.tensor([[0, 1, 64, 65]])                                   # of frames 0 and 4: 1 and 3 see them
    one = seen.tokens[:1, :, :, :1].clone()
    one[:, 1], one[:, 3] = one[:, 0, :1], one[:, 4, 1:2]                    # and are their copies
    masked = (one - one.mean()).square()[~bits(keep, 5)[:1]]
    over = ablate.explained(one, bits(keep, 5)[:1])[0]
    assert over == pytest.approx((masked[14:30].sum() + masked[46:62].sum()).item() / masked.sum().item())


def frames_of(*rows):
    """Rows of numbers -> tokens (1, T, N, 1)."""
    return torch.tensor([rows], dtype=torch.float32)[..., None]


def kept_of(T, N, *places):
    kept = torch.zeros(1, T, N, dtype=torch.bool)
    for t, n in places:
        kept[0, t, n] = True
    return kept


def test_leakage_of_tokens_made_by_hand():
    still = frames_of([-1, 1, 3, -3], [-1, 1, 3, -3])
    # All that one frame hides the other keeps: everything leaks.
    assert ablate.explained(still, kept_of(2, 4, (0, 0), (0, 1), (1, 2), (1, 3)))[0] == 1
    # The same places kept: what leaks is what the own frame has. Masked 1, 3, -3: 19; their errors from -1: 4, 16, 4.
    over, within, lost = ablate.explained(still, kept_of(2, 4, (0, 0), (1, 0)))
    assert over == within == pytest.approx(1 - 24 / 19) and over < 0        # negative values stay
    assert lost == pytest.approx(24 / 20)
    # Masked tokens as far from what is kept beside as from the mean: nothing is explained.
    assert ablate.explained(frames_of([0, 2, -2], [0, 2, -2]), kept_of(2, 3, (0, 0), (1, 0)))[0] == 0
    # In between: 2 and 1.5 are seen through 2, -2 and -1.5 through -2.
    over, within, _ = ablate.explained(frames_of([2, -2, 0], [1.5, -1.5, 0]), kept_of(2, 3, (0, 0), (0, 1), (1, 2)))
    assert over == pytest.approx(1 - 2 * 0.25 / (2 * 2.25)) and within == pytest.approx(1 - 8.5 / 4.5)
    # Frames two apart are no neighbours, and the own frame is none.
    assert ablate.explained(frames_of([2, -2], [1, -1], [2, -2]), kept_of(3, 2, (0, 0), (0, 1)))[0] == pytest.approx(
        1 - (2 + 8) / (2 + 8))


def test_a_mask_that_keeps_everything_has_the_figures_that_it_must_have():
    seen, keep = made(K=16)
    seen.boxes[:] = seen.boxes[:, :1]                                       # what stays still recurs
    found = ablate.figures(seen, keep, ablate.clusters_of(seen.tokens, 6, MaskConfig()), 6)
    pairs = (~np.isnan(seen.boxes[..., 0])).sum()
    assert found == {"objects": 1, "per token": pairs / (4 * 4 * 16), "clusters": 1, "recurrence": 1, "leakage": None,
                     "same frame": None, "lost": pytest.approx(0, abs=1e-12)}


def test_single_frames_have_no_recurrence_and_no_leakage_over_time():
    seen, keep = made(T=1, K=4)
    found = ablate.figures(seen, keep, ablate.clusters_of(seen.tokens, 6, MaskConfig()), 6)
    assert found["recurrence"] is None and found["leakage"] is None
    assert found["same frame"] == pytest.approx(1 - sum(
        (seen.tokens[b, 0, n] - seen.tokens[b, 0, [m for _, m in places(keep, b)]]).square().sum(-1).min().item()
        for b in range(4) for n in range(16)) / sum(
        (seen.tokens[b, 0, n] - seen.tokens[b, 0].mean(0)).square().sum().item()
        for b in range(4) for n in range(16) if (0, n) not in places(keep, b)))
    same = replace(seen, tokens=torch.ones(4, 4, 16, 5))                    # no variance: nothing to explain
    assert ablate.explained(same.tokens, bits(made(K=4)[1], 4)) == (None, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Masks on clips

def test_clips_of_either_split_are_seen_as_they_are_scored(options, sprites, teacher):
    model = SigLIP.from_pretrained(teacher)
    for split, count in (("test", 12), ("train", 3)):
        seen = ablate.look(Masks(**{**options, "split": split, "count": count}))
        assert seen.tokens.shape == (count, 8, 16, 16) and seen.grid == (4, 4)
        video = decoding.test_view(decoding.read_frames(f"{sprites}/videos/{split}_00002.mp4", 8), 16)
        tokens = model.tokens(model.pixels(video))
        torch.testing.assert_close(seen.tokens[2], tokens)
        torch.testing.assert_close(seen.more["attention"][2], model.attend(tokens))
        torch.testing.assert_close(seen.more["logits"].exp(), seen.more["attention"])
        torch.testing.assert_close(seen.more["aligned"][2], model.align(tokens, (4, 4)))
        with open(f"{sprites}/sprites_{split}.json") as f:
            caption = data.clean(json.load(f)[2]["caption"])
        torch.testing.assert_close(seen.more["text"][2:3], model.encode_text(model.tokenize([caption])))
        boxes = np.load(f"{sprites}/sprites_boxes.npz")[split][:count]
        np.testing.assert_allclose(seen.boxes, boxes / 4)                   # 64 pixels shown as 16


def test_a_mask_is_given_what_training_gives_it_clip_after_clip(options, teacher, monkeypatch):
    seen, model = ablate.look(Masks(**options)), SigLIP.from_pretrained(teacher)
    for name in ("cluster_stm", "umt", "tube"):
        keep, ms, drawn = ablate.apply(MaskConfig(name), seen, 4, 7)
        assert keep.shape == (5, 32) and ms > 0 and drawn == (name != "cluster_stm")
        assert torch.equal(keep[:1], choose(model, seen.tokens[:1], MaskConfig(name), 0.75, 7))
        if drawn:
            assert not torch.equal(keep[0], ablate.apply(MaskConfig(name), seen, 4, 8)[0][0])
            assert torch.equal(keep, ablate.apply(MaskConfig(name), seen, 4, 7)[0])
            clips = keep[:, :4] if name == "tube" else keep
            assert len({tuple(k.tolist()) for k in clips}) > 1              # each clip its own
    given = []
    monkeypatch.setitem(MASKS, "tube", lambda x, keep, **aux: given.append((x, aux)) or torch.arange(32)[None])
    ablate.apply(MaskConfig("tube"), seen, 4, 0)
    for i, (x, aux) in enumerate(given):
        assert torch.equal(x, seen.tokens[i:i + 1]) and aux.pop("grid") == (4, 4) and aux.pop("generator")
        assert aux.keys() == {"attention", "logits", "text", "aligned"}
        assert all(torch.equal(value, seen.more[key][i:i + 1]) for key, value in aux.items())


def test_what_draws_is_averaged_over_three_seeds_and_what_does_not_runs_once(options):
    seen, K = ablate.look(Masks(**options)), 4
    labels = ablate.clusters_of(seen.tokens, K, ablate.PRESET)
    once = ablate.compare(MaskConfig(), seen, labels, K, 3)
    assert once["seeds"] == 1 and once["objects std"] is None and not once["whole clip"]
    assert {k: once[k] for k in KEYS - {"ms"}} == ablate.figures(
        seen, MaskConfig()(seen.tokens, K), labels, K)
    drawn = ablate.compare(MaskConfig("random"), seen, labels, K, 3)
    assert drawn["seeds"] == 3 and drawn["whole clip"]
    each = [ablate.figures(seen, ablate.apply(MaskConfig("random"), seen, K, s)[0], labels, K) for s in (3, 4, 5)]
    for key in KEYS - {"ms"}:
        assert drawn[key] == pytest.approx(np.mean([e[key] for e in each])), key
    assert drawn["objects std"] == pytest.approx(np.std([e["objects"] for e in each], ddof=1)) and drawn["objects std"]
    again = ablate.compare(MaskConfig("random"), seen, labels, K, 3)
    assert {**again, "ms": 0} == {**drawn, "ms": 0}
    assert not ablate.compare(MaskConfig("random_frame"), seen, labels, K, 3)["whole clip"]
    other = ablate.compare(MaskConfig("random"), seen, labels, K, 4)
    assert other["objects"] != drawn["objects"]


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def tables(out):
    """Markdown tables of what was printed: lists of rows of cells, the heading's first."""
    found = []
    for text in out.splitlines():
        if not text.startswith("|"):
            found.append([])
        elif not text.startswith("| ---"):
            found[-1].append(text[2:-2].split(" | "))
    return [rows for rows in found if rows]


def written(path):
    with open(path) as f:
        return json.load(f)


def test_masks_is_a_command_of_every_row_and_its_numbers_are_written(options, sprites, teacher, capsys):
    flags = f"masks --teacher {teacher} --clips {sprites} --count 3 --ratio 0.75 0.9 --out {options['out']} --commit c0"
    code, out, err = command("tools/ablate.py", flags.split(), capsys)
    assert code == 0 and "commit c0" in out and "failed" not in out, err
    found, rows = tables(out), written(options["out"])
    assert (rows["count"], rows["split"], rows["quantile"], rows["frames"], rows["tokens"]) == (3, "test", 0.95, 8, 16)
    assert len(found) == 2 and "4 of 16 tokens a frame (0.75 hidden)" in out and "2 of 16" in out
    rows = rows["rows"]
    assert [(r["ratio"], r["mask"]) for r in rows] == [(ratio, name) for ratio in (0.75, 0.9) for name in MASKS]
    assert [r["keep"] for r in rows] == [keep_count(16, r["ratio"]) for r in rows]
    said = [line for table in found for line in table[1:]]
    for row, line in zip(rows, said, strict=True):
        assert line[0].split()[0] == row["mask"] and ("\\*" in line[0]) == row["whole clip"], line
        assert len(line) == len(found[0][0]) and line[1].split()[0] == f"{100 * row['objects']:.1f}"
        assert ("(" in line[1]) == (row["seeds"] == 3) == (row["objects std"] is not None)
        assert all(math.isfinite(row[key]) for key in KEYS) and float(line[-1]) == pytest.approx(row["ms"], rel=0.5)
    assert {r["mask"]: r["seeds"] for r in rows}["umt"] == 3 and rows[0]["clusters"] == 1


def test_quantiles_is_a_command_on_training_clips(options, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "QUANTILES", (0.5, 0.95))
    ablate.main(Quantiles(**options))
    out, found = capsys.readouterr().out, written(options["out"])
    assert found["split"] == "train" and "5 train clips" in out
    rows = {(r["quantile"], r["pick"]): r for r in found["rows"]}
    assert list(rows) == [(q, p) for q in (0.5, 0.95) for p in ("density", "random", "centre", "lowest")]
    assert [line[:2] for line in tables(out)[0][1:]] == [[f"{q:g}", p] for q, p in rows]
    assert tables(out)[0][0] == ["quantile", "pick", "objects %", "clusters %", "recurrence %", "leakage %"]
    assert {k: r["seeds"] for k, r in rows.items()} == {k: 1 + 2 * (k[1] == "random") for k in rows}
    assert all(rows[0.95, pick]["clusters"] == 1 for pick in ablate.PICKS) and rows[0.5, "centre"]["clusters"] < 1
    ablate.main(Masks(**{**options, "split": "train", "mask": ("cluster_stm",)}))
    row, = written(options["out"])["rows"]
    assert {k: v for k, v in rows[0.95, "density"].items() if k in KEYS - {"ms"}} == {k: row[k] for k in KEYS - {"ms"}}
    picks = [rows[0.95, pick]["objects"] for pick in ablate.PICKS]
    assert len(set(picks)) > 1


def test_the_quantile_is_that_of_the_mask_and_of_the_clusters_and_one_thread_is_timed(options, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    rows = []
    for quantile in (0.2, 0.95):
        ablate.main(Masks(**{**options, "mask": ("cluster_stm",), "quantile": quantile}))
        rows += written(options["out"])["rows"]
    assert rows[0]["clusters"] == rows[1]["clusters"] == 1 and rows[0]["lost"] != rows[1]["lost"]
    assert threads == [1, 1]


def test_a_mask_that_fails_has_its_row_and_ends_the_command_after_the_others(options, capsys, monkeypatch):
    def broken(tokens, keep, **aux):
        raise RuntimeError("out of | luck\nand more")

    monkeypatch.setitem(MASKS, "tube", broken)
    with pytest.raises(ValueError, match="^tube failed: see the tables$"):
        ablate.main(Masks(**{**options, "mask": ("tube", "random_frame"), "ratio": (0.5, 0.75)}))
    found, out = written(options["out"])["rows"], capsys.readouterr().out
    assert ["failed" in row for row in found] == [True, False] * 2
    for table in tables(out):
        assert table[1][1] == "failed: RuntimeError: out of / luck" and len(table[1]) == len(table[0]) == len(table[2])


def test_what_cannot_be_is_one_line(sprites, teacher, tmp_path, capsys):
    given = f"--teacher {teacher} --clips {sprites} --count 2"
    for flags, message in (
            (f"{given} --mask clusters", "there is no mask 'clusters'; there are cluster_stm, "),
            (f"{given} --ratio 0.5 1", r"a mask ratio is in \[0, 1\), got 1.0"),
            (f"{given} --ratio", "--ratio wants at least one"),
            (f"{given} --quantile 0", r"mask.quantile is in \(0, 1\], got 0.0"),
            (f"{given} --seed -1", "--seed -1: wants a number that is not negative"),
            (f"{given} --out {tmp_path}/no/where.json", "there is no folder .*/no"),
            (f"{given} --split val", "invalid choice.*val"),
            (f"{given} --count 13", "--count 13: .* has 1 to 12 clips to test on"),
            (f"{given} --count 0", "--count 0: .* has 1 to 12 clips"),
            (f"--teacher {teacher} --clips nowhere", "nowhere/sprites_test.json: no such annotation file"),
            (f"--teacher nowhere --clips {sprites}", "nowhere is no folder of a SigLIP"),
    ):
        code, out, err = command("tools/ablate.py", ["masks", *flags.split()], capsys)
        assert_one_line("tools.ablate", code, err, message)
        assert "|" not in out
    code, _, err = command("tools/ablate.py", ["quantiles", *given.split(), "--count", "25"], capsys)
    assert_one_line("tools.ablate", code, err, "--count 25: .* has 1 to 24 clips to train on")
