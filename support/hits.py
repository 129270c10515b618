"""What a query finds among embeddings: the best scores, ties by position; queries checked first.

visualize.py draws the hits, search.py prints them and shows them on its page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from support.command import UserError, warn

if TYPE_CHECKING:
    from support.embedding import Trained


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


def check_query(query: str, trained: Trained) -> str:
    """What to know of a text that the model understands in part, "" of one that it understands.

    Raises UserError for one that it cannot understand.
    """
    words = [w for w in trained.members[0].tokenizer.words(query) if any(map(str.isalnum, w))]
    if not words:
        raise UserError(f"{query!r} holds no word; describe a picture")
    strange = trained.unknown(query)
    unknown = [word for word in words if word in strange]
    remark = f"{query!r}: {', '.join(unknown)} never stood in the training captions"
    if len(unknown) == len(words):
        raise UserError(f"{remark} (or too seldom); use other words")
    return f"{remark} (or too seldom); the rest of the query decides" if unknown else ""


def check_queries(queries: list[str], trained: Trained) -> None:
    """Raises UserError for a --query that the model cannot understand, warns of one in part."""
    for query in queries:
        try:
            remark = check_query(query, trained)
        except UserError as error:
            raise UserError(f"--query {error}") from error
        if remark:
            warn(f"--query {remark}")
