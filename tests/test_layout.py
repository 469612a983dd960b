"""The layout of the repository: imports follow the order of the files, without circles, and no file is long."""

import ast
import glob
import os
from graphlib import TopologicalSorter

from helpers.runs import ROOT

# Each file imports only files above it, and files of its own line. "tools" stands for the other files of tools/.
ORDER = [
    "kernels", "budgets", "masking", "files", "runtime", "tokenizer", "media", "formats", "annotations", "tasks",
    "video", "frame_cache", "inputs", "siglip_files", "teacher", "positions", "blocks", "encoders", "targets",
    "products", "decoders", "model", "metrics", "data", "eval", "tools.sprites tools.toy_teacher", "logs", "loop",
    "config", "train", "search_page", "search", "tools", "bench",
]
MAX_LINES = 700


def python_files(*patterns):
    return sorted(path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT))


def module_name(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


FILES = {module_name(path): path for path in python_files("*.py", "kernels/*.py", "tools/*.py", "bench/*.py")}


def parse(path):
    with open(os.path.join(ROOT, path)) as f:
        return ast.parse(f.read())


def import_statements(node):
    """The import statements in a syntax tree, those of functions too, but not those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from import_statements(ast.Module(child.orelse, []))
        else:
            yield from import_statements(child)


def imported_modules(path):
    """The dotted names that a file imports; `from a import b` is a.b if that is a file of the project."""
    package = os.path.dirname(path).replace("/", ".")
    for statement in import_statements(parse(path)):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        else:
            origin = ".".join(filter(None, (package if statement.level else "", statement.module)))
            for alias in statement.names:
                name = f"{origin}.{alias.name}"
                yield name if name in FILES else origin


def project_imports(module):
    return {name for name in imported_modules(FILES[module]) if name in FILES and name != module}


def position(module):
    """The line of ORDER that a module belongs to."""
    candidates = [i for i, names in enumerate(ORDER) if module in names.split()]
    return candidates[0] if candidates else ORDER.index(module.split(".")[0])


def test_every_file_has_a_place_in_the_order():
    assert len(FILES) > 30 and {position(module) for module in FILES} == {*range(len(ORDER))}


def test_a_file_imports_only_files_above_it():
    assert not [f"{module} imports {name}" for module in FILES for name in project_imports(module)
                if position(name) > position(module)]


def test_imports_form_no_circle():
    graph = TopologicalSorter({module: project_imports(module) for module in FILES})
    assert {*graph.static_order()} >= {*FILES}                              # raises CycleError at a circle


def test_test_files_import_no_other_test_file():
    for path in python_files("tests/**/*.py", "tests/helpers/*.py"):
        assert not [name for name in imported_modules(path) if name.startswith(("test_", "tests.", "conftest"))], path


def test_no_python_file_is_long():
    paths = [*FILES.values(), *python_files("tests/*.py", "tests/helpers/*.py")]
    lengths = {path: sum(1 for _ in open(os.path.join(ROOT, path))) for path in paths}
    assert not {path: n for path, n in lengths.items() if n > MAX_LINES}


def test_the_checks_of_imports_see_what_they_should(tmp_path, monkeypatch):
    source = """
import kernels.bandwidth
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from data import Batch
def f():
    from tools import show, cli
"""
    (tmp_path / "file.py").write_text(source)
    monkeypatch.setitem(globals(), "ROOT", str(tmp_path))
    assert {*imported_modules("file.py")} == {"kernels.bandwidth", "typing", "tools.show", "tools"}
