"""Which queries the figures show: pairs by lot, from good to bad, the best and the worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from support.ranking import cosine, first_captions

if TYPE_CHECKING:
    from dataset import Pairs
    from evaluate import Embedded


def sample_pairs(pairs: Pairs, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` images and a caption of each: positions in pairs.rows and pairs.captions."""
    generator, total = np.random.default_rng(seed), len(pairs.rows)
    images = np.sort(generator.choice(total, min(count, total), replace=False))
    shuffled = generator.permutation(len(pairs.captions))
    return images, shuffled[first_captions(pairs.caption_image[shuffled])][images]


def mixed_cases(queries: np.ndarray, ranks: np.ndarray, count: int, seed: int) -> list[int]:
    """`count` queries from good to bad: by rank they are parted into as many, one of each by lot.

    queries (Q,): positions in ranks, `count` of them at least.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(queries)
    order = order[np.argsort(ranks[order], kind="stable")]
    return [int(generator.choice(part)) for part in np.array_split(order, count)]


def extreme_cases(embedded: Embedded, count: int) -> list[list[int]]:
    """The captions of the `count` best (rank 1, widest margin) and worst cases, an image once."""
    image_of, first = embedded.pairs.caption_image, np.flatnonzero(embedded.t2i == 1)
    margins = []
    for part in np.array_split(first, 1 + len(first) // 1024):  # all scores at once may not fit
        scores = cosine(embedded.text_embeddings[part], embedded.image_embeddings)
        margins.append(np.ptp(np.sort(np.nan_to_num(scores, nan=-2))[:, -2:], axis=1))
    best = first[np.argsort(-np.concatenate(margins), kind="stable")]
    worst = np.argsort(-embedded.t2i, kind="stable")
    once = [order[np.sort(first_captions(image_of[order]))] for order in (best, worst)]
    return [order[:count].tolist() for order in once]
