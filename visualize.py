"""The figures: curves, similarities, t-SNE, and what a text or a picture finds.

`python visualize.py [CHECKPOINT]` follows evaluate.py, whose embeddings and ranks it draws, and
train.py calls `draw_curves` after every epoch. Files named grid_* show pictures of the data.
"""

import contextlib
import csv
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import Image

import evaluate
from captions import Tokenizer, WordPieces
from cli import Parser, UserError, atomic_write, number, run, warn
from dataset import Dataset, Split
from evaluate import Embedded, Loaded, ZeroShot
from images import thumbnail
from metrics import KS, TIE, first_captions
from models import load_checkpoint

# Okabe and Ito's colours, which colour-blind readers tell apart too.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
GREEN, RED, GREY, INK = PALETTE[2], PALETTE[3], "#777777", "#222222"
STYLE = {
    **{"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "text.color": INK},
    **{"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.prop_cycle": matplotlib.cycler(color=PALETTE), "image.cmap": "viridis"},
    **{"lines.markersize": 4, "legend.fontsize": 9, "figure.facecolor": "white"},
    **{"text.parse_math": False, "text.usetex": False},  # a caption with two $ is no formula
}
GLYPHS = frozenset(get_font(findfont("DejaVu Sans")).get_charmap())  # comes with matplotlib


def wrapped(text: str, inches: float, size: float, lines: int = 4) -> list[str]:
    """Breaks `text` into at most `lines` lines, `inches` wide at `size` points; "…" ends a cut."""
    # No control characters, and a box for what the font lacks: matplotlib would warn of both.
    seen = (c for c in " ".join(text.split()) if unicodedata.category(c)[0] != "C")
    plain = "".join(c if ord(c) in GLYPHS else "□" for c in seen)
    width = max(8, int(inches * 72 / (0.56 * size)))  # DejaVu's letters are some 0.56 em wide
    if lines == 1:  # cut within a word too: it may be a file's name
        return [plain if len(plain) <= width else f"{plain[: width - 2]} …"]
    return textwrap.wrap(plain, width, max_lines=lines, placeholder=" …") or [""]


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float, title: str, footer: str) -> Iterator[Any]:
    """Yields (figure, inches below its body), then writes it to `path` as PNG. Raises UserError.

    The body, `width` x `height` inches, lies between title and footer. No pyplot: nothing global.
    """
    titles, notes = wrapped(title, width - 0.3, 12), wrapped(footer, width - 0.3, 8)
    low = 0.15 + 0.15 * len(notes)
    tall = low + height + 0.22 + 0.21 * len(titles)
    with matplotlib.rc_context(STYLE):
        figure, x = Figure((width, tall), layout="constrained"), 0.15 / width
        figure.get_layout_engine().set(rect=(0.01, low / tall, 0.98, height / tall))
        figure.text(x, 1 - 0.1 / tall, "\n".join(titles), va="top", size=12)
        figure.text(x, 0.08 / tall, "\n".join(notes), va="bottom", size=8, color=GREY)
        yield figure, low
        with atomic_write(path) as temporary:  # Agg cannot draw 65,536 pixels or more
            figure.savefig(temporary, format="png", dpi=min(120, 30_000 / max(width, tall)))


def draw_curves(history: list[dict[str, float]], path: Path, footer: str = "") -> None:
    """Draws losses and recalls over epochs; `history` holds a record an epoch. Raises UserError."""
    epochs = [record["epoch"] for record in history]
    span = epochs[0] - 0.5, epochs[-1] + 0.5
    best = max(history, key=lambda record: record["mean_recall"])  # the first of equals
    panels = {
        "Loss": {"train": "train_loss", "dev": "dev_loss"},
        "Mean recall on dev": {"mean of the six below": "mean_recall"},
        "Image to text on dev": {f"R@{k}": f"i2t_r{k}" for k in KS},
        "Text to image on dev": {f"R@{k}": f"t2i_r{k}" for k in KS},
    }
    title = f"Training: best epoch {best['epoch']}, mean recall on dev {best['mean_recall']:.1f}%"
    with canvas(path, 9.5, 6, title, footer) as (figure, _):
        for axes, (name, curves) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            for (label, key), marker in zip(curves.items(), "os^", strict=False):
                values = [record[key] for record in history]
                axes.plot(epochs, values, marker=marker, label=label, clip_on=False)
            axes.axvline(best["epoch"], color=GREY, linestyle="--", linewidth=1, label="best epoch")
            unit = "loss (dev: InfoNCE, nats)" if name == "Loss" else "recall (%)"
            axes.set(title=name, xlabel="epoch", ylabel=unit, ylim=(0, None), xlim=span)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
            axes.grid(True)
            axes.legend()


def whole_history(trained: Loaded) -> list[dict[str, float]]:
    """The history of the run up to its last epoch: best.pt ends with the best one."""
    last = trained.path.with_name("last.pt")
    history, run_of = trained.content["history"], trained.content["config"]
    if last.is_file() and (later := load_checkpoint(last))["config"] == run_of:
        history = max(history, later["history"], key=len)
    return history


def cosine(queries: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Unit-length (Q, D) and (N, D) -> float64 (Q, N)."""
    return queries.astype(np.float64) @ pool.T.astype(np.float64)


def sample_pairs(split: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` images and a caption of each: positions in split.images and split.captions."""
    generator, total = np.random.default_rng(seed), len(split.images)
    images = np.sort(generator.choice(total, min(count, total), replace=False))
    shuffled = generator.permutation(len(split.captions))
    return images, shuffled[first_captions(split.caption_image[shuffled])][images]


def draw_similarity(path: Path, made: Embedded, seed: int, footer: str) -> None:
    """Draws the cosines of 48 images and captions at most; the pairs are the diagonal."""
    images, captions = sample_pairs(made.split, 48, seed)
    cosines = cosine(made.image_embeddings[images], made.text_embeddings[captions])
    pair = np.eye(len(images), dtype=bool)
    title = f"Cosine similarity of {len(images)} seeded pairs: mean {cosines[pair].mean():.3f} on "
    title += f"the diagonal (the pairs), {cosines[~pair].mean() if len(pair) > 1 else 0:.3f} off it"
    with canvas(path, 7.5, 6.2, title, footer) as (figure, _):
        axes = figure.subplots()
        axes.set(xlabel="caption (number of its pair)", ylabel="image (number of its pair)")
        figure.colorbar(axes.imshow(cosines), label="cosine similarity (no unit)")


def modality_gap(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
    """The distance between the mean image and the mean text embedding (Liang et al. 2022)."""
    gap = image_embeddings.mean(0, dtype=np.float64) - text_embeddings.mean(0, dtype=np.float64)
    return float(np.linalg.norm(gap))


def topics(texts: list[str], seed: int, most: int = 8) -> tuple[np.ndarray, list[str]]:
    """Sorts texts by NMF over TF-IDF: (topic of each, -1 if it has no words; topics' names)."""
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    colours = (
        "black white red blue green yellow brown orange pink purple gray grey tan blond blonde"
    )
    ignored = sorted({*ENGLISH_STOP_WORDS, *colours.split()})
    words = TfidfVectorizer(stop_words=ignored, token_pattern=r"[^\W\d_]{2,}", sublinear_tf=True)
    try:
        table = words.fit_transform(texts)
    except ValueError:  # no word is left: "empty vocabulary"
        return np.full(len(texts), -1), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged does not matter here
        model = NMF(min(most, *table.shape), init="nndsvda", random_state=seed, max_iter=300)
        weights = model.fit_transform(table)
    vocabulary, names = words.get_feature_names_out(), []
    for strength in model.components_:
        first, *rest = vocabulary[np.argsort(-strength, kind="stable")[:9]]
        others = [word for word in rest if not (word.startswith(first) or first.startswith(word))]
        names.append(", ".join([first, *others[:1]]))  # "dog, snow" tells more than "dog, dogs"
    return np.where(weights.max(1) > 0, weights.argmax(1), -1), names


def draw_tsne(path: Path, made: Embedded, seed: int, footer: str) -> None:
    """Draws at most 500 seeded pairs, images and texts together, in the plane of one t-SNE."""
    from sklearn.manifold import TSNE

    images, captions = sample_pairs(made.split, 500, seed)
    both = np.concatenate([made.image_embeddings[images], made.text_embeddings[captions]])
    perplexity = min(30, (len(both) - 1) / 3)
    start = "pca" if np.ptp(both, axis=0).max() > 1e-6 else "random"  # PCA of one point fails
    tsne = TSNE(2, perplexity=perplexity, init=start, random_state=seed)
    points = tsne.fit_transform(both.astype(np.float64)).reshape(2, -1, 2)  # images, then texts
    joined = [""] * len(made.split.images)
    for caption, image in zip(made.split.captions, made.split.caption_image, strict=True):
        joined[image] += f" {caption}"
    topic, names = topics([joined[i] for i in images], seed)
    gap = modality_gap(made.image_embeddings, made.text_embeddings)
    title = f"t-SNE of {len(images)} pairs, perplexity {perplexity:.0f}. Modality gap {gap:.3f} "
    title += "(distance between the mean image and the mean text embedding of the split)"
    with canvas(path, 9.5, 6.5, title, footer) as (figure, _):
        axes = figure.subplots()
        pairs = LineCollection(points.swapaxes(0, 1), color=GREY, linewidth=0.5, alpha=0.35)
        axes.add_collection(pairs)
        for i, name in [*enumerate(names), (-1, "no topic")]:
            mine, look = topic == i, {"s": 26, "color": [*PALETTE, GREY][i], "edgecolor": "white"}
            label = f"{wrapped(name, 2.5, 9, 1)[0]} ({mine.sum()})" if mine.any() else None
            axes.scatter(*points[0, mine].T, linewidth=0.3, label=label, **look)
            axes.scatter(*points[1, mine].T, linewidth=0.3, marker="^", **look)
        told = "● image   ▲ its caption\n— a pair\n\nTopic of the captions\n(and its images)"
        axes.legend(title=told, loc="upper left", bbox_to_anchor=(1.01, 1), alignment="left")
        axes.set(xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")


# What a search finds: rank from 1, position in the pool, score, whether it is the query's own.
Hit = tuple[float, int, float, bool]


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The positions of the best of scores (N,), ties by position: a prefix of any longer list."""
    rounded = np.where(np.isfinite(scores), scores, -np.inf).round(12)  # equal within metrics.TIE
    return np.argsort(-rounded, kind="stable")[:k]


def find(
    query: np.ndarray, pool: np.ndarray, k: int, own: Sequence[int] = (), rank: float = np.nan
) -> list[Hit]:
    """The top `k` of `pool` (N, D), best first; then the best `own` one if none is among them."""
    scores = cosine(query[None], pool)[0]
    order = top_k(scores, k).tolist()
    hits = [(place, i, scores[i], i in own) for place, i in enumerate(order, 1)]
    if len(own) and not any(i in own for i in order):
        best = own[top_k(scores[list(own)], 1)[0]]
        hits.append((rank, best, scores[best], True))
    return hits


def extreme_cases(made: Embedded, count: int) -> list[list[int]]:
    """The captions of the `count` best (rank 1, widest margin) and worst cases, an image once."""
    owner, hits = made.split.caption_image, np.flatnonzero(made.t2i == 1)
    margins = []
    for part in np.array_split(hits, 1 + len(hits) // 1024):  # all scores at once may not fit
        scores = cosine(made.text_embeddings[part], made.image_embeddings)
        margins.append(np.ptp(np.sort(np.nan_to_num(scores, nan=-2))[:, -2:], axis=1))
    best = hits[np.argsort(-np.concatenate(margins), kind="stable")]
    orders = best, np.argsort(-made.t2i, kind="stable")
    return [order[np.sort(first_captions(owner[order]))][:count].tolist() for order in orders]


def checked_queries(queries: list[str], tokenizer: Tokenizer | WordPieces) -> list[str]:
    """Strips the user's queries; raises UserError for one that the model cannot understand."""
    for query in queries:
        words = [word for word in tokenizer.words(query) if any(map(str.isalnum, word))]
        if not words:
            raise UserError(f"--query {query!r} holds no word; describe a picture")
        unknown = [word for word in words if word in tokenizer.unknown(query)]
        told = f"--query {query!r}: {', '.join(unknown)} never stood in the training captions"
        if len(unknown) == len(words):
            raise UserError(f"{told} (or too seldom); use other words")
        if unknown:
            warn(f"{told} (or too seldom); the rest of the query decides")
    return [query.strip() for query in queries]


CELL, LINE, GAP = 1.5, 0.19, 0.14  # inches
Draw = Callable[[int], Image.Image]  # the picture at a position in the pool
Cell = tuple[Image.Image, str, str | None]  # a picture, the lines under it, its frame's colour
Row = tuple[list[tuple[str, str]], list[Cell]]  # texts, each with its colour; pictures


def draw_grid(path: Path, title: str, footer: str, rows: list[Row], left: bool = True) -> None:
    """Draws rows of pictures; the texts stand left of them, or right, of one line each."""
    inches, most = (2.6, 5) if left else (7.5, 1)
    pictures = max(len(cells) for _, cells in rows) * (CELL + GAP)
    notes = max(1 + note.count("\n") for _, cells in rows for _, note, _ in cells)
    broken = [[(s, hue) for t, hue in ts for s in wrapped(t, inches, 9, most)] for ts, _ in rows]
    heights = [max(CELL + notes * LINE, len(lines) * LINE) + GAP for lines in broken]
    text_x, start = (0.15, 0.15 + inches + GAP) if left else (0.15 + pictures, 0.15)
    width = 0.3 + inches + GAP + pictures
    with canvas(path, width, sum(heights), title, footer) as (figure, low):
        figure.set_layout_engine("none")
        top, height = low + sum(heights), figure.get_figheight()
        for lines, (_, cells), tall in zip(broken, rows, heights, strict=True):
            for i, (line, hue) in enumerate(lines):
                place = text_x / width, (top - 0.05 - i * LINE) / height
                figure.text(*place, line, size=9, color=hue, va="top")
            for i, (picture, note, frame) in enumerate(cells):
                x = (start + i * (CELL + GAP)) / width
                box = (x, (top - CELL) / height, CELL / width, CELL / height)
                axes = figure.add_axes(box, xticks=[], yticks=[], anchor="N")
                axes.imshow(picture)
                for spine in axes.spines.values():
                    spine.set(visible=bool(frame), color=frame or INK, linewidth=4)
                axes.set_xlabel(note, size=8, labelpad=6, color=frame or INK)
            top -= tall


def cells_of(hits: list[Hit], draw: Draw, names: list[str]) -> list[Cell]:
    """The pictures found, with rank and score, the true one framed; `names` (or none) below."""
    cells = []
    for rank, i, score, own in hits:
        name = f"\n{wrapped(names[i], CELL, 8, 1)[0]}" if names else ""
        note = f"{rank:,.0f}: {score:.3f}{' true image' if own else ''}{name}"
        cells.append((draw(i), note, GREEN if own else None))
    return cells


def draw_pairs(options: Any, made: Embedded, draw: Draw, footer: str) -> None:
    """Draws every figure of an embedded split into the folder options.out."""
    split, seed, out, pool = made.split, options.seed, options.out, len(made.split.images)
    texts, k = split.captions, clamped("top-k", options.top_k, pool)

    def text_row(i: int, k: int) -> Row:
        own, rank = [int(split.caption_image[i])], made.t2i[i]
        told = f"true image: rank {rank:,.0f} of {pool:,}", GREEN if rank <= k else RED
        hits = find(made.text_embeddings[i], made.image_embeddings, k, own, rank)
        return [(texts[i], INK), told], cells_of(hits, draw, [])

    def image_row(i: int) -> Row:
        own, rank = np.flatnonzero(split.caption_image == i).tolist(), made.i2t[i]
        told = f"best own caption: rank {rank:,.0f} of {len(texts):,}", GREEN if rank <= k else RED
        hits = find(made.image_embeddings[i], made.text_embeddings, k, own, rank)
        look = {True: ("✓", GREEN), False: ("–", INK)}
        lines = [(f"{r:,.0f}: {s:.3f} {look[m][0]} {texts[j]}", look[m][1]) for r, j, s, m in hits]
        return [told, *lines], [(draw(i), "", None)]

    write(out / "similarity.png", draw_similarity, made, seed, footer)
    write(out / "tsne.png", draw_tsne, made, seed, footer)
    images, captions = sample_pairs(split, clamped("queries", options.queries, pool), seed)
    title = f"Text to image: the first {k} of {pool:,} pictures, the true one framed"
    rows = [text_row(i, k) for i in captions]
    write(out / "grid_text_to_image.png", draw_grid, title, footer, rows)
    title = f"Image to text: the first {k} of {len(texts):,} captions, own ones marked ✓"
    rows = [image_row(i) for i in images]
    write(out / "grid_image_to_text.png", draw_grid, title, footer, rows, False)
    title = "Text to image: best cases (rank 1, widest margin), worst ones, the true image framed"
    best, worst = extreme_cases(made, 4)
    rows = [text_row(i, 2) for i in best] + [text_row(i, 1) for i in worst]
    write(out / "grid_best_worst.png", draw_grid, title, footer, rows)


def draw_confusion(path: Path, result: ZeroShot, footer: str) -> None:
    """Draws the confusion matrix, each row in percent of the true class's pictures."""
    top, size = result.metrics()["zero_shot_top1"], len(result.classes)
    total, scores = np.bincount(result.truth), result.scores.copy()
    scores[np.arange(len(scores)), result.truth] -= TIE  # a tie is lost, as in evaluate.py
    valid = np.isfinite(scores).all(1)  # the others count as pictures only
    cells = result.truth[valid] * size + scores[valid].argmax(1)
    counts = np.bincount(cells, minlength=size * size).reshape(size, size)
    percent, side = counts / total[:, None] * 100, min(4.5 + 0.42 * size, 40)
    title = f"Zero-shot: top-1 {top:.1f}% of {len(valid):,} pictures (chance {100 / size:.1f}%)"
    with canvas(path, side + 2.2, side, title, footer) as (figure, _):
        axes = figure.subplots()
        shown = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
        names = [wrapped(name, 1.6, 9, 1)[0] for name in result.classes]
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), [f"{n} ({c:,})" for n, c in zip(names, total, strict=True)])
        axes.set(xlabel="predicted class", ylabel="true class (number of its pictures)")
        for row, column in np.argwhere(counts) if size <= 30 else ():
            text = f"{percent[row, column]:.0f}%\n{counts[row, column]:,}"
            hue = "black" if percent[row, column] > 50 else "white"
            axes.text(column, row, text, size=7, ha="center", va="center", color=hue)
        figure.colorbar(shown, label="share of the true class's pictures (%)")


def draw_ablations(rows: list[dict[str, str]], path: Path) -> None:
    """Quality against minutes: a dot for each row of an ablation table, in the table's order."""
    title = "Recall on dev against minutes of training on 2 cores"
    footer = "mean of the six recalls (R@1, 5, 10 in both directions)"
    with canvas(path, 9, 6, title, footer) as (figure, _):
        axes = figure.subplots()
        for hue, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
            chosen = [row for row in rows if row["group"] == group]
            x = [float(row["minutes"]) for row in chosen]
            y = [float(row["mean_recall"]) for row in chosen]
            axes.plot(x, y, "o", color=PALETTE[hue % len(PALETTE)], label=group)
            for row, *place in zip(chosen, x, y, strict=True):
                axes.annotate(row["row"], place, (5, 3), textcoords="offset points", size=8)
        axes.set(xlabel="minutes, features included", ylabel="mean recall (%)", xscale="log")
        axes.set_xticks((1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60), minor=False)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        span = [float(row["minutes"]) for row in rows]
        axes.set_xlim(0.8 * min(span), 1.4 * max(span))
        axes.grid(True)
        axes.legend(loc="center left")


def read_ablations(path: Path) -> list[dict[str, str]]:
    """The rows of a table like report/ablations.csv. Raises UserError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("it is empty")
        for row in rows:
            float(row["minutes"]), float(row["mean_recall"]), row["group"], row["row"]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        told = "it needs the columns row, group, minutes and mean_recall"
        raise UserError(f"cannot read the table {path} ({error}); {told}") from error
    return rows


# ------------------------------------------------------------------------------ the script


def origin(trained: Loaded, dataset: Dataset | None = None, split: Split | None = None) -> str:
    """The footer: what a figure is made from, and what speaks against it (also as a warning)."""
    path, told, torn = trained.path.resolve(), "", trained.content.get("split_by_caption")
    if dataset and split:
        torn, count = torn or dataset.by_caption, len(split.images)
        told = f"data {Path(dataset.path).resolve().name}, {dataset.splits} {split.name} split: "
        told += (
            f"{count:,} images, {len(split.captions):,} captions; scores are cosines, ties lose; "
        )
        if seen := evaluate.count_trained_on(trained, dataset, split):
            warn(f"{seen:,} of the {count:,} images evaluated were trained on")
            told += f"{seen:,} of these images were trained on; "
    told += f"checkpoint {path.parent.name}/{path.name}, epoch {trained.content['epoch']}"
    return told + ("; SPLIT BY CAPTION: flatters" if torn else "")


def clamped(flag: str, wanted: int, pool: int) -> int:
    if wanted > pool:
        warn(f"--{flag} {wanted}: there are {pool:,}, all are shown")
    return min(wanted, pool)


def write(path: Path, draw: Callable[..., None], *made: Any) -> None:
    draw(path, *made)
    print(f"wrote {path}")


def main(argv: list[str]) -> None:
    parser = Parser(prog="visualize.py", description=__doc__.split("\n")[0])
    evaluate.add_model_flags(parser)
    flag = parser.add_argument_group("what to draw").add_argument
    flag("--out", type=Path, default=Path("report/figures"), help="folder of the figures")
    flag("--top-k", type=number(int, 1, 20), default=5, help="results of each query")
    flag("--queries", type=number(int, 1, 50), default=6, help="captions and images of the split")
    flag("--query", action="append", default=[], metavar="TEXT", help="only search it; repeatable")
    flag("--images", type=Path, metavar="DIR", help="search this folder of pictures with --query")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that is drawn by lot")
    told = "only draw this table, such as report/ablations.csv: quality against minutes"
    flag("--ablations", type=Path, metavar="FILE.csv", help=told)
    options = parser.parse_args(argv)
    if options.ablations:
        rows = read_ablations(options.ablations)
        return write(options.out / "ablations.png", lambda path: draw_ablations(rows, path))
    if options.images and not options.query:
        raise UserError('--images needs a text to search for, such as --query "a dog in snow"')
    if options.zero_shot and options.query:
        raise UserError("--zero-shot draws confusion.png only; leave --query out")
    if options.templates and not options.zero_shot:
        raise UserError("--templates goes with --zero-shot")
    trained = evaluate.load_trained(options.checkpoint, options.device)
    print(f"checkpoint {trained.path}, epoch {trained.content['epoch']}")
    model, tokenizer, transform = trained.model, trained.tokenizer, trained.transform
    queries, out, workers = checked_queries(options.query, tokenizer), options.out, options.workers
    if options.zero_shot:
        source = options.zero_shot, options.templates
        result = evaluate.zero_shot(model, tokenizer, *source, transform, workers)
        return write(out / "confusion.png", draw_confusion, result, origin(trained))
    if options.images:
        if not (paths := evaluate.find_pictures(options.images)):
            raise UserError(f"--images {options.images} holds no picture")
        pool, paths = evaluate.embed_pictures(model, paths, transform, workers)
        names = [str(path.relative_to(options.images)) for path in paths]
        footer = f"{len(paths):,} pictures of {options.images}; {origin(trained)}"
        name, draw = "grid_search.png", lambda i: thumbnail(paths[i])
    else:
        source = options.data, options.splits, options.cache
        dataset = evaluate.load_data_for(trained, *source, workers)
        print(dataset.summary())
        split, size, names = dataset.split(options.split), transform["image_size"], []
        footer = origin(trained, dataset, split)
        name, draw = "grid_text_to_image.png", lambda i: dataset.picture(int(split.images[i]))
        if not queries:
            history, told = whole_history(trained), origin(trained)
            write(out / "curves.png", lambda path: draw_curves(history, path, told))
            made = evaluate.evaluate_split(model, tokenizer, dataset, split, size)
            return draw_pairs(options, made, draw, footer)
        pool = evaluate.embed_images(model, dataset.pixels, split.images, size)
    k = clamped("top-k", options.top_k, len(pool))
    found = [find(text, pool, k) for text in evaluate.embed_texts(model, tokenizer, queries)]
    rows = [([(q, INK)], cells_of(f, draw, names)) for q, f in zip(queries, found, strict=True)]
    title = f"Text to image: the first {k} of {len(pool):,} pictures"
    return write(out / name, draw_grid, title, footer, rows)


if __name__ == "__main__":
    run(main)
