"""The flags that have no effect on a run, typed or of its recipe, each with the reason.

support/recipes.py says them before a run begins.
"""

from argparse import Namespace
from typing import Any

from loss import parse_loss
from models import TEXT_TOWERS
from support.command import dashed, say_unused, warn
from support.options import ALL, CAPTIONS_CONTRADICT, suited


def say_idle(options: Namespace, recipe: dict[str, Any], typed: dict[str, Any]) -> None:
    """Warns of the flags, typed or of a recipe, that have no effect on a run."""
    flags = {**suited(recipe, typed), **typed}
    for reason, names in idle(options).items():
        say_unused(flags, names, reason)
    if options.data == "shapes":
        left = [flag for flag in CAPTIONS_CONTRADICT if flag in recipe and flag not in typed]
        if left:
            some = ", ".join(dashed(f"--{flag}") for flag in left)
            warn(
                f"left out of the recipe: {some} (a mirrored or cropped scene of `shapes` "
                "contradicts its captions)"
            )


def idle(options: Namespace) -> dict[str, list[str]]:
    """Why flags have no effect on a run of these options -> which."""
    text, tower = options.text_tower, options.image_tower
    pretrained = TEXT_TOWERS[text].pretrained
    losses = {name for _, name in parse_loss(options.loss)}
    learning = (
        options.image_weights != "none" and options.train_image,
        options.text_weights != "none" and options.train_text,
    )
    maps = 0 < options.train_image < ALL and options.image_augment == "none"
    rules = (
        (options.data == "shapes", ["splits", "titles"], "`shapes` has splits of its own"),
        (pretrained, ["text_width", "text_layers", "min_count"], f"{text} has its own"),
        (pretrained, ["dropout"], f"{text} has none"),
        (text == "bag", ["text_layers"], "a bag of words has none"),
        (not options.train_text and not pretrained, ["dropout"], "the text tower is frozen"),
        (not any(learning), ["tower_lr"], "no pretrained tower learns"),
        (not options.train_text, ["text_lr"], "the text tower is frozen"),
        (
            not maps and not options.captions_alone,
            ["map_crop"],
            f"no maps of {tower} are kept: it is for --train-image 1 or more "
            "above frozen blocks, and --image-augment none",
        ),
        (options.captions_alone, ["image_augment", "map_crop", "image_dropout"], "no pictures"),
        (not losses & {"infonce", "genres"}, ["label_smoothing"], "it is InfoNCE's"),
        ("genres" not in losses, ["soft_share"], "it goes with --soft-positives genres"),
        (losses == {"triplet"}, ["temperature", "fixed_temperature"], "triplet has none"),
        (
            bool(options.patience and options.patience >= options.epochs),
            ["patience"],
            f"there are {options.epochs} epochs",
        ),
        (options.warmup >= options.epochs, ["schedule"], "warm-up takes all epochs"),
    )
    found: dict[str, list[str]] = {}
    for applies, flags, reason in rules:
        if applies:
            found.setdefault(reason, []).extend(flags)
    return found
