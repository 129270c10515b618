"""Ranks and recalls against loops and formulas; evaluation as a user runs it, figures recomputed.

Zero-shot classification is in test_zeroshot.py, the films' own report in test_posters.py.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, listed, pairs, photo, script, write_kaggle
from sklearn.metrics import top_k_accuracy_score
from torch.nn import functional as F

import evaluate
import train
from evaluate import (
    KS,
    Embedded,
    bootstrap_intervals,
    contrastive_loss,
    evaluate_split,
    first_captions,
    load_data_for,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)
from sources.augment import resize
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import UserError
from support.embedding import Trained, load_trained, trained_on
from support.results import save_embeddings

WAYS = ("i2t", "t2i")

# ----------------------------------------------------------------------------------- ranks


def loop_ranks(images, texts, owner):
    """The protocol word for word: one query after the other, in float64."""
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    i2t, t2i = np.empty(len(images)), np.empty(len(texts))
    finite = [np.isfinite(text).all() for text in texts]
    known = [np.isfinite(image).all() for image in images]
    for i, image in enumerate(images):
        true = [image @ texts[j] for j in range(len(texts)) if owner[j] == i and finite[j]]
        if not known[i] or not true:
            i2t[i] = np.inf
            continue
        others = [j for j in range(len(texts)) if owner[j] != i]
        i2t[i] = 1 + sum(not finite[j] or image @ texts[j] >= max(true) for j in others)
    for j, text in enumerate(texts):
        if not finite[j] or not known[owner[j]]:
            t2i[j] = np.inf
            continue
        true, others = text @ images[owner[j]], [i for i in range(len(images)) if i != owner[j]]
        t2i[j] = 1 + sum(not known[i] or text @ images[i] >= true for i in others)
    return i2t, t2i


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scene(count: int, seed: int = 0, noise: float = 1.0, width: int = 6):
    """Images with 1 to 6 captions near them, the captions in no order."""
    generator = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), generator.integers(1, 7, count))
    generator.shuffle(owner)
    images = generator.normal(size=(count, width))
    texts = images[owner] + noise * generator.normal(size=(len(owner), width))
    return unit(images).astype(np.float32), unit(texts).astype(np.float32), owner


def assert_ranks_of_a_loop(images, texts, owner):
    found, expected = retrieval_ranks(images, texts, owner), loop_ranks(images, texts, owner)
    for ranks, by_loop in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ranks, by_loop)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_against_a_loop(seed):
    images, texts, owner = scene(30, seed)
    assert len(set(np.bincount(owner))) > 2 and (np.diff(owner) < 0).any()
    assert_ranks_of_a_loop(images, texts, owner)


def test_ranks_against_scikit_learn():
    images, texts, owner = scene(40, 9)
    _, t2i = retrieval_ranks(images, texts, owner)
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    for k in KS:
        expected = 100 * top_k_accuracy_score(owner, scores, k=k, labels=np.arange(40))
        assert recall_at_k(t2i, k) == pytest.approx(expected)


def test_ranks_across_the_borders_of_blocks():
    """1,100 images and 8,400 captions: two blocks each; the reference is one plain matrix."""
    generator = np.random.default_rng(1)
    owner = np.concatenate([np.arange(1100), generator.integers(0, 1100, 7300)])
    generator.shuffle(owner)
    images = generator.normal(size=(1100, 12)).astype(np.float32)
    texts = (images[owner] + 2 * generator.normal(size=(8400, 12))).astype(np.float32)
    i2t, t2i = retrieval_ranks(images, texts, owner)
    scores = images.astype(np.float64) @ texts.T.astype(np.float64)
    of_image = owner[None] == np.arange(1100)[:, None]
    best = np.where(of_image, scores, -np.inf).max(1)
    np.testing.assert_array_equal(i2t, 1 + ((scores > best[:, None]) & ~of_image).sum(1))
    true = scores[owner, np.arange(8400)]
    np.testing.assert_array_equal(t2i, 1 + (scores > true).sum(0))
    assert len(set(i2t)) > 50 and len(set(t2i)) > 100


def test_i2t_counts_the_best_of_an_images_captions():
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[0.1, 0, 0.9], [0.9, 0, 0.1], [0.5, 0.6, 0], [0, 0.2, 0.8]], np.float32)
    owner = np.array([0, 0, 1, 2])
    # Image 0: its captions 0.1 and 0.9, others 0.5 and 0. Image 1: its 0.6, others 0, 0, 0.2.
    # Image 2: its 0.8, others 0.9, 0.1, 0.
    i2t, t2i = retrieval_ranks(images, texts, owner)
    assert i2t.tolist() == [1, 1, 2]
    # Caption 0: 0.1 to its image, 0 and 0.9 to the others; the other captions find theirs.
    assert t2i.tolist() == [2, 1, 1, 1]


def test_ties_are_lost():
    images, texts, owner = scene(12, 3, noise=0.3)
    images[5], images[7] = images[2], images[2]
    for j in np.flatnonzero(np.isin(owner, (5, 7))):
        texts[j] = texts[np.flatnonzero(owner == 2)[0]]
    assert_ranks_of_a_loop(images, texts, owner)
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
    assert_ranks_of_a_loop(images, texts, owner)
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


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(2)
from evaluate import retrieval_ranks
generator = np.random.default_rng(0)
def peak():
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with the parent's, which is pytest with all its modules
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
owner = np.arange(25_000) % 5_000
images = generator.normal(size=(5_000, 64)).astype(np.float32)
texts = images[owner] + generator.normal(size=(25_000, 64)).astype(np.float32)
before = peak()
i2t, t2i = retrieval_ranks(images, texts, owner)
assert (i2t == 1).mean() > 0.9 and (t2i <= 10).mean() > 0.9
print(before, peak())
"""


def test_memory_does_not_grow_with_the_matrix():
    """As a matrix these scores would take 0.5 GB in float32 and 1 GB in float64."""
    words = [sys.executable, "-c", MEMORY]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < 3e8


# --------------------------------------------------------------------- figures and intervals


def test_metrics_counted_by_hand():
    i2t = np.array([1, 2, 5, 6, 20.0])
    t2i = np.array([1, 1, 1, 3, 4, 5, 7, 10, 11, np.inf])
    expected = {
        "i2t_r1": 20, "i2t_r5": 60, "i2t_r10": 80, "i2t_medr": 5,
        "i2t_meanr": (1 + 2 + 5 + 6 + 10) / 5,  # no rank is beyond the pool of 10 captions
        "t2i_r1": 30, "t2i_r5": 60, "t2i_r10": 80, "t2i_medr": 4.5,
        "t2i_meanr": (1 + 1 + 1 + 3 + 4 + 5 + 5 + 5 + 5 + 5) / 10,  # nor beyond 5 images
        "rsum": 330, "mean_recall": 55,
    }  # fmt: skip
    found = retrieval_metrics(i2t, t2i)
    assert found == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


def test_first_captions():
    assert first_captions(np.array([2, 0, 2, 1, 0])).tolist() == [1, 3, 0]


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
        low, high = found["i2t_r1"]
        expected = 2 * 1.96 * 100 * math.sqrt(share * (1 - share) / count)
        assert high - low == pytest.approx(expected, rel=0.15)
        # An image's captions hit together, so five captions an image tell no more than one.
        assert found["t2i_r1"] == pytest.approx([low, high])
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.2)


def test_a_certain_figure_has_no_interval():
    found = bootstrap_intervals(np.ones(20), np.full(20, 9.0), np.arange(20), resamples=50)
    assert found["i2t_r1"] == [100, 100] and found["t2i_r5"] == [0, 0]
    assert found["mean_recall"] == pytest.approx([400 / 6, 400 / 6])


@pytest.mark.parametrize(("batch", "sizes"), [(100, [9]), (9, [9]), (4, [3, 3, 3]), (5, [5, 4])])
def test_contrastive_loss_against_cross_entropy(batch, sizes):
    generator = np.random.default_rng(0)
    owner = np.array([0, 3, 1, 1, 2, 4, 5, 6, 3, 7, 8, 0])
    first = [0, 2, 4, 1, 5, 6, 7, 9, 10]
    images, texts = unit(generator.normal(size=(9, 6))), unit(generator.normal(size=(12, 6)))
    split = SimpleNamespace(caption_image=owner, text_ids=np.arange(12))
    embedded = Embedded(split, images, texts, np.ones(9), np.ones(12), {})
    expected, place = 0.0, 0
    for size in sizes:
        part = slice(place, place + size)
        logits = torch.from_numpy(7 * images[part] @ texts[first][part].T)
        both = [F.cross_entropy(x, torch.arange(size)).item() for x in (logits, logits.T)]
        expected += size / 9 * sum(both) / 2
        place += size
    assert contrastive_loss(embedded, 7.0, batch) == pytest.approx(expected)


# -------------------------------------------------------------------------------- one split


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache):
    def call(*words: object) -> None:
        fixed = ["--cache", cache, "--workers", 0, "--device", "cpu"]
        evaluate.main([str(word) for word in [*words, *fixed]])

    return call


@pytest.fixture(scope="module")
def other_run(photo_data: Path, cache: Path, tmp_path_factory) -> Path:
    """A run on the same data whose towers, sizes, words and training images are others."""
    out = tmp_path_factory.mktemp("runs") / "other"
    words = ["--data", photo_data, "--out", out, "--cache", cache, *TINY, "--epochs", 1]
    words += ["--image-size", 48, "--embed-dim", 16, "--text-tower", "bag", "--limit", 10]
    assert train.main([str(word) for word in [*words, "--test-mirror"]]) == 0
    return out


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def figures_by_loop(images, texts, owner) -> dict[str, float]:
    """Every figure of evaluate.py's JSON, counted one query after the other."""
    figures = {}
    for way, rank in zip(WAYS, loop_ranks(images, texts, owner), strict=True):
        figures |= {f"{way}_r{k}": 100 * sum(r <= k for r in rank) / len(rank) for k in KS}
        ordered = sorted(rank)
        figures[f"{way}_medr"] = (ordered[(len(rank) - 1) // 2] + ordered[len(rank) // 2]) / 2
        figures[f"{way}_meanr"] = sum(rank) / len(rank)
    figures["rsum"] = sum(figures[f"{way}_r{k}"] for way in WAYS for k in KS)
    figures["mean_recall"] = figures["rsum"] / 6
    count = len(images)
    first = [owner.tolist().index(i) for i in range(count)]
    square = images.astype(float) @ texts[first].T.astype(float)
    for key, table in (("top1_i2t", square), ("top1_t2i", square.T)):
        best = [all(row[i] > row[j] for j in range(count) if j != i) for i, row in enumerate(table)]
        figures[key] = 100 * sum(best) / count
    return figures


def assert_embeddings_of(saved: dict[str, np.ndarray], images: int, width: int) -> None:
    """What --save-embeddings writes: unit-length arrays, names and captions that belong."""
    assert saved.keys() == {
        "image_embeddings", "text_embeddings", "image_names", "captions", "caption_image"
    }  # fmt: skip
    owner = saved["caption_image"]
    assert saved["image_embeddings"].shape == (images, width) and len(owner) == 5 * images
    for key in ("image_embeddings", "text_embeddings"):
        assert saved[key].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(saved[key], axis=1), 1, atol=1e-5)
    captions = saved["captions"].tolist()
    written = zip(saved["image_names"][owner].tolist(), captions, strict=True)
    chosen = set(saved["image_names"].tolist())
    assert sorted(written) == sorted(pair for pair in pairs(40) if pair[0] in chosen)


@pytest.mark.parametrize(("split", "images"), [("test", 5), ("dev", 5), ("train", 30)])
def test_figures_are_those_of_the_embeddings(run, tiny_run, tmp_path, capsys, split, images):
    checkpoint = tiny_run / "best.pt"
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest(), checkpoint.stat().st_mtime_ns
    files = tmp_path / "figures.json", tmp_path / "embeddings.npz"
    run(checkpoint, "--split", split, "--json", files[0], "--save-embeddings", files[1])
    out, err = capsys.readouterr()
    after = hashlib.sha256(checkpoint.read_bytes()).hexdigest(), checkpoint.stat().st_mtime_ns
    assert after == before
    seen = images if split == "train" else 0
    warning = f"warning: {seen} of the {images} images evaluated were trained on\n"
    assert err == (warning if seen else "")

    saved, found = read_npz(files[1]), read(files[0])
    assert_embeddings_of(saved, images, 32)
    owner = saved["caption_image"]
    expected = figures_by_loop(saved["image_embeddings"], saved["text_embeddings"], owner)
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found.keys() == expected.keys() | {"intervals", "protocol"}

    intervals, protocol = found["intervals"], found["protocol"]
    recalls = {key for key in expected if not key.endswith(("medr", "meanr", "i2t", "t2i"))}
    assert intervals.keys() == recalls
    assert all(low <= expected[key] <= high for key, (low, high) in intervals.items())
    assert protocol["images"] == images and protocol["captions"] == 5 * images
    assert protocol["split"] == split and protocol["splits"] == "random"
    assert protocol["captions_per_image"] == [5, 5] and protocol["ties"] == "lost"
    assert protocol["trained_on"] == seen and protocol["checkpoint"] == str(checkpoint)
    for way in WAYS:
        row = next(line for line in out.splitlines() if line.startswith(way))
        for key in ("r1", "r5", "r10", "medr", "meanr"):
            assert f"{expected[f'{way}_{key}']:.1f}" in row
    assert f"mean recall {expected['mean_recall']:5.1f}" in out
    assert "R@10" in out and "protocol:" in out


def test_a_long_caption_does_not_widen_the_others(tmp_path):
    texts = [*["a dog", "猫 \ud83d"] * 450, "word " * 20_000]
    pairs = SimpleNamespace(captions=texts, rows=[0], caption_image=np.zeros(901, int))
    embedded = SimpleNamespace(pairs=pairs, image_embeddings=np.eye(1), text_embeddings=np.eye(1))
    save_embeddings(tmp_path / "e.npz", embedded, SimpleNamespace(names=["x"]))
    assert read_npz(tmp_path / "e.npz")["captions"].tolist() == texts
    assert (tmp_path / "e.npz").stat().st_size < 10 * sum(map(len, texts))


def test_evaluation_gives_the_same_figures_again(run, tiny_run, tmp_path):
    for name in ("one", "two"):
        run(tiny_run / "best.pt", "--json", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_best_epoch_is_the_one_on_dev(run, tiny_run, tmp_path):
    """best.pt gives on dev what history.csv says of its epoch."""
    run(tiny_run / "best.pt", "--split", "dev", "--json", tmp_path / "a.json")
    rows = [line.split(",") for line in (tiny_run / "history.csv").read_text().splitlines()]
    column = rows[0].index("mean_recall")
    best = max(float(row[column]) for row in rows[1:])
    assert read(tmp_path / "a.json")["mean_recall"] == pytest.approx(best)


def test_default_is_the_newest_best_checkpoint(run, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkpoints"):
        run()
    for name, age in (("a", 200), ("b", 100), ("c", 300)):
        place = Path("checkpoints") / name / "best.pt"
        place.parent.mkdir(parents=True)
        shutil.copyfile(tiny_run / "best.pt", place)
        os.utime(place, (place.stat().st_mtime - age,) * 2)
    shutil.copyfile(tiny_run / "last.pt", "checkpoints/c/last.pt")  # newer, but not the best
    run("--json", "figures.json")
    assert "checkpoint checkpoints/b/best.pt, epoch" in capsys.readouterr().out
    assert read(Path("figures.json"))["protocol"]["checkpoint"] == "checkpoints/b/best.pt"


def test_the_distance_matrix(run, tiny_run, tmp_path, capsys):
    files = tmp_path / "d.npy", tmp_path / "e.npz"
    run(tiny_run / "best.pt", "--distance-matrix", files[0], "--save-embeddings", files[1])
    saved, distances = read_npz(files[1]), np.load(files[0], allow_pickle=False)
    first = [saved["caption_image"].tolist().index(i) for i in range(5)]
    cosines = saved["image_embeddings"] @ saved["text_embeddings"][first].T
    assert distances.dtype == np.float32 and distances.shape == (5, 5)
    np.testing.assert_allclose(distances, -cosines, atol=1e-6)
    assert f"mean {-cosines.diagonal().mean():.4f} on the diagonal" in capsys.readouterr().out


def test_captions_that_are_cut_are_counted(run, tiny_run, photos, tmp_path, capsys):
    run(tiny_run / "best.pt", "--data", photos)
    assert " cut " not in capsys.readouterr().err
    text = (photos / "captions.txt").read_text()
    (photos / "captions.txt").write_text(text.replace("ground", "ground " * 60))
    run(tiny_run / "best.pt", "--data", photos)
    said = re.search(r"(\d+) of (\d+) captions are cut to 40", capsys.readouterr().err)
    assert int(said[1]) / int(said[2]) == 2 / 5  # of an image's five


def test_data_elsewhere(run, tiny_run, tmp_path, capsys):
    """The same pictures under other names are known by their content; new ones are not known."""
    data = write_kaggle(tmp_path / "there", 40)
    for path in sorted((data / "images").iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    captions = data / "captions.txt"
    captions.write_text(captions.read_text().replace("photo_", "xphoto_"))
    run(tiny_run / "best.pt", "--data", data, "--split", "train", "--json", tmp_path / "a.json")
    out, err = capsys.readouterr()
    assert "30 of the 30 images evaluated were trained on" in err and str(data) in out
    protocol = read(tmp_path / "a.json")["protocol"]
    assert protocol["data"] == str(data) and protocol["trained_on"] == 30
    for path in sorted((data / "images").iterdir()):
        photo(1000 + int(path.stem[-3:])).save(path)
    run(tiny_run / "best.pt", "--data", data, "--split", "train")
    assert "trained on" not in capsys.readouterr().err


# ------------------------------------------------------------------------------ side by side


def test_several_checkpoints_go_side_by_side(run, tiny_run, other_run, tmp_path, capsys):
    """Cosines are the mean of the models', each by its width; figures are those of the cosines."""
    places = [tiny_run / "best.pt", other_run / "best.pt"]
    saved = []
    for number, words in enumerate((places[:1], places[1:], places)):
        files = tmp_path / f"{number}.json", tmp_path / f"{number}.npz"
        run(*words, "--json", files[0], "--save-embeddings", files[1])
        saved.append(read_npz(files[1]))
    out = capsys.readouterr().out
    assert f"checkpoint {places[0]} and {places[1]}, epoch" in out
    tiny, other, both = saved
    assert_embeddings_of(both, 5, 48)
    cosines = [s["image_embeddings"] @ s["text_embeddings"].T for s in saved]
    mean = (32 * cosines[0] + 16 * cosines[1]) / 48
    np.testing.assert_allclose(cosines[2], mean, atol=1e-5)
    assert np.abs(cosines[2] - cosines[0]).max() > 1e-2
    assert (tiny["image_names"] == other["image_names"]).all()
    owner = both["caption_image"]
    expected = figures_by_loop(both["image_embeddings"], both["text_embeddings"], owner)
    found = read(tmp_path / "2.json")
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["protocol"]["checkpoint"] == f"{places[0]} {places[1]}"


def test_a_recipes_checkpoint_holds_several(run, tiny_run, other_run, tmp_path):
    places = [tiny_run / "best.pt", other_run / "best.pt"]
    members = {"members": [load_checkpoint(place) for place in places]}
    save_checkpoint(tmp_path / "best.pt", members)
    run(*places, "--json", tmp_path / "several.json")
    run(tmp_path / "best.pt", "--json", tmp_path / "one.json")
    several, one = read(tmp_path / "several.json"), read(tmp_path / "one.json")
    assert several.pop("protocol")["fingerprint"] == one.pop("protocol")["fingerprint"]
    assert several == one
    trained = load_trained([tmp_path / "best.pt", places[0]], "cpu")
    assert len(trained.members) == 3


def test_three_models_of_one_width_count_alike(tiny_run, other_run):
    paths = [tiny_run / "best.pt", tiny_run / "last.pt", tiny_run / "best.pt"]
    texts = [caption for _, caption in pairs(6)]
    together = load_trained(paths, "cpu").embed_texts(texts)
    alone = [load_trained([path], "cpu").embed_texts(texts) for path in paths]
    assert together.shape == (30, 96) and together.dtype == np.float32
    np.testing.assert_allclose(together @ together.T, sum(x @ x.T for x in alone) / 3, atol=1e-5)


def test_what_any_of_several_was_trained_on():
    dataset = SimpleNamespace(names=[*"abcd"], digests=[*"1234"])
    contents = [
        {"train_images": {"names": ["a"], "digests": ["9"]}},
        {"train_images": {"names": ["other"], "digests": ["3"]}},
    ]
    seen = trained_on(Trained(Path(), contents, []), dataset, np.array([3, 2, 0, 1]))
    assert seen.tolist() == [False, True, False, False]  # a name is no content


def test_each_of_several_reads_with_its_own_vocabulary(tiny_run, other_run, cache, tmp_path):
    """The second one's words have other numbers than the first one's."""
    content = load_checkpoint(other_run / "best.pt")
    content["vocabulary"][4:] = content["vocabulary"][:3:-1]
    save_checkpoint(tmp_path / "turned.pt", content)
    paths, made = [tiny_run / "best.pt", tmp_path / "turned.pt"], []
    for chosen in (paths[1:], paths):
        trained, options = load_trained(chosen, "cpu"), data_options(cache)
        dataset, _ = load_data_for(trained, options)
        made.append(evaluate.evaluate_trained(trained, dataset, "dev", options).text_embeddings)
    np.testing.assert_allclose(made[1][:, 32:], made[0] * math.sqrt(16 / 48), atol=1e-5)


def test_words_that_no_model_knows(tiny_run, other_run, tmp_path):
    content = load_checkpoint(other_run / "best.pt")
    content["vocabulary"][content["vocabulary"].index("dog")] = "zebra"
    one = load_trained([tiny_run / "best.pt"], "cpu")
    assert one.unknown("A dog, a ZEBRA and a yak") == ["zebra", "and", "yak"]
    save_checkpoint(tmp_path / "zebra.pt", content)
    both = load_trained([tiny_run / "best.pt", tmp_path / "zebra.pt"], "cpu")
    assert both.unknown("A dog, a ZEBRA and a yak") == ["and", "yak"]


# ------------------------------------------------------------------------------- embeddings


def data_options(cache: Path, split: str = "dev") -> Namespace:
    return Namespace(data=None, splits=None, split=split, cache=cache, workers=0)


def test_pictures_of_the_users_own_embed_as_those_of_a_split(tiny_run, other_run, cache):
    trained = load_trained([tiny_run / "best.pt", other_run / "best.pt"], "cpu")
    options, sizes = data_options(cache), []
    dataset, split = load_data_for(trained, options)
    embedded = evaluate.evaluate_trained(trained, dataset, "dev", options)

    def pixels_at(size: int) -> np.ndarray:
        sizes.append(size)
        return np.array(dataset.at_size(size, cache, 0).pixels[split.rows])

    np.testing.assert_allclose(
        trained.embed_pixels(pixels_at), embedded.image_embeddings, atol=1e-6
    )
    np.testing.assert_allclose(
        trained.embed_texts(split.captions), embedded.text_embeddings, atol=1e-5
    )
    assert sizes == [member.transform["stored_size"] for member in trained.members]


def test_a_mirrored_embedding_is_the_mean_of_both_views(other_run, cache):
    trained = load_trained([other_run / "best.pt"], "cpu")
    (model,) = trained.members
    dataset, split = load_data_for(trained, data_options(cache))
    images = resize(torch.from_numpy(np.array(dataset.pixels[split.rows])), 48)
    with torch.inference_mode():
        mean = model.encode_image(images) + model.encode_image(images.flip(3))
    expected = unit(mean.numpy())
    found = evaluate_split(model, split).image_embeddings
    np.testing.assert_allclose(found, expected, atol=1e-5)
    model.transform["mirror"] = False
    assert np.abs(evaluate_split(model, split).image_embeddings - expected).max() > 1e-3


@pytest.mark.parametrize("mirror", [False, True])
def test_an_embedding_of_crops_is_the_mean_of_all_views(tiny_run, cache, mirror):
    trained = load_trained([tiny_run / "best.pt"], "cpu")
    (model,) = trained.members
    dataset, split = load_data_for(trained, data_options(cache))
    pixels = np.array(dataset.pixels[split.rows])
    side, size = pixels.shape[1], model.transform["image_size"]
    kept, far = round(0.8 * side), side - round(0.8 * side)
    places = [(0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)]
    parts = [pixels, *(pixels[:, y : y + kept, x : x + kept] for y, x in places)]
    mean = 0
    with torch.inference_mode():
        for part in parts:
            images = resize(torch.from_numpy(part), size)
            mean = mean + model.encode_image(images)
            if mirror:
                mean = mean + model.encode_image(images.flip(3))
    model.transform |= {"crops": True, "mirror": mirror}
    found = evaluate_split(model, split).image_embeddings
    np.testing.assert_allclose(found, unit(mean.numpy()), atol=1e-5)


def test_evaluating_leaves_the_models_mode(tiny_run, cache):
    trained = load_trained([tiny_run / "best.pt"], "cpu")
    (model,) = trained.members
    _, split = load_data_for(trained, data_options(cache))
    assert not model.training
    for mode in (True, False):
        model.train(mode)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        evaluate_split(model, split)
        assert model.training is mode and model.image_tower.training is mode
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_order_and_company_do_not_change_a_text(tiny_run):
    trained = load_trained([tiny_run / "best.pt"], "cpu")
    texts = [caption for _, caption in pairs(40)] + ["a", "red " * 60]
    assert len({len(text) for text in texts}) > 10
    together = trained.embed_texts(texts * 2)
    np.testing.assert_allclose(together[: len(texts)], together[len(texts) :], atol=1e-5)
    for row in (0, 7, 150, 200, 201):
        alone = trained.embed_texts([texts[row]])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)


# --------------------------------------------------------------------------------- refusals


def test_data_that_is_gone(run, tiny_run, tmp_path):
    with pytest.raises(UserError) as refusal:
        run(tiny_run / "best.pt", "--data", tmp_path / "nowhere")
    assert "--data PATH names another place" not in str(refusal.value)
    content = load_checkpoint(tiny_run / "best.pt")
    content["config"]["data"] = str(tmp_path / "gone")
    save_checkpoint(tmp_path / "best.pt", content)
    with pytest.raises(UserError, match="--data PATH names another place"):
        run(tmp_path / "best.pt")


def test_files_that_cannot_be_written(run, tiny_run, tmp_path):
    (tmp_path / "file").touch()
    for flag in ("--json", "--save-embeddings", "--distance-matrix"):
        with pytest.raises(UserError, match="cannot write"):
            run(tiny_run / "best.pt", flag, tmp_path / "file" / "a.npz")
    assert listed(tmp_path) == ["file"]


def test_a_wrong_checkpoint_is_one_line(tiny_run, tmp_path):
    (tmp_path / "best.pt").write_text("nothing")
    done = script("evaluate.py", tiny_run / "best.pt", tmp_path / "best.pt")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("evaluate.py: error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path / "best.pt") in done.stderr


def test_flags_that_do_not_go_together(run, tmp_path):
    with pytest.raises(UserError, match="--templates goes with --zero-shot"):
        run("--templates", tmp_path)
    for flag in ("--save-embeddings", "--distance-matrix"):
        with pytest.raises(UserError, match="do not go with --zero-shot"):
            run(flag, tmp_path / "a.npz", "--zero-shot", tmp_path)
