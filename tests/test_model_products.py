"""The model's products in fp32, VTC's and MRM's, as bf16x3 and in general, against fp64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from helpers.kernels import needs_cuda, seeded
from helpers.models import TIGHT, unit

import products
from model import vtc_loss
from products import QuadraticForm, matmul_bf16x3


@pytest.fixture
def bf16x3(monkeypatch):
    """Large products on a GPU are bf16x3; here all are -> the list of their shapes (n, k, m)."""
    shapes = []

    def matmul(a, b):
        shapes.append((*a.shape, b.shape[1]))
        return matmul_bf16x3(a.float(), b.float())

    monkeypatch.setattr(products, "matmul", matmul)
    return shapes


def vtc_ref(video, text, media_ids, temp):
    """Symmetric InfoNCE of clips that share a medium with others; all in fp64."""
    same, logits = (media_ids[:, None] == media_ids).double(), video @ text.T / temp
    errors = -same / same.sum(1, keepdim=True) * (logits.log_softmax(1) + logits.T.log_softmax(1))
    return errors.sum() / (2 * len(video))


def relative_error(x, expected):
    return ((x.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scale", [1, 1e-12, 1e12], ids=str)
@pytest.mark.parametrize("shape", [(33, 70, 17), (1, 1, 1), (5, 768, 9)], ids=str)
def test_bf16x3_is_within_its_bound(shape, scale):
    n, k, m = shape
    a, b = torch.randn(n, k, generator=seeded()) * scale, torch.randn(m, k, generator=seeded(1)).T
    a[:, ::3] *= 1e-4                                                       # small beside its row
    a[0, -1], b[-1, 0] = 0, 1 + 2 ** -9                                     # which bf16 rounds most
    error, size = (matmul_bf16x3(a, b) - a.double() @ b.double()).abs(), a.double().abs() @ b.double().abs()
    assert (error <= (3 * 2 ** -16 + k * 2 ** -24) * size).all()
    if k > 1:
        one = (a.bfloat16().double() @ b.bfloat16().double() - a.double() @ b.double()).norm()
        assert error.norm() < one / 100                                     # of a product in bf16


@pytest.mark.parametrize("temp", [0.07, 0.5])
def test_vtc_and_its_gradients_by_bf16x3_are_within_2e_5_of_fp64(bf16x3, temp):
    common = torch.randn(1, 64, generator=seeded())
    video, text = (nnf.normalize(unit(300, 64, seed=i).float() + 0.1 * common, dim=-1) for i in (0, 1))
    inputs, media_ids, results = (video, text, torch.tensor(temp)), torch.arange(300) // 2, []
    for function, dtype in ((vtc_loss, torch.float32), (vtc_ref, torch.float64)):
        video, text, t = (x.detach().to(dtype).requires_grad_() for x in inputs)
        loss = function(video, text, media_ids, t)
        results.append((loss, *torch.autograd.grad(loss, (video, text, t))))
    assert bf16x3 == [(300, 64, 300), (300, 300, 64), (64, 300, 300)]
    for x, expected in zip(*results, strict=True):
        assert relative_error(x, expected) < 2e-5


@pytest.mark.parametrize("near", [1.0, 0.03], ids=["far from the targets", "near the targets"])
def test_mrm_and_its_gradient_by_bf16x3_are_within_2e_5_of_fp64(bf16x3, near):
    """Embeddings and captions share a direction, as SigLIP's do: the form is far larger along it than across."""
    common = unit(1, 96, seed=5)
    texts = nnf.normalize(common * 2 + unit(40, 96), dim=-1)
    p = nnf.normalize(unit(1, 96, seed=6) * 2 + unit(4, 50, 96, seed=1), dim=-1)
    q = nnf.normalize(p + near * unit(4, 50, 96, seed=2), dim=-1)
    results = []
    for dtype in (torch.float32, torch.float64):
        gram, x, t = (texts.T @ texts / 40).to(dtype), q.to(dtype).requires_grad_(), p.to(dtype)
        form = (lambda e, gram=gram: QuadraticForm.apply(e, gram)) if dtype == torch.float32 else (
            lambda e, gram=gram: torch.einsum("bqi,ij,bqj->bq", e, gram, e))
        loss = form(x - p.float().to(dtype)).mean() / form(t - t.mean(1, keepdim=True)).mean()
        results.append((loss, *torch.autograd.grad(loss, x)))
    assert bf16x3 == [(200, 96, 96)] * 2                                    # the gradient needs none
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 2e-5


def test_the_quadratic_form_has_the_gradient_of_its_formula():
    e, root = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda e: QuadraticForm.apply(e, root.T @ root), e)
    torch.testing.assert_close(QuadraticForm.apply(e, root.T @ root), (e @ root.T).square().sum(-1), **TIGHT)


def test_only_large_fp32_products_on_a_gpu_are_bf16x3(monkeypatch):
    monkeypatch.setattr(products, "matmul_bf16x3", mock.Mock(return_value="bf16x3"))
    matrix = {"is_cuda": True, "dtype": torch.float32, "shape": (2048, 512)}
    large = lambda **changes: mock.MagicMock(**matrix | changes)
    b = mock.MagicMock(shape=(512, 2048))
    assert products.matmul(large(), b) == "bf16x3"
    for changes in ({"is_cuda": False}, {"dtype": torch.float64}, {"shape": (2047, 512)}):
        assert products.matmul(large(**changes), b) != "bf16x3"


@pytest.mark.gpu
@needs_cuda
def test_bf16x3_on_a_gpu_sums_in_fp32():
    a, b = torch.randn(2048, 768, generator=seeded()).cuda(), torch.randn(768, 2048, generator=seeded(1)).cuda()
    expected, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((products.matmul(a, b) - expected).abs() <= (3 * 2 ** -16 + 3 * 768 * 2 ** -24) * size).all()
    assert not torch.equal(products.matmul(a, b), a @ b)                # large enough
