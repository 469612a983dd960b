"""
Ablations: students trained with many settings, side by side: named variants x seeds -> docs/ablations.csv -> tables.

    python -m tools.ablations train                                  # all tables, three seeds, all cores or GPUs
    python -m tools.ablations train --tables masks pick --seeds 0    # a part; rows that the file has are not run again
    python -m tools.ablations train --full                           # larger students on more clips, for a GPU
    python -m tools.ablations table                                  # print the tables from the file
    python -m tools.ablations tokens --checkpoint out/sprites        # one student at any grid and budget: token_budgets

A variant is a set of changes to the training config, under the names of train.py's flags, or to the captions
(SHUFFLED_CAPTIONS). A seed determines the clips (the set "crowd" of tools.sprites), the teacher, the text encoder and
the student. Teacher outputs of a clip's view do not depend on the student: they are computed once per seed, masks once
per mask, and all students read them from out/ablations. Random masks are drawn again for each epoch, as in a run of
train.py. A masked stage is stored, for variants that differ only after it. A student has one thread, or one GPU.

A student is scored on 512 held-out clips that share no caption with any other clip. Scores are R@1 in per cent, the
mean of T2V and V2T (chance 0.2). The columns:

own         the tokens of the student's own mask, after the masked stage
random      as many random tokens of each frame, after the masked stage
before      all tokens, before the unmasked stage
after       all tokens, after it
seen at     as own, at four points of the masked stage, on 512 clips for validation: they are drawn as the training
            clips are, and no student is trained on them; settings are chosen on these scores
loss        reconstruction loss at the end of the masked stage
qa          questions answered correctly, per cent, overall and by question type
qa seen     the same on the validation clips, whose pairs of shape and colour occur in training
"""

import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Annotated

import numpy as np
import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import runtime
import train
from annotations import read_annotations
from config import Config
from data import ClipDataset, DataConfig
from encoders import Bert, TextEncoderConfig, ViTConfig, bert_config
from files import atomic_write, atomic_write_text, load_state_dict_strict, read_checkpoint, read_json, save_weights
from loop import Stage, train_stage
from masking import MaskConfig, keep_count, log_attention, token_sizes
from model import ClusterSTM, ModelConfig, VideoToText
from runtime import RunContext, num_cpus
from targets import TeacherTargets
from tasks import find_file, get_task, read_answers, read_rows, split_files
from teacher import SigLIP
from tokenizer import load_tokenizer
from tools.show import read_log
from tools.sprites import VERSION, write_sprites
from tools.tables import append_csv, config_diff, current_commit, digest, format_mean, print_header, print_row, read_csv
from tools.token_budgets import TokensCommand, compare_budgets

NUM_TEST, NUM_VAL = 512, 512    # held-out clips; clips drawn as the training clips are, on which settings are chosen
CURVE_POINTS = 4                # points of the learning curve
CHUNK = 64                      # clips per call of the teacher or of a mask

# The embedded run, made smaller still: a quarter of its work.
REDUCED = Config(
    steps=200, unmasked_steps=40, unmasked_batch=16, unmasked_lr_scale=0.1, lr=2e-3, log_every=20, save_every=10 ** 9,
    keep_checkpoints=1, data=DataConfig(num_frames=8, image_size=64), mask=MaskConfig(quantile=0.95),
    vit=ViTConfig(patch_size=8, width=64, depth=3, heads=2, drop_path=0.0, pos_embed="3d"),
    text=TextEncoderConfig(width=64, depth=2, heads=2, fusion_layers=1, dropout=0.0, max_length=34),
    model=ModelConfig(embed_dim=64, decoder_width=64, decoder_depth=1, decoder_heads=2, decoder_query_ratio=0.125),
)
# For a GPU: four times the clips, a wider and deeper student, twelve times the steps.
FULL = replace(
    REDUCED, steps=2400, unmasked_steps=240, batch=256, unmasked_batch=128, lr=1e-3,
    vit=replace(REDUCED.vit, width=192, depth=6, heads=6),
    text=replace(REDUCED.text, width=192, depth=4, heads=6, fusion_layers=2),
    model=replace(REDUCED.model, embed_dim=192, decoder_width=192, decoder_heads=6, decoder_query_ratio=0.25),
)
WARM_START = {"batch": 64, "steps": 600, "lr": 2e-3}        # the training that all students of a seed start from
QA_SETTINGS = {"steps": 2400, "batch": 16, "lr": 5e-4}      # fine-tuning for question answering
# Digests name the settings that differ from these: the defaults of the first rows of docs/ablations.csv. A default that
# changes is set back here, or a row's digest would become that of another student.
BASELINE = asdict(Config(mask=MaskConfig(quantile=0.02)))
CLIPS = {False: 4096, True: 16384}      # by --full: clips in the training file, NUM_VAL of them for validation
# A variant may change this beside the config: the share of the training clips that get the caption of another clip, as
# captions from the web often do not describe the video. Teacher, text encoder and warm start read the right captions.
SHUFFLED_CAPTIONS = "shuffled captions"


@dataclass
class Table:
    """A table of variants: row title -> changes. The other rows are compared with the first."""
    about: str
    rows: dict[str, dict]
    task: str = "retrieval"             # or qa: the masked student, fine-tuned for question answering on its own tokens


def mask_change(name: str) -> dict:
    return {"mask.name": name} if name != "cluster_stm" else {}


def with_and_without_sizes(*names: str, **changes) -> dict[str, dict]:
    """Return two rows for each mask: a visible token counts as one token, or as all the tokens that it represents."""
    return {f"{name}{', proportional' * sizes}": {**mask_change(name),
                                                  **({"model.proportional": True} if sizes else {}), **changes}
            for name in names for sizes in (False, True)}


def with_factors(name: str, factors: dict[str, float]) -> dict[str, dict]:
    """Return rows that multiply the number `name`, for ClusterSTM and for random_frame; the unchanged row is first."""
    return {"as they are": {}} | {
        f"{title}{suffix}": {**({f"{name} *": factor} if factor != 1 else {}), **change}
        for suffix, change in (("", {}), (", random", mask_change("random_frame")))
        for title, factor in factors.items()}


FRAME_MASKS = ("random_frame", "tube", "umt", "attention_high", "kmeans", "farthest_points", "dpcknn_centres",
               "fastvid_style")
TARGETS = {
    "relevance (MRM)": {}, "none": {"model.mrm_weight": 0.0}, "features (G = I)": {"model.mrm_texts": "none"},
    "visible tokens (UMT)": {"model.objective": "visible"}, "pixels (MAE)": {"model.objective": "pixels"},
}
LONGER = {title: {**changes, "steps *": 3} for title, changes in TARGETS.items() if title != "pixels (MAE)"}
PICKS = {"density": {}, **{pick: {"mask.pick": pick} for pick in ("random", "centre", "lowest")}}
TABLES = {
    "masks": Table("masks, each keeping 6 of 64 tokens of every frame",
                   {"cluster_stm": {}, **{name: mask_change(name) for name in FRAME_MASKS}}),
    "pick": Table("which token of a cluster is kept", PICKS),
    "pick, fewer": Table("the same, 3 of 64 tokens",
                         {title: {"mask.ratio": 0.95, **changes} for title, changes in PICKS.items()}),
    "targets": Table("what is reconstructed, beside VTC, VTM and MLM", TARGETS),
    "ratio": Table("share of the tokens hidden", {"0.9": {}} | {
        title: {"mask.ratio": ratio, "mask.name": name}
        for name, suffix in (("cluster_stm", ""), ("random_frame", ", random"))
        for ratio in (0.75, 0.85, 0.9, 0.95) if (title := f"{ratio:g}{suffix}") != "0.9"}
        | {"0, all tokens": {"mask.ratio": 0.0, "mask.name": "random_frame"}}),
    "bandwidth": Table("d_c of the clusters as a quantile of a frame's distances; of recurrence across frames",
                       {"0.95, 0.1": {}} | {f"{q:g}, 0.1": {"mask.quantile": q} for q in (0.02, 0.9, 0.98)}
                       | {f"0.95, {q:g}": {"mask.quantile_time": q} for q in (0.02, 0.5)}),
    "targets, longer": Table("the same, three times the masked steps", LONGER),
    "targets, mispaired": Table("the same, and half of the training clips have another's caption",
                                {title: {**changes, SHUFFLED_CAPTIONS: 0.5} for title, changes in LONGER.items()}),
    "pooling": Table("how the teacher pools a token's neighbourhood for the target",
                     {title: {"target_pooling": pooling} if pooling else {} for title, pooling in (
                         ("3 x 3, its head", ""), ("3 x 3, mean", "mean"), ("the token alone", "token"))}),
    "text": Table("texts to which relevance is reconstructed",
                  {"of the batch": {}, "the clip's own": {"model.mrm_texts": "own"}}),
    "decoder": Table("decoder of the reconstruction, blocks, share of the hidden tokens predicted", {
        "cross, 1, 0.125": {}, "cross, 2, 0.125": {"model.decoder_depth": 2},
        "cross, 1, 0.5": {"model.decoder_query_ratio": 0.5}, "joint, 1, all": {"model.decoder": "joint"}}),
    "unmasked": Table("steps on all tokens that follow",
                      with_factors("unmasked_steps", {"a quarter": 0.25, "as they are": 1, "four times": 4})),
    "length": Table("masked steps", with_factors("steps", {"half": 0.5, "as they are": 1, "three times": 3})),
    "ours": Table("a kept token counts as the tokens it stands for (model.proportional), or as one",
                  with_and_without_sizes("cluster_stm", "kmeans", "umt", "random_frame")),
    "ours, longer": Table("the same, three times the masked steps",
                          with_and_without_sizes("cluster_stm", "random_frame", **{"steps *": 3})),
    "answers": Table("question answering with the student's own tokens, after three times the masked steps", {
        **LONGER, "random_frame": {**mask_change("random_frame"), "steps *": 3},
        "proportional": {"model.proportional": True, "steps *": 3}, "not pretrained": {"steps": 0}}, "qa"),
}


@dataclass
class ShowCommand:
    """Print tables from the CSV file --out."""
    tables: Annotated[tuple[str, ...], tyro.conf.arg(help=f"tables; empty: all of {', '.join(TABLES)}")] = ()
    full: bool = False                          # larger students, trained with more clips and steps, for a GPU
    out: str = "docs/ablations.csv"             # CSV file with a row for each trained student


@dataclass
class TrainCommand(ShowCommand):
    """Train the variants of some tables with several seeds, add their scores to --out, and print the tables."""
    seeds: tuple[int, ...] = (0, 1, 2)          # seeds of clips, teacher, text encoder and student
    jobs: int = 0                               # students to train at the same time; 0: one for each core, or GPU
    commit: str = ""                            # commit to write into the file; empty: ask git


COMMANDS = {"train": TrainCommand, "table": ShowCommand, "tokens": TokensCommand}
SCORES = ("own", "random", "before", "after")
COLUMNS = ("form", "task", "variant", "seed", "settings",
           *(f"{name} {way}" for name in SCORES for way in ("T2V", "V2T")), "curve", "loss",
           *(f"qa{suffix}" for suffix in ("", " by kind", " seen", " seen by kind")),
           "masked seconds", "seconds", "commit", "device", "torch")


@dataclass(frozen=True)
class Job:
    """One student to train."""
    task: str                                   # retrieval or qa
    variant: str                                # the changes, as JSON
    seed: int
    full: bool

    @classmethod
    def of(cls, table: Table, title: str, seed: int, full: bool) -> "Job":
        """Return the job of a table's row."""
        return cls(table.task, json.dumps(table.rows[title], sort_keys=True), seed, full)

    @property
    def form(self) -> str:
        return "full" if self.full else "reduced"

    @property
    def shared_folder(self) -> str:
        """The folder of what is computed once for all students of a form and seed."""
        cfg = config_diff(asdict(FULL if self.full else REDUCED), BASELINE)
        parts = [cfg.get(part) for part in ("data", "toy", "vit", "text", "model")]
        key = digest(VERSION, CLIPS[self.full], NUM_TEST, NUM_VAL, WARM_START, *parts)
        return os.path.join("out", "ablations", f"{self.form}-seed{self.seed}-{key}")

    @property
    def shuffled_share(self) -> float:
        return json.loads(self.variant).get(SHUFFLED_CAPTIONS, 0)

    def settings(self) -> Config:
        """Return the checked config of the run."""
        folder, cfg = self.shared_folder, FULL if self.full else REDUCED
        cfg = replace(cfg, seed=self.seed, teacher=f"{folder}/teacher", text_encoder=f"{folder}/text", data=replace(
            cfg.data, train_file=f"{folder}/clips/sprites_train.json", video_root=f"{folder}/clips/videos"))
        for name, value in json.loads(self.variant).items():
            if name == SHUFFLED_CAPTIONS:
                continue
            part, _, last = name.rpartition(".")
            owner, is_factor = getattr(cfg, part, None) if part else cfg, last.endswith(" *")
            last = last.removesuffix(" *")                          # "steps *": 3 multiplies the steps by 3
            if not hasattr(owner, last):
                raise ValueError(f"a variant must change fields of the config, got {name!r}")
            owner = replace(owner, **{last: round(getattr(owner, last) * value) if is_factor else value})
            cfg = replace(cfg, **{part: owner}) if part else owner
        return cfg

    def digest(self, **changes) -> str:
        """Return a digest of everything that determines the result, with some fields of the config changed."""
        settings = config_diff(asdict(self.settings()) | changes, BASELINE)
        settings |= {SHUFFLED_CAPTIONS: self.shuffled_share} if self.shuffled_share else {}
        return digest(settings, *([QA_SETTINGS] if self.task == "qa" else []))


# ---------------------------------------------------------------------------------------------------------------------
# What is computed once per seed

@dataclass
class TeacherCache:
    """The teacher outputs of one view of each clip of a split: files in a folder, each computed when first needed."""
    folder: str                     # of the split
    seed: int
    teacher: SigLIP

    def array(self, name: str) -> np.ndarray:
        return np.load(os.path.join(self.folder, f"{name}.npy"), mmap_mode="r")

    def cached_array(self, name: str, compute) -> np.ndarray:
        """Return the array of that name. If there is no file, first compute(slice of clips) for all, and store it."""
        path = os.path.join(self.folder, f"{name}.npy")
        if not os.path.isfile(path):
            starts = range(0, len(self.array("tokens")), CHUNK)
            with atomic_write(path) as f:               # another process may compute it at the same time
                np.save(f, np.concatenate([compute(slice(start, start + CHUNK)).cpu() for start in starts]))
        return self.array(name)

    def tensor(self, x: np.ndarray) -> Tensor:
        """Copy an array to the teacher's device, in fp32."""
        return torch.from_numpy(np.array(x)).to(next(self.teacher.parameters()).device).float()

    @torch.no_grad()
    def token_targets(self, pooling: str) -> np.ndarray:
        """Return the token targets of all clips, (n, T, N, E) fp16."""
        def compute(chunk: slice) -> Tensor:
            x = self.tensor(self.array("tokens")[chunk])                                # (B, T, N, C)
            p = self.teacher.token_embeddings(x.flatten(0, 1), self.teacher.patch_grid, pooling)
            return p.unflatten(0, x.shape[:2]).half()
        return self.cached_array(f"token_targets-{pooling}", compute)

    @torch.no_grad()
    def visible_ids(self, mask: MaskConfig, pooling: str, epoch: int = 0) -> np.ndarray:
        """Return what the mask keeps of each clip, (n, TK) int64; a random mask is drawn for each epoch."""
        needs_targets, epoch = "aligned" in mask.inputs, epoch * mask.stochastic

        def compute(chunk: slice) -> Tensor:
            attention, tokens = self.tensor(self.array("attention")[chunk]), self.array("tokens")[chunk]
            x = self.tensor(tokens[..., :1] if mask.shape_only else tokens)
            aux = {"attention": attention, "logits": log_attention(attention), "grid": self.teacher.patch_grid,
                   "text": self.tensor(self.array("text")[chunk])}
            if needs_targets:
                aux["aligned"] = self.tensor(self.token_targets(pooling)[chunk])
            generator = torch.Generator().manual_seed((self.seed * 1000 + epoch) * 10 ** 6 + chunk.start)
            return mask(x, keep_count(x.shape[2], mask.ratio), generator=generator, **aux)

        key = digest(asdict(mask), *([pooling] if needs_targets else []))
        return self.cached_array(f"visible_ids-{key}-{epoch}", compute)

    @torch.no_grad()
    def token_sizes(self, mask: MaskConfig, pooling: str, epoch: int = 0) -> np.ndarray:
        """Return how many tokens each visible token represents, (n, TK)."""
        def compute(chunk: slice) -> Tensor:
            ids = self.tensor(self.visible_ids(mask, pooling, epoch)[chunk]).long()
            return token_sizes(self.tensor(self.array("tokens")[chunk]), ids).short()
        return self.cached_array(f"token_sizes-{digest(asdict(mask), pooling)}-{epoch * mask.stochastic}", compute)


def split_clips(cfg: Config, split: str) -> ClipDataset:
    """Return the clips to train on ("train"), to choose settings on ("val") or to score on ("test")."""
    path = cfg.data.train_file if split != "test" else cfg.data.train_file.replace("_train", "_test")
    rows = read_annotations(path, cfg.data.video_root)
    rows = {"train": rows[:-NUM_VAL], "val": rows[-NUM_VAL:], "test": rows}[split]
    return ClipDataset(rows, cfg.data, cfg.seed, train=split == "train")


def shuffled_captions(n: int, share: float, seed: int) -> np.ndarray:
    """Return for each of n clips the index of the clip whose caption it gets: another clip for that share of them."""
    order, rng = np.arange(n), np.random.default_rng((seed, 9))
    chosen = rng.permutation(n)[:round(share * n)]
    order[chosen] = np.roll(chosen, 1)
    return order


@torch.no_grad()
def prepare_seed(job: Job, threads: int):
    """Make what all students of a seed share: clips, teacher, text encoder, teacher outputs and the warm start."""
    torch.set_num_threads(threads)
    cfg, folder = job.settings(), job.shared_folder
    if not os.path.isdir(f"{folder}/clips"):
        write_sprites(f"{folder}/clips", job.seed, CLIPS[job.full], NUM_TEST, 512, "crowd")
    name = os.path.relpath(folder, "out")
    for stage, path in (("teacher", cfg.teacher), ("text", cfg.text_encoder)):
        if not os.path.isfile(f"{path}/model.safetensors"):
            with torch.enable_grad():
                train.main(replace(cfg, name=name, stage=stage, teacher="", text_encoder="", resume=True))
    teacher = SigLIP.from_pretrained(cfg.teacher).to("cuda" if torch.cuda.is_available() else "cpu")
    for split in ("train", "val", "test"):
        path = f"{folder}/teacher_outputs/{split}"
        if not os.path.isdir(path):
            save_teacher_outputs(teacher, split_clips(cfg, split), path, f"seed {job.seed}, {split}")
        cache = TeacherCache(path, job.seed, teacher)
        cache.visible_ids(cfg.mask, cfg.target_pooling)             # all students need these
        if split == "train":
            cache.token_targets(cfg.target_pooling)
    if not os.path.isfile(f"{folder}/warm_start/model.safetensors"):
        with torch.enable_grad():
            warm_start(job)


def save_teacher_outputs(teacher: SigLIP, dataset: ClipDataset, path: str, label: str):
    """Apply the teacher to one view of each clip; write tokens (fp16), attention and text embeddings as .npy files."""
    device, outputs = next(teacher.parameters()).device, defaultdict(list)
    for start in tqdm(range(0, len(dataset), CHUNK), label, disable=None):
        indices = range(start, min(start + CHUNK, len(dataset)))
        samples = [dataset.training_sample(i, 0) if dataset.train else dataset[i] for i in indices]
        video = torch.stack([s.video for s in samples]).to(device)
        x = teacher.forward_features(teacher.normalize(video.flatten(0, 1)))            # (F, N, C)
        outputs["tokens"].append(x.unflatten(0, video.shape[:2]).half())
        outputs["attention"].append(teacher.pool_attention(x).unflatten(0, video.shape[:2]))
        outputs["text"].append(teacher.encode_text(teacher.tokenize([s.caption for s in samples])))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temp = tempfile.mkdtemp(dir=os.path.dirname(path))
    for name, chunks in outputs.items():
        np.save(f"{temp}/{name}.npy", torch.cat(chunks).cpu().numpy())
    os.rename(temp, path)


def warm_start(job: Job):
    """
    Train the weights that all students of a seed start from, except for the decoder, as UMT's stage 2 starts from its
    stage 1: on single frames, all tokens, with UMT's alignment to the teacher beside VTC, VTM and MLM.
    """
    cfg, folder = job.settings(), f"{job.shared_folder}/warm_start"
    cfg = replace(cfg, name=os.path.relpath(folder, "out"), model=replace(cfg.model, objective="visible"), **WARM_START)
    shutil.rmtree(folder, ignore_errors=True)                   # of a run that was stopped
    run = train.setup(cfg)
    try:
        student = StudentRun(job, run, load_start=False)

        def single_frames(batches: list) -> list[tuple]:
            frames, targets = [], []
            for b in batches:
                t = int(np.random.default_rng((cfg.seed, b.first_sample)).integers(cfg.data.num_frames))
                token_targets, text_embeds = student.token_and_text_targets(b)          # (B, T, N, E), (B, E)
                all_ids = torch.arange(token_targets.shape[2], device=run.device).expand(len(b.video), -1)
                frames.append(replace(b, video=b.video[:, t:t + 1]))
                targets.append(TeacherTargets(all_ids, token_targets[:, t:t + 1], text_embeds))
            return train.attach_batch_stats(student.model, frames, targets)

        student.fit("pretrain", cfg.steps, cfg.batch, cfg.lr, single_frames)
        save_weights(student.model, run.folder)
    finally:
        run.close()


# ---------------------------------------------------------------------------------------------------------------------
# A student

class StudentRun:
    """One variant and seed: its model, the inputs of its training steps, and its scores."""

    def __init__(self, job: Job, run: RunContext, load_start: bool = True):
        """With load_start the model starts from the warm start; the decoder always has new weights."""
        self.job, cfg = job, run.cfg
        self.steps = job.settings().steps                           # 0 for a student without pretraining
        teacher = SigLIP.from_pretrained(cfg.teacher).to(run.device)
        self.caches = {split: TeacherCache(f"{job.shared_folder}/teacher_outputs/{split}", cfg.seed, teacher)
                       for split in ("train", "val", "test")}
        self.datasets = {split: split_clips(cfg, split) for split in ("train", "val", "test")}
        rows = self.datasets["train"].annotations
        self.caption_index = shuffled_captions(len(rows), job.shuffled_share, cfg.seed)     # whose caption a clip has
        self.datasets["train"].annotations = [
            replace(row, captions=rows[i].captions, frame_caption=rows[i].frame_caption)
            for row, i in zip(rows, self.caption_index, strict=True)]
        self.tokenizer = load_tokenizer(cfg.text_encoder)
        self.cfg = cfg = train.resolve_config(run, self.tokenizer, run.cfg.teacher)
        self.run = replace(run, cfg=cfg)
        torch.manual_seed(cfg.seed)
        bert = Bert.from_pretrained(cfg.text_encoder, **asdict(bert_config(cfg.text, cfg.vit.width)))
        self.model = ClusterSTM(cfg.vit, cfg.text, cfg.model, bert)
        if load_start:
            path = f"{job.shared_folder}/warm_start/model.safetensors"
            weights = {k: x for k, x in load_file(path).items() if not k.startswith("decoder.")}
            weights |= {k: x for k, x in self.model.state_dict().items() if k.startswith("decoder.")}
            load_state_dict_strict(self.model, weights, path)
        self.model.to(run.device).train()

    def visible_fn(self, split: str, mask: MaskConfig, epoch: int = 0):
        """Return a function: batch of the split -> TeacherTargets with what the mask keeps of its clips."""
        cache, pooling = self.caches[split], self.cfg.target_pooling
        arrays = [cache.visible_ids(mask, pooling, epoch)]
        if self.cfg.model.proportional:
            arrays.append(cache.token_sizes(mask, pooling, epoch))

        def visible(batch) -> TeacherTargets:
            ids, *sizes = (torch.from_numpy(np.array(x[batch.clip_ids.numpy()])).to(self.run.device) for x in arrays)
            return TeacherTargets(ids, token_size=sizes[0].float() if sizes else None)
        return visible

    def targets(self, batches: list) -> list[TeacherTargets]:
        """Look up the targets of a training step's micro-batches; a random mask is that of the step's epoch."""
        targets = []
        for b in batches:
            epoch = b.first_sample // len(self.datasets["train"])
            visible = self.visible_fn("train", self.cfg.mask, epoch)(b)
            token_targets, text_embeds = self.token_and_text_targets(b) if self.cfg.model.mrm_weight else (None, None)
            targets.append(replace(visible, token_targets=token_targets, text_embeds=text_embeds))
        return targets

    def token_and_text_targets(self, batch) -> tuple[Tensor, Tensor]:
        """Look up token targets (B, T, N, E) and text embeddings (B, E) of a training batch's clips."""
        cache, clip_ids = self.caches["train"], batch.clip_ids.numpy()
        arrays = (cache.token_targets(self.cfg.target_pooling)[clip_ids],
                  cache.array("text")[self.caption_index[clip_ids]])
        return tuple(torch.from_numpy(np.array(x)).to(self.run.device) for x in arrays)

    def retrieval(self, split: str, mask: MaskConfig | None) -> dict[str, float]:
        """Return R@1 of T2V and V2T with the tokens that the mask keeps; with all tokens if there is no mask."""
        protocol = evaluation.Protocol(max_text_length=self.cfg.text.max_length, batch=CHUNK,
                                       visible_fn=mask and self.visible_fn(split, mask))
        result = evaluation.retrieval(self.model.eval(), self.datasets[split], self.tokenizer, protocol)
        self.model.train()
        return {way: result["scores"]["similarity"][way]["R@1"] for way in ("T2V", "V2T")}

    def fit(self, stage: str, steps: int, batch: int, lr: float, make_inputs, **options):
        """Train one stage on the training clips; options: fields of loop.Stage."""
        train_stage(self.run, Stage(stage, self.model, self.datasets["train"], self.tokenizer, batch, steps, lr,
                                    make_inputs, train.loss_weights(self.cfg.model), **options))

    def pretrain(self) -> dict:
        """Train the masked stage, or load the result of another variant with the same stage -> its columns."""
        cfg, job = self.cfg, self.job
        folder = os.path.join(job.shared_folder, "before_unmasked", replace(job, task="retrieval").digest(
            unmasked_steps=0, unmasked_batch=0, unmasked_lr_scale=0.0))
        if os.path.isfile(f"{folder}/model.safetensors"):
            load_state_dict_strict(self.model, read_checkpoint(folder, "a student")[1], folder)
            return read_json(f"{folder}/config.json")
        results, curve = {}, {}
        if self.steps:
            start = time.perf_counter()

            def score(step):
                curve[step] = statistics.fmean(self.retrieval("val", cfg.mask).values())

            points = [self.steps * k // CURVE_POINTS for k in range(1, CURVE_POINTS)]
            has_queries = cfg.hides_tokens or cfg.model.objective == "visible"
            self.fit("pretrain", self.steps, cfg.batch, cfg.lr,
                     lambda batches: train.attach_batch_stats(self.model, batches, self.targets(batches)),
                     frozen=() if has_queries and cfg.model.mrm_weight else (r"^decoder\.",),
                     at_step={step: partial(score, step) for step in points})
            score(self.steps)
            last_rows = [row for row in read_log(self.run.folder) if row["stage"] == "pretrain"][-3:]
            loss = {"relevance": "mrm", "visible": "align"}.get(cfg.model.objective, cfg.model.objective)
            if loss in last_rows[0]:
                results["loss"] = statistics.fmean(row[loss] for row in last_rows)
            results["curve"] = " ".join(f"{step}:{score:.1f}" for step, score in curve.items())
            results["masked seconds"] = time.perf_counter() - start
        os.makedirs(folder, exist_ok=True)
        atomic_write_text(f"{folder}/config.json", json.dumps(results))
        save_weights(self.model, folder)
        return results

    def retrieval_row(self) -> dict:
        """Train the masked and the unmasked stage -> the columns of a retrieval row."""
        cfg = self.cfg
        results = self.pretrain()
        recalls = {"own": self.retrieval("test", cfg.mask),
                   "random": self.retrieval("test", replace(cfg.mask, name="random_frame")),
                   "before": self.retrieval("test", None)}
        if cfg.unmasked_steps:
            self.fit("unmasked", cfg.unmasked_steps, cfg.unmasked_batch, cfg.lr * cfg.unmasked_lr_scale,
                     lambda batches: train.attach_batch_stats(self.model, batches, [None] * len(batches)),
                     frozen=(r"^decoder\.",))
        recalls["after"] = self.retrieval("test", None)
        return results | {f"{name} {way}": x for name, ways in recalls.items() for way, x in ways.items()}

    def question_answering_row(self) -> dict:
        """Train the masked stage, then fine-tune to answer questions with the student's own tokens -> the columns."""
        cfg, task = self.cfg, get_task("sprites-qa")
        results = self.pretrain()
        folder = os.path.dirname(cfg.data.train_file)
        questions = defaultdict(list)
        for split in ("train", "test"):
            for row in read_rows(task, *split_files(task, split, folder), train=split == "train"):
                questions[row.video] += row.questions
        for dataset in self.datasets.values():      # the same clips in the same order, with their questions
            dataset.annotations = [replace(row, questions=questions[row.video]) for row in dataset.annotations]
        self.model = VideoToText.from_student(self.model, has_question=True).to(self.run.device).train()
        self.run = replace(self.run, cfg=replace(cfg, task="sprites-qa", stage="finetune", steps=QA_SETTINGS["steps"]))
        self.run.micro_batch_size["finetune"] = QA_SETTINGS["batch"]
        self.fit("finetune", **QA_SETTINGS, frozen=(r"^bert\.cls\.",),
                 make_inputs=lambda batches: list(zip(batches, self.targets(batches), strict=True)))
        answers = read_answers(find_file(task.answer_list, folder))
        for split, name in (("test", "qa"), ("val", "qa seen")):
            protocol = evaluation.Protocol(
                max_text_length=task.max_text_length, max_answer_length=task.max_answer_length, batch=CHUNK,
                answers=answers, visible_fn=self.visible_fn(split, cfg.mask))
            scores = evaluation.question_answering(self.model.eval(), self.datasets[split], self.tokenizer, protocol)
            by_type = next(iter(scores["scores"].values()))         # of the answers ranked, not of those generated
            results |= {name: by_type.pop("all"),
                        f"{name} by kind": " ".join(f"{k}:{x:.1f}" for k, x in by_type.items())}
        return results


def run_job(job: Job, device: str, commit: str) -> dict:
    """Train one student in this process -> its row of the file."""
    start, cfg = time.perf_counter(), job.settings()
    name = os.path.relpath(f"{job.shared_folder}/students/{job.task}-{job.digest()}", "out")
    cfg = replace(cfg, device=device, name=name)
    shutil.rmtree(os.path.join("out", name), ignore_errors=True)    # of a run that was killed
    run = train.setup(cfg)
    try:
        student = StudentRun(job, run)
        results = student.retrieval_row() if job.task == "retrieval" else student.question_answering_row()
    finally:
        run.close()
    shutil.rmtree(run.folder)
    return results | {
        "form": job.form, "task": job.task, "variant": job.variant, "seed": job.seed, "settings": job.digest(),
        "seconds": time.perf_counter() - start, "commit": commit, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"}


def init_job_worker(assignments):
    """Initialise a worker: one thread, its GPU, its log file as output; it exits when its parent does."""
    runtime.init_worker()
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    number, gpu = assignments.get()
    if gpu is not None:         # CUDA reads this once, when it starts
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(os.path.join("out", "ablations", f"worker{number}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)


# ---------------------------------------------------------------------------------------------------------------------
# Tables, and the commands

def select_tables(names: tuple[str, ...]) -> dict[str, Table]:
    for name in names:
        if name not in TABLES:
            raise ValueError(f"--tables must be of {', '.join(TABLES)}, got {name!r}")
    return {name: TABLES[name] for name in names or TABLES}


def numbers(row: dict) -> dict[str, float]:
    """Return the table columns of one row of the file; R@1 is the mean of T2V and V2T."""
    results = {}
    for name in SCORES:
        if row[f"{name} T2V"]:
            results[name] = (float(row[f"{name} T2V"]) + float(row[f"{name} V2T"])) / 2
    for name in ("loss", "qa", "qa seen"):
        if row[name]:
            results[name] = float(row[name])
        for part in row.get(f"{name} by kind", "").split():
            kind, _, x = part.partition(":")
            results[kind + name.removeprefix("qa")] = float(x)
    for i, part in enumerate(row["curve"].split()):
        results[f"seen at {(i + 1) * 100 // CURVE_POINTS} %"] = float(part.partition(":")[2])
    return results


def print_table(name: str, table: Table, rows: list[dict], full: bool):
    """Print the mean over seeds ± standard error, and differences to the first row, over the seeds that both have."""
    row_of = {(row["settings"], int(row["seed"])): row for row in rows}
    seeds = dict.fromkeys(seed for _, seed in row_of)
    results = {title: {seed: numbers(row) for seed in seeds if (row := row_of.get((
        Job.of(table, title, seed, full).digest(), seed)))} for title in table.rows}        # title -> seed -> numbers
    first = results[next(iter(results))]
    columns = dict.fromkeys(c for by_seed in results.values() for row in by_seed.values() for c in row)
    if not columns:
        print(f"\n**{name}: {table.about}**: not run")
        return
    compared = [c for c in ("own", "after", "qa", "qa seen") if c in columns]
    print_header(f"{name}: {table.about}", "", "seeds", *columns, *(f"{c} − first" for c in compared))
    for title, by_seed in results.items():
        cells = [format_mean([row[c] for row in by_seed.values() if c in row], 1 + (c == "loss")) for c in columns]
        pairs = [[row[c] - first[seed][c] for seed, row in by_seed.items() if seed in first and c in row]
                 for c in compared]
        print_row(title, len(by_seed), *cells, *("" if by_seed is first else format_mean(pair) for pair in pairs))


def show_tables(cfg: ShowCommand):
    tables, rows = select_tables(cfg.tables), read_csv(cfg.out, COLUMNS)
    if not rows:
        raise ValueError(f"{cfg.out} has no rows: `python -m tools.ablations train` writes them")
    for name, table in tables.items():
        print_table(name, table, rows, cfg.full)


def missing_jobs(cfg: TrainCommand) -> list[Job]:
    """Check the settings -> the students that the file lacks, seed by seed, each once even if in several tables."""
    tables = select_tables(cfg.tables)
    if min(cfg.seeds, default=-1) < 0 or len(set(cfg.seeds)) < len(cfg.seeds):
        raise ValueError(f"--seeds must be different numbers of at least 0, got {cfg.seeds}")
    folder = os.path.dirname(cfg.out) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"--out {cfg.out}: no such folder {folder}")
    if cfg.jobs < 0:
        raise ValueError(f"--jobs must be at least 0, got {cfg.jobs}")
    done = {row["settings"] for row in read_csv(cfg.out, COLUMNS)}
    jobs = {}
    for seed, table in itertools.product(cfg.seeds, tables.values()):
        for job in (Job.of(table, title, seed, cfg.full) for title in table.rows):
            jobs.setdefault(job.digest(), job)
    return [job for key, job in jobs.items() if key not in done]


def run_all(cfg: TrainCommand):
    """Train the students that the file lacks, several at a time, and print the tables."""
    todo, commit, cuda = missing_jobs(cfg), cfg.commit or current_commit(), torch.cuda.is_available()
    count = cfg.jobs or (torch.cuda.device_count() if cuda else num_cpus())
    print(f"{len(todo)} students to train, {count} at once; they log to out/ablations/worker*.log", flush=True)
    os.makedirs(os.path.join("out", "ablations"), exist_ok=True)
    for seed in dict.fromkeys(job.seed for job in todo):
        prepare_seed(Job("retrieval", "{}", seed, cfg.full), num_cpus())
    context = get_context("spawn")
    assignments = context.Queue()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    for i in range(count):
        assignments.put((i, gpus.split(",")[i % torch.cuda.device_count()] if cuda else None))
    failures = []
    with ProcessPoolExecutor(count, context, init_job_worker, (assignments,)) as pool:
        jobs = {pool.submit(run_job, job, "cuda" if cuda else "cpu", commit): job for job in todo}
        for future in tqdm(as_completed(jobs), "students", total=len(jobs), disable=None):
            job = jobs[future]
            try:
                append_csv(cfg.out, COLUMNS, future.result())
            except (ValueError, OSError, RuntimeError) as error:        # the other students go on
                failures.append(f"{job.task} {job.variant} seed {job.seed}: {error}")
                tqdm.write(failures[-1])
    if read_csv(cfg.out, COLUMNS):
        show_tables(cfg)
    if failures:
        raise ValueError(f"{len(failures)} of {len(jobs)} students failed: {failures[0]}")


def cli():
    cfg = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m tools.ablations")
    {TrainCommand: run_all, ShowCommand: show_tables, TokensCommand: compare_budgets}[type(cfg)](cfg)


if __name__ == "__main__":
    runtime.run_cli("tools.ablations", cli)
