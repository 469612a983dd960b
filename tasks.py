"""
The table of benchmarks: their files, evaluation settings, fine-tuning recipes and readers.

All files of a benchmark are under one folder, --data-root, in VindLU's layout. UMT uses the same annotation files:

    DATA_ROOT/anno_downstream/msrvtt_ret_train9k.json   (or DATA_ROOT/msrvtt_ret_train9k.json)
    DATA_ROOT/videos_images/msrvtt/video0.mp4           (or another folder of the task's media_dirs)

The official files of MSR-VTT retrieval are found too. The extension may be any that formats.py reads.

The recipes are UMT's (OpenGVLab/unmasked_teacher, multi_modality/exp/finetuning, the 25M files). The recipes of
captioning and of the embedded data set are our own. T2V is text-to-video retrieval, which UMT's logs call img_r;
V2T is txt_r.
"""

import difflib
import os
import re
from collections import Counter
from dataclasses import dataclass, replace

from annotations import (
    Annotation,
    Question,
    check_files_exist,
    iter_objects,
    make_annotation,
    normalize_caption,
    note_empty_captions,
    parse_media,
    parse_texts,
    read_annotations,
)
from formats import EXTENSIONS, iter_annotations, shorten
from media import Media, is_shards

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
MSRVTT_TEST = "msrvtt_ret_test1k|msrvtt_test1k|MSRVTT_JSFUSION_test"
MSRVTT_7K = "msrvtt_ret_train7k|MSRVTT_train.7k"
ANET = "videos_images/activitynet|videos_images/activity_net_2fps_360"
SSV2 = "videos_images/ssv2"
ANSWERS = dict(max_answer_length=5)         # [CLS], three word pieces and [SEP], as in UMT
CAPTIONS = dict(max_answer_length=32)

TASKS = {
    # Retrieval. The "val" and "test" lists of MSR-VTT 1k-A are the same, so there is no list for model selection.
    "msrvtt": Task(
        "retrieval", MSRVTT, "msrvtt_ret_train9k|MSRVTT_train.9k", "", MSRVTT_TEST, 32,
        Recipe(1e-5, 10, 1, 0.2), Recipe(2e-5, 7, 1, 0.3), test_rows=1000),
    "msrvtt-7k": Task(
        "retrieval", MSRVTT, MSRVTT_7K, "", MSRVTT_TEST, 32,
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
        "choice", MSRVTT, MSRVTT_7K, "", "msrvtt_mc_test", 32,
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

def name_data(path: str) -> str:
    """Name a data set after its annotation file or shards: a/dogs.json -> dogs, a/web/{00..07}.tar -> web-00..07."""
    if not is_shards(path):
        return os.path.splitext(os.path.basename(path))[0]
    folder, name = os.path.split(os.path.abspath(path).removesuffix(".tar"))
    return re.sub("[^A-Za-z0-9_.]+", "-", f"{os.path.basename(folder)}-{name}").strip("-")


def find_file(names: str, root: str) -> str:
    """Find the first annotation file under root that has one of the names (separated by |)."""
    candidates = [f"{folder}{name}{extension}" for name in names.split("|") for folder in ("anno_downstream/", "")
                  for extension in EXTENSIONS]
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
        exists = {path: os.path.isfile(path) for path in {a.media.path for a in annotations}}
        missing += [a for a in annotations if not exists[a.media.path]]
        annotations = [a for a in annotations if exists[a.media.path]] or annotations
    check_files_exist(annotations, root)
    return annotations


def single_media(entry: dict, root: str, source: str) -> Media:
    """Return the one video of an entry that must not list several."""
    media = parse_media(entry, root, source)
    if len(media) > 1:
        raise ValueError(f'{source}: "video" must be one file name, got {len(media)}')
    return media[0]


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
        media = single_media(entry, root, source)
        annotations.append(make_annotation(source, media, captions, correct_index=correct))
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
        items.append((source, single_media(entry, root, source), question))
    return [make_annotation(source, media, [q.text for q in questions], questions=questions)
            for source, media, questions in group_by_clip(items, texts_per_clip)]


def read_captions(path: str, root: str, texts_per_clip: int, notes: list[str] | None = None) -> list[Annotation]:
    """
    Read {"video": name, "caption": text or list of texts} for captioning. A video may have several rows.

    Each Annotation has up to texts_per_clip captions of one video, as the answers of a question without text. If
    texts_per_clip is 0, it has all of them, not normalised, because the captioning metrics have their own tokenizer.
    """
    empty = []
    items = [(source, single_media(entry, root, source), text) for source, entry in iter_objects(path, notes)
             for text in parse_texts(entry, "caption", source, empty)]
    note_empty_captions(path, empty, len(items), notes)
    annotations = []
    for source, media, captions in group_by_clip(items, texts_per_clip):
        captions = [normalize_caption(text) for text in captions] if texts_per_clip else captions
        weights = {text: n / len(captions) for text, n in Counter(captions).items()}
        annotations.append(make_annotation(source, media, captions, questions=[Question("", weights)]))
    return annotations


def group_by_clip(items: list[tuple], texts_per_clip: int) -> list[tuple]:
    """
    Group (source, media, item) by media, in order of first appearance: (source of the first item, media, items). A
    group has up to texts_per_clip items, or all of them if it is 0.
    """
    clips = {}
    for source, media, item in items:
        clips.setdefault(media, []).append((source, item))
    groups = []
    for media, members in clips.items():
        size = texts_per_clip or len(members)
        chunks = (members[i:i + size] for i in range(0, len(members), size))
        groups += [(chunk[0][0], media, [item for _, item in chunk]) for chunk in chunks]
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
