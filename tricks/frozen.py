"""What frozen blocks make of pictures and captions, computed once: an epoch then takes seconds.

train.py hands in model and pairs, and gets the model above the frozen blocks (the same weights)
with pairs of features. Bought: an epoch of projections on a frozen tower in 5 s where it took 200.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dataset import PAD
from models import CLIP
from sources.pictures import DECODER, cached, read_array, write_header
from support.command import UserError
from support.device import AUTOCAST

if TYPE_CHECKING:
    from argparse import Namespace

    from dataset import Pairs

FEATURES = "2"  # part of every key: raise it when the same weights would give other features


def keep_features(
    model: CLIP, pairs: dict[str, Pairs], options: Namespace
) -> tuple[CLIP, dict[str, Pairs]]:
    """The model above its frozen blocks, and pairs of what those blocks give.

    Pictures are kept as features where they are not augmented, whole in training, in all their
    views for evaluation. Captions are kept where the text tower is frozen and they are not
    rewritten.
    """
    below = first_that_learns(model.image_tower) if options.image_augment == "none" else 0
    text_frozen = not any(weight.requires_grad for weight in model.text_tower.parameters())
    text_frozen = text_frozen and options.text_augment == "none"
    if not below and not text_frozen:
        return model, pairs
    kept = {}
    for name, split in pairs.items():
        images, texts = split.images, split.texts
        if below:
            transform = model.transform
            if name == "train":
                transform = {**transform, "crops": False, "mirror": False}
            features = image_features(model, split, below, transform, options, name)
            images = ImageFeatures(features, split.caption_image, options.map_crop)
        if text_frozen:
            texts = TextFeatures(text_features(model, texts.tokens, options, name))
        kept[name] = split.with_sides(images, texts)
    text_tower = nn.Identity() if text_frozen else model.text_tower
    return model.above(model.image_tower[below:], text_tower), kept


def first_that_learns(tower: nn.Sequential) -> int:
    """The place of the first block with a weight that learns, or how many blocks there are.

    0 where nothing that has weights is frozen below it.
    """
    weighty = [place for place, block in enumerate(tower) if any(True for _ in block.parameters())]
    learning = [p for p in weighty if any(w.requires_grad for w in tower[p].parameters())]
    first = learning[0] if learning else len(tower)
    return 0 if first == weighty[0] else first


# --------------------------------------------------------------------- sides of features


class ImageFeatures:
    """The image side of pairs (see dataset.Pixels): the inputs of a block, of whole pictures."""

    def __init__(self, features: np.ndarray, caption_image: np.ndarray, map_crop: float = 0.0):
        self.features = features  # float16 (images, views, ...), maps channels last
        self.caption_image, self.map_crop = caption_image, map_crop

    def fetch(self, captions: np.ndarray, epoch: int) -> np.ndarray:
        return self.features[self.caption_image[captions], 0]

    def prepare(
        self, features: torch.Tensor, options: Namespace, generator: torch.Generator
    ) -> torch.Tensor:
        return window(opened(features), self.map_crop, generator)

    def views(
        self, part: slice, transform: dict[str, Any], device: torch.device
    ) -> list[torch.Tensor]:
        features = torch.from_numpy(np.array(self.features[part])).to(device)
        return [opened(view) for view in features.unbind(1)]


class TextFeatures:
    """The text side of pairs (see dataset.Captions): what a frozen text tower gives."""

    def __init__(self, features: np.ndarray):
        self.features = features  # float16 (captions, width)

    def fetch(self, captions: np.ndarray, epoch: int) -> np.ndarray:
        return self.features[captions]

    def batches(self) -> Iterator[tuple[range, torch.Tensor]]:
        for first in range(0, len(self.features), 1000):
            part = torch.from_numpy(np.array(self.features[first : first + 1000]))
            yield range(first, first + len(part)), part


def stored(x: torch.Tensor) -> np.ndarray:
    """A batch of features as it is kept: float16, maps channels last. Raises UserError."""
    kept = (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).half()
    if not kept.isfinite().all():
        raise UserError(
            "a frozen tower's features do not fit into 16 bits; give --image-augment light, which "
            "keeps none, or let the tower learn"
        )
    return kept.cpu().numpy()


def opened(x: torch.Tensor) -> torch.Tensor:
    """A batch of stored features as blocks take it: float32, maps (B, C, H, W)."""
    x = x.float()
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def window(maps: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """In every second batch a random window of the maps (B, C, H, W), `share` smaller each way.

    A crop of the picture, as far as frozen blocks allow one: cheap, and it keeps the blocks above
    from learning the places of things by heart.
    """
    side = max(1, round(maps.shape[-1] * (1 - share)))
    if maps.ndim != 4 or side >= maps.shape[-1] or torch.rand(1, generator=generator) < 0.5:
        return maps
    top, left = torch.randint(maps.shape[-1] - side + 1, (2,), generator=generator).tolist()
    cut = maps[:, :, top : top + side, left : left + side]
    return cut.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------- computed and cached


def key_of(*parts: Any) -> str:
    """sha256 over weights (their bytes), arrays, and whatever JSON can write."""
    hashed = hashlib.sha256(FEATURES.encode())
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            hashed.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        else:
            hashed.update(json.dumps(part, sort_keys=True).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()[:20]


def image_features(
    model: CLIP,
    pairs: Pairs,
    below: int,
    transform: dict[str, Any],
    options: Namespace,
    name: str,
) -> np.ndarray:
    """What the first `below` blocks give of a split's pictures: float16 (images, views, ...).

    The key holds the weights of those blocks, the preprocessing, and every picture's content.
    """
    blocks, dataset = model.image_tower[:below], pairs.dataset
    key = key_of(
        [DECODER, below, transform, options.image_tower, options.precision],
        [dataset.pixels.shape[1], [dataset.digests[row] for row in pairs.rows]],
        *blocks.state_dict().values(),
    )
    build = partial(write_features, model, blocks, pairs, transform, options, name)
    return cached(options.cache, f"images-{key}", build, read_array)


@torch.inference_mode()
def write_features(
    model: CLIP,
    blocks: nn.Sequential,
    pairs: Pairs,
    transform: dict[str, Any],
    options: Namespace,
    name: str,
    folder: Path,
) -> None:
    """Runs all pictures through the blocks; fills features.npy."""
    count = len(pairs.rows)
    bar = tqdm(total=count, desc=f"{name} images", unit="image", leave=False, disable=None)
    with bar, frozen(model, options), (folder / "features.npy").open("wb") as file:
        for first in range(0, count, 32):
            views = pairs.images.views(slice(first, first + 32), transform, model.device)
            batch = np.stack([stored(blocks(view)) for view in views], 1)
            if first == 0:
                write_header(file, (count, *batch.shape[1:]), np.float16)
            file.write(batch.tobytes())
            bar.update(len(batch))


def text_features(model: CLIP, tokens: torch.Tensor, options: Namespace, name: str) -> np.ndarray:
    """The frozen text tower's features of padded tokens: float16 (len(tokens), width).

    Those of pretrained weights are cached; the key holds the weights and every token.
    """

    def compute() -> np.ndarray:
        lengths = (tokens != PAD).sum(1)
        order = lengths.argsort(stable=True)
        features = np.empty((len(tokens), model.text_tower.width), np.float16)
        bar = tqdm(total=len(order), desc=f"{name} texts", unit="text", leave=False, disable=None)
        with bar, frozen(model, options), torch.inference_mode():
            for chosen in order.split(128):
                part = tokens[chosen, : lengths[chosen].max()].to(model.device)
                features[chosen] = stored(model.text_tower(part))
                bar.update(len(chosen))
        return features

    if options.text_weights == "none":  # a tower of this run alone
        return compute()
    architecture = getattr(options, "text_architecture", None)
    kind = [options.text_tower, architecture, options.precision]
    key = key_of(kind, tokens, *model.text_tower.state_dict().values())

    def build(folder: Path) -> None:
        np.save(folder / "features.npy", compute())

    return cached(options.cache, f"texts-{key}", build, read_array)


@contextlib.contextmanager
def frozen(model: CLIP, options: Namespace) -> Iterator[None]:
    """Every module in eval mode, but in the precision of training."""
    was_training, kind = model.training, AUTOCAST[options.precision]
    model.eval()
    try:
        with torch.autocast(model.device.type, kind) if kind else contextlib.nullcontext():
            yield
    finally:
        model.train(was_training)
