"""The figures: what a text or a picture finds, in grids, and with charts.py all that has axes.

`python visualize.py [CHECKPOINT]` follows evaluate.py, whose embeddings and ranks it draws. Files
named grid_* show pictures of the data.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import evaluate
import zeroshot
from captions import AnyTokenizer, plain_title
from charts import (
    GREEN,
    INK,
    RED,
    canvas,
    cosine,
    draw_ablations,
    draw_confusion,
    draw_curves,
    draw_distances,
    draw_gap,
    draw_genres,
    draw_similarity,
    draw_tsne,
    read_ablations,
    sample_pairs,
    wrapped,
)
from cli import Parser, UserError, number, run, warn
from dataset import Dataset, Split
from embedding import Cached, embed_images, embed_texts
from evaluate import Embedded, Loaded
from generalisation import distance_matrix, genre_recalls, paired_ranks
from images import thumbnail
from layouts import Row as Film
from metrics import first_captions
from models import load_checkpoint


def whole_history(trained: Loaded) -> list[dict[str, float]]:
    """The history of the run up to its last epoch: best.pt ends with the best one."""
    last = trained.path.with_name("last.pt")
    history, run_of = trained.content["history"], trained.content["config"]
    if last.is_file() and (later := load_checkpoint(last))["config"] == run_of:
        history = max(history, later["history"], key=len)
    return history


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


def checked_queries(queries: list[str], tokenizer: AnyTokenizer) -> list[str]:
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


def draw_films(
    out: Path, made: Embedded, films: list[Film], history: list[dict[str, float]], footer: str
) -> None:
    """Draws what is told of films alone: a corner of D, memorising, and genres."""
    first = first_captions(made.split.caption_image)
    images, texts = made.image_embeddings, made.text_embeddings[first]
    corner, titles = slice(0, 40), [plain_title(film.title) for film in films[:40]]
    distances = distance_matrix(images[corner], texts[corner])
    write(out / "distances.png", draw_distances, distances, titles, footer)
    if history and "train_top1_t2i" in history[0]:
        pairs = history[0]["dev_films"]
        write(out / "generalisation.png", draw_gap, history, pairs, footer.rpartition("; ")[2])
    recalls = genre_recalls(paired_ranks(images, texts), [film.genres for film in films])
    if recalls:
        write(out / "genres.png", draw_genres, recalls, footer)


def draw_pairs(
    options: Any, made: Embedded, draw: Draw, footer: str, names: list[str] | None = None
) -> None:
    """Draws every figure of an embedded split into the folder options.out."""
    split, seed, out, pool = made.split, options.seed, options.out, len(made.split.images)
    texts, k = split.captions, clamped("top-k", options.top_k, pool)

    def text_row(i: int, k: int) -> Row:
        own, rank = [int(split.caption_image[i])], made.t2i[i]
        told = f"true image: rank {rank:,.0f} of {pool:,}", GREEN if rank <= k else RED
        hits = find(made.text_embeddings[i], made.image_embeddings, k, own, rank)
        return [(texts[i], INK), told], cells_of(hits, draw, names or [])

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
        if seen := evaluate.trained_on(trained, dataset, split.images).sum():
            warn(f"{seen:,} of the {count:,} images evaluated were trained on")
            told += f"{seen:,} of these images were trained on; "
    told += f"checkpoint {path.parent.name}/{path.name}, {trained.stage}"
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
    model, out, workers = trained.model, options.out, options.workers
    queries = checked_queries(options.query, model.tokenizer)
    if options.zero_shot:
        result = zeroshot.zero_shot(model, options.zero_shot, options.templates, workers)
        return write(out / "confusion.png", draw_confusion, result, origin(trained))
    if options.images:
        if not (paths := zeroshot.find_pictures(options.images)):
            raise UserError(f"--images {options.images} holds no picture")
        pool, paths = zeroshot.embed_pictures(model, paths, workers)
        names = [str(path.relative_to(options.images)) for path in paths]
        footer = f"{len(paths):,} pictures of {options.images}; {origin(trained)}"
        name, draw = "grid_search.png", lambda i: thumbnail(paths[i])
    else:
        dataset, split = evaluate.load_data_for(trained, options)
        films = [dataset.films[row] for row in split.images] if dataset.films else []
        names = [plain_title(film.title) for film in films]
        cached = Cached(readings=evaluate.readings_for(trained, dataset, split, options))
        footer = origin(trained, dataset, split)
        name, draw = "grid_text_to_image.png", lambda i: dataset.picture(int(split.images[i]))
        if not queries:
            history, told = whole_history(trained), origin(trained)
            write(out / "curves.png", lambda path: draw_curves(history, path, told))
            made = evaluate.evaluate_split(model, dataset, split, cached)
            if films:
                draw_films(out, made, films, history, footer)
            return draw_pairs(options, made, draw, footer, names)
        pool = embed_images(model, dataset.pixels, split.images, readings=cached.readings)
    k = clamped("top-k", options.top_k, len(pool))
    found = [find(text, pool, k) for text in embed_texts(model, queries)]
    rows = [([(q, INK)], cells_of(f, draw, names)) for q, f in zip(queries, found, strict=True)]
    title = f"Text to image: the first {k} of {len(pool):,} pictures"
    return write(out / name, draw_grid, title, footer, rows)


if __name__ == "__main__":
    run(main)
