"""Texts and pictures through a trained model: batches in, unit-length embeddings out.

evaluate.py, zeroshot.py and visualize.py embed with these; features.py gives train.py's dev split
a shortcut, `Cached`.
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from captions import Tokenizer, WordPieces
from features import opened, views_of
from models import CLIP, SideBySide


@torch.inference_mode()
def embed_texts(
    model: CLIP | SideBySide, tokenizer: Tokenizer | WordPieces, texts: list[str]
) -> np.ndarray:
    """Unit-length embeddings (len(texts), D), float32; batches of texts of like length."""
    device = model.device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made = np.empty((len(texts), model.embed_dim), np.float32)
    for start in tqdm(range(0, len(order), 256), "texts", leave=False, disable=None):
        chosen = order[start : start + 256]
        tokens = tokenizer([texts[i] for i in chosen]).to(device)
        made[chosen] = model.encode_text(tokens).cpu().numpy()
    return made


@torch.inference_mode()
def embed_images(
    model: CLIP | SideBySide,
    pixels: np.ndarray,
    rows: np.ndarray,
    size: int,
    readings: np.ndarray | None = None,
) -> np.ndarray:
    """Unit-length embeddings (len(rows), D), float32, of rows of uint8 `pixels` (N, S, S, 3).

    `readings` (len(rows), ...) is what is written on them, of features.reading_features.
    """
    device = model.device
    parts = []
    for start in tqdm(range(0, len(rows), 100), "images", leave=False, disable=None):
        batch = torch.from_numpy(pixels[rows[start : start + 100]]).to(device)
        read = batch_of(readings, start, device)
        views = views_of(batch, 1 + model.mirror, size)
        parts.append(model.encode_views(views, 0, read).cpu().numpy())
    return np.concatenate(parts)


def batch_of(readings: np.ndarray | None, first: int, device: torch.device) -> torch.Tensor | None:
    """The readings that go with a batch of 100 pictures, where there are any."""
    return None if readings is None else torch.from_numpy(readings[first : first + 100]).to(device)


class Cached(NamedTuple):
    """A split's features, of features.py: the inputs of image block `start`, of the text head."""

    images: np.ndarray | None = None  # (images, views, ...)
    start: int = 0
    texts: np.ndarray | None = None
    readings: np.ndarray | None = None  # what is written on the images
    beside: tuple[np.ndarray, np.ndarray] | None = None  # embeddings by the towers before this one


NOTHING = Cached()


@torch.inference_mode()
def embed_cached(model: CLIP, cached: Cached) -> np.ndarray:
    """Like `embed_images`, from a split's cached features."""
    parts = []
    for first in range(0, len(cached.images), 100):
        views = torch.from_numpy(cached.images[first : first + 100].copy()).to(model.device)
        read = batch_of(cached.readings, first, model.device)
        made = model.encode_views(map(opened, views.unbind(1)), cached.start, read)
        parts.append(made.cpu().numpy())
    return np.concatenate(parts)
