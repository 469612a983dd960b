"""tools.natural_clip: tokens and attention are those of the ViT in the ONNX file, and each row has its own mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from helpers.runs import assert_one_line, command
from PIL import Image

from tools import natural_clip
from video import write_video

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
C = 8                                                               # channels of the small ViT


@pytest.fixture
def model(tmp_path):
    """A ViT of one attention map: -> path, weights of the patch embedding (C, 3, 14, 14), class token (1, 1, C)."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((C, 3, 14, 14), np.float32) / 14
    class_token = generator.standard_normal((1, 1, C), np.float32)
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [node("Conv", ["pixels", "weights"], ["maps"], strides=[14, 14]), node("Softmax", ["maps"], ["earlier"]),
             node("Reshape", ["maps", "shape"], ["rows"]), node("Transpose", ["rows"], ["patches"], perm=[0, 2, 1]),
             node("Concat", ["class_token", "patches"], [natural_clip.TOKENS], axis=1),
             node("Transpose", [natural_clip.TOKENS], ["columns"], perm=[0, 2, 1]),
             node("MatMul", [natural_clip.TOKENS, "columns"], ["products"]),
             node("Unsqueeze", ["products", "one"], ["logits"]), node("Softmax", ["logits"], ["attention"], axis=-1),
             node("ReduceSum", ["attention"], ["decoded"])]
    constants = {"weights": weights, "class_token": class_token, "shape": np.array([1, C, -1]), "one": np.array([1])}
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(nodes, "vit", [value("pixels", floats, [1, 3, 224, 224])],
                                   [value("decoded", floats, None)],
                                   [onnx.numpy_helper.from_array(x, name) for name, x in constants.items()])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "vit.onnx")
    return str(tmp_path / "vit.onnx"), torch.from_numpy(weights), torch.from_numpy(class_token)


def test_tokens_and_attention_are_those_of_the_model(model):
    path, weights, class_token = model
    frames = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (3, 3, 28, 42), np.uint8))
    vit = natural_clip.OnnxViT(path, (2, 3))
    pixels = vit.normalize(frames)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels, ((frames.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2))
    tokens = vit.forward_features(pixels)
    patches = nnf.conv2d(pixels, weights, stride=14).flatten(2).mT
    torch.testing.assert_close(tokens, patches, rtol=1e-4, atol=1e-4)
    rows = torch.cat([class_token.expand(3, 1, C), patches], 1)
    share = (rows[:, :1] @ rows.mT).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(vit.pool_attention(tokens), share / share.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_the_command_draws_a_row_for_each_mask(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", np.random.default_rng(0).integers(0, 255, (7, 56, 84, 3), np.uint8), fps=2)
    results, compute_masks = [], natural_clip.plot_masks.__globals__["compute_masks"]
    monkeypatch.setitem(natural_clip.plot_masks.__globals__, "compute_masks",
                        lambda *args: results.append(compute_masks(*args)) or results[-1])
    code, out, err = command("tools.natural_clip", ["clip.mp4", model[0], "--height", "4", "--width", "6", "--ratio",
                                                    "0.75", "--frames", "5", "--out", "m.png"], capsys)
    assert code == 0 and out.endswith("written to m.png\n"), err
    with Image.open("m.png") as image:
        assert image.format == "PNG" and image.mode == "RGB" and min(image.size) > 200
    result, = results
    assert result.grid == (4, 6) and list(result.masks) == ["ClusterSTM", "UMT", "tube", "random"]
    assert all((visible.sum(1) == 6).all() for visible in result.masks.values())
    assert (result.masks["tube"] == result.masks["tube"][0]).all()
    assert (result.masks["random"] != result.masks["random"][0]).any()


def test_a_file_that_is_no_model_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=2)
    for name, content in (("missing.onnx", None), ("damaged.onnx", b"\xff" * 99), ("other.onnx", b"")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code, _, err = command("tools.natural_clip", ["clip.mp4", name], capsys)
        assert_one_line("tools.natural_clip", code, err, name)
