"""Text augmentation: what it may change, and that what it leaves still reads as English."""

import itertools
import re

import numpy as np
import pytest
from cli import UserError

from captions import Rewriter, Tokenizer, mine_synonyms, parse_rates
from dataset import load_dataset


def test_rates():
    assert parse_rates("none") == {"synonym": 0, "delete": 0, "swap": 0}
    wanted = {"synonym": 0.1, "delete": 0.2, "swap": 0.05}
    assert parse_rates("synonym=0.1, delete=0.2,swap=0.05") == wanted
    assert parse_rates("swap=1")["swap"] == 1
    for text in ("synonym", "synonym=x", "insert=0.1", "delete=1.5", "swap=-0.1", "delete=nan"):
        with pytest.raises(UserError, match="R from 0 to 1"):
            parse_rates(text)


def corpus() -> tuple[list[str], np.ndarray]:
    """Images of one animal each; of the cat, half of the writers say kitten."""
    animals = ("cat", "dog", "horse", "bird", "cow", "goat")
    places, verbs = ("sofa", "lawn", "bed", "roof"), ("sits", "sleeps", "waits")
    texts, images = [], []
    for image, made in enumerate(itertools.product(animals * 2, places, verbs)):
        animal, place, verb = made
        names = ("cat", "kitten") if animal == "cat" else (animal, animal)
        for turn, kind in enumerate(("big ", "big ", "", "", "black and white ")):
            texts.append(f"the {kind}{names[turn % 2]} {verb} on the {place} .")
            images.append(image)
    return texts, np.array(images)


def test_synonyms_are_mined():
    found = mine_synonyms([Rewriter.bounded(text) for text in corpus()[0]], corpus()[1])
    assert found["cat"] == ["kitten"] and found["kitten"] == ["cat"]
    assert "dog" not in found  # never of one image with a cat
    assert "black" not in found and "white" not in found  # they stand together


@pytest.mark.parametrize("kind", ["synonym", "delete", "swap"])
def test_each_kind_of_change(kind):
    texts, images = corpus()
    rates = parse_rates(f"{kind}=0.5")
    rewriter, random = Rewriter(texts, images, rates), np.random.default_rng(0)
    attested = {pair for text in texts for pair in itertools.pairwise(Rewriter.bounded(text))}
    changed = 0
    for text in texts:
        made = rewriter(text, random)
        before, after = Tokenizer.words(text), Tokenizer.words(made)
        changed += before != after
        assert set(itertools.pairwise(Rewriter.bounded(made))) <= attested
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
    rewriter = Rewriter(*corpus(), parse_rates("none"))
    random = np.random.default_rng(0)
    assert all(rewriter(text, random) == text for text in corpus()[0])


def test_the_seed_decides():
    rewriter = Rewriter(*corpus(), parse_rates("synonym=0.3,delete=0.3"))
    a, b, c = (
        [rewriter(text, np.random.default_rng(seed)) for text in corpus()[0]] for seed in (1, 1, 2)
    )
    assert a == b != c


@pytest.mark.flickr8k
def test_real_captions_still_read_as_english(flickr8k, tmp_path):
    split = load_dataset(str(flickr8k), size=8, cache=tmp_path).split("train")
    rewriter = Rewriter(
        split.captions, split.caption_image, parse_rates("synonym=0.2,delete=0.1,swap=0.05")
    )
    known = rewriter.synonyms
    for word, other in (
        ("jumps", "leaps"),
        ("bike", "bicycle"),
        ("large", "huge"),
        ("woman", "lady"),
    ):
        assert other in known[word]
    for word, other in (("black", "white"), ("man", "woman"), ("boy", "girl"), ("two", "three")):
        assert other not in known.get(word, ())
    random, changed = np.random.default_rng(0), 0
    for caption in split.captions[::50]:
        made = rewriter(caption, random)
        changed += made.split() != Tokenizer.words(caption)
        assert not re.search(r"\b(a a|the the|a [aeiou]\w+ing a a|in on)\b", made)
        for pair in itertools.pairwise(Rewriter.bounded(made)):
            new = pair not in set(itertools.pairwise(Rewriter.bounded(caption)))
            assert not new or rewriter.pairs[pair] >= Rewriter.LEAST
    assert changed > 200  # of 600
