"""Where the data enters: finds captions and pictures in any known layout, splits them by image.

`load_dataset(PATH).pairs("train")` is a torch Dataset of pairs; train.py takes its `batches`.
`python dataset.py PATH` says what lies there; `python dataset.py --download` fetches Flickr8k.
"""

from __future__ import annotations

import support.python  # noqa: F401  refuses a Python that is too old, before all else

# isort: split

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sources.augment import AUGMENTATIONS, augment, resize, views_of
from sources.collection import CACHE, Collection
from sources.texts import text_ids, words_of
from support.command import Parser, UserError, later, number, run
from support.workers import ahead

if TYPE_CHECKING:
    from argparse import Namespace

# ------------------------------------------------------------------------------- captions

PAD = 0  # in every vocabulary


class Tokenizer:
    """Words to numbers. Lower case; punctuation stands alone; numbers 0 to 3 are special."""

    PAD, UNK, BOS, EOS = range(4)
    SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")

    def __init__(self, vocabulary: list[str], max_tokens: int):
        self.vocabulary, self.max_tokens = vocabulary, max_tokens
        self.number = {word: i for i, word in enumerate(vocabulary)}
        self.cut = 0  # how many texts were longer than max_tokens

    @classmethod
    def train(cls, captions: Iterable[str], min_count: int = 2, max_tokens: int = 40) -> Tokenizer:
        """Takes the words that stand at least `min_count` times in the training captions."""
        counts = Counter(word for caption in captions for word in cls.words(caption))
        words = sorted(word for word, count in counts.items() if count >= min_count)
        return cls([*cls.SPECIAL, *words], max_tokens)

    words = staticmethod(words_of)  # `A dog's tail, wet.` -> a dog 's tail , wet .

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that are not in the vocabulary."""
        return [word for word in self.words(text) if word not in self.number]

    def length(self, text: str) -> int:
        """How many numbers it would be, uncut."""
        return len(self.words(text)) + 2

    def encode(self, text: str) -> list[int]:
        """<bos> words <eos>, at most max_tokens in all; a longer text is cut and counted."""
        numbers = [self.number.get(word, self.UNK) for word in self.words(text)]
        self.cut += len(numbers) > self.max_tokens - 2
        return [self.BOS, *numbers[: self.max_tokens - 2], self.EOS]

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Encodes and pads to the longest: int64 (len(texts), L)."""
        return padded(map(self.encode, texts))


def padded(encoded: Iterable[list[int]]) -> torch.Tensor:
    """Lists of numbers -> int64 (texts, longest), 0 where padded."""
    rows = [torch.tensor(numbers) for numbers in encoded]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


# --------------------------------------------------------------------------- a whole data set


class CaptionedImages(Collection):
    """Every readable image with its captions and split; `summary()` says in a line what it is."""

    def pairs(self, split: str = "train", tokenizer: Tokenizer | None = None) -> Pairs:
        """The captions of a split, each with its image. Raises UserError when there are none.

        Without a tokenizer the vocabulary is that of the training captions.
        """
        chosen = np.flatnonzero(self.labels == split)
        if not len(chosen):
            raise UserError(f"{self.path} has no {split} images; see --splits")
        rows, position = np.unique(self.caption_image[chosen], return_inverse=True)
        captions = [self.captions[i] for i in chosen]
        return Pairs(self, split, rows, captions, position, tokenizer or self.tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        chosen = np.flatnonzero(self.labels == "train")
        return Tokenizer.train(self.captions[i] for i in chosen)


def load_dataset(
    path: str | Path,
    splits: str = "auto",
    size: int = 96,
    cache: Path = CACHE,
    workers: int = 2,
    titles: str = "hide",
) -> CaptionedImages:
    """A folder in any known layout, or `shapes`; its pictures decoded to `size` pixels, cached.

    Raises UserError for whatever is wrong with the folder.
    """
    if str(path) == "shapes":
        return CaptionedImages(**later("sources.shapes", "read_shapes")(cache))
    read = later("sources.folder", "read_collection")
    return CaptionedImages(**read(Path(path), splits, size, cache, workers, titles))


# ------------------------------------------------------------------------- pairs and batches


class Pixels:
    """The image side of pairs: decoded pictures, augmented afresh in every epoch."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, caption_image: np.ndarray):
        self.pixels, self.rows, self.caption_image = pixels, rows, caption_image

    def fetch(self, captions: np.ndarray, epoch: int) -> np.ndarray:
        """The images of some captions: uint8 (B, S, S, 3). NumPy alone, see `ahead`."""
        return self.pixels[self.rows[self.caption_image[captions]]]

    def prepare(
        self, images: torch.Tensor, options: Namespace, generator: torch.Generator
    ) -> torch.Tensor:
        """What was fetched, as the model learns from it: float (B, 3, size, size) in [0, 1]."""
        return augment(images, options.image_size, options.image_augment, generator)

    def views(
        self, part: slice, transform: dict[str, Any], device: torch.device
    ) -> list[torch.Tensor]:
        """Some images of the split as they are evaluated, each in all its views."""
        return views_of(torch.from_numpy(self.pixels[self.rows[part]]).to(device), transform)


class Captions:
    """The text side of pairs: the numbers of the captions' words."""

    def __init__(self, captions: list[str], tokenizer: Tokenizer):
        self.captions, self.tokenizer = captions, tokenizer

    @cached_property
    def tokens(self) -> torch.Tensor:
        """All captions, int64 (captions, L), 0 where padded."""
        return self.tokenizer(self.captions)

    def fetch(self, captions: np.ndarray, epoch: int) -> np.ndarray:
        """Some captions, no longer than their longest: int64 (B, L)."""
        tokens = self.tokens.numpy()[captions]
        return tokens[:, : (tokens != PAD).sum(1).max()]

    def batches(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(which captions, their tokens), texts of like length together, for evaluation."""
        order = sorted(range(len(self.captions)), key=lambda i: len(self.captions[i]))
        for first in range(0, len(order), 256):
            chosen = order[first : first + 256]
            yield chosen, self.tokenizer([self.captions[i] for i in chosen])


def image_transform(options: Namespace) -> dict[str, Any]:
    """How a picture becomes the model's input; it travels in the checkpoint.

    Pictures are decoded to `stored_size` (bicubic, squashed to a square), which is an eighth larger
    than the input where they are cropped, so that a crop keeps its sharpness, then resized to
    `image_size`. `crops` and `mirror` say which views of it are evaluated.
    """
    cropped = AUGMENTATIONS[options.image_augment].area < 1 or options.test_crops
    stored = options.image_size * 9 // 8 if cropped else options.image_size
    return {
        "image_size": options.image_size,
        "stored_size": 64 if options.data == "shapes" else stored,
        "crops": options.test_crops,
        "mirror": options.test_mirror,
    }


class EpochSampler(torch.utils.data.Sampler):
    """The batches of an epoch: every image once, with its next K captions in their turn.

    Batches are arrays of captions, an image's K one after the other; their sizes differ by one
    image at most. A function of seed and epoch: each image's captions stand in a seeded order.
    """

    def __init__(self, caption_image: np.ndarray, batch_size: int, each: int, seed: int):
        self.caption_image, self.batch_size = caption_image, batch_size
        self.each, self.seed, self.epoch = each, seed, 1

    def __len__(self) -> int:
        """As many as the batch size asks for, but none of a single pair, which teaches nothing."""
        images = int(self.caption_image.max()) + 1
        return max(1, min(-(-images // self.batch_size), images // 2))

    def __iter__(self) -> Iterator[np.ndarray]:
        chance = np.random.default_rng(self.seed).random(len(self.caption_image))
        shuffled = np.lexsort((chance, self.caption_image))
        counts = np.bincount(self.caption_image)
        firsts = np.concatenate([[0], counts.cumsum()[:-1]])
        turns = (self.epoch - 1) * self.each + np.arange(self.each)
        captions = shuffled[firsts[:, None] + turns % counts[:, None]]  # (images, K)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(counts))
        for part in np.array_split(order, len(self)):
            yield captions[part].ravel()


@dataclass
class Pairs(torch.utils.data.Dataset):
    """The captions of one split, each with its image: `DataLoader(pairs, 64, shuffle=True)`."""

    dataset: CaptionedImages
    name: str
    rows: np.ndarray  # the images of the split, as rows of the data set
    captions: list[str]
    caption_image: np.ndarray  # for each caption the position of its image in `rows`
    tokenizer: Tokenizer
    images: Pixels = None  # a side that a trick may replace, as features of frozen blocks do
    texts: Captions = None

    def __post_init__(self) -> None:
        if self.images is None:
            self.images = Pixels(self.dataset.pixels, self.rows, self.caption_image)
        if self.texts is None:
            self.texts = Captions(self.captions, self.tokenizer)

    @cached_property
    def text_ids(self) -> np.ndarray:
        """For each caption a number: equal captions of several images have the same."""
        return text_ids(self.captions)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(image (3, S, S) in [0, 1], tokens (L,) padded, the image's row in the data set)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        chosen = np.asarray(indices)
        pixels = torch.from_numpy(self.images.fetch(chosen, 1))
        ids = self.rows[self.caption_image[chosen]].tolist()
        return [*zip(resize(pixels, pixels.shape[1]), self.texts.tokens[chosen], ids, strict=True)]

    def with_sides(self, images: Pixels, texts: Captions) -> Pairs:
        """The same pairs, shown in another way: tricks/frozen.py shows features."""
        return replace(self, images=images, texts=texts)

    def sampler(self, options: Namespace) -> EpochSampler:
        each = options.captions_per_image
        return EpochSampler(self.caption_image, options.batch_size, each, options.seed)

    def batches(
        self, epoch: int, options: Namespace, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """(images (B, 3, S, S), tokens (B * K, L), image ids and text ids (B * K,) of the texts).

        An image's id is its row in the data set; texts that are equal have the same id.
        """
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        sampler, each = self.sampler(options), options.captions_per_image
        sampler.epoch = epoch

        def fetch(captions: np.ndarray) -> list[np.ndarray]:
            ids = self.rows[self.caption_image[captions]]
            images = self.images.fetch(captions[::each], epoch)
            return [images, self.texts.fetch(captions, epoch), ids, self.text_ids[captions]]

        fetched = ahead(fetch, sampler) if options.workers else map(fetch, sampler)
        for arrays in fetched:
            images, *texts = (torch.from_numpy(x).to(device, non_blocking=True) for x in arrays)
            yield self.images.prepare(images, options, generator), *texts

    def limited(self, limit: int | None, seed: int) -> Pairs:
        """`limit` images, drawn by the seed, with all their captions; all where it is larger."""
        count = len(self.rows)
        if limit is None or limit >= count:
            return self
        kept = np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))
        chosen = np.flatnonzero(np.isin(self.caption_image, kept))
        captions = [self.captions[i] for i in chosen]
        position = np.searchsorted(kept, self.caption_image[chosen])
        rows = self.rows[kept]
        return Pairs(self.dataset, self.name, rows, captions, position, self.tokenizer)


# ------------------------------------------------------------------------------ the script


def add_data_flags(parser: Parser, data: str | None, splits: str | None) -> None:
    """The flags that train.py, evaluate.py, visualize.py and dataset.py share."""
    flag = parser.add_argument_group("data").add_argument
    default = "" if data else " (default: what the checkpoint was trained on)"
    flag("--data", default=data, help=f"folder with captions, or `shapes`{default}")
    ways = "auto: the data's own if by image, else Flickr8k's lists, else a seeded split"
    flag("--splits", choices=("auto", "given", "official", "random"), default=splits, help=ways)
    flag("--cache", type=Path, default=CACHE, help="folder of decoded images and features")
    processes = "processes that decode images; 0: none, and no thread that fetches batches ahead"
    flag("--workers", type=number(int, 0, 256), default=os.cpu_count() or 1, help=processes)


def main(argv: list[str]) -> None:
    from sources.download import download_flickr8k

    parser = Parser(prog="dataset.py", description=__doc__.split("\n")[0])
    parser.add_argument("path", nargs="?", help="folder to look at (default: what --data names)")
    add_data_flags(parser, data="Flickr8k", splits="auto")
    flag = parser.add_argument_group("download").add_argument
    flag("--download", nargs="?", const="Flickr8k", metavar="DIR", help="fetch Flickr8k into DIR")
    flag("--url", action="append", help="zip file to fetch instead; repeatable")
    options = parser.parse_args(argv)
    if options.url and not options.download:
        raise UserError("--url goes with --download")
    if options.download:
        files = download_flickr8k(Path(options.download), options.url)
        print(f"wrote {len(files):,} files into {options.download}")
    path = options.path or options.download or options.data
    print(load_dataset(path, options.splits, 128, options.cache, options.workers).summary())


if __name__ == "__main__":
    run(main)
