"""How fast training and ranking are, against a course's plain loop and the machine's own limits.

    python report/benchmark.py --data Flickr8k --markdown benchmark.md

All are ratios from one run. The loop of train.py, the same towers on batches that lie in memory and
report/course_loop.py take turns, so that a change in the machine's speed meets all alike.
"""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from evaluate import retrieval_ranks
from report.products import seconds_of_products
from sources.pictures import decode_all
from support.command import UserError, atomic_write, number, output, run
from support.device import AUTOCAST, keep_memory, native_bf16
from support.precision import machine_in_words
from support.recipes import as_words, first_options
from support.remarks import describe
from support.results import write_json
from train import Run, begin, build_parser, train_epoch

TITLES = {  # figure -> what it says, and the aim
    "loop_images_per_second": ("train.py, images a second", ""),
    "memory_images_per_second": ("the same towers on batches in memory, images a second", ""),
    "decoding_images_per_second": ("pictures decoded a second (once, into the cache)", ""),
    "course_images_per_second": ("a course's plain loop in fp32, images a second", ""),
    "loop_over_memory": ("train.py / batches in memory", "0.95"),
    "fp32_over_course": ("train.py in fp32 / the course's loop", "1.3"),
    "bf16_over_course": ("train.py in bf16 / the course's loop", "2.5"),
    "products_over_loop": ("convolutions and matrix products alone, share of the loop", "0.8"),
    "ranks_over_product": ("ranks and recalls / one float32 product, time", "at most 1.5"),
}

# ------------------------------------------------------------------------------- the loops


def rate(trained: Run, turn: int, options: Namespace, in_memory: bool, precision: str) -> float:
    """Images a second of the loop; `in_memory`: when its batches lie there, augmented already."""
    trained.learner.autocast = AUTOCAST[precision]
    feed = trained.pairs["train"].batches(turn, options, trained.model.device)
    batches = islice(feed, options.batches)
    if in_memory:
        batches = list(batches)
    return train_epoch(trained, turn, options, batches)["images_per_second"]


def course_rate(argv: list[str]) -> float:
    """Images a second of the course's loop, in a process of its own."""
    words = [sys.executable, str(Path(__file__).with_name("course_loop.py")), *argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"course_loop.py: {done.stderr.strip()}")
    return float(done.stdout.split()[-1])


def decoding_rate(trained: Run, options: Namespace) -> float | None:
    """Files decoded a second, in --workers processes; None for built-in data, which has none."""
    dataset = trained.pairs["train"].dataset
    paths, since = dataset.paths[: options.pictures], time.perf_counter()
    decoded = sum(1 for _ in decode_all(paths, dataset.pixels.shape[1], options.workers))
    return decoded / (time.perf_counter() - since) if paths else None


def rates_in_turns(trained: Run, options: Namespace, course: list[str]) -> dict[str, np.ndarray]:
    """Images a second, a value a turn, of the loop, of batches in memory and of the course's."""
    kinds = {"fp32", options.precision} | ({"bf16"} if native_bf16() else set())
    ways: dict[str, Callable[[int], float]] = {
        name: lambda turn, name=name: rate(trained, turn, options, False, name) for name in kinds
    }
    ways["memory"] = lambda turn: rate(trained, turn, options, True, options.precision)
    if trained.pairs["train"].dataset.paths:
        ways["course"] = lambda turn: course_rate(course)
    for name in kinds:
        ways[name](1)  # the first steps allocate memory
    turns = [
        {name: way(turn) for name, way in ways.items()} for turn in range(1, options.turns + 1)
    ]
    return {name: np.array([turn[name] for turn in turns]) for name in ways}


def share_of_products(trained: Run, options: Namespace, loop: float) -> float | None:
    """What the products of a step take alone, as a share of the loop's time for as many images.

    None on a GPU, which goes on computing when a product's call is over.
    """
    if trained.model.device.type != "cpu":
        return None
    trained.learner.autocast = AUTOCAST[options.precision]
    feed = trained.pairs["train"].batches(1, options, trained.model.device)
    images = next(feed)
    seconds = seconds_of_products(lambda: train_epoch(trained, 1, options, [images]))
    return seconds / (len(images[0]) / loop)


# --------------------------------------------------------------------------------- ranking


def ranks_over_product(count: int, turns: int) -> float:
    """The time of all ranks over that of the bare product, `count` images with five captions."""
    generator, owner = np.random.default_rng(0), np.arange(5 * count) % count
    images = generator.normal(size=(count, 256)).astype(np.float32)
    texts = images[owner] + 3 * generator.normal(size=(len(owner), 256)).astype(np.float32)
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))

    def product() -> None:
        for rows in torch.from_numpy(images).split(1024):
            for columns in torch.from_numpy(texts).split(8192):
                rows @ columns.T

    def seconds(work: Callable[[], object]) -> float:
        since = time.perf_counter()
        work()
        return time.perf_counter() - since

    times = [
        (seconds(lambda: retrieval_ranks(images, texts, owner)), seconds(product))
        for _ in range(turns)
    ]
    ranks, bare = np.array(times).min(0)
    return float(ranks / bare)


# ------------------------------------------------------------------------------ the script


def table(figures: dict[str, float | None]) -> str:
    """The figures as a table in Markdown, with the machine in words."""
    lines = [
        f"{machine_in_words()}; torch {torch.__version__}, Python {sys.version.split()[0]}",
        "\n| measured | value | aim |\n|---|---|---|",
    ]
    for name, (title, aim) in TITLES.items():
        if figures[name] is not None:
            lines.append(f"| {title} | {figures[name]:.{1 if 'second' in name else 2}f} | {aim} |")
    return "\n".join(lines) + "\n"


def measure(trained: Run, options: Namespace, course: list[str]) -> dict[str, float | None]:
    """All figures; None for what this machine or these data do not have."""
    rates = rates_in_turns(trained, options, course)
    loop = rates[options.precision]

    def against_course(name: str) -> float | None:
        if name in rates and "course" in rates:
            return float(np.median(rates[name] / rates["course"]))
        return None

    return {
        "loop_images_per_second": float(np.median(loop)),
        "memory_images_per_second": float(np.median(rates["memory"])),
        "decoding_images_per_second": decoding_rate(trained, options),
        "course_images_per_second": float(np.median(rates["course"]))
        if "course" in rates
        else None,
        "loop_over_memory": float(np.median(loop / rates["memory"])),
        "fp32_over_course": against_course("fp32"),
        "bf16_over_course": against_course("bf16"),
        "products_over_loop": share_of_products(trained, options, float(np.median(loop))),
        "ranks_over_product": ranks_over_product(options.ranked, options.turns),
    }


def main(argv: list[str]) -> None:
    parser = build_parser()
    parser.prog, parser.description = "benchmark.py", __doc__.split("\n")[0]
    flag = parser.add_argument_group("benchmark").add_argument
    flag("--batches", type=number(int, 2, 100_000), default=15, help="of a turn")
    flag("--turns", type=number(int, 1, 1000), default=3, help="of all loops; medians are shown")
    flag("--pictures", type=number(int, 2, 10**6), default=2000, help="to decode")
    flag("--ranked", type=number(int, 2, 10**6), default=8000, help="images to rank")
    flag("--json", type=output, metavar="FILE", help="write the figures there too")
    flag("--markdown", type=output, metavar="FILE", help="and as a table")
    keep_memory()
    typed = parser.typed(argv)
    options = first_options(parser, typed)
    trained = begin(options)
    print(describe(trained, options))
    options.batches = min(options.batches, len(trained.pairs["train"].sampler(options)))
    figures = measure(trained, options, course_words(typed, options))
    for title, value in figures.items():
        print(f"{title:28}{'none' if value is None else f'{value:10.2f}'}")
    if options.json:
        write_json(options.json, {**figures, "batches": options.batches, "turns": options.turns})
    if options.markdown:
        with atomic_write(options.markdown) as temporary:
            temporary.write_text(table(figures), "utf-8")


def course_words(typed: dict[str, object], options: Namespace) -> list[str]:
    """The flags of the benchmark that the course's loop knows, as words."""
    alone = ("json", "markdown", "turns", "pictures", "ranked", "batches")
    known = {flag: value for flag, value in typed.items() if flag not in alone}
    return as_words({**known, "batches": max(3, options.batches)})


if __name__ == "__main__":
    run(main)
