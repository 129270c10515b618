"""How captions and pictures lie in a folder: every known layout is one entry of LAYOUTS.

sources/folder.py calls `read_folder`; nothing is ever asked of the user, and what is read is said
in the summary line.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sources.names import is_hidden, visible_folders
from sources.reading import FORM, Reading, Row, reason_of, shortened, split_in, split_of
from sources.records import read_coco, read_karpathy, read_records
from sources.tables import read_lines
from sources.texts import clean_text
from support.command import UserError, later

HOW_TO_GET = (
    "get Flickr8k from https://cloud.tsinghua.edu.cn/f/6e5dcf45eac345649665/ and unpack it into "
    "Flickr8k/images, or run `python dataset.py --download`, or use --data shapes"
)
RECORDS = (".json", ".jsonl", ".ndjson", ".parquet")
TABLES = (".csv", ".tsv", ".tab", ".txt")
NO_CAPTIONS = re.compile(r"readme|licen[cs]e|requirements|classes|changelog|copying", re.IGNORECASE)


def read_any(path: Path, reading: Reading, split: str = "", place: str = "") -> Iterator[Row]:
    """The captions of a file of any kind that is known by its ending."""
    read = read_records if path.suffix.lower() in RECORDS else read_lines
    return read(path, reading, split, place)


def read_first(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """A layout of a single file."""
    return read_any(paths[0], reading)


def read_course(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """The course's train_, val_ and test_captions.txt, and what captions.txt has beyond them."""
    seen = Counter()
    for path in paths:
        for row in read_lines(path, reading, split_of(path.stem.removesuffix("_captions"))):
            seen[row[:2]] += 1
            yield row
    if (all_captions := paths[0].parent / "captions.txt").is_file():
        for row in read_lines(all_captions, reading):
            if seen[row[:2]] > 0:
                seen[row[:2]] -= 1
            else:
                yield row


def read_image_folder(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """Hugging Face's imagefolder: metadata.csv or .jsonl beside its pictures, a folder a split."""
    for path in paths:
        place = path.parent.relative_to(reading.folder).as_posix()
        for row in read_any(path, reading):
            name = f"{place}/{row.image}" if place != "." else row.image
            split = row.split or folder_split(name)
            yield row._replace(image=name, split=split)


def folder_split(name: str) -> str:
    """The split that a path's folders tell: data/train/a.jpg -> train."""
    return next(filter(None, map(split_of, name.split("/")[:-1])), "")


def read_pairs(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """A picture and a text of one name: a.jpg and a.txt, which holds a caption a line."""
    places = {path.parent for path in paths}
    for path in sorted({*texts_of_pictures(reading)} - {*paths}):
        if path.parent in places and not is_listing(path, reading):
            reading.skip("texts without a picture", path.name)
    splits = {folder_split(path.relative_to(reading.folder).as_posix()) for path in paths}
    for path in paths:
        name = path.relative_to(reading.folder).as_posix()
        stem = name.rpartition(".")[0]
        split = folder_split(name) if len(splits - {""}) > 1 else ""
        text = reading.text(path)
        for line in [line for line in re.split(r"[\r\n]+", text) if line.strip()] or [""]:
            yield Row(stem, line, split)


def read_parts(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """One captions file of any name, or several that are named after their splits."""
    for path in paths:
        split = split_in(path.stem) if paths[1:] else ""
        yield from read_any(path, reading, split, path.parent.name)


class Layout(NamedTuple):
    """A way in which captions lie in a folder: file name patterns, or a function that finds the
    files, and their reader."""

    name: str
    patterns: tuple[str, ...]
    read: Callable[[list[Path], Reading], Iterable[Row]]
    rules: str = ""  # the module whose `clean` and `after_split` the data needs besides
    find: Callable[[Reading], list[Path]] | None = None

    def files(self, reading: Reading) -> list[Path]:
        return self.find(reading) if self.find else find_files(reading.folder, self.patterns)


def find_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files that match, in the order of the patterns: in the folder, else one folder deep."""
    for place in (folder, *visible_folders(folder)):
        matching = [path for pattern in patterns for path in sorted(place.glob(pattern))]
        if found := [path for path in matching if path.is_file() and not is_hidden(path.name)]:
            return found
    return []


def find_metadata(reading: Reading) -> list[Path]:
    names = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
    return [path for path in reading.files if path.name in names]


def find_texts(reading: Reading) -> list[Path]:
    """The texts that have a picture of their name, where most texts or most pictures do."""
    texts = texts_of_pictures(reading)
    stems = {path: path.relative_to(reading.folder).as_posix().rpartition(".")[0] for path in texts}
    own = [path for path in texts if reading.pictures.has(path.stem)]
    enough = 2 * len(own) > len(texts) or 2 * len(own) > len(reading.pictures)
    return [p for p in own if reading.pictures.find(stems[p])] if len(own) > 2 and enough else []


def texts_of_pictures(reading: Reading) -> list[Path]:
    """The text files that may hold a picture's captions."""
    texts = [path for path in reading.files if path.suffix.lower() in (".txt", ".caption")]
    return [path for path in texts if not NO_CAPTIONS.match(path.name)]


def find_captions(reading: Reading) -> list[Path]:
    """The one file that can hold captions, or the files of a name but for their splits.

    Raises UserError where there are several of which one would have to be chosen.
    """
    files = candidates(reading)
    groups = defaultdict(list)
    for path in files:
        words = re.findall(r"[a-z]+|[^a-z]+", path.stem.lower())
        key = tuple("" if split_of(word) else word for word in words)
        groups[key, path.suffix.lower()].append(path)
    if len(groups) == 1:
        return files
    usable = [group for group in groups.values() if all(holds_captions(p, reading) for p in group)]
    if len(usable) > 1:
        shown = ", ".join(path.name for group in usable[:3] for path in group[:1])
        problem = f"{reading.folder} has several files of captions ({shown})"
        raise UserError(f"{problem}; keep one of them there, or name it captions.csv")
    return usable[0] if usable else files[:1]


def candidates(reading: Reading) -> list[Path]:
    """The files in a folder, or one deep, that could hold captions."""
    for depth in (1, 2):
        near = [p for p in reading.files if len(p.relative_to(reading.folder).parts) <= depth]
        found = [p for p in near if p.suffix.lower() in (*RECORDS, *TABLES)]
        found = [path for path in found if not NO_CAPTIONS.match(path.name)]
        if found := [path for path in found if not is_listing(path, reading)]:
            return found
    return []


def is_listing(path: Path, reading: Reading) -> bool:
    """Whether a file lists pictures, one a line, without captions."""
    if path.suffix.lower() != ".txt":
        return False
    lines = [line for line in re.split(r"[\r\n]+", reading.text(path)) if line.strip()]
    return sum(map(reading.pictures.has, lines)) > 0.5 * len(lines)


def holds_captions(path: Path, reading: Reading) -> bool:
    """Whether a file is understood and names a picture."""
    trial = Reading.__new__(Reading)
    trial.__dict__ = {**reading.__dict__, "skipped": defaultdict(list), "encodings": {}}
    try:
        return any(reading.pictures.has(row.image) for row in read_any(path, trial))
    except UserError:
        return False


# The first layout with a file in the folder, or one folder deep, is the one that is read.
LAYOUTS = (
    Layout("Karpathy json", ("dataset_*.json", "dataset.json"), read_karpathy),
    Layout("COCO json", ("captions_*.json",), read_coco),
    Layout("Flickr token", ("Flickr*k.token.txt", "results_*.token"), read_first),
    Layout("Flickr30k results", ("results.csv",), read_first),
    Layout("course", ("train_captions.txt", "val_captions.txt", "test_captions.txt"), read_course),
    Layout("Kaggle captions", ("captions.txt", "captions.csv"), read_first),
    Layout("posters", ("movies.csv",), later("posters.films", "read_posters"), "posters.films"),
    Layout("Flickr8k-CN", ("*zhc.caption.txt", "*.caption.txt"), read_first),
    Layout("Hugging Face imagefolder", (), read_image_folder, find=find_metadata),
    Layout("pictures and texts", (), read_pairs, find=find_texts),
    Layout("captions", tuple(f"captions{ending}" for ending in (*TABLES, *RECORDS)), read_first),
    Layout("captions", (), read_parts, find=find_captions),
)


class Captions(NamedTuple):
    """What the captions files of a folder hold."""

    layout: Layout
    described: str  # the layout and its file in words
    rows: list[Row]
    reading: Reading


def read_folder(folder: Path) -> Captions:
    """The captions of a folder, and its pictures; raises UserError or OSError."""
    if not folder.is_dir():
        if folder.is_file():
            raise UserError(f"{folder} is a file; give the folder that holds it and the pictures")
        raise UserError(f"{folder} does not exist; {HOW_TO_GET}")
    reading = Reading(folder)
    stranger = None  # a file of a layout's name but of another kind, such as dataset_info.json
    for layout in LAYOUTS:
        if not (paths := layout.files(reading)):
            continue
        reading.skipped.clear()
        reading.encodings.clear()
        try:
            rows = [cleaned(row) for row in layout.read(paths, reading)]
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"{paths[0]} is no {layout.name}: {reason_of(error)}; {FORM}"
            stranger = stranger or UserError(problem)
            continue
        if not rows:
            raise UserError(f"{paths[0]} holds no captions; {FORM}")
        named = ", ".join([paths[0].name, *reading.encodings])
        return Captions(layout, f"{layout.name} ({named})", rows, reading)
    raise stranger or nothing_found(reading)


def cleaned(row: Row) -> Row:
    for name in (row.image, row.place):
        if not isinstance(name, str):
            raise TypeError(f"a picture's name is {shortened(repr(name))}")
    caption, title = clean_text(row.caption).strip(), clean_text(row.title).strip()
    return row._replace(
        image=row.image.strip(), caption=caption, title=title, genres=row.genres.strip()
    )


def nothing_found(reading: Reading) -> UserError:
    """The error of a folder without captions: what lies there, and how they are to be written."""
    pictures, folder = len(reading.pictures), reading.folder
    others = [p for p in reading.files if p not in reading.pictures.parts]
    if not pictures and not others:
        return UserError(f"{folder} has no captions file and no picture; {HOW_TO_GET}")
    shown = ", ".join([path.name for path in others[:3]] + ["..."] * (len(others) > 3))
    found = f"{pictures:,} pictures" + (f" and {shown}" if others else "")
    return UserError(f"{folder} has no captions file, only {found}; {FORM}")
