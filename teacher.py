"""
The frozen teacher: SigLIP (Zhai et al., ICCV 2023), its two towers, its attention-pooling (MAP) head, and its loading.

    frames (F, 3, H, W) uint8 -> normalize -> forward_features -> patch tokens (F, N, C) -> token_embeddings (F, N, E)
    and flat ids (B, S) of some tokens of each clip -> forward_kept -> tokens (B, S, C) -> token_embeddings (B, S, E)
    captions -> tokenize -> encode_text -> (M, E)

Layout and parameter names are those of Hugging Face's checkpoints (transformers, models/siglip), so that published
weights load by name. This covers SigLIP and the SigLIP 2 models (Tschannen et al., 2025) of fixed resolution, which
differ only in their tokenizer. E, the width of the joint space of images and texts, is the vision tower's width C: the
MAP head pools an image into it, and a linear head projects a text's last token into it.
"""

import os
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as nnf
from tokenizers import Tokenizer
from torch import Tensor, nn

from files import (
    atomic_write_text,
    load_state_dict_strict,
    read_checkpoint,
    require,
    resolve_checkpoint,
    save_weights,
    write_json,
)
from inputs import embed_clips, embed_texts, iter_clips
from kernels import to_device
from kernels.window_attention import window_attention
from siglip_files import (
    ACTIVATIONS,
    IMAGE_PROCESSORS,
    SigLIPConfig,
    TextConfig,
    VisionConfig,
    load_siglip_tokenizer,
    read_image_processor,
    read_tower_config,
)
from video import RESAMPLE_MODES, gather_tokens, patchify, resize_like_pillow

# ---------------------------------------------------------------------------------------------------------------------
# Modules

class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, cfg: VisionConfig | TextConfig):
        super().__init__()
        C = cfg.hidden_size
        self.heads = cfg.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (F, N, C) -> (F, N, C). mask (F, 1, N, N) bool: True where token i attends to token j; None: everywhere."""
        F, N, C = x.shape
        q, k, v = (p(x).view(F, N, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(nnf.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(F, N, C))


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, cfg: VisionConfig | TextConfig):
        super().__init__()
        self.act, self.is_tanh_gelu = ACTIVATIONS[cfg.hidden_act], cfg.hidden_act == "gelu_pytorch_tanh"
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_tanh_gelu and fuses_gelu(x, self.fc1.weight):
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(self.act(self.fc1(x)))


def fuses_gelu(x: Tensor, weight: Tensor) -> bool:
    """
    Return whether `linear_gelu` may replace a linear layer and its tanh GELU.

    It has no gradient, autocast does not cast its inputs, and on a CPU it would be the erf form.
    """
    return x.is_cuda and x.dtype == weight.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """
    GELU (tanh form) of x W^T + b on a GPU: x (..., C), weight (D, C), bias (D,) -> (..., D), without gradient.

    cuBLASLt applies GELU to the product's fp32 sums before it rounds and writes them, so no second kernel reads and
    writes them again. torch.compile keeps this call (otherwise it would make GELU a kernel of its own).
    """
    y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.T, use_gelu=True)
    return y.view(*x.shape[:-1], len(weight))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, cfg: VisionConfig | TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = Attention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (F, N, C), mask as of Attention -> (F, N, C)."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers of a tower."""

    def __init__(self, cfg: VisionConfig | TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (F, N, C), mask as of Attention -> (F, N, C)."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class MapAttention(nn.Module):
    """Attention of the MAP head, whose only query is learned. Parameters are named as in nn.MultiheadAttention."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * C, C))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C))
        self.out_proj = nn.Linear(C, C)

    def query_logits(self, probe: Tensor, x: Tensor) -> Tensor:
        """
        Attention logits of the probe: probe (C), x (F, N, C) -> (F, N, H).

        The query is folded into the key weights, so that the cost is F N C H products.
        """
        C, H = x.shape[-1], self.heads
        (wq, wk, _), (bq, bk, _) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q = (wq @ probe + bq).view(H, C // H) * (C // H) ** -0.5
        w = torch.einsum("hd,hdc->hc", q, wk.view(H, C // H, C))
        b = (q * bk.view(H, C // H)).sum(-1)
        return x @ w.T + b

    def project_values(self, x: Tensor) -> Tensor:
        """x (F, N, C) -> values (F, N, C), in which the heads follow one another."""
        C = x.shape[-1]
        return nnf.linear(x, self.in_proj_weight[2 * C:], self.in_proj_bias[2 * C:])


class MapHead(nn.Module):
    """Attention pooling into the joint space: the probe attends to the tokens; then LayerNorm and a residual MLP."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        C = cfg.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, C))
        self.attention = MapAttention(C, cfg.num_attention_heads)
        self.layernorm = nn.LayerNorm(C, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        """x (F, N, C) -> (F, E)."""
        a = self.attention.query_logits(self.probe[0, 0], x).softmax(1)             # (F, N, H)
        v = self.attention.project_values(x).unflatten(-1, (a.shape[-1], -1))       # (F, N, H, C / H)
        return self.project_out((a.transpose(1, 2)[:, :, None] @ v.transpose(1, 2)).flatten(1))

    def project_out(self, mixed: Tensor) -> Tensor:
        """Project attention-weighted values (..., C) into the joint space (..., E)."""
        x = self.attention.out_proj(mixed)
        return x + self.mlp(self.layernorm(x))

    def pool_windows(self, x: Tensor, grid: tuple[int, ...], ids: Tensor | None = None) -> Tensor:
        """
        Apply the head to each token's 3 x 3 neighbourhood, clipped at the border: x (F, N, C) -> (F, N, E).

        Logits and values are computed once a token, not once a window (kernels/window_attention.py). ids and grid are
        those of SigLIP.token_embeddings.
        """
        logits, values = self.attention.query_logits(self.probe[0, 0], x), self.attention.project_values(x)
        if ids is None:
            return self.project_out(window_attention(logits, values, grid))
        # A missing token has the least logit, so its weight is 0 beside a token that is there. It is not -inf, since
        # windows without any token, of which nothing is read, would be NaN.
        logits = scatter_tokens(logits, ids, grid, torch.finfo(logits.dtype).min)
        mixed = window_attention(logits, scatter_tokens(values, ids, grid, 0), grid[1:])
        return self.project_out(gather_tokens(mixed, ids))


class VisionEmbeddings(nn.Module):
    """Patch embedding and learned position embedding of a frame."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = nn.Conv2d(3, cfg.hidden_size, cfg.patch_size, cfg.patch_size)
        self.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2, cfg.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (F, 3, H, W) -> (F, N, C). Pixels beyond the last whole patch are cut off."""
        p = self.cfg.patch_size
        return self.embed_patches(pixel_values) + self.interpolate_pos_embed(
            (pixel_values.shape[-2] // p, pixel_values.shape[-1] // p))

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Embed the patches alone, without their positions: pixel_values (F, 3, H, W) -> (F, N, C)."""
        (H, W), p, conv = pixel_values.shape[-2:], self.cfg.patch_size, self.patch_embedding
        if min(H, W) < p:
            raise ValueError(f"frames must have at least {p} x {p} pixels (patch_size), got {H} x {W}")
        pixel_values = pixel_values[..., :H // p * p, :W // p * p].to(conv.weight.dtype)
        return nnf.linear(patchify(pixel_values, p), conv.weight.flatten(1), conv.bias)

    def interpolate_pos_embed(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding (N, C) of a grid (h, w), interpolated if it differs from the checkpoint's grid."""
        table, side = self.position_embedding.weight, self.cfg.image_size // self.cfg.patch_size
        if grid == (side, side):
            return table
        table = table.T.unflatten(1, (side, side))[None]                                # (1, C, side, side)
        return nnf.interpolate(table, grid, mode="bicubic", align_corners=False)[0].flatten(1).T


class VisionModel(nn.Module):
    """Parameters of the vision tower; SigLIP calls them."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.encoder = Encoder(cfg)
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.head = MapHead(cfg)


class TextEmbeddings(nn.Module):
    """Parameters of the token and position embeddings."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)


class TextModel(nn.Module):
    """Parameters of the text tower, whose head projects to width E; SigLIP calls them."""

    def __init__(self, cfg: TextConfig, E: int):
        super().__init__()
        self.embeddings = TextEmbeddings(cfg)
        self.encoder = Encoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.head = nn.Linear(cfg.hidden_size, E)


# ---------------------------------------------------------------------------------------------------------------------
# Some tokens of a clip, by flat ids t * N + n

def scatter_tokens(x: Tensor, ids: Tensor, grid: tuple[int, int, int], fill: float) -> Tensor:
    """
    Put tokens x (B, S, C) of flat ids (B, S) in their places in frames of a grid (T, h, w), and `fill` in all others
    -> (BT, hw, C).
    """
    T, h, w = grid
    frames = x.new_full((len(x), T * h * w, x.shape[-1]), fill)
    return frames.scatter(1, ids[..., None].expand(x.shape), x).view(-1, h * w, x.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The model

class SigLIP(nn.Module):
    """Encode images and texts into one space of width E. The tokenizer turns captions into ids."""

    def __init__(self, cfg: SigLIPConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.cfg = cfg
        # This is a copy because `tokenize` sets its padding.
        self.tokenizer = tokenizer and Tokenizer.from_str(tokenizer.to_str())
        self.vision_model = VisionModel(cfg.vision_config)
        self.text_model = TextModel(cfg.text_config, cfg.vision_config.hidden_size)
        self.logit_scale = nn.Parameter(torch.tensor([10.0]).log())     # Zhai et al., Algorithm 1: t' = log 10
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))           # and b = -10
        for name, p in self.named_parameters():
            if name.endswith("bias") and "logit" not in name:
                nn.init.zeros_(p)
            elif "embedding.weight" in name and p.ndim == 2:        # tokens and positions, as in big_vision
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif p.ndim >= 2:
                nn.init.xavier_uniform_(p)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """The grid (h, w) of patches in a frame of the configured image_size."""
        side = self.cfg.vision_config.image_size // self.cfg.vision_config.patch_size
        return side, side

    def patch_grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """Return the grid (h, w) of whole patches in frames (..., H, W)."""
        H, W = pixels.shape[-2:]
        return H // self.cfg.vision_config.patch_size, W // self.cfg.vision_config.patch_size

    def normalize(self, frames: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """
        uint8 frames (..., 3, H, W) -> normalized pixel values (..., 3, H', W') in the model's dtype.

        If a grid (h, w) is given, frames are first resized so that they have exactly h x w patches.
        """
        if grid is not None:
            p, mode = self.cfg.vision_config.patch_size, RESAMPLE_MODES[self.cfg.image_processor.resample]
            frames = resize_like_pillow(frames, (grid[0] * p, grid[1] * p), mode)
        return self.rescale(frames)

    def rescale(self, frames: Tensor) -> Tensor:
        """uint8 frames (..., 3, H, W) -> (x / 255 - mean) / std of each channel, in the model's dtype."""
        processor, dtype = self.cfg.image_processor, self.logit_bias.dtype
        x = frames.to(torch.promote_types(dtype, torch.float32), copy=True).div_(1 / processor.rescale_factor)
        for i, (mean, std) in enumerate(zip(processor.image_mean, processor.image_std, strict=True)):
            x[..., i, :, :].sub_(mean).div_(std)
        return x.to(dtype)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized pixels (F, 3, H, W) -> tokens (F, N, C) after the last LayerNorm, pooled (F, E) of unit length."""
        tokens = self.forward_features(pixel_values)
        return tokens, nnf.normalize(self.vision_model.head(tokens), dim=-1)

    def forward_features(self, pixel_values: Tensor) -> Tensor:
        """Normalized pixels (F, 3, H, W) -> tokens (F, N, C) after the last LayerNorm."""
        m = self.vision_model
        return m.post_layernorm(m.encoder(m.embeddings(pixel_values)))

    def forward_kept(self, pixel_values: Tensor, ids: Tensor, patch_embeds: Tensor | None = None) -> Tensor:
        """
        Run the tower on some tokens alone: normalized pixels (BT, 3, H, W) of the frames of B clips, flat ids (B, S) ->
        tokens (B, S, C) after the last LayerNorm.

        A token attends to the kept tokens of its frame, so the clip's S tokens are computed together whatever their
        number in each frame, and all shapes are fixed. patch_embeds are embed_patches' of these pixels, if known.
        """
        m = self.vision_model
        x = self.embed_patches(pixel_values) if patch_embeds is None else patch_embeds      # (BT, N, C)
        frame, place = ids // x.shape[1], ids % x.shape[1]
        x = gather_tokens(x, ids) + m.embeddings.interpolate_pos_embed(self.patch_grid_of(pixel_values))[place]
        same_frame = frame[:, None, :, None] == frame[:, None, None]                        # (B, 1, S, S)
        return m.post_layernorm(m.encoder(x, same_frame))

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Normalized pixels (F, 3, H, W) -> patch embeddings (F, N, C), without positions."""
        return self.vision_model.embeddings.embed_patches(pixel_values)

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (M, L), padded to the model's length because SigLIP masks no padding -> (M, E) of unit length."""
        m = self.text_model
        L = ids.shape[1]
        if L > m.embeddings.position_embedding.num_embeddings:
            raise ValueError(f"ids must have at most {m.embeddings.position_embedding.num_embeddings} tokens a text "
                             f"(max_position_embeddings), got {L}")
        x = m.embeddings.token_embedding(ids) + m.embeddings.position_embedding.weight[:L]
        return nnf.normalize(m.head(m.final_layer_norm(m.encoder(x))[:, -1]), dim=-1)

    def tokenize(self, captions: list[str]) -> Tensor:
        """M captions -> ids (M, L) on the model's device, padded and cut to the model's length L."""
        if self.tokenizer is None:
            raise ValueError("the teacher's folder must have a tokenizer.json to tokenize captions, got none")
        L, pad = self.cfg.text_config.max_position_embeddings, self.cfg.text_config.pad_token_id
        self.tokenizer.enable_truncation(L)
        self.tokenizer.enable_padding(length=L, pad_id=pad, pad_token=self.tokenizer.id_to_token(pad))
        encoded = self.tokenizer.encode_batch(captions)
        return to_device(torch.tensor([e.ids for e in encoded]), self.logit_bias.device)

    def embed_videos(self, videos: list[str] | Tensor, num_frames: int = 8, batch: int = 16) -> Tensor:
        """
        Embed videos, paths of which num_frames middle frames are read, or (B, T, 3, H, W) uint8 -> (B, E), means over
        frames of the unit vectors of images. `batch` videos are read and encoded at a time.
        """
        device, processor = self.logit_bias.device, self.cfg.image_processor
        transform = partial(resize_like_pillow, size=processor.size, mode=RESAMPLE_MODES[processor.resample])
        clips = iter_clips(videos, num_frames, 0, transform, batch, device)
        return embed_clips(self.embed_frames, clips, self.cfg.vision_config.hidden_size, device)

    def embed_frames(self, clips: Tensor) -> Tensor:
        """clips (B, T, 3, H, W) in grey levels, of the model's size -> (B, E), means of the frames' unit vectors."""
        _, pooled = self.encode_image(self.normalize(clips.flatten(0, 1)))              # (BT, E)
        return nnf.normalize(pooled.float(), dim=-1).unflatten(0, clips.shape[:2]).mean(1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts, which only the tokenizer normalises -> (M, E) of unit length."""
        encode = lambda chunk: self.encode_text(self.tokenize(chunk))
        return embed_texts(encode, texts, self.cfg.vision_config.hidden_size, self.logit_bias.device)

    def pool_attention(self, tokens: Tensor, ids: Tensor | None = None, grid: tuple[int, ...] = ()) -> Tensor:
        """
        Attention of the MAP head's probe, averaged over heads: tokens (F, N, C) -> (F, N) that sums to 1 over N. Or
        tokens (B, S, C) of flat ids (B, S) in clips of a grid (T, h, w) -> (B, S) that sums to 1 over those of a frame.
        """
        head = self.vision_model.head
        logits = head.attention.query_logits(head.probe[0, 0], tokens).float()
        if ids is None:
            return logits.softmax(1).mean(-1)
        logits = scatter_tokens(logits, ids, grid, torch.finfo(logits.dtype).min)
        return gather_tokens(logits.softmax(1), ids).mean(-1)

    def token_embeddings(self, tokens: Tensor, grid: tuple[int, ...], pooling: str = "map",
                         ids: Tensor | None = None) -> Tensor:
        """
        Pool each token's 3 x 3 neighbourhood into the joint space: tokens (F, N, C) on a grid (h, w) -> (F, N, E) of
        unit length. Or tokens (B, S, C) of flat ids (B, S) in clips of a grid (T, h, w) -> (B, S, E), from those of
        them that are in the neighbourhood.

        pooling "map" applies the MAP head to the neighbourhood alone; "mean" averages the neighbourhood and applies
        the MAP head to the mean; "token" applies the MAP head to the token alone.
        """
        F, N, C = tokens.shape
        if ids is None and grid[0] * grid[1] != N:
            raise ValueError(f"grid must have as many cells as a frame has tokens, {N}, got {grid[0]} x {grid[1]}")
        if pooling not in ("map", "mean", "token"):
            raise ValueError(f"pooling must be 'map', 'mean' or 'token', got {pooling!r}")
        head = self.vision_model.head
        if pooling == "map":
            return nnf.normalize(head.pool_windows(tokens, grid, ids), dim=-1)
        x = tokens
        if pooling == "mean" and ids is not None:
            x = scatter_tokens(torch.cat([x, torch.ones_like(x[..., :1])], -1), ids, grid, 0)   # the ones are counted
            x = nnf.avg_pool2d(x.transpose(1, 2).unflatten(2, grid[1:]), 3, 1, 1, divisor_override=1)
            x = gather_tokens(x.flatten(2).transpose(1, 2), ids)                                # (B, S, C + 1), sums
            x = x[..., :-1] / x[..., -1:]
        elif pooling == "mean":
            x = x.transpose(1, 2).reshape(F, C, *grid)
            x = nnf.avg_pool2d(x, 3, 1, 1, count_include_pad=False).flatten(2).transpose(1, 2)  # (F, N, C)
        return nnf.normalize(head.project_out(head.attention.project_values(x)), dim=-1)

    def save_pretrained(self, folder: str):
        """Write a folder in Hugging Face's layout. The weights come last: if they are there, the folder is complete."""
        os.makedirs(folder, exist_ok=True)
        config = asdict(self.cfg)
        processor = config.pop("image_processor")
        processor["size"] = dict(zip(("height", "width"), processor["size"], strict=True))
        config["text_config"]["projection_size"] = self.cfg.vision_config.hidden_size
        files = {"config.json": config,
                 "preprocessor_config.json": {"image_processor_type": IMAGE_PROCESSORS[0], **processor}}
        if self.tokenizer is not None:
            atomic_write_text(os.path.join(folder, "tokenizer.json"), self.tokenizer.to_str(pretty=True))
            pad = self.tokenizer.id_to_token(self.cfg.text_config.pad_token_id)
            files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
        for name, value in files.items():
            write_json(os.path.join(folder, name), value)
        save_weights(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32, with_tokenizer: bool = True) -> "SigLIP":
        """
        Load a folder in Hugging Face's layout, or a hub id. The model is frozen and in eval mode.

        config.json, model.safetensors (or its shards) and preprocessor_config.json (or processor_config.json) must
        exist, and every weight must fit; tokenizer_config.json is optional. tokenizer.json must exist unless
        with_tokenizer is False, for uses without captions: then no tokenizer is loaded.
        """
        folder = resolve_checkpoint(folder, "a SigLIP")
        config, weights = read_checkpoint(folder, "a SigLIP")
        path, model_type = os.path.join(folder, "config.json"), config.get("model_type")
        naflex = " (SigLIP 2's NaFlex models are not supported)" if model_type == "siglip2" else ""
        require(model_type == "siglip", path, "model_type", f"'siglip'{naflex}", model_type)
        cfg = SigLIPConfig(read_tower_config(VisionConfig, config, "vision_config", path),
                           read_tower_config(TextConfig, config, "text_config", path),
                           image_processor=read_image_processor(folder))
        with torch.device("meta"):          # the checkpoint replaces all weights: allocate and initialize none
            model = cls(cfg)
        if with_tokenizer:
            model.tokenizer = load_siglip_tokenizer(folder, cfg.text_config)
        for tower in ("vision_model", "text_model"):        # old checkpoints contain this buffer
            weights.pop(f"{tower}.embeddings.position_ids", None)
        load_state_dict_strict(model, weights, os.path.join(folder, "model*.safetensors"), assign=True)
        return model.to(dtype).eval().requires_grad_(False)


def load_teacher(folder: str, device: torch.device, fp8: bool = False, with_tokenizer: bool = True) -> SigLIP:
    """
    Load a frozen SigLIP: in bf16 on a GPU, in fp32 on a CPU; with fp8 the layers of its image tower are in fp8.

    with_tokenizer: see SigLIP.from_pretrained.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = SigLIP.from_pretrained(folder, dtype, with_tokenizer).to(device)
    if fp8:
        require_fp8(device)
        use_fp8(teacher)
    return teacher


# ---------------------------------------------------------------------------------------------------------------------
# fp8

class Float8Linear(nn.Module):
    """
    A frozen linear layer whose product is of float8_e4m3fn matrices with fp32 sums: x (..., C) -> (..., D).

    Each token and each row of the weight has a scale of its own, so that a token's result does not depend on the other
    tokens of the batch (as docs/method.md promises of masks).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if linear.in_features % 16 or linear.out_features % 16:
            raise ValueError("a layer in fp8 must have multiples of 16 channels, got "
                             f"{linear.in_features} and {linear.out_features}")
        weight, scale = quantize_fp8(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantize_fp8(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(rows, self.weight.T, scale, self.scale.T, bias=self.bias, out_dtype=x.dtype)
        return y.view(*x.shape[:-1], len(self.weight))


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, C) -> y (n, C) float8_e4m3fn and scale (n, 1) fp32, x ~ y scale: a row's largest magnitude becomes 448."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def use_fp8(teacher: SigLIP):
    """Put the linear layers of the image tower's transformer in fp8; not the patch embedding and not the MAP head."""
    for module in teacher.vision_model.encoder.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Float8Linear(layer))


def require_fp8(device: torch.device):
    """Raise a ValueError if the device has no fp8 products."""
    found = device.type
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 9):
            return
        found = "a GPU of compute capability {}.{}".format(*capability)
    raise ValueError(f"teacher_fp8 needs a GPU of compute capability 8.9 or more, got {found}")
