"""
Annotation files -> `Annotation` objects, and their memory-mapped copy.

An annotation file is a JSON list of objects, a file with one object per line, or VindLU's SQLite database.
"""

import codecs
import hashlib
import json
import mmap
import os
import re
import sqlite3
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
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

    def to_json(self) -> str:
        """Format as JSON, without the media_id, which depends on the place of the project's folder."""
        return json.dumps({key: value for key, value in vars(self).items() if key != "media_id"}, default=vars)

    @classmethod
    def from_json(cls, line: bytes) -> "Annotation":
        fields = json.loads(line)
        return cls(**fields, media_id=media_id(fields["video"]))


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


ROWS_VERSION = 3       # of annotations_HASH.jsonl and its index
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
        return Annotation.from_json(self.text[start:end].tobytes())

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
                line = (annotation.to_json() + "\n").encode()
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
