"""cosine_distance against the definition, one pair of tokens at a time in fp64."""

import math

import numpy as np
import pytest
import torch
from helpers.kernels import (
    CUDA,
    DEVICE,
    DTYPES,
    LOW,
    captured,
    distances,
    low,
    needs_cuda,
    quick_distances,
    seeded,
    strided,
    unkind,
)

from kernels.cosine_distance import cosine_distance, cosine_distance_ref, cosine_distance_triton, l2_normalize

pytestmark = pytest.mark.usefixtures("poison_empty")

SHAPES = [(2, 64, 64), (1, 1, 8), (3, 49, 40), (4, 7, 1)]       # whole tiles, one token, ragged, one channel


def signs(*shape, seed):
    """Random vectors of -1 and 1, and their exact distances: 2/C per different sign."""
    x = torch.randint(0, 2, shape, generator=seeded(seed)) * 2.0 - 1
    return x, 2 * (x[:, :, None] != x[:, None]).sum(-1).float() / shape[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The reference

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_definition_on_the_rounded_input(shape, dtype):
    x = unkind(*shape).to(dtype)
    d = cosine_distance(x)
    assert d.dtype == torch.float32
    np.testing.assert_allclose(d.double().numpy(), np.stack([distances(f) for f in x]), rtol=0, atol=1e-6)


def test_reference_in_fp64_is_the_definition_to_fp64():
    x = unkind(2, 49, 40).double()
    np.testing.assert_allclose(cosine_distance_ref(x).numpy(), np.stack([distances(f) for f in x]), rtol=0, atol=1e-14)


def test_reference_gives_vectors_of_signs_their_exact_distances():
    for C in (4, 16, 64):
        x, expected = signs(2, 33, C, seed=C)
        assert cosine_distance(x).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_has_a_zero_diagonal_and_stays_within_0_and_2(dtype):
    x = torch.randn(1, 8, 96, generator=seeded(1))
    x = torch.cat([x, -x, x, x * 1e3, torch.zeros(1, 2, 96)], 1).to(dtype)      # rounding alone would leave [0, 2]
    d = cosine_distance(x)
    assert (d.diagonal(dim1=1, dim2=2) == 0).all()
    assert d.min() >= 0 and d.max() <= 2


def test_a_zero_vector_is_at_distance_1_from_others_and_0_from_itself():
    x = torch.randn(1, 5, 8, generator=seeded(2))
    x[0, [1, 3]] = 0
    assert cosine_distance(x)[0, 1].tolist() == [1, 0, 1, 1, 1]
    assert cosine_distance(torch.zeros(1, 3, 8))[0].equal(1 - torch.eye(3))
    assert l2_normalize(x)[0, 1].equal(torch.zeros(8))


def test_reference_takes_any_strides():
    x = torch.randn(40, 3, 49, generator=seeded(3)).permute(1, 2, 0)
    wide = torch.randn(3, 98, 80, generator=seeded(4))[:, ::2, ::2]
    one = torch.randn(1, 49, 40, generator=seeded(5)).expand(3, 49, 40)
    for y in (x, wide, one):
        assert not y.is_contiguous()
        torch.testing.assert_close(cosine_distance(y), cosine_distance(y.contiguous()), rtol=0, atol=1e-6)


def test_reference_leaves_its_input_and_has_no_gradient():
    x = unkind(2, 9, 8).requires_grad_()
    before = x.detach().clone()
    assert not cosine_distance(x).requires_grad
    assert x.detach().equal(before)


def test_invalid_tokens_are_refused():
    with pytest.raises(ValueError, match=r"cosine_distance.*\(F, N, C\).*\(3, 4\)"):
        cosine_distance(torch.ones(3, 4))


def test_reference_is_symmetric_even_if_the_matrix_product_is_not(monkeypatch):
    matmul = torch.Tensor.__matmul__
    lopsided = lambda a, b: matmul(a, b) * (1 + 1e-6 * torch.ones(a.shape[-2], b.shape[-1]).tril())
    monkeypatch.setattr(torch.Tensor, "__matmul__", lopsided)
    d = cosine_distance_ref(unkind(2, 49, 40))
    assert d.equal(d.mT)


def test_unchecked_the_reference_passes_a_nan_on():
    x = torch.randn(1, 4, 8)
    x[0, 1, 2] = math.nan
    d = cosine_distance(x, check=False)
    assert d[0, 0, 1].isnan() and d[0, 0, 2].isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

# One token, one program, several frames per program (the interpreter has two); whole tiles, ragged ones, two and more.
KERNEL_SHAPES = [
    (1, 1, 1), (5, 1, 8), (2, 2, 3), (3, 3, 100), (1, 16, 1536), (5, 17, 8), (3, 49, 40), (2, 64, 64), (1, 65, 1),
    (1, 129, 96), pytest.param((1, 196, 768), marks=pytest.mark.gpu), (1, 300, 40),
]


def test_the_quick_oracle_is_the_definition():
    for x in (unkind(49, 40), unkind(7, 3), torch.zeros(2, 3)):
        np.testing.assert_allclose(quick_distances(x), distances(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@low
def test_kernel_is_the_definition_on_the_rounded_input(shape, dtype):
    x = unkind(*shape, seed=shape[1]).to(DEVICE, dtype)
    d = cosine_distance_triton(x).cpu()
    assert d.shape == (*shape[:2], shape[1]) and d.dtype == torch.float32
    np.testing.assert_allclose(d.double().numpy(), np.stack([quick_distances(f) for f in x]), rtol=0, atol=1e-6)
    assert d.equal(d.mT) and (d.diagonal(dim1=1, dim2=2) == 0).all() and d.min() >= 0 and d.max() <= 2
    if shape[1] > 6:                                                            # token 6 is zero
        assert d[:, 6].equal((torch.arange(shape[1]) != 6).float().expand(*shape[:2]))


def test_kernel_takes_up_to_1024_tokens():
    x = unkind(1, 1024, 8).to(DEVICE, LOW[-1])
    d = cosine_distance_triton(x).cpu()
    np.testing.assert_allclose(d[0].double().numpy(), quick_distances(x[0]), rtol=0, atol=1e-6)
    assert d.equal(d.mT)


@pytest.mark.parametrize("N, C", [(33, 4), (150, 16), (20, 256)])
@low
def test_kernel_gives_vectors_of_signs_their_exact_distances(N, C, dtype):
    x, expected = signs(2, N, C, seed=C)
    assert cosine_distance_triton(x.to(DEVICE, dtype)).cpu().equal(expected)


@low
def test_kernel_distances_stay_within_0_and_2(dtype):
    x = torch.randn(1, 16, 96, generator=seeded(1))
    x = torch.cat([x, -x, x, x * 1e3, -1e3 * x, torch.zeros(1, 2, 96)], 1).to(DEVICE, dtype)
    d = cosine_distance_triton(x)
    assert d.min() == 0 and 2 - 1e-6 < d.max() <= 2 and (d.diagonal(dim1=1, dim2=2) == 0).all()
    assert cosine_distance_triton(torch.zeros_like(x))[0].cpu().equal(1 - torch.eye(82))


def test_kernel_takes_the_longest_and_the_shortest_tokens_allowed():
    x = torch.randn(2, 70, 40, generator=seeded(2))
    x /= x.abs().amax(-1, keepdim=True)
    scaled = (x * 10.0 ** torch.arange(-12, 13).repeat(3)[:70, None]).to(DEVICE)
    d = cosine_distance_triton(scaled).cpu().double().numpy()
    np.testing.assert_allclose(d, np.stack([quick_distances(f) for f in x]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 20, 40), (2, 70, 24)], ids=str)
def test_kernel_takes_any_strides_and_leaves_its_input(shape):
    for x in strided(*shape):
        before = x.clone()
        assert not x.is_contiguous()
        assert cosine_distance_triton(x).equal(cosine_distance_triton(x.contiguous()))
        assert x.equal(before)


@pytest.mark.parametrize("shape", [(5, 20, 24), (3, 130, 40)], ids=str)
@low
def test_kernel_gives_the_same_bits_every_run_and_to_a_single_frame(shape, dtype):
    x = unkind(*shape).to(DEVICE, dtype)
    d = cosine_distance_triton(x)
    assert d.equal(cosine_distance_triton(x))
    assert d.flip(0).equal(cosine_distance_triton(x.flip(0)))
    for f in range(shape[0]):
        assert cosine_distance_triton(x[f:f + 1])[0].equal(d[f])


def test_kernel_gives_permuted_tokens_permuted_distances():
    g = seeded(3)
    x, p = torch.randn(2, 140, 40, generator=g).to(DEVICE), torch.randperm(140, generator=g)
    permuted = cosine_distance_triton(x[:, p])
    torch.testing.assert_close(permuted, cosine_distance_triton(x)[:, p][:, :, p], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.gpu
def test_kernel_lets_a_nan_or_an_infinity_affect_its_own_token_only(bad):
    x = torch.randn(3, 100, 24, generator=seeded(4)).to(DEVICE)
    spoilt = x.clone()
    spoilt[1, [0, 40, 99], 7] = bad
    d, expected = cosine_distance_triton(spoilt).cpu(), cosine_distance_triton(x).cpu()
    assert d.min() >= 0 and d.max() <= 2                                        # so none is NaN
    good = torch.ones(3, 100, dtype=torch.bool)
    good[1, [0, 40, 99]] = False
    pairs = good[:, :, None] & good[:, None]
    assert d[pairs].equal(expected[pairs])


@pytest.mark.skipif(CUDA, reason="replaces the interpreter's matrix product")
@pytest.mark.parametrize("N", [5, 49, 130])
def test_kernel_is_symmetric_even_if_the_matrix_product_is_not(N, monkeypatch):
    InterpreterBuilder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    create_dot = InterpreterBuilder.create_dot

    def lopsided(self, *args):
        dot = create_dot(self, *args)
        dot.data *= 1 + 1e-6 * np.tri(*dot.data.shape, dtype=dot.data.dtype)
        return dot

    monkeypatch.setattr(InterpreterBuilder, "create_dot", lopsided)
    d = cosine_distance_triton(unkind(2, N, 40))
    assert d.equal(d.mT)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.gpu
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    x = unkind(3, 70, 40).to("cuda", dtype)
    assert cosine_distance(x).equal(cosine_distance_triton(x))
    with pytest.raises(ValueError, match="cosine_distance.*torch.float64"):
        cosine_distance(x.double())


@needs_cuda
def test_features_and_distances_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (N * C) + 3, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    assert cosine_distance_triton(x)[-3:].equal(cosine_distance_triton(x[-3:]))
    del x
    x = torch.randn(2 ** 31 // 1024 ** 2 + 3, 1024, 16, device="cuda", dtype=torch.float16)
    assert cosine_distance_triton(x)[-3:].equal(cosine_distance_triton(x[-3:]))


@needs_cuda
def test_kernel_can_be_captured_in_a_cuda_graph():
    x = unkind(3, 70, 40).cuda()
    assert captured(lambda: cosine_distance(x, check=False)).equal(cosine_distance_triton(x))
