"""How well a model does on films that it has not seen, beside those that it was trained on.

evaluate.py calls these on the embeddings of all films (one introduction each) and prints the table;
visualize.py draws from them. Plain NumPy, with no model in sight.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metrics import KS, bootstrap_intervals, recall_at_k, retrieval_metrics, retrieval_ranks

# The two directions of the distance matrix D (rows posters, columns introductions).
DIRECTIONS = {"dim0": "t2i", "dim1": "i2t"}
TOLD = {
    "dim0": "introduction -> poster: the nearest poster of each column of D",
    "dim1": "poster -> introduction: the nearest introduction of each row of D",
}
GROUPS = {"all": "all films", "train": "training films", "heldout": "films not in training"}


def distance_matrix(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> np.ndarray:
    """D (N, N), float32: minus the cosine of poster (row) and introduction (column)."""
    return -(image_embeddings.astype(np.float32) @ text_embeddings.astype(np.float32).T)


def mean_distances(distances: np.ndarray) -> tuple[float, float]:
    """The means of D's diagonal (the pairs) and of the rest."""
    own = distances.diagonal().sum(dtype=np.float64)
    count, total = len(distances), distances.sum(dtype=np.float64)
    return float(own / count), float((total - own) / max(1, count * (count - 1)))


def paired_ranks(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> dict[str, Any]:
    """The ranks of N pairs among themselves: {"dim0": (N,), "dim1": (N,)}; ties are lost."""
    i2t, t2i = retrieval_ranks(image_embeddings, text_embeddings, np.arange(len(image_embeddings)))
    return {"dim0": t2i, "dim1": i2t}


def group_figures(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> dict[str, Any]:
    """Accuracy of the films of one group among themselves, with chance, N and 95% intervals."""
    ranks, count = paired_ranks(image_embeddings, text_embeddings), len(image_embeddings)
    metrics = retrieval_metrics(ranks["dim1"], ranks["dim0"])
    intervals = bootstrap_intervals(ranks["dim1"], ranks["dim0"], np.arange(count))
    made: dict[str, Any] = {"films": count, "chance": 100 / count}
    for dim, way in DIRECTIONS.items():
        made[dim] = {
            **{f"r{k}": metrics[f"{way}_r{k}"] for k in KS},
            "medr": metrics[f"{way}_medr"],
            "interval": intervals[f"{way}_r1"],
        }
    return made


def by_candidates(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    sizes: Sequence[int] = (100, 500),
    draws: int = 20,
) -> list[dict[str, float]]:
    """Accuracy among all films, and among `draws` seeded sets of each smaller size: mean and sd."""
    random, count, made = np.random.default_rng(0), len(image_embeddings), []
    for size in (*(size for size in sizes if size < count), count):
        values = []
        for _ in range(draws if size < count else 1):
            chosen = random.choice(count, size, replace=False)
            ranks = paired_ranks(image_embeddings[chosen], text_embeddings[chosen])
            values.append([recall_at_k(ranks[dim], 1) for dim in DIRECTIONS])
        mean, spread = np.mean(values, 0), np.std(values, 0)
        row = {"candidates": size, "draws": len(values), "chance": 100 / size}
        for place, dim in enumerate(DIRECTIONS):
            row |= {dim: float(mean[place]), f"{dim}_sd": float(spread[place])}
        made.append(row)
    return made


def generalise(
    image_embeddings: np.ndarray, text_embeddings: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """All figures of films with `labels`: "train" if trained on, "test" if held out, or another.

    The keys all_dim0 ... heldout_dim1 are accuracies in percent; `groups` tells the rest.
    """
    held = labels == "test"
    chosen = (np.ones(len(labels), bool), labels == "train", held)
    groups = {
        name: group_figures(image_embeddings[own], text_embeddings[own])
        for name, own in zip(GROUPS, chosen, strict=True)
        if own.sum() > 1
    }
    return {
        **{f"{name}_{dim}": g[dim]["r1"] for name, g in groups.items() for dim in DIRECTIONS},
        "groups": groups,
        "by_candidates": by_candidates(image_embeddings[held], text_embeddings[held])
        if held.sum() > 1
        else [],
    }


def masked_figures(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> dict[str, float]:
    """Accuracy among held-out films whose posters have their words painted over."""
    ranks = paired_ranks(image_embeddings, text_embeddings)
    return {f"heldout_masked_{dim}": recall_at_k(ranks[dim], 1) for dim in DIRECTIONS}


def generalisation_table(figures: dict[str, Any]) -> str:
    """The figures of `generalise` as lines of text."""
    lines = [f"{dim}: {told}" for dim, told in TOLD.items()]
    lines.append(
        f"{'films':24}{'N':>6}{'chance':>8}  {'':5}{'accuracy':<22}{'R@5':>6}{'R@10':>6}{'medr':>7}"
    )
    for name, group in figures["groups"].items():
        for dim in DIRECTIONS:
            cells, first = group[dim], dim == "dim0"
            low, high = cells["interval"]
            head = f"{GROUPS[name]:24}{group['films']:6,}{group['chance']:7.2f}%" if first else ""
            shown = f"{cells['r1']:6.2f}% [{low:5.2f}, {high:5.2f}]"
            more = f"{cells['r5']:6.1f}{cells['r10']:6.1f}{cells['medr']:7.1f}"
            lines.append(f"{head:38}  {dim:5}{shown:<22}{more}")
    for row in figures["by_candidates"]:
        spread = row["draws"] > 1
        cells = (
            f"{dim} {row[dim]:.2f}%" + (f" (sd {row[dim + '_sd']:.2f})" if spread else "")
            for dim in DIRECTIONS
        )
        drawn = f"mean of {row['draws']} draws" if spread else "all of them"
        lines.append(
            f"films not in training, among {row['candidates']:,} ({drawn}, chance "
            f"{row['chance']:.2f}%): {', '.join(cells)}"
        )
    if "heldout_masked_dim0" in figures:
        cells = (f"{dim} {figures[f'heldout_masked_{dim}']:.2f}%" for dim in DIRECTIONS)
        lines.append(f"films not in training, their words painted over: {', '.join(cells)}")
    return "\n".join(lines)


def genre_table(genres: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The names of all genres, and which film (row) is of which: float32 (films, names)."""
    parts = [set(filter(None, joined.split("|"))) for joined in genres]
    names = sorted(set().union(*parts))
    cells = [[name in own for name in names] for own in parts]
    return names, np.array(cells, np.float32).reshape(len(parts), len(names))


def genre_recalls(
    ranks: dict[str, np.ndarray], genres: Sequence[str], fewest: int = 10
) -> dict[str, dict[str, float]]:
    """{genre: films and R@10 in both directions} of genres with `fewest` films or more."""
    names, table = genre_table(genres)
    made = {}
    for name, column in zip(names, table.T, strict=True):
        own = column > 0
        if own.sum() >= fewest:
            found = {dim: recall_at_k(ranks[dim][own], 10) for dim in DIRECTIONS}
            made[name] = {"films": int(own.sum()), **found}
    return made


def genre_likeness(genres: Sequence[str]) -> np.ndarray:
    """Jaccard index of the genres of every two films: float32 (N, N); 0 where one has none."""
    table = genre_table(genres)[1]
    common, sizes = table @ table.T, table.sum(1)
    return common / np.maximum(sizes[:, None] + sizes[None, :] - common, 1)
