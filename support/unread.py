"""What a model does not read of texts: words that it never saw, ends that are cut off.

train.py, evaluate.py and visualize.py say it beside the figures that it spoils.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sources.texts import words_of
from support.command import UserError, warn

if TYPE_CHECKING:
    from dataset import Tokenizer
    from support.embedding import Trained

FIFTH = 0.2  # so many unknown words are said; a few are in every text


def is_word(token: str) -> bool:
    return any(map(str.isalnum, token))


def unknown_to_all(tokenizers: Sequence[Tokenizer], text: str) -> list[str]:
    """The words of a text that not one of some models knows."""
    first, *others = (tokenizer.unknown(text) for tokenizer in tokenizers)
    return [word for word in first if all(word in unknown for unknown in others)]


def unknown_words(tokenizers: Sequence[Tokenizer], texts: Sequence[str], name: str) -> list[str]:
    """A sentence on the texts called `name` where no model knows many of their words, or []."""
    counts = Counter(filter(is_word, (word for text in texts for word in words_of(text))))
    unknown = [word for word in counts if unknown_to_all(tokenizers, word)]
    share = sum(counts[word] for word in unknown) / max(1, sum(counts.values()))
    if share <= FIFTH:
        return []
    some = ", ".join(sorted(unknown, key=lambda word: -counts[word])[:3])
    known = "never stood in the training captions, or too seldom (--min-count)"
    return [f"{share:.0%} of the words of the {name} are unknown ({some} ...): they {known}"]


def unread(tokenizers: Sequence[Tokenizer], texts: Sequence[str], name: str) -> list[str]:
    """All that is to be said of the texts called `name`."""
    return unknown_words(tokenizers, texts, name) + cut_off(tokenizers, texts, name)


def cut_off(tokenizers: Sequence[Tokenizer], texts: Sequence[str], name: str) -> list[str]:
    """A sentence on the texts that are longer than the first model reads, or []."""
    most = tokenizers[0].max_tokens
    cut = sum(length > most for length in map(tokenizers[0].length, texts))
    return [f"{cut:,} of {len(texts):,} {name} are cut to {most} tokens"] if cut else []


def check_queries(queries: list[str], trained: Trained) -> str:
    """Warns of what the model does not read of the user's queries; a note on it for the figure.

    Raises UserError for a query that it cannot understand.
    """
    note, tokenizer = "", trained.tokenizers[0]
    for query in queries:
        words = list(filter(is_word, tokenizer.words(query)))
        if not words:
            raise UserError(f"--query {query!r} holds no word; describe a picture")
        unknown = [word for word in words if word in trained.unknown(query)]
        message = f"--query {query!r}: {', '.join(unknown)} never stood in the training captions"
        if len(unknown) == len(words):
            raise UserError(f"{message} (or too seldom); use other words")
        if unknown:
            warn(f"{message} (or too seldom); the rest of the query decides")
            note += f"; not known: {', '.join(unknown)}"
        if (length := tokenizer.length(query)) > tokenizer.max_tokens:
            most = f"cut to {tokenizer.max_tokens} tokens"
            warn(f"--query {query[:60]!r} ... has {length} and is {most}: its end is not read")
            note += f"; a query is {most}"
    return note
