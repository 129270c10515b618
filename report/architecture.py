"""Draws figures/architecture.png: training two towers, and classes by their names.

`python report/architecture.py` needs no data: the boxes say what the code does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a script of a folder finds the project above it

from support.command import Parser, run  # noqa: E402
from support.figures import GREEN, GREY, INK, PALETTE, canvas, write  # noqa: E402

IMAGE, TEXT = PALETTE[0], PALETTE[3]
PALE = {IMAGE: "#d6e8f5", TEXT: "#fbe3d3", GREEN: "#bfe8da", GREY: "#f1f1f1"}
CELL, STEP, LEFT = 0.68, 1.8, 6.2  # a cell's side, between rows of boxes, the matrix; inches


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, hue: str) -> None:
    """A rounded box, its lower left corner at (x, y) inches, with its text in the middle."""
    face = PALE[hue] if hue != GREY else "white"
    look = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 1.3}
    axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=face, edgecolor=hue, **look))
    middle = x + width / 2, y + height / 2
    axes.text(*middle, text, ha="center", va="center", size=10, color=INK, linespacing=1.35)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], hue: str = GREY) -> None:
    """A straight arrow between two points, inches."""
    look = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=hue, linewidth=1.3, **look))


def cell(axes: Any, x: float, y: float, text: str, hue: str) -> None:
    """One square of a vector or of the matrix, its lower left corner at (x, y)."""
    axes.add_patch(Rectangle((x, y), CELL, CELL, facecolor=PALE[hue], edgecolor="white", lw=2))
    axes.text(x + CELL / 2, y + CELL / 2, text, ha="center", va="center", size=10, color=INK)


def encoders(axes: Any, y: float, texts: str, pictures: str) -> None:
    """Two rows of boxes, from inputs to the common space; `y` is the lower row's middle."""
    upper = (y + STEP, texts, "text tower\nTransformer, LSTM", TEXT)
    for middle, content, tower, hue in (upper, (y, pictures, "image tower\nResNet18", IMAGE)):
        box(axes, 0, middle - 0.42, 1.75, 0.84, content, GREY)
        box(axes, 2.05, middle - 0.42, 1.6, 0.84, tower, hue)
        box(axes, 3.95, middle - 0.42, 0.85, 0.84, "linear\nlayer", hue)
        arrow(axes, (1.75, middle), (2.05, middle))
        arrow(axes, (3.65, middle), (3.95, middle))


def training(axes: Any, y: float) -> None:
    """Part 1: a batch through both towers, and the matrix of all its pairs, above `y`."""
    axes.text(0, y + 4.0, "1  Training: a batch of N pairs", size=12, weight="bold")
    middle = y + 1.5
    encoders(axes, middle, "N captions\n“a dog runs in snow”", "their N pictures\n3 × 96 × 96")
    arrow(axes, (4.8, middle + STEP), (LEFT - 0.08, middle + STEP), TEXT)
    arrow(axes, (4.8, middle), (LEFT - CELL - 0.2, middle), IMAGE)
    numbers = ("1", "2", "…", "N")
    for i, number in enumerate(numbers):
        row = middle + (1 - i) * CELL
        cell(axes, LEFT + i * CELL, middle + STEP - CELL / 2, f"t{number}".replace("t…", "…"), TEXT)
        cell(axes, LEFT - CELL - 0.12, row, f"v{number}".replace("v…", "…"), IMAGE)
        for j, other in enumerate(numbers):
            text = "…" if "…" in (number, other) else f"v{number}·t{other}"
            cell(axes, LEFT + j * CELL, row, text, GREEN if i == j else GREY)
    note = "N × N cosines: InfoNCE wants each green one\nto win its row and its column"
    axes.text(LEFT - CELL - 0.12, middle - 2 * CELL - 0.1, note, size=9, color=INK, va="top")


def classes(axes: Any, y: float) -> None:
    """Parts 2 and 3: names become prompts, and a picture belongs to the nearest, above `y`."""
    axes.text(0, y + 3.05, "2  Labels as prompts", size=12, weight="bold")
    axes.text(LEFT - CELL - 0.12, y + 3.05, "3  The nearest prompt wins", size=12, weight="bold")
    middle = y + 0.55
    encoders(axes, middle, "sea, dog, …, house:\n“a photo of a dog”", "one picture\n3 × 96 × 96")
    arrow(axes, (4.8, middle + STEP), (LEFT - 0.08, middle + STEP), TEXT)
    arrow(axes, (4.8, middle), (LEFT - CELL - 0.2, middle), IMAGE)
    cell(axes, LEFT - CELL - 0.12, middle - CELL / 2, "v", IMAGE)
    for i, name in enumerate(("sea", "dog", "…", "house")):
        x, product = LEFT + i * CELL, "…" if name == "…" else "v·t"
        cell(axes, x, middle + STEP - CELL / 2, name, TEXT)
        cell(axes, x, middle - CELL / 2, product, GREEN if name == "dog" else GREY)
    x = LEFT + 1.5 * CELL
    arrow(axes, (x, middle + CELL / 2 + 0.05), (x, middle + STEP - CELL / 2 - 0.05), GREEN)
    axes.text(x + 0.12, middle + STEP / 2, "a photo of a dog", size=10, va="center", color=INK)


def draw(path: Path) -> None:
    """Draws the three parts. Raises UserError."""
    title = "Two towers, one space (after figure 1 of Radford et al. 2021)"
    footer = "t and v have unit length, so v·t is a cosine; sizes are the defaults for photographs"
    with canvas(path, 9.2, 8.1, title, footer) as (figure, _):
        axes = figure.subplots()
        axes.set(xlim=(-0.05, 9.05), ylim=(0.05, 8.15), aspect="equal")
        axes.axis("off")
        training(axes, 3.85)
        classes(axes, 0)


def main(argv: list[str]) -> None:
    Parser(prog="architecture.py", description="Draws the two towers.").parse_args(argv)
    write(HERE / "figures" / "architecture.png", draw)


if __name__ == "__main__":
    run(main)
