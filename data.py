"""
Annotations and their videos -> samples -> batches -> the loader of a run.

    Annotation -> ClipDataset or MixedDataset -> Sample -> collate -> Batch -> iterate_micro_batches

A sample is a function of (seed, n) alone, so a run can stop anywhere and any number of processes read the same clips.
Unreadable videos are never replaced silently: in training another clip is drawn instead, and the sample lists what was
skipped; everywhere else an unreadable video is an error that names it.
"""

import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from annotations import Annotation, Question
from frame_cache import DamagedCacheError, build_frame_cache
from media import expand_shards, is_shards
from runtime import STAGES, RunContext
from tasks import get_task
from tokenizer import encode_answers, encode_texts
from video import count_tokens, eval_transform, read_frames, resize, sample_frame_indices, train_transform

# ---------------------------------------------------------------------------------------------------------------------
# Samples

@dataclass(frozen=True)
class DataConfig:
    """Which data is read, and how frames and crops are taken from a video."""
    # annotation file: a JSON list of {"video", "caption"}; or tar shards, "shards/{00000..00999}.tar"
    train_file: str = "data/sprites/sprites_train.json"
    video_root: str = "data/sprites/videos"              # folder that the "video" names are relative to; not of shards
    extra_videos: tuple[str, ...] = ()   # further video corpora, each FILE=FOLDER, or tar shards
    image_corpora: tuple[str, ...] = ()  # image corpora, each FILE=FOLDER, or tar shards; an image is one frame
    val_file: str = ""              # annotations or shards of held-out videos, on which training is scored; empty: none
    val_root: str = ""              # folder that its "video" names are relative to; empty: as video_root
    num_frames: int = 8             # frames per clip (T); where clips vary, of those that are scored
    image_size: int = 64            # height and width of a frame, pixels; where clips vary, of those that are scored
    # FIRST LAST STEP: each micro-batch of training draws one of the numbers of frames FIRST, FIRST + STEP, ..., up to
    # LAST; empty: num_frames
    frames_range: tuple[int, ...] = ()
    # FIRST LAST STEP: each micro-batch of training draws one of the heights and widths FIRST, FIRST + STEP, ..., up to
    # LAST, in pixels; empty: image_size
    size_range: tuple[int, ...] = ()
    pool: tuple[int, ...] = ()          # LEAST MOST: only clips of that many tokens are drawn; empty: all of the ranges
    max_seconds: float = 0.0        # use only this many seconds from the start of a video; 0: all
    min_crop_scale: float = 1.0     # smallest fraction of the frame area in a random training crop; 1: no cropping
    hflip: bool = False             # flip half of the training clips horizontally; wrong if captions say left or right
    num_views: int = 1              # fixed augmented views (frames, crop, flip) per clip; 0: a new view every epoch
    frame_cache: bool = True        # decode each video once, into a memory-mapped file next to the annotations
    cache_frames: int = 32          # evenly spaced frames per video in the cache
    cache_image_size: int = 0       # largest short side of cached frames, pixels; 0: as the largest clips
    cache_jpeg_quality: int = 0     # store cached frames as JPEG of this quality, 1 to 100; 0: uncompressed
    num_workers: int = 0            # loader processes per rank; 0: load in the main process
    resize_on_device: bool = False  # resize training crops on the GPU instead of in the loader processes
    max_unreadable: float = 0.1     # largest fraction of videos, shards and samples of shards that may be lost in a run

    def __post_init__(self):
        for name in ("frames_range", "size_range"):
            self.check_range(name, getattr(self, name))
        if self.pool and not (len(self.pool) == 2 and 1 <= self.pool[0] <= self.pool[1]):
            raise ValueError(f"data.pool must be LEAST MOST, two numbers of tokens, or empty, got {self.pool}")
        if self.pool and not self.varies:
            raise ValueError("data.frames_range or data.size_range must be given with data.pool, got neither")
        for name in ("extra_videos", "image_corpora"):
            for corpus in getattr(self, name):
                path, _, root = corpus.partition("=")
                if not is_shards(corpus) and (not (path and root) or is_shards(path)):
                    raise ValueError(f"data.{name} must be FILE=FOLDER, or tar shards alone, got {corpus!r}")
        for name, least in (("num_frames", 1), ("image_size", 1), ("max_seconds", 0), ("num_views", 0),
                            ("cache_image_size", 0), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"data.min_crop_scale must be above 0 and at most 1, got {self.min_crop_scale}")
        if self.image_corpora and self.frame_counts[0] == 1:
            raise ValueError(f"data.{'frames_range' if self.frames_range else 'num_frames'} must be at least 2 with "
                             "data.image_corpora, got 1: with one frame, list the images as videos")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"data.max_unreadable must be from 0 to 1, got {self.max_unreadable}")
        if not 0 <= self.cache_jpeg_quality <= 100:
            raise ValueError(f"data.cache_jpeg_quality must be from 0 (no JPEG) to 100, got {self.cache_jpeg_quality}")
        if self.frame_cache and self.cache_frames < self.max_frames:
            raise ValueError("data.cache_frames must be at least data.num_frames and the largest of data.frames_range, "
                             f"got {self.cache_frames} and {self.max_frames}")

    @staticmethod
    def check_range(name: str, values: tuple[int, ...]):
        """Raise a ValueError unless a range is empty or FIRST LAST STEP with numbers of at least 1."""
        if values and not (len(values) == 3 and min(values) >= 1 and values[0] <= values[1]):
            raise ValueError(f"data.{name} must be FIRST LAST STEP, numbers of at least 1 with FIRST <= LAST, or "
                             f"empty, got {values}")

    @property
    def varies(self) -> bool:
        """Whether the micro-batches of training draw how many frames they have, of which size."""
        return bool(self.frames_range or self.size_range)

    @property
    def frame_counts(self) -> range:
        """The numbers of frames that a clip of training may have."""
        first, last, step = self.frames_range or (self.num_frames, self.num_frames, 1)
        return range(first, last + 1, step)

    @property
    def sizes(self) -> range:
        """The heights and widths, in pixels, that a clip of training may have."""
        first, last, step = self.size_range or (self.image_size, self.image_size, 1)
        return range(first, last + 1, step)

    @property
    def max_frames(self) -> int:
        """The largest number of frames of a clip, in training and scoring."""
        return max(self.num_frames, self.frame_counts[-1])

    @property
    def max_size(self) -> int:
        """The largest height and width of a clip, in training and scoring."""
        return max(self.image_size, self.sizes[-1])

    def corpora(self, images: bool = False) -> list[tuple[str, str]]:
        """List (annotation file, media folder) of each video corpus, or of each image corpus. Shards have no folder."""
        listed = [(corpus, "") if is_shards(corpus) else tuple(corpus.partition("=")[::2])
                  for corpus in (self.image_corpora if images else self.extra_videos)]
        return listed if images else [(self.train_file, self.video_root), *listed]

    def cache_folder(self) -> str:
        """The folder of the frame cache, and of a tokenizer: that of the annotation file, or of the first shard."""
        path = expand_shards(self.train_file)[0] if is_shards(self.train_file) else self.train_file
        return os.path.dirname(path) or "."


# The grid of a clip is its number of frames and their size, (T, size). All clips of a micro-batch have the same.

def grids(cfg) -> list[tuple[int, int]]:
    """
    List the grids (T, size) that the clips of training may have; cfg: the Config of train.py. They are all pairs of
    data.frames_range and data.size_range whose number of tokens is within data.pool (FluxViT, Wang et al., ICCV 2025,
    §3.1). A ValueError says that there must be one.
    """
    data, patch = cfg.data, cfg.vit.patch_size
    tokens = {(T, size): count_tokens(T, size, patch) for T in data.frame_counts for size in data.sizes}
    least, most = data.pool or (1, math.inf)
    allowed = [grid for grid, count in tokens.items() if least <= count <= most]
    if not allowed:
        raise ValueError(f"data.pool must hold the number of tokens of a clip, {min(tokens.values())} to "
                         f"{max(tokens.values())} by data.frames_range and data.size_range, got {least} to {most}")
    return allowed


def draw(choices: Sequence, seed: int, stage: str, step: int, part: int, use: int):
    """Draw one of the choices for micro-batch `part` of a step, uniformly. `use` separates draws of other things."""
    return choices[np.random.default_rng((seed, STAGES.index(stage), step, part, use)).integers(len(choices))]


def draw_grid(grids: Sequence[tuple[int, int]], seed: int, stage: str, step: int, part: int) -> tuple[int, int]:
    """Draw the grid (T, size) of micro-batch `part` of a step, uniformly, as a function of the arguments alone."""
    return draw(grids, seed, stage, step, part, 1)


@dataclass
class Sample:
    """One clip as the model sees it."""
    video: Tensor                                  # (T, 3, H, W) uint8; (T, 3, h, w) if the device resizes it
    caption: str
    frame_caption: str                             # describes each single frame; the caption if the file has none
    media_id: int                                  # Annotation.media_id
    clip_id: int                                   # index of the annotation
    view_id: int                                   # index of the frames, crop and flip of this clip
    questions: list[Question] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)  # unreadable videos drawn before this one: UnreadableError.record
    image_size: int = 0                            # H and W, if video may still be a crop


class UnreadableError(ValueError):
    """A video cannot be read. record: {"where": file and row, "video": Annotation.video, "reason"}."""

    def __init__(self, annotation: Annotation, error: Exception):
        super().__init__(f"{annotation.source}: {error}")
        self.record = {"where": annotation.source, "video": annotation.video, "reason": str(error)}


def require_readable(count_read: int, count_all: int):
    """Raise a ValueError if none of the videos could be read."""
    if not count_read:
        raise ValueError(f"none of {count_all} videos could be read")


class ClipDataset(torch.utils.data.Dataset):
    """
    In training, dataset[n] for any n >= 0 is sample n of a run: every epoch is a permutation of the annotations. The
    sample is a function of (seed, n) alone, and its pixels of (seed, clip_id, view_id). dataset[n, T, size] is the same
    sample with T frames of size x size pixels. With train=False, dataset[n] is annotation n as it is evaluated.

    If a training video cannot be read, another annotation is drawn from (seed, n), and the sample lists the video in
    `skipped`; all other samples are unchanged.
    """

    def __init__(self, annotations: Sequence[Annotation], cfg: DataConfig, seed: int = 0, train: bool = True,
                 cache_folder: str | None = None, index_offset: int = 0):
        """index_offset: the clip_id of the first annotation, if other datasets of the run come before this one."""
        self.annotations, self.cfg, self.seed, self.train = annotations, cfg, seed, train
        self.index_offset = index_offset
        self.cache = None
        if cfg.frame_cache:
            self.cache = build_frame_cache(annotations, cfg, cache_folder or cfg.cache_folder())
        self.epoch, self.permutation = -1, None

    def __len__(self):
        return len(self.annotations)

    def annotation(self, clip_id: int) -> Annotation:
        """Look up the annotation of a sample's clip_id."""
        return self.annotations[clip_id - self.index_offset]

    def __getitem__(self, index: int | tuple[int, int, int]) -> Sample:
        n, *grid = index if isinstance(index, tuple) else (index,)
        if not self.train:
            annotation = self.annotations[n]
            frames = self.load_frames(annotation, self.cfg.num_frames, "middle", None)
            video = eval_transform(frames, self.cfg.image_size)
            return self.make_sample(annotation, n, 0, video, annotation.captions[0], self.cfg.image_size)
        if n < 0:
            raise IndexError(f"the number of a sample must be at least 0, got {n}")
        epoch, i = divmod(n, len(self.annotations))
        if epoch != self.epoch:
            permutation = np.random.default_rng((self.seed, epoch)).permutation(len(self.annotations))
            self.epoch, self.permutation = epoch, permutation.astype(np.int32)      # each loader process holds one
        index, skipped = int(self.permutation[i]), []
        replacements = np.random.default_rng((self.seed, n, self.index_offset, 2))
        while True:
            try:
                view_id = epoch % self.cfg.num_views if self.cfg.num_views else epoch
                sample = self.training_sample(index, view_id, *grid)
                return replace(sample, skipped=skipped)
            except UnreadableError as error:
                skipped.append(error.record)
                if len(skipped) == 10:
                    raise ValueError(f"{error} (neither can the 9 videos drawn before it)") from None
            index = int(replacements.integers(len(self.annotations)))

    def training_sample(self, index: int, view_id: int, T: int = 0, size: int = 0) -> Sample:
        """
        Make augmented view `view_id` of annotation `index`: T frames of size x size pixels, 0: as the config says.
        UnreadableError if its video cannot be read.
        """
        annotation, cfg = self.annotations[index], self.cfg
        T, size = T or cfg.num_frames, size or cfg.image_size
        rng = np.random.default_rng((self.seed, self.index_offset + index, view_id, 1))
        caption = annotation.captions[rng.integers(len(annotation.captions))]
        try:
            frames = self.load_frames(annotation, T, "random", rng)
        except DamagedCacheError:                   # no fault of the video
            raise
        except (ValueError, OSError) as error:
            raise UnreadableError(annotation, error) from None
        video = train_transform(frames, size, cfg.min_crop_scale, cfg.hflip, rng, cfg.resize_on_device)
        return self.make_sample(annotation, index, view_id, video, caption, size)

    def load_frames(self, annotation: Annotation, T: int, strategy: str, rng: np.random.Generator | None) -> Tensor:
        """Read T frames of a video (T, 3, H, W) uint8, from the cache if there is one."""
        if self.cache is None:
            return read_frames(annotation.media, T, strategy, rng, seconds=self.cfg.max_seconds)
        frames = self.cache[annotation.video]
        return torch.from_numpy(frames[sample_frame_indices(T, len(frames), strategy, rng)])

    def make_sample(self, annotation: Annotation, index: int, view_id: int, video: Tensor, caption: str,
                    size: int) -> Sample:
        return Sample(video, caption, annotation.frame_caption or caption, annotation.media_id,
                      self.index_offset + index, view_id, annotation.questions, image_size=size)


class MixedDataset(torch.utils.data.Dataset):
    """
    Clips of videos and of images as one dataset, for training. Each batch is of one kind. An epoch has as many batches
    of each kind as its clips can fill, in an order that is a function of (seed, epoch); so sample n is a function of
    (seed, n).
    """

    def __init__(self, videos: ClipDataset, images: ClipDataset, batch: int):
        self.datasets, self.batch, self.seed = (videos, images), batch, videos.seed
        self.batches_per_epoch = [max(1, len(dataset) // batch) for dataset in self.datasets]
        self.epoch, self.permutation = -1, None

    def __len__(self):
        return sum(map(len, self.datasets))

    def annotation(self, clip_id: int) -> Annotation:
        """Look up the annotation of a sample's clip_id."""
        return self.datasets[clip_id >= self.datasets[1].index_offset].annotation(clip_id)

    def __getitem__(self, index: int | tuple[int, int, int]) -> Sample:
        """Sample n, or (n, T, size) as in ClipDataset. An image has one frame, whatever T."""
        n, *grid = index if isinstance(index, tuple) else (index,)
        batch, i = divmod(n, self.batch)
        epoch, position = divmod(batch, sum(self.batches_per_epoch))
        if epoch != self.epoch:
            kinds = np.repeat((0, 1), self.batches_per_epoch)
            self.epoch, self.permutation = epoch, np.random.default_rng((self.seed, epoch, 3)).permutation(kinds)
        kind = int(self.permutation[position])
        batch_of_kind = epoch * self.batches_per_epoch[kind] + int((self.permutation[:position] == kind).sum())
        n = batch_of_kind * self.batch + i
        return self.datasets[kind][(n, 1 if kind else grid[0], grid[1]) if grid else n]


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@dataclass
class Batch:
    """B clips, their texts and, for question answering and captioning, Q questions with A answers."""
    video: Tensor | None                           # (B, T, 3, H, W) uint8; None until `to` resizes the crops
    text_ids: Tensor                               # (B, L) int64; of questions (Q, L)
    captions: list[str]
    frame_captions: list[str]
    media_ids: Tensor                              # (B,) int64, equal for one clip of one file
    clip_ids: Tensor                               # (B,) int64, stays on the host
    view_ids: Tensor                               # (B,) int64, stays on the host
    seed: int                                      # of all random draws for this batch
    budget: int = 0                                # tokens that the mask keeps of a clip; 0: by MaskConfig.ratio
    first_sample: int = 0                          # number of its first sample in the stage
    clip_index: Tensor | None = None               # (Q,) int64, the clip of the batch that a question is about
    answer_ids: Tensor | None = None               # (A, L') int64
    question_index: Tensor | None = None           # (A,) int64, the question that an answer belongs to
    answer_weight: Tensor | None = None            # (A,) fp32
    skipped: list[dict] = field(default_factory=list)      # of all its samples
    crops: Tensor | None = None                    # uint8, the crops of all clips, flattened and concatenated
    crop_shapes: list[tuple] = field(default_factory=list)     # (T, 3, h, w) of each
    image_size: int = 0                            # H and W

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader: copies from pinned memory to the device run asynchronously."""
        return self.map_tensors(Tensor.pin_memory)

    def to(self, device, non_blocking: bool = False) -> "Batch":
        """Copy all tensors but clip_ids and view_ids, which the host reads; resize the crops on the device."""
        moved = replace(self, clip_ids=None, view_ids=None)
        moved = moved.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))
        moved = replace(moved, clip_ids=self.clip_ids, view_ids=self.view_ids)
        if self.crops is None:
            return moved
        crops = moved.crops.split([math.prod(shape) for shape in self.crop_shapes])
        video = [resize(crop.view(shape), (self.image_size,) * 2)
                 for crop, shape in zip(crops, self.crop_shapes, strict=True)]
        return replace(moved, video=torch.stack(video), crops=None, crop_shapes=[])

    def map_tensors(self, function) -> "Batch":
        """Replace each tensor x by function(x)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})


def collate(samples: list[Sample], tokenizer: Tokenizer, max_length: int, seed: int,
            max_answer_length: int = 0) -> Batch:
    """
    Make a batch of samples. text_ids are those of the captions; if max_answer_length > 0, they are those of the
    samples' questions, and the answers are encoded too.
    """
    captions, size = [s.caption for s in samples], samples[0].image_size
    crops, shapes = None, [tuple(s.video.shape) for s in samples]
    if size and any(shape[2:] != (size, size) for shape in shapes):
        crops = torch.cat([s.video.flatten() for s in samples])
    batch = Batch(
        video=torch.stack([s.video for s in samples]) if crops is None else None,
        crops=crops, crop_shapes=shapes if crops is not None else [], image_size=size,
        text_ids=torch.empty(0), captions=captions, frame_captions=[s.frame_caption for s in samples],
        media_ids=torch.tensor([s.media_id for s in samples]), clip_ids=torch.tensor([s.clip_id for s in samples]),
        view_ids=torch.tensor([s.view_id for s in samples]), seed=seed,
        skipped=[record for s in samples for record in s.skipped],
    )
    if not max_answer_length:
        return replace(batch, text_ids=encode_texts(tokenizer, captions, max_length))
    questions = [(b, q) for b, s in enumerate(samples) for q in s.questions]
    answers = [(i, answer, weight) for i, (_, q) in enumerate(questions) for answer, weight in q.answers.items()]
    return replace(
        batch, text_ids=encode_texts(tokenizer, [q.text for _, q in questions], max_length),
        clip_index=torch.tensor([b for b, _ in questions]), question_index=torch.tensor([i for i, _, _ in answers]),
        answer_ids=encode_answers(tokenizer, [answer for _, answer, _ in answers], max_answer_length),
        answer_weight=torch.tensor([weight for _, _, weight in answers]),
    )


class ReadableClips(torch.utils.data.Dataset):
    """Samples of chosen annotations: (index, sample, None), or (index, None, (video, reason)) if it cannot be read."""

    def __init__(self, dataset: ClipDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i: int):
        index = self.indices[i]
        try:
            return index, self.dataset[index], None
        except (ValueError, OSError) as error:
            annotation = self.dataset.annotations[index]
            return index, None, (annotation.video, f"{annotation.source}: {error}")


def collate_readable(tokenizer, max_text_length: int, items: list):
    """Items of ReadableClips -> indices of the readable clips, their batch (None if there are none), the errors."""
    indices, samples = [i for i, sample, _ in items if sample], [sample for _, sample, _ in items if sample]
    batch = collate(samples, tokenizer, max_text_length, seed=indices[0]) if samples else None
    return indices, batch, [error for *_, error in items if error]


# ---------------------------------------------------------------------------------------------------------------------
# The loader of a run

def iterate_micro_batches(run: RunContext, dataset: ClipDataset | MixedDataset, tokenizer: Tokenizer, stage: str,
                          batch: int, micro_batch: int, step: int, steps: int):
    """
    Yield, for each of the steps `step` ... `steps` - 1, the list of this rank's micro-batches, on run.device.

    Step s has the samples s * batch ... (s + 1) * batch - 1, in micro-batches of micro_batch clips that are split over
    the ranks in order. Sample n and the seed, grid and budget of a micro-batch are functions of (cfg.seed, stage, step,
    index) alone. In the stage of the toy teacher all micro-batches of a step have the same grid, because a step has as
    many of them as there are ranks. In that of the toy text encoder the grid does not vary.
    """
    cfg = run.cfg
    count = batch // micro_batch                   # micro-batches of a step, over all ranks
    local = range(run.rank * count // run.world, (run.rank + 1) * count // run.world)
    first = lambda s, i: s * batch + i * micro_batch
    allowed = grids(cfg) if cfg.data.varies and stage != "text" else []

    def samples(s: int, i: int) -> Sequence:
        """List what micro-batch i of step s reads of the dataset."""
        numbers = range(first(s, i), first(s, i) + micro_batch)
        if not allowed:
            return numbers
        grid = draw_grid(allowed, cfg.seed, stage, s, 0 if stage == "teacher" else i)
        return [(n, *grid) for n in numbers]

    batches = (samples(s, i) for s in range(step, steps) for i in local)
    loader = iter(DataLoader(
        dataset, batch_sampler=batches, num_workers=cfg.data.num_workers, pin_memory=run.device.type == "cuda",
        worker_init_fn=ignore_stop_signals, collate_fn=partial(
            collate, tokenizer=tokenizer, max_length=cfg.text.max_length, seed=0,
            max_answer_length=get_task(cfg.task).max_answer_length if cfg.task else 0),
    ))
    # On a separate stream the copies overlap with the previous step.
    copy_stream = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
    try:
        for s in range(step, steps):
            group = []
            for i in local:
                with torch.cuda.stream(copy_stream) if copy_stream else nullcontext():
                    b = next(loader).to(run.device, non_blocking=True)
                if copy_stream:
                    current = torch.cuda.current_stream(run.device)
                    current.wait_stream(copy_stream)
                    b.map_tensors(lambda x, current=current: x.record_stream(current) if x.is_cuda else None)
                key = np.random.SeedSequence((cfg.seed, STAGES.index(stage), s, i))
                b.seed, b.first_sample = int(key.generate_state(1, np.uint64)[0]), first(s, i)
                if cfg.mask.tokens:
                    b.budget = int(draw(cfg.mask.tokens, cfg.seed, stage, s, i, 2))
                group.append(b)
            yield group
    finally:
        if cfg.data.num_workers:
            loader._shutdown_workers()              # they ignore SIGTERM, and the exit of this process waits for them


def ignore_stop_signals(_):
    """Loader worker initialiser. On SIGTERM or Ctrl-C training finishes its step, for which it needs the workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def init_loader_worker(_):
    """
    Initialise a loader process. Ctrl-C is answered by the main process, which may then leave data unread: that these
    connections break is no error of the worker, which ends with the main process.
    """
    def print_other_errors(kind, error, traceback):
        if not isinstance(error, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, error, traceback)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = print_other_errors
