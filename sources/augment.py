"""From decoded pictures to what a model sees: whole batches, augmented afresh in every epoch.

dataset.py calls `augment` on batches for training and `views_of` for evaluation. Normalising is the
first block of every image tower (see models.py).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Augmentation(NamedTuple):
    """How much one level of --image-augment changes a picture. Hue stays: captions name colours."""

    area: float = 1.0  # the crop covers this share of the picture to all of it
    flip: bool = False  # mirrors every second picture
    rotate: float = 0.0  # degrees, either way
    colour: float = 0.0  # brightness, contrast and saturation, each by a factor of 1 +- colour


AUGMENTATIONS = {
    "none": Augmentation(),
    "mirror": Augmentation(flip=True),
    "light": Augmentation(area=0.6, flip=True, colour=0.1),
    "strong": Augmentation(area=0.35, flip=True, rotate=8, colour=0.3),
    "scale": Augmentation(area=0.35),  # the parts of `strong`, each alone
    "rotation": Augmentation(rotate=8),
    "colour": Augmentation(colour=0.3),
}
CROP = 0.8  # of a side, in testing; crops that cover 0.35 to 1 of a picture have 0.81 on average


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float in [0, 1], (B, 3, size, size), channels last in memory."""
    images = pixels.permute(0, 3, 1, 2).float().div_(255)
    if images.shape[-1] == size:
        return images
    shrink = partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    try:
        images = shrink(images)
    except NotImplementedError:  # on Apple's MPS before torch 2.7
        images = shrink(images.cpu()).to(pixels.device)
    return images.contiguous(memory_format=torch.channels_last)


def views_of(pixels: torch.Tensor, transform: dict[str, Any]) -> list[torch.Tensor]:
    """What pictures are evaluated as: a picture's embedding is the mean of those of its views.

    uint8 (B, S, S, 3) -> as many float (B, 3, size, size). The whole picture; with `crops` its
    corners and its centre (ten crops with their mirror images, Krizhevsky et al., 2012), as what
    augmentation shows in training is cropped too; with `mirror` the mirror image of each.
    """
    parts, side = [pixels], pixels.shape[1]
    if transform["crops"]:
        kept = round(side * CROP)
        last = side - kept
        corners = [(0, 0), (0, last), (last, 0), (last, last)]
        for y, x in [*corners, (last // 2, last // 2)]:
            parts.append(pixels[:, y : y + kept, x : x + kept])
    shown = [resize(part, transform["image_size"]) for part in parts]
    if not transform["mirror"]:
        return shown
    mirrored = [view.flip(3).contiguous(memory_format=torch.channels_last) for view in shown]
    return shown + mirrored


def augment(
    pixels: torch.Tensor, size: int, level: str, generator: torch.Generator
) -> torch.Tensor:
    """Like `resize`, each picture randomly cropped, mirrored, turned and tinted.

    One affine map a picture does crop, flip and rotation in a single sampling of the batch.
    `generator` (on the CPU) makes all the choices, so they do not depend on the device.
    """
    change = AUGMENTATIONS[level]
    if change == Augmentation():
        return resize(pixels, size)
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    spread = 0.288 if change.area < 1 else 0.0
    area, ratio = uniform(change.area, 1), uniform(-spread, spread).exp()  # 3/4 to 4/3
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if change.flip else torch.ones(count)
    angle = uniform(-change.rotate, change.rotate).deg2rad()
    rows = (
        torch.stack([width * mirror * angle.cos(), -width * mirror * angle.sin(), left], 1),
        torch.stack([height * angle.sin(), height * angle.cos(), top], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1).to(device), [count, 3, size, size], False)
    images = pixels.permute(0, 3, 1, 2).float().div_(255)
    images = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    if change.colour:
        low, high = 1 - change.colour, 1 + change.colour
        factors = [uniform(low, high).view(-1, 1, 1, 1).to(device) for _ in range(3)]
        images = tint(images, *factors)
    return images.contiguous(memory_format=torch.channels_last)


def tint(
    images: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    """Scales brightness, contrast (about the mean) and saturation (about grey), in [0, 1]."""
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp_(0, 1)
