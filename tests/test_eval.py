"""eval.py: retrieval against a loop over pairs, masks, several processes, the command."""

import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import tyro
from helpers.benchmarks import NAMES, as_list, eval_config, load_json, write_json
from helpers.evaluation import (
    approx,
    evaluate_task,
    load_clip,
    rank_by_hand,
    retrieval_by_hand,
    run_interrupted,
    visible_ids_by_name,
)
from helpers.models import shaken
from helpers.runs import assert_one_line, command, in_processes

import eval as evaluation
from annotations import normalize_caption, read_annotations
from config import Config as TrainConfig
from config import name_run, next_command
from data import ClipDataset, DataConfig, ReadableClips, init_loader_worker
from files import save_weights
from inputs import require_finite
from masking import MASK_INPUTS, MASKS, MaskConfig, keep_count
from model import ClusterSTM, load_model
from targets import compute_visible_ids
from tasks import TASKS
from teacher import SigLIP
from tokenizer import encode_texts, load_tokenizer
from video import num_frames_within, write_video


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape, place", [((3,), (2,)), ((3, 4), (1, 3)), ((3, 2, 5), (1, 0, 4))])
def test_values_that_are_not_finite_are_refused_by_the_first_name(shape, place, wrong):
    values, names = torch.zeros(shape), ["a", "b", "c"]
    require_finite(values, names, "the score of")
    require_finite(values[:0], [], "the score of")
    values[place] = values[2] = wrong
    with pytest.raises(ValueError, match=f"^the score of '{names[place[0]]}' must be finite, got {wrong}$"):
        require_finite(values, names, "the score of")


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval

@pytest.fixture
def checkpoint(first_run, tmp_path, monkeypatch):
    """out/first in a folder of its own: a copy of the first run and its teacher, with weights that tell clips apart."""
    shutil.copytree(f"{first_run}/out/first", tmp_path / "out" / "first")
    monkeypatch.chdir(tmp_path)
    save_weights(shaken(ClusterSTM.from_pretrained("out/first")).float(), "out/first")
    return "out/first"


def load(checkpoint):
    return load_model(checkpoint), load_tokenizer(f"{checkpoint}/tokenizer.json")


def sprites_rows(sprites):
    return load_json(f"{sprites}/sprites_test.json")


def sprites_config(checkpoint, sprites, **changes):
    return evaluation.Config(**{"checkpoint": checkpoint, "data_root": sprites, **changes})


def write_own_annotations(sprites):
    """
    own.json: six videos, the second and the fourth in two rows, with 1 to 281 captions a row, more than are encoded at
    once, and in pairs more than are matched at once; and rows of several videos -> its rows as (video, captions).
    """
    words = sorted({word for row in sprites_rows(sprites) for word in row["caption"].split()})
    rng = random.Random(0)
    captions = list(dict.fromkeys(" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(300)))
    names = [row["video"] for row in sprites_rows(sprites)]
    rows = [(names[0], captions[:1]), (names[1], captions[1:3]), (names[2], captions[3]), (names[1], captions[4:6]),
            (names[3], captions[6:9]), (names[4], captions[9:290]), (names[3], captions[290:292]),
            ([names[5], names[0], names[3]], captions[292]), ([names[2], names[5]], captions[293:296])]
    write_json("own.json", [{"video": video, "caption": texts} for video, texts in rows])
    return [(video, as_list(texts)) for video, texts in rows]


@pytest.mark.parametrize("k", [2, 4, 300])
def test_retrieval_equals_a_loop_over_pairs(checkpoint, sprites, k):
    rows = write_own_annotations(sprites)
    model, tokenizer = load(checkpoint)
    dataset = ClipDataset(read_annotations("own.json", f"{sprites}/videos"),
                          DataConfig(num_frames=4, image_size=16, frame_cache=False), train=False)
    protocol = evaluation.Protocol(max_text_length=24, rerank_topk=k, batch=2)
    results = evaluation.retrieval(model, dataset, tokenizer, protocol)
    expected = retrieval_by_hand(model, rows, f"{sprites}/videos", tokenizer, 24, k, num_frames=4)
    M = sum(len(texts) for _, texts in rows)
    assert M > 256 and results["videos"] == 6 and results["captions"] == M
    chance = results["scores"].pop("chance")
    assert results["scores"] == approx(expected)
    assert len({str(ways) for ways in expected.values()}) > 1               # the ways of scoring differ
    assert chance == {
        "T2V": {"R@1": pytest.approx(100 / 6), "R@5": pytest.approx(500 / 6), "R@10": 100, "median": 3.5, "mean": 3.5},
        "V2T": {"R@1": 100 / M, "R@5": 500 / M, "R@10": 1000 / M, "median": (M + 1) / 2, "mean": (M + 1) / 2}}


def test_a_task_equals_the_loop_and_is_written_as_returned(checkpoint, sprites, capsys):
    results = evaluation.main(sprites_config(checkpoint, sprites, rerank=5, batch=5))
    rows = [(row["video"], [row["caption"]]) for row in sprites_rows(sprites)]
    model, tokenizer = load(checkpoint)
    expected = retrieval_by_hand(model, rows, f"{sprites}/videos", tokenizer, 36, 5)
    assert load_json(f"{checkpoint}/eval-sprites-all-rerank=5.json") == results
    assert {name: results["scores"][name] for name in expected} == approx(expected)
    assert results["videos"] == results["captions"] == 12 and results["tokens"] == "all" and results["frames"] == 8
    printed = " ".join(capsys.readouterr().out.split())
    for ways in (*expected.values(), results["scores"]["chance"]):
        assert " ".join(f"{value:.1f}" for way in ("T2V", "V2T") for value in ways[way].values()) in printed
    assert not [name for name in os.listdir(checkpoint) if name.endswith(".tmp")]


def test_own_annotations_and_options(checkpoint, sprites):
    rows = write_own_annotations(sprites)
    own = dict(data="own.json", data_root=f"{sprites}/videos", rerank=0)
    results = evaluation.main(sprites_config(checkpoint, sprites, **own, frames=2, out="here.json"))
    model, tokenizer = load(checkpoint)
    expected = retrieval_by_hand(model, rows, f"{sprites}/videos", tokenizer, 24, 1, num_frames=2)
    assert set(results["scores"]) == {"similarity", "similarity, dual softmax", "chance"}
    assert results["frames"] == 2 and results["task"] == "own" and "not re-ranked" in results["protocol"]
    assert results["scores"]["similarity"] == approx(expected)["similarity"]
    assert load_json("here.json") == results
    results = evaluation.main(sprites_config(checkpoint, sprites, **own))
    assert os.path.exists(f"{checkpoint}/eval-own-all-rerank=0.json") and results["frames"] == 4     # as in training


@pytest.mark.parametrize("mask", ["", "cluster_stm"])
@pytest.mark.parametrize("task, length, seconds", [
    ("msvd", 64, 0), ("ssv2-label", 25, 0), ("ssv2-template", 25, 0), ("didemo", 64, 30), ("activitynet", 150, 0)])
def test_retrieval_on_published_files(models, benchmarks, tmp_path, monkeypatch, task, length, seconds, mask):
    monkeypatch.chdir(tmp_path)
    results, model, tokenizer, rows, folder, visible_ids = evaluate_task(models, benchmarks, task, mask=mask, rerank=2)
    is_paragraph = task in ("didemo", "activitynet")
    pairs = [(row["video"], [" ".join(row["caption"])] if is_paragraph else as_list(row["caption"])) for row in rows]
    expected = retrieval_by_hand(model, pairs, folder, tokenizer, length, 2, 4, visible_ids, seconds)
    assert {name: results["scores"][name] for name in expected} == approx(expected)


def test_an_equal_caption_of_another_row_is_no_negative(models, benchmarks_copy):
    """Two videos with the same caption tie in V2T; in T2V each caption has its own video, as published."""
    captions = "a dog", "A dog!", "a cat"
    write_json("twice.json", [{"video": v, "caption": c} for v, c in zip(NAMES[:3], captions, strict=True)])
    folder = f"{benchmarks_copy}/videos"
    results = evaluation.main(eval_config(models, benchmarks_copy, "msvd", data="twice.json", data_root=folder))
    recalls = [results["scores"][name]["V2T"]["R@1"] for name in ("similarity", "match, top 128")]
    correct = {"similarity": [], "match": []}
    with torch.no_grad():
        model, tokenizer = load(models["retrieval"])
        ids = encode_texts(tokenizer, ["a dog", "a dog", "a cat"], 24)
        states, text = model.encode_text(ids)
        for i, name in enumerate(NAMES[:3]):
            tokens, video = model.encode_video(load_clip(f"{folder}/{name}", results["frames"]))
            match = model.match(states, ids, tokens.expand(3, -1, -1))[:, 1]
            for method, scores in (("similarity", text @ video[0]), ("match", match)):
                prefers_dog = (scores[0] > scores[2]).item()
                correct[method].append(prefers_dog == (i < 2))
    assert recalls == [pytest.approx(100 * sum(values) / 3) for values in correct.values()]
    assert any(recalls)


# What breaks, the task, and what is named: the first video that is encoded, or the first caption or question.
V0, V5 = "'.*v0.mp4' must", "'.*v5.mp4' must"
BROKEN = [
    ("vit", "msvd", V5), ("vit", "msrvtt-mc", V0), ("vit", "msvd-qa", V0), ("vit", "msvd-caption", V0),
    ("vision_proj", "msvd", V5), ("vision_proj", "msrvtt-mc", V0),
    ("text_proj", "msvd", "caption 'FIRST'"), ("text_proj", "msrvtt-mc", "caption 'FIRST'"),
    ("itm_head", "msvd", "caption 'FIRST'"), ("itm_head", "msrvtt-mc", "caption 'FIRST'"),
    ("temp", "msvd", "caption 'FIRST'"), ("temp", "msrvtt-mc", "caption 'FIRST'"),
    ("text_decoder", "msvd-qa", "question '.*msvd_qa_test.json, row 0: "), ("text_decoder", "msvd-caption", V0),
]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("part, task, named", BROKEN, ids=lambda value: value.partition(" ")[0])
def test_a_model_that_is_not_finite_gets_no_score(models, benchmarks, tmp_path, monkeypatch, capsys, no_java, part,
                                                  task, named, wrong):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models[TASKS[task].kind], "broken")
    model = load_model("broken").float()
    broken = [p for name, p in model.named_parameters() if name.startswith(part)]
    with torch.no_grad():
        broken[-1].fill_(0 if part == "temp" and wrong == math.inf else wrong)     # then similarities become infinite
    save_weights(model, "broken")
    if "FIRST" in named:
        name = "msvd_ret_test" if task == "msvd" else "msrvtt_mc_test"
        first = load_json(f"{benchmarks}/anno_downstream/{name}.json")[0]["caption"][0]
        named = named.replace("FIRST", normalize_caption(first))
    args = ["--task", task, "--checkpoint", "broken", "--data-root", benchmarks, "--out", "no.json"]
    code, _, err = command("eval.py", args, capsys)
    assert_one_line("eval.py", code, err, f"{named}.*be finite, got (nan|-?inf)")
    assert not os.path.exists("no.json")


@pytest.mark.parametrize("task, frames", [("didemo", [3, 10, 18, 25]), ("activitynet", [5, 16, 27, 38])])
def test_only_the_first_seconds_of_a_task_are_seen(models, benchmarks_copy, monkeypatch, task, frames):
    """Of 45 frames in 45 seconds, each of another grey, the middles of four quarters: of 30 seconds, or of all."""
    grey = np.arange(10, 235, 5, dtype=np.uint8)
    os.makedirs("long")
    write_video("long/v.mp4", np.broadcast_to(grey[:, None, None, None], (45, 16, 16, 3)), fps=1, crf="0")
    write_json("own.json", [{"video": "v.mp4", "caption": ["a dog", "a cat"]}])
    monkeypatch.setattr(evaluation, "split_files", lambda *_: ("own.json", "long"))
    calls = record_encode_video(monkeypatch)
    evaluation.main(eval_config(models, benchmarks_copy, task))
    levels = calls[0][0].double().mean((2, 3, 4))                           # (1, 4)
    assert (levels / 5 - 2).round().long().tolist() == [frames]


@pytest.mark.parametrize("rate", [12, 15, 24000 / 1001, 25, 30000 / 1001, 30, 50, 60000 / 1001])
def test_the_first_30_seconds_are_those_of_umt(rate):
    """UMT: vlen = int(30 * fps) if the video is longer (multi_modality/dataset/video_utils.py, read_frames_decord)."""
    for n in range(int(28 * rate), int(33 * rate)):
        umt = int(30 * rate) if n / rate > 30 else n
        assert num_frames_within(np.arange(n) / rate, 30) == umt, n


# ---------------------------------------------------------------------------------------------------------------------
# Intervals, saved scores, one's own data

def names_in(array):
    return json.loads(array.tobytes())


def test_each_score_of_retrieval_has_its_interval(checkpoint, sprites, capsys):
    results = evaluation.main(sprites_config(checkpoint, sprites, rerank=5))
    scores, intervals = results["scores"], results["intervals"]
    assert intervals.keys() == scores.keys() - {"chance"} and intervals == load_json(
        f"{checkpoint}/eval-sprites-all-rerank=5.json")["intervals"]
    printed = " ".join(capsys.readouterr().out.split())
    for name, ways in intervals.items():
        for way, by_metric in ways.items():
            assert by_metric.keys() == scores[name][way].keys()
            assert all(low <= scores[name][way][metric] <= high for metric, (low, high) in by_metric.items())
        assert "95 % interval " + " ".join(
            f"{low:.1f}-{high:.1f}" for way in ("T2V", "V2T") for low, high in ways[way].values()) in printed
    assert any(low < high for ways in intervals.values() for low, high in ways["T2V"].values())


@pytest.mark.parametrize("k", [0, 3])
def test_saved_scores_give_the_results_again(checkpoint, sprites, k):
    rows = write_own_annotations(sprites)
    cfg = dict(data="own.json", data_root=f"{sprites}/videos", rerank=k, out="found.json")
    expected = evaluation.main(sprites_config(checkpoint, sprites, **cfg))
    assert not os.path.exists("found-scores.npz")
    results = evaluation.main(sprites_config(checkpoint, sprites, **cfg, save_scores=True))
    assert {**results, "config": 0} == {**expected, "config": 0} and results["config"].pop("save_scores")
    with np.load("found-scores.npz") as f:
        arrays = dict(f)
    videos = [os.path.relpath(path, f"{sprites}/videos") for path in names_in(arrays.pop("videos"))]
    texts = [(caption, as_list(names)) for names, captions in rows for caption in captions]
    assert sorted(videos) == sorted({name for names, _ in rows for name in as_list(names)})
    assert names_in(arrays.pop("captions")) == [normalize_caption(caption) for caption, _ in texts]
    similarity, positives = arrays.pop("similarity"), arrays.pop("positives")
    model, tokenizer = load(checkpoint)
    with torch.no_grad():
        for m, v in ((0, 0), (7, 3), (len(texts) - 1, 5)):
            clip = load_clip(f"{sprites}/videos/{videos[v]}", 4)
            text = model.encode_text(encode_texts(tokenizer, [normalize_caption(texts[m][0])], 24))[1]
            assert similarity[m, v] == pytest.approx((text[0] @ model.encode_video(clip)[1][0]).item(), abs=1e-5)
    assert positives.tolist() == [[name in names for name in videos] for _, names in texts]
    if k:
        match = arrays.pop("match")
        top = similarity.argsort(1)[:, -k:], similarity.argsort(0)[-k:]
        for m, v in np.ndindex(*match.shape):
            assert np.isfinite(match[m, v]) == (v in top[0][m] or m in top[1][:, v])
    assert arrays.keys() == {f"rank, {way}, {name}" for name in results["scores"].keys() - {"chance"}
                             for way in ("T2V", "V2T")}
    assert arrays["rank, T2V, similarity"].tolist() == list(map(rank_by_hand, similarity.tolist(), positives.tolist()))
    for name in results["scores"].keys() - {"chance"}:
        for way in ("T2V", "V2T"):
            rank = arrays[f"rank, {way}, {name}"]
            assert len(rank) == (len(texts) if way == "T2V" else len(videos))
            assert results["scores"][name][way]["R@5"] == pytest.approx(100 * np.mean(rank <= 5))
            assert results["scores"][name][way]["mean"] == pytest.approx(rank.mean())


def test_scores_are_saved_for_retrieval_and_multiple_choice_only(checkpoint, sprites, capsys):
    args = ["--task", "sprites-qa", "--checkpoint", checkpoint, "--data-root", sprites, "--save-scores"]
    code, _, err = command("eval.py", args, capsys)
    assert_one_line("eval.py", code, err, "--save-scores .*retrieval.*sprites-qa.*JSON file")


@pytest.mark.parametrize("flags", ["--task", "--task list", "--task=list", "--task --seed 3", "--seed 3 --task"])
def test_the_tasks_are_listed_a_line_each(flags, capsys):
    code, out, err = command("eval.py", flags.split(), capsys)
    lines = out.splitlines()
    assert not code and not err and [line.split()[0] for line in lines] == list(TASKS)
    assert "multiple choice" in lines[list(TASKS).index("msrvtt-mc")] and "msrvtt_mc_test.json" in out


def test_a_task_with_a_value_is_no_list(capsys):
    code, out, err = command("eval.py", ["--task", "msvd-q", "--checkpoint", "nowhere"], capsys)
    assert_one_line("eval.py", code, err, "msvd-q")
    assert not out


def test_scoring_the_embedded_set_after_training_on_other_captions_is_said(checkpoint, sprites):
    results = evaluation.main(sprites_config(checkpoint, sprites, rerank=0))
    assert not results["notes"]
    config = load_json(f"{checkpoint}/config.json")
    config["data"]["train_file"] = "somewhere/captions.json"
    write_json(f"{checkpoint}/config.json", config)
    note, = evaluation.main(sprites_config(checkpoint, sprites, rerank=0))["notes"]
    assert "trained on somewhere/captions.json" in note and "--data " in note
    write_own_annotations(sprites)
    own = dict(data="own.json", data_root=f"{sprites}/videos", rerank=0)
    assert not evaluation.main(sprites_config(checkpoint, sprites, **own))["notes"]


@pytest.mark.parametrize("data, expected", [
    ({}, "python eval.py --checkpoint out/x"),
    ({"train_file": "data/sprites-seed1/sprites_train.json", "video_root": "data/sprites-seed1/videos"},
     "python eval.py --checkpoint out/x --data-root data/sprites-seed1"),
    ({"train_file": "my captions.json", "video_root": "my videos"},
     "python eval.py --checkpoint out/x --data HELD_OUT.json --data-root 'my videos'"),
    ({"train_file": "a.json", "video_root": "v", "val_file": "b.json"},
     "python eval.py --checkpoint out/x --data b.json --data-root v"),
    ({"train_file": "a.json", "video_root": "v", "val_file": "b.json", "val_root": "w"},
     "python eval.py --checkpoint out/x --data b.json --data-root w"),
    ({"train_file": "web/{00..07}.tar", "val_file": "held out/00.tar"},
     "python eval.py --checkpoint out/x --data 'held out/00.tar'"),
    ({"train_file": "web/{00..07}.tar"}, "python eval.py --checkpoint out/x --data HELD_OUT.tar"),
])
def test_the_next_command_scores_the_data_of_the_run(data, expected):
    assert next_command(TrainConfig(data=DataConfig(**data)), "out/x") == expected
    tyro.cli(evaluation.Config, args=shlex.split(expected)[2:])             # eval.py takes it


@pytest.mark.parametrize("path, name", [
    ("data/sprites/sprites_train.json", "sprites"), ("a b.jsonl", "a b"), ("/0.tar", "0"), ("{0..9}.tar", "web-0..9"),
    ("x/cc3m/{000..331}.tar", "cc3m-000..331"), ("x/{a,b}/{0..9}.tar", "a-b-0..9"), ("t_train/7.tar", "t_train-7")])
def test_a_run_is_named_after_its_data(tmp_path, monkeypatch, path, name):
    os.makedirs(tmp_path / "web")
    monkeypatch.chdir(tmp_path / "web")
    assert name_run(path) == name



# ---------------------------------------------------------------------------------------------------------------------
# Masks

def record_encode_video(monkeypatch):
    """The arguments (video, visible_ids, token_size, patch_embeds), or (video,), of each call of encode_video."""
    calls, encode_video = [], ClusterSTM.encode_video

    def recorded(self, *args):
        calls.append(args)
        return encode_video(self, *args)

    monkeypatch.setattr(ClusterSTM, "encode_video", recorded)
    return calls


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_masked_scores_are_those_of_the_selected_tokens(checkpoint, sprites, ratio):
    cfg = sprites_config(checkpoint, sprites, rerank=5, batch=5, mask="cluster_stm", mask_ratio=ratio)
    results, keep = evaluation.main(cfg), keep_count(16, ratio or 0.75)
    model, tokenizer = load(checkpoint)
    rows, config = sprites_rows(sprites), load_json(f"{checkpoint}/config.json")
    visible_ids = visible_ids_by_name(config, tokenizer, f"{sprites}/videos", 8, ratio or 0.75)
    assert visible_ids(rows[0]["video"]).shape == (1, 8 * keep)
    pairs = [(row["video"], [row["caption"]]) for row in rows]
    expected = retrieval_by_hand(model, pairs, f"{sprites}/videos", tokenizer, 36, 5, visible_ids=visible_ids)
    assert {name: results["scores"][name] for name in expected} == approx(expected)
    assert results["tokens"] == f"cluster_stm, {keep} of 16 a frame"
    settings = "-mask_ratio=0.5-rerank=5" if ratio else "-rerank=5"
    assert load_json(f"{checkpoint}/eval-sprites-cluster_stm{settings}.json") == results


@pytest.mark.parametrize("mask", ["cluster_stm", "random", "tube", "block3d", "umt", "umt_global", "attention_high",
                                  "flux_group_dynamic", "kmeans"])
def test_a_mask_is_a_function_of_the_seed(checkpoint, sprites, monkeypatch, mask):
    calls = record_encode_video(monkeypatch)
    cfg = dict(batch=6, rerank=3, mask=mask, out="x.json")
    run = lambda seed: evaluation.main(sprites_config(checkpoint, sprites, seed=seed, **cfg))
    assert run(0) == run(0) and len(calls) == 4
    run(1)
    ids, is_random = [args[1] for args in calls], "generator" in MASK_INPUTS[mask]
    assert torch.equal(ids[0], ids[2]) and torch.equal(ids[1], ids[3]) and ids[0].shape == (6, 8 * 4)
    assert torch.equal(ids[4], ids[0]) == (not is_random)
    assert not is_random or not torch.equal(ids[0], ids[1])                 # each batch draws its own


@pytest.mark.parametrize("proportional", [False, True])
def test_token_sizes_are_used_if_the_model_is_proportional(checkpoint, sprites, monkeypatch, proportional):
    config = load_json(f"{checkpoint}/config.json")
    config["model"]["proportional"] = proportional
    write_json(f"{checkpoint}/config.json", config)
    calls = record_encode_video(monkeypatch)
    for mask in ("cluster_stm", ""):
        evaluation.main(sprites_config(checkpoint, sprites, batch=5, rerank=0, mask=mask, out="x.json"))
    teacher, mask = SigLIP.from_pretrained(config["teacher"]), MaskConfig(**config["mask"])
    for video, visible_ids, token_size, patch_embeds in calls[:3]:
        targets = compute_visible_ids(teacher, video, mask, mask.ratio, 0, (4, 4), True)
        assert torch.equal(visible_ids, targets.visible_ids) and targets.token_size.max() > 1
        assert torch.equal(token_size, targets.token_size) if proportional else token_size is None
        assert patch_embeds is None
    assert [args[1:] for args in calls[3:]] == [()] * 3


@pytest.mark.parametrize("mask, needed", [("adamae", "logits"), ("text_guided", "aligned")])
def test_a_mask_that_needs_more_than_the_video_is_refused(checkpoint, sprites, mask, needed):
    with pytest.raises(ValueError, match=f"{mask} needs {needed} "):
        evaluation.main(sprites_config(checkpoint, sprites, mask=mask, out="x.json"))
    assert mask not in evaluation.MASK_HELP and mask in MASKS


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def test_two_processes_give_the_results_of_one(models, damaged_benchmarks, benchmarks, no_java):
    """Also if videos are unreadable, and if there is a video for only one of the processes."""
    question = {"video": NAMES[0], "question": "what", "answer": "dog", "caption": ["a dog"]}
    write_json("one.json", [question])
    write_json("one-choice.json", [{"video": NAMES[0], "caption": ["a dog", "a cat"], "answer": 1}])
    tasks = ("msvd", "ssv2-label", "msrvtt-mc", "sprites-qa", "msvd-caption")
    configs = [eval_config(models, root, task, batch=2, rerank=3, beams=2, on_missing="skip", out=f"{name}-{task}.json")
               for name, root in (("intact", benchmarks), ("damaged", damaged_benchmarks)) for task in tasks]
    configs += [eval_config(models, f"{benchmarks}/videos", task, out=f"single-{task}.json",
                            data="one-choice.json" if task == "msrvtt-mc" else "one.json",
                            answers=f"{benchmarks}/anno_downstream/msvd_qa_answer_list.json") for task in tasks]
    configs.append(eval_config(models, benchmarks, "msvd", mask="cluster_stm", batch=3, out="masked-msvd.json"))
    alone = {cfg.out: evaluation.main(cfg) for cfg in configs}
    for cfg in configs:
        os.remove(cfg.out)
    in_processes(2, lambda: [evaluation.main(cfg) for cfg in configs])
    for cfg in configs:
        one, two = alone[cfg.out], load_json(cfg.out)
        assert one["scores"].keys() == two["scores"].keys(), cfg.out
        for name, scores in one["scores"].items():
            for metric, value in scores.items():
                assert two["scores"][name][metric] == pytest.approx(value, rel=1e-6), (cfg.out, name, metric)
        assert {k: v for k, v in one.items() if k != "scores"} == {k: v for k, v in two.items() if k != "scores"}
        assert len(one["unreadable"]) == (2 if cfg.out.startswith("damaged") else 0), cfg.out


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def test_the_command_evaluates_and_names_its_file(checkpoint, sprites, capsys):
    folder = f"{checkpoint}/before_unmasked"
    code, out, _ = command("eval.py", ["--checkpoint", folder, "--data-root", sprites], capsys)
    assert code == 0 and f"{folder}/eval-sprites-all.json" in out and os.path.exists(f"{folder}/eval-sprites-all.json")


def test_results_of_other_settings_have_other_files(checkpoint, sprites):
    base = dict(rerank=0, mask="random")
    settings = [{}, dict(split="val"), dict(mask=""), dict(mask="tube"), dict(mask_ratio=0.5), dict(mask_ratio=0.25),
                dict(frames=2), dict(frames=4), dict(seed=1), dict(seed=2, frames=2), dict(rerank=3), dict(rerank=-1)]
    results = [evaluation.main(sprites_config(checkpoint, sprites, **{**base, **changes})) for changes in settings]
    files = [name for name in os.listdir(checkpoint) if name.startswith("eval-")]
    assert len(files) == len(settings)
    stored = {json.dumps(load_json(f"{checkpoint}/{name}"), sort_keys=True) for name in files}
    assert stored == {json.dumps(result, sort_keys=True) for result in results}


def test_the_teacher_beside_a_moved_checkpoint_is_found(checkpoint, sprites):
    """Also if the place from which it was moved has another run by now."""
    run = lambda folder: evaluation.main(sprites_config(folder, sprites, rerank=0, mask="cluster_stm", out="x.json"))
    expected = {part: run(f"{checkpoint}{part}")["scores"] for part in ("", "/before_unmasked")}
    shutil.copytree(checkpoint, "out/tuned", ignore=lambda *_: ["teacher", "before_unmasked"])      # fine-tuned from it
    os.makedirs("kept/models")
    for name in ("first", "tuned"):
        shutil.move(f"out/{name}", f"kept/models/{name}")
    moved = "kept/models/first"
    for place in ("empty", "another run"):
        if place == "another run":
            shutil.copytree(moved, "out/first")
            save_weights(shaken(SigLIP.from_pretrained("out/first/teacher"), 5).float(), "out/first/teacher")
            assert run("out/first")["scores"] != expected[""]
        for part, scores in expected.items():
            assert run(f"{moved}{part}")["scores"] == scores, place
        assert run("kept/models/tuned")["scores"] == expected[""], place
    shutil.rmtree("out/first")
    shutil.rmtree("kept/models/first/teacher")
    with pytest.raises(FileNotFoundError, match="out/first/teacher"):
        run(moved)


def test_help_shows_the_command_and_lists_tasks_and_masks(capsys):
    code, out, _ = command("eval.py", ["--help"], capsys)
    words = out.replace(",", " ").split()
    assert code == 0 and out.startswith("usage: python eval.py ") and "--data-root" in words
    assert set(TASKS) <= set(words) and {"cluster_stm", "random", "umt"} <= set(words)


@pytest.mark.parametrize("flags, message", [
    ("--task sprite", "msrvtt, .*'sprite'.*'sprites'"),
    ("--task zzz", "msrvtt, .*'zzz'"),
    ("--data own.json", "--data-root .*own.json"),
    ("--data nowhere.json --data-root .", "nowhere.json"),
    ("--data bad.json --data-root .", "bad.json.*JSON"),
    ("--data-root nowhere", "--data-root .*nowhere"),
    ("--data-root .", "anno_downstream/sprites_test.json"),
    ("--data-root SPRITES --checkpoint nowhere", "nowhere.*config.json"),
    ("--data-root SPRITES --checkpoint untokenized", "untokenized/tokenizer.json"),
    ("--data-root SPRITES --checkpoint out/first/teacher", "teacher/config.json"),
    ("--data-root SPRITES --mask clusters", "mask must be .*cluster_stm.*'clusters'"),
    ("--data-root SPRITES --mask cluster_stm --mask-ratio 1", "ratio .*1"),
    ("--data-root SPRITES --mask-ratio 0.5", "--mask .*--mask-ratio"),
    ("--data-root SPRITES --mask-ratio 0", "--mask .*--mask-ratio"),
    ("--data-root SPRITES --teacher out/first/teacher", "--mask .*--teacher"),
    ("--data own.json --data-root . --split val", "--split .*--data.*val"),
    ("--data-root SPRITES --mask cluster_stm --teacher nowhere", "nowhere .*SigLIP"),
    ("--data-root SPRITES --frames -1", "frames .*-1"),
    ("--data-root SPRITES --batch 0", "batch .*1.*0"),
    ("--data-root SPRITES --beams 0", "beams .*1.*0"),
    ("--data-root SPRITES --workers -2", "workers .*-1.*-2"),
    ("--data-root SPRITES --split train", "test.*val"),
    ("--data-root SPRITES --device tpu", "auto.*cpu.*cuda"),
    ("--data short.json --data-root SPRITES/videos", "row 1: .*absent.mp4"),
])
def test_a_wrong_input_is_refused_in_one_line(checkpoint, sprites, capsys, flags, message):
    shutil.copytree(checkpoint, "untokenized", ignore=lambda *_: ["tokenizer.json"])
    with open("bad.json", "w") as f:
        f.write("[{")
    write_json("short.json", [sprites_rows(sprites)[0], {"video": "absent.mp4", "caption": "a"}])
    flags = flags if "--checkpoint" in flags else f"{flags} --checkpoint {checkpoint}"
    code, _, err = command("eval.py", flags.replace("SPRITES", sprites).split(), capsys)
    assert_one_line("eval.py", code, err, message)
    assert not [name for name in os.listdir(checkpoint) if name.startswith("eval-")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(checkpoint, sprites, capsys):
    args = ["--checkpoint", checkpoint, "--data-root", sprites, "--device", "cuda"]
    code, _, err = command("eval.py", args, capsys)
    assert_one_line("eval.py", code, err, "device .*'cuda'")


def test_a_checkpoint_needs_no_training_data(checkpoint, sprites):
    results = evaluation.main(sprites_config(checkpoint, sprites, rerank=0))
    config = load_json(f"{checkpoint}/config.json")
    config["data"].update(train_file="/not/on/this/machine/sprites_train.json", video_root="/not/on/this/machine")
    write_json(f"{checkpoint}/config.json", config)
    assert evaluation.main(sprites_config(checkpoint, sprites, rerank=0)) == results


# ---------------------------------------------------------------------------------------------------------------------
# Hostile names, full disks, Ctrl-C

HOSTILE, ESCAPED = "\x1b[31m\r\n\u202e", r"\x1b[31m\r\n\u202e"


@pytest.mark.parametrize("workers", [0, 1])
def test_hostile_file_names_are_read_and_printed_escaped(checkpoint, sprites, capsys, workers):
    """Those of videos, one of which is absent and one damaged, of their folder, the checkpoint and the annotations."""
    names = [f"a{HOSTILE}.mp4", "b\udcff.mp4", f"c{HOSTILE}\udcff.mp4", "d\udcfe.mp4"]
    folder, own = f"videos{HOSTILE}\udcfd", f"own{HOSTILE}"
    os.mkdir(folder)
    for name, row in zip(names[:2], sprites_rows(sprites), strict=False):
        shutil.copy(f"{sprites}/videos/{row['video']}", f"{folder}/{name}")
    with open(f"{folder}/{names[3]}", "wb") as f:
        f.write(b"no video")
    with open(f"{own}.jsonl", "w") as f:
        f.writelines(json.dumps({"video": name, "caption": f"a {i}"}) + "\n" for i, name in enumerate(names))
    os.rename(checkpoint, f"out/first{HOSTILE}")
    args = ["--checkpoint", f"out/first{HOSTILE}", "--data", f"{own}.jsonl", "--data-root", folder, "--rerank", "0",
            "--workers", str(workers), "--device", "cpu"]
    code, out, err = command("eval.py", [*args, "--on-missing", "skip"], capsys)
    assert code == 0 and not any(c in out + err for c in "\x1b\u202e\udcff\udcfe\udcfd") and "\r" not in out, err
    assert f"checkpoint: out/first{ESCAPED}" in out and "SCORED WITHOUT 2 OF 4 VIDEOS" in out
    assert rf"no file videos{ESCAPED}\udcfd/c{ESCAPED}\udcff.mp4" in out
    with open(f"out/first{HOSTILE}/eval-{own}-all-rerank=0.json", encoding="utf-8") as f:
        results = json.load(f)
    assert results["videos"] == 2 and "d\udcfe.mp4" in results["unreadable"][1]
    os.remove(f"{folder}/{names[3]}")
    code, out, err = command("eval.py", args, capsys)
    missing = rf"own{ESCAPED}.jsonl, row 2: there is no file videos{ESCAPED}\udcfd"
    assert_one_line("eval.py", code, err, re.escape(missing))


def test_results_that_cannot_be_written_are_named(checkpoint, sprites, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    args = ["--checkpoint", checkpoint, "--data-root", sprites, "--rerank", "0", "--device", "cpu", "--workers", "0"]
    before = sorted(os.listdir(checkpoint))
    code, out, err = command("eval.py", args, capsys)
    path = f"{checkpoint}/eval-sprites-all-rerank=0.json"
    assert_one_line("eval.py", code, err, f"{path} could not be written .No space left on device.$")
    assert "T2V R@1" in out and sorted(os.listdir(checkpoint)) == before    # the scores are not lost


def test_results_are_written_if_nobody_reads_what_is_printed(checkpoint, sprites, monkeypatch):
    class ClosedPipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(sys, "stdout", ClosedPipe())
        evaluation.main(sprites_config(checkpoint, sprites, rerank=0))
    assert load_json(f"{checkpoint}/eval-sprites-all-rerank=0.json")["videos"] == 12



def test_ctrl_c_ends_the_evaluation_without_a_traceback(checkpoint, sprites, monkeypatch):
    """A terminal sends it to the loader processes too."""
    calls, encode_video = [], ClusterSTM.encode_video

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 2:
            os.killpg(0, signal.SIGINT)
        return encode_video(self, *args)

    monkeypatch.setattr(ClusterSTM, "encode_video", interrupted)
    cfg = sprites_config(checkpoint, sprites, rerank=0, batch=1, workers=2, out="x.json")
    code, out, err = run_interrupted("eval.py", lambda: evaluation.main(cfg))
    assert code == 130 and not out and not os.path.exists("x.json")
    assert not re.sub(r"videos: .*?[\r\n]", "", err).strip(), err              # the progress bar


def test_loader_processes_ignore_ctrl_c(checkpoint, sprites, monkeypatch):
    """The main process answers it. It may do so later."""
    expected = evaluation.main(sprites_config(checkpoint, sprites, rerank=0, batch=5, out="x.json"))
    main_process, getitem = os.getpid(), ReadableClips.__getitem__

    def interrupted(self, i):
        if os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGINT)
        return getitem(self, i)

    monkeypatch.setattr(ReadableClips, "__getitem__", interrupted)
    results = evaluation.main(sprites_config(checkpoint, sprites, rerank=0, batch=5, workers=2, out="x.json"))
    assert results["scores"] == expected["scores"]


@pytest.mark.parametrize("error, printed", [(BrokenPipeError, False), (ConnectionResetError, False), (EOFError, False),
                                            (KeyError, True), (OSError, True)])
def test_a_loader_process_prints_its_own_errors_only(tmp_path, monkeypatch, error, printed):
    def main():
        init_loader_worker(0)
        try:
            raise error("x")
        except Exception:
            sys.excepthook(*sys.exc_info())                                 # as a thread of multiprocessing does

    monkeypatch.chdir(tmp_path)
    code, _, err = run_interrupted("eval.py", main)
    assert code == 0 and (f"{error.__name__}: x" in err or f"{error.__name__}: 'x'" in err) == printed == bool(err)
