"""torchvision's ViT-B/16 (Dosovitskiy et al. 2021) as a sequence of blocks.

models.py builds it for --image-tower vit_b_16; weights.py fills it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torchvision
from torch import nn

from models import Normalize
from support.command import UserError

if TYPE_CHECKING:
    from argparse import Namespace


class Patches(nn.Module):
    """The beginning of a ViT: patches, the class token, positions."""

    def __init__(self, net: torchvision.models.VisionTransformer):
        super().__init__()
        self.projection, self.token = net.conv_proj, net.class_token
        self.positions = net.encoder.pos_embedding
        self.image_size = net.image_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, S, S) -> (B, 1 + S/16 * S/16, 768), the class token first."""
        x = self.projection(images).flatten(2).mT
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions


class ClassToken(nn.Module):
    """The end of a ViT: the normalised class token is the picture's feature."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)[:, 0]


def cut_vit(net: torchvision.models.VisionTransformer) -> nn.Sequential:
    """A torchvision ViT's parts, without its classifier, as a tower."""
    layers = list(net.encoder.layers)
    tower = nn.Sequential(Normalize(), Patches(net), *layers, ClassToken(net.encoder.ln))
    tower.width = net.hidden_dim
    return tower


def vit_b_16(options: Namespace) -> nn.Sequential:
    """A ViT of random weights; the size of its input must divide by its patch."""
    if options.image_size % 16:
        raise UserError("--image-tower vit_b_16 needs an --image-size that 16 divides, such as 224")
    return cut_vit(torchvision.models.vit_b_16(weights=None, image_size=options.image_size))
