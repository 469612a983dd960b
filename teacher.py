"""
The teacher: SigLIP (Zhai et al., ICCV 2023), its two towers and its attention-pooling (MAP) head, and what the student
is told by it.

Layout and parameter names are those of the Hugging Face checkpoints (transformers, models/siglip), so that real weights
load by name: SigLIP's, and of SigLIP 2's (Tschannen et al., 2025) those of fixed resolution, whose tokenizer is
another. The joint space has width E, the vision tower's width: an image is pooled into it by the MAP head, a text by a
linear head on its last position.

`guide` is the seam: nothing else of the teacher reaches the student.
"""

import json
import os
import re
import string
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from torch import Tensor, nn

from kernels.window_attention import window_attention
from masking import keep_count, sent, sizes

ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: nnf.gelu(x, approximate="tanh"),
    "gelu": nnf.gelu,
    "relu": nnf.relu,
}
AS_IT_IS = "PreTrainedTokenizerFast"        # the class of a tokenizer.json to which nothing is to be added
FILTERS = {2: "bilinear", 3: "bicubic"}     # Pillow's numbers


@dataclass
class VisionConfig:
    """Vision tower; names and defaults of Hugging Face's SiglipVisionConfig."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@dataclass
class TextConfig:
    """Text tower; names and defaults of Hugging Face's SiglipTextConfig."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    pad_token_id: int = 1
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@dataclass
class PixelConfig:
    """What becomes of an image; names and defaults of a checkpoint's preprocessor_config.json."""
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = 3           # one of FILTERS
    size: tuple = ()            # (height, width); empty: the vision tower's image_size


@dataclass
class SigLIPConfig:
    """A SigLIP checkpoint's config.json and preprocessor_config.json."""
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    model_type: str = "siglip"
    pixels: PixelConfig = field(default_factory=PixelConfig)

    def __post_init__(self):
        self.pixels.size = self.pixels.size or (self.vision_config.image_size,) * 2


def patches(pixels: Tensor, size: int) -> Tensor:
    """pixels (F, 3, H, W) -> (F, N, 3 * size^2), patches in raster order, each as a convolution's weight flattens."""
    F, c, H, W = pixels.shape
    if H % size or W % size:
        raise ValueError(f"frames of {H} x {W} pixels do not divide into patches of {size}")
    x = pixels.view(F, c, H // size, size, W // size, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(F, (H // size) * (W // size), c * size * size)


def resized(frames: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """
    frames (..., 3, H, W) in grey levels -> (..., 3, *size), antialiased, across and then down as in Pillow before 13
    (which goes down first where a frame is to lose much of its height).
    """
    *lead, H, W = frames.shape
    if (H, W) == tuple(size):
        return frames
    x = frames.reshape(-1, 3, H, W).float()
    for step in ((H, size[1]), tuple(size)):        # each pass ends in whole grey levels from 0 to 255
        x = nnf.interpolate(x, step, mode=mode, align_corners=False, antialias=True).round_().clamp_(0, 255)
    return x.view(*lead, *size)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg.hidden_size
        self.heads = cfg.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x (F, N, C) -> (F, N, C)."""
        F, N, C = x.shape
        q, k, v = (p(x).view(F, N, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(F, N, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.act = ACTIVATIONS[cfg.hidden_act]
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = Attention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class MapAttention(nn.Module):
    """One query for all images, the probe; parameters as in nn.MultiheadAttention."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * C, C))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C))
        self.out_proj = nn.Linear(C, C)

    def scores(self, probe: Tensor, x: Tensor) -> Tensor:
        """probe (C), x (F, N, C) -> its logits (F, N, H). The query is folded into the key weights: FNCH products."""
        C, H = x.shape[-1], self.heads
        (wq, wk, _), (bq, bk, _) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q = (wq @ probe + bq).view(H, C // H) * (C // H) ** -0.5
        w = torch.einsum("hd,hdc->hc", q, wk.view(H, C // H, C))
        b = (q * bk.view(H, C // H)).sum(-1)
        return x @ w.T + b

    def values(self, x: Tensor) -> Tensor:
        """x (F, N, C) -> (F, N, C), head after head."""
        C = x.shape[-1]
        return nnf.linear(x, self.in_proj_weight[2 * C:], self.in_proj_bias[2 * C:])


class MapHead(nn.Module):
    """Attention pooling into the joint space: the probe attends to the tokens, then LayerNorm and a residual MLP."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, C))
        self.attention = MapAttention(C, cfg.num_attention_heads)
        self.layernorm = nn.LayerNorm(C, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        """x (F, N, C) -> (F, E)."""
        a = self.attention.scores(self.probe[0, 0], x).softmax(1)                   # (F, N, H)
        v = self.attention.values(x).unflatten(-1, (a.shape[-1], -1))               # (F, N, H, C / H)
        return self.finish((a.transpose(1, 2)[:, :, None] @ v.transpose(1, 2)).flatten(1))

    def finish(self, mixed: Tensor) -> Tensor:
        """Values mixed by attention (..., C) -> joint space (..., E)."""
        x = self.attention.out_proj(mixed)
        return x + self.mlp(self.layernorm(x))

    def windows(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        The head on each token's 3 x 3 neighbourhood alone, clipped at the border: x (F, N, C) -> (F, N, E).

        Scores and values are computed once a token (kernels/window_attention.py).
        """
        return self.finish(window_attention(self.attention.scores(self.probe[0, 0], x), self.attention.values(x), grid))


class VisionEmbeddings(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = nn.Conv2d(3, cfg.hidden_size, cfg.patch_size, cfg.patch_size)
        self.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2, cfg.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (F, 3, H, W) -> (F, N, C). Pixels beyond the last whole patch are cut off."""
        (H, W), p, conv = pixels.shape[-2:], self.cfg.patch_size, self.patch_embedding
        if min(H, W) < p:
            raise ValueError(f"frames of {H} x {W} pixels hold no patch of {p}")
        pixels = pixels[..., :H // p * p, :W // p * p].to(conv.weight.dtype)
        x = nnf.linear(patches(pixels, p), conv.weight.flatten(1), conv.bias)
        return x + self.positions((H // p, W // p))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table, (N, C), interpolated to another grid than its own."""
        table, side = self.position_embedding.weight, self.cfg.image_size // self.cfg.patch_size
        if grid == (side, side):
            return table
        table = table.T.unflatten(1, (side, side))[None]                                # (1, C, side, side)
        return nnf.interpolate(table, grid, mode="bicubic", align_corners=False)[0].flatten(1).T


class VisionModel(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.encoder = Encoder(cfg)
        self.post_layernorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.head = MapHead(cfg)


class TextEmbeddings(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)


class TextModel(nn.Module):
    def __init__(self, cfg: TextConfig, E: int):
        super().__init__()
        self.embeddings = TextEmbeddings(cfg)
        self.encoder = Encoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.head = nn.Linear(cfg.hidden_size, E)


class SigLIP(nn.Module):
    """Image and text into one space of width E. `tokenizer` turns captions into ids."""

    def __init__(self, cfg: SigLIPConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.cfg = cfg
        # A copy: `tokenize` sets its padding.
        self.tokenizer = tokenizer and Tokenizer.from_str(tokenizer.to_str())
        self.vision_model = VisionModel(cfg.vision_config)
        self.text_model = TextModel(cfg.text_config, cfg.vision_config.hidden_size)
        self.logit_scale = nn.Parameter(torch.tensor([10.0]).log())     # Zhai et al., Algorithm 1: t' = log 10
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))           # and b = -10
        for name, p in self.named_parameters():
            if name.endswith("bias") and "logit" not in name:
                nn.init.zeros_(p)
            elif "embedding.weight" in name and p.ndim == 2:        # tokens and positions, as big_vision has them
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif p.ndim >= 2:
                nn.init.xavier_uniform_(p)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the patches of a frame of the configured size."""
        side = self.cfg.vision_config.image_size // self.cfg.vision_config.patch_size
        return side, side

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """pixels (..., H, W) -> (h, w), the patches of a frame of theirs."""
        H, W = pixels.shape[-2:]
        return H // self.cfg.vision_config.patch_size, W // self.cfg.vision_config.patch_size

    def pixels(self, frames: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """uint8 frames (..., 3, H, W) -> normalised as SigLIP wants them; with a grid, resized to just its patches."""
        if grid is not None:
            p = self.cfg.vision_config.patch_size
            frames = resized(frames, (grid[0] * p, grid[1] * p), FILTERS[self.cfg.pixels.resample])
        c, dtype = self.cfg.pixels, self.logit_bias.dtype
        x = frames.to(torch.promote_types(dtype, torch.float32), copy=True).div_(1 / c.rescale_factor)
        for i, (mean, std) in enumerate(zip(c.image_mean, c.image_std, strict=True)):
            x[..., i, :, :].sub_(mean).div_(std)
        return x.to(dtype)

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 frames (..., 3, H, W) of any size -> pixels of the checkpoint's own, as its processor makes them."""
        return self.pixels(resized(frames, self.cfg.pixels.size, FILTERS[self.cfg.pixels.resample]))

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (F, 3, H, W), normalised -> tokens (F, N, C) after the last LayerNorm, pooled (F, E), unit length."""
        tokens = self.tokens(pixels)
        return tokens, nnf.normalize(self.vision_model.head(tokens), dim=-1)

    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels (F, 3, H, W), normalised -> tokens (F, N, C) after the last LayerNorm."""
        m = self.vision_model
        return m.post_layernorm(m.encoder(m.embeddings(pixels)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """ids (M, L), padded to the model's length (SigLIP masks no padding) -> (M, E) of unit length."""
        m = self.text_model
        L = ids.shape[1]
        if L > m.embeddings.position_embedding.num_embeddings:
            raise ValueError(f"this SigLIP takes {m.embeddings.position_embedding.num_embeddings} text tokens, got {L}")
        x = m.embeddings.token_embedding(ids) + m.embeddings.position_embedding.weight[:L]
        return nnf.normalize(m.head(m.final_layer_norm(m.encoder(x))[:, -1]), dim=-1)

    def tokenize(self, captions: list[str]) -> Tensor:
        """captions -> ids (M, L), padded and cut to the model's length."""
        if self.tokenizer is None:
            raise ValueError("this SigLIP has no tokenizer: its folder wants a tokenizer.json")
        L, pad = self.cfg.text_config.max_position_embeddings, self.cfg.text_config.pad_token_id
        self.tokenizer.enable_truncation(L)
        self.tokenizer.enable_padding(length=L, pad_id=pad, pad_token=self.tokenizer.id_to_token(pad))
        encoded = self.tokenizer.encode_batch(captions)
        return sent(torch.tensor([e.ids for e in encoded]), self.logit_bias.device)

    def attend(self, tokens: Tensor) -> Tensor:
        """tokens (F, N, C) -> (F, N): the MAP head's attention, mean over its heads; sums to 1."""
        head = self.vision_model.head
        return head.attention.scores(head.probe[0, 0], tokens).float().softmax(1).mean(-1)

    def align(self, tokens: Tensor, grid: tuple[int, int], pool: str = "map") -> Tensor:
        """
        Each token pooled over its 3 x 3 neighbourhood into the joint space: tokens (F, N, C) -> (F, N, E), unit length.

        pool "map": by the MAP head restricted to the window; "mean": by plain averaging, then the MAP head on that one
        vector; "token": not at all, the MAP head on the token alone.
        """
        F, N, C = tokens.shape
        if grid[0] * grid[1] != N:
            raise ValueError(f"{N} tokens a frame are no {grid[0]} x {grid[1]} grid")
        head = self.vision_model.head
        if pool == "map":
            return nnf.normalize(head.windows(tokens, grid), dim=-1)
        if pool not in ("mean", "token"):
            raise ValueError(f"align pools by 'map', 'mean' or 'token', got {pool!r}")
        x = tokens
        if pool == "mean":
            x = x.transpose(1, 2).reshape(F, C, *grid)
            x = nnf.avg_pool2d(x, 3, 1, 1, count_include_pad=False).flatten(2).transpose(1, 2)  # (F, N, C)
        return nnf.normalize(head.finish(head.attention.values(x)), dim=-1)

    def forward(self, frames: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """
        Training: uint8 frames (B, 3, H, W) and the ids (B, L) of their captions -> the sigmoid loss by name, of these
        frames with the captions of all ranks. The mean over ranks is the loss of the whole batch, and so its gradient.
        """
        _, image = self.encode_image(self.pixels(frames))
        text, theirs = self.encode_text(ids), ids
        if dist.is_initialized():
            text, theirs = OfAllRanks.apply(text), OfAllRanks.apply(ids)
        same = (ids[:, None] == theirs[None]).all(-1)
        return {"sigmoid": sigmoid_loss(image, text, same, self.logit_scale, self.logit_bias)}

    def save(self, folder: str):
        """A folder in Hugging Face's layout; its weights come last, whole or not at all."""
        os.makedirs(folder, exist_ok=True)
        config = asdict(self.cfg)
        pixels = config.pop("pixels")
        pixels["size"] = dict(zip(("height", "width"), pixels["size"], strict=True))
        config["text_config"]["projection_size"] = self.cfg.vision_config.hidden_size
        files = {"config.json": config,
                 "preprocessor_config.json": {"image_processor_type": "SiglipImageProcessor", **pixels}}
        if self.tokenizer is not None:
            self.tokenizer.save(os.path.join(folder, "tokenizer.json"))
            pad = self.tokenizer.id_to_token(self.cfg.text_config.pad_token_id)
            files["tokenizer_config.json"] = {"tokenizer_class": AS_IT_IS, "pad_token": pad}
        for name, value in files.items():
            with open(os.path.join(folder, name), "w") as f:
                json.dump(value, f, indent=1)
        path = os.path.join(folder, "model.safetensors")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path + ".tmp")
        os.replace(path + ".tmp", path)

    @classmethod
    def from_pretrained(cls, folder: str, dtype=torch.float32) -> "SigLIP":
        """
        A folder in Hugging Face's layout, or a hub id: config.json, model.safetensors (or its shards), and where there
        are, preprocessor_config.json, tokenizer.json, tokenizer_config.json. Strict; frozen, in eval mode.
        """
        folder = find_folder(folder, "a SigLIP")
        config, saved = read_folder(folder, "a SigLIP")
        where, kind = os.path.join(folder, "config.json"), config.get("model_type")
        naflex = ", as all SigLIP 2 but the NaFlex ones have it" if kind == "siglip2" else ""
        demand(kind == "siglip", where, "model_type", f"'siglip'{naflex}", kind)
        cfg = SigLIPConfig(read_tower(VisionConfig, config, "vision_config", where),
                           read_tower(TextConfig, config, "text_config", where), pixels=read_pixels(folder))
        with torch.device("meta"):          # no memory and no time for weights that the file's replace
            model = cls(cfg)
        model.tokenizer = read_tokenizer(folder, cfg.text_config)
        for tower in ("vision_model", "text_model"):        # a buffer that old checkpoints hold
            saved.pop(f"{tower}.embeddings.position_ids", None)
        load_weights(model, saved, os.path.join(folder, "model*.safetensors"), assign=True)
        return model.to(dtype).eval().requires_grad_(False)


def known(config, values: dict):
    """The dataclass `config` from those of the values that it has."""
    names = {f.name for f in fields(config)}
    return config(**{k: v for k, v in values.items() if k in names})


def demand(fits: bool, where: str, key: str, wanted: str, value):
    if not fits:
        raise ValueError(f"{where}: {key} wants to be {wanted}, is {value!r}")


def read_tower(config, values: dict, part: str, where: str):
    """The dataclass `config` from `part` of a config.json; what it lacks has the published default."""
    values = values.get(part) or {}
    demand(isinstance(values, dict), where, part, "an object", values)
    values = {k: v for k, v in values.items() if v is not None}
    for key, wanted in (("hidden_act", tuple(ACTIVATIONS)), ("num_channels", (3,)), ("vision_use_head", (True,))):
        value = values.get(key, wanted[0])
        demand(value in wanted, where, f"{part}.{key}", " or ".join(map(repr, wanted)), value)
    cfg = known(config, values)
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        demand(isinstance(value, (int, f.type)), where, f"{part}.{f.name}", f"of type {f.type.__name__}", value)
    demand(cfg.hidden_size % cfg.num_attention_heads == 0, where, f"{part}.hidden_size",
           f"a multiple of num_attention_heads, {cfg.num_attention_heads}", cfg.hidden_size)
    return cfg


def read_pixels(folder: str) -> PixelConfig:
    """A folder's preprocessor_config.json; SigLIP's own way where it has none."""
    path = os.path.join(folder, "preprocessor_config.json")
    values = {k: v for k, v in read_json(path).items() if v is not None} if os.path.isfile(path) else {}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        demand(values.get(key, True), path, key, "true", values.get(key))
    if "size" in values:
        size = values["size"]
        demand(isinstance(size, dict) and {"height", "width"} <= size.keys(), path, "size", "height and width", size)
        values["size"] = size["height"], size["width"]
    cfg = known(PixelConfig, values)
    demand(cfg.resample in FILTERS, path, "resample", f"one of {FILTERS}", cfg.resample)
    for key in ("image_mean", "image_std"):
        value = getattr(cfg, key)
        demand(isinstance(value, (list, tuple)) and len(value) == 3, path, key, "3 numbers", value)
        setattr(cfg, key, tuple(value))
    return cfg


def read_tokenizer(folder: str, cfg: TextConfig) -> Tokenizer | None:
    """
    A folder's tokenizer.json, made to do what the checkpoint's processor does; the id it pads with goes into `cfg`.

    SigLIP (sentencepiece, a Unigram model): lower case, no punctuation, single spaces; </s> ends and pads.
    SigLIP 2 (Gemma's, a BPE model): lower case; no <bos>, <eos> ends, <pad> pads. Others are taken as they are.
    """
    path, beside = (os.path.join(folder, name) for name in ("tokenizer.json", "tokenizer_config.json"))
    if not os.path.isfile(path):
        return None
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:                  # the library raises plain Exception
        raise ValueError(f"{path} is no tokenizer: {one_line(error)}") from None
    options = read_json(beside) if os.path.isfile(beside) else {}
    lower, steps, end, pad = options.get("do_lower_case", True), [], None, None
    if options.get("tokenizer_class") == AS_IT_IS and "do_lower_case" not in options:
        pass
    elif isinstance(tokenizer.model, models.Unigram) and tokenizer.token_to_id("</s>") is not None:
        # Python's lower(), which SigLIP's processor calls, knows a sigma that ends a word; Lowercase() does not.
        steps = [normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"), normalizers.Lowercase()] if lower else []
        steps += [normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
                  normalizers.Replace(Regex(r"[\s▁]+"), " "), normalizers.Strip()]
        end = pad = "</s>"
    elif isinstance(tokenizer.model, models.BPE) and tokenizer.token_to_id("<eos>") is not None:
        steps, end, pad = [normalizers.Lowercase()] if lower else [], "<eos>", "<pad>"
    if steps:
        old = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([*steps, *old])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))])
    pad = options.get("pad_token") or pad
    if pad is not None:
        pad = pad.get("content") if isinstance(pad, dict) else pad
        known_as = tokenizer.token_to_id(pad) if isinstance(pad, str) else None
        demand(known_as is not None, beside, "pad_token", "one of tokenizer.json", pad)
        cfg.pad_token_id = known_as
    found, size = max(*tokenizer.get_vocab().values(), cfg.pad_token_id), cfg.vocab_size
    demand(found < size, path, "its largest id", f"below text_config.vocab_size, {size}, of config.json", found)
    return tokenizer


def load_weights(model: nn.Module, saved: dict[str, Tensor], where: str, assign: bool = False):
    """Every weight of the model from `saved`, and no other there; a ValueError names the first that does not fit."""
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    have = {key: tuple(value.shape) for key, value in saved.items()}
    for key in [*want, *(key for key in have if key not in want)]:
        if want.get(key) != have.get(key):
            found, wanted = have.get(key, "not there"), want.get(key, "no such weight")
            raise ValueError(f"{where}: {key} is {found}, wanted {wanted}")
    model.load_state_dict(saved, assign=assign)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def read_json(path: str) -> dict:
    """A file that holds one JSON object."""
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {one_line(error)}") from None
    demand(isinstance(values, dict), path, "the whole", "one object", values)
    return values


def find_folder(name: str, what: str) -> str:
    """A folder as it is; a hub id (owner/model, or an old one without owner) fetched, or found in the hub's cache."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name} is no folder of {what}: there is no such folder")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return snapshot_download(name, allow_patterns=["*.json", "vocab.txt", "model*.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise FileNotFoundError(
            f"{name} is no folder of {what}: none is at {os.path.abspath(name)} or in the hub's cache "
            f"({constants.HF_HUB_CACHE}), and it could not be fetched ({reason}); where there is a network: "
            f"hf download {name} --local-dir {name}",
        ) from None


def read_folder(folder: str, what: str) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the weights of a folder, which must be there and be what their names say: one file or several."""
    def path(name):
        if not os.path.isfile(os.path.join(folder, name)):
            raise FileNotFoundError(f"{folder} is no folder of {what}: it has no {name}")
        return os.path.join(folder, name)

    config, files, weights = read_json(path("config.json")), ["model.safetensors"], {}
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index) and not os.path.isfile(os.path.join(folder, files[0])):
        shards = read_json(index).get("weight_map")
        demand(isinstance(shards, dict), index, "weight_map", "an object: the file of each weight", shards)
        files = sorted(set(shards.values()))
    for name in files:
        try:
            weights |= load_file(path(name))
        except SafetensorError as error:
            raise ValueError(f"{os.path.join(folder, name)} holds no weights: {one_line(error)}") from None
    return config, weights


class OfAllRanks(torch.autograd.Function):
    """x (b, ...) -> (world b, ...), that of all ranks in turn; the gradient is the sum of what they all say of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        every = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather(list(every.unbind(0)), x.contiguous())
        return every.flatten(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.unflatten(0, (dist.get_world_size(), -1)).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def sigmoid_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """
    SigLIP's loss: image (B, E), text (M, E) of unit length, same (B, M) bool, which match; log scale and bias learned.

    L = -1/B sum_ij log sigmoid(z_ij (t <image_i, text_j> + b)), z = 1 where i and j match and -1 elsewhere.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = scale.exp() * image.float() @ text.float().T + bias
        return -nnf.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)


@dataclass
class Guide:
    """What the student is told about a batch; in fine-tuning what to look at alone."""
    keep: Tensor                    # (B, TK) int64, flat ids of the kept tokens, ascending
    aligned: Tensor | None = None   # (B, T, N, E), every token pooled over its neighbourhood, unit length
    text: Tensor | None = None      # (B, E), the captions in the same joint space, unit length
    basis: tuple[Tensor, Tensor] | None = None      # mean (E), rows (k, E): then aligned is (B, T, N, k), along these
    size: Tensor | None = None      # (B, TK) fp32, how many tokens each of the kept stands for, where that counts

    def at(self, ids: Tensor) -> Tensor:
        """What the tokens at flat ids (B, Q) are about: (B, Q, E) fp32."""
        x = self.aligned.flatten(1, 2)
        x = x.gather(1, ids[..., None].expand(*ids.shape, x.shape[-1])).float()
        return x if self.basis is None else self.basis[0] + x @ self.basis[1]


@torch.no_grad()
def guide(teacher: SigLIP, batch, mask, ratio: float, pool: str = "map", check: bool = True,
          grid: tuple[int, int] | None = None, sized: bool = False) -> Guide:
    """
    The teacher's word on a batch: what to keep, what every token is about, what the captions are about; if sized, also
    how many tokens each of the kept stands for.

    batch: video (B, T, 3, H, W) uint8, captions, seed. mask: a function like those in masking.MASKS; check: whether it
    looks for a NaN in the tokens, for which it waits for the device. grid: the student's patches of a frame (h, w), to
    which the teacher is shown the frames in another size where its own patches would be others.
    """
    B, T = batch.video.shape[:2]
    with torch.autocast(batch.video.device.type, enabled=False):    # it has the type it is to be computed in
        pixels = teacher.pixels(batch.video.flatten(0, 1), grid)
        grid = teacher.grid_of(pixels)
        tokens = teacher.tokens(pixels)                                             # (F, N, C)
        text = teacher.encode_text(teacher.tokenize(batch.captions))
        aligned = teacher.align(tokens, grid, pool).unflatten(0, (B, T))            # (B, T, N, E)
        tokens = tokens.unflatten(0, (B, T))
        keep = choose(teacher, tokens, mask, ratio, batch.seed, grid, text=text, aligned=aligned, check=check)
        return Guide(keep, aligned, text, size=sizes(tokens, keep) if sized else None)


@torch.no_grad()
def choose(teacher: SigLIP, tokens: Tensor, mask, ratio: float, seed: int, grid: tuple[int, int] | None = None,
           **aux) -> Tensor:
    """tokens (B, T, N, C) of the teacher, a grid of (h, w) a frame -> the ids that `mask` keeps of them, (B, TK)."""
    attention = teacher.attend(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    return mask(tokens, keep_count(tokens.shape[2], ratio), attention=attention, grid=grid or teacher.grid,
                generator=torch.Generator().manual_seed(seed), **aux)


@torch.no_grad()
def kept(teacher: SigLIP, video: Tensor, mask, ratio: float, seed: int, grid: tuple[int, int],
         sized: bool = False) -> Guide:
    """video (B, T, 3, H, W) uint8, in patches of the student's grid (h, w) -> what `mask` keeps, if sized how much."""
    with torch.autocast(video.device.type, enabled=False):
        tokens = teacher.tokens(teacher.pixels(video.flatten(0, 1), grid)).unflatten(0, video.shape[:2])
        keep = choose(teacher, tokens, mask, ratio, seed, grid)
        return Guide(keep, size=sizes(tokens, keep) if sized else None)
