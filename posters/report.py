"""How well a model does on films that it has not seen, beside those that it was trained on.

evaluate.py calls `evaluate_films` for the test split of such data and hands itself in, as
`evaluate`: its ranks and recalls are used here, and a folder never imports a script.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from posters.head import PosterHead
from posters.words import hide_words, read_words
from support.command import atomic_write, warn
from support.embedding import trained_on
from support.ranking import first_captions
from support.results import save_embeddings

if TYPE_CHECKING:
    from dataset import CaptionedImages
    from support.embedding import Trained

# The two directions of D, minus the cosine of poster (row) and introduction (column).
DIRECTIONS = {"dim0": "t2i", "dim1": "i2t"}
MEANING = {
    "dim0": "introduction -> poster: the nearest poster of each column of D",
    "dim1": "poster -> introduction: the nearest introduction of each row of D",
}
GROUPS = {"all": "all films", "train": "training films", "heldout": "films not in training"}


def mean_distances(distances: np.ndarray) -> tuple[float, float]:
    """The means of the diagonal (the pairs) of D (N, N), and of the rest."""
    diagonal = distances.diagonal().sum(dtype=np.float64)
    count, total = len(distances), distances.sum(dtype=np.float64)
    return float(diagonal / count), float((total - diagonal) / max(1, count * (count - 1)))


def report_distances(distances: np.ndarray, file: Path | None) -> dict[str, float]:
    """Prints the means of D and returns them; writes D where a file is named."""
    pairs, rest = mean_distances(distances)
    count = len(distances)
    print(f"D = -cosine, {count:,} pairs: mean {pairs:.4f} on the diagonal, {rest:.4f} off it")
    if file:
        with atomic_write(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, distances)
        print(f"wrote {file}")
    return {"distance_diagonal": pairs, "distance_rest": rest}


def paired_ranks(images: np.ndarray, texts: np.ndarray, evaluate: ModuleType) -> dict[str, Any]:
    """The ranks of N pairs among themselves: {"dim0": (N,), "dim1": (N,)}; ties are lost."""
    i2t, t2i = evaluate.retrieval_ranks(images, texts, np.arange(len(images)))
    return {"dim0": t2i, "dim1": i2t}


def accuracies(images: np.ndarray, texts: np.ndarray, evaluate: ModuleType) -> dict[str, float]:
    """The share of N pairs, in percent, whose nearest other half is their own, both ways."""
    ranks = paired_ranks(images, texts, evaluate)
    return {dim: evaluate.recall_at_k(ranks[dim], 1) for dim in DIRECTIONS}


def group_figures(images: np.ndarray, texts: np.ndarray, evaluate: ModuleType) -> dict[str, Any]:
    """Recalls of the films of one group among themselves, with chance, N and 95% intervals."""
    ranks, count = paired_ranks(images, texts, evaluate), len(images)
    metrics = evaluate.retrieval_metrics(ranks["dim1"], ranks["dim0"])
    intervals = evaluate.bootstrap_intervals(ranks["dim1"], ranks["dim0"], np.arange(count))
    figures: dict[str, Any] = {"films": count, "chance": 100 / count}
    for dim, way in DIRECTIONS.items():
        figures[dim] = {name: metrics[f"{way}_{name}"] for name in ("r1", "r5", "r10", "medr")}
        figures[dim]["interval"] = intervals[f"{way}_r1"]
    return figures


def by_candidates(
    images: np.ndarray, texts: np.ndarray, evaluate: ModuleType, sizes: tuple = (100, 500)
) -> list[dict[str, float]]:
    """Accuracy among all films, and among 20 seeded sets of each smaller size: mean and sd."""
    random, count, rows = np.random.default_rng(0), len(images), []
    for size in [*[size for size in sizes if size < count], count]:
        values = []
        for _ in range(20 if size < count else 1):
            chosen = random.choice(count, size, replace=False)
            values.append([*accuracies(images[chosen], texts[chosen], evaluate).values()])
        row = {"candidates": size, "draws": len(values), "chance": 100 / size}
        for dim, mean, sd in zip(DIRECTIONS, np.mean(values, 0), np.std(values, 0), strict=True):
            row |= {dim: float(mean), f"{dim}_sd": float(sd)}
        rows.append(row)
    return rows


def generalise(
    images: np.ndarray, texts: np.ndarray, labels: np.ndarray, evaluate: ModuleType
) -> dict[str, Any]:
    """All figures of films with `labels`: "train" if trained on, "test" if held out, or another.

    The keys all_dim0 ... heldout_dim1 are accuracies in percent; `groups` tells the rest. A group
    of fewer than two films has no figure.
    """
    chosen = {"all": labels != "", "train": labels == "train", "heldout": labels == "test"}
    chosen = {name: rows for name, rows in chosen.items() if rows.sum() > 1}
    groups = {name: group_figures(images[r], texts[r], evaluate) for name, r in chosen.items()}
    held = chosen.get("heldout", [])
    return {
        **{f"{name}_{dim}": g[dim]["r1"] for name, g in groups.items() for dim in DIRECTIONS},
        "groups": groups,
        "by_candidates": by_candidates(images[held], texts[held], evaluate) if len(held) else [],
    }


def generalisation_table(figures: dict[str, Any]) -> str:
    """The figures of `generalise` as lines of text."""
    lines = [f"{dim}: {meaning}" for dim, meaning in MEANING.items()]
    lines.append(
        f"{'films':24}{'N':>6}{'chance':>8}  {'':5}{'accuracy':<22}{'R@5':>6}{'R@10':>6}{'medr':>7}"
    )
    for name, group in figures["groups"].items():
        head = f"{GROUPS[name]:24}{group['films']:6,}{group['chance']:7.2f}%"
        for dim in DIRECTIONS:
            cells, (low, high) = group[dim], group[dim]["interval"]
            shown = f"{cells['r1']:6.2f}% [{low:5.2f}, {high:5.2f}]{cells['r5']:6.1f}"
            lines.append(f"{head:38}  {dim:5}{shown}{cells['r10']:6.1f}{cells['medr']:7.1f}")
            head = ""  # on the first of the two lines alone
    for row in figures["by_candidates"]:
        drawn, cells = "all of them", [f"{dim} {row[dim]:.2f}%" for dim in DIRECTIONS]
        if row["draws"] > 1:
            drawn = f"mean of {row['draws']} draws"
            cells = [f"{dim} {row[dim]:.2f}% (sd {row[f'{dim}_sd']:.2f})" for dim in DIRECTIONS]
        among = f"among {row['candidates']:,} ({drawn}, chance {row['chance']:.2f}%)"
        lines.append(f"films not in training, {among}: {', '.join(cells)}")
    if "heldout_masked_dim0" in figures:
        cells = [f"{dim} {figures[f'heldout_masked_{dim}']:.2f}%" for dim in DIRECTIONS]
        lines.append(f"films not in training, their words painted over: {', '.join(cells)}")
    return "\n".join(lines)


def all_films(trained: Trained, dataset: CaptionedImages) -> tuple[CaptionedImages, np.ndarray]:
    """The films of all splits as one, "film", with their first introductions; and a label each.

    "train": it was trained on; "test": a test film that was not; the rest are in neither group.
    """
    rows = np.flatnonzero(dataset.labels != "")
    rows = rows[first_captions(dataset.caption_image[rows])]
    images, captions = dataset.caption_image[rows], [dataset.captions[i] for i in rows]
    seen, test = trained_on(trained, dataset, images), dataset.labels[rows] == "test"
    labels = np.full(len(rows), "film")
    films = replace(dataset, captions=captions, caption_image=images, labels=labels)
    return films, np.select([seen, test], ["train", "test"], "dev")


def embed_without_words(
    trained: Trained, dataset: CaptionedImages, rows: np.ndarray, options: Namespace
) -> np.ndarray:
    """The embeddings (len(rows), D) of posters whose words are painted over."""
    paths, digests = [dataset.paths[i] for i in rows], [dataset.digests[i] for i in rows]
    words = read_words(paths, digests, options.cache, options.workers)

    def pixels_at(size: int) -> np.ndarray:
        pixels = dataset.at_size(size, options.cache, options.workers).pixels[rows]
        return np.stack([hide_words(p, lines) for p, lines in zip(pixels, words, strict=True)])

    return trained.embed_pixels(pixels_at)


def evaluate_films(
    trained: Trained, dataset: CaptionedImages, options: Namespace, evaluate: ModuleType
) -> dict[str, Any]:
    """Measures all films, prints the generalisation table and returns its figures.

    `evaluate` is the module evaluate.py. Writes options.save_embeddings and .distance_matrix.
    """
    films, labels = all_films(trained, dataset)
    embedded = evaluate.evaluate_trained(trained, films, "film", options)
    images, texts = embedded.image_embeddings, embedded.text_embeddings
    figures, held = generalise(images, texts, labels, evaluate), np.flatnonzero(labels == "test")
    other = len(labels) - len(held) - int((labels == "train").sum())
    print(f"{other:,} films (dev, or test films that were trained on) are in neither group")
    if missing := [GROUPS[name] for name in GROUPS if name not in figures["groups"]]:
        warn(f"fewer than two {' and '.join(missing)}: no figure for them")
    reads = any(isinstance(member.image_projection, PosterHead) for member in trained.members)
    if reads and len(held) > 1:
        hidden = embed_without_words(trained, dataset, embedded.pairs.rows[held], options)
        masked = accuracies(hidden, texts[held], evaluate)
        figures |= {f"heldout_masked_{dim}": value for dim, value in masked.items()}
    print(generalisation_table(figures))
    if options.save_embeddings:
        save_embeddings(options.save_embeddings, embedded, dataset)
    return figures | report_distances(-(images @ texts.T), options.distance_matrix)
