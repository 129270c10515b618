"""Coloured shapes on textured grounds, each picture with five English captions.

The built-in data, a stand-in for photographs; dataset.py calls read_shapes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from sources.pictures import cached, read_array

SIZE = 64  # pixels, square
SPLIT_SIZES = {"train": 6000, "dev": 400, "test": 400}
MADE_IN_ORDER = ("test", "dev", "train")  # a later split avoids the scenes of the earlier ones
FINE = 2  # pictures are drawn this much larger and then reduced, which smooths the edges


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """ "disc/circle; star" -> {"disc": ("disc", "circle"), "star": ("star",)}"""
    return {entry.split("/")[0]: tuple(entry.split("/")) for entry in text.split("; ")}


# Kind -> value -> its synonyms. No place is true of two cells, as "at the top" would be.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "texture": _table(
        "plain/unpatterned/with no pattern; striped/stripy/with stripes; dotted/spotted/with dots; "
        "checked/chequered/with a chessboard pattern; wavy/rippled/with wavy lines"
    ),
    "ground": _table("grey/gray; brown; pink; teal; olive"),
    "shape": _table(
        "circle/disc; ring/hoop; cross/plus sign; diamond/rhombus; square; triangle; star; heart"
    ),
    "colour": _table("red; orange; yellow; green; blue; purple/violet; white; black"),
    "size": _table("small/little/tiny; big/large"),
    "place": _table(
        "top left/upper left/top left corner; top centre/upper middle; top right/upper right/"
        "top right corner; middle left/centre left; centre/very centre/very middle; middle right/"
        "centre right; bottom left/lower left/bottom left corner; bottom centre/lower middle; "
        "bottom right/lower right/bottom right corner"
    ),
}
KINDS = ("texture", "ground") + ("shape", "colour", "size", "place") * 3  # as _words lists them
PLACES = {p: 12 + 20 * np.array([i % 3, i // 3]) for i, p in enumerate(WORDS["place"])}  # centres
# Object colours are strong and differ in lightness too (for the colour-blind); grounds are dull.
_CODES = _table(
    "red/cd1923; orange/fa870f; yellow/fae632; green/1ea03c; blue/194be1; purple/9628b4; "
    "white/fafafa; black/0f0f0f; grey/919194; brown/805c42; pink/deacb8; teal/62a0a6; olive/96985c"
)
RGB = {name: np.array([*bytes.fromhex(code)]) for name, code in _CODES.values()}
# {things} are noun phrases with their places, {clauses} whole clauses; {be} is "is" or "are".
TEMPLATES = _table(
    "{things} on {ground}; {things} against {ground}; there {be} {things} on {ground}; "
    "the picture shows {things} on {ground}; a drawing of {things} on {ground}; "
    "on {ground} there {be} {things}; in front of {ground} {be} {things}; "
    "{ground} behind {things}; {ground} is the setting for {things}; {first} on {ground}{rest}; "
    "{things} {be} seen against {ground}; {clauses} on {ground}; on {ground}, {clauses}; "
    "against {ground}, {clauses}; {clauses}, and behind {it} is {ground}"
)


@dataclass(frozen=True)
class Thing:  # in the words that are the keys of WORDS
    shape: str
    colour: str
    size: str
    place: str


class Scene(NamedTuple):  # with "" for some words, a description that leaves those open
    ground: tuple[str, str]  # texture, colour
    things: tuple[Thing, ...]


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.random() * len(options))]  # far faster than rng.choice


def _words(scene: Scene) -> list[str]:
    things = [w for t in scene.things for w in (t.shape, t.colour, t.size, t.place)]
    return [*scene.ground, *things]


def _scene(words: list[str]) -> Scene:  # things sorted, so that their order makes no new scene
    things = [Thing(*words[i : i + 4]) for i in range(2, len(words), 4)]
    return Scene((words[0], words[1]), tuple(sorted(things, key=lambda thing: thing.place)))


def _fits(said: Sequence[str], true: Sequence[str]) -> bool:
    return len(said) == len(true) and all(map(lambda a, b: a in ("", b), said, true))


def matches(mentioned: Scene, scene: Scene) -> bool:
    """Whether a description that may leave words open, but names every thing, fits a scene."""
    orders = permutations(scene.things)  # lazily: most scenes fail by their ground already
    same = (_fits(_words(mentioned), _words(Scene(scene.ground, order))) for order in orders)
    return _fits(mentioned.ground, scene.ground) and any(same)


def make_scenes(seed: int = 0, sizes: dict[str, int] = SPLIT_SIZES) -> dict[str, list[Scene]]:
    """The scenes of each split; none occurs twice, and many differ in one word from another."""
    seen, splits = set(), {split: [] for split in sorted(sizes, key=MADE_IN_ORDER.index)}
    for split, scenes in splits.items():
        rng = np.random.default_rng([seed, MADE_IN_ORDER.index(split), 0])
        while len(scenes) < sizes[split]:
            if scenes and rng.random() < 0.35:  # a sibling: one word of an earlier scene changed
                words = _words(_pick(rng, scenes))
                slot = int(rng.random() * len(words))
                words[slot] = _pick(rng, list(WORDS[KINDS[slot]]))
            else:
                words = [_pick(rng, list(WORDS[kind])) for kind in KINDS[: rng.choice((6, 10, 14))]]
            scene = _scene(words)
            if scene not in seen and len({t.place for t in scene.things}) == len(scene.things):
                seen.add(scene)
                scenes.append(scene)
    return splits


def _join(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def _phrase(*parts: str) -> str:
    text = " ".join(filter(None, parts))
    return ("an " if text[0] in "aeiou" else "a ") + text


def _sentence(rng: np.random.Generator, template: str, said: Scene) -> str:
    """One way to put a (partial) description into a template."""
    words = zip(KINDS, _words(said), strict=False)  # from here on, each in one of its synonyms
    spoken = _scene([_pick(rng, WORDS[kind].get(word, ("",))) for kind, word in words])
    texture, tone, noun = *spoken.ground, _pick(rng, ("background", "backdrop", "ground"))
    ground = (tone, noun, texture) if texture.startswith("with") else (texture, tone, noun)
    listed, clauses = [], []
    # A thing without a place goes last, or else it could seem to be at its neighbour's.
    things = sorted(rng.permutation(spoken.things), key=lambda thing: not thing.place)
    place_first = things[-1].place and rng.random() < 0.5
    for thing in things:
        name = _phrase(thing.size, thing.colour, thing.shape or _pick(rng, ("shape", "figure")))
        place = f"{_pick(rng, ('in', 'at', 'near'))} the {thing.place}"
        verb = _pick(rng, ("sits", "lies", "is placed", "appears"))
        listed.append(f"{name} {place}" if thing.place else name)
        clause = f"{place} {verb} {name}" if place_first else f"{name} {verb} {place}"
        clauses.append(clause if thing.place else f"there is {name}")
    be, it = ("are", "them") if len(things) > 1 else ("is", "it")
    rest = ", together with " + _join(listed[1:]) if listed[1:] else ""
    slots = {"things": _join(listed), "clauses": _join(clauses), "first": listed[0], "rest": rest}
    text = template.format(**slots, ground=_phrase(*ground), be=be, it=it)
    return text[0].upper() + text[1:] + "."


def write_captions(rng: np.random.Generator, scene: Scene, rivals: list[Scene]) -> list[str]:
    """Five captions from five templates; each is true of just one of the rivals (if any given)."""
    captions, tries = {}, 0  # captions by template
    while len(captions) < 5:
        words, tries = _words(scene), tries + 1
        # Leave out up to two words, fewer and in the end none when that keeps being ambiguous.
        for _ in range(max(0, _pick(rng, (0, 0, 1, 1, 2)) - tries // 15)):
            words[int(rng.random() * len(words))] = ""
        said, template = _scene(words), _pick(rng, [t for t in TEMPLATES if t not in captions])
        text = _sentence(rng, template, said)
        clear = "" not in words or sum(matches(said, other) for other in rivals) < 2
        if clear and any(said.ground) and 8 <= len(text.split()) <= 35:
            captions[template] = text
    return list(captions.values())


# The corners of the shapes, within a circle of radius about one; y points down.
_TURN = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_SIN, _COS = np.sin(_TURN), np.cos(_TURN)
_HEART = 13 * _COS - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN)
_CROSS = [(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)]  # half of it
OUTLINES = {
    "circle": np.stack([_COS, _SIN], 1),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85,
    "triangle": np.array([(0, -1.05), (1.05, 0.8), (-1.05, 0.8)]),
    "diamond": np.array([(0, -1.15), (0.75, 0), (0, 1.15), (-0.75, 0)]),
    "star": np.stack([_SIN, -_COS], 1)[::4] * np.tile([1.1, 0.45], 5)[:, None],
    "cross": np.array(_CROSS + [(-x, -y) for x, y in _CROSS]),
    "heart": np.stack([_SIN**3, (-_HEART - 2) / 16], 1),
}
_Y, _X = np.mgrid[: SIZE * FINE, : SIZE * FINE].astype(np.float32)
# Where a ground is dark, from two coordinates in units of the pattern's pitch and a slant.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "plain": lambda x, y, slant: np.zeros(x.shape, bool),
    "striped": lambda x, y, slant: (x * np.cos(slant) + y * np.sin(slant)) % 1 < 0.5,
    "dotted": lambda x, y, slant: (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.09,
    "checked": lambda x, y, slant: (x % 1 < 0.5) ^ (y % 1 < 0.5),
    "wavy": lambda x, y, slant: (y + 0.3 * np.sin(3 * x)) % 1 < 0.5,
}


def draw(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 (SIZE, SIZE, 3); noise keeps any two from being the same."""
    pitch, slant, *shift = rng.uniform((15, 0, 0, 0), (20, np.pi, 9, 9)).tolist()
    dark = PATTERNS[scene.ground[0]](_X / pitch + shift[0], _Y / pitch + shift[1], slant)
    tones = (RGB[scene.ground[1]] + rng.uniform(-5, 5, 3)) * [[1.08], [0.78]]
    image = Image.fromarray(tones.clip(0, 255).astype(np.uint8)[dark.astype(np.intp)])
    pen = ImageDraw.Draw(image)
    for thing in sorted(scene.things, key=lambda thing: thing.size):  # big ones first, beneath
        centre = (PLACES[thing.place] + rng.uniform(-1.5, 1.5, 2)) * FINE
        radius = (6.2 if thing.size == "small" else 10.8) * rng.uniform(0.94, 1.06) * FINE
        fill = tuple(
            (RGB[thing.colour] + rng.uniform(-12, 12, 3)).clip(0, 255).astype(int).tolist()
        )
        # A thin edge, so that nothing drowns in its ground: dark, but light around black.
        edge = (190, 190, 190) if thing.colour == "black" else tuple(v * 2 // 5 for v in fill)
        if thing.shape == "ring":  # its hole shows the ground
            for inset, width, ink in ((0, 0.5 * radius, edge), (1, 0.5 * radius - 2, fill)):
                corners = np.concatenate([centre - radius + inset, centre + radius - inset])
                pen.ellipse(corners.tolist(), None, ink, round(width))
        else:
            sin, cos = np.sin(tilt := rng.uniform(-0.1, 0.1)), np.cos(tilt)
            corners = OUTLINES[thing.shape] @ [[cos, sin], [-sin, cos]] * radius + centre
            pen.polygon(corners.ravel().tolist(), fill=fill, outline=edge)
    pixels = np.asarray(image.reduce(FINE), np.float32) * rng.uniform(0.94, 1.04)
    pixels += 3 * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def make_shapes(
    seed: int = 0, sizes: dict[str, int] = SPLIT_SIZES
) -> tuple[np.ndarray, list[list[str]], list[str]]:
    """(pixels uint8 (N, SIZE, SIZE, 3), five captions a scene, the split's name of each scene)."""
    made = make_scenes(seed, sizes)
    pixels, captions = [], []
    for split in sizes:
        # Generators of the split's own: what one split holds does not move the others.
        paint, tell = (np.random.default_rng([seed, MADE_IN_ORDER.index(split), i]) for i in (1, 2))
        rivals = [] if split == "train" else made[split]
        captions += [write_captions(tell, scene, rivals) for scene in made[split]]
        pixels += [draw(paint, scene) for scene in made[split]]
    return np.stack(pixels), captions, [split for split in sizes for _ in made[split]]


def read_shapes(cache: Path) -> dict[str, Any]:
    """The fields of a Collection for the built-in data, generated once."""
    source = Path(__file__).read_bytes()
    key = hashlib.sha256(source + repr(SPLIT_SIZES).encode()).hexdigest()

    def build(folder: Path) -> None:
        pixels, captions, labels = make_shapes()
        np.save(folder / "pixels.npy", pixels)
        digests = [hashlib.sha256(scene.tobytes()).hexdigest()[:32] for scene in pixels]
        (folder / "index.json").write_text(json.dumps([captions, labels, digests]), "utf-8")

    def read(folder: Path) -> tuple[np.ndarray, list[list[str]], list[str], list[str]]:
        captions, labels, digests = json.loads((folder / "index.json").read_text("utf-8"))
        return read_array(folder, "pixels.npy"), captions, labels, digests

    name = f"shapes-{SIZE}-{key[:12]}"
    pixels, captions, labels, digests = cached(cache, name, build, read)
    return {
        "path": "shapes",
        "layout": "built-in",
        "kind": "built-in",
        "splits": "built-in",
        "names": [f"{label}-{row:05d}" for row, label in enumerate(labels)],
        "paths": [],
        "pixels": pixels,
        "digests": digests,
        "captions": [caption for five in captions for caption in five],
        "caption_image": np.repeat(np.arange(len(captions)), 5),
        "labels": np.repeat(labels, 5),
    }
