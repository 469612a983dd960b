"""
Data: text -> ids; annotation rows and the frames of their videos -> samples -> batches.

A sample is a function of (seed, n) alone, so a run can stop anywhere and any number of processes read the same clips.
Nothing is replaced in silence: in training a video that cannot be read gives its place to another, caption and id with
it, and the sample says so; everywhere else it is an error that names it.
"""

import hashlib
import json
import math
import os
import re
import signal
import sqlite3
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from urllib.parse import quote

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from decoding import Jpegs, decode, first_frames, pick, read_frames, resize, test_view, to_jpeg, train_view
from teacher import demand, one_line, read_json

# ---------------------------------------------------------------------------------------------------------------------
# Files

def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ordinary():
    """What a process of a pool begins with: one thread, and SIGTERM as it was before training had a use for it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def in_parallel(function, items, label: str):
    """function(item) for each item, in order, on all cores and with a progress bar; a worker that dies raises."""
    count = min(cores(), len(items))
    with ProcessPoolExecutor(count, initializer=ordinary) as pool:
        yield from tqdm(pool.map(function, items, chunksize=4), label, total=len(items), disable=None)


@contextmanager
def appearing(path: str):
    """A file to write bytes to, which appears at `path` whole or not at all, also where the machine loses its power."""
    folder, name = os.path.split(path)
    with tempfile.NamedTemporaryFile(dir=folder or ".", prefix=name + ".", suffix=".tmp", delete=False) as f:
        try:
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)                # temporary files are private
            os.replace(f.name, path)
        except BaseException:
            os.remove(f.name)
            raise
    directory = os.open(folder or ".", os.O_RDONLY)         # the name too must survive
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_atomically(path: str, text: str):
    """The file appears whole or not at all."""
    with appearing(path) as f:
        f.write(text.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clean(caption: str) -> str:
    """UMT's caption normalisation (multi_modality/dataset/utils.py, pre_text)."""
    caption = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split())


def train_tokenizer(captions: Iterable[str], path: str, vocab: int = 2000, more: Iterable[str] = ()):
    """
    A BERT word-piece tokenizer of at most `vocab` entries: the most frequent words whole, any other word in letters.
    The same captions give the same file, which the library's own trainer does not promise. What only the texts of
    `more` have comes after all that the captions have, and leaves the captions' ids as they are.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()

    def letters_and_words(texts):
        words = Counter(word for text in texts
                        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
        letters = sorted(set("".join(words)))
        return [*letters, *(f"##{letter}" for letter in letters)], sorted(words, key=lambda word: (-words[word], word))

    letters, words = letters_and_words(captions)
    if len(SPECIALS) + len(letters) > vocab:
        raise ValueError(f"a vocabulary of {vocab} has no room for {len(SPECIALS) + len(letters)} special tokens and "
                         "letters")
    more_letters, more_words = letters_and_words(more)
    pieces = [*SPECIALS, *letters, *words, *more_letters, *more_words]
    pieces = list(dict.fromkeys(pieces))[:vocab]                            # a word of one letter is there already
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


def encode_answers(tokenizer: Tokenizer, answers: list[str], length: int) -> Tensor:
    """
    A texts to be said -> (A, L) int64: [CLS], the pieces, [SEP], padded with [PAD]. What is too long is cut, and then
    has no [SEP]: its end is not to be learned.
    """
    pad, cls, end = (tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]"))
    ids = torch.full((len(answers), length), pad)                           # (A, L)
    for row, answer in zip(ids, answers, strict=True):
        pieces = [cls, *tokenizer.encode(answer, add_special_tokens=False).ids, end][:length]
        row[:len(pieces)] = torch.tensor(pieces)
    return ids


def decode_answers(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """(A, L) ids, with or without [CLS], up to the first [SEP] -> texts, their pieces joined to words."""
    said = []
    for row in ids.tolist():
        words = []
        for piece in (tokenizer.id_to_token(i) or "[UNK]" for i in row):    # a model may have more than its tokenizer
            if piece == "[SEP]":
                break
            if piece.startswith("##") and words:
                words[-1] += piece[2:]
            elif piece not in ("[PAD]", "[CLS]"):
                words.append(piece)
        said.append(" ".join(words))
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Annotations

@dataclass
class Question:
    """What is asked about a clip, and the answers to learn. Without a text the answers are captions of it."""
    text: str                                      # cleaned
    answers: dict[str, float]                      # answer -> weight
    id: str | int = ""
    kind: str = ""                                 # of question, if the file says
    where: str = ""                                # file and row


@dataclass
class Row:
    """One entry of an annotation file."""
    video: str                                     # path
    captions: list[str]                            # cleaned
    still: str | None                              # what each frame shows, if the file says
    media: int                                     # media_id of the video
    questions: list[Question] = field(default_factory=list)
    right: int | None = None                       # multiple choice: the place of the caption that is true
    where: str = ""                                # file and row


class NoListError(ValueError):
    """JSON, but no list."""


def elements(f, size: int = 2 ** 20):
    """The elements of the JSON list in a text file, one after the other: a list may be longer than memory."""
    decoder, space = json.JSONDecoder(), re.compile("[ \t\r\n]*")
    text, before, at, first = f.read(size), 0, 0, True                      # text[at] is character before + at
    while text and space.fullmatch(text):
        text, before = f.read(size), before + len(text)
    if text[space.match(text).end():][:1] != "[":
        f.seek(0)
        raise NoListError(short(json.load(f)))
    at = text.index("[") + 1
    while True:
        try:
            i = space.match(text, at).end()
            if text[i:i + 1] == "]":
                if text[i + 1:].strip() or f.read().strip():
                    raise ValueError(f"Extra data: character {before + i + 1}")
                return
            if not first:
                if text[i:i + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, i)
                i = space.match(text, i + 1).end()
            entry, i = decoder.raw_decode(text, i)
            if text[i:i + 1] in ("", ".", "e", "E"):                        # of a number there may be more
                raise json.JSONDecodeError("Expecting ',' or ']'", text, i)
        except json.JSONDecodeError as error:
            # What is wrong long before the end is wrong, but for a text, which is as long as it is.
            cut = len(text) - error.pos < size + 16 or error.msg.startswith("Unterminated string")
            more = f.read(size) if cut else ""
            if not more:
                raise ValueError(f"{error.msg}: character {before + error.pos}") from None
            text, before, at = text[at:] + more, before + at, 0
            continue
        at, first = i, False
        yield entry


def list_entries(path: str):
    """
    What an annotation file lists, one after the other: a JSON list, a .jsonl of one object a line, or VindLU's SQLite,
    a table annos(id, image or video, caption), in a .sqlite or .db.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such annotation file")
    line, entry = "", (nothing := object())
    try:
        if path.endswith((".sqlite", ".db")):
            with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as base:
                base.row_factory = sqlite3.Row
                for row in base.execute("select * from annos order by id"):
                    yield (entry := dict(row))
        else:
            with open(path, encoding="utf-8") as f:
                if not path.endswith(".jsonl"):
                    for entry in elements(f):
                        yield entry
                else:
                    for i, text in enumerate(f, 1):
                        line = f", line {i}"
                        if text.strip():
                            yield (entry := json.loads(text))
    except sqlite3.Error as error:
        raise ValueError(f"{path}: not SQLite with a table annos ({error})") from None
    except NoListError as error:
        raise ValueError(f"{path}: wanted a list of rows, got {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}{line}: not JSON ({error})") from None
    if entry is nothing:
        raise ValueError(f"{path}: wanted a list of rows, got []")


def read_entries(path: str):
    """The objects of an annotation file, each with its place."""
    for i, entry in enumerate(list_entries(path)):
        where = f"{path}, row {i}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: wanted an object, got {short(entry)}")
        yield where, entry


def file_names(entry: dict, where: str) -> list[str]:
    """Under "video" or, as in older files, "image": a name, or a list of them."""
    names = entry.get("video", entry.get("image"))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f'{where}: wanted a file name under "video" or "image", got {short(entry)}')
    return names


def texts(entry: dict, key: str, where: str) -> list[str]:
    """Under `key` a text or a list of them, none of them empty once it is cleaned; as they stand there."""
    found = entry.get(key)
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f'{where}: wanted a text or a list of texts under "{key}", got {short(found)}')
    for text in found:
        if not clean(text):
            raise ValueError(f"{where}: empty {key} {text!r}")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{where}: half a character in {key} {text!r}")
    return found


def media_id(video: str) -> int:
    """63 bits that stand for one file: in two corpora a name may be that of two."""
    return int.from_bytes(hashlib.blake2b(os.path.abspath(video).encode(), digest_size=8).digest(), "big") >> 1


def check_media(rows: list[Row], root: str):
    """FileNotFoundError where videos are not there: the first is named, all are counted."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder, wanted as the root of the videos in "
                                f"{rows[0].where.rpartition(', row')[0]}")
    there = {video: os.path.isfile(video) for video in {row.video for row in rows}}
    absent = [row for row in rows if not there[row.video]]
    if absent:
        raise FileNotFoundError(f"{absent[0].where}: no file {absent[0].video}"
                                f" ({len(absent)} of {len(rows)} rows lack theirs)")


def annotated(path: str, root: str):
    """
    The rows of {"video" or "image": name under root, "caption": str or list of str}, as UMT's and VindLU's, in order.

    Where the name is a list, the captions being true of several videos, each is a row; such rows share their `where`.
    """
    for where, entry in read_entries(path):
        captions = [clean(text) for text in texts(entry, "caption", where)]
        still = clean(entry["still"]) if isinstance(entry.get("still"), str) else None
        for name in file_names(entry, where):
            video = os.path.join(root, name)
            yield Row(video, captions, still or None, media_id(video), where=where)


def read_annotations(path: str, root: str, check: bool = True) -> list[Row]:
    """The rows of an annotation file whose videos are under root. check: whether these must be there."""
    rows = list(annotated(path, root))
    if check:
        check_media(rows, root)
    return rows


class Rows(Sequence):
    """
    Rows in a file: rows[i] -> Row. However many they are, a process that holds this holds 8 bytes of page cache for
    each, and shares them with all others.
    """

    def __init__(self, path: str):
        self.path = path
        self.digest = read_json(path + ".json")["digest"]                   # of all rows
        self.text = np.memmap(path + ".jsonl", np.uint8, mode="r")
        self.at = np.memmap(path + ".at", np.int64, mode="r")               # (rows + 1,), where each begins

    def __len__(self) -> int:
        return len(self.at) - 1

    def __getitem__(self, i: int) -> Row:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        i %= len(self)
        return Row(**json.loads(self.text[self.at[i]:self.at[i + 1]].tobytes()))

    def __reduce__(self):                          # another process maps the file; it is not sent the rows
        return Rows, (self.path,)


ROWS_VERSION = 1       # of what is written of a row


def write_rows(corpora: list[tuple[str, str]], folder: str) -> Rows:
    """
    The rows of all corpora, (annotation file, folder of its videos) each, from `folder` if they are there, else read
    and written into it. A file that has changed since is read again. Of several processes one should call this first.
    """
    for path, root in corpora:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such annotation file")
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder, wanted as the root of the videos in {path}")
    stats = [os.stat(path) for path, _ in corpora]
    key = [ROWS_VERSION] + [(os.path.abspath(path), root, s.st_size, s.st_mtime_ns)
           for (path, root), s in zip(corpora, stats, strict=True)]
    path = os.path.join(folder, "rows_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest())
    if os.path.exists(path + ".json"):
        return Rows(path)
    os.makedirs(folder, exist_ok=True)
    at, digest = array("q", [0]), hashlib.blake2b(digest_size=16)
    with appearing(path + ".jsonl") as f:
        for annotations, root in corpora:
            for row in tqdm(annotated(annotations, root), annotations, unit=" rows", mininterval=1, disable=None):
                line = json.dumps(vars(row), default=vars).encode() + b"\n"
                digest.update(line)
                f.write(line)
                at.append(at[-1] + len(line))
    with appearing(path + ".at") as f:
        f.write(at)
    write_atomically(path + ".json", json.dumps({"digest": digest.hexdigest()}))    # last: it says the others are whole
    return Rows(path)


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Clips

@dataclass
class DataConfig:
    """What is read, and how a clip is cut from it."""
    train: str = "data/sprites/sprites_train.json"    # annotation file: a JSON list of {"video", "caption"}
    root: str = "data/sprites/videos"                 # folder that its "video" names are relative to
    more: tuple[str, ...] = ()                        # further corpora of videos, each FILE=FOLDER
    images: tuple[str, ...] = ()                      # corpora of images, each FILE=FOLDER: clips of one frame
    frames: int = 8           # frames a clip (T)
    size: int = 64            # pixels a side
    seconds: float = 0.0      # of a video only its first so many seconds; 0: all of it
    scale: float = 1.0        # smallest share of the frame's area that a training crop keeps; 1: the whole frame
    flip: bool = False        # mirror half of the training clips (never where captions say left or right)
    views: int = 1            # fixed views (frames, crop, flip) a clip has; 0: a new one every epoch
    cache: bool = True        # decode once, into a memory-mapped file beside the annotations
    cache_frames: int = 32    # frames a video kept in that cache, evenly spaced
    cache_size: int = 0       # their short side at most; 0: size
    cache_quality: int = 0    # they are kept as JPEGs of this quality, 1 to 100; 0: as they are
    workers: int = 0          # loader processes
    on_device: bool = False   # training crops go to the device as they are, and are resized there, not by the loader
    max_bad: float = 0.1      # share of the videos asked for that may be unreadable; past it the run ends

    def __post_init__(self):
        for corpus in (*self.more, *self.images):
            if not all(corpus.partition("=")[::2]):
                raise ValueError(f"a corpus wants to be FILE=FOLDER, is {corpus!r}")
        for name, least in (("frames", 1), ("size", 1), ("seconds", 0), ("views", 0), ("cache_size", 0),
                            ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} {getattr(self, name)}: wants at least {least}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale {self.scale}: wants a share of the area, above 0 and up to 1")
        if self.images and self.frames == 1:
            raise ValueError("data.frames 1 beside data.images: videos of one frame are images, give them as such")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"data.max_bad {self.max_bad}: wants a share, from 0 to 1")
        if not 0 <= self.cache_quality <= 100:
            raise ValueError(f"data.cache_quality {self.cache_quality}: wants 1 to 100, or 0 for no JPEGs")
        if self.cache and self.cache_frames < self.frames:
            raise ValueError(f"data.cache_frames {self.cache_frames}: wants at least data.frames, {self.frames}")

    def corpora(self, images: bool = False) -> list[tuple[str, str]]:
        """(annotation file, folder) of each corpus of videos, or of images."""
        listed = [tuple(corpus.partition("=")[::2]) for corpus in (self.images if images else self.more)]
        return listed if images else [(self.train, self.root), *listed]


class Cache:
    """
    Decoded videos in one memory-mapped file: cache[path] -> (n, 3, h, w) uint8 array, not a copy, or Jpegs. ValueError
    for one that could not be read.
    """

    def __init__(self, path: str):
        self.path = path
        with open(path + ".json") as f:
            # (video, at, shape), (video, at, [sizes of JPEGs]), or (video, None, what is wrong with it)
            self.index = json.load(f)
        self.place = {video: (at, shape) for video, at, shape in self.index}
        self.data = np.memmap(path + ".bin", np.uint8, mode="r")

    def __getitem__(self, video: str) -> "np.ndarray | Jpegs":
        at, shape = self.place[video]
        if at is None:
            raise ValueError(shape)
        if isinstance(shape[0], list):
            return Jpegs(self.data[at:at + sum(shape[0])], shape[0])
        return self.data[at:at + np.prod(shape)].reshape(shape)

    def __reduce__(self):                          # another process opens the file; it is not sent the pixels
        return Cache, (self.path,)


CACHE_VERSION = 2      # of what decoding makes of a video: 2 turns it as it is to be shown


def decode_cache(rows: Sequence[Row], cfg: DataConfig, folder: str) -> Cache:
    """
    The decoded videos of rows, from `folder` if they are there, else decoded into it on all cores. A video that has
    changed since is another cache. Of several processes one should call this first.

    ValueError where more than cfg.max_bad of them cannot be read: the first is named.
    """
    videos = {}                                    # path -> its first row
    for row in rows:
        videos.setdefault(row.video, row.where)
    size = cfg.cache_size or cfg.size
    stats = [os.stat(video) if os.path.isfile(video) else None for video in videos]
    how = [CACHE_VERSION, cfg.cache_frames, size, *[cfg.seconds] * (cfg.seconds > 0)]
    how += [{"quality": cfg.cache_quality}] * (cfg.cache_quality > 0)
    key = [*how, [(v, *((s.st_size, s.st_mtime_ns) if s else ())) for v, s in zip(videos, stats, strict=True)]]
    path = os.path.join(folder, "decoded_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest())

    def check(index):
        bad = [(video, reason) for video, at, reason in index if at is None]
        if len(bad) > min(cfg.max_bad * len(index), len(index) - 1):
            raise ValueError(f"{videos[bad[0][0]]}: {bad[0][1]} ({len(bad)} of {len(index)} videos cannot be read, "
                             f"more than data.max_bad, {cfg.max_bad:g})")

    if os.path.exists(path + ".json"):
        cache = Cache(path)
        check(cache.index)
        return cache
    index, at = [], 0
    try:
        with appearing(path + ".bin") as f:
            read = partial(_read_for_cache, cfg.cache_frames, size, cfg.seconds, cfg.cache_quality)
            for video, frames in zip(videos, in_parallel(read, list(videos), "decoding"), strict=True):
                if isinstance(frames, str):
                    index.append((video, None, frames))
                    continue
                jpegs = isinstance(frames, list)
                index.append((video, at, [[*map(len, frames)]] if jpegs else frames.shape))
                at += f.write(b"".join(frames) if jpegs else frames.data)
            check(index)
    except OSError as error:
        raise ValueError(f"{folder}: no decode cache can be written ({error.strerror}); pass --data.no-cache") from None
    write_atomically(path + ".json", json.dumps(index))                     # last: it says that the other is whole
    return Cache(path)


def _read_for_cache(count: int, size: int, seconds: float, quality: int, video: str) -> np.ndarray | list[bytes] | str:
    """
    Frames (n, 3, h, w), or n JPEGs, or what is wrong with the video: all that fail are counted before the run stops.
    """
    def choose(times):
        total = first_frames(times, seconds)
        return pick(min(count, total), total)

    try:
        frames = decode(video, choose, size).numpy()
        return [to_jpeg(frame, quality) for frame in frames] if quality else frames
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
    questions: list[Question] = field(default_factory=list)
    lost: list[dict] = field(default_factory=list)     # what was asked for before it and could not be read, and why
    size: int = 0                                  # S, where the video may be a crop yet, (T, 3, h, w)


class UnreadableError(ValueError):
    """A video that cannot be read; `about`: {"where", "video", "reason"}."""

    def __init__(self, row: Row, error: Exception):
        super().__init__(f"{row.where}: {error}")
        self.about = {"where": row.where, "video": row.video, "reason": str(error)}


class Clips(torch.utils.data.Dataset):
    """
    clips[n], for any n >= 0, is sample n of a run: every epoch is a permutation of the rows. It is a function of
    (seed, n) alone, and its view of (seed, row, view). With train=False clips[n] is row n as it is scored.

    In training a row whose video cannot be read hands its place to another, drawn by (seed, n) too, so that all other
    samples are what they would be; it is listed in the sample's `lost`.
    """

    def __init__(self, rows: Sequence[Row], cfg: DataConfig, seed: int = 0, train: bool = True,
                 cache_folder: str | None = None, first: int = 0):
        """first: the number of the first row among those of the run, where there are other Clips beside these."""
        self.rows, self.cfg, self.seed, self.train, self.first = rows, cfg, seed, train, first
        self.cache = decode_cache(rows, cfg, cache_folder or os.path.dirname(cfg.train) or ".") if cfg.cache else None
        self.epoch, self.order = -1, None

    def __len__(self):
        return len(self.rows)

    def row(self, clip: int) -> Row:
        """Of a clip's number, as samples have it."""
        return self.rows[clip - self.first]

    def __getitem__(self, n: int) -> Sample:
        if not self.train:
            frames = self.read(self.rows[n], "middle", None)
            return self.sample(n, 0, test_view(frames, self.cfg.size), self.rows[n].captions[0])
        if n < 0:
            raise IndexError(f"sample {n} of a run")
        epoch, i = divmod(n, len(self.rows))
        if epoch != self.epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            self.epoch, self.order = epoch, order.astype(np.int32)          # as every loader process has one
        clip, lost = int(self.order[i]), []
        others = np.random.default_rng((self.seed, n, self.first, 2))
        while True:
            try:
                sample = self.view(clip, epoch % self.cfg.views if self.cfg.views else epoch)
                return replace(sample, lost=lost)
            except UnreadableError as error:
                lost.append(error.about)
                if len(lost) == 10:
                    raise ValueError(f"{error} (and none of 9 others drawn before it could be read)") from None
            clip = int(others.integers(len(self.rows)))

    def view(self, clip: int, view: int) -> Sample:
        """View `view` of row `clip`, as it is trained on. UnreadableError where its video cannot be read."""
        row = self.rows[clip]
        rng = np.random.default_rng((self.seed, self.first + clip, view, 1))
        caption = row.captions[rng.integers(len(row.captions))]
        try:
            frames = self.read(row, "random", rng)
        except (ValueError, OSError) as error:
            raise UnreadableError(row, error) from None
        cfg = self.cfg
        video = train_view(frames, cfg.size, cfg.scale, cfg.flip, rng, cfg.on_device)
        return self.sample(clip, view, video, caption)

    def read(self, row: Row, sample: str, rng) -> Tensor:
        if self.cache is None:
            return read_frames(row.video, self.cfg.frames, sample, rng, seconds=self.cfg.seconds)
        video = self.cache[row.video]
        chosen = pick(self.cfg.frames, len(video), sample, rng)
        return torch.from_numpy(np.asarray(video[chosen]))

    def sample(self, clip: int, view: int, video: Tensor, caption: str) -> Sample:
        row = self.rows[clip]
        return Sample(video, caption, row.still or caption, row.media, self.first + clip, view, row.questions,
                      size=self.cfg.size)


class Mix(torch.utils.data.Dataset):
    """
    Clips of videos and of images as one. A batch is of one kind; an epoch has as many of each as its clips can fill, in
    an order that is a function of (seed, epoch), so that mix[n] is one of (seed, n).
    """

    def __init__(self, videos: Clips, images: Clips, batch: int):
        self.kinds, self.batch, self.seed = (videos, images), batch, videos.seed
        self.share = [max(1, len(clips) // batch) for clips in self.kinds]  # batches an epoch
        self.epoch, self.order = -1, None

    def __len__(self):
        return sum(map(len, self.kinds))

    def row(self, clip: int) -> Row:
        return self.kinds[clip >= self.kinds[1].first].row(clip)

    def __getitem__(self, n: int) -> Sample:
        batch, i = divmod(n, self.batch)
        epoch, at = divmod(batch, sum(self.share))
        if epoch != self.epoch:
            kinds = np.repeat((0, 1), self.share)
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch, 3)).permutation(kinds)
        kind = int(self.order[at])
        before = epoch * self.share[kind] + int((self.order[:at] == kind).sum())
        return self.kinds[kind][before * self.batch + i]


@dataclass
class Batch:
    video: Tensor | None                           # (B, T, 3, S, S) uint8; None while there are crops
    ids: Tensor                                    # (B, L) int64; of questions (Q, L)
    captions: list[str]
    stills: list[str]
    media: Tensor                                  # (B,) int64, equal for clips of one file
    clip: Tensor                                   # (B,) int64, on the host
    view: Tensor                                   # (B,) int64, on the host
    seed: int                                      # of all that is drawn at random about this batch
    n: int = 0                                     # of its first sample, among a stage's
    rows: Tensor | None = None                     # (Q,) int64, the clip of the batch that question q is about
    answers: Tensor | None = None                  # (A, L') int64
    asked: Tensor | None = None                    # (A,) int64, the question that answer a belongs to
    weight: Tensor | None = None                   # (A,) fp32
    lost: list[dict] = field(default_factory=list)     # of its samples
    crops: Tensor | None = None                    # uint8, the clips one after the other, to become the video
    shapes: list[tuple] = field(default_factory=list)      # (T, 3, h, w) of each
    size: int = 0                                  # S

    def pin_memory(self) -> "Batch":
        """For the loader: from pinned memory a copy to the device is not waited for."""
        return self.tensors(Tensor.pin_memory)

    def to(self, device, non_blocking: bool = False) -> "Batch":
        """All but clip and view, which the host reads without waiting for the device. Crops are resized there."""
        there = replace(self, clip=None, view=None).tensors(lambda x: x.to(device, non_blocking=non_blocking))
        there = replace(there, clip=self.clip, view=self.view)
        if self.crops is None:
            return there
        crops = there.crops.split([math.prod(shape) for shape in self.shapes])
        video = [resize(crop.view(shape), (self.size,) * 2) for crop, shape in zip(crops, self.shapes, strict=True)]
        return replace(there, video=torch.stack(video), crops=None, shapes=[])

    def tensors(self, change) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


def collate(samples: list[Sample], tokenizer: Tokenizer, length: int, seed: int, sep: bool = False,
            answer_length: int = 0) -> Batch:
    """With an answer_length the ids are those of the samples' questions, and their answers are there too."""
    captions, size = [s.caption for s in samples], samples[0].size
    crops, shapes = None, [tuple(s.video.shape) for s in samples]
    if size and any(shape[2:] != (size, size) for shape in shapes):
        crops = torch.cat([s.video.flatten() for s in samples])
    batch = Batch(
        video=torch.stack([s.video for s in samples]) if crops is None else None,
        crops=crops, shapes=shapes if crops is not None else [], size=size,
        ids=torch.empty(0), captions=captions, stills=[s.still for s in samples],
        media=torch.tensor([s.media for s in samples]), clip=torch.tensor([s.clip for s in samples]),
        view=torch.tensor([s.view for s in samples]), seed=seed, lost=[about for s in samples for about in s.lost],
    )
    if not answer_length:
        return replace(batch, ids=encode(tokenizer, captions, length, sep))
    questions = [(b, q) for b, s in enumerate(samples) for q in s.questions]
    answers = [(i, answer, weight) for i, (_, q) in enumerate(questions) for answer, weight in q.answers.items()]
    return replace(
        batch, ids=encode(tokenizer, [q.text for _, q in questions], length, sep),
        rows=torch.tensor([b for b, _ in questions]), asked=torch.tensor([i for i, _, _ in answers]),
        answers=encode_answers(tokenizer, [answer for _, answer, _ in answers], answer_length),
        weight=torch.tensor([weight for _, _, weight in answers]),
    )


def command(name: str, run):
    """Runs a command. What is wrong with its input is one line, not a traceback, unless TRACEBACK is set."""
    try:
        run()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"{name}: {str(error).strip().splitlines()[-1]}")          # a loader process sends its traceback along


if __name__ == "__main__":              # `data.py sprites --out FOLDER` is `sprites.py --out FOLDER`
    import tyro

    from sprites import write_sprites
    command("data.py", lambda: tyro.extras.subcommand_cli_from_dict({"sprites": write_sprites},
                                                                    description="The embedded data set."))
