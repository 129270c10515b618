"""Makes the split that flatters: by caption line, so that test pictures are training pictures too.

    python report/leak.py --data Flickr8k --out leak
    python train.py --recipe plain --data leak --splits given --out checkpoints/leak
    python train.py --recipe plain --data Flickr8k --out checkpoints/honest
    python evaluate.py checkpoints/leak/best.pt                           # and the other

The folder --out has a tenth of the lines for val and for test, drawn by lot, the rest for train,
and links to the pictures, no copies. dataset.py refuses such a split unless --splits given asks for
it, and marks every figure. So that both searches are among as many, val and test keep the lines of
--pool pictures: a query's chance of a hit is one in --pool in both directions, as by image.
"""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from sources.layouts import Captions, read_folder
from sources.reading import Row
from support.command import Parser, UserError, atomic_write, number, run


def usable(captions: Captions) -> tuple[list[Row], dict[str, Path]]:
    """The lines with a caption and a picture, and where each picture lies by its name."""
    rows, paths, pictures = [], {}, captions.reading.pictures
    for row in captions.rows:
        path = pictures.find(row.image, row.place)
        if row.caption and path:
            rows.append(row._replace(image=pictures.name(path)))
            paths[pictures.name(path)] = path
    return rows, paths


def split_lines(rows: list[Row], pool: int, seed: int) -> dict[str, list[Row]]:
    """Lines by lot, a tenth each for val and test; of those two the lines of `pool` pictures.

    Raises UserError where ten lines are lacking.
    """
    if len(rows) < 10:
        raise UserError(f"{len(rows)} captions are too few to split; 10 are needed")
    random, tenth = np.random.default_rng(seed), len(rows) // 10
    order, parts = random.permutation(len(rows)), {}
    for name, lines in (("val", order[:tenth]), ("test", order[tenth : 2 * tenth])):
        images = sorted({rows[i].image for i in lines})
        kept = {images[i] for i in random.permutation(len(images))[: pool or None]}
        parts[name] = [rows[i] for i in sorted(lines) if rows[i].image in kept]
    parts["train"] = [rows[i] for i in sorted(order[2 * tenth :])]
    return parts


def write_folder(out: Path, parts: dict[str, list[Row]], pictures: dict[str, Path]) -> None:
    """Writes the course's layout: three files of captions, and links in images/. UserError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; delete it or name another --out")
    try:
        (out / "images").mkdir(parents=True)
        for name in sorted({row.image for rows in parts.values() for row in rows}):
            link = out / "images" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(pictures[name].resolve())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    for split, rows in parts.items():
        path = out / f"{split}_captions.txt"
        with atomic_write(path) as temporary, temporary.open("w", 1, "utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("image", "caption"))
            table.writerows((row.image, row.caption) for row in rows)


def main(argv: list[str]) -> None:
    parser = Parser(prog="leak.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("Flickr8k"), help="captions and pictures")
    parser.add_argument("--out", type=Path, default=Path("leak"), help="folder to make")
    text = "pictures of val and of test; 0: all that a line of theirs shows"
    parser.add_argument("--pool", type=number(int, 0, 10**6), default=1000, help=text)
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the lot")
    options = parser.parse_args(argv)
    try:
        captions = read_folder(options.data)
    except OSError as error:
        raise UserError(f"cannot read {options.data}: {error.strerror}") from error
    rows, pictures = usable(captions)
    parts = split_lines(rows, options.pool, options.seed)
    write_folder(options.out, parts, pictures)
    trained = {row.image for row in parts["train"]}
    tested = {row.image for row in parts["test"]}
    print(f"{options.data}: {captions.described}, {len(rows):,} lines with a picture")
    for split in ("train", "val", "test"):
        images = {row.image for row in parts[split]}
        print(f"  {split}: {len(parts[split]):,} lines of {len(images):,} pictures")
    print(f"{len(tested & trained):,} of {len(tested):,} test pictures are trained on too")
    print(f"wrote {options.out}; train.py --data {options.out} --splits given")


if __name__ == "__main__":
    run(main)
