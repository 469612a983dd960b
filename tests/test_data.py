"""Texts, annotations of any length, clips that cannot be read, samples as functions of (seed, n)."""

import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import sqlite3
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_decoding import cut, numbers, write

import data
import decoding
from data import Clips, DataConfig, Mix, collate, read_annotations, write_rows
from decoding import read_frames
from sprites import plan, write_sprites


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("data") / "sprites")
    write_sprites(out, train=24, test=1, val=1)
    return out


@pytest.fixture
def rows(sprites):
    return read_annotations(f"{sprites}/sprites_train.json", f"{sprites}/videos")


# ---------------------------------------------------------------------------------------------------------------------
# Text

def test_captions_are_cleaned_as_umt_does():
    assert data.clean('  A "Man", 3/4-asleep:  (he\'s <person> #1)!? ~;* ') == "a man 3 4 asleep hes person 1"
    assert data.clean(" .,!? ") == ""


def test_the_same_captions_give_the_same_tokenizer(tmp_path):
    captions = [plan(0, "train", i).caption() for i in range(200)]
    texts = []
    for name, order in (("a", captions), ("b", captions[::-1])):
        data.train_tokenizer(order, str(tmp_path / name))
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] and sorted(os.listdir(tmp_path)) == ["a", "b"]
    with pytest.raises(ValueError, match="vocabulary of 20 has no room"):
        data.train_tokenizer(captions, str(tmp_path / "c"), vocab=20)


def test_texts_are_encoded_without_sep_and_cut(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    data.train_tokenizer(["a red square grows", "a red ring"] * 2 + ["a blue ring moves"], path, vocab=60)
    tokenizer = data.load_tokenizer(path)
    ids = data.encode(tokenizer, ["A RED ring", "a red square grows", "suds", "日"], 5)
    assert ids.dtype == torch.int64 and ids.shape == (4, 5)
    words = [[tokenizer.id_to_token(i) for i in row] for row in ids.tolist()]
    assert words[0] == ["[CLS]", "a", "red", "ring", "[PAD]"] and ids[0, -1] == 0
    assert words[1] == ["[CLS]", "a", "red", "square", "grows"]
    assert words[2] == ["[CLS]", "s", "##u", "##d", "##s"]                  # an unknown word is spelt
    assert words[3] == ["[CLS]", "[UNK]", "[PAD]", "[PAD]", "[PAD]"]
    with_sep = data.encode(tokenizer, ["a red ring", "a red square grows"], 5, sep=True)
    assert [tokenizer.id_to_token(i) for i in with_sep[1].tolist()] == ["[CLS]", "a", "red", "square", "[SEP]"]
    assert [tokenizer.id_to_token(i) for i in with_sep[0].tolist()] == ["[CLS]", "a", "red", "ring", "[SEP]"]
    assert (data.encode(tokenizer, ["a red square grows"], 3) == ids[1:2, :3]).all()
    with pytest.raises(ValueError, match="no room"):
        data.encode(tokenizer, ["a"], 1)


def test_a_tokenizer_file_that_does_not_serve_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nope.json: no such"):
        data.load_tokenizer(str(tmp_path / "nope.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json: not a tokenizer"):
        data.load_tokenizer(str(tmp_path / "bad.json"))
    data.Tokenizer(data.models.WordPiece({"[UNK]": 0, "[CLS]": 1}, unk_token="[UNK]")).save(str(tmp_path / "few.json"))
    with pytest.raises(ValueError, match=r"few.json: lacks \[PAD\], \[SEP\], \[MASK\]"):
        data.load_tokenizer(str(tmp_path / "few.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Annotations

def test_rows_are_read_in_every_published_form(tmp_path):
    for name in ("a.mp4", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    listed = [{"video": "a.mp4", "caption": "A dog, running."}, {"image": "b.jpg", "caption": ["One!", "Two"]},
              {"video": "a.mp4", "caption": "again", "still": "A dog."}]
    (tmp_path / "rows.json").write_text(json.dumps(listed))
    a, b, c = read_annotations(str(tmp_path / "rows.json"), str(tmp_path))
    assert a.video == str(tmp_path / "a.mp4") and a.captions == ["a dog running"] and a.still is None
    assert b.captions == ["one", "two"] and c.still == "a dog"
    assert a.media == c.media != b.media and 0 <= a.media < 2 ** 63
    assert a.media == data.media_id(f"{tmp_path}/./a.mp4") != data.media_id(f"{tmp_path}/b/a.mp4")


@pytest.mark.parametrize("listed, message", [
    ({"video": "a.mp4"}, "wanted a list of rows, got {'video'"),
    ([], r"wanted a list of rows, got \[\]"),
    (["a.mp4"], "row 0: wanted an object, got 'a.mp4'"),
    ([{"caption": "x"}], 'row 0: wanted a file name under "video" or "image", got .*caption'),
    ([{"video": ["a.mp4", ""], "caption": "x"}], 'row 0: wanted a file name under "video"'),
    ([{"video": [], "caption": "x"}], 'row 0: wanted a file name under "video"'),
    ([{"video": "a.mp4", "caption": "x"}, {"video": "a.mp4"}], 'row 1: wanted a text .* got None'),
    ([{"video": "a.mp4", "caption": ["x", 3]}], r"row 0: wanted a text .* got \['x', 3\]"),
    ([{"video": "a.mp4", "caption": []}], r"row 0: wanted a text .* got \[\]"),
    ([{"video": "a.mp4", "caption": ["x", " ?! "]}], r"row 0: empty caption ' \?! '"),
    ([{"video": "a.mp4", "caption": "x"}] + 2 * [{"video": "b.mp4", "caption": "x"}], "row 1: no file .*b.mp4 .2 of 3"),
])
def test_a_bad_row_is_named_in_one_line(tmp_path, listed, message):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "rows.json").write_text(json.dumps(listed))
    with pytest.raises((ValueError, FileNotFoundError), match="rows.json.*" + message) as error:
        read_annotations(str(tmp_path / "rows.json"), str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_folder_or_file_or_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="rows.json: no such annotation file"):
        read_annotations(str(tmp_path / "rows.json"), str(tmp_path))
    (tmp_path / "rows.json").write_text("[{")
    with pytest.raises(ValueError, match="rows.json: not JSON"):
        read_annotations(str(tmp_path / "rows.json"), str(tmp_path))
    (tmp_path / "rows.json").write_text('[{"video": "a.mp4", "caption": "x"}]')
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_annotations(str(tmp_path / "rows.json"), str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# Lists longer than memory

NUMBERS = ["0", "-0", "7", "-12", "1.5", "0.25", "-3.0", "1e5", "2E-3", "-1.25e+10", "123456789012345678901234567890"]
LETTERS = ["a", " ", '"', "\\", "/", "\n", "\t", "[", "]", "{", ",", ":", "é", "日", "😀", "\u2028", "\x7f", "0"]


def spelled(rng, depth=0):
    """A random value as JSON, in one of the many ways to write it."""
    space = lambda: "".join(rng.choices(" \n\t\r", k=rng.choice([0, 0, 0, 1, 2, 5])))
    letters = lambda: "".join(rng.choices(LETTERS, k=rng.choice([0, 1, 3, 30])))
    text = lambda: json.dumps(letters(), ensure_ascii=rng.random() < 0.5)
    inner = lambda: space() + spelled(rng, depth + 1) + space()
    kind = rng.choice("nnttw" + "lo" * (depth < 3)) if depth else "l"
    if kind in "ntw":
        return text() if kind == "t" else rng.choice(NUMBERS if kind == "n" else ["true", "false", "null"])
    parts = [inner() if kind == "l" else f"{space()}{text()}{space()}:{inner()}"
             for _ in range(rng.choice([0, 1, 2, 6]))]
    left, right = "[]" if kind == "l" else "{}"
    return left + (",".join(parts) or space()) + right


SIZES = [1, 2, 3, 7, 64]            # characters read at once: every token is cut somewhere


@pytest.mark.parametrize("size", SIZES)
def test_a_list_is_read_as_json_wherever_it_is_cut(size):
    rng = random.Random(size)
    for _ in range(150):
        text = " \n" * rng.randrange(3) + spelled(rng) + "\n" * rng.randrange(3)
        assert repr(list(data.elements(io.StringIO(text), size))) == repr(json.loads(text)), text


def test_a_long_list_with_long_texts_is_read_as_json(tmp_path):
    rng = random.Random(0)
    listed = [{"video": f"{i}.mp4", "caption": "日 word " * rng.randrange(60), "at": i / 7} for i in range(20000)]
    listed[7000]["caption"] = "a very long text " * 200_000                 # longer than what is read at once
    (tmp_path / "rows.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False))
    assert os.path.getsize(tmp_path / "rows.json") > 8 * 2 ** 20
    assert list(data.list_entries(str(tmp_path / "rows.json"))) == listed


@pytest.mark.parametrize("size", SIZES)
def test_a_list_is_refused_exactly_where_json_refuses_it(size):
    rng, refused = random.Random(size), 0
    for _ in range(400):
        text = spelled(rng)
        i = rng.randrange(len(text))
        j = i + rng.randrange(3)
        other = rng.choice(',:[]{}"x1.e- \n\\')
        text = rng.choice([text[:i], text[:i] + text[j:], text[:i] + other + text[j:], text + text])
        try:
            wanted = json.loads(text)
        except ValueError:
            wanted = None
        if isinstance(wanted, list):
            assert repr(list(data.elements(io.StringIO(text), size))) == repr(wanted), text
            continue
        refused += 1
        with pytest.raises(ValueError) as error:
            list(data.elements(io.StringIO(text), size))
        assert str(error.value) and "\n" not in str(error.value), text
    assert refused > 150


ENTRY = '{"video": "a.mp4", "caption": "x"}'


@pytest.mark.parametrize("text, message", [
    ("", "not JSON"),
    (" \n", "not JSON"),
    (f"[{ENTRY} {ENTRY}]", "not JSON .Expecting ','.*: character 36"),
    (f"[{ENTRY}, {ENTRY},]", "not JSON .*: character 72"),
    (f"[,{ENTRY}]", "not JSON .*: character 1"),
    (f"[{ENTRY}] {ENTRY}", "not JSON .Extra data"),
    (f"[{ENTRY}]]", "not JSON .Extra data"),
    (f"[{ENTRY}, {ENTRY}", "not JSON .*: character 71"),
    (f"[{ENTRY[:-5]}", "not JSON .*"),
    ("[{'video': 1}]", "not JSON"),
    ("\ufeff" + f"[{ENTRY}]", "not JSON .*BOM"),
    (b"[\"\xff\"]", "not JSON .*utf-8"),
    (ENTRY, "wanted a list of rows, got {'video': 'a.mp4', 'caption': 'x'}"),
    ('"\\n"', r"wanted a list of rows, got '.n'"),
    ("null", "wanted a list of rows, got None"),
    ("[ ]", r"wanted a list of rows, got \[\]"),
])
def test_a_malformed_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{path}: {message}") as error:
        list(data.list_entries(str(path)))
    assert "\n" not in str(error.value)


def test_a_malformed_line_or_base_is_named_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{ENTRY}\n\n{ENTRY[:-1]}\n{ENTRY}\n")
    found = data.list_entries(str(path))
    assert next(found) == json.loads(ENTRY)
    with pytest.raises(ValueError, match="rows.jsonl, line 3: not JSON .*") as error:
        next(found)
    assert "\n" not in str(error.value)
    for name in ("empty.jsonl", "empty.db"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name}: (wanted a list|not SQLite with a table annos)"):
            list(data.list_entries(str(tmp_path / name)))
    (tmp_path / "words.sqlite").write_text("these are words\n" * 100)
    with pytest.raises(ValueError, match="words.sqlite: not SQLite with a table annos"):
        list(data.list_entries(str(tmp_path / "words.sqlite")))


def test_entries_come_before_the_rest_is_read():
    class File(io.StringIO):
        taken = 0

        def read(self, count=-1):
            text = super().read(count)
            self.taken += len(text)
            return text

    entry = json.dumps({"video": "a.mp4", "caption": "word " * 20})
    f = File("[" + ",\n".join([entry] * 5000) + "]")
    for i, found in enumerate(data.elements(f, 256)):
        assert found == json.loads(entry) and f.taken <= (i + 1) * (len(entry) + 2) + 2 * 256


def base(path, rows, kind="image"):
    """VindLU's SQLite."""
    with sqlite3.connect(path) as out:
        out.execute(f"create table annos (id integer primary key, {kind} text, caption text)")
        out.executemany("insert into annos values (?, ?, ?)", rows)
    return str(path)


@pytest.fixture
def corpora(tmp_path):
    """Three corpora, (annotation file, folder) each: all that a row can be."""
    for name in ("videos", "more #1", "images"):
        (tmp_path / name).mkdir()
    listed = [{"video": "a.mp4", "caption": "A dog, running."},
              {"video": ["b.mp4", "sub/日.mp4"], "caption": ["Zwei Vögel?", "日本の鳥 😀", "x"], "still": "Birds!"},
              {"image": "c.jpg", "caption": "it's <person>", "still": " ?! ", "id": 7}]
    lines = [{"video": f"a{i % 7}.mp4", "caption": f"Clip {i}", "still": None} for i in range(50)]
    (tmp_path / "rows.json").write_text(json.dumps(listed))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    base(tmp_path / "odd %20?name.sqlite", [(30, "c.png", "Third"), (10, "ä.png", "First, ü"), (20, "b.png", "Second")])
    return [(str(tmp_path / name), str(tmp_path / root)) for name, root in
            (("rows.json", "videos"), ("lines.jsonl", "more #1"), ("odd %20?name.sqlite", "images"))]


def listed_in(corpora):
    return [row for path, root in corpora for row in read_annotations(path, root, check=False)]


def test_written_rows_are_those_of_all_corpora_in_order(corpora, tmp_path):
    wanted = listed_in(corpora)
    assert [os.path.basename(row.video) for row in wanted[54:]] == ["ä.png", "b.png", "c.png"]
    rows = write_rows(corpora, str(tmp_path / "out"))
    assert len(rows) == len(wanted) and list(rows) == wanted
    assert [rows[i] for i in range(-len(wanted), len(wanted))] == wanted * 2
    for kind in (np.int32, np.int64, np.uint8):
        assert rows[kind(5)] == wanted[5]
    assert rows[np.int64(-1)] == wanted[-1]
    for i in (len(wanted), -len(wanted) - 1, np.int64(10 ** 6)):
        with pytest.raises(IndexError):
            rows[i]
    assert wanted[1].where == wanted[2].where == f"{corpora[0][0]}, row 1" and wanted[1].media != wanted[2].media
    assert rows[1].captions == ["zwei vögel", "日本の鳥 😀", "x"] and rows[1].still == "birds" and rows[3].still is None


def test_another_process_is_sent_a_path_and_not_the_rows(corpora, tmp_path):
    rows = write_rows(corpora, str(tmp_path / "out"))
    sent = pickle.dumps(rows)
    assert len(sent) < 300 and list(pickle.loads(sent)) == list(rows)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(list, (rows,)) == list(rows)


def test_rows_are_read_once_and_again_where_a_file_has_changed(corpora, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    first = write_rows(corpora, out)
    assert len(os.listdir(out)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(data, "annotated", None)
        again = write_rows(corpora, out)
    assert list(again) == list(first) and again.digest == first.digest
    path = corpora[1][0]
    with open(path) as f:
        text = f.read()
    with open(path, "a") as f:
        f.write('\n{"video": "new.mp4", "caption": "new"}')
    changed = write_rows(corpora, out)
    assert list(changed) == listed_in(corpora) and len(changed) == len(first) + 1 and changed.digest != first.digest
    with open(path, "w") as f:
        f.write(text.replace("Clip 49", "clip 94"))                         # the same number of bytes
    other = write_rows(corpora, out)
    assert list(other) == listed_in(corpora) and len({first.digest, changed.digest, other.digest}) == 3
    with open(path, "w") as f:
        f.write(text)
    os.utime(path, ns=(0, 0))
    assert write_rows(corpora, out).digest == first.digest
    several = corpora, corpora[::-1], corpora[:2], corpora[1:], corpora + corpora
    assert len({write_rows(some, out).digest for some in several}) == 5
    moved = [(path, root + "/.") for path, root in corpora[:1]]             # other paths are other rows
    assert list(write_rows(moved, out)) == listed_in(moved) != listed_in(corpora[:1])


def test_rows_that_were_cut_short_are_written_anew(corpora, tmp_path):
    out = tmp_path / "out"
    rows = write_rows(corpora, str(out))
    wanted = list(rows)
    for name in (".at", ".jsonl"):                                          # killed before it said that all is there
        os.remove(rows.path + ".json")
        with open(rows.path + name, "wb") as f:
            f.write(b"0")
        assert list(write_rows(corpora, str(out))) == wanted


def test_processes_that_write_the_rows_at_once_end_with_the_same_file(corpora, tmp_path):
    fork, out, wanted = multiprocessing.get_context("fork"), str(tmp_path / "out"), listed_in(corpora)
    meet, found, plain = fork.Barrier(2), fork.Queue(), data.annotated

    def annotated(*corpus):
        for i, row in enumerate(plain(*corpus)):
            if i == 2:
                meet.wait(30)                                               # both are in the middle of it
            yield row

    def main():
        data.annotated = annotated
        rows = write_rows(corpora, out)
        found.put((rows.path, rows.digest, list(rows)))

    processes = [fork.Process(target=main) for _ in range(2)]
    for p in processes:
        p.start()
    ended = [found.get(timeout=30) for _ in processes]
    for p in processes:
        p.join(30)
    assert ended[0] == ended[1] and ended[0][2] == wanted
    assert len(os.listdir(out)) == 3


def test_what_rows_lack_is_named_and_nothing_is_left(corpora, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such annotation file"):
        write_rows([*corpora, (str(tmp_path / "nowhere.json"), str(tmp_path))], str(out))
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder.*lines.jsonl"):
        write_rows([corpora[0], (corpora[1][0], str(tmp_path / "nowhere"))], str(out))
    assert not out.exists() or not os.listdir(out)
    with open(corpora[1][0], "a") as f:
        f.write('\n{"video": "a.mp4", "caption": " ?! "}\n')
    with pytest.raises(ValueError, match="lines.jsonl, row 50: empty caption"):
        write_rows(corpora, str(out))
    assert os.listdir(out) == []


def test_half_a_letter_is_refused_by_its_row(tmp_path):
    (tmp_path / "rows.json").write_text(f"[{ENTRY}, {ENTRY[:-2]}" + r'\ud83d"}]')
    with pytest.raises(ValueError, match="rows.json, row 1: ") as error:    # no tokenizer takes it, and no file
        write_rows([(str(tmp_path / "rows.json"), str(tmp_path))], str(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_an_id_stands_for_a_file_and_not_for_a_name(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(f'[{ENTRY}, {{"video": "./b.mp4", "caption": "y"}}]')
    monkeypatch.chdir(tmp_path)
    corpora = [("a.json", "one"), ("b.json", f"{tmp_path}/one"), ("b.json", "two"), ("a.json", "two/../one/")]
    media = [row.media for row in write_rows(corpora, "out")]
    assert media[:2] == media[2:4] == media[6:] and len(set(media)) == 4
    assert all(isinstance(m, int) and 0 <= m < 2 ** 63 for m in media)      # an int64


# ---------------------------------------------------------------------------------------------------------------------
# Clips and batches

def same(a, b):
    return torch.equal(a.video, b.video) and replace(a, video=None) == replace(b, video=None)


@pytest.fixture
def cfg(sprites):
    """Four of the eight frames, cropped and mirrored: everything that can be random is."""
    return DataConfig(train=f"{sprites}/sprites_train.json", root=f"{sprites}/videos", frames=4, size=32, scale=0.5,
                      flip=True, views=0, cache_size=64)


def test_a_sample_is_a_function_of_seed_and_n(rows, cfg):
    clips = Clips(rows, cfg, seed=3)
    order = [5, 24, 100, 23, 0, 47, 5]                                      # as a resumed or a parallel run asks
    first = [clips[n] for n in order]
    again = pickle.loads(pickle.dumps(Clips(rows, cfg, seed=3)))
    for n, sample in sorted(zip(order, first, strict=True), key=lambda pair: pair[0]):
        assert same(again[n], sample)
    other = Clips(rows, cfg, seed=4)
    assert [other[n].clip for n in range(24)] != [clips[n].clip for n in range(24)]
    loaded = torch.utils.data.DataLoader(clips, sampler=order, batch_size=None, num_workers=2, collate_fn=lambda x: x)
    assert all(same(a, b) for a, b in zip(first, loaded, strict=True))
    with pytest.raises(IndexError):
        clips[-1]


def test_every_epoch_is_another_permutation_of_the_rows(rows, cfg):
    clips = Clips(rows, cfg)
    epochs = [[clips[24 * epoch + i] for i in range(24)] for epoch in range(3)]
    orders = [[s.clip for s in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [s.view for s in epochs[2]] == [2] * 24
    for s in epochs[1]:
        assert s.caption in rows[s.clip].captions and s.still == rows[s.clip].still and s.media == rows[s.clip].media


@pytest.mark.parametrize("views", [0, 1, 2])
def test_a_clip_has_as_many_views_as_asked_for(rows, cfg, views):
    clips = Clips(rows[:6], replace(cfg, views=views))
    seen = [{} for _ in range(6)]
    for n in range(24):
        sample = clips[n]
        key = sample.video.numpy().tobytes()
        assert seen[sample.clip].setdefault(sample.view, key) == key        # the same view looks the same
    assert all(len(views_of) == len(set(views_of.values())) == (views or 4) for views_of in seen)


def test_training_draws_its_frames_and_scoring_takes_the_middles(tmp_path):
    row = data.Row(write(tmp_path / "a.mp4"), ["x"], None, 0)
    cfg = DataConfig(frames=4, size=48, views=0, cache_frames=50)
    for cache in (False, True):
        clips = Clips([row], replace(cfg, cache=cache), cache_folder=str(tmp_path))
        assert len({tuple(numbers(clips[epoch].video)) for epoch in range(6)}) == 6
        clips.train = False
        assert numbers(clips[0].video) == [5, 18, 30, 43]


def test_a_scored_clip_is_its_row_and_its_first_caption(rows, cfg):
    rows = [replace(row, captions=["first", *row.captions], still=None) for row in rows]
    clips = Clips(rows, cfg, train=False)
    for n in (0, 7, 23):
        sample = clips[n]
        want = decoding.test_view(read_frames(rows[n].video, 4), 32)
        assert torch.equal(sample.video, want)
        assert (sample.clip, sample.view, sample.caption, sample.still) == (n, 0, "first", "first")
    seen = {Clips(rows, cfg)[n].caption == "first" for n in range(24)}
    assert seen == {True, False}                                            # training draws one
    with pytest.raises(IndexError):
        clips[24]


def test_the_cache_gives_what_decoding_gives(rows, cfg):
    cached, decoded = Clips(rows, cfg), Clips(rows, replace(cfg, cache=False))
    assert cached.cache is not None and decoded.cache is None
    assert all(same(cached[n], decoded[n]) for n in range(30))
    cached.train = decoded.train = False
    assert all(same(cached[n], decoded[n]) for n in range(24))


def test_the_cache_keeps_evenly_spaced_frames_and_reduces_them(tmp_path):
    paths = [write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4", n=6, shape=(51, 35), pix_fmt="yuv444p")]
    rows = [data.Row(path, ["x"], None, 0) for path in [*paths, paths[0]]]
    cfg = DataConfig(frames=4, size=24, cache_frames=10)
    cache = data.decode_cache(rows, cfg, str(tmp_path))
    assert cache[paths[0]].shape == (10, 3, 24, 32) and cache[paths[1]].shape == (6, 3, 35, 24)
    assert numbers(torch.from_numpy(np.array(cache[paths[0]]))) == list(range(2, 50, 5))
    assert len([name for name in os.listdir(tmp_path) if "deco" in name]) == 2             # one file, one index
    assert data.decode_cache(rows, cfg, str(tmp_path)).path == cache.path
    assert data.decode_cache(rows, replace(cfg, cache_size=20), str(tmp_path))[paths[0]].shape == (10, 3, 20, 27)
    write(paths[0], n=20)                                                   # another video of that name
    assert data.decode_cache(rows, cfg, str(tmp_path)).path != cache.path
    clips = Clips(rows, replace(cfg, frames=8), cache_folder=str(tmp_path), train=False)
    assert numbers(clips[1].video) == [0, 1, 2, 3, 4, 5, 5, 5]              # of fewer frames the last is repeated


def test_a_cache_of_jpegs_shows_the_same_pictures_nearly_in_less_room(rows, cfg, tmp_path):
    plain, cfg = Clips(rows, cfg, cache_folder=str(tmp_path)), replace(cfg, cache_quality=95)
    jpegs = Clips(rows, cfg, cache_folder=str(tmp_path))
    assert jpegs.cache.path != plain.cache.path and len(jpegs.cache.data) < len(plain.cache.data) / 4
    for n in range(30):
        a, b = plain[n], jpegs[n]
        assert replace(a, video=None) == replace(b, video=None) and a.video.shape == b.video.shape
        assert 0 < (a.video.float() - b.video.float()).abs().mean() < 4
        assert torch.equal(b.video, pickle.loads(pickle.dumps(jpegs))[n].video)
    video, pictures = rows[0].video, jpegs.cache[rows[0].video]
    assert len(pictures) == len(plain.cache[video]) > 5
    whole = pictures[range(len(pictures))]                                  # any of them, in any order, by itself
    assert whole.dtype == np.uint8 and whole.shape == plain.cache[video].shape
    assert np.array_equal(pictures[[5, 2, 2]], whole[[5, 2, 2]])
    assert data.decode_cache(rows, replace(cfg, cache_quality=50), str(tmp_path)).path != jpegs.cache.path
    with open(jpegs.cache.path + ".bin", "r+b") as f:                       # its first picture is one no more
        f.write(bytes(16))
    broken = Clips(rows, cfg, cache_folder=str(tmp_path))
    with pytest.raises(data.UnreadableError, match=re.escape(rows[0].where)):
        for view in range(20):
            broken.view(0, view)


def test_videos_that_cannot_be_cached_are_counted_and_leave_nothing(tmp_path):
    good = write(tmp_path / "good.mp4", n=8)
    (tmp_path / "bad.mp4").write_bytes(b"")
    (tmp_path / "worse.mp4").write_bytes(b"x" * 1000)
    rows = [data.Row(path, ["x"], None, 0) for path in (good, str(tmp_path / "bad.mp4"), str(tmp_path / "worse.mp4"))]
    with pytest.raises(ValueError, match="bad.mp4: Invalid.*2 of 3 videos cannot be read"):
        Clips(rows, DataConfig(), cache_folder=str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["bad.mp4", "good.mp4", "worse.mp4"]
    with pytest.raises(ValueError, match="nowhere: no decode cache can be written .*--data.no-cache"):
        Clips(rows[:1], DataConfig(), cache_folder=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="bad.mp4: Invalid"):               # and without a cache it is not passed over
        Clips(rows[1:2], DataConfig(cache=False))[0]


def test_a_batch_holds_its_samples(sprites, rows, cfg):
    tokenizer = data.load_tokenizer(f"{sprites}/tokenizer.json")
    samples = [Clips(rows, cfg)[n] for n in range(5)]
    batch = collate(samples, tokenizer, 40, seed=9)
    ended = collate(samples, tokenizer, 40, seed=9, sep=True).ids           # [SEP] stands where the padding began
    used = (batch.ids != 0).sum(1, keepdim=True)
    assert ended.equal(batch.ids.scatter(1, used, tokenizer.token_to_id("[SEP]")))
    assert batch.video.shape == (5, 4, 3, 32, 32) and batch.video.dtype == torch.uint8
    assert torch.equal(batch.ids, data.encode(tokenizer, batch.captions, 40)) and batch.seed == 9
    for i, s in enumerate(samples):
        assert torch.equal(batch.video[i], s.video) and (batch.captions[i], batch.stills[i]) == (s.caption, s.still)
        assert (batch.media[i], batch.clip[i], batch.view[i]) == (s.media, s.clip, s.view)
    moved = batch.to("meta")
    assert moved.video.is_meta and moved.ids.is_meta and moved.media.is_meta and moved.captions == batch.captions
    assert not batch.video.is_meta and moved.clip is batch.clip and moved.view is batch.view       # the host's to read


# ---------------------------------------------------------------------------------------------------------------------
# Clips that cannot be read

@pytest.fixture
def some(rows, sprites, tmp_path):
    """The rows again, with videos of their own that a test may break."""
    shutil.copytree(f"{sprites}/videos", tmp_path / "videos")
    return read_annotations(f"{sprites}/sprites_train.json", str(tmp_path / "videos"))


BROKEN = {3: "Invalid data", 8: "Invalid data", 9: "no such file", 20: "has no video stream"}


def break_some(rows):
    cut(rows[3].video, 0.5)
    with open(rows[8].video, "wb"):
        pass
    os.remove(rows[9].video)
    write(rows[20].video, audio=True, video=False)


def good(row):
    return int(os.path.basename(row.video).removeprefix("train_").removesuffix(".mp4")) not in BROKEN


@pytest.mark.parametrize("cache", [False, True])
def test_a_clip_that_cannot_be_read_gives_its_place_to_another_and_all_others_keep_theirs(some, cfg, tmp_path, cache):
    cfg = replace(cfg, cache=False, max_bad=0.5)
    clips = Clips(some, cfg, seed=3)
    intact = [clips[n] for n in range(72)]
    views = {(clip, view): clips.view(clip, view) for clip in range(24) for view in range(3)}
    break_some(some)
    broken = Clips(some, replace(cfg, cache=cache), seed=3, cache_folder=str(tmp_path))
    stand_ins = {}
    for n in np.random.default_rng(0).permutation(72).tolist():
        found, asked = broken[n], intact[n].clip
        if asked not in BROKEN:
            assert same(found, intact[n]) and found.lost == []
            continue
        assert found.clip not in BROKEN and found.view == n // 24
        assert same(replace(found, lost=[]), views[found.clip, found.view])             # all of it is the other's
        assert found.media == some[found.clip].media and found.caption in some[found.clip].captions
        assert found.lost[0]["video"] == some[asked].video
        for about in found.lost:
            row = next(i for i in BROKEN if some[i].video == about["video"])
            assert about.keys() == {"where", "video", "reason"} and about["where"] == some[row].where
            assert about["reason"].startswith(f"{about['video']}: ") and BROKEN[row] in about["reason"]
        stand_ins[n] = found
    assert len(stand_ins) == 3 * len(BROKEN)
    assert len({found.clip for found in stand_ins.values()}) > 4            # not always the same one
    for again in (Clips(some, cfg, seed=3), Clips(some, replace(cfg, cache=True), seed=3, cache_folder=str(tmp_path)),
                  pickle.loads(pickle.dumps(broken))):
        assert all(same(again[n], found) for n, found in stand_ins.items())
    other = Clips(some, cfg, seed=3, first=100)                             # images, say: drawn apart from the videos
    assert any(other[n].clip - 100 != found.clip for n, found in stand_ins.items())


def test_all_that_failed_before_a_clip_is_named_in_its_order(tmp_path):
    rows = [data.Row(str(tmp_path / f"{i}.mp4"), [f"{i}"], None, i, where=f"rows.json, row {i}") for i in range(8)]
    there = [0, 2, 5, 7]
    for i in there:
        write(rows[i].video, n=8)
    clips = Clips(rows, DataConfig(frames=4, size=24, cache=False, views=0))
    several = 0
    for n in range(64):
        epoch, i = divmod(n, 8)
        sample = clips[n]
        assert sample.view == epoch and sample.clip in there
        assert (sample.caption, sample.media) == (str(sample.clip), sample.clip)
        lost = [int(about["where"].removeprefix("rows.json, row ")) for about in sample.lost]
        assert sample.lost == [{"where": rows[i].where, "video": rows[i].video,
                                "reason": f"{rows[i].video}: no such file"} for i in lost]
        assert not {*lost} & {*there} and lost[:1] == [row for row in clips.order[i:i + 1].tolist() if row not in there]
        several += len(set(lost)) > 1
    assert several > 10


def test_ten_that_fail_in_a_row_are_an_error(tmp_path):
    rows = [data.Row(str(tmp_path / f"{i}.mp4"), ["x"], None, i, where=f"rows.json, row {i}") for i in range(3)]
    clips = Clips(rows, DataConfig(cache=False))
    message = r"rows.json, row \d: .*\d.mp4: no such file \(and none of 9 others drawn before it could be read\)"
    with pytest.raises(ValueError, match=message) as error:
        clips[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cache", [False, True])
def test_in_scoring_nothing_stands_in_for_anything(some, cfg, tmp_path, cache):
    cfg = replace(cfg, cache=cache, max_bad=0.5)
    clips = Clips(some, cfg, train=False, cache_folder=str(tmp_path))
    intact = [clips[n] for n in range(24)]
    break_some(some)
    clips = Clips(some, cfg, train=False, cache_folder=str(tmp_path))
    for n in range(24):
        if n not in BROKEN:
            assert same(clips[n], intact[n])
            continue
        with pytest.raises((ValueError, FileNotFoundError), match=f"{some[n].video}: .*{BROKEN[n]}"):
            clips[n]


def test_a_batch_says_what_its_samples_lost(some, sprites, cfg):
    break_some(some)
    clips = Clips(some, replace(cfg, cache=False))
    samples = [clips[n] for n in range(24)]
    batch = collate(samples, data.load_tokenizer(f"{sprites}/tokenizer.json"), 40, seed=9)
    assert batch.lost == [about for sample in samples for about in sample.lost] and len(batch.lost) >= 4
    assert batch.to("meta").lost == batch.lost and batch.clip.tolist() == [sample.clip for sample in samples]
    assert all(torch.equal(x, sample.video) for x, sample in zip(batch.video, samples, strict=True))


def test_the_cache_keeps_why_a_video_is_not_there(some, cfg, tmp_path):
    break_some(some)
    cfg = replace(cfg, max_bad=4 / 24)
    cache = data.decode_cache(some, cfg, str(tmp_path))                     # just as many as may
    for where in (cache, data.Cache(cache.path), pickle.loads(pickle.dumps(cache))):
        for i, row in enumerate(some):
            if i not in BROKEN:
                assert where[row.video].shape[0] == 8
                continue
            with pytest.raises(ValueError, match=f"{row.video}: .*{BROKEN[i]}"):
                where[row.video]
    before = set(os.listdir(tmp_path))
    message = f"row 3: {some[3].video}: Invalid data.* .4 of 24 videos cannot be read, more than data.max_bad, 0.16"
    with pytest.raises(ValueError, match=message) as error:                 # the one that is there is asked too
        data.decode_cache(some, replace(cfg, max_bad=0.16), str(tmp_path))
    assert "\n" not in str(error.value) and set(os.listdir(tmp_path)) == before
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with pytest.raises(ValueError, match=message):
        data.decode_cache(some[::-1][-4:] + some[4:], replace(cfg, max_bad=0.16), str(fresh))   # by place, not by name
    assert os.listdir(fresh) == []


def test_a_video_that_was_repaired_is_decoded_anew(some, cfg, tmp_path):
    shutil.copytree(tmp_path / "videos", tmp_path / "whole")
    intact = Clips(some, replace(cfg, cache=False), seed=1)
    want = [intact[n] for n in range(24)]
    break_some(some)
    Clips(some, replace(cfg, max_bad=0.5), seed=1, cache_folder=str(tmp_path))
    for i in BROKEN:
        shutil.copyfile(tmp_path / "whole" / os.path.basename(some[i].video), some[i].video)
        clips = Clips(some, replace(cfg, max_bad=0.5), seed=1, cache_folder=str(tmp_path))
        assert clips.cache[some[i].video].shape[0] == 8
    assert all(same(clips[n], sample) for n, sample in enumerate(want))


# ---------------------------------------------------------------------------------------------------------------------
# Videos and images as one

MIXES = [(10, 7, 3), (5, 2, 4), (3, 9, 1), (8, 8, 8), (1, 1, 2), (23, 60, 5)]


@pytest.fixture
def mixed(monkeypatch):
    """mixed(videos, images, batch, seed) -> Mix of so many clips, whose frames say which file and draw they are of."""
    def read(path, count, sample, rng, seconds):
        frames = torch.empty(count, 3, 4, 4, dtype=torch.uint8)
        frames[:], frames[:, 1] = int(path.split("/")[1]), int(rng.integers(256))
        return frames

    def clips(kind, count, first, frames, seed):
        rows = [data.Row(f"{kind}/{i}", [f"{kind} {i}", "x"], None, 1000 * first + i) for i in range(count)]
        return Clips(rows, DataConfig(frames=frames, size=4, views=0, cache=False), seed, first=first)

    monkeypatch.setattr(data, "read_frames", read)
    return lambda videos, images, batch, seed=5: Mix(clips("videos", videos, 0, 4, seed),
                                                     clips("images", images, videos, 1, seed), batch)


@pytest.mark.parametrize("videos, images, batch", MIXES)
def test_a_batch_is_of_one_kind_and_an_epoch_has_as_many_as_there_are_clips_for(mixed, videos, images, batch):
    mix = mixed(videos, images, batch)
    share = {4: max(1, videos // batch), 1: max(1, images // batch)}        # by frames
    seen, orders = {4: [], 1: []}, set()
    for epoch in range(4):
        kinds = []
        for b in range(epoch * sum(share.values()), (epoch + 1) * sum(share.values())):
            samples = [mix[n] for n in range(b * batch, (b + 1) * batch)]
            kinds += {len(s.video) for s in samples}
            seen[kinds[-1]] += samples
        assert sorted(kinds) == sorted([4] * share[4] + [1] * share[1])     # and so each batch is of one
        orders.add(tuple(kinds))
    assert len(orders) > 1 or share == {4: 1, 1: 1}
    for (frames, samples), clips in zip(seen.items(), mixed(videos, images, batch).kinds, strict=True):
        assert len(samples) == 4 * share[frames] * batch
        assert all(same(sample, clips[n]) for n, sample in enumerate(samples))


@pytest.mark.parametrize("videos, images, batch", MIXES)
def test_a_sample_of_a_mixture_is_a_function_of_seed_and_n_too(mixed, videos, images, batch):
    count = 6 * (videos + images + batch)
    mix, other = mixed(videos, images, batch), mixed(videos, images, batch, seed=6)
    want = [mix[n] for n in range(count)]
    again = pickle.loads(pickle.dumps(mixed(videos, images, batch)))
    for n in np.random.default_rng(1).permutation(count).tolist():
        assert same(again[n], want[n])
    assert [len(other[n].video) for n in range(count)] != [len(s.video) for s in want]
    assert not all(same(other[n], s) for n, s in enumerate(want))
    with pytest.raises((IndexError, ValueError)):
        mix[-1]


def test_the_numbers_of_images_follow_those_of_the_videos(mixed):
    mix = mixed(5, 7, 3)
    samples = [mix[n] for n in range(100)]
    assert len(mix) == 12 and {s.clip for s in samples} == set(range(12))
    for s in samples:
        kind, i = ("videos", s.clip) if s.clip < 5 else ("images", s.clip - 5)
        assert mix.row(s.clip).video == f"{kind}/{i}" and len(s.video) == (4 if kind == "videos" else 1)
        assert s.video[0, 0, 0, 0] == i and s.caption in (f"{kind} {i}", "x") and s.media == mix.row(s.clip).media


@pytest.mark.parametrize("field, value", [("frames", 0), ("size", 0), ("scale", 0.0), ("scale", 1.5), ("views", -1),
                                          ("workers", -1), ("cache_size", -1),
                                          ("cache_quality", 101), ("cache_frames", 4), ("max_bad", -0.1),
                                          ("max_bad", 1.1), ("max_bad", float("nan"))])
def test_an_impossible_setting_raises_at_once(field, value):
    with pytest.raises(ValueError, match=f"data.{field} {value}"):
        DataConfig(**{field: value})


@pytest.mark.parametrize("field", ["more", "images"])
@pytest.mark.parametrize("corpus", ["x", "=y", "x=", "=", ""])
def test_a_corpus_is_a_file_and_a_folder(field, corpus):
    with pytest.raises(ValueError, match=f"FILE=FOLDER, is {re.escape(repr(corpus))}"):
        DataConfig(**{field: ("a.json=videos", corpus)})
    cfg = DataConfig(train="t.json", root="r", **{field: ("a.json=videos", "b.json=odd=folder")})
    listed = [("a.json", "videos"), ("b.json", "odd=folder")]
    assert cfg.corpora(images=True) == (listed if field == "images" else [])
    assert cfg.corpora() == [("t.json", "r"), *(listed if field == "more" else [])]


def test_work_in_parallel_keeps_its_order_and_its_errors():
    assert list(data.in_parallel(partial(pow, 2), list(range(20)), "powers")) == [2 ** i for i in range(20)]
    with pytest.raises(ValueError, match="invalid literal"):
        list(data.in_parallel(int, ["1", "x", "3"], "numbers"))
