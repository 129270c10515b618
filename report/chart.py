"""The path from the assignment to the best recipe as a bar chart; tables.py draws it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.patches import Patch

from support.figures import INK, PALETTE, canvas, wrapped


def draw_path(path: Path, runs: list[list[dict[str, str]]]) -> None:
    """A bar for each change, its length the mean recall on dev. Raises UserError."""
    rows = [run[-1] for run in runs]
    values = [sum(float(row["mean_recall"]) for row in run) / len(run) for run in runs]
    hues = [PALETTE[0] if row["changes"] == "1" else PALETTE[5] for row in rows]
    footer = "mean of the six recalls on Flickr8k's dev split (R@1, 5, 10 in both directions)"
    title = "From the assignment to the best recipes, from top to bottom"
    with canvas(path, 8, 0.42 * len(rows) + 0.9, title, footer) as (figure, _):
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, values, color=hues, height=0.72)
        labels = ["\n".join(wrapped(row["run"], 2.6, 10, 2)) for row in rows]
        axes.set_yticks(places, labels, size=11)
        for place, value, row in zip(places, values, rows, strict=True):
            text = f"{value:.1f}" + (f"  ({row['bought']})" if place else "")
            axes.text(value + 0.7, place, text, va="center", size=11, color=INK)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="mean recall on dev (%)", xlim=(0, 1.2 * max(values)))
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        kinds = {"one change": PALETTE[0], "several changes at once": PALETTE[5]}
        present = {name: hue for name, hue in kinds.items() if hue in hues}
        handles = [Patch(color=hue, label=name) for name, hue in present.items()]
        axes.legend(handles=handles, loc="upper right", bbox_to_anchor=(1, 0.97))
