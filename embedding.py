"""Texts and pictures through a trained model: batches in, unit-length embeddings out.

evaluate.py, zeroshot.py and visualize.py embed with these; features.py gives train.py's dev split
a shortcut, `Cached`.
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from features import opened, views_of
from models import Model


@torch.inference_mode()
def embed_texts(model: Model, texts: list[str]) -> np.ndarray:
    """Unit-length embeddings (len(texts), D), float32; batches of texts of like length."""
    device = model.device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made = np.empty((len(texts), model.embed_dim), np.float32)
    for start in tqdm(range(0, len(order), 256), "texts", leave=False, disable=None):
        chosen = order[start : start + 256]
        tokens = model.tokenizer([texts[i] for i in chosen]).to(device)
        made[chosen] = model.encode_text(tokens).cpu().numpy()
    return made


@torch.inference_mode()
def embed_images(
    model: Model,
    images: np.ndarray,
    rows: np.ndarray,
    start: int = 0,
    readings: np.ndarray | None = None,
) -> np.ndarray:
    """Unit-length embeddings (len(rows), D), float32, of rows of uint8 pixels (N, S, S, 3).

    With `start`, `images` are features (N, views, ...), the input of that block. `readings`
    (len(rows), ...) is what is written on them, of features.reading_features.
    """
    parts, count, size = [], 1 + model.transform["mirror"], model.transform["image_size"]
    for first in tqdm(range(0, len(rows), 100), "images", leave=False, disable=None):
        part = slice(first, first + 100)
        batch = torch.from_numpy(images[rows[part]]).to(model.device)
        views = map(opened, batch.unbind(1)) if start else views_of(batch, count, size)
        read = None if readings is None else torch.from_numpy(readings[part]).to(model.device)
        parts.append(model.encode_views(views, start, read).cpu().numpy())
    return np.concatenate(parts)


class Cached(NamedTuple):
    """A split's features, of features.py: the inputs of image block `start`, of the text head."""

    images: np.ndarray | None = None  # (images, views, ...)
    start: int = 0
    texts: np.ndarray | None = None
    readings: np.ndarray | None = None  # what is written on the images
    beside: list[torch.Tensor] | None = None  # embeddings by the towers before this one


NOTHING = Cached()
