"""A figure of rows of pictures with texts beside them. visualize.py fills it with what it found."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from support.figures import INK, canvas, wrapped

CELL, LINE, GAP = 1.5, 0.19, 0.14  # inches


class Cell(NamedTuple):
    """A picture, the lines under it and the colour of its frame."""

    picture: Image.Image
    note: str = ""
    frame: str | None = None


Row = tuple[list[tuple[str, str]], list[Cell]]  # of a grid: texts, each with its colour; cells


def draw_grid(path: Path, title: str, footer: str, rows: list[Row], left: bool = True) -> None:
    """Draws rows of pictures; the texts stand left of them, or right, of one line each."""
    inches, most = (2.6, 5) if left else (7.5, 1)
    pictures = max(len(cells) for _, cells in rows) * (CELL + GAP)
    notes = max(1 + cell.note.count("\n") for _, cells in rows for cell in cells)
    blocks = [
        [(line, hue) for text, hue in texts for line in wrapped(text, inches, 9, most)]
        for texts, _ in rows
    ]
    heights = [max(CELL + notes * LINE, len(block) * LINE) + GAP for block in blocks]
    text_x, cells_x = (0.15, 0.15 + inches + GAP) if left else (0.15 + pictures, 0.15)
    width = 0.3 + inches + GAP + pictures
    with canvas(path, width, sum(heights), title, footer) as (figure, below):
        figure.set_layout_engine("none")
        top, total = below + sum(heights), figure.get_figheight()
        for block, (_, cells), height in zip(blocks, rows, heights, strict=True):
            for i, (line, hue) in enumerate(block):
                y = (top - 0.05 - i * LINE) / total
                figure.text(text_x / width, y, line, size=9, color=hue, va="top")
            for i, cell in enumerate(cells):
                x = (cells_x + i * (CELL + GAP)) / width
                box = (x, (top - CELL) / total, CELL / width, CELL / total)
                axes = figure.add_axes(box, xticks=[], yticks=[], anchor="N")
                axes.imshow(cell.picture)
                for spine in axes.spines.values():
                    spine.set(visible=bool(cell.frame), color=cell.frame or INK, linewidth=4)
                axes.set_xlabel(cell.note, size=8, labelpad=6, color=cell.frame or INK)
            top -= height
