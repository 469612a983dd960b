"""
tools.demo_page: what the page says at each point of the demo, what it reads from the steps' files, that it fetches
nothing and escapes all names, and that its clips play (skipped where playwright or Chromium is absent).
"""

import base64
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.browser import open_browser
from helpers.runs import config
from helpers.videos import write_blocks
from PIL import Image

import eval as evaluation
import search_page
from files import escape_control, read_json
from masking import MaskConfig
from tools import demo_page
from tools.demo_page import DemoResults, FoundClip, MaskResult, Recall, Search

HOSTILE = "<script>alert(1)</script></p><img src=http://x.org/y onerror=alert(2)> \"'&{title}${1+1}\x1b[31m\u202e"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements and texts of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.path, self.texts, self.rows = [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.path

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.path.append(tag)

    def handle_endtag(self, tag):
        assert self.path.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.path}:
            self.rows[-1][-1] += data
        if self.path:
            self.texts.setdefault(self.path[-1], []).append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(data for tag, texts in self.texts.items() if tag != "style" for data in texts).split())


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results of a demo that has ended."""
    monkeypatch.chdir(tmp_path)
    search_page.read_preview.cache_clear()                                  # of another test's a.mp4
    for i, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        write_blocks(name, 8 + i, rate=8)
    for i, name in enumerate(("masks.png", "losses.png")):
        Image.fromarray(np.full((20, 30 + i, 3), 90, np.uint8)).save(name)
    cfg = replace(config("nowhere"), mask=MaskConfig(ratio=0.75), steps=7, batch=12, unmasked_steps=3)
    searches = [Search(f"query {q}", (1, 3, 40)[q], [
        FoundClip(0.9 - 0.1 * rank, name, 0.0, float("inf"), 1, f"caption {q} {rank}", rank + 1 == (1, 3, 40)[q])
        for rank, name in enumerate(("a.mp4", "b.mp4", "c.mp4"))]) for q in range(3)]
    masks = [MaskResult("Structured", Recall(55.93, 51.6, 60.2), Recall(22.1, 18.6, 25.8), Recall(50.6, 46.3, 54.9),
                        0.925, 0.38),
             MaskResult("Chance", Recall(29.5, 25.6, 33.4), Recall(43.9, 39.6, 48.2), Recall(48.4, 44.1, 52.7),
                        0.196, 0.06)]
    return DemoResults(3, cfg, 1234, 250, masks, "two rings", "masks.png", "losses.png", searches,
                       {"one": 61.0, "two": 2.4}, machine="no GPU, 2 cores")


def render(results):
    return Page(demo_page.format_page(results))


# ---------------------------------------------------------------------------------------------------------------------
# What the page says

def test_the_page_of_a_demo_that_has_ended(results):
    page = render(results)
    table, timings = page.rows[:3], page.rows[3:]
    assert [len(row) for row in table] == [5, 5, 5] and all(len(row) == 2 for row in timings)
    assert table[1] == ["Structured", "92 %", "55.9 %51.6 to 60.2", "22.1 %18.6 to 25.8", "50.6 %46.3 to 54.9"]
    assert table[2] == ["Chance", "20 %", "29.5 %25.6 to 33.4", "43.9 %39.6 to 48.2", "48.4 %44.1 to 52.7"]
    assert timings == [["Step", "Time"], ["one", "61 s"], ["two", "2 s"], ["all", "63 s"]]
    assert len(page.texts["h2"]) == 7 and page.texts["h1"] == page.texts["title"]
    N, K = results.N, results.K
    assert (N, K) == (16, 4) and f"the {N} tokens of a frame" in page.text and "only the 4 that" in page.text
    for phrase in ("1,234 drawn clips", "7 steps of 12 clips", "250 held-out clips", "Guessing gives 0.4 %",
                   "two rings", "no GPU, 2 cores",
                   "is 55.9 % with its kept tokens and 22.1 % with all; the Chance student’s is 43.9 %",
                   "38 % of the tokens that it keeps lie on an object, and 6 % of", "50.6 % against 48.4 %"):
        assert phrase in page.text, phrase
    assert "not yet" not in page.text and "running" not in page.text and "continued" not in page.text
    assert "The demo was stopped and continued" in render(replace(results, resumed=True)).text
    assert not [meta for meta in page.all("meta") if meta.get("http-equiv") == "refresh"]


def test_each_column_is_explained_in_a_sentence_below_the_table(results):
    text = demo_page.format_page(results)
    columns = Page(text).rows[0]
    items = [re.sub("<.*?>", "", item) for item in re.findall("<li>(.*?)</li>", text[text.index("</table>"):], re.S)]
    assert [item.partition(":")[0] for item in items[:5]] == columns
    assert all(len(item.partition(":")[2].split()) > 6 and item.endswith(".") for item in items[:5])


def test_pictures_and_clips_are_in_the_page(results):
    page = render(results)
    pictures = [attrs["src"] for attrs in page.all("img")]
    for path, source in zip(("masks.png", "losses.png"), pictures, strict=True):
        with open(path, "rb") as f:
            assert source == "data:image/png;base64," + base64.b64encode(f.read()).decode()
    videos = page.all("video")
    assert len(videos) == 9
    for video, name in zip(videos, 3 * ("a.mp4", "b.mp4", "c.mp4"), strict=True):
        with open(name, "rb") as f:
            assert video["src"] == "data:video/mp4;base64," + base64.b64encode(f.read()).decode()
        assert {"autoplay", "muted", "loop", "playsinline"} <= video.keys()
        assert video["poster"].startswith("data:image/jpeg;base64,")
    assert page.texts["h3"] == ["“query 0”", "“query 1”", "“query 2”"]
    figures = [attrs.get("class") for attrs in page.all("figure")]
    assert [i for i, name in enumerate(figures[2:]) if name == "correct"] == [0, 5]         # ranks 1 and 3; 40: none
    assert page.text.count("the clip of this caption") == 2 and page.text.count("another clip") == 7
    assert page.text.count("is ranked") == 1 and "is ranked 40." in page.text
    assert all(f"caption {q} {rank}" in page.text for q in range(3) for rank in range(3))


EMPTY = dict(masks_picture="", losses_picture="", searches=[], timings={}, machine="", clip_caption="")


def test_the_page_of_a_demo_that_is_running(results):
    """First nothing is known, then more and more. Each page says what is missing and loads itself again."""
    unknown = [MaskResult(mask.title) for mask in results.masks]
    shares = [MaskResult(mask.title, objects=mask.objects, on_object=mask.on_object) for mask in results.masks]
    half = [results.masks[0], replace(results.masks[1], after=None, before=None)]
    running = replace(results, running="step three", remaining=["step four", "step five"])
    sizes = []
    for masks, fields, pending, pictures in (
            (unknown, EMPTY, 8, 0), (shares, {**EMPTY, "masks_picture": "masks.png"}, 6, 1),
            (half, {"searches": []}, 2, 2), (results.masks, {}, 0, 2)):
        text = demo_page.format_page(replace(running, masks=masks, **fields))
        page = Page(text)
        assert page.text.count("not yet") == pending and len(page.all("img")) == pictures
        assert {"http-equiv": "refresh", "content": "10"} in page.all("meta")
        time = "63 s" if "timings" not in fields else "0 s"
        for phrase in (f"After {time}", "Now: step three.", "Still to come: step four; step five."):
            assert phrase in page.text, phrase
        assert ["step three", "running"] in page.rows and ["all, so far", time] in page.rows
        assert not re.search(r"\bNone\b|\bnan\b|\binf\b", page.text)
        sizes.append(len(text))
    assert sizes == sorted(sizes)
    assert "Still to come" not in render(replace(running, remaining=[])).text


def test_what_is_said_of_the_comparison_follows_the_figures(results):
    structured, other = results.masks
    for before, shown in ((60.0, False), (50.0, False), (22.0, True)):
        masks = [replace(structured, before=Recall(before, 0, 100)), other]
        text = render(replace(results, masks=masks)).text
        assert f"is 55.9 % with its kept tokens and {before} % with all; the Chance student’s is 43.9 %" in text
        assert ("So this run does not show it" in text) is not shown
    for missing in ("kept", "before"):
        page = render(replace(results, masks=[replace(structured, **{missing: None}), other]))
        assert "Before the unmasked stage, R@1" not in page.text and "The reason is proportion." in page.text


# ---------------------------------------------------------------------------------------------------------------------
# Safety and size

def test_hostile_texts_are_escaped(results):
    clean = render(results)
    hits = [FoundClip(0.5, "a.mp4", 0.0, 1.0, 1, HOSTILE, False)]
    hostile = replace(results, searches=[Search(HOSTILE, 9, hits)] * 3, clip_caption=HOSTILE, machine=HOSTILE,
                      timings={HOSTILE: 1.0}, running=HOSTILE, remaining=[HOSTILE],
                      masks=[replace(mask, title=HOSTILE) for mask in results.masks])
    page = render(hostile)
    shown = " ".join(escape_control(HOSTILE).split())
    assert page.text.count(shown) >= 12 and {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements}
    assert not [attr for _, attrs in page.elements for attr in attrs if attr.startswith("on")]
    assert len(page.all("img")) == 2


def test_nothing_is_fetched(results):
    text = demo_page.format_page(results)
    for tag, attrs in Page(text).elements:
        assert tag not in ("script", "link", "iframe", "base", "object", "a", "form")
        assert all(attrs[name].startswith("data:") for name in ("src", "poster", "href") if name in attrs)
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?:", text)


def test_the_page_is_small(results):
    """It has each picture and clip once, and little else: base64 adds a third."""
    files = sum(map(os.path.getsize, ("masks.png", "losses.png"))) + 3 * sum(
        os.path.getsize(hit.name) for hit in results.searches[0].hits)
    demo_page.write_page("report.html", results)
    assert files < os.path.getsize("report.html") < 1.4 * files + 60_000


def test_a_clip_without_preview_says_why_and_a_missing_file_is_an_error(results):
    with open("b.mp4", "wb") as f:
        f.write(b"no video")
    assert render(results).text.count("no preview: b.mp4: Invalid data") == 3
    for path, page in (("b.mp4", results), ("gone.png", replace(results, losses_picture="gone.png"))):
        if os.path.exists(path):
            os.remove(path)
        with pytest.raises(FileNotFoundError, match=path):
            demo_page.write_page("report.html", page)
        assert not os.path.exists("report.html")


# ---------------------------------------------------------------------------------------------------------------------
# What the steps have left

def test_the_results_are_those_of_the_evaluation(first_run, sprites, tmp_path, monkeypatch):
    """From what eval.py writes. Before it has written, nothing is known."""
    monkeypatch.chdir(tmp_path)
    masks, read = {"cluster_stm": "A", "random_frame": "B"}, lambda: demo_page.read_results(
        "demo", sprites, config(sprites), masks, {"A": 0.5}, {"B": 0.25}, seed=1, running="x")
    early = read()
    assert (early.train_clips, early.test_clips, early.seed, early.running) == (24, 12, 1, "x")
    assert early.masks == [MaskResult("A", objects=0.5), MaskResult("B", on_object=0.25)]
    assert not early.searches and not early.masks_picture and not early.losses_picture
    assert (early.seconds, early.resumed) == (0, False)
    shutil.copytree(f"{first_run}/out/first", "demo/cluster_stm")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("demo/losses.png")
    evaluation.main(evaluation.Config(checkpoint="demo/cluster_stm", data_root=sprites, workers=0, save_scores=True,
                                      out="demo/cluster_stm/after.json"))
    late = read()
    report = read_json("demo/cluster_stm/after.json")
    low, high = report["intervals"]["similarity"]["T2V"]["R@1"]
    value = report["scores"]["similarity"]["T2V"]["R@1"]
    assert late.masks == [MaskResult("A", after=Recall(value, low, high), objects=0.5), early.masks[1]]
    assert late.losses_picture == "demo/losses.png" and not late.masks_picture
    with open(f"{sprites}/sprites_test.json") as f:
        captions = {row["video"]: row["caption"] for row in json.load(f)}
    rows = list(captions)
    assert len(late.searches) == 3 and all(len(search.hits) == 3 for search in late.searches)
    for search, row in zip(late.searches, (0, 4, 8), strict=True):
        names = [os.path.relpath(hit.name, f"{sprites}/videos") for hit in search.hits]
        assert all(os.path.isfile(hit.name) for hit in search.hits)
        assert [hit.correct for hit in search.hits] == [name == rows[row] for name in names]
        assert search.query == captions[rows[row]] and [hit.caption for hit in search.hits] == \
            [captions[name] for name in names]
        assert [hit.correct for hit in search.hits].index(True) + 1 == search.rank if search.rank <= 3 else \
            not any(hit.correct for hit in search.hits)
    for field in ("kept", "before"):
        shutil.copy("demo/cluster_stm/after.json", f"demo/cluster_stm/{field}.json")
        assert getattr(read().masks[0], field) == late.masks[0].after
    assert "not yet" in render(replace(late, searches=[])).text


def test_searches_by_hand(tmp_path):
    """Two captions of one clip, two clips of one caption, ties, and fewer captions than searches."""
    similarity = np.array([[0.1, 0.9, 0.9, 0.2], [0.4, 0.3, 0.2, 0.1]], np.float32)         # (M, V)
    positives = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool)
    names = [evaluation.encode_names(x) for x in (["v0", "v\udcff", "v2", "v3"], ["one", "two"])]
    np.savez(tmp_path / "s.npz", similarity=similarity, positives=positives, videos=names[0], captions=names[1],
             **{"rank, T2V, similarity": np.array([2, 1])})
    first, second = demo_page.read_searches(tmp_path / "s.npz")
    assert (first.query, first.rank, second.query, second.rank) == ("one", 2, "two", 1)
    assert [(hit.name, hit.correct) for hit in first.hits] == [("v\udcff", False), ("v2", True), ("v3", False)]
    assert [(hit.name, hit.correct) for hit in second.hits] == [("v0", True), ("v\udcff", False), ("v2", False)]
    assert [hit.score for hit in second.hits] == [np.float32(x) for x in (0.4, 0.3, 0.2)]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

@pytest.mark.parametrize("width, scheme", [(1100, "light"), (360, "dark")])
def test_the_clips_play_in_a_browser(results, sprites, width, scheme):
    """Over and over, on a wide and on a narrow screen, which the page does not exceed; and nothing else is loaded."""
    clips = [f"{sprites}/videos/test_{i:05d}.mp4" for i in range(3)]
    for search in results.searches:
        search.hits = [replace(hit, name=name) for hit, name in zip(search.hits, clips, strict=True)]
    demo_page.write_page("report.html", results)
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": width, "height": 2000}, color_scheme=scheme)
        problems = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url))
        page.goto(f"file://{os.path.abspath('report.html')}")
        page.locator(".answer").nth(1).scroll_into_view_if_needed()
        again = page.evaluate("""Promise.race([
            Promise.all([...document.querySelectorAll("video")].map(v => new Promise(done => { v.onseeked = done; }))),
            new Promise(done => setTimeout(done, 20000, "late"))])""")                       # seeked: it begins again
        assert len(again) == 9
        assert page.eval_on_selector_all("video", "all => all.map(v => [v.error, v.videoWidth])") == 9 * [[None, 64]]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.eval_on_selector_all("img", "all => all.every(x => x.complete && x.naturalWidth)")
    assert not problems
