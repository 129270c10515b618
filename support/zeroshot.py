"""Pictures of the user's own: a folder is decoded and embedded, or classified by its names alone.

evaluate.py --zero-shot prints what `zero_shot` finds; visualize.py draws it and searches folders.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sources.names import visible_folders, walk_files
from sources.opening import EXTENSIONS, HEIC, HOW_TO_HEIC
from sources.pictures import decode_all
from sources.reading import split_in
from sources.texts import clean_text
from support.command import UserError, warn
from support.embedding import Trained
from support.figures import canvas, wrapped
from support.ranking import TIE

BLOCK = 100  # pictures that are held decoded at once


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and below, behind links too, hidden ones aside. Raises UserError.

    A warning counts what else lies there, by kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with pictures in it")
    found, others = [], Counter()
    for path in walk_files(folder):
        if path.suffix.lower() in EXTENSIONS:
            found.append(path)
        else:
            others[path.suffix.lower() or "without extension"] += 1
    if others:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common())
        heic = f"; {HOW_TO_HEIC}" if HEIC & {*others} else ""
        warn(f"{folder}: files that are not read as pictures are left out: {kinds}{heic}")
    return sorted(found)


def embed_pictures(
    trained: Trained, paths: list[Path], workers: int
) -> tuple[np.ndarray, list[Path]]:
    """Decodes and embeds picture files: (embeddings (N, D), the N paths that could be read).

    Only a block of them is held at a time. Unreadable ones are counted in a warning; raises
    UserError when none can be read.
    """
    sizes = sorted({member.transform["stored_size"] for member in trained.members})
    by_size = [decode_all(paths, size, workers) for size in sizes]
    decoded = zip(paths, *by_size, strict=True)
    parts, kept, failed = [], [], []
    while block := list(islice(decoded, BLOCK)):
        rows = []
        for path, *of_sizes in block:
            if reasons := [reason for pixels, reason in of_sizes if pixels is None]:
                failed.append(f"{path.name}: {reasons[0]}")
            else:
                kept.append(path)
                rows.append([pixels for pixels, _ in of_sizes])
        if rows:
            pixels_of = dict(zip(sizes, map(np.stack, zip(*rows, strict=True)), strict=True))
            parts.append(trained.embed_pixels(pixels_of.__getitem__))
    if failed:
        warn(f"{len(failed):,} of {len(paths):,} pictures cannot be read ({'; '.join(failed[:3])})")
    if not kept:
        raise UserError("not one of the pictures can be read")
    if trained.options.poster_text:
        warn("this model reads the words on pictures of its data; those on these are not read")
    return np.concatenate(parts), kept


TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.", "there is a {} in the picture.")


class ZeroShot(NamedTuple):
    """`scores` (pictures, classes), `truth` (pictures,) and the classes' names."""

    scores: np.ndarray
    truth: np.ndarray
    classes: list[str]

    def metrics(self) -> dict[str, Any]:
        """Top-1 and top-5 accuracy in percent (ties lose), per class, and what chance gives."""
        true = self.scores[np.arange(len(self.truth)), self.truth]
        ranks = (~(self.scores < true[:, None] - TIE)).sum(1).astype(np.float64)
        ranks[~np.isfinite(true)] = np.inf
        top1, top5 = 100.0 * (ranks <= 1), 100.0 * (ranks <= 5)
        names = enumerate(self.classes)
        return {
            "zero_shot_top1": float(top1.mean()),
            "zero_shot_top5": float(top5.mean()),
            "chance": 100 / len(self.classes),
            "pictures": len(ranks),
            "per_class": {name: float(top1[self.truth == i].mean()) for i, name in names},
        }


def read_templates(path: Path) -> list[str]:
    """One prompt a line, with {} where the class's name goes. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the templates {path}: {error}") from error
    if not lines or any("{}" not in line for line in lines):
        raise UserError(f"{path}: every line needs {{}} where the class's name goes")
    return lines


def class_embeddings(trained: Trained, classes: list[str], templates: Sequence[str]) -> np.ndarray:
    """One unit-length embedding a class: the mean of its prompts', as in CLIP (section 3.1.4)."""
    prompts = [
        re.sub(r"\ba (?=[aeiou])", "an ", template.replace("{}", name))
        for name in classes
        for template in templates
    ]
    means = trained.embed_texts(prompts).reshape(len(classes), len(templates), -1).mean(1)
    return means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-12)


WORDNET_ID = re.compile(r"n\d{8}(?!\d)")
# HappyDog -> Happy Dog, TVSet -> TV Set
HUMP = re.compile(r"(?<=[a-zß-öø-ÿ0-9])(?=[A-ZÀ-ÖØ-Þ])|(?<=[A-ZÀ-ÖØ-Þ])(?=[A-ZÀ-ÖØ-Þ][a-zß-öø-ÿ])")


def parted(name: str, numbered: bool) -> str:
    """A folder's name as words: `001.HappyDog_small` -> happy dog small.

    numbered: all folders' names begin with numbers, which are then no part of the name.
    """
    number = r"\d+[\s._-]+(?=.)" if numbered else r"\d+\.\s*(?=\D)"
    name = re.sub(rf"^(?:{WORDNET_ID.pattern}|{number})", "", clean_text(name))
    return " ".join(re.split(r"[_\-\s]+", HUMP.sub(" ", name))).strip().lower()


def class_names(folders: list[Path], trained: Trained) -> list[str]:
    """The names of class folders as they go into a prompt. Raises UserError for equal ones.

    What the model cannot know of them is said.
    """
    numbered = all(re.match(r"\d+[\s._-]+\D", folder.name) for folder in folders)
    classes = [parted(folder.name, numbered) or folder.name.lower() for folder in folders]
    place = folders[0].parent
    if twice := {name for name in classes if classes.count(name) > 1}:
        raise UserError(f"{place} has two class folders for {', '.join(sorted(twice))}; join them")
    if ids := [name for name in classes if WORDNET_ID.fullmatch(name)]:
        warn(
            f"{len(ids):,} class folders are named by WordNet ids ({', '.join(ids[:3])}), which "
            "are no words of any caption; name them by words, such as tench"
        )
    unknown = {name: trained.unknown(name) for name in classes if name not in ids}
    unknown = {name: words for name, words in unknown.items() if words}
    if len(unknown) > 5:  # one line, not a thousand
        some = ", ".join(repr(name) for name in [*unknown][:3])
        count = f"{len(unknown):,} of {len(classes):,} class names"
        warn(f"{count} hold words that never stood in the training captions: {some} ...")
    else:
        for name, words in unknown.items():
            warn(f"class {name!r}: {', '.join(words)} never stood in the training captions")
    return classes


def class_folders(folder: Path, holders: list[Path]) -> Path:
    """Where the class folders lie: in `folder`, or below its only one that is named as a split.

    holders: its folders with pictures. Raises UserError where it has others besides.
    """
    splits = [place for place in holders if split_in(place.name)]
    deep = [place for place in holders if visible_folders(place)]
    nested = [place for place in splits if place in deep]
    beside = nested and nested == deep != holders  # train/dog beside pictures/1.jpg
    if len(nested) > 1 or beside or (len(splits) > 1 and splits == holders):
        names = ", ".join(place.name for place in splits)
        raise UserError(f"{folder} holds {names}: no class but a split; give one: {splits[-1]}")
    if not nested or nested != holders:
        return folder
    print(f"the class folders are those in {nested[0]}")
    return nested[0]


def zero_shot(trained: Trained, options: Namespace) -> ZeroShot:
    """Classifies the pictures in options.zero_shot's folders by their names. Raises UserError."""
    folder = options.zero_shot
    templates = read_templates(options.templates) if options.templates else TEMPLATES
    if not (pictures := find_pictures(folder)):
        raise UserError(f"{folder} holds no picture; it needs a folder of pictures for each class")
    holders = sorted({folder / path.relative_to(folder).parts[0] for path in pictures})
    folder = class_folders(folder, [place for place in holders if place.is_dir()])
    inner = visible_folders(folder)
    folder_of = {path: folder / path.relative_to(folder).parts[0] for path in pictures}
    folder_of = {path: place for path, place in folder_of.items() if place != path}
    too_few = UserError(f"{folder} needs two class folders with readable pictures or more")
    if len({*folder_of.values()}) < 2:
        raise too_few
    images, kept = embed_pictures(trained, list(folder_of), options.workers)
    places = sorted({folder_of[path] for path in kept})
    if empty := [place.name for place in inner if place not in places]:
        warn(f"class folders without a readable picture are left out: {', '.join(empty)}")
    if len(places) < 2:
        raise too_few
    classes = class_names(places, trained)
    texts = class_embeddings(trained, classes, templates)
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    return ZeroShot(scores, np.array([places.index(folder_of[path]) for path in kept]), classes)


def evaluate_zero_shot(trained: Trained, options: Namespace) -> dict[str, Any]:
    """Prints the accuracies on the folder options.zero_shot and returns them. Raises UserError."""
    result = zero_shot(trained, options)
    metrics = result.metrics()
    counts, chance = np.bincount(result.truth), metrics["chance"]
    for count, (name, accuracy) in zip(counts, metrics["per_class"].items(), strict=True):
        print(f"{name:24}{accuracy:6.1f}%  of {count:,}")
    print(
        f"zero-shot on {metrics['pictures']:,} pictures of {len(result.classes)} classes: "
        f"top-1 {metrics['zero_shot_top1']:.1f}%, top-5 {metrics['zero_shot_top5']:.1f}%; "
        f"chance {chance:.1f}% and {min(100, 5 * chance):.1f}%"
    )
    return metrics


def draw_confusion(path: Path, result: ZeroShot, footer: str) -> None:
    """Draws the confusion matrix, each row in percent of the true class's pictures."""
    top, size = result.metrics()["zero_shot_top1"], len(result.classes)
    total, scores = np.bincount(result.truth), result.scores.copy()
    scores[np.arange(len(scores)), result.truth] -= TIE  # a tie is lost
    valid = np.isfinite(scores).all(1)  # the others count as pictures only
    cells = result.truth[valid] * size + scores[valid].argmax(1)
    counts = np.bincount(cells, minlength=size * size).reshape(size, size)
    percent, side = counts / total[:, None] * 100, min(4.5 + 0.42 * size, 40)
    title = f"Zero-shot: top-1 {top:.1f}% of {len(valid):,} pictures (chance {100 / size:.1f}%)"
    with canvas(path, side + 2.2, side, title, footer) as (figure, _):
        axes = figure.subplots()
        shown = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
        names = [wrapped(name, 1.6, 9, 1)[0] for name in result.classes]
        counted = [f"{name} ({count:,})" for name, count in zip(names, total, strict=True)]
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), counted)
        axes.set(xlabel="predicted class", ylabel="true class (number of its pictures)")
        for row, column in np.argwhere(counts) if size <= 30 else ():
            text = f"{percent[row, column]:.0f}%\n{counts[row, column]:,}"
            hue = "black" if percent[row, column] > 50 else "white"
            axes.text(column, row, text, size=7, ha="center", va="center", color=hue)
        figure.colorbar(shown, label="share of the true class's pictures (%)")
