"""Which words of a caption and which places of a picture carry a score, by leaving them out.

`python visualize.py --occlusion` draws it for the captions of its grid: a word's bar is by how much
the score falls without it; a place is brighter the more the score falls when it is painted over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from support.figures import GREEN, GREY, INK, RED, canvas, wrapped
from support.finder import places_that_matter, words_that_matter
from support.ranking import find

if TYPE_CHECKING:
    from evaluate import Embedded
    from support.embedding import Trained

MOST_WORDS = 24  # of a caption that are drawn


def draw_words(axes: Axes, falls: list[tuple[str, float]], rank: float) -> None:
    """A bar a word, in the caption's order: green where the score needs it, red where it hurts."""
    falls = falls[:MOST_WORDS]
    values = [fall for _, fall in falls]
    hues = [GREEN if value > 0 else RED for value in values]
    axes.barh(range(len(values)), values, color=hues, height=0.7)
    axes.set_yticks(range(len(values)), [wrapped(word, 1.2, 8, 1)[0] for word, _ in falls], size=8)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"true picture: rank {rank:,.0f}", size=9)
    axes.set_xlabel("the score falls by, without the word", size=8)


def draw_places(axes: Axes, picture: Image.Image, falls: np.ndarray, title: str, hue: str) -> None:
    """The picture in grey under a map of how much the score falls where it is painted over."""
    light = picture.convert("L")
    extent = (0, light.width, light.height, 0)
    axes.imshow(light, cmap="gray", extent=extent)
    top = max(float(falls.max()), 1e-9)
    style = {"cmap": "inferno", "vmin": 0, "vmax": top, "alpha": 0.6, "interpolation": "bilinear"}
    axes.imshow(falls.clip(0), extent=extent, **style)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=hue, linewidth=3)
    axes.set_title(title, size=9, color=hue)
    axes.set_xlabel(f"brightest: falls by {top:.3f}", size=8)


def draw_occlusion(
    path: Path,
    trained: Trained,
    embedded: Embedded,
    picture: Callable[[int], Image.Image],
    captions: list[int],
    name: str,
    footer: str,
) -> None:
    """A row a caption: its words, its true picture, and the first one found where that is wrong."""
    pairs, images = embedded.pairs, embedded.image_embeddings
    title = f"{name}: what carries the score? Words left out, places painted over"
    counts = [len(pairs.captions[i].split()[:MOST_WORDS]) for i in captions]
    heights = [max(2.3, 0.6 + 0.15 * count) for count in counts]
    with canvas(path, 8.6, sum(heights), title, footer) as (figure, _):
        grid = figure.subplots(len(captions), 3, squeeze=False, height_ratios=heights)
        for (words, true_place, first_place), i in zip(grid, captions, strict=True):
            text, true = embedded.text_embeddings[i], int(pairs.caption_image[i])
            falls = words_that_matter(trained, pairs.captions[i], images[true])
            draw_words(words, falls, embedded.t2i[i])
            first = find(text, images, 1)[0].position
            for axes, place, name, hue in (
                (true_place, true, "true picture", GREEN),
                (first_place, first, "first found", RED),
            ):
                if axes is first_place and first == true:
                    axes.axis("off")
                    axes.text(0.5, 0.5, "the first found\nis the true one", ha="center", color=GREY)
                    continue
                shown, score = picture(place), float(images[place] @ text)
                falls = places_that_matter(trained, shown, text)
                draw_places(axes, shown, falls, f"{name}: {score:.3f}", hue)
