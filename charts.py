"""Figures with axes: curves, heat maps, t-SNE, bars; in one style, with a title and a footer.

visualize.py draws them from embeddings and tables; train.py calls `draw_curves` after every epoch.
"""

import contextlib
import csv
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from cli import UserError, atomic_write
from dataset import Split
from evaluate import Embedded
from generalisation import TOLD
from metrics import KS, TIE, first_captions
from zeroshot import ZeroShot

# Okabe and Ito's colours, which colour-blind readers tell apart too.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442"]
GREEN, RED, GREY, INK = PALETTE[2], PALETTE[3], "#777777", "#222222"
STYLE = {
    **{"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "text.color": INK},
    **{"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.prop_cycle": matplotlib.cycler(color=PALETTE), "image.cmap": "viridis"},
    **{"lines.markersize": 4, "legend.fontsize": 9, "figure.facecolor": "white"},
    **{"text.parse_math": False, "text.usetex": False},  # a caption with two $ is no formula
}
GLYPHS = frozenset(get_font(findfont("DejaVu Sans")).get_charmap())  # comes with matplotlib


def wrapped(text: str, inches: float, size: float, lines: int = 4) -> list[str]:
    """Breaks `text` into at most `lines` lines, `inches` wide at `size` points; "…" ends a cut."""
    # No control characters, and a box for what the font lacks: matplotlib would warn of both.
    seen = (c for c in " ".join(text.split()) if unicodedata.category(c)[0] != "C")
    plain = "".join(c if ord(c) in GLYPHS else "□" for c in seen)
    width = max(8, int(inches * 72 / (0.56 * size)))  # DejaVu's letters are some 0.56 em wide
    if lines == 1:  # cut within a word too: it may be a file's name
        return [plain if len(plain) <= width else f"{plain[: width - 2]} …"]
    return textwrap.wrap(plain, width, max_lines=lines, placeholder=" …") or [""]


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float, title: str, footer: str) -> Iterator[Any]:
    """Yields (figure, inches below its body), then writes it to `path` as PNG. Raises UserError.

    The body, `width` x `height` inches, lies between title and footer. No pyplot: nothing global.
    """
    titles, notes = wrapped(title, width - 0.3, 12), wrapped(footer, width - 0.3, 8)
    low = 0.15 + 0.15 * len(notes)
    tall = low + height + 0.22 + 0.21 * len(titles)
    with matplotlib.rc_context(STYLE):
        figure, x = Figure((width, tall), layout="constrained"), 0.15 / width
        figure.get_layout_engine().set(rect=(0.01, low / tall, 0.98, height / tall))
        figure.text(x, 1 - 0.1 / tall, "\n".join(titles), va="top", size=12)
        figure.text(x, 0.08 / tall, "\n".join(notes), va="bottom", size=8, color=GREY)
        yield figure, low
        with atomic_write(path) as temporary:  # Agg cannot draw 65,536 pixels or more
            figure.savefig(temporary, format="png", dpi=min(120, 30_000 / max(width, tall)))


def draw_curves(history: list[dict[str, float]], path: Path, footer: str = "") -> None:
    """Draws losses and recalls over epochs; `history` holds a record an epoch. Raises UserError."""
    epochs = [record["epoch"] for record in history]
    span = epochs[0] - 0.5, epochs[-1] + 0.5
    best = max(history, key=lambda record: record["mean_recall"])  # the first of equals
    panels = {
        "Loss": {"train": "train_loss", "dev": "dev_loss"},
        "Mean recall on dev": {"mean of the six below": "mean_recall"},
        "Image to text on dev": {f"R@{k}": f"i2t_r{k}" for k in KS},
        "Text to image on dev": {f"R@{k}": f"t2i_r{k}" for k in KS},
    }
    title = f"Training: best epoch {best['epoch']}, mean recall on dev {best['mean_recall']:.1f}%"
    with canvas(path, 9.5, 6, title, footer) as (figure, _):
        for axes, (name, curves) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            for (label, key), marker in zip(curves.items(), "os^", strict=False):
                values = [record[key] for record in history]
                axes.plot(epochs, values, marker=marker, label=label, clip_on=False)
            axes.axvline(best["epoch"], color=GREY, linestyle="--", linewidth=1, label="best epoch")
            unit = "loss (dev: InfoNCE, nats)" if name == "Loss" else "recall (%)"
            axes.set(title=name, xlabel="epoch", ylabel=unit, ylim=(0, None), xlim=span)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
            axes.grid(True)
            axes.legend()


def cosine(queries: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Unit-length (Q, D) and (N, D) -> float64 (Q, N)."""
    return queries.astype(np.float64) @ pool.T.astype(np.float64)


def sample_pairs(split: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` images and a caption of each: positions in split.images and split.captions."""
    generator, total = np.random.default_rng(seed), len(split.images)
    images = np.sort(generator.choice(total, min(count, total), replace=False))
    shuffled = generator.permutation(len(split.captions))
    return images, shuffled[first_captions(split.caption_image[shuffled])][images]


def draw_similarity(path: Path, made: Embedded, seed: int, footer: str) -> None:
    """Draws the cosines of 48 images and captions at most; the pairs are the diagonal."""
    images, captions = sample_pairs(made.split, 48, seed)
    cosines = cosine(made.image_embeddings[images], made.text_embeddings[captions])
    pair = np.eye(len(images), dtype=bool)
    title = f"Cosine similarity of {len(images)} seeded pairs: mean {cosines[pair].mean():.3f} on "
    title += f"the diagonal (the pairs), {cosines[~pair].mean() if len(pair) > 1 else 0:.3f} off it"
    with canvas(path, 7.5, 6.2, title, footer) as (figure, _):
        axes = figure.subplots()
        axes.set(xlabel="caption (number of its pair)", ylabel="image (number of its pair)")
        figure.colorbar(axes.imshow(cosines), label="cosine similarity (no unit)")


def modality_gap(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
    """The distance between the mean image and the mean text embedding (Liang et al. 2022)."""
    gap = image_embeddings.mean(0, dtype=np.float64) - text_embeddings.mean(0, dtype=np.float64)
    return float(np.linalg.norm(gap))


def topics(texts: list[str], seed: int, most: int = 8) -> tuple[np.ndarray, list[str]]:
    """Sorts texts by NMF over TF-IDF: (topic of each, -1 if it has no words; topics' names)."""
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    colours = (
        "black white red blue green yellow brown orange pink purple gray grey tan blond blonde"
    )
    ignored = sorted({*ENGLISH_STOP_WORDS, *colours.split()})
    words = TfidfVectorizer(stop_words=ignored, token_pattern=r"[^\W\d_]{2,}", sublinear_tf=True)
    try:
        table = words.fit_transform(texts)
    except ValueError:  # no word is left: "empty vocabulary"
        return np.full(len(texts), -1), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged does not matter here
        model = NMF(min(most, *table.shape), init="nndsvda", random_state=seed, max_iter=300)
        weights = model.fit_transform(table)
    vocabulary, names = words.get_feature_names_out(), []
    for strength in model.components_:
        first, *rest = vocabulary[np.argsort(-strength, kind="stable")[:9]]
        others = [word for word in rest if not (word.startswith(first) or first.startswith(word))]
        names.append(", ".join([first, *others[:1]]))  # "dog, snow" tells more than "dog, dogs"
    return np.where(weights.max(1) > 0, weights.argmax(1), -1), names


def draw_tsne(path: Path, made: Embedded, seed: int, footer: str) -> None:
    """Draws at most 500 seeded pairs, images and texts together, in the plane of one t-SNE."""
    from sklearn.manifold import TSNE

    images, captions = sample_pairs(made.split, 500, seed)
    both = np.concatenate([made.image_embeddings[images], made.text_embeddings[captions]])
    perplexity = min(30, (len(both) - 1) / 3)
    start = "pca" if np.ptp(both, axis=0).max() > 1e-6 else "random"  # PCA of one point fails
    tsne = TSNE(2, perplexity=perplexity, init=start, random_state=seed)
    points = tsne.fit_transform(both.astype(np.float64)).reshape(2, -1, 2)  # images, then texts
    joined = [""] * len(made.split.images)
    for caption, image in zip(made.split.captions, made.split.caption_image, strict=True):
        joined[image] += f" {caption}"
    topic, names = topics([joined[i] for i in images], seed)
    gap = modality_gap(made.image_embeddings, made.text_embeddings)
    title = f"t-SNE of {len(images)} pairs, perplexity {perplexity:.0f}. Modality gap {gap:.3f} "
    title += "(distance between the mean image and the mean text embedding of the split)"
    with canvas(path, 9.5, 6.5, title, footer) as (figure, _):
        axes = figure.subplots()
        pairs = LineCollection(points.swapaxes(0, 1), color=GREY, linewidth=0.5, alpha=0.35)
        axes.add_collection(pairs)
        for i, name in [*enumerate(names), (-1, "no topic")]:
            mine, look = topic == i, {"s": 26, "color": [*PALETTE, GREY][i], "edgecolor": "white"}
            label = f"{wrapped(name, 2.5, 9, 1)[0]} ({mine.sum()})" if mine.any() else None
            axes.scatter(*points[0, mine].T, linewidth=0.3, label=label, **look)
            axes.scatter(*points[1, mine].T, linewidth=0.3, marker="^", **look)
        told = "● image   ▲ its caption\n— a pair\n\nTopic of the captions\n(and its images)"
        axes.legend(title=told, loc="upper left", bbox_to_anchor=(1.01, 1), alignment="left")
        axes.set(xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")


def draw_confusion(path: Path, result: ZeroShot, footer: str) -> None:
    """Draws the confusion matrix, each row in percent of the true class's pictures."""
    top, size = result.metrics()["zero_shot_top1"], len(result.classes)
    total, scores = np.bincount(result.truth), result.scores.copy()
    scores[np.arange(len(scores)), result.truth] -= TIE  # a tie is lost, as in evaluate.py
    valid = np.isfinite(scores).all(1)  # the others count as pictures only
    cells = result.truth[valid] * size + scores[valid].argmax(1)
    counts = np.bincount(cells, minlength=size * size).reshape(size, size)
    percent, side = counts / total[:, None] * 100, min(4.5 + 0.42 * size, 40)
    title = f"Zero-shot: top-1 {top:.1f}% of {len(valid):,} pictures (chance {100 / size:.1f}%)"
    with canvas(path, side + 2.2, side, title, footer) as (figure, _):
        axes = figure.subplots()
        shown = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
        names = [wrapped(name, 1.6, 9, 1)[0] for name in result.classes]
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), [f"{n} ({c:,})" for n, c in zip(names, total, strict=True)])
        axes.set(xlabel="predicted class", ylabel="true class (number of its pictures)")
        for row, column in np.argwhere(counts) if size <= 30 else ():
            text = f"{percent[row, column]:.0f}%\n{counts[row, column]:,}"
            hue = "black" if percent[row, column] > 50 else "white"
            axes.text(column, row, text, size=7, ha="center", va="center", color=hue)
        figure.colorbar(shown, label="share of the true class's pictures (%)")


def draw_ablations(rows: list[dict[str, str]], path: Path) -> None:
    """Quality against minutes: a numbered dot for each row of an ablation table, in its order."""
    title = "Recall on dev against minutes of training on 2 cores"
    footer = "mean of the six recalls (R@1, 5, 10 in both directions)"
    groups = list(dict.fromkeys(row["group"] for row in rows))
    with canvas(path, 11, max(5.5, 0.19 * len(rows)), title, footer) as (figure, _):
        axes = figure.subplots()
        for number, row in enumerate(rows, 1):
            place = float(row["minutes"]), float(row["mean_recall"])
            hue = PALETTE[groups.index(row["group"]) % len(PALETTE)]
            label = f"{number} {row['row']} ({row['group']}): {place[1]:.1f}"
            axes.plot(*place, "o", color=hue, label=label)
            shift = (5, 3) if number % 2 else (5, -9)
            axes.annotate(str(number), place, shift, textcoords="offset points", size=8, color=hue)
        axes.set(xlabel="minutes, features included", ylabel="mean recall (%)", xscale="log")
        axes.set_xticks((1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60), minor=False)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        span = [float(row["minutes"]) for row in rows]
        axes.set_xlim(0.8 * min(span), 1.4 * max(span))
        axes.grid(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)


def read_ablations(path: Path) -> list[dict[str, str]]:
    """The rows of a table like report/ablations.csv. Raises UserError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("it is empty")
        for row in rows:
            float(row["minutes"]), float(row["mean_recall"]), row["group"], row["row"]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        told = "it needs the columns row, group, minutes and mean_recall"
        raise UserError(f"cannot read the table {path} ({error}); {told}") from error
    return rows


# ---------------------------------------------------------------------------------- films


def draw_distances(path: Path, distances: np.ndarray, titles: list[str], footer: str) -> None:
    """The corner of D, for the films named: posters are rows, introductions columns."""
    own = np.eye(len(distances), dtype=bool)
    title = f"Distance matrix, {len(titles)} films: mean {distances[own].mean():.3f} on the "
    title += f"diagonal, {distances[~own].mean() if len(own) > 1 else 0:.3f} off it"
    names = [wrapped(name, 2.2, 7, 1)[0] for name in titles]
    side = 3.2 + 0.16 * len(titles)
    with canvas(path, side + 1.2, side, title, footer) as (figure, _):
        axes = figure.subplots()
        axes.set_yticks(range(len(names)), names, size=7)
        axes.set_xticks(range(len(names)), names, size=7, rotation=90)
        axes.set(xlabel="introduction of", ylabel="poster of")
        figure.colorbar(axes.imshow(distances), label="D = minus the cosine (no unit)")


def draw_gap(path: Path, history: list[dict[str, float]], films: int, footer: str) -> None:
    """Accuracy over epochs on training films and on as many dev films."""
    epochs = [record["epoch"] for record in history]
    title = "Memorised or learned? Training films against films not trained on (dev)"
    with canvas(path, 9.5, 4.2, title, footer) as (figure, _):
        for axes, (dim, told) in zip(figure.subplots(1, 2), TOLD.items(), strict=True):
            way = "t2i" if dim == "dim0" else "i2t"
            for label, key in (("training films", f"train_top1_{way}"), ("dev", f"top1_{way}")):
                axes.plot(epochs, [r[key] for r in history], marker="o", label=label, clip_on=False)
            axes.axhline(100 / films, color=GREY, linestyle="--", linewidth=1, label="chance")
            axes.set(title=f"{dim}: {told.partition(':')[0]}", xlabel="epoch", ylim=(0, None))
            axes.set_ylabel(f"accuracy among {films} films (%)")
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
            axes.grid(True)
            axes.legend()


def draw_genres(path: Path, recalls: dict[str, dict[str, float]], footer: str) -> None:
    """Which genres match best: R@10 in both directions, with the number of films."""
    order = sorted(recalls, key=lambda genre: recalls[genre]["dim0"] + recalls[genre]["dim1"])
    labels = [f"{genre} ({recalls[genre]['films']})" for genre in order]
    with canvas(path, 8, 1.2 + 0.32 * len(order), "Recall@10 by genre", footer) as (figure, _):
        axes, places = figure.subplots(), np.arange(len(order))
        for shift, (dim, told) in zip((0.2, -0.2), TOLD.items(), strict=True):
            values = [recalls[genre][dim] for genre in order]
            axes.barh(places + shift, values, 0.38, label=told.partition(":")[0])
        axes.set_yticks(places, labels)
        axes.set(xlabel="R@10 (%)", ylabel="genre (number of its films)", xlim=(0, None))
        axes.grid(True, axis="x")
        axes.legend(loc="lower right")
