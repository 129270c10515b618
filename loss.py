"""The losses: train.py hands every batch of embeddings to what `build_loss` gives it.

In a batch several captions may belong to one image, and several images have equal captions: those
are never each other's negatives. A new loss is one function and its entry in LOSSES.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from support.command import UserError, later

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from dataset import Pairs


def info_nce(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    text_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE of CLIP (Radford et al. 2021, figure 3): a scalar.

    image_embeddings, text_embeddings: (N, D), unit length; row i of both is a pair.
    logit_scale: the factor 1 / temperature. image_ids: (N,), equal where the images are the same
    (None: all differ); text_ids: the same of the texts. With S = logit_scale * images @ texts.T,
    pair i contributes
        -log( exp S_ii / (exp S_ii + sum over j with both ids_j != ids_i of exp S_ij) ),
    and likewise over the columns: each positive in turn, against what is not its image's nor says
    the same. When all ids differ this is the assignment's formula. A batch of one has no negatives:
    its loss is 0.
    label_smoothing: the share of the target that is spread evenly over these candidates.
    Raises ValueError when the shapes do not fit.
    """
    cosines, same = compared(image_embeddings, text_embeddings, image_ids, text_ids)
    hidden = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logit_scale * cosines
    true, loss = logits.diagonal(), 0.0
    for axis in (1, 0):  # each image among the texts, each text among the images
        all_of_them = logits.masked_fill(hidden, float("-inf")).logsumexp(axis)
        cost = all_of_them - true
        if label_smoothing:
            mean = logits.masked_fill(hidden, 0.0).sum(axis) / (~hidden).sum(axis)
            cost = cost.lerp(all_of_them - mean, label_smoothing)
        loss = loss + cost.mean() / 2
    return loss


def compared(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    image_ids: torch.Tensor | None,
    text_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines (N, N), which of them are of one image or of one text (N, N)). Raises ValueError."""
    if image_embeddings.shape != text_embeddings.shape or image_embeddings.ndim != 2:
        raise ValueError(f"not pairs: {image_embeddings.shape} and {text_embeddings.shape}")
    cosines = image_embeddings @ text_embeddings.T
    if image_ids is None:
        image_ids = torch.arange(len(cosines), device=cosines.device)
    if text_ids is None:
        text_ids = image_ids
    for name, ids in (("image_ids", image_ids), ("text_ids", text_ids)):
        if ids.shape != cosines.shape[:1]:
            raise ValueError(f"{len(cosines)} pairs, but {name} of shape {tuple(ids.shape)}")
    same_image = image_ids[:, None] == image_ids[None, :]
    return cosines, same_image | (text_ids[:, None] == text_ids[None, :])


class SigLIP(nn.Module):
    """Sigmoid loss of SigLIP (Zhai et al. 2023, eq. 1): every pair is a yes or no of its own.

    -1/N sum over i, j of log sigmoid( z_ij * (logit_scale * cosine_ij + bias) ), where z_ij is 1
    for a pair of one image, or of equal texts, and -1 for any other; the bias learns, and at first
    says no to most.
    """

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(
        self,
        image_embeddings: torch.Tensor,
        text_embeddings: torch.Tensor,
        logit_scale: torch.Tensor | float,
        image_ids: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cosines, same = compared(image_embeddings, text_embeddings, image_ids, text_ids)
        signs = same.to(cosines.dtype) * 2 - 1
        return -F.logsigmoid(signs * (logit_scale * cosines + self.bias)).sum() / len(cosines)


def triplet(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    logit_scale: torch.Tensor | float = 1.0,
    image_ids: torch.Tensor | None = None,
    margin: float = 0.2,
    text_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Max of hinges of VSE++ (Faghri et al. 2018, eq. 6), the mean over pairs.

    Each pair's cosine must exceed by `margin` that of its image with the hardest text, and of its
    text with the hardest image, that are not of the same image or text. It has no temperature.
    """
    cosines, same = compared(image_embeddings, text_embeddings, image_ids, text_ids)
    others, true = cosines.masked_fill(same, -1.0), cosines.diagonal()
    return sum((margin + others.amax(axis) - true).clamp(min=0).mean() for axis in (1, 0))


# name -> what makes loss(image embeddings, text embeddings, scale, image ids, text_ids=) for a run
LOSSES: dict[str, Callable[[Namespace, Pairs], Callable[..., torch.Tensor]]] = {
    "infonce": lambda options, pairs: partial(info_nce, label_smoothing=options.label_smoothing),
    "siglip": lambda options, pairs: SigLIP(),
    "triplet": lambda options, pairs: triplet,
    "genres": later("posters.genres", "build"),
}


def parse_loss(text: str) -> list[tuple[float, str]]:
    """`infonce+0.2*triplet` -> [(1.0, "infonce"), (0.2, "triplet")]. Raises UserError."""
    parts = []
    for part in text.split("+"):
        weight, star, name = part.strip().rpartition("*")
        try:
            factor = float(weight) if star else 1.0
        except ValueError:
            factor = 0.0
        if name not in LOSSES or not 0 < factor < 1e6:
            raise UserError(
                f"--loss {text}: {part!r} is none of {', '.join(LOSSES)}, alone or with a weight "
                "above 0, as in infonce+0.2*triplet"
            )
        parts.append((factor, name))
    return parts


class WeightedSum(nn.Module):
    """The sum of losses that --loss asks for."""

    def __init__(self, losses: list[tuple[float, Callable[..., torch.Tensor]]]):
        super().__init__()
        self.losses = losses
        self.learned = nn.ModuleList(loss for _, loss in losses if isinstance(loss, nn.Module))

    def forward(self, *batch: torch.Tensor, text_ids: torch.Tensor | None = None) -> torch.Tensor:
        return sum(weight * loss(*batch, text_ids=text_ids) for weight, loss in self.losses)


def build_loss(options: Namespace, pairs: Pairs) -> WeightedSum:
    """The loss of a run on its training pairs. Raises UserError."""
    return WeightedSum([(w, LOSSES[name](options, pairs)) for w, name in parse_loss(options.loss)])


WHAT_THEN = "training is stopped, the last checkpoint is intact; try a lower --lr or more --warmup"


def check_finite(value: float, images: torch.Tensor, texts: torch.Tensor, place: str) -> None:
    """Raises UserError for a loss or embeddings not finite, or 8 or more that are the same point.

    Measured: fresh models spread by 1e-4 or more; a collapsed one by float32's rounding, 1e-13.
    """
    if not math.isfinite(value):
        raise UserError(f"{place}: the loss is {value}; {WHAT_THEN}")
    for article, name, embeddings in (("an", "image", images), ("a", "text", texts)):
        if not embeddings.isfinite().all():
            raise UserError(f"{place}: {article} {name} embedding is not finite; {WHAT_THEN}")
        spread = (embeddings - embeddings.mean(0)).square().sum(1).mean().item()
        if len(embeddings) >= 8 and spread < 1e-10:
            raise UserError(f"{place}: all {name} embeddings are the same point; {WHAT_THEN}")
