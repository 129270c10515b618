"""Tables of the report's Task 4 chapter, from the files that `evaluate.py --analysis` wrote.

report/tables.py hands in what stands in report/analysis/NAME/, for several models side by side:
{model: {file: rows}}. Each table is a list of lines, each a list of cells, the first the heads.
"""

from collections.abc import Callable

Rows = list[dict[str, str]]
Lines = list[list[str]]
Models = dict[str, dict[str, Rows]]  # model -> file, without .csv -> its rows

FILES = ("groups", "words", "summary", "epochs")  # the ones without a caption of the data
WAYS = {"t2i": "text to image", "i2t": "image to text", "both": ""}
LEAD = "lead of the first answer"  # report/analysis.py: its tenths are shown with the causes
QUARTERS = {"1 of 4 (lowest)": "lowest quarter", "2 of 4": "second quarter"}
QUARTERS |= {"3 of 4": "third quarter", "4 of 4 (highest)": "highest quarter"}
NAMES = QUARTERS | {"none of these": "none named"}
COUNTS = ("misses",)
DISTANCES = ("modality gap", "cosine", "rank against lead")  # all else is in percent
CALIBRATION = ("right ones accepted", "others accepted")  # of the rule for near misses
LEFT_OUT = (*CALIBRATION, "cosine among pictures", "cosine among captions")


def shown(number: str, form: str) -> str:
    """A number of a file, "-" where the file has none; a 0 has no sign."""
    text = format(float(number), form) if number else "-"
    return text.lstrip("-") if number and not float(text.replace(",", "")) else text


def interval(row: dict[str, str], key: str, form: str = ".1f") -> str:
    """A figure with its 95% interval, where it has one."""
    ends = [shown(row[f"{key}_{end}"], form) for end in ("low", "high") if row[f"{key}_{end}"]]
    return shown(row[key], form) + (f" [{', '.join(ends)}]" if ends else "")


def signed(row: dict[str, str]) -> float:
    return float(row["against_all"])


def label(row: dict[str, str]) -> str:
    """A group as the report names it; "what it speaks of" needs no kind before it."""
    name = NAMES.get(row["group"], row["group"])
    plain = row["kind"] in ("all", "what it speaks of") and name == row["group"]
    return name if plain else f"{row['kind']}: {name}"


def told_apart(rows: Rows, way: str, finding: str) -> Rows:
    """The groups of a direction with a finding, the one farthest from all first."""
    found = [r for r in rows if r["direction"] == way and r["finding"] == finding]
    found = [row for row in found if row["kind"] != LEAD]
    return sorted(found, key=lambda row: -abs(signed(row)))


def preferences(models: Models, most: int = 5) -> Lines:
    """A line a model and direction: what it is better and worse on than on all."""
    lines = [["model", "direction", "better than on all", "worse than on all"]]
    for model, files in models.items():
        for way in ("t2i", "i2t"):
            cells = []
            for finding in ("better", "worse"):
                rows = told_apart(files["groups"], way, finding)[:most]
                seen = "; ".join(f"{label(row)} {signed(row):+.1f}" for row in rows)
                cells.append(seen or "nothing seen")
            lines.append([model, WAYS[way], *cells])
    return lines


def groups(models: Models, way: str, most: int = 6) -> Lines:
    """The groups that some model is better or worse on, R@10 and how far from all, side by side.

    The groups are those whose difference is largest, taken over the models that tell it.
    """
    every = {
        model: {label(row): row for row in files["groups"] if row["direction"] == way}
        for model, files in models.items()
    }
    strength: dict[str, list[float]] = {}
    for files in models.values():
        for finding in ("better", "worse"):
            for row in told_apart(files["groups"], way, finding):
                strength.setdefault(label(row), []).append(signed(row))
    mean = {name: sum(values) / len(values) for name, values in strength.items()}
    order = sorted(mean, key=lambda name: -mean[name])
    ahead = [name for name in order if mean[name] > 0][:most]
    behind = [name for name in order if mean[name] <= 0][-most:]
    lines = [["queries that speak of, or whose picture is", "queries", *models]]
    for name in ["all", *ahead, *behind]:
        rows = [every[model].get(name) for model in models]
        asked = " / ".join(dict.fromkeys(f"{int(row['queries']):,}" for row in rows if row))
        lines.append([name, asked or "-", *map(group_cell, rows)])
    return lines


def group_cell(row: dict[str, str] | None) -> str:
    """R@10 with its interval; and how far from all, with a mark where that is a finding."""
    if row is None:
        return "-"
    if not row["finding"]:
        return interval(row, "r10")
    mark = {"better": " **+**", "worse": " **−**", "too few": " ?"}.get(row["finding"], "")
    return f"{interval(row, 'r10')}, {shown(row['against_all'], '+.1f')}{mark}"


def words(models: Models, most: int = 7) -> Lines:
    """A line a model and direction: the words that move the rank most, others held fast."""
    lines = [["model", "direction", "found sooner with", "found later with"]]
    for model, files in models.items():
        for way in ("t2i", "i2t"):
            cells = []
            for finding in ("found sooner", "found later"):
                rows = [
                    r for r in files["words"] if (r["direction"], r["finding"]) == (way, finding)
                ]
                rows.sort(key=lambda row: float(row["times"]), reverse=finding == "found later")
                cells.append("; ".join(map(word_cell, rows[:most])) or "nothing seen")
            lines.append([model, WAYS[way], *cells])
    return lines


def word_cell(row: dict[str, str]) -> str:
    """A word and by how much it multiplies the rank; * where that holds for all words at once."""
    mark = "\\*" if row["holds_for_all"] == "yes" else ""
    return f"{row['word']} ×{float(row['times']):.2f}{mark}"


def summary(models: Models) -> Lines:
    """Why answers are wrong: a line a figure of the whole, a column a model."""
    lines = [["what", *models]]
    found = {
        model: {(row["direction"], row["measure"]): row for row in files["summary"]}
        for model, files in models.items()
    }
    for way, measure in dict.fromkeys(key for rows in found.values() for key in rows):
        if measure in LEFT_OUT:
            continue
        cells = [summary_cell(rows.get((way, measure))) for rows in found.values()]
        lines.append([": ".join(filter(None, (WAYS[way], measure))), *cells])
    for way in ("t2i", "i2t"):
        for part, end in (("the surest tenth", "(highest)"), ("the least sure tenth", "(lowest)")):
            cells = [lead_cell(files["groups"], way, end) for files in models.values()]
            lines.append([f"{WAYS[way]}: R@1 of {part}", *cells])
    return lines


def summary_cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    name = row["measure"]
    form = ",.0f" if name in COUNTS else ".2f" if name.startswith(DISTANCES) else ".1f"
    return interval({"x": row["value"], "x_low": row["low"], "x_high": row["high"]}, "x", form)


def lead_cell(rows: Rows, way: str, end: str) -> str:
    """R@1 of the queries whose first answer leads most, or least."""
    for row in rows:
        if (row["direction"], row["kind"]) == (way, LEAD) and row["group"].endswith(end):
            return interval(row, "r1")
    return "-"


def epochs(models: Models, most: int = 6) -> Lines:
    """Training against dev, at some epochs from the first to the one kept."""
    names = {"train_loss": "training loss", "dev_loss": "dev loss"}
    names |= {"mean_recall": "mean recall, dev"}
    names |= {"train_top1_t2i": "t2i R@1, training", "top1_t2i": "t2i R@1, dev"}
    rows = [
        (model, row) for model, files in models.items() for row in spread(files["epochs"], most)
    ]
    known = [name for name in names if any(row.get(name) for _, row in rows)]
    lines = [["model", "epoch", *map(names.get, known)]]
    for model, row in rows:
        digits = [2 if name.endswith("loss") else 1 for name in known]
        cells = [shown(row.get(n, ""), f".{d}f") for n, d in zip(known, digits, strict=True)]
        lines.append([model, shown(row["epoch"], ".0f"), *cells])
    return lines


def spread(rows: Rows, most: int) -> Rows:
    """At most so many rows, evenly from the first to the last."""
    steps = max(1, min(most, len(rows)) - 1)
    chosen = {round(step * (len(rows) - 1) / steps) for step in range(steps + 1)}
    return [rows[i] for i in sorted(chosen) if i < len(rows)]


PARTS: dict[str, Callable[[Models], Lines]] = {
    "preferences": preferences,
    "groups t2i": lambda models: groups(models, "t2i"),
    "groups i2t": lambda models: groups(models, "i2t"),
    "words": words,
    "summary": summary,
    "epochs": epochs,
}
