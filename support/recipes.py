"""Recipes, and runs as folders: a list of runs goes on where it was stopped.

train.py hands over what was typed and its `train`; resuming a recipe is going through its list.
"""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import IMAGE_TOWERS, TEXT_TOWERS
from support import stopping
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import HERE, UserError, atomic_write, dashed, later, remove, warn
from support.device import choose_device, choose_precision
from support.folders import free_name, owned, refuse_used
from support.idle import say_idle
from support.options import MAY_CHANGE, OF_RECIPES, OF_THE_MACHINE, resolve, suited
from support.runs import read_data

if TYPE_CHECKING:
    import torch

    from support.command import Parser

RECIPES = HERE / "recipes"
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


def first_options(parser: Parser, typed: dict[str, Any]) -> Namespace:
    """The options of the first run of a recipe, `plain` where none is typed. Raises UserError."""
    (_, words), *_ = read_recipe(typed.get("recipe", "plain"))
    return resolve(parser, typed, parser.typed(words))


def default_recipe(typed: dict[str, Any]) -> str:
    """`assignment`; or `plain`, one run, where its text tower cannot learn from captions first.

    Raises UserError where the data is not there, or not understood.
    """
    data, flags = typed["data"], typed.keys()
    towers = IMAGE_TOWERS.get(typed.get("image_tower")), TEXT_TOWERS.get(typed.get("text_tower"))
    if data == "shapes":
        return "plain"  # its scenes teach both towers at once, in two minutes
    if {"init", "captions_alone", "image_weights", "text_weights", "train_text"} & flags:
        return "plain"
    if (towers[0] and towers[0].weights != "none") or (towers[1] and towers[1].pretrained):
        return "plain"
    try:
        captions = later("sources.layouts", "read_folder")(Path(data))
    except OSError:  # which loading the data will say better
        return "assignment"
    counts = Counter(row.image for row in captions.rows)
    if 2 * sum(count > 1 for count in counts.values()) >= len(counts):
        return "assignment"
    print("recipe plain: most images have one caption, from which alone no text tower learns")
    return "plain"


def as_words(typed: dict[str, Any]) -> list[str]:
    """Flags as they would be typed."""
    words = []
    for flag, value in typed.items():
        if isinstance(value, bool):
            words.append(dashed(f"--{flag}" if value else f"--no_{flag}"))
        else:
            words += [dashed(f"--{flag}"), str(value)]
    return words


def begin_anew(typed: dict[str, Any], parser: Parser, train: Callable[..., int]) -> int:
    """A new run, or the runs of a recipe, in a folder of its own: an exit code. Raises UserError.

    The folder is --out, or one named after the data and the time.
    """
    if "recipe" not in typed:
        typed["recipe"] = default_recipe({"data": parser.defaults()["data"], **typed})
    recipe = read_recipe(typed["recipe"])
    flags = [parser.typed(words) for _, words in recipe]
    options = resolve(parser, typed, flags[0])

    def work(out: Path) -> int:
        if typed.get("out"):
            refuse_used(out)
        if len(recipe) > 1:
            try:
                return run_recipe(recipe, out, parser, typed, train)
            except UserError:
                if not [*out.rglob("last.pt")]:  # nothing is there to go on from
                    remove(out / "recipe.txt")
                raise
        say_idle(options, flags[0], typed)
        return train(options, out, None, out)

    if typed.get("out"):
        return in_folder(typed["out"], work)
    return in_folder(free_name(Path("checkpoints"), Path(options.data).name), work, new=True)


def in_folder(out: Path, work: Callable[[Path], int], new: bool = False) -> int:
    """Does `work` in a run's folder, which is this process's alone; an exit code.

    When it is stopped, a line says how the run goes on.
    """
    words = partial(how_it_goes_on, out)
    with owned(out, new), stopping.saying(words):
        try:
            return work(out)
        except KeyboardInterrupt as error:
            code = stopping.code_of(error)
        except BrokenPipeError:  # nobody reads what it prints
            code = 1
        print(words(), file=sys.stderr, flush=True)
        stopping.state["said"] = True
        return code


def how_it_goes_on(out: Path) -> str:
    saved = (out / "last.pt").exists() or (out / "recipe.txt").exists()
    go_on = f"go on from the last whole epoch: python train.py --resume {shlex.quote(str(out))}"
    return f"warning: stopped; {go_on if saved else 'no epoch was finished'}"


def run_recipe(
    runs: Recipe, out: Path, parser: Parser, typed: dict[str, Any], train: Callable[..., int]
) -> int:
    """Goes through a recipe's runs; a finished one is skipped, one that was stopped goes on.

    A run whose --init names an earlier run of the recipe starts from its best checkpoint. The only
    run from which no other starts has the recipe's folder, and each other one a folder in it; of
    several such runs the best checkpoints stand side by side in out/best.pt. A --seed in the recipe
    is added to the one that is typed.
    """
    said = {flag: x for flag, x in typed.items() if flag not in OF_THE_MACHINE}
    if "resume" in typed:
        said.pop("epochs", None)  # which is of the last runs alone
    if not (out / "recipe.txt").is_file() or "data" in typed:
        for place, (name, words) in enumerate(runs):
            of_line = suited(parser.typed(words), said)
            flags = {"data": parser.defaults()["data"], **of_line, **said}
            if "seed" in of_line:  # models side by side differ, whatever seed is typed
                flags["seed"] = (of_line["seed"] + said.get("seed", 0)) % 2**32
            if flags["data"] != "shapes":  # from wherever it is resumed
                flags["data"] = str(Path(flags["data"]).resolve())
            runs[place] = name, as_words(flags)
        with atomic_write(out / "recipe.txt") as temporary:
            lines = [f"{name}: {shlex.join(words)}\n" for name, words in runs]
            temporary.write_text("".join(lines), "utf-8")
    ends = last_runs(runs, parser)
    for place, (name, words) in enumerate(runs, 1):
        print(f"run {place} of {len(runs)}: {name}", flush=True)
        may_change = OF_RECIPES | ({"epochs"} if name in ends else set())
        now = {flag: x for flag, x in typed.items() if flag in may_change}
        flags, earlier, folder = {**parser.typed(words), **now}, None, folder_of(name, ends, out)
        if flags.get("init") in dict(runs):
            flags["init"] = str(out / flags["init"])
        with owned(folder) if folder != out else nullcontext():
            if (folder / "last.pt").is_file():
                options, earlier = resumed(folder, now, parser)
            else:
                options = resolve(parser, flags, {})
                say_idle(options, flags, {})
            code = train(options, folder, earlier, out)
        if code:
            return code
    if len(ends) > 1:
        contents = [load_checkpoint(out / name / "best.pt") for name in ends]
        save_checkpoint(out / "best.pt", {"members": contents})
        print(f"wrote {out / 'best.pt'} ({' side by side with '.join(ends)})")
    return 0


def last_runs(runs: Recipe, parser: Parser) -> list[str]:
    """The runs of a recipe from which no other starts."""
    begun = {parser.typed(words).get("init") for _, words in runs}
    return [name for name, _ in runs if name not in begun]


def folder_of(name: str, ends: list[str], out: Path) -> Path:
    return out if [name] == ends else out / name


def go_on(typed: dict[str, Any], parser: Parser, train: Callable[..., int]) -> int:
    """--resume: the run, or the recipe, in a folder goes on. Raises UserError."""
    if not typed["resume"] and "out" not in typed:
        raise UserError("--resume needs the run's folder: --resume checkpoints/NAME")
    place = Path(typed["resume"] or typed["out"])
    if not place.exists():
        raise UserError(f"--resume: there is no {place}; name the folder of a run")

    def work(out: Path) -> int:
        if not (place / "recipe.txt").is_file():
            options, earlier = resumed(place, typed, parser)
            return train(options, out, earlier, out)
        if kept := typed.keys() - {*OF_RECIPES, "epochs", "out", "resume"}:
            flags = ", ".join(dashed(f"--{flag}") for flag in sorted(kept))
            raise UserError(f"--resume: the runs of a recipe keep their {flags}; leave it out")
        recipe = read_recipe(str(out / "recipe.txt"))
        if "data" in typed:
            check_moved(out, recipe, typed, parser)
        return run_recipe(recipe, out, parser, typed, train)

    return in_folder(place if place.is_dir() else place.parent, work)


def check_moved(out: Path, recipe: Recipe, typed: dict[str, Any], parser: Parser) -> None:
    """Raises UserError when the data of a recipe that is resumed with --data are others."""
    ends = last_runs(recipe, parser)
    for folder in (folder_of(name, ends, out) for name, _ in recipe):
        if (folder / "last.pt").is_file():
            flags = {flag: x for flag, x in typed.items() if flag in OF_RECIPES}
            options, earlier = resumed(folder, flags, parser)
            read_data(options, earlier)
            return


def resumed(place: Path, typed: dict[str, Any], parser: Parser) -> tuple[Namespace, dict[str, Any]]:
    """The options and the checkpoint of the run in a folder, or of a last.pt. Raises UserError."""
    path = place / "last.pt" if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"--resume: there is no {path}; no epoch of that run was finished")
    content = load_checkpoint(path)
    if "config" not in content:
        raise UserError(f"--resume: {path} holds several models; give the recipe's folder")
    # Some flags are younger than the run, and so is `epochs_before`.
    config = {**parser.defaults(), "epochs_before": 0, **content["config"]}
    wanted = vars(resolve(parser, typed, {**config, "init": None}))
    for flag in typed.keys() - MAY_CHANGE:
        if wanted[flag] != config[flag]:
            raise UserError(
                f"{dashed('--' + flag)} {typed[flag]} differs from the run's {config[flag]}; "
                "leave it out, or start a new run with another --out"
            )
    changed = {flag: x for flag, x in typed.items() if flag in MAY_CHANGE}
    if "data" in typed:  # which its content decides: see `read_data`
        changed["data"] = wanted["data"]
    options = Namespace(**{**config, **changed, "out": path.parent})
    device = choose_device(options.device)
    options.precision = precision_of(config["precision"], typed.get("precision", "auto"), device)
    for name, now, before in (
        ("device", device.type, content.get("device", device.type)),
        ("precision", options.precision, config["precision"]),
    ):
        if now != before:
            line = f"the run's --{name} was {before} and is now {now}: it ends in other bits"
            warn(f"{line} than it would have, and much the same figures")
    return options, content


def precision_of(before: str, typed: str, device: torch.device) -> str:
    """The precision in which a run goes on: its own, unless another is typed or the device's."""
    if typed != "auto":
        return choose_precision(typed, device)
    if before == "auto":
        return before
    try:
        return choose_precision(before, device)
    except UserError:  # fp16 on a CPU
        return choose_precision("auto", device)
