"""
Annotation files of all formats -> their entries, one after another, so that a file may be larger than memory.

    .csv, .tsv          a table with a header; MSR-VTT's and WebVid's among them
    .parquet            the same columns; needs pyarrow
    .sqlite, .db        VindLU's table annos(id, image or video, caption)
    any other name      JSON: a list, one value a line, objects one after another, or MSR-VTT's videos and sentences

A row of a table becomes the object {"video": ..., "caption": ...} that a JSON file has; annotations.py reads these.
"""

import codecs
import csv
import json
import mmap
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from urllib.parse import quote

import ijson

from files import format_error

MSRVTT_CAPTIONS = "MSRVTT_data.json"       # has the captions of tables that list only videos, in the same folder


def shorten(value) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_text(path: str):
    """Open a UTF-8 file for reading bytes, after its byte-order mark if it has one. Other Unicode is a ValueError."""
    f = open(path, "rb")
    start = f.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 < start.count(b"\0") < 4:
        f.close()
        raise ValueError(f"{path}: must be UTF-8, got UTF-16 or UTF-32; save it as UTF-8")
    f.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
    return f


# ---------------------------------------------------------------------------------------------------------------------
# JSON

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


def _is_json_lines(path: str) -> bool:
    """
    Say whether a file has an object on each line, or a text on each of several lines. The content decides, for many
    files are misnamed.
    """
    with open_text(path) as f:
        lines = filter(bytes.strip, iter(lambda: f.readline(2 ** 20), b""))     # a list may be a line of gigabytes
        first, second = (next(lines, b"").strip() for _ in range(2))
    try:
        value = json.loads(first.decode()) if first[:1] in (b"{", b'"') else None
    except (ValueError, RecursionError):
        return False                                                        # a value that spans lines, or no JSON
    if isinstance(value, dict):
        return not value.keys() & {"videos", "sentences"}
    return isinstance(value, str) and second.startswith(b'"')


def _iter_json_lines(path: str) -> Iterator:
    number = 0
    try:
        with open_text(path) as f:
            for line in f:
                number += 1
                if line.strip():
                    yield json.loads(line.decode())
    except (ValueError, RecursionError) as error:                           # not JSON or not UTF-8, or too deep
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def _parse_json(path: str, parse, unit: str = "row") -> Iterator:
    """Yield what parse(file) yields. A ValueError counts in `unit` what came before an error in the JSON."""
    count = 0
    with open_text(path) as f:
        try:
            for value in parse(f):
                yield value
                count += 1
        except (ijson.JSONError, ValueError) as error:                      # ValueError: not UTF-8
            reason = re.split(r"\n|\\n", str(error).removeprefix("b'"))[0]   # the rest shows the bytes around it
            raise ValueError(f"{path}, {unit} {count}: not JSON ({reason})") from None


def _parse_start(f) -> Iterator[tuple[str, str | None]]:
    """Yield the kind of the value that a JSON file begins with and, if it is an object, its first key."""
    events = ijson.basic_parse(f)
    event = next(events)[0]
    yield event, next(events)[1] if event == "start_map" else None


def _read_start(path: str) -> str:
    """Format the first 100 bytes of a file for an error message."""
    with open_text(path) as f:
        return shorten(f.read(100).decode(errors="replace"))


def _iter_json(path: str) -> Iterator:
    if _is_json_lines(path):
        yield from _iter_json_lines(path)
        return
    if os.path.getsize(path):
        _check_surrogates(path)
    event, key = next(_parse_json(path, _parse_start))
    items = partial(ijson.items, use_float=True)
    if event == "start_array":
        yield from _parse_json(path, partial(items, prefix="item"))
    elif key in ("info", "videos", "sentences"):
        yield from _iter_msrvtt(path)
    elif event == "start_map":
        yield from _parse_json(path, partial(items, prefix="", multiple_values=True))
    else:
        raise ValueError(f"{path}: must hold a list of rows, got {_read_start(path)}")


def _iter_msrvtt(path: str) -> Iterator[dict]:
    """
    Yield {"video": VIDEO_ID.mp4, "caption": list of texts} for each video of MSR-VTT's {"info", "videos": [...],
    "sentences": [{"video_id", "caption"}]}, whatever its split, in the order in which they come in "sentences".

    The captions are held in memory, 20 MB of 200,000. "videos" is not needed; its times are those of the clip in the
    video it was cut from.
    """
    captions = {}
    for i, sentence in enumerate(_parse_json(path, partial(ijson.items, prefix="sentences.item"), "sentence")):
        texts = [sentence.get(key) for key in ("video_id", "caption")] if isinstance(sentence, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{path}, sentence {i}: must have a "video_id" and a "caption", got {shorten(sentence)}')
        captions.setdefault(texts[0], []).append(texts[1])
    if not captions:
        raise ValueError(f'{path}: must hold a list of rows, or "sentences" as MSR-VTT has them, got '
                         f"{_read_start(path)}")
    for video_id, texts in captions.items():
        yield {"video": add_extension(video_id), "caption": texts}


# ---------------------------------------------------------------------------------------------------------------------
# Tables

VIDEO_IDS = "video_id", "videoid"           # columns of names without an extension
# Key of an entry: the columns that may hold it, of which the first that is there is taken. The case does not matter.
COLUMNS = {
    "video": ("video", "image", "video_path", "path", "file_name", *VIDEO_IDS),
    "caption": ("caption", "sentence", "text", "name"),
    **{key: (key,) for key in ("still", "question", "answer", "question_id", "type", "start", "end", "page_dir")},
}


def match_columns(path: str, names: list[str]) -> dict[str, int]:
    """Match the columns of a table with COLUMNS: key -> index of the column. Other columns are not read."""
    known = [name.strip().lower() for name in names]
    if "page_dir" not in known:             # WebVid, whose captions are called "name"
        known = [name if name != "name" else "" for name in known]
    found = {key: next((name for name in candidates if name in known), None) for key, candidates in COLUMNS.items()}
    for name in filter(None, found.values()):
        if known.count(name) > 1:
            raise ValueError(f"{path}: must have one column {name}, got {known.count(name)}")
    if not found["video"]:
        raise ValueError(f"{path}: must have a column of videos ({', '.join(COLUMNS['video'])}), got {shorten(names)}")
    if not (found["caption"] or found["question"] or found["video"] in VIDEO_IDS):
        wanted = ", ".join(COLUMNS["caption"][:-1])
        raise ValueError(f"{path}: must have a column of captions ({wanted}), got {shorten(names)}")
    return {key: known.index(name) for key, name in found.items() if name}


def add_extension(video_id: str) -> str:
    """Return the file name of a video from its id, which most files give without the extension."""
    return video_id if os.path.splitext(video_id)[1] else video_id + ".mp4"


def make_entry(values: dict, is_id: bool) -> dict:
    """
    Make an entry of the values in a row of a table: {"video", "caption", ...} as in a JSON file. Empty cells are left
    out, but an empty caption is an empty text. is_id: the video has no extension, and is in a folder page_dir if the
    table has such a column.
    """
    entry = {key: value for key, value in values.items() if value not in ("", None) and value == value}     # no NaN
    if "caption" in values:
        entry.setdefault("caption", "")
    folder = entry.pop("page_dir", "")
    if is_id and isinstance(entry.get("video"), (str, int)):
        entry["video"] = os.path.join(str(folder), add_extension(str(entry["video"])))
    for key in entry.keys() & {"start", "end"}:
        with suppress(TypeError, ValueError):           # what is no number is refused where its row can be named
            entry[key] = float(entry[key])
    return entry


def iter_table(path: str, iter_values) -> Iterator[dict]:
    """
    Yield the entries of a table. iter_values(path) yields the names of its columns, then its rows, lists of values. If
    the table has only ids of videos, as MSRVTT_train.9k.csv, the captions are those of MSRVTT_data.json beside it.
    """
    rows = iter_values(path)
    names = next(rows)
    columns = match_columns(path, names)
    is_id = names[columns["video"]].strip().lower() in VIDEO_IDS
    captions = None if columns.keys() & {"caption", "question"} else read_msrvtt_captions(path)
    for i, row in enumerate(rows):
        entry = make_entry({key: row[column] for key, column in columns.items()}, is_id)
        if captions is not None:
            if not (texts := captions.get(str(entry.get("video")))):
                raise ValueError(f"{path}, row {i}: {MSRVTT_CAPTIONS} has no captions of {shorten(entry.get('video'))}")
            entry["caption"] = texts
        yield entry


def read_msrvtt_captions(path: str) -> dict[str, list[str]]:
    """Read the captions of each video from the MSRVTT_data.json beside a table without captions."""
    captions = os.path.join(os.path.dirname(path), MSRVTT_CAPTIONS)
    if not os.path.isfile(captions):
        raise FileNotFoundError(f"{path} has no column of captions, so {captions} must have them, which does not exist")
    return {entry["video"]: entry["caption"] for entry in _iter_msrvtt(captions)}


def iter_csv(path: str) -> Iterator[list[str]]:
    """Yield the header and the rows of a CSV file. The header tells whether commas, tabs or semicolons separate."""
    with open_text(path) as f:
        header = next(filter(bytes.strip, f), b"")
    delimiter = max(",\t;", key=lambda character: header.count(character.encode()))
    width, count, line = 0, -1, 1           # columns, rows before this one without the header, first line of this one
    with open_text(path) as f:
        rows = csv.reader(map(bytes.decode, f), delimiter=delimiter, strict=True)
        try:
            for row in filter(None, rows):                                  # a blank line is an empty list
                width = width or len(row)
                if len(row) != width:
                    raise csv.Error(f"must have {width} cells as the header has, got {len(row)}")
                yield row
                count, line = count + 1, rows.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            row = f"row {count}" if width else "header"
            raise ValueError(f"{path}, {row} (from line {line}): not CSV ({error})") from None
    if not width:
        raise ValueError(f"{path}: must have a header with the names of its columns, got an empty file")


def iter_parquet(path: str) -> Iterator[list]:
    """Yield the names of all columns and the rows of a Parquet file, in which only the columns of COLUMNS are read."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: needs the package pyarrow, which cannot be imported ({format_error(error)}): "
                         "pip install pyarrow") from None
    count = 0
    try:
        # Without these two settings a row group is held in memory, which in most files is a million rows.
        with ParquetFile(path, pre_buffer=False, buffer_size=2 ** 16) as file:
            names = file.schema_arrow.names
            yield names
            wanted = [names[i] for i in match_columns(path, names).values()]
            for batch in file.iter_batches(1024, columns=wanted, use_threads=False):
                for values in batch.to_pylist():
                    yield [values.get(name) for name in names]
                    count += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, row {count}: not Parquet ({format_error(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# All formats

def _iter_sqlite(path: str) -> Iterator[dict]:
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            for row in database.execute("select * from annos order by id"):
                yield dict(row)
    except sqlite3.Error as error:
        raise ValueError(f"{path}: must be SQLite with a table annos ({error})") from None


TABLES = {".csv": iter_csv, ".tsv": iter_csv, ".parquet": iter_parquet}
READERS = {**{extension: partial(iter_table, iter_values=reader) for extension, reader in TABLES.items()},
           ".sqlite": _iter_sqlite, ".db": _iter_sqlite}                   # any other extension: _iter_json
EXTENSIONS = ".json", ".jsonl", *READERS                                   # of the files of a benchmark, in this order


def check_annotation_file(path: str):
    """Raise a FileNotFoundError if there is no such file. It says if the folder is not there either."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path}: must be an annotation file, got a folder")
    if not os.path.isfile(path):
        hint = "" if os.path.isdir(folder) else f", nor a folder {folder}"
        raise FileNotFoundError(f"{path}: there is no such annotation file{hint}")


def list_sources(path: str) -> list[str]:
    """List the files that an annotation file is read from: itself and, beside a table, MSR-VTT's captions."""
    captions = os.path.join(os.path.dirname(path), MSRVTT_CAPTIONS)
    is_table = os.path.splitext(path)[1].lower() in TABLES
    return [path, *[captions] * (is_table and os.path.isfile(captions))]


def iter_annotations(path: str) -> Iterator:
    """
    Yield the entries of an annotation file as they are in the file; a file without entries is an error.

    The extension gives the format of tables and databases (READERS). All other files are JSON, in a form that the
    content tells. A byte-order mark before UTF-8 is skipped. The parser of JSON lists is stricter than Python's: NaN,
    Infinity and integers beyond 64 bits are errors.
    """
    check_annotation_file(path)
    count = 0
    for entry in READERS.get(os.path.splitext(path)[1].lower(), _iter_json)(path):
        yield entry
        count += 1
    if not count:
        raise ValueError(f"{path}: must hold a list of rows, got an empty one")
