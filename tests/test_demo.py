"""tools.demo: objects counted against a loop, commands that parse and fit together, and the numbers of the report."""

import json
import os
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.commands import parse
from helpers.runs import command
from PIL import Image

from config import PRESETS
from masking import MASKS, MaskConfig
from tasks import get_task
from tools import demo
from tools.demo_page import DemoResults, MaskResult, Recall

# ---------------------------------------------------------------------------------------------------------------------
# Objects on which a token is kept

def objects_kept_by_loop(ids, boxes, size, patch):
    side, kept, in_view = size // patch, 0, 0
    for b in range(boxes.shape[0]):
        for t in range(boxes.shape[1]):
            for box in boxes[b, t].tolist():
                if box[0] != box[0]:
                    continue
                x0, y0, x1, y1 = (min(max(v, 0), size) for v in box)
                in_view += 1
                for n in range(side * side):
                    left, top = n % side * patch, n // side * patch
                    w, h = min(x1, left + patch) - max(x0, left), min(y1, top + patch) - max(y0, top)
                    share = max(w, 0) * max(h, 0) / min((x1 - x0) * (y1 - y0), patch * patch)
                    if share >= 0.25 and t * side * side + n in ids[b].tolist():
                        kept += 1
                        break
    return kept / in_view


@pytest.mark.parametrize("K", [1, 3, 16])
def test_objects_kept_are_what_a_loop_counts(K):
    B, T, size, patch = 5, 3, 32, 8
    rng = np.random.default_rng(K)
    low = rng.uniform(-3, 27, (B, T, 3, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 14, (B, T, 3, 2))], -1).astype(np.float32)
    boxes[rng.random((B, T, 3)) < 0.3] = np.nan
    boxes[boxes[..., 2:].min(-1) < 0.5] = np.nan                            # out of view
    ids = torch.stack([torch.cat([torch.from_numpy(rng.permutation(16)[:K]).sort().values + 16 * t
                                  for t in range(T)]) for _ in range(B)])
    share = demo.objects_kept(ids, boxes, size, patch)
    assert share == pytest.approx(objects_kept_by_loop(ids, boxes, size, patch))
    assert 0 < share <= 1 and (K < 16 or share == 1)


@pytest.mark.parametrize("box, token, share", [
    ((0, 0, 8, 8), 0, 1.0), ((0, 0, 8, 8), 1, 0.0), ((0, 0, 2, 2), 0, 1.0), ((7, 0, 9, 2), 1, 1.0),
    ((0, 0, 9.9, 8), 1, 0.0), ((0, 0, 10, 8), 1, 1.0), ((0, 0, 32, 32), 15, 1.0), ((7, 7, 9, 9), 4, 1.0)], ids=str)
def test_a_token_counts_with_a_quarter_of_its_patch_or_of_the_object(box, token, share):
    boxes = np.full((1, 1, 3, 4), np.nan, np.float32)                       # 4 x 4 tokens of 8 x 8 pixels
    boxes[0, 0, 1] = box
    assert demo.objects_kept(torch.tensor([[token]]), boxes, 32, 8) == share


def test_the_boxes_of_the_sprites_are_read(sprites):
    boxes = np.load(f"{sprites}/sprites_boxes.npz")["test"]                 # (clips, T, 3, 4)
    all_ids = torch.arange(8 * 64).expand(12, -1)
    assert demo.objects_kept(all_ids, boxes, 64, 8) == 1.0
    ids = torch.stack([torch.randperm(512, generator=torch.Generator().manual_seed(i))[:85] for i in range(12)])
    assert demo.objects_kept(ids, boxes, 64, 8) == pytest.approx(objects_kept_by_loop(ids, boxes, 64, 8))


def test_the_share_of_kept_tokens_on_objects_is_what_a_loop_counts(sprites):
    boxes = np.load(f"{sprites}/sprites_boxes.npz")["test"]                 # (clips, T, 3, 4)
    ids = torch.stack([torch.randperm(512, generator=torch.Generator().manual_seed(i))[:85] for i in range(12)])
    on_object = demo.objects_at(boxes, 64, 8)                               # (clips, T, 3, N)
    hits = [on_object[b, i // 64, :, i % 64].any().item() for b in range(12) for i in ids[b].tolist()]
    assert demo.share_on_objects(ids, boxes, 64, 8) == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 0.2


def test_the_analysis_draws_a_picture_and_counts_objects(first_run, sprites, tmp_path, monkeypatch):
    os.symlink(f"{first_run}/out/first/teacher", tmp_path / "teacher")
    with open(f"{sprites}/sprites_test.json") as f:
        moving = next(row["caption"] for row in json.load(f) if row["caption"].count("moves") == 2)
    monkeypatch.setattr(demo, "NUM_ANALYSED", 12)
    preset = SimpleNamespace(mask=MaskConfig(ratio=0.75, quantile=0.95), vit=SimpleNamespace(patch_size=4))
    monkeypatch.setitem(demo.PRESETS, "sprites", preset)
    data = demo.DataConfig(num_frames=8, image_size=16, frame_cache=False)
    with mock.patch.object(demo, "DataConfig", return_value=data):          # the run's teacher sees 16 x 16 pixels
        found = demo.analyse(str(tmp_path), sprites, 0)
    assert found["clip_caption"] == moving
    for name in ("shares", "on_object"):
        assert found[name].keys() == set(demo.DEMO_MASKS.values())
        assert all(0 < share < 1 for share in found[name].values())
    with Image.open(tmp_path / "masks.png") as image:
        assert min(image.size) > 100


# ---------------------------------------------------------------------------------------------------------------------
# Steps

@pytest.mark.parametrize("seed", [0, 1])
def test_the_commands_parse_and_fit_together(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    lines, drawn, pages = [], {}, []
    monkeypatch.setattr(demo, "run_commands", lambda commands, threads: lines.extend(commands))
    monkeypatch.setattr(demo, "analyse", lambda *_: {"shares": {"random": 0.5}, "clip_caption": "a circle"})
    monkeypatch.setattr(demo.show, "plot_losses", lambda folders, out: drawn.update(folders))
    monkeypatch.setattr(demo, "read_results", lambda *_, timings, **fields: SimpleNamespace(
        timings=dict(timings), **fields))
    monkeypatch.setattr(demo, "write_page", lambda path, results: pages.append((path, results)))
    monkeypatch.setattr(demo, "format_report", lambda results: "# report")
    demo.main(demo.Config(seed=seed))
    assert [*drawn.values()] == [f"out/demo/seed{seed}/{name}" for name in demo.DEMO_MASKS]
    report = "out/demo/report" if seed == 0 else f"out/demo/seed{seed}/report"
    assert {path for path, _ in pages} == {f"{report}.html"} and os.path.isfile(f"{report}.md")

    # Each page tells of all steps: those that are over, the one that runs, those to come.
    steps = [[*results.timings, *filter(None, [results.running]), *results.remaining] for _, results in pages]
    assert all(titles == steps[0] for titles in steps) and len(pages) == len(steps[0])
    assert pages[-1][1].running == "" and pages[-1][1].remaining == []
    # The first figure comes before the text encoder and the students are trained.
    known = [results.shares for _, results in pages]
    assert known[0] == {} and known[-1] == {"random": 0.5} and len(pages[known.index(known[-1])][1].timings) == 3

    parsed = [parse(line) for line in lines]
    drawn, = (settings for name, settings in parsed if name == "tools.sprites")
    runs = [settings for name, settings in parsed if name == "train.py"]
    assert drawn["seed"] == seed and all(run.seed == seed and run.resume for run in runs)
    assert {run.data.train_file for run in runs} == {f"{drawn['out']}/sprites_train.json"}
    assert {run.data.video_root for run in runs} == {f"{drawn['out']}/videos"}
    assert [run.stage for run in runs] == ["teacher", "text"] + ["all"] * len(demo.DEMO_MASKS)
    teacher, text, *students = runs
    folders = {(f"out/{teacher.name}/teacher", f"out/{text.name}/text")}
    assert {(s.teacher, s.text_encoder) for s in students} == folders
    assert [s.mask.name for s in students] == list(demo.DEMO_MASKS) and set(demo.DEMO_MASKS) <= set(MASKS)
    configs = [asdict(s) for s in students]
    for config in configs:                                                  # the students differ in the mask alone
        config.pop("name")
        config["mask"].pop("name")
        assert config == configs[0]
    scored = [settings for name, settings in parsed if name == "eval.py"]
    student_of = {f"out/{s.name}": s for s in students}
    for cfg in scored:
        student = student_of[cfg.checkpoint.removesuffix("/before_unmasked")]
        assert cfg.data_root == drawn["out"] and cfg.mask in ("", student.mask.name) and get_task(cfg.task)
    assert len({(cfg.checkpoint, cfg.mask) for cfg in scored}) == len(scored) == 3 * len(demo.DEMO_MASKS)
    assert [cfg.checkpoint for cfg in scored if cfg.save_scores] == [f"out/{s.name}" for s in students]
    for cfg in scored:                                                      # where read_results looks for it
        name = "kept" if cfg.mask else "before" if cfg.checkpoint.endswith("before_unmasked") else "after"
        assert cfg.out == f"{cfg.checkpoint.removesuffix('/before_unmasked')}/{name}.json"


def test_a_command_that_fails_ends_the_demo_with_its_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/demo")
    (tmp_path / "good.py").write_text("print('fine')")
    (tmp_path / "bad.py").write_text("import os, sys; sys.exit('bad.py: out of ' + os.environ['LUCK'])")
    monkeypatch.setenv("LUCK", "luck")
    demo.run_commands(["good.py", "good.py"], 1)
    with pytest.raises(ValueError, match="(?s)`python bad.py --x 1` .* 1.*bad.py: out of luck"):
        demo.run_commands(["good.py", "bad.py --x 1"], 1)
    with pytest.raises(ValueError, match="`python bad.py` .* 1"):
        demo.run_commands(["bad.py", "good.py"], 1)


def test_help_shows_the_command_as_it_is_typed(capsys):
    code, out, _ = command("tools.demo", ["--help"], capsys)
    assert code == 0 and "python -m tools.demo" in out and "--seed" in out


# ---------------------------------------------------------------------------------------------------------------------
# The report

def test_the_report_has_the_numbers_of_the_results():
    masks = [MaskResult(title, *(Recall(x + 0.5, x, x + 2) for x in range(10 * i, 10 * i + 3)), 0.25 + 0.5 * i)
             for i, title in enumerate(("ClusterSTM", "random"))]
    results = DemoResults(0, PRESETS["sprites"], 4096, 512, masks, "a small red circle", timings={"one": 61.0,
                          "two": 2.0}, machine="No GPU")
    report = demo.format_report(results)
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    cells = {row[0]: row[1:] for row in tables}
    for i, mask in enumerate(masks):
        objects, *recalls = cells[mask.title]
        assert objects == f"{25 + 50 * i} %" and len(recalls) == len(cells["mask"]) - 1 == 3
        assert recalls == [f"{10 * i + j}.5 ({10 * i + j}.0 to {10 * i + j + 2}.0)" for j in range(3)]
    assert cells["one"] == ["61 s"] and cells["all"] == ["63 s"]
    assert "512" in report and "a small red circle" in report and "6 of 64 tokens" in report
