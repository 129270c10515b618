"""The page's questions answered: what a text finds, what a picture shows, which parts matter.

support/page.py asks, in HTTP and JSON. Pictures are known by number, never by a path from outside.
"""

from __future__ import annotations

import io
import re
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from sources.opening import open_picture
from sources.pictures import squashed
from sources.texts import readable
from support.command import UserError
from support.finder import Finder, Shelf, places_that_matter, terms_of, words_that_matter
from support.remarks import check_query

UPLOADS = 12  # uploaded pictures that are remembered
SIZES = (320, 1024)  # pixels of a picture among others, and alone
LABELS = 100  # at most


class NoPicture(Exception):
    """A picture that is not here, or no longer."""


class Desk:
    """What the page asks for: pictures by their number, u1, u2, ... being those dropped in."""

    def __init__(self, shelf: Shelf, finders: list[Finder]):
        self.shelf, self.finders = shelf, finders
        self.uploads: OrderedDict[str, Image.Image] = OrderedDict()
        self.received = 0
        self.own: dict[int, list[int]] = {}  # each picture's captions
        for caption, owner in enumerate(shelf.owner.tolist()):
            self.own.setdefault(owner, []).append(caption)
        self.jpeg = lru_cache(2048)(self.make_jpeg)
        self.embedding = lru_cache(64)(self.embed_upload)
        # Torch wakes threads of its own in each thread that calls it, so ever the same two call
        # it; what takes seconds does not hold up who types.
        self.quick, self.slow = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def upload(self, data: bytes) -> str:
        """Takes a picture in and returns its name. Raises UserError when it is none."""
        try:
            picture = open_picture(data, SIZES[1])
        except Exception as error:  # a hostile picture may raise anything inside Pillow
            raise UserError("this is no picture that can be read") from error
        picture.thumbnail((SIZES[1], SIZES[1]))
        self.received += 1
        name = f"u{self.received}"
        self.uploads[name] = picture
        while len(self.uploads) > UPLOADS:
            self.uploads.popitem(last=False)
        return name

    def known(self, name: str) -> int | None:
        """The position of a picture, None for an uploaded one. Raises NoPicture."""
        if name in self.uploads:
            return None
        if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= len(self.shelf.names):
            raise NoPicture(name)
        return int(name)

    def picture(self, name: str, size: int) -> Image.Image:
        """It or its file may have gone since: raises NoPicture."""
        if (position := self.known(name)) is None:
            return self.uploads[name]
        try:
            return self.shelf.picture(position, size)
        except (OSError, ValueError) as error:
            raise NoPicture(name) from error

    def make_jpeg(self, name: str, size: int) -> bytes:
        """A picture, made anew, so that nothing but pictures ever leaves."""
        picture, file = self.picture(name, size).copy(), io.BytesIO()
        picture.thumbnail((size, size))
        picture.convert("RGB").save(file, "JPEG", quality=85)
        return file.getvalue()

    def vector(self, finder: int, name: str) -> np.ndarray:
        """The embedding of a picture, (D,)."""
        position = self.known(name)
        if position is None:
            return self.embedding(finder, name)
        return self.finders[finder].images[position]

    def embed_upload(self, finder: int, name: str) -> np.ndarray:
        picture, trained = self.uploads[name], self.finders[finder].trained
        return trained.embed_pixels(lambda size: squashed(picture, size)[None])[0]

    def shown(self, found: list[tuple[int, float | None]]) -> list[dict[str, Any]]:
        """Pictures as the page shows them: number, score, name and, where one is known, caption."""
        captions = self.shelf.captions
        return [
            {
                "picture": str(i),
                "score": score,
                "name": readable(self.shelf.names[i]),
                "text": captions[self.own[i][0]] if i in self.own else "",
            }
            for i, score in found
        ]

    def search(self, finder: int, text: str, name: str, k: int) -> dict[str, Any]:
        """What a text and a picture, one of them or both, find; all in turn where both are ""."""
        begun = time.perf_counter()
        chosen, remarks, doubt = self.finders[finder], [], ""
        if text or name:
            terms = terms_of(text, files=False) if text else []
            remarks = [line for term in terms for line in check_query(term.text, chosen.trained)]
            query = chosen.embed(terms, self.vector(finder, name) if name else None)
            found = chosen.find(query, k)
            doubt = "" if name else chosen.doubt(terms, found[0][1])
        else:
            found = [(i, None) for i in range(min(k, len(self.shelf.names)))]
        seconds = time.perf_counter() - begun
        remark = "; ".join(remarks)
        ms = round(1000 * seconds, 1)
        return {"results": self.shown(found), "remark": remark, "doubt": doubt, "ms": ms}

    def about(self, finder: int, name: str) -> dict[str, Any]:
        """A picture's captions by score (the best, and all its own), and its nearest pictures."""
        chosen, position, vector = self.finders[finder], self.known(name), self.vector(finder, name)
        scores = chosen.texts @ vector if len(self.shelf.captions) else np.empty(0)
        own = self.own.get(position, []) if position is not None else []
        best = [i for i, _ in chosen.captions(vector, 12)] if len(scores) else []
        order = sorted({*best, *own}, key=lambda i: -scores[i])
        captions = [
            {"text": self.shelf.captions[i], "score": float(scores[i]), "own": i in own}
            for i in order
        ]
        near = [hit for hit in chosen.find(vector, 13) if hit[0] != position][:12]
        title = readable(self.shelf.names[position]) if position is not None else "your picture"
        return {"name": title, "captions": captions, "near": self.shown(near)}

    def labels(self, finder: int, name: str, labels: list[str]) -> dict[str, Any]:
        """Zero-shot: the probability of each label."""
        if not 2 <= len(labels) <= LABELS:
            raise UserError(f"type 2 to {LABELS} different labels, one a line")
        chosen = self.finders[finder]
        remarks = [line for label in labels for line in check_query(label, chosen.trained)]
        found = chosen.probabilities(self.vector(finder, name), labels).tolist()
        ranked = sorted(zip(labels, found, strict=True), key=lambda pair: -pair[1])
        return {"labels": ranked, "remark": "; ".join(remarks)}

    def why(self, finder: int, name: str, text: str) -> dict[str, Any]:
        """By how much the score falls without each word, and without each place of the picture."""
        chosen, vector = self.finders[finder], self.vector(finder, name)
        check_query(text, chosen.trained)
        embedding = chosen.embed_text(text)
        places = places_that_matter(chosen.trained, self.picture(name, SIZES[1]), embedding)
        words = words_that_matter(chosen.trained, text, vector)
        return {"score": float(embedding @ vector), "words": words, "places": places.tolist()}
