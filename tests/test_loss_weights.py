"""Losses of weight 0: neither they nor what only they need is computed, and their parameters are frozen."""

import re
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.models import random_batch, student, two_parts

import train
from config import Config
from model import ModelConfig

pytestmark = pytest.mark.usefixtures("seed_0")
NAMES = ("mrm", "vtc", "vtm", "mlm")


@pytest.mark.parametrize("losses", [c for n in range(1, 5) for c in combinations(NAMES, n)], ids="-".join)
def test_a_loss_of_weight_0_is_not_computed_nor_what_only_it_needs(losses):
    weights = {f"{name}_weight": float(name in losses) for name in NAMES}
    model, (batch, targets) = student(model=weights).train(), random_batch(4)
    every = student().train()
    every.load_state_dict(model.state_dict())
    spies = {name: mock.patch.object(part, name, wraps=getattr(part, name)) for part, name in (
        (model.bert, "forward_text"), (model.bert, "forward_cls"), (model.bert, "forward_fusion"),
        (model.bert, "lm_logits"), (model.vision_proj, "forward"), (model, "text_feature"), (model, "mask_text"),
        (model, "sample_queries"))}
    with ExitStack() as stack:
        calls = {name: stack.enter_context(spy) for name, spy in spies.items()}
        found = model(batch, targets)
    assert [*found] == [name for name in NAMES if name in losses]
    with torch.no_grad():
        expected = every(batch, targets)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    mrm, vtc, vtm, mlm = (name in losses for name in NAMES)
    used = {"forward_text": vtc or vtm or mlm, "text_feature": vtc or vtm, "forward": vtc or vtm, "forward_cls": vtm,
            "forward_fusion": mlm and not vtm, "lm_logits": mlm, "mask_text": mlm, "sample_queries": mrm}
    assert {name: spy.called for name, spy in calls.items()} == used
    if used["forward_text"]:
        assert len(calls["forward_text"].call_args.args[0]) == 4 * (vtc or vtm) + 4 * mlm

    # What train.py freezes is what gets no gradient: DDP would wait for it.
    sum(found.values()).backward()
    cfg = SimpleNamespace(text=model.text_cfg)
    patterns = train.unused_parameters(cfg, frozenset(losses))
    for name, p in model.named_parameters():
        assert (p.grad is None or not p.grad.any()) is any(re.search(pattern, name) for pattern in patterns), name


@pytest.mark.parametrize("changes", [
    {"mrm_texts": "batch"}, {"mrm_texts": "own"}, {"mrm_texts": "none"}, {"objective": "visible"},
    {"objective": "pixels"}, {"mrm_weight": 0.0}], ids=str)
def test_the_teacher_outputs_that_a_student_uses_are_enough(changes):
    """compute_targets leaves out the others. Two micro-batches, as the statistics of the batch need them too."""
    model, parts = student(model=changes), two_parts()
    stats = model.batch_stats(*zip(*parts, strict=True))
    expected = [model(*part, s) for part, s in zip(parts, stats, strict=True)]
    absent = {"text_embeds": None} if not model.cfg.uses_text_embeds else {}
    absent |= {"token_targets": None} if "mrm" not in model.losses else {}
    parts = [(batch, replace(targets, **absent)) for batch, targets in parts]
    stats = model.batch_stats(*zip(*parts, strict=True))
    for part, s, losses in zip(parts, stats, expected, strict=True):
        found = model(*part, s)
        assert found.keys() == losses.keys() and all(torch.equal(found[name], losses[name]) for name in losses)
    assert bool(absent) == (changes != {"mrm_texts": "batch"} and changes != {"mrm_texts": "own"})


def test_a_stage_without_a_loss_and_a_negative_weight_are_refused():
    only_mrm = dict(vtc_weight=0, vtm_weight=0, mlm_weight=0)
    for steps, unmasked_steps, weights, name in ((3, 0, {**only_mrm, "mrm_weight": 0}, "steps"),
                                                 (3, 2, only_mrm, "unmasked_steps")):
        with pytest.raises(ValueError, match=f"^{name} must be 0"):
            Config(steps=steps, unmasked_steps=unmasked_steps, model=ModelConfig(**weights))
    Config(unmasked_steps=0, model=ModelConfig(**only_mrm))
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="vtm_weight must be at least 0"):
            ModelConfig(vtm_weight=value)
