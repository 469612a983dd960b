"""tools.tables: what is printed, what a CSV file keeps, and which files are refused."""

import multiprocessing
import subprocess

import pytest
from helpers.tables import markdown_tables

from tools import tables

COLUMNS = ("name", "seed", "score", "curve")


def test_numbers_of_a_row_are_rounded_and_none_is_an_empty_cell(capsys):
    tables.print_header("Title", "a", "b", "c", "d")
    tables.print_row("name", 0.12345, 1234.5, None)
    out = capsys.readouterr().out
    assert "**Title**" in out and markdown_tables(out) == [[["a", "b", "c", "d"], ["name", "0.123", "1234", ""]]]


def test_a_failure_becomes_a_cell_of_one_line():
    def fail():
        raise RuntimeError("out of | luck\nand more")
    assert tables.try_or_message(fail) == "failed: RuntimeError: out of / luck"
    assert tables.try_or_message(lambda a: a + 1, 1) == 2


def test_a_mean_has_its_standard_error():
    assert tables.format_mean([]) == "" and tables.format_mean([2.0]) == "2.0"
    assert tables.format_mean([1.0, 3.0]) == "2.0 ± 1.0" and tables.format_mean([1.0, 3.0], 2) == "2.00 ± 1.00"


@pytest.mark.parametrize("status, commit", [("", "abc"), (" M train.py\n", "abc+changes")])
def test_the_commit_says_whether_the_code_is_changed(monkeypatch, status, commit):
    outputs = {"status": status, "rev-parse": "abc\n"}
    monkeypatch.setattr(subprocess, "run", lambda args, **_: subprocess.CompletedProcess(args, 0, outputs[args[1]]))
    assert tables.current_commit() == commit


def test_without_git_the_commit_is_unknown(monkeypatch, capsys):
    def fail(args, **_):
        raise FileNotFoundError("git")
    monkeypatch.setattr(subprocess, "run", fail)
    tables.banner("cpu", "", "tools.mask_stats")
    tables.banner("cpu", "c1", "bench")
    unknown, named = capsys.readouterr().out.splitlines()
    assert "commit unknown, `python -m tools.mask_stats " in unknown and "commit c1, `python -m bench " in named


# ---------------------------------------------------------------------------------------------------------------------
# CSV files

def append_many(path, first):
    for seed in range(first, first + 40):
        tables.append_csv(path, COLUMNS, {"seed": seed, "curve": "1:2.0, 3", "score": 1 / 3, "unknown": 1})


def test_rows_that_two_processes_append_are_all_there(tmp_path):
    path = str(tmp_path / "rows.csv")
    tables.append_csv(path, COLUMNS, {"seed": -1})
    workers = [multiprocessing.get_context("fork").Process(target=append_many, args=(path, seed)) for seed in (0, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    rows = tables.read_csv(path, COLUMNS)
    assert sorted(int(row["seed"]) for row in rows) == list(range(-1, 80)) and {*rows[0]} == {*COLUMNS}
    assert {(row["name"], row["curve"], row["score"]) for row in rows[1:]} == {("", "1:2.0, 3", "0.3333")}


def test_a_missing_file_has_no_rows(tmp_path):
    assert tables.read_csv(str(tmp_path / "rows.csv"), COLUMNS) == []


@pytest.mark.parametrize("content, message", [
    ("name,seed\na,0\n", "rows.csv.*name, seed"), ("name,seed,score,curve,more\n1,1,1,1,1\n", "rows.csv.*more"),
    ("name,seed\n", "rows.csv.*name, seed"), ("curve,score,seed,name\n1,1,1,1\n", "rows.csv.*curve, score"),
    ("name,seed,score,curve\na,0,1,1\nb,0\n", "rows.csv: row 2 .*4"),
    ("name,seed,score,curve\na,0,1,1,2\n", "rows.csv: row 1 .*4"),
], ids=["fewer columns", "more columns", "no rows", "another order", "a short row", "a long row"])
def test_a_file_of_another_form_is_refused_and_stays_as_it_is(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        tables.read_csv(str(path), COLUMNS)
    assert "\n" not in str(error.value) and path.read_text() == content
