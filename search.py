"""Search: which pictures of a folder, or of a data set, show what a text says or a picture shows.

`python search.py --images DIR --query "a dog in snow"` prints them, best first; without --query a
page on this machine shows them as one types (support/page.py). Embeddings are kept in --cache.
"""

from __future__ import annotations

import support.python  # noqa: F401  refuses a Python that is too old, before all else

# isort: split

import contextlib
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import CaptionedImages, add_data_flags, load_dataset
from models import CLIP
from sources.layouts import read_folder
from sources.opening import open_picture
from support import index
from support.command import Parser, UserError, later, number, run, say_unused, warn
from support.device import keep_memory
from support.embedding import Trained, load_trained, trained_on
from support.finder import Finder, Shelf, terms_of
from support.own_split import load_run_data
from support.remarks import check_queries
from support.stopping import NAMES
from support.zeroshot import find_pictures

SAMPLE = 500  # unrelated captions, by whose best scores a query's best is judged
LOOSE = 5_000  # so many training captions are offered to pictures that have none of their own
SPLITS = ("all", "test", "dev", "train")


def training_captions(trained: Trained, options: Namespace) -> list[str]:
    """What the model was trained on, each caption once; made from its vocabulary without the data.

    Reads the captions alone, no picture.
    """
    data = trained.options.data
    names = {name for content in trained.contents for name in content["train_images"]["names"]}
    try:
        if data == "shapes":
            dataset = load_dataset(data, cache=options.cache)
            rows = zip(
                (dataset.names[i] for i in dataset.caption_image), dataset.captions, strict=True
            )
        else:
            rows = [(row.image, row.caption) for row in read_folder(Path(data)).rows]
        if captions := [*dict.fromkeys(text for name, text in rows if name in names and text)]:
            return captions
    except (UserError, OSError):
        pass
    words = [word for word in trained.members[0].tokenizer.vocabulary if word.isalpha()]
    pairs = np.random.default_rng(0).choice(sorted(words) or ["picture"], (SAMPLE, 2))
    return [f"a {one} and a {other}" for one, other in pairs]


def drawn(texts: list[str], most: int) -> list[str]:
    """At most `most` of them, by a fixed seed."""
    chosen = np.random.default_rng(0).permutation(len(texts))[:most]
    return [texts[i] for i in np.sort(chosen)]


def folder_shelf(models: dict[str, CLIP], captions: list[str], options: Namespace) -> Shelf:
    """The pictures of the folder --images; captions of other pictures. Raises UserError."""
    folder = options.images.resolve()
    if not (paths := find_pictures(folder)):
        raise UserError(f"--images {options.images} holds no picture")
    images = index.folder_embeddings(models, folder, paths, options)
    read = np.all([np.isfinite(part).all(1) for part in images.values()], axis=0)
    if failed := [path.name for path, fine in zip(paths, read, strict=True) if not fine]:
        names = ", ".join(failed[:3])
        warn(f"{len(failed):,} of {len(paths):,} pictures cannot be read ({names})")
    if not read.any():
        raise UserError(f"not one of the pictures in --images {options.images} can be read")
    paths = [path for path, fine in zip(paths, read, strict=True) if fine]
    images = {name: part[read] for name, part in images.items()}
    title, owner = f"{len(paths):,} pictures of {folder}", np.full(len(captions), -1)
    names = [str(path) for path in paths]
    return Shelf(
        title, names, lambda i, size: open_picture(paths[i], size), images, captions, owner, {}
    )


def dataset_shelf(
    models: dict[str, CLIP], dataset: CaptionedImages, trained: Trained, options: Namespace
) -> Shelf:
    """The pictures of a split of a data set, or of all of it, with their captions. UserError."""
    chosen = (dataset.labels == options.split) | (options.split == "all")
    if not chosen.any():
        raise UserError(f"{dataset.path} has no {options.split} images; see --splits")
    rows, owner = np.unique(dataset.caption_image[chosen], return_inverse=True)
    if seen := int(trained_on(trained, dataset, rows).sum()):
        warn(f"{seen:,} of these {len(rows):,} images were trained on: scores flatter")
    images = index.dataset_embeddings(models, dataset, rows, options)
    title = f"{len(rows):,} pictures of {dataset.path}"
    names = [f"{dataset.path}/{dataset.names[i]}" for i in rows]
    if dataset.paths:
        names = [str(dataset.paths[i].resolve()) for i in rows]
    captions = [dataset.captions[i] for i in np.flatnonzero(chosen)]

    def picture(i: int, size: int) -> Image.Image:
        return (
            open_picture(dataset.paths[rows[i]], size)
            if dataset.paths
            else dataset.picture(rows[i])
        )

    return Shelf(title, names, picture, images, captions, owner, {})


def build_finders(trained: list[Trained], options: Namespace) -> tuple[Shelf, list[Finder]]:
    """The shelf, and the checkpoints side by side, then (for the page) each alone. UserError."""
    together = Trained(
        trained[0].path,
        [content for one in trained for content in one.contents],
        [model for one in trained for model in one.members],
    )
    if together.options.poster_text:
        warn("this model reads the words on pictures of its data; here they are not read")
    digests = {
        id(model): index.model_digest(model, content["config"])
        for model, content in zip(together.members, together.contents, strict=True)
    }
    models = {digests[id(model)]: model for model in together.members}
    unrelated = training_captions(together, options)
    if options.images:
        shelf = folder_shelf(models, drawn(unrelated, LOOSE), options)
    else:
        shelf = dataset_shelf(models, load_run_data(together, options), together, options)
    if not options.query:  # the page shows captions too
        of_what = "loose" if options.images else f"{index.digest(shelf.title)[:12]}"
        texts = index.text_embeddings(models, shelf.captions, f"captions-{of_what}", options)
        shelf = shelf._replace(texts=texts)
    alone = trained if len(trained) > 1 and not options.query else []
    names = [name_of(one) for one in trained]
    names = [" and ".join(names), *names] if len(names) > 1 else names
    sample = drawn(unrelated, SAMPLE)
    texts = index.text_embeddings(models, sample, "usual", options)
    own = dict(zip(shelf.captions, shelf.owner.tolist(), strict=True))
    owner = np.array([own.get(text, -1) for text in sample])
    finders = []
    for name, choice in zip(names, [together, *alone], strict=False):
        members = [digests[id(model)] for model in choice.members]
        finder = Finder(name, choice, members, shelf)
        finder.measure_usual([texts[member] for member in members], owner)
        finders.append(finder)
    return shelf, finders


def name_of(trained: Trained) -> str:
    path = trained.path.resolve()
    return f"{path.parent.name}/{path.name}"


def print_found(shelf: Shelf, finder: Finder, options: Namespace) -> None:
    """Prints what each --query finds, a result a line; whatever else there is to say to stderr.

    Raises UserError for a query that cannot be understood.
    """
    if options.top_k > len(shelf.names):
        warn(f"--top-k {options.top_k}: there are {len(shelf.names):,}, all are shown")
    queries = [terms_of(query, files=True) for query in options.query]
    texts = [term.text for terms in queries for term in terms if not term.file]
    check_queries(texts, finder.trained)
    for query, terms in zip(options.query, queries, strict=True):
        found = finder.find(finder.embed(terms), options.top_k)
        if len(queries) > 1:
            sys.stdout.flush()
            print(f"--query {plain(query)}", file=sys.stderr, flush=True)
        for position, score in found:
            name = shelf.names[position]
            print(name if options.paths else f"{score:.3f} {plain(name)}")
        if doubt := finder.doubt(terms, found[0][1]):
            sys.stdout.flush()
            warn(doubt)


def plain(text: str) -> str:
    """A name without what would steer a terminal."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else "\ufffd" for c in text)


def main(argv: list[str]) -> None:
    keep_memory()
    parser = Parser(prog="search.py", description=__doc__.split("\n")[0])
    text = "one, or several side by side (default: the newest checkpoints/*/best.pt)"
    parser.add_argument("checkpoint", nargs="*", default=[], type=Path, help=text)
    add_data_flags(parser, data=None, splits=None)
    flag = parser.add_argument_group("what to search").add_argument
    flag("--images", type=Path, metavar="DIR", help="this folder of pictures, not a data set")
    flag("--split", choices=SPLITS, default="all", help="of the data set")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flag = parser.add_argument_group("in the terminal").add_argument
    text = "a text, a picture's path, or several joined by + and -; repeatable"
    flag("--query", action="append", default=[], metavar="TEXT", help=text)
    flag("--top-k", type=number(int, 1, 10**7), default=10, help="results of each query")
    flag("--paths", action="store_true", help="print nothing but paths, for pipes")
    flag = parser.add_argument_group("as a page, without --query").add_argument
    flag("--port", type=number(int, 0, 65535), default=8017, help="on 127.0.0.1; 0: any free one")
    options = parser.parse_args(argv)
    if options.images and (options.data or options.splits or options.split != "all"):
        raise UserError("--images takes the place of --data, --splits and --split; leave one out")
    if options.paths and not options.query:
        raise UserError('--paths needs a --query, such as --query "a dog in snow"')
    if options.query:
        say_unused(parser.typed(argv), ["port"], "the terminal answers")
    else:
        say_unused(parser.typed(argv), ["top_k"], "a page answers")
        later("support.page", "require_flask")()
    results = sys.stdout
    if hasattr(results, "reconfigure"):  # a file's name can be any bytes
        results.reconfigure(errors=NAMES)
    with contextlib.redirect_stdout(sys.stderr if options.query else results):
        paths = [[path] for path in options.checkpoint] or [[]]
        trained = [load_trained(path, options.device) for path in paths]
        shelf, finders = build_finders(trained, options)
    if options.query:
        print_found(shelf, finders[0], options)
    else:
        later("support.page", "serve")(shelf, finders, options.port)


if __name__ == "__main__":
    run(main)
