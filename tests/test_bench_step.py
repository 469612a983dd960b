"""bench/step.py without a GPU: flops beside torch's counter, parts, cached targets, tables, flags."""

import gzip
import json
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers.runs import assert_one_line, command
from helpers.tables import markdown_tables
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import step as bench_step
from bench.step import Config, make_config, make_step
from config import PRESETS
from siglip_files import SigLIPConfig

TINY = Config(device="cpu", preset="sprites", batch=(4,), frames=4, size=32, ratio=0.75, variants=("eager",), steps=1,
              rounds=1)


def count_flops(function):
    """The flops that torch counts, attention as its two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("part, changes", [
    ("model", {}), ("model", {"decoder": "joint"}), ("model", {"mrm_texts": "none"}), ("model", {"mrm_texts": "own"}),
    ("text", {"fusion_layers": 2, "max_length": 20})], ids=str)
def test_flops_equal_those_that_torch_counts(monkeypatch, part, changes):
    preset = PRESETS["sprites"]
    monkeypatch.setitem(PRESETS, "sprites", replace(preset, **{part: replace(getattr(preset, part), **changes)}))
    step = make_step(TINY, 6, "eager")
    flops, parts = bench_step.flops(step.cfg, step.teacher.cfg, 6), bench_step.StepParts(step).functions()
    for name in ("teacher", "token targets", "student ViT", "decoder and MRM", "text, fusion, VTC, VTM, MLM"):
        assert flops[name] == pytest.approx(count_flops(parts[name]), rel=2e-3), name
    assert count_flops(parts["clips to the device"]) == count_flops(parts["clipping and AdamW"]) == 0
    custom_op = flops["bandwidth and mask"] - count_flops(parts["bandwidth and mask"])      # which torch does not count
    assert sum(flops.values()) - custom_op == pytest.approx(count_flops(step), rel=2e-3)


def test_flops_of_the_base_preset_by_hand():
    cfg = make_config(Config(preset="base"), 64, "eager")
    cfg = replace(cfg, text=replace(cfg.text, vocab_size=30522, mask_token_id=103),
                  model=replace(cfg.model, target_dim=768))
    flops = bench_step.flops(cfg, SigLIPConfig(), 64)
    tower = 12 * (24 * 196 * 768 ** 2 + 4 * 196 ** 2 * 768) + 2 * 196 * 768 ** 2                # 16 * 16 * 3 = 768
    texts = 12 * (24 * 64 * 768 ** 2 + 4 * 64 ** 2 * 768) + 2 * 768 ** 2
    assert flops["teacher"] == 256 * tower + 64 * texts
    student = 12 * (24 * 116 * 768 ** 2 + 4 * 116 ** 2 * 768)
    assert flops["student ViT"] == pytest.approx(64 * 3 * student, rel=0.01)
    assert flops["decoder and MRM"] < flops["student ViT"] / 5
    assert bench_step.flops(cfg, SigLIPConfig(), 128)["teacher"] == 2 * flops["teacher"]


@pytest.mark.parametrize("preset", ["sprites", "base"])
def test_a_variant_is_what_its_name_says_for_each_preset(preset):
    for name in bench_step.get_args(bench_step.Variant):
        cfg = make_config(replace(TINY, preset=preset), 4, name)
        assert cfg.compile == name.startswith("compiled")
        assert cfg.activation_checkpointing == ("checkpointing" in name)
        assert (cfg.data.num_frames, cfg.data.image_size, cfg.mask.ratio) == (4, 32, 0.75)


def test_parts_change_nothing_but_for_the_optimizer():
    step = make_step(TINY, 4, "eager")
    parts, before = bench_step.StepParts(step).functions(), {k: v.clone() for k, v in step.model.state_dict().items()}
    for name, part in parts.items():
        if name != "clipping and AdamW":
            part()
            part()
    assert all(torch.equal(v, before[k]) for k, v in step.model.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())
    for _ in range(2):                                                      # the second time with the same gradients
        weight = step.model.vit.patch_embed.weight.clone()
        parts["clipping and AdamW"]()
        assert not torch.equal(weight, step.model.vit.patch_embed.weight)
    step()


def test_a_step_trains_and_cached_targets_equal_the_teachers():
    step, cached = (make_step(TINY, 4, name) for name in ("eager", "eager+cached"))
    before = [p.clone() for p in step.model.parameters()]
    targets, read = step.targets(step.batch), cached.targets(cached.batch)
    assert torch.equal(targets.visible_ids, read.visible_ids) and torch.equal(targets.text_embeds, read.text_embeds)
    assert torch.equal(targets.token_targets.half(), read.token_targets)
    with mock.patch.object(cached.teacher, "forward_features", side_effect=AssertionError("the teacher runs")):
        cached()
    step()
    for trained in (step, cached):
        assert any(not torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))


def test_tables(capsys, monkeypatch):
    variants = ("eager", "eager+checkpointing", "eager+cached")
    monkeypatch.setattr(bench_step, "matmul_rate", lambda device: (1e11, "a large size"))
    bench_step.step_tables(replace(TINY, variants=variants, profile=3))
    out = capsys.readouterr().out
    (_, *rows), *parts = markdown_tables(out)
    assert tuple(row[0] for row in rows) == variants
    for _, ms, busy, rate, tflop, utilisation, gib, _ in rows:
        assert busy == "" and float(rate) == pytest.approx(4e3 / float(ms), rel=0.02) and float(gib) > 0
        expected = 1e2 * float(tflop) * 1e12 / (float(ms) / 1e3) / 1e11
        assert float(utilisation.removesuffix(" %")) == pytest.approx(expected, rel=0.02, abs=0.06)
    assert float(rows[2][4]) < float(rows[0][4]) == float(rows[1][4])       # Tflop
    names = [[row[0] for row in table[1:]] for table in parts]
    assert len(names) == 2 and {"student ViT", "decoder and MRM", "clipping and AdamW"} <= set(names[0]) & set(names[1])
    assert ["teacher" in table for table in names] == [True, False]
    assert ["reading the targets" in table for table in names] == [False, True]
    assert "Self CPU" in out


def test_the_teachers_parts_run_without_autocast_as_in_a_step(monkeypatch):
    monkeypatch.setattr(bench_step, "bf16_autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    step = make_step(TINY, 4, "eager")
    step.teacher.bfloat16()
    parts = bench_step.StepParts(step)
    assert parts.tokens.dtype == torch.bfloat16 and parts.visible.dtype == torch.float32
    seen = []
    for name in ("forward_features", "encode_text", "token_embeddings"):
        function = getattr(step.teacher, name)
        monkeypatch.setattr(step.teacher, name, lambda *args, f=function, **kw: (
            seen.append(torch.is_autocast_enabled("cpu") or torch.is_grad_enabled()), f(*args, **kw))[1])
    functions = parts.functions()
    functions["teacher"](), functions["bandwidth and mask"](), functions["token targets"]()
    assert seen == [False] * 3


def test_both_forms_of_a_change_compute_the_same():
    step = make_step(TINY, 4, "eager")
    changes, state = bench_step.StepChanges(step, 8), {k: v.clone() for k, v in step.model.state_dict().items()}
    for name, forms in changes.functions().items():
        results = []
        for form in forms:
            step.model.load_state_dict(state)
            step.optimizer.state.clear()
            result, weights = form(), [x.clone() for x in step.model.state_dict().values()]
            results.append(weights if "AdamW" in name else result)
        if "attention for the mask" not in name:
            torch.testing.assert_close(*results, msg=lambda m, name=name: f"{name}: {m}")
        trains = any(not torch.equal(x, y) for x, y in zip(weights, state.values(), strict=True))
        assert trains == ("AdamW" in name)


def test_changes_and_a_trace_are_of_the_first_variant(tmp_path, capsys):
    path = str(tmp_path / "trace.json.gz")
    count_up = lambda functions, *_, **__: [1.0 + i for i in range(len(functions))]
    with mock.patch.object(bench_step, "trace_step", wraps=bench_step.trace_step) as trace_step, \
            mock.patch.object(bench_step, "time_interleaved", count_up):
        bench_step.step_tables(replace(TINY, batch=(2,), variants=("eager", "eager+cached"), trace=path, changes=True))
    assert trace_step.call_count == 1
    tables = markdown_tables(capsys.readouterr().out)
    assert [row[2] for row in tables[0]] == ["GPU busy ms", "", ""]         # without a GPU there is none
    (_, *rows), = (table for table in tables if "before ms" in table[0])
    assert [tuple(map(float, row[1:])) for row in rows] == [(i, i + 1, -1) for i in range(1, 13, 2)]
    with gzip.open(path, "rt") as f:
        names = {event.get("name") for event in json.load(f)["traceEvents"]}
    assert {"aten::addmm", "aten::_fused_adamw_"} <= names


def test_busy_time_counts_what_overlaps_once(tmp_path):
    event = lambda cat, start, length: {"ph": "X", "cat": cat, "ts": start, "dur": length}
    events = [event("kernel", 5000, 1000), event("kernel", 0, 3000), event("kernel", 1000, 500),
              event("gpu_memcpy", 2500, 1500), event("gpu_memset", 5900, 200), event("cpu_op", 0, 9000),
              event("gpu_user_annotation", 0, 9000), {"ph": "M", "name": "process_name"}]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert bench_step.busy_ms(str(path)) == pytest.approx(4 + 1.1)


def test_the_step_of_umt_is_timed_beside_ours(monkeypatch, capsys):
    umt_step = mock.Mock(return_value=(lambda: torch.zeros(()), {"commit": "abc"}))
    monkeypatch.setattr(bench_step, "umt_step", umt_step)
    bench_step.step_tables(replace(TINY, umt="umt"))
    out = capsys.readouterr().out
    assert umt_step.mock_calls == [mock.call("umt", "cpu", 4, 4, 32, 4, 36, small=True)]
    row = markdown_tables(out)[0][-1]
    assert "commit abc" in out and "UMT" in row[0] and float(row[3]) == pytest.approx(4e3 / float(row[1]), rel=0.02)


@pytest.mark.parametrize("preset, ratios", [("base", ["4", ""]), ("sprites", ["", ""])])
def test_only_steps_with_the_same_work_are_compared_with_umts(monkeypatch, capsys, preset, ratios):
    """Not a step without a teacher, and not the small preset, whose widths UMT's step does not have."""
    times = bench_step.Times({"teacher": 10 ** 12}, 50.0, {}, 200.0, 1.0, None, {})
    monkeypatch.setattr(bench_step, "measure_variant", lambda *_: (times, ""))
    monkeypatch.setattr(bench_step, "umt_step", lambda *_, **__: (lambda: None, {}))
    bench_step.batch_tables(replace(TINY, preset=preset, variants=("eager", "eager+cached"), umt="umt"), 4, 1e12)
    (header, *rows), = markdown_tables(capsys.readouterr().out)
    assert header[-1] == "times UMT" and [row[-1] for row in rows[:2]] == ratios


def test_defaults_depend_on_the_device(monkeypatch):
    on_cpu = bench_step.fill_defaults(Config(device="cpu"))
    assert (on_cpu.preset, on_cpu.batch, on_cpu.steps) == ("sprites", (64,), 2)
    assert not any("compiled" in name for name in on_cpu.variants)
    assert bench_step.fill_defaults(TINY) == TINY
    monkeypatch.setattr(bench_step, "select_device", lambda name: torch.device("cuda", 0))
    on_gpu = bench_step.fill_defaults(Config())
    assert (on_gpu.device, on_gpu.preset, on_gpu.batch, on_gpu.steps) == ("cuda", "base", (64, 256), 20)
    assert "compiled+cached" in on_gpu.variants


@pytest.mark.parametrize("flags, message", [
    ("--variants fast", "fast.*--variants"), ("--batch 0", "--batch.* 0"), ("--rounds 0", "--rounds.* 0"),
    ("--steps -1", "--steps.* -1"), ("--trace a.txt", "--trace.*json.*a.txt"), ("--preset large", "large.*--preset"),
])
def test_wrong_flags_end_with_one_message(flags, message, capsys):
    code, _, err = command("bench", ["step", *flags.split()], capsys)
    assert_one_line("bench", code, err, message)


def test_a_missing_checkout_of_umt_is_one_line(capsys):
    code, _, err = command("bench", "step --device cpu --batch 2 --size 16 --umt nowhere".split(), capsys)
    assert_one_line("bench", code, err, "nowhere")


def test_command(capsys):
    flags = "step --device cpu --batch 2 --size 16 --steps 1 --rounds 1 --variants eager"
    code, out, err = command("bench", flags.split(), capsys)
    assert code == 0, err
    assert f"`python -m bench {flags}`" in out and re.search("sprites, batch 2", out) and len(markdown_tables(out)) == 2
