"""A folder of captions and pictures: read in its layout, decoded, split, what is skipped counted.

dataset.py asks `read_collection` for the fields of a Collection.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sources.layouts import HOW_TO_GET, Row, clean_name, find_images, read_folder
from sources.pictures import cached_pixels
from sources.splits import choose_splits
from support.command import UserError, warn


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
    rows = [row._replace(image=clean_name(row.image)) for row in rows]
    rules = import_module(layout.rules) if layout.rules else None
    rows, cleaned = rules.clean(rows, titles) if rules else (rows, {})
    rows, skipped = with_an_image(rows, files, folder)
    names = sorted({row.image for row in rows})
    decoded = cached_pixels([files[name].resolve() for name in names], size, cache, workers)
    unreadable = [f"{names[row]}: {reason}" for row, reason in decoded.failed.items()]
    readable = [name for row, name in enumerate(names) if row not in decoded.failed]
    check_readable(folder, names, unreadable)
    kept = set(readable)
    rows = [row for row in rows if row.image in kept]
    labels, way, remarks, by_caption = choose_splits(splits, rows, readable, folder)
    skipped |= {"unreadable images": unreadable, **cleaned}
    digests = [digest or "" for digest in decoded.digests]
    if rules:
        digest_of = dict(zip(names, digests, strict=True))
        labels, left_out, more_remarks = rules.after_split(rows, labels, digest_of)
        skipped, remarks = {**skipped, **left_out}, [*remarks, *more_remarks]
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
        "remarks": remarks,
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


def check_readable(folder: Path, names: list[str], unreadable: list[str]) -> None:
    """Raises UserError when more than a tenth of the pictures, or all but two, cannot be read."""
    if len(unreadable) > 0.1 * len(names):
        raise UserError(
            f"{len(unreadable):,} of {len(names):,} images of {folder} cannot be read, more than "
            f"10% ({'; '.join(unreadable[:3])}); get the data again"
        )
    if (count := len(names) - len(unreadable)) < 3:
        raise UserError(f"{folder} has {count} readable images with captions; 3 are needed")
