"""
What a trained model gets from its user: videos, as paths or frames, and texts.

    paths, or (B, T, 3, H, W) uint8 -> iter_clips -> (b, T, 3, S, S) on the model's device -> embed_clips -> (B, E')

SigLIP, ClusterSTM and VideoToText share this file for their methods that embed, caption and answer.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial

import torch
from tokenizers import Tokenizer
from torch import Tensor

from annotations import normalize_caption
from files import require
from runtime import bf16_autocast, num_cpus
from tasks import get_task
from tokenizer import encode_texts, load_tokenizer
from video import eval_transform, read_frames

# ---------------------------------------------------------------------------------------------------------------------
# Checks

def require_clips(video: Tensor):
    """Raise a ValueError unless `video` is (B, T, 3, H, W) uint8. No value is read, so no device is waited for."""
    if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[2] != 3 or 0 in video.shape[1:]:
        dtype = str(video.dtype).removeprefix("torch.")
        raise ValueError("video must be (B, T, 3, H, W) uint8, clips of T frames of 3 channels, got "
                         f"{tuple(video.shape)} {dtype}")


def require_videos(videos: list[str] | Tensor):
    """Raise a ValueError unless `videos` is a list of paths or (B, T, 3, H, W) uint8."""
    if isinstance(videos, Tensor):
        require_clips(videos)
    elif not isinstance(videos, (list, tuple)) or not all(isinstance(path, (str, os.PathLike)) for path in videos):
        raise ValueError(f"videos must be a list of paths, or a tensor (B, T, 3, H, W) uint8, got {describe(videos)}")


def require_finite(values: Tensor, names: Sequence, what: str):
    """Raise a ValueError if one of values (n, ...) is NaN or infinite. It names the first of the n rows with one."""
    if not values.isfinite().all():                                         # waits for the device, so not in training
        wrong = ~values.isfinite()
        row = int(wrong[..., None].flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{what} {names[row]!r} must be finite, got {values[row][wrong[row]].flatten()[0].item()}")


def require_texts(texts: list[str], what: str):
    """Raise a ValueError, which `what` begins, unless texts is a list of texts. One alone would be its letters."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what} must be a list of texts, got {describe(texts)}")
    for text in texts:
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{what} must be valid Unicode, got {text!r}")


def describe(value) -> str:
    """Describe what came instead of a list: its type and, on one line, the beginning of its repr."""
    return f"{type(value).__name__} {' '.join(repr(value).split())[:60]}"


# ---------------------------------------------------------------------------------------------------------------------
# Videos and texts -> embeddings

def iter_clips(videos: list[str] | Tensor, num_frames: int, seconds: float, transform: Callable, batch: int,
               device: torch.device) -> Iterator[tuple[Sequence, Tensor]]:
    """
    Yield (names, clips (b, T, 3, S, S) on the device) of at most `batch` videos at a time, in order.

    videos: paths, of which num_frames middle frames are read, from the first `seconds` (0: from all); or frames
    (B, T, 3, H, W) uint8, which are named by their index. transform: frames (n, 3, H, W) -> (n, 3, S, S).
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    require_videos(videos)
    if isinstance(videos, Tensor):
        for start in range(0, len(videos), batch):
            frames = videos[start:start + batch]
            clips = transform(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            yield range(start, start + len(frames)), clips.to(device)
        return
    paths = [os.fspath(path) for path in videos]
    read = lambda path: transform(read_frames(path, num_frames, seconds=seconds))
    with ThreadPoolExecutor(min(num_cpus(), 8)) as pool:                    # decoding and resizing release the GIL
        for start in range(0, len(paths), batch):
            names = paths[start:start + batch]
            yield names, torch.stack(list(pool.map(read, names))).to(device)


@torch.no_grad()
def embed_clips(encode: Callable, clips: Iterator[tuple[Sequence, Tensor]], width: int, device: torch.device) -> Tensor:
    """Apply encode, clips (b, T, 3, S, S) -> (b, width), to the batches of iter_clips -> (B, width)."""
    parts = [torch.zeros(0, width, device=device)]                          # there may be no video
    for names, video in clips:
        with bf16_autocast(device):
            features = encode(video).float()
        require_finite(features, names, "the model's features of the video")
        parts.append(features)
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(encode: Callable, texts: list[str], width: int, device: torch.device) -> Tensor:
    """Apply encode, m texts -> (m, width), to at most 256 texts at a time -> (M, width)."""
    require_texts(texts, "texts")
    parts = [torch.zeros(0, width, device=device)]                          # there may be no text
    parts += [encode(texts[start:start + 256]).float() for start in range(0, len(texts), 256)]
    features = torch.cat(parts)
    require_finite(features, texts, "the model's feature of the text")
    return features


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a trained model

class ModelInputs:
    """
    Read videos and texts as in the training of a model, of which the config.json in its folder tells.

    A model that comes from no folder has none of this. What a folder lacks is an error where it is used.
    """

    def __init__(self, folder: str = "", config: dict | None = None):
        self.folder, self.config = folder and os.path.abspath(folder), config

    def read_config(self, part: str, *keys: str) -> dict:
        """Return a part of the config. A ValueError says that it must have these keys."""
        if self.config is None:
            raise ValueError("the model must be one of from_pretrained, whose folder says how videos and texts are "
                             "read, got one without a folder")
        values = self.config.get(part)
        require(isinstance(values, dict) and {*keys} <= values.keys(), os.path.join(self.folder, "config.json"), part,
                f"an object with {' and '.join(keys)}", values)
        return values

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(os.path.join(self.folder, "tokenizer.json"))

    @property
    def max_answer_length(self) -> int:
        """The number of tokens of an answer or a caption, in the task that the model was fine-tuned for."""
        task = self.config.get("task")
        require(isinstance(task, str) and task, os.path.join(self.folder, "config.json"), "task",
                "the task of the fine-tuning", task)
        return get_task(task).max_answer_length

    def encode_texts(self, texts: list[str], what: str) -> Tensor:
        """M texts, which are normalised as captions are in training -> ids (M, L). `what` begins an error's message."""
        max_length = self.read_config("text", "max_length")["max_length"]
        require_texts(texts, what)
        normalized = [normalize_caption(text) for text in texts]
        if "" in normalized:
            raise ValueError(f"{what} must have at least one word each, got {texts[normalized.index('')]!r}")
        return encode_texts(self.tokenizer, normalized, max_length)

    def iter_clips(self, videos: list[str] | Tensor, batch: int,
                   device: torch.device) -> Iterator[tuple[Sequence, Tensor]]:
        """Yield (names, clips) as the function iter_clips does, with frames of the number and size of the training."""
        data = self.read_config("data", "num_frames", "image_size")
        transform = partial(eval_transform, size=data["image_size"])
        return iter_clips(videos, data["num_frames"], data.get("max_seconds", 0), transform, batch, device)
