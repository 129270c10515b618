"""The figures: the run's curves, cosines, t-SNE, and grids of what a text or a picture finds.

`python visualize.py [CHECKPOINT ...]` follows evaluate.py, whose embeddings and ranks it draws.
Files named grid_* show pictures of the data.
"""

from __future__ import annotations

import support.python  # noqa: F401  refuses a Python that is too old, before all else

# isort: split

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from PIL import Image

import evaluate
from evaluate import Embedded, first_captions
from sources.opening import thumbnail
from support import zeroshot
from support.checkpoint import load_checkpoint
from support.command import Parser, UserError, later, number, output, run, say_unused, warn
from support.embedding import Trained, load_trained, trained_on
from support.figures import (
    GREEN,
    GREY,
    INK,
    PALETTE,
    RED,
    canvas,
    draw_curves,
    fitting,
    wrapped,
    write,
)
from support.grid import CELL, Cell, Row, draw_grid
from support.hits import Hit, cosine, find
from support.html import write_page
from support.options import same_run
from support.remarks import check_queries, unread
from support.topics import topics

if TYPE_CHECKING:
    from argparse import Namespace

    from dataset import CaptionedImages, Pairs

# Figures that one kind of data alone has, and what its pictures are called.
FIGURES = {"posters": later("posters.figures", "draw_films")}
plain_title = later("posters.films", "plain_title")
draw_analysis = later("report.analysis_figures", "draw_analysis")
draw_occlusion = later("report.occlusion", "draw_occlusion")


class Pictures(NamedTuple):
    """What texts search: embeddings (N, D), the picture at a position, their names or none."""

    embeddings: np.ndarray
    picture: Callable[[int], Image.Image]
    names: list[str]
    footer: str  # where they come from, and what speaks against them


def origin(trained: Trained, options: Namespace, dataset: CaptionedImages | None = None) -> str:
    """Which checkpoints a figure is made from, and whether a split by caption flatters it."""
    paths = [path.resolve() for path in options.checkpoint or [trained.path]]
    files = " and ".join(f"{path.parent.name}/{path.name}" for path in paths)
    torn = any(content["split_by_caption"] for content in trained.contents)
    mark = "; SPLIT BY CAPTION: flatters" if torn or (dataset and dataset.by_caption) else ""
    return f"checkpoint {files}, {trained.stage}{mark}"


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
    return embedded, Pictures(images, lambda i: dataset.picture(rows[i]), names, footer)


def embed_folder(trained: Trained, options: Namespace) -> Pictures:
    """Embeds the pictures of the folder --images. Raises UserError."""
    if not (paths := zeroshot.find_pictures(options.images)):
        raise UserError(f"--images {options.images} holds no picture")
    embeddings, paths = zeroshot.embed_pictures(trained, paths, options.workers)
    names = [str(path.relative_to(options.images)) for path in paths]
    footer = f"{len(paths):,} pictures of {options.images}; {origin(trained, options)}"
    return Pictures(embeddings, lambda i: thumbnail(paths[i]), names, footer)


def whole_history(trained: Trained) -> list[dict[str, float]]:
    """The history of the (first) run up to its last epoch: best.pt ends with the best one."""
    history = trained.content["history"]
    of_recipe = trained.path.with_name("recipe.txt").is_file()  # its runs have folders of their own
    for last in trained.path.parent.glob("*/last.pt" if of_recipe else "last.pt"):
        with contextlib.suppress(UserError):  # it may be damaged where best.pt is whole
            content = load_checkpoint(last)
            if same_run(trained.content, content):
                history = max(history, content["history"], key=len)
    return history


def sample_pairs(pairs: Pairs, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` images and a caption of each: positions in pairs.rows and pairs.captions."""
    generator, total = np.random.default_rng(seed), len(pairs.rows)
    images = np.sort(generator.choice(total, min(count, total), replace=False))
    shuffled = generator.permutation(len(pairs.captions))
    return images, shuffled[first_captions(pairs.caption_image[shuffled])][images]


def draw_similarity(path: Path, embedded: Embedded, seed: int, footer: str) -> None:
    """Draws the cosines of 48 images and captions at most; the pairs are the diagonal."""
    images, captions = sample_pairs(embedded.pairs, 48, seed)
    cosines = cosine(embedded.image_embeddings[images], embedded.text_embeddings[captions])
    pair = np.eye(len(images), dtype=bool)
    title = f"Cosine similarity of {len(images)} seeded pairs: mean {cosines[pair].mean():.3f} on "
    title += f"the diagonal (the pairs), {cosines[~pair].mean() if len(pair) > 1 else 0:.3f} off it"
    with canvas(path, 7.5, 6.2, title, footer) as (figure, _):
        axes = figure.subplots()
        axes.set(xlabel="caption (number of its pair)", ylabel="image (number of its pair)")
        figure.colorbar(axes.imshow(cosines), label="cosine similarity (no unit)")


def draw_tsne(path: Path, embedded: Embedded, seed: int, footer: str) -> None:
    """Draws at most 500 seeded pairs, images and texts together, in the plane of one t-SNE."""
    from sklearn.manifold import TSNE

    pairs, captions_of = embedded.pairs, [""] * len(embedded.pairs.rows)
    images, captions = sample_pairs(pairs, 500, seed)
    rows = embedded.image_embeddings[images], embedded.text_embeddings[captions]
    both = np.concatenate(rows).astype(np.float64)
    perplexity = min(30, (len(both) - 1) / 3)
    init = "pca" if np.ptp(both, axis=0).max() > 1e-6 else "random"  # PCA of one point fails
    tsne = TSNE(2, perplexity=perplexity, init=init, random_state=seed)
    points = tsne.fit_transform(both).reshape(2, -1, 2)  # images, then texts
    for caption, image in zip(pairs.captions, pairs.caption_image, strict=True):
        captions_of[image] += f" {caption}"
    topic, names = topics([captions_of[i] for i in images], seed)
    mean_image = embedded.image_embeddings.mean(0, dtype=np.float64)
    mean_text = embedded.text_embeddings.mean(0, dtype=np.float64)
    gap = np.linalg.norm(mean_image - mean_text)  # Liang et al. 2022
    title = f"t-SNE of {len(images)} pairs, perplexity {perplexity:.0f}. Modality gap {gap:.3f} "
    title += "(distance between the mean image and the mean text embedding of the split)"
    with canvas(path, 9.5, 6.5, title, footer) as (figure, _):
        axes = figure.subplots()
        lines = LineCollection(points.swapaxes(0, 1), color=GREY, linewidth=0.5, alpha=0.35)
        axes.add_collection(lines)
        for i, name in [*enumerate(names), (-1, "no topic")]:
            chosen, look = topic == i, {"s": 26, "color": [*PALETTE, GREY][i], "edgecolor": "white"}
            label = f"{wrapped(name, 2.5, 9, 1)[0]} ({chosen.sum()})" if chosen.any() else None
            axes.scatter(*points[0, chosen].T, linewidth=0.3, label=label, **look)
            axes.scatter(*points[1, chosen].T, linewidth=0.3, marker="^", **look)
        key = "● image   ▲ its caption\n— a pair\n\nTopic of the captions\n(and its images)"
        axes.legend(title=key, loc="upper left", bbox_to_anchor=(1.01, 1), alignment="left")
        axes.set(xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")


def extreme_cases(embedded: Embedded, count: int) -> list[list[int]]:
    """The captions of the `count` best (rank 1, widest margin) and worst cases, an image once."""
    image_of, first = embedded.pairs.caption_image, np.flatnonzero(embedded.t2i == 1)
    margins = []
    for part in np.array_split(first, 1 + len(first) // 1024):  # all scores at once may not fit
        scores = cosine(embedded.text_embeddings[part], embedded.image_embeddings)
        margins.append(np.ptp(np.sort(np.nan_to_num(scores, nan=-2))[:, -2:], axis=1))
    best = first[np.argsort(-np.concatenate(margins), kind="stable")]
    worst = np.argsort(-embedded.t2i, kind="stable")
    once = [order[np.sort(first_captions(image_of[order]))] for order in (best, worst)]
    return [order[:count].tolist() for order in once]


def cells_of(hits: list[Hit], pictures: Pictures) -> list[Cell]:
    """The pictures found, with rank, score and name, the true one framed."""
    cells = []
    for hit in hits:
        note = f"{hit.rank:,.0f}: {hit.score:.3f}{' true image' if hit.true else ''}"
        if pictures.names:
            note += f"\n{fitting(pictures.names[hit.position], CELL, 8)}"
        cells.append(Cell(pictures.picture(hit.position), note, GREEN if hit.true else None))
    return cells


def text_row(embedded: Embedded, pictures: Pictures, i: int, k: int) -> Row:
    """Caption `i` and the pictures that it finds."""
    rank, true = embedded.t2i[i], int(embedded.pairs.caption_image[i])
    verdict = f"true image: rank {rank:,.0f} of {len(pictures.embeddings):,}"
    hits = find(embedded.text_embeddings[i], pictures.embeddings, k, [true], rank)
    texts = [(embedded.pairs.captions[i], INK), (verdict, GREEN if rank <= k else RED)]
    return texts, cells_of(hits, pictures)


def image_row(embedded: Embedded, pictures: Pictures, i: int, k: int) -> Row:
    """Image `i` and the captions that it finds."""
    rank, captions = embedded.i2t[i], embedded.pairs.captions
    true = np.flatnonzero(embedded.pairs.caption_image == i).tolist()
    verdict = f"best own caption: rank {rank:,.0f} of {len(captions):,}"
    texts = [(verdict, GREEN if rank <= k else RED)]
    for hit in find(pictures.embeddings[i], embedded.text_embeddings, k, true, rank):
        mark, colour = ("✓", GREEN) if hit.true else ("–", INK)
        line = f"{hit.rank:,.0f}: {hit.score:.3f} {mark} {captions[hit.position]}"
        texts.append((line, colour))
    return texts, [Cell(pictures.picture(i))]


def clamped(flag: str, count: int, pool: int) -> int:
    if count > pool:
        warn(f"--{flag} {count}: there are {pool:,}, all are shown")
    return min(count, pool)


def draw_split(trained: Trained, options: Namespace) -> None:
    """Draws every figure of a split and of the run that made the checkpoint."""
    embedded, pictures = embed_split(trained, options)
    pairs, out, seed, footer = embedded.pairs, options.out, options.seed, pictures.footer
    history, pool = whole_history(trained), len(pairs.rows)
    first = "; the run of the first" if len(trained.members) > 1 else ""
    about = f"{origin(trained, options)}{first}"
    write(out / "curves.png", lambda path: draw_curves(history, path, about))
    if pairs.dataset.kind in FIGURES:
        FIGURES[pairs.dataset.kind](out, embedded, history, footer, evaluate)
    write(out / "similarity.png", draw_similarity, embedded, seed, footer)
    write(out / "tsne.png", draw_tsne, embedded, seed, footer)

    k = clamped("top-k", options.top_k, pool)
    images, captions = sample_pairs(pairs, clamped("queries", options.queries, pool), seed)
    title = f"Text to image: the first {k} of {pool:,} pictures, the true one framed"
    rows = [text_row(embedded, pictures, i, k) for i in captions]
    write(out / "grid_text_to_image.png", draw_grid, title, footer, rows)
    title = f"Image to text: the first {k} of {len(pairs.captions):,} captions, own ones marked ✓"
    rows = [image_row(embedded, pictures, i, k) for i in images]
    write(out / "grid_image_to_text.png", draw_grid, title, footer, rows, False)
    if options.occlusion:
        content = trained, embedded, pictures.picture, captions.tolist(), footer
        write(out / "grid_occlusion.png", draw_occlusion, *content)
    title = "Text to image: best cases (rank 1, widest margin), worst ones, the true image framed"
    best, worst = extreme_cases(embedded, 4)
    rows = [text_row(embedded, pictures, i, 2) for i in best]
    rows += [text_row(embedded, pictures, i, 1) for i in worst]
    write(out / "grid_best_worst.png", draw_grid, title, footer, rows)


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
        rows.append(([(query, INK)], cells_of(hits, pictures)))
        if options.images:
            print(query)
            for hit in hits:
                print(f"{hit.rank:,.0f} {hit.score:.3f} {pictures.names[hit.position]}")
    title = f"Text to image: the first {k} of {pool:,} pictures"
    write(options.out / name, draw_grid, title, pictures.footer, rows)


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
    if options.analysis:
        return draw_analysis(options.analysis, options.out)
    if options.images and not options.query:
        raise UserError('--images needs a text to search for, such as --query "a dog in snow"')
    if options.zero_shot and options.query:
        raise UserError("--zero-shot draws confusion.png only; leave --query out")
    if options.html and (options.zero_shot or options.query):
        raise UserError("--html shows a split; leave --zero-shot, --query and --images out")
    if options.templates and not options.zero_shot:
        raise UserError("--templates goes with --zero-shot")
    if options.zero_shot or options.images:
        unused = "a folder of its own is read"
        say_unused(parser.typed(argv), ("data", "splits", "split"), unused)
    trained = load_trained(options.checkpoint, options.device)
    options.out = options.out or trained.path.parent / "figures"
    output(str(options.out / "figure.png"))  # can it be written? before the work
    draw = draw_zero_shot if options.zero_shot else draw_search if options.query else draw_split
    (draw_page if options.html else draw)(trained, options)


if __name__ == "__main__":
    run(main)
