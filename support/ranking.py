"""Scores of images and texts: which are the best of a query, and how many are below a limit.

visualize.py and search.py show what `find` and `top_k` give. evaluate.py ranks with `count_below`:
all images x texts, from one float32 product, and yet exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

# Of a score, as a share of its two vectors' lengths: equal vectors differ by less in float64.
TIE = 1e-12


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
    rounded = np.where(np.isfinite(scores), scores, -np.inf).round(12)  # equal within TIE
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


# ----------------------------------------------------------------------- counted, and exact

# Products are fastest in larger blocks than comparisons, which want a core's own cache. A sum of
# bytes (of 250 rows, or of 1360 / 8 columns) holds in a byte.
ROWS, COLUMNS, COMPARED = 2000, 1360, 250


class Side(NamedTuple):
    """The vectors of a block's rows, or columns, and the limits of the scores in each."""

    vectors: np.ndarray  # (n, D)
    lengths: np.ndarray  # (n,), float64, as the limits
    limits: np.ndarray
    low: np.ndarray  # (n,), float32: a float32 score below it is certainly below the limit
    high: np.ndarray  # and one that is not below this certainly reaches it

    def part(self, first: int, count: int) -> Side:
        return Side._make(field[first : first + count] for field in self)


def exact_scores(images: np.ndarray, texts: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The products images[i] . texts[j] in float64, (len(i),)."""
    scores = np.empty(len(i))
    for first in range(0, len(i), 8192):
        part = slice(first, first + 8192)
        x, y = images.take(i[part], 0), texts.take(j[part], 0)
        scores[part] = np.einsum("nd,nd->n", x, y, dtype=np.float64)
    return scores


def lengths_of(vectors: np.ndarray) -> np.ndarray:
    """The length of each vector, in float64."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


def count_below(
    images: np.ndarray, texts: np.ndarray, image_limits: np.ndarray, text_limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many scores are below their image's limit (N,), and below their text's (M,).

    A score is the product of an image (N, D) and a text (M, D). It is below a limit when it is
    smaller by more than TIE times both lengths; with a NaN in it, or in the limit, it is not below.

    All is computed in float32 first. |float32 score - score| <= (D + 2) u |image| |text| whatever
    the order of the sum (u = 2^-24; Higham 2002, section 3.1), so that only scores within this
    distance of a limit are computed again, in float64. The scores of a block exist at a time.
    """
    padding, missing = -len(texts) % 8, np.nan  # so that columns go by eight
    texts_padded = texts  # np.pad would copy it for nothing
    if padding:
        texts_padded = np.pad(texts, ((0, padding), (0, 0)), constant_values=missing)
    limits = image_limits, np.pad(text_limits, (0, padding), constant_values=missing)
    lengths = lengths_of(images), lengths_of(texts_padded)
    longest = [np.fmax.reduce(length, initial=0) for length in lengths]
    # Float32 loses nothing else where neither large numbers overflow nor small ones vanish.
    in_range = all(2**-20 < length < 2**20 for length in longest)
    error = 1.01 * (images.shape[1] + 8) * 2.0**-24  # with the rounding of limits and of float64
    sides = []
    for vectors, length, limit, other in zip(
        (images, texts_padded), lengths, limits, reversed(longest), strict=True
    ):
        distance = error * other * np.maximum(length, 2.0**-40)
        with np.errstate(over="ignore"):  # where they are not in range
            low, high = (limit - distance).astype("f4"), (limit + distance).astype("f4")
        sides.append(Side(vectors, length, limit, low, high))
    threads = torch.get_num_threads()
    rows = max(1, min(ROWS, -(-len(images) // threads)))
    work = partial(count_of_rows, *sides, in_range, rows)
    of_images, of_texts = [], np.zeros(len(texts_padded), np.int64)
    # Comparisons are NumPy's, twice as fast as torch's; so each thread multiplies on its own, too.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for in_rows, in_columns in pool.map(work, range(0, len(images), rows)):
                of_images.append(in_rows)
                of_texts += in_columns
    finally:
        torch.set_num_threads(threads)
    return np.concatenate(of_images), of_texts[: len(texts)]


def count_of_rows(
    images: Side, texts: Side, in_range: bool, count: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count_below` of `count` images: in each of them, and in every text among them."""
    x = images.part(first, count)
    in_rows, in_columns = (np.zeros(len(side.limits), np.int64) for side in (x, texts))
    doubtful = [np.empty((4, 0), np.int64)]  # scores: row, column, whether counted in each of them
    for left in range(0, len(in_columns), COLUMNS):
        y = texts.part(left, COLUMNS)
        if in_range:
            rows, columns = (torch.from_numpy(v.vectors.astype("f4", copy=False)) for v in (x, y))
            scores = (rows @ columns.T).numpy()
        for top in range(0, len(in_rows), COMPARED):
            piece, part = x.part(top, COMPARED), slice(top, top + COMPARED)
            sums = in_rows[part], in_columns[left : left + COLUMNS]
            found = count_in_float32(scores[part], piece, y, *sums) if in_range else None
            if found is None:
                count_in_float64(piece, y, *sums)
            else:
                doubtful.append(found + np.array([[top], [left], [0], [0]]))
    i, j, in_row, in_column = np.concatenate(doubtful, 1)
    exact = exact_scores(x.vectors, texts.vectors, i, j) + TIE * x.lengths[i] * texts.lengths[j]
    np.add.at(in_rows, i, (exact < x.limits[i]) - in_row)
    np.add.at(in_columns, j, (exact < texts.limits[j]) - in_column)
    return in_rows, in_columns


def count_in_float32(
    scores: np.ndarray, x: Side, y: Side, in_rows: np.ndarray, in_columns: np.ndarray
) -> np.ndarray | None:
    """Adds the scores below `high` to the counts; returns those that are not below `low`, too.

    They come as (4, n): row, column, whether counted in each. None where there are too many; then
    nothing is added. Bytes are taken eight at a time, as int64: this is what makes it fast.
    """
    by_row, by_column = scores < x.high[:, None], scores < y.high
    doubtful, other = scores < x.low[:, None], scores < y.low
    doubtful ^= by_row
    other ^= by_column
    doubtful |= other
    found = np.flatnonzero(doubtful.view(np.int64) != 0)
    if len(found) > scores.size // 64:
        return None
    in_rows += by_row.view(np.int64).sum(1).view(np.uint8).reshape(-1, 8).sum(1, dtype=np.int64)
    in_columns += by_column.view(np.int64).sum(0).view(np.uint8)
    which, byte = doubtful.reshape(-1, 8)[found].nonzero()
    place = found[which] * 8 + byte
    counted = by_row.ravel()[place], by_column.ravel()[place]
    return np.stack([*np.divmod(place, scores.shape[1]), *counted])


def count_in_float64(x: Side, y: Side, in_rows: np.ndarray, in_columns: np.ndarray) -> None:
    """Adds to the counts what is below its limit, every score in float64 and with its TIE."""
    rows = torch.from_numpy(np.column_stack([x.vectors.astype("f8"), TIE * x.lengths]))
    columns = torch.from_numpy(np.column_stack([y.vectors.astype("f8"), y.lengths]))
    scores = (rows @ columns.T).numpy()
    in_rows += (scores < x.limits[:, None]).sum(1)
    in_columns += (scores < y.limits).sum(0)
