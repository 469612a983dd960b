"""
The training loop: `train_stage` takes the optimizer steps of one Stage of a run.

    micro-batches -> stage.make_inputs -> stage.model -> losses by name -> gradients -> AdamW step -> log, checkpoint

TrainLog of logs.py writes log.jsonl. Health counts skipped steps and unreadable videos and passes on requests to stop.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Batch, ClipDataset, MixedDataset, iterate_micro_batches
from files import atomic_write_text
from logs import TrainLog
from runtime import (
    AsyncHostCopy,
    BadMediaLog,
    RunContext,
    all_reduce_sum,
    bf16_autocast,
    load_checkpoint,
    save_checkpoint,
    truncate_log,
)


@dataclass
class Stage:
    """One stage of a run: what is trained, on what, for how long."""
    name: str                                   # one of runtime.STAGES
    model: nn.Module                            # returns a dict of losses
    dataset: ClipDataset | MixedDataset
    tokenizer: object
    batch: int                                  # clips per step, over all ranks
    steps: int
    lr: float                                   # peak learning rate
    make_inputs: Callable                       # micro-batches of a step -> arguments of the model, one tuple for each
    loss_weights: dict[str, float] = field(default_factory=dict)        # by loss name; default 1
    frozen: tuple[str, ...] = ()                # regular expressions of parameter names that are not trained
    betas: tuple[float, float] = (0.9, 0.999)   # AdamW's
    # step -> called after it, to score the model; what it returns, if anything, are scores for the log
    at_step: dict[int, Callable[[], dict | None]] = field(default_factory=dict)
    before_checkpoint: Callable = lambda: None  # called on all ranks before a checkpoint is written


def train_stage(run: RunContext, stage: Stage) -> nn.Module:
    """
    Train a stage from its newest checkpoint, or from the beginning -> its model in eval mode.

    A step whose loss or gradient is not finite is skipped on the device (`found_inf`). The host reads the flags of a
    step one step later, so it never waits for the device.
    """
    cfg = run.cfg
    net, optimizer, step, counts = prepare_stage(run, stage)
    save = partial(save_stage, run, stage, optimizer, counts)
    log, health = TrainLog(run, stage, step), Health(run, stage, counts, save)
    trainable = [p for p in stage.model.parameters() if p.requires_grad]
    loader = run.exit_stack.enter_context(closing(iterate_micro_batches(
        run, stage.dataset, stage.tokenizer, stage.name, stage.batch, run.micro_batch_size[stage.name], step,
        stage.steps)))
    if step in stage.at_step and not log.has_scores:        # the run may have been stopped during this call
        with log.paused():
            log.write_scores(step, stage.at_step[step]())
    if step == stage.steps:
        health.check_unreadable(step * stage.batch)
    run.stop.defer()
    while step < stage.steps:
        run.position.update(folder=run.folder, step=f"{stage.name} step {step}")
        batches = log.wait_for(loader)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, cfg.warmup_frac, stage.lr)

        losses = forward_backward(net, batches, stage.make_inputs, stage.loss_weights)
        norm = nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])
        flags = health.flags(losses, norm, batches)
        if health.resolve():                    # the flags of the step before
            stop_run(run, stage, step, save)
        if health.take_save_request():          # the weights are still those after the step before
            with log.paused():
                save(step)
        update_weights(optimizer, norm, cfg.max_grad_norm, flags[0])
        health.push(step, flags, losses, norm, batches)
        step += 1
        log.bar.update()

        logging = step % cfg.log_every == 0 or step == stage.steps
        saving = step % cfg.save_every == 0 or step == stage.steps or step in stage.at_step
        stop = health.resolve() if logging or saving else False
        if logging:
            log.write(step, losses, norm, optimizer.param_groups[0]["lr"], counts)
        with log.paused():
            if stop:
                stop_run(run, stage, step, save)
            if saving:
                save(step)
            if step == stage.steps or step in stage.at_step:    # all ranks exit here, or none does
                if any(run.all_gather_object(run.stop.requested)):
                    stop_run(run, stage, step, save)
                run.stop.terminate_now()
            if step in stage.at_step:
                log.write_scores(step, stage.at_step[step]())
                run.stop.defer()
    run.stop.terminate_now()
    loader.close()
    log.close()
    run.barrier()
    return stage.model.requires_grad_(True).eval()


def prepare_stage(run: RunContext, stage: Stage) -> tuple[nn.Module, torch.optim.Optimizer, int, dict[str, int]]:
    """Freeze parameters, build the optimizer, load the newest checkpoint -> (DDP model, optimizer, step, counts)."""
    os.makedirs(run.folder, exist_ok=True)
    # A parameter that no loss reaches gets no gradient, and DDP must not wait for one.
    for name, p in stage.model.named_parameters():
        p.requires_grad_(not any(re.search(pattern, name) for pattern in stage.frozen))
    groups = parameter_groups(stage.model, run.cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, stage.lr, stage.betas, fused=True)
    step, counts = load_checkpoint(run, stage.name, stage.model, optimizer)
    if run.rank == 0:
        truncate_log(os.path.join(run.folder, "log.jsonl"), stage.name, step)
    net = stage.model.train()
    if run.world > 1:
        net = DistributedDataParallel(stage.model, gradient_as_bucket_view=True)
        net.broadcast_buffers = False           # all buffers are constants
    return net, optimizer, step, {"skipped": 0, "unreadable": 0} | counts


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices, but not embeddings, norms, biases and scalars (UMT decays embeddings and the temperature too)."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[p.ndim >= 2 and "embedding" not in name].append(p)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup_frac: float, peak: float) -> float:
    """Rise linearly from 1 % of the peak over the warmup, then follow a cosine back to 1 %."""
    warmup = warmup_frac * steps
    if step < warmup:
        share = (step + 1) / warmup
    else:
        share = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * min(1.0, share))


def forward_backward(net: nn.Module, batches: list[Batch], make_inputs: Callable,
                     loss_weights: dict[str, float]) -> dict[str, Tensor]:
    """
    Accumulate the gradients of a step's micro-batches -> their mean losses by name, on the device.

    make_inputs may return several passes over the micro-batches, one after another: then losses and gradients are their
    sum, and the memory is that of the largest pass. On a GPU matrices are multiplied in bf16. Gradients are averaged
    over the ranks once, at the end.
    """
    device, mean = batches[0].video.device, {}
    with bf16_autocast(device):
        inputs = make_inputs(batches)
    for i, arguments in enumerate(inputs):
        pass_index, part = divmod(i, len(batches))
        torch.manual_seed(batches[part].seed + pass_index)      # dropout is a function of (seed, step, micro-batch)
        last = i == len(inputs) - 1
        with nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync():
            with bf16_autocast(device):
                losses = net(*arguments)
                loss = sum(loss_weights.get(name.partition("_")[0], 1.0) * value for name, value in losses.items())
            (loss / len(batches)).backward()
        for name, value in losses.items():
            mean[name] = mean.get(name, 0) + value.detach() / len(batches)
    # VTM and MLM may come in another pass on another rank, and the log sums over the ranks in the order of the names.
    return mean if len(inputs) == len(batches) else dict(sorted(mean.items()))


def update_weights(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float, found_inf: Tensor):
    """
    Take a step of fused AdamW with the gradients clipped to max_norm (0: not clipped), then drop them. norm is their
    total norm. If found_inf is 1, the weights stay as they are.

    The fused kernel divides each gradient that it reads by `grad_scale`, which is there for GradScaler. So clipping
    needs no pass of its own over the gradients. 1e-6 is added as in nn.utils.clip_grad_norm_.
    """
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp_min(1) if max_norm else None
    optimizer.found_inf = found_inf
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def save_stage(run: RunContext, stage: Stage, optimizer, counts: dict[str, int], step: int):
    """Write a checkpoint, once all ranks have written what it relies on."""
    stage.before_checkpoint()
    if run.rank == 0:
        save_checkpoint(run, stage.name, step, stage.model, optimizer, counts)


def stop_run(run: RunContext, stage: Stage, step: int, save: Callable):
    """End all ranks with exit code 0 after a SIGTERM or SIGINT to any of them, with a checkpoint."""
    save(step)
    run.barrier()
    if run.rank == 0:
        tqdm.write(f"{run.folder}: stopped after step {step} of {stage.name}; --resume continues it")
    sys.exit(0)


class Health:
    """
    Count skipped steps and unreadable videos, pass on requests to stop, and ask for a checkpoint every
    cfg.save_minutes; the same on all ranks.

    The flags of a step are summed over ranks on the device and copied to the host while the next step runs.
    """
    MIN_SAMPLES = 1000          # samples that are read before the share of unreadable videos is checked

    def __init__(self, run: RunContext, stage: Stage, counts: dict[str, int], save: Callable):
        self.run, self.stage, self.counts, self.save = run, stage, counts, save
        self.pending = None     # arguments of `push` whose flags have not been read
        self.last_save, self.save_requested = time.monotonic(), False

    def flags(self, losses: dict[str, Tensor], norm: Tensor, batches: list[Batch]) -> Tensor:
        """Return (4,): not finite (0 or 1), ranks asked to stop, unreadable videos, whether to save, by rank 0."""
        finite = torch.stack([*losses.values()]).float().isfinite().all() & norm.isfinite()
        unreadable, minutes = sum(len(batch.skipped) for batch in batches), self.run.cfg.save_minutes
        due = self.run.rank == 0 and minutes > 0 and time.monotonic() - self.last_save > 60 * minutes
        if due:
            self.last_save = time.monotonic()
        counts = (self.run.stop.requested, unreadable, due)
        flags = all_reduce_sum(torch.stack([(~finite).float(), *(norm.new_full((), count) for count in counts)]))
        flags[0].clamp_(max=1)
        return flags

    def push(self, step: int, flags: Tensor, losses: dict[str, Tensor], norm: Tensor, batches: list[Batch]):
        """Start to copy the flags of a step to the host."""
        self.pending = step, AsyncHostCopy(flags), losses, norm, batches

    def resolve(self) -> bool:
        """
        Read the pending flags, which are equal on all ranks -> whether to stop. ValueError if too many steps were
        skipped or too many videos are unreadable; a checkpoint is written first.
        """
        if self.pending is None:
            return False
        (step, flags, losses, norm, batches), self.pending = self.pending, None
        skipped, stop, unreadable, due = flags.tolist()
        self.save_requested |= due > 0
        if skipped:
            message = report_nonfinite(self.run, self.stage, step, losses, norm, batches)
            if self.counts["skipped"] >= self.run.cfg.max_skipped_steps:
                self.save(step)                 # the weights before the step: --resume begins with it
                raise ValueError(message)
            self.counts["skipped"] += 1
            if self.run.rank == 0:
                tqdm.write(message)
        self.counts["unreadable"] += int(unreadable)
        try:
            self.check_unreadable((step + 1) * self.stage.batch)
        except ValueError:
            self.save(step + 1)
            raise
        return stop > 0

    def take_save_request(self) -> bool:
        """Return whether a checkpoint is due, once."""
        requested, self.save_requested = self.save_requested, False
        return requested

    def check_unreadable(self, samples: int):
        """Raise a ValueError if too large a share of the videos could not be read, of enough samples so far."""
        unreadable, limit = self.counts["unreadable"], self.run.cfg.data.max_unreadable
        videos = samples + unreadable
        at_end = samples == self.stage.steps * self.stage.batch
        if unreadable > limit * videos and (at_end or samples >= self.MIN_SAMPLES):
            raise ValueError(f"{unreadable} of {videos} videos could not be read; data.max_unreadable is {limit:g}; "
                             f"{BadMediaLog(self.run.folder).path} names them")


def report_nonfinite(run: RunContext, stage: Stage, step: int, losses: dict[str, Tensor], norm: Tensor,
                     batches: list[Batch]) -> str:
    """Write losses, clips and captions of a non-finite step, of all ranks, to nonfinite.json -> a one-line message."""
    ranks = run.all_gather_object({
        "losses": {name: value.item() for name, value in losses.items()},
        "clips": [batch.clip_ids.tolist() for batch in batches], "captions": [batch.captions for batch in batches]})
    for rank in ranks:
        rank["videos"] = [[stage.dataset.annotation(clip).video for clip in clips] for clips in rank["clips"]]
    if run.rank == 0:
        atomic_write_text(os.path.join(run.folder, "nonfinite.json"), json.dumps(
            {"step": f"{stage.name} step {step}", "grad_norm": norm.item(), "ranks": ranks}, indent=1))
    mean = {name: sum(rank["losses"][name] for rank in ranks) / len(ranks) for name in losses}
    return (f"{stage.name} step {step} was skipped: gradient norm {norm.item()}, "
            + ", ".join(f"{k} {v:g}" for k, v in mean.items())
            + f"; clips {[clips for rank in ranks for clips in rank['clips']]}")
