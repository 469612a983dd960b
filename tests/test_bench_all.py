"""bench/all.py with short commands for its items, bench/smoke.py and `bench kernels --teacher` in the interpreter."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import parse
from helpers.kernels import CUDA, DEVICE
from helpers.runs import ROOT, assert_one_line, command, run_main
from helpers.tables import markdown_tables

import runtime
from bench import all as bench_all
from bench import kernels, smoke
from bench.all import Config, Item

TABLE = "print('**Times**\\n\\n| what | ms |\\n| --- | --- |\\n| one | 1.5 |\\n| two | 20 |')"
FIGURE = (("two", ("what", "ms")),)


def python(code, name="item", share=1.0, least=0.0, **fields):
    """An item that runs Python code."""
    return Item(name, share, least, f"{{python}} -c {shlex.quote(code)}", **fields)


def count(name, then=""):
    """Python code that adds a line to a file, which counts the runs, and then runs `then`."""
    return f"open('{name}.count', 'a').write('.'); {then}"


def runs_of(name):
    """How often the item whose code is count(name) has run."""
    return os.path.getsize(f"{name}.count") if os.path.exists(f"{name}.count") else 0


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """In an empty folder, without a GPU: bench(items, flags) runs the items -> exit code, lines, error, report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_all, "ON_GPU", ())

    def run(items, flags="--budget 100", commit="c1"):
        monkeypatch.setattr(bench_all, "ON_CPU", tuple(items))
        cfg = parse(f"-m bench all {flags} --commit {commit}")[1]
        code, out, err = run_main(lambda: runtime.run_cli("bench", lambda: bench_all.main(cfg)),
                                  ["bench", "all", *flags.split()], capsys)
        with open("out/bench/report.json") as f:
            report = json.load(f)
        report["items"] = {item["name"]: item for item in report["items"]}
        return SimpleNamespace(code=code, lines=out.splitlines(), err=err, report=report, items=report["items"],
                               page=open("out/bench/report.md").read())

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Items, their results and the report

def test_items_run_in_order_and_the_report_has_their_tables(bench):
    result = bench([python(TABLE, "b", figures=FIGURE),
                    python("print('Ceilings: 700 Tflop/s'); print('3 passed')", "a")])
    assert result.code == 0, result.err
    assert [line.split(":")[0] for line in result.lines[1:3]] == ["b", "a"]
    assert all(word in result.lines[1] for word in ("ok", "two", "20")) and "3 passed" in result.lines[2]
    assert [item["rc"] for item in result.items.values()] == [0, 0]
    table, = result.items["b"]["tables"]
    assert table == {"title": "Times", "columns": ["what", "ms"], "rows": [["one", 1.5], ["two", 20]]}
    outcomes, times = markdown_tables(result.page)
    assert [row[:2] for row in outcomes[1:]] == [["b", "ok"], ["a", "ok"]]
    assert times == [["what", "ms"], ["one", "1.5"], ["two", "20"]] and "Ceilings: 700 Tflop/s" in result.page
    for fact in ("commit c1", f"torch {torch.__version__}", "`python -m bench all --budget 100`"):
        assert fact in result.page and fact in result.lines[0]
    assert result.report["torch"] == torch.__version__ and result.report["commit"] == "c1"
    assert sys.executable not in result.page                                # a report names no path of the machine
    assert os.path.getsize("out/bench/a.log") > 0


def test_a_failed_item_does_not_end_the_others_but_the_exit_code_is_1(bench):
    code = f"import sys; {TABLE}; sys.stdout.flush(); sys.exit('out of luck')"
    result = bench([python(code, "bad", figures=FIGURE), python("print(1)", "good")])
    assert result.code == 1 and "Traceback" not in result.err
    assert_one_line("bench", result.code, result.err, r"bad \(failed\)")
    assert (result.items["bad"]["status"], result.items["bad"]["rc"]) == ("failed", 1)
    assert "out of luck" in result.lines[1] and "1.5" not in result.lines[1]
    assert result.items["good"]["status"] == "ok" and "out of luck" in result.page.split("## bad")[1]
    assert len(markdown_tables(result.page)) == 2                           # what it had measured is in the report


def test_an_item_that_takes_too_long_is_ended_with_its_children(bench):
    child = "import time\nwhile True: open('beat', 'a').write('.'); time.sleep(0.05)"
    code = (f"import subprocess, sys, time; {TABLE}; sys.stdout.flush(); "
            f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)")
    start = time.perf_counter()
    result = bench([python(code, "slow", figures=FIGURE), python("print(1)", "next")], "--budget 4")
    assert time.perf_counter() - start < 30 and result.code == 1 and "slow (cut off)" in result.err
    slow = result.items["slow"]
    assert slow["rc"] is None and 1.9 < slow["limit"] <= 2 <= slow["seconds"] + 0.1 < 8
    assert slow["tables"][0]["rows"] == [["one", 1.5], ["two", 20]] and result.items["next"]["status"] == "ok"
    beats = os.path.getsize("beat")
    time.sleep(0.4)
    assert beats == os.path.getsize("beat") > 0


def test_an_item_without_output_or_without_its_table_claims_no_figure(bench):
    result = bench([python("import time; time.sleep(60)", "slow", figures=FIGURE, share=0.01),
                    python("", "silent"), python("print('no table today')", "bare", figures=FIGURE)])
    assert result.items["silent"]["figure"] == "no output" and result.items["bare"]["figure"] == "no table today"
    assert "longer" in result.items["slow"]["figure"]


def test_what_an_item_needs_is_looked_for_when_its_turn_comes(bench):
    result = bench([python("import os; os.mkdir('made')", "maker"), python("print('found')", "user", needs="made"),
                    python("", "folder", needs="out/nowhere"), python("", "program", needs="no-such-program"),
                    python("print('has it')", "module", needs="pytest")])
    assert result.code == 0
    assert [result.items[name]["status"] for name in ("user", "folder", "program", "module")] == [
        "ok", "not measured", "not measured", "ok"]
    assert "no-such-program" in result.items["program"]["figure"] and result.items["program"]["seconds"] is None


def test_only_some_items_run_if_asked(bench):
    items = [python(count(name), name) for name in ("smoke", "step")]
    result = bench(items, "--only step")
    assert (runs_of("smoke"), runs_of("step")) == (0, 1)
    assert result.items["smoke"]["status"] == "not measured" and "--only" in result.items["smoke"]["figure"]


# ---------------------------------------------------------------------------------------------------------------------
# The budget

@pytest.fixture
def clock(monkeypatch):
    """A clock of which each item takes what clock(seconds by name) says; it collects (name, limit)."""
    now, limits = [1000.0], []

    def set_up(seconds):
        def run_item(item, cfg, commit, limit):
            limits.append((item.name, pytest.approx(limit)))
            now[0] += min(limit, seconds.get(item.name, 0))
            return {"name": item.name, "status": "ok"}
        monkeypatch.setattr(bench_all, "run_item", run_item)
        monkeypatch.setattr(bench_all.time, "monotonic", lambda: now[0])
        return limits
    return set_up


@pytest.mark.parametrize("seconds, expected", [
    ({"a": 25, "b": 25, "c": 50}, [("a", 25), ("b", 25), ("c", 50)]),
    ({"a": 1000, "b": 1000, "c": 1000}, [("a", 25), ("b", 25), ("c", 50)]),     # no item takes another's time
    ({"a": 1}, [("a", 25), ("b", 33), ("c", 99)]),                              # what one leaves, later ones have
], ids=["as planned", "too slow", "quick"])
def test_each_item_has_its_share_of_the_time_that_is_left(clock, seconds, expected):
    limits = clock(seconds)
    items = [Item("a", 1, 0, ""), Item("b", 1, 0, ""), Item("c", 2, 0, "")]
    results = [*bench_all.run_items(Config(), "c1", items, {}, 1100.0)]
    assert limits == expected and len(results) == 3


def test_an_item_with_less_than_its_least_time_is_skipped_and_leaves_it_to_others(clock):
    limits = clock({"a": 40, "d": 10})
    items = [Item("a", 2, 0, ""), Item("b", 1, 21, ""), Item("d", 1, 20, ""), Item("c", 1, 50, "")]
    results = {r["name"]: r for r in bench_all.run_items(Config(), "c1", items, {}, 1100.0)}
    assert limits == [("a", 40), ("d", 30), ("c", 50)]                      # b would have 20
    assert results["b"]["status"] == "skipped" and results["b"]["seconds"] is None
    assert "20 s" in results["b"]["figure"] and "21" in results["b"]["figure"]


def test_items_that_are_done_or_not_asked_for_take_no_share(clock):
    limits = clock({})
    items = [Item(name, 1, 0, name) for name in ("smoke", "kernels", "step", "demo")]
    earlier = {name: {"name": name, "status": status, "command": name} for name, status in (
        ("smoke", "ok"), ("kernels", "failed"))}
    [*bench_all.run_items(Config(only=("smoke", "kernels", "step")), "c1", items, earlier, 1100.0)]
    assert limits == [("kernels", 50), ("step", 100)]


def test_a_budget_too_small_for_every_item_is_an_error(bench):
    result = bench([python("print(1)", least=50)], "--budget 20")
    assert_one_line("bench", result.code, result.err, "--budget.* 20")
    assert result.items["item"]["status"] == "skipped" and result.items["item"]["seconds"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Going on

def test_what_ended_well_is_not_run_again_unless_asked(bench):
    items = [python(count("a", TABLE), "smoke", figures=FIGURE), python(count("b", "raise SystemExit(1)"), "step")]
    first = bench(items)
    again = bench(items)
    assert (runs_of("a"), runs_of("b")) == (1, 2) and first.code == again.code == 1
    assert "earlier" in again.lines[1] and "20" in again.lines[1] and "earlier" not in first.lines[1]
    assert again.items["smoke"]["tables"] == first.items["smoke"]["tables"] and "| two | 20 |" in again.page
    bench(items, "--again")
    assert (runs_of("a"), runs_of("b")) == (2, 3)
    other = bench(items, "--only smoke")                                    # the failed one did not run this time
    assert (runs_of("a"), runs_of("b"), other.code) == (2, 3, 0) and other.items["step"]["status"] == "failed"


@pytest.mark.parametrize("change", ["commit", "device", "torch", "source", "command"])
def test_results_of_another_machine_commit_source_or_command_are_not_kept(bench, monkeypatch, change):
    items = [python(count("a"), "a"), python(count("b"), "b")]
    bench(items)
    if change == "device":
        monkeypatch.setattr(bench_all, "num_cpus", lambda: 99)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif change == "source":
        open("new.py", "w").close()
    elif change == "command":
        items[0] = python(count("a", "print(2)"), "a")
    result = bench(items, commit="c2" if change == "commit" else "c1")
    assert (runs_of("a"), runs_of("b")) == (2, 1 if change == "command" else 2)
    assert change == "command" or change in result.lines[1] and "anew" in result.lines[1]


MAIN = """
import signal, torch
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell has background processes ignore it
torch.cuda.is_available = lambda: False
import runtime
from bench import all
all.ON_GPU = ()
all.ON_CPU = tuple(all.Item(name, 1, 0, "{python} -c " + code) for name, code in (("a", %r), ("b", %r), ("c", "''")))
runtime.run_cli("bench", lambda: all.main(all.Config(commit="c1", budget=400)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_run_that_is_killed_loses_nothing_that_ended(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    endless = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nos.rename('pid', 'started')\ntime.sleep(300)"
    sources = count("a", TABLE), count("b", f"\n{endless}")
    start = lambda b: subprocess.Popen(
        [sys.executable, "-c", MAIN % (shlex.quote(sources[0]), shlex.quote(b))], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    process = start(sources[1])
    deadline = time.monotonic() + 60
    while not os.path.exists("started"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    item = int(open("started").read())
    state = json.load(open("out/bench/state.json"))["items"]
    assert process.returncode and state["a"]["status"] == "ok" and "a: ok" in out
    report = {i["name"]: i for i in json.load(open("out/bench/report.json"))["items"]}
    assert report["a"]["tables"] and report["c"]["status"] == "not measured" and report["c"]["seconds"] is None
    if number == signal.SIGKILL:
        os.kill(item, signal.SIGKILL)                                       # nobody else could
    else:
        assert_one_line("bench", process.returncode, err, "stopped")
        assert report["b"]["status"] == "stopped"
        with pytest.raises(ProcessLookupError):
            os.kill(item, 0)
    process = start(count("b"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (runs_of("a"), runs_of("b")) == (1, 2) and "earlier" in out


# ---------------------------------------------------------------------------------------------------------------------
# The items themselves

ALL_ITEMS = [*bench_all.ON_GPU, *bench_all.EXHAUSTIVE, *bench_all.ON_CPU]


@pytest.mark.parametrize("item", ALL_ITEMS, ids=lambda item: item.name)
def test_commands_parse_and_name_files_that_exist(item, tmp_path):
    line = bench_all.make_command(item, Config(umt=str(tmp_path)), "c1")
    assert sys.executable in line and not any("{" in word for word in line)
    _, flag, name, *args = line[line.index(sys.executable):]
    if flag == "-c":
        compile(name, "command", "exec")
        return
    if name == "pytest":
        assert all(os.path.isfile(os.path.join(ROOT, word)) for word in args if word.endswith(".py"))
        marker = args[args.index("-m") + 1]
        assert marker in ("gpu", "exhaustive_gpu")
        return
    _, cfg = parse(shlex.join(["-m", name, *args]))
    assert name == "tools.demo" or cfg.commit == "c1"
    assert item.name != "step" or "--device" in args or cfg.umt == str(tmp_path)


def test_shares_are_of_the_whole_and_the_default_budget_is_enough_for_every_item():
    for items in (bench_all.ON_GPU, bench_all.ON_CPU):
        assert sum(item.share for item in items) == pytest.approx(1)
        assert all(Config().budget * item.share >= item.least for item in items)
        assert len({item.name for item in items}) == len(items)
    assert [item.name for item in bench_all.ON_GPU] == [
        "smoke", "kernels", "profile", "step", "demo", "agreement", "changes", "tests", "sweep"]


def test_without_a_gpu_what_needs_one_is_named_as_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_all, "run_command", lambda command, log, limit, environment: (
        open(log, "w").write(f"TRITON_INTERPRET={environment.get('TRITON_INTERPRET')}"), ("ok", 0))[1])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bench_all.main(Config(commit="c1", exhaustive=True))
    out = capsys.readouterr().out
    items = {item["name"]: item for item in json.load(open("out/bench/report.json"))["items"]}
    for name in ("profile", "demo", "tests", "sweep", "exhaustive tests", "large tests"):
        assert (items[name]["status"], items[name]["figure"]) == ("not measured", "no GPU here") and name in out
        assert items[name]["seconds"] is None and not items[name]["tables"]
    interpreted = {name for name, item in items.items() if item["figure"] == "TRITON_INTERPRET=1"}
    assert interpreted == {"smoke"} and items["compile"]["figure"] == "TRITON_INTERPRET=None"


def test_on_a_gpu_every_item_runs_and_the_report_names_the_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.1\n"))
    monkeypatch.setattr(bench_all, "is_missing", lambda needs: needs == "ncu")
    seen = []
    monkeypatch.setattr(bench_all, "run_command", lambda command, log, limit, environment: (
        seen.append(environment), open(log, "w").close(), ("ok", 0))[2])
    bench_all.main(Config(commit="c1"))
    items = json.load(open("out/bench/report.json"))["items"]
    assert [item["status"] for item in items] == ["ok", "ok", "not measured", *["ok"] * 6]
    assert "no GPU" not in capsys.readouterr().out and "NVIDIA H100, driver 580.1" in open("out/bench/report.md").read()
    for environment in seen:
        assert "TRITON_INTERPRET" not in environment
        assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "out" / "bench" / "cache" / "triton")


@pytest.mark.parametrize("flags, message", [
    ("--budget 0", "--budget.* 0"), ("--budget -5", "--budget.* -5"), ("--umt nowhere", "--umt.*nowhere"),
    ("--only speed", "--only.*smoke.*speed")])
def test_wrong_flags_end_with_one_message(flags, message, capsys):
    code, _, err = command("bench", ["all", *flags.split()], capsys)
    assert_one_line("bench", code, err, message)


# ---------------------------------------------------------------------------------------------------------------------
# The tests of a GPU

def collect(*args):
    """The tests that pytest finds in the files of the item `tests`."""
    files = [path for path in bench_all.KERNEL_TESTS.split() if not path.endswith("test_step.py")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *args, *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {line for line in run.stdout.splitlines() if "::" in line}


def test_a_gpu_runs_a_few_tests_of_each_kernel_and_the_rest_if_asked():
    gpu, exhaustive, everything = collect("-m", "gpu"), collect("-m", "exhaustive_gpu"), collect()
    assert gpu | exhaustive == everything and not gpu & exhaustive
    files = {name.split("::")[0] for name in everything}
    assert {name.split("::")[0] for name in gpu} == files and 30 < len(gpu) < len(exhaustive) / 4
    large = {name for name in everything if "2_to_the_31" in name}
    assert len(large) >= 6 and not large & gpu                              # 21 GB each


@pytest.mark.skipif(CUDA, reason="on a GPU the interpreter is not used")
def test_a_version_whose_interpreter_is_broken_is_refused_at_the_start():
    code = ("import pytest, sys, triton; triton.__version__ = '3.6.0'; "
            "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/helpers']))")     # without tests
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line, = run.stderr.strip().splitlines()
    assert run.returncode == pytest.ExitCode.USAGE_ERROR and "Triton 3.6.0" in line


# ---------------------------------------------------------------------------------------------------------------------
# Reading tables

def test_tables_are_read_with_titles_empty_cells_and_lines_between_the_rows():
    text = """| not a table |
**First**

| a | b |
| --- | --- |
/site/layers.py:49: FutureWarning: a | b
  warnings.warn(f"| c | d |")
| 1 |  |
| 2 | x, y |
| too | many | cells |

words
|a|b|c|
|---|---|---|
|| 3 % | |
**A title alone**
"""
    first, second = bench_all.read_tables(text)
    assert first == {"title": "First", "columns": ["a", "b"], "rows": [["1", ""], ["2", "x, y"]]}
    assert second == {"title": "", "columns": ["a", "b", "c"], "rows": [["", "3 %", ""]]}
    assert bench_all.read_tables("") == bench_all.read_tables("no table\n| alone |\n") == []


@pytest.mark.parametrize("cell, value", [
    ("3", 3), ("-14", -14), ("0.867", 0.867), ("1e-05", 1e-5), ("18.7 %", "18.7 %"), ("", ""), ("yes", "yes"),
    ("1024, 196", "1024, 196")])
def test_cells_with_numbers_are_numbers(cell, value):
    assert bench_all.as_number(cell) == value and type(bench_all.as_number(cell)) is type(value)


def test_the_details_of_ncu_are_read():
    text = """==PROF== Profiling "density_peaks_kernel": 0%....50%....100% - 20 passes
  density_peaks_kernel (132, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    Metric Name             Metric Unit Metric Value
    Elapsed Cycles                cycle    3,334,379
    DRAM Throughput                   %        15.04
    Duration                         ms         1.70
    Issue Slots Busy               %        26.71
    Registers Per Thread             register/thread             255
    Local Memory Spilling Requests                           69,760

  bandwidth_kernel (128, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us       204.10
"""
    table, = bench_all.read_profile(text)
    first, second = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
    assert (first["kernel"], first["Duration"]) == ("density_peaks_kernel", "1.70 ms")
    assert (first["Issue Slots Busy"], first["DRAM Throughput"]) == ("26.71 %", "15.04 %")
    assert first["Local Memory Spilling Requests"] == "69,760" and first["Registers Per Thread"].startswith("255 ")
    assert (second["kernel"], second["Duration"], second["DRAM Throughput"]) == ("bandwidth_kernel", "204.10 us", "")
    assert bench_all.read_profile("==ERROR== no permission") == []


# ---------------------------------------------------------------------------------------------------------------------
# bench smoke

@pytest.fixture
def few_shapes(monkeypatch):
    """One small shape, on either device."""
    shapes = ((2, 2, 11, 8, torch.float16),)
    monkeypatch.setattr(smoke, "CPU_SHAPES", shapes)
    monkeypatch.setattr(smoke, "GPU_SHAPES", shapes)


def test_smoke_passes_and_has_every_kernel(few_shapes, capsys):
    code, out, err = command("bench", "smoke --repetitions 1".split(), capsys)
    assert code == 0, err
    rows = [row for table in markdown_tables(out) for row in table[1:]]
    assert {row[-1] for row in rows} == {"yes"} and out.strip().splitlines()[-1].startswith(f"all {len(rows)} checks")
    for name in ("cosine_distance", "bandwidth within", "bandwidth across", "density_peaks", "cluster_argmax",
                 "temporal_density, d_c 0.3", "temporal_density, d_c 0.001", "kept ids", "window_attention"):
        assert any(row[0].startswith(name) for row in rows), name


def one_wrong(function, change):
    """The function, with a change to its first result."""
    def wrong(*args, **kwargs):
        out = function(*args, **kwargs)
        first, *rest = out if isinstance(out, tuple) else (out,)
        return (change(first.clone()), *rest) if isinstance(out, tuple) else change(first.clone())
    return wrong


def set_element(value):
    def change(x):
        x.view(-1)[1] = value
        return x
    return change


CHECKS = {              # the part of smoke that calls a kernel, on clips x; K = 3
    "distances": smoke.check_distances, "clusters": lambda checks, x: smoke.check_clusters(checks, x, 3),
    "temporal": smoke.check_temporal_density, "path": lambda checks, x: smoke.check_path(checks, x, 3, 1),
    "window": lambda checks, x: smoke.check_window_attention(checks, DEVICE, torch.float16),
}


@pytest.mark.parametrize("part, name, change, check", [
    ("distances", "cosine_distance_triton", set_element(0.5), "cosine_distance"),
    ("distances", "cosine_distance_triton", set_element(torch.nan), "cosine_distance"),
    ("distances", "bandwidth_triton", lambda d: d * 1.01, "bandwidth within"),
    ("clusters", "density_peaks_triton", lambda labels: labels.flip(1), "density_peaks, centres"),
    ("clusters", "cluster_argmax_triton", lambda best: best.flip(1), "cluster_argmax"),
    ("temporal", "temporal_density_triton", lambda tau: tau + 0.01, "temporal_density"),
    ("temporal", "temporal_density_triton", set_element(torch.nan), "temporal_density"),
    ("window", "window_attention_triton", lambda out: out + 0.1, "window_attention"),
    ("path", "run_path", lambda ids: ids * 0, "kept ids"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_smoke_finds_a_kernel_that_is_wrong(monkeypatch, capsys, part, name, change, check):
    x, good, bad = smoke.draw_clips(1, 2, 11, 8, torch.float16, DEVICE), smoke.Checks(), smoke.Checks()
    CHECKS[part](good, x)
    monkeypatch.setattr(smoke, name, one_wrong(getattr(smoke, name), change))
    CHECKS[part](bad, x)
    assert not good.failed and bad.failed and all(name.startswith(check) for name in bad.failed)
    assert good.count == bad.count and capsys.readouterr().out.count("| NO |") == len(bad.failed)


def test_smoke_finds_a_result_that_is_not_repeated(few_shapes, monkeypatch, capsys):
    turns = iter(range(100))
    run = smoke.run_path
    monkeypatch.setattr(smoke, "run_path", lambda x, K: run(x, K) + (next(turns) == 2))
    with pytest.raises(ValueError, match="^1 of 12 checks .*same bits[^\n]*$"):
        smoke.main(smoke.Config(repetitions=2))
    assert "1 of 2 times" in capsys.readouterr().out


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_and_the_interpreter_the_error_is_one_line(monkeypatch, first_run, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    for line in ("smoke", f"kernels --teacher {first_run}/out/first/teacher"):
        code, _, err = command("bench", line.split(), capsys)
        assert_one_line("bench", code, err, "TRITON_INTERPRET")


# ---------------------------------------------------------------------------------------------------------------------
# bench kernels --teacher

def test_ids_agree_on_the_features_of_a_trained_teacher(first_run, capsys):
    code, out, err = command("bench", f"kernels --clips 2 --teacher {first_run}/out/first/teacher".split(), capsys)
    assert code == 0, err
    (_, *rows), = markdown_tables(out)
    assert len(rows) == 4 and len({tuple(row[2:4]) for row in rows}) == 4
    for clips, shape, _, _, tokens, ids in rows:
        assert (clips, shape) == ("2", "8, 16, 16")                         # 16 x 16 pixels in patches of 4
        for share in (tokens, ids):
            assert 75 < float(share.removesuffix(" %")) <= 100


def test_features_are_those_of_the_teacher(first_run):
    teacher = kernels.SigLIP.from_pretrained(f"{first_run}/out/first/teacher")
    x = kernels.teacher_features(f"{first_run}/out/first/teacher", 2, "cpu", torch.float32)
    frame = torch.from_numpy(kernels.render(0, "test", 1).frames[3]).permute(2, 0, 1)[None]
    expected, _ = teacher.encode_image(teacher.normalize(frame, teacher.patch_grid))
    torch.testing.assert_close(x[1, 3], expected[0])


def test_a_teacher_that_is_not_there_is_one_line(capsys):
    code, _, err = command("bench", "kernels --teacher nowhere".split(), capsys)
    assert_one_line("bench", code, err, "nowhere")
