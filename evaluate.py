"""The numbers: embeds a split, ranks every image and caption, prints Recall@K with intervals.

train.py calls `evaluate_split` on dev after every epoch, visualize.py takes the embeddings and
ranks from here. `python evaluate.py [CHECKPOINT]` measures the test split, once, at the end.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cli import Parser, UserError, atomic_write, run, warn
from dataset import Dataset, Split, add_data_flags, load_dataset
from embedding import NOTHING, Cached, embed_images, embed_texts
from features import image_features, reading_features
from generalisation import (
    GROUPS,
    distance_matrix,
    generalisation_table,
    generalise,
    masked_figures,
    mean_distances,
)
from loss import info_nce
from metrics import (
    KS,
    bootstrap_intervals,
    first_captions,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)
from models import (
    CLIP,
    Model,
    SideBySide,
    choose_device,
    keep_memory,
    load_checkpoint,
    model_from_checkpoint,
    side_by_side,
)
from ocr import hide_words, read_words
from zeroshot import zero_shot

# ------------------------------------------------------------------------- a whole split


class Embedded(NamedTuple):
    """A split and its embeddings, the ranks made from them and the metrics of those."""

    split: Split
    image_embeddings: np.ndarray
    text_embeddings: np.ndarray
    i2t: np.ndarray
    t2i: np.ndarray
    metrics: dict[str, float]


def evaluate_split(
    model: Model, dataset: Dataset, split: Split, cached: Cached = NOTHING
) -> Embedded:
    """Embeds and ranks a split. Leaves the model in the mode in which it was."""
    was_training = model.training
    model.eval()
    shown = (dataset.pixels, split.images)
    if cached.start:
        shown = (cached.images, np.arange(len(cached.images)))
    images = embed_images(model, *shown, cached.start, cached.readings)
    if cached.texts is not None:
        with torch.inference_mode():
            parts = torch.from_numpy(cached.texts.copy()).to(model.device).split(1000)
            texts = torch.cat([model.encode_text(part) for part in parts]).cpu().numpy()
    else:
        texts = embed_texts(model, split.captions)
    model.train(was_training)
    if cached.beside:
        images, texts = (
            side_by_side([before, torch.from_numpy(own)]).numpy()
            for before, own in zip(cached.beside, (images, texts), strict=True)
        )
    i2t, t2i = retrieval_ranks(images, texts, split.caption_image)
    metrics = retrieval_metrics(i2t, t2i)
    first = first_captions(split.caption_image)
    paired = retrieval_ranks(images, texts[first], np.arange(len(first)))
    for way, ranks in zip(("top1_i2t", "top1_t2i"), paired, strict=True):
        metrics[way] = recall_at_k(ranks, 1)
    return Embedded(split, images, texts, i2t, t2i, metrics)


def contrastive_loss(embedded: Embedded, scale: float, batch_size: int) -> float:
    """The loss of a split, first captions only, in batches of the size used in training."""
    images = torch.from_numpy(embedded.image_embeddings)
    texts = torch.from_numpy(embedded.text_embeddings[first_captions(embedded.split.caption_image)])
    parts = torch.arange(len(images)).tensor_split(-(-len(images) // batch_size))
    losses = [info_nce(images[part], texts[part], scale) * len(part) for part in parts]
    return float(sum(losses) / len(images))


# ------------------------------------------------------------------------------ the script


class Loaded(NamedTuple):
    """A trained model and what its checkpoint says of it."""

    path: Path
    content: dict[str, Any]
    model: Model

    @property
    def stage(self) -> str:
        """How far it has learned: its epoch, and of several image towers how many."""
        told = f"epoch {self.content['epoch']}"
        if isinstance(self.model, SideBySide):
            told += f", {self.model.trained} of {len(self.model.members)} image towers"
        return told


def load_trained(path: Path | None, device: str) -> Loaded:
    """Loads a checkpoint, by default the newest checkpoints/*/best.pt, and prints which.

    Raises UserError.
    """
    if path is None:
        found = sorted(Path("checkpoints").glob("*/best.pt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError("no checkpoints/*/best.pt here; name a checkpoint, or run train.py")
        path = found[-1]
    content = load_checkpoint(path)
    model = model_from_checkpoint(content, path)
    trained = Loaded(path, content, model.to(choose_device(device)).eval())
    print(f"checkpoint {path}, {trained.stage}")
    return trained


def load_data_for(trained: Loaded, options: Any) -> tuple[Dataset, Split]:
    """The data that the flags name, or what the checkpoint was trained on, and its --split.

    Prints what was loaded. Raises UserError.
    """
    config, data = trained.content["config"], options.data
    splits = options.splits or ("auto" if data else config["splits"])
    given = splits, trained.model.transform["stored_size"], options.cache, options.workers
    try:
        dataset = load_dataset(data or config["data"], *given, config["titles"])
    except UserError as error:
        hint = "" if data else " (the data that it was trained on; --data PATH names another place)"
        raise UserError(f"{error}{hint}") from error
    print(dataset.summary())
    return dataset, dataset.split(options.split)


def trained_on(trained: Loaded, dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """Which of some images the model was trained on, by name or by content."""
    seen = set().union(*trained.content["train_images"].values())
    return np.array([bool({dataset.names[i], dataset.digests[i]} & seen) for i in images])


def protocol_of(dataset: Dataset, split: Split) -> dict[str, Any]:
    """What a figure must be read with: pool sizes, the split and how ranks are counted."""
    per_image = np.bincount(split.caption_image)
    return {
        "data": dataset.path,
        "split": split.name,
        "splits": dataset.splits,
        "split_by_caption": dataset.by_caption,
        "images": len(split.images),
        "captions": len(split.captions),
        "captions_per_image": [int(per_image.min()), int(per_image.max())],
        "i2t": "rank of the best of the image's captions among all captions",
        "t2i": "rank of the caption's image among all images",
        "ties": "lost",
        "interval": "95%, bootstrap over images, 1000 resamples",
        "fingerprint": dataset.fingerprint,
    }


def protocol_line(protocol: dict[str, Any]) -> str:
    low, high = protocol["captions_per_image"]
    each = f"{low}" if low == high else f"{low} to {high}"
    line = (
        f"protocol: {protocol['images']:,} images x {each} captions = {protocol['captions']:,}, "
        f"{protocol['splits']} {protocol['split']} split; i2t counts the best of an image's "
        "captions; ties lose; percent; ranks from 1; 95% bootstrap intervals over images"
    )
    if protocol["split_by_caption"]:
        line += "; WARNING: the split is by caption, test images were trained on"
    return line


def metrics_table(metrics: dict[str, float], intervals: dict[str, list[float]]) -> str:
    """The figures as lines of text."""

    def cell(key: str) -> str:
        low, high = intervals[key]
        return f"{metrics[key]:5.1f} [{low:4.1f}, {high:4.1f}]"

    lines = [f"{'':6}" + "".join(f"{f'R@{k}':<20}" for k in KS) + f"{'medr':>8}{'meanr':>9}"]
    for way in ("i2t", "t2i"):
        cells = "".join(f"{cell(f'{way}_r{k}'):<20}" for k in KS)
        ranks = f"{metrics[f'{way}_medr']:8.1f}{metrics[f'{way}_meanr']:9.1f}"
        lines.append(f"{way:6}{cells}{ranks}")
    lines.append(
        f"rsum {cell('rsum')}, mean recall {cell('mean_recall')}; top-1 of N x N, one caption an "
        f"image: i2t {metrics['top1_i2t']:.1f}, t2i {metrics['top1_t2i']:.1f}"
    )
    return "\n".join(lines)


def add_model_flags(parser: Parser) -> None:
    """The flags that evaluate.py and visualize.py share."""
    told = "default: the newest checkpoints/*/best.pt"
    parser.add_argument("checkpoint", nargs="?", type=Path, help=told)
    add_data_flags(parser, data=None, splits=None)
    flag = parser.add_argument_group("what to measure").add_argument
    flag("--split", choices=("test", "dev", "train"), default="test")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flag("--zero-shot", type=Path, metavar="FOLDER", help="classify a folder of class folders")
    flag("--templates", type=Path, metavar="FILE", help="prompts, one a line, {} for the class")


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    print(f"wrote {path}")


def main(argv: list[str]) -> None:
    keep_memory()
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    flag = parser.add_argument_group("what to write").add_argument
    flag("--json", type=Path, metavar="FILE", help="the figures and the protocol")
    flag("--save-embeddings", type=Path, metavar="FILE.npz", help="plain arrays, without pickle")
    told = "D (N x N), float32: minus the cosine; rows are pictures by name, columns their texts"
    flag("--distance-matrix", type=Path, metavar="FILE.npy", help=told)
    options = parser.parse_args(argv)
    if options.templates and not options.zero_shot:
        raise UserError("--templates goes with --zero-shot")
    if (options.save_embeddings or options.distance_matrix) and options.zero_shot:
        raise UserError("--save-embeddings and --distance-matrix do not go with --zero-shot")
    trained = load_trained(options.checkpoint, options.device)
    if options.zero_shot:
        return evaluate_zero_shot(trained.model, options)
    dataset, split = load_data_for(trained, options)
    if seen := int(trained_on(trained, dataset, split.images).sum()):
        warn(f"{seen:,} of the {len(split.images):,} images evaluated were trained on")
    if dataset.films and options.split == "test":
        figures = evaluate_films(trained, dataset, options)
        if options.json:
            about = {**protocol_of(dataset, split), "trained_on": seen}
            told = "rank among the group's films, one introduction a film"
            about |= {"i2t": told, "t2i": told, "checkpoint": str(trained.path)}
            write_json(options.json, {**figures, "protocol": about})
        return
    cached = Cached(readings=readings_for(trained, dataset, split, options))
    embedded = evaluate_split(trained.model, dataset, split, cached)
    if (tokenizer := trained.model.tokenizer).cut:
        print(f"{tokenizer.cut:,} captions were cut to {tokenizer.max_tokens} tokens")
    intervals = bootstrap_intervals(embedded.i2t, embedded.t2i, split.caption_image)
    protocol = {**protocol_of(dataset, split), "trained_on": seen, "checkpoint": str(trained.path)}
    print(protocol_line(protocol))
    print(metrics_table(embedded.metrics, intervals))
    if options.distance_matrix:
        first = embedded.text_embeddings[first_captions(split.caption_image)]
        told_distances(distance_matrix(embedded.image_embeddings, first), options.distance_matrix)
    if options.json:
        write_json(options.json, {**embedded.metrics, "intervals": intervals, "protocol": protocol})
    if options.save_embeddings:
        save_embeddings(options.save_embeddings, embedded, dataset)


def save_embeddings(file: Path, made: Embedded, dataset: Dataset) -> None:
    """Writes plain arrays that np.load reads without pickle."""
    with atomic_write(file) as temporary, temporary.open("wb") as opened_file:
        np.savez(
            opened_file,
            image_embeddings=made.image_embeddings,
            text_embeddings=made.text_embeddings,
            image_names=np.array([dataset.names[i] for i in made.split.images]),
            captions=np.array(made.split.captions),
            caption_image=made.split.caption_image,
        )
    print(f"wrote {file}")


def all_films(trained: Loaded, dataset: Dataset) -> tuple[Split, np.ndarray]:
    """Every film of a split with its first introduction, and what it is to the model.

    "train": it was trained on; "test": a test film that was not; the rest are in neither group.
    """
    rows = np.flatnonzero(dataset.labels != "")
    rows = rows[first_captions(dataset.caption_image[rows])]
    captions = [dataset.captions[i] for i in rows]
    split = Split("whole", dataset.caption_image[rows], captions, np.arange(len(rows)))
    seen, test = trained_on(trained, dataset, split.images), dataset.labels[rows] == "test"
    return split, np.select([seen, test], ["train", "test"], "dev")


def readings_for(
    trained: Loaded, dataset: Dataset, split: Split, options: Any
) -> np.ndarray | None:
    """What is written on a split's pictures, for a model that was trained to read it."""
    if trained.model.poster_text is None:
        return None
    config = {**trained.content["config"], "precision": "fp32"}  # a part of the cache's key
    given = trained.model, dataset, config, options.cache, options.workers
    return reading_features(*given)[split.images]


def evaluate_films(trained: Loaded, dataset: Dataset, options: Any) -> dict[str, Any]:
    """The generalisation table over all films: its figures, and prints it.

    The features of a frozen image tower are kept: the next model on the same one is quick.
    """
    split, labels = all_films(trained, dataset)
    model = trained.model
    config = {**trained.content["config"], "precision": "fp32"}
    cached = Cached(readings=readings_for(trained, dataset, split, options))
    if isinstance(model, CLIP) and config["train_image"] == "0" and config["views"]:
        start, views = len(model.image_blocks), 1 + model.transform["mirror"]
        given = (split.images, {start: views}, config, options.cache, "film")
        kept = image_features(model, dataset, *given)[start]
        cached = cached._replace(images=kept, start=start)
    made = evaluate_split(model, dataset, split, cached)
    images, texts = made.image_embeddings, made.text_embeddings
    figures, held = generalise(images, texts, labels), np.flatnonzero(labels == "test")
    other = len(labels) - len(held) - int((labels == "train").sum())
    print(f"{other:,} films (dev, or test films that were trained on) are in neither group")
    if missing := [GROUPS[name] for name in GROUPS if name not in figures["groups"]]:
        warn(f"fewer than two {' and '.join(missing)}: no figure for them")
    if model.poster_text is not None and len(held) > 1:
        rows = split.images[held]
        paths, digests = [dataset.paths[i] for i in rows], [dataset.digests[i] for i in rows]
        read = read_words(paths, digests, options.cache, options.workers)
        pixels = dataset.pixels[rows]
        hidden = np.stack([hide_words(p, r) for p, r in zip(pixels, read, strict=True)])
        images = embed_images(model, hidden, np.arange(len(hidden)))
        figures |= masked_figures(images, texts[held])
    print(generalisation_table(figures))
    if options.save_embeddings:
        save_embeddings(options.save_embeddings, made, dataset)
    distances = distance_matrix(made.image_embeddings, texts)
    return figures | told_distances(distances, options.distance_matrix)


def told_distances(distances: np.ndarray, file: Path | None) -> dict[str, float]:
    """Prints the means of D, and writes it where a file is given."""
    own, rest = mean_distances(distances)
    print(
        f"D = -cosine, {len(distances):,} pairs: mean {own:.4f} on the diagonal, {rest:.4f} off it"
    )
    if file:
        with atomic_write(file) as temporary, temporary.open("wb") as opened_file:
            np.save(opened_file, distances)
        print(f"wrote {file}")
    return {"distance_diagonal": own, "distance_rest": rest}


def evaluate_zero_shot(model: Model, options: Any) -> None:
    """Prints zero-shot accuracies, and writes them to options.json where that is given."""
    result = zero_shot(model, options.zero_shot, options.templates, options.workers)
    metrics = result.metrics()
    for i, name in enumerate(result.classes):
        count = int((result.truth == i).sum())
        print(f"{name:24}{metrics['per_class'][name]:6.1f}%  of {count:,}")
    print(
        f"zero-shot on {metrics['pictures']:,} pictures of {len(result.classes)} classes: "
        f"top-1 {metrics['zero_shot_top1']:.1f}%, top-5 {metrics['zero_shot_top5']:.1f}%; "
        f"chance {metrics['chance']:.1f}% and {min(100, 5 * metrics['chance']):.1f}%"
    )
    if options.json:
        write_json(options.json, metrics)


if __name__ == "__main__":
    run(main)
