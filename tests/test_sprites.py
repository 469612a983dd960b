"""Clips against what they claim to show; questions and choices against the true boxes; the files of a written set."""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from unittest import mock

import numpy as np
import pytest

from annotations import normalize_caption
from tokenizer import build_wordpiece, encode_texts, load_tokenizer
from tools import sprites
from tools.sprites import BRIEF, SETS, RenderedClip, clip_spec, multiple_choice, questions, write_sprites
from video import read_frames

SPRITES, CROWD = SETS["sprites"], SETS["crowd"]
on_each_set = pytest.mark.parametrize("set_spec", SETS.values(), ids=list(SETS))


@lru_cache(maxsize=1000)
def render(seed, split, index, visible=True, set_spec=SPRITES):
    """sprites.render, once for each clip: drawing is most of the time of these tests."""
    return sprites.render(seed, split, index, visible, set_spec)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing

GOLDEN = [(0, "train", 0), (0, "train", 4), (0, "test", 0), (0, "test", 9), (3, "train", 7)]


@pytest.mark.parametrize("name, expected", [("sprites", "952bebc69de51c36"), ("crowd", "761fb7c7c623960c")])
def test_a_clip_is_the_same_on_every_machine(name, expected):
    digest = hashlib.sha256()
    for clip in GOLDEN:
        rendered = render(*clip, set_spec=SETS[name])
        digest.update(rendered.frames.tobytes() + rendered.caption.encode())
    assert digest.hexdigest()[:16] == expected


@on_each_set
def test_a_clip_depends_on_its_three_numbers_alone(set_spec):
    first = [render(*clip, set_spec=set_spec) for clip in GOLDEN]
    sprites.held_out_specs.cache_clear()                                    # not on what was drawn before it
    np.random.seed(1)
    for clip, a in zip(reversed(GOLDEN), reversed(first), strict=True):
        sprites.render(*clip, set_spec=CROWD if set_spec != CROWD else SPRITES)
        b = sprites.render(*clip, set_spec=set_spec)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        assert (a.frames == b.frames).all() and a.caption == b.caption
    others = [(1, "train", 0), (0, "train", 1)]
    assert len({render(*clip, set_spec=set_spec).frames.tobytes() for clip in GOLDEN + others}) == 7


@on_each_set
def test_boxes_hold_all_pixels_of_the_objects_and_little_else(set_spec):
    pixel = np.arange(sprites.SIZE)
    for i in range(25):
        clip, empty = (render(0, "train", i, visible, set_spec) for visible in (True, False))
        np.testing.assert_array_equal(empty.boxes, clip.boxes)
        assert empty.caption == clip.caption
        assert clip.boxes.shape == (set_spec.frames, len(clip_spec(0, "train", i, set_spec).objects), 4)
        changed = abs(clip.frames.astype(int) - empty.frames).max(-1) > 0                  # (T, H, W)
        inside = np.zeros_like(changed)
        for t, boxes in enumerate(clip.boxes):
            for x0, y0, x1, y1 in boxes[~np.isnan(boxes).all(-1)]:          # NaN: not in view
                window = np.ix_((pixel + 1.5 > y0) & (pixel - 0.5 < y1), (pixel + 1.5 > x0) & (pixel - 0.5 < x1))
                inside[t][window] = True                                    # half a pixel around the box is blended
                ys, xs = np.nonzero(changed[t][window])
                assert np.ptp(ys) > y1 - y0 - 2 and np.ptp(xs) > x1 - x0 - 2               # the box is not too big
        assert not changed[~inside].any()


@on_each_set
def test_objects_have_their_colour_stay_inside_and_move_as_described(set_spec):
    values = set()
    pixel = np.arange(sprites.SIZE)
    for i in range(60):
        clip = render(0, "train", i, set_spec=set_spec)
        empty = render(0, "train", i, False, set_spec)
        changed = abs(clip.frames.astype(int) - empty.frames).max(-1) > 0
        x0, y0, x1, y1 = clip.boxes.transpose(2, 1, 0)[..., None]           # (objects, T, 1) each
        across, down = (pixel + 1.5 > x0) & (pixel - 0.5 < x1), (pixel + 1.5 > y0) & (pixel - 0.5 < y1)
        inside = down[..., None] & across[:, :, None]                       # (objects, T, H, W)
        for k, o in enumerate(clip.objects):
            values |= set(o.values())
            mask = changed & inside[k] & (inside.sum(0) == 1)               # where no other object hides it
            error = abs(clip.frames - np.array(sprites.COLOURS[o["colour"]], float)).max(-1)
            assert (error[mask] < 30).mean() > (0.15 if set_spec == CROWD else 0.25)       # the others are blended edge
            box = clip.boxes[:, k]                                          # (T, 4)
            if o["motion"] == BRIEF:
                box = box[~np.isnan(box).any(-1)]
            assert (box >= 0).all() and (box <= sprites.SIZE).all()
            centre, width = (box[:, :2] + box[:, 2:]) / 2, box[:, 2] - box[:, 0]
            step = np.diff(centre, axis=0)                                  # (T - 1, 2)
            direction = sprites.MOTIONS.get(o["motion"])
            if direction:                                                   # the same distance in any number of frames
                along = step @ direction
                assert 2.4 * 7 < along.sum() < 4.1 * 7 and np.ptp(along) < 1e-3
                assert abs(step - along[:, None] * direction).max() < 1e-3
            elif o["motion"] == "moves in a circle":
                length = np.hypot(*step.T)
                assert length.min() * set_spec.frames > 32
                assert abs(centre[0] - centre[set_spec.frames // 2]).max() > 8
                assert np.hypot(*(centre[0] - centre[-1])) == pytest.approx(length[0], abs=1e-3)           # closed
            elif o["motion"] == "grows":
                assert (np.diff(width) > 0).all() and width[-1] > 2 * width[0] and abs(step).max() < 1
            else:
                assert abs(step).max() == 0 and np.ptp(width) == 0
    brief = {BRIEF} if set_spec.brief_prob else set()
    assert values == {*sprites.SHAPES, *sprites.COLOURS, *dict(set_spec.sizes), *sprites.MOTIONS} | brief


def test_a_brief_object_is_in_view_once_and_at_neither_end():
    stretches, clips = Counter(), 80
    for i in range(clips):
        clip = render(0, "train", i, set_spec=CROWD)
        in_view = ~np.isnan(clip.boxes)                                     # (T, objects, 4)
        assert (in_view == in_view[..., :1]).all()
        for o, frames in zip(clip.objects, in_view[..., 0].T, strict=True):                # (T,)
            assert frames.all() or o["motion"] == BRIEF
            if o["motion"] == BRIEF:
                start, end = np.diff(frames.astype(int)).nonzero()[0] + 1   # in view once
                assert not frames[0] and not frames[-1] and end - start in (4, 5, 6)
                assert frames[::2].sum() in (2, 3) and frames[1::2].sum() in (2, 3)        # of every second frame
                stretches.update([f"from {start}", f"to {end}", f"for {end - start}"])
        always = [f"{o['size']} {o['colour']} {o['shape']}" for k, o in enumerate(clip.objects) if in_view[:, k].all()]
        assert clip.frame_caption == " and ".join(always) and clip.objects[0]["motion"] != BRIEF
    assert all(stretches[f"for {length}"] > clips / 8 for length in (4, 5, 6))
    assert stretches["from 1"] and stretches["to 15"]                       # anywhere in between


@on_each_set
def test_objects_start_apart_and_overlap_a_quarter_of_the_time_at_most(set_spec):
    for i in range(150):
        rng = np.random.default_rng((0, 0, i, 1))
        centres, radii = sprites.place_objects(clip_spec(0, "train", i, set_spec).objects, rng, set_spec)
        for a, b in combinations(range(len(centres)), 2):
            distance = np.hypot(*(centres[a] - centres[b]).T)               # (T,), NaN unless both are in view
            overlap = distance <= radii[a] + radii[b]
            assert not overlap[0] and overlap.sum() <= 0.25 * (distance >= 0).sum()


@on_each_set
def test_the_camera_moves_as_specified_and_background_and_clutter_with_it(set_spec):
    turns, speeds, compared = [], [], 0
    for i in range(40):
        with mock.patch.object(sprites, "background", wraps=sprites.background) as background:
            frames = sprites.render(0, "train", i, False, set_spec).frames.astype(float)
        camera = background.call_args.args[2]                               # (T, 2)
        step = np.diff(camera, axis=0) @ [1, 1j]
        turns += np.angle(step[1:] / step[:-1]).tolist()
        speeds += abs(step).tolist()
        assert np.ptp(abs(step)) < 1e-9
        for t, u in combinations(range(set_spec.frames), 2):
            x, y = shift = (camera[u] - camera[t]).round().astype(int)
            if 1 <= abs(shift).max() < 32 and abs(camera[u] - camera[t] - shift).max() < 0.08:     # almost whole pixels
                a = frames[t, max(y, 0):sprites.SIZE + min(y, 0), max(x, 0):sprites.SIZE + min(x, 0)]
                b = frames[u, max(-y, 0):sprites.SIZE - max(y, 0), max(-x, 0):sprites.SIZE - max(x, 0)]
                assert (abs(a - b).max(-1) > 60).mean() < 0.001
                compared += 1
    assert compared > 10 and 0.9 * set_spec.drift < max(speeds) < set_spec.drift
    assert np.std(turns) == pytest.approx(set_spec.heading_std, rel=0.1, abs=1e-6)


@on_each_set
def test_as_much_clutter_is_in_view_in_every_frame_as_specified(set_spec):
    drawn = []                                                              # (is a background shape, (T,) in view)
    with mock.patch.object(sprites, "draw_shape", lambda video, shape, colour, centre, radius: drawn.append(
            (radius[0] > 1.2, ((centre > 0) & (centre < sprites.SIZE)).all(-1)))):
        for i in range(60):
            sprites.render(0, "train", i, False, set_spec)
    for is_background, count in ((False, set_spec.num_dots), (True, set_spec.num_background_shapes)):
        in_view = sum(frames.astype(int) for b, frames in drawn if b == is_background) / 60 + np.zeros(set_spec.frames)
        assert abs(in_view - count).max() <= 0.2 * count                    # (T,)


def test_each_shape_has_its_distance_and_its_extent():
    axis = np.linspace(-10, 10, 401)
    areas = {}
    for shape, extent in sprites.SHAPES.items():
        inside = sprites.signed_distance(shape, axis[None], axis[:, None], 5.0) < 0        # (y, x)
        ys, xs = np.nonzero(inside)
        np.testing.assert_allclose([axis[xs.min()], axis[ys.min()], axis[xs.max()], axis[ys.max()]],
                                   5 * np.array(extent), atol=0.11)
        areas[shape] = inside
    for a, b in combinations(areas.values(), 2):                            # all differ
        assert (a ^ b).sum() > 0.15 * min(a.sum(), b.sum())


@pytest.mark.parametrize("name, objects, words", [("sprites", [1, 2, 3], 40), ("crowd", [2, 3, 4], 35)])
def test_held_out_clips_share_no_meaning_with_training_or_each_other(name, objects, words):
    set_spec = SETS[name]
    train, test = ([clip_spec(0, split, i, set_spec) for i in range(count)]
                   for split, count in (("train", 4096), ("test", 640)))
    for text in (sprites.ClipSpec.meaning, sprites.ClipSpec.caption):
        held_out = {text(spec) for spec in test}
        assert len(held_out) == 640 and not held_out & {text(spec) for spec in train}
    meaning_of, counts = {}, set()
    for spec in train + test:                                               # equal captions, equal meanings
        assert meaning_of.setdefault(spec.caption(), spec.meaning()) == spec.meaning()
        pairs = [(o["shape"], o["colour"]) for o in spec.objects]
        counts.add(len(pairs))
        assert len(set(pairs)) == len(pairs)
        assert normalize_caption(spec.caption()) == spec.caption() and len(spec.caption().split()) < words
    assert sorted(counts) == objects
    sprites.held_out_specs.cache_clear()
    caption = clip_spec(0, "test", 40, set_spec).caption()
    assert caption == test[40].caption() != clip_spec(1, "test", 40, set_spec).caption()


def test_each_test_clip_of_the_crowd_has_a_pair_not_seen_in_training():
    train, test = ([{(o["shape"], o["colour"]) for o in clip_spec(0, split, i, CROWD).objects} for i in range(count)]
                   for split, count in (("train", 3000), ("test", 640)))
    held_out = set(product(sprites.SHAPES, sprites.COLOURS)) - set().union(*train)
    assert sorted(shape for shape, _ in held_out) == sorted(sprites.SHAPES)                # one colour of each shape
    assert len({colour for _, colour in held_out}) == len(held_out)                        # a different one of each
    assert all(pairs & held_out for pairs in test) and held_out < set().union(*test)


def test_the_meaning_ignores_order_and_words_and_frame_captions_motion():
    spec = next(spec for spec in (clip_spec(0, "train", i) for i in range(50)) if len(spec.objects) == 2)
    other = replace(spec, objects=spec.objects[::-1], template=(spec.template + 1) % len(SPRITES.templates))
    assert other.meaning() == spec.meaning() and other.caption() != spec.caption()
    moved = replace(spec, objects=[dict(spec.objects[0], motion="other"), spec.objects[1]])
    assert moved.meaning() != spec.meaning() and moved.frame_caption() == spec.frame_caption()
    spec = sprites.ClipSpec([{"shape": "square", "colour": "red", "size": "small", "motion": "moves down"},
                             {"shape": "circle", "colour": "white", "size": "large", "motion": "grows"}],
                            "plain", "brown", 0)
    caption = "a small red square moves down while a large white circle grows on a plain brown background"
    assert spec.caption() == caption
    assert spec.frame_caption() == "a small red square and a large white circle"
    brief = {**spec.objects[0], "colour": "cyan", "motion": "appears briefly"}
    spec = replace(spec, set_spec=CROWD, objects=[*spec.objects, brief])
    objects = "small red square moves down and large white circle grows and small cyan square appears briefly"
    assert spec.captions() == [f"{objects} on plain brown", f"plain brown with {objects}"]
    assert spec.frame_caption() == "small red square and large white circle"


# ---------------------------------------------------------------------------------------------------------------------
# Questions and choices, each parsed and answered by a loop over the objects and their true boxes

REFERENCE = r"(?P<size>small|large)? ?(?P<colour>\w+)? ?\b(?P<shape>\w+)"
WORDINGS = {
    "colour": ["what colour is the REF", "what is the colour of the REF", "which colour does the REF have"],
    "shape": ["what shape is the REF", "what is the shape of the REF", "which shape does the REF have"],
    "count": ["how many objects (are there|are in the video|can be seen)"],
    "motion": ["how does the REF move", "how is the REF moving", "in what way does the REF move"],
    "order": [r"(which object|which of the objects|what) is (?P<place>\w+( \w+)?) at the (?P<time>start|end)"],
}
PLACES = {                                         # axis of the centre, and whether the larger coordinate leads
    "further left": (0, False), "furthest left": (0, False), "further right": (0, True), "furthest right": (0, True),
    "higher": (1, False), "highest": (1, False), "lower": (1, True), "lowest": (1, True),
}


def questions_of(seed, split, index, set_spec=SPRITES):
    rng = np.random.default_rng((seed, sprites.SPLITS[split], index, 2))
    return questions(render(seed, split, index, set_spec=set_spec), rng)


def parse_question(row):
    """The words that the wording was filled with; exactly one wording matches, of the row's type."""
    parsed = [(question_type, match.groupdict()) for question_type, wordings in WORDINGS.items() for wording in wordings
              if (match := re.fullmatch(wording.replace("REF", REFERENCE) + r"\?", row["question"]))]
    assert len(parsed) == 1 and parsed[0][0] == row["type"]
    return {key: word for key, word in parsed[0][1].items() if word and word != "object"}


def matching_objects(words, objects):
    """Indices of the objects that these words fit."""
    return [k for k, o in enumerate(objects) if all(o[key] == word for key, word in words.items())]


def leader(boxes, place):
    """boxes (objects, 4) at one time -> the object at that place among those in view, and by how many pixels."""
    axis, larger = PLACES[place]
    position = {k: float(box[axis] + box[axis + 2]) / 2 * (1 if larger else -1) for k, box in enumerate(boxes)
                if not np.isnan(box).any()}
    first = max(position, key=lambda k: position[k])
    return first, min((position[first] - other for k, other in position.items() if k != first), default=0)


def test_the_answer_list_has_every_possible_answer():
    answers, more = sprites.answer_list(), sprites.answer_list(CROWD)
    assert len(answers) == 72 and hashlib.sha256("\n".join(answers).encode()).hexdigest()[:16] == "4143646eea925010"
    assert set(more) == {*answers, "four", "it appears briefly"} and more == sorted(more) and len(more) == 74


def possible_types(clip):
    """The question types that a clip allows."""
    types, objects = {"count", "motion"}, clip.objects
    for question_type, key in (("colour", "shape"), ("shape", "colour")):
        for o in objects:
            same = [p for p in objects if p[key] == o[key]]
            same_size = [p for p in same if p["size"] == o["size"]]
            if len(same) == 1 or len(same_size) == 1 and not [p for p in same if p["motion"] == "grows"]:
                types.add(question_type)
    always = [o for o in objects if o["motion"] != BRIEF]
    for place in ("further left", "further right", "higher", "lower") if len(always) > 1 else ():
        (start, margin), (end, margin_at_end) = leader(clip.boxes[0], place), leader(clip.boxes[-1], place)
        if start != end and min(margin, margin_at_end) >= 4:
            types.add("order")
    return types


def check_answer(row, clip, words):
    """The answer of a question of type colour, shape, count or order is what the clip shows."""
    objects, answer = clip.objects, row["answer"]
    if row["type"] == "count":
        assert ["one", "two", "three", "four"].index(answer) + 1 == len(objects)
    elif row["type"] == "order":
        place, always = words["place"], [o for o in objects if o["motion"] != BRIEF]
        (start, margin), (end, margin_at_end) = leader(clip.boxes[0], place), leader(clip.boxes[-1], place)
        o = objects[start if words["time"] == "start" else end]
        assert answer == f"{o['colour']} {o['shape']}" and start != end and min(margin, margin_at_end) > 3.99
        assert (place in ("further left", "further right", "higher", "lower")) == (len(always) == 2)
        assert o in always
    else:
        matches = matching_objects(words, objects)
        assert len(matches) == 1 and row["type"] not in words               # one object; the answer is not in the text
        o = objects[matches[0]]
        if "size" in words:
            without_size = matching_objects({key: word for key, word in words.items() if key != "size"}, objects)
            assert len(without_size) > 1                                    # the size was needed
            assert all(objects[k]["motion"] != "grows" for k in without_size)
        names = {"grows": "it grows", "stays still": "not at all", BRIEF: "it appears briefly"}
        motion = names.get(o["motion"], o["motion"].removeprefix("moves "))
        assert answer == (motion if row["type"] == "motion" else o[row["type"]])


@pytest.mark.parametrize("name, split, count", [("sprites", "train", 150), ("sprites", "test", 50),
                                                ("crowd", "train", 80), ("crowd", "test", 25)])
def test_each_question_has_the_one_answer_that_the_clip_shows(name, split, count):
    set_spec = SETS[name]
    known, starts, answers = sprites.answer_list(set_spec), {}, {}
    assert known == sorted(set(known))
    for i in range(count):
        clip, rows = render(0, split, i, set_spec=set_spec), questions_of(0, split, i, set_spec)
        moved, orders = [], []
        for row in rows:
            assert set(row) == {"question", "answer", "type"} and row["answer"] in known
            words = parse_question(row)
            check_answer(row, clip, words)
            starts.setdefault(row["type"], set()).add(row["question"].split(" the ")[0])
            answers.setdefault(row["type"], set()).add(row["answer"])
            if row["type"] == "motion":
                moved += matching_objects(words, clip.objects)
            elif row["type"] == "order":
                orders.append((words["place"], words["time"]))
        assert sorted(moved) == list(range(len(clip.objects)))              # the motion of each object
        assert len(set(orders)) == len(orders) <= 4 and {(place, "end") for place, _ in orders} <= set(orders)
        counts = Counter(row["type"] for row in rows)
        assert set(counts) == possible_types(clip) and max(counts[t] for t in ("colour", "shape", "count")) == 1
    assert all(len(starts[question_type]) >= 2 for question_type in WORDINGS)
    if split == "train":
        crowd = name == "crowd"
        assert answers["colour"] == {*sprites.COLOURS} and answers["shape"] == {*sprites.SHAPES}
        assert answers["count"] == {"two", "three", *(["four"] if crowd else ["one"])}
        assert answers["motion"] == {"left", "right", "up", "down", "in a circle", "it grows", "not at all",
                                     *["it appears briefly"] * crowd}


def test_no_question_has_two_answers():
    one = {"size": "small", "motion": "moves left"}
    red, blue = {"colour": "red", "shape": "ring", **one}, {"colour": "blue", "shape": "ring", **one}
    boxes = np.zeros((8, 2, 4), np.float32)

    def colours(*objects):
        clip = RenderedClip(None, "", "", boxes[:, :len(objects)], list(objects))
        rng = np.random.default_rng(0)
        return {row["answer"] for _ in range(20) for row in questions(clip, rng) if row["type"] == "colour"}

    assert colours(red) == {"red"} and colours(red, blue) == set()
    assert colours(red, {**blue, "size": "large"}) == {"red", "blue"}
    assert colours({**red, "motion": "grows"}, {**blue, "size": "large"}) == set()
    assert colours(red, {**blue, "shape": "bar"}) == {"red", "blue"}


@pytest.mark.parametrize("margin, count", [(3.9, 0), (4.0, 4)])
def test_an_order_is_asked_only_if_it_is_clear(margin, count):
    objects = [{"colour": colour, "shape": "ring", "size": "small", "motion": "grows"} for colour in ("red", "cyan")]
    boxes = np.zeros((8, 2, 4), np.float32)                                 # the frames in between do not matter
    boxes[0, 1], boxes[-1, 0] = [margin, 0, margin, 0], [10, 0, 10, 0]      # red is left of cyan, then right of it
    rows = questions(RenderedClip(None, "", "", boxes, objects), np.random.default_rng(0))
    rows = [row for row in rows if row["type"] == "order"]
    assert len(rows) == count
    for row in rows:
        words = parse_question(row)
        is_red = (words["place"], words["time"]) in (("further left", "start"), ("further right", "end"))
        assert row["answer"] == ("red ring" if is_red else "cyan ring")


@pytest.mark.parametrize("hidden", [[0, -1], [0], [-1], []], ids=str)
def test_an_order_leaves_out_objects_not_in_view_at_start_or_end(hidden):
    one = {"shape": "ring", "size": "small", "motion": "grows"}
    objects = [{"colour": colour, **one} for colour in ("red", "cyan", "blue")]
    boxes = np.zeros((8, 3, 4), np.float32)
    boxes[0, 1], boxes[-1, 0], boxes[:, 2] = 10, 10, 20                     # the third leads both
    boxes[hidden, 2] = np.nan
    places = {"further left", "further right", "higher", "lower"} if hidden else {"furthest left", "highest"}
    clip = RenderedClip(None, "", "", boxes, objects)
    rows = [row for i in range(20) for row in questions(clip, np.random.default_rng(i)) if row["type"] == "order"]
    assert {row["answer"] for row in rows} == {"red ring", "cyan ring"}
    assert {parse_question(row)["place"] for row in rows} == places
    alone = RenderedClip(None, "", "", boxes[:, 1:] + [[[0], [np.nan]]], objects[1:])      # nothing to compare it with
    assert not [row for row in questions(alone, np.random.default_rng(0)) if row["type"] == "order"]


PATTERNS = {                                       # of an object, of the background
    ("size", "colour", "shape", "motion"):
        r"(small|large) (\w+) (\w+)(?: that| which)? (moves in a circle|moves \w+|grows|stays still|appears briefly)",
    ("texture", "tone"): rf"({'|'.join(sprites.TEXTURES)}) (\w+)",
}


def parse_caption(text):
    """-> what the caption says, {(key, index of the object): word}, and its wording with gaps for these words."""
    content = {(key, k): word for keys, pattern in PATTERNS.items() for k, words in enumerate(re.findall(pattern, text))
               for key, word in zip(keys, words, strict=True)}
    for word in sorted(content.values(), key=len, reverse=True):            # "moves in a circle" before "circle"
        text = text.replace(word, "_")
    return content, text


@on_each_set
def test_the_other_choices_are_each_wrong_in_one_detail(set_spec):
    positions, wrong, brief = Counter(), Counter(), Counter()
    values = {**sprites.SHAPES, **sprites.COLOURS, **dict(set_spec.sizes), **sprites.MOTIONS, BRIEF: 0,
              **dict.fromkeys(sprites.TEXTURES), **sprites.TONES}
    for i in range(400):
        spec, rng = clip_spec(0, "test", i, set_spec), np.random.default_rng((0, 1, i, 3))
        captions, correct = multiple_choice(spec, rng)
        truth, wording = parse_caption(captions[correct])
        assert captions[correct] == spec.caption() and len(captions) == 5 and len(set(captions)) == 5
        assert truth == {("texture", 0): spec.texture, ("tone", 0): spec.tone,
                         **{(key, k): word for k, o in enumerate(spec.objects) for key, word in o.items()}}
        positions[correct] += 1
        changed = []
        for caption in captions[:correct] + captions[correct + 1:]:
            content, other_wording = parse_caption(caption)
            assert other_wording == wording and content.keys() == truth.keys() and normalize_caption(caption) == caption
            (key, k), = (item for item in truth if content[item] != truth[item])
            changed.append(key)
            assert content[key, k] in values
            pairs = [(content["shape", j], content["colour", j]) for j in range(len(spec.objects))]
            assert len(set(pairs)) == len(pairs)                            # so it is not true of another object
            if truth["motion", k] == "grows" and key in ("size", "motion"):                # has both sizes, one place
                assert key == "motion" and content[key, k] != "stays still"
            assert k or content[key, k] != BRIEF                            # never said of the first object
            if key == "motion" and BRIEF in (content[key, k], truth[key, k]):              # it stays in one place too
                assert content[key, k] != "stays still"
                brief[content[key, k] == BRIEF] += 1
        wrong.update(changed)
        changed = [{"size": "shape", "tone": "texture"}.get(key, key) for key in changed]
        assert sorted(changed) == ["colour", "motion", "shape", "texture"]
    assert set(positions) == set(range(5)) and all(55 < n < 105 for n in positions.values())
    assert all(120 < wrong[key] < 280 for key in ("size", "shape", "texture", "tone"))
    assert bool(set_spec.brief_prob) == (brief[True] > 20) == (brief[False] > 20)


@pytest.mark.parametrize("name, expected", [("sprites", "64100a7b99c8b467"), ("crowd", "950b0098aa7dcdf7")])
def test_questions_and_choices_are_the_same_on_every_machine(name, expected):
    digest = hashlib.sha256()
    for seed, split, index in GOLDEN:
        rng = np.random.default_rng((seed, sprites.SPLITS[split], index, 3))
        digest.update(json.dumps([questions_of(seed, split, index, SETS[name]),
                                  multiple_choice(clip_spec(seed, split, index, SETS[name]), rng)]).encode())
    assert digest.hexdigest()[:16] == expected


# ---------------------------------------------------------------------------------------------------------------------
# The written set

COUNTS = {"train": 24, "test": 12, "val": 6}                                # of the fixture `sprites`
CROWD_COUNTS = {"train": 3, "test": 2, "val": 1}


@pytest.fixture(scope="module")
def folders(sprites, tmp_path_factory):
    """Name of a set -> its folder."""
    crowd = str(tmp_path_factory.mktemp("data") / "crowd")
    write_sprites(crowd, **CROWD_COUNTS, kind="crowd")
    return {"sprites": sprites, "crowd": crowd}


def read_list(folder, name):
    with open(f"{folder}/{name}.json") as f:
        text = f.read()
    rows = json.loads(text)
    assert text.count("\n") == len(rows) + 2                                # one row per line
    return rows


on_each_folder = pytest.mark.parametrize("name, counts", [("sprites", COUNTS), ("crowd", CROWD_COUNTS)])


def names_and_clips(counts, split):
    """File name -> the clip in it. Validation clips are the test clips after those of the test split."""
    return {f"{split}_{i:05d}.mp4": (0, "test", counts["test"] + i) if split == "val" else (0, split, i)
            for i in range(counts[split])}


@on_each_folder
def test_videos_and_boxes_are_those_of_the_clips(folders, name, counts):
    folder, set_spec = folders[name], SETS[name]
    errors, object_errors = [], []
    boxes = np.load(f"{folder}/sprites_boxes.npz")
    names = {video for split in counts for video in names_and_clips(counts, split)}
    assert set(os.listdir(f"{folder}/videos")) == names
    for split, count in counts.items():
        assert boxes[split].shape == (count, set_spec.frames, len(set_spec.counts), 4)
        for (video, clip), padded in zip(names_and_clips(counts, split).items(), boxes[split], strict=True):
            rendered = render(*clip, set_spec=set_spec)
            n = len(rendered.objects)
            np.testing.assert_array_equal(padded[:, :n], rendered.boxes)
            assert np.isnan(padded[:, n:]).all()
            frames = read_frames(f"{folder}/videos/{video}", set_spec.frames).permute(0, 2, 3, 1).numpy()
            error = abs(frames.astype(int) - rendered.frames).mean(-1)      # (T, H, W), of 255 levels
            errors.append(error.mean())
            if name == "sprites":
                object_errors += [error[t, y0:y1, x0:x1].mean() for t in range(set_spec.frames)
                                  for x0, y0, x1, y1 in rendered.boxes[t].round().astype(int)]
    assert np.mean(errors) < (6 if name == "sprites" else 8) and max(errors) < 8
    assert name == "crowd" or np.mean(object_errors) < 18


@on_each_folder
def test_annotation_files_have_the_published_forms(folders, name, counts):
    """Those of UMT and VindLU: MSR-VTT's captions, questions with a list of answers, and choices."""
    folder, set_spec = folders[name], SETS[name]
    files = {file for file in os.listdir(folder) if not file.startswith("frames_")}     # a cache of other tests' runs
    assert {file for file in files if file.endswith(".json")} == {
        "sprites.json", "tokenizer.json", "sprites_qa_answer_list.json", "sprites_mc_test.json", "sprites_mc_val.json",
        *(f"sprites{form}_{split}.json" for form in ("", "_cap", "_qa") for split in counts)}
    with open(f"{folder}/sprites.json") as f:
        settings = json.load(f)
    expected = {"version": 4, "seed": 0, **counts, **({"kind": "crowd"} if name == "crowd" else {})}
    assert settings.pop("checksum") and settings == expected
    answers = read_list(folder, "sprites_qa_answer_list")
    assert answers == sprites.answer_list(set_spec)
    for split in counts:
        clips = names_and_clips(counts, split)
        assert read_list(folder, f"sprites_{split}") == [
            {"video": video, "caption": clip.caption, "still": clip.frame_caption}
            for video, clip in ((video, render(*clip, set_spec=set_spec)) for video, clip in clips.items())]

        for row, (video, clip) in zip(read_list(folder, f"sprites_cap_{split}"), clips.items(), strict=True):
            spec = clip_spec(*clip, set_spec)
            assert row == {"video": video, "caption": spec.captions()}
            assert row["caption"][spec.template] == spec.caption()
            contents, wordings = zip(*map(parse_caption, row["caption"]), strict=True)
            assert len(set(wordings)) == len(wordings) == len(set_spec.templates)
            assert all(content == contents[0] for content in contents)

        rows = read_list(folder, f"sprites_qa_{split}")
        assert [row.pop("question_id") for row in rows] == list(range(len(rows)))
        assert rows == [{"video": video, **row} for video, clip in clips.items()
                        for row in questions_of(*clip, set_spec)]
        assert {row["answer"] for row in rows} <= set(answers)

        if split == "train":
            continue
        for row, (video, clip) in zip(read_list(folder, f"sprites_mc_{split}"), clips.items(), strict=True):
            captions, correct = multiple_choice(clip_spec(*clip, set_spec), np.random.default_rng((0, 1, clip[2], 3)))
            assert row == {"video": video, "caption": captions, "answer": correct} and type(row["answer"]) is int


def test_a_clip_has_the_same_texts_in_every_set(folders, tmp_path):
    small, again = str(tmp_path / "small"), str(tmp_path / "again")
    for folder in (small, again):
        write_sprites(folder, train=3, test=10, val=2)
    for file in sorted(os.listdir(small)):
        if file.endswith(".json"):
            with open(f"{small}/{file}") as a, open(f"{again}/{file}") as b:
                assert a.read() == b.read()
    for form in ("", "_cap", "_qa", "_mc"):
        for split in ("train", "test")[form == "_mc":]:
            few, many = ([{**row, "question_id": 0} for row in read_list(folder, f"sprites{form}_{split}")
                          if row["video"] < f"{split}_00003"] for folder in (small, folders["sprites"]))
            assert few == many != []
    # With more test clips the validation clips are those after them.
    test, val = read_list(folders["sprites"], "sprites_cap_test"), read_list(small, "sprites_cap_val")
    assert [row["caption"] for row in val] == [row["caption"] for row in test[10:]]


def test_captions_have_the_ids_that_they_would_have_alone(folders, tmp_path):
    folder = folders["sprites"]
    captions = [row["caption"] for row in read_list(folder, "sprites_train")]
    build_wordpiece(captions, str(tmp_path / "alone.json"))
    alone = load_tokenizer(str(tmp_path / "alone.json"))
    tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    old, new = alone.get_vocab(), tokenizer.get_vocab()
    assert old == {word: i for word, i in new.items() if i < len(old)} and len(new) > len(old) + 20
    assert encode_texts(tokenizer, captions, 50).equal(encode_texts(alone, captions, 50))
    asked = [normalize_caption(row["question"]) for row in read_list(folder, "sprites_qa_train")]
    for text in asked + read_list(folder, "sprites_qa_answer_list"):        # each word has its own id
        assert tokenizer.encode(text, add_special_tokens=False).tokens == text.split()
    assert "##j" in new and "##j" not in old                                # of "object": captions have no j
    crowd = load_tokenizer(f"{folders['crowd']}/tokenizer.json").get_vocab()
    assert {"four", "appears", "briefly"} <= set(crowd)


def test_captions_of_the_crowd_fit_32_tokens_except_one_in_500(tmp_path):
    captions = [text for split in sprites.SPLITS for i in range(2000)
                for text in clip_spec(0, split, i, CROWD).captions()]
    build_wordpiece(captions, str(tmp_path / "tokenizer.json"))
    ids = encode_texts(load_tokenizer(str(tmp_path / "tokenizer.json")), captions, 40)
    assert 0 < (ids[:, 32] != 0).sum() < len(captions) / 500                # [CLS] and 31 words
    assert (ids[:, 35] == 0).all()


def test_texts_fit_the_lengths_of_the_tasks(tmp_path):
    specs = [clip_spec(0, "train", i) for i in range(2000)]
    build_wordpiece([spec.caption() for spec in specs], str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    longest = max((text for spec in specs for text in spec.captions()), key=lambda text: len(text.split()))
    assert encode_texts(tokenizer, [longest], 40)[0, 39] == 0                           # 39 with [CLS]
    assert max(len(answer.split()) for answer in sprites.answer_list()) + 2 <= 8
    assert max(len(row["question"].split()) for i in range(100) for row in questions_of(0, "train", i)) <= 12


def test_a_finished_set_is_kept_and_another_is_not_overwritten(folders, tmp_path, capsys):
    for name, counts in (("sprites", COUNTS), ("crowd", CROWD_COUNTS)):
        before = os.stat(f"{folders[name]}/sprites.json").st_mtime_ns
        write_sprites(folders[name] + "/", **counts, kind=name)
        assert folders[name] in capsys.readouterr().out
        assert os.stat(f"{folders[name]}/sprites.json").st_mtime_ns == before
    for name, settings in (("sprites", {**COUNTS, "test": 9}), ("sprites", {**COUNTS, "kind": "crowd"}),
                           ("crowd", CROWD_COUNTS)):
        with pytest.raises(FileExistsError, match=re.escape(folders[name])) as error:
            write_sprites(folders[name], **settings)
        assert "\n" not in str(error.value)
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="notes"):
        write_sprites(str(tmp_path / "notes"), train=2, test=1, val=1)


@pytest.mark.parametrize("settings", [{"train": 0}, {"test": 0}, {"val": 0}, {"seed": -1}], ids=str)
def test_an_impossible_setting_is_refused(tmp_path, settings):
    (name, value), = settings.items()
    with pytest.raises(ValueError, match=f"--{name}.*{value}"):
        write_sprites(str(tmp_path / "new"), **{**COUNTS, **settings})
    assert os.listdir(tmp_path) == []


def test_a_set_that_cannot_be_finished_leaves_nothing(tmp_path):
    with mock.patch.object(sprites, "build_wordpiece", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            write_sprites(str(tmp_path / "sprites"), train=2, test=1, val=1)
    assert list(tmp_path.iterdir()) == []
