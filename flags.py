"""The flags of train.py, each with its meaning and its range, and the defaults that fit the data.

train.py calls `resolve` on what was typed; the result is the `config` that a checkpoint keeps.
"""

from pathlib import Path
from typing import Any

from cli import Parser, number
from dataset import add_data_flags
from images import AUGMENTATIONS
from models import IMAGE_TOWERS, TEXT_TOWERS

# Flags left out take these, measured on 2 cores (README, "Choices"): photographs need the larger
# input and gain from crops; in `shapes` a mirrored or cropped scene contradicts its captions, and
# a large batch holds the near misses that teach the difference.
PER_DATA = {
    "shapes": {
        "image_size": 64,
        "image_augment": "none",
        "batch_size": 256,
        "lr": 1.5e-3,
        "epochs": 4,
    },
    "photographs": {
        "image_size": 96,
        "image_augment": "light",
        "batch_size": 128,
        "lr": 1e-3,
        "epochs": 15,
    },
}
MAY_CHANGE = ("workers", "device", "epochs", "resume", "cache", "out")  # when a run is resumed


def per_data(flag: str) -> str:
    return "default: " + ", ".join(f"{table[flag]} for {data}" for data, table in PER_DATA.items())


def build_parser() -> Parser:
    parser = Parser(prog="train.py", description="Trains a miniature CLIP.")
    add_data_flags(parser, data="Flickr8k", splits="auto")

    flag = parser.add_argument_group("input").add_argument
    size = number(int, 32, 1024)
    flag("--image-size", type=size, help=f"pixels, square ({per_data('image_size')})")
    told = f"crops, flips, colour ({per_data('image_augment')})"
    flag("--image-augment", choices=AUGMENTATIONS, help=told)
    told = "of an image in one batch; several are positives together"
    flag("--captions-per-image", type=number(int, 1, 100), default=1, help=told)
    told = "a word in the vocabulary stands this often in the training captions"
    flag("--min-count", type=number(int, 1, 1000), default=2, help=told)
    told = "longer captions are cut, and counted"
    flag("--max-tokens", type=number(int, 3, 1000), default=40, help=told)
    told = "train on N seeded training images; dev and test stay whole"
    flag("--limit", type=number(int, 2, 10**9), metavar="N", help=told)

    flag = parser.add_argument_group("model").add_argument
    flag("--image-tower", choices=IMAGE_TOWERS, default="resnet18")
    told = "start from torchvision's weights, or from a file like theirs"
    flag("--image-weights", default="none", metavar="none|imagenet|PATH", help=told)
    told = "the ResNet's first layers; small: 3 x 3 and no pooling, for small pictures"
    flag("--stem", choices=("imagenet", "small"), default="imagenet", help=told)
    flag("--text-tower", choices=TEXT_TOWERS, default="transformer")
    flag("--text-width", type=number(int, 8, 4096), default=256, help="of its word embeddings")
    flag("--text-layers", type=number(int, 1, 48), default=2)
    flag("--dropout", type=number(float, 0, 0.95), default=0.1, help="in the text tower")
    flag("--embed-dim", type=number(int, 2, 8192), default=256, help="of the common space")
    told = "at the start; logit_scale is the logarithm of its inverse"
    flag("--temperature", type=number(float, 0.01, 10), default=0.07, help=told)
    flag("--fixed-temperature", action="store_true", help="do not learn the temperature")

    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=number(int, 1, 100_000), help=f"({per_data('epochs')})")
    told = f"images; two at least, for a pair alone has no negatives ({per_data('batch_size')})"
    flag("--batch-size", type=number(int, 2, 65_536), help=told)
    told = f"AdamW's learning rate at its peak ({per_data('lr')})"
    flag("--lr", type=number(float, 0, 10, above=True), help=told)
    told = "not on norms, biases and logit_scale"
    flag("--weight-decay", type=number(float, 0, 10), default=0.1, help=told)
    told = "epochs of linear warm-up; a cosine down to 0 follows"
    flag("--warmup", type=number(float, 0, 1000), default=1.0, help=told)
    told = "largest norm of the gradient; 0: no clipping"
    flag("--grad-clip", type=number(float, 0, 1e6), default=1.0, help=told)
    told = "stop after N epochs without a better mean recall on dev"
    flag("--patience", type=number(int, 1, 100_000), metavar="N", help=told)
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that is random")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    told = "of the towers in training; auto asks the device"
    flag("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=told)

    flag = parser.add_argument_group("output").add_argument
    flag("--out", type=Path, help="the run's folder (default: checkpoints/DATA-DATE-TIME)")
    told = "go on from last.pt in the folder PATH (default: in --out)"
    flag("--resume", nargs="?", const="", metavar="PATH", help=told)
    return parser


def resolve(typed: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The flags of a new run: typed ones, else those of the kind of data, else the defaults."""
    config = {**defaults, **typed}
    if config["data"] != "shapes":
        config["data"] = str(Path(config["data"]).resolve())
    kind = "shapes" if config["data"] == "shapes" else "photographs"
    for flag, value in PER_DATA[kind].items():
        if config[flag] is None:
            config[flag] = value
    if config["image_weights"] not in ("none", "imagenet"):
        config["image_weights"] = str(Path(config["image_weights"]).resolve())
    return config
