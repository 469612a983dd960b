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
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import eval as evaluation
from annotations import Annotation, build_mapped_annotations
from blocks import Block
from config import (
    PRESETS,
    Config,
    batch_sizes,
    check_positions,
    micro_batch_sizes,
    name_run,
    next_command,
    position_grid,
    query_count,
    read_settings,
    unused_parameters,
)
from data import Batch, ClipDataset, DataConfig, MixedDataset
from decoders import loss_weights
from encoders import Bert, BertLayer, TextEncoderConfig, ViTConfig, bert_config, mask_tokens
from files import (
    atomic_write_text,
    config_from_dict,
    hash_json,
    load_state_dict_strict,
    read_checkpoint,
    read_json,
    require,
    resolve_checkpoint,
    save_weights,
    write_json,
)
from logs import import_library
from loop import Stage, train_stage
from masking import MaskConfig
from metrics import selection_metric
from model import ClusterSTM, ModelConfig, VideoToText, load_model
from runtime import (
    BadMediaLog,
    RunContext,
    Stream,
    describe_error,
    init_run,
    latest_checkpoint,
    list_training_states,
    pin_config,
    pin_to_first_run,
    print0,
    read_run_state,
    require_settings,
    run_cli,
    seeded_generator,
    select_device,
)
from siglip_files import VisionConfig, read_tower_config
from targets import TargetProvider, TeacherTargets, VisibleIdCache
from tasks import find_file, get_task, read_answers, read_rows, resolve_data_root, split_files
from teacher import EncoderLayer, SigLIP, load_teacher, require_fp8
from tokenizer import load_tokenizer, resolve_tokenizer
from tools.sprites import write_sprites
from tools.toy_teacher import SigLIPTrainer, build_toy_teacher, sample_single_frames

# Parts of a student that are not trained if no loss reads texts, as they begin in ClusterSTM.state_dict().
NOT_OF_VISION = ["bert.", "text_proj.", "itm_head.", "pool_norm.", "vision_proj.", "temp"]

# ---------------------------------------------------------------------------------------------------------------------
# The run

def main(cfg: Config) -> nn.Module:
    """Train as `cfg` says -> the model of the last stage."""
    run = setup(cfg)
    try:
        if is_finished(run):
            model = load_model(run.folder)
            print0(f"{run.folder}: the run is finished, nothing is left to do")
        else:
            model = (finetune if cfg.stage == "finetune" else pretrain)(run)
            pin_to_first_run(own_folder(run), run, "finished", True)
    except (RuntimeError, OSError) as error:
        raise describe_error(error, run) from error
    finally:
        run.close()
    if run.world > 1:
        dist.destroy_process_group()
    return model


def setup(cfg: Config) -> RunContext:
    """Join the process group, choose the device, lock the folders that the run writes to."""
    cfg = replace(cfg, name=cfg.name or name_run(cfg.data.train_file))
    name = cfg.name
    if not name.isprintable() or os.path.isabs(name) or ".." in name.split(os.sep):
        raise ValueError(f"name must be that of a folder below out/, without control characters, got {name!r}")
    for log in cfg.log:
        import_library(log)
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
    try:
        pin_settings(run, folders, sizes)
    except BaseException:
        run.close()
        raise
    return run


def pin_settings(run: RunContext, folders: dict[str, str], sizes: dict[str, int]):
    """
    Store the settings and micro-batch sizes of a run that begins; compare them with those of a run that is resumed.

    folders and sizes: the folder and the micro-batch size of each stage. A resumed run keeps its sizes, since random
    draws go by micro-batch.
    """
    for folder in sorted(set(folders.values())):
        # The toy text encoder may be trained before a teacher is chosen.
        pin_config(folder, run, asdict(replace(run.cfg, teacher="") if folder == folders.get("text") else run.cfg))
    for stage, folder in folders.items():
        if stage in ("teacher", "text") and run.call_on_rank0(partial(is_trained, folder)):
            continue
        if stage != "teacher":
            sizes[stage] = pin_to_first_run(folder, run, f"micro_batch of {stage}", sizes[stage])
        batch = batch_sizes(run.cfg)[stage]
        if batch % (run.world * sizes[stage]):
            raise ValueError(f"{stage}: batch must be a multiple of micro_batch x ranks, got {batch}, {sizes[stage]} "
                             f"(as when the run began) and {run.world}; the number of ranks must divide "
                             f"{batch // sizes[stage]}")
    run.micro_batch_size.update(sizes)


def fix_config(run: RunContext, cfg: Config) -> RunContext:
    """
    Write the resolved config and the command line -> the run with this config, which does not change any more.

    A run that goes on keeps its config.json: pin_config has compared the settings it was given.
    """
    run = replace(run, cfg=cfg)
    path = os.path.join(run.folder, "config.json")
    if run.rank == 0 and cfg.stage not in ("teacher", "text"):
        if not (list_training_states(run.folder) and os.path.isfile(path)):
            if os.path.isdir(cache := os.path.join(run.folder, "target_cache")):
                shutil.rmtree(cache)            # targets cached for another config must not be read
            write_json(path, asdict(cfg))
    if run.rank == 0:
        atomic_write_text(os.path.join(own_folder(run), "command.txt"), shlex.join(sys.argv) + "\n")
    return run


def is_finished(run: RunContext) -> bool:
    """Return, on all ranks, whether an earlier process has finished the run: all its stages and its scoring."""
    if not run.cfg.resume or run.cfg.stage in ("teacher", "text"):
        return False
    return run.call_on_rank0(lambda: is_trained(run.folder) and bool(read_run_state(run.folder).get("finished")))


def is_trained(folder: str) -> bool:
    """Return whether a stage has written its model, which it does when it ends."""
    return os.path.isfile(os.path.join(folder, "model.safetensors"))


def own_folder(run: RunContext) -> str:
    """The folder that the run has locked: out/NAME, or out/NAME/teacher or text if it trains only this toy model."""
    return os.path.join(run.folder, run.cfg.stage) if run.cfg.stage in ("teacher", "text") else run.folder


def build_datasets(run: RunContext) -> tuple[ClipDataset, ClipDataset | None]:
    """Build the datasets of videos and of images. Rank 0 reads and decodes first; the others open what it wrote."""
    cfg, offset, datasets = run.cfg.data, 0, []
    corpora = cfg.corpora(), cfg.corpora(images=True)
    annotations = [run.rank0_first(partial(build_mapped_annotations, part, "out", cfg.max_unreadable))
                   for part in corpora if part]
    require_unchanged(run, "annotations", [part.digest for part in annotations], f"{cfg.train_file} or another corpus")
    for part, view in zip(annotations, (cfg, replace(cfg, num_frames=1, max_seconds=0, image_corpora=())),
                          strict=False):
        datasets.append(run.rank0_first(partial(ClipDataset, part, view, run.cfg.seed, index_offset=offset)))
        offset += len(part)
    return datasets[0], datasets[1] if cfg.image_corpora else None


def require_unchanged(run: RunContext, name: str, digest, files: str):
    """Raise a ValueError on all ranks if the content of files that the run began with, by its digest, has changed."""
    folder = own_folder(run)
    if digest != pin_to_first_run(folder, run, name, digest):
        raise ValueError(f"{folder}/run_state.json: the {name} must be as when the run began; {files} has changed")


def hash_rows(rows: list[Annotation]) -> str:
    """Hash the texts of annotations, and which videos they are of."""
    return hash_json([row.to_json() for row in rows])


def pretrain(run: RunContext) -> nn.Module:
    """Train the toy models that are needed, then the student: masked pretraining and the unmasked stage."""
    cfg = run.cfg
    required = ((cfg.teacher, "a SigLIP"), (cfg.text_encoder, "a BERT"), (cfg.init_from, "a student"))
    teacher_folder, text_folder, init_from = (
        resolve_checkpoint(folder, what) if folder else "" for folder, what in required)
    if cfg.data.train_file == DataConfig.train_file:
        run.rank0_first(lambda: os.path.exists(cfg.data.train_file)
                        or write_sprites(os.path.dirname(cfg.data.train_file)))
    validation = Validation(run) if cfg.data.val_file and cfg.stage == "all" else None
    videos, images = build_datasets(run)
    dataset = lambda batch: MixedDataset(videos, images, batch) if images else videos
    captions = (caption for part in (videos, images) if part for row in part.annotations for caption in row.captions)
    tokenizer = resolve_tokenizer(run, captions, text_folder)
    require_unchanged(run, "tokenizer", hash_json(tokenizer.to_str()), "the vocabulary")
    resolved = resolve_config(run, tokenizer, teacher_folder, init_from)
    check_positions(resolved)
    run = fix_config(run, resolved)

    if run.cfg.stage != "text":
        if not cfg.teacher:
            train_toy_teacher(run, dataset, tokenizer)
        teacher = load_teacher(teacher_folder or run.cfg.teacher, run.device, cfg.teacher_fp8)
        if cfg.stage == "teacher":
            print0(f"{run.cfg.teacher}: the toy teacher is trained")
            return teacher
    needs_bert = cfg.model.reads_texts or cfg.stage == "text"
    if needs_bert and not cfg.text_encoder:
        text_folder = train_toy_text_encoder(run, dataset, tokenizer)
    torch.manual_seed(cfg.seed)
    bert = Bert.from_pretrained(text_folder, **asdict(bert_config(run.cfg.text, cfg.vit.width))) if needs_bert else None
    if cfg.stage == "text":
        print0(f"{text_folder}: the toy text encoder is trained")
        return bert
    if bert and any(key.startswith("cls.") for key in bert.missing_keys):
        print0(f"{text_folder} has no masked-language-model head: a random one is trained")
    return train_student(run, teacher, bert, dataset, tokenizer, init_from, validation)


def resolve_config(run: RunContext, tokenizer, teacher_folder: str, init_from: str = "") -> Config:
    """
    Fill in what depends on files: vocabulary, special ids, teacher, widths and grids -> the config. teacher_folder and
    init_from: the local folders of cfg.teacher and cfg.init_from, empty if there is none.
    """
    cfg = run.cfg
    width = cfg.toy.width
    if teacher_folder:
        path = os.path.join(teacher_folder, "config.json")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{teacher_folder} is not a folder of a SigLIP: it has no config.json")
        width = read_tower_config(VisionConfig, read_json(path), "vision_config", path).hidden_size
    vocab_size = tokenizer.get_vocab_size()
    if cfg.text.vocab_size not in (0, vocab_size):      # an id that no word has would be drawn as a random word
        raise ValueError(f"text.vocab_size must be {vocab_size}, as in the tokenizer, or 0, got {cfg.text.vocab_size}")
    return replace(
        cfg, teacher=cfg.teacher or os.path.join(run.folder, "teacher"),
        text=replace(cfg.text, vocab_size=vocab_size,
                     mask_token_id=cfg.text.mask_token_id or tokenizer.token_to_id("[MASK]")),
        vit=replace(cfg.vit, grid=cfg.vit.grid or position_grid(cfg, init_from)),
        model=replace(cfg.model, target_dim=cfg.model.target_dim or width,
                      decoder_queries=cfg.model.decoder_queries or query_count(cfg)))


def train_toy_teacher(run: RunContext, dataset: Callable, tokenizer):
    """Train a small SigLIP on single frames into out/NAME/teacher, unless it is there already."""
    cfg, folder = run.cfg, run.cfg.teacher
    if is_trained(folder):
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
    if is_trained(folder):
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


def train_student(run: RunContext, teacher: SigLIP, bert: Bert | None, dataset: Callable, tokenizer,
                  init_from: str, validation: "Validation | None") -> nn.Module:
    """Masked pretraining, then the unmasked stage -> the trained student. bert: None if no loss reads texts."""
    cfg, out = run.cfg, run.folder
    model = ClusterSTM(cfg.vit, cfg.text, cfg.model, bert, with_bert=bert is not None)
    extra = {} if bert else {"new": NOT_OF_VISION}          # parts that a run from this model begins
    if init_from:
        model.init_from(init_from)
    model = wrap_layers(model.to(run.device).train(), cfg)
    has_targets = cfg.hides_tokens or cfg.model.objective == "visible"
    masked_losses = cfg.model.losses - (set() if has_targets else {"mrm"})
    masked_losses |= {"distill"} if cfg.model.distill != "none" else set()
    before_unmasked = os.path.join(out, "before_unmasked")
    at_step = lambda steps: validation.at_step(model, tokenizer, steps) if validation else {}
    is_pretrained = cfg.resume and is_trained(before_unmasked)
    newest = latest_checkpoint(run) if cfg.resume and not is_pretrained else ""
    if is_pretrained:
        load_state_dict_strict(model, read_checkpoint(before_unmasked, "a trained model")[1], before_unmasked)
    elif os.path.basename(newest).startswith("unmasked-"):
        print0(f"{before_unmasked} was deleted and is not written again; the unmasked stage goes on from {newest}")
    else:
        provider = TargetProvider(run, wrap_layers(teacher, cfg), dataset(cfg.batch), model.vit.embed_patches)
        train_stage(run, Stage(
            "pretrain", model, dataset(cfg.batch), tokenizer, cfg.batch, cfg.steps, cfg.lr,
            lambda batches: attach_batch_stats(model, batches, provider(batches)), loss_weights(cfg.model),
            frozen=unused_parameters(cfg, masked_losses), at_step=at_step(cfg.steps),
            before_checkpoint=provider.flush_all_ranks))
        provider.delete()
        save_model(run, model, tokenizer, before_unmasked, **extra)
    if cfg.unmasked_steps:
        batch = cfg.unmasked_batch or cfg.batch
        train_stage(run, Stage(
            "unmasked", model, dataset(batch), tokenizer, batch, cfg.unmasked_steps, cfg.lr * cfg.unmasked_lr_scale,
            lambda batches: attach_batch_stats(model, batches, [None] * len(batches)), loss_weights(cfg.model),
            frozen=unused_parameters(cfg, cfg.model.losses - {"mrm"}), at_step=at_step(cfg.unmasked_steps)))
    save_model(run, model, tokenizer, out, **extra)
    print0(f"{out}: trained. Next: {next_command(cfg, out)}")
    return model


class Validation:
    """
    Score the student during its training on the held-out videos of data.val_file: R@1, R@5 and R@10 in per cent, by the
    similarity of all tokens, without re-ranking, as eval.py does.

    The first MAX_VIDEOS videos of the file and their captions are ranked, so that the time is bounded. Videos that
    cannot be read are left out, and listed in bad_media.jsonl.
    """
    MAX_VIDEOS = 1000

    def __init__(self, run: RunContext):
        cfg, self.run, self.task, missing = run.cfg, run, get_task("sprites"), []       # a task of retrieval
        rows = read_rows(self.task, cfg.data.val_file, cfg.data.val_root or cfg.data.video_root, train=False,
                         missing=missing)
        videos = list(dict.fromkeys(row.media_id for row in rows))
        if len(videos) > self.MAX_VIDEOS:
            print0(f"{cfg.data.val_file}: the first {self.MAX_VIDEOS} of its {len(videos)} videos are scored")
        chosen = {*videos[:self.MAX_VIDEOS]}
        self.annotations = [row for row in rows if row.media_id in chosen]
        self.missing = [(row.video, f"{row.source}: no such file") for row in missing]
        self.protocol = evaluation.Protocol(cfg.text.max_length, workers=cfg.data.num_workers, skip_unreadable=True)

    def at_step(self, model: ClusterSTM, tokenizer, steps: int) -> dict[int, Callable]:
        """Return Stage.at_step of a stage of so many steps: every cfg.val_every steps, and after the last."""
        every = self.run.cfg.val_every or max(1, steps)
        return {step: partial(self, model, tokenizer) for step in (*range(every, steps, every), steps) if step}

    def __call__(self, model: ClusterSTM, tokenizer) -> dict[str, float]:
        """Return the recalls as they are logged, and the number of videos that were left out, if any."""
        data = self.run.cfg.data
        try:
            scores = evaluation.evaluate(model.eval(), self.task, self.annotations, data, tokenizer,
                                         self.protocol)["scores"]["similarity"]
        except ValueError as error:
            raise ValueError(f"{data.val_file} could not be scored: {error}") from None
        model.train()
        unreadable = dict(self.missing + self.protocol.unreadable)
        if unreadable and self.run.rank == 0:
            BadMediaLog(self.run.folder).add([
                {"where": data.val_file, "video": video, "reason": reason} for video, reason in unreadable.items()])
        return {f"val_{way}_{name}": scores[way][name] for way in ("T2V", "V2T") for name in ("R@1", "R@5", "R@10")} \
            | ({"val_unreadable": len(unreadable)} if unreadable else {})


def wrap_layers(model: nn.Module, cfg: Config, shapes_vary: bool = False) -> nn.Module:
    """
    Compile the model's layers, or recompute them in the backward pass, if cfg says so -> the model itself.

    Shapes are fixed in pretraining, unless grids or budgets vary. They vary in fine-tuning: the last batch of a split
    is smaller, and the number of clips whose visible ids are not cached yet changes. Where they vary, a layer is
    compiled for all shapes when it meets a second one, so that ranks do not stop at each grid to compile.
    """
    compiled = partial(torch.compile, fullgraph=True, dynamic=None if shapes_vary or cfg.shapes_vary else False,
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


def attach_batch_stats(model: ClusterSTM, batches: list[Batch], targets: list[TeacherTargets | None]) -> list[tuple]:
    """
    Return the arguments of the model for each micro-batch: (batch, targets, statistics of the global batch). If the
    targets have several budgets, those of all micro-batches at the largest budget come first, then at the next.
    """
    by_budget = [*zip(*(x.at_budgets() if x else [x] for x in targets), strict=True)]
    features, arguments = [[] for _ in batches], []             # of each micro-batch, at the budgets so far
    for i, of_budget in enumerate(by_budget):
        stats = model.batch_stats(batches, list(of_budget), i, len(by_budget))
        for part, larger in zip(stats, features, strict=True):
            part.larger = larger if model.cfg.distill != "none" and len(by_budget) > 1 else None
        arguments += zip(batches, of_budget, stats, strict=True)
    return arguments


def save_model(run: RunContext, model: nn.Module, tokenizer, folder: str, **extra):
    """Write a folder that load_model and eval.py read. Weights come last: if they are there, the folder is complete."""
    if run.rank == 0:
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(folder, "config.json"), asdict(run.cfg) | extra)
        atomic_write_text(os.path.join(folder, "tokenizer.json"), tokenizer.to_str(pretty=True))
        save_weights(model, folder)
    run.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning

def finetune_name(task: str, init_from: str) -> str:
    """Name a run that fine-tunes for a task: out/sprites and sprites-qa -> sprites-sprites-qa."""
    return f"{os.path.basename(os.path.normpath(init_from))}-{task}"


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
    if "bert." in trained.get("new", ()):
        raise ValueError(f"{init_from} must have a text encoder for stage finetune, got one trained without losses of "
                         f"texts; train.py --init-from {init_from} adds one")
    teacher = evaluation.find_teacher(folder, trained["teacher"]) if trained.get("teacher") else ""
    return Config(
        name=finetune_name(name, init_from), stage="finetune", task=name,
        init_from=init_from, teacher=teacher, batch=task.batch, epochs=recipe.epochs, lr=recipe.lr,
        warmup_frac=recipe.warmup / recipe.epochs, max_grad_norm=0, finetune_masked=task.finetune_masked,
        data=replace(data, num_frames=task.num_frames, max_seconds=task.seconds, hflip=task.flip and data.hflip,
                     image_size=trained.get("data", {}).get("image_size", data.image_size)),
        mask=config_from_dict(MaskConfig, trained.get("mask", {}), path),
        vit=replace(vit, drop_path=recipe.drop_path),
        text=replace(config_from_dict(TextEncoderConfig, trained["text"], path), max_length=task.max_text_length),
        model=replace(config_from_dict(ModelConfig, trained["model"], path), mrm_weight=0, mlm_weight=0,
                      vtc_weight=ModelConfig.vtc_weight, vtm_weight=ModelConfig.vtm_weight, distill="none"),
    )


def finetune(run: RunContext) -> nn.Module:
    """Fine-tune for a task, choose an epoch, score it on the test split."""
    cfg, task = run.cfg, get_task(run.cfg.task)
    if not cfg.init_from:
        raise ValueError("init_from must be the folder of a pretrained model for --stage finetune, got ''")
    if task.kind in ("qa", "caption") and cfg.model.mlm_weight:
        raise ValueError(f"model.mlm_weight must be 0 for {cfg.task}, whose loss is of the answers, got "
                         f"{cfg.model.mlm_weight:g}")
    if cfg.finetune_masked:
        cfg.check_grids()
    check_positions(cfg)
    if task.kind not in ("qa", "caption") and not cfg.model.losses - {"mrm"}:
        raise ValueError(f"model.vtc_weight or model.vtm_weight must be above 0 for {cfg.task}, got 0")
    if task.default_root and not cfg.data_root:
        run.rank0_first(lambda: os.path.exists(task.default_root) or write_sprites(task.default_root))
    train_file, video_root = split_files(task, "train", cfg.data_root)
    data = replace(cfg.data, train_file=train_file, video_root=video_root)
    annotations = read_rows(task, train_file, video_root, train=True)
    require_unchanged(run, "annotations", hash_rows(annotations), train_file)
    dataset = run.rank0_first(lambda: ClipDataset(annotations, data, cfg.seed))
    epoch_steps = len(dataset) / cfg.batch
    steps = max(1, round(cfg.epochs * epoch_steps)) if cfg.epochs else cfg.steps
    epochs = {max(1, round(epoch * epoch_steps)): epoch for epoch in range(1, math.ceil(cfg.epochs) + 1)}
    epochs = {step: epoch for step, epoch in epochs.items() if step < steps} | {steps: math.ceil(cfg.epochs) or 1}
    select_split = cfg.select_split or ("val" if task.val_file else "last")
    run = fix_config(run, replace(cfg, steps=steps, select_split=select_split, data=data))

    tokenizer = load_tokenizer(resolve_checkpoint(cfg.init_from, "a student"))
    require_unchanged(run, "tokenizer", hash_json(tokenizer.to_str()), "the vocabulary")
    model = build_finetuned(run, task)
    visible_ids = VisibleIdCache(run, model.vit, partial(wrap_layers, cfg=run.cfg, shapes_vary=True)) \
        if cfg.finetune_masked else lambda batch: None

    def make_inputs(batches: list[Batch]) -> list[tuple]:
        targets = [visible_ids(batch) for batch in batches]
        if isinstance(model, ClusterSTM):
            return attach_batch_stats(model, batches, targets)
        return list(zip(batches, targets, strict=True))

    selector = EpochSelector(run, tokenizer, epochs, visible_ids)
    train_stage(run, Stage(
        "finetune", model, dataset, tokenizer, cfg.batch, steps, cfg.lr, make_inputs, loss_weights(cfg.model),
        frozen=unused_parameters(cfg, cfg.model.losses - {"mrm"}) if task.kind not in ("qa", "caption") else (
            r"^decoder\.", r"^bert\.cls\."),
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
            self.history = read_json(self.path).get("epochs")
            require(isinstance(self.history, list) and all({"step", "epoch", "score", "metric"} == row.keys()
                                                           for row in self.history), self.path, "epochs",
                    "a list of step, epoch, score and metric", self.history)
            if not is_trained(run.folder) and cfg.select_split != "last":
                print0(f"{run.folder}/model.safetensors, the best epoch's, was deleted: only later epochs can be kept")
                self.history = []
        if cfg.select_split == "last":
            return
        file, root = split_files(task, cfg.select_split, cfg.data_root)
        self.annotations = read_rows(task, file, root, train=False)
        require_unchanged(run, f"annotations of {cfg.select_split}", hash_rows(self.annotations), file)
        self.protocol = evaluation.Protocol(
            max_text_length=task.max_text_length, max_answer_length=task.max_answer_length,
            rerank_topk=task.rerank_topk, workers=cfg.data.num_workers, cider_only=True)
        if cfg.finetune_masked:                 # clips of another split must not share ids with the training clips
            self.protocol.visible_fn = lambda batch: visible_ids(replace(batch, clip_ids=-1 - batch.clip_ids))
        if task.kind == "qa":
            file = find_file(task.answer_list, resolve_data_root(task, cfg.data_root))
            self.protocol.answers = read_answers(file)
            require_unchanged(run, "answers", hash_json(self.protocol.answers), file)

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
        metric, score = selection_metric(self.task.kind, result["scores"])
        self.history.append({"step": step, "epoch": self.epochs[step], "score": score, "metric": metric})
        if run.rank == 0:
            tqdm.write(f"epoch {self.epochs[step]}, {cfg.select_split}: {metric} {score:.1f}")
        if self.best()["step"] == step:
            save_model(run, model, self.tokenizer, run.folder, chosen=self.summary())
        if run.rank == 0:
            write_json(self.path, {"epochs": self.history})             # last: it says that this epoch is done


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def split_defaults(args: list[str]) -> tuple[Config, list[str], str]:
    """
    Return the config that the command line changes, the remaining arguments, and the preset's name.

    With --resume and without a preset, the config is that of the run in out/NAME, if there is one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for *flags, default in (("--stage", ""), ("--task", "sprites"), ("--init-from", "--init_from", "out/sprites"),
                            ("--name", "")):
        parser.add_argument(*flags, default=default, nargs="?")
    parser.add_argument("--data.train-file", "--data.train_file", dest="train_file", default=DataConfig.train_file)
    parser.add_argument("--resume", action="store_true")
    first = parser.parse_known_args(args)[0]
    preset, is_finetuning = args[0] if args and args[0] in PRESETS else "", first.stage == "finetune"
    if is_finetuning and preset:
        raise ValueError(f"a preset must not be given for --stage finetune, which takes its settings from --task and "
                         f"--init-from, got {preset!r}")
    if first.resume and not preset:
        name = finetune_name(first.task or "", first.init_from or "") if is_finetuning else name_run(first.train_file)
        folder = os.path.join("out", first.name or name)
        if settings := read_settings(folder, first.stage):
            if first.stage and is_finetuning != (settings.stage == "finetune"):
                raise ValueError(f"{folder}: stage must be {settings.stage!r} as when the run began, got "
                                 f"{first.stage!r}")
            return settings, args, ""
        require_settings(folder)
        if not is_finetuning and first.train_file == DataConfig.train_file:
            raise ValueError(f"{folder} has no run to resume; `python train.py sprites --resume` begins one on the "
                             "embedded set if there is none")
    if is_finetuning:
        return finetune_defaults(first.task or "", first.init_from or ""), args, ""
    return PRESETS[preset or "sprites"], args[1:] if preset else args, preset


def cli():
    """Parse the command line and train."""
    default, args, preset = split_defaults(sys.argv[1:])
    main(tyro.cli(Config, args=args, default=default, prog=f"python train.py {preset or '[sprites|base|large]'}"))


if __name__ == "__main__":
    run_cli("train.py", cli)
