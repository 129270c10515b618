"""A search: what stands on the shelf, what a query means, which pictures fit it, and whether any.

search.py fills the shelf and prints what a `Finder` finds; support/page.py shows it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from sources.opening import EXTENSIONS
from sources.pictures import decode, squashed
from support.command import UserError
from support.embedding import Trained, side_by_side
from support.ranking import top_k
from support.zeroshot import TEMPLATES, class_embeddings

# A query whose best score is below what four in five unrelated captions get fits nothing. Measured
# with best's first stage on the 1,000 test photographs of Flickr8k: so did 16 of 24 short texts on
# what they do not show (a zebra, a washing machine) and none of 16 on what they show (dogs).
USUAL = 0.2


class Shelf(NamedTuple):
    """What is searched: pictures and what each model (by its digest) makes of them; captions."""

    title: str
    names: list[str]  # whole paths, where the pictures are files
    picture: Callable[[int, int], Image.Image]  # (position, pixels): not much larger than that
    images: dict[str, np.ndarray]  # (N, D) each
    captions: list[str]
    owner: np.ndarray  # the position of each caption's picture, -1 for none
    texts: dict[str, np.ndarray]  # (captions, D) each


class Term(NamedTuple):
    """A part of a query: a text, or a picture's file; its sign is 1, or -1 to lead away from it."""

    sign: int
    text: str
    file: Path | None = None


def is_file(text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # too long for a name
        return Path(text).is_file()
    return False


def terms_of(query: str, files: bool) -> list[Term]:
    """`dog.jpg + in snow - people` -> its parts; with `files` one may be a picture's path.

    Raises UserError for a part that is empty or a picture that is not there.
    """
    if files and is_file(query):
        return [Term(1, query, Path(query))]
    first, *rest = re.split(r"(?:^|\s)([+-])(?=\s|$)", query)
    parts = [("+", first)] if first.strip() or not rest else []
    terms = []
    for sign, part in [*parts, *zip(rest[::2], rest[1::2], strict=True)]:
        text = part.strip()
        file = Path(text) if files and is_file(text) else None
        if not text:
            raise UserError(f"{query!r} has an empty part; describe a picture, or name one")
        if files and not file and Path(text).suffix.lower() in EXTENSIONS:
            raise UserError(f"{text} is not there; name a picture, or describe one")
        terms.append(Term(1 if sign == "+" else -1, text, file))
    return terms


class Finder:
    """One choice of models, alone or side by side, and what they make of a shelf."""

    def __init__(self, name: str, trained: Trained, digests: list[str], shelf: Shelf):
        self.name, self.trained = name, trained
        self.images = side_by_side([shelf.images[digest] for digest in digests])
        self.texts = side_by_side([shelf.texts[d] for d in digests]) if shelf.texts else None
        self.usual = np.empty(0)  # the best scores of unrelated captions, in order

    def measure_usual(self, texts: list[np.ndarray], owner: np.ndarray) -> None:
        """Takes the best score of each unrelated caption (texts, D) a model; its own picture aside.

        owner (texts,): the position of each one's own picture, -1 where it is not on the shelf.
        """
        embeddings, parts = side_by_side(texts), []
        for first in range(0, len(embeddings), 64):  # all scores at once may not fit
            scores = embeddings[first : first + 64] @ self.images.T
            own = owner[first : first + 64]
            scores[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
            parts.append(scores.max(1))
        best = np.concatenate(parts)
        self.usual = np.sort(best[np.isfinite(best)])

    def embed(self, terms: list[Term], picture: np.ndarray | None = None) -> np.ndarray:
        """The parts of a query (and a picture's embedding), each of unit length, summed to one.

        Raises UserError.
        """
        total = np.zeros(self.images.shape[1], np.float32) if picture is None else picture.copy()
        for term in terms:
            embedding = self.embed_file(term.file) if term.file else self.embed_text(term.text)
            total += term.sign * embedding
        if not (length := float(np.linalg.norm(total))) > 1e-6:
            raise UserError("the parts of the query cancel out, nothing is left to search for")
        return total / length

    def embed_text(self, text: str) -> np.ndarray:
        return self.trained.embed_texts([text])[0]

    def embed_file(self, file: Path) -> np.ndarray:
        try:
            return self.trained.embed_pixels(lambda size: decode(file, size)[None])[0]
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a picture: {error}") from error

    def find(self, query: np.ndarray, k: int) -> list[tuple[int, float]]:
        """The best `k` pictures: (position, cosine)."""
        return ranked(self.images @ query, k)

    def captions(self, picture: np.ndarray, k: int) -> list[tuple[int, float]]:
        """The best `k` captions of a picture's embedding: (position, cosine)."""
        return ranked(self.texts @ picture, k)

    def doubt(self, terms: list[Term], best: float) -> str:
        """Says so when nothing on the shelf fits a text; "" when something may.

        A flat threshold would not do: how high scores are depends on model and pictures. Sums and
        pictures are not judged: their scores are not those of a caption.
        """
        if len(terms) != 1 or terms[0].file or not len(self.usual):
            return ""
        if (share := float((self.usual < best).mean())) >= USUAL:
            return ""
        more = min(99, 100 - 100 * share)
        return (
            f"nothing here seems to fit {terms[0].text!r}: its best score, {best:.3f}, is what "
            f"unrelated captions get ({more:.0f}% of {len(self.usual):,} get more)"
        )

    def probabilities(self, picture: np.ndarray, labels: list[str]) -> np.ndarray:
        """Zero-shot: what a picture's embedding shows, (labels,), by the model's temperature."""
        classes = class_embeddings(self.trained, labels, TEMPLATES)
        scale = np.mean([float(model.scale().detach()) for model in self.trained.members])
        return torch.softmax(torch.from_numpy(classes @ picture) * scale, 0).numpy()


def words_that_matter(trained: Trained, text: str, picture: np.ndarray) -> list[tuple[str, float]]:
    """Each word of a text and by how much the score with a picture falls without it."""
    words = text.split()
    rest = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    scores = trained.embed_texts([text, *rest]) @ picture
    return [(word, float(scores[0] - score)) for word, score in zip(words, scores[1:], strict=True)]


def places_that_matter(
    trained: Trained, picture: Image.Image, text: np.ndarray, side: int = 7
) -> np.ndarray:
    """(side, side): by how much the score with a text falls when a place is painted over.

    Each square of a grid takes the picture's mean colour, with half a square around it.
    """

    def pixels_at(size: int) -> np.ndarray:
        whole = squashed(picture, size)
        painted = np.repeat(whole[None], side * side + 1, 0)
        edges = np.linspace(0, size, side + 1)
        margin, mean = size / side / 2, whole.mean((0, 1)).astype(np.uint8)
        for place in range(side * side):
            row, column = divmod(place, side)
            top, left = (max(0, round(edges[i] - margin)) for i in (row, column))
            bottom, right = (round(edges[i + 1] + margin) for i in (row, column))
            painted[place + 1, top:bottom, left:right] = mean
        return painted

    scores = trained.embed_pixels(pixels_at) @ text
    return (scores[0] - scores[1:]).reshape(side, side)


def ranked(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    return [(int(i), float(scores[i])) for i in top_k(scores, k)]
