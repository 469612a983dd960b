"""Tables, MSR-VTT's official files, Parquet and odd JSON: the rows of a JSON list, or one line that says why not."""

import codecs
import csv
import io
import json
import os
import random
import sys
import tracemalloc
from datetime import datetime

import numpy as np
import pytest
from helpers.benchmarks import eval_config, load_json
from helpers.runs import assert_one_line, command

import eval as evaluation
from annotations import build_mapped_annotations, iter_objects, read_annotations
from formats import iter_annotations
from tasks import TASKS, read_answers, read_rows, split_files

BOM = codecs.BOM_UTF8
ROWS = [{"video": "a b.mp4", "caption": 'A "dog", running.'},
        {"video": "sub/é.mp4", "caption": "日本の鳥 😀\nand\r\nmore"},
        {"video": "c.webm", "caption": "it's\ta tab; and more"}, {"video": "a b.mp4", "caption": '"'}]


def written(path, content):
    """The path of a new file with these bytes or this text."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def as_csv(rows, delimiter=",", **options):
    """Rows, lists of cells, as Python's csv module writes them."""
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, **options).writerows(rows)
    return out.getvalue()


def cells(rows, *names):
    return [list(names), *([row.get(name, "") for name in names] for row in rows)]


def assert_refused(path, match, error=ValueError):
    """Reading the rows fails with one line that names the file."""
    with pytest.raises(error, match=match) as raised:
        list(iter_objects(path))
    assert str(raised.value).startswith(path) and "\n" not in str(raised.value), str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# CSV

@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("name, delimiter", [("rows.csv", ","), ("rows.TSV", "\t"), ("rows.csv", ";"), ("r.tsv", ",")])
@pytest.mark.parametrize("options", [{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}], ids=str)
def test_a_table_has_the_rows_of_a_json_list(tmp_path, mark, name, delimiter, options):
    for columns in (["video", "caption"], ["caption", "video"], ["id", " Video ", "", "CAPTION", ""]):
        table = cells([{name: row.get(name.strip().lower(), "7") for name in columns} for row in ROWS], *columns)
        path = written(tmp_path / name, mark + as_csv(table, delimiter, **options).encode())
        assert list(iter_annotations(path)) == ROWS, columns
    root = str(tmp_path)
    json_path = written(tmp_path / "rows.json", json.dumps(ROWS[:3]))
    path = written(tmp_path / name, as_csv(cells(ROWS[:3], "video", "caption"), delimiter, **options))
    for annotation, expected in zip(read_annotations(path, root, check=False),
                                    read_annotations(json_path, root, check=False), strict=True):
        assert (annotation.video, annotation.captions, annotation.source) == (
            expected.video, expected.captions, expected.source.replace("rows.json", name))


@pytest.mark.parametrize("columns, row, expected", [
    (["path", "sentence"], ["a.mp4", "x"], {"video": "a.mp4", "caption": "x"}),
    (["file_name", "text"], ["a.mp4", "x"], {"video": "a.mp4", "caption": "x"}),                   # Hugging Face
    (["image", "caption"], ["a.jpg", "x"], {"video": "a.jpg", "caption": "x"}),
    (["video_id", "caption"], ["a", "x"], {"video": "a.mp4", "caption": "x"}),
    (["video_id", "caption"], ["a.webm", "x"], {"video": "a.webm", "caption": "x"}),
    (["video_id", "caption"], ["a.JPG", "x"], {"video": "a.JPG", "caption": "x"}),
    (["video_id", "caption"], ["abc_12.5_20.0", "x"], {"video": "abc_12.5_20.0.mp4", "caption": "x"}),
    (["videoid", "caption"], ["v.mp4.part", "x"], {"video": "v.mp4.part.mp4", "caption": "x"}),
    (["video", "caption"], ["abc_12.5", "x"], {"video": "abc_12.5", "caption": "x"}),               # no id
    (["video", "caption", "start", "end"], ["a.mp4", "x", "1_000", "2e3"], {
        "video": "a.mp4", "caption": "x", "start": "1_000", "end": 2000.0}),
    (["video_id", "video", "caption"], ["7", "a.mp4", "x"], {"video": "a.mp4", "caption": "x"}),
    (["name", "video", "caption"], ["n", "a.mp4", "x"], {"video": "a.mp4", "caption": "x"}),
    (["video", "caption", "name", "page_dir"], ["a.mp4", "x", "y", "z"], {"video": "a.mp4", "caption": "x"}),
    (["video", "caption", "start", "end"], ["a.mp4", "x", "3", "7.25"], {"video": "a.mp4", "caption": "x", "start": 3.0,
                                                                      "end": 7.25}),
    (["video", "caption", "start", "end"], ["a.mp4", "x", "", "0:07"], {"video": "a.mp4", "caption": "x",
                                                                       "end": "0:07"}),
    (["video", "question", "answer", "question_id"], ["a.mp4", "why?", "yes", ""],
     {"video": "a.mp4", "question": "why?", "answer": "yes"}),
    ("videoid contentUrl duration page_dir name".split(), ["1023", "https://x/y.mp4", "PT15S", "0001_0050", "a, b"],
     {"video": "0001_0050/1023.mp4", "caption": "a, b"}),                                          # WebVid
    ("videoid contentUrl duration page_dir name".split(), ["1023", "", "", "", ""],
     {"video": "1023.mp4", "caption": ""}),                                                        # no /1023.mp4
    ("key vid_key video_id sentence".split(), ["ret0", "msr9770", "video9770", "a person"],
     {"video": "video9770.mp4", "caption": "a person"}),                                           # MSR-VTT 1k-A
])
def test_columns_by_the_names_that_the_field_uses(tmp_path, columns, row, expected):
    assert list(iter_annotations(written(tmp_path / "rows.csv", as_csv([columns, row])))) == [expected]


def test_a_long_table_is_streamed(tmp_path):
    rng = random.Random(0)
    rows = [{"video": f"{i}.mp4", "caption": "日 word, " * rng.randrange(60)} for i in range(10_000)]
    path = written(tmp_path / "rows.csv", as_csv(cells(rows, "video", "caption")))
    assert os.path.getsize(path) > 2 ** 21
    tracemalloc.start()
    assert all(entry == row for entry, row in zip(iter_annotations(path), rows, strict=True))
    assert tracemalloc.get_traced_memory()[1] < 2 ** 19
    tracemalloc.stop()


@pytest.mark.parametrize("text, match", [
    ("", "header"),
    ("\n \r\n", "column of videos"),
    ("video,caption\n", "empty"),
    ("a.mp4,a dog\nb.mp4,a cat\n", r"column of videos \(video, .*got \['a.mp4', 'a dog'\]"),         # no header
    ("name,caption\na.mp4,x\n", "column of videos"),
    ("video,name\na.mp4,x\n", r"column of captions \(caption, .*got \['video', 'name'\]"),
    ("video,caption,Video\na.mp4,x,b.mp4\n", "one column video, got 2"),
    ("video,caption\na.mp4,x\nb.mp4,x,y\n", r"row 1 \(from line 3\).*2 cells.*got 3"),
    ("video,caption\n\na.mp4,x\n\nb.mp4\n", r"row 1 \(from line 4\).*2 cells.*got 1"),
    ('video,caption\na.mp4,"x\ny"\nb.mp4,"x" y\n', r"row 1 \(from line 4\).*'\"'"),
    ('video,caption\na.mp4,x\nb.mp4,"y\n' + "c.mp4,z\n" * 9, r"row 1 \(from line 3\).*end of data"),
    ('video,caption\na.mp4,"y\n' + "c.mp4,z\n" * 20_000, r"row 0 \(from line 2\).*field"),         # not read to its end
    (b"video,caption\na.mp4,x\nb.mp4,caf\xe9\n", r"row 1 \(from line 3\).*utf-8"),
    (b"video,caf\xe9\na.mp4,x\n", r"header \(from line 1\).*utf-8"),
    ("video,caption\na.mp4,x\n,y\n", 'row 1: "video"'),
    ("video,caption\nx,y".encode("utf-16"), "UTF-8.*UTF-16"),
    ("日本,caption\nx,y".encode("utf-16"), "UTF-8.*UTF-16"),
    ("video,caption\nx,y".encode("utf-16-be"), "UTF-8.*UTF-16"),
    ("video,caption\nx,y".encode("utf-32"), "UTF-8.*UTF-16"),
    ("\ufeff\ufeffvideo,caption\nx,y", "column of videos"),
    ("video,caption,start\na.mp4,x,1_000\n", "row 0: \"start\" must be a number of seconds.*'1_000'"),
    ('video,caption\n1.mp4,"big cat\n2.mp4,a dog 24"\n3.mp4,bird\n', r"row 0 \(from line 2\).*up to 3 that are rows"),
    ('video,caption\n0.mp4,x\n\n1.MP4,"big cat\n\n2.mp4,a dog\n3.webm,a 24"\n', r"row 1 \(from line 3\).*up to 7"),
    ('caption,path\r\n"big cat,1.mp4\r\na dog,2.mp4\r\n24",3.mp4\r\n', r"row 0 \(from line 2\).*up to 4 that"),
    ('video\tcaption\tid\n1.mp4\t"big cat\t7\n2.mp4\ta dog 24"\t8\n', r"row 0 \(from line 2\).*up to 3 that"),
    ('video_id,caption\nvideo1,"big cat\nvideo2,a dog 24"\n', r"row 0 \(from line 2\).*up to 3 that"),
])
def test_a_bad_table_is_refused(tmp_path, text, match):
    path = written(tmp_path / "rows.csv", text)
    with pytest.raises(ValueError, match=match) as error:
        read_annotations(path, str(tmp_path), check=False)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


@pytest.mark.parametrize("caption", ["a dog\nruns, jumps", "a dog\n\nThen, it runs\nAnd, it jumps", "a\n1.mp4",
                                     "a 1.mp4\n2.mp4 b", "a\n1.mp4, 2.mp4, 3.mp4"])
@pytest.mark.parametrize("columns", ["video caption", "caption video", "video_id caption id"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_line_breaks_in_quotes_are_those_of_the_caption(tmp_path, caption, columns, delimiter):
    row = {"video": "1.mp4", "video_id": "1.mp4", "caption": caption, "id": "7"}
    table = [columns.split(), *[[row[name] for name in columns.split()]] * 2]
    path = written(tmp_path / "rows.csv", as_csv(table, delimiter))
    assert list(iter_annotations(path)) == [{"video": "1.mp4", "caption": caption}] * 2


def test_a_table_that_is_cut_loses_no_row_in_silence(tmp_path):
    """Wherever the cut is: an error, or the whole rows and the beginning of a last caption."""
    text = as_csv(cells(ROWS, "video", "caption"), quoting=csv.QUOTE_ALL).encode()
    for i in range(len(text)):
        try:
            rows = list(iter_annotations(written(tmp_path / "rows.csv", text[:i])))
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
            continue
        *whole, last = rows
        expected = ROWS[len(whole)]
        assert whole == ROWS[:len(whole)] and expected["caption"].startswith(last.pop("caption"))
        assert last == {"video": expected["video"]} and text[i - 1:i] in b',"\r\n'


# ---------------------------------------------------------------------------------------------------------------------
# Captions without words

def write_msrvtt(path, captions, indent=None, splits=("train", "validate", "test")):
    """MSR-VTT's file of video ids and their captions, in which the sentences of a video are not together."""
    rng = random.Random(0)
    sentences = [{"caption": text, "video_id": video, "sen_id": i} for video, texts in captions.items()
                 for i, text in enumerate(texts)]
    order = sorted(range(len(sentences)), key=lambda i: (sentences[i]["sen_id"], rng.random()))
    videos = [{"category": 9, "url": "https://x", "video_id": video, "start time": 137.72, "end time": 149.44,
               "split": splits[i % len(splits)], "id": i} for i, video in enumerate(captions)]
    path.write_text(json.dumps({"info": {"year": "2016"}, "videos": videos,
                                "sentences": [sentences[i] for i in order]}, indent=indent))
    return str(path)


def write_parquet(path, columns, **options):
    """Columns, name -> list, as pyarrow writes them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table(columns), str(path), **options)
    return str(path)


@pytest.mark.parametrize("form", ["csv", "webvid", "jsonl", "msrvtt", "9k", "parquet"])
def test_empty_captions_are_counted_and_listed(tmp_path, form, capsys):
    texts = {"v0": "A dog", "v1": "", "v2": " ?! ", "v3": "a cat"}
    rows = [{"video": f"{video}.mp4", "caption": text} for video, text in texts.items()]
    if form == "parquet":
        captions = [text or None for text in texts.values()]
        path = write_parquet(tmp_path / "rows.parquet", {"video_id": list(texts), "caption": captions})
    elif form in ("msrvtt", "9k"):
        path = write_msrvtt(tmp_path / "MSRVTT_data.json", {video: [text] for video, text in texts.items()})
        order = [entry["video"] for entry in iter_annotations(path)]
        rows.sort(key=lambda row: order.index(row["video"]))
        if form == "9k":
            ids = [row["video"][:2] for row in rows]
            path = written(tmp_path / "MSRVTT_train.9k.csv", "\n".join(["video_id", *ids]))
    elif form == "webvid":
        path = written(tmp_path / "rows.csv", as_csv(
            [["videoid", "page_dir", "name"], *([video, "", text] for video, text in texts.items())]))
    elif form == "csv":
        path = written(tmp_path / "rows.csv", as_csv(cells(rows, "caption", "video")))
    else:
        path = written(tmp_path / "rows.txt", "\n".join(map(json.dumps, rows)))
    empty = ", ".join(f"row {i}" for i, row in enumerate(rows) if row["video"] in ("v1.mp4", "v2.mp4"))
    left = [row for row in rows if row["video"] in ("v0.mp4", "v3.mp4")]
    for _ in range(2):                                                      # the copy is made, then it is there
        mapped = build_mapped_annotations([(path, str(tmp_path))], str(tmp_path / "out"))
        assert [(os.path.basename(a.video), *a.captions) for a in mapped] == [
            (row["video"], row["caption"].lower()) for row in left]
        assert capsys.readouterr().out == f"{path}: 2 of 4 captions have no words and are left out: {empty}\n"


# ---------------------------------------------------------------------------------------------------------------------
# MSR-VTT

CAPTIONS = {f"video{i}": [f"caption {i} {j}" for j in range(1 + i % 3)] for i in range(7)}


def by_video(rows):
    return {row["video"]: row["caption"] for row in rows}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["MSRVTT_data.json", "train_val_videodatainfo.json", "a.jsonl"])
def test_all_captions_of_an_msrvtt_file_are_read(tmp_path, name, indent):
    path = write_msrvtt(tmp_path / name, CAPTIONS, indent)
    rows = list(iter_annotations(path))
    assert by_video(rows) == {f"{video}.mp4": texts for video, texts in CAPTIONS.items()} and len(rows) == 7
    assert all(row.keys() == {"video", "caption"} for row in rows)          # no times: the files are cut already
    content = load_json(path)
    del content["info"]
    for keys in (["videos", "sentences"], ["sentences", "videos"], ["sentences"]):
        written(tmp_path / name, BOM + json.dumps({key: content[key] for key in keys}, indent=indent).encode())
        assert list(iter_annotations(path)) == rows


def test_a_list_of_ids_has_the_captions_of_the_file_beside_it(tmp_path):
    ids = ["video3", "video0", "video6"]
    path = written(tmp_path / "MSRVTT_train.9k.csv", "video_id\r\n" + "\r\n".join(ids))
    assert_refused(path, "no column of captions.*MSRVTT_data.json", FileNotFoundError)
    write_msrvtt(tmp_path / "MSRVTT_data.json", CAPTIONS)
    expected = [{"video": f"{video}.mp4", "caption": CAPTIONS[video]} for video in ids]
    assert list(iter_annotations(path)) == expected
    first = build_mapped_annotations([(path, str(tmp_path))], str(tmp_path / "out"))
    assert [a.captions for a in first] == [row["caption"] for row in expected]
    write_msrvtt(tmp_path / "MSRVTT_data.json", {video: [f"{texts[0]} anew"] for video, texts in CAPTIONS.items()})
    changed = build_mapped_annotations([(path, str(tmp_path))], str(tmp_path / "out"))
    assert [a.captions for a in changed] == [[f"{row['caption'][0]} anew"] for row in expected]
    for header, row in (("video_id,description", "video3,x"), ("id,video_id", "7,video3"), ("video_id,name", "video3")):
        own = written(tmp_path / "own.csv", f"{header}\n{row}\n")          # not MSR-VTT's, though beside it
        assert_refused(own, rf"must have a column of captions \(caption, .*got \['{header.split(',')[0]}'")
    indexed = written(tmp_path / "indexed.csv", ",video_id\n0,video3\n")   # as pandas writes it
    assert list(iter_annotations(indexed)) == [{"video": "video3.mp4", "caption": ["caption 3 0 anew"]}]
    path = written(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo3\nvideo7\n")
    assert_refused(path, "row 1: MSRVTT_data.json has no captions of 'video7.mp4'")
    written(tmp_path / "MSRVTT_data.json", '{"info": {}, "videos": []}')
    with pytest.raises(ValueError, match='MSRVTT_data.json.*"sentences"'):
        list(iter_annotations(path))


@pytest.mark.parametrize("text, match", [
    ('{"info": {}, "videos": [{"video_id": "video0"}]}', 'list.*"sentences".*info'),
    ('{"sentences": []}', '"sentences"'),
    ('{"sentences": {"video0": ["x"]}}', '"sentences"'),
    ('{"sentences": [{"video_id": "a", "caption": "x"}, {"video_id": "b"}]}', 'sentence 1.*"caption"'),
    ('{"sentences": [{"video_id": 7, "caption": "x"}]}', 'sentence 0.*"video_id"'),
    ('{"sentences": ["x"]}', "sentence 0.*'x'"),
    ('{"sentences": [{"video_id": "a", "caption": "x"}, {"video_id": "b"', "sentence 1: not JSON"),
    ('{"sentences": [{"video_id": "a", "caption": "\\ud83d"}]}', "half a surrogate pair"),
    ('{"info', "row 0: not JSON"),
])
def test_a_bad_msrvtt_file_is_refused(tmp_path, text, match):
    assert_refused(written(tmp_path / "MSRVTT_data.json", text), match)


@pytest.mark.parametrize("place", ["anno_downstream/", ""])
def test_the_official_files_are_those_of_the_benchmark(models, benchmarks_copy, tmp_path, place):
    """The same scores as with VindLU's files, and the same captions in fine-tuning."""
    names = {"msrvtt_ret_train9k": "MSRVTT_train.9k", "msrvtt_ret_train7k": "MSRVTT_train.7k",
             "msrvtt_ret_test1k": "MSRVTT_JSFUSION_test"}

    def read_split(task, split):
        path, root = split_files(TASKS[task], split, benchmarks_copy)
        return path, sorted((a.video, *a.captions) for a in read_rows(TASKS[task], path, root, train=split == "train"))

    expected = {(task, split): read_split(task, split)[1]
                for task in ("msrvtt", "msrvtt-7k") for split in ("train", "test")}
    scores = evaluation.main(eval_config(models, benchmarks_copy, "msrvtt"))["scores"] if place else None
    captions, tables = {}, {}
    for old, new in names.items():
        old = f"{benchmarks_copy}/anno_downstream/{old}.json"
        tables[new] = [(row["video"].removesuffix(".mp4"), row["caption"]) for row in load_json(old)]
        os.remove(old)
    for video, caption in tables["MSRVTT_train.9k"]:
        captions.setdefault(video, []).append(caption)
    for name, rows in tables.items():
        test = [["key", "vid_key", "video_id", "sentence"], *([f"ret{i}", "msr7", *row] for i, row in enumerate(rows))]
        tables[name] = test if "test" in name else [["video_id"], *([video] for video in dict(rows))]
    with pytest.raises(FileNotFoundError, match="msrvtt_ret_train9k.json"):
        split_files(TASKS["msrvtt"], "train", benchmarks_copy)
    for name, rows in tables.items():
        written(tmp_path / f"benchmarks/{place}{name}.csv", as_csv(rows))
    write_msrvtt(tmp_path / f"benchmarks/{place}MSRVTT_data.json", captions)
    for (task, split), rows in expected.items():
        path, read = read_split(task, split)
        assert path.endswith(f"benchmarks/{place}{names[getattr(TASKS[task], split + '_file').split('|')[0]]}.csv")
        if (task, split) == ("msrvtt-7k", "train"):                         # the fixture's 7k file has other captions
            rows = [row for row in expected["msrvtt", "train"] if row[0] in {video for video, _ in rows}]
        assert read == rows
    if scores:
        result = evaluation.main(eval_config(models, benchmarks_copy, "msrvtt"))
        assert result["scores"] == scores and any("1000" in note for note in result["notes"])


def test_a_file_without_its_captions_ends_training_in_one_line(benchmarks_copy, capsys):
    folder = f"{benchmarks_copy}/anno_downstream"
    os.remove(f"{folder}/msrvtt_ret_train9k.json")
    with open(f"{folder}/MSRVTT_train.9k.csv", "w") as f:
        f.write("video_id\nv0\n")
    args = ["--data.train-file", f"{folder}/MSRVTT_train.9k.csv", "--data.video-root", folder]
    code, _, err = command("train.py", args, capsys)
    assert_one_line("train.py", code, err, "9k.csv has no column of captions.*MSRVTT_data.json")


# ---------------------------------------------------------------------------------------------------------------------
# JSON under any name

ENTRY = '{"video": "a.mp4", "caption": "x"}'
SPREAD = json.dumps(json.loads(ENTRY), indent=2)


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson", "rows.txt", "rows"])
def test_json_is_read_whatever_the_name(tmp_path, name, mark):
    row = json.loads(ENTRY)
    forms = {
        "one line": (ENTRY, 1), "one line that ends": (ENTRY + "\n", 1), "blank lines first": (f"\n \r\n{ENTRY}", 1),
        "lines": (f"{ENTRY}\n{ENTRY}\n", 2), "CRLF": (f"\r\n{ENTRY}\r\n\r\n{ENTRY}\r\n", 2),
        "one object over lines": (SPREAD, 1), "objects over lines": (f"\n{SPREAD}\n{SPREAD}\n{SPREAD}", 3),
        "over lines, CRLF": (f"{SPREAD}\r\n{SPREAD}".replace("\n", "\r\n"), 2),
        "the first over lines": (f"{SPREAD}\n{ENTRY}\n{ENTRY}", 3), "the second over lines": None,
        "several on a line": (f"{ENTRY} {ENTRY}\n{ENTRY}{ENTRY}", 4),
        "brace alone": ("{\n" + ENTRY[1:] + "\n" + ENTRY, 2),
        "list of one": (f"[{ENTRY}]", 1), "list over lines": (f"[\n{SPREAD},\n{SPREAD}\n]\n", 2),
    }
    for form, case in forms.items():
        if case is None:                                                    # found out only after the first row
            assert_refused(written(tmp_path / name, f"{ENTRY}\n{SPREAD}"), "line 2: not JSON")
        else:
            text, count = case
            assert list(iter_annotations(written(tmp_path / name, mark + text.encode()))) == count * [row], form


@pytest.mark.parametrize("more", [
    {"sentences": ["x", "y"]}, {"sentences": [{"video_id": "v", "caption": "z"}]}, {"videos": 7, "sentences": []},
    {"info": {"fps": 3}}, {"info": {"video": "b"}, "videos": [{"caption": "z"}]},
], ids=str)
@pytest.mark.parametrize("key", ["video", "image"])
def test_rows_may_have_keys_of_msrvtt(tmp_path, more, key):
    plain = {key: "a.mp4", "caption": "x"}
    for row in (more | plain, plain | more):                                    # whichever comes first
        lines = written(tmp_path / "rows.jsonl", f"{json.dumps(row)}\n" * 2)
        assert list(iter_annotations(lines)) == [row] * 2
        spread = written(tmp_path / "rows.json", f"{json.dumps(row, indent=2)}\n" * 2)
        assert list(iter_annotations(spread)) == [row] * 2


@pytest.mark.parametrize("text, match", [
    (f"{SPREAD}\n{SPREAD[:-3]}", "row 1: not JSON"),
    (f"{ENTRY}\n[{ENTRY}]", "row 1: must be an object"),
    (f"{SPREAD}\n[{ENTRY}]", "row 1: must be an object"),
    (f"{SPREAD},\n{SPREAD}", "row 1: not JSON"),
    (f"{ENTRY}\n" + '{"a": ' * 3000, "line 2: not JSON"),
    ('{"a": ' * 3000, "not JSON"),
    ("video,caption\na.mp4,x\n", "not JSON"),
    ("x", "row 0: not JSON"),
    (f"{ENTRY}\n{ENTRY}".encode("utf-16"), "UTF-8.*UTF-16"),
    (f"{ENTRY}\n{ENTRY}".encode("utf-16-le"), "UTF-8.*UTF-16"),
    (f" [{ENTRY}]".encode("utf-32-be"), "UTF-8.*UTF-16"),
    (b"\0" * 5000, "not JSON"),                                             # the content never reached the disk
])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_bad_json_is_refused(tmp_path, name, text, match):
    assert_refused(written(tmp_path / name, text), match)


def test_a_byte_order_mark_before_other_files(tmp_path):
    path = written(tmp_path / "answers.json", BOM + b'["dog", "a cat"]')
    assert read_answers(path) == read_answers(written(tmp_path / "answers.txt", BOM + b'"dog"\r\n"a cat"\r\n'))
    assert read_answers(path)[0] == "dog"
    from tokenizer import load_tokenizer
    vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "\ufeff", "##s"]).encode()
    for mark in (b"", BOM):
        vocab = load_tokenizer(written(tmp_path / "vocab.txt", mark + vocabulary)).get_vocab()
        assert vocab["[PAD]"] == 0 and vocab["dog"] == 5 and vocab["\ufeff"] == 6 and len(vocab) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Parquet

def test_a_parquet_file_has_the_rows_of_a_json_list(tmp_path):
    columns = {"junk": [b"\xff"] * 4, "Caption": [row["caption"] for row in ROWS],
               "video": [row["video"] for row in ROWS], "start": [0, None, 3, float("nan")],
               "end": [None, 2.5, None, None]}
    times = [{"start": 0.0}, {"end": 2.5}, {"start": 3.0}, {}]
    expected = [row | more for row, more in zip(ROWS, times, strict=True)]
    for options in ({}, {"row_group_size": 1}, {"compression": "zstd"}, {"use_dictionary": False}):
        path = write_parquet(tmp_path / "rows.PARQUET", columns, **options)
        rows = list(iter_annotations(path))
        assert rows == expected and {type(row.get("start")) for row in rows} == {float, type(None)}
    path = write_parquet(tmp_path / "ids.parquet", {"videoid": [1023, 7], "page_dir": ["0001_0050", None],
                                                    "name": ["x", None], "contentUrl": ["https://x", ""]})
    assert list(iter_annotations(path)) == [{"video": "0001_0050/1023.mp4", "caption": "x"},
                                            {"video": "7.mp4", "caption": ""}]
    path = write_parquet(tmp_path / "id lists.parquet", {"videoid": [["7", "a_1.5"], ["b.webm"]], "caption": ["x", "y"],
                                                         "page_dir": ["0001", None]})
    assert list(iter_annotations(path)) == [{"video": ["0001/7.mp4", "0001/a_1.5.mp4"], "caption": "x"},
                                            {"video": ["b.webm"], "caption": "y"}]
    path = write_parquet(tmp_path / "lists.parquet", {"video": [["a.mp4", "b.mp4"]], "caption": [["x", "y"]]})
    assert [(a.video, a.captions) for a in read_annotations(path, "", check=False)] == [("a.mp4", ["x", "y"]),
                                                                                      ("b.mp4", ["x", "y"])]


@pytest.mark.parametrize("count, junk", [(80_000, 0), (3000, 4000)])
def test_a_long_parquet_file_is_streamed(tmp_path, count, junk):
    """Not a row group at once, nor columns that are not needed."""
    captions = [f"{i:>100}" for i in range(count)]
    path = write_parquet(tmp_path / "rows.parquet", {
        "video": [f"{i}.mp4" for i in range(count)], "junk": [b"x" * junk] * count, "caption": captions},
        compression="none", use_dictionary=False)
    import pyarrow
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1 and os.path.getsize(path) > 8 * 2 ** 20
    before, peak = pyarrow.total_allocated_bytes(), 0
    for i, row in enumerate(iter_annotations(path)):
        assert row == {"video": f"{i}.mp4", "caption": captions[i]}
        if i % 500 == 0:
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert i == count - 1 and peak < 3 * 2 ** 20


@pytest.mark.parametrize("columns, match", [
    ({"caption": ["x"]}, "column of videos"),
    ({"video": ["a.mp4"], "label": [3]}, r"column of captions.*\['video', 'label'\]"),
    ({"video": [3], "caption": ["x"]}, 'row 0: "video"'),
    ({"Video": [3], "path": ["a.mp4"], "caption": ["x"]}, 'row 0: "video".* got 3 in the column Video; rename it'),
    ({"video": ["a.mp4"], "caption": ["x"], "start": [True]}, 'row 0: "start" must be a number of seconds.*True'),
    ({"video": ["a.mp4"], "caption": ["x"], "end": [False]}, 'row 0: "end" must be a number of seconds.*False'),
    ({"video": ["a.mp4"], "caption": ["x"], "start": [datetime(2020, 1, 1)]}, 'row 0: "start" must be a number'),
    ({"video": ["a.mp4"], "caption": ["x"], "start": [np.datetime64(1001, "ns")]}, "row 0 or after it: a value cannot"),
    ({"video": [b"a.mp4"], "caption": ["x"]}, 'row 0: "video"'),
    ({"video": ["a.mp4", None], "caption": ["x", "y"]}, 'row 1: "video"'),
    ({"video": [{"bytes": b"", "path": "a.mp4"}], "caption": ["x"]}, 'row 0: "video"'),            # Hugging Face
    ({"video": ["a.mp4"], "caption": [7]}, 'row 0: "caption".*7'),
    ({"video": ["a.mp4"], "caption": [["x", None]]}, 'row 0: "caption".*None'),
    ({"video": [], "caption": []}, "empty"),
    ({"video_id": [["a", "b"]]}, "no captions of"),
    ({"video_id": ["video0"], "split": ["train"]}, "must have a column of captions"),
])
def test_a_bad_parquet_table_is_refused(tmp_path, columns, match):
    write_msrvtt(tmp_path / "MSRVTT_data.json", CAPTIONS)
    path = write_parquet(tmp_path / "rows.parquet", columns)
    with pytest.raises(ValueError, match=match) as error:
        read_annotations(path, str(tmp_path), check=False)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    """Bytes that are lost at the end, or changed in the pages of one column."""
    rows = {"video": [f"{i}.mp4" for i in range(3000)], "caption": [f"{i * 7919 % 3000:>50}" for i in range(3000)]}
    path = write_parquet(tmp_path / "rows.parquet", rows, compression="gzip", write_page_checksum=True)
    content = open(path, "rb").read()
    for damaged in (b"", b"PAR1", content[:-1], content[:len(content) // 2], content[:4] + content[500:],
                    b"x" * len(content), b"video,caption\na.mp4,x\n"):
        assert_refused(written(tmp_path / "rows.parquet", damaged), "row 0: not Parquet")
    for start in range(200, len(content) // 2, len(content) // 9):
        damaged = content[:start] + bytes(64) + content[start + 64:]
        assert_refused(written(tmp_path / "rows.parquet", damaged), r"row \d+: not Parquet")


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(path, "pip install pyarrow")
