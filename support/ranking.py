"""Counts scores against limits: all images x texts, from one float32 product, and yet exact.

evaluate.py ranks with `count_below`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

# Of a score, as a share of its two vectors' lengths: equal vectors differ by less in float64.
TIE = 1e-12
# A block lies in a core's own cache, and a sum of its bytes along either side holds in a byte.
ROWS, COLUMNS = 250, 1024


class Side(NamedTuple):
    """The vectors of a block's rows, or columns, and the limits of the scores in each."""

    vectors: np.ndarray  # (n, D)
    lengths: np.ndarray  # (n,), float64, as the limits
    limits: np.ndarray
    low: np.ndarray  # (n,), float32: a float32 score below it is certainly below the limit
    high: np.ndarray  # and one that is not below this certainly reaches it

    def part(self, chosen: slice) -> Side:
        return Side._make(field[chosen] for field in self)


def exact_scores(images: np.ndarray, texts: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The products images[i] . texts[j] in float64, (len(i),)."""
    parts = (
        np.array_split(np.arange(len(i)), len(i) // 8192 + 1) if len(i) > 8192 else [slice(None)]
    )
    return np.concatenate(
        [
            np.einsum("nd,nd->n", images.take(i[part], 0), texts.take(j[part], 0), dtype=np.float64)
            for part in parts
        ]
    )


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
    work = partial(count_of_rows, *sides, in_range)
    starts, threads = range(0, len(images), ROWS), torch.get_num_threads()
    of_images, of_texts = [], np.zeros(len(texts_padded), np.int64)
    # Comparisons are NumPy's, twice as fast as torch's; each thread multiplies on its own.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for in_rows, in_columns in pool.map(work, starts):
                of_images.append(in_rows)
                of_texts += in_columns
    finally:
        torch.set_num_threads(threads)
    return np.concatenate(of_images), of_texts[: len(texts)]


def count_of_rows(
    images: Side, texts: Side, in_range: bool, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count_below` of ROWS images."""
    x = images.part(slice(start, start + ROWS))
    in_rows, in_columns = np.zeros(len(x.vectors), np.int64), []
    for first in range(0, len(texts.vectors), COLUMNS):
        y = texts.part(slice(first, first + COLUMNS))
        counts = (in_range and count_in_float32(x, y)) or count_in_float64(x, y)
        in_rows += counts[0]
        in_columns.append(counts[1])
    return in_rows, np.concatenate(in_columns)


def count_in_float32(x: Side, y: Side) -> tuple[np.ndarray, np.ndarray] | None:
    """The counts of a block, few doubtful scores of it done again; None where there are many."""
    rows, columns = (torch.from_numpy(side.vectors.astype("f4", copy=False)) for side in (x, y))
    scores = (rows @ columns.T).numpy()
    by_row, by_column = scores < x.high[:, None], scores < y.high
    doubtful = (words(scores < x.low[:, None]) ^ words(by_row)) | (
        words(scores < y.low) ^ words(by_column)
    )
    found = np.flatnonzero(doubtful != 0)  # of truth values it is four times as fast
    if len(found) > doubtful.size // 8:
        return None
    which, byte = doubtful.view(bool).reshape(-1, 8)[found].nonzero()
    i, j = np.divmod(found[which] * 8 + byte, len(y.vectors))
    exact = exact_scores(x.vectors, y.vectors, i, j) + TIE * x.lengths[i] * y.lengths[j]
    in_rows = words(by_row).sum(1).view(np.uint8).reshape(-1, 8).sum(1, dtype=np.int64)
    in_columns = words(by_column).sum(0).view(np.uint8).astype(np.int64)
    np.add.at(in_rows, i, (exact < x.limits[i]).astype(np.int64) - by_row[i, j])
    np.add.at(in_columns, j, (exact < y.limits[j]).astype(np.int64) - by_column[i, j])
    return in_rows, in_columns


def words(below: np.ndarray) -> np.ndarray:
    """Eight bytes as one number: sums of them are sums of each byte, up to 255."""
    return below.view(np.int64)


def count_in_float64(x: Side, y: Side) -> tuple[np.ndarray, np.ndarray]:
    """The counts of a block, every score in float64."""
    rows = torch.from_numpy(np.column_stack([x.vectors.astype("f8"), TIE * x.lengths]))
    columns = torch.from_numpy(np.column_stack([y.vectors.astype("f8"), y.lengths]))
    scores = (rows @ columns.T).numpy()
    return (scores < x.limits[:, None]).sum(1), (scores < y.limits).sum(0)
