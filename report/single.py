"""The table and the chart of single changes: which are told apart from the base, and which level.

report/tables.py hands in the rows of report/runs.csv that report/changes.py wrote, one a run.
"""

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, variance

from support.figures import INK, PALETTE, canvas, legend_above, write

Rows = list[dict[str, str]]
BASE = "change: base"


def by_change(rows: Rows) -> dict[str, Rows]:
    """The rows of each change, a seed each, the base's first."""
    found = defaultdict(list, {BASE: []})
    for row in rows:
        found[row["run"]].append(row)
    return found if found[BASE] else {}


def recall(rows: Rows) -> list[float]:
    return [float(row["mean_recall"]) for row in rows]


def spread(changes: dict[str, Rows]) -> float:
    """The standard deviation among seeds, pooled over all changes: each alone has too few."""
    groups = [recall(rows) for rows in changes.values() if rows[1:]]
    freedom = sum(len(values) - 1 for values in groups)
    return math.sqrt(sum(variance(v) * (len(v) - 1) for v in groups) / freedom) if freedom else 0.0


def finding(rows: Rows, base: Rows, deviation: float) -> str:
    """Better or worse where the difference is above twice its own standard deviation.

    Level where no change has two seeds: then nothing is known of how far seeds differ.
    """
    if not deviation:
        return "level"
    difference = fmean(recall(rows)) - fmean(recall(base))
    margin = 2 * deviation * math.sqrt(1 / len(rows) + 1 / len(base))
    return "level" if abs(difference) <= margin else "better" if difference > 0 else "worse"


def table(rows: Rows) -> list[list[str]]:
    """Lines of cells, the heads first: means over the seeds, and what they say."""
    changes = by_change(rows)
    deviation = spread(changes)
    lines = [["one change", "typed", "i2t R@1", "t2i R@1", "mean", "spread", "against base"]]
    for run, of_run in changes.items():
        values = recall(of_run)
        apart = f"{min(values):.1f} to {max(values):.1f}"
        verdict = "the start"
        if run != BASE:
            difference = fmean(values) - fmean(recall(changes[BASE]))
            verdict = f"{finding(of_run, changes[BASE], deviation)}: {difference:+.1f}"
        firsts = [f"{fmean(float(r[f'{way}_r1']) for r in of_run):.1f}" for way in ("i2t", "t2i")]
        name = run.removeprefix("change: ").replace("-", " ")
        typed = f"`{of_run[0]['change']}`"
        lines.append([name, typed, *firsts, f"{fmean(values):.1f}", apart, verdict])
    return lines


def draw(path: Path, rows: Rows) -> None:
    """A bar a change, a dot a seed, and the range in which a change is level. Raises UserError."""
    changes = by_change(rows)
    base, deviation = changes[BASE], spread(changes)
    title = "The assignment's model, one change at a time"
    footer = "mean of the six recalls on Flickr8k's dev split; a dot is a seed"
    with canvas(path, 5.6, 0.3 * len(changes) + 1.3, title, footer) as (figure, _):
        axes, middle = figure.subplots(), fmean(recall(base))
        margin = 2 * deviation * math.sqrt(2 / len(base))
        axes.axvspan(middle - margin, middle + margin, color="0.6", alpha=0.25, label="level")
        for place, of_run in enumerate(changes.values()):
            values, found = recall(of_run), finding(of_run, base, deviation)
            hue = PALETTE[5] if of_run is base else PALETTE[0]
            pattern = "//" if found == "worse" else ""
            axes.barh(place, fmean(values), 0.7, color=hue, hatch=pattern, edgecolor="white")
            axes.plot(values, [place] * len(values), "o", color=INK, markersize=3)
        labels = [run.removeprefix("change: ").replace("-", " ") for run in changes]
        axes.set_yticks(range(len(labels)), labels, size=10)
        axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="mean recall on dev (%)")
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        legend_above(axes, 1)


def draw_if_measured(path: Path, rows: Rows) -> None:
    """The chart, where at least the base was measured. Raises UserError."""
    if by_change(rows):
        write(path, draw, rows)
