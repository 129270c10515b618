"""A whole data set: every image with its captions, its split, and where both come from.

sources/folder.py and sources/shapes.py fill a `Collection`; dataset.py makes pairs of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sources.texts import text_ids
from support.command import HERE, later

CACHE = HERE / ".cache"  # of decoded pictures and features
cached_pixels = later("sources.pictures", "cached_pixels")
thumbnail = later("sources.opening", "thumbnail")
SPLITS = ("train", "dev", "test")


@dataclass
class Collection:
    """Every readable image that has captions, decoded; every caption with its image and split."""

    path: str
    layout: str  # which, and the file that holds the captions
    kind: str  # the layout's name alone
    splits: str  # how they were chosen: given, official, random, built-in
    names: list[str]
    paths: list[Path]  # empty for built-in data
    pixels: np.ndarray  # uint8 (N, S, S, 3)
    digests: list[str]  # of the image files
    captions: list[str]
    caption_image: np.ndarray  # for each caption the row of its image
    labels: np.ndarray  # the split of each caption, "" for none
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    by_caption: bool = False  # an image stands in two splits: figures of it flatter
    records: list[Any] = field(default_factory=list)  # more of each image: a layouts.Row

    def picture(self, row: int) -> Image.Image:
        """The picture itself, for figures, in its own proportions."""
        return thumbnail(self.paths[row]) if self.paths else Image.fromarray(self.pixels[row])

    def at_size(self, size: int, cache: Path, workers: int) -> Collection:
        """The same with pictures of `size` pixels; those of built-in data have one size."""
        if not self.paths or size == self.pixels.shape[1]:
            return self
        files = [path.resolve() for path in self.paths]
        return replace(self, pixels=cached_pixels(files, size, cache, workers).pixels)

    def origin(self) -> str:
        """A few words for the foot of a figure."""
        flatters = "; SPLIT BY CAPTION: flatters" if self.by_caption else ""
        return f"{self.layout}, {self.splits} splits{flatters}"

    @property
    def fingerprint(self) -> str:
        """sha256 over image contents, names, captions and splits: equal only for equal data."""
        text = "\n".join(map("|".join, zip(self.names, self.digests, strict=True)))
        rows = zip(self.caption_image, self.labels, self.captions, strict=True)
        text += "".join(f"{image}|{label}|{caption}\n" for image, label, caption in rows)
        text += "".join(f"{record.genres}\n" for record in self.records)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def summary(self) -> str:
        """One line: layout, counts in all and per split, what was skipped and why, fingerprint."""
        counts, skipped = [], []
        for name in (*SPLITS, ""):
            chosen = self.labels == name
            images = len(np.unique(self.caption_image[chosen]))
            if images or name:
                counts.append(f"{name or 'in no split'} {images:,}/{chosen.sum():,}")
        for reason, names in self.skipped.items():
            some = [*dict.fromkeys(names)]
            shown = ", ".join([*some[:3], "..."] if len(some) > 3 else some)
            skipped.append(f"{len(names):,} {reason} ({shown})")
        texts = len(np.unique(text_ids(self.captions)))
        few = f" ({texts:,} different texts)" if 2 * texts < len(self.captions) else ""
        line = (
            f"data {self.path}: {self.layout}, {len(np.unique(self.caption_image)):,} images and "
            f"{len(self.captions):,} captions{few}; {self.splits} splits (images/captions): "
            f"{', '.join(counts)}; skipped: {'; '.join(skipped) or 'nothing'}; "
            f"fingerprint {self.fingerprint}"
        )
        return line.encode("utf-8", "backslashreplace").decode()  # a file name can be any bytes
