"""Which images train, which choose the best epoch (dev), which are kept for the end (test).

dataset.py calls `choose_splits` once the captions are read. A split is always by image: one by
caption, which would test on pictures that were trained on, is taken only when asked for, marked.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sources.layouts import find_files, read_text
from support.command import HERE, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from sources.layouts import Row

SPLITS = ("train", "dev", "test")
SPLIT_SEED = 0  # of --splits random: a constant, so that no --seed trains on another's test images
OFFICIAL = HERE / "Flickr8k"  # the official lists are shipped there


class Labelled(NamedTuple):
    """The split of every row, and how it came about."""

    labels: list[str]  # one a row, "" for none
    way: str  # "given", "official" or "random"
    remarks: list[str]  # what the user should know
    by_caption: bool = False  # an image stands in two splits: figures made on it flatter


def choose_splits(choice: str, rows: list[Row], images: list[str], folder: Path) -> Labelled:
    """Gives every row its split; `choice` is --splits, `images` are the rows' images, sorted.

    Raises UserError when `choice` is given or official and the data has no such split.
    """
    lists = official_lists(folder)
    labels = [row.split or lists.get(row.image, "") for row in rows]  # the data's own
    leak = leak_of(rows, labels)
    if choice == "given" or (choice == "auto" and any(labels) and not leak):
        return given_splits(rows, images, labels, leak)
    if choice == "official" or (choice == "auto" and official_table(images)):
        labelled = official_splits(rows, images)
    else:
        labelled = seeded_splits(rows, images)
    if choice == "auto" and leak:
        used = "the official lists" if labelled.way == "official" else "a seeded split by image"
        remark = f"the data's own split is by caption and refused: {leak}; used instead: {used}"
        labelled = labelled._replace(remarks=[remark])
    return labelled


def official_lists(folder: Path) -> dict[str, str]:
    """{image name: split} of Flickr_8k.{train,dev,test}Images.txt in `folder`, or one deep."""
    table = {}
    for split in SPLITS:
        for path in find_files(folder, [f"*{split}Images.txt"]):
            table |= {line.strip(): split for line in read_text(path).split("\n") if line.strip()}
    return table


def leak_of(rows: list[Row], labels: list[str]) -> str:
    """Says how many test images are trained on too; "" where no image stands in two splits."""
    splits = defaultdict(set)
    for row, label in zip(rows, labels, strict=True):
        splits[row.image] |= {label} - {""}
    if all(len(found) < 2 for found in splits.values()):
        return ""
    tests = sum("test" in found for found in splits.values())
    leaked = sum({"train", "test"} <= found for found in splits.values())
    return f"{leaked:,} of its {tests:,} test images are also training images"


def given_splits(rows: list[Row], images: list[str], labels: list[str], leak: str) -> Labelled:
    """The data's own split, completed where it lacks dev or test images; a leak is said."""
    if not any(labels):
        raise UserError("--splits given: this data has no splits of its own; use --splits auto")
    if leak:
        remark = f"the given split is by caption, not by image: {leak}"
        return Labelled(labels, "given", [remark], by_caption=True)
    table = {row.image: label for row, label in zip(rows, labels, strict=True) if label}
    completed, remarks = complete([table.get(image, "") for image in images])
    table = dict(zip(images, completed, strict=True))
    return Labelled([table[row.image] for row in rows], "given", remarks)


def complete(labels: list[str]) -> tuple[list[str], list[str]]:
    """The labels of images with the split filled that a layout lacks, and a remark about it."""
    remarks = []
    if "test" not in labels and "dev" in labels:
        labels = ["test" if label == "dev" else label for label in labels]
        remarks.append("its val images are used as test")
    if "dev" not in labels:
        train = [row for row, label in enumerate(labels) if label == "train"]
        order = np.random.default_rng(SPLIT_SEED).permutation(train)
        drawn = set(order[: min(1000, max(1, len(train) // 10))].tolist())
        labels = ["dev" if row in drawn else label for row, label in enumerate(labels)]
        remarks.append(f"{len(drawn):,} of its training images, drawn by a seed, are used as dev")
    return labels, ["; ".join(remarks)] if remarks else []


def official_table(images: list[str]) -> dict[str, str]:
    """The lists of Flickr8k's authors, {image: split}; {} unless `images` has some of each."""
    table = official_lists(OFFICIAL)
    return table if {table.get(image) for image in images} >= set(SPLITS) else {}


def official_splits(rows: list[Row], images: list[str]) -> Labelled:
    """Flickr8k's 6,000 / 1,000 / 1,000 images; what the lists do not name is in no split."""
    table = official_table(images)
    if not table:
        raise UserError("--splits official: the image names are not Flickr8k's; use --splits auto")
    return Labelled([table.get(row.image, "") for row in rows], "official", [])


def seeded_splits(rows: list[Row], images: list[str]) -> Labelled:
    """An eighth of the images, at most 1,000, for test, as many for dev, the rest for train."""
    held = min(1000, max(1, len(images) // 8))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    labels = np.full(len(images), "train", dtype="<U5")
    labels[order[:held]], labels[order[held : 2 * held]] = "test", "dev"
    table = dict(zip(images, labels.tolist(), strict=True))
    return Labelled([table[row.image] for row in rows], "random", [])
