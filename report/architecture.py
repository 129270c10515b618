"""Draws figures/architecture.png: training two towers, and classes by their names.

`python report/architecture.py` needs no data: the boxes say what the code does.
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from support.command import HERE, Parser, run
from support.figures import GREEN, GREY, PALETTE, canvas, write

IMAGE, TEXT = PALETTE[0], PALETTE[3]
PALE = {IMAGE: "#d6e8f5", TEXT: "#fbe3d3", GREEN: "#bfe8da", GREY: "#f1f1f1"}
CELL = 0.68  # a cell's side; all places are in inches
VECTORS, MATRIX = 5.4, 6.2  # left edges: of the pictures' vectors, of the cosines
ABOVE = 1.8  # from the pictures' towers to those of the texts


def box(axes: Any, x: float, y: float, width: float, text: str, face: str, edge: str) -> None:
    """A rounded box, or with a white edge a square; `x` is its left edge, `y` its middle."""
    rounded = "round,pad=0,rounding_size=0.08"
    look, height = ("square,pad=0", CELL) if edge == "white" else (rounded, 0.84)
    corner = x, y - height / 2
    axes.add_patch(FancyBboxPatch(corner, width, height, look, fc=face, ec=edge, lw=1.5))
    axes.text(x + width / 2, y, text, ha="center", va="center", linespacing=1.35)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], hue: str) -> None:
    look = {"arrowstyle": "-|>", "color": hue, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, size=12, arrowprops=look)


def part(axes: Any, y: float, texts: str, pictures: str, heads: str, cosines: list[str]) -> None:
    """Texts and, at the height `y`, pictures, through their towers to vectors and cosines.

    `heads` are the texts' vectors, `cosines` a line a picture; a star marks the largest.
    """
    lower = (pictures, y, "image tower\nResNet18", IMAGE, VECTORS)
    upper = (texts, y + ABOVE, "text tower\nTransformer, LSTM", TEXT, MATRIX)
    for inputs, middle, tower, hue, end in (lower, upper):
        box(axes, 0, middle, 1.75, inputs, "white", GREY)
        box(axes, 2.05, middle, 1.6, tower, PALE[hue], hue)
        box(axes, 3.95, middle, 0.85, "linear\nlayer", PALE[hue], hue)
        arrow(axes, (1.75, middle), (2.05, middle), GREY)
        arrow(axes, (3.65, middle), (3.95, middle), GREY)
        arrow(axes, (4.8, middle), (end - 0.08, middle), hue)
    for j, text in enumerate(heads.split()):
        box(axes, MATRIX + j * CELL, y + ABOVE, CELL, text, PALE[TEXT], "white")
    for i, line in enumerate(cosines):
        middle = y + ((len(cosines) - 1) / 2 - i) * CELL
        picture, *row = line.split()
        box(axes, VECTORS, middle, CELL, picture, PALE[IMAGE], "white")
        for j, text in enumerate(row):
            face = PALE[GREEN if text[-1] == "*" else GREY]
            box(axes, MATRIX + j * CELL, middle, CELL, text.strip("*"), face, "white")


def draw(path: Path) -> None:
    """Draws the three parts. Raises UserError."""
    title = "Two towers, one space (after figure 1 of Radford et al. 2021)"
    footer = "t and v have unit length, so v·t is a cosine; sizes are the defaults for photographs"
    with canvas(path, 9.2, 8.1, title, footer) as (figure, _):
        axes = figure.subplots()
        axes.set(xlim=(-0.05, 9.05), ylim=(0.05, 8.15), aspect="equal")
        axes.axis("off")
        heading = {"size": 12, "weight": "bold"}

        axes.text(0, 7.85, "1  Training: a batch of N pairs", **heading)
        captions, pictures = "N captions\n“a dog runs in snow”", "their N pictures\n3 × 96 × 96"
        cosines = ["v1 v1·t1* v1·t2 … v1·tN", "v2 v2·t1 v2·t2* … v2·tN"]
        cosines += ["… … … …* …", "vN vN·t1 vN·t2 … vN·tN*"]
        part(axes, 5.35, captions, pictures, "t1 t2 … tN", cosines)
        note = "N × N cosines: InfoNCE wants each green one\nto win its row and its column"
        axes.text(VECTORS, 3.89, note, size=9, va="top")

        axes.text(0, 3.05, "2  Labels as prompts", **heading)
        axes.text(VECTORS, 3.05, "3  The nearest prompt wins", **heading)
        prompts, picture = "sea, dog, …, house:\n“a photo of a dog”", "one picture\n3 × 96 × 96"
        part(axes, 0.55, prompts, picture, "sea dog … house", ["v v·t v·t* … v·t"])
        winner = MATRIX + 1.5 * CELL
        arrow(axes, (winner, 0.94), (winner, 1.96), GREEN)
        axes.text(winner + 0.12, 1.45, "a photo of a dog", va="center")


def main(argv: list[str]) -> None:
    Parser(prog="architecture.py", description="Draws the two towers.").parse_args(argv)
    write(HERE / "report" / "figures" / "architecture.png", draw)


if __name__ == "__main__":
    run(main)
