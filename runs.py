"""
A run: its processes, its folder, and what is kept there so that it can go on.

    out/NAME/lock               held by the run that writes here
    out/NAME/run.json           what must stay as it was: clips a rank holds at once, digest of the annotations
    out/NAME/state/STAGE-STEP.pt    the newest states, each whole or not there at all
    out/NAME/guide/             what the teacher said, where views come round again (guides.py)
    out/NAME/log.jsonl          losses
    out/NAME/bad_media.jsonl    videos that could not be read, and why

A state has no random numbers and no place in the data: both are functions of (seed, step). So a run goes on bit for bit
on as many ranks, and to rounding on any other number of them.
"""

import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
from teacher import one_line

STAGES = ("teacher", "text", "pretrain", "unmasked", "finetune")

# Settings that may change when a run is resumed.
FREE = ("resume", "stage", "device", "log_every", "save_every", "keep", "skip_nonfinite", "compile",
        "activation_checkpointing", "data.workers", "data.cache", "data.on_device", "data.max_bad")
# Settings that main fills in as the stages go by: where they were still empty they do not differ.
FILLED = ("teacher", "model.target")


# ---------------------------------------------------------------------------------------------------------------------
# Processes

class Stop:
    """
    SIGTERM. In the middle of a step it is only noted, and the ranks end together after it, a state written; where
    nothing is to be saved the process ends at once. Either way with 0.
    """

    def __init__(self):
        self.asked = self.later = False
        self.before = signal.signal(signal.SIGTERM, self)

    def __call__(self, *_):
        self.asked = True
        if not self.later:
            sys.exit(0)

    def note(self):
        """From here on it is noted."""
        self.later = True

    def obey(self):
        """From here on it ends the process at once."""
        self.later = False
        if self.asked:
            sys.exit(0)

    def forget(self):
        signal.signal(signal.SIGTERM, self.before)


@dataclass
class Run:
    """Where a stage runs: its place among the processes, its device and its folder."""
    cfg: object
    folder: str
    device: torch.device
    rank: int
    world: int
    stop: Stop | None = None
    closing: ExitStack = field(default_factory=ExitStack)   # locks, loaders: what ends with the run, however that ends
    group: object = None                        # of all processes, for waiting as long as it takes
    micro: dict[str, int] = field(default_factory=dict)     # stage -> clips a rank holds at once
    at: dict = field(default_factory=dict)      # {"folder", "step"} of the stage that is under way, for all its copies

    def wait(self):
        """For all ranks."""
        if self.world > 1:
            dist.barrier(self.group)

    def tell(self, told):
        """What rank 0 says, on all ranks."""
        said = [told]
        if self.world > 1:
            dist.broadcast_object_list(said, 0, self.group)
        return said[0]

    def every(self, said) -> list:
        """What each rank says, on all ranks."""
        heard = [said] * self.world
        if self.world > 1:
            dist.all_gather_object(heard, said, self.group)
        return heard

    def first(self, make: Callable):
        """make(), on rank 0 before the others, who then find on disk what it wrote."""
        if self.rank > 0:
            self.wait()
        made = make()
        if self.rank == 0:
            self.wait()
        return made

    def end(self):
        """Leaves the folder to others."""
        self.closing.close()
        if self.stop:
            self.stop.forget()


def open_run(cfg, folders: list[str], device: torch.device) -> Run:
    """
    The processes of a torchrun meet, and take the folders that the run will write to, the first its own.

    A run that is there already goes on with --resume, and by itself where torchrun has started its processes anew.
    ValueError where another run holds a folder, where there is an earlier one, and where a rank does not see rank 0's.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    run = Run(cfg, folders[0], device, rank, world)
    if world > 1:
        if not dist.is_initialized():
            # The agent's store outlives a restart, with the addresses of the processes that are gone.
            store, _, _ = next(dist.rendezvous("env://"))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world,
                                    store=dist.PrefixStore(f"start {again}", store), timeout=timedelta(hours=1))
        # Rank 0 decodes alone, and saves: that may take hours, in which a lost rank still shows at once.
        run.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    fault = ""
    # The agent that starts the processes anew is the one that started them.
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    owner = f"job {job}" if job != "none" else f"started by process {os.getppid()} of {socket.gethostname()}"
    if rank == 0:
        try:
            locks = [run.closing.enter_context(claim(folder)) for folder in folders]
            cfg.resume |= bool(again) and all(lock.read() == owner for lock in locks)
            held = [path for f in folders[::-1] for path in (*states(f), f"{f}/model.safetensors")]
            held = list(filter(os.path.isfile, held))
            if held and not cfg.resume:
                raise ValueError(f"{held[0]} is of an earlier run: --resume goes on with it, another --name starts "
                                 "anew")
            if cfg.resume and not held:
                print(f"{folders[0]}: nothing is there to go on from, the run begins", flush=True)
            for folder in () if cfg.resume else folders:
                for name in ("run.json", "bad_media.jsonl", "nonfinite.json"):
                    if os.path.isfile(f"{folder}/{name}"):          # of a run that ended before its first state
                        os.remove(f"{folder}/{name}")
            for lock in locks:                  # not before: what was refused does not own the folder
                lock.truncate(0)
                lock.write(owner)
                lock.flush()
        except (ValueError, OSError) as error:
            fault = str(error)
    fault, cfg.resume, owner = run.tell((fault, cfg.resume, owner))
    # Not rank 0: to close any file that is the lock would be to give it up.
    if not fault and rank > 0 and not is_in(os.path.join(folders[0], "lock"), owner):
        fault = (f"rank {rank} on {socket.gethostname()} does not see {folders[0]} of rank 0: all nodes want the same "
                 "folder")
    blind = [f for f in run.every(fault) if f]
    if blind:
        run.end()
        if rank > 0:
            sys.exit(1)                         # rank 0 speaks
        raise ValueError(blind[0])
    run.stop = Stop()
    return run


def is_in(path: str, text: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path) as f:
        return f.read() == text


def claim(folder: str):
    """The folder is this process's until it closes the file or ends, however it ends; in it stands who had it last."""
    os.makedirs(folder, exist_ok=True)
    f = open(os.path.join(folder, "lock"), "a+")     # noqa: SIM115  (held as long as the run lasts)
    f.seek(0)
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)       # not flock: loader processes would hold that on
    except (BlockingIOError, PermissionError):
        with f:
            holder = f.read()
        raise ValueError(f"{folder} is in use by another run ({holder}): another --name starts beside it") from None
    return f


def keep_as_begun(folder: str, run: Run, name: str, now):
    """What run.json says of `name`; rank 0's `now`, and so it says from now on, where it says nothing."""
    path = os.path.join(folder, "run.json")
    if run.rank == 0:
        said = data.read_json(path) if os.path.isfile(path) else {}
        if name not in said:
            data.write_atomically(path, json.dumps(said | {name: now}))
        now = said.get(name, now)
    return run.tell(now)


def explain(error: RuntimeError, run: Run) -> Exception:
    """A lost process or too little memory as one line; any other error as it is."""
    text = one_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        what = f"the GPU's memory does not suffice: a run with a smaller --micro-batch wants less ({text})"
    elif re.search("DataLoader worker.*(is killed by signal|exited unexpectedly)", text):
        what = f"a loader process was killed; out of memory? ({text})"
    elif isinstance(error, BrokenProcessPool):
        what = f"a process that decodes was killed; out of memory? ({text})"
    elif run.world > 1 and (isinstance(error, dist.DistError) or re.search("gloo|NCCL|by peer|Broken pipe", text)):
        what = f"rank {run.rank} has lost another rank ({text})"
    else:
        return error
    return OSError(f"{run.at.get('step', run.folder)}: {what}; {whole_state(run.at.get('folder', run.folder))}")


# ---------------------------------------------------------------------------------------------------------------------
# States

def states(folder: str) -> list[str]:
    """The states in a run's folder, the newest first."""
    found = []
    folder = os.path.join(folder, "state")
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if match := re.fullmatch(r"(\w+)-(\d+)\.pt", name):
            found.append((STAGES.index(match[1]), int(match[2]), os.path.join(folder, name)))
    return [path for *_, path in sorted(found, reverse=True)]


def whole_state(folder: str) -> str:
    """What a run that has failed can go on from, in words."""
    found = states(folder)
    return f"{found[0]} is whole, --resume goes on from it" if found else "no state was written yet"


def save_state(run: Run, stage: str, step: int, model: nn.Module, optimizer, counts: dict):
    """Writes a state, whole or not at all, and then removes all but the newest cfg.keep."""
    path = os.path.join(run.folder, "state", f"{stage}-{step:07d}.pt")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with data.appearing(path) as f:
            summed = Summed(f)
            torch.save({"stage": stage, "step": step, "counts": counts, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(), "config": asdict(run.cfg)}, summed)
            f.write(summed.sum.digest())        # behind the archive, where no reader of one looks
    except (OSError, RuntimeError) as error:
        while not isinstance(error, OSError) and error.__context__:     # torch's writer covers it with its own
            error = error.__context__
        raise OSError(f"{path} could not be written ({one_line(error)}); {whole_state(run.folder)}") from None
    for old in states(run.folder)[run.cfg.keep:]:
        os.remove(old)


def newest_state(run: Run) -> str:
    """The newest state that is whole, or ""; those that are not are put aside, and said."""
    found = ""
    if run.rank == 0:
        for path in states(run.folder):
            fault = damage(path)
            if not fault:
                found = path
                break
            os.replace(path, path + ".damaged")
            then = "the one before it is tried" if states(run.folder) else "none is left, the stage begins anew"
            print(f"{path} is damaged ({fault}), and called {path}.damaged now; {then}", flush=True)
    return run.tell(found)


class Summed:
    """A file that is written from its beginning to its end, and the sum of that."""

    def __init__(self, f):
        self.f, self.sum = f, hashlib.blake2b()

    def write(self, some) -> int:
        self.sum.update(some)
        return self.f.write(some)

    def flush(self):
        self.f.flush()


def damage(path: str) -> str:
    """What is wrong with a state; "" if its bytes have the sum that was written with them."""
    whole, size = hashlib.blake2b(), os.path.getsize(path)
    left = size - whole.digest_size
    if left < 0:
        return f"has {size} bytes"
    with open(path, "rb") as f:
        while left:
            some = f.read(min(left, 2 ** 24))
            whole.update(some)
            left -= len(some)
        return "" if f.read() == whole.digest() else "has another sum than was written with it"


def forget_unfinished(folder: str):
    """Remove what a killed process was writing; a score may be another's, who is writing it now."""
    for part in (folder, *(os.path.join(folder, name) for name in ("state", "masked", "guide"))):
        for name in os.listdir(part) if os.path.isdir(part) else []:
            if name.endswith(".tmp") and not name.startswith("eval-"):
                os.remove(os.path.join(part, name))


def load_state(run: Run, stage: str, model: nn.Module, optimizer) -> tuple[int, dict]:
    """-> the step to go on from, with its counts, model and optimizer as they were; 0 if the newest is of another."""
    if run.rank == 0:
        forget_unfinished(run.folder)
    path = newest_state(run) if run.cfg.resume else ""
    if not path:
        return 0, {}
    # Mapped: the ranks of a host read one copy, and a GPU holds none beside the tensors it goes into.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    same_config(state["config"], asdict(run.cfg), path)
    if state["stage"] != stage:
        return 0, {}
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["counts"]


def same_config(then: dict, now: dict, path: str, prefix: str = ""):
    """A run goes on as it began: ValueError at the first setting that differs."""
    for key, value in now.items():
        value = list(value) if isinstance(value, tuple) else value
        before = list(then[key]) if isinstance(then.get(key), tuple) else then.get(key)
        if prefix + key in FREE or prefix + key in FILLED and not before:
            continue
        if isinstance(value, dict):
            same_config(before, value, path, f"{prefix}{key}.")
        elif before != value:
            raise ValueError(f"{path} is of a run with {prefix}{key} = {before!r}, asked for is {value!r}")


def finished(folder: str, cfg) -> bool:
    """Whether a stage has left its weights in the folder; if so they must be of this configuration."""
    if not os.path.isfile(os.path.join(folder, "model.safetensors")):
        return False
    for path in [path for path in states(folder)[:1] if not damage(path)]:
        same_config(torch.load(path, weights_only=True, mmap=True)["config"], asdict(cfg), path)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# What is written down

def forget_rows(log: str, stage: str, step: int):
    """Drops the log's rows of steps that will be taken again: those past `step`, and those of later stages."""
    if os.path.isfile(log):
        rows = []
        with open(log, errors="replace") as f:
            for i, line in enumerate(f, 1):
                try:
                    rows.append(json.loads(line))
                except ValueError:              # cut by a kill, or full of zeros after a loss of power
                    print(f"{log}, line {i} is no row: dropped", flush=True)
        kept = [row for row in rows if (STAGES.index(row["stage"]), row["step"]) <= (STAGES.index(stage), step)]
        data.write_atomically(log, "".join(json.dumps(row) + "\n" for row in kept))


class BadMedia:
    """bad_media.jsonl: {"where", "video", "reason"} of each video that could not be read; once, whoever met it."""

    def __init__(self, folder: str):
        self.path, self.known, self.read = os.path.join(folder, "bad_media.jsonl"), set(), 0

    def add(self, lost: list[dict]):
        new = {about["video"]: about for about in lost if about["video"] not in self.known}
        if not new:
            return
        with open(self.path, "a+b") as f:
            fcntl.lockf(f, fcntl.LOCK_EX)
            f.seek(self.read)                   # what other ranks have written since
            for line in f:
                if not line.endswith(b"\n"):    # the process that wrote it was killed
                    f.truncate(f.seek(-len(line), os.SEEK_CUR))
                    break
                self.known.add(json.loads(line)["video"])
            for video, about in new.items():
                if video not in self.known:
                    f.write(json.dumps(about, ensure_ascii=False).encode() + b"\n")
                    self.known.add(video)
            f.flush()
            self.read = f.tell()


class Word:
    """Numbers on their way from the device to the host, which waits for them only when it reads them."""

    def __init__(self, x: Tensor):
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self.host.copy_(x, non_blocking=True)
        self.there = torch.cuda.Event() if x.is_cuda else None
        if self.there:
            self.there.record()

    def tensor(self) -> Tensor:
        if self.there:
            self.there.synchronize()
        return self.host

    def read(self) -> list[float]:
        return self.tensor().tolist()
