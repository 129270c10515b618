"""What a run is asked to do: flags that scripts share, defaults that fit the data, checks.

train.py calls `resolve` on what was typed and what a recipe says; checkpoints keep the result.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from loss import parse_loss
from models import IMAGE_TOWERS, TEXT_TOWERS
from support.checkpoint import load_checkpoint
from support.command import Parser, UserError, later, number

# Flags left out take these, measured on 2 cores (report/appendix.md): photographs need the larger
# input and gain from crops; in `shapes` a mirrored or cropped scene contradicts its captions, and
# a large batch holds the near misses that teach the difference.
PER_DATA = {  # flag -> its default for `shapes`, for photographs
    "image_size": (64, 96),
    "image_augment": ("none", "light"),
    "batch_size": (256, 128),
    "lr": (1.5e-3, 1e-3),
    "epochs": (4, 15),
}
CAPTIONS_CONTRADICT = ("image_augment", "test_crops", "test_mirror", "map_crop")  # for `shapes`
OF_THE_MACHINE = ("resume", "cache", "out", "device")  # not of the run: no checkpoint keeps them
OF_RECIPES = {"cache", "data", "device", "precision", "workers"}  # of each run of a recipe
MAY_CHANGE = {*OF_THE_MACHINE, *OF_RECIPES, "epochs"}  # in a resume; the data's content decides
ALL = 1000  # more blocks than any tower has


def block_count(text: str) -> int:
    """How many of a tower's last blocks learn: `all`, or a whole number."""
    return ALL if text == "all" else number(int, 0, ALL)(text)


def per_data(flag: str) -> str:
    return "default: {} for shapes, {} for photographs".format(*PER_DATA[flag])


def resolve(parser: Parser, typed: dict[str, Any], recipe: dict[str, Any]) -> Namespace:
    """The options of a new run: typed flags, else the recipe's, else what fits.

    With --init the flags of the group "model" are, where nothing else says so, those of the
    checkpoint. Raises UserError for flags that contradict each other.
    """
    defaults, recipe, inherited = parser.defaults(), suited(recipe, typed), {}
    epochs_before = 0  # what the weights of --init have behind them
    if init := {**recipe, **typed}.get("init"):
        earlier = load_checkpoint(checkpoint_in(init))
        if "config" not in earlier:
            raise UserError(f"--init {init} holds several models; name the run of one")
        known = {**defaults, **earlier["config"]}  # with flags that are younger than the checkpoint
        inherited = {flag: known[flag] for flag in parser.group("model")}
        epochs_before = earlier["config"].get("epochs_before", 0) + earlier["epoch"]
    options = Namespace(**{**defaults, **inherited, **recipe, **typed})
    options.epochs_before = epochs_before
    shapes = options.data == "shapes"
    if not shapes:
        options.data = str(Path(options.data).resolve())
    fill_in(options, shapes)
    check(options)
    return options


def suited(recipe: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """A recipe's flags; for `shapes` without those that its captions contradict."""
    if {**recipe, **typed}.get("data") != "shapes":
        return recipe
    return {flag: x for flag, x in recipe.items() if flag not in CAPTIONS_CONTRADICT}


def fill_in(options: Namespace, shapes: bool) -> None:
    """The defaults that depend on the data and on the towers."""

    def fill(**defaults: Any) -> None:
        """Of the flags that nothing has said yet."""
        for flag, value in defaults.items():
            if getattr(options, flag) is None:
                setattr(options, flag, value)

    image, text = IMAGE_TOWERS[options.image_tower], TEXT_TOWERS[options.text_tower]
    fill(image_weights=image.weights, text_weights="pretrained" if text.pretrained else "none")
    fill(text_layers=text.layers)
    for flag, named in (("image_weights", "imagenet"), ("text_weights", "pretrained")):
        if getattr(options, flag) not in ("none", named):
            setattr(options, flag, str(Path(getattr(options, flag)).resolve()))
    fill(train_text=ALL if options.text_weights == "none" else 0, text_head=options.head)
    if options.image_weights == "none":
        fill(train_image=ALL)
    else:
        fill(train_image=0, image_size=image.size)
        if options.train_image != ALL:
            fill(image_augment="none")  # what frozen blocks give is computed once
    fill(**{flag: values[0 if shapes else 1] for flag, values in PER_DATA.items()})
    if options.soft_positives == "genres":
        options.loss = options.loss.replace("infonce", "genres")


def check(options: Namespace) -> None:
    """Raises UserError for flags that contradict each other."""
    later("tricks.rewrite", "parse_rates")(options.text_augment)
    parse_loss(options.loss)
    tower, pretrained = options.text_tower, TEXT_TOWERS[options.text_tower].pretrained
    wrong = ""
    if options.text_weights != "none" and not pretrained:
        wrong = f"--text-weights: a {tower} has no pretrained weights; use minilm or bert"
    elif options.poster_text and (options.train_text or not pretrained):
        wrong = "--poster-text goes with a frozen text tower: --text-tower minilm or bert"
    elif options.poster_text and options.train_image:
        wrong = "--poster-text goes with a frozen image tower: --train-image 0"
    elif options.poster_text and options.image_augment != "none":
        wrong = "--poster-text goes with --image-augment none"
    elif options.soft_positives == "genres" and "genres" not in options.loss:
        wrong = "--soft-positives goes with --loss infonce"
    elif options.captions_alone and not options.train_text:
        wrong = "--captions-alone trains the text tower: --train-text all"
    if wrong:
        raise UserError(wrong)


def checkpoint_in(place: str | Path) -> Path:
    """The checkpoint that a run's folder, or a file, means."""
    return Path(place) / "best.pt" if Path(place).is_dir() else Path(place)


def config_of(options: Namespace) -> dict[str, Any]:
    """What a checkpoint keeps of the options."""
    return {flag: x for flag, x in vars(options).items() if flag not in OF_THE_MACHINE}


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `other` is a later checkpoint of the run of `one`, whatever it was resumed with."""
    configs = [
        {flag: x for flag, x in content["config"].items() if flag not in MAY_CHANGE}
        for content in (one, other)
    ]
    known = one["history"]
    return configs[0] == configs[1] and other["history"][: len(known)] == known
