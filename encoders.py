"""
The student's encoders: a ViT for video and a BERT for text.

    ViT   video (B, T, 3, H, W) uint8, visible_ids (B, S)  ->  tokens (B, S, C)
    Bert  text ids (M, L)                                  ->  states (M, L, D), which its last layers fuse with tokens

The ViT follows UMT (OpenGVLab/unmasked_teacher, multi_modality/models/backbones/vit/vit.py): joint space-time
attention, tubelets of one frame, no class token. ViTConfig adds the modules of FluxViT (arXiv 2503.14237, §3.3). The
BERT has the parameter names of Hugging Face (transformers, models/bert/modeling_bert.py). As in UMT
(multi_modality/models/backbones/bert/xbert.py), its first layers read text only and its last layers also attend to the
video.
"""

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from blocks import Block, LocalPos, Norm, init_xavier, make_norm
from files import (
    config_from_dict,
    load_state_dict_strict,
    read_checkpoint,
    require,
    resolve_checkpoint,
    save_weights,
    write_json,
)
from inputs import require_clips
from kernels import to_device
from positions import NEEDS_GRID, GlobalPos, PosEmbed, convolve_pos_embed, interpolate_pos_embed, sincos_pos_embed
from runtime import print0
from video import gather_tokens, patchify


@dataclass(frozen=True)
class ViTConfig:
    """The student's video encoder."""
    patch_size: int = 16         # pixels per side of a patch; one patch of one frame is a token
    width: int = 768             # channels
    depth: int = 12              # number of blocks
    heads: int = 12              # attention heads
    drop_path: float = 0.1       # stochastic depth rate of the last block; it rises linearly from 0 in the first
    # sinusoids of the flat (t, h, w) index (1d, as in UMT), of the index on each axis (3d) or of the place on each axis
    # of a reference grid (relative); learned: a table that is interpolated to the clip's grid
    pos_embed: PosEmbed = "1d"
    # frames of a clip, patches down and across a frame: the reference grid of relative positions, the size of the table
    # of learned ones; empty: train.py sets it
    grid: tuple[int, ...] = ()
    # norm of a patch's pixels before the projection, and of its embedding after it (FluxViT: layer in the paper, rms in
    # the release)
    patch_norm: Literal["none", "layer", "rms"] = "none"
    # what attention adds to a token's output, computed from that token's values: w v + b of each channel (affine, as
    # released) or a matrix for each head (linear, as in the paper)
    local_pos: LocalPos = "none"
    # what is done to the table of learned positions before it is interpolated: w p + b of each channel (affine, as
    # released) or a depth-wise 3 x 3 x 3 convolution (conv, as in the paper)
    global_pos: GlobalPos = "none"
    norm: Norm = "layer"         # norm of the blocks and of their output: LayerNorm or RMSNorm
    qk_norm: bool = False        # RMSNorm of queries and keys, over the channels of all heads
    layer_scale: float = 0.0     # start of a factor for each channel of a residual branch; 0: no factors
    qkv_bias: bool = True        # biases of queries, keys and values
    cls: bool = False            # add a class token to the tokens of the patches

    def __post_init__(self):
        check_heads("vit.width", self.width, "vit.heads", self.heads)
        check_choices(self, "vit")
        if self.global_pos != "none" and self.pos_embed != "learned":
            raise ValueError(f"vit.pos_embed must be 'learned' with vit.global_pos {self.global_pos!r}, got "
                             f"{self.pos_embed!r}")
        if not 0 <= self.layer_scale < math.inf:                    # as NaN is not
            raise ValueError(f"vit.layer_scale must be at least 0 and finite, got {self.layer_scale}")
        object.__setattr__(self, "grid", tuple(self.grid))          # JSON has lists
        if self.grid and not (len(self.grid) == 3 and all(isinstance(n, int) and n > 0 for n in self.grid)):
            raise ValueError(f"vit.grid must be empty or three positive numbers (T, h, w), got {self.grid}")


@dataclass(frozen=True)
class TextEncoderConfig:
    """The student's text encoder."""
    width: int = 768             # channels
    depth: int = 12              # number of layers
    heads: int = 12              # attention heads
    fusion_layers: int = 3       # number of last layers that attend to the video
    dropout: float = 0.1         # dropout rate, also of the attention weights
    vocab_size: int = 0          # size of the vocabulary; 0: as in the tokenizer
    mask_token_id: int = 0       # id of [MASK]; 0: as in the tokenizer
    max_length: int = 32         # tokens per caption, [CLS] included; longer captions are truncated

    def __post_init__(self):
        check_heads("text.width", self.width, "text.heads", self.heads)
        if not 0 < self.fusion_layers < self.depth:
            raise ValueError(f"text.fusion_layers must be 1 to {self.depth - 1}, as text.depth is {self.depth}, got "
                             f"{self.fusion_layers}")


def check_heads(width_name: str, width: int, heads_name: str, heads: int):
    """Raise a ValueError if the channels cannot be split evenly into the heads."""
    if width % heads:
        raise ValueError(f"{width_name} must be a multiple of {heads_name} ({heads}), got {width}")


def check_choices(cfg, part: str):
    """Raise a ValueError if a Literal field of a dataclass has none of its values; part: its name in the run config."""
    for f in fields(cfg):
        value, choices = getattr(cfg, f.name), get_args(f.type)
        if get_origin(f.type) is Literal and value not in choices:
            raise ValueError(f"{part}.{f.name} must be one of {', '.join(choices)}, got {value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# ViT

class ViT(nn.Module):
    """Joint space-time ViT for any T, H and W. It encodes all tokens of a clip or only the visible ones."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's, as in UMT

    def __init__(self, cfg: ViTConfig):
        super().__init__()
        if cfg.pos_embed in NEEDS_GRID and not cfg.grid:
            raise ValueError(f"vit.grid must be (T, h, w) with vit.pos_embed {cfg.pos_embed!r}, got {cfg.grid}")
        C, pixels = cfg.width, 3 * cfg.patch_size ** 2
        self.patch_size, self.pos_embed, self.reference_grid = cfg.patch_size, cfg.pos_embed, cfg.grid
        self.patch_norm_in, self.patch_norm_out = make_norm(cfg.patch_norm, pixels), make_norm(cfg.patch_norm, C)
        self.patch_embed = nn.Linear(pixels, C)
        self.blocks = nn.ModuleList(Block(C, cfg.heads, cfg.drop_path * i / max(1, cfg.depth - 1), norm=cfg.norm,
                                          qk_norm=cfg.qk_norm, qkv_bias=cfg.qkv_bias, layer_scale=cfg.layer_scale,
                                          local_pos=cfg.local_pos)
                                    for i in range(cfg.depth))
        self.norm = make_norm(cfg.norm, C)
        self.apply(init_xavier)
        for name, values in (("pixel_mean", self.mean), ("pixel_std", self.std)):
            values = torch.tensor(values).repeat_interleave(cfg.patch_size ** 2)
            self.register_buffer(name, values, persistent=False)
        if cfg.pos_embed == "learned":          # "embedding" in its name: it has no weight decay
            table = sincos_pos_embed(cfg.grid, C, "learned", torch.device("cpu"), cfg.grid)
            self.position_embedding = nn.Parameter(table.unflatten(0, cfg.grid).clone())
        self.position_embedding_kernel = self.position_embedding_bias = self.cls_token = None
        # They begin as the identity. "embedding" again: decay would shrink the positions, as it would in the table.
        if cfg.global_pos != "none":
            k = 3 if cfg.global_pos == "conv" else 1
            kernel = torch.zeros(k, k, k, C)
            kernel[k // 2, k // 2, k // 2] = 1
            self.position_embedding_kernel = nn.Parameter(kernel)
            self.position_embedding_bias = nn.Parameter(torch.zeros(C))
        if cfg.cls:                             # one dimension: no weight decay, which would pull it to 0
            self.cls_token = nn.Parameter(0.02 * torch.randn(C))

    def grid_size(self, video: Tensor) -> tuple[int, int, int]:
        """video (B, T, 3, H, W) uint8 -> (T, h, w), its frames and the patches down and across a frame."""
        require_clips(video)
        return video.shape[1], video.shape[3] // self.patch_size, video.shape[4] // self.patch_size

    def positions(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """Embed the positions of the tokens of a grid (T, h, w) -> (Thw, C)."""
        if self.pos_embed != "learned":
            return sincos_pos_embed(grid, self.patch_embed.out_features, self.pos_embed, device, self.reference_grid)
        table, kernel = self.position_embedding, self.position_embedding_kernel
        table = table if kernel is None else convolve_pos_embed(table, kernel, self.position_embedding_bias)
        return interpolate_pos_embed(table, grid)

    def patch_pixels(self, video: Tensor, ids: Tensor | None) -> Tensor:
        """video (B, T, 3, H, W) uint8, flat ids (B, S) or None for all tokens -> normalised (B, S, 3 patch_size^2)."""
        x = patchify(video.flatten(0, 1), self.patch_size).view(len(video), -1, self.patch_embed.in_features)
        x = gather_tokens(x, ids)       # masked patches are removed before anything is computed from them
        return (x.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std

    def embed_patches(self, video: Tensor, ids: Tensor | None = None) -> Tensor:
        """
        Embed patches without their positions: video as of forward, flat ids (B, S) or None for all -> (B, S, C).

        With patch_norm these are the embeddings after the second norm, as in FluxViT's release. A mask that compares
        them chooses worse than one that compares embeddings without norms: on clips of `crowd`, RMSNorm costs 7 to 10
        points of the objects covered, LayerNorm 20 to 27 (docs/results.md, "FluxViT's selector and patch norms").
        """
        return self.patch_norm_out(self.patch_embed(self.patch_norm_in(self.patch_pixels(video, ids))))

    def encode(self, video: Tensor, visible_ids: Tensor | None = None, token_size: Tensor | None = None,
               patch_embeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """
        video (B, T, 3, H, W) uint8, visible_ids (B, S) flat or None for all tokens -> tokens (B, S, C), and the state
        of the class token (B, C), None without one.

        token_size (B, S): how many tokens each visible one represents. It attracts as much attention as that many
        equal tokens (proportional attention of Token Merging, Bolya et al., arXiv 2210.09461). The class token
        represents one.

        patch_embeds (B, TN, C): what embed_patches returns for all tokens, if it was computed to select the visible
        ones. Those are gathered from it; otherwise only the visible patches are embedded.
        """
        grid, C = self.grid_size(video), self.patch_embed.out_features
        if patch_embeds is None:
            x = self.embed_patches(video, visible_ids)
        elif patch_embeds.shape == (len(video), math.prod(grid), C):
            x = gather_tokens(patch_embeds, visible_ids)
        else:
            raise ValueError(f"patch_embeds must be {(len(video), math.prod(grid), C)}, embeddings of all tokens, got "
                             f"{tuple(patch_embeds.shape)}")
        positions = self.positions(grid, video.device)
        # Not positions[visible_ids]: with several threads of a CPU its backward pass is not deterministic.
        x = x + (positions if visible_ids is None else nnf.embedding(visible_ids, positions))
        bias = None if token_size is None else token_size.log()[:, None, None]              # (B, 1, 1, S)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), 1, C), x], 1)
            bias = None if bias is None else nnf.pad(bias, (1, 0))                          # log 1
        for block in self.blocks:
            x = block(x, bias=bias)
        x = self.norm(x)
        return (x, None) if self.cls_token is None else (x[:, 1:], x[:, 0])

    def forward(self, video: Tensor, visible_ids: Tensor | None = None, token_size: Tensor | None = None,
                patch_embeds: Tensor | None = None) -> Tensor:
        """Return the tokens (B, S, C) of encode alone."""
        return self.encode(video, visible_ids, token_size, patch_embeds)[0]


# ---------------------------------------------------------------------------------------------------------------------
# BERT

MAX_PADDING = 1024       # a vocabulary is padded by fewer entries; one that is larger is that of another tokenizer


@dataclass
class BertConfig:
    """Names and defaults of Hugging Face's BertConfig, and the size of the fusion layers."""
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1        # also of the attention weights: attention_probs_dropout_prob is not read
    layer_norm_eps: float = 1e-12
    fusion_layers: int = 3       # number of last layers that have cross-attention
    encoder_width: int = 768     # channels of the context that these attend to
    is_decoder: bool = False     # causal self-attention


def bert_config(text: TextEncoderConfig, video_width: int) -> BertConfig:
    """Build the BertConfig of a student's text encoder; video_width: channels of the video tokens."""
    return BertConfig(
        vocab_size=text.vocab_size, hidden_size=text.width, num_hidden_layers=text.depth,
        num_attention_heads=text.heads, intermediate_size=4 * text.width, hidden_dropout_prob=text.dropout,
        max_position_embeddings=512, fusion_layers=text.fusion_layers, encoder_width=video_width,
    )


def read_bert_config(values: dict, path: str, **changes) -> BertConfig:
    """
    Build a BertConfig from a config.json of Hugging Face. Absent keys have the published defaults.

    changes replace what does not affect the pretrained weights: dropout and fusion. vocab_size may be less than in the
    file, by fewer than MAX_PADDING entries: then that of the file is padded. Any other change must equal the value in
    the file. A ValueError names the file and the field of whatever this BERT does not support.
    """
    values = {k: v for k, v in values.items() if v is not None}
    model_type = values.get("model_type", "bert")
    require(model_type == "bert", path, "model_type", "'bert'", model_type)
    architectures = values.get("architectures", [])
    require("model_type" in values or all(str(name).startswith("Bert") for name in architectures), path,
            "architectures", "those of a BERT", architectures)
    for key, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False),
                          ("pad_token_id", Bert.PAD_ID)):
        value = values.get(key, expected)
        require(value == expected, path, key, repr(expected), value)
    settings = asdict(config_from_dict(BertConfig, values, path, strict=False))
    for f in fields(BertConfig):
        value = settings[f.name]
        require(isinstance(value, (int, f.type)), path, f.name, f"of type {f.type.__name__}", value)
        may_be_zero = f.name in ("hidden_dropout_prob", "fusion_layers", "is_decoder")
        require(value > 0 or may_be_zero and value == 0, path, f.name, "positive", value)
    padded_size = settings["vocab_size"]
    vocab_size = changes.get("vocab_size", padded_size)
    require(vocab_size <= padded_size < vocab_size + MAX_PADDING, path, "vocab_size",
            f"{vocab_size}, the number of entries of the tokenizer, or up to {MAX_PADDING - 1} more", padded_size)
    for key, value in changes.items():
        may_change = key in ("hidden_dropout_prob", "fusion_layers", "encoder_width", "vocab_size")
        require(may_change or settings.get(key) == value, path, key, repr(value), settings.get(key))
    cfg = BertConfig(**{**settings, **changes})
    heads, layers = cfg.num_attention_heads, cfg.num_hidden_layers
    require(cfg.hidden_size % heads == 0, path, "hidden_size",
            f"a multiple of num_attention_heads ({heads})", cfg.hidden_size)
    require(0 <= cfg.fusion_layers <= layers, path, "fusion_layers", f"0 to num_hidden_layers ({layers})",
            cfg.fusion_layers)
    return cfg


class BertSelfAttention(nn.Module):
    """Attention of a text to itself or, in crossattention, to a context."""

    def __init__(self, cfg: BertConfig, context_width: int):
        super().__init__()
        self.heads, self.dropout = cfg.num_attention_heads, cfg.hidden_dropout_prob
        self.query = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.key = nn.Linear(context_width, cfg.hidden_size)
        self.value = nn.Linear(context_width, cfg.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """(M, L, D) -> (M, H, L, D / H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, context_index: Tensor | None = None,
                past: list | None = None) -> Tensor:
        """
        x (M, L, D), context (B, S, D'), mask (M, 1, 1 or L, S), context_index (R,) -> (M, L, D), before the output
        layer. The texts attend to the contexts as in Bert.forward_fusion. If several share a context in order, as the
        beams of a search do, the mask is that of the contexts, (B, 1, 1, S).

        past: a KV cache, empty at first. Self-attention appends to it; cross-attention fills it once and reuses it.
        """
        if past and context is not x:
            k, v = past
        else:
            k, v = self.split_heads(self.key(context)), self.split_heads(self.value(context))
            if past:
                k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        if past is not None:
            past[:] = k, v
        q, parts = self.query(x), []
        in_order = len(x) if context_index is None else len(x) - len(context_index)
        if in_order:                # the texts of one context become queries of one attention, which share its keys
            y = self.attend(q[:in_order].view(len(k), -1, q.shape[-1]), k, v, mask)
            parts.append(y.reshape(in_order, *q.shape[1:]))
        if in_order < len(x):       # keys and values are computed once a context, then repeated
            parts.append(self.attend(q[in_order:], k[context_index], v[context_index], mask))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (B, L, D), keys and values (B, H, S, D / H), mask (B, 1, 1 or L, S) -> (B, L, D)."""
        y = sdpa(self.split_heads(q), k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(q.shape)


class BertOutput(nn.Module):
    """Dense layer, dropout, residual, LayerNorm."""

    def __init__(self, cfg: BertConfig, in_width: int):
        super().__init__()
        self.dense = nn.Linear(in_width, cfg.hidden_size)
        self.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = nn.Dropout(cfg.hidden_dropout_prob)

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(y)))


class BertAttention(nn.Module):
    def __init__(self, cfg: BertConfig, context_width: int):
        super().__init__()
        self.self = BertSelfAttention(cfg, context_width)
        self.output = BertOutput(cfg, cfg.hidden_size)

    def forward(self, x, context, mask, context_index=None, past=None):
        return self.output(self.self(x, context, mask, context_index, past), x)


class BertIntermediate(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.dense = nn.Linear(cfg.hidden_size, cfg.intermediate_size)


class BertLayer(nn.Module):
    """Self-attention, cross-attention if the layer fuses and a context is passed, MLP."""

    def __init__(self, cfg: BertConfig, fusion: bool):
        super().__init__()
        self.attention = BertAttention(cfg, cfg.hidden_size)
        if fusion:
            self.crossattention = BertAttention(cfg, cfg.encoder_width)
        self.intermediate = BertIntermediate(cfg)
        self.output = BertOutput(cfg, cfg.intermediate_size)

    def forward(self, x, mask, context=None, context_index=None, context_mask=None, past=(None, None), only_cls=False):
        """
        past: the KV caches of self-attention and cross-attention. only_cls: compute only the state of [CLS], (M, 1, D).
        The rest is as in BertSelfAttention.
        """
        x = self.attention(x[:, :1] if only_cls else x, x, mask, None, past[0])
        if context is not None:
            x = self.crossattention(x, context, context_mask, context_index, past[1])
        return self.output(nnf.gelu(self.intermediate.dense(x)), x)


class BertEmbeddings(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(cfg.vocab_size, cfg.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)
        self.token_type_embeddings = nn.Embedding(cfg.type_vocab_size, cfg.hidden_size)
        self.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = nn.Dropout(cfg.hidden_dropout_prob)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """ids (M, L), the first of them at position `start` -> (M, L, D)."""
        end, limit = start + ids.shape[1], self.position_embeddings.num_embeddings
        if end > limit:
            raise ValueError(f"a text must have at most {limit} tokens (max_position_embeddings), got {end}")
        position = self.position_embeddings.weight[start:end]
        x = self.word_embeddings(ids) + position + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class BertEncoder(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        first = cfg.num_hidden_layers - cfg.fusion_layers
        self.layer = nn.ModuleList(BertLayer(cfg, i >= first) for i in range(cfg.num_hidden_layers))


class BertModel(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.embeddings = BertEmbeddings(cfg)
        self.encoder = BertEncoder(cfg)


class BertMLMHead(nn.Module):
    """Masked-language-model head. Its output matrix is the word embedding."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.predictions = nn.Module()
        self.predictions.transform = nn.Module()
        self.predictions.transform.dense = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.predictions.transform.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.predictions.bias = nn.Parameter(torch.zeros(cfg.vocab_size))


class Bert(nn.Module):
    """BERT in two parts: forward_text is its first layers, forward_fusion its last, which may attend to a video."""

    PAD_ID = 0
    missing_keys: tuple[str, ...] = ()      # weights that from_pretrained did not find and initialised

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.num_text_layers = cfg.num_hidden_layers - cfg.fusion_layers
        self.bert = BertModel(cfg)
        self.cls = BertMLMHead(cfg)
        # BERT's std of 0.02 is meant for 768 channels. In narrower layers attention would add next to nothing.
        std = 0.02 * max(1, 768 / cfg.hidden_size) ** 0.5
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=std)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward_text(self, ids: Tensor) -> Tensor:
        """ids (M, L) -> states (M, L, D) after the text-only layers."""
        x, mask = self.bert.embeddings(ids), self.attention_mask(ids)
        for layer in self.bert.encoder.layer[:self.num_text_layers]:
            x = layer(x, mask)
        return x

    def forward_fusion(self, states: Tensor, ids: Tensor, context: Tensor | None = None,
                       context_index: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """
        Run the fusion layers: states (M, L, D), ids (M, L), context (B, S, C) -> (M, L, D).

        The last R texts attend to context[context_index], context_index (R,). The texts before them, or all without an
        index, attend to the contexts in order, the same number to each: with 2B of them, texts 0 and 1 to context[0].
        Without a context the layers are those of a plain BERT. The context is video tokens or the states of another
        text; context_mask (M, 1, 1, S) is True at the positions to attend to.
        """
        if context_mask is not None and len(states) != len(context if context_index is None else context_index):
            raise ValueError("with a context_mask all texts must have an index, or each context one text, got "
                             f"{len(states)} texts, {len(context)} contexts and "
                             f"{0 if context_index is None else len(context_index)} indices")
        mask = self.attention_mask(ids)
        for layer in self.bert.encoder.layer[self.num_text_layers:]:
            states = layer(states, mask, context, context_index, context_mask)
        return states

    def forward_cls(self, states: Tensor, ids: Tensor, context: Tensor, context_index: Tensor | None = None,
                    full: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """
        Run the fusion layers as forward_fusion does, for the states of [CLS] -> (M, D), and None. What only the other
        states need is left out of the last layer, most of its work.

        full (B,): one text for each context, in order, of which all states are returned too, (B, L, D), not None.
        """
        *layers, last = self.bert.encoder.layer[self.num_text_layers:]
        mask = self.attention_mask(ids)
        for layer in layers:
            states = layer(states, mask, context, context_index)
        cls = last(states, mask, context, context_index, only_cls=True).squeeze(1)
        return cls, None if full is None else last(states[full], mask[full], context)

    def lm_logits(self, states: Tensor) -> Tensor:
        """states (..., D) -> logits (..., vocab_size)."""
        p = self.cls.predictions
        x = p.transform.LayerNorm(nnf.gelu(p.transform.dense(states)))
        return nnf.linear(x, self.bert.embeddings.word_embeddings.weight, p.bias)

    def mlm_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """
        states (M, L, D), labels (M, L), -100 if not predicted -> cross-entropy, summed over the predicted tokens.

        Logits are computed at a fixed number of positions, so that the host never waits for the device to count the
        masked tokens.
        """
        labels = labels.flatten()
        positions = (labels == -100).byte().argsort(stable=True)[:max_masked_tokens(labels.numel())]   # masked first
        logits = self.lm_logits(states.flatten(0, 1)[positions]).float()
        return nnf.cross_entropy(logits, labels[positions], reduction="sum")

    def attention_mask(self, ids: Tensor) -> Tensor:
        """ids (M, L) -> (M, 1, 1, L), True except at padding; of a decoder causal (M, 1, L, L)."""
        mask = (ids != self.PAD_ID)[:, None, None, :]
        return mask & mask.new_ones(2 * ids.shape[1:]).tril() if self.cfg.is_decoder else mask

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Text-only training: ids and labels (M, L), as mask_tokens returns them -> the MLM loss, by name."""
        count = (labels != -100).sum().clamp_min(1)
        return {"mlm": self.mlm_loss(self.forward_fusion(self.forward_text(ids), ids), labels) / count}

    @classmethod
    def from_pretrained(cls, name: str, **changes) -> "Bert":
        """
        Load a folder in Hugging Face's layout, or a hub id: config.json, model.safetensors or its shards. In eval mode.

        Every weight must be present and fit, except that the cross-attention of a fusion layer and the MLM head may be
        absent as a whole. They are then initialised and listed in missing_keys. changes: see read_bert_config. If
        vocab_size is less than in the file, whose vocabulary is padded, the entries beyond it are dropped.
        """
        folder = resolve_checkpoint(name, "a BERT")
        require_safetensors(folder)
        config, weights = read_checkpoint(folder, "a BERT")
        path = os.path.join(folder, "model*.safetensors")
        model = cls(read_bert_config(config, os.path.join(folder, "config.json"), **changes))
        weights = untie_mlm_head(rename_bert_weights(weights), path)
        weights = drop_padding_entries(weights, config.get("vocab_size") or BertConfig.vocab_size,
                                       model.cfg.vocab_size, folder)
        present = {optional_part(key) for key in weights} | {None}
        missing = {key: value for key, value in model.state_dict().items() if optional_part(key) not in present}
        load_state_dict_strict(model, missing | weights, path)
        model.missing_keys = tuple(missing)
        return model.eval()

    def save_pretrained(self, folder: str):
        """Write config.json and model.safetensors. The weights come last: if they are there, the folder is complete."""
        os.makedirs(folder, exist_ok=True)
        config = {"model_type": "bert", **asdict(self.cfg)}
        write_json(os.path.join(folder, "config.json"), config)
        save_weights(self, folder)


def rename_bert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of a BERT checkpoint the names of BertForMaskedLM, and drop those that are not used here."""
    prefix = "" if any(key.startswith("bert.") for key in weights) else "bert."
    renamed = {}
    for key, value in weights.items():
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        key = key if key.startswith("cls.") else prefix + key
        # There is no pooler and no next-sentence head; position_ids are 0, 1, 2, ...
        if not key.startswith(("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")):
            renamed[key] = value
    return renamed


def untie_mlm_head(weights: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Remove the MLM head's copies of tied weights. A copy that differs from its original is a ValueError."""
    for copy, original in (("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
                           ("cls.predictions.decoder.bias", "cls.predictions.bias")):
        value = weights.pop(copy, None)
        if value is not None and not torch.equal(value, weights.setdefault(original, value)):
            raise ValueError(f"{path}: {copy} must equal {original}, as the two are tied here, got other values")
    return weights


def drop_padding_entries(weights: dict[str, Tensor], padded_size: int, vocab_size: int,
                         folder: str) -> dict[str, Tensor]:
    """Cut the word embeddings and the bias of the MLM head from padded_size entries to vocab_size, and print so."""
    if padded_size == vocab_size:
        return weights
    print0(f"{folder} has {padded_size} word embeddings and its tokenizer {vocab_size} entries: the last "
           f"{padded_size - vocab_size} embeddings are dropped")
    words = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    return {key: x[:vocab_size].clone() if key in words and len(x) == padded_size else x for key, x in weights.items()}


def optional_part(key: str) -> str | None:
    """Name the part with this weight if a checkpoint may lack the part: one cross-attention, or the MLM head."""
    if "crossattention" in key:
        return key.split("crossattention")[0]
    return "cls." if key.startswith("cls.") else None


def require_safetensors(folder: str):
    """Raise a FileNotFoundError with the command that converts the weights if a folder only has pytorch_model.bin."""
    names = "pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"
    if [os.path.isfile(os.path.join(folder, name)) for name in names] == [True, False, False]:
        raise FileNotFoundError(
            f"{folder} is not a folder of a BERT: it has no model.safetensors, and pytorch_model.bin is not read; "
            'convert it in that folder: python -c "import torch, safetensors.torch as s; s.save_file({k: '
            "v.contiguous().clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()}, "
            "'model.safetensors')\"")


def mask_tokens(ids: Tensor, vocab_size: int, mask_token_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """
    Mask half of the tokens for MLM, as UMT does: ids (M, L) -> masked ids, labels (-100 if not predicted), both (M, L).

    Of the chosen tokens 80 % become [MASK], 10 % a random token and 10 % stay (BERT). Special tokens, whose ids go up
    to that of [MASK] as in bert-base-uncased, are neither chosen nor drawn. At most max_masked_tokens are chosen, the
    first ones.
    """
    chosen, action = (to_device(torch.rand(ids.shape, generator=generator), ids.device) for _ in range(2))
    random_ids = to_device(torch.randint(mask_token_id + 1, vocab_size, ids.shape, generator=generator), ids.device)
    chosen = (chosen < 0.5) & (ids > mask_token_id)
    chosen &= chosen.flatten().cumsum(0).view(ids.shape) <= max_masked_tokens(ids.numel())
    masked = torch.where(chosen & (action < 0.8), mask_token_id, ids)
    masked = torch.where(chosen & (action >= 0.9), random_ids, masked)
    return masked, torch.where(chosen, ids, -100)


def max_masked_tokens(count: int) -> int:
    """Return how many of `count` tokens are masked at most: half of them and six standard deviations of the count."""
    return min(count, math.ceil(count / 2 + 3 * count ** 0.5))
