"""
Train ClusterSTM.

    python train.py                                                  # the embedded run: needs no data, no weights
    python train.py --data.train captions.json --data.root FOLDER    # the same on videos of your own
    torchrun --nproc_per_node=8 train.py base --teacher FOLDER --text FOLDER --data.train ... --data.root ...
    python train.py --stage finetune --task sprites-qa --student out/sprites         # a row of tasks.TASKS
    python train.py base --help

A run passes through the stages of runs.STAGES, each the same loop: a small SigLIP as teacher and the words of the text
encoder, where no weights are given for them; masked pretraining; then a short stage on all tokens. It writes out/NAME:
config.json, log.jsonl, model.safetensors and tokenizer.json, from which eval.py needs only the path; masked/, the model
before the unmasked stage; state/, from which --resume goes on, and torchrun --max-restarts by itself (runs.py); guide/,
what the teacher said, while the masked stage lasts (guides.py).

Fine-tuning takes its settings from the task's row and the student's folder; flags change them. It is scored on the
validation split after each epoch, where there is one, the best epoch is kept, and that is scored on the test split.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as scoring
from data import Batch, Clips, DataConfig, Mix
from guides import Guides
from masking import MaskConfig, keep_count, sent
from model import (
    Bert,
    BertLayer,
    Block,
    ClusterSTM,
    ModelConfig,
    VideoToText,
    bert_config,
    corrupt,
    save_weights,
    stream,
)
from runs import (
    STAGES,
    BadMedia,
    Run,
    Word,
    explain,
    finished,
    forget_rows,
    keep_as_begun,
    load_state,
    open_run,
    save_state,
)
from sprites import write_sprites
from tasks import data_root, find_file, find_task, read_answers, read_rows, split_files
from teacher import (
    Guide,
    Layer,
    SigLIP,
    SigLIPConfig,
    TextConfig,
    VisionConfig,
    find_folder,
    kept,
    known,
    load_weights,
    read_folder,
)


@dataclass
class SmallConfig:
    """What is trained first where no weights are given: a SigLIP on single frames, and the text encoder by MLM."""
    width: int = 96               # teacher: channels, also of its joint space (E)
    depth: int = 1                # teacher: layers of the vision tower; more of them mix the tokens of a frame
    text_depth: int = 2           # teacher: layers of the text tower
    heads: int = 12               # teacher: attention heads
    batch: int = 64               # teacher: frames a step, one of each clip
    steps: int = 800              # teacher: steps
    lr: float = 2e-3              # teacher: peak learning rate
    still: float = 0.5            # teacher: share of captions true of single frames ("still"), where the data has such
    text_steps: int = 300         # text: steps
    text_batch: int = 128         # text: captions a step
    text_lr: float = 1e-3         # text: peak learning rate


@dataclass
class Config:
    """Train ClusterSTM. Everything that a run writes is under out/NAME."""
    name: str = ""                # the run; its folder is out/NAME; empty: as the annotation file, without _train
    stage: Literal["all", "teacher", "text", "finetune"] = "all"    # all: what is missing, then pretrain; or one alone
    task: str = ""                # finetune: a row of tasks.TASKS
    data_root: str = ""           # finetune: folder of the task's files
    select: Literal["", "val", "test", "last"] = ""     # finetune: what picks the epoch; empty: val if there is one
    epochs: float = 0             # finetune: passes over the training split, in place of steps
    masked: bool = False          # finetune: see, and be scored with, the tokens that the mask keeps; else all
    resume: bool = False          # go on where out/NAME stopped
    teacher: str = ""             # folder or hub id of a SigLIP; empty: a small one is trained on the data first
    text: str = ""                # folder or hub id of a BERT; empty: trained by MLM on the captions first
    student: str = ""             # folder to start from (of train.py, or tools/convert.py); empty: drawn anew
    tokenizer: str = ""           # tokenizer.json or vocab.txt; empty: the text encoder's, or trained on the captions
    device: str = "auto"          # cpu, cuda, or auto: cuda where there is one
    seed: int = 0                 # of everything drawn
    batch: int = 64               # clips a step, over all ranks
    micro_batch: int = 0          # clips a rank holds at once; 0: its share of the batch
    steps: int = 560              # masked steps
    unmasked_steps: int = 40      # steps on all tokens that follow
    unmasked_batch: int = 32      # clips a step of those; 0: batch
    lr: float = 1e-3              # peak learning rate, reached after the warmup, then a cosine to 1 %
    unmasked_lr: float = 0.2      # the unmasked stage's peak, as a multiple of lr
    warmup: float = 0.1           # share of a stage's steps
    weight_decay: float = 0.02    # of matrices; embeddings, norms, biases and the temperature have none
    clip_grad: float = 3.0        # largest norm of the gradient; 0: any
    mrm: float = 1.0              # weight of masked relevance modelling, or of model.objective in its place; 0: none
    vtc: float = 1.0              # weight of the video-text contrast
    vtm: float = 1.0              # weight of video-text matching
    mlm: float = 1.0              # weight of masked language modelling
    pool: Literal["map", "mean", "token"] = "map"       # how the teacher pools a token's neighbourhood; or not at all
    guide_codes: int = 0          # numbers of 8 bits kept of each target where views come round again; 0: all, in fp16
    compile: bool = False         # torch.compile for the layers of teacher and student
    activation_checkpointing: bool = False      # keep of a layer its input alone, and compute it again going backward
    skip_nonfinite: int = 0       # steps of a stage that may be left out because loss or gradient is not finite
    log_every: int = 10           # steps between two rows of log.jsonl
    save_every: int = 500         # steps between two states
    keep: int = 2                 # newest states that are kept
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    small: SmallConfig = field(default_factory=SmallConfig)

    def __post_init__(self):
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device wants to be auto, cpu or cuda, is {self.device!r}")
        tuning = {name: getattr(self, name) for name in ("task", "data_root", "select", "epochs", "masked")}
        if self.stage != "finetune" and any(tuning.values()):
            raise ValueError(f"{', '.join(f'{k} {v!r}' for k, v in tuning.items() if v)} is of --stage finetune, the "
                             f"stage is {self.stage!r}")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}")
        if self.guide_codes and not self.data.views:
            raise ValueError(f"guide_codes {self.guide_codes} with data.views 0: what is seen once is not kept")
        if min(self.batch, self.steps, self.log_every, self.save_every, self.keep) < 1 or self.unmasked_steps < 0:
            raise ValueError(f"batch {self.batch}, steps {self.steps}, log_every {self.log_every}, save_every "
                             f"{self.save_every}, keep {self.keep} want to be positive, unmasked_steps "
                             f"{self.unmasked_steps} at least 0")


PRESETS = {
    # The embedded run: everything small enough for two CPU cores.
    "sprites": Config(
        # d_c: so small a teacher says nearly the same of all background, and most pairs are background; 0.95 is the
        # scale at which sprites stand out, found on training clips (docs/log.md).
        mask=MaskConfig(quantile=0.95),
        model=ModelConfig(patch=8, width=96, depth=4, heads=3, drop_path=0.0, positions="3d", text_width=96,
                          text_depth=3, text_heads=3, fusion=1, dropout=0.0, text_length=36, embed=96,
                          decoder_width=96, decoder_depth=1, decoder_heads=3),
    ),
    # UMT's stage 2 (its exp/pretraining/b16_5m.py), with r = 0.85 for 0.8 and a SigLIP teacher for CLIP; bf16 for fp16
    # and a clipped gradient are ours. Steps: ten epochs of 5 M clips.
    "base": Config(
        name="base", teacher="google/siglip-base-patch16-224", text="bert-base-uncased", batch=2048, steps=27_000,
        unmasked_steps=2_700, unmasked_batch=1024, lr=1e-4, save_every=1000, compile=True,
        data=DataConfig(train="data/webvid_cc3m_train.json", root="data/videos", frames=4, size=224, scale=0.5,
                        flip=True, views=0, cache=False, workers=12, on_device=True),
        mask=MaskConfig(ratio=0.85), model=ModelConfig(),
    ),
    # As base, 256 pixels a side, for which there is a SigLIP-L/16.
    "large": Config(
        name="large", teacher="google/siglip-large-patch16-256", text="bert-large-uncased", batch=4096, steps=13_500,
        unmasked_steps=1_350, unmasked_batch=2048, lr=1e-4, save_every=1000, compile=True,
        data=DataConfig(train="data/webvid_cc3m_train.json", root="data/videos", frames=4, size=256, scale=0.5,
                        flip=True, views=0, cache=False, workers=12, on_device=True),
        mask=MaskConfig(ratio=0.85),
        model=ModelConfig(width=1024, depth=24, heads=16, drop_path=0.2, text_width=1024, text_depth=24,
                          text_heads=16, fusion=5, embed=768),
    ),
}


# The loop

def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear from 1 % of the peak over the warmup, then a cosine back to 1 %."""
    up = warmup * steps
    share = (step + 1) / up if step < up else 0.5 + 0.5 * math.cos(math.pi * (step - up) / max(1, steps - up))
    return peak * (0.01 + 0.99 * min(1.0, share))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; embeddings, norms, biases and scalars do not (UMT decays embeddings and the temperature too)."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[p.ndim >= 2 and "embedding" not in name].append(p)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def batch_sizes(cfg: Config) -> dict[str, int]:
    """Clips a step, by stage."""
    if cfg.stage == "finetune":
        return {"finetune": cfg.batch}
    small = {"teacher": cfg.small.batch} if not cfg.teacher else {}
    small |= {"text": cfg.small.text_batch} if not cfg.text else {}
    return {"pretrain": cfg.batch, "unmasked": cfg.unmasked_batch or cfg.batch} | small


def micro_sizes(cfg: Config, world: int) -> dict[str, int]:
    """Clips a rank holds at once, by stage, which must divide the stage's batch evenly over the ranks."""
    micro = {}
    for stage, batch in batch_sizes(cfg).items():
        micro[stage] = cfg.micro_batch * (stage not in ("teacher", "text")) or max(1, batch // world)
        if batch % (world * micro[stage]):
            raise ValueError(f"{stage}: a batch of {batch} does not divide into micro-batches of {micro[stage]} "
                             f"on {world} ranks")
    return micro


def micro_batches(run: Run, clips: Clips | Mix, tokenizer, stage: str, batch: int, micro: int, step: int, steps: int):
    """From `step` on, this rank's micro-batches of each step. Sample n of a run is a function of (seed, n) alone."""
    cfg = run.cfg
    parts = batch // micro
    mine = range(run.rank * parts // run.world, (run.rank + 1) * parts // run.world)
    order = [range(s * batch + i * micro, s * batch + (i + 1) * micro) for s in range(step, steps) for i in mine]
    loader = iter(DataLoader(
        clips, batch_sampler=order, num_workers=cfg.data.workers, pin_memory=run.device.type == "cuda",
        worker_init_fn=quiet_worker, collate_fn=partial(
            data.collate, tokenizer=tokenizer, length=cfg.model.text_length, seed=0, sep=cfg.model.sep,
            answer_length=find_task(cfg.task).answer_length if cfg.task else 0),
    ))
    side = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None     # copies run beside the step before
    try:
        for s in range(step, steps):
            group = []
            for i in mine:
                with torch.cuda.stream(side) if side else nullcontext():
                    b = next(loader).to(run.device, non_blocking=True)
                if side:
                    now = torch.cuda.current_stream(run.device)
                    now.wait_stream(side)
                    b.tensors(lambda x, now=now: x.record_stream(now) if x.is_cuda else None)
                key = np.random.SeedSequence((cfg.seed, STAGES.index(stage), s, i))
                b.seed, b.n = int(key.generate_state(1, np.uint64)[0]), s * batch + i * micro
                group.append(b)
            yield group
    finally:
        if cfg.data.workers:
            loader._shutdown_workers()          # they outlive SIGTERM, and an exit would wait for them


def quiet_worker(_):
    """A SIGTERM to all processes is the training's to answer: it still needs its loaders, and ends them itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


ENOUGH = 1000       # samples, before their share of unreadable ones says something


def fit(run: Run, stage: str, model: nn.Module, clips: Clips | Mix, tokenizer, batch: int, steps: int, lr: float, calls,
        after: dict | None = None, before_saving=lambda: None) -> nn.Module:
    """
    One stage: `steps` steps of `model`. `calls` turns a step's micro-batches into the arguments of the model's calls;
    `after`, step -> function, what is done after some of them; `before_saving`, what all ranks do before a state is
    written.

    state/ in the run's folder is where --resume goes on; log.jsonl gets the losses, averaged over micro-batches and
    ranks; bad_media.jsonl what could not be read.
    """
    cfg, micro = run.cfg, run.micro[stage]
    os.makedirs(run.folder, exist_ok=True)
    # Parameters that a stage has no use for get no gradient, and DDP must not wait for one.
    N = (cfg.data.size // cfg.model.patch) ** 2
    all_shown = keep_count(N, cfg.mask.ratio) == N and cfg.model.objective != "visible"
    idle = ["crossattention"] * (stage == "text")
    idle += [r"^decoder\."] * (stage in ("unmasked", "finetune") or stage == "pretrain" and (all_shown or not cfg.mrm))
    idle += [r"^bert\.cls\."] * (stage == "finetune" and cfg.mlm == 0)
    for name, p in model.named_parameters():
        p.requires_grad_(not any(re.search(pattern, name) for pattern in idle))
    used = [p for p in model.parameters() if p.requires_grad]
    betas = (0.9, 0.95 if stage == "teacher" else 0.999)        # SigLIP's and UMT's
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr, betas, fused=True)
    step, counts = load_state(run, stage, model, optimizer)
    counts = {"skipped": 0, "unreadable": 0} | counts
    log = os.path.join(run.folder, "log.jsonl")
    if run.rank == 0:
        forget_rows(log, stage, step)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if run.world > 1 else model
    if run.world > 1:
        net.broadcast_buffers = False           # they are constants
    model.train()

    weight = {**dict.fromkeys(("mrm", "align", "pixels"), cfg.mrm), "vtc": cfg.vtc, "vtm": cfg.vtm,
              "mlm": cfg.mlm if stage != "text" else 1.0}
    save = lambda step: (before_saving(), run.rank == 0 and save_state(run, stage, step, model, optimizer, counts))
    loader = run.closing.enter_context(closing(micro_batches(run, clips, tokenizer, stage, batch, micro, step, steps)))
    bar = tqdm(total=steps, initial=step, desc=f"{cfg.name} {stage}", disable=run.rank > 0, mininterval=1)
    run.closing.callback(bar.close)
    bad = BadMedia(run.folder)
    after = after or {}
    after.get(step, lambda: None)()         # the run may have been stopped in the middle of it
    waited, clock, since = 0.0, time.perf_counter(), step
    last = None                             # a step, and the device's word on it, which the host has not read yet

    def not_too_many(seen: int):
        """Of the samples seen so far: ValueError where too many of the videos asked for could not be read."""
        lost, asked = counts["unreadable"], seen + counts["unreadable"]
        if lost > cfg.data.max_bad * asked and (seen >= ENOUGH or seen == steps * batch):
            raise ValueError(f"{lost} of {asked} videos asked for could not be read, more than data.max_bad, "
                             f"{cfg.data.max_bad:g}: {bad.path} names them")

    def leave():
        """On all ranks, after a SIGTERM to any."""
        save(step)
        run.wait()
        if run.rank == 0:
            bar.close()
            print(f"{run.folder}: stopped after step {step} of {stage}; --resume goes on", flush=True)
        sys.exit(0)

    def settle(taken: int, word: Word, losses: dict, norm: torch.Tensor, batches: list[Batch]) -> bool:
        """All ranks read the same word of a step before the weights change again, and do the same; -> whether to go."""
        skipped, stopped, lost = word.read()
        if skipped:
            said = describe(run, f"{stage} step {taken}", losses, norm, batches, clips)
            if counts["skipped"] >= cfg.skip_nonfinite:
                save(taken)                 # with the weights as they were: --resume begins with this step
                raise ValueError(said)
            counts["skipped"] += 1
            if run.rank == 0:
                tqdm.write(said)
        counts["unreadable"] += int(lost)
        try:
            not_too_many((taken + 1) * batch)
        except ValueError:
            save(taken + 1)
            raise
        return stopped > 0

    if step == steps:
        not_too_many(step * batch)
    run.stop.note()
    while step < steps:
        run.at.update(folder=run.folder, step=f"{stage} step {step}")
        t = time.perf_counter()
        batches = next(loader)
        waited += time.perf_counter() - t
        lost = [about for b in batches for about in b.lost]
        bad.add(lost)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, cfg.warmup, lr)

        mean = backward(net, batches, calls, weight)

        # A step that is not finite is left out by the device. The host does not wait for its word on that, but reads
        # the one of the step before.
        values = torch.stack([*mean.values()]).float()
        norm = torch.nn.utils.clip_grad_norm_(used, cfg.clip_grad or math.inf)
        finite = values.isfinite().all() & norm.isfinite()
        word = torch.stack([(~finite).float(), norm.new_full((), run.stop.asked), norm.new_full((), len(lost))])
        if run.world > 1:
            dist.all_reduce(word)
        if last and settle(*last):
            leave()
        optimizer.found_inf = (word[0] > 0).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step, Word(word), mean, norm, batches
        step += 1

        bar.update()
        saving = step % cfg.save_every == 0 or step == steps or step in after
        stopped = False
        if saving or step % cfg.log_every == 0:
            stopped, last = settle(*last), None
        if step % cfg.log_every == 0 or step == steps:
            if run.world > 1:
                dist.all_reduce(values)
                values /= run.world
            seconds = time.perf_counter() - clock
            row = {"stage": stage, "step": step, **dict(zip(mean, values.tolist(), strict=True)),
                   "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"],
                   "clips/s": (step - since) * batch / seconds, "wait": waited / seconds}
            row |= {name: count for name, count in counts.items() if count}
            if run.rank == 0:
                with open(log, "a") as f:
                    f.write(json.dumps({k: v if isinstance(v, str) or math.isfinite(v) else None
                                        for k, v in row.items()}) + "\n")
            shown = (*mean, "clips/s", "wait", *counts)
            bar.set_postfix({k: f"{row[k]:.3g}" for k in shown if k in row}, refresh=False)
            waited, clock, since = 0.0, time.perf_counter(), step
        t = time.perf_counter()
        if stopped:
            leave()
        if saving:
            save(step)
        if step == steps or step in after:          # what follows ends at once: not on some ranks alone
            if any(run.every(run.stop.asked)):
                leave()
            run.stop.obey()
        if step in after:
            after[step]()
            run.stop.note()
        clock += time.perf_counter() - t            # the rate is that of training
    run.stop.obey()
    loader.close()
    bar.close()
    run.wait()
    return model.requires_grad_(True).eval()


def backward(net: nn.Module, batches: list[Batch], calls, weight: dict[str, float]) -> dict[str, torch.Tensor]:
    """
    The gradients of a step's micro-batches, and their losses by name, averaged. On a GPU matrices are multiplied in
    bf16, and nothing waits for the device. Gradients cross the ranks once a step, in the last micro-batch.
    """
    kind, mean = batches[0].video.device.type, {}
    autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")
    with autocast():
        arguments = calls(batches)
    for i, (b, args) in enumerate(zip(batches, arguments, strict=True)):
        torch.manual_seed(b.seed)               # dropout too is a function of (seed, step, micro-batch)
        last = i == len(batches) - 1
        with nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync():
            with autocast():
                losses = net(*args)
                loss = sum(weight.get(name, 1.0) * value for name, value in losses.items())
            (loss / len(batches)).backward()
        for name, value in losses.items():
            mean[name] = mean.get(name, 0) + value.detach() / len(batches)
    return mean


def prepare(model: nn.Module, cfg: Config, shapes_vary: bool = False) -> nn.Module:
    """
    The model itself; its layers compiled, or computed again going backward, where cfg says so. Pretraining steps have
    fixed shapes; in fine-tuning they vary, as the last clips of a split are fewer, and those of a batch not yet seen.
    """
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.optimize_ddp = False           # it would cut each layer at the edges of DDP's buckets
    for name, layer in model.named_modules():
        if not isinstance(layer, (Block, BertLayer, Layer)) or "text_decoder" in name:      # that speaks word by word
            continue
        if cfg.compile:         # one program for all layers of a kind; what is drawn is what is drawn without it
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=None if shapes_vary else False,
                                          options={"fallback_random": True})
        if cfg.activation_checkpointing and layer.training:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def describe(run: Run, at: str, losses: dict, norm: torch.Tensor, batches: list[Batch], clips) -> str:
    """What there is to say of a step that is not finite, of all ranks; nonfinite.json gets its samples too."""
    mine = {"losses": {name: value.item() for name, value in losses.items()},
            "clips": [b.clip.tolist() for b in batches], "captions": [b.captions for b in batches]}
    ranks = run.every(mine)
    for told in ranks:
        told["videos"] = [[clips.row(clip).video for clip in some] for some in told["clips"]]
    if run.rank == 0:
        data.write_atomically(os.path.join(run.folder, "nonfinite.json"), json.dumps(
            {"step": at, "grad_norm": norm.item(), "ranks": ranks}, indent=1))
    mean = {name: sum(told["losses"][name] for told in ranks) / len(ranks) for name in losses}
    return (f"{at} not taken: gradient norm {norm.item()}, " + ", ".join(f"{k} {v:g}" for k, v in mean.items())
            + f"; clips {[some for told in ranks for some in told['clips']]}")


# The stages

def small_teacher(cfg: Config, tokenizer) -> SigLIP:
    """A SigLIP that two CPU cores can train, with the student's patches."""
    s = cfg.small
    torch.manual_seed(cfg.seed)
    layers = dict(hidden_size=s.width, intermediate_size=4 * s.width, num_attention_heads=s.heads, hidden_act="relu")
    vision = VisionConfig(num_hidden_layers=s.depth, image_size=cfg.data.size, patch_size=cfg.model.patch, **layers)
    text = TextConfig(num_hidden_layers=s.text_depth, vocab_size=tokenizer.get_vocab_size(),
                      max_position_embeddings=cfg.model.text_length, pad_token_id=0, **layers)
    teacher = SigLIP(SigLIPConfig(vision, text), tokenizer)
    # Objects are 6 % of the tokens. A MAP head that begins by averaging sees none of them for hundreds of steps, and a
    # tower that mixes tokens writes the whole frame into each. So the heads begin sharp, and the mixing at nothing.
    nn.init.normal_(teacher.vision_model.head.probe, std=3.0)
    for layer in teacher.vision_model.encoder.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
    return teacher


def single_frames(teacher: SigLIP, batches: list[Batch], still: float, seed: int) -> list[tuple]:
    """
    One frame of each clip, drawn, with the caption true of single frames where there is one and chance wills it. Drawn
    by sample, not by micro-batch: the loss is of the whole batch, and so these micro-batches may go with the ranks.
    """
    calls = []
    for b in batches:
        T = b.video.shape[1]
        draws = [np.random.default_rng((seed, b.n + i, 4)).random(2) for i in range(len(b.captions))]
        frames = torch.stack([video[int(t * T)] for video, (t, _) in zip(b.video, draws, strict=True)])
        captions = [s if s and k < still else c for s, c, (_, k) in zip(b.stills, b.captions, draws, strict=True)]
        calls.append((frames, teacher.tokenize(captions)))
    return calls


def find_tokenizer(run: Run, captions, text: str):
    """The one given, or that of the text encoder's folder, or the data's; else one is trained on the captions."""
    cfg = run.cfg
    own = os.path.join("out", cfg.name, "tokenizer.json")
    files = [os.path.join(folder, name) for folder in (text, os.path.dirname(cfg.data.train) or ".") if folder
             for name in ("tokenizer.json", "vocab.txt")]
    path = cfg.tokenizer or next((p for p in files if os.path.isfile(p)), own)
    if path == own and run.rank == 0 and not os.path.isfile(own):
        data.train_tokenizer(captions, own)
    run.wait()
    return data.load_tokenizer(path)


def start(cfg: Config) -> Run:
    """Processes, device, folder."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, and this machine or this build of torch has no CUDA GPU")
    cuda = cfg.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    micro = micro_sizes(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    out = os.path.join("out", cfg.name)
    home = {stage: os.path.join(out, stage) if stage in ("teacher", "text") else out for stage in micro}
    if cfg.stage in ("teacher", "text"):        # a run of its own, beside which others may train the rest
        if cfg.stage not in home:
            raise ValueError(f"--stage {cfg.stage} trains what is not given; --{cfg.stage} is, "
                             f"{getattr(cfg, cfg.stage)}")
        home = {cfg.stage: home[cfg.stage]}
    run = replace(open_run(cfg, sorted(set(home.values())), device), folder=out)
    for stage, folder in home.items():          # draws go by micro-batches: on other ranks a run keeps those it had
        if stage != "teacher":
            micro[stage] = keep_as_begun(folder, run, f"micro_batch of {stage}", micro[stage])
        batch = batch_sizes(cfg)[stage]
        if batch % (run.world * micro[stage]):
            raise ValueError(f"{stage}: the run began with micro-batches of {micro[stage]}, into which a batch of "
                             f"{batch} does not divide on {run.world} ranks")
    run.micro = micro
    return run


def main(cfg: Config) -> nn.Module:
    """Train what `cfg` says; returns the model of the last stage."""
    name = cfg.name or os.path.splitext(os.path.basename(cfg.data.train))[0].removesuffix("_train")
    run = start(replace(cfg, name=name, data=replace(cfg.data), model=replace(cfg.model)))     # filled in on the way
    try:
        model = (finetune if cfg.stage == "finetune" else pretrain)(run)
    except RuntimeError as error:
        raise explain(error, run) from error
    finally:
        run.end()
    if run.world > 1:
        dist.destroy_process_group()
    return model


def read_clips(run: Run) -> tuple[Clips, Clips | None]:
    """The clips of videos, and of images; rank 0 reads the annotations and decodes, the others open what it wrote."""
    cfg, first, clips = run.cfg.data, 0, []
    kinds = cfg.corpora(), cfg.corpora(images=True)
    rows = [run.first(lambda some=some: data.write_rows(some, "out")) for some in kinds if some]
    digests = [some.digest for some in rows]
    home = os.path.join(run.folder, run.cfg.stage) if run.cfg.stage in ("teacher", "text") else run.folder
    if digests != keep_as_begun(home, run, "annotations", digests):
        raise ValueError(f"{home}/run.json: the annotations are others than those that the run began with")
    for some, view in zip(rows, (cfg, replace(cfg, frames=1, seconds=0, images=())), strict=False):
        clips.append(run.first(lambda r=some, v=view, f=first: Clips(r, v, run.cfg.seed, first=f)))
        first += len(some)
    return clips[0], clips[1] if cfg.images else None


def pretrain(run: Run) -> nn.Module:
    """The stages of STAGES but fine-tuning, as far as cfg.stage goes."""
    cfg, out, device, rank = run.cfg, run.folder, run.device, run.rank
    cuda = device.type == "cuda"

    # Data. Rank 0 writes what is missing.
    given = ((cfg.teacher, "a SigLIP"), (cfg.text, "a BERT"), (cfg.student, "a student"))
    _, text, student = (find_folder(folder, what) if folder else "" for folder, what in given)
    if cfg.data.train == DataConfig.train:
        run.first(lambda: os.path.exists(cfg.data.train) or write_sprites(os.path.dirname(cfg.data.train)))
    videos, images = read_clips(run)
    N = (cfg.data.size // cfg.model.patch) ** 2
    if images and (keep_count(N, cfg.mask.ratio) == N) != (keep_count(N, cfg.mask.image_ratio) == N):
        raise ValueError(f"mask.ratio {cfg.mask.ratio} and mask.image_ratio {cfg.mask.image_ratio}: of {N} tokens both "
                         "hide some, or neither")
    clips = lambda batch: Mix(videos, images, batch) if images else videos
    captions = (caption for kind in (videos, images) if kind for row in kind.rows for caption in row.captions)
    tokenizer = find_tokenizer(run, captions, text)

    # The teacher and the text encoder: given, or small ones trained here.
    cfg.model.vocab = cfg.model.vocab or tokenizer.get_vocab_size()
    cfg.model.mask_id = cfg.model.mask_id or tokenizer.token_to_id("[MASK]")
    folder = cfg.teacher or os.path.join(out, "teacher")
    if cfg.stage != "text":
        if not cfg.teacher and not finished(folder, cfg):
            if rank == 0 and cfg.data.train != DataConfig.train:
                print(f"No --teacher was given: a small SigLIP is trained on these {len(videos)} clips first. That "
                      "shows that all works; for results give it a real checkpoint.", flush=True)
            teacher = small_teacher(cfg, tokenizer).to(device)
            fit(replace(run, folder=folder), "teacher", teacher, clips(cfg.small.batch), tokenizer, cfg.small.batch,
                cfg.small.steps, cfg.small.lr,
                lambda batches: single_frames(teacher, batches, cfg.small.still, cfg.seed))
            if rank == 0:
                teacher.save(folder)
            run.wait()
        teacher = SigLIP.from_pretrained(folder, torch.bfloat16 if cuda else torch.float32).to(device)
        teacher = prepare(teacher, cfg)
        vision = teacher.cfg.vision_config
        cfg.teacher, cfg.model.target = folder, cfg.model.target or vision.hidden_size
    if cfg.stage == "teacher":
        return teacher
    folder = text or os.path.join(out, "text")
    if not cfg.text and not finished(folder, cfg):
        torch.manual_seed(cfg.seed)
        bert = Bert(bert_config(cfg.model)).to(device)
        fit(replace(run, folder=folder), "text", bert, clips(cfg.small.text_batch), tokenizer, cfg.small.text_batch,
            cfg.small.text_steps, cfg.small.text_lr,
            lambda batches: [corrupt(b.ids, cfg.model.vocab, cfg.model.mask_id, stream(b, 0)) for b in batches])
        if rank == 0:
            bert.save(folder)
            tokenizer.save(os.path.join(folder, "tokenizer.json"))
        run.wait()
    torch.manual_seed(cfg.seed)
    bert = Bert.from_pretrained(folder, **asdict(bert_config(cfg.model)))
    if rank == 0 and any(key.startswith("cls.") for key in bert.new):
        print(f"{folder} has no masked-language-model head: it starts new", flush=True)
    if cfg.stage == "text":
        return bert

    # The student: masked pretraining, then a short stage on all tokens.
    model = ClusterSTM(cfg.model, bert)
    if student:
        model.start_from(student)
    model = prepare(model.to(device).train(), cfg)
    masked = os.path.join(out, "masked")
    if cfg.resume and finished(masked, cfg):
        load_weights(model, read_folder(masked, "a trained model")[1], masked)
    else:
        guides = Guides(run, teacher, clips(cfg.batch), tokenizer)
        fit(run, "pretrain", model, clips(cfg.batch), tokenizer, cfg.batch, cfg.steps, cfg.lr,
            lambda batches: with_whole(model, batches, guides(batches)), before_saving=guides.settle)
        guides.forget()
        save_model(run, model, tokenizer, masked)
    if cfg.unmasked_steps:
        batch = cfg.unmasked_batch or cfg.batch
        fit(run, "unmasked", model, clips(batch), tokenizer, batch, cfg.unmasked_steps, cfg.lr * cfg.unmasked_lr,
            lambda batches: with_whole(model, batches, [None] * len(batches)))
    save_model(run, model, tokenizer, out)
    if rank == 0:
        print(f"{out}: trained. Next: python eval.py --checkpoint {out}", flush=True)
    return model


# Fine-tuning

def tuning(name: str, student: str) -> Config:
    """The settings of the task of that name, for the student in a folder that train.py or tools/convert.py wrote."""
    task, folder = find_task(name), find_folder(student, "a student")
    trained = read_folder(folder, "a student")[0]
    if "text_width" not in trained.get("model", {}):
        raise ValueError(f"{folder}/config.json has no 'model' part with a text encoder: wanted a pretrained student")
    model = known(ModelConfig, trained["model"])
    recipe = task.large if model.width >= 1024 else task.base
    usual = PRESETS["sprites" if task.root else "base"].data
    size = trained.get("data", {}).get("size", usual.size)
    teacher, beside = trained.get("teacher", ""), os.path.join(folder, "teacher")
    teacher = beside if os.path.isdir(beside) and not os.path.isdir(teacher) else teacher       # it was moved
    return Config(
        name=f"{os.path.basename(os.path.normpath(student))}-{name}", stage="finetune", task=name, student=student,
        teacher=teacher, batch=task.batch, epochs=recipe.epochs, lr=recipe.lr,
        warmup=recipe.warmup / recipe.epochs, clip_grad=0, mrm=0, mlm=0, masked=task.masked,
        data=replace(usual, frames=task.frames, size=size, seconds=task.seconds, flip=task.flip and usual.flip),
        mask=known(MaskConfig, trained.get("mask", {})),
        model=replace(model, text_length=task.length, drop_path=recipe.drop_path),
    )


def finetune(run: Run) -> nn.Module:
    """Fine-tune for a task, choose an epoch, score it on the test split."""
    cfg = run.cfg
    task = find_task(cfg.task)
    if not cfg.student:
        raise ValueError("--stage finetune wants --student, the folder of a pretrained model")
    cfg.select = cfg.select or ("val" if task.val else "last")
    if task.root and not cfg.data_root:
        run.first(lambda: os.path.exists(task.root) or write_sprites(task.root))
    cfg.data.train, cfg.data.root = split_files(task, "train", cfg.data_root)
    rows = read_rows(task, cfg.data.train, cfg.data.root, train=True)
    clips = run.first(lambda: Clips(rows, cfg.data, cfg.seed))
    if cfg.epochs:
        cfg.steps = max(1, round(cfg.epochs * len(clips) / cfg.batch))
    ends = {max(1, round(epoch * len(clips) / cfg.batch)): epoch for epoch in range(1, math.ceil(cfg.epochs) + 1)}
    ends = {step: epoch for step, epoch in ends.items() if step < cfg.steps} | {cfg.steps: math.ceil(cfg.epochs) or 1}

    folder = find_folder(cfg.student, "a student")
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(cfg.seed)
    model = ClusterSTM(cfg.model)
    model.start_from(folder)
    model.mlm = cfg.mlm > 0
    if task.kind in ("qa", "caption"):
        if cfg.mlm:
            raise ValueError(f"--mlm {cfg.mlm:g}: {cfg.task} has no masked words, its loss is of the answers")
        model = VideoToText.from_student(model, asks=task.kind == "qa")
    model = prepare(model.to(run.device).train(), cfg, shapes_vary=True)

    see = Kept(run, model) if cfg.masked else lambda batch: None

    def calls(batches: list[Batch]) -> list[tuple]:
        guides = [see(b) for b in batches]
        together = isinstance(model, ClusterSTM)
        return with_whole(model, batches, guides) if together else list(zip(batches, guides, strict=True))

    choice = Choice(run, tokenizer, ends, see)
    fit(run, "finetune", model, clips, tokenizer, cfg.batch, cfg.steps, cfg.lr, calls,
        after={step: partial(choice, model, step) for step in ends})
    if run.rank == 0:
        print(f"{run.folder}: fine-tuned. {choice.words()}", flush=True)
    run.wait()
    try:
        split_files(task, "test", cfg.data_root)
    except FileNotFoundError as error:
        if run.rank == 0:
            print(f"not scored on the test split: {error}", flush=True)
    else:
        scoring.main(scoring.Config(task=cfg.task, checkpoint=run.folder, data_root=cfg.data_root, device=cfg.device,
                                    mask=cfg.mask.name if cfg.masked else "", workers=cfg.data.workers))
    return model


class Kept:
    """The tokens that the mask keeps of a batch's clips; of a view that comes round again they are remembered."""

    def __init__(self, run: Run, model: nn.Module):
        cfg = run.cfg
        if not cfg.teacher:
            raise ValueError("--masked wants --teacher: the student's folder names none")
        self.teacher = SigLIP.from_pretrained(cfg.teacher, torch.bfloat16 if run.device.type == "cuda"
                                              else torch.float32).to(run.device)
        prepare(self.teacher, cfg, shapes_vary=True)
        self.mask, self.grid, self.sized = cfg.mask, model.vit.grid, cfg.model.proportional
        self.again = cfg.data.views and not cfg.mask.drawn
        self.seen = {}                              # (clip, view) -> ids (TK,), and sizes where they count

    def ask(self, video: torch.Tensor, seed: int) -> Guide:
        return kept(self.teacher, video, self.mask, self.mask.ratio, seed, self.grid(video)[1:], self.sized)

    def __call__(self, batch: Batch) -> Guide:
        if not self.again:                          # and nothing waits for the device to tell its clips
            return self.ask(batch.video, batch.seed)
        views = list(zip(batch.clip.tolist(), batch.view.tolist(), strict=True))
        new = {view: i for i, view in enumerate(views) if view not in self.seen}
        if new:
            places = sent(torch.tensor([*new.values()]), batch.video.device)
            told = self.ask(batch.video[places], batch.seed)
            parts = (told.keep, told.size) if self.sized else (told.keep,)
            self.seen.update(zip(new, zip(*parts, strict=True), strict=True))
        keep, *size = map(torch.stack, zip(*(self.seen[view] for view in views), strict=True))
        return Guide(keep, size=size[0] if size else None)


class Choice:
    """After each epoch: score the model on the split that was asked for; the best so far is out/NAME's."""

    def __init__(self, run: Run, tokenizer, ends: dict[int, int], see):
        cfg, task = run.cfg, find_task(run.cfg.task)
        self.run, self.tokenizer, self.ends, self.task = run, tokenizer, ends, task
        self.path = os.path.join(run.folder, "epochs.json")
        self.scored = []                            # {"step", "epoch", "score", "by"} of each epoch so far
        if cfg.resume and os.path.isfile(self.path):
            with open(self.path) as f:
                self.scored = json.load(f)
        if cfg.select == "last":
            return
        self.rows = read_rows(task, *split_files(task, cfg.select, cfg.data_root), train=False)
        self.how = scoring.Protocol(length=task.length, answer_length=task.answer_length, rerank=task.rerank,
                                    workers=cfg.data.workers, quick=True)
        if cfg.masked:
            self.how.keep = lambda batch: see(replace(batch, clip=-1 - batch.clip))             # another split's rows
        if task.kind == "qa":
            self.how.answers = read_answers(find_file(task.answers, data_root(task, cfg.data_root)))

    def best(self) -> dict:
        return max(self.scored, key=lambda row: row["score"])

    def words(self) -> str:
        if self.run.cfg.select == "last":
            return "the last epoch, none was chosen"
        row, split = self.best(), self.run.cfg.select
        which = "CHOSEN ON THE TEST SPLIT" if split == "test" else "chosen on the val split"
        return f"epoch {row['epoch']} of {len(self.ends)}, {which}: {row['by']} {row['score']:.1f}"

    def __call__(self, model: nn.Module, step: int):
        run, cfg = self.run, self.run.cfg
        self.scored = [row for row in self.scored if row["step"] <= step]       # those after it are taken again
        if self.scored and self.scored[-1]["step"] == step:                     # it was done before the run stopped
            return
        if cfg.select == "last":
            if step == cfg.steps:
                save_model(run, model, self.tokenizer, run.folder, chosen=self.words())
            return
        found = scoring.score(model.eval(), self.task, self.rows, cfg.data, self.tokenizer, self.how)
        model.train()
        by, score = scoring.headline(self.task.kind, found["scores"])
        self.scored.append({"step": step, "epoch": self.ends[step], "score": score, "by": by})
        if run.rank == 0:
            tqdm.write(f"epoch {self.ends[step]}, {cfg.select}: {by} {score:.1f}")
        if self.best()["step"] == step:
            save_model(run, model, self.tokenizer, run.folder, chosen=self.words())
        if run.rank == 0:
            data.write_atomically(self.path, json.dumps(self.scored))           # last: it says that all else is done


def with_whole(model: ClusterSTM, batches: list[Batch], guides: list[Guide | None]) -> list[tuple]:
    """The arguments of the model's calls: a micro-batch, what the teacher says of it, what it must know of the rest."""
    return list(zip(batches, guides, model.whole(batches, guides), strict=True))


def save_model(run: Run, model: nn.Module, tokenizer, folder: str, **more):
    """A folder for load_model and eval.py; its weights come last, as the sign that it is whole."""
    if run.rank == 0:
        os.makedirs(folder, exist_ok=True)
        data.write_atomically(os.path.join(folder, "config.json"), json.dumps(asdict(run.cfg) | more, indent=1))
        tokenizer.save(os.path.join(folder, "tokenizer.json"))
        save_weights(model, folder)
    run.wait()


def default(args: list[str]) -> tuple[Config, list[str]]:
    """The settings that a command line begins with, and what is left of it: a preset's, or fine-tuning's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, usual in (("--stage", ""), ("--task", "sprites"), ("--student", "out/sprites")):
        first.add_argument(flag, default=usual, nargs="?")
    given = first.parse_known_args(args)[0]
    preset = args[0] if args and args[0] in PRESETS else ""
    if given.stage != "finetune":
        return deepcopy(PRESETS[preset or "sprites"]), args[1:] if preset else args
    if preset:
        raise ValueError(f"{preset}: fine-tuning takes its settings from task and student, not from a preset")
    return tuning(given.task or "", given.student or ""), args


def run_command():
    settings, args = default(sys.argv[1:])
    main(tyro.cli(Config, args=args, default=settings))


if __name__ == "__main__":
    data.command("train.py", run_command)
