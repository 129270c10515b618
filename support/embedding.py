"""Texts and pictures through trained models: batches in, unit-length embeddings out.

evaluate.py embeds splits; `Trained`, one checkpoint or several, the user's own texts and pictures.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from dataset import CaptionedImages, Captions, Pairs, Pixels, Tokenizer
from models import CLIP, model_from_checkpoint
from sources.texts import unknown_to_all
from support.checkpoint import load_checkpoint
from support.command import UserError
from support.device import choose_device


@torch.inference_mode()
def embed_images(model: CLIP, images: Pixels, count: int) -> np.ndarray:
    """Unit-length embeddings (count, D), float32, each the mean of those of an image's views."""
    parts = []
    for first in tqdm(range(0, count, 100), "images", leave=False, disable=None):
        views = images.views(slice(first, first + 100), model.transform, model.device)
        embeddings = [model.encode_image(view) for view in views]
        mean = embeddings[0] if len(views) == 1 else F.normalize(sum(embeddings), dim=-1)
        parts.append(mean.cpu().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def embed_texts(model: CLIP, texts: Captions) -> np.ndarray:
    """Unit-length embeddings (texts, D), float32."""
    order, parts = [], []
    for chosen, tokens in tqdm(texts.batches(), "texts", leave=False, disable=None):
        order.extend(chosen)
        parts.append(model.encode_text(tokens.to(model.device)).cpu().numpy())
    return np.concatenate(parts)[np.argsort(order)]


def embed_pairs(model: CLIP, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (images, D) and (captions, D). Leaves the model in the mode in which it was."""
    was_training = model.training
    model.eval()
    images = embed_images(model, pairs.images, len(pairs.rows))
    texts = embed_texts(model, pairs.texts)
    model.train(was_training)
    return images, texts


def side_by_side(parts: list[np.ndarray]) -> np.ndarray:
    """Unit-length embeddings of several models, put together to unit length again.

    A cosine of them all is the mean of the parts', each counting by its width.
    """
    if len(parts) == 1:
        return parts[0]
    widths = [part.shape[1] for part in parts]
    scaled = [part * math.sqrt(w / sum(widths)) for part, w in zip(parts, widths, strict=True)]
    return np.concatenate(scaled, 1).astype(np.float32)


class Trained(NamedTuple):
    """One trained model, or several side by side, and what their checkpoints say of them."""

    path: Path
    contents: list[dict[str, Any]]
    members: list[CLIP]

    @property
    def content(self) -> dict[str, Any]:
        return self.contents[0]

    @property
    def options(self) -> Namespace:
        return Namespace(**self.content["config"])

    @property
    def stage(self) -> str:
        """How far it has learned."""
        return " and ".join(f"epoch {content['epoch']}" for content in self.contents)

    @property
    def tokenizers(self) -> list[Tokenizer]:
        return [model.tokenizer for model in self.members]

    def unknown(self, text: str) -> list[str]:
        """The words of a text that not one member knows."""
        return unknown_to_all(self.tokenizers, text)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Unit-length embeddings (len(texts), D), float32."""
        return side_by_side([embed_texts(m, Captions(texts, m.tokenizer)) for m in self.members])

    def embed_pixels(self, pixels_at: Callable[[int], np.ndarray]) -> np.ndarray:
        """Unit-length embeddings (N, D) of pixels_at(stored size), uint8 (N, S, S, 3)."""
        parts = []
        for model in self.members:
            pixels = pixels_at(model.transform["stored_size"])
            rows = np.arange(len(pixels))
            parts.append(embed_images(model, Pixels(pixels, rows, rows), len(rows)))
        return side_by_side(parts)


def load_trained(paths: list[Path], device: str) -> Trained:
    """Loads checkpoints, by default the newest checkpoints/*/best.pt; prints which. UserError."""
    if not paths:
        found = Path("checkpoints").glob("*/best.pt")
        paths = sorted(found, key=lambda path: path.stat().st_mtime)[-1:]
    if not paths:
        raise UserError("no checkpoints/*/best.pt here; name a checkpoint, or run train.py")
    contents, members = [], []
    for path in paths:
        content = load_checkpoint(path)
        for part in content.get("members", [content]):
            contents.append(part)
            members.append(model_from_checkpoint(part, path).to(choose_device(device)).eval())
    trained = Trained(paths[0], contents, members)
    print(f"checkpoint {' and '.join(map(str, paths))}, {trained.stage}")
    return trained


def trained_on(trained: Trained, dataset: CaptionedImages, rows: np.ndarray) -> np.ndarray:
    """Which of some images a member was trained on, by their content: names are used again."""
    seen = {x for content in trained.contents for x in content["train_images"]["digests"]}
    return np.array([dataset.digests[i] in seen for i in rows])
