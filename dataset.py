"""Where the data enters: finds captions and pictures in any known layout, splits them by image.

`load_dataset` gives train.py and evaluate.py a `Dataset`; `Feed` makes the batches of an epoch.
`python dataset.py PATH` says what lies there; `python dataset.py --download` fetches Flickr8k.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from captions import PAD, without_title
from cli import HERE, Parser, UserError, number, run, warn
from images import CACHE, cached_folder, cached_pixels, thumbnail
from layouts import HOW_TO_GET, SPLITS, Row, clean_name, find_images, official_lists, read_folder

SPLIT_SEED = 0  # of --splits random: a constant, so that no --seed trains on another's test images
OFFICIAL = HERE / "Flickr8k"  # the official lists are shipped there

# --------------------------------------------------------------------------------- splits


def random_labels(images: list[str]) -> list[str]:
    """A seeded split: an eighth, at most 1,000, for test, as many for dev, the rest for train."""
    held = min(1000, max(1, len(images) // 8))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    labels = np.full(len(images), "train", dtype="<U5")
    labels[order[:held]], labels[order[held : 2 * held]] = "test", "dev"
    return labels.tolist()


def complete(labels: list[str]) -> str:
    """Fills, in place, a split that a layout lacks; returns a line about it, or ""."""
    told = ""
    if "test" not in labels and "dev" in labels:
        labels[:] = ["test" if label == "dev" else label for label in labels]
        told = "its val images are used as test; "
    if "dev" not in labels:
        train = [row for row, label in enumerate(labels) if label == "train"]
        draw = np.random.default_rng(SPLIT_SEED).permutation(train)
        chosen = draw[: min(1000, max(1, len(train) // 10))]
        for row in chosen:
            labels[row] = "dev"
        told += f"{len(chosen):,} of its training images, drawn by a seed, are used as dev"
    return told.removesuffix("; ")


def choose_splits(
    wanted: str, rows: list[Row], images: list[str], folder: Path
) -> tuple[list[str], str, list[str]]:
    """Gives every row its split: (labels, the name of the way they were made, lines to tell)."""
    lists = official_lists(folder)
    own = [row.split or lists.get(row.image, "") for row in rows]
    by_image = defaultdict(set)
    for row, label in zip(rows, own, strict=True):
        by_image[row.image] |= {label} - {""}
    leaked = sum({"train", "test"} <= labels for labels in by_image.values())
    tests = sum("test" in labels for labels in by_image.values())
    leak = f"{leaked:,} of its {tests:,} test images are also training images"
    torn = any(len(labels) > 1 for labels in by_image.values())
    shipped = official_lists(OFFICIAL)
    is_flickr8k = {"train", "dev", "test"} <= {shipped.get(image) for image in images}
    has_own = any(by_image.values())
    if (wanted == "auto" and has_own and not torn) or wanted == "given":
        if not has_own:
            raise UserError("--splits given: this data has no splits of its own; use --splits auto")
        if torn:
            return own, "given", [f"the given split is by caption, not by image: {leak}"]
        labels = [next(iter(by_image[image]), "") for image in images]
        told = complete(labels) if {"train", "test"} - set(labels) or "dev" not in labels else ""
        table = dict(zip(images, labels, strict=True))
        return [table[row.image] for row in rows], "given", [told] if told else []
    told = []
    if wanted == "official" and not is_flickr8k:
        raise UserError("--splits official: the image names are not Flickr8k's; use --splits auto")
    way = "official" if wanted == "official" or (wanted == "auto" and is_flickr8k) else "random"
    if wanted == "auto" and torn:
        used = "the official lists" if way == "official" else "a seeded split by image"
        told = [f"the data's own split is by caption and refused: {leak}; used instead: {used}"]
    table = shipped if way == "official" else dict(zip(images, random_labels(images), strict=True))
    return [table.get(row.image, "") for row in rows], way, told


def find_twins(
    rows: list[Row], labels: list[str], digests: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Films with the introduction or the poster of another film: (all, test ones also trained on).

    The label of the latter becomes "", in place, on all their rows: they are in no split. Dev films
    count as training films, as the best epoch is chosen on them.
    """
    holders = defaultdict(dict)  # what two films can share -> {image: label}
    shared = [(" ".join(row.caption.casefold().split()), digests[row.image]) for row in rows]
    for row, label, keys in zip(rows, labels, shared, strict=True):
        for key in keys:
            holders[key][row.image] = label
    twins, leaked = {}, {}  # their keys, in order: each film once
    for row, label, keys in zip(rows, labels, shared, strict=True):
        if any(len(holders[key]) > 1 for key in keys):
            twins[row.image] = None
        if label == "test" and any({"train", "dev"} & {*holders[key].values()} for key in keys):
            leaked[row.image] = None
    labels[:] = ["" if row.image in leaked else x for row, x in zip(rows, labels, strict=True)]
    return list(twins), list(leaked)


# -------------------------------------------------------------------------------- dataset


class Split(NamedTuple):
    """The images of one split, as rows of Dataset.pixels, and its captions.

    `caption_image[j]` is the position in `images` (not the row of pixels) of caption j.
    """

    name: str
    images: np.ndarray
    captions: list[str]
    caption_image: np.ndarray


@dataclass
class Dataset:
    """Every readable image that has captions, decoded; every caption with its image and split."""

    path: str
    layout: str
    splits: str  # how they were made: given, official, random, built-in
    names: list[str]
    paths: list[Path]  # empty for built-in data
    pixels: np.ndarray  # uint8 (N, S, S, 3)
    digests: list[str]  # of the image files
    captions: list[str]
    caption_image: np.ndarray
    labels: np.ndarray  # the split of each caption, "" for none
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    told: list[str] = field(default_factory=list)  # remarks on the splits
    by_caption: bool = False  # an image stands in two splits: figures made on it flatter
    films: list[Row] = field(default_factory=list)  # of each image, where the data is of films

    def split(self, name: str) -> Split:
        """Raises UserError when the data has no such split."""
        chosen = np.flatnonzero(self.labels == name)
        if not len(chosen):
            raise UserError(f"{self.path} has no {name} images; see --splits")
        images, position = np.unique(self.caption_image[chosen], return_inverse=True)
        return Split(name, images, [self.captions[i] for i in chosen], position)

    def picture(self, row: int) -> Image.Image:
        """The picture itself, for figures, in its own proportions."""
        return thumbnail(self.paths[row]) if self.paths else Image.fromarray(self.pixels[row])

    @property
    def fingerprint(self) -> str:
        """sha256 over image contents, names, captions and splits: equal only for equal data."""
        text = "\n".join(map("|".join, zip(self.names, self.digests, strict=True)))
        rows = zip(self.caption_image, self.labels, self.captions, strict=True)
        text += "".join(f"{image}|{label}|{caption}\n" for image, label, caption in rows)
        text += "".join(f"{film.genres}\n" for film in self.films)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def summary(self) -> str:
        """One line: layout, counts in all and per split, what was skipped and why, fingerprint."""
        parts = []
        for name in (*SPLITS, ""):
            chosen = self.labels == name
            images = len(np.unique(self.caption_image[chosen]))
            if images or name:
                parts.append(f"{name or 'in no split'} {images:,}/{chosen.sum():,}")
        skipped = "; ".join(
            f"{len(names):,} {reason} ({', '.join([*dict.fromkeys(names)][:3])}"
            f"{', ...' if len(set(names)) > 3 else ''})"
            for reason, names in self.skipped.items()
        )
        line = (
            f"data {self.path}: {self.layout}, {len(np.unique(self.caption_image)):,} images and "
            f"{len(self.captions):,} captions; {self.splits} splits (images/captions): "
            f"{', '.join(parts)}; skipped: {skipped or 'nothing'}; "
            f"fingerprint {self.fingerprint}"
        )
        return line.encode("utf-8", "backslashreplace").decode()  # a file name can be any bytes


def load_dataset(
    path: str,
    splits: str = "auto",
    size: int = 96,
    cache: Path = CACHE,
    workers: int = 2,
    titles: str = "hide",
) -> Dataset:
    """Reads the captions, decodes the pictures to `size` pixels (cached), and splits by image.

    With `titles` "hide" a film's title is left out of its introduction where it stands there.

    Raises UserError for whatever is wrong with the folder, and when more than 10% of the pictures
    cannot be read. Warnings about the splits go to stderr.
    """
    if path == "shapes":
        return load_shapes(cache)
    folder = Path(path)
    try:
        layout, rows = read_folder(folder)
        files = find_images(folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    if not files:
        raise UserError(f"{folder} has captions but no image; {HOW_TO_GET}")
    rows = [row._replace(image=clean_name(row.image)) for row in rows]
    hidden = []
    if titles == "hide":
        read, rows = rows, [r._replace(caption=without_title(r.caption, r.title)) for r in rows]
        hidden = [old.image for old, new in zip(read, rows, strict=True) if old != new]
    skipped = {
        "captions without an image": [row.image for row in rows if row.image not in files],
        "empty captions": [row.image for row in rows if row.image in files and not row.caption],
    }
    rows = [row for row in rows if row.image in files and row.caption]
    captioned = {row.image for row in rows}
    skipped["images without captions"] = [name for name in files if name not in captioned]
    names = sorted(captioned)
    if not names:
        told = f"none of the {len(files):,} images of {folder} is named in its captions"
        raise UserError(f"{told}; {HOW_TO_GET}")
    decoded = cached_pixels([files[name].resolve() for name in names], size, cache, workers)
    bad = [f"{names[row]}: {reason}" for row, reason in decoded.failed.items()]
    if len(bad) > 0.1 * len(names):
        raise UserError(
            f"{len(bad):,} of {len(names):,} images of {folder} cannot be read, more than 10% "
            f"({'; '.join(bad[:3])}); get the data again"
        )
    skipped["unreadable images"] = bad
    good = [name for row, name in enumerate(names) if row not in decoded.failed]
    if len(good) < 3:
        raise UserError(f"{folder} has {len(good)} readable images with captions; 3 are needed")
    kept = set(good)
    films = {row.image: row for row in rows} if layout.startswith("posters") else {}
    rows = [row for row in rows if row.image in kept]
    labels, way, told = choose_splits(splits, rows, good, folder)
    skipped["titles in introductions"] = hidden
    if films:
        twins, leaked = find_twins(rows, labels, dict(zip(names, decoded.digests, strict=True)))
        skipped["test films with the introduction or poster of a training film"] = leaked
        if twins:
            told.append(f"{len(twins):,} films share their introduction or poster with another")
    for line in told:
        warn(line)
    row_of = {name: row for row, name in enumerate(names)}
    torn = way == "given" and any("by caption" in line for line in told)
    return Dataset(
        str(folder), layout, way, names, [files[name] for name in names], decoded.pixels,
        [digest or "" for digest in decoded.digests], [row.caption for row in rows],
        np.array([row_of[row.image] for row in rows]), np.array(labels),
        {reason: found for reason, found in skipped.items() if found}, told, torn,
        [films[name] for name in names] if films else [],
    )  # fmt: skip


def load_shapes(cache: Path) -> Dataset:
    """The built-in data, generated once (see shapes.py)."""
    from shapes import SIZE, SPLIT_SIZES, make_shapes

    source = (HERE / "shapes.py").read_bytes()
    key = hashlib.sha256(source + repr(SPLIT_SIZES).encode()).hexdigest()

    def build(folder: Path) -> None:
        pixels, captions, labels = make_shapes()
        np.save(folder / "pixels.npy", pixels)
        digests = [hashlib.sha256(scene.tobytes()).hexdigest()[:32] for scene in pixels]
        (folder / "index.json").write_text(json.dumps([captions, labels, digests]), "utf-8")

    folder = cached_folder(cache, f"shapes-{SIZE}-{key[:12]}", build)
    captions, labels, digests = json.loads((folder / "index.json").read_text("utf-8"))
    names = [f"{label}-{row:05d}" for row, label in enumerate(labels)]
    return Dataset(
        "shapes", "built-in", "built-in", names, [],
        np.load(folder / "pixels.npy", mmap_mode="r"), digests,
        [caption for five in captions for caption in five],
        np.repeat(np.arange(len(captions)), 5), np.repeat(labels, 5),
    )  # fmt: skip


# ------------------------------------------------------------------------------ the batches


class Batch(NamedTuple):
    """B images and B * K texts, K captions an image in the images' order.

    images: uint8 pixels (B, S, S, 3), or cached features (B, ...) in float16; texts: tokens
    (B * K, L), or cached features (B * K, width) in float16.
    """

    images: torch.Tensor
    texts: torch.Tensor
    positions: torch.Tensor | None = None  # of the images in the split
    readings: torch.Tensor | None = None  # what is written on them, of features.reading_features


class Feed(NamedTuple):
    """The training images and captions, and in which batches an epoch shows them."""

    images: np.ndarray  # uint8 pixels (N, S, S, 3), or features (N, views, ...) of features.py
    rows: np.ndarray  # of `images`, for each image of the split
    split: Split
    texts: np.ndarray  # (captions, L) tokens, padded, or (captions, width) features
    config: dict[str, Any]  # batch_size, captions_per_image and seed count here
    readings: np.ndarray | None = None  # of each image of the split

    def batches(self) -> int:
        """As many as --batch-size asks for, but none of a single pair, which teaches nothing."""
        count = len(self.split.images)
        return max(1, min(-(-count // self.config["batch_size"]), count // 2))

    def plan(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(positions of images, their captions) of each batch: a function of seed and epoch.

        Every image once, in batches whose sizes differ by one at most. Each image's captions stand
        in a seeded order, and every epoch takes the next ones.
        """
        owner = self.split.caption_image
        shuffled = np.lexsort(
            (np.random.default_rng(self.config["seed"]).random(len(owner)), owner)
        )
        counts = np.bincount(owner)
        starts = np.concatenate([[0], counts.cumsum()[:-1]])
        each = self.config["captions_per_image"]
        turns = (epoch - 1) * each + np.arange(each)
        captions = shuffled[starts[:, None] + turns % counts[:, None]]  # (images, K)
        order = np.random.default_rng([self.config["seed"], epoch]).permutation(len(counts))
        return [(part, captions[part].ravel()) for part in np.array_split(order, self.batches())]

    def fetch(self, planned: tuple[np.ndarray, np.ndarray]) -> Batch:
        """In NumPy alone: torch in a second thread would wake a second set of its own threads.

        Of cached features each image shows one of its views, drawn by what the batch holds.
        """
        images, captions = planned
        texts = self.texts[captions]
        if texts.dtype != np.float16:
            texts = texts[:, : (texts != PAD).sum(1).max()]
        rows = self.rows[images]
        if self.images.dtype == np.float16:
            random = np.random.default_rng([self.config["seed"], *captions[:4]])
            shown = self.images[rows, random.integers(self.images.shape[1], size=len(rows))]
        else:
            shown = self.images[rows]
        readings = None if self.readings is None else torch.from_numpy(self.readings[images])
        return Batch(
            torch.from_numpy(shown), torch.from_numpy(texts), torch.from_numpy(images), readings
        )

    def epoch(self, epoch: int, ahead: bool) -> Iterator[Batch]:
        """The batches of an epoch; with `ahead` a thread fetches the next while one is used."""
        if not ahead:
            yield from map(self.fetch, self.plan(epoch))
            return
        with ThreadPoolExecutor(1) as thread:
            waiting = None
            for planned in self.plan(epoch):
                coming = thread.submit(self.fetch, planned)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()


def limited(split: Split, limit: int | None, seed: int) -> Split:
    """`limit` images of a split, drawn by the seed, with all their captions."""
    if limit is None or limit >= len(split.images):
        if limit:
            warn(
                f"--limit {limit:,}: there are {len(split.images):,} training images, all are used"
            )
        return split
    kept = np.sort(np.random.default_rng(seed).choice(len(split.images), limit, replace=False))
    chosen = np.flatnonzero(np.isin(split.caption_image, kept))
    position = np.searchsorted(kept, split.caption_image[chosen])
    captions = [split.captions[i] for i in chosen]
    return Split(split.name, split.images[kept], captions, position)


# ------------------------------------------------------------------------------------ flags


def add_data_flags(parser: Parser, data: str | None, splits: str | None) -> None:
    """The flags that train.py, evaluate.py, visualize.py and dataset.py share."""
    flag = parser.add_argument_group("data").add_argument
    told = "" if data else " (default: what the checkpoint was trained on)"
    flag("--data", default=data, help=f"folder with captions, or `shapes`{told}")
    told = "auto: the data's own if by image, else Flickr8k's lists, else a seeded split"
    flag("--splits", choices=("auto", "given", "official", "random"), default=splits, help=told)
    flag("--cache", type=Path, default=CACHE, help="folder of decoded images and features")
    told = "processes that decode images; 0: none, and no thread that fetches batches ahead"
    flag("--workers", type=number(int, 0, 256), default=os.cpu_count() or 1, help=told)


def main(argv: list[str]) -> None:
    from download import download_flickr8k

    parser = Parser(prog="dataset.py", description=__doc__.split("\n")[0])
    parser.add_argument("path", nargs="?", help="folder to look at (default: what --data names)")
    add_data_flags(parser, data="Flickr8k", splits="auto")
    flag = parser.add_argument_group("download").add_argument
    flag("--download", nargs="?", const="Flickr8k", metavar="DIR", help="fetch Flickr8k into DIR")
    flag("--url", action="append", help="zip file to fetch instead; repeatable")
    options = parser.parse_args(argv)
    if options.url and not options.download:
        raise UserError("--url goes with --download")
    if options.download:
        files = download_flickr8k(Path(options.download), options.url)
        print(f"wrote {len(files):,} files into {options.download}")
    path = options.path or options.download or options.data
    print(load_dataset(path, options.splits, 128, options.cache, options.workers).summary())


if __name__ == "__main__":
    run(main)
