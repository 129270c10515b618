"""What a model is good and bad at: `python evaluate.py [CHECKPOINT ...] --analysis DIR`.

evaluate.py hands in a ranked split; `python visualize.py --analysis DIR` draws what is written:

    groups.csv       groups of queries (by words, topic, picture) against all, with 95% intervals
    words.csv        by how much a word multiplies the rank, others held fast
    hubs.csv         what is returned, how often it stands among the first ten
    near_misses.csv  each query whose first answer is wrong, and whether a person would accept it
    epochs.csv       loss and recall of training and dev images by epoch, up to the kept one
    summary.csv      the figures about the whole: hubs, near misses, margins, the two clouds
    about.json       the protocol

`direction` is t2i (a caption searches pictures) or i2t (a picture searches captions). Intervals of
groups and of near misses: 95%, bootstrap over pictures with their captions, 1000 resamples, seeded;
the groups overlap, and of many findings at 95% one in twenty is chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluate import KS
from report import causes
from report.causes import FEW, draw_weights, with_interval
from report.groups import Features, Group, features, groups_of, parts
from report.predictions import Answers, Line, answers
from support.command import warn
from support.results import write_csv, write_json

if TYPE_CHECKING:
    from evaluate import Embedded
    from support.embedding import Trained

WAYS = {"t2i": "text to image", "i2t": "image to text"}
GROUP_COLUMNS = ["direction", "kind", "group", "span", "queries", "images"]
GROUP_COLUMNS += ["r1", "r1_low", "r1_high", "r5", "r10", "r10_low", "r10_high", "medr"]
GROUP_COLUMNS += ["against_all", "against_all_low", "against_all_high", "finding"]
SUMMARY_COLUMNS = ["direction", "measure", "value", "low", "high", "meaning"]
MEANING = {
    "hub share": "% of the places among the first ten that the 1% most returned hold",
    "hub share by chance": "the same if every place were drawn by lot",
    "never returned": "% that never stand among the first ten",
    "misses": "queries whose first answer is wrong",
    "misses accepted": "% of them: two thirds of the caption's telling words are in the captions "
    "of the picture",
    "right ones accepted": "% of captions that the rule accepts for the rest of their own "
    "picture's captions",
    "others accepted": "% of captions that the rule accepts for a picture drawn by lot",
    "misses a person would accept": "estimated %, the rule's own errors counted out",
    "rank against lead": "Spearman's correlation of a query's rank and the lead of its first "
    "answer over its second; below 0: it is more often right where it is sure",
    "modality gap": "distance of the mean picture and the mean caption",
    "cosine of pairs": "mean, pictures and their own captions",
    "cosine of others": "mean, pictures and other pictures' captions",
    "cosine among pictures": "mean of different pictures",
    "cosine among captions": "mean of different captions",
}
LEAD = "lead of the first answer"
EPOCHS = ("epoch", "train_loss", "dev_loss", "mean_recall", "train_top1_i2t", "top1_i2t")
EPOCHS += ("train_top1_t2i", "top1_t2i")

# --------------------------------------------------------------------------------- groups


def measure_groups(answered: Answers, groups: list[Group]) -> list[Line]:
    """Rows of groups.csv, the first of them all queries.

    `finding` compares R@10: "better" or "worse" where the interval of the difference leaves out 0.
    A group of fewer than FEW pictures, or in which fewer than five hits or five misses are to be
    expected at the rate of all, is "too few".
    """
    count, ranks = int(answered.image.max()) + 1, answered.ranks
    groups = [Group("all", "all", "", np.ones(len(ranks), bool)), *groups]
    weights = np.vstack([np.ones(count), draw_weights(count)])  # the first: as they are
    asked = per_image([group.member for group in groups], answered.image, count)
    shares = {}
    for k in KS:
        hits = per_image([g.member & (ranks <= k) for g in groups], answered.image, count)
        with np.errstate(invalid="ignore", divide="ignore"):  # a group that no resample holds
            shares[k] = 100 * (weights @ hits) / (weights @ asked)
    rate, rows = shares[10][0, 0] / 100, []
    for i, (kind, name, span, member) in enumerate(groups):
        queries, images = int(member.sum()), int((asked[:, i] > 0).sum())
        r1, r10 = with_interval(shares[1][:, i]), with_interval(shares[10][:, i])
        gain, low, high = with_interval(shares[10][:, i] - shares[10][:, 0])
        finding = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
        if images < FEW or queries * min(rate, 1 - rate) < 5:
            finding = "too few"
        line: Line = [answered.way, kind, name, span, queries, images, *r1, shares[5][0, i], *r10]
        medr = float(np.median(np.minimum(ranks[member], len(answered.pool_image))))
        rows.append([*line, medr, gain, low, high, finding if i else ""])
    return rows


def per_image(chosen: list[np.ndarray], image: np.ndarray, count: int) -> np.ndarray:
    """How many of some queries each picture has: (count, len(chosen))."""
    return np.stack([np.bincount(image, member, minlength=count) for member in chosen], axis=1)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean rank."""
    places = []
    for values in (one, other):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        places.append((np.cumsum(counts) - (counts - 1) / 2)[which])
    spread = np.std(places[0]) * np.std(places[1])
    return float(np.cov(*places, bias=True)[0, 1] / spread) if spread else float("nan")


# ---------------------------------------------------------------------------------- tables


def tables(embedded: Embedded) -> dict[str, tuple[list[str], list[Line]]]:
    """{file: (columns, rows)} of all that is found out about a ranked split."""
    pairs = embedded.pairs
    names = [pairs.dataset.names[row] for row in pairs.rows]
    found, overlap = features(embedded), causes.Overlap(pairs)
    files: dict[str, tuple[list[str], list[Line]]] = {
        "groups": (GROUP_COLUMNS, []),
        "words": (causes.WORD_COLUMNS, []),
        "hubs": (causes.HUB_COLUMNS, []),
        "near_misses": (causes.MISS_COLUMNS, []),
        "summary": (SUMMARY_COLUMNS, []),
    }
    for way in WAYS:
        answered = answers(embedded, way)
        groups, lead = query_groups(answered, found, np.asarray(pairs.caption_image))
        misses = causes.near_misses(answered, overlap, names)
        times, shares = causes.hubs(answered)
        items = names if way == "t2i" else pairs.captions
        files["groups"][1].extend(measure_groups(answered, groups))
        files["words"][1].extend(causes.word_effects(answered, pairs))
        order = [int(i) for i in np.argsort(-times, kind="stable") if times[i]]
        files["hubs"][1].extend(
            [way, items[i], int(times[i]), 100 * times[i] / times.sum()] for i in order
        )
        files["near_misses"][1].extend(misses)
        rates = causes.miss_rates(misses, overlap, names)
        figures = {**shares, "misses": len(misses), "misses accepted": rates.accepted}
        figures |= {"right ones accepted": rates.own, "others accepted": rates.other}
        figures["misses a person would accept"] = rates.estimate
        if lead is not None:
            figures["rank against lead"] = correlation(lead, answered.ranks)
        files["summary"][1].extend(summary_rows(way, figures))
    files["summary"][1].extend(summary_rows("both", causes.clouds(embedded)))
    return files


def query_groups(
    answered: Answers, found: Features, caption_image: np.ndarray
) -> tuple[list[Group], np.ndarray | None]:
    """The groups of a direction, with tenths by the lead of the first answer; and that lead."""
    groups = groups_of(answered.way, found, caption_image)
    if answered.scores.shape[1] < 2:
        return groups, None
    lead = np.nan_to_num(answered.scores[:, 0] - answered.scores[:, 1], nan=0, posinf=0)
    return groups + parts(LEAD, lead, 10), lead


def summary_rows(way: str, figures: dict[str, Any]) -> list[Line]:
    """Rows of summary.csv; a figure is a number, or a list of itself and its interval."""
    rows: list[Line] = []
    for name, figure in figures.items():
        value = [*figure] if isinstance(figure, list) else [figure]
        rows.append([way, name, *value, *[""] * (3 - len(value)), MEANING[name]])
    return rows


def epoch_rows(trained: Trained) -> tuple[list[str], list[Line]]:
    """Training against dev by epoch, as far as the first checkpoint's history tells."""
    history = trained.content["history"]
    columns = [name for name in EPOCHS if history and name in history[0]]
    return columns, [[float(record[name]) for name in columns] for record in history]


# ---------------------------------------------------------------------------------- screen


def group_table(rows: list[Line]) -> str:
    """Both directions of groups.csv as lines of text."""
    marks = {"better": "+", "worse": "-", "too few": "?", "": ""}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in (dict(zip(GROUP_COLUMNS, row, strict=True)) for row in rows):
        share = f"{row['r10']:5.1f} [{row['r10_low']:5.1f}, {row['r10_high']:5.1f}]"
        gain, mark = f"{row['against_all']:+6.1f}", marks.get(row["finding"], ".")
        text = f"{row['queries']:7,} {share} {gain if row['finding'] else '':6} {mark:1}"
        cells.setdefault((row["kind"], row["group"]), {})[row["direction"]] = text
    few = f"fewer than {FEW} pictures, or under five hits or misses to be expected"
    lines = [
        "R@10 in percent [95%], and against all: + better, - worse, . no difference seen, ? too "
        f"few to tell ({few}); groups overlap, one finding in twenty is chance",
        f"{'':28}" + "".join(f"{name:39}" for name in WAYS.values()),
        f"{'':28}" + f"{'queries  R@10                 all':39}" * 2,
    ]
    before, kinds = "all", [kind for kind, _ in cells]
    for (kind, name), ways in sorted(cells.items(), key=lambda cell: kinds.index(cell[0][0])):
        if kind != before:
            lines.append(kind)
        before = kind
        lines.append(f"  {name:24.24}  " + "".join(f"{ways.get(way, ''):39}" for way in WAYS))
    return "\n".join(line.rstrip() for line in lines)


def findings(files: dict[str, tuple[list[str], list[Line]]]) -> str:
    """Words, summary and examples as lines of text."""
    lines = [
        "words, others held fast (plain least squares of log rank): by how much the rank is "
        "multiplied, the ten strongest whose 95% interval leaves out 1; * holds for all at once"
    ]
    for way, name in WAYS.items():
        for finding in ("found sooner", "found later"):
            rows = [row for row in files["words"][1] if row[0] == way and row[6] == finding]
            strongest = sorted(rows, key=lambda row: -abs(np.log(row[3])))[:10]
            words = [f"{row[1]} {row[3]:.2f}{'*' * (row[7] == 'yes')}" for row in strongest]
            lines.append(f"  {name}, {finding}: {', '.join(words) or 'none'}")
    for way, name, value, low, high, meaning in files["summary"][1]:
        interval = "" if isinstance(low, str) else f" [{low:.4g}, {high:.4g}]"
        where = f"{WAYS[way]}, " if way in WAYS else ""
        lines.append(f"{where}{name}: {value:.4g}{interval} ({meaning})")
    random = np.random.default_rng(0)
    for way, name in WAYS.items():
        good = [row for row in files["near_misses"][1] if row[0] == way and row[-1] == "yes"]
        for i in sorted(random.permutation(len(good))[:3]):
            _, image, caption, rank, other, found, *_ = good[i]
            lines.append(f"accepted miss, {name}, rank {rank:,.0f}: {caption!r} ({image})")
            lines.append(f"  taken for {found!r} ({other})")
    return "\n".join(lines)


def analyse(folder: Path, embedded: Embedded, trained: Trained, protocol: dict[str, Any]) -> None:
    """Prints a ranked split's analysis and writes its files into `folder`. Raises UserError."""
    files = tables(embedded)
    files["epochs"] = epoch_rows(trained)
    print(group_table(files["groups"][1]))
    print(findings(files))
    if "train_top1_t2i" not in files["epochs"][0]:
        warn("epochs.csv has no recall of training images: train.py --train-recall measures it")
    for name, (columns, rows) in files.items():
        write_csv(folder / f"{name}.csv", columns, rows)
    write_json(folder / "about.json", protocol)
