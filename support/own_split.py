"""The split that a run was trained with, found again by content wherever its data has moved.

evaluate.py, visualize.py and search.py take it, and say where the data is not the run's.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset import CaptionedImages, load_dataset
from support.command import UserError
from support.embedding import Trained


def load_run_data(trained: Trained, options: Namespace) -> CaptionedImages:
    """The data that the flags name, or what the (first) checkpoint was trained on.

    Without --splits the split is the run's own, wherever its images lie now. Prints what was
    loaded, and where it is not the run's. Raises UserError.
    """
    config, data = trained.options, options.data or trained.options.data
    splits = options.splits or ("auto" if options.data else config.splits)
    size = trained.members[0].transform["stored_size"]
    try:
        dataset = load_dataset(data, splits, size, options.cache, options.workers, config.titles)
    except UserError as error:
        if options.data or Path(data).exists():
            raise
        hint = "the data that it was trained on; --data PATH names another place"
        raise UserError(f"{error} ({hint})") from error
    if options.splits is None:
        dataset = as_in_run(dataset, trained.content)
    print(dataset.summary())
    if sentence := strangeness(dataset, trained):
        print(sentence)
    return dataset


def held_out(content: dict[str, Any]) -> dict[str, str]:
    """{sha256 of an image: its split} of a checkpoint's dev and test images."""
    kept = content.get("split_images", {})  # older checkpoints have none
    return {digest: split for split, images in kept.items() for digest in images["digests"]}


def is_of_run(dataset: CaptionedImages, content: dict[str, Any]) -> bool:
    """Whether it holds half of what the run held out, and not mainly other images."""
    held, count = held_out(content), len(np.unique(dataset.caption_image))
    found = held.keys() & {*dataset.digests}
    return bool(held) and 2 * len(found) >= len(held) and count <= 2 * content["images"]


def as_in_run(dataset: CaptionedImages, content: dict[str, Any]) -> CaptionedImages:
    """The same data in the run's own split, if it is the run's data; else as it is.

    An image that the run did not have is in no split.
    """
    same = dataset.fingerprint == content["fingerprint"]
    if same or content["split_by_caption"] or not is_of_run(dataset, content):
        return dataset
    parts = {"train": content["train_images"], **content["split_images"]}
    split_of: dict[Any, str] = {}  # by content, and by name and content where there are copies
    for split, images in parts.items():
        split_of |= dict.fromkeys(images["digests"], split)
    for split, images in parts.items():
        split_of |= dict.fromkeys(zip(images["names"], images["digests"], strict=True), split)
    labels = []
    for row, label in zip(dataset.caption_image, dataset.labels, strict=True):
        name, digest = dataset.names[row], dataset.digests[row]
        unknown = "train" if label == "train" else ""  # --limit leaves out training images
        labels.append(split_of.get((name, digest)) or split_of.get(digest) or unknown)
    if labels == dataset.labels.tolist():
        return dataset
    return replace(dataset, labels=np.array(labels), splits="the run's own", by_caption=False)


def strangeness(dataset: CaptionedImages, trained: Trained) -> str:
    """A sentence where the data is not, or not wholly, what the models were trained on, or ""."""
    for content in trained.contents:
        if dataset.fingerprint == content["fingerprint"]:
            continue
        prints = f"fingerprint {dataset.fingerprint}, the run's is {content['fingerprint']}"
        if not is_of_run(dataset, content):
            return f"this is other data than the run's ({prints})"
        held = held_out(content)
        missing = len(held.keys() - {*dataset.digests})
        lost = f"{missing:,} of its {len(held):,} dev and test images are missing"
        what = lost if missing else "captions, names, training images or splits differ"
        return f"this is the run's data, but not as it was: {what} ({prints})"
    return ""
