"""What a figure must be read with: what was measured, by which rules, and the most it can be.

evaluate.py prints the protocol above its table and writes it beside the figures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dataset import CaptionedImages, Pairs


def uses_of(pairs: Pairs) -> list[Counter[int]]:
    """For each text, but for capitals and blanks, how often which images have it."""
    uses = defaultdict(Counter)
    for text, image in zip(pairs.text_ids.tolist(), pairs.caption_image.tolist(), strict=True):
        uses[text][image] += 1
    return [*uses.values()]


def equal_captions(pairs: Pairs) -> int:
    """How many captions other images have as well, but for capitals and blanks."""
    return sum(images.total() for images in uses_of(pairs) if len(images) > 1)


def highest_r1(pairs: Pairs) -> dict[str, float]:
    """The highest R@1 in percent that any model could reach, as equal scores are lost.

    Equal texts have equal embeddings, and equal pictures: i2t needs a caption that no other image
    has, and one of equal pictures at most is first; t2i finds one image a text, none with a copy.
    """
    digests = [pairs.dataset.digests[row] for row in pairs.rows]
    copies = defaultdict(list)  # of a picture: its images
    for image, digest in enumerate(digests):
        copies[digest or image].append(image)
    alone = {images[0] for images in copies.values() if len(images) == 1}
    uses = uses_of(pairs)
    own = {image for images in uses if len(images) == 1 for image in images}
    i2t = sum(any(image in own for image in images) for images in copies.values())
    t2i = sum(max((n for x, n in images.items() if x in alone), default=0) for images in uses)
    return {"i2t": 100 * i2t / len(digests), "t2i": 100 * t2i / len(pairs.captions)}


def protocol_of(dataset: CaptionedImages, pairs: Pairs) -> dict[str, Any]:
    """Pool sizes, the split, how ranks are counted and what bounds them."""
    per_image = np.bincount(pairs.caption_image)
    return {
        "data": dataset.path,
        "split": pairs.name,
        "splits": dataset.splits,
        "split_by_caption": dataset.by_caption,
        "images": len(pairs.rows),
        "captions": len(pairs),
        "captions_per_image": [int(per_image.min()), int(per_image.max())],
        "i2t": "rank of the best of the image's captions among all captions",
        "t2i": "rank of the caption's image among all images",
        "ties": "lost",
        "equal_captions": equal_captions(pairs),
        "highest_r1": highest_r1(pairs),
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
    highest = protocol["highest_r1"]
    if min(highest.values()) < 100:
        line += (
            f"; {protocol['equal_captions']:,} captions stand under several images, and equal "
            f"texts or pictures tie: the highest possible R@1 is i2t {highest['i2t']:.1f}, "
            f"t2i {highest['t2i']:.1f}"
        )
    if protocol["split_by_caption"]:
        line += "; WARNING: the split is by caption, test images were trained on"
    return line
