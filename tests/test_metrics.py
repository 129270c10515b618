"""Ranks and recalls against a loop, scikit-learn, hand-counted tables and the binomial formula."""

import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import top_k_accuracy_score

from metrics import (
    KS,
    bootstrap_intervals,
    first_captions,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)


def loop_ranks(images, texts, owner):
    """The protocol word for word: one query after the other, in float64."""
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    i2t, t2i = np.empty(len(images)), np.empty(len(texts))
    finite = [np.isfinite(text).all() for text in texts]
    known = [np.isfinite(image).all() for image in images]
    for i, image in enumerate(images):
        own = [image @ texts[j] for j in range(len(texts)) if owner[j] == i and finite[j]]
        if not known[i] or not own:
            i2t[i] = np.inf
            continue
        others = [j for j in range(len(texts)) if owner[j] != i]
        i2t[i] = 1 + sum(not finite[j] or image @ texts[j] >= max(own) for j in others)
    for j, text in enumerate(texts):
        if not finite[j] or not known[owner[j]]:
            t2i[j] = np.inf
            continue
        own, others = text @ images[owner[j]], [i for i in range(len(images)) if i != owner[j]]
        t2i[j] = 1 + sum(not known[i] or text @ images[i] >= own for i in others)
    return i2t, t2i


def scene(count: int, seed: int = 0, noise: float = 1.0, width: int = 6):
    """Images with 1 to 6 captions near them, the captions in no order."""
    generator = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), generator.integers(1, 7, count))
    generator.shuffle(owner)
    images = generator.normal(size=(count, width))
    texts = images[owner] + noise * generator.normal(size=(len(owner), width))
    made = [
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (images, texts)
    ]
    return *made, owner


def assert_same_ranks(images, texts, owner):
    for found, wanted in zip(
        retrieval_ranks(images, texts, owner), loop_ranks(images, texts, owner), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_against_a_loop(seed):
    images, texts, owner = scene(30, seed)
    assert len(set(np.bincount(owner))) > 2 and (np.diff(owner) < 0).any()
    assert_same_ranks(images, texts, owner)


def test_ranks_against_scikit_learn():
    images, texts, owner = scene(40, 9)
    _, t2i = retrieval_ranks(images, texts, owner)
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    for k in KS:
        wanted = 100 * top_k_accuracy_score(owner, scores, k=k, labels=np.arange(40))
        assert recall_at_k(t2i, k) == pytest.approx(wanted)


def test_ranks_across_the_borders_of_blocks():
    """1,100 images and 8,400 captions: two blocks each; the reference is one plain matrix."""
    generator = np.random.default_rng(1)
    owner = np.concatenate([np.arange(1100), generator.integers(0, 1100, 7300)])
    generator.shuffle(owner)
    images = generator.normal(size=(1100, 12)).astype(np.float32)
    texts = (images[owner] + 2 * generator.normal(size=(8400, 12))).astype(np.float32)
    i2t, t2i = retrieval_ranks(images, texts, owner)
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    mine = owner[None] == np.arange(1100)[:, None]
    best = np.where(mine, scores, -np.inf).max(1)
    np.testing.assert_array_equal(i2t, 1 + ((scores > best[:, None]) & ~mine).sum(1))
    own = scores[owner, np.arange(8400)]
    np.testing.assert_array_equal(t2i, 1 + (scores > own).sum(0))
    assert len(set(i2t)) > 50 and len(set(t2i)) > 100


def test_i2t_counts_the_best_of_the_own_captions():
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[0.1, 0, 0.9], [0.9, 0, 0.1], [0.5, 0.6, 0], [0, 0.2, 0.8]], np.float32)
    owner = np.array([0, 0, 1, 2])
    # Image 0: own 0.1 and 0.9, others 0.5 and 0. Image 1: own 0.6, others 0, 0, 0.2.
    # Image 2: own 0.8, others 0.9, 0.1, 0.
    i2t, t2i = retrieval_ranks(images, texts, owner)
    assert i2t.tolist() == [1, 1, 2]
    # Caption 0: 0.1 to its image, 0 and 0.9 to the others; the other captions find theirs.
    assert t2i.tolist() == [2, 1, 1, 1]


def test_ties_are_lost():
    images, texts, owner = scene(12, 3, noise=0.3)
    images[5], images[7] = images[2], images[2]
    for j in np.flatnonzero(np.isin(owner, (5, 7))):
        texts[j] = texts[np.flatnonzero(owner == 2)[0]]
    assert_same_ranks(images, texts, owner)
    i2t, t2i = retrieval_ranks(images, texts, owner)
    assert (t2i[np.isin(owner, (5, 7))] >= 3).all() and (i2t[[5, 7]] >= 2).all()
    twins = np.ones((2, 4), np.float32) / 2
    for ranks in retrieval_ranks(twins, twins, np.arange(2)):
        assert ranks.tolist() == [2, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["images", "texts", "both"])
def test_an_embedding_that_is_not_finite_is_a_miss(value, which):
    images, texts, owner = scene(15, 4, noise=0.2)
    before = retrieval_ranks(images, texts, owner)
    broken = np.flatnonzero(owner == 6)
    if which != "texts":
        images[3, 2] = value
    if which != "images":
        texts[broken] = value
        texts[0, 1] = value
    assert_same_ranks(images, texts, owner)
    i2t, t2i = retrieval_ranks(images, texts, owner)
    assert (i2t >= before[0]).all() and (t2i >= before[1]).all()
    if which != "texts":
        assert i2t[3] == np.inf and (t2i[owner == 3] == np.inf).all()
    if which != "images":
        assert i2t[6] == np.inf and (t2i[broken] == np.inf).all()


def test_everything_nan_scores_nothing():
    _, _, owner = scene(15, 4)
    nothing = np.full((len(owner), 6), np.nan, np.float32)
    found = retrieval_metrics(*retrieval_ranks(nothing[:15], nothing, owner))
    assert found["rsum"] == 0
    assert found["i2t_medr"] == found["i2t_meanr"] == len(owner) and found["t2i_medr"] == 15


@pytest.mark.parametrize("which", ["images", "texts", "both"])
def test_a_constant_embedding_is_no_better_than_chance(which):
    for seed in range(5):
        images = scene(50, seed)[0]
        owner = np.arange(250) % 50  # as many captions each: chance is the same for all
        texts = images[owner]
        if which != "texts":
            images[:] = images[0]
        if which != "images":
            texts[:] = texts[0]
        for ranks in retrieval_ranks(images, texts, owner):
            for k in KS:
                assert recall_at_k(ranks, k) <= 100 * k / 50
                if which == "both":
                    assert recall_at_k(ranks, k) == 0


def test_an_image_without_a_caption():
    images, texts, owner = scene(10)
    with pytest.raises(ValueError, match="no caption"):
        retrieval_ranks(images, texts, np.where(owner == 4, 5, owner))
    with pytest.raises(ValueError, match="no caption"):
        retrieval_ranks(images, texts[:0], owner[:0])


def test_metrics_counted_by_hand():
    i2t = np.array([1, 2, 5, 6, 20.0])
    t2i = np.array([1, 1, 1, 3, 4, 5, 7, 10, 11, np.inf])
    wanted = {
        "i2t_r1": 20, "i2t_r5": 60, "i2t_r10": 80, "i2t_medr": 5,
        "i2t_meanr": (1 + 2 + 5 + 6 + 10) / 5,  # no rank is beyond the pool of 10 captions
        "t2i_r1": 30, "t2i_r5": 60, "t2i_r10": 80, "t2i_medr": 4.5,
        "t2i_meanr": (1 + 1 + 1 + 3 + 4 + 5 + 5 + 5 + 5 + 5) / 10,  # nor beyond 5 images
        "rsum": 330, "mean_recall": 55,
    }  # fmt: skip
    found = retrieval_metrics(i2t, t2i)
    assert found == pytest.approx(wanted)
    assert all(type(value) is float for value in found.values())


def test_first_captions():
    assert first_captions(np.array([2, 0, 2, 1, 0])).tolist() == [1, 3, 0]


def spread(interval: list[float]) -> float:
    return interval[1] - interval[0]


def test_intervals_hold_the_figures_and_are_seeded():
    images, texts, owner = scene(60, 5)
    ranks = retrieval_ranks(images, texts, owner)
    found, point = bootstrap_intervals(*ranks, owner), retrieval_metrics(*ranks)
    assert found.keys() == {key for key in point if not key.endswith(("medr", "meanr"))}
    for key, (low, high) in found.items():
        assert 0 <= low <= point[key] <= high <= (600 if key == "rsum" else 100)
        assert low < high
    assert bootstrap_intervals(*ranks, owner) == found


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_intervals_narrow_as_the_binomial_formula_says(share):
    widths = []
    for count in (100, 400, 1600):
        ranks, owner = np.full(count, 50.0), np.repeat(np.arange(count), 5)
        ranks[: int(share * count)] = 1
        found = bootstrap_intervals(ranks, np.repeat(ranks, 5), owner)
        wanted = 2 * 1.96 * 100 * math.sqrt(share * (1 - share) / count)
        assert spread(found["i2t_r1"]) == pytest.approx(wanted, rel=0.15)
        # An image's captions hit together, so five captions an image tell no more than one.
        assert found["t2i_r1"] == pytest.approx(found["i2t_r1"])
        widths.append(spread(found["i2t_r1"]))
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.2)


def test_a_certain_figure_has_no_interval():
    found = bootstrap_intervals(np.ones(20), np.full(20, 9.0), np.arange(20), resamples=50)
    assert found["i2t_r1"] == [100, 100] and found["t2i_r5"] == [0, 0]
    assert found["mean_recall"] == pytest.approx([400 / 6, 400 / 6])


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(2)
from metrics import retrieval_ranks
generator = np.random.default_rng(0)
def peak():
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with the parent's, which is pytest with all its modules
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
owner = np.arange({captions}) % {images}
images = generator.normal(size=({images}, 64)).astype(np.float32)
texts = images[owner] + generator.normal(size=({captions}, 64)).astype(np.float32)
before = peak()
i2t, t2i = retrieval_ranks(images, texts, owner)
assert (i2t == 1).mean() > 0.9 and (t2i <= 10).mean() > 0.9
print(before, peak())
"""


def test_memory_does_not_grow_with_the_matrix():
    """As a matrix these scores would take 0.5 GB in float32 and 1 GB in float64."""
    code = MEMORY.format(images=5_000, captions=25_000)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < 1e9 and after - before < 3e8
