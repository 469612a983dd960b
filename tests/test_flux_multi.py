"""Flux-Multi: a step at several budgets of the same clips, and distillation between them."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from helpers.models import MODEL, TEXT, VIT, random_batch
from helpers.runs import (
    Killed,
    assert_close_weights,
    assert_same,
    kill,
    log,
    on_ranks,
    read_rows,
    weights,
    weights_without_key_bias,
)

import train
from config import Config
from data import DataConfig
from loop import forward_backward
from masking import MaskConfig
from model import ClusterSTM, ModelConfig
from targets import compute_targets, select_visible
from teacher import SigLIP
from train import attach_batch_stats

BUDGETS = (8, 5, 2)                     # of clips of 12 tokens
MULTI = """--all-budgets --mask.tokens 24 12 6 --mask.name flux_group_dynamic --data.frames-range 3 6 1
    --data.size-range 12 20 4 --data.pool 30 100 --micro-batch 2 --vit.pos-embed relative --steps 8
    --unmasked-steps 2 """


def student(**model):
    """A small student in fp64, in training mode, without dropout."""
    torch.manual_seed(0)
    return ClusterSTM(VIT, TEXT, replace(MODEL, **model)).double().train()


def at_budgets(batch, targets, budgets=BUDGETS):
    """The targets of a batch at nested budgets, the largest first."""
    tokens = targets.token_targets.shape[1] * targets.token_targets.shape[2]
    torch.manual_seed(batch.seed)
    order = torch.stack([torch.randperm(tokens) for _ in batch.text_ids])
    ids = [order[:, :S].sort(1).values for S in budgets]
    full = replace(targets, visible_ids=ids[0], token_targets=targets.token_targets.double(),
                   text_embeds=targets.text_embeds.double(), token_size=None)
    return replace(full, smaller=[replace(full, visible_ids=x) for x in ids[1:]])


def batches(count=2, B=3):
    pairs = [random_batch(B, seed=i) for i in range(count)]
    for i, (batch, _) in enumerate(pairs):
        batch.seed = 7 + i                      # the budget of VTM and MLM is drawn from it
    return [batch for batch, _ in pairs], [at_budgets(*pair) for pair in pairs]


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return grads


def assert_equal_gradients(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_gradient_is_the_sum_of_those_at_each_budget():
    model, (inputs, targets) = student(), batches()
    losses = forward_backward(model, inputs, lambda b: attach_batch_stats(model, b, targets), {})
    multi = gradients(model)
    assert {*losses} == {f"{name}_{S}" for name in ("mrm", "vtc") for S in BUDGETS} | {"vtm", "mlm"}
    for k in range(len(BUDGETS)):               # each on its own, with VTM and MLM where the micro-batch has them
        single = [t.at_budgets()[k] for t in targets]
        stats = model.batch_stats(inputs, single, k, len(BUDGETS))
        assert [s.fuses for s in stats] == [b.seed % 3 == k for b in inputs]
        for batch, target, of_batch in zip(inputs, single, stats, strict=True):
            (sum(model(batch, replace(target, smaller=None), of_batch).values()) / len(inputs)).backward()
    assert_equal_gradients(multi, gradients(model))


def test_a_single_budget_is_as_without_the_mechanism():
    model, (inputs, targets) = student(), batches()
    targets = [replace(t, smaller=None) for t in targets]
    losses = forward_backward(model, inputs, lambda b: attach_batch_stats(model, b, targets), {})
    assert [*losses] == ["mrm", "vtc", "vtm", "mlm"] and all(s.larger is None and s.fuses and not s.suffix for s in
                                                             model.batch_stats(inputs, targets))


@pytest.mark.parametrize("kind", ["chain", "star"])
@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
def test_distillation_teaches_smaller_budgets_and_not_its_targets(kind, loss):
    only = dict.fromkeys(("mrm_weight", "vtc_weight", "vtm_weight", "mlm_weight"), 1e-30) | {"mlm_weight": 0.0}
    model, (inputs, targets) = student(distill=kind, distill_loss=loss, distill_weight=0.5, **only), batches(1)
    weights = {"mrm": 0.0, "vtc": 0.0, "vtm": 0.0, "distill": 0.5}
    losses = forward_backward(model, inputs, lambda b: attach_batch_stats(model, b, targets), weights)
    found = gradients(model)
    assert [name for name in losses if "distill" in name] == ["distill_2", "distill_5"]

    features = [model.encode_video(inputs[0].video, t.visible_ids)[1] for t in targets[0].at_budgets()]
    pairs = [(features[1], features[0]), (features[2], features[0 if kind == "star" else 1])]
    expected = [1 - (nnf.normalize(a, dim=-1) * nnf.normalize(b.detach(), dim=-1)).sum(-1).mean() for a, b in pairs]
    if loss == "smooth_l1":                     # (1 - cosine) / E'
        expected = [x / features[0].shape[-1] for x in expected]
    for S, x in zip(BUDGETS[1:], expected, strict=True):
        assert abs(losses[f"distill_{S}"] - x) < 1e-6
    (0.5 * sum(expected)).backward()
    assert_equal_gradients(found, gradients(model))


def test_the_targets_of_all_budgets_come_from_one_pass_of_the_teacher(first_run):
    teacher = SigLIP.from_pretrained(f"{first_run}/out/first/teacher")
    batch, _ = random_batch(3)
    mask = MaskConfig("umt")
    with pytest.MonkeyPatch.context() as patch:
        calls, forward = [], SigLIP.forward_features
        patch.setattr(SigLIP, "forward_features", lambda *args: calls.append(1) or forward(*args))
        p = teacher.cfg.vision_config.patch_size
        grid = (batch.video.shape[3] // p, batch.video.shape[4] // p)
        targets = compute_targets(teacher, batch, mask, 0.5, grid=grid, total=7, smaller=(4, 1), with_texts=False)
    assert calls == [1]
    ids = [t.visible_ids for t in targets.at_budgets()]
    assert [x.shape[1] for x in ids] == [7, 4, 1]
    for larger, smaller in ((ids[0], ids[1]), (ids[1], ids[2])):
        assert (smaller[..., None] == larger[:, None]).any(-1).all()
    tokens = teacher.forward_features(teacher.normalize(batch.video.flatten(0, 1), grid))
    tokens = tokens.unflatten(0, batch.video.shape[:2])
    for x in ids:
        assert torch.equal(x, select_visible(teacher, tokens, mask, 0.5, batch.seed, grid, x.shape[1]))
    assert targets.smaller[0].token_targets is targets.token_targets


def test_runs_are_the_same_on_any_ranks_and_after_a_kill(run_config):
    flags = f"{MULTI} --model.distill chain --name"
    train.main(run_config(f"{flags} one"))
    rows = log("out/one")
    assert len(rows) == 10
    with open("out/one/log.jsonl") as f:
        names = {*re.findall(r'"([a-z]+_\d+)"', f.read())}
    assert names == {f"{name}_{S}" for name in ("mrm", "vtc") for S in (24, 12, 6)} | {"distill_12", "distill_6"}
    for world in (2, 4):
        on_ranks(world, run_config(f"{flags} on{world}"))
        for row, expected in zip(read_rows(f"out/on{world}/log.jsonl"), read_rows("out/one/log.jsonl"), strict=True):
            losses = {key for key in expected if key.partition("_")[0] in ("mrm", "vtc", "vtm", "mlm", "distill")}
            assert {key: row[key] for key in losses} == pytest.approx({key: expected[key] for key in losses}, rel=1e-4)
        assert_close_weights(weights_without_key_bias(f"out/on{world}"), weights_without_key_bias("out/one"), atol=1e-5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch, "pretrain", 5)
        train.main(run_config(f"{flags} killed"))
    train.main(run_config(f"{flags} killed --resume"))
    assert_same(weights("out/killed"), weights("out/one"))


@pytest.mark.parametrize("options, message", [
    (dict(), "mask.tokens must have at least two budgets.*all_budgets.*got \\(\\)"),
    (dict(mask=MaskConfig(tokens=(9,))), "at least two.*\\(9,\\)"),
    (dict(mask=MaskConfig(tokens=(9, 4)), stage="finetune", task="sprites"), "not be finetune.*'finetune'"),
    (dict(mask=MaskConfig(tokens=(9, 4)), model=ModelConfig(mrm_weight=0, vtc_weight=0)), "mrm_weight or.*vtc_weight"),
    (dict(all_budgets=False, model=ModelConfig(distill="star")), "distill must be none unless all_budgets.*'star'"),
    (dict(mask=MaskConfig(tokens=(9, 4)), model=ModelConfig(distill="star", vtc_weight=0)), "vtc_weight.*'star'"),
    (dict(all_budgets=False, model=ModelConfig(decoder_queries=1)), "decoder_queries must be 0, or at least 2.*got 1")])
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"all_budgets": True, "data": DataConfig(num_frames=4, image_size=64), **options})
