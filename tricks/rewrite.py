"""--text-augment: words of training captions replaced, deleted and swapped. Bought nothing that can
be told from chance (+0.3 in mean recall beside a bag of words); the assignment names the idea.

train.py hands in its pairs and gets some whose captions change in every epoch.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

from dataset import Captions, Tokenizer
from support.command import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from dataset import Pairs
    from models import CLIP


def rewrite_captions(
    model: CLIP, pairs: dict[str, Pairs], options: Namespace
) -> tuple[CLIP, dict[str, Pairs]]:
    """Training pairs whose captions are changed anew in every epoch."""
    split = pairs["train"]
    rates = parse_rates(options.text_augment)
    rewriter = Rewriter(split.captions, split.caption_image, rates)
    texts = Rewritten(split.captions, split.tokenizer, rewriter, options.seed)
    return model, {**pairs, "train": split.with_sides(split.images, texts)}


class Rewritten(Captions):
    """The text side of pairs, each caption in another wording."""

    def __init__(self, captions: list[str], tokenizer: Tokenizer, rewriter: Rewriter, seed: int):
        super().__init__(captions, tokenizer)
        self.rewriter, self.seed = rewriter, seed

    def fetch(self, captions: np.ndarray, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch, int(captions[0])])
        return self.tokenizer([self.rewriter(self.captions[i], random) for i in captions]).numpy()


def parse_rates(text: str) -> dict[str, float]:
    """`synonym=0.1,delete=0.1` -> the rate of each kind of change. Raises UserError."""
    rates = dict.fromkeys(("synonym", "delete", "swap"), 0.0)
    for part in filter(None, text.replace("none", "").split(",")):
        kind, _, number = part.partition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = -1.0
        if kind.strip() not in rates or not 0 <= rate <= 1:
            raise UserError(
                f"--text-augment: {part!r} is none of synonym=R, delete=R, swap=R; R from 0 to 1"
            )
        rates[kind.strip()] = rate
    return rates


class Rewriter:
    """Replaces, deletes and swaps words of captions, so that they still read as English.

    What it knows is mined from the training captions: a word's synonyms (`mine_synonyms`), and
    which two words stand side by side. A change is made only where each new pair of neighbours
    stands `LEAST` times or more in them.
    """

    LEAST = 4

    def __init__(self, captions: list[str], caption_image: np.ndarray, rates: dict[str, float]):
        self.rates = rates
        texts = [self.bounded(caption) for caption in captions]
        self.pairs = Counter(pair for words in texts for pair in pairwise(words))
        self.synonyms = mine_synonyms(texts, caption_image) if rates["synonym"] else {}

    @staticmethod
    def bounded(caption: str) -> list[str]:
        return ["<bos>", *Tokenizer.words(caption), "<eos>"]

    def __call__(self, caption: str, random: np.random.Generator) -> str:
        """Another caption: each word is changed with the given rates, where English allows it."""
        words = self.bounded(caption)
        place = 1
        while place < len(words) - 1:
            before, word, after = words[place - 1 : place + 2]
            turn, options = random.random(3), self.synonyms.get(word, ())
            if turn[0] < self.rates["synonym"] and options:
                other = options[random.integers(len(options))]
                if self.reads(before, other, after):
                    words[place] = other
            elif turn[1] < self.rates["delete"] and self.reads(before, after):
                del words[place]
                continue
            elif (
                turn[2] < self.rates["swap"]
                and place < len(words) - 2
                and self.reads(before, after, word, words[place + 2])
            ):
                words[place : place + 2] = after, word
            place += 1
        return " ".join(words[1:-1])

    def reads(self, *words: str) -> bool:
        return all(self.pairs[pair] >= self.LEAST for pair in pairwise(words))


def mine_synonyms(
    texts: list[list[str]], caption_image: np.ndarray, least: int = 15
) -> dict[str, list[str]]:
    """Words that writers of captions use for the same thing: {word: its synonyms}.

    b is a synonym of a where b stands in other captions of a's image more often than chance would
    have it (`LIFT`), seldom in a's own caption (as `black and white` do), and between like
    neighbours (cosine of the counts of their neighbours, weighted by PPMI, at least `ALIKE`).
    """
    LIFT, SAME, ALIKE = 4.0, 0.25, 0.25
    counts = Counter(word for words in texts for word in words)
    known = [w for w, n in counts.items() if n >= least and w.isalpha() and len(w) > 2]
    number = {word: i for i, word in enumerate(known)}
    size = len(known)
    held, ends, beside = [], [0], np.zeros((size, 2 * size), np.float32)
    for words in texts:
        ids = [number.get(word, -1) for word in words]
        for left, right in pairwise(ids):
            if left >= 0 and right >= 0:
                beside[right, left] += 1
                beside[left, size + right] += 1
        held += {*ids} - {-1}
        ends.append(len(held))
    count, images = len(texts), int(caption_image.max()) + 1
    stands = csr_array((np.ones(len(held), np.float32), held, ends), (count, size))
    owner = csr_array((np.ones(count, np.float32), (caption_image, range(count))), (images, count))
    pooled = owner @ stands  # how many of an image's captions hold a word
    together = (stands.T @ stands).toarray()  # in one caption
    apart = (pooled.T @ pooled).toarray() - together  # in two captions of one image
    often = np.outer(stands.sum(0), stands.sum(0))
    per_image = count / images - 1
    lift = apart * count / (often * max(per_image, 1e-9))
    chance = beside.sum(1, keepdims=True) * beside.sum(0) / max(beside.sum(), 1)
    weight = np.log(np.maximum(beside, 1e-9) / np.maximum(chance, 1e-9)).clip(0)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True).clip(1e-9)
    good = (lift >= LIFT) & (together * per_image <= SAME * apart) & (weight @ weight.T >= ALIKE)
    np.fill_diagonal(good, False)
    return {
        known[a]: [known[b] for b in np.flatnonzero(good[a])] for a in range(size) if good[a].any()
    }
