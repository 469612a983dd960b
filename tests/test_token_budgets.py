"""tools.token_budgets: multiply-adds against closed formulas, rows against eval.py, what is left out, the plot."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.ablations import run as run_command
from helpers.benchmarks import eval_config, load_json
from helpers.models import student, video_to_text
from helpers.runs import assert_one_line
from helpers.tables import markdown_tables
from matplotlib.image import imread
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
from budgets import frame_budgets
from kernels.temporal_density import temporal_density_ref
from masking import MaskConfig, cluster_stm
from model import load_model
from teacher import SigLIP
from tools import token_budgets
from tools.token_budgets import TokensCommand, clip_cost, compare_budgets, keep_flops

# ---------------------------------------------------------------------------------------------------------------------
# Multiply-adds, by closed formulas

def blocks_by_hand(n, C, depth):
    """qkv 3, projection 1, MLP 8 of n C^2 each; logits and values n^2 C each."""
    return depth * (12 * n * C ** 2 + 2 * n ** 2 * C)


def student_by_hand(cfg, n, embedded, frames, E=0, gathers=False):
    """n tokens, of which `embedded` patches are embedded; `frames` means, summed by a product if it gathers."""
    pooled = frames * cfg.width * (n * gathers + E) if E else 0
    return embedded * 3 * cfg.patch_size ** 2 * cfg.width + blocks_by_hand(n, cfg.width, cfg.depth) + pooled


def teacher_by_hand(teacher, F, N):
    cfg = teacher.cfg.vision_config
    return F * (N * 3 * cfg.patch_size ** 2 * cfg.hidden_size + blocks_by_hand(N, cfg.hidden_size,
                                                                               cfg.num_hidden_layers))


@pytest.fixture(scope="module")
def retrieval(models):
    """The student of retrieval, its teacher, and what eval.py makes of settings: its visible_fn at T frames of size."""
    model, config = load_model(models["retrieval"]), load_json(f"{models['retrieval']}/config.json")

    def visible_fn(T, size, **settings):
        cfg = evaluation.Config(checkpoint=models["retrieval"], frames=T, size=size, **settings)
        data_cfg = evaluation.make_data_config(cfg, evaluation.tasks.get_task("msvd"), config)
        return evaluation.make_visible_fn(cfg, config, model, data_cfg)[0]
    return model, SigLIP.from_pretrained(models["teacher"]), visible_fn


@pytest.mark.parametrize("T, size", [(1, 8), (3, 24), (4, 32)])
def test_the_student_costs_what_its_products_do(T, size):
    model = student(vit={"patch_size": 8}).float()
    N, cfg = (size // 8) ** 2, model.vit_cfg
    expected = student_by_hand(cfg, T * N, T * N, T, model.cfg.embed_dim)
    assert clip_cost(model, None, T, size) == {
        "tokens": T * N, "student": expected, "selection": 0, "total": expected}
    for has_question in (False, True):
        model = video_to_text(has_question, vit={"patch_size": 8}).float()
        assert clip_cost(model, None, T, size)["student"] == student_by_hand(cfg, T * N, T * N, T)


@pytest.mark.parametrize("T, size, S", [(3, 24, 7), (1, 32, 16), (4, 16, 12)])
def test_the_selection_is_charged(retrieval, T, size, S):
    model, teacher, visible_fn = retrieval
    N, C, D = (size // 8) ** 2, model.vit_cfg.width, teacher.cfg.vision_config.hidden_size
    cost = lambda **settings: clip_cost(model, visible_fn(T, size, tokens=S, **settings), T, size)
    kept = student_by_hand(model.vit_cfg, S, S, T, model.cfg.embed_dim, gathers=True)
    pool, whole = T * N * 3 * 8 ** 2, teacher_by_hand(teacher, T, N)
    dynamic = {"mask": "flux_group_dynamic"}
    attention = D * D + T * N * D * teacher.cfg.vision_config.num_attention_heads
    n = min(256, T * N)
    calls = len({*frame_budgets(S, T, N)} - {0})                # a mask of frames is applied for each of its budgets
    clusters = calls * (T * N ** 2 * D + (T > 1) * (T * (T - 1) * N ** 2 * D + n ** 2 * D))
    for settings, selection, needed in (
            (dynamic, whole, kept), ({**dynamic, "features": "teacher_embedding"}, pool * D, kept),
            ({**dynamic, "features": "student_embedding"}, pool * C, kept - S * 3 * 8 ** 2 * C),
            ({"mask": "umt"}, whole + attention, kept), ({"mask": "cluster_stm"}, whole + clusters, kept),
            ({"mask": "random"}, 0, kept)):
        assert cost(**settings) == {"tokens": S, "student": needed, "selection": selection,
                                    "total": needed + selection}, settings


def test_token_sizes_and_their_attention_are_charged(retrieval, monkeypatch):
    model, teacher, visible_fn = retrieval
    monkeypatch.setattr(model, "cfg", SimpleNamespace(**vars(model.cfg) | {"proportional": True}))
    cost = clip_cost(model, visible_fn(3, 24, mask="random", tokens=7), 3, 24)
    assert cost["selection"] == teacher_by_hand(teacher, 3, 9) + 27 * 7 * teacher.cfg.vision_config.hidden_size
    assert cost["student"] == student_by_hand(model.vit_cfg, 7, 7, 3, model.cfg.embed_dim, gathers=True)


def test_the_formula_of_cluster_stm_is_that_of_the_kernels():
    """Their docstrings: 60 Gflop in frames, 2BT(T-1)N^2C across frames, 13 for the bandwidth of 256 sampled tokens."""
    shape, settings = (128, 8, 196, 768), (29, None, None, 0.95, 0.1, "exp", "nearest")
    within, across, sample = 60.4e9, 2 * 211.5e9, 12.9e9
    assert keep_flops(shape, *settings, "density", None) == pytest.approx(within + across + sample, rel=1e-3)
    assert keep_flops(shape, *settings, "lowest", None) == pytest.approx(within + across + sample, rel=1e-3)
    for pick in ("random", "centre"):
        assert keep_flops(shape, *settings, pick, None) == pytest.approx(within, rel=1e-3)
    assert keep_flops((1024, 1, 196, 768), *settings, "density", None) == pytest.approx(within, rel=1e-3)
    given = (29, None, torch.Size([128]), 0.95, 0.1, "exp", "nearest", "density", None)
    assert keep_flops(shape, *given) == pytest.approx(within + across, rel=1e-3)


def test_the_formula_of_cluster_stm_is_applied_and_close_to_the_reference():
    """The reference multiplies a frame with itself too, T^2 for T(T - 1), and all pairs for the bandwidth."""
    x = torch.randn(2, 5, 12, 7, generator=torch.Generator().manual_seed(0))
    flops, ids = token_budgets.multiply_adds(lambda: cluster_stm(x, 3))
    assert ids.shape == (2, 15) and flops == keep_flops(x.shape, 3, None, None, 0, 0.1, "", "", "density") // 2
    with FlopCounterMode(display=False) as counter:
        temporal_density_ref(x, torch.ones(2))
    across = keep_flops(x.shape, 3, None, 0.1, 0, 0.1, "", "", "density") - keep_flops(x.shape, 3, 0, 0, 0, 0, "", "",
                                                                                      "centre")
    assert counter.get_total_flops() * 4 == across * 5


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def command(models, benchmarks, task="msvd", kind="retrieval", **changes):
    return TokensCommand(**{"checkpoint": models[kind], "task": task, "data_root": benchmarks, "out": "table",
                            "workers": 0, **changes})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_are_those_of_eval_at_the_same_flags(models, benchmarks, folder, capsys):
    rows = compare_budgets(command(models, benchmarks, frames=(2, 4), sizes=(16, 24), tokens=(7,), seed=2, masks=(
        "random", "flux_group_dynamic"), features=("teacher", "student_embedding")))
    out = capsys.readouterr().out
    table, = markdown_tables(out)
    assert len(rows) == 4 * (1 + 1 + 2) == len(table) - 1                   # random compares no features
    assert table[0] == ["frames", "size", "mask", "features", "tokens", "pool", "R@1", "student", "selection", "total"]
    distinct = set()
    for row, cells in zip(rows, table[1:], strict=True):
        T, size, mask = row["frames"], row["size"], row["mask"]
        assert row["pool"] == T * (size // 8) ** 2
        flags = {"tokens": row["tokens"], "features": row["features"]} if mask else {}
        result = evaluation.main(eval_config(models, benchmarks, "msvd", frames=T, size=size, mask=mask, seed=2,
                                             rerank=0, **flags))
        assert row["scores"] == result["scores"]
        ways = result["scores"]["similarity"]
        score = (ways["T2V"]["R@1"] + ways["V2T"]["R@1"]) / 2
        assert row["score"] == score and row["total"] == row["student"] + row["selection"]
        distinct.add(json.dumps(ways))
        assert cells == [str(T), str(size), mask or "all tokens", row["features"], str(row["tokens"]), str(row["pool"]),
                         f"{score:.3g}", *(f"{row[part] / 1e9:.3g}" for part in ("student", "selection", "total"))]
    assert len(distinct) > 7                                                # the rows differ
    assert {(r["frames"], r["size"]) for r in rows if not r["mask"] and r["tokens"] == r["pool"]} == {
        (2, 16), (2, 24), (4, 16), (4, 24)}
    written = load_json("table.json")
    assert written["rows"] == rows and written["metric"] == "R@1" and written["config"]["tokens"] == [7]
    assert imread("table.png").ndim == 3 and "written to table.json and table.png" in out


def test_a_pool_below_the_budget_is_left_out_and_said(models, benchmarks, folder, capsys):
    rows = compare_budgets(command(models, benchmarks, frames=(2, 3), sizes=(16,), tokens=(12, 9, 8), masks=(
        "random", "tube")))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert lines == ["left out: --tokens 12 of 2 frames of 16 x 16, whose pool has only 8",
                     "left out: --tokens 9 of 2 frames of 16 x 16, whose pool has only 8"]
    assert [(r["frames"], r["mask"], r["tokens"]) for r in rows] == [
        (2, "", 8), (2, "random", 8), (2, "tube", 8), (3, "", 12), *((3, m, S) for m in ("random", "tube")
                                                                   for S in (12, 9, 8))]


def test_what_is_not_given_is_as_in_training(models, benchmarks, folder):
    cfg = command(models, benchmarks, out="")
    rows = compare_budgets(TokensCommand(**{**vars(cfg), "out": "x"}))
    config = load_json(f"{models['retrieval']}/config.json")
    mask = MaskConfig(**config["mask"])
    assert [(r["frames"], r["size"], r["mask"], r["features"], r["tokens"]) for r in rows] == [
        (4, 16, "", "", 16), (4, 16, mask.name, "teacher", 8)]              # of 4 tokens a frame, half


@pytest.mark.parametrize("task, kind", [("msrvtt-mc", "choice"), ("msvd-qa", "qa"), ("msvd-caption", "caption")])
def test_other_tasks_have_the_score_that_selects_checkpoints(models, benchmarks, folder, no_java, task, kind):
    rows = compare_budgets(command(models, benchmarks, task, kind, tokens=(5,), masks=("random",), frames=(3,)))
    metric, way = load_json("table.json")["metric"].split(" by ")
    assert (metric.split()[0], way) in (("accuracy", "0.7 match + 0.3 similarity"), ("all", "ranking, top 8"),
                                        ("CIDEr", "beam 3"))
    for row, flags in zip(rows, ({}, {"mask": "random", "tokens": 5}), strict=True):
        result = evaluation.main(eval_config(models, benchmarks, task, frames=3, **flags))
        assert row["score"] == result["scores"][way][metric] and row["total"] > 0


def test_the_plot_has_a_point_for_each_row(models, benchmarks, folder, monkeypatch):
    figures = []
    monkeypatch.setattr(token_budgets, "save", lambda figure, path: figures.append((figure, path)))
    rows = compare_budgets(command(models, benchmarks, frames=(2, 3), tokens=(7, 5), masks=("random", "umt")))
    (figure, path), = figures
    assert path == "table.png" and len(figure.axes) == 2
    for axis, key, unit in zip(figure.axes, ("tokens", "total"), (1, 1e9), strict=True):
        points = [(x, y) for line in axis.lines for x, y in zip(*line.get_data(), strict=True)]
        assert sorted(points) == sorted((row[key] / unit, row["score"]) for row in rows)
        assert len({line.get_color() for line in axis.lines}) == 2 and axis.get_xscale() == "log"
        assert sorted(len(line.get_xdata()) for line in axis.lines) == [1, 1, 2, 2, 2, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "2 frames of 16²", "3 frames of 16²", "all tokens", "random", "umt by teacher"]


# ---------------------------------------------------------------------------------------------------------------------
# The command

def test_the_command_is_one_of_ablations(models, benchmarks, folder, capsys):
    line = f"tokens --checkpoint {models['retrieval']} --task msvd --data-root {benchmarks} --out x --tokens 7"
    code, out, err = run_command(capsys, f"{line} --masks tube")
    assert code == 0 and len(markdown_tables(out)[0]) == 3, err
    assert [row["tokens"] for row in load_json("x.json")["rows"]] == [16, 7]


@pytest.mark.parametrize("flags, message", [
    ("--sizes 16 20", "multiple of patch_size 8, got 20"), ("--out no/where", "--out no/where: no such folder no$"),
    ("--masks clusters", "mask must be .*'clusters'"), ("--checkpoint nowhere", "nowhere"),
    ("--tokens -3", "tokens .*0.*-3"), ("--masks umt --features student_embedding", "teacher for mask umt, "),
    ("--task msvd-qa", "question answering"), ("--data own.json", "--data-root"),
])
def test_what_cannot_be_is_one_line_before_a_video_is_read(models, benchmarks, folder, monkeypatch, capsys, flags,
                                                          message):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("videos were read"))
    line = f"tokens --checkpoint {models['retrieval']} --task msvd --data-root {benchmarks} --out x --masks random"
    if "--data " in flags:
        line = line.replace(f"--data-root {benchmarks} ", "")
    code, _, err = run_command(capsys, f"{line} {flags}")
    assert_one_line("tools.ablations", code, err, message)
    assert not list(folder.iterdir())


def test_a_teacher_is_loaded_once(models, benchmarks, folder):
    with mock.patch.object(SigLIP, "from_pretrained", wraps=SigLIP.from_pretrained) as load:
        compare_budgets(command(models, benchmarks, frames=(2, 3), tokens=(7, 5), masks=("umt", "cluster_stm")))
    assert load.call_count == 1
