"""Runs as folders: recipes of several, folders that belong to one run, resuming, interruptions.

train.py calls these around its loop; a recipe is a list of runs, so resuming one is the same list.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dataset import Tokenizer, image_transform, load_dataset
from models import TEXT_TOWERS, build_model, model_from_checkpoint
from support.checkpoint import contents as contents_of
from support.checkpoint import fill_from, load_checkpoint, save_checkpoint
from support.command import HERE, Parser, UserError, atomic_write, later, sweep, warn
from support.options import OF_THE_MACHINE, checkpoint_in, config_of, resolve, suited

if TYPE_CHECKING:
    from dataset import CaptionedImages
    from models import CLIP
    from train import Run

RECIPES = HERE / "recipes"
MAY_CHANGE = ("workers", "device", "epochs", "resume", "cache", "out")  # when a run is resumed

# --------------------------------------------------------------------------------- recipes


def read_recipe(name: str) -> list[tuple[str, list[str]]]:
    """The runs of recipes/NAME.txt, or of a file: [(name, words as typed)]. Raises UserError.

    A run a line, `name: --flag value ...`; a line that ends in a backslash goes on; # is a comment.
    """
    path = RECIPES / f"{name}.txt"
    path = path if path.is_file() else Path(name)
    try:
        text = path.read_text("utf-8").replace("\\\n", " ")
        lines = [line for line in text.split("\n") if line.strip() and line.strip()[0] != "#"]
        runs = [
            (line.partition(":")[0].strip(), shlex.split(line.partition(":")[2])) for line in lines
        ]
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(found.stem for found in RECIPES.glob("*.txt")))
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--recipe {name}: {reason}; give one of {known}, or a file") from error
    names = [run for run, _ in runs]
    if (
        not runs
        or len(set(names)) < len(names)
        or not all(re.fullmatch(r"[\w-]+", n) for n in names)
    ):
        raise UserError(
            f"--recipe {name}: {path} needs a run a line, each `name: --flag value ...`"
        )
    return runs


def as_words(typed: dict[str, Any]) -> list[str]:
    """Flags as they would be typed."""
    words = []
    for flag, value in typed.items():
        name = flag.replace("_", "-")
        words += (
            [f"--{'' if value else 'no-'}{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return words


def run_recipe(
    runs: list[tuple[str, list[str]]],
    out: Path,
    parser: Parser,
    typed: dict[str, Any],
    train: Callable[..., int],
) -> int:
    """Goes through a recipe's runs; a finished one is skipped, one that was stopped goes on.

    A run whose --init names an earlier run of the recipe starts from its best checkpoint. What no
    other run starts from stands side by side in out/best.pt.
    """
    first_of_all = "recipe.txt"
    if not (out / first_of_all).is_file():
        said = {flag: x for flag, x in typed.items() if flag not in OF_THE_MACHINE}
        runs = [(name, as_words(suited(parser.typed(words), said) | said)) for name, words in runs]
        with atomic_write(out / first_of_all) as temporary:
            lines = [f"{name}: {shlex.join(words)}\n" for name, words in runs]
            temporary.write_text("".join(lines), "utf-8")
    machine = {f: x for f, x in typed.items() if f in ("cache", "device", "workers")}
    for folder in (out, *(out / name for name, _ in runs)):
        sweep_run(folder)
    begun: set[str] = set()
    for place, (name, words) in enumerate(runs, 1):
        print(f"run {place} of {len(runs)}: {name}", flush=True)
        flags = {**parser.typed(words), **machine}
        if "init" in flags and flags["init"] in dict(runs):
            begun.add(flags["init"])
            flags["init"] = str(out / flags["init"])
        folder, earlier = out / name, None
        if (folder / "last.pt").is_file():
            options, earlier = resumed({**machine, "resume": str(folder)}, parser)
        else:
            options = resolve(parser, flags, {})
        if code := train(options, folder, earlier, out):
            return code
    members = [name for name, _ in runs if name not in begun]
    contents = [load_checkpoint(out / name / "best.pt") for name in members]
    best = contents[0] if len(contents) == 1 else {"members": contents}
    save_checkpoint(out / "best.pt", best)
    beside = f" ({' and '.join(members)} side by side)" if len(members) > 1 else f" ({members[0]})"
    print(f"wrote {out / 'best.pt'}{beside}")
    return 0


def go_on(typed: dict[str, Any], parser: Parser, train: Callable[..., int]) -> int:
    """--resume: the run, or the recipe, in a folder goes on. Raises UserError."""
    out = Path(typed["resume"] or typed.get("out") or "")
    if (out / "recipe.txt").is_file():
        if kept := typed.keys() - set(MAY_CHANGE) | typed.keys() & {"epochs"}:
            flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in sorted(kept))
            raise UserError(f"--resume: the runs of a recipe keep their {flags}; leave it out")
        return run_recipe(read_recipe(str(out / "recipe.txt")), out, parser, typed, train)
    options, earlier = resumed(typed, parser)
    return train(options, options.out, earlier, options.out)


# ---------------------------------------------------------------------------- a run's folder


def new_folder(typed: dict[str, Any], parser: Parser) -> Path:
    """The folder of a new run: --out, or one named after the data and the time."""
    data = Path(typed.get("data", parser.defaults()["data"])).name.lower()
    return typed.get("out") or Path("checkpoints") / f"{data}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_folder(out: Path) -> None:
    """Refuses, before any work is done, a folder that holds a run or cannot be one."""
    held = [n for n in ("last.pt", "best.pt", "history.csv", "recipe.txt") if (out / n).exists()]
    if held:
        raise UserError(f"{out} already holds a run ({held[0]}); use --resume, or another --out")
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise UserError(f"--out {out} is, or lies in, a file; give a folder")


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


def resumed(typed: dict[str, Any], parser: Parser) -> tuple[Namespace, dict[str, Any]]:
    """The options and the checkpoint of the run that --resume means. Raises UserError."""
    place = Path(typed["resume"] or typed.get("out") or "")
    if not typed["resume"] and "out" not in typed:
        raise UserError("--resume needs the run's folder: --resume checkpoints/NAME")
    path = place / "last.pt" if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"--resume: there is no {path}; no epoch of that run was finished")
    content = load_checkpoint(path)
    if "config" not in content:
        raise UserError(f"--resume: {path} holds several models; give the recipe's folder")
    known = {flag: x for flag, x in parser.defaults().items() if flag not in OF_THE_MACHINE}
    config = {**known, **content["config"]}  # with flags that are younger than the checkpoint
    wanted = vars(resolve(parser, typed, {**config, "init": None}))
    for flag in typed.keys() - set(MAY_CHANGE):
        if wanted[flag] != config[flag]:
            raise UserError(
                f"--{flag.replace('_', '-')} {typed[flag]} differs from the run's "
                f"{config[flag]}; leave it out, or start a new run with another --out"
            )
    changed = {flag: typed[flag] for flag in MAY_CHANGE if flag in typed}
    sweep_run(path.parent)
    return Namespace(**{**parser.defaults(), **config, **changed, "out": path.parent}), content


def sweep_run(folder: Path) -> None:
    """Deletes what killed processes left half written in a run's folder, or in a recipe's."""
    for name in ("last.pt", "best.pt", "history.csv", "curves.png", "config.json", "recipe.txt"):
        sweep(folder / name)


class Interrupts:
    """Ctrl-C and SIGTERM inside the block raise KeyboardInterrupt; `code` is the exit code then."""

    def __enter__(self) -> Interrupts:
        self.code = 0
        signals = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {signum: signal.signal(signum, self.stop) for signum in signals}
        return self

    def stop(self, signum: int, _frame: Any) -> None:
        self.code = 128 + signum
        raise KeyboardInterrupt

    def __exit__(self, *_error: object) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)


def say_stopped(out: Path, home: Path) -> None:
    """How a stopped run goes on."""
    saved = (out / "last.pt").exists() or home != out
    go_on = f"go on from the last whole epoch: python train.py --resume {home}"
    warn(f"stopped; {go_on if saved else 'no epoch was finished'}")


# ------------------------------------------------------------------- what a run says of itself


def say_duration(seconds: float, epochs: int) -> None:
    """How long a run will take, after its first steps."""
    minutes = f"{seconds * epochs / 60:.1f} min for {epochs}"
    tqdm.write(f"about {seconds:.0f} s an epoch, {minutes}, besides what measuring dev takes")


def is_finished(history: list[dict[str, float]], options: Namespace) -> bool:
    """All epochs done, or --patience of them without a better mean recall on dev."""
    if not history or len(history) >= options.epochs:
        return len(history) >= options.epochs
    best = max(history, key=lambda record: record["mean_recall"])  # the first of equals
    return bool(options.patience) and history[-1]["epoch"] - best["epoch"] >= options.patience


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
    captions = pairs.limited(options.limit, options.seed).captions
    init = load_checkpoint(checkpoint_in(options.init)) if options.init else None
    if TEXT_TOWERS[options.text_tower].pretrained:
        tokenizer = later("towers.bert", "tokenizer_for")(options)
    elif init and init["config"]["text_tower"] == options.text_tower:  # its words' numbers
        tokenizer = Tokenizer(init["vocabulary"], options.max_tokens)
    else:
        tokenizer = Tokenizer.train(captions, options.min_count, options.max_tokens)
    towers = ("image_tower", "text_tower")
    same = init and all(init["config"][tower] == getattr(options, tower) for tower in towers)
    model = build_model(options, tokenizer, pretrained=not same)
    if init:
        fill_from(model, init, options.init)
    return model


def contents(run: Run, weights: dict[str, Any] | None, options: Namespace) -> dict[str, Any]:
    """What a checkpoint holds."""
    finished = is_finished(run.history, options)
    return {**contents_of(run, weights), "config": config_of(options), "finished": finished}


def describe(run: Run, options: Namespace) -> str:
    """The line before the table: towers, sizes, precision and what chance would give."""
    model, learner, pairs = run.model, run.learner, run.pairs
    weights = sum(weight.numel() for weight in model.parameters())
    learned = sum(weight.numel() for weight in learner.parameters() if weight.requires_grad)
    images, tokenizer = len(pairs["train"].rows), model.tokenizer
    tokenizer.cut = 0
    for split in ("train", "dev"):
        tokenizer(pairs[split].captions)  # counts those that are cut
    return (
        f"model: {options.image_tower} at {options.image_size} px and {options.text_tower}, "
        f"{weights:,} weights of which {learned:,} learn; "
        f"vocabulary {len(tokenizer.vocabulary):,} words, {tokenizer.cut:,} captions cut to "
        f"{tokenizer.max_tokens} tokens; {options.precision} on {model.device}; "
        f"{images:,} images in {len(pairs['train'].sampler(options)):,} batches; "
        f"chance on dev: R@1 {100 / len(pairs['dev'].rows):.2f}%"
    )
