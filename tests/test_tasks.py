"""The table, its readers on files of each published form, every row end to end, and what is wrong with a file."""

import json
import os
import random
import re
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from test_teacher import shaken
from test_train import assert_one_line, command

import data
import decoding
import eval as scoring
import train
from data import DataConfig
from masking import MaskConfig
from model import ClusterSTM, ModelConfig, VideoToText
from tasks import KINDS, TASKS, find_file, find_media, find_task, read_answers, read_rows, split_files

# ---------------------------------------------------------------------------------------------------------------------
# A data root with files of every row, as they are published, and models that tell clips apart

VIDEOS = {"v0.mp4": 3, "v1.mp4": 5, "v2.mp4": 8, "sub/v3.mp4": 13, "v4.mkv": 20, "v5.mp4": 31}         # name: frames
FOLDERS = ("msrvtt", "msvd_2fps_224", "activitynet", "didemo_2fps_360_trimed30", "lsmdc", "ssv2")
NAMES, DRAW = list(VIDEOS), random.Random(0)
WORDS = dict(who="dog cat man woman bird crowd".split(), does="eats sees throws makes".split(),
             what="pizza snow song ball video cake".split(), how="slowly fast outside alone twice".split())
TEXTS = list(dict.fromkeys("a {} {} a {} {}".format(*map(DRAW.choice, WORDS.values())) for _ in range(400)))
ANSWERS = ["dog", "cat", "yes", "a red ball", "pizza", "zebra crossing", "snow", "to the left"]         # two are cut


def captions_like(n):
    """n captions, no two alike, as people write them: capitals, commas, a full stop."""
    return [text.capitalize().replace(" a ", ", a ", 1) + "." for text in DRAW.sample(TEXTS, n)]


def questions_like(names, first, **more):
    return [{"video": name, "question": f"What does the {DRAW.choice(WORDS['who'])} {DRAW.choice(WORDS['does'])[:-1]}?",
             "answer": DRAW.choice(ANSWERS), "question_id": first + i, **{k: f(i) for k, f in more.items()}}
            for i, name in enumerate(names)]


def published() -> dict[str, list]:
    """Name of an annotation file, as those who published it wrote it -> what it lists. Counts of rows are ours."""
    DRAW.seed(0)
    one = lambda names: [{"video": v, "caption": t} for v, t in zip(names, captions_like(len(names)), strict=True)]

    def several(names, n):                                                  # n to n + 2 captions each
        texts = iter(captions_like(len(names) * (n + 2)))
        return [{"video": name, "caption": list(islice(texts, n + i % 3))} for i, name in enumerate(names)]

    long = [name for name in NAMES for _ in range(2)]
    choice = lambda names: [{"video": v, "caption": captions_like(5), "answer": i % 5} for i, v in enumerate(names)]
    learned = lambda n: [{"video": v, "question": q["question"], "answer": q["answer"] if i % 3 else DRAW.choices(
        ANSWERS, k=4)} for i, v in enumerate(NAMES[:4] * n) for q in questions_like([v], 0)]
    files = {
        "msrvtt_ret_train9k": one(NAMES[:4] * 3), "msrvtt_ret_train7k": one(NAMES[:3] * 3),
        "msrvtt_ret_test1k": one(NAMES),
        "didemo_ret_train": several(NAMES[:4], 2), "didemo_ret_val": several(NAMES[:3], 2),
        "didemo_ret_test": several(NAMES, 2),
        "anet_ret_train": several(NAMES[:4], 8), "anet_ret_val": several(NAMES, 8),
        "lsmdc_ret_train": [{"image": r["video"], "caption": r["caption"]} for r in one(NAMES[:4])],
        "lsmdc_ret_test_1000": [{"image": r["video"], "caption": r["caption"]} for r in one(NAMES)],
        "msvd_ret_train": several(NAMES[:4], 3), "msvd_ret_test": several(NAMES, 3),
        "ssv2_ret_label_train": one(NAMES[:4]),
        "ssv2_ret_label_val_small": one([NAMES[:2], NAMES[1:4], NAMES[4:], NAMES[5:]]),
        "ssv2_ret_template_train": one(NAMES[:4]),
        "ssv2_ret_template_val_small": one([NAMES[:3], NAMES[3:]]),
        "msrvtt_qa_train": learned(2), "msrvtt_qa_val": questions_like(long, 100),
        "msrvtt_qa_test": questions_like(long, 200),
        "msvd_qa_train": learned(3), "msvd_qa_val": questions_like(NAMES, 100),
        "msvd_qa_test": questions_like(long, 200),
        "anet_qa_train": learned(2), "anet_qa_val": questions_like(NAMES, 100, type=lambda i: i % 3),
        "anet_qa_test": [q | {"question_id": f"v_{i}"} for i, q in enumerate(
            questions_like(long, 0, type=lambda i: i % 4))],                     # its kinds are numbers
        "msrvtt_mc_test": choice(NAMES + NAMES[:2]),
        "msrvtt_cap_train": one(NAMES[:4] * 2), "msrvtt_cap_val": one(NAMES[:2] * 2), "msrvtt_cap_test": one(NAMES * 3),
        "msvd_cap_train": several(NAMES[:4], 2), "msvd_cap_val": several(NAMES[:2], 2),
        "msvd_cap_test": several(NAMES, 3),
        "sprites_train": one(NAMES[:4]), "sprites_val": one(NAMES[:3]), "sprites_test": one(NAMES),
        "sprites_qa_train": questions_like(NAMES[:4] * 3, 0, type=lambda i: ["colour", "count"][i % 2]),
        "sprites_qa_val": questions_like(NAMES[:3] * 2, 50, type=lambda i: ["colour", "count"][i % 2]),
        "sprites_qa_test": questions_like(long, 60, type=lambda i: ["colour", "count", "unheard"][i % 3]),
        "sprites_mc_val": choice(NAMES[:3]), "sprites_mc_test": choice(NAMES),
        "sprites_cap_train": one(NAMES[:4] * 5), "sprites_cap_val": several(NAMES[:3], 4),
        "sprites_cap_test": several(NAMES, 4),
    }
    lists = ["msrvtt_qa_answer_list", "msvd_qa_answer_list", "anet_qa_answer_list", "sprites_qa_answer_list"]
    return files | dict.fromkeys(lists, ANSWERS)


def write(path, listed):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        json.dump(listed, f)


def read(path):
    with open(path) as f:
        return json.load(f)


@pytest.fixture(scope="session", name="whole")
def whole_root(tmp_path_factory):
    """Folder of everything: anno_downstream/, videos_images/ and the sprites' videos/. Nobody writes into it."""
    root = tmp_path_factory.mktemp("data")
    for name, listed in published().items():
        write(root / "anno_downstream" / f"{name}.json", listed)
    rng = np.random.default_rng(0)
    for i, (name, n) in enumerate(VIDEOS.items()):
        size = ((16, 16), (24, 16), (16, 32))[i % 3]
        start, end = rng.integers(0, 256, (2, 1, 4, 4, 3))                  # blocks of colour that become others
        t = np.linspace(0, 1, n)[:, None, None, None]
        frames = ((1 - t) * start + t * end).astype(np.uint8).repeat(size[0] // 4, 1).repeat(size[1] // 4, 2)
        os.makedirs((root / "videos" / name).parent, exist_ok=True)
        decoding.write_video(str(root / "videos" / name), frames, fps=4, crf="8")
    os.makedirs(root / "videos_images")
    for folder in FOLDERS:
        os.symlink(root / "videos", root / "videos_images" / folder)
    return str(root)


@pytest.fixture(name="root")
def own_root(whole, tmp_path, monkeypatch):
    """A copy whose annotations a test may change, in a folder of its own, where the test stands."""
    DRAW.seed(1)                                                            # what a test draws is its own
    folder = tmp_path / "root"
    folder.mkdir()
    shutil.copytree(f"{whole}/anno_downstream", folder / "anno_downstream")
    os.symlink(f"{whole}/videos_images", folder / "videos_images")
    os.symlink(f"{whole}/videos", folder / "videos")
    monkeypatch.chdir(tmp_path)
    return str(folder)


TINY = dict(patch=8, width=16, depth=2, heads=2, drop_path=0.0, text_width=24, text_depth=2, text_heads=2, fusion=1,
            dropout=0.0, text_length=24, embed=8, decoder_width=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="session", name="models")
def tiny_models(tmp_path_factory):
    """kind -> folder of a model: those that compare as pretrained, those that speak as fine-tuned on 6 frames."""
    folder = str(tmp_path_factory.mktemp("models"))
    data.train_tokenizer([t for t in TEXTS[:50]] + ["what does the", *ANSWERS[:5]], f"{folder}/tokenizer.json")
    tokenizer = data.load_tokenizer(f"{folder}/tokenizer.json")
    size = dict(vocab=tokenizer.get_vocab_size(), mask_id=tokenizer.token_to_id("[MASK]"), target=16)
    cfg = train.Config(teacher=f"{folder}/teacher", data=DataConfig(frames=5, size=16, cache=False),
                       mask=MaskConfig(ratio=0.5), model=ModelConfig(**TINY, **size),
                       small=train.SmallConfig(width=16, depth=1, text_depth=1, heads=2))
    shaken(train.small_teacher(cfg, tokenizer)).float().save(cfg.teacher)
    found = {}
    for seed, (kind, task, frames) in enumerate((
            ("retrieval", "", 5), ("qa", "msvd-qa", 6), ("caption", "msvd-caption", 6), ("tuned", "msvd", 7))):
        own = replace(cfg, stage="finetune" if task else "all", task=task, data=replace(cfg.data, frames=frames))
        torch.manual_seed(seed)
        compares = kind in ("retrieval", "tuned")
        model = ClusterSTM(own.model) if compares else VideoToText(own.model, kind == "qa")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim > 1 and not name.startswith("vit."):
                    p.mul_((24 / 768) ** 0.5)                               # as small as a wide BERT's
        for i in range(4 if kind == "qa" else 1):                          # until it says different things
            model = shaken(model, i).float()
        if compares:
            model.temp.data.fill_(0.05)
        found[kind] = f"{folder}/{kind}"
        chosen = {"chosen": f"epoch 3 of 4, chosen on the val split: {kind}"} if task else {}
        train.save_model(train.Run(own, "", torch.device("cpu"), 0, 1), model, tokenizer, found[kind], **chosen)
    found["choice"], found["teacher"], found["tokenizer"] = found["retrieval"], cfg.teacher, tokenizer
    return found


@pytest.fixture(name="simple")
def no_java(monkeypatch):
    """No Java is found: captions are scored in no time."""
    monkeypatch.setattr(scoring.shutil, "which", lambda name: None)


def settings(models, root, task, **more):
    kind = TASKS[task].kind
    return scoring.Config(**{"task": task, "checkpoint": models[kind], "data_root": root, "out": "result.json", **more})


# ---------------------------------------------------------------------------------------------------------------------
# Every row

TESTED = {      # task: test file, rows that the published one has
    "msrvtt": ("msrvtt_ret_test1k", 1000), "msrvtt-7k": ("msrvtt_ret_test1k", 1000), "didemo": ("didemo_ret_test", 0),
    "activitynet": ("anet_ret_val", 0), "lsmdc": ("lsmdc_ret_test_1000", 1000), "msvd": ("msvd_ret_test", 670),
    "ssv2-label": ("ssv2_ret_label_val_small", 0), "ssv2-template": ("ssv2_ret_template_val_small", 174),
    "msrvtt-qa": ("msrvtt_qa_test", 72821), "msvd-qa": ("msvd_qa_test", 13157),
    "activitynet-qa": ("anet_qa_test", 8000), "msrvtt-mc": ("msrvtt_mc_test", 2990),
    "msrvtt-caption": ("msrvtt_cap_test", 2990), "msvd-caption": ("msvd_cap_test", 670),
    "sprites": ("sprites_test", 0), "sprites-qa": ("sprites_qa_test", 0), "sprites-mc": ("sprites_mc_test", 0),
    "sprites-caption": ("sprites_cap_test", 0),
}
LENGTHS = {"msrvtt": 32, "msrvtt-7k": 32, "didemo": 64, "activitynet": 150, "lsmdc": 96, "msvd": 64, "ssv2-label": 25,
           "ssv2-template": 25, "msrvtt-qa": 25, "msvd-qa": 25, "activitynet-qa": 25, "msrvtt-mc": 32}
WAYS = {
    "retrieval": ["similarity", "similarity, dual softmax", "match, top {k}", "chance"],
    "choice": ["0.7 match + 0.3 similarity", "match", "similarity", "chance"],
    "qa": ["ranking, top 8", "generation", "most frequent answer to that kind"],
    "caption": ["greedy", "beam 3", "most frequent caption"],
}


def as_list(x):
    return x if isinstance(x, list) else [x]


def counted(task, listed) -> dict[str, int]:
    """videos, captions and questions of a file, counted on its own."""
    kind, paragraph = TASKS[task].kind, task in ("didemo", "activitynet")
    names = {name for row in listed for name in as_list(row.get("video", row.get("image")))}
    captions = sum(1 if paragraph else len(as_list(row["caption"])) for row in listed if "caption" in row)
    return {"videos": len(names)} | ({"questions": len(listed)} if kind in ("qa", "choice") else {"captions": captions})


@pytest.mark.parametrize("task", TASKS)
def test_every_row_loads_and_is_scored_end_to_end(models, whole, simple, tmp_path, monkeypatch, task, capsys):
    monkeypatch.chdir(tmp_path)
    found, row = scoring.main(settings(models, whole, task)), TASKS[task]
    name, tested = TESTED[task]
    listed = read(f"{whole}/anno_downstream/{name}.json")
    assert found["annotations"] == f"{whole}/anno_downstream/{name}.json"
    assert {k: found[k] for k in ("videos", "captions", "questions") if k in found} == counted(task, listed)
    assert list(found["scores"]) == [way.format(k=row.rerank) for way in WAYS[row.kind]]
    assert found == read("result.json") and found["kind"] == row.kind and found["split"] == "test split"
    assert found["frames"] == (6 if row.kind in ("qa", "caption") else 8 if "sprites" in task else 4)
    number, what = (6, "videos") if row.kind == "caption" else (len(listed), "rows")
    note = f"{found['annotations']} has {number} {what}, the published split has {tested}: not comparable"
    assert found["notes"] == ([note] if tested else []) and found["lost"] == []
    length = LENGTHS.get(task, row.length)
    assert (f"texts of {length} pieces" in found["protocol"]) == (row.kind != "caption")
    assert ("the first 30 seconds" in found["protocol"]) == (task == "didemo")
    assert ("the captions of a row joined to a paragraph" in found["protocol"]) == (task in ("didemo", "activitynet"))
    values = [x for scores in found["scores"].values() for some in scores.values()
              for x in (some.values() if isinstance(some, dict) else [some])]
    assert all(np.isfinite(x) and x >= 0 for x in values)
    if row.kind == "retrieval":
        columns = {"R@1", "R@5", "R@10", "median", "mean"}
        assert all(set(both) == {"T2V", "V2T"} and set(both["T2V"]) == columns for both in found["scores"].values())
    if row.kind == "qa":
        kinds = {"activitynet-qa": "0 1 2 3", "sprites-qa": "colour count unheard"}.get(task, "").split()
        assert all(list(share) == ["all", *kinds] for share in found["scores"].values())
        assert list(found["kinds"]) == kinds and sum(found["kinds"].values()) == (len(listed) if kinds else 0)
    out = capsys.readouterr().out
    block = out[out.index(f"{task}: {KINDS[row.kind]}, test split: {found['videos']} videos, "):]
    assert all(any(line.startswith(way) for line in block.splitlines()) for way in found["scores"])
    assert all(f"  note: {note}" in block for note in found["notes"]) and "written to result.json" in block


@pytest.mark.parametrize("task", TASKS)
def test_every_row_has_files_to_train_on_and_to_choose_by(whole, task):
    row = TASKS[task]
    for split in ("train", "val"):
        if not getattr(row, split):
            assert split == "val"
            continue
        path, media = split_files(row, split, whole)
        listed = read(path)
        rows = read_rows(row, path, media, train=split == "train")
        assert all(os.path.isfile(r.video) and r.captions and r.where.startswith(f"{path}, row ") for r in rows)
        if row.kind == "qa":
            assert sum(len(r.questions) for r in rows) == len(listed) and "answer" in listed[0]
        elif split == "train":
            per = max(1, row.per_clip)
            assert all(len(r.captions) <= per and bool(r.questions) == (row.kind == "caption") for r in rows)
            if not row.paragraph:
                assert sum(len(r.captions) for r in rows) == sum(len(as_list(x["caption"])) for x in listed)


def test_the_table_knows_its_kinds_and_has_no_row_untested():
    assert set(TESTED) == set(TASKS) and {row.kind for row in TASKS.values()} == set(KINDS) == set(scoring.SCORES)
    for name, row in TASKS.items():
        assert find_task(name) is row and row.tested == TESTED[name][1], name
        assert (row.answers != "") == (row.kind == "qa"), name
        assert (row.answer_length > 1) == (row.kind in ("qa", "caption")) and row.length >= 2, name
        assert row.length == LENGTHS.get(name, row.length), name
        for recipe in (row.base, row.large):
            assert 0 < recipe.lr < 1e-2 and 0 <= recipe.warmup < recipe.epochs and 0 <= recipe.drop_path < 1, name


def test_a_fine_tuned_model_is_shown_as_many_frames_as_it_was_tuned_on(models, whole, tmp_path):
    found = scoring.main(settings(models, whole, "msvd", checkpoint=models["tuned"], out=str(tmp_path / "x.json")))
    assert found["frames"] == 7 and found["chosen"] == "epoch 3 of 4, chosen on the val split: tuned"
    found = scoring.main(settings(models, whole, "msvd", frames=3, out=str(tmp_path / "x.json")))
    assert found["frames"] == 3 and found["chosen"] == ""


# ---------------------------------------------------------------------------------------------------------------------
# Readers

def test_captions_and_paragraphs(root):
    write("x.json", [{"video": "v0.mp4", "caption": ["A Dog.", "  It's  GONE! "]},
                     {"video": ["v1.mp4", "sub/v3.mp4"], "caption": "He's-in/out; alone"},
                     {"image": "v2.mp4", "caption": "what?"}])
    videos = lambda rows: [os.path.relpath(r.video, f"{root}/videos") for r in rows]
    told = lambda task, **how: read_rows(task, "x.json", f"{root}/videos", **{"train": False, **how})
    rows = told(TASKS["msvd"])
    assert videos(rows) == ["v0.mp4", "v1.mp4", "sub/v3.mp4", "v2.mp4"]
    assert [r.captions for r in rows] == [["a dog", "its gone"], ["hes in out alone"], ["hes in out alone"], ["what"]]
    assert [r.where for r in rows] == [f"x.json, row {i}" for i in (0, 1, 1, 2)]
    assert rows[0].media == data.media_id(rows[0].video) and len({r.media for r in rows}) == 4
    rows = told(TASKS["msvd"], train=True)                                  # each of its captions is one to learn
    assert [(v, r.captions) for v, r in zip(videos(rows), rows, strict=True)] == [
        ("v0.mp4", ["a dog"]), ("v0.mp4", ["its gone"]), ("v1.mp4", ["hes in out alone"]),
        ("sub/v3.mp4", ["hes in out alone"]), ("v2.mp4", ["what"])]
    for how in (dict(), dict(train=True)):                                  # of a text its words, not its letters
        rows = told(TASKS["didemo"], **how)
        assert [r.captions for r in rows] == [["a dog its gone"], ["hes in out alone"], ["hes in out alone"], ["what"]]


def test_questions_and_what_their_answers_weigh(root):
    write("x.json", [{"video": "v0.mp4", "question": "Who's there?", "answer": ["Dog", "cat", "Dog", "a Dog"]},
                     {"video": "v1.mp4", "question": "why?", "answer": "Yes.", "question_id": "q7", "type": "reason"},
                     {"video": "v0.mp4", "question": "how?", "answer": ["fast"], "question_id": 0, "type": 3},
                     {"video": "v0.mp4", "question": "how?", "answer": "fast", "type": None}])
    rows = read_rows(TASKS["msvd-qa"], "x.json", f"{root}/videos", train=False)
    assert [(os.path.basename(r.video), len(r.questions)) for r in rows] == [("v0.mp4", 3), ("v1.mp4", 1)]
    asked = {q.id: q for r in rows for q in r.questions}
    assert asked["q7"].answers == {"Yes.": 1.0} and asked["q7"].text == "why"
    first = rows[0].questions[0]
    assert first.text == "whos there" and first.answers == {"Dog": 0.5, "cat": 0.25, "a Dog": 0.25}
    assert [q.kind for q in rows[0].questions] == ["", "3", ""] and asked["q7"].kind == "reason"
    for per, wanted in ((1, [1, 1, 1, 1]), (2, [2, 1, 1]), (4, [3, 1])):
        rows = read_rows(replace(TASKS["msvd-qa"], per_clip=per), "x.json", f"{root}/videos", train=True)
        assert [len(r.questions) for r in rows] == wanted and sum(len(r.captions) for r in rows) == 4
    assert [r.where for r in rows] == ["x.json, row 0", "x.json, row 1"]


@pytest.mark.parametrize("form", ["rows", "lists"])
def test_captions_to_be_said(root, form):
    """A caption that two people gave counts twice, in what is learned and in what is compared with."""
    said = {"v0.mp4": ["A dog!", "a dog", "A dog!", "two"], "v1.mp4": ["One."]}
    write("x.json", [{"video": v, "caption": t} for v, texts in said.items() for t in texts] if form == "rows"
          else [{"video": v, "caption": texts} for v, texts in said.items()])
    rows = read_rows(TASKS["msvd-caption"], "x.json", f"{root}/videos", train=False)
    assert [r.captions for r in rows] == list(said.values())                # as they were written
    for per, wanted in ((1, [1, 1, 1, 1, 1]), (3, [3, 1, 1]), (4, [4, 1])):
        task = replace(TASKS["msvd-caption"], per_clip=per)
        rows = read_rows(task, "x.json", f"{root}/videos", train=True)
        assert [len(r.captions) for r in rows] == wanted and all(len(r.questions) == 1 for r in rows)
        for r in rows:
            assert r.questions[0].text == "" and r.questions[0].answers == pytest.approx(
                {t: n / len(r.captions) for t, n in Counter(r.captions).items()})
    assert rows[0].questions[0].answers == {"a dog": 0.75, "two": 0.25}


def test_choices(root):
    write("x.json", [{"video": "v0.mp4", "caption": ["A dog.", "cat", "x"], "answer": 2},
                     {"video": "v0.mp4", "caption": ["a", "b"], "answer": 0}])
    rows = read_rows(TASKS["msrvtt-mc"], "x.json", f"{root}/videos", train=False)
    assert [(r.captions, r.right) for r in rows] == [(["a dog", "cat", "x"], 2), (["a", "b"], 0)]
    write("y.json", [{"video": "v0.mp4", "caption": ["a", "b"]}])           # it is trained as retrieval is
    assert [r.captions for r in read_rows(TASKS["msrvtt-mc"], "y.json", f"{root}/videos", train=True)] == [["a"], ["b"]]


# ---------------------------------------------------------------------------------------------------------------------
# Forms and names of files

def to_jsonl(listed, path):
    with open(path, "w") as f:
        f.write("\n".join(json.dumps(row) + "\n" * (i % 2) for i, row in enumerate(listed)))    # and empty lines


def to_sqlite(listed, path):
    key = "video" if "video" in listed[0] else "image"
    with closing(sqlite3.connect(path)) as base:
        base.execute(f"create table annos (id integer primary key, {key} text, caption text)")
        base.executemany("insert into annos values (?, ?, ?)",
                         [(i, row[key], row["caption"]) for i, row in reversed(list(enumerate(listed)))])
        base.commit()


@pytest.mark.parametrize("task, old, new, turn", [
    ("msvd", "msvd_ret_test.json", "msvd_ret_test.jsonl", to_jsonl),
    ("msvd-qa", "msvd_qa_test.json", "msvd_qa_test.jsonl", to_jsonl),
    ("ssv2-label", "ssv2_ret_label_val_small.json", "ssv2_ret_label_val_small.jsonl", to_jsonl),
    ("msrvtt", "msrvtt_ret_test1k.json", "msrvtt_ret_test1k.sqlite", to_sqlite),
    ("lsmdc", "lsmdc_ret_test_1000.json", "lsmdc_ret_test_1000.db", to_sqlite),         # under "image"
    ("msrvtt-caption", "msrvtt_cap_test.json", "msrvtt_cap_test.sqlite", to_sqlite),
    ("activitynet", "anet_ret_val.json", "anet_ret_val_1.json", None),
    ("msrvtt", "msrvtt_ret_test1k.json", "msrvtt_test1k.json", None),
    ("msrvtt-7k", "msrvtt_ret_test1k.json", "../msrvtt_test1k.json", None),             # directly under the root
    ("didemo", "didemo_ret_test.json", "../didemo_ret_test.jsonl", to_jsonl),
], ids=lambda x: x.__name__ if callable(x) else None if x is None else x.split("/")[-1])
def test_a_file_of_another_form_or_name_is_the_same_file(models, whole, root, simple, task, old, new, turn):
    old, new = (os.path.normpath(f"{root}/anno_downstream/{name}") for name in (old, new))
    wanted = scoring.main(settings(models, whole, task))
    listed = read(old)
    os.remove(old)
    with pytest.raises(FileNotFoundError, match=re.escape(os.path.basename(old))):
        split_files(TASKS[task], "test", root)
    (turn or (lambda rows, path: write(path, rows)))(listed, new)
    found = scoring.main(settings(models, root, task))
    assert found["annotations"] == new
    for key in ("scores", "videos", "captions", "questions", "said", "protocol"):
        assert found.get(key) == wanted.get(key), key


def test_the_first_of_several_names_counts(root):
    for name in ("b.json", "anno_downstream/b.jsonl", "a.db", "anno_downstream/a.sqlite", "anno_downstream/a.json"):
        write(f"{root}/{name}", [])
    for name in ("anno_downstream/a.json", "anno_downstream/a.sqlite", "a.db", "anno_downstream/b.jsonl", "b.json"):
        assert find_file("a|b", root) == f"{root}/{name}"
        os.remove(f"{root}/{name}")
    with pytest.raises(FileNotFoundError, match="has no anno_downstream/a.json, nor a.json beside it"):
        find_file("a|b", root)
    task = TASKS["msvd"]
    assert find_media(task, root) == f"{root}/videos_images/msvd_2fps_224"
    os.makedirs(f"{root}/own/videos_images/msvd")
    assert find_media(task, f"{root}/own") == f"{root}/own/videos_images/msvd"
    with pytest.raises(FileNotFoundError, match="has no folder videos_images/lsmdc/ with the task's videos"):
        find_media(TASKS["lsmdc"], f"{root}/own")


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a file

def change(path, **changes):
    """Row 1 of the file changed; a value of None takes the key away."""
    listed = read(path)
    for key, value in changes.items():
        listed[1][key] = value
        if value is None:
            del listed[1][key]
    write(path, listed)


def refused(models, root, task, capsys, message, *flags):
    args = ["--task", task, "--checkpoint", models[TASKS[task].kind], "--data-root", root, "--out", "no.json", *flags]
    code, out, err = command("eval.py", args, capsys)
    assert_one_line("eval.py", code, err, message)
    assert not os.path.exists("no.json")


@pytest.mark.parametrize("task, file, changes, message", [
    ("msvd", "msvd_ret_test", {"video": "gone.mp4"}, r"row 1: no file .*gone.mp4 \(1 of 6 rows lack theirs\)"),
    ("ssv2-label", "ssv2_ret_label_val_small", {"video": ["v0.mp4", "gone.mp4"]}, "row 1: no file .*gone.mp4"),
    ("msvd-qa", "msvd_qa_test", {"video": "gone.mp4"}, "row 1: no file .*gone.mp4"),
    ("msrvtt-mc", "msrvtt_mc_test", {"video": "gone.mp4"}, "row 1: no file .*gone.mp4"),
    ("msvd-caption", "msvd_cap_test", {"video": "gone.mp4"}, "row 1: no file .*gone.mp4"),
    ("msvd", "msvd_ret_test", {"caption": ""}, "row 1: empty caption ''"),
    ("msvd", "msvd_ret_test", {"caption": ["a dog", " ?! "]}, "row 1: empty caption ' [?]! '"),
    ("msvd", "msvd_ret_test", {"caption": []}, 'row 1: wanted a text or a list of texts under "caption", got '),
    ("msvd", "msvd_ret_test", {"caption": [["a"]]}, 'row 1: wanted a text or a list of texts under "caption", got '),
    ("msvd", "msvd_ret_test", {"caption": None}, 'row 1: wanted a text or a list of texts under "caption", got None'),
    ("msvd", "msvd_ret_test", {"video": None}, 'row 1: wanted a file name under "video" or "image", got '),
    ("msvd", "msvd_ret_test", {"video": 7}, 'row 1: wanted a file name under "video" or "image", got '),
    ("didemo", "didemo_ret_test", {"caption": ["fine", ","]}, "row 1: empty caption ','"),
    ("msvd-qa", "msvd_qa_test", {"question_id": 200}, "row 1: question_id 200 is there already, in row 0"),
    ("msvd-qa", "msvd_qa_test", {"question_id": [1]}, r'row 1: wanted a number or a text under "question_id", got \[1'),
    ("msvd-qa", "msvd_qa_test", {"question": "?"}, "row 1: empty question '[?]'"),
    ("msvd-qa", "msvd_qa_test", {"question": ["a", "b"]}, "row 1: wanted one question, got 2"),
    ("msvd-qa", "msvd_qa_test", {"answer": None}, 'row 1: wanted a text or a list of texts under "answer", got None'),
    ("msvd-qa", "msvd_qa_test", {"answer": 3}, 'row 1: wanted a text or a list of texts under "answer", got 3'),
    ("msvd-qa", "msvd_qa_test", {"video": ["v0.mp4", "v1.mp4"]}, "row 1: wanted one file, got 2"),
    ("msrvtt-mc", "msrvtt_mc_test", {"answer": 5}, 'row 1: wanted 0 to 4 under "answer", got 5'),
    ("msrvtt-mc", "msrvtt_mc_test", {"answer": -1}, 'row 1: wanted 0 to 4 under "answer", got -1'),
    ("msrvtt-mc", "msrvtt_mc_test", {"answer": "2"}, "row 1: wanted 0 to 4 under \"answer\", got '2'"),
    ("msrvtt-mc", "msrvtt_mc_test", {"answer": True}, 'row 1: wanted 0 to 4 under "answer", got True'),
    ("msrvtt-mc", "msrvtt_mc_test", {"answer": None}, 'row 1: wanted 0 to 4 under "answer", got None'),
    ("msrvtt-mc", "msrvtt_mc_test", {"caption": ["a"]}, 'row 1: wanted several texts under "caption", got one'),
    ("msvd-caption", "msvd_cap_test", {"caption": ["a", "..."]}, "row 1: empty caption '...'"),
])
def test_a_bad_row_is_named(models, root, capsys, task, file, changes, message):
    change(f"{root}/anno_downstream/{file}.json", **changes)
    refused(models, root, task, capsys, f"{file}.json, {message}")


@pytest.mark.parametrize("text, message", [
    ("{}", r"msvd_ret_test.json: wanted a list of rows, got \{\}"),
    ("[]", r"msvd_ret_test.json: wanted a list of rows, got \[\]"),
    ('"v0.mp4"', "msvd_ret_test.json: wanted a list of rows, got 'v0.mp4'"),
    ("[1]", "msvd_ret_test.json, row 0: wanted an object, got 1"),
    ("[{", "msvd_ret_test.json: not JSON"),
    ("\xff\xfe", "msvd_ret_test.json: not JSON"),
])
def test_a_file_that_is_no_list_is_named(models, root, capsys, text, message):
    with open(f"{root}/anno_downstream/msvd_ret_test.json", "wb") as f:
        f.write(text.encode("latin1"))
    refused(models, root, "msvd", capsys, message)


def test_lines_and_tables_that_cannot_be_read_are_named(models, root, capsys):
    path = f"{root}/anno_downstream/msvd_ret_test"
    to_jsonl(read(f"{path}.json"), f"{path}.jsonl")
    os.remove(f"{path}.json")
    with open(f"{path}.jsonl", "a") as f:
        f.write("\n{")
    line = open(f"{path}.jsonl").read().count("\n") + 1
    refused(models, root, "msvd", capsys, f"msvd_ret_test.jsonl, line {line}: not JSON")
    os.rename(f"{path}.jsonl", f"{path}.sqlite")
    refused(models, root, "msvd", capsys, "msvd_ret_test.sqlite: not SQLite with a table annos")
    os.remove(f"{path}.sqlite")
    with closing(sqlite3.connect(f"{path}.db")) as base:
        base.execute("create table annos (id integer, video text, caption text)")
    refused(models, root, "msvd", capsys, r"msvd_ret_test.db: wanted a list of rows, got \[\]")


@pytest.mark.parametrize("answers, message", [
    (None, "has no anno_downstream/msvd_qa_answer_list.json"),
    (["dog", "cat", "dog"], "msvd_qa_answer_list.json: 'dog' is there twice"),
    (["dog", ""], "msvd_qa_answer_list.json, row 1: wanted an answer, got ''"),
    (["dog", 3], "msvd_qa_answer_list.json, row 1: wanted an answer, got 3"),
    ({"dog": 0}, "msvd_qa_answer_list.json: wanted a list of rows, got "),
    ([], "msvd_qa_answer_list.json: wanted a list of rows, got "),
])
def test_a_list_of_answers_is_there_and_has_each_once(models, root, capsys, answers, message):
    path = f"{root}/anno_downstream/msvd_qa_answer_list.json"
    os.remove(path) if answers is None else write(path, answers)
    refused(models, root, "msvd-qa", capsys, message)
    write("own.json", ["dog", "cat"])                                       # one of one's own in its place
    found = scoring.main(settings(models, root, "msvd-qa", answers="own.json"))
    assert found["answers"] == 2 and list(found["scores"])[0] == "ranking, top 2"


@pytest.mark.parametrize("task, checkpoint", [
    ("msvd-qa", "retrieval"), ("msvd-qa", "caption"), ("msvd-caption", "retrieval"), ("msvd-caption", "qa"),
    ("msvd", "qa"), ("msvd", "caption"), ("msrvtt-mc", "qa"),
])
def test_a_model_of_another_kind_is_refused(models, whole, tmp_path, monkeypatch, capsys, task, checkpoint):
    monkeypatch.chdir(tmp_path)
    kind, folder = TASKS[task].kind, models[checkpoint]
    refused({kind: folder}, whole, task, capsys, f"{folder} holds a model that .*; {KINDS[kind]} wants a model that ")


def test_a_mask_wants_a_teacher(models, whole, tmp_path, monkeypatch, capsys):
    """A model that tools/convert.py wrote has none."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["retrieval"], "converted")
    write("converted/config.json", read("converted/config.json") | {"teacher": ""})
    message = "--mask tube wants --teacher, a SigLIP: converted had none"
    refused({"retrieval": "converted"}, whole, "msvd", capsys, message, "--mask", "tube")
    scoring.main(settings({"retrieval": "converted"}, whole, "msvd", mask="tube", teacher=models["teacher"]))


def test_a_task_is_found_by_name_and_the_nearest_is_offered(models, whole, capsys):
    every = ", ".join(TASKS)
    with pytest.raises(ValueError, match=f"^there is no task 'msrvt'; did you mean 'msrvtt'[?] There are: {every}$"):
        find_task("msrvtt"[:-1])
    with pytest.raises(ValueError, match=f"^there is no task 'zzz'[.] There are: {every}$"):
        find_task("zzz")
    code, _, err = command("eval.py", ["--task", "activity-qa", "--data-root", whole], capsys)
    assert_one_line("eval.py", code, err, "there is no task 'activity-qa'; did you mean 'activitynet-qa'[?]")


@pytest.mark.parametrize("given, message", [
    ("", "--data-root is wanted: the folder with anno_downstream/ and videos_images/"),
    ("nowhere", "nowhere: no such folder, wanted as --data-root"),
])
def test_a_root_is_wanted(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        split_files(TASKS["msrvtt"], "test", given)
    with pytest.raises(ValueError, match="no val split: none is published"):
        split_files(TASKS["msrvtt"], "val", given)
    with pytest.raises(FileNotFoundError, match="data/sprites: no such folder"):
        split_files(TASKS["sprites"], "test", "")


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is dropped in silence

BROKEN = {      # task: its test file
    "msvd": "msvd_ret_test", "ssv2-label": "ssv2_ret_label_val_small", "msrvtt-mc": "msrvtt_mc_test",
    "sprites-qa": "sprites_qa_test", "msvd-caption": "msvd_cap_test",
}


@pytest.fixture(name="holes")
def root_with_holes(root, whole):
    """In place of v1.mp4 there is nothing, in place of v2.mp4 something that is no video."""
    os.remove(f"{root}/videos")
    shutil.copytree(f"{whole}/videos", f"{root}/videos")
    os.remove(f"{root}/videos/v1.mp4")
    with open(f"{root}/videos/v2.mp4", "wb") as f:
        f.write(b"no video at all")
    os.remove(f"{root}/videos_images")
    for folder in FOLDERS:
        os.makedirs(f"{root}/videos_images", exist_ok=True)
        os.symlink(f"{root}/videos", f"{root}/videos_images/{folder}")
    return root


def without(listed, names):
    """The rows of a file less these videos."""
    left = []
    for row in listed:
        videos = [v for v in as_list(row["video"]) if v not in names]
        left += [row | {"video": videos if isinstance(row["video"], list) else videos[0]}] if videos else []
    return left


@pytest.mark.parametrize("names", [("v1.mp4",), ("v2.mp4",), ("v1.mp4", "v2.mp4")], ids="-".join)
@pytest.mark.parametrize("task", BROKEN)
def test_what_is_left_out_is_said_and_the_rest_is_scored(models, holes, whole, simple, capsys, task, names):
    file = f"anno_downstream/{BROKEN[task]}.json"
    listed = without(read(f"{whole}/{file}"), {"v1.mp4", "v2.mp4"} - set(names))
    write(f"{holes}/{file}", without(listed, names))
    rest = scoring.main(settings(models, holes, task))
    assert rest["lost"] == []
    write(f"{holes}/{file}", listed)
    where = {"v1.mp4": "no file .*v1.mp4", "v2.mp4": ".*v2.mp4: Invalid data"}
    refused(models, holes, task, capsys, f"{BROKEN[task]}.json, row .: {where[names[0]]}")
    found = scoring.main(settings(models, holes, task, missing="skip"))
    for key in ("scores", "videos", "captions", "questions", "kinds"):
        assert found.get(key) == rest.get(key), key
    assert [{k: v for k, v in said.items() if k != "row"} for said in found.get("said", [])] == [
        {k: v for k, v in said.items() if k != "row"} for said in rest.get("said", [])]
    for name in names:                                                      # each of them is named
        rows = [i for i, row in enumerate(listed) if name in as_list(row["video"])]
        told = [line for line in found["lost"] if name in line]
        assert told and all(re.search(f"{file}, row ({'|'.join(map(str, rows))}): {where[name]}", x) for x in told)
    assert len(found["lost"]) == sum(any(name in line for name in names) for line in found["lost"])
    note, = (note for note in found["notes"] if note.startswith("SCORED WITHOUT "))
    videos = len({v for row in listed for v in as_list(row["video"])})
    assert note.startswith(f"SCORED WITHOUT {len(names)} OF {videos} VIDEOS, which could not be read, the first: ")
    assert f"  note: {note}" in capsys.readouterr().out and read("result.json") == found


@pytest.mark.parametrize("task", BROKEN)
def test_where_no_video_can_be_read_nothing_is_scored(models, holes, whole, simple, capsys, task):
    file = f"anno_downstream/{BROKEN[task]}.json"
    for gone, message in (("v1.mp4", "no file"), ("v2.mp4", "none of 1 videos could be read")):
        write(f"{holes}/{file}", without(read(f"{whole}/{file}"), set(NAMES) - {gone}))
        refused(models, holes, task, capsys, message, "--missing", "skip")


def test_an_answer_that_is_not_in_the_list_is_counted_and_said(models, root, capsys):
    path = f"{root}/anno_downstream/sprites_qa_test.json"
    before = scoring.main(settings(models, root, "sprites-qa"))
    assert before["answers not in the list"] == []
    listed = read(path)
    for row in listed[:5]:
        row["answer"] = "an umbrella"
    listed[3]["answer"] = ["an umbrella", "dog"]                            # one of two is there
    write(path, listed)
    write(f"{root}/anno_downstream/sprites_qa_train.json", [
        row | {"answer": "an umbrella"} for row in read(f"{root}/anno_downstream/sprites_qa_train.json")])
    found = scoring.main(settings(models, root, "sprites-qa"))
    assert found["questions"] == 12 and len(found["answers not in the list"]) == 4
    assert any(n.startswith("4 of 12 questions have an answer that is not in the list: by ranking they count as wrong")
               for n in found["notes"])
    assert "  note: 4 of 12 questions" in capsys.readouterr().out
    assert found["scores"]["most frequent answer to that kind"]["all"] == pytest.approx(500 / 12)
    right = sum(said["ranked"] in as_list(row["answer"]) for said, row in zip(found["said"], listed, strict=True))
    assert found["scores"]["ranking, top 8"]["all"] == pytest.approx(100 * right / 12)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines

def test_the_most_frequent_answer_by_kind(models, root):
    names = NAMES[:2]
    kinds = {"colour": ["dog"] * 3 + ["cat"] * 2, "count": ["yes"] * 2 + [["snow", "cat"]] * 3}
    write(f"{root}/anno_downstream/sprites_qa_train.json", [
        {"video": names[i % 2], "question": "what", "answer": a, "type": kind} for kind, said in kinds.items()
        for i, a in enumerate(said)] + 4 * [
            {"video": "not/here.mp4", "question": "what", "answer": "pizza", "type": "colour"}])
    asked = [("colour", "pizza"), ("colour", "dog"), ("colour", ["cat", "pizza"]), ("count", "yes"), ("count", "snow"),
             ("unheard", "pizza"), ("unheard", "yes"), ("unheard", "pizza"), ("unheard", "cat")]
    write(f"{root}/anno_downstream/sprites_qa_test.json", [
        {"video": names[i % 2], "question": "what", "answer": a, "type": kind, "question_id": i}
        for i, (kind, a) in enumerate(asked)])
    found = scoring.main(settings(models, root, "sprites-qa"))
    # pizza to colour; yes, 2 against 3/2 and 3/2, to count; to what was never asked pizza, the most frequent of all.
    # A training video that is not there is no reason to forget what was asked about it.
    assert found["scores"]["most frequent answer to that kind"] == pytest.approx(
        {"all": 100 * 5 / 9, "colour": 200 / 3, "count": 50.0, "unheard": 50.0})


def test_the_most_frequent_caption(models, root, simple):
    texts = ["A dog runs!", "a dog runs", "A dog, runs", "the cat sits on the mat", "the cat sits on the mat"]
    write(f"{root}/anno_downstream/msvd_cap_train.json", [{"video": NAMES[0], "caption": texts[:2]},
                                                          {"video": NAMES[1], "caption": texts[2:]}])
    path = f"{root}/anno_downstream/msvd_cap_test.json"
    listed = [row | {"caption": [*row["caption"], "A dog runs fast."] * 2} for row in read(path)]
    write(path, listed)
    found = scoring.main(settings(models, root, "msvd-caption", beams=1))
    wanted = scoring.caption_scores({row["video"]: row["caption"] for row in listed},
                                    {row["video"]: "a dog runs" for row in listed})
    assert list(found["scores"]) == ["greedy", "most frequent caption"]
    assert found["scores"]["most frequent caption"] == pytest.approx(wanted) and max(wanted.values()) > 1


@pytest.mark.parametrize("task, file", [("msvd-qa", "msvd_qa_train"), ("msvd-caption", "msvd_cap_train")])
def test_without_training_annotations_there_is_no_baseline_and_it_is_said(models, root, simple, task, file):
    os.remove(f"{root}/anno_downstream/{file}.json")
    found = scoring.main(settings(models, root, task))
    assert not any("frequent" in name for name in found["scores"])
    assert any(re.match(f"no baseline: .* has no anno_downstream/{file}.json", note) for note in found["notes"])


# ---------------------------------------------------------------------------------------------------------------------
# Counts

@pytest.mark.parametrize("task, file", [("msvd", "msvd_ret_test"), ("msrvtt-mc", "msrvtt_mc_test"),
                                        ("msvd-qa", "msvd_qa_test"), ("msvd-caption", "msvd_cap_test")])
def test_a_number_of_rows_that_is_not_the_published_one_is_noted(models, root, simple, monkeypatch, task, file):
    listed = read(f"{root}/anno_downstream/{file}.json")
    number = 6 if task == "msvd-caption" else len(listed)
    noted = lambda **more: [note for note in scoring.main(settings(models, root, task, **more))["notes"]
                            if "published" in note]
    for tested in (number, number + 1, 0):
        monkeypatch.setitem(TASKS, task, replace(TASKS[task], tested=tested))
        assert len(noted()) == (tested == number + 1)
        assert noted(data=f"{root}/anno_downstream/{file}.json", data_root=find_media(TASKS[task], root),
                     answers=f"{root}/anno_downstream/msvd_qa_answer_list.json") == []
    if TASKS[task].val:
        assert noted(split="val") == []


def test_answers_are_read_as_they_stand(tmp_path):
    write(tmp_path / "a.json", ["Dog", "dog", "a dog."])
    assert read_answers(str(tmp_path / "a.json")) == ["Dog", "dog", "a dog."]
