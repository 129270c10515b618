"""Runs the assignment's table of single changes: each line of report/changes.txt, with three seeds.

    python report/changes.py --data Flickr8k             # ten minutes a run on 2 cores
    python report/changes.py --data Flickr8k --only base sigmoid
    python report/tables.py                              # then: table and chart

A row of report/runs.csv is written after each run; what it has already is not run again, so that
calling this again goes on. The figures are those of dev, in the epoch that best.pt is kept of.
"""

import csv
import datetime
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from support.checkpoint import VERSION, best_epoch, load_checkpoint
from support.command import HERE, Parser, UserError, number, run
from support.precision import machine_in_words
from support.recipes import read_recipe
from support.results import read_csv

RUNS = HERE / "report" / "runs.csv"
PREFIX = "change: "  # of a run's name there, before that of its line
FLICKR8K = 6000, 1000  # images of train and of dev: the table's


def run_once(words: list[str], seed: int, options: list[str]) -> dict[str, object]:
    """Trains in a folder that is deleted again; the best epoch's record and the run's minutes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(HERE / "train.py"), *words, *options]
        done = subprocess.run([*command, "--seed", str(seed), "--out", str(out)], check=False)
        if done.returncode:
            raise UserError(f"{shlex.join(words)} ended with {done.returncode}; see above")
        content = load_checkpoint(out / "last.pt")
        history = content["history"]
        images = content["train_images"], content["split_images"]["dev"]
        if (sizes := tuple(len(part["names"]) for part in images)) != FLICKR8K:
            raise UserError(f"--data has {sizes} images of train and dev, and is not Flickr8k")
        return {**best_epoch(history), "minutes": history[-1]["minutes"]}


def row_of(record: dict, name: str, change: str, command: str, seed: int) -> dict[str, str]:
    """A run's row for report/runs.csv."""
    commit = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    ways = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    return {
        **{"run": f"{PREFIX}{name}", "group": "changes", "change": change, "changes": "1"},
        **{"command": command, "data": "Flickr8k", "split": "dev", "pool": str(FLICKR8K[1])},
        **{"seed": str(seed), "version": str(VERSION), "date": f"{datetime.date.today()}"},
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "machine": machine_in_words(),
        "minutes": f"{record['minutes']:.1f}",
        **{way: f"{record[way]:.1f}" for way in ways},
        "mean_recall": f"{record['mean_recall']:.2f}",
    }


def append(row: dict[str, str]) -> None:
    """Adds a row in one write, so that several programs may do so."""
    with RUNS.open(newline="", encoding="utf-8") as file:
        heads = next(csv.reader(file))
    with RUNS.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, heads, restval="", lineterminator="\n").writerow(row)


def main(argv: list[str]) -> None:
    lines = dict(read_recipe(str(Path(__file__).with_suffix(".txt"))))
    parser = Parser(prog="changes.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="Flickr8k", help="folder of Flickr8k")
    parser.add_argument("--cache", default=str(HERE / ".cache"), help="folder of decoded images")
    parser.add_argument("--seeds", type=number(int, 2, 100), default=3, help="of each line")
    text = "of changes.txt, as base or sigmoid (default: all)"
    parser.add_argument("--only", nargs="+", metavar="LINE", choices=lines, help=text)
    options = parser.parse_args(argv)
    done = 0
    for name in options.only or lines:
        words = lines["base"] + (lines[name] if name != "base" else [])
        for seed in range(options.seeds):
            known = {(row["run"], row["seed"]) for row in read_csv(RUNS)}
            if (f"{PREFIX}{name}", str(seed)) in known:
                continue
            print(f"{name}, seed {seed}: {shlex.join(words)}", flush=True)
            record = run_once(words, seed, ["--data", options.data, "--cache", options.cache])
            command = shlex.join(["python", "train.py", *words])
            change = shlex.join(lines[name])
            append(row_of(record, name, change, command, seed))
            done += 1
    print(f"wrote {RUNS}: {done} new rows; python report/tables.py makes the pages' table of it")


if __name__ == "__main__":
    run(main)
