"""tools/bench.py without a GPU: its arithmetic by hand, its baselines against what they stand for, its tables run."""

import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

from kernels.bandwidth import bandwidth_ref, rank
from kernels.cosine_distance import cosine_distance_ref
from kernels.density_peaks import density_peaks_ref
from kernels.temporal_density import temporal_density_ref
from masking import cluster_stm
from tools import bench

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(*args):
    return subprocess.run([sys.executable, "-m", "tools.bench", *args], cwd=ROOT, capture_output=True, text=True)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic

def test_work_is_what_one_counts_by_hand():
    cost = bench.work(1024, 196, 768, 8, 29)
    assert cost["whole path"] == (422_962_003_968 + 60_423_143_424, 308_281_344 + 237_568)
    assert cost["temporal_density"] == (422_962_003_968, 308_281_344 + 802_816 + 512)
    assert cost["bandwidth across"] == (12_884_901_888, 50_331_648 + 512)                   # 128 clips, 256 tokens
    found = 1_605_632 + 237_568 + 802_816 + 4096
    assert cost["density_peaks"] == cost["density_peaks, d_c given"] == (60_423_143_424, 308_281_344 + found)
    assert cost["cosine_distance"] == (60_423_143_424, 308_281_344 + 157_351_936)
    assert cost["cluster_argmax"] == (0, 2_408_448 + 237_568)
    assert cost["window_attention"] == (2_774_532_096, 4_816_896 + 616_562_688)


@pytest.mark.parametrize("flops, nbytes, wanted", [(7e11, 1e9, 1.0), (7e11, 8e9, 2.0), (0, 4e6, 0.001)])
def test_the_floor_is_the_slower_of_flops_and_bytes(flops, nbytes, wanted):
    assert bench.floor_ms(flops, nbytes, rate=7e14, bandwidth=4e12) == pytest.approx(wanted)


def test_agreement_of_ids_made_by_hand():
    wanted = torch.tensor([[0, 3, 5], [1, 2, 4]])
    assert bench.agreement(wanted, wanted, 6) == (1.0, 1.0)
    assert bench.agreement(wanted, torch.tensor([[0, 3, 5], [1, 2, 5]]), 6) == pytest.approx((10 / 12, 5 / 6))
    assert bench.agreement(wanted, torch.tensor([[1, 2, 4], [0, 3, 5]]), 6) == (0.0, 0.0)


@pytest.mark.parametrize("B, T, N", [(128, 8, 196), (64, 16, 196), (16, 16, 729), (12, 64, 1024)])
def test_chunks_divide_the_batch_and_stay_small(B, T, N):
    size = bench.chunk(B, T, N)
    assert B % size == 0
    assert size == 1 or size * N * N * T * (T - 1) // 2 * 4 <= 2 << 30
    assert size == B or (B, T, N) not in ((128, 8, 196), (64, 16, 196))
    x = torch.arange(float(B)).view(B, 1)
    assert torch.equal(bench.in_parts(lambda x, y: x + y, size)(x, x), 2 * x)


def test_rows_of_a_table(capsys):
    bench.heading("Title", "a", "b", "c", "d")
    bench.line("name", 0.12345, 1234.5, None)
    assert capsys.readouterr().out == (
        "\n**Title**\n\n| a | b | c | d |\n| --- | --- | --- | --- |\n| name | 0.123 | 1234 |  |\n")
    assert bench.ratio(3.0, 2.0) == 1.5 and bench.ratio("failed", 2.0) is None


def test_one_failure_is_one_cell():
    def fail():
        raise RuntimeError("out of | luck\nand more")
    assert bench.attempt(fail) == "failed: RuntimeError: out of / luck"
    assert bench.attempt(lambda a: a + 1, 1) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Baselines and peers

def dpc_knn_by_hand(x, K, k):
    """One frame x (N, C), no noise."""
    N, C = x.shape
    d = [[(x[i] - x[j]).square().sum().sqrt().item() / C ** 0.5 for j in range(N)] for i in range(N)]
    rho = [-sum(v * v for v in sorted(row)[:k]) / k for row in d]           # its logarithm; the order is the same
    far = max(max(row) for row in d)
    delta = [min([d[i][j] for j in range(N) if rho[j] > rho[i]], default=far) for i in range(N)]
    gamma = [torch.tensor(r).exp().item() * e for r, e in zip(rho, delta, strict=True)]
    centres = sorted(range(N), key=lambda i: -gamma[i])[:K]
    labels = [min(range(K), key=lambda c: d[i][centres[c]]) for i in range(N)]
    for c, i in enumerate(centres):
        labels[i] = c
    return labels, centres


@pytest.mark.parametrize("N, C, K, k", [(12, 5, 4, 5), (9, 3, 9, 3), (7, 4, 1, 7), (30, 8, 6, 5)])
def test_dpc_knn_is_what_loops_find(N, C, K, k):
    x = torch.randn(3, N, C, generator=torch.Generator().manual_seed(N))
    labels, centres = bench.dpc_knn(x, K, k, noise=0)
    for f in range(3):
        assert (labels[f].tolist(), centres[f].tolist()) == dpc_knn_by_hand(x[f].double(), K, k)


def test_the_noise_of_dpc_knn_parts_tokens_that_are_alike():
    torch.manual_seed(0)
    x = torch.zeros(2, 6, 4)
    labels, centres = bench.dpc_knn(x, 3)
    assert all(len(set(row)) == 3 for row in centres.tolist())
    assert all(set(row) == {0, 1, 2} for row in labels.tolist())


@pytest.fixture
def x():
    """Tokens of four clips (4, 3, 14, 64) in bf16: places that recur, each with noise of its own."""
    return bench.features(4, 3, 14, 64, "cpu", torch.bfloat16, 0)


def test_eager_distances_are_the_reference_within_bf16(x):
    frames = x.flatten(0, 1)
    torch.testing.assert_close(bench.eager_distance(frames).double(), cosine_distance_ref(frames.double()),
                               rtol=0, atol=2 ** -8)


def test_eager_bandwidths_are_the_reference_within_bf16(x):
    pairs = rank(0.1, 91), rank(0.1, 3 * 14 * 14)
    for tokens, k in ((x.flatten(0, 1), pairs[0]), (x, pairs[1])):
        torch.testing.assert_close(bench.eager_bandwidth(tokens, k).double(), bandwidth_ref(tokens.double(), 0.1),
                                   rtol=0, atol=2 ** -8)


def test_eager_temporal_density_is_the_reference_within_bf16(x):
    d_c = torch.full((4,), 0.5)
    torch.testing.assert_close(bench.eager_temporal_density(x, d_c).double(),
                               temporal_density_ref(x.double(), d_c.double()), rtol=0, atol=2 ** -6)


@pytest.mark.parametrize("given", [True, False])
def test_eager_clusters_are_the_reference_where_nothing_is_rounded(x, given):
    wide = x.flatten(0, 1).double()
    d_c = torch.full((12,), 0.4).double() if given else bandwidth_ref(wide, 0.1)
    with mock.patch.object(bench, "eager_distance", cosine_distance_ref):
        found = bench.eager_density_peaks(wide, 5, d_c if given else None, rank(0.1, 91))
    for a, b in zip(found, density_peaks_ref(wide, 5, d_c, "exp", "nearest"), strict=True):
        torch.testing.assert_close(a, b)


def test_the_eager_path_keeps_the_reference_s_ids_in_fp32(x):
    wide = x.float()
    found = bench.in_parts(lambda x: bench.eager_keep(x, 5, rank(0.02, 91), rank(0.1, 3 * 14 * 14)), 2)(wide)
    assert torch.equal(found, cluster_stm(wide, 5))


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def test_the_tables_of_a_gpu_run_in_the_interpreter(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them itself")
    args = bench.parse(["kernels", "--device", "cpu", "--shapes", "4,4,8", "--frames", "2", "--skip", "compiled",
                        "teacher"])
    assert bench.gpu_tables(args, "cpu", torch.float16)
    said = capsys.readouterr().out
    timed = [n for n, op in bench.operations(4, 4, 8, 2, 1).items() if op.eager]
    assert len(timed) == 9 and not [n for n in timed if f"| {n} |" not in said]
    assert "failed" not in said and said.count(" yes |") == 9
    cells = [line.count("|") for line in said.splitlines() if line.startswith("|")]
    assert min(cells) >= 4 and "| random | 2 | 2, 4, 8 | the same, given | 100.000 % | 100.000 % |" in said


def test_a_cpu_prints_its_rows_and_says_what_is_missing():
    found = run("kernels", "--device", "cpu", "--shapes", "4,16,24", "--rounds", "2", "--skip", "report")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.strip().splitlines()
    assert lines[-1] == "no GPU here: GPU rows not measured"
    assert lines[0].startswith("CPU, ") and "`python -m tools.bench kernels --device cpu" in lines[0]
    assert "| density_peaks, d_c given | (4, 16, 24), K = 2 |" in found.stdout
    assert "| cluster_stm | (8, 8, 16, 24), K = 2 |" in found.stdout


@pytest.mark.parametrize("args", [["--help"], ["kernels", "--help"]], ids=" ".join)
def test_help(args):
    with pytest.raises(SystemExit) as end:
        bench.parse(args)
    assert end.value.code == 0


@pytest.mark.parametrize("args, said", [
    (["kernels", "--shapes", "4,5"], "F,N,C"), (["kernels", "--shapes", "a,b,c"], "F,N,C"),
    (["kernels", "--device", "cuda", "--shapes", "9,4,8", "--frames", "4"], "F = 9 frames are no clips of T = 4"),
    (["kernels", "--device", "tpu"], "invalid choice"),
])
def test_what_cannot_be_is_refused(args, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse(args)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_the_command_s_help_runs():
    found = run("--help")
    assert found.returncode == 0 and "kernels" in found.stdout


def test_rows_in_a_file_cost_loader_processes_little():
    """In a process of its own: what is forked from this one writes to pages of whatever it holds."""
    said = run("rows", "--rows", "60000", "--workers", "2", "--each", "20000").stdout
    cells = {name: [float(x) for x in re.search(rf"\| {name} \| (.*) \|", said)[1].split("|")]
             for name in ("mapped", "list")}
    assert "60000 rows" in said and "2 processes that read 20000 each" in said
    assert cells["mapped"][2] < 8 < 12 < cells["list"][2]                   # MB that a process wrote
