"""
Train ClusterSTM.

    python train.py                                         # the embedded run: it needs no data and no weights
    python train.py --data.train-file captions.json --data.video-root FOLDER            # your own videos
    torchrun --nproc_per_node=8 train.py base --teacher SIGLIP --text-encoder BERT --data.train-file captions.json ...
    python train.py --stage finetune --task sprites-qa --init-from out/sprites          # a row of tasks.TASKS
    python train.py base --help

Data flow of a step: samples of data.py -> micro-batches -> teacher targets (targets.py: which tokens are visible, and
the embedding of each token) -> losses of the student (model.py) -> one optimizer step.

A run passes through stages, each trained by `train_stage`: "teacher" and "text" train a toy SigLIP and a toy text
encoder if no weights are given; "pretrain" is masked pretraining; "unmasked" is a short stage on all tokens. It writes
out/NAME: config.json, log.jsonl, model.safetensors and tokenizer.json (eval.py needs only this folder),
before_unmasked/ (the model before the unmasked stage), checkpoints/ (for --resume), target_cache/ (during pretraining).

Fine-tuning takes its settings from the task's row and the pretrained folder; flags change them. The model is scored on
the validation split after each epoch if there is one; the best epoch is kept and scored on the test split.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import eval as evaluation
from data import Batch, ClipDataset, DataConfig, MixedDataset, load_tokenizer, resolve_tokenizer
from encoders import Bert, BertLayer, Block, TextEncoderConfig, ViTConfig, bert_config, mask_tokens
from files import (
    atomic_write_text,
    config_from_dict,
    load_state_dict_strict,
    read_checkpoint,
    read_json,
    resolve_checkpoint,
    save_weights,
)
from loop import Stage, train_stage
from masking import MASKS, MaskConfig, keep_count
from model import ClusterSTM, ModelConfig, VideoToText
from runtime import (
    RunContext,
    Stream,
    check_same_config,
    describe_error,
    init_run,
    is_finished,
    list_checkpoints,
    pin_to_first_run,
    print0,
    run_cli,
    seeded_generator,
    select_device,
)
from targets import TargetProvider, TeacherTargets, VisibleIdCache
from tasks import (
    TASKS,
    build_mapped_annotations,
    find_file,
    get_task,
    read_answers,
    read_rows,
    resolve_data_root,
    split_files,
)
from teacher import EncoderLayer, SigLIP, VisionConfig, load_teacher, read_tower_config, require_fp8
from tools.sprites import write_sprites
from tools.toy_teacher import SigLIPTrainer, ToyConfig, build_toy_teacher, sample_single_frames


@dataclass(frozen=True)
class Config:
    """
    Train ClusterSTM. A preset may come first: `sprites` (the embedded run, the default), `base` or `large` (the paper's
    sizes). All results are written to out/NAME.
    """
    name: str = ""                # name of the run; empty: the name of the annotation file without _train
    # all: pretrain, after training the toy models that are needed; teacher, text: train only this toy model; finetune:
    # fine-tune for --task
    stage: Literal["all", "teacher", "text", "finetune"] = "all"
    task: Annotated[str, tyro.conf.arg(help=f"finetune: a benchmark: {', '.join(TASKS)}")] = ""
    data_root: str = ""           # finetune: folder with the benchmark's annotations and videos
    # finetune: the split whose score chooses the epoch; last: the last epoch is taken; empty: val, or last without one
    select_split: Literal["", "val", "test", "last"] = ""
    epochs: float = 0             # finetune: passes over the training split; replaces --steps if above 0
    finetune_masked: bool = False  # finetune: train and score on the tokens that the mask keeps, instead of all tokens
    resume: bool = False          # continue the run in out/NAME from its newest checkpoint
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
    max_skipped_steps: int = 0    # steps of a stage that may be skipped because loss or gradient is not finite
    log_every: int = 10           # steps between two rows of log.jsonl
    save_every: int = 500         # steps between two checkpoints
    keep_checkpoints: int = 2     # number of newest checkpoints that are kept
    data: DataConfig = field(default_factory=DataConfig)
    mask: Annotated[MaskConfig, tyro.conf.arg(help=f"Which tokens are visible. Masks: {', '.join(MASKS)}.")] = field(
        default_factory=MaskConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    toy: ToyConfig = field(default_factory=ToyConfig)

    def __post_init__(self):
        only_finetune = {name: getattr(self, name)
                         for name in ("task", "data_root", "select_split", "epochs", "finetune_masked")}
        if self.stage != "finetune" and any(only_finetune.values()):
            name, value = next((name, value) for name, value in only_finetune.items() if value)
            raise ValueError(f"{name} must be empty unless stage is finetune, got {name} {value!r} and stage "
                             f"{self.stage!r}")
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"batch must be a multiple of micro_batch, got {self.batch} and {self.micro_batch}")
        for name, least in (("batch", 1), ("log_every", 1), ("save_every", 1), ("keep_checkpoints", 1),
                            ("steps", self.stage == "finetune"), ("unmasked_steps", 0), ("epochs", 0),
                            ("max_skipped_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {int(least)}, got {getattr(self, name)}")

    @property
    def grid(self) -> tuple[int, int]:
        """The grid (h, w) of the student's patches in a frame."""
        return (self.data.image_size // self.vit.patch_size,) * 2

    def hides_tokens(self, ratio: float) -> bool:
        """Return whether a mask of this ratio hides any token of a frame."""
        N = math.prod(self.grid)
        return keep_count(N, ratio) < N


WEB_DATA = DataConfig(
    train_file="data/webvid_cc3m_train.json", video_root="data/videos", num_frames=4, image_size=224,
    min_crop_scale=0.5, hflip=True, num_views=0, frame_cache=False, num_workers=12, resize_on_device=True)
PRESETS = {
    # The embedded run: everything is small enough for two CPU cores.
    "sprites": Config(
        # So small a teacher gives nearly the same features to all background, and most pairs are background. 0.95 is
        # the quantile at which sprites stand out, chosen on training clips (docs/log.md).
        mask=MaskConfig(quantile=0.95),
        vit=ViTConfig(patch_size=8, width=96, depth=4, heads=3, drop_path=0.0, pos_embed="3d"),
        text=TextEncoderConfig(width=96, depth=3, heads=3, fusion_layers=1, dropout=0.0, max_length=36),
        model=ModelConfig(embed_dim=96, decoder_width=96, decoder_depth=1, decoder_heads=3),
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


# ---------------------------------------------------------------------------------------------------------------------
# The run

def main(cfg: Config) -> nn.Module:
    """Train as `cfg` says -> the model of the last stage."""
    run = setup(cfg)
    try:
        model = (finetune if cfg.stage == "finetune" else pretrain)(run)
    except RuntimeError as error:
        raise describe_error(error, run) from error
    finally:
        run.close()
    if run.world > 1:
        dist.destroy_process_group()
    return model


def batch_sizes(cfg: Config) -> dict[str, int]:
    """Return the clips per step, by stage."""
    if cfg.stage == "finetune":
        return {"finetune": cfg.batch}
    toy = {"teacher": cfg.toy.batch} if not cfg.teacher else {}
    toy |= {"text": cfg.toy.text_batch} if not cfg.text_encoder else {}
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


def setup(cfg: Config) -> RunContext:
    """Join the process group, choose the device, lock the folders that the run writes to."""
    name = cfg.name or os.path.splitext(os.path.basename(cfg.data.train_file))[0].removesuffix("_train")
    cfg = replace(cfg, name=name)
    device = select_device(cfg.device)
    if cfg.teacher_fp8:
        require_fp8(device)
    sizes = micro_batch_sizes(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    out = os.path.join("out", name)
    folders = {stage: os.path.join(out, stage) if stage in ("teacher", "text") else out for stage in sizes}
    if cfg.stage in ("teacher", "text"):        # a run of its own, beside which other runs may use the folder `out`
        if cfg.stage not in folders:
            given = "teacher" if cfg.stage == "teacher" else "text_encoder"
            raise ValueError(f"{given} must be empty for stage {cfg.stage!r}, got {getattr(cfg, given)!r}")
        folders = {cfg.stage: folders[cfg.stage]}
    run, resume = init_run(cfg, sorted(set(folders.values())), device)
    run = replace(run, folder=out, cfg=replace(cfg, resume=resume))
    for stage, folder in folders.items():       # random draws go by micro-batch: a resumed run keeps its sizes
        if stage != "teacher":
            sizes[stage] = pin_to_first_run(folder, run, f"micro_batch of {stage}", sizes[stage])
        batch = batch_sizes(cfg)[stage]
        if batch % (run.world * sizes[stage]):
            raise ValueError(f"{stage}: batch must be a multiple of micro_batch x ranks, got {batch}, {sizes[stage]} "
                             f"(as when the run began) and {run.world}")
    run.micro_batch_size = sizes
    return run


def fix_config(run: RunContext, cfg: Config) -> RunContext:
    """
    Write the resolved config and the command line -> the run with this config, which does not change any more.

    ValueError, on all ranks, if the config differs from that of the run that is resumed. A run that was stopped before
    its first checkpoint may begin again with another config.
    """
    run, error = replace(run, cfg=cfg), ""
    path, *weights = (os.path.join(run.folder, name) for name in
                      ("config.json", "model.safetensors", "before_unmasked/model.safetensors"))
    if run.rank == 0 and cfg.stage not in ("teacher", "text"):
        begun = list_checkpoints(run.folder) or any(map(os.path.isfile, weights))
        try:
            if cfg.resume and begun and os.path.isfile(path):
                check_same_config(read_json(path), asdict(cfg), path)
            else:                               # targets cached for another config must not be read
                shutil.rmtree(os.path.join(run.folder, "target_cache"), ignore_errors=True)
                atomic_write_text(path, json.dumps(asdict(cfg), indent=1))
        except ValueError as caught:
            error = str(caught)
    if error := run.broadcast(error):
        raise ValueError(error)
    if run.rank == 0:
        atomic_write_text(os.path.join(own_folder(run), "command.txt"), shlex.join(sys.argv) + "\n")
    return run


def own_folder(run: RunContext) -> str:
    """The folder that the run has locked: out/NAME, or out/NAME/teacher or text if it trains only this toy model."""
    return os.path.join(run.folder, run.cfg.stage) if run.cfg.stage in ("teacher", "text") else run.folder


def build_datasets(run: RunContext) -> tuple[ClipDataset, ClipDataset | None]:
    """Build the datasets of videos and of images. Rank 0 reads and decodes first; the others open what it wrote."""
    cfg, offset, datasets = run.cfg.data, 0, []
    corpora = cfg.corpora(), cfg.corpora(images=True)
    annotations = [run.rank0_first(partial(build_mapped_annotations, part, "out")) for part in corpora if part]
    digests = [part.digest for part in annotations]
    folder = own_folder(run)
    if digests != pin_to_first_run(folder, run, "annotations", digests):
        raise ValueError(f"{folder}/run_state.json: the annotations must be those that the run began with; "
                         f"{cfg.train_file} or another corpus has changed")
    for part, view in zip(annotations, (cfg, replace(cfg, num_frames=1, max_seconds=0, image_corpora=())),
                          strict=False):
        datasets.append(run.rank0_first(partial(ClipDataset, part, view, run.cfg.seed, index_offset=offset)))
        offset += len(part)
    return datasets[0], datasets[1] if cfg.image_corpora else None


def pretrain(run: RunContext) -> nn.Module:
    """Train the toy models that are needed, then the student: masked pretraining and the unmasked stage."""
    cfg = run.cfg
    required = ((cfg.teacher, "a SigLIP"), (cfg.text_encoder, "a BERT"), (cfg.init_from, "a student"))
    teacher_folder, text_folder, init_from = (
        resolve_checkpoint(folder, what) if folder else "" for folder, what in required)
    if cfg.data.train_file == DataConfig.train_file:
        run.rank0_first(lambda: os.path.exists(cfg.data.train_file)
                        or write_sprites(os.path.dirname(cfg.data.train_file)))
    videos, images = build_datasets(run)
    if images and cfg.hides_tokens(cfg.mask.ratio) != cfg.hides_tokens(cfg.mask.image_ratio):
        raise ValueError(f"mask.ratio and mask.image_ratio must both hide some of {math.prod(cfg.grid)} tokens, or "
                         f"neither, got {cfg.mask.ratio} and {cfg.mask.image_ratio}")
    dataset = lambda batch: MixedDataset(videos, images, batch) if images else videos
    captions = (caption for part in (videos, images) if part for row in part.annotations for caption in row.captions)
    tokenizer = resolve_tokenizer(run, captions, text_folder)
    run = fix_config(run, resolve_config(run, tokenizer, teacher_folder))

    if run.cfg.stage != "text":
        if not cfg.teacher:
            train_toy_teacher(run, dataset, tokenizer)
        teacher = load_teacher(teacher_folder or run.cfg.teacher, run.device, cfg.teacher_fp8)
        if cfg.stage == "teacher":
            return teacher
    if not cfg.text_encoder:
        text_folder = train_toy_text_encoder(run, dataset, tokenizer)
    torch.manual_seed(cfg.seed)
    bert = Bert.from_pretrained(text_folder, **asdict(bert_config(run.cfg.text, cfg.vit.width)))
    if any(key.startswith("cls.") for key in bert.missing_keys):
        print0(f"{text_folder} has no masked-language-model head: a random one is trained")
    return bert if cfg.stage == "text" else train_student(run, teacher, bert, dataset, tokenizer, init_from)


def resolve_config(run: RunContext, tokenizer, teacher_folder: str) -> Config:
    """
    Fill in the vocabulary, special ids, teacher and target width -> the config. teacher_folder: the local folder of
    cfg.teacher, empty for a toy teacher.
    """
    cfg = run.cfg
    width = cfg.toy.width
    if teacher_folder:
        path = os.path.join(teacher_folder, "config.json")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{teacher_folder} is not a folder of a SigLIP: it has no config.json")
        width = read_tower_config(VisionConfig, read_json(path), "vision_config", path).hidden_size
    return replace(
        cfg, teacher=cfg.teacher or os.path.join(run.folder, "teacher"),
        text=replace(cfg.text, vocab_size=cfg.text.vocab_size or tokenizer.get_vocab_size(),
                     mask_token_id=cfg.text.mask_token_id or tokenizer.token_to_id("[MASK]")),
        model=replace(cfg.model, target_dim=cfg.model.target_dim or width))


def train_toy_teacher(run: RunContext, dataset: Callable, tokenizer):
    """Train a small SigLIP on single frames into out/NAME/teacher, unless it is there already."""
    cfg, folder = run.cfg, run.cfg.teacher
    if is_finished(folder, cfg):
        return
    if cfg.data.train_file != DataConfig.train_file:
        print0(f"No --teacher was given: a toy SigLIP is trained on these {len(dataset(cfg.toy.batch))} clips first. "
               "That is enough to try things out; results need a real SigLIP.")
    siglip = build_toy_teacher(cfg, tokenizer).to(run.device)
    train_stage(replace(run, folder=folder), Stage(
        "teacher", SigLIPTrainer(siglip), dataset(cfg.toy.batch), tokenizer, cfg.toy.batch, cfg.toy.steps, cfg.toy.lr,
        lambda batches: sample_single_frames(siglip, batches, cfg.toy.frame_caption_prob, cfg.seed),
        betas=(0.9, 0.95)))                     # SigLIP's; the other stages have UMT's
    if run.rank == 0:
        siglip.save_pretrained(folder)
    run.barrier()


def train_toy_text_encoder(run: RunContext, dataset: Callable, tokenizer) -> str:
    """Train a small BERT by MLM on the captions into out/NAME/text, unless it is there already -> the folder."""
    folder = os.path.join(run.folder, "text")
    # The teacher plays no part here: --stage text may come before it is chosen.
    cfg = replace(run.cfg, teacher="", model=replace(run.cfg.model, target_dim=0))
    if is_finished(folder, cfg):
        return folder
    torch.manual_seed(cfg.seed)
    bert = Bert(bert_config(cfg.text, cfg.vit.width)).to(run.device)
    train_stage(replace(run, folder=folder, cfg=cfg), Stage(
        "text", bert, dataset(cfg.toy.text_batch), tokenizer, cfg.toy.text_batch, cfg.toy.text_steps, cfg.toy.text_lr,
        lambda batches: [mask_tokens(batch.text_ids, cfg.text.vocab_size, cfg.text.mask_token_id,
                                     seeded_generator(batch, Stream.MASK)) for batch in batches],
        frozen=("crossattention",)))
    if run.rank == 0:
        atomic_write_text(os.path.join(folder, "tokenizer.json"), tokenizer.to_str(pretty=True))
        bert.save_pretrained(folder)
    run.barrier()
    return folder


def train_student(run: RunContext, teacher: SigLIP, bert: Bert, dataset: Callable, tokenizer,
                  init_from: str) -> nn.Module:
    """Masked pretraining, then the unmasked stage -> the trained student."""
    cfg, out = run.cfg, run.folder
    model = ClusterSTM(cfg.vit, cfg.text, cfg.model, bert)
    if init_from:
        model.init_from(init_from)
    model = wrap_layers(model.to(run.device).train(), cfg)
    before_unmasked = os.path.join(out, "before_unmasked")
    if cfg.resume and is_finished(before_unmasked, cfg):
        load_state_dict_strict(model, read_checkpoint(before_unmasked, "a trained model")[1], before_unmasked)
    else:
        provider = TargetProvider(run, wrap_layers(teacher, cfg), dataset(cfg.batch))
        no_decoder = not cfg.model.mrm_weight or (
            not cfg.hides_tokens(cfg.mask.ratio) and cfg.model.objective != "visible")
        train_stage(run, Stage(
            "pretrain", model, dataset(cfg.batch), tokenizer, cfg.batch, cfg.steps, cfg.lr,
            lambda batches: attach_batch_stats(model, batches, provider(batches)), loss_weights(cfg.model),
            frozen=(r"^decoder\.",) if no_decoder else (), before_checkpoint=provider.flush_all_ranks))
        provider.delete()
        save_model(run, model, tokenizer, before_unmasked)
    if cfg.unmasked_steps:
        batch = cfg.unmasked_batch or cfg.batch
        train_stage(run, Stage(
            "unmasked", model, dataset(batch), tokenizer, batch, cfg.unmasked_steps, cfg.lr * cfg.unmasked_lr_scale,
            lambda batches: attach_batch_stats(model, batches, [None] * len(batches)), loss_weights(cfg.model),
            frozen=(r"^decoder\.",)))
    save_model(run, model, tokenizer, out)
    print0(f"{out}: trained. Next: python eval.py --checkpoint {out}")
    return model


def wrap_layers(model: nn.Module, cfg: Config, shapes_vary: bool = False) -> nn.Module:
    """
    Compile the model's layers, or recompute them in the backward pass, if cfg says so -> the model itself.

    Shapes are fixed in pretraining. They vary in fine-tuning: the last batch of a split is smaller, and the number of
    clips whose visible ids are not cached yet changes.
    """
    compiled = partial(torch.compile, fullgraph=True, dynamic=None if shapes_vary else False,
                       options={"fallback_random": True})
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.optimize_ddp = False           # it would split each layer at the edges of DDP's buckets
    for name, layer in model.named_modules():
        if not isinstance(layer, (Block, BertLayer, EncoderLayer)) or "text_decoder" in name:   # decodes token by token
            continue
        if cfg.compile:         # one program for all layers of a kind; random draws equal those of the plain layers
            layer.forward = compiled(layer.forward)
        if cfg.activation_checkpointing and layer.training:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if cfg.compile and isinstance(model, SigLIP):       # its nine passes over the pixels become one
        model.rescale = compiled(model.rescale)
    return model


def loss_weights(cfg: ModelConfig) -> dict[str, float]:
    """Return weights by loss name. "align" and "pixels" are the losses of the objectives that replace MRM."""
    return {**dict.fromkeys(("mrm", "align", "pixels"), cfg.mrm_weight),
            "vtc": cfg.vtc_weight, "vtm": cfg.vtm_weight, "mlm": cfg.mlm_weight}


def attach_batch_stats(model: ClusterSTM, batches: list[Batch], targets: list[TeacherTargets | None]) -> list[tuple]:
    """Return the arguments of the model for each micro-batch: (batch, targets, statistics of the global batch)."""
    return list(zip(batches, targets, model.batch_stats(batches, targets), strict=True))


def save_model(run: RunContext, model: nn.Module, tokenizer, folder: str, **extra):
    """Write a folder that load_model and eval.py read. Weights come last: if they are there, the folder is complete."""
    if run.rank == 0:
        os.makedirs(folder, exist_ok=True)
        atomic_write_text(os.path.join(folder, "config.json"), json.dumps(asdict(run.cfg) | extra, indent=1))
        atomic_write_text(os.path.join(folder, "tokenizer.json"), tokenizer.to_str(pretty=True))
        save_weights(model, folder)
    run.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning

def finetune_defaults(name: str, init_from: str) -> Config:
    """The settings of a task for the pretrained model in a folder of train.py or tools.convert, or under a hub id."""
    task, folder = get_task(name), resolve_checkpoint(init_from, "a student")
    path = os.path.join(folder, "config.json")
    trained = read_checkpoint(folder, "a student")[0]
    for part in ("vit", "text", "model"):
        if part not in trained:
            raise ValueError(f"{path}: {part!r} must be there, as in the config of a pretrained student")
    vit = config_from_dict(ViTConfig, trained["vit"], path)
    recipe = task.recipe_large if vit.width >= 1024 else task.recipe_base
    data = PRESETS["sprites" if task.default_root else "base"].data
    teacher, moved = trained.get("teacher", ""), os.path.join(folder, "teacher")
    if os.path.isdir(moved) and not os.path.isdir(teacher):
        teacher = moved                         # the folder was moved with its toy teacher
    return Config(
        name=f"{os.path.basename(os.path.normpath(init_from))}-{name}", stage="finetune", task=name,
        init_from=init_from, teacher=teacher, batch=task.batch, epochs=recipe.epochs, lr=recipe.lr,
        warmup_frac=recipe.warmup / recipe.epochs, max_grad_norm=0, finetune_masked=task.finetune_masked,
        data=replace(data, num_frames=task.num_frames, max_seconds=task.seconds, hflip=task.flip and data.hflip,
                     image_size=trained.get("data", {}).get("image_size", data.image_size)),
        mask=config_from_dict(MaskConfig, trained.get("mask", {}), path),
        vit=replace(vit, drop_path=recipe.drop_path),
        text=replace(config_from_dict(TextEncoderConfig, trained["text"], path), max_length=task.max_text_length),
        model=replace(config_from_dict(ModelConfig, trained["model"], path), mrm_weight=0, mlm_weight=0,
                      vtc_weight=ModelConfig.vtc_weight, vtm_weight=ModelConfig.vtm_weight),
    )


def finetune(run: RunContext) -> nn.Module:
    """Fine-tune for a task, choose an epoch, score it on the test split."""
    cfg, task = run.cfg, get_task(run.cfg.task)
    if not cfg.init_from:
        raise ValueError("init_from must be the folder of a pretrained model for --stage finetune, got ''")
    if task.kind in ("qa", "caption") and cfg.model.mlm_weight:
        raise ValueError(f"model.mlm_weight must be 0 for {cfg.task}, whose loss is of the answers, got "
                         f"{cfg.model.mlm_weight:g}")
    if task.default_root and not cfg.data_root:
        run.rank0_first(lambda: os.path.exists(task.default_root) or write_sprites(task.default_root))
    train_file, video_root = split_files(task, "train", cfg.data_root)
    data = replace(cfg.data, train_file=train_file, video_root=video_root)
    annotations = read_rows(task, train_file, video_root, train=True)
    dataset = run.rank0_first(lambda: ClipDataset(annotations, data, cfg.seed))
    epoch_steps = len(dataset) / cfg.batch
    steps = max(1, round(cfg.epochs * epoch_steps)) if cfg.epochs else cfg.steps
    epochs = {max(1, round(epoch * epoch_steps)): epoch for epoch in range(1, math.ceil(cfg.epochs) + 1)}
    epochs = {step: epoch for step, epoch in epochs.items() if step < steps} | {steps: math.ceil(cfg.epochs) or 1}
    select_split = cfg.select_split or ("val" if task.val_file else "last")
    run = fix_config(run, replace(cfg, steps=steps, select_split=select_split, data=data))

    tokenizer = load_tokenizer(resolve_checkpoint(cfg.init_from, "a student"))
    model = build_finetuned(run, task)
    visible_ids = VisibleIdCache(run, model.vit.grid_size, partial(wrap_layers, cfg=run.cfg, shapes_vary=True)) \
        if cfg.finetune_masked else lambda batch: None

    def make_inputs(batches: list[Batch]) -> list[tuple]:
        targets = [visible_ids(batch) for batch in batches]
        if isinstance(model, ClusterSTM):
            return attach_batch_stats(model, batches, targets)
        return list(zip(batches, targets, strict=True))

    selector = EpochSelector(run, tokenizer, epochs, visible_ids)
    train_stage(run, Stage(
        "finetune", model, dataset, tokenizer, cfg.batch, steps, cfg.lr, make_inputs, loss_weights(cfg.model),
        frozen=(r"^decoder\.",) + ((r"^bert\.cls\.",) if cfg.model.mlm_weight == 0 else ()),
        at_step={step: partial(selector, model, step) for step in epochs}))
    print0(f"{run.folder}: fine-tuned. {selector.summary()}")
    run.barrier()
    try:
        split_files(task, "test", cfg.data_root)
    except FileNotFoundError as error:
        print0(f"The test split is not scored: {error}")
    else:
        evaluation.main(evaluation.Config(
            task=cfg.task, checkpoint=run.folder, data_root=cfg.data_root, device=cfg.device,
            mask=cfg.mask.name if cfg.finetune_masked else "", workers=cfg.data.num_workers))
    return model


def build_finetuned(run: RunContext, task) -> ClusterSTM | VideoToText:
    """Build the model of a task with the weights of cfg.init_from."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed)
    model = ClusterSTM(cfg.vit, cfg.text, cfg.model)
    model.init_from(resolve_checkpoint(cfg.init_from, "a student"))
    model.use_mlm = cfg.model.mlm_weight > 0
    if task.kind in ("qa", "caption"):
        model = VideoToText.from_student(model, has_question=task.kind == "qa")
    return wrap_layers(model.to(run.device).train(), cfg, shapes_vary=True)


class EpochSelector:
    """Score the model after each epoch on cfg.select_split; out/NAME holds the best model so far."""

    def __init__(self, run: RunContext, tokenizer, epochs: dict[int, int], visible_ids: Callable):
        """epochs: step -> the epoch that ends with it. visible_ids(batch): the tokens to see, or None for all."""
        cfg, task = run.cfg, get_task(run.cfg.task)
        self.run, self.tokenizer, self.epochs, self.task = run, tokenizer, epochs, task
        self.path = os.path.join(run.folder, "epochs.json")
        self.history = []                       # {"step", "epoch", "score", "metric"} of each epoch so far
        if cfg.resume and os.path.isfile(self.path):
            with open(self.path) as f:
                self.history = json.load(f)
        if cfg.select_split == "last":
            return
        self.annotations = read_rows(task, *split_files(task, cfg.select_split, cfg.data_root), train=False)
        self.protocol = evaluation.Protocol(
            max_text_length=task.max_text_length, max_answer_length=task.max_answer_length,
            rerank_topk=task.rerank_topk, workers=cfg.data.num_workers, cider_only=True)
        if cfg.finetune_masked:                 # clips of another split must not share ids with the training clips
            self.protocol.visible_fn = lambda batch: visible_ids(replace(batch, clip_ids=-1 - batch.clip_ids))
        if task.kind == "qa":
            self.protocol.answers = read_answers(find_file(task.answer_list, resolve_data_root(task, cfg.data_root)))

    def best(self) -> dict:
        return max(self.history, key=lambda row: row["score"])

    def summary(self) -> str:
        """Say how the epoch was chosen, with a warning if it was chosen on the test split."""
        split = self.run.cfg.select_split
        if split == "last":
            return "the last epoch was taken, without selection"
        row = self.best()
        chosen = "CHOSEN ON THE TEST SPLIT" if split == "test" else "chosen on the val split"
        return f"epoch {row['epoch']} of {len(self.epochs)}, {chosen}: {row['metric']} {row['score']:.1f}"

    def __call__(self, model: nn.Module, step: int):
        run, cfg = self.run, self.run.cfg
        self.history = [row for row in self.history if row["step"] <= step]     # later epochs are trained again
        if self.history and self.history[-1]["step"] == step:                   # scored before the run stopped
            return
        if cfg.select_split == "last":
            if step == cfg.steps:
                save_model(run, model, self.tokenizer, run.folder, chosen=self.summary())
            return
        result = evaluation.evaluate(model.eval(), self.task, self.annotations, cfg.data, self.tokenizer, self.protocol)
        model.train()
        metric, score = evaluation.selection_metric(self.task.kind, result["scores"])
        self.history.append({"step": step, "epoch": self.epochs[step], "score": score, "metric": metric})
        if run.rank == 0:
            tqdm.write(f"epoch {self.epochs[step]}, {cfg.select_split}: {metric} {score:.1f}")
        if self.best()["step"] == step:
            save_model(run, model, self.tokenizer, run.folder, chosen=self.summary())
        if run.rank == 0:
            atomic_write_text(self.path, json.dumps(self.history))      # last: it says that this epoch is done


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def split_defaults(args: list[str]) -> tuple[Config, list[str], str]:
    """Return the config that the command line changes, the remaining arguments, and the preset's name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for *flags, default in (("--stage", ""), ("--task", "sprites"), ("--init-from", "--init_from", "out/sprites")):
        parser.add_argument(*flags, default=default, nargs="?")
    first = parser.parse_known_args(args)[0]
    preset = args[0] if args and args[0] in PRESETS else ""
    if first.stage != "finetune":
        return PRESETS[preset or "sprites"], args[1:] if preset else args, preset
    if preset:
        raise ValueError(f"a preset must not be given for --stage finetune, which takes its settings from --task and "
                         f"--init-from, got {preset!r}")
    return finetune_defaults(first.task or "", first.init_from or ""), args, ""


def cli():
    """Parse the command line and train."""
    default, args, preset = split_defaults(sys.argv[1:])
    main(tyro.cli(Config, args=args, default=default, prog=f"python train.py {preset or '[sprites|base|large]'}"))


if __name__ == "__main__":
    run_cli("train.py", cli)
