"""The table of benchmarks, its readers on files of each published form, and what is refused."""

import json
import os
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest
from helpers.benchmarks import as_list, assert_refused, eval_config, load_json, write_json
from helpers.runs import assert_one_line, command

import eval as evaluation
from annotations import media_id
from tasks import TASK_KINDS, TASKS, find_file, find_media, get_task, read_answers, read_rows, split_files

TEST_ROWS = {           # task: rows of the published test split
    "msrvtt": 1000, "msrvtt-7k": 1000, "lsmdc": 1000, "msvd": 670, "ssv2-template": 174, "msrvtt-qa": 72821,
    "msvd-qa": 13157, "activitynet-qa": 8000, "msrvtt-mc": 2990, "msrvtt-caption": 2990, "msvd-caption": 670,
}
TEXT_LENGTHS = {        # task: tokens, as in UMT
    "msrvtt": 32, "msrvtt-7k": 32, "didemo": 64, "activitynet": 150, "lsmdc": 96, "msvd": 64, "ssv2-label": 25,
    "ssv2-template": 25, "msrvtt-qa": 25, "msvd-qa": 25, "activitynet-qa": 25, "msrvtt-mc": 32,
}


def test_the_table_is_complete_and_consistent():
    assert {task.kind for task in TASKS.values()} == set(TASK_KINDS) == set(evaluation.EVALUATORS)
    for name, task in TASKS.items():
        assert get_task(name) is task and task.test_rows == TEST_ROWS.get(name, 0), name
        assert (task.answer_list != "") == (task.kind == "qa"), name
        assert (task.max_answer_length > 1) == (task.kind in ("qa", "caption")), name
        assert task.max_text_length == TEXT_LENGTHS.get(name, task.max_text_length) >= 2, name
        for recipe in (task.recipe_base, task.recipe_large):
            assert 0 < recipe.lr < 1e-2 and 0 <= recipe.warmup < recipe.epochs and 0 <= recipe.drop_path < 1, name


@pytest.mark.parametrize("name", TASKS)
def test_training_and_validation_files_are_read(benchmarks, name):
    task = TASKS[name]
    for split in ("train", "val") if task.val_file else ("train",):
        path, root = split_files(task, split, benchmarks)
        rows = load_json(path)
        annotations = read_rows(task, path, root, train=split == "train")
        assert all(os.path.isfile(a.video) and a.captions and a.source.startswith(f"{path}, row ") for a in annotations)
        if task.kind == "qa":
            assert sum(len(a.questions) for a in annotations) == len(rows) and "answer" in rows[0]
        elif split == "train":
            assert all(len(a.captions) <= task.texts_per_clip for a in annotations)
            assert all(bool(a.questions) == (task.kind == "caption") for a in annotations)
            if not task.paragraph:
                captions = sum(len(as_list(row["caption"])) for row in rows)
                assert sum(len(a.captions) for a in annotations) == captions


# ---------------------------------------------------------------------------------------------------------------------
# Readers

@pytest.fixture
def read(benchmarks_copy):
    """read(task, rows, train=False) -> the annotations of a file rows.json with these rows."""
    def read(task, rows, train=False):
        write_json("rows.json", rows)
        task = TASKS[task] if isinstance(task, str) else task
        return read_rows(task, "rows.json", f"{benchmarks_copy}/videos", train)
    return read


def test_captions_and_paragraphs(read, benchmarks_copy):
    rows = [{"video": "v0.mp4", "caption": ["A Dog.", "  It's  GONE! "]},
            {"video": ["v1.mp4", "sub/v3.mp4"], "caption": "He's-in/out; alone"},
            {"image": "v2.mp4", "caption": "what?"}]
    videos = lambda annotations: [os.path.relpath(a.video, f"{benchmarks_copy}/videos") for a in annotations]
    annotations = read("msvd", rows)
    assert videos(annotations) == ["v0.mp4", "v1.mp4", "sub/v3.mp4", "v2.mp4"]
    assert [a.captions for a in annotations] == [["a dog", "its gone"], ["hes in out alone"], ["hes in out alone"],
                                                 ["what"]]
    assert [a.source for a in annotations] == [f"rows.json, row {i}" for i in (0, 1, 1, 2)]
    assert annotations[0].media_id == media_id(annotations[0].video) and len({a.media_id for a in annotations}) == 4
    annotations = read("msvd", rows, train=True)                            # one for each caption
    assert [(v, a.captions) for v, a in zip(videos(annotations), annotations, strict=True)] == [
        ("v0.mp4", ["a dog"]), ("v0.mp4", ["its gone"]), ("v1.mp4", ["hes in out alone"]),
        ("sub/v3.mp4", ["hes in out alone"]), ("v2.mp4", ["what"])]
    for train in (False, True):                                             # a text is not split into letters
        assert [a.captions for a in read("didemo", rows, train)] == [
            ["a dog its gone"], ["hes in out alone"], ["hes in out alone"], ["what"]]


def test_questions_and_the_weights_of_their_answers(read):
    rows = [{"video": "v0.mp4", "question": "Who's there?", "answer": ["Dog", "cat", "Dog", "a Dog"]},
            {"video": "v1.mp4", "question": "why?", "answer": "Yes.", "question_id": "q7", "type": "reason"},
            {"video": "v0.mp4", "question": "how?", "answer": ["fast"], "question_id": 0, "type": 3},
            {"video": "v0.mp4", "question": "how?", "answer": "fast", "type": None}]
    annotations = read("msvd-qa", rows)
    assert [(os.path.basename(a.video), len(a.questions)) for a in annotations] == [("v0.mp4", 3), ("v1.mp4", 1)]
    question, = annotations[1].questions
    assert (question.id, question.text, question.answers) == ("q7", "why", {"Yes.": 1.0})
    first = annotations[0].questions[0]
    assert first.text == "whos there" and first.answers == {"Dog": 0.5, "cat": 0.25, "a Dog": 0.25}
    assert [q.question_type for a in annotations for q in a.questions] == ["", "3", "", "reason"]
    for texts_per_clip, sizes in ((1, [1, 1, 1, 1]), (2, [2, 1, 1]), (4, [3, 1])):
        annotations = read(replace(TASKS["msvd-qa"], texts_per_clip=texts_per_clip), rows, train=True)
        assert [len(a.questions) for a in annotations] == sizes == [len(a.captions) for a in annotations]
    assert [a.source for a in annotations] == ["rows.json, row 0", "rows.json, row 1"]


@pytest.mark.parametrize("form", ["rows", "lists"])
def test_captions_to_generate(read, form):
    """A caption that two people gave counts twice, as a target and as a reference."""
    captions = {"v0.mp4": ["A dog!", "a dog", "A dog!", "two"], "v1.mp4": ["One."]}
    rows = [{"video": video, "caption": texts} for video, texts in captions.items()]
    if form == "rows":
        rows = [{"video": video, "caption": text} for video, texts in captions.items() for text in texts]
    assert [a.captions for a in read("msvd-caption", rows)] == list(captions.values())     # not normalised
    for texts_per_clip, sizes in ((1, [1, 1, 1, 1, 1]), (3, [3, 1, 1]), (4, [4, 1])):
        annotations = read(replace(TASKS["msvd-caption"], texts_per_clip=texts_per_clip), rows, train=True)
        assert [len(a.captions) for a in annotations] == sizes
        for a in annotations:
            question, = a.questions
            assert question.text == "" and question.answers == pytest.approx(
                {text: n / len(a.captions) for text, n in Counter(a.captions).items()})
    assert annotations[0].questions[0].answers == {"a dog": 0.75, "two": 0.25}


def test_choices(read):
    rows = [{"video": "v0.mp4", "caption": ["A dog.", "cat", "x"], "answer": 2},
            {"video": "v0.mp4", "caption": ["a", "b"], "answer": 0}]
    annotations = read("msrvtt-mc", rows)
    assert [(a.captions, a.correct_index) for a in annotations] == [(["a dog", "cat", "x"], 2), (["a", "b"], 0)]
    rows = [{"video": "v0.mp4", "caption": ["a", "b"]}]                     # trained as retrieval
    assert [a.captions for a in read("msrvtt-mc", rows, train=True)] == [["a"], ["b"]]


def test_answers_are_not_normalized(tmp_path):
    write_json(tmp_path / "answers.json", ["Dog", "dog", "a dog."])
    assert read_answers(str(tmp_path / "answers.json")) == ["Dog", "dog", "a dog."]


@pytest.mark.parametrize("task, left", [("msvd", [["a dog"], ["b", "c"]]), ("didemo", [["a dog"], ["b c"]]),
                                        ("msvd-caption", [["A dog."], ["b", "c"]])])
def test_captions_without_words_are_left_out_and_noted(read, benchmarks_copy, capsys, task, left):
    rows = [{"video": "v0.mp4", "caption": ["A dog.", "..."]}, {"video": "v1.mp4", "caption": ["b", "", "c"]},
            {"video": "v2.mp4", "caption": " ! "}]
    assert [a.captions for a in read(task, rows)] == left
    note = "rows.json: 3 of 6 captions have no words and are left out: row 0, row 1, row 2"
    assert capsys.readouterr().out == note + "\n"
    notes = []
    read_rows(TASKS[task], "rows.json", f"{benchmarks_copy}/videos", False, notes=notes)
    assert notes == [note] and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="rows.json: no caption has words, got 4 without, in row 0, row 1$"):
        read(task, [{"video": "v0.mp4", "caption": ["...", "?", ""]}, {"video": "v1.mp4", "caption": ""}])


@pytest.mark.parametrize("task", ["msvd", "msvd-caption"])
def test_results_say_which_captions_were_left_out(models, benchmarks_copy, no_java, capsys, task):
    path, _ = split_files(TASKS[task], "test", benchmarks_copy)
    rows = load_json(path)
    expected = evaluation.main(eval_config(models, benchmarks_copy, task))
    write_json(path, [{**row, "caption": [*as_list(row["caption"]), "?!"] if i else row["caption"]}
                      for i, row in enumerate(rows[:3])] + rows[3:])
    capsys.readouterr()
    result, out = evaluation.main(eval_config(models, benchmarks_copy, task)), capsys.readouterr().out
    note, = [note for note in result["notes"] if "no words" in note]
    assert note.startswith(f"{path}: 2 of ") and note.endswith(" left out: row 1, row 2") and f"note: {note}" in out
    assert (result["scores"], result["captions"]) == (expected["scores"], expected["captions"])
    assert load_json("result.json") == result


def test_missing_videos_are_moved_to_a_list(benchmarks_copy):
    root = f"{benchmarks_copy}/videos"
    write_json("rows.json", [{"video": f"{name}.mp4", "caption": name} for name in ("v0", "gone", "v1", "gone")])
    missing = []
    annotations = read_rows(TASKS["msvd"], "rows.json", root, False, missing)
    assert [a.captions for a in annotations] == [["v0"], ["v1"]] and [a.captions for a in missing] == [["gone"]] * 2
    write_json("rows.json", [{"video": "gone.mp4", "caption": "x"}])
    with pytest.raises(FileNotFoundError, match="rows.json, row 0.*gone.mp4 .1 of 1"):     # nothing would be left
        read_rows(TASKS["msvd"], "rows.json", root, False, [])


# ---------------------------------------------------------------------------------------------------------------------
# Forms and names of files

def write_lines(rows, path):
    with open(path, "w") as f:
        f.write("\n".join(json.dumps(row) + "\n" * (i % 2) for i, row in enumerate(rows)))         # with empty lines


def write_database(rows, path):
    key = "video" if "video" in rows[0] else "image"
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"create table annos (id integer primary key, {key} text, caption text)")
        database.executemany("insert into annos values (?, ?, ?)",
                             [(i, row[key], row["caption"]) for i, row in reversed(list(enumerate(rows)))])
        database.commit()


def write_list(rows, path):
    write_json(path, rows)


@pytest.mark.parametrize("task, old, new, write", [
    ("msvd-qa", "msvd_qa_test.json", "msvd_qa_test.jsonl", write_lines),
    ("ssv2-label", "ssv2_ret_label_val_small.json", "ssv2_ret_label_val_small.jsonl", write_lines),
    ("msrvtt", "msrvtt_ret_test1k.json", "msrvtt_ret_test1k.sqlite", write_database),
    ("lsmdc", "lsmdc_ret_test_1000.json", "lsmdc_ret_test_1000.db", write_database),               # under "image"
    ("msrvtt-caption", "msrvtt_cap_test.json", "msrvtt_cap_test.sqlite", write_database),
    ("activitynet", "anet_ret_val.json", "anet_ret_val_1.json", write_list),
    ("msrvtt-7k", "msrvtt_ret_test1k.json", "../msrvtt_test1k.json", write_list),                  # in the root folder
    ("didemo", "didemo_ret_test.json", "../didemo_ret_test.jsonl", write_lines),
])
def test_a_file_of_another_form_or_name_has_the_same_rows(benchmarks_copy, task, old, new, write):
    folder, task = f"{benchmarks_copy}/anno_downstream", TASKS[task]

    def read_test_split():
        path, root = split_files(task, "test", benchmarks_copy)
        return path, [replace(a, source=a.source.removeprefix(path), questions=[
            replace(q, source=q.source.removeprefix(path)) for q in a.questions])
            for a in read_rows(task, path, root, train=False)]

    path, expected = read_test_split()
    assert path == f"{folder}/{old}"
    rows = load_json(path)
    os.remove(path)
    with pytest.raises(FileNotFoundError, match=re.escape(old)):
        split_files(task, "test", benchmarks_copy)
    write(rows, f"{folder}/{new}")
    path, annotations = read_test_split()
    assert os.path.samefile(path, f"{folder}/{new}") and annotations == expected


def test_the_first_of_several_names_is_used(benchmarks_copy):
    root = benchmarks_copy
    names = ("anno_downstream/a.json", "anno_downstream/a.sqlite", "a.db", "anno_downstream/b.jsonl", "b.json")
    for name in names:
        write_json(f"{root}/{name}", [])
    for name in names:
        assert find_file("a|b", root) == f"{root}/{name}"
        os.remove(f"{root}/{name}")
    with pytest.raises(FileNotFoundError, match=r"anno_downstream/a\.json.* a\.json"):
        find_file("a|b", root)
    task = TASKS["msvd"]
    assert find_media(task, root) == f"{root}/videos_images/msvd_2fps_224"
    os.makedirs(f"{root}/other/videos_images/msvd")
    assert find_media(task, f"{root}/other") == f"{root}/other/videos_images/msvd"
    with pytest.raises(FileNotFoundError, match="videos_images/lsmdc/"):
        find_media(TASKS["lsmdc"], f"{root}/other")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def change_row_1(path, changes):
    """Change keys of row 1 of a file; None removes the key."""
    rows = load_json(path)
    rows[1] = {key: value for key, value in {**rows[1], **changes}.items() if value is not None}
    write_json(path, rows)


@pytest.mark.parametrize("task, changes, match", [
    ("msvd", {"video": "gone.mp4"}, r"gone.mp4 \(1 of 6"),
    ("ssv2-label", {"video": ["v0.mp4", "gone.mp4"]}, "gone.mp4"),
    ("msvd-qa", {"video": "gone.mp4"}, "gone.mp4"),
    ("msrvtt-mc", {"video": "gone.mp4"}, "gone.mp4"),
    ("msvd-caption", {"video": "gone.mp4"}, "gone.mp4"),
    ("msvd", {"caption": []}, r"caption.*\[\]"),
    ("msvd", {"caption": None}, "caption.*None"),
    ("msvd", {"video": None}, "video"),
    ("msvd", {"video": 7}, "video.*7"),
    ("msvd-qa", {"question_id": 200}, "question_id.*200.*row 0"),
    ("msvd-qa", {"question_id": [1]}, r"question_id.*\[1"),
    ("msvd-qa", {"question": "?"}, "question.*'[?]'"),
    ("msvd-qa", {"question": ["a", "b"]}, "question.*2"),
    ("msvd-qa", {"answer": None}, "answer.*None"),
    ("msvd-qa", {"answer": 3}, "answer.*3"),
    ("msvd-qa", {"video": ["v0.mp4", "v1.mp4"]}, "video.*2"),
    ("msrvtt-mc", {"answer": 5}, "answer.*0 to 4.*5"),
    ("msrvtt-mc", {"answer": -1}, "answer.*-1"),
    ("msrvtt-mc", {"answer": "2"}, "answer.*'2'"),
    ("msrvtt-mc", {"answer": True}, "answer.*True"),
    ("msrvtt-mc", {"answer": None}, "answer.*None"),
    ("msrvtt-mc", {"caption": ["a"]}, "caption.*one"),
    ("msvd-qa", {"answer": ["a", "..."]}, "answer.*'[.]{3}'"),
    ("msrvtt-mc", {"caption": ["a", "..."], "answer": 0}, "caption.*'[.]{3}'"),         # of which one is chosen
])
def test_a_bad_row_is_named(benchmarks_copy, task, changes, match):
    task = TASKS[task]
    path, root = split_files(task, "test", benchmarks_copy)
    change_row_1(path, changes)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{re.escape(path)}, row 1.*{match}") as error:
        read_rows(task, path, root, train=False)
    assert "\n" not in str(error.value)


def test_a_bad_file_ends_a_command_with_one_line(models, benchmarks_copy, capsys):
    path = f"{benchmarks_copy}/anno_downstream/msvd_ret_test"
    write_lines(load_json(f"{path}.json"), f"{path}.jsonl")
    change_row_1(f"{path}.json", {"caption": 7})
    assert_refused(models, benchmarks_copy, "msvd", capsys, "msvd_ret_test.json, row 1.*caption.*7")
    os.remove(f"{path}.json")
    with open(f"{path}.jsonl", "a") as f:
        f.write("\n{")
    with open(f"{path}.jsonl") as f:
        last = len(f.readlines())
    assert_refused(models, benchmarks_copy, "msvd", capsys, f"msvd_ret_test.jsonl, line {last}: not JSON")


@pytest.mark.parametrize("answers, match", [
    (None, "anno_downstream/msvd_qa_answer_list.json"),
    (["dog", "cat", "dog"], "msvd_qa_answer_list.json.*'dog'"),
    (["dog", ""], "msvd_qa_answer_list.json, row 1.*''"),
    (["dog", 3], "msvd_qa_answer_list.json, row 1.*3"),
    ({"dog": 0}, "msvd_qa_answer_list.json, row 0.*text.*dog"),
    ([], "msvd_qa_answer_list.json.*empty"),
])
def test_an_answer_list_must_exist_and_have_no_duplicates(models, benchmarks_copy, capsys, answers, match):
    path = f"{benchmarks_copy}/anno_downstream/msvd_qa_answer_list.json"
    os.remove(path) if answers is None else write_json(path, answers)
    assert_refused(models, benchmarks_copy, "msvd-qa", capsys, match)


def test_an_unknown_task_is_refused_with_the_nearest_name(benchmarks, capsys):
    with pytest.raises(ValueError, match=f"{', '.join(TASKS)}.*'msrvt'.*'msrvtt'"):
        get_task("msrvt")
    with pytest.raises(ValueError, match=f"{', '.join(TASKS)}, got 'zzz'$"):
        get_task("zzz")
    code, _, err = command("eval.py", ["--task", "activity-qa", "--data-root", benchmarks], capsys)
    assert_one_line("eval.py", code, err, "'activity-qa'.*'activitynet-qa'")


@pytest.mark.parametrize("data_root", ["", "nowhere"])
def test_a_data_root_must_exist(tmp_path, monkeypatch, data_root):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"--data-root.*{data_root}"):
        split_files(TASKS["msrvtt"], "test", data_root)
    with pytest.raises(ValueError, match="val split"):
        split_files(TASKS["msrvtt"], "val", data_root)
    with pytest.raises(FileNotFoundError, match="data/sprites"):
        split_files(TASKS["sprites"], "test", "")
