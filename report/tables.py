"""The tables of both READMEs and of the pages in this folder, made from the CSV files beside them.

`python report/tables.py` writes them between <!-- table: NAME --> and <!-- end --> and draws the
path to the best recipe; with --check it only says whether the pages still agree with the data.
A page named *.zh.md has the same tables, their words in Chinese as report/chinese.json has them.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project above this folder

from report import findings, single
from report.changes import PREFIX
from support.command import Parser, UserError, atomic_write, run
from support.figures import HATCHES, INK, PALETTE, canvas, legend_above, name_bars, wrapped, write
from support.recipes import read_recipe
from support.results import read_csv

HERE = Path(__file__).resolve().parent
Rows = list[dict[str, str]]
MARKED = re.compile(r"(<!-- table: ([^>]+?) -->)(.*?)(<!-- end -->)", re.DOTALL)
RECALLS = "i2t R@1 / 5 / 10|t2i R@1 / 5 / 10"


def read(name: str) -> Rows:
    """The rows of a CSV file of this folder. Raises UserError."""
    return read_csv(HERE / name)


def pick(name: str, split: str) -> Rows:
    """A run's rows on a split, one a seed: of the newest version, the last where two are alike."""
    rows = [row for row in read("runs.csv") if (row["run"], row["split"]) == (name, split)]
    newest = max((int(row["version"]) for row in rows), default=0)
    return list({row["seed"]: row for row in rows if int(row["version"]) == newest}.values())


def mean(rows: Rows, key: str, form: str = ".1f") -> str:
    """The mean over the rows that have `key`, as it stands where only one has; "-" for none."""
    numbers = [row[key] for row in rows if row.get(key)]
    return format(fmean(map(float, numbers)), form) if numbers[1:] else "".join(numbers) or "-"


def recalls(rows: Rows, way: str) -> str:
    """R@1 / 5 / 10 of a direction, as far as the rows have them."""
    return " / ".join(mean(rows, f"{way}_r{k}") for k in (1, 5, 10)).removesuffix(" / - / -")


def seeds(rows: Rows) -> str:
    """How many seeds stand behind the rows; "0-2" is a row that holds the mean of three."""
    ends = [[int(end) for end in row["seed"].split("-")] for row in rows]
    return str(sum(end[-1] - end[0] + 1 for end in ends))


def minutes(rows: Rows) -> str:
    """Minutes of training, and on what where that was not 2 cores with bf16."""
    timed = [row for row in rows if row.get("minutes")] or rows
    machine = timed[0].get("machine", "").split(" (")[0]
    return mean(timed, "minutes") + ("" if machine in ("", "2 cores with bf16") else f", {machine}")


CELLS: dict[str, Callable[[Rows], str]] = {  # a column's head -> its cell, of the rows of one run
    "model": lambda rows: f"**`{rows[0]['command']}`**" if "command" in rows[0] else rows[0]["run"],
    "typed": lambda rows: f"`{rows[-1]['change']}`",
    "seed": lambda rows: "**mean**" if rows[1:] else rows[0]["seed"],
    "95% i2t": lambda rows: "" if rows[1:] else rows[0]["i2t_95"],
    "95% t2i": lambda rows: "" if rows[1:] else rows[0]["t2i_95"],
    "i2t R@1 / 5 / 10": lambda rows: recalls(rows, "i2t"),
    "t2i R@1 / 5 / 10": lambda rows: recalls(rows, "t2i"),
    "medr": lambda rows: ", ".join(
        mean(rows, f"{w}_medr", ".0f") for w in ("i2t", "t2i") if "seed" in rows[0]
    ),
    "mean": lambda rows: mean(rows, "mean_recall"),
    "minutes": minutes,
    "seeds": seeds,
    "source": lambda rows: rows[0].get("source") or f"ours, seeds: {seeds(rows)}",
}


def table(head: str, runs: list[Rows]) -> str:
    """A Markdown table with a line a run; a column is one of CELLS, or one of the file's own."""
    names = head.split("|")
    lines = [[CELLS[c](rows) if c in CELLS else rows[-1][c] for c in names] for rows in runs]
    return markdown([names, *lines])


def markdown(lines: list[list[str]]) -> str:
    """Lines of cells, the heads first, as a Markdown table."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"\n| {' | '.join(line)} |" for line in lines) + "\n"


def results() -> str:
    """Ours and published ones on Flickr8k's test split, from the weakest to the strongest."""
    names = "plain", "assignment, with a Transformer", "assignment", "scratch", "best", "best-hour"
    runs = [pick(name, "test") for name in names]
    runs = [rows for rows in runs if rows]  # one may not be measured yet
    runs += [[row] for row in read("published.csv") if row["split"] == "by image"]
    runs.sort(key=lambda rows: float(mean(rows, "i2t_r1")))
    return table(f"model|image network|{RECALLS}|medr|minutes|source", runs)


def group(name: str) -> list[Rows]:
    """The runs of a group on dev in the order of the file, with what each bought over the last."""
    names = dict.fromkeys(row["run"] for row in read("runs.csv") if row["group"] == name)
    runs, before = [pick(run, "dev") for run in names], None
    for rows in runs:
        now = float(mean(rows, "mean_recall"))
        rows[-1]["bought"] = "the start" if before is None else single.gain(now - before)
        before = now
    return runs


def films(splits: str, *names: str) -> str:
    """Top-1 accuracy among films, a line a run; dim 0 is introduction -> poster."""
    dims = (("dim 0", "t2i_r1"), ("dim 1", "i2t_r1"))  # of their distance matrix
    ways = [(s, dim, key) for s in splits.split("; ") for dim, key in dims]
    runs = []
    for name in names:
        cells = {f"{split}, {dim}": mean(pick(name, split), key) for split, dim, key in ways}
        runs.append([{"run": name, **cells}])
    return table("|".join(runs[0][0]), runs)


def by_seed(name: str) -> str:
    """A recipe's runs on the test split, one by one, and all of them together."""
    rows = pick(name, "test")
    lines = [[row] for row in rows] + [rows] * (len(rows) > 1)
    return table(f"seed|{RECALLS}|95% i2t|95% t2i|minutes", lines)


def leak() -> str:
    """One model on a split by image and on one by caption line, and the public report's figures."""
    runs = [pick(name, "test") for name in ("plain", "plain, split by caption line")]
    runs = [
        [{**row, "split": split} for row in rows] for rows, split in zip(runs, SPLITS, strict=True)
    ]
    runs += [[row] for row in read("published.csv") if row["split"] == SPLITS[1]]
    table_of = table(f"model|split|{RECALLS}|source", [rows for rows in runs if rows])
    return table_of + ("" if runs[1] else f"\n{UNKNOWN}: {SPLITS[1]}\n")


def analysis(part: str, *names: str) -> str:
    """What evaluate.py --analysis found about several models, side by side."""
    known = [name for name in names if (HERE / "analysis" / name).is_dir()]
    models = {
        name: {file: read(f"analysis/{name}/{file}.csv") for file in findings.FILES}
        for name in known
    }
    lines = markdown(findings.PARTS[part](models)) if models else ""
    missing = [name for name in names if name not in known]
    return lines + (f"\n{UNKNOWN}: {'; '.join(missing)}\n" if missing else "")


def single_changes() -> Rows:
    """The runs of report/changes.py, in the order of its list. Raises UserError."""
    rows = [row for row in read("runs.csv") if row["group"] == "changes"]
    order = [f"{PREFIX}{name}" for name, _ in read_recipe(str(HERE / "changes.txt"))]
    if unknown := {row["run"] for row in rows} - {*order}:
        raise UserError(f"runs.csv has a {min(unknown)}, which report/changes.txt does not list")
    return sorted(rows, key=lambda row: (order.index(row["run"]), int(row["seed"])))


SPLITS = ("by image", "by caption line")
UNKNOWN = "not measured yet"
TABLES: dict[str, Callable[..., str]] = {
    "results": results,
    "seeds": by_seed,
    "path": lambda: table(f"run|typed|{RECALLS}|mean|bought|minutes|seeds|note", group("path")),
    "journal": lambda name: table(f"run|{RECALLS}|mean|minutes|seeds|note", group(name)),
    "changes": lambda: table("run|mean|bought|seeds", group("path")),
    "single": lambda: markdown(single.table(single_changes())),
    "leak": leak,
    "analysis": analysis,
    "films": films,
    "value": lambda name, split, key: mean(pick(name, split), key),
}


def fill(marked: re.Match[str]) -> str:
    """What stands between two marks, made again from the data. Raises UserError."""
    before, name, _, after = marked.groups()
    kind, _, rest = name.partition(" ")
    try:
        return before + TABLES[kind](*rest.split(" / ") if rest else ()) + after
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"nothing is known for <!-- table: {name} -->: {error!r}") from error


def dictionary() -> dict[str, str]:
    """The tables' words in Chinese. Raises UserError."""
    try:
        return json.loads((HERE / "chinese.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {HERE / 'chinese.json'}: {error}") from error


def fill_chinese(marked: re.Match[str]) -> str:
    """The same, each cell in Chinese as far as report/chinese.json has it. Raises UserError."""
    mark, text, end = re.fullmatch(r"(<.*?-->)(.*)(<.*)", fill(marked), re.DOTALL).groups()
    words = dictionary()
    lines = (line.strip("| ").split(" | ") if "|" in line else [line] for line in text.split("\n"))
    cells = ([translated(cell, words) for cell in line] for line in lines)
    return mark + "\n".join(f"| {' | '.join(c)} |" if len(c) > 1 else c[0] for c in cells) + end


def translated(text: str, words: dict[str, str]) -> str:
    """A cell by a dictionary, part by part; what it lacks, and every number, stays."""
    if text in words:
        return words[text]
    for mark in ("; ", ": "):
        if mark in text:
            return mark.join(translated(part, words) for part in text.split(mark))
    name, number = re.fullmatch(r"(.*?)((?: [+-][\d.]+)?)", text, re.DOTALL).groups()
    return re.sub(r"(?<=\d) to (?=\d)", " 至 ", words.get(name, name) + number)


def draw_path(path: Path, runs: list[Rows]) -> None:
    """A bar for each change, its length the mean recall on dev. Raises UserError.

    As narrow as a column of text, so that its letters are not shrunk in one.
    """
    rows = [run[-1] for run in runs]
    values = [fmean(float(row["mean_recall"]) for row in run) for run in runs]
    footer = "mean of the six recalls on Flickr8k's dev split (R@1, 5, 10 in both directions)"
    title = "From the assignment to the best recipes"
    with canvas(path, 5.6, 0.34 * len(rows) + 1.1, title, footer) as (figure, _):
        axes = figure.subplots()
        kinds = (("one change", PALETTE[0], True), ("several changes at once", PALETTE[5], False))
        for (label, hue, one), hatch in zip(kinds, HATCHES, strict=False):
            places = [i for i, row in enumerate(rows) if (row["changes"] == "1") == one]
            style = {"color": hue, "height": 0.72, "hatch": hatch, "edgecolor": "white"}
            axes.barh(places, [values[i] for i in places], label=label, linewidth=0, **style)
        labels = ["\n".join(wrapped(row["run"], 1.9, 9, 2)) for row in rows]
        for place, (value, row) in enumerate(zip(values, rows, strict=True)):
            text = f"{value:.1f}" + (f" ({row['bought']})" if place else "")
            axes.text(value + 1, place, text, va="center", size=10, color=INK)
        name_bars(axes, labels, "mean recall on dev (%)")
        axes.set_xlim(0, 1.38 * max(values))
        legend_above(axes, 2)


def main(argv: list[str]) -> None:
    parser = Parser(prog="tables.py", description="Makes the pages' tables from report/runs.csv.")
    parser.add_argument("--check", action="store_true", help="only say whether the pages agree")
    check = parser.parse_args(argv).check
    for page in sorted([*HERE.parent.glob("README*.md"), *HERE.glob("*.md")]):
        text = page.read_text("utf-8")
        filled = MARKED.sub(fill_chinese if page.name.endswith(".zh.md") else fill, text)
        if check and filled != text:
            raise UserError(f"{page.name} does not agree with its data: python report/tables.py")
        if filled != text:
            with atomic_write(page) as temporary:
                temporary.write_text(filled, "utf-8")
            print(f"wrote {page}")
    if not check:
        write(HERE / "figures" / "ablations.png", draw_path, group("path"))
        single.draw_if_measured(HERE / "figures" / "changes.png", single_changes())


if __name__ == "__main__":
    run(main)
