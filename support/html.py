"""The predictions of a split as one HTML file that opens from disk and fetches nothing.

visualize.py --html hands in the embeddings; support/predictions.html shows what is written here.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sources.texts import readable
from support.command import atomic_write
from support.ranking import cosine, top_k
from support.topics import topics_of

if TYPE_CHECKING:
    from evaluate import Embedded

TEMPLATE = Path(__file__).with_name("predictions.html")
THUMBNAIL = 132  # pixels


def data_uri(picture: Image.Image) -> str:
    """A small JPEG as text."""
    small, file = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=70, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def predictions(
    queries: np.ndarray, pool: np.ndarray, ranks: np.ndarray, true: list[list[int]], k: int
) -> dict[str, Any]:
    """What each of queries (Q, D) finds in pool (N, D): the best `k`, and the best true one."""
    found: dict[str, Any] = {key: [] for key in ("found", "scores", "true", "true_score")}
    for first in range(0, len(queries), 256):  # all scores at once may not fit
        for i, scores in enumerate(cosine(queries[first : first + 256], pool), first):
            order = top_k(scores, k)
            own = true[i][top_k(scores[true[i]], 1)[0]]
            found["found"].append(order.tolist())
            found["scores"].append([number(scores[position]) for position in order])
            found["true"].append(own)
            found["true_score"].append(number(scores[own]))
    return {**found, "rank": [int(rank) if np.isfinite(rank) else None for rank in ranks]}


def number(score: float) -> float:
    """A score as JSON can hold it: one that is not finite is the worst."""
    return round(float(score), 4) if np.isfinite(score) else -1.0


def page_data(
    embedded: Embedded, picture: Callable[[int], Image.Image], footer: str, k: int, seed: int
) -> dict[str, Any]:
    """All that the page shows. A picture's topic is that of its captions, and theirs is its."""
    pairs, images, texts = embedded.pairs, embedded.image_embeddings, embedded.text_embeddings
    owner, own = pairs.caption_image.tolist(), [[] for _ in pairs.rows]
    for caption, image in enumerate(owner):
        own[image].append(caption)
    topic, names = topics_of(pairs, seed)
    bar = tqdm(range(len(images)), "thumbnails", leave=False, disable=None)
    return {
        "title": f"Predictions: {len(texts):,} captions and {len(images):,} pictures",
        "footer": footer,
        "names": [readable(pairs.dataset.names[row]) for row in pairs.rows],
        "captions": pairs.captions,
        "owner": owner,
        "topics": names,
        "topic": topic.tolist(),
        "texts": predictions(texts, images, embedded.t2i, [[i] for i in owner], k),
        "images": predictions(images, texts, embedded.i2t, own, k),
        "pictures": [data_uri(picture(i)) for i in bar],
    }


def write_page(
    path: Path,
    embedded: Embedded,
    picture: Callable[[int], Image.Image],
    footer: str,
    k: int,
    seed: int,
) -> None:
    """Writes the page; nothing in the data can end its script or begin another. UserError."""
    text = json.dumps(page_data(embedded, picture, footer, k, seed), separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # a caption with </script> in it
    nonce = hashlib.sha256(text.encode()).hexdigest()[:32]
    page = TEMPLATE.read_text("utf-8").replace("{{nonce}}", nonce).replace("{{data}}", text)
    with atomic_write(path) as temporary:
        temporary.write_text(page, "utf-8")
