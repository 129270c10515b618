"""A folder of captions and pictures: read in its layout, decoded, split by image, faults counted.

dataset.py asks `read_collection` for the fields of a Collection. A split by caption, which would
test on pictures that were trained on, is taken only when asked for, and marked.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sources.collection import SPLITS
from sources.layouts import HOW_TO_GET, Row, find_files, find_images, read_folder, read_text
from sources.pictures import cached_pixels
from support.command import HERE, UserError, warn

SPLIT_SEED = 0  # of --splits random: a constant, so that no --seed trains on another's test images
OFFICIAL = HERE / "Flickr8k"  # the official lists are shipped there


def read_collection(
    folder: Path, splits: str, size: int, cache: Path, workers: int, titles: str
) -> dict[str, Any]:
    """The fields of a Collection for a folder in any known layout.

    `titles` is for the rules that a layout may have of its own (see posters/films.py). Raises
    UserError for whatever is wrong with the folder, and when more than 10% of the pictures cannot
    be read. Remarks on the splits go to stderr.
    """
    try:
        layout, described, rows = read_folder(folder)
        files = find_images(folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    if not files:
        raise UserError(f"{folder} has captions but no image; {HOW_TO_GET}")
    rules = import_module(layout.rules) if layout.rules else None
    rows, cleaned = rules.clean(rows, titles) if rules else (rows, {})
    rows, skipped = with_an_image(rows, files, folder)
    names = sorted({row.image for row in rows})
    decoded = cached_pixels([files[name].resolve() for name in names], size, cache, workers)
    failed = {names[row]: reason for row, reason in decoded.failed.items()}
    unreadable = [f"{name}: {reason}" for name, reason in failed.items()]
    check_readable(folder, len(names), unreadable)
    rows = [row for row in rows if row.image not in failed]
    labels, way, remarks, by_caption = choose_splits(splits, rows, folder)
    skipped |= {"unreadable images": unreadable, **cleaned}
    digests = [digest or "" for digest in decoded.digests]
    if rules:
        digest_of = dict(zip(names, digests, strict=True))
        labels, left_out, more_remarks = rules.after_split(rows, labels, digest_of)
        skipped |= left_out
        remarks = remarks + more_remarks
    for remark in remarks:
        warn(remark)
    row_of = {name: row for row, name in enumerate(names)}
    record_of = {row.image: row for row in rows}
    return {
        "path": str(folder),
        "layout": described,
        "kind": layout.name,
        "splits": way,
        "names": names,
        "paths": [files[name] for name in names],
        "pixels": decoded.pixels,
        "digests": digests,
        "captions": [row.caption for row in rows],
        "caption_image": np.array([row_of[row.image] for row in rows]),
        "labels": np.array(labels),
        "skipped": {reason: found for reason, found in skipped.items() if found},
        "by_caption": by_caption,
        "records": [record_of.get(name, Row(name, "")) for name in names] if rules else [],
    }


def with_an_image(
    rows: list[Row], files: dict[str, Path], folder: Path
) -> tuple[list[Row], dict[str, list[str]]]:
    """The captions that have an image and a word, and the names of what has not."""
    kept = [row for row in rows if row.image in files and row.caption]
    captioned = {row.image for row in kept}
    if not captioned:
        missing = f"none of the {len(files):,} images of {folder} is named in its captions"
        raise UserError(f"{missing}; {HOW_TO_GET}")
    return kept, {
        "captions without an image": [row.image for row in rows if row.image not in files],
        "empty captions": [r.image for r in rows if r.image in files and not r.caption],
        "images without captions": [name for name in files if name not in captioned],
    }


def check_readable(folder: Path, count: int, unreadable: list[str]) -> None:
    """Raises UserError when more than a tenth of the pictures, or all but two, cannot be read."""
    if len(unreadable) > 0.1 * count:
        raise UserError(
            f"{len(unreadable):,} of {count:,} images of {folder} cannot be read, more than "
            f"10% ({'; '.join(unreadable[:3])}); get the data again"
        )
    if (left := count - len(unreadable)) < 3:
        raise UserError(f"{folder} has {left} readable images with captions; 3 are needed")


# ---------------------------------------------------------------------------------- splits


class Labelled(NamedTuple):
    """The split of every row, and how it came about."""

    labels: list[str]  # one a row, "" for none
    way: str  # "given", "official" or "random"
    remarks: list[str]  # what the user should know
    by_caption: bool = False  # an image stands in two splits: figures made on it flatter


def choose_splits(choice: str, rows: list[Row], folder: Path) -> Labelled:
    """Gives every row its split; `choice` is --splits.

    Raises UserError when `choice` is given or official and the data has no such split.
    """
    lists = read_lists(folder)
    labels = [row.split or lists.get(row.image, "") for row in rows]  # the data's own
    leak = leak_of(rows, labels)
    images = sorted({row.image for row in rows})
    if choice == "given" or (choice == "auto" and any(labels) and not leak):
        return given_splits(rows, images, labels, leak)
    official = read_lists(OFFICIAL)
    fits = {official.get(image) for image in images} >= set(SPLITS)  # there are some of each
    if choice == "official" and not fits:
        raise UserError("--splits official: the image names are not Flickr8k's; use --splits auto")
    if choice != "random" and fits:
        way, words, split_of = "official", "the official lists", official
    else:
        way, words, split_of = "random", "a seeded split by image", seeded_splits(images)
    remarks = []
    if choice == "auto" and leak:
        refused = f"the data's own split is by caption and refused: {leak}"
        remarks = [f"{refused}; used instead: {words}"]
    return Labelled([split_of.get(row.image, "") for row in rows], way, remarks)


def read_lists(folder: Path) -> dict[str, str]:
    """{image name: split} of Flickr_8k.{train,dev,test}Images.txt in `folder`, or one deep."""
    return {
        line.strip(): split
        for split in SPLITS
        for path in find_files(folder, [f"*{split}Images.txt"])
        for line in read_text(path).split("\n")
        if line.strip()
    }


def leak_of(rows: list[Row], labels: list[str]) -> str:
    """Says how many test images are trained on too; "" where no image stands in two splits."""
    labelled = set(zip((row.image for row in rows), labels, strict=True))
    images = {split: {image for image, label in labelled if label == split} for split in SPLITS}
    if sum(map(len, images.values())) == len(set().union(*images.values())):
        return ""
    leaked, tests = images["train"] & images["test"], images["test"]
    return f"{len(leaked):,} of its {len(tests):,} test images are also training images"


def given_splits(rows: list[Row], images: list[str], labels: list[str], leak: str) -> Labelled:
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
    if "dev" not in split_of.values():
        train = [image for image in images if split_of.get(image) == "train"]
        drawn = shuffled(train)[: min(1000, max(1, len(train) // 10))]
        split_of |= dict.fromkeys(drawn, "dev")
        remarks.append(f"{len(drawn):,} of its training images, drawn by a seed, are used as dev")
    remarks = ["; ".join(remarks)] if remarks else []
    return Labelled([split_of.get(row.image, "") for row in rows], "given", remarks)


def seeded_splits(images: list[str]) -> dict[str, str]:
    """An eighth of the images, at most 1,000, for test, as many for dev, the rest for train."""
    held, order = min(1000, max(1, len(images) // 8)), shuffled(images)
    parts = {"test": order[:held], "dev": order[held : 2 * held], "train": order[2 * held :]}
    return {image: split for split, part in parts.items() for image in part}


def shuffled(images: list[str]) -> list[str]:
    return [images[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(images))]
