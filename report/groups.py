"""What queries have in common: what captions speak of, how pictures look, what is near in training.

report/analysis.py measures each `Group` against the whole. The word lists are report/words.json.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dataset import Tokenizer
from support.remarks import is_word
from support.topics import topics_of

if TYPE_CHECKING:
    from PIL import Image

    from dataset import Pairs
    from evaluate import Embedded

WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text("utf-8"))
NEAR = 0.5  # cosine of TF-IDF from which a training caption counts as near


class Group(NamedTuple):
    """Some of the queries of a direction, and what they have in common."""

    kind: str  # such as "colour" or "brightness"
    name: str  # such as "red" or "1 of 4 (lowest)"
    span: str  # the values that it holds, for a part of a measure
    member: np.ndarray  # (queries,) bool


# ------------------------------------------------------------------------------- captions


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    return [*filter(is_word, Tokenizer.words(caption))]


def speak_of(captions: list[str], phrases: list[str]) -> np.ndarray:
    """Which captions hold one of some words or phrases: bool (captions,)."""
    wanted = re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, phrases))})(?!\S)")
    return np.array([bool(wanted.search(" ".join(words_of(caption)))) for caption in captions])


def count_people(caption: str) -> int:
    """How many people a caption speaks of, by a rough rule.

    A singular ("a man") counts as one. A plural or a word for many ("two boys", "a crowd") counts
    as the number that stands in the three words before it, or as four where none does.
    """
    words, numbers, total = words_of(caption), WORDS["persons"]["numbers"], 0
    for place, word in enumerate(words):
        if word in WORDS["persons"]["one"]:
            total += 1
        elif word in WORDS["persons"]["many"]:
            named = [numbers[w] for w in words[max(0, place - 3) : place] if w in numbers]
            total += named[-1] if named else numbers.get(word, 4)
    return total


def labels(captions: list[str]) -> dict[tuple[str, str], np.ndarray]:
    """{(kind, name): which captions} for all word lists; "none of these" is a group as well."""
    people = np.array([count_people(caption) for caption in captions])
    found = {("what it speaks of", "people"): people > 0}
    for kind, lists in WORDS["themes"].items():
        found |= {(kind, name): speak_of(captions, words) for name, words in lists.items()}
        silent = ~np.any([held for (theme, _), held in found.items() if theme == kind], axis=0)
        found[kind, "none of these"] = silent
    for name, count in {"none": 0, "one": 1, "two": 2, "three": 3}.items():
        found["number of people", name] = people == count
    found["number of people", "four or more, or many"] = people > 3
    return found


def near_training(pairs: Pairs) -> np.ndarray:
    """For each caption how many training captions of other pictures are near it in words.

    Near: the cosine of their TF-IDF is NEAR or more; words that tell nothing do not count.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    data, near = pairs.dataset, np.zeros(len(pairs.captions))
    train = np.flatnonzero(data.labels == "train")
    texts = [data.captions[i] for i in train]
    table = TfidfVectorizer(analyzer=content, sublinear_tf=True)
    try:
        table.fit([*texts, *pairs.captions])
        trained = table.transform(texts).T.tocsr()
    except ValueError:  # no caption to train on, or none with a word
        return near
    image = np.asarray(pairs.rows)[pairs.caption_image]
    for first in range(0, len(near), 256):
        cosines = (table.transform(pairs.captions[first : first + 256]) @ trained).tocoo()
        caption, other = cosines.row[cosines.data >= NEAR], cosines.col[cosines.data >= NEAR]
        foreign = image[first + caption] != data.caption_image[train[other]]
        near[first : first + 256] += np.bincount(
            caption[foreign], minlength=min(256, len(near) - first)
        )
    return near


def content(caption: str) -> list[str]:
    """The stems of the words that tell something; a stem is the word without -s, -es, -ed, -ing."""
    words = [word.removeprefix("'") for word in words_of(caption)]
    stems = [re.sub(r"(?<=...)(es|s|ed|ing)$", "", w) for w in words if w not in WORDS["ignored"]]
    return [re.sub(r"([^aeiouls])\1$", r"\1", stem) for stem in stems if len(stem) > 1]


# ------------------------------------------------------------------------------- pictures


def picture_measures(picture: Image.Image) -> dict[str, float]:
    """Brightness, contrast, colourfulness and edges of a picture whose levels are 0 to 255.

    The mean and the standard deviation of luminance (Rec. 601); Hasler and Suesstrunk's M3 (2003);
    the mean length of luminance's gradient, in levels a pixel.
    """
    red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), np.float64), 2, 0)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    rg, yb = red - green, (red + green) / 2 - blue
    colours = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    edges = np.hypot(*np.gradient(light)).mean() if min(light.shape) > 1 else 0.0
    return {
        "brightness": light.mean(),
        "contrast": light.std(),
        "colourfulness": colours,
        "edges": edges,
    }


def measure_pictures(embedded: Embedded) -> dict[str, np.ndarray]:
    """{measure: (images,)}; "typical" is the cosine with the mean of the split's pictures."""
    pairs, found = embedded.pairs, defaultdict(list)
    for row in tqdm(pairs.rows, "pictures", leave=False, disable=None):
        for name, value in picture_measures(pairs.dataset.picture(int(row))).items():
            found[name].append(value)
    images = embedded.image_embeddings.astype(np.float64)
    mean = np.nanmean(images, axis=0)
    typical = images @ mean / max(np.linalg.norm(mean), 1e-12)
    return {name: np.array(values) for name, values in found.items()} | {"typical": typical}


# --------------------------------------------------------------------------------- groups


def parts(kind: str, values: np.ndarray, count: int = 4) -> list[Group]:
    """Queries by a measure: as equal in number as its ties allow, in `count` parts."""
    edges = np.nanquantile(values, np.arange(1, count) / count)
    part, groups = np.searchsorted(edges, values), []  # a value on an edge is in the lower part
    for number in range(count):
        member = (part == number) & np.isfinite(values)
        if member.any():
            end = {0: " (lowest)", count - 1: " (highest)"}.get(number, "")
            span = f"{values[member].min():.3g} to {values[member].max():.3g}"
            groups.append(Group(kind, f"{number + 1} of {count}{end}", span, member))
    return groups if len(groups) > 1 else []  # where all are alike there is nothing to compare


class Features(NamedTuple):
    """All that groups are made of, measured once for both directions."""

    labels: dict[tuple[str, str], np.ndarray]  # of captions, bool
    measures: dict[str, np.ndarray]  # of captions
    topic: np.ndarray  # of images
    topic_names: list[str]
    pictures: dict[str, np.ndarray]


def features(embedded: Embedded) -> Features:
    """What the captions and pictures of a split are like."""
    pairs = embedded.pairs
    topic, names = topics_of(pairs, 0)
    measures = {
        "length in words": np.array([len(words_of(caption)) for caption in pairs.captions], float),
        "training captions near": near_training(pairs),
    }
    return Features(labels(pairs.captions), measures, topic, names, measure_pictures(embedded))


def groups_of(way: str, found: Features, caption_image: np.ndarray) -> list[Group]:
    """The groups of a direction's queries, without empty ones.

    A picture speaks of what half of its captions or more speak of, and has their mean measures; a
    caption has the topic and the measures of its picture.
    """

    def of_query(values: np.ndarray, captions: bool) -> np.ndarray:
        if captions == (way == "t2i"):
            return values
        if not captions:
            return values[caption_image]
        return np.bincount(caption_image, values) / np.bincount(caption_image)

    groups = [
        Group(kind, name, "", of_query(held.astype(float), True) >= 0.5)
        for (kind, name), held in found.labels.items()
    ]
    groups.sort(key=lambda group: [kind for kind, _ in found.labels].index(group.kind))
    topic = of_query(found.topic, False)
    groups += [Group("topic", x, "", topic == i) for i, x in enumerate(found.topic_names)]
    for kind, values in found.measures.items():
        groups += parts(kind, of_query(values, True))
    for kind, values in found.pictures.items():
        groups += parts(kind, of_query(values, False))
    return [group for group in groups if group.member.any()]
