"""tools.mask_stats selector: coverage against plain loops, norms against fp64 statements, the command on few clips."""

import math

import numpy as np
import pytest
import torch
from helpers.runs import assert_one_line, command
from helpers.tables import markdown_tables

from config import PRESETS
from encoders import ViT
from masking import select
from siglip_files import SigLIPConfig, TextConfig, VisionConfig
from teacher import SigLIP
from tools.mask_stats import COLOURS, NORMS, RANDOM, Selector, draw_clips, measure_selector, patch_projection
from tools.sprites import SETS, clip_spec, render
from video import eval_transform

STATEMENTS = {      # in fp64, for one patch: what is done before the projection, and after it
    "none": (lambda x: x, lambda x: x),
    "RMSNorm": (lambda x: x / np.sqrt((x * x).mean() + 1e-6),) * 2,
    "LayerNorm": (lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-6),) * 2,
    "LayerNorm after": (lambda x: x, lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-6)),
    "centred before": (lambda x: x - x.mean(), lambda x: x),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_their_fp64_statements(name):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 12)) * 10.0 ** np.arange(-3, 3).reshape(2, 3, 1))
    x[0, 0], x[1, 1] = 0, x[1, 1] - 50
    for norm, statement in zip(NORMS[name], STATEMENTS[name], strict=True):
        expected = np.stack([[statement(token) for token in frame] for frame in x.numpy()])
        torch.testing.assert_close(norm(x), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def on_object(box, n):
    """Whether token n of a frame of 4 x 4 patches of 8 pixels is on the box: they share a quarter of the smaller."""
    x0, y0, x1, y1 = (min(max(float(v), 0), 32) for v in box)
    left, top = n % 4 * 8, n // 4 * 8
    w, h = min(x1, left + 8) - max(x0, left), min(y1, top + 8) - max(y0, top)
    return max(w, 0) * max(h, 0) / min((x1 - x0) * (y1 - y0), 64) >= 0.25


def objects_in_view(boxes):
    """boxes (T, objects, 4) -> (t, tokens on the object) of each object in each frame in which it is in view."""
    return [(t, [n for n in range(16) if on_object(boxes[t, o], n)])
            for t, o in np.ndindex(boxes.shape[:2]) if not np.isnan(boxes[t, o]).any()]


def covered_by_hand(video, boxes, weight, name, first, budget):
    """
    A clip (T, 3, 32, 32) uint8 and its boxes (T, objects, 4) -> per cent of the objects in view that have one of the
    tokens that FluxViT's selector keeps, by loops in fp64.
    """
    before, after = STATEMENTS[name]
    T, G, x = len(video), max(1, min(4, len(video) // 2)), {}
    for t, n in np.ndindex(T, 16):
        patch = video[t, :, n // 4 * 8:n // 4 * 8 + 8, n % 4 * 8:n % 4 * 8 + 8].double().numpy() / 255
        pixels = [(patch[c] - (0.485, 0.456, 0.406)[c]) / (0.229, 0.224, 0.225)[c] for c in range(3)]
        x[t, n] = after(weight @ before(np.concatenate([channel.ravel() for channel in pixels])))
    starts, groups = [g * T // G for g in range(G + 1)], []
    for start, stop in zip(starts, starts[1:], strict=False):
        ranking = []
        for t in range(start, stop):
            later = t + 1 if t == 0 or first == "copy" and t == start else t        # compared with the frame before
            mean = sum(x[t, n] for n in range(16)) / 16
            ranking += [(-np.linalg.norm(x[later, n] - x[later - 1, n]), -np.linalg.norm(x[t, n] - mean), 16 * t + n)
                        for n in range(16)]
        groups.append([place for *_, place in sorted(ranking)])
    kept = []
    while len(kept) < budget:
        kept += [group.pop(0) for group in groups if group][:budget - len(kept)]
    found = [any(16 * t + n in kept for n in tokens) for t, tokens in objects_in_view(boxes)]
    return 100 * sum(found) / len(found)


@pytest.fixture(scope="module")
def selected():
    """What the selector covers of two clips for each of two seeds, of 5 and of 8 frames of 32 pixels."""
    cfg = Selector(clips=2, seeds=(0, 3), frames=(5, 8), size=(32,), tokens=(9, 30))
    return cfg, measure_selector(cfg)


def test_objects_covered_are_what_loops_count(selected):
    cfg, covered = selected
    assert len(covered) == 2 * (2 * len(NORMS) + 1) and all(x.shape == (2, 2, 2) for x in covered.values())
    for s, seed in enumerate(cfg.seeds):
        torch.manual_seed(seed)
        weight = ViT(PRESETS["sprites"].vit).patch_embed.weight.detach().double().numpy()
        video, boxes = draw_clips(seed, 2)
        for (T, size, name, first), values in covered.items():
            if name == RANDOM:
                continue
            frames = [1, 4, 7, 10, 13] if T == 5 else [*range(0, 16, 2)]            # the middles of equal segments
            for b, k in np.ndindex(2, 2):
                clip = eval_transform(video[b, frames], size)
                assert values[s, k, b] == pytest.approx(covered_by_hand(
                    clip, boxes[b, frames] / 2, weight, name, first, cfg.tokens[k])), (T, name, first, b, k)
    means = {key: x.mean() for key, x in covered.items()}
    assert 0 < min(means.values()) and len(set(means.values())) > 8


def test_random_tokens_are_any_tokens_of_the_clip_and_repeatable(selected):
    cfg, covered = selected
    again = measure_selector(cfg)
    assert covered.keys() == again.keys() and all(np.array_equal(covered[key], again[key]) for key in covered)
    values, = measure_selector(Selector(clips=24, seeds=(4,), frames=(8,), size=(32,), tokens=(32, 128)))[
        8, 32, RANDOM, "copy"]
    there = [objects_in_view(clip) for clip in draw_clips(4, 24)[1][:, ::2] / 2]
    ids = select("random", torch.zeros(24, 8, 16, 1), 32, generator=torch.Generator().manual_seed(4)).tolist()
    for share, kept, clip in zip(values[0], ids, there, strict=True):
        assert share == pytest.approx(100 * np.mean([any(16 * t + n in kept for n in tokens) for t, tokens in clip]))
    expected = [1 - math.comb(128 - len(tokens), 32) / math.comb(128, 32) for clip in there for _, tokens in clip]
    assert values[0].mean() == pytest.approx(100 * np.mean(expected), abs=5) and (values[1] == 100).all()


def test_drawn_clips_are_the_rendered_ones_as_coded():
    video, boxes = draw_clips(5, 3)
    assert video.shape == (3, 16, 3, 64, 64) and video.dtype == torch.uint8 and boxes.shape == (3, 16, 4, 4)
    for b in range(3):
        clip = render(5, "train", b, set_spec=SETS["crowd"])
        error = (video[b].permute(0, 2, 3, 1).float() - torch.from_numpy(clip.frames).float()).abs().mean()
        np.testing.assert_array_equal(boxes[b, :, :len(clip.objects)], clip.boxes)
        assert 0.1 < error < 8 and np.isnan(boxes[b, :, len(clip.objects):]).all()


def test_the_projection_of_a_teacher_is_its_convolution(tmp_path):
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = SigLIP(SigLIPConfig(VisionConfig(**small, image_size=16, patch_size=4),
                                TextConfig(**small, vocab_size=9, max_position_embeddings=4, pad_token_id=0)))
    conv = model.vision_model.embeddings.patch_embedding
    torch.nn.init.normal_(conv.bias)
    model.save_pretrained(str(tmp_path / "teacher"))
    pixels, project, size = patch_projection(0, str(tmp_path / "teacher"))
    video = torch.randint(0, 256, (2, 3, 3, 16, 24), dtype=torch.uint8)
    expected = conv((video.flatten(0, 1).float() / 255 - 0.5) / 0.5).flatten(2).mT
    assert size == 4
    torch.testing.assert_close(project(pixels(video)), expected.reshape(2, 3 * 24, 16), rtol=1e-4, atol=1e-5)


def test_selector_prints_means_differences_and_a_picture(tmp_path, capsys):
    cfg = Selector(clips=4, seeds=(1, 2), frames=(4, 8), size=(48,), tokens=(20, 70))
    flags = "selector --clips 4 --seeds 1 2 --frames 4 8 --size 48 --tokens 20 70 --commit c0 --out"
    code, out, err = command("tools.mask_stats", [*flags.split(), str(tmp_path / "s.png")], capsys)
    assert not code and "commit c0" in out and (tmp_path / "s.png").stat().st_size > 10_000, err
    covered, (values, gains, by_tone, rules) = measure_selector(cfg), markdown_tables(out)
    rows = [(T, 48, name) for T in (4, 8) for name in NORMS]
    tones = [[clip_spec(seed, "train", i, SETS["crowd"]).tone for i in range(4)] for seed in (1, 2)]
    expected = {}
    for T, size, name in rows:
        copy, none, across = (covered[(T, size, *row)] for row in ((name, "copy"), ("none", "copy"), (name, "across")))
        expected["values", T, name], expected["gains", T, name] = copy, copy - none
        expected["rules", T, name] = across - copy
        for tone in {t for seed in tones for t in seed}:
            cells = [[(copy - none)[s, k, i] for s in range(2) for i in range(4) if tones[s][i] == tone]
                     for k in range(2)]
            expected["by_tone", T, f"{name}, {tone}"] = np.array([cells])
    for title, table in {"values": values, "gains": gains, "by_tone": by_tone, "rules": rules}.items():
        assert table[0] == ["frames", "pixels", "patch norm", "20", "70"]
        for T, size, name, *cells in table[1:]:
            if name == RANDOM:
                continue
            for k, cell in enumerate(cells):
                x = expected[title, int(T), name][:, k].ravel()
                mean, *error = map(float, cell.split(" ± "))
                assert size == "48" and mean == pytest.approx(x.mean(), abs=0.051), (title, T, name)
                assert error == ([] if len(x) == 1 else [pytest.approx(x.std(ddof=1) / len(x) ** 0.5, abs=0.051)])
    names = [*NORMS, RANDOM]
    assert [row[2] for row in values[1:]] == 2 * names and [row[2] for row in gains[1:]] == 2 * names[1:]
    assert [row[2] for row in rules[1:]] == 2 * [*NORMS] and len(by_tone) == 1 + 2 * 2 * len({*sum(tones, [])})
    assert {*COLOURS} < {*names}
    copies = [x for (*_, first), x in covered.items() if first == "copy"]
    spread = max(abs(x[0, k].mean() - x[1, k].mean()) for x in copies for k in range(2))
    assert f"Over 2 x 4 clips. Between seeds the means differ by {spread:.1f} at most." in out


@pytest.mark.parametrize("flags, message", [
    ("--clips 0", "--clips .*got 0"), ("--frames", r"--frames .*got \(\)"), ("--seeds 1 -1", r"--seeds .*-1"),
    ("--size 48 0", "--size .*0"), ("--tokens 0", "--tokens .*0"), ("--out no/where.png", "--out .* no$"),
    ("--teacher a", "--teacher .*2 seeds, got 1"), ("--tokens 9 999", "1 to 288.*999"), ("--size 42", "42 x 42 and 8"),
    ("--teacher no where", "no"),
])
def test_wrong_flags_of_selector_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("tools.mask_stats", ["selector", "--clips", "1", *flags.split()], capsys)
    assert_one_line("tools.mask_stats", code, err, message)
    assert "|" not in out
