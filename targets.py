"""
What the student learns from: the teacher's outputs for a batch, and their cache on disk.

    compute_targets(teacher, batch, mask, ratio) -> TeacherTargets      one batch
    TargetProvider(run, teacher, dataset)(batches) -> TeacherTargets of each batch, cached if possible     pretraining
    VisibleIdCache(run, vit)(batch) -> TeacherTargets with visible ids alone                               fine-tuning

If clips have a fixed number of views (--data.num-views), each view is seen many times. The teacher runs on it in the
first pass over all views; later passes read its targets from out/NAME/target_cache/targets.bin and never run the
teacher. (On a GPU, reading fp16 targets can be slower than computing them again.)
"""

import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from budgets import count_equal_groups, group_dynamic
from files import write_all
from kernels import to_device
from masking import MaskConfig, keep_count, select, token_sizes
from runtime import AsyncHostCopy, RunContext, Stream, print0, seeded_generator
from teacher import SigLIP, load_teacher
from video import count_tokens, gather_tokens

if TYPE_CHECKING:
    from data import Batch, ClipDataset, MixedDataset
    from encoders import ViT


@dataclass
class TeacherTargets:
    """
    Teacher targets of a batch. What no loss uses is None; fine-tuning and scoring use visible_ids, token_size and
    patch_embeds alone.
    """
    visible_ids: Tensor                     # (B, S) int64, flat ids t * N + n of the visible tokens, ascending
    token_targets: Tensor | None = None     # (B, T, N, E), each token's neighbourhood in the joint space, unit length
    text_embeds: Tensor | None = None       # (B, E), the captions in the same space, unit length
    token_size: Tensor | None = None        # (B, S) fp32, how many tokens each visible token represents
    patch_embeds: Tensor | None = None      # (B, T * N, C), the student's patch embeddings, if they were computed
    # (B, S1) int64, flat ids of the tokens that the teacher saw, ascending: token_targets (B, 1, S1, E) are theirs, and
    # all other ids are among them. None: it saw all
    pool_ids: Tensor | None = None
    smaller: list["TeacherTargets"] | None = None       # the same at smaller budgets, the largest first

    def at_budgets(self) -> list["TeacherTargets"]:
        """Return the targets at each budget, the largest first."""
        return [self, *(self.smaller or ())]

    def find(self, ids: Tensor) -> Tensor:
        """Flat ids (B, Q) -> their indices (B, Q) among the tokens that the teacher saw, of which they must be."""
        return ids if self.pool_ids is None else torch.searchsorted(self.pool_ids, ids)

    def gather(self, ids: Tensor) -> Tensor:
        """Targets of the tokens with flat ids (B, Q) -> (B, Q, E) fp32."""
        return gather_tokens(self.token_targets, self.find(ids)).float()


# ---------------------------------------------------------------------------------------------------------------------
# Computing targets

@torch.no_grad()
def compute_targets(
    teacher: SigLIP, batch: "Batch", mask: Callable, ratio: float, pooling: str = "map", check: bool = True,
    grid: tuple[int, int] | None = None, with_sizes: bool = False, with_tokens: bool = True, with_texts: bool = True,
    total: int = 0, embed_patches: Callable | None = None, smaller: tuple[int, ...] = (),
) -> TeacherTargets:
    """
    Compute the teacher targets of a batch: visible ids; if with_tokens, token targets; if with_texts, caption
    embeddings; if with_sizes, how many tokens each visible token represents. What neither they nor the mask need is not
    computed.

    batch has video (B, T, 3, H, W) uint8, captions and seed. mask is a function like those in masking.MASKS. check says
    whether the mask looks for a NaN in the tokens, for which the host waits for the device. grid (h, w) is the
    student's number of patches in a frame; frames are resized if the teacher's patches would differ from it. total is
    the number of visible tokens of a clip; 0: `ratio` decides. embed_patches is the student's ViT.embed_patches, for a
    mask that compares its features. smaller: further budgets, for which the mask is applied again with the same random
    numbers, so that their ids are among those of larger ones if the mask is nested. With mask.teacher_tokens the
    teacher runs on those tokens alone, and all results are of those.
    """
    B, T = batch.video.shape[:2]
    with torch.autocast(batch.video.device.type, enabled=False):        # the teacher computes in the dtype it was given
        pixel_values = teacher.normalize(batch.video.flatten(0, 1), grid)
        grid = teacher.patch_grid_of(pixel_values)
        pool_ids, shape = None, (B, T, math.prod(grid))
        inputs = mask.inputs if isinstance(mask, MaskConfig) else {"text", "aligned"}
        needs_tokens = with_tokens or "aligned" in inputs or (
            features_of(mask) == "teacher" and needs_values(mask, with_sizes))
        if isinstance(mask, MaskConfig) and mask.teacher_tokens:
            pool_ids, tokens, shape = run_on_pool(teacher, pixel_values, T, mask.teacher_tokens, needs_tokens, check)
            grid = T, *grid
        elif needs_tokens:
            tokens = teacher.forward_features(pixel_values)                             # (F, N, C)
        else:
            tokens = torch.zeros(*shape, 1, device=pixel_values.device)                 # only its shape is used
        text_embeds = token_targets = None
        if with_texts or "text" in inputs:
            text_embeds = teacher.encode_text(teacher.tokenize(batch.captions))
        if with_tokens or "aligned" in inputs:
            token_targets = teacher.token_embeddings(tokens, grid, pooling, pool_ids).view(*shape, -1)  # (B, T, N, E)
        features = tokens
        source = features_of(mask) if needs_values(mask, with_sizes) else "teacher"
        if source == "teacher_embedding":
            features = teacher.embed_patches(pixel_values)
        elif source == "student_embedding":
            features = embed_patches(batch.video)
        features = features.view(*shape, -1)
        visible_ids = select_visible(teacher, features, mask, ratio, batch.seed, grid, total, pool_ids,
                                     text=text_embeds, aligned=token_targets, check=check)
        targets = TeacherTargets(visible_ids, token_targets if with_tokens else None,
                                 text_embeds if with_texts else None, pool_ids=pool_ids)
        if with_tokens and pool_ids is not None:
            targets.token_targets = token_targets.flatten(1, 2)[:, None]                # (B, 1, S1, E)
        targets.token_size = token_sizes(features, targets.find(visible_ids)) if with_sizes else None
        for S in smaller:
            ids = select_visible(teacher, features, mask, ratio, batch.seed, grid, S, pool_ids, text=text_embeds,
                                 aligned=token_targets, check=check)
            size = token_sizes(features, targets.find(ids)) if with_sizes else None
            at_budget = replace(targets, visible_ids=ids, token_size=size, smaller=None)
            targets.smaller = [*(targets.smaller or ()), at_budget]
        return targets


@torch.no_grad()
def compute_visible_ids(
    teacher: SigLIP | None, video: Tensor, mask: Callable, ratio: float, seed: int, grid: tuple[int, int],
    with_sizes: bool = False, total: int = 0, embed_patches: Callable | None = None,
) -> TeacherTargets:
    """
    Select visible ids of video (B, T, 3, H, W) uint8 on the student's grid (h, w), and token sizes if with_sizes.

    total and embed_patches are those of compute_targets. No more of the teacher runs than the mask needs, and a teacher
    is not needed unless `needs_teacher`. If the student's patches were embedded, the result has their embeddings.
    """
    patch_embeds, pool_ids, shape = None, None, (*video.shape[:2], math.prod(grid))
    with torch.autocast(video.device.type, enabled=False):
        if needs_teacher(mask, with_sizes):
            pixel_values = teacher.normalize(video.flatten(0, 1), grid)
            of_patches = features_of(mask) == "teacher_embedding"
            if isinstance(mask, MaskConfig) and mask.teacher_tokens:
                pool_ids, tokens, shape = run_on_pool(teacher, pixel_values, shape[1], mask.teacher_tokens,
                                                      needs_values(mask, with_sizes))
                grid = video.shape[1], *grid
            else:
                tokens = (teacher.embed_patches if of_patches else teacher.forward_features)(pixel_values)
        elif needs_values(mask, with_sizes):
            tokens = patch_embeds = embed_patches(video)
        else:
            tokens = torch.zeros(*shape, 1, device=video.device)        # only its shape is used
        tokens = tokens.view(*shape, -1)
        visible_ids = select_visible(teacher, tokens, mask, ratio, seed, grid, total, pool_ids)
        targets = TeacherTargets(visible_ids, patch_embeds=patch_embeds, pool_ids=pool_ids)
        targets.token_size = token_sizes(tokens, targets.find(visible_ids)) if with_sizes else None
        return targets


def run_on_pool(teacher: SigLIP, pixel_values: Tensor, T: int, kept: int, with_tokens: bool = True,
                check: bool = True) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """
    Run the teacher on the S1 = `kept` tokens of each clip that change most: normalized pixels (BT, 3, H, W) -> flat ids
    (B, S1), tokens (B, S1, C) and the shape (B, G, S1 / G) in which masks see them, a group of frames as a frame.

    FluxViT's selector (budgets.group_dynamic) chooses on the teacher's patch embedding. It keeps equally many tokens of
    each group, and groups are spans of ids, so that the view is one of memory. Without with_tokens the tokens are zeros
    (B, S1, 1).
    """
    embeds = teacher.embed_patches(pixel_values)                                        # (BT, N, C)
    G = count_equal_groups(kept, T, embeds.shape[1])
    ids = group_dynamic(embeds.unflatten(0, (-1, T)), kept, check=check)
    tokens = teacher.forward_kept(pixel_values, ids, embeds) if with_tokens else embeds.new_zeros(*ids.shape, 1)
    return ids, tokens, (len(ids), G, kept // G)


@torch.no_grad()
def compare_pool(teacher: SigLIP, video: Tensor, grid: tuple[int, int], ids: Tensor) -> tuple[float, float]:
    """
    Compare the teacher's tokens of flat ids (B, S1) if it sees those alone with the same if it sees all of the video
    (B, T, 3, H, W) uint8 -> their cosine, mean and 1 % quantile. One clip at a time, so that it needs little memory.
    """
    cosines = []
    with torch.autocast(video.device.type, enabled=False):
        for clip, kept in zip(video, ids[:, None], strict=True):
            pixel_values = teacher.normalize(clip, grid)
            full = gather_tokens(teacher.forward_features(pixel_values), kept)
            cosines.append(nnf.cosine_similarity(teacher.forward_kept(pixel_values, kept).float(), full.float(), -1))
    cosine = torch.cat(cosines).flatten().sort().values
    return cosine.mean().item(), cosine[len(cosine) // 100].item()


def features_of(mask: Callable) -> str:
    """Return what a mask compares: MaskConfig.features, or "teacher" for another function."""
    return mask.features if isinstance(mask, MaskConfig) else "teacher"


def needs_teacher(mask: Callable, with_sizes: bool = False) -> bool:
    """Return whether a mask needs a teacher for the visible ids and, if with_sizes, the token sizes of a clip."""
    chooses_pool = isinstance(mask, MaskConfig) and mask.teacher_tokens > 0
    return features_of(mask) != "student_embedding" and (chooses_pool or needs_values(mask, with_sizes))


def needs_values(mask: Callable, with_sizes: bool) -> bool:
    """Return whether the visible ids and, if with_sizes, the sizes need the values of what a mask compares."""
    return with_sizes or not (isinstance(mask, MaskConfig) and mask.shape_only)


@torch.no_grad()
def select_visible(teacher: SigLIP | None, tokens: Tensor, mask: Callable, ratio: float, seed: int,
                   grid: tuple[int, ...] | None = None, total: int = 0, pool_ids: Tensor | None = None,
                   **aux) -> Tensor:
    """
    Tokens (B, T, N, C) on a grid (h, w) -> flat ids (B, S) of the tokens that the mask leaves visible. S is total, or
    T times what the ratio leaves of a frame if total is 0.

    The tokens are the teacher's, from which its attention is computed unless the mask is a MaskConfig that does not use
    it. For such a mask they may be other features.

    If the teacher saw the flat ids pool_ids (B, S1) alone, tokens are theirs, (B, G, S1 / G, C), the grid is (T, h, w),
    and S is total or what the ratio leaves of the S1.
    """
    T, N = tokens.shape[1:3]
    total = total or (T * keep_count(N, ratio) if pool_ids is None else keep_count(T * N, ratio))
    if not isinstance(mask, MaskConfig) or "attention" in mask.inputs:
        flat = tokens.flatten(0, 1) if pool_ids is None else tokens.flatten(1, 2)
        aux["attention"] = teacher.pool_attention(flat, pool_ids, grid).view(tokens.shape[:3])
    ids = select(mask, tokens, total, grid=grid or teacher.patch_grid,
                 generator=torch.Generator().manual_seed(seed), **aux)
    return ids if pool_ids is None else pool_ids.gather(1, ids)


# ---------------------------------------------------------------------------------------------------------------------
# The cache of pretraining

class TargetStore:
    """
    A file with one record of fixed size for each view:

        token targets (T, N, E) fp16 · one bit for each token, 1 if visible · text embedding (E,) fp32 ·
        sizes of the S visible tokens (S,) int16 · CRC-32 of these bytes and the record id

    with_tokens, with_texts, with_sizes: whether it has the first, the third and the fourth of these parts.
    """

    def __init__(self, path: str, T: int, N: int, S: int, E: int, with_sizes: bool = False, with_tokens: bool = True,
                 with_texts: bool = True):
        self.shape, self.num_visible = (T, N, E), S
        self.with_tokens, self.with_texts, self.with_sizes = with_tokens, with_texts, with_sizes
        self.part_bytes = [
            2 * T * N * E * with_tokens, math.ceil(T * N / 8), 4 * E * with_texts, 2 * S * with_sizes]
        self.record_bytes = sum(self.part_bytes) + 4
        self.file = open(path, "r+b", buffering=0)      # noqa: SIM115  (the owner of the store closes it)

    def checksum(self, content, record_id: int) -> bytes:
        """Hash a record and its id. A record that is read from another record's place then fails like a damaged one."""
        return zlib.crc32(content, record_id + 1).to_bytes(4, "little")

    def quantize(self, targets: TeacherTargets) -> TeacherTargets:
        """Convert the targets to the dtypes of the file, so that those just computed equal those read later."""
        return TeacherTargets(targets.visible_ids, targets.token_targets.half() if self.with_tokens else None,
                              targets.text_embeds.float() if self.with_texts else None, targets.token_size)

    def to_host(self, targets: TeacherTargets) -> list[AsyncHostCopy]:
        """Start to copy the parts of quantized targets' records to the host."""
        T, N, _ = self.shape
        visible = torch.zeros(len(targets.visible_ids), T * N, dtype=torch.bool, device=targets.visible_ids.device)
        size = targets.token_size.to(torch.int16) if self.with_sizes else None
        parts = targets.token_targets, visible.scatter(1, targets.visible_ids, True), targets.text_embeds, size
        return [AsyncHostCopy(part) for part in parts if part is not None]

    def write(self, record_ids: list[int], parts: list[AsyncHostCopy]):
        """Write the records of a batch once their parts are on the host."""
        parts = [part.wait().numpy() for part in parts]
        parts = [np.packbits(part, 1) if part.dtype == bool else part for part in parts]
        for record_id, *arrays in zip(record_ids, *parts, strict=True):
            record = b"".join(array.tobytes() for array in arrays)
            record += self.checksum(record, record_id)
            write_all(self.file, record, record_id * self.record_bytes)

    def read(self, record_ids: list[int], device: torch.device) -> TeacherTargets | None:
        """Read the targets of a batch. None if any record is missing or damaged."""
        T, N, _ = self.shape
        buffer = torch.empty(len(record_ids), self.record_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for record_id, record in zip(record_ids, buffer.numpy(), strict=True):
            count = os.preadv(self.file.fileno(), [record], record_id * self.record_bytes)
            if count < self.record_bytes or self.checksum(record[:-4], record_id) != record[-4:].tobytes():
                return None
        # The parts are cloned because a part in the middle of a record may not be aligned for its dtype.
        token_targets, bits, text_embeds, token_size, _ = (
            part.clone(memory_format=torch.contiguous_format)
            for part in to_device(buffer, device).split([*self.part_bytes, 4], 1))
        bits = bits[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=device) & 1     # (B, TN / 8, 8)
        masked = 1 - bits.flatten(1)[:, :T * N]
        return TeacherTargets(
            visible_ids=masked.argsort(dim=1, stable=True)[:, :self.num_visible],
            token_targets=token_targets.view(torch.float16).unflatten(1, self.shape) if self.with_tokens else None,
            text_embeds=text_embeds.view(torch.float32) if self.with_texts else None,
            token_size=token_size.view(torch.int16).float() if self.with_sizes else None)


class TargetProvider:
    """
    Provide the teacher targets of a step's micro-batches in pretraining: list of batches -> list of TeacherTargets.

    Targets are computed and stored in the first pass over all views, and read after it. Nothing is cached if views are
    not fixed or for a reason in `disabled_because`.
    """

    def __init__(self, run: RunContext, teacher: SigLIP, dataset: "ClipDataset | MixedDataset",
                 embed_patches: Callable | None = None):
        """embed_patches: as in compute_targets."""
        cfg = run.cfg
        self.run, self.teacher, self.num_views, self.embed_patches = run, teacher, cfg.data.num_views, embed_patches
        self.folder, self.pending = os.path.join(run.folder, "target_cache"), []
        self.parts = {"with_sizes": cfg.model.proportional,
                      "with_tokens": "mrm" in cfg.model.losses and cfg.model.objective != "pixels",
                      "with_texts": cfg.model.uses_text_embeds}
        one_host = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")     # writes one file
        self.disabled_because = [reason for reason, holds in (
            ("the data has images", bool(cfg.data.image_corpora)),
            ("the teacher sees a part of each clip", cfg.mask.teacher_tokens > 0),
            ("the grids of clips vary", cfg.data.varies),
            ("mask.tokens has several budgets", len(cfg.mask.tokens) > 1),
            ("the mask compares the student's embedding, which is trained", cfg.mask.features == "student_embedding"),
            ("a view is seen less than twice", cfg.steps * cfg.batch < 2 * self.num_views * len(dataset)),
            ("the run has several hosts", not one_host),
            (f"mask {cfg.mask.name} draws at random from teacher outputs", cfg.mask.stochastic and not
             cfg.mask.shape_only),
            (f"the token sizes of mask {cfg.mask.name} are random", cfg.mask.stochastic and cfg.model.proportional),
        ) if holds]
        self.enabled = self.num_views > 0 and not self.disabled_because
        self.compares_pool = cfg.mask.teacher_tokens > 0 and run.rank == 0
        if self.enabled:
            self.first_pass_end = math.ceil(self.num_views * len(dataset) / cfg.batch) * cfg.batch  # a sample number
            self.synced = False
            self.open(len(dataset))
        elif self.num_views:
            print0("the teacher runs at every step, its targets are not cached: " + " and ".join(self.disabled_because))

    def __call__(self, batches: "list[Batch]") -> list[TeacherTargets]:
        if not self.enabled:
            return [self.compute(b) for b in batches]
        self.flush()
        if batches[0].first_sample < self.first_pass_end:
            return [self.compute_and_store(b) for b in batches]
        if not self.synced:             # no rank reads before all ranks have written
            self.run.barrier()
            self.synced = True
        return [self.lookup(b) or self.compute_and_store(b) for b in batches]

    def open(self, num_clips: int):
        """Open the file. A resumed run continues with the one it has, a new run begins an empty one."""
        run, cfg = self.run, self.run.cfg
        path = os.path.join(self.folder, "targets.bin")
        is_new = run.rank == 0 and not (cfg.resume and os.path.isfile(path))
        if is_new:
            if os.path.isdir(self.folder):
                shutil.rmtree(self.folder)
            os.makedirs(self.folder)
            open(path, "wb").close()
        run.barrier()
        T, E = cfg.data.num_frames, self.teacher.cfg.vision_config.hidden_size
        N = count_tokens(1, cfg.data.image_size, cfg.vit.patch_size)
        self.store = TargetStore(path, T, N, cfg.mask.total(T, N), E, **self.parts)
        run.exit_stack.enter_context(self.store.file)
        if is_new:
            total, free = self.store.record_bytes * self.num_views * num_clips, shutil.disk_usage(self.folder).free
            if total > free:
                shutil.rmtree(self.folder)
                raise ValueError(f"{self.folder}: the disk must have {total / 1e9:.3g} GB free for the targets of "
                                 f"{self.num_views * num_clips} views, got {free / 1e9:.3g} GB; under another "
                                 "--name, --data.num-views 0 turns the cache off")
            if total > 1e9:
                print0(f"{self.folder} takes {total / 1e9:.3g} GB")

    def compute(self, batch: "Batch") -> TeacherTargets:
        """Run the teacher on a batch."""
        cfg = self.run.cfg
        # On a GPU the mask does not look for a NaN, because the host would wait for it. A NaN makes the loss NaN.
        check = batch.video.device.type != "cuda"
        image = cfg.data.image_corpora and batch.video.shape[1] == 1
        mask = replace(cfg.mask, teacher_tokens=0) if image else cfg.mask
        total, *smaller = (0,) if image else mask.tokens if cfg.all_budgets else (batch.budget,)
        targets = compute_targets(self.teacher, batch, mask, mask.image_ratio if image else mask.ratio,
                                  cfg.target_pooling, check, self.grid(batch), total=total, smaller=tuple(smaller),
                                  embed_patches=self.embed_patches, **self.parts)
        if self.compares_pool and targets.pool_ids is not None:
            self.compares_pool, pool = False, count_tokens(*batch.video.shape[1::2], cfg.vit.patch_size)
            mean, low = compare_pool(self.teacher, batch.video, self.grid(batch), targets.pool_ids)
            print0(f"the teacher sees {mask.teacher_tokens} of the {pool} tokens of a clip; their cosine with the same "
                   f"tokens if it sees all: mean {mean:.3f}, 1 % quantile {low:.3f}")
        return targets

    def grid(self, batch: "Batch") -> tuple[int, int]:
        """Return (h, w), one teacher token for each student patch of a frame."""
        H, W = batch.video.shape[-2:]
        return H // self.run.cfg.vit.patch_size, W // self.run.cfg.vit.patch_size

    def compute_and_store(self, batch: "Batch") -> TeacherTargets:
        """
        Compute the targets of a batch, quantized as they are stored.

        The records are written at the next call or before a checkpoint, when their copies have reached the host.
        """
        targets = self.store.quantize(self.compute(batch))
        self.pending.append((self.record_ids(batch), self.store.to_host(targets)))
        return targets

    def lookup(self, batch: "Batch") -> TeacherTargets | None:
        """
        Read the cached targets of a batch. None if any record is missing or damaged: it is missing if the video was
        unreadable in the first pass.
        """
        cfg, targets = self.run.cfg, self.store.read(self.record_ids(batch), batch.video.device)
        if targets and cfg.mask.stochastic:     # the mask uses only shapes: it is drawn again, as compute would draw it
            tokens = torch.empty(len(targets.visible_ids), *self.store.shape[:2], 1, device=targets.visible_ids.device)
            targets.visible_ids = select(cfg.mask, tokens, self.store.num_visible, check=False,
                                         generator=seeded_generator(batch, Stream.MASK), grid=self.grid(batch))
        return targets

    def record_ids(self, batch: "Batch") -> list[int]:
        """Return the record id of each clip's view."""
        return (batch.clip_ids * self.num_views + batch.view_ids).tolist()

    def flush(self):
        """Write the pending records."""
        for record_ids, parts in self.pending:
            self.store.write(record_ids, parts)
        self.pending = []

    def flush_all_ranks(self):
        """Write the pending records of all ranks. A run that resumes from a checkpoint written after it finds them."""
        self.flush()
        if self.enabled:
            self.run.barrier()

    def delete(self):
        """Delete the cache, when pretraining is finished."""
        if self.enabled:
            self.store.file.close()
        self.run.barrier()
        if self.enabled and self.run.rank == 0:
            shutil.rmtree(self.folder)


# ---------------------------------------------------------------------------------------------------------------------
# The cache of fine-tuning

class VisibleIdCache:
    """
    Compute the visible ids of a batch's clips in fine-tuning: Batch -> TeacherTargets. Ids of a fixed view are computed
    once and stay on the device, unless the mask is random, the student's own embedding selects, or grids or budgets
    vary.
    """

    def __init__(self, run: RunContext, vit: "ViT", wrap: Callable | None = None):
        """vit: the student's. wrap(teacher) may compile its layers."""
        cfg = run.cfg
        self.mask, self.vit, self.with_sizes, self.teacher = cfg.mask, vit, cfg.model.proportional, None
        if needs_teacher(cfg.mask, self.with_sizes):
            if not cfg.teacher:
                raise ValueError("--teacher must be a SigLIP for --finetune-masked, got '': config.json of --init-from "
                                 "names none")
            self.teacher = load_teacher(cfg.teacher, run.device, cfg.teacher_fp8, with_tokenizer=False)
            self.teacher = wrap(self.teacher) if wrap else self.teacher
        self.enabled = cfg.data.num_views > 0 and not (
            cfg.mask.stochastic or cfg.mask.features == "student_embedding" or cfg.shapes_vary)
        self.cache = {}                             # (clip id, view id) -> visible ids (S,), and sizes (S,) if used

    def compute(self, video: Tensor, seed: int, budget: int) -> TeacherTargets:
        """Select the visible ids of video (B, T, 3, H, W) uint8; budget: Batch.budget, 0 in scoring."""
        T, *grid = self.vit.grid_size(video)
        total = budget or self.mask.total(T, math.prod(grid))
        targets = compute_visible_ids(self.teacher, video, self.mask, self.mask.ratio, seed, tuple(grid),
                                      self.with_sizes, total, self.vit.embed_patches)
        return replace(targets, patch_embeds=None)      # without gradient: the visible patches are embedded again

    def __call__(self, batch: "Batch") -> TeacherTargets:
        if not self.enabled:                        # and the host does not wait for the device
            return self.compute(batch.video, batch.seed, batch.budget)
        views = list(zip(batch.clip_ids.tolist(), batch.view_ids.tolist(), strict=True))
        new = {view: i for i, view in enumerate(views) if view not in self.cache}
        if new:
            indices = to_device(torch.tensor([*new.values()]), batch.video.device)
            targets = self.compute(batch.video[indices], batch.seed, batch.budget)
            parts = (targets.visible_ids, targets.token_size) if self.with_sizes else (targets.visible_ids,)
            self.cache.update(zip(new, zip(*parts, strict=True), strict=True))
        visible_ids, *token_size = map(torch.stack, zip(*(self.cache[view] for view in views), strict=True))
        return TeacherTargets(visible_ids, token_size=token_size[0] if token_size else None)
