"""
A training step: the same losses however its layers are computed, and no waiting for the device.

Losses are compared over several steps, each of which depends on those before it, with dropout and drop path. Waits are
looked for on the device "meta", whose tensors have no values that the host could wait for; and on a GPU if there is
one, which reports them itself.
"""

import math
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.models import (
    ANSWER_IDS,
    CLIP_INDEX,
    FP32,
    KEEP,
    MODEL,
    QUESTION_INDEX,
    N,
    T,
    configs,
    heavy,
    question_samples,
    random_batch,
    random_ids,
    random_video,
    student,
    to_fp32,
)
from helpers.runs import Killed, kill, log
from helpers.siglip import random_clips, tiny_siglip
from torch.utils._python_dispatch import TorchDispatchMode

import budgets
import encoders
import loop
import masking
import model
import positions
import targets
import teacher
import train
from annotations import read_annotations
from data import ClipDataset, collate, iterate_micro_batches
from kernels import to_device
from loop import Stage, forward_backward, train_stage
from model import ClusterSTM, VideoToText
from runtime import AsyncHostCopy, RunContext, Stream, seeded_generator
from targets import TargetProvider
from teacher import SigLIP
from tokenizer import load_tokenizer
from train import attach_batch_stats, wrap_layers

CONFIGS = configs(vit={"drop_path": 0.3}, text={"dropout": 0.2})
STEPS, MASKED_STEPS = 12, 8                         # the last steps are without a mask


# ---------------------------------------------------------------------------------------------------------------------
# The same losses

def wrap_options(compile=False, activation_checkpointing=False):
    """The settings that wrap_layers reads."""
    return SimpleNamespace(compile=compile, activation_checkpointing=activation_checkpointing, shapes_vary=False)


def train_losses(parts=1, with_sizes=False, **options):
    """Train a student in micro-batches, `parts` a step -> for each step its losses and gradient norm."""
    torch.manual_seed(0)
    net = wrap_layers(ClusterSTM(*CONFIGS).train(), wrap_options(**options))
    optimizer, rows = torch.optim.AdamW(net.parameters(), 1e-3, fused=True), []
    for step in range(STEPS):
        batches, step_targets = zip(*(random_batch(seed=step * parts + i) for i in range(parts)), strict=True)
        if step < MASKED_STEPS:
            step_targets = [heavy(t, seed=step) if with_sizes else t for t in map(to_fp32, step_targets)]
        else:
            step_targets = [None] * parts
        make_inputs = lambda b, t=step_targets: attach_batch_stats(net, b, t)
        losses = forward_backward(net, batches, make_inputs, {"mlm": 0.7})
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        rows.append({name: value.item() for name, value in losses.items()} | {"norm": norm.item()})
    assert {*rows[0]} == {"mrm", "vtc", "vtm", "mlm", "norm"} and {*rows[-1]} == {*rows[0]} - {"mrm"}
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows


@pytest.fixture
def count_graphs(monkeypatch):
    """torch.compile traces but does not compile, which takes a minute -> a function: (graphs, graph breaks)."""
    real, counters = torch.compile, torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", lambda f, options, **kwargs: real(f, backend="aot_eager", **kwargs))
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()


@pytest.mark.parametrize("parts, with_sizes", [(1, False), (3, False), (2, True)])
def test_activation_checkpointing_changes_no_loss(parts, with_sizes):
    assert train_losses(parts, with_sizes, activation_checkpointing=True) == train_losses(parts, with_sizes)


@pytest.mark.parametrize("parts, options", [
    (1, {}), (2, {"activation_checkpointing": True}), (1, {"with_sizes": True})],
    ids=["one micro-batch", "two, with activation checkpointing", "with token sizes"])
def test_compiled_layers_give_the_same_losses_and_share_programs(count_graphs, parts, options):
    compiled = train_losses(parts, compile=True, **options)
    for step, (row, plain) in enumerate(zip(compiled, train_losses(parts, options.get("with_sizes", False)),
                                            strict=True)):
        assert row == pytest.approx(plain, rel=1e-5), step
    graphs, breaks = count_graphs()
    # Blocks with and without drop path, blocks of the decoder, text layers, fusion layers, the last of them for [CLS]
    # and for masked texts; each again if the number of tokens changes, and without gradient if there are several
    # micro-batches.
    assert breaks == 0 and 4 <= graphs <= (12 if parts == 1 else 17)


def test_a_compiled_teacher_computes_the_same_targets(count_graphs):
    model, batch = tiny_siglip(), random_clips()
    plain, frames = targets.compute_targets(model, batch, masking.cluster_stm, 0.6), batch.video.flatten(0, 1)
    pixels = model.rescale(frames)
    wrap_layers(model, wrap_options(compile=True))
    compiled = targets.compute_targets(model, batch, masking.cluster_stm, 0.6)
    assert torch.equal(compiled.visible_ids, plain.visible_ids)
    torch.testing.assert_close(compiled.token_targets, plain.token_targets)
    torch.testing.assert_close(compiled.text_embeds, plain.text_embeds)
    assert count_graphs() == (3, 0)                     # the pixels, a layer of each tower
    assert torch.equal(model.rescale(frames), pixels)


def test_a_run_may_change_compile_and_activation_checkpointing_on_resume(run_config, count_graphs):
    train.main(run_config("--name plain"))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "unmasked", 3)                  # before its first checkpoint
        with pytest.raises(Killed):
            train.main(run_config("--name a --compile --activation-checkpointing"))
    graphs, breaks = count_graphs()
    assert breaks == 0 and 0 < graphs <= 20         # with the pixels and the layers of the teacher
    train.main(run_config("--name a --resume"))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 9)
        with pytest.raises(Killed):
            train.main(run_config("--name b"))
    train.main(run_config("--name b --resume --activation-checkpointing"))
    plain = log("out/plain")
    assert len(plain) == 26 and log("out/b") == plain
    for key, row in log("out/a").items():
        assert row == pytest.approx(plain[key], rel=1e-5), key


def test_only_layers_with_a_gradient_are_recomputed():
    batch, batch_targets = random_batch()
    options = wrap_options(activation_checkpointing=True)
    with mock.patch.object(train, "checkpoint", wraps=train.checkpoint) as checkpoint:
        net = wrap_layers(ClusterSTM(*CONFIGS).train(), options)
        net(batch, to_fp32(batch_targets))
        layers = [call.args[0].__self__ for call in checkpoint.call_args_list]
        assert len({*layers}) == 2 + 2 + 3                          # of ViT, decoder and BERT, whose last runs twice
        assert len(layers) == 2 + 2 + 4
        checkpoint.reset_mock()
        wrap_layers(ClusterSTM(*CONFIGS).eval(), options).encode_video(batch.video)
        assert not checkpoint.called


def test_dropout_depends_on_the_micro_batch_not_on_earlier_draws():
    torch.manual_seed(0)
    net, (batch, _) = ClusterSTM(*CONFIGS).train(), random_batch()
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(forward_backward(net, [batch], lambda batches: attach_batch_stats(net, batches, [None]), {}))
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# Random draws

@pytest.mark.parametrize("parts", [1, 3])
def test_masked_words_and_queries_are_drawn_once_per_micro_batch(parts):
    draws = []

    def recorded(name, method):
        def record(self, batch, *args):
            draws.append((name, batch.seed))
            return method(self, batch, *args)
        return record

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mask_text", "sample_queries"):
            patch.setattr(ClusterSTM, name, recorded(name, getattr(ClusterSTM, name)))
        train_losses(parts)
    expected = [(name, step * parts + i + 5) for step in range(STEPS)
                for name in ("mask_text", "sample_queries") if step < MASKED_STEPS or name == "mask_text"
                for i in range(parts)]
    assert draws == expected


def test_forward_predicts_the_words_and_queries_of_the_batch_stats():
    net, (batch, batch_targets) = student(), random_batch()
    stats, = net.batch_stats([batch], [batch_targets])
    masked_ids, labels = stats.mlm_inputs
    changed = replace(stats, mlm_inputs=(masked_ids, labels.roll(1, 0)), query_ids=stats.query_ids[:, :1])
    a, b = net(batch, batch_targets, stats), net(batch, batch_targets, changed)
    assert {name for name in a if a[name].item() != b[name].item()} == {"mlm", "mrm"}
    tokens = net.vit(batch.video, batch_targets.visible_ids)
    predictions = net.decoder(tokens, batch_targets.visible_ids, changed.query_ids, (T, 2, 3))
    error = predictions - batch_targets.gather(changed.query_ids)
    expected = ((error @ stats.text_gram) * error).sum(-1).mean() / stats.target_variance
    torch.testing.assert_close(b["mrm"], expected, **FP32)


def test_each_purpose_draws_other_random_numbers():
    batch, _ = random_batch()
    streams = Stream.__members__.values()
    draws = {tuple(torch.rand(4, generator=seeded_generator(batch, stream)).tolist()) for stream in streams}
    assert len(draws) == len(Stream.__members__) == 5


def test_queries_are_the_masked_tokens_with_the_lowest_draws():
    net, (batch, batch_targets) = ClusterSTM(*CONFIGS), random_batch()
    draws = torch.rand(4, T * N, generator=seeded_generator(batch, Stream.QUERIES)).tolist()
    count = round((T * N - T * KEEP) * MODEL.decoder_query_ratio)
    for draw, visible, queries in zip(draws, batch_targets.visible_ids.tolist(),
                                      net.sample_queries(batch, batch_targets).tolist(), strict=True):
        assert queries == sorted({*range(T * N)} - {*visible}, key=draw.__getitem__)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# No step waits for the device

META = torch.device("meta")
VARYING = "--data.frames-range 3 6 1 --data.size-range 12 20 4 --mask.name flux_group_dynamic --micro-batch 2"
RUNS = pytest.mark.parametrize("flags, step", [
    ("--data.num-views 0", 0),
    ("--data.num-views 0 --mask.name umt --micro-batch 8", 0),
    ("--data.num-views 0 --mask.name random --model.mrm-weight 0", 0),
    ("--data.num-views 1", 0),                      # targets are written to the cache
    ("--data.num-views 1", 3),                      # and read from it
    ("--data.num-views 1 --mask.name tube", 3),
    ("--data.num-views 0 --model.proportional", 0),
    ("--data.num-views 1 --model.proportional", 3),
    (f"{VARYING} --vit.pos-embed relative --mask.tokens 24 12", 0),
    (f"{VARYING} --vit.pos-embed learned --mask.tokens 24 --mask.features student_embedding", 0),
    # Its first micro-batch may wait.
    ("--mask.teacher-tokens 32 --mask.name umt_global --model.proportional --target-pooling mean", 1)])
KINDS = pytest.mark.parametrize("kind", ["retrieval", "qa", "caption"])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class CopyDetector(TorchDispatchMode):
    """Record operations with tensors on the host and on "meta": copies. Reading a value of "meta" raises by itself."""

    def __init__(self):
        super().__init__()
        self.found, self.is_pinned = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        is_copy = func.__name__.startswith(("_to_copy", "copy_"))
        devices = {x.is_meta for x in tensors if x.ndim or is_copy}        # a host's scalar may meet a device's tensor
        if len(devices) > 1 and not self.is_pinned:
            self.found.append(func.__name__)
        return result


class ZerosOnHost(AsyncHostCopy):
    """An AsyncHostCopy of a tensor on "meta", which has no values: zeros arrive."""

    def __init__(self, x):
        self.host, self.event = torch.zeros(x.shape, dtype=x.dtype), None


@contextmanager
def detect_waits():
    """Let training run on "meta", and fail at the end if the host waited for it. Copies from pinned memory do not."""
    detector, real_autocast, real_tensor = CopyDetector(), torch.autocast, torch.tensor
    compute_targets = targets.compute_targets

    def copy_to_device(x, device):
        assert x.is_meta or not detector.is_pinned
        detector.is_pinned = True
        try:
            return x.to(device)
        finally:
            detector.is_pinned = False

    def make_tensor(data, *args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "meta":      # made on the host and copied
            detector.found.append("tensor")
        return real_tensor(data, *args, device=device, **kwargs)

    def compute_without_check(siglip, batch, mask, ratio, pooling, check, grid, **parts):
        return compute_targets(siglip, batch, mask, ratio, pooling, False, grid, **parts)           # as on a GPU

    with pytest.MonkeyPatch.context() as patch:
        for module in (budgets, encoders, model, positions, targets, teacher):
            patch.setattr(module, "to_device", copy_to_device)
        for module in (loop, targets):
            patch.setattr(module, "AsyncHostCopy", ZerosOnHost)
        patch.setattr(torch, "tensor", make_tensor)
        patch.setattr(torch, "autocast", lambda kind, *args, **kwargs: nullcontext() if kind == "meta" else
                      real_autocast(kind, *args, **kwargs))
        patch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
        patch.setattr(targets, "compute_targets", compute_without_check)
        with detector:
            yield detector
    assert detector.found == []


def run_steps(cfg, net, make_inputs, groups, stage="pretrain"):
    """Train on groups of micro-batches. The first step may wait, as it makes the constants."""
    device = groups[0][0].text_ids.device

    def iterate(*_):
        for step, group in enumerate(groups):
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if step else "default")
            elif step == 1:
                detector.found.clear()
            yield group
        raise Killed

    stop = SimpleNamespace(requested=False, defer=lambda: None, terminate_now=lambda: None)
    with ExitStack() as exit_stack, pytest.MonkeyPatch.context() as patch:
        run = RunContext(cfg, f"out/{cfg.name}", device, 0, 1, stop, exit_stack,
                         micro_batch_size={stage: cfg.micro_batch})
        patch.setattr(loop, "iterate_micro_batches", iterate)
        try:
            with detect_waits() if device == META else nullcontext() as detector, pytest.raises(Killed):
                train_stage(run, Stage(stage, net, None, None, cfg.batch, 99, 1e-3, make_inputs))
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def pretrain(run_config, flags, step, device, before_inputs=lambda: None):
    """Three steps from `step`, after the teacher has run for the earlier ones on the host."""
    cfg = run_config(f"--name a --log-every 99 --save-every 99 {flags}")
    dataset = ClipDataset(read_annotations(cfg.data.train_file, cfg.data.video_root), cfg.data, cfg.seed)
    tokenizer, host = load_tokenizer(cfg.text_encoder), torch.device("cpu")
    cfg = train.resolve_config(RunContext(cfg, f"out/{cfg.name}", host, 0, 1), tokenizer, cfg.teacher, "")
    run = RunContext(cfg, f"out/{cfg.name}", host, 0, 1)
    groups = list(iterate_micro_batches(run, dataset, tokenizer, "pretrain", cfg.batch, cfg.micro_batch, 0, step + 3))
    net = ClusterSTM(cfg.vit, cfg.text, cfg.model)
    provider = TargetProvider(run, SigLIP.from_pretrained(cfg.teacher), dataset, net.vit.embed_patches)
    for group in groups[:step]:
        provider(group)
    provider.flush()
    provider.teacher.to(device)
    net = net.to(device).train()
    wrap_layers(net, wrap_options(activation_checkpointing=True))

    def make_inputs(batches):
        before_inputs()
        return attach_batch_stats(net, batches, provider(batches))

    run_steps(cfg, net, make_inputs, [[b.to(device) for b in group] for group in groups[step:]])


def finetune(run_config, first_run, kind, device):
    """Three steps of a task of this kind."""
    cfg = run_config("--name a --log-every 99 --save-every 99")
    tokenizer = load_tokenizer(f"{first_run}/out/first/text")
    parts = configs(vit={"drop_path": 0.3},
                    text={"dropout": 0.2, "vocab_size": tokenizer.get_vocab_size(), "max_length": 6})
    net = ClusterSTM(*parts) if kind == "retrieval" else VideoToText(*parts, has_question=kind == "qa")
    net.losses, cfg = frozenset({"vtc", "vtm"}), replace(cfg, batch=3, micro_batch=3)
    batch = collate(question_samples(captions=kind == "caption"), tokenizer, 6, 0,
                    max_answer_length=6 * (kind != "retrieval")).to(device)
    make_inputs = (lambda batches: attach_batch_stats(net, batches, [None])) if kind == "retrieval" else (
        lambda batches: [(b, None) for b in batches])
    run_steps(cfg, net.to(device), make_inputs, [[batch]] * 3, "finetune")


@RUNS
def test_no_step_of_pretraining_waits_for_the_device(run_config, flags, step):
    pretrain(run_config, flags, step, META)


@KINDS
def test_no_step_of_fine_tuning_waits_for_the_device(run_config, first_run, kind):
    finetune(run_config, first_run, kind, META)


@GPU
@RUNS
@pytest.mark.gpu
def test_no_step_of_pretraining_waits_for_a_gpu(run_config, flags, step):
    pretrain(run_config, flags, step, torch.device("cuda"))


@GPU
@KINDS
def test_no_step_of_fine_tuning_waits_for_a_gpu(run_config, first_run, kind):
    finetune(run_config, first_run, kind, torch.device("cuda"))


@pytest.mark.parametrize("wait, message", [
    (lambda: torch.zeros(3).to(META), "_to_copy"),              # from memory that is not pinned
    (lambda: torch.ones((), device=META).item(), "item"),
], ids=["copy", "item"])
def test_a_wait_would_be_found(run_config, wait, message):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        pretrain(run_config, "--data.num-views 0 --mask.name tube --micro-batch 8", 0, META, before_inputs=wait)


def test_to_device_pins_memory_of_the_host_and_does_not_block():
    gpu, x, y = torch.device("cuda", 1), mock.Mock(is_cuda=False), mock.Mock(is_cuda=True)
    pinned = x.pin_memory.return_value
    assert to_device(x, gpu) is pinned.to.return_value and to_device(y, gpu) is y.to.return_value
    pinned.to.assert_called_once_with(gpu, non_blocking=True)
    y.to.assert_called_once_with(gpu)


@pytest.mark.parametrize("has_question", [True, False], ids=["questions", "captions"])
def test_logits_at_padding_change_neither_loss_nor_gradient(has_question):
    torch.manual_seed(0)
    net, results = VideoToText(*configs(), has_question), []
    batch = SimpleNamespace(video=random_video(2), text_ids=random_ids(3), clip_index=CLIP_INDEX,
                            answer_ids=ANSWER_IDS, question_index=QUESTION_INDEX, answer_weight=torch.rand(7))
    parameters = list(net.parameters())
    for training in (True, False):                  # eval mode computes the logits of tokens alone
        loss = net.train(training)(batch)["lm"]
        results.append([loss, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    context, mask = net.train().encode_context(net.vit(batch.video), batch.text_ids, CLIP_INDEX)
    context_index = QUESTION_INDEX if has_question else CLIP_INDEX[QUESTION_INDEX]
    log_p = net.log_likelihood(ANSWER_IDS, context_index, context, mask)
    is_token = ANSWER_IDS[:, 1:] != 0
    assert 0 < is_token.sum() < is_token.numel() and not log_p[~is_token].any() and (log_p[is_token] < 0).all()
