"""
A step of training: the same losses however its layers are computed, and no waiting for the device.

Losses are compared over 20 steps, of which each follows from those before it, with dropout and drop path. What waits is
looked for on the device "meta", whose tensors have no numbers that anybody could wait for; a GPU says it itself.
"""

import math
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import test_answers
import test_train
import torch
import torch.nn.functional as nnf
from test_model import KEEP, N, T, heavy, random_batch, random_ids, random_video
from test_train import Killed, first_run, kill, log, small_sprites  # noqa: F401  (two are fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

import data
import guides
import masking
import masks
import model as student
import runs
import teacher
import train
from guides import Guides
from masking import sent
from model import Bert, Block, ClusterSTM, ModelConfig, VideoToText, corrupt, most_words, stream
from teacher import Guide

given = test_train.given                            # fixture
CFG = ModelConfig(
    patch=4, width=16, depth=4, heads=2, drop_path=0.3, text_width=16, text_depth=3, text_heads=2, fusion=1,
    dropout=0.2, vocab=40, mask_id=4, text_length=7, embed=8, decoder_width=16, decoder_depth=2, decoder_heads=2,
    target=10)
STEPS, MASKED = 20, 14                              # the others see all tokens


# ---------------------------------------------------------------------------------------------------------------------
# The same losses

def losses(parts=1, sized=False, **how):
    """Of each step, with the norm of its gradient."""
    torch.manual_seed(0)
    model = ClusterSTM(CFG).train()
    train.prepare(model, SimpleNamespace(**{"compile": False, "activation_checkpointing": False, **how}))
    optimizer, found = torch.optim.AdamW(model.parameters(), 1e-3, fused=True), []
    for step in range(STEPS):
        batches, told = zip(*(random_batch(seed=step * parts + i) for i in range(parts)), strict=True)
        told = [replace(g, aligned=g.aligned.float(), text=g.text.float()) if step < MASKED else None for g in told]
        if sized:
            told = [g and heavy(g, seed=step) for g in told]
        mean = train.backward(model, batches, lambda b, g=told: train.with_whole(model, b, g), {"mlm": 0.7})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: value.item() for name, value in mean.items()} | {"norm": norm.item()})
    assert set(found[0]) == {"mrm", "vtc", "vtm", "mlm", "norm"} and set(found[-1]) == {*found[0]} - {"mrm"}
    assert all(map(math.isfinite, [value for row in found for value in row.values()]))
    return found


def assert_close(found, expected, rel):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a == pytest.approx(b, rel=rel), step


@pytest.fixture
def eager(monkeypatch):
    """torch.compile with all but the compiler, which takes a minute here; -> how many graphs there are, and breaks."""
    real, counters = torch.compile, torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", lambda f, options, **how: real(f, backend="aot_eager", **how))
    yield lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    torch._dynamo.reset()


@pytest.mark.parametrize("parts, sized", [(1, False), (3, False), (2, True)])
def test_computing_layers_again_changes_nothing(parts, sized):
    assert losses(parts, sized, activation_checkpointing=True) == losses(parts, sized)


@pytest.mark.parametrize("parts, how", [
    (1, {"compile": True}), (2, {"compile": True, "activation_checkpointing": True}),
    (1, {"compile": True, "sized": True})],
    ids=["compiled", "and computed again, in two micro-batches", "tokens that stand for others"])
def test_compiled_layers_have_the_same_losses_and_share_their_programs(eager, parts, how):
    assert_close(losses(parts, **how), losses(parts, how.get("sized", False)), 1e-5)
    graphs, breaks = eager()
    # Blocks with and without drop path, in the decoder, layers of text, those that fuse; each again as the number of
    # tokens changes, and without gradient where there are other micro-batches.
    assert breaks == 0 and 4 <= graphs <= (8 if parts == 1 else 13)


def old_formulas(patch):
    """As all of it was once: with Python's numbers, as many logits as words, and drawn as the loss came to it."""
    def drop(self, x):
        if not self.training or self.rate == 0:
            return x
        return x * (torch.rand(len(x), 1, 1, device=x.device) >= self.rate) / (1 - self.rate)

    def begin(self, C, heads, drop_path=0.0, cross=False, real=Block.__init__):
        real(self, C, heads, drop_path, cross)
        self.rate = drop_path

    def predict(self, states, labels):
        words = labels != -100
        return nnf.cross_entropy(self.words(states[words]).float(), labels[words], reduction="sum")

    def encode_video(self, video, keep=None, size=None, real=ClusterSTM.encode_video):
        if keep is None:
            return real(self, video)
        T, h, w = self.vit.grid(video)
        tokens = self.vit(video, keep)
        member = nnf.one_hot(keep // (h * w), T).to(tokens.dtype)
        count = member.sum(1)
        weight = (count > 0).float()
        frames = member.mT @ tokens / count.clamp_min(1)[..., None]
        unit = nnf.normalize(self.vision_proj(self.pool_norm(frames)), dim=-1)
        return tokens, (unit * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)

    def half_of_the_words(ids, vocab, mask_id, generator):
        chosen, kind = (torch.rand(ids.shape, generator=generator) for _ in range(2))
        word = torch.randint(mask_id + 1, vocab, ids.shape, generator=generator)
        chosen = (chosen < 0.5) & (ids > mask_id)
        corrupted = torch.where(chosen & (kind < 0.8), mask_id, ids)
        return torch.where(chosen & (kind >= 0.9), word, corrupted), torch.where(chosen, ids, -100)

    def forward(self, batch, guide, whole, real=ClusterSTM.forward):
        drawn = replace(whole, corrupted=self.corrupt(batch), wanted=guide and self.wanted(batch, guide))
        return real(self, batch, guide, drawn)

    patch.setattr(Block, "__init__", begin)
    patch.setattr(Block, "drop", drop)
    patch.setattr(Bert, "predict", predict)
    patch.setattr(ClusterSTM, "encode_video", encode_video)
    patch.setattr(ClusterSTM, "forward", forward)
    patch.setattr(student, "corrupt", half_of_the_words)
    patch.setattr(Guide, "at", lambda self, ids: torch.stack([p[i] for p, i in zip(self.aligned.flatten(1, 2), ids,
                                                                                  strict=True)]).float())


@pytest.mark.parametrize("parts", [1, 2])
def test_the_losses_are_those_of_the_formulas_that_waited(parts, monkeypatch):
    found = losses(parts)
    old_formulas(monkeypatch)
    assert_close(found, losses(parts), 1e-5)


def test_a_run_may_be_compiled_and_compute_again_and_go_on_without(given, eager):
    train.main(given("--name plain"))
    both = "--compile --activation-checkpointing"
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "unmasked", 3)                  # of which no state is written
        with pytest.raises(Killed):
            train.main(given(f"--name a {both}"))
    graphs, breaks = eager()
    assert breaks == 0 and 0 < graphs <= 15         # the teacher's layers too
    train.main(given("--name a --resume"))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 9)
        with pytest.raises(Killed):
            train.main(given("--name b"))
    train.main(given("--name b --resume --activation-checkpointing"))
    plain = log("out/plain")
    assert len(plain) == 26 and log("out/b") == plain
    for key, row in log("out/a").items():
        assert row == pytest.approx(plain[key], rel=1e-5), key


def test_what_is_computed_again_is_what_has_a_gradient(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "checkpoint", lambda f, *args, real=train.checkpoint, **how: (
        calls.append(f.__self__), real(f, *args, **how))[1])
    how = SimpleNamespace(compile=False, activation_checkpointing=True)
    model = train.prepare(ClusterSTM(CFG).train(), how)
    batch, told = random_batch()
    model(batch, replace(told, aligned=told.aligned.float(), text=told.text.float()))
    assert len(calls) == len(set(calls)) == 4 + 2 + 3           # blocks, the decoder's, BERT's layers
    calls.clear()
    frozen = train.prepare(ClusterSTM(CFG).eval(), how)
    frozen.encode_video(batch.video)
    assert not calls


def test_dropout_is_a_function_of_the_micro_batch_whatever_was_drawn_before():
    torch.manual_seed(0)
    model, (batch, _) = ClusterSTM(CFG).train(), random_batch()
    calls = lambda batches: train.with_whole(model, batches, [None])
    found = [torch.manual_seed(seed) and train.backward(model, [batch], calls, {}) for seed in (1, 2)]
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------------------------------
# Masked words, as many logits whatever their number

def words(fraction, M=16, L=9, seed=0):
    """BERT in fp64, states, and labels of which that share is a word."""
    torch.manual_seed(seed)
    bert = Bert(student.BertConfig(vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
                                   intermediate_size=8, fusion_layers=1)).double()
    for p in bert.parameters():
        p.data.normal_(std=0.5)
    labels = torch.randint(5, 40, (M, L))
    there = torch.rand(M, L).argsort().argsort() < fraction * L
    return bert, torch.randn(M, L, 12, dtype=torch.float64, requires_grad=True), labels.where(there, -100)


@pytest.mark.parametrize("fraction", [0, 0.1, 0.6])
def test_masked_words_cost_what_they_cost_one_by_one_and_their_states_alone_get_a_gradient(fraction):
    bert, states, labels = words(fraction)
    found = bert.predict(states, labels)
    expected = states.new_zeros(())
    for m in range(16):
        for place in range(9):
            if labels[m, place] != -100:
                expected = expected - bert.words(states[m, place]).log_softmax(-1)[labels[m, place]]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(found, [states, *bert.cls.parameters()])
    if fraction:
        for one, other in zip(grads, torch.autograd.grad(expected, [states, *bert.cls.parameters()]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not grads[0][labels == -100].any() and all(g.isfinite().all() for g in grads)
    assert fraction or not any(g.any() for g in grads)


def test_as_many_logits_are_formed_whatever_the_words(monkeypatch):
    counts = []
    monkeypatch.setattr(Bert, "words", lambda self, states, real=Bert.words: (
        counts.append(states.shape[:-1].numel()), real(self, states))[1])
    for fraction in (0, 0.1, 0.6):
        bert, states, labels = words(fraction)
        bert.predict(states, labels)
    assert counts == [most_words(16 * 9)] * 3 and counts[0] == 108          # 72 + 3 * 12


def test_no_masked_word_costs_nothing_in_the_text_stage_and_with_a_video():
    bert, _, _ = words(0)
    empty = torch.tensor([[2, 0, 0, 0, 0, 0, 0]] * 3)
    corrupted, labels = corrupt(empty, 40, 4, torch.Generator().manual_seed(0))
    assert (labels == -100).all() and torch.equal(corrupted, empty)
    assert bert(corrupted, labels)["mlm"].item() == 0
    batch, told = random_batch()
    batch.ids = empty[:1].expand(4, -1)
    torch.manual_seed(0)
    loss = ClusterSTM(CFG).train()(batch, replace(told, aligned=told.aligned.float(), text=told.text.float()))
    assert loss["mlm"].item() == 0
    sum(loss.values()).backward()


def test_the_first_words_that_chance_chose_are_predicted_and_those_past_the_most_left_alone(monkeypatch):
    ids, seed = random_ids(9, L=11), lambda: torch.Generator().manual_seed(5)
    free, every = corrupt(ids, 40, 4, seed())
    places = (every != -100).flatten().nonzero()[:, 0]
    assert 20 < len(places) <= most_words(99)
    for most in (0, 1, 7, len(places) - 1, len(places), 99):
        monkeypatch.setattr(student, "most_words", lambda count, most=most: most)
        corrupted, labels = corrupt(ids, 40, 4, seed())
        first = torch.zeros(99, dtype=torch.bool).index_fill(0, places[:most], True).view(9, 11)
        assert torch.equal(labels, torch.where(first, ids, -100))
        assert torch.equal(corrupted, torch.where(first, free, ids))


def test_chance_never_comes_to_the_most_words_that_are_predicted():
    ids = torch.full((64, 32), 7)                                           # texts without an end: the worst there is
    chosen = [(corrupt(ids, 40, 4, torch.Generator().manual_seed(s))[1] != -100).sum().item() for s in range(1500)]
    mean, sd = 64 * 32 / 2, (64 * 32) ** 0.5 / 2
    assert most_words(64 * 32) == math.ceil(mean + 6 * sd) == 1160
    assert abs(sum(chosen) / len(chosen) - mean) < 5 * sd / 1500 ** 0.5 and max(chosen) < mean + 4.5 * sd
    assert [most_words(n) for n in (1, 4, 36, 37, 100)] == [1, 4, 36, 37, 80]       # of a few all


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn

@pytest.mark.parametrize("parts", [1, 3])
def test_each_micro_batch_draws_its_words_and_targets_once_a_step(parts, monkeypatch):
    drawn = []
    for name, real in (("corrupt", ClusterSTM.corrupt), ("wanted", ClusterSTM.wanted)):
        monkeypatch.setattr(ClusterSTM, name, lambda self, batch, *args, name=name, real=real: (
            drawn.append((name, batch.seed)), real(self, batch, *args))[1])
    losses(parts)
    step = [(name, step * parts + i + 5) for step in range(STEPS)
            for name in ("corrupt", "wanted") if step < MASKED or name == "corrupt" for i in range(parts)]
    assert drawn == step


def test_forward_predicts_the_words_and_targets_that_it_is_given():
    torch.manual_seed(0)
    model = ClusterSTM(replace(CFG, dropout=0.0, drop_path=0.0)).train()
    batch, told = random_batch()
    told = replace(told, aligned=told.aligned.float(), text=told.text.float())
    whole, = model.whole([batch], [told])
    corrupted, labels = whole.corrupted
    one = model(batch, told, whole)
    other = model(batch, told, replace(whole, corrupted=(corrupted, labels.roll(1, 0)), wanted=whole.wanted[:, :1]))
    assert {name for name in one if one[name].item() != other[name].item()} == {"mlm", "mrm"}
    q = model.decoder(model.vit(batch.video, told.keep), told.keep, whole.wanted[:, :1], (T, 2, 3)).detach()
    e = q - told.at(whole.wanted[:, :1])
    expected = ((e @ whole.gram) * e).sum(-1).mean() / whole.variance
    torch.testing.assert_close(other["mrm"].detach(), expected, rtol=1e-5, atol=1e-7)


def test_targets_are_drawn_by_the_seed_and_never_among_the_kept():
    model, (batch, told) = ClusterSTM(CFG), random_batch()
    wanted = model.wanted(batch, told)
    draw = torch.rand(4, T * N, generator=stream(batch, 2))
    for row, keep, ids in zip(draw.tolist(), told.keep.tolist(), wanted.tolist(), strict=True):
        assert ids == sorted({*range(T * N)} - {*keep}, key=row.__getitem__)[:round((T * N - T * KEEP) * 0.25)]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing waits

META = torch.device("meta")
RUNS = pytest.mark.parametrize("flags, step", [
    ("--data.views 0", 0),
    ("--data.views 0 --mask.name umt --micro-batch 8", 0),
    ("--data.views 0 --mask.name random --mrm 0", 0),
    ("--data.views 1 --guide-codes 5", 0),          # what is said is kept
    ("--data.views 1 --guide-codes 5", 3),          # and read
    ("--data.views 1 --mask.name tube", 3),
    ("--data.views 0 --model.proportional", 0),
    ("--data.views 1 --guide-codes 5 --model.proportional", 3)])
KINDS = pytest.mark.parametrize("kind", ["retrieval", "qa", "caption"])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Waiting(TorchDispatchMode):
    """Finds what crosses between host and device. Numbers that are asked of a meta tensor raise by themselves."""

    def __init__(self):
        super().__init__()
        self.found, self.pinned = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        said = func(*args, **(kwargs or {}))
        every = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, said)) if isinstance(x, torch.Tensor)]
        kinds = {x.is_meta for x in every if x.ndim or func.__name__.startswith(("_to_copy", "copy_"))}
        if len(kinds) > 1 and not self.pinned:
            self.found.append(func.__name__)
        return said


class OnItsWay(runs.Word):
    """A word that comes to the host as zeros: in pinned memory, which is not waited for."""

    def __init__(self, x):
        self.host, self.there = torch.zeros(x.shape, dtype=x.dtype), None


@contextmanager
def nothing_waits():
    """On the device "meta"; what is sent to it from pinned memory may be."""
    mode = Waiting()

    def send(x, device):
        assert x.is_meta or not mode.pinned
        mode.pinned = True
        try:
            return x.to(device)
        finally:
            mode.pinned = False

    def make(data, *args, device=None, real=torch.tensor, **how):
        if device is not None and torch.device(device).type == "meta":
            mode.found.append("tensor")                                     # made on the host, copied and waited for
        return real(data, *args, device=device, **how)

    real = torch.autocast
    with pytest.MonkeyPatch.context() as patch:
        for module in (masks, masking, student, teacher, guides):
            patch.setattr(module, "sent", send)
        patch.setattr(torch, "tensor", make)
        patch.setattr(torch, "autocast", lambda kind, *args, **how: nullcontext() if kind == "meta" else real(
            kind, *args, **how))
        patch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
        patch.setattr(train, "Word", OnItsWay)
        patch.setattr(guides, "Word", OnItsWay)
        patch.setattr(guides, "guide", lambda *args, real=teacher.guide: real(*args[:5], False, *args[6:]))
        with mode:
            yield mode
    assert mode.found == []


def fit(cfg, model, calls, groups, stage="pretrain"):
    """train.fit, all but its loader and its end. The first step may wait: it makes the constants."""
    device = groups[0][0].ids.device

    def micro_batches(*_):
        for step, group in enumerate(groups):
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if step else "default")
            elif step:
                mode.found *= step > 1
            yield group
        raise Killed

    stop = SimpleNamespace(asked=False, note=lambda: None, obey=lambda: None)
    with ExitStack() as closing, pytest.MonkeyPatch.context() as patch:
        run = train.Run(cfg, f"out/{cfg.name}", device, 0, 1, stop, closing, micro={stage: cfg.micro_batch})
        patch.setattr(train, "micro_batches", micro_batches)
        with nothing_waits() if device == META else nullcontext() as mode, pytest.raises(Killed):
            train.fit(run, stage, model, None, None, cfg.batch, 99, 1e-3, calls)


def pretrain(given, flags, step, device):
    """Three steps from `step`; those before it were on the host."""
    cfg = given(f"--name a --log-every 99 --save-every 99 {flags}")
    clips = data.Clips(data.read_annotations(cfg.data.train, cfg.data.root), cfg.data, cfg.seed)
    tokenizer, run = data.load_tokenizer(cfg.text), train.Run(cfg, f"out/{cfg.name}", torch.device("cpu"), 0, 1)
    groups = list(train.micro_batches(run, clips, tokenizer, "pretrain", cfg.batch, cfg.micro_batch, 0, step + 3))
    told = Guides(run, teacher.SigLIP.from_pretrained(cfg.teacher), clips, tokenizer)
    for group in groups[:step]:
        told(group)
    if told.kept:
        told.write_down()
    if told.kept and told.records.codes:
        told.records.codes = guides.Codes(*(x.to(device) for x in vars(told.records.codes).values()))
    told.teacher = told.teacher.to(device)
    cfg.model.vocab, cfg.model.mask_id, cfg.model.target = tokenizer.get_vocab_size(), 4, 16
    how = SimpleNamespace(compile=False, activation_checkpointing=True)
    model = train.prepare(ClusterSTM(cfg.model).to(device).train(), how)
    fit(cfg, model, lambda batches: train.with_whole(model, batches, told(batches)),
        [[b.to(device) for b in group] for group in groups[step:]])


def tune(given, first, kind, device):
    cfg, tokenizer = given("--name a --log-every 99 --save-every 99"), data.load_tokenizer(f"{first}/out/first/text")
    sizes = replace(CFG, vocab=tokenizer.get_vocab_size(), text_length=6)
    model = VideoToText(sizes, kind == "qa") if kind != "retrieval" else ClusterSTM(sizes)
    model.mlm, cfg.batch, cfg.micro_batch = False, 3, 3
    batch = data.collate(test_answers.samples(captions=kind == "caption"), tokenizer, 6, 0,
                         answer_length=6 * (kind != "retrieval")).to(device)
    fit(cfg, model.to(device), lambda batches: train.with_whole(model, batches, [None]) if kind == "retrieval" else [
        (b, None) for b in batches], [[batch]] * 3, "finetune")


@RUNS
def test_no_step_of_pretraining_waits_for_the_device(given, flags, step):
    pretrain(given, flags, step, META)


@KINDS
def test_no_step_of_fine_tuning_waits_for_the_device(given, first, kind):
    tune(given, first, kind, META)


@GPU
@RUNS
def test_a_gpu_is_not_waited_for_in_pretraining(given, flags, step):
    try:
        pretrain(given, flags, step, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
@KINDS
def test_a_gpu_is_not_waited_for_in_fine_tuning(given, first, kind):
    try:
        tune(given, first, kind, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


WAITS = {
    "a boolean index": ("nonzero", Bert, "predict",
                        lambda self, states, labels: self.words(states[labels != -100]).sum()),
    "a list of ids": ("out of meta", Guide, "at", lambda self, ids: ids.tolist()),
    "a number": ("item", student, "spread", lambda p, form: p.new_tensor(form(p).mean().item())),
    "one_hot": ("item", Block, "drop", lambda self, x: x + 0 * nnf.one_hot(x.argmax(-1)).sum()),
    "a copy to the host": ("out of meta", Guides, "ask", lambda self, b, real=Guides.ask: real(self, b).keep.cpu()),
    "memory that is not pinned": ("_to_copy", ClusterSTM, "corrupt", lambda self, b: (
        b.ids, torch.zeros(b.ids.shape, dtype=torch.int64).to(b.ids.device))),
    "a constant": ("'tensor'", student, "spread", lambda p, form: form(p).mean() + torch.tensor(3.0, device=p.device)),
    "a host's index": ("index.Tensor", student, "spread", lambda p, form: form(p[torch.tensor([0, 1])]).mean()),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_would_be_seen(given, monkeypatch, what):
    said, *change = WAITS[what]
    monkeypatch.setattr(*change)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)) as error:
        pretrain(given, "--data.views 0 --mask.name tube --micro-batch 8", 0, META)
    assert said in str(error.value)


def test_what_is_sent_to_a_gpu_is_pinned_and_not_waited_for():
    said = []
    pinned = SimpleNamespace(to=lambda *args, **how: said.append(("pinned", args, how)))
    host = SimpleNamespace(is_cuda=False, pin_memory=lambda: pinned, to=lambda *args: said.append(("host", args)))
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    sent(host, gpu), sent(host, cpu)
    sent(SimpleNamespace(is_cuda=True, to=lambda *args: said.append(("gpu", args))), gpu)
    assert said == [("pinned", (gpu,), {"non_blocking": True}), ("host", (cpu,)), ("gpu", (gpu,))]


@pytest.mark.parametrize("asks", [True, False], ids=["questions", "captions"])
def test_in_training_all_places_are_computed_and_those_without_a_piece_cost_nothing(asks):
    torch.manual_seed(0)
    model, sums = VideoToText(replace(CFG, dropout=0.0, drop_path=0.0), asks), []
    batch = SimpleNamespace(video=random_video(2), ids=random_ids(3), rows=torch.tensor([1, 0, 1]),
                            answers=test_answers.ANSWERS, asked=test_answers.ASKED, weight=torch.rand(7))
    for mode in (model.train(), model.eval()):      # eval mode forms logits of the pieces alone
        loss = mode(batch)["lm"]
        sums.append([loss, *torch.autograd.grad(loss, [p for p in mode.parameters() if p.requires_grad],
                                                allow_unused=True)])
    for trained, scored in zip(*sums, strict=True):
        torch.testing.assert_close(trained, scored, rtol=1e-5, atol=1e-7)
    memory, there = model.train().ask(model.vit(batch.video), batch.ids, batch.rows)
    asked = batch.asked if asks else batch.rows[batch.asked]
    found = model.log_likelihood(batch.answers, asked, memory, there)
    said = batch.answers[:, 1:] != 0
    assert 0 < said.sum() < said.numel() and not found[~said].any() and (found[said] < 0).all()
