"""window_attention against the definition, one token and one neighbour at a time in fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from helpers.kernels import DEVICE, DTYPES, LOW, low, needs_cuda, seeded

from kernels.window_attention import window_attention, window_attention_ref, window_attention_triton

pytestmark = pytest.mark.usefixtures("poison_empty")

# grid, H, D, F: corners only, borders only, one inside, ragged; heads of 72, one head, many small ones.
SHAPES = [
    ((1, 1), 2, 4, 3), ((1, 5), 2, 8, 2), ((7, 1), 3, 5, 2), ((2, 2), 1, 16, 2), ((3, 3), 2, 8, 3),
    ((5, 9), 3, 10, 2), ((9, 5), 2, 72, 1), ((4, 7), 16, 2, 1), ((4, 3), 5, 1, 2),
    ((2, 3), 1, 257, 1), ((19, 21), 1, 8, 2),                                  # several programs per head
]
MODEL = ((14, 14), 12, 64, 1)
RTOL = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}   # 16 bits: half an ulp


def make(grid, H, D, F, dtype=torch.float32, seed=0, scale=2.0, device="cpu"):
    """Scores (F, N, H) with ties, values (F, N, C) whose average is not zero."""
    g = seeded(seed)
    N = grid[0] * grid[1]
    scores = torch.randn(F, N, H, generator=g, dtype=torch.float64) * scale
    values = torch.randn(F, N, H * D, generator=g, dtype=torch.float64) + 0.5
    scores[:, N // 2:N // 2 + 2] = 0.25
    return scores.to(device, dtype), values.to(device, dtype)


def oracle(scores, values, grid):
    """The definition: (F, N, H), (F, N, C) of any dtype -> (F, N, C) fp64."""
    s, v = (x.detach().double().cpu().numpy() for x in (scores, values))
    (F, N, H), C, w = s.shape, v.shape[-1], grid[1]
    assert N == grid[0] * w
    out = np.zeros((F, N, C))
    for i in range(N):
        window = [j for j in range(N) if abs(j // w - i // w) <= 1 and abs(j % w - i % w) <= 1]
        for f in range(F):
            for k in range(H):
                a = np.exp(s[f, window, k] - s[f, window, k].max())
                head = slice(k * C // H, (k + 1) * C // H)
                for j, weight in zip(window, a / a.sum(), strict=True):
                    out[f, i, head] += weight * v[f, j, head]
    return out


def check(out, scores, values, grid):
    assert out.shape == values.shape and out.dtype == values.dtype and out.device == values.device
    rtol = RTOL[values.dtype]
    np.testing.assert_allclose(out.detach().double().cpu().numpy(), oracle(scores, values, grid), rtol=rtol,
                               atol=min(rtol, 2e-6))


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

@pytest.mark.parametrize("shape", [*SHAPES, pytest.param(MODEL, marks=pytest.mark.gpu)], ids=str)
@low
def test_kernel_is_the_definition_on_the_rounded_input(shape, dtype):
    scores, values = make(*shape, dtype, device=DEVICE)
    check(window_attention_triton(scores, values, shape[0]), scores, values, shape[0])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel_takes_scores_and_values_of_different_dtypes(dtype):
    scores, values = make((5, 9), 3, 8, 2, device=DEVICE)
    check(window_attention_triton(scores, values.to(dtype), (5, 9)), scores, values.to(dtype), (5, 9))
    check(window_attention_triton(scores.to(dtype), values, (5, 9)), scores.to(dtype), values, (5, 9))


def test_kernel_takes_any_strides():
    scores, values = make((4, 5), 2, 8, 2, device=DEVICE)
    permuted = scores.mT.contiguous().mT, values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sliced = scores.repeat_interleave(2, 2)[:, :, ::2], values.repeat_interleave(2, 1)[:, ::2]
    for s, v in (permuted, sliced, (scores[:1].expand(2, -1, -1), values[:1].expand(2, -1, -1))):
        assert not s.is_contiguous() and not v.is_contiguous()
        check(window_attention_triton(s, v, (4, 5)), s, v, (4, 5))


def test_kernel_gives_the_same_bits_every_run_and_leaves_its_input():
    scores, values = make((5, 9), 2, 72, 1, device=DEVICE)
    before = scores.clone(), values.clone()
    out = window_attention_triton(scores, values, (5, 9))
    assert out.equal(window_attention_triton(scores, values, (5, 9)))
    assert scores.equal(before[0]) and values.equal(before[1])


def test_kernel_gives_a_frame_what_it_has_alone():
    scores, values = make((5, 5), 2, 8, 3, device=DEVICE)
    alone = [window_attention_triton(scores[f:f + 1], values[f:f + 1], (5, 5)) for f in range(3)]
    assert window_attention_triton(scores, values, (5, 5)).equal(torch.cat(alone))


# ---------------------------------------------------------------------------------------------------------------------
# The kernel and the reference

both = pytest.mark.parametrize("run", [
    pytest.param(window_attention_triton, id="kernel"), pytest.param(window_attention_ref, id="reference"),
])


@both
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30], ids=str)
def test_scores_of_any_size_do_not_overflow(run, scale):
    grid = (4, 5)
    scores, values = make(grid, 2, 8, 1, device=DEVICE)
    one_sign = (scores.sign() + 2) * scale                      # all far from 0, many ties
    check(run(one_sign, values, grid), one_sign, values, grid)
    check(run(scores * scale, values, grid), scores * scale, values, grid)


@both
def test_a_constant_added_to_all_scores_changes_nothing(run):
    scores, values = make((3, 4), 2, 8, 1, device=DEVICE)
    scores = (scores * 64).round() / 64                         # still exact in fp32 with 512 added
    assert run(scores + 512, values, (3, 4)).equal(run(scores, values, (3, 4)))


@both
@pytest.mark.parametrize("name", ["scores", "values"])
def test_a_token_affects_only_its_neighbours_in_its_head_and_frame(run, name):
    F, h, w, H, D = 2, 5, 6, 3, 4
    inputs = make((h, w), H, D, F, device=DEVICE)
    clean = run(*inputs, (h, w))
    affected = torch.zeros(F, h, w, H, D, dtype=torch.bool)
    corners_borders_inside = [(0, 0), (0, 5), (2, 5), (3, 0), (4, 3), (2, 2)]
    for n, (r, c) in enumerate(corners_borders_inside):
        inputs[name == "values"].view(F, h, w, H, -1)[n % F, r, c, n // F] = torch.nan
        affected[n % F, max(0, r - 1):r + 2, max(0, c - 1):c + 2, n // F] = True
    out = run(*inputs, (h, w)).cpu()
    assert out.isnan().equal(affected.view(F, h * w, H * D))
    assert out[~out.isnan()].equal(clean.cpu()[~out.isnan()])


@both
def test_equal_scores_give_the_mean_and_a_window_of_one_the_token(run):
    _, values = make((4, 5), 2, 8, 1, device=DEVICE)
    out = run(torch.full((1, 20, 2), 3.0, device=DEVICE), values, (4, 5))
    tokens = values.view(4, 5, 16)
    windows = [tokens[max(0, r - 1):r + 2, max(0, c - 1):c + 2] for r in range(4) for c in range(5)]
    torch.testing.assert_close(out[0], torch.stack([x.mean((0, 1)) for x in windows]), rtol=1e-6, atol=1e-6)
    alone = values.reshape(20, 1, 16)[:2]
    assert run(torch.full((2, 1, 2), 3.0, device=DEVICE), alone, (1, 1)).equal(alone)


@both
def test_it_equals_a_softmax_over_all_nine_stacked_shifts(run):
    F, h, w, H, D = 2, 4, 7, 3, 8
    scores, values = make((h, w), H, D, F)
    s = nnf.pad(scores.mT.reshape(F, H, h, w), (1, 1, 1, 1), value=-torch.inf)
    v = nnf.pad(values.view(F, h, w, H, D).permute(0, 3, 1, 2, 4), (0, 0, 1, 1, 1, 1))
    shifts = [(i, j) for i in range(3) for j in range(3)]
    a = torch.stack([s[:, :, i:i + h, j:j + w] for i, j in shifts], -1).softmax(-1)     # (F, H, h, w, 9)
    mixed = sum(a[..., k, None] * v[:, :, i:i + h, j:j + w] for k, (i, j) in enumerate(shifts))
    out = run(scores.to(DEVICE), values.to(DEVICE), (h, w)).cpu()
    torch.testing.assert_close(out, mixed.permute(0, 2, 3, 1, 4).reshape(F, h * w, H * D), rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The reference and the public function

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_definition_on_the_rounded_input(shape, dtype):
    scores, values = make(*shape, dtype)
    out = window_attention(scores, values, shape[0])
    check(out, scores, values, shape[0])
    assert out.equal(window_attention_ref(scores, values, shape[0]))


def test_reference_is_the_definition_at_the_models_size():
    scores, values = make(*MODEL)
    check(window_attention(scores, values, MODEL[0]), scores, values, MODEL[0])


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 1), (3, 4)], ids=str)
def test_reference_has_its_gradient(grid):
    scores, values = (x.requires_grad_() for x in make(grid, 2, 3, 2, torch.float64))
    assert torch.autograd.gradcheck(lambda s, v: window_attention(s, v, grid), (scores, values))


def test_reference_takes_any_strides_and_leaves_its_input():
    scores, values = make((4, 5), 3, 8, 2)
    s, v = scores.mT.contiguous().mT, values.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    before = s.clone(), v.clone()
    assert window_attention(s, v, (4, 5)).equal(window_attention(scores, values, (4, 5)))
    assert s.equal(before[0]) and v.equal(before[1])


def test_there_is_a_gradient_if_one_is_required():
    scores, values = make((3, 3), 2, 4, 1)
    assert not window_attention(scores, values, (3, 3)).requires_grad
    for required in ((True, False), (False, True)):
        s, v = (x.clone().requires_grad_(r) for x, r in zip((scores, values), required, strict=True))
        assert window_attention(s, v, (3, 3)).requires_grad
        with torch.no_grad():
            assert not window_attention(s, v, (3, 3)).requires_grad


@needs_cuda
@pytest.mark.gpu
@low
def test_on_a_gpu_the_kernel_runs_unless_a_gradient_is_required(dtype, monkeypatch):
    scores, values = make((5, 9), 2, 64, 2, dtype, device="cuda")
    monkeypatch.setattr("kernels.window_attention.window_attention_ref", None)
    check(window_attention(scores, values, (5, 9)), scores, values, (5, 9))
    with torch.no_grad():
        check(window_attention(scores.clone().requires_grad_(), values, (5, 9)), scores, values, (5, 9))
    monkeypatch.undo()
    monkeypatch.setattr("kernels.window_attention.window_attention_triton", None)
    out = window_attention(scores, values.clone().requires_grad_(), (5, 9))
    assert out.requires_grad
    check(out, scores, values, (5, 9))


@needs_cuda
def test_values_may_have_more_than_2_to_the_31_elements():
    F, N, C = 2 ** 31 // (16 * 1024) + 2, 16, 1024                              # two frames more, 4.3 GB in fp16
    scores = torch.zeros(F, N, 1, dtype=torch.float16, device="cuda")
    values = torch.zeros(F, N, C, dtype=torch.float16, device="cuda")
    values[-1] = torch.randn(N, C, device="cuda")
    out = window_attention(scores, values, (4, 4))
    check(out[-1:], scores[-1:], values[-1:], (4, 4))
    assert not out[:-1].any()


S, V = torch.zeros(2, 6, 2), torch.zeros(2, 6, 8)


@pytest.mark.parametrize("scores, values, grid, message", [
    (S[0], V, (2, 3), r"window_attention.*scores.*\(F, N, H\).*\(6, 2\)"),
    (S, V.view(2, 6, 2, 4), (2, 3), r"values.*\(F, N, C\).*\(2, 6, 2, 4\)"),
    (S[:0], V[:0], (2, 3), r"scores.*empty.*\(0, 6, 2\)"),
    (S, V[:, :, :0], (2, 3), r"values.*empty.*\(2, 6, 0\)"),
    (S.long(), V, (2, 3), "scores.*torch.int64"),
    (S, V.to(torch.complex64), (2, 3), "values.*torch.complex64"),
    (S, V[:1], (2, 3), r"values.*\(2, 6, C\).*\(1, 6, 8\)"),
    (S, V[:, :5], (2, 3), r"values.*\(2, 6, C\).*\(2, 5, 8\)"),
    (S, V, (3, 3), "grid.*N = 6.*3 x 3"),
    (S, V, (-2, -3), "grid.*N = 6.*-2 x -3"),
    (S, V[:, :, :7], (2, 3), "C = 7.*H = 2"),
    (S, V.to("meta"), (2, 3), "values.*cpu.*meta"),
], ids=range(12))
def test_invalid_arguments_are_refused(scores, values, grid, message):
    with pytest.raises(ValueError, match=message) as error:
        window_attention(scores, values, grid)
    assert "\n" not in str(error.value)


@needs_cuda
@pytest.mark.gpu
def test_fp64_is_refused_on_a_gpu():
    with pytest.raises(ValueError, match="values.*torch.float64"):
        window_attention(S.cuda(), V.double().cuda(), (2, 3))
