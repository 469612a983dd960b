"""
The student and its losses: ClusterSTM for pretraining and retrieval, VideoToText for answers and captions.

    Batch (video, text_ids, media_ids, seed) + TeacherTargets  ->  ClusterSTM   ->  losses by name: mrm, vtc, vtm, mlm
    Batch (video, text_ids, answer_ids, ...)                   ->  VideoToText  ->  {"lm": loss}, or generated token ids

A batch is cut into micro-batches, over the ranks and within a rank. BatchStats holds what the loss of a micro-batch
needs of the others, so that the mean of the micro-batches' losses is the loss of the batch. Letters and equations:
docs/method.md.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from tokenizers import Tokenizer
from torch import Tensor, nn

from blocks import init_xavier
from budgets import gumbel_noise
from decoders import Decoder, LinearDecoder, ModelConfig
from encoders import Bert, TextEncoderConfig, ViT, ViTConfig, bert_config, mask_tokens
from files import config_from_dict, load_state_dict_strict, read_checkpoint, require, resolve_checkpoint
from inputs import ModelInputs, embed_clips, embed_texts, require_finite, require_videos
from kernels import to_device
from positions import NEEDS_GRID
from products import Matmul, QuadraticForm
from runtime import Stream, all_gather, all_reduce_sum, bf16_autocast, rank_and_world, seeded_generator
from targets import TeacherTargets
from tokenizer import decode_ids, special_token_ids

if TYPE_CHECKING:
    from data import Batch


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def vtc_loss(video: Tensor, text: Tensor, media_ids: Tensor, temp: Tensor) -> Tensor:
    """
    Symmetric InfoNCE: video (B, E'), text (B, E'), media_ids (B,) -> scalar.

    video_i is the mean over frames of unit vectors, so that video_i . text_j is the mean of the frames' cosines; or it
    is one unit vector (ModelConfig.pooling). Clips of one medium are positives of each other's captions: targets are
    the row-normalised equality of media_ids.
    """
    with torch.autocast(video.device.type, enabled=False):
        logits = Matmul.apply(video.float(), text.float().T) / temp                 # (B, B)
        positive = (media_ids[:, None] == media_ids[None]).float()
        target = positive / positive.sum(1, keepdim=True)
        return (nnf.cross_entropy(logits, target) + nnf.cross_entropy(logits.T, target)) / 2


def target_variance(targets: Tensor, form) -> Tensor:
    """Average form(p minus its clip's mean) over targets p (B, Q, E): MRM's error of predicting that mean."""
    return form(targets - targets.mean(1, keepdim=True)).mean()


def hard_negatives(similarity: Tensor, media_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """
    Draw for each row a column of another medium from the softmax of similarity (B, B) -> columns (B,), valid (B,).

    The draw is a Gumbel argmax. A row is not valid if all columns are of its own medium.
    """
    is_negative = media_ids[:, None] != media_ids[None]
    noise = to_device(gumbel_noise(similarity.shape, generator), similarity.device)
    score = (similarity.float() + noise).masked_fill(~is_negative, -torch.inf)
    return score.argmax(1), is_negative.any(1)


@dataclass
class BatchStats:
    """
    Statistics of the global batch that the loss of one micro-batch needs.

    parts: the number of micro-batches of the batch, over all ranks.
    """
    text_gram: Tensor | None            # G (E, E), mean of s s^T over the texts of the batch, if it is used
    target_variance: Tensor | None      # v, the MRM error of predicting each clip's mean target
    mlm_denominator: Tensor             # masked tokens per micro-batch, averaged over the batch
    grad_scale: float                   # parts: VTC's gradients are averaged over the parts, but must be summed
    index: int                          # of this micro-batch among the parts
    mlm_inputs: tuple[Tensor, Tensor] | None    # masked ids and labels (B, L)
    query_ids: Tensor | None            # (B, Q) flat ids of the tokens that are predicted
    gathered_features: tuple[Tensor, ...] | None = None     # video, text (parts, B, E'), media_ids (parts, B)
    suffix: str = ""                    # of the losses' names, if this is one of several budgets of the step: "_96"
    fuses: bool = True                  # whether VTM and MLM are computed; of several budgets, at one
    larger: list[Tensor] | None = None  # features (B, E') at the larger budgets, if they are to be learned from


# ---------------------------------------------------------------------------------------------------------------------
# The student

class ClusterSTM(nn.Module):
    """The student: ViT, BERT, decoder, projections and losses."""

    inputs = ModelInputs()          # how a user's videos and texts are read; from_pretrained sets it

    def __init__(self, vit: ViTConfig, text: TextEncoderConfig, cfg: ModelConfig, bert: Bert | None = None,
                 with_bert: bool = True):
        """bert: the text encoder; None: a new one, unless with_bert is False, for losses that read no texts."""
        super().__init__()
        for name, value in (("text.vocab_size", text.vocab_size), ("text.mask_token_id", text.mask_token_id),
                            ("model.target_dim", cfg.target_dim)):
            if not value:
                raise ValueError(f"{name} must be set to build a student, got {value}")
        if cfg.pooling == "cls" and not vit.cls:
            raise ValueError(f"vit.cls must be True with model.pooling 'cls', got {vit.cls}")
        self.vit_cfg, self.text_cfg, self.cfg = vit, text, cfg
        self.losses = cfg.losses
        self.vit = ViT(vit)
        self.bert = bert or Bert(bert_config(text, vit.width)) if with_bert else None
        if with_bert and self.bert.cfg != bert_config(text, vit.width):
            raise ValueError(f"the text encoder must be {bert_config(text, vit.width)}, got {self.bert.cfg}")
        self.decoder = LinearDecoder(vit, cfg) if cfg.objective == "visible" else Decoder(vit, cfg)
        self.pool_norm = nn.LayerNorm(vit.width, eps=1e-6)
        self.vision_proj = nn.Linear(vit.width, cfg.embed_dim)
        self.text_proj = nn.Linear(text.width, cfg.embed_dim)
        self.itm_head = nn.Linear(text.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        for m in (self.vision_proj, self.text_proj, self.itm_head):
            init_xavier(m)

    # Features. Training and evaluation share them.

    def encode_video(self, video: Tensor, visible_ids: Tensor | None = None, token_size: Tensor | None = None,
                     patch_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        video (B, T, 3, H, W) uint8, visible_ids, token_size (B, S) and patch_embeds (B, TN, C) as of ViT -> tokens
        (B, S, C), feature (B, E').

        The feature is the mean over frames of the unit vector of each frame's mean token. With cfg.pooling "tokens" the
        clip counts as one frame. With "cls" it is the unit vector of the class token.
        """
        if self.cfg.pooling == "cls":
            tokens, cls = self.vit.encode(video, visible_ids, token_size, patch_embeds)
            return tokens, self.video_feature(cls)
        T, h, w = self.vit.grid_size(video)
        T, N = (T, h * w) if self.cfg.pooling == "frames" else (1, T * h * w)
        tokens = self.vit(video, visible_ids, token_size, patch_embeds)
        if visible_ids is None:
            weight = torch.ones(len(tokens), T, device=tokens.device)
            frames = tokens.view(len(tokens), T, N, -1).mean(2)                     # (B, T, C)
        else:       # a mask of the whole clip may leave a frame without a visible token: that frame has weight 0
            in_frame = visible_ids[..., None] // N == torch.arange(T, device=visible_ids.device)
            in_frame = in_frame.to(tokens.dtype)                                    # (B, S, T)
            if token_size is not None:
                in_frame = in_frame * token_size[..., None].to(tokens.dtype)
            count = in_frame.sum(1)                                                 # (B, T)
            weight = (count > 0).float()
            frames = in_frame.mT @ tokens / count.clamp_min(1)[..., None]
        return tokens, (self.video_feature(frames) * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)

    def video_feature(self, x: Tensor) -> Tensor:
        """Pooled tokens x (..., C) -> unit vectors (..., E')."""
        return nnf.normalize(self.vision_proj(self.pool_norm(x)).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (M, L) -> states (M, L, D), feature (M, E') of unit length."""
        self.require_bert()
        states = self.bert.forward_text(ids)
        return states, self.text_feature(states)

    def require_bert(self):
        """Raise a ValueError if the student has no text encoder."""
        if self.bert is None:
            raise ValueError(f"{self.inputs.folder or 'the student'} must have a text encoder, got one trained without "
                             "losses of texts; train.py --init-from adds one")

    def text_feature(self, states: Tensor) -> Tensor:
        """states (M, L, D) -> feature (M, E') of unit length, from the [CLS] token."""
        return nnf.normalize(self.text_proj(states[:, 0]).float(), dim=-1)

    def match(self, states: Tensor, ids: Tensor, tokens: Tensor, clip_index: Tensor | None = None) -> Tensor:
        """
        Match texts with clips: states (M, L, D), ids (M, L), tokens (B, S, C) -> logits (M, 2), the second of a match.

        Text m is matched with clip clip_index[m], or with clip m if there is no index.
        """
        return self.itm_head(self.bert.forward_cls(states, ids, tokens, clip_index)[0])

    def forward_features(self, batch: "Batch", targets: TeacherTargets | None, mlm_inputs: tuple | None):
        """
        -> tokens (B, S, C), video feature (B, E'), text states (B, L, D), text feature (B, E'), states of the masked
        texts (B, L, D); None for what no loss uses.
        """
        clip = batch.video, targets and targets.visible_ids, targets and targets.token_size
        compares = bool(self.losses & {"vtc", "vtm"})
        pools = compares or self.cfg.distill != "none"
        tokens, video = self.encode_video(*clip) if pools else (self.vit(*clip), None)
        ids = [batch.text_ids] * compares + ([mlm_inputs[0]] if mlm_inputs else [])
        states = self.bert.forward_text(torch.cat(ids)).split(len(batch.text_ids)) if ids else ()
        text = (states[0], self.text_feature(states[0])) if compares else (None, None)
        return tokens, video, *text, states[-1] if mlm_inputs else None

    # What is drawn at random for a micro-batch

    def mask_text(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """-> masked ids and labels (B, L), see mask_tokens."""
        generator = seeded_generator(batch, Stream.MLM)
        return mask_tokens(batch.text_ids, self.text_cfg.vocab_size, self.text_cfg.mask_token_id, generator)

    def sample_queries(self, batch: "Batch", targets: TeacherTargets) -> Tensor:
        """
        -> flat ids (B, Q) of the tokens that the decoder predicts: of the masked ones all (joint) or a random share or
        number (cross); if the objective is "visible", the visible ones.
        """
        visible_ids = targets.visible_ids
        if self.cfg.objective == "visible":
            return visible_ids
        pool = math.prod(self.vit.grid_size(batch.video)) if targets.pool_ids is None else targets.pool_ids.shape[1]
        B, S = visible_ids.shape
        Q = pool - S
        score = to_device(torch.rand(B, pool, generator=seeded_generator(batch, Stream.QUERIES)), visible_ids.device)
        if self.cfg.decoder == "cross":
            Q = min(Q, self.cfg.decoder_queries or max(2, round(Q * self.cfg.decoder_query_ratio)))
        ids = score.scatter(1, targets.find(visible_ids), 2.0).argsort(1)[:, :Q]    # visible tokens sort last
        return ids if targets.pool_ids is None else targets.pool_ids.gather(1, ids)

    # Statistics of the batch

    @torch.no_grad()
    def batch_stats(self, batches: list["Batch"], targets: list[TeacherTargets | None], budget: int = 0,
                    num_budgets: int = 1) -> list[BatchStats]:
        """
        The micro-batches of this rank -> the statistics for each. All ranks must call it together. The targets are
        those of a budget of the step, by its index. Of several budgets, VTM and MLM are computed at one, which each
        micro-batch draws.

        With one micro-batch per rank, `forward` gathers VTC's features. With several, the features of all are computed
        here first, so that VTC still runs over the whole batch (as GradCache, Gao et al., arXiv 2101.06983).
        """
        rank, world = rank_and_world()
        parts = world * len(batches)
        mlm_inputs = [self.mask_text(b) if "mlm" in self.losses else None for b in batches]
        mlm_denominator = self.count_masked_tokens(batches, mlm_inputs) / parts
        fuses = [b.seed % num_budgets == budget for b in batches]
        mlm_inputs = [inputs if fused else None for inputs, fused in zip(mlm_inputs, fuses, strict=True)]
        suffix = f"_{targets[0].visible_ids.shape[1]}" if num_budgets > 1 else ""
        text_gram = variance = gathered = None
        query_ids = [None] * len(batches)
        has_targets = targets[0] is not None and (
            self.cfg.objective == "pixels" or targets[0].token_targets is not None)
        if "mrm" in self.losses and has_targets:
            query_ids = [self.sample_queries(b, t) for b, t in zip(batches, targets, strict=True)]
            if self.cfg.objective == "relevance":
                text_gram, variance = self.mrm_stats(targets, query_ids, parts)
        if len(batches) > 1 and "vtc" in self.losses:
            gathered = self.gather_features(batches, targets, mlm_inputs, budget)
        return [BatchStats(text_gram, variance, mlm_denominator, parts, rank * len(batches) + i, *drawn, gathered,
                           suffix, fused)
                for i, (*drawn, fused) in enumerate(zip(mlm_inputs, query_ids, fuses, strict=True))]

    def count_masked_tokens(self, batches: list["Batch"], mlm_inputs: list[tuple | None]) -> Tensor:
        """Count the masked text tokens of the batch, over all ranks; at least 1."""
        counts = [(labels != -100).sum() for _, labels in filter(None, mlm_inputs)]
        return all_reduce_sum(sum(counts, torch.zeros((), device=batches[0].text_ids.device)).float()).clamp_min(1)

    def mrm_stats(self, targets: list[TeacherTargets], query_ids: list[Tensor], parts: int) -> tuple:
        """-> G (E, E), None if it is not used, and v of the whole batch, over all ranks (docs/method.md, MRM)."""
        with torch.autocast(query_ids[0].device.type, enabled=False):
            texts = [t.text_embeds.float() for t in targets] if self.cfg.mrm_texts == "batch" else []
            text_gram = all_reduce_sum(sum(s.T @ s for s in texts)) / (parts * len(texts[0])) if texts else None
            variances = [target_variance(t.gather(ids), self.relevance_form(t, text_gram))
                         for t, ids in zip(targets, query_ids, strict=True)]
            return text_gram, all_reduce_sum(sum(variances)) / parts

    def gather_features(self, batches: list["Batch"], targets: list[TeacherTargets | None],
                        mlm_inputs: list[tuple | None], budget: int) -> tuple[Tensor, ...]:
        """-> video and text features (parts, B, E') and media_ids (parts, B) of the whole batch, without gradient."""
        features = []
        for batch, target, inputs in zip(batches, targets, mlm_inputs, strict=True):
            torch.manual_seed(batch.seed + budget)  # the same dropout as in the forward pass that follows
            _, video, _, text, _ = self.forward_features(batch, target, inputs)
            features.append((video, text, batch.media_ids))
        return tuple(all_gather(torch.stack(x)).flatten(0, 1) for x in zip(*features, strict=True))

    # Losses

    def relevance_form(self, targets: TeacherTargets, text_gram: Tensor | None):
        """The quadratic form of MRM, e -> e^T G e with G of the chosen texts, as a function: e (B, Q, E) -> (B, Q)."""
        if self.cfg.mrm_texts == "batch":
            return lambda e: QuadraticForm.apply(e, text_gram)
        if self.cfg.mrm_texts == "own":
            return lambda e: (e @ targets.text_embeds.float()[..., None]).squeeze(-1).square()
        return lambda e: e.square().sum(-1)

    def reconstruction_loss(self, batch: "Batch", targets: TeacherTargets, stats: BatchStats,
                            predictions: Tensor) -> dict[str, Tensor]:
        """
        predictions (B, Q, E), or pixels (B, Q, 3 patch_size^2), of the query_ids -> one loss by name.

        mrm: the relevance error over its value for each clip's mean; align: UMT's 2 - 2 cos; pixels: MAE's squared
        error on patches normalised by their mean and variance (He et al., arXiv 2111.06377).
        """
        if self.cfg.objective == "pixels":
            x = self.vit.patch_pixels(batch.video, stats.query_ids).float()
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
            return {"pixels": (predictions - x).square().mean()}
        token_targets = targets.gather(stats.query_ids)
        if self.cfg.objective == "visible":
            return {"align": 2 - 2 * nnf.cosine_similarity(predictions, token_targets, -1).mean()}
        form = self.relevance_form(targets, stats.text_gram)
        return {"mrm": form(predictions - token_targets).mean() / stats.target_variance.clamp_min(1e-8)}

    def contrastive_loss(self, batch: "Batch", video: Tensor, text: Tensor, stats: BatchStats) -> Tensor:
        """
        VTC over the whole batch; video, text (B, E') of this micro-batch.

        The features of the other micro-batches are constants, those of this one carry the gradient. Added over the
        micro-batches, these are the gradient of the whole batch.
        """
        gathered = stats.gathered_features or (all_gather(video), all_gather(text), all_gather(batch.media_ids))
        i, all_features = stats.index, []
        for constants, features in zip(gathered[:2], (video, text), strict=True):
            features = features.detach() + stats.grad_scale * (features - features.detach())    # scales the gradient
            all_features.append(torch.cat([constants[:i], features[None], constants[i + 1:]]).flatten(0, 1))
        return vtc_loss(*all_features, gathered[2].flatten(), self.temp)

    def distillation_loss(self, video: Tensor, larger: list[Tensor]) -> Tensor:
        """
        Compare features (B, E') with those of a larger budget, which get no gradient (FluxViT, Wang et al., ICCV 2025,
        §3.4): `chain` with those of the next larger one, `star` with those of the largest.
        """
        target = larger[0] if self.cfg.distill == "star" else larger[-1]
        with torch.autocast(video.device.type, enabled=False):
            if self.cfg.distill_loss == "cosine":
                return 1 - nnf.cosine_similarity(video.float(), target.float(), -1).mean()
            return nnf.smooth_l1_loss(nnf.normalize(video.float(), dim=-1), nnf.normalize(target.float(), dim=-1))

    def reach_fusion(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add 0 times the parameters that VTM and MLM use, as DDP waits for a gradient of each in the last pass."""
        parts = [self.itm_head, self.bert] if self.bert else []
        zero = sum(0 * p.flatten()[0] for part in parts for p in part.parameters() if p.requires_grad)
        name = next(iter(losses))
        return losses | {name: losses[name] + zero}

    def fusion_losses(self, batch: "Batch", tokens: Tensor, features: tuple, states: Tensor | None,
                      masked_states: Tensor | None, stats: BatchStats) -> dict[str, Tensor]:
        """
        VTM and MLM from one pass of the fusion layers: tokens (B, S, C), video and text features (B, E'), states and
        masked_states (B, L, D) -> those of the two losses that have a weight.

        VTM classifies the matching pairs, each text with a hard negative clip and each clip with a hard negative text,
        all of this micro-batch (ALBEF, Li et al., arXiv 2107.07651). MLM reads the matching clip.
        """
        ids, B, losses = batch.text_ids, len(batch.text_ids), {}
        if "vtm" in self.losses:
            with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
                similarity = features[0] @ features[1].T / self.temp                        # (B, B)
                negative_clip, has_clip = hard_negatives(similarity.T, batch.media_ids,
                                                         seeded_generator(batch, Stream.NEG_CLIP))
                negative_text, has_text = hard_negatives(similarity, batch.media_ids,
                                                         seeded_generator(batch, Stream.NEG_TEXT))
            # In the order of the clips: their own, a negative and their masked text. Then, by an index, each text again
            # for a negative clip.
            use_mlm = "mlm" in self.losses
            in_order = torch.stack([states, states[negative_text]] + [masked_states] * use_mlm, 1)  # (B, 3, L, D)
            in_order_ids = torch.stack([ids, ids[negative_text]] + [ids] * use_mlm, 1)
            masked = torch.arange(2, 3 * B, 3, device=ids.device) if use_mlm else None
            cls, masked_states = self.bert.forward_cls(
                torch.cat([in_order.flatten(0, 1), states]), torch.cat([in_order_ids.flatten(0, 1), ids]), tokens,
                negative_clip, masked)
            of_own_clip, of_negative_clip = cls[:-B].view(B, -1, cls.shape[-1]), cls[-B:]
            logits = self.itm_head(torch.cat([of_own_clip[:, 0], of_negative_clip, of_own_clip[:, 1]])).float()
            label = torch.cat([torch.ones_like(negative_clip), torch.zeros_like(negative_clip).repeat(2)])
            valid = torch.cat([torch.ones_like(has_clip), has_clip, has_text])
            errors = nnf.cross_entropy(logits, label, reduction="none")
            losses["vtm"] = errors.where(valid, 0).sum() / valid.sum()
        elif "mlm" in self.losses:
            masked_states = self.bert.forward_fusion(masked_states, ids, tokens)
        if "mlm" in self.losses:
            losses["mlm"] = self.bert.mlm_loss(masked_states, stats.mlm_inputs[1]) / stats.mlm_denominator
        return losses

    def forward(self, batch: "Batch", targets: TeacherTargets | None,
                stats: BatchStats | None = None) -> dict[str, Tensor]:
        """
        batch: video (B, T, 3, H, W) uint8, text_ids (B, L), media_ids (B,), seed -> the losses that have a weight.

        The mean of a loss over the micro-batches of a batch, on all ranks, is that loss of the batch, and so is its
        gradient. Without targets (the unmasked stage) all tokens are visible and there is no reconstruction loss;
        nor is there one if the targets have no token_targets.
        """
        if stats is None:
            stats, = self.batch_stats([batch], [targets])
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        tokens, video, states, text, masked_states = self.forward_features(batch, targets, stats.mlm_inputs)
        losses = {}
        if stats.query_ids is not None and stats.query_ids.numel():
            grid = self.vit.grid_size(batch.video)
            predictions = self.decoder(tokens, targets.visible_ids, stats.query_ids, grid)
            with torch.autocast(tokens.device.type, enabled=False):
                losses |= self.reconstruction_loss(batch, targets, stats, predictions)
        if "vtc" in self.losses:
            losses["vtc"] = self.contrastive_loss(batch, video, text, stats)
        if stats.larger is not None:
            if stats.larger:
                losses["distill"] = self.distillation_loss(video, stats.larger)
            stats.larger.append(video.detach())
        losses = {f"{name}{stats.suffix}": value for name, value in losses.items()}
        if not stats.fuses:
            return self.reach_fusion(losses)
        return losses | self.fusion_losses(batch, tokens, (video, text), states, masked_states, stats)

    # Embeddings of a user's videos and texts

    def embed_videos(self, videos: list[str] | Tensor, batch: int = 32) -> Tensor:
        """
        Embed videos, paths or (B, T, 3, H, W) uint8 -> (B, E'), features as encode_video returns them. `batch` videos
        are read and encoded at a time, with as many frames, of the size, that the model was trained with.

        embed_videos(videos) @ embed_texts(texts).T are mean cosines of the frames: the similarities of eval.py.
        """
        self.require_bert()                     # without texts the projection is not trained
        device = self.temp.device
        clips = self.inputs.iter_clips(videos, batch, device)
        return embed_clips(lambda video: self.encode_video(video)[1], clips, self.cfg.embed_dim, device)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts, which are normalised as captions are in training -> (M, E') of unit length."""
        device = self.temp.device
        encode = lambda chunk: self.encode_text(self.inputs.encode_texts(chunk, "texts").to(device))[1]
        return embed_texts(encode, texts, self.cfg.embed_dim, device)

    # Folders

    def init_from(self, folder: str):
        """
        Load the weights of a folder written by train.py or tools/convert.py.

        Weights whose names begin with an entry of "new" in its config.json keep their values. Settings that no shape of
        a weight shows must agree: attention heads, position embeddings and the grid that these refer to, the kinds of
        norms; the objective if the decoder is loaded, the pooling if the projection of videos is. vit.local_pos may be
        added to a ViT that was trained without it: its weights then begin at 0, not at 1, so that the ViT computes
        what it did.
        """
        config, weights = read_checkpoint(folder, "a student")
        path, new = f"{folder}/config.json", tuple(config.get("new", ()))
        configs = {"vit": self.vit_cfg, "text": self.text_cfg, "model": self.cfg}
        # A setting that the file does not have is taken to agree.
        older = {"model": {"pooling": "frames"}}                # of files from before there were others
        trained = {part: config_from_dict(type(cfg), asdict(cfg) | older.get(part, {}) | config.get(part, {}),
                                          f"{path}: {part}") for part, cfg in configs.items()}
        settings = [*(("vit", name) for name in ("heads", "pos_embed", "norm", "patch_norm")), ("text", "heads")]
        settings += [("vit", "grid")] * (self.vit_cfg.pos_embed in NEEDS_GRID)
        settings += [("model", "objective")] * (not "decoder.".startswith(new))
        settings += [("model", "pooling")] * (not "vision_proj.".startswith(new))
        for part, name in settings:
            expected, value = getattr(configs[part], name), getattr(trained[part], name)
            require(value == expected, path, f"{part}.{name}", repr(expected), value)
        state = self.state_dict()
        unchanged = {key: value for key, value in state.items() if key.startswith(new)}
        unused = () if self.bert else ("bert.",)                # the losses read no texts
        loaded = {key: value for key, value in weights.items() if not key.startswith((*new, *unused))}
        if config.get("vit", {}).get("local_pos", "none") == "none":
            added = {key: torch.zeros_like(value) for key, value in state.items() if ".local_pos." in key}
            unchanged = added | unchanged
        load_state_dict_strict(self, unchanged | loaded, folder)

    @classmethod
    def from_pretrained(cls, folder: str) -> "ClusterSTM":
        """Load a folder that train.py wrote, or a hub id (config.json, model.safetensors), in eval mode."""
        return load_model(resolve_checkpoint(folder, "a trained model"), cls)


# ---------------------------------------------------------------------------------------------------------------------
# Answers and captions

class VideoToText(nn.Module):
    """
    The student with a text decoder that generates the answer to a question about a clip, or a caption.

    The decoder is UMT's (multi_modality/models/umt_qa.py): a causal BERT of as many layers as fuse, each with
    cross-attention to its context. That is the question's states, fused with the video, or the video tokens of a
    caption.
    """

    inputs = ModelInputs()          # how a user's videos and questions are read; from_pretrained sets it

    def __init__(self, vit: ViTConfig, text: TextEncoderConfig, cfg: ModelConfig, has_question: bool):
        """has_question: whether it answers questions; otherwise it generates captions."""
        super().__init__()
        self.vit_cfg, self.text_cfg, self.cfg = vit, text, cfg
        encoder_cfg = bert_config(text, vit.width)
        self.vit = ViT(vit)
        self.bert = Bert(encoder_cfg) if has_question else None
        self.text_decoder = Bert(replace(encoder_cfg, num_hidden_layers=text.fusion_layers, is_decoder=True,
                                         encoder_width=text.width if has_question else vit.width))

    @classmethod
    def from_student(cls, student: ClusterSTM, has_question: bool) -> "VideoToText":
        """Start from a student's ViT and BERT. The decoder gets BERT's embeddings, fusion layers and head."""
        student.require_bert()
        model, bert = cls(student.vit_cfg, student.text_cfg, student.cfg, has_question), student.bert
        model.vit.load_state_dict(student.vit.state_dict())
        if has_question:
            model.bert.load_state_dict(bert.state_dict())
        state = model.text_decoder.state_dict()
        for key, value in bert.state_dict().items():
            layer = re.match(r"bert\.encoder\.layer\.(\d+)\.", key)
            index = int(layer[1]) - bert.num_text_layers if layer else 0
            if index < 0:
                continue
            key = key.replace(layer[0], f"bert.encoder.layer.{index}.") if layer else key
            # Trained on video tokens. If a question's states have another width, these weights are new.
            reads_context = "crossattention.self.key." in key or "crossattention.self.value." in key
            if not (has_question and reads_context and model.vit_cfg.width != model.text_cfg.width):
                state[key] = value
        model.text_decoder.load_state_dict(state)
        return model

    def encode_video(self, video: Tensor, visible_ids: Tensor | None = None, token_size: Tensor | None = None,
                     patch_embeds: Tensor | None = None) -> tuple[Tensor, None]:
        """video (B, T, 3, H, W) uint8 -> tokens (B, S, C), and None for the feature, which this model does not have."""
        return self.vit(video, visible_ids, token_size, patch_embeds), None

    def encode_context(self, tokens: Tensor, ids: Tensor, clip_index: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Make the decoder's context and its mask: tokens (B, S, C), questions ids (Q, L) about clips clip_index (Q,).

        For questions: their states fused with the video (Q, L, D) and a mask (Q, L), False at padding; for captions the
        tokens and no mask.
        """
        if self.bert is None:
            return tokens, None
        states = self.bert.forward_fusion(self.bert.forward_text(ids), ids, tokens, clip_index)
        return states, ids != Bert.PAD_ID

    def log_likelihood(self, answer_ids: Tensor, context_index: Tensor, context: Tensor,
                       context_mask: Tensor | None) -> Tensor:
        """
        answer_ids (A, L'), answer a conditioned on context[context_index[a]] -> log p of each token after the first,
        (A, L' - 1), 0 at padding.
        """
        decoder = self.text_decoder
        cross_mask = None if context_mask is None else context_mask[context_index][:, None, None, :]
        inputs, labels = answer_ids[:, :-1], answer_ids[:, 1:]
        is_token = labels != Bert.PAD_ID
        states = decoder.forward_fusion(decoder.forward_text(inputs), inputs, context, context_index, cross_mask)
        if self.training:           # logits of padding too: that is cheaper than to wait for a count from the device
            logits = decoder.lm_logits(states).float().flatten(0, 1)
            errors = nnf.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=Bert.PAD_ID)
            return -errors.view(labels.shape)
        logits = decoder.lm_logits(states[is_token]).float()                        # (tokens, vocab_size)
        errors = nnf.cross_entropy(logits, labels[is_token], reduction="none")
        return torch.zeros(labels.shape, device=errors.device).masked_scatter(is_token, -errors)

    def forward(self, batch: "Batch", targets: TeacherTargets | None = None) -> dict[str, Tensor]:
        """
        Compute the answers' negative log-likelihood, by name: summed over tokens, weighted over the answers of a
        question, mean over questions. The ViT sees the visible_ids of the targets, or all tokens without targets.
        """
        tokens = self.vit(batch.video, targets and targets.visible_ids, targets and targets.token_size)
        context, context_mask = self.encode_context(tokens, batch.text_ids, batch.clip_index)
        # The context of an answer is a question's states, or the tokens of a clip.
        context_index = batch.question_index if self.bert else batch.clip_index[batch.question_index]
        errors = -self.log_likelihood(batch.answer_ids, context_index, context, context_mask).sum(1)        # (A,)
        return {"lm": (errors * batch.answer_weight).sum() / len(batch.text_ids)}

    def next_log_probs(self, ids: Tensor, position: int, context: Tensor, cross_mask: Tensor | None,
                       caches: list) -> Tensor:
        """ids (Q, W, 1), the tokens at `position` of W beams, context (Q, S, C) -> log p (Q, W, vocab_size)."""
        decoder = self.text_decoder
        x = decoder.bert.embeddings(ids.flatten(0, 1), position)                    # (QW, 1, D)
        for layer, past in zip(decoder.bert.encoder.layer, caches, strict=True):
            x = layer(x, None, context, None, cross_mask, past)
        return decoder.lm_logits(x[:, 0]).float().log_softmax(-1).unflatten(0, ids.shape[:2])

    @torch.no_grad()
    def generate(self, context: Tensor, context_mask: Tensor | None, max_length: int, beams: int, cls_id: int,
                 sep_id: int) -> Tensor:
        """
        Generate a text for each context (Q, S, C): ids (Q, max_length) from [CLS] to [SEP], padded with [PAD].

        Beam search; finished and unfinished texts are compared by the mean log p of their tokens. beams = 1 is greedy.
        """
        Q, device, PAD = len(context), context.device, Bert.PAD_ID
        cross_mask = None if context_mask is None else context_mask[:, None, None, :]
        caches = [([], []) for _ in self.text_decoder.bert.encoder.layer]           # of self- and cross-attention
        ids = torch.full((Q, beams, 1), cls_id, device=device)
        total = torch.zeros(Q, beams, device=device)                                # sum of log p
        total[:, 1:] = -torch.inf                                                   # all beams start equal: use one
        count = torch.zeros(Q, beams, device=device)                                # generated tokens
        done = torch.zeros(Q, beams, dtype=torch.bool, device=device)
        for t in range(max_length - 1):
            log_p = self.next_log_probs(ids[..., -1:], t, context, cross_mask, caches)
            log_p[..., PAD] = -torch.inf
            log_p = torch.where(done[..., None], -torch.inf, log_p)
            log_p[..., PAD] = torch.where(done, 0.0, log_p[..., PAD])               # a finished text only gets [PAD]
            totals, counts = total[..., None] + log_p, count + ~done                # (Q, W, V), (Q, W)
            best = (totals / counts[..., None]).flatten(1).topk(beams).indices      # (Q, W)
            beam, token = best // log_p.shape[-1], best % log_p.shape[-1]
            total, count = totals.flatten(1).gather(1, best), counts.gather(1, beam)
            done = done.gather(1, beam) | (token == sep_id)
            ids = torch.cat([ids.gather(1, beam[..., None].expand(-1, -1, t + 1)), token[..., None]], -1)
            if done.all():
                break
            if beams > 1:               # reorder the caches as the beams
                origin = (beam + beams * torch.arange(Q, device=device)[:, None]).flatten()
                for cache, _ in caches:
                    cache[:] = cache[0][origin], cache[1][origin]
        ids = ids[torch.arange(Q, device=device), (total / count.clamp_min(1)).argmax(1)]
        return nnf.pad(ids, (0, max_length - ids.shape[1]), value=PAD)

    def generate_texts(self, tokenizer: Tokenizer, context: Tensor, context_mask: Tensor | None, max_length: int,
                       beams: int, names: Sequence) -> list[str]:
        """Generate a text for each context (Q, S, C). An error gives the first of the Q names whose p is not finite."""
        _, cls_id, sep_id = special_token_ids(tokenizer)
        ids = self.generate(context, context_mask, max_length, beams, cls_id, sep_id)
        log_p = self.log_likelihood(ids, torch.arange(len(ids), device=ids.device), context, context_mask).sum(1)
        require_finite(log_p, names, "the log-likelihood of the text generated for")
        return decode_ids(tokenizer, ids)

    def caption(self, videos: list[str] | Tensor, beams: int = 3, batch: int = 32) -> list[str]:
        """Caption videos, paths or (B, T, 3, H, W) uint8, by beam search; beams = 1 is greedy."""
        return self.generate_for(videos, None, beams, batch)

    def answer(self, videos: list[str] | Tensor, questions: list[str], batch: int = 32) -> list[str]:
        """Answer question i about video i, by greedy decoding. videos: paths, or (B, T, 3, H, W) uint8."""
        return self.generate_for(videos, questions, 1, batch)

    @torch.no_grad()
    def generate_for(self, videos: list[str] | Tensor, questions: list[str] | None, beams: int,
                     batch: int) -> list[str]:
        """Generate an answer or, without questions, a caption for each video, as eval.py does."""
        device, inputs, ids, texts = self.vit.norm.weight.device, self.inputs, None, []
        if (questions is None) != (self.bert is None):
            purpose, method = ("question answering", "answer") if self.bert else ("captioning", "caption")
            raise ValueError(f"{inputs.folder or 'the model'} is for {purpose}: use its .{method}")
        if beams < 1:
            raise ValueError(f"beams must be at least 1, got {beams}")
        require_videos(videos)
        if questions is not None:
            ids = inputs.encode_texts(questions, "questions").to(device)
            if len(videos) != len(questions):
                raise ValueError(f"there must be a question for each video, got {len(questions)} for {len(videos)}")
        for names, video in inputs.iter_clips(videos, batch, device):
            own_ids = None if ids is None else ids[len(texts):len(texts) + len(video)]
            with bf16_autocast(device):
                tokens, _ = self.encode_video(video)
                require_finite(tokens, names, "the model's features of the video")
                context, mask = self.encode_context(tokens, own_ids, torch.arange(len(video), device=device))
                texts += self.generate_texts(inputs.tokenizer, context, mask, inputs.max_answer_length, beams, names)
        return texts

    @classmethod
    def from_pretrained(cls, folder: str) -> "VideoToText":
        """
        Load a folder that train.py --stage finetune wrote for question answering or captioning, or a hub id, in eval
        mode.
        """
        return load_model(resolve_checkpoint(folder, "a trained model"), cls)


def load_model(folder: str, cls: type | None = None) -> ClusterSTM | VideoToText:
    """Load a model that train.py wrote, in eval mode. ValueError if it is not of the class cls, if that is passed."""
    config, weights = read_checkpoint(folder, "a trained model")
    path, parts = f"{folder}/config.json", {"vit": ViTConfig, "text": TextEncoderConfig, "model": ModelConfig}
    for part in parts:
        require(isinstance(config.get(part), dict), path, part, "an object, as train.py writes it", config.get(part))
    configs = [config_from_dict(kind, config[part], f"{path}: {part}") for part, kind in parts.items()]
    kind = VideoToText if any(key.startswith("text_decoder.") for key in weights) else ClusterSTM
    if cls not in (None, kind):
        raise ValueError(f"{folder} must hold a {cls.__name__}, got a {kind.__name__}")
    has_question = has_bert = any(key.startswith("bert.") for key in weights)
    model = VideoToText(*configs, has_question) if kind is VideoToText else ClusterSTM(
        *configs, with_bert=has_bert or configs[2].reads_texts)
    load_state_dict_strict(model, weights, folder)
    model.inputs = ModelInputs(folder, config)
    return model.eval()
