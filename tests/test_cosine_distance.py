"""cosine_distance against the definition, one pair of tokens at a time in fp64."""

import math

import numpy as np
import pytest
import torch

from kernels.cosine_distance import cosine_distance, cosine_distance_ref, cosine_distance_triton, unit

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"              # where the kernels run: on a CPU in the interpreter
LOW = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]              # the interpreter misreads bf16
low = pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")

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


def quick_distances(rows):
    """`distances` for many tokens: rows (N, C) -> (N, N) fp64."""
    rows = rows.detach().double().cpu().numpy()
    norms = np.sqrt((rows * rows).sum(1, keepdims=True))
    rows = rows / np.where(norms > 0, norms, 1)
    d = np.clip(1 - rows @ rows.T, 0, 2)
    np.fill_diagonal(d, 0)
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


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

# One token, one program, several turns of a program (the interpreter has two); whole blocks, ragged ones, two and more.
KERNEL_SHAPES = [
    (1, 1, 1), (5, 1, 8), (2, 2, 3), (3, 3, 100), (1, 16, 1536), (5, 17, 8), (3, 49, 40), (2, 64, 64), (1, 65, 1),
    (1, 129, 96), (1, 196, 768), (3, 256, 8), (1, 300, 40),
]


def test_the_quick_distances_are_the_definition():
    for x in (unkind(49, 40), unkind(7, 3), torch.zeros(2, 3)):
        np.testing.assert_allclose(quick_distances(x), distances(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@low
def test_the_kernel_is_the_definition_on_the_rounded_input(shape, dtype):
    x = unkind(*shape, seed=shape[1]).to(DEVICE, dtype)
    d = cosine_distance_triton(x).cpu()
    assert d.shape == (*shape[:2], shape[1]) and d.dtype == torch.float32
    np.testing.assert_allclose(d.double().numpy(), np.stack([quick_distances(f) for f in x]), rtol=0, atol=1e-6)
    assert d.equal(d.mT) and (d.diagonal(dim1=1, dim2=2) == 0).all() and d.min() >= 0 and d.max() <= 2
    if shape[1] > 6:                                                            # token 6 has no direction
        assert d[:, 6].equal((torch.arange(shape[1]) != 6).float().expand(*shape[:2]))


@pytest.mark.parametrize("F, N, C", [(1, 729, 3), (1, 1024, 8)])
def test_the_kernel_takes_as_many_tokens_as_there_may_be(F, N, C):
    x = unkind(F, N, C).to(DEVICE, LOW[-1])
    d = cosine_distance_triton(x).cpu()
    np.testing.assert_allclose(d[0].double().numpy(), quick_distances(x[0]), rtol=0, atol=1e-6)
    assert d.equal(d.mT)


@pytest.mark.parametrize("N, C", [(33, 4), (150, 16), (80, 64), (20, 256)])
@low
def test_in_the_kernel_vectors_of_signs_have_their_exact_distances(N, C, dtype):
    x = torch.randint(0, 2, (2, N, C), generator=torch.Generator().manual_seed(C)) * 2.0 - 1
    turned = (x[:, :, None] != x[:, None]).sum(-1)
    assert cosine_distance_triton(x.to(DEVICE, dtype)).cpu().equal(2 * turned.float() / C)


@low
def test_in_the_kernel_no_distance_leaves_0_to_2(dtype):
    x = torch.randn(1, 16, 96, generator=torch.Generator().manual_seed(1))
    x = torch.cat([x, -x, x, x * 1e3, -1e3 * x, torch.zeros(1, 2, 96)], 1).to(DEVICE, dtype)
    d = cosine_distance_triton(x)
    assert d.min() == 0 and 2 - 1e-6 < d.max() <= 2 and (d.diagonal(dim1=1, dim2=2) == 0).all()
    assert cosine_distance_triton(torch.zeros_like(x))[0].cpu().equal(1 - torch.eye(82))


def test_the_kernel_takes_the_longest_and_the_shortest_tokens_allowed():
    x = torch.randn(2, 70, 40, generator=torch.Generator().manual_seed(2))
    x /= x.abs().amax(-1, keepdim=True)
    scaled = (x * 10.0 ** torch.arange(-12, 13).repeat(3)[:70, None]).to(DEVICE)
    d = cosine_distance_triton(scaled).cpu().double().numpy()
    np.testing.assert_allclose(d, np.stack([quick_distances(f) for f in x]), rtol=0, atol=1e-6)


def strided(*shape, seed=0):
    """A transposed, a sliced, an expanded and a reversed copy of random tokens, none of them contiguous."""
    g = torch.Generator().manual_seed(seed)
    dims = tuple(range(len(shape)))
    yield torch.randn(shape[::-1], generator=g).to(DEVICE).permute(dims[::-1])
    wide = torch.randn(*shape[:-2], 2 * shape[-2], 3 * shape[-1], generator=g).to(DEVICE)
    yield wide[..., 1::2, 2::3]
    yield torch.randn(1, *shape[1:], generator=g).to(DEVICE).expand(shape)
    yield torch.randn(shape[-1], *shape[:-1], generator=g).to(DEVICE).movedim(0, -1)


@pytest.mark.parametrize("shape", [(3, 20, 40), (2, 70, 24)], ids=str)
def test_the_kernel_takes_any_strides_and_leaves_its_input(shape):
    for x in strided(*shape):
        before = x.clone()
        assert not x.is_contiguous()
        assert cosine_distance_triton(x).equal(cosine_distance_triton(x.contiguous()))
        assert x.equal(before)


@pytest.mark.parametrize("shape", [(5, 20, 24), (3, 130, 40)], ids=str)
@low
def test_the_kernel_gives_the_same_bits_every_run_and_to_a_frame_alone(shape, dtype):
    x = unkind(*shape).to(DEVICE, dtype)
    d = cosine_distance_triton(x)
    assert d.equal(cosine_distance_triton(x))
    assert d.flip(0).equal(cosine_distance_triton(x.flip(0)))
    for f in range(shape[0]):
        assert cosine_distance_triton(x[f:f + 1])[0].equal(d[f])


def test_in_the_kernel_permuted_tokens_have_permuted_distances():
    g = torch.Generator().manual_seed(3)
    x, p = torch.randn(2, 140, 40, generator=g).to(DEVICE), torch.randperm(140, generator=g)
    moved = cosine_distance_triton(x[:, p])
    torch.testing.assert_close(moved, cosine_distance_triton(x)[:, p][:, :, p], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_in_the_kernel_a_NaN_or_an_infinity_spoils_its_own_token_only(bad):
    x = torch.randn(3, 100, 24, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    spoilt = x.clone()
    spoilt[1, [0, 40, 99], 7] = bad
    d, want = cosine_distance_triton(spoilt).cpu(), cosine_distance_triton(x).cpu()
    assert d.min() >= 0 and d.max() <= 2                                        # so none is NaN
    good = torch.ones(3, 100, dtype=torch.bool)
    good[1, [0, 40, 99]] = False
    both = good[:, :, None] & good[:, None]
    assert d[both].equal(want[both])


@pytest.mark.skipif(CUDA, reason="replaces the interpreter's matrix product")
@pytest.mark.parametrize("N", [5, 49, 130])
def test_the_kernel_is_symmetric_even_if_the_matrix_product_is_not(N, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder
    plain = InterpreterBuilder.create_dot

    def lopsided(self, *args):
        dot = plain(self, *args)
        dot.data *= 1 + 1e-6 * np.tri(*dot.data.shape, dtype=dot.data.dtype)
        return dot

    monkeypatch.setattr(InterpreterBuilder, "create_dot", lopsided)
    d = cosine_distance_triton(unkind(2, N, 40))
    assert d.equal(d.mT)


def test_the_reference_is_symmetric_even_if_the_matrix_product_is_not(monkeypatch):
    plain = torch.Tensor.__matmul__
    lopsided = lambda a, b: plain(a, b) * (1 + 1e-6 * torch.ones(a.shape[-2], b.shape[-1]).tril())
    monkeypatch.setattr(torch.Tensor, "__matmul__", lopsided)
    d = cosine_distance_ref(unkind(2, 49, 40))
    assert d.equal(d.mT)


def test_unchecked_on_a_cpu_the_reference_passes_a_NaN_on():
    x = torch.randn(1, 4, 8)
    x[0, 1, 2] = math.nan
    d = cosine_distance(x, check=False)
    assert d[0, 0, 1].isnan() and d[0, 0, 2].isfinite()


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_tensor_on_a_gpu_goes_to_the_kernel(dtype):
    x = unkind(3, 70, 40).to("cuda", dtype)
    assert cosine_distance(x).equal(cosine_distance_triton(x))
    with pytest.raises(ValueError, match="float32, float16 or bfloat16 on a GPU, got torch.float64"):
        cosine_distance(x.double())
    with pytest.raises(ValueError, match="1 to 1024 tokens a frame on a GPU, got 1025"):
        cosine_distance(x[:, :1].expand(3, 1025, 40))
    with pytest.raises(ValueError, match="largest component is 0 or within 1e-12 to 1e12"):
        cosine_distance(x.float() * 1e-20)


@needs_cuda
def test_on_a_gpu_the_features_may_have_more_than_2_to_the_31_elements():
    N, C = 64, 1536
    x = torch.randn(2 ** 31 // (N * C) + 3, N, C, device="cuda", dtype=torch.float16)
    assert x.numel() > 2 ** 31
    assert cosine_distance_triton(x)[-3:].equal(cosine_distance_triton(x[-3:]))
    del x
    x = torch.randn(2 ** 31 // 1024 ** 2 + 3, 1024, 16, device="cuda", dtype=torch.float16)
    assert cosine_distance_triton(x)[-3:].equal(cosine_distance_triton(x[-3:]))     # and so may the distances


def captured(f):
    """What a CUDA graph of f computes when it is replayed, f having been called once before."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f()
    graph.replay()
    torch.cuda.synchronize()
    return out.clone() if isinstance(out, torch.Tensor) else [t.clone() for t in out]


@needs_cuda
def test_the_kernel_can_be_captured_in_a_cuda_graph():
    x = unkind(3, 70, 40).cuda()
    assert captured(lambda: cosine_distance(x, check=False)).equal(cosine_distance_triton(x))
