"""bench/memory.py: processes that read mapped annotations hold little of them."""

import subprocess
import sys

import pytest
from helpers.runs import ROOT
from helpers.tables import markdown_tables

from bench import memory


def test_mapped_annotations_cost_loader_processes_little():
    """In a process of its own: children forked from pytest's would write to pages of whatever it holds."""
    args = [sys.executable, "-m", "bench", "memory", "--count", "60000", "--workers", "2", "--reads", "20000"]
    result = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (_, mapped, as_list), = markdown_tables(result.stdout)
    assert (mapped[0], as_list[0]) == ("mapped", "list") and "60000 annotations" in result.stdout
    assert float(mapped[3]) < 8 < 12 < float(as_list[3])                    # MB that a process has written


@pytest.mark.parametrize("name", ["count", "workers", "reads"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"--{name} .* 0"):
        memory.Config(**{name: 0})
