"""
search_page.py: what is on the page and in the app, that links lead to the files, and what is refused.

The tests of the app are skipped where gradio is absent, those in a browser where playwright or Chromium is
(pip install gradio playwright; apt-get install chromium).
"""

import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from importlib import metadata
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import numpy as np
import pytest
import torch
from helpers.browser import open_browser
from helpers.runs import ROOT, assert_one_line, command
from helpers.videos import timed, write, write_blocks
from PIL import Image

import search
import search_page
from files import escape_control
from search import Config, main
from search_page import Answer, Hit
from video import read_frames, write_video

HOSTILE = ["a b#c?d%41&e=f.mp4", "'single' \"double\".mp4", "<script>alert(1)</script> .mkv".replace("/", "\u2044"),
           "\x1b[31m\r\n\u202e.mp4", "\udcff\udcfe.mp4", "javascript:alert(1).mp4", "e\u0301\u00fc\u65e5.mp4",
           "{{value}} ${1+1} {title}.mp4", "back\\slash;,.mp4", "-o.mp4", "sub dir/#1/a..mp4", "moves.gif"]


class Page(HTMLParser):
    """The elements and texts of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.hits, self.texts, self.path = set(), [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag == "figure":
            self.hits.append({"text": ""})
        if tag in ("video", "img", "a"):
            self.hits[-1][tag] = attrs
        if tag not in ("meta", "img", "br"):
            self.path.append(tag)

    def handle_endtag(self, tag):
        assert self.path.pop() == tag

    def handle_data(self, data):
        if "figcaption" in self.path:
            self.hits[-1]["text"] += data
        elif self.path:
            self.texts.setdefault(self.path[-1], []).append(data)


def parse(path):
    with open(path, encoding="utf-8") as f:
        return Page(f.read())


def path_of_link(page, link):
    """The path that a browser opens for a link on the page at `page`, and the fragment."""
    url = urlsplit(urljoin("file://" + urllib.request.pathname2url(os.path.abspath(page)), link))
    assert (url.scheme, url.netloc, url.query) == ("file", "", "")
    return os.fsdecode(unquote_to_bytes(url.path)), url.fragment


def picture(address):
    """A data URI -> (H, W, 3) uint8."""
    assert address.startswith("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


@pytest.fixture
def cfg(first_run, tmp_path, monkeypatch):
    """
    Config that scores the folder `clips` by brightness. clips/half.mp4 is light from 8 to 12 s of 12, clips/dark.mp4 is
    4 s of darkness.
    """
    monkeypatch.chdir(tmp_path)
    brightness = lambda self, x: torch.stack([x.float().mean((1, 2, 3, 4)) / 255, torch.ones(len(x))], 1)
    monkeypatch.setattr(search.StudentEncoder, "encode_video", brightness)
    monkeypatch.setattr(search.StudentEncoder, "encode_text", lambda self, text: (torch.tensor([1.0, 0.0]), 2, 9))
    frames = np.full((24, 48, 64, 3), 20, np.uint8)
    frames[16:] = 235
    os.makedirs("clips")
    write_video("clips/half.mp4", frames, fps=2)
    write_video("clips/dark.mp4", frames[:8], fps=2)
    return Config("clips", ("light",), checkpoint=f"{first_run}/out/first", top=100, segment=4, workers=0, device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The page

def test_clips_begin_at_their_best_second(cfg, capsys):
    hits, = main(replace(cfg, html="found.html")).values()
    assert capsys.readouterr().out.endswith("page written to found.html\n")
    page = parse("found.html")
    assert [hit["video"]["src"] for hit in page.hits] == ["clips/half.mp4#t=8.0,12.0", "clips/dark.mp4#t=0.0"]
    assert [hit["a"]["href"] for hit in page.hits] == [hit["video"]["src"] for hit in page.hits]
    assert ["loop" in hit["video"] for hit in page.hits] == [False, True]
    assert [hit["text"] for hit in page.hits] == [f"1. {hits[0].score:.3f} half.mp4 0:08–0:12",
                                                  f"2. {hits[1].score:.3f} dark.mp4 0:00–0:04"]
    assert page.texts["h2"] == ["light"] and page.texts["h1"] == page.texts["title"] == ["Search in clips"]
    light, dark = (picture(hit["video"]["poster"]) for hit in page.hits)
    assert light.shape == (48, 64, 3) and light.min() > 220 and dark.max() < 35


@pytest.mark.parametrize("html", ["found.html", "clips/found.HTM", "other/deep & #1/found.html", "ABSOLUTE/found.html"])
def test_links_lead_to_files_with_hostile_names(cfg, html, tmp_path):
    html = html.replace("ABSOLUTE", str(tmp_path))
    os.makedirs(os.path.dirname(html) or ".", exist_ok=True)
    for name in HOSTILE:
        os.makedirs(os.path.dirname(f"clips/{name}"), exist_ok=True)
        if name.endswith("gif"):
            write_blocks(f"clips/{name}", 3, "gif", pix_fmt="rgb8")
        else:
            shutil.copy("clips/half.mp4", f"clips/{name}")
    hits, = main(replace(cfg, html=html)).values()
    page = parse(html)
    assert {hit.name for hit in hits} == {*HOSTILE, "half.mp4", "dark.mp4"} and len(page.hits) == len(hits)
    for hit, shown in zip(hits, page.hits, strict=True):
        element = shown["img" if hit.name.endswith("gif") else "video"]
        path, fragment = path_of_link(html, element["src"])
        assert path == f"{tmp_path}/clips/{hit.name}" and os.path.isfile(path)
        assert path_of_link(html, shown["a"]["href"]) == (path, fragment)
        assert fragment == ("t=8.0,12.0" if hit.parts == 3 else "" if hit.name.endswith("gif") else "t=0.0")
        assert not urlsplit(element["src"]).scheme and element["src"].isascii() and element["src"].isprintable()
        assert escape_control(hit.name) in shown["text"]
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "h1", "section", "h2", "div", "figure",
                         "video", "img", "figcaption", "b", "a"}


def test_the_page_is_found_again_after_it_moved_with_the_folder(cfg, tmp_path):
    main(replace(cfg, folder=str(tmp_path / "clips"), html="found.html"))
    os.mkdir("moved")
    for name in ("clips", "found.html"):
        os.rename(name, f"moved/{name}")
    for hit in parse("moved/found.html").hits:
        assert os.path.isfile(path_of_link("moved/found.html", hit["video"]["src"])[0])


def test_queries_are_escaped_and_nothing_is_fetched(cfg):
    queries = ("<script>alert('1')</script> & \"x\"", "</h2><img src=http://x.org/y onerror=a>", "{{x}} ${1+1} {title}",
               "a\x1b[31m\r\nring\u202e", "日本")
    main(replace(cfg, queries=queries, html="found.html"))
    page = parse("found.html")
    assert page.texts["h2"] == [escape_control(query) for query in queries]
    assert not page.tags & {"script", "img", "link", "iframe", "base"} and len(page.hits) == 10
    with open("found.html", encoding="utf-8") as f:
        text = f.read()
    assert not re.search(r"""(src|href|poster|url|import)\s*[=(]?\s*["'](https?:)?//|\son\w+=["']|\$\{|\{\{""", text)


def test_a_folder_with_a_hostile_name(cfg):
    folder = "f<b>\udcff\x1b#?%20&'\"{title}"
    os.rename("clips", folder)
    os.mkdir("pages")
    main(replace(cfg, folder=folder, html="pages/found\udcff.html"))
    page = parse("pages/found\udcff.html")
    assert page.texts["h1"] == [f"Search in {escape_control(folder)}"]
    assert path_of_link("pages/x.html", page.hits[0]["video"]["src"])[0] == os.path.abspath(f"{folder}/half.mp4")


def test_clips_play_by_themselves_unless_they_are_many(cfg):
    for count, expected in ((12, {"autoplay"}), (13, {"preload"})):                         # of 2 hits each
        main(replace(cfg, queries=("light",) * count, html="found.html"))
        hits = parse("found.html").hits
        assert len(hits) == 2 * count
        assert all(hit["video"].keys() & {"autoplay", "preload"} == expected for hit in hits)
        assert all({"muted", "controls"} <= hit["video"].keys() for hit in hits)


def test_a_threshold_leaves_out_lower_scores(cfg, capsys):
    hits, = main(cfg).values()
    high, low = (hit.score for hit in hits)
    capsys.readouterr()
    for threshold, count in ((low, 2), (np.nextafter(low, 1), 1), (high, 1), (np.nextafter(high, 1), 0), (-1, 2)):
        found, = main(replace(cfg, threshold=float(threshold), html="found.html")).values()
        out, page = capsys.readouterr().out, parse("found.html")
        assert found == hits[:count] and len(page.hits) == count == len(re.findall("clips/.*mp4", out))
        notes = page.texts.get("p", [])
        assert notes == ([f"no video has a score of at least {threshold:g}; the highest is {high:.3f}"] if not count
                         else []) and all(f"  {note}\n" in out for note in notes)


def test_a_query_that_was_cut_is_reported_on_the_page(cfg, monkeypatch):
    monkeypatch.setattr(search.StudentEncoder, "encode_text", lambda self, text: (torch.tensor([1.0, 0.0]), 12, 9))
    main(replace(cfg, html="found.html"))
    assert parse("found.html").texts["p"] == ["the query was cut: it has 12 tokens, the model reads 9"]


def test_a_preview_is_the_first_frame_of_the_segment(tmp_path):
    gap = timed(tmp_path / "gap.mp4", [0, 100, 200, 30000, 30100])
    for path, start, end, expected in ((gap, 0, 10, 0), (gap, 10, 20, 2), (gap, 20, 30, 2), (gap, 30, 40, 3),
                                       (write(tmp_path / "one.mp4", n=1), 0, 0, 0),
                                       (write(tmp_path / "fifty.mp4"), 2.5, 5, 25),
                                       (write(tmp_path / "wide.mp4", 3, shape=(360, 640)), 0.1, 0.3, 1)):
        image = np.asarray(Image.open(io.BytesIO(search_page.read_preview(path, start, end)))).astype(int)
        frame = read_frames(path, 0)[expected].permute(1, 2, 0).numpy().astype(int)
        assert image.shape == ((180, 320, 3) if "wide" in path else frame.shape)
        assert abs(image.mean() - frame.mean()) < 1.5, path


def test_a_clip_without_preview_says_why(cfg):
    os.remove("clips/dark.mp4")
    with open("clips/bad<b>.mp4", "wb") as f:
        f.write(b"no video")
    hits = [Hit(0.5, name, 0.0, 1.0, 1) for name in ("dark.mp4", "bad<b>.mp4", "half.mp4")]
    search_page.write_page("found.html", "clips", [Answer("x", hits, "", 3, 0.1)])
    gone, bad, intact = parse("found.html").hits
    assert gone["text"].endswith("no preview: clips/dark.mp4: no such file") and "poster" not in gone["video"]
    assert "no preview: clips/bad<b>.mp4: Invalid data" in bad["text"]
    assert "no preview" not in intact["text"] and "poster" in intact["video"]


def test_the_page_appears_whole_or_not_at_all(cfg, monkeypatch, capsys):
    args = ["clips", "x", "--checkpoint", cfg.checkpoint, "--workers", "0", "--html", "found.html"]
    assert command("search.py", args, capsys)[0] == 0
    before, files = open("found.html", "rb").read(), sorted(os.listdir())
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    args[1] = "another query"
    code, _, err = command("search.py", args, capsys)
    assert_one_line("search.py", code, err, "found.html could not be written .No space left.*; the file that was there")
    assert open("found.html", "rb").read() == before and sorted(os.listdir()) == files


@pytest.mark.parametrize("args, message", [
    (["x", "--html", "gone/found.html"], "--html must end in .html and be in an existing folder, got gone/found.html"),
    (["x", "--html", "clips/half.mp4"], "--html must .*, got clips/half.mp4"),
    (["x", "--html", "folder.html"], "--html must .*, got folder.html"),
    (["--html", "found.html"], "--html must come with at least one query"),
    (["x", "--html", "found.html", "--app"], "pass --html or --app, not both"),
    (["x", "--threshold", "nan"], "threshold must be from -1 to 1, got nan"),
    (["x", "--threshold", "1.5"], "threshold must be from -1 to 1, got 1.5"),
    (["--app", "--port", "65536"], "port must be from 0 to 65535, got 65536"),
    (["--app", "--port", "USED"], r"cannot be served at 127.0.0.1, port \d+ .Address already in use.*: pass another"),
    (["--app", "--host", "no..host"], "cannot be served at no..host, port 7860 .*: pass another"),
    (["--app", "--host", "192.0.2.1"], "cannot be served at 192.0.2.1, port 7860 .*: pass another"),
])
def test_a_wrong_input_is_refused_in_one_line(cfg, monkeypatch, capsys, args, message):
    """Before a video is decoded."""
    os.mkdir("folder.html")
    monkeypatch.setattr(metadata, "version", lambda name: "6.0.0")                          # of gradio
    with socket.create_server(("127.0.0.1", 0)) as used:
        args = [str(used.getsockname()[1]) if arg == "USED" else arg for arg in args]
        code, _, err = command("search.py", ["clips", *args, "--checkpoint", cfg.checkpoint, "--workers", "0"], capsys)
    assert_one_line("search.py", code, err, message)
    assert sorted(os.listdir()) == ["clips", "folder.html"] and os.path.getsize("clips/half.mp4") > 500


@pytest.mark.parametrize("version, message", [
    (None, "--app needs gradio: pip install gradio$"),
    ("5.49.1", "--app needs gradio 6 or later, got 5.49.1: pip install --upgrade gradio$"),
])
def test_one_line_says_how_to_get_gradio(cfg, monkeypatch, capsys, version, message):
    def installed_version(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed_version)
    code, _, err = command("search.py", ["clips", "--app", "--checkpoint", cfg.checkpoint], capsys)
    assert_one_line("search.py", code, err, message)
    assert os.listdir() == ["clips"]


# ---------------------------------------------------------------------------------------------------------------------
# The app

def test_the_app_answers_without_a_query_of_the_command(cfg, monkeypatch):
    """From an index that is up to date, so that nothing but the app needs the model. Needs no gradio."""
    hits, = main(cfg).values()
    loaded, made = [], []
    monkeypatch.setattr(search.StudentEncoder, "load", lambda self, device: loaded.append(device))
    monkeypatch.setattr(search_page, "check_gradio", lambda: None)
    monkeypatch.setattr(search_page, "listen", lambda host, port: (host, port))
    monkeypatch.setattr(search_page, "make_app", lambda *args: made.append(args))
    monkeypatch.setattr(search_page, "serve_app", lambda app, listener: made.append(listener))
    assert main(replace(cfg, queries=(), app=True)) == {} and len(loaded) == 1
    (folder, names, answer, *begin), listener = made
    assert (folder, names, begin) == ("clips", ["dark.mp4", "half.mp4"], [(), 100, -1.0])
    assert listener == ("127.0.0.1", 7860)
    for top, threshold, expected in ((5, -1, hits), (1, -1, hits[:1]), (5, 0.5, hits[:1]), (5, 1, [])):
        answers = answer(("light", "a second"), top, threshold)
        assert [(a.query, a.hits) for a in answers] == [("light", expected), ("a second", expected)]
    for queries, top, threshold, message in ((("light", "?!"), 5, -1, "at least one word, got '[?]!'"),
                                             (("light",), 0, -1, "top .*1.*0"), (("light",), 5, 2, "threshold .*2")):
        with pytest.raises(ValueError, match=message):
            answer(queries, top, threshold)

# Runs search.py and prints each address that it looks up or connects to.
AUDITED = """
import runpy, sys
def record(event, args):
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost"):
        print("looked up", args[0], flush=True)
    if event == "socket.connect" and not str(args[1][0]).startswith("127."):
        print("connected to", args[1], flush=True)
sys.addaudithook(record)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def app(first_run, tmp_path_factory):
    """The command with --app on a folder of four clips and other files -> (its address, the Config, its process)."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("app") / "clips"
    os.mkdir(folder)
    write_blocks(folder / "long.mp4", 50, rate=2)                                           # 25 s
    write_blocks(folder / "moves.gif", 9, "gif", pix_fmt="rgb8")
    write_blocks(folder / "odd.avi", 21, "mpeg4")                                           # which no browser plays
    write_blocks(folder / "tmp.mp4", 20)
    os.rename(folder / "tmp.mp4", folder / "\udcff\n<i>#?%41{{value}}.mp4")
    for name in ("notes.txt", ".hidden.mp4", "../secret.mp4"):
        (folder / name).write_bytes(b"secret")
    cfg = Config(str(folder), ("a red square", "two rings"), checkpoint=f"{first_run}/out/first", workers=0,
                 device="cpu")
    arguments = ["--checkpoint", cfg.checkpoint, "--workers", "0", "--device", "cpu", "--app", "--port", "0"]
    process = subprocess.Popen([sys.executable, "-c", AUDITED, f"{ROOT}/search.py", cfg.folder, cfg.queries[0],
                                *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"})
    try:
        lines = []
        while not lines or "serving at" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        yield lines[-1].split()[2], cfg, process
        with urllib.request.urlopen(f"{lines[-1].split()[2]}/gradio_api/heartbeat/tab"):    # as of an open tab
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGINT and not rest, rest
        assert not [line for line in lines if line.startswith(("looked up", "connected to"))], lines
    finally:
        process.kill()


def fetch(url, **headers):
    """GET -> status, headers, content."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_app_shows_the_hits_of_the_command(app):
    client = pytest.importorskip("gradio_client").Client(app[0], verbose=False)
    expected = main(app[1])
    page = Page(client.predict("\n a red square \n\ntwo rings", 5, -1, api_name="/search"))
    hits = [hit for query in app[1].queries for hit in expected[query]]
    assert page.texts["h2"] == ["a red square", "two rings"] and len(page.hits) == len(hits) == 8
    names = sorted(hit.name for hit in expected["two rings"])
    for hit, shown in zip(hits, page.hits, strict=True):
        assert f"{hit.score:.3f} {escape_control(hit.name)} " in shown["text"]
        source = shown["img" if hit.name.endswith("gif") else "video"]["src"]
        assert source.startswith(f"clips/{names.index(hit.name)}/")
        assert ("#t=" + (f"{hit.start:.3f}"[:4] if hit.parts > 1 else "0.0") in source) == ("gif" not in hit.name)
        status, headers, content = fetch(urljoin(app[0] + "/", source))
        with open(f"{app[1].folder}/{hit.name}", "rb") as f:
            assert (status, content) == (200, f.read())
        status, headers, content = fetch(urljoin(app[0] + "/", source), Range="bytes=5-14")
        assert status == 206 and len(content) == 10                                         # players jump
        if "video" in shown:
            status, headers, content = fetch(urljoin(app[0] + "/", shown["video"]["poster"]))
            assert headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(content)).size == (64, 48)
    low = min(hit.score for hit in expected["two rings"][:2])
    page = Page(client.predict("two rings", 2, low - 1e-6, api_name="/search"))
    assert [hit["text"].split()[0] for hit in page.hits] == ["1.", "2."]
    assert Page(client.predict("two rings", 5, 1, api_name="/search")).texts["p"][0].startswith("no video has a score")


@pytest.mark.parametrize("text, top, threshold, message", [
    ("", 5, -1, "write at least one query"),
    ("a dog\n?! <b>", 0, -1, "top must be at least 1"),
    ("a dog\n?!", 5, -1, "a query must have at least one word, got &#x27;[?]!&#x27;"),
    ("a dog", 5, 2, "threshold must be from -1 to 1, got 2"),
    ("a dog", None, -1, "give the number of videos"),
    ("a dog", 5, None, "give the number of videos and the lowest score"),
])
def test_the_app_says_what_is_wrong(app, text, top, threshold, message):
    client = pytest.importorskip("gradio_client").Client(app[0], verbose=False)
    with pytest.raises(Exception, match=message):
        client.predict(text, top, threshold, api_name="/search")
    assert "a dog" in client.predict("a dog", 1, -1, api_name="/search")


def test_the_app_sends_the_clips_of_the_index_alone_and_to_this_machine_alone(app):
    url, folder = app[0], app[1].folder
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(url.split(":")[2])), timeout=5)          # this machine, elsewhere
    for path in ("clips/4/x", "clips/-1/x", "clips/x/x", "clips/../secret.mp4", "clips/notes.txt", "notes.txt",
                 "previews/4?start=0&end=1", "previews/0?start=x&end=1", "clips/..%2F..%2Fsecret.mp4/x",
                 *(f"gradio_api/file={folder}/{name}" for name in ("notes.txt", "long.mp4", "../secret.mp4"))):
        status, _, content = fetch(f"{url}/{path}")
        assert status in (403, 404, 422) and b"secret" != content, path
    assert all(fetch(f"{url}/clips/{i}/x")[0] == 200 for i in range(4))
    status, headers, _ = fetch(url)
    assert status == 200 and headers["content-security-policy"].startswith("default-src 'self'")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def tab(browser):
    """A tab. At the end: no script of a name or a query ran, and nothing came from another server."""
    page, problems = browser.new_page(), []
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))
            or problems.append(request.url))
    yield page
    page.close()
    assert not problems


def played(tab):
    """File name -> (seconds at which it plays, error code) of the clips of the tab, when all have begun or failed."""
    tab.locator("video").first.wait_for()
    tab.wait_for_function("""[...document.querySelectorAll("video")].every(
        v => v.error || v.readyState >= 2 && v.currentTime > Number(v.src.split("#t=")[1].split(",")[0]))""")
    rows = tab.eval_on_selector_all(
        "video", "all => all.map(v => [v.src.split('#')[0].split('/').pop(), v.currentTime, v.error && v.error.code])")
    return {os.fsdecode(unquote_to_bytes(name)): (time, error) for name, time, error in rows}


QUERY = "<img src=x onerror=alert(1)> {{value}} ${alert(2)} 'q'"


def test_the_page_plays_in_a_browser(cfg, tab):
    write("clips/odd.avi", 9, "mpeg4")
    shutil.copy("clips/half.mp4", "clips/\udcff\n #?%41<script>alert(1)<script>.mp4")
    write_blocks("clips/moves.gif", 5, "gif", pix_fmt="rgb8")
    main(replace(cfg, queries=(QUERY,), html="found.html"))
    tab.goto(f"file://{os.path.abspath('found.html')}")
    clips = played(tab)
    assert clips.pop("odd.avi") == (0, 4)                                                   # its poster stays
    assert clips.keys() == {"half.mp4", "dark.mp4", "\udcff\n #?%41<script>alert(1)<script>.mp4"}
    assert all((8 < time < 12.5 if name != "dark.mp4" else time < 4.5) and not error
               for name, (time, error) in clips.items())
    assert tab.locator("h2").inner_text() == QUERY
    assert tab.eval_on_selector("img", "image => image.complete && image.naturalWidth") == 64


def test_the_app_in_a_browser(app, tab):
    tab.goto(app[0])
    assert played(tab).keys() >= {"long.mp4", "odd.avi"}                                    # the query of the command
    box = tab.get_by_label("Queries, one a line")
    assert box.input_value() == "a red square"
    box.fill(f"two rings\n{QUERY}")
    tab.get_by_role("button", name="Search").click()
    tab.get_by_role("heading", name="two rings").wait_for()
    assert tab.locator("h2").all_inner_texts() == ["two rings", QUERY]
    expected = {hit.name: hit for hit in main(replace(app[1], queries=("two rings", QUERY)))[QUERY]}
    clips = played(tab)
    assert clips.pop("odd.avi") == (0, 4) and clips.keys() | {"moves.gif", "odd.avi"} == expected.keys()
    time, error = clips["long.mp4"]
    assert expected["long.mp4"].start < time < expected["long.mp4"].end + 0.5 and not error
    tab.get_by_label("Lowest score, -1 to 1").fill("0.999")
    box.press("Shift+Enter")
    tab.locator(".note").nth(1).wait_for()
    assert tab.locator("video").count() == 0
    box.fill("?!")
    tab.get_by_role("button", name="Search").click()
    tab.get_by_text("a query must have at least one word, got '?!'").wait_for()
