"""Annotation files of each form: what is read, that long lists are streamed, what is refused, and the mapped file."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import sqlite3
import tracemalloc
from contextlib import closing, contextmanager

import numpy as np
import pytest
from helpers.damage import damaged_copies

import annotations
import files
from annotations import build_mapped_annotations, iter_annotations, read_annotations
from data import ClipDataset, DataConfig

ENTRY = '{"video": "a.mp4", "caption": "x"}'


def written(path, content):
    """The path of a new file with these bytes, this text, or this content as JSON."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def assert_refused(path, match):
    """Reading the file fails with one line that names it."""
    with pytest.raises(ValueError, match=match) as error:
        list(iter_annotations(path))
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_captions_are_normalized_as_in_umt():
    text = '  A "Man", 3/4-asleep:  (he\'s <person> #1)!? ~;* '
    assert annotations.normalize_caption(text) == "a man 3 4 asleep hes person 1"
    assert annotations.normalize_caption(" .,!? ") == ""


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def test_rows_are_read_in_every_published_form(tmp_path):
    for name in ("a.mp4", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    rows = [{"video": "a.mp4", "caption": "A dog, running."}, {"image": "b.jpg", "caption": ["One!", "Two"]},
            {"video": "a.mp4", "caption": "again", "still": "A dog."}]
    a, b, c = read_annotations(written(tmp_path / "rows.json", rows), str(tmp_path))
    assert a.video == str(tmp_path / "a.mp4") and a.captions == ["a dog running"] and a.frame_caption is None
    assert b.captions == ["one", "two"] and c.frame_caption == "a dog"


def test_a_media_id_belongs_to_a_file_and_not_to_a_name(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        written(tmp_path / name, [{"video": "a.mp4", "caption": "x"}, {"video": "./b.mp4", "caption": "y"}])
    corpora = [("a.json", "one"), ("b.json", f"{tmp_path}/one"), ("b.json", "two"), ("a.json", "two/../one/")]
    ids = [a.media_id for a in build_mapped_annotations(corpora, "out")]
    assert ids[:2] == ids[2:4] == ids[6:] and len(set(ids)) == 4
    assert all(isinstance(i, int) and 0 <= i < 2 ** 63 for i in ids)        # an int64


@pytest.mark.parametrize("rows, match", [
    (["a.mp4"], "row 0.*'a.mp4'"),
    ([{"caption": "x"}], 'row 0.*"video" or "image".*caption'),
    ([{"video": ["a.mp4", ""], "caption": "x"}], 'row 0.*"video"'),
    ([{"video": [], "caption": "x"}], 'row 0.*"video"'),
    ([{"video": "a.mp4", "caption": "x"}, {"video": "a.mp4"}], 'row 1.*"caption".*None'),
    ([{"video": "a.mp4", "caption": ["x", 3]}], r"row 0.*\['x', 3\]"),
    ([{"video": "a.mp4", "caption": []}], r"row 0.*\[\]"),
    ([{"video": "a.mp4", "caption": ["x", "", None]}], r"row 0.*\['x', '', None\]"),
    ([{"video": "a.mp4", "caption": "x"}] + 2 * [{"video": "b.mp4", "caption": "x"}], "row 1.*b.mp4 .2 of 3"),
])
def test_a_bad_row_is_named_in_one_line(tmp_path, rows, match):
    (tmp_path / "a.mp4").write_bytes(b"")
    path = written(tmp_path / "rows.json", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=f"rows.json, {match}") as error:
        read_annotations(path, str(tmp_path))
    assert "\n" not in str(error.value)


ROWS_WITH_EMPTY = [
    {"video": "a.mp4", "caption": ["x", " ?! ", ""]}, {"video": ["b.mp4", "c.mp4"], "caption": "..."},
    {"video": "a.mp4", "caption": "Y"}, {"video": ["b.mp4", "c.mp4"], "caption": ["", "z"]}]
NOTE = "rows.json: 4 of 7 captions have no words and are left out: row 0, row 1, row 3"


def test_captions_without_words_are_left_out_counted_and_listed(tmp_path, capsys):
    path = written(tmp_path / "rows.json", ROWS_WITH_EMPTY)
    expected = [("a.mp4", ["x"]), ("a.mp4", ["y"]), ("b.mp4", ["z"]), ("c.mp4", ["z"])]
    rows = lambda annotations: [(os.path.basename(a.video), a.captions) for a in annotations]
    assert rows(read_annotations(path, str(tmp_path), check=False)) == expected
    assert capsys.readouterr().out == f"{tmp_path}/{NOTE}\n"
    notes = []
    assert rows(read_annotations(path, str(tmp_path), check=False, notes=notes)) == expected
    assert notes == [f"{tmp_path}/{NOTE}"] and capsys.readouterr().out == ""
    for _ in range(2):                                                      # in a run, and when it begins again
        assert rows(build_mapped_annotations([(path, str(tmp_path))], str(tmp_path / "out"))) == expected
        assert capsys.readouterr().out == f"{tmp_path}/{NOTE}\n"
    path = written(tmp_path / "many.json", [{"video": "a.mp4", "caption": "x" * (i == 7)} for i in range(99)])
    assert len(read_annotations(path, str(tmp_path), check=False)) == 1
    out = capsys.readouterr().out
    assert "98 of 99" in out and out.endswith("row 19, row 20, ...\n") and len(out.splitlines()) == 1


def test_a_file_whose_captions_have_no_words_at_all_is_refused(tmp_path):
    path = written(tmp_path / "rows.json", ROWS_WITH_EMPTY[1:2] * 30)
    for read in (lambda: read_annotations(path, str(tmp_path), check=False),
                 lambda: build_mapped_annotations([(path, str(tmp_path))], str(tmp_path / "out"))):
        with pytest.raises(ValueError, match="rows.json: no caption has words, got 30 without, in row 0, ") as error:
            read()
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "out") == []


HOSTILE = "\x1b[31m\n\r\u202e"


def test_hostile_names_are_printed_escaped_and_read(tmp_path, monkeypatch, capsys):
    """Of the annotation file, of its folder, and of videos, one of which is not valid Unicode."""
    monkeypatch.chdir(tmp_path)
    root = f"videos{HOSTILE}\udcff"
    os.mkdir(root)
    names = [f"{HOSTILE}.mp4", "\udcfe.mp4", "plain.mp4"]
    for name in names:
        open(os.path.join(root, name), "w").close()
    rows = [{"video": name, "caption": f"clip {i}"} for i, name in enumerate(names)] + [{"video": "x", "caption": ""}]
    path = f"rows{HOSTILE}\udcfd.jsonl"
    with open(path, "w") as f:
        f.write("\n".join(map(json.dumps, rows)))
    annotations = read_annotations(path, root)
    assert [a.video for a in annotations] == [os.path.join(root, name) for name in names]
    assert list(build_mapped_annotations([(path, root)], "out")) == annotations
    assert len({a.media_id for a in annotations}) == 3
    out, err = capsys.readouterr()
    assert "rows\\x1b[31m\\n\\r\\u202e\\udcfd.jsonl: 1 of 4 captions" in out and len(out.splitlines()) == 2
    for character in "\x1b\u202e\udcfd":
        assert character not in out + err


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="rows.json"):
        read_annotations(str(tmp_path / "rows.json"), str(tmp_path))
    path = written(tmp_path / "rows.json", f"[{ENTRY}]")
    with pytest.raises(FileNotFoundError, match="nowhere.*rows.json"):
        read_annotations(path, str(tmp_path / "nowhere"))
    (tmp_path / "folder.json").mkdir()
    for name, match in (("typo/rows.json", "typo/rows.json.* folder .*typo$"), ("folder.json", "folder.json.*folder")):
        with pytest.raises(FileNotFoundError, match=match):
            read_annotations(str(tmp_path / name), str(tmp_path))
        with pytest.raises(FileNotFoundError, match=match):
            build_mapped_annotations([(str(tmp_path / name), str(tmp_path))], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "typo").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Files

NUMBERS = ["0", "-0", "7", "-12", "1.5", "0.25", "-3.0", "1e5", "2E-3", "-1.25e+10", "9223372036854775807"]
LETTERS = ["a", " ", '"', "\\", "/", "\n", "\t", "[", "]", "{", ",", ":", "é", "日", "😀", "\u2028", "\x7f", "\0"]


def random_json(rng, depth=0):
    """A random value as JSON text, a list at depth 0, in one of the many ways to write it."""
    space = lambda: "".join(rng.choices(" \n\t\r", k=rng.choice([0, 0, 0, 1, 2, 5])))
    text = lambda: json.dumps("".join(rng.choices(LETTERS, k=rng.choice([0, 1, 3, 30]))),
                              ensure_ascii=rng.random() < 0.5)
    kind = rng.choice(["number", "text", "word"] + 2 * ["list", "object"] * (depth < 3)) if depth else "list"
    if kind == "number":
        return rng.choice(NUMBERS)
    if kind in ("text", "word"):
        return text() if kind == "text" else rng.choice(["true", "false", "null"])
    values = [space() + random_json(rng, depth + 1) + space() for _ in range(rng.choice([0, 1, 2, 6]))]
    if kind == "list":
        return f"[{','.join(values) or space()}]"
    return "{" + (",".join(f"{space()}{text()}{space()}:{value}" for value in values) or space()) + "}"


def test_a_json_list_is_read_as_python_reads_it(tmp_path):
    """Numbers too: floats are no Decimals, integers no floats."""
    rng = random.Random(0)
    for _ in range(200):
        text = f"\n[{random_json(rng)}, {random_json(rng)}] "
        assert repr(list(iter_annotations(written(tmp_path / "rows.json", text)))) == repr(json.loads(text)), text
    twice = '[{"video": "a", "video": "b"}]'                                # of a key that is there twice the last
    assert list(iter_annotations(written(tmp_path / "rows.json", twice))) == json.loads(twice) == [{"video": "b"}]


def test_a_long_list_is_streamed(tmp_path):
    rng = random.Random(0)
    rows = [{"video": f"{i}.mp4", "caption": "日 word " * rng.randrange(60), "time": i / 7} for i in range(20000)]
    rows[7000]["caption"] = "a very long text " * 20_000                    # longer than the parser's buffer
    path = written(tmp_path / "rows.json", json.dumps(rows, indent=1, ensure_ascii=False))
    assert os.path.getsize(path) > 6 * 2 ** 20
    tracemalloc.start()
    assert all(entry == row for entry, row in zip(iter_annotations(path), rows, strict=True))
    assert tracemalloc.get_traced_memory()[1] < 2 * 2 ** 20
    tracemalloc.stop()


def test_rows_before_an_error_are_read(tmp_path):
    entries = iter_annotations(written(tmp_path / "rows.json", f"[{ENTRY}, {ENTRY}, {{]"))
    assert [next(entries), next(entries)] == 2 * [json.loads(ENTRY)]
    with pytest.raises(ValueError, match="rows.json, row 2"):
        next(entries)


@pytest.mark.parametrize("text, match", [
    ("", "row 0"),
    (" \n", "row 0"),
    (f"[{ENTRY} {ENTRY}]", "row 1"),
    (f"[{ENTRY}, {ENTRY},]", "row 2"),
    (f"[,{ENTRY}]", "row 0"),
    (f"[{ENTRY}] {ENTRY}", "row 1"),
    (f"[{ENTRY}]]", "row 1"),
    (f"[{ENTRY}, {ENTRY}", "row 2"),
    ("[{'video': 1}]", "row 0"),
    ("\ufeff\ufeff" + f"[{ENTRY}]", "row 0"),                               # only one mark is skipped
    (f"[\ufeff{ENTRY}]", "row 0"),
    (f"[{ENTRY}]".encode("utf-16"), "UTF-8.*UTF-16"),                       # which begins with a mark of its own
    (f"[{ENTRY}, ".encode() + b'{"video": "\xff"}]', "row 1.*UTF"),
    (f"[{ENTRY}, ".encode() + b'{"video": "\xed\xa0\x80"}]', "row 1.*utf"),         # half a surrogate pair as bytes
    ("[1, NaN]", "row 1"),
    ("[-Infinity]", "row 0"),
    ("[1e400]", "row 0.*overflow"),
    ("[9223372036854775808]", "row 0.*overflow"),
    ("3.5", "list.*'3.5'"),
    ('"\\n"', "list"),
    ("null", "list.*'null'"),
    ("[ ]", "list.*empty"),
])
def test_a_malformed_json_list_is_refused_by_its_row(tmp_path, text, match):
    assert_refused(written(tmp_path / "rows.json", text), match)


def test_a_list_that_is_cut_anywhere_is_refused(tmp_path):
    text = f'[{ENTRY}, {{"video": "é.mp4", "caption": ["x", "\\u00e9"], "n": [-1.5e3, true]}}]'.encode()
    for i in range(len(text)):
        assert_refused(written(tmp_path / "rows.json", text[:i]), "row")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt"])
def test_a_file_is_read_by_its_content_and_not_by_its_name(tmp_path, name, mark):
    rows = [{"video": "é.mp4", "caption": ["x", "{"]}, {"video": "b.mp4", "n": {"a": [1, "\ufeff"]}}, json.loads(ENTRY)]
    forms = {"list": json.dumps(rows), "indented": json.dumps(rows, indent=1, ensure_ascii=False),
             "lines": "\n".join(map(json.dumps, rows)),
             "spaced": "\n \r\n" + "\r\n\n ".join(map(json.dumps, rows)) + "\n",
             "long": json.dumps(rows + [{"caption": "{" * 2 ** 21}]), "empty rows": "{}\n{}", "texts": '["a", "b"]',
             "lines of texts": '"a"\n"b"\n'}
    expected = {**dict.fromkeys(("list", "indented", "lines", "spaced"), rows), "texts": ["a", "b"],
                "long": rows + [{"caption": "{" * 2 ** 21}], "empty rows": [{}, {}], "lines of texts": ["a", "b"]}
    for form, text in forms.items():
        assert list(iter_annotations(written(tmp_path / name, mark + text.encode()))) == expected[form], form


@pytest.mark.parametrize("text, match", [
    (f"{ENTRY}\n{ENTRY[:-1]}\n", "line 2"),
    (f"{ENTRY}\n{ENTRY},\n", "line 2"),
    (json.dumps({"info": {}, "videos": [json.loads(ENTRY)]}), "list.*info"),
    (json.dumps({"info": {}, "videos": [json.loads(ENTRY)]}, indent=1), "list.*info"),
])
def test_what_is_neither_a_list_nor_lines_is_refused(tmp_path, text, match):
    assert_refused(written(tmp_path / "rows.json", text), match)


@pytest.mark.parametrize("line, match", [
    (ENTRY[:-1], "line 3"),
    (f"{ENTRY} {ENTRY}", "line 3"),
    ("\ufeff" + ENTRY, "line 3.*BOM"),
    (b'{"video": "\xff"}', "line 3.*utf-8"),
])
def test_a_malformed_line_is_refused_by_its_number(tmp_path, line, match):
    line = line if isinstance(line, bytes) else line.encode()
    path = written(tmp_path / "rows.jsonl", f"{ENTRY}\n\n".encode() + line + f"\n{ENTRY}\n".encode())
    entries = iter_annotations(path)
    assert next(entries) == json.loads(ENTRY)
    assert_refused(path, match)


def test_an_empty_file_or_a_bad_database_is_refused(tmp_path):
    assert_refused(written(tmp_path / "empty.jsonl", "\n"), "empty")
    for content in ("", "not a database\n" * 100):
        assert_refused(written(tmp_path / "rows.sqlite", content), "SQLite.*annos")
    write_database(tmp_path / "rows.db", [])
    assert_refused(str(tmp_path / "rows.db"), "empty")


def test_half_a_surrogate_pair_is_refused(tmp_path):
    """No tokenizer takes it. Python's JSON parser reads it; that of JSON lists would replace it by "?"."""
    half = ENTRY[:-2] + r' \ud83d"}'
    path = written(tmp_path / "rows.jsonl", f"{ENTRY}\n{half}")
    with pytest.raises(ValueError, match='rows.jsonl, row 1.*"caption"') as error:
        read_annotations(path, str(tmp_path), check=False)
    assert "\n" not in str(error.value)
    for escape, good in ((r"\ud83d", False), (r"\ud83d\ud83d\ude00", False), (r"\\\ud83d", False), (r"\ude00", False),
                         (r"\ud83d\ude00", True), (r"\\ud83d", True), (r"\uD83D\uDE00\u00e9", True)):
        path = written(tmp_path / "rows.json", f"[{ENTRY}, {ENTRY[:-2]} {escape}" + '"}]')
        if good:
            assert len(read_annotations(path, str(tmp_path), check=False)) == 2, escape
        else:
            with pytest.raises(ValueError, match="rows.json"):
                read_annotations(path, str(tmp_path), check=False)


# ---------------------------------------------------------------------------------------------------------------------
# The mapped file

def write_database(path, rows):
    """VindLU's SQLite."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("create table annos (id integer primary key, image text, caption text)")
        database.executemany("insert into annos values (?, ?, ?)", rows)
        database.commit()
    return str(path)


@pytest.fixture
def corpora(tmp_path):
    """Three corpora, (annotation file, folder) each, with every kind of row."""
    for name in ("videos", "more #1", "images"):
        (tmp_path / name).mkdir()
    rows = [{"video": "a.mp4", "caption": "A dog, running."},
            {"video": ["b.mp4", "sub/日.mp4"], "caption": ["Zwei Vögel?", "日本の鳥 😀", "x"], "still": "Birds!"},
            {"image": "c.jpg", "caption": "it's <person>", "still": " ?! ", "id": 7}]
    lines = [{"video": f"a{i % 7}.mp4", "caption": f"Clip {i}", "still": None} for i in range(50)]
    images = [(30, "c.png", "Third"), (10, "ä.png", "First, ü"), (20, "b.png", "Second")]
    return [(written(tmp_path / "rows.json", rows), str(tmp_path / "videos")),
            (written(tmp_path / "lines.jsonl", "\n\n".join(map(json.dumps, lines))), str(tmp_path / "more #1")),
            (write_database(tmp_path / "odd %20?name.sqlite", images), str(tmp_path / "images"))]


def read_all(corpora):
    return [annotation for path, root in corpora for annotation in read_annotations(path, root, check=False)]


def test_mapped_annotations_are_those_of_all_corpora_in_order(corpora, tmp_path):
    expected = read_all(corpora)
    assert [os.path.basename(a.video) for a in expected[54:]] == ["ä.png", "b.png", "c.png"]
    mapped = build_mapped_annotations(corpora, str(tmp_path / "out"))
    assert len(mapped) == len(expected) and list(mapped) == expected
    assert [mapped[i] for i in range(-len(expected), len(expected))] == expected * 2
    for dtype in (np.int32, np.int64, np.uint8):
        assert mapped[dtype(5)] == expected[5]
    assert mapped[np.int64(-1)] == expected[-1]
    for i in (len(expected), -len(expected) - 1, np.int64(10 ** 6)):
        with pytest.raises(IndexError):
            mapped[i]
    assert expected[1].source == expected[2].source == f"{corpora[0][0]}, row 1"
    assert expected[1].media_id != expected[2].media_id
    assert mapped[1].captions == ["zwei vögel", "日本の鳥 😀", "x"]
    assert mapped[1].frame_caption == "birds" and mapped[3].frame_caption is None


def test_another_process_receives_a_path_and_not_the_annotations(corpora, tmp_path):
    mapped = build_mapped_annotations(corpora, str(tmp_path / "out"))
    message = pickle.dumps(mapped)
    assert len(message) < 300 and list(pickle.loads(message)) == list(mapped)


def test_files_are_read_once_and_again_if_they_change(corpora, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    first = build_mapped_annotations(corpora, out)
    assert len(os.listdir(out)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(annotations, "iter_rows", None)
        again = build_mapped_annotations(corpora, out)
    assert list(again) == list(first) and again.digest == first.digest
    path = corpora[1][0]
    with open(path) as f:
        text = f.read()
    with open(path, "a") as f:
        f.write('\n{"video": "new.mp4", "caption": "new"}')
    longer = build_mapped_annotations(corpora, out)
    assert list(longer) == read_all(corpora) and len(longer) == len(first) + 1 and longer.digest != first.digest
    with open(path, "w") as f:
        f.write(text.replace("Clip 49", "clip 94"))                         # as many bytes as before
    other = build_mapped_annotations(corpora, out)
    assert list(other) == read_all(corpora) and len({first.digest, longer.digest, other.digest}) == 3
    with open(path, "w") as f:
        f.write(text)
    os.utime(path, ns=(0, 0))
    assert build_mapped_annotations(corpora, out).digest == first.digest
    choices = corpora, corpora[::-1], corpora[:2], corpora[1:], corpora + corpora
    assert len({build_mapped_annotations(choice, out).digest for choice in choices}) == 5
    moved = [(path, root + "/.") for path, root in corpora[:1]]             # other video paths, other annotations
    assert list(build_mapped_annotations(corpora[:1], out)) == read_all(corpora[:1]) != read_all(moved)
    assert list(build_mapped_annotations(moved, out)) == read_all(moved)


def test_names_and_contents_of_earlier_versions_are_found(tmp_path, monkeypatch):
    """A run that began with an earlier version resumes: JSON files have the same name and digest, and no lost data."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("videos")
    path = written(tmp_path / "rows.json", [{"video": "a.mp4", "caption": ["A dog", "x"]}, {"image": "b.png",
                                                                                             "caption": "y"}])
    mapped = build_mapped_annotations([(path, "videos")], "out")
    key = [3, [path, "videos", os.path.getsize(path), os.stat(path).st_mtime_ns]]
    lines = [json.dumps({"video": video, "captions": captions, "frame_caption": None, "questions": [],
                         "correct_index": None, "source": f"{path}, row {i}"}) + "\n"
             for i, (video, captions) in enumerate([("videos/a.mp4", ["a dog", "x"]), ("videos/b.png", ["y"])])]
    assert os.path.basename(mapped.path) == (
        "annotations_" + hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest())
    assert mapped.digest == hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()
    about = files.read_json(mapped.path + ".json")
    assert about.pop("lost_data") == []
    files.write_json(mapped.path + ".json", about)
    monkeypatch.setattr(annotations, "iter_rows", None)
    assert list(build_mapped_annotations([(path, "videos")], "out")) == list(mapped)


@pytest.mark.parametrize("extension", [".offsets", ".jsonl"])
def test_incomplete_files_are_written_again(corpora, tmp_path, extension):
    mapped = build_mapped_annotations(corpora, str(tmp_path / "out"))
    expected = list(mapped)
    os.remove(mapped.path + ".json")                                        # killed before it said that all is there
    with open(mapped.path + extension, "wb") as f:
        f.write(b"0")
    assert list(build_mapped_annotations(corpora, str(tmp_path / "out"))) == expected


def test_processes_that_write_at_once_end_with_the_same_file(corpora, tmp_path, monkeypatch):
    fork, out, expected = multiprocessing.get_context("fork"), str(tmp_path / "out"), read_all(corpora)
    barrier, results, iter_rows = fork.Barrier(2), fork.Queue(), annotations.iter_rows

    def iter_rows_together(*corpus):
        for i, annotation in enumerate(iter_rows(*corpus)):
            if i == 2:
                barrier.wait(30)                                            # both have begun to write
            yield annotation

    def main():
        mapped = build_mapped_annotations(corpora, out)
        results.put((mapped.path, mapped.digest, list(mapped)))

    monkeypatch.setattr(annotations, "iter_rows", iter_rows_together)
    processes = [fork.Process(target=main) for _ in range(2)]
    for p in processes:
        p.start()
    one, other = [results.get(timeout=30) for _ in processes]
    for p in processes:
        p.join(30)
    assert one == other and one[2] == expected
    assert len(os.listdir(out)) == 3


def test_a_corpus_that_cannot_be_read_is_named_and_nothing_is_left(corpora, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        build_mapped_annotations([*corpora, (str(tmp_path / "nowhere.json"), str(tmp_path))], str(out))
    with pytest.raises(FileNotFoundError, match="nowhere.*lines.jsonl"):
        build_mapped_annotations([corpora[0], (corpora[1][0], str(tmp_path / "nowhere"))], str(out))
    assert not out.exists() or not os.listdir(out)
    with open(corpora[1][0], "a") as f:
        f.write('\n{"video": "a.mp4", "caption": 7}\n')
    with pytest.raises(ValueError, match="lines.jsonl, row 50.*7"):
        build_mapped_annotations(corpora, str(out))
    assert os.listdir(out) == []


EXTENSIONS = [".json", ".jsonl", ".offsets"]


def read_rows_of(path):
    """All that a run takes from the three files."""
    mapped = annotations.MappedAnnotations(path)
    return mapped.digest, mapped.notes, [mapped[i] for i in range(len(mapped))]


def assert_damage_is_named(path, read):
    """read() fails with one line that names the files and what to do."""
    name = r"annotations_\w+\.(json|jsonl or \.offsets)"
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\): delete ") as error:
        read()
    assert str(error.value).count(path) == 2 and "\n" not in str(error.value)
    return True


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_each_damage_of_a_mapped_file_is_named(corpora, tmp_path, extension):
    written(tmp_path / "empty.json", ROWS_WITH_EMPTY)
    corpora.append((str(tmp_path / "empty.json"), str(tmp_path)))
    path = build_mapped_annotations(corpora, str(tmp_path / "out")).path
    expected, detected = read_rows_of(path), 0
    assert expected[1] and len(expected[2]) == 61
    with open(path + extension, "rb") as f:
        content = f.read()
    for damaged in damaged_copies(content, 40):
        with open(path + extension, "wb") as f:
            f.write(damaged)
        try:
            assert read_rows_of(path) == expected
        except ValueError:
            detected += assert_damage_is_named(path, lambda: read_rows_of(path))
    assert detected >= 70 if extension == ".json" else detected == 80       # white space of JSON does not count
    with open(path + extension, "wb") as f:
        f.write(content)
    assert read_rows_of(path) == expected


def test_files_of_other_annotations_are_not_mixed(corpora, tmp_path):
    """Not even if they have as many rows of as many bytes."""
    rows = [[{"video": f"{i}.mp4", "caption": f"{word} {i}"} for i in range(9)] for word in ("one", "two")]
    paths = [build_mapped_annotations([(written(tmp_path / f"{i}.json", content), str(tmp_path))],
                                      str(tmp_path / "out")).path for i, content in enumerate(rows)]
    one, two = paths
    for extension in EXTENSIONS:
        shutil.copy(two + extension, tmp_path / f"kept{extension}")
    for moved in ([".json"], [".jsonl"], [".offsets"], [".jsonl", ".offsets"], EXTENSIONS):
        for extension in EXTENSIONS:
            shutil.copy(one + extension if extension in moved else tmp_path / f"kept{extension}", two + extension)
        assert_damage_is_named(two, lambda: read_rows_of(two))
    for extension in EXTENSIONS:
        shutil.copy(tmp_path / f"kept{extension}", two + extension)
    with open(two + ".jsonl", "rb") as f:                                   # two rows of one file change places
        lines = f.readlines()
    index = np.fromfile(two + ".offsets", annotations.INDEX_ENTRY)
    index["crc"][[3, 4]], lines[3:5] = index["crc"][[4, 3]], lines[4:2:-1]
    index["end"] = np.cumsum([len(line) for line in lines])
    index.tofile(two + ".offsets")
    with open(two + ".jsonl", "wb") as f:
        f.writelines(lines)
    assert_damage_is_named(two, lambda: annotations.MappedAnnotations(two)[3])
    assert annotations.MappedAnnotations(two)[5].captions == ["two 5"]


def test_a_damaged_row_stops_the_run_and_is_no_unreadable_video(tmp_path):
    (tmp_path / "videos").mkdir()
    rows = [{"video": f"{i}.mp4", "caption": f"clip {i}"} for i in range(20)]
    mapped = build_mapped_annotations([(written(tmp_path / "rows.json", rows), str(tmp_path / "videos"))],
                                      str(tmp_path / "out"))
    dataset = ClipDataset(mapped, DataConfig(frame_cache=False, max_unreadable=1.0))
    with pytest.raises(ValueError, match="neither can the 9 videos"):       # of intact rows: no video exists
        dataset[0]
    with open(mapped.path + ".jsonl", "r+b") as f:
        f.write(b"x" * os.path.getsize(mapped.path + ".jsonl"))
    assert_damage_is_named(mapped.path, lambda: dataset[0])


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_full_disk_is_named_and_what_is_there_is_not_used(corpora, tmp_path, monkeypatch, extension):
    expected, atomic_write = read_all(corpora), files.atomic_write

    class FullDisk:
        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def full_disk(path):
        with atomic_write(path) as f:
            yield FullDisk() if path.endswith(extension) else f

    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(annotations, "atomic_write", full_disk)
        patch.setattr(files, "atomic_write", full_disk)
        with pytest.raises(files.WriteError, match=rf"annotations_\w+{extension} .*No space left") as error:
            build_mapped_annotations(corpora, out)
    assert "\n" not in str(error.value) and not [name for name in os.listdir(out) if name.endswith((".tmp", ".json"))]
    assert list(build_mapped_annotations(corpora, out)) == expected


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_mapped_file_that_was_deleted_is_made_again(corpora, tmp_path, extension):
    mapped = build_mapped_annotations(corpora, str(tmp_path / "out"))
    os.remove(mapped.path + extension)
    assert list(build_mapped_annotations(corpora, str(tmp_path / "out"))) == read_all(corpora)
