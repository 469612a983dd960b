"""Sprites against what they claim to show; questions and choices against the true boxes; the files of a set."""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

import data
import sprites
from decoding import read_frames
from sprites import BRIEF, KINDS, choices, draw, plan, questions, write_sprites

CROWD = KINDS["crowd"]
of_each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))

# ---------------------------------------------------------------------------------------------------------------------
# Drawing

GOLDEN = [(0, "train", 0), (0, "train", 4), (0, "test", 0), (0, "test", 9), (3, "train", 7)]


@pytest.mark.parametrize("kind, expected", [("sprites", "952bebc69de51c36"), ("crowd", "761fb7c7c623960c")])
def test_a_clip_is_the_same_on_every_machine(kind, expected):
    seen = hashlib.sha256()
    for clip in GOLDEN:
        drawn = draw(*clip, kind=KINDS[kind])
        seen.update(drawn.frames.tobytes() + drawn.caption.encode())
    assert seen.hexdigest()[:16] == expected


@of_each_kind
def test_a_clip_depends_on_its_three_numbers_alone(kind):
    first = [draw(*clip, kind=kind) for clip in GOLDEN]
    sprites.held_out_plans.cache_clear()                                    # and not on what was drawn before
    np.random.seed(1)
    for clip, a in zip(reversed(GOLDEN), reversed(first), strict=True):
        draw(*clip, kind=CROWD if kind != CROWD else KINDS["sprites"])
        b = draw(*clip, kind=kind)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        assert (a.frames == b.frames).all() and a.caption == b.caption
    pictures = {draw(*clip, kind=kind).frames.tobytes() for clip in [*GOLDEN, (1, "train", 0), (0, "train", 1)]}
    assert len(pictures) == 7


@of_each_kind
def test_boxes_hold_all_that_the_sprites_change_and_little_else(kind):
    pixel = np.arange(sprites.SIZE)
    for i in range(40):
        drawn, without = draw(0, "train", i, kind=kind), draw(0, "train", i, sprites=False, kind=kind)
        np.testing.assert_array_equal(without.boxes, drawn.boxes)
        assert without.caption == drawn.caption
        assert drawn.boxes.shape == (kind.frames, len(plan(0, "train", i, kind).objects), 4)
        changed = abs(drawn.frames.astype(int) - without.frames).max(-1) > 0               # (T, H, W)
        inside = np.zeros_like(changed)
        for t, boxes in enumerate(drawn.boxes):
            for x0, y0, x1, y1 in boxes[~np.isnan(boxes).all(-1)]:          # out of view there is nothing
                window = np.ix_((pixel + 1.5 > y0) & (pixel - 0.5 < y1), (pixel + 1.5 > x0) & (pixel - 0.5 < x1))
                inside[t][window] = True                                    # half a pixel around the box is blended
                ys, xs = np.nonzero(changed[t][window])
                assert np.ptp(ys) > y1 - y0 - 2 and np.ptp(xs) > x1 - x0 - 2               # and the box is not too big
        assert not changed[~inside].any()


@of_each_kind
def test_sprites_have_their_colour_stay_inside_and_move_as_they_are_said_to(kind):
    seen = set()
    pixel = np.arange(sprites.SIZE)
    for i in range(150 if kind != CROWD else 60):
        drawn = draw(0, "train", i, kind=kind)
        changed = abs(drawn.frames.astype(int) - draw(0, "train", i, sprites=False, kind=kind).frames).max(-1) > 0
        x0, y0, x1, y1 = drawn.boxes.transpose(2, 1, 0)[..., None]          # (objects, T, 1) each
        across, down = (pixel + 1.5 > x0) & (pixel - 0.5 < x1), (pixel + 1.5 > y0) & (pixel - 0.5 < y1)
        inside = down[..., None] & across[:, :, None]                       # (objects, T, H, W)
        for k, o in enumerate(drawn.objects):
            seen |= set(o.values())
            own = changed & inside[k] & (inside.sum(0) == 1)                # none may hide it
            off = abs(drawn.frames - np.array(sprites.COLOURS[o["colour"]], float)).max(-1)
            assert (off[own] < 30).mean() > (0.15 if kind == CROWD else 0.25)           # the rest is edge, blended
            box = drawn.boxes[:, k]                                         # (T, 4)
            if o["motion"] == BRIEF:
                box = box[~np.isnan(box).any(-1)]
            assert (box >= 0).all() and (box <= sprites.SIZE).all()
            centre, width = (box[:, :2] + box[:, 2:]) / 2, box[:, 2] - box[:, 0]
            step = np.diff(centre, axis=0)                                  # (T - 1, 2)
            direction = sprites.MOTIONS.get(o["motion"])
            if direction:                                                   # as far in as many frames as there are
                along = step @ direction
                assert 2.4 * 7 < along.sum() < 4.1 * 7 and np.ptp(along) < 1e-3
                assert abs(step - along[:, None] * direction).max() < 1e-3
            elif o["motion"] == "moves in a circle":
                far = np.hypot(*step.T)
                assert far.min() * kind.frames > 32 and abs(centre[0] - centre[kind.frames // 2]).max() > 8
                assert np.hypot(*(centre[0] - centre[-1])) == pytest.approx(far[0], abs=1e-3)               # closed
            elif o["motion"] == "grows":
                assert (np.diff(width) > 0).all() and width[-1] > 2 * width[0] and abs(step).max() < 1
            else:
                assert abs(step).max() == 0 and np.ptp(width) == 0
    brief = {BRIEF} if kind.brief else set()
    assert seen == {*sprites.SHAPES, *sprites.COLOURS, *dict(kind.sizes), *sprites.MOTIONS} | brief


def test_what_appears_briefly_is_in_view_once_and_at_neither_end():
    stretches, clips = Counter(), 120
    for i in range(clips):
        drawn = draw(0, "train", i, kind=CROWD)
        there = ~np.isnan(drawn.boxes)                                      # (T, objects, 4)
        assert (there == there[..., :1]).all()
        for o, seen in zip(drawn.objects, there[..., 0].T, strict=True):    # (T,)
            assert seen.all() or o["motion"] == BRIEF
            if o["motion"] == BRIEF:
                start, end = np.diff(seen.astype(int)).nonzero()[0] + 1     # in view once
                assert not seen[0] and not seen[-1] and end - start in (4, 5, 6)
                assert seen[::2].sum() in (2, 3) and seen[1::2].sum() in (2, 3)            # of every second frame
                stretches.update([f"from {start}", f"to {end}", f"for {end - start}"])
        always = [f"{o['size']} {o['colour']} {o['shape']}" for k, o in enumerate(drawn.objects) if there[:, k].all()]
        assert drawn.still == " and ".join(always) and drawn.objects[0]["motion"] != BRIEF
    assert all(stretches[f"for {length}"] > clips / 8 for length in (4, 5, 6))
    assert stretches["from 1"] and stretches["to 15"]                       # anywhere in between


@of_each_kind
def test_sprites_start_apart_and_hide_one_another_for_a_quarter_of_the_time_at_most(kind):
    for i in range(300):
        rng = np.random.default_rng((0, 0, i, 1))
        centres, radii = sprites.place(plan(0, "train", i, kind).objects, rng, kind)
        for a, b in combinations(range(len(centres)), 2):
            apart = np.hypot(*(centres[a] - centres[b]).T)                  # (T,), NaN where not both are in view
            hidden = apart <= radii[a] + radii[b]
            assert not hidden[0] and hidden.sum() <= 0.25 * (apart >= 0).sum()


@of_each_kind
def test_the_camera_goes_as_the_kind_says_and_takes_the_ground_and_its_clutter_along(kind, monkeypatch):
    cameras, ground, turns, speeds, compared = [], sprites.background, [], [], 0
    monkeypatch.setattr(sprites, "background", lambda texture, tone, camera, rng: (
        cameras.append(camera) or ground(texture, tone, camera, rng)))
    for i in range(40):
        frames = draw(0, "train", i, sprites=False, kind=kind).frames.astype(float)
        camera = cameras.pop()                                              # (T, 2)
        step = np.diff(camera, axis=0) @ [1, 1j]
        turns += np.angle(step[1:] / step[:-1]).tolist()
        speeds += abs(step).tolist()
        assert np.ptp(abs(step)) < 1e-9
        for t, u in combinations(range(kind.frames), 2):
            x, y = by = (camera[u] - camera[t]).round().astype(int)
            if 1 <= abs(by).max() < 32 and abs(camera[u] - camera[t] - by).max() < 0.08:   # almost a whole pixel
                a = frames[t, max(y, 0):sprites.SIZE + min(y, 0), max(x, 0):sprites.SIZE + min(x, 0)]
                b = frames[u, max(-y, 0):sprites.SIZE - max(y, 0), max(-x, 0):sprites.SIZE - max(x, 0)]
                assert (abs(a - b).max(-1) > 60).mean() < 0.001
                compared += 1
    assert compared > 10 and 0.9 * kind.drift < max(speeds) < kind.drift
    assert np.std(turns) == pytest.approx(kind.turn, rel=0.1, abs=1e-6)


@of_each_kind
def test_there_is_about_as_much_clutter_in_view_as_the_kind_says_in_every_frame(kind, monkeypatch):
    painted = []
    monkeypatch.setattr(sprites, "paint", lambda video, shape, colour, centre, radius: painted.append((
        radius[0] > 1.2, ((centre > 0) & (centre < sprites.SIZE)).all(-1))))
    for i in range(60):
        draw(0, "train", i, sprites=False, kind=kind)
    for rag, count in ((False, kind.specks), (True, kind.rags)):
        in_view = sum(seen.astype(int) for is_rag, seen in painted if is_rag == rag) / 60 + np.zeros(kind.frames)
        assert abs(in_view - count).max() <= 0.2 * count                    # (T,)


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


@pytest.mark.parametrize("kind, objects, words", [("sprites", [1, 2, 3], 40), ("crowd", [2, 3, 4], 35)])
def test_held_out_clips_mean_nothing_that_was_seen_in_training_or_before(kind, objects, words):
    kind = KINDS[kind]
    train, test = ([plan(0, split, i, kind) for i in range(count)] for split, count in (("train", 4096), ("test", 640)))
    for text in (sprites.Plan.meaning, sprites.Plan.caption):
        unseen = {text(p) for p in test}
        assert len(unseen) == 640 and not unseen & {text(p) for p in train}
    by_caption, counts = {}, set()
    for p in train + test:                                                  # a caption says all there is to say
        assert by_caption.setdefault(p.caption(), p.meaning()) == p.meaning()
        kinds = [(o["shape"], o["colour"]) for o in p.objects]
        counts.add(len(kinds))
        assert len(set(kinds)) == len(kinds)
        assert data.clean(p.caption()) == p.caption() and len(p.caption().split()) < words
    assert sorted(counts) == objects
    sprites.held_out_plans.cache_clear()
    assert plan(0, "test", 40, kind).caption() == test[40].caption() != plan(1, "test", 40, kind).caption()


def test_each_test_clip_of_the_crowd_has_a_shape_in_a_colour_that_it_never_has_in_training():
    train, test = ([{(o["shape"], o["colour"]) for o in plan(0, split, i, CROWD).objects} for i in range(count)]
                   for split, count in (("train", 3000), ("test", 640)))
    never = set(product(sprites.SHAPES, sprites.COLOURS)) - set().union(*train)
    assert sorted(shape for shape, _ in never) == sorted(sprites.SHAPES)    # of each shape one colour
    assert len({colour for _, colour in never}) == len(never)               # another one of each
    assert all(pairs & never for pairs in test) and never < set().union(*test)


def test_the_meaning_ignores_order_and_words_and_the_still_caption_ignores_motion():
    p = next(p for p in (plan(0, "train", i) for i in range(50)) if len(p.objects) == 2)
    other = replace(p, objects=p.objects[::-1], template=(p.template + 1) % len(sprites.KINDS["sprites"].templates))
    assert other.meaning() == p.meaning() and other.caption() != p.caption()
    moved = replace(p, objects=[dict(p.objects[0], motion="other"), p.objects[1]])
    assert moved.meaning() != p.meaning() and moved.still() == p.still()
    p = sprites.Plan([{"shape": "square", "colour": "red", "size": "small", "motion": "moves down"},
                   {"shape": "circle", "colour": "white", "size": "large", "motion": "grows"}], "plain", "brown", 0)
    assert p.caption() == "a small red square moves down while a large white circle grows on a plain brown background"
    assert p.still() == "a small red square and a large white circle"
    p = replace(p, kind=CROWD, objects=[*p.objects, {**p.objects[0], "colour": "cyan", "motion": "appears briefly"}])
    said = "small red square moves down and large white circle grows and small cyan square appears briefly"
    assert p.captions() == [f"{said} on plain brown", f"plain brown with {said}"]
    assert p.still() == "small red square and large white circle"


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


def asked_of(seed, split, index, kind=KINDS["sprites"]):
    drawn = draw(seed, split, index, kind=kind)
    return questions(drawn, np.random.default_rng((seed, sprites.SPLITS[split], index, 2)))


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
    """boxes (objects, 4) at one time -> the object there, and by how many pixels, of those in view."""
    axis, larger = PLACES[place]
    at = {k: float(box[axis] + box[axis + 2]) / 2 * (1 if larger else -1) for k, box in enumerate(boxes)
          if not np.isnan(box).any()}
    first = max(at, key=lambda k: at[k])
    return first, min((at[first] - other for k, other in at.items() if k != first), default=0)


def test_the_answers_are_those_that_a_kind_can_have():
    answers, more = sprites.answer_list(), sprites.answer_list(CROWD)
    assert len(answers) == 72 and hashlib.sha256("\n".join(answers).encode()).hexdigest()[:16] == "4143646eea925010"
    assert set(more) == {*answers, "four", "it appears briefly"} and more == sorted(more) and len(more) == 74


@pytest.mark.parametrize("name, split, count", [("sprites", "train", 300), ("sprites", "test", 100),
                                                ("crowd", "train", 150), ("crowd", "test", 50)])
def test_each_question_has_the_one_answer_that_the_clip_shows(name, split, count):
    drawn_as = KINDS[name]
    known, wordings, answers = sprites.answer_list(drawn_as), {}, {}
    assert known == sorted(set(known))
    for i in range(count):
        drawn, rows = draw(0, split, i, kind=drawn_as), asked_of(0, split, i, drawn_as)
        objects = drawn.objects
        always = [o for o in objects if o["motion"] != BRIEF]               # of these an order is asked
        moved, times = [], []
        for row in rows:
            assert set(row) == {"question", "answer", "type"} and row["answer"] in known
            words, kind, answer = read_question(row), row["type"], row["answer"]
            wordings.setdefault(kind, set()).add(row["question"].split(" the ")[0])
            answers.setdefault(kind, set()).add(answer)
            if kind == "count":
                assert ["one", "two", "three", "four"].index(answer) + 1 == len(objects)
            elif kind == "order":
                place, time = words["place"], words["time"]
                (start, by), (end, by_then) = ahead(drawn.boxes[0], place), ahead(drawn.boxes[-1], place)
                o = objects[start if time == "start" else end]
                assert answer == f"{o['colour']} {o['shape']}" and start != end and min(by, by_then) > 3.99
                assert (place in ("further left", "further right", "higher", "lower")) == (len(always) == 2)
                assert o in always
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
                    said = {"grows": "it grows", "stays still": "not at all", BRIEF: "it appears briefly"}
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
        for place in ("further left", "further right", "higher", "lower") if len(always) > 1 else ():
            (start, by), (end, by_then) = ahead(drawn.boxes[0], place), ahead(drawn.boxes[-1], place)
            if start != end and min(by, by_then) >= 4:
                possible.add("order")
        kinds = Counter(row["type"] for row in rows)
        assert set(kinds) == possible and kinds["colour"] <= 1 and kinds["shape"] <= 1 and kinds["count"] == 1
    assert all(len(wordings[kind]) >= 2 for kind in ASKED)
    assert split == "test" or all(answers[kind] == {*named} for kind, named in (
        ("colour", sprites.COLOURS), ("shape", sprites.SHAPES),
        ("count", ["two", "three", "four"] if name == "crowd" else ["one", "two", "three"]),
        ("motion", ["left", "right", "up", "down", "in a circle", "it grows", "not at all",
                    *["it appears briefly"] * (name == "crowd")])))


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


@pytest.mark.parametrize("away", [[0, -1], [0], [-1], []], ids=str)
def test_an_order_leaves_out_what_is_not_in_view_at_the_start_or_the_end(away):
    one = {"shape": "ring", "size": "small", "motion": "grows"}
    kinds = [{"colour": colour, **one} for colour in ("red", "cyan", "blue")]
    boxes = np.zeros((8, 3, 4), np.float32)
    boxes[0, 1], boxes[-1, 0], boxes[:, 2] = 10, 10, 20                     # the third is ahead of both
    boxes[away, 2] = np.nan
    words = {"further left", "further right", "higher", "lower"} if away else {"furthest left", "highest"}
    drawn = sprites.Drawn(None, "", "", boxes, kinds)
    rows = [row for i in range(20) for row in questions(drawn, np.random.default_rng(i)) if row["type"] == "order"]
    assert {row["answer"] for row in rows} == {"red ring", "cyan ring"}
    assert {read_question(row)["place"] for row in rows} == words
    alone = sprites.Drawn(None, "", "", boxes[:, 1:] + [[[0], [np.nan]]], kinds[1:])        # nothing to compare it with
    assert not [row for row in questions(alone, np.random.default_rng(0)) if row["type"] == "order"]


SAYS = {                                           # of an object, of the background
    ("size", "colour", "shape", "motion"):
        r"(small|large) (\w+) (\w+)(?: that| which)? (moves in a circle|moves \w+|grows|stays still|appears briefly)",
    ("texture", "tone"): rf"({'|'.join(sprites.TEXTURES)}) (\w+)",
}


def read_caption(text):
    """-> what the caption says, {(key, which of the objects): word}, and its wording with gaps for that."""
    said = {(key, k): word for keys, pattern in SAYS.items() for k, words in enumerate(re.findall(pattern, text))
            for key, word in zip(keys, words, strict=True)}
    for word in sorted(said.values(), key=len, reverse=True):               # "moves in a circle" before "circle"
        text = text.replace(word, "_")
    return said, text


@of_each_kind
def test_the_other_choices_are_each_wrong_in_one_thing(kind):
    places, wrong, briefly = Counter(), Counter(), Counter()
    for i in range(400):
        shown, rng = plan(0, "test", i, kind), np.random.default_rng((0, 1, i, 3))
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
            assert said[key, k] in {**sprites.SHAPES, **sprites.COLOURS, **dict(shown.kind.sizes), **sprites.MOTIONS,
                                    BRIEF: 0, **dict.fromkeys(sprites.TEXTURES), **sprites.TONES}
            kinds = [(said["shape", j], said["colour", j]) for j in range(len(shown.objects))]
            assert len(set(kinds)) == len(kinds)                            # nor is it true of another object
            if true["motion", k] == "grows" and key in ("size", "motion"):  # it is both small and large, in one place
                assert key == "motion" and said[key, k] != "stays still"
            assert k or said[key, k] != BRIEF               # no caption says it of the first
            if key == "motion" and BRIEF in (said[key, k], true[key, k]):   # what comes and goes has its place as well
                assert said[key, k] != "stays still"
                briefly[said[key, k] == BRIEF] += 1
        wrong.update(changed)
        changed = [{"size": "shape", "tone": "texture"}.get(key, key) for key in changed]
        assert sorted(changed) == ["colour", "motion", "shape", "texture"]
    assert set(places) == set(range(5)) and all(55 < n < 105 for n in places.values())
    assert all(120 < wrong[key] < 280 for key in ("size", "shape", "texture", "tone"))
    assert bool(kind.brief) == (briefly[True] > 20) == (briefly[False] > 20)


@pytest.mark.parametrize("kind, expected", [("sprites", "64100a7b99c8b467"), ("crowd", "950b0098aa7dcdf7")])
def test_questions_and_choices_are_the_same_on_every_machine(kind, expected):
    kind = KINDS[kind]
    seen = hashlib.sha256()
    for seed, split, index in GOLDEN:
        rng = np.random.default_rng((seed, sprites.SPLITS[split], index, 3))
        seen.update(json.dumps([asked_of(seed, split, index, kind),
                                choices(plan(seed, split, index, kind), rng)]).encode())
    assert seen.hexdigest()[:16] == expected


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


def test_the_crowd_is_written_as_a_set_of_its_own(written, tmp_path):
    out, sizes = str(tmp_path / "crowd"), {"train": 3, "test": 2, "val": 1}
    write_sprites(out, **sizes, kind="crowd")
    assert sorted(os.listdir(out)) == sorted(os.listdir(written))
    assert sorted(os.listdir(f"{out}/videos")) == sorted(f"{split}_{i:05d}.mp4" for split, n in sizes.items()
                                                         for i in range(n))
    with open(f"{out}/sprites.json") as f:
        assert json.load(f) == {"version": 4, "seed": 0, **sizes, "kind": "crowd"}
    boxes = np.load(f"{out}/sprites_boxes.npz")
    assert listed(out, "sprites_qa_answer_list") == sprites.answer_list(CROWD)
    tokenizer = data.load_tokenizer(f"{out}/tokenizer.json").get_vocab()
    assert {"four", "appears", "briefly"} <= set(tokenizer)
    for split, count in sizes.items():
        rows, captions = listed(out, f"sprites_{split}"), listed(out, f"sprites_cap_{split}")
        assert len(rows) == len(captions) == count and boxes[split].shape == (count, 16, 4, 4)
        for i, row in enumerate(rows):
            where = (0, *((split, i) if split != "val" else ("test", 2 + i)))
            drawn = draw(*where, kind=CROWD)
            assert row == {"video": f"{split}_{i:05d}.mp4", "caption": drawn.caption, "still": drawn.still}
            assert captions[i] == {"video": row["video"], "caption": plan(*where, CROWD).captions()}
            padded = np.full((16, 4, 4), np.nan)
            padded[:, :len(drawn.objects)] = drawn.boxes
            np.testing.assert_array_equal(boxes[split][i], padded)
            frames = read_frames(f"{out}/videos/{row['video']}", 16).permute(0, 2, 3, 1).numpy()
            assert abs(frames.astype(int) - drawn.frames).mean() < 8
            own = [{key: asked[key] for key in ("question", "answer", "type")}
                   for asked in listed(out, f"sprites_qa_{split}") if asked["video"] == row["video"]]
            assert own == asked_of(*where, CROWD)
            if split != "train":
                chosen = listed(out, f"sprites_mc_{split}")[i]
                rng = np.random.default_rng((0, 1, where[2], 3))
                assert (chosen["caption"], chosen["answer"]) == choices(plan(*where, CROWD), rng)

    write_sprites(out, **sizes, kind="crowd")                               # it is there
    for folder, asked in ((out, {**sizes}), (written, {**SIZES, "kind": "crowd"})):
        with pytest.raises(FileExistsError, match="holds another set") as refused:
            write_sprites(folder, **asked)
        assert "\n" not in str(refused.value)


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


def test_captions_of_the_crowd_fit_32_word_pieces_but_for_one_in_500(tmp_path):
    captions = [text for split in sprites.SPLITS for i in range(2000) for text in plan(0, split, i, CROWD).captions()]
    data.train_tokenizer(captions, str(tmp_path / "tokenizer.json"))
    ids = data.encode(data.load_tokenizer(str(tmp_path / "tokenizer.json")), captions, 40)
    assert 0 < (ids[:, 32] != 0).sum() < len(captions) / 500                # [CLS] and 31 words
    assert (ids[:, 35] == 0).all()


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
