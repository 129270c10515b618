"""The model: an image tower (towers.py) and a text tower (text_towers.py) in one space.

train.py builds it with `build_model` and keeps it with `save_checkpoint`; evaluate.py and
visualize.py read it back with `load_checkpoint`. A new projection head is one entry of HEADS.
"""

import ctypes
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from captions import AnyTokenizer, Tokenizer, WordPieces
from cli import UserError, atomic_write
from images import AUGMENTATIONS
from ocr import READINGS
from text_towers import TEXT_TOWERS, load_text_weights
from towers import (
    IMAGE_TOWERS,
    NOT_A_CHECKPOINT,
    SameConv2d,
    first_line,
    load_image_weights,
)

# --------------------------------------------------------------------------- projection heads


class LinearHead(nn.Linear):
    """The assignment's projection: one matrix, no bias."""

    def __init__(self, width: int, embed_dim: int, dropout: float):
        super().__init__(width, embed_dim, bias=False)
        self.dropout = dropout

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(features, self.dropout, self.training))


class ResidualMLP(nn.Module):
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


class IdentityHead(nn.Linear):
    """Centred features through a matrix that starts as the identity, on the first `embed_dim`.

    For a text tower whose features are good embeddings already, such as MiniLM's first 384.
    """

    def __init__(self, width: int, embed_dim: int, dropout: float):
        super().__init__(width, embed_dim, bias=False)
        nn.init.eye_(self.weight)
        self.dropout = dropout
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:  # the mean of all that was seen in training
            self.seen += len(features)
            self.mean += (features.detach() - self.mean).sum(0) / self.seen
        return super().forward(F.dropout(features - self.mean, self.dropout, self.training))


HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "mlp": ResidualMLP,
    "identity": IdentityHead,
}


class PosterText(nn.Module):
    """What is written on a picture, added to what it shows.

    Each reading of its words (ocr.READINGS) goes through the text tower and its projection as any
    text does; only how much each counts is learned, from its place among the readings and from its
    features: few numbers, that cannot learn a poster by heart.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weigh = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.weigh.weight)
        self.place = nn.Parameter(torch.zeros(len(READINGS)))
        self.share = nn.Parameter(torch.tensor(1.0))  # of the words; a logit

    def forward(
        self, picture: torch.Tensor, readings: torch.Tensor, project: nn.Module
    ) -> torch.Tensor:
        """picture (B, D), unit length; readings (B, R, width), 0 where none -> (B, D)."""
        there = readings.any(2)
        made = picture.new_zeros(*there.shape, picture.shape[1])
        was_training = project.training
        project.eval()  # neither dropout nor statistics of texts that are no captions
        made[there] = F.normalize(project(readings[there]), dim=-1)
        project.train(was_training)
        scores = self.weigh(readings)[..., 0] + self.place
        weights = scores.masked_fill(~there, -1e9).softmax(1)[..., None]
        words = F.normalize((weights * made).sum(1), dim=-1)
        return picture.lerp(words, self.share.sigmoid())


# ------------------------------------------------------------------------------ the two of them


class CLIP(nn.Module):
    """Two towers, a projection each, and a learned temperature."""

    MAX_SCALE = 100.0

    def __init__(self, config: dict[str, Any], transform: dict[str, Any], tokenizer: AnyTokenizer):
        super().__init__()
        images = IMAGE_TOWERS[config["image_tower"]].build(config["image_tower"], config)
        texts = TEXT_TOWERS[config["text_tower"]].build(config, len(tokenizer.vocabulary))
        embed_dim = config["embed_dim"]
        self.image_tower, self.text_tower = images.module, texts.module
        self.image_blocks, self.text_blocks = images.blocks, texts.blocks
        self.text_width, self.embed_dim = texts.width, embed_dim
        heads = HEADS[config["head"]], HEADS[config["text_head"]]
        self.image_projection = heads[0](images.width, embed_dim, config["image_dropout"])
        self.text_projection = heads[1](texts.width, embed_dim, config["text_dropout"])
        self.poster_text = PosterText(texts.width) if config["poster_text"] else None
        # The logarithm of 1 / temperature, as in CLIP; `scale()` is the factor itself.
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / config["temperature"])), not config["fixed_temperature"]
        )
        # Of the sigmoid loss alone, which starts with nearly every pair called wrong (SigLIP).
        self.logit_bias = nn.Parameter(torch.tensor(-10.0), "siglip" in config["loss"])
        self.autocast: torch.dtype | None = None  # of the towers in training; None: float32
        self.always_lower = False  # features.py sets it: frozen blocks as training would run them
        self.pretrained = config["image_weights"] != "none"
        self.transform, self.tokenizer = transform, tokenizer
        for name in ("mean", "std"):
            value = torch.tensor(transform[name]).view(1, 3, 1, 1)
            self.register_buffer(f"pixel_{name}", value, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def members(self) -> list["CLIP"]:
        """Itself alone; see SideBySide."""
        return [self]

    def train_towers(self, image: str, text: str) -> None:
        """Lets the last `image` and `text` blocks learn (0: none, "all": the whole tower)."""
        towers = (
            (image, self.image_tower, self.image_blocks),
            (text, self.text_tower, self.text_blocks),
        )
        for wanted, tower, blocks in towers:
            tower.requires_grad_(wanted == "all")
            if wanted == "all":
                continue
            learned = [block for block in blocks if any(True for _ in block.parameters())]
            for block in learned[max(0, len(learned) - int(wanted)) :]:
                block.requires_grad_(True)
        for module in self.image_tower.modules():
            if isinstance(module, SameConv2d) and module.bias is not None:
                # A bias that a batch norm was folded into stays, and so does a convolution of each
                # channel alone: little to learn, and on a CPU their gradients are 2/5 of the step.
                module.bias.requires_grad_(False)
                module.weight.requires_grad_(module.weight.requires_grad and module.groups == 1)

    def first_that_learns(self) -> int:
        """The place of the first image block with a weight that learns, or how many there are."""
        for place, block in enumerate(self.image_blocks):
            if any(weight.requires_grad for weight in block.parameters()):
                return place
        return len(self.image_blocks)

    def train(self, mode: bool = True) -> "CLIP":
        """Like nn.Module.train, but a module with all its weights frozen stays in eval mode.

        So do the batch norms of a pretrained image tower: its statistics are better than those of
        small batches.
        """
        super().train(mode)
        for module in list(self.modules())[1:]:  # without the model itself, whose eval() leads here
            weights = list(module.parameters())
            settled = self.pretrained and isinstance(module, nn.BatchNorm2d)
            if settled or (weights and not any(weight.requires_grad for weight in weights)):
                module.eval()
        return self

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.pixel_mean) / self.pixel_std

    def encode_image(
        self, images: torch.Tensor, start: int = 0, readings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """images (B, 3, H, W) in [0, 1] -> unit-length embeddings (B, embed_dim), float32.

        With `start`, `images` is the input of that block, as features.py keeps it; `readings`
        are of the words on the images, for a model that reads.
        """
        with self.lower_precision():
            features = images if start else self.normalised(images)
            for block in self.image_blocks[start:]:
                features = block(features)
        made = F.normalize(self.image_projection(features.float()), dim=-1)
        if self.poster_text is None or readings is None:
            return made
        made = self.poster_text(made, readings.float(), self.text_projection)
        return F.normalize(made, dim=-1)

    def encode_views(
        self, views: Iterable[torch.Tensor], start: int = 0, readings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean of the embeddings of some views of the same images, unit length again."""
        made = [self.encode_image(view, start, readings) for view in views]
        return made[0] if len(made) == 1 else F.normalize(sum(made), dim=-1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> unit-length embeddings (B, embed_dim), float32.

        `tokens` that are not whole numbers are features of the tower, as features.py keeps them.
        """
        with self.lower_precision():
            features = tokens if tokens.is_floating_point() else self.text_tower(tokens)
        return F.normalize(self.text_projection(features.float()), dim=-1)

    def lower_precision(self) -> AbstractContextManager:
        """Autocast for a tower in training; evaluation, projections and loss stay in float32."""
        if self.autocast is None or not (self.training or self.always_lower):
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def scale(self) -> torch.Tensor:
        """The factor on the cosines, at most MAX_SCALE; there it still has its gradient."""
        # train.py holds logit_scale at the limit itself, where clamp would give no gradient.
        return self.logit_scale.clamp(max=math.log(self.MAX_SCALE) + 1e-6).exp()

    def forward(
        self,
        images: torch.Tensor,
        tokens: torch.Tensor,
        start: int = 0,
        readings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.encode_image(images, start, readings), self.encode_text(tokens), self.scale()


class SideBySide(nn.Module):
    """CLIPs of several image towers as one model: a cosine of it is the mean of theirs.

    They share a frozen text tower and are trained one after the other; the first `trained` count.
    """

    poster_text = None

    def __init__(self, members: list[CLIP]):
        super().__init__()
        for member in members[1:]:
            member.text_tower, member.text_blocks = members[0].text_tower, members[0].text_blocks
        self.members = nn.ModuleList(members)
        self.transform, self.tokenizer = members[0].transform, members[0].tokenizer
        self.register_buffer("trained", torch.tensor(1))

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def embed_dim(self) -> int:
        return self.trained.item() * self.members[0].embed_dim

    def encode_views(
        self, views: Iterable[torch.Tensor], start: int = 0, readings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Views of images, (B, 3, H, W) each, to unit length (B, trained * embed_dim)."""
        views, members = list(views), self.members[: self.trained]
        return side_by_side([member.encode_views(views, start, readings) for member in members])

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> unit-length embeddings (B, trained * embed_dim)."""
        features, members = self.members[0].text_tower(tokens), self.members[: self.trained]
        return side_by_side([member.encode_text(features) for member in members])


Model = CLIP | SideBySide


def side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    """Unit-length embeddings of several widths, put together to unit length again.

    A cosine of the whole is the mean of the parts', each counting by its width.
    """
    if len(parts) == 1:
        return parts[0]
    widths = [part.shape[1] for part in parts]
    scaled = [part * math.sqrt(width) for part, width in zip(parts, widths, strict=True)]
    return torch.cat(scaled, 1) / math.sqrt(sum(widths))


def image_towers(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config of each of the towers that +'s part, with its own part of --train-image."""
    names, trained = config["image_tower"].split("+"), config["train_image"].split("+")
    if len(trained) == 1:
        trained *= len(names)
    pairs = zip(names, trained, strict=True)
    return [{**config, "image_tower": name, "train_image": count} for name, count in pairs]


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def image_transform(config: dict[str, Any]) -> dict[str, Any]:
    """How a picture becomes the model's input; it travels in the checkpoint.

    Pictures are decoded to `stored_size` (bicubic, squashed to a square), which is an eighth larger
    than the input where they are cropped, so that a crop keeps its sharpness, then resized to
    `image_size`. With `mirror` an embedding is the mean of the picture's and its mirror image's.
    """
    cropped = AUGMENTATIONS[config["image_augment"]].area < 1
    stored = config["image_size"] * 9 // 8 if cropped else config["image_size"]
    return {
        "image_size": config["image_size"],
        "stored_size": 64 if config["data"] == "shapes" else stored,
        "mirror": config["test_mirror"],
        **IMAGENET,
    }


def make_tokenizer(config: dict[str, Any], vocabulary: list[str]) -> AnyTokenizer:
    """The tokenizer that the text tower reads."""
    if "text_architecture" in config:
        return WordPieces(vocabulary, config["max_tokens"], config["text_lower_case"])
    return Tokenizer(vocabulary, config["max_tokens"])


def build_model(
    config: dict[str, Any],
    transform: dict[str, Any],
    tokenizer: AnyTokenizer,
    text_folder: Path | None = None,
    pretrained: bool = True,
) -> Model:
    """Builds the model; its random weights come from config["seed"] alone.

    With `pretrained` the weights that config["image_weights"] and `text_folder` name are loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        members = [CLIP(each, transform, tokenizer) for each in image_towers(config)]
    if pretrained and config["image_weights"] != "none":
        for member, each in zip(members, image_towers(config), strict=True):
            load_image_weights(member.image_tower, each["image_tower"], config["image_weights"])
    if pretrained and text_folder:
        load_text_weights(members[0].text_tower, text_folder)
    model = members[0] if len(members) == 1 else SideBySide(members)
    return model.to(memory_format=torch.channels_last)


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` asks the device; bf16 emulated by a CPU is several times slower than fp32."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; use bf16, fp32 or auto")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, test, lambda: False)() for test in tests)
    return "bf16" if device.type == "cpu" and native else "fp32"


def keep_memory() -> None:
    """Tells glibc to keep freed memory: large batches on a CPU are 1.6 to 2 times as fast for it.

    Otherwise every large tensor is mapped afresh, and its pages are zeroed again.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # musl has none
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
                library.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_order() -> None:
    """Lets CUDA sum in one order alone, so that a run done again, or resumed, has the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # has no such order in its gradient


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for what is missing."""
    known = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name == "auto":
        name = next((device for device, there in known.items() if there()), "cpu")
    if name in known and not known[name]():
        raise UserError(f"--device {name}: this machine or this torch has none; use --device auto")
    if name == "cuda":
        keep_order()
    return torch.device(name)


# ------------------------------------------------------------------------------ checkpoints

FORMAT, VERSION = "mini-clip", 3


def save_checkpoint(path: Path, content: dict[str, Any], copy: Path | None = None) -> None:
    """Writes plain tensors, numbers and strings, atomically; to `copy` first where one is wanted.

    When the process dies in between, `path` is still the older one, and redoing its epoch writes
    the same `copy` again.
    """
    used = {module.__name__: str(module.__version__) for module in (torch, torchvision, np)}
    versions = {"python": platform.python_version(), **used}
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


def model_from_checkpoint(content: dict[str, Any], path: Path) -> Model:
    """Builds the model, with its tokenizer, that a checkpoint holds."""
    try:
        config = content["config"]
        tokenizer = make_tokenizer(config, content["vocabulary"])
        model = build_model(config, content["transform"], tokenizer, pretrained=False)
        model.load_state_dict(content["model"])
    except NOT_A_CHECKPOINT as error:
        raise UserError(f"{path} holds another model: {first_line(error)}") from error
    return model
