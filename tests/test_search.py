"""search.py: scores against a loop over files and segments, updates of the index, what it prints and refuses."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.benchmarks import write_json
from helpers.damage import damaged_copies
from helpers.evaluation import run_interrupted
from helpers.models import seeded, shaken
from helpers.runs import assert_one_line, command
from helpers.videos import break_packets, cut, write, write_blocks
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import search
import video
from files import save_weights
from model import ClusterSTM
from search import Config, main
from teacher import SigLIP
from tokenizer import encode_texts, load_tokenizer
from video import eval_transform, frame_to_tensor, read_frames, resize_like_pillow, sample_frame_indices, write_video

QUERIES = ("a red square grows", "two blue rings")
INDEX = "clips.index.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Twelve clips and two checkpoints

FILES = {
    "b_frames.mkv": dict(n=31),
    "ends_in_capitals.MP4": dict(n=8),
    "flash.flv": dict(n=14, codec="flv", shape=(30, 70)),
    "long.mp4": dict(n=50, rate=2),                                         # 25 s
    "odd.avi": dict(n=21, codec="mpeg4", shape=(51, 35)),
    "one_frame.mp4": dict(n=1),
    "picture.gif": dict(n=9, codec="gif", pix_fmt="rgb8"),
    "sound.mov": dict(n=40, audio=True),
    "stream.ts": dict(n=23, shape=(64, 48)),
    "sub/deeper/motion.avi": dict(n=12, codec="mjpeg", pix_fmt="yuvj420p", shape=(120, 160)),
    "sub/nine.webm": dict(n=17, codec="libvpx-vp9"),
    "windows.wmv": dict(n=26, codec="wmv2"),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folder with the FILES, and files that are not videos."""
    folder = tmp_path_factory.mktemp("clips")
    for name, options in FILES.items():
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        write_blocks(str(folder / name), **options)
    for name in (".hidden.mp4", ".git/a.mp4", "notes.txt", "no_ending"):
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        (folder / name).write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def checkpoints(first_run, tmp_path_factory):
    """Folder with `student` and `teacher`, whose weights tell clips apart."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, source in (("student", "first"), ("teacher", "first/teacher")):
        shutil.copytree(f"{first_run}/out/{source}", folder / name)
        shake(str(folder / name), ClusterSTM if name == "student" else SigLIP)
    return folder


def shake(folder, cls, seed=0):
    save_weights(shaken(cls.from_pretrained(folder), seed).float(), folder)


@pytest.fixture
def cfg(clips, checkpoints, tmp_path, monkeypatch):
    """Config that indexes a copy of the clips with the student in this process; the current folder has only `clips`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips, "clips")                                         # with their modification times
    return Config("clips", QUERIES, checkpoint=str(checkpoints / "student"), top=100, workers=0, device="cpu")


@pytest.fixture
def decoded(monkeypatch):
    """The files that this process decodes, in order."""
    paths, iter_frames = [], video.iter_frames

    def recorded(path, select):
        paths.append(os.path.relpath(path, "clips"))
        return iter_frames(path, select)

    monkeypatch.setattr(video, "iter_frames", recorded)
    return paths


def scores_by_name(hits):
    return {query: {hit.name: hit.score for hit in query_hits} for query, query_hits in hits.items()}


def test_linked_folders_are_followed_once_and_loops_end(tmp_path):
    for name in ("in/a.mp4", "in/z/b.mp4", "out/c.mp4", "out/deep/d.mp4", "far/e.mp4", ".secret/f.mp4"):
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    list_names = lambda folder: [*search.list_videos(str(tmp_path / folder))]
    for link, target in (("in/link", "../out"), ("in/z/absolute", tmp_path / "far"), ("out/deep/again", "../../in"),
                         ("in/a_loop", "."), ("in/z/loop", ".."), ("in/b_z", "z"), ("in/.hidden", "../.secret"),
                         ("in/broken", "nowhere"), ("in/g.mp4", "../far/e.mp4"), ("top", "in")):
        os.symlink(target, tmp_path / link)
    expected = ["a.mp4", "g.mp4", "link/c.mp4", "link/deep/d.mp4", "z/absolute/e.mp4", "z/b.mp4"]
    assert list_names("in") == list_names("top") == expected                # a folder by its own path, not by a link's
    os.symlink("..", tmp_path / "in/up")                                    # the folder above, which has other folders
    files = [os.path.realpath(tmp_path / "in" / name) for name in list_names("in")]
    names = ["in/a.mp4", "far/e.mp4", "out/c.mp4", "out/deep/d.mp4", "far/e.mp4", "in/z/b.mp4"]     # g.mp4 is e.mp4
    assert sorted(files) == sorted(str(tmp_path / name) for name in names)


def test_a_linked_folder_is_searched(cfg, tmp_path):
    expected = scores_by_name(main(cfg))
    shutil.move("clips/sub", "elsewhere")
    os.symlink("../elsewhere", "clips/sub")
    os.symlink("..", "clips/sub/deeper/loop")
    os.remove(INDEX)
    hits = scores_by_name(main(cfg))
    assert "sub/nine.webm" in hits[QUERIES[0]]
    assert hits == {query: pytest.approx(scores) for query, scores in expected.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Scores and segments

def best_segments_by_hand(cfg, kind, T):
    """query -> name -> (score, start, end) of the best segment, from files decoded whole and encoded one by one."""
    model = (ClusterSTM if kind == "student" else SigLIP).from_pretrained(cfg.checkpoint)
    best = {query: {} for query in cfg.queries}
    for name, options in FILES.items():
        frames = read_frames(f"clips/{name}", 0)
        times = video.frame_timestamps(*video.open_video(f"clips/{name}"))[1]
        end = options["n"] / options.get("rate", 10) if options["n"] > 1 else 0
        parts = -int(-end // cfg.segment) if cfg.segment and end > cfg.segment else 1
        for part in range(parts):
            low, high = end * part / parts, max(end, 1) * (part + 1) / parts
            indices = [i for i, t in enumerate(times) if low <= t + 1e-6 < high]
            segment = frames[[indices[i] for i in sample_frame_indices(T, len(indices))]]
            with torch.no_grad():
                feature = video_feature_by_hand(model, segment)
                for query in cfg.queries:
                    score = (feature @ text_feature_by_hand(model, cfg.checkpoint, query)).item()
                    candidate = (score, low, end * (part + 1) / parts)
                    best[query][name] = max(best[query].get(name, candidate), candidate)
    return best


def video_feature_by_hand(model, frames):
    if isinstance(model, ClusterSTM):
        return model.encode_video(eval_transform(frames, 16)[None])[1][0]
    processor = model.cfg.image_processor
    resized = resize_like_pillow(frames, processor.size, video.RESAMPLE_MODES[processor.resample])
    return torch.stack([model.encode_image(model.normalize(frame[None]))[1][0] for frame in resized]).mean(0)


def text_feature_by_hand(model, checkpoint, query):
    if isinstance(model, ClusterSTM):
        tokenizer = load_tokenizer(f"{checkpoint}/tokenizer.json")
        return model.encode_text(encode_texts(tokenizer, [query], 24))[1][0]
    return model.encode_text(model.tokenize([query]))[0]


@pytest.mark.parametrize("kind, T, frames, segment, workers", [
    ("student", 4, 0, 10.0, 2), ("student", 3, 3, 0, 0), ("teacher", 8, 0, 10.0, 0), ("teacher", 2, 2, 1.2, 2),
])
def test_scores_equal_a_loop_over_files(cfg, checkpoints, kind, T, frames, segment, workers):
    cfg = replace(cfg, checkpoint=str(checkpoints / kind), frames=frames, segment=segment, workers=workers, batch=5)
    hits, expected = main(cfg), best_segments_by_hand(cfg, kind, T)
    for query in QUERIES:
        scores = [hit.score for hit in hits[query]]
        assert {hit.name for hit in hits[query]} == FILES.keys()
        assert scores == sorted(scores, reverse=True) and np.ptp(scores) > 0.02         # the clips differ
        for hit in hits[query]:
            assert (hit.score, hit.start, hit.end) == pytest.approx(expected[query][hit.name], abs=2e-3), hit
            assert hit.score == pytest.approx(expected[query][hit.name][0], abs=1e-4), hit
    assert {hit.name: hit.parts for hit in hits[QUERIES[0]]}["long.mp4"] == {10.0: 3, 0: 1, 1.2: 21}[segment]


def test_a_video_is_found_by_its_best_segment(cfg, monkeypatch, capsys):
    frames = np.full((24, 48, 64, 3), 20, np.uint8)
    frames[16:] = 235
    os.makedirs("half")
    write_video("half/half.mp4", frames, fps=2)                             # light from 8 to 12 s
    write_video("half/dark.mp4", frames[:8], fps=2)
    brightness = lambda self, x: torch.stack([x.float().mean((1, 2, 3, 4)) / 255, torch.ones(len(x))], 1)
    monkeypatch.setattr(search.StudentEncoder, "encode_video", brightness)
    monkeypatch.setattr(search.StudentEncoder, "encode_text", lambda self, text: (torch.tensor([1.0, 0.0]), 2, 9))
    hits, = main(replace(cfg, folder="half", queries=("light",), segment=4)).values()
    assert [(hit.name, hit.start, hit.end, hit.parts) for hit in hits] == [
        ("half.mp4", 8, 12, 3), ("dark.mp4", 0, 4, 1)]
    assert hits[0].score > 0.8 > 0.2 > hits[1].score
    lines = capsys.readouterr().out.splitlines()
    assert re.search("half/half.mp4 +0:08-0:12$", lines[-2]) and lines[-1].endswith("half/dark.mp4")


@pytest.mark.parametrize("times, length, T, count", [
    (np.arange(250) / 10, 10.0, 4, 3), (np.arange(250) / 10, 0, 4, 1), (np.arange(100) / 10, 10.0, 4, 1),
    (np.arange(108) / 10, 10.0, 4, 1), (np.arange(120) / 10, 10.0, 4, 2), (np.zeros(1), 10.0, 3, 1),
    (np.array([0, 0.1, 0.2, 30.0, 30.1]), 10.0, 2, 4), (np.array([0, 95000.0]), 10.0, 2, 2),
    (np.arange(3) / 10, 0.1, 2, 3), (np.arange(3600) / 10, 10.0, 8, 36),
])
def test_segments_are_equal_and_cover_the_video(times, length, T, count):
    segments, indices = search.segment_times(times, length, T)
    assert len(segments) == count and len(indices) == count * T and (np.diff(indices) >= 0).all()
    assert segments[0][0] == 0 and segments[-1][1] >= times[-1] and all(a[1] == b[0] for a, b in pairwise(segments))
    assert np.ptp([end - start for start, end in segments]) < 1e-6
    for (start, end), chosen in zip(segments, indices.reshape(count, T), strict=True):
        inside = [i for i, t in enumerate(times) if start - 1e-6 <= t < end - 1e-6 or count == 1]
        if inside:
            assert set(chosen) <= set(inside) and (len(inside) < T or len(set(chosen)) == T)
        else:                                                               # the frame before it
            assert set(chosen) == {sum(times < start - 1e-6) - 1}


def test_iter_frames_equals_a_whole_decode(tmp_path):
    intact, keyframes = write(tmp_path / "intact.mp4", bf="3"), {"x264-params": "keyint=1:repeat-headers=0"}
    damaged = break_packets(write(tmp_path / "damaged.mp4", **keyframes), [0, 10, 30, 31, 49])
    unreadable = break_packets(write(tmp_path / "unreadable.mp4", **keyframes), range(20, 32))
    for indices in (list(range(50)), [0, 0, 10, 10, 10, 31, 48], [49], [30, 49, 49]):
        for path in (intact, damaged):
            frames = video.iter_frames(path, lambda _, indices=indices: indices)
            frames = torch.stack([frame_to_tensor(frame, None) for frame in frames])
            assert torch.equal(frames, read_frames(path, 0)[indices])
    for path, message in ((unreadable, "unreadable.mp4.* 12 of 50"), ("no.mp4", "no.mp4")):
        with pytest.raises((ValueError, OSError), match=message):
            list(video.iter_frames(str(path), lambda _: [24]))


def test_top_videos_equal_a_sorted_list():
    g = seeded()
    parts = torch.randint(1, 6, (30,), generator=g).tolist()
    rows = [(f"{i}.mp4", k, k + 1, n) for i, n in enumerate(parts) for k in range(n)]
    scores, best = torch.randn(sum(parts), generator=g), {}
    for score, (name, start, *_) in zip(scores.tolist(), rows, strict=True):
        best[name] = max(best.get(name, (-9, 0)), (score, start))
    expected = sorted(((score, name, start) for name, (score, start) in best.items()), reverse=True)
    for top in (1, 7, 100):
        hits = search.top_videos(scores, rows, top)
        assert [(hit.score, hit.name, hit.start) for hit in hits] == expected[:top]
        assert all(hit.parts == parts[int(hit.name[:-4])] and hit.end == hit.start + 1 for hit in hits)


# ---------------------------------------------------------------------------------------------------------------------
# Index

def test_a_second_run_decodes_nothing_and_gives_the_same_hits(cfg, decoded, monkeypatch, capsys):
    hits = main(cfg)
    assert sorted(decoded) == sorted(FILES) and "clips: 12 of 12 videos" in capsys.readouterr().out
    decoded.clear()
    assert main(cfg) == hits and main(replace(cfg, folder="clips/")) == hits and not decoded
    os.mkdir("elsewhere")                                                   # folder and index may move together
    os.rename("clips", "elsewhere/clips")
    os.rename(INDEX, f"elsewhere/{INDEX}")
    cfg = replace(cfg, folder="elsewhere/clips")
    assert scores_by_name(main(cfg)) == scores_by_name(hits) and not decoded
    monkeypatch.setattr(search.StudentEncoder, "load", None)                # without a query no weights are read
    assert main(replace(cfg, queries=())) == {}
    assert "python search.py elsewhere/clips" in capsys.readouterr().out


def test_changed_files_are_decoded_and_removed_files_leave_the_index(cfg, decoded, capsys):
    before = scores_by_name(main(cfg))[QUERIES[0]]
    decoded.clear()
    os.utime("clips/odd.avi", (1, 1))
    os.remove("clips/flash.flv")
    shutil.copy("clips/stream.ts", "clips/sub/nine.webm")
    os.rename("clips/windows.wmv", "clips/renamed.wmv")
    after = scores_by_name(main(cfg))[QUERIES[0]]
    assert sorted(decoded) == ["odd.avi", "renamed.wmv", "sub/nine.webm"]
    out = capsys.readouterr().out
    assert re.search("11 of 11 videos .*13 segments; 3 new or changed.*; 2 gone", out), out
    assert after["renamed.wmv"] == pytest.approx(before.pop("windows.wmv"), abs=1e-5)
    assert after["sub/nine.webm"] == pytest.approx(before["stream.ts"], abs=1e-5) != before["sub/nine.webm"]
    decoded.clear()
    os.remove("clips/odd.avi")                                              # also if no file is new
    assert "odd.avi" not in scores_by_name(main(cfg))[QUERIES[0]]
    with safe_open(INDEX, "pt") as f:
        assert "odd.avi" not in f.metadata()["files"] and not decoded


def test_an_unreadable_file_is_reported_and_skipped_until_it_changes(cfg, decoded, capsys):
    with open("clips/broken.mp4", "wb") as f:
        f.write(b"no video at all")
    write("clips/silent.mp4", video=False, audio=True, n=5)
    break_packets(write("clips/damaged.mp4", **{"x264-params": "keyint=1"}), range(20, 32))     # known at the end only
    os.symlink("nowhere", "clips/link.mp4")
    os.mkdir("clips/folder.mp4")
    for workers in (2, 0):
        hits = main(replace(cfg, workers=workers))
        out = capsys.readouterr().out
        assert "12 of 16 videos" in out and "14 segments" in out and out.count("not indexed: ") == 4
        for message in ("broken.mp4: Invalid data", "damaged.mp4: 12 of 50 ", "link.mp4: ", "silent.mp4: "):
            assert f"not indexed: {message}" in out
        assert len(hits[QUERIES[0]]) == 12 and not decoded                  # the first run decodes in other processes
    with open("clips/broken.mp4", "wb") as target, open("clips/stream.ts", "rb") as source:
        target.write(source.read())
    with open("clips/late.avi", "wb") as f:
        f.write(b"no video either")
    assert "broken.mp4" in scores_by_name(main(cfg))[QUERIES[0]] and sorted(decoded) == ["broken.mp4", "late.avi"]
    for name in "abcd":
        shutil.copy("clips/late.avi", f"clips/{name}.avi")
    capsys.readouterr()
    main(cfg)
    out = capsys.readouterr().out                                           # of many failures only the new ones
    assert "not indexed: d.avi: Invalid data" in out and "late.avi" not in out and "not indexed: 4 that failed" in out


def test_other_models_and_segments_are_not_mixed_in_an_index(cfg, checkpoints, decoded, capsys):
    main(cfg)
    teacher = str(checkpoints / "teacher")
    for changes, message in [
        (dict(segment=5.0), "segment 10.0, now 5.0"), (dict(frames=2), "frames 4, now 2, segment 5.0, now 10.0"),
        (dict(checkpoint=teacher), "checkpoint .*student, now .*teacher, frames 2, now 8"),
    ]:
        decoded.clear()
        capsys.readouterr()
        main(replace(cfg, **changes))
        assert sorted(decoded) == sorted(FILES)
        assert re.search(f"{INDEX}: .*{message}", capsys.readouterr().out)
    decoded.clear()
    shutil.copytree(teacher, "copy")                                        # the same weights in another folder
    main(replace(cfg, checkpoint="copy"))
    assert not decoded
    shake("copy", SigLIP, seed=1)                                           # other weights, in another folder
    main(replace(cfg, checkpoint="copy"))
    assert sorted(decoded) == sorted(FILES) and "teacher, now copy;" in capsys.readouterr().out
    shake("copy", SigLIP, seed=2)                                           # other weights in the same folder
    main(replace(cfg, checkpoint="copy"))
    assert "checkpoint copy, whose weights have changed" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_keeps_what_it_has_indexed(cfg, decoded, monkeypatch, error):
    expected = main(replace(cfg, index="whole.safetensors"))
    decoded.clear()
    encode_video = search.StudentEncoder.encode_video

    def interrupted(self, x):
        if len(decoded) == 6:
            raise error
        return encode_video(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(search.StudentEncoder, "encode_video", interrupted)
        with pytest.raises((SystemExit, MemoryError)) as caught:
            main(replace(cfg, batch=1))
    if error is KeyboardInterrupt:
        assert re.match("search.py: interrupted; 5 of 12 ", str(caught.value))
    assert len(decoded) == 6 and sorted(os.listdir()) == ["clips", INDEX, "whole.safetensors"]
    complete = set(decoded[:5])
    decoded.clear()
    hits = main(replace(cfg, batch=1))
    assert set(decoded) == FILES.keys() - complete
    for query in QUERIES:
        assert scores_by_name(hits)[query] == pytest.approx(scores_by_name(expected)[query], abs=1e-5)


def test_the_index_is_saved_on_the_way_with_whole_videos(cfg, monkeypatch):
    monkeypatch.setattr(search, "SAVE_EVERY", -1)
    saved, write_tensors = [], search.write_tensors

    def recorded(path, entries, **metadata):
        saved.append({name: (len(entry.segments), len(entry.features)) for name, entry in entries.items()})
        write_tensors(path, entries, **metadata)

    monkeypatch.setattr(search, "write_tensors", recorded)
    main(replace(cfg, batch=2))
    assert [len(entries) for entries in saved] == [*range(1, 13), 12]
    assert all(entries.get("long.mp4", (3, 3)) == (3, 3) for entries in saved)


def test_a_decoding_process_that_dies_is_reported_and_loses_no_other_file(cfg, monkeypatch):
    iter_frames = video.iter_frames

    def die(path, select):
        if path.endswith("sound.mov"):
            os._exit(11)
        return iter_frames(path, select)

    with monkeypatch.context() as patch:
        patch.setattr(video, "iter_frames", die)
        with pytest.raises(ValueError, match="process died.*sound.mov"):
            main(replace(cfg, workers=1, batch=1))
    with safe_open(INDEX, "pt") as f:
        assert len(json.loads(f.metadata()["files"])) >= 3                  # of the 7 before it, less those in flight


def test_a_damaged_index_is_replaced_and_another_file_is_not(cfg, decoded, capsys):
    expected = main(cfg)
    cut(INDEX, 0.7)
    assert main(cfg) == expected and len(decoded) == 24
    assert f"{INDEX}: it is damaged; all videos" in capsys.readouterr().out
    with safe_open(INDEX, "pt") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    checksum = metadata.pop("checksum")
    for damage in (dict(tensors, file=tensors["file"] + 1), dict(tensors, features=tensors["features"][1:])):
        save_file(damage, INDEX, metadata)
        assert main(cfg) == expected and f"{INDEX}: it is damaged; all videos" in capsys.readouterr().out
    for damage in (dict(about="[]"), dict(about="[" * 10 ** 5), dict(files="{}"), dict(checksum=checksum[::-1])):
        save_file(tensors, INDEX, metadata | damage)
        assert main(cfg) == expected and f"{INDEX}: it is damaged; all videos" in capsys.readouterr().out
    save_file(tensors, INDEX)
    with pytest.raises(FileExistsError, match=INDEX):
        main(cfg)
    decoded.clear()
    save_file(tensors, INDEX, metadata)                                     # written before there were checksums
    assert main(cfg) == expected and not decoded
    os.mkdir("others")
    write_video("others/other.mp4", np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=f"{INDEX}.* 12 files .*others"):
        main(replace(cfg, folder="others", index=INDEX))
    assert main(cfg) == expected


def test_each_damage_of_an_index_is_noticed(tmp_path):
    """40 changed bytes and 40 cuts. It is a random index of 30 files, of which one was not read and one is long."""
    g, path, metadata = seeded(), str(tmp_path / INDEX), {"version": 1, "checkpoint": "out/a", "weights": "0"}
    entries = {}
    for i in range(30):
        n = {3: 0, 5: 7}.get(i, 1)
        entries[f"{i}\udcff.mp4"] = search.IndexEntry([i, 10 ** 18 + i], "" if n else "has no frames", [
            (k / 3, k + 1) for k in range(n)], torch.randn(n, 8, generator=g) if n else torch.zeros(0, 0))
    search.write_index(path, entries, metadata)

    def read():
        read_entries, reason = search.read_index(path, metadata)
        return {name: (e.stamp, e.error, e.segments, e.features.tolist()) for name, e in read_entries.items()}, reason

    intact = read()
    expected = {name: (e.stamp, e.error, e.segments, e.features.tolist()) for name, e in sorted(entries.items())}
    assert intact == (expected | {"3\udcff.mp4": ([3, 10 ** 18 + 3], "has no frames", [], [])}, "")
    with open(path, "rb") as f:
        content = f.read()
    noticed = 0
    for damaged in damaged_copies(content, 40):
        with open(path, "wb") as f:
            f.write(damaged)
        noticed += (result := read()) == ({}, "it is damaged")
        assert result in (({}, "it is damaged"), intact)                    # a name in the header may not matter
    assert noticed >= 78


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("part, named", [("vit", "b_frames.mkv"), ("vision_proj", "b_frames.mkv"),
                                         ("text_proj", QUERIES[0])])
def test_a_model_that_is_not_finite_finds_nothing(cfg, tmp_path, capsys, part, named, wrong):
    shutil.copytree(cfg.checkpoint, "broken")
    model = ClusterSTM.from_pretrained("broken").float()
    with torch.no_grad():
        [p for name, p in model.named_parameters() if name.startswith(part)][-1].fill_(wrong)
    save_weights(model, "broken")
    code, out, err = command("search.py", ["clips", *QUERIES, "--checkpoint", "broken", "--workers", "0"], capsys)
    assert_one_line("search.py", code, err, f"'{named}' must be finite, got (nan|-?inf)")
    assert QUERIES[0] not in out


def test_an_index_with_nan_is_damaged(cfg, decoded, capsys):
    expected = scores_by_name(main(cfg))
    with safe_open(INDEX, "pt") as f:
        tensors, metadata = {key: f.get_tensor(key) for key in f.keys()}, f.metadata()       # noqa: SIM118
    tensors["features"][2, 1] = float("nan")
    del metadata["checksum"]
    save_file(tensors, INDEX, metadata)
    decoded.clear()
    assert scores_by_name(main(cfg)) == expected and len(decoded) == len(FILES)
    assert "damaged" in capsys.readouterr().out


def test_an_export_can_be_read_as_the_docstring_says(cfg):
    with open("clips/broken.mp4", "wb") as f:
        f.write(b"no video at all")
    hits = main(replace(cfg, export="features.safetensors"))
    code = search.__doc__[search.__doc__.index("    with safe"):]
    values = {}
    exec("import json, safetensors\n" + "\n".join(line[4:] for line in code.splitlines()), values)
    features, start, end, file, names = (values[key] for key in ("features", "start", "end", "file", "names"))
    assert names == sorted(FILES) and features.shape == (14, 8) and features.dtype == torch.float32
    assert file.dtype == torch.int64 and file.tolist() == sorted([*range(12), 3, 3])
    assert torch.allclose(start[file == 3], torch.linspace(0, 25, 4, dtype=torch.float64)[:3]) and (end >= start).all()
    with torch.no_grad():
        model = ClusterSTM.from_pretrained(cfg.checkpoint)
        scores = features @ text_feature_by_hand(model, cfg.checkpoint, QUERIES[0])
    for hit in hits[QUERIES[0]]:
        assert scores[file == names.index(hit.name)].max().item() == pytest.approx(hit.score, abs=1e-6)


def test_an_index_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    search.write_index(str(tmp_path / INDEX), {}, {})
    status = os.stat(tmp_path / INDEX)
    assert status.st_ino in synced and status.st_mode & 0o777 == 0o644


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and refused

@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_queries_are_normalised_and_a_truncated_query_is_reported(cfg, checkpoints, capsys, kind):
    cfg = replace(cfg, checkpoint=str(checkpoints / kind), top=1)
    plain, shouted, long = main(replace(cfg, queries=("a red square", "A red, SQUARE!", "red " * 50))).values()
    assert plain == shouted != long
    out = capsys.readouterr().out
    assert out.count("query was cut") == 1 and re.search(r"query was cut: .*\b50\b", out)


HOSTILE = "\x1b[31m\r\n\u202e\udcff"                                          # the last is the byte ff
ESCAPED = r"\x1b[31m\r\n\u202e\udcff"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_hostile_file_names_are_searched_and_printed_escaped(cfg, capsys, monkeypatch, workers):
    """Those of videos that are read and not read, of the folder, the index, the export and the query."""
    folder = f"clips{HOSTILE}"
    os.mkdir(folder)
    shutil.copy("clips/odd.avi", f"{folder}/{HOSTILE}.mp4")
    for name in ("\udcfe.mp4", f"bad{HOSTILE}.mkv"):
        shutil.copy("clips/notes.txt", f"{folder}/{name}")
    args = [folder, f"a ring{HOSTILE[:-1]}", "--checkpoint", cfg.checkpoint, "--workers", workers, "--export",
            f"e{HOSTILE}.safetensors"]
    for _ in range(2):
        code, out, err = command("search.py", args, capsys)
        assert code == 0 and not any(c in out + err for c in "\x1b\u202e\udcff\udcfe") and "\r" not in out, err
        assert f"clips{ESCAPED}/{ESCAPED}.mp4\n" in out and f"\na ring{ESCAPED[:-6]}  (1 segments" in out
        assert f"features written to e{ESCAPED}.safetensors\n" in out
        for name in (r"\udcfe.mp4", f"bad{ESCAPED}.mkv"):
            assert f"  not indexed: {name}: Invalid data" in out
        assert len(out.splitlines()) == 7, out
    os.rename(f"e{HOSTILE}.safetensors", "e.safetensors")                  # safetensors opens no other name
    with safe_open("e.safetensors", "pt") as f:
        assert json.loads(f.metadata()["files"]) == [f"{HOSTILE}.mp4"]
    assert os.path.isfile(f"clips{HOSTILE}.index.safetensors")
    with monkeypatch.context() as patch:                                    # as on a terminal
        patch.setattr(search, "tqdm", lambda **options: tqdm(**{**options, "disable": False, "mininterval": 0}))
        main(replace(cfg, folder=folder, segment=1.0))
    out, err = capsys.readouterr()
    assert f"{ESCAPED}.mp4 to 0:0" in err and not any(c in out + err for c in "\x1b\u202e\udcff\udcfe")
    code, out, _ = command("search.py", [*args, "--segment", "5"], capsys)
    assert code == 0 and out.startswith(f"{os.getcwd()}/clips{ESCAPED}.index.safetensors: it was made with segment")
    code, _, err = command("search.py", [f"gone{HOSTILE}", "x", "--checkpoint", cfg.checkpoint], capsys)
    assert_one_line("search.py", code, err, re.escape(f"gone{ESCAPED}: no such folder"))


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_indexing_with_one_line(cfg, monkeypatch, workers):
    """A terminal sends it to the decoding processes too."""
    calls, encode_video = [], search.StudentEncoder.encode_video

    def interrupted(self, x):
        calls.append(x)
        if len(calls) == 3:
            os.killpg(0, signal.SIGINT)
        return encode_video(self, x)

    monkeypatch.setattr(search.StudentEncoder, "encode_video", interrupted)
    code, out, err = run_interrupted("search.py", lambda: main(replace(cfg, workers=workers, batch=1)))
    assert code == 1 and not out and re.fullmatch(r"search.py: interrupted; \d of 12 .*\n", err), err
    assert len(search.read_index(INDEX, {})[0]) == int(err.split()[2])


def test_decoding_processes_ignore_ctrl_c(cfg, monkeypatch):
    """The main process answers it. It may do so later."""
    expected, main_process, iter_frames = main(replace(cfg, index="whole.safetensors")), os.getpid(), video.iter_frames

    def interrupted(path, select):
        if os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGINT)
        return iter_frames(path, select)

    monkeypatch.setattr(video, "iter_frames", interrupted)
    assert scores_by_name(main(replace(cfg, workers=2))) == {
        query: pytest.approx(scores, abs=1e-5) for query, scores in scores_by_name(expected).items()}


def test_a_full_disk_is_named_and_the_index_before_is_kept(cfg, monkeypatch, capsys):
    main(cfg)
    before = open(INDEX, "rb").read()
    shutil.copy("clips/odd.avi", "clips/new.avi")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    args = ["clips", "x", "--checkpoint", cfg.checkpoint, "--workers", "0", "--export", "f.safetensors"]
    full = "could not be written .No space left on device."
    code, _, err = command("search.py", args, capsys)
    assert_one_line("search.py", code, err, f"{INDEX} {full}; the file that was there is unchanged$")
    assert open(INDEX, "rb").read() == before and sorted(os.listdir()) == ["clips", INDEX]
    os.remove("clips/new.avi")
    code, _, err = command("search.py", args, capsys)
    assert_one_line("search.py", code, err, f"f.safetensors {full}$")
    assert sorted(os.listdir()) == ["clips", INDEX]


@pytest.mark.parametrize("args, message", [
    (["nowhere", "x"], "nowhere"),
    (["empty", "x"], "empty .*mp4"),
    (["bad", "x"], "bad: none of its 1 files"),
    (["clips", "a dog", " ?! "], "query .*' [?]! '"),
    (["clips", ""], "query .*''"),
    (["clips", "a dog", "b\udcff"], r"query must be valid Unicode, got 'b\\udcff'"),
    (["clips", "x", "--top", "0"], "top .*1.*0"),
    (["clips", "x", "--segment", "nan"], "segment .*0.*nan"),
    (["clips", "x", "--batch", "0"], "batch .*1.*0"),
    (["clips", "x", "--device", "tpu"], "auto.*cpu.*cuda"),
    (["clips", "x", "--checkpoint", "gone/away/far"], "gone/away/far .*--checkpoint"),
    (["clips", "x", "--checkpoint", "empty"], "empty .*config.json"),
    (["clips", "x", "--checkpoint", "bert"], "bert/config.json: model_type .*'siglip'.*'bert'"),
    (["clips", "x", "--checkpoint", "student"], "student .*model.safetensors"),
    (["clips", "x", "--checkpoint", "bare"], "bare/config.json: data .*num_frames.*image_size"),
    (["clips", "x", "--index", "here.idx"], "--index .*.safetensors.*here.idx"),
    (["clips", "x", "--export", "no/f.safetensors"], "--export .*no/f.safetensors"),
    (["clips", "x", "--export", INDEX], f"--export .*{INDEX}"),
])
def test_a_wrong_input_is_refused_in_one_line(cfg, checkpoints, capsys, args, message):
    os.mkdir("empty")
    write_json("bert/config.json", {"model_type": "bert"})
    write_json("bare/config.json", {"model": {}})
    shutil.copytree(checkpoints / "student", "student", ignore=shutil.ignore_patterns("*.safetensors"))
    os.mkdir("bad")
    shutil.copy("clips/notes.txt", "bad/bad.mp4")
    checkpoint = [] if "--checkpoint" in args else ["--checkpoint", cfg.checkpoint]
    code, _, err = command("search.py", [*args, *checkpoint, "--workers", "0"], capsys)
    assert_one_line("search.py", code, err, message)
    assert not os.path.exists(INDEX)


def test_the_command_searches(cfg, capsys):
    args = ["clips", *QUERIES, "--checkpoint", cfg.checkpoint, "--top", "2", "--workers", "1"]
    code, out, err = command("search.py", args, capsys)
    assert code == 0 and "Traceback" not in err, err
    lines = out.splitlines()
    assert re.match("clips: 12 of 12 videos .*14 segments; 12 new ", lines[0]) and len(lines) == 9
    assert [line.split("  (14 segments, ")[0] for line in lines[2::4]] == list(QUERIES)
    assert command("search.py", args, capsys)[1].splitlines()[3:5] == lines[3:5]


def test_help_shows_the_command(capsys):
    code, out, _ = command("search.py", ["--help"], capsys)
    assert code == 0 and out.startswith("usage: python search.py [-h] [OPTIONS] FOLDER [QUERY ...]")
