"""What evaluate.py prints and writes: the protocol, the table, JSON, CSV, plain arrays.

evaluate.py and report/ hand in their figures; nothing is measured here.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from support.command import UserError, atomic_write

if TYPE_CHECKING:
    from dataset import CaptionedImages, Pairs
    from evaluate import Embedded


KS = (1, 5, 10)


def protocol_of(dataset: CaptionedImages, pairs: Pairs) -> dict[str, Any]:
    """What a figure must be read with: pool sizes, the split and how ranks are counted."""
    per_image = np.bincount(pairs.caption_image)
    return {
        "data": dataset.path,
        "split": pairs.name,
        "splits": dataset.splits,
        "split_by_caption": dataset.by_caption,
        "images": len(pairs.rows),
        "captions": len(pairs),
        "captions_per_image": [int(per_image.min()), int(per_image.max())],
        "i2t": "rank of the best of the image's captions among all captions",
        "t2i": "rank of the caption's image among all images",
        "ties": "lost",
        "interval": "95%, bootstrap over images, 1000 resamples",
        "fingerprint": dataset.fingerprint,
    }


def protocol_line(protocol: dict[str, Any]) -> str:
    low, high = protocol["captions_per_image"]
    each = f"{low}" if low == high else f"{low} to {high}"
    line = (
        f"protocol: {protocol['images']:,} images x {each} captions = {protocol['captions']:,}, "
        f"{protocol['splits']} {protocol['split']} split; i2t counts the best of an image's "
        "captions; ties lose; percent; ranks from 1; 95% bootstrap intervals over images"
    )
    if protocol["split_by_caption"]:
        line += "; WARNING: the split is by caption, test images were trained on"
    return line


def metrics_table(metrics: dict[str, float], intervals: dict[str, list[float]]) -> str:
    """The figures as lines of text."""

    def cell(key: str) -> str:
        low, high = intervals[key]
        return f"{metrics[key]:5.1f} [{low:4.1f}, {high:4.1f}]"

    lines = [f"{'':6}" + "".join(f"{f'R@{k}':<20}" for k in KS) + f"{'medr':>8}{'meanr':>9}"]
    for way in ("i2t", "t2i"):
        cells = "".join(f"{cell(f'{way}_r{k}'):<20}" for k in KS)
        ranks = f"{metrics[f'{way}_medr']:8.1f}{metrics[f'{way}_meanr']:9.1f}"
        lines.append(f"{way:6}{cells}{ranks}")
    lines.append(
        f"rsum {cell('rsum')}, mean recall {cell('mean_recall')}; top-1 of N x N, one caption an "
        f"image: i2t {metrics['top1_i2t']:.1f}, t2i {metrics['top1_t2i']:.1f}"
    )
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    print(f"wrote {path}")


def save_embeddings(file: Path, embedded: Embedded, dataset: CaptionedImages) -> None:
    """Writes plain arrays that np.load reads without pickle."""
    with atomic_write(file) as temporary, temporary.open("wb") as opened:
        np.savez(
            opened,
            image_embeddings=embedded.image_embeddings,
            text_embeddings=embedded.text_embeddings,
            image_names=np.array([dataset.names[i] for i in embedded.pairs.rows]),
            captions=np.array(embedded.pairs.captions),
            caption_image=embedded.pairs.caption_image,
        )
    print(f"wrote {file}")


def cell_of(value: str | float) -> str:
    """A value as a cell of a CSV file that a spreadsheet opens.

    A text that it would run as a formula gets a ' before it; a number that is not finite is empty.
    """
    if isinstance(value, str):
        runs = value.lstrip()[:1] in tuple("=+-@＝＋－＠") or value[:1] in ("\t", "\r", "\n")
        return f"'{value}" if runs else value
    if not math.isfinite(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(int(value))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    """Writes a table as UTF-8 with a byte order mark, by which Excel knows it. Raises UserError.

    A file name can be any bytes: what is no character is written as its escape.
    """
    style = {"encoding": "utf-8-sig", "errors": "backslashreplace", "newline": ""}
    with atomic_write(path) as temporary, temporary.open("w", **style) as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows([cell_of(value) for value in row] for row in rows)
    print(f"wrote {path}")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `write_csv` wrote. Raises UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
