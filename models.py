"""The model: an image tower and a text tower, a projection behind each, one space for both.

train.py builds it with `build_model`, evaluate.py reads it back with `model_from_checkpoint`.
A new tower is one entry of IMAGE_TOWERS or TEXT_TOWERS, a new projection one of HEADS.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from dataset import PAD, Tokenizer, image_transform
from support.checkpoint import NOT_A_CHECKPOINT, first_line
from support.command import UserError, later
from support.device import native_bf16
from towers.on_cpu import exchange, in_halves

# ------------------------------------------------------------------------- the image tower


class Normalize(nn.Module):
    """Pixels in [0, 1] (B, 3, H, W) -> ImageNet's mean 0 and deviation 1: every tower's first."""

    def __init__(self):
        super().__init__()
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


def resnet18(options: Namespace) -> nn.Sequential:
    """ResNet18 (He et al. 2016) without its classifier: (B, 3, S, S) -> (B, 512).

    Pretrained statistics are better than those of small batches: they stay as they are.
    """
    norm = nn.BatchNorm2d if options.image_weights == "none" else torchvision.ops.FrozenBatchNorm2d
    return cut_resnet(getattr(torchvision.models, options.image_tower)(norm_layer=norm))


def cut_resnet(net: nn.Module) -> nn.Sequential:
    """A torchvision ResNet as the blocks that the data meets, one after the other."""
    tower = nn.Sequential(
        Normalize(),
        nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool),  # (B, 64, S/4, S/4)
        *[*net.layer1, *net.layer2, *net.layer3, *net.layer4],
        nn.Sequential(net.avgpool, nn.Flatten()),  # the mean over all places
    )
    tower.width = net.fc.in_features
    return tower


# -------------------------------------------------------------------------- the text tower


class TextTransformer(nn.Module):
    """A pre-norm Transformer encoder; a text's feature is the mean over its own tokens."""

    def __init__(self, vocabulary: int, max_tokens: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.width = width
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(max_tokens, width))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        # Heads of 64 numbers or a little more: their count has to divide the width.
        heads = next(n for n in range(width // 64 or 1, 0, -1) if width % n == 0)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)

    @in_halves
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, width)."""
        padding = tokens == PAD
        x = self.words(tokens) + self.positions[: tokens.shape[1]]  # (B, L, width)
        # Under autocast torch 2.0 wants the mask in the type that matrix products come in.
        product = x[:1, :1] @ x[:1, :1].mT
        mask = torch.zeros_like(padding, dtype=product.dtype).masked_fill(padding, -math.inf)
        x = self.encoder(x, src_key_padding_mask=mask)
        return x.masked_fill(padding[..., None], 0.0).sum(1) / (~padding).sum(1, keepdim=True)

    def blocks(self) -> list[nn.Module]:
        *lower, last = self.encoder.layers
        return [self.words, *lower, nn.ModuleList([last, self.encoder.norm])]


class TextLSTM(nn.Module):
    """An LSTM reads a text forwards, another backwards; its feature is the maximum over its tokens.

    Each text is turned about for the second at its own end, so that padding comes last for both.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.width = 2 * width
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.1)
        self.drop = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0
        self.forwards = nn.LSTM(width, width, layers, batch_first=True, dropout=between)
        self.backwards = nn.LSTM(width, width, layers, batch_first=True, dropout=between)

    @in_halves
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, 2 * width)."""
        padding = tokens == PAD
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        from_the_end = (~padding).sum(1, keepdim=True) - 1 - places
        turned = torch.where(padding, places, from_the_end)[..., None]  # (B, L, 1)
        x = self.drop(self.words(tokens))  # (B, L, width)
        # A CPU's bf16 LSTM is slower than its float32 one, or missing, but where it has AMX.
        slow = x.device.type == "cpu" and "amx" not in native_bf16()
        with torch.autocast("cpu", enabled=False) if slow else nullcontext():
            states = self.forwards(x)[0], self.backwards(x.gather(1, turned.expand_as(x)))[0]
        return torch.cat(states, 2).masked_fill(padding[..., None], -math.inf).amax(1)

    def blocks(self) -> list[nn.Module]:
        return [self.words, nn.ModuleList([self.forwards, self.backwards])]


# ------------------------------------------------------------------------- the projections


class LinearHead(nn.Linear):
    """The assignment's projection: one matrix, no bias."""

    def __init__(self, width: int, embed_dim: int, dropout: float):
        super().__init__(width, embed_dim, bias=False)
        self.dropout = dropout

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(features, self.dropout, self.training))


class MLPHead(nn.Module):
    """Standardised features through a linear map, plus what two layers add to it."""

    def __init__(self, width: int, embed_dim: int, dropout: float):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.dropout = dropout
        self.linear = nn.Linear(width, embed_dim)
        self.hidden, self.out = nn.Linear(width, 2 * embed_dim), nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.norm(features)
        dropped, again = (F.dropout(x, self.dropout, self.training) for _ in range(2))
        hidden = F.dropout(F.gelu(self.hidden(again)), self.dropout, self.training)
        return self.linear(dropped) + self.out(hidden)


HEADS = {"linear": LinearHead, "mlp": MLPHead, "identity": later("posters.head", "IdentityHead")}

# ------------------------------------------------------------------------- the two together


class CLIP(nn.Module):
    """Two towers, a projection each, and a temperature (Radford et al. 2021)."""

    MAX_SCALE = 100.0  # as in CLIP: beyond it training becomes unstable
    autocast: torch.dtype | None = None  # of the towers in training; None: float32
    tokenizer: Tokenizer
    transform: dict[str, Any]  # how a picture becomes the input: dataset.image_transform

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        image_projection: nn.Module,
        text_projection: nn.Module,
        logit_scale: nn.Parameter,  # the logarithm of 1 / temperature
    ):
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower
        self.image_projection, self.text_projection = image_projection, text_projection
        self.logit_scale = logit_scale

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, S, S) in [0, 1] -> unit-length embeddings (B, embed_dim), float32."""
        with self.lower_precision():
            features = self.image_tower(images)  # (B, width)
        return F.normalize(self.image_projection(features.float()), dim=-1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> unit-length embeddings (B, embed_dim), float32."""
        with self.lower_precision():
            features = self.text_tower(tokens)  # (B, width)
        return F.normalize(self.text_projection(features.float()), dim=-1)

    def above(self, image_tower: nn.Module, text_tower: nn.Module) -> CLIP:
        """The same weights but for the towers: what is above blocks that are computed once."""
        heads = self.image_projection, self.text_projection
        model = CLIP(image_tower, text_tower, heads[0], heads[1], self.logit_scale)
        model.tokenizer, model.transform = self.tokenizer, self.transform
        model.autocast = self.autocast
        return model

    def scale(self) -> torch.Tensor:
        """The factor on the cosines, 1 / temperature."""
        return self.logit_scale.exp()

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.encode_image(images), self.encode_text(tokens), self.scale()

    def lower_precision(self) -> AbstractContextManager:
        """Autocast for a tower in training; evaluation, projections and loss stay in float32."""
        if self.autocast is None or not self.training:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def train(self, mode: bool = True) -> CLIP:
        """Like nn.Module.train, but a module with all its weights frozen stays in eval mode."""
        super().train(mode)
        for module in list(self.modules())[1:]:  # without the model itself, whose eval() leads here
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device


def hold_back(tower: nn.Module, count: int) -> None:
    """Lets the last `count` blocks of a tower learn, of those that have weights.

    A layer may hold back more of itself: its own `hold_back` is called.
    """
    blocks = list(tower) if isinstance(tower, nn.Sequential) else tower.blocks()
    blocks = [block for block in blocks if any(True for _ in block.parameters())]
    tower.requires_grad_(count >= len(blocks))
    for block in blocks[max(0, len(blocks) - count) :]:
        block.requires_grad_(True)
    for layer in tower.modules():
        if hasattr(layer, "hold_back"):
            layer.hold_back()


# ------------------------------------------------------------------------- tables, building


class ImageTower(NamedTuple):
    """How an image tower is built and filled with weights of others."""

    build: Callable[[Namespace], nn.Sequential]
    load: Callable[[nn.Sequential, str, str], None] = later("towers.image", "load_torchvision")
    size: int = 224  # of the pictures that it was pretrained on
    weights: str = "none"  # --image-weights where the flag is left out


class TextTower(NamedTuple):
    """How a text tower is built: build(options, words in the vocabulary)."""

    build: Callable[[Namespace, int], nn.Module]
    pretrained: bool = False  # it is a BERT, with a vocabulary of its own (towers/text.py)
    layers: int = 2  # --text-layers where the flag is left out


LITE = later("towers.image", "efficientnet"), later("towers.image", "load_efficientnet")
IMAGE_TOWERS = {
    "resnet18": ImageTower(resnet18),
    "resnet50": ImageTower(resnet18),  # the same, deeper and four times as wide
    "vit_b_16": ImageTower(later("towers.image", "vit_b_16"), weights="imagenet"),
    "efficientnet_lite0": ImageTower(*LITE, 224, "imagenet"),
    "efficientnet_lite1": ImageTower(*LITE, 240, "imagenet"),
    "efficientnet_lite2": ImageTower(*LITE, 260, "imagenet"),
}
TEXT_TOWERS = {
    "transformer": TextTower(
        lambda options, words: TextTransformer(
            words, options.max_tokens, options.text_width, options.text_layers, options.dropout
        )
    ),
    "lstm": TextTower(
        lambda options, words: TextLSTM(
            words, options.text_width, options.text_layers, options.dropout
        ),
        layers=1,
    ),
    "bag": TextTower(
        lambda options, words: later("towers.text", "TextBag")(
            words, options.text_width, options.dropout
        )
    ),
    "minilm": TextTower(later("towers.text", "minilm"), pretrained=True),
    "bert": TextTower(later("towers.text", "bert"), pretrained=True),
}


def make_tokenizer(options: Namespace, vocabulary: list[str]) -> Tokenizer:
    """The tokenizer that the text tower reads."""
    if TEXT_TOWERS[options.text_tower].pretrained:
        return later("towers.text", "WordPieces")(
            vocabulary, options.max_tokens, options.text_lower_case
        )
    return Tokenizer(vocabulary, options.max_tokens)


def build_model(options: Namespace, tokenizer: Tokenizer, pretrained: bool = True) -> CLIP:
    """Builds the model; its random weights come from options.seed alone.

    With `pretrained` the weights that options.image_weights and options.text_weights name are
    loaded. Raises UserError when they cannot be.
    """
    entry, heads = IMAGE_TOWERS[options.image_tower], (options.head, options.text_head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        images = entry.build(options)
        texts = TEXT_TOWERS[options.text_tower].build(options, len(tokenizer.vocabulary))
        to_images = HEADS[heads[0]](images.width, options.embed_dim, options.image_dropout)
        to_texts = HEADS[heads[1]](texts.width, options.embed_dim, options.text_dropout)
        if options.poster_text:
            to_images = later("posters.head", "PosterHead")(to_images, to_texts, texts.width)
    if pretrained and options.image_weights != "none":
        entry.load(images, options.image_tower, options.image_weights)
    if pretrained and options.text_weights != "none":
        folder = later("towers.text", "folder_of")(options.text_tower, options.text_weights)
        later("towers.text", "load_bert")(texts, folder)
    scale = torch.tensor(math.log(1 / options.temperature))
    scale = nn.Parameter(scale, requires_grad=not options.fixed_temperature)
    model = CLIP(images, texts, to_images, to_texts, scale)
    model = exchange(model)  # with bf16, 1.5 times as fast at 96 px
    model.tokenizer, model.transform = tokenizer, image_transform(options)
    return model.to(memory_format=torch.channels_last)


def model_from_checkpoint(content: dict[str, Any], path: Path) -> CLIP:
    """Builds the model, with its tokenizer, that a checkpoint holds. Raises UserError."""
    try:
        options = Namespace(**{"test_crops": False, **content["config"]})  # a younger flag
        tokenizer = make_tokenizer(options, content["vocabulary"])
        model = build_model(options, tokenizer, pretrained=False)
        model.load_state_dict(content["model"])
        model.transform = {"crops": False, **content["transform"]}
    except NOT_A_CHECKPOINT as error:
        raise UserError(f"{path} holds another model: {first_line(error)}") from error
    return model
