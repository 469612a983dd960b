"""
The embedded data sets: (seed, split, index) -> a short clip of moving shapes, with its texts and true boxes.

    python -m tools.sprites --out data/sprites              # write a set as ordinary video and annotation files
    python -m tools.sprites --out data/crowd --kind crowd   # write a harder one, which tools/ablations.py runs on

Each clip has captions, questions, multiple choices and the boxes of its objects, so every task can be tried without
other data.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Literal

import numpy as np
import tyro

from annotations import normalize_caption
from files import WriteError, atomic_write, atomic_write_text, escape_control, format_error, read_json, write_json
from runtime import parallel_map, run_cli
from tokenizer import build_wordpiece
from video import write_video

# ---------------------------------------------------------------------------------------------------------------------
# The content of a clip

VERSION = 4                                        # of the sets; written to sprites.json
SIZE = 64                                          # pixels per side
SPLITS = {"train": 0, "test": 1}

SHAPES = {                                         # left, top, right, bottom of the shape, in radii from its centre
    "circle": (-1, -1, 1, 1),
    "square": (-0.9, -0.9, 0.9, 0.9),
    "triangle": (-1.1, -1, 1.1, 0.9),
    "cross": (-1.1, -1.1, 1.1, 1.1),
    "ring": (-1.1, -1.1, 1.1, 1.1),
    "bar": (-1.2, -0.45, 1.2, 0.45),
}
COLOURS = {
    "red": (235, 30, 40), "green": (30, 205, 60), "blue": (50, 100, 255), "yellow": (250, 235, 50),
    "white": (250, 250, 250), "orange": (255, 140, 20), "purple": (175, 60, 230), "cyan": (50, 225, 235),
}
MOTIONS = {                                        # direction in pixels, y down
    "moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1),
    "moves in a circle": None, "grows": None, "stays still": None,
}
BRIEF = "appears briefly"                          # is in view, in one place, for 1/4 to 3/8 of the clip
TEXTURES = ("plain", "striped", "checked", "dotted", "cloudy")       # all but "cloudy" show in any 8 x 8 pixels
TONES = {"brown": (96, 64, 40), "grey": (104, 104, 104), "navy": (32, 38, 84), "olive": (84, 90, 38)}

HELD_OUT = 8                                       # one meaning in 8 is not used in the training split


@dataclass(frozen=True)
class SetSpec:
    """How the clips of a data set are drawn and described."""
    frames: int = 8                                # frames per clip
    counts: tuple = (0.45, 0.40, 0.15)             # probability of one object, of two, …
    sizes: tuple = (("small", 3.2), ("large", 5.5))     # radius in pixels
    brief_prob: float = 0.0                        # probability that an object appears briefly; the first never does
    hold_out_pairs: bool = False                   # hold out pairs of shape and colour instead of meanings
    drift: float = 1.5                             # maximum speed of the camera in pixels per frame
    heading_std: float = 0.0                       # standard deviation of the camera's turn, radians per frame
    num_dots: int = 10                             # average number of distracting dots in view
    num_background_shapes: int = 0                 # average number of shapes in the background's own tone in view
    object_template: str = "a {size} {colour} {shape}"
    background_template: str = "a {texture} {tone} background"
    templates: tuple = (                           # the whole caption, one object, the text between objects
        ("{objects} on {background}", "{object} {motion}", " while "),
        ("on {background} {objects}", "{object} {motion}", " and "),
        ("there is {objects} on {background}", "{object} that {motion}", " and "),
        ("{background} with {objects}", "{object} which {motion}", " and "),
    )

    def name(self, o: dict) -> str:
        """The words for an object."""
        return self.object_template.format(**o)

    def radius(self, o: dict) -> float:
        return dict(self.sizes)[o["size"]]


SETS = {
    "sprites": SetSpec(),
    # More and smaller objects, longer clips, objects that appear briefly, and a camera that wanders over clutter. The
    # captions are terse, because text is most of the cost of a small student.
    "crowd": SetSpec(
        frames=16, counts=(0, 0.35, 0.40, 0.25), sizes=(("small", 2.7), ("large", 4.4)), brief_prob=0.4,
        hold_out_pairs=True, drift=2.0, heading_std=0.3, num_dots=16, num_background_shapes=3,
        object_template="{size} {colour} {shape}", background_template="{texture} {tone}",
        templates=(("{objects} on {background}", "{object} {motion}", " and "),
                   ("{background} with {objects}", "{object} {motion}", " and "))),
}


@dataclass
class ClipSpec:
    """The content of a clip, before positions are drawn."""
    objects: list[dict]                            # shape, colour, size, motion
    texture: str
    tone: str
    template: int
    set_spec: SetSpec = SETS["sprites"]

    def meaning(self) -> str:
        """A text that is equal for two clips with the same content, whatever the order of objects and the wording."""
        objects = sorted(" ".join(o[key] for key in ("size", "colour", "shape", "motion")) for o in self.objects)
        return ", ".join([*objects, f"{self.texture} {self.tone}"])

    def caption(self) -> str:
        whole, one, separator = self.set_spec.templates[self.template]
        objects = separator.join(one.format(object=self.set_spec.name(o), motion=o["motion"]) for o in self.objects)
        background = self.set_spec.background_template.format(texture=self.texture, tone=self.tone)
        return whole.format(objects=objects, background=background)

    def captions(self) -> list[str]:
        """The caption in each of the templates."""
        return [replace(self, template=i).caption() for i in range(len(self.set_spec.templates))]

    def frame_caption(self) -> str:
        """A caption that is true of each frame: the objects that are always in view."""
        return " and ".join(self.set_spec.name(o) for o in self.objects if o["motion"] != BRIEF)

    def is_held_out(self) -> bool:
        """Whether the clip cannot be in the training split."""
        if self.set_spec.hold_out_pairs:           # one colour of each shape
            return any((list(COLOURS).index(o["colour"]) + 3 * list(SHAPES).index(o["shape"])) % len(COLOURS) == 0
                       for o in self.objects)
        return zlib.crc32(self.meaning().encode()) % HELD_OUT == 0


@dataclass
class RenderedClip:
    """The pixels and the ground truth of a clip."""
    frames: np.ndarray                             # (T, H, W, 3) uint8
    caption: str
    frame_caption: str                             # true of each frame
    boxes: np.ndarray                              # (T, objects, 4) float32: x0, y0, x1, y1 in pixels, NaN out of view
    objects: list[dict]                            # shape, colour, size, motion


def sample_spec(rng: np.random.Generator, set_spec: SetSpec) -> ClipSpec:
    """Draw the content of a clip. No two of its objects have both shape and colour in common."""
    count = rng.choice(np.arange(len(set_spec.counts)) + 1, p=set_spec.counts)
    pairs = rng.choice(len(SHAPES) * len(COLOURS), count, replace=False)
    objects = [{
        "shape": list(SHAPES)[pair // len(COLOURS)],
        "colour": list(COLOURS)[pair % len(COLOURS)],
        "size": set_spec.sizes[rng.integers(len(set_spec.sizes))][0],
        "motion": list(MOTIONS)[rng.integers(len(MOTIONS))],
    } for pair in pairs]
    if set_spec.brief_prob:
        for o in objects[1:]:
            o["motion"] = BRIEF if rng.random() < set_spec.brief_prob else o["motion"]
    texture, tone = TEXTURES[rng.integers(len(TEXTURES))], list(TONES)[rng.integers(len(TONES))]
    return ClipSpec(objects, texture, tone, int(rng.integers(len(set_spec.templates))), set_spec)


@lru_cache(maxsize=4)
def held_out_specs(seed: int, set_spec: SetSpec) -> tuple[list[ClipSpec], set[str]]:
    """The specs of test clips 0, 1, … and their meanings. `clip_spec` extends both."""
    return [], set()


def clip_spec(seed: int, split: str, index: int, set_spec: SetSpec = SETS["sprites"]) -> ClipSpec:
    """
    The content of clip `index` of a split.

    No test clip has the meaning of a training clip: meanings are split by a hash, or each test clip has a pair of shape
    and colour that no training clip has. Test clips also differ from one another, so a test clip depends on those
    before it. The validation clips of a set are the test clips after its own test clips.
    """
    def first_accepted(index, accept):
        rng = np.random.default_rng((seed, SPLITS[split], index))
        while True:
            spec = sample_spec(rng, set_spec)
            if spec.is_held_out() == (split == "test") and accept(spec):
                return spec

    if split == "train":
        return first_accepted(index, accept=lambda spec: True)
    specs, meanings = held_out_specs(seed, set_spec)
    while len(specs) <= index:
        specs.append(first_accepted(len(specs), accept=lambda spec: spec.meaning() not in meanings))
        meanings.add(specs[-1].meaning())
    return specs[index]


# ---------------------------------------------------------------------------------------------------------------------
# Rendering. Pixel i covers [i, i + 1), so its centre is at i + 0.5.

def signed_distance(shape: str, x, y, r):
    """Signed distance in pixels to the edge of a shape of radius r at the origin, negative inside. Broadcasts."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * r
    if shape == "triangle":                        # a base at y = 0.9 r and two sides that meet at (0, -r)
        slope = np.array([1.9, -1.1]) / np.hypot(1.9, 1.1)
        return np.maximum(y - 0.9 * r, slope[0] * abs(x) + slope[1] * (y + r))
    if shape == "cross":
        long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        return np.maximum(long - 1.1 * r, short - 0.35 * r)
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.8 * r) - 0.3 * r
    if shape == "bar":
        return np.maximum(abs(x) - 1.2 * r, abs(y) - 0.45 * r)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")


def draw_shape(video, shape, colour, centre, radius):
    """Draw one shape over video (T, H, W, 3) float, in place: centre (T, 2), radius (T,)."""
    x0, y0 = np.maximum(np.floor((centre - 1.3 * radius[:, None]).min(0)).astype(int) - 1, 0)
    x1, y1 = np.maximum(np.ceil((centre + 1.3 * radius[:, None]).max(0)).astype(int) + 1, 0)
    window = video[:, y0:y1, x0:x1]                                         # all pixels that it covers in any frame
    y, x = np.arange(y0, y0 + window.shape[1]) + 0.5, np.arange(x0, x0 + window.shape[2]) + 0.5
    distance = signed_distance(shape, x[None, None, :] - centre[:, 0, None, None],
                               y[None, :, None] - centre[:, 1, None, None], radius[:, None, None])
    cover = np.clip(0.5 - distance, 0, 1)[..., None]                        # (T, h, w, 1): share of a pixel inside
    window += cover * (np.array(colour, float) - window)


def trajectory(motion: str, radius: float, rng, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (T, 2) and radii (T,) of an object that stays inside the frame. Centres are NaN while it is not shown."""
    t = np.arange(frames)
    speed, orbit, phase = rng.uniform(2.5, 4), rng.uniform(6, 9), rng.uniform(0, 2 * np.pi)
    speed *= 7 / (frames - 1)                                               # the same distance in a longer clip
    angle = phase + rng.choice([-1, 1]) * 2 * np.pi * t / frames            # one full turn, in either direction
    offset, radii = np.zeros((frames, 2)), np.full(frames, radius)
    if motion == "moves in a circle":
        offset = orbit * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif motion == "grows":
        radii = radius * np.linspace(0.6, 1.5, frames)
    elif motion not in ("stays still", BRIEF):
        offset = speed * t[:, None] * np.array(MOTIONS[motion])
    margin = 1.2 * radii.max() + 1
    start = rng.uniform(margin - offset.min(0), SIZE - margin - offset.max(0))
    if motion == BRIEF:                                                     # not in the first or the last frame
        length = rng.integers(frames // 4, 3 * frames // 8 + 1)
        first = rng.integers(1, frames - length)
        offset[(t < first) | (t >= first + length)] = np.nan
    return start + offset, radii


def place_objects(objects: list[dict], rng, set_spec: SetSpec) -> tuple[np.ndarray, np.ndarray]:
    """
    Draw centres (objects, T, 2) and radii (objects, T).

    They are drawn again, up to 100 times, if two objects overlap in the first frame or in more than a quarter of the
    frames in which both are in view.
    """
    for _ in range(100):
        paths = [trajectory(o["motion"], set_spec.radius(o), rng, set_spec.frames) for o in objects]
        centres, radii = (np.stack(part) for part in zip(*paths, strict=True))
        distance = np.hypot(*(centres[:, None] - centres[None]).transpose(3, 0, 1, 2))      # (objects, objects, T)
        overlap = distance <= radii[:, None] + radii[None]                  # False if one is out of view
        overlap &= ~np.eye(len(objects), dtype=bool)[..., None]
        both_in_view = ~np.isnan(distance)
        if not overlap[..., 0].any() and (overlap.sum(-1) <= 0.25 * both_in_view.sum(-1)).all():
            break
    return centres, radii


def background(texture: str, tone: str, camera: np.ndarray, rng) -> np.ndarray:
    """Draw the background: camera (T, 2), the offset of the view -> (T, H, W, 3) float."""
    x = (np.arange(SIZE) + 0.5)[None, None, :] + camera[:, 0, None, None]   # (T, 1, W)
    y = (np.arange(SIZE) + 0.5)[None, :, None] + camera[:, 1, None, None]   # (T, H, 1)
    angle, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi, (4, 2))
    period = rng.uniform(5, 7)
    k = 2 * np.pi / period
    along = np.cos(angle) * x + np.sin(angle) * y                           # (T, H, W)
    if texture == "plain":
        level = 0 * along
    elif texture == "striped":
        level = np.clip(2 * np.sin(k * along + phase[0, 0]), -1, 1)
    elif texture == "checked":
        level = np.clip(4 * np.sin(k * x / 1.2 + phase[0, 0]) * np.sin(k * y / 1.2 + phase[0, 1]), -1, 1)
    elif texture == "dotted":                                               # discs on a square grid
        dx, dy = (x + phase[0, 0]) % period - period / 2, (y + phase[0, 1]) % period - period / 2
        level = 2 * np.clip(0.5 + period / 4 - np.hypot(dx, dy), 0, 1) - 0.5
    else:                                                                   # cloudy: waves of four directions
        level = 0 * along
        for i, (shift, direction) in enumerate(phase):
            wave = np.cos(direction) * x + np.sin(direction) * y
            level += 0.5 * np.sin(wave * 2 * np.pi / (10 + 4 * i) + shift)
    return np.array(TONES[tone], float) * (1 + 0.25 * level[..., None])


def camera_path(set_spec: SetSpec, rng) -> np.ndarray:
    """Draw the offset (T, 2) of the view in pixels: straight at constant speed, or with a heading that varies."""
    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0, set_spec.drift)
    if set_spec.heading_std:
        heading = heading + set_spec.heading_std * rng.standard_normal((set_spec.frames, 1)).cumsum(0)      # (T, 1)
        return (speed * np.concatenate([np.cos(heading), np.sin(heading)], 1)).cumsum(0)
    return np.arange(set_spec.frames)[:, None] * speed * np.array([np.cos(heading), np.sin(heading)])


def draw_clutter(video: np.ndarray, tone: str, camera: np.ndarray, set_spec: SetSpec, rng):
    """Draw background shapes and dots over video (T, H, W, 3), in place. They move with the background."""
    reach = set_spec.drift * set_spec.frames                                # some come into view later
    total = lambda in_view: round(in_view * (1 + 2 * reach / SIZE) ** 2)
    for _ in range(total(set_spec.num_background_shapes)):
        position, radius = rng.uniform(-reach, SIZE + reach, 2), rng.uniform(2, 5)
        shape, level = list(SHAPES)[rng.integers(len(SHAPES))], rng.choice([0.5, 1.6])
        draw_shape(video, shape, level * np.array(TONES[tone]), position - camera, np.full(len(camera), radius))
    for _ in range(total(set_spec.num_dots)):
        position, radius = rng.uniform(-reach, SIZE + reach, 2), rng.uniform(0.8, 1.2)
        colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
        draw_shape(video, "circle", colour, position - camera, np.full(len(camera), radius))


def render(seed: int, split: str, index: int, sprites: bool = True,
           set_spec: SetSpec = SETS["sprites"]) -> RenderedClip:
    """
    Render clip `index` of a split. The result depends on these arguments only and is the same on any machine.

    sprites=False leaves the objects out of the pixels and changes nothing else.
    """
    spec = clip_spec(seed, split, index, set_spec)
    rng = np.random.default_rng((seed, SPLITS[split], index, 1))
    centres, radii = place_objects(spec.objects, rng, set_spec)             # (objects, T, 2), (objects, T)
    camera = camera_path(set_spec, rng)                                     # (T, 2)
    video = background(spec.texture, spec.tone, camera, rng)                # (T, H, W, 3)
    draw_clutter(video, spec.tone, camera, set_spec, rng)
    if sprites:
        for o, centre, radius in zip(spec.objects, centres, radii, strict=True):
            in_view = ~np.isnan(centre[:, 0])                               # (T,), consecutive frames
            window = video[in_view.argmax():][:in_view.sum()]
            draw_shape(window, o["shape"], COLOURS[o["colour"]], centre[in_view], radius[in_view])
    video += 0.02 * 255 * rng.standard_normal(video.shape)

    extent = np.array([SHAPES[o["shape"]] for o in spec.objects])           # (objects, 4)
    boxes = np.concatenate([centres, centres], axis=-1) + radii[..., None] * extent[:, None]
    return RenderedClip(
        frames=np.clip(np.rint(video), 0, 255).astype(np.uint8),
        caption=spec.caption(), frame_caption=spec.frame_caption(),
        boxes=boxes.transpose(1, 0, 2).astype(np.float32), objects=spec.objects,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Questions and choices. The word "object" in a question means what a caption names, not the clutter.

WORDINGS = {                                       # by question type
    "colour": ("what colour is the {}?", "what is the colour of the {}?", "which colour does the {} have?"),
    "shape": ("what shape is the {}?", "what is the shape of the {}?", "which shape does the {} have?"),
    "count": ("how many objects are there?", "how many objects are in the video?", "how many objects can be seen?"),
    "motion": ("how does the {} move?", "how is the {} moving?", "in what way does the {} move?"),
    "order": ("which object is {} at the {}?", "which of the objects is {} at the {}?", "what is {} at the {}?"),
}
COUNTS = ("one", "two", "three", "four")
MOVES = {                                          # motion -> answer
    "moves left": "left", "moves right": "right", "moves up": "up", "moves down": "down",
    "moves in a circle": "in a circle", "grows": "it grows", "stays still": "not at all", BRIEF: "it appears briefly",
}
PLACES = {                                         # direction in pixels, y down -> words for two objects, for more
    (-1, 0): ("further left", "furthest left"), (1, 0): ("further right", "furthest right"),
    (0, -1): ("higher", "highest"), (0, 1): ("lower", "lowest"),
}
MARGIN_PX = 4                                      # an object is the furthest only by at least this many pixels


def answer_list(set_spec: SetSpec = SETS["sprites"]) -> list[str]:
    """All answers that questions of the set can have, sorted."""
    pairs = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    moves = [move for motion, move in MOVES.items() if motion != BRIEF or set_spec.brief_prob]
    return sorted([*COLOURS, *SHAPES, *COUNTS[:len(set_spec.counts)], *moves, *pairs])


def referring_expression(o: dict, objects: list[dict], key: str) -> str:
    """
    Words that identify object o by its shape or its colour (`key`), with its size if needed.

    The result is empty if no such words fit o alone.
    """
    same = [other for other in objects if other[key] == o[key]]
    words = o["shape"] if key == "shape" else f"{o['colour']} object"
    if len(same) == 1:
        return words
    if [other["size"] for other in same].count(o["size"]) > 1 or any(other["motion"] == "grows" for other in same):
        return ""                                  # an object that grows is small at first and large at the end
    return f"{o['size']} {words}"


def order_events(boxes: np.ndarray) -> list[tuple[str, int, int]]:
    """
    boxes (T, objects, 4) -> (place, object that is there in the first frame, another that is there in the last frame).

    A place is listed if both objects lead all others in view by at least MARGIN_PX.
    """
    in_view = (~np.isnan(boxes[[0, -1], :, 0]).any(0)).nonzero()[0]         # in the first and the last frame
    centres = (boxes[[0, -1]][:, in_view, :2] + boxes[[0, -1]][:, in_view, 2:]) / 2     # (2, objects, 2)
    if len(in_view) < 2:
        return []
    events = []
    for direction, names in PLACES.items():
        along = centres @ np.array(direction)                               # (2, objects)
        start, end = in_view[along.argmax(axis=1)].tolist()
        second, first = np.sort(along, axis=1)[:, -2:].T                    # (2,) each
        if start != end and (first - second >= MARGIN_PX).all():
            events.append((names[len(in_view) > 2], start, end))
    return events


def questions(clip: RenderedClip, rng: np.random.Generator) -> list[dict]:
    """
    Draw rows of {question, answer, type}, each with exactly one right answer.

    There is one question of each type that the clip allows, except: motion is asked of every object, and order, who is
    at a place at the start and at the end, for up to two places.
    """
    objects, rows = clip.objects, []

    def ask(question_type, answer, *words):
        wording = WORDINGS[question_type][rng.integers(len(WORDINGS[question_type]))]
        rows.append({"question": wording.format(*words), "answer": answer, "type": question_type})

    for question_type, key in (("colour", "shape"), ("shape", "colour")):   # the other attribute identifies the object
        named = [(o, words) for o in objects if (words := referring_expression(o, objects, key))]
        if named:
            o, words = named[rng.integers(len(named))]
            ask(question_type, o[question_type], words)
    ask("count", COUNTS[len(objects) - 1])
    names = [f"{o['colour']} {o['shape']}" for o in objects]
    for o, name in zip(objects, names, strict=True):
        ask("motion", MOVES[o["motion"]], name)
    events = order_events(clip.boxes)
    for i in rng.permutation(len(events))[:2]:
        place, start, end = events[i]
        ask("order", names[start], place, "start")
        ask("order", names[end], place, "end")
    return rows


def distractors(spec: ClipSpec, key: str) -> list[ClipSpec]:
    """All specs that differ in one value of `key`, of the background or of one object, and are false of the clip."""
    values = {"shape": SHAPES, "colour": COLOURS, "size": dict(spec.set_spec.sizes), "texture": TEXTURES,
              "tone": TONES, "motion": (*MOTIONS, BRIEF) if spec.set_spec.brief_prob else MOTIONS}
    if key in ("texture", "tone"):
        return [replace(spec, **{key: value}) for value in values[key] if value != getattr(spec, key)]
    specs = []
    for i, o in enumerate(spec.objects):
        others = [(other["shape"], other["colour"]) for other in spec.objects if other is not o]
        for value in values[key]:
            changed = {**o, key: value}
            # Ambiguous: an object that grows has both sizes; one that grows or appears briefly also stays in its place.
            # No caption says of its first object that it appears briefly.
            stays = o["motion"] in ("grows", BRIEF) and value == "stays still"
            ambiguous = stays or o["motion"] == "grows" and key == "size" or i == 0 and value == BRIEF
            if value != o[key] and not ambiguous and (changed["shape"], changed["colour"]) not in others:
                specs.append(replace(spec, objects=[*spec.objects[:i], changed, *spec.objects[i + 1:]]))
    return specs


def multiple_choice(spec: ClipSpec, rng: np.random.Generator) -> tuple[list[str], int]:
    """Draw four captions that are each wrong in one detail, insert the true one, and return all and its index."""
    captions = []
    for keys in (("motion",), ("colour",), ("shape", "size"), ("texture", "tone")):
        wrong = [specs for specs in (distractors(spec, key) for key in keys) if specs]
        wrong = wrong[rng.integers(len(wrong))]
        captions.append(wrong[rng.integers(len(wrong))].caption())
    rng.shuffle(captions)
    correct = int(rng.integers(len(captions) + 1))
    captions.insert(correct, spec.caption())
    return captions, correct


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def write_clip(folder: str, seed: int, set_spec: SetSpec, item: tuple[str, str, int]) -> tuple[dict, np.ndarray]:
    """
    Render clip (file name, split, index) and write its video.

    Returns its rows for each form of annotation file and its boxes (T, objects, 4).
    """
    name, split, index = item
    spec, clip = clip_spec(seed, split, index, set_spec), render(seed, split, index, set_spec=set_spec)
    # With macroblock-tree look-ahead x264 does not always write the same bytes.
    write_video(os.path.join(folder, name), clip.frames, crf="12", preset="veryfast", **{"x264-params": "no-mbtree=1"})
    asked = questions(clip, np.random.default_rng((seed, SPLITS[split], index, 2)))
    rows = {
        "": [{"video": name, "caption": clip.caption, "still": clip.frame_caption}],
        "_cap": [{"video": name, "caption": spec.captions()}],
        "_qa": [{"video": name, **row} for row in asked],
    }
    if split != "train":                           # multiple choice is trained as retrieval
        captions, correct = multiple_choice(spec, np.random.default_rng((seed, SPLITS[split], index, 3)))
        rows["_mc"] = [{"video": name, "caption": captions, "answer": correct}]
    return rows, clip.boxes


def write_files(folder: str, settings: dict, set_spec: SetSpec):
    """Write all files of a set into an empty folder."""
    seed, train, test, val = (settings[key] for key in ("seed", "train", "test", "val"))
    os.mkdir(os.path.join(folder, "videos"))
    items = {
        "train": [(f"train_{i:05d}.mp4", "train", i) for i in range(train)],
        "test": [(f"test_{i:05d}.mp4", "test", i) for i in range(test)],
        "val": [(f"val_{i:05d}.mp4", "test", test + i) for i in range(val)],
    }
    write = partial(write_clip, os.path.join(folder, "videos"), seed, set_spec)
    results = iter(list(parallel_map(write, sum(items.values(), []), "sprites")))
    boxes, files = {}, defaultdict(list)
    for split, clips in items.items():
        boxes[split] = np.full((len(clips), set_spec.frames, len(set_spec.counts), 4), np.nan, np.float32)
        for padded, (rows, clip_boxes) in zip(boxes[split], islice(results, len(clips)), strict=True):
            padded[:, :clip_boxes.shape[1]] = clip_boxes
            for form, form_rows in rows.items():
                files[f"sprites{form}_{split}"] += form_rows
        for i, row in enumerate(files[f"sprites_qa_{split}"]):
            row["question_id"] = i
    with atomic_write(os.path.join(folder, "sprites_boxes.npz")) as f:
        np.savez_compressed(f, **boxes)
    files["sprites_qa_answer_list"] = answer_list(set_spec)
    for name, rows in files.items():
        lines = ",\n".join(map(json.dumps, rows))
        atomic_write_text(os.path.join(folder, f"{name}.json"), f"[\n{lines}\n]\n")
    texts = [normalize_caption(row["question"]) for row in files["sprites_qa_train"]]
    build_wordpiece([row["caption"] for row in files["sprites_train"]], os.path.join(folder, "tokenizer.json"),
                    extra_texts=[*texts, *answer_list(set_spec)])
    write_json(os.path.join(folder, "sprites.json"), settings)


def read_boxes(folder: str, split: str) -> np.ndarray:
    """Read the true boxes of a split of a set, (clips, T, objects, 4). A .npz has checksums, which NumPy verifies."""
    path = os.path.join(folder, "sprites_boxes.npz")
    try:
        with np.load(path) as boxes:
            return boxes[split]
    except FileNotFoundError:
        raise
    except Exception as error:                     # a reader of zip files can raise anything if a byte is wrong
        raise ValueError(f"{path} is damaged ({format_error(error)}): delete {folder} and write it again") from None


def read_settings(out: str) -> dict:
    """Read the settings of the set in an existing folder."""
    path = os.path.join(out, "sprites.json")
    if not os.path.isfile(path):
        raise FileExistsError(f"--out must be a new folder or a set of sprites, got {out}, which exists")
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{out} is damaged: delete it and write it again ({error})") from None


def write_sprites(out: str, seed: int = 0, train: int = 4096, test: int = 512, val: int = 128,
                  kind: Literal["sprites", "crowd"] = "sprites"):
    """Draw an embedded data set and write it as ordinary files.

    videos/*.mp4 are H.264 (crf 12, 4:2:0). The annotation files have the published forms, each for train, test and val:
    sprites_*.json for retrieval, with an extra key "still", a caption that is true of each frame; sprites_cap_*.json
    with the caption in each wording; sprites_qa_*.json with 5.4 questions per clip and their types, and the possible
    answers in sprites_qa_answer_list.json; sprites_mc_*.json, not for train, with the true caption among four that are
    each wrong in one detail. sprites_boxes.npz has the true boxes of train, test and val, (clips, T, objects, 4): x0 y0
    x1 y1 in pixels, NaN if a clip has fewer objects or an object is not in view. tokenizer.json is a word-piece
    tokenizer of the training captions, extended by the training questions and the answers.

    Video coding changes a pixel by 4.6 of 255 levels on average, mostly noise, and by 14 on objects, because 4:2:0
    halves the resolution of colour. 99 % of the pixels of small objects stay nearest to their own colour.

    Args:
        out: folder to write; it appears complete or not at all
        seed: random seed of the set
        train: number of training clips
        test: number of held-out clips; each has another meaning than all other held-out clips and all training clips
        val: number of held-out clips for model selection
        kind: sprites, or crowd: two to four smaller objects in 16 frames, some in view only briefly (docs/data.md)
    """
    if train < 1 or test < 1 or val < 1:
        raise ValueError(f"--train, --test and --val must be at least 1, got --train {train} --test {test} --val {val}")
    if seed < 0:
        raise ValueError(f"--seed must not be negative, got {seed}")
    out = out.rstrip("/")
    settings = {"version": VERSION, "seed": seed, "train": train, "test": test, "val": val}
    settings |= {"kind": kind} if kind != "sprites" else {}
    if os.path.lexists(out):
        existing = read_settings(out)
        if existing != settings:
            raise FileExistsError(f"{out}: the settings of this set must be {settings}, got {existing}")
        print(escape_control(f"{out} exists with the same settings"))
        return

    parent, name = os.path.split(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        write_files(folder, settings, SETS[kind])
        os.chmod(folder, 0o755)
        os.rename(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, WriteError):        # of a video, in another process
            raise WriteError(out, error) from None
        raise
    print(escape_control(f"{out}: {train} + {test} + {val} clips"))


if __name__ == "__main__":
    run_cli("tools.sprites", lambda: tyro.cli(write_sprites, prog="python -m tools.sprites"))
