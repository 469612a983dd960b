"""
Annotation files -> `Annotation` objects; and the table of benchmarks: their files, evaluation settings, fine-tuning
recipes and readers.

An annotation file is a JSON list of objects, a file with one object per line, or VindLU's SQLite database.
All files of a benchmark are under one folder, --data-root, in VindLU's layout. UMT uses the same annotation files:

    DATA_ROOT/anno_downstream/msrvtt_ret_train9k.json   (or DATA_ROOT/msrvtt_ret_train9k.json; also .jsonl and .sqlite)
    DATA_ROOT/videos_images/msrvtt/video0.mp4           (or another folder of the task's media_dirs)

The recipes are UMT's (OpenGVLab/unmasked_teacher, multi_modality/exp/finetuning, the 25M files). The recipes of
captioning and of the embedded data set are our own. T2V is text-to-video retrieval, which UMT's logs call img_r;
V2T is txt_r.
"""

import codecs
import difflib
import hashlib
import json
import mmap
import os
import re
import sqlite3
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from urllib.parse import quote

import ijson
import numpy as np
from tqdm import tqdm

from files import atomic_write, escape_control, read_json, write_json
from runtime import print0

# ---------------------------------------------------------------------------------------------------------------------
# Annotations

def shorten(value) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def normalize_caption(caption: str) -> str:
    """Normalise a text as UMT does (multi_modality/dataset/utils.py, pre_text)."""
    caption = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower())
    caption = caption.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(caption.split())


@dataclass
class Question:
    """A question about a clip and its answers. In captioning the text is empty and the answers are the captions."""
    text: str                                      # normalised
    answers: dict[str, float]                      # answer -> weight; the weights sum to 1
    id: str | int = ""
    question_type: str = ""                        # empty if the file has none
    source: str = ""                               # annotation file and row, for messages


@dataclass
class Annotation:
    """One video or image with its texts."""
    video: str                                     # path
    captions: list[str]                            # normalised
    frame_caption: str | None                      # a caption that is true of each single frame, if the file has one
    media_id: int                                  # media_id(video)
    questions: list[Question] = field(default_factory=list)
    correct_index: int | None = None               # multiple choice: index of the true caption
    source: str = ""                               # annotation file and row, for messages


HALF_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")      # a high surrogate without its low one


def _check_surrogates(path: str):
    """Raise a ValueError for half a surrogate pair in a JSON file, which ijson would read as "?" without an error."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in HALF_PAIR.finditer(content):
            start = match.start()
            before = content[max(0, start - 64):start]
            if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:             # otherwise the backslash is escaped
                raise ValueError(f"{path}, byte {start}: must be valid Unicode, got half a surrogate pair "
                                 f"{match.group().decode()}")


def _open_text(path: str):
    """Open a UTF-8 file for reading bytes, after its byte-order mark if it has one."""
    f = open(path, "rb")
    if f.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        f.seek(0)
    return f


def _iter_json_list(path: str) -> Iterator:
    count = 0
    if os.path.getsize(path):
        _check_surrogates(path)
    with _open_text(path) as f:
        start = f.tell()
        try:
            if next(ijson.basic_parse(f))[0] == "start_array":
                f.seek(start)
                for entry in ijson.items(f, "item", use_float=True):
                    yield entry
                    count += 1
                return
        except (ijson.JSONError, ValueError) as error:                      # ValueError: not UTF-8
            reason = re.split(r"\n|\\n", str(error).removeprefix("b'"))[0]   # the rest shows the bytes around it
            raise ValueError(f"{path}, row {count}: not JSON ({reason})") from None
        f.seek(start)
        raise ValueError(f"{path}: must hold a list of rows, got {shorten(f.read(100).decode(errors='replace'))}")


def _iter_json_lines(path: str) -> Iterator:
    number = 0
    try:
        with _open_text(path) as f:
            for line in f:
                number += 1
                if line.strip():
                    yield json.loads(line.decode())
    except ValueError as error:                                             # not JSON or not UTF-8
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def _is_json_lines(path: str) -> bool:
    """Say whether a file has a value on each line rather than one list. The content decides, for many are misnamed."""
    with _open_text(path) as f:
        lines = filter(bytes.strip, iter(lambda: f.readline(2 ** 20), b""))     # a list may be a line of gigabytes
        first, second = (next(lines, b"").lstrip()[:1] for _ in range(2))
    return first != b"[" if path.endswith(".jsonl") else first == second and first in (b"{", b'"')


def _iter_sqlite(path: str) -> Iterator[dict]:
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            for row in database.execute("select * from annos order by id"):
                yield dict(row)
    except sqlite3.Error as error:
        raise ValueError(f"{path}: must be SQLite with a table annos ({error})") from None


def check_annotation_file(path: str):
    """Raise a FileNotFoundError if there is no such file. It says if the folder is not there either."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path}: must be an annotation file, got a folder")
    if not os.path.isfile(path):
        hint = "" if os.path.isdir(folder) else f", nor a folder {folder}"
        raise FileNotFoundError(f"{path}: there is no such annotation file{hint}")


def iter_annotations(path: str) -> Iterator:
    """
    Yield the entries of an annotation file as they are in the file; a file without entries is an error.

    The file is a JSON list, a file with one JSON value per line, or VindLU's SQLite in a .sqlite or .db file, a table
    annos(id, image or video, caption). JSON lists are streamed, because they may be larger than memory. A byte-order
    mark before UTF-8 is skipped.

    The parser of JSON lists is stricter than Python's: NaN, Infinity and integers beyond 64 bits are errors.
    """
    check_annotation_file(path)
    if path.endswith((".sqlite", ".db")):
        entries = _iter_sqlite(path)
    else:
        entries = _iter_json_lines(path) if _is_json_lines(path) else _iter_json_list(path)
    count = 0
    for entry in entries:
        yield entry
        count += 1
    if not count:
        raise ValueError(f"{path}: must hold a list of rows, got an empty one")


def iter_objects(path: str) -> Iterator[tuple[str, dict]]:
    """
    Yield (source, entry) for each entry of an annotation file, which must be a JSON object. A clip is taken from the
    whole video, so a row with the "start" or "end" of its text in the video is an error.
    """
    for i, entry in enumerate(iter_annotations(path)):
        source = f"{path}, row {i}"
        if not isinstance(entry, dict):
            raise ValueError(f"{source}: must be an object, got {shorten(entry)}")
        for key in ("start", "end"):
            if entry.get(key) is not None:
                raise ValueError(f'{source}: must have no "{key}", because clips are taken from whole videos, got '
                                 f'{shorten(entry[key])}; cut the video there, or remove the key to use all of it')
        yield source, entry


def parse_file_names(entry: dict, source: str) -> list[str]:
    """Return the file names under "video" or, as in older files, under "image": one name or a list of names."""
    names = entry.get("video", entry.get("image"))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'{source}: "video" or "image" must be a file name or a list of them, got {shorten(entry)}')
    return names


def parse_texts(entry: dict, key: str, source: str, empty: list[str] | None = None) -> list[str]:
    """
    Return the list of texts under `key`, not normalised. A text without a word left after normalisation is an error; if
    `empty` is a list, the text is left out and its source appended to the list.
    """
    texts = entry.get(key)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{source}: "{key}" must be a text or a list of texts, got {shorten(texts)}')
    with_words = []
    for i, text in enumerate(texts):
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f'{source}: "{key}" must be valid Unicode, got half a surrogate pair in {text!r}')
        if normalize_caption(text):
            with_words.append(text)
        elif empty is not None:
            empty.append(source)
        else:
            place = f" as text {i + 1} of {len(texts)}" * (len(texts) > 1)
            raise ValueError(f'{source}: "{key}" must have words, got {text!r}{place}; remove it from the file')
    return with_words


def note_empty_captions(path: str, empty: list[str], count: int, notes: list[str] | None):
    """
    Append to `notes` how many captions of a file have no words, and in which rows; if `notes` is None, print it.
    `empty` has the sources of these captions. `count` others are left; if there is none, that is a ValueError.
    """
    if not empty:
        return
    rows = list(dict.fromkeys(source.rpartition(", ")[2] for source in empty))
    listed = ", ".join(rows[:20] + ["..."] * (len(rows) > 20))
    if not count:
        raise ValueError(f"{path}: no caption has words, got {len(empty)} without, in {listed}")
    note = f"{path}: {len(empty)} of {len(empty) + count} captions have no words and are left out: {listed}"
    print0(escape_control(note)) if notes is None else notes.append(note)


def media_id(video: str) -> int:
    """Hash the absolute path to 63 bits. Two corpora may use one name for two files."""
    path = os.path.abspath(video).encode(errors="surrogatepass")            # a name may not be valid Unicode
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big") >> 1


def check_files_exist(annotations: list[Annotation], root: str):
    """Raise FileNotFoundError if videos do not exist. The message names the first and counts all."""
    if not os.path.isdir(root):
        path = annotations[0].source.rpartition(", row")[0]
        raise FileNotFoundError(f"{root}: there is no such folder of the videos in {path}")
    exists = {video: os.path.isfile(video) for video in {a.video for a in annotations}}
    missing = [a for a in annotations if not exists[a.video]]
    if missing:
        raise FileNotFoundError(f"{missing[0].source}: there is no file {missing[0].video} "
                                f"({len(missing)} of {len(annotations)} rows have no file)")


def make_annotation(source: str, root: str, name: str, captions: list[str], frame_caption: str | None = None,
                    **fields) -> Annotation:
    """Make the Annotation of the file `name` under root."""
    video = os.path.join(root, name)
    return Annotation(video, captions, frame_caption, media_id(video), source=source, **fields)


def iter_rows(path: str, root: str, notes: list[str] | None = None) -> Iterator[Annotation]:
    """
    Yield an Annotation for each row {"video" or "image": name under root, "caption": text or list of texts}, in order.

    This is the form of UMT's and VindLU's files. If the name is a list, the captions are true of each of these videos,
    and each gets an Annotation with the same source. Our own key "still" has a caption that is true of each frame.
    Captions without words are left out and counted in `notes`: see note_empty_captions.
    """
    empty, count = [], 0
    for source, entry in iter_objects(path):
        captions = [normalize_caption(text) for text in parse_texts(entry, "caption", source, empty)]
        still = normalize_caption(entry["still"]) if isinstance(entry.get("still"), str) else ""
        count += len(captions)
        for name in parse_file_names(entry, source) if captions else ():
            yield make_annotation(source, root, name, captions, frame_caption=still or None)
    note_empty_captions(path, empty, count, notes)


def read_annotations(path: str, root: str, check: bool = True, notes: list[str] | None = None) -> list[Annotation]:
    """Read an annotation file as iter_rows does. check: raise an error if a video does not exist."""
    annotations = list(iter_rows(path, root, notes))
    if check:
        check_files_exist(annotations, root)
    return annotations


ROWS_VERSION = 2       # of annotations_HASH.jsonl and its index
INDEX_ENTRY = np.dtype([("end", "<i8"), ("crc", "<u4")])


def row_checksum(name: str, i: int, line) -> int:
    """CRC-32 of a line of annotations_HASH.jsonl, and of the file and row that it belongs to."""
    return zlib.crc32(line, zlib.crc32(f"{name} {i}".encode()))


class MappedAnnotations(Sequence):
    """
    A sequence of annotations in a memory-mapped file. annotations[i] reads, verifies and parses entry i; a ValueError
    says that the files are damaged and what to do.

    A process that holds this has 12 bytes of page cache for each entry, shared with all other processes.
    """

    def __init__(self, path: str):
        self.path, self.name = path, os.path.basename(path)
        try:
            about = read_json(path + ".json")
        except ValueError:
            raise self.damaged(".json", "it is not JSON, or its checksum is wrong") from None
        expected = {"name": self.name, "digest": about.get("digest"), "notes": about.get("notes"),
                    "sizes": [os.path.getsize(path + extension) for extension in (".jsonl", ".offsets")]}
        if about != expected:
            raise self.damaged(".json", "it does not belong to the other two files")
        self.digest, self.notes = about["digest"], about["notes"]           # of all entries; lines to print
        self.text = np.asarray(np.memmap(path + ".jsonl", np.uint8, mode="r"))
        self.index = np.asarray(np.memmap(path + ".offsets", INDEX_ENTRY, mode="r"))        # (N,), of the entries

    def damaged(self, extension: str, reason: str) -> ValueError:
        """Make the error that says which file is damaged and how to mend it."""
        return ValueError(f"{self.path}{extension} is damaged ({reason}): delete {self.path}.json, .jsonl and "
                          ".offsets, which are made again from the annotation files")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Annotation:
        if not -len(self) <= i < len(self):
            raise IndexError(f"index must be below {len(self)}, got {i}")
        i = int(i) % len(self)
        start, (end, crc) = int(self.index["end"][i - 1]) if i else 0, self.index[i].tolist()
        if not 0 <= start < end <= len(self.text) or row_checksum(self.name, i, self.text[start:end]) != crc:
            raise self.damaged(".jsonl or .offsets", f"the checksum of row {i} is wrong")
        return Annotation(**json.loads(self.text[start:end].tobytes()))

    def __reduce__(self):                          # pickle the path only: another process maps the file again
        return MappedAnnotations, (self.path,)


def build_mapped_annotations(corpora: list[tuple[str, str]], folder: str) -> MappedAnnotations:
    """
    Write the annotations of all corpora, (annotation file, video folder) each, to a memory-mapped file in `folder`.

    The file is written unless it exists; a change of an annotation file gives another name. If several processes need
    it, one should call this first.
    """
    for path, root in corpora:
        check_annotation_file(path)
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: there is no such folder of the videos in {path}")
    stats = [os.stat(path) for path, _ in corpora]
    key = [ROWS_VERSION] + [(os.path.abspath(path), root, s.st_size, s.st_mtime_ns)
           for (path, root), s in zip(corpora, stats, strict=True)]
    name = "annotations_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    out = os.path.join(folder, name)
    if not all(os.path.exists(out + extension) for extension in (".json", ".jsonl", ".offsets")):
        os.makedirs(folder, exist_ok=True)
        write_mapped_annotations(corpora, out)
    annotations = MappedAnnotations(out)
    for note in annotations.notes:
        print0(escape_control(note))
    return annotations


def write_mapped_annotations(corpora: list[tuple[str, str]], out: str):
    """Write the three files of MappedAnnotations."""
    index, digest, notes, end = bytearray(), hashlib.blake2b(digest_size=16), [], 0
    with atomic_write(out + ".jsonl") as f:
        for path, root in corpora:
            rows = iter_rows(path, root, notes)
            for annotation in tqdm(rows, escape_control(path), unit=" rows", mininterval=1, disable=None):
                line = json.dumps(vars(annotation), default=vars).encode() + b"\n"
                digest.update(line)
                f.write(line)
                end += len(line)
                row = len(index) // INDEX_ENTRY.itemsize
                index += struct.pack("<qI", end, row_checksum(os.path.basename(out), row, line))
    with atomic_write(out + ".offsets") as f:
        f.write(index)
    # Written last: it exists only if the other two are complete.
    write_json(out + ".json", {"name": os.path.basename(out), "digest": digest.hexdigest(), "notes": notes,
                               "sizes": [end, len(index)]})


# ---------------------------------------------------------------------------------------------------------------------
# The table of benchmarks

TASK_KINDS = dict(retrieval="retrieval", qa="question answering", choice="multiple choice", caption="captioning")


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning with AdamW and a cosine schedule."""
    lr: float
    epochs: int
    warmup: int             # epochs
    drop_path: float


@dataclass(frozen=True)
class Task:
    """A benchmark. Paths are relative to --data-root; of names separated by | the first that exists is used."""
    kind: str               # a key of TASK_KINDS
    media_dirs: str         # folder of the videos
    train_file: str         # annotation files, without their extension
    val_file: str           # for model selection; empty: the benchmark publishes no validation split
    test_file: str
    max_text_length: int    # tokens of a caption or question, including [CLS]
    recipe_base: Recipe     # for students less than 1024 channels wide
    recipe_large: Recipe    # for wider students
    test_rows: int = 0      # rows of the published test split; 0: several versions exist
    answer_list: str = ""   # question answering: file with the answers that are ranked
    max_answer_length: int = 0  # tokens of a generated answer or caption, including [CLS] and [SEP]
    paragraph: bool = False     # join a list of captions to one text
    seconds: float = 0      # use only the first seconds of each video; 0: all of it
    flip: bool = True       # whether training may mirror clips
    num_frames: int = 12    # frames per clip in fine-tuning
    zero_shot_frames: int = 4   # frames per clip when a pretrained model is evaluated
    rerank_topk: int = 128  # candidates that the matching head re-ranks, and answers that are scored in full
    texts_per_clip: int = 1     # questions or captions of one clip that are trained on together
    batch: int = 256        # clips per step
    finetune_masked: bool = False   # fine-tune on visible tokens only, with the mask of the pretraining
    default_root: str = ""  # --data-root if none is given


def sprites_task(kind: str, train_file: str, test_file: str, max_text_length: int, epochs: int, lr: float,
                 **fields) -> Task:
    """Make the Task of a benchmark on the embedded data set."""
    recipe = Recipe(lr, epochs, 1, 0.0)
    return Task(kind, "videos", train_file, test_file.replace("test", "val"), test_file, max_text_length, recipe,
                recipe, flip=False, num_frames=8, zero_shot_frames=8, finetune_masked=True,
                default_root="data/sprites", **{"rerank_topk": 16, "batch": 32, **fields})


MSRVTT, MSVD = "videos_images/msrvtt|videos_images/msrvtt_2fps_224", "videos_images/msvd|videos_images/msvd_2fps_224"
ANET = "videos_images/activitynet|videos_images/activity_net_2fps_360"
SSV2 = "videos_images/ssv2"
ANSWERS = dict(max_answer_length=5)         # [CLS], three word pieces and [SEP], as in UMT
CAPTIONS = dict(max_answer_length=32)

TASKS = {
    # Retrieval. The "val" and "test" lists of MSR-VTT 1k-A are the same, so there is no list for model selection.
    "msrvtt": Task(
        "retrieval", MSRVTT, "msrvtt_ret_train9k", "", "msrvtt_ret_test1k|msrvtt_test1k", 32,
        Recipe(1e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), test_rows=1000),
    "msrvtt-7k": Task(
        "retrieval", MSRVTT, "msrvtt_ret_train7k", "", "msrvtt_ret_test1k|msrvtt_test1k", 32,
        Recipe(1e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), test_rows=1000),
    "didemo": Task(
        "retrieval", "videos_images/didemo|videos_images/didemo_2fps_360_trimed30",
        "didemo_ret_train", "didemo_ret_val", "didemo_ret_test", 64,
        Recipe(2e-5, 12, 1, 0.1), Recipe(4e-5, 5, 1, 0.2), paragraph=True, seconds=30),
    "activitynet": Task(
        "retrieval", ANET, "anet_ret_train", "", "anet_ret_val|anet_ret_val_1", 150,
        Recipe(4e-5, 20, 1, 0.1), Recipe(4e-5, 20, 1, 0.2), paragraph=True),
    "lsmdc": Task(
        "retrieval", "videos_images/lsmdc", "lsmdc_ret_train", "", "lsmdc_ret_test_1000", 96,
        Recipe(2e-5, 10, 1, 0.2), Recipe(2e-5, 8, 1, 0.2), test_rows=1000),
    # Several captions per video, each of which is a query. Joining them to a paragraph would add 20 points.
    "msvd": Task(
        "retrieval", MSVD, "msvd_ret_train", "", "msvd_ret_test", 64,
        Recipe(1e-5, 5, 0, 0.2), Recipe(1e-5, 3, 0, 0.3), test_rows=670),
    # Several videos per caption. The labels distinguish left and right.
    "ssv2-label": Task(
        "retrieval", SSV2, "ssv2_ret_label_train", "", "ssv2_ret_label_val_small", 25,
        Recipe(5e-5, 10, 0, 0.1), Recipe(4e-5, 10, 0, 0.2), flip=False),
    "ssv2-template": Task(
        "retrieval", SSV2, "ssv2_ret_template_train", "", "ssv2_ret_template_val_small", 25,
        Recipe(1e-4, 10, 1, 0.1), Recipe(1e-4, 5, 1, 0.2), test_rows=174, flip=False),
    # Question answering.
    "msrvtt-qa": Task(
        "qa", MSRVTT, "msrvtt_qa_train", "msrvtt_qa_val", "msrvtt_qa_test", 25,
        Recipe(2e-5, 8, 1, 0.2), Recipe(4e-5, 5, 1, 0.4), test_rows=72_821,
        answer_list="msrvtt_qa_answer_list", **ANSWERS),
    "msvd-qa": Task(
        "qa", MSVD, "msvd_qa_train", "msvd_qa_val", "msvd_qa_test", 25,
        Recipe(6e-5, 6, 1, 0.2), Recipe(6e-5, 6, 1, 0.4), test_rows=13_157,
        answer_list="msvd_qa_answer_list", **ANSWERS),
    "activitynet-qa": Task(
        "qa", ANET, "anet_qa_train", "anet_qa_val", "anet_qa_test", 25,
        Recipe(4e-5, 12, 1, 0.2), Recipe(4e-5, 10, 1, 0.3), test_rows=8000,
        answer_list="anet_qa_answer_list", **ANSWERS),
    # Multiple choice, trained as retrieval.
    "msrvtt-mc": Task(
        "choice", MSRVTT, "msrvtt_ret_train7k", "", "msrvtt_mc_test", 32,
        Recipe(8e-5, 3, 0, 0.2), Recipe(4e-5, 5, 0, 0.3), test_rows=2990),
    # Captioning: 6513 / 497 / 2990 and 1200 / 100 / 670 videos. A row has one caption or a list of captions.
    "msrvtt-caption": Task(
        "caption", MSRVTT, "msrvtt_cap_train", "msrvtt_cap_val", "msrvtt_cap_test", 2,
        Recipe(2e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), test_rows=2990, **CAPTIONS),
    "msvd-caption": Task(
        "caption", MSVD, "msvd_cap_train", "msvd_cap_val", "msvd_cap_test", 2,
        Recipe(2e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), test_rows=670, **CAPTIONS),
    # The embedded data set.
    "sprites": sprites_task("retrieval", "sprites_train", "sprites_test", 36, 12, 1e-3, batch=256),
    "sprites-qa": sprites_task("qa", "sprites_qa_train", "sprites_qa_test", 16, 40, 5e-4,
                               answer_list="sprites_qa_answer_list", max_answer_length=6, texts_per_clip=6),
    "sprites-mc": sprites_task("choice", "sprites_train", "sprites_mc_test", 36, 12, 1e-3, batch=256),
    "sprites-caption": sprites_task("caption", "sprites_cap_train", "sprites_cap_test", 2, 14, 5e-4,
                                    max_answer_length=40, texts_per_clip=4),
}


def get_task(name: str) -> Task:
    """Return the benchmark of that name. The ValueError for an unknown name suggests the nearest one."""
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}{hint}")
    return TASKS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Files of a benchmark

def find_file(names: str, root: str) -> str:
    """Find the first annotation file under root that has one of the names (separated by |)."""
    candidates = [f"{folder}{name}{extension}" for name in names.split("|") for folder in ("anno_downstream/", "")
                  for extension in (".json", ".jsonl", ".sqlite", ".db")]
    for candidate in candidates:
        if os.path.isfile(os.path.join(root, candidate)):
            return os.path.join(root, candidate)
    hint = "" if os.path.isdir(os.path.join(root, "anno_downstream")) else ", nor a folder anno_downstream"
    raise FileNotFoundError(f"{root} has neither {candidates[0]} nor {names.split('|')[0]}.json{hint}; docs/data.md "
                            "shows the layout")


def find_media(task: Task, root: str) -> str:
    """Find the first folder of task.media_dirs that exists under root."""
    names = task.media_dirs.split("|")
    for name in names:
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    raise FileNotFoundError(f"{root} has no folder {' or '.join(name + '/' for name in names)} with the task's videos")


def resolve_data_root(task: Task, data_root: str) -> str:
    """Return `data_root`, or the task's default if it is empty. The folder must exist."""
    root = data_root or task.default_root
    if not root:
        raise ValueError("--data-root must be the folder that has anno_downstream/ and videos_images/, got none")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"--data-root must be a folder, got {root}, which does not exist")
    return root


def split_files(task: Task, split: str, root: str) -> tuple[str, str]:
    """Find the annotation file and video folder of a split: train, val or test. root: --data-root, may be empty."""
    names = getattr(task, f"{split}_file")
    if not names:
        raise ValueError(f"the task publishes no {split} split")
    root = resolve_data_root(task, root)
    return find_file(names, root), find_media(task, root)


# ---------------------------------------------------------------------------------------------------------------------
# Readers of the annotation files of a benchmark

def read_rows(task: Task, path: str, root: str, train: bool, missing: list | None = None,
              notes: list[str] | None = None) -> list[Annotation]:
    """
    Read an annotation file of the task's kind; the videos are under root.

    For training, an Annotation has one caption, or up to task.texts_per_clip questions. For evaluation it has all texts
    of a video. If `missing` is a list, annotations whose video does not exist are moved into it; otherwise they are an
    error. If no video at all exists, that is always an error. `notes`: see note_empty_captions.
    """
    texts_per_clip = task.texts_per_clip if train else 0
    if task.kind == "qa":
        annotations = read_questions(path, root, texts_per_clip)
    elif task.kind == "caption":
        annotations = read_captions(path, root, texts_per_clip, notes)
    elif task.kind == "choice" and not train:
        annotations = read_choices(path, root)
    else:
        annotations = read_retrieval(path, root, task.paragraph, train, notes)
    if missing is not None:
        exists = {video: os.path.isfile(video) for video in {a.video for a in annotations}}
        missing += [a for a in annotations if not exists[a.video]]
        annotations = [a for a in annotations if exists[a.video]] or annotations
    check_files_exist(annotations, root)
    return annotations


def single_file(entry: dict, source: str) -> str:
    """Return the one file name of an entry that must not list several."""
    names = parse_file_names(entry, source)
    if len(names) > 1:
        raise ValueError(f'{source}: "video" must be one file name, got {len(names)}')
    return names[0]


def read_retrieval(path: str, root: str, paragraph: bool, train: bool, notes: list | None = None) -> list[Annotation]:
    """
    Read {"video": name, or list of names that the captions are true of, "caption": text, or list of texts}.

    paragraph: join the captions of a row to one. train: return one Annotation for each caption.
    """
    annotations = read_annotations(path, root, check=False, notes=notes)
    if paragraph:
        annotations = [replace(a, captions=[" ".join(a.captions)]) for a in annotations]
    return [replace(a, captions=[caption]) for a in annotations for caption in a.captions] if train else annotations


def read_choices(path: str, root: str) -> list[Annotation]:
    """Read {"video": name, "caption": list of texts, "answer": index of the true text}."""
    annotations = []
    for source, entry in iter_objects(path):
        captions = [normalize_caption(text) for text in parse_texts(entry, "caption", source)]
        correct = entry.get("answer")
        if len(captions) < 2:
            raise ValueError(f'{source}: "caption" must be a list of two texts or more, got one text')
        if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < len(captions):
            raise ValueError(f'{source}: "answer" must be 0 to {len(captions) - 1}, got {correct!r}')
        annotations.append(make_annotation(source, root, single_file(entry, source), captions, correct_index=correct))
    return annotations


def read_questions(path: str, root: str, texts_per_clip: int) -> list[Annotation]:
    """
    Read {"video": name, "question": text, "answer": text or list of texts, "question_id": number or text, "type": kind
    of question}, of which the last two are optional. Each Annotation has up to texts_per_clip questions of one video,
    or all of them if it is 0.

    The weight of an answer is its share in the list of answers.
    """
    items, source_of_id = [], {}
    for source, entry in iter_objects(path):
        texts = parse_texts(entry, "question", source)
        if len(texts) > 1:
            raise ValueError(f'{source}: "question" must be one text, got {len(texts)}')
        answers = parse_texts(entry, "answer", source)
        question_id, question_type = entry.get("question_id", len(items)), entry.get("type")
        if not isinstance(question_id, (int, str)):
            raise ValueError(f'{source}: "question_id" must be a number or a text, got {shorten(question_id)}')
        if "question_id" in entry and question_id in source_of_id:
            first = source_of_id[question_id].rpartition(", ")[2]
            raise ValueError(f'{source}: "question_id" must be unique, got {question_id!r}, which {first} has too')
        if "question_id" in entry:
            source_of_id[question_id] = source
        question_type = "" if question_type is None else str(question_type)     # a number in ActivityNet-QA
        weights = {answer: n / len(answers) for answer, n in Counter(answers).items()}
        question = Question(normalize_caption(texts[0]), weights, question_id, question_type, source)
        items.append((source, single_file(entry, source), question))
    return [make_annotation(source, root, name, [q.text for q in questions], questions=questions)
            for source, name, questions in group_by_clip(items, texts_per_clip)]


def read_captions(path: str, root: str, texts_per_clip: int, notes: list[str] | None = None) -> list[Annotation]:
    """
    Read {"video": name, "caption": text or list of texts} for captioning. A video may have several rows.

    Each Annotation has up to texts_per_clip captions of one video, as the answers of a question without text. If
    texts_per_clip is 0, it has all of them, not normalised, because the captioning metrics have their own tokenizer.
    """
    empty = []
    items = [(source, single_file(entry, source), text) for source, entry in iter_objects(path)
             for text in parse_texts(entry, "caption", source, empty)]
    note_empty_captions(path, empty, len(items), notes)
    annotations = []
    for source, name, captions in group_by_clip(items, texts_per_clip):
        captions = [normalize_caption(text) for text in captions] if texts_per_clip else captions
        weights = {text: n / len(captions) for text, n in Counter(captions).items()}
        annotations.append(make_annotation(source, root, name, captions, questions=[Question("", weights)]))
    return annotations


def group_by_clip(items: list[tuple], texts_per_clip: int) -> list[tuple]:
    """
    Group (source, name, item) by name, in order of first appearance: (source of the first item, name, items). A group
    has up to texts_per_clip items, or all of them if it is 0.
    """
    clips = {}
    for source, name, item in items:
        clips.setdefault(name, []).append((source, item))
    groups = []
    for name, members in clips.items():
        size = texts_per_clip or len(members)
        chunks = (members[i:i + size] for i in range(0, len(members), size))
        groups += [(chunk[0][0], name, [item for _, item in chunk]) for chunk in chunks]
    return groups


def read_answers(path: str) -> list[str]:
    """Read the answers that are ranked: a JSON list of texts without duplicates."""
    answers = list(iter_annotations(path))
    for i, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{path}, row {i}: an answer must be a text, got {shorten(answer)}")
    if duplicates := [answer for answer, n in Counter(answers).items() if n > 1]:
        raise ValueError(f"{path}: the answers must be unique, got {duplicates[0]!r} twice")
    return answers
