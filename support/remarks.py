"""What a run says of itself, and of texts: its table, and what speaks against the figures.

train.py prints these around its loop; evaluate.py, visualize.py and search.py say what a model
does not read of the texts.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from sources.texts import unknown_to_all, words_of
from support.checkpoint import best_epoch
from support.command import UserError, later, warn

if TYPE_CHECKING:
    from dataset import Tokenizer
    from support.embedding import Trained
    from train import Run

COLUMNS = {  # of the table on the screen, in 80 columns: key -> (title, format)
    "epoch": ("epoch", "{:5d}"),
    "train_loss": ("loss", "{:6.3f}"),
    "dev_loss": ("dev", "{:6.3f}"),
    "i2t_r1": ("i2t@1", "{:5.1f}"),
    "i2t_r5": ("@5", "{:5.1f}"),
    "i2t_r10": ("@10", "{:5.1f}"),
    "i2t_medr": ("medr", "{:5.1f}"),
    "t2i_r1": ("t2i@1", "{:5.1f}"),
    "t2i_r5": ("@5", "{:5.1f}"),
    "t2i_r10": ("@10", "{:5.1f}"),
    "t2i_medr": ("medr", "{:5.1f}"),
    "mean_recall": ("mean", "{:5.1f}"),
    "minutes": ("min", "{:5.1f}"),  # since the run began, its preparation included
}  # history.csv has more


def table_head() -> str:
    return " ".join(title.rjust(len(form.format(0))) for title, form in COLUMNS.values())


def table_line(record: dict[str, float]) -> str:
    cells = ((form.format(record[key]), len(title)) for key, (title, form) in COLUMNS.items())
    return " ".join(cell.rjust(width) for cell, width in cells)


def say_duration(seconds: float, epochs: int) -> None:
    """How long a run will take, after its first steps."""
    minutes = f"{seconds * epochs / 60:.1f} min for {epochs}"
    tqdm.write(f"about {seconds:.0f} s an epoch, {minutes}, besides what measuring dev takes")


def describe(run: Run, options: Namespace) -> str:
    """The line before the table: towers, sizes, precision and what chance would give."""
    model, learner, pairs = run.model, run.learner, run.pairs
    weights = sum(weight.numel() for weight in model.parameters())
    learned = sum(weight.numel() for weight in learner.parameters() if weight.requires_grad)
    images, tokenizer = len(pairs["train"].rows), model.tokenizer
    tokenizer.cut = 0
    for split in ("train", "dev"):
        tokenizer(pairs[split].captions)  # counts those that are cut
        for remark in unknown_words([tokenizer], pairs[split].captions, f"{split} captions"):
            warn(remark)
    dev = len(pairs["dev"].rows)
    precision = later("support.precision", "describe_precision")(options)
    few = f" (dev has {dev}: with fewer than {FEW} images recalls tell little)" if dev < FEW else ""
    return (
        f"model: {options.image_tower} at {options.image_size} px and {options.text_tower}, "
        f"{weights:,} weights of which {learned:,} learn; "
        f"vocabulary {len(tokenizer.vocabulary):,} words, {tokenizer.cut:,} captions cut to "
        f"{tokenizer.max_tokens} tokens; {precision} on {model.device}; "
        f"{images:,} images in {len(pairs['train'].sampler(options)):,} batches; "
        f"chance on dev: R@1 {100 / dev:.2f}%{few}"
    )


# ------------------------------------------------------------------- what speaks against it

FEW = 50  # images of dev


def at_chance(run: Run, options: Namespace) -> str:
    """A sentence where the last epoch's loss or recalls are those of guessing, or ""."""
    record, dev = run.history[-1], run.pairs["dev"]
    images, captions = len(dev.rows), len(dev)
    if images >= FEW:
        # As many captions as chance would find among the first 10, and twice its deviation.
        expected = captions * 10 / images
        most = 100 * (expected + 2 * math.sqrt(expected)) / captions
        if record["t2i_r10"] <= most:
            return (
                f"recall on dev is at chance: t2i R@10 {record['t2i_r10']:.1f}%, where guessing "
                f"gives {1000 / images:.1f}%{WHAT_THEN}"
            )
    steps = len(run.pairs["train"].sampler(options))
    batch = len(run.pairs["train"].rows) / steps
    each, loss = options.captions_per_image, record["train_loss"]
    guess = math.log(max(1, batch * each - each + 1))
    if options.loss == "infonce" and record["epoch"] * steps >= 20 and loss > guess - 0.02:
        return f"the loss stands at {loss:.3f}: guessing gives ln(batch) = {guess:.3f}{WHAT_THEN}"
    return ""


WHAT_THEN = "; if the next epochs do not change it, try another --lr, more --warmup or more data"


def warn_of_chance(run: Run, options: Namespace) -> None:
    """Says, after an epoch, that its figures are those of guessing."""
    if sentence := at_chance(run, options):
        warn(f"epoch {run.history[-1]['epoch']}: {sentence}")


def best_of(history: list[dict[str, float]]) -> str:
    """The best epoch, and whether it is the first for want of a better."""
    best = best_epoch(history)
    lone = ", the first: none after it was better" if best["epoch"] == 1 < len(history) else ""
    return f"epoch {best['epoch']}{lone}, mean recall on dev {best['mean_recall']:.1f}%"


# ------------------------------------------------------------- what is not read of texts

FIFTH = 0.2  # so many unknown words are said; a few are in every text


def is_word(token: str) -> bool:
    return any(map(str.isalnum, token))


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


def check_query(query: str, trained: Trained) -> list[str]:
    """What the models do not read of a text, each a sentence.

    Raises UserError for a text that they cannot understand.
    """
    tokenizer = trained.tokenizers[0]
    words = list(filter(is_word, tokenizer.words(query)))
    if not words:
        raise UserError(f"{query!r} holds no word; describe a picture")
    strange = trained.unknown(query)
    unknown = [word for word in words if word in strange]
    remark = f"{query!r}: {', '.join(unknown)} never stood in the training captions"
    if len(unknown) == len(words):
        raise UserError(f"{remark} (or too seldom); use other words")
    remarks = [f"{remark} (or too seldom); the rest of the query decides"] if unknown else []
    if (length := tokenizer.length(query)) > tokenizer.max_tokens:
        most = f"is cut to {tokenizer.max_tokens} tokens"
        remarks.append(f"{query[:60]!r} ... has {length} and {most}: its end is not read")
    return remarks


def check_queries(queries: list[str], trained: Trained) -> None:
    """Warns of what the models do not read of each --query.

    Raises UserError for one that they cannot understand.
    """
    for query in queries:
        try:
            remarks = check_query(query, trained)
        except UserError as error:
            raise UserError(f"--query {error}") from error
        for remark in remarks:
            warn(f"--query {remark}")
