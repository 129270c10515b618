"""Which image is for training, which for dev, which for test: the data's own, official, or seeded.

sources/folder.py asks `choose_splits`. A split by caption, which would test on pictures that were
trained on, is taken only when asked for, and marked.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from sources.collection import SPLITS
from sources.layouts import find_files
from sources.reading import Reading, Row
from support.command import HERE, UserError

LISTS = {"train": ("train",), "dev": ("dev", "val", "validation"), "test": ("test",)}
MOST = 1500  # images that a seeded split holds out for dev, and as many for test
# Of --splits random: a constant, so that no --seed trains on another's test images; this one parts
# the small sets of the tests about evenly.
SPLIT_SEED = 14431
OFFICIAL = HERE / "Flickr8k"  # the official lists are shipped there


class Labelled(NamedTuple):
    """The split of every row, and how it came about."""

    labels: list[str]  # one a row, "" for none
    way: str  # "given", "official" or "random"
    remarks: list[str]  # what the user should know
    by_caption: bool = False  # an image stands in two splits: figures made on it flatter


def choose_splits(
    choice: str,
    rows: list[Row],
    lists: dict[str, str],
    digests: dict[str, str] | None = None,
) -> Labelled:
    """Gives every row its split; `choice` is --splits.

    `lists` are the data's own, {image: split}; `digests` tell each image's content. Raises
    UserError when `choice` is given or official and the data has no such split.
    """
    labels = [row.split or lists.get(row.image, "") for row in rows]  # the data's own
    leak = leak_of(rows, labels)
    contents = {row.image: (digests or {}).get(row.image) or row.image for row in rows}
    alone = choice == "auto" and {*labels} - {""} == {"dev"}  # nothing to train on
    if choice == "given" or (choice == "auto" and any(labels) and not leak and not alone):
        return given_splits(rows, contents, labels, leak)
    official = read_lists(OFFICIAL)
    fits = {official.get(image) for image in contents} >= set(SPLITS)  # there are some of each
    if choice == "official" and not fits:
        raise UserError("--splits official: the image names are not Flickr8k's; use --splits auto")
    if choice != "random" and fits:
        way, words, split_of = "official", "the official lists", official
    else:
        way, words, split_of = "random", "a seeded split by image", seeded_splits(contents)
    remarks = []
    if choice == "auto" and leak:
        refused = f"the data's own split is by caption and refused: {leak}"
        remarks = [f"{refused}; used instead: {words}"]
    elif alone:
        remarks = [f"all images that are there are val images; used instead: {words}"]
    return Labelled([split_of.get(row.image, "") for row in rows], way, remarks)


def read_lists(folder: Path) -> dict[str, str]:
    """{image name: split} of Flickr_8k.{train,dev,test}Images.txt, as they stand there."""
    return {
        line.strip(): split
        for split in SPLITS
        for path in find_files(folder, [f"*{split}Images.txt"])
        for line in path.read_text("utf-8").split("\n")
        if line.strip()
    }


def own_lists(reading: Reading) -> dict[str, str]:
    """{picture: split} of lists of pictures such as Flickr_8k.trainImages.txt or val.txt.

    A list is a text file in the folder, or one deep, that is named after its split and holds names
    of pictures, one a line, with or without their extension.
    """
    pictures, found = reading.pictures, {}
    for split, words in LISTS.items():
        patterns = [f"*{word}{end}.txt" for word in words for end in ("Images", "_images", "")]
        for path in find_files(reading.folder, patterns):
            names = [x.strip() for x in re.split(r"[\r\n]+", reading.text(path)) if x.strip()]
            if 2 * sum(map(pictures.has, names)) > len(names) or path.stem.endswith("Images"):
                known = filter(None, map(pictures.find, names))
                found |= {pictures.name(picture): split for picture in known}
    return found


def leak_of(rows: list[Row], labels: list[str]) -> str:
    """Says how many test images are trained on too; "" where no image stands in two splits."""
    labelled = set(zip((row.image for row in rows), labels, strict=True))
    images = {split: {image for image, label in labelled if label == split} for split in SPLITS}
    if sum(map(len, images.values())) == len(set().union(*images.values())):
        return ""
    leaked, tests = images["train"] & images["test"], images["test"]
    return f"{len(leaked):,} of its {len(tests):,} test images are also training images"


def given_splits(
    rows: list[Row], contents: dict[str, str], labels: list[str], leak: str
) -> Labelled:
    """The data's own split, completed where it lacks dev or test images; a leak is said."""
    if not any(labels):
        raise UserError("--splits given: this data has no splits of its own; use --splits auto")
    if leak:
        remark = f"the given split is by caption, not by image: {leak}"
        return Labelled(labels, "given", [remark], by_caption=True)
    split_of = {row.image: label for row, label in zip(rows, labels, strict=True) if label}
    remarks = []
    if "test" not in labels and "dev" in labels:
        split_of = {x: "test" if label == "dev" else label for x, label in split_of.items()}
        remarks.append("its val images are used as test")
    train = {image: contents[image] for image, split in split_of.items() if split == "train"}
    if "dev" not in split_of.values() and train:
        drawn = held_out(train, 1 / 10, ("dev",))
        split_of |= drawn
        remarks.append(f"{len(drawn):,} of its training images, drawn by a seed, are used as dev")
    remarks = ["; ".join(remarks)] if remarks else []
    return Labelled([split_of.get(row.image, "") for row in rows], "given", remarks)


def seeded_splits(contents: dict[str, str]) -> dict[str, str]:
    """An eighth of the images for test, as many for dev, the rest for train."""
    return dict.fromkeys(contents, "train") | held_out(contents, 1 / 8, ("test", "dev"))


def held_out(contents: dict[str, str], share: float, names: tuple[str, ...]) -> dict[str, str]:
    """{image: split} of the images that are held out, about a share of all for each name.

    A hash of its content decides each image by itself: one that is lost or new moves none of the
    others, and copies of a picture are never parted. From 12,000 images on the share is halved,
    again when they double, which moves held out images to training, none from test to dev. Of few
    images each split gets one.
    """
    while share * len(contents) > MOST:
        share /= 2
    left = sorted({*contents.values()}, key=place_of)
    split_of = {}
    for i, name in enumerate(names):
        if name == "dev":  # from the other end
            left.reverse()
        near = [x for x in left if (1 - place_of(x) if name == "dev" else place_of(x)) < share]
        part = (near or left[:1])[: max(0, len(left) - len(names) + i)]
        split_of |= dict.fromkeys(part, name)
        left = left[len(part) :]
    return {x: split_of[content] for x, content in contents.items() if content in split_of}


def place_of(content: str) -> float:
    """Where a content stands in [0, 1), by a hash."""
    digest = hashlib.sha256(f"{SPLIT_SEED} {content}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
