"""How captions and pictures lie in a folder: every known layout is one entry of LAYOUTS.

dataset.py calls `read_folder` for the captions and `find_images` for the pictures; nothing is
ever asked of the user, and what is read is said in the summary line.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sources.opening import EXTENSIONS
from support.command import UserError, later

HOW_TO_GET = (
    "get Flickr8k from https://cloud.tsinghua.edu.cn/f/6e5dcf45eac345649665/ and unpack it into "
    "Flickr8k/images, or run `python dataset.py --download`, or use --data shapes"
)


class Row(NamedTuple):
    """One caption as a file gives it; what a file does not tell is ""."""

    image: str
    caption: str
    split: str = ""
    title: str = ""  # of a film; its caption is the introduction
    genres: str = ""  # joined by |


def read_text(path: Path) -> str:
    """Reads UTF-8 or UTF-16 with a BOM, else UTF-8; a byte that is not UTF-8 counts as Latin-1."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16", "replace") if wide else data.decode("utf-8-sig", "latin-1 bytes")


codecs.register_error(
    "latin-1 bytes", lambda e: (e.object[e.start : e.end].decode("latin-1"), e.end)
)


def is_picture(name: str) -> bool:
    """Whether a name ends as a picture's does; `a.jpg.1`, a quirk of Flickr8k, counts."""
    return Path(re.sub(r"\.\d+$", "", name)).suffix.lower() in EXTENSIONS


def read_lines(path: Path, split: str = "") -> Iterator[Row]:
    """Reads a text file of captions; its first lines tell which of three notations it is in.

    `name.jpg#0<TAB>caption` (Flickr8k.token.txt), `name.jpg| 0| caption` (Flickr30k results.csv),
    or CSV with or without a header (Kaggle captions.txt). Raises UserError when it is none.
    """
    text = read_text(path)
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; {HOW_TO_GET}")
    head = lines[:5]
    if any(re.match(r"[^\t]+#\d+\t", line) for line in head):
        pairs = (line.partition("\t")[::2] for line in lines)
        rows = [Row(name.rpartition("#")[0] or name, caption, split) for name, caption in pairs]
    elif any("|" in line and is_picture(line.partition("|")[0].strip()) for line in head):
        bars = (line.partition("|")[::2] for line in lines)  # one of Flickr30k lacks the second
        rows = [Row(name, re.sub(r"^\s*\d+\s*\|?", "", rest), split) for name, rest in bars]
    else:
        rows = [Row(name, caption, split) for name, caption in read_csv(text, path)]
    rows = [row for row in rows if is_picture(row.image.strip())]  # drops the header
    if not rows:
        raise UserError(
            f"{path} holds no captions: no line is `image.jpg,caption`, `image.jpg#0<TAB>caption` "
            f"or `image.jpg| 0| caption`; {HOW_TO_GET}"
        )
    yield from rows


def read_csv(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yields (image, caption) of each row; a caption with bare commas is joined again."""
    image, caption, after, header = 0, 1, 0, True  # `after`: how many columns follow the caption
    other = {"image_name": "image", "comment": "caption"}
    try:
        for row in csv.reader(io.StringIO(text, newline="")):
            if header and any(row):
                header = False
                names = [other.get(cell.strip().lower(), cell.strip().lower()) for cell in row]
                if {"image", "caption"} <= set(names):
                    image, caption = names.index("image"), names.index("caption")
                if not is_picture(names[0]) or names[-1].isdigit():  # a header, or an id column
                    after = max(0, len(names) - 1 - caption)
            if len(row) > max(image, caption):
                if any(cell.count("\n") > 5 for cell in row):
                    problem = f"a quote that opens at {row[image][:60]!r} is never closed"
                    raise UserError(f"{path}: {problem}; {HOW_TO_GET}")
                yield row[image], ",".join(row[caption : max(caption + 1, len(row) - after)])
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV: {error}; {HOW_TO_GET}") from error


def read_json(path: Path) -> dict:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; {HOW_TO_GET}") from error


def read_karpathy(paths: list[Path]) -> Iterator[Row]:
    """Karpathy's dataset_*.json: {"images": [{filename, split, sentences: [{raw}]}]}."""
    names = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
    for image in read_json(paths[0])["images"]:
        split = names.get(image.get("split"), "")
        for sentence in image["sentences"]:
            yield Row(image["filename"], sentence["raw"], split)


def read_coco(paths: list[Path]) -> Iterator[Row]:
    """COCO's captions_*.json; the file names tell the splits where there are several files."""
    for path in paths:
        content = read_json(path)
        split = "dev" if "val" in path.stem else "test" if "test" in path.stem else "train"
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for note in content["annotations"]:
            if note["image_id"] in names:
                yield Row(names[note["image_id"]], note["caption"], split if paths[1:] else "")


def read_course(paths: list[Path]) -> Iterator[Row]:
    """The course's train_, val_ and test_captions.txt, and what captions.txt has beyond them."""
    seen = Counter()
    for path in paths:
        split = path.stem.removesuffix("_captions")
        for row in read_lines(path, "dev" if split == "val" else split):
            seen[row[:2]] += 1
            yield row
    if (all_captions := paths[0].parent / "captions.txt").is_file():
        for row in read_lines(all_captions):
            if seen[row[:2]] > 0:
                seen[row[:2]] -= 1
            else:
                yield row


def read_first(paths: list[Path]) -> Iterator[Row]:
    """A layout of a single text file."""
    return read_lines(paths[0])


class Layout(NamedTuple):
    """A way in which captions lie in a folder: file name patterns and their reader."""

    name: str
    patterns: tuple[str, ...]
    read: Callable[[list[Path]], Iterable[Row]]
    rules: str = ""  # the module whose `clean` and `after_split` the data needs besides


# The first layout with a file in the folder, or one folder deep, is the one that is read.
LAYOUTS = (
    Layout("Karpathy json", ("dataset_*.json", "dataset.json"), read_karpathy),
    Layout("COCO json", ("captions_*.json",), read_coco),
    Layout("Flickr token", ("Flickr*k.token.txt", "results_*.token"), read_first),
    Layout("Flickr30k results", ("results.csv",), read_first),
    Layout("course", ("train_captions.txt", "val_captions.txt", "test_captions.txt"), read_course),
    Layout("Kaggle captions", ("captions.txt", "captions.csv"), read_first),
    Layout("posters", ("movies.csv",), later("posters.films", "read_posters"), "posters.films"),
)
IMAGE_FOLDERS = (
    "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images",
    "flickr30k-images", "train2017", "val2017", "train2014", "val2014", "posters", "poster",
)  # fmt: skip


def visible_folders(folder: Path) -> list[Path]:
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in inner if p.name[0] != "." and p.name != "__MACOSX" and p.is_dir()]


def find_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files that match, in the order of the patterns: in the folder, else one folder deep."""
    for place in (folder, *visible_folders(folder)):
        matching = [path for pattern in patterns for path in sorted(place.glob(pattern))]
        if found := [path for path in matching if path.is_file() and path.name[0] != "."]:
            return found
    return []


def find_images(folder: Path) -> dict[str, Path]:
    """{file name: path} of the pictures in the known folders (nested too), else in any.

    Captions are looked up in this table, so a name from the data never becomes a path itself.
    """
    inner = visible_folders(folder)
    nested = [deeper for place in inner for deeper in visible_folders(place)]
    known = [p for p in inner + nested if p.name in IMAGE_FOLDERS]
    for places in (known, [folder], inner + nested):
        found: dict[str, Path] = {}
        for path in (path for place in places for path in place.iterdir()):
            if path.suffix.lower() in EXTENSIONS and path.name[0] != "." and path.is_file():
                found.setdefault(path.name, path)
        if found:
            return dict(sorted(found.items()))
    return {}


def clean_name(name: str) -> str:
    r"""`Images\a.jpg` -> a.jpg; `a.jpg.1`, a quirk of one Flickr8k name, -> a.jpg."""
    return re.sub(r"(\.\w+)\.\d+$", r"\1", name.strip().replace("\\", "/").rpartition("/")[2])


def read_folder(folder: Path) -> tuple[Layout, str, list[Row]]:
    """(the layout of a folder, it and its file in words, its rows); raises UserError or OSError."""
    if not folder.is_dir():
        problem = "is a file; give the folder" if folder.is_file() else "does not exist"
        raise UserError(f"{folder} {problem}; {HOW_TO_GET}")
    stranger = None  # a file of a layout's name but of another kind, such as dataset_info.json
    for layout in LAYOUTS:
        if paths := find_files(folder, layout.patterns):
            try:
                stripped = [Row(*map(str.strip, row)) for row in layout.read(paths)]
                rows = [row._replace(image=clean_name(row.image)) for row in stripped]
            except (KeyError, TypeError, AttributeError) as error:
                problem = f"{paths[0]} is no {layout.name}: {error!r} in it; {HOW_TO_GET}"
                stranger = stranger or UserError(problem)
                continue
            if not rows:
                raise UserError(f"{paths[0]} holds no captions; {HOW_TO_GET}")
            return layout, f"{layout.name} ({paths[0].name})", rows
    if stranger:
        raise stranger
    known = ", ".join(pattern for layout in LAYOUTS for pattern in layout.patterns)
    raise UserError(f"{folder} has no captions file (any of {known}); {HOW_TO_GET}")
