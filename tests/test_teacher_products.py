"""The products of the frozen teacher: GELU in the epilogue, against its formula in fp64, and layers in fp8."""

from contextlib import nullcontext
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as nnf
from helpers.kernels import needs_cuda, seeded
from helpers.siglip import WORDS, tiny_siglip, word_tokenizer
from torch import nn

import teacher
from siglip_files import ACTIVATIONS, SigLIPConfig, TextConfig, VisionConfig
from teacher import MLP, SigLIP

# ---------------------------------------------------------------------------------------------------------------------
# GELU in the epilogue of a product

def mlp_and_tokens(dtype, act="gelu_pytorch_tanh", device="cpu"):
    """An MLP with wide sums, to which GELU's two forms differ, and tokens; in both signs, far from 0 and near."""
    torch.manual_seed(0)
    mlp = MLP(VisionConfig(hidden_size=32, intermediate_size=96, hidden_act=act))
    for p in mlp.parameters():
        nn.init.normal_(p, std=0.4)
    return mlp.to(device, dtype), (torch.randn(3, 5, 32) * torch.tensor([0.1, 1, 4])[:, None, None]).to(device, dtype)


def mlp_ref(mlp, x):
    """GELU's tanh form from its formula, in fp64 on the rounded weights."""
    w1, b1, w2, b2 = (p.detach().double() for p in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias))
    y = x.double() @ w1.T + b1
    y = y / 2 * (1 + ((2 / torch.pi) ** 0.5 * (y + 0.044715 * y ** 3)).tanh())
    return y @ w2.T + b2, y.abs() @ w2.T.abs() + b2.abs()


def addmm_activation(bias, a, b, *, use_gelu):
    """What torch._addmm_activation computes on a GPU, from fp32 sums."""
    assert use_gelu and bias.ndim == 1 and a.ndim == b.ndim == 2
    return nnf.gelu(a.float() @ b.float() + bias.float(), approximate="tanh").to(a.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gelu_in_the_epilogue_is_the_tanh_form_and_one_rounding_better(monkeypatch, dtype):
    mlp, x = mlp_and_tokens(dtype)
    expected, scale = mlp_ref(mlp, x)
    with torch.no_grad():
        plain = mlp(x)
        monkeypatch.setattr(teacher, "fuses_gelu", lambda x, weight: True)
        monkeypatch.setattr(torch, "_addmm_activation", addmm_activation)
        fused, vector = mlp(x), mlp(x[0, 0])
    u = torch.finfo(dtype).eps / 2                      # the hidden values are rounded once, or twice, then the result
    assert ((fused - expected).abs() <= u * scale + u * expected.abs() + 1e-4 * scale).all()
    assert ((fused - plain).abs() <= 4 * u * scale).all()
    torch.testing.assert_close(vector, fused[0, 0])


def test_gelu_is_fused_for_frozen_16_bit_layers_on_a_gpu_alone(monkeypatch):
    on_gpu = lambda dtype: Mock(is_cuda=True, dtype=dtype)
    bf16, fp32 = on_gpu(torch.bfloat16), on_gpu(torch.float32)
    with torch.no_grad():
        assert teacher.fuses_gelu(bf16, bf16) and teacher.fuses_gelu(*[on_gpu(torch.float16)] * 2)
        assert not teacher.fuses_gelu(fp32, fp32) and not teacher.fuses_gelu(fp32, bf16)    # bf16 weights in autocast
        assert not teacher.fuses_gelu(torch.ones(1, dtype=torch.bfloat16), bf16)
    assert not teacher.fuses_gelu(bf16, bf16)           # it has no gradient
    monkeypatch.setattr(teacher, "fuses_gelu", lambda x, weight: True)
    monkeypatch.setattr(teacher, "linear_gelu", Mock(side_effect=AssertionError("is not the tanh form")))
    for act in ("gelu", "relu"):
        mlp, x = mlp_and_tokens(torch.float32, act)
        assert torch.equal(mlp(x), mlp.fc2(ACTIVATIONS[act](mlp.fc1(x))))


def test_torch_compile_keeps_gelu_in_the_product(monkeypatch):
    """Inductor must neither take the call apart nor break the graph at it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import fallbacks
    monkeypatch.setattr(teacher, "fuses_gelu", lambda x, weight: True)
    calls = []

    def backend(graph, example_inputs):
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    backend = aot_autograd(fw_compiler=backend, decompositions=select_decomp_table())
    layer, x = tiny_siglip().vision_model.encoder.layers[0], torch.randn(2, 9, 16, dtype=torch.float64)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    assert calls.count(torch.ops.aten._addmm_activation.default) == 1 and not any("gelu" in str(op) for op in calls)
    assert torch.ops.aten._addmm_activation.default in fallbacks


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gelu_in_the_epilogue_on_a_gpu(compiled):
    mlp, x = mlp_and_tokens(torch.bfloat16, device="cuda")
    expected, scale = mlp_ref(mlp, x)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fused = (torch.compile(mlp, fullgraph=True) if compiled else mlp)(x)
    u = torch.finfo(torch.bfloat16).eps / 2
    assert ((fused - expected).abs() <= u * scale + u * expected.abs() + 1e-4 * scale).all()
    assert any("_addmm_activation" in event.key for event in profile.key_averages())


# ---------------------------------------------------------------------------------------------------------------------
# fp8

def test_a_row_in_fp8_is_within_a_sixteenth():
    """e4m3 has 3 bits after the leading one; below 2^-6 its steps are 2^-9."""
    x = torch.randn(7, 32, generator=seeded()) * torch.tensor([1, 1e-6, 1e6, 1e-30, 3, 0, 1])[:, None]
    x[4, 1:], x[6] = x[4, 1:] * 1e-4, x[6].to(torch.bfloat16).float()       # small beside its row; bf16
    y, scale = teacher.quantize_fp8(x)
    assert y.dtype == torch.float8_e4m3fn and scale.shape == (7, 1) and scale.dtype == torch.float32
    y = y.double() * scale.double()
    assert ((y - x).abs() <= torch.maximum(x.double().abs() / 16, scale.double() * 2 ** -10)).all()
    rows = [0, 1, 2, 4, 6]                              # the largest becomes 448, of a row that is not nearly 0
    torch.testing.assert_close(y.abs().amax(1)[rows], x.abs().amax(1)[rows].double(), rtol=1e-6, atol=0)
    assert y[5].eq(0).all() and torch.equal(teacher.quantize_fp8(x.bfloat16()[6:])[0].float(),
                                            teacher.quantize_fp8(x[6:])[0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_in_fp8_is_the_product_of_the_rounded_rows(dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 48).to(dtype).requires_grad_(False), torch.randn(3, 5, 32).to(dtype)
    linear.weight.data[3] *= 100                        # a scale for each row
    layer = teacher.Float8Linear(linear)
    rounded = [y.double() * scale.double() for y, scale in map(teacher.quantize_fp8, (x.flatten(0, 1), linear.weight))]
    expected = (rounded[0] @ rounded[1].T + linear.bias.double()).view(3, 5, 48)
    result = layer(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps,
                               atol=1e-5 * expected.abs().max().item())
    assert (result - linear(x)).norm() < 0.05 * linear(x).norm()
    loud = torch.cat([x[:1], x[1:] * 1000])             # a token does not depend on the others
    assert torch.equal(layer(loud)[0], result[0])


def test_fp8_is_for_the_layers_of_the_image_tower(monkeypatch, tmp_path):
    model = tiny_siglip()
    with pytest.raises(ValueError, match="multiples of 16 channels.* 16 and 24"):
        teacher.use_fp8(model)
    torch.manual_seed(0)
    model = SigLIP(SigLIPConfig(VisionConfig(32, 64, 2, 2, image_size=12, patch_size=4),
                                TextConfig(16, 32, 2, 2, len(WORDS), max_position_embeddings=6, pad_token_id=0)),
                   word_tokenizer())
    model.save_pretrained(tmp_path)
    plain = teacher.load_teacher(str(tmp_path), torch.device("cpu"))
    with pytest.raises(ValueError, match="teacher_fp8"):
        teacher.load_teacher(str(tmp_path), torch.device("cpu"), fp8=True)
    monkeypatch.setattr(teacher, "require_fp8", lambda device: None)
    fp8 = teacher.load_teacher(str(tmp_path), torch.device("cpu"), fp8=True)
    replaced = {name for name, module in fp8.named_modules() if isinstance(module, teacher.Float8Linear)}
    assert replaced == {name for name, module in plain.named_modules()
                        if isinstance(module, nn.Linear) and name.startswith("vision_model.encoder.")}
    assert len(replaced) == 2 * 6 and not any(p.requires_grad for p in fp8.parameters())
    pixels = torch.randn(2, 3, 12, 12, generator=seeded())
    x, y = (m.forward_features(pixels) for m in (plain, fp8))
    assert 0 < (x - y).norm() < 0.1 * x.norm()


def test_a_teacher_is_loaded_in_bf16_on_a_gpu_and_in_fp32_on_a_cpu(monkeypatch):
    load = Mock()
    monkeypatch.setattr(SigLIP, "from_pretrained", load)
    for device, dtype in ((torch.device("cuda"), torch.bfloat16), (torch.device("cpu"), torch.float32)):
        assert teacher.load_teacher("folder", device) is load("folder", dtype, True).to(device)
        assert load.call_args_list[-2:] == [call("folder", dtype, True)] * 2
        assert load.return_value.to.call_args_list[-2:] == [call(device)] * 2


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    gpu = torch.device("cuda", 0)
    for capability, message in (((8, 0), "compute capability 8.0"), ((8, 6), "8.6"), ((8, 9), ""), ((9, 0), ""),
                                ((12, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        with pytest.raises(ValueError, match=f"8.9.*{message}") if message else nullcontext():
            teacher.require_fp8(gpu)
    with pytest.raises(ValueError, match="teacher_fp8 needs a GPU of compute capability 8.9 or more, got cpu"):
        teacher.require_fp8(torch.device("cpu"))


@pytest.mark.gpu
@needs_cuda
def test_a_layer_in_fp8_on_a_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that has fp8")
    linear = nn.Linear(64, 96).cuda().bfloat16().requires_grad_(False)
    x = torch.randn(3, 7, 64, device="cuda", dtype=torch.bfloat16)
    rounded = [y.double() * scale.double() for y, scale in map(teacher.quantize_fp8, (x.flatten(0, 1), linear.weight))]
    expected = (rounded[0] @ rounded[1].T + linear.bias.double()).view(3, 7, 96)
    torch.testing.assert_close(teacher.Float8Linear(linear)(x).double(), expected, rtol=2 ** -7, atol=1e-2)
