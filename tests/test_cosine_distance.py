"""cosine_distance against the definition, one pair of tokens at a time in fp64."""

import math

import numpy as np
import pytest
import torch

from kernels.cosine_distance import cosine_distance, cosine_distance_ref, unit

SHAPES = [(2, 64, 64), (1, 1, 8), (3, 49, 40), (1, 197, 96), (4, 7, 1)]     # whole blocks, one token, ragged, one C
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def distance(a, b):
    """Of two vectors, as it is defined."""
    norms = math.sqrt(np.dot(a, a)) * math.sqrt(np.dot(b, b))
    return 1.0 if norms == 0 else min(max(1 - np.dot(a, b) / norms, 0.0), 2.0)


def distances(frame):
    """frame (N, C) -> (N, N) fp64, 0 from a token to itself."""
    rows = frame.double().numpy()
    d = np.zeros((len(rows), len(rows)))
    for i, a in enumerate(rows):
        for j in range(i):
            d[i, j] = d[j, i] = distance(a, rows[j])
    return d


def unkind(*shape, seed=0):
    """Random tokens; where there is room a duplicate, an opposite, a longer one, a nearly parallel one, a zero one."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    if shape[-2] > 6:
        x[..., 1, :] = x[..., 0, :]
        x[..., 2, :] = -x[..., 0, :]
        x[..., 3, :] = 64 * x[..., 0, :]
        x[..., 4, :] = x[..., 0, :] + 0.01 * x[..., 5, :]
        x[..., 6, :] = 0
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_definition_on_the_rounded_input(shape, dtype):
    x = unkind(*shape).to(dtype)
    d = cosine_distance(x)
    assert d.dtype == torch.float32
    np.testing.assert_allclose(d.double().numpy(), np.stack([distances(f) for f in x]), rtol=0, atol=1e-6)


def test_the_reference_in_fp64_is_the_definition_to_fp64():
    x = unkind(2, 49, 40).double()
    np.testing.assert_allclose(cosine_distance_ref(x).numpy(), np.stack([distances(f) for f in x]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("C", [4, 16, 64])
def test_vectors_of_signs_have_their_exact_distances(C):
    x = torch.randint(0, 2, (2, 33, C), generator=torch.Generator().manual_seed(C)) * 2.0 - 1
    turned = [[[sum(p != q for p, q in zip(a, b, strict=True)) for b in f] for a in f] for f in x.tolist()]
    assert cosine_distance(x).equal(2 * torch.tensor(turned) / C)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_diagonal_is_zero_and_no_distance_leaves_0_to_2(dtype):
    x = torch.randn(1, 8, 96, generator=torch.Generator().manual_seed(1))
    x = torch.cat([x, -x, x, x * 1e3, torch.zeros(1, 2, 96)], 1).to(dtype)      # rounding alone would leave [0, 2]
    d = cosine_distance(x)
    assert (d.diagonal(dim1=1, dim2=2) == 0).all()
    assert d.min() >= 0 and d.max() <= 2


def test_a_zero_vector_is_at_distance_1_from_every_other_token_and_at_0_from_itself():
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
    x[0, [1, 3]] = 0
    want = torch.ones(5)
    want[1] = 0
    assert cosine_distance(x)[0, 1].equal(want)
    assert cosine_distance(torch.zeros(1, 3, 8))[0].equal(1 - torch.eye(3))
    assert unit(x)[0, 1].equal(torch.zeros(8))


def test_strides_do_not_matter():
    x = torch.randn(40, 3, 49, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0)
    wide = torch.randn(3, 98, 80, generator=torch.Generator().manual_seed(4))[:, ::2, ::2]
    one = torch.randn(1, 49, 40, generator=torch.Generator().manual_seed(5)).expand(3, 49, 40)
    for y in (x, wide, one):
        assert not y.is_contiguous()
        torch.testing.assert_close(cosine_distance(y), cosine_distance(y.contiguous()), rtol=0, atol=1e-6)


def test_the_input_is_left_as_it_was_and_carries_no_gradient():
    x = unkind(2, 9, 8).requires_grad_()
    before = x.detach().clone()
    assert not cosine_distance(x).requires_grad
    assert x.detach().equal(before)


@pytest.mark.parametrize("bad, message", [
    (torch.ones(3, 4), r"cosine_distance wants \(F, N, C\), got \(3, 4\)"),
    (torch.ones(1, 2, 3, 4), r"\(F, N, C\), got \(1, 2, 3, 4\)"),
    (torch.ones(2, 0, 4), r"no empty axis in \(F, N, C\), got \(2, 0, 4\)"),
    (torch.ones(0, 3, 4), r"got \(0, 3, 4\)"),
    (torch.ones(2, 3, 0), r"got \(2, 3, 0\)"),
    (torch.ones(1, 2, 3, dtype=torch.int64), r"floating-point values, got torch.int64"),
    (torch.tensor([[[1.0, math.nan], [math.inf, 1.0]]]), r"finite values, got 2 NaN or infinite of 4"),
    (torch.tensor([[[1.0, -math.inf]]], dtype=torch.float16), r"got 1 NaN or infinite of 2"),
], ids=range(8))
def test_what_is_no_set_of_tokens_is_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        cosine_distance(bad)
