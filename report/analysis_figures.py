"""Draws an analysis: `python visualize.py --analysis DIR [--analysis DIR ...] [--out FOLDER]`.

A folder is what `evaluate.py --analysis DIR` wrote; several are drawn side by side on one scale,
named after their folders. Figures lie in the first folder unless --out names another.
"""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from report.analysis import LEAD, WAYS
from support.command import UserError
from support.figures import GREY, MARKERS, PALETTE, canvas, legend_above, wrapped, write
from support.results import read_csv

Rows = list[dict[str, str]]
# The kinds of groups in a figure; a kind that none of them names goes with the pictures.
CAPTION_KINDS = ("what it speaks of", "number of people", "colour", "number", "action")
CAPTION_KINDS += ("relation", "place")
LABELS = {"i2t": "picture → caption", "t2i": "caption → picture"}


class Analysis(NamedTuple):
    """The files of one folder, and how its model is drawn."""

    name: str
    groups: Rows
    words: Rows
    hubs: Rows
    epochs: Rows
    summary: dict[tuple[str, str], dict[str, str]]  # by direction and measure
    about: dict[str, Any]
    colour: str
    marker: str


def read_analysis(folder: Path, colour: str, marker: str) -> Analysis:
    """Reads a folder that evaluate.py --analysis wrote. Raises UserError."""
    try:
        about = json.loads((folder / "about.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        hint = f"{folder} is no analysis: python evaluate.py CHECKPOINT --analysis {folder}"
        raise UserError(f"{hint} ({error})") from error
    files = {n: read_csv(folder / f"{n}.csv") for n in ("groups", "words", "hubs", "epochs")}
    summary = {(r["direction"], r["measure"]): r for r in read_csv(folder / "summary.csv")}
    name = folder.resolve().name
    return Analysis(name, **files, summary=summary, about=about, colour=colour, marker=marker)


def number(text: str) -> float:
    return float(text) if text else float("nan")


def with_error(
    axes: Axes, model: Analysis, places: list[float], rows: Rows, value: str, low: str, high: str
) -> None:
    """Points with their intervals, from three columns of some rows."""
    middle, *ends = (np.array([number(row[key]) for row in rows]) for key in (value, low, high))
    style = {"color": model.colour, "fmt": model.marker, "label": model.name, "linewidth": 1}
    axes.errorbar(middle, places, xerr=np.abs(np.array(ends) - middle), markersize=4, **style)


def draw_groups(path: Path, models: list[Analysis], of_captions: bool, footer: str) -> None:
    """R@10 of each group minus that of all, both directions, where there are enough to tell."""
    found: dict[tuple[str, str], None] = {}
    for model in models:
        for row in model.groups:
            told = row["finding"] not in ("", "too few") and row["kind"] != LEAD
            if told and (row["kind"] in CAPTION_KINDS) == of_captions:
                found.setdefault((row["kind"], row["group"]))
    order = sorted(found, key=lambda pair: [kind for kind, _ in found].index(pair[0]))
    about = "what captions speak of" if of_captions else "topics, lengths and pictures"
    title = f"R@10 of groups against all queries, in points: {about}"
    columns = ("against_all", "against_all_low", "against_all_high")
    height = 1 + len(order) * (0.13 + 0.09 * len(models))
    with canvas(path, 9.5, height, title, footer) as (figure, _):
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, way in zip(panels, WAYS, strict=True):
            for shift, model in enumerate(models):
                rows = {(r["kind"], r["group"]): r for r in model.groups if r["direction"] == way}
                told = [p for p in order if p in rows and rows[p]["finding"] != "too few"]
                places = [order.index(p) + 0.7 * (shift + 1) / (len(models) + 1) for p in told]
                chosen = [rows[pair] for pair in told]
                with_error(axes, model, places, chosen, *columns)
            axes.axvline(0, color=GREY, linewidth=1)
            axes.set(title=LABELS[way], xlabel="points of R@10 against all (95%)")
            axes.grid(True, axis="x")
            for i in range(1, len(order)):
                if order[i][0] != order[i - 1][0]:
                    axes.axhline(i - 0.15, color=GREY, linewidth=0.6)
        names = [f"{kind}: {name}" for kind, name in order]
        names = [wrapped(name, 2.8, 8, 1)[0] for name in names]
        panels[0].set_yticks(np.arange(len(order)) + 0.35, names, size=8)
        panels[0].set_ylim(len(order), -0.3)
        for axes in panels:
            legend_above(axes)


def draw_words(path: Path, models: list[Analysis], footer: str) -> None:
    """The words that move a caption's rank most, for each model: factor and interval, log scale."""
    title = "Words that move the rank of a caption's picture, others held fast (least squares)"
    chosen = []
    for model in models:
        rows = [r for r in model.words if r["direction"] == "t2i"]
        told = [r for r in rows if r["finding"] != "no difference seen"]
        told.sort(key=lambda r: number(r["times"]))
        chosen.append(told if len(told) <= 24 else [*told[:12], *told[-12:]])
    most = max(1, *map(len, chosen))
    width = max(6, 3.6 * len(models))
    with canvas(path, width, 1.2 + 0.22 * most, title, footer) as (figure, _):
        panels = figure.subplots(1, len(models), squeeze=False, sharex=True)[0]
        for axes, model, rows in zip(panels, models, chosen, strict=True):
            places = [*range(len(rows))]
            with_error(axes, model, places, rows, "times", "times_low", "times_high")
            axes.axvline(1, color=GREY, linewidth=1)
            sure = [f"{r['word']} *" if r["holds_for_all"] == "yes" else r["word"] for r in rows]
            axes.set_yticks(range(len(rows)), sure, size=9)
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
            axes.set(xlim=(0.2, 5), title=model.name, ylim=(most - 0.5, -0.5))
            axes.set_xlabel("rank times (95%; * holds for all at once)")
            axes.grid(True, axis="x")


def draw_lead(axes: Axes, models: list[Analysis]) -> None:
    """How often the first answer is right by how far it leads."""
    for model in models:
        of_lead = [r for r in model.groups if r["kind"] == LEAD and r["direction"] == "t2i"]
        places = [int(row["group"].split()[0]) for row in of_lead]
        values = [number(row["r1"]) for row in of_lead]
        axes.plot(places, values, color=model.colour, marker=model.marker, label=model.name)
    axes.set(title="Is it right where it is sure?", ylim=(0, None))
    axes.set(xlabel="tenth of captions by the first answer's lead", ylabel="R@1 (%)")


def draw_hubs(axes: Axes, models: list[Analysis]) -> None:
    """The share of all places among the first ten that the most returned pictures hold."""
    for model in models:
        shares = [number(row["percent"]) for row in model.hubs if row["direction"] == "t2i"]
        pool = int(model.about["images"])
        held = np.concatenate([[0], np.cumsum(shares), np.full(pool - len(shares), 100)])
        axes.plot(100 * np.arange(pool + 1) / pool, held, color=model.colour, label=model.name)
    axes.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="all alike")
    axes.set(title="Hubs", xlabel="most returned pictures (%)", xlim=(0, 100), ylim=(0, 101))
    axes.set_ylabel("places among the first ten (%)")


def draw_misses(axes: Axes, models: list[Analysis]) -> None:
    """How many wrong first answers a person would accept, estimated."""
    for shift, model in enumerate(models):
        rows = [model.summary[way, "misses a person would accept"] for way in WAYS]
        places = [i + 0.7 * (shift + 1) / (len(models) + 1) for i in range(len(rows))]
        with_error(axes, model, places, rows, "value", "low", "high")
    axes.set_yticks(np.arange(len(WAYS)) + 0.35, [LABELS[way] for way in WAYS])
    axes.set(title="Near misses", ylim=(len(WAYS), -0.3), xlim=(0, None))
    axes.set_xlabel("misses that a person would accept (%, estimated, 95%)")


def draw_epochs(axes: Axes, models: list[Analysis]) -> None:
    """Recall of training images against that of dev, or the losses where it was not measured."""
    measured = all(m.epochs and "train_top1_t2i" in m.epochs[0] for m in models)
    train, dev = ("train_top1_t2i", "top1_t2i") if measured else ("train_loss", "dev_loss")
    for model in models:
        epochs = [number(row["epoch"]) for row in model.epochs]
        for key, line, name in ((train, "--", "training"), (dev, "-", "dev")):
            values = [number(row[key]) for row in model.epochs if key in row]
            style = {"color": model.colour, "marker": model.marker, "linestyle": line}
            axes.plot(epochs[: len(values)], values, label=f"{model.name}, {name}", **style)
    axes.set(title="Training images against dev", xlabel="epoch", ylim=(0, None))
    axes.set_ylabel("top-1, caption → picture (%)" if measured else "loss")


def draw_causes(path: Path, models: list[Analysis], footer: str) -> None:
    """Lead, hubs, near misses and epochs, a panel each."""
    panels = (draw_lead, draw_hubs, draw_misses, draw_epochs)
    with canvas(path, 9.5, 6.6, "Why answers are wrong", footer) as (figure, _):
        for axes, draw in zip(figure.subplots(2, 2).flat, panels, strict=True):
            draw(axes, models)
            axes.grid(True)
            legend_above(axes, 3)


def footer_of(models: list[Analysis], intervals: str) -> str:
    """What was measured and how, and what speaks against it."""
    first = models[0].about
    checkpoints = "; ".join(f"{model.name}: {model.about['checkpoint']}" for model in models)
    footer = (
        f"{first['splits']} {first['split']} split, {first['images']:,} images, "
        f"{first['captions']:,} captions; intervals: 95%, {intervals}; {checkpoints}"
    )
    if any(model.about["split_by_caption"] for model in models):
        footer += "; SPLIT BY CAPTION: flatters"
    if len({model.about["fingerprint"] + model.about["split"] for model in models}) > 1:
        footer += "; NOT THE SAME DATA OR SPLIT in all"
    return footer


def draw_analysis(folders: list[Path], out: Path | None) -> None:
    """Draws the analyses of some folders side by side and prints what is written. UserError."""
    looks = zip(folders, cycle(PALETTE[:6]), cycle(MARKERS), strict=False)
    models = [read_analysis(folder, colour, marker) for folder, colour, marker in looks]
    out, drawn = out or folders[0], footer_of(models, "bootstrap over pictures")
    clustered = footer_of(models, "errors clustered by picture")
    write(out / "analysis_captions.png", draw_groups, models, True, drawn)
    write(out / "analysis_pictures.png", draw_groups, models, False, drawn)
    write(out / "analysis_words.png", draw_words, models, clustered)
    write(out / "analysis_causes.png", draw_causes, models, drawn)
