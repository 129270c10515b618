"""The table and the chart of single changes: which are told apart from the base, and which level.

report/tables.py hands in the rows of report/runs.csv that report/changes.py wrote, one a run.
"""

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, variance

from report.changes import PREFIX
from support.figures import INK, PALETTE, canvas, legend_above, name_bars, write

Rows = list[dict[str, str]]
BASE = f"{PREFIX}base"


def by_change(rows: Rows) -> dict[str, Rows]:
    """The rows of each change, a seed each, the base's first."""
    found = defaultdict(list, {BASE: []})
    for row in rows:
        found[row["run"]].append(row)
    return found if found[BASE] else {}


def recall(rows: Rows) -> list[float]:
    return [float(row["mean_recall"]) for row in rows]


def name_of(run: str) -> str:
    """A change in words, as the table and the chart have it."""
    return run.removeprefix(PREFIX).replace("-", " ")


def margin(rows: Rows, base: Rows, deviation: float) -> float:
    """Twice the standard deviation of the difference of two means: up to it they are level."""
    return 2 * deviation * math.sqrt(1 / len(rows) + 1 / len(base))


def spread(changes: dict[str, Rows]) -> float:
    """The standard deviation among seeds, pooled over all changes: each alone has too few."""
    groups = [recall(rows) for rows in changes.values() if rows[1:]]
    freedom = sum(len(values) - 1 for values in groups)
    return math.sqrt(sum(variance(v) * (len(v) - 1) for v in groups) / freedom) if freedom else 0.0


def finding(rows: Rows, base: Rows, deviation: float) -> str:
    """Better or worse where the difference is above its margin.

    Level where no change has two seeds: then nothing is known of how far seeds differ.
    """
    if not deviation:
        return "level"
    difference = fmean(recall(rows)) - fmean(recall(base))
    level = abs(difference) <= margin(rows, base, deviation)
    return "level" if level else "better" if difference > 0 else "worse"


def gain(points: float) -> str:
    """With its sign and one decimal; what rounds to nothing is +0.0."""
    return f"{round(points, 1) + 0.0:+.1f}"


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
            verdict = f"{finding(of_run, changes[BASE], deviation)}: {gain(difference)}"
        firsts = [f"{fmean(float(r[f'{way}_r1']) for r in of_run):.1f}" for way in ("i2t", "t2i")]
        typed = f"`{of_run[0]['change']}`"
        lines.append([name_of(run), typed, *firsts, f"{fmean(values):.1f}", apart, verdict])
    return lines


def draw(path: Path, rows: Rows) -> None:
    """A bar a change, a dot a seed, and the range in which a change is level. Raises UserError."""
    changes = by_change(rows)
    base, deviation = changes[BASE], spread(changes)
    title = "The assignment's model, one change at a time"
    footer = "mean of the six recalls on Flickr8k's dev split; a dot is a seed; hatched: worse"
    with canvas(path, 5.6, 0.3 * len(changes) + 1.3, title, footer) as (figure, _):
        axes, middle = figure.subplots(), fmean(recall(base))
        level = margin(base, base, deviation)
        axes.axvspan(middle - level, middle + level, color="0.6", alpha=0.25, label="level")
        for place, of_run in enumerate(changes.values()):
            values, found = recall(of_run), finding(of_run, base, deviation)
            hue = PALETTE[5] if of_run is base else PALETTE[0]
            pattern = "//" if found == "worse" else ""
            axes.barh(place, fmean(values), 0.7, color=hue, hatch=pattern, edgecolor="white")
            axes.plot(values, [place] * len(values), "o", color=INK, markersize=3)
        name_bars(axes, [name_of(run) for run in changes], "mean recall on dev (%)")
        legend_above(axes, 1)


def draw_if_measured(path: Path, rows: Rows) -> None:
    """The chart, where at least the base was measured. Raises UserError."""
    if by_change(rows):
        write(path, draw, rows)
