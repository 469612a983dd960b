"""bench/kernels.py, operations.py and timing.py without a GPU: costs by hand, baselines beside references, tables."""

from unittest import mock

import pytest
import torch
from helpers.kernels import CUDA
from helpers.runs import assert_one_line, command
from helpers.tables import markdown_tables

from bench import kernels, operations, timing
from kernels.bandwidth import bandwidth_ref, quantile_rank
from kernels.cosine_distance import cosine_distance_ref
from kernels.density_peaks import density_peaks_ref
from kernels.temporal_density import temporal_density_ref
from masking import cluster_stm

COMMANDS = ("all", "smoke", "kernels", "step", "reading", "memory", "compile")

# ---------------------------------------------------------------------------------------------------------------------
# Costs and times


def test_costs_equal_those_counted_by_hand():
    cost = operations.cost_model(1024, 196, 768, 8, 29)
    assert cost["whole path"] == (422_962_003_968 + 60_423_143_424, 308_281_344 + 237_568)
    assert cost["temporal_density"] == (422_962_003_968, 308_281_344 + 802_816 + 512)
    assert cost["bandwidth across"] == (12_884_901_888, 50_331_648 + 512)                   # 128 clips, 256 tokens
    clusters = 1_605_632 + 237_568 + 802_816 + 4096
    assert cost["density_peaks"] == cost["density_peaks, d_c given"] == (60_423_143_424, 308_281_344 + clusters)
    assert cost["cosine_distance"] == (60_423_143_424, 308_281_344 + 157_351_936)
    assert cost["cluster_argmax"] == (0, 2_408_448 + 237_568)
    assert cost["window_attention"] == (2_774_532_096, 4_816_896 + 616_562_688)


@pytest.mark.parametrize("flops, nbytes, ms", [(7e11, 1e9, 1.0), (7e11, 8e9, 2.0), (0, 4e6, 0.001)])
def test_the_roofline_is_the_longer_of_flops_and_bytes(flops, nbytes, ms):
    assert timing.roofline_ms(flops, nbytes, rate=7e14, bandwidth=4e12) == pytest.approx(ms)


def test_a_ratio_needs_two_numbers():
    assert timing.ratio(3.0, 2.0) == 1.5
    assert timing.ratio("failed", 2.0) is timing.ratio(2.0, None) is None


def test_interleaved_functions_take_turns():
    calls = []
    times = timing.time_interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 2, calls=2, warmup=1)
    assert "".join(calls) == "ab" + 2 * "aabb" and len(times) == 2 and min(times) > 0


def test_only_equal_results_are_deterministic():
    x = torch.zeros(3)
    assert timing.is_deterministic(lambda x: (x, x + 1), (x,))
    assert not timing.is_deterministic(lambda x: x.add_(1), (x,))


# ---------------------------------------------------------------------------------------------------------------------
# Baselines

@pytest.mark.parametrize("B, T, N, size", [
    (128, 8, 196, 128), (64, 16, 196, 64), (16, 16, 729, 8), (12, 16, 729, 6), (12, 64, 1024, 1)])
def test_chunks_divide_the_batch_and_fit_2_gib(B, T, N, size):
    assert operations.clips_per_chunk(B, T, N) == size
    x = torch.arange(float(B)).view(B, 1)
    assert torch.equal(operations.chunked(lambda x, y: x + y, size)(x, x), 2 * x)


def dpc_knn_by_loops(x, K, k):
    """DPC-KNN of one frame x (N, C), without noise."""
    N, C = x.shape
    d = [[(x[i] - x[j]).square().sum().sqrt().item() / C ** 0.5 for j in range(N)] for i in range(N)]
    log_rho = [-sum(v * v for v in sorted(row)[:k]) / k for row in d]
    largest = max(max(row) for row in d)
    delta = [min([d[i][j] for j in range(N) if log_rho[j] > log_rho[i]], default=largest) for i in range(N)]
    gamma = [torch.tensor(r).exp().item() * e for r, e in zip(log_rho, delta, strict=True)]
    centres = sorted(range(N), key=lambda i: -gamma[i])[:K]
    labels = [min(range(K), key=lambda c: d[i][centres[c]]) for i in range(N)]
    for c, i in enumerate(centres):
        labels[i] = c
    return labels, centres


@pytest.mark.parametrize("N, C, K, k", [(12, 5, 4, 5), (9, 3, 9, 3), (7, 4, 1, 7), (30, 8, 6, 5)])
def test_dpc_knn_equals_its_definition_by_loops(N, C, K, k):
    x = torch.randn(3, N, C, generator=torch.Generator().manual_seed(N))
    labels, centres = operations.dpc_knn(x, K, k, noise=0)
    for f in range(3):
        assert (labels[f].tolist(), centres[f].tolist()) == dpc_knn_by_loops(x[f].double(), K, k)


def test_noise_of_dpc_knn_separates_equal_tokens():
    torch.manual_seed(0)
    labels, centres = operations.dpc_knn(torch.zeros(2, 6, 4), 3)
    assert all(len(set(row)) == 3 for row in centres.tolist())
    assert all(set(row) == {0, 1, 2} for row in labels.tolist())


@pytest.fixture
def x():
    """Tokens of four clips (4, 3, 14, 64) in bf16; half of each token is the same in all frames."""
    return operations.features(4, 3, 14, 64, "cpu", torch.bfloat16, 0)


def test_eager_distances_equal_the_reference_within_bf16(x):
    frames = x.flatten(0, 1)
    torch.testing.assert_close(operations.eager_distance(frames).double(), cosine_distance_ref(frames.double()),
                               rtol=0, atol=2 ** -8)


def test_eager_bandwidths_equal_the_reference_within_bf16(x):
    ranks = quantile_rank(0.1, 91), quantile_rank(0.1, 3 * 14 * 14)
    for tokens, rank in ((x.flatten(0, 1), ranks[0]), (x, ranks[1])):
        torch.testing.assert_close(operations.eager_bandwidth(tokens, rank).double(),
                                   bandwidth_ref(tokens.double(), 0.1), rtol=0, atol=2 ** -8)


def test_eager_temporal_density_equals_the_reference_within_bf16(x):
    d_c = torch.full((4,), 0.5)
    torch.testing.assert_close(operations.eager_temporal_density(x, d_c).double(),
                               temporal_density_ref(x.double(), d_c.double()), rtol=0, atol=2 ** -6)


@pytest.mark.parametrize("given", [True, False])
def test_eager_clusters_equal_the_reference_without_rounding(x, given):
    wide = x.flatten(0, 1).double()
    d_c = torch.full((12,), 0.4).double() if given else bandwidth_ref(wide, 0.1)
    with mock.patch.object(operations, "eager_distance", cosine_distance_ref):
        result = operations.eager_density_peaks(wide, 5, d_c if given else None, quantile_rank(0.1, 91))
    for a, b in zip(result, density_peaks_ref(wide, 5, d_c, "exp", "nearest"), strict=True):
        torch.testing.assert_close(a, b)


def test_the_eager_path_gives_the_ids_of_cluster_stm_in_fp32(x):
    wide, ranks = x.float(), (quantile_rank(0.02, 91), quantile_rank(0.1, 3 * 14 * 14))
    ids = operations.chunked(lambda x: operations.eager_keep(x, 5, *ranks), 2)(wide)
    assert torch.equal(ids, cluster_stm(wide, 5, quantile=0.02, quantile_time=0.1))


# ---------------------------------------------------------------------------------------------------------------------
# Tables and commands

def test_agreement_of_ids_made_by_hand():
    ids = torch.tensor([[0, 3, 5], [1, 2, 4]])
    assert kernels.agreement(ids, ids, 6) == (1.0, 1.0)
    assert kernels.agreement(ids, torch.tensor([[0, 3, 5], [1, 2, 5]]), 6) == pytest.approx((10 / 12, 5 / 6))
    assert kernels.agreement(ids, torch.tensor([[1, 2, 4], [0, 3, 5]]), 6) == (0.0, 0.0)


@pytest.mark.skipif(CUDA, reason="python -m bench kernels runs them on a GPU")
def test_tables_of_a_gpu_run_in_the_interpreter(capsys):
    cfg = kernels.Config(device="cpu", shapes=((4, 4, 8),), frames=(2,), skip=("compiled", "teacher"))
    assert kernels.gpu_tables(cfg, "cpu", torch.float16)
    out = capsys.readouterr().out
    path, calls, agreement, clusterings = markdown_tables(out)
    timed = [name for name, op in operations.operations(4, 4, 8, 2, 1).items() if op.eager]
    assert [row[0] for row in path[1:]] == timed and len(timed) == 9 and "failed" not in out
    for row in path[1:]:
        assert min(map(float, row[2:7])) >= 0 and len(row) == len(path[0]) and "yes" in row[-1]
    assert len(calls) == 1                                                      # both calls are left out
    assert {tuple(row[3:]) for row in agreement[1:]} == {("100.000 %", "100.000 %")} and len(agreement) == 3
    assert float(clusterings[1][2]) == 1 and "not installed" in clusterings[3][1]


def test_a_kernel_that_fails_or_varies_is_reported(capsys):
    def fail(x):
        raise RuntimeError("out of luck")

    counter = iter(range(100))
    for kernel, good, cell in ((torch.clone, True, "yes"), (lambda x: x + next(counter), False, "NO"),
                               (fail, False, "failed: RuntimeError: out of luck")):
        op = operations.Operation("name", 1, 1, lambda *_: (torch.zeros(2),), kernel)
        cfg = kernels.Config(skip=("eager", "compiled"))
        assert kernels.operation_row(cfg, op, "", (1.0, 1.0), "cpu", torch.float32) == good
        assert cell in capsys.readouterr().out


def test_a_cpu_times_the_references_and_names_what_is_missing(capsys):
    code, out, err = command("bench", "kernels --device cpu --shapes 4 16 24 --rounds 2 --skip report".split(), capsys)
    assert code == 0, err
    assert out.strip().splitlines()[-1] == kernels.NO_GPU
    (_, clusters, path, selector), = markdown_tables(out)
    assert "(4, 16, 24)" in clusters[1] and float(clusters[4]) == pytest.approx(
        float(clusters[3]) / float(clusters[2]), rel=0.02)
    assert all("(8, 8, 16, 24)" in row[1] and float(row[2]) > 0 for row in (path, selector))


def test_the_report_of_a_cpu_is_that_of_compile(capsys):
    with mock.patch.object(kernels.compile_report, "main") as report, mock.patch.object(kernels, "cpu_tables"):
        kernels.main(kernels.Config(device="cpu", commit="abc"))
    assert report.call_args.args[0].commit == "abc" and "commit abc" in capsys.readouterr().out


def test_defaults_depend_on_the_device(monkeypatch):
    cfg = kernels.fill_defaults(kernels.Config(device="cpu"))
    assert (cfg.device, cfg.shapes) == ("cpu", (kernels.CPU_SHAPE,))
    monkeypatch.setattr(kernels, "select_device", lambda name: torch.device("cuda", 0))
    cfg = kernels.fill_defaults(kernels.Config())
    assert (cfg.device, cfg.shapes, cfg.frames) == ("cuda", kernels.SHAPES, (8, 4, 16))
    cfg = kernels.fill_defaults(kernels.Config(quick=True))
    assert (cfg.shapes, cfg.frames) == (kernels.SHAPES[:1], (8,))
    for frames in (4, 1):
        with pytest.raises(ValueError, match=f"--frames.* {frames} .*F = 9"):
            kernels.fill_defaults(kernels.Config(shapes=((9, 4, 8),), frames=(frames,)))


@pytest.mark.parametrize("flags, message", [
    ("kernels --shapes 4 5", "--shapes"), ("kernels --shapes a b c", "--shapes"), ("kernels --device tpu", "tpu"),
    ("kernels --skip all", "all"), ("rows", "rows"), ("", "subcommand"),
])
def test_wrong_flags_end_with_one_message(flags, message, capsys):
    code, _, err = command("bench", flags.split(), capsys)
    assert code == 2
    assert_one_line("bench", code, err, message)


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    code, _, err = command("bench", ["kernels", "--device", "cuda"], capsys)
    assert_one_line("bench", code, err, "cuda")


@pytest.mark.parametrize("args", [[], *([name] for name in COMMANDS)], ids=str)
def test_help(args, capsys):
    code, out, _ = command("bench", [*args, "--help"], capsys)
    assert code == 0
    assert all(name in out for name in ([] if args else COMMANDS)) and out.startswith("usage: python -m bench")
