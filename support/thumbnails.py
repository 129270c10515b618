"""Some pictures set among the points of t-SNE, where they do not hide one another."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

SIDE, MOST = 42, 10  # pixels of a thumbnail's longer side; how many there are


def spread(points: np.ndarray, topic: np.ndarray) -> list[int]:
    """Which of points (N, 2) get a picture: of each topic in turn the most central one left.

    None is near one that was chosen before it.
    """
    span = np.maximum(np.ptp(points, axis=0), 1e-9)
    places, chosen = points / span, []
    queues = []
    for i in np.unique(topic):
        members = np.flatnonzero(topic == i)
        centre = np.median(places[members], axis=0)
        queues.append(members[np.linalg.norm(places[members] - centre, axis=1).argsort()].tolist())
    while len(chosen) < MOST and any(queues):
        for queue in queues:
            while queue and len(chosen) < MOST:
                i = queue.pop(0)
                if all(np.abs(places[i] - places[j]).max() > 0.11 for j in chosen):
                    chosen.append(i)
                    break
    return chosen


def draw_thumbnail(axes: Axes, point: np.ndarray, picture: Image.Image, hue: str) -> None:
    """A small picture, framed in a colour, with its centre at a point."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE * 2, SIDE * 2))
    box = OffsetImage(np.asarray(small), zoom=0.5)
    frame = {"edgecolor": hue, "linewidth": 2, "boxstyle": "square,pad=0.05"}
    axes.add_artist(AnnotationBbox(box, point, pad=0.1, bboxprops=frame))
