"""
The transformer block of the student's ViT and decoders, with the options of FluxViT (arXiv 2503.14237, §3.3).

    Block  x (B, S, C), context (B, S', C) of a cross block  ->  (B, S, C)

docs/method.md has the options' equations.
"""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

Norm = Literal["layer", "rms"]
LocalPos = Literal["none", "affine", "linear"]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight, as LayerNorm is under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(kind: Norm | Literal["none"], C: int) -> nn.Module:
    """Make a norm of C channels that begins as the plain norm: factors 1, and shifts 0 of a LayerNorm."""
    return nn.Identity() if kind == "none" else {"layer": nn.LayerNorm, "rms": RMSNorm}[kind](C, eps=1e-6)


def init_xavier(module: nn.Module):
    """Initialise a linear layer: Xavier-uniform weight, bias 0. Other modules stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class LocalPosition(nn.Module):
    """
    The term LPE V of FluxViT's attention Z = (softmax(Q K^T / sqrt D) + LPE) V: a function of a token's own values.

    "affine", the release's: w v + b of each channel. "linear", the paper's: a matrix (D, D) for each head. Both begin
    as the identity. Neither contains a position or another token, despite its name: it is a second path from a token's
    values to its own output.
    """

    def __init__(self, kind: LocalPos, C: int, heads: int):
        super().__init__()
        D, self.is_affine = C // heads, kind == "affine"
        self.weight = nn.Parameter(torch.ones(C) if self.is_affine else torch.eye(D).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(C)) if self.is_affine else None

    def forward(self, v: Tensor) -> Tensor:
        """v (B, H, S, D) -> (B, H, S, D)."""
        if self.is_affine:
            H, D = v.shape[1], v.shape[3]
            return v * self.weight.view(H, 1, D) + self.bias.view(H, 1, D)
        return v @ self.weight


class Block(nn.Module):
    """Pre-norm transformer block with self-attention or, if cross, with attention to a context."""

    def __init__(self, C: int, heads: int, drop_path: float = 0.0, cross: bool = False, norm: Norm = "layer",
                 qk_norm: bool = False, qkv_bias: bool = True, layer_scale: float = 0.0, local_pos: LocalPos = "none"):
        """norm to local_pos: as in ViTConfig; local_pos is for self-attention alone."""
        super().__init__()
        self.heads, self.use_drop_path = heads, drop_path > 0
        # The rate is a tensor: torch.compile would make one program per value of a Python number.
        self.register_buffer("drop_path", torch.tensor(drop_path), persistent=False)
        self.norm1 = make_norm(norm, C)
        if cross:
            self.norm_kv, self.q, self.kv = make_norm(norm, C), nn.Linear(C, C), nn.Linear(C, 2 * C)
        else:
            self.qkv = nn.Linear(C, 3 * C, bias=qkv_bias)
        self.q_norm, self.k_norm = (make_norm("rms" if qk_norm else "none", C) for _ in range(2))
        self.local_pos = None if local_pos == "none" else LocalPosition(local_pos, C, heads)
        self.proj = nn.Linear(C, C)
        self.norm2 = make_norm(norm, C)
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.scale1, self.scale2 = (nn.Parameter(layer_scale * torch.ones(C)) if layer_scale else None
                                    for _ in range(2))

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, H, S, C / H)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def apply_drop_path(self, x: Tensor) -> Tensor:
        """In training, set the residual branch of randomly chosen clips to 0 and scale up the others."""
        if not (self.training and self.use_drop_path):
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)

    def add_branch(self, x: Tensor, y: Tensor, scale: nn.Parameter | None) -> Tensor:
        """Add the residual branch y to x, multiplied by the factors of layer_scale."""
        return x + self.apply_drop_path(y if scale is None else y * scale)

    def attend(self, x: Tensor, context: Tensor | None, bias: Tensor | None) -> Tensor:
        """Attention of the normalised x, the rest as of forward -> (B, S, C)."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, (k, v) = self.q(x), self.kv(self.norm_kv(context)).chunk(2, -1)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)           # over the channels of all heads
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        z = sdpa(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        if self.local_pos is not None:
            z = z + self.local_pos(v)
        return self.proj(z.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x (B, S, C), context (B, S', C) of a cross block, bias (B, 1, 1, S) added to the logits -> (B, S, C)."""
        x = self.add_branch(x, self.attend(self.norm1(x), context, bias), self.scale1)
        return self.add_branch(x, self.fc2(nnf.gelu(self.fc1(self.norm2(x)))), self.scale2)
