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
from itertools import islice
from urllib.parse import quote

import ijson

from files import format_error
from media import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

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


def _is_msrvtt_object(keys) -> bool:
    """Say whether an object with these keys is MSR-VTT's. A row, which may have such keys too, names its video."""
    return not keys.isdisjoint({"videos", "sentences"}) and keys.isdisjoint({"video", "image"})


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
        return not _is_msrvtt_object(value.keys())
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


def _parse_start(f) -> Iterator[str]:
    """Yield the kind of the value that a JSON file begins with."""
    yield next(ijson.basic_parse(f))[0]


def _is_msrvtt(path: str) -> bool:
    """
    Say whether the object that a JSON file begins with is MSR-VTT's. Its first 65,536 tokens decide: more than a row
    has, fewer than MSR-VTT's. The readers say where the JSON is wrong.
    """
    keys, depth = set(), 0
    with open_text(path) as f, suppress(ijson.JSONError, ValueError):
        for event, value in islice(ijson.basic_parse(f), 2 ** 16):
            depth += event.startswith("start_") - event.startswith("end_")
            if event == "map_key" and depth == 1:
                keys.add(value)
            if not depth:
                break
    return _is_msrvtt_object(keys)


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
    event = next(_parse_json(path, _parse_start))
    items = partial(ijson.items, use_float=True)
    if event == "start_array":
        yield from _parse_json(path, partial(items, prefix="item"))
    elif event == "start_map" and _is_msrvtt(path):
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
    columns = [name.strip().lower() for name in names]
    if "page_dir" not in columns:             # WebVid, whose captions are called "name"
        columns = [name if name != "name" else "" for name in columns]
    found = {key: next((name for name in candidates if name in columns), None) for key, candidates in COLUMNS.items()}
    for name in filter(None, found.values()):
        if columns.count(name) > 1:
            raise ValueError(f"{path}: must have one column {name}, got {columns.count(name)}")
    if not found["video"]:
        raise ValueError(f"{path}: must have a column of videos ({', '.join(COLUMNS['video'])}), got {shorten(names)}")
    only_ids = found["video"] in VIDEO_IDS and len([*filter(str.strip, names)]) == 1        # see iter_table
    if not (found["caption"] or found["question"] or only_ids):
        captions = ", ".join(COLUMNS["caption"][:-1])
        raise ValueError(f"{path}: must have a column of captions ({captions}), got {shorten(names)}")
    return {key: columns.index(name) for key, name in found.items() if name}


def add_extension(video_id: str) -> str:
    """Return the file name of a video from its id, which most files give without the extension. Ids may have dots."""
    return video_id if video_id.lower().endswith(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS) else video_id + ".mp4"


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
    if is_id:
        name = lambda video: (os.path.join(str(folder), add_extension(str(video)))
                              if isinstance(video, (str, int)) and video != "" else video)
        video = entry.get("video")
        entry["video"] = [*map(name, video)] if isinstance(video, list) else name(video)
    for key in entry.keys() & {"start", "end"}:
        with suppress(TypeError, ValueError):           # what is no number is refused where its row can be named
            if not isinstance(entry[key], bool) and "_" not in str(entry[key]):     # Python reads True and "1_000"
                entry[key] = float(entry[key])
    return entry


def iter_table(path: str, iter_values) -> Iterator[dict]:
    """
    Yield the entries of a table. iter_values(path) yields the names of its columns, then its rows, lists of values. If
    the table has one column, ids of videos, as MSRVTT_train.9k.csv, the captions are in MSRVTT_data.json beside it.
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
        if isinstance(entry.get("video"), (int, float)):
            raise ValueError(f'{path}, row {i}: "video" must be a file name, got {entry["video"]} in the column '
                             f"{names[columns['video']]}; rename it if another column has the names")
        yield entry


def read_msrvtt_captions(path: str) -> dict[str, list[str]]:
    """Read the captions of each video from the MSRVTT_data.json beside a table without captions."""
    captions = os.path.join(os.path.dirname(path), MSRVTT_CAPTIONS)
    if not os.path.isfile(captions):
        raise FileNotFoundError(f"{path} has no column of captions, so {captions} must have them, which does not exist")
    return {entry["video"]: entry["caption"] for entry in _iter_msrvtt(captions)}


def is_joined(path: str, lines: list[str], delimiter: str, header: list[str]) -> bool:
    """
    Say whether the lines of one row of a CSV file are rows of their own, which an unclosed quote has joined: each has
    as many cells as the header and, in the column of videos, the name of a file or, among ids, something that is no
    word. The lines of a caption with line breaks and commas have not.
    """
    column, lines = match_columns(path, header)["video"], [*filter(str.strip, lines)]

    def is_row(cells):
        name = cells[column].strip(' "').lower() if len(cells) == len(header) else ""
        is_id = header[column].strip().lower() in VIDEO_IDS and re.fullmatch(r"\S*[\d_-]\S*", name)
        return name.endswith(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS) or is_id

    return len(lines) > 1 and all(is_row(line.rstrip("\r\n").split(delimiter)) for line in lines)


def iter_csv(path: str) -> Iterator[list[str]]:
    """Yield the header and the rows of a CSV file. The header tells whether commas, tabs or semicolons separate."""
    with open_text(path) as f:
        header = next(filter(bytes.strip, f), b"")
    delimiter = max(",\t;", key=lambda character: header.count(character.encode()))
    names, count, line = [], -1, 1          # columns, rows before this one without the header, first line of this one
    with open_text(path) as f:
        lines = []                                                          # of the row
        decoded = (lines.append(text) or text for text in map(bytes.decode, f))
        rows = csv.reader(decoded, delimiter=delimiter, strict=True)
        try:
            for row in filter(None, rows):                                  # a blank line is an empty list
                names = names or row
                if len(row) != len(names):
                    raise csv.Error(f"must have {len(names)} cells as the header has, got {len(row)}")
                if count >= 0 and len(lines) > 1 and is_joined(path, lines, delimiter, names):
                    raise csv.Error(f"a quote joins lines up to {rows.line_num} that are rows of their own; in a cell "
                                    "that begins with a quote, those within must be doubled")
                yield row
                lines.clear()
                count, line = count + 1, rows.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            row = f"row {count}" if names else "header"
            raise ValueError(f"{path}, {row} (from line {line}): not CSV ({error})") from None
    if not names:
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
    except ValueError as error:                                             # nanoseconds, which Python has not
        raise ValueError(f"{path}, row {count} or after it: a value cannot be read ({format_error(error)})") from None


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
