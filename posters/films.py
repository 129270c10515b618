"""Films as data: movies.csv and its posters, titles left out of introductions, films met twice.

sources/layouts.py reads such a folder with `read_posters`; dataset.py asks `clean` for the rows
whose posters it decodes, and `after_split` which films have to leave the test split.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from sources.names import is_picture
from sources.reading import Reading, Row
from support.command import UserError

LEAKED = "test films with the introduction or poster of a training film"


COLUMNS = {  # what the columns of movies.csv may be called
    "id": ("id", "movieid", "filmid", "imdbid", "tmdbid"),
    "title": ("title", "name", "originaltitle"),
    "intro": ("intro", "introduction", "overview", "plot", "summary", "synopsis", "description"),
    "genres": ("genres", "genre"),
}


def read_posters(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """Films: movies.csv (id, title, intro, perhaps genres), posters/ID.jpg, train.txt with ids.

    What train.txt does not name is test. An id of train.txt without a film is a row without intro.
    Raises UserError when a column lacks, or a line has too few cells.
    """
    table, listing = paths[0], paths[0].with_name("train.txt")
    listed = reading.text(listing).split() if listing.is_file() else []
    train = {Path(name).stem if is_picture(name) else name: None for name in listed}
    unknown = dict(train)
    try:
        reader = csv.DictReader(io.StringIO(reading.text(table), newline=""))
        column = columns_of_films(reader.fieldnames or [], table)
        for film in reader:
            name, title, intro = (film[column[role]] for role in ("id", "title", "intro"))
            if None in film or None in (name, title, intro):
                problem = "another number of cells than the header; quote cells that hold a comma"
                raise UserError(f"{table}, line {reader.line_num} has {problem}")
            name = name.strip()
            unknown.pop(name, None)
            split = ("train" if name in train else "test") if listing.is_file() else ""
            genres = film.get(column.get("genres")) or ""
            yield Row(poster_of(name, reading), intro, split, title, genres)
    except csv.Error as error:
        raise UserError(f"{table} cannot be read as CSV: {error}") from error
    if listing.is_file() and len(unknown) == len(train):
        raise UserError(f"{listing} names no film of {table.name}; give its ids, one a line")
    yield from (Row(poster_of(name, reading), "", "train") for name in unknown)


def columns_of_films(header: Sequence[str], table: Path) -> dict[str, str]:
    """{role: column} of movies.csv. Raises UserError, with the header, when one lacks."""
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(header) if name}
    column = {
        role: plain[name]
        for role, names in COLUMNS.items()
        for name in reversed(names)
        if name in plain
    }
    if lacking := [role for role in ("id", "title", "intro") if role not in column]:
        problem = f"{table} has the columns {', '.join(header)}, and none is the {lacking[0]}"
        raise UserError(f"{problem} of a film; id, title, intro are needed")
    return column


def poster_of(name: str, reading: Reading) -> str:
    """A film's poster by its id; one that is not there is called ID.jpg."""
    path = reading.pictures.find(name)
    return reading.pictures.name(path) if path else f"{name}.jpg"


def plain_title(title: str) -> str:
    """`Matrix, The (1999)` -> The Matrix"""
    name = re.sub(r"\s*\(\d{4}\)\s*$", "", title.strip())
    return re.sub(r"^(.*), (The|A|An|Le|La|Les|Das|Der|Die|Il|El)$", r"\2 \1", name)


def without_title(text: str, title: str) -> str:
    """An introduction without its film's title and the quotes around it."""
    name = plain_title(title)
    left = re.sub(rf"""["'(]?(?<!\w){re.escape(name)}(?!\w)["')]?""", " ", text) if name else text
    if left == text:
        return text
    return re.sub(r"\s+(?=[.,;:!?])", "", " ".join(left.split())).strip(" ,;:-")


def clean(rows: list[Row], titles: str) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows to use, and what was changed in them: with titles "hide" none holds its title."""
    if titles != "hide":
        return rows, {}
    hidden = [row._replace(caption=without_title(row.caption, row.title)) for row in rows]
    changed = [old.image for old, new in zip(rows, hidden, strict=True) if old != new]
    return hidden, {"titles in introductions": changed}


def after_split(
    rows: list[Row], labels: list[str], digests: dict[str, str]
) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Takes films out of test that are also trained on: (labels, {reason: names}, remarks).

    Films are the same that share an introduction or a poster (digests: of each image). The label
    of such a test film becomes "" on all its rows. Dev films count as training films, as the best
    epoch is chosen on them.
    """
    holders = defaultdict(dict)  # what two films can share -> {image: label}
    shared = [(" ".join(row.caption.casefold().split()), digests[row.image]) for row in rows]
    for row, label, (text, digest) in zip(rows, labels, shared, strict=True):
        holders[text][row.image] = holders[digest][row.image] = label
    twins, leaked = {}, {}  # their keys, in order: each film once
    for row, label, (text, digest) in zip(rows, labels, shared, strict=True):
        sharers = holders[text] | holders[digest]
        if len(sharers) > 1:
            twins[row.image] = None
        if label == "test" and {"train", "dev"} & {*sharers.values()}:
            leaked[row.image] = None
    kept = ["" if row.image in leaked else x for row, x in zip(rows, labels, strict=True)]
    remark = f"{len(twins):,} films share their introduction or poster with another"
    return kept, {LEAKED: list(leaked)}, [remark] if twins else []
