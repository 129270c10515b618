"""What a run says of itself: a line before the table, the table, and what speaks against it.

train.py prints these around its loop; support/runs.py names the flags that have no effect.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from loss import parse_loss
from models import TEXT_TOWERS
from support.command import dashed, say_unused, warn
from support.options import ALL, CAPTIONS_CONTRADICT, suited
from support.unread import unknown_words

if TYPE_CHECKING:
    from train import Run

COLUMNS = {  # of the table on the screen, in 80 columns: key -> (title, format)
    "epoch": ("epoch", "{:5d}"),
    "train_loss": ("loss", "{:6.3f}"),
    "dev_loss": ("dev", "{:6.3f}"),
    "i2t_r1": ("i2t@1", "{:5.1f}"),
    "i2t_r5": ("@5", "{:5.1f}"),
    "i2t_r10": ("@10", "{:5.1f}"),
    "i2t_medr": ("medr", "{:5.1f}"),
    "t2i_r1": ("t2i@1", "{:5.1f}"),
    "t2i_r5": ("@5", "{:5.1f}"),
    "t2i_r10": ("@10", "{:5.1f}"),
    "t2i_medr": ("medr", "{:5.1f}"),
    "mean_recall": ("mean", "{:5.1f}"),
    "minutes": ("min", "{:5.1f}"),  # since the run began, its preparation included
}  # history.csv has more


def table_head() -> str:
    return " ".join(title.rjust(len(form.format(0))) for title, form in COLUMNS.values())


def table_line(record: dict[str, float]) -> str:
    cells = ((form.format(record[key]), len(title)) for key, (title, form) in COLUMNS.items())
    return " ".join(cell.rjust(width) for cell, width in cells)


def say_duration(seconds: float, epochs: int) -> None:
    """How long a run will take, after its first steps."""
    minutes = f"{seconds * epochs / 60:.1f} min for {epochs}"
    tqdm.write(f"about {seconds:.0f} s an epoch, {minutes}, besides what measuring dev takes")


def describe(run: Run, options: Namespace) -> str:
    """The line before the table: towers, sizes, precision and what chance would give."""
    model, learner, pairs = run.model, run.learner, run.pairs
    weights = sum(weight.numel() for weight in model.parameters())
    learned = sum(weight.numel() for weight in learner.parameters() if weight.requires_grad)
    images, tokenizer = len(pairs["train"].rows), model.tokenizer
    tokenizer.cut = 0
    for split in ("train", "dev"):
        tokenizer(pairs[split].captions)  # counts those that are cut
        for remark in unknown_words([tokenizer], pairs[split].captions, f"{split} captions"):
            warn(remark)
    dev = len(pairs["dev"].rows)
    few = f" (dev has {dev}: with fewer than {FEW} images recalls tell little)" if dev < FEW else ""
    return (
        f"model: {options.image_tower} at {options.image_size} px and {options.text_tower}, "
        f"{weights:,} weights of which {learned:,} learn; "
        f"vocabulary {len(tokenizer.vocabulary):,} words, {tokenizer.cut:,} captions cut to "
        f"{tokenizer.max_tokens} tokens; {options.precision} on {model.device}; "
        f"{images:,} images in {len(pairs['train'].sampler(options)):,} batches; "
        f"chance on dev: R@1 {100 / dev:.2f}%{few}"
    )


# ------------------------------------------------------------------- what speaks against it

FEW = 50  # images of dev


def at_chance(run: Run, options: Namespace) -> str:
    """A sentence where the last epoch's loss or recalls are those of guessing, or ""."""
    record, dev = run.history[-1], run.pairs["dev"]
    images, captions = len(dev.rows), len(dev)
    if images >= FEW:
        # As many captions as chance would find among the first 10, and twice its deviation.
        expected = captions * 10 / images
        most = 100 * (expected + 2 * math.sqrt(expected)) / captions
        if record["t2i_r10"] <= most:
            return (
                f"recall on dev is at chance: t2i R@10 {record['t2i_r10']:.1f}%, where guessing "
                f"gives {1000 / images:.1f}%{WHAT_THEN}"
            )
    steps = len(run.pairs["train"].sampler(options))
    batch = len(run.pairs["train"].rows) / steps
    each, loss = options.captions_per_image, record["train_loss"]
    guess = math.log(max(1, batch * each - each + 1))
    if options.loss == "infonce" and record["epoch"] * steps >= 20 and loss > guess - 0.02:
        return f"the loss stands at {loss:.3f}: guessing gives ln(batch) = {guess:.3f}{WHAT_THEN}"
    return ""


WHAT_THEN = "; if the next epochs do not change it, try another --lr, more --warmup or more data"


def warn_of_chance(run: Run, options: Namespace) -> None:
    """Says, after an epoch, that its figures are those of guessing."""
    if sentence := at_chance(run, options):
        warn(f"epoch {run.history[-1]['epoch']}: {sentence}")


def best_of(history: list[dict[str, float]]) -> str:
    """The best epoch, and whether it is the first for want of a better."""
    best = max(history, key=lambda record: record["mean_recall"])  # the first of equals
    lone = ", the first: none after it was better" if best["epoch"] == 1 < len(history) else ""
    return f"epoch {best['epoch']}{lone}, mean recall on dev {best['mean_recall']:.1f}%"


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
