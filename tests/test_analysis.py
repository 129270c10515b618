"""Predictions and analysis: figures recomputed by plain loops from embeddings and captions."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from report import predictions
from support.results import cell_of, read_csv, write_csv

# --------------------------------------------------------------------------- CSV and predictions


@pytest.mark.parametrize("text", ["=1+1", "+1", "-a", "@SUM(A1)", " =1", "\t=1", "\tx", "＝1"])
def test_no_cell_is_a_formula(text):
    assert cell_of(text) == f"'{text}"


def test_a_table_opens_in_a_spreadsheet_and_reads_back(tmp_path):
    odd = ["a, b", 'she said "no"', "两只狗 🐕", "two\nlines", "a dog's", "", "-1 dog"]
    write_csv(tmp_path / "a.csv", ["text", "number"], [(text, -0.5) for text in odd])
    data = (tmp_path / "a.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf") and data.count(b"\xef\xbb\xbf") == 1
    rows = read_csv(tmp_path / "a.csv")
    assert [row["text"] for row in rows] == [*odd[:-1], "'-1 dog"]
    assert {row["number"] for row in rows} == {"-0.5"}  # a number below 0 stays one
    write_csv(tmp_path / "a.csv", ["x", "y"], [(float("inf"), float("nan")), ("\udcff.jpg", 1)])
    assert read_csv(tmp_path / "a.csv") == [{"x": "", "y": ""}, {"x": "\\udcff.jpg", "y": "1"}]


def ranked(images: np.ndarray, texts: np.ndarray, captions: list[str], owner: list[int]):
    """A ranked split of made-up embeddings; picture i is named i.jpg."""
    dataset = SimpleNamespace(names=[f"{i}.jpg" for i in range(len(images))])
    rows, owner = np.arange(len(images)), np.array(owner)
    pairs = SimpleNamespace(dataset=dataset, rows=rows, captions=captions, caption_image=owner)
    return evaluate.ranked(pairs, images.astype(np.float32), texts.astype(np.float32))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scene(count: int, seed: int, noise: float = 1.0):
    """Pictures with 1 to 4 captions each, in no order."""
    generator = np.random.default_rng(seed)
    owner = np.repeat(np.arange(count), generator.integers(1, 5, count))
    generator.shuffle(owner)
    images = generator.normal(size=(count, 5))
    texts = images[owner] + noise * generator.normal(size=(len(owner), 5))
    captions = [f"caption {i} of {picture}" for i, picture in enumerate(owner)]
    return ranked(unit(images), unit(texts), captions, owner.tolist())


def check_predictions(rows: list[dict[str, str]], embedded) -> None:
    """Every cell of the file, counted one query after the other."""
    pairs, images = embedded.pairs, embedded.image_embeddings.astype(float)
    texts, owner = embedded.text_embeddings.astype(float), pairs.caption_image
    names = [pairs.dataset.names[row] for row in pairs.rows]
    assert [row["query"] for row in rows] == ["caption"] * len(texts) + ["image"] * len(images)
    for i, row in enumerate(rows):
        if i < len(texts):
            scores, true, searched = images @ texts[i], np.arange(len(images)) == owner[i], names
            assert (row["caption"], row["image"]) == (pairs.captions[i], names[owner[i]])
        else:
            scores, true = texts @ images[i - len(texts)], owner == i - len(texts)
            searched, own = pairs.captions, np.flatnonzero(true)
            assert row["image"] == names[i - len(texts)]
            assert row["caption"] == pairs.captions[own[scores[own].argmax()]]
        best = scores[true].max()
        assert float(row["score"]) == pytest.approx(best, abs=1e-5)
        assert int(row["rank"]) == 1 + sum(scores[~true] >= best - 1e-12)
        assert float(row["margin"]) == pytest.approx(best - scores[~true].max(), abs=1e-5)
        # Alike captions score alike: the true one comes last of them.
        order = sorted(range(len(scores)), key=lambda j: (-scores[j].round(9), true[j], j))[:5]
        found = [row[f"found_{place}"] for place in range(1, 6)]
        assert found == [searched[j] for j in order] + [""] * (5 - len(order))
        for place, j in enumerate(order, 1):
            assert float(row[f"score_{place}"]) == pytest.approx(scores[j], abs=1e-5)


@pytest.mark.parametrize(("count", "seed"), [(30, 0), (300, 1), (3, 2)])
def test_predictions_are_those_of_a_loop(tmp_path, count, seed):
    embedded = scene(count, seed)
    predictions.write_predictions(tmp_path / "p.csv", embedded)
    check_predictions(read_csv(tmp_path / "p.csv"), embedded)
    with (tmp_path / "p.csv").open(encoding="utf-8-sig", newline="") as file:
        assert next(csv.reader(file)) == predictions.COLUMNS
    for column in ("query", "image", "caption", "rank", "score", "margin"):
        assert f"    {column} " in predictions.__doc__


def test_a_tie_stands_before_the_true_one(tmp_path):
    """The rank says that a tie is lost, so the list must say so too."""
    embedded = ranked(np.eye(3)[[0, 0, 1]], np.eye(3)[[0, 0, 1]], ["a", "b", "c"], [0, 1, 2])
    predictions.write_predictions(tmp_path / "p.csv", embedded)
    rows = read_csv(tmp_path / "p.csv")
    assert [row["rank"] for row in rows] == ["2", "2", "1"] * 2
    assert [row["found_1"] for row in rows] == ["1.jpg", "0.jpg", "2.jpg", "b", "a", "c"]
    assert [row["margin"] for row in rows] == ["0", "0", "1"] * 2


def test_a_score_that_is_no_number_has_no_rank(tmp_path):
    images = np.eye(3)
    images[1] = np.nan
    predictions.write_predictions(
        tmp_path / "p.csv", ranked(images, np.eye(3), ["a", "=b", "c"], [0, 1, 2])
    )
    rows = read_csv(tmp_path / "p.csv")
    assert [row["rank"] for row in rows if row["image"] == "1.jpg"] == ["", ""]
    assert [row["score"] for row in rows if row["image"] == "1.jpg"] == ["", ""]
    assert rows[1]["caption"] == "'=b" and rows[0]["found_1"] == "0.jpg"


# ------------------------------------------------------------------------------ as a user


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache):
    def call(*words: object) -> None:
        fixed = ["--cache", cache, "--workers", 0, "--device", "cpu"]
        evaluate.main([str(word) for word in [*words, *fixed]])

    return call


def embedded_of(file: Path):
    """The ranked split that evaluate.py --save-embeddings wrote."""
    with np.load(file, allow_pickle=False) as saved:
        embedded = ranked(
            saved["image_embeddings"],
            saved["text_embeddings"],
            saved["captions"].tolist(),
            saved["caption_image"].tolist(),
        )
        embedded.pairs.dataset.names = saved["image_names"].tolist()
    return embedded


def test_predictions_of_a_run(run, tiny_run, tmp_path, capsys):
    files = ("--predictions", tmp_path / "p.csv", "--save-embeddings", tmp_path / "e.npz")
    run(tiny_run / "best.pt", "--split", "train", *files)
    assert f"wrote {tmp_path / 'p.csv'}" in capsys.readouterr().out
    check_predictions(read_csv(tmp_path / "p.csv"), embedded_of(tmp_path / "e.npz"))
