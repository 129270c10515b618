"""The one style of every figure: colours, a canvas with title and footer, text that fits.

train.py draws its curves with it after each epoch; visualize.py, posters/ and report/ the rest.
"""

import contextlib
import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from sources.opening import EXTENSIONS
from support.checkpoint import best_epoch
from support.command import atomic_write, warn

# Okabe and Ito's colours, which colour-blind readers tell apart too.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442"]
# And Tol's ten for classes. Markers, lines and hatches tell apart what greyscale does not.
TEN = ["#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677", "#44AA99", "#882255", "#999933"]
TEN += ["#AA4499", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p"]
LINES = ["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)), ":"]
HATCHES = ["", "////", "....", "xxxx"]
GREEN, RED, GREY, INK = PALETTE[2], PALETTE[3], "#777777", "#222222"
STYLE = {
    "font.family": ["DejaVu Sans"],  # and what `find_fonts` adds
    "font.size": 10,
    "axes.titlesize": 11,
    "text.color": INK,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE) + matplotlib.cycler(linestyle=LINES),
    "image.cmap": "viridis",
    "lines.markersize": 4,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a caption with two $ is no formula
    "text.usetex": False,
}
WIDE = "\ue000"  # stands behind a letter that is as wide as two; no font has it
BOXES = ("last resort", "color emoji")  # fonts of boxes, and of pictures that Agg cannot draw


@lru_cache
def letters_of(file: str) -> frozenset[int]:
    """The letters that a font file holds; none where it cannot be used."""
    try:
        font = get_font(file)
        return frozenset(font.get_charmap() if font.scalable else ())
    except (OSError, RuntimeError):
        return frozenset()


DRAWN = {*letters_of(findfont("DejaVu Sans"))}  # by the fonts of STYLE; this comes with matplotlib
MISSING: set[int] = set()  # no installed font has them
SAID: set[str] = set()  # the fonts that would


def find_fonts(text: str) -> None:
    """Adds to STYLE the installed fonts that have what DejaVu lacks; says which one to install."""
    lacking = {*map(ord, text)} - DRAWN - MISSING
    for font in sorted(fontManager.ttflist, key=preference) if lacking else ():
        if letters_of(font.fname) & lacking and not any(x in font.name.lower() for x in BOXES):
            STYLE["font.family"] = [*STYLE["font.family"], font.name]
            DRAWN.update(letters_of(font.fname))
            lacking -= DRAWN
        if not lacking:
            return
    MISSING.update(lacking)
    needed = {font_for(chr(letter)) for letter in lacking} - SAID
    if needed:
        shown = f"U+{min(lacking):04X}"  # not the letter, which a console may lack as well
        warn(
            f"letters such as {shown} are drawn as boxes: no installed font has them; install "
            f"{' and '.join(sorted(needed))}"
        )
        SAID.update(needed)


def preference(font: FontEntry) -> tuple[bool, ...]:
    """Sorts plain fonts first, then those without serifs."""
    plain = font.style == "normal" and font.weight in (400, "normal", "regular")
    return not plain, "sans" not in font.name.lower(), "cjk" not in font.name.lower()


def font_for(letter: str) -> str:
    """The name of a free font that has a letter."""
    script, kind = unicodedata.name(letter, "").split(" ")[0], unicodedata.category(letter)
    if kind[0] == "S":
        return "Noto Emoji"
    if unicodedata.east_asian_width(letter) in "WFH":
        return "Noto Sans CJK (Debian and Ubuntu: fonts-noto-cjk)"
    return f"Noto Sans {script.title()}".strip()


def wrapped(text: str, inches: float, size: float, lines: int = 4) -> list[str]:
    """Breaks `text` into at most `lines` lines, `inches` wide at `size` points; "…" ends a cut."""
    # No control characters, and a box for what fonts lack: matplotlib would warn of both.
    printable = (c for c in " ".join(text.split()) if unicodedata.category(c)[0] != "C")
    text = unicodedata.normalize("NFC", "".join(printable))
    text = re.sub(r" (?=[.,;:!?](?: |$))", "\u00a0", text)  # " ." never begins a line
    find_fonts(text)
    plain = "".join(c if ord(c) in DRAWN else "□" for c in text)
    plain = "".join(c + WIDE * (unicodedata.east_asian_width(c) in "WF") for c in plain)
    width = max(8, int(inches * 72 / (0.56 * size)))  # DejaVu's letters are some 0.56 em wide
    if lines == 1:  # cut within a word too: it may be a file's name
        rows = [plain if len(plain) <= width else f"{plain[: width - 2]} …"]
    else:
        rows = textwrap.wrap(plain, width, max_lines=lines, placeholder=" …") or [""]
    return [row.replace(WIDE, "") for row in rows]


def fitting(name: str, inches: float, size: float) -> str:
    """A file's name or a title in one line: of a path that is too long the end."""
    shown, is_path = wrapped(name, inches, size, 1)[0], Path(name).suffix.lower() in EXTENSIONS
    return wrapped(name[::-1], inches, size, 1)[0][::-1] if shown[-1:] == "…" and is_path else shown


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float, title: str, footer: str) -> Iterator[Any]:
    """Yields (figure, inches below its body), then writes it to `path` as PNG. Raises UserError.

    The body, `width` x `height` inches, lies between title and footer. No pyplot: nothing global.
    """
    titles, notes = wrapped(title, width - 0.3, 12), wrapped(footer, width - 0.3, 8)
    below = 0.15 + 0.15 * len(notes)
    total = below + height + 0.22 + 0.21 * len(titles)
    with matplotlib.rc_context(STYLE):
        figure, x = Figure((width, total), layout="constrained"), 0.15 / width
        figure.get_layout_engine().set(rect=(0.01, below / total, 0.98, height / total))
        figure.text(x, 1 - 0.1 / total, "\n".join(titles), va="top", size=12)
        figure.text(x, 0.08 / total, "\n".join(notes), va="bottom", size=8, color=GREY)
        yield figure, below
        for text in figure.findobj(Text):  # fonts may have been found since it was made
            text.set_fontfamily(STYLE["font.family"])
        matplotlib.rcParams["font.family"] = STYLE["font.family"]
        with atomic_write(path) as temporary:  # Agg cannot draw 65,536 pixels or more
            figure.savefig(temporary, format="png", dpi=min(120, 30_000 / max(width, total)))


def write(path: Path, draw: Callable[..., None], *content: Any) -> None:
    """Calls `draw(path, *content)` and prints what was written. Raises UserError."""
    draw(path, *content)
    print(f"wrote {path}")


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Puts the legend between an axes' title and its lines, none of which it hides."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(columns, len(labels)))
    order = [i for first in range(columns) for i in range(first, len(labels), columns)]  # by rows
    shown = [handles[i] for i in order], [labels[i] for i in order]
    axes.set_title(axes.get_title(), pad=8 + 13 * -(-len(labels) // columns))
    style = {"frameon": False, "borderaxespad": 0.2, "borderpad": 0, "columnspacing": 1.2}
    axes.legend(*shown, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, **style)


def name_bars(axes: Axes, names: list[str], measured: str) -> None:
    """Names beside lying bars, the first on top; `measured` is what their lengths mean."""
    axes.set_yticks(range(len(names)), names, size=10)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(measured)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)


def draw_chance(axes: Axes, value: float, label: str) -> None:
    """A dotted line at what guessing gives, and room for it."""
    axes.axhline(value, color=GREY, linestyle=":", linewidth=1.5, label=label)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * value))


def plot_epochs(axes: Axes, history: list[dict[str, float]], curves: dict[str, str]) -> None:
    """Lines over epochs from 0 up, {label: key of the records}; their legend is not drawn yet."""
    epochs = [record["epoch"] for record in history]
    for (label, key), marker in zip(curves.items(), MARKERS, strict=False):
        values = [record[key] for record in history]
        axes.plot(epochs, values, marker=marker, label=label, clip_on=False)
    axes.set(xlabel="epoch", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.grid(True)


def draw_curves(
    path: Path, history: list[dict[str, float]], footer: str, name: str, images: int, batch: int
) -> None:
    """Draws losses and recalls over epochs; `history` holds a record an epoch. Raises UserError.

    name: the run's; images: of dev, measured in batches of `batch`, 0 if it is not known: what
    guessing gives of 1,000 images is R@10 = 1%, and a loss of ln(batch).
    """
    best = best_epoch(history)
    panels = {
        "Loss": {"train": "train_loss", "dev": "dev_loss"},
        "Mean recall on dev": {"mean of six": "mean_recall"},
        "Image to text on dev": {f"R@{k}": f"i2t_r{k}" for k in (1, 5, 10)},
        "Text to image on dev": {f"R@{k}": f"t2i_r{k}" for k in (1, 5, 10)},
    }
    title = f"best epoch {best['epoch']}, mean recall on dev {best['mean_recall']:.1f}%"
    title = f"{name or 'Training'}: {title}"
    highest = max(record[f"{way}_r10"] for record in history for way in ("i2t", "t2i"))
    with canvas(path, 9.5, 6.6, title, footer) as (figure, _):
        for axes, (name, curves) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            plot_epochs(axes, history, curves)
            unit = "loss (dev: InfoNCE, nats)" if name == "Loss" else "recall (%)"
            span = history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5
            axes.set(title=name, ylabel=unit, xlim=span)
            if "R@10" in curves:  # both directions on one scale
                axes.set_ylim(0, max(1.0, 1.08 * highest))
            if images and name == "Loss":
                chance = math.log(images / -(-images // batch))
                draw_chance(axes, chance, f"chance: {chance:.2f}")
            elif images:  # of R@10 alone: those of R@1 and R@5 lie between it and 0
                at_10 = [min(100, 100 * k / images) for k in (1, 5, 10)]
                chance = at_10[-1] if "R@10" in curves else sum(at_10) / 3
                of = " of R@10" if "R@10" in curves else ""
                draw_chance(axes, chance, f"chance{of}: {chance:.2g}%")
            axes.axvline(best["epoch"], color=GREY, linestyle="--", linewidth=1, label="best epoch")
            legend_above(axes, 3 if "R@10" in curves else 4)
