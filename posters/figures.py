"""Figures of films alone: corners of distance matrices, memorising, and genres, side by side.

visualize.py calls `draw_films` for such data, and hands in the module evaluate.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from posters.films import plain_title
from posters.genres import genre_recalls
from posters.report import DIRECTIONS, MEANING, mean_distances, paired_ranks
from support.figures import HATCHES, canvas, draw_chance, legend_above, plot_epochs, wrapped, write
from support.ranking import first_captions

SHOWN = 40  # films in a corner of the distance matrix


class Films(NamedTuple):
    """Films of a split, each with its first introduction."""

    name: str
    images: np.ndarray  # (N, D)
    texts: np.ndarray  # (N, D)
    records: list[Any]


def films_of(name: str, embedded: Any, most: int | None = None) -> Films:
    """The films of an embedded split (evaluate.Embedded), or `most` of them by lot."""
    pairs = embedded.pairs
    chosen = np.arange(len(pairs.rows))
    if most and most < len(chosen):
        chosen = np.sort(np.random.default_rng(0).choice(chosen, most, replace=False))
    texts = embedded.text_embeddings[first_captions(pairs.caption_image)]
    records = [pairs.dataset.records[pairs.rows[i]] for i in chosen]
    return Films(name, embedded.image_embeddings[chosen], texts[chosen], records)


def draw_films(
    out: Path,
    embedded: Any,
    trained_on: Any,
    history: list[dict[str, float]],
    name: str,
    footer: str,
    evaluate: ModuleType,
) -> None:
    """Draws an embedded split of films beside as many of the training films (both Embedded)."""
    films = films_of(f"{embedded.pairs.name} films", embedded)
    both = [films_of("training films", trained_on, len(films.images)), films]
    if embedded.pairs.name == "train":
        both = both[:1]
    write(out / "distances.png", draw_distances, both, name, footer)
    if history and "train_top1_t2i" in history[0]:
        checkpoint = footer[footer.rfind("checkpoint") :]  # it is not about the split drawn here
        write(out / "generalisation.png", draw_gap, history, name.partition(",")[0], checkpoint)
    recalls = {}
    for group in both:
        ranks = paired_ranks(group.images, group.texts, evaluate)
        recalls[f"{len(group.images):,} {group.name}"] = genre_recalls(
            ranks, [film.genres for film in group.records]
        )
    if any(recalls.values()):
        write(out / "genres.png", draw_genres, recalls, name, footer)


def draw_distances(path: Path, groups: list[Films], name: str, footer: str) -> None:
    """The corners of D of some films, on one scale: posters are rows, introductions columns."""
    corners = [-(films.images[:SHOWN] @ films.texts[:SHOWN].T) for films in groups]
    scale = {"vmin": min(map(np.min, corners)), "vmax": max(map(np.max, corners))}
    title = f"{name}: distances of posters (rows) and introductions (columns), on one scale"
    side = 3.2 + 0.13 * max(map(len, corners))
    with canvas(path, side * len(groups) + 1.2, side, title, footer) as (figure, _):
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, films, corner in zip(panels, groups, corners, strict=True):
            titles = [plain_title(film.title) for film in films.records[:SHOWN]]
            names = [wrapped(title, 1.7, 7, 1)[0] for title in titles]
            shown = axes.imshow(corner, cmap="cividis", **scale)
            axes.set_yticks(range(len(names)), names, size=6)
            axes.set_xticks(range(len(names)), names, size=6, rotation=90)
            pairs, rest = mean_distances(corner)
            means = f"mean {pairs:.3f} on the diagonal, {rest:.3f} off it"
            axes.set_title(f"{len(names)} {films.name}: {means}", size=10)
        figure.colorbar(shown, ax=list(panels), label="D = minus the cosine (no unit)")


def draw_gap(path: Path, history: list[dict[str, float]], name: str, footer: str) -> None:
    """Accuracy over epochs on training films and on as many dev films, on one scale."""
    films = history[0]["dev_films"]
    title = f"{name}: memorised or learned? Training films against films not trained on (dev)"
    with canvas(path, 9.5, 4.2, title, footer) as (figure, _):
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (dim, way) in zip(panels, DIRECTIONS.items(), strict=True):
            curves = {"training films": f"train_top1_{way}", "dev films": f"top1_{way}"}
            plot_epochs(axes, history, curves)
            axes.set_title(f"{dim}: {MEANING[dim].partition(':')[0]}")
            draw_chance(axes, 100 / films, f"chance: {100 / films:.2g}%")
            axes.set_ylabel(f"accuracy among {films} films (%)")
            legend_above(axes, 3)


def draw_genres(
    path: Path, groups: dict[str, dict[str, dict[str, float]]], name: str, footer: str
) -> None:
    """Which genres match best, a panel for each group of films on one scale: R@10, both ways."""
    total: dict[str, float] = {}
    for recalls in groups.values():
        for genre, cells in recalls.items():
            total[genre] = total.get(genre, 0) + cells["dim0"] + cells["dim1"]
    order, title = sorted(total, key=total.__getitem__), f"{name}: Recall@10 by genre"
    size = 2.2 + 3.8 * len(groups), 1.4 + 0.34 * len(order)
    with canvas(path, *size, title, footer) as (figure, _):
        panels = figure.subplots(1, len(groups), sharex=True, squeeze=False)[0]
        for axes, (group, recalls) in zip(panels, groups.items(), strict=True):
            places = [order.index(genre) for genre in recalls]
            looks = zip((0.2, -0.2), MEANING.items(), HATCHES, strict=False)
            for shift, (dim, meaning), hatch in looks:
                values = [cells[dim] for cells in recalls.values()]
                style = {"hatch": hatch, "edgecolor": "white", "linewidth": 0}
                label = meaning.partition(":")[0]
                axes.barh(np.add(places, shift), values, 0.38, label=label, **style)
            counts = [
                f"{genre} ({recalls[genre]['films'] if genre in recalls else 'too few'})"
                for genre in order
            ]
            axes.set_yticks(range(len(order)), counts)
            axes.set(xlabel="R@10 (%)", xlim=(0, None), title=group, ylim=(-0.6, len(order) - 0.4))
            axes.grid(True, axis="x")
            axes.set_axisbelow(True)
            legend_above(axes, 1)
        panels[0].set_ylabel("genre (number of its films)")
