"""
The student: a ViT over the kept tokens of a clip, a BERT whose last layers read them, a decoder, and the four losses.

The ViT is UMT's (OpenGVLab/unmasked_teacher, multi_modality/models/backbones/vit/vit.py): joint space-time attention,
tubelet 1, no CLS token. The BERT has Hugging Face's parameter names (transformers, models/bert) and, as in UMT, text
only in its first layers and cross-attention to the video in its last. Letters and equations: docs/method.md.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from masking import sent
from teacher import Guide, demand, find_folder, known, load_weights, patches, read_folder


@dataclass
class ModelConfig:
    """The student."""
    patch: int = 16              # pixels a side of a token's patch
    width: int = 768             # ViT: channels
    depth: int = 12              # ViT: blocks
    heads: int = 12              # ViT: attention heads
    drop_path: float = 0.1       # ViT: rate of the last block, rising linearly from 0
    positions: str = "1d"        # ViT: sinusoids of the flat (t, h, w) index (1d, as UMT) or of t, h, w apart (3d)
    text_width: int = 768        # BERT: channels
    text_depth: int = 12         # BERT: layers
    text_heads: int = 12         # BERT: attention heads
    fusion: int = 3              # BERT: the last layers, which read the video
    dropout: float = 0.1         # BERT: dropout
    vocab: int = 0               # BERT: word pieces; 0: as many as the tokenizer has
    mask_id: int = 0             # BERT: id of [MASK]; 0: as the tokenizer has
    text_length: int = 32        # word pieces a caption, [CLS] included; longer ones are cut (L)
    sep: bool = False            # whether a caption ends in [SEP], as BERT's own do; UMT's do not
    embed: int = 512             # joint space of VTC
    decoder: str = "cross"       # cross: queries attend to visible tokens; joint: self-attention over all tokens
    decoder_width: int = 512     # decoder: channels
    decoder_depth: int = 2       # decoder: blocks
    decoder_heads: int = 8       # decoder: attention heads
    decoder_share: float = 0.25  # cross: share of the masked tokens that is predicted, drawn anew each step
    target: int = 0              # width of the teacher's joint space (E); 0: as the teacher has
    umt_vtc: bool = False        # VTC's gradient to the encoders divided by the number of ranks, as UMT's gather does
    proportional: bool = False   # a kept token counts as the tokens it stands for, in ViT's attention and mean (ToMe)
    relevance: str = "batch"     # MRM: relevance to the texts of the batch, to the clip's own, or none (regression)
    objective: str = "relevance"  # beside VTC, VTM, MLM: relevance (MRM), visible (UMT's alignment) or pixels (MAE's)

    def __post_init__(self):
        for width, heads in ((self.width, self.heads), (self.text_width, self.text_heads),
                             (self.decoder_width, self.decoder_heads)):
            if width % heads:
                raise ValueError(f"{width} channels do not divide into {heads} heads")
        for name, value, known_values in (("positions", self.positions, ("1d", "3d")),
                                          ("decoder", self.decoder, ("cross", "joint")),
                                          ("relevance", self.relevance, ("batch", "own", "none")),
                                          ("objective", self.objective, ("relevance", "visible", "pixels"))):
            if value not in known_values:
                raise ValueError(f"{name} wants to be one of {', '.join(known_values)}, is {value!r}")
        if not 0 < self.fusion < self.text_depth:
            raise ValueError(f"of {self.text_depth} text layers 1 to {self.text_depth - 1} can fuse, got {self.fusion}")
        if not 0 < self.decoder_share <= 1:
            raise ValueError(f"decoder_share is in (0, 1], got {self.decoder_share}")


# ViT

@lru_cache(maxsize=16)
def sinusoids(grid: tuple[int, int, int], C: int, kind: str, device: torch.device) -> Tensor:
    """
    Fixed positions of the tokens of a clip: grid (T, h, w) -> (Thw, C).

    "1d": sin and cos of the flat index in turn (UMT, VideoMAE). "3d": a quarter of the channels for t, the rest shared
    by h and w, so that a position means the same at every clip length and resolution; its slowest wave is 100 times
    the fastest, not 10000, as no axis is long.
    """
    def encode(index: Tensor, C: int) -> Tensor:
        rate = (10000 if kind == "1d" else 100) ** (-2 * torch.arange((C + 1) // 2, dtype=torch.float64) / C)
        angle = index.double()[:, None] * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :C]

    T, h, w = grid
    t, i, j = (index.flatten() for index in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    if kind == "1d":
        table = encode(torch.arange(T * h * w), C)
    else:
        Ct, Ch = C // 4, (C - C // 4) // 2
        table = torch.cat([encode(t, Ct), encode(i, Ch), encode(j, C - Ct - Ch)], 1)
    return table.float().to(device)


class Block(nn.Module):
    """Pre-norm transformer block; in a decoder its keys and values can come from elsewhere."""

    def __init__(self, C: int, heads: int, drop_path: float = 0.0, cross: bool = False):
        super().__init__()
        self.heads, self.drops = heads, drop_path > 0
        # A tensor: of numbers that differ from block to block torch.compile makes several programs.
        self.register_buffer("drop_path", torch.tensor(drop_path), persistent=False)
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        if cross:
            self.norm_kv, self.q, self.kv = nn.LayerNorm(C, eps=1e-6), nn.Linear(C, C), nn.Linear(C, 2 * C)
        else:
            self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def split(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        """(B, S, nC) -> n of (B, H, S, C / H)."""
        B, S, nC = x.shape
        return x.view(B, S, n, self.heads, nC // n // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def drop(self, x: Tensor) -> Tensor:
        """Stochastic depth, a clip at a time."""
        if not (self.training and self.drops):
            return x
        stay = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * stay / (1 - self.drop_path)

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x (B, S, C), context (B, S', C) for a cross block, bias (B, 1, 1, S) of the logits -> (B, S, C)."""
        y = self.norm1(x)
        if context is None:
            q, k, v = self.split(self.qkv(y), 3)
        else:
            (q,), (k, v) = self.split(self.q(y), 1), self.split(self.kv(self.norm_kv(context)), 2)
        bias = None if bias is None else bias.to(q.dtype)
        x = x + self.drop(self.proj(attend(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)))
        return x + self.drop(self.fc2(nnf.gelu(self.fc1(self.norm2(x)))))


def xavier(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Joint space-time ViT of any T, H and W, over all tokens of a clip or over those that are kept."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # of its pixels: ImageNet's, as UMT

    def __init__(self, patch=16, width=768, depth=12, heads=12, drop_path=0.0, positions="1d"):
        super().__init__()
        self.patch, self.positions = patch, positions
        self.embed = nn.Linear(3 * patch * patch, width)
        self.blocks = nn.ModuleList(Block(width, heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(xavier)
        self.register_buffer("pixel_mean", torch.tensor(self.mean).repeat_interleave(patch * patch), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.std).repeat_interleave(patch * patch), persistent=False)

    def grid(self, video: Tensor) -> tuple[int, int, int]:
        """(T, h, w) of a video (B, T, 3, H, W)."""
        return video.shape[1], video.shape[3] // self.patch, video.shape[4] // self.patch

    def pixels(self, video: Tensor, ids: Tensor | None) -> Tensor:
        """video (B, T, 3, H, W) uint8, ids (B, S) flat or None for all tokens -> their pixels (B, S, 3 patch^2)."""
        x = patches(video.flatten(0, 1), self.patch).view(len(video), -1, self.embed.in_features)
        if ids is not None:         # before anything is computed from pixels
            x = x.gather(1, ids[..., None].expand(*ids.shape, x.shape[-1]))
        return (x.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std

    def forward(self, video: Tensor, keep: Tensor | None = None, size: Tensor | None = None) -> Tensor:
        """
        video (B, T, 3, H, W) uint8, keep (B, S) flat ids or None for all tokens -> (B, S, C).

        size (B, S): a token attracts as much attention as that many of its kind would (Bolya et al., Token Merging,
        arXiv 2210.09461, proportional attention).
        """
        positions = sinusoids(self.grid(video), self.embed.out_features, self.positions, video.device)
        positions = positions.expand(len(video), *positions.shape) if keep is None else positions[keep]
        x = self.embed(self.pixels(video, keep)) + positions
        bias = None if size is None else size.log()[:, None, None]                          # (B, 1, 1, S)
        for block in self.blocks:
            x = block(x, bias=bias)
        return self.norm(x)


# BERT

@dataclass
class BertConfig:
    """Names and defaults of Hugging Face's BertConfig, and what fusion adds."""
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1        # of the attention weights too: attention_probs_dropout_prob is not read
    layer_norm_eps: float = 1e-12
    fusion_layers: int = 3       # the last layers, which have cross-attention
    encoder_width: int = 768     # channels of the video tokens
    is_decoder: bool = False     # a word sees those before it alone


def read_bert_config(values: dict, where: str, **changes) -> BertConfig:
    """
    The BertConfig of a config.json, less what this BERT does not do; what it lacks has the published default.

    The changes that are allowed are those that leave its weights what they are: dropout, fusion.
    """
    values = {k: v for k, v in values.items() if v is not None}
    kind = values.get("model_type", "bert")
    demand(kind == "bert", where, "model_type", "'bert'", kind)
    kinds = values.get("architectures", [])
    demand("model_type" in values or all(str(kind).startswith("Bert") for kind in kinds), where, "architectures",
           "those of a BERT", kinds)
    for key, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False),
                        ("pad_token_id", Bert.PAD)):
        value = values.get(key, wanted)
        demand(value == wanted, where, key, repr(wanted), value)
    cfg = asdict(known(BertConfig, values))
    for key, value in changes.items():
        free = key in ("hidden_dropout_prob", "fusion_layers", "encoder_width")
        demand(free or cfg.get(key) == value, where, key, repr(value), cfg.get(key))
    cfg = BertConfig(**{**cfg, **changes})
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        demand(isinstance(value, (int, f.type)), where, f.name, f"of type {f.type.__name__}", value)
    heads, layers = cfg.num_attention_heads, cfg.num_hidden_layers
    demand(heads > 0 and cfg.hidden_size % heads == 0, where, "hidden_size",
           f"a multiple of num_attention_heads, {heads}", cfg.hidden_size)
    demand(0 <= cfg.fusion_layers <= layers, where, "fusion_layers", f"0 to {layers}, the layers that there are",
           cfg.fusion_layers)
    return cfg


class BertSelf(nn.Module):
    def __init__(self, cfg: BertConfig, context: int):
        super().__init__()
        self.heads, self.dropout = cfg.num_attention_heads, cfg.hidden_dropout_prob
        self.query = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.key = nn.Linear(context, cfg.hidden_size)
        self.value = nn.Linear(context, cfg.hidden_size)

    def split(self, x: Tensor) -> Tensor:
        """(M, L, D) -> (M, H, L, D / H)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, rows: Tensor | None = None,
                past: list | None = None) -> Tensor:
        """`past` keeps keys and values from call to call: of the words so far, or of a context that stays as it is."""
        if past and context is not x:
            k, v = past
        else:
            k, v = self.split(self.key(context)), self.split(self.value(context))
            if past:
                k, v = (torch.cat(both, 2) for both in zip(past, (k, v), strict=True))
        if past is not None:
            past[:] = k, v
        if rows is not None:        # keys and values once a clip, though several texts attend to it
            k, v = k[rows], v[rows]
        q = self.query(x).view(len(k), -1, x.shape[-1])     # of a word of each of W beams: W places that ask one clip
        y = attend(self.split(q), k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(x.shape)


class BertOutput(nn.Module):
    """Dense, dropout, residual, LayerNorm."""

    def __init__(self, cfg: BertConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, cfg.hidden_size)
        self.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.dropout = nn.Dropout(cfg.hidden_dropout_prob)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class BertAttention(nn.Module):
    def __init__(self, cfg: BertConfig, context: int):
        super().__init__()
        self.self = BertSelf(cfg, context)
        self.output = BertOutput(cfg, cfg.hidden_size)

    def forward(self, x, context, mask, rows=None, past=None):
        return self.output(self.self(x, context, mask, rows, past), x)


class BertIntermediate(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.dense = nn.Linear(cfg.hidden_size, cfg.intermediate_size)


class BertLayer(nn.Module):
    def __init__(self, cfg: BertConfig, fusion: bool):
        super().__init__()
        self.attention = BertAttention(cfg, cfg.hidden_size)
        if fusion:
            self.crossattention = BertAttention(cfg, cfg.encoder_width)
        self.intermediate = BertIntermediate(cfg)
        self.output = BertOutput(cfg, cfg.intermediate_size)

    def forward(self, x, mask, video=None, rows=None, there=None, past=(None, None)):
        x = self.attention(x, x, mask, None, past[0])
        if video is not None:
            x = self.crossattention(x, video, there, rows, past[1])
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
        """Of word pieces (M, L) that begin at place `start`."""
        end = start + ids.shape[1]
        if end > self.position_embeddings.num_embeddings:
            raise ValueError(f"this BERT takes {self.position_embeddings.num_embeddings} word pieces, got {end}")
        position = self.position_embeddings.weight[start:end]
        x = self.word_embeddings(ids) + position + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class BertEncoder(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        first = cfg.num_hidden_layers - cfg.fusion_layers
        self.layer = nn.ModuleList(BertLayer(cfg, i >= first) for i in range(cfg.num_hidden_layers))


class BertBody(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.embeddings = BertEmbeddings(cfg)
        self.encoder = BertEncoder(cfg)


class BertHead(nn.Module):
    """Masked-language-model head; its decoder is the word embedding."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.predictions = nn.Module()
        self.predictions.transform = nn.Module()
        self.predictions.transform.dense = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.predictions.transform.LayerNorm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.predictions.bias = nn.Parameter(torch.zeros(cfg.vocab_size))


class Bert(nn.Module):
    """BERT in two parts: `text` in its first layers, `fuse` in its last, which read the video where there is one."""

    PAD = 0
    new: tuple[str, ...] = ()       # keys of the weights that from_pretrained did not find

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.first = cfg.num_hidden_layers - cfg.fusion_layers
        self.bert = BertBody(cfg)
        self.cls = BertHead(cfg)
        # BERT's 0.02 is of 768 channels: narrower layers would pass on next to nothing of what attention found.
        std = 0.02 * max(1, 768 / cfg.hidden_size) ** 0.5
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=std)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def text(self, ids: Tensor) -> Tensor:
        """ids (M, L) -> states (M, L, D) after the text-only layers."""
        x, mask = self.bert.embeddings(ids), self.mask(ids)
        for layer in self.bert.encoder.layer[:self.first]:
            x = layer(x, mask)
        return x

    def fuse(self, states: Tensor, ids: Tensor, video: Tensor | None = None, rows: Tensor | None = None,
             there: Tensor | None = None) -> Tensor:
        """
        The last layers: states (M, L, D), ids (M, L), video (B, S, C) -> (M, L, D).

        Text m attends to clip rows[m]; without rows to clip m; without a video the layers are plain BERT's. In place of
        the video can stand another text's states, then `there` (M, 1, 1, S) is True where that has a word.
        """
        mask = self.mask(ids)
        for layer in self.bert.encoder.layer[self.first:]:
            states = layer(states, mask, video, rows, there)
        return states

    def words(self, states: Tensor) -> Tensor:
        """states (..., D) -> logits (..., vocab)."""
        p = self.cls.predictions
        x = p.transform.LayerNorm(nnf.gelu(p.transform.dense(states)))
        return nnf.linear(x, self.bert.embeddings.word_embeddings.weight, p.bias)

    def predict(self, states: Tensor, labels: Tensor) -> Tensor:
        """
        states (M, L, D), labels (M, L), -100 where nothing is predicted -> the cross-entropy, summed over words.

        Logits are formed at as many places whatever the words, so that no host waits for a device to count them.
        """
        labels = labels.flatten()
        places = (labels == -100).byte().argsort(stable=True)[:most_words(labels.numel())]      # the words come first
        logits = self.words(states.flatten(0, 1)[places]).float()
        return nnf.cross_entropy(logits, labels[places], reduction="sum")

    def mask(self, ids: Tensor) -> Tensor:
        """ids (M, L) -> (M, 1, 1, L), True where there is a word; of a decoder (M, 1, L, L), True where it is seen."""
        there = (ids != self.PAD)[:, None, None, :]
        return there & there.new_ones(2 * ids.shape[1:]).tril() if self.cfg.is_decoder else there

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Training on text alone: corrupted ids and labels (M, L), as `corrupt` makes them -> the MLM loss by name."""
        count = (labels != -100).sum().clamp_min(1)
        return {"mlm": self.predict(self.fuse(self.text(ids), ids), labels) / count}

    @classmethod
    def from_pretrained(cls, name: str, **changes) -> "Bert":
        """
        A folder in Hugging Face's layout, or a hub id: config.json, model.safetensors (or its shards). In eval mode.

        Strict, but for what an encoder may lack: the cross-attention of a fusion layer and the MLM head, whole, are
        then new and their keys in `new`. `changes` to dropout and fusion are made; any other must be what is found.
        """
        folder = find_folder(name, "a BERT")
        refuse_pickles(folder)
        config, found = read_folder(folder, "a BERT")
        where = os.path.join(folder, "model*.safetensors")
        model, saved = cls(read_bert_config(config, os.path.join(folder, "config.json"), **changes)), {}
        prefix = "" if any(key.startswith("bert.") for key in found) else "bert."
        for key, value in found.items():
            key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            key = key if key.startswith("cls.") else prefix + key
            # The pooler and the next-sentence head have no place here; position_ids are 0, 1, 2, ...
            if not key.startswith(("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")):
                saved[key] = value
        for key, home in (("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
                          ("cls.predictions.decoder.bias", "cls.predictions.bias")):
            value = saved.pop(key, None)
            if value is not None and not torch.equal(value, saved.setdefault(home, value)):
                raise ValueError(f"{where}: {key} is not {home}, wanted the same: here the head's decoder is tied")

        def part(key):          # what a file may lack: a layer's cross-attention, the head
            return key.split("crossattention")[0] if "crossattention" in key else key.startswith("cls.")

        there = {False, *map(part, saved)}
        new = {key: value for key, value in model.state_dict().items() if part(key) not in there}
        load_weights(model, new | saved, where)
        model.new = tuple(new)
        return model.eval()

    def save(self, folder: str):
        """config.json and model.safetensors into the folder."""
        os.makedirs(folder, exist_ok=True)
        save_weights(self, folder)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump({"model_type": "bert", **asdict(self.cfg)}, f, indent=1)


def refuse_pickles(folder: str):
    """A folder whose weights are in pytorch_model.bin alone is refused, with the command that converts them."""
    there = [os.path.isfile(os.path.join(folder, name))
             for name in ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json")]
    if there == [True, False, False]:
        raise FileNotFoundError(
            f"{folder} is no folder of a BERT: it has no model.safetensors, and its pytorch_model.bin is not read; to "
            'convert it, in that folder: python -c "import torch, safetensors.torch as s; s.save_file({k: '
            "v.contiguous().clone() for k, v in torch.load('pytorch_model.bin', weights_only=True).items()}, "
            "'model.safetensors')\"")


def corrupt(ids: Tensor, vocab: int, mask_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """
    Half of the words to be predicted: ids (M, L) -> corrupted ids, labels (-100 where nothing is predicted).

    Of the chosen 80 % become [MASK], 10 % a random word, 10 % stay. The special tokens, whose ids go up to [MASK]'s as
    in bert-base-uncased, are never chosen, nor drawn; nor is what comes after the first `most_words`.
    """
    chosen, kind = (sent(torch.rand(ids.shape, generator=generator), ids.device) for _ in range(2))
    word = sent(torch.randint(mask_id + 1, vocab, ids.shape, generator=generator), ids.device)
    chosen = (chosen < 0.5) & (ids > mask_id)
    chosen &= chosen.flatten().cumsum(0).view(ids.shape) <= most_words(ids.numel())
    corrupted = torch.where(chosen & (kind < 0.8), mask_id, ids)
    corrupted = torch.where(chosen & (kind >= 0.9), word, corrupted)
    return corrupted, torch.where(chosen, ids, -100)


def most_words(places: int) -> int:
    """How many of so many places are predicted at most: half of them and six standard deviations of a fair choice."""
    return min(places, math.ceil(places / 2 + 3 * places ** 0.5))


# Decoder

class Decoder(nn.Module):
    """Encoded visible tokens -> what masked tokens are about, vectors in the teacher's joint space; or their pixels."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.kind, self.positions, self.draws = cfg.decoder, cfg.positions, cfg.objective == "pixels"
        C = cfg.decoder_width
        self.embed = nn.Linear(cfg.width, C)
        self.query = nn.Parameter(torch.empty(C))
        cross = cfg.decoder == "cross"
        self.blocks = nn.ModuleList(Block(C, cfg.decoder_heads, cross=cross) for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(C, eps=1e-6)
        self.proj = nn.Linear(C, 3 * cfg.patch ** 2 if self.draws else cfg.target)
        self.apply(xavier)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, visible: Tensor, keep: Tensor, wanted: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """visible (B, S, C) at the ids keep (B, S); wanted (B, Q) flat ids -> (B, Q, E), unit length, or pixels."""
        positions = sinusoids(grid, self.query.shape[0], self.positions, visible.device)
        visible = self.embed(visible) + positions[keep]
        x = self.query + positions[wanted]
        if self.kind == "joint":
            x = torch.cat([visible, x], 1)
        for block in self.blocks:
            x = block(x) if self.kind == "joint" else block(x, visible)
        x = self.proj(self.norm(x[:, -wanted.shape[1]:])).float()
        return x if self.draws else nnf.normalize(x, dim=-1)


class LinearDecoder(nn.Module):
    """UMT's, on the last layer alone: visible tokens -> what they are about, vectors in the teacher's joint space."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.positions = cfg.positions
        self.head, self.norm = nn.Linear(cfg.width, cfg.target), nn.LayerNorm(cfg.target)
        self.apply(xavier)

    def forward(self, visible: Tensor, keep: Tensor, wanted: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """visible (B, S, C) at the ids keep (B, S), which are those wanted -> (B, S, E), unit length."""
        x = visible + sinusoids(grid, visible.shape[-1], self.positions, visible.device)[keep]
        return nnf.normalize(self.norm(self.head(x)).float(), dim=-1)


# Losses

def gather(x: Tensor) -> Tensor:
    """x (...) of each rank -> (world, ...), without gradient."""
    x = x.detach().contiguous()
    if not dist.is_initialized():
        return x[None]
    out = x.new_empty((dist.get_world_size(), *x.shape))
    dist.all_gather(list(out.unbind(0)), x)
    return out


def total(x: Tensor) -> Tensor:
    """The sum of x over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def vtc_loss(video: Tensor, text: Tensor, media: Tensor, temp: Tensor) -> Tensor:
    """
    Symmetric InfoNCE: video (B, E), text (B, E), media (B,) -> scalar.

    video_i is the mean over frames of unit vectors, so that video_i . text_j is the mean of the frames' cosines. Clips
    of one medium are all positives of each other's captions: targets are the row-normalised equality of the media.
    """
    with torch.autocast(video.device.type, enabled=False):
        logits = video.float() @ text.float().T / temp                              # (B, B)
        same = (media[:, None] == media[None]).float()
        target = same / same.sum(1, keepdim=True)
        return (nnf.cross_entropy(logits, target) + nnf.cross_entropy(logits.T, target)) / 2


def spread(p: Tensor, relevance) -> Tensor:
    """The relevance form of p (B, Q, E) minus its clip's mean, averaged: the cost of predicting each clip's mean."""
    return relevance(p - p.mean(1, keepdim=True)).mean()


def hard_negatives(similarity: Tensor, media: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """
    For each row a column of another medium, drawn from the softmax of similarity (B, B): (B,) columns, (B,) valid.

    The draw is a Gumbel argmax. A row whose every column is of its own medium has no negative and is not valid.
    """
    other = media[:, None] != media[None]
    noise = torch.rand(similarity.shape, generator=generator).clamp_(1e-7, 1 - 1e-7).log().neg().log().neg()
    score = (similarity.float() + sent(noise, similarity.device)).masked_fill(~other, -torch.inf)
    return score.argmax(1), other.any(1)


@dataclass
class Whole:
    """What a micro-batch must know of the batch it is part of."""
    gram: Tensor | None         # G (E, E), mean over the batch's texts of s s^T
    variance: Tensor | None     # v, the spread of the relevance targets
    words: Tensor               # masked words a micro-batch, on average
    scale: float                # of VTC's gradient: the parts' gradients are averaged, and it is a sum over them
    index: int                  # this micro-batch among them
    corrupted: tuple | None     # ids and labels of the masked words
    wanted: Tensor | None       # (B, Q) flat ids of the tokens that are predicted
    others: tuple | None = None     # video (parts, B, E), text (parts, B, E), media (parts, B), if already known


class ClusterSTM(nn.Module):
    """The student and its losses."""

    def __init__(self, cfg: ModelConfig, text: Bert | None = None):
        super().__init__()
        if not (cfg.vocab and cfg.mask_id and cfg.target):
            raise ValueError(f"a model wants vocab, mask_id and target, got {cfg.vocab}, {cfg.mask_id}, {cfg.target}")
        self.cfg = cfg
        self.mlm = True         # whether words are masked and predicted; fine-tuning does without
        self.vit = ViT(cfg.patch, cfg.width, cfg.depth, cfg.heads, cfg.drop_path, cfg.positions)
        self.bert = text or Bert(bert_config(cfg))
        if self.bert.cfg != bert_config(cfg):
            raise ValueError(f"the text encoder is {self.bert.cfg}, the config wants {bert_config(cfg)}")
        self.decoder = LinearDecoder(cfg) if cfg.objective == "visible" else Decoder(cfg)
        self.pool_norm = nn.LayerNorm(cfg.width, eps=1e-6)
        self.vision_proj = nn.Linear(cfg.width, cfg.embed)
        self.text_proj = nn.Linear(cfg.text_width, cfg.embed)
        self.itm_head = nn.Linear(cfg.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        for m in (self.vision_proj, self.text_proj, self.itm_head):
            xavier(m)

    # What a video and a caption are: used alike in training and evaluation.

    def encode_video(self, video: Tensor, keep: Tensor | None = None,
                     size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        video (B, T, 3, H, W) uint8, keep and size (B, S) as the ViT's -> tokens (B, S, C), feature (B, E): the mean
        over frames of unit vectors.
        """
        T, h, w = self.vit.grid(video)
        tokens = self.vit(video, keep, size)
        if keep is None:
            weight = torch.ones(len(tokens), T, device=tokens.device)
            frames = tokens.view(len(tokens), T, h * w, -1).mean(2)                 # (B, T, C)
        else:       # a mask of the whole clip may leave a frame few tokens, or none: that frame does not count
            member = keep[..., None] // (h * w) == torch.arange(T, device=keep.device)
            member = member.to(tokens.dtype)                                        # (B, S, T)
            if size is not None:
                member = member * size[..., None].to(tokens.dtype)
            count = member.sum(1)                                                   # (B, T)
            weight = (count > 0).float()
            frames = member.mT @ tokens / count.clamp_min(1)[..., None]
        unit = nnf.normalize(self.vision_proj(self.pool_norm(frames)).float(), dim=-1)
        return tokens, (unit * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (M, L) -> states (M, L, D), feature (M, E) of unit length."""
        states = self.bert.text(ids)
        return states, self.text_feature(states)

    def text_feature(self, states: Tensor) -> Tensor:
        return nnf.normalize(self.text_proj(states[:, 0]).float(), dim=-1)

    def match(self, states: Tensor, ids: Tensor, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """How well texts (M, L, D) fit clips tokens (B, S, C): (M, 2) logits, the second for a match."""
        return self.itm_head(self.bert.fuse(states, ids, tokens, rows)[:, 0])

    # Training

    def encode(self, batch, guide: Guide | None, corrupted: tuple | None):
        """What forward begins with, and what `whole` needs beforehand for VTC."""
        tokens, video = self.encode_video(batch.video, guide and guide.keep, guide and guide.size)
        ids = torch.cat([batch.ids, corrupted[0]]) if corrupted else batch.ids
        states = self.bert.text(ids)                                                # (2B, L, D), without MLM (B, L, D)
        return tokens, video, states, self.text_feature(states[:len(batch.ids)])

    def corrupt(self, batch) -> tuple[Tensor, Tensor]:
        return corrupt(batch.ids, self.cfg.vocab, self.cfg.mask_id, stream(batch, 1))

    def wanted(self, batch, guide: Guide) -> Tensor:
        """
        The tokens to be predicted: (B, Q) flat ids; the masked ones, all of them or a share drawn anew each step, or
        the visible ones.
        """
        if self.cfg.objective == "visible":
            return guide.keep
        B, T, N, _ = guide.aligned.shape
        Q = T * N - guide.keep.shape[1]
        draw = sent(torch.rand(B, T * N, generator=stream(batch, 2)), guide.keep.device)
        if self.cfg.decoder == "cross":
            Q = min(Q, max(1, round(Q * self.cfg.decoder_share)))
        return draw.scatter(1, guide.keep, 2.0).argsort(1)[:, :Q]                   # the kept ones come last

    def relevance(self, guide: Guide, gram: Tensor | None):
        """The form e -> e^T G e, e (B, Q, E) -> (B, Q)."""
        if self.cfg.relevance == "batch":
            return lambda e: ((e @ gram) * e).sum(-1)
        if self.cfg.relevance == "own":
            return lambda e: (e @ guide.text.float()[..., None]).squeeze(-1).square()
        return lambda e: e.square().sum(-1)

    def reconstruct(self, batch, guide: Guide, whole: Whole, q: Tensor) -> dict[str, Tensor]:
        """The loss of what the decoder says of the wanted tokens, q (B, Q, E), or of their pixels (B, Q, 3 patch^2)."""
        if self.cfg.objective == "pixels":
            x = self.vit.pixels(batch.video, whole.wanted).float()
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
            return {"pixels": (q - x).square().mean()}
        p = guide.at(whole.wanted)
        if self.cfg.objective == "visible":
            return {"align": 2 - 2 * nnf.cosine_similarity(q, p, -1).mean()}
        form = self.relevance(guide, whole.gram)
        return {"mrm": form(q - p).mean() / whole.variance.clamp_min(1e-8)}

    @torch.no_grad()
    def whole(self, batches: list, guides: list[Guide | None]) -> list[Whole]:
        """
        The micro-batches of this rank -> what each must know of the whole batch; called by all ranks together.

        With one micro-batch a rank, VTC's features are gathered in `forward`. With several, those of the others are
        computed here first, so that VTC still runs over the whole batch.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        parts = world * len(batches)
        corrupted = [self.corrupt(b) if self.mlm else None for b in batches]
        masked = [(both[1] != -100).sum() for both in corrupted if both]
        words = total(sum(masked, torch.zeros((), device=batches[0].ids.device)).float()).clamp_min(1) / parts
        gram = variance = others = None
        wanted = [None] * len(batches)
        if guides[0] is not None and guides[0].aligned is not None:
            wanted = [self.wanted(b, g) for b, g in zip(batches, guides, strict=True)]
        if wanted[0] is not None and self.cfg.objective == "relevance":
            with torch.autocast(words.device.type, enabled=False):
                texts = [g.text.float() for g in guides]
                gram = total(sum(s.T @ s for s in texts)) / (parts * len(texts[0]))
                forms = [self.relevance(g, gram) for g in guides]
                spreads = [spread(g.at(ids), form) for g, ids, form in zip(guides, wanted, forms, strict=True)]
                variance = total(sum(spreads)) / parts
        if len(batches) > 1:
            features = []
            for b, g, words_masked in zip(batches, guides, corrupted, strict=True):
                torch.manual_seed(b.seed)           # the dropout of the forward pass that follows
                _, video, _, text = self.encode(b, g, words_masked)
                features.append((video, text, b.media))
            others = tuple(gather(torch.stack(x)).flatten(0, 1) for x in zip(*features, strict=True))
        scale = len(batches) if self.cfg.umt_vtc else parts
        return [Whole(gram, variance, words, scale, rank * len(batches) + i, *drawn, others)
                for i, drawn in enumerate(zip(corrupted, wanted, strict=True))]

    def forward(self, batch, guide: Guide | None, whole: Whole | None = None) -> dict[str, Tensor]:
        """
        batch: video (B, T, 3, H, W) uint8, ids (B, L), media (B,), seed -> the losses by name.

        The mean of a loss over the micro-batches of a batch, and over the ranks, is that loss of the batch, and so is
        its gradient. Without a guide, the unmasked stage: all tokens, and no MRM nor what stands in its place; nor
        where the guide has no targets.
        """
        if whole is None:
            whole, = self.whole([batch], [guide])
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        B = len(batch.ids)
        tokens, video, states, text = self.encode(batch, guide, whole.corrupted)
        losses = {}

        if whole.wanted is not None and whole.wanted.numel():
            q = self.decoder(tokens, guide.keep, whole.wanted, self.vit.grid(batch.video))
            with torch.autocast(tokens.device.type, enabled=False):
                losses |= self.reconstruct(batch, guide, whole, q)

        # The features of the other micro-batches are constants, own ones carry the gradient: summed over the parts.
        others = whole.others or (gather(video), gather(text), gather(batch.media))
        i = whole.index
        every = [torch.cat([x[:i], scale_gradient(own, whole.scale)[None], x[i + 1:]]).flatten(0, 1)
                 for x, own in zip(others, (video, text), strict=False)]
        losses["vtc"] = vtc_loss(*every, others[2].flatten(), self.temp)

        # One pass of the fusion layers: matching pairs, another clip, another text; and MLM, with the matching clip.
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            similarity = video @ text.T / self.temp
            clip, clip_ok = hard_negatives(similarity.T, batch.media, stream(batch, 3))     # for each text
            other, text_ok = hard_negatives(similarity, batch.media, stream(batch, 4))      # for each clip
        own = torch.arange(B, device=tokens.device)
        clean, corrupted = states[:B], states[B:]
        fused = self.bert.fuse(torch.cat([clean, clean, clean[other], corrupted]),
                               torch.cat([batch.ids, batch.ids, batch.ids[other], batch.ids[:len(corrupted)]]),
                               tokens, torch.cat([own, clip, own, own[:len(corrupted)]]))   # (4B, L, D)
        matched = self.itm_head(fused[:3 * B, 0]).float()
        label = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
        valid = torch.cat([torch.ones_like(clip_ok), clip_ok, text_ok])
        each = nnf.cross_entropy(matched, label, reduction="none")
        losses["vtm"] = each.where(valid, 0).sum() / valid.sum()

        if self.mlm:
            losses["mlm"] = self.bert.predict(fused[3 * B:], whole.corrupted[1]) / whole.words
        return losses

    def start_from(self, folder: str):
        """The weights of a folder that tools/convert.py or train.py wrote, but for what its config.json calls new."""
        config, saved = read_folder(folder, "a student")
        new = tuple(config.get("new", ()))
        trained = {"objective": "relevance"} | config.get("model", {})          # older runs had no other
        if "decoder.".startswith(new):
            del trained["objective"]
        for name in ("heads", "text_heads", "positions", "objective"):          # no shape need tell of these
            wanted = getattr(self.cfg, name)
            have = trained.get(name, wanted)
            if have != wanted:
                raise ValueError(f"{folder}/config.json: model.{name} is {have!r}, wanted {wanted!r}")
        kept = {key: value for key, value in self.state_dict().items() if key.startswith(new)}
        load_weights(self, kept | {key: value for key, value in saved.items() if not key.startswith(new)}, folder)

    def save(self, folder: str):
        """model.safetensors into the folder, whole or not at all; its config.json is the run's."""
        save_weights(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str) -> "ClusterSTM":
        """A folder that train.py wrote: config.json, model.safetensors. In eval mode."""
        return load_model(folder, cls)


# Answers

class VideoToText(nn.Module):
    """
    The student and a decoder that says something of a clip: the answer to a question, or a caption.

    The decoder is UMT's (multi_modality/models/umt_qa.py): a causal BERT of as many layers as fuse, each with
    cross-attention, to the states of the question that was fused with the video; of a caption to the video's tokens.
    """

    def __init__(self, cfg: ModelConfig, asks: bool):
        """asks: whether there is a question."""
        super().__init__()
        self.cfg = cfg
        self.vit = ViT(cfg.patch, cfg.width, cfg.depth, cfg.heads, cfg.drop_path, cfg.positions)
        self.bert = Bert(bert_config(cfg)) if asks else None
        self.text_decoder = Bert(replace(bert_config(cfg), num_hidden_layers=cfg.fusion, is_decoder=True,
                                         encoder_width=cfg.text_width if asks else cfg.width))

    @classmethod
    def from_student(cls, student: ClusterSTM, asks: bool) -> "VideoToText":
        """It begins with the student's ViT and BERT; the decoder with BERT's words, last layers and head."""
        model, bert = cls(student.cfg, asks), student.bert
        model.vit.load_state_dict(student.vit.state_dict())
        if asks:
            model.bert.load_state_dict(bert.state_dict())
        state = model.text_decoder.state_dict()
        for key, value in bert.state_dict().items():
            layer = re.match(r"bert\.encoder\.layer\.(\d+)\.", key)
            if layer and int(layer[1]) < bert.first:
                continue
            key = key.replace(layer[0], f"bert.encoder.layer.{int(layer[1]) - bert.first}.") if layer else key
            # Made of video tokens so far: where a question's states are wider or narrower, they are new.
            made_of = "crossattention.self.key." in key or "crossattention.self.value." in key
            if not (asks and made_of and model.cfg.width != model.cfg.text_width):
                state[key] = value
        model.text_decoder.load_state_dict(state)
        return model

    def encode_video(self, video: Tensor, keep: Tensor | None = None,
                     size: Tensor | None = None) -> tuple[Tensor, None]:
        """video (B, T, 3, H, W) uint8 -> tokens (B, S, C); no feature, as it compares nothing."""
        return self.vit(video, keep, size), None

    def ask(self, tokens: Tensor, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        What the decoder attends to, and where there is something: tokens (B, S, C), questions ids (Q, L) about clips
        rows (Q,) -> (Q, L, D), (Q, L); for captions the tokens themselves, None.
        """
        if self.bert is None:
            return tokens, None
        return self.bert.fuse(self.bert.text(ids), ids, tokens, rows), ids != Bert.PAD

    def log_likelihood(self, answers: Tensor, asked: Tensor, memory: Tensor, there: Tensor | None) -> Tensor:
        """answers (A, L'), answer a being to memory asked[a] -> (A, L' - 1) log p of each piece; 0 past its end."""
        decoder, heard = self.text_decoder, None if there is None else there[asked][:, None, None, :]
        before, after = answers[:, :-1], answers[:, 1:]
        said = after != Bert.PAD
        states = decoder.fuse(decoder.text(before), before, memory, asked, heard)
        if self.training:           # padding too: what it costs is less than to wait for the device to count pieces
            logits = decoder.words(states).float().flatten(0, 1)
            return -nnf.cross_entropy(logits, after.flatten(), reduction="none", ignore_index=Bert.PAD).view(said.shape)
        logits = decoder.words(states[said]).float()                                # (pieces, vocab)
        each = nnf.cross_entropy(logits, after[said], reduction="none")
        return torch.zeros(said.shape, device=each.device).masked_scatter(said, -each)

    def forward(self, batch, guide: Guide | None = None) -> dict[str, Tensor]:
        """
        The cost of the answers by name, in nats: summed over pieces, weighted over answers, mean over questions. With a
        guide the ViT sees the tokens that it keeps.
        """
        tokens = self.vit(batch.video, guide and guide.keep, guide and guide.size)
        memory, there = self.ask(tokens, batch.ids, batch.rows)
        told = batch.asked if self.bert else batch.rows[batch.asked]                # a question's states, or a clip
        cost = -self.log_likelihood(batch.answers, told, memory, there).sum(1)      # (A,)
        return {"lm": (cost * batch.weight).sum() / len(batch.ids)}

    @torch.no_grad()
    def generate(self, memory: Tensor, there: Tensor | None, length: int, beams: int, cls: int, sep: int) -> Tensor:
        """
        What the decoder says of memory (Q, S, C): ids (Q, length), [CLS] to [SEP], padded with [PAD].

        Beam search; sentences are compared by the mean log p of their pieces, finished or not. beams = 1 is greedy.
        """
        decoder, Q, W = self.text_decoder, len(memory), beams
        heard = None if there is None else there[:, None, None, :]
        past = [([], []) for _ in decoder.bert.encoder.layer]
        said = torch.full((Q, W, 1), cls, device=memory.device)
        total = torch.zeros(Q, W, device=memory.device)
        total[:, 1:] = -torch.inf                                                   # all begin alike: one will do
        count = torch.zeros(Q, W, device=memory.device)
        done = torch.zeros(Q, W, dtype=torch.bool, device=memory.device)
        for t in range(length - 1):
            x = decoder.bert.embeddings(said[..., -1:].flatten(0, 1), t)            # (QW, 1, D)
            for layer, kept in zip(decoder.bert.encoder.layer, past, strict=True):
                x = layer(x, None, memory, None, heard, kept)
            p = decoder.words(x[:, 0]).float().log_softmax(-1).view(Q, W, -1)       # (Q, W, V)
            p[..., Bert.PAD] = -torch.inf
            p = torch.where(done[..., None], -torch.inf, p)
            p[..., Bert.PAD] = torch.where(done, 0.0, p[..., Bert.PAD])             # what is finished stays as it is
            sums, counts = total[..., None] + p, count + ~done                      # (Q, W, V), (Q, W)
            best = (sums / counts[..., None]).flatten(1).topk(W).indices            # (Q, W)
            beam, piece = best // p.shape[-1], best % p.shape[-1]
            total, count = sums.flatten(1).gather(1, best), counts.gather(1, beam)
            done = done.gather(1, beam) | (piece == sep)
            said = torch.cat([said.gather(1, beam[..., None].expand(-1, -1, t + 1)), piece[..., None]], -1)
            if done.all():
                break
            if W > 1:
                origin = (beam + W * torch.arange(Q, device=beam.device)[:, None]).flatten()
                for own, _ in past:
                    own[:] = own[0][origin], own[1][origin]
        first = (total / count.clamp_min(1)).argmax(1)
        said = said[torch.arange(Q, device=said.device), first]
        return nnf.pad(said, (0, length - said.shape[1]), value=Bert.PAD)

    @classmethod
    def from_pretrained(cls, folder: str) -> "VideoToText":
        """A folder that train.py --stage finetune wrote for question answering or captioning. In eval mode."""
        return load_model(folder, cls)


def load_model(folder: str, kind: type | None = None) -> ClusterSTM | VideoToText:
    """The model of a folder that train.py wrote, in eval mode; ValueError if it is not of the kind that is wanted."""
    config, saved = read_folder(folder, "a trained model")
    where = f"{folder}/config.json"
    if "model" not in config:
        raise ValueError(f"{where} has no 'model' part: no run of train.py wrote it")
    cfg, speaks = known(ModelConfig, config["model"]), any(key.startswith("text_decoder.") for key in saved)
    if kind and kind is not (VideoToText if speaks else ClusterSTM):
        raise ValueError(f"{folder} holds a model that {'speaks' if speaks else 'compares'}, wanted a {kind.__name__}")
    model = VideoToText(cfg, any(key.startswith("bert.") for key in saved)) if speaks else ClusterSTM(cfg)
    load_weights(model, saved, folder)
    return model.eval()


def bert_config(cfg: ModelConfig) -> BertConfig:
    return BertConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.text_width, num_hidden_layers=cfg.text_depth,
        num_attention_heads=cfg.text_heads, intermediate_size=4 * cfg.text_width, hidden_dropout_prob=cfg.dropout,
        max_position_embeddings=512, fusion_layers=cfg.fusion, encoder_width=cfg.width,
    )


def save_weights(model: nn.Module, folder: str):
    path = os.path.join(folder, "model.safetensors")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path + ".tmp")
    os.replace(path + ".tmp", path)


def stream(batch, k: int) -> torch.Generator:
    """Random numbers of a micro-batch, for one of its purposes; drawn on the CPU, so the same on every device."""
    return torch.Generator().manual_seed((batch.seed + k * 0x9E3779B97F4A7C15) % 2 ** 63)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, its gradient times factor."""
    return x.detach() + factor * (x - x.detach())


