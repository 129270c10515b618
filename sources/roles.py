"""Which column of a table is what: told by the header's names, else by what the cells hold.

sources/tables.py and sources/records.py ask `columns_of`; a table that is not understood is an
error that shows its header, as a wrong column would be trained on.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sources.names import Pictures, is_picture
from sources.reading import FORM, SPLIT_WORDS, shortened, split_of
from support.command import UserError

CAPTION = {
    "caption", "captions", "text", "texts", "sentence", "sentences", "title", "comment", "comments",
    "raw", "description", "descriptions", "desc", "alt",
}  # fmt: skip
IMAGE = {
    "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "pic", "filename",
    "filenames", "file", "files", "filepath", "path", "imagename", "imagepath", "imagefile",
}  # fmt: skip
SPLIT = {"split", "splits", "subset", "partition", "set"}
NEITHER = {
    "id", "ids", "index", "idx", "label", "labels", "class", "classes", "category", "number", "num",
    "no", "nr", "count", "width", "height", "size", "score", "url", "urls", "lang", "language",
    "length", "len", "source", "author", "date", "license", "tokens", "sentids", "sentid", "imgid",
    "hash", "md5", "sha256", "bbox", "genre", "genres", "tags", "tag", "type", "quality", "rating",
    "negative", "foil",
}  # fmt: skip
CHINESE = {
    "caption": ("描述", "标题", "文本", "文字", "说明", "句子", "字幕"),
    "image": ("图片", "图像", "照片", "文件名", "文件", "路径"),
}


def role_of(name: str) -> str:
    """The role of a column of this name: image, caption, split, neither, or "" if it tells none."""
    words = words_in(name)
    if len(name.split()) > 3:
        return ""  # a text
    if not words or words & NEITHER:
        return "neither"
    if words & CAPTION:
        return "neither" if words & {"file", "filename", "path", "filepath"} else "caption"
    if words & IMAGE:
        return "image"
    if words & {*SPLIT, *SPLIT_WORDS}:
        return "split"
    return next((role for role, of in CHINESE.items() if any(x in name for x in of)), "")


def words_in(name: str) -> set[str]:
    """`imagePath_2` -> image, path"""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return set(re.findall(r"[^\W\d_]+", spaced.lower()))


class Columns(NamedTuple):
    """Where a table holds what."""

    image: int
    captions: list[int]
    split: int | None
    count: int  # of all columns; a caption with bare commas makes more

    def aligned(self, cells: list[str], delimiter: str) -> list[str] | None:
        """A row with as many cells as there are columns, None where that cannot be.

        A single caption takes the cells beyond, which are of its own commas. A row may lack its
        last cells but for the image and the first caption.
        """
        extra = len(cells) - self.count
        if extra > 0:
            if len(self.captions) > 1:
                return None
            first = self.captions[0]
            caption = delimiter.join(cells[first : first + extra + 1])
            return [*cells[:first], caption, *cells[first + extra + 1 :]]
        if len(cells) <= max(self.image, self.captions[0]):
            return None
        return cells + [""] * -extra


def columns_of(
    header: Sequence[str] | None, rows: Sequence[Sequence[str]], pictures: Pictures, path: Path
) -> Columns:
    """The columns of a table, by its header (None without one) and its first rows.

    Raises UserError, with the header, when they are not understood.
    """
    width = len(header) if header is not None else min(map(len, rows))
    roles = [role_of(name) for name in header] if header is not None else [""] * width
    rows = [row for row in rows if len(row) >= width] or rows
    if roles.count("caption") == 1:  # its own commas would move the columns behind it
        rough = Columns(0, [roles.index("caption")], None, width)
        rows = [rough.aligned(list(row), ",") or row for row in rows]
    columns = [[row[i] if i < len(row) else "" for row in rows] for i in range(width)]
    image, rival = image_column(header, roles, columns, pictures)
    captions = [i for i, role in enumerate(roles) if role == "caption" and i != image]
    free = [i for i, role in enumerate(roles) if role == "" and i != image]
    split = split_column(roles, columns, {image, *captions})
    if image is not None and not captions:
        free = [i for i in free if i != split]
        captions = [i for i in free if mostly(is_text, columns[i])]
        if not captions and len(free) == 1 and not is_label(columns[free[0]]):
            captions = free
        if header is not None and len(captions) > 1:
            captions = []  # which of them, cannot be told
    if image is None or not captions or rival is not None:
        cells = [*map(shortened, header if header is not None else rows[0])]
        what = "its columns are" if header is not None else "its first line is"
        lacking = f"none known to be {'captions' if image is not None else 'names of pictures'}"
        if rival is not None:
            lacking = f"{cells[image]} and {cells[rival]} could both be names of pictures"
        raise UserError(f"{path}: {what} {shortened(', '.join(cells), 200)}, {lacking}; {FORM}")
    if header is not None and split is not None:
        check_splits(columns[split], header[split], path)
    return Columns(image, captions, split, width)


def image_column(
    header: Sequence[str] | None,
    roles: list[str],
    columns: list[list[str]],
    pictures: Pictures,
) -> tuple[int | None, int | None]:
    """(the column whose cells name most pictures, one that names as many others).

    It is one of those called so, such as image before mask_image; else of those with no role; else
    of the ids, image_id before id. Where no cell is known, the first that is called so.
    """
    words = [words_in(name) for name in header or roles]
    scores = [
        (sum(is_picture(x) + pictures.has(x) for x in cells), words[i] <= {*IMAGE, "name"})
        for i, cells in enumerate(columns)
    ]
    called, free, ids = (
        [i for i, known in enumerate(roles) if known == role] for role in ("image", "", "neither")
    )
    for own in (called, free, [i for i in ids if words[i] & IMAGE], ids):
        best = max(own, key=lambda i: (scores[i], -i), default=None)
        if best is not None and scores[best][0] > (0 if own is called else len(columns[best]) / 2):
            meant = [*map(pictures.meant, columns[best])]
            equal = [i for i in own if scores[i] == scores[best]]
            others = (i for i in equal if [*map(pictures.meant, columns[i])] != meant)
            return best, next(others, None)
    return next(iter(called), None), None


def split_column(roles: list[str], columns: list[list[str]], others: set[int | None]) -> int | None:
    """The column that holds splits and nothing else, else the first that is called so."""
    left = [i for i in range(len(roles)) if i not in others]
    named = [i for i in left if all(map(split_of, columns[i]))]
    named = [i for i in named if roles[i] != "neither" or len({*columns[i]}) > 1]  # class: train
    return next(iter(named + [i for i in left if roles[i] == "split"]), None)


def check_splits(cells: list[str], name: str, path: Path) -> None:
    """Raises UserError when no cell of a column of splits is one."""
    if any(cells) and not any(map(split_of, cells)):
        some = ", ".join([*dict.fromkeys(map(shortened, filter(None, cells)))][:3])
        raise UserError(f"{path}: its column {name} holds {some}; train, val and test are known")


def mostly(test, cells: list[str]) -> bool:
    return 2 * sum(map(bool, map(test, cells))) > len(cells)


def is_label(cells: list[str]) -> bool:
    """Whether cells without blanks are classes or codes rather than captions of one word."""
    return 2 * len({*cells}) <= len(cells) or not mostly(str.isalpha, cells)


def is_text(cell: str) -> bool:
    """Whether a cell reads as a sentence: two words, or two letters of a script without blanks."""
    return bool(re.search(r"\S\s+\S", cell.strip()) or re.search(r"[^\W\d_a-zA-ZÀ-ɏ]{2}", cell))
