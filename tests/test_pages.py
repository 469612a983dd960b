"""README, docs and docstrings: they name every file, and the commands that they give parse."""

import os
import re

import pytest
from helpers.commands import parse
from helpers.runs import ROOT

PAGES = ["README.md", "docs/training.md", "docs/data.md", "docs/results.md", "docs/bench.md", "train.py", "eval.py",
         "search.py", "tools/sprites.py", "tools/show.py", "tools/demo.py", "tools/ablations.py", "tools/mask_stats.py",
         "tools/convert.py", "bench/__main__.py"]


def read(name):
    with open(os.path.join(ROOT, name)) as f:
        return f.read()


def test_the_readme_names_every_file():
    readme = read("README.md")
    files = [name for folder in ("", "tools", "bench") for name in os.listdir(os.path.join(ROOT, folder))
             if name.endswith(".py") and not name.startswith("__")]
    assert len(files) > 15 and not [name for name in (*files, "kernels/") if f"`{name}`" not in readme]


def commands(text):
    """The command lines in the indented blocks of a text, continued lines joined. "..." is a value, or more flags."""
    text = re.sub(r"\\\n +", "", text)
    text = re.sub(r"( (?!--)\S+) \.\.\.$", r"\1", text, flags=re.M).replace("...", "x.json")
    return re.findall(r"^    (?:python|torchrun(?: --\S+)+) (.*?)(?:  .*)?$", text, re.M)


@pytest.mark.parametrize("name", PAGES)
def test_commands_on_pages_parse(name):
    text = read(name)
    lines = commands(text if name.endswith(".md") else text.split('"""')[1])            # the docstring
    assert lines or name.startswith("docs/")
    for line in lines:
        if "--help" not in line:
            parse(line)
