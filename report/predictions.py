"""What was predicted: `python evaluate.py [CHECKPOINT ...] --predictions FILE.csv`.

evaluate.py hands in a ranked split. The file has a row a caption, which searches the pictures, and
a row a picture, which searches the captions; both have the columns of COLUMNS:

    query        "caption" or "image": what searches
    image        the file name of the picture: the caption's, or the one that searches
    caption      the caption that searches, or the best scored of the picture's own captions
    rank         of the true picture among all; of that best own caption among those of other
                 pictures; from 1, a tie is lost, empty where a score is no number
    score        the cosine of `image` and `caption`
    margin       `score` minus the best score of a wrong one: above 0 where the rank is 1
    found_1 ...  the first five found: file names for a caption, captions for a picture
    score_1 ...  their cosines, highest first

UTF-8 with a byte order mark; a text that a spreadsheet would run as a formula has a ' before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from support.ranking import TIE
from support.results import write_csv

if TYPE_CHECKING:
    from evaluate import Embedded

FOUND = 5
COLUMNS = ["query", "image", "caption", "rank", "score", "margin"]
COLUMNS += [f"{name}_{place}" for place in range(1, FOUND + 1) for name in ("found", "score")]
Line = list[str | float]


class Answers(NamedTuple):
    """What all queries of a direction find: texts search pictures (t2i), pictures texts (i2t)."""

    way: str
    image: np.ndarray  # (queries,) the position of each query's picture
    pool_image: np.ndarray  # (pool,) the position of the picture of each thing searched
    ranks: np.ndarray  # (queries,) from 1; infinity for a score that is no number
    own: np.ndarray  # (queries,) the place in the pool of the true one, or of the best of them
    score: np.ndarray  # (queries,) its cosine
    margin: np.ndarray  # (queries,) minus the best cosine of a wrong one; nan where there is none
    found: np.ndarray  # (queries, k) places in the pool, best first; a true one after its ties
    scores: np.ndarray  # (queries, k) their cosines, -inf for no number


def answers(embedded: Embedded, way: str, k: int = 10) -> Answers:
    """The first k that every query finds, in blocks of queries. k is at most the pool's size."""
    caption_image = np.asarray(embedded.pairs.caption_image)
    sides = [(embedded.image_embeddings, np.arange(len(embedded.image_embeddings)))]
    sides.append((embedded.text_embeddings, caption_image))
    (queries, image), (pool, pool_image) = sides if way == "i2t" else sides[::-1]
    pool, parts = pool.astype(np.float64), []
    for first in range(0, len(queries), 256):
        part = slice(first, first + 256)
        with np.errstate(invalid="ignore", over="ignore"):
            scores = queries[part].astype(np.float64) @ pool.T
        scores = np.where(np.isfinite(scores), scores, -np.inf)
        rows, true = np.arange(len(scores)), image[part, None] == pool_image
        own = np.where(true, scores, -np.inf).argmax(1)
        own = np.where(true[rows, own], own, true.argmax(1))  # all -inf: any of its own
        wrong = np.where(true, -np.inf, scores).max(1)
        found = np.argsort(2 * TIE * true - scores, axis=1, kind="stable")[:, :k]
        with np.errstate(invalid="ignore"):
            margin = scores[rows, own] - wrong
        parts.append((own, scores[rows, own], margin, found, scores[rows[:, None], found]))
    ranks = embedded.i2t if way == "i2t" else embedded.t2i
    return Answers(way, image, pool_image, ranks, *map(np.concatenate, zip(*parts, strict=True)))


def lines(answered: Answers, names: list[str], captions: list[str]) -> Iterator[Line]:
    """The rows of the file of one direction; `names` are those of the pictures."""
    searched = names if answered.way == "t2i" else captions
    for i, (image, own) in enumerate(zip(answered.image, answered.own, strict=True)):
        caption = captions[i if answered.way == "t2i" else own]
        line: Line = ["caption" if answered.way == "t2i" else "image", names[image], caption]
        line += [float(x[i]) for x in (answered.ranks, answered.score, answered.margin)]
        for place, score in zip(answered.found[i], answered.scores[i], strict=True):
            line += [searched[place], float(score)]
        yield line + [""] * (len(COLUMNS) - len(line))


def write_predictions(path: Path, embedded: Embedded) -> None:
    """Writes what every caption and every picture of a ranked split finds. Raises UserError."""
    pairs = embedded.pairs
    names = [pairs.dataset.names[row] for row in pairs.rows]
    rows = [
        line
        for way in ("t2i", "i2t")
        for line in lines(answers(embedded, way, FOUND), names, pairs.captions)
    ]
    write_csv(path, COLUMNS, rows)
