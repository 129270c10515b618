"""The numbers: embeds a split, ranks every image and caption, prints Recall@K with intervals.

train.py calls `evaluate_split` on dev after every epoch, visualize.py takes the embeddings and
ranks from here. `python evaluate.py [CHECKPOINT]` measures the test split, once, at the end.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from captions import Tokenizer, WordPieces
from cli import Parser, UserError, atomic_write, run, warn
from dataset import Dataset, Split, add_data_flags, load_dataset
from features import opened, views_of
from images import EXTENSIONS, decode_all
from loss import info_nce
from metrics import (
    KS,
    TIE,
    bootstrap_intervals,
    first_captions,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)
from models import CLIP, choose_device, keep_memory, load_checkpoint, model_from_checkpoint

# ------------------------------------------------------------------------------- embedding


@torch.inference_mode()
def embed_texts(model: CLIP, tokenizer: Tokenizer | WordPieces, texts: list[str]) -> np.ndarray:
    """Unit-length embeddings (len(texts), D), float32; batches of texts of like length."""
    device = model.device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    made = np.empty((len(texts), model.embed_dim), np.float32)
    for start in tqdm(range(0, len(order), 256), "texts", leave=False, disable=None):
        chosen = order[start : start + 256]
        tokens = tokenizer([texts[i] for i in chosen]).to(device)
        made[chosen] = model.encode_text(tokens).cpu().numpy()
    return made


@torch.inference_mode()
def embed_images(model: CLIP, pixels: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """Unit-length embeddings (len(rows), D), float32, of rows of uint8 `pixels` (N, S, S, 3)."""
    device = model.device
    parts = []
    for start in tqdm(range(0, len(rows), 100), "images", leave=False, disable=None):
        batch = torch.from_numpy(pixels[rows[start : start + 100]]).to(device)
        views = views_of(batch, 1 + model.mirror, size)
        parts.append(mean_embedding([model.encode_image(view) for view in views]))
    return np.concatenate(parts)


def mean_embedding(made: list[torch.Tensor]) -> np.ndarray:
    """The mean of some embeddings of the same pictures, unit length again."""
    if len(made) > 1:
        made = [torch.nn.functional.normalize(sum(made), dim=-1)]
    return made[0].cpu().numpy()


class Cached(NamedTuple):
    """A split's features, of features.py: the inputs of image block `start`, of the text head."""

    images: np.ndarray | None = None  # (images, views, ...)
    start: int = 0
    texts: np.ndarray | None = None


NOTHING = Cached()


@torch.inference_mode()
def embed_cached(model: CLIP, cached: Cached) -> np.ndarray:
    """Like `embed_images`, from a split's cached features."""
    parts = []
    for first in range(0, len(cached.images), 100):
        views = torch.from_numpy(cached.images[first : first + 100].copy()).to(model.device)
        made = [model.encode_image(opened(view), cached.start) for view in views.unbind(1)]
        parts.append(mean_embedding(made))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Embedded:
    """A split and its embeddings, the ranks made from them and the metrics of those."""

    split: Split
    image_embeddings: np.ndarray
    text_embeddings: np.ndarray
    i2t: np.ndarray
    t2i: np.ndarray
    metrics: dict[str, float]


def evaluate_split(
    model: CLIP,
    tokenizer: Tokenizer | WordPieces,
    dataset: Dataset,
    split: Split,
    image_size: int,
    cached: Cached = NOTHING,
) -> Embedded:
    """Embeds and ranks a split. Leaves the model in the mode in which it was."""
    was_training = model.training
    model.eval()
    if cached.start:
        images = embed_cached(model, cached)
    else:
        images = embed_images(model, dataset.pixels, split.images, image_size)
    if cached.texts is not None:
        with torch.inference_mode():
            parts = torch.from_numpy(cached.texts.copy()).to(model.device).split(1000)
            texts = torch.cat([model.encode_text(part) for part in parts]).cpu().numpy()
    else:
        texts = embed_texts(model, tokenizer, split.captions)
    model.train(was_training)
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


# ------------------------------------------------------------------- pictures of the user's own


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, hidden ones aside. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with pictures in it")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def embed_pictures(
    model: CLIP, paths: list[Path], transform: dict[str, Any], workers: int
) -> tuple[np.ndarray, list[Path]]:
    """Decodes and embeds picture files: (embeddings, the paths that could be read, in order).

    Unreadable ones are counted in a warning; raises UserError when none can be read.
    """
    decoded = decode_all(paths, transform["stored_size"], workers)
    bar = tqdm(decoded, "decoding", len(paths), unit="image", leave=False, disable=None)
    kept, pixels, failed = [], [], []
    for path, (picture, told) in zip(paths, bar, strict=True):
        if picture is None:
            failed.append(f"{path.name}: {told}")
        else:
            kept.append(path)
            pixels.append(picture)
    if failed:
        warn(f"{len(failed):,} of {len(paths):,} pictures cannot be read ({'; '.join(failed[:3])})")
    if not kept:
        raise UserError("not one of the pictures can be read")
    rows = np.arange(len(kept))
    return embed_images(model, np.stack(pixels), rows, transform["image_size"]), kept


# ------------------------------------------------------------------------------- zero-shot

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.", "there is a {} in the picture.")


@dataclass(frozen=True)
class ZeroShot:
    """`scores` (pictures, classes), `truth` (pictures,) and the classes' names."""

    scores: np.ndarray
    truth: np.ndarray
    classes: list[str]

    def metrics(self) -> dict[str, Any]:
        """Top-1 and top-5 accuracy in percent (ties lose), per class, and what chance gives."""
        own = self.scores[np.arange(len(self.truth)), self.truth]
        ranks = (~(self.scores < own[:, None] - TIE)).sum(1).astype(np.float64)
        ranks[~np.isfinite(own)] = np.inf
        per_class = {
            name: recall_at_k(ranks[self.truth == i], 1) for i, name in enumerate(self.classes)
        }
        return {
            "zero_shot_top1": recall_at_k(ranks, 1),
            "zero_shot_top5": recall_at_k(ranks, 5),
            "chance": 100 / len(self.classes),
            "pictures": len(ranks),
            "per_class": per_class,
        }


def class_embeddings(
    model: CLIP, tokenizer: Tokenizer | WordPieces, classes: list[str], templates: list[str]
) -> np.ndarray:
    """One unit-length embedding a class: the mean of its prompts', as in CLIP (section 3.1.4)."""
    prompts = [
        re.sub(r"\ba (?=[aeiou])", "an ", template.replace("{}", name))
        for name in classes
        for template in templates
    ]
    made = embed_texts(model, tokenizer, prompts).reshape(len(classes), len(templates), -1).mean(1)
    return made / np.linalg.norm(made, axis=1, keepdims=True).clip(1e-12)


def zero_shot(
    model: CLIP,
    tokenizer: Tokenizer | WordPieces,
    folder: Path,
    templates_file: Path | None,
    transform: dict[str, Any],
    workers: int,
) -> ZeroShot:
    """Classifies the pictures of a folder of class folders by the classes' names alone."""
    templates = read_templates(templates_file) if templates_file else list(TEMPLATES)
    if not find_pictures(folder):
        raise UserError(f"{folder} holds no picture; it needs a folder of pictures for each class")
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    found = {place: find_pictures(place) for place in inner}
    few = UserError(f"{folder} needs two class folders with readable pictures or more")
    if sum(map(bool, found.values())) < 2:
        raise few
    paths = [path for files in found.values() for path in files]
    images, kept = embed_pictures(model, paths, transform, workers)
    places = [place for place, files in found.items() if not set(kept).isdisjoint(files)]
    if empty := [place.name for place in inner if place not in places]:
        warn(f"class folders without a readable picture are left out: {', '.join(empty)}")
    if len(places) < 2:
        raise few
    classes = [re.sub(r"[_\-\s]+", " ", p.name).strip().lower() for p in places]
    if twice := {name for name in classes if classes.count(name) > 1}:
        raise UserError(f"{folder} has two class folders for {', '.join(sorted(twice))}; join them")
    for name in classes:
        if missing := tokenizer.unknown(name):
            warn(f"class {name!r}: {', '.join(missing)} never stood in the training captions")
    place_of = {path: i for i, place in enumerate(places) for path in found[place]}
    texts = class_embeddings(model, tokenizer, classes, templates)
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    return ZeroShot(scores, np.array([place_of[path] for path in kept]), classes)


def read_templates(path: Path) -> list[str]:
    """One prompt a line, with {} where the class's name goes. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the templates {path}: {error}") from error
    if not lines or any("{}" not in line for line in lines):
        raise UserError(f"{path}: every line needs {{}} where the class's name goes")
    return lines


# ------------------------------------------------------------------------------ the script


@dataclass(frozen=True)
class Loaded:
    """A trained model and what its checkpoint says of it."""

    path: Path
    content: dict[str, Any]
    model: CLIP
    tokenizer: Tokenizer | WordPieces

    @property
    def transform(self) -> dict[str, Any]:
        return self.content["transform"]


def load_trained(path: Path | None, device: str) -> Loaded:
    """Loads a checkpoint, by default the newest checkpoints/*/best.pt. Raises UserError."""
    if path is None:
        found = sorted(Path("checkpoints").glob("*/best.pt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError("no checkpoints/*/best.pt here; name a checkpoint, or run train.py")
        path = found[-1]
    content = load_checkpoint(path)
    model, tokenizer = model_from_checkpoint(content, path)
    return Loaded(path, content, model.to(choose_device(device)).eval(), tokenizer)


def load_data_for(
    trained: Loaded, data: str | None, splits: str | None, cache: Path, workers: int
) -> Dataset:
    """Loads the data named, or what the checkpoint was trained on."""
    config = trained.content["config"]
    try:
        return load_dataset(
            data or config["data"],
            splits or ("auto" if data else config["splits"]),
            trained.transform["stored_size"],
            cache,
            workers,
        )
    except UserError as error:
        hint = "" if data else " (the data that it was trained on; --data PATH names another place)"
        raise UserError(f"{error}{hint}") from error


def count_trained_on(trained: Loaded, dataset: Dataset, split: Split) -> int:
    """How many of a split's images the model was trained on, by name or by content."""
    known = trained.content["train_images"]
    names, digests = set(known["names"]), set(known["digests"])
    return sum(dataset.names[i] in names or dataset.digests[i] in digests for i in split.images)


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
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, help="default: the newest checkpoints/*/best.pt"
    )
    add_data_flags(parser, data=None, splits=None)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--split", choices=("test", "dev", "train"), default="test")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    group.add_argument(
        "--zero-shot", type=Path, metavar="FOLDER", help="classify a folder of class folders"
    )
    group.add_argument(
        "--templates", type=Path, metavar="FILE", help="prompts, one a line, {} for the class"
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
    print(f"wrote {path}")


def main(argv: list[str]) -> None:
    keep_memory()
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    group = parser.add_argument_group("what to write")
    group.add_argument("--json", type=Path, metavar="FILE", help="the figures and the protocol")
    group.add_argument(
        "--save-embeddings", type=Path, metavar="FILE.npz", help="plain arrays, without pickle"
    )
    options = parser.parse_args(argv)
    if options.templates and not options.zero_shot:
        raise UserError("--templates goes with --zero-shot")
    if options.save_embeddings and options.zero_shot:
        raise UserError("--save-embeddings goes with a split, not with --zero-shot")
    trained = load_trained(options.checkpoint, options.device)
    print(f"checkpoint {trained.path}, epoch {trained.content['epoch']}")
    if options.zero_shot:
        evaluate_zero_shot(trained, options.zero_shot, options.templates, options)
        return
    dataset = load_data_for(trained, options.data, options.splits, options.cache, options.workers)
    print(dataset.summary())
    split = dataset.split(options.split)
    if seen := count_trained_on(trained, dataset, split):
        warn(f"{seen:,} of the {len(split.images):,} images evaluated were trained on")
    size = trained.transform["image_size"]
    embedded = evaluate_split(trained.model, trained.tokenizer, dataset, split, size)
    if trained.tokenizer.cut:
        print(
            f"{trained.tokenizer.cut:,} captions were cut to {trained.tokenizer.max_tokens} tokens"
        )
    intervals = bootstrap_intervals(embedded.i2t, embedded.t2i, split.caption_image)
    protocol = {**protocol_of(dataset, split), "trained_on": seen, "checkpoint": str(trained.path)}
    print(protocol_line(protocol))
    print(metrics_table(embedded.metrics, intervals))
    if options.json:
        write_json(options.json, {**embedded.metrics, "intervals": intervals, "protocol": protocol})
    if options.save_embeddings:
        with atomic_write(options.save_embeddings) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                image_embeddings=embedded.image_embeddings,
                text_embeddings=embedded.text_embeddings,
                image_names=np.array([dataset.names[i] for i in split.images]),
                captions=np.array(split.captions),
                caption_image=split.caption_image,
            )
        print(f"wrote {options.save_embeddings}")


def evaluate_zero_shot(trained: Loaded, folder: Path, templates: Path | None, options: Any) -> None:
    """Prints zero-shot accuracies, and writes them to options.json where that is given."""
    result = zero_shot(
        trained.model, trained.tokenizer, folder, templates, trained.transform, options.workers
    )
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
