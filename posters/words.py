"""The words on posters: read once by an OCR package, kept in the cache, and made fit to embed.

`add_words` puts them behind the features of the pictures for training, `features_for_evaluation`
for evaluate.py; head.py takes both apart again. report.py paints the words over.
"""

from __future__ import annotations

import importlib.util
import json
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from sources.opening import open_picture
from support.command import UserError, warn
from support.workers import in_processes
from tricks.frozen import ImageFeatures, image_features, keep_features, key_of, text_features

if TYPE_CHECKING:
    from dataset import CaptionedImages, Pairs
    from models import CLIP

READER = "1"  # part of the cache's name: raise it when `read_picture` gives other lines
SHORTER = 400  # pixels: small posters are enlarged to it, as the reader wants letters of 30 or so


class Line(NamedTuple):
    """A line of text on a picture; the box is left, top, right, bottom, in shares of its sides."""

    text: str
    score: float  # the reader's confidence, 0 to 1
    box: tuple[float, float, float, float]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]


@once
def reader() -> Any:
    """The OCR engine, one thread; a process makes it once."""
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)


def read_picture(path: Path) -> tuple[list[Line] | None, str]:
    """The lines on a picture, the tallest first; or None, and why it cannot be read."""
    lines = []
    try:
        image = open_picture(path)
        scale = min(max(1.0, SHORTER / min(image.size)), 4 * SHORTER / max(image.size))
        wide, high = (round(side * scale) for side in image.size)
        pixels = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
        found, _ = reader()(pixels[:, :, ::-1])  # it takes blue, green, red
        for corners, text, score in found or []:
            box = [*np.min(corners, 0) / (wide, high), *np.max(corners, 0) / (wide, high)]
            lines.append(Line(text, round(float(score), 4), tuple(round(float(x), 4) for x in box)))
    except Exception as error:  # of Pillow, OpenCV or the engine; each has its own
        return None, " ".join(str(error).split())[:80] or type(error).__name__
    return sorted(lines, key=lambda line: -line.height), ""


def read_words(
    paths: Sequence[Path], digests: Sequence[str], cache: Path, workers: int
) -> list[list[Line]]:
    """The lines on every picture; what is not in the cache yet is read, in `workers` processes.

    The cache is one file of JSON lines, keyed by the pictures' content, to which each picture is
    added as it is done: a run that is stopped goes on where it was. Raises UserError when the OCR
    package is missing.
    """
    for package in ("rapidocr_onnxruntime", "wordninja"):
        if importlib.util.find_spec(package) is None:
            raise UserError("--poster-text needs: pip install -r requirements-posters.txt")
    file = cache / f"words-{version('rapidocr-onnxruntime')}-{READER}.jsonl"
    known, failed = read_cache(file), []
    named = dict(zip(digests, paths, strict=True))
    missing = {digest: path for digest, path in named.items() if digest not in known}
    if missing:
        results = in_processes(read_picture, missing.values(), max(1, workers), 4)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as kept:
                bar = tqdm(
                    results, "reading", len(missing), unit="poster", leave=False, disable=None
                )
                for digest, (lines, problem) in zip(missing, bar, strict=True):
                    if lines is None:
                        failed.append(problem)
                        continue
                    known[digest] = lines
                    kept.write("\n" + json.dumps([digest, lines]))  # after a torn line too
                    kept.flush()
        except OSError as error:
            raise UserError(f"cannot write the cache {file}: {error.strerror or error}") from error
    if failed:
        warn(f"the words of {len(failed):,} pictures cannot be read ({failed[0]}); taken as none")
    return [known.get(digest, []) for digest in digests]


def read_cache(file: Path) -> dict[str, list[Line]]:
    """{digest: lines}; a last line that a killed run left half-written counts as not read."""
    known = {}
    for row in file.read_text("utf-8").split("\n") if file.exists() else ():
        try:
            digest, lines = json.loads(row)
            known[digest] = [Line(text, score, tuple(box)) for text, score, box in lines]
        except (ValueError, TypeError):
            continue
    return known


def spaced(text: str) -> str:
    """A line with its words apart: readers of small print join them, DEADMENDONTWEARPLAID."""
    import wordninja

    return re.sub(r"[A-Za-z']{5,}", lambda found: " ".join(wordninja.split(found[0])), text)


def in_order(lines: Sequence[Line]) -> str:
    """Lines as they are read: from the top, then from the left."""
    ordered = sorted(lines, key=lambda line: (round(sum(line.box[1::2]) / 0.06), line.box[0]))
    return spaced(" ".join(line.text for line in ordered))


def title_of(lines: Sequence[Line]) -> str:
    """The lines about as tall as the tallest: most often the title."""
    sure = [line for line in lines if line.score > 0.7]
    return in_order([line for line in sure if line.height >= 0.6 * sure[0].height])


# What is embedded of a poster, each by itself: how the tallest lines come to be a text.
READINGS: tuple[Callable[[Sequence[Line]], str], ...] = (
    title_of,
    lambda lines: in_order([line for line in lines if line.score > 0.8]),
    *[
        lambda lines, place=place: spaced("".join(x.text for x in lines[place : place + 1]))
        for place in range(6)
    ],
)


def hide_words(pixels: np.ndarray, lines: Sequence[Line]) -> np.ndarray:
    """A copy of a picture (S, S, 3) with its lines painted over in its mean colour."""
    hidden, size = pixels.copy(), len(pixels)
    for line in lines:
        left, top, right, bottom = (round(side * size) for side in line.box)
        hidden[max(0, top) : bottom + 1, max(0, left) : right + 1] = pixels.mean((0, 1))
    return hidden


def reading_features(model: CLIP, dataset: CaptionedImages, options: Namespace) -> np.ndarray:
    """What is written on every picture: float16 (len(dataset.names), readings, text width).

    The text tower's features of each of READINGS, 0 where it is empty; options: cache, workers,
    precision. Raises UserError.
    """
    if not dataset.paths:
        raise UserError(f"--poster-text reads picture files, and {dataset.path} has none")
    good = [row for row, digest in enumerate(dataset.digests) if digest]
    paths, digests = [dataset.paths[i] for i in good], [dataset.digests[i] for i in good]
    words = read_words(paths, digests, options.cache, options.workers)
    texts = {
        (row, place): text
        for row, lines in zip(good, words, strict=True)
        for place, reading in enumerate(READINGS)
        if (text := reading(lines).strip())
    }
    features = np.zeros((len(dataset.names), len(READINGS), model.text_tower.width), np.float16)
    if texts:
        cut = model.tokenizer.cut
        tokens = model.tokenizer(list(texts.values()))
        model.tokenizer.cut = cut  # which counts captions
        rows, places = np.array(list(texts)).T
        features[rows, places] = text_features(model, tokens, options, "poster")
    lines, pictures = sum(map(len, words)), sum(map(bool, words))
    print(f"words: {lines:,} lines on {pictures:,} of {len(words):,} pictures")
    return features


def add_words(
    model: CLIP, pairs: dict[str, Pairs], options: Namespace
) -> tuple[CLIP, dict[str, Pairs]]:
    """The trick: both towers' features, as tricks/frozen.py keeps them, and the words behind them.

    `options` learns a digest of the words, for the checkpoint. Raises UserError when a run that is
    resumed has read others.
    """
    readings = reading_features(model, pairs["train"].dataset, options)
    digest = key_of(readings)
    if getattr(options, "readings", digest) != digest:
        problem = "other words are read on the pictures than the run read"
        raise UserError(f"--resume: {problem}; install its OCR packages, or start a new run")
    options.readings = digest
    learner, pairs = keep_features(model, pairs, options)
    return learner, {name: with_words(split, readings) for name, split in pairs.items()}


def with_words(pairs: Pairs, readings: np.ndarray) -> Pairs:
    """Pairs of features (N, views, width) as pairs of (N, views, width + readings * text width)."""
    features, behind = pairs.images.features, readings[pairs.rows].reshape(len(pairs.rows), 1, -1)
    features = np.concatenate([features, behind.repeat(features.shape[1], axis=1)], axis=2)
    return pairs.with_sides(ImageFeatures(features, pairs.caption_image), pairs.texts)


def features_for_evaluation(model: CLIP, pairs: Pairs, options: Namespace) -> tuple[CLIP, Pairs]:
    """The model above a frozen image tower, and pairs of features, kept for the next evaluation.

    With options.poster_text the words stand behind them. A tower that has learned stays as it is.
    """
    if options.train_image:
        return model, pairs
    options = Namespace(**{**vars(options), "precision": "fp32"})
    tower = model.image_tower
    features = image_features(model, pairs, len(tower), model.transform, options, "film")
    pairs = pairs.with_sides(ImageFeatures(features, pairs.caption_image), pairs.texts)
    if options.poster_text:
        pairs = with_words(pairs, reading_features(model, pairs.dataset, options))
    return model.above(tower[len(tower) :], model.text_tower).eval(), pairs
