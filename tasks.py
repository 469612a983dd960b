"""
The benchmarks as a table: whose files, which split, how it is scored, how one fine-tunes for it; and their readers.

Everything lies under one folder, --data-root, in VindLU's layout, whose annotations UMT reads too:

    DATA/anno_downstream/msrvtt_ret_train9k.json    (or DATA/msrvtt_ret_train9k.json; .jsonl and .sqlite as well)
    DATA/videos_images/msrvtt/video0.mp4            (or any of the row's folders)

Recipes are UMT's (OpenGVLab/unmasked_teacher, multi_modality/exp/finetuning, the 25M files), those of captioning and of
the embedded set our own. T2V is text-to-video, a caption looking for its video: img_r in UMT's logs, and V2T is txt_r.
"""

import difflib
import os
from collections import Counter
from dataclasses import dataclass, replace

import data
from data import Question, Row, check_media, clean, file_names, media_id, read_entries, short, texts

KINDS = {"retrieval": "retrieval", "qa": "question answering", "choice": "multiple choice", "caption": "captioning"}


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning, AdamW and a cosine."""
    lr: float
    epochs: int
    warmup: int             # epochs
    drop_path: float


@dataclass(frozen=True)
class Task:
    """A benchmark. Files are relative to --data-root; of names with | between them the first that is there counts."""
    kind: str               # of KINDS
    media: str              # folder that the names in its annotations are relative to
    train: str              # annotations, without their ending
    val: str                # those a model is selected on; empty: none are published
    test: str
    length: int             # word pieces of a caption or question, [CLS] included
    base: Recipe            # of a student up to 1023 channels wide
    large: Recipe           # of a wider one
    tested: int = 0         # rows of the published test split, 0 where files that differ are about
    answers: str = ""       # question answering: the list of answers that are ranked
    answer_length: int = 0  # word pieces of an answer or of a caption to be said, [CLS] and [SEP] included
    paragraph: bool = False     # a list of captions is one text, its sentences joined
    seconds: float = 0      # of a video only its first so many
    flip: bool = True       # whether a mirrored clip still means the same
    frames: int = 12        # a clip, fine-tuned
    zero_shot: int = 4      # a clip, scored as pretrained
    rerank: int = 128       # the matching head re-ranks the top k; so many answers are scored whole
    per_clip: int = 1       # questions or captions of a clip that are trained on together
    batch: int = 256        # clips a step
    masked: bool = False    # fine-tuned on the tokens that the pretraining's mask keeps
    root: str = ""          # where --data-root is if not given


def sprites(kind: str, train: str, test: str, length: int, epochs: int, lr: float, **more) -> Task:
    recipe = Recipe(lr, epochs, 1, 0.0)
    return Task(kind, "videos", train, test.replace("test", "val"), test, length, recipe, recipe, flip=False, frames=8,
                zero_shot=8, masked=True, root="data/sprites", **{"rerank": 16, "batch": 32, **more})


MSRVTT, MSVD = "videos_images/msrvtt|videos_images/msrvtt_2fps_224", "videos_images/msvd|videos_images/msvd_2fps_224"
ANET = "videos_images/activitynet|videos_images/activity_net_2fps_360"
SSV2 = "videos_images/ssv2"
ANSWERS = dict(answer_length=5)             # [CLS], three pieces and [SEP], as in UMT
CAPTIONS = dict(answer_length=32)

TASKS = {
    # Retrieval. Of MSR-VTT's 1k-A "val" and "test" are one list, so there is none to select on.
    "msrvtt": Task(
        "retrieval", MSRVTT, "msrvtt_ret_train9k", "", "msrvtt_ret_test1k|msrvtt_test1k", 32,
        Recipe(1e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), tested=1000),
    "msrvtt-7k": Task(
        "retrieval", MSRVTT, "msrvtt_ret_train7k", "", "msrvtt_ret_test1k|msrvtt_test1k", 32,
        Recipe(1e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), tested=1000),
    "didemo": Task(
        "retrieval", "videos_images/didemo|videos_images/didemo_2fps_360_trimed30",
        "didemo_ret_train", "didemo_ret_val", "didemo_ret_test", 64,
        Recipe(2e-5, 12, 1, 0.1), Recipe(4e-5, 5, 1, 0.2), paragraph=True, seconds=30),
    "activitynet": Task(
        "retrieval", ANET, "anet_ret_train", "", "anet_ret_val|anet_ret_val_1", 150,
        Recipe(4e-5, 20, 1, 0.1), Recipe(4e-5, 20, 1, 0.2), paragraph=True),
    "lsmdc": Task(
        "retrieval", "videos_images/lsmdc", "lsmdc_ret_train", "", "lsmdc_ret_test_1000", 96,
        Recipe(2e-5, 10, 1, 0.2), Recipe(2e-5, 8, 1, 0.2), tested=1000),
    # Several captions a video, each of them one query: not a paragraph, which would add 20 points.
    "msvd": Task(
        "retrieval", MSVD, "msvd_ret_train", "", "msvd_ret_test", 64,
        Recipe(1e-5, 5, 0, 0.2), Recipe(1e-5, 3, 0, 0.3), tested=670),
    # Several videos a caption. Its labels speak of left and right.
    "ssv2-label": Task(
        "retrieval", SSV2, "ssv2_ret_label_train", "", "ssv2_ret_label_val_small", 25,
        Recipe(5e-5, 10, 0, 0.1), Recipe(4e-5, 10, 0, 0.2), flip=False),
    "ssv2-template": Task(
        "retrieval", SSV2, "ssv2_ret_template_train", "", "ssv2_ret_template_val_small", 25,
        Recipe(1e-4, 10, 1, 0.1), Recipe(1e-4, 5, 1, 0.2), tested=174, flip=False),
    # Question answering.
    "msrvtt-qa": Task(
        "qa", MSRVTT, "msrvtt_qa_train", "msrvtt_qa_val", "msrvtt_qa_test", 25,
        Recipe(2e-5, 8, 1, 0.2), Recipe(4e-5, 5, 1, 0.4), tested=72_821, answers="msrvtt_qa_answer_list", **ANSWERS),
    "msvd-qa": Task(
        "qa", MSVD, "msvd_qa_train", "msvd_qa_val", "msvd_qa_test", 25,
        Recipe(6e-5, 6, 1, 0.2), Recipe(6e-5, 6, 1, 0.4), tested=13_157, answers="msvd_qa_answer_list", **ANSWERS),
    "activitynet-qa": Task(
        "qa", ANET, "anet_qa_train", "anet_qa_val", "anet_qa_test", 25,
        Recipe(4e-5, 12, 1, 0.2), Recipe(4e-5, 10, 1, 0.3), tested=8000, answers="anet_qa_answer_list", **ANSWERS),
    # Multiple choice, trained as retrieval.
    "msrvtt-mc": Task(
        "choice", MSRVTT, "msrvtt_ret_train7k", "", "msrvtt_mc_test", 32,
        Recipe(8e-5, 3, 0, 0.2), Recipe(4e-5, 5, 0, 0.3), tested=2990),
    # Captioning: 6513 / 497 / 2990 and 1200 / 100 / 670 videos, a caption a row or a list of them.
    "msrvtt-caption": Task(
        "caption", MSRVTT, "msrvtt_cap_train", "msrvtt_cap_val", "msrvtt_cap_test", 2,
        Recipe(2e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), tested=2990, **CAPTIONS),
    "msvd-caption": Task(
        "caption", MSVD, "msvd_cap_train", "msvd_cap_val", "msvd_cap_test", 2,
        Recipe(2e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), tested=670, **CAPTIONS),
    # The embedded set.
    "sprites": sprites("retrieval", "sprites_train", "sprites_test", 36, 12, 1e-3, batch=256),
    "sprites-qa": sprites("qa", "sprites_qa_train", "sprites_qa_test", 16, 40, 5e-4, answers="sprites_qa_answer_list",
                          answer_length=6, per_clip=6),
    "sprites-mc": sprites("choice", "sprites_train", "sprites_mc_test", 36, 12, 1e-3, batch=256),
    "sprites-caption": sprites("caption", "sprites_cap_train", "sprites_cap_test", 2, 14, 5e-4, answer_length=40,
                               per_clip=4),
}


def find_task(name: str) -> Task:
    """The row of that name, or a ValueError with the nearest."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        raise ValueError(f"there is no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
                         + f" There are: {', '.join(TASKS)}")
    return TASKS[name]


# Files

def find_file(names: str, root: str) -> str:
    """The first annotation file of those names that is under root."""
    tried = [f"{folder}{name}{ending}" for name in names.split("|") for folder in ("anno_downstream/", "")
             for ending in (".json", ".jsonl", ".sqlite", ".db")]
    for name in tried:
        if os.path.isfile(os.path.join(root, name)):
            return os.path.join(root, name)
    raise FileNotFoundError(f"{root} has no {tried[0]}, nor {names.split('|')[0]}.json beside it; "
                            "the layout is at the top of tasks.py")


def find_media(task: Task, root: str) -> str:
    names = task.media.split("|")
    for name in names:
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    raise FileNotFoundError(f"{root} has no folder {' or '.join(name + '/' for name in names)} with the task's videos")


def data_root(task: Task, given: str) -> str:
    root = given or task.root
    if not root:
        raise ValueError("--data-root is wanted: the folder with anno_downstream/ and videos_images/")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder, wanted as --data-root")
    return root


def split_files(task: Task, split: str, given: str) -> tuple[str, str]:
    """split: train, val or test -> annotation file, media folder under --data-root, which must be there."""
    names = getattr(task, split)
    if not names:
        raise ValueError(f"the task has no {split} split: none is published")
    root = data_root(task, given)
    return find_file(names, root), find_media(task, root)


# Readers

def read_rows(task: Task, path: str, root: str, train: bool, absent: list | None = None) -> list[Row]:
    """
    The rows of an annotation file of the task's kind, media under root. For training each caption is a row, or
    per_clip questions of one clip are; for scoring each video with all that is asked or said of it.

    Where `absent` is a list, rows whose video is not there go into it, else they are an error.
    """
    if task.kind == "qa":
        rows = read_questions(path, root, task.per_clip if train else 0)
    elif task.kind == "caption":
        rows = read_captions(path, root, task.per_clip if train else 0)
    elif task.kind == "choice" and not train:
        rows = read_choices(path, root)
    else:
        rows = read_pairs(path, root, task.paragraph, train)
    if absent is not None:
        there = {video: os.path.isfile(video) for video in {row.video for row in rows}}
        absent += [row for row in rows if not there[row.video]]
        rows = [row for row in rows if there[row.video]] or rows
    check_media(rows, root)
    return rows


def row(where: str, root: str, name: str, captions: list[str], **more) -> Row:
    video = os.path.join(root, name)
    return Row(video, captions, None, media_id(video), where=where, **more)


def one_file(entry: dict, where: str) -> str:
    name, *more = file_names(entry, where)
    if more:
        raise ValueError(f"{where}: wanted one file, got {1 + len(more)}")
    return name


def read_pairs(path: str, root: str, paragraph: bool, train: bool) -> list[Row]:
    """
    {"video": name, or list of names that the caption is true of, "caption": text, or list of texts}: of a paragraph one
    text; for training a row for each caption.
    """
    rows = data.read_annotations(path, root, check=False)
    if paragraph:
        rows = [replace(r, captions=[" ".join(r.captions)]) for r in rows]
    return [replace(r, captions=[caption]) for r in rows for caption in r.captions] if train else rows


def read_choices(path: str, root: str) -> list[Row]:
    """{"video": name, "caption": list of texts, "answer": the place, from 0, of the one that is true}."""
    rows = []
    for where, entry in read_entries(path):
        captions, right = [clean(text) for text in texts(entry, "caption", where)], entry.get("answer")
        if len(captions) < 2:
            raise ValueError(f'{where}: wanted several texts under "caption", got one')
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(captions):
            raise ValueError(f'{where}: wanted 0 to {len(captions) - 1} under "answer", got {right!r}')
        rows.append(row(where, root, one_file(entry, where), captions, right=right))
    return rows


def read_questions(path: str, root: str, per_clip: int) -> list[Row]:
    """
    {"video": name, "question": text, "answer": text or list of texts, "question_id": number or text, "type": kind of
    question}; the last two may lack. -> rows of up to per_clip questions of a clip, or of all, for 0.

    Several answers weigh as often as they are given.
    """
    asked, seen = [], {}
    for where, entry in read_entries(path):
        question, *more = texts(entry, "question", where)
        if more:
            raise ValueError(f"{where}: wanted one question, got {1 + len(more)}")
        answers = texts(entry, "answer", where)
        name, kind = entry.get("question_id", len(asked)), entry.get("type")
        if not isinstance(name, (int, str)):
            raise ValueError(f'{where}: wanted a number or a text under "question_id", got {short(name)}')
        if "question_id" in entry and name in seen:
            raise ValueError(f"{where}: question_id {name!r} is there already, in {seen[name].rpartition(', ')[2]}")
        if "question_id" in entry:
            seen[name] = where
        kind = "" if kind is None else str(kind)            # ActivityNet-QA's are numbers
        weights = {answer: n / len(answers) for answer, n in Counter(answers).items()}
        asked.append((where, one_file(entry, where), Question(clean(question), weights, name, kind, where)))
    return [row(where, root, name, [q.text for q in some], questions=some)
            for where, name, some in by_clip(asked, per_clip)]


def read_captions(path: str, root: str, per_clip: int) -> list[Row]:
    """
    {"video": name, "caption": text or list of texts}, a video in one row or in several -> rows of up to per_clip
    captions of a clip, or of all, for 0: to be said, as the answers of a question without words.
    """
    said = [(where, one_file(entry, where), text) for where, entry in read_entries(path)
            for text in texts(entry, "caption", where)]
    rows = []
    for where, name, some in by_clip(said, per_clip):
        some = list(map(clean, some)) if per_clip else some     # to be compared with they stand as they are
        weights = {text: n / len(some) for text, n in Counter(some).items()}
        rows.append(row(where, root, name, some, questions=[Question("", weights)]))
    return rows


def by_clip(items: list[tuple], per_clip: int) -> list[tuple]:
    """(where, name, item) -> (where of the first, name, up to per_clip items of that name, or all, for 0), in order."""
    clips = {}
    for where, name, item in items:
        clips.setdefault(name, []).append((where, item))
    chunks = []
    for name, some in clips.items():
        size = per_clip or len(some)
        for at in range(0, len(some), size):
            chunks.append((some[at][0], name, [item for _, item in some[at:at + size]]))
    return chunks


def read_answers(path: str) -> list[str]:
    """The answers that are ranked: a JSON list of texts, no two alike."""
    answers = list(data.list_entries(path))
    for i, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"{path}, row {i}: wanted an answer, got {answer!r}")
    twice = [answer for answer, n in Counter(answers).items() if n > 1]
    if twice:
        raise ValueError(f"{path}: {twice[0]!r} is there twice")
    return answers
