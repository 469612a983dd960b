"""
Measure everything on this machine within a budget of seconds: items in order, each a command of its own -> report.md
and report.json in --out. `make gpu` runs this.

An item may take its share of the time that is left. Time that it does not use goes to the items after it. If its share
is too short for a useful result, the item is skipped; when it is used up, the item is ended. Its output is in NAME.log.

Results are written after each item, so a run that is stopped or killed loses only the item that was running. The next
run reads them from state.json: an item that ended well is run again only if --again is given or its command has
changed. Results hold for one machine, commit and source; if one of these has changed, all items are run again. Compiled
kernels stay in cache/.

Without a GPU it runs what a CPU can, and lists the rest as not measured.
"""

import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
import triton

from files import atomic_write_text, read_json
from runtime import num_cpus
from tools.tables import current_commit


@dataclass(frozen=True)
class Item:
    """
    A command and its share of the budget. {python}, {out}, {commit}, {umt} and {xdist} in the command are replaced.

    figures: where the main figure is: a row's first cell ("" for the first row) and columns of its table. If there are
    several, the first that a table has is taken; if there are none, the main figure is the last line of the output.
    """
    name: str
    share: float                # of the budget; shares need not sum to 1
    least: float                # seconds; with less time it is skipped
    command: str
    figures: tuple = ()
    needs: str = ""             # a program, module or folder without which the item is not measured
    interpreted: bool = False   # the kernels run in Triton's interpreter


PATH_ONCE = ("import torch; from masking import cluster_stm; cluster_stm(torch.randn(128, 8, 196, 768, "
             'device="cuda", dtype=torch.bfloat16), 29, check=False); torch.cuda.synchronize()')
TEACHER = "out/demo/seed0/teacher"                          # of the demo
KERNEL_TESTS = " ".join(f"tests/test_{name}.py" for name in (
    "cosine_distance", "bandwidth", "density_peaks", "temporal_density", "cluster_argmax", "window_attention",
    "masking", "step", "teacher_products", "model_products"))
PYTEST = "{python} -m pytest -q -p no:cacheprovider --durations=5"

KERNELS = (("whole path", ("kernel ms", "kernel / roofline", "eager / kernel", "compiled / kernel")),
           ("cluster_stm", ("shape", "ms")))
STEP = (("", ("step", "ms", "GPU busy ms", "clips/s", "utilisation", "times UMT")),)
AGREEMENT = (("", ("clips", "T, N, C", "tokens alike, visible or not")),)

ON_GPU = (
    Item("smoke", 0.08, 30, "{python} -m bench smoke --commit {commit}"),
    Item("kernels", 0.18, 90, "{python} -m bench kernels --quick --commit {commit}", KERNELS),
    Item("profile", 0.04, 25, "ncu --clock-control none --set detailed -c 3 -k "
         f"regex:'density_peaks|temporal_density|bandwidth_kernel' {{python}} -c '{PATH_ONCE}'",
         (("", ("kernel", "Duration", "Issue Slots Busy")),), needs="ncu"),
    Item("step", 0.21, 120, "{python} -m bench step --batch 64 256 --variants compiled --steps 5 --rounds 3 "
         "--profile 30 --trace {out}/trace.json.gz --commit {commit} {umt}", STEP),
    Item("demo", 0.16, 30, "{python} -m tools.demo", (("ClusterSTM", ("own masked tokens T2V", "objects kept")),)),
    Item("agreement", 0.03, 15, f"{{python}} -m bench kernels --teacher {TEACHER} --commit {{commit}}", AGREEMENT,
         needs=TEACHER),
    Item("changes", 0.08, 60, "{python} -m bench step --batch 256 --variants compiled --steps 5 --rounds 3 --changes "
         "--commit {commit}"),
    Item("tests", 0.13, 40, f"{PYTEST} -m gpu {{xdist}} {KERNEL_TESTS}", needs="pytest"),
    Item("sweep", 0.09, 40, "{python} -m bench kernels --quick --sweep --skip eager compiled agreement peers teacher "
         "--commit {commit}", (("", ("ms", "launch")),)),
)
EXHAUSTIVE = (          # at the end, with --exhaustive; tests of 2^31 elements take up to 21 GB each, so they run alone
    Item("exhaustive tests", 0.5, 120,
         f"{PYTEST} -m exhaustive_gpu -k 'not 2_to_the_31' {{xdist}} {KERNEL_TESTS}", needs="pytest"),
    Item("large tests", 0.2, 60, f"{PYTEST} -m exhaustive_gpu -k 2_to_the_31 {KERNEL_TESTS}", needs="pytest"),
)
ON_CPU = (
    Item("smoke", 0.25, 10, "{python} -m bench smoke --commit {commit}", interpreted=True),
    Item("kernels", 0.15, 10, "{python} -m bench kernels --device cpu --rounds 5 --skip report --commit {commit}",
         KERNELS),
    Item("step", 0.20, 15, "{python} -m bench step --device cpu --preset sprites --variants eager --rounds 3 "
         "--commit {commit}", STEP),
    Item("agreement", 0.10, 10, f"{{python}} -m bench kernels --teacher {TEACHER} --commit {{commit}}", AGREEMENT,
         needs=TEACHER, interpreted=True),
    Item("compile", 0.30, 30, "{python} -m bench compile --targets sm_90 --commit {commit}",
         (("", ("kernel", "registers", "stack bytes")),)),
)
NO_GPU = "no GPU here"


@dataclass
class Config:
    """Measure everything on this machine, each item within its share of a budget: OUT/report.md."""
    budget: float = 840         # seconds that all items may take together
    umt: str = ""               # folder with a checkout of OpenGVLab/unmasked_teacher, to time its step beside ours
    commit: str = ""            # commit that the report names; empty: ask git
    out: str = "out/bench"      # folder of report, logs, state and caches
    # items to run, such as smoke, kernels, step, demo or tests; a wrong name lists them all; empty: all
    only: tuple[str, ...] = ()
    again: bool = False         # also run the items that have ended well before
    exhaustive: bool = False    # GPU: at the end also run every other test of the kernels

    def __post_init__(self):
        if not self.budget > 0:
            raise ValueError(f"--budget must be positive, got {self.budget:g}")
        names = list(dict.fromkeys(item.name for item in (*ON_GPU, *EXHAUSTIVE, *ON_CPU)))
        if unknown := [name for name in self.only if name not in names]:
            raise ValueError(f"--only must be among {', '.join(names)}, got {unknown[0]!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The machine

def source_hash() -> str:
    """A hash of every Python file here, as a commit does not tell what has changed since."""
    digest = hashlib.sha256()
    for path in sorted(glob.glob("*.py") + glob.glob("*/*.py")):
        with open(path, "rb") as f:
            digest.update(path.encode() + b"\0" + f.read())
    return digest.hexdigest()[:12]


def describe_machine(commit: str) -> dict[str, str]:
    """What the results hold for: device, driver, versions, commit, source."""
    on_gpu, driver = torch.cuda.is_available(), "none"
    if on_gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
    return dict(
        device=torch.cuda.get_device_name() if on_gpu else f"CPU, {num_cpus()} cores", driver=driver,
        python=platform.python_version(), torch=torch.__version__, triton=triton.__version__, numpy=np.__version__,
        commit=commit or current_commit(), source=source_hash())


# ---------------------------------------------------------------------------------------------------------------------
# Reading what an item printed

PROFILE_METRICS = ("Duration", "Issue Slots Busy", "L2 Cache Throughput", "DRAM Throughput", "Achieved Occupancy",
                   "Registers Per Thread", "Local Memory Spilling Requests")
NOTE = re.compile(r"Ceilings: |UMT: |[\d.]+ Tflop/s: |The host waited")         # lines that explain the tables


def read_tables(text: str) -> list[dict]:
    """
    Read the Markdown tables of a text -> for each its title, columns and rows, all strings.

    Other lines may stand between the rows: warnings of the libraries get there.
    """
    lines = [line for line in text.splitlines() if line.startswith("|") or re.fullmatch(r"\*\*.+\*\*", line)]
    is_rule = [line.startswith("|") and set(line) <= set("|-: ") for line in lines]
    tables, title = [], ""
    for i, line in enumerate(lines):
        if line.startswith("**"):
            title = line.strip("*")
        elif i + 1 < len(lines) and is_rule[i + 1]:
            tables.append(dict(title=title, columns=split_row(line), rows=[]))
            title = ""
        elif not is_rule[i] and tables and len(cells := split_row(line)) == len(tables[-1]["columns"]):
            tables[-1]["rows"].append(cells)
    return tables


def split_row(line: str) -> list[str]:
    """The cells of a Markdown row."""
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def read_profile(text: str) -> list[dict]:
    """Read ncu's details -> a table with a row for each kernel; none if no kernel was profiled."""
    kernels = re.split(r"^  (\w+) \(.*Context.*\n", text, flags=re.M)[1:]
    find = lambda name, text: re.search(rf"^ +{name}  +([^\s\d]*) *([\d.,]+) *$", text, re.M)
    rows = [[name, *(" ".join(filter(None, (m[2], m[1]))) if (m := find(metric, details)) else ""
                     for metric in PROFILE_METRICS)]
            for name, details in zip(kernels[::2], kernels[1::2], strict=True)]
    return [dict(title="Profiled by ncu", columns=["kernel", *PROFILE_METRICS], rows=rows)] if rows else []


def main_figure(item: Item, tables: list[dict], text: str, status: str, limit: float) -> str:
    """Return the item's main figure in one line, as its table prints it, or else the reason why there is none."""
    for first_cell, columns in item.figures if status != "failed" else ():
        for table in tables:
            rows = [row for row in table["rows"] if first_cell in ("", row[0])]
            if rows and set(columns) <= set(table["columns"]):
                cells = dict(zip(table["columns"], rows[0], strict=True))
                return ", ".join(f"{name} {cells[name]}" for name in columns if cells[name])
    if status == "cut off":
        return f"it takes longer than {limit:.0f} s"
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    return lines[-1][:200] if lines else "no output"


# ---------------------------------------------------------------------------------------------------------------------
# Running items

def is_missing(needs: str) -> bool:
    """Return whether a program, folder or module that an item needs is missing."""
    return bool(needs) and not (os.path.exists(needs) or shutil.which(needs)
                                or "/" not in needs and importlib.util.find_spec(needs))


def make_command(item: Item, cfg: Config, commit: str) -> list[str]:
    """The command of an item, its fields filled in."""
    xdist = f"-n {num_cpus()} --dist worksteal" if importlib.util.find_spec("xdist") else ""
    umt = f"--umt {shlex.quote(cfg.umt)}" if cfg.umt else ""
    return shlex.split(item.command.format(python=shlex.quote(sys.executable), out=shlex.quote(cfg.out), umt=umt,
                                           commit=shlex.quote(commit), xdist=xdist))


def format_command(command: list[str]) -> str:
    """A command as it is typed."""
    return shlex.join("python" if word == sys.executable else word for word in command)


def make_environment(item: Item, out: str) -> dict[str, str]:
    """The environment of an item: caches in OUT/cache; no look-ups on the hub; the interpreter only where wanted."""
    cache = os.path.abspath(os.path.join(out, "cache"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if item.interpreted else {}
    return environment | {
        "TRITON_CACHE_DIR": os.path.join(cache, "triton"), "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "inductor"),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_command(command: list[str], log: str, limit: float, environment: dict[str, str]) -> tuple[str, int | None]:
    """Run a command for at most `limit` seconds, its output in a file -> "ok", "failed" or "cut off", and exit code."""
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
        return ("ok" if code == 0 else "failed"), code
    except subprocess.TimeoutExpired:
        return "cut off", None
    finally:
        if process.poll() is None:                      # its time is over, or this run is stopped: end its children too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_item(item: Item, cfg: Config, commit: str, limit: float) -> dict:
    """Run an item -> its result."""
    log, command = os.path.join(cfg.out, f"{item.name.replace(' ', '_')}.log"), make_command(item, cfg, commit)
    start = time.perf_counter()
    try:
        status, code = run_command(command, log, limit, make_environment(item, cfg.out))
    except KeyboardInterrupt:
        status, code = "stopped", None
    seconds = round(time.perf_counter() - start, 1)
    with open(log, errors="replace") as f:
        text = f.read()
    tables, lines = read_tables(text) + read_profile(text), text.splitlines()
    return dict(name=item.name, status=status, seconds=seconds, limit=round(limit, 1), rc=code,
                command=format_command(command), figure=main_figure(item, tables, text, status, limit), log=log,
                tables=tables, notes=[line for line in lines if NOTE.match(line)], from_earlier_run=False,
                last_lines=[line for line in lines if status != "ok" and not line.startswith("|")][-15:])


def unmeasured(name: str, status: str, why: str) -> dict:
    """The result of an item that did not run."""
    return dict(name=name, status=status, seconds=None, limit=None, rc=None, command="", figure=why, log="", tables=[],
                notes=[], last_lines=[], from_earlier_run=False)


@contextmanager
def sigterm_stops():
    """Treat SIGTERM like Ctrl-C: `timeout` and job schedulers send it."""
    def stop(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------------------------------------------------
# State and report

def load_results(cfg: Config, machine: dict[str, str]) -> dict[str, dict]:
    """Read the results of an earlier run, by name; {} if they are of another machine, commit or source."""
    path = f"{cfg.out}/state.json"
    if not os.path.isfile(path):
        return {}
    state = read_json(path)
    if different := [key for key in machine if state["machine"].get(key) != machine[key]]:
        print(f"begins anew: the results in {cfg.out} are of another {', '.join(different)}", flush=True)
        return {}
    return {name: r | {"from_earlier_run": True} for name, r in state["items"].items()}


def as_number(cell: str):
    """A cell as int or float if it is one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(cell)
    return cell


def write_results(cfg: Config, machine: dict[str, str], results: dict[str, dict]):
    """Write state.json, report.json and report.md."""
    ran = {name: r for name, r in results.items() if r["seconds"] is not None}
    atomic_write_text(f"{cfg.out}/state.json", json.dumps(dict(machine=machine, items=ran), indent=1))
    items = [r | {"tables": [t | {"rows": [[as_number(cell) for cell in row] for row in t["rows"]]}
                             for t in r["tables"]]} for r in results.values()]
    command = f"python -m bench {shlex.join(sys.argv[1:])}"
    report = dict(machine, command=command, items=items)
    atomic_write_text(f"{cfg.out}/report.json", json.dumps(report, indent=1))
    atomic_write_text(f"{cfg.out}/report.md", format_report(machine, command, list(results.values())))


def format_banner(machine: dict[str, str], command: str) -> str:
    """The line above the tables: as tools.tables.banner, with driver and further versions."""
    return (f"{machine['device']}, driver {machine['driver']}, Python {machine['python']}, torch {machine['torch']}, "
            f"Triton {machine['triton']}, NumPy {machine['numpy']}, commit {machine['commit']}, `{command}`")


def format_table(title: str, columns: list[str], rows: list[list]) -> str:
    """A Markdown table with its title; an empty one has no line."""
    lines = [columns, ["---"] * len(columns), *rows]
    heading = f"**{title}**\n\n" if title else ""
    return heading + "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


def outcome_of(result: dict) -> str:
    """What became of an item, and whether that was in an earlier run."""
    return result["status"] + ", in an earlier run" * result["from_earlier_run"]


def format_report(machine: dict[str, str], command: str, results: list[dict]) -> str:
    """The report as Markdown: what became of each item, then the tables of those that ran."""
    outcome = [[r["name"], outcome_of(r), "" if r["seconds"] is None else f"{r['seconds']:.0f}",
                r["figure"].replace("|", "/")] for r in results]
    parts = [f"# What was measured\n\n{format_banner(machine, command)}\n",
             format_table("", ["item", "outcome", "seconds", "main figure, or why there is none"], outcome)]
    for r in results:
        if r["seconds"] is None:
            continue
        parts.append(f"## {r['name']}\n\n`{r['command']}`: {outcome_of(r)}, {r['seconds']:.0f} s of {r['limit']:.0f}; "
                     f"its output is in {r['log']}\n")
        parts += [f"{note}\n" for note in r["notes"]]
        parts += [format_table(t["title"], t["columns"], t["rows"]) for t in r["tables"]]
        if r["last_lines"]:
            parts.append("```\n" + "\n".join(r["last_lines"]) + "\n```\n")
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The run

def choose_items(cfg: Config) -> tuple[list[Item], list[dict]]:
    """The items of this machine, and the results of those that it cannot run."""
    if torch.cuda.is_available():
        return [*ON_GPU, *EXHAUSTIVE * cfg.exhaustive], []
    names = [item.name for item in ON_CPU]
    return [*ON_CPU], [unmeasured(item.name, "not measured", NO_GPU) for item in (*ON_GPU, *EXHAUSTIVE * cfg.exhaustive)
                       if item.name not in names]


def run_items(cfg: Config, commit: str, items: list[Item], earlier: dict[str, dict], deadline: float):
    """Yield the result of each item, in order: run, done before, skipped, or not asked for."""
    def is_done(item):
        result = earlier.get(item.name)
        return result and not cfg.again and (result["status"], result["command"]) == (
            "ok", format_command(make_command(item, cfg, commit)))

    to_run = [item for item in items if item.name in (cfg.only or [item.name]) and not is_done(item)]
    for item in items:
        if item not in to_run:
            yield earlier.get(item.name) or unmeasured(item.name, "not measured", "not asked for: --only")
            continue
        limit = max(0.0, deadline - time.monotonic()) * item.share / sum(other.share for other in to_run)
        to_run.remove(item)
        if is_missing(item.needs):
            yield unmeasured(item.name, "not measured", f"there is no {item.needs}")
        elif limit < item.least:
            yield unmeasured(item.name, "skipped", f"lack of time: {limit:.0f} s are left to it, and it needs "
                                                   f"{item.least:.0f}")
        else:
            yield run_item(item, cfg, commit, limit)


def main(cfg: Config):
    """Run the items and write the report. ValueError if an item that ran did not end well, or none did."""
    if cfg.umt and not os.path.isdir(cfg.umt):
        raise ValueError(f"--umt must be a folder, got {cfg.umt!r}")
    os.makedirs(cfg.out, exist_ok=True)
    deadline = time.monotonic() + cfg.budget
    machine = describe_machine(cfg.commit)
    print(format_banner(machine, f"python -m bench {shlex.join(sys.argv[1:])}"), flush=True)
    items, impossible = choose_items(cfg)
    if impossible:
        print(f"{NO_GPU}: not measured are {', '.join(r['name'] for r in impossible)}", flush=True)
    earlier = load_results(cfg, machine)
    # Until its turn comes, an item has the result of an earlier run, or that it was not reached.
    results = {item.name: earlier.get(item.name) or unmeasured(item.name, "not measured", "not reached")
               for item in items} | {r["name"]: r for r in impossible}
    with sigterm_stops():
        try:
            for result in run_items(cfg, machine["commit"], items, earlier, deadline):
                results[result["name"]] = result
                write_results(cfg, machine, results)
                seconds = "" if result["seconds"] is None else f"; {result['seconds']:.0f} s"
                print(f"{result['name']}: {outcome_of(result)}{seconds}; {result['figure']}", flush=True)
                if result["status"] == "stopped":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            write_results(cfg, machine, results)
            raise ValueError(f"stopped; what ended before is in {cfg.out}/report.md, and the same command goes on"
                             ) from None
    bad = [f"{r['name']} ({r['status']})" for r in results.values()
           if r["status"] in ("failed", "cut off") and not r["from_earlier_run"]]
    ran = [r for r in results.values() if r["seconds"] is not None]
    if bad or not ran:
        raise ValueError((f"{', '.join(bad)} did not end well" if bad else f"no item ran, --budget is {cfg.budget:g}")
                         + f": see {cfg.out}/report.md")
    print(f"written to {cfg.out}/report.md")
