"""
Memory of annotations: an annotation file that is made up -> what loader processes hold of it.

The memory-mapped annotations of a run (annotations.MappedAnnotations) stand beside a list of the same annotations.
/proc/self/smaps_rollup counts: Rss is all memory of a process, Pss that with its part of what it shares, and
Private_Dirty what it alone has written. A process that reads a list writes the reference counts of its objects, so it
copies their pages. Works on Linux only.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from annotations import build_mapped_annotations, read_annotations
from tools.tables import banner, print_header, print_row


@dataclass
class Config:
    """Measure the memory of a large annotation file, memory-mapped and as a list, in processes that read it."""
    count: int = 2_000_000      # annotations in the file, which is made up
    workers: int = 8            # processes that read annotations, as data loaders do
    reads: int = 100_000        # annotations that each process reads, at random
    commit: str = ""            # commit to print above the table; empty: ask git

    def __post_init__(self):
        for name in ("count", "workers", "reads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def memory_mb(kind: str) -> float:
    """Memory of this process in MB; kind: "Rss", "Pss" or "Private_Dirty"."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(words[1]) for words in map(str.split, f) if words[0] == f"{kind}:") / 1024


def fork_readers(annotations: Sequence, workers: int, reads: int) -> list[tuple[float, float]]:
    """Fork processes that read annotations at random -> (Private_Dirty, Pss) of each in MB, while all are alive."""
    context = multiprocessing.get_context("fork")
    results, barrier = context.SimpleQueue(), context.Barrier(workers)

    def read(seed: int):
        for i in np.random.default_rng(seed).integers(len(annotations), size=reads):
            _ = annotations[int(i)].video
        barrier.wait()                              # all processes are there while each is measured
        results.put((memory_mb("Private_Dirty"), memory_mb("Pss")))
        barrier.wait()

    processes = [context.Process(target=read, args=(seed,)) for seed in range(workers)]
    for process in processes:
        process.start()
    memory = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return memory


def write_annotations(path: str, count: int):
    """Write an annotation file with made-up videos and captions."""
    with open(path, "w") as f:
        f.write("[")
        for i in range(count):
            f.write(",\n" * (i > 0) + json.dumps({"video": f"{i % 1000:03d}/{i:09d}.mp4",
                                                  "caption": f"clip {i}: someone does a thing with another thing"}))
        f.write("]")


def annotation_memory_table(cfg: Config):
    """Print the memory of mapped annotations and of a list, here and in the reading processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/annotations.json"
        write_annotations(path, cfg.count)
        print_header(
            f"{cfg.count} annotations, {os.path.getsize(path) / 2 ** 20:.0f} MB of JSON; {cfg.workers} processes that "
            f"read {cfg.reads} each", "annotations", "s to read", "MB here (Rss)", "MB of a process (Private_Dirty)",
            "MB of all processes (Pss)")
        for name, load in (("mapped", lambda: build_mapped_annotations([(path, folder)], folder)),
                           ("list", lambda: read_annotations(path, folder, check=False))):
            before, start = memory_mb("Rss"), time.perf_counter()
            annotations = load()
            seconds, here = time.perf_counter() - start, memory_mb("Rss") - before
            memory = fork_readers(annotations, cfg.workers, cfg.reads)
            print_row(name, seconds, here, max(private for private, _ in memory), sum(pss for _, pss in memory))
            del annotations


def main(cfg: Config):
    banner("cpu", cfg.commit, "bench")
    annotation_memory_table(cfg)
