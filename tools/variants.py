"""
Students trained in many ways, side by side: named variants x seeds -> docs/ablations.csv, and tables of it.

    python -m tools.ablate train                                  # all tables, three seeds, all cores or GPUs
    python -m tools.ablate train --tables masks pick --seeds 0    # some of it; what the file has is not run again
    python -m tools.ablate train --full                           # larger students on more clips, for a GPU
    python -m tools.ablate table                                  # the tables, from the file

A variant is a change to the training config, by the names of train.py's flags, or to the captions (MISPAIRED); a seed
draws clips (sprites.KINDS "crowd"), teacher, text encoder and student. What the teacher says of a view does not depend
on the student: it is asked once a seed, masks are computed once a mask, students read both from out/ablate. Draws of a
mask that looks at the tokens are made anew for each epoch, as a run of train.py would; masked stages are kept too, for
variants that differ after them alone. Each job is one process with one thread, or one GPU.

A student is scored on 512 held-out clips, none of whose captions any other clip has; R@1 in per cent, the mean of T2V
and V2T (chance 0.2):

own         with the tokens that its own mask keeps, after the masked stage
random      with as many random tokens of each frame
before      with all tokens, before the unmasked stage
after       with all tokens, after it
seen at     as own, on 512 clips drawn as the training clips are, which no student is trained on, at four points of the
            masked stage; settings are chosen on these
loss        of the reconstruction, at the end of the masked stage
qa          questions answered right, per cent; by kind of question
qa seen     the same on the clips for choosing, whose pairs of shape and colour the student has met
"""

import csv
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import data
import eval as scoring
import train
from data import Clips, DataConfig
from masking import MaskConfig, keep_count, sizes
from masks import log
from model import Bert, ClusterSTM, ModelConfig, VideoToText, bert_config, save_weights
from runs import Run
from sprites import VERSION, write_sprites
from tasks import find_file, find_task, read_answers, read_rows, split_files
from teacher import Guide, SigLIP, load_weights, read_folder
from tools.bench import current_commit, heading, line
from tools.show import read_log
from train import Config

TEST, SEEN = 512, 512       # held-out clips; clips drawn as the training clips are, on which settings are chosen
CURVE = 4                   # points of the learning curve
CHUNK = 64                  # clips put to the teacher, or to a mask, at once

# The embedded run, made smaller still: a quarter of the work.
REDUCED = Config(
    steps=200, unmasked_steps=40, unmasked_batch=16, unmasked_lr=0.1, lr=2e-3, log_every=20, save_every=10 ** 9, keep=1,
    data=DataConfig(frames=8, size=64), mask=MaskConfig(quantile=0.95),
    model=ModelConfig(patch=8, width=64, depth=3, heads=2, drop_path=0.0, positions="3d", text_width=64, text_depth=2,
                      text_heads=2, fusion=1, dropout=0.0, text_length=34, embed=64, decoder_width=64, decoder_depth=1,
                      decoder_heads=2, decoder_share=0.125),
)
# For a GPU: four times the clips, a student as wide as its teacher is there, ten times the steps.
FULL = replace(
    REDUCED, steps=2400, unmasked_steps=240, batch=256, unmasked_batch=128, lr=1e-3,
    model=replace(REDUCED.model, width=192, depth=6, heads=6, text_width=192, text_depth=4, text_heads=6, fusion=2,
                  embed=192, decoder_width=192, decoder_heads=6, decoder_share=0.25),
)
# Before it, the same for all.
BEGIN = {"batch": 64, "steps": 600, "lr": 2e-3}
# Fine-tuning for question answering.
ANSWERS = {"steps": 2400, "batch": 16, "lr": 5e-4}
CLIPS = {False: 4096, True: 16384}      # to train on, SEEN of them not trained on; reduced, full
# What a variant may change beside the config: the share of the training clips that have the caption of another one, as
# much of the web's captions are not of what is seen. Teacher, text encoder and start have read the right ones.
MISPAIRED = "mispaired captions"


@dataclass
class Table:
    """Variants that are compared: title -> changes. The first is what the others are held against."""
    about: str
    rows: dict[str, dict]
    task: str = "retrieval"             # or qa: the masked student, fine-tuned for question answering on its own tokens


def mask(name: str) -> dict:
    return {"mask.name": name} if name != "cluster_stm" else {}


def counted(*names: str, **changes) -> dict[str, dict]:
    """Rows of masks whose tokens count as one, and as those that they stand for."""
    return {f"{name}{', proportional' * counts}": {**mask(name), **({"model.proportional": True} if counts else {}),
                                                   **changes} for name in names for counts in (False, True)}


FRAME_MASKS = ("random_frame", "tube", "umt", "attention_high", "kmeans", "farthest_points", "dpcknn_centres",
               "fastvid_style")
TARGETS = {
    "relevance (MRM)": {}, "none": {"mrm": 0.0}, "features (G = I)": {"model.relevance": "none"},
    "visible tokens (UMT)": {"model.objective": "visible"}, "pixels (MAE)": {"model.objective": "pixels"},
}
TABLES = {
    "masks": Table("masks, each keeping 6 of 64 tokens of every frame",
                   {"cluster_stm": {}, **{name: mask(name) for name in FRAME_MASKS}}),
    "pick": Table("which token of a cluster is kept",
                  {"density": {}, **{p: {"mask.pick": p} for p in ("random", "centre", "lowest")}}),
    "pick, fewer": Table("the same, 3 of 64 tokens", {
        p: {"mask.ratio": 0.95, **({"mask.pick": p} if p != "density" else {})}
        for p in ("density", "random", "centre", "lowest")}),
    "targets": Table("what is reconstructed, beside VTC, VTM and MLM", TARGETS),
    "ratio": Table("share of the tokens hidden", {"0.9": {}} | {
        title: {"mask.ratio": ratio, "mask.name": name}
        for name, of in (("cluster_stm", ""), ("random_frame", ", random"))
        for ratio in (0.75, 0.85, 0.9, 0.95) if (title := f"{ratio:g}{of}") != "0.9"}
        | {"0, all tokens": {"mask.ratio": 0.0, "mask.name": "random_frame"}}),
    "bandwidth": Table("d_c of the clusters as a quantile of a frame's distances; of recurrence across frames",
                       {"0.95, 0.1": {}} | {f"{q:g}, 0.1": {"mask.quantile": q} for q in (0.02, 0.9, 0.98)}
                       | {f"0.95, {q:g}": {"mask.quantile_time": q} for q in (0.02, 0.5)}),
    "targets, longer": Table("the same, three times the masked steps", {
        title: {**changes, "steps *": 3} for title, changes in TARGETS.items() if title != "pixels (MAE)"}),
    "targets, mispaired": Table("the same, and half of the training clips have another's caption", {
        title: {**changes, "steps *": 3, MISPAIRED: 0.5} for title, changes in TARGETS.items()
        if title != "pixels (MAE)"}),
    "pooling": Table("how the teacher pools a token's neighbourhood for the target",
                     {"3 x 3, its head": {}, "3 x 3, mean": {"pool": "mean"}, "the token alone": {"pool": "token"}}),
    "text": Table("texts to which relevance is reconstructed",
                  {"of the batch": {}, "the clip's own": {"model.relevance": "own"}}),
    "decoder": Table("decoder of the reconstruction, blocks, share of the hidden tokens predicted", {
        "cross, 1, 0.125": {}, "cross, 2, 0.125": {"model.decoder_depth": 2},
        "cross, 1, 0.5": {"model.decoder_share": 0.5}, "joint, 1, all": {"model.decoder": "joint"}}),
    "unmasked": Table("steps on all tokens that follow", {"as they are": {}} | {
        f"{title}{of}": {**({"unmasked_steps *": times} if times != 1 else {}), **change}
        for of, change in (("", {}), (", random", mask("random_frame")))
        for title, times in (("a quarter", 0.25), ("as they are", 1), ("four times", 4)) if of or times != 1}),
    "length": Table("masked steps", {"as they are": {}} | {
        f"{title}{of}": {**({"steps *": times} if times != 1 else {}), **change}
        for of, change in (("", {}), (", random", mask("random_frame")))
        for title, times in (("half", 0.5), ("as they are", 1), ("three times", 3)) if of or times != 1}),
    "ours": Table("a kept token counts as the tokens it stands for (model.proportional), or as one",
                  counted("cluster_stm", "kmeans", "umt", "random_frame")),
    "ours, longer": Table("the same, three times the masked steps",
                          counted("cluster_stm", "random_frame", **{"steps *": 3})),
    "answers": Table("question answering with the student's own tokens, after three times the masked steps", {
        title: {**changes, "steps *": 3} for title, changes in {
            **TARGETS, "random_frame": mask("random_frame"), "proportional": {"model.proportional": True},
        }.items() if title != "pixels (MAE)"} | {"not pretrained": {"steps": 0}}, "qa"),
}


@dataclass
class Train:
    """Train the variants of some tables, several seeds of each, and print the tables."""
    tables: tuple[str, ...] = ()                # rows of TABLES; default all
    seeds: tuple[int, ...] = (0, 1, 2)          # of clips, teacher, text encoder and student
    full: bool = False                          # larger students, more clips and steps: for a GPU
    jobs: int = 0                               # at once; 0: one for each core, or GPU
    commit: str = ""                            # to name in the file where there is no git
    out: str = "docs/ablations.csv"             # file that rows are added to


@dataclass
class Show:
    """Print tables from the file."""
    tables: tuple[str, ...] = ()                # rows of TABLES; default all
    full: bool = False                          # of the larger students
    out: str = "docs/ablations.csv"             # file that has the rows


SCORES = ("own", "random", "before", "after")
COLUMNS = ("form", "task", "variant", "seed", "settings",
           *(f"{name} {way}" for name in SCORES for way in ("T2V", "V2T")), "curve", "loss",
           *(f"qa{way}" for way in ("", " by kind", " seen", " seen by kind")),
           "masked seconds", "seconds", "commit", "device", "torch")


def differs(now: dict, usual: dict) -> dict:
    """What is not as usual: a setting that train.py gets tomorrow makes no other students of those of today."""
    return {k: differs(v, usual[k]) if isinstance(v, dict) else v for k, v in now.items() if v != usual[k]}


def digest(*of) -> str:
    return hashlib.sha1(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """One student."""
    task: str
    variant: str                                # the changes, as JSON
    seed: int
    full: bool

    @property
    def form(self) -> str:
        return "full" if self.full else "reduced"

    @property
    def home(self) -> str:
        """Folder of what is computed once for all students of its form and seed."""
        base = differs(asdict(FULL if self.full else REDUCED), asdict(Config()))
        base = [base.get(part) for part in ("data", "small", "model")]
        of = digest(VERSION, CLIPS[self.full], TEST, SEEN, BEGIN, *base)
        return os.path.join("out", "ablate", f"{self.form}-seed{self.seed}-{of}")

    def settings(self) -> Config:
        """The whole config of the run, checked."""
        folder = os.path.join(self.home, "clips")
        cfg = deepcopy(FULL if self.full else REDUCED)
        cfg.seed, cfg.teacher, cfg.text = self.seed, f"{self.home}/teacher", f"{self.home}/text"
        cfg.data.train, cfg.data.root = f"{folder}/sprites_train.json", f"{folder}/videos"
        for name, value in json.loads(self.variant).items():
            if name == MISPAIRED:
                continue
            *parts, last = name.split(".")
            of, times = cfg, last.endswith(" *")                # the name of a number that is multiplied
            last = last.removesuffix(" *")
            for part in parts:
                of = getattr(of, part, None)
            if not hasattr(of, last):
                raise ValueError(f"a variant changes {name}, which the config does not have")
            setattr(of, last, round(getattr(of, last) * value) if times else value)
        steps, cfg.steps = cfg.steps, max(1, cfg.steps)         # none: a student that is not pretrained
        cfg = replace(cfg, mask=replace(cfg.mask), model=replace(cfg.model))
        cfg.steps = steps
        return cfg

    @property
    def mispaired(self) -> float:
        return json.loads(self.variant).get(MISPAIRED, 0)

    def digest(self, **without) -> str:
        """Of what the result is a function of; rows of other settings are other rows."""
        said = differs(asdict(self.settings()) | without, asdict(Config()))
        said |= {MISPAIRED: self.mispaired} if self.mispaired else {}
        return digest(said, *([ANSWERS] if self.task == "qa" else []))


# ---------------------------------------------------------------------------------------------------------------------
# What is computed once a seed

@dataclass
class Told:
    """What the teacher said of the clips of a split, one view each: files in a folder, made when first asked for."""
    folder: str                     # of the split
    seed: int
    teacher: SigLIP

    def array(self, name: str) -> np.ndarray:
        return np.load(os.path.join(self.folder, f"{name}.npy"), mmap_mode="r")

    def made(self, name: str, make) -> np.ndarray:
        """The array of that name; make() -> its parts, one after the other, where there is none."""
        path = os.path.join(self.folder, f"{name}.npy")
        if not os.path.isfile(path):
            with data.appearing(path) as f:             # another process may be making it too
                np.save(f, np.concatenate(list(make())))
        return self.array(name)

    def tensor(self, x: np.ndarray) -> Tensor:
        """fp32, on the teacher's device."""
        return torch.from_numpy(np.array(x)).to(next(self.teacher.parameters()).device).float()

    @torch.no_grad()
    def aligned(self, pool: str) -> np.ndarray:
        """(n, T, N, E) fp16, the targets."""
        def make():
            tokens = self.array("tokens")
            for at in range(0, len(tokens), CHUNK):
                x = self.tensor(tokens[at:at + CHUNK])                                  # (B, T, N, C)
                p = self.teacher.align(x.flatten(0, 1), self.teacher.grid, pool)
                yield p.unflatten(0, x.shape[:2]).half().cpu()
        return self.made(f"aligned-{pool}", make)

    @torch.no_grad()
    def keep(self, mask: MaskConfig, pool: str, epoch: int = 0) -> np.ndarray:
        """(n, TK) int64, what the mask keeps of each clip; of one that draws, in that epoch."""
        of, epoch = digest(asdict(mask), *([pool] if "aligned" in mask.needs else [])), epoch if mask.drawn else 0

        def make():
            tokens, text, attention = (self.array(name) for name in ("tokens", "text", "attention"))
            aligned = self.aligned(pool) if "aligned" in mask.needs else None
            for at in range(0, len(tokens), CHUNK):
                part = slice(at, at + CHUNK)
                x = self.tensor(tokens[part, ..., :1] if mask.blind else tokens[part])
                a = self.tensor(attention[part])
                more = {"attention": a, "logits": log(a), "text": self.tensor(text[part]), "grid": self.teacher.grid}
                if aligned is not None:
                    more["aligned"] = self.tensor(aligned[part])
                generator = torch.Generator().manual_seed((self.seed * 1000 + epoch) * 10 ** 6 + at)
                yield mask(x, keep_count(x.shape[2], mask.ratio), generator=generator, **more).cpu()
        return self.made(f"keep-{of}-{epoch}", make)

    @torch.no_grad()
    def size(self, mask: MaskConfig, pool: str, epoch: int = 0) -> np.ndarray:
        """(n, TK), how many tokens each of these stands for."""
        def make():
            tokens, keep = self.array("tokens"), self.keep(mask, pool, epoch)
            for at in range(0, len(tokens), CHUNK):
                ids = self.tensor(keep[at:at + CHUNK]).long()
                yield sizes(self.tensor(tokens[at:at + CHUNK]), ids).short().cpu()
        epoch = epoch if mask.drawn else 0
        return self.made(f"size-{digest(asdict(mask), pool)}-{epoch}", make)


def rows_of(cfg: Config, split: str) -> list:
    """Rows to train on, to choose settings on ("seen"), to score on ("test")."""
    test = cfg.data.train.replace("_train", "_test")
    rows = data.read_annotations(test if split == "test" else cfg.data.train, cfg.data.root)
    return rows if split == "test" else rows[-SEEN:] if split == "seen" else rows[:-SEEN]


def clips_of(cfg: Config, split: str) -> Clips:
    return Clips(rows_of(cfg, split), cfg.data, cfg.seed, train=split == "train")


def other_captions(n: int, share: float, seed: int) -> np.ndarray:
    """(n,) clip -> the clip whose caption it has; that share of them, none its own."""
    order, rng = np.arange(n), np.random.default_rng((seed, 9))
    some = rng.permutation(n)[:round(share * n)]
    order[some] = np.roll(some, 1)
    return order


@torch.no_grad()
def prepare(job: Job, threads: int):
    """Clips, teacher and text encoder of a seed, and what the teacher says."""
    torch.set_num_threads(threads)
    cfg, home = job.settings(), job.home
    if not os.path.isdir(f"{home}/clips"):
        write_sprites(f"{home}/clips", job.seed, CLIPS[job.full], TEST, 512, "crowd")
    name = os.path.relpath(home, "out")
    for stage, folder in (("teacher", cfg.teacher), ("text", cfg.text)):
        if not os.path.isfile(f"{folder}/model.safetensors"):
            with torch.enable_grad():
                train.main(replace(cfg, name=name, stage=stage, teacher="", text="", resume=True))
    teacher = SigLIP.from_pretrained(cfg.teacher).to("cuda" if torch.cuda.is_available() else "cpu")
    for split in ("train", "seen", "test"):
        folder, clips = f"{home}/told/{split}", clips_of(cfg, split)
        if os.path.isdir(folder):
            continue
        os.makedirs(f"{home}/told", exist_ok=True)
        said = defaultdict(list)
        for at in tqdm(range(0, len(clips), CHUNK), f"seed {job.seed}, {split}", disable=None):
            which = range(at, min(at + CHUNK, len(clips)))
            samples = [clips.view(i, 0) if split == "train" else clips[i] for i in which]
            video = torch.stack([s.video for s in samples]).to(next(teacher.parameters()).device)
            x = teacher.tokens(teacher.pixels(video.flatten(0, 1)))                     # (F, N, C)
            said["tokens"].append(x.unflatten(0, video.shape[:2]).half())
            said["attention"].append(teacher.attend(x).unflatten(0, video.shape[:2]))
            said["text"].append(teacher.encode_text(teacher.tokenize([s.caption for s in samples])))
        part = tempfile.mkdtemp(dir=f"{home}/told")
        for key, some in said.items():
            np.save(f"{part}/{key}.npy", torch.cat(some).cpu().numpy())
        os.rename(part, folder)
    for split in ("train", "seen", "test"):         # all students want these
        Told(f"{home}/told/{split}", job.seed, teacher).keep(cfg.mask, cfg.pool)
    Told(f"{home}/told/train", job.seed, teacher).aligned(cfg.pool)
    if not os.path.isfile(f"{home}/start/model.safetensors"):
        with torch.enable_grad():
            begin(job)


def begin(job: Job):
    """
    What all students of a seed begin with, but for the decoder, as UMT's stage 2 begins with its stage 1: trained on
    single frames, all tokens, with UMT's alignment to the teacher beside VTC, VTM and MLM.
    """
    cfg = replace(job.settings(), **BEGIN)
    cfg.name, cfg.model.objective = os.path.relpath(f"{job.home}/start", "out"), "visible"
    shutil.rmtree(f"{job.home}/start", ignore_errors=True)              # of one that was stopped
    run = train.start(cfg)
    try:
        student = Student(job, run, new=True)

        def frames(batches: list) -> list[tuple]:
            shown = []
            for b in batches:
                t = int(np.random.default_rng((cfg.seed, b.n)).integers(cfg.data.frames))
                aligned, text = student.words(b)
                aligned = aligned[:, t:t + 1]                                           # (B, 1, N, E)
                every = torch.arange(aligned.shape[2], device=aligned.device).expand(len(aligned), -1)
                shown.append((replace(b, video=b.video[:, t:t + 1]), Guide(every, aligned, text)))
            return train.with_whole(student.model, *map(list, zip(*shown, strict=True)))

        student.fit("pretrain", cfg.steps, cfg.batch, cfg.lr, frames)
        save_weights(student.model, run.folder)
    finally:
        run.end()


# ---------------------------------------------------------------------------------------------------------------------
# A student

class Student:
    """One variant and seed: what it sees, and how it is scored."""

    def __init__(self, job: Job, run: Run, new: bool = False):
        self.job, self.run, self.cfg = job, run, run.cfg
        cfg = self.cfg
        teacher = SigLIP.from_pretrained(cfg.teacher).to(run.device)
        self.told = {split: Told(f"{job.home}/told/{split}", cfg.seed, teacher) for split in ("train", "seen", "test")}
        self.clips = {split: clips_of(cfg, split) for split in ("train", "seen", "test")}
        rows = self.clips["train"].rows
        self.caption = other_captions(len(rows), job.mispaired, cfg.seed)           # whose caption each clip has
        self.clips["train"].rows = [replace(row, captions=rows[i].captions, still=rows[i].still)
                                    for row, i in zip(rows, self.caption, strict=True)]
        self.tokenizer = data.load_tokenizer(cfg.text)
        cfg.model.vocab, cfg.model.mask_id = self.tokenizer.get_vocab_size(), self.tokenizer.token_to_id("[MASK]")
        cfg.model.target = teacher.cfg.vision_config.hidden_size
        torch.manual_seed(cfg.seed)
        bert = Bert.from_pretrained(cfg.text, **asdict(bert_config(cfg.model)))
        self.model = ClusterSTM(cfg.model, bert)
        if not new:
            own = {key: x for key, x in self.model.state_dict().items() if key.startswith("decoder.")}
            start = load_file(f"{job.home}/start/model.safetensors")
            load_weights(self.model, {k: x for k, x in start.items() if not k.startswith("decoder.")} | own, job.home)
        self.model.to(run.device).train()

    def seeing(self, split: str, mask: MaskConfig, epoch: int = 0):
        """batch -> what the mask keeps of its clips."""
        told, sized = self.told[split], self.cfg.model.proportional
        parts = [of(mask, self.cfg.pool, epoch) for of in (told.keep, told.size)[:1 + sized]]

        def see(batch) -> Guide:
            keep, *size = (torch.from_numpy(np.array(x[batch.clip.numpy()])).to(self.run.device) for x in parts)
            return Guide(keep, size=size[0].float() if sized else None)
        return see

    def guides(self, batches: list) -> list[Guide]:
        """Of a training step's micro-batches, from what the teacher said; what is drawn, by the epoch."""
        guides = []
        for b in batches:
            told = self.seeing("train", self.cfg.mask, b.n // len(self.clips["train"]))(b)
            aligned, text = self.words(b) if self.cfg.mrm else (None, None)
            guides.append(replace(told, aligned=aligned, text=text))
        return guides

    def words(self, batch) -> tuple[Tensor, Tensor]:
        """Of a training step's clips: the targets (B, T, N, E), the captions (B, E)."""
        told, clips = self.told["train"], batch.clip.numpy()
        parts = told.aligned(self.cfg.pool)[clips], told.array("text")[self.caption[clips]]
        return tuple(torch.from_numpy(np.array(x)).to(self.run.device) for x in parts)

    def retrieval(self, split: str, mask: MaskConfig | None) -> dict[str, float]:
        """R@1 of T2V and V2T with the tokens that the mask keeps; None: all."""
        how = scoring.Protocol(length=self.cfg.model.text_length, batch=CHUNK, keep=mask and self.seeing(split, mask))
        found = scoring.retrieval(self.model.eval(), self.clips[split], self.tokenizer, how)["scores"]["similarity"]
        self.model.train()
        return {way: found[way]["R@1"] for way in ("T2V", "V2T")}

    def fit(self, stage: str, steps: int, batch: int, lr: float, calls, after: dict | None = None):
        train.fit(self.run, stage, self.model, self.clips["train"], self.tokenizer, batch, steps, lr, calls, after)

    def pretrain(self) -> dict:
        """The masked stage, unless another variant has had the same -> its scores; the model is as it ends."""
        cfg, job = self.cfg, self.job
        kept = os.path.join(job.home, "masked", replace(job, task="retrieval").digest(
            unmasked_steps=0, unmasked_batch=0, unmasked_lr=0.0))
        if os.path.isfile(f"{kept}/model.safetensors"):
            load_weights(self.model, read_folder(kept, "a masked student")[1], kept)
            return data.read_json(f"{kept}/config.json")
        found, curve = {}, {}
        if cfg.steps:
            begun = time.perf_counter()
            points = [cfg.steps * k // CURVE for k in range(1, CURVE)]

            def look(step):
                curve[step] = statistics.fmean(self.retrieval("seen", cfg.mask).values())

            calls = lambda batches: train.with_whole(self.model, batches, self.guides(batches))
            self.fit("pretrain", cfg.steps, cfg.batch, cfg.lr, calls, {at: partial(look, at) for at in points})
            look(cfg.steps)
            last = [row for row in read_log(self.run.folder) if row["stage"] == "pretrain"][-3:]
            name = {"relevance": "mrm", "visible": "align"}.get(cfg.model.objective, cfg.model.objective)
            if name in last[0]:
                found["loss"] = statistics.fmean(row[name] for row in last)
            found["curve"] = " ".join(f"{step}:{score:.1f}" for step, score in curve.items())
            found["masked seconds"] = time.perf_counter() - begun
        os.makedirs(kept, exist_ok=True)
        data.write_atomically(f"{kept}/config.json", json.dumps(found))
        save_weights(self.model, kept)
        return found

    def retrieve(self) -> dict:
        """A row: pretrained, then trained on all tokens."""
        cfg = self.cfg
        found = self.pretrain()
        blind = replace(cfg.mask, name="random_frame")
        rates = {"own": self.retrieval("test", cfg.mask), "random": self.retrieval("test", blind),
                 "before": self.retrieval("test", None)}
        if cfg.unmasked_steps:
            self.fit("unmasked", cfg.unmasked_steps, cfg.unmasked_batch, cfg.lr * cfg.unmasked_lr,
                     lambda batches: train.with_whole(self.model, batches, [None] * len(batches)))
        rates["after"] = self.retrieval("test", None)
        return found | {f"{name} {way}": x for name, both in rates.items() for way, x in both.items()}

    def answer(self) -> dict:
        """A row: pretrained, then fine-tuned to answer questions about its own tokens."""
        cfg, task = self.cfg, find_task("sprites-qa")
        found = self.pretrain()
        folder = os.path.dirname(cfg.data.train)
        asked = defaultdict(list)
        for split in ("train", "test"):
            for row in read_rows(task, *split_files(task, split, folder), train=split == "train"):
                asked[row.video] += row.questions
        for clips in self.clips.values():           # the same clips in the same order, with what is asked about them
            clips.rows = [replace(row, questions=asked[row.video]) for row in clips.rows]
        self.model = VideoToText.from_student(self.model, asks=True).to(self.run.device).train()
        self.run.cfg = replace(cfg, task="sprites-qa", stage="finetune", mlm=0.0, steps=ANSWERS["steps"])
        self.run.micro["finetune"] = ANSWERS["batch"]
        self.fit("finetune", calls=lambda batches: list(zip(batches, self.guides(batches), strict=True)), **ANSWERS)
        answers = read_answers(find_file(task.answers, folder))
        for split, name in (("test", "qa"), ("seen", "qa seen")):
            how = scoring.Protocol(length=task.length, answer_length=task.answer_length, batch=CHUNK, answers=answers,
                                   keep=self.seeing(split, cfg.mask))
            scores = scoring.question_answering(self.model.eval(), self.clips[split], self.tokenizer, how)["scores"]
            ranked = next(iter(scores.values()))
            found |= {name: ranked.pop("all"), f"{name} by kind": " ".join(f"{k}:{x:.1f}" for k, x in ranked.items())}
        return found


def work(job: Job, device: str, commit: str) -> dict:
    """The row of one student; in a process of its own."""
    begun, cfg = time.perf_counter(), job.settings()
    cfg.device, cfg.name = device, os.path.relpath(f"{job.home}/students/{job.task}-{job.digest()}", "out")
    shutil.rmtree(os.path.join("out", cfg.name), ignore_errors=True)    # of one that was killed
    run = train.start(cfg)
    try:
        found = {"retrieval": Student.retrieve, "qa": Student.answer}[job.task](Student(job, run))
    finally:
        run.end()
    shutil.rmtree(run.folder)
    on = torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"
    return found | {"form": job.form, "task": job.task, "variant": job.variant, "seed": job.seed,
                    "settings": job.digest(), "seconds": time.perf_counter() - begun, "commit": commit, "device": on,
                    "torch": torch.__version__}


def worker(numbers):
    """What a worker begins with: one thread, one of the GPUs, an end with its parent; what it says goes to a file."""
    data.ordinary()
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    number, gpu = numbers.get()
    if gpu is not None:         # before CUDA is asked for anything: it reads this once
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    said = os.open(os.path.join("out", "ablate", f"worker{number}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)


# ---------------------------------------------------------------------------------------------------------------------
# The file, and its tables

def read_file(path: str) -> list[dict]:
    if not os.path.isfile(path):
        return []
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path} has columns {', '.join(reader.fieldnames or ())}; wanted {', '.join(COLUMNS)}")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {i + 1} has not {len(COLUMNS)} values; without it the rest can be read")
    return rows


def add(path: str, row: dict):
    """A line more, at once on disk."""
    new = not os.path.isfile(path)
    with open(path, "a", newline="") as f:
        out = csv.DictWriter(f, COLUMNS, restval="", extrasaction="ignore")
        if new:
            out.writeheader()
        out.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def canonical(changes: dict) -> str:
    return json.dumps(changes, sort_keys=True)


def chosen(names: tuple[str, ...]) -> dict[str, Table]:
    for name in names:
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    return {name: TABLES[name] for name in names or TABLES}


def values(row: dict) -> dict[str, float]:
    """The numbers of a table, of one row of the file: R@1 as the mean of both ways."""
    found = {}
    for name in SCORES:
        if row[f"{name} T2V"]:
            found[name] = (float(row[f"{name} T2V"]) + float(row[f"{name} V2T"])) / 2
    for name in ("loss", "qa", "qa seen"):
        if row[name]:
            found[name] = float(row[name])
        for part in row.get(f"{name} by kind", "").split():
            kind, _, x = part.partition(":")
            found[kind + name.removeprefix("qa")] = float(x)
    for i, part in enumerate(row["curve"].split()):
        found[f"seen at {(i + 1) * 100 // CURVE} %"] = float(part.partition(":")[2])
    return found


def mean_se(xs: list[float], digits: int = 1) -> str:
    """The mean, and its standard error where there are several."""
    if not xs:
        return ""
    error = f" ± {statistics.stdev(xs) / len(xs) ** 0.5:.{digits}f}" if len(xs) > 1 else ""
    return f"{statistics.fmean(xs):.{digits}f}{error}"


def print_table(name: str, table: Table, rows: list[dict], full: bool):
    """The mean over seeds ± its standard error; and against the first row, seed by seed, where both were run."""
    found = {}                                      # title -> seed -> values
    for title, changes in table.rows.items():
        job = partial(Job, table.task, canonical(changes), full=full)
        same = [row for row in rows if row["task"] == table.task and row["form"] == job(seed=0).form
                and row["settings"] == job(seed=int(row["seed"])).digest()]
        found[title] = {int(row["seed"]): values(row) for row in same}
    first = found[next(iter(found))]
    columns = dict.fromkeys(c for of in found.values() for row in of.values() for c in row)
    if not columns:
        print(f"\n**{name}: {table.about}**: not run")
        return
    against = [c for c in ("own", "after", "qa", "qa seen") if c in columns]
    heading(f"{name}: {table.about}", "", "seeds", *columns, *(f"{c} − first" for c in against))
    for title, of in found.items():
        cells = [mean_se([row[c] for row in of.values() if c in row], 1 + (c == "loss")) for c in columns]
        pairs = [[row[c] - first[seed][c] for seed, row in of.items() if seed in first and c in row] for c in against]
        line(title, len(of), *cells, *("" if of is first else mean_se(pair) for pair in pairs))


def show(cfg: Show):
    tables, rows = chosen(cfg.tables), read_file(cfg.out)
    if not rows:
        raise ValueError(f"{cfg.out} has no rows: python -m tools.ablate train writes them")
    for name, table in tables.items():
        print_table(name, table, rows, cfg.full)


def run(cfg: Train):
    """Every variant and seed that the file does not have, side by side."""
    tables = chosen(cfg.tables)
    if min(cfg.seeds, default=-1) < 0 or len(set(cfg.seeds)) < len(cfg.seeds):
        raise ValueError(f"--seeds {cfg.seeds}: wants numbers that are not negative, none twice")
    folder = os.path.dirname(cfg.out) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"--out {cfg.out}: there is no folder {folder}")
    if cfg.jobs < 0:
        raise ValueError(f"--jobs {cfg.jobs}: wants a number that is not negative")
    commit, there = cfg.commit or current_commit(), {(row["settings"], row["seed"]) for row in read_file(cfg.out)}
    cuda = torch.cuda.is_available()
    count = cfg.jobs or (torch.cuda.device_count() if cuda else data.cores())
    wanted = {}                                     # seed by seed: what there is so far can be compared
    for seed in cfg.seeds:
        for table in tables.values():
            for changes in table.rows.values():
                job = Job(table.task, canonical(changes), seed, cfg.full)
                if (job.digest(), str(seed)) not in there:
                    wanted.setdefault(job.digest(), job)        # under several names it is one student
    wanted = list(wanted.values())
    print(f"{len(wanted)} students to train, {count} at once; they speak in out/ablate/worker*.log", flush=True)
    os.makedirs(os.path.join("out", "ablate"), exist_ok=True)
    for seed in dict.fromkeys(job.seed for job in wanted):
        prepare(Job("retrieval", "{}", seed, cfg.full), data.cores())
    context = get_context("spawn")
    numbers = context.Queue()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    for i in range(count):
        numbers.put((i, gpus.split(",")[i % torch.cuda.device_count()] if cuda else None))
    failed = []
    with ProcessPoolExecutor(count, context, worker, (numbers,)) as pool:
        jobs = {pool.submit(work, job, "cuda" if cuda else "cpu", commit): job for job in wanted}
        for future in tqdm(as_completed(jobs), "students", total=len(jobs), disable=None):
            job = jobs[future]
            try:
                add(cfg.out, future.result())
            except (ValueError, OSError, RuntimeError) as error:        # the others go on; it is said, and again below
                failed.append(f"{job.task} {job.variant} seed {job.seed}: {error}")
                tqdm.write(failed[-1])
    if read_file(cfg.out):
        show(Show(cfg.tables, cfg.full, cfg.out))
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} students failed: {failed[0]}")
