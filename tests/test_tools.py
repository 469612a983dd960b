"""The tools: counting of objects against a loop, pictures that can be opened, command lines that exist."""

import functools
import json
import os
import random
import re
import shlex
from copy import deepcopy

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from test_train import ROOT, assert_one_line, command, first_run, small_sprites  # noqa: F401  (the last two: fixtures)

import decoding
import eval as score
import search
import train
from masking import MASKS, MaskConfig, keep_count
from sprites import write_sprites
from teacher import SigLIP
from tools import ablate, bench, convert, demo, show
from tools import compile as chips

# ---------------------------------------------------------------------------------------------------------------------
# Objects kept

def objects_kept_by_hand(keep, boxes, size, patch):
    side, kept, there = size // patch, 0, 0
    for b in range(boxes.shape[0]):
        for t in range(boxes.shape[1]):
            for x0, y0, x1, y1 in boxes[b, t].tolist():
                if x0 != x0:
                    continue
                x0, y0, x1, y1 = (min(max(v, 0), size) for v in (x0, y0, x1, y1))
                there += 1
                for n in range(side * side):
                    left, top = n % side * patch, n // side * patch
                    w, h = min(x1, left + patch) - max(x0, left), min(y1, top + patch) - max(y0, top)
                    share = max(w, 0) * max(h, 0) / min((x1 - x0) * (y1 - y0), patch * patch)
                    if share >= 0.25 and t * side * side + n in keep[b].tolist():
                        kept += 1
                        break
    return kept / there


@pytest.mark.parametrize("K", [1, 3, 16])
def test_objects_kept_is_what_a_loop_counts(K):
    B, T, size, patch = 5, 3, 32, 8
    rng = np.random.default_rng(K)
    low = rng.uniform(-3, 27, (B, T, 3, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 14, (B, T, 3, 2))], -1).astype(np.float32)
    boxes[rng.random((B, T, 3)) < 0.3] = np.nan
    boxes[boxes[..., 2:].min(-1) < 0.5] = np.nan                            # nothing of it is in the frame
    keep = torch.stack([torch.cat([torch.from_numpy(rng.permutation(16)[:K]).sort().values + 16 * t
                                   for t in range(T)]) for _ in range(B)])
    found = demo.objects_kept(keep, boxes, size, patch)
    assert found == pytest.approx(objects_kept_by_hand(keep, boxes, size, patch))
    assert 0 < found <= 1 and (K < 16 or found == 1)


def test_an_object_is_kept_by_a_token_that_it_covers_by_a_quarter_or_that_holds_a_quarter_of_it():
    cases = [((0, 0, 8, 8), 0, 1.0), ((0, 0, 8, 8), 1, 0.0), ((0, 0, 2, 2), 0, 1.0), ((7, 0, 9, 2), 1, 1.0),
             ((0, 0, 9.9, 8), 1, 0.0), ((0, 0, 10, 8), 1, 1.0), ((0, 0, 32, 32), 15, 1.0), ((7, 7, 9, 9), 4, 1.0)]
    for box, token, wanted in cases:                                        # 4 x 4 tokens of 8 x 8 pixels
        boxes = np.full((1, 1, 3, 4), np.nan, np.float32)
        boxes[0, 0, 1] = box
        assert demo.objects_kept(torch.tensor([[token]]), boxes, 32, 8) == wanted, (box, token)


def test_the_true_boxes_of_the_sprites_are_read(sprites):
    boxes = np.load(f"{sprites}/sprites_boxes.npz")["test"]                 # (clips, T, 3, 4)
    every = torch.arange(8 * 64).expand(12, -1)
    assert demo.objects_kept(every, boxes, 64, 8) == 1.0
    sixth = torch.stack([torch.randperm(512, generator=torch.Generator().manual_seed(i))[:85] for i in range(12)])
    assert demo.objects_kept(sixth, boxes, 64, 8) == pytest.approx(objects_kept_by_hand(sixth, boxes, 64, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def assert_picture(path):
    """A PNG of some size in which something is drawn."""
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 100
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def write_log(folder, stages):
    os.makedirs(folder)
    with open(f"{folder}/log.jsonl", "w") as f:
        for stage, steps, names in stages:
            for step in range(1, steps + 1):
                f.write(json.dumps({"stage": stage, "step": step, **{n: 2 / step for n in names}, "lr": 1e-3}) + "\n")


def test_losses_are_drawn_a_panel_a_loss_a_line_a_run_the_stages_after_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log("a", [("pretrain", 9, ("mrm", "vtc", "vtm", "mlm")), ("unmasked", 3, ("vtc", "vtm", "mlm"))])
    write_log("b", [("pretrain", 4, ("vtc", "vtm", "mlm"))])                # a run with nothing masked
    figures = []
    monkeypatch.setattr(show, "save", lambda figure, path, real=show.save: (figures.append(figure), real(figure, path)))
    show.losses({"one": "a", "two": "b"}, "losses.png")
    assert_picture("losses.png")
    panels = figures[0].axes
    assert len(panels) == 4 and [len(axis.get_lines()) for axis in panels] >= [1, 2, 2, 2]
    lines = {line.get_label(): line.get_xydata() for line in panels[1].get_lines()}
    assert lines["one"][:, 0].tolist() == list(range(1, 13)) and lines["two"][:, 0].tolist() == [1, 2, 3, 4]
    assert lines["one"][:, 1].tolist() == [2 / s for s in (*range(1, 10), 1, 2, 3)]
    assert {t.get_text() for t in panels[0].get_legend().get_texts()} == {"one", "two"}


def test_the_rows_of_a_log_are_read_as_they_were_written_and_a_folder_without_is_named(first):
    rows = show.read_log(f"{first}/out/first")
    assert [(row["stage"], row["step"]) for row in rows] == \
        [("pretrain", s) for s in range(1, 5)] + [("unmasked", s) for s in (1, 2)]
    with pytest.raises(FileNotFoundError, match="nowhere/log.jsonl is not there: nowhere is no run of train.py"):
        show.read_log("nowhere")


def test_masks_are_drawn_and_only_what_they_keep_is_bright(first, sprites, tmp_path, monkeypatch):
    teacher = SigLIP.from_pretrained(f"{first}/out/first/teacher")
    video = decoding.test_view(decoding.read_frames(f"{sprites}/videos/test_00000.mp4", 4), 16)
    configs = {title: MaskConfig(name, 0.75) for title, name in (("ours", "cluster_stm"), ("theirs", "random_frame"))}
    figures = []
    monkeypatch.setattr(show, "save", lambda figure, path, real=show.save: (figures.append(figure), real(figure, path)))
    show.masks(video, teacher, configs, str(tmp_path / "masks.png"))
    assert_picture(tmp_path / "masks.png")
    pictures = [axis.get_images()[0].get_array() for axis in figures[0].axes]               # rows of T pictures
    assert len(pictures) == 4 * 4                                           # frames, clusters, two masks
    for t in range(4):
        frame = np.asarray(video[t].permute(1, 2, 0)) / 255
        np.testing.assert_allclose(pictures[t], frame)
        tints = (pictures[4 + t] - 0.35 * frame).reshape(256, 3).round(6)
        assert 1 < len(np.unique(tints, axis=0)) <= 4                       # clusters
        for shown in (pictures[8 + t], pictures[12 + t]):
            bright = (shown == frame).all(-1).reshape(4, 4, 4, 4).all((1, 3))               # the 16 tokens
            assert bright.sum() == keep_count(16, 0.75)


def test_frames_darken_but_for_the_kept_tokens_and_clusters_have_their_colours():
    frames = np.random.default_rng(0).uniform(0.2, 1, (2, 6, 6, 3))
    keep = np.zeros((2, 6), bool)
    keep[0, 1] = keep[1, 5] = True                                          # 2 x 3 tokens of 3 x 2 pixels
    shown = show.dimmed(frames, keep, (2, 3))
    wanted = 0.22 * frames
    wanted[0, 0:3, 2:4] = frames[0, 0:3, 2:4]
    wanted[1, 3:6, 4:6] = frames[1, 3:6, 4:6]
    np.testing.assert_allclose(shown, wanted)
    labels = np.array([[0, 0, 1, 1, 2, 2], [2, 1, 0, 2, 1, 0]])
    tint = show.coloured(frames, labels, np.zeros((2, 3), int), (2, 3)) - 0.35 * frames
    colour = {tuple(tint[t, 3 * (n // 3), 2 * (n % 3)].round(6)): labels[t, n] for t in range(2) for n in range(6)}
    assert len(colour) == 3 and len(set(colour.values())) == 3
    np.testing.assert_allclose(tint[0, :3, :4], np.broadcast_to(tint[0, 0, 0], (3, 4, 3)))


def test_show_is_a_command(first, sprites, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("tools/show.py", ["run", f"{first}/out/first", "--out", "l.png"], capsys)
    assert code == 0 and "written to l.png" in out
    assert_picture("l.png")
    video, teacher = f"{sprites}/videos/test_00001.mp4", f"{first}/out/first/teacher"
    flags = f"--teacher {teacher} --mask cluster_stm tube --ratio 0.5 --frames 3 --out m.png"
    code, _, _ = command("tools/show.py", ["mask", video, *flags.split()], capsys)
    assert code == 0
    assert_picture("m.png")
    for args, message in ((["run", "nowhere"], "nowhere/log.jsonl is not there"),
                          (["mask", "nowhere.mp4", "--teacher", teacher], "nowhere.mp4: no such file"),
                          (["mask", video, "--teacher", teacher, "--mask", "clusters"], "there is no mask 'clusters'"),
                          (["mask", video, "--teacher", "nowhere"], "nowhere is no folder of a SigLIP")):
        code, _, err = command("tools/show.py", args, capsys)
        assert_one_line("tools.show", code, err, message)


# ---------------------------------------------------------------------------------------------------------------------
# The demo

def parsed(line):
    """What the command line of one of our scripts asks for; a SystemExit where it does not parse."""
    script, *args = shlex.split(line)
    if script == "train.py":
        preset = args.pop(0) if args and args[0] in train.PRESETS else "sprites"
        tuned = {"stage": "finetune"} if "finetune" in args else {}         # its settings are of a folder not made here
        return tyro.cli(train.Config, args=args, default=train.replace(deepcopy(train.PRESETS[preset]), **tuned))
    if script == "eval.py":
        return tyro.cli(score.Config, args=args)
    if script in ("sprites.py", "data.py"):
        assert script == "sprites.py" or args.pop(0) == "sprites"
        return tyro.cli(functools.wraps(write_sprites)(lambda **asked: asked), args=args)
    if script == "search.py":
        return tyro.cli(search.Config, args=args)
    if script == "tools/bench.py":
        return bench.parse(args)
    if script == "tools/ablate.py":
        return tyro.extras.subcommand_cli_from_dict(ablate.KINDS, args=args)
    assert script in ("tools/show.py", "tools/demo.py", "tools/compile.py", "tools/convert.py"), line
    if script == "tools/convert.py":
        return tyro.cli(convert.Config, args=args)
    if script == "tools/compile.py":
        return chips.parse(args)
    if script == "tools/show.py":
        return tyro.extras.subcommand_cli_from_dict({"mask": show.Mask, "run": show.Run}, args=args)
    return tyro.cli(demo.Config, args=args)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_commands_of_the_demo_parse_and_fit_together(tmp_path, monkeypatch, capsys, seed):
    monkeypatch.chdir(tmp_path)
    said = []
    monkeypatch.setattr(demo, "run", lambda commands, environment: said.extend(commands))
    monkeypatch.setattr(demo, "look", lambda *args: ({title: 0.5 for title in demo.MASKS.values()}, "a circle"))
    monkeypatch.setattr(demo, "write_report", lambda *args: "# report")
    demo.main(demo.Config(seed=seed))
    asked = [(line.split()[0], parsed(line)) for line in said]
    drawn, = (a for script, a in asked if script == "sprites.py")
    runs = [a for script, a in asked if script == "train.py"]
    assert drawn["seed"] == seed and all(run.seed == seed and run.resume for run in runs)
    assert {run.data.train for run in runs} == {f"{drawn['out']}/sprites_train.json"}
    assert {run.data.root for run in runs} == {f"{drawn['out']}/videos"}
    assert [run.stage for run in runs] == ["teacher", "text"] + ["all"] * len(demo.MASKS)
    teacher, text, *students = runs
    assert {(s.teacher, s.text) for s in students} == {(f"out/{teacher.name}/teacher", f"out/{text.name}/text")}
    assert [s.mask.name for s in students] == list(demo.MASKS) and set(demo.MASKS) <= set(MASKS)
    plain = [train.asdict(s) for s in students]
    for other in plain:                                                     # the students differ in the mask alone
        other.pop("name")
        other["mask"].pop("name")
        assert other == plain[0]
    scored = [a for script, a in asked if script == "eval.py"]
    folders = {f"out/{s.name}": s for s in students}
    for a in scored:
        student = folders[a.checkpoint.removesuffix("/masked")]
        assert a.data_root == drawn["out"] and a.mask in ("", student.mask.name) and score.find_task(a.task)
    assert len({(a.checkpoint, a.mask) for a in scored}) == len(scored) == 3 * len(demo.MASKS)
    assert os.path.isfile("out/demo/report.md" if seed == 0 else f"out/demo/seed{seed}/report.md")


def test_a_command_that_fails_ends_the_demo_with_what_it_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/demo")
    with open("good.py", "w") as f:
        f.write("print('fine')")
    with open("bad.py", "w") as f:
        f.write("import os, sys; sys.exit('bad.py: out of ' + os.environ['LUCK'])")
    demo.run(["good.py", "good.py"], {"LUCK": "luck"})
    with pytest.raises(ValueError, match="(?s)`python bad.py --x 1` ended with 1.*bad.py: out of luck"):
        demo.run(["good.py", "bad.py --x 1"], {"LUCK": "luck"})
    with pytest.raises(ValueError, match="`python bad.py` ended with 1"):
        demo.run(["bad.py", "good.py"], {"LUCK": "luck"})


def test_the_report_has_the_numbers_that_the_steps_left(tmp_path):
    draw = random.Random(0)
    wanted = {}
    for name, title in demo.MASKS.items():
        os.makedirs(tmp_path / name / "masked")
        wanted[title] = []
        for path in ("masked/eval-sprites-all", f"masked/eval-sprites-{name}", "eval-sprites-all"):
            values = [round(draw.uniform(0, 100), 1) for _ in range(4)]
            both = lambda *ways: {way: {"R@1": v, "median": 1} for way, v in zip(("T2V", "V2T"), ways, strict=True)}
            found = {"similarity": both(*values[:2]), "match, top 16": both(*values[2:]), "chance": both(0, 0)}
            with open(tmp_path / name / f"{path}.json", "w") as f:
                json.dump({"videos": 512, "scores": found}, f)
            wanted[title] += values[:2]
        wanted[title].append(values[2])
        rows = [{"stage": "pretrain", "step": s, "mrm": 1 / s} for s in range(1, 9)]
        rows.append({"stage": "unmasked", "step": 1, "vtc": 1})
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {title: 0.25 + 0.5 * i for i, title in enumerate(demo.MASKS.values())}
    report = demo.write_report(str(tmp_path), kept, "a small red circle", {"one": 61.0, "two": 2.0}, 63.0, False, 0)
    mrm = np.mean([1 / s for s in range(4, 9)])
    for title, values in wanted.items():
        cells = " | ".join(f"{v:.1f}" for v in values)
        assert f"| {title} | {cells} | {100 * kept[title]:.0f} % | {mrm:.2f} |" in report
    assert "512 held-out clips" in report and "a small red circle" in report and "| one | 61 s |" in report
    table = [line.count("|") for line in report.splitlines() if line.startswith("|") and line.count("|") > 4]
    assert len(set(table)) == 1                                             # as many cells in each row


# ---------------------------------------------------------------------------------------------------------------------
# What the pages say

def page(name):
    path = os.path.join(ROOT, name)
    if not os.path.isfile(path):
        pytest.skip(f"{name} is not written yet")
    with open(path) as f:
        return f.read()


def test_the_readme_names_every_file():
    said = page("README.md")
    top = [name for name in os.listdir(ROOT) if name.endswith(".py")]
    tools = [name for name in os.listdir(os.path.join(ROOT, "tools")) if name.endswith(".py") and name != "__init__.py"]
    assert len(top) > 5 and not [name for name in (*top, *tools, "kernels/") if f"`{name}`" not in said]


@pytest.mark.parametrize("name", ["README.md", "train.py", "eval.py", "sprites.py", "search.py", "tools/show.py",
                                  "tools/demo.py", "tools/bench.py", "tools/compile.py", "tools/convert.py",
                                  "docs/bench.md"])
def test_commands_that_the_pages_give_parse(name):
    said = page(name)
    said = said if name.endswith(".md") else said.split('"""')[1]           # the docstring
    said = re.sub(r"\\\n +", "", said).replace("...", "x.json")              # lines that go on
    lines = re.findall(r"^    (?:python|torchrun(?: --\S+)+) (.*?)(?:  .*)?$", said, re.M)
    assert lines
    for line in lines:
        line = re.sub(r"^-m tools\.(\w+)", r"tools/\1.py", line)
        if "--help" not in line:
            parsed(line)
