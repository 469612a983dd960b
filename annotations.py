"""
Annotation files -> `Annotation` objects, and their memory-mapped copy.

formats.py reads the entries of a file, whatever its format; media.py the samples of tar shards, which stand wherever an
annotation file may.
"""

import hashlib
import json
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from files import atomic_write, escape_control, read_json, write_json
from formats import TABLES, check_annotation_file, iter_annotations, list_sources, shorten
from media import LostData, Media, check_lost_data, expand_shards, is_shards, iter_samples
from runtime import print0

# ---------------------------------------------------------------------------------------------------------------------
# Annotations

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
    video: str                                     # media.name: the path, if it is all of a file
    captions: list[str]                            # normalised
    frame_caption: str | None                      # a caption that is true of each single frame, if the file has one
    media_id: int                                  # media_id(video)
    questions: list[Question] = field(default_factory=list)
    correct_index: int | None = None               # multiple choice: index of the true caption
    source: str = ""                               # annotation file and row, for messages
    media: Media | None = None                     # where its frames are; None becomes Media(video)

    def __post_init__(self):
        self.media = self.media or Media(self.video)

    def to_json(self) -> str:
        """Format as JSON, without the media_id, which depends on the place of the project's folder."""
        values = {key: value for key, value in vars(self).items() if key not in ("media_id", "media")}
        if self.media != Media(self.video):
            values["media"] = {key: value for key, value in self.media._asdict().items()
                               if value != Media._field_defaults.get(key)}
        return json.dumps(values, default=vars)

    @classmethod
    def from_json(cls, line: bytes) -> "Annotation":
        values = json.loads(line)
        media = Media(**values.pop("media")) if "media" in values else None
        return cls(**values, media_id=media_id(values["video"]), media=media)


def iter_objects(path: str, notes: list[str] | None = None,
                 lost_data: list[LostData] | None = None) -> Iterator[tuple[str, dict]]:
    """
    Yield (source, entry) for each entry of an annotation file, which must be a JSON object, or for each sample of tar
    shards, whose entry has a Media as "video". notes, lost_data: see iter_samples; if `notes` is None, print them; if
    `lost_data` is None, lost data is an error.
    """
    if is_shards(path):
        shard_notes, found = [], []
        for source, media, caption in iter_samples(path, shard_notes, found):
            yield source, {"video": media, "caption": caption}
        if lost_data is None:
            check_lost_data(found, 0.0)
        else:
            lost_data += found
        add_notes(shard_notes, notes)
        return
    for i, entry in enumerate(iter_annotations(path)):
        source = f"{path}, row {i}"
        if not isinstance(entry, dict):
            raise ValueError(f"{source}: must be an object, got {shorten(entry)}")
        yield source, entry


def parse_file_names(entry: dict, source: str) -> list[str]:
    """Return the file names under "video" or, as in older files, under "image": one name or a list of names."""
    names = entry.get("video", entry.get("image"))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'{source}: "video" or "image" must be a file name or a list of them, got {shorten(entry)}')
    return names


def parse_seconds(entry: dict, key: str, default: float, source: str) -> float:
    """Return the "start" or "end" of a row; a row without it has the default."""
    value = entry.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f'{source}: "{key}" must be a number of seconds, 0 or more, got {shorten(value)}')
    return float(value)


def parse_media(entry: dict, root: str, source: str) -> list[Media]:
    """
    Return the files of a row, which are under root, as Media with the row's "start" and "end": the seconds of the video
    that its texts are about, both optional.
    """
    if isinstance(entry.get("video"), Media):
        return [entry["video"]]
    start, end = parse_seconds(entry, "start", 0.0, source), parse_seconds(entry, "end", math.inf, source)
    if end <= start:
        raise ValueError(f'{source}: "end" must be above "start", got {end:g} and {start:g}')
    return [Media(os.path.join(root, name), start=start, end=end) for name in parse_file_names(entry, source)]


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
    add_notes([f"{path}: {len(empty)} of {len(empty) + count} captions have no words and are left out: {listed}"],
              notes)


def add_notes(new: list[str], notes: list[str] | None):
    """Append lines to `notes`; if it is None, print them."""
    if notes is not None:
        notes.extend(new)
        return
    for note in new:
        print0(escape_control(note))


def media_id(video: str) -> int:
    """
    Hash Annotation.video, as an absolute path, to 63 bits. Two corpora may use one name for two files.

    Captions of one medium are never negatives of each other, and an evaluation encodes each medium once. So two clips
    of a video that begin or end at different seconds are two media: what a caption says of one need not be true of the
    other. If they overlap, they are negatives nevertheless.
    """
    path = os.path.abspath(video).encode(errors="surrogatepass")            # a name may not be valid Unicode
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big") >> 1


def check_files_exist(annotations: list[Annotation], root: str):
    """Raise FileNotFoundError if videos do not exist. The message names the first and counts all."""
    exists = {path: os.path.isfile(path) for path in {a.media.path for a in annotations}}
    missing = [a for a in annotations if not exists[a.media.path]]
    if missing and not os.path.isdir(root):
        path = annotations[0].source.rpartition(", row")[0]
        raise FileNotFoundError(f"{root}: there is no such folder of the videos in {path}")
    if missing:
        raise FileNotFoundError(f"{missing[0].source}: there is no file {missing[0].media.path} "
                                f"({len(missing)} of {len(annotations)} rows have no file)")


def make_annotation(source: str, media: Media, captions: list[str], frame_caption: str | None = None,
                    **fields) -> Annotation:
    """Make the Annotation of a Media."""
    return Annotation(media.name, captions, frame_caption, media_id(media.name), source=source, media=media, **fields)


def iter_rows(path: str, root: str, notes: list[str] | None = None,
              lost_data: list[LostData] | None = None) -> Iterator[Annotation]:
    """
    Yield an Annotation for each row {"video" or "image": name under root, "caption": text or list of texts}, in order;
    "start" and "end" may say which seconds of the video. Tar shards have such rows too: see iter_objects.

    This is the form of UMT's and VindLU's files. If the name is a list, the captions are true of each of these videos,
    and each gets an Annotation with the same source. Our own key "still" has a caption that is true of each frame.
    Captions without words are left out and counted in `notes`: see note_empty_captions.
    """
    empty, count = [], 0
    for source, entry in iter_objects(path, notes, lost_data):
        captions = [normalize_caption(text) for text in parse_texts(entry, "caption", source, empty)]
        still = normalize_caption(entry["still"]) if isinstance(entry.get("still"), str) else ""
        count += len(captions)
        for media in parse_media(entry, root, source) if captions else ():
            yield make_annotation(source, media, captions, frame_caption=still or None)
    note_empty_captions(path, empty, count, notes)


def read_annotations(path: str, root: str, check: bool = True, notes: list[str] | None = None) -> list[Annotation]:
    """Read an annotation file as iter_rows does. check: raise an error if a video does not exist."""
    annotations = list(iter_rows(path, root, notes))
    if check:
        check_files_exist(annotations, root)
    return annotations


ROWS_VERSION = 3       # of annotations_HASH.jsonl and its index
TABLES_VERSION = SHARDS_VERSION = 2        # of what is read from tables, and from shards
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
        about.setdefault("lost_data", [])              # there were none when files without this key were written
        expected = {"name": self.name, **{key: about.get(key) for key in ("digest", "notes", "lost_data")},
                    "sizes": [os.path.getsize(path + extension) for extension in (".jsonl", ".offsets")]}
        if about != expected:
            raise self.damaged(".json", "it does not belong to the other two files")
        self.digest, self.notes = about["digest"], about["notes"]           # of all entries; lines to print
        self.lost_data = [LostData(*loss) for loss in about["lost_data"]]
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


def build_mapped_annotations(corpora: list[tuple[str, str]], folder: str, max_lost: float = 0.0) -> MappedAnnotations:
    """
    Write the annotations of all corpora, (annotation file, video folder) each, to a memory-mapped file in `folder`.
    Tar shards need no video folder. Of the shards, and of the samples in them, a share of up to max_lost may be lost.

    The file is written unless it exists; a change of an annotation file or shard gives another name. If several
    processes need it, one should call this first.
    """
    sources = []
    for path, root in corpora:
        if is_shards(path):
            sources += [(shard, (path, SHARDS_VERSION)) for shard in expand_shards(path)]
            continue
        check_annotation_file(path)
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: there is no such folder of the videos in {path}")
        is_table = os.path.splitext(path)[1].lower() in TABLES
        sources += [(source, (root, TABLES_VERSION) if is_table else root) for source in list_sources(path)]
    stats = [os.stat(source) for source, _ in sources]
    key = [ROWS_VERSION] + [(os.path.abspath(source), root, s.st_size, s.st_mtime_ns)
           for (source, root), s in zip(sources, stats, strict=True)]
    name = "annotations_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    out = os.path.join(folder, name)
    if not all(os.path.exists(out + extension) for extension in (".json", ".jsonl", ".offsets")):
        os.makedirs(folder, exist_ok=True)
        write_mapped_annotations(corpora, out)
    annotations = MappedAnnotations(out)
    check_lost_data(annotations.lost_data, max_lost)      # here and not above: another limit needs no other file
    for note in [*annotations.notes, *map(str, annotations.lost_data)]:
        print0(escape_control(note))
    return annotations


def write_mapped_annotations(corpora: list[tuple[str, str]], out: str):
    """Write the three files of MappedAnnotations."""
    index, digest, notes, lost_data, end = bytearray(), hashlib.blake2b(digest_size=16), [], [], 0
    with atomic_write(out + ".jsonl") as f:
        for path, root in corpora:
            rows = iter_rows(path, root, notes, lost_data)
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
                               "lost_data": lost_data, "sizes": [end, len(index)]})
