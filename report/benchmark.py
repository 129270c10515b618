"""How fast the training loop is, and whether its input holds it up: ratios from one run.

    python report/benchmark.py --data shapes

Trains a few batches as train.py does, then as many from memory (fetched and augmented before the
clock starts), in turns, so that a change in the machine's speed meets both alike.
"""

import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from sources.pictures import decode_all
from support.command import number, output, run
from support.device import keep_memory
from support.options import resolve
from support.recipes import read_recipe
from support.remarks import describe
from support.results import write_json
from train import Run, begin, build_parser, train_epoch


def rate(trained: Run, turn: int, options: Namespace, in_memory: bool) -> float:
    """Images a second of the loop; `in_memory`: when its batches lie there, augmented already."""
    feed = trained.pairs["train"].batches(turn, options, trained.model.device)
    batches = islice(feed, options.batches)
    if in_memory:
        batches = list(batches)
    return train_epoch(trained, turn, options, batches)["images_per_second"]


def decoding_rate(trained: Run, options: Namespace) -> float | None:
    """Files decoded a second, in --workers processes; None for built-in data, which has none."""
    dataset = trained.pairs["train"].dataset
    paths, since = dataset.paths[: options.pictures], time.perf_counter()
    decoded = sum(1 for _ in decode_all(paths, dataset.pixels.shape[1], options.workers))
    return decoded / (time.perf_counter() - since) if paths else None


def main(argv: list[str]) -> None:
    parser = build_parser()
    parser.prog, parser.description = "benchmark.py", __doc__.split("\n")[0]
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--batches", type=number(int, 2, 100_000), default=15, help="of a turn")
    flag("--turns", type=number(int, 1, 1000), default=3, help="of both loops; medians are shown")
    flag("--pictures", type=number(int, 2, 10**6), default=2000, help="to decode")
    flag("--json", type=output, metavar="FILE", help="write the figures there too")
    keep_memory()
    typed = parser.typed(argv)
    recipe = read_recipe(typed.get("recipe", "assignment"))
    options = resolve(parser, typed, parser.typed(recipe[0][1]))
    trained = begin(options)
    print(describe(trained, options))
    options.batches = min(options.batches, len(trained.pairs["train"].sampler(options)))
    rate(trained, 1, options, in_memory=False)  # the first steps allocate memory
    turns = range(1, options.turns + 1)
    rates = [[rate(trained, turn, options, where) for where in (False, True)] for turn in turns]
    loop, memory = np.array(rates).T
    figures = {
        "loop_images_per_second": float(np.median(loop)),
        "memory_images_per_second": float(np.median(memory)),
        "decoding_images_per_second": decoding_rate(trained, options),
        "loop_over_memory": float(np.median(loop / memory)),
    }
    for title, value in figures.items():
        print(f"{title:28}{'none: built-in data' if value is None else f'{value:10.2f}'}")
    if options.json:
        write_json(options.json, {**figures, "batches": options.batches, "turns": options.turns})


if __name__ == "__main__":
    run(main)
