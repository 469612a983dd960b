"""
What a run needs besides the method: processes, collectives, random generators, its folder, checkpoints, logs.

A run writes to one folder:

    out/NAME/lock                       locked while the run lasts
    out/NAME/run_state.json             what --resume goes on with: settings, micro-batch sizes, digests of the texts
    out/NAME/config.json, command.txt   its resolved settings and its command line, written when it begins
    out/NAME/checkpoints/STAGE-STEP.pt  the newest training states; each is complete or absent
    out/NAME/log.jsonl                  losses
    out/NAME/bad_media.jsonl            videos that could not be read, with the reason

A checkpoint holds no random state and no position in the data: both are functions of (seed, step). A resumed run
therefore continues bit for bit on as many ranks, and to rounding on another number of ranks.
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from files import (
    WriteError,
    atomic_write,
    atomic_write_text,
    escape_control,
    format_error,
    load_state_dict_strict,
    read_json,
    write_all,
    write_json,
)

STAGES = ("teacher", "text", "pretrain", "unmasked", "finetune")

# Settings that may differ when a run is resumed.
MAY_CHANGE_ON_RESUME = (
    "resume", "device", "log", "log_every", "val_every", "save_every", "save_minutes", "keep_checkpoints",
    "max_skipped_steps", "compile", "activation_checkpointing", "data.val_file", "data.val_root", "data.num_workers",
    "data.frame_cache", "data.resize_on_device", "data.max_unreadable",
)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices

def num_cpus() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def init_worker():
    """Initialise a pool worker: one torch thread. SIGTERM ends it; the process that waits for it handles SIGINT."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def parallel_map(function, items, label: str):
    """Yield function(item) for each item, in order, from all cores, with a progress bar. A killed worker raises."""
    count = min(num_cpus(), len(items))
    with ProcessPoolExecutor(count, initializer=init_worker) as pool:
        yield from tqdm(pool.map(function, items, chunksize=4), label, total=len(items), disable=None)


def run_cli(name: str, function: Callable):
    """Run a command. A wrong input ends it with one line instead of a traceback, unless TRACEBACK is set."""
    try:
        function()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        text = str(error).strip()
        if "Traceback (most recent call last)" in text:         # a loader process sends its own along
            text = text.split("\n")[-1]
        sys.exit(f"{name}: {escape_control(text)}")


def select_device(name: str) -> torch.device:
    """"cpu", "cuda", or "auto" for CUDA if available -> the device of this process. LOCAL_RANK picks the GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto, got 'cuda': this machine or this build of torch has no CUDA GPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which a GPU multiplies matrices in bf16. On a CPU it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def rank_and_world() -> tuple[int, int]:
    """Return (rank, number of ranks); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(*values):
    """Print on rank 0 only, at once."""
    if rank_and_world()[0] == 0:
        print(*values, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Collectives

def all_gather(x: Tensor) -> Tensor:
    """x (...) of each rank -> (world, ...), without gradient."""
    x = x.detach().contiguous()
    if not dist.is_initialized():
        return x[None]
    out = x.new_empty((dist.get_world_size(), *x.shape))
    dist.all_gather(list(out.unbind(0)), x)
    return out


class AllGatherWithGrad(torch.autograd.Function):
    """all_gather along the first axis; backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.unflatten(0, (dist.get_world_size(), -1)).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """x (b, ...) of each rank -> (world * b, ...), with gradient."""
    return AllGatherWithGrad.apply(x) if dist.is_initialized() else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum x over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather_lists(items: list) -> list:
    """Concatenate the lists of all ranks in rank order."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers

class Stream(IntEnum):
    """What the random numbers of a micro-batch are drawn for."""
    MASK = 0            # tokens of random masks; the toy text encoder's masked words
    MLM = 1             # masked words
    QUERIES = 2         # tokens that the decoder predicts
    NEG_CLIP = 3        # hard negative clips
    NEG_TEXT = 4        # hard negative texts


def seeded_generator(batch, stream: Stream) -> torch.Generator:
    """Make the generator of a micro-batch for one purpose. It draws on the CPU: every device gets the same numbers."""
    return torch.Generator().manual_seed((batch.seed + int(stream) * 0x9E3779B97F4A7C15) % 2 ** 63)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

class StopHandler:
    """
    Handle SIGTERM and SIGINT (Ctrl-C). During a step the request is remembered: all ranks stop after the step and save
    a checkpoint. Elsewhere the process exits at once. The exit code is 0 in both cases.
    """

    def __init__(self):
        self.requested = self.deferred = False
        self.previous = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}

    def __call__(self, *_):
        self.requested = True
        if not self.deferred:
            sys.exit(0)

    def defer(self):
        """Remember requests from now on."""
        self.deferred = True

    def terminate_now(self):
        """Exit at once from now on, and now if there was a request before."""
        self.deferred = False
        if self.requested:
            sys.exit(0)

    def restore(self):
        """Restore the handlers before this one."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@dataclass
class RunContext:
    """A run in this process: settings, folder, device, rank."""
    cfg: object
    folder: str
    device: torch.device
    rank: int
    world: int
    stop: StopHandler | None = None
    exit_stack: ExitStack = field(default_factory=ExitStack)    # locks and loaders, closed when the run ends
    group: object = None                        # a gloo group for waits that may last days
    micro_batch_size: dict[str, int] = field(default_factory=dict)      # stage -> clips a rank holds at once
    position: dict = field(default_factory=dict)                # {"folder", "step"} of the current stage, for errors

    def barrier(self):
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(self.group)

    def broadcast(self, value):
        """Return rank 0's value, on all ranks."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, 0, self.group)
        return values[0]

    def all_gather_object(self, value) -> list:
        """Return the values of all ranks, on all ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, self.group)
        return values

    def call_on_rank0(self, function: Callable):
        """Return what function() returns on rank 0, on all ranks. A ValueError or OSError of it is raised on all."""
        error = result = None
        if self.rank == 0:
            try:
                result = function()
            except (ValueError, OSError) as caught:
                error = str(caught)
        error, result = self.broadcast((error, result))
        if error is not None:
            raise ValueError(error)
        return result

    def rank0_first(self, function: Callable):
        """Call function() on rank 0 before the other ranks, which then find the files that it wrote."""
        if self.rank > 0:
            self.barrier()
        result = function()
        if self.rank == 0:
            self.barrier()
        return result

    def close(self):
        """Unlock the folders and restore the handlers of signals."""
        self.exit_stack.close()
        if self.stop:
            self.stop.restore()


def init_run(cfg, folders: list[str], device: torch.device) -> tuple[RunContext, bool]:
    """
    Join the process group of a torchrun and lock the folders that the run writes to, of which the first is its own.

    -> the run, and whether it resumes: with --resume, or if torchrun restarted the processes. ValueError if another run
    holds a folder, if a folder holds an earlier run, or if a rank does not see rank 0's folder.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    run = RunContext(cfg, folders[0], device, rank, world)
    if world > 1:
        if not dist.is_initialized():
            # torchrun's store outlives a restart, with the addresses of processes that have ended.
            store, _, _ = next(dist.rendezvous("env://"))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world,
                                    store=dist.PrefixStore(f"start {restarts}", store), timeout=timedelta(hours=1))
        # Rank 0 decodes and saves alone, which may take hours; the other ranks wait in this group.
        run.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    # A restart by torchrun comes from the agent that started the run before.
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    owner = f"job {job}" if job != "none" else f"started by process {os.getppid()} of {socket.gethostname()}"
    error, resume = "", cfg.resume
    if rank == 0:
        try:
            resume = _lock_folders(run, folders, owner, restarts)
        except (ValueError, OSError) as caught:
            error = str(caught)
    error, resume, owner = run.broadcast((error, resume, owner))
    # Rank 0 does not read the lock: closing any file handle of it would release it.
    lock = os.path.join(folders[0], "lock")
    if not error and rank > 0 and not (os.path.isfile(lock) and open(lock).read() == owner):    # noqa: SIM115
        error = (f"rank {rank} on {socket.gethostname()} does not see {folders[0]} of rank 0: all nodes must share the "
                 "folder")
    errors = [e for e in run.all_gather_object(error) if e]
    if errors:
        run.close()
        if rank > 0:
            sys.exit(1)                         # rank 0 reports the error
        raise ValueError(errors[0])
    run.stop = StopHandler()
    return run, resume


def _lock_folders(run: RunContext, folders: list[str], owner: str, restarts: int) -> bool:
    """Lock the folders for `owner` on rank 0 -> whether the run resumes. ValueError if they may not be written to."""
    locks = [run.exit_stack.enter_context(lock_folder(folder)) for folder in folders]
    resume = run.cfg.resume or bool(restarts) and all(lock.read() == owner for lock in locks)
    existing = [path for f in folders[::-1] for path in list_training_states(f)]
    if existing and not resume:
        raise ValueError(f"{existing[0]} belongs to an earlier run: --resume continues it, another --name starts a new "
                         "one")
    if resume and not existing:
        print(f"{folders[0]}: there is nothing to resume, the run begins", flush=True)
    for folder in folders:
        if not resume or not existing:          # files of a run that ended before its first checkpoint
            for name in ("run_state.json", "bad_media.jsonl", "nonfinite.json"):
                if os.path.isfile(f"{folder}/{name}"):
                    os.remove(f"{folder}/{name}")
    for lock in locks:                          # written last: a run that was refused must not own the folder
        os.truncate(lock.fileno(), 0)
        write_all(lock, owner.encode())
    return resume


def lock_folder(folder: str):
    """Lock a folder until the returned file is closed or the process ends. The file holds the name of the owner."""
    os.makedirs(folder, exist_ok=True)
    f = open(os.path.join(folder, "lock"), "a+")     # noqa: SIM115  (the caller closes it)
    f.seek(0)
    try:
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)       # loader processes would inherit a lock of flock
    except (BlockingIOError, PermissionError):
        with f:
            holder = f.read()
        raise ValueError(f"{folder} is in use by another run ({holder}); choose another --name") from None
    return f


def pin_to_first_run(folder: str, run: RunContext, name: str, value):
    """Return the value of `name` in run_state.json, on all ranks. If it is absent, store rank 0's `value` first."""
    def pin():
        pinned = read_run_state(folder)
        if name not in pinned:
            write_json(os.path.join(folder, "run_state.json"), pinned | {name: value})
        return pinned.get(name, value)

    return run.call_on_rank0(pin)


def read_run_state(folder: str) -> dict:
    """Read run_state.json of a run's folder. If it is absent, {}."""
    path = os.path.join(folder, "run_state.json")
    return read_json(path) if os.path.isfile(path) else {}


def pin_config(folder: str, run: RunContext, config: dict):
    """
    Store the settings of a run in run_state.json. If it has them, ValueError on all ranks if one differs that may not
    change. (A run that has trained nothing yet may begin again with other settings: init_run removes the file.)
    """
    path = os.path.join(folder, "run_state.json")
    run.call_on_rank0(lambda: require_settings(folder))
    pinned = pin_to_first_run(folder, run, "config", config)
    if not isinstance(pinned, dict):
        raise ValueError(f"{path}: config must be an object, got {pinned!r}")
    check_same_config({"stage": None} | pinned, config, path)


def require_settings(folder: str):
    """Raise a ValueError if a folder has trained models but not the settings they were trained with."""
    trained = list_training_states(folder)
    if trained and "config" not in read_run_state(folder):
        raise ValueError(f"{folder}/run_state.json must have the settings of the run that wrote {trained[0]}: another "
                         "version of train.py began it, or the file was deleted. Choose another --name")


def describe_error(error: Exception, run: RunContext) -> Exception:
    """
    Turn a file that could not be written, a lost process or too little memory into a one-line OSError, which names the
    step and the newest checkpoint. Any other error is returned unchanged.
    """
    text, folder = format_error(error), run.position.get("folder", run.folder)
    if isinstance(error, WriteError):
        return OSError(f"{error}; {resume_hint(folder)}")
    if isinstance(error, torch.OutOfMemoryError):
        message = f"the GPU has too little memory: choose a smaller --micro-batch ({text})"
    elif re.search("DataLoader worker.*(is killed by signal|exited unexpectedly)", text):
        message = f"a loader process was killed, perhaps for lack of memory ({text})"
    elif isinstance(error, BrokenProcessPool):
        message = f"a decoding process was killed, perhaps for lack of memory ({text})"
    elif run.world > 1 and (isinstance(error, dist.DistError) or re.search("gloo|NCCL|by peer|Broken pipe", text)):
        message = f"rank {run.rank} has lost another rank ({text})"
    else:
        return error
    return OSError(f"{run.position.get('step', folder)}: {message}; {resume_hint(folder)}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of training

def list_checkpoints(folder: str) -> list[str]:
    """List the checkpoints in a run's folder, newest first."""
    checkpoints = []
    folder = os.path.join(folder, "checkpoints")
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if match := re.fullmatch(rf"({'|'.join(STAGES)})-(\d+)\.pt", name):
            checkpoints.append((STAGES.index(match[1]), int(match[2]), os.path.join(folder, name)))
    return [path for *_, path in sorted(checkpoints, reverse=True)]


def list_training_states(folder: str) -> list[str]:
    """List what a run has trained: its checkpoints, newest first, and its models."""
    models = [os.path.join(folder, name) for name in ("model.safetensors", "before_unmasked/model.safetensors")]
    return [*list_checkpoints(folder), *filter(os.path.isfile, models)]


def resume_hint(folder: str) -> str:
    """Return a clause that says from which checkpoint a failed run can be resumed."""
    checkpoints = list_checkpoints(folder)
    return f"--resume continues from {checkpoints[0]}" if checkpoints else "there is no checkpoint yet"


class HashingWriter:
    """A file object that hashes what is written to it, in order."""

    def __init__(self, f):
        self.f, self.hash = f, hashlib.blake2b()

    def write(self, data) -> int:
        self.hash.update(data)
        return self.f.write(data)

    def flush(self):
        self.f.flush()


def save_checkpoint(run: RunContext, stage: str, step: int, model: nn.Module, optimizer, counts: dict):
    """Write checkpoints/STAGE-STEP.pt, complete or not at all, then remove all but the newest cfg.keep_checkpoints."""
    path = os.path.join(run.folder, "checkpoints", f"{stage}-{step:07d}.pt")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with atomic_write(path) as f:
            writer = HashingWriter(f)
            torch.save({"stage": stage, "step": step, "counts": counts, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(), "config": asdict(run.cfg)}, writer)
            f.write(writer.hash.digest())       # a zip reader ignores what follows the archive
    except RuntimeError as error:
        hidden = error
        while hidden and not isinstance(hidden, OSError):       # torch's writer hides the OSError
            hidden = hidden.__context__
        raise WriteError(path, hidden) if hidden else error from None
    for path in list_checkpoints(run.folder)[run.cfg.keep_checkpoints:]:
        os.remove(path)


def verify_checkpoint(path: str) -> str:
    """Say what is wrong with a checkpoint; "" if its content has the checksum that was written after it."""
    content, size = hashlib.blake2b(), os.path.getsize(path)
    remaining = size - content.digest_size
    if remaining < 0:
        return f"it has {size} bytes"
    with open(path, "rb") as f:
        while remaining:
            chunk = f.read(min(remaining, 2 ** 24))
            content.update(chunk)
            remaining -= len(chunk)
        return "" if f.read() == content.digest() else "its checksum is wrong"


def latest_checkpoint(run: RunContext) -> str:
    """Return the newest intact checkpoint, or "". Damaged ones are renamed to *.corrupt and reported."""
    latest = ""
    if run.rank == 0:
        for path in list_checkpoints(run.folder):
            error = verify_checkpoint(path)
            if not error:
                latest = path
                break
            os.replace(path, path + ".corrupt")
            older = list_checkpoints(run.folder)
            then = f"{older[0]} is tried" if older else "there is none before it, the stage begins again"
            print(f"{path} is damaged ({error}) and was renamed to {path}.corrupt; {then}", flush=True)
    return run.broadcast(latest)


def remove_temp_files(folder: str):
    """Remove the files that a killed process was writing. eval-* stays: another process may be writing it now."""
    for part in (folder, *(os.path.join(folder, name) for name in ("checkpoints", "before_unmasked", "target_cache"))):
        for name in os.listdir(part) if os.path.isdir(part) else []:
            if name.endswith(".tmp") and not name.startswith("eval-"):
                os.remove(os.path.join(part, name))


def load_checkpoint(run: RunContext, stage: str, model: nn.Module, optimizer) -> tuple[int, dict]:
    """
    Load the newest checkpoint into model and optimizer -> (step to continue from, counts); (0, {}) if it is of another
    stage or the run does not resume.
    """
    if run.rank == 0:
        remove_temp_files(run.folder)
    path = latest_checkpoint(run) if run.cfg.resume else ""
    if not path:
        return 0, {}
    state = read_checkpoint_state(path)
    check_same_config(state["config"], asdict(run.cfg), path)
    if state["stage"] != stage:
        return 0, {}
    load_state_dict_strict(model, state["model"], path)
    load_optimizer_state(optimizer, state["optimizer"], path)
    return state["step"], state["counts"]


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict, path: str):
    """Load the state of AdamW. ValueError if it is not one of these parameters."""
    try:
        optimizer.load_state_dict(state)
        for p, moments in optimizer.state.items():
            shapes = [moments[key].shape for key in ("exp_avg", "exp_avg_sq")]
            if shapes != [p.shape] * 2:
                raise ValueError(f"shapes {shapes} of a parameter of shape {p.shape}")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its optimizer state does not fit the model ({format_error(error):.200})") from None


def read_checkpoint_state(path: str) -> dict:
    """Read a checkpoint of save_checkpoint. ValueError if it holds anything but tensors, numbers, texts and dicts."""
    try:
        # Memory-mapped: the ranks of a host share one copy, and a GPU holds no second copy.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:                  # an unpickler can raise anything if a file is not what it should be
        raise ValueError(f"{path} is not a checkpoint of train.py: {format_error(error):.200}") from None
    kinds = {"stage": str, "step": int, "counts": dict, "model": dict, "optimizer": dict, "config": dict}
    reason = next((f"its {key!r} must be of type {kind.__name__}" for key, kind in kinds.items()
                   if not isinstance(state, dict) or not isinstance(state.get(key), kind)), "")
    if not reason and os.path.basename(path) != f"{state['stage']}-{state['step']:07d}.pt":
        reason = f"it is of step {state['step']} of stage {state['stage']!r}"
    if not reason and not all(isinstance(count, int) for count in state["counts"].values()):
        reason = f"its counts must be integers, got {state['counts']}"
    if not reason and not all(isinstance(x, Tensor) and x.layout == torch.strided for x in state["model"].values()):
        reason = "its weights must be dense tensors"
    if reason:
        raise ValueError(f"{path} is not a checkpoint of train.py: {escape_control(reason)}")
    return state


def check_same_config(before: dict, now: dict, path: str, prefix: str = ""):
    """Raise a ValueError at the first setting that differs and may not change on resume."""
    for key, value in now.items():
        name = prefix + key
        value = list(value) if isinstance(value, tuple) else value
        previous = list(before[key]) if isinstance(before.get(key), tuple) else before.get(key)
        same = previous == value
        if name == "stage":                     # toy models may be trained by runs of their own before
            same = (previous == "finetune") == (value == "finetune")
        if name in MAY_CHANGE_ON_RESUME:
            continue
        if isinstance(value, dict) and isinstance(previous, dict):
            check_same_config(previous, value, path, f"{name}.")
        elif key not in before:
            raise ValueError(f"{path} has no {name}: another version of train.py began the run, and this one cannot "
                             "continue it")
        elif not same:
            hint = f"; rename the folder back to out/{previous}" if name == "name" else ""
            raise ValueError(f"{path}: {name} must be {previous!r} as when the run began, got {value!r}{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Logs, and asynchronous copies to the host

def truncate_log(path: str, stage: str, step: int):
    """Drop the rows of log.jsonl that will be written again: those after `step` of `stage`, and of later stages."""
    if os.path.isfile(path):
        rows = []
        with open(path, errors="replace") as f:
            for i, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    row_position = STAGES.index(row["stage"]), int(row["step"])
                except (ValueError, KeyError, TypeError, OverflowError):        # cut by a kill, for example
                    print(f"{path}, line {i} is damaged and was dropped", flush=True)
                    continue
                if row_position <= (STAGES.index(stage), step):
                    rows.append(row)
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


class BadMediaLog:
    """bad_media.jsonl: {"where", "video", "reason"} of each unreadable video, once, whichever rank read it."""

    def __init__(self, folder: str):
        self.path, self.seen, self.offset = os.path.join(folder, "bad_media.jsonl"), set(), 0

    def add(self, records: list[dict]):
        """Append the records whose video is not in the file yet."""
        new = {record["video"]: record for record in records if record["video"] not in self.seen}
        if not new:
            return
        try:
            with open(self.path, "a+b") as f:
                fcntl.lockf(f, fcntl.LOCK_EX)
                self.read_new(f)
                for video, record in new.items():
                    if video not in self.seen:
                        f.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
                        self.seen.add(video)
                f.flush()
                self.offset = f.tell()
        except OSError as error:
            raise WriteError(self.path, error) from None

    def read_new(self, f):
        """Read what other ranks have written since. A line that is damaged stays; its video may be listed again."""
        f.seek(self.offset)
        for line in f:
            if not line.endswith(b"\n"):        # the process that wrote it was killed
                f.truncate(f.seek(-len(line), os.SEEK_CUR))
                break
            with suppress(ValueError, KeyError, TypeError):
                self.seen.add(json.loads(line)["video"])


class AsyncHostCopy:
    """A copy of a device tensor to the host that is waited for only when it is read."""

    def __init__(self, x: Tensor):
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self.host.copy_(x, non_blocking=True)
        self.event = torch.cuda.Event() if x.is_cuda else None
        if self.event:
            self.event.record()

    def wait(self) -> Tensor:
        """Wait for the copy -> the host tensor."""
        if self.event:
            self.event.synchronize()
        return self.host

    def tolist(self) -> list[float]:
        return self.wait().tolist()
