"""Runs as folders: recipes of several, folders that belong to one run, resuming, interruptions.

train.py calls these around its loop; a recipe is a list of runs, so resuming one is the same list.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dataset import CaptionedImages, Tokenizer, image_transform, load_dataset
from models import CLIP, TEXT_TOWERS, build_model, model_from_checkpoint
from support.checkpoint import fill_from, load_checkpoint, save_checkpoint
from support.command import HERE, Parser, UserError, atomic_write, dashed, later, sweep, warn
from support.options import OF_THE_MACHINE, checkpoint_in, resolve, suited
from support.unread import unknown_words

if TYPE_CHECKING:
    from train import Run

RECIPES = HERE / "recipes"
MAY_CHANGE = {*OF_THE_MACHINE, "workers", "epochs"}  # when a run is resumed
Recipe = list[tuple[str, list[str]]]  # its runs: (name, words as typed)

# --------------------------------------------------------------------------------- recipes


def read_recipe(name: str) -> Recipe:
    """The runs of recipes/NAME.txt, or of a file. Raises UserError.

    A run a line, `name: --flag value ...`; a line that ends in a backslash goes on; # is a comment.
    """
    path = RECIPES / f"{name}.txt"
    path = path if path.is_file() else Path(name)
    try:
        lines = map(str.strip, path.read_text("utf-8").replace("\\\n", " ").split("\n"))
        parts = [line.partition(":") for line in lines if line and line[0] != "#"]
        runs = [(run.strip(), shlex.split(words)) for run, _, words in parts]
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(found.stem for found in RECIPES.glob("*.txt")))
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--recipe {name}: {reason}; give one of {known}, or a file") from error
    named = all(re.fullmatch(r"[\w-]+", run) for run, _ in runs)
    if not runs or not named or len(dict(runs)) < len(runs):
        line = "`name: --flag value ...`"
        raise UserError(f"--recipe {name}: {path} needs a run a line, each {line}")
    return runs


def as_words(typed: dict[str, Any]) -> list[str]:
    """Flags as they would be typed."""
    words = []
    for flag, value in typed.items():
        if isinstance(value, bool):
            words.append(dashed(f"--{flag}" if value else f"--no_{flag}"))
        else:
            words += [dashed(f"--{flag}"), str(value)]
    return words


def run_recipe(
    runs: Recipe, out: Path, parser: Parser, typed: dict[str, Any], train: Callable[..., int]
) -> int:
    """Goes through a recipe's runs; a finished one is skipped, one that was stopped goes on.

    A run whose --init names an earlier run of the recipe starts from its best checkpoint. What no
    other run starts from stands side by side in out/best.pt.
    """
    if not (out / "recipe.txt").is_file():
        said = {flag: x for flag, x in typed.items() if flag not in OF_THE_MACHINE}
        for place, (name, words) in enumerate(runs):
            flags = parser.typed(words)
            flags = {"data": parser.defaults()["data"], **suited(flags, said), **said}
            if flags["data"] != "shapes":  # from wherever it is resumed
                flags["data"] = str(Path(flags["data"]).resolve())
            runs[place] = name, as_words(flags)
        with atomic_write(out / "recipe.txt") as temporary:
            lines = [f"{name}: {shlex.join(words)}\n" for name, words in runs]
            temporary.write_text("".join(lines), "utf-8")
    machine = {flag: x for flag, x in typed.items() if flag in ("cache", "device", "workers")}
    for folder in (out, *(out / name for name, _ in runs)):
        sweep_run(folder)
    begun = set()  # runs that others start from
    for place, (name, words) in enumerate(runs, 1):
        print(f"run {place} of {len(runs)}: {name}", flush=True)
        flags, earlier = {**parser.typed(words), **machine}, None
        if flags.get("init") in dict(runs):
            begun.add(flags["init"])
            flags["init"] = str(out / flags["init"])
        if (out / name / "last.pt").is_file():
            options, earlier = resumed(out / name, machine, parser)
        else:
            options = resolve(parser, flags, {})
        if code := train(options, out / name, earlier, out):
            return code
    members = [name for name, _ in runs if name not in begun]
    contents = [load_checkpoint(out / name / "best.pt") for name in members]
    save_checkpoint(out / "best.pt", {"members": contents} if members[1:] else contents[0])
    print(f"wrote {out / 'best.pt'} ({' side by side with '.join(members)})")
    return 0


def go_on(typed: dict[str, Any], parser: Parser, train: Callable[..., int]) -> int:
    """--resume: the run, or the recipe, in a folder goes on. Raises UserError."""
    if not typed["resume"] and "out" not in typed:
        raise UserError("--resume needs the run's folder: --resume checkpoints/NAME")
    out = Path(typed["resume"] or typed["out"])
    if not (out / "recipe.txt").is_file():
        options, earlier = resumed(out, typed, parser)
        return train(options, options.out, earlier, options.out)
    if kept := typed.keys() - {*OF_THE_MACHINE, "workers"}:
        flags = ", ".join(dashed(f"--{flag}") for flag in sorted(kept))
        raise UserError(f"--resume: the runs of a recipe keep their {flags}; leave it out")
    return run_recipe(read_recipe(str(out / "recipe.txt")), out, parser, typed, train)


# ---------------------------------------------------------------------------- a run's folder


def new_folder(typed: dict[str, Any], parser: Parser) -> Path:
    """The folder of a new run: --out, or one named after the data and the time.

    Refuses, before any work is done, one that holds a run or cannot be a folder.
    """
    data = Path(typed.get("data", parser.defaults()["data"])).name.lower()
    out = typed.get("out") or Path("checkpoints") / f"{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    held = [n for n in ("last.pt", "best.pt", "history.csv", "recipe.txt") if (out / n).exists()]
    if held:
        raise UserError(f"{out} already holds a run ({held[0]}); use --resume, or another --out")
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise UserError(f"--out {out} is, or lies in, a file; give a folder")
    return out


def write_history(out: Path, history: list[dict[str, float]], footer: str) -> None:
    """Writes history.csv and draws curves.png."""
    path = out / "history.csv"
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    later("support.figures", "draw_curves")(history, out / "curves.png", footer)


def write_config(path: Path, config: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def resumed(place: Path, typed: dict[str, Any], parser: Parser) -> tuple[Namespace, dict[str, Any]]:
    """The options and the checkpoint of the run in a folder, or of a last.pt. Raises UserError."""
    path = place / "last.pt" if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"--resume: there is no {path}; no epoch of that run was finished")
    content = load_checkpoint(path)
    if "config" not in content:
        raise UserError(f"--resume: {path} holds several models; give the recipe's folder")
    config = {**parser.defaults(), **content["config"]}  # some flags are younger than it
    wanted = vars(resolve(parser, typed, {**config, "init": None}))
    for flag in typed.keys() - MAY_CHANGE:
        if wanted[flag] != config[flag]:
            raise UserError(
                f"{dashed('--' + flag)} {typed[flag]} differs from the run's {config[flag]}; "
                "leave it out, or start a new run with another --out"
            )
    sweep_run(path.parent)
    changed = {flag: x for flag, x in typed.items() if flag in MAY_CHANGE}
    return Namespace(**{**config, **changed, "out": path.parent}), content


def sweep_run(folder: Path) -> None:
    """Deletes what killed processes left half written in a run's folder, or in a recipe's."""
    for name in ("last.pt", "best.pt", "history.csv", "curves.png", "config.json", "recipe.txt"):
        sweep(folder / name)


def say_stopped(out: Path, home: Path) -> None:
    """How a stopped run goes on."""
    saved = (out / "last.pt").exists() or home != out
    go_on = f"go on from the last whole epoch: python train.py --resume {home}"
    warn(f"stopped; {go_on if saved else 'no epoch was finished'}")


# ------------------------------------------------------------------- what a run says of itself

COLUMNS = {  # of the table on the screen: key -> (title, format)
    "epoch": ("epoch", "{:5d}"),
    "train_loss": ("loss", "{:7.3f}"),
    "dev_loss": ("dev loss", "{:8.3f}"),
    "top1_i2t": ("top1 i2t", "{:8.1f}"),
    "top1_t2i": ("t2i", "{:5.1f}"),
    "i2t_r1": ("i2t R@1", "{:7.1f}"),
    "i2t_r5": ("R@5", "{:5.1f}"),
    "i2t_r10": ("R@10", "{:5.1f}"),
    "i2t_medr": ("medr", "{:5.0f}"),
    "t2i_r1": ("t2i R@1", "{:7.1f}"),
    "t2i_r5": ("R@5", "{:5.1f}"),
    "t2i_r10": ("R@10", "{:5.1f}"),
    "t2i_medr": ("medr", "{:5.0f}"),
    "mean_recall": ("mean", "{:5.1f}"),
    "logit_scale": ("scale", "{:5.1f}"),
    "images_per_second": ("img/s", "{:6.0f}"),
    "seconds": ("s", "{:5.0f}"),
    "minutes": ("min", "{:6.1f}"),  # since the run began, its preparation included
}


def table_head() -> str:
    return " ".join(title.rjust(len(form.format(0))) for title, form in COLUMNS.values())


def table_line(record: dict[str, float]) -> str:
    cells = ((form.format(record[key]), len(title)) for key, (title, form) in COLUMNS.items())
    return " ".join(cell.rjust(width) for cell, width in cells)


def say_duration(seconds: float, epochs: int) -> None:
    """How long a run will take, after its first steps."""
    minutes = f"{seconds * epochs / 60:.1f} min for {epochs}"
    tqdm.write(f"about {seconds:.0f} s an epoch, {minutes}, besides what measuring dev takes")


def is_finished(history: list[dict[str, float]], options: Namespace) -> bool:
    """All epochs done, or --patience of them without a better mean recall on dev."""
    if not history or not options.patience or len(history) >= options.epochs:
        return len(history) >= options.epochs
    best = max(history, key=lambda record: record["mean_recall"])  # the first of equals
    return history[-1]["epoch"] - best["epoch"] >= options.patience


# ----------------------------------------------------------------------- model and checkpoint


def read_data(options: Namespace, earlier: dict[str, Any] | None) -> CaptionedImages:
    """The data of a run, and a line about it. Raises UserError when it has changed since."""
    size = image_transform(options)["stored_size"]
    place = options.splits, size, options.cache, options.workers, options.titles
    dataset = load_dataset(options.data, *place)
    print(dataset.summary())
    if earlier and dataset.fingerprint != earlier["fingerprint"]:
        raise UserError(
            f"--resume: the data has changed since (fingerprint {dataset.fingerprint}, the run's "
            f"is {earlier['fingerprint']}); put it back, or start a new run"
        )
    return dataset


def model_of(options: Namespace, dataset: CaptionedImages, earlier: dict[str, Any] | None) -> CLIP:
    """The model of a run: that of its checkpoint, or a new one.

    A new one has weights that are random, of others (pretrained), or those of --init.
    """
    if earlier:
        return model_from_checkpoint(earlier, options.out)
    pairs = dataset.pairs("train")
    if options.limit and options.limit > len(pairs.rows):
        count = f"{len(pairs.rows):,} training images"
        warn(f"--limit {options.limit:,}: there are {count}, all are used")
    init = load_checkpoint(checkpoint_in(options.init)) if options.init else None
    before = init["config"] if init else {}
    same_image = before.get("image_tower") == options.image_tower
    same_text = before.get("text_tower") == options.text_tower
    if TEXT_TOWERS[options.text_tower].pretrained:
        tokenizer = later("towers.text", "tokenizer_for")(options)
    elif same_text:
        tokenizer = Tokenizer(init["vocabulary"], options.max_tokens)  # the words' own numbers
    else:
        captions = pairs.limited(options.limit, options.seed).captions
        tokenizer = Tokenizer.train(captions, options.min_count, options.max_tokens)
    model = build_model(options, tokenizer, pretrained=not (same_image and same_text))
    if init:
        fill_from(model, init, options.init)
    return model


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
    return (
        f"model: {options.image_tower} at {options.image_size} px and {options.text_tower}, "
        f"{weights:,} weights of which {learned:,} learn; "
        f"vocabulary {len(tokenizer.vocabulary):,} words, {tokenizer.cut:,} captions cut to "
        f"{tokenizer.max_tokens} tokens; {options.precision} on {model.device}; "
        f"{images:,} images in {len(pairs['train'].sampler(options)):,} batches; "
        f"chance on dev: R@1 {100 / len(pairs['dev'].rows):.2f}%"
    )
