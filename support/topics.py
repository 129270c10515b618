"""The topics that texts speak of, found in the texts themselves.

visualize.py colours t-SNE by them, and its page of predictions is filtered by them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sources.texts import COUNTED

if TYPE_CHECKING:
    from dataset import Pairs

COLOURS = "black white red blue green yellow brown orange pink purple gray grey tan blond blonde"


class Topics(NamedTuple):
    """The topic of each picture of a split, by its captions; -1 if they have no words."""

    of_image: np.ndarray  # (images,)
    names: list[str]


def topics_of(pairs: Pairs, seed: int) -> Topics:
    """Ten topics of the pictures of a split, or fewer."""
    texts = [""] * len(pairs.rows)
    for caption, image in zip(pairs.captions, pairs.caption_image, strict=True):
        texts[image] += f" {caption}"
    return Topics(*topics(texts, seed))


def topics(texts: list[str], seed: int, most: int = 10) -> tuple[np.ndarray, list[str]]:
    """Sorts texts by NMF over TF-IDF: (topic of each, -1 if it has no words; topics' names)."""
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    ignored = sorted({*ENGLISH_STOP_WORDS, *COLOURS.split()})
    words = TfidfVectorizer(stop_words=ignored, token_pattern=COUNTED, sublinear_tf=True)
    try:
        table = words.fit_transform(texts)
    except ValueError:  # no word is left: "empty vocabulary"
        return np.full(len(texts), -1), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged does not matter here
        model = NMF(min(most, *table.shape), init="nndsvda", random_state=seed, max_iter=300)
        weights = model.fit_transform(table)
    vocabulary, names = words.get_feature_names_out(), []
    for strength in model.components_:
        first, *rest = vocabulary[np.argsort(-strength, kind="stable")[:9]]
        others = [word for word in rest if not (word.startswith(first) or first.startswith(word))]
        names.append(", ".join([first, *others[:1]]))  # "dog, snow" tells more than "dog, dogs"
    return np.where(weights.max(1) > 0, weights.argmax(1), -1), names
