"""Search against a loop over files and segments, the index against what changes, what search.py says and refuses."""

import json
import os
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_decoding import break_packets, cut, write
from test_teacher import shaken
from test_train import assert_one_line, command, first_run, small_sprites  # noqa: F401  (the last two are fixtures)

import data
import decoding
import search
from model import ClusterSTM
from search import Config, main
from teacher import SigLIP

QUERIES = ("a red square grows", "two blue rings")


# ---------------------------------------------------------------------------------------------------------------------
# Twelve clips and two checkpoints

def film(path, n, codec="libx264", shape=(48, 64), pix_fmt="yuv420p", rate=10, audio=False):
    """n frames of coloured blocks, other ones in each file and every third frame."""
    draw = np.random.default_rng(n)
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=rate, options={"bf": "2"} if codec == "libx264" else {})
        (stream.height, stream.width), stream.pix_fmt = shape, pix_fmt
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio else None
        for i in range(n):
            if i % 3 == 0:
                blocks = draw.integers(0, 256, (3, 4, 3)).repeat(shape[0] // 3 + 1, 0).repeat(shape[1] // 4 + 1, 1)
                picture = np.ascontiguousarray(blocks[:shape[0], :shape[1]], np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
        for i in range(n if audio else 0):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 1024 * i
            out.mux(sound.encode(silence))
        if audio:
            out.mux(sound.encode())


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
def filmed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filmed")
    for name, kind in FILES.items():
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        film(str(folder / name), **kind)
    for name in (".hidden.mp4", ".git/a.mp4", "notes.txt", "no_ending"):    # no videos
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        (folder / name).write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def models(first, tmp_path_factory):
    """Folder with `student` and `teacher`, their weights such that they tell clips apart."""
    folder = tmp_path_factory.mktemp("models")
    for name, source, kind in (("student", "first", ClusterSTM), ("teacher", "first/teacher", SigLIP)):
        shutil.copytree(f"{first}/out/{source}", folder / name)
        shaken(kind.from_pretrained(str(folder / name))).float().save(str(folder / name))
    return folder


@pytest.fixture
def there(filmed, models, tmp_path, monkeypatch):
    """In a folder of its own with the clips in `clips`: a Config that indexes them with the student, in this process"""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(filmed, "clips")                                        # and their times
    return Config("clips", QUERIES, checkpoint=str(models / "student"), top=100, workers=0, device="cpu")


@pytest.fixture
def read(monkeypatch):
    """The files that were decoded, as they are."""
    seen, real = [], decoding.chosen_frames

    def chosen_frames(path, choose):
        seen.append(os.path.relpath(path, "clips"))
        return real(path, choose)

    monkeypatch.setattr(decoding, "chosen_frames", chosen_frames)
    return seen


def scores(hits):
    return {query: {hit.name: hit.score for hit in some} for query, some in hits.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Scores and segments

def by_hand(cfg, kind, T):
    """query -> name -> (score, start, end) of the best segment, from files decoded whole and encoded one by one."""
    model = (ClusterSTM if kind == "student" else SigLIP).from_pretrained(cfg.checkpoint)
    found = {query: {} for query in cfg.queries}
    for name, made in FILES.items():
        frames = decoding.read_frames(f"clips/{name}", 0)
        times = decoding.frame_times(*decoding.open_video(f"clips/{name}"))[1]
        end = made["n"] / made.get("rate", 10) if made["n"] > 1 else 0
        parts = -int(-end // cfg.segment) if cfg.segment and end > cfg.segment else 1
        for part in range(parts):
            own = [i for i, t in enumerate(times) if end * part / parts <= t + 1e-6 < max(end, 1) * (part + 1) / parts]
            shown = frames[[own[i] for i in decoding.pick(T, len(own))]]
            with torch.no_grad():
                if kind == "student":
                    feature = model.encode_video(decoding.test_view(shown, 16)[None])[1][0]
                else:
                    units = [model.encode_image(model.preprocess(frame[None]))[1][0] for frame in shown]
                    feature = torch.stack(units).mean(0)
                for query in cfg.queries:
                    if kind == "student":
                        tokenizer = data.load_tokenizer(f"{cfg.checkpoint}/tokenizer.json")
                        text = model.encode_text(data.encode(tokenizer, [query], 24))[1][0]
                    else:
                        text = model.encode_text(model.tokenize([query]))[0]
                    new = ((feature @ text).item(), end * part / parts, end * (part + 1) / parts)
                    found[query][name] = max(found[query].get(name, new), new)
    return found


@pytest.mark.parametrize("kind, T, frames, segment, workers", [
    ("student", 4, 0, 10.0, 2), ("student", 3, 3, 0, 0), ("teacher", 8, 0, 10.0, 0), ("teacher", 2, 2, 1.2, 2),
])
def test_scores_are_those_of_a_loop_over_files_of_many_kinds(there, models, kind, T, frames, segment, workers):
    cfg = replace(there, checkpoint=str(models / kind), frames=frames, segment=segment, workers=workers, batch=5)
    hits, wanted = main(cfg), by_hand(cfg, kind, T)
    for query in QUERIES:
        assert {hit.name for hit in hits[query]} == FILES.keys()
        assert [hit.score for hit in hits[query]] == sorted((hit.score for hit in hits[query]), reverse=True)
        assert np.ptp([hit.score for hit in hits[query]]) > 0.02            # or it would show nothing
        for hit in hits[query]:
            assert (hit.score, hit.start, hit.end) == pytest.approx(wanted[query][hit.name], abs=2e-3), hit
            assert hit.score == pytest.approx(wanted[query][hit.name][0], abs=1e-4), hit
    assert {hit.name: hit.parts for hit in hits[QUERIES[0]]}["long.mp4"] == {10.0: 3, 0: 1, 1.2: 21}[segment]


def test_the_best_segment_is_the_one_that_shows_it(there, monkeypatch, capsys):
    pictures = np.full((24, 48, 64, 3), 20, np.uint8)
    pictures[16:] = 235
    os.makedirs("half")
    decoding.write_video("half/half.mp4", pictures, fps=2)                      # light from 8 to 12 s
    decoding.write_video("half/dark.mp4", pictures[:8], fps=2)
    light = lambda self, video: torch.stack([video.float().mean((1, 2, 3, 4)) / 255, torch.ones(len(video))], 1)
    monkeypatch.setattr(search.Student, "encode_video", light)
    monkeypatch.setattr(search.Student, "encode_text", lambda self, text: (torch.tensor([1.0, 0.0]), 2, 9))
    hits, = main(replace(there, folder="half", queries=("light",), segment=4)).values()
    found = [(hit.name, hit.start, hit.end, hit.parts) for hit in hits]
    assert found == [("half.mp4", 8, 12, 3), ("dark.mp4", 0, 4, 1)]
    assert hits[0].score > 0.8 > 0.2 > hits[1].score
    out = capsys.readouterr().out
    assert "  1   0." in out and "half/half.mp4  0:08-0:12\n" in out and out.endswith("half/dark.mp4\n")


@pytest.mark.parametrize("times, length, T, parts", [
    (np.arange(250) / 10, 10.0, 4, 3), (np.arange(250) / 10, 0, 4, 1), (np.arange(100) / 10, 10.0, 4, 1),
    (np.arange(108) / 10, 10.0, 4, 1), (np.arange(120) / 10, 10.0, 4, 2), (np.zeros(1), 10.0, 3, 1),
    (np.array([0, 0.1, 0.2, 30.0, 30.1]), 10.0, 2, 4), (np.array([0, 95000.0]), 10.0, 2, 2),
    (np.arange(3) / 10, 0.1, 2, 3), (np.arange(3600) / 10, 10.0, 8, 36),
])
def test_segments_are_equal_and_cover_the_video(times, length, T, parts):
    spans, picks = search.cut(times, length, T)
    assert len(spans) == parts and len(picks) == parts * T and (np.diff(picks) >= 0).all()
    assert spans[0][0] == 0 and spans[-1][1] >= times[-1] and all(a[1] == b[0] for a, b in pairwise(spans))
    assert np.ptp([end - start for start, end in spans]) < 1e-6
    for (start, end), some in zip(spans, picks.reshape(parts, T), strict=True):
        own = [i for i, t in enumerate(times) if start - 1e-6 <= t < end - 1e-6 or parts == 1]
        if own:
            assert set(some) <= set(own) and (len(own) < T or len(set(some)) == T)
        else:                                                               # what was on the screen then
            assert set(some) == {sum(times < start - 1e-6) - 1}


def test_frames_are_those_that_decode_gives(tmp_path):
    whole, intra = write(tmp_path / "whole.mp4", bf="3"), {"x264-params": "keyint=1:repeat-headers=0"}
    lost = break_packets(write(tmp_path / "lost.mp4", **intra), [0, 10, 30, 31, 49])
    worse = break_packets(write(tmp_path / "worse.mp4", **intra), range(20, 32))
    for picks in (range(50), [0, 0, 10, 10, 10, 31, 48], [49], [30, 49, 49]):
        for path in (whole, lost):
            some = decoding.chosen_frames(path, lambda _, p=picks: list(p))
            same = torch.stack([decoding.to_tensor(frame, None) for frame in some])
            assert torch.equal(same, decoding.read_frames(path, 0)[list(picks)])
    for path, message in ((worse, "worse.mp4: 12 of 50 frames do not decode"), ("no.mp4", "no.mp4: no such file")):
        with pytest.raises((ValueError, OSError), match=message):
            list(decoding.chosen_frames(str(path), lambda _: [24]))


def test_the_best_of_each_video_are_those_of_a_sorted_list():
    g = torch.Generator().manual_seed(0)
    parts = torch.randint(1, 6, (30,), generator=g).tolist()
    rows = [(f"{i}.mp4", k, k + 1, n) for i, n in enumerate(parts) for k in range(n)]
    values, found = torch.randn(sum(parts), generator=g), {}
    for value, (name, start, *_) in zip(values.tolist(), rows, strict=True):
        found[name] = max(found.get(name, (-9, 0)), (value, start))
    wanted = sorted(((value, name, start) for name, (value, start) in found.items()), reverse=True)
    for top in (1, 7, 100):
        hits = search.best(values, rows, top)
        assert [(hit.score, hit.name, hit.start) for hit in hits] == wanted[:top]
        assert all(hit.parts == parts[int(hit.name[:-4])] and hit.end == hit.start + 1 for hit in hits)


# ---------------------------------------------------------------------------------------------------------------------
# Index

def test_a_second_run_decodes_nothing_and_says_the_same(there, read, monkeypatch, capsys):
    first = main(there)
    assert sorted(read) == sorted(FILES) and "clips: 12 of 12 videos indexed" in capsys.readouterr().out
    read.clear()
    assert main(there) == first and main(replace(there, folder="clips/")) == first and not read
    os.mkdir("elsewhere")                                                   # a folder that moves takes its index along
    os.rename("clips", "elsewhere/clips")
    os.rename("clips.index.safetensors", "elsewhere/clips.index.safetensors")
    assert scores(main(replace(there, folder="elsewhere/clips"))) == scores(first) and not read
    monkeypatch.setattr(search.Student, "load", None)                       # without a query no weights are read
    assert main(replace(there, folder="elsewhere/clips", queries=())) == {}
    assert 'to search: python search.py elsewhere/clips "' in capsys.readouterr().out


def test_what_changed_is_decoded_and_what_is_gone_is_forgotten(there, read, capsys):
    before = scores(main(there))[QUERIES[0]]
    read.clear()
    os.utime("clips/odd.avi", (1, 1))
    os.remove("clips/flash.flv")
    shutil.copy("clips/stream.ts", "clips/sub/nine.webm")
    os.rename("clips/windows.wmv", "clips/renamed.wmv")
    after = scores(main(there))[QUERIES[0]]
    assert sorted(read) == ["odd.avi", "renamed.wmv", "sub/nine.webm"]
    assert "11 of 11 videos indexed, 13 segments; 3 new or changed, read in" in (out := capsys.readouterr().out), out
    assert "; 2 gone\n" in out
    assert after["renamed.wmv"] == pytest.approx(before.pop("windows.wmv"), abs=1e-5)
    assert after["sub/nine.webm"] == pytest.approx(before["stream.ts"], abs=1e-5) != before["sub/nine.webm"]
    read.clear()
    os.remove("clips/odd.avi")                                              # and when nothing is new
    assert "odd.avi" not in scores(main(there))[QUERIES[0]]
    with safe_open("clips.index.safetensors", "pt") as f:
        assert "odd.avi" not in f.metadata()["files"] and not read


def test_a_file_that_does_not_decode_is_listed_and_left_until_it_changes(there, read, capsys):
    with open("clips/broken.mp4", "wb") as f:
        f.write(b"no video at all")
    write("clips/silent.mp4", video=False, audio=True, n=5)
    break_packets(write("clips/damaged.mp4", **{"x264-params": "keyint=1"}), range(20, 32))    # known at its end only
    os.symlink("nowhere", "clips/link.mp4")
    os.mkdir("clips/folder.mp4")
    wanted = ["broken.mp4: Invalid data found when processing input", "damaged.mp4: 12 of 50 frames do not decode",
              "link.mp4: no such file", "silent.mp4: has no video stream"]
    for workers, seen in ((2, 0), (0, 0)):
        hits = main(replace(there, workers=workers))
        out = capsys.readouterr().out
        assert "clips: 12 of 16 videos indexed, 14 segments" in out
        assert all(f"{line}\n" in out for line in wanted) and out.count("not indexed: ") == 4
        assert len(hits[QUERIES[0]]) == 12 and len(read) == seen            # the first read them in other processes
    with open("clips/broken.mp4", "wb") as new, open("clips/stream.ts", "rb") as good:
        new.write(good.read())
    with open("clips/late.avi", "wb") as f:
        f.write(b"nor is this")
    assert "broken.mp4" in scores(main(there))[QUERIES[0]] and sorted(read) == ["broken.mp4", "late.avi"]
    for name in "abcd":
        shutil.copy("clips/late.avi", f"clips/{name}.avi")
    main(there)
    out = capsys.readouterr().out
    assert "d.avi: Invalid data" in out and "not indexed: 4 that failed before and have not changed\n" in out


def test_features_of_another_model_or_of_other_segments_are_not_mixed_in(there, models, read, capsys):
    main(there)
    for changes, said in [
        (dict(segment=5.0), "segment 10.0, now 5.0"), (dict(frames=2), "frames 4, now 2, segment 5.0, now 10.0"),
        (dict(checkpoint=str(models / "teacher")), "checkpoint .*student, now .*teacher, frames 2, now 8"),
    ]:
        read.clear()
        capsys.readouterr()
        main(replace(there, **changes))
        assert sorted(read) == sorted(FILES)
        out = capsys.readouterr().out
        assert re.search(f"clips.index.safetensors: it was made with {said}; all is ", out), out
    read.clear()
    shutil.copytree(models / "teacher", "copy")                             # the same weights, at another place
    main(replace(there, checkpoint="copy"))
    assert not read
    shaken(SigLIP.from_pretrained("copy"), seed=1).float().save("copy")     # other weights, at the same place
    main(replace(there, checkpoint="copy"))
    assert sorted(read) == sorted(FILES) and "teacher, now copy; all" in capsys.readouterr().out
    shaken(SigLIP.from_pretrained("copy"), seed=2).float().save("copy")
    main(replace(there, checkpoint="copy"))
    assert "made with checkpoint copy, which has changed; all" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_what_was_done_before_an_interruption_is_kept(there, read, monkeypatch, stop):
    wanted = main(replace(there, index="whole.safetensors"))
    read.clear()
    real = search.Student.encode_video

    def encode(self, video):
        if len(read) == 6:
            raise stop
        return real(self, video)

    with monkeypatch.context() as patch:
        patch.setattr(search.Student, "encode_video", encode)
        with pytest.raises((SystemExit, MemoryError)) as ended:
            main(replace(there, batch=1))
    if stop is KeyboardInterrupt:
        assert str(ended.value).startswith("search.py: interrupted; 5 of 12 new or changed videos are in the index")
    assert len(read) == 6 and sorted(os.listdir()) == ["clips", "clips.index.safetensors", "whole.safetensors"]
    done, read[:] = set(read[:5]), []
    again = main(replace(there, batch=1))
    assert set(read) == FILES.keys() - done
    for query in QUERIES:
        assert scores(again)[query] == pytest.approx(scores(wanted)[query], abs=1e-5)


def test_it_saves_on_the_way_and_never_half_a_video(there, monkeypatch):
    monkeypatch.setattr(search, "SAVE_EVERY", -1)
    saved, real = [], search.write_tensors

    def write_tensors(path, videos, **metadata):
        saved.append({name: (len(video.spans), len(video.features)) for name, video in videos.items()})
        real(path, videos, **metadata)

    monkeypatch.setattr(search, "write_tensors", write_tensors)
    main(replace(there, batch=2))
    assert [len(some) for some in saved] == [*range(1, 13), 12]
    assert all(some.get("long.mp4", (3, 3)) == (3, 3) for some in saved)


def test_a_decoding_process_that_dies_is_said_and_costs_no_other_file(there, monkeypatch):
    real = decoding.chosen_frames
    def chosen_frames(path, choose):
        if path.endswith("sound.mov"):
            os._exit(11)
        return real(path, choose)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "chosen_frames", chosen_frames)
        with pytest.raises(ValueError, match="a decoding process died .*, at one of .*sound.mov"):
            main(replace(there, workers=1, batch=1))
    with safe_open("clips.index.safetensors", "pt") as f:
        assert len(json.loads(f.metadata()["files"])) >= 3                  # of the 7 before it, less those under way


def test_a_damaged_index_is_made_anew_and_another_file_is_not_overwritten(there, read, capsys):
    wanted, index = main(there), "clips.index.safetensors"
    cut(index, 0.7)
    assert main(there) == wanted and len(read) == 24
    assert f"{index}: it is damaged (SafetensorError" in capsys.readouterr().out
    with safe_open(index, "pt") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    for damage in (dict(tensors, file=tensors["file"] + 1), dict(tensors, features=tensors["features"][1:])):
        save_file(damage, index, metadata)
        assert main(there) == wanted and "it is damaged (ValueError: its files and features" in capsys.readouterr().out
    save_file(tensors, index, {**metadata, "about": "[]"})
    assert main(there) == wanted and "it is damaged" in capsys.readouterr().out
    save_file(tensors, index)
    with pytest.raises(FileExistsError, match="clips.index.safetensors is there and is no index of search.py"):
        main(there)
    save_file(tensors, index, metadata)
    decoding.write_video("other.mp4", np.zeros((4, 32, 32, 3), np.uint8))
    os.mkdir("others")
    os.rename("other.mp4", "others/other.mp4")
    with pytest.raises(ValueError, match="index.safetensors is of another folder, none of its 12 files is in others"):
        main(replace(there, folder="others", index=index))
    assert main(there) == wanted


def test_what_is_exported_can_be_read_as_is_said(there, read):
    with open("clips/broken.mp4", "wb") as f:
        f.write(b"no video at all")
    hits = main(replace(there, export="features.safetensors"))
    reading = search.__doc__[search.__doc__.index("    with safe"):]
    names = {}
    exec("import json, safetensors\n" + "\n".join(line[4:] for line in reading.splitlines()), names)
    features, start, end, file = (names[key] for key in ("features", "start", "end", "file"))
    assert names["names"] == sorted(FILES) and features.shape == (14, 8) and features.dtype == torch.float32
    assert file.dtype == torch.int64 and file.tolist() == sorted([*range(12), 3, 3])
    assert torch.allclose(start[file == 3], torch.linspace(0, 25, 4, dtype=torch.float64)[:3]) and (end >= start).all()
    model = ClusterSTM.from_pretrained(there.checkpoint)
    ids = data.encode(data.load_tokenizer(f"{there.checkpoint}/tokenizer.json"), [QUERIES[0]], 24)
    with torch.no_grad():
        every = features @ model.encode_text(ids)[1][0]
    for hit in hits[QUERIES[0]]:
        assert every[file == names["names"].index(hit.name)].max().item() == pytest.approx(hit.score, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What it says and refuses

@pytest.mark.parametrize("kind, room", [("student", 23), ("teacher", 41)])
def test_queries_are_cleaned_and_one_that_is_too_long_is_said_to_be_cut(there, models, capsys, kind, room):
    cfg = replace(there, checkpoint=str(models / kind), top=1)
    short, loud, long = main(replace(cfg, queries=("a red square", "A red, SQUARE!", "red " * 50))).values()
    assert short == loud != long
    out = capsys.readouterr().out
    assert out.count("cut: ") == 1 and "  cut: the query has 50 word pieces, the model reads " in out


def test_names_that_are_no_text_are_searched_too(there, capsys):
    for name, source in ((b"\xff.mp4", "odd.avi"), (b"\xfe.mp4", "notes.txt")):
        shutil.copy(f"clips/{source}", os.fsencode("clips/") + name)
    args = ["clips", "a ring", "--checkpoint", there.checkpoint, "--top", "99"]
    for _ in range(2):
        code, out, err = command("search.py", args, capsys)
        assert code == 0 and "clips/\\udcff.mp4\n" in out and "not indexed: \\udcfe.mp4: Invalid data" in out, err


@pytest.mark.parametrize("args, message", [
    (["nowhere", "x"], "nowhere: no such folder"),
    (["empty", "x"], "empty: no video in it, of the endings .mp4 "),
    (["bad", "x"], "bad: none of its 1 files could be indexed"),
    (["clips", "a dog", " ?! "], "the query ' [?]! ' has no words"),
    (["clips", ""], "the query '' has no words"),
    (["clips", "x", "--top", "0"], "top 0: wants at least 1"),
    (["clips", "x", "--segment", "nan"], "segment nan: wants at least 0"),
    (["clips", "x", "--batch", "0"], "batch 0: wants at least 1"),
    (["clips", "x", "--device", "tpu"], "device wants to be auto, cpu or cuda, is 'tpu'"),
    (["clips", "x", "--checkpoint", "gone/away/far"], "gone/away/far is no folder .*; or give --checkpoint a fold"),
    (["clips", "x", "--checkpoint", "empty"], "empty is no folder of a trained model or a SigLIP: it has no"),
    (["clips", "x", "--checkpoint", "bert"], "bert/config.json: model_type wants to be 'siglip', where .* is 'bert'"),
    (["clips", "x", "--checkpoint", "student"], "student has no model.safetensors: is its run still under way"),
    (["clips", "x", "--checkpoint", "bare"], "bare/config.json: data wants to be the frames and size"),
    (["clips", "x", "--index", "here.idx"], "here.idx: wanted a name that ends in .safetensors"),
    (["clips", "x", "--export", "no/f.safetensors"], "no/f.safetensors: wanted a name .*, in a folder that is there"),
    (["clips", "x", "--export", "clips.index.safetensors"], "clips.index.safetensors is the index: export to another"),
])
def test_what_cannot_be_searched_says_so_in_one_line(there, models, capsys, args, message):
    for folder, config in (("empty", None), ("bert", {"model_type": "bert"}), ("bare", {"model": {}})):
        os.mkdir(folder)
        if config:
            with open(f"{folder}/config.json", "w") as f:
                json.dump(config, f)
    shutil.copytree(models / "student", "student", ignore=shutil.ignore_patterns("*.safetensors"))
    os.mkdir("bad")
    shutil.copy("clips/notes.txt", "bad/bad.mp4")
    chosen = [] if "--checkpoint" in args else ["--checkpoint", there.checkpoint]
    code, _, err = command("search.py", [*args, *chosen, "--workers", "0"], capsys)
    assert_one_line("search.py", code, err, message)
    assert not os.path.exists("clips.index.safetensors")


def test_the_command_searches(there, capsys):
    args = ["clips", *QUERIES, "--checkpoint", there.checkpoint, "--top", "2", "--workers", "1"]
    code, out, err = command("search.py", args, capsys)
    assert code == 0 and "Traceback" not in err, err
    lines = out.splitlines()
    assert lines[0].startswith("clips: 12 of 12 videos indexed, 14 segments; 12 new or changed, read in ")
    assert [line.split("  (14 segments, ")[0] for line in lines[2::4]] == list(QUERIES) and len(lines) == 9
    assert command("search.py", args, capsys)[1].splitlines()[3:5] == lines[3:5]
