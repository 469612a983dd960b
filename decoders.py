"""
The student's decoders, which predict tokens of the teacher or pixels from the encoded visible tokens, and ModelConfig.

    tokens (B, S, C), visible_ids (B, S), query_ids (B, Q), grid (T, h, w)  ->  (B, Q, E), or pixels of the Q patches
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from blocks import Block, init_xavier
from encoders import ViTConfig, check_choices, check_heads
from positions import sincos_pos_embed


@dataclass(frozen=True)
class ModelConfig:
    """The student's decoder and losses."""
    embed_dim: int = 512         # width of the joint space of videos and texts (VTC)
    # what the feature of a video is. frames: the mean over frames of the unit vector of each frame's mean token;
    # tokens: the unit vector of the mean of all visible tokens; cls: that of the class token, which needs vit.cls
    pooling: Literal["frames", "tokens", "cls"] = "frames"
    decoder: Literal["cross", "joint"] = "cross"    # cross: queries attend to visible tokens; joint: self-attention
    decoder_width: int = 512     # channels of the decoder
    decoder_depth: int = 2       # number of decoder blocks
    decoder_heads: int = 8       # attention heads of the decoder
    decoder_query_ratio: float = 0.25    # share of the masked tokens that a cross decoder predicts per step, in (0, 1]
    # cross: this many masked tokens of each clip are predicted per step; 0: decoder_query_ratio's share of them or, if
    # grids or budgets vary, of their median number, as train.py sets it. joint: all masked tokens are predicted
    decoder_queries: int = 0
    target_dim: int = 0          # width of the teacher's token embeddings; 0: as in the teacher
    proportional: bool = False   # weight each visible token by the number of tokens it represents (Token Merging)
    mrm_texts: Literal["batch", "own", "none"] = "batch"    # captions of MRM: the batch's, the clip's own, none (L2)
    # relevance: MRM, the relevance of masked tokens to captions; visible: UMT's alignment of visible tokens; pixels:
    # MAE's reconstruction of masked pixels
    objective: Literal["relevance", "visible", "pixels"] = "relevance"
    # distillation of a video's feature between the budgets of a step (train.py's all_budgets): from each to the next
    # smaller one (chain), or from the largest to all (star)
    distill: Literal["none", "chain", "star"] = "none"
    # 1 - cosine; or smooth L1 of unit vectors, as in FluxViT's release, which is (1 - cosine) / embed_dim
    distill_loss: Literal["cosine", "smooth_l1"] = "cosine"
    distill_weight: float = 1.0  # loss weight of this distillation
    mrm_weight: float = 1.0      # loss weight of the objective, MRM or what replaces it; a loss of weight 0 is left out
    vtc_weight: float = 1.0      # loss weight of video-text contrast
    vtm_weight: float = 1.0      # loss weight of video-text matching
    mlm_weight: float = 1.0      # loss weight of masked language modelling

    def __post_init__(self):
        check_heads("model.decoder_width", self.decoder_width, "model.decoder_heads", self.decoder_heads)
        check_choices(self, "model")
        if not 0 < self.decoder_query_ratio <= 1:
            raise ValueError(f"model.decoder_query_ratio must be in (0, 1], got {self.decoder_query_ratio}")
        if self.decoder_queries < 0:
            raise ValueError(f"model.decoder_queries must be at least 0, got {self.decoder_queries}")
        if self.distill != "none" and not self.distill_weight:
            raise ValueError(f"model.distill_weight must be above 0 with model.distill {self.distill!r}, got 0")
        for name in ("mrm", "vtc", "vtm", "mlm", "distill"):
            if not getattr(self, f"{name}_weight") >= 0:        # as NaN is not
                raise ValueError(f"model.{name}_weight must be at least 0, got {getattr(self, f'{name}_weight')}")

    @property
    def losses(self) -> frozenset[str]:
        """The losses that are computed, those with a weight: of "mrm" (the objective), "vtc", "vtm" and "mlm"."""
        return frozenset(name for name in ("mrm", "vtc", "vtm", "mlm") if getattr(self, f"{name}_weight"))

    @property
    def reads_texts(self) -> bool:
        """Whether a loss reads the captions, so that a text encoder is trained."""
        return not self.losses <= {"mrm"}

    @property
    def uses_text_embeds(self) -> bool:
        """Whether a loss reads the teacher's embeddings of captions."""
        return "mrm" in self.losses and self.objective == "relevance" and self.mrm_texts != "none"


def loss_weights(cfg: ModelConfig) -> dict[str, float]:
    """Return weights by loss name. "align" and "pixels" are the losses of the objectives that replace MRM."""
    return {**dict.fromkeys(("mrm", "align", "pixels"), cfg.mrm_weight),
            **{name: getattr(cfg, f"{name}_weight") for name in ("vtc", "vtm", "mlm", "distill")}}


class Decoder(nn.Module):
    """Predict masked tokens from the visible ones: their embeddings in the teacher's joint space, or their pixels."""

    def __init__(self, vit: ViTConfig, cfg: ModelConfig):
        super().__init__()
        self.pos_embed, self.reference_grid, self.is_joint = vit.pos_embed, vit.grid, cfg.decoder == "joint"
        self.predicts_pixels = cfg.objective == "pixels"
        C = cfg.decoder_width
        self.in_proj = nn.Linear(vit.width, C)
        self.query = nn.Parameter(torch.empty(C))
        self.blocks = nn.ModuleList(Block(C, cfg.decoder_heads, cross=not self.is_joint)
                                    for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.proj = nn.Linear(C, 3 * vit.patch_size ** 2 if self.predicts_pixels else cfg.target_dim)
        self.apply(init_xavier)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor, visible_ids: Tensor, query_ids: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """
        tokens (B, S, C) of the visible_ids (B, S), query_ids (B, Q) flat, grid (T, h, w) -> (B, Q, E) of unit length,
        or (B, Q, 3 patch_size^2) if it predicts pixels.
        """
        positions = sincos_pos_embed(grid, len(self.query), self.pos_embed, tokens.device, self.reference_grid)
        tokens = self.in_proj(tokens) + positions[visible_ids]
        x = self.query + positions[query_ids]
        if self.is_joint:
            x = torch.cat([tokens, x], 1)
        for block in self.blocks:
            x = block(x) if self.is_joint else block(x, tokens)
        x = self.proj(self.norm(x[:, -query_ids.shape[1]:])).float()
        return x if self.predicts_pixels else nnf.normalize(x, dim=-1)


class LinearDecoder(nn.Module):
    """UMT's decoder, on the last layer only: predict the embeddings of the visible tokens (Linear_Decoder of UMT)."""

    def __init__(self, vit: ViTConfig, cfg: ModelConfig):
        super().__init__()
        self.pos_embed, self.reference_grid = vit.pos_embed, vit.grid
        self.head, self.norm = nn.Linear(vit.width, cfg.target_dim), nn.LayerNorm(cfg.target_dim)
        self.apply(init_xavier)

    def forward(self, tokens: Tensor, visible_ids: Tensor, query_ids: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """tokens (B, S, C) of the visible_ids (B, S), which are the query_ids -> (B, S, E) of unit length."""
        positions = sincos_pos_embed(grid, tokens.shape[-1], self.pos_embed, tokens.device, self.reference_grid)
        return nnf.normalize(self.norm(self.head(tokens + positions[visible_ids])).float(), dim=-1)
