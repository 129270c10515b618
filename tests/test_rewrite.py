"""--text-augment: what it may change, and that what it leaves still reads as English."""

import itertools
import re
import tracemalloc
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset import PAD, Pairs, Tokenizer
from sources.layouts import read_folder
from support.command import UserError
from tricks.rewrite import Rewriter, mine_synonyms, parse_rates, rewrite_captions


def test_rates():
    assert parse_rates("none") == {"synonym": 0, "delete": 0, "swap": 0}
    rates = {"synonym": 0.1, "delete": 0.2, "swap": 0.05}
    assert parse_rates("synonym=0.1, delete=0.2,swap=0.05") == rates
    assert parse_rates("swap=1")["swap"] == 1
    for text in ("synonym", "synonym=x", "insert=0.1", "delete=1.5", "swap=-0.1", "delete=nan"):
        with pytest.raises(UserError, match="R from 0 to 1"):
            parse_rates(text)


def corpus() -> tuple[list[str], np.ndarray]:
    """Images of one animal each; of the cat, half of the writers say kitten."""
    animals = ("cat", "dog", "horse", "bird", "cow", "goat")
    places, verbs = ("sofa", "lawn", "bed", "roof"), ("sits", "sleeps", "waits")
    texts, images = [], []
    for image, (animal, place, verb) in enumerate(itertools.product(animals * 2, places, verbs)):
        nouns = ("cat", "kitten") if animal == "cat" else (animal, animal)
        for turn, kind in enumerate(("big ", "big ", "", "", "black and white ")):
            texts.append(f"the {kind}{nouns[turn % 2]} {verb} on the {place} .")
            images.append(image)
    return texts, np.array(images)


def test_synonyms_are_mined():
    found = mine_synonyms([Rewriter.bounded(text) for text in corpus()[0]], corpus()[1])
    assert found["cat"] == ["kitten"] and found["kitten"] == ["cat"]
    assert "dog" not in found  # never of one image with a cat
    assert "black" not in found and "white" not in found  # they stand together


def test_few_captions_have_no_synonyms():
    assert mine_synonyms([Rewriter.bounded("a dog"), Rewriter.bounded("cats")], np.arange(2)) == {}


def test_mining_holds_no_table_of_captions_by_words():
    """Which is 12 GB for COCO's 590,000 captions; here 40,000 by 1,000 words, 160 MB."""
    names = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=3)]
    draws = np.random.default_rng(0).integers(0, len(names), (40_000, 6)).tolist()
    texts = [[names[i] for i in draw] for draw in draws]
    tracemalloc.start()
    mine_synonyms(texts, np.arange(len(texts)) // 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("kind", ["synonym", "delete", "swap"])
def test_each_kind_of_change(kind):
    texts, images = corpus()
    rewriter, random = Rewriter(texts, images, parse_rates(f"{kind}=0.5")), np.random.default_rng(0)
    attested = {pair for text in texts for pair in itertools.pairwise(Rewriter.bounded(text))}
    changed = 0
    for text in texts:
        other = rewriter(text, random)
        before, after = Tokenizer.words(text), Tokenizer.words(other)
        changed += before != after
        assert set(itertools.pairwise(Rewriter.bounded(other))) <= attested
        if kind == "synonym":
            assert len(before) == len(after)
        if kind == "delete":
            assert len(after) <= len(before) and set(after) <= set(before)
        if kind == "swap":
            assert sorted(before) == sorted(after)
    assert (changed > 20) == (kind != "swap")  # nothing in this corpus may be swapped


def test_swapping_where_both_orders_are_attested():
    texts = ["red and blue", "blue and red", "a red cat", "a blue cat", "red blue", "blue red"] * 9
    rewriter = Rewriter(texts, np.arange(len(texts)), parse_rates("swap=1"))
    assert rewriter("red blue", np.random.default_rng(0)) == "blue red"


def test_rates_of_none_leave_captions_alone():
    rewriter, random = Rewriter(*corpus(), parse_rates("none")), np.random.default_rng(0)
    assert all(rewriter(text, random) == text for text in corpus()[0])


def test_the_seed_decides():
    rewriter = Rewriter(*corpus(), parse_rates("synonym=0.3,delete=0.3"))
    seeds = [np.random.default_rng(seed) for seed in (1, 1, 2)]
    first, again, other = ([rewriter(text, seed) for text in corpus()[0]] for seed in seeds)
    assert first == again != other


def test_training_captions_change_in_every_epoch_and_dev_does_not():
    captions, owner = corpus()
    pixels = np.zeros((owner.max() + 1, 2, 2, 3), np.uint8)
    rows, tokenizer = np.arange(len(pixels)), Tokenizer.train(captions, 1, 20)
    plain = Pairs(SimpleNamespace(pixels=pixels), "train", rows, captions, owner, tokenizer)
    options = Namespace(batch_size=16, captions_per_image=1, seed=0, workers=1, image_size=2)
    options.image_augment, options.text_augment = "none", "synonym=0.5,delete=0.3"
    model, both = rewrite_captions("the model", {"train": plain, "dev": plain}, options)
    assert model == "the model" and both["dev"] is plain

    def texts(pairs: Pairs, epoch: int) -> list[list[int]]:
        cpu = torch.device("cpu")
        batches = [tokens for _, tokens, *_ in pairs.batches(epoch, options, cpu)]
        return [[n for n in text if n != PAD] for tokens in batches for text in tokens.tolist()]

    # An epoch after five has the captions of the first again: each image has five.
    first, again, later = (texts(both["train"], epoch) for epoch in (1, 1, 6))
    assert first == again and len(first) == len(later) == len(rows)
    assert first != texts(plain, 1)
    for rewritten, text in zip(first, texts(plain, 1), strict=True):
        assert rewritten[0] == text[0] == Tokenizer.BOS and rewritten[-1] == Tokenizer.EOS
        assert 2 < len(rewritten) <= len(text)
    assert sorted(map(tuple, first)) != sorted(map(tuple, later))


@pytest.mark.flickr8k
def test_real_captions_still_read_as_english(flickr8k):
    rows = read_folder(flickr8k)[2]
    captions = [row.caption for row in rows]
    owner = np.unique([row.image for row in rows], return_inverse=True)[1]
    rewriter = Rewriter(captions, owner, parse_rates("synonym=0.2,delete=0.1,swap=0.05"))
    known = rewriter.synonyms
    alike = [("jumps", "leaps"), ("bike", "bicycle"), ("large", "huge"), ("woman", "lady")]
    assert all(other in known[word] for word, other in alike)
    unlike = [("black", "white"), ("man", "woman"), ("boy", "girl"), ("two", "three")]
    assert not any(other in known.get(word, ()) for word, other in unlike)
    random, changed = np.random.default_rng(0), 0
    for caption in captions[::50]:
        other = rewriter(caption, random)
        changed += other.split() != Tokenizer.words(caption)
        assert not re.search(r"\b(a a|the the|a [aeiou]\w+ing a a|in on)\b", other)
        before = set(itertools.pairwise(Rewriter.bounded(caption)))
        for pair in itertools.pairwise(Rewriter.bounded(other)):
            assert pair in before or rewriter.pairs[pair] >= Rewriter.LEAST
    assert changed > 200  # of 800
