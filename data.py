"""
Data: the embedded set `sprites`, video files -> frames, annotation rows -> samples -> batches.

    python data.py sprites --out data/sprites        draws the embedded set and writes it as ordinary video files

A sample is a function of (seed, n) alone, so a run can stop anywhere and any number of processes read the same clips.
Nothing is replaced in silence: a video that does not decode is an error that names it.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial

import av
import numpy as np
import torch
import torch.nn.functional as nnf
import tyro
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from teacher import demand, one_line, read_json

# ---------------------------------------------------------------------------------------------------------------------
# Sprites: what a clip shows

VERSION = 3                                        # of the drawing; part of what `write_sprites` leaves in sprites.json
FRAMES, SIZE = 8, 64                               # frames a clip, pixels a side
SPLITS = {"train": 0, "test": 1}

SHAPES = {                                         # left, top, right, bottom of the shape, in radii from its centre
    "circle": (-1, -1, 1, 1),
    "square": (-0.9, -0.9, 0.9, 0.9),
    "triangle": (-1.1, -1, 1.1, 0.9),
    "cross": (-1.1, -1.1, 1.1, 1.1),
    "ring": (-1.1, -1.1, 1.1, 1.1),
    "bar": (-1.2, -0.45, 1.2, 0.45),
}
COLOURS = {
    "red": (235, 30, 40), "green": (30, 205, 60), "blue": (50, 100, 255), "yellow": (250, 235, 50),
    "white": (250, 250, 250), "orange": (255, 140, 20), "purple": (175, 60, 230), "cyan": (50, 225, 235),
}
SIZES = {"small": 3.2, "large": 5.5}               # radius in pixels
MOTIONS = {                                        # direction in pixels, y down
    "moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1),
    "moves in a circle": None, "grows": None, "stays still": None,
}
TEXTURES = ("plain", "striped", "checked", "dotted", "cloudy")       # all but the clouds show in any 8 x 8 pixels
TONES = {"brown": (96, 64, 40), "grey": (104, 104, 104), "navy": (32, 38, 84), "olive": (84, 90, 38)}

HELD_OUT = 8                                       # one meaning in this many belongs to the test split
DRIFT = 1.5                                        # pixels a frame that the camera moves at most
TEMPLATES = (                                      # the whole, one object, between objects
    ("{objects} on {background}", "{object} {motion}", " while "),
    ("on {background} {objects}", "{object} {motion}", " and "),
    ("there is {objects} on {background}", "{object} that {motion}", " and "),
    ("{background} with {objects}", "{object} which {motion}", " and "),
)


@dataclass
class Plan:
    """What a clip shows, before anything is placed or drawn."""
    objects: list[dict]                            # shape, colour, size, motion
    texture: str
    tone: str
    template: int

    def meaning(self) -> str:
        """The same for two plans that show the same things, in whatever order and words."""
        objects = sorted(" ".join(o[key] for key in ("size", "colour", "shape", "motion")) for o in self.objects)
        return ", ".join([*objects, f"{self.texture} {self.tone}"])

    def caption(self) -> str:
        whole, one, between = TEMPLATES[self.template]
        objects = between.join(one.format(object=name(o), motion=o["motion"]) for o in self.objects)
        return whole.format(objects=objects, background=f"a {self.texture} {self.tone} background")

    def still(self) -> str:
        """The objects alone: true of each frame."""
        return " and ".join(map(name, self.objects))


@dataclass
class Drawn:
    """A clip of `sprites` with its ground truth."""
    frames: np.ndarray                             # (T, H, W, 3) uint8
    caption: str
    still: str                                     # the objects alone: true of each frame
    boxes: np.ndarray                              # (T, objects, 4) float32: x0, y0, x1, y1 in pixels
    objects: list[dict]                            # shape, colour, size, motion


def name(o: dict) -> str:
    return f"a {o['size']} {o['colour']} {o['shape']}"


def propose(rng: np.random.Generator) -> Plan:
    count = rng.choice([1, 2, 3], p=[0.45, 0.40, 0.15])
    kinds = rng.choice(len(SHAPES) * len(COLOURS), count, replace=False)     # no two sprites of one shape and colour
    objects = [{
        "shape": list(SHAPES)[kind // len(COLOURS)],
        "colour": list(COLOURS)[kind % len(COLOURS)],
        "size": list(SIZES)[rng.integers(len(SIZES))],
        "motion": list(MOTIONS)[rng.integers(len(MOTIONS))],
    } for kind in kinds]
    texture, tone = TEXTURES[rng.integers(len(TEXTURES))], list(TONES)[rng.integers(len(TONES))]
    return Plan(objects, texture, tone, int(rng.integers(len(TEMPLATES))))


@lru_cache(maxsize=4)
def held_out_plans(seed: int) -> tuple[list[Plan], set[str]]:
    """The plans of test clips 0, 1, … and their meanings, as far as `plan` has come."""
    return [], set()


def plan(seed: int, split: str, index: int) -> Plan:
    """
    What clip `index` shows. Meanings are split by a hash, so that no test clip means what a training clip means;
    test clips also differ from one another, so a test clip depends on those before it.
    """
    def first(index, accept):
        rng = np.random.default_rng((seed, SPLITS[split], index))
        while True:
            proposal = propose(rng)
            held_out = zlib.crc32(proposal.meaning().encode()) % HELD_OUT == 0
            if held_out == (split == "test") and accept(proposal):
                return proposal

    if split == "train":
        return first(index, accept=lambda proposal: True)
    plans, meanings = held_out_plans(seed)
    while len(plans) <= index:
        plans.append(first(len(plans), accept=lambda proposal: proposal.meaning() not in meanings))
        meanings.add(plans[-1].meaning())
    return plans[index]


# ---------------------------------------------------------------------------------------------------------------------
# Sprites: drawing. Pixel i covers [i, i + 1), so its centre is at i + 0.5.

def distance(shape: str, x, y, r):
    """Signed distance in pixels to the edge of a shape of radius r at the origin, negative inside; broadcasts."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * r
    if shape == "triangle":                        # a base at 0.9 r and two sides that meet at (0, -r)
        slope = np.array([1.9, -1.1]) / np.hypot(1.9, 1.1)
        return np.maximum(y - 0.9 * r, slope[0] * abs(x) + slope[1] * (y + r))
    if shape == "cross":
        long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        return np.maximum(long - 1.1 * r, short - 0.35 * r)
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.8 * r) - 0.3 * r
    if shape == "bar":
        return np.maximum(abs(x) - 1.2 * r, abs(y) - 0.45 * r)
    raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")


def paint(video, shape, colour, centre, radius):
    """Draws one shape over video (T, H, W, 3) float, in place: centre (T, 2), radius (T,)."""
    x0, y0 = np.maximum(np.floor((centre - 1.3 * radius[:, None]).min(0)).astype(int) - 1, 0)
    x1, y1 = np.maximum(np.ceil((centre + 1.3 * radius[:, None]).max(0)).astype(int) + 1, 0)
    window = video[:, y0:y1, x0:x1]                                         # all that it touches in any frame
    y, x = np.arange(y0, y0 + window.shape[1]) + 0.5, np.arange(x0, x0 + window.shape[2]) + 0.5
    sdf = distance(shape, x[None, None, :] - centre[:, 0, None, None], y[None, :, None] - centre[:, 1, None, None],
                   radius[:, None, None])
    cover = np.clip(0.5 - sdf, 0, 1)[..., None]                             # (T, h, w, 1): share of a pixel inside
    window += cover * (np.array(colour, float) - window)


def path(motion: str, radius: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Centres (T, 2) and radii (T,) of a sprite that stays inside the frame all the time."""
    t = np.arange(FRAMES)
    speed, orbit, phase = rng.uniform(2.5, 4), rng.uniform(6, 9), rng.uniform(0, 2 * np.pi)
    turn = phase + rng.choice([-1, 1]) * 2 * np.pi * t / FRAMES             # once around, either way
    offset, radii = np.zeros((FRAMES, 2)), np.full(FRAMES, radius)
    if motion == "moves in a circle":
        offset = orbit * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    elif motion == "grows":
        radii = radius * np.linspace(0.6, 1.5, FRAMES)
    elif motion != "stays still":
        offset = speed * t[:, None] * np.array(MOTIONS[motion])
    margin = 1.2 * radii.max() + 1
    start = rng.uniform(margin - offset.min(0), SIZE - margin - offset.max(0))
    return start + offset, radii


def place(objects: list[dict], rng) -> tuple[np.ndarray, np.ndarray]:
    """Centres (objects, T, 2) and radii (objects, T), drawn again while sprites hide one another for long."""
    for _ in range(100):
        paths = [path(o["motion"], SIZES[o["size"]], rng) for o in objects]
        centres, radii = (np.stack(part) for part in zip(*paths, strict=True))
        apart = np.hypot(*(centres[:, None] - centres[None]).transpose(3, 0, 1, 2))      # (objects, objects, T)
        clear = apart > radii[:, None] + radii[None]
        clear |= np.eye(len(objects), dtype=bool)[..., None]
        if clear[..., 0].all() and clear.mean(-1).min() >= 0.75:
            break
    return centres, radii


def background(texture: str, tone: str, camera: np.ndarray, rng) -> np.ndarray:
    """camera (T, 2), how far the view has moved -> (T, H, W, 3) float."""
    x = (np.arange(SIZE) + 0.5)[None, None, :] + camera[:, 0, None, None]   # (T, 1, W)
    y = (np.arange(SIZE) + 0.5)[None, :, None] + camera[:, 1, None, None]   # (T, H, 1)
    angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi, (4, 2))
    period = rng.uniform(5, 7)
    k = 2 * np.pi / period
    along = np.cos(angle) * x + np.sin(angle) * y                           # (T, H, W)
    if texture == "plain":
        level = 0 * along
    elif texture == "striped":
        level = np.clip(2 * np.sin(k * along + phase[0, 0]), -1, 1)
    elif texture == "checked":
        level = np.clip(4 * np.sin(k * x / 1.2 + phase[0, 0]) * np.sin(k * y / 1.2 + phase[0, 1]), -1, 1)
    elif texture == "dotted":                                               # discs on a square grid
        dx, dy = (x + phase[0, 0]) % period - period / 2, (y + phase[0, 1]) % period - period / 2
        level = 2 * np.clip(0.5 + period / 4 - np.hypot(dx, dy), 0, 1) - 0.5
    else:                                                                   # cloudy: waves of four directions
        level = 0 * along
        for i, (shift, turn) in enumerate(phase):
            level += 0.5 * np.sin((np.cos(turn) * x + np.sin(turn) * y) * 2 * np.pi / (10 + 4 * i) + shift)
    return np.array(TONES[tone], float) * (1 + 0.25 * level[..., None])


def draw(seed: int, split: str, index: int, sprites: bool = True) -> Drawn:
    """
    Clip `index` of a split: a function of these numbers alone, the same on any machine.
    sprites=False leaves the sprites out of the pixels and changes nothing else.
    """
    shown = plan(seed, split, index)
    rng = np.random.default_rng((seed, SPLITS[split], index, 1))
    centres, radii = place(shown.objects, rng)                              # (objects, T, 2), (objects, T)

    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0, DRIFT)
    camera = np.arange(FRAMES)[:, None] * speed * np.array([np.cos(heading), np.sin(heading)])      # (T, 2)
    video = background(shown.texture, shown.tone, camera, rng)              # (T, H, W, 3)
    reach = DRIFT * FRAMES                                                  # clutter may come into view later
    for _ in range(round(10 * (1 + 2 * reach / SIZE) ** 2)):                # about 10 specks in view
        spot, radius = rng.uniform(-reach, SIZE + reach, 2), rng.uniform(0.8, 1.2)
        colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
        paint(video, "circle", colour, spot - camera, np.full(FRAMES, radius))
    if sprites:
        for o, centre, radius in zip(shown.objects, centres, radii, strict=True):
            paint(video, o["shape"], COLOURS[o["colour"]], centre, radius)
    video += 0.02 * 255 * rng.standard_normal(video.shape)

    extent = np.array([SHAPES[o["shape"]] for o in shown.objects])          # (objects, 4)
    boxes = np.concatenate([centres, centres], axis=-1) + radii[..., None] * extent[:, None]
    return Drawn(
        frames=np.clip(np.rint(video), 0, 255).astype(np.uint8),
        caption=shown.caption(), still=shown.still(),
        boxes=boxes.transpose(1, 0, 2).astype(np.float32), objects=shown.objects,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def in_parallel(function, items, label: str):
    """function(item) for each item, in order, on all cores and with a progress bar; a worker that dies raises."""
    count = min(cores(), len(items))
    with ProcessPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from tqdm(pool.map(function, items, chunksize=4), label, total=len(items), disable=None)


def write_atomically(path: str, text: str):
    """The file appears whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path) or ".", delete=False, encoding="utf-8") as f:
        f.write(text)
    os.chmod(f.name, 0o644)                        # temporary files are private
    os.replace(f.name, path)


def write_video(path: str, frames: np.ndarray, codec: str = "libx264", fps: int = 8, **options: str):
    """frames (T, H, W, 3) uint8 -> a video file, one thread."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_clip(folder: str, seed: int, clip: tuple[str, int]) -> tuple[dict, np.ndarray]:
    """Draws and writes one clip; returns its annotation row and its boxes (T, objects, 4)."""
    split, index = clip
    drawn = draw(seed, split, index)
    name = f"{split}_{index:05d}.mp4"
    write_video(os.path.join(folder, name), drawn.frames, crf="12", preset="veryfast")
    return {"video": name, "caption": drawn.caption, "still": drawn.still}, drawn.boxes


def write_sprites(out: str, seed: int = 0, train: int = 4096, test: int = 512):
    """Draw the embedded data set `sprites` and write it as ordinary files.

    videos/*.mp4 are H.264 (crf 12, 4:2:0); sprites_train.json and sprites_test.json are in the form of the published
    retrieval annotations, with one more key, "still": the objects alone, true of each frame. sprites_boxes.npz holds
    the true boxes, train and test (clips, T, 3, 4), x0 y0 x1 y1 in pixels, NaN where a clip has fewer than three
    sprites. tokenizer.json is a word-piece tokenizer of the training captions.

    Coding changes a pixel by 4.6 of 255 levels on average, much of it the noise, and by 14 on sprites, where 4:2:0
    halves the resolution of colour; 99 % of the pixels of small sprites stay nearest to their own colour.

    Args:
        out: folder to write; it appears whole or not at all
        seed: another seed is another set
        train: clips to learn from
        test: held-out clips; none means what another or any training clip means
    """
    if train < 1 or test < 1:
        raise ValueError(f"--train {train} --test {test}: both want at least one clip")
    if seed < 0:
        raise ValueError(f"--seed {seed}: wants a number that is not negative")
    out = out.rstrip("/")
    made = {"version": VERSION, "seed": seed, "train": train, "test": test}
    if os.path.lexists(out):
        try:
            with open(os.path.join(out, "sprites.json")) as f:
                there = json.load(f)
        except (OSError, ValueError):
            raise FileExistsError(f"{out} exists and is not a set of sprites") from None
        if there != made:
            raise FileExistsError(f"{out} holds another set, {there}; wanted {made}")
        print(f"{out} is already there, with the same parameters")
        return

    parent, name = os.path.split(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        os.mkdir(os.path.join(folder, "videos"))
        clips = [("train", i) for i in range(train)] + [("test", i) for i in range(test)]
        write = partial(write_clip, os.path.join(folder, "videos"), seed)
        rows, boxes = zip(*in_parallel(write, clips, "sprites"), strict=True)
        padded = np.full((len(clips), FRAMES, 3, 4), np.nan, np.float32)
        for i, box in enumerate(boxes):
            padded[i, :, :box.shape[1]] = box
        np.savez_compressed(os.path.join(folder, "sprites_boxes.npz"), train=padded[:train], test=padded[train:])
        for split, part in (("train", rows[:train]), ("test", rows[train:])):
            lines = ",\n".join(json.dumps(row) for row in part)
            write_atomically(os.path.join(folder, f"sprites_{split}.json"), f"[\n{lines}\n]\n")
        train_tokenizer([row["caption"] for row in rows[:train]], os.path.join(folder, "tokenizer.json"))
        write_atomically(os.path.join(folder, "sprites.json"), json.dumps(made))
        os.chmod(folder, 0o755)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"{out}: {train} + {test} clips")


# ---------------------------------------------------------------------------------------------------------------------
# Text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clean(caption: str) -> str:
    """UMT's caption normalisation (multi_modality/dataset/utils.py, pre_text)."""
    caption = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split())


def train_tokenizer(captions: list[str], path: str, vocab: int = 2000):
    """
    A BERT word-piece tokenizer of at most `vocab` entries: the most frequent words whole, any other word in letters.
    The same captions give the same file, which the library's own trainer does not promise.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for caption in captions
                    for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    letters = sorted(set("".join(words)))
    pieces = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters)]
    if len(pieces) > vocab:
        raise ValueError(f"a vocabulary of {vocab} has no room for {len(pieces)} special tokens and letters")
    frequent = sorted(words, key=lambda word: (-words[word], word))
    pieces = list(dict.fromkeys(pieces + frequent))[:vocab]                 # a word of one letter is there already
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(list(SPECIALS))
    write_atomically(path, tokenizer.to_str(pretty=True))


def load_tokenizer(path: str) -> Tokenizer:
    """
    From a tokenizer.json, a vocab.txt or a folder that has one: ours, or a BERT checkpoint's, which then does what
    BertTokenizerFast does.

    A tokenizer_config.json beside it has the last word on case, accents and Chinese; where it has none, a vocab.txt is
    uncased, and a tokenizer.json is what it says it is.
    """
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in ("tokenizer.json", "vocab.txt")]
        path = next(filter(os.path.isfile, names), names[0])
    kind = "vocab.txt" if path.endswith(".txt") else "tokenizer.json"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such {kind}")
    try:
        if kind == "vocab.txt":
            tokenizer = Tokenizer(models.WordPiece.from_file(path, unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer()
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        else:
            tokenizer = Tokenizer.from_file(path)
    except Exception as error:                     # the library raises plain Exception
        raise ValueError(f"{path}: not a {kind} ({one_line(error)})") from None
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    missing = [token for token, i in ids.items() if i is None]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; a BERT tokenizer has {', '.join(SPECIALS)}")
    # The model takes 0 for padding, and what follows [MASK] for words.
    demand(ids["[PAD]"] == 0 and ids["[MASK]"] == max(ids.values()), path, "the order of its special tokens",
           "[PAD], id 0, first and [MASK] last", ids)
    tokenizer.add_special_tokens(list(SPECIALS))
    beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    options = read_json(beside) if os.path.isfile(beside) else {}
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        for key, name in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
                          ("tokenize_chinese_chars", "handle_chinese_chars")):
            value = options.get(key, getattr(tokenizer.normalizer, name))
            demand(value in ((True, False, None) if key == "strip_accents" else (True, False)), beside, key,
                   "true or false", value)
            setattr(tokenizer.normalizer, name, value)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, captions: list[str], length: int, sep: bool = False) -> Tensor:
    """M captions -> (M, L) int64: [CLS] and the pieces, cut to L, padded with [PAD]. UMT's texts have no [SEP]."""
    if length < 2 + sep:
        raise ValueError(f"a text of {length} tokens has no room for [CLS]{', [SEP]' * sep} and a word")
    pad, cls, end = (tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
    ids = torch.full((len(captions), length), pad)                          # (M, L)
    for row, caption in zip(ids, captions, strict=True):
        pieces = tokenizer.encode(caption, add_special_tokens=False).ids[:length - 1 - sep]
        pieces = [cls, *pieces, *[end] * sep]
        row[:len(pieces)] = torch.tensor(pieces)
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Annotations

@dataclass
class Row:
    """One entry of an annotation file."""
    video: str                                     # path
    captions: list[str]                            # cleaned
    still: str | None                              # what each frame shows, if the file says
    media: int                                     # the same for the same file name in its corpus, everywhere


def read_annotations(path: str, root: str) -> list[Row]:
    """A JSON list of {"video" or "image": name under root, "caption": str or list of str}, as UMT's and VindLU's."""
    try:
        with open(path, encoding="utf-8") as f:
            entries = json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: wanted a list of rows, got {_short(entries)}")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder, wanted as the root of the videos in {path}")

    rows = []
    for i, entry in enumerate(entries):
        where = f"{path}, row {i}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: wanted an object, got {_short(entry)}")
        name = entry.get("video", entry.get("image"))
        if not isinstance(name, str) or not name:
            raise ValueError(f'{where}: wanted a file name under "video" or "image", got {_short(entry)}')
        captions = entry.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise ValueError(f'{where}: wanted a text or a list of texts under "caption", got {_short(captions)}')
        cleaned = [clean(caption) for caption in captions]
        if "" in cleaned:
            raise ValueError(f"{where}: empty caption {captions[cleaned.index('')]!r}")
        still = clean(entry["still"]) if isinstance(entry.get("still"), str) else None
        media = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
        rows.append(Row(os.path.join(root, name), cleaned, still or None, media))

    absent = [i for i, row in enumerate(rows) if not os.path.isfile(row.video)]
    if absent:
        raise FileNotFoundError(f"{path}, row {absent[0]}: no file {rows[absent[0]].video}"
                                f" ({len(absent)} of {len(rows)} rows lack theirs)")
    return rows


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def pick(count: int, total: int, sample: str = "middle", rng: np.random.Generator | None = None) -> np.ndarray:
    """`count` of `total` frames, one from each of `count` equal segments: its middle, or a random one of it."""
    if not 1 <= count <= total:
        raise ValueError(f"has {total} frames, wanted {count}")
    edges = np.arange(count + 1) * total // count
    if sample == "middle":
        return (edges[:-1] + edges[1:] - 1) // 2                            # (count,)
    if sample == "random":
        return rng.integers(edges[:-1], edges[1:])                          # (count,)
    raise ValueError(f"wanted sample to be middle or random, got {sample!r}")


def read_frames(path: str, num_frames: int, sample: str = "middle", rng: np.random.Generator | None = None,
                size: int | None = None) -> Tensor:
    """
    -> (T, 3, H, W) uint8, T = num_frames, or all frames for num_frames = 0; short side at most `size`.

    The whole file is decoded, so whether it is accepted does not depend on which frames are asked for; only those T are
    kept. A frame that does not decode shows the good one before it, as in a player, up to one frame in ten.
    """
    return decode(path, lambda total: pick(num_frames or total, total, sample, rng), size)


def decode(path: str, choose, size: int | None) -> Tensor:
    """choose(number of frames) -> ascending indices of the frames to return, (T, 3, H, W) uint8."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        times = frame_times(path)
        wanted = choose(len(times))
        pictures, at, lost, last = [], -1, len(times), None
        for at, frame in decoded_frames(path, times):
            while len(pictures) < len(wanted) and wanted[len(pictures)] < at:        # lost: the one before stands in
                pictures.append(to_tensor(last or frame, size))
            if len(pictures) < len(wanted) and wanted[len(pictures)] == at:
                pictures.append(to_tensor(frame, size))
            lost, last = lost - 1, frame
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if 10 * lost > len(times):
        raise ValueError(f"{path}: {lost} of {len(times)} frames do not decode")
    pictures += [to_tensor(last, size)] * (len(wanted) - len(pictures))
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"{path}: changes its size on the way")
    return torch.stack(pictures)                                            # (T, 3, H, W)


def open_video(path: str):
    container = av.open(path)
    if not container.streams.video:
        container.close()
        raise ValueError("has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1                                   # loader processes are the parallelism
    return container, stream


def frame_times(path: str) -> list[int | None]:
    """
    Presentation times of the frames, ascending, None for a frame whose time is not known. They are read from the
    packets: what a header says about their number may be wrong.
    """
    container, stream = open_video(path)
    with container:
        packets = [(packet.pts, packet.is_corrupt) for packet in container.demux(stream)
                   if packet.size and not packet.is_discard]
        times = {pts for pts, _ in packets} - {None}
        # AVI has no presentation times, and libav's guesses are wrong where B-frames are packed into one packet.
        if container.format.name == "avi" or len(times) < len(packets):
            times = set()
        count = len(packets)
        if any(corrupt for _, corrupt in packets):                          # the file breaks off inside a packet:
            count = max(count, stream.frames)                               # the rest of its index is lost
    return sorted(times) + [None] * (count - len(times))


def decoded_frames(path: str, times: list[int | None]):
    """(place in the presentation order, frame) of each frame that decodes, in that order."""
    place = {time: i for i, time in enumerate(times) if time is not None}
    at = -1
    container, stream = open_video(path)
    with container:
        for packet in container.demux(stream):
            try:
                for frame in packet.decode():
                    at = max(at + 1, place.get(frame.pts, 0))
                    yield at, frame
            except av.FFmpegError:
                at += not place                                             # without times a lost frame is counted


def to_tensor(frame: av.VideoFrame, size: int | None) -> Tensor:
    """-> (3, H, W) uint8, short side at most `size`."""
    image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous()
    H, W = image.shape[1:]
    if size and min(H, W) > size:
        image = resize(image[None], (round(H * size / min(H, W)), round(W * size / min(H, W))))[0]
    return image


def resize(frames: Tensor, shape: tuple[int, int]) -> Tensor:
    """(T, 3, H, W) uint8 -> (T, 3, h, w) uint8, bicubic, antialiased (torchvision's default since 0.17)."""
    if frames.shape[2:] == tuple(shape):
        return frames
    frames = frames.to(torch.float32, memory_format=torch.contiguous_format)
    # Not in uint8: torch would also round and clamp between the two axes (and fails on some one-pixel outputs).
    return nnf.interpolate(frames, shape, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


def test_view(frames: Tensor, size: int) -> Tensor:
    """(T, 3, H, W) -> (T, 3, S, S): the whole frame, whatever its shape, as in UMT."""
    return resize(frames, (size, size))


def train_view(frames: Tensor, size: int, scale: float, flip: bool, rng: np.random.Generator) -> Tensor:
    """(T, 3, H, W) -> (T, 3, S, S): one crop a clip, of at least `scale` of the area and 3/4 to 4/3 in shape."""
    H, W = frames.shape[2:]
    if scale < 1:
        for _ in range(10):
            area, ratio = H * W * rng.uniform(scale, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            h, w = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
            if 1 <= h <= H and 1 <= w <= W:
                break
        else:                                                               # a long frame: as much as the shape allows
            h, w = min(H, round(W * 4 / 3)), min(W, round(H * 4 / 3))
        y, x = rng.integers(H - h + 1), rng.integers(W - w + 1)
        frames = frames[:, :, y:y + h, x:x + w]
    if flip and rng.random() < 0.5:
        frames = frames.flip(-1)
    return resize(frames, (size, size))


# ---------------------------------------------------------------------------------------------------------------------
# Clips

@dataclass
class DataConfig:
    """What is read, and how a clip is cut from it."""
    train: str = "data/sprites/sprites_train.json"    # annotation file: a JSON list of {"video", "caption"}
    root: str = "data/sprites/videos"                 # folder that its "video" names are relative to
    frames: int = 8           # frames a clip (T)
    size: int = 64            # pixels a side
    scale: float = 1.0        # smallest share of the frame's area that a training crop keeps; 1: the whole frame
    flip: bool = False        # mirror half of the training clips (never where captions say left or right)
    views: int = 1            # fixed views (frames, crop, flip) a clip has; 0: a new one every epoch
    cache: bool = True        # decode once, into a memory-mapped file beside the annotations
    cache_frames: int = 32    # frames a video kept in that cache, evenly spaced
    cache_size: int = 0       # their short side at most; 0: size
    workers: int = 0          # loader processes

    def __post_init__(self):
        for name, least in (("frames", 1), ("size", 1), ("views", 0), ("cache_size", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} {getattr(self, name)}: wants at least {least}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale {self.scale}: wants a share of the area, above 0 and up to 1")
        if self.cache and self.cache_frames < self.frames:
            raise ValueError(f"data.cache_frames {self.cache_frames}: wants at least data.frames, {self.frames}")


class Cache:
    """Decoded videos in one memory-mapped file: cache[path] -> (n, 3, h, w) uint8 array, not a copy."""

    def __init__(self, path: str):
        self.path = path
        with open(path + ".json") as f:
            index = json.load(f)
        self.place = {video: (at, shape) for video, at, shape in index}
        self.data = np.memmap(path + ".bin", np.uint8, mode="r")

    def __getitem__(self, video: str) -> np.ndarray:
        at, shape = self.place[video]
        return self.data[at:at + np.prod(shape)].reshape(shape)

    def __reduce__(self):                          # another process opens the file; it is not sent the pixels
        return Cache, (self.path,)


def decode_cache(rows: list[Row], cfg: DataConfig, folder: str) -> Cache:
    """
    The decoded videos of rows, from `folder` if they are there, else decoded into it on all cores. A video that has
    changed since is another cache. Of several processes one should call this first.
    """
    videos = list(dict.fromkeys(row.video for row in rows))
    size = cfg.cache_size or cfg.size
    stats = [os.stat(video) for video in videos]
    key = [cfg.cache_frames, size, [(v, s.st_size, s.st_mtime_ns) for v, s in zip(videos, stats, strict=True)]]
    path = os.path.join(folder, "decoded_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest())
    if os.path.exists(path + ".json"):
        return Cache(path)

    index, failures, at = [], [], 0
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix="decoding_", delete=False)
    except OSError as error:
        raise ValueError(f"{folder}: no decode cache can be written ({error.strerror}); pass --data.no-cache") from None
    try:
        with file:
            read = partial(_read_for_cache, cfg.cache_frames, size)
            for video, frames in zip(videos, in_parallel(read, videos, "decoding"), strict=True):
                if isinstance(frames, str):
                    failures.append(frames)
                    continue
                file.write(frames.data)
                index.append((video, at, frames.shape))
                at += frames.nbytes
        if failures:
            raise ValueError(f"{failures[0]} ({len(failures)} of {len(videos)} videos cannot be read)")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path + ".bin")
        write_atomically(path + ".json", json.dumps(index))                 # last: it says that the other is whole
    finally:
        if os.path.exists(file.name):
            os.remove(file.name)
    return Cache(path)


def _read_for_cache(count: int, size: int, video: str) -> np.ndarray | str:
    """Frames (n, 3, h, w), or what is wrong with the video: all that fail are counted before the run stops."""
    try:
        return decode(video, lambda total: pick(min(count, total), total), size).numpy()
    except (ValueError, OSError) as error:
        return str(error)


@dataclass
class Sample:
    video: Tensor                                  # (T, 3, S, S) uint8
    caption: str
    still: str                                     # what each frame shows; the caption where the file does not say
    media: int                                     # Row.media
    clip: int                                      # row
    view: int                                      # which frames, crop and flip of it


class Clips(torch.utils.data.Dataset):
    """
    clips[n], for any n >= 0, is sample n of a run: every epoch is a permutation of the rows. It is a function of
    (seed, n) alone, and its view of (seed, row, view). With train=False clips[n] is row n as it is scored.
    """

    def __init__(self, rows: list[Row], cfg: DataConfig, seed: int = 0, train: bool = True,
                 cache_folder: str | None = None):
        self.rows, self.cfg, self.seed, self.train = rows, cfg, seed, train
        self.cache = decode_cache(rows, cfg, cache_folder or os.path.dirname(cfg.train) or ".") if cfg.cache else None
        self.epoch, self.order = -1, None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n: int) -> Sample:
        if not self.train:
            frames = self.read(self.rows[n], "middle", None)
            return self.sample(n, 0, test_view(frames, self.cfg.size), self.rows[n].captions[0])
        if n < 0:
            raise IndexError(f"sample {n} of a run")
        epoch, i = divmod(n, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return self.view(int(self.order[i]), epoch % self.cfg.views if self.cfg.views else epoch)

    def view(self, clip: int, view: int) -> Sample:
        """View `view` of row `clip`, as it is trained on."""
        row = self.rows[clip]
        rng = np.random.default_rng((self.seed, clip, view, 1))
        caption = row.captions[rng.integers(len(row.captions))]
        frames = self.read(row, "random", rng)
        return self.sample(clip, view, train_view(frames, self.cfg.size, self.cfg.scale, self.cfg.flip, rng), caption)

    def read(self, row: Row, sample: str, rng) -> Tensor:
        if self.cache is None:
            return read_frames(row.video, self.cfg.frames, sample, rng)
        video = self.cache[row.video]
        try:
            chosen = pick(self.cfg.frames, len(video), sample, rng)
        except ValueError as error:
            raise ValueError(f"{row.video}: {error}") from None
        return torch.from_numpy(np.asarray(video)[chosen])

    def sample(self, clip: int, view: int, video: Tensor, caption: str) -> Sample:
        row = self.rows[clip]
        return Sample(video, caption, row.still or caption, row.media, clip, view)


@dataclass
class Batch:
    video: Tensor                                  # (B, T, 3, S, S) uint8
    ids: Tensor                                    # (B, L) int64
    captions: list[str]
    stills: list[str]
    media: Tensor                                  # (B,) int64, equal for clips of one file
    clip: Tensor                                   # (B,) int64
    view: Tensor                                   # (B,) int64
    seed: int                                      # of all that is drawn at random about this batch

    def to(self, device, non_blocking: bool = False) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking)
                                for name, value in values.items() if isinstance(value, Tensor)})


def collate(samples: list[Sample], tokenizer: Tokenizer, length: int, seed: int, sep: bool = False) -> Batch:
    captions = [s.caption for s in samples]
    return Batch(
        video=torch.stack([s.video for s in samples]),
        ids=encode(tokenizer, captions, length, sep), captions=captions, stills=[s.still for s in samples],
        media=torch.tensor([s.media for s in samples]), clip=torch.tensor([s.clip for s in samples]),
        view=torch.tensor([s.view for s in samples]), seed=seed,
    )


def command(name: str, run):
    """Runs a command. What is wrong with its input is one line, not a traceback, unless TRACEBACK is set."""
    try:
        run()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"{name}: {str(error).strip().splitlines()[-1]}")          # a loader process sends its traceback along


if __name__ == "__main__":
    command("data.py", lambda: tyro.extras.subcommand_cli_from_dict({"sprites": write_sprites},
                                                                    description="The embedded data set."))
