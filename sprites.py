"""
The embedded data sets: small clips of things that move, drawn by a function of three numbers.

    python sprites.py --out data/sprites              draws a set and writes it as ordinary video and annotation files
    python sprites.py --out data/crowd --kind crowd   a harder one, on which masks are compared (tools/ablate.py)

Every clip comes with captions, questions, multiple choices and the truth about what it shows, so a run of any task
needs no data to be tried out.
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

from data import clean, command, in_parallel, train_tokenizer, write_atomically
from decoding import write_video

# ---------------------------------------------------------------------------------------------------------------------
# Sprites: what a clip shows

VERSION = 4                                        # of the set; part of what `write_sprites` leaves in sprites.json
SIZE = 64                                          # pixels a side
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
BRIEF = "appears briefly"                          # stands somewhere for a quarter to three eighths of the clip
TEXTURES = ("plain", "striped", "checked", "dotted", "cloudy")       # all but the clouds show in any 8 x 8 pixels
TONES = {"brown": (96, 64, 40), "grey": (104, 104, 104), "navy": (32, 38, 84), "olive": (84, 90, 38)}

HELD_OUT = 8                                       # one meaning in this many is kept from the training split


@dataclass(frozen=True)
class Kind:
    """What the clips of a set are like."""
    frames: int = 8                                # a clip
    counts: tuple = (0.45, 0.40, 0.15)             # chance of one object, of two, …
    sizes: tuple = (("small", 3.2), ("large", 5.5))     # radius in pixels
    brief: float = 0.0                             # chance of an object that it is in view briefly; never of the first
    pairs: bool = False                            # held out are pairs of shape and colour, not meanings
    drift: float = 1.5                             # pixels a frame that the camera moves at most
    turn: float = 0.0                              # radians a frame by which its heading changes, standard deviation
    specks: int = 10                               # in view, about
    rags: int = 0                                  # things in the background's own tone, in view, about
    thing: str = "a {size} {colour} {shape}"
    ground: str = "a {texture} {tone} background"
    templates: tuple = (                           # the whole, one object, between objects
        ("{objects} on {background}", "{object} {motion}", " while "),
        ("on {background} {objects}", "{object} {motion}", " and "),
        ("there is {objects} on {background}", "{object} that {motion}", " and "),
        ("{background} with {objects}", "{object} which {motion}", " and "),
    )

    def name(self, o: dict) -> str:
        return self.thing.format(**o)

    def radius(self, o: dict) -> float:
        return dict(self.sizes)[o["size"]]


KINDS = {
    "sprites": Kind(),
    # More and smaller things, for longer, some of them briefly, under a camera that wanders over clutter. Terse words:
    # most of the cost of a small student is its text.
    "crowd": Kind(frames=16, counts=(0, 0.35, 0.40, 0.25), sizes=(("small", 2.7), ("large", 4.4)), brief=0.4,
                  pairs=True, drift=2.0, turn=0.3, specks=16, rags=3, thing="{size} {colour} {shape}",
                  ground="{texture} {tone}", templates=(("{objects} on {background}", "{object} {motion}", " and "),
                                                        ("{background} with {objects}", "{object} {motion}", " and "))),
}


@dataclass
class Plan:
    """What a clip shows, before anything is placed or drawn."""
    objects: list[dict]                            # shape, colour, size, motion
    texture: str
    tone: str
    template: int
    kind: Kind = KINDS["sprites"]

    def meaning(self) -> str:
        """The same for two plans that show the same things, in whatever order and words."""
        objects = sorted(" ".join(o[key] for key in ("size", "colour", "shape", "motion")) for o in self.objects)
        return ", ".join([*objects, f"{self.texture} {self.tone}"])

    def caption(self) -> str:
        whole, one, between = self.kind.templates[self.template]
        objects = between.join(one.format(object=self.kind.name(o), motion=o["motion"]) for o in self.objects)
        return whole.format(objects=objects, background=self.kind.ground.format(**vars(self)))

    def captions(self) -> list[str]:
        """The caption in each of the templates."""
        return [replace(self, template=i).caption() for i in range(len(self.kind.templates))]

    def still(self) -> str:
        """The objects alone that are always in view: true of each frame."""
        return " and ".join(self.kind.name(o) for o in self.objects if o["motion"] != BRIEF)

    def unseen(self) -> bool:
        """Whether it is kept from the training split."""
        if self.kind.pairs:                        # of each shape one colour
            return any((list(COLOURS).index(o["colour"]) + 3 * list(SHAPES).index(o["shape"])) % len(COLOURS) == 0
                       for o in self.objects)
        return zlib.crc32(self.meaning().encode()) % HELD_OUT == 0


@dataclass
class Drawn:
    """A clip of `sprites` with its ground truth."""
    frames: np.ndarray                             # (T, H, W, 3) uint8
    caption: str
    still: str                                     # the objects alone that are always in view: true of each frame
    boxes: np.ndarray                              # (T, objects, 4) float32: x0, y0, x1, y1 in pixels, NaN out of view
    objects: list[dict]                            # shape, colour, size, motion


def propose(rng: np.random.Generator, kind: Kind) -> Plan:
    count = rng.choice(np.arange(len(kind.counts)) + 1, p=kind.counts)
    kinds = rng.choice(len(SHAPES) * len(COLOURS), count, replace=False)     # no two sprites of one shape and colour
    objects = [{
        "shape": list(SHAPES)[both // len(COLOURS)],
        "colour": list(COLOURS)[both % len(COLOURS)],
        "size": kind.sizes[rng.integers(len(kind.sizes))][0],
        "motion": list(MOTIONS)[rng.integers(len(MOTIONS))],
    } for both in kinds]
    if kind.brief:
        for o in objects[1:]:
            o["motion"] = BRIEF if rng.random() < kind.brief else o["motion"]
    texture, tone = TEXTURES[rng.integers(len(TEXTURES))], list(TONES)[rng.integers(len(TONES))]
    return Plan(objects, texture, tone, int(rng.integers(len(kind.templates))), kind)


@lru_cache(maxsize=4)
def held_out_plans(seed: int, kind: Kind) -> tuple[list[Plan], set[str]]:
    """The plans of test clips 0, 1, … and their meanings, as far as `plan` has come."""
    return [], set()


def plan(seed: int, split: str, index: int, kind: Kind = KINDS["sprites"]) -> Plan:
    """
    What clip `index` shows. Meanings are split by a hash, or by pairs of shape and colour, of which each test clip has
    one that no training clip has, so that no test clip means what a training clip means;
    test clips also differ from one another, so a test clip depends on those before it. The validation clips of a set
    are the test clips that follow its own.
    """
    def first(index, accept):
        rng = np.random.default_rng((seed, SPLITS[split], index))
        while True:
            proposal = propose(rng, kind)
            if proposal.unseen() == (split == "test") and accept(proposal):
                return proposal

    if split == "train":
        return first(index, accept=lambda proposal: True)
    plans, meanings = held_out_plans(seed, kind)
    while len(plans) <= index:
        plans.append(first(len(plans), accept=lambda proposal: proposal.meaning() not in meanings))
        meanings.add(plans[-1].meaning())
    return plans[index]


# ---------------------------------------------------------------------------------------------------------------------
# Sprites: drawing. Pixel i covers [i, i + 1), so its centre is at i + 0.5.

def distance(shape: str, x, y, r):
    """Signed distance in pixels to the edge of a shape of radius r at the origin, negative inside; broadcasts."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * r
    if shape == "triangle":                        # a base at 0.9 r and two sides that meet at (0, -r)
        slope = np.array([1.9, -1.1]) / np.hypot(1.9, 1.1)
        return np.maximum(y - 0.9 * r, slope[0] * abs(x) + slope[1] * (y + r))
    if shape == "cross":
        long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        return np.maximum(long - 1.1 * r, short - 0.35 * r)
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.8 * r) - 0.3 * r
    if shape == "bar":
        return np.maximum(abs(x) - 1.2 * r, abs(y) - 0.45 * r)
    raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")


def paint(video, shape, colour, centre, radius):
    """Draws one shape over video (T, H, W, 3) float, in place: centre (T, 2), radius (T,)."""
    x0, y0 = np.maximum(np.floor((centre - 1.3 * radius[:, None]).min(0)).astype(int) - 1, 0)
    x1, y1 = np.maximum(np.ceil((centre + 1.3 * radius[:, None]).max(0)).astype(int) + 1, 0)
    window = video[:, y0:y1, x0:x1]                                         # all that it touches in any frame
    y, x = np.arange(y0, y0 + window.shape[1]) + 0.5, np.arange(x0, x0 + window.shape[2]) + 0.5
    sdf = distance(shape, x[None, None, :] - centre[:, 0, None, None], y[None, :, None] - centre[:, 1, None, None],
                   radius[:, None, None])
    cover = np.clip(0.5 - sdf, 0, 1)[..., None]                             # (T, h, w, 1): share of a pixel inside
    window += cover * (np.array(colour, float) - window)


def path(motion: str, radius: float, rng, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (T, 2) and radii (T,) of a sprite that stays inside the frame all the time; NaN while it is not there."""
    t = np.arange(frames)
    speed, orbit, phase = rng.uniform(2.5, 4), rng.uniform(6, 9), rng.uniform(0, 2 * np.pi)
    speed *= 7 / (frames - 1)                                               # as far in a longer clip
    turn = phase + rng.choice([-1, 1]) * 2 * np.pi * t / frames             # once around, either way
    offset, radii = np.zeros((frames, 2)), np.full(frames, radius)
    if motion == "moves in a circle":
        offset = orbit * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    elif motion == "grows":
        radii = radius * np.linspace(0.6, 1.5, frames)
    elif motion not in ("stays still", BRIEF):
        offset = speed * t[:, None] * np.array(MOTIONS[motion])
    margin = 1.2 * radii.max() + 1
    start = rng.uniform(margin - offset.min(0), SIZE - margin - offset.max(0))
    if motion == BRIEF:                                                     # not at the clip's start, nor its end
        length = rng.integers(frames // 4, 3 * frames // 8 + 1)
        since = rng.integers(1, frames - length)
        offset[(t < since) | (t >= since + length)] = np.nan
    return start + offset, radii


def place(objects: list[dict], rng, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Centres (objects, T, 2) and radii (objects, T), drawn again while sprites hide one another for long."""
    for _ in range(100):
        paths = [path(o["motion"], kind.radius(o), rng, kind.frames) for o in objects]
        centres, radii = (np.stack(part) for part in zip(*paths, strict=True))
        apart = np.hypot(*(centres[:, None] - centres[None]).transpose(3, 0, 1, 2))      # (objects, objects, T)
        hide = apart <= radii[:, None] + radii[None]                        # what is not there is in nobody's way
        hide &= ~np.eye(len(objects), dtype=bool)[..., None]
        both = ~np.isnan(apart)                                             # a quarter of the time that both are there
        if not hide[..., 0].any() and (hide.sum(-1) <= 0.25 * both.sum(-1)).all():
            break
    return centres, radii


def background(texture: str, tone: str, camera: np.ndarray, rng) -> np.ndarray:
    """camera (T, 2), how far the view has moved -> (T, H, W, 3) float."""
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
        for i, (shift, turn) in enumerate(phase):
            level += 0.5 * np.sin((np.cos(turn) * x + np.sin(turn) * y) * 2 * np.pi / (10 + 4 * i) + shift)
    return np.array(TONES[tone], float) * (1 + 0.25 * level[..., None])


def draw(seed: int, split: str, index: int, sprites: bool = True, kind: Kind = KINDS["sprites"]) -> Drawn:
    """
    Clip `index` of a split: a function of these numbers alone, the same on any machine.
    sprites=False leaves the sprites out of the pixels and changes nothing else.
    """
    shown = plan(seed, split, index, kind)
    rng = np.random.default_rng((seed, SPLITS[split], index, 1))
    centres, radii = place(shown.objects, rng, kind)                        # (objects, T, 2), (objects, T)

    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0, kind.drift)
    if kind.turn:
        heading = heading + kind.turn * rng.standard_normal((kind.frames, 1)).cumsum(0)             # (T, 1)
        camera = (speed * np.concatenate([np.cos(heading), np.sin(heading)], 1)).cumsum(0)
    else:
        camera = np.arange(kind.frames)[:, None] * speed * np.array([np.cos(heading), np.sin(heading)])     # (T, 2)
    video = background(shown.texture, shown.tone, camera, rng)              # (T, H, W, 3)
    reach = kind.drift * kind.frames                                        # clutter may come into view later
    clutter = lambda count: round(count * (1 + 2 * reach / SIZE) ** 2)      # of which about `count` are in view
    for _ in range(clutter(kind.rags)):
        spot, radius = rng.uniform(-reach, SIZE + reach, 2), rng.uniform(2, 5)
        shape, level = list(SHAPES)[rng.integers(len(SHAPES))], rng.choice([0.5, 1.6])
        paint(video, shape, level * np.array(TONES[shown.tone]), spot - camera, np.full(kind.frames, radius))
    for _ in range(clutter(kind.specks)):
        spot, radius = rng.uniform(-reach, SIZE + reach, 2), rng.uniform(0.8, 1.2)
        colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
        paint(video, "circle", colour, spot - camera, np.full(kind.frames, radius))
    if sprites:
        for o, centre, radius in zip(shown.objects, centres, radii, strict=True):
            there = ~np.isnan(centre[:, 0])                                 # (T,), a stretch
            paint(video[there.argmax():][:there.sum()], o["shape"], COLOURS[o["colour"]], centre[there], radius[there])
    video += 0.02 * 255 * rng.standard_normal(video.shape)

    extent = np.array([SHAPES[o["shape"]] for o in shown.objects])          # (objects, 4)
    boxes = np.concatenate([centres, centres], axis=-1) + radii[..., None] * extent[:, None]
    return Drawn(
        frames=np.clip(np.rint(video), 0, 255).astype(np.uint8),
        caption=shown.caption(), still=shown.still(),
        boxes=boxes.transpose(1, 0, 2).astype(np.float32), objects=shown.objects,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sprites: what is asked. An object is what a caption names; the specks of clutter are not called so.

WORDINGS = {                                       # by the type of the question
    "colour": ("what colour is the {}?", "what is the colour of the {}?", "which colour does the {} have?"),
    "shape": ("what shape is the {}?", "what is the shape of the {}?", "which shape does the {} have?"),
    "count": ("how many objects are there?", "how many objects are in the video?", "how many objects can be seen?"),
    "motion": ("how does the {} move?", "how is the {} moving?", "in what way does the {} move?"),
    "order": ("which object is {} at the {}?", "which of the objects is {} at the {}?", "what is {} at the {}?"),
}
COUNTS = ("one", "two", "three", "four")
MOVES = {
    "moves left": "left", "moves right": "right", "moves up": "up", "moves down": "down",
    "moves in a circle": "in a circle", "grows": "it grows", "stays still": "not at all", BRIEF: "it appears briefly",
}
PLACES = {                                         # direction in pixels, y down: of two objects, of more
    (-1, 0): ("further left", "furthest left"), (1, 0): ("further right", "furthest right"),
    (0, -1): ("higher", "highest"), (0, 1): ("lower", "lowest"),
}
CLEAR = 4                                          # pixels by which one object is ahead of all others


def answer_list(kind: Kind = KINDS["sprites"]) -> list[str]:
    """Every answer that a question can have."""
    both = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    moves = [move for motion, move in MOVES.items() if motion != BRIEF or kind.brief]
    return sorted([*COLOURS, *SHAPES, *COUNTS[:len(kind.counts)], *moves, *both])


def refer(o: dict, objects: list[dict], key: str) -> str:
    """Words for object o by its shape or its colour, with its size where that is needed; empty if they fit another."""
    alike = [other for other in objects if other[key] == o[key]]
    words = o["shape"] if key == "shape" else f"{o['colour']} object"
    if len(alike) == 1:
        return words
    if [other["size"] for other in alike].count(o["size"]) > 1 or any(other["motion"] == "grows" for other in alike):
        return ""                                  # what grows is small at one time and large at another
    return f"{o['size']} {words}"


def swaps(boxes: np.ndarray) -> list[tuple[str, int, int]]:
    """
    boxes (T, objects, 4) -> (place, the object that is there at the start, another that is there at the end), for all
    places where both are ahead by CLEAR pixels of all others that are in view then.
    """
    there = (~np.isnan(boxes[[0, -1], :, 0]).any(0)).nonzero()[0]           # what comes and goes is at neither
    centres = (boxes[[0, -1]][:, there, :2] + boxes[[0, -1]][:, there, 2:]) / 2     # (2, objects, 2)
    if len(there) < 2:
        return []
    found = []
    for direction, names in PLACES.items():
        along = centres @ np.array(direction)                               # (2, objects)
        start, end = there[along.argmax(axis=1)].tolist()
        behind, ahead = np.sort(along, axis=1)[:, -2:].T                    # (2,) each
        if start != end and (ahead - behind >= CLEAR).all():
            found.append((names[len(there) > 2], start, end))
    return found


def questions(drawn: Drawn, rng: np.random.Generator) -> list[dict]:
    """
    Rows of {question, answer, type}: one of each type that the clip allows, but the motion of every object, and who
    is where at the start and at the end, for up to two places. Each has one right answer.
    """
    objects, rows = drawn.objects, []

    def ask(kind, answer, *words):
        wording = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
        rows.append({"question": wording.format(*words), "answer": answer, "type": kind})

    for kind, key in (("colour", "shape"), ("shape", "colour")):            # of what is told apart by the other
        known = [(o, refer(o, objects, key)) for o in objects if refer(o, objects, key)]
        if known:
            o, words = known[rng.integers(len(known))]
            ask(kind, o[kind], words)
    ask("count", COUNTS[len(objects) - 1])
    kinds = [f"{o['colour']} {o['shape']}" for o in objects]
    for o, words in zip(objects, kinds, strict=True):
        ask("motion", MOVES[o["motion"]], words)
    found = swaps(drawn.boxes)
    for i in rng.permutation(len(found))[:2]:
        place, start, end = found[i]
        ask("order", kinds[start], place, "start")
        ask("order", kinds[end], place, "end")
    return rows


def changes(shown: Plan, key: str) -> list[Plan]:
    """All plans that say one thing otherwise, of the background or of an object, and are false."""
    values = {"shape": SHAPES, "colour": COLOURS, "size": dict(shown.kind.sizes), "texture": TEXTURES, "tone": TONES,
              "motion": (*MOTIONS, BRIEF) if shown.kind.brief else MOTIONS}
    if key in ("texture", "tone"):
        return [replace(shown, **{key: value}) for value in values[key] if value != getattr(shown, key)]
    plans = []
    for i, o in enumerate(shown.objects):
        others = [(other["shape"], other["colour"]) for other in shown.objects if other is not o]
        for value in values[key]:
            p = {**o, key: value}
            # What grows is small at one time and large at another, and its place stays still; so does a brief one's.
            # No caption says of its first object that it is brief.
            rests = o["motion"] in ("grows", BRIEF) and value == "stays still"
            vague = rests or o["motion"] == "grows" and key == "size" or i == 0 and value == BRIEF
            if value != o[key] and not vague and (p["shape"], p["colour"]) not in others:
                plans.append(replace(shown, objects=[*shown.objects[:i], p, *shown.objects[i + 1:]]))
    return plans


def choices(shown: Plan, rng: np.random.Generator) -> tuple[list[str], int]:
    """The caption among four that are each wrong in one thing, and its place."""
    captions = []
    for keys in (("motion",), ("colour",), ("shape", "size"), ("texture", "tone")):
        wrong = [found for found in (changes(shown, key) for key in keys) if found]
        wrong = wrong[rng.integers(len(wrong))]
        captions.append(wrong[rng.integers(len(wrong))].caption())
    rng.shuffle(captions)
    right = int(rng.integers(len(captions) + 1))
    captions.insert(right, shown.caption())
    return captions, right


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def write_clip(folder: str, seed: int, kind: Kind, clip: tuple[str, str, int]) -> tuple[dict, np.ndarray]:
    """Draws and writes one clip; returns its rows of each kind of annotation file and its boxes (T, objects, 4)."""
    name, split, index = clip
    shown, drawn = plan(seed, split, index, kind), draw(seed, split, index, kind=kind)
    # x264's look-ahead by macroblock trees does not give the same bytes every time.
    write_video(os.path.join(folder, name), drawn.frames, crf="12", preset="veryfast", **{"x264-params": "no-mbtree=1"})
    asked = questions(drawn, np.random.default_rng((seed, SPLITS[split], index, 2)))
    rows = {
        "": [{"video": name, "caption": drawn.caption, "still": drawn.still}],
        "_cap": [{"video": name, "caption": shown.captions()}],
        "_qa": [{"video": name, **row} for row in asked],
    }
    if split != "train":                           # there is no training on choices
        captions, right = choices(shown, np.random.default_rng((seed, SPLITS[split], index, 3)))
        rows["_mc"] = [{"video": name, "caption": captions, "answer": right}]
    return rows, drawn.boxes


def write_sprites(out: str, seed: int = 0, train: int = 4096, test: int = 512, val: int = 128,
                  kind: Literal["sprites", "crowd"] = "sprites"):
    """Draw an embedded data set and write it as ordinary files.

    videos/*.mp4 are H.264 (crf 12, 4:2:0). The annotations are in the published forms, each for train, test and val:
    sprites_*.json for retrieval, with one more key, "still": the objects alone, true of each frame; sprites_cap_*.json,
    the caption in each wording; sprites_qa_*.json, 5.4 questions a clip and their types, the possible answers in
    sprites_qa_answer_list.json; sprites_mc_*.json, not for train, the caption among four that are wrong in one thing.
    sprites_boxes.npz holds the true boxes, train, test and val (clips, T, objects, 4), x0 y0 x1 y1 in pixels, NaN
    where a clip has fewer sprites, or one is not in view. tokenizer.json is a word-piece tokenizer of the training
    captions and, after them, of the training questions and the answers.

    Coding changes a pixel by 4.6 of 255 levels on average, much of it the noise, and by 14 on sprites, where 4:2:0
    halves the resolution of colour; 99 % of the pixels of small sprites stay nearest to their own colour.

    Args:
        out: folder to write; it appears whole or not at all
        seed: another seed is another set
        train: clips to learn from
        test: held-out clips; none means what another or any training clip means
        val: more of these, to select on
        kind: sprites; or crowd: two to four smaller sprites for 16 frames, some in view for 4 to 6 of these only, over
            clutter, under a wandering camera; each held-out clip has a pair of shape and colour never seen before
    """
    if train < 1 or test < 1 or val < 1:
        raise ValueError(f"--train {train} --test {test} --val {val}: each wants at least one clip")
    if seed < 0:
        raise ValueError(f"--seed {seed}: wants a number that is not negative")
    out = out.rstrip("/")
    made = {"version": VERSION, "seed": seed, "train": train, "test": test, "val": val}
    made |= {"kind": kind} if kind != "sprites" else {}
    drawn_as = KINDS[kind]
    if os.path.lexists(out):
        try:
            with open(os.path.join(out, "sprites.json")) as f:
                there = json.load(f)
        except (OSError, ValueError):
            raise FileExistsError(f"{out} exists and is not a set of sprites") from None
        if there != made:
            raise FileExistsError(f"{out} holds another set, {there}; wanted {made}")
        print(f"{out} is already there, with the same parameters")
        return

    parent, name = os.path.split(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        os.mkdir(os.path.join(folder, "videos"))
        clips = {
            "train": [(f"train_{i:05d}.mp4", "train", i) for i in range(train)],
            "test": [(f"test_{i:05d}.mp4", "test", i) for i in range(test)],
            "val": [(f"val_{i:05d}.mp4", "test", test + i) for i in range(val)],
        }
        write = partial(write_clip, os.path.join(folder, "videos"), seed, drawn_as)
        written = iter(list(in_parallel(write, sum(clips.values(), []), "sprites")))
        boxes, files = {}, defaultdict(list)
        for split, part in clips.items():
            boxes[split] = np.full((len(part), drawn_as.frames, len(drawn_as.counts), 4), np.nan, np.float32)
            for padded, (rows, box) in zip(boxes[split], islice(written, len(part)), strict=True):
                padded[:, :box.shape[1]] = box
                for form, more in rows.items():
                    files[f"sprites{form}_{split}"] += more
            for i, row in enumerate(files[f"sprites_qa_{split}"]):
                row["question_id"] = i
        np.savez_compressed(os.path.join(folder, "sprites_boxes.npz"), **boxes)
        files["sprites_qa_answer_list"] = answer_list(drawn_as)
        for name, rows in files.items():
            lines = ",\n".join(map(json.dumps, rows))
            write_atomically(os.path.join(folder, f"{name}.json"), f"[\n{lines}\n]\n")
        asked = [clean(row["question"]) for row in files["sprites_qa_train"]]
        train_tokenizer([row["caption"] for row in files["sprites_train"]], os.path.join(folder, "tokenizer.json"),
                        more=[*asked, *answer_list(drawn_as)])
        write_atomically(os.path.join(folder, "sprites.json"), json.dumps(made))
        os.chmod(folder, 0o755)
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"{out}: {train} + {test} + {val} clips")


if __name__ == "__main__":
    command("sprites.py", lambda: tyro.cli(write_sprites))
