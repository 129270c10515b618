"""Files of what evaluate.py found: JSON, CSV, plain arrays.

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
    from dataset import CaptionedImages
    from evaluate import Embedded


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    print(f"wrote {path}")


def save_embeddings(file: Path, embedded: Embedded, dataset: CaptionedImages) -> None:
    """Writes plain arrays that np.load reads without pickle.

    They are compressed: an array of texts is as wide as the longest, and most of it nothing.
    """
    with atomic_write(file) as temporary, temporary.open("wb") as opened:
        np.savez_compressed(
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
    """The rows of a CSV file by its heads. Raises UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
