"""Figures of a trained model: curves, similarities, t-SNE, what a text or a picture finds.

`python visualize.py [CHECKPOINT]` comes after evaluate.py, whose embeddings and ranks it draws;
train.py calls `draw_curves` after every epoch. Files named grid_* show pictures of the data.
"""

import contextlib
import functools
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from tqdm import tqdm

from cli import Parser, UserError, atomic_write, number, run, warn
from dataset import Dataset, Split, Tokenizer
from evaluate import (
    Embedded,
    Loaded,
    ZeroShot,
    add_model_flags,
    count_trained_on,
    embed_images,
    embed_pictures,
    embed_texts,
    evaluate_split,
    find_pictures,
    load_data_for,
    load_trained,
    zero_shot,
)
from images import to_rgb
from metrics import KS, TIE, first_captions

# ---------------------------------------------------------------------------- one style for all

# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = [BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
INK, FAINT = "#222222", "#666666"
STYLE = {
    **{"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "text.color": INK},
    **{"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.prop_cycle": matplotlib.cycler(color=PALETTE), "image.cmap": "viridis"},
    **{"lines.markersize": 4, "legend.fontsize": 9, "figure.facecolor": "white"},
    **{"text.parse_math": False, "text.usetex": False},  # a caption with two $ is no formula
}
DPI, MOST_PIXELS = 120, 30_000  # Agg cannot draw 65,536 pixels or more


@functools.cache
def glyphs() -> frozenset[int]:
    """The characters that the font can draw; matplotlib ships this font."""
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def plain(text: str) -> str:
    """Text that can be drawn: one line, no control characters, a box for what the font lacks."""
    joined = " ".join(text.split())
    seen = (c for c in joined if unicodedata.category(c)[0] != "C")
    return "".join(c if ord(c) in glyphs() else "□" for c in seen)


def wrapped(text: str, inches: float, size: float, lines: int = 4) -> list[str]:
    """Breaks `text` into at most `lines` lines, `inches` wide at `size` points; "…" ends a cut."""
    width = max(8, int(inches * 72 / (0.58 * size)))  # DejaVu's letters are 0.58 em wide at most
    return textwrap.wrap(plain(text), width, max_lines=lines, placeholder=" …") or [""]


@contextlib.contextmanager
def canvas(
    path: Path, width: float, height: float, title: str, footer: str, layout: str = "constrained"
) -> Iterator[Figure]:
    """Yields an empty figure of `width` x `height` inches and writes it to `path` as PNG.

    Nothing global is touched (no pyplot), and nothing written when the block raises. Raises
    UserError when the file cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout=layout)
        title = "\n".join(wrapped(title, width - 0.3, 12))
        figure.suptitle(title, x=0.15 / width, y=1 - 0.1 / height, ha="left", va="top", size=12)
        if footer:
            footer = "\n".join(wrapped(footer, width - 0.3, 8, 6))
            place = {"x": 0.15 / width, "y": 0.08 / height, "ha": "left", "va": "bottom"}
            figure.supxlabel(footer, **place, size=8, color=FAINT)
        yield figure
        with atomic_write(path) as temporary:
            dpi = min(DPI, MOST_PIXELS / max(width, height))
            figure.savefig(temporary, format="png", dpi=dpi)
        figure.clear()


# ------------------------------------------------------------------------------ the curves


def draw_curves(history: list[dict[str, float]], path: Path, footer: str = "") -> None:
    """Draws losses and recalls over epochs, with the best epoch marked; one epoch is enough.

    `history` holds a record an epoch, as in history.csv; recalls are in percent. Raises UserError.
    """
    epochs = [record["epoch"] for record in history]
    best = max(history, key=lambda record: record["mean_recall"])  # the first of equals
    recalls = {f"R@{k}": f"_r{k}" for k in KS}
    panels = [
        ("Loss", "InfoNCE (nats)", {"train": "train_loss", "dev": "dev_loss"}),
        ("Mean recall, dev", "recall (%)", {"mean of the six below": "mean_recall"}),
        ("Image to text, dev", "recall (%)", {name: f"i2t{key}" for name, key in recalls.items()}),
        ("Text to image, dev", "recall (%)", {name: f"t2i{key}" for name, key in recalls.items()}),
    ]
    title = f"Training: best epoch {best['epoch']}, mean recall on dev {best['mean_recall']:.1f}%"
    with canvas(path, 9.5, 6.5, title, footer) as figure:
        for axes, (name, unit, curves) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for (label, key), marker in zip(curves.items(), "os^", strict=False):
                axes.plot(epochs, [record[key] for record in history], marker=marker, label=label)
            told = f"best epoch ({best['epoch']})"
            axes.axvline(best["epoch"], color=FAINT, linestyle="--", linewidth=1, label=told)
            axes.set(title=name, xlabel="epoch", ylabel=unit)
            axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if unit.endswith("(%)"):
                axes.set_ylim(bottom=0)
            axes.legend()


# ------------------------------------------------------------------- similarities and t-SNE


def sample_pairs(split: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` images and a caption of each: positions in split.images and split.captions."""
    generator = np.random.default_rng(seed)
    total = len(split.images)
    images = np.sort(generator.choice(total, min(count, total), replace=False))
    shuffled = generator.permutation(len(split.captions))
    return images, shuffled[first_captions(split.caption_image[shuffled])][images]


def draw_similarity(path: Path, embedded: Embedded, seed: int, footer: str) -> None:
    """Draws the cosines of 48 images and captions at most; the pairs are the diagonal."""
    images, captions = sample_pairs(embedded.split, 48, seed)
    cosines = cosine(embedded.image_embeddings[images], embedded.text_embeddings[captions])
    pair = np.eye(len(images), dtype=bool)
    rest = f"{cosines[~pair].mean():.3f}" if len(images) > 1 else "(none)"
    title = (
        f"Cosine similarity of {len(images)} seeded image-caption pairs: "
        f"mean of the diagonal {cosines[pair].mean():.3f}, of the rest {rest}"
    )
    with canvas(path, 7.5, 6.9, title, footer) as figure:
        axes = figure.subplots()
        axes.grid(False)
        shown = axes.imshow(cosines)
        axes.set(xlabel="caption (number of its pair)", ylabel="image (number of its pair)")
        figure.colorbar(shown, label="cosine similarity (no unit)")


def modality_gap(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
    """The distance between the mean image and the mean text embedding (Liang et al. 2022)."""
    means = (e.astype(np.float64).mean(0) for e in (image_embeddings, text_embeddings))
    return float(np.linalg.norm(np.subtract(*means)))


COLOURS = "black white red blue green yellow brown orange pink purple gray grey tan blond blonde"


def topics(texts: list[str], seed: int, most: int = 8) -> tuple[np.ndarray, list[str]]:
    """Sorts texts into at most `most` topics: (topic of each, names), by NMF over TF-IDF.

    A name is the topic's two strongest words. -1 stands for a text without a word that counts;
    stop words and colours do not. No topic at all when the texts share no words.
    """
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    ignored = sorted({*ENGLISH_STOP_WORDS, *COLOURS.split()})
    for rarest in (2, 1):
        words = TfidfVectorizer(
            stop_words=ignored, token_pattern=r"[^\W\d_]{2,}", min_df=rarest, sublinear_tf=True
        )
        with contextlib.suppress(ValueError):  # no word is left: "empty vocabulary"
            table = words.fit_transform(texts)
            break
    else:
        return np.full(len(texts), -1), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged does not matter here
        model = NMF(min(most, *table.shape), init="nndsvda", random_state=seed, max_iter=300)
        weights = model.fit_transform(table)
    vocabulary, names = words.get_feature_names_out(), []
    for strength in model.components_:
        ranked = [vocabulary[i] for i in np.argsort(-strength, kind="stable") if strength[i] > 0]
        first = ranked[0] if ranked else "?"
        others = [w for w in ranked[1:9] if not (w.startswith(first) or first.startswith(w))]
        names.append(", ".join([first, *others[:1]]))  # "dog, snow" tells more than "dog, dogs"
    return np.where(weights.max(1) > 0, weights.argmax(1), -1), names


def draw_tsne(path: Path, embedded: Embedded, seed: int, footer: str) -> None:
    """Draws at most 500 seeded pairs, images and texts together, in the plane of one t-SNE."""
    from sklearn.manifold import TSNE

    split = embedded.split
    images, captions = sample_pairs(split, 500, seed)
    pairs = [embedded.image_embeddings[images], embedded.text_embeddings[captions]]
    perplexity = min(30, (2 * len(images) - 1) / 3)
    made = TSNE(2, perplexity=perplexity, init="random", random_state=seed)
    points = made.fit_transform(np.concatenate(pairs).astype(np.float64)).reshape(2, -1, 2)
    joined: dict[int, list[str]] = {}
    for caption, image in zip(split.captions, split.caption_image, strict=True):
        joined.setdefault(int(image), []).append(caption)
    topic, names = topics([" ".join(joined[i]) for i in images], seed)
    colour = np.array([*PALETTE, "#999999"])[np.where(topic < 0, len(PALETTE), topic)]
    gap = modality_gap(embedded.image_embeddings, embedded.text_embeddings)
    title = (
        f"t-SNE of {len(images)} image-caption pairs (perplexity {perplexity:.0f}): modality gap "
        f"{gap:.3f} (distance of the mean image and mean text embedding of the split)"
    )
    with canvas(path, 9.5, 7, title, footer) as figure:
        axes = figure.subplots()
        axes.grid(False)
        lines = LineCollection(points.swapaxes(0, 1), color="#999999", linewidth=0.5, alpha=0.4)
        axes.add_collection(lines)
        for place, marker in zip(points, "o^", strict=True):
            axes.scatter(*place.T, s=22, c=colour, marker=marker, edgecolor="white", linewidth=0.3)
        kinds = {"image": "o", "its caption": "^"}
        dot = functools.partial(Line2D, [], [], linestyle="none", markersize=7)
        handles = [dot(marker=marker, color=FAINT, label=kind) for kind, marker in kinds.items()]
        handles.append(Line2D([], [], color="#999999", label="a pair"))
        for i, name in enumerate([*names, "no topic"]):
            if (count := (topic == (i if i < len(names) else -1)).sum()) > 0:
                hue = PALETTE[i] if i < len(names) else "#999999"
                handles.append(dot(marker="s", color=hue, label=f"{plain(name)} ({count})"))
        told = "topics of the captions\n(images)"
        axes.legend(handles=handles, title=told, loc="upper left", bbox_to_anchor=(1.01, 1))
        axes.set(xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")


# ------------------------------------------------------------------------------ the search


def cosine(queries: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Unit-length (Q, D) and (N, D) -> float64 (Q, N)."""
    return queries.astype(np.float64) @ pool.T.astype(np.float64)


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The positions of the `k` best of scores (N,), best first: a prefix of any longer list.

    Ties go by position, scores that are not finite come last.
    """
    rounded = np.where(np.isfinite(scores), scores, -np.inf).round(12)  # equal within metrics.TIE
    return np.argsort(-rounded, kind="stable")[:k]


class Found(NamedTuple):
    """What one query found: positions in the pool with scores, and what it should have found."""

    query: str
    order: np.ndarray
    scores: np.ndarray
    pool: int
    true: frozenset[int] = frozenset()  # positions in the pool; none for a query of the user's
    rank: float = np.nan  # of the best true one, from 1, ties lost, as in metrics.py

    def told(self, what: str) -> str:
        """`true image: rank 37 of 1,000`, or nothing for a query without a truth."""
        if not self.true:
            return ""
        if not np.isfinite(self.rank):
            return f"{what}: no finite score, a miss"
        places = [i for i, position in enumerate(self.order, 1) if position in self.true]
        tie = " (a tie counts as lost)" if places and places[0] < self.rank else ""
        return f"{what}: rank {self.rank:,.0f} of {self.pool:,}{tie}"


def find(query: str, embedding: np.ndarray, pool: np.ndarray, k: int, **truth: Any) -> Found:
    """Searches `pool` (N, D) with one embedding (D,); `truth` is Found's `true` and `rank`."""
    scores = cosine(embedding[None], pool)[0]
    order = top_k(scores, k)
    return Found(query, order, scores[order], len(pool), **truth)


def checked_queries(queries: list[str], tokenizer: Tokenizer) -> list[str]:
    """Strips the user's queries; raises UserError for one that the model cannot understand."""
    for query in queries:
        words = [word for word in tokenizer.words(query) if any(map(str.isalnum, word))]
        if not words:
            raise UserError(f"--query {query!r} holds no word; describe a picture")
        unknown = [word for word in tokenizer.unknown(query) if word in words]
        told = f"--query {query!r}: {', '.join(unknown)} never stood in the training captions"
        if len(unknown) == len(words):
            raise UserError(f"{told}, so the model knows no word of it; use other words")
        if unknown:
            warn(f"{told} (or too seldom); the rest of the query decides")
    return [query.strip() for query in queries]


class Case(NamedTuple):
    """A caption with its image and the best other image: positions in the split, rank, scores."""

    caption: int
    image: int
    other: int
    rank: float
    own_score: float
    other_score: float


def extreme_cases(embedded: Embedded, count: int) -> tuple[list[Case], list[Case]]:
    """The `count` best and worst cases of text to image, an image once in each, best/worst first.

    Best: rank 1 with the widest margin before the next image. Worst: the highest ranks.
    """
    owner, images = embedded.split.caption_image, embedded.image_embeddings
    own, other_score, other = [], [], []
    for start in range(0, len(owner), 1024):
        scores = cosine(embedded.text_embeddings[start : start + 1024], images)
        scores[~np.isfinite(scores)] = -np.inf
        place = np.arange(len(scores)), owner[start : start + 1024]
        own.append(scores[place])
        scores[place] = -np.inf
        other_score.append(scores.max(1))
        other.append(scores.argmax(1))
    own, other_score, other = map(np.concatenate, (own, other_score, other))
    with np.errstate(invalid="ignore"):
        margin = np.nan_to_num(own - other_score, nan=-np.inf, neginf=-np.inf, posinf=np.inf)

    def cases(order: np.ndarray) -> list[Case]:
        firsts = np.sort(np.unique(owner[order], return_index=True)[1])[:count]
        return [
            Case(int(i), int(owner[i]), int(other[i]), embedded.t2i[i], own[i], other_score[i])
            for i in order[firsts]
        ]

    return cases(np.lexsort((-margin, embedded.t2i))), cases(np.lexsort((margin, -embedded.t2i)))


# --------------------------------------------------------------------------- grids of pictures

CELL, NOTE, LINE, GAP, ACROSS = 1.5, 0.34, 0.19, 0.14, 10  # inches; pictures side by side


class Cell(NamedTuple):
    """A picture, the lines under it and the colour of its frame."""

    picture: Image.Image
    note: str
    frame: str | None = None


class Row(NamedTuple):
    """Lines of text, each with its colour, and pictures beside them."""

    lines: list[tuple[str, str]]
    cells: list[Cell]


def block(text: str, inches: float, colour: str = INK, lines: int = 4) -> list[tuple[str, str]]:
    return [(line, colour) for line in wrapped(text, inches, 9, lines)] if text else []


def draw_grid(
    path: Path, title: str, footer: str, rows: list[Row], inches: float, text_first: bool = True
) -> None:
    """Draws rows of text (`inches` wide) and pictures; the pictures keep their proportions."""
    columns = min(ACROSS, max(len(row.cells) for row in rows))
    pictures = columns * (CELL + GAP)
    width = 0.3 + inches + GAP + pictures
    heights = [
        max(-(-len(row.cells) // columns) * (CELL + NOTE), len(row.lines) * LINE) + GAP
        for row in rows
    ]
    head = 0.25 + 0.22 * len(wrapped(title, width - 0.3, 12))
    height = head + sum(heights) + 0.2 + 0.15 * len(wrapped(footer, width - 0.3, 8, 6))
    left, text_left = (0.15 + inches + GAP, 0.15) if text_first else (0.15, 0.15 + pictures)
    with canvas(path, width, height, title, footer, "none") as figure:
        top = height - head
        for row, tall in zip(rows, heights, strict=True):
            for i, (line, colour) in enumerate(row.lines):
                place = text_left / width, (top - 0.05 - i * LINE) / height
                figure.text(*place, line, size=9, color=colour, va="top")
            for i, cell in enumerate(row.cells):
                x = left + i % columns * (CELL + GAP)
                y = top - i // columns * (CELL + NOTE) - CELL
                box = (x / width, y / height, CELL / width, CELL / height)
                axes = figure.add_axes(box, xticks=[], yticks=[], anchor="N")
                axes.grid(False)
                axes.imshow(cell.picture)
                axes.spines[:].set(
                    visible=cell.frame is not None, color=cell.frame or INK, linewidth=4
                )
                note = "\n".join(plain(line) for line in cell.note.split("\n"))
                axes.set_xlabel(note, size=8, labelpad=4, color=cell.frame or INK)
            top -= tall


def found_row(found: Found, picture: Callable[[int], Image.Image], names: list[str]) -> Row:
    """A row of the text-to-image grids; `names` (or none) stand under the pictures."""
    cells = []
    for place, (i, score) in enumerate(zip(found.order, found.scores, strict=True), 1):
        mark = "  true image" if i in found.true else ""
        name = f"\n{wrapped(names[i], CELL, 8, 1)[0]}" if names else ""
        note = f"{place}: {score:.3f}{mark}{name}"
        cells.append(Cell(picture(int(i)), note, GREEN if mark else None))
    hit = GREEN if found.rank <= len(found.order) else RED
    return Row(block(found.query, 2.6, lines=5) + block(found.told("true image"), 2.6, hit), cells)


def captions_row(found: Found, picture: Image.Image, captions: list[str]) -> Row:
    """A row of the image-to-text grid: the picture's captions found, its own ones marked."""
    lines = block(found.told("best own caption"), 6.5, GREEN if found.rank == 1 else RED, 1)
    for place, (i, score) in enumerate(zip(found.order, found.scores, strict=True), 1):
        mark, colour = ("✓", GREEN) if i in found.true else ("   ", INK)
        lines += block(f"{place}: {score:.3f} {mark} {captions[i]}", 6.5, colour, 1)
    return Row(lines, [Cell(picture, found.query)])
