"""eval.py on every benchmark of tasks.TASKS: the whole result, unreadable videos, baselines, notes."""

import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.benchmarks import NAMES, as_list, assert_refused, eval_config, load_json, write_json

import eval as evaluation
import metrics
from tasks import TASK_KINDS, TASKS, find_media

METHODS = {
    "retrieval": ["similarity", "similarity, dual softmax", "match, top {k}", "chance"],
    "choice": ["0.7 match + 0.3 similarity", "match", "similarity", "chance"],
    "qa": ["ranking, top 8", "generation", "most frequent answer to that kind"],
    "caption": ["greedy", "beam 3", "most frequent caption"],
}


def count_rows(task, rows) -> dict[str, int]:
    """The videos and the captions or questions of a file, counted independently of its reader."""
    kind, paragraph = TASKS[task].kind, task in ("didemo", "activitynet")
    videos = {name for row in rows for name in as_list(row.get("video", row.get("image")))}
    captions = sum(1 if paragraph else len(as_list(row["caption"])) for row in rows if "caption" in row)
    return {"videos": len(videos)} | ({"questions": len(rows)} if kind in ("qa", "choice") else {"captions": captions})


@pytest.mark.parametrize("name", TASKS)
def test_every_benchmark_is_evaluated(models, benchmarks, no_java, tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    result, task = evaluation.main(eval_config(models, benchmarks, name)), TASKS[name]
    path = f"{benchmarks}/anno_downstream/{task.test_file.split('|')[0]}.json"
    rows = load_json(path)
    assert result["annotations"] == path
    assert {k: result[k] for k in ("videos", "captions", "questions") if k in result} == count_rows(name, rows)
    assert list(result["scores"]) == [method.format(k=task.rerank_topk) for method in METHODS[task.kind]]
    assert result == load_json("result.json") and result["kind"] == task.kind and result["split"] == "test split"
    assert result["frames"] == (6 if task.kind in ("qa", "caption") else 8 if "sprites" in name else 4)
    count, unit = (6, "videos") if task.kind == "caption" else (len(rows), "rows")
    if task.test_rows:
        assert re.search(f"{path} has {count} {unit}.* {task.test_rows}", result["notes"].pop())
    assert result["notes"] == [] and result["unreadable"] == []
    protocol = " ".join(result["protocol"])
    assert (f" {task.max_text_length} tokens" in protocol) == (task.kind != "caption")
    assert ("the first 30 seconds" in protocol) == (name == "didemo")
    assert ("paragraph" in protocol) == (name in ("didemo", "activitynet"))
    values = [x for scores in result["scores"].values() for value in scores.values()
              for x in (value.values() if isinstance(value, dict) else [value])]
    assert all(np.isfinite(x) and x >= 0 for x in values)
    if task.kind == "retrieval":
        metrics = {"R@1", "R@5", "R@10", "median", "mean"}
        assert all(set(ways) == {"T2V", "V2T"} and set(ways["T2V"]) == metrics for ways in result["scores"].values())
    if task.kind == "qa":
        types = {"activitynet-qa": "0 1 2 3", "sprites-qa": "colour count unheard"}.get(name, "").split()
        assert all(list(accuracy) == ["all", *types] for accuracy in result["scores"].values())
        assert list(result["question_types"]) == types
        assert sum(result["question_types"].values()) == (len(rows) if types else 0)
    out = capsys.readouterr().out
    report = out[out.index(f"{name}: {TASK_KINDS[task.kind]}, test split: {result['videos']} videos, "):]
    assert all(any(line.startswith(method) for line in report.splitlines()) for method in result["scores"])
    assert ("  note: " in report) == bool(task.test_rows) and "result.json" in report


def test_a_finetuned_model_gets_as_many_frames_as_in_finetuning(models, benchmarks, tmp_path):
    out = str(tmp_path / "result.json")
    result = evaluation.main(eval_config(models, benchmarks, "msvd", checkpoint=models["finetuned"], out=out))
    assert result["frames"] == 7 and result["chosen"] == "epoch 3 of 4, chosen on the val split: finetuned"
    result = evaluation.main(eval_config(models, benchmarks, "msvd", frames=3, out=out))
    assert result["frames"] == 3 and result["chosen"] == ""


def test_another_answer_list_can_be_given(models, benchmarks_copy):
    os.remove(f"{benchmarks_copy}/anno_downstream/msvd_qa_answer_list.json")
    write_json("answers.json", ["dog", "cat"])
    result = evaluation.main(eval_config(models, benchmarks_copy, "msvd-qa", answers="answers.json"))
    assert result["answers"] == 2 and list(result["scores"])[0] == "ranking, top 2"


@pytest.mark.parametrize("task, checkpoint", [
    ("msvd-qa", "retrieval"), ("msvd-qa", "caption"), ("msvd-caption", "retrieval"), ("msvd-caption", "qa"),
    ("msvd", "qa"), ("msvd", "caption"), ("msrvtt-mc", "qa"),
])
def test_a_model_for_another_kind_of_task_is_refused(models, benchmarks, tmp_path, monkeypatch, capsys, task,
                                                     checkpoint):
    monkeypatch.chdir(tmp_path)
    kind, folder = TASKS[task].kind, models[checkpoint]
    match = f"{folder}.*{TASK_KINDS[kind]}.*{TASK_KINDS[checkpoint]}"
    assert_refused({kind: folder}, benchmarks, task, capsys, match)


def test_a_mask_needs_a_teacher(models, benchmarks, tmp_path, monkeypatch, capsys):
    """A model that tools/convert.py wrote has none."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["retrieval"], "converted")
    write_json("converted/config.json", load_json("converted/config.json") | {"teacher": ""})
    converted = {"retrieval": "converted"}
    assert_refused(converted, benchmarks, "msvd", capsys, "--teacher.*--mask umt.*converted", "--mask", "umt")
    evaluation.main(eval_config(converted, benchmarks, "msvd", mask="umt", teacher=models["teacher"]))
    evaluation.main(eval_config(converted, benchmarks, "msvd", mask="tube"))        # draws without a teacher


# ---------------------------------------------------------------------------------------------------------------------
# Videos that cannot be read

DAMAGED = ["msvd", "ssv2-label", "msrvtt-mc", "sprites-qa", "msvd-caption"]
REASONS = {"v1.mp4": "no file .*v1.mp4", "v2.mp4": ".*v2.mp4: Invalid data"}


def without(rows, names):
    """The rows of a file without these videos."""
    left = []
    for row in rows:
        videos = [v for v in as_list(row["video"]) if v not in names]
        left += [row | {"video": videos if isinstance(row["video"], list) else videos[0]}] if videos else []
    return left


def without_row(predictions):
    return [{key: value for key, value in prediction.items() if key != "row"} for prediction in predictions]


@pytest.mark.parametrize("names", [("v1.mp4",), ("v2.mp4",), ("v1.mp4", "v2.mp4")], ids="-".join)
@pytest.mark.parametrize("task", DAMAGED)
def test_skipped_videos_are_reported_and_the_others_evaluated(models, damaged_benchmarks, no_java, capsys, task, names):
    root = damaged_benchmarks
    file = f"anno_downstream/{TASKS[task].test_file}.json"
    rows = without(load_json(f"{root}/{file}"), {"v1.mp4", "v2.mp4"} - set(names))
    write_json(f"{root}/{file}", without(rows, names))
    expected = evaluation.main(eval_config(models, root, task))
    assert expected["unreadable"] == []
    write_json(f"{root}/{file}", rows)
    assert_refused(models, root, task, capsys, f"{file}, row .: .*{REASONS[names[0]]}")
    result = evaluation.main(eval_config(models, root, task, on_missing="skip"))
    for key in ("scores", "videos", "captions", "questions", "question_types"):
        assert result.get(key) == expected.get(key), key
    assert without_row(result.get("predictions", [])) == without_row(expected.get("predictions", []))
    for name in names:                                                      # each video is named once
        sources = "|".join(str(i) for i, row in enumerate(rows) if name in as_list(row["video"]))
        line, = (line for line in result["unreadable"] if name in line)
        assert re.search(f"{file}, row ({sources}): .*{REASONS[name]}", line)
    assert len(result["unreadable"]) == len(names)
    note, = (note for note in result["notes"] if note.startswith("SCORED WITHOUT "))
    videos = len({v for row in rows for v in as_list(row["video"])})
    assert note.startswith(f"SCORED WITHOUT {len(names)} OF {videos} VIDEOS")
    assert f"  note: {note}" in capsys.readouterr().out and load_json("result.json") == result


@pytest.mark.parametrize("task", DAMAGED)
def test_nothing_is_evaluated_if_no_video_can_be_read(models, damaged_benchmarks, no_java, capsys, task):
    path = f"{damaged_benchmarks}/anno_downstream/{TASKS[task].test_file}.json"
    rows = load_json(path)
    for name, match in (("v1.mp4", "v1.mp4"), ("v2.mp4", "none of 1 videos")):
        write_json(path, without(rows, set(NAMES) - {name}))
        assert_refused(models, damaged_benchmarks, task, capsys, match, "--on-missing", "skip")


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are not in the list, baselines, numbers of rows

def test_answers_not_in_the_list_are_counted_and_noted(models, benchmarks_copy, capsys):
    folder = f"{benchmarks_copy}/anno_downstream"
    before = evaluation.main(eval_config(models, benchmarks_copy, "sprites-qa"))
    assert before["answers not in the list"] == []
    rows = load_json(f"{folder}/sprites_qa_test.json")
    for row in rows[:5]:
        row["answer"] = "an umbrella"
    rows[3]["answer"] = ["an umbrella", "dog"]                              # one of the two is in the list
    write_json(f"{folder}/sprites_qa_test.json", rows)
    write_json(f"{folder}/sprites_qa_train.json", [
        row | {"answer": "an umbrella"} for row in load_json(f"{folder}/sprites_qa_train.json")])
    result = evaluation.main(eval_config(models, benchmarks_copy, "sprites-qa"))
    assert result["questions"] == 12 and len(result["answers not in the list"]) == 4
    note, = result["notes"]
    assert note.startswith("4 of 12 questions") and f"  note: {note}" in capsys.readouterr().out
    assert result["scores"]["most frequent answer to that kind"]["all"] == pytest.approx(500 / 12)
    correct = sum(p["ranked"] in as_list(row["answer"]) for p, row in zip(result["predictions"], rows, strict=True))
    assert result["scores"]["ranking, top 8"]["all"] == pytest.approx(100 * correct / 12)


def test_the_most_frequent_answer_to_each_type_of_question(models, benchmarks_copy):
    training = [("colour", a) for a in ["dog"] * 3 + ["cat"] * 2] + [
        ("count", a) for a in ["yes"] * 2 + [["snow", "cat"]] * 3]
    test = [("colour", "pizza"), ("colour", "dog"), ("colour", ["cat", "pizza"]), ("count", "yes"), ("count", "snow"),
            ("unheard", "pizza"), ("unheard", "yes"), ("unheard", "pizza"), ("unheard", "cat")]
    make = lambda rows: [{"video": NAMES[i % 2], "question": "what", "answer": answer, "type": question_type}
                         for i, (question_type, answer) in enumerate(rows)]
    absent = {"video": "not/here.mp4", "question": "what", "answer": "pizza", "type": "colour"}
    write_json(f"{benchmarks_copy}/anno_downstream/sprites_qa_train.json", make(training) + 4 * [absent])
    write_json(f"{benchmarks_copy}/anno_downstream/sprites_qa_test.json", make(test))
    result = evaluation.main(eval_config(models, benchmarks_copy, "sprites-qa"))
    # colour: pizza; count: yes, 2 against 3/2 and 3/2; a type without training questions: pizza, the most frequent of
    # all. Questions about a training video that does not exist count too.
    assert result["scores"]["most frequent answer to that kind"] == pytest.approx(
        {"all": 100 * 5 / 9, "colour": 200 / 3, "count": 50.0, "unheard": 50.0})


def test_the_most_frequent_caption(models, benchmarks_copy, no_java):
    folder = f"{benchmarks_copy}/anno_downstream"
    texts = ["A dog runs!", "a dog runs", "A dog, runs", "the cat sits on the mat", "the cat sits on the mat"]
    write_json(f"{folder}/msvd_cap_train.json", [{"video": NAMES[0], "caption": texts[:2]},
                                                 {"video": NAMES[1], "caption": texts[2:]}])
    rows = [row | {"caption": [*row["caption"], "A dog runs fast."] * 2}
            for row in load_json(f"{folder}/msvd_cap_test.json")]
    write_json(f"{folder}/msvd_cap_test.json", rows)
    result = evaluation.main(eval_config(models, benchmarks_copy, "msvd-caption", beams=1))
    expected = metrics.caption_scores({row["video"]: row["caption"] for row in rows},
                                      {row["video"]: "a dog runs" for row in rows})
    assert list(result["scores"]) == ["greedy", "most frequent caption"]
    assert result["scores"]["most frequent caption"] == pytest.approx(expected) and max(expected.values()) > 1


@pytest.mark.parametrize("task, file", [("msvd-qa", "msvd_qa_train"), ("msvd-caption", "msvd_cap_train")])
def test_a_missing_baseline_is_noted(models, benchmarks_copy, no_java, task, file):
    os.remove(f"{benchmarks_copy}/anno_downstream/{file}.json")
    result = evaluation.main(eval_config(models, benchmarks_copy, task))
    assert not any("frequent" in name for name in result["scores"])
    assert any(re.match(f"no baseline: .*anno_downstream/{file}.json", note) for note in result["notes"])


@pytest.mark.parametrize("task, file", [("msvd", "msvd_ret_test"), ("msrvtt-mc", "msrvtt_mc_test"),
                                        ("msvd-qa", "msvd_qa_test"), ("msvd-caption", "msvd_cap_test")])
def test_an_unpublished_number_of_rows_is_noted(models, benchmarks_copy, no_java, monkeypatch, task, file):
    root = benchmarks_copy
    rows = load_json(f"{root}/anno_downstream/{file}.json")
    count = 6 if task == "msvd-caption" else len(rows)
    notes = lambda **changes: [note for note in evaluation.main(eval_config(models, root, task, **changes))["notes"]
                               if "published" in note]
    for test_rows in (count, 0, count + 1):
        monkeypatch.setitem(TASKS, task, replace(TASKS[task], test_rows=test_rows))
        assert len(notes()) == (test_rows == count + 1)
    assert notes(data=f"{root}/anno_downstream/{file}.json", data_root=find_media(TASKS[task], root),
                 answers=f"{root}/anno_downstream/msvd_qa_answer_list.json") == []
    if TASKS[task].val_file:
        assert notes(split="val") == []
