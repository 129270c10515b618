"""The flags of train.py, each with its meaning and its range, and the defaults that fit the data.

train.py calls `resolve` on what was typed; the result is the `config` that a checkpoint keeps.
"""

import argparse
from pathlib import Path
from typing import Any

from captions import parse_rates
from cli import Parser, UserError, number
from dataset import add_data_flags
from images import AUGMENTATIONS
from loss import parse_loss
from models import HEADS
from optimizer import SCHEDULES
from text_towers import TEXT_TOWERS
from towers import IMAGE_TOWERS, resnet, vit

# Flags left out take these, measured on 2 cores (README, "Choices"): photographs need the larger
# input and gain from crops; in `shapes` a mirrored or cropped scene contradicts its captions, and
# a large batch holds the near misses that teach the difference.
PER_DATA = {  # flag -> its default for `shapes`, for photographs
    "image_size": (64, 96),
    "image_augment": ("none", "light"),
    "batch_size": (256, 128),
    "lr": (1.5e-3, 1e-3),
    "epochs": (4, 15),
}
# What --recipe puts in the place of the defaults; a flag given by hand wins. What was measured of
# it, on Flickr8k's dev split, stands in report/ablations.md.
RECIPES: dict[str, dict[str, Any]] = {
    # The assignment's own model: ResNet18 and a Transformer from random weights, linear heads.
    "assignment": {},
    # No pretrained weight at all: the texts lay out the space first, then photographs meet it.
    "scratch": {
        "image_weights": "none",
        "text_weights": "none",
        "text_tower": "bag",
        "text_width": 512,
        "dropout": 0.3,
        "pretrain_text": 12,
        "train_text": "0",
        "captions_per_image": 5,
        "image_augment": "strong",
        "start_size": 64,
        "image_size": 96,
        "epochs": 30,
        "fixed_temperature": True,
        "ema": 0.98,
    },
    # The strongest with weights that pip delivers.
    "best": {
        "image_tower": "efficientnet_lite2+efficientnet_lite1",
        "image_size": 288,  # above their own: the last stages' maps are no larger for it
        "text_tower": "minilm",
        "image_augment": "none",  # a mirrored view of the kept features gave nothing
        "map_crop": 0.12,
        "test_mirror": True,
        "head": "mlp",
        "embed_dim": 512,
        "image_dropout": 0.5,
        "text_dropout": 0.1,
        "batch_size": 128,
        "captions_per_image": 5,
        "head_epochs": 6,
        "epochs": 9,
        "lr": 2e-3,
        "train_image": "8+0",  # the second tower's heads alone
        "tower_lr": 5e-4,
        "warmup": 0.3,
        "grad_clip": 5.0,
        "fixed_temperature": True,
        "ema": 0.97,
        "label_smoothing": 0.1,
    },
    # The second assignment: film posters and introductions, frozen towers, linear to 128.
    "posters": {
        "image_tower": "efficientnet_lite2",
        "text_tower": "minilm",
        "image_augment": "mirror",
        "test_mirror": True,
        "max_tokens": 128,
        "embed_dim": 128,
        "temperature": 0.07,
        "image_dropout": 0.5,
        "text_dropout": 0.1,
        "batch_size": 128,
        "epochs": 30,
        "patience": 10,
    },
}
# Three image towers side by side, more of their blocks, for longer: an hour.
RECIPES["best-hour"] = {
    **RECIPES["best"],
    "image_tower": "efficientnet_lite2+efficientnet_lite1+efficientnet_lite0",
    "train_image": "12",
    "epochs": 11,
}
# `posters` with the words on them, in the space of MiniLM's own sentence embeddings.
RECIPES["posters-best"] = {
    **RECIPES["posters"],
    "poster_text": True,
    "text_head": "identity",
    "embed_dim": 384,
    "lr": 3e-4,
    "fixed_temperature": True,
    "epochs": 12,
}
MAY_CHANGE = ("workers", "device", "epochs", "resume", "cache", "out")  # when a run is resumed


def towers_in(text: str) -> list[str]:
    """The image towers that +'s part. Raises UserError."""
    names = text.split("+")
    if wrong := [name for name in names if name not in IMAGE_TOWERS]:
        raise UserError(f"--image-tower: {wrong[0]!r} is none of {', '.join(IMAGE_TOWERS)}")
    return names


def count_or_all(text: str) -> str:
    """How many of a tower's last blocks train: `all`, or a whole number as text."""
    return text if text == "all" else str(number(int, 0, 1000)(text))


def counts(text: str) -> str:
    """The same for each of several towers that +'s part."""
    return "+".join(map(count_or_all, text.split("+")))


def per_data(flag: str) -> str:
    return "default: {} for shapes, {} for photographs".format(*PER_DATA[flag])


def build_parser() -> Parser:
    parser = Parser(prog="train.py", description="Trains a miniature CLIP.")
    told = "a set of defaults: best is the strongest in a quarter of an hour with weights by pip, "
    told += "best-hour in an hour; scratch uses none"
    parser.add_argument("--recipe", choices=RECIPES, default="assignment", help=told)
    add_data_flags(parser, data="Flickr8k", splits="auto")

    flag = parser.add_argument_group("input").add_argument
    size = number(int, 32, 1024)
    told = f"pixels, square ({per_data('image_size')}; with pretrained weights what the first "
    told += "tower was trained at)"
    flag("--image-size", type=size, help=told)
    told = "pixels in the first epochs, small and fast (default: --image-size)"
    flag("--start-size", type=size, metavar="PIXELS", help=told)
    told = "epochs at --start-size; 0: two thirds of those in which the image tower learns"
    flag("--start-epochs", type=number(int, 0, 100_000), default=0, metavar="N", help=told)
    told = f"flips, crops, turns, colour ({per_data('image_augment')})"
    flag("--image-augment", choices=AUGMENTATIONS, help=told)
    told = "views of a training image kept for frozen blocks: whole, mirrored, then crops of the "
    told += "--image-augment; 0: none, every epoch augments afresh (default: as --image-augment)"
    flag("--views", type=number(int, 0, 100), metavar="N", help=told)
    told = "share of the side of kept feature maps that is cut away, at random, every second batch"
    flag("--map-crop", type=number(float, 0, 0.9), default=0.0, metavar="SHARE", help=told)
    told = "an image's embedding is the mean of the image's and its mirror image's"
    flag("--test-mirror", action=argparse.BooleanOptionalAction, default=False, help=told)
    told = "rates of words changed in training captions, e.g. synonym=0.1,delete=0.1,swap=0.05"
    flag("--text-augment", default="none", metavar="RATES", help=told)
    told = "of an image in one batch; several are positives together"
    flag("--captions-per-image", type=number(int, 1, 100), default=1, help=told)
    told = "a film's title in its introduction: left out, or kept"
    flag("--titles", choices=("hide", "keep"), default="hide", help=told)
    told = "a word in the vocabulary stands this often in the training captions"
    flag("--min-count", type=number(int, 1, 1000), default=2, help=told)
    told = "longer captions are cut, and counted"
    flag("--max-tokens", type=number(int, 3, 1000), default=40, help=told)
    told = "train on N seeded training images; dev and test stay whole"
    flag("--limit", type=number(int, 2, 10**9), metavar="N", help=told)

    flag = parser.add_argument_group("model").add_argument
    told = f"{', '.join(IMAGE_TOWERS)}; with + several side by side, trained in turn: each stays "
    told += "as its last epoch left it"
    flag("--image-tower", default="resnet18", metavar="NAME", help=told)
    told = "weights to start from: ImageNet's, or a file like theirs (default: imagenet for "
    told += "efficientnet_lite* and vit_b_16, none for resnet*)"
    flag("--image-weights", metavar="none|imagenet|PATH", help=told)
    told = "blocks that learn, counted from the last; of several towers for all, or one each: 8+0; "
    told += "0: frozen (default: 0 if pretrained, else all)"
    flag("--train-image", type=counts, metavar="N|all", help=told)
    told = "the ResNet's first layers; small: 3 x 3 and no pooling, for small pictures"
    flag("--stem", choices=("imagenet", "small"), default="imagenet", help=told)
    flag("--text-tower", choices=TEXT_TOWERS, default="transformer")
    told = "weights to start from; a FOLDER has config.json, vocab.txt and model.safetensors "
    told += "(default: pretrained for minilm and bert)"
    flag("--text-weights", metavar="none|pretrained|FOLDER", help=told)
    told = "the same for the text tower (default: 0 if pretrained, else all)"
    flag("--train-text", type=count_or_all, metavar="N|all", help=told)
    flag("--text-width", type=number(int, 8, 4096), default=256, help="of its word embeddings")
    flag("--text-layers", type=number(int, 1, 48), default=2)
    told = "in a transformer or lstm; in a bag of whole words"
    flag("--dropout", type=number(float, 0, 0.95), default=0.1, help=told)
    told = "the projections: one matrix, or a matrix plus two layers on standardised features"
    flag("--head", choices=HEADS, default="linear", help=told)
    told = "the text tower's own; identity starts at the tower's features (default: as --head)"
    flag("--text-head", choices=HEADS, help=told)
    told = "read the words on the pictures, and add what they say to the image embedding"
    flag("--poster-text", action=argparse.BooleanOptionalAction, default=False, help=told)
    told = "of the image features before the projection"
    flag("--image-dropout", type=number(float, 0, 0.95), default=0.0, help=told)
    told = "of the text features before the projection"
    flag("--text-dropout", type=number(float, 0, 0.95), default=0.0, help=told)
    flag("--embed-dim", type=number(int, 2, 8192), default=256, help="of the common space")
    told = "at the start; logit_scale is the logarithm of its inverse"
    flag("--temperature", type=number(float, 0.01, 10), default=0.07, help=told)
    told = "do not learn the temperature"
    flag("--fixed-temperature", action=argparse.BooleanOptionalAction, default=False, help=told)

    flag = parser.add_argument_group("training").add_argument
    told = "infonce, siglip, triplet, or a weighted sum such as infonce+0.2*triplet"
    flag("--loss", default="infonce", help=told)
    told = "share of InfoNCE's target that is spread over all candidates"
    flag("--label-smoothing", type=number(float, 0, 0.9), default=0.0, help=told)
    told = "films of like genres (Jaccard index) count in part as positives of InfoNCE"
    flag("--soft-positives", choices=("none", "genres"), default="none", help=told)
    told = "of InfoNCE's target, that goes to soft positives"
    flag("--soft-share", type=number(float, 0, 1), default=0.2, help=told)
    told = f"for each image tower ({per_data('epochs')})"
    flag("--epochs", type=number(int, 1, 100_000), help=told)
    told = "before the first, N epochs of captions alone: two of one image are an InfoNCE pair"
    flag("--pretrain-text", type=number(int, 0, 100_000), default=0, metavar="N", help=told)
    told = "in its first N epochs a pretrained tower is frozen, what stands above it learns"
    flag("--head-epochs", type=number(int, 0, 100_000), default=0, metavar="N", help=told)
    told = f"images; two at least, for a pair alone has no negatives ({per_data('batch_size')})"
    flag("--batch-size", type=number(int, 2, 65_536), help=told)
    told = f"AdamW's learning rate at its peak ({per_data('lr')})"
    flag("--lr", type=number(float, 0, 10, above=True), help=told)
    told = "the same for pretrained towers, and for all after --head-epochs"
    flag("--tower-lr", type=number(float, 0, 10, above=True), default=1e-4, help=told)
    told = "not on norms, biases and logit_scale"
    flag("--weight-decay", type=number(float, 0, 10), default=0.1, help=told)
    told = "learning rate after warm-up; plateau halves it when dev stands still for 2 epochs"
    flag("--schedule", choices=SCHEDULES, default="cosine", help=told)
    told = "epochs of linear warm-up, after --head-epochs once more"
    flag("--warmup", type=number(float, 0, 1000), default=1.0, help=told)
    told = "measure and keep a moving average of the weights, which keeps this share at each step"
    flag("--ema", type=number(float, 0, 0.99999), default=0.0, metavar="DECAY", help=told)
    told = "largest norm of the gradient; 0: no clipping"
    flag("--grad-clip", type=number(float, 0, 1e6), default=1.0, help=told)
    told = "stop the (last) image tower after N epochs without a better mean recall on dev"
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
    """The flags of a new run: typed ones, else the recipe's, else what fits data and towers."""
    recipe = RECIPES[typed.get("recipe", defaults.get("recipe", "assignment"))]
    shapes = {**defaults, **typed}["data"] == "shapes"
    if shapes:
        changing = ("image_augment", "test_mirror", "map_crop")  # what its captions tell
        if recipe is RECIPES["scratch"]:  # made for photographs; their own defaults start so too
            recipe = RECIPES["assignment"]
        recipe = {flag: value for flag, value in recipe.items() if flag not in changing}
    config = {**defaults, **recipe, **typed}
    if not shapes:
        config["data"] = str(Path(config["data"]).resolve())
    images = [IMAGE_TOWERS[name] for name in towers_in(config["image_tower"])]
    parse_loss(config["loss"])  # raises UserError, and so does the next
    parse_rates(config["text_augment"])
    image, text = images[0], TEXT_TOWERS[config["text_tower"]]
    if config["image_weights"] is None:
        if any(each.weights != image.weights for each in images):
            raise UserError("--image-weights: some of these towers bring theirs; imagenet or none?")
        config["image_weights"] = image.weights
    if config["text_weights"] is None:
        config["text_weights"] = "pretrained" if text.folder else "none"
    if config["text_weights"] != "none" and not text.folder:
        name = config["text_tower"]
        raise UserError(f"--text-weights: a {name} has no pretrained weights; use minilm or bert")
    if config["stem"] == "small" and (
        config["image_weights"] != "none" or any(each.build is not resnet for each in images)
    ):
        raise UserError("--stem small goes with a resnet and --image-weights none")
    if config["head_epochs"] and config["image_weights"] == config["text_weights"] == "none":
        raise UserError("--head-epochs freezes pretrained towers, and this run has none")
    for tower in ("image", "text"):
        given = config[f"{tower}_weights"]
        if given not in ("none", "imagenet" if tower == "image" else "pretrained"):
            config[f"{tower}_weights"] = str(Path(given).resolve())
        if config[f"train_{tower}"] is None:
            config[f"train_{tower}"] = "all" if given == "none" else "0"
    if config["text_head"] is None:
        config["text_head"] = config["head"]
    if config["poster_text"] and (config["train_text"] != "0" or not text.folder):
        raise UserError("--poster-text goes with a frozen text tower: --text-tower minilm or bert")
    if len(images) > 1 and (config["train_text"] != "0" or config["poster_text"]):
        raise UserError(
            "several image towers share a frozen text tower: --text-tower minilm, or --train-text "
            "0 with --pretrain-text N; and --no-poster-text"
        )
    if config["soft_positives"] != "none" and "infonce" not in config["loss"]:
        raise UserError("--soft-positives goes with --loss infonce")
    if config["pretrain_text"] and config["text_weights"] != "none":
        raise UserError("--pretrain-text goes with --text-weights none; --pretrain-text 0: none")
    if config["image_size"] is None and config["image_weights"] != "none":
        config["image_size"] = image.size
    for flag, (of_shapes, of_photographs) in PER_DATA.items():
        if config[flag] is None:
            config[flag] = of_shapes if shapes else of_photographs
    if config["views"] is None:
        level = AUGMENTATIONS[config["image_augment"]]
        config["views"] = 4 if level.area < 1 else 1 + level.flip
    small, whole, heads = config["start_size"], config["image_size"], config["head_epochs"]
    if small is None and config["start_epochs"]:
        raise UserError("--start-epochs counts epochs at --start-size, which is not given")
    if small in (None, whole):
        config["start_size"], config["start_epochs"] = None, 0
    elif small > whole or config["train_image"] != "all" or image.build is vit or len(images) > 1:
        raise UserError(
            f"--start-size {small} goes with --train-image all, one convolutional tower and a "
            f"larger --image-size; --start-size {whole} leaves it out"
        )
    elif not config["start_epochs"]:
        config["start_epochs"] = heads + 2 * (config["epochs"] - heads) // 3
    trained = config["train_image"].split("+")
    if len(trained) not in (1, len(images)):
        raise UserError(
            f"--train-image {config['train_image']} does not fit {config['image_tower']}: give one "
            "count for all, or one for each"
        )
    frozen = {*trained, config["train_text"]} == {"0"}
    if config["head_epochs"] >= config["epochs"] and not frozen:
        raise UserError("--head-epochs leaves no epoch for the towers; give more --epochs")
    return config
