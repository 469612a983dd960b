"""Clips of longer videos: the frames between "start" and "end", their names, caches and evaluation."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.models import student
from helpers.videos import numbers, timed, write

import eval as evaluation
import video
from annotations import build_mapped_annotations, read_annotations
from data import ClipDataset, DataConfig
from media import Media
from tasks import get_task, read_rows
from tokenizer import build_wordpiece, load_tokenizer
from video import eval_transform, frames_of_clip, read_frames

UNEVEN = [0, 40, 45, 300, 301, 900, 2000]           # milliseconds; the mean frame lasts a third of a second


def write_rows(*rows):
    with open("rows.json", "w") as f:
        json.dump([{"video": "a.mp4", "caption": f"text {i}", **row} for i, row in enumerate(rows)], f)
    return "rows.json"


def clip(path, start=0.0, end=math.inf):
    return Media(str(path), start=start, end=end)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """In a folder with a.mp4, of 50 frames at 10 a second."""
    monkeypatch.chdir(tmp_path)
    write("a.mp4")


# ---------------------------------------------------------------------------------------------------------------------
# Frames

def brute_force(times, start, end):
    """The frames of a clip: the definition, frame by frame. None: it lies behind the end."""
    inside = [i for i, t in enumerate(times) if start - 5e-7 <= t < end - 5e-7]
    last = times[-1] + times[-1] / (len(times) - 1) if len(times) > 1 else math.inf
    if not inside and start >= last:
        return None
    return inside or [max(i for i, t in enumerate(times) if t <= start)]


@pytest.mark.parametrize("seed", range(3))
def test_a_clip_has_the_frames_that_begin_within_it(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        steps = rng.choice([0.001, 1 / 30, 0.04, 0.1, 0.7], rng.integers(0, 12))
        times = np.concatenate([[0.0], np.cumsum(steps)])
        around = [float(t + d) for t in times for d in (-0.0005, 0, 0.0005)] + [9.9]
        start = max(0.0, float(rng.choice(around)))
        end = start + float(rng.choice([0.0004, 0.03, 0.2, 50, math.inf]))
        expected = brute_force(times.tolist(), start, end)
        if expected is None:
            with pytest.raises(ValueError, match=f"got a start of {start:g} s in a video of "):
                frames_of_clip(times, start, end)
        else:
            assert [*range(*frames_of_clip(times, start, end))] == expected, (times, start, end)


def test_rounding_does_not_move_the_edges_of_a_clip():
    times = np.cumsum([0.0] + [0.1] * 99)                                   # 0.30000000000000004, 0.7999999999999999
    for i in range(100):
        for j in range(i + 1, 101):
            assert frames_of_clip(times, i / 10, j / 10) == (i, j)


@pytest.mark.parametrize("start, end, expected", [
    (0, math.inf, range(50)), (1, 2, range(10, 20)), (1.05, 1.95, range(11, 20)), (0.3, 0.7, range(3, 7)),
    (4.9, 99, [49]), (4.95, 99, [49]), (2.31, 2.39, [23]), (0, 1e-9, [0]), (3, math.inf, range(30, 50)),
])
def test_frames_of_a_clip_are_read(start, end, expected):
    assert numbers(read_frames(clip("a.mp4", start, end), 0)) == [*expected]


def test_times_that_are_uneven_begin_late_or_are_unknown():
    for name in ("a.mkv", "b.mp4", "c.ts"):
        timed(name, [t + 5000 for t in UNEVEN])                             # the first frame is at 0 all the same
        assert numbers(read_frames(clip(name, 0.045, 0.9), 0)) == [2, 3, 4]
        assert numbers(read_frames(clip(name, 0.5, 0.8), 0)) == [4]         # shown from 0.301 to 0.9
        assert numbers(read_frames(clip(name, 2.1, 2.2), 0)) == [6]
    write("a.avi", codec="mpeg4", bf="2")                                   # it is decoded to count its frames
    assert numbers(read_frames(clip("a.avi", 1, 1.5), 0)) == [*range(10, 15)]


def test_max_seconds_counts_from_the_start_of_the_clip():
    read = lambda *times, seconds: numbers(read_frames(clip("a.mp4", *times), 0, seconds=seconds))
    assert read(2, 4, seconds=1) == [*range(20, 30)] and read(2, 2.4, seconds=1) == [*range(20, 24)]
    assert read(2.05, 4, seconds=1) == [*range(21, 30)]                     # frame 30 ends at 3.1 s
    assert read(4.5, seconds=1) == [*range(45, 50)] and read(2.35, 2.38, seconds=0.001) == [23]


def test_a_clip_behind_the_end_is_unreadable_and_names_both_times():
    with pytest.raises(ValueError, match=r"^a.mp4#t=5,7.5: .* got a start of 5 s in a video of 5 s$"):
        read_frames(clip("a.mp4", 5, 7.5), 4)
    write_rows({"start": 1}, {"start": 60, "end": 61}, {"end": 2})
    annotations = read_annotations("rows.json", ".")
    cfg = DataConfig(num_frames=2, image_size=16, frame_cache=False, max_unreadable=0.5)
    (record,) = [record for n in range(3) for record in ClipDataset(annotations, cfg)[n].skipped]
    assert record["where"] == "rows.json, row 1" and record["video"] == "./a.mp4#t=60,61"
    assert "a start of 60 s in a video of 5 s" in record["reason"]


def test_a_clip_is_decoded_from_the_keyframe_before_it(monkeypatch):
    write("long.mp4", n=50, g="10", bf="0")
    decoded = []
    original = video.decode_from_keyframe

    def counted(container, stream, packets, key, *args):
        for i, frame in original(container, stream, packets, key, *args):
            decoded.append((key, i))
            yield i, frame

    monkeypatch.setattr(video, "decode_from_keyframe", counted)
    assert numbers(read_frames(clip("long.mp4", 3.2, 3.5), 0)) == [32, 33, 34]
    assert {key for key, _ in decoded} == {30} and max(i for _, i in decoded) < 40


# ---------------------------------------------------------------------------------------------------------------------
# Rows

@pytest.mark.parametrize("row, match", [
    ({"start": -0.1}, '"start" must be a number of seconds, 0 or more, got -0.1'),
    ({"start": "0:07"}, '"start" must be a number.*0:07'),
    ({"start": True}, '"start" must be a number.*True'),
    ({"end": [1]}, r'"end" must be a number.*\[1\]'),
    ({"end": 0}, '"end" must be above "start", got 0 and 0'),
    ({"start": 3, "end": 3}, '"end" must be above "start", got 3 and 3'),
    ({"start": 3.5, "end": 3}, '"end" must be above "start", got 3 and 3.5'),
])
def test_times_that_make_no_sense_are_refused_by_their_row(row, match):
    for rows in ([{}, row], [{}, {**row, "question": "what", "answer": "x"}]):
        write_rows(*rows)
        with pytest.raises(ValueError, match=f"^rows.json, row 1: {match}") as error:
            read_annotations("rows.json", ".")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_not_finite_are_refused(text):
    with open("rows.jsonl", "w") as f:
        f.write(f'{{"video": "a.mp4", "caption": "x", "end": {text}}}\n')
    with pytest.raises(ValueError, match='^rows.jsonl, row 0: "end" must be a number of seconds') as error:
        read_annotations("rows.jsonl", ".")
    assert len(str(error.value)) < 200


def test_each_clip_of_a_video_has_a_name_and_a_media_id_of_its_own():
    times = [{}, {"start": 0}, {"start": None, "end": None}, {"start": 1, "end": 2}, {"start": 1.0, "end": 2.0},
             {"end": 2}, {"start": 1}, {"start": 0.1, "end": 12.25}, {"video": ["a.mp4", "./a.mp4"], "start": 1}]
    write_rows(*times)
    annotations = read_annotations("rows.json", "")
    assert [a.video for a in annotations] == [
        "a.mp4", "a.mp4", "a.mp4", "a.mp4#t=1,2", "a.mp4#t=1,2", "a.mp4#t=,2", "a.mp4#t=1", "a.mp4#t=0.1,12.25",
        "a.mp4#t=1", "./a.mp4#t=1"]
    ids = [a.media_id for a in annotations]
    assert ids[0] == ids[1] == ids[2] and ids[3] == ids[4] and ids[6] == ids[8] == ids[9] and len(set(ids)) == 5
    mapped = build_mapped_annotations([("rows.json", ".")], "out")
    assert list(mapped) == read_annotations("rows.json", ".") and mapped[7].media == clip("./a.mp4", 0.1, 12.25)
    with open(mapped.path + ".jsonl") as f:
        lines = f.read().splitlines()
    assert "media" not in lines[0]                                          # as in runs that began before clips
    assert json.loads(lines[6])["media"] == {"path": "./a.mp4", "start": 1.0}


def test_other_times_are_other_annotations_to_a_run():
    digests = []
    for row in ({}, {"start": 1}, {"start": 1, "end": 3}, {"start": 2, "end": 3}):
        write_rows({}, row)
        digests.append(build_mapped_annotations([("rows.json", ".")], "out").digest)
    assert len(set(digests)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Caches and evaluation

@pytest.mark.parametrize("frame_cache", [False, True])
@pytest.mark.parametrize("quality", [0, 95])
def test_clips_of_one_video_are_cached_apart(frame_cache, quality):
    write_rows({}, {"start": 1, "end": 2}, {"start": 3, "end": 3.3}, {"start": 1, "end": 2})
    annotations = read_annotations("rows.json", ".")
    cfg = DataConfig(num_frames=4, image_size=48, frame_cache=frame_cache, cache_jpeg_quality=quality,
                     cache_frames=50, train_file="rows.json")
    dataset = ClipDataset(annotations, cfg, train=False)
    expected = [[5, 18, 30, 43], [10, 13, 15, 18], [30, 31, 32, 32], [10, 13, 15, 18]]
    assert [numbers(dataset[i].video) for i in range(4)] == expected
    if frame_cache:
        assert [video for video, *_ in dataset.cache.index] == ["./a.mp4", "./a.mp4#t=1,2", "./a.mp4#t=3,3.3"]
        write_rows({}, {"start": 1, "end": 2.1}, {"start": 3, "end": 3.3}, {"start": 1, "end": 2.1})
        changed = ClipDataset(read_annotations("rows.json", "."), cfg, train=False)
        assert changed.cache.path != dataset.cache.path and numbers(changed[1].video) == [10, 13, 16, 19]


def test_benchmark_rows_keep_their_times():
    times = [{"start": 1, "end": 2}, {"start": 3}, {"start": 1, "end": 2}, {}]
    names = ["./a.mp4#t=1,2", "./a.mp4#t=3", "./a.mp4#t=1,2", "./a.mp4"]
    write_rows(*times)
    videos = lambda task, **options: [a.video for a in read_rows(get_task(task), "rows.json", ".", **options)]
    assert videos("msrvtt", train=True) == videos("msrvtt", train=False) == names
    assert videos("activitynet", train=False, missing=[]) == names
    assert videos("msrvtt-caption", train=False) == [names[0], names[1], names[3]]          # of one clip together
    captions = read_rows(get_task("msrvtt-caption"), "rows.json", ".", train=False)[0].captions
    assert captions == ["text 0", "text 2"]
    write_rows(*({"question": "what", "answer": "a dog", **row} for row in times))
    assert videos("msrvtt-qa", train=False) == [names[0], names[1], names[3]]
    write_rows(*({"caption": ["one", "two"], "answer": 0, **row} for row in times))
    annotations = read_rows(get_task("msrvtt-mc"), "rows.json", ".", train=False)
    assert [a.video for a in annotations] == names and annotations[0].media == clip("./a.mp4", 1, 2)
    write_rows({}, {"video": "b.mp4", "start": 1})
    missing = []
    assert len(read_rows(get_task("msrvtt"), "rows.json", ".", train=False, missing=missing)) == 1
    assert [a.video for a in missing] == ["./b.mp4#t=1"]
    with pytest.raises(FileNotFoundError, match="rows.json, row 1: there is no file ./b.mp4 .1 of 2"):
        read_annotations("rows.json", ".")


def test_clips_of_one_video_are_retrieved_apart():
    """Each is encoded once, from its own frames, as a file with these frames alone would be."""
    write_rows({}, {"start": 1, "end": 2}, {"start": 4}, {"start": 1, "end": 2})
    build_wordpiece(["text 0 1 2 3"], "tokenizer.json")
    model, cfg = student().float(), DataConfig(num_frames=2, image_size=8, frame_cache=False)
    dataset = ClipDataset(read_annotations("rows.json", "."), cfg, train=False)
    protocol = evaluation.Protocol(max_text_length=7)
    with torch.no_grad():
        videos = evaluation.encode_unique_videos(model, dataset, load_tokenizer("."), protocol)
        expected = [model.encode_video(eval_transform(read_frames("a.mp4", 0)[frames], 8)[None])[1]
                    for frames in ([12, 37], [12, 17], [42, 47])]
    columns = [videos.columns[a.media_id] for a in dataset.annotations]
    assert sorted(columns[:3]) == [0, 1, 2] and columns[3] == columns[1]
    torch.testing.assert_close(videos.features[columns[:3]], torch.cat(expected))
    results = evaluation.retrieval(model, dataset, load_tokenizer("."), protocol)
    assert (results["videos"], results["captions"]) == (3, 4)
