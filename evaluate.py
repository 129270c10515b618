"""The numbers: embeds a split, ranks every image and caption, prints Recall@K with intervals.

train.py calls `evaluate_split` on dev after every epoch, visualize.py takes embeddings and ranks
from here. `python evaluate.py [CHECKPOINT ...]` measures the test split, once, at the end.
"""

from __future__ import annotations

import support.python  # noqa: F401  refuses a Python that is too old, before all else

# isort: split
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset import CaptionedImages, Pairs, add_data_flags
from loss import info_nce
from models import CLIP
from support.command import Parser, UserError, later, output, output_folder, run, say_unused, warn
from support.device import keep_memory
from support.embedding import Trained, embed_pairs, load_trained, side_by_side, trained_on
from support.ranking import TIE, count_below, exact_scores, first_captions, lengths_of
from support.remarks import unread

# ------------------------------------------------------------------------- ranks and recalls

KS = (1, 5, 10)


def retrieval_ranks(
    image_embeddings: np.ndarray, text_embeddings: np.ndarray, caption_image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1 in both directions: i2t (images,) and t2i (captions,), as floats.

    image_embeddings (N, D), text_embeddings (M, D), caption_image (M,): the image of each caption.
    i2t: the rank among all M captions of the image's best own one (the other own ones are not
    counted against it). t2i: the rank of the caption's image among all N. A tie counts as lost. A
    query whose own score is not finite gets infinity; another's counts as better. The scores are
    computed in blocks, never all at once. Raises ValueError when an image has no caption.
    """
    images, texts = finite_or_nan(image_embeddings), finite_or_nan(text_embeddings)
    owner = np.asarray(caption_image, np.int64)
    count, pool = len(images), len(texts)
    if (np.bincount(owner, minlength=count) == 0).any():
        raise ValueError("an image has no caption")
    true = exact_scores(images, texts, owner, np.arange(pool))  # of each caption with its image
    best = np.full(count, -math.inf)
    np.fmax.at(best, owner, true)  # passes NaN over
    best[best == -math.inf] = math.nan
    tie = TIE * (lengths_of(images)[owner] * lengths_of(texts))
    as_good = np.bincount(owner, ~(true + tie < best[owner]), count)
    worse_captions, worse_images = count_below(images, texts, best, true)
    i2t = np.where(np.isnan(best), math.inf, 1 + pool - worse_captions - as_good)
    t2i = np.where(np.isnan(true), math.inf, count - worse_images)  # the own one ties: from 1
    return i2t, t2i


def finite_or_nan(embeddings: np.ndarray) -> np.ndarray:
    """An embedding with one number that is not finite becomes NaN all over: it never matches."""
    embeddings = np.asarray(embeddings)
    finite = np.isfinite(embeddings).all(1)
    return embeddings if finite.all() else np.where(finite[:, None], embeddings, math.nan)


def recall_at_k(ranks: np.ndarray, k: int) -> float:
    """The share of queries, in percent, whose rank is at most k."""
    return float((np.asarray(ranks) <= k).mean() * 100)


def retrieval_metrics(i2t: np.ndarray, t2i: np.ndarray) -> dict[str, float]:
    """R@1/5/10 in percent, median and mean rank in both directions, their sum and mean.

    A miss for want of a finite score counts as the last rank of its pool in medr and meanr.
    """
    metrics: dict[str, float] = {}
    for way, ranks, pool in (("i2t", i2t, len(t2i)), ("t2i", t2i, len(i2t))):
        metrics |= {f"{way}_r{k}": recall_at_k(ranks, k) for k in KS}
        bounded = np.minimum(ranks, pool)
        metrics[f"{way}_medr"] = float(np.median(bounded))
        metrics[f"{way}_meanr"] = float(bounded.mean())
    metrics["rsum"] = sum(metrics[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in KS)
    metrics["mean_recall"] = metrics["rsum"] / 6
    return metrics


def bootstrap_intervals(
    i2t: np.ndarray, t2i: np.ndarray, caption_image: np.ndarray, resamples: int = 1000
) -> dict[str, list[float]]:
    """95% percentile intervals of the recalls, images (with their captions) drawn anew.

    Only the queries are resampled; the pool that they search stays whole. Seeded.
    """
    generator, count = np.random.default_rng(0), len(i2t)
    captions = np.bincount(caption_image, minlength=count)
    found = [np.bincount(caption_image, t2i <= k, minlength=count) for k in KS]
    hits = np.stack([i2t <= k for k in KS] + found, axis=1).astype(np.float64)
    sizes = np.stack([np.ones(count)] * 3 + [captions] * 3, axis=1)
    draws = np.empty((resamples, 6))
    for row in range(resamples):
        weight = np.bincount(generator.integers(count, size=count), minlength=count)
        draws[row] = weight @ hits / (weight @ sizes) * 100
    columns = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in KS]
    values = dict(zip(columns, draws.T, strict=True))
    values |= {"rsum": draws.sum(1), "mean_recall": draws.mean(1)}
    return {key: np.percentile(drawn, [2.5, 97.5]).tolist() for key, drawn in values.items()}


# --------------------------------------------------------------------------- a whole split


class Embedded(NamedTuple):
    """Pairs and their embeddings, the ranks that follow from them and the metrics of those."""

    pairs: Pairs
    image_embeddings: np.ndarray
    text_embeddings: np.ndarray
    i2t: np.ndarray
    t2i: np.ndarray
    metrics: dict[str, float]


def ranked(pairs: Pairs, images: np.ndarray, texts: np.ndarray) -> Embedded:
    """Ranks and metrics of embeddings (images, D) and (captions, D)."""
    i2t, t2i = retrieval_ranks(images, texts, pairs.caption_image)
    metrics = retrieval_metrics(i2t, t2i)
    first = first_captions(pairs.caption_image)
    paired = retrieval_ranks(images, texts[first], np.arange(len(first)))
    for way, ranks in zip(("top1_i2t", "top1_t2i"), paired, strict=True):
        metrics[way] = recall_at_k(ranks, 1)
    return Embedded(pairs, images, texts, i2t, t2i, metrics)


def evaluate_split(model: CLIP, pairs: Pairs) -> Embedded:
    """Embeds and ranks a split."""
    images, texts = embed_pairs(model, pairs)
    return ranked(pairs, images, texts)


def contrastive_loss(embedded: Embedded, scale: float, batch_size: int) -> float:
    """The loss of a split, first captions only, in batches of the size used in training."""
    first = first_captions(embedded.pairs.caption_image)
    images = torch.from_numpy(embedded.image_embeddings)
    texts = torch.from_numpy(embedded.text_embeddings[first])
    ids = torch.from_numpy(embedded.pairs.text_ids[first])
    parts = torch.arange(len(images)).tensor_split(-(-len(images) // batch_size))
    losses = [
        info_nce(images[part], texts[part], scale, text_ids=ids[part]) * len(part) for part in parts
    ]
    return float(sum(losses) / len(images))


# ------------------------------------------------------------------------------ the script

LOAD_RUN_DATA = later("support.own_split", "load_run_data")
# What else is reported of a kind of data, and the features (kept, with words) it is measured on.
REPORTS = {"posters": later("posters.report", "evaluate_films")}
FEATURES = later("posters.words", "features_for_evaluation")
# report/ stands above this file: what was predicted, and what that says of the model.
PREDICTIONS = later("report.predictions", "write_predictions")
ANALYSIS = later("report.analysis", "analyse")


def load_data_for(trained: Trained, options: Namespace) -> tuple[CaptionedImages, Pairs]:
    """The data that the flags name, or what the checkpoint was trained on, and its --split."""
    dataset = LOAD_RUN_DATA(trained, options)
    return dataset, dataset.pairs(options.split, trained.members[0].tokenizer)


def evaluate_trained(
    trained: Trained, dataset: CaptionedImages, split: str, options: Namespace
) -> Embedded:
    """Embeds and ranks a split of the data, each member at its own picture size."""
    parts = []
    for model, content in zip(trained.members, trained.contents, strict=True):
        resized = dataset.at_size(model.transform["stored_size"], options.cache, options.workers)
        learner, pairs = model, resized.pairs(split, model.tokenizer)
        if content["config"]["poster_text"] or dataset.kind in REPORTS:
            of_run = Namespace(**{**content["config"], **vars(options)})
            learner, pairs = FEATURES(model, pairs, of_run)
        parts.append(embed_pairs(learner, pairs))
    images, texts = zip(*parts, strict=True)
    return ranked(pairs, side_by_side(images), side_by_side(texts))


def metrics_table(metrics: dict[str, float], intervals: dict[str, list[float]]) -> str:
    """The figures as lines of text."""

    def cell(key: str) -> str:
        low, high = intervals[key]
        return f"{metrics[key]:5.1f} [{low:4.1f}, {high:4.1f}]"

    rows = {way: [cell(f"{way}_r{k}") for k in KS] for way in ("i2t", "t2i")}
    wide = max(len(text) for cells in rows.values() for text in cells) + 2  # blanks, whatever
    lines = [f"{'':5}" + "".join(f"{f'R@{k}':<{wide}}" for k in KS) + f"{'medr':>6}{'meanr':>8}"]
    for way, cells in rows.items():
        ranks = f"{metrics[f'{way}_medr']:6.1f}{metrics[f'{way}_meanr']:8.1f}"
        lines.append(f"{way:5}" + "".join(f"{text:<{wide}}" for text in cells) + ranks)
    lines.append(
        f"rsum {cell('rsum')}, mean recall {cell('mean_recall')}; top-1 of N x N, one caption an "
        f"image: i2t {metrics['top1_i2t']:.1f}, t2i {metrics['top1_t2i']:.1f}"
    )
    return "\n".join(lines)


def add_model_flags(parser: Parser) -> None:
    """The flags that evaluate.py and visualize.py share."""
    text = "one, or several side by side (default: the newest checkpoints/*/best.pt)"
    parser.add_argument("checkpoint", nargs="*", default=[], type=Path, help=text)
    add_data_flags(parser, data=None, splits=None)
    flag = parser.add_argument_group("what to measure").add_argument
    flag("--split", choices=("test", "dev", "train"), default="test")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flag("--zero-shot", type=Path, metavar="FOLDER", help="classify a folder of class folders")
    flag("--templates", type=Path, metavar="FILE", help="prompts, one a line, {} for the class")


def measure(trained: Trained, options: Namespace) -> dict[str, Any]:
    """Measures a split of the data, prints it, and returns its figures with their protocol."""
    from support.protocol import protocol_line, protocol_of

    dataset, pairs = load_data_for(trained, options)
    if seen := int(trained_on(trained, dataset, pairs.rows).sum()):
        warn(f"{seen:,} of the {len(pairs.rows):,} images evaluated were trained on")
    for remark in unread(trained.tokenizers, pairs.captions, "captions"):
        warn(remark)
    protocol = {
        **protocol_of(dataset, pairs),
        "trained_on": seen,
        "checkpoint": " ".join(map(str, options.checkpoint or [trained.path])),
    }
    if dataset.kind in REPORTS and options.split == "test":
        if options.predictions or options.analysis:
            raise UserError("--predictions and --analysis go with --split dev or train of films")
        figures = REPORTS[dataset.kind](trained, dataset, options, sys.modules[__name__])
        ranks = "rank among the group's films, one introduction a film"
        return {**figures, "protocol": {**protocol, "i2t": ranks, "t2i": ranks}}
    embedded = evaluate_trained(trained, dataset, options.split, options)
    intervals = bootstrap_intervals(embedded.i2t, embedded.t2i, pairs.caption_image)
    print(protocol_line(protocol))
    print(metrics_table(embedded.metrics, intervals))
    if options.distance_matrix:
        first = embedded.text_embeddings[first_captions(pairs.caption_image)]
        distances = -(embedded.image_embeddings @ first.T)
        later("posters.report", "report_distances")(distances, options.distance_matrix)
    if options.save_embeddings:
        later("support.results", "save_embeddings")(options.save_embeddings, embedded, dataset)
    if options.predictions:
        PREDICTIONS(options.predictions, embedded)
    if options.analysis:
        ANALYSIS(options.analysis, embedded, trained, protocol)
    return {**embedded.metrics, "intervals": intervals, "protocol": protocol}


def main(argv: list[str]) -> None:
    keep_memory()
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    flag = parser.add_argument_group("what to write").add_argument
    flag("--json", type=output, metavar="FILE", help="the figures and the protocol")
    flag("--save-embeddings", type=output, metavar="FILE.npz", help="plain arrays, without pickle")
    text = "what each caption and image finds (columns: report/predictions.py)"
    flag("--predictions", type=output, metavar="FILE.csv", help=text)
    text = "what it is good and bad at: CSVs, a table"
    flag("--analysis", type=output_folder, metavar="DIR", help=text)
    text = "D (N x N), float32: minus the cosine; rows are pictures by name, columns their texts"
    flag("--distance-matrix", type=output, metavar="FILE.npy", help=text)
    options = parser.parse_args(argv)
    if options.templates and not options.zero_shot:
        raise UserError("--templates goes with --zero-shot")
    of_pairs = ("save_embeddings", "distance_matrix", "predictions", "analysis")
    if options.zero_shot and any(getattr(options, name) for name in of_pairs):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in of_pairs)
        raise UserError(f"{flags} do not go with --zero-shot")
    trained = load_trained(options.checkpoint, options.device)
    if options.zero_shot:
        say_unused(parser.typed(argv), ("data", "splits", "split"), "--zero-shot reads a folder")
        figures = later("support.zeroshot", "evaluate_zero_shot")(trained, options)
    else:
        figures = measure(trained, options)
    if options.json:
        later("support.results", "write_json")(options.json, figures)


if __name__ == "__main__":
    run(main)
