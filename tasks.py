"""The benchmarks, one row each: where their files are under --data-root, and how they are scored."""

import difflib
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A benchmark. Paths are relative to --data-root."""
    kind: str               # what is scored: retrieval
    root: str               # where --data-root is if not given
    annotations: str        # test annotations
    media: str              # folder that their "video" names are relative to
    rerank: int             # the matching head re-ranks the top k


TASKS = {
    "sprites": Task("retrieval", root="data/sprites", annotations="sprites_test.json", media="videos", rerank=16),
}


def find_task(name: str) -> Task:
    """The row of that name, or a ValueError with the nearest."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        raise ValueError(f"there is no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                         + f" There are: {', '.join(TASKS)}")
    return TASKS[name]


def files(task: Task, data_root: str) -> tuple[str, str]:
    """Annotation file and media folder under data_root ("" for the task's own place), which must be there."""
    root = data_root or task.root
    found = os.path.join(root, task.annotations), os.path.join(root, task.media)
    for path in found:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is not there: {root} wants {task.annotations} and {task.media}/")
    return found
