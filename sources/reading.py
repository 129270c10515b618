"""What the readers of captions share: a `Row` for each caption, a `Reading` that counts the rest.

sources/layouts.py makes the Reading of a folder, the readers beside it fill it.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from sources.encodings import decode
from sources.names import Pictures, walk_files
from support.command import UserError

FORM = (
    "captions are best written into captions.csv in UTF-8, with the header `image,caption` and a "
    'line for each caption, such as `a.jpg,"a dog, running"`'
)
UNREAD = "lines that are not understood"
MUCH = 0.1  # this share of lines that are not understood is an error; of others, a warning


class Row(NamedTuple):
    """One caption as a file gives it; what a file does not tell is ""."""

    image: str
    caption: str
    split: str = ""
    title: str = ""  # of a film; its caption is the introduction
    genres: str = ""  # joined by |
    place: str = ""  # the folder that the image is most likely to be in, where names do not tell


class Reading:
    """A folder while its captions are read: its files and pictures, and what cannot be used."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(walk_files(folder))
        self.pictures = Pictures(folder, self.files)
        self.skipped: dict[str, list[str]] = defaultdict(list)  # reason -> what, as it stands there
        self.encodings: dict[str, None] = {}  # those that are not UTF-8, in order

    def text(self, path: Path) -> str:
        """The text of a file. Raises UserError where its encoding cannot be told, or OSError."""
        text, encoding = decode(path.read_bytes(), str(path))
        if encoding:
            self.encodings[encoding] = None
        return text

    def lines(self, path: Path) -> list[tuple[int, str]]:
        """The lines of a text file that are not blank, with their numbers from 1.

        Raises UserError where there is none.
        """
        found = enumerate(re.split(r"\r\n|\n|\r", self.text(path)), 1)
        lines = [(number, line) for number, line in found if line.strip()]
        if not lines:
            raise UserError(f"{path} is empty; {FORM}")
        return lines

    def skip(self, reason: str, what: str) -> None:
        """Counts what cannot be used."""
        self.skipped[reason].append(shortened(what))


def reason_of(error: Exception) -> str:
    """An error in what a file holds, in words."""
    return f"{error} is not in it" if isinstance(error, KeyError) else f"{error}"


def shortened(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def check_understood(path: Path, unread: list[str], count: int, wanted: str) -> None:
    """Raises UserError when more than a tenth of a file's lines, or all, are not understood."""
    if unread and (len(unread) > MUCH * count or len(unread) == count):
        problem = f"{len(unread):,} of the {count:,} lines of {path} are not understood"
        raise UserError(f"{problem} ({'; '.join(unread[:3])}); {wanted}; {FORM}")


SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "dev"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}


def split_of(word: str) -> str:
    """`Validation` -> dev; "" for what is no split."""
    return SPLIT_WORDS.get(word.strip().lower(), "")


def split_in(name: str) -> str:
    """The split that a file's name tells between its other words, `coco_karpathy_val` -> dev."""
    found = {split_of(word) for word in re.findall(r"[a-z]+", name.lower())} - {""}
    return found.pop() if len(found) == 1 else ""
