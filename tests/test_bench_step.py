"""tools.bench step without a GPU: its flops against torch's counter, its tables run, what it refuses."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.test_bench import run
from tools import bench, bench_step


def settings(**changes):
    usual = dict(device="cpu", small=True, frames=4, size=32, ratio=0.75, batch=[4], steps=1, rounds=1, peer=None,
                 profile=0, variants=["eager"])
    return SimpleNamespace(**usual | changes)


def counted(call):
    """Flops of what is run, attention as its products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, dict(decoder="joint"), dict(fusion=2, text_length=20), dict(relevance="none"),
                                     dict(relevance="own")],
                         ids=str)
def test_flops_are_those_that_torch_counts(monkeypatch, changes):
    for name, value in changes.items():
        monkeypatch.setattr(bench_step.train.PRESETS["sprites"].model, name, value)
    step = bench_step.make_step(settings(), 6, "eager")
    said, parts = bench_step.flops(step.cfg, step.teacher.cfg, 6), step.parts()
    for name in ("teacher", "relevance target", "student ViT", "decoder and MRM", "text, fusion, VTC, VTM, MLM"):
        assert said[name] == pytest.approx(counted(parts[name]), rel=2e-3), name
    assert counted(parts["clips to the device"]) == counted(parts["clipping and AdamW"]) == 0
    unseen = said["bandwidth and mask"] - counted(parts["bandwidth and mask"])          # the counter sees no custom op
    assert sum(said.values()) - unseen == pytest.approx(counted(step), rel=2e-3)


def test_flops_of_the_paper_s_step_by_hand():
    cfg = bench_step.deepcopy(bench_step.train.PRESETS["base"])
    cfg.model = bench_step.replace(cfg.model, vocab=30522, mask_id=103, target=768)
    said = bench_step.flops(cfg, bench_step.SigLIPConfig(), 64)
    tower = 12 * (24 * 196 * 768 ** 2 + 4 * 196 ** 2 * 768) + 2 * 196 * 768 ** 2                # 16 * 16 * 3 = 768
    texts = 12 * (24 * 64 * 768 ** 2 + 4 * 64 ** 2 * 768) + 2 * 768 ** 2
    assert said["teacher"] == 256 * tower + 64 * texts
    student = 12 * (24 * 116 * 768 ** 2 + 4 * 116 ** 2 * 768)
    assert said["student ViT"] == pytest.approx(64 * 3 * student, rel=0.01)
    assert said["decoder and MRM"] < said["student ViT"] / 5
    assert bench_step.flops(cfg, bench_step.SigLIPConfig(), 128)["teacher"] == 2 * said["teacher"]


@pytest.mark.parametrize("small", [True, False])
def test_a_variant_is_what_its_name_says_whatever_the_preset(small):
    for name in bench_step.VARIANTS:
        cfg = bench_step.settings(settings(small=small), 4, name)
        assert cfg.compile == name.startswith("compiled")
        assert cfg.activation_checkpointing == ("checkpointing" in name)


def test_parts_leave_the_model_as_it_was_but_for_the_optimizer():
    step = bench_step.make_step(settings(), 4, "eager")
    parts, before = step.parts(), {k: v.clone() for k, v in step.model.state_dict().items()}
    for name, part in parts.items():
        if name != "clipping and AdamW":
            part()
            part()
    assert all(torch.equal(v, before[k]) for k, v in step.model.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())
    for _ in range(2):                                                      # with the same gradients again
        parts["clipping and AdamW"]()
        assert not torch.equal(before["vit.embed.weight"], step.model.vit.embed.weight)
        before = {k: v.clone() for k, v in step.model.state_dict().items()}
    step()


def test_a_step_trains_and_a_kept_guide_is_the_teachers():
    step, kept = (bench_step.make_step(settings(), 4, name) for name in ("eager", "eager, guide kept"))
    before = [p.clone() for p in step.model.parameters()]
    told, read = step.guide(step.batch), kept.guide(kept.batch)
    assert torch.equal(told.keep, read.keep)
    torch.testing.assert_close(told.text, read.text)
    ids = torch.arange(told.aligned.shape[1:3].numel()).expand(4, -1)
    said, found = (x.at(ids) @ told.text.T for x in (told, read))           # what the codes are to keep
    assert (said - found).norm() < 0.01 * said.norm()
    kept.teacher.tokens = None                                              # it is not asked again
    for s in (step, kept):
        s()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_tables(capsys):
    bench_step.step_tables(settings(variants=["eager", "eager, checkpointing", "eager, guide kept"], profile=3))
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (eager[a-z, ]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.e-]+) \| ([\d.]+) % ", out, re.M)
    assert [row[0] for row in rows] == ["eager", "eager, checkpointing", "eager, guide kept"]
    for _, ms, rate, _, share in rows:
        assert float(rate) == pytest.approx(4e3 / float(ms), rel=0.02) and 0 < float(share) < 100
    assert float(rows[2][3]) < float(rows[0][3]) == float(rows[1][3])       # Tflop
    parts = re.findall(r"^\| (teacher|student ViT|decoder and MRM|reading the guide|clipping and AdamW) \|", out, re.M)
    assert parts.count("student ViT") == 2 and parts.count("teacher") == 1 == parts.count("reading the guide")
    assert "Self CPU" in out


def test_the_peer_stands_beside(monkeypatch, capsys):
    asked = []

    def umt_step(*args):
        asked.append(args)
        return (lambda: torch.zeros(())), {"commit": "abc"}

    monkeypatch.setattr(bench_step, "umt_step", umt_step)
    bench_step.step_tables(settings(peer="umt"))
    out = capsys.readouterr().out
    assert asked == [("umt", "cpu", 4, 4, 32, 4, 36, True)] and "commit abc" in out
    assert re.search(r"^\| UMT's stage 2, at widths of its own \| ", out, re.M)


@pytest.mark.parametrize("flags, message", [
    (["--variants", "fast"], "--variants 'fast': there are 'eager', "),
    (["--batch", "0"], "want to be positive"),
])
def test_what_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["step", *flags])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_peer_that_is_not_there_is_one_line():
    ran = run("step", "--device", "cpu", "--batch", "2", "--size", "16", "--peer", "nowhere")
    assert ran.returncode == 1 and re.fullmatch("tools.bench: .*nowhere.*\n", ran.stderr), ran.stderr


def test_command():
    ran = run("step", "--device", "cpu", "--batch", "2", "--size", "16", "--steps", "1", "--rounds", "1",
              "--variants", "eager")
    assert ran.returncode == 0 and "small shapes, batch 2" in ran.stdout and "its parts" in ran.stdout, ran.stderr
