"""How fast the training loop is, and whether its input holds it up: ratios from one run.

    python benchmark.py --data shapes

Trains a few batches as train.py does, then as many from memory (fetched and augmented before the
clock starts), in turns, so that a change in the machine's speed meets both alike.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cli import number, run, warn
from images import augment, decode_all

from dataset import Batch
from evaluate import write_json
from flags import build_parser, resolve
from models import image_towers, keep_memory
from train import Run, describe, prepare, train_epoch


def loop_rate(trained: Run, turn: int, batches: int) -> float:
    """Images a second of the whole loop: cache, augmentation, model, optimizer."""
    feed = trained.feed.epoch(turn, ahead=trained.config["workers"] > 0)
    return train_epoch(trained.trainer, turn, islice(feed, batches))["images_per_second"]


def memory_rate(trained: Run, turn: int, batches: int) -> float:
    """Images a second of the same loop when its batches lie in memory, augmented already."""
    trainer, config = trained.trainer, trained.config
    ready = []
    for batch in islice(trained.feed.epoch(turn, ahead=False), batches):
        if trainer.start:  # features, which are not augmented
            ready.append(batch)
            continue
        level, chance = config["image_augment"], torch.Generator().manual_seed(turn)
        images = augment(batch.images, config["image_size"], level, chance)
        pixels = (images.permute(0, 2, 3, 1) * 255).to(torch.uint8).contiguous()
        ready.append(Batch(pixels, batch.texts))
    trainer.config = {**config, "image_augment": "none"}
    try:
        return train_epoch(trainer, turn, ready)["images_per_second"]
    finally:
        trainer.config = config


def decoding_rate(trained: Run, pictures: int) -> float | None:
    """Files decoded a second, in --workers processes; None for built-in data, which has none."""
    paths, size = trained.dataset.paths[:pictures], trained.dataset.pixels.shape[1]
    started = time.perf_counter()
    done = sum(1 for _ in decode_all(paths, size, trained.config["workers"]))
    return done / (time.perf_counter() - started) if paths else None


def main(argv: list[str]) -> None:
    parser = build_parser()
    parser.prog, parser.description = "benchmark.py", __doc__.split("\n")[0]
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--batches", type=number(int, 2, 100_000), default=15, help="of a turn")
    flag("--turns", type=number(int, 1, 1000), default=3, help="of both loops; medians are told")
    flag("--pictures", type=number(int, 2, 10**6), default=2000, help="to decode")
    flag("--json", type=Path, metavar="FILE", help="write the figures there too")
    keep_memory()
    options = vars(parser.parse_args(argv))
    config = {**resolve(parser.typed(argv), parser.defaults()), "start_epochs": 0}
    first, *others = image_towers(config)
    if others:
        warn(f"of {config['image_tower']} the first is measured, {first['image_tower']}")
    config = first
    with tempfile.TemporaryDirectory() as out:
        trained = prepare(config, Path(out), options["cache"], None, options["device"])
    print(describe(trained))
    batches = min(options["batches"], trained.feed.batches())
    loop_rate(trained, 1, min(3, batches))  # the first steps allocate memory
    turns = range(1, options["turns"] + 1)
    rates = [[rate(trained, turn, batches) for rate in (loop_rate, memory_rate)] for turn in turns]
    loop, memory = np.array(rates).T
    figures: dict[str, Any] = {
        "loop_images_per_second": float(np.median(loop)),
        "memory_images_per_second": float(np.median(memory)),
        "decoding_images_per_second": decoding_rate(trained, options["pictures"]),
        "loop_over_memory": float(np.median(loop / memory)),
    }
    for title, value in figures.items():
        print(f"{title:28}{'none: built-in data' if value is None else f'{value:10.2f}'}")
    if options["json"]:
        write_json(options["json"], {**figures, "batches": batches, "turns": options["turns"]})


if __name__ == "__main__":
    run(main)
