"""Tar shards: which samples they have, that frames and runs equal those from files, and shards that are damaged."""

import builtins
import errno
import io
import json
import os
import shutil
import tarfile
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.benchmarks import load_json
from helpers.damage import damaged_copies
from helpers.runs import Killed, assert_same, kill, log, weights
from helpers.videos import ODD_IMAGES, ODD_VIDEOS, break_packets, cut, save_image, write, write_noise

import annotations
import data
import eval as evaluation
import media
import train
import video
from annotations import build_mapped_annotations, read_annotations
from data import ClipDataset, DataConfig
from encoders import TextEncoderConfig
from masking import MaskConfig
from media import Media, expand_shards, iter_samples, read_shard
from runtime import RunContext
from tasks import get_task, read_rows
from tokenizer import build_wordpiece, load_tokenizer

STRANGE = "a b,c:d,,:e%d"                           # characters that mean something in the addresses of libav


def write_shard(path, members, format=tarfile.GNU_FORMAT):
    """Write a tar file of (name, bytes or path of a file) -> its path."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            if isinstance(content, bytes):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                tar.add(content, name)
    return str(path)


def png(seed=0):
    file = io.BytesIO()
    save_image(file, seed, format="PNG")
    return file.getvalue()


def images(names, caption="a picture of {}"):
    """The members of samples as img2dataset writes them."""
    return [(f"{name}.{extension}", content) for i, name in enumerate(names) for extension, content in (
        ("png", png(i)), ("json", json.dumps({"caption": "of the json", "key": name}).encode()),
        ("txt", caption.format(name).encode()))]


def rows_of(pattern, max_lost=0.0, folder="out"):
    """(video, captions) of the mapped annotations of shards, and what is printed: their notes and lost_data."""
    mapped = build_mapped_annotations([(str(pattern), "")], str(folder), max_lost)
    return [(a.video, a.captions) for a in mapped], [*mapped.notes, *map(str, mapped.lost_data)]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The names of shards

@pytest.mark.parametrize("pattern, expected", [
    ("a.tar", ["a.tar"]),
    ("s{08..11}.tar", ["s08.tar", "s09.tar", "s10.tar", "s11.tar"]),
    ("s{8..11}.tar", ["s8.tar", "s9.tar", "s10.tar", "s11.tar"]),
    ("s{0..1}.tar", ["s0.tar", "s1.tar"]),
    ("s{000..1}.tar", ["s000.tar", "s001.tar"]),
    ("s{2..0}.tar", ["s2.tar", "s1.tar", "s0.tar"]),
    ("{x,y z}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y z/0.tar", "y z/1.tar"]),
    ("{7}.tar", ["{7}.tar"]),                                               # no alternatives
    ("{0..1}.tar", ["{0..1}.tar"]),                                         # if a file has that very name
])
def test_braces_are_expanded_as_in_webdataset(pattern, expected):
    for path in expected:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        open(path, "w").close()
    assert expand_shards(pattern) == expected
    assert DataConfig(train_file=pattern).cache_folder() == (os.path.dirname(expected[0]) or ".")


@pytest.mark.parametrize("pattern, match", [
    ("absent.tar", "1 of 1 shards are missing: absent.tar$"),
    ("s{0..4}.tar", "2 of 5 shards are missing: s1.tar, s3.tar$"),
    ("{0..x}.tar", "0..x"),
    ("{0..1..2}.tar", "0..1..2"),
    ("{0..999999999999}.tar", "at most 1048576 shards"),
    ("{0..99999}/{0..99999}.tar", "at most 1048576 shards, got 10000000000"),
    ("folder.tar", "missing: folder.tar$"),
])
def test_shards_that_do_not_exist_are_named(pattern, match):
    os.mkdir("folder.tar")
    for i in (0, 2, 4):
        open(f"s{i}.tar", "w").close()
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        rows_of(pattern)
    assert str(error.value).startswith(pattern) and "\n" not in str(error.value) and not os.path.exists("out")


@pytest.mark.parametrize("field", ["extra_videos", "image_corpora"])
def test_shards_stand_alone_where_a_file_has_its_folder(field):
    cfg = DataConfig(train_file="a{0..1}.tar", **{field: ("b=c/{0..9}.tar", "d.json=folder")})
    listed = [("b=c/{0..9}.tar", ""), ("d.json", "folder")]
    assert cfg.corpora(images=True) == (listed if field == "image_corpora" else [])
    assert cfg.corpora() == [("a{0..1}.tar", cfg.video_root), *(listed if field == "extra_videos" else [])]
    with pytest.raises(ValueError, match=f"data.{field} .*alone, got 'a.tar=folder'"):
        DataConfig(**{field: ("a.tar=folder",)})
    assert evaluation.Config(data="a.tar").data_root == ""


# ---------------------------------------------------------------------------------------------------------------------
# Samples

LONG = "folder/" * 20 + "000000003"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_are_the_members_with_one_key(format, tmp_path):
    key = "0" * 90 if format == tarfile.USTAR_FORMAT else LONG
    members = [
        ("folder", str(tmp_path / "folder")), *images(["000000000"]),
        ("1.en.vtt", b"words"), ("1.JSON", b'{"caption": ["One!", "two"], "clips": [[0, 5]], "start": 3}'),
        ("1.MP4", b"any bytes"), ("._1.png", b"macOS"), (".DS_Store", b"macOS"),
        ("日本.txt", b"\xef\xbb\xbfA dog."), ("日本.webp", png(5)), *images([key]), ("README", b"not a sample's")]
    os.mkdir("folder")
    path = write_shard("shards/00.tar", members, format)
    mapped = build_mapped_annotations([(path, "")], "out")
    assert [(a.video, a.captions) for a in mapped] == [
        ("shards/00.tar/000000000.png", ["a picture of 000000000"]), ("shards/00.tar/1.MP4", ["one", "two"]),
        ("shards/00.tar/日本.webp", ["a dog"]), (f"shards/00.tar/{key}.png", [f"a picture of {key}".replace("/", " ")])]
    assert mapped.notes == [f"{path}: 1 videos, 3 images"] and not mapped.lost_data
    assert list(mapped) == read_annotations(path, "")
    contents = dict(members)
    with open(path, "rb") as f:
        for a in mapped:
            assert a.media.path == path and (a.media.start, a.media.end) == (0, np.inf)
            f.seek(a.media.offset)
            assert f.read(a.media.num_bytes()) == contents[a.media.member]
    assert len({a.media_id for a in mapped}) == len({a.source for a in mapped}) == 4
    assert mapped[2].source == "shards/00.tar, shards/00.tar/日本"


def test_samples_that_lack_something_are_counted_and_listed(capsys):
    write_shard("00.tar", [*images("abc"), ("d.png", png()), ("e.txt", b"no picture"), ("f.png", png()),
                           ("f.jpg", png()), ("f.txt", b"two"), ("g.png", png()), ("g.txt", b"\xff\xfe")])
    texts = {"h": b"[1]", "i": b'{"caption": null}', "j": b'{"caption": 3}', "k": b'{"caption": "\\ud83d"}', "l": b"{",
             "m": b"[" * 10000, "n": b'{"caption": []}', "o": b'{"caption": "..."}'}
    write_shard("01.tar", [member for key, text in texts.items() for member in (
        (f"{key}.json", text), (f"{key}.png", png()))])
    rows, notes = rows_of("{00..01}.tar", 11 / 15)
    assert [video for video, _ in rows] == ["00.tar/a.png", "00.tar/b.png", "00.tar/c.png"]
    listed = ("5 with no caption (00.tar/d, 01.tar/h, 01.tar/i, 01.tar/j, 01.tar/n); 1 with no video or image "
              "(00.tar/e); 1 with several videos or images (00.tar/f); 4 with a text that is not valid UTF-8 or JSON "
              "(00.tar/g, 01.tar/k, 01.tar/l, 01.tar/m)")
    assert notes == ["{00..01}.tar: 0 videos, 4 images",
                     "{00..01}.tar: 1 of 4 captions have no words and are left out: 01.tar/o",
                     f"{{00..01}}.tar: 11 of 15 samples are left out: {listed}"]
    assert capsys.readouterr().out.splitlines() == notes
    assert rows_of("{00..01}.tar", 11 / 15) == (rows, notes)                # in a new run
    assert capsys.readouterr().out.splitlines() == notes
    for read, limit in ((lambda: rows_of("{00..01}.tar", 0.73), "data.max_unreadable is 0.73"),
                        (lambda: read_annotations("{00..01}.tar", ""), "none may be"),
                        (lambda: read_rows(get_task("msrvtt-caption"), "{00..01}.tar", "", False), "none may be")):
        with pytest.raises(ValueError) as error:
            read()
        assert str(error.value) == f"{{00..01}}.tar: 11 of 15 samples are left out ({limit}): {listed}"
    write_shard("none.tar", [(f"{i}.png", b"") for i in range(30)])
    with pytest.raises(ValueError, match=r"none.tar: no sample is left; none.tar: 30 of 30 .* no caption.*/19, \.\.\."):
        rows_of("none.tar", 1.0)


def test_evaluation_lists_captions_without_words(capsys):
    write_shard("a.tar", [*images("ab"), *images("c", "?!")[::2]])
    listed = []
    rows = read_rows(get_task("msrvtt-caption"), "a.tar", "", train=False, notes=listed)
    assert len(rows) == 2 and capsys.readouterr().out == ""
    assert listed == ["a.tar: 0 videos, 3 images", "a.tar: 1 of 3 captions have no words and are left out: a.tar/c"]


def test_names_with_several_dots_are_told_from_samples_without_a_video():
    write_shard("a.tar", [*images("abc"), ("vid7_7.5_10.0.mp4", b"video"), ("vid7_7.5_10.0.txt", b"words"),
                          ("d.thumb.JPG", b""), ("e.txt", b"words"), ("f.mp4", b"video"), ("f.thumb.jpg", b""),
                          ("f.txt", b"words")])
    rows, notes = rows_of("a.tar", 3 / 7)
    assert [video for video, _ in rows] == [f"a.tar/{name}" for name in ("a.png", "b.png", "c.png", "f.mp4")]
    assert notes == ["a.tar: 1 videos, 3 images", "a.tar: 3 of 7 samples are left out: 2 with a video or image with "
                     "several dots in its name, whose key ends at the first (a.tar/vid7_7, a.tar/d); 1 with no video "
                     "or image (a.tar/e)"]


def test_an_empty_txt_leaves_the_caption_of_the_json():
    texts = {"empty": b"", "spaces": b"\xef\xbb\xbf \n", "marks": b"?!", "words": b"words", "alone": b"", "null": b""}
    write_shard("a.tar", [member for key, text in texts.items() for member in (
        (f"{key}.png", png()), (f"{key}.txt", text), *[(f"{key}.json", json.dumps(
            {"caption": None if key == "null" else f"json {key}"}).encode())] * (key != "alone"))])
    rows, notes = rows_of("a.tar")
    assert rows == [(f"a.tar/{key}.png", [text]) for key, text in (
        ("empty", "json empty"), ("spaces", "json spaces"), ("marks", "json marks"), ("words", "words"))]
    assert notes[1:] == ["a.tar: 2 of 6 captions have no words and are left out: a.tar/alone, a.tar/null"]


def test_samples_of_shards_with_one_name_have_two_sources():
    for folder in "AB":
        write_shard(f"{folder}/0.tar", images("x"))
    rows = read_annotations("{A,B}/0.tar", "")
    assert [a.source for a in rows] == ["{A,B}/0.tar, A/0.tar/x", "{A,B}/0.tar, B/0.tar/x"]


def test_a_changed_shard_is_indexed_again():
    path = write_shard("00.tar", images("ab"))
    first = build_mapped_annotations([(path, "")], "out")
    assert build_mapped_annotations([(path, "")], "out").path == first.path
    write_shard("00.tar", images("bc"))
    other = build_mapped_annotations([(path, "")], "out")
    assert other.path != first.path and other.digest != first.digest and other[0].video == "00.tar/b.png"


# ---------------------------------------------------------------------------------------------------------------------
# Damaged shards

def damage(name, content):
    """The bytes of a shard of samples 0 to 9, damaged in the way that `name` says."""
    half, txt = content.index(b"5.png"), content.index(b"5.txt")            # headers of sample 5
    return {
        "before a caption": content[:txt], "a bad header of a caption": content[:txt] + b"?" + content[txt + 1:],
        "short": content[:half + 600], "between members": content[:half], "within a header": content[:half + 200],
        "without its end": content.rstrip(b"\0"), "a bad header": content[:half] + b"?" + content[half + 1:],
        "joined": content + content, "empty": b"", "no tar": b"words\n" * 1000,
    }[name]


@pytest.mark.parametrize("kind, left, match", [
    ("short", 5, "ends within 5.png"), ("between members", 5, "ends early, at byte"),
    ("within a header", 5, "ends early, at byte"), ("a bad header", 5, r"header at byte \d+ is damaged"),
    ("before a caption", 5, "ends early"), ("a bad header of a caption", 5, "header at byte"),
    ("joined", 10, "goes on after its end"), ("empty", 0, "no uncompressed tar.*empty"),
    ("no tar", 0, "no uncompressed tar"),
])
def test_damaged_shards_are_listed_and_used_up_to_the_damage(kind, left, match, capsys, monkeypatch):
    for i in range(10):
        write_shard(f"{i}.tar", images("0123456789"))
    for i in (3, 7):
        with open(f"{i}.tar", "rb") as f:
            content = f.read()
        with open(f"{i}.tar", "wb") as f:
            f.write(damage(kind, content))
    for read in (lambda: rows_of("{0..9}.tar"), lambda: rows_of("{0..9}.tar", 0.19),
                 lambda: rows_of("{0..9}.tar", 0.19), lambda: read_annotations("{0..9}.tar", ""),
                 lambda: read_rows(get_task("sprites"), "{0..9}.tar", "", train=False, missing=[])):
        with pytest.raises(ValueError, match=rf"2 of 10 shards are damaged, .*\(.*\): 3.tar: .*{match}.*; 7.tar: "
                                             f".*{match}") as error:
            read()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(annotations, "iter_rows", None)                     # the shards are not read again
    rows, notes = rows_of("{0..9}.tar", 0.2)
    expected = [f"{i}.tar/{k}.png" for i in range(10) for k in range(left if i in (3, 7) else 10)]
    assert [video for video, _ in rows] == expected and ["of the json"] not in [captions for _, captions in rows]
    assert len(notes) == 2 and "2 of 10 shards are damaged" in notes[1] and "3.tar: " in notes[1]
    assert notes[1] in capsys.readouterr().out
    with pytest.raises(ValueError, match="damaged"):
        rows_of("{0..9}.tar", 0.1)


@pytest.mark.parametrize("place", ["open", "header", "caption"])
def test_an_error_of_the_file_system_is_no_damage(place, monkeypatch):
    """It may pass, so nothing is kept of it; and the index is made when it has passed."""
    for name in ("0.tar", "1.tar"):
        write_shard(name, images("ab"))

    def fail_for(function):
        def fail(f, *args, **kwargs):
            name = os.readlink(f"/proc/self/fd/{f}") if isinstance(f, int) else getattr(f, "name", f)
            if name.endswith("1.tar"):
                raise OSError(errno.EIO, "Input/output error")
            return function(f, *args, **kwargs)
        return fail

    owner, name = {"open": (builtins, "open"), "header": (media, "iter_members"), "caption": (os, "pread")}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_for(getattr(owner, name)))
        for pattern in ("1.tar", "{0..1}.tar"):
            with pytest.raises(ValueError, match=r"^1.tar: the shard cannot be read \(.*Input/output error\)$"):
                rows_of(pattern, 1.0)
    assert os.listdir("out") == []
    rows, notes = rows_of("{0..1}.tar", 1.0)
    assert len(rows) == 4 and notes == ["{0..1}.tar: 0 videos, 4 images"]


def read_and_mark(path):
    """Read a shard, the first slowly, and leave a file that says which process read it; it may do so once."""
    time.sleep(0.2 * (path == "0.tar"))
    with open(f"{path}.read", "x") as f:
        f.write(str(os.getpid()))
    return read_shard(path)


def test_shards_are_read_by_several_processes_in_order_and_not_far_ahead(monkeypatch):
    for i in range(20):
        write_shard(f"{i}.tar", images(f"{i}{name}" for name in "ab"))
    paths = [f"{i}.tar" for i in range(20)]
    monkeypatch.setattr(media, "read_shard", read_and_mark)
    monkeypatch.setattr(media, "num_cpus", lambda: 3)
    results = media.read_shards(paths)
    first = next(results)
    time.sleep(0.1)
    assert sum(name.endswith(".read") for name in os.listdir(".")) <= 7     # 1 and twice as many as processes
    assert [first, *results] == [*map(read_shard, paths)]
    readers = {open(f"{path}.read").read() for path in paths}
    assert 1 < len(readers) <= 3 and str(os.getpid()) not in readers
    for path in paths:
        os.remove(f"{path}.read")
    abandoned = media.read_shards(paths)
    next(abandoned)
    abandoned.close()
    assert sum(name.endswith(".read") for name in os.listdir(".")) <= 7


def test_a_compressed_shard_is_refused():
    with tarfile.open("a.tar", "w:gz") as tar:
        tar.add(__file__, "a.txt")
    with pytest.raises(ValueError, match="a.tar: it is no uncompressed tar file"):
        rows_of("a.tar", 0.9)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_sample_is_lost_in_silence(format):
    """Wherever a byte is changed or the end is cut: each sample is there, or the damage or the sample is listed."""
    members = [(name, content if name.endswith("txt") else b"image") for name, content in images(
        ["a", "b", "x" * 120, "日", "c"])]
    intact = write_shard("intact.tar", members, format)
    expected = [(a.media.member, a.media.offset, a.media.size) for a in read_annotations(intact, "")]
    with open(intact, "rb") as f:
        content = f.read()
    lost = 0
    for i, damaged in enumerate(damaged_copies(content, 150)):
        with open(f"{i}.tar", "wb") as f:
            f.write(damaged)
        found, notes = [], []
        try:
            lost_data = []
            found += [(m.member, m.offset, m.size) for _, m, _ in iter_samples(f"{i}.tar", [], lost_data)]
            notes += map(str, lost_data)
        except ValueError as error:
            notes.append(str(error))
        assert found == expected or notes, i
        assert all(f"{i}.tar" in note and "\n" not in note for note in notes)
        lost += found != expected
    assert 150 < lost < 300


# ---------------------------------------------------------------------------------------------------------------------
# Frames

NOISE = {
    "open.ts": {"x264-params": "keyint=12:bframes=4:open-gop=1:scenecut=0"},
    "fields.mp4": {"x264-params": "keyint=15:tff=1"},
    "raw.h264": {"x264-params": "keyint=16"},
    "late.mp4": {"pts": lambda i: i - 17, "g": "12"},
    "late frames.mkv": {"codec": "libvpx", "deadline": "good", "cpu-used": "8", "g": "30", "lag-in-frames": "16",
                        "auto-alt-ref": "1"},
    "tiny.avi": {"codec": "mpeg4", "bf": "2", "g": "12"},
    "a.wmv": {"codec": "wmv2", "g": "12"},
    "a.mxf": {"codec": "mpeg2video"},
}


def all_files(folder):
    """Files of all ODD_VIDEOS, ODD_IMAGES, of further codecs, and damaged ones -> their names."""
    os.mkdir(folder)
    for writers in (ODD_VIDEOS, {f"image {name}": write_image for name, write_image in ODD_IMAGES.items()}):
        for name, write_file in writers.items():
            write_file(f"{folder}/{name}")
    for name, options in NOISE.items():
        write_noise(f"{folder}/{name}", n=50, **options)
    break_packets(write(f"{folder}/broken.mp4", n=50, g="1"), [13, 14])
    break_packets(write(f"{folder}/ruined.mp4", n=50, g="1"), range(10, 30))
    break_packets(write_noise(f"{folder}/headless.ts", n=50, g="10"), [0])
    for name in ("cut.mp4", "cut.mkv", "cut.ts"):
        cut(write_noise(f"{folder}/{name}", n=50), 0.7)
    cut(save_image(f"{folder}/cut.jpg", convert=lambda image: image.resize((400, 400))), 0.5)
    open(f"{folder}/empty.mp4", "w").close()
    with open(f"{folder}/words.mp4", "w") as f:
        f.write("words\n" * 99)
    shutil.copy(f"{folder}/a.flv", f"{folder}/a.tar.mp4")
    return sorted(os.listdir(folder))


def attempt(function, name):
    """The result of a function, or the message of its error without the name of the file."""
    try:
        return function()
    except (ValueError, OSError) as error:
        assert str(error).startswith(name)
        return str(error).removeprefix(name)


def test_frames_of_members_equal_those_of_files(tmp_path):
    names = all_files("files")
    path = write_shard(f"{tmp_path}/{STRANGE}/{STRANGE}.tar", [(name, f"files/{name}") for name in names])
    with tarfile.open(path) as tar:
        media = {m.name: Media(path, m.name, m.offset_data, m.size) for m in tar}
    failed = set()
    for name in names:
        again = Media.from_url(media[name].url)
        assert (again.path, again.offset, again.size) == (path, media[name].offset, media[name].size)
        for count, size in ((0, None), (3, 24), (7, None)):
            def select(times, count=count):
                return video.sample_frame_indices(count or len(times), len(times))

            whole, part = (attempt(lambda x=x, s=select, size=size: video.decode_frames(x, s, size), label)
                           for x, label in ((f"files/{name}", f"files/{name}"), (media[name], media[name].name)))
            if isinstance(whole, str):
                failed.add(name)
                assert whole == part or "damaged" in part, name
            else:
                assert torch.equal(whole, part), name
    assert failed == {"cut.mp4", "cut.jpg", "empty.mp4", "ruined.mp4", "words.mp4"}
    assert media["a.gif"].name == f"{path}/a.gif" and len(names) > 50


def test_a_member_is_opened_as_safely_as_a_file(monkeypatch, tmp_path):
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    path = write_shard("a.tar", [("a.mp4", b"ffconcat version 1.0\nfile b.mp4\n"), ("c.png", png()),
                                 ("b.ts", str(tmp_path / "list.m3u8"))])
    with tarfile.open(path) as tar:
        a, c, b = (Media(path, m.name, m.offset_data, m.size) for m in tar)
    for member in (a, b):
        with pytest.raises(ValueError, match=rf"^{member.name}: ."):
            video.read_frames(member, 1)
    monkeypatch.setattr(video, "MAX_PIXELS", 48 * 64 - 1)
    monkeypatch.setitem(video.OPTIONS, "max_pixels", str(48 * 64 - 1))
    with pytest.raises(ValueError, match="^a.tar/c.png: frames must have at most 3071 pixels"):
        video.read_frames(c, 1)
    os.remove("a.tar")
    with pytest.raises(FileNotFoundError, match="^a.tar: no such file"):
        video.read_frames(c, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and runs

def shard_up(rows, root, pattern, count):
    """Write the rows of an annotation file as shards in the same order, `count` samples each."""
    for shard, start in enumerate(range(0, len(rows), count)):
        members = []
        for i, row in enumerate(rows[start:start + count], start):
            members += [(f"{i:09}.mp4", f"{root}/{row['video']}"),
                        (f"{i:09}.json", json.dumps({"caption": row["caption"]}).encode())]
        write_shard(pattern.format(shard), members)


@pytest.fixture(scope="module")
def sprite_shards(sprites, tmp_path_factory):
    """Shards of 7 samples with the 24 training clips of the sprites, and one with their 6 validation clips."""
    folder = str(tmp_path_factory.mktemp("shards"))
    shard_up(load_json(f"{sprites}/sprites_train.json"), f"{sprites}/videos", folder + "/{:05}.tar", 7)
    shard_up(load_json(f"{sprites}/sprites_val.json"), f"{sprites}/videos", folder + "/val.tar", 99)
    return folder


def draw(annotations, cfg, tokenizer, rank, world, step=0, folder="."):
    """The micro-batches of a rank, those of a step in a list."""
    settings = SimpleNamespace(seed=3, task="", text=TextEncoderConfig(max_length=16), data=cfg, mask=MaskConfig())
    run = RunContext(settings, "", torch.device("cpu"), rank, world)
    dataset = ClipDataset(annotations, cfg, 3, cache_folder=folder)
    return list(data.iterate_micro_batches(run, dataset, tokenizer, "pretrain", 8, 2, step, 7))


@pytest.mark.parametrize("options", [dict(frame_cache=False), dict(frame_cache=False, num_workers=1), {}], ids=str)
def test_ranks_draw_the_same_samples_from_shards_as_from_files(sprites, sprite_shards, options):
    cfg = DataConfig(**{"num_frames": 4, "image_size": 32, "min_crop_scale": 0.5, "hflip": True, "num_views": 0,
                        **options})
    build_wordpiece(["a red square moves"], "tokenizer.json")
    tokenizer = load_tokenizer(".")
    files = build_mapped_annotations([(f"{sprites}/sprites_train.json", f"{sprites}/videos")], "out")
    shards = build_mapped_annotations([(sprite_shards + "/{00000..00003}.tar", "")], "out")
    expected = sum(draw(files, cfg, tokenizer, 0, 1), [])
    assert len(expected) == 28
    alone = sum(draw(shards, cfg, tokenizer, 0, 1), [])
    four = [draw(shards, cfg, tokenizer, rank, 4) for rank in range(4)]
    resumed = sum(draw(shards, cfg, tokenizer, 0, 1, step=5), [])
    dealt = [batch for step in zip(*four, strict=True) for group in step for batch in group]
    for batches, same in ((alone, expected), (dealt, expected), (resumed, expected[20:])):
        for a, b in zip(batches, same, strict=True):
            assert torch.equal(a.video, b.video) and torch.equal(a.text_ids, b.text_ids)
            assert (a.captions, a.seed, a.first_sample, a.skipped) == (b.captions, b.seed, b.first_sample, [])
            assert torch.equal(a.clip_ids, b.clip_ids) and torch.equal(a.view_ids, b.view_ids)


def test_an_unreadable_member_is_skipped_and_listed(sprites):
    shard_up(load_json(f"{sprites}/sprites_train.json")[:3], f"{sprites}/videos", "{}.tar", 3)
    with tarfile.open("0.tar") as tar, open("0.tar", "r+b") as f:
        f.seek(tar.getmember("000000001.mp4").offset_data)
        f.write(b"\xff" * 2000)
    annotations = build_mapped_annotations([("0.tar", "")], "out")
    cfg = DataConfig(frame_cache=False, num_frames=2, image_size=16, train_file="0.tar", max_unreadable=0.5)
    samples = [ClipDataset(annotations, cfg)[n] for n in range(3)]
    (record,) = [record for sample in samples for record in sample.skipped]
    assert record["where"] == "0.tar, 0.tar/000000001" and record["video"] == "0.tar/000000001.mp4"
    assert record["reason"].startswith("0.tar/000000001.mp4: ")
    cached = ClipDataset(annotations, replace(cfg, frame_cache=True))
    assert [cached[n].skipped for n in range(3)] == [sample.skipped for sample in samples]
    with pytest.raises(ValueError, match="^0.tar, 0.tar/000000001: .*1 of 3 videos cannot be read"):
        ClipDataset(annotations, replace(cfg, frame_cache=True, max_unreadable=0.3))


def test_a_run_on_shards_equals_one_on_files_killed_or_not(run_config, sprites, sprite_shards):
    flags = "--data.no-frame-cache --data.num-views 0 --steps 8 --unmasked-steps 2 --val-every 4 "
    train.main(run_config(f"{flags} --name files --data.val-file {sprites}/sprites_val.json"))
    flags += f"--data.train-file {sprite_shards}/{{00000..00003}}.tar --data.val-file {sprite_shards}/val.tar "
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 6)
        with pytest.raises(Killed):
            train.main(run_config(f"{flags} --name killed"))
    train.main(run_config(f"{flags} --name killed --resume"))
    assert_same(weights("out/killed"), weights("out/files"))
    assert log("out/killed") == log("out/files")
    scores = [[row for row in map(json.loads, open(f"out/{name}/log.jsonl")) if "val_T2V_R@1" in row]
              for name in ("killed", "files")]
    assert len(scores[0]) == 3
    recalls = [[{key: row[key] for key in row if key.startswith("val")} for row in rows] for rows in scores]
    assert recalls[0] == recalls[1]


def test_a_run_stops_if_too_many_shards_are_damaged(run_config, sprite_shards):
    for i in range(4):
        shutil.copy(f"{sprite_shards}/{i:05}.tar", f"{i}.tar")
    cut("2.tar", 0.5)
    flags = "--name a --data.train-file {0..3}.tar --steps 1 --unmasked-steps 0 --data.max-unreadable "
    with pytest.raises(ValueError, match=r"1 of 4 shards are damaged, .* \(data.max_unreadable is 0.2\): 2.tar: "):
        train.main(run_config(flags + "0.2"))
    train.main(run_config(flags + "0.25 --name b"))
    assert os.path.exists("out/b/model.safetensors")


def test_shards_are_evaluated_as_files_are(first_run, sprites, sprite_shards):
    results = [evaluation.main(evaluation.Config(checkpoint=f"{first_run}/out/first", out="scores.json", **options))
               for options in (dict(data=f"{sprites}/sprites_val.json", data_root=f"{sprites}/videos"),
                               dict(data=f"{sprite_shards}/val.tar"))]
    assert results[0]["scores"] == results[1]["scores"] and results[1]["videos"] == results[1]["captions"] == 6
    for task in ("sprites-qa", "sprites-mc"):
        with pytest.raises(ValueError, match="^.*/val.tar, .*/val.tar/000000000: \"(question|caption)\" must be"):
            read_rows(get_task(task), f"{sprite_shards}/val.tar", "", train=False)
    captions = read_rows(get_task("msrvtt-caption"), f"{sprite_shards}/val.tar", "", train=False)
    assert [a.captions for a in captions] == [[row["caption"]] for row in load_json(f"{sprites}/sprites_val.json")]


def test_shards_of_two_folders_have_their_own_results(first_run, sprite_shards, tmp_path):
    """Shards are nearly always called 00000.tar and so on."""
    checkpoint = shutil.copytree(f"{first_run}/out/first", tmp_path / "model")
    for name in ("a", "b"):
        os.makedirs(name)
        shutil.copy(f"{sprite_shards}/val.tar", f"{name}/00000.tar")
        evaluation.main(evaluation.Config(checkpoint=str(checkpoint), data=f"{name}/{{00000..00000}}.tar", rerank=0))
    results = sorted(path.name for path in checkpoint.glob("eval-*.json"))
    assert len(results) == 2 and [load_json(checkpoint / name)["annotations"][0] for name in results] == ["a", "b"]
