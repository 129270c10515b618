"""The built-in data: repeatable, no scene twice, captions that tell near misses apart."""

import re
from itertools import permutations

import numpy as np
import pytest

from sources import shapes

SIZES = {"train": 150, "dev": 60, "test": 60}
ANY_SHAPE = ("shape", "figure")


@pytest.fixture(scope="module")
def data():
    return shapes.make_scenes(3, SIZES), *shapes.make_shapes(3, SIZES)


def test_same_seed_same_bytes(data):
    _, pixels, captions, splits = data
    again = shapes.make_shapes(3, SIZES)
    assert again[0].tobytes() == pixels.tobytes() and again[1:] == (captions, splits)
    other = shapes.make_shapes(4, SIZES)
    assert other[0].tobytes() != pixels.tobytes() and other[1] != captions


def test_counts_and_split_names(data):
    _, pixels, captions, splits = data
    total = sum(SIZES.values())
    assert pixels.shape == (total, shapes.SIZE, shapes.SIZE, 3) and pixels.dtype == np.uint8
    assert len(captions) == len(splits) == total
    assert {name: splits.count(name) for name in SIZES} == SIZES


def test_a_split_does_not_depend_on_the_size_of_train(data):
    _, pixels, captions, _ = data
    less = shapes.make_shapes(3, SIZES | {"train": 10})
    assert np.array_equal(less[0][10:], pixels[150:]) and less[1][10:] == captions[150:]
    assert np.array_equal(less[0][:10], pixels[:10]) and less[1][:10] == captions[:10]


def test_no_scene_or_picture_twice(data):
    scenes = [scene for split in data[0].values() for scene in split]
    assert len(set(scenes)) == len(scenes) == len({image.tobytes() for image in data[1]})


def test_five_distinct_captions_of_fair_length(data):
    for five in data[2]:
        assert len(set(five)) == 5
        for caption in five:
            assert 8 <= len(caption.split()) <= 35
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |[{}]| \.| ,", caption.lower()), (
                caption
            )


def test_siblings_differ_in_one_word(data):
    for split in data[0].values():
        flat = [shapes._words(scene) for scene in split]
        near = sum(any(_distance(a, b) == 1 for b in flat) for a in flat)
        assert near >= len(flat) / 3


def _distance(a, b):
    """Words changed between two flat scenes, their things in the best order."""
    if len(a) != len(b):
        return 99
    things = [b[i : i + 4] for i in range(2, len(b), 4)]
    orders = ([*b[:2], *(w for t in order for w in t)] for order in permutations(things))
    return min(sum(x != y for x, y in zip(a, order, strict=True)) for order in orders)


def _read(caption):
    """A caption back into (texture, ground colour), [{kind: value}]: by regular expressions."""
    text = caption.lower()

    def group(kind, extra=()):
        said = [w for words in shapes.WORDS[kind].values() for w in words] + list(extra)
        return "(?:" + "|".join(sorted(said, key=len, reverse=True)) + ")"

    def value(kind, said):
        return next((v for v, words in shapes.WORDS[kind].items() if said in words), "")

    found = re.search(
        rf"(?:({group('texture')}) )?(?:({group('ground')}) )?(?:background|backdrop|ground)\b"
        rf"(?: ({group('texture')}))?",
        text,
    )
    ground = value("texture", found[1] or found[3]), value("ground", found[2])
    name = rf"\ban? (?:({group('size')}) )?(?:({group('colour')}) )?({group('shape', ANY_SHAPE)})\b"
    # A place belongs to the name before it, or to the one after it where a verb stands between.
    verb, place = "(?:sits|lies|is placed|appears)", rf"(?:in|at|near) the ({group('place')})"
    before = re.findall(rf"{place} {verb} {name}", text)
    after = re.findall(rf"{name}(?: {verb})?(?: {place})?", text)
    rows = [(s, c, h, p) for p, s, c, h in before] or after
    things = [
        {
            "shape": value("shape", h),
            "colour": value("colour", c),
            "size": value("size", s),
            "place": value("place", p),
        }
        for s, c, h, p in rows
    ]
    return ground, things


def _true(ground, things, scene):
    """The reading holds of the scene: an independent spelling of shapes.matches."""
    if any(said and said != is_ for said, is_ in zip(ground, scene.ground, strict=True)):
        return False
    return len(things) == len(scene.things) and any(
        all(
            not v or getattr(b, k) == v
            for a, b in zip(things, order, strict=True)
            for k, v in a.items()
        )
        for order in permutations(scene.things)
    )


def test_every_caption_is_true_and_outside_train_of_one_scene_only(data):
    scenes, _, captions, splits = data
    flat = [scene for split in SIZES for scene in scenes[split]]
    left_out = 0
    for scene, five, split in zip(flat, captions, splits, strict=True):
        for caption in five:
            ground, things = _read(caption)
            assert _true(ground, things, scene), (caption, scene)
            left_out += not all([*ground, *(v for t in things for v in t.values())])
            if split != "train":
                assert sum(_true(ground, things, other) for other in scenes[split]) == 1, caption
    assert 0.2 < left_out / (5 * len(flat)) < 0.8


def test_matches_leaves_open_words_open():
    star = shapes.Thing("star", "red", "big", "centre")
    disc = shapes.Thing("circle", "blue", "small", "top left")
    scene = shapes.Scene(("plain", "grey"), (star, disc))
    some = shapes.Thing("", "blue", "", "")
    assert shapes.matches(shapes.Scene(("", "grey"), (some, star)), scene)
    assert not shapes.matches(shapes.Scene(("", "grey"), (some, some)), scene)
    assert not shapes.matches(shapes.Scene(("", "grey"), (star,)), scene)


def test_a_thing_has_its_colour_at_its_place(data):
    scenes, pixels, _, _ = data
    names = list(shapes.WORDS["colour"])
    colours = np.array([shapes.RGB[name] for name in names])
    flat = [scene for split in SIZES for scene in scenes[split]]
    for scene, image in zip(flat, pixels, strict=True):
        for thing in scene.things:
            x, y = shapes.PLACES[thing.place]
            if thing.shape != "ring":  # whose middle is the ground
                mean = image[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
                nearest = names[np.linalg.norm(colours - mean, axis=1).argmin()]
                assert nearest == thing.colour, (thing, mean)
                assert (
                    np.abs(mean - shapes.RGB[thing.colour]).max() < 70
                )  # a star's middle touches its edge
