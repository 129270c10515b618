"""Around a run: its data and model, its files, its end, and memory that does not suffice.

train.py calls these around its loop; support/recipes.py goes through lists of runs.
"""

from __future__ import annotations

import contextlib
import csv
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset import CaptionedImages, Tokenizer, image_transform, load_dataset
from models import CLIP, TEXT_TOWERS, build_model, model_from_checkpoint
from support.checkpoint import best_epoch, dev_size, fill_from, load_checkpoint
from support.command import UserError, atomic_write, later, out_of_memory, say_unused, warn
from support.options import checkpoint_in

# ---------------------------------------------------------------------------- a run's folder


def write_history(
    out: Path, history: list[dict[str, float]], footer: str, images: int, batch: int
) -> None:
    """Writes history.csv and draws curves.png; one that another program has open stays as it is.

    Dev holds `images`, measured in batches of `batch`: from them follows what chance gives.
    """

    def write_table(path: Path) -> None:
        with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(history[0]))
            writer.writeheader()
            writer.writerows(history)

    def draw(path: Path) -> None:
        name = later("support.origin", "run_name")(out)
        later("support.figures", "draw_curves")(path, history, footer, name, images, batch)

    for path, write in ((out / "history.csv", write_table), (out / "curves.png", draw)):
        try:
            write(path)
        except UserError as error:
            if not isinstance(error.__cause__, PermissionError):
                raise
            warn(f"{error}; is it open elsewhere? The next epoch, or --resume, tries again")


def complete(out: Path, home: Path, earlier: dict[str, Any]) -> int:
    """What there is to do for a finished run: it may have been stopped before its last file."""
    images, batch = dev_size(earlier), earlier["config"]["batch_size"]
    write_history(out, earlier["history"], earlier.get("origin", ""), images, batch)
    further = "; --epochs N goes further" if home == out else ""
    print(f"{out}: this run is finished after {earlier['epoch']} epochs{further}")
    return 0


def write_config(path: Path, config: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


@contextlib.contextmanager
def fitting(options: Namespace) -> Iterator[None]:
    """Too little memory, of the machine or its GPU, in one line."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        what = f"--batch-size {options.batch_size} at --image-size {options.image_size}"
        each = f" with --captions-per-image {options.captions_per_image}"
        each = each if options.captions_per_image > 1 else ""
        raise UserError(
            f"out of memory: {what}{each} does not fit; lower one of them, or take a smaller "
            "tower; what was saved last is intact"
        ) from error


def is_finished(history: list[dict[str, float]], options: Namespace) -> bool:
    """All epochs done, or --patience of them without a better mean recall on dev."""
    if not history or not options.patience or len(history) >= options.epochs:
        return len(history) >= options.epochs
    best = best_epoch(history)
    return history[-1]["epoch"] - best["epoch"] >= options.patience


# ----------------------------------------------------------------------- model and checkpoint


def read_data(options: Namespace, earlier: dict[str, Any] | None) -> CaptionedImages:
    """The data of a run, and a line about it. Raises UserError when it has changed since."""
    size, cache, workers = image_transform(options)["stored_size"], options.cache, options.workers
    try:
        dataset = load_dataset(options.data, options.splits, size, cache, workers, options.titles)
    except UserError as error:
        if not earlier or Path(options.data).exists():
            raise
        hint = "if it has moved: --resume ... --data PATH"
        raise UserError(f"the run's data {options.data} is not there; {hint}") from error
    print(dataset.summary())
    if options.titles != "hide" and not dataset.records:
        warn(f"no effect on this run: --titles {options.titles} (the data are no films)")
    if earlier and dataset.fingerprint != earlier["fingerprint"]:
        what = "--resume: the data has changed since"
        if options.data != earlier["config"]["data"]:
            what = f"--data {options.data} differs from the run's data"
        raise UserError(
            f"{what} (fingerprint {dataset.fingerprint}, the run's is {earlier['fingerprint']}); "
            "give the run's own, or start a new run"
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
    fresh = ["image_tower", "text_tower"]
    if init:
        fresh = fill_from(model, init, options.init)
        brought = ("temperature", "min_count") if same_text else ("temperature",)
        typed = {x for x in brought if getattr(options, x) != before.get(x, getattr(options, x))}
        say_unused(typed, brought, "--init brings its own")
    warn_of_random_towers(options, fresh)
    return model


def warn_of_random_towers(options: Namespace, fresh: list[str]) -> None:
    """Says which towers keep random weights to the end; `fresh` ones lack some of --init's."""
    towers = (
        ("image_tower", options.image_weights, options.train_image, "--train-image 0"),
        ("text_tower", options.text_weights, options.train_text, "--train-text 0"),
    )
    for name, weights, learning, typed in towers:
        if name in fresh and weights == "none" and not learning:
            then = "give --init a run that has learned the same one, or leave that flag out"
            warn(f"{name} has random weights and {typed} keeps them; {then}")
