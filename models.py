"""The model: an image tower and a text tower, each projected linearly into one space.

train.py builds it with `build_model` and keeps it with `save_checkpoint`; evaluate.py and
visualize.py read it back with `load_checkpoint`. A new tower is one entry of a table here.
"""

import math
import pickle
import platform
import shutil
import struct
import urllib.error
import warnings
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cli import UserError, atomic_write
from dataset import Tokenizer

# ----------------------------------------------------------------------------- image towers


def resnet(name: str, weights: str, stem: str) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier: (module, width of its features).

    stem `small` takes the first 7 x 7 stride-2 convolution and the pooling behind it for a 3 x 3
    stride-2 convolution: half the stride, twice the resolution in every stage.
    """
    module = getattr(torchvision.models, name)(weights=None)
    if weights != "none":
        if stem == "small":
            raise UserError("--stem small has no pretrained weights; use --stem imagenet")
        load_image_weights(module, name, weights)
    width = module.fc.in_features
    module.fc = nn.Identity()
    if stem == "small":
        module.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
        module.maxpool = nn.Identity()
    return module, width


def load_image_weights(module: nn.Module, name: str, weights: str) -> None:
    """Loads torchvision's ImageNet weights, or a file of the same format, into `module`."""
    try:
        if weights == "imagenet":
            url = torchvision.models.get_model_weights(name).DEFAULT.url
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except (urllib.error.URLError, TimeoutError) as error:
        raise UserError(
            f"the ImageNet weights of {name} cannot be fetched ({error}); download them elsewhere "
            "and give --image-weights PATH, or train with --image-weights none"
        ) from error
    except (OSError, *NOT_A_CHECKPOINT) as error:
        raise UserError(f"--image-weights {weights} cannot be read: {first_line(error)}") from error
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"--image-weights {weights} are not those of a {name}") from error


# name -> build(name, weights, stem) -> (module, width of its features)
IMAGE_TOWERS: dict[str, Callable[[str, str, str], tuple[nn.Module, int]]] = {
    "resnet18": resnet,
    "resnet50": resnet,
}

# ------------------------------------------------------------------------------ text towers

warnings.filterwarnings("ignore", "Converting mask without|TypedStorage")  # of torch 2.0


class TextTransformer(nn.Module):
    """A pre-norm Transformer encoder; a text's feature is the mean over its own tokens."""

    def __init__(self, vocabulary: int, max_tokens: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(max_tokens, width))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        # Heads of 64 numbers or a little more: their count has to divide the width.
        heads = next(n for n in range(width // 64 or 1, 0, -1) if width % n == 0)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)
        self.width = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, width)."""
        real = tokens != Tokenizer.PAD
        x = self.words(tokens) + self.positions[: tokens.shape[1]]  # (B, L, width)
        # Under autocast torch 2.0 wants the mask in the type that its products come in.
        kind = (x[:1, :1] @ x[:1, :1].mT).dtype
        hidden = ~real
        if kind != x.dtype:
            hidden = torch.zeros_like(real, dtype=kind).masked_fill(~real, float("-inf"))
        x = self.blocks(x, src_key_padding_mask=hidden)
        x = x.masked_fill(~real[..., None], 0.0)
        return x.sum(1) / real.sum(1, keepdim=True)


class TextLSTM(nn.Module):
    """A bidirectional LSTM over packed texts; a text's feature is the maximum over its tokens."""

    def __init__(self, vocabulary: int, max_tokens: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.1)
        self.drop = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, layers, True, True, between, bidirectional=True)
        self.width = 2 * width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, 2 * width)."""
        lengths = (tokens != Tokenizer.PAD).sum(1).cpu()  # packing wants them on the CPU
        x = self.drop(self.words(tokens))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.lstm(packed)[0], True, padding_value=float("-inf"))
        return x.amax(1)


TEXT_TOWERS: dict[str, type[nn.Module]] = {"transformer": TextTransformer, "lstm": TextLSTM}

# ------------------------------------------------------------------------------ the two of them


class CLIP(nn.Module):
    """Two towers, a linear projection each, and a learned temperature."""

    MAX_SCALE = 100.0

    def __init__(self, config: dict[str, Any], transform: dict[str, Any], vocabulary: int):
        super().__init__()
        build = IMAGE_TOWERS[config["image_tower"]]
        self.image_tower, width = build(
            config["image_tower"], config["image_weights"], config["stem"]
        )
        self.text_tower = TEXT_TOWERS[config["text_tower"]](
            vocabulary,
            config["max_tokens"],
            config["text_width"],
            config["text_layers"],
            config["dropout"],
        )
        self.image_projection = nn.Linear(width, config["embed_dim"], bias=False)
        self.text_projection = nn.Linear(self.text_tower.width, config["embed_dim"], bias=False)
        # The logarithm of 1 / temperature, as in CLIP; `scale()` is the factor itself.
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / config["temperature"])), not config["fixed_temperature"]
        )
        self.autocast: torch.dtype | None = None  # of the towers in training; None: float32
        for name in ("mean", "std"):
            value = torch.tensor(transform[name]).view(1, 3, 1, 1)
            self.register_buffer(f"pixel_{name}", value, persistent=False)

    def train(self, mode: bool = True) -> "CLIP":
        """Like nn.Module.train, but a module with all its weights frozen stays in eval mode."""
        super().train(mode)
        for module in list(self.modules())[1:]:  # without the model itself, whose eval() leads here
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> unit-length embeddings (B, embed_dim), float32."""
        with self.lower_precision():
            features = self.image_tower((images - self.pixel_mean) / self.pixel_std)
        return F.normalize(self.image_projection(features.float()), dim=-1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> unit-length embeddings (B, embed_dim), float32."""
        with self.lower_precision():
            features = self.text_tower(tokens)
        return F.normalize(self.text_projection(features.float()), dim=-1)

    def lower_precision(self) -> AbstractContextManager:
        """Autocast for a tower in training; evaluation, projections and loss stay in float32."""
        if self.autocast is None or not self.training:
            return nullcontext()
        return torch.autocast(self.logit_scale.device.type, self.autocast)

    def scale(self) -> torch.Tensor:
        """The factor on the cosines, at most MAX_SCALE; there it still has its gradient."""
        # train.py holds logit_scale at the limit itself, where clamp would give no gradient.
        return self.logit_scale.clamp(max=math.log(self.MAX_SCALE) + 1e-6).exp()

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.encode_image(images), self.encode_text(tokens), self.scale()


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def image_transform(config: dict[str, Any]) -> dict[str, Any]:
    """How a picture becomes the model's input; it travels in the checkpoint.

    Pictures are decoded to `stored_size` (bicubic, squashed to a square), an eighth larger than
    the input so that a crop keeps its sharpness, then resized to `image_size`.
    """
    stored = 64 if config["data"] == "shapes" else config["image_size"] * 9 // 8
    return {"image_size": config["image_size"], "stored_size": stored, **IMAGENET}


def build_model(config: dict[str, Any], transform: dict[str, Any], tokenizer: Tokenizer) -> CLIP:
    """Builds the model; its random weights come from config["seed"] alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        model = CLIP(config, transform, len(tokenizer.vocabulary))
    return model.to(memory_format=torch.channels_last)


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for what is missing."""
    known = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in known.items() if there()))
    if not known[name]():
        raise UserError(f"--device {name}: this machine or this torch has none; use --device auto")
    return torch.device(name)


# ------------------------------------------------------------------------------ checkpoints

FORMAT, VERSION = "mini-clip", 1
NOT_A_CHECKPOINT = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError),
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, struct.error),
)


def first_line(error: Exception) -> str:
    """The first line of an error, without the advice that torch's go on with."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].split(". ")[0][:120]


def save_checkpoint(path: Path, content: dict[str, Any], copy: Path | None = None) -> None:
    """Writes plain tensors, numbers and strings, atomically; to `copy` first where one is wanted.

    When the process dies in between, `path` is still the older one, and redoing its epoch writes
    the same `copy` again.
    """
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": str(np.__version__),
    }
    with atomic_write(path) as temporary:
        try:
            torch.save(
                {"format": FORMAT, "version": VERSION, "versions": versions, **content}, temporary
            )
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(28, f"{first_line(error)} (is the disk full?)") from error
        if copy:
            with atomic_write(copy) as second:
                shutil.copyfile(temporary, second)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; never runs code from the file. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the checkpoint in it, such as {path}/best.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except NOT_A_CHECKPOINT as error:
        raise UserError(
            f"{path} is not a checkpoint of train.py, or a damaged one ({first_line(error)})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is a checkpoint of another program; give one of train.py")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} has checkpoint version {content.get('version')}, this code reads {VERSION}; "
            "train again, or use the code that wrote it"
        )
    return content


def model_from_checkpoint(content: dict[str, Any], path: Path) -> tuple[CLIP, Tokenizer]:
    """Builds the model and the tokenizer that a checkpoint holds."""
    try:
        config = {**content["config"], "image_weights": "none"}  # its own weights come next
        tokenizer = Tokenizer(content["vocabulary"], config["max_tokens"])
        model = build_model(config, content["transform"], tokenizer)
        model.load_state_dict(content["model"])
    except NOT_A_CHECKPOINT as error:
        raise UserError(f"{path} holds another model: {first_line(error)}") from error
    return model, tokenizer
