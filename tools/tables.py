"""
Tables, for the tools and for bench/: titles and cells -> Markdown on the terminal; rows <-> a CSV file; settings of a
row -> their digest.

Every Markdown row is flushed as soon as it is printed: a long run can be followed, and its output pasted into docs/.
"""

import csv
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from kernels import triton


def print_row(*cells):
    """Print one row of a Markdown table. None is an empty cell; floats below 100 get three significant digits."""
    text = (f"{c:.3g}" if isinstance(c, float) and c < 100 else f"{c:.0f}" if isinstance(c, float) else
            "" if c is None else str(c) for c in cells)
    print("| " + " | ".join(text) + " |", flush=True)


def print_header(title: str, *columns: str):
    """Print a table's title and its header row."""
    print(f"\n**{title}**\n", flush=True)
    print_row(*columns)
    print_row(*["---"] * len(columns))


def format_mean(xs: list[float], digits: int = 1) -> str:
    """Format the mean ± standard error of the mean; one number alone; no number as an empty cell."""
    if not xs:
        return ""
    error = f" ± {statistics.stdev(xs) / len(xs) ** 0.5:.{digits}f}" if len(xs) > 1 else ""
    return f"{statistics.fmean(xs):.{digits}f}{error}"


def try_or_message(function: Callable, *args):
    """Return function(*args), or the first line of its error as a cell: one failed row does not end the table."""
    try:
        return function(*args)
    except Exception as e:      # noqa: BLE001
        return f"failed: {type(e).__name__}: {next(iter(str(e).splitlines()), '')[:90]}".replace("|", "/")


def read_csv(path: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a CSV file, which must have these columns; none if there is no file."""
    if not os.path.isfile(path):
        return []
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != columns:
        raise ValueError(f"{path}: the columns must be {', '.join(columns)}, got {', '.join(reader.fieldnames or ())}")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {i + 1} must have {len(columns)} values; delete it to read the others")
    return rows


def append_csv(path: str, columns: tuple[str, ...], row: dict):
    """Append a row to a CSV file, with a header if the file is new. Other keys than the columns are ignored."""
    is_new = not os.path.isfile(path)
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="", extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def config_diff(values: dict, defaults: dict) -> dict:
    """Return the settings that differ from the defaults: fields that train.py gets later change no digest."""
    return {k: config_diff(v, defaults[k]) if isinstance(v, dict) else v for k, v in values.items() if v != defaults[k]}


def digest(*values) -> str:
    """Return a short name of values, such as the settings of a row: twelve digits of the SHA-1 of their JSON."""
    return hashlib.sha1(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def current_commit() -> str:
    """
    Return the short hash of HEAD, with "+changes" if the working tree differs from it; "unknown" without git.

    docs/ is not compared: its pages may be half written while the numbers for them are measured.
    """
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)docs")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def banner(device: str, commit: str, module: str):
    """Print the line above the tables: device, versions, commit (empty: the current one) and `python -m module ...`."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, Triton {triton.__version__}, commit {commit or current_commit()}, "
          f"`python -m {module} {' '.join(sys.argv[1:])}`", flush=True)
