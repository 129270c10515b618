"""The figures: the run's curves, cosines, t-SNE, and grids of what a text or a picture finds.

`python visualize.py [CHECKPOINT ...]` follows evaluate.py, whose embeddings and ranks it draws.
Files named grid_*, and tsne.png, show pictures of the data.
"""

from __future__ import annotations

import support.python  # noqa: F401  refuses a Python that is too old, before all else

# isort: split

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from PIL import Image

import evaluate
from evaluate import Embedded
from sources.opening import thumbnail
from support import zeroshot
from support.cases import extreme_cases, mixed_cases, sample_pairs
from support.checkpoint import dev_size
from support.command import Parser, UserError, later, number, output, run, say_unused, warn
from support.embedding import Trained, load_trained, trained_on
from support.figures import (
    GREEN,
    GREY,
    INK,
    MARKERS,
    RED,
    TEN,
    canvas,
    draw_curves,
    fitting,
    wrapped,
    write,
)
from support.grid import CELL, Cell, Column, Row, draw_grid
from support.html import write_page
from support.origin import named, origin, run_name, whole_history
from support.ranking import Hit, find
from support.remarks import check_queries, unread
from support.similarity import draw_similarity
from support.thumbnails import draw_thumbnail, spread
from support.topics import Topics, topics_of

if TYPE_CHECKING:
    from argparse import Namespace


# Figures that one kind of data alone has, and what its pictures are called.
FIGURES = {"posters": later("posters.figures", "draw_films")}
plain_title = later("posters.films", "plain_title")
draw_analysis = later("report.analysis_figures", "draw_analysis")
reasons = later("report.reasons", "reasons")
draw_occlusion = later("report.occlusion", "draw_occlusion")

LINKS = 40  # pairs that t-SNE joins by a line; all would hide the points


class Pictures(NamedTuple):
    """What texts search: embeddings (N, D), the picture at a position, their names or none."""

    embeddings: np.ndarray
    picture: Callable[[int], Image.Image]
    names: list[str]
    footer: str  # where they come from, and what speaks against them
    name: str  # of the runs and the split, for titles


def embed_split(trained: Trained, options: Namespace) -> tuple[Embedded, Pictures]:
    """Loads and embeds the split that the flags name. Raises UserError."""
    dataset, pairs = evaluate.load_data_for(trained, options)
    count, note = len(pairs.rows), ""
    if seen := trained_on(trained, dataset, pairs.rows).sum():
        warn(f"{seen:,} of the {count:,} images evaluated were trained on")
        note = f"{seen:,} of these images were trained on; "
    for remark in unread(trained.tokenizers, pairs.captions, "captions"):
        warn(remark)
        note += f"{remark}; "
    footer = (
        f"data {Path(dataset.path).resolve().name}, {dataset.splits} {pairs.name} split: "
        f"{count:,} images, {len(pairs.captions):,} captions; scores are cosines, ties lose; "
        f"{note}{origin(trained, options, dataset)}"
    )
    embedded = evaluate.evaluate_trained(trained, dataset, options.split, options)
    rows = [int(row) for row in pairs.rows]
    names = [plain_title(dataset.records[row].title) for row in rows if dataset.records]
    images = embedded.image_embeddings
    name = f"{named(trained, options)}, {pairs.name} split"
    return embedded, Pictures(images, lambda i: dataset.picture(rows[i]), names, footer, name)


def embed_folder(trained: Trained, options: Namespace) -> Pictures:
    """Embeds the pictures of the folder --images. Raises UserError."""
    if not (paths := zeroshot.find_pictures(options.images)):
        raise UserError(f"--images {options.images} holds no picture")
    embeddings, paths = zeroshot.embed_pictures(trained, paths, options.workers)
    names = [str(path.relative_to(options.images)) for path in paths]
    footer = f"{len(paths):,} pictures of {options.images}; {origin(trained, options)}"
    name = f"{named(trained, options)}, {options.images.resolve().name}"
    return Pictures(embeddings, lambda i: thumbnail(paths[i]), names, footer, name)


def draw_tsne(
    path: Path, embedded: Embedded, pictures: Pictures, groups: Topics, seed: int
) -> None:
    """Draws at most 500 seeded pairs, images and texts together, in the plane of one t-SNE."""
    from sklearn.manifold import TSNE

    images, captions = sample_pairs(embedded.pairs, 500, seed)
    rows = embedded.image_embeddings[images], embedded.text_embeddings[captions]
    both = np.concatenate(rows).astype(np.float64)
    perplexity = min(30, (len(both) - 1) / 3)
    init = "pca" if np.ptp(both, axis=0).max() > 1e-6 else "random"  # PCA of one point fails
    tsne = TSNE(2, perplexity=perplexity, init=init, random_state=seed)
    points = tsne.fit_transform(both).reshape(2, -1, 2)  # images, then texts
    mean_image = embedded.image_embeddings.mean(0, dtype=np.float64)
    mean_text = embedded.text_embeddings.mean(0, dtype=np.float64)
    gap = np.linalg.norm(mean_image - mean_text)  # Liang et al. 2022
    title = f"{pictures.name}: t-SNE of {len(images)} pairs, perplexity {perplexity:.0f}. Modality "
    title += f"gap {gap:.3f} (from the mean image to the mean text embedding of the split)"
    topic, looks = groups.of_image[images], [*zip(TEN, MARKERS, strict=True), (GREY, "d")]
    with canvas(path, 11, 7.5, title, pictures.footer) as (figure, _):
        axes = figure.subplots()
        few = np.random.default_rng(seed).permutation(len(images))[:LINKS]
        lines = LineCollection(points[:, few].swapaxes(0, 1), color=GREY, linewidth=0.7)
        axes.add_collection(lines)
        for i, name in [*enumerate(groups.names), (-1, "no words")]:
            chosen, (colour, marker) = topic == i, looks[i]
            label = f"{wrapped(name, 2.5, 9, 1)[0]} ({chosen.sum()})" if chosen.any() else None
            look = {"s": 30, "marker": marker, "edgecolor": colour, "linewidth": 0.9}
            axes.scatter(*points[0, chosen].T, color=colour, label=label, **look)
            axes.scatter(*points[1, chosen].T, facecolor="white", **look)
        for i in spread(points[0], topic):
            hue = looks[topic[i]][0]
            draw_thumbnail(axes, points[0, i], pictures.picture(int(images[i])), hue)
        key = f"filled: image\nhollow: its caption\nlines: {len(few)} of the pairs\n\n"
        key += "Topic of the captions\n(pairs)"
        axes.legend(title=key, loc="upper left", bbox_to_anchor=(1.01, 1), alignment="left")
        axes.set(xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")


def cell_of(hit: Hit, pictures: Pictures) -> Cell:
    """A picture found, with rank, score and name; the true one is ticked and framed."""
    note = f"{hit.rank:,.0f}: {hit.score:.3f}{' ✓' if hit.true else ''}"
    if pictures.names:
        note += f"\n{fitting(pictures.names[hit.position], CELL, 8)}"
    return Cell(pictures.picture(hit.position), note, GREEN if hit.true else None)


def verdict(rank: float, k: int, pool: int, true: str) -> tuple[str, str]:
    """Whether a query found the true one among the first `k`, with its colour."""
    mark, hue = (f"✓ {true}", GREEN) if rank <= k else (f"✗ {true} only", RED)
    return f"{mark} at rank {rank:,.0f} of {pool:,}", hue


def found_by(embedded: Embedded, i: int, k: int) -> list[Hit]:
    """The first `k` pictures that caption `i` finds, and its own where it is not among them."""
    text, true = embedded.text_embeddings[i], [int(embedded.pairs.caption_image[i])]
    return find(text, embedded.image_embeddings, k, true, embedded.t2i[i])


def text_row(embedded: Embedded, pictures: Pictures, i: int, k: int, why: str = "") -> Row:
    """Caption `i`, its own picture and the first `k` that it finds."""
    hits = found_by(embedded, i, k)
    true = next(hit for hit in hits if hit.true)
    texts = [(embedded.pairs.captions[i], INK)]
    texts.append(verdict(embedded.t2i[i], k, len(pictures.embeddings), "its picture"))
    texts += [(why, GREY)] if why else []
    own = cell_of(true, pictures)._replace(note=f"rank {true.rank:,.0f}: {true.score:.3f}")
    return [texts, own] + [cell_of(hit, pictures) for hit in hits[:k]]


def image_row(embedded: Embedded, pictures: Pictures, i: int, k: int) -> Row:
    """Image `i`, the first `k` captions that it finds, and its own ones."""
    captions, image = embedded.pairs.captions, pictures.embeddings[i]
    true = np.flatnonzero(embedded.pairs.caption_image == i).tolist()
    hits = find(image, embedded.text_embeddings, k, true, embedded.i2t[i])[:k]
    found = [verdict(embedded.i2t[i], k, len(captions), "the best of its own")]
    for hit in hits:
        mark, colour = ("✓", GREEN) if hit.true else ("✗", INK)
        found.append((f"{hit.rank:,.0f}: {hit.score:.3f} {mark} {captions[hit.position]}", colour))
    own = find(image, embedded.text_embeddings[true], len(true))
    texts = [(f"{hit.score:.3f} {captions[true[hit.position]]}", GREEN) for hit in own]
    return [Cell(pictures.picture(i)), found, texts]


def clamped(flag: str, count: int, pool: int) -> int:
    if count > pool:
        warn(f"--{flag} {count}: there are {pool:,}, all are shown")
    return min(count, pool)


def draw_split(trained: Trained, options: Namespace) -> None:
    """Draws every figure of a split and of the run that made the checkpoint."""
    embedded, pictures = embed_split(trained, options)
    pairs, out, seed, footer = embedded.pairs, options.out, options.seed, pictures.footer
    history = whole_history(trained)
    first = "; the run of the first" if len(trained.members) > 1 else ""
    about = f"{origin(trained, options)}{first}"
    images, batch = dev_size(trained.content), trained.options.batch_size
    name = run_name(trained.path.parent)
    write(out / "curves.png", draw_curves, history, about, name, images, batch)
    if pairs.dataset.kind in FIGURES:
        seen = evaluate.evaluate_trained(trained, pairs.dataset, "train", options)
        FIGURES[pairs.dataset.kind](out, embedded, seen, history, pictures.name, footer, evaluate)
    groups = topics_of(pairs, seed)
    write(out / "similarity.png", draw_similarity, embedded, groups, seed, pictures.name, footer)
    write(out / "tsne.png", draw_tsne, embedded, pictures, groups, seed)
    captions = draw_pairs(embedded, pictures, options)
    if options.occlusion:
        content = trained, embedded, pictures.picture, captions, pictures.name, footer
        write(out / "grid_occlusion.png", draw_occlusion, *content)
    draw_extremes(out / "grid_best_worst.png", embedded, pictures)


def draw_pairs(embedded: Embedded, pictures: Pictures, options: Namespace) -> list[int]:
    """Draws what captions and images of mixed quality find; which captions these are."""
    pairs, pool, seed = embedded.pairs, len(embedded.pairs.rows), options.seed
    k, count = clamped("top-k", options.top_k, pool), clamped("queries", options.queries, pool)
    images, texts = sample_pairs(pairs, pool, seed)
    texts = mixed_cases(texts, embedded.t2i, count, seed)
    lot = f"Drawn by lot, one from each of {count} parts by rank"
    rows = [text_row(embedded, pictures, i, k) for i in texts]
    columns = [Column(2.6, "the query: a caption"), Column(CELL, "true picture")]
    columns += [Column(CELL, f"predicted: the first {k}"), *[Column()] * (k - 1)]
    title = f"{pictures.name}: text to image among {pool:,} pictures. {lot}"
    content = title, pictures.footer, columns, rows
    write(options.out / "grid_text_to_image.png", draw_grid, *content)
    rows = [
        image_row(embedded, pictures, i, k) for i in mixed_cases(images, embedded.i2t, count, seed)
    ]
    columns = [Column(CELL, "the query"), Column(5.2, f"predicted: the first {k} captions")]
    columns += [Column(4.4, "true: its own captions, with their scores")]
    title = f"{pictures.name}: image to text among {len(pairs.captions):,} captions. {lot}"
    content = title, pictures.footer, columns, rows
    write(options.out / "grid_image_to_text.png", draw_grid, *content)
    return texts


def draw_extremes(path: Path, embedded: Embedded, pictures: Pictures) -> None:
    """Draws the best cases beside the worst ones, with a word on why."""
    halves, columns = [], []
    for name, cases in zip(("BEST", "WORST"), extreme_cases(embedded, 4), strict=True):
        why = reasons(embedded, cases, [found_by(embedded, i, 2) for i in cases])
        rows = [
            text_row(embedded, pictures, i, 2, sentence)
            for i, sentence in zip(cases, why, strict=True)
        ]
        rows = [row + [None] * (4 - len(row)) for row in rows]  # there may be one picture
        halves.append(rows + [[None] * 4] * (4 - len(rows)))
        head = "rank 1 by the widest margin" if name == "BEST" else "the last ranks"
        columns += [Column(2.5, f"{name}: {head}"), Column(CELL, "true picture")]
        columns += [Column(CELL, "predicted: first"), Column(CELL, "second"), Column(0.2)]
    rows = [[*best, None, *worst] for best, worst in zip(*halves, strict=True) if any(best + worst)]
    title = f"{pictures.name}: text to image, the best and the worst cases, a picture once"
    write(path, draw_grid, title, pictures.footer, columns[:-1], rows)


def draw_search(trained: Trained, options: Namespace) -> None:
    """Draws what the texts of --query find, among a split's pictures or those of --images."""
    check_queries(options.query, trained)
    if options.images:
        pictures, name = embed_folder(trained, options), "grid_search.png"
    else:
        (_, pictures), name = embed_split(trained, options), "grid_query.png"
    pool = len(pictures.embeddings)
    k, rows = clamped("top-k", options.top_k, pool), []
    for query, embedding in zip(options.query, trained.embed_texts(options.query), strict=True):
        hits = find(embedding, pictures.embeddings, k)
        rows.append([[(query, INK)]] + [cell_of(hit, pictures) for hit in hits])
        if options.images:
            print(query)
            for hit in hits:
                print(f"{hit.rank:,.0f} {hit.score:.3f} {pictures.names[hit.position]}")
    title = f"{pictures.name}: text to image among {pool:,} pictures"
    columns = [Column(2.6, "the query"), Column(CELL, f"the first {k}"), *[Column()] * (k - 1)]
    write(options.out / name, draw_grid, title, pictures.footer, columns, rows)


def draw_zero_shot(trained: Trained, options: Namespace) -> None:
    """Draws what the pictures of each class folder of --zero-shot are taken for."""
    result = zeroshot.zero_shot(trained, options)
    write(options.out / "confusion.png", zeroshot.draw_confusion, result, origin(trained, options))


def draw_page(trained: Trained, options: Namespace) -> None:
    """Writes every query of a split with its results into one HTML file."""
    embedded, pictures = embed_split(trained, options)
    k = clamped("top-k", options.top_k, len(pictures.embeddings))
    content = embedded, pictures.picture, pictures.footer, k, options.seed
    write(options.out / "predictions.html", write_page, *content)


def main(argv: list[str]) -> None:
    parser = Parser(prog="visualize.py", description=__doc__.split("\n")[0])
    evaluate.add_model_flags(parser)
    flag = parser.add_argument_group("what to draw").add_argument
    flag("--out", type=Path, help="folder of the figures (default: figures/ by the checkpoint)")
    flag("--top-k", type=number(int, 1, 20), default=5, help="results of each query")
    flag("--queries", type=number(int, 1, 50), default=6, help="captions and images of the split")
    flag("--query", action="append", default=[], metavar="TEXT", help="only search it; repeatable")
    flag("--images", type=Path, metavar="DIR", help="search this folder of pictures with --query")
    flag("--html", action="store_true", help="only predictions.html: every query, to look through")
    text = "also grid_occlusion.png: which words and places carry the scores of the captions drawn"
    flag("--occlusion", action="store_true", help=text)
    text = "only draw what evaluate.py --analysis wrote; repeatable, side by side"
    flag("--analysis", action="append", type=Path, metavar="DIR", help=text)
    flag("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all that is drawn by lot")
    options = parser.parse_args(argv)
    typed = parser.typed(argv)
    if options.analysis:
        others = [flag for flag in typed if flag not in ("analysis", "out")]
        say_unused(typed, others, "--analysis draws what is written")
        return draw_analysis(options.analysis, options.out)
    if options.images and not options.query:
        raise UserError('--images needs a text to search for, such as --query "a dog in snow"')
    if options.zero_shot and options.query:
        raise UserError("--zero-shot draws confusion.png only; leave --query out")
    if options.html and (options.zero_shot or options.query):
        raise UserError("--html shows a split; leave --zero-shot, --query and --images out")
    if options.templates and not options.zero_shot:
        raise UserError("--templates goes with --zero-shot")
    if options.occlusion and (options.query or options.html or options.zero_shot):
        raise UserError("--occlusion goes with the figures of a split; leave the other flag out")
    if options.zero_shot or options.images:
        say_unused(typed, ("data", "splits", "split"), "a folder of its own is read")
    idle = {"queries"} if options.query or options.zero_shot or options.html else set()
    idle |= {"seed"} if options.query or options.zero_shot else set()
    idle |= {"top_k"} if options.zero_shot else set()
    say_unused(typed, sorted(idle), "they are of the grids of a split")
    trained = load_trained(options.checkpoint, options.device)
    options.out = options.out or trained.path.parent / "figures"
    output(str(options.out / "figure.png"))  # can it be written? before the work
    draw = draw_zero_shot if options.zero_shot else draw_search if options.query else draw_split
    (draw_page if options.html else draw)(trained, options)


if __name__ == "__main__":
    run(main)
