"""The pictures of a folder, and which of them a name in a captions file means.

sources/layouts.py looks every name up in a `Pictures`, so a name from the data never becomes a path
itself. A name is compared by as many of its folders as it has, and what fits two is an error.
"""

import contextlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from sources.opening import EXTENSIONS, HEIC
from support.command import UserError

# Of network disks, Windows and macOS: thumbnails, waste baskets, older versions.
NOT_OURS = {
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found",
    "$recycle.bin", "system volume information", "__macosx",
}  # fmt: skip


def is_picture(name: str) -> bool:
    """Whether a name ends as a picture's does; `a.jpg.1`, a quirk of Flickr8k, counts."""
    return Path(re.sub(r"\.\d+$", "", name)).suffix.lower() in EXTENSIONS | HEIC


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of the data: hidden, or a disk's own."""
    return name.startswith(".") or name.lower() in NOT_OURS


def visible_folders(folder: Path) -> list[Path]:
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inner if not is_hidden(path.name) and path.is_dir()]


def walk_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, as deep as it lies and behind links.

    A folder that is reached twice, as by a link back, is entered once, and links after the rest.
    Raises OSError where `folder` itself cannot be read; what cannot be below it is left out.
    """
    seen, waiting, linked = set(), [folder], []
    while waiting or linked:
        place = waiting.pop() if waiting else linked.pop(0)
        try:
            state, entries = place.stat(), sorted(os.scandir(place), key=lambda x: x.name)
        except OSError:
            if place == folder:
                raise
            continue
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        for entry in entries:
            with contextlib.suppress(OSError):  # a link that leads to itself
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    (linked if entry.is_symlink() else waiting).append(place / entry.name)
                elif entry.is_file():
                    yield place / entry.name


@lru_cache(100_000)
def parts_of(name: str) -> tuple[str, ...]:
    r"""`Images\.\a.jpg` -> ("Images", "a.jpg"), in NFC, without the folders that lead elsewhere."""
    parts = unicodedata.normalize("NFC", name.strip()).replace("\\", "/").split("/")
    kept = [part.strip() for part in parts if part.strip() not in ("", ".", "..")]
    return tuple(kept)


def shared_end(one: tuple[str, ...], other: tuple[str, ...]) -> float:
    """How many parts two paths have in common, from their ends; a bit less if in another case."""
    count = 0.0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a.casefold() != b.casefold():
            break
        count += 1 if a == b else 0.99
    return count


class Pictures:
    """The picture files of a folder, found by name."""

    def __init__(self, folder: Path, files: Iterable[Path]):
        self.folder = folder
        paths = sorted(path for path in files if path.suffix.lower() in EXTENSIONS)
        self.parts = {path: parts_of(path.relative_to(folder).as_posix()) for path in paths}
        self.at = {parts: path for path, parts in self.parts.items()}
        self.folders = {  # the ends of the folders that hold pictures
            tuple(map(str.casefold, parts[i:-1]))
            for parts in self.parts.values()
            for i in range(len(parts) - 1)
        }
        self.names, self.stems, self.numbers = (defaultdict(list) for _ in range(3))
        for path, parts in self.parts.items():
            name = parts[-1].casefold()
            stem = name.rpartition(".")[0]
            self.names[name].append(path)
            self.stems[stem].append(path)
            if stem.isdecimal():
                self.numbers[int(stem)].append(path)
        self.found: dict[tuple[str, str], Path | None] = {}

    def __len__(self) -> int:
        return len(self.parts)

    def name(self, path: Path) -> str:
        """What a picture is called: its file's name, with its folders if others have that name."""
        parts = self.parts[path]
        alone = len(self.names[parts[-1].casefold()]) == 1
        return parts[-1] if alone else "/".join(parts)

    def candidates(self, name: str) -> list[Path]:
        """The pictures of a name without folders, in the first way of reading it that gives any."""
        name = name.casefold()
        plain = re.sub(r"(\.\w+)\.\d+$", r"\1", name)  # `a.jpg.1`, a quirk of one Flickr8k name
        number = int(name) if len(name) < 20 and name.isdecimal() else None
        ways = ((self.names, name), (self.names, plain), (self.stems, name), (self.numbers, number))
        return next((table[key] for table, key in ways if key in table), [])

    def meant(self, name: str) -> list[Path]:
        """The pictures that a name, with or without its extension, may mean in any folder."""
        parts = parts_of(name)
        return self.candidates(parts[-1]) if parts else []

    def has(self, name: str) -> bool:
        return bool(self.meant(name))

    def find(self, name: str, place: str = "") -> Path | None:
        """The picture that a name means, with or without folders, capitals and extension.

        `place` is the folder that the name is most likely to be in. Raises UserError when it may
        be two pictures, with both.
        """
        if (name, place) not in self.found:
            self.found[name, place] = self.look_up(name, place)
        return self.found[name, place]

    def look_up(self, name: str, place: str) -> Path | None:
        if not (found := self.meant(name)):
            return None
        parts = parts_of(name)
        folders = parts_of(place) + parts[:-1]

        def likeness(path: Path) -> tuple[int | bool, ...]:
            own, file = self.parts[path][:-1], self.parts[path][-1]
            stem = file.rpartition(".")[0]
            exact = 2 * (file == parts[-1]) + (stem == parts[-1])
            return shared_end(parts[:-1], own), shared_end(folders, own), own == folders, exact

        most = max(map(likeness, found))
        if round(most[0]) < len(parts) - 1 and tuple(map(str.casefold, parts[:-1])) in self.folders:
            return None  # its folder is there, and the picture is not in it
        found = [path for path in found if likeness(path) == most]
        if len(found) > 1 and not same_content(found):
            shown = " and ".join("/".join(self.parts[path]) for path in found[:2])
            problem = f"{name} in the captions may be {shown} of {self.folder}"
            raise UserError(f"{problem}; write the names with their folders and extensions")
        return found[0]

    def strange_folders(self, name: str, path: Path) -> int:
        """How many of the folders that a name gives are not the picture's."""
        given = parts_of(name)[:-1]
        return len(given) - round(shared_end(given, self.parts[path][:-1]))


def same_content(paths: list[Path]) -> bool:
    """Whether files are copies of one another."""
    if len({path.stat().st_size for path in paths}) > 1:
        return False
    return len({path.read_bytes() for path in paths}) == 1
