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

from masking import MASKS, MaskConfig
from tasks import get_task
from tools import demo

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


def test_the_analysis_draws_pictures_and_counts_objects(first_run, sprites, tmp_path, monkeypatch):
    os.symlink(f"{first_run}/out/first/teacher", tmp_path / "teacher")
    for name in demo.DEMO_MASKS:
        os.symlink(f"{first_run}/out/first", tmp_path / name)
    with open(f"{sprites}/sprites_test.json") as f:
        moving = next(row["caption"] for row in json.load(f) if row["caption"].count("moves") == 2)
    monkeypatch.setattr(demo, "NUM_ANALYSED", 12)
    preset = SimpleNamespace(mask=MaskConfig(ratio=0.75, quantile=0.95), vit=SimpleNamespace(patch_size=4))
    monkeypatch.setitem(demo.PRESETS, "sprites", preset)
    data = demo.DataConfig(num_frames=8, image_size=16, frame_cache=False)
    with mock.patch.object(demo, "DataConfig", return_value=data):          # the run's teacher sees 16 x 16 pixels
        shares, caption = demo.analyse(str(tmp_path), sprites, 0)
    assert shares.keys() == set(demo.DEMO_MASKS.values()) and all(0 < share <= 1 for share in shares.values())
    assert caption == moving
    for name in ("masks.png", "losses.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100


# ---------------------------------------------------------------------------------------------------------------------
# Steps

@pytest.mark.parametrize("seed", [0, 1])
def test_the_commands_parse_and_fit_together(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    lines = []
    monkeypatch.setattr(demo, "run_commands", lambda commands, environment: lines.extend(commands))
    monkeypatch.setattr(demo, "analyse", lambda *_: ({title: 0.5 for title in demo.DEMO_MASKS.values()}, "a circle"))
    monkeypatch.setattr(demo, "write_report", lambda *_: "# report")
    demo.main(demo.Config(seed=seed))
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
    assert os.path.isfile("out/demo/report.md" if seed == 0 else f"out/demo/seed{seed}/report.md")


def test_a_command_that_fails_ends_the_demo_with_its_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/demo")
    (tmp_path / "good.py").write_text("print('fine')")
    (tmp_path / "bad.py").write_text("import os, sys; sys.exit('bad.py: out of ' + os.environ['LUCK'])")
    demo.run_commands(["good.py", "good.py"], {"LUCK": "luck"})
    with pytest.raises(ValueError, match="(?s)`python bad.py --x 1` .* 1.*bad.py: out of luck"):
        demo.run_commands(["good.py", "bad.py --x 1"], {"LUCK": "luck"})
    with pytest.raises(ValueError, match="`python bad.py` .* 1"):
        demo.run_commands(["bad.py", "good.py"], {"LUCK": "luck"})


def test_help_shows_the_command_as_it_is_typed(capsys):
    code, out, _ = command("tools.demo", ["--help"], capsys)
    assert code == 0 and "python -m tools.demo" in out and "--seed" in out


# ---------------------------------------------------------------------------------------------------------------------
# The report

def test_the_report_has_the_numbers_that_the_steps_left(tmp_path):
    scores = iter(range(10, 99))
    expected = {}
    for name, title in demo.DEMO_MASKS.items():
        os.makedirs(tmp_path / name / "before_unmasked")
        expected[title] = []
        for path in ("before_unmasked/eval-sprites-all", f"before_unmasked/eval-sprites-{name}", "eval-sprites-all"):
            t2v, v2t, matched = (next(scores) + 0.5 for _ in range(3))
            result = {key: {"T2V": {"R@1": a}, "V2T": {"R@1": b}} for key, a, b in (
                ("similarity", t2v, v2t), ("match, top 16", matched, 0), ("chance", 0, 0))}
            (tmp_path / name / f"{path}.json").write_text(json.dumps({"videos": 512, "scores": result}))
            expected[title] += [t2v, v2t]
        expected[title].append(matched)
        rows = [{"stage": "pretrain", "step": s, "mrm": 1 / s} for s in range(1, 9)]
        rows.append({"stage": "unmasked", "step": 1, "vtc": 1})
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {title: 0.25 + 0.5 * i for i, title in enumerate(demo.DEMO_MASKS.values())}
    report = demo.write_report(str(tmp_path), shares, "a small red circle", {"one": 61.0}, 63.0, False, 0)
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    cells = {row[0]: row[1:] for row in tables}
    for title, values in expected.items():
        *recalls, objects, mrm = cells[title]
        assert [float(cell) for cell in recalls] == values and objects == f"{100 * shares[title]:.0f} %"
        assert float(mrm) == pytest.approx(np.mean([1 / s for s in range(4, 9)]), abs=0.005)
        assert len(cells[title]) == len(cells["mask"])
    assert cells["one"] == ["61 s"] and "512" in report and "a small red circle" in report
