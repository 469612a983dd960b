"""
The logs of a run: rows of log.jsonl and the progress bar, and with --log also TensorBoard or wandb.

    TrainLog.write, write_scores -> a row -> FOLDER/log.jsonl
                                          -> FOLDER/tensorboard             (--log tensorboard)
                                          -> a run of wandb for the folder  (--log wandb)

FOLDER is out/NAME, or out/NAME/teacher or text for a toy model. TensorBoard and wandb name a value STAGE/KEY and count
steps through all stages of a folder: step 40 of "unmasked" is step 600 if "pretrain" had 560 steps.

A resumed run writes no step twice. Rows after its checkpoint are dropped from log.jsonl (runtime.truncate_log) and from
TensorBoard (purge_step). wandb never drops a step, so it is not given those again that it has.
"""

import importlib
import json
import math
import os
import resource
import secrets
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from data import ClipDataset, MixedDataset
from files import WriteError, append_line, format_error
from runtime import BadMediaLog, RunContext, all_reduce_sum, pin_to_first_run

if TYPE_CHECKING:
    from loop import Stage

# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard and wandb

LIBRARIES = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}


def import_library(name: str):
    """Import what writes the log `name`. ValueError, which says what to install, if that is not possible."""
    module, attribute = LIBRARIES[name]
    try:
        library = importlib.import_module(module)
        getattr(library, attribute)         # a folder called wandb, of an earlier run, is imported as an empty package
        return library
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--log {name} needs the package {name}, which cannot be imported ({format_error(error)}): "
                         f"pip install {name}") from None


class TensorBoardWriter:
    """Write scalars to FOLDER/tensorboard. What is there of `first_step` and later steps is dropped."""

    def __init__(self, run: RunContext, first_step: int, run_id: str):
        self.folder = os.path.join(run.folder, "tensorboard")
        try:
            self.writer = import_library("tensorboard").SummaryWriter(self.folder, purge_step=first_step)
        except OSError as error:
            raise WriteError(self.folder, error) from None

    def write(self, step: int, values: dict[str, float]):
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()             # a checkpoint may follow: a killed run must not lose the rows before it
        except OSError as error:
            raise WriteError(self.folder, error) from None

    def close(self):
        with suppress(OSError):             # `write` has raised it
            self.writer.close()


class WandbWriter:
    """Write to the wandb run `run_id`, which all stages of a folder and all processes that resume them share."""

    def __init__(self, run: RunContext, first_step: int, run_id: str):
        wandb = import_library("wandb")
        if wandb.run is None or wandb.run.id != run_id:         # else a stage before this one has begun it
            wandb.finish()
            try:
                wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "clusterstm"), name=os.path.relpath(run.folder, "out"),
                    dir=os.environ.get("WANDB_DIR", run.folder), config=asdict(run.cfg), id=run_id, resume="allow")
            except (wandb.Error, OSError) as error:
                raise OSError(f"wandb did not begin a run ({format_error(error)}); WANDB_MODE=offline needs no account "
                              "and no network") from None
        self.run = wandb.run

    def write(self, step: int, values: dict[str, float]):
        if step >= self.run.starting_step:  # of this process: wandb has the steps before it
            self.run.log(values, step=step)

    def close(self):
        """Do nothing: the next stage goes on with the run, and wandb finishes it when the process ends."""


WRITERS = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter}


# ---------------------------------------------------------------------------------------------------------------------
# The log of a stage

def peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held so far, in GiB: of the GPU, or of the host without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 2 ** 10           # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def epoch_clips(dataset: ClipDataset | MixedDataset) -> int:
    """Count the clips of an epoch."""
    if isinstance(dataset, MixedDataset):                       # whole batches of each kind
        return sum(dataset.batches_per_epoch) * dataset.batch
    return len(dataset)


def read_last_row(path: str) -> dict:
    """Read the last row of log.jsonl, after truncate_log; {} if there is none."""
    if not os.path.isfile(path):
        return {}
    with open(path) as f:
        rows = f.readlines()
    return json.loads(rows[-1]) if rows else {}


class TrainLog:
    """
    Progress bar and log of a stage.

    A row has the mean losses over ranks, gradient norm, learning rate, epoch, clips/s, data_wait (share of the time
    spent waiting for data), seconds, memory, and the counts of Health. `seconds` is the wall time in training of all
    stages of the folder and all processes up to this row, without the pauses between them and without what a kill
    undid. `memory` is that of rank 0, in GiB.
    """

    def __init__(self, run: RunContext, stage: "Stage", step: int):
        self.run, self.stage, self.path = run, stage, os.path.join(run.folder, "log.jsonl")
        self.bar = tqdm(total=stage.steps, initial=step, desc=f"{run.cfg.name} {stage.name}", disable=run.rank > 0,
                        mininterval=1)
        self.offset = run.cfg.steps if stage.name == "unmasked" else 0      # steps of the folder before this stage
        run_id = pin_to_first_run(run.folder, run, "wandb_id", secrets.token_hex(8)) if "wandb" in run.cfg.log else ""
        self.writers = []
        run.exit_stack.callback(self.close)
        if run.rank == 0:
            for name in run.cfg.log:
                self.writers.append(WRITERS[name](run, self.offset + step + 1, run_id))
        self.bad_media = BadMediaLog(run.folder)
        row = run.broadcast(read_last_row(self.path) if run.rank == 0 else {})
        self.began = time.perf_counter() - row.get("seconds", 0.0)
        # Whether the model of this step was scored before the run was stopped.
        self.has_scores = (row.get("stage"), row.get("step")) == (stage.name, step) and any(map(is_score, row))
        self.shown_scores = {}
        self.reset(step)

    def reset(self, step: int):
        self.data_wait, self.start, self.first_step = 0.0, time.perf_counter(), step

    def wait_for(self, loader) -> list:
        """Return the micro-batches of the next step; write their unreadable videos to bad_media.jsonl."""
        start = time.perf_counter()
        batches = next(loader)
        self.data_wait += time.perf_counter() - start
        self.bad_media.add([record for batch in batches for record in batch.skipped])
        return batches

    @contextmanager
    def paused(self):
        """Leave the time of this block out of clips/s."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def write(self, step: int, losses: dict[str, Tensor], norm: Tensor, lr: float, counts: dict[str, int]):
        """Append a row, on rank 0. It is called on all ranks, since losses are averaged over them."""
        values = all_reduce_sum(torch.stack([*losses.values()]).float()) / self.run.world
        seconds, batch = time.perf_counter() - self.start, self.stage.batch
        row = {**dict(zip(losses, values.tolist(), strict=True)), "grad_norm": norm.item(), "lr": lr,
               "epoch": step * batch / epoch_clips(self.stage.dataset),
               "clips/s": (step - self.first_step) * batch / seconds, "data_wait": self.data_wait / seconds,
               "seconds": time.perf_counter() - self.began, "memory": peak_memory(self.run.device)}
        row |= {name: count for name, count in counts.items() if count}
        self.append(step, row)
        shown = (*losses, "clips/s", "data_wait", *counts)
        self.bar.set_postfix({k: f"{row[k]:.3g}" for k in shown if k in row} | self.shown_scores, refresh=False)
        self.reset(step)

    def write_scores(self, step: int, scores: dict[str, float] | None):
        """Append a row of a validation's scores, whose names begin with "val_", on rank 0; none if there are none."""
        if not scores:
            return
        self.append(step, {**scores, "seconds": time.perf_counter() - self.began})
        recalls = {name.removeprefix("val_"): f"{scores[name]:.1f}" for name in ("val_T2V_R@1", "val_V2T_R@1")}
        self.shown_scores = recalls
        if self.run.rank == 0:
            tqdm.write(f"{self.stage.name} step {step}, validation: "
                       + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in recalls.items()))

    def append(self, step: int, values: dict[str, float]):
        """Write values to all logs, on rank 0."""
        if self.run.rank > 0:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_line(self.path, {"stage": self.stage.name, "step": step, **row})
        for writer in self.writers:
            writer.write(self.offset + step, {f"{self.stage.name}/{name}": value for name, value in values.items()})

    def close(self):
        """Close the bar and the writers; a second time, do nothing."""
        self.bar.close()
        while self.writers:
            self.writers.pop().close()


def is_score(name: str) -> bool:
    """Return whether a key of log.jsonl is one that `write_scores` writes alone."""
    return name.startswith("val_")
