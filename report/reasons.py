"""A word on why a caption found its picture, or another: visualize.py sets it into a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from report.causes import ACCEPTED, Overlap
from report.groups import content, words_of

if TYPE_CHECKING:
    from evaluate import Embedded
    from support.ranking import Hit


def shared_words(overlap: Overlap, caption: int, image: int) -> tuple[list[str], int]:
    """Which telling words of a caption the captions of a picture hold, and how many it has."""
    said = words_of(overlap.pairs.captions[caption])
    words = {stems[0]: word for word in said if (stems := content(word))}  # a word a stem
    own = int(overlap.owner[caption] == image)
    return [w for stem, w in words.items() if overlap.of_image[image][stem] > own], len(words)


def reasons(embedded: Embedded, captions: list[int], found: list[list[Hit]]) -> list[str]:
    """For each caption, by the first two pictures that it found: a sentence or two."""
    overlap, texts = Overlap(embedded.pairs), []
    for caption, (first, *others) in zip(captions, found, strict=True):
        if first.true and not others:
            texts.append("the only picture")
            continue
        if first.true:
            rival, lead = "the next", f"ahead of the next by {first.score - others[0].score:.3f}; "
        else:
            true = next(hit for hit in others if hit.true)
            rival, lead = "the first", f"behind the first by {first.score - true.score:.3f}; "
        other = others[0].position if first.true else first.position
        shared, count = shared_words(overlap, caption, other)
        said = f": {', '.join(shared)}" if shared else ""
        near = "; a near miss" if overlap.share(caption, other) >= ACCEPTED else ""
        shares = f"{len(shared) or 'none'} of its {count} telling words"
        texts.append(f"{lead}{rival}'s captions have {shares}{said}{'' if first.true else near}")
    return texts
