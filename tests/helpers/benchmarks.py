"""
A folder with small annotation files and videos of every benchmark, and tiny models to evaluate on them.

pytest loads this file as a plugin (tests/conftest.py), so tests use its fixtures by name and import the rest.
"""

import json
import os
import random
import shutil
from itertools import islice

import numpy as np
import pytest

from tasks import TASKS

VIDEOS = {"v0.mp4": 3, "v1.mp4": 5, "v2.mp4": 8, "sub/v3.mp4": 13, "v4.mkv": 20, "v5.mp4": 31}      # name: frames
NAMES = list(VIDEOS)
MEDIA_FOLDERS = ("msrvtt", "msvd_2fps_224", "activitynet", "didemo_2fps_360_trimed30", "lsmdc", "ssv2")

RNG = random.Random(0)          # of the texts; the fixtures reset it, so a test's texts do not depend on other tests
WORDS = dict(who="dog cat man woman bird crowd".split(), does="eats sees throws makes".split(),
             what="pizza snow song ball video cake".split(), how="slowly fast outside alone twice".split())
TEXTS = list(dict.fromkeys("a {} {} a {} {}".format(*map(RNG.choice, WORDS.values())) for _ in range(400)))
ANSWERS = ["dog", "cat", "yes", "a red ball", "pizza", "zebra crossing", "snow", "to the left"]     # two are truncated


# ---------------------------------------------------------------------------------------------------------------------
# Files

def write_json(path, content):
    """Write JSON as a person who edits it: without the checksum that a loaded file has."""
    content = {key: x for key, x in content.items() if key != "checksum"} if isinstance(content, dict) else content
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        json.dump(content, f)


def load_json(path):
    with open(path) as f:
        return json.load(f)


def as_list(x):
    return x if isinstance(x, list) else [x]


def captions_like(n):
    """n captions, all different, as people write them: with capitals, commas and a full stop."""
    return [text.capitalize().replace(" a ", ", a ", 1) + "." for text in RNG.sample(TEXTS, n)]


def questions_like(names, first_id, **columns):
    """A row with a question for each video name; columns: key -> function(i) of its value."""
    return [{"video": name, "question": f"What does the {RNG.choice(WORDS['who'])} {RNG.choice(WORDS['does'])[:-1]}?",
             "answer": RNG.choice(ANSWERS), "question_id": first_id + i, **{k: f(i) for k, f in columns.items()}}
            for i, name in enumerate(names)]


def published_files() -> dict[str, list]:
    """Name of an annotation file -> its rows, in the form of the published file. The numbers of rows are ours."""
    RNG.seed(0)
    one = lambda names: [{"video": v, "caption": t} for v, t in zip(names, captions_like(len(names)), strict=True)]

    def several(names, n):                                                  # n to n + 2 captions each
        texts = iter(captions_like(len(names) * (n + 2)))
        return [{"video": name, "caption": list(islice(texts, n + i % 3))} for i, name in enumerate(names)]

    twice = [name for name in NAMES for _ in range(2)]
    choice = lambda names: [{"video": v, "caption": captions_like(5), "answer": i % 5} for i, v in enumerate(names)]
    training = lambda n: [{"video": v, "question": q["question"], "answer": q["answer"] if i % 3 else RNG.choices(
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
        "msrvtt_qa_train": training(2), "msrvtt_qa_val": questions_like(twice, 100),
        "msrvtt_qa_test": questions_like(twice, 200),
        "msvd_qa_train": training(3), "msvd_qa_val": questions_like(NAMES, 100),
        "msvd_qa_test": questions_like(twice, 200),
        "anet_qa_train": training(2), "anet_qa_val": questions_like(NAMES, 100, type=lambda i: i % 3),
        "anet_qa_test": [q | {"question_id": f"v_{i}"} for i, q in enumerate(
            questions_like(twice, 0, type=lambda i: i % 4))],               # its question types are numbers
        "msrvtt_mc_test": choice(NAMES + NAMES[:2]),
        "msrvtt_cap_train": one(NAMES[:4] * 2), "msrvtt_cap_val": one(NAMES[:2] * 2), "msrvtt_cap_test": one(NAMES * 3),
        "msvd_cap_train": several(NAMES[:4], 2), "msvd_cap_val": several(NAMES[:2], 2),
        "msvd_cap_test": several(NAMES, 3),
        "sprites_train": one(NAMES[:4]), "sprites_val": one(NAMES[:3]), "sprites_test": one(NAMES),
        "sprites_qa_train": questions_like(NAMES[:4] * 3, 0, type=lambda i: ["colour", "count"][i % 2]),
        "sprites_qa_val": questions_like(NAMES[:3] * 2, 50, type=lambda i: ["colour", "count"][i % 2]),
        "sprites_qa_test": questions_like(twice, 60, type=lambda i: ["colour", "count", "unheard"][i % 3]),
        "sprites_mc_val": choice(NAMES[:3]), "sprites_mc_test": choice(NAMES),
        "sprites_cap_train": one(NAMES[:4] * 5), "sprites_cap_val": several(NAMES[:3], 4),
        "sprites_cap_test": several(NAMES, 4),
    }
    lists = ["msrvtt_qa_answer_list", "msvd_qa_answer_list", "anet_qa_answer_list", "sprites_qa_answer_list"]
    return files | dict.fromkeys(lists, ANSWERS)


def write_changing_blocks(path, n, shape, rng):
    """A video of n frames of coloured blocks that change to other colours."""
    from video import write_video
    height, width = shape
    start, end = rng.integers(0, 256, (2, 1, 4, 4, 3))
    t = np.linspace(0, 1, n)[:, None, None, None]
    frames = ((1 - t) * start + t * end).astype(np.uint8).repeat(height // 4, 1).repeat(width // 4, 2)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_video(path, frames, fps=4, crf="8")


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    """Folder with anno_downstream/, videos_images/ and, for the sprites, videos/. Tests must not write into it."""
    root = str(tmp_path_factory.mktemp("benchmarks"))
    for name, rows in published_files().items():
        write_json(f"{root}/anno_downstream/{name}.json", rows)
    rng = np.random.default_rng(0)
    for i, (name, n) in enumerate(VIDEOS.items()):
        write_changing_blocks(f"{root}/videos/{name}", n, ((16, 16), (24, 16), (16, 32))[i % 3], rng)
    link_media(root)
    return root


def link_media(root):
    os.makedirs(f"{root}/videos_images")
    for folder in MEDIA_FOLDERS:
        os.symlink(f"{root}/videos", f"{root}/videos_images/{folder}")


@pytest.fixture
def benchmarks_copy(benchmarks, tmp_path, monkeypatch):
    """A copy of `benchmarks` with annotations that the test may change; the test runs in the folder that holds it."""
    RNG.seed(1)
    root = str(tmp_path / "benchmarks")
    shutil.copytree(f"{benchmarks}/anno_downstream", f"{root}/anno_downstream")
    os.symlink(f"{benchmarks}/videos_images", f"{root}/videos_images")
    os.symlink(f"{benchmarks}/videos", f"{root}/videos")
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def damaged_benchmarks(benchmarks_copy, benchmarks):
    """benchmarks_copy in which v1.mp4 does not exist and v2.mp4 is not a video."""
    root = benchmarks_copy
    os.remove(f"{root}/videos")
    shutil.copytree(f"{benchmarks}/videos", f"{root}/videos")
    os.remove(f"{root}/videos/v1.mp4")
    with open(f"{root}/videos/v2.mp4", "wb") as f:
        f.write(b"not a video")
    os.remove(f"{root}/videos_images")
    link_media(root)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Models

@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """
    Name -> folder of a tiny model: "retrieval" and "choice" are one pretrained on 5 frames, "finetuned" (retrieval, 7
    frames), "qa" and "caption" (6 frames) are fine-tuned; "teacher" is a SigLIP. "tokenizer" is their Tokenizer.
    """
    from dataclasses import replace

    import torch

    import data
    import train
    from helpers.models import configs, shaken
    from masking import MaskConfig
    from model import ClusterSTM, VideoToText
    from runtime import RunContext
    from tokenizer import build_wordpiece, load_tokenizer
    from tools.toy_teacher import ToyConfig, build_toy_teacher
    folder = str(tmp_path_factory.mktemp("models"))
    build_wordpiece([*TEXTS[:50], "what does the", *ANSWERS[:5]], f"{folder}/tokenizer.json")
    tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    vit, text, model_cfg = configs(
        vit=dict(patch_size=8),
        text=dict(width=24, depth=2, heads=2, fusion_layers=1, max_length=24, vocab_size=tokenizer.get_vocab_size(),
                  mask_token_id=tokenizer.token_to_id("[MASK]")),
        model=dict(decoder_depth=1, decoder_heads=2, target_dim=16))
    cfg = train.Config(
        teacher=f"{folder}/teacher", data=data.DataConfig(num_frames=5, image_size=16, frame_cache=False),
        mask=MaskConfig(ratio=0.5), vit=vit, text=text, model=model_cfg,
        toy=ToyConfig(width=16, depth=1, text_depth=1, heads=2))
    shaken(build_toy_teacher(cfg, tokenizer)).float().save_pretrained(cfg.teacher)
    folders = {}
    for seed, (name, task, num_frames) in enumerate((
            ("retrieval", "", 5), ("qa", "msvd-qa", 6), ("caption", "msvd-caption", 6), ("finetuned", "msvd", 7))):
        stage = "finetune" if task else "all"
        run_cfg = replace(cfg, stage=stage, task=task, data=replace(cfg.data, num_frames=num_frames))
        torch.manual_seed(seed)
        is_retrieval = name in ("retrieval", "finetuned")
        parts = (vit, text, model_cfg)
        model = ClusterSTM(*parts) if is_retrieval else VideoToText(*parts, name == "qa")
        with torch.no_grad():
            for parameter, p in model.named_parameters():
                if p.ndim > 1 and not parameter.startswith("vit."):
                    p.mul_((24 / 768) ** 0.5)                               # as small as the weights of a wide BERT
        for i in range(4 if name == "qa" else 1):                           # until its answers differ
            model = shaken(model, i).float()
        if is_retrieval:
            model.temp.data.fill_(0.05)
        folders[name] = f"{folder}/{name}"
        extra = {"chosen": f"epoch 3 of 4, chosen on the val split: {name}"} if task else {}
        train.save_model(RunContext(run_cfg, "", torch.device("cpu"), 0, 1), model, tokenizer, folders[name], **extra)
    return {**folders, "choice": folders["retrieval"], "teacher": cfg.teacher, "tokenizer": tokenizer}


@pytest.fixture
def no_java(monkeypatch):
    """Java is not found, so caption metrics take no time."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def eval_config(models, root, task, **changes):
    """eval.Config of a tiny model on a task under root; the result is written to result.json."""
    import eval as evaluation
    checkpoint = models[TASKS[task].kind]
    return evaluation.Config(**{"task": task, "checkpoint": checkpoint, "data_root": root, "out": "result.json",
                                **changes})


def assert_refused(models, root, task, capsys, message, *flags):
    """eval.py on a task ends with one line that matches `message`, and writes nothing."""
    from helpers.runs import assert_one_line, command
    args = ["--task", task, "--checkpoint", models[TASKS[task].kind], "--data-root", root, "--out", "no.json", *flags]
    code, _, err = command("eval.py", args, capsys)
    assert_one_line("eval.py", code, err, message)
    assert not os.path.exists("no.json")
