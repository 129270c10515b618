"""A folder of captions and pictures: read in its layout, decoded, split by image, faults counted.

dataset.py asks `read_collection` for the fields of a Collection.
"""

from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sources.layouts import read_folder
from sources.names import Pictures, parts_of
from sources.opening import EXTENSIONS, HEIC, HOW_TO_HEIC
from sources.pictures import cached_pixels
from sources.reading import FORM, MUCH, Row, shortened
from sources.splits import choose_splits, own_lists
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
        layout, described, rows, reading = read_folder(folder)
        lists = own_lists(reading)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    heic = [path.name for path in reading.files if path.suffix.lower() in HEIC - EXTENSIONS]
    if not len(pictures := reading.pictures):
        problem = f"{folder} has captions ({described}) but no image"
        raise UserError(f"{problem}; {HOW_TO_HEIC if heic else 'put the pictures there'}")
    rules = import_module(layout.rules) if layout.rules else None
    rows, cleaned = rules.clean(rows, titles) if rules else (rows, {})
    rows, files, skipped, remarks = with_an_image(rows, pictures)
    skipped |= {**reading.skipped, f"pictures of iPhones: {HOW_TO_HEIC}": heic}
    names = sorted(files)
    decoded = cached_pixels([files[name].resolve() for name in names], size, cache, workers)
    failed = {names[row]: reason for row, reason in decoded.failed.items()}
    unreadable = [f"{name}: {reason}" for name, reason in failed.items()]
    check_readable(folder, len(names), unreadable)
    rows = [row for row in rows if row.image not in failed]
    digests = [digest or "" for digest in decoded.digests]
    digest_of = dict(zip(names, digests, strict=True))
    labels, way, more_remarks, by_caption = choose_splits(splits, rows, lists, digest_of)
    remarks += more_remarks
    skipped |= {"unreadable images": unreadable, **cleaned}
    if rules:
        labels, left_out, more_remarks = rules.after_split(rows, labels, digest_of)
        skipped |= left_out
        remarks += more_remarks
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
    rows: list[Row], pictures: Pictures
) -> tuple[list[Row], dict[str, Path], dict[str, list[str]], list[str]]:
    """(the captions that have an image and a word, the images' files by name, what was left out,
    what the user should know of it).

    Raises UserError when no caption has an image, or when it cannot be told which.
    """
    meant = pictures_meant(rows, pictures)
    kept, lacking, empty, files = [], [], [], {}
    for row in rows:
        path = meant.get((row.image, row.place))
        if path is None:
            lacking.append(row.image)
        elif not row.caption:
            empty.append(row.image)
        else:
            files[name := pictures.name(path)] = path
            kept.append(row._replace(image=name))
    alone = [name for path in pictures.parts if (name := pictures.name(path)) not in files]
    if not files and empty:
        raise UserError(f"all captions of the images of {pictures.folder} are empty; {FORM}")
    if not files:
        near = f"they name {shortened(lacking[0])}, " if lacking else ""
        raise UserError(
            f"none of the {len(pictures):,} images of {pictures.folder} is named in its captions: "
            f"{near}the pictures are named {alone[0]}; {FORM}"
        )
    remarks = []
    for found, problem in ((lacking, "no picture"), (empty, "no word")):
        if len(found) > MUCH * len(rows):
            some = ", ".join([*dict.fromkeys(map(shortened, found))][:3])
            remarks.append(f"{len(found):,} of the {len(rows):,} captions have {problem} ({some})")
    if lacking and alone and len(lacking) > MUCH * len(rows):
        remarks[0] += f"; a picture that no caption names is {alone[0]}"
    skipped = {
        "captions without an image": lacking,
        "empty captions": empty,
        "images without captions": alone,
    }
    return kept, files, skipped, remarks + strange_places(meant, pictures)


def pictures_meant(rows: list[Row], pictures: Pictures) -> dict[tuple[str, str], Path]:
    """{(name, place) in the captions: picture}.

    Where captions give folders and not all of them are there, cat/1.jpg and dog/1.jpg may fit one
    picture: it is that of the name that fits best. Raises UserError when both fit as well.
    """
    claims = defaultdict(dict)  # picture -> {folders that a name gives: the names}
    for name, place in dict.fromkeys((row.image, row.place) for row in rows):
        if path := pictures.find(name, place):
            folders = tuple(map(str.casefold, parts_of(name)[:-1]))
            claims[path].setdefault(folders, []).append((name, place))
    meant = {}
    for path, named in claims.items():
        strange = {x: pictures.strange_folders(names[0][0], path) for x, names in named.items()}
        own = [x for x in named if strange[x] == 0]
        if not own and len(named) > 1:
            shown = " and ".join(names[0][0] for names in [*named.values()][:2])
            name = "/".join(pictures.parts[path])
            problem = f"{shown} in the captions would both be {name} of {pictures.folder}"
            raise UserError(f"{problem}; name the folders as they are there")
        for folders in own or named:
            meant |= dict.fromkeys(named[folders], path)
    return meant


def strange_places(meant: dict[tuple[str, str], Path], pictures: Pictures) -> list[str]:
    """Says where captions name another folder than that of the picture that was taken for theirs,
    if the pictures lie in several."""
    if len({parts[:-1] for parts in pictures.parts.values()}) < 2:
        return []
    strange = {x: path for x, path in meant.items() if pictures.strange_folders(x[0], path)}
    if not strange:
        return []
    (name, _), path = next(iter(strange.items()))
    found = "/".join(pictures.parts[path])
    return [f"images in other folders than their captions say: {len(strange):,} ({name}: {found})"]


def check_readable(folder: Path, count: int, unreadable: list[str]) -> None:
    """Raises UserError when more than a tenth of the pictures, or all but two, cannot be read."""
    if len(unreadable) > 0.1 * count:
        raise UserError(
            f"{len(unreadable):,} of {count:,} images of {folder} cannot be read, more than "
            f"10% ({'; '.join(unreadable[:3])}); copy them there again"
        )
    if (left := count - len(unreadable)) < 3:
        raise UserError(f"{folder} has {left} readable images with captions; 3 are needed")
