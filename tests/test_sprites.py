"""Sprites against what they claim to show; questions and choices against the true boxes; the files of a set."""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import data
import sprites
from data import read_frames
from sprites import choices, draw, plan, questions, write_sprites

# ---------------------------------------------------------------------------------------------------------------------
# Drawing

GOLDEN = [(0, "train", 0), (0, "train", 4), (0, "test", 0), (0, "test", 9), (3, "train", 7)]


def test_a_clip_is_the_same_on_every_machine():
    seen = hashlib.sha256()
    for clip in GOLDEN:
        drawn = draw(*clip)
        seen.update(drawn.frames.tobytes() + drawn.caption.encode())
    assert seen.hexdigest()[:16] == "952bebc69de51c36"


def test_a_clip_depends_on_its_three_numbers_alone():
    first = [draw(*clip) for clip in GOLDEN]
    sprites.held_out_plans.cache_clear()                                    # and not on what was drawn before
    np.random.seed(1)
    for clip, a in zip(reversed(GOLDEN), reversed(first), strict=True):
        b = draw(*clip)
        assert (a.frames == b.frames).all() and (a.boxes == b.boxes).all() and a.caption == b.caption
    pictures = {draw(*clip).frames.tobytes() for clip in [*GOLDEN, (1, "train", 0), (0, "train", 1)]}
    assert len(pictures) == 7


def test_boxes_hold_all_that_the_sprites_change_and_little_else():
    pixel = np.arange(sprites.SIZE)
    for i in range(40):
        drawn, without = draw(0, "train", i), draw(0, "train", i, sprites=False)
        assert (without.boxes == drawn.boxes).all() and without.caption == drawn.caption
        changed = abs(drawn.frames.astype(int) - without.frames).max(-1) > 0               # (T, H, W)
        inside = np.zeros_like(changed)
        for t, boxes in enumerate(drawn.boxes):
            for x0, y0, x1, y1 in boxes:
                window = np.ix_((pixel + 1.5 > y0) & (pixel - 0.5 < y1), (pixel + 1.5 > x0) & (pixel - 0.5 < x1))
                inside[t][window] = True                                    # half a pixel around the box is blended
                ys, xs = np.nonzero(changed[t][window])
                assert np.ptp(ys) > y1 - y0 - 2 and np.ptp(xs) > x1 - x0 - 2               # and the box is not too big
        assert not changed[~inside].any()


def test_sprites_have_their_colour_stay_inside_and_move_as_they_are_said_to():
    seen = set()
    for i in range(150):
        drawn = draw(0, "train", i)
        assert (drawn.boxes >= 0).all() and (drawn.boxes <= sprites.SIZE).all()
        for k, o in enumerate(drawn.objects):
            box = drawn.boxes[:, k]                                         # (T, 4)
            centre, width = (box[:, :2] + box[:, 2:]) / 2, box[:, 2] - box[:, 0]
            step = np.diff(centre, axis=0)                                  # (T - 1, 2)
            direction = sprites.MOTIONS[o["motion"]]
            if direction:
                along = step @ direction
                assert along.min() > 2.4 and along.max() < 4.1 and abs(step - along[:, None] * direction).max() < 1e-3
            elif o["motion"] == "moves in a circle":
                assert np.hypot(*step.T).min() > 4 and abs(centre[0] - centre[4]).max() > 8
            elif o["motion"] == "grows":
                assert (np.diff(width) > 0).all() and width[-1] > 2 * width[0] and abs(step).max() < 1
            else:
                assert abs(step).max() == 0 and np.ptp(width) == 0
            seen |= set(o.values())
            if len(drawn.objects) == 1:                                     # none may hide it
                changed = abs(drawn.frames.astype(int) - draw(0, "train", i, sprites=False).frames).max(-1) > 0
                off = abs(drawn.frames - np.array(sprites.COLOURS[o["colour"]], float)).max(-1)
                assert (off[changed] < 30).mean() > 0.25                    # the rest is edge, blended
    assert seen == {*sprites.SHAPES, *sprites.COLOURS, *sprites.SIZES, *sprites.MOTIONS}


def test_each_shape_has_its_distance_and_its_extent():
    at = np.linspace(-10, 10, 401)
    areas = {}
    for shape, extent in sprites.SHAPES.items():
        inside = sprites.distance(shape, at[None], at[:, None], 5.0) < 0    # (y, x)
        ys, xs = np.nonzero(inside)
        np.testing.assert_allclose([at[xs.min()], at[ys.min()], at[xs.max()], at[ys.max()]], 5 * np.array(extent),
                                   atol=0.11)
        areas[shape] = inside
    for a in areas:                                                         # no two are alike
        for b in areas:
            assert a == b or (areas[a] ^ areas[b]).sum() > 0.15 * min(areas[a].sum(), areas[b].sum())


def test_held_out_clips_mean_nothing_that_was_seen_in_training_or_before():
    train, test = ([plan(0, split, i) for i in range(count)] for split, count in (("train", 4096), ("test", 640)))
    for text in (sprites.Plan.meaning, sprites.Plan.caption):
        unseen = {text(p) for p in test}
        assert len(unseen) == 640 and not unseen & {text(p) for p in train}
    by_caption = {}
    for p in train + test:                                                  # a caption says all there is to say
        assert by_caption.setdefault(p.caption(), p.meaning()) == p.meaning()
        kinds = [(o["shape"], o["colour"]) for o in p.objects]
        assert len(set(kinds)) == len(kinds) <= 3
        assert data.clean(p.caption()) == p.caption() and len(p.caption().split()) < 40
    sprites.held_out_plans.cache_clear()
    assert plan(0, "test", 40).caption() == test[40].caption() != plan(1, "test", 40).caption()


def test_the_meaning_ignores_order_and_words_and_the_still_caption_ignores_motion():
    p = next(p for p in (plan(0, "train", i) for i in range(50)) if len(p.objects) == 2)
    other = replace(p, objects=p.objects[::-1], template=(p.template + 1) % len(sprites.TEMPLATES))
    assert other.meaning() == p.meaning() and other.caption() != p.caption()
    moved = replace(p, objects=[dict(p.objects[0], motion="other"), p.objects[1]])
    assert moved.meaning() != p.meaning() and moved.still() == p.still()
    p = sprites.Plan([{"shape": "square", "colour": "red", "size": "small", "motion": "moves down"},
                   {"shape": "circle", "colour": "white", "size": "large", "motion": "grows"}], "plain", "brown", 0)
    assert p.caption() == "a small red square moves down while a large white circle grows on a plain brown background"
    assert p.still() == "a small red square and a large white circle"


# ---------------------------------------------------------------------------------------------------------------------
# Questions and choices, each read as text and answered by a loop over the objects and their true boxes

REFERENCE = r"(?P<size>small|large)? ?(?P<colour>\w+)? ?\b(?P<shape>\w+)"
ASKED = {
    "colour": ["what colour is the REF", "what is the colour of the REF", "which colour does the REF have"],
    "shape": ["what shape is the REF", "what is the shape of the REF", "which shape does the REF have"],
    "count": ["how many objects (are there|are in the video|can be seen)"],
    "motion": ["how does the REF move", "how is the REF moving", "in what way does the REF move"],
    "order": [r"(which object|which of the objects|what) is (?P<place>\w+( \w+)?) at the (?P<time>start|end)"],
}
PLACES = {                                         # axis of the centre, and whether the larger is ahead
    "further left": (0, False), "furthest left": (0, False), "further right": (0, True), "furthest right": (0, True),
    "higher": (1, False), "highest": (1, False), "lower": (1, True), "lowest": (1, True),
}


def asked_of(seed, split, index):
    return questions(draw(seed, split, index), np.random.default_rng((seed, sprites.SPLITS[split], index, 2)))


def read_question(row):
    """The type that the wording has, and the words that it was filled with."""
    read = [(kind, match.groupdict()) for kind, wordings in ASKED.items() for wording in wordings
            if (match := re.fullmatch(wording.replace("REF", REFERENCE) + r"\?", row["question"]))]
    assert len(read) == 1 and read[0][0] == row["type"]
    return {key: word for key, word in read[0][1].items() if word and word != "object"}


def meant(words, objects):
    """The objects that these words fit."""
    return [k for k, o in enumerate(objects) if all(o[key] == word for key, word in words.items())]


def ahead(boxes, place):
    """boxes (objects, 4) at one time -> the object there, and by how many pixels."""
    axis, larger = PLACES[place]
    at = [float(box[axis] + box[axis + 2]) / 2 * (1 if larger else -1) for box in boxes]
    first = max(range(len(at)), key=lambda k: at[k])
    return first, min(at[first] - other for k, other in enumerate(at) if k != first)


@pytest.mark.parametrize("split, count", [("train", 300), ("test", 100)])
def test_each_question_has_the_one_answer_that_the_clip_shows(split, count):
    known, wordings, answers = sprites.answer_list(), {}, {}
    assert known == sorted(set(known))
    for i in range(count):
        drawn, rows = draw(0, split, i), asked_of(0, split, i)
        objects = drawn.objects
        moved, times = [], []
        for row in rows:
            assert set(row) == {"question", "answer", "type"} and row["answer"] in known
            words, kind, answer = read_question(row), row["type"], row["answer"]
            wordings.setdefault(kind, set()).add(row["question"].split(" the ")[0])
            answers.setdefault(kind, set()).add(answer)
            if kind == "count":
                assert ["one", "two", "three"].index(answer) + 1 == len(objects)
            elif kind == "order":
                place, time = words["place"], words["time"]
                (start, by), (end, by_then) = ahead(drawn.boxes[0], place), ahead(drawn.boxes[-1], place)
                o = objects[start if time == "start" else end]
                assert answer == f"{o['colour']} {o['shape']}" and start != end and min(by, by_then) > 3.99
                assert (place in ("further left", "further right", "higher", "lower")) == (len(objects) == 2)
                times.append((place, time))
            else:
                found = meant(words, objects)
                assert len(found) == 1 and kind not in words                # one object, and the answer is not said
                o = objects[found[0]]
                if "size" in words:                                         # what grows is not told by its size
                    del words["size"]
                    assert all(objects[k]["motion"] != "grows" for k in meant(words, objects))
                    assert len(meant(words, objects)) > 1                   # and the size was needed
                if kind == "motion":
                    said = {"grows": "it grows", "stays still": "not at all"}
                    assert answer == said.get(o["motion"], o["motion"].removeprefix("moves "))
                    moved.append(found[0])
                else:
                    assert answer == o[kind]
        assert sorted(moved) == list(range(len(objects)))                   # the motion of each
        assert len(set(times)) == len(times) <= 4 and {(place, "end") for place, _ in times} <= set(times)

        possible = {"count", "motion"}                                      # what can be asked is asked
        for kind, key in (("colour", "shape"), ("shape", "colour")):
            for o in objects:
                alike = [p for p in objects if p[key] == o[key]]
                same = [p for p in alike if p["size"] == o["size"]]
                if len(alike) == 1 or len(same) == 1 and not [p for p in alike if p["motion"] == "grows"]:
                    possible.add(kind)
        for place in ("further left", "further right", "higher", "lower") if len(objects) > 1 else ():
            (start, by), (end, by_then) = ahead(drawn.boxes[0], place), ahead(drawn.boxes[-1], place)
            if start != end and min(by, by_then) >= 4:
                possible.add("order")
        kinds = Counter(row["type"] for row in rows)
        assert set(kinds) == possible and kinds["colour"] <= 1 and kinds["shape"] <= 1 and kinds["count"] == 1
    assert all(len(wordings[kind]) >= 2 for kind in ASKED)
    assert split == "test" or all(answers[kind] == {*named} for kind, named in (
        ("colour", sprites.COLOURS), ("shape", sprites.SHAPES), ("count", ["one", "two", "three"]),
        ("motion", ["left", "right", "up", "down", "in a circle", "it grows", "not at all"])))


def test_a_question_asks_nothing_that_could_be_answered_twice():
    one = {"size": "small", "motion": "moves left"}
    red, blue = {"colour": "red", "shape": "ring", **one}, {"colour": "blue", "shape": "ring", **one}
    boxes = np.zeros((8, 2, 4), np.float32)

    def asked(*objects):
        drawn = sprites.Drawn(None, "", "", boxes[:, :len(objects)], list(objects))
        rng = np.random.default_rng(0)
        return {row["answer"] for _ in range(20) for row in questions(drawn, rng) if row["type"] == "colour"}

    assert asked(red) == {"red"} and asked(red, blue) == set()
    assert asked(red, {**blue, "size": "large"}) == {"red", "blue"}
    assert asked({**red, "motion": "grows"}, {**blue, "size": "large"}) == set()
    assert asked(red, {**blue, "shape": "bar"}) == {"red", "blue"}


@pytest.mark.parametrize("by, times", [(3.9, 0), (4.0, 4)])
def test_an_order_is_asked_only_where_it_is_clear(by, times):
    kinds = [{"colour": colour, "shape": "ring", "size": "small", "motion": "grows"} for colour in ("red", "cyan")]
    boxes = np.zeros((8, 2, 4), np.float32)                                 # in between it does not matter
    boxes[0, 1], boxes[-1, 0] = [by, 0, by, 0], [10, 0, 10, 0]              # red is left of cyan, then right of it
    rows = questions(sprites.Drawn(None, "", "", boxes, kinds), np.random.default_rng(0))
    rows = [row for row in rows if row["type"] == "order"]
    assert len(rows) == times
    for row in rows:
        at = read_question(row)
        assert row["answer"] == ("red ring" if (at["place"], at["time"]) in
                                 (("further left", "start"), ("further right", "end")) else "cyan ring")


SAYS = {                                           # of an object, of the background
    ("size", "colour", "shape", "motion"):
        r"a (small|large) (\w+) (\w+)(?: that| which)? (moves in a circle|moves \w+|grows|stays still)",
    ("texture", "tone"): r"a (\w+) (\w+) background",
}


def read_caption(text):
    """-> what the caption says, {(key, which of the objects): word}, and its wording with gaps for that."""
    said = {(key, k): word for keys, pattern in SAYS.items() for k, words in enumerate(re.findall(pattern, text))
            for key, word in zip(keys, words, strict=True)}
    for word in sorted(said.values(), key=len, reverse=True):               # "moves in a circle" before "circle"
        text = text.replace(word, "_")
    return said, text


def test_the_other_choices_are_each_wrong_in_one_thing():
    places, wrong = Counter(), Counter()
    for i in range(400):
        shown, rng = plan(0, "test", i), np.random.default_rng((0, 1, i, 3))
        captions, right = choices(shown, rng)
        true, wording = read_caption(captions[right])
        assert captions[right] == shown.caption() and len(captions) == 5 and len(set(captions)) == 5
        assert true == {("texture", 0): shown.texture, ("tone", 0): shown.tone,
                        **{(key, k): word for k, o in enumerate(shown.objects) for key, word in o.items()}}
        places[right] += 1
        changed = []
        for caption in captions[:right] + captions[right + 1:]:
            said, worded = read_caption(caption)
            assert worded == wording and said.keys() == true.keys() and data.clean(caption) == caption
            (key, k), = (where for where in true if said[where] != true[where])
            changed.append(key)
            assert said[key, k] in {**sprites.SHAPES, **sprites.COLOURS, **sprites.SIZES, **sprites.MOTIONS,
                                    **dict.fromkeys(sprites.TEXTURES), **sprites.TONES}
            kinds = [(said["shape", j], said["colour", j]) for j in range(len(shown.objects))]
            assert len(set(kinds)) == len(kinds)                            # nor is it true of another object
            if true["motion", k] == "grows" and key in ("size", "motion"):  # it is both small and large, in one place
                assert key == "motion" and said[key, k] != "stays still"
        wrong.update(changed)
        changed = [{"size": "shape", "tone": "texture"}.get(key, key) for key in changed]
        assert sorted(changed) == ["colour", "motion", "shape", "texture"]
    assert set(places) == set(range(5)) and all(55 < n < 105 for n in places.values())
    assert all(120 < wrong[key] < 280 for key in ("size", "shape", "texture", "tone"))


def test_questions_and_choices_are_the_same_on_every_machine():
    seen = hashlib.sha256()
    for seed, split, index in GOLDEN:
        rng = np.random.default_rng((seed, sprites.SPLITS[split], index, 3))
        seen.update(json.dumps([asked_of(seed, split, index), choices(plan(seed, split, index), rng)]).encode())
    assert seen.hexdigest()[:16] == "64100a7b99c8b467"


# ---------------------------------------------------------------------------------------------------------------------
# The written set

SIZES = {"train": 24, "test": 8, "val": 4}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("data") / "sprites")
    write_sprites(out, **SIZES)
    return out


def listed(folder, name):
    with open(f"{folder}/{name}.json") as f:
        text = f.read()
    rows = json.loads(text)
    assert text.count("\n") == len(rows) + 2                                # one a line
    return rows


def test_the_written_set_is_what_was_drawn(written):
    errors, on_sprites = [], []
    boxes = np.load(f"{written}/sprites_boxes.npz")
    for split, count in SIZES.items():
        rows = listed(written, f"sprites_{split}")
        assert len(rows) == count and boxes[split].shape == (count, 8, 3, 4)
        for i, row in enumerate(rows):
            drawn = draw(0, *((split, i) if split != "val" else ("test", 8 + i)))          # which follow the test clips
            assert row == {"video": f"{split}_{i:05d}.mp4", "caption": drawn.caption, "still": drawn.still}
            n = len(drawn.objects)
            np.testing.assert_array_equal(boxes[split][i, :, :n], drawn.boxes)
            assert np.isnan(boxes[split][i, :, n:]).all()
            frames = read_frames(f"{written}/videos/{row['video']}", 8).permute(0, 2, 3, 1).numpy()
            error = abs(frames.astype(int) - drawn.frames).mean(-1)         # (T, H, W)
            errors.append(error.mean())
            for t in range(8):
                on_sprites += [error[t, y0:y1, x0:x1].mean() for x0, y0, x1, y1 in drawn.boxes[t].round().astype(int)]
    assert np.mean(errors) < 6 and max(errors) < 8 and np.mean(on_sprites) < 18            # of 255 levels


def test_the_annotations_are_in_their_published_forms(written):
    """In UMT's and VindLU's: MSR-VTT's captions, questions with a list of answers, and choices."""
    assert {name for name in os.listdir(written) if name.endswith(".json")} == {
        "sprites.json", "tokenizer.json", "sprites_qa_answer_list.json", "sprites_mc_test.json", "sprites_mc_val.json",
        *(f"sprites{kind}_{split}.json" for kind in ("", "_cap", "_qa") for split in SIZES)}
    with open(f"{written}/sprites.json") as f:
        assert json.load(f) == {"version": 4, "seed": 0, **SIZES}
    answers = listed(written, "sprites_qa_answer_list")
    assert answers == sorted(set(answers)) and all(isinstance(answer, str) for answer in answers)
    for split, count in SIZES.items():
        names, clip = [f"{split}_{i:05d}.mp4" for i in range(count)], {}
        for i, name in enumerate(names):
            assert os.path.isfile(f"{written}/videos/{name}")
            clip[name] = ("test", 8 + i) if split == "val" else (split, i)

        rows = listed(written, f"sprites_cap_{split}")
        assert [row["video"] for row in rows] == names
        for row, single in zip(rows, listed(written, f"sprites_{split}"), strict=True):
            assert set(row) == {"video", "caption"} and len(set(row["caption"])) == 4
            shown = plan(0, *clip[row["video"]])
            assert row["caption"][shown.template] == single["caption"] == shown.caption()
            assert len({read_caption(text)[1] for text in row["caption"]}) == 4            # in four wordings
            assert all(read_caption(text)[0] == read_caption(single["caption"])[0] for text in row["caption"])

        rows = listed(written, f"sprites_qa_{split}")
        assert list(dict.fromkeys(row["video"] for row in rows)) == names
        ids = [row["question_id"] for row in rows]
        assert len(set(ids)) == len(ids) and all(type(i) is int for i in ids)
        for name in names:
            own = [{key: row[key] for key in ("question", "answer", "type")} for row in rows if row["video"] == name]
            assert own == asked_of(0, *clip[name])
        for row in rows:
            assert set(row) == {"video", "question", "answer", "question_id", "type"} and row["answer"] in answers

        if split == "train":
            continue
        rows = listed(written, f"sprites_mc_{split}")
        assert [row["video"] for row in rows] == names
        for row in rows:
            assert set(row) == {"video", "caption", "answer"} and type(row["answer"]) is int
            where = clip[row["video"]]
            rng = np.random.default_rng((0, 1, where[1], 3))
            assert (row["caption"], row["answer"]) == choices(plan(0, *where), rng)


def test_a_clip_is_asked_the_same_in_every_set(written, tmp_path):
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    for folder in (first, again):
        write_sprites(folder, train=3, test=10, val=2)
    for name in sorted(os.listdir(first)):
        if name.endswith(".json"):
            with open(f"{first}/{name}") as a, open(f"{again}/{name}") as b:
                assert a.read() == b.read()
    for kind in ("", "_cap", "_qa", "_mc"):
        for split in ("train", "test")[kind == "_mc":]:
            few, many = ([{**row, "question_id": 0} for row in listed(folder, f"sprites{kind}_{split}")
                          if row["video"] < f"{split}_00003"] for folder in (first, written))
            assert few == many != []
    # With more test clips the validation clips are those that follow them.
    mine, follow = listed(written, "sprites_cap_val"), listed(first, "sprites_cap_test")
    assert [row["caption"] for row in mine[:2]] == [row["caption"] for row in follow[8:]]
    assert [row["caption"] for row in mine[2:]] == [row["caption"] for row in listed(first, "sprites_cap_val")]


def test_the_tokenizer_gives_captions_the_ids_that_they_would_have_alone(written, tmp_path):
    captions = [row["caption"] for row in listed(written, "sprites_train")]
    data.train_tokenizer(captions, str(tmp_path / "alone.json"))
    alone = data.load_tokenizer(str(tmp_path / "alone.json"))
    tokenizer = data.load_tokenizer(f"{written}/tokenizer.json")
    old, new = alone.get_vocab(), tokenizer.get_vocab()
    assert old == {word: i for word, i in new.items() if i < len(old)} and len(new) > len(old) + 20
    assert data.encode(tokenizer, captions, 50).equal(data.encode(alone, captions, 50))
    asked = [data.clean(row["question"]) for row in listed(written, "sprites_qa_train")]
    for text in asked + listed(written, "sprites_qa_answer_list"):          # each word has an id of its own
        assert tokenizer.encode(text, add_special_tokens=False).tokens == text.split()
    assert "##j" in new and "##j" not in old                                # of "object", a letter that captions lack


def test_texts_fit_the_lengths_of_the_tasks(tmp_path):
    plans = [plan(0, "train", i) for i in range(2000)]
    data.train_tokenizer([p.caption() for p in plans], str(tmp_path / "tokenizer.json"))
    tokenizer = data.load_tokenizer(str(tmp_path / "tokenizer.json"))
    longest = max((text for p in plans for text in p.captions()), key=lambda text: len(text.split()))
    assert data.encode(tokenizer, [longest], 41, sep=True)[0, 40] == 0      # 40 pieces, [CLS] and [SEP] among them
    assert max(len(answer.split()) for answer in sprites.answer_list()) + 2 <= 8
    assert max(len(row["question"].split()) for i in range(100) for row in asked_of(0, "train", i)) <= 12


def test_a_finished_set_is_left_alone_and_another_is_not_overwritten(written, tmp_path, capsys):
    before = os.stat(f"{written}/sprites.json").st_mtime_ns
    write_sprites(written + "/", **SIZES)
    assert "already there" in capsys.readouterr().out and os.stat(f"{written}/sprites.json").st_mtime_ns == before
    with pytest.raises(FileExistsError, match="holds another set"):
        write_sprites(written, train=24, test=9, val=4)
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="not a set of sprites"):
        write_sprites(str(tmp_path / "notes"), train=2, test=1, val=1)
    for none in ("train", "test", "val"):
        with pytest.raises(ValueError, match=f"--{none} 0.*at least one clip"):
            write_sprites(str(tmp_path / "new"), **{**SIZES, none: 0})


def test_a_set_whose_writing_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(sprites, "train_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        write_sprites(str(tmp_path / "sprites"), train=2, test=1, val=1)
    assert list(tmp_path.iterdir()) == []
