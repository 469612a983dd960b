"""
The settings of a run of train.py: Config, and the presets `sprites`, `base` and `large`.

A run stores its Config in run_state.json, from which read_settings reads it for --resume.
"""

import os
import shlex
import statistics
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from budgets import count_equal_groups
from data import DataConfig, count_tokens, grids
from encoders import TextEncoderConfig, ViTConfig
from files import config_from_dict, read_checkpoint
from logs import LIBRARIES
from masking import MASKS, MaskConfig, keep_count
from media import is_shards
from model import ModelConfig
from runtime import read_run_state
from tasks import TASKS, name_data
from tools.toy_teacher import ToyConfig


@dataclass(frozen=True)
class Config:
    """
    Train ClusterSTM. A preset may come first: `sprites` (the embedded run, the default), `base` or `large` (the paper's
    sizes). All results are written to out/NAME.
    """
    name: str = ""                # name of the run; empty: that of annotation file or shards, without _train
    # all: pretrain, after training the toy models that are needed; teacher, text: train only this toy model; finetune:
    # fine-tune for --task
    stage: Literal["all", "teacher", "text", "finetune"] = "all"
    task: Annotated[str, tyro.conf.arg(help=f"finetune: a benchmark: {', '.join(TASKS)}")] = ""
    data_root: str = ""           # finetune: folder with the benchmark's annotations and videos
    # finetune: the split whose score chooses the epoch; last: the last epoch is taken; empty: val, or last without one
    select_split: Literal["", "val", "test", "last"] = ""
    epochs: float = 0             # finetune: passes over the training split; replaces --steps if above 0
    finetune_masked: bool = False  # finetune: train and score on the tokens that the mask keeps, instead of all tokens
    # continue the run in out/NAME from its newest checkpoint, with its settings; a preset or flags must agree with them
    resume: bool = False
    teacher: str = ""             # folder or hub id of a SigLIP; empty: train a toy SigLIP on the data first
    text_encoder: str = ""        # folder or hub id of a BERT; empty: train a toy text encoder on the captions first
    init_from: str = ""           # folder that train.py or tools.convert wrote; empty: begin with random weights
    tokenizer: str = ""           # tokenizer.json or vocab.txt; empty: the text encoder's, else built from the captions
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda if there is a GPU
    seed: int = 0                 # seed of all random draws
    batch: int = 64               # clips per step, over all ranks
    micro_batch: int = 0          # clips per rank and forward pass; 0: batch / number of ranks
    steps: int = 560              # steps of masked pretraining (0: none), or of fine-tuning
    unmasked_steps: int = 40      # steps of the unmasked stage, which sees all tokens
    unmasked_batch: int = 32      # clips per step of the unmasked stage; 0: as --batch
    lr: float = 1e-3              # peak learning rate, reached after warmup, followed by a cosine to 1 %
    unmasked_lr_scale: float = 0.2      # peak learning rate of the unmasked stage, as a multiple of --lr
    warmup_frac: float = 0.1      # share of a stage's steps that are warmup
    weight_decay: float = 0.02    # weight decay of matrices; embeddings, norms, biases and the temperature have none
    max_grad_norm: float = 3.0    # gradients are clipped to this norm; 0: no clipping
    # how the teacher pools the 3x3 neighbourhood of a token: map: by its MAP head; mean: by a mean; token: not at all
    target_pooling: Literal["map", "mean", "token"] = "map"
    # compute the layers of the teacher's image tower in fp8, which changes masks and targets; needs a GPU with fp8
    teacher_fp8: bool = False
    compile: bool = False         # compile the layers of teacher and student with torch.compile
    activation_checkpointing: bool = False      # recompute each layer's activations in the backward pass: saves memory
    # train each clip at every budget of mask.tokens in each step (Flux-Multi), not at one that is drawn
    all_budgets: bool = False
    max_skipped_steps: int = 0    # steps of a stage that may be skipped because loss or gradient is not finite
    # further logs with the rows of log.jsonl: a folder for TensorBoard, a run of wandb; each needs its package
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    log_every: int = 10           # steps between two rows of log.jsonl
    val_every: int = 0            # steps between two scorings on data.val_file; 0: only at the end of each stage
    save_every: int = 500         # steps between two checkpoints
    save_minutes: float = 30.0    # minutes after which a checkpoint is written between those; 0: none
    keep_checkpoints: int = 2     # number of newest checkpoints that are kept
    data: DataConfig = field(default_factory=DataConfig)
    mask: Annotated[MaskConfig, tyro.conf.arg(help=f"Which tokens are visible. Masks: {', '.join(MASKS)}.")] = field(
        default_factory=MaskConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    toy: ToyConfig = field(default_factory=ToyConfig)

    def __post_init__(self):
        if self.stage != "finetune":
            self.check_grids()
        only_finetune = {name: getattr(self, name)
                         for name in ("task", "data_root", "select_split", "epochs", "finetune_masked")}
        if self.stage != "finetune" and any(only_finetune.values()):
            name, value = next((name, value) for name, value in only_finetune.items() if value)
            raise ValueError(f"{name} must be empty unless stage is finetune, got {name} {value!r} and stage "
                             f"{self.stage!r}")
        if unknown := {*self.log} - {*LIBRARIES}:
            raise ValueError(f"log must name some of {', '.join(LIBRARIES)}, got {', '.join(sorted(unknown))}")
        if self.stage == "finetune" and self.data.val_file:
            raise ValueError("data.val_file must be empty for stage finetune, whose epochs are scored on select_split, "
                             f"got {self.data.val_file!r}")
        if self.model.pooling == "cls" and not self.vit.cls:
            raise ValueError(f"vit.cls must be True with model.pooling 'cls', got {self.vit.cls}")
        if self.all_budgets and (len(self.mask.tokens) < 2 or self.stage == "finetune"):
            raise ValueError("mask.tokens must have at least two budgets if all_budgets is set, and stage must not be "
                             f"finetune, got {self.mask.tokens} and {self.stage!r}")
        if self.all_budgets and not self.model.losses & {"mrm", "vtc"}:
            raise ValueError("model.mrm_weight or model.vtc_weight must be above 0 if all_budgets is set, got 0")
        if self.model.distill != "none" and not self.all_budgets:
            raise ValueError(f"model.distill must be none unless all_budgets is set, got {self.model.distill!r}")
        if self.model.distill != "none" and not self.model.vtc_weight:      # alone it would make all features equal
            raise ValueError(f"model.vtc_weight must be above 0 with model.distill {self.model.distill!r}, got 0")
        if self.model.decoder_queries == 1 and self.model.objective == "relevance":
            raise ValueError("model.decoder_queries must be 0, or at least 2, as MRM compares with the mean of a "
                             "clip's targets, got 1")
        if self.data.val_file and not self.model.reads_texts:
            raise ValueError("data.val_file must be empty if no loss of model reads texts, so that no text encoder is "
                             f"trained, got {self.data.val_file!r}")
        if self.val_every > 0 and not self.data.val_file:
            raise ValueError(f"data.val_file must be an annotation file if val_every is above 0, got '' and "
                             f"{self.val_every}")
        for name, losses in (("steps", self.model.losses), ("unmasked_steps", self.model.losses - {"mrm"})):
            if self.stage == "all" and getattr(self, name) > 0 and not losses:
                raise ValueError(f"{name} must be 0 if no loss of that stage has a weight above 0 in model, got "
                                 f"{getattr(self, name)}")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"batch must be a multiple of micro_batch, got {self.batch} and {self.micro_batch}")
        for name, least in (("batch", 1), ("log_every", 1), ("save_every", 1), ("keep_checkpoints", 1),
                            ("steps", self.stage == "finetune"), ("unmasked_steps", 0), ("epochs", 0),
                            ("max_skipped_steps", 0), ("save_minutes", 0), ("val_every", 0)):
            if not getattr(self, name) >= least:            # as NaN is not
                raise ValueError(f"{name} must be at least {int(least)}, got {getattr(self, name)}")

    def check_grids(self):
        """
        Raise a ValueError if a clip has fewer tokens than the mask is to keep, if those of the teacher are not equally
        many of each of its groups of frames, or if only some clips hide tokens. In fine-tuning it is called once the
        command line has been read, as the settings of the pretrained model need not fit the task.
        """
        data, patch, budget = self.data, self.vit.patch_size, max(self.mask.tokens, default=0)
        for T, size in (*grids(self), (data.num_frames, data.image_size)):
            pool = count_tokens(T, size, patch)
            if budget > pool:
                raise ValueError(f"mask.tokens must be at most {pool}, the tokens of {T} frames of {size} x {size} "
                                 f"pixels, got {budget}")
            if self.mask.teacher_tokens:
                count_equal_groups(self.mask.teacher_tokens, T, pool // T)
        counts = self.hidden_counts()
        least = min(counts, key=counts.get)
        needed = {"relevance": 2, "pixels": 1}.get(self.model.objective, 0) if "mrm" in self.model.losses else 0
        if self.hides_tokens and counts[least] < needed:        # MRM compares with the mean of a clip's targets
            raise ValueError(f"the mask must hide at least {needed} tokens of every clip and image, or none of any, "
                             f"got {counts[least]} of {least}")

    @property
    def shapes_vary(self) -> bool:
        """Whether the micro-batches of training draw their grid or their budget."""
        return self.data.varies or len(self.mask.tokens) > 1

    @property
    def hides_tokens(self) -> bool:
        """Whether the mask hides some tokens of the clips, which are then predicted."""
        return any(self.hidden_counts().values())

    def hidden_counts(self) -> dict[str, int]:
        """
        Return how many tokens are hidden of a clip of each grid at each budget and, with images, of an image of each
        size; by a description. Tokens that the teacher does not see do not count.
        """
        counts = {}
        for T, size in grids(self):
            N, pixels = count_tokens(1, size, self.vit.patch_size), f"{size} x {size} pixels"
            pool = self.mask.teacher_tokens or T * N
            for S in self.mask.tokens or (self.mask.total(T, N),):
                counts[f"{T} frames of {pixels} with {S} visible tokens"] = pool - S
            if self.data.image_corpora:
                counts[f"an image of {pixels}"] = N - keep_count(N, self.mask.image_ratio)
        return counts


WEB_DATA = DataConfig(
    train_file="data/webvid_cc3m_train.json", video_root="data/videos", num_frames=4, image_size=224,
    min_crop_scale=0.5, hflip=True, num_views=0, frame_cache=False, num_workers=12, resize_on_device=True)
PRESETS = {
    # The embedded run: everything is small enough for two CPU cores, and no step is taken that hardly helps.
    "sprites": Config(
        steps=480, unmasked_steps=36, lr=2e-3,
        vit=ViTConfig(patch_size=8, width=96, depth=4, heads=3, drop_path=0.0, pos_embed="3d"),
        text=TextEncoderConfig(width=96, depth=3, heads=3, fusion_layers=1, dropout=0.0, max_length=36),
        model=ModelConfig(embed_dim=96, decoder_width=96, decoder_depth=1, decoder_heads=3, decoder_query_ratio=0.1),
        toy=ToyConfig(steps=400, lr=3e-3, text_steps=150, text_lr=2e-3),
    ),
    # UMT's stage 2 (its exp/pretraining/b16_5m.py) with r = 0.85 for 0.8 and a SigLIP teacher for CLIP; bf16 for fp16
    # and gradient clipping are ours. Steps: ten epochs of 5 M clips.
    "base": Config(
        name="base", teacher="google/siglip-base-patch16-224", text_encoder="bert-base-uncased", batch=2048,
        steps=27_000, unmasked_steps=2_700, unmasked_batch=1024, lr=1e-4, save_every=1000, compile=True,
        data=WEB_DATA, mask=MaskConfig(ratio=0.85),
    ),
    # As base, but with 256 pixels a side, the size for which there is a SigLIP-L/16.
    "large": Config(
        name="large", teacher="google/siglip-large-patch16-256", text_encoder="bert-large-uncased", batch=4096,
        steps=13_500, unmasked_steps=1_350, unmasked_batch=2048, lr=1e-4, save_every=1000, compile=True,
        data=replace(WEB_DATA, image_size=256), mask=MaskConfig(ratio=0.85),
        vit=ViTConfig(width=1024, depth=24, heads=16, drop_path=0.2),
        text=TextEncoderConfig(width=1024, depth=24, heads=16, fusion_layers=5),
        model=ModelConfig(embed_dim=768),
    ),
}


def batch_sizes(cfg: Config) -> dict[str, int]:
    """Return the clips per step, by stage."""
    if cfg.stage == "finetune":
        return {"finetune": cfg.batch}
    toy = {"teacher": cfg.toy.batch} if not cfg.teacher else {}
    if not cfg.text_encoder and (cfg.model.reads_texts or cfg.stage == "text"):
        toy["text"] = cfg.toy.text_batch
    return {"pretrain": cfg.batch, "unmasked": cfg.unmasked_batch or cfg.batch} | toy


def micro_batch_sizes(cfg: Config, world: int) -> dict[str, int]:
    """Return the clips per rank and forward pass, by stage. ValueError if the batch is no multiple of them x ranks."""
    sizes = {}
    for stage, batch in batch_sizes(cfg).items():
        sizes[stage] = cfg.micro_batch * (stage not in ("teacher", "text")) or max(1, batch // world)
        if batch % (world * sizes[stage]):
            raise ValueError(f"{stage}: batch must be a multiple of micro_batch x ranks, got {batch}, {sizes[stage]} "
                             f"and {world}")
    return sizes


def position_grid(cfg: Config, init_from: str) -> tuple[int, ...]:
    """
    Return the grid (T, h, w) of position embeddings that have one: that of the student in the folder init_from, if
    there is one. Otherwise of relative positions that of data.num_frames and data.image_size, of learned ones the
    largest numbers of frames and patches, of these and the ranges.
    """
    if init_from and (grid := read_checkpoint(init_from, "a student")[0].get("vit", {}).get("grid", ())):
        return tuple(grid)
    data, patch = cfg.data, cfg.vit.patch_size
    grid_of = {"relative": (data.num_frames, data.image_size), "learned": (data.max_frames, data.max_size)}
    T, size = grid_of.get(cfg.vit.pos_embed, (0, 0))
    return (T, size // patch, size // patch) if T else ()


def query_count(cfg: Config) -> int:
    """
    Return model.decoder_queries where grids or budgets vary: the share decoder_query_ratio of the median number of
    hidden tokens over all grids and budgets, and images. Elsewhere 0: that share of each clip or image.
    """
    if not cfg.shapes_vary:
        return 0
    return max(2, round(statistics.median(cfg.hidden_counts().values()) * cfg.model.decoder_query_ratio))


def unused_parameters(cfg: Config, losses: frozenset[str]) -> tuple[str, ...]:
    """Return regular expressions of the parameters of ClusterSTM that none of these losses reaches."""
    fusion = "|".join(map(str, range(cfg.text.depth - cfg.text.fusion_layers, cfg.text.depth)))
    used_by = {
        r"^decoder\.": {"mrm"}, r"^(pool_norm|vision_proj)\.": {"vtc", "distill"}, r"^text_proj\.|^temp$": {"vtc"},
        r"^itm_head\.": {"vtm"},
        r"^bert\.cls\.": {"mlm"}, rf"^bert\.bert\.encoder\.layer\.({fusion})\.": {"vtm", "mlm"},
        r"^bert\.": {"vtc", "vtm", "mlm"}}
    return tuple(pattern for pattern, users in used_by.items() if not users & losses)


def check_positions(cfg: Config):
    """Raise a ValueError if a clip of the ranges, or of data.num_frames and image_size, exceeds the learned table."""
    data, patch, grid = cfg.data, cfg.vit.patch_size, cfg.vit.grid
    largest = (data.max_frames, data.max_size // patch, data.max_size // patch)
    if cfg.vit.pos_embed == "learned" and any(n > limit for n, limit in zip(largest, grid, strict=True)):
        raise ValueError(f"vit.grid must be at least {largest}, the largest clips of the settings in data, got {grid}")


def next_command(cfg: Config, folder: str) -> str:
    """
    Return the command that scores the trained model in `folder` on held-out clips of the data it was trained on; if it
    has no text encoder, the one that trains it with texts.
    """
    if not cfg.model.reads_texts:
        return shlex.join(["python", "train.py", "--name", "WITH_TEXTS", "--init-from", folder])
    command, data = ["python", "eval.py", "--checkpoint", folder], cfg.data
    root, name = os.path.split(data.train_file)
    if is_shards(data.val_file):
        command += ["--data", data.val_file]
    elif data.val_file:
        command += ["--data", data.val_file, "--data-root", data.val_root or data.video_root]
    elif name != os.path.basename(DataConfig.train_file):
        held_out = ["HELD_OUT.tar"] if is_shards(name) else ["HELD_OUT.json", "--data-root", data.video_root]
        command += ["--data", *held_out]                                            # files that only the user knows
    elif data.train_file != DataConfig.train_file:                                  # the embedded set, elsewhere
        command += ["--data-root", root]
    return shlex.join(command)


def name_run(train_file: str) -> str:
    """Name a run after its data: data/sprites/sprites_train.json -> sprites."""
    return name_data(train_file).removesuffix("_train")


def read_settings(folder: str, stage: str) -> Config | None:
    """
    Read the settings of the run in a folder, None if it has none. A run that trained only a toy model has them in that
    model's folder; stage "teacher" or "text" says which.
    """
    parts = [stage] * (stage in ("teacher", "text")) + ["", "teacher", "text"]
    for part in parts:
        path = os.path.join(folder, part, "run_state.json")
        if config := read_run_state(os.path.dirname(path)).get("config"):
            return replace(config_from_dict(Config, config, path), resume=False)
    return None
