"""Captions to numbers, and captions to other captions: tokenizers and text augmentation.

train.py builds one tokenizer from the training captions (`Tokenizer`) or takes that of a pretrained
text tower (`WordPieces`), and asks `Rewriter` for the captions of an epoch.
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch

from cli import UserError

PAD = 0  # in every vocabulary


def padded(encoded: Iterable[list[int]]) -> torch.Tensor:
    """Lists of numbers -> int64 (texts, longest), 0 where padded."""
    rows = [torch.tensor(numbers) for numbers in encoded]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


class Tokenizer:
    """Words to numbers. Lower case; punctuation stands alone; numbers 0 to 3 are special."""

    PAD, UNK, BOS, EOS = range(4)
    SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")

    def __init__(self, vocabulary: list[str], max_tokens: int):
        self.vocabulary, self.max_tokens = vocabulary, max_tokens
        self.number = {word: i for i, word in enumerate(vocabulary)}
        self.cut = 0  # how many texts were longer than max_tokens

    @classmethod
    def train(cls, captions: Iterable[str], min_count: int, max_tokens: int) -> "Tokenizer":
        """Takes the words that stand at least `min_count` times in the training captions."""
        counts = Counter(word for caption in captions for word in cls.words(caption))
        words = sorted(word for word, count in counts.items() if count >= min_count)
        return cls([*cls.SPECIAL, *words], max_tokens)

    @staticmethod
    def words(text: str) -> list[str]:
        """`A dog's tail, wet.` -> a dog 's tail , wet ."""
        return re.findall(r"'?\w+|[^\w\s]", text.lower())

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that are not in the vocabulary."""
        return [word for word in self.words(text) if word not in self.number]

    def encode(self, text: str) -> list[int]:
        """<bos> words <eos>, at most max_tokens in all; a longer text is cut and counted."""
        numbers = [self.number.get(word, self.UNK) for word in self.words(text)]
        self.cut += len(numbers) > self.max_tokens - 2
        return [self.BOS, *numbers[: self.max_tokens - 2], self.EOS]

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Encodes and pads to the longest: int64 (len(texts), L)."""
        return padded(map(self.encode, texts))


class WordPieces:
    """The tokenizer of a BERT (Devlin et al. 2019), with the same calls as `Tokenizer`."""

    def __init__(self, vocabulary: list[str], max_tokens: int, lower_case: bool = True):
        try:
            from tokenizers import BertWordPieceTokenizer
        except ImportError as error:
            raise UserError("this text tower needs: pip install transformers") from error
        self.vocabulary, self.max_tokens, self.cut = vocabulary, max_tokens, 0
        numbers = {word: i for i, word in enumerate(vocabulary)}
        self.pieces = BertWordPieceTokenizer(numbers, lowercase=lower_case)

    words = staticmethod(Tokenizer.words)

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that no pieces make up."""
        return [word for word in self.words(text) if "[UNK]" in self.pieces.encode(word).tokens]

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """[CLS] pieces [SEP], cut to max_tokens (counted), padded to the longest: int64 (N, L)."""
        encoded = [made.ids for made in self.pieces.encode_batch(texts)]
        longest = self.max_tokens
        self.cut += sum(len(ids) > longest for ids in encoded)
        return padded(
            [*ids[: longest - 1], ids[-1]] if len(ids) > longest else ids for ids in encoded
        )


AnyTokenizer = Tokenizer | WordPieces


def plain_title(title: str) -> str:
    """`Matrix, The (1999)` -> The Matrix"""
    name = re.sub(r"\s*\(\d{4}\)\s*$", "", title.strip())
    return re.sub(r"^(.*), (The|A|An|Le|La|Les|Das|Der|Die|Il|El)$", r"\2 \1", name)


def without_title(text: str, title: str) -> str:
    """An introduction without its film's title and the quotes around it."""
    name = plain_title(title)
    left = re.sub(rf"""["'(]?(?<!\w){re.escape(name)}(?!\w)["')]?""", " ", text) if name else text
    if left == text:
        return text
    return re.sub(r"\s+(?=[.,;:!?])", "", " ".join(left.split())).strip(" ,;:-")


# ------------------------------------------------------------------------- text augmentation


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
    size, images = len(known), int(caption_image.max()) + 1
    stands = np.zeros((len(texts), size), np.float32)
    beside = np.zeros((size, 2 * size), np.float32)
    for row, words in enumerate(texts):
        ids = [number.get(word, -1) for word in words]
        for left, right in pairwise(ids):
            if left >= 0 and right >= 0:
                beside[right, left] += 1
                beside[left, size + right] += 1
        stands[row, [i for i in ids if i >= 0]] = 1
    pooled = np.zeros((images, size), np.float32)
    np.add.at(pooled, caption_image, stands)
    together = stands.T @ stands  # in one caption
    apart = pooled.T @ pooled - together  # in two captions of one image
    often = np.outer(stands.sum(0), stands.sum(0))
    per_image = len(texts) / images - 1
    lift = apart * len(texts) / (often * max(per_image, 1e-9))
    chance = beside.sum(1, keepdims=True) * beside.sum(0) / max(beside.sum(), 1)
    weight = np.log(np.maximum(beside, 1e-9) / np.maximum(chance, 1e-9)).clip(0)
    weight /= np.linalg.norm(weight, axis=1, keepdims=True).clip(1e-9)
    good = (lift >= LIFT) & (together * per_image <= SAME * apart) & (weight @ weight.T >= ALIKE)
    np.fill_diagonal(good, False)
    return {
        known[a]: [known[b] for b in np.flatnonzero(good[a])] for a in range(size) if good[a].any()
    }
