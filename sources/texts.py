"""Texts of any language: made clean, taken apart into words, compared.

The readers of captions clean what they read; dataset.Tokenizer cleans what it is given (a query
too) and numbers its words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dataset import Tokenizer

# Scripts that are written without blanks between words: each letter is a word, as in BERT's Han.
UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Khmer, Tai
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00017000-\U00018d8f\U0001b170-\U0001b2ff\U00020000-\U0003ffff"  # Han and its kin
    "\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana, Bopomofo
    "\ua000-\ua48f"  # Yi
)
MARK = "".join(  # accents, vowel signs and the like, which belong to the letter before them
    chr(code)
    for first, end in ((0x300, 0x1F000), (0xE0100, 0xE01F0))
    for code in range(first, end)
    if unicodedata.category(chr(code))[0] == "M"
)
STACKER = "\u1039\u17d2\u1a60"  # a mark that puts the next letter under the one before it
LETTER = f"[{UNSPACED}][{MARK}]*(?:(?<=[{STACKER}])[{UNSPACED}][{MARK}]*)*"
WORD = re.compile(rf"'?(?:[^\W{UNSPACED}][{MARK}]*)+|{LETTER}|[^\w\s][{MARK}]*")
ENGLISH = re.compile(r"'?\w+|[^\w\s]")  # the same of ASCII, faster
# Two letters or more, or one where each is a word: what sklearn shall count.
COUNTED = rf"(?:[^\W\d_{UNSPACED}][{MARK}]*){{2,}}|{LETTER}"

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# Not to be seen: soft hyphens, joiners, directions, marks that an emoji be in colour.
UNSEEN = re.compile(
    "[\u00ad\u061c\u180e\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]"
)
SAME = str.maketrans({"\u2019": "'", "\u02bc": "'", "\uff07": "'", "\u200b": " "})


def clean_text(text: str) -> str:
    """A text in NFC; a blank for each control character, nothing for half a surrogate pair."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
        text = unicodedata.normalize("NFC", text)
    return CONTROL.sub(" ", text)


def readable(name: str) -> str:
    """A path as text: bytes that are no characters become signs that say so."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def words_of(text: str) -> list[str]:
    """`A dog's tail, wet.` -> a dog 's tail , wet . and 一只狗 -> 一 只 狗

    Lower case; punctuation stands alone; where a script has no blanks between words each letter is
    one, with its marks.
    """
    text = clean_text(text)
    if text.isascii():
        return ENGLISH.findall(text.lower())
    return WORD.findall(UNSEEN.sub("", text.translate(SAME)).lower())


def text_ids(texts: Iterable[str]) -> np.ndarray:
    """int64 (texts,): equal where two texts are, but for capitals and blanks."""
    number: dict[str, int] = {}
    keys = (" ".join(clean_text(text).casefold().split()) for text in texts)
    return np.array([number.setdefault(key, len(number)) for key in keys], np.int64)


def unknown_to_all(tokenizers: Sequence[Tokenizer], text: str) -> list[str]:
    """The words of a text that not one of some models knows."""
    first, *others = (tokenizer.unknown(text) for tokenizer in tokenizers)
    return [word for word in first if all(word in unknown for unknown in others)]
