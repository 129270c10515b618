"""Figures of films alone: a corner of the distance matrix, memorising, and genres.

visualize.py calls `draw_films` for such data, and hands in the module evaluate.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from posters.films import plain_title
from posters.genres import genre_recalls
from posters.report import DIRECTIONS, MEANING, mean_distances, paired_ranks
from support.figures import GREY, canvas, wrapped, write


def draw_films(
    out: Path, embedded: Any, history: list[dict[str, float]], footer: str, evaluate: ModuleType
) -> None:
    """Draws an embedded split of films (evaluate.Embedded), with its first introductions."""
    pairs = embedded.pairs
    films = [pairs.dataset.records[row] for row in pairs.rows]
    images = embedded.image_embeddings
    texts = embedded.text_embeddings[evaluate.first_captions(pairs.caption_image)]
    titles = [plain_title(film.title) for film in films[:40]]
    write(out / "distances.png", draw_distances, -(images[:40] @ texts[:40].T), titles, footer)
    if history and "train_top1_t2i" in history[0]:
        checkpoint = footer[footer.rfind("checkpoint") :]  # it is not about the split drawn here
        write(out / "generalisation.png", draw_gap, history, checkpoint)
    ranks = paired_ranks(images, texts, evaluate)
    if recalls := genre_recalls(ranks, [film.genres for film in films]):
        write(out / "genres.png", draw_genres, recalls, footer)


def draw_distances(path: Path, distances: np.ndarray, titles: list[str], footer: str) -> None:
    """The corner of D, for the films named: posters are rows, introductions columns."""
    pairs, rest = mean_distances(distances)
    means = f"mean {pairs:.3f} on the diagonal, {rest:.3f} off it"
    title = f"Distance matrix, {len(titles)} films: {means}"
    names = [wrapped(name, 2.2, 7, 1)[0] for name in titles]
    side = 3.2 + 0.16 * len(titles)
    with canvas(path, side + 1.2, side, title, footer) as (figure, _):
        axes = figure.subplots()
        axes.set_yticks(range(len(names)), names, size=7)
        axes.set_xticks(range(len(names)), names, size=7, rotation=90)
        axes.set(xlabel="introduction of", ylabel="poster of")
        figure.colorbar(axes.imshow(distances), label="D = minus the cosine (no unit)")


def draw_gap(path: Path, history: list[dict[str, float]], footer: str) -> None:
    """Accuracy over epochs on training films and on as many dev films."""
    epochs, films = [record["epoch"] for record in history], history[0]["dev_films"]
    title = "Memorised or learned? Training films against films not trained on (dev)"
    with canvas(path, 9.5, 4.2, title, footer) as (figure, _):
        for axes, (dim, way) in zip(figure.subplots(1, 2), DIRECTIONS.items(), strict=True):
            for label, key in (("training films", f"train_top1_{way}"), ("dev", f"top1_{way}")):
                values = [record[key] for record in history]
                axes.plot(epochs, values, marker="o", label=label, clip_on=False)
            axes.axhline(100 / films, color=GREY, linestyle="--", linewidth=1, label="chance")
            direction = MEANING[dim].partition(":")[0]
            axes.set(title=f"{dim}: {direction}", xlabel="epoch", ylim=(0, None))
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
        for shift, (dim, meaning) in zip((0.2, -0.2), MEANING.items(), strict=True):
            values = [recalls[genre][dim] for genre in order]
            axes.barh(places + shift, values, 0.38, label=meaning.partition(":")[0])
        axes.set_yticks(places, labels)
        axes.set(xlabel="R@10 (%)", ylabel="genre (number of its films)", xlim=(0, None))
        axes.grid(True, axis="x")
        axes.legend(loc="lower right")
