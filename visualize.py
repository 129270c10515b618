"""The figures: curves, similarities, t-SNE, and what a text or a picture finds.

`python visualize.py [CHECKPOINT]` follows evaluate.py, whose embeddings and ranks it draws; train.py
calls `draw_curves` after every epoch. Files named grid_* show pictures of the data.
"""

import contextlib
import textwrap
import unicodedata
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

import evaluate
from cli import Parser, UserError, atomic_write, number, run, warn
from dataset import Dataset, Split, Tokenizer
from evaluate import Embedded, Loaded, ZeroShot
from images import to_rgb
from metrics import KS, TIE, first_captions

# ---------------------------------------------------------------------------- one style for all

# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = [BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
INK, FAINT = "#222222", "#777777"
STYLE = {
    **{"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "text.color": INK},
    **{"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.prop_cycle": matplotlib.cycler(color=PALETTE), "image.cmap": "viridis"},
    **{"lines.markersize": 4, "legend.fontsize": 9, "figure.facecolor": "white"},
    **{"text.parse_math": False, "text.usetex": False},  # a caption with two $ is no formula
}


GLYPHS = frozenset(get_font(findfont("DejaVu Sans")).get_charmap())  # ships with matplotlib


def wrapped(text: str, inches: float, size: float, lines: int = 4) -> list[str]:
    """Breaks `text` into at most `lines` lines, `inches` wide at `size` points; "…" ends a cut.

    Control characters go, and a box stands for what the font lacks: matplotlib would warn of it.
    """
    seen = (c for c in " ".join(text.split()) if unicodedata.category(c)[0] != "C")
    plain = "".join(c if ord(c) in GLYPHS else "□" for c in seen)
    width = max(8, int(inches * 72 / (0.56 * size)))  # DejaVu's letters are some 0.56 em wide
    return textwrap.wrap(plain, width, max_lines=lines, placeholder=" …") or [""]


@contextlib.contextmanager
def canvas(
    path: Path, width: float, height: float, title: str, footer: str, layout: str = "constrained"
) -> Iterator[Figure]:
    """Yields an empty figure of `width` x `height` inches and writes it to `path` as PNG.

    No pyplot, so nothing global is touched; nothing is written when the block raises. Raises
    UserError when the file cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout=layout)
        place = {"x": 0.15 / width, "ha": "left"}
        title = "\n".join(wrapped(title, width - 0.3, 12))
        figure.suptitle(title, **place, y=1 - 0.1 / height, va="top", size=12)
        footer = "\n".join(wrapped(footer, width - 0.3, 8, 6))
        figure.supxlabel(footer, **place, y=0.08 / height, va="bottom", size=8, color=FAINT)
        yield figure
        with atomic_write(path) as temporary:  # Agg cannot draw 65,536 pixels or more
            figure.savefig(temporary, format="png", dpi=min(120, 30_000 / max(width, height)))
        figure.clear()


def draw_curves(history: list[dict[str, float]], path: Path, footer: str = "") -> None:
    """Draws losses and recalls over epochs, with the best epoch marked; one epoch is enough.

    `history` holds a record an epoch, as in history.csv; recalls are in percent. Raises UserError.
    """
    epochs = [record["epoch"] for record in history]
    best = max(history, key=lambda record: record["mean_recall"])  # the first of equals
    ways = {way: {f"R@{k}": f"{way}_r{k}" for k in KS} for way in ("i2t", "t2i")}
    panels = [
        ("Loss", "InfoNCE (nats)", {"train": "train_loss", "dev": "dev_loss"}),
        ("Mean recall on dev", "recall (%)", {"mean of the six below": "mean_recall"}),
        ("Image to text on dev", "recall (%)", ways["i2t"]),
        ("Text to image on dev", "recall (%)", ways["t2i"]),
    ]
    title = f"Training: best epoch {best['epoch']}, mean recall on dev {best['mean_recall']:.1f}%"
    with canvas(path, 9.5, 6.5, title, footer) as figure:
        for axes, (name, unit, curves) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            for (label, key), marker in zip(curves.items(), "os^", strict=False):
                axes.plot(epochs, [record[key] for record in history], marker=marker, label=label)
            told = f"best epoch ({best['epoch']})"
            axes.axvline(best["epoch"], color=FAINT, linestyle="--", linewidth=1, label=told)
            axes.set(title=name, xlabel="epoch", ylabel=unit)
            axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(bottom=0 if "%" in unit else None)
            axes.legend()


# ------------------------------------------------------------------- similarities and t-SNE


def cosine(queries: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Unit-length (Q, D) and (N, D) -> float64 (Q, N)."""
    return queries.astype(np.float64) @ pool.T.astype(np.float64)


def sample_pairs(split: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` images and a caption of each: positions in split.images and split.captions."""
    generator, total = np.random.default_rng(seed), len(split.images)
    images = np.sort(generator.choice(total, min(count, total), replace=False))
    shuffled = generator.permutation(len(split.captions))
    return images, shuffled[first_captions(split.caption_image[shuffled])][images]


def draw_similarity(path: Path, embedded: Embedded, seed: int, footer: str) -> None:
    """Draws the cosines of 48 images and captions at most; the pairs are the diagonal."""
    images, captions = sample_pairs(embedded.split, 48, seed)
    cosines = cosine(embedded.image_embeddings[images], embedded.text_embeddings[captions])
    pair = np.eye(len(images), dtype=bool)
    title = f"Cosine similarity of {len(images)} seeded pairs: mean {cosines[pair].mean():.3f} on "
    title += f"the diagonal (the pairs), {cosines[~pair].mean() if len(pair) > 1 else 0:.3f} off it"
    with canvas(path, 7.5, 6.9, title, footer) as figure:
        axes = figure.subplots()
        axes.grid(False)
        shown = axes.imshow(cosines)
        axes.set(xlabel="caption (number of its pair)", ylabel="image (number of its pair)")
        figure.colorbar(shown, label="cosine similarity (no unit)")


def modality_gap(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
    """The distance between the mean image and the mean text embedding (Liang et al. 2022)."""
    gap = image_embeddings.mean(0, dtype=np.float64) - text_embeddings.mean(0, dtype=np.float64)
    return float(np.linalg.norm(gap))


COLOURS = "black white red blue green yellow brown orange pink purple gray grey tan blond blonde"


def topics(texts: list[str], seed: int, most: int = 8) -> tuple[np.ndarray, list[str]]:
    """Sorts texts into at most `most` topics by NMF over TF-IDF: (topic of each, topics' names).

    A name is the topic's two strongest words, stop words and colours aside. A text without such
    words has topic -1.
    """
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

    ignored = sorted({*ENGLISH_STOP_WORDS, *COLOURS.split()})
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


def draw_tsne(path: Path, embedded: Embedded, seed: int, footer: str) -> None:
    """Draws at most 500 seeded pairs, images and texts together, in the plane of one t-SNE."""
    from sklearn.manifold import TSNE

    split = embedded.split
    images, captions = sample_pairs(split, 500, seed)
    pairs = [embedded.image_embeddings[images], embedded.text_embeddings[captions]]
    perplexity = min(30, (2 * len(images) - 1) / 3)
    start = "pca" if np.ptp(np.concatenate(pairs), axis=0).max() > 1e-6 else "random"
    made = TSNE(2, perplexity=perplexity, init=start, random_state=seed)
    points = made.fit_transform(np.concatenate(pairs).astype(np.float64)).reshape(2, -1, 2)
    joined = [""] * len(split.images)
    for caption, image in zip(split.captions, split.caption_image, strict=True):
        joined[image] += f" {caption}"
    topic, names = topics([joined[i] for i in images], seed)
    gap = modality_gap(embedded.image_embeddings, embedded.text_embeddings)
    title = f"t-SNE of {len(images)} image-caption pairs (perplexity {perplexity:.0f}). Modality "
    title += f"gap of the split, the distance of mean image and mean text embedding: {gap:.3f}"
    with canvas(path, 9.5, 7, title, footer) as figure:
        axes = figure.subplots()
        axes.grid(False)
        lines = LineCollection(points.swapaxes(0, 1), color=FAINT, linewidth=0.5, alpha=0.35)
        axes.add_collection(lines)
        for i, name in enumerate([*names, "no topic"]):
            mine = topic == (i if i < len(names) else -1)
            look = {"color": PALETTE[i] if i < len(names) else FAINT, "edgecolor": "white"}
            label = f"{wrapped(name, 2.5, 9, 1)[0]} ({mine.sum()})" if mine.any() else None
            axes.scatter(*points[0, mine].T, s=26, **look, linewidth=0.3, label=label)
            axes.scatter(*points[1, mine].T, s=26, **look, linewidth=0.3, marker="^")
        told = "● image   ▲ its caption\n— a pair\n\nTopic of the captions\n(and its images)"
        axes.legend(title=told, loc="upper left", bbox_to_anchor=(1.01, 1), alignment="left")
        axes.set(xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")


# ------------------------------------------------------------------------------ the search


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The positions of the `k` best of scores (N,), best first: a prefix of any longer list.

    Ties go by position, scores that are not finite come last.
    """
    rounded = np.where(np.isfinite(scores), scores, -np.inf).round(12)  # equal within metrics.TIE
    return np.argsort(-rounded, kind="stable")[:k]


class Hit(NamedTuple):
    """One of the pool: its rank from 1, its position, its score, whether it is the query's own."""

    rank: float
    position: int
    score: float
    own: bool


def find(
    query: np.ndarray, pool: np.ndarray, k: int, own: Sequence[int] = (), rank: float = np.nan
) -> list[Hit]:
    """Searches `pool` (N, D) with one embedding (D,): the top `k`, best first.

    Where none of the query's `own` positions is among them, the best own one follows at the end
    with `rank`, its rank by metrics.py.
    """
    scores = cosine(query[None], pool)[0]
    order = top_k(scores, k).tolist()
    hits = [Hit(place, i, scores[i], i in own) for place, i in enumerate(order, 1)]
    if len(own) and not any(hit.own for hit in hits):
        best = own[top_k(scores[list(own)], 1)[0]]
        hits.append(Hit(rank, best, scores[best], True))
    return hits


def extreme_cases(embedded: Embedded, count: int) -> tuple[list[int], list[int]]:
    """The captions of the `count` best and worst cases of text to image, each of another image.

    Best: rank 1, the widest margin before the next image first. Worst: the highest rank first.
    """
    owner, margins = embedded.split.caption_image, []
    for start in range(0, len(owner), 1024):  # in blocks: all scores at once may not fit
        scores = cosine(embedded.text_embeddings[start : start + 1024], embedded.image_embeddings)
        scores[~np.isfinite(scores)] = -2  # below any cosine
        place = np.arange(len(scores)), owner[start : start + 1024]
        own, scores[place] = scores[place], -2
        margins.append(own - scores.max(1))
    margin, ranks = np.concatenate(margins), embedded.t2i

    def each_image_once(order: np.ndarray) -> list[int]:
        return order[np.sort(np.unique(owner[order], return_index=True)[1])][:count].tolist()

    best, worst = np.lexsort((-margin, ranks)), np.lexsort((margin, -ranks))
    return each_image_once(best[ranks[best] == 1]), each_image_once(worst)


def checked_queries(queries: list[str], tokenizer: Tokenizer) -> list[str]:
    """Strips the user's queries; raises UserError for one that the model cannot understand."""
    for query in queries:
        words = [word for word in tokenizer.words(query) if any(map(str.isalnum, word))]
        if not words:
            raise UserError(f"--query {query!r} holds no word; describe a picture")
        unknown = [word for word in words if word not in tokenizer.number]
        told = f"--query {query!r}: {', '.join(unknown)} never stood in the training captions"
        if len(unknown) == len(words):
            raise UserError(f"{told} (or too seldom), so nothing is left of it; use other words")
        if unknown:
            warn(f"{told} (or too seldom); the rest of the query decides")
    return [query.strip() for query in queries]


# --------------------------------------------------------------------------- grids of pictures

CELL, NOTE, LINE, GAP = 1.5, 0.36, 0.19, 0.14  # inches
Cell = tuple[Image.Image, str, str | None]  # a picture, the lines under it, its frame's colour
Row = tuple[list[tuple[str, str]], list[Cell]]  # lines of text, each with its colour; pictures


def block(text: str, inches: float, colour: str = INK, lines: int = 5) -> list[tuple[str, str]]:
    return [(line, colour) for line in wrapped(text, inches, 9, lines)]


def draw_grid(
    path: Path, title: str, footer: str, rows: list[Row], inches: float = 2.6, left: bool = True
) -> None:
    """Draws rows of text (`inches` wide, left or right) and pictures in their own proportions."""
    pictures = max(len(cells) for _, cells in rows) * (CELL + GAP)
    width = 0.3 + inches + GAP + pictures
    heights = [max(CELL + NOTE, len(lines) * LINE) + GAP for lines, _ in rows]
    top = sum(heights) + 0.2 + 0.15 * len(wrapped(footer, width - 0.3, 8, 6))
    height = top + 0.25 + 0.22 * len(wrapped(title, width - 0.3, 12))
    text_x, picture_x = (0.15, 0.15 + inches + GAP) if left else (0.15 + pictures, 0.15)
    with canvas(path, width, height, title, footer, "none") as figure:
        for (lines, cells), tall in zip(rows, heights, strict=True):
            for i, (line, colour) in enumerate(lines):
                y = (top - 0.05 - i * LINE) / height
                figure.text(text_x / width, y, line, size=9, color=colour, va="top")
            for i, (picture, note, frame) in enumerate(cells):
                x, y = picture_x + i * (CELL + GAP), top - CELL
                box = (x / width, y / height, CELL / width, CELL / height)
                axes = figure.add_axes(box, xticks=[], yticks=[], anchor="N")
                axes.grid(False)
                axes.imshow(picture)
                axes.spines[:].set(visible=bool(frame), color=frame or INK, linewidth=4)
                axes.set_xlabel(note, size=8, labelpad=4, color=frame or INK)
            top -= tall


def images_row(
    lines: list[tuple[str, str]], hits: list[Hit], draw: Callable[[int], Image.Image], names: list
) -> Row:
    """A row of a text-to-image grid; `names` of the pictures (or none) stand under them."""
    cells = []
    for rank, i, score, own in hits:
        note = f"{rank:,.0f}: {score:.3f}" + (" true image" if own else "")
        name = f"\n{wrapped(names[i], CELL, 8, 1)[0]}" if names else ""
        cells.append((draw(i), note + name, GREEN if own else None))
    return lines, cells


def thumbnail(path: Path) -> Image.Image:
    """One of the user's own pictures as it should be seen, in its proportions, at most 224 px."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        image.draft("RGB", (224, 224))
        image = to_rgb(ImageOps.exif_transpose(image))
        image.thumbnail((224, 224))
        return image


def draw_confusion(path: Path, result: ZeroShot, footer: str) -> None:
    """Draws the confusion matrix, each row in percent of the true class's pictures."""
    total, told, size = np.bincount(result.truth), result.metrics(), len(result.classes)
    scores, counts = result.scores.copy(), np.zeros((size, size), int)
    scores[np.arange(len(scores)), result.truth] -= TIE  # a tie is lost, as in evaluate.py
    valid = np.isfinite(scores).all(1)  # the others count as pictures, not as predictions
    np.add.at(counts, (result.truth[valid], scores[valid].argmax(1)), 1)
    percent = counts / total[:, None] * 100
    title = f"Zero-shot: top-1 {told['zero_shot_top1']:.1f}% of {told['pictures']:,} pictures "
    title += f"(chance {told['chance']:.1f}%)"
    side = min(4.5 + 0.42 * size, 40)
    with canvas(path, side + 1, side, title, footer) as figure:
        axes = figure.subplots()
        axes.grid(False)
        shown = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
        names = [wrapped(name, 1.6, 9, 1)[0] for name in result.classes]
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), [f"{n} ({c:,})" for n, c in zip(names, total, strict=True)])
        axes.set(xlabel="predicted class", ylabel="true class (number of its pictures)")
        for (row, column), count in np.ndenumerate(counts if size <= 30 else counts[:0]):
            text = f"{percent[row, column]:.0f}%\n{count:,}" if count else ""
            colour = "black" if percent[row, column] > 50 else "white"
            axes.text(column, row, text, size=7, ha="center", va="center", color=colour)
        figure.colorbar(shown, label="share of the true class's pictures (%)")


# ------------------------------------------------------------------------------ the script


def origin(trained: Loaded, dataset: Dataset | None = None, split: Split | None = None) -> str:
    """The footer: what a figure is made from, and what speaks against it (also as a warning)."""
    path, told = trained.path, ""
    by_caption = trained.content.get("split_by_caption")
    if dataset and split:
        by_caption, images = by_caption or dataset.by_caption, len(split.images)
        told = f"data {Path(dataset.path).name}, {dataset.splits} {split.name} split: {images:,} "
        told += f"images, {len(split.captions):,} captions; cosines; ties lose; "
        if seen := evaluate.count_trained_on(trained, dataset, split):
            warn(f"{seen:,} of the {images:,} images evaluated were trained on")
            told += f"{seen:,} of these images were trained on; "
    told += f"checkpoint {path.parent.name}/{path.name}, epoch {trained.content['epoch']}"
    return told + ("; SPLIT BY CAPTION, which flatters" if by_caption else "")


def clamped(flag: str, wanted: int, pool: int) -> int:
    if wanted > pool:
        warn(f"--{flag} {wanted}: there are {pool:,}, all are shown")
    return min(wanted, pool)


def write(path: Path, draw: Callable[..., None], *made: Any) -> None:
    draw(path, *made)
    print(f"wrote {path}")


def draw_search(
    path: Path, trained: Loaded, queries: list[str], pool: np.ndarray, k: int,
    draw: Callable[[int], Image.Image], names: list[str], footer: str,
) -> None:  # fmt: skip
    """Draws what the user's own queries find among the embeddings `pool` (N, D) of pictures."""
    texts = evaluate.embed_texts(trained.model, trained.tokenizer, queries)
    found = [(block(q, 2.6), find(text, pool, k)) for q, text in zip(queries, texts, strict=True)]
    rows = [images_row(lines, hits, draw, names) for lines, hits in found]
    title = f"Text to image: the first {k} of {len(pool):,} pictures, with their cosines"
    draw_grid(path, title, footer, rows)


def draw_pairs(
    options: Namespace, made: Embedded, k: int, draw: Callable[[int], Image.Image], footer: str
) -> None:
    """Draws every figure of an embedded split into options.out."""
    split, seed, pool = made.split, options.seed, len(made.split.images)

    def text_row(caption: int, k: int) -> Row:
        own, rank = int(split.caption_image[caption]), made.t2i[caption]
        hits = find(made.text_embeddings[caption], made.image_embeddings, k, [own], rank)
        told = f"true image: rank {rank:,.0f} of {pool:,}"
        lines = block(split.captions[caption], 2.6)
        return images_row(lines + block(told, 2.6, GREEN if rank <= k else RED), hits, draw, [])

    def image_row(image: int) -> Row:
        own, rank = np.flatnonzero(split.caption_image == image).tolist(), made.i2t[image]
        hits = find(made.image_embeddings[image], made.text_embeddings, k, own, rank)
        told = f"best own caption: rank {rank:,.0f} of {len(split.captions):,}"
        lines = block(told, 6.5, GREEN if rank <= k else RED)
        for place, i, score, mine in hits:
            text = f"{place:,.0f}: {score:.3f} {'✓' if mine else '–'} {split.captions[i]}"
            lines += block(text, 6.5, GREEN if mine else INK, 1)
        return lines, [(draw(image), "", None)]

    write(options.out / "similarity.png", draw_similarity, made, seed, footer)
    write(options.out / "tsne.png", draw_tsne, made, seed, footer)
    images, captions = sample_pairs(split, clamped("queries", options.queries, pool), seed)
    title = f"Text to image: the first {k} of {pool:,} pictures, the true one framed"
    rows = [text_row(i, k) for i in captions]
    write(options.out / "grid_text_to_image.png", draw_grid, title, footer, rows)
    title = f"Image to text: the first {k} of {len(split.captions):,} captions, own ones marked ✓"
    rows = [image_row(i) for i in images]
    write(options.out / "grid_image_to_text.png", draw_grid, title, footer, rows, 6.5, False)
    best, worst = extreme_cases(made, 4)
    title = "Text to image, best cases (rank 1, the widest margin before the second) and worst "
    title += "cases (what was ranked first instead), the true image framed"
    rows = [text_row(i, 2) for i in best] + [text_row(i, 1) for i in worst]
    write(options.out / "grid_best_worst.png", draw_grid, title, footer, rows)


def main(argv: list[str]) -> None:
    parser = Parser(prog="visualize.py", description=__doc__.split("\n")[0])
    evaluate.add_model_flags(parser)
    flag = parser.add_argument_group("what to draw").add_argument
    flag("--out", type=Path, default=Path("report/figures"), help="folder of the figures")
    flag("--top-k", type=number(int, 1, 20), default=5, help="results of each query")
    told = "captions and images to draw from the split"
    flag("--queries", type=number(int, 1, 50), default=6, help=told)
    told = "a text to search pictures with, any number of times; draws nothing else"
    flag("--query", action="append", default=[], metavar="TEXT", help=told)
    flag("--images", type=Path, metavar="DIR", help="search this folder of pictures with --query")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that is drawn by lot")
    options = parser.parse_args(argv)
    if options.images and not options.query:
        raise UserError('--images needs a text to search for, such as --query "a dog in snow"')
    if options.zero_shot and options.query:
        raise UserError("--zero-shot draws confusion.png only; leave --query out")
    if options.templates and not options.zero_shot:
        raise UserError("--templates goes with --zero-shot")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; give a folder")
    trained = evaluate.load_trained(options.checkpoint, options.device)
    print(f"checkpoint {trained.path}, epoch {trained.content['epoch']}")
    queries, model = checked_queries(options.query, trained.tokenizer), trained.model
    size, workers = trained.transform["image_size"], options.workers
    if options.zero_shot:
        how = options.zero_shot, options.templates, trained.transform, workers
        result = evaluate.zero_shot(model, trained.tokenizer, *how)
        write(options.out / "confusion.png", draw_confusion, result, origin(trained))
        return
    if options.images:
        paths = evaluate.find_pictures(options.images)
        if not paths:
            raise UserError(f"--images {options.images} holds no picture")
        pool, paths = evaluate.embed_pictures(model, paths, trained.transform, workers)
        names = [str(path.relative_to(options.images)) for path in paths]
        k, draw = clamped("top-k", options.top_k, len(paths)), lambda i: thumbnail(paths[i])
        footer = f"pictures of {options.images}: {len(paths):,}; {origin(trained)}"
        made = trained, queries, pool, k, draw, names, footer
        write(options.out / "grid_search.png", draw_search, *made)
        return
    data = options.data, options.splits, options.cache, workers
    dataset = evaluate.load_data_for(trained, *data)
    print(dataset.summary())
    split = dataset.split(options.split)
    k, footer = clamped("top-k", options.top_k, len(split.images)), origin(trained, dataset, split)

    def picture(image: int) -> Image.Image:
        return dataset.picture(int(split.images[image]))

    if queries:
        pool = evaluate.embed_images(model, dataset.pixels, split.images, size)
        made = trained, queries, pool, k, picture, [], footer
        write(options.out / "grid_text_to_image.png", draw_search, *made)
        return
    history, told = trained.content["history"], origin(trained)
    write(options.out / "curves.png", lambda path: draw_curves(history, path, told))
    embedded = evaluate.evaluate_split(model, trained.tokenizer, dataset, split, size)
    draw_pairs(options, embedded, k, picture, footer)


if __name__ == "__main__":
    run(main)
