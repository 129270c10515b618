"""A figure of rows of pictures and texts in columns. visualize.py fills it with what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from support.figures import GREY, INK, canvas, wrapped

CELL, LINE, GAP = 1.5, 0.17, 0.14  # inches
SIZE, MOST = 9, 40  # points of a text, and lines: whole captions, not whole books


class Cell(NamedTuple):
    """A picture, the lines under it and the colour of its frame."""

    picture: Image.Image
    note: str = ""
    frame: str | None = None


Texts = list[tuple[str, str]]  # each with its colour
Row = list[Cell | Texts | None]  # of a grid: what stands in each of its columns


class Column(NamedTuple):
    """How wide a column is in inches, and what stands above it; a picture's is CELL wide."""

    width: float = CELL
    head: str = ""


def lines_of(texts: Texts, inches: float) -> Texts:
    """Texts broken into lines that fit, each with its colour."""
    return [(line, hue) for text, hue in texts for line in wrapped(text, inches, SIZE, MOST)]


def height_of(entry: Cell | Texts | None) -> float:
    if isinstance(entry, Cell):
        return CELL + LINE * (1 + entry.note.count("\n") if entry.note else 0.3)
    return LINE * len(entry or ())


def draw_cell(figure: Figure, cell: Cell, x: float, top: float) -> None:
    """Draws a picture, framed where it has a frame; x and top in inches."""
    width, total = figure.get_size_inches()
    box = (x / width, (top - CELL) / total, CELL / width, CELL / total)
    axes = figure.add_axes(box, xticks=[], yticks=[], anchor="N")
    axes.imshow(cell.picture)
    for spine in axes.spines.values():
        spine.set(visible=bool(cell.frame), color=cell.frame or INK, linewidth=4)
    axes.set_xlabel(cell.note, size=8, labelpad=6, color=cell.frame or INK)


def write_lines(figure: Figure, texts: Texts, x: float, top: float, **style: Any) -> None:
    """Writes lines, the first at the top; x and top in inches."""
    width, total = figure.get_size_inches()
    for i, (line, hue) in enumerate(texts):
        y = (top - 0.04 - i * LINE) / total
        figure.text(x / width, y, line, color=hue, va="top", **{"size": SIZE, **style})


def draw_grid(path: Path, title: str, footer: str, columns: list[Column], rows: list[Row]) -> None:
    """Draws rows of pictures and whole texts under the heads of their columns. Raises UserError."""
    broken = [
        [
            entry if isinstance(entry, Cell) or not entry else lines_of(entry, column.width)
            for entry, column in zip(row, columns, strict=False)
        ]
        for row in rows
    ]
    heights = [max(map(height_of, row)) + GAP for row in broken]
    head = 0.3 if any(column.head for column in columns) else 0
    width = 0.3 + sum(column.width + GAP for column in columns)
    with canvas(path, width, sum(heights) + head, title, footer) as (figure, below):
        figure.set_layout_engine("none")
        top, places = below + sum(heights) + head, [0.15]
        for column in columns:
            write_lines(figure, [(column.head, GREY)], places[-1], top, style="italic")
            places.append(places[-1] + column.width + GAP)
        top -= head
        for row, height in zip(broken, heights, strict=True):
            for entry, x in zip(row, places, strict=False):
                if isinstance(entry, Cell):
                    draw_cell(figure, entry, x, top)
                else:
                    write_lines(figure, entry or [], x, top)
            top -= height
