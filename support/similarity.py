"""The cosines of pairs, sorted by what they speak of, and of matched against unmatched ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from support.cases import sample_pairs
from support.figures import HATCHES, PALETTE, canvas, legend_above, wrapped
from support.ranking import cosine

if TYPE_CHECKING:
    from evaluate import Embedded
    from support.topics import Topics

SHOWN, COUNTED = 48, 1000  # pairs in the square, and pairs that the histogram counts


def share_above(matched: np.ndarray, unmatched: np.ndarray) -> float:
    """How often, in percent, a matched pair's cosine is above an unmatched one's; ties: half."""
    order = np.sort(unmatched)
    below = np.searchsorted(order, matched, "left") + np.searchsorted(order, matched, "right")
    return float(50 * below.mean() / max(1, len(order)))


def cosines_of(embedded: Embedded, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosines (N, N) of at most `count` pairs by lot, and the position of each one's image."""
    images, captions = sample_pairs(embedded.pairs, count, seed)
    found = cosine(embedded.image_embeddings[images], embedded.text_embeddings[captions])
    return np.nan_to_num(found, nan=-1), images  # a score that is no number never matches


def draw_square(axes: Axes, cosines: np.ndarray, topic: np.ndarray, names: list[str]) -> None:
    """Cosines of pairs that are sorted by topic: the topics are framed and named, pairs dotted."""
    image = axes.imshow(cosines, cmap="cividis")
    axes.figure.colorbar(image, ax=axes, label="cosine (no unit)", shrink=0.85)
    places = np.arange(len(topic))
    style = {"s": max(1, 110 / len(topic)), "linewidth": 0.5}
    axes.scatter(places, places, color="white", edgecolor="black", **style)
    starts = np.flatnonzero(np.diff(topic, prepend=-2))
    ends = [*starts[1:], len(topic)]
    for start, end in zip(starts, ends, strict=True):
        frame = {"fill": False, "edgecolor": "white", "linewidth": 1.3}
        axes.add_patch(Rectangle((start - 0.5, start - 0.5), end - start, end - start, **frame))
    shown = [wrapped(names[i] if i >= 0 else "no words", 1.6, 8, 1)[0] for i in topic[starts]]
    middles = (starts + np.array(ends) - 1) / 2
    axes.set_xticks(middles, shown, size=8, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(middles, shown, size=8)
    axes.set(xlabel="captions, by topic", ylabel="images, by topic")
    axes.set_title("a white dot: an image and its own caption", size=9)


def draw_histogram(axes: Axes, matched: np.ndarray, unmatched: np.ndarray) -> None:
    """How often each cosine is met, among pairs and among what does not belong together."""
    both = np.concatenate([matched, unmatched])
    bins = np.linspace(both.min() - 1e-3, both.max() + 1e-3, 41)
    kinds = (("not a pair", unmatched, 0, HATCHES[0]), ("a pair", matched, 1, HATCHES[1]))
    for label, values, colour, hatch in kinds:
        if not len(values):
            continue
        weights = np.full(len(values), 100 / len(values))
        style = {"color": PALETTE[colour], "edgecolor": "black", "alpha": 0.65, "hatch": hatch}
        label = f"{label}: mean {values.mean():.3f}"
        axes.hist(values, bins, weights=weights, histtype="stepfilled", label=label, **style)
    axes.set(xlabel="cosine similarity (no unit)", ylabel="share of its kind (%)")
    axes.grid(True, axis="y")
    legend_above(axes, 1)


def draw_similarity(
    path: Path, embedded: Embedded, groups: Topics, seed: int, name: str, footer: str
) -> None:
    """Draws the cosines of 48 pairs at most, by topic, and a histogram of those of 1,000."""
    cosines, images = cosines_of(embedded, SHOWN, seed)
    topic = groups.of_image[images]
    order = np.argsort(np.where(topic < 0, len(groups.names), topic), kind="stable")
    counted, _ = cosines_of(embedded, COUNTED, seed)
    pair = np.eye(len(counted), dtype=bool)
    matched, unmatched = counted[pair], counted[~pair]
    title = f"{name}: cosine similarity of {len(images)} pairs by lot, and of {len(counted):,}"
    if len(unmatched):
        share = share_above(matched, unmatched)
        title += f". A pair is above what is not a pair in {share:.1f}% of cases (chance 50%)"
    with canvas(path, 11.5, 5.6, title, footer) as (figure, _):
        figure.get_layout_engine().set(wspace=0.05)
        square, histogram = figure.subplots(1, 2, width_ratios=(1.75, 1))
        draw_square(square, cosines[order][:, order], topic[order], groups.names)
        draw_histogram(histogram, matched, unmatched)
