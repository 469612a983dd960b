"""tools.ablations: what a variant changes, tables of rows made by hand, the command with students that take no time."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
from helpers.ablations import SerialPool, as_json, job, run, shrink
from helpers.runs import ROOT, assert_one_line
from helpers.tables import markdown_tables

from tools import ablations
from tools.ablations import COLUMNS, SHUFFLED_CAPTIONS, Job, ShowCommand, Table
from tools.tables import append_csv, read_csv


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Variants

def flat(values, prefix=""):
    """Nested dicts -> {"a.b": value}."""
    result = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


@pytest.mark.parametrize("full", [False, True], ids=["reduced", "full"])
@pytest.mark.parametrize("name", ablations.TABLES)
def test_each_row_changes_what_it_names_and_nothing_else(name, full):
    table = ablations.TABLES[name]
    base = flat(asdict(Job(table.task, "{}", 2, full).settings()))
    digests = {}
    for title, changes in table.rows.items():
        one = Job.of(table, title, 2, full)
        assert one.shuffled_share == changes.get(SHUFFLED_CAPTIONS, 0) == (0.5 if "mispaired" in name else 0)
        changes = {k.removesuffix(" *"): round(base[k[:-2]] * v) if k.endswith(" *") else v
                   for k, v in changes.items() if k != SHUFFLED_CAPTIONS}
        cfg = flat(asdict(one.settings()))
        assert {k for k in cfg if cfg[k] != base[k]} == {k for k, v in changes.items() if v != base[k]}, title
        assert all(cfg[k] == v for k, v in changes.items()), title
        assert one.digest() not in digests, f"{title} is {digests[one.digest()]} by another name"
        digests[one.digest()] = title
    shared = set.intersection(*(set(row.items()) for row in table.rows.values() if row.get("steps") != 0))
    first = dict(set(next(iter(table.rows.values())).items()) - shared)
    assert Job(table.task, as_json(first), 2, full).settings() == Job(table.task, "{}", 2, full).settings()


def test_the_committed_file_has_all_rows_of_all_tables_but_no_others():
    rows = read_csv(os.path.join(ROOT, "docs", "ablations.csv"), COLUMNS)
    digests = {Job.of(table, title, seed, False).digest() for table in ablations.TABLES.values()
               for title in table.rows for seed in (0, 1, 2)}
    assert {row["settings"] for row in rows} == digests
    assert all(row["settings"] == Job(row["task"], row["variant"], int(row["seed"]), False).digest() for row in rows)


def test_settings_are_those_of_the_form_and_seed(small):
    one = job(seed=3, full=True, mask_ratio=0.5, model_decoder="joint", unmasked_steps=1)
    cfg, folder = one.settings(), one.shared_folder
    assert (cfg.steps, cfg.seed, cfg.mask.ratio, cfg.model.decoder, cfg.unmasked_steps) == (5, 3, 0.5, "joint", 1)
    assert cfg.teacher == f"{folder}/teacher" and cfg.data.video_root == f"{folder}/clips/videos"
    assert job(seed=3).settings().text_encoder == f"{job(seed=3).shared_folder}/text"
    assert job(steps=0).settings().steps == 0


@pytest.mark.parametrize("variant, message", [
    ({"mask.names": "tube"}, "mask.names"), ({"masc.name": "tube"}, "masc.name"), ({"stepps": 3}, "stepps"),
    ({"mask.name": "tub"}, "mask.*tub"), ({"model.decoder_query_ratio": 0}, "decoder_query_ratio.*0"),
    ({"batch": 6}, "batch.*micro_batch.*6.*4"), ({"vit.heads": 3}, "heads.*3"),
])
def test_an_impossible_variant_is_refused_in_one_line(small, variant, message):
    with pytest.raises(ValueError, match=message) as error:
        Job("retrieval", as_json(variant), 0, False).settings()
    assert "\n" not in str(error.value)


def test_the_digest_depends_on_everything_that_the_result_depends_on(small, monkeypatch):
    same = job().digest()
    assert same == job().digest() == job(mask_name="cluster_stm").digest() == job(unmasked_steps=2).digest()
    base = ablations.REDUCED
    for name, value in (("VERSION", -1), ("NUM_TEST", 7), ("NUM_VAL", 7), ("CLIPS", {False: 25, True: 24}),
                        ("WARM_START", {"steps": 4}), ("REDUCED", replace(base, lr=1.0)),
                        ("REDUCED", replace(base, toy=replace(base.toy, lr=1.0))),
                        ("REDUCED", replace(base, vit=replace(base.vit, width=8))),
                        ("REDUCED", replace(base, text=replace(base.text, dropout=0.2)))):
        with monkeypatch.context() as patch:
            patch.setattr(ablations, name, value)
            assert job().digest() != same, name
    others = [job(**c) for c in ({"seed": 1}, {"task": "qa"}, {"full": True}, {"target_pooling": "mean"},
                                 {"mask_ratio": 0.5}, {"mask_pick": "lowest"}, {"steps": 0}, {"unmasked_steps": 1},
                                 {"model_mrm_weight": 0.0}, {SHUFFLED_CAPTIONS: 0.25}, {SHUFFLED_CAPTIONS: 0.5})]
    assert len({same, *(other.digest() for other in others)}) == 1 + len(others)
    qa = job("qa").digest()
    monkeypatch.setitem(ablations.QA_SETTINGS, "steps", 4)
    assert job().digest() == same and job("qa").digest() != qa
    assert job(unmasked_steps=1).digest(unmasked_steps=0) == job().digest(unmasked_steps=0) != job().digest()


# ---------------------------------------------------------------------------------------------------------------------
# Tables of a file written by hand

def entry(one, **values):
    return {**dict.fromkeys(COLUMNS, ""), "form": one.form, "task": one.task, "variant": one.variant,
            "seed": one.seed, "settings": one.digest()} | values


def recalls(name, t2v, v2t):
    return {f"{name} T2V": t2v, f"{name} V2T": v2t}


def write_rows(rows):
    with open("rows.csv", "w", newline="") as f:
        out = csv.DictWriter(f, COLUMNS)
        out.writeheader()
        out.writerows(rows)


def read_rows():
    return read_csv("rows.csv", COLUMNS)


@pytest.fixture
def rows(small, tmp_path, monkeypatch):
    """rows.csv: four seeds of the base, three of another variant; two seeds are common."""
    monkeypatch.chdir(tmp_path)
    rows = [entry(job(seed=s), **recalls("own", t, v), **recalls("after", 50, 50), loss=x, curve=c)
            for s, t, v, x, c in ((0, 10, 12, 0.5, "1:1 2:2 3:4 4:8"), (1, 20, 24, 0.7, "1:3 2:4 3:6 4:16"),
                                  (2, 30, 36, 0.9, "1:5 2:6 3:8 4:0"), (3, 40, 40, 1.1, "1:7 2:8 3:10 4:0"))]
    rows += [entry(job(seed=s, mask_name="random_frame"), **recalls("own", t, v), **recalls("after", 51, 55))
             for s, t, v in ((0, 13, 15), (1, 21, 23), (7, 90, 90))]
    write_rows(rows)
    return rows


def printed(capsys, name="first", **options):
    """The printed table: row title -> column -> cell."""
    ablations.show_tables(ShowCommand((name,), out="rows.csv", **options))
    return {cells[0]: dict(zip(table[0], cells, strict=True)) for table in markdown_tables(capsys.readouterr().out)
            for cells in table[1:]}


def test_tables_have_means_and_differences_over_common_seeds(rows, capsys):
    table = printed(capsys)
    base, other = table["base"], table["other"]
    assert list(table) == ["base", "other"]
    # own: 11, 22, 33, 40: mean 26.5, deviations -15.5 -4.5 6.5 13.5, sqrt(485 / 3) / 2 = 6.36
    assert (base["seeds"], base["own"], base["loss"]) == ("4", "26.5 ± 6.4", "0.80 ± 0.13")
    assert (base["seen at 25 %"], base["seen at 100 %"]) == ("4.0 ± 1.3", "6.0 ± 3.8")
    # own of seeds 0 and 1: 3 and 0 above the base
    assert (other["seeds"], other["loss"], other["own − first"]) == ("3", "", "1.5 ± 1.5")
    assert base["own − first"] == "" and "qa" not in base
    one = printed(capsys, "second")                                         # it shares the base; the rest was not run
    assert one["the same"]["own"] == "26.5 ± 6.4" and one["short"]["seeds"] == "0" and one["short"]["own"] == ""


def test_rows_of_other_settings_are_left_out(rows, capsys, monkeypatch):
    chosen = [rows[0], rows[4]]
    others = [rows[0] | recalls("own", 99, 99) | change for change in ({"settings": "0" * 12}, {"seed": 5})]
    write_rows(others + chosen)
    table = printed(capsys)
    assert (table["base"]["own"], table["other"]["own"], table["other"]["own − first"]) == ("11.0", "14.0", "3.0")
    monkeypatch.setattr(ablations, "REDUCED", replace(ablations.REDUCED, lr=3e-3))
    ablations.show_tables(ShowCommand(out="rows.csv"))
    out = capsys.readouterr().out
    assert re.findall(r"\*\*(\w+): .*\*\*: not run", out) == ["first", "second"]


def test_full_students_and_question_answering_have_their_own_tables(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ablations.TABLES["answers"] = Table("answers", {"base": {}, "short": {"steps": 0}}, "qa")
    write_rows([entry(job(full=True), **recalls("own", 1, 2)), entry(job(), **recalls("own", 3, 4)),
                entry(job("qa"), qa=60, **{"qa by kind": "count:20.0 colour:70.0", "qa seen": 80,
                                           "qa seen by kind": "count:30.0 colour:75.0"}),
                entry(job("qa", steps=0), qa=50, **{"qa by kind": "count:10.0 colour:80.0"})])
    assert printed(capsys)["base"]["own"] == "3.5" and printed(capsys, full=True)["base"]["own"] == "1.5"
    table = printed(capsys, "answers")
    assert table["base"] == {"": "base", "seeds": "1", "qa": "60.0", "count": "20.0", "colour": "70.0",
                             "qa seen": "80.0", "count seen": "30.0", "colour seen": "75.0",
                             "qa − first": "", "qa seen − first": ""}
    assert table["short"]["qa − first"] == "-10.0" and table["short"]["qa seen − first"] == ""


def test_without_the_first_row_there_is_no_difference(rows, capsys):
    write_rows(rows[4:])
    table = printed(capsys)
    assert table["other"]["own"] == "42.0 ± 24.1" and table["other"]["own − first"] == "" == table["base"]["own"]


def test_numbers_are_read_as_they_were_written(tmp_path):
    path = str(tmp_path / "rows.csv")
    values = {**recalls("own", 100.0, 12.890625), **recalls("after", 0.0, 0.0), "loss": 0.123456, "seed": 123456}
    append_csv(path, COLUMNS, values)
    row, = read_csv(path, COLUMNS)
    assert ablations.numbers(row) == {"own": pytest.approx(56.445, abs=1e-3), "after": 0.0, "loss": 0.1235}
    assert row["seed"] == "123456" and row["qa"] == ""


# ---------------------------------------------------------------------------------------------------------------------
# Commands

@pytest.fixture
def pool(monkeypatch):
    """Jobs run in this process and take no time. Records: seeds prepared, (variant, seed) trained, pool sizes."""
    calls = {"prepared": [], "jobs": [], "failing": None, "sizes": []}

    def run_job(one, device, commit):
        calls["jobs"].append((one.variant, one.seed))
        if calls["failing"] and calls["failing"] in one.variant:
            raise RuntimeError("out of luck")
        return entry(one, **recalls("own", 10.0 + one.seed, 10.0 + one.seed), commit=commit, device=device)

    monkeypatch.setattr(SerialPool, "sizes", calls["sizes"])
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", SerialPool)
    monkeypatch.setattr(ablations, "prepare_seed", lambda one, threads: calls["prepared"].append(one.seed))
    monkeypatch.setattr(ablations, "run_job", run_job)
    return calls


def test_rows_of_the_file_are_not_trained_again(small, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "train --out rows.csv --commit c1 --jobs 3 --seeds"
    code, out, err = run(capsys, f"{line} 0 2 --tables first")
    assert code == 0 and "4 students to train, 3 at once" in out and pool["sizes"] == [3], err
    other, short = as_json({"mask.name": "random_frame"}), as_json({"unmasked_steps": 1})
    assert pool["jobs"] == [(v, s) for s in (0, 2) for v in ("{}", other)] and pool["prepared"] == [0, 2]
    first_rows = read_rows()
    assert sorted((r["seed"], r["variant"], r["commit"], r["own T2V"]) for r in first_rows) == sorted(
        (s, v, "c1", t) for s, t in (("0", "10"), ("2", "12")) for v in ("{}", other))
    table = {cells[0]: cells for table in markdown_tables(out) for cells in table}
    assert table["base"][1:3] == table["other"][1:3] == ["2", "11.0 ± 1.0"] and "second" not in out
    del pool["jobs"][:], pool["prepared"][:]
    assert run(capsys, f"{line} 2 1")[0] == 0                               # all tables; a part of seed 2 is there
    assert pool["jobs"] == [(short, 2), *((v, 1) for v in ("{}", other, short))]
    assert pool["prepared"] == [2, 1] and read_rows()[:4] == first_rows
    del pool["jobs"][:], pool["prepared"][:]
    before = read_rows()
    code, out, _ = run(capsys, f"{line} 1 2")
    assert code == 0 and not pool["jobs"] and not pool["prepared"] and "0 students to train" in out
    assert read_rows() == before and "which mask" in out
    assert run(capsys, f"{line} 1 --full")[0] == 0 and len(pool["jobs"]) == 3
    monkeypatch.setattr(ablations, "REDUCED", replace(ablations.REDUCED, lr=3e-3))
    assert run(capsys, f"{line} 1")[0] == 0 and len(pool["jobs"]) == 6


def test_two_names_of_one_variant_are_one_student(small, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ablations.TABLES["third"] = Table("the same once more", {
        "base": {}, "two": {"unmasked_steps": 2, "mask.name": "random_frame"}})
    code, out, err = run(capsys, "train --out rows.csv --seeds 0")
    assert code == 0, err
    assert len(pool["jobs"]) == len({row["settings"] for row in read_rows()}) == 3
    assert [cells[1:3] for table in markdown_tables(out) for cells in table[1:]] == [["1", "10.0"]] * 6


def test_a_student_that_fails_is_named_and_the_others_go_on(small, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pool["failing"] = "random_frame"
    code, out, err = run(capsys, "train --out rows.csv --seeds 0 1")
    assert_one_line("tools.ablations", code, err, r"2 of 6 .*random_frame.* seed [01]: out of luck")
    assert len(read_rows()) == 4 and "10.5 ± 0.5" in out
    pool["failing"] = None
    del pool["jobs"][:]
    assert run(capsys, "train --out rows.csv --seeds 0 1")[0] == 0 and len(pool["jobs"]) == 2
    pool["failing"] = "{"
    code, _, err = run(capsys, "train --out none.csv --seeds 0")            # there is no row for a table
    assert_one_line("tools.ablations", code, err, "3 of 3 .* out of luck")


@pytest.mark.parametrize("line, message", [
    ("train --tables nope", "--tables .*first, second.*'nope'"), ("train --seeds 0 0", r"--seeds .*\(0, 0\)"),
    ("train --seeds -1", r"--seeds .*\(-1,\)"), ("train --seeds", r"--seeds .*\(\)"),
    ("train --jobs -1", "--jobs .*-1"), ("train --out no/where.csv", "--out no/where.csv: .* no$"),
    ("table --tables nope", "--tables .*first, second.*'nope'"), ("table --out nothing.csv", "nothing.csv has no rows"),
    ("table --out other.csv", "other.csv: .*form, task.*seed, form"),
    ("train --out other.csv", "other.csv: .*form, task.*seed, form"),
])
def test_wrong_flags_are_one_line_before_any_work(small, pool, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("seed,form\n1,full\n")
    code, _, err = run(capsys, line if "--out" in line else f"{line} --out rows.csv")
    assert_one_line("tools.ablations", code, err, message)
    assert not pool["jobs"] and not pool["prepared"] and os.listdir() == ["other.csv"]


def test_students_run_in_processes_of_their_own(small, tmp_path, monkeypatch):
    """A worker does not see what is patched here: it finds no clips, and the error comes back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "prepare_seed", lambda one, threads: None)
    append_csv("rows.csv", COLUMNS, entry(job(seed=1), **recalls("own", 1, 1)))
    del ablations.TABLES["first"].rows["other"]
    with pytest.raises(ValueError, match="^1 of 1 .* seed 0: .*out/ablations/r") as error:
        ablations.run_all(ablations.TrainCommand(("first",), out="rows.csv", seeds=(0,), jobs=1, commit="c"))
    assert "\n" not in str(error.value) and len(read_rows()) == 1


WORKER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

if __name__ == "__main__":
    from tools import ablations
    context = get_context("spawn")
    assignments = context.Queue()
    assignments.put((0, "3"))
    with ProcessPoolExecutor(1, context, ablations.init_job_worker, (assignments,)) as pool:
        print(pool.submit(os.getpid).result(), pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_workers_end_when_the_command_is_killed(tmp_path):
    os.makedirs(tmp_path / "out" / "ablations")
    (tmp_path / "run.py").write_text(WORKER)
    with subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT}) as process:
        worker, gpu = map(int, process.stdout.readline().split())
        process.kill()
    assert gpu == 3
    end = time.time() + 20
    with suppress(ProcessLookupError):
        while time.time() < end:
            os.kill(worker, 0)
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        raise AssertionError("a worker outlived the command")
