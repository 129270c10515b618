"""What a query finds among embeddings: the best scores, ties by position.

visualize.py draws the hits, search.py prints them and shows them on its page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def first_captions(caption_image: np.ndarray) -> np.ndarray:
    """For each image the position of its first caption."""
    return np.unique(caption_image, return_index=True)[1]


def cosine(queries: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Unit-length (Q, D) and (N, D) -> float64 (Q, N)."""
    return queries.astype(np.float64) @ pool.T.astype(np.float64)


class Hit(NamedTuple):
    """One result: rank from 1, position in the pool, cosine, whether it is the query's own."""

    rank: float
    position: int
    score: float
    true: bool


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The positions of the best of scores (N,), ties by position: a prefix of any longer list."""
    rounded = np.where(np.isfinite(scores), scores, -np.inf).round(12)  # equal within evaluate.TIE
    return np.argsort(-rounded, kind="stable")[:k]


def find(
    query: np.ndarray, pool: np.ndarray, k: int, true: Sequence[int] = (), rank: float = np.nan
) -> list[Hit]:
    """The top `k` of `pool` (N, D), best first; then the best `true` one if none is among them."""
    scores = cosine(query[None], pool)[0]
    order = top_k(scores, k).tolist()
    hits = [Hit(place, i, scores[i], i in true) for place, i in enumerate(order, 1)]
    if len(true) and not any(hit.true for hit in hits):
        best = true[top_k(scores[list(true)], 1)[0]]
        hits.append(Hit(rank, best, scores[best], True))
    return hits
