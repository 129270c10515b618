"""Pictures of the user's own: a folder is decoded and embedded, or classified by its names alone.

evaluate.py --zero-shot prints what `zero_shot` finds, visualize.py draws it and searches folders.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli import UserError, warn
from embedding import embed_images, embed_texts
from images import EXTENSIONS, decode_all
from metrics import TIE, recall_at_k
from models import Model

# ------------------------------------------------------------------- pictures of the user's own


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, hidden ones aside. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with pictures in it")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def embed_pictures(model: Model, paths: list[Path], workers: int) -> tuple[np.ndarray, list[Path]]:
    """Decodes and embeds picture files: (embeddings, the paths that could be read, in order).

    Unreadable ones are counted in a warning; raises UserError when none can be read.
    """
    decoded = decode_all(paths, model.transform["stored_size"], workers)
    made = [(path, *one) for path, one in zip(paths, decoded, strict=True)]
    failed = [f"{path.name}: {told}" for path, picture, told in made if picture is None]
    good = [(path, picture) for path, picture, _ in made if picture is not None]
    if failed:
        warn(f"{len(failed):,} of {len(paths):,} pictures cannot be read ({'; '.join(failed[:3])})")
    if not good:
        raise UserError("not one of the pictures can be read")
    if model.poster_text is not None:
        warn("this model reads the words on pictures of its data; those on these are not read")
    kept, pixels = zip(*good, strict=True)
    return embed_images(model, np.stack(pixels), np.arange(len(kept))), list(kept)


# ------------------------------------------------------------------------------- zero-shot

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.", "there is a {} in the picture.")


class ZeroShot(NamedTuple):
    """`scores` (pictures, classes), `truth` (pictures,) and the classes' names."""

    scores: np.ndarray
    truth: np.ndarray
    classes: list[str]

    def metrics(self) -> dict[str, Any]:
        """Top-1 and top-5 accuracy in percent (ties lose), per class, and what chance gives."""
        own = self.scores[np.arange(len(self.truth)), self.truth]
        ranks = (~(self.scores < own[:, None] - TIE)).sum(1).astype(np.float64)
        ranks[~np.isfinite(own)] = np.inf
        per_class = {
            name: recall_at_k(ranks[self.truth == i], 1) for i, name in enumerate(self.classes)
        }
        return {
            "zero_shot_top1": recall_at_k(ranks, 1),
            "zero_shot_top5": recall_at_k(ranks, 5),
            "chance": 100 / len(self.classes),
            "pictures": len(ranks),
            "per_class": per_class,
        }


def class_embeddings(model: Model, classes: list[str], templates: list[str]) -> np.ndarray:
    """One unit-length embedding a class: the mean of its prompts', as in CLIP (section 3.1.4)."""
    prompts = [
        re.sub(r"\ba (?=[aeiou])", "an ", template.replace("{}", name))
        for name in classes
        for template in templates
    ]
    made = embed_texts(model, prompts).reshape(len(classes), len(templates), -1).mean(1)
    return made / np.linalg.norm(made, axis=1, keepdims=True).clip(1e-12)


def zero_shot(model: Model, folder: Path, templates_file: Path | None, workers: int) -> ZeroShot:
    """Classifies the pictures of a folder of class folders by the classes' names alone."""
    templates = read_templates(templates_file) if templates_file else list(TEMPLATES)
    if not find_pictures(folder):
        raise UserError(f"{folder} holds no picture; it needs a folder of pictures for each class")
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    found = {place: find_pictures(place) for place in inner}
    few = UserError(f"{folder} needs two class folders with readable pictures or more")
    if sum(map(bool, found.values())) < 2:
        raise few
    paths = [path for files in found.values() for path in files]
    images, kept = embed_pictures(model, paths, workers)
    places = [place for place, files in found.items() if not set(kept).isdisjoint(files)]
    if empty := [place.name for place in inner if place not in places]:
        warn(f"class folders without a readable picture are left out: {', '.join(empty)}")
    if len(places) < 2:
        raise few
    classes = [re.sub(r"[_\-\s]+", " ", p.name).strip().lower() for p in places]
    if twice := {name for name in classes if classes.count(name) > 1}:
        raise UserError(f"{folder} has two class folders for {', '.join(sorted(twice))}; join them")
    for name in classes:
        if missing := model.tokenizer.unknown(name):
            warn(f"class {name!r}: {', '.join(missing)} never stood in the training captions")
    place_of = {path: i for i, place in enumerate(places) for path in found[place]}
    texts = class_embeddings(model, classes, templates)
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    return ZeroShot(scores, np.array([place_of[path] for path in kept]), classes)


def read_templates(path: Path) -> list[str]:
    """One prompt a line, with {} where the class's name goes. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the templates {path}: {error}") from error
    if not lines or any("{}" not in line for line in lines):
        raise UserError(f"{path}: every line needs {{}} where the class's name goes")
    return lines
